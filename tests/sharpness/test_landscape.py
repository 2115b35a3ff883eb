"""The loss along directions: against closed forms, and leaving no trace on the model."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from noisy import Noisy, snapshot
from torch import Tensor, nn

from flatmin.sharpness import filter_normalised_direction, gradient_direction, loss_on_line, loss_on_plane

XS = [-1.0, -0.25, 0.0, 0.5]
YS = [-0.5, 0.0, 2.0]


class Quadratic:
    """Least squares of a linear layer, ``mean((X W^T + b - T)^2)``: its loss is known at every weight, in numpy."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.inputs, self.targets = rng.normal(size=(7, 3)), rng.normal(size=(7, 2))
        self.model = nn.Linear(3, 2).double()
        inputs, targets = torch.from_numpy(self.inputs), torch.from_numpy(self.targets)
        self.loss_fn: Callable[[], Tensor] = lambda: (self.model(inputs) - targets).square().mean()
        self.weights = [param.detach().numpy().copy() for param in self.model.parameters()]

    def loss_at(self, weights: list[np.ndarray]) -> float:
        return float(np.mean((self.inputs @ weights[0].T + weights[1] - self.targets) ** 2))

    def loss_along(self, steps: list[tuple[float, list[Tensor]]]) -> float:
        moved = self.weights
        for position, direction in steps:
            moved = [weight + position * step.numpy() for weight, step in zip(moved, direction, strict=True)]
        return self.loss_at(moved)


@pytest.fixture
def quadratic() -> Quadratic:
    torch.manual_seed(0)
    return Quadratic()


def random_direction(params: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator, dtype=param.dtype) for param in params]


def filter_lengths(tensor: Tensor) -> list[float]:
    return [float(np.sqrt(np.sum(np.square(part)))) for part in tensor.detach().double().numpy()]


def assert_filters_match(direction: list[Tensor], params: list[Tensor]) -> None:
    for step, param in zip(direction, params, strict=True):
        assert step.shape == param.shape
        assert step.dtype == param.dtype
        wanted = filter_lengths(param) if param.ndim > 1 else [0.0] * len(param)
        assert filter_lengths(step) == pytest.approx(wanted, rel=1e-6)


def test_every_filter_of_the_direction_is_as_long_as_its_weights() -> None:
    params = list(Noisy().parameters())
    direction = filter_normalised_direction(params, torch.Generator().manual_seed(0))
    assert_filters_match(direction, params)
    with pytest.raises(AssertionError):  # control: the draw without normalisation
        assert_filters_match(random_direction(params, seed=0), params)


def test_direction_is_parallel_to_a_gaussian_draw_in_every_filter() -> None:
    params = [torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))]
    (direction,) = filter_normalised_direction(params, torch.Generator().manual_seed(2))
    (drawn,) = random_direction(params, seed=2)
    cosines = torch.cosine_similarity(direction.flatten(1), drawn.flatten(1))
    torch.testing.assert_close(cosines, torch.ones(5), rtol=0, atol=1e-6)


def test_filter_of_zeros_gets_zeros() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight[1] = 0.0
    (direction,) = filter_normalised_direction([weight], torch.Generator().manual_seed(0))
    assert filter_lengths(direction)[1] == 0.0
    assert direction.isfinite().all()


def test_direction_in_half_precision_is_normalised_in_single() -> None:
    weight = torch.full((2, 70_000), 1.0, dtype=torch.float16)  # the sum of squares does not fit float16
    (direction,) = filter_normalised_direction([weight], torch.Generator().manual_seed(0))
    assert direction.dtype == torch.float16
    assert filter_lengths(direction) == pytest.approx([70_000**0.5] * 2, rel=1e-3)


def test_direction_leaves_the_global_random_state_alone() -> None:
    params = list(Noisy().parameters())
    before = torch.get_rng_state()
    filter_normalised_direction(params, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(1)
    assert not torch.equal(torch.get_rng_state(), before)  # control


def test_line_of_a_quadratic_is_its_closed_form(quadratic: Quadratic) -> None:
    params = list(quadratic.model.parameters())
    direction, other = random_direction(params, seed=0), random_direction(params, seed=1)
    losses = loss_on_line(quadratic.model, quadratic.loss_fn, direction, XS, batch_norm="running")
    wanted = torch.tensor([quadratic.loss_along([(x, direction)]) for x in XS], dtype=torch.float64)
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=0)
    wrong = loss_on_line(quadratic.model, quadratic.loss_fn, other, XS, batch_norm="running")
    assert not torch.allclose(wrong, wanted, rtol=1e-2)  # control: another direction


