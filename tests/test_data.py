"""lib/data.py: every source gives the same set, all else is refused; the split; the batches."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import sys
import tarfile
import tracemalloc
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR10

from autoaugment import augmentation
from lib import data, readers, synthetic
from lib.config import UserError

KEYS = ("x_train", "y_train", "x_test", "y_test")


@pytest.fixture(scope="module")
def arrays():
    return dict(zip(KEYS, synthetic.make(320, 100), strict=True))


@pytest.fixture
def npz(arrays, tmp_path):
    """Write a cifar10.npz of these arrays with some of them changed; None leaves one out."""

    def write(**changes) -> str:
        content = {k: v for k, v in (arrays | changes).items() if v is not None}
        np.savez(tmp_path / "cifar10.npz", **content)
        return str(tmp_path / "cifar10.npz")

    return write


def refused(source, what: str, val_size=None) -> None:
    """The message says what was found, and what to do; it is one line."""
    with pytest.raises(UserError) as caught:
        data.load(source, val_size)
    message = str(caught.value)
    assert what in message and "--data" in message and "\n" not in message, message


def same(a: data.Data, b: data.Data) -> bool:
    return all(
        torch.equal(getattr(a, s).images, getattr(b, s).images)
        and torch.equal(getattr(a, s).labels, getattr(b, s).labels)
        for s in ("train", "val", "test")
    )


# ---- sources -------------------------------------------------------------------------------------


def test_npz_file_and_its_folder(npz, arrays, tmp_path):
    loaded = data.load(npz(), 0)
    assert loaded.train.images.dtype == torch.uint8 and loaded.train.labels.dtype == torch.int64
    assert np.array_equal(loaded.train.images.permute(0, 2, 3, 1), arrays["x_train"])
    assert np.array_equal(loaded.train.labels, arrays["y_train"])
    assert np.array_equal(loaded.test.images.permute(0, 2, 3, 1), arrays["x_test"])
    assert (loaded.source, loaded.classes) == ("cifar10", data.CLASSES)
    assert same(data.load(str(tmp_path), 0), loaded)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.uint64, ">i2"])
def test_column_labels_as_keras_writes_them(npz, arrays, kind):
    column = {k: arrays[k].astype(kind)[:, None] for k in ("y_train", "y_test")}
    assert same(data.load(npz(**column)), data.load(npz()))


def test_synthetic():
    loaded = data.load("synthetic")
    assert (loaded.source, loaded.classes) == ("synthetic", synthetic.CLASSES)
    assert [len(s) for s in (loaded.train, loaded.val, loaded.test)] == [5400, 600, 1000]
    assert loaded.provenance()["split_seed"] == data.SPLIT_SEED


def test_provenance_is_plain_and_names_no_path(tiny):
    record = data.load(tiny).provenance()
    assert (record["train"], record["val_size"], record["test"]) == (290, 30, 100)
    assert not [v for v in record.values() if "/" in str(v)]


@pytest.fixture
def batches_py(arrays, tmp_path, monkeypatch):
    """torchvision's layout, five training batches and a test batch, and its checksums."""
    folder = tmp_path / "tv" / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, split: str, part: slice) -> list[str]:
        rows = arrays[f"x_{split}"][part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        return write(name, {"data": rows, "labels": arrays[f"y_{split}"][part].tolist()})

    train = [batch(f"data_batch_{i + 1}", "train", slice(64 * i, 64 * i + 64)) for i in range(5)]
    test = [batch("test_batch", "test", slice(None))]
    name, md5 = write("batches.meta", {"label_names": list(data.CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def test_torchvision_batches(batches_py, npz):
    expected = data.load(npz())
    assert same(data.load(str(batches_py.parent)), expected)
    assert same(data.load(str(batches_py)), expected)


def test_torchvision_batches_are_checked_before_anything_is_unpickled(batches_py, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (batches_py / "executed",))

    (batches_py / "data_batch_3").write_bytes(pickle.dumps(Bomb()))
    refused(str(batches_py), "is damaged (data_batch_3 holds pathlib.Path.touch, which is no data")
    assert not (batches_py / "executed").exists()


def test_batches_with_other_checksums_are_read_and_a_line_says_so(
    batches_py, npz, monkeypatch, capfd
):
    theirs = data.fingerprint(data.load(npz()).test.images)
    monkeypatch.setattr(data, "CIFAR10_TEST", theirs)
    assert same(data.load(str(batches_py)), data.load(npz())) and capfd.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setattr(data, "CIFAR10_TEST", theirs)
    assert same(data.load(str(batches_py)), data.load(npz()))
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "other files than CIFAR-10's own, by their MD5 sums" in err


def test_download(batches_py, npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "download", lambda self: shutil.copytree(
        batches_py.parent, self.root, dirs_exist_ok=True))  # fmt: skip
    assert same(data.load(None), data.load(npz()))


@pytest.mark.parametrize("error", [URLError("no route to host"), TimeoutError(), OSError("full")])
def test_download_that_fails(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "download", fail)
    refused(None, "downloading CIFAR-10 failed (" + (str(error) or "TimeoutError"))


# ---- sources as people have them -----------------------------------------------------------------


def test_the_folder_of_batches_under_any_name_and_from_inside(
    batches_py, npz, tmp_path, monkeypatch
):
    expected = data.load(npz())
    renamed = batches_py.rename(tmp_path / "my cifar")
    assert same(data.load(str(renamed)), expected)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(data.load("~/my cifar"), expected)
    monkeypatch.chdir(renamed)
    assert same(data.load("."), expected)


def test_a_home_that_nobody_has():
    refused("~no-such-user/x", "no data at ~no-such-user/x")


@pytest.mark.parametrize("as_folder", [False, True])
def test_tar_gz_is_read_where_it_lies(batches_py, npz, tmp_path, as_folder):
    folder = tmp_path / "tar"
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(batches_py, CIFAR10.base_folder)
    source = folder if as_folder else folder / "cifar-10-python.tar.gz"
    assert same(data.load(str(source)), data.load(npz()))
    assert [p.name for p in folder.iterdir()] == ["cifar-10-python.tar.gz"]


def test_tar_gz_of_something_else_or_cut(batches_py, tmp_path):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(batches_py / "data_batch_1", "data_batch_1")
    refused(str(path), "holds no test_batch")
    for kept in (-2000, 200, 20):
        path.write_bytes(path.read_bytes()[:kept])
        refused(str(path), "is not a readable .tar.gz")


def test_a_tar_gz_of_two_sets_is_refused(batches_py, tmp_path):
    path = tmp_path / "x.tar.gz"
    for names, text in (
        (("a/test_batch", "b/test_batch"), "it holds test_batch twice"),
        (("test_batch", "test", "meta"), "holds both CIFAR-10 and CIFAR-100"),
    ):
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                archive.add(batches_py / "test_batch", name)
        refused(str(path), text)


def test_a_tar_gz_of_many_large_files_is_refused(batches_py, tmp_path, monkeypatch):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(batches_py, "cifar-10-batches-py")
    size = max(f.stat().st_size for f in batches_py.iterdir())
    monkeypatch.setattr(readers, "ARRAYS_LIMIT", size)
    refused(str(path), f"its files have over {size:,} bytes")


def test_ten_classes_without_names_are_said_to_be_taken_as_cifar10s(npz, arrays, capfd):
    digits = Path(npz()).with_name("digits.npz")
    shutil.copy(npz(), digits)
    assert data.load(str(digits)).classes == data.CLASSES
    assert capfd.readouterr().err == (
        f"{digits} names no classes: its ten are taken to be CIFAR-10's, airplane to truck\n"
    )
    for name, lines in (("cifar100-ten.npz", 1), ("cifar-10-part.npz", 0), ("cifar10.npz", 0)):
        digits = digits.rename(digits.with_name(name))
        assert data.load(str(digits)).classes == data.CLASSES
        assert capfd.readouterr().err.count("\n") == lines
    train, test = (arrays[key] % 5 for key in ("y_train", "y_test"))
    assert data.load(npz(y_train=train, y_test=test)).classes == tuple("01234")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["lists", "arrays", "scalars", "bytes keys", "fortran"])
def test_batches_pickled_in_any_way(arrays, npz, tmp_path, protocol, kind):
    for name, split, part in [
        *((f"data_batch_{i + 1}", "train", slice(64 * i, 64 * i + 64)) for i in range(5)),
        ("test_batch", "test", slice(None)),
    ]:
        rows = arrays[f"x_{split}"][part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        labels = arrays[f"y_{split}"][part].astype(np.int64)
        content = {
            "data": np.asfortranarray(rows) if kind == "fortran" else rows,
            "labels": labels if kind == "arrays" else labels.tolist(),
            "filenames": ["x.png"] * len(rows), "batch_label": b"\xff\0 of 5",
        }  # fmt: skip
        if kind == "scalars":
            content["labels"] = list(labels)
        if kind == "bytes keys":
            content = {key.encode(): value for key, value in content.items()}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
    assert same(data.load(str(tmp_path)), data.load(npz()))


class Reduced:
    """Pickled as a call of any function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(("content", "what"), [
    ([1, 2], "holds no data"), ({"data": 3, "labels": []}, "holds no array as data"),
    ({"data": np.zeros((2, 3072))}, "holds no labels"),
    ({"data": np.zeros((2, 3072)), "labels": [0, 1]}, "holds an array of type f8"),
    ({"data": np.zeros((2, 32), np.uint8), "labels": [0, 1]}, "uint8 (2, 32) as data, not uint8"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "holds 1 labels of 2 images"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}, "labels that are no integers"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [2**70, 0]}, "labels of over 64 bits"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": np.array(3)}, "of 0 dimensions as labels"),
    ({"data": np.array([{}]), "labels": [0]}, "holds an array of no integers"),
    (Reduced(eval, ("1 + 1",)), "holds builtins.eval, which is no data"),
    (Reduced(np.load, ("x",)), ".load, which is no data"),
    (Reduced(np.ndarray, ((2**40,),)), "holds no data"),
])  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 4])
def test_batches_that_are_none_are_refused(batches_py, protocol, content, what):
    raw = pickle.dumps(content, protocol)
    what = what.replace("builtins", "__builtin__") if protocol == 2 else what
    (batches_py / "data_batch_2").write_bytes(raw)
    refused(str(batches_py), "is damaged (data_batch_2 ")
    refused(str(batches_py), what)
    for end in (0, 1, len(raw) // 2, len(raw) - 1):
        (batches_py / "data_batch_2").write_bytes(raw[:end])
        refused(str(batches_py), "is damaged (data_batch_2 ")


def test_what_a_pickle_counts_is_not_allocated(batches_py):
    count = struct.pack("<Q", 1 << 26)
    (batches_py / "data_batch_2").write_bytes(b"\x80\x05\x96" + count + b"abc.")
    data.load("synthetic")  # imports what is slow to import
    tracemalloc.start()
    refused(str(batches_py), "is damaged (data_batch_2 ends early")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_a_batch_that_is_missing(batches_py):
    (batches_py / "data_batch_4").unlink()
    refused(str(batches_py), "is damaged (data_batch_4 is missing)")


def test_a_folder_of_two_sets_is_refused(tmp_path):
    """As torchvision's downloads leave it."""
    for name in ("cifar-10-batches-py", "cifar-100-python.tar.gz"):
        (tmp_path / name).mkdir()
    refused(str(tmp_path), "holds CIFAR-10 and CIFAR-100: name one of them as --data")


def hundred(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.permutation(np.arange(n) % 100)


def test_cifar_100s_batches(tmp_path):
    names, sets = [f"name_{i}" for i in range(100)], {}
    for name, n in (("train", 2000), ("test", 150)):
        x, y = sets[name] = hundred(n, n)
        rows = x.transpose(0, 3, 1, 2).reshape(n, 3072)
        content = {b"data": rows, b"fine_labels": y.tolist(), b"coarse_labels": [0] * n}
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))
    meta = {b"fine_label_names": [n.encode() for n in names], b"coarse_label_names": [b"x"]}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta, 2))
    loaded = data.load(str(tmp_path))
    assert (loaded.source, loaded.classes) == ("cifar100", tuple(names))
    assert [len(s) for s in (loaded.train, loaded.val, loaded.test)] == [1800, 200, 150]
    assert torch.bincount(loaded.val.labels, minlength=100).tolist() == [2] * 100
    everything = data.load(str(tmp_path), 0)
    assert np.array_equal(everything.train.images.permute(0, 2, 3, 1), sets["train"][0])
    assert np.array_equal(everything.test.labels, sets["test"][1])


@pytest.fixture
def class_folders(arrays, tmp_path):
    """Write train/CLASS and test/CLASS with up to so many pictures per class."""

    def write(names=data.CLASSES, most=8, mode="RGB") -> Path:
        for split in ("train", "test"):
            for label, name in enumerate(names):
                folder = tmp_path / "set" / split / name
                folder.mkdir(parents=True)
                there = arrays[f"x_{split}"][arrays[f"y_{split}"] == label][:most]
                for i, pixels in enumerate(there):
                    Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}.png")
        return tmp_path / "set"

    return write


