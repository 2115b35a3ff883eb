"""The compiled kernel: norm, move and copy of whole lists of float32 tensors on a CPU, in one pass over memory each.

``kernel.c`` is compiled at installation where there is a C compiler. Without it, and for tensors that do not fit, the
callers do the same with torch's own operations, to the same rounding. A tensor fits if it is an array of float32
without gaps in a CPU's memory, and nothing else.
"""

import ctypes
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PLAIN = frozenset((Tensor, nn.Parameter))  # a subclass may keep its entries elsewhere
_NONE = array("q")
_BLOCK = 1 << 15  # entries that a thread fetches at a time
_SHARE = 1 << 20  # entries (4 MB) for each thread, fewer threads else: where cores are busy, waking one can take long
_STREAM = 1 << 22  # entries (16 MB) from which what is written has left the caches before anyone reads it


class _Job(ctypes.Structure):
    """``struct job`` of kernel.c."""

    _fields_ = (
        ("num_arrays", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("offsets", "targets", "tensors", "values", "scales", "sums")),
        ("block_length", ctypes.c_int64),
        ("streams", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("own", ctypes.c_int64 * 2),  # what kernel.c notes while it runs
    )


class _Library(NamedTuple):
    """The compiled functions: ``run`` lets other threads of Python work meanwhile, ``ask`` may touch its objects."""

    run: ctypes.CDLL
    ask: ctypes.PyDLL
    exchange: ctypes.c_void_p


@dataclass(frozen=True)
class Arrays:
    """Where tensors lie in memory.

    Attributes:
        objects: The tensors' ids, 0 for one that does not fit.
        offsets: Of the tensors in one long vector, and its length; one that does not fit has no length.
        addresses: Of the tensors, 0 for one that does not fit.
        partners: Addresses of the partners, if there are any.
        num_permuted: How many have another order in memory than their indices.
    """

    objects: "array[int]"
    offsets: "array[int]"
    addresses: "array[int]"
    partners: "array[int]"
    num_permuted: int = 0

    @property
    def all_fit(self) -> bool:
        """Whether none is left out."""
        return 0 not in self.addresses

    def fitting(self) -> "Arrays":
        """Without those that do not fit."""
        objects = array("q", [x for x, address in zip(self.objects, self.addresses, strict=True) if address])
        addresses, partners = (array("q", filter(None, column)) for column in (self.addresses, self.partners))
        return Arrays(objects, array("q", dict.fromkeys(self.offsets)), addresses, partners, self.num_permuted)

    def of_partners(self) -> "Arrays":
        """Where the partners lie, as tensors of their own."""
        return Arrays(self.objects, self.offsets, self.partners, _NONE, self.num_permuted)

    def lengths(self) -> "array[int]":
        """Number of entries of each."""
        return array("q", map(sub, self.offsets[1:], self.offsets))

    def overlap(self) -> bool:
        """Whether some entry belongs to two of the tensors."""
        return bool(_library().ask.flatmin_overlap(ctypes.byref(self.job(targets=self.addresses))))

    def job(self, **columns: "array[Any]") -> _Job:
        """What kernel.c works on; the columns must outlive it."""
        return _Job(
            num_arrays=len(self.addresses),
            offsets=_pointer(self.offsets),
            block_length=_BLOCK,
            streams=self.offsets[-1] >= _STREAM,
            num_threads=min(torch.get_num_threads(), self.offsets[-1] // _SHARE),
            **{name: _pointer(column) for name, column in columns.items()},
        )


def has_compiled_kernel() -> bool:
    """Whether the kernel was compiled and can be called; a graph that is being captured cannot hold it."""
    return not torch.compiler.is_compiling() and _load() is not None


def describe(tensors: Sequence[Tensor], partners: Sequence[Tensor] | None = None) -> Arrays:
    """Find the tensors that fit; with partners, those whose partner fits and has the same entries in the same order.

    Raises:
        ValueError: The number of partners is another one.
    """
    if partners is None:
        return _locate(_ids(tensors), _NONE)
    if len(partners) != len(tensors):
        raise ValueError(f"partners must be as many as tensors, got {len(partners)} and {len(tensors)}")
    return _locate(_ids(tensors), _ids(partners))


def joined(parts: Sequence[Arrays]) -> Arrays:
    """One list of what is in several."""
    if len(parts) == 1:
        return parts[0]
    whole = Arrays(array("q"), array("q", [0]), array("q"), array("q"), sum(part.num_permuted for part in parts))
    for part in parts:
        end = whole.offsets[-1]
        whole.offsets.extend(end + offset for offset in part.offsets[1:])
        whole.objects.extend(part.objects)
        whole.addresses.extend(part.addresses)
        whole.partners.extend(part.partners)
    return whole


def sum_of_squares(arrays: Arrays) -> float:
    """The sum of the squares of all entries, in float64, where none overflows; the same for every number of threads."""
    sums = array("d", bytes(8 * (arrays.offsets[-1] // _BLOCK + 1)))
    job = arrays.job(tensors=arrays.addresses, sums=sums)
    total: float = _library().run.flatmin_sum_of_squares(ctypes.byref(job))
    return total


def save_and_move_(
    params: list[Tensor], arrays: Arrays, scales: Sequence[float], spent: Mapping[int, Tensor]
) -> "Kept":
    """``w += scale * partner``, rounded once where the processor can (all with FMA).

    Args:
        params: Parameters that fit and do not overlap.
        arrays: Where they and their partners lie.
        scales: One per parameter.
        spent: Those of the partners, by index, that change places with the parameter's values of before.
    """
    own = dict(spent)
    if arrays.num_permuted:
        own |= {i: torch.empty_like(w) for i, w in enumerate(params) if i not in own and not w.is_contiguous()}
    values = _zeros(len(params))
    for index, tensor in own.items():
        values[index] = tensor.data_ptr()
    buffer = torch.empty(arrays.offsets[-1] - sum(tensor.numel() for tensor in own.values()))
    factors = array("f", scales)
    job = arrays.job(targets=arrays.addresses, tensors=arrays.partners, values=values, scales=factors)
    torch.autograd.graph.increment_version(params)  # as torch's own operations in place do
    _library().run.flatmin_save_and_move(ctypes.byref(job), ctypes.c_void_p(buffer.data_ptr()))
    return Kept(params, arrays, values, own, buffer)


@dataclass(frozen=True)
class Kept:
    """Parameters that the kernel has moved, and their values of before.

    Attributes:
        params: The parameters.
        arrays: Where they lay.
        sources: The addresses of the values, each in its parameter's order of memory.
        own: Those of the values that have a tensor of their own, by index.
        buffer: The other values, one after the other.
    """

    params: list[Tensor]
    arrays: Arrays
    sources: "array[int]"
    own: Mapping[int, Tensor]
    buffer: Tensor

    def put_back_(self) -> None:
        """Copy the values into the parameters' storage."""
        now = _locate(self.arrays.objects, _NONE)
        if now.addresses != self.arrays.addresses or now.offsets != self.arrays.offsets:  # given other memory meanwhile
            torch._foreach_copy_(self.params, self.values())
            return
        job = self.arrays.job(targets=self.arrays.addresses, values=self.sources)
        torch.autograd.graph.increment_version(self.params)
        _library().run.flatmin_put_back(ctypes.byref(job))

    def values(self) -> list[Tensor]:
        """The values, each shaped like its parameter."""
        lengths = [0 if index in self.own else length for index, length in enumerate(self.arrays.lengths())]
        pieces = torch.split(self.buffer, lengths)
        return [
            self.own[index] if index in self.own else piece.view(param.shape)
            for index, (piece, param) in enumerate(zip(pieces, self.params, strict=True))
        ]


def _ids(tensors: Sequence[Tensor]) -> "array[int]":
    if _PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors)):
        return array("q", map(id, tensors))
    return array("q", [id(x) if type(x) in _PLAIN and not x.is_neg() else 0 for x in tensors])


def _locate(objects: "array[int]", partners: "array[int]") -> Arrays:
    columns = _zeros(len(objects) + 1), _zeros(len(objects)), _zeros(len(partners))
    library = _library()
    pointers = (ctypes.c_void_p(_pointer(column)) for column in (objects, partners, *columns))
    try:
        num_permuted = library.ask.flatmin_describe(library.exchange, ctypes.c_int64(len(objects)), *pointers)
    except RuntimeError:  # one without memory of its own, such as a tensor inside torch.func.vmap
        return Arrays(objects, _zeros(len(objects) + 1), _zeros(len(objects)), _zeros(len(partners)))
    return Arrays(objects, *columns, num_permuted)


def _zeros(length: int) -> "array[int]":
    return array("q", bytes(8 * length))


def _pointer(column: "array[Any]") -> int:
    return column.buffer_info()[0]


def _library() -> _Library:
    library = _load()
    assert library is not None, "has_compiled_kernel() comes first"
    return library


@cache
def _load() -> _Library | None:
    """The compiled kernel; ``None`` where there is none for this source, this torch and this platform."""
    source = Path(__file__).with_suffix(".c")
    path = str(source.with_name("_kernel.so"))
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None or not source.with_name("_kernel.so").exists():
        return None
    pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    get_pointer = pointer_in(("PyCapsule_GetPointer", ctypes.pythonapi))
    try:
        library = _Library(
            ctypes.CDLL(path), ctypes.PyDLL(path), ctypes.c_void_p(get_pointer(exchange, b"dlpack_exchange_api"))
        )
    except OSError:  # made for another platform, or torch has no OpenMP threads
        return None
    library.run.flatmin_sum_of_squares.restype = ctypes.c_double
    checksum = ctypes.c_uint32(zlib.crc32(source.read_bytes()))
    return library if library.ask.flatmin_is_built_from(checksum, library.exchange) else None
