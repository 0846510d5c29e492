"""Crop, flip and Cutout of whole batches: uint8 images (N, 3, 32, 32), on any device.

What is drawn is separate from what is done: `draw_*` return CPU tensors with first dimension n,
so the same generator gives the same images on every device, and a data-parallel rank may draw
for the whole global batch and apply its own slice.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # pixels
PIXELS = SIDE * SIDE
PADDING = 4  # pixels a side, the usual CIFAR crop (He et al. 2016, section 4.2)

# The training set's mean colour, rounded (0.4914, 0.4822, 0.4465 of 255). Cutout's hole is zero
# *after* normalization in the original; this grey, before it, is within half a level of that.
MEAN_COLOUR = (125, 123, 114)


def move(params: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a plain `.to` would let CUDA's queue run dry."""
    if device.type == "cuda":
        return params.pin_memory().to(device, non_blocking=True)
    return params.to(device)


def remap(images: Tensor, sources: Tensor, fill: int) -> Tensor:
    """Every output pixel copied from an input pixel of the same image and channel.

    sources: (N, 1024) int64, the flat input position for each output position; 1024 for `fill`.
    """
    n, channels = images.shape[:2]
    flat = F.pad(images.reshape(n, channels, PIXELS), (0, 1), value=fill)
    return flat.gather(2, sources[:, None].expand(-1, channels, -1)).view_as(images)


def source_position(y: Tensor, x: Tensor) -> Tensor:
    """Flat positions for `remap` from coordinates (int64, any shape), 1024 where outside."""
    inside = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    return torch.where(inside, y * SIDE + x, PIXELS)


def draw_crop_flip(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """crop: (n, 2) rows and columns to skip in the padded image, 0..8; flip: (n,) 0 or 1."""
    return {
        "crop": torch.randint(2 * PADDING + 1, (n, 2), generator=generator),
        "flip": torch.randint(2, (n,), generator=generator),
    }


@cache
def _crop_flip_sources(device: torch.device) -> Tensor:
    """(9 * 9 * 2, 1024): the sources of every crop offset, plain and flipped."""
    offset = torch.arange(2 * PADDING + 1) - PADDING
    y = (offset[:, None] + torch.arange(SIDE)).view(-1, 1, 1, SIDE, 1)
    x = offset[:, None] + torch.arange(SIDE)
    x = torch.stack([x, x.flip(1)], 1).view(1, -1, 2, 1, SIDE)
    return source_position(*torch.broadcast_tensors(y, x)).reshape(-1, PIXELS).to(device)


def crop_flip(images: Tensor, params: dict[str, Tensor]) -> Tensor:
    """A 32x32 window of the image padded by 4 zeros a side, then mirrored where flip is 1."""
    dy, dx = params["crop"].unbind(1)
    row = (dy * (2 * PADDING + 1) + dx) * 2 + params["flip"]
    return remap(images, _crop_flip_sources(images.device)[move(row, images.device)], fill=0)


def draw_cutout(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """hole: (n, 2) row and column of the hole's centre, uniform over the image."""
    return {"hole": torch.randint(SIDE, (n, 2), generator=generator)}


def cutout(
    images: Tensor,
    params: dict[str, Tensor],
    size: int = 16,
    fill: tuple[int, int, int] = MEAN_COLOUR,
) -> Tensor:
    """One hole of size x size pixels, clipped at the border (DeVries & Taylor 2017, section 3).

    16 pixels is the paper's choice for CIFAR-10. The hole spans [centre - 8, centre + 8).
    """
    centre = move(params["hole"], images.device)
    from_edge = torch.arange(SIDE, device=images.device) - (centre[..., None] - size // 2)
    y, x = ((from_edge >= 0) & (from_edge < size)).unbind(1)
    hole = (y[:, None, :, None] & x[:, None, None, :]).byte()
    # Products of bytes: torch.where is 10 times slower on the CPU for uint8.
    return images * (1 - hole) + _colour(fill, images.device) * hole


@cache
def _colour(fill: tuple[int, int, int], device: torch.device) -> Tensor:
    return torch.tensor(fill, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
