"""AutoAugment for CIFAR-10 (Cubuk et al. 2019) on whole batches, on any device; its preview.

    python autoaugment.py [--data PATH] [--run-dir DIR]

out: plots/autoaugment.png, what each operation and each sub-policy does. Training uses
     `augmentation(level)`.

The specification is torchvision's `AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[128] * 3)` on PIL
images: the same 25 sub-policies, 10-bin magnitudes and NEAREST resampling, and every operation
gives PIL's pixels exactly (tests/test_augment.py, with Pillow 13.0.0 on x86-64).

Image by image this would be the slowest part of training. Here the images with the same operation
are gathered, changed together and put back: see benchmarks/augment.py.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lib import augment, config, data, plots
from lib.config import flag

# (operation, probability, magnitude bin) twice: Cubuk et al. 2019, table 7, as torchvision has it.
POLICIES = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)

BINS = 10
GREY = 128  # the level of pixels that a geometric operation takes from outside of the image


def magnitude(name: str, step: int, sign: int) -> float:
    """Return the magnitude of an operation at bin `step`, 0 to 9.

    sign: 0 (negative) or 1 (positive). The bins are torchvision's for 32x32 images, float32
    rounding included.
    """
    if name == "Posterize":  # bits kept
        return (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)[step]
    if name == "Solarize":  # levels from this one on are inverted
        return torch.linspace(255, 0, BINS)[step].item()
    top = {
        "ShearX": 0.3,  # columns per row
        "ShearY": 0.3,  # rows per column
        "TranslateX": 150 / 331 * augment.SIDE,  # pixels
        "TranslateY": 150 / 331 * augment.SIDE,
        "Rotate": 30,  # degrees, counter-clockwise
        "Brightness": 0.9,  # change of the blend factor, which is 1 for the image as it is
        "Color": 0.9,
        "Contrast": 0.9,
        "Sharpness": 0.9,
    }.get(name, 0)
    return torch.linspace(0, top, BINS)[step].item() * (1 if sign else -1)


# The operations: from images (n, 3, 32, 32) uint8 and one amount per image, (n,) float32, to new
# images. The function `amount` below says what the amount of each operation is.


def warp(images: Tensor, amount: Tensor) -> Tensor:
    """Shear, translate or rotate: move pixels without changing their values."""
    return augment.remap(images, _warp_sources(images.device)[amount.long()], GREY)


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with black."""
    return _blend(0, images, amount)


