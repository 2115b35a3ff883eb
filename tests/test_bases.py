"""Whatever base optimizer takes the step."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything, through_closure, through_context, through_two_steps, train
from optimizers import sgd
from problems import batches, tiny_network


def _constructible_bases():
    takes_dense_closure_free = {"LBFGS", "SparseAdam", "Optimizer", "Adadelta", "Muon"}
    return [
        base
        for name, base in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(base, torch.optim.Optimizer) and name not in takes_dense_closure_free
    ]


@pytest.mark.parametrize("base", _constructible_bases(), ids=lambda base: base.__name__)
def test_rho_zero_is_every_base_of_torch(base):
    model, plain = tiny_network(), tiny_network()
    train(flatmin.SAM(base(model.parameters(), lr=0.01), 0.0, model=model), model)
    train(base(plain.parameters(), lr=0.01), plain)
    assert torch.equal(everything(model), everything(plain))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_checkpoint_of_an_unfused_base_goes_on_in_a_fused_one(base):
    """It turns the base's groups into unfused ones, which cannot read the flag."""
    models = [tiny_network() for _ in range(2)]
    bases = [base(model.parameters(), lr=0.01, fused=fused) for model, fused in zip(models, (None, True), strict=True)]
    optimizers = [flatmin.SAM(base, model=model) for base, model in zip(bases, models, strict=True)]
    train(optimizers[0], models[0])
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for optimizer, model in zip(optimizers, models, strict=True):
        train(optimizer, model)
    assert torch.equal(everything(models[0]), everything(models[1]))


def test_a_base_with_a_hyperparameter_of_our_name_is_refused():
    with pytest.raises(ValueError, match="no hyperparameter named rho, which are ours, got Adadelta"):
        flatmin.SAM(torch.optim.Adadelta(tiny_network().parameters()))


def test_a_base_whose_zero_grad_is_its_own_works():
    class Own(torch.optim.SGD):
        def zero_grad(self):
            for param in self.param_groups[0]["params"]:
                param.grad = None

    model, other = tiny_network(), tiny_network()
    for door in (through_closure, through_two_steps, through_context):
        train(flatmin.SAM(Own(model.parameters(), lr=0.1), model=model), model, range(3), door)
        train(flatmin.SAM(torch.optim.SGD(other.parameters(), lr=0.1), model=other), other, range(3), door)
    assert torch.equal(everything(model), everything(other))


class _WithModes(torch.optim.SGD):
    """Keeps other weights for evaluation, as schedule-free optimizers do."""

    mode = "eval"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_a_base_with_modes_is_switched():
    weights = nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(_WithModes([weights], lr=0.1))
    optimizer.train()
    assert optimizer.base.mode == "train"
    weights.square().sum().backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"eval\(\) must not be called between first_step"):
        optimizer.eval()
    assert optimizer.base.mode == "train"
    optimizer.restore()
    optimizer.eval()
    assert optimizer.base.mode == "eval"
    flatmin.SAM(torch.optim.SGD([weights], lr=0.1)).train()  # one without modes stays as it is


class _Around(torch.optim.Optimizer):
    """Around another optimizer without torch's constructor, as timm's Lookahead is."""

    def __init__(self, base):
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, base.defaults


def test_a_base_around_another_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"base must have been made by .* got _Around: .* goes around ours"):
        flatmin.SAM(_Around(sgd(tiny_network().parameters())))


def test_a_second_closure_is_no_scaler():
    model = tiny_network()
    for make in (flatmin.SAM, flatmin.MSAM):
        optimizer = make(sgd(model.parameters()))
        with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler, got <function"):
            optimizer.step(lambda: _differentiated(model), lambda: _differentiated(model))


def _differentiated(model):
    inputs, labels = batches()[0]
    loss = cross_entropy(model(inputs), labels)
    loss.backward()
    return loss