def test_one_folder_per_class_pixel_for_pixel(class_folders, arrays, capsys):
    folder = class_folders()
    (folder / "train/cat/._000.png").write_bytes(b"a Mac's companion")
    (folder / "train/.DS_Store").touch()
    (folder / "train/.cache").mkdir()
    loaded = data.load(str(folder), 0)
    assert (loaded.source, loaded.classes) == ("cifar10", data.CLASSES)
    said = "has CIFAR-10's classes, but its 80 test images are not those of CIFAR-10"
    assert said in capsys.readouterr().err
    for split, of in (("train", loaded.train), ("test", loaded.test)):
        expected = [arrays[f"x_{split}"][arrays[f"y_{split}"] == c][:8] for c in range(10)]
        assert np.array_equal(of.images.permute(0, 2, 3, 1), np.concatenate(expected))
        assert of.labels.tolist() == [c for c in range(10) for _ in range(8)]
    assert len(data.load(str(folder)).val) == 0 and len(data.load(str(folder), 10).val) == 10


def test_other_classes_have_the_names_of_their_folders(class_folders):
    loaded = data.load(str(class_folders(["zebra", "apple\npie", "ünï"], 20)))
    assert (loaded.source, loaded.classes) == ("images", ("apple\\npie", "zebra", "ünï"))
    assert [len(s) for s in (loaded.train, loaded.val, loaded.test)] == [54, 6, 30]


