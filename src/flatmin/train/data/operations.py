"""The operations of AutoAugment and RandAugment on a batch, another one on each image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.train.data.crops import cut_out_
from flatmin.train.data.tables import TABLES, as_bytes, grey, looked_up
from flatmin.train.data.warps import FILL, WARPS, inverse_map, warped

OPERATIONS = ("Identity", *WARPS, *TABLES, "Color", "Sharpness", "Cutout")

KINDS = {name: kind for kind, name in enumerate(OPERATIONS)}


@dataclass(frozen=True, eq=False)
class Operations:
    """What is done to each of N images, ``L`` operations one after another; all on the CPU.

    Args:
        kinds: int64 (N, L), places in ``OPERATIONS``.
        magnitudes: float32 (N, L): tangent of a shear, pixels of a translation, degrees of a rotation; the factor of
            Brightness, Contrast, Color and Sharpness, 1 for no change; bits that Posterize keeps; threshold of
            Solarize; what SolarizeAdd adds; side of a Cutout in pixels.
        centres: int64 (N, L, 2), row and column of the centre of a Cutout.
    """

    kinds: Tensor
    magnitudes: Tensor
    centres: Tensor

    def __getitem__(self, images: slice) -> "Operations":
        return Operations(self.kinds[images], self.magnitudes[images], self.centres[images])


def joined(parts: Sequence[Operations]) -> Operations:
    """Put the operations of several batches together."""
    return Operations(
        torch.cat([part.kinds for part in parts]),
        torch.cat([part.magnitudes for part in parts]),
        torch.cat([part.centres for part in parts]),
    )


def transformed(images: Tensor, operations: Operations) -> Tensor:
    """Apply to each image its operations.

    The images that share a kind of arithmetic go through it together. Which they are is known on the CPU, and copied
    without waiting, so that the CPU can run ahead of the device.

    Args:
        images: uint8 (N, H, W, C) with C = 1 or 3, contiguous, on any device.
        operations: Those of N images.

    Returns:
        New uint8 tensor (N, H, W, C).
    """
    result = images.clone()
    for layer in range(operations.kinds.shape[1]):
        kinds = operations.kinds[:, layer]
        for names, apply in FAMILIES:
            members = torch.isin(kinds, torch.tensor([KINDS[name] for name in names])).nonzero().flatten()
            if len(members) > 0:
                on_device = members.to(images.device, non_blocking=True)
                part = Operations(
                    kinds[members, None],
                    operations.magnitudes[members, layer, None],
                    operations.centres[members, layer],
                )
                result[on_device] = apply(result[on_device], part)
    return result


def warp(images: Tensor, operations: Operations) -> Tensor:
    """Shear, translate or rotate each image."""
    height, width = images.shape[1:3]
    pairs = zip(operations.kinds.flatten().tolist(), operations.magnitudes.flatten().tolist(), strict=True)
    maps = [inverse_map(OPERATIONS[kind], magnitude, (height, width)) for kind, magnitude in pairs]
    return warped(images, torch.tensor(maps, dtype=torch.float32).to(images.device, non_blocking=True))


def replace_values(images: Tensor, operations: Operations) -> Tensor:
    """Send the values of each image through its table."""
    tables = torch.empty(len(images), images.shape[3], 256, dtype=torch.uint8, device=images.device)
    magnitudes = operations.magnitudes.flatten().to(images.device, non_blocking=True)
    kinds = operations.kinds.flatten()
    for kind in sorted(set(kinds.tolist())):
        members = (kinds == kind).nonzero().flatten().to(images.device, non_blocking=True)
        table = TABLES[OPERATIONS[kind]](images[members], magnitudes[members])
        tables[members] = table.expand(len(members), images.shape[3], 256)
    return looked_up(images, tables)


def color(images: Tensor, operations: Operations) -> Tensor:
    """``factor v + (1 - factor) grey``, with the luminance of each pixel; nothing happens to grey images."""
    if images.shape[3] == 1:
        return images
    factors = operations.magnitudes.to(images.device, non_blocking=True)[..., None, None]
    return as_bytes(images * factors + (1 - factors) * grey(images)[..., None])


def sharpness(images: Tensor, operations: Operations) -> Tensor:
    """``v + (1 - factor) (smooth - v)``, smooth being the mean with the 8 neighbours, v counted 5 times.

    Pixels at the border stay as they are, and so do images of less than 3 pixels.
    """
    values = images.to(torch.int16)
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = values[:, 1:-1, 1:-1]
    smooth = (sums + 4 * inner + 6) // 13  # rounded to the nearest
    strengths = 1 - operations.magnitudes.to(images.device, non_blocking=True)[..., None, None]
    result = images.clone()
    result[:, 1:-1, 1:-1] = as_bytes(inner + (smooth - inner) * strengths)
    return result


def cut_out(images: Tensor, operations: Operations) -> Tensor:
    """Make a square grey, clipped at the border."""
    lengths = operations.magnitudes.to(images.device, torch.int64, non_blocking=True)
    return cut_out_(images, operations.centres.to(images.device, non_blocking=True), lengths, FILL)


FAMILIES = (
    (WARPS, warp),
    (tuple(TABLES), replace_values),
    (("Color",), color),
    (("Sharpness",), sharpness),
    (("Cutout",), cut_out),
)
