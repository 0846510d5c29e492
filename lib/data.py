"""CIFAR-10 as uint8 tensors: the one place where the images, the mean and the splits come from.

The whole set is kept on the device (50,000 images are 154 MB), so that batches are made by
indexing: no PIL, no DataLoader, no worker processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import synthetic
from lib.augment import move
from lib.config import UserError, reason

# Per channel, of images in [0, 1]; the report's numbers.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck")  # fmt: skip
SPLIT_SEED = 10  # of the validation split; the same for all runs, to make them comparable
HELP = (
    "give --data (make: DATA=) a cifar10.npz in Keras' layout, a folder that holds one or "
    "torchvision's cifar-10-batches-py, or the word synthetic"
)


@dataclass
class Split:
    """Images, uint8 (n, 3, 32, 32), with their labels, int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Data:
    """A data set in three splits, on one device."""

    source: str  # what was read, for the checkpoint: a kind, never a path
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split

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
        """Return what a checkpoint records of its data."""
        return {
            "source": self.source, "train": len(self.train), "val_size": len(self.val),
            "test": len(self.test), "split_seed": SPLIT_SEED, "classes": list(self.classes),
        }  # fmt: skip


def load(source: str | None = None, val_size: int | None = None, device="cpu") -> Data:
    """Read a data set and split it.

    source: a .npz file, a folder, `synthetic`, or None for torchvision's download to ./data.
    val_size: images held out of the training set, the same number of each class; None: a tenth.
    Raises UserError, with what is there and what to do, if there is no such data.
    """
    name, classes = "cifar10", CLASSES
    if source == "synthetic":
        arrays = synthetic.make()
        name, classes = "synthetic", synthetic.CLASSES
    elif source is None:
        arrays = _torchvision(Path("data"), download=True)
    else:
        arrays = _read(Path(source))
    x_train, y_train, x_test, y_test = arrays
    train = _checked("training", x_train, y_train)
    test = _checked("test", x_test, y_test)
    held = _stratified(train.labels, len(train) // 100 * 10 if val_size is None else val_size)
    splits = [Split(train.images[i], train.labels[i]) for i in (~held, held)] + [test]
    return Data(name, classes, *(Split(s.images.to(device), s.labels.to(device)) for s in splits))


def _read(path: Path) -> tuple:
    """Read a .npz or a folder: the arrays x_train, y_train, x_test, y_test."""
    if path.is_file():
        return _npz(path)
    if not path.is_dir():
        raise UserError(f"no data at {path}: {HELP}")
    if (path / "cifar10.npz").is_file():
        return _npz(path / "cifar10.npz")
    if path.name == "cifar-10-batches-py":
        return _torchvision(path.parent, download=False)
    if (path / "cifar-10-batches-py").is_dir():
        return _torchvision(path, download=False)
    names = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise UserError(f"no CIFAR-10 in {path} (found {names}): {HELP}")


def _npz(path: Path) -> tuple:
    """Read the four arrays from a file in Keras' layout."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}: {HELP}")
            return tuple(file[key] for key in keys)
    except UserError:
        raise
    except Exception as error:  # np.load raises whatever zipfile, zlib or its parser does
        raise UserError(f"{path} is not a readable .npz ({reason(error)}): {HELP}") from None


def _torchvision(root: Path, download: bool) -> tuple:
    """Read the four arrays with torchvision, which checks each file's MD5 before unpickling it."""
    from torchvision.datasets import CIFAR10

    try:
        sets = [CIFAR10(root, train=train, download=download) for train in (True, False)]
    except Exception as error:  # URLError, RuntimeError (checksum), OSError, tarfile's
        verb = "downloading CIFAR-10 failed" if download else f"CIFAR-10 in {root} is damaged"
        raise UserError(f"{verb} ({reason(error)}): {HELP}") from None
    return tuple(array for s in sets for array in (s.data, np.asarray(s.targets)))


def _checked(name: str, images: np.ndarray, labels: np.ndarray) -> Split:
    """Make a Split of arrays. Raises UserError unless they are uint8 (n, 32, 32, 3) and n labels
    from 0 to 9, each of them present."""

    def refuse(what: str):
        raise UserError(f"the {name} set is not CIFAR-10: {what}; {HELP}")

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        refuse(f"images are {images.dtype} {images.shape}, not uint8 (n, 32, 32, 3)")
    if labels.shape == (len(images), 1):  # Keras' own files hold a column
        labels = labels[:, 0]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        refuse(f"labels are {labels.dtype} {labels.shape}, not {len(images)} integers")
    if not len(images):
        refuse("it is empty")
    if sorted(set(labels.tolist())) != list(range(10)):
        refuse(f"labels are {sorted(set(labels.tolist()))[:12]}, not 0 to 9")
    return Split(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _stratified(labels: Tensor, size: int) -> Tensor:
    """Return a mask of `size` images, size / 10 of each class, the same in every run."""
    smallest = int(torch.bincount(labels).min())
    if size < 0 or size % 10 or size // 10 >= smallest:
        raise UserError(
            f"--val-size must be a multiple of 10 and leave some of each class "
            f"(which has {smallest} images here), not {size}"
        )
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = np.flatnonzero(labels.numpy() == label)
        held[rng.permutation(members)[: size // 10]] = True
    return held


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
