"""The networks compute what their papers say, and start from the stated distributions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin.train.models import ModelOptions, build_model
from flatmin.train.models.pool_pad import PoolPad
from flatmin.train.models.wide_resnet import WideBlock


def test_wide_resnet_without_norms_has_none_and_keeps_its_activations_small():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        model = build_model("wrn-40-1", 10, 3, ModelOptions(norm="none"))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        features = model.conv(images)
        grown = model.blocks(features).std() / features.std()
        for block in model.blocks:  # the control: with He's initialisation they grow with depth
            block.conv2.weight.mul_(len(model.blocks) ** 0.5)
        grown_without = model.blocks(features).std() / features.std()
    assert grown < 3
    assert grown_without > 100
    with pytest.raises(ValueError, match="norm must be one of batch, none, got 'layer'"):
        build_model("wrn-10-1", 10, 3, ModelOptions(norm="layer"))


def norm_relu(state: dict[str, Tensor], name: str, x: Tensor, *, relu: bool = True) -> Tensor:
    """Batch statistics with epsilon 1e-5, spelled out."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    scale, shift = (state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    y = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
    return y.clamp(min=0) if relu else y


def zeros_behind(x: Tensor, num_channels: int) -> Tensor:
    new = torch.zeros(len(x), num_channels - x.shape[1], *x.shape[2:], dtype=x.dtype)
    return torch.cat((x, new), dim=1)


def reference_resnet(state: dict[str, Tensor], x: Tensor, blocks_per_group: int) -> Tensor:
    x = norm_relu(state, "bn", F.conv2d(x, state["conv.weight"], padding=1))
    for block in range(3 * blocks_per_group):
        stride = 2 if block in (blocks_per_group, 2 * blocks_per_group) else 1
        name = f"blocks.{block}"
        y = norm_relu(state, f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1))
        y = norm_relu(state, f"{name}.bn2", F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), relu=False)
        if stride == 2:
            x = zeros_behind(x[:, :, ::2, ::2], y.shape[1])
        x = (x + y).clamp(min=0)
    return F.linear(x.mean(dim=(2, 3)), state["head.weight"], state["head.bias"])


