"""Read sets of 32x32 images in the layouts that people have, as arrays; lib/data.py checks them.

    cifar10.npz                  x_train, y_train, x_test, y_test, as Keras has them
    cifar-10-batches-py/         torchvision's folder, under any name, or cifar-10-python.tar.gz;
                                 cifar-100-python/ too (its fine labels)
    *.parquet                    Hugging Face's: files that begin with train and test
    train/cat/x.png, test/...    one folder per class

Nothing is unpickled freely: batches are read by an unpickler that knows arrays and plain types.
"""

import contextlib
import hashlib
import io
import json
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import pictures
from lib.config import UserError, reason
from lib.files import printable, sha256_of

HELP = (
    "give --data (make: DATA=) a cifar10.npz in Keras' layout, torchvision's cifar-10-batches-py, "
    "its .tar.gz, Hugging Face's parquet files, train/CLASS and test/CLASS with 32x32 pictures, a "
    "folder that holds one of these, or the word synthetic"
)
MEMBERS = r"data_batch_\d|test_batch|batches\.meta|train|test|meta"
ARRAYS_LIMIT = 1 << 30  # bytes of all arrays in a compressed file: CIFAR-10's have 184 MB
PICTURE_RATIO = 16  # bytes of pixels per byte of a parquet file, at most: encoded pictures have 2
MEMBER_LIMIT = 1 << 28  # bytes of a file in a .tar.gz: CIFAR-100's largest has 155 MB
NO_IMAGES, NO_LABELS = np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int64)


@dataclass
class Arrays:
    """A set as it was read: images uint8 (n, 32, 32, 3) and integer labels (n,), if it is whole."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    names: tuple[str, ...] | None = None  # of the classes; None: the files do not say
    source: str | None = None  # cifar100 or synthetic; None: what the classes say


def read(name: str) -> Arrays:
    """Read a set from a file or folder. Raises UserError, with what is there and what to do."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"no data at {name} ({reason(error)}): {HELP}") from None
    if path.is_file():
        if path.suffix == ".parquet":
            return _parquet(path.parent, sorted(path.parent.glob("*.parquet")))
        if _is_tar(path):
            return _tar(path)
        if path.suffix != ".npz" and not zipfile.is_zipfile(path):
            raise UserError(f"{path} is neither a .parquet, a .tar.gz nor a .npz file: {HELP}")
        return _npz(path)
    if not path.is_dir():
        raise UserError(f"no data at {path}: {HELP}")
    if (path / "cifar10.npz").is_file():
        return _npz(path / "cifar10.npz")
    sets = (("cifar-10-batches-py", "cifar-10-python.tar.gz"),
            ("cifar-100-python", "cifar-100-python.tar.gz"))  # fmt: skip
    if all(any((path / name).exists() for name in names) for names in sets):
        raise UserError(f"{path} holds CIFAR-10 and CIFAR-100: name one of them as --data")
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-100-python"):
        if (folder / "test_batch").is_file() or (folder / "data_batch_1").is_file():
            return _batches(_in_folder(folder), folder, "CIFAR10")
        if (folder / "test").is_file() and (folder / "meta").is_file():
            return _batches(_in_folder(folder), folder, "CIFAR100")
    for file in (path / "cifar-10-python.tar.gz", path / "cifar-100-python.tar.gz"):
        if file.is_file():
            return _tar(file)
    if files := sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")]):
        return _parquet(path, files)  # Hugging Face's lie in data/ or plain_text/
    if any((path / split).is_dir() for split in ("train", "test")):
        return _class_folders(path)
    names = ", ".join(sorted(map(str, (p.name for p in path.iterdir())))[:5]) or "nothing"
    raise UserError(f"no CIFAR-10 in {path} (found {names}): {HELP}")