def test_what_is_left_out_of_a_folder_is_said(class_folders, capsys):
    folder = class_folders(most=2)
    for path in (folder / "test/cat").iterdir():
        path.rename(path.with_suffix(""))
    assert len(data.load(str(folder), 0).test) == 18
    err = capsys.readouterr().err
    assert "test/cat has no pictures" in err and "do are left out: 2, such as " in err


def test_pictures_are_turned_as_their_exif_data_say(class_folders):
    folder = class_folders(most=1)
    path = folder / "test/cat/000.png"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x112] = 6  # to be turned by 90 degrees clockwise
        expected = np.rot90(np.asarray(image), -1)
        image.save(path, exif=exif)
    turned = data.load(str(folder), 0).test.images[data.CLASSES.index("cat")]
    assert np.array_equal(turned.permute(1, 2, 0), expected)


def test_folders_of_other_things(class_folders, tmp_path):
    folder = class_folders(most=2)
    frames = [Image.new("L", (32, 32), grey) for grey in (0, 255)]
    frames[0].save(folder / "train/dog/film.gif", save_all=True, append_images=frames[1:])
    refused(str(folder), "train/dog/film.gif: a picture of 2 frames")
    (folder / "train/dog/film.gif").unlink()
    Image.new("RGB", (64, 32)).save(folder / "train/dog/big.png")
    refused(str(folder), "train/dog/big.png: a picture of 64x32 pixels, not 32x32")
    Image.new("RGBA", (32, 32)).save(folder / "train/dog/big.png")
    refused(str(folder), "of mode RGBA")
    (folder / "train/dog/big.png").write_bytes(b"nonsense")
    refused(str(folder), "train/dog/big.png: cannot identify")
    (folder / "train/dog/big.png").unlink()
    (folder / "test/wolf").mkdir()
    refused(str(folder), "test/wolf is a class that ")
    (folder / "test/wolf").rmdir()
    shutil.rmtree(folder / "train/truck")
    (folder / "train/truck").mkdir()
    refused(str(folder), "labels are [0, 1, 2, 3, 4, 5, 6, 7, 8], not 0 to 9 (none of truck)")
    shutil.rmtree(folder / "test")
    refused(str(folder), "has no folder per class")


