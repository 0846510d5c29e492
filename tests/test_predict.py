"""predict.py: any image that Pillow reads, by any of our files; what cannot be read is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import call, one_line

import predict
import sparse_compress
import to_int8
import train
from lib import checkpoint, data, pictures, ptq, quantizers, runtime, synthetic
from models.mobilenetv2 import MobileNetV2, standard


@pytest.fixture
def run(monkeypatch, capfd):
    return lambda *flags: call("predict", *flags, monkeypatch=monkeypatch, capfd=capfd)


@pytest.fixture(scope="module")
def folder(small, pixels, tiny, tmp_path_factory):
    """A run's folder: a W8A8 network from quantized.pth on."""
    folder = tmp_path_factory.mktemp("run")
    scheme = ptq.make_scheme(8, 8)
    model, _ = ptq.quantize(small(1), pixels, scheme)
    checkpoint.save(
        folder / "checkpoints/quantized.pth", "quantized", model, train.Settings(), None,
        metrics={}, data={"source": "cifar10", "val_size": 50}, quantization=scheme,
    )  # fmt: skip
    to_int8.main([f"--data={tiny}", f"--run-dir={folder}"])
    sparse_compress.main([f"--run-dir={folder}"])
    return folder


@pytest.fixture
def picture():
    return synthetic.make(1, 1)[0][0]  # uint8 (32, 32, 3)


FILES = ("quantized.pth", "int8.pth", "int8.onnx", "compressed.nnz")


@pytest.mark.parametrize("name", FILES)
def test_a_small_image_is_taken_as_it_is(run, folder, picture, tmp_path, name):
    Image.fromarray(picture).save(tmp_path / "x.png")
    model = folder / "checkpoints" / name
    code, out, err = run(tmp_path / "x.png", f"--model={model}", "--json", "--top=99")
    assert (code, err) == (0, "")
    row = json.loads(out)
    assert row["file"] == str(tmp_path / "x.png")
    found = {pair["class"]: pair["probability"] for pair in row["top"]}
    image = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None]
    expected = runtime.network(runtime.load(model))(image).softmax(1)[0]
    assert [found[c] for c in data.CLASSES] == pytest.approx(expected.tolist())
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_files_and_folders_in_order_as_text(run, folder, picture, tmp_path):
    for name in ("b.jpg", "a.png", "sub/c.webp", "d.GIF", "e.bmp", "f.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).resize((90, 70)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image, and not named as one")
    code, out, err = run(tmp_path, tmp_path / "b.jpg", f"--run-dir={folder}", "--top=2")
    assert (code, err) == (0, "")
    names = ["a.png", "b.jpg", "d.GIF", "e.bmp", "f.tiff", "sub/c.webp", "b.jpg"]
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [str(tmp_path / n) for n in names]
    assert all(line.count("%") == 2 for line in lines)


def test_what_cannot_be_read_is_a_line_each_and_the_rest_is_done(run, folder, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "good.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(
        tmp_path / "whole.jpg"
    )
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "nonsense.png").write_bytes(b"nonsense")
    (tmp_path / "empty.png").touch()
    code, out, err = run(tmp_path, tmp_path / "none.png", f"--run-dir={folder}")
    assert code == 1 and len(out.splitlines()) == 2
    lines = err.splitlines()
    assert all(line.startswith("predict.py: ") for line in lines)
    for name, why in [("cut.jpg", "cannot be read"), ("empty.png", "is not an image"),
                      ("nonsense.png", "is not an image"), ("none.png", "does not exist")]:
        assert sum(f"{name}: {why}" in line for line in lines) == 1
    assert lines[-1] == "predict.py: error: 4 of 6 images could not be read" and len(lines) == 5


@pytest.mark.parametrize(("flags", "what"), [
    ([], "name an image file"), (["x.png", "--top=0"], "--top must be at least 1"),
])  # fmt: skip
def test_wrong_usage(run, flags, what):
    code, out, err = run(*flags)
    assert (code, out) == (2, "") and what in err


def test_nothing_to_do_it_with(run, folder, picture, tmp_path):
    (tmp_path / "empty").mkdir()
    Image.fromarray(picture).save(tmp_path / "x.png")
    code, out, err = run(tmp_path / "empty", tmp_path / "x.png", f"--run-dir={folder}")
    assert code == 1 and out.count("\n") == 1 and "x.png" in out  # the other is classified
    assert "empty: a folder without images" in err and "1 of 2 images could not be read" in err
    code, _, err = run(tmp_path / "x.png", f"--run-dir={tmp_path}")
    assert code == 1 and one_line("predict", err) and "compressed.nnz does not exist" in err


