"""The loss that a measure looks at: its mean over all data, as a function of the chosen parameters."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from flatmin.arguments import checked_count
from flatmin.sharpness.batches import micro_batches, num_examples, to_device
from flatmin.sharpness.loss_functions import LossFn, as_scalar, on_batches
from flatmin.sharpness.measure import Setting
from flatmin.sharpness.ranks import share_buffers_, sum_over_ranks
from flatmin.sharpness.selection import Selection, described, select_params
from flatmin.sharpness.unchanged import BatchStatistics, batch_norm_layers, same_random_numbers, unchanged, wide
from flatmin.uncompiled import uncompiled


class LossOptions(TypedDict, total=False):
    """What every measure takes beside its own settings.

    Attributes:
        batch_norm: How batch norm layers normalise: ``"running"`` with their running statistics, as in evaluation, or
            ``"batch"`` with the statistics of each batch, as in training. Must be given if the model has such layers.
            All other layers, dropout among them, are in evaluation mode either way.
        params: Which parameters are moved; the others are constants. Names of parameters or of the modules that hold
            them, one or several, or a predicate ``(name, param) -> bool``; all by default. Frozen ones never move.
        batch_weight: The weight of a batch in the mean over the data; its number of examples by default. For a loss
            that is a mean over tokens, their number.
        micro_batch: Cut each batch of the loader into pieces of so many examples, to save memory.
        process_group: Ranks that hold the same weights and a shard of the data each; results are those of all data,
            with the buffers of the first rank: running statistics differ between replicas in training.
            ``torch.distributed.group.WORLD`` for all ranks; ``None`` communicates nothing.
    """

    batch_norm: BatchStatistics | None
    params: Selection | None
    batch_weight: Callable[[Any], float]
    micro_batch: int | None
    process_group: ProcessGroup | None


class Objective:
    """``L(w) = sum_b n_b L_b(w) / sum_b n_b`` over the batches b of a loader, of n_b examples each.

    Values are taken inside ``with objective.measuring():``, which leaves the model as it was. Every pass over the data
    starts from the same random state, so that a loader which shuffles or augments gives the same batches each time.

    Args:
        model: The network. Of a ``DistributedDataParallel`` and of a compiled one the module inside is taken; whatever
            is compiled runs as it is, since compiled functions cannot be differentiated twice.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch. A module such as
            ``torch.nn.CrossEntropyLoss()`` or a function of ``torch.nn.functional``, also a ``functools.partial`` of
            one, is called as ``loss_fn(model(inputs), targets)`` on batches ``(inputs, targets)``.
        data: Batches; anything that can be iterated again and again. They are moved to the model's device.
        options: See ``LossOptions``.

    Raises:
        TypeError: ``data`` can be iterated only once, or an option is unknown.
        ValueError: No parameter is chosen, or ``batch_norm`` is missing or meets an option that contradicts it.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, data: Iterable[Any], **options: Unpack[LossOptions]) -> None:
        refuse_unknown(options, LossOptions)
        if isinstance(data, Iterator):
            raise TypeError(f"data must be iterable more than once, got the iterator {type(data).__name__}")
        self.model = _inside(model)
        self.data = data
        self.loss_fn = on_batches(loss_fn)
        micro_batch = options.get("micro_batch")
        self.micro_batch = None if micro_batch is None else checked_count("micro_batch", micro_batch)
        self.batch_norm = _checked_batch_norm(self.model, options.get("batch_norm"), self.micro_batch)
        self.selection = options.get("params")
        named = select_params(self.model, self.selection)
        self.names, self.params = list(named), list(named.values())
        self.batch_weight = options.get("batch_weight", num_examples)
        self.process_group = options.get("process_group")
        self.num_passes = 0
        self._weights: list[Tensor] = []

    @property
    def num_params(self) -> int:
        """The number of weights that are moved."""
        return sum(param.numel() for param in self.params)

    @property
    def device(self) -> torch.device:
        """Where vectors live: the device of the first parameter."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of vectors: the widest of the parameters, at least float32."""
        dtype = torch.float32
        for param in self.params:
            dtype = torch.promote_types(dtype, wide(param.dtype))
        return dtype

    @property
    def settings(self) -> dict[str, Setting]:
        """What the loss is, for the record of a result."""
        return {
            "params": described(self.selection),
            "num_params": self.num_params,
            "batch_norm": self.batch_norm,
            "micro_batch": self.micro_batch,
            "num_ranks": 1 if self.process_group is None else self.process_group.size(),
        }

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Prepare the model, and leave it as it was whatever happens inside."""
        with uncompiled(), unchanged(self.model, self.batch_norm or "running") as weights, torch.enable_grad():
            by_param: dict[Tensor, Tensor] = dict(zip(self.model.parameters(), weights, strict=True))
            self._weights = [by_param[param] for param in self.params]
            share_buffers_(self.model, self.process_group)
            try:
                yield
            finally:
                self._weights = []

    def on(self, batch: Any) -> "Objective":
        """The loss of one batch alone, on this rank alone."""
        part = copy.copy(self)
        part.data, part.process_group, part.num_passes = [batch], None, 0
        return part

    @contextmanager
    def groups_of(self, m: int) -> Iterator[Iterator["Objective"]]:
        """One pass over this rank's data, m examples at a time; what is left of a batch of the loader is left out."""
        whole = copy.copy(self)
        whole.micro_batch = m
        with whole.one_pass() as batches:
            yield (self.on(group) for group, _ in batches if num_examples(group) == m)

    @contextmanager
    def moved(self, steps: Sequence[Tensor]) -> Iterator[None]:
        """Be at ``w + steps`` inside the block and at w, exactly, after it."""
        try:
            self._set([weight + step.to(weight) for weight, step in zip(self._weights, steps, strict=True)])
            yield
        finally:
            self._set(self._weights)

    @contextmanager
    def one_pass(self) -> Iterator[Iterator[tuple[Any, float]]]:
        """One pass over the data: batches on the model's device, with their weights.

        A context, and no bare iterator: one that an exception abandons would reset the random state at some later time,
        when its memory is freed.
        """
        self.num_passes += 1
        generator = getattr(self.data, "generator", None)  # a DataLoader's own source of random numbers
        state = generator.get_state() if isinstance(generator, torch.Generator) else None
        try:
            with same_random_numbers(list(self.model.parameters())):
                yield self._batches()
        finally:
            if isinstance(generator, torch.Generator) and state is not None:
                generator.set_state(state)

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of one batch, attached to the graph.

        Raises:
            ValueError: It is no scalar.
        """
        return as_scalar(self.loss_fn(self.model, batch))

    def loss(self) -> float:
        """``L`` at the present weights."""
        total, weights = 0.0, 0.0
        with torch.no_grad(), self.one_pass() as batches:
            for batch, weight in batches:
                total += weight * self.loss_of(batch).item()
                weights += weight
        return self.mean(torch.tensor([total], dtype=torch.float64), weights).item()

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """``L`` and its gradient at the present weights, the latter as one vector."""
        gradient = torch.zeros(self.num_params, dtype=self.dtype, device=self.device)
        total, weights = 0.0, 0.0
        with self.one_pass() as batches:
            for batch, weight in batches:
                loss = self.loss_of(batch)
                grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
                gradient.add_(self.flatten(grads), alpha=weight)
                total += weight * loss.item()
                weights += weight
        mean = self.mean(torch.tensor([total], dtype=torch.float64), weights).item()
        return mean, self.mean(gradient, weights)

    def mean(self, total: Tensor, weights: float) -> Tensor:
        """A weighted sum over this rank's data, made the weighted mean over all ranks' data."""
        if self.process_group is not None:
            total = sum_over_ranks(total.to(self.device), self.process_group)
            weight = torch.tensor([weights], dtype=torch.float64, device=self.device)
            weights = sum_over_ranks(weight, self.process_group).item()
        return mean_of(total, weights)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per chosen parameter as one vector."""
        return torch.cat([tensor.detach().reshape(-1).to(self.device, self.dtype) for tensor in tensors])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """One vector as one tensor per chosen parameter, in its dtype and on its device."""
        pieces = torch.split(vector, [param.numel() for param in self.params])
        return [piece.view_as(param).to(param) for piece, param in zip(pieces, self.params, strict=True)]

    def in_model(self, vector: Tensor) -> list[Tensor]:
        """One vector as one tensor per parameter of the model, zeros for those not chosen."""
        chosen = dict(zip(self.params, self.unflatten(vector), strict=True))
        return [chosen[p] if p in chosen else torch.zeros_like(p.detach()) for p in self.model.parameters()]

    def _batches(self) -> Iterator[tuple[Any, float]]:
        for batch in self.data:
            for piece in [batch] if self.micro_batch is None else micro_batches(batch, self.micro_batch):
                yield to_device(piece, self.device), self.batch_weight(piece)

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for param, value in zip(self.params, values, strict=True):
                param.copy_(value)


