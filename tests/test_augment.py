"""lib/augment.py and autoaugment.py against PIL, torchvision and slow references."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms import functional as pil
from torchvision.transforms.autoaugment import _apply_op

import autoaugment
from autoaugment import BINS, IDENTITY, NAMES, POLICIES, augmentation, decode, encode, magnitude
from lib import augment, data

LEVELS = ("none", "light", "cutout", "auto")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Many short kernels: on a busy machine their threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, (n, 3, 32, 32), dtype=torch.uint8, generator=seeded())


def smooth(n: int) -> torch.Tensor:
    """Waves of different lengths, with saturated highlights and shadows."""
    y, x = torch.arange(32.0)[:, None], torch.arange(32.0)
    k = torch.arange(1.0, 3 * n + 1).view(n, 3, 1, 1)
    waves = 128 + 150 * torch.sin(x / (3 + k % 5) + k) * torch.cos(y / (4 + k % 7))
    return waves.clamp(0, 255).byte()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Noise, smooth and narrow images, and those whose histograms are special cases."""
    share = torch.linspace(0.005, 0.995, 12).view(-1, 1, 1, 1)
    two_levels = (torch.rand(12, 3, 32, 32, generator=seeded()) < share).byte() * 250
    flat = torch.tensor([0, 77, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    return torch.cat([noise(12), smooth(12), noise(6, 90, 140), noise(4, 0, 3), two_levels, flat])


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def by_torchvision(image: Image.Image, code: int) -> Image.Image:
    if code == IDENTITY:
        return image
    name, step, sign = decode(code)
    nearest, grey = InterpolationMode.NEAREST, [128] * 3
    return _apply_op(image, name, torchvision_magnitude(name, step, sign), nearest, grey)


def torchvision_magnitude(name: str, step: int, sign: int) -> float:
    space = AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(BINS, (32, 32))
    values, signed = space[name]
    value = values[step].item() if values.ndim else 0.0
    return -value if signed and sign == 0 else value


def test_the_table_is_torchvisions():
    assert AutoAugment(AutoAugmentPolicy.CIFAR10).policies == list(POLICIES)


def test_codes_are_unique_and_decode():
    settings = [(name, step, sign) for name in NAMES for step in range(BINS) for sign in (0, 1)]
    assert [decode(encode(*setting)) for setting in settings] == settings
    assert sorted(encode(*setting) for setting in settings) == list(range(IDENTITY))


@pytest.mark.parametrize("name", NAMES)
def test_operation_equals_pil_at_every_magnitude(name, images):
    pictures = [to_pil(image) for image in images]
    for step in range(BINS):
        for sign in (0, 1):
            assert magnitude(name, step, sign) == torchvision_magnitude(name, step, sign)
            code = encode(name, step, sign)
            codes = torch.tensor([[code, IDENTITY]]).expand(len(images), 2)
            got = autoaugment.apply(images, {"operations": codes})
            want = torch.stack([from_pil(by_torchvision(picture, code)) for picture in pictures])
            assert torch.equal(got, want), (name, step, sign)


def test_autocontrast_equals_pil_for_many_pairs_of_extremes():
    """Its float64 rounding depends on the darkest and the brightest level alone."""
    low, high = torch.randint(256, (2, 1500, 3, 1, 1), generator=seeded()).sort(0).values
    ramp = (torch.arange(1024) // 4).view(32, 32)
    images = torch.minimum(torch.maximum(ramp, low), high).byte()
    got = autoaugment.autocontrast(images, None)
    want = torch.stack([from_pil(pil.autocontrast(to_pil(image))) for image in images])
    assert torch.equal(got, want)


def test_blend_equals_pil_for_every_pair_of_levels():
    level = torch.arange(256, dtype=torch.uint8)
    one, other = level[:, None].expand(256, 256), level.expand(256, 256)
    pictures = [Image.fromarray(level.contiguous().numpy()) for level in (one, other)]
    for step in range(BINS):
        for sign in (0, 1):
            factor = torch.tensor(1 + magnitude("Color", step, sign))
            want = torch.from_numpy(np.array(Image.blend(*pictures, factor.item())))
            got = autoaugment._blend(one[None, None].float(), other[None, None], factor)
            assert torch.equal(got[0, 0], want)


def test_two_operations_apply_in_order():
    images = smooth(300)
    params = autoaugment.draw(len(images), seeded())
    for image, got, (first, second) in zip(
        images, autoaugment.apply(images, params), params["operations"].tolist(), strict=True
    ):
        want = by_torchvision(by_torchvision(to_pil(image), first), second)
        assert torch.equal(got, from_pil(want))


def test_draws_follow_the_table():
    """Chi-square of all pairs of drawn operations against the table's probabilities."""
    expected = {}
    for pair in POLICIES:
        first, second = (
            [(encode(name, step or 0, sign), p / 2) for sign in (0, 1)] + [(IDENTITY, 1 - p)]
            for name, p, step in pair
        )
        for a, p in first:
            for b, q in second:
                expected[a, b] = expected.get((a, b), 0) + p * q / len(POLICIES)
    assert sum(expected.values()) == pytest.approx(1)

    n = 100_000
    drawn = autoaugment.draw(n, seeded())["operations"]
    pairs, counts = drawn.unique(dim=0, return_counts=True)
    seen = {tuple(pair): count for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)}
    possible = {pair: p for pair, p in expected.items() if p > 0}
    assert set(seen) <= set(possible)  # Invert with probability 0 is never drawn
    square = sum((seen.get(pair, 0) - n * p) ** 2 / (n * p) for pair, p in possible.items())
    freedom = len(possible) - 1
    assert abs(square - freedom) < 4 * (2 * freedom) ** 0.5


def test_crops_flips_and_holes_are_uniform():
    params = augmentation("auto").draw(81_000, seeded())
    cells = {
        "crop": (params["crop"] @ torch.tensor([9, 1])).bincount(minlength=81),
        "flip": params["flip"].bincount(minlength=2),
        "hole": (params["hole"] @ torch.tensor([32, 1])).bincount(minlength=1024),
    }
    for counts in cells.values():
        mean, freedom = 81_000 / len(counts), len(counts) - 1
        assert ((counts - mean) ** 2 / mean).sum() < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("level", LEVELS)
def test_slicing_params_slices_the_batch(level):
    images, recipe = noise(200), augmentation(level)
    params = recipe.draw(len(images), seeded())
    assert all(len(value) == 200 and value.device.type == "cpu" for value in params.values())
    whole = recipe.apply(images, params)
    for part in (slice(0, 1), slice(37, 150), slice(150, 200)):
        piece = recipe.apply(images[part], {key: value[part] for key, value in params.items()})
        assert torch.equal(piece, whole[part])


@pytest.mark.parametrize("level", LEVELS)
def test_input_is_unchanged_and_the_seed_decides(level):
    images, recipe = smooth(200), augmentation(level)
    before = images.clone()
    once, again, other = (
        recipe.apply(images, recipe.draw(len(images), seeded(seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(images, before)
    assert once.dtype == torch.uint8 and once.shape == images.shape and once.is_contiguous()
    assert torch.equal(once, again)
    assert torch.equal(once, other) == (level == "none")


def test_auto_is_crop_flip_then_policy_then_hole():
    images = noise(64)
    params = augmentation("auto").draw(len(images), seeded())
    step = autoaugment.apply(augment.crop_flip(images, params), params)
    want = augment.cutout(step, params)
    assert torch.equal(augmentation("auto").apply(images, params), want)


def test_every_crop_and_flip_equals_torchvision():
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = noise(len(offsets))
    got = augment.crop_flip(images, {"crop": offsets[:, :2], "flip": offsets[:, 2]})
    for image, result, (top, left, flip) in zip(images, got, offsets.tolist(), strict=True):
        want = pil.crop(pil.pad(to_pil(image), 4), top, left, 32, 32)
        assert torch.equal(result, from_pil(pil.hflip(want) if flip else want))


def test_every_hole_is_clipped_and_filled_with_the_mean_colour():
    images = noise(1024)
    centres = torch.cartesian_prod(torch.arange(32), torch.arange(32))
    got = augment.cutout(images, {"hole": centres})
    for image, result, (y, x) in zip(images, got, centres.tolist(), strict=True):
        want = image.clone()
        hole = want[:, max(0, y - 8) : y + 8, max(0, x - 8) : x + 8]
        hole[:] = torch.tensor(augment.MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1)
        assert torch.equal(result, want)
    area = (augment.cutout(torch.zeros_like(images), {"hole": centres})[:, 0] > 0).sum((1, 2))
    assert area.min() == 8 * 8 and area.max() == 16 * 16  # centred on a corner, and well inside


def test_the_mean_colour_is_the_data_sets_to_half_a_level():
    for level, mean in zip(augment.MEAN_COLOUR, data.MEAN, strict=True):
        assert abs(level - 255 * mean) <= 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("level", LEVELS)
def test_cuda_gives_the_same_images(level):
    images, recipe = smooth(500), augmentation(level)
    params = recipe.draw(len(images), seeded())
    assert torch.equal(recipe.apply(images.cuda(), params).cpu(), recipe.apply(images, params))


def test_preview_is_drawn(tmp_path, capsys):
    autoaugment.main(["--data", "synthetic", "--run-dir", str(tmp_path)])
    with Image.open(tmp_path / "plots" / "autoaugment.png") as picture:
        assert picture.width > 1000
    assert "25 sub-policies" in capsys.readouterr().out
