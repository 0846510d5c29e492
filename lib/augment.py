"""Crop, flip and Cutout of whole batches: uint8 images (n, 3, 32, 32), on any device.

Drawing is separate from applying: `draw_*` return CPU tensors with first dimension n, so the same
generator gives the same images on every device, and a data-parallel process can draw for the whole
global batch and apply its own part.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # pixels
PIXELS = SIDE * SIDE
PADDING = 4  # pixels on each side, as usual for CIFAR (He et al. 2016, section 4.2)

# The training set's mean colour, rounded (0.4914, 0.4822, 0.4465 of 255). In the original, Cutout's
# hole is zero *after* normalization; this colour before it is within half a level of that.
MEAN_COLOUR = (125, 123, 114)
HOLE = 16  # side of the square of cutout, in pixels: that of the paper for CIFAR-10


def move(params: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it: a plain `.to` would empty CUDA's queue."""
    if device.type == "cuda":
        return params.pin_memory().to(device, non_blocking=True)
    return params.to(device)


def remap(images: Tensor, sources: Tensor, fill: int) -> Tensor:
    """Copy every output pixel from an input pixel of the same image and channel.

    sources: int64 (n, 1024), the flat input position for each output position; 1024 for `fill`.
    """
    n, channels = images.shape[:2]
    flat = F.pad(images.reshape(n, channels, PIXELS), (0, 1), value=fill)
    return flat.gather(2, sources[:, None].expand(-1, channels, -1)).view_as(images)


def source_position(y: Tensor, x: Tensor) -> Tensor:
    """Return flat positions for `remap` from coordinates (int64, any shape); 1024 if outside."""
    inside = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    return torch.where(inside, y * SIDE + x, PIXELS)


def draw_crop_flip(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw crop, (n, 2): rows and columns to skip in the padded image, 0 to 8; flip, (n,): 1
    mirrors."""
    return {
        "crop": torch.randint(2 * PADDING + 1, (n, 2), generator=generator),
        "flip": torch.randint(2, (n,), generator=generator),
    }


@cache
def _crop_flip_sources(device: torch.device) -> Tensor:
    """Return the sources for `remap` of every crop offset, plain and flipped: (9 * 9 * 2, 1024)."""
    offset = torch.arange(2 * PADDING + 1) - PADDING
    y = (offset[:, None] + torch.arange(SIDE)).view(-1, 1, 1, SIDE, 1)
    x = offset[:, None] + torch.arange(SIDE)
    x = torch.stack([x, x.flip(1)], 1).view(1, -1, 2, 1, SIDE)
    return source_position(*torch.broadcast_tensors(y, x)).reshape(-1, PIXELS).to(device)


def crop_flip(images: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Cut a 32x32 window out of each image padded by 4 zeros per side; mirror it if flip is 1."""
    dy, dx = params["crop"].unbind(1)
    row = (dy * (2 * PADDING + 1) + dx) * 2 + params["flip"]
    return remap(images, _crop_flip_sources(images.device)[move(row, images.device)], fill=0)


def draw_cutout(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw hole, (n, 2): row and column of the hole's centre, uniform over the image."""
    return {"hole": torch.randint(SIDE, (n, 2), generator=generator)}


def cutout(images: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Return the images with one square each filled (DeVries and Taylor 2017, section 3).

    images: uint8 (n, 3, 32, 32). params: those of `draw_cutout`. The square covers rows and columns
    centre - 8 to centre + 7, less what lies outside the image.
    """
    centre = move(params["hole"], images.device)
    from_edge = torch.arange(SIDE, device=images.device) - (centre[..., None] - HOLE // 2)
    y, x = ((from_edge >= 0) & (from_edge < HOLE)).unbind(1)
    hole = (y[:, None, :, None] & x[:, None, None, :]).byte()
    # Products of bytes: torch.where is 10 times slower on the CPU for uint8.
    return images * (1 - hole) + _mean_colour(images.device) * hole


@cache
def _mean_colour(device: torch.device) -> Tensor:
    """Return CIFAR-10's mean colour as uint8 (1, 3, 1, 1) on a device, where it stays."""
    return torch.tensor(MEAN_COLOUR, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
