"""The engine, its pieces, and the named methods made of them."""

from flatmin.optim.balls import Ball, Perturbation
from flatmin.optim.buffers import averaged_buffers
from flatmin.optim.checkup import Checkup, Finding
from flatmin.optim.combine import Blend, Combine, Decoupled, Perturbed, Renormalised, Reuse, SurrogateGap
from flatmin.optim.compiled import CompiledStep, compile_step
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.directions import (
    BaseMomentum,
    Direction,
    Gradient,
    NoiseOfGradient,
    RandomDirection,
    SmoothedGradient,
    StaleGradient,
)
from flatmin.optim.doctor import doctor
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.filters import Centralised, Filter, Filtered, ZScore
from flatmin.optim.kernel import has_compiled_kernel
from flatmin.optim.layers import LayerBall
from flatmin.optim.methods.aesam import AESAM
from flatmin.optim.methods.asam import ASAM
from flatmin.optim.methods.bsam import BSAM
from flatmin.optim.methods.fisher_sam import FisherSAM
from flatmin.optim.methods.friendly_sam import FriendlySAM
from flatmin.optim.methods.gnp import GNP
from flatmin.optim.methods.gsam import GSAM
from flatmin.optim.methods.late_sam import LateSAM
from flatmin.optim.methods.layer_sam import LayerSAM
from flatmin.optim.methods.lesam import LESAM
from flatmin.optim.methods.looksam import LookSAM
from flatmin.optim.methods.msam import MSAM, AdaptiveMSAM
from flatmin.optim.methods.rst import RST
from flatmin.optim.methods.sam import SAM
from flatmin.optim.methods.samon import SAMON
from flatmin.optim.methods.second_order_sam import SecondOrderSAM
from flatmin.optim.methods.stable_sam import StableSAM
from flatmin.optim.methods.usam import USAM
from flatmin.optim.methods.vasso import VaSSO
from flatmin.optim.methods.wsam import WSAM
from flatmin.optim.methods.zsharp import ZSharp
from flatmin.optim.metrics import Adaptive, Fisher, Identity, Metric
from flatmin.optim.norms import joint_dot, joint_norm
from flatmin.optim.one_pass import OnePass
from flatmin.optim.options import EngineOptions, OnePassOptions
from flatmin.optim.radii import FirstOrderGain, Fixed, Radius, Unified
from flatmin.optim.radius_search import suggest_rho
from flatmin.optim.schedules import CosineToZero, ProportionalToLr, RhoSchedule, WarmUp
from flatmin.optim.space import ActiveGroup, Space
from flatmin.optim.sync import Sync
from flatmin.optim.when import AllOf, Always, Bernoulli, Every, GradientWhen, LargeGradient, When, Window, Within
from flatmin.optim.where import param_groups

__all__ = [
    "AESAM",
    "ASAM",
    "BSAM",
    "GNP",
    "GSAM",
    "LESAM",
    "MSAM",
    "RST",
    "SAM",
    "SAMON",
    "USAM",
    "WSAM",
    "ActiveGroup",
    "Adaptive",
    "AdaptiveMSAM",
    "AllOf",
    "Always",
    "Ball",
    "BaseMomentum",
    "Bernoulli",
    "Blend",
    "Centralised",
    "Checkup",
    "Combine",
    "CompiledStep",
    "CosineToZero",
    "Decoupled",
    "Diagnostics",
    "Direction",
    "EngineOptions",
    "Every",
    "Filter",
    "Filtered",
    "Finding",
    "FirstOrderGain",
    "Fisher",
    "FisherSAM",
    "Fixed",
    "FriendlySAM",
    "Gradient",
    "GradientWhen",
    "Identity",
    "LargeGradient",
    "LateSAM",
    "LayerBall",
    "LayerSAM",
    "LookSAM",
    "Metric",
    "NoiseOfGradient",
    "OnePass",
    "OnePassOptions",
    "Perturbation",
    "Perturbed",
    "ProportionalToLr",
    "Radius",
    "RandomDirection",
    "Renormalised",
    "Reuse",
    "RhoSchedule",
    "SecondOrderSAM",
    "SharpnessAware",
    "SmoothedGradient",
    "Space",
    "StableSAM",
    "StaleGradient",
    "SurrogateGap",
    "Sync",
    "Unified",
    "VaSSO",
    "WarmUp",
    "When",
    "Window",
    "Within",
    "ZScore",
    "ZSharp",
    "averaged_buffers",
    "compile_step",
    "doctor",
    "has_compiled_kernel",
    "joint_dot",
    "joint_norm",
    "param_groups",
    "suggest_rho",
]