def download(root: Path) -> Arrays:
    """Read CIFAR-10 from a folder, into which torchvision downloads it if it is not there."""
    from torchvision.datasets import CIFAR10  # slow to import

    try:
        CIFAR10(root, train=False, download=True)  # compares the MD5 sums of all files
    except Exception as error:  # URLError, RuntimeError (checksum), OSError, tarfile's
        raise UserError(f"downloading CIFAR-10 failed ({reason(error)}): {HELP}") from None
    folder = root / CIFAR10.base_folder
    return _batches(_in_folder(folder), folder, "CIFAR10")


def _npz(path: Path) -> Arrays:
    """Read the four arrays from a file in Keras' layout; those of training may both be missing."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive, or not a whole one")
        with np.load(path, allow_pickle=False) as file:
            names = [f"{key}.npy" for key in keys]
            size = sum(info.file_size for info in file.zip.infolist() if info.filename in names)
            if size > max(ARRAYS_LIMIT, path.stat().st_size):  # any size, if it is stored as such
                raise ValueError(f"its arrays have {size:,} bytes, {ARRAYS_LIMIT:,} is most")
            missing = [key for key in keys if key not in file]
            if missing == ["x_train", "y_train"]:
                return Arrays(NO_IMAGES, NO_LABELS, file["x_test"], file["y_test"])
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}: {HELP}")
            return Arrays(*(file[key] for key in keys))
    except UserError:
        raise
    except Exception as error:  # np.load raises whatever zipfile, zlib or its parser does
        raise UserError(f"{path} is not a readable .npz ({reason(error)}): {HELP}") from None


# ---- the batches of CIFAR-10 and CIFAR-100 -------------------------------------------------------


def _in_folder(folder: Path) -> Callable:
    """Return a function from a file's name to its bytes, None if it is not in the folder."""
    def get(name: str) -> bytes | None:
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    return get


def _is_tar(path: Path) -> bool:
    """Return whether a file is a tar archive, or what is left of a compressed one."""
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # EOFError and zlib's, of a damaged .tar.gz
        return True


def _tar(path: Path) -> Arrays:
    """Read the batches in a .tar.gz, in memory: nothing is written."""
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.size <= MEMBER_LIMIT:
                    name = member.name.rpartition("/")[2]
                    if re.fullmatch(MEMBERS, name):
                        if name in files:
                            raise ValueError(f"it holds {name} twice")
                        files[name] = archive.extractfile(member).read()
                        if sum(map(len, files.values())) > ARRAYS_LIMIT:
                            raise ValueError(f"its files have over {ARRAYS_LIMIT:,} bytes")
    except Exception as error:  # tarfile's, zlib's, EOFError
        raise UserError(f"{path} is not a readable .tar.gz ({reason(error)}): {HELP}") from None
    kind = "CIFAR100" if {"test", "meta"} <= set(files) else "CIFAR10"
    if kind == "CIFAR100" and "test_batch" in files:
        raise UserError(f"{path} holds both CIFAR-10 and CIFAR-100: unpack it, and give one of "
                        "them as --data")  # fmt: skip
    if kind == "CIFAR10" and "test_batch" not in files:
        raise UserError(f"no CIFAR-10 in {path}: it holds no test_batch; {HELP}")
    return _batches(files.get, path, kind)


def _batches(get: Callable, where: Path, kind: str) -> Arrays:
    """Read CIFAR-10's or CIFAR-100's batches.

    get: a function from a file's name to its bytes, or None. kind: the class of torchvision that
    knows the names of the files, and the MD5 sums of the original ones: of others a line says so.
    """
    from torchvision import datasets  # slow to import

    known, title = getattr(datasets, kind), kind.replace("CIFAR", "CIFAR-")
    label_key = "labels" if kind == "CIFAR10" else "fine_labels"
    name, parts, original = None, [], True
    try:
        for files in (known.train_list, known.test_list):
            raw = {name: get(name) for name, _ in files}
            there = [name for name in raw if raw[name] is not None]
            if there and len(there) < len(raw) or files is known.test_list and not there:
                name = next(name for name in raw if raw[name] is None)
                raise ValueError("is missing")
            original &= all(
                hashlib.md5(raw[name] or b"", usedforsecurity=False).hexdigest() == md5
                for name, md5 in files if there
            )  # fmt: skip
            images, labels = [NO_IMAGES], [NO_LABELS]
            for name in there:
                x, y = _batch(_unpickle(raw.pop(name)), label_key)
                images.append(x)
                labels.append(y)
            parts += [np.concatenate(images), np.concatenate(labels)]
        name, raw = known.meta["filename"], get(known.meta["filename"])
        names = _entry(_unpickle(raw), known.meta["key"]) if raw is not None else None
    except (ValueError, TypeError, OverflowError) as error:  # numpy's, of what a file counts, too
        raise UserError(f"{title} in {where} is damaged ({name} {reason(error)}): {HELP}") from None
    if not original:
        print(
            f"{where}: other files than {title}'s own, by their MD5 sums; taken as they are",
            file=sys.stderr,
        )  # fmt: skip
    return Arrays(*parts, _names(names, where), "cifar100" if kind == "CIFAR100" else None)


