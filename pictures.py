"""Pictures: of runs (curves, scatter, circumplex, residuals, embeddings), of long recordings.

Colours of Okabe and Ito, which the colour-blind tell apart, and cividis.
"""

import math
from collections import Counter
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from corpora import Corpus
from model import TARGETS, metrics
from util.runs import Columns, pooled_rows, read_predictions, read_records, tensors

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "o^sDv<>"
matplotlib.rcParams["text.parse_math"] = False  # names of files and speakers may hold a $
CIRCUMPLEX = [TARGETS.index("valence"), TARGETS.index("arousal")]  # columns of preds and labels


def plot_run(directory: Path, split: str, vectors: Tensor) -> None:
    """The pictures of a run; vectors (n, U) in the row order of predictions_<split>.csv."""
    parts = {directory.name: read_predictions(directory / f"predictions_{split}.csv")}
    records = {directory.name: read_records(directory)}
    for name, figure in plot_all(records, parts, {directory.name: vectors.numpy()}).items():
        figure.savefig(directory / f"{name}.png")


def plot_all(
    records: dict[str, list[dict]], parts: dict[str, Columns], vectors: dict[str, np.ndarray]
) -> dict[str, Figure]:
    """Name -> picture, of runs by name; vectors (n, U) may be absent for some."""
    rows = pooled_rows(parts.values())
    figures = {"curves": plot_curves(records), "scatter": plot_scatter(rows)}
    figures |= {"circumplex": plot_circumplex(rows), "duration": plot_duration(rows)}
    if vectors:
        figures["embedding"] = plot_embedding({k: (v, parts[k]) for k, v in vectors.items()})
    return figures


