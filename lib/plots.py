"""The project's charts: plain data in, one PNG out.

Every function takes lists, dicts or arrays, a path and a title, writes the PNG atomically and
returns its path. Accuracies and sparsities come as fractions and are shown in percent; KB and
MB are 10^3 and 10^6 bytes. Colours are Okabe and Ito's (safe for the colour-blind) and plasma's.
Figures are plain `Figure` objects on Agg, no pyplot and no global state; they are 9 inches wide, so
that their text has its nominal size at a README's 900 pixels.
"""

import math
import textwrap
import warnings
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lib.files import atomic, printable
from lib.metrics import wilson
from models import layers

WIDTH, DPI = 9.0, 160  # inches; 1440 pixels, for screens that show more than 900
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PINK = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
INK, MUTED, GREY, PALE = "#222222", "#666666", "#999999", "#A9CCE3"
# For parts of a file and numbers of threads: neighbours are easy to tell apart.
PALETTE = (BLUE, ORANGE, SKY, GREEN, PINK, YELLOW, RED, GREY, PALE, "#7A2E00", "#B7D7A8", MUTED)
ROLE_COLOURS = {layers.STEM: BLACK, layers.EXPAND: BLUE, layers.DEPTHWISE: RED,
                layers.PROJECT: SKY, layers.HEAD: ORANGE, layers.CLASSIFIER: GREEN}
ERRORS = LinearSegmentedColormap.from_list("errors", ["#FFFFFF", "#F9C78B", RED, "#7A2E00"])
# Dark is good. Plasma without its yellow end, which would vanish as a line on white.
BELOW_BEST = LinearSegmentedColormap.from_list(
    "below best", ["#1B0C87", "#6A00A8", "#B12A90", "#E16462", "#FCA636"])
HALO = [withStroke(linewidth=3, foreground="white")]


# ---- shared --------------------------------------------------------------------------------------


def _plain(text):
    """Return a text that may hold names of files or classes as it can be drawn: in one line, and
    no part of it a formula."""
    return printable(text).replace("$", r"\$")


def _figure(title, note, height, key=None):
    """Return a figure: a title, a note and a key {label: colour} above `height` inches of axes."""
    lines = textwrap.wrap(_plain(title), 84) or [""]
    notes = textwrap.wrap(_plain(note), 130)
    columns = min(len(key), 4 if max(map(len, key)) > 17 else 7) if key else 1
    key_rows = math.ceil(len(key or ()) / columns)
    heads = [0.1, 0.22 * len(lines), 0.18 * len(notes), 0.22 * key_rows]  # inches, from the top
    total = height + sum(heads) + 0.04
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0.006, 0, 0.988, height / total), w_pad=0.08, h_pad=0.06)
    tops = 1 - np.cumsum(heads) / total
    figure.text(0.012, tops[0], "\n".join(lines), va="top", weight="bold", size=12, color=INK)
    figure.text(0.012, tops[1], "\n".join(notes), va="top", size=9.5, color=MUTED)
    if key:
        figure.legend([Patch(color=colour) for colour in key.values()], list(key), ncols=columns,
                      loc="upper left", bbox_to_anchor=(0.006, tops[2]), frameon=False,
                      fontsize=9.5, handlelength=0.9, handletextpad=0.4, columnspacing=1.3,
                      borderaxespad=0.2, borderpad=0.2)
    return figure


