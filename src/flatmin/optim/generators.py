"""The states of torch's random number generators."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Generators = dict[torch.device, Tensor]


def generators_of(params: Iterable[Tensor]) -> Generators:
    """The states of torch's own generators: of the CPU and of the accelerators that hold parameters."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return states
    module = _module_of(accelerator)
    if not getattr(module, "is_initialized", lambda: True)():  # nothing is there, and looking at all takes its time
        return states
    devices = {param.device for param in params if param.device.type == accelerator.type}
    if devices and accelerator.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return states  # a graph counts its random numbers by itself
    for device in devices:
        states[device] = module.get_rng_state(device)
    return states


def set_generators(states: Generators) -> None:
    """Put the states back."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            _module_of(device).set_rng_state(state, device)


def _module_of(device: torch.device) -> Any:
    """``torch.cuda``, ``torch.mps``, ``torch.xpu`` and so on."""
    return torch.get_device_module(device.type)
