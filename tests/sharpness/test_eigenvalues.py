"""The ends of the spectrum, against dense matrices and curvlinops; what is not converged says so."""

import json
import math

import pytest
import torch
from known import (
    ONE_BATCH,
    Quadratic,
    cross_entropy,
    dense_hessian,
    flat,
    pairs,
    quadratic_loss,
    smooth_network,
    symmetric,
)
from oracle import allow_torchs_own_warning, curvlinops_hessian
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from flatmin.sharpness import HessianEigenvalues, hessian_eigenvalues, hessian_trace, spectral_density
from flatmin.sharpness.lanczos import lanczos


def of_matrix(matrix: Tensor, k: int, **settings: object) -> HessianEigenvalues:
    return hessian_eigenvalues(Quadratic(matrix), quadratic_loss, ONE_BATCH, k, **settings)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenvalues_are_those_of_the_dense_hessian(which: str) -> None:
    model = smooth_network()
    exact = torch.linalg.eigvalsh(dense_hessian(model, pairs()))
    keys = {"largest": -exact, "smallest": exact, "magnitude": -exact.abs()}
    wanted = exact[keys[which].argsort()][:5]
    result = hessian_eigenvalues(model, cross_entropy, pairs(), 5, which=which, tolerance=1e-8)
    assert all(result.converged)
    torch.testing.assert_close(torch.tensor(result.eigenvalues, dtype=torch.float64), wanted, rtol=1e-10, atol=0)
    assert result.value == result.eigenvalues[0]


def test_residuals_are_true_and_within_the_tolerance() -> None:
    model = smooth_network()
    hessian = dense_hessian(model, pairs())
    result = hessian_eigenvalues(model, cross_entropy, pairs(), 4, tolerance=1e-2, eigenvectors=True)
    for value, residual, direction in zip(result.eigenvalues, result.residuals, result.eigenvectors, strict=True):
        vector = flat(direction)
        assert vector.norm().item() == pytest.approx(1.0)
        assert (hessian @ vector - value * vector).norm().item() == pytest.approx(residual, rel=1e-6)
        assert residual <= 1e-2 * abs(value)
    assert max(result.residuals) > 1e-8  # control: the iteration stopped early, as it was allowed to


def test_eigenvectors_of_chosen_parameters_are_directions_of_the_model() -> None:
    model = smooth_network()
    result = hessian_eigenvalues(model, cross_entropy, pairs(), 1, params="2", eigenvectors=True, tolerance=1e-8)
    (direction,) = result.eigenvectors
    assert [step.shape for step in direction] == [param.shape for param in model.parameters()]
    assert [bool(step.any()) for step in direction] == [False, False, True, True]
    exact = torch.linalg.eigvalsh(dense_hessian(model, pairs())[30:, 30:])[-1]
    assert result.value == pytest.approx(exact.item(), rel=1e-10)


def test_too_few_iterations_are_flagged() -> None:
    result = of_matrix(symmetric(60), 3, max_iterations=4, tolerance=1e-6)
    assert result.converged == (False, False, False)
    assert str(result).count("NOT CONVERGED") == 3
    assert all(of_matrix(symmetric(60), 3, tolerance=1e-6).converged)  # control


def test_single_precision_converges_to_its_rounding() -> None:
    matrix = symmetric(80)
    result = of_matrix(matrix.float(), 5, tolerance=1e-4)
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:5]
    assert all(result.converged)
    torch.testing.assert_close(torch.tensor(result.eigenvalues).double(), exact, rtol=1e-5, atol=0)


