"""A forward pass as a function: its random numbers come from outside, and it says which tensors it writes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_IN_PLACE = (_aten.bernoulli_.float, _aten.uniform_.default, _aten.normal_.default, _aten.exponential_.default)
_LIKE = (_aten.bernoulli.p, _aten.rand_like.default, _aten.randn_like.default)
_FROM_NOTHING = (
    _aten.rand.default,
    _aten.randn.default,
    _aten.randint.default,
    _aten.randint.low,
    _aten.randperm.default,
)


class Draw(NamedTuple):
    """A random operation on an empty tensor like the one that the pass would hand it, of which it reads nothing."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: tuple[Any, ...] | None = None

    def __call__(self) -> Tensor:
        """Make the draw."""
        if self.like is None:
            return self.func(*self.args, **self.kwargs)
        shape, stride, dtype, device = self.like
        empty = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return self.func(empty, *self.args, **self.kwargs)


class Unfit(Exception):
    """A step that cannot be compiled; the text says why."""


class Unready(Unfit):
    """A step that cannot be compiled yet."""


class RecordedPass(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every random draw inside the block, so that it can be made again from torch's own generators.

    A recipe calls the kernel that the forward pass would call, so it yields the same numbers and leaves the generator
    in the same state.

    Attributes:
        draws: A recipe for each draw, in order.
        written: Ids of the running statistics that batch norm writes without saying so in its signature.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Draw] = []
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation, and note it."""
        if _draws(func, args, kwargs or {}):
            self.draws.append(_recipe(func, args, kwargs or {}))
        if func in HONEST and args[5]:
            self.written |= {id(args[3]), id(args[4])}
        return func(*args, **(kwargs or {}))


class PreparedDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands out draws that were made before, in order, instead of making them.

    Args:
        draws: The numbers.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws: Iterator[Tensor] = iter(draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation, or give it its draw."""
        if not _draws(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        draw = next(self._draws)
        if func in _IN_PLACE:
            return args[0].copy_(draw)
        if func is _aten.native_dropout.default:
            kept = 1.0 - args[1]
            return args[0] * draw * (1.0 / kept if kept else 0.0), draw.clone()
        return draw.clone()  # the pass may write into it, and the next one needs it again


def _batch_norm(x: Tensor, *rest: Any) -> Any:
    weight, bias, mean, variance, training, momentum, eps = rest
    if mean is None:
        return _aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    return _aten._native_batch_norm_legit(x, weight, bias, mean, variance, training, momentum, eps)


def _cudnn_batch_norm(x: Tensor, *rest: Any) -> Any:
    return *_batch_norm(x, *rest), x.new_empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(x: Tensor, grad: Tensor, *rest: Any) -> Any:
    weight, mean, variance, saved_mean, saved_variance, eps, _ = rest
    saved = weight, mean, variance, saved_mean, saved_variance
    return _aten.native_batch_norm_backward(grad, x, *saved, True, eps, [True, True, True])


HONEST = {_aten.native_batch_norm.default: _batch_norm, _aten.cudnn_batch_norm.default: _cudnn_batch_norm}
"""What writes running statistics without saying so in its signature, by a decomposition that says so."""

DECOMPOSITIONS = {**HONEST, _aten.cudnn_batch_norm_backward.default: _cudnn_batch_norm_backward}
"""The same with its derivative, for ``make_fx``."""


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers; attention and recurrent layers are tagged so without dropout too."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for index, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):
            given = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given)
    return True


def _recipe(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
    if kwargs.get("generator") is not None:
        raise Unfit("the model draws from a random generator of its own")
    if func in _FROM_NOTHING:
        return Draw(func, args, kwargs)
    like = tuple(args[0].shape), args[0].stride(), args[0].dtype, args[0].device
    if func is _aten.native_dropout.default:
        return Draw(lambda ones: func(ones.fill_(1), args[1], True)[1], (), {}, like)
    if func in _IN_PLACE or func in _LIKE:
        return Draw(func, args[1:], kwargs, like)
    raise Unfit(f"the model makes a random draw that cannot be made before the pass, {func}")
