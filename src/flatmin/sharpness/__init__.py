"""Measure the sharpness of a minimum: the loss around the weights that training found."""

from flatmin.sharpness.average_case import AverageCase, average_case
from flatmin.sharpness.batches import num_examples
from flatmin.sharpness.directions import direction_between, filter_normalised_direction, gradient_direction
from flatmin.sharpness.eigenvalues import HessianEigenvalues, hessian_eigenvalues
from flatmin.sharpness.grid_log import OtherGridError
from flatmin.sharpness.landscape import GridOptions, loss_on_line, loss_on_plane, mean_loss
from flatmin.sharpness.measure import Measure, NotFiniteError
from flatmin.sharpness.monitor import MeasureName, SharpnessMonitor
from flatmin.sharpness.objective import LossOptions
from flatmin.sharpness.products import HessianOptions, hessian_vector_product
from flatmin.sharpness.spectral_density import SpectralDensity, spectral_density
from flatmin.sharpness.trace import HessianTrace, hessian_trace
from flatmin.sharpness.trajectory import Trajectory, principal_directions
from flatmin.sharpness.worst_case import WorstCase, worst_case

__all__ = [
    "AverageCase",
    "GridOptions",
    "HessianEigenvalues",
    "HessianOptions",
    "HessianTrace",
    "LossOptions",
    "Measure",
    "MeasureName",
    "NotFiniteError",
    "OtherGridError",
    "SharpnessMonitor",
    "SpectralDensity",
    "Trajectory",
    "WorstCase",
    "average_case",
    "direction_between",
    "filter_normalised_direction",
    "gradient_direction",
    "hessian_eigenvalues",
    "hessian_trace",
    "hessian_vector_product",
    "loss_on_line",
    "loss_on_plane",
    "mean_loss",
    "num_examples",
    "principal_directions",
    "spectral_density",
    "worst_case",
]