def _batch(content, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of a batch. Raises ValueError if they are none."""
    rows, labels = _entry(content, "data"), _entry(content, label_key)
    if not isinstance(rows, _Array):
        raise ValueError("holds no array as data")
    rows = rows.array()
    if rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
        raise ValueError(f"holds {rows.dtype} {rows.shape} as data, not uint8 (n, 3072)")
    if isinstance(labels, _Array):
        labels = labels.array()
    elif isinstance(labels, list) and all(type(n) in (int, np.int64) for n in labels):
        if not all(abs(n) < 2**63 for n in labels):
            raise ValueError("holds labels of over 64 bits")
        labels = np.array(labels, np.int64)
    else:
        raise ValueError("holds labels that are no integers")
    if labels.ndim != 1:
        raise ValueError(f"holds an array of {labels.ndim} dimensions as labels")
    if len(labels) != len(rows):
        raise ValueError(f"holds {len(labels)} labels of {len(rows)} images")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


def _entry(content, key: str):
    """Return an entry of a pickled dict, whose keys are bytes if Python 2 wrote it."""
    content = content if isinstance(content, dict) else {}
    if key in content or key.encode() in content:
        return content.get(key, content.get(key.encode()))
    raise ValueError(f"holds no {key}")


class _Unpickler(pickle._Unpickler):
    """An unpickler of arrays and plain types, for files from strangers: it calls nothing of theirs.

    It is the one of the standard library that is written in Python: what a file counts cannot make
    it allocate memory.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoded = {}

    def encode(self, text: str, encoding) -> bytes:
        """Return bytes that pickle protocol 2 wrote as text: of a text that repeats, the same ones,
        since a file repeats it in a few bytes."""
        if encoding not in ("latin1", b"latin1"):
            raise ValueError(f"holds text as {encoding}")
        if text not in self.encoded:
            self.encoded[text] = text.encode("latin1")
        return self.encoded[text]

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        module = module.replace("numpy._core", "numpy.core")  # numpy 2 and 1
        stand_in = STAND_INS.get((module, name))
        if not stand_in:
            raise ValueError(f"holds {module}.{name}, which is no data: it is not unpickled")
        return stand_in

    def load_bytearray8(self):
        """Read as many bytes as the file counts; the standard library's allocates them first."""
        (count,) = struct.unpack("<Q", self.read(8))
        content = self.read(count)
        if len(content) < count:
            raise ValueError("ends early")
        self.append(bytearray(content))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray8}


def _unpickle(raw: bytes):
    """Return what a pickle holds. Raises ValueError for all but arrays and plain types."""
    try:
        return _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except ValueError:
        raise
    except Exception as error:  # the unpickler raises whatever its stack of nonsense gives
        raise ValueError(f"is no pickle of images: {reason(error)}") from None


class _Dtype:
    """What a pickled numpy.dtype says: a code such as u1 or i8, and its order of bytes."""

    def __init__(self, code, *_):
        self.code, self.order = code.decode() if isinstance(code, bytes) else code, "="

    def __setstate__(self, state):
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else order

    def dtype(self) -> np.dtype:
        if not re.fullmatch(r"[iu][1248]", str(self.code)) or self.order not in tuple("<>=|"):
            raise ValueError(f"holds an array of type {self.code}")
        return np.dtype(self.order.replace("|", "=") + self.code)


