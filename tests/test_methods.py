"""What single methods promise beyond the contract."""

import copy
import inspect

import pytest
import torch
from torch import nn

import flatmin
from doors import everything, through_closure, through_context, through_two_steps, train
from flatmin.optim import Always, Ball, Centralised, Filtered, Gradient, SharpnessAware
from problems import quadratic, tiny_network


def test_sam_on_a_quadratic_follows_the_closed_form():
    curvature = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    weights = nn.Parameter(start.clone())
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=1.0), 0.7)
    through_closure(optimizer, lambda: quadratic(curvature, weights))
    gradient = curvature @ start
    step = start - weights.detach()
    torch.testing.assert_close(step, curvature @ (start + 0.7 * gradient / gradient.norm()), rtol=1e-14, atol=1e-14)
    assert (step - gradient).norm() > 0.1


def test_the_default_pieces_are_sam():
    one, other = tiny_network(), tiny_network()
    composed = SharpnessAware(torch.optim.SGD(one.parameters(), lr=0.1), 0.2, ball=Ball(2.0), when=Always(), model=one)
    named = flatmin.SAM(torch.optim.SGD(other.parameters(), lr=0.1), 0.2, model=other)
    train(composed, one)
    train(named, other)
    assert torch.equal(everything(one), everything(other))


PUBLISHED = {  # the numbers that the docstrings trace to papers and authors' codes; LESAM's are ours, as it says
    "SAM": {"rho": 0.05, "p": 2.0},
    "ASAM": {"rho": 0.5, "eta": 0.01, "p": 2.0},
    "FisherSAM": {"rho": 0.1, "eta": 0.1},
    "LayerSAM": {"rho": 0.1},
    "SAMON": {"rho": 0.5, "eta": 0.01},
    "USAM": {"rho": 0.05, "share": 0.0},
    "LESAM": {"rho": 0.5, "sigma": 0.05, "delta": 1e-12, "decay_start": 0.0},
    "ZSharp": {"rho": 0.05, "quantile": 0.95},
    "GSAM": {"rho": 0.05, "alpha": 0.4},
    "GNP": {"rho": 0.1, "alpha": 0.8},
    "WSAM": {"rho": 0.05, "gamma": 0.9},
    "StableSAM": {"rho": 0.05},
    "VaSSO": {"rho": 0.05, "theta": 0.9},
    "FriendlySAM": {"rho": 0.2, "sigma": 1.0, "lmbda": 0.6},
    "LookSAM": {"rho": 0.1, "interval": 5, "alpha": 0.7},
    "AESAM": {"rho": 0.05, "decay": 0.9, "c_start": 1.0, "c_end": -1.0},
    "RST": {"rho": 0.05, "probability": 0.5},
    "LateSAM": {"rho": 0.05, "start": 1 - 25 / 200},
    "MSAM": {"rho": 3.0},
    "AdaptiveMSAM": {"rho": 3.0, "eta": 0.01},
    "BSAM": {"lr": 0.5, "rho": 0.01, "weight_decay": 1e-4, "damping": 0.1, "initial_precision": 1.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_numbers(name):
    signature = inspect.signature(getattr(flatmin, name)).parameters
    numbers = {key: each.default for key, each in signature.items() if isinstance(each.default, int | float)}
    switches = {key for key, value in numbers.items() if isinstance(value, bool) or key == "seed"}
    assert {key: value for key, value in numbers.items() if key not in switches} == PUBLISHED[name]
    assert not any(numbers[key] for key in switches - {"decouple"})
    assert numbers.get("decouple", True)  # as the paper advises


def test_every_named_method_has_published_numbers():
    methods = {
        name
        for name in flatmin.__all__
        if inspect.isclass(each := getattr(flatmin, name)) and issubclass(each, torch.optim.Optimizer)
    }
    assert methods - {"SharpnessAware", "OnePass"} == set(PUBLISHED)


class _Never:
    def __call__(self, step):
        return False


class _EveryThird:
    def __call__(self, step):
        return step % 3 == 0


@pytest.mark.parametrize("door", [through_closure, through_two_steps, through_context])
def test_a_policy_that_never_perturbs_is_the_base(door):
    model, plain = tiny_network(), tiny_network()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, when=_Never(), model=model)
    train(optimizer, model, door=door)
    train(torch.optim.SGD(plain.parameters(), lr=0.1), plain)
    assert torch.equal(everything(model), everything(plain))
    assert optimizer.diagnostics.num_perturbed_steps == 0


def test_a_policy_saves_passes_and_goes_on_counting_after_a_resume():
    model = tiny_network()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, when=_EveryThird(), model=model)
    num_calls = 0

    def count(optimizer, loss):
        def counted():
            nonlocal num_calls
            num_calls += 1
            return loss()

        return through_closure(optimizer, counted)

    train(optimizer, model, range(4), count)
    assert num_calls == 4 + 2
    resumed = tiny_network()
    resumed.load_state_dict(model.state_dict())
    other = SharpnessAware(torch.optim.SGD(resumed.parameters(), lr=0.1), 0.5, when=_EveryThird(), model=resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, range(4, 8))
    train(other, resumed, range(4, 8))
    assert torch.equal(everything(model), everything(resumed))