def test_the_latest_stage_that_is_there(folder, tmp_path):
    shutil.copytree(folder / "checkpoints", tmp_path / "c")
    for name in ("compressed.nnz", "int8.pth", "quantized.pth"):
        assert predict.latest(tmp_path / "c") == tmp_path / "c" / name
        (tmp_path / "c" / name).unlink()


# ---- reading -------------------------------------------------------------------------------------


def test_the_middle_square_is_what_counts(tmp_path):
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (64, 200, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide[:, 68:132]).save(tmp_path / "square.png")
    a, b = predict.read(tmp_path / "wide.png")[0], predict.read(tmp_path / "square.png")[0]
    assert a.shape == (3, 32, 32) and a.dtype == np.uint8 and np.array_equal(a, b)
    # Antialiased: noise averages out instead of being sampled.
    Image.fromarray(rng.integers(0, 256, (640, 640, 3), np.uint8)).save(tmp_path / "noise.png")
    assert predict.read(tmp_path / "noise.png")[0].std() < 15


@pytest.mark.parametrize(("mode", "colour", "seen"), [
    ("L", 100, 100), ("1", 1, 255), ("P", 0, None), ("LA", (50, 255), 50), ("I;16", 257 * 80, 80),
    ("RGBA", (9, 9, 9, 0), 255), ("CMYK", (0, 0, 0, 0), 255),
])  # fmt: skip
def test_modes(tmp_path, mode, colour, seen):
    name = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new(mode, (40, 50), colour).save(name)
    image = predict.read(name)[0]
    assert image.shape == (3, 32, 32) and (seen is None or (image == seen).all())


def test_cameras_that_were_turned(tmp_path):
    picture = Image.new("RGB", (60, 40), "black")
    picture.paste("white", (0, 0, 60, 20))  # the upper half
    exif = picture.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "x.png", exif=exif)
    image = predict.read(tmp_path / "x.png")[0]
    assert image[:, :10].max() < 50 and image[:, -10:].min() > 200


@pytest.mark.parametrize(("dtype", "top", "said"), [
    (np.float32, 1, "0 to 1"), (np.float32, 255, "0 to 255"), (np.float32, 65535, "0 to 65535"),
    (np.int32, 255, "0 to 255"), (np.int32, 4095, "0 to 4095"), (np.int32, 65535, "0 to 65535"),
    (np.int32, 2**31 - 1, "0 to 2147483647"), (np.uint16, 255, "0 to 255"),
    (np.uint16, 4095, "0 to 4095"), (np.uint16, 65535, None),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["tiff", "png"])
def test_greys_of_more_than_8_bits_are_scaled_by_their_range(tmp_path, dtype, top, said, suffix):
    if suffix == "png" and dtype != np.uint16:
        pytest.skip("PNG has no such greys")
    ramp = np.tile(np.arange(0, 256, 8), (32, 1))
    ramp[-1, -1] = 255
    Image.fromarray((ramp * (top / 255)).astype(dtype)).save(tmp_path / f"x.{suffix}")
    image, note = predict.read(tmp_path / f"x.{suffix}")
    assert np.abs(image.astype(int) - ramp).max() <= 1
    assert (said in note) if said else note == ""


def test_transparent_greys_are_white_at_any_depth(tmp_path):
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        levels = np.full((32, 32), top // 4, dtype)
        levels[0] = top
        Image.fromarray(levels).save(tmp_path / "x.png", transparency=top // 4)
        assert (predict.read(tmp_path / "x.png")[0] == 255).all()


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 1e6], [0.0, np.nan], [0.0, np.inf]])
def test_greys_in_no_usual_range_are_refused(run, folder, tmp_path, values):
    Image.fromarray(np.tile(np.float32(values), (4, 2))).save(tmp_path / "x.tiff")
    code, out, err = run(tmp_path / "x.tiff", f"--run-dir={folder}")
    assert (code, out) == (1, "") and "in no usual range" in err


def test_the_range_of_greys_is_said(run, folder, tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "x.tiff")
    code, out, err = run(tmp_path / "x.tiff", f"--run-dir={folder}")
    assert code == 0 and out and "x.tiff: its greys, up to 0.5, are taken to be of 0 to 1" in err