class _Array:
    """What a pickled array says: no function of numpy is given anything unchecked."""

    def __init__(self, *_):  # of _reconstruct; __setstate__ gives all that counts
        self.state = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.state = raw, dtype, shape, "F" if fortran else "C"

    @classmethod
    def of_buffer(cls, *state):  # pickle protocol 5
        array = cls()
        array.state = state
        return array

    def array(self) -> np.ndarray:
        """Return the array of integers. Raises ValueError if it is none."""
        raw, dtype, shape, order = self.state or (None,) * 4
        if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype):
            raise ValueError("holds an array of no integers")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("holds an array of no shape")
        return np.frombuffer(raw, dtype.dtype()).reshape(shape, order=order)


def _scalar(dtype: _Dtype, raw: bytes) -> np.int64:
    """Return a pickled numpy integer."""
    return np.int64(np.frombuffer(raw, dtype.dtype())[0])


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Array.of_buffer,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("__builtin__", "bytes"): lambda: b"",
}


# ---- Hugging Face's parquet files ----------------------------------------------------------------


def _parquet(folder: Path, found: list[Path]) -> Arrays:
    """Read parquet files with the columns img or image and label or fine_label.

    found: all in the folder, or below it.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{folder} holds parquet files: `pip install pyarrow` first") from None
    if int(pyarrow.__version__.partition(".")[0]) < 15:  # CVE-2023-47248
        raise UserError("this pyarrow can be made to run code by a file: `pip install -U pyarrow`")
    files = {split: _files_of_split(split, found) for split in ("train", "test")}
    parts, file, first = [], folder, None
    try:
        for split in ("train", "test"):
            images, labels, most = [], [], ARRAYS_LIMIT
            for file in files[split]:
                table = parquet.ParquetFile(file)
                most += PICTURE_RATIO * file.stat().st_size
                if (len(images) + table.metadata.num_rows) * 3072 > most:
                    raise ValueError(f"holds over {most:,} bytes of images")
                columns = table.schema_arrow.names
                image = next((c for c in ("img", "image") if c in columns), None)
                label = next((c for c in ("label", "fine_label") if c in columns), None)
                if not image or not label:
                    raise ValueError(f"has the columns {', '.join(columns)}, no img and label")
                classes = label, _names_of_features(table.schema_arrow.metadata, label)
                first = first or (file, classes)
                if classes != first[1]:
                    raise ValueError("has another column of labels, or other names of classes, "
                                     f"than {first[0].name}")  # fmt: skip
                for rows in table.iter_batches(1024, columns=[image, label]):
                    for cell in rows.column(image).to_pylist():
                        images.append(_pixels(io.BytesIO(_bytes(cell))))
                    labels += rows.column(label).to_pylist()
            if not all(type(number) is int for number in labels):
                raise ValueError("holds labels that are no integers")
            parts += [np.stack(images) if images else NO_IMAGES, np.array(labels, np.int64)]
    except Exception as error:  # pyarrow's and Pillow's, of many kinds
        raise UserError(f"{file} is not a set of images ({reason(error)}): {HELP}") from None
    if not len(parts[2]):
        raise UserError(f"no parquet file in {folder} begins with test: {HELP}")
    label, names = first[1]
    return Arrays(*parts, _names(names, folder), "cifar100" if label == "fine_label" else None)


def _files_of_split(split: str, found: list[Path]) -> list[Path]:
    """Return those of the parquet files that are of a split, in order.

    Raises UserError for files in several folders, which may be of several sets, for a download that
    is not whole, and for files that repeat others: images that are there twice would be trained on
    and held out for validation.
    """
    files = [f for f in found if re.match(rf"{split}(?![a-z])", f.name)]
    if len(folders := sorted({file.parent for file in files})) > 1:
        raise UserError(f"files that begin with {split} lie in {folders[0]} and in {folders[1]}, "
                        "perhaps of several sets: give the folder of one as --data")  # fmt: skip
    hashes = {}
    for file in files:
        said = re.search(r"-of-(\d+)", file.name)
        if said and int(said[1]) != len(files):
            raise UserError(f"{file} is one of {int(said[1])} files by its name, but there are "
                            f"{len(files)} that begin with {split}: {HELP}")  # fmt: skip
        if (same := hashes.setdefault(sha256_of(file), file)) is not file:
            raise UserError(f"{file} has the same content as {same}: remove one of them")
    return files


def _bytes(cell) -> bytes:
    """Return the encoded image of a cell: bytes, or a struct that holds them."""
    cell = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(cell, bytes):
        raise ValueError("its images are not stored in it")
    return cell


def _names_of_features(metadata: dict | None, label: str) -> list | None:
    """Return the class names that Hugging Face's metadata give a column; None if there are none."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    return None