def test_a_set_of_other_classes_without_names(npz, arrays):
    x, y = hundred(1000, 0)
    loaded = data.load(npz(x_train=x, y_train=y, x_test=x[:100], y_test=y[:100]))
    assert (loaded.source, loaded.classes) == ("images", tuple(map(str, range(100))))
    assert len(loaded.val) == 100
    refused(npz(x_train=x, y_train=np.where(y == 57, 0, y)), "labels are [0, 1, 2, 3,")


def test_parquet(arrays, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def png(pixels) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def write(label: str, cell, names) -> None:
        feature = {"names": names, "_type": "ClassLabel"}
        info = json.dumps({"info": {"features": {label: feature}}})
        for split in ("train", "test"):
            table = pa.table({"img": [cell(png(x)) for x in arrays[f"x_{split}"]],
                              label: arrays[f"y_{split}"].astype(np.int64)})  # fmt: skip
            metadata = {"huggingface": info} if names else None
            path = tmp_path / f"plain_text/{split}-00000-of-00001.parquet"
            parquet.write_table(table.replace_schema_metadata(metadata), path)

    (tmp_path / "plain_text").mkdir()
    for cell in (lambda raw: {"bytes": raw, "path": None}, lambda raw: raw):
        write("label", cell, None)
        loaded = data.load(str(tmp_path), 0)
        assert np.array_equal(loaded.train.images.permute(0, 2, 3, 1), arrays["x_train"])
        assert np.array_equal(loaded.test.labels, arrays["y_test"])
        assert (loaded.source, loaded.classes) == ("cifar10", data.CLASSES)
    write("label", lambda raw: raw, list("ABCDEFGHIJ"))
    loaded = data.load(str(tmp_path / "plain_text"), 0)
    assert (loaded.source, loaded.classes) == ("images", tuple("ABCDEFGHIJ"))
    write("fine_label", lambda raw: raw, list("ABCDEFGHIJ"))
    assert data.load(str(tmp_path), 0).source == "cifar100"
    train = tmp_path / "plain_text/train-00000-of-00001.parquet"
    of_letters = train.read_bytes()
    for names in (list("JIHGFEDCBA"), None):
        write("fine_label", lambda raw: raw, names)
        train.write_bytes(of_letters)
        refused(str(tmp_path), "other names of classes, than train-00000-of-00001.parquet")
    shutil.copytree(tmp_path / "plain_text", tmp_path / "old")
    refused(str(tmp_path), "/plain_text, perhaps of several sets: give the folder of one")
    shutil.rmtree(tmp_path / "old")
    write("number", lambda raw: raw, None)
    refused(str(tmp_path), "has the columns img, number, no img and label")
    write("label", lambda raw: {"path": "x.png"}, None)
    refused(str(tmp_path), "its images are not stored in it")
    file = tmp_path / "plain_text/test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    refused(str(tmp_path), "is not a set of images")


def test_parquet_files_that_lack_parts_or_repeat_others(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"images")
    (tmp_path / "train-00000-of-00001 (1).parquet").write_bytes(b"images")
    with pytest.raises(UserError, match="one of 1 files by its name, but there are 2 that begin"):
        data.load(str(tmp_path))
    for i, file in enumerate(tmp_path.iterdir()):
        file.rename(tmp_path / f"train_{i}.parquet")
    with pytest.raises(UserError, match="train_1.parquet has the same content as .*train_0.parq"):
        data.load(str(tmp_path))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="`pip install pyarrow`"):
        data.load(str(tmp_path))