def test_no_eigenvalue_appears_twice() -> None:
    """Without reorthogonalisation, Lanczos finds the outlier again and again."""
    matrix = torch.diag(torch.cat([torch.tensor([1000.0, 500.0]), torch.linspace(0, 1, 98)]).double())
    result = of_matrix(matrix, 4, tolerance=1e-10, max_iterations=100)
    torch.testing.assert_close(
        torch.tensor(result.eigenvalues).double(), torch.tensor([1000.0, 500.0, 1.0, 96 / 97]).double()
    )
    *_, space = lanczos(lambda v: matrix @ v, torch.ones(100).double(), 100)
    torch.testing.assert_close(space.basis @ space.basis.T, torch.eye(100).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "diagonal", [[3.0] * 6, [5.0, 5.0, 5.0, 1.0] + [0.0] * 20, [2.0] + [0.0] * 30, [0.0] * 7], ids=str
)
def test_copies_are_found_where_the_krylov_space_ends(diagonal: list[float]) -> None:
    result = of_matrix(torch.diag(torch.tensor(diagonal).double()), 4)
    assert result.eigenvalues == pytest.approx(diagonal[:4], abs=1e-10)
    assert all(result.converged)
    assert result.num_products <= 12


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_eigenvalues_grow_with_the_matrix(scale: float) -> None:
    """What counts as exhausted, or as rounding, is relative."""
    matrix = symmetric(12)
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    result = of_matrix(scale * matrix, 4, tolerance=1e-8)
    assert result.eigenvalues == pytest.approx((scale * exact[:4]).tolist(), rel=1e-9)
    assert all(result.converged)
    assert result.num_products <= 12 + 4  # the space is no larger than the matrix


def test_finite_differences_find_the_same_eigenvalues() -> None:
    model = smooth_network()
    exact = torch.linalg.eigvalsh(dense_hessian(model, pairs())).flip(0)[:3]
    result = hessian_eigenvalues(model, cross_entropy, pairs(), 3, hvp="finite_differences", tolerance=1e-5)
    torch.testing.assert_close(torch.tensor(result.eigenvalues, dtype=torch.float64), exact, rtol=1e-6, atol=0)
    assert result.num_passes == 2 * result.num_products


@allow_torchs_own_warning
def test_eigenvalues_agree_with_curvlinops() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    data = [(torch.randn(10, 1, 6, 6), torch.randint(0, 3, (10,))) for _ in range(2)]
    hessian = curvlinops_hessian(model, data)
    theirs = eigsh(hessian.to_scipy(), k=5, which="LA", tol=1e-5, return_eigenvectors=False)
    ours = hessian_eigenvalues(model, nn.CrossEntropyLoss(), data, 5, tolerance=1e-4)
    assert ours.eigenvalues == pytest.approx(sorted(theirs, reverse=True), rel=1e-4)


def test_the_papers_ratio_is_reported() -> None:
    result = of_matrix(torch.diag(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).double()), 5)
    assert result.ratio() == pytest.approx(3.0)
    assert result.ratio(2) == pytest.approx(1.2)
    assert result.as_dict()["lambda_1_over_lambda_5"] == pytest.approx(3.0)
    assert "λ1/λ5 = 3" in str(result)
    with pytest.raises(ValueError, match="index must be from 1 to 5, the eigenvalues computed, got 6"):
        result.ratio(6)
    assert math.isnan(of_matrix(torch.diag(torch.tensor([1.0, 0.0]).double()), 2).ratio(2))
    assert "lambda_1_over_lambda_5" not in of_matrix(symmetric(6), 5, which="smallest").as_dict()


def test_result_is_a_record_that_json_takes() -> None:
    result = of_matrix(symmetric(9), 2, eigenvectors=True)
    record = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert record["measure"] == "hessian_eigenvalues"
    assert record["eigenvalues"] == list(result.eigenvalues)
    assert record["settings"]["which"] == "largest"
    assert record["num_passes"] == result.num_passes > 0
    assert "eigenvectors" not in record
    with pytest.raises(AttributeError):
        result.value = 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 10}, "k must be from 1 to the number of parameters, 9, got 10"),
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"k": 2, "which": "top"}, "which must be one of largest, smallest, magnitude, got 'top'"),
        ({"k": 2, "tolerance": 0.0}, "tolerance must be > 0, got 0.0"),
        ({"k": 3, "max_iterations": 2}, "max_iterations must be >= k, got 2 with k = 3"),
    ],
)
def test_settings_outside_their_domain_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        of_matrix(symmetric(9), **settings)


def test_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="the Hessian must be finite, got a product with inf or NaN"):
        of_matrix(torch.full((3, 3), math.nan).double(), 1)


@pytest.mark.parametrize("measure", [hessian_trace, spectral_density])
def test_no_measure_of_the_hessian_goes_on_with_what_is_not_finite(measure) -> None:
    with pytest.raises(ValueError, match="the Hessian must be finite, got a product with inf or NaN"):
        measure(Quadratic(torch.full((3, 3), math.inf).double()), quadratic_loss, ONE_BATCH)