# ---- folders of pictures -------------------------------------------------------------------------


def _class_folders(path: Path) -> Arrays:
    """Read train/CLASS/* and test/CLASS/*: classes in the order of their names."""
    folders = {}
    for split in ("train", "test"):
        root = path / split
        inside = root.iterdir() if root.is_dir() else ()
        folders[split] = sorted(p for p in inside if p.is_dir() and not p.name.startswith("."))
    names = [p.name for p in folders["train"] or folders["test"]]
    if other := [str(p) for p in folders["test"] if p.name not in names]:
        raise UserError(f"{other[0]} is a class that {path / 'train'} does not have: {HELP}")
    if not folders["test"]:
        raise UserError(f"{path / 'test'} has no folder per class: {HELP}")
    parts, left_out = [], []
    for split in ("train", "test"):
        images, labels = [], []
        for folder in folders[split]:
            there = pictures.all_in_folder(folder)
            taken = [file for file in there if pictures.is_picture(file)]
            left_out += [file for file in there if not pictures.is_picture(file)]
            if not taken and split == "test":
                print(f"{folder} has no pictures: this class is not tested", file=sys.stderr)
            for file in taken:
                try:
                    images.append(_pixels(file))
                except Exception as error:  # Pillow's decoders raise whatever they please
                    raise UserError(f"{file}: {reason(error)}; {HELP}") from None
                labels.append(names.index(folder.name))
        parts += [np.stack(images) if images else NO_IMAGES, np.array(labels, np.int64)]
    if left_out:
        print(f"{path}: files whose names do not end as pictures' do are left out: "
              f"{len(left_out)}, such as {printable(str(left_out[0]))}",
              file=sys.stderr)  # fmt: skip
    return Arrays(*parts, _names(names, path))


def _pixels(source) -> np.ndarray:
    """Decode a picture, uint8 (32, 32, 3), turned as its EXIF data say. Raises ValueError for one
    of another kind. source: a path, or a binary file."""
    with pictures.open_image(source) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"a picture of {image.n_frames} frames")
        if image.size != (32, 32):
            raise ValueError(f"a picture of {image.size[0]}x{image.size[1]} pixels, not 32x32")
        if image.mode not in ("RGB", "L", "P") or image.has_transparency_data:
            raise ValueError(f"a picture of mode {image.mode}, not 8-bit RGB or grey")
        return np.asarray(pictures.turned(image).convert("RGB"))


def _names(names, where: Path) -> tuple[str, ...] | None:
    """Return the names of classes, printable; None, and a line about it, if they are not usable."""
    if names is None:
        return None
    texts = isinstance(names, list) and all(isinstance(n, str | bytes) and n for n in names)
    names = [
        printable(n.decode(errors="backslashreplace") if isinstance(n, bytes) else n)
        for n in (names if texts else ())
    ]  # fmt: skip
    if not names or len(set(names)) < len(names):
        print(f"{where}: its names of classes repeat or are none; not used", file=sys.stderr)
        return None
    return tuple(names)