def new_figure(columns: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), dpi=110, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_dots(axis: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """Fainter the more there are."""
    alpha = float(np.clip(8 / math.sqrt(len(x)), 0.05, 0.6))
    axis.plot(x, y, ".", ms=5, mew=0, alpha=alpha, color=colour)


def plot_curves(runs: dict[str, list[dict]]) -> Figure:
    """Training loss and dev CCCs over epochs, a line per run; from read_records."""
    figure, axes = new_figure(1 + len(TARGETS))
    panels = ("loss", *(f"dev/ccc_{target}" for target in TARGETS))
    for i, (name, records) in enumerate(runs.items()):
        dev_or_train = [r for r in records if r["event"] != "test"]
        for axis, key in zip(axes, panels):
            points = [(r["epoch"], r[key]) for r in dev_or_train if {"epoch", key} <= r.keys()]
            points = np.array(points).reshape(-1, 2).T
            style = ("o-", "^--", "s:")[i // len(COLOURS) % 3]
            axis.plot(*points, style, ms=3, lw=1.2, color=COLOURS[i % len(COLOURS)], label=name)
    for axis, label in zip(axes, ("training loss", *(f"dev CCC {target}" for target in TARGETS))):
        axis.set(xlabel="epoch", ylabel=label)
    if len(runs) > 1:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", frameon=False)
    return figure


def plot_scatter(rows: Columns) -> Figure:
    """Predicted against true in the label's scale, with the identity line."""
    figure, axes = new_figure(len(TARGETS))
    scores = metrics(*tensors(rows))
    for axis, target, colour in zip(axes, TARGETS, COLOURS):
        true, pred = rows[target], rows[f"pred_{target}"]
        limits = [min(true.min(), pred.min()), max(true.max(), pred.max())]
        axis.plot(limits, limits, color="black", lw=1, zorder=3)
        plot_dots(axis, true, pred, colour)
        title = f"CCC {scores[f'ccc_{target}']:.3f}, {len(true)} utterances"
        axis.set(xlabel=f"true {target}", ylabel=f"predicted {target}", aspect="equal", title=title)
    return figure


def plot_circumplex(rows: Columns) -> Figure:
    """Where utterances lie and where they are put (means of cells), and the cloud of the errors."""
    figure, (left, right) = new_figure(2)
    preds, labels = (values[:, CIRCUMPLEX].numpy() for values in tensors(rows))
    edges = [np.linspace(*np.quantile(labels[:, i], (0, 1)), 8) for i in (0, 1)]
    cells = [np.searchsorted(edges[i][1:-1], labels[:, i], side="right") for i in (0, 1)]
    cells = cells[0] * 7 + cells[1]
    plot_dots(left, *labels.T, "black")
    shown = [cell for cell in np.unique(cells) if (cells == cell).sum() >= 3]
    start, end = (np.array([x[cells == c].mean(0) for c in shown]) for x in (labels, preds))
    if shown:
        left.quiver(
            *start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, width=0.006,
            color=COLOURS[0],
        )  # fmt: skip
    left.set(xlabel="valence", ylabel="arousal", title="true (dots) to predicted (cell means)")
    errors = preds - labels
    most = np.abs(errors).max() or 1.0
    bins = right.hexbin(*errors.T, gridsize=25, cmap="cividis", mincnt=1, extent=(-most, most) * 2)
    figure.colorbar(bins, ax=right, label="utterances")
    right.axhline(0, color="grey", lw=0.8)
    right.axvline(0, color="grey", lw=0.8)
    right.plot(*errors.mean(0), "X", ms=9, color=COLOURS[1], mec="white")
    title = "errors; X: mean {:+.2f}, {:+.2f}".format(*errors.mean(0))
    right.set(xlabel="predicted - true valence", ylabel="predicted - true arousal", title=title)
    right.set_aspect("equal")
    return figure


def plot_duration(rows: Columns) -> Figure:
    """Predicted minus true over seconds: utterances, and median and quartiles of equal shares."""
    figure, axes = new_figure(len(TARGETS))
    order = np.argsort(rows["seconds"], kind="stable")
    shares = np.array_split(order, int(np.clip(len(order) // 10, 1, 10)))
    middles = [np.median(rows["seconds"][share]) for share in shares]
    for axis, target, colour in zip(axes, TARGETS, COLOURS):
        errors = rows[f"pred_{target}"] - rows[target]
        plot_dots(axis, rows["seconds"], errors, colour)
        low, median, high = zip(*(np.quantile(errors[s], (0.25, 0.5, 0.75)) for s in shares))
        axis.axhline(0, color="grey", lw=0.8)
        axis.fill_between(middles, low, high, alpha=0.25, color="black", lw=0, label="quartiles")
        axis.plot(middles, median, "o-", ms=3, color="black", label="median")
        axis.set(xlabel="seconds", ylabel=f"predicted - true {target}")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False)
    return figure


def plot_embedding(maps: dict[str, tuple[np.ndarray, Columns]], most: int = 1000) -> Figure:
    """First two principal components, a row per run, coloured by each target and by speaker.

    Runs have embedding spaces of their own; of each at most `most` evenly spaced rows are shown.
    """
    panels = len(TARGETS) + 1
    figure, axes = new_figure(panels, len(maps))
    for row, (name, (vectors, columns)) in enumerate(maps.items()):
        keep = np.linspace(0, len(vectors) - 1, min(most, len(vectors))).astype(int)
        centred = vectors[keep].astype(np.float64)
        centred -= centred.mean(0)
        _, values, components = np.linalg.svd(centred, full_matrices=False)
        share = np.append(values**2, 0) / max((values**2).sum(), 1e-12)
        points = np.pad(centred @ components[:2].T, ((0, 0), (0, 1)))[:, :2]  # (n, 2), n = 1 too
        *by_target, last = axes[panels * row : panels * (row + 1)]
        for axis, target in zip(by_target, TARGETS):
            dots = axis.scatter(*points.T, c=columns[target][keep], s=10, cmap="cividis")
            figure.colorbar(dots, ax=axis)
        speakers = columns["speaker"][keep]
        names, counts = np.unique(speakers, return_counts=True)
        shown = sorted(names[np.argsort(-counts, kind="stable")[: len(COLOURS)]])
        others = points[~np.isin(speakers, shown)]
        last.scatter(*others.T, s=6, color="lightgrey", label="others" if len(others) else None)
        for speaker, colour, marker in zip(shown, COLOURS, MARKERS):
            label = (speaker or "unknown")[:24]
            dots = points[speakers == speaker].T
            last.scatter(*dots, s=10, color=colour, marker=marker, label=label)
        last.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis, what in zip((*by_target, last), (*TARGETS, "speaker")):
            axis.set(xlabel=f"PC 1 ({share[0]:.0%})", ylabel=f"PC 2 ({share[1]:.0%})")
            axis.set_title(f"{name}: {what}")
    return figure


def plot_windows(
    directory: Path, corpus: Corpus, preds: Tensor, label_range: tuple[float, float]
) -> None:
    """<name>.png per file, or utterance of a manifest, of preds (M, N, 2): mean over checkpoints at
    the windows' middles, in a band of one standard deviation. A name that is taken gets a number.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[int]] = {}
    for row, u in enumerate(corpus.utterances):
        files.setdefault(u.utt_id, []).append(row)
    taken, again = set(), Counter()
    for utt_id, rows in files.items():
        path = corpus.utterances[rows[0]].path
        name = stem = path.stem if utt_id == str(path) else utt_id
        while name in taken:
            again[stem] += 1
            name = f"{stem}.{again[stem] + 1}"
        taken.add(name)
        middles = [corpus.utterances[row].start + corpus.seconds[row] / 2 for row in rows]
        mean, std = preds[:, rows].mean(0), preds[:, rows].std(0, correction=min(1, len(preds) - 1))
        with style.context("tableau-colorblind10"):
            figure = Figure(figsize=(9, 3.5), layout="constrained")
            axis = figure.add_subplot()
            for i, (target, marker) in enumerate(zip(TARGETS, cycle("os^D"))):
                size = 3 if len(rows) < 100 else 0  # more of them hide the line
                axis.plot(middles, mean[:, i], f"{marker}-", ms=size, lw=1.2, label=target)
                low, high = mean[:, i] - std[:, i], mean[:, i] + std[:, i]
                axis.fill_between(middles, low, high, alpha=0.25, lw=0)
            axis.set(xlabel="middle of the window, s", ylim=label_range)
            axis.set_title(name + f": mean and deviation of {len(preds)}" * (len(preds) > 1))
            figure.legend(loc="outside lower center", ncols=2)
            axis.grid(alpha=0.3)
            figure.savefig(directory / f"{name}.png", dpi=120)
