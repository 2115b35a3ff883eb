"""Which names a network may have, and which options go with them."""

import math

import pytest
from torch import nn

from flatmin.train.models import ModelOptions, PyramidNet, ResNet, ShakeShakeNet, WideResNet, build_model, check_model


def test_build_model_hands_its_options_to_the_wide_resnet():
    model = build_model("wrn-10-1", 2, 1, ModelOptions(shortcut="conv", dropout=0.25))
    assert [block.dropout.p for block in model.blocks] == [0.25] * 3
    assert [type(block.shortcut) for block in model.blocks] == [nn.Identity, nn.Conv2d, nn.Conv2d]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "small-cnn",
            "lenet-5",
            "resnet-8",
            "resnet-110",
            "wrn-10-1",
            "wrn-28-10",
            "wrn-40-2",
            "shake-shake-26-2x96d",
        ),
        *("pyramidnet-110-270", "pyramidnet-272-200", "pyramidnet-272-200-shakedrop", "pyramidnet-11-6"),
        *("resnet50", "efficientnet-b0", "efficientnet-l2-475", "vit-s-32", "timm/resnet18", "timm/resnet18.a1_in1k"),
    ],
)
def test_known_names_pass(name):
    check_model(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "cnn",
            "small-cnn-2",
            "lenet",
            "lenet-4",
            "resnet",
            "resnet-2",
            "resnet-21",
            "resnet-20-1",
            "resnet-020",
            "resnet-20 ",
        ),
        *("ResNet-20", "wrn-28", "wrn-4-1", "wrn-28-0", "wrn-27-10", "wrn-28-10-1", "wrn-28-10\n", "wrn--28-10"),
        *("shake-shake-26-2x96", "shake-shake-26-2x95d", "shake-shake-28-2x96d", "shake-shake-26-3x96d"),
        *("pyramidnet-110", "pyramidnet-111-48", "pyramidnet-116-48", "pyramidnet-2-1", "pyramidnet-272-200-drop"),
        *("resnet34", "efficientnet-b9", "timm/", "timm/no_such_model", "timm/wrn-28-10"),
    ],
)
def test_unknown_names_are_refused_with_the_rule_and_the_value(name):
    for refuse in (check_model, lambda name: build_model(name, 10, 3)):
        with pytest.raises(
            ValueError, match=r"model must be small-cnn, lenet-5, resnet-D with D = 6n \+ 2, .* or timm/NAME"
        ) as caught:
            refuse(name)
        assert str(caught.value).endswith(f"got {name!r}")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("resnet-8", 0, 3), {}, "num_classes and in_channels must be >= 1, got 0 and 3"),
        (("resnet-8", 2, 0), {}, "num_classes and in_channels must be >= 1, got 2 and 0"),
        (
            ("resnet-8", 2, 3),
            {"dropout": 0.1},
            "dropout must stay at its default for resnet-8: it belongs to wrn-D-W and",
        ),
        (("small-cnn", 2, 3), {"shortcut": "conv"}, "shortcut must stay .* small-cnn: it belongs to wrn-D-W, got conv"),
        (
            ("resnet50", 2, 3),
            {"extra_skips": True},
            "extra_skips must stay .* resnet50: it belongs to wrn-D-W, got True",
        ),
        (("wrn-10-1", 2, 3), {"drop_path": 0.1}, "drop_path must stay .* wrn-10-1: it belongs to timm/NAME, got 0.1"),
        (("wrn-10-1", 2, 3), {"pretrained": True}, "pretrained must stay .* wrn-10-1: it belongs to timm/NAME"),
        (("wrn-10-1", 2, 3), {"shortcut": "pad"}, "shortcut must be one of pool-pad, conv, got 'pad'"),
        (("wrn-10-1", 2, 3), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (("wrn-10-1", 2, 3), {"dropout": math.nan}, r"dropout must be in \[0, 1\), got nan"),
    ],
)
def test_options_outside_their_domain_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments, ModelOptions(**options))


def test_constructors_refuse_what_no_name_can_say():
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 with n >= 1, got 21"):
        ResNet(21, 10, 3)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4 with n >= 1, got 4"):
        WideResNet(4, 1, 10, 3)
    with pytest.raises(ValueError, match="widen_factor must be >= 1, got 0"):
        WideResNet(10, 0, 10, 3)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 with n >= 1, got 2"):
        ShakeShakeNet(2, 4, 10, 3)
    with pytest.raises(ValueError, match="width must be even and >= 2, got 3"):
        ShakeShakeNet(8, 3, 10, 3)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 up to 110, or 9n \+ 2, with n >= 1, got 116"):
        PyramidNet(116, 4, 10, 3)
    with pytest.raises(ValueError, match="alpha must be >= 0, got -1"):
        PyramidNet(8, -1, 10, 3)
