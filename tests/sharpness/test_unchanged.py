"""No measure leaves a trace on the model, also where the loss raises."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from noisy import Noisy, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin.sharpness import (
    average_case,
    hessian_eigenvalues,
    hessian_trace,
    hessian_vector_product,
    spectral_density,
    worst_case,
)

MEASURES: dict[str, Callable[..., Any]] = {
    "eigenvalues": lambda *args, **options: hessian_eigenvalues(*args, 2, eigenvectors=True, **options),
    "differences": lambda *args, **options: hessian_eigenvalues(*args, 2, hvp="finite_differences", **options),
    "trace": lambda *args, **options: hessian_trace(*args, 4, estimator="hutch++", **options),
    "density": lambda *args, **options: spectral_density(*args, num_vectors=2, num_steps=3, **options),
    "product": lambda model, *args, **options: hessian_vector_product(
        model, *args, [torch.ones_like(param) for param in model.parameters() if param.requires_grad], **options
    ),
    "worst case": lambda *args, **options: worst_case(*args, 0.5, steps=2, restarts=2, **options),
    "m-sharpness": lambda *args, **options: worst_case(*args, 0.5, m=2, adaptive=True, **options),
    "average case": lambda *args, **options: average_case(*args, 0.1, num_draws=3, **options),
}


def loader() -> DataLoader:
    images = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images), batch_size=4, shuffle=True)


class Careless:
    """A loss in whose every call something happens to the model; the one numbered ``raises_at`` fails."""

    def __init__(self, raises_at: int | None) -> None:
        self.raises_at = raises_at
        self.num_calls = 0

    def __call__(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        self.num_calls += 1
        (images,) = batch
        model.layers[4].bias.grad = torch.ones(3)
        with torch.enable_grad():
            model(images + torch.rand(())).sum().backward()
        if self.num_calls == self.raises_at:
            model.train()
            raise RuntimeError("no loss today")
        return model(images).tanh().square().mean()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("batch_norm", ["batch", "running"])
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
def test_model_is_left_bit_for_bit_as_it_was(measure: str, raises: bool, batch_norm: str, enabled: bool) -> None:
    model, data = Noisy(), loader()
    model.layers[1].eval()  # modes differ between modules, as in fine-tuning with frozen statistics
    model(data.dataset.tensors[0]).square().mean().backward()
    model.first_seen = None
    before = snapshot(model)
    loss_fn = Careless(raises_at=2 if raises else None)
    with torch.set_grad_enabled(enabled):
        if raises:
            with pytest.raises(RuntimeError, match="no loss today"):
                MEASURES[measure](model, loss_fn, data, batch_norm=batch_norm)
        else:
            MEASURES[measure](model, loss_fn, data, batch_norm=batch_norm)
    assert loss_fn.num_calls >= 2
    assert snapshot(model) == before
    next(iter(data))
    assert snapshot(model) != before  # control: starting to read the loader is enough to be noticed


@pytest.mark.parametrize("measure", MEASURES)
def test_exception_that_is_kept_for_a_while_resets_nothing_later(measure: str) -> None:
    model, data = Noisy(), loader()
    data.generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="no loss today") as kept:
        MEASURES[measure](model, Careless(raises_at=2), data, batch_norm="running")
    torch.manual_seed(5)
    data.generator.manual_seed(5)
    before = torch.get_rng_state(), data.generator.get_state()
    kept.value.__traceback__ = None  # frees what the frames held
    del kept
    gc.collect()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(data.generator.get_state(), before[1])


def test_dropout_is_off_and_modes_come_back() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 1)).train()
    data = [torch.ones(4, 3)]
    values = {worst_case(model, lambda model, batch: model(batch).mean(), data, 0.1, seed=s).value for s in range(3)}
    assert len(values) == 1
    assert model.training
    assert model[0].training
