"""Classify images: the most probable classes of each, by a network of any stage.

    python predict.py photo.jpg
    python predict.py folder/ other.png --model checkpoints/int8.onnx --top 1 --json

in:  image files of any size and format that Pillow reads, or folders of them; a network: .pth, .nnz
     or .onnx (default: checkpoints/compressed.nnz, else the latest stage in checkpoints/, else the
     published release/mobilenetv2-cifar10.nnz, if no --run-dir is named)
out: a line per image (or a JSON object) on the standard output

The middle square of an image is scaled to 32x32, antialiased, the size that the network was trained
on; transparent pixels become white. JPEGs of 100 megapixels and more are scaled down as they are
decoded. From folders and their subfolders, all files with the ending of a picture (.jpg, .png and
others) are taken, but those whose name begins with a dot. HEIC needs the package pillow-heif. For
an image that cannot be read there is one line on the standard error, the others are still
classified, and the exit code is 1. Probabilities are the softmax of the logits: over the network's
classes, they add up to 1 whatever is in the picture.
"""

import dataclasses
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib import checkpoint, config, devices, pictures, runtime
from lib.config import UserError, flag
from lib.files import printable

BATCH = 128  # images in memory at once
MEGA = 1_000_000
MEGAPIXELS = 210  # phones take 200; a small file of more may have been made to exhaust the memory
LARGE = 100 * MEGA  # pixels of JPEGs that the decoder scales down


@dataclasses.dataclass
class Settings:
    images: list[str] = config.files("image files, or folders of them")
    model: str | None = flag(None, "the network; default: see above")
    top: int = flag(3, "classes per image, the most probable first", least=1)
    json: bool = flag(False, "print one JSON object per image, for machines")
    max_megapixels: int = flag(
        MEGAPIXELS, "pixels, in millions, of an image that is decoded: more can exhaust memory",
        least=1,
    )  # fmt: skip
    assume_downsample: int | None = flag(
        None, "strides of a model that is a plain state dict: see eval.py --help",
        choices=(4, 8, 16, 32),
    )  # fmt: skip
    run_dir: str = flag(".", "folder that holds checkpoints/, logs/ and plots/")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")

    def __post_init__(self):
        if not self.images:
            raise ValueError("name an image file or a folder of them")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    paths, unread = [], 0
    for name in cfg.images:
        found = images_in(Path(name))
        if not found:
            unread += refused(name, "a folder without images")
        paths += found
    asked = len(paths) + unread
    file = cfg.model or latest(Path(cfg.run_dir) / "checkpoints")
    source = runtime.load(file, cfg.assume_downsample)
    device = devices.choose(cfg.device)
    network = runtime.network(source, device)
    classes = source.class_names()
    source.check_classes(classes)
    for start in range(0, len(paths), BATCH):
        images, names = [], []
        for path in paths[start : start + BATCH]:
            try:
                image, note = read(path, cfg.max_megapixels)
                images.append(torch.from_numpy(image))
                names.append(str(path))
                if note:
                    print(f"predict.py: {printable(str(path))}: {note}", file=sys.stderr)
            except Exception as error:  # Pillow's decoders raise whatever they please
                unread += refused(path, reason_of(error))
        if images:
            batch = torch.stack(images).to(device)
            if (source.quantization or {}).get("method") == "reference":
                # Its scales come from the batch: an answer would depend on the other pictures.
                logits = torch.cat([network(image[None]) for image in batch])
            else:
                logits = network(batch)
            if not logits.isfinite().all():
                raise UserError(f"{file} answers with NaN or infinite logits")
            for name, row in zip(names, logits.softmax(1).cpu(), strict=True):
                print(shown(name, row, classes, cfg), flush=True)
    if unread:
        raise UserError(f"{unread} of {asked} images could not be read")


