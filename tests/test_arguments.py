"""Arguments of the wrong kind are refused where they are given, and not by Python at the first step."""

import io
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import flatmin
from doors import train
from flatmin.optim import (
    Adaptive,
    AllOf,
    Always,
    Ball,
    Bernoulli,
    Blend,
    CosineToZero,
    Every,
    FirstOrderGain,
    Fisher,
    Fixed,
    Gradient,
    LargeGradient,
    OnePass,
    Perturbed,
    ProportionalToLr,
    SecondOrderSAM,
    SmoothedGradient,
    Unified,
    WarmUp,
    Within,
)
from problems import tiny_network


def _two_passes(**options):
    model = tiny_network()
    return flatmin.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), **{"model": model, **options})


def _one_pass(**options):
    return OnePass(torch.optim.SGD(tiny_network().parameters(), lr=0.1, momentum=0.9), **{"rho": 0.1, **options})


def _second_order(**options):
    model = tiny_network()
    return SecondOrderSAM(torch.optim.SGD(model.parameters(), lr=0.1), **{"model": model, **options})


def _bsam(**options):
    return flatmin.BSAM(tiny_network().parameters(), **{"num_data": 100, **options})


CLASSES = {
    "direction": Gradient,
    "ball": Ball,
    "when": Every,
    "combine": Perturbed,
    "metric": Adaptive,
    "radius": Fixed,
}


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (_two_passes, ("direction", "ball", "when", "combine", "rho_schedule", "model")),
        (_one_pass, ("direction", "ball", "when", "rho_schedule", "model")),
        (_second_order, ("rho_schedule", "model")),
        (_bsam, ("model",)),
        (Ball, ("metric", "radius")),
    ],
)
def test_pieces_of_another_kind_are_refused_by_name(build, names):
    for name in names:
        for wrong in (3, 0, "all", CLASSES.get(name, nn.Linear)):  # the class instead of an instance, too
            with pytest.raises(TypeError, match=rf"^{name} must be .*, got {re.escape(repr(wrong))}$"):
                build(**{name: wrong})


def test_rules_in_rules_are_refused_by_name():
    for wrong in (3, Always):
        with pytest.raises(TypeError, match="^when must be a rule of when to perturb"):
            AllOf(Every(2), wrong)
        with pytest.raises(TypeError, match="^when must be a rule of when to perturb"):
            Within(LargeGradient(10), wrong)
    for wrong in (3, Always(), LargeGradient):
        with pytest.raises(TypeError, match="^rule must be one that looks at the gradient"):
            Within(wrong, Always())


NUMBERS = [
    ("rho", lambda x: _two_passes(rho=x)),
    ("rho", lambda x: _one_pass(rho=x)),
    ("p", lambda x: Ball(p=x)),
    ("eta", lambda x: Adaptive(eta=x)),
    ("eta", lambda x: Fisher(eta=x)),
    ("alpha", Blend),
    ("theta", lambda x: SmoothedGradient(x)),
    ("share", lambda x: Unified(x)),
    ("sigma", lambda x: FirstOrderGain(x)),
    ("decay_start", lambda x: FirstOrderGain(0.1, decay_start=x)),
    ("probability", lambda x: Bernoulli(x)),
    ("c_start", lambda x: LargeGradient(10, c_start=x)),
    ("num_steps", lambda x: WarmUp(x)),
    ("num_steps", lambda x: CosineToZero(x)),
    ("lr_max", lambda x: ProportionalToLr(0.1, 0.05, x)),
    ("gamma", lambda x: flatmin.WSAM(torch.optim.SGD([nn.Parameter(torch.ones(1))]), gamma=x)),
    ("num_data", lambda x: _bsam(num_data=x)),
    ("lr", lambda x: _bsam(lr=x)),
    ("betas", lambda x: _bsam(betas=(0.9, x))),
]


@pytest.mark.parametrize(("name", "build"), NUMBERS)
def test_what_is_no_number_is_refused_by_name(name, build):
    for wrong in ("0.5", True, [0.5]):
        with pytest.raises(TypeError, match=rf"^{name} must be a number, got {re.escape(repr(wrong))}$"):
            build(wrong)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got nan$"):
        build(math.nan)


def test_numbers_of_numpy_are_numbers():
    for number in (np.float32(0.25), np.float64(0.25)):
        model = tiny_network()
        optimizer = flatmin.ASAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=number, eta=number, model=model)
        train(optimizer, model, range(2))
        assert optimizer.param_groups[0]["rho"] == 0.25
        torch.save(optimizer.state_dict(), file := io.BytesIO())
        file.seek(0)
        torch.load(file, weights_only=True)


def test_a_pair_is_needed_for_betas():
    with pytest.raises(ValueError, match=r"^betas must be two numbers in \[0, 1\), got 0.9$"):
        _bsam(betas=0.9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": "0.1"}, TypeError, "rho must be a number, got '0.1'"),
        ({"ascent_steps": 1.5}, ValueError, "ascent_steps must be an integer >= 1, got 1.5"),
        (
            {"ascent_steps": 2, "p": 3.0},
            ValueError,
            "ascent_steps must be 1 unless p is 2 or infinity, got 2 with p = 3",
        ),
    ],
)
def test_options_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        flatmin.SAM(torch.optim.SGD(tiny_network().parameters(), lr=0.1), **arguments)