# ---- folders, names and sizes as people have them ------------------------------------------------


def test_what_lies_in_folders_and_is_no_picture(tmp_path):
    keep = ("b.PNG", "sub/c.jpg", "sub/d.HEIC", "z.webp")
    drop = ("._b.png", ".thumbnails/b.png", "sub/.cache/x/b.png", "ticket.pdf", "film.mpg",
            "film.mpeg", "drawing.eps", "data.h5", "data.hdf", "x.grib", "x.bufr", "notes.txt",
            "film.mp4")  # fmt: skip
    for name in (*keep, *drop):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert predict.images_in(tmp_path) == [tmp_path / name for name in keep]
    inside = tmp_path / ".thumbnails"  # who names it wants it
    assert predict.images_in(inside) == [inside / "b.png"]


@pytest.mark.parametrize("name", ["IMG_2.HEIC", "IMG_2.jpg"])
def test_heic_says_what_to_install(run, folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(pictures, "_register_heic", lambda: False)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    code, out, err = run(tmp_path, f"--run-dir={folder}")
    assert (code, out) == (1, "") and f"{name}: cannot be read (a HEIC picture: `pip install" in err
    assert "pillow-heif" in err


def test_heic_with_pillow_heif(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (64, 48), (200, 100, 50))
    heif.from_pillow(picture).save(tmp_path / "x.heic", quality=95)
    seen, note = predict.read(tmp_path / "x.heic")
    assert note == "" and np.abs(seen[:, 16, 16].astype(int) - [200, 100, 50]).max() < 8


def test_names_that_are_not_utf_8_or_not_one_line(run, folder, picture, tmp_path):
    for name in (b"caf\xe9.png", b"new\nline.png"):
        file = tmp_path / os.fsdecode(name)
        Image.fromarray(picture).save(file, "PNG")
    (tmp_path / os.fsdecode(b"\xff.png")).touch()
    code, out, err = run(tmp_path, f"--run-dir={folder}", "--top=1")
    assert code == 1 and len(out.splitlines()) == 2 and r"caf\udce9.png  " in out
    assert r"new\nline.png  " in out and r"\udcff.png: is not an image" in err
    code, out, _ = run(tmp_path, f"--run-dir={folder}", "--top=1", "--json")
    names = [json.loads(line)["file"] for line in out.splitlines()]
    assert [n.removeprefix(f"{tmp_path}/") for n in names] == [r"caf\udce9.png", "new\nline.png"]
    for name in names:
        name.encode()  # no surrogates


def test_an_answer_does_not_depend_on_the_other_pictures(run, tmp_path, small):
    """The report's activation scales are those of a batch."""
    model = small(1)
    scheme = quantizers.quantize_reference(model, 4, 4)
    names = ["a\nb", *"bcdefghij"]
    checkpoint.save(
        tmp_path / "x.pth", "quantized", model, train.Settings(), None, metrics={},
        data={"classes": names, "val_size": 50}, quantization=scheme,
    )  # fmt: skip
    pictures_of, answers = synthetic.make(4, 1)[0], []
    for number, picture in enumerate(pictures_of):
        Image.fromarray(picture if number else picture // 8).save(tmp_path / f"{number}.png")
    flags = (f"--model={tmp_path}/x.pth", "--top=10")
    for number in range(4):
        answers.append(run(tmp_path / f"{number}.png", *flags)[1])
    code, out, _ = run(tmp_path, *flags)
    assert code == 0 and out == "".join(answers) and r"  a\nb " in out


MEMORY = """
import resource, sys
from pathlib import Path
import predict
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image, note = predict.read(Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, int(image.mean()), note)
"""


def test_jpegs_of_100_megapixels_take_little_memory(tmp_path):
    Image.new("L", (12000, 9000), 80).save(tmp_path / "large.jpg")
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "large.jpg")],
        cwd=Path(predict.__file__).parent, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert int(out[0]) < 50_000 and out[1:] == ["80"]  # KB; 108,000 and more for all pixels


def test_large_jpegs_look_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8))
    small.resize((2000, 1600), Image.Resampling.BICUBIC).save(tmp_path / "x.jpg", quality=95)
    whole = predict.read(tmp_path / "x.jpg")[0].astype(int)
    monkeypatch.setattr(predict, "LARGE", 1_000_000)
    assert np.abs(predict.read(tmp_path / "x.jpg")[0] - whole).max() <= 4


