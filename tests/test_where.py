"""Which parameters are perturbed."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import flatmin
from doors import through_closure
from problems import batches, quadratic, tiny_network


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5))


NORM = {"1.weight", "1.bias", "4.weight", "4.bias"}
ALL = {name for name, _ in _network().named_parameters()}
MASK = torch.arange(5) % 2 == 0


@pytest.mark.parametrize(
    ("perturb", "expected"),
    [
        ("norm", NORM),
        ("no_norm", ALL - NORM),
        (nn.Conv2d, {"0.weight", "0.bias"}),
        ((nn.Conv2d, nn.Linear), {"0.weight", "0.bias", "3.weight", "3.bias"}),
        (lambda name, param: param.dim() > 1, {"0.weight", "3.weight"}),
        ({"3.bias": MASK}, {"3.bias"}),
    ],
    ids=["norm", "no norm", "class", "classes", "function", "masks"],
)
def test_what_is_named_is_chosen(perturb, expected):
    groups = flatmin.param_groups(_network(), perturb)
    found = {group["perturb"]: {name for name, _ in group["params"]} for group in groups}
    assert found[True] == expected
    assert found[False] == ALL - expected


def test_groups_keep_their_settings():
    model = _network()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    given = [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 1]}]
    groups = flatmin.param_groups(model, "norm", given)
    found = [(group["perturb"], group.get("weight_decay"), len(group["params"])) for group in groups]
    assert found == [(False, 0.1, 2), (True, None, 4), (False, None, 2)]
    assert given[0]["params"] is matrices


def test_only_the_chosen_are_moved_and_measured():
    model = tiny_network().double()
    optimizer = flatmin.SAMON(torch.optim.SGD(flatmin.param_groups(model, "norm"), lr=0.1), 0.3, model=model)
    start = [param.detach().clone() for param in model.parameters()]
    moves = []

    def loss():
        moves.append([param.detach() - old for param, old in zip(model.parameters(), start, strict=True)])
        return nn.functional.cross_entropy(model(batches(torch.float64)[0][0]), batches()[0][1])

    through_closure(optimizer, loss)
    names = [name for name, _ in model.named_parameters()]
    assert {name for name, move in zip(names, moves[1], strict=True) if move.any()} == {"norm.weight", "norm.bias"}
    length = torch.cat([move.flatten() for move in moves[1]]).norm()
    torch.testing.assert_close(length, torch.tensor(0.3, dtype=torch.float64))
    assert any((param != old).any() for param, old in zip(model.first.parameters(), start[1:3], strict=True))


@pytest.mark.parametrize("eta", [None, 0.05], ids=["SAM-ON", "ASAM-ON"])
def test_sam_on_equals_the_published_box_in_float64(eta):
    """Mueller et al. 2023: SAM's perturbation, or ASAM's, with norms and moves in the norm layers alone."""
    model = tiny_network().double().eval()
    base = torch.optim.SGD(flatmin.param_groups(model, "norm"), lr=0.1)
    optimizer = flatmin.SAMON(base, 0.7, model=model, adaptive=eta is not None, eta=eta or 0.01)
    w = {name: param.detach().clone() for name, param in model.named_parameters() if name != "unused"}
    for step in range(20):
        inputs, labels = batches(torch.float64)[step % 6]

        def gradient(at, inputs=inputs, labels=labels):
            at = {name: x.detach().requires_grad_() for name, x in at.items()}
            loss = nn.functional.cross_entropy(torch.func.functional_call(model, at, (inputs,)), labels)
            return dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))

        through_closure(optimizer, lambda x=inputs, y=labels: nn.functional.cross_entropy(model(x), y))
        clean = gradient(w)
        scaled = {n: (w[n].abs() + eta if eta else torch.ones_like(w[n])) for n in w if n.startswith("norm.")}
        length = torch.cat([(scaled[n] * clean[n]).flatten() for n in scaled]).norm()
        there = {n: x + 0.7 * scaled[n] ** 2 * clean[n] / length if n in scaled else x for n, x in w.items()}
        found = gradient(there)
        assert step or max((found[n] - clean[n]).abs().max() for n in w) > 1e-3  # the perturbation tells
        w = {n: x - 0.1 * found[n] for n, x in w.items()}
        own = {name: param.detach() for name, param in model.named_parameters() if name != "unused"}
        torch.testing.assert_close(own, w, rtol=1e-9, atol=1e-9, check_stride=False)


def test_masked_entries_stay():
    weights = nn.Parameter(torch.ones(5))
    model = nn.Module()
    model.weights = weights
    groups = flatmin.param_groups(model, {"weights": MASK})
    optimizer = flatmin.SAM(torch.optim.SGD(groups, lr=0.1), 3.0**0.5)
    weights.sum().backward()
    with optimizer.perturbed():
        torch.testing.assert_close(weights.detach(), torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0]))
        weights.sum().backward()


def test_a_masked_complex_entry_stays_with_both_its_parts():
    """Of two entries, so that a mask for the wrong axis would fit as well."""
    model = nn.Module()
    model.weights = nn.Parameter(torch.tensor([3 + 4j, 1 - 2j]))
    groups = flatmin.param_groups(model, {"weights": torch.tensor([True, False])})
    optimizer = flatmin.SAM(torch.optim.SGD(groups, lr=0.1), 5.0)
    model.weights.abs().square().sum().backward()
    with optimizer.perturbed():
        torch.testing.assert_close(model.weights.detach(), torch.tensor([6 + 8j, 1 - 2j]))
        model.weights.abs().sum().backward()


def test_masks_of_sharded_parameters_are_sharded_as_well(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Module()
        model.weights = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="perturb must hold masks that are spread over processes"):
            flatmin.param_groups(model, {"weights": MASK})
        groups = flatmin.param_groups(model, {"weights": distribute_tensor(MASK, mesh, [Replicate()])})
        optimizer = flatmin.SAM(torch.optim.SGD(groups, lr=0.1), 3.0**0.5)
        model.weights.sum().backward()
        with optimizer.perturbed():
            torch.testing.assert_close(model.weights.to_local().detach(), torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0]))
            model.weights.sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("perturb", "message"),
    [
        ("layers", "perturb must be"),
        (nn.Conv3d, "perturb must choose some parameter"),
        ({"3.bias": torch.ones(5)}, "boolean masks"),
        ({"nowhere": MASK}, "boolean masks"),
        (None, 'perturb must be "norm", "no_norm", module classes, a function or masks by name, got None'),
        (["norm"], r"perturb must be .*, got \['norm'\]"),
    ],
)
def test_bad_choices_are_refused(perturb, message):
    with pytest.raises(ValueError, match=message):
        flatmin.param_groups(_network(), perturb)


def test_groups_of_another_model_and_samon_without_groups_are_refused():
    with pytest.raises(ValueError, match="groups must hold parameters of the model"):
        flatmin.param_groups(_network(), "norm", [{"params": [nn.Parameter(torch.ones(1))]}])
    with pytest.raises(ValueError, match="base must have groups with perturb=False"):
        flatmin.SAMON(torch.optim.SGD(_network().parameters(), lr=0.1))


def test_the_unit_gradient_is_blended_in_where_the_perturbation_is():
    """GNP by its authors' code: ``(1 - alpha) g / ||g|| + alpha g_p``, and g itself in a group that stays."""
    curvature = torch.diag(torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64))
    moved, still = (nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in ([1.0, -2.0], [0.5]))
    groups = [{"params": [moved]}, {"params": [still], "perturb": False}]
    optimizer = flatmin.GNP(torch.optim.SGD(groups, lr=0.0), 0.7, alpha=0.3, unit_clean=True)
    through_closure(optimizer, lambda: quadratic(curvature, torch.cat([moved, still])))
    g = torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64)
    g_p = g + 0.7 * torch.tensor([4.0 * 4.0, -2.0, 0.0], dtype=torch.float64) / g[:2].norm()
    torch.testing.assert_close(moved.grad, 0.7 * g[:2] / g.norm() + 0.3 * g_p[:2], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(still.grad, g[2:], rtol=1e-12, atol=0.0)
