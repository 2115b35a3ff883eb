"""A model that a careless visit would change, and everything about it that must stay."""

import torch
from torch import Tensor, nn


class Noisy(nn.Module):
    """Batch norm, dropout, buffers that are assigned, created or expanded, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
        self.layers[4].bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("first_seen", None)
        self.register_buffer("ones", torch.ones(1).expand(3))

    def forward(self, images: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.first_seen = images.detach() if self.first_seen is None else self.first_seen
        return self.layers(images) * self.ones


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that must stay: bits, storages, modes, gradients and the random state."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bits": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "storage": {name: tensor.data_ptr() for name, tensor in tensors.items()},
        "grads": {name: None if p.grad is None else p.grad.numpy().tobytes() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "frozen": [param.requires_grad for param in model.parameters()],
        "random": torch.get_rng_state().numpy().tobytes(),
    }