def test_decompression_bombs_say_how_to_allow_them(run, folder, tmp_path):
    Image.new("1", (3000, 1000)).save(tmp_path / "x.png")
    flags = (tmp_path / "x.png", f"--run-dir={folder}", "--top=1")
    code, out, err = run(*flags, "--max-megapixels=2")
    assert (code, out) == (1, "") and "x.png: has 3 megapixels, more than --max-megapixels" in err
    assert run(*flags, "--max-megapixels=3")[0] == 0 and run(*flags)[0] == 0
    assert run(*flags, "--max-megapixels=0")[0] == 2
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3  # Pillow's own, as before


def test_classes_that_no_file_names_are_said_to_be_assumed(run, folder, tmp_path, picture):
    torch.save(MobileNetV2(standard(0.1)).state_dict(), tmp_path / "plain.pth")
    Image.fromarray(picture).save(tmp_path / "x.png")
    flags = (tmp_path / "x.png", f"--model={tmp_path / 'plain.pth'}", "--assume-downsample=4")
    said = "plain.pth does not name its classes: taken to be CIFAR-10's\n"
    code, out, err = run(*flags)
    assert code == 0 and out and err.endswith(said)
    assert not run(tmp_path / "x.png", f"--run-dir={folder}")[2]
    sparse_compress.main([f"--run-dir={tmp_path}", f"--parent={tmp_path / 'plain.pth'}",
                          "--assume-downsample=4"])  # fmt: skip
    # The fixture `run` reads what was said since.
    assert run(*flags)[2] == 2 * f"{tmp_path}/{said}"


def test_no_answer_comes_of_a_network_that_is_broken(run, tmp_path, picture):
    model = MobileNetV2(standard(0.1))
    model.stem[1].running_var.fill_(-1)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    Image.fromarray(picture).save(tmp_path / "x.png")
    code, out, err = run(tmp_path / "x.png", f"--model={tmp_path / 'plain.pth'}",
                         "--assume-downsample=4")  # fmt: skip
    assert (code, out) == (1, "") and err.endswith("answers with NaN or infinite logits\n")


def test_postscript_is_not_given_to_ghostscript(run, folder, tmp_path):
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    )
    code, out, err = run(tmp_path / "x.png", f"--run-dir={folder}")
    assert (code, out) == (1, "") and "x.png: is not an image in a format" in err


def test_a_plain_state_dict_of_a_hundred_classes_has_numbers_for_names(run, tmp_path, picture):
    torch.save(MobileNetV2(standard(0.1, classes=100)).state_dict(), tmp_path / "plain.pth")
    Image.fromarray(picture).save(tmp_path / "x.png")
    code, out, _ = run(tmp_path / "x.png", f"--model={tmp_path / 'plain.pth'}",
                       "--assume-downsample=4", "--json", "--top=100")  # fmt: skip
    found = {pair["class"] for pair in json.loads(out.splitlines()[-1])["top"]}
    assert code == 0 and found == set(map(str, range(100)))


def test_a_hundred_classes_of_unusual_names(run, tmp_path, picture):
    names = ["a b", "quote\"d", "ünï", "图片", "back\\slash", "😀", *map(str, range(94))]
    settings = standard(0.1, classes=100)
    scheme = ptq.make_scheme(8, 8)
    torch.manual_seed(0)
    model = MobileNetV2(settings).eval()
    images = data.normalize(torch.from_numpy(synthetic.make(64, 1)[0]).permute(0, 3, 1, 2))
    model, _ = ptq.quantize(model, images, scheme)
    checkpoint.save(
        tmp_path / "checkpoints/quantized.pth", "quantized", model, train.Settings(), None,
        metrics={}, data={"source": "images", "classes": names, "val_size": 100},
        quantization=scheme,
    )  # fmt: skip
    source = checkpoint.load(tmp_path / "checkpoints/quantized.pth")
    runtime.export(source, tmp_path / "checkpoints/int8.onnx")
    sparse_compress.main([f"--run-dir={tmp_path}", f"--parent={source.file}"])
    Image.fromarray(picture).save(tmp_path / "x.png")
    for name in ("quantized.pth", "int8.onnx", "compressed.nnz"):
        file = tmp_path / "checkpoints" / name
        assert runtime.load(file).data["classes"] == names
        code, out, _ = run(tmp_path / "x.png", f"--model={file}", "--json", "--top=100")
        found = {pair["class"] for pair in json.loads(out.splitlines()[-1])["top"]}
        assert code == 0 and found == set(names)