def color(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with the image in grey."""
    return _blend(_luma(images).float(), images, amount)


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with the image's mean grey level."""
    total = _luma(images).sum((1, 2, 3), keepdim=True)
    mean = (total + augment.PIXELS // 2) // augment.PIXELS  # rounded, as in ImageEnhance
    return _blend(mean.float(), images, amount)


def sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """Blend with PIL's SMOOTH filter, [1 1 1; 1 5 1; 1 1 1] / 13, which leaves the border."""
    image = images.float()
    rows = image[:, :, :-2] + image[:, :, 1:-1] + image[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = image.clone()
    # A sum of integers over 13, rounded: never within 1/26 of a tie, so float32 is exact.
    smooth[:, :, 1:-1, 1:-1] = ((box + 4 * image[:, :, 1:-1, 1:-1]) / 13 + 0.5).floor()
    return _blend(smooth, images, amount)


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """Keep the bits of the mask `amount`."""
    return images & amount.byte().view(-1, 1, 1, 1)


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Invert the levels of `amount` or more."""
    inverted = (images >= amount.byte().view(-1, 1, 1, 1)).byte()
    return images ^ inverted * 255  # torch.where is 20 times slower on the CPU for uint8


def invert(images: Tensor, amount: Tensor) -> Tensor:
    """Invert all levels."""
    return 255 - images


def autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    """Stretch the levels of each channel to 0..255."""
    flat = images.flatten(2)
    row = flat.amin(2).long() * 256 + flat.amax(2)
    return _look_up(_stretch_tables(images.device)[row], images)


def equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Flatten the histogram of each channel, in integers like ImageOps.equalize."""
    flat = images.flatten(2).long()
    one = torch.ones((), dtype=torch.int32, device=images.device).expand_as(flat)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, flat, one)
    below = counts.cumsum(2, dtype=torch.int32) - counts
    last = counts.gather(2, flat.amax(2, keepdim=True))  # pixels of the brightest level
    step = (augment.PIXELS - last) // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255).byte()
    unchanged = torch.arange(256, dtype=torch.uint8, device=images.device)
    return _look_up(torch.where(step == 0, unchanged, table), images)


def _blend(degenerate: Tensor | int, images: Tensor, factor: Tensor) -> Tensor:
    """Blend like PIL's Image.blend (libImaging/Blend.c): float32, clipped, then truncated.

    Multiplication and addition are separate kernels: a fused one would round differently from PIL.
    """
    difference = images.float() - degenerate
    return difference.mul_(factor.view(-1, 1, 1, 1)).add_(degenerate).clamp_(0, 255).byte()


def _luma(images: Tensor) -> Tensor:
    """Return grey levels, int32 (n, 1, 32, 32), like PIL's conversion to "L": ITU-R 601 in 16-bit
    fixed point."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def _look_up(tables: Tensor, images: Tensor) -> Tensor:
    """Replace levels by tables, uint8 (n, 3, 256): the new level for each old one, per image and
    channel."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


@cache
def _stretch_tables(device: torch.device) -> Tensor:
    """Return autocontrast's table for each (darkest, brightest) pair: uint8 (65536, 256), 16 MB.

    ImageOps.autocontrast truncates float64, which in a few cases is just below the integer of exact
    arithmetic. Tables made on the CPU have the same cases on devices without float64 too.
    """
    level = torch.arange(256, dtype=torch.float64)
    tables = level.byte().repeat(256, 256, 1)  # a single level stays as it is
    for low in range(255):
        scale = level[255] / (level[low + 1 :, None] - low)  # 255 / tensor would round twice
        tables[low, low + 1 :] = (level * scale + -low * scale).clamp_(0, 255).byte()
    return tables.view(-1, 256).to(device)


@cache
def _warp_sources(device: torch.device) -> Tensor:
    """Return the sources for augment.remap of each code of `warp`: int64 (100, 1024).

    They are those of PIL's affine transform with NEAREST, in 16.16 fixed point
    (libImaging/Geometry.c).
    """
    x, y = torch.arange(augment.SIDE), torch.arange(augment.SIDE)[:, None]
    sources = []
    for code in range(encode("Brightness", 0, 0)):
        a, b, c, d, e, f = (
            math.floor(value * 65536 + 0.5) for value in _inverse_matrix(*decode(code))
        )
        at_x, at_y = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
        sources.append(augment.source_position(at_y, at_x).flatten())
    return torch.stack(sources).to(device)


def _inverse_matrix(name: str, step: int, sign: int) -> tuple[float, ...]:
    """Return (a, b, c, d, e, f): output pixel (x, y) comes from (a x + b y + c, d x + e y + f).

    The centre of a pixel lies at its integer position + 0.5, which c and f include.
    """
    m = magnitude(name, step, sign)
    a, b, c, d, e, f = 1, 0, 0, 0, 1, 0
    if name == "ShearX":
        b = m
    elif name == "ShearY":
        d = m
    elif name == "TranslateX":
        c = -int(m)  # whole pixels, as torchvision truncates
    elif name == "TranslateY":
        f = -int(m)
    else:  # Rotate, about the image's centre
        sine, cosine, centre = math.sin(math.radians(m)), math.cos(math.radians(m)), 16
        a, b, d, e = cosine, -sine, sine, cosine
        c, f = centre - centre * (a + b), centre - centre * (d + e)
    return a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2


OPERATIONS = {
    "ShearX": warp, "ShearY": warp, "TranslateX": warp, "TranslateY": warp, "Rotate": warp,
    "Brightness": brightness, "Color": color, "Contrast": contrast, "Sharpness": sharpness,
    "Posterize": posterize, "Solarize": solarize,
    "AutoContrast": autocontrast, "Equalize": equalize, "Invert": invert,
}  # fmt: skip
NAMES, FUNCTIONS = list(OPERATIONS), list(dict.fromkeys(OPERATIONS.values()))
IDENTITY = len(NAMES) * BINS * 2  # the code of "not applied"


def encode(name: str, step: int, sign: int) -> int:
    """Return one number for an operation at a magnitude bin with a sign."""
    return (NAMES.index(name) * BINS + step) * 2 + sign


def decode(code: int) -> tuple[str, int, int]:
    """Return the name, the magnitude bin and the sign of a number made by `encode`."""
    return NAMES[code // 2 // BINS], code // 2 % BINS, code % 2


def amount(code: int) -> float:
    """Return what the operation's function takes for a code; it will be rounded to float32."""
    name, step, sign = decode(code)
    if OPERATIONS[name] is warp:
        return code  # the row of its table
    value = magnitude(name, step, sign)
    if name == "Posterize":
        return 256 - 2 ** (8 - value)  # the mask of the bits that are kept
    if name == "Solarize":
        return math.ceil(value)  # levels are integers
    return 1 + value  # a blend factor; the other operations ignore it


@cache
def _tables() -> tuple[Tensor, Tensor]:
    """Return for each code its position in FUNCTIONS (their number for IDENTITY) and its amount."""
    groups = [FUNCTIONS.index(OPERATIONS[decode(code)[0]]) for code in range(IDENTITY)]
    amounts = [amount(code) for code in range(IDENTITY)]
    return torch.tensor([*groups, len(FUNCTIONS)]), torch.tensor([*amounts, 0.0])


def draw(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw {"operations": int64 (n, 2)}: the codes of the first and second operation per image.

    Each image has its own sub-policy, and each of its two operations its own chance and sign.
    """
    policy = torch.randint(len(POLICIES), (n,), generator=generator)
    chance = torch.rand(n, 2, generator=generator)
    sign = torch.randint(2, (n, 2), generator=generator)
    return {"operations": operations(policy, chance, sign)}


def operations(policy: Tensor, chance: Tensor, sign: Tensor) -> Tensor:
    """Return the codes (n, 2) of the two operations of sub-policies (n,).

    chance: (n, 2) in [0, 1); an operation happens if it is less than its probability.
    sign: (n, 2) of 0 or 1.
    """
    probability = torch.tensor([[p for _, p, _ in pair] for pair in POLICIES])
    code = [[encode(name, step or 0, 0) for name, _, step in pair] for pair in POLICIES]
    return torch.where(chance < probability[policy], torch.tensor(code)[policy] + sign, IDENTITY)


def apply(images: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Return new images, each changed by its two operations.

    images: uint8 (n, 3, 32, 32) on any device. params: from `draw`, on the CPU.
    """
    images = images.clone()
    group_of, amount_of = _tables()
    for codes in params["operations"].unbind(1):
        # Sorted and counted on the CPU, so that nothing is read back from the device.
        groups = group_of[codes]
        order = groups.argsort()
        sizes = groups.bincount(minlength=len(FUNCTIONS) + 1).tolist()
        indices = augment.move(order, images.device).split(sizes)
        amounts = augment.move(amount_of[codes[order]], images.device).split(sizes)
        for function, index, value in zip((*FUNCTIONS, None), indices, amounts, strict=True):
            if function and len(index):
                images[index] = function(images[index], value)
    return images


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images, in this order (see lib.engine.fit for the two methods)."""

    crop_flip: bool = False
    auto: bool = False
    cutout: bool = False

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw what happens to n images: CPU tensors of first dimension n, a row per image."""
        params = {}
        if self.crop_flip:
            params |= augment.draw_crop_flip(n, generator)
        if self.auto:
            params |= draw(n, generator)
        if self.cutout:
            params |= augment.draw_cutout(n, generator)
        return params

    def apply(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Return new images, uint8 (n, 3, 32, 32), on the same device.

        params: the rows from `draw` that belong to these images.
        """
        if self.crop_flip:
            images = augment.crop_flip(images, params)
        if self.auto:
            images = apply(images, params)
        if self.cutout:
            images = augment.cutout(images, params)
        return images


def augmentation(level: str) -> Augmentation:
    """Return the augmentation of a level.

    none: nothing; light: crop and flip; cutout: these and Cutout; auto: crop, flip, AutoAugment and
    Cutout.
    """
    return {
        "none": Augmentation(),
        "light": Augmentation(crop_flip=True),
        "cutout": Augmentation(crop_flip=True, cutout=True),
        "auto": Augmentation(crop_flip=True, auto=True, cutout=True),
    }[level]


@dataclass
class Settings:
    data: str | None = flag(None, config.DATA_HELP)
    run_dir: str = flag(".", "folder that holds plots/")


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    path = Path(cfg.run_dir) / "plots" / "autoaugment.png"
    preview(data.load(cfg.data).train.images, path)
    print(f"autoaugment: {len(NAMES)} operations, {len(POLICIES)} sub-policies -> {path}")


def preview(images: Tensor, path: Path) -> None:
    """Draw each operation at magnitudes -9 to 9, and each sub-policy with all it can do.

    images: uint8 (n, 3, 32, 32), of which the first 25 are shown, one per row.
    """
    steps = range(-9, 10, 3)
    single = [[encode(name, abs(step), int(step > 0)) for step in steps] for name in NAMES]
    single = torch.tensor([[[code, IDENTITY] for code in row] for row in single])
    single[:, 3] = IDENTITY  # bin 0 would be Posterize to 8 bits, or Invert as in all bins
    heads = [f"{step:+}" if step else "image" for step in steps]

    # At chance 0 an operation happens, at 1 it does not; the two operations share their sign.
    cases = ("image", "1st -", "1st +", "2nd -", "2nd +", "both -", "both +")
    chance = torch.tensor([[1, 1], [0, 1], [0, 1], [1, 0], [1, 0], [0, 0], [0, 0]])
    sign = torch.tensor([0, 0, 1, 0, 1, 0, 1])[:, None].expand(-1, 2)
    policies = torch.arange(len(POLICIES))[:, None].expand(-1, 7)
    pairs = torch.stack([operations(policy, chance, sign) for policy in policies])
    labels = [
        "\n".join(f"{name}{'' if step is None else f' {step}'}, {p:.0%}" for name, p, step in pair)
        for pair in POLICIES
    ]

    def changed(codes: Tensor):
        """Apply codes (rows, columns, 2), each row to one image, as plots.image_tables wants it."""
        rows, columns, _ = codes.shape
        repeated = images[torch.arange(rows) % len(images)].repeat_interleave(columns, 0)
        results = apply(repeated, {"operations": codes.view(-1, 2)})
        return results.view(rows, columns, 3, 32, 32).permute(0, 1, 3, 4, 2).numpy()

    plots.image_tables([
        ("Operations by magnitude bin and sign", changed(single), NAMES, heads),
        ("Sub-policies: operation, bin, probability", changed(pairs), labels, cases),
    ], path)  # fmt: skip


if __name__ == "__main__":
    config.run(main)