# ---- test images alone ---------------------------------------------------------------------------


def test_test_images_alone(npz, arrays):
    both = {"x_train": None, "y_train": None}
    refused(npz(**both), "the training set is not CIFAR-10: it is empty")
    loaded = data.load(npz(**both), 5000, test_only=True)
    assert np.array_equal(loaded.test.images.permute(0, 2, 3, 1), arrays["x_test"])
    assert (len(loaded.train), len(loaded.val), loaded.classes) == (0, 0, data.CLASSES)
    some = arrays["y_test"] < 3
    few = both | {"x_test": arrays["x_test"][some], "y_test": arrays["y_test"][some]}
    assert data.load(npz(**few), test_only=True, classes=10).classes == data.CLASSES
    assert data.load(npz(**few), test_only=True, classes=3).classes == ("0", "1", "2")
    with pytest.raises(UserError, match="--val-size must be a multiple"):
        data.load(npz(), 5000)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "change", "what"),
    [
        ("x_train", lambda x: x.astype(np.float32) / 255, "images are float32 (320, 32, 32, 3)"),
        ("x_train", lambda x: x.astype(np.int64), "images are int64"),
        ("x_train", lambda x: x.transpose(0, 3, 1, 2), "images are uint8 (320, 3, 32, 32)"),
        ("x_train", lambda x: x[:, :28, :28], "(320, 28, 28, 3), not uint8 (n, 32, 32, 3)"),
        ("x_train", lambda x: x[..., 0], "images are uint8 (320, 32, 32)"),
        ("x_train", lambda x: x[0, 0, 0, 0], "images are uint8 ()"),
        ("x_train", lambda x: x[:-1], "labels are uint8 (320,), not 319 integers"),
        ("x_test", lambda x: x[:0], "the test set is not CIFAR-10"),
        ("y_test", lambda y: y[:-1], "labels are uint8 (99,), not 100 integers"),
        ("y_train", lambda y: y.astype(float), "labels are float64"),
        ("y_train", lambda y: np.eye(10, dtype=np.uint8)[y], "labels are uint8 (320, 10)"),
        ("y_train", lambda y: y[None], "labels are uint8 (1, 320)"),
        ("y_train", lambda y: y + np.uint8(1), "labels are [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"),
        ("y_train", lambda y: y.astype(np.int8) - 1, "labels are [-1, 0,"),
        ("y_train", lambda y: np.minimum(y, 8), "labels are [0, 1, 2, 3, 4, 5, 6, 7, 8], not 0"),
        ("y_test", lambda y: y * 20, "the test set is not CIFAR-10: labels are"),
        ("y_train", lambda y: y.astype(object), "is not a readable .npz"),
    ],
)  # fmt: skip
def test_wrong_arrays(npz, arrays, key, change, what):
    refused(npz(**{key: change(arrays[key])}), what)


