"""The random estimators: mean, variance and intervals against dense matrices and closed forms."""

import json
import math

import pytest
import torch
from known import ONE_BATCH, Quadratic, cross_entropy, dense_hessian, pairs, quadratic_loss, smooth_network, symmetric
from scipy.special import stdtrit
from scipy.stats import norm
from torch import Tensor

from flatmin.optim import Adaptive
from flatmin.sharpness import average_case, hessian_trace, spectral_density
from flatmin.sharpness.interval import mean_and_half_width, student_quantile

NUM = 4000


def vector(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_distributed(samples: tuple[float, ...], mean: float, variance: float) -> None:
    """Mean within 4 standard errors; variance within 15 %, several of its standard errors."""
    sample = torch.tensor(samples, dtype=torch.float64)
    assert abs(sample.mean().item() - mean) <= 4 * math.sqrt(variance / len(sample))
    assert sample.var().item() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("adaptive", [False, True, Adaptive(eta=0.5, scaled="all")])
def test_average_case_has_the_mean_and_variance_of_a_quadratic(adaptive: bool | Adaptive) -> None:
    """``sigma g^T T xi + sigma^2/2 xi^T T A T xi``: mean ``sigma^2/2 tr(T A T)``, and the odd part adds variance."""
    matrix, slope, weights, sigma = symmetric(5) + 2 * torch.eye(5), vector(5), vector(5, 2), 0.7
    eta = adaptive.eta if isinstance(adaptive, Adaptive) else 0.0
    scale = weights.abs() + eta if adaptive else torch.ones(5)
    gradient = scale * (matrix @ weights + slope)
    scaled = scale[:, None] * matrix * scale
    mean = sigma**2 / 2 * scaled.trace().item()
    variance = sigma**2 * gradient.square().sum().item() + sigma**4 / 2 * scaled.square().sum().item()
    model = Quadratic(matrix, slope, weights)
    result = average_case(model, quadratic_loss, ONE_BATCH, sigma, adaptive=adaptive, num_draws=NUM)
    assert_distributed(result.rises, mean, variance)
    assert result.error == pytest.approx(1.96 * math.sqrt(variance / NUM), rel=0.1)
    assert result.num_passes == 1 + NUM
    with pytest.raises(AssertionError):  # control: noise of another size
        assert_distributed(result.rises, 1.2 * mean, 1.2 * variance)


def test_average_case_without_noise_is_zero() -> None:
    result = average_case(smooth_network(), cross_entropy, pairs(), 0.0, num_draws=2)
    assert (result.value, result.error) == (0.0, 0.0)


def test_average_case_of_a_loss_that_is_not_finite_is_refused() -> None:
    infinite = Quadratic(torch.eye(1).double(), weights=torch.full((1,), math.inf).double())
    with pytest.raises(ValueError, match="the loss at the weights must be finite, got"):
        average_case(infinite, quadratic_loss, ONE_BATCH, 0.1)


def test_hutchinson_has_the_mean_and_variance_of_the_theory() -> None:
    matrix = symmetric(8)
    result = hessian_trace(Quadratic(matrix), quadratic_loss, ONE_BATCH, NUM)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()).item()
    assert_distributed(result.samples, matrix.trace().item(), variance)
    assert result.value == pytest.approx(sum(result.samples) / NUM)
    assert result.mean_eigenvalue == pytest.approx(result.value / 8)
    with pytest.raises(AssertionError):  # control: the variance of Gaussian vectors
        assert_distributed(result.samples, matrix.trace().item(), 2 * matrix.square().sum().item())


def test_hutchinson_is_exact_for_a_diagonal_matrix() -> None:
    matrix = torch.diag(vector(6))
    result = hessian_trace(Quadratic(matrix), quadratic_loss, ONE_BATCH, 2)
    assert result.value == pytest.approx(matrix.trace().item(), rel=1e-12)
    assert result.error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("estimator", ["hutchinson", "hutch++"])
