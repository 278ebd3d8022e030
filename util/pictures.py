"""Pictures of runs, and how far their embeddings are separated.

Colours are those of Okabe and Ito, which the colour-blind can tell apart, and cividis. matplotlib
and scikit-learn are imported where they are used, since each takes a second; UserError if one does
not work. Not here: tables and pages (report.py).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from corpora import known_speaker
from model import metrics
from util.files import optional_module
from util.runs import read_predictions, read_records, tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_VECTORS = 1000  # embeddings that are measured or drawn
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


# ---------------------------------------------------------------------------------------------
# Separation of the embeddings


def separation(
    vectors: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    speakers: list[str] | np.ndarray,
    targets: Sequence[str],
) -> dict[str, float]:
    """How far high and low labels (split at the median) lie apart, and the speakers.

    vectors (n, U), labels (n, E), speakers (n); at most MAX_VECTORS evenly spaced rows are used.
    silhouette_<target>: of the two halves, -1..1. ks_<target>: the Kolmogorov-Smirnov distance,
    0..1, of the halves' positions along the direction of a linear probe that did not see them.
    speaker_accuracy: mean over speakers of the share of utterances that a probe attributes to them;
    leakage if well above speaker_chance. A half or a speaker with fewer than five is left out.
    """
    statistics = optional_module("scipy.stats", "scipy", "the separation of embeddings")
    scores = optional_module("sklearn.metrics", "scikit-learn", "the separation of embeddings")
    keep = evenly_spaced(len(vectors))
    vectors = np.asarray(vectors)[keep].astype(np.float64)
    labels, speakers = np.asarray(labels)[keep], pd.Series(speakers, dtype=object)[keep]
    result = {}
    for i, target in enumerate(targets):
        known = ~np.isnan(labels[:, i])
        high = labels[known, i] > pd.Series(labels[:, i]).median()
        if min(high.sum(), (~high).sum()) < 5:
            continue
        positions = probe(vectors[known], high, "decision_function")
        silhouette = scores.silhouette_score(vectors[known], high)
        distance = statistics.ks_2samp(positions[high], positions[~high]).statistic
        result |= {f"silhouette_{target}": float(silhouette), f"ks_{target}": float(distance)}
    frequent = speakers.map(speakers.value_counts()) >= 5
    known = (frequent & speakers.map(known_speaker)).to_numpy()
    truth = speakers[known].to_numpy()
    count = len(set(truth))
    if count > 1:
        accuracy = scores.balanced_accuracy_score(truth, probe(vectors[known], truth, "predict"))
        result |= {"speaker_accuracy": float(accuracy), "speaker_chance": 1 / count}
    return result


def evenly_spaced(count: int) -> np.ndarray:
    """At most MAX_VECTORS of `count` rows."""
    return np.linspace(0, count - 1, min(MAX_VECTORS, count)).astype(int)


def probe(vectors: np.ndarray, classes: np.ndarray, method: str) -> np.ndarray:
    """What logistic regressions say of rows (n, U) that they have not seen: 5 consecutive parts."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # C [guess]: strong, as there may be as many dimensions as rows
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return cross_val_predict(model, vectors, classes, cv=5, method=method)


# ---------------------------------------------------------------------------------------------
# Pictures


def plot_run(directory: Path, split: str, vectors: Tensor, targets: Sequence[str]) -> None:
    """Writes the pictures of a run; vectors (n, U) in the row order of predictions_<split>.csv."""
    rows, name = read_predictions(directory / f"predictions_{split}.csv", targets), directory.name
    records = {name: read_records(directory)}
    for title, figure in plot_all(records, {name: rows}, {name: vectors.numpy()}, targets).items():
        figure.savefig(directory / f"{title}.png")


def plot_all(
    records: dict[str, list[dict]],
    parts: dict[str, pd.DataFrame],
    vectors: dict[str, np.ndarray],
    targets: Sequence[str],
) -> dict[str, "Figure"]:
    """Name -> picture, of runs by name; vectors (n, U) may be absent for some."""
    rows = pd.concat(parts.values(), ignore_index=True)
    figures = {"curves": plot_curves(records, targets), "scatter": plot_scatter(rows, targets)}
    if {"valence", "arousal"} <= set(targets):
        placed = rows.dropna(subset=["valence", "arousal"])
        if len(placed):
            figures["circumplex"] = plot_circumplex(placed)
    vectors = {name: values for name, values in vectors.items() if len(values) > 1}
    if vectors:
        figures["embedding"] = plot_embedding(vectors, parts, targets)
    return figures