def test_both_sets_empty(npz, arrays):
    refused(npz(x_train=arrays["x_train"][:0], y_train=arrays["y_train"][:0]), "it is empty")


@pytest.mark.parametrize("key", KEYS)
def test_missing_key(npz, key):
    refused(npz(**{key: None}), f"has no {key}")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_truncated_file(npz, keep):
    path = Path(npz())
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if keep < 1 else keep])
    refused(str(path), "is not a readable .npz")


def test_damaged_pixels_are_noticed(npz):
    path = Path(npz())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    refused(str(path), "CRC")


def test_arrays_that_inflate_to_more_than_a_limit(arrays, npz, tmp_path, monkeypatch):
    total = sum(array.nbytes for array in arrays.values()) + 4 * 128  # with numpy's headers
    monkeypatch.setattr(readers, "ARRAYS_LIMIT", total - 1)
    data.load(npz())  # not compressed: no longer than the file
    zeros = arrays | {"x_train": np.zeros_like(arrays["x_train"])}
    np.savez_compressed(tmp_path / "zeros.npz", **zeros)
    refused(str(tmp_path / "zeros.npz"), f"its arrays have {total:,} bytes, {total - 1:,} is most")
    monkeypatch.setattr(readers, "ARRAYS_LIMIT", total)
    data.load(str(tmp_path / "zeros.npz"))


