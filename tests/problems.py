"""Small problems for the optimizers: a network with every trap in it, and losses with known answers."""

import torch
from torch import Tensor, nn

NUM_BATCHES = 6


class TinyNetwork(nn.Module):
    """Batch norm, dropout, a buffer written in place and one rebound, and a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.4)
        self.last = nn.Linear(12, 3)
        self.unused = nn.Parameter(torch.randn(4))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_input", torch.zeros(5))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.num_calls += 1
            self.mean_input = 0.9 * self.mean_input + 0.1 * inputs.mean(dim=0)
        return self.last(self.dropout(torch.relu(self.norm(self.first(inputs)))))


def tiny_network(seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyNetwork:
    torch.manual_seed(seed)
    return TinyNetwork().to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(16, 5, generator=generator).to(dtype),
            torch.randint(0, 3, (16,), generator=generator),
        )
        for _ in range(NUM_BATCHES)
    ]


def quadratic(curvature: Tensor, weights: Tensor) -> Tensor:
    """``1/2 w^T A w``: gradient ``A w``, Hessian A."""
    return 0.5 * weights @ curvature @ weights
