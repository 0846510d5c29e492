"""CIFAR-10, or another set of 32x32 images, as uint8 tensors: the one place where the images, the
classes, the mean and the splits come from. lib/readers.py reads the files.

The whole set is kept on the device (50,000 images are 154 MB), so that batches are made by
indexing: no PIL, no DataLoader, no worker processes.
"""

import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import readers, synthetic
from lib.augment import move
from lib.config import UserError
from lib.readers import HELP

# Per channel, of images in [0, 1]; the report's numbers.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck")  # fmt: skip
SPLIT_SEED = 10  # of the validation split; the same for all runs, to make them comparable
# What `fingerprint` says of the 5,000 images that are held out of CIFAR-10 in its usual order.
CIFAR10_HELD_OUT = 0xA36AE01A
CIFAR10_TEST = 0xFCCCFEF9  # and of its 10,000 test images


@dataclass
class Split:
    """Images, uint8 (n, 3, 32, 32), with their labels, int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(eq=False)  # its tensors have no ==
class Data:
    """A data set in three splits, on one device."""

    source: str  # for the checkpoint, never a path: cifar10, cifar100, synthetic or images (others)
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    held_out: int | None = None  # the fingerprint of val, if it has images

    @property
    def device(self) -> torch.device:
        return self.test.images.device

    def split(self, name: str) -> Split:
        """Return the split `train`, `val` or `test`.

        Raises UserError if it is empty, which only the validation split can be.
        """
        split = getattr(self, name)
        if not len(split):
            raise UserError(
                "there is no validation split: --val-size is 0, here or in the network's training"
            )
        return split

    def provenance(self) -> dict:
        """Return what a checkpoint records of its data.

        Which images were held out is recorded unless they are CIFAR-10's usual ones: it takes room
        in small files.
        """
        usual = self.held_out in (None, CIFAR10_HELD_OUT)
        return {
            "source": self.source, "train": len(self.train), "val_size": len(self.val),
            "test": len(self.test), "split_seed": SPLIT_SEED, "classes": list(self.classes),
        } | ({} if usual else {"held_out": self.held_out})  # fmt: skip


def held_out(provenance: dict) -> int | None:
    """Return the fingerprint of the validation images that a checkpoint's data say; None if they
    do not (plain state dicts, other sets in files of earlier versions)."""
    usual = provenance.get("source") == "cifar10" and provenance.get("val_size") == 5000
    return provenance.get("held_out", CIFAR10_HELD_OUT if usual else None)


def fingerprint(images: Tensor) -> int:
    """Return a number that tells sets of images apart, whatever their order: the sum of their
    CRC-32s, modulo 2^32. images: uint8 (n, 3, 32, 32) on the CPU."""
    return sum(zlib.crc32(image.tobytes()) for image in images.contiguous().numpy()) % 2**32


def names_of(classes: int) -> tuple[str, ...]:
    """Return the names of classes that no file names: CIFAR-10's for ten, else numbers."""
    return CLASSES if classes == len(CLASSES) else tuple(map(str, range(classes)))


def load(
    source: str | None = None, val_size: int | None = None, device="cpu", test_only: bool = False,
    classes: int | None = None,
) -> Data:
    """Read a data set and split it.

    source: a file or folder (see lib/readers.py), `synthetic`, or None for torchvision's download
        of CIFAR-10 to ./data.
    val_size: images held out of the training set, the same number of each class; None: a tenth.
    test_only: the other splits are not needed, and are left empty.
    classes: of the network. With ten, test images alone that name no classes are CIFAR-10's, even
        if some classes have none.
    Raises UserError, with what is there and what to do, if there is no such data.
    """
    if source == "synthetic":
        arrays = readers.Arrays(*synthetic.make(), synthetic.CLASSES, "synthetic")
    else:
        arrays = readers.download(Path("data")) if source is None else readers.read(source)
    train = _checked("training", arrays.x_train, arrays.y_train)
    test = _checked("test", arrays.x_test, arrays.y_test)
    if arrays.names:
        names = arrays.names
    elif test_only and classes == len(CLASSES):
        names = CLASSES
    else:
        names = names_of(_guess_classes(train.labels, test.labels))
    if names == CLASSES and not arrays.source:
        if not arrays.names and not _is_cifar10(source, test.images):
            print(f"{source} names no classes: its ten are taken to be CIFAR-10's, {CLASSES[0]} to "
                  f"{CLASSES[-1]}", file=sys.stderr)  # fmt: skip
        elif arrays.names and fingerprint(test.images) != CIFAR10_TEST:  # CINIC-10, for example
            print(f"{source} has CIFAR-10's classes, but its {len(test):,} test images are not "
                  "those of CIFAR-10; it is called cifar10 all the same", file=sys.stderr)
    if test_only:
        train = Split(train.images[:0], train.labels[:0])
    else:
        _check_labels("training", train.labels, names, all_of_them=True)
    _check_labels("test", test.labels, names, all_of_them=False)
    held = _stratified(train.labels, len(names), 0 if test_only else val_size)
    splits = [Split(train.images[i], train.labels[i]) for i in (~held, held)] + [test]
    kind = arrays.source or ("cifar10" if names == CLASSES else "images")
    held_out = fingerprint(splits[1].images) if held.any() else None
    splits = [Split(s.images.to(device), s.labels.to(device)) for s in splits]
    return Data(kind, names, *splits, held_out)


