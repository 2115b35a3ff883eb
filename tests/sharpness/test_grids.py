"""Grids that stop and go on, lines between models and along eigenvectors, the plane of a trajectory."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from known import batch_norm_network, cross_entropy, dense_hessian, flat, like_params, pairs, smooth_network
from noisy import Noisy, snapshot
from torch import Tensor, nn

from flatmin.sharpness import (
    OtherGridError,
    direction_between,
    gradient_direction,
    hessian_eigenvalues,
    loss_on_line,
    loss_on_plane,
    mean_loss,
    principal_directions,
)

XS, YS = [-1.0, 0.0, 0.5], [-0.5, 1.0]


class Counted:
    """A loss that counts its calls and stops working after ``limit`` of them."""

    def __init__(self, loss_fn: Callable[[], Tensor], limit: int = 10**9) -> None:
        self.loss_fn, self.limit, self.num_calls = loss_fn, limit, 0

    def __call__(self) -> Tensor:
        if self.num_calls == self.limit:
            raise KeyboardInterrupt
        self.num_calls += 1
        return self.loss_fn()


def plane(model: nn.Module, loss_fn: Callable[[], Tensor], **options: object) -> Tensor:
    directions = like_params(model, 1), like_params(model, 2)
    return loss_on_plane(model, loss_fn, directions, XS, YS, batch_norm="running", **options)


def test_mean_loss_is_that_of_all_examples() -> None:
    model = smooth_network()
    inputs, targets = (torch.cat(parts) for parts in zip(*pairs(), strict=True))
    loss = mean_loss(model, nn.CrossEntropyLoss(), pairs())
    torch.testing.assert_close(loss(), nn.functional.cross_entropy(model(inputs), targets))
    weighted = mean_loss(model, cross_entropy, pairs(), batch_weight=lambda batch: 1.0)
    assert abs(weighted() - loss()) > 1e-4  # control: batches of unequal sizes count alike
    direction = gradient_direction(model, loss, batch_norm="running")
    wanted = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), [*model.parameters()])
    torch.testing.assert_close(flat(direction), flat(wanted) / flat(wanted).norm())


def test_a_mean_over_nothing_and_an_unknown_option_are_refused() -> None:
    model = smooth_network()
    with pytest.raises(ValueError, match="data must hold at least one batch of positive weight, got none"):
        mean_loss(model, cross_entropy, [])()
    with pytest.raises(TypeError, match="options must be among process_group, progress, resume, got resum"):
        plane(model, mean_loss(model, cross_entropy, pairs()), resum="losses")


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    model = smooth_network()
    inputs, _ = pairs()[0]
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor, got \(8, 3\)"):
        plane(model, lambda: model(inputs))
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor, got \(8, 3\)"):
        gradient_direction(model, lambda: model(inputs), batch_norm="running")


def test_interrupted_grid_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, file = smooth_network(), tmp_path / "plane.jsonl"
    loss = mean_loss(model, cross_entropy, pairs())
    whole = plane(model, loss)
    with pytest.raises(KeyboardInterrupt):
        plane(model, Counted(loss, limit=4), resume=file)
    file.write_bytes(file.read_bytes() + b"[4, 1.2")  # killed while it wrote a line
    again = Counted(loss)
    assert torch.equal(plane(model, again, resume=file), whole)
    assert again.num_calls == 2
    assert len(file.read_text().splitlines()) == 1 + 6
    finished = Counted(loss)
    assert torch.equal(plane(model, finished, resume=str(file)), whole)
    assert finished.num_calls == 0


def test_losses_that_are_not_finite_survive_the_file(tmp_path: Path) -> None:
    model, file = smooth_network(), tmp_path / "line.jsonl"
    settings = {"positions": [0.0], "batch_norm": "running", "resume": file}
    for _ in range(2):
        losses = loss_on_line(model, lambda: torch.tensor(float("inf")), like_params(model), **settings)
        assert losses.tolist() == [float("inf")]


@pytest.mark.parametrize("change", ["weights", "direction", "positions", "statistics", "garbage"])
def test_file_of_another_grid_is_refused_and_left_alone(change: str, tmp_path: Path) -> None:
    model, file = smooth_network(), tmp_path / "line.jsonl"
    loss = mean_loss(model, cross_entropy, pairs())
    settings = {"direction": like_params(model), "positions": XS, "batch_norm": "running", "resume": file}
    loss_on_line(model, loss, **settings)
    if change == "weights":
        nn.init.zeros_(model[0].bias)
    elif change == "garbage":
        file.write_text("not a grid\n")
    else:
        other = {"direction": like_params(model, 9), "positions": [0.5, 1.0, 2.0], "statistics": "batch"}
        settings["batch_norm" if change == "statistics" else change] = other[change]
    before = file.read_bytes()
    with pytest.raises(OtherGridError, match="resume must be a file of the same grid and weights"):
        loss_on_line(model, loss, **settings)
    assert file.read_bytes() == before


def test_progress_is_told_after_every_point(tmp_path: Path) -> None:
    model, calls = smooth_network(), []
    plane(model, lambda: torch.zeros(()), progress=lambda *counts: calls.append(counts), resume=tmp_path / "grid")
    assert calls == [(done, 6) for done in range(1, 7)]
    calls.clear()
    lines = (tmp_path / "grid").read_text().splitlines(keepends=True)
    (tmp_path / "grid").write_text("".join(lines[:4]))
    plane(model, lambda: torch.zeros(()), progress=lambda *counts: calls.append(counts), resume=tmp_path / "grid")
    assert calls == [(4, 6), (5, 6), (6, 6)]


def test_line_between_two_models_ends_at_their_losses() -> None:
    first, second = smooth_network(), smooth_network()
    with torch.no_grad():
        for param, step in zip(second.parameters(), like_params(second), strict=True):
            param.add_(step)
    direction = direction_between(first, second)
    loss = mean_loss(first, cross_entropy, pairs())
    ends = loss_on_line(first, loss, direction, [0.0, 1.0], batch_norm="running")
    wanted = [loss().item(), mean_loss(second, cross_entropy, pairs())().item()]
    assert ends.tolist() == pytest.approx(wanted, rel=1e-12)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-2)  # control
    with pytest.raises(ValueError, match="both models must have parameters of the same shapes"):
        direction_between(first, nn.Linear(4, 3))


def test_recomputed_statistics_are_those_of_the_data_at_each_position() -> None:
    model = batch_norm_network().train()
    direction, data = like_params(model), pairs((8, 8))
    losses = loss_on_line(model, mean_loss(model, cross_entropy, data), direction, [0.0, 0.5], batch_norm="recomputed")
    arrays = [param.detach().numpy() for param in model.parameters()]
    steps = [step.numpy() for step in direction]
    for position, loss in zip([0.0, 0.5], losses.tolist(), strict=True):
        weight, bias, gain, shift, last, last_bias = (
            array + position * step for array, step in zip(arrays, steps, strict=True)
        )
        hidden = [inputs.numpy() @ weight.T + bias for inputs, _ in data]
        mean = np.mean([part.mean(axis=0) for part in hidden], axis=0)
        variance = np.mean([part.var(axis=0, ddof=1) for part in hidden], axis=0)
        activations = np.tanh((np.concatenate(hidden) - mean) / np.sqrt(variance + 1e-5) * gain + shift)
        logits = torch.from_numpy(activations @ last.T + last_bias)
        wanted = nn.functional.cross_entropy(logits, torch.cat([targets for _, targets in data])).item()
        assert loss == pytest.approx(wanted, rel=1e-10)
    stale = loss_on_line(model, mean_loss(model, cross_entropy, data), direction, [0.0, 0.5], batch_norm="running")
    assert not torch.allclose(stale, losses, rtol=1e-2)  # control


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_recomputing_statistics_leaves_the_model_as_it_was(raises: bool, tmp_path: Path) -> None:
    model, images = Noisy().train(), torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    loss = Counted(lambda: model(images).mean(), limit=3 if raises else 100)
    before = snapshot(model) | {"momentum": model.layers[1].momentum}

    def measure() -> Tensor:
        return loss_on_line(model, loss, like_params(model), XS, batch_norm="recomputed", resume=tmp_path / "line")

    if raises:
        with pytest.raises(KeyboardInterrupt):
            measure()
    else:
        measure()
        assert loss.num_calls == 6
    assert snapshot(model) | {"momentum": model.layers[1].momentum} == before


def test_unknown_statistics_are_refused() -> None:
    model = smooth_network()
    with pytest.raises(ValueError, match="batch_norm must be one of batch, running, recomputed, got 'train'"):
        loss_on_line(model, lambda: torch.zeros(()), like_params(model), XS, batch_norm="train")


def test_curvature_of_the_line_along_an_eigenvector_is_its_eigenvalue() -> None:
    model = smooth_network()
    result = hessian_eigenvalues(model, cross_entropy, pairs(), 2, tolerance=1e-8, eigenvectors=True)
    loss = mean_loss(model, cross_entropy, pairs())
    for value, direction in zip(result.eigenvalues, result.eigenvectors, strict=True):
        below, here, above = loss_on_line(model, loss, direction, [-1e-3, 0.0, 1e-3], batch_norm="running").tolist()
        assert (above - 2 * here + below) / 1e-6 == pytest.approx(value, rel=1e-4)
    assert result.value == pytest.approx(torch.linalg.eigvalsh(dense_hessian(model, pairs()))[-1].item())


def checkpoints(num: int, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(3, 4, generator=generator).double(), torch.randn(5, generator=generator).double()]
        for _ in range(num)
    ]


def test_principal_directions_are_those_of_the_singular_value_decomposition() -> None:
    weights = checkpoints(7)
    matrix = torch.stack([flat(checkpoint) for checkpoint in weights])
    _, values, rows = torch.linalg.svd(matrix - matrix.mean(dim=0), full_matrices=False)
    trajectory = principal_directions(weights, 3)
    found = torch.stack([flat(direction) for direction in trajectory.directions])
    torch.testing.assert_close((found @ rows[:3].T).abs(), torch.eye(3).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(trajectory.coordinates, (matrix - matrix[-1]) @ found.T, rtol=0, atol=1e-10)
    shares = (values.square() / values.square().sum())[:3].tolist()
    assert trajectory.explained == pytest.approx(shares, rel=1e-10)
    assert (trajectory.coordinates[0] >= 0).all()
    uncentred = torch.linalg.svd(matrix - matrix[-1], full_matrices=False)[2]
    assert (found[0] @ uncentred[0]).abs() < 0.99  # control


def test_flat_trajectory_lies_in_its_plane() -> None:
    first, second, end = checkpoints(3)
    places = [(3.0, 0.0), (2.0, 1.0), (0.5, 1.5), (0.0, 0.0)]
    weights = [[e + a * f + b * s for e, f, s in zip(end, first, second, strict=True)] for a, b in places]
    trajectory = principal_directions(weights)
    assert sum(trajectory.explained) == pytest.approx(1.0)
    for checkpoint, (x, y) in zip(weights, trajectory.coordinates.tolist(), strict=True):
        back = [e + x * d + y * g for e, d, g in zip(end, *trajectory.directions, strict=True)]
        torch.testing.assert_close(back, checkpoint, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="checkpoints must vary in 3 directions"):
        principal_directions(weights, 3)


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="num_directions must be from 1 to 1 for 2 checkpoints, got 2"):
        principal_directions(checkpoints(2))
    with pytest.raises(ValueError, match="checkpoints must hold parameters of the same shapes"):
        principal_directions([[torch.zeros(2)], [torch.zeros(3)]], 1)


def test_file_is_json_lines(tmp_path: Path) -> None:
    model = smooth_network()
    losses = plane(model, mean_loss(model, cross_entropy, pairs()), resume=tmp_path / "plane")
    header, *rows = map(json.loads, (tmp_path / "plane").read_text().splitlines())
    assert set(header) == {"grid"}
    assert rows == [[index, loss] for index, loss in enumerate(losses.flatten().tolist())]