def images_in(path: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders (see lib.pictures.in_folder), or else
    the path itself."""
    return pictures.in_folder(path) if path.is_dir() else [path]


def refused(path: str | Path, why: str) -> int:
    """Print why there is no answer for a path; return 1, to be counted."""
    print(f"predict.py: {printable(str(path))}: {why}", file=sys.stderr)
    return 1


def latest(folder: Path) -> Path:
    """Return the file of the latest stage in a run's folder, or the published one."""
    files = [folder / name for name in reversed(checkpoint.CHAIN)]
    if folder == Path("checkpoints") and checkpoint.RELEASE.is_file():  # no other run was named
        files.append(checkpoint.RELEASE)
    return next((file for file in files if file.is_file()), files[0])  # loading says what is wrong


def read(path: Path, max_megapixels: int = MEGAPIXELS) -> tuple[np.ndarray, str]:
    """Read an image as uint8 (3, 32, 32); return it with a note on what had to be assumed, or "".

    Raises ValueError for grey levels outside of all usual ranges and for more pixels than are
    allowed, and whatever Pillow raises.
    """
    note = ""
    limit = pictures.pixel_limit(max_megapixels * MEGA)
    with limit, warnings.catch_warnings(action="ignore"), pictures.open_image(path) as image:
        if image.width * image.height >= LARGE:
            image.draft(None, (8 * 32, 8 * 32))  # of JPEGs alone: to 1/8 of the sides or less
        image = pictures.turned(image)
        if image.mode == "F" or image.mode.startswith("I"):  # grey levels of more than 8 bits
            values = np.asarray(image)
            levels, note = grey_levels(values)
            if isinstance(transparent := image.info.get("transparency"), int):
                levels[values == transparent] = 255
            image = Image.fromarray(levels)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.convert("RGB").crop((left, top, left + side, top + side))
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), note


def grey_levels(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Convert grey levels of any type to uint8; return them with a note on the assumed range.

    A file does not say whether its levels are 12-bit numbers in 16 bits, or floats from 0 to 1. So
    the range is the smallest usual one that holds them: 0 to 1 for floats; 8, 12, 16 or 31 bits.
    The note is "" for 16-bit numbers that need all 16 bits, whose range is certain.
    Raises ValueError for values outside of all of these ranges.
    """
    is_float = values.dtype.kind == "f"
    ranges = [1] * is_float + [2**8 - 1, 2**12 - 1, 2**16 - 1] + [2**31 - 1] * (not is_float)
    low, high = values.min(), values.max()
    top = next((top for top in ranges if high <= top), None)
    if top is None or not low >= 0:  # NaN compares as neither
        raise ValueError(f"its greys lie between {low} and {high}, in no usual range")
    levels = np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)
    declared = values.dtype.itemsize == 2 and top == 2**16 - 1
    return levels, "" if declared else f"its greys, up to {high}, are taken to be of 0 to {top}"


def reason_of(error: Exception) -> str:
    """Say why an image could not be read."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, Image.DecompressionBombError):
        size = int(re.search(r"\d+", str(error))[0]) / MEGA
        return (f"has {size:.0f} megapixels, more than --max-megapixels allows, since a small file "
                "can be made to exhaust the memory: allow more if you trust it")
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not an image in a format that is read here"
    return f"cannot be read ({config.reason(error)})"


def shown(name: str, row: torch.Tensor, classes, cfg) -> str:
    """Return the line of an image, valid UTF-8. row: its probabilities, (classes,)."""
    best = row.topk(min(cfg.top, len(row)))
    pairs = [(classes[i], p) for p, i in zip(*map(torch.Tensor.tolist, best), strict=True)]
    if cfg.json:
        name = name.encode("utf-8", "backslashreplace").decode()  # JSON has no lone surrogates
        return json.dumps({"file": name, "top": [{"class": c, "probability": p} for c, p in pairs]})
    return f"{printable(name)}  " + "  ".join(f"{printable(c)} {p:.1%}" for c, p in pairs)


if __name__ == "__main__":
    config.run(main)
