"""Products with the Hessian, against the dense matrix and against curvlinops, for every form of loader."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from known import (
    ONE_BATCH,
    Quadratic,
    batch_norm_network,
    cross_entropy,
    dense_hessian,
    flat,
    like_params,
    pairs,
    quadratic_loss,
    smooth_network,
    symmetric,
)
from oracle import allow_torchs_own_warning, curvlinops_hessian
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin.sharpness import average_case, hessian_trace, hessian_vector_product, worst_case
from flatmin.sharpness.objective import Objective
from flatmin.sharpness.selection import select_params


def assert_is_product(product: list[Tensor], hessian: Tensor, vector: list[Tensor]) -> None:
    torch.testing.assert_close(flat(product), hessian @ flat(vector), rtol=1e-10, atol=1e-12)


def from_dictionary(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])


def as_dictionaries() -> list[dict[str, object]]:
    return [{"inputs": x, "labels": y, "scale": torch.tensor(2.0), "name": "digits"} for x, y in pairs()]


class ReturnsItsLoss(nn.Module):
    """The form of the transformers library: the model takes the labels and returns an object with a loss."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.body(inputs)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Once:
    """Batches that can be iterated again and again, made anew each time."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([list(pair) for pair in pairs()])


def loader() -> DataLoader:
    inputs, targets = (torch.cat(parts) for parts in zip(*pairs(), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=6, shuffle=True)


@pytest.mark.parametrize(
    ("loss_fn", "data"),
    [
        (cross_entropy, pairs()),
        (nn.CrossEntropyLoss(), pairs()),
        (nn.functional.cross_entropy, pairs()),
        (partial(nn.functional.cross_entropy, reduction="mean"), pairs()),
        (from_dictionary, as_dictionaries()),
        (nn.CrossEntropyLoss(), Once()),
        (nn.CrossEntropyLoss(), loader()),
    ],
    ids=["function", "criterion", "functional", "partial", "dictionaries", "iterable", "loader"],
)
def test_product_is_that_of_the_dense_hessian_for_every_loader(loss_fn, data) -> None:
    model = smooth_network()
    vector = like_params(model)
    product = hessian_vector_product(model, loss_fn, data, vector)
    assert_is_product(product, dense_hessian(model, pairs()), vector)
    with pytest.raises(AssertionError):  # control: the last batch left out
        assert_is_product(product, dense_hessian(model, pairs()[:2]), vector)


def test_model_that_returns_its_own_loss_is_measured_with_a_line() -> None:
    body = smooth_network()
    data = [{"inputs": x, "labels": y} for x, y in pairs()]
    vector = like_params(body)
    product = hessian_vector_product(ReturnsItsLoss(body), lambda model, batch: model(**batch).loss, data, vector)
    assert_is_product(product, dense_hessian(body, pairs()), vector)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_finite_differences_agree_with_double_backward(dtype: torch.dtype, tolerance: float) -> None:
    model = smooth_network(dtype)
    vector = like_params(model)
    exact = flat(hessian_vector_product(model, cross_entropy, pairs(dtype=dtype), vector))
    data = pairs(dtype=dtype)
    near = flat(hessian_vector_product(model, cross_entropy, data, vector, hvp="finite_differences"))
    assert (near - exact).norm() <= tolerance * exact.norm()
    far = hessian_vector_product(model, cross_entropy, data, vector, hvp="finite_differences", difference_step=1.0)
    assert (flat(far) - exact).norm() > 5 * tolerance * exact.norm()  # control: a step that is too long


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
@pytest.mark.parametrize("hvp", ["double_backward", "finite_differences"])
def test_batch_norm_uses_the_statistics_asked_for(batch_norm: str, hvp: str) -> None:
    model, other = batch_norm_network().train(), batch_norm_network()
    vector = like_params(model)
    product = hessian_vector_product(model, cross_entropy, pairs(), vector, batch_norm=batch_norm, hvp=hvp)
    other.eval()[1].train(batch_norm == "batch")
    wanted = dense_hessian(other, pairs()) @ flat(vector)
    torch.testing.assert_close(flat(product), wanted, rtol=1e-5, atol=1e-7)
    other[1].train(batch_norm != "batch")
    wrong = dense_hessian(other, pairs()) @ flat(vector)
    assert not torch.allclose(flat(product), wrong, rtol=1e-2)  # control: the other statistics


@pytest.mark.parametrize(
    ("params", "block"),
    [
        ("0", slice(0, 30)),
        (["2.weight", "2.bias"], slice(30, 51)),
        (lambda name, param: param.ndim == 1, [*range(24, 30), *range(48, 51)]),
    ],
    ids=["module", "names", "predicate"],
)
def test_chosen_parameters_give_the_block_of_the_hessian(params, block) -> None:
    model = smooth_network()
    matrix = dense_hessian(model, pairs())[block][:, block]
    chosen = {"0": [0, 1], "2.weight": [2, 3]}.get(params if isinstance(params, str) else "", None)
    every = like_params(model)
    if chosen is None:
        chosen = [2, 3] if isinstance(params, list) else [1, 3]
    vector = [every[index] for index in chosen]
    assert_is_product(hessian_vector_product(model, cross_entropy, pairs(), vector, params=params), matrix, vector)


def test_frozen_parameters_are_constants() -> None:
    model = smooth_network()
    matrix = dense_hessian(model, pairs())[30:, 30:]
    model[0].requires_grad_(False)
    vector = like_params(model)[2:]
    assert_is_product(hessian_vector_product(model, cross_entropy, pairs(), vector), matrix, vector)


def test_smaller_micro_batches_change_nothing() -> None:
    model = smooth_network()
    vector = like_params(model)
    sizes = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        sizes.append(len(batch[1]))
        return cross_entropy(model, batch)

    product = hessian_vector_product(model, loss_fn, pairs(), vector, micro_batch=3)
    assert_is_product(product, dense_hessian(model, pairs()), vector)
    assert sizes == [3, 3, 2, 3, 3, 2, 3, 2]


def test_batches_are_weighted_as_asked() -> None:
    model = smooth_network()
    vector = like_params(model)
    product = hessian_vector_product(model, cross_entropy, pairs(), vector, batch_weight=lambda batch: 1.0)
    wanted = sum(dense_hessian(model, [pair]) for pair in pairs()) / 3
    assert_is_product(product, wanted, vector)
    with pytest.raises(AssertionError):  # control: weighted by their sizes
        assert_is_product(product, dense_hessian(model, pairs()), vector)


def test_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    model = nn.Linear(3, 1)
    vector = like_params(model)
    for hvp in ("double_backward", "finite_differences"):
        product = hessian_vector_product(
            model, lambda model, batch: model(batch).sum(), [torch.zeros(1, 3)], vector, hvp=hvp
        )
        assert not flat(product).any()


def test_every_pass_sees_the_same_augmentations() -> None:
    model = smooth_network()
    vector = like_params(model)
    inputs, targets = (torch.cat(parts) for parts in zip(*pairs(), strict=True))
    seen = []

    def augmented(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([image for image, _ in examples])
        return images + torch.randn(images.shape), torch.stack([label for _, label in examples])

    generator = torch.Generator().manual_seed(0)
    data = DataLoader(
        TensorDataset(inputs, targets), batch_size=7, shuffle=True, generator=generator, collate_fn=augmented
    )

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[0].clone())
        return cross_entropy(model, batch)

    state = generator.get_state()
    hessian_vector_product(model, loss_fn, data, vector, hvp="finite_differences")
    assert torch.equal(torch.stack(seen[:3]), torch.stack(seen[3:]))
    assert torch.equal(generator.get_state(), state)
    assert not torch.equal(next(iter(data))[0], seen[0] + torch.randn(7, 4))  # control: draws do differ


@allow_torchs_own_warning
def test_product_agrees_with_curvlinops() -> None:
    model = smooth_network()
    vector = like_params(model)
    operator = curvlinops_hessian(model, pairs())
    torch.testing.assert_close(
        flat(hessian_vector_product(model, cross_entropy, pairs(), vector)), operator @ flat(vector)
    )


def test_operation_without_a_second_derivative_is_explained() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 24)

        def forward(self, inputs: Tensor) -> Tensor:
            query, key, value = self.project(inputs).view(-1, 4, 1, 24).transpose(1, 2).chunk(3, dim=-1)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                return nn.functional.scaled_dot_product_attention(query, key, value)

    torch.manual_seed(0)
    model, data = Attention(), [torch.randn(2, 4, 8)]
    vector = like_params(model)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    with pytest.raises(RuntimeError, match="cannot be differentiated twice: use hvp='finite_differences'"):
        hessian_vector_product(model, loss_fn, data, vector)
    product = hessian_vector_product(model, loss_fn, data, vector, hvp="finite_differences")
    assert flat(product).norm() > 0


def test_batch_norm_must_be_chosen() -> None:
    model = batch_norm_network()
    with pytest.raises(ValueError, match="batch_norm must be 'batch' or 'running' for a model with batch norm"):
        hessian_vector_product(model, cross_entropy, pairs(), like_params(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": "3"}, "params must name parameters or modules of the model, got '3'"),
        ({"params": lambda name, param: False}, "params must choose at least one parameter"),
        ({"hvp": "forward"}, "hvp must be one of double_backward, finite_differences, got 'forward'"),
        ({"hvp": "finite_differences", "difference_step": 0.0}, "difference_step must be > 0 and finite, got 0.0"),
        (
            {"hvp": "finite_differences", "difference_step": float("inf")},
            "difference_step must be > 0 and finite, got inf",
        ),
        ({"micro_batch": 0}, "micro_batch must be an integer >= 1, got 0"),
    ],
)
def test_settings_outside_their_domain_are_refused(options, message) -> None:
    model = smooth_network()
    with pytest.raises(ValueError, match=message):
        hessian_vector_product(model, cross_entropy, pairs(), like_params(model), **options)


@pytest.mark.parametrize("measure", [average_case, hessian_trace, worst_case])
def test_an_option_that_is_misspelt_is_refused(measure) -> None:
    model, setting = smooth_network(), {average_case: {"sigma": 0.1}}.get(measure, {})
    with pytest.raises(TypeError, match=r"options must be among batch_norm, .*params.*, got parms"):
        measure(model, cross_entropy, pairs(), **setting, parms="0")


@pytest.mark.parametrize(
    ("params", "num_params"), [("head", 12), ("head.weight", 9), ("body", 12), (lambda name, _: "head" in name, 12)]
)
def test_a_parameter_with_two_names_is_chosen_by_either(params, num_params) -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    model["head"].weight = model["body"].weight
    assert sum(param.numel() for param in select_params(model, params).values()) == num_params


def test_micro_batches_with_batch_statistics_are_refused() -> None:
    model = batch_norm_network()
    with pytest.raises(ValueError, match="micro_batch must be None with batch_norm='batch'"):
        hessian_vector_product(model, cross_entropy, pairs(), like_params(model), batch_norm="batch", micro_batch=2)


def test_data_that_cannot_be_measured_are_refused() -> None:
    model = smooth_network()
    vector = like_params(model)
    with pytest.raises(TypeError, match="data must be iterable more than once, got the iterator list_iterator"):
        hessian_vector_product(model, cross_entropy, iter(pairs()), vector)
    with pytest.raises(ValueError, match="data must hold at least one batch of positive weight"):
        hessian_vector_product(model, cross_entropy, [], vector)
    for summed in (nn.CrossEntropyLoss(reduction="sum"), partial(nn.functional.cross_entropy, reduction="sum")):
        with pytest.raises(ValueError, match="loss_fn must return the mean loss of a batch, got reduction='sum'"):
            hessian_vector_product(model, summed, pairs(), vector)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor, got \(8, 3\)"):
        hessian_vector_product(model, lambda model, batch: model(batch[0]), pairs(), vector)
    with pytest.raises(ValueError, match="vector must have the shapes of the chosen parameters"):
        hessian_vector_product(model, cross_entropy, pairs(), vector[:1])
    with pytest.raises(TypeError, match=r"a batch must be \(inputs, targets\)"):
        hessian_vector_product(model, nn.CrossEntropyLoss(), ONE_BATCH, vector)


@pytest.mark.parametrize("size", [0.1, 10.0])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_finite_differences_go_as_far_as_is_said(size: float, length: float) -> None:
    """``w +- h v`` with ``h ||v|| = sqrt(precision) max(||w||, 1)``, whatever the length of v."""
    places = []

    def seen(model: Quadratic, batch: torch.Tensor) -> torch.Tensor:
        places.append(model.weights.detach().clone())
        return quadratic_loss(model, batch)

    matrix, unit = symmetric(4), torch.full((4,), 0.5).double()
    model = Quadratic(matrix, weights=size * unit)
    product = hessian_vector_product(model, seen, ONE_BATCH, [length * unit], hvp="finite_differences")
    step = 2.0**-26 * max(size, 1.0)
    found = torch.stack([place - size * unit for place in places])
    torch.testing.assert_close(found, torch.stack([step * unit, -step * unit]), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(product[0], length * (matrix @ unit), rtol=1e-6, atol=1e-6 * length)


def test_finite_difference_along_nothing_is_nothing() -> None:
    model = Quadratic(symmetric(4), weights=torch.ones(4).double())
    zero = hessian_vector_product(model, quadratic_loss, ONE_BATCH, [torch.zeros(4).double()], hvp="finite_differences")
    assert zero[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64"), ("float32", "bfloat16")], ids=str)
def test_vectors_are_as_wide_as_the_widest_parameter_and_steps_suit_the_narrowest(dtypes: tuple[str, str]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.full((2,), 0.5, dtype=getattr(torch, name))) for name in dtypes])
    places = []

    def seen(model: nn.ParameterList, batch: torch.Tensor) -> torch.Tensor:
        places.append([param.detach().clone() for param in model])
        return sum(param.double().square().sum() for param in model)

    objective = Objective(model, seen, ONE_BATCH)
    widths = [torch.finfo(getattr(torch, name)).bits for name in dtypes]
    assert torch.finfo(objective.dtype).bits == max(widths)
    along = [torch.ones_like(param) for param in model]
    product = hessian_vector_product(model, seen, ONE_BATCH, along, hvp="finite_differences")
    torch.testing.assert_close([x.double() for x in product], [2.0 * x.double() for x in along], rtol=0.02, atol=0.0)
    precision = max(torch.finfo(getattr(torch, name)).eps for name in dtypes)
    widest = widths.index(max(widths))
    step = (places[0][widest] - model[widest].detach()).double()  # of entries of a vector of length 2
    torch.testing.assert_close(step, torch.full((2,), precision**0.5 / 2).double(), rtol=1e-2, atol=0.0)


def test_a_name_is_that_of_a_module_and_not_the_beginning_of_others() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("norm", "norm2")})
    assert list(select_params(model, "norm")) == ["norm.weight", "norm.bias"]