def reference_wide_resnet(state: dict[str, Tensor], x: Tensor, blocks_per_group: int, shortcut: str) -> Tensor:
    x = F.conv2d(x, state["conv.weight"], padding=1)
    for block in range(3 * blocks_per_group):
        stride = 2 if block in (blocks_per_group, 2 * blocks_per_group) else 1
        name = f"blocks.{block}"
        activated = norm_relu(state, f"{name}.bn1", x)
        y = norm_relu(
            state, f"{name}.bn2", F.conv2d(activated, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        )
        y = F.conv2d(y, state[f"{name}.conv2.weight"], padding=1)
        projection = state.get(f"{name}.shortcut.weight")
        if projection is not None:
            x = F.conv2d(activated, projection, stride=stride)
        elif shortcut == "pool-pad":
            x = activated if block == 0 else x
            if stride == 2:
                x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
            x = zeros_behind(x, y.shape[1])
        x = x + y
    return F.linear(norm_relu(state, "bn", x).mean(dim=(2, 3)), state["head.weight"], state["head.bias"])


def skipped(x: Tensor, side: int, num_channels: int) -> Tensor:
    """Average over the squares of which ``side`` fit into the image, and put zeros behind."""
    stride = x.shape[-1] // side
    x = x.unfold(2, stride, stride).unfold(3, stride, stride).mean(dim=(4, 5))
    return zeros_behind(x, num_channels)


def reference_autoaugment_wide_resnet(state: dict[str, Tensor], images: Tensor, blocks_per_group: int) -> Tensor:
    """With the skip connections around groups: the flag ``use_additional_skip_connections`` of the release."""
    x = F.conv2d(images, state["conv.weight"], padding=1)
    for group in range(3):
        group_input = x
        for index in range(blocks_per_group):
            name = f"blocks.{group * blocks_per_group + index}"
            stride = 2 if group > 0 and index == 0 else 1
            activated = norm_relu(state, f"{name}.bn1", x)
            x = activated if group == index == 0 else x
            y = F.conv2d(activated, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(norm_relu(state, f"{name}.bn2", y), state[f"{name}.conv2.weight"], padding=1)
            x = skipped(x, y.shape[-1], y.shape[1]) + y
        x = x + skipped(group_input, x.shape[-1], x.shape[1])
    x = x + skipped(images, x.shape[-1], x.shape[1])
    return F.linear(norm_relu(state, "bn", x).mean(dim=(2, 3)), state["head.weight"], state["head.bias"])


def reference_shake_shake(state: dict[str, Tensor], x: Tensor, blocks_per_group: int) -> Tensor:
    """In evaluation, where both branches count half; batch statistics stand in for the running ones."""
    x = norm_relu(state, "bn", F.conv2d(x, state["conv.weight"], padding=1), relu=False)
    for block in range(3 * blocks_per_group):
        stride = 2 if block in (blocks_per_group, 2 * blocks_per_group) else 1
        name = f"blocks.{block}"
        branches = []
        for letter in "ab":
            y = F.conv2d(x.clamp(min=0), state[f"{name}.{letter}.0.weight"], stride=stride, padding=1)
            y = F.conv2d(norm_relu(state, f"{name}.{letter}.1", y), state[f"{name}.{letter}.3.weight"], padding=1)
            branches.append(norm_relu(state, f"{name}.{letter}.4", y, relu=False))
        if f"{name}.shortcut.bn.weight" in state:
            moved = torch.zeros_like(x)
            moved[:, :, :-1, :-1] = x[:, :, 1:, 1:]
            halves = [
                F.conv2d(pixels, state[f"{name}.shortcut.conv{path}.weight"], stride=stride)
                for path, pixels in ((1, x), (2, moved))
            ]
            x = norm_relu(state, f"{name}.shortcut.bn", torch.cat(halves, dim=1), relu=False)
        x = x + 0.5 * branches[0] + 0.5 * branches[1]
    return F.linear(x.clamp(min=0).mean(dim=(2, 3)), state["head.weight"], state["head.bias"])


def reference_pyramidnet(state: dict[str, Tensor], x: Tensor, blocks_per_group: int, keep: list[float]) -> Tensor:
    """In evaluation, where ShakeDrop scales block k by ``keep[k]``; batch statistics stand in for the running ones."""
    x = norm_relu(state, "bn1", F.conv2d(x, state["conv.weight"], padding=1), relu=False)
    for block in range(3 * blocks_per_group):
        stride = 2 if block in (blocks_per_group, 2 * blocks_per_group) else 1
        name = f"blocks.{block}.residual"
        kernels = [key for key in state if key.startswith(name) and key.endswith("weight") and state[key].ndim == 4]
        y, layer = norm_relu(state, f"{name}.0", x, relu=False), 1
        for index, kernel in enumerate(kernels):
            side = state[kernel].shape[-1]
            is_strided = index == (0 if len(kernels) == 2 else 1)
            y = F.conv2d(y, state[kernel], stride=stride if is_strided else 1, padding=side // 2)
            y = norm_relu(state, f"{name}.{layer + 1}", y, relu=index < len(kernels) - 1)
            layer += 3
        x = skipped(x, y.shape[-1], y.shape[1]) + keep[block] * y
    return F.linear(norm_relu(state, "bn2", x).mean(dim=(2, 3)), state["head.weight"], state["head.bias"])


def with_batch_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """In evaluation mode, with the statistics of ``images`` as the running ones of every batch norm."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def take(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        norm.running_mean.copy_(args[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(args[0].var(dim=(0, 2, 3), correction=0))

    handles = [norm.register_forward_pre_hook(take) for norm in norms]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return model


def reference_small_cnn(state: dict[str, Tensor], x: Tensor) -> Tensor:
    for layer in (0, 4, 8):
        x = norm_relu(state, f"features.{layer + 1}", F.conv2d(x, state[f"features.{layer}.weight"], padding=1))
        if layer != 8:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    return F.linear(x.mean(dim=(2, 3)), state["head.weight"], state["head.bias"])


def reference_lenet(state: dict[str, Tensor], x: Tensor) -> Tensor:
    for layer, padding in ((0, 2), (3, 0)):
        x = F.conv2d(x, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=padding)
        x = x.clamp(min=0).unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    side = x.shape[-1]
    cells = [slice(i * side // 5, -(-(i + 1) * side // 5)) for i in range(5)]
    x = torch.stack([torch.stack([x[..., a, b].mean(dim=(2, 3)) for b in cells], -1) for a in cells], -2).flatten(1)
    for layer in (0, 2, 4):
        x = F.linear(x, state[f"head.{layer}.weight"], state[f"head.{layer}.bias"])
        x = x if layer == 4 else x.clamp(min=0)
    return x


def randomized(model: nn.Module) -> nn.Module:
    """Double precision, and batch norm weights that are not 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
    return model.double()


@pytest.mark.parametrize("side", [12, 28, 32])
def test_logits_of_lenet_are_those_of_a_plain_transcription(side):
    torch.manual_seed(0)
    model = build_model("lenet-5", 7, 1).double()
    images = torch.randn(3, 1, side, side, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference_lenet(model.state_dict(), images), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("side", [8, 28, 32])
@pytest.mark.parametrize(
    ("name", "reference", "options"),
    [
        ("small-cnn", reference_small_cnn, {}),
        ("resnet-14", lambda state, x: reference_resnet(state, x, 2), {}),
        ("wrn-16-1", lambda state, x: reference_wide_resnet(state, x, 2, "pool-pad"), {}),
        ("wrn-16-2", lambda state, x: reference_wide_resnet(state, x, 2, "pool-pad"), {}),
        ("wrn-16-1", lambda state, x: reference_wide_resnet(state, x, 2, "conv"), {"shortcut": "conv"}),
        ("wrn-16-2", lambda state, x: reference_wide_resnet(state, x, 2, "conv"), {"shortcut": "conv"}),
        ("wrn-16-2", lambda state, x: reference_autoaugment_wide_resnet(state, x, 2), {"extra_skips": True}),
        ("wrn-16-1", lambda state, x: reference_autoaugment_wide_resnet(state, x, 2), {"extra_skips": True}),
        ("pyramidnet-14-9", lambda state, x: reference_pyramidnet(state, x, 2, [1.0] * 6), {}),
        ("pyramidnet-29-9", lambda state, x: reference_pyramidnet(state, x, 3, [1.0] * 9), {}),
    ],
)
def test_logits_are_those_of_a_plain_transcription(name, reference, options, side):
    torch.manual_seed(0)
    model = randomized(build_model(name, 7, 1, ModelOptions(**options)))
    images = torch.randn(3, 1, side, side, dtype=torch.float64)
    logits = model(images)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits, reference(model.state_dict(), images), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("shake-shake-14-2x6d", lambda state, x: reference_shake_shake(state, x, 2)),
        (
            "pyramidnet-14-9-shakedrop",
            lambda state, x: reference_pyramidnet(state, x, 2, [11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12, 6 / 12]),
        ),
    ],
)
def test_logits_in_evaluation_are_those_of_a_plain_transcription(name, reference):
    torch.manual_seed(0)
    images = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    model = with_batch_statistics(randomized(build_model(name, 7, 1)), images)
    state = model.state_dict()
    torch.testing.assert_close(model(images), reference(state, images), atol=1e-9, rtol=1e-9)
    assert (model.train()(images) - reference(state, images)).abs().max() > 1e-3  # gates are random in training


def test_the_two_shortcuts_of_a_wide_resnet_differ():
    """Control of the transcription test: the forms must not agree where their parameters do."""
    torch.manual_seed(0)
    state = randomized(build_model("wrn-10-1", 7, 1)).state_dict()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    pooled = reference_wide_resnet(state, images, 1, "pool-pad")
    state["blocks.1.shortcut.weight"] = torch.eye(32, 16, dtype=torch.float64)[:, :, None, None]
    state["blocks.2.shortcut.weight"] = torch.eye(64, 32, dtype=torch.float64)[:, :, None, None]
    assert (pooled - reference_wide_resnet(state, images, 1, "conv")).abs().max() > 1e-3


def test_odd_sides_are_pooled_over_the_pixels_that_exist():
    pooled = PoolPad(stride=2, new_channels=1)(torch.arange(9.0).view(1, 1, 3, 3))
    expected = torch.tensor([[(0 + 1 + 3 + 4) / 4, (2 + 5) / 2], [(6 + 7) / 2, 8.0]])
    assert torch.equal(pooled, torch.stack((expected, torch.zeros(2, 2)))[None])
    for name in ("resnet-8", "wrn-10-1", "shake-shake-8-2x4d", "pyramidnet-8-6"):
        assert build_model(name, 2, 1)(torch.zeros(2, 1, 30, 30)).shape == (2, 2)


@pytest.mark.parametrize("name", ["resnet-20", "wrn-16-4", "shake-shake-8-2x32d", "pyramidnet-20-64"])
def test_kernels_start_he_normal_over_their_fan_out(name):
    torch.manual_seed(0)
    options = ModelOptions(shortcut="conv" if name.startswith("wrn") else "pool-pad")
    for module in build_model(name, 10, 3, options).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            weight = module.weight.detach()
            std = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            tolerance = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
            assert abs(weight.std().item() / std - 1) < tolerance
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
            assert weight.abs().max() > 2.2 * std  # wider than a uniform draw, which ends at 1.73


@pytest.mark.parametrize("name", ["wrn-10-4", "shake-shake-8-2x64d", "pyramidnet-11-48"])
def test_heads_of_the_release_start_uniform_over_their_classes(name):
    torch.manual_seed(0)
    head = build_model(name, 100, 3).head
    assert torch.count_nonzero(head.bias) == 0
    assert 0.0995 < head.weight.max() <= 0.1
    assert -0.1 <= head.weight.min() < -0.0995
    assert abs(head.weight.std().item() / (0.1 / math.sqrt(3)) - 1) < 0.02


def test_batch_norm_has_the_constants_of_the_release():
    for name in ("small-cnn", "resnet-8", "wrn-10-1", "shake-shake-8-2x4d", "pyramidnet-11-6-shakedrop"):
        norms = [module for module in build_model(name, 2, 1).modules() if isinstance(module, nn.BatchNorm2d)]
        assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


def test_dropout_scales_or_zeroes_what_the_second_convolution_reads():
    torch.manual_seed(0)
    block = WideBlock(8, 8, 1, nn.Identity(), activates_shortcut=False, dropout=0.3)
    seen = {}
    block.bn2.register_forward_hook(lambda module, args, output: seen.update(before=output.clamp(min=0)))
    block.conv2.register_forward_hook(lambda module, args, output: seen.update(after=args[0]))
    block(torch.randn(16, 8, 16, 16))
    active = seen["before"] > 0
    kept = active & (seen["after"] != 0)
    torch.testing.assert_close(seen["after"][kept], seen["before"][kept] / 0.7)
    share = kept.sum() / active.sum()
    assert abs(share - 0.7) < 5 * math.sqrt(0.3 * 0.7 / active.sum())
    block.eval()(torch.randn(16, 8, 16, 16))
    assert torch.equal(seen["after"], seen["before"])
