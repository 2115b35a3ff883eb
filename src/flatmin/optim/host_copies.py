"""Copies of parameters in host memory, for models that fill the memory of their device."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flatmin.arguments import check_choice

SaveTo = Literal["device", "host"]


def check_save_to(save_to: str) -> None:
    """Raise ``ValueError`` unless it is one of the two."""
    check_choice("save_to", save_to, get_args(SaveTo))


def is_on_host(param: Tensor) -> bool:
    """Whether the parameter is in host memory already, where there is nothing to gain."""
    return param.is_cpu


class HostCopies:
    """Copies of parameters in pinned memory, on their way while the device goes on with other work.

    A stream of its own copies what the parameters hold when the copies are asked for. Who writes into a parameter
    calls ``wait`` before; the host never waits.

    Args:
        params: Parameters of one device or several, none of them on the host.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        is_pinned = torch.accelerator.is_available()
        values = [torch.empty_like(param, device="cpu", pin_memory=is_pinned) for param in params]
        self._copies = {id(p): (p, p._version, value) for p, value in zip(params, values, strict=True)}
        self._streams: dict[torch.device, Any] = {}
        for device in {param.device for param in params}:
            self._streams[device] = _side_stream(device)
            with _inside(self._streams[device]), torch.no_grad():
                for param, value in zip(params, values, strict=True):
                    if param.device == device:
                        value.copy_(param.detach(), non_blocking=True)

    def hold(self, params: Sequence[Tensor]) -> bool:
        """Whether these are among the parameters, and nobody has written into them since."""
        return all(id(p) in self._copies and self._copies[id(p)][1] == p._version for p in params)

    def of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The copies of these, each shaped and laid out like its parameter."""
        return [self._copies[id(param)][2] for param in params]

    def wait(self) -> None:
        """Let the device's other work wait until the copies are made."""
        for device, stream in self._streams.items():
            if stream is not None:
                torch.accelerator.current_stream(device).wait_stream(stream)


def _side_stream(device: torch.device) -> Any:
    """A stream that begins where the present one stands; ``None`` for a device that has none."""
    if device.type == "cpu":
        return None
    stream = torch.Stream(device)
    stream.wait_stream(torch.accelerator.current_stream(device))
    return stream


def _inside(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else stream
