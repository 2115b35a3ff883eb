"""The networks have the published numbers of parameters, and those of their closed forms."""

import pytest
import torch

from flatmin.train.models import ModelOptions, build_model


def num_params(name: str, num_classes: int, in_channels: int, **options) -> int:
    with torch.device("meta"):
        model = build_model(name, num_classes, in_channels, ModelOptions(**options))
    return sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "shortcut", "published"),
    [
        ("resnet-20", 10, "pool-pad", 269_722),
        ("resnet-32", 10, "pool-pad", 464_154),
        ("resnet-44", 10, "pool-pad", 658_586),
        ("resnet-56", 10, "pool-pad", 853_018),
        ("resnet-110", 10, "pool-pad", 1_727_962),
        ("wrn-28-10", 100, "pool-pad", 36_278_324),
        ("wrn-28-10", 10, "conv", 36_479_194),
        ("wrn-16-8", 10, "conv", 10_961_370),
        ("wrn-40-2", 10, "conv", 2_243_546),
        (
            "shake-shake-26-2x96d",
            100,
            "pool-pad",
            26_227_572,
        ),  # this and the next two: load_model_test.py of the release
        ("pyramidnet-272-200", 100, "pool-pad", 26_288_692),
        ("pyramidnet-272-200-shakedrop", 100, "pool-pad", 26_288_692),
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, shortcut, published):
    assert num_params(name, num_classes, 3, shortcut=shortcut) == published


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("num_classes", "in_channels"), [(10, 3), (7, 1)])
def test_resnet_has_the_parameters_of_its_closed_form(n, num_classes, in_channels):
    expected = 9 * in_channels * 16 + 2 * 16 + 64 * num_classes + num_classes
    for width, width_before in ((16, 16), (32, 16), (64, 32)):
        expected += n * (2 * 9 * width**2 + 4 * width) - 9 * width * (width - width_before)
    assert num_params(f"resnet-{6 * n + 2}", num_classes, in_channels) == expected


@pytest.mark.parametrize("shortcut", ["pool-pad", "conv"])
@pytest.mark.parametrize(("n", "w"), [(1, 1), (1, 4), (2, 1), (3, 2)])
def test_wide_resnet_has_the_parameters_of_its_closed_form(n, w, shortcut):
    expected = 9 * 3 * 16 + 2 * 64 * w + 64 * w * 10 + 10
    width_before = 16
    for width in (16 * w, 32 * w, 64 * w):
        expected += n * (2 * 9 * width**2 + 4 * width)  # as if every block had equal widths
        expected -= (9 * width + 2) * (width - width_before)  # the first convolution and batch norm are narrower
        expected += width_before * width if shortcut == "conv" and width != width_before else 0
        width_before = width
    assert num_params(f"wrn-{6 * n + 4}-{w}", 10, 3, shortcut=shortcut) == expected


@pytest.mark.parametrize(
    ("name", "published"),
    [
        *(("shake-shake-26-2x32d", 2.9e6), ("shake-shake-26-2x64d", 11.7e6), ("shake-shake-26-2x112d", 35.6e6)),
        *(("pyramidnet-110-48", 1.7e6), ("pyramidnet-110-84", 3.8e6), ("pyramidnet-110-270", 28.3e6)),
        *(("pyramidnet-200-240", 26.6e6), ("pyramidnet-272-200", 26.0e6)),
    ],
)
def test_rounded_parameter_counts_are_about_the_published_ones(name, published):
    assert num_params(name, 10, 3) == pytest.approx(published, rel=0.045)


@pytest.mark.parametrize(("n", "width"), [(1, 4), (2, 32), (4, 96)])
def test_shake_shake_has_the_parameters_of_its_closed_form(n, width):
    expected = 9 * 3 * 16 + 2 * 16 + 4 * width * 10 + 10
    before = 16
    for w in (width, 2 * width, 4 * width):
        expected += 2 * (9 * before * w + 9 * w**2 + 4 * w) + before * w + 2 * w  # the block with a shortcut
        expected += (n - 1) * 2 * (18 * w**2 + 4 * w)
        before = w
    assert num_params(f"shake-shake-{6 * n + 2}-2x{width}d", 10, 3) == expected


@pytest.mark.parametrize("suffix", ["", "-shakedrop"])
@pytest.mark.parametrize(("depth", "alpha", "expansion"), [(8, 6, 1), (110, 84, 1), (11, 6, 4), (164, 48, 4)])
def test_pyramidnet_has_the_parameters_of_its_closed_form(depth, alpha, expansion, suffix):
    num_blocks = (depth - 2) // (2 if expansion == 1 else 3)
    widths, total = [], 16.0
    for _ in range(num_blocks):
        total += alpha / num_blocks
        widths.append(round(total))
    before, expected = 16, 9 * 3 * 16 + 2 * 16
    for w in widths:
        if expansion == 1:
            expected += 2 * before + 9 * before * w + 2 * w + 9 * w * w + 2 * w
        else:
            expected += 2 * before + before * w + 2 * w + 9 * w * w + 2 * w + 4 * w * w + 8 * w
        before = expansion * w
    expected += 2 * before + 10 * before + 10
    assert num_params(f"pyramidnet-{depth}-{alpha}{suffix}", 10, 3) == expected


def test_small_cnn_has_the_parameters_of_its_closed_form():
    for channels, classes in ((1, 10), (3, 100)):
        assert num_params("small-cnn", classes, channels) == 288 * channels + 55_616 + 65 * classes


def test_lenet_has_the_published_number_of_parameters():
    assert num_params("lenet-5", 10, 1) == 61_706
    assert num_params("lenet-5", 7, 3) == 150 * 3 + 60_706 + 85 * 7