def mean_of(total: Tensor, weights: float) -> Tensor:
    """A weighted sum over batches, made the weighted mean.

    Raises:
        ValueError: There was no batch.
    """
    if not weights > 0.0:
        raise ValueError("data must hold at least one batch of positive weight, got none")
    return total / weights


def refuse_unknown(options: Mapping[str, Any], known: type) -> None:
    """Raise ``TypeError`` for options that a ``TypedDict`` does not have: a misspelt one would change nothing."""
    names = sorted(known.__annotations__)
    unknown = sorted(options.keys() - names)
    if unknown:
        raise TypeError(f"options must be among {', '.join(names)}, got {', '.join(unknown)}")


def _inside(model: nn.Module) -> nn.Module:
    """The module in wrappers: of replicas, and of ``torch.compile``."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _checked_batch_norm(
    model: nn.Module, batch_norm: BatchStatistics | None, micro_batch: int | None
) -> BatchStatistics | None:
    if batch_norm is None and batch_norm_layers(model):
        raise ValueError("batch_norm must be 'batch' or 'running' for a model with batch norm layers, got None")
    if micro_batch is not None and batch_norm == "batch" and batch_norm_layers(model):
        raise ValueError("micro_batch must be None with batch_norm='batch': smaller batches have other statistics")
    return batch_norm