def _checked(name: str, images: np.ndarray, labels: np.ndarray) -> Split:
    """Make a Split of arrays. Raises UserError unless they are uint8 (n, 32, 32, 3) and n integers
    as labels."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        _refuse(name, f"images are {images.dtype} {images.shape}, not uint8 (n, 32, 32, 3)")
    if labels.shape == (len(images), 1):  # Keras' own files hold a column
        labels = labels[:, 0]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        _refuse(name, f"labels are {labels.dtype} {labels.shape}, not {len(images)} integers")
    return Split(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _refuse(name: str, what: str, kind: str = "CIFAR-10"):
    """Raise the UserError of a set that is not what it should be."""
    raise UserError(f"the {name} set is not {kind}: {what}; {HELP}")


def _is_cifar10(source: str | None, test_images: Tensor) -> bool:
    """Return whether a set is CIFAR-10 by its name, which may be of a part of it, or its images."""
    name = Path(source or "cifar10").name.lower()
    named = re.search(r"cifar[-_]?10(?!\d)", name)
    return bool(named) or fingerprint(test_images) == CIFAR10_TEST


def _guess_classes(*labels: Tensor) -> int:
    """Guess the number of classes of a data set that does not name them: the largest k of the
    splits whose labels are exactly 0 to k - 1. CIFAR-10's ten if there is no such split."""
    numbers = [set(each.tolist()) for each in labels]
    return max((len(n) for n in numbers if n and n == set(range(len(n)))), default=len(CLASSES))


def _check_labels(name: str, labels: Tensor, classes: tuple[str, ...], all_of_them: bool) -> None:
    """Raise UserError unless labels are indices of classes, and there is an image of all of them
    if that is asked for."""
    kind = "CIFAR-10" if classes == CLASSES else f"a set of {len(classes)} classes"
    if not len(labels):
        _refuse(name, "it is empty", kind)
    there, last = labels.unique().tolist(), len(classes) - 1
    if there[0] < 0 or there[-1] > last or all_of_them and len(there) <= last:
        missing = [n for i, n in enumerate(classes) if i not in there]
        missing = f" (none of {', '.join(missing[:3])})" if missing else ""
        _refuse(name, f"labels are {there[:12]}, not 0 to {last}{missing}", kind)


def _stratified(labels: Tensor, classes: int, size: int | None) -> Tensor:
    """Return a mask of `size` images, size / classes of each class, the same in every run.

    size: None for a tenth, rounded down, or less if the smallest class would lose over half.
    """
    smallest = int(torch.bincount(labels, minlength=classes).min())
    if size is None:
        size = min(len(labels) // (10 * classes), smallest // 2) * classes
    if size < 0 or size % classes or size and size // classes >= smallest:
        raise UserError(
            f"--val-size must be a multiple of {classes} and leave some of each class "
            f"(which has {smallest} images here), not {size}"
        )
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = np.flatnonzero(labels.numpy() == label)
        held[rng.permutation(members)[: size // classes]] = True
    return held


def sample(split: Split, count: int, seed: int) -> Tensor:
    """Return `count` normalized images of a split, (count, 3, H, W); which ones depends on the seed
    alone. Fewer if the split has fewer."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return normalize(split.images[order[:count].to(split.images.device)])


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 (n, 3, h, w) to float32 with about zero mean and unit standard deviation per
    channel, in channels-last memory format."""
    mean, std = _moments(images.device)
    x = images.to(torch.float32, memory_format=torch.channels_last)
    return x.div_(255).sub_(mean).div_(std)


@cache
def _moments(device: torch.device) -> tuple[Tensor, ...]:
    """Return MEAN and STD as (1, 3, 1, 1) on a device, where they stay: sending them with every
    batch would wait for the device."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))


def batches(
    split: Split, size: int, augment, seed: int, epoch: int, rank: int = 0, world: int = 1,
    alternate_flip: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled, augmented, normalized batches (images, labels).

    size: images per global batch, of which process `rank` of `world` gets its part. A last
        incomplete batch is left out. Order and augmentation depend on seed and epoch alone, not
        on the device or the number of processes.
    augment: see lib.engine.fit.
    alternate_flip: mirror each image in every second epoch, after a coin toss for the first, and
        not by chance: two epochs see both sides of all images (Jordan 2024, "94% on CIFAR-10 in
        3.29 seconds", section 3.6).
    """
    device = split.images.device
    steps, share = len(split) // size, size // world
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)[: steps * size]
    params = augment.draw(len(order), generator)
    if alternate_flip and "flip" in params:
        coins = torch.Generator().manual_seed(seed)
        first = torch.randint(2, (len(split),), generator=coins)
        params["flip"] = (first[order] + epoch) % 2
    positions = torch.arange(steps * size).view(steps, size)
    mine = positions[:, rank * share : (rank + 1) * share].flatten()  # of every global batch
    order, params = move(order[mine], device), {k: v[mine] for k, v in params.items()}
    chunk = share * max(1, 4096 // share)  # images augmented at a time: bounds the memory
    for start in range(0, len(order), chunk):
        part = slice(start, start + chunk)
        images = augment.apply(split.images[order[part]], {k: v[part] for k, v in params.items()})
        labels = split.labels[order[part]]
        for a in range(0, len(labels), share):
            yield normalize(images[a : a + share]), labels[a : a + share]