def test_trace_of_a_network_is_unbiased_and_its_interval_covers(estimator: str) -> None:
    model = smooth_network()
    exact = dense_hessian(model, pairs()).trace().item()
    results = [hessian_trace(model, cross_entropy, pairs(), 15, estimator=estimator, seed=seed) for seed in range(150)]
    values = torch.tensor([result.value for result in results], dtype=torch.float64)
    assert abs(values.mean().item() - exact) <= 4 * values.std().item() / 150**0.5
    covered = sum(abs(result.value - exact) <= result.error for result in results)
    assert covered >= 0.88 * 150  # of 95 %; 4 standard deviations are 7 %
    tight = sum(abs(result.value - exact) <= 0.3 * result.error for result in results)
    assert tight < 0.88 * 150  # control: shorter intervals do not


def test_hutch_is_exact_where_the_sketch_holds_the_spectrum() -> None:
    factor = vector(60).view(20, 3)
    matrix = factor @ torch.diag(torch.tensor([5.0, 2.0, -1.0]).double()) @ factor.T
    settings = {"estimator": "hutch++", "num_products": 12}
    result = hessian_trace(Quadratic(matrix), quadratic_loss, ONE_BATCH, **settings)
    assert result.value == pytest.approx(matrix.trace().item(), rel=1e-10)
    assert result.exact_part == pytest.approx(result.value, rel=1e-10)
    assert result.mean_eigenvalue == pytest.approx(matrix.trace().item() / 20, rel=1e-10)
    assert len(result.samples) == 4
    plain = hessian_trace(Quadratic(matrix), quadratic_loss, ONE_BATCH, 12)
    assert plain.value != pytest.approx(matrix.trace().item(), rel=1e-3)  # control: Hutchinson alone is not


@pytest.mark.parametrize(("num_products", "num_samples"), [(4, 2), (6, 2), (11, 5)])
def test_hutch_takes_as_many_products_as_asked(num_products: int, num_samples: int) -> None:
    """A third for the sketch, a third on it, and what is left of them: each costs two passes by finite differences."""
    settings = {"estimator": "hutch++", "hvp": "finite_differences"}
    result = hessian_trace(smooth_network(), cross_entropy, pairs(), num_products, **settings)
    assert (result.num_passes, len(result.samples)) == (2 * num_products, num_samples)


def test_vectors_share_passes_over_the_data() -> None:
    assert hessian_trace(smooth_network(), cross_entropy, pairs(), 30).num_passes == 4


def test_quadrature_is_exact_for_the_moments_of_its_vector() -> None:
    """From v, m nodes integrate ``v^T p(H) v`` exactly up to degree 2 m - 1, and not beyond."""
    model = smooth_network()
    hessian = dense_hessian(model, pairs())
    result = spectral_density(model, cross_entropy, pairs(), num_vectors=1, num_steps=4, seed=3)
    start = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    start /= start.norm()
    errors = []
    for order in range(9):
        exact = (start @ torch.linalg.matrix_power(hessian, order) @ start).item()
        errors.append(abs(result.moment(order)[0] - exact) / abs(exact))
    assert max(errors[:8]) <= 1e-10
    assert errors[8] > 1e-4  # control