@pytest.mark.parametrize("name", ["README.md", "x.nnz", "x.npy"])
def test_files_that_are_no_set_of_images(tmp_path, name):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "README.md").write_text("# Data\n")
    (tmp_path / "x.nnz").write_bytes(b"\x89NNZ" + bytes(100))
    what = f"{name} is neither a .parquet, a .tar.gz nor a .npz file: give --data"
    refused(str(tmp_path / name), what)


@pytest.mark.parametrize("content", [np.zeros(3), {"x_train": 1}])
def test_other_kinds_of_file(tmp_path, content):
    path = tmp_path / "cifar10.npz"
    with path.open("wb") as file:
        np.save(file, content, allow_pickle=True)
    refused(str(path), "is not a readable .npz")


def test_folders_and_paths_without_data(tmp_path):
    refused(str(tmp_path / "nowhere"), f"no data at {tmp_path / 'nowhere'}")
    refused(str(tmp_path), "(found nothing)")
    (tmp_path / "holiday.jpg").touch()
    refused(str(tmp_path), "(found holiday.jpg)")


# ---- the split -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 50, 300])
def test_split_is_stratified_fixed_and_disjoint(tiny, arrays, size):
    a, b = data.load(tiny, size), data.load(tiny, size)
    assert same(a, b)
    assert (len(a.val), len(a.train), len(a.test)) == (size, 320 - size, 100)
    assert torch.bincount(a.val.labels, minlength=10).tolist() == [size // 10] * 10
    rows = torch.cat([a.train.images, a.val.images]).flatten(1).tolist()
    assert sorted(rows) == sorted(arrays["x_train"].transpose(0, 3, 1, 2).reshape(320, -1).tolist())


def test_larger_validation_splits_contain_the_smaller(tiny):
    small, large = ({bytes(x.numpy()) for x in data.load(tiny, n).val.images} for n in (20, 100))
    assert len(small) == 20 and small < large


def test_an_empty_split_is_refused_by_name(tiny):
    images = data.load(tiny, 0)
    assert images.split("train") is images.train and images.split("test") is images.test
    with pytest.raises(UserError, match="no validation split: --val-size is 0"):
        images.split("val")
    assert len(data.load(tiny, 10).split("val")) == 10


def test_the_split_of_cifar_10_is_the_one_of_all_earlier_runs():
    held = data._stratified(torch.arange(50000) % 10, 10, None).nonzero()[:, 0]
    assert len(held) == 5000 and held[:5].tolist() == [1, 5, 17, 21, 24]
    assert hashlib.sha256(held.numpy().tobytes()).hexdigest()[:16] == "1ec0f0d4dc8bd47f"


def test_a_class_of_few_images_keeps_half_of_them():
    labels = torch.tensor([0] * 1000 + [1] * 6)
    held = data._stratified(labels, 2, None)
    assert torch.bincount(labels[held]).tolist() == [3, 3]


@pytest.mark.parametrize("size", [-10, 7, 320, 1000])
def test_impossible_split(tiny, size):
    with pytest.raises(UserError, match=r"--val-size must be a multiple of 10 .*32 images.*not "):
        data.load(tiny, size)


# ---- batches -------------------------------------------------------------------------------------


def test_normalize_is_torchvisions(arrays):
    images = arrays["x_train"][:20]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])
    expected = torch.stack([theirs(Image.fromarray(x)) for x in images])
    ours = data.normalize(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert torch.equal(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def numbered(arrays):
    """320 images, each labelled with its own index."""
    images = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2).contiguous()
    return data.Split(images, torch.arange(len(images)))


def epoch(split, size=96, level="auto", seed=1, number=0, **parallel):
    return list(data.batches(split, size, augmentation(level), seed, number, **parallel))


def test_an_epoch_has_each_image_at_most_once_and_no_incomplete_batch(numbered):
    batches = epoch(numbered, level="none")
    assert [len(x) for x, _ in batches] == [96, 96, 96]
    seen = torch.cat([labels for _, labels in batches])
    assert len(set(seen.tolist())) == 288
    for x, labels in batches:
        assert torch.equal(x, data.normalize(numbered.images[labels]))


def test_order_spans_the_chunks_that_are_augmented_at_a_time():
    split = data.Split(torch.zeros(4500, 3, 32, 32, dtype=torch.uint8), torch.arange(4500))
    seen = [labels for _, labels in epoch(split, size=100, level="none")]
    assert len(seen) == 45 and sorted(torch.cat(seen).tolist()) == list(range(4500))


@pytest.mark.parametrize("level", ["light", "auto"])
def test_an_epoch_repeats_and_others_differ(numbered, level):
    first = epoch(numbered, level=level)
    for (x, a), (y, b) in zip(first, epoch(numbered, level=level), strict=True):
        assert torch.equal(x, y) and torch.equal(a, b)
    for other in (epoch(numbered, level=level, number=1), epoch(numbered, level=level, seed=2)):
        assert not any(torch.equal(a, b) for (_, a), (_, b) in zip(first, other, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_global_batches_of_one_process(numbered, world):
    parts = zip(*(epoch(numbered, rank=r, world=world) for r in range(world)), strict=True)
    for (x, labels), part in zip(epoch(numbered), parts, strict=True):
        assert torch.equal(torch.cat([a for a, _ in part]), x)
        assert torch.equal(torch.cat([b for _, b in part]), labels)


def test_alternating_flip_shows_both_sides_of_each_image_in_any_two_epochs():
    class Watch:
        def draw(self, n, generator):
            return {"flip": torch.randint(2, (n,), generator=generator)}

        def apply(self, images, params):
            numbers = images[:, 0, 0, 0].tolist()
            self.seen |= dict(zip(numbers, params["flip"].tolist(), strict=True))
            return images

    images = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(64, 3, 32, 32)
    split = data.Split(images.contiguous(), torch.zeros(64, dtype=torch.long))
    epochs = []
    for epoch in range(3):
        watch = Watch()
        watch.seen = {}
        for _ in data.batches(split, 16, watch, 47, epoch, alternate_flip=True):
            pass
        epochs.append([watch.seen[i] for i in range(64)])
    assert epochs[0] == epochs[2] == [1 - flip for flip in epochs[1]]
    assert 16 < sum(epochs[0]) < 48  # the first is a coin toss