def _two_layers(factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(factor)
        model[2].weight.div_(factor)
    return model


@pytest.mark.parametrize("p", [1.5, 2.0, float("inf")])
def test_asam_ignores_the_rescaling_of_consecutive_layers_and_sam_does_not(p):
    """ReLU networks compute the same function when one layer is scaled up and the next one down."""
    inputs = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rises = {}
    for name, build in (
        ("asam", lambda base, model: flatmin.ASAM(base, 0.2, eta=0.0, model=model, p=p)),
        ("sam", lambda base, model: flatmin.SAM(base, 0.2, model=model, p=p)),
    ):
        for factor in (1.0, 10.0):
            model = _two_layers(factor)
            optimizer = build(torch.optim.SGD(model.parameters(), lr=0.0), model)
            through_closure(optimizer, lambda model=model: model(inputs).square().mean())
            rises[name, factor] = optimizer.diagnostics.loss_rise.item()
    assert rises["asam", 10.0] == pytest.approx(rises["asam", 1.0], rel=1e-10)
    assert rises["sam", 10.0] != pytest.approx(rises["sam", 1.0], rel=0.5)


def test_asam_by_name_needs_names_and_takes_them_from_either_place():
    model = tiny_network()
    with pytest.raises(ValueError, match="parameters must have names, because the metric goes by them"):
        flatmin.ASAM(torch.optim.SGD(model.parameters(), lr=0.1))
    flatmin.ASAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    flatmin.ASAM(torch.optim.SGD(model.named_parameters(), lr=0.1))
    flatmin.ASAM(torch.optim.SGD(model.parameters(), lr=0.1), scaled="all")


def test_several_ascents_refuse_a_changing_set_of_gradients():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = flatmin.SAM(torch.optim.SGD(weights, lr=0.1), ascent_steps=2)
    used = iter([(0, 1), (0,), (0, 1)])
    with pytest.raises(RuntimeError, match="the same parameters must have a gradient"):
        through_closure(optimizer, lambda: sum(weights[index].square().sum() for index in next(used)))
    assert all(torch.equal(param, torch.ones(3)) for param in weights)


def test_the_context_manager_refuses_several_ascents():
    weights = nn.Parameter(torch.ones(3))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), ascent_steps=2)
    weights.sum().backward()
    with pytest.raises(RuntimeError, match="makes 1 ascent step of 2"), optimizer.perturbed():
        pass


def test_complex_parameters_are_perturbed_as_pairs_of_reals():
    start = torch.tensor([3 + 4j, 0 - 5j], dtype=torch.complex128)
    weights = nn.Parameter(start.clone())
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=1.0), 0.5)
    through_closure(optimizer, lambda: (weights * weights.conj()).real.sum())
    moved = start + 0.5 * start / torch.view_as_real(start).norm()
    torch.testing.assert_close(weights.detach(), start - 2 * moved)