def test_density_is_that_of_the_dense_hessian() -> None:
    hessian = dense_hessian(smooth_network(), pairs())
    exact = torch.linalg.eigvalsh(hessian)
    result = spectral_density(Quadratic(hessian), quadratic_loss, ONE_BATCH, num_vectors=60, num_steps=40, width=0.05)
    grid = torch.tensor(result.grid, dtype=torch.float64)
    bells = torch.exp(-((grid[:, None] - exact) / 0.05).square() / 2) / (0.05 * math.sqrt(2 * math.pi))
    wanted = bells.mean(dim=1)
    density, half_widths = torch.tensor(result.density), torch.tensor(result.half_widths)
    covered = (density - wanted).abs() <= half_widths + 1e-3
    assert covered.double().mean() >= 0.8  # neighbours on the grid are correlated
    assert (density - wanted).abs().max() <= 0.1 * wanted.max()
    assert torch.trapezoid(density.double(), grid).item() == pytest.approx(1.0, abs=1e-3)
    assert abs(result.value - exact.mean().item()) <= 2 * result.error
    shifted = bells.roll(100, dims=0).mean(dim=1)
    assert (density - shifted).abs().max() > 0.1 * wanted.max()  # control


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_density_is_the_mean_of_the_vectors_and_its_interval_students(num_vectors: int) -> None:
    result = spectral_density(
        Quadratic(symmetric(8)), quadratic_loss, ONE_BATCH, num_vectors=num_vectors, num_steps=5, width=0.3
    )
    rules = [list(zip(xs, ws, strict=True)) for xs, ws in zip(result.nodes, result.weights, strict=True)]
    bells = [[sum(w * norm.pdf(at, x, 0.3) for x, w in rule) for at in result.grid[::100]] for rule in rules]
    found = torch.tensor(bells, dtype=torch.float64)
    assert result.density[::100] == pytest.approx(found.mean(dim=0).tolist(), rel=1e-10)
    if num_vectors == 1:
        assert all(map(math.isnan, result.half_widths))
    else:
        wanted = stdtrit(2, 0.975) * found.std(dim=0) / math.sqrt(3)
        assert result.half_widths[::100] == pytest.approx(wanted.tolist(), rel=1e-6)
    ends = min(map(min, result.nodes)) - 1.2, max(map(max, result.nodes)) + 1.2  # four widths beyond the spectrum
    assert (result.grid[0], result.grid[-1]) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("diagonal", "width"), [([-1.0, 2.0, 4.0], 0.05), ([-3.0] * 7, 0.03), ([0.0, 0.0], 0.01)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bells_are_a_hundredth_of_the_range_wide(diagonal: list[float], width: float, dtype: torch.dtype) -> None:
    """Of the range of the spectrum, of the eigenvalue where there is one up to rounding, of 1 where that is zero."""
    model = Quadratic(torch.diag(torch.tensor(diagonal, dtype=dtype)))
    assert spectral_density(model, quadratic_loss, ONE_BATCH).settings["width"] == pytest.approx(width, rel=1e-5)


def test_density_of_a_multiple_of_the_identity_is_one_bell() -> None:
    result = spectral_density(Quadratic(3 * torch.eye(5).double()), quadratic_loss, ONE_BATCH, num_steps=4)
    assert all(nodes == pytest.approx((3.0,)) for nodes in result.nodes)
    assert result.value == pytest.approx(3.0)
    assert result.grid[max(range(1000), key=result.density.__getitem__)] == pytest.approx(3.0, abs=1e-3)


def test_records_are_json() -> None:
    model = smooth_network()
    for result in (
        spectral_density(model, cross_entropy, pairs(), num_vectors=1, num_steps=3),
        hessian_trace(model, cross_entropy, pairs(), 4, estimator="hutch++"),
        average_case(model, cross_entropy, pairs(), 0.1, num_draws=3),
    ):
        record = json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert record["value"] == result.value
        assert record["wall_seconds"] > 0
        assert record["settings"]["num_params"] == 51
        assert result.name in str(result)


def test_same_seed_same_value_and_another_seed_another() -> None:
    model = smooth_network()
    values = [hessian_trace(model, cross_entropy, pairs(), 4, seed=seed).value for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 30, 150, 999, 1000, 50_000])
def test_quantile_is_students(degrees: int) -> None:
    assert student_quantile(degrees) == pytest.approx(stdtrit(degrees, 0.975), rel=1e-6)


def test_interval_of_a_single_value_is_unknown() -> None:
    mean, half_width = mean_and_half_width([2.5])
    assert mean == 2.5
    assert math.isnan(half_width)


@pytest.mark.parametrize(
    ("measure", "settings", "message"),
    [
        (average_case, {"sigma": -1.0}, "sigma must be >= 0 and finite, got -1.0"),
        (average_case, {"sigma": 1.0, "num_draws": 1}, "num_draws must be an integer >= 2, got 1"),
        (hessian_trace, {"num_products": 1}, "num_products must be an integer >= 2 for hutchinson, got 1"),
        (
            hessian_trace,
            {"num_products": 3, "estimator": "hutch++"},
            r"num_products must be an integer >= 4 for hutch\+\+, got 3",
        ),
        (hessian_trace, {"estimator": "xtrace"}, r"estimator must be one of hutchinson, hutch\+\+, got 'xtrace'"),
        (spectral_density, {"num_vectors": 0}, "num_vectors must be an integer >= 1, got 0"),
        (spectral_density, {"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        (spectral_density, {"width": 0.0}, "width must be > 0 and finite, got 0.0"),
        (spectral_density, {"width": float("inf")}, "width must be > 0 and finite, got inf"),
    ],
)
def test_settings_outside_their_domain_are_refused(measure, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        measure(smooth_network(), cross_entropy, pairs(), **settings)
