"""Wide residual networks of Zagoruyko and Komodakis (2016), in the form of the SAM authors' release."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin.arguments import check_choice
from flatmin.train.models.initialisation import he_normal_, uniform_head_
from flatmin.train.models.pool_pad import PoolPad

Shortcut = Literal["pool-pad", "conv"]
Norm = Literal["batch", "none"]


class WideResNet(nn.Module):
    """Pre-activation residual network WRN-D-W: depth 6n + 4, three groups of n blocks with 16 W, 32 W, 64 W channels.

    The second and the third group halve the image with stride 2 in their first block. Batch normalisation, ReLU, the
    mean over pixels and a linear head follow the last block.

    Where a block changes the number of channels its shortcut is one of two:

    - ``"pool-pad"``: average-pooling by the stride, and zeros for the new channels; no parameters. The form of the
      SAM authors' release, and of AutoAugment before it. 36,278,324 parameters for WRN-28-10 with 100 classes.
    - ``"conv"``: a 1x1 convolution with the stride, on activated input. The form of the WRN paper. 36,479,194
      parameters for WRN-28-10 with 10 classes, published as 36.5M.

    Kernels are He normal with ``mode="fan_out"``, the head's weights uniform in ``±1 / sqrt(num_classes)`` and its bias
    zero, as in the release, whose authors measured 0.5 % more error on CIFAR-100 with the default initialisation.
    Unlike the release, whose ``SAME`` padding of a strided convolution puts the only border behind the image, we pad
    both sides, as the WRN paper does.

    Args:
        depth: Number of layers with weights on the longest path, 6n + 4 with n >= 1.
        widen_factor: W >= 1.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        shortcut: What a block that changes the number of channels adds its output to.
        extra_skips: Add the input of each group to its output, and the images to that of the last, pooled and padded
            to fit: AutoAugment's network, to which the release has a flag. They have no parameters.
        dropout: Probability, in [0, 1), of zeroing an activation between the two convolutions of a block.
        norm: Batch normalisation, or none: the network of the SAM paper's section 4.2, which measures Hessians, of
            which nothing more is said. The second convolution of each of n blocks then starts smaller by sqrt(n), so
            that activations do not grow with depth (Zhang et al., 2019, arXiv:1901.09321).

    Raises:
        ValueError: An argument is outside its domain.

    References:
        Zagoruyko and Komodakis (2016), arXiv:1605.07146, Table 1 and section 2.4 for dropout; google-research/sam,
        ``sam_jax/models/wide_resnet.py``.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int,
        in_channels: int,
        *,
        shortcut: Shortcut = "pool-pad",
        extra_skips: bool = False,
        dropout: float = 0.0,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 with n >= 1, got {depth}")
        if widen_factor < 1:
            raise ValueError(f"widen_factor must be >= 1, got {widen_factor}")
        check_choice("shortcut", shortcut, get_args(Shortcut))
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        check_choice("norm", norm, get_args(Norm))
        self.conv = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.blocks = nn.Sequential(*wide_blocks((depth - 4) // 6, widen_factor, shortcut, dropout))
        self.skips = nn.ModuleList(extra_skip_paths(in_channels, widen_factor) if extra_skips else [])
        self.bn: nn.Module = nn.BatchNorm2d(64 * widen_factor)
        self.head = nn.Linear(64 * widen_factor, num_classes)
        he_normal_(self)
        uniform_head_(self.head)
        if norm == "none":
            self._leave_out_norms()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        features = self.conv(images)
        features = self._blocks_with_skips(features, images) if self.skips else self.blocks(features)
        features = F.relu(self.bn(features))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits

    def _leave_out_norms(self) -> None:
        self.bn = nn.Identity()
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, WideBlock)
                block.bn1, block.bn2 = nn.Identity(), nn.Identity()
                block.conv2.weight.div_(math.sqrt(len(self.blocks)))

    def _blocks_with_skips(self, features: Tensor, images: Tensor) -> Tensor:
        blocks_per_group = len(self.blocks) // 3
        for group in range(3):
            group_input = features
            for block in self.blocks[group * blocks_per_group : (group + 1) * blocks_per_group]:
                features = block(features)
            features = features + self.skips[group](group_input)
        output: Tensor = features + self.skips[3](images)
        return output


class WideBlock(nn.Module):
    """Pre-activation block: ``shortcut(x) + conv2(dropout(relu(bn2(conv1(relu(bn1(x)))))))``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
        shortcut: Maps the input to the shape of the output.
        activates_shortcut: The shortcut takes ``relu(bn1(x))`` in place of ``x``.
        dropout: Probability of zeroing an activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module,
        *,
        activates_shortcut: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.bn1: nn.Module = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.shortcut = shortcut
        self.activates_shortcut = activates_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        activated = F.relu(self.bn1(x))
        residual = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(activated)))))
        output: Tensor = self.shortcut(activated if self.activates_shortcut else x) + residual
        return output


def shortcut_path(shortcut: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the shortcut of one block: the identity where the number of channels stays, else ``shortcut``."""
    if in_channels == out_channels:
        return nn.Identity()
    if shortcut == "pool-pad":
        return PoolPad(stride, out_channels - in_channels)
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def extra_skip_paths(in_channels: int, widen_factor: int) -> list[PoolPad]:
    """Return what leads around each of the three groups, and around all of them from the images on."""
    widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
    around_groups = [PoolPad(stride, widths[i + 1] - widths[i]) for i, stride in enumerate((1, 2, 2))]
    return [*around_groups, PoolPad(4, widths[-1] - in_channels)]


def wide_blocks(blocks_per_group: int, widen_factor: int, shortcut: Shortcut, dropout: float) -> list[WideBlock]:
    """Return the blocks of all three groups, first to last."""
    blocks: list[WideBlock] = []
    channels = 16
    for width, group_stride in ((16 * widen_factor, 1), (32 * widen_factor, 2), (64 * widen_factor, 2)):
        for index in range(blocks_per_group):
            stride = group_stride if index == 0 else 1
            # The paper activates before the split wherever the width changes, the release in the first block alone.
            activates = not blocks if shortcut == "pool-pad" else channels != width
            path = shortcut_path(shortcut, channels, width, stride)
            blocks.append(WideBlock(channels, width, stride, path, activates_shortcut=activates, dropout=dropout))
            channels = width
    return blocks
