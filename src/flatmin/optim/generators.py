"""The states of torch's random number generators."""

from collections.abc import Iterable

import torch
from torch import Tensor

Generators = dict[torch.device, Tensor]


def generators_of(params: Iterable[Tensor]) -> Generators:
    """The states of torch's own generators: of the CPU and of the devices of the parameters."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # then no parameter is there, and looking at all of them takes its time
        return states
    devices = {param.device for param in params if param.device.type == "cuda"}
    if devices and torch.cuda.is_current_stream_capturing():  # a graph counts its random numbers by itself
        return states
    for device in devices:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Generators) -> None:
    """Put the states back."""
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
