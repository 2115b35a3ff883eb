"""One replicated model that several optimizers, or none but a search for rho, make passes through."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import flatmin
from flatmin.optim import SecondOrderSAM
from replicas import by_closure, by_two_steps, closure_on, is_same_everywhere, network, parameters_of, replicated, sgd

DOORS = {"closure": by_closure, "two steps": by_two_steps}


def _taking_turns(sync, door, other_steps):
    """One optimizer would have DDP average where the other, which has no part in the pass, would not."""
    model = replicated(network())
    body, head = (torch.optim.SGD(part.parameters(), lr=0.2) for part in (model.module[:2], model.module[2:]))
    optimizer = flatmin.SAM(body, 0.3, model=model, sync=sync)
    other = flatmin.GSAM(head, 0.3, model=model)
    for step in range(3):
        before = parameters_of(model)
        DOORS[door](optimizer, model, step)
        assert is_same_everywhere(parameters_of(model))
        assert not torch.equal(parameters_of(model), before)
        if other_steps:
            DOORS[door](other, model, step)
            assert is_same_everywhere(parameters_of(model))
        assert model.require_backward_grad_sync


@pytest.mark.parametrize("other_steps", [True, False], ids=["both step", "one is idle"])
@pytest.mark.parametrize("door", DOORS)
def test_replicas_agree_where_two_optimizers_share_a_model(two_ranks, door, other_steps):
    two_ranks.run(_taking_turns, "local", door, other_steps)
    two_ranks.run(_taking_turns, "global", door, other_steps)


def _searched(kind):
    """The radius, and that of a search which sees this process's batch alone."""
    model = alone = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    if kind == "ddp":
        alone, model = network(), replicated(network())
    else:
        fully_shard(model)
    optimizer = flatmin.SAM(sgd(model), 0.1, model=model)
    rho = flatmin.suggest_rho(optimizer, closure_on(optimizer, model, 0), target_rise=0.05)
    if kind == "ddp":
        assert model.require_backward_grad_sync
        other = flatmin.SAM(sgd(alone), 0.1, model=alone)
        return rho, flatmin.suggest_rho(other, closure_on(other, alone, 0), target_rise=0.05)
    return rho, None


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_find_one_radius_for_the_mean_of_their_losses(two_ranks, kind):
    (first, alone), (second, other_alone) = two_ranks.run(_searched, kind)
    assert first == second
    if kind == "ddp":
        assert alone != other_alone
        assert min(alone, other_alone) < first < max(alone, other_alone)


def _second_order():
    for wrapped, message in (
        (replicated(network()), "model must not be in DistributedDataParallel"),
        (fully_shard(network()), "base must have whole parameters"),
    ):
        base = sgd(wrapped)
        with pytest.raises(ValueError, match=message):
            SecondOrderSAM(base, model=wrapped)
        flatmin.SAM(base, model=wrapped)  # the refusal has left no mark on the base


def test_second_order_refuses_models_whose_gradients_it_would_not_share(two_ranks):
    two_ranks.run(_second_order)


class _Unequal(nn.Module):
    """A network of which the first replica uses more than the others, always."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.everyone = nn.Linear(5, 3).double()
        self.first = nn.Linear(5, 3).double()

    def forward(self, inputs):
        outputs = self.everyone(inputs)
        return outputs + self.first(inputs) if distributed.get_rank() == 0 else outputs


def _unequal_in_a_static_graph(method):
    model, dynamic = (replicated(_Unequal(), **{name: True}) for name in ("static_graph", "find_unused_parameters"))
    optimizer, other = (method(sgd(each), 0.3, model=each) for each in (model, dynamic))
    for step in range(3):
        by_closure(optimizer, model, step)
        by_closure(other, dynamic, step)
        assert is_same_everywhere(parameters_of(model))
    torch.testing.assert_close(parameters_of(model), parameters_of(dynamic), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [flatmin.SAM, flatmin.GSAM])
def test_replicas_of_a_static_graph_may_use_different_parameters(two_ranks, method):
    two_ranks.run(_unequal_in_a_static_graph, method)
