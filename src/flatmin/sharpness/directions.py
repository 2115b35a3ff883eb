"""Directions in the space of weights along which the loss is looked at."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flatmin.optim import joint_norm
from flatmin.sharpness.loss_functions import as_scalar
from flatmin.sharpness.unchanged import BatchStatistics, unchanged, wide


def filter_normalised_direction(params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draw a Gaussian direction whose every filter is as long as the filter of the weights.

    ``d_i <- d_i / ||d_i|| * ||w_i||`` for each filter ``i``, a slice of a tensor along its first dimension: the weights
    of one output channel of a convolution, of one output neuron of a linear layer. Tensors of fewer than two dimensions
    (biases, scales and shifts of normalisation layers) get zeros. A step along the direction then changes each filter
    by the same fraction, so pictures of networks whose weights differ in scale can be compared.

    Args:
        params: Weights ``w``, any shapes.
        generator: Source of the random numbers; the draw is made on its device, in float32 or wider.

    Returns:
        New tensors with the shapes, dtypes and devices of ``params``. A filter of zeros gets zeros.

    References:
        Li et al. (2018), "Visualizing the Loss Landscape of Neural Nets", arXiv:1712.09913, section 4.
    """
    return [_filter_normalised(param.detach(), generator) for param in params]


def gradient_direction(model: nn.Module, loss_fn: Callable[[], Tensor], batch_norm: BatchStatistics) -> list[Tensor]:
    """Return the direction in which the loss rises fastest: its gradient, scaled to joint length 1.

    ``g / ||g||`` with one L2 norm over all parameters together. ``loss_on_line`` along it, at 0 and ``rho``, tells how
    much the loss rises at ``w + eps``, the point at which SAM of radius ``rho`` takes its second gradient.

    Args:
        model: The network; left as it was, bit for bit, its gradients included.
        loss_fn: Returns the loss of ``model`` as a scalar, attached to the graph of its parameters.
        batch_norm: As in ``loss_on_line``.

    Returns:
        One tensor per parameter of ``model``, zeros where it is frozen or the loss does not depend on it. A gradient of
        zeros stays zeros.

    References:
        Foret et al. (2021), arXiv:2010.01412, Eq. 2 with p = 2.
    """
    params = list(model.parameters())
    free = [param for param in params if param.requires_grad]
    with unchanged(model, batch_norm), torch.enable_grad():
        grads = iter(torch.autograd.grad(as_scalar(loss_fn()), free, allow_unused=True, materialize_grads=True))
    gradient = [next(grads) if param.requires_grad else torch.zeros_like(param) for param in params]
    length = joint_norm(gradient)
    scale = torch.where(length > 0, 1 / length, 0.0)
    return [grad * scale.to(grad) for grad in gradient]


def direction_between(start: nn.Module, end: nn.Module) -> list[Tensor]:
    """Return the step from the weights of one model to those of another, ``w_end - w_start``.

    ``loss_on_line(start, loss_fn, direction, [0.0, ..., 1.0], ...)`` is the loss on the straight line between them: a
    barrier tells that they lie in different valleys. The running statistics of batch norm fit neither in between, so
    that ``batch_norm="recomputed"`` is the fair choice.

    Args:
        start: A model.
        end: A model of the same architecture.

    Returns:
        One tensor per parameter of ``start``, like it in dtype and device.

    Raises:
        ValueError: The models' parameters differ in number or shape.

    References:
        Goodfellow et al. (2015), arXiv:1412.6544; Frankle et al. (2020), arXiv:1912.05671, section 2.
    """
    ours, others = list(start.parameters()), list(end.parameters())
    shapes, wanted = [tuple(param.shape) for param in others], [tuple(param.shape) for param in ours]
    if shapes != wanted:
        raise ValueError(f"both models must have parameters of the same shapes, got {wanted} and {shapes}")
    with torch.no_grad():
        return [other.to(param) - param for param, other in zip(ours, others, strict=True)]


def _filter_normalised(param: Tensor, generator: torch.Generator) -> Tensor:
    if param.ndim < 2:  # no filters: a bias, or the scale of a normalisation layer
        return torch.zeros_like(param)
    dtype = wide(param.dtype)
    drawn = torch.randn(param.shape, generator=generator, device=generator.device, dtype=dtype).to(param.device)
    rest = tuple(range(1, param.ndim))
    length: Tensor = torch.linalg.vector_norm(drawn, dim=rest, keepdim=True)
    wanted: Tensor = torch.linalg.vector_norm(param, dim=rest, keepdim=True, dtype=dtype)
    return (drawn / length * wanted).to(param.dtype)
