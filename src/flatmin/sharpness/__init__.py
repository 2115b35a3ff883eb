"""Measure the sharpness of a minimum: the loss around the weights that training found."""

from flatmin.sharpness.landscape import (
    filter_normalised_direction,
    gradient_direction,
    loss_on_line,
    loss_on_plane,
)

__all__ = [
    "filter_normalised_direction",
    "gradient_direction",
    "loss_on_line",
    "loss_on_plane",
]