def new_figure(columns: int, rows: int = 1, width: float = 4.4) -> tuple["Figure", list["Axes"]]:
    """A figure and its panels, row by row, each `width` inches wide."""
    matplotlib = optional_module("matplotlib", "matplotlib", "a picture")
    figures = optional_module("matplotlib.figure", "matplotlib", "a picture")
    matplotlib.rcParams["text.parse_math"] = False  # names of files and speakers may hold a $
    figure = figures.Figure(figsize=(width * columns, 3.6 * rows), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_dots(axis: "Axes", x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """Fainter the more there are."""
    alpha = float(np.clip(8 / math.sqrt(len(x) or 1), 0.05, 0.6))
    axis.plot(x, y, ".", ms=5, mew=0, alpha=alpha, color=colour)


def plot_curves(runs: dict[str, list[dict]], targets: Sequence[str]) -> "Figure":
    """Training loss and dev CCCs over epochs, a line per run; from read_records."""
    panels = {"loss": "training loss"}
    panels |= {f"dev/ccc_{target}": f"dev CCC {target}" for target in targets}
    figure, axes = new_figure(len(panels))
    for i, (name, records) in enumerate(runs.items()):
        colour, style = COLOURS[i % len(COLOURS)], ("o-", "^--", "s:")[i // len(COLOURS) % 3]
        table = pd.DataFrame(records)
        for axis, key in zip(axes, panels):
            points = table.reindex(columns=["epoch", key]).dropna()
            axis.plot(points["epoch"], points[key], style, ms=3, lw=1.2, color=colour, label=name)
    for axis, label in zip(axes, panels.values()):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", frameon=False)
    return figure


def plot_scatter(rows: pd.DataFrame, targets: Sequence[str]) -> "Figure":
    """Predicted against true in the label's scale, with the identity line."""
    figure, axes = new_figure(len(targets))
    scores = metrics(*tensors(rows, targets), targets)
    for axis, target, colour in zip(axes, targets, COLOURS):
        labelled = rows.dropna(subset=target)
        true, pred = labelled[target], labelled[f"pred_{target}"]
        limits = [min(true.min(), pred.min()), max(true.max(), pred.max())]
        axis.plot(limits, limits, color="black", lw=1, zorder=3)
        plot_dots(axis, true, pred, colour)
        title = f"CCC {scores[f'ccc_{target}']:.3f}, {len(true)} utterances"
        axis.set(xlabel=f"true {target}", ylabel=f"predicted {target}", aspect="equal", title=title)
    return figure


def plot_circumplex(rows: pd.DataFrame) -> "Figure":
    """True places of utterances, and arrows to the predicted ones (means of cells)."""
    figure, [axis] = new_figure(1, width=6)
    x, y = rows["valence"], rows["arousal"]
    plot_dots(axis, x, y, "black")
    places = pd.DataFrame({"x": x, "y": y})
    places["dx"], places["dy"] = rows["pred_valence"] - x, rows["pred_arousal"] - y
    grid = places.groupby([pd.cut(x, 7, labels=False), pd.cut(y, 7, labels=False)])
    arrows = grid.mean()[grid.size() >= 3]
    axis.quiver(
        arrows["x"], arrows["y"], arrows["dx"], arrows["dy"], angles="xy", scale_units="xy",
        scale=1, width=0.004, color=COLOURS[0],
    )  # fmt: skip
    title = "true (dots) to predicted (cell means)"
    axis.set(xlabel="valence", ylabel="arousal", title=title, aspect="equal")
    return figure


def plot_embedding(
    vectors: dict[str, np.ndarray], parts: dict[str, pd.DataFrame], targets: Sequence[str]
) -> "Figure":
    """First two principal components, a row per run, coloured by each target and by speaker.

    Runs do not share an embedding space; of each at most MAX_VECTORS rows are shown.
    """
    decomposition = optional_module("sklearn.decomposition", "scikit-learn", "a picture")
    panels = (*targets, "speaker")
    figure, axes = new_figure(len(panels), len(vectors))
    for i, (name, values) in enumerate(vectors.items()):
        keep = evenly_spaced(len(values))
        rows = parts[name].iloc[keep].reset_index(drop=True)
        pca = decomposition.PCA(2)
        x, y = pca.fit_transform(values[keep].astype(np.float64)).T  # (n,) each
        one, two = (f"PC {k + 1} ({pca.explained_variance_ratio_[k]:.0%})" for k in (0, 1))
        row = axes[len(panels) * i : len(panels) * (i + 1)]
        for axis, what in zip(row, panels):
            axis.set(xlabel=one, ylabel=two, title=f"{name}: {what}")
        for axis, target in zip(row, targets):
            figure.colorbar(axis.scatter(x, y, c=rows[target], s=10, cmap="cividis"), ax=axis)
        speakers = rows["speaker"].replace("", "unknown").str.slice(0, 24)
        frequent = speakers.value_counts().index[: len(COLOURS) - 1]
        speakers = speakers.where(speakers.isin(frequent), "others")
        for (speaker, mine), colour in zip(speakers.groupby(speakers), COLOURS):
            row[-1].scatter(x[mine.index], y[mine.index], s=10, color=colour, label=speaker)
        row[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