def _style_axes(ax, title="", grid=None):
    """Style axes: thin and grey on the sides that carry a scale, grid lines behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(color=GREY, labelcolor=INK, labelsize=9.5)
    ax.set_title(title, loc="left", size=10.5, color=INK)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color="#E4E4E4", linewidth=0.8)


def _label(ax, text, at, offset, side=False, **style):
    """Write text at a data point plus an offset in points of 1/72 inch.

    side: x of the point is a fraction of the axes' width.
    """
    style = {"size": 10, "va": "center", "color": INK, "path_effects": HALO, **style}
    ax.annotate(text, at, offset, textcoords="offset points", annotation_clip=False,
                xycoords=("axes fraction", "data") if side else "data", **style)


def _accuracy_column(ax, y, correct, total, digits=1):
    """Draw one accuracy per row, in percent: a dot, its 95% Wilson interval, the number beside it.

    y: where each row is. correct, total: numbers of images per row; without images there is no dot.
    digits: decimal places of the numbers; None: no numbers and small marks, for very many rows.
    """
    width, size = (1, 3) if digits is None else (2, 8)
    for height, hits, images in zip(y, correct, total, strict=True):
        if images:
            low, high = wilson(hits, images)
            ax.hlines(height, 100 * low, 100 * high, color=BLUE, linewidth=width)
            ax.plot(100 * hits / images, height, "o", color=BLUE, ms=size)
        if digits is not None:
            text = f"{100 * hits / images:.{digits}f}" if images else "none"
            _label(ax, text, (1, height), (6, 0), side=True)


def _save(figure, path):
    """Write a figure as a PNG file, whole or not at all; return the file's path."""
    with atomic(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # classes may have names that no font holds
        figure.savefig(file, format="png", dpi=DPI)
    return Path(path)


def _nonempty(rows):
    """Return the rows as a list; raise ValueError if there are none."""
    rows = list(rows)
    if not rows:
        raise ValueError("nothing to plot: the list is empty")
    return rows


def _column(rows, key):
    """Return what the rows have under a key as floats: NaN where it is missing or None."""
    return np.array([math.nan if row.get(key) is None else float(row[key]) for row in rows])


def _counted(count, noun):
    """Format a count with its noun: 1 epoch, 30 epochs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(count, digits=3):
    """Format a number of bytes with at least `digits` digits: 812 B, 70.4 KB, 1.04 MB."""
    for unit, scale in (("MB", 1e6), ("KB", 1e3)):
        if count >= 0.9995 * scale:
            whole = len(str(int(float(f"{count / scale:.{digits}g}"))))
            return f"{count / scale:.{max(0, digits - whole)}f} {unit}"
    return f"{count:.0f} B"


def _times_smaller(first, count):
    """Format how many times fewer bytes `count` is than `first`: 2.7× or 129×."""
    ratio = first / max(count, 1)
    return f"{ratio:.{1 if ratio < 99.95 else 0}f}×"


def _contrast(colour):
    """Return black or white, whichever is easier to read on an RGBA colour."""
    return "white" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"


# ---- training and evaluation ---------------------------------------------------------------------


def curves(history, path, title):
    """Draw loss, accuracy and learning rate against the epoch; the best epoch is marked.

    history: dicts of epoch, train_loss, train_accuracy, val_loss, val_accuracy, lr, score; a val_*
    or lr that is None or missing is left out. The best epoch is that of the highest score, or
    without scores of the highest validation accuracy.
    """
    history = _nonempty(history)
    epoch, lr, val = (_column(history, key) for key in ("epoch", "lr", "val_accuracy"))
    score = _column(history, "score")
    best = int(np.nanargmax(score if np.isfinite(score).any() else val)) if (
        np.isfinite(val).any()) else None
    note = "no validation split" if best is None else (
        f"dotted line: the best epoch, {epoch[best]:g}, validation {100 * val[best]:.2f}%")
    figure = _figure(title, f"{_counted(len(history), 'epoch')}; {note}", 3.9)
    names, ratios = [["loss", "accuracy"]], None
    if np.isfinite(lr).any():
        names, ratios = [["loss", "accuracy"], ["lr", "accuracy"]], [4, 1]
    axes = figure.subplot_mosaic(names, height_ratios=ratios)
    pad = 0.02 * np.ptp(epoch) or 1
    dots = {"marker": "o", "ms": 4} if len(history) < 9 else {}

    for name, scale, text in (("loss", 1, "cross-entropy loss"), ("accuracy", 100, "accuracy (%)")):
        ax, ends = axes[name], []
        _style_axes(ax, text, "y")
        for split, colour in (("train", ORANGE), ("val", BLUE)):
            line = scale * _column(history, f"{split}_{name}")
            seen = np.isfinite(line)
            if seen.any():
                ax.plot(epoch[seen], line[seen], color=colour, linewidth=1.6, **dots)
                ends.append([line[seen][-1], {"val": "validation"}.get(split, split), colour])
        ends.sort(key=lambda end: end[0])
        gap = 0.06 * np.ptp(ax.get_ylim())
        push = max(0, gap - (ends[-1][0] - ends[0][0])) / 2 if len(ends) == 2 else 0
        for (y, text, colour), sign in zip(ends, (-1, 1), strict=False):
            _label(ax, text, (epoch.max(), y + sign * push), (9, 0), color=colour, weight="bold")
    if "lr" in axes:
        _style_axes(axes["lr"], "learning rate", "y")
        axes["lr"].plot(epoch, lr, color=MUTED, linewidth=1.4, **dots)
        peak = max(np.nanmax(lr), 1e-12)
        axes["lr"].set_ylim(0, 1.15 * peak)
        axes["lr"].set_yticks([0, peak], ["0", f"{peak:.3g}"])
        axes["loss"].tick_params(labelbottom=False)
    for name, ax in axes.items():
        ax.set_xlim(epoch.min() - pad, epoch.max() + pad)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if name != "loss" or "lr" not in axes:
            ax.set_xlabel("epoch")
        if best is not None:
            ax.axvline(epoch[best], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    if best is not None:
        axes["accuracy"].plot(epoch[best], 100 * val[best], "o", ms=7, mfc="white", mec=BLUE,
                              mew=2, zorder=5)
    return _save(figure, path)


def confusion(matrix, classes, path, title):
    """Draw a confusion matrix, and each class's accuracy with its 95% Wilson interval.

    Errors are coloured by their share of the true class's images; the diagonal is grey. With more
    than 20 classes, cells have no counts and predicted classes, in the order of the true ones, no
    names; with more than 200, true classes have no names either.

    matrix: numbers of images, (true class, predicted class). Raises ValueError if it is not square
    over the classes.
    """
    matrix, k = np.asarray(matrix).astype(int), len(classes)
    few, size = k <= 20, 9.5 if k <= 12 else 7  # points: what fits into a cell
    names = [name if len(name) < 25 else name[:24] + "…" for name in classes]
    if matrix.shape != (k, k):
        raise ValueError(f"a confusion matrix of shape {matrix.shape} for {k} classes")
    total, hits, counts = int(matrix.sum()), np.diag(matrix), matrix.sum(1)
    errors = matrix * ~np.eye(k, dtype=bool)
    worst = [divmod(int(i), k) for i in np.argsort(-errors, axis=None, kind="stable")[:3]]
    worst = [f"{names[i]} → {names[j]} ({errors[i, j]:,})" for i, j in worst if errors[i, j]]
    figure = _figure(title, f"{hits.sum():,} of {total:,} correct "
                     f"({100 * hits.sum() / max(total, 1):.2f}%). "
                     + ("Most frequent errors: " + ", ".join(worst) if worst else "No errors"),
                     max(4.9, 0.11 * min(k, 200)))
    left, right = figure.subplots(1, 2, width_ratios=[2.5, 1], sharey=True)
    share = errors / np.maximum(counts, 1)[:, None]
    share = share / (share.max() or 1)
    colours = ERRORS(share)
    colours[np.arange(k), np.arange(k)] = (0.91, 0.91, 0.91, 1)
    left.imshow(colours, aspect="auto")
    for i, j in np.ndindex(k, k) if few else ():
        left.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", size=size,
                  weight="bold" if i == j else "normal",
                  color=_contrast(colours[i, j]) if matrix[i, j] else "#BBBBBB")
    _style_axes(left, "images; darker: a larger share of the true class")
    names = [_plain(name) for name in names]
    left.set_xticks(range(k) if few else [], names if few else [], rotation=35, ha="right",
                    rotation_mode="anchor")
    left.set_yticks(range(k) if k <= 200 else [], names if k <= 200 else [])
    left.set(xlabel="predicted class" + ("" if few else ", in the order of the true classes"),
             ylabel="true class")
    _style_axes(right, "accuracy by class", "x")
    _accuracy_column(right, range(k), hits, counts, digits=1 if few else None)
    right.set_xlim(right=100)
    right.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    right.set_xlabel("%, with 95% interval")
    right.tick_params(axis="y", labelleft=False)
    if not few:
        left.tick_params(axis="y", labelsize=size)
    for ax in (left, right):
        ax.tick_params(length=0)
    return _save(figure, path)


# ---- pruning -------------------------------------------------------------------------------------


def layer_sparsity(rows, path, title):
    """Draw the sparsity of each layer, and each layer's share of the weights that remain.

    rows: dicts of layer, role (see models/layers.py), weights, nonzeros, in network order.
    """
    rows = _nonempty(rows)
    weights, left = _column(rows, "weights"), _column(rows, "nonzeros")

    def sparsity(some):
        return 100 * (1 - left[some].sum() / max(weights[some].sum(), 1))

    roles = np.array([row["role"] for row in rows])
    colours = [ROLE_COLOURS[role] for role in roles]
    key = {f"{role} {sparsity(roles == role):.1f}%": colour
           for role, colour in ROLE_COLOURS.items() if role in roles}
    empty = f" ({(left == 0).sum()} of them empty)" if (left == 0).any() else ""
    figure = _figure(title, f"{left.sum():,.0f} of {weights.sum():,.0f} weights remain in "
                     f"{len(rows)} layers{empty}; sparsity of each kind of layer:", 4.4, key)
    top, bottom = figure.subplots(2, 1, sharex=True)
    x, dense = np.arange(len(rows)), 100 * weights / max(weights.sum(), 1)
    _style_axes(top, "sparsity (%)", "y")
    top.bar(x, [sparsity(x == i) for i in x], color=colours, width=0.78)
    top.axhline(sparsity(x >= 0), color=INK, linewidth=1, linestyle=(0, (4, 3)))
    _label(top, f"all\n{sparsity(x >= 0):.1f}%", (1, sparsity(x >= 0)), (4, 0), side=True)
    top.set_ylim(0, 104)
    _style_axes(bottom, "share (%) of the remaining weights; grey lines: of all weights", "y")
    bottom.bar(x, 100 * left / max(left.sum(), 1), color=colours, width=0.78)
    bottom.hlines(dense, x - 0.45, x + 0.45, color=MUTED, linewidth=1.6)
    _layer_axis((top, bottom), rows)
    return _save(figure, path)


def _layer_axis(axes, rows):
    """Draw the x axis of layers that axes share, from top to bottom.

    Every second block is shaded; the numbers of the blocks are below the last axes. rows: dicts of
    layer and role, one per layer.
    """
    # Layers are named features.N.(...), apart from the classifier, whose label is too wide for one
    # line with the numbers.
    blocks = ["\nclassifier" if row["role"] == layers.CLASSIFIER else row["layer"].split(".")[1]
              for row in rows]
    starts = [i for i in range(len(rows)) if i == 0 or blocks[i] != blocks[i - 1]]
    ends = [*starts[1:], len(rows)]
    for ax in axes:
        for start, end in list(zip(starts, ends, strict=True))[::2]:
            ax.axvspan(start - 0.5, end - 0.5, color="#F5F5F5", zorder=0)
        ax.tick_params(axis="x", length=0)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axes[-1].set_xticks(middles, [blocks[i] for i in starts])
    axes[-1].set_xlim(-0.6, len(rows) - 0.4)
    axes[-1].set_xlabel("layers in network order, grouped by N in features.N")


def sensitivity(rows, accuracy, path, title):
    """Draw the percentage points of accuracy lost when one layer's weights alone have few bits.

    There is one panel per bit-width, each with its own scale, and below them one of the layers'
    non-zero weights.

    rows: dicts of layer, role (see models/layers.py), weight_bits, accuracy, total (images),
    nonzeros; the layers in network order. accuracy: of the fp32 network.
    """
    rows = _nonempty(rows)
    by_layer = list({row["layer"]: row for row in rows}.values())
    colours = [ROLE_COLOURS[row["role"]] for row in by_layer]
    widths = sorted({row["weight_bits"] for row in rows}, reverse=True)
    key = {role: colour for role, colour in ROLE_COLOURS.items() if colour in colours}
    images = rows[0]["total"]
    note = (f"all other layers and all activations in fp32; fp32 network: {100 * accuracy:.2f}% "
            f"(n = {images:,}); one image is {100 / images:.2g} points")
    figure = _figure(title, note, 1.5 + 1.7 * len(widths), key)
    axes = np.atleast_1d(figure.subplots(len(widths) + 1, 1, sharex=True))
    for ax, bits in zip(axes, widths, strict=False):
        lost = {row["layer"]: 100 * (accuracy - row["accuracy"]) for row in rows
                if row["weight_bits"] == bits}
        _style_axes(ax, f"accuracy lost at {bits} bits (percentage points)", "y")
        ax.bar(range(len(by_layer)), [lost[row["layer"]] for row in by_layer], color=colours,
               width=0.78)
        ax.axhline(0, color=GREY, linewidth=0.8)
    _style_axes(axes[-1], "non-zero weights (thousands)", "y")
    axes[-1].bar(range(len(by_layer)), _column(by_layer, "nonzeros") / 1000, color=colours,
                 width=0.78)
    _layer_axis(axes, by_layer)
    return _save(figure, path)


def accuracy_sparsity(rounds, saved, floor, path, title):
    """Draw validation accuracy against sparsity, on a log scale of the weights that remain.

    rounds: dicts of round, sparsity, val_accuracy, from the densest to the sparsest. saved: index
    of the round whose network was saved. floor: the lowest accuracy that may be saved.
    """
    rounds = _nonempty(rounds)
    sparsity, accuracy = _column(rounds, "sparsity"), 100 * _column(rounds, "val_accuracy")
    x = -np.log10(np.maximum(1 - sparsity, 1e-4))
    note = (f"one point per round, 0: the parent; saved: round {rounds[saved]['round']}, "
            f"{100 * sparsity[saved]:.2f}% sparse, accuracy {accuracy[saved]:.2f}%")
    low, high = accuracy.min(), accuracy.max()
    # A floor far below the points would leave them no room.
    far = low - 100 * floor > 2 * max(high - low, 1)
    note += f"; floor {100 * floor:.2f}%" if far else ""
    figure = _figure(title, note, 3.9)
    ax = figure.subplots()
    _style_axes(ax, "validation accuracy (%)", "both")
    ax.plot(x, accuracy, color=BLUE, linewidth=1.5, marker="o", ms=5, zorder=3)
    for i in range(0, len(rounds), math.ceil(len(rounds) / 30)):
        offset = (6, 11) if i == saved else (3, 8)  # outside the ring
        _label(ax, rounds[i]["round"], (x[i], accuracy[i]), offset, size=8.5, color=MUTED)
    if not far:
        low, high = min(low, 100 * floor), max(high, 100 * floor)
        ax.axhline(100 * floor, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
        _label(ax, f"floor {100 * floor:.2f}%", (0, 100 * floor), (4, -9), side=True, color=RED)
    at = x[saved], accuracy[saved]
    ax.plot(*at, "o", ms=11, mfc="none", mec=INK, mew=1.8, zorder=4)
    rises = saved and accuracy[saved - 1] < accuracy[saved]  # then the line is below the point
    _label(ax, "saved", at, (0, 24 if rises else -19), ha="center", weight="bold")
    pad, right = 0.14 * max(high - low, 1), max(x.max(), 0.31) + 0.08
    marks = np.array([0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999])
    marks = marks[-np.log10(1 - marks) <= right]
    ax.set_xticks(-np.log10(1 - marks), [f"{100 * m:g}%\n{1 / (1 - m):.0f}×" for m in marks])
    ax.set(xlim=(-0.04, right), ylim=(low - pad, high + pad),
           xlabel="sparsity, and how many times fewer weights (log scale)")
    return _save(figure, path)


# ---- the sweep of bit widths ---------------------------------------------------------------------


def _accuracy_scale(cells):
    """Return the cells as a list, their percentage points below the best, a colour scale, a note.

    The scale shows differences of tenths and of tens of points. The note names the best accuracy
    and the smallest file within a point of it.
    """
    cells = _nonempty(cells)
    accuracy = 100 * _column(cells, "accuracy")
    lost = accuracy.max() - accuracy
    log = (lambda p: np.log1p(np.asarray(p) / 0.5), lambda y: 0.5 * np.expm1(np.asarray(y)))
    near = [cell for cell, points in zip(cells, lost, strict=True) if points <= 1 + 1e-9]
    pick = min(near, key=lambda cell: (cell["bytes"], cell["act_bits"]))
    note = (f"{_counted(len(cells), 'cell')}, best {accuracy.max():.2f}%; smallest file "
            f"within a point of it: W{pick['weight_bits']}A{pick['act_bits']}, "
            f"{_size(pick['bytes'])}, {100 * pick['accuracy']:.2f}%")
    return cells, lost, FuncNorm(log, vmin=0, vmax=max(lost.max(), 2)), note


def heatmap(cells, path, title):
    """Draw accuracy by weight bits (rows) and activation bits (columns), and file sizes by row.

    cells: dicts of weight_bits, act_bits, accuracy, bytes; cells that are missing stay blank.
    """
    cells, lost, norm, note = _accuracy_scale(cells)
    rows, columns = (sorted({cell[key] for cell in cells}, reverse=True)
                     for key in ("weight_bits", "act_bits"))
    figure = _figure(title, note, 1.1 + 0.5 * max(len(rows), 4))
    ax = figure.subplots()
    grid = np.full((len(rows), len(columns)), math.nan)
    for cell, points in zip(cells, lost, strict=True):
        i, j = rows.index(cell["weight_bits"]), columns.index(cell["act_bits"])
        grid[i, j] = points
        ax.text(j, i, f"{100 * cell['accuracy']:.1f}", ha="center", va="center",
                size=12 if len(columns) < 9 else 9, color=_contrast(BELOW_BEST(norm(points))))
    image = ax.imshow(grid, cmap=BELOW_BEST, norm=norm, aspect="auto")
    for i, bits in enumerate(rows):
        sizes = [cell["bytes"] for cell in cells if cell["weight_bits"] == bits]
        ends = dict.fromkeys([_size(min(sizes)), _size(max(sizes))])
        _label(ax, " to\n".join(ends), (1, i), (6, 0), side=True, size=8.5, color=MUTED)
    _label(ax, "file size", (1, -0.5), (6, 7), side=True, size=8.5, color=MUTED)
    _style_axes(ax, "accuracy (%)")
    ax.spines[:].set_visible(False)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="both", length=0)
    ax.set(xlabel="activation bits", ylabel="weight bits")
    bar = figure.colorbar(image, ax=ax, pad=0.02, aspect=28)
    bar.set_ticks([p for p in (0, 0.5, 1, 2, 5, 10, 20, 50) if p <= norm.vmax])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda p, _: f"−{p:g}" if p else "best"))
    bar.ax.invert_yaxis()
    bar.set_label("points below the best cell (log)")
    bar.outline.set_visible(False)
    return _save(figure, path)


def accuracy_bytes(cells, path, title, marks=None, chosen=None):
    """Draw accuracy against file size on a log scale.

    There is one line per pair of weight and activation bits, and on it one point per lambda.

    cells: dicts of weight_bits, act_bits, rd_lambda, accuracy, bytes. marks: {name: (bytes,
    accuracy)} of other files. chosen: one of the cells, which the note names and a ring marks;
    None: the note names the smallest file within a percentage point of the best.
    """
    cells, marks = _nonempty(cells), marks or {}
    lines = {}
    for cell in cells:
        lines.setdefault(f"W{cell['weight_bits']}A{cell['act_bits']}", []).append(cell)
    colours = dict(zip(lines, (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK) * 9, strict=False))
    best = max(cell["accuracy"] for cell in cells)
    near = [cell for cell in cells if cell["accuracy"] >= best - 0.01 - 1e-9]
    pick = chosen or min(near, key=lambda cell: cell["bytes"])
    # What fell far is cut off: the top is where files are chosen.
    low = max(min(cell["accuracy"] for cell in cells), min(best - 0.03, pick["accuracy"] - 0.01))
    low = min([low, *(accuracy for _, accuracy in marks.values())])
    high = max([best, *(accuracy for _, accuracy in marks.values())])
    pad = 0.12 * (high - low) + 0.003
    low, high = low - pad, high + pad
    shown = [cell for cell in cells if cell["accuracy"] >= low]
    cut = len(cells) - len(shown)
    what = "chosen" if chosen else "smallest within a point"
    note = (f"{_counted(len(cells), 'file')}, labelled by lambda"
            + f" ({cut} under {100 * low:.1f}% not shown)" * (cut > 0)
            + f"; best {100 * best:.2f}%; {what}: W{pick['weight_bits']}A{pick['act_bits']} "
            f"at lambda {pick['rd_lambda']:.3g}, {_size(pick['bytes'])}, "
            f"{100 * pick['accuracy']:.2f}%")
    key = {name: colours[name] for name, points in lines.items()
           if any(cell["accuracy"] >= low for cell in points)}
    figure = _figure(title, note, 4.4, key if len(lines) > 1 else None)
    ax = figure.subplots()
    _style_axes(ax, "accuracy (%)", "both")
    if chosen:
        ax.plot(pick["bytes"], 100 * pick["accuracy"], "o", ms=12, mfc="none", color=INK, zorder=4)
    for number, (name, points) in enumerate(lines.items()):
        points.sort(key=lambda cell: cell["bytes"])
        x, y = _column(points, "bytes"), 100 * _column(points, "accuracy")
        ax.plot(x, y, color=colours[name], linewidth=1.5, marker="o", ms=5, zorder=3)
        offset, side = ((7, -7), "left") if number % 2 else ((-6, 6), "right")
        last = 0  # labels of points that are nearly one would be too
        for cell in points:
            if cell["accuracy"] >= low and cell["bytes"] > 1.04 * last:
                last = cell["bytes"]
                at = last, 100 * cell["accuracy"]
                _label(ax, f"{cell['rd_lambda']:.3g}", at, offset, ha=side, size=8.5,
                       color=colours[name])
    sizes = [cell["bytes"] for cell in shown]
    left = min([*sizes, *(size for size, _ in marks.values())]) / 1.2
    right = 2 * max(sizes)
    for name, (size, accuracy) in marks.items():
        text = f"{name}\n{_size(size)}"
        if size < right:
            ax.plot(size, 100 * accuracy, "D", color=INK, ms=6, zorder=4)
            # Away from the lines: below a file that is worse than ours, above one that is better.
            worse = any(c["bytes"] <= size and c["accuracy"] >= accuracy for c in cells)
            _label(ax, text, (size, 100 * accuracy), (0, -18 if worse else 18), ha="center", size=9)
        else:  # far to the right: an arrow, so that the rest can be told apart
            at = right, 100 * accuracy
            ax.plot(*at, ">", color=INK, ms=8, zorder=4, clip_on=False)
            _label(ax, text, at, (-9, 0), ha="right", size=9)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))  # labels of more would overlap
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(size, 1)))
    ax.set(xlim=(left, right), ylim=(100 * low, 100 * high), xlabel="file size (log scale)")
    return _save(figure, path)


def parallel_coordinates(cells, path, title):
    """Draw one line per cell through four axes: weight bits, activation bits, file size, accuracy.

    The accuracy axis is also the colour bar. Lines that share a tick are spread around it, and the
    best is drawn on top.

    cells: dicts of weight_bits, act_bits, accuracy, bytes.
    """
    cells, lost, norm, note = _accuracy_scale(cells)
    columns = [_column(cells, key) for key in ("weight_bits", "act_bits", "bytes")]
    logs = [np.log(np.maximum(column, 1)) for column in columns]
    # Log scales to 0..1; a value alone on its axis sits in the middle.
    ticks = [(v - v.min()) / np.ptp(v) if np.ptp(v) else np.full(len(v), 0.5) for v in logs]
    height = 1 - np.asarray(norm(lost), float)
    positions = [tick.copy() for tick in ticks]
    for position, tick, order in zip(positions, ticks, (ticks[1], ticks[0], ticks[1]), strict=True):
        for value in np.unique(tick):
            group = np.flatnonzero(tick == value)
            group = group[np.argsort(order[group], kind="stable")]
            reach = 0.016 if len(group) > 1 else 0
            position[group] += np.linspace(-reach, reach, len(group))
    points = np.stack([*positions, height])

    figure = _figure(title, f"{note}; log scales", 4.4)
    ax = figure.subplots()
    step = np.linspace(0, 1, 40)
    ease = step * step * (3 - 2 * step)  # flat where it meets an axis
    for i in np.argsort(-lost, kind="stable"):
        y = [points[a, i] + (points[a + 1, i] - points[a, i]) * ease for a in range(3)]
        ax.plot(np.add.outer(range(3), step).ravel(), np.ravel(y), color=BELOW_BEST(norm(lost[i])),
                linewidth=1.5, alpha=0.85)
    ax.vlines(range(3), -0.03, 1.03, color=INK, linewidth=1.2, zorder=3)
    ax.imshow(norm.inverse(np.linspace(1, 0, 256))[:, None], cmap=BELOW_BEST, norm=norm, zorder=3,
              extent=(3, 3.05, 0, 1), origin="lower", aspect="auto")
    for x, name in enumerate(("weight bits", "activation bits", "file size", "accuracy (%)")):
        ax.text(x, 1.07, name, ha="center", weight="bold", size=10.5, color=INK)
    for x, write in enumerate(("{:g}".format, "{:g}".format, _size)):
        used, values = [], sorted(zip(ticks[x], columns[x], strict=True))
        for y, value in (values[0], values[-1], *values):  # the ends first: they have labels
            if all(abs(y - other) >= 0.045 for other in used):
                used.append(y)
                _label(ax, write(value), (x, y), (-6, 0), ha="right", zorder=4)
    best, used = 100 * max(float(cell["accuracy"]) for cell in cells), []
    for p in (0, lost.max(), 0.5, 1, 2, 5, 10, 20, 50):
        y = 1 - float(norm(p))
        if p <= norm.vmax and p <= best and all(abs(y - other) > 0.045 for other in used):
            used.append(y)
            _label(ax, f"{best - p:.1f}", (3.05, y), (5, 0))
    ax.set(xlim=(-0.18, 3.25), ylim=(-0.05, 1.12))
    ax.set_axis_off()
    return _save(figure, path)


# ---- the report ----------------------------------------------------------------------------------


def storage(files, path, title):
    """Draw what the bytes of each file hold: to scale on the left, as shares on the right.

    files: (label, {part: bytes}) from top to bottom; parts named "group: ..." lie side by side.
    """
    files = _nonempty(files)
    parts = list(dict.fromkeys(part for _, sizes in files for part in sizes))
    groups = [part.split(":")[0] for part in parts]
    parts.sort(key=lambda part: groups.index(part.split(":")[0]))
    key = {part: PALETTE[i % len(PALETTE)] for i, part in enumerate(parts)}
    totals = [sum(sizes.values()) for _, sizes in files]
    note = "KB and MB: 10³ and 10⁶ bytes" + "; × smaller than the first file" * (len(files) > 1)
    figure = _figure(title, note, 0.9 + 0.46 * len(files), key)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.7], sharey=True)
    _style_axes(left, "size of the file", "x")
    _style_axes(right, "what it consists of", "x")
    for y, ((_, sizes), total) in enumerate(zip(files, totals, strict=True)):
        start = 0
        for part in (part for part in parts if sizes.get(part)):
            share, text = 100 * sizes[part] / total, _size(sizes[part], 2)
            left.barh(y, sizes[part] / 1e6, left=start / 1e6, color=key[part], height=0.66)
            bar = right.barh(y, share, left=100 * start / total, color=key[part], height=0.66,
                             edgecolor="white", linewidth=0.8)
            if share > 1.65 * len(text) + 1:  # the width of the text in % of the panel
                right.text(100 * start / total + share / 2, y, text, ha="center", va="center",
                           size=9, color=_contrast(bar.patches[0].get_facecolor()))
            start += sizes[part]
        text = _size(total) + (f"  {_times_smaller(totals[0], total)}" if y else "")
        _label(left, text, (total / 1e6, y), (5, 0), size=9.5)
    left.set_yticks(range(len(files)), [label for label, _ in files])
    left.set(xlim=(0, 1.5 * max(*totals, 1) / 1e6), ylim=(len(files) - 0.5, -0.5), xlabel="MB")
    left.xaxis.set_major_locator(MaxNLocator(4))
    right.set(xlim=(0, 100), xlabel="% of the file")
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
    return _save(figure, path)


def stages(rows, path, title):
    """Draw file sizes (log scale) with ratios to the first, and accuracies with 95% intervals.

    rows: dicts of stage, bytes, correct and total (numbers of images), from top to bottom; group,
        if the ratios are to the first of each group.
    """
    rows = _nonempty(rows)
    sizes = np.maximum(_column(rows, "bytes"), 1)
    counts = " or ".join(f"{n:,}" for n in sorted({int(row["total"]) for row in rows}))
    groups = [row.get("group") for row in rows]
    firsts = [groups.index(group) for group in groups]
    note = "; × smaller than the first" + " of its group" * (len(set(groups)) > 1)
    note *= len(rows) > 1
    figure = _figure(title, f"accuracy on n = {counts} images{note}", 0.9 + 0.44 * len(rows))
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1], sharey=True)
    _style_axes(left, "file size (log scale)", "x")
    _style_axes(right, "accuracy (%), with 95% interval", "x")
    low, high = sizes.min() / 2.2, sizes.max()
    left.set_xscale("log")
    for i, row in enumerate(rows):
        left.hlines(i, low, sizes[i], color=PALE, linewidth=3)
        left.plot(sizes[i], i, "o", color=BLUE, ms=8)
        text = _size(row["bytes"]) + (
            f"  {_times_smaller(sizes[firsts[i]], sizes[i])}" if i > firsts[i] else ""
        )
        _label(left, text, (sizes[i], i), (9, 0))
    _accuracy_column(
        right, range(len(rows)), [row["correct"] for row in rows], [row["total"] for row in rows],
        digits=2,
    )  # fmt: skip
    decades = [10.0**p for p in range(10) if low <= 10.0**p <= 1.3 * high] or [high]
    left.set_xticks(decades, [_size(decade, 1) for decade in decades])
    left.xaxis.set_minor_locator(NullLocator())
    left.set_yticks(range(len(rows)), [row["stage"] for row in rows])
    left.set(xlim=(low, high * (high / low) ** 0.6), ylim=(len(rows) - 0.5, -0.5))
    right.margins(x=0.06)
    right.xaxis.set_major_locator(MaxNLocator(5))
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
    return _save(figure, path)


def size_curve(rows, path, title, heights=None):
    """Draw accuracy, with 95% intervals, against file size on a log scale: a line per group.

    rows: dicts of group, label, bytes, correct and total (numbers of images). heights: {name:
    accuracy} of other files, whose size is beside the point: dashed lines.
    """
    rows = _nonempty(rows)
    counts = " or ".join(f"{n:,}" for n in sorted({int(row["total"]) for row in rows}))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    key = dict(zip(groups, (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK) * 9, strict=False))
    note = f"{_counted(len(rows), 'file')}; accuracy on n = {counts} images, with 95% interval"
    figure = _figure(title, note, 4.4, key if len(groups) > 1 else None)
    ax = figure.subplots()
    _style_axes(ax, "accuracy (%)", "both")
    for number, group in enumerate(groups):
        points = sorted((r for r in rows if r["group"] == group), key=lambda row: row["bytes"])
        sizes, hits, totals = (_column(points, name) for name in ("bytes", "correct", "total"))
        accuracy = 100 * hits / totals
        ends = [wilson(*pair) for pair in zip(hits, totals, strict=True)]
        ax.vlines(sizes, *(100 * np.array(end) for end in zip(*ends, strict=True)),
                  color=key[group], linewidth=1, alpha=0.4)
        ax.plot(sizes, accuracy, color=key[group], linewidth=1.5, marker="o", ms=5, zorder=3)
        offset, side = ((7, -8), "left") if number % 2 == 0 else ((-6, 8), "right")
        for size, height, point in zip(sizes, accuracy, points, strict=True):
            _label(ax, point["label"], (size, height), offset, ha=side, size=8.5, color=key[group])
    for name, accuracy in (heights or {}).items():
        ax.axhline(100 * accuracy, color=MUTED, linewidth=1, linestyle="--")
        _label(ax, name, (0.01, 100 * accuracy), (0, 7), side=True, size=8.5, color=MUTED)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(size, 1)))
    ax.set_xlabel("file size (log scale)")
    return _save(figure, path)


def speed(rows, path, title):
    """Draw latency at the smallest batch, images per second at the largest, and accuracy.

    Each network has a bar per thread count, and its accuracy's 95% interval.

    rows: dicts of network, threads, batch (images), milliseconds (per batch), images_per_second,
    ratio (times as fast as the first network), correct and total (numbers of images).
    """
    rows = _nonempty(rows)
    names = list(dict.fromkeys(row["network"] for row in rows))
    counts = sorted({row["threads"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    key = {_counted(n, "thread"): PALETTE[i % len(PALETTE)] for i, n in enumerate(counts)}
    colours, height = list(key.values()), 0.8 / len(counts)
    note = (f"medians of alternating turns; ×: relative to {names[0]} at the same thread count; "
            f"accuracy with 95% interval, n = {rows[0]['total']:,}")
    figure = _figure(title, note, 0.9 + 0.55 * len(names), key)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 0.55], sharey=True)
    for ax, batch, field, text in (
        (left, batches[0], "milliseconds", f"latency at batch {batches[0]} (ms)"),
        (middle, batches[-1], "images_per_second", f"images per second at batch {batches[-1]}"),
    ):
        _style_axes(ax, text, "x")
        some = [row for row in rows if row["batch"] == batch]
        for row in some:
            i = counts.index(row["threads"])
            y = names.index(row["network"]) + (i - (len(counts) - 1) / 2) * height
            ax.barh(y, row[field], color=colours[i], height=0.92 * height)
            note = f"{row[field]:.3g}" if row[field] < 1000 else f"{row[field]:,.0f}"
            _label(ax, f"{note}  {row['ratio']:.1f}×", (row[field], y), (4, 0), size=8.5)
        ax.set_xlim(0, 1.45 * max(row[field] for row in some))
        ax.xaxis.set_major_locator(MaxNLocator(4))
    _style_axes(right, "accuracy (%)", "x")
    networks = {row["network"]: row for row in rows}.values()  # all rows of one are equal in these
    _accuracy_column(
        right, range(len(names)), [row["correct"] for row in networks],
        [row["total"] for row in networks],
    )  # fmt: skip
    right.xaxis.set_major_locator(MaxNLocator(3))
    left.set_yticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    for ax in (left, middle, right):
        ax.tick_params(axis="y", length=0)
    return _save(figure, path)


def image_tables(tables, path):
    """Draw tables of small images side by side.

    tables: tuples of a title, uint8 images (rows, columns, height, width, 3) of one size for all,
        the rows' names and the columns' names.
    """
    border = 2  # white pixels around each image
    figure = Figure(figsize=(5.5 * len(tables), 16), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (title, images, names, heads) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True
    ):
        around = ((0, 0), (0, 0), (border, border), (border, border), (0, 0))
        tiles = np.pad(images, around, constant_values=255)
        rows, columns, height, width, _ = tiles.shape
        ax.imshow(tiles.swapaxes(1, 2).reshape(rows * height, columns * width, 3))
        ax.set_yticks([height * (i + 0.5) for i in range(rows)], names)
        ax.set_xticks([width * (i + 0.5) for i in range(columns)], heads)
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
        ax.set_anchor("N")
        ax.set_title(title)
    return _save(figure, path)