def test_plane_of_a_quadratic_is_its_closed_form_with_y_in_rows(quadratic: Quadratic) -> None:
    params = list(quadratic.model.parameters())
    first, second = random_direction(params, seed=0), random_direction(params, seed=1)
    losses = loss_on_plane(quadratic.model, quadratic.loss_fn, (first, second), XS, YS, batch_norm="running")
    wanted = [[quadratic.loss_along([(x, first), (y, second)]) for x in XS] for y in YS]
    torch.testing.assert_close(losses, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    swapped = loss_on_plane(quadratic.model, quadratic.loss_fn, (second, first), XS, YS, batch_norm="running")
    assert not torch.allclose(swapped, losses, rtol=1e-2)  # control: the axes exchanged


def test_gradient_direction_is_the_normalised_gradient(quadratic: Quadratic) -> None:
    residuals = quadratic.inputs @ quadratic.weights[0].T + quadratic.weights[1] - quadratic.targets
    gradient = [2 / residuals.size * residuals.T @ quadratic.inputs, 2 / residuals.size * residuals.sum(axis=0)]
    length = np.sqrt(sum(np.sum(np.square(part)) for part in gradient))
    direction = gradient_direction(quadratic.model, quadratic.loss_fn, batch_norm="running")
    for step, part in zip(direction, gradient, strict=True):
        torch.testing.assert_close(step, torch.from_numpy(part / length), rtol=1e-12, atol=1e-14)


def test_gradient_direction_is_zero_for_frozen_and_unused_parameters() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[0].bias.requires_grad_(False)
    inputs = torch.ones(1, 2)
    direction = gradient_direction(model, lambda: model[0](inputs).sum(), batch_norm="running")
    assert [bool(step.any()) for step in direction] == [True, False, False, False]


def test_gradient_direction_of_a_flat_loss_is_zero(quadratic: Quadratic) -> None:
    direction = gradient_direction(quadratic.model, lambda: 0 * quadratic.loss_fn(), batch_norm="running")
    assert all(torch.equal(step, torch.zeros_like(step)) for step in direction)


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_batch_norm_uses_the_statistics_asked_for_and_dropout_is_off(batch_norm: str) -> None:
    model, images = Noisy().train(), torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    conv, norm, _, _, linear = model.layers
    norm.running_mean.fill_(0.3)
    activations = conv(images).detach().numpy()
    mean, var = 0.3, 1.0
    if batch_norm == "batch":
        mean, var = activations.mean(axis=(0, 2, 3), keepdims=True), activations.var(axis=(0, 2, 3), keepdims=True)
    features = ((activations - mean) / np.sqrt(var + norm.eps)).reshape(8, -1)
    wanted = (features @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()).mean()
    still = [torch.zeros_like(param) for param in model.parameters()]
    loss = loss_on_line(model, lambda: model(images).mean(), still, [0.0], batch_norm=batch_norm)
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("measure", ["line", "plane", "gradient"])
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_model_is_left_bit_for_bit_as_it_was(measure: str, raises: bool, batch_norm: str) -> None:
    model, images = Noisy(), torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model.layers[1].eval()  # modes differ between modules, as in fine-tuning with frozen statistics
    model(images).square().mean().backward()
    before = snapshot(model)
    calls = 0

    def loss_fn() -> Tensor:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            model.train()(images + torch.rand(())).sum().backward()  # careless in every way
        if raises and (measure == "gradient" or calls == 3):
            raise RuntimeError("no loss today")
        return model(images).mean()

    params = list(model.parameters())
    first, second = random_direction(params, seed=0), random_direction(params, seed=1)
    measures: dict[str, Callable[[], object]] = {
        "line": lambda: loss_on_line(model, loss_fn, first, XS, batch_norm=batch_norm),
        "plane": lambda: loss_on_plane(model, loss_fn, (first, second), XS, YS, batch_norm=batch_norm),
        "gradient": lambda: gradient_direction(model, loss_fn, batch_norm=batch_norm),
    }
    if raises:
        with pytest.raises(RuntimeError, match="no loss today"):
            measures[measure]()
    else:
        measures[measure]()
    assert snapshot(model) == before
    loss_fn_changes_something = snapshot(model)
    model(images)
    assert snapshot(model) != loss_fn_changes_something  # control: one forward pass is enough to be noticed


def test_every_position_sees_the_same_random_numbers(quadratic: Quadratic) -> None:
    still = [torch.zeros_like(param) for param in quadratic.model.parameters()]
    losses = loss_on_line(quadratic.model, lambda: torch.rand(()), still, XS, batch_norm="running")
    assert len(set(losses.tolist())) == 1


def test_direction_of_another_model_is_refused(quadratic: Quadratic) -> None:
    direction = [torch.zeros(3, 2), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"shapes of the model's parameters, \[\(2, 3\), \(2,\)\], got \[\(3, 2\)"):
        loss_on_line(quadratic.model, quadratic.loss_fn, direction, XS, batch_norm="running")


def test_unknown_batch_statistics_are_refused(quadratic: Quadratic) -> None:
    with pytest.raises(ValueError, match="batch_norm must be one of batch, running, got 'train'"):
        gradient_direction(quadratic.model, quadratic.loss_fn, batch_norm="train")