def test_complex_parameters_follow_the_base_step_as_pairs_of_reals():
    """WSAM, whose sharpness term is added to the weights themselves."""
    start = torch.tensor([3 + 4j, 0 - 5j], dtype=torch.complex128)
    weights = nn.Parameter(start.clone())
    optimizer = flatmin.WSAM(torch.optim.SGD([weights], lr=0.1), 0.5, gamma=0.6)
    through_closure(optimizer, lambda: (weights * weights.conj()).real.sum())
    eps = 0.5 * start / torch.view_as_real(start).norm()
    torch.testing.assert_close(weights.detach(), start - 0.1 * (2 * start + 1.5 * 2 * eps))


@pytest.mark.parametrize("shape", [(6,), (3, 4)], ids=["vector", "matrix"])
@pytest.mark.parametrize("kind", ["centralised", "matrices"])
def test_complex_parameters_have_their_own_number_of_dimensions(kind, shape):
    """And not one more, as the pairs of reals have that stand for them."""
    generator = torch.Generator().manual_seed(0)
    start, slope = (torch.randn(shape, generator=generator, dtype=torch.complex128) for _ in range(2))
    weights = nn.Parameter(start.clone())
    base = torch.optim.SGD([weights], lr=0.1)
    if kind == "centralised":
        optimizer = flatmin.SharpnessAware(base, 0.5, direction=Filtered(Gradient(), Centralised()))
        way = slope - slope.mean(dim=1, keepdim=True) if len(shape) == 2 else slope
        eps = 0.5 * way / torch.view_as_real(way).norm()
    else:
        optimizer = flatmin.ASAM(base, 0.5, eta=0.1, scaled="matrices")
        scale = torch.view_as_real(start).abs() + 0.1 if len(shape) == 2 else torch.ones((*shape, 2)).double()
        way = scale * torch.view_as_real(slope)
        eps = torch.view_as_complex(0.5 * scale * way / way.norm())
    (weights * slope.conj()).real.sum().backward()
    with optimizer.perturbed():
        torch.testing.assert_close(weights.detach(), start + eps)
        weights.abs().sum().backward()


def test_entries_of_float64_gradients_are_told_apart_beyond_the_range_of_float32():
    weights = nn.Parameter(torch.zeros(1, 5, dtype=torch.float64))
    optimizer = flatmin.ZSharp(torch.optim.SGD([weights], lr=0.1), 3.0, quantile=0.5)
    (weights * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) * 1e-60).sum().backward()
    with optimizer.perturbed():
        expected = 3.0 * torch.tensor([[1.0, 0.0, 0.0, 0.0, 5.0]], dtype=torch.float64) / 26**0.5
        torch.testing.assert_close(weights.detach(), expected)
        weights.sum().backward()


@pytest.mark.parametrize("closure", [torch.ones(()), 3, [3], [lambda: None, torch.ones(2)]])
def test_what_is_no_closure_is_refused_by_name(closure):
    optimizer = flatmin.SAM(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    with pytest.raises(TypeError, match=r"closure must be a function that returns the loss, or a list of such, got"):
        optimizer.step(closure)


def test_two_groups_share_one_norm():
    first, second = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    base = torch.optim.SGD([{"params": [first]}, {"params": [second], "rho": 2.0}], lr=0.0)
    optimizer = flatmin.SAM(base, 1.0)
    loss = 0.5 * (first.square() + second.square()).sum()
    loss.backward()
    with optimizer.perturbed():
        assert (first.item(), second.item()) == pytest.approx((3 + 1.0 * 0.6, 4 + 2.0 * 0.8))
        (first + second).sum().backward()
    assert (first.item(), second.item()) == (3.0, 4.0)


def test_wrapping_a_base_again_does_not_keep_an_old_radius_silently():
    weights = nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([weights], lr=0.1)
    flatmin.SAM(base, 0.05)
    flatmin.SAM(base, 0.05)
    with pytest.raises(ValueError, match="rho must equal the 0.05"):
        flatmin.SAM(base, 0.1)


@pytest.mark.parametrize("base", [None, torch.optim.SGD, [torch.ones(2)]])
def test_a_base_that_is_no_optimizer_is_refused(base):
    with pytest.raises(TypeError, match="base must be a torch.optim.Optimizer instance"):
        flatmin.SAM(base)
