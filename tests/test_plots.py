"""Every chart: a whole PNG on ordinary and on edge inputs, nothing at all when it fails."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lib import plots
from models.layers import roles
from models.mobilenetv2 import standard

ODD_NAMES = ["$x$", "图", "x" * 90, "$", *map(str, range(96))]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """The same layout in inches, fewer pixels to draw: the tests take a third of the time."""
    monkeypatch.setattr(plots, "DPI", 60)


def history(epochs, **changed):
    return [{"epoch": e, "train_loss": 2 / e, "train_accuracy": 1 - 0.6 / e, "val_loss": 2.1 / e,
             "val_accuracy": 1 - 0.7 / e, "lr": 0.1 / e, **changed} for e in range(1, epochs + 1)]


def counts(errors):
    rng = np.random.default_rng(0)
    return np.diag([100] * 10) + rng.integers(0, errors + 1, (10, 10)) * ~np.eye(10, dtype=bool)


def layers(share):
    return [{"layer": name, "role": role, "weights": 1000 + 10 * i,
             "nonzeros": int(share * (1000 + 9 * i))}
            for i, (name, role) in enumerate(roles(standard()).items())]


def rounds(n):
    return [{"round": r, "sparsity": 1 - 0.8**r, "val_accuracy": 0.95 - 1e-4 * r**2}
            for r in range(n)]


def cells(weight_bits, act_bits, accuracy=None):
    return [{"weight_bits": w, "act_bits": a, "bytes": 10_000 * w + 300_000,
             "accuracy": 0.95 - 3 / w**3 - 3 / a**3 if accuracy is None else accuracy}
            for w in weight_bits for a in act_bits]


BITS = (32, 16, 12, 8, 6, 4)
FILES = [("baseline.pth", {"weights: values": 8_810_240, "BN, biases, scales": 272_936}),
         ("compressed.nnz", {"weights: values": 96_871, "weights: indices": 300_000,
                             "BN, biases, scales": 273_000, "metadata": 6_000}),
         ("coded.nnz", {"weights: values": 50_000, "metadata": 1_400, "nothing": 0})]
STAGES = [{"stage": stage, "bytes": size, "correct": correct, "total": 1000}
          for stage, size, correct in (("baseline", 9_195_684, 949), ("int8", 2_591_596, 938),
                                       ("compressed", 70_400, 940))]
SPEED = [{"network": network, "threads": threads, "batch": batch, "milliseconds": 8.0 * batch,
          "images_per_second": 125.0 * threads, "ratio": 1.0, "correct": 949, "total": 1000}
         for threads in (1, 2) for batch in (1, 250) for network in ("fp32, torch", "int8")]
CHARTS = {
    "curves": (plots.curves, history(30)),
    "curves, one epoch": (plots.curves, history(1)),
    "curves, no validation": (plots.curves, history(3, val_loss=None, val_accuracy=None)),
    "curves, bare": (plots.curves, [{"epoch": 0, "train_loss": 2.3, "train_accuracy": 0.0}]),
    "curves, diverged": (plots.curves, history(3, train_loss=float("nan"), lr=0.0)),
    "confusion": (plots.confusion, counts(9), CLASSES),
    "confusion, no errors": (plots.confusion, counts(0), CLASSES),
    "confusion, no images": (plots.confusion, np.zeros((10, 10), int), CLASSES),
    "confusion, all wrong": (plots.confusion, np.roll(counts(0), 1, axis=1), CLASSES),
    "layers": (plots.layer_sparsity, layers(0.05)),
    "layers, none left": (plots.layer_sparsity, layers(0)),
    "layers, one": (plots.layer_sparsity, layers(1)[:1]),
    "sensitivity": (plots.sensitivity, [row | {"weight_bits": bits, "accuracy": 0.9 - 0.1 / bits,
                                               "total": 1000}
                                        for row in layers(0.05) for bits in (4, 2)], 0.9),
    "rounds": (plots.accuracy_sparsity, rounds(18), 16, 0.93),
    "rounds, one": (plots.accuracy_sparsity, rounds(1), 0, 0.93),
    "rounds, many": (plots.accuracy_sparsity, rounds(35), 34, 0.7),
    "rounds, nothing left": (plots.accuracy_sparsity,
                             [{"round": 1, "sparsity": 1.0, "val_accuracy": 0.0}], 0, -0.2),
    "rate": (plots.accuracy_bytes, [{**cell, "rd_lambda": r, "bytes": cell["bytes"] / (1 + r)}
                          for r in (0, 0.1, 0.5) for cell in cells([8, 4], [8])]),
    "rate, one file": (plots.accuracy_bytes, [{**cells([8], [8])[0], "rd_lambda": 0.5}]),
    "rate, all wrong": (plots.accuracy_bytes, [{**cells([8], [8], 0.0)[0], "rd_lambda": 0.5}]),
    "heatmap": (plots.heatmap, cells(BITS, BITS)),
    "heatmap, one cell": (plots.heatmap, cells([8], [8])),
    "heatmap, holes": (plots.heatmap, cells(BITS, BITS)[:-3]),
    "heatmap, zero": (plots.heatmap, cells([8, 4], [8], 0.0)),
    "parallel": (plots.parallel_coordinates, cells(BITS, BITS)),
    "parallel, one cell": (plots.parallel_coordinates, cells([8], [8])),
    "parallel, zero": (plots.parallel_coordinates, cells([8, 4], [8], 0.0)),
    "storage": (plots.storage, FILES),
    "storage, one file": (plots.storage, FILES[-1:]),
    "storage, empty file": (plots.storage, [("empty", {})]),
    "stages": (plots.stages, STAGES),
    "stages, one": (plots.stages, STAGES[:1]),
    "stages, zero": (plots.stages, [{"stage": "a", "bytes": 0, "correct": 0, "total": 0}]),
    "curve": (plots.size_curve, [{"group": group, "label": f"{size}", "bytes": size, "total": 1000,
                                  "correct": 900 + 10 * gain + size // 2000}
                                 for gain, group in enumerate(("PTQ", "QAT"))
                                 for size in (50_000, 60_000, 80_000)]),
    "curve, one file": (plots.size_curve, [{"group": "", "label": "", "bytes": 9, "correct": 0,
                                            "total": 10}]),
    "speed": (plots.speed, SPEED),
    "speed, one": (plots.speed, SPEED[:1]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CHARTS)
def test_writes_a_whole_png(name, tmp_path):
    draw, *data = CHARTS[name]
    path = tmp_path / "new" / "chart.png"
    assert draw(*data, path, f"{name}, n = 1,000") == path
    assert [file.name for file in path.parent.iterdir()] == ["chart.png"]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(path) as image:
        image.load()  # decodes every row: a cut file raises
        assert image.width == 9 * 60
        assert 70 < image.height < 450
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_no_part_of_a_name_is_a_formula(tmp_path):
    for names in (["$1_$", "a$b_$"], ["x", os.fsdecode(b"caf\xe9")]):
        path = plots.confusion(np.eye(2, dtype=int)[::-1], names, tmp_path / "a.png", names[1])
        assert path.is_file()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [100, 300])
def test_confusion_of_many_classes_has_a_row_for_each_and_odd_names(tmp_path, classes):
    names = (ODD_NAMES + [f"class {i}" for i in range(300)])[:classes]
    matrix = np.eye(classes, dtype=int) * 3 + (np.arange(classes) == 1)
    path = plots.confusion(matrix, names, tmp_path / "a.png", "t")
    with Image.open(path) as image:
        image.load()
        assert image.width == 9 * 60 and 10 * 60 < image.height < 25 * 60


def test_the_epoch_that_is_marked_is_that_of_the_best_score(tmp_path, monkeypatch):
    notes, figure = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *a, **k: notes.append(a[1]) or figure(*a, **k))
    lines = [{"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 1.0,
              "val_accuracy": 0.8, "score": -1.0},
             {"epoch": 2, "train_loss": 0.9, "train_accuracy": 0.6, "val_loss": 0.9,
              "val_accuracy": 0.9, "score": -2.0}]  # fmt: skip
    plots.curves(lines, tmp_path / "a.png", "")
    plots.curves(
        [{k: v for k, v in x.items() if k != "score"} for x in lines], tmp_path / "b.png", ""
    )
    assert "best epoch, 1, validation 80.00%" in notes[0]
    assert "best epoch, 2, validation 90.00%" in notes[1]


def test_the_floor_and_the_saved_round_show(tmp_path):
    path, cases = tmp_path / "a.png", ((17, 0.93), (17, 0.92), (3, 0.93), (17, 0.1))
    charts = [plots.accuracy_sparsity(rounds(18), *case, path, "t").read_bytes() for case in cases]
    assert len(set(charts)) == 4


def test_the_same_data_give_the_same_bytes(tmp_path):
    pair = [plots.heatmap(cells(BITS, BITS), tmp_path / f"{i}.png", "t") for i in range(2)]
    assert pair[0].read_bytes() == pair[1].read_bytes()


def test_the_data_are_not_changed(tmp_path):
    rows = [{**cell, "rd_lambda": r} for r in (0.5, 0) for cell in cells([4, 8], [8])]
    before = copy.deepcopy(rows)
    plots.accuracy_bytes(rows, tmp_path / "a.png", "t")
    assert rows == before


@pytest.mark.parametrize(("draw", "others"), [
    (plots.curves, ()), (plots.layer_sparsity, ()), (plots.sensitivity, (0.9,)),
    (plots.accuracy_sparsity, (0, 0.9)), (plots.heatmap, ()), (plots.accuracy_bytes, ()),
    (plots.parallel_coordinates, ()), (plots.storage, ()), (plots.stages, ()), (plots.speed, ()),
    (plots.size_curve, ())])
def test_nothing_to_plot_is_an_error(draw, others, tmp_path):
    with pytest.raises(ValueError, match="nothing to plot"):
        draw([], *others, tmp_path / "a.png", "t")
    assert not list(tmp_path.iterdir())


def test_a_matrix_that_does_not_fit_its_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(10, 10\) for 9 classes"):
        plots.confusion(counts(3), CLASSES[:9], tmp_path / "a.png", "t")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(self, file, **_):
        file.write(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plots.stages(STAGES, path, "t")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"old"


def test_a_failed_rename_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.png"
    path.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError):
        plots.stages(STAGES, path, "t")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_pyplot_is_never_loaded_by_the_module():
    code = "import sys, lib.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (812, "812 B"), (999, "999 B"), (1000, "1.00 KB"), (70_400, "70.4 KB"),
    (999_400, "999 KB"), (999_600, "1.00 MB"), (1_040_842, "1.04 MB"), (9_999_000, "10.0 MB"),
    (123_456_789, "123 MB"), (1_234_567_890, "1235 MB")])
def test_sizes_in_words(count, text):
    assert plots._size(count) == text


def test_marks_of_the_rate_show_wherever_they_are(tmp_path):
    files = [{**cell, "rd_lambda": 0} for cell in cells([8, 4], [8])]
    marks = [{}, {"near": (files[0]["bytes"], 0.9)}, {"far": (10**9, 0.9)}, {"best": (9, 1.0)}]
    path = tmp_path / "a.png"
    drawn = [plots.accuracy_bytes(files, path, "t", mark).read_bytes() for mark in marks]
    assert len(set(drawn)) == 4


def test_tables_of_images_show_each_image_in_its_cell(tmp_path, monkeypatch):
    images = np.zeros((2, 3, 32, 32, 3), np.uint8)
    images[1, 2] = (0, 200, 0)
    path = tmp_path / "new" / "tables.png"
    table = ("A table", images, ["first", "second"], ["a", "b", "c"])
    assert plots.image_tables([table, table], path) == path
    assert [file.name for file in path.parent.iterdir()] == ["tables.png"]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    green, black = (pixels == (0, 200, 0)).all(2), (pixels == 0).all(2)
    left = np.arange(pixels.shape[1]) < pixels.shape[1] / 2
    for half in (left, ~left):
        y, x = (axis.mean() for axis in np.nonzero(green[:, half]))
        dark_y, dark_x = (axis.mean() for axis in np.nonzero(black[:, half]))
        assert y > dark_y and x > dark_x  # the last row and column
