"""Tables over folds and experiments, from what train.py left in the run directories.

    python report.py runs/demo                                     # folds, mean, interval
    python report.py runs/demo runs/baseline runs/convnext         # comparison, best first
    python report.py runs/* --markdown experiment_comparison.md    # the same, also as Markdown
    python report.py runs/demo --folds 1-3 --json                  # of these folds alone

A fold without result.json is shown as missing; then no mean is given and the exit code is 1.
The mean of the folds' CCCs and the pooled CCC (one CCC over all test utterances) are two figures:
pooling also sees shifts between folds. The interval is a percentile bootstrap of the pooled CCC
over whole speakers, since utterances of one speaker are not independent; over dialogues where
fewer than five speakers are known.
Exit code: 0 complete; 1 a fold is missing; 2 wrong flags or files (one line, no trace).
Also here: the pictures of a run and the separation of its embeddings. Not here: training,
predictions.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data import Corpus
from model import TARGETS, concordance, metrics, moment_sums

RESAMPLES = 2000
SEED = 0
MIN_CLUSTERS = 5  # fewer speakers than this say little about the next one [guess]

# A fold's figure -> its heading
COLUMNS = {
    **{f"test/ccc_{target}": f"CCC {target}" for target in TARGETS},
    "test/ccc_mean": "CCC mean",
    **{f"test/pcc_{target}": f"PCC {target}" for target in TARGETS},
    **{f"test/rmse_{target}": f"RMSE {target}" for target in TARGETS},
    "dev/ccc_mean": "dev CCC",
    "best_epoch": "best epoch",
    "hours": "hours",
    "peak_gib": "peak GiB",
}


class ReportError(ValueError):
    """A run directory that cannot be read; the message is complete and main exits with code 2."""


@dataclass
class Experiment:
    """Figures of one experiment directory; what spans folds is None where a fold is missing."""

    name: str
    num_folds: int  # of the corpus, as far as the directory shows
    folds: dict[int, dict[str, float] | None]  # fold -> figures as in COLUMNS; None = missing
    missing: list[int]
    mean: dict[str, float] | None = None
    std: dict[str, float] | None = None  # sample standard deviation; None for a single fold
    pooled: dict[str, float] | None = None  # as model.metrics, RMSE in the label's own scale
    interval: dict[str, tuple[float, float]] | None = None  # 95 % of each pooled CCC
    clusters: str = ""  # what the bootstrap draws: "10 speakers"
    utterances: int = 0  # in all test sets
    test_set: str = ""  # hash of their utt_ids: equal where experiments can be compared


# ---------------------------------------------------------------------------------------------
# Writing, while a run goes on


def replace_text(path: Path, text: str) -> None:
    """The whole text or what was there: written aside, synced, renamed. OSError names the file."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        with open(aside, "w", newline="", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


class RunFiles:
    """What a run writes: metrics.jsonl, TensorBoard, JSON and CSV files. For rank 0 alone.

    `lock` is the claim on the directory; it is held as long as this object lives.
    """

    def __init__(self, directory: Path, lock: TextIO) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.directory, self.lock = directory, lock
        self.metrics = directory / "metrics.jsonl"
        self.records = 0  # in metrics.jsonl
        self.board = SummaryWriter(directory / "tb")

    def rewind(self, count: int) -> int:
        """Keeps the first `count` records; the resumed run writes the later ones again. Returns
        how many there are."""
        lines = self.metrics.read_bytes().splitlines(True) if self.metrics.exists() else []
        kept = [line for line in lines[:count] if line.endswith(b"\n")]
        replace_text(self.metrics, b"".join(kept).decode(errors="replace"))
        self.records = len(kept)
        return self.records

    def record(self, event: str, step: int, values: dict[str, float]) -> None:
        try:
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics)) from None
        self.records += 1
        for key, value in values.items():
            self.board.add_scalar(key if "/" in key else f"{event}/{key}", value, step)

    def write_json(self, name: str, content: dict) -> None:
        replace_text(self.directory / name, json.dumps(content, indent=1) + "\n")

    def write_status(self, step: int) -> None:
        """status.json of a run that goes on and has saved `step`; train.py's run completes it."""
        about = {"time": time.time(), "host": platform.node(), "pid": os.getpid()}
        status = {"exit_code": None, "reason": "running", "step": step, **about}
        self.write_json("status.json", status)

    def write_predictions(
        self, split: str, corpus: Corpus, rows: np.ndarray, preds: Tensor
    ) -> None:
        """predictions_<split>.csv of preds (n, 2) in the label's own scale, and the labels."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        header = ["utt_id", "dialog", "speaker", "emotion", "seconds", *TARGETS]
        writer.writerow([*header, *(f"pred_{target}" for target in TARGETS)])
        for row, pred in zip(rows.tolist(), preds.tolist()):
            utt = corpus.utterances[row]
            about = [utt.utt_id, utt.dialog, utt.speaker, utt.emotion]
            labels = [getattr(utt, target) for target in TARGETS]
            texts = [f"{value:.6f}" for value in pred]
            writer.writerow([*about, f"{corpus.seconds[row]:.3f}", *labels, *texts])
        replace_text(self.directory / f"predictions_{split}.csv", text.getvalue())

    def close(self) -> None:
        self.board.close()


# ---------------------------------------------------------------------------------------------
# Reading


def read_experiment(
    directory: Path, asked: list[int] | None = None, failed: list[int] | None = None
) -> Experiment:
    """The experiment with all its folds, or those of `asked`; ReportError on unreadable files.

    All its folds are 1..K: K is num_folds of any result.json, or the highest fold that left a
    directory or a log. A fold in `failed` is missing whatever is on disk: an older run's.
    """
    if not directory.is_dir():
        raise ReportError(f"{directory}: no such directory")
    names = [re.fullmatch(r"fold([1-9]\d*)(\.log)?", path.name) for path in directory.iterdir()]
    found = {int(match[1]) for match in names if match}
    if not found and (directory / "result.json").exists():
        raise ReportError(f"{directory} is one fold: give the directory above it")
    if not found:
        raise ReportError(f"{directory}: no folds (fold1, fold2, ...) in it")
    read = {fold: read_result(directory / f"fold{fold}" / "result.json") for fold in found}
    num_folds = int(max(found | {result["num_folds"] for result in read.values() if result}))
    read |= dict.fromkeys(failed or ())
    folds = {fold: read.get(fold) for fold in asked or range(1, num_folds + 1)}
    missing = [fold for fold, result in folds.items() if result is None]
    experiment = Experiment(str(directory), num_folds, folds, missing)
    if not missing:
        columns = {key: [result[key] for result in folds.values()] for key in folds[min(folds)]}
        experiment.mean = {key: statistics.mean(values) for key, values in columns.items()}
        if len(folds) > 1:
            experiment.std = {key: statistics.stdev(values) for key, values in columns.items()}
        files = [directory / f"fold{fold}" / "predictions_test.csv" for fold in folds]
        parts = [read_predictions(file) for file in files]
        names = ("utt_id", "dialog", "speaker", *TARGETS, *(f"pred_{t}" for t in TARGETS))
        pool(experiment, {name: np.concatenate([part[name] for part in parts]) for name in names})
    return experiment


def read_result(path: Path) -> dict[str, float] | None:
    """Figures of one fold, flat ("test/ccc_valence", "hours"); None where there is no file."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        flat = {f"{s}/{key}": result[s][key] for s in ("dev", "test") for key in result[s]}
        flat |= {"best_epoch": result["best_epoch"], "hours": result["seconds"] / 3600}
        flat |= {"peak_gib": result["peak_gib_measured"], "num_folds": result.get("num_folds", 0)}
        flat["parameters_trainable"] = result["parameters_trainable"]
        return {key: float(flat[key]) for key in {**COLUMNS, **flat}}
    except KeyError as error:
        raise ReportError(f"{path}: has no {error}") from error
    except (TypeError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read ({error})") from error


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """Columns of a predictions CSV: labels and predictions float64 (N,), the rest text; N > 0."""
    numbers = [*TARGETS, *(f"pred_{target}" for target in TARGETS)]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ReportError(f"{path}: cannot be read ({error})") from error
    if not rows:
        raise ReportError(f"{path}: no rows")
    absent = [name for name in ("utt_id", "dialog", "speaker", *numbers) if name not in rows[0]]
    if absent:
        raise ReportError(f"{path}: column {', '.join(absent)} is missing")
    columns = {name: np.array([row[name] or "" for row in rows]) for name in rows[0] if name}
    for name in numbers:
        for number, text in enumerate(columns[name], start=2):
            if not is_finite_number(text):
                raise ReportError(f"{path} row {number}: {name} {text} is not a finite number")
        columns[name] = columns[name].astype(np.float64)
    return columns


def is_finite_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------
# Figures over folds


def pool(experiment: Experiment, columns: dict[str, np.ndarray]) -> None:
    """Fills in what comes from the test rows of all folds together: pooled and below."""
    labels = torch.from_numpy(np.stack([columns[target] for target in TARGETS], axis=1))
    preds = torch.from_numpy(np.stack([columns[f"pred_{target}"] for target in TARGETS], axis=1))
    ids, experiment.clusters = cluster_ids(columns)
    experiment.pooled = metrics(preds, labels)
    experiment.interval = bootstrap(preds, labels, ids)
    experiment.utterances = len(labels)
    utt_ids = "\n".join(sorted(columns["utt_id"]))
    experiment.test_set = hashlib.sha256(utt_ids.encode()).hexdigest()[:12]


def cluster_ids(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Cluster of each row (N,) from 0, and what the clusters are: "10 speakers".

    Speakers, or dialogues where fewer than MIN_CLUSTERS speakers are known, or else single
    utterances. An utterance of unknown speaker (dialogue) is a cluster of its own.
    """
    names = {"speaker": "speakers", "dialog": "dialogues", "utt_id": "utterances"}
    for column in names:
        known = set(columns[column].tolist()) - {"", "Unknown"}
        if len(known) >= MIN_CLUSTERS or column == "utt_id":
            break
    pairs = zip(columns[column].tolist(), columns["utt_id"].tolist())
    keys = [key if key in known else f"utterance {utt_id}" for key, utt_id in pairs]
    return np.unique(keys, return_inverse=True)[1], f"{len(known)} {names[column]}"


def bootstrap(preds: Tensor, labels: Tensor, ids: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of the CCC per target and of their mean, drawing whole clusters.

    preds, labels (N, 2); ids (N,) as from cluster_ids. A CCC needs six sums only, so a resample
    adds up its clusters' sums. The same interval on every call.
    """
    rows = moment_sums(preds[None], labels[None])  # (6, N, 2), each utterance's own
    size = int(ids.max()) + 1
    sums = torch.zeros(6, size, 2, dtype=torch.float64).index_add_(1, torch.from_numpy(ids), rows)
    rng = np.random.default_rng(SEED)
    cccs = []
    for _ in range(0, RESAMPLES, 100):  # 100 at a time: bounded memory for 100 000 clusters
        times = rng.multinomial(size, np.full(size, 1 / size), size=100)  # (100, clusters)
        drawn = torch.einsum("rc,fct->frt", torch.from_numpy(times).double(), sums)
        cccs.append(concordance(drawn))  # (100, 2)
    cccs = torch.cat(cccs)
    cccs = torch.cat((cccs, cccs.mean(1, keepdim=True)), dim=1).numpy()  # (RESAMPLES, 3)
    low, high = np.quantile(cccs, (0.025, 0.975), axis=0).tolist()
    keys = [f"ccc_{name}" for name in (*TARGETS, "mean")]
    return dict(zip(keys, zip(low, high)))


# ---------------------------------------------------------------------------------------------
# Text


def format_table(rows: list[list[str]], markdown: bool) -> str:
    """The rows (first: headings) as a table, first column to the left and the others to the right.

    As plain text, a heading of two words stands on two lines.
    """
    if markdown:
        ruler = [":--", *("--:" for _ in rows[0][1:])]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ruler, *rows[1:]))
    head = [heading.rpartition(" ") for heading in rows[0]]
    rows = [[first for first, _, _ in head], [last for _, _, last in head], *rows[1:]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    padded = [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in pairs]
        for pairs in (enumerate(zip(row, widths)) for row in rows)
    ]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def not_given(e: Experiment) -> str:
    """Why there is no mean: "not given, fold 3 is missing"."""
    if len(e.missing) == 1:
        return f"not given, fold {e.missing[0]} is missing"
    return f"not given, folds {', '.join(map(str, e.missing))} are missing"


def folds_text(e: Experiment, markdown: bool = False) -> str:
    """Table of one experiment's folds, then the figures over all of them, or why there are none."""
    rows = [["fold", *COLUMNS.values()]]
    named = {str(fold): values for fold, values in e.folds.items()} | {"mean": e.mean, "std": e.std}
    for name, values in named.items():
        if values:
            form = {"best_epoch": ".4g"}
            rows.append([name, *(f"{values[key]:{form.get(key, '.3f')}}" for key in COLUMNS)])
        elif name.isdigit():
            rows.append([name, "missing", *"-" * (len(COLUMNS) - 1)])
    lines = [f"{e.name}: {len(e.folds)} of {e.num_folds} folds, each on its own test set", ""]
    lines += [format_table(rows, markdown), ""]
    if e.missing:
        return "\n".join([*lines, f"mean: {not_given(e)}"])
    lines.append(
        f"pooled: one CCC over all {e.utterances} test utterances (not the mean over folds), with "
        f"its 95 % interval\nfrom {RESAMPLES} bootstrap draws of {e.clusters}\n"
    )
    for name in (*TARGETS, "mean"):
        low, high = e.interval[f"ccc_{name}"]
        lines.append(f"- {name:<8} {e.pooled[f'ccc_{name}']:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


def comparison_text(experiments: list[Experiment], markdown: bool = False) -> str:
    """Table of the experiments, best mean test CCC first, those with missing folds last."""
    heading = ["experiment", "folds", *(f"CCC {target}" for target in TARGETS), "CCC mean"]
    rows = [[*heading, "parameters trainable", "hours", "peak GiB"]]
    notes = ["CCC: mean over folds ± standard deviation, on test; hours: all folds together"]
    best_first = sorted(experiments, key=lambda e: -e.mean["test/ccc_mean"] if e.mean else 2)
    for e in best_first:
        scope = f"{len(e.folds) - len(e.missing)}/{e.num_folds}"
        if e.missing:
            rows.append([e.name, scope, "missing", *"-----"])
            notes.append(f"{e.name}: mean {not_given(e)}")
            continue
        spread = f" ± {e.std['test/ccc_mean']:.3f}" if e.std else ""
        costs = [
            f"{e.mean['parameters_trainable'] / 1e6:.2f} M",
            f"{sum(values['hours'] for values in e.folds.values()):.2f}",
            f"{max(values['peak_gib'] for values in e.folds.values()):.2f}",
        ]
        cccs = [f"{e.mean[f'test/ccc_{name}']:.3f}" for name in (*TARGETS, "mean")]
        rows.append([e.name, scope, *cccs[:-1], cccs[-1] + spread, *costs])
        if e.test_set != best_first[0].test_set:
            notes.append(f"{e.name}: tested on other utterances than {best_first[0].name}")
    return "\n".join([format_table(rows, markdown), "", *(f"- {note}" for note in notes)])


# ---------------------------------------------------------------------------------------------
# Pictures of one run, and how well its embeddings separate. Colours of Okabe and Ito, cividis.

COLOURS = {"valence": "#0072B2", "arousal": "#D55E00"}


def plot_run(directory: Path, split: str, vectors: Tensor, labels: Tensor) -> None:
    """curves.png, scatter.png and embedding.png of a run; vectors (n, U), labels (n, 2) in 0..1."""
    plot_curves(directory)
    plot_scatter(directory, split)
    plot_embedding(directory / "embedding.png", vectors.numpy(), labels.numpy())


def plot_curves(directory: Path) -> None:
    """curves.png: training loss and dev CCC over steps, from metrics.jsonl."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    train = [r for r in records if r["event"] == "train"]
    dev = [r for r in records if r["event"] == "dev" and "epoch" in r]
    figure, (left, right) = new_figure(2)
    left.plot([r["step"] for r in train], [r["loss"] for r in train], "o-", ms=2, color="black")
    left.set(xlabel="step", ylabel="training loss")
    for target in TARGETS:
        ccc = [r[f"dev/ccc_{target}"] for r in dev]
        right.plot([r["epoch"] for r in dev], ccc, "o-", ms=3, color=COLOURS[target], label=target)
    right.set(xlabel="epoch", ylabel="dev CCC")
    right.legend(frameon=False)
    figure.savefig(directory / "curves.png")


def plot_scatter(directory: Path, split: str) -> None:
    """scatter.png: predicted against true in the label's scale, with the identity line."""
    columns = read_predictions(directory / f"predictions_{split}.csv")
    figure, axes = new_figure(len(TARGETS))
    for axis, target in zip(axes, TARGETS):
        true, pred = columns[target], columns[f"pred_{target}"]
        limits = [min(true.min(), pred.min()), max(true.max(), pred.max())]
        axis.plot(limits, limits, color="grey", lw=1)
        axis.plot(true, pred, ".", ms=5, alpha=0.5, color=COLOURS[target])
        axis.set(xlabel=f"true {target}", ylabel=f"predicted {target}", aspect="equal")
    figure.savefig(directory / "scatter.png")


def plot_embedding(path: Path, vectors: np.ndarray, labels: np.ndarray) -> None:
    """Utterance vectors (n, U) on their first two principal components, coloured by each target."""
    centred = vectors - vectors.mean(0)
    _, values, components = np.linalg.svd(centred, full_matrices=False)
    share = values**2 / max((values**2).sum(), 1e-12)
    points = centred @ components[:2].T  # (n, 2)
    if points.shape[1] < 2:  # a single utterance
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    figure, axes = new_figure(len(TARGETS))
    for i, (axis, target) in enumerate(zip(axes, TARGETS)):
        dots = axis.scatter(*points.T, c=labels[:, i], s=12, cmap="cividis", vmin=0, vmax=1)
        figure.colorbar(dots, ax=axis, label=f"{target}, 0..1")
        axis.set(xlabel=f"PC 1 ({share[0]:.0%})", ylabel=f"PC 2 ({share[1:2].sum():.0%})")
    figure.savefig(path)


def new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.5 * columns, 3.6), dpi=120, layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def separation(vectors: np.ndarray, labels: np.ndarray, most: int = 1000) -> dict[str, float]:
    """Fisher ratio and silhouette of high against low valence and arousal (split at the median).

    vectors (n, U), labels (n, 2); at most `most` evenly spaced rows are used. The Fisher ratio is
    the squared distance of the two means over the sum of the mean squared distances to them;
    silhouette: Rousseeuw (1987), Euclidean. 0 where a half is empty.
    """
    keep = np.linspace(0, len(vectors) - 1, min(most, len(vectors))).astype(int)
    vectors, labels = vectors[keep].astype(np.float64), labels[keep]
    squares = (vectors**2).sum(1)
    distance = squares[:, None] + squares[None] - 2 * vectors @ vectors.T  # (n, n)
    distance = np.sqrt(distance.clip(min=0))
    result = {}
    for i, target in enumerate(TARGETS):
        high = labels[:, i] > np.median(labels[:, i])
        fisher = silhouette = 0.0
        if 1 < high.sum() < len(high) - 1:
            one, two = vectors[high], vectors[~high]
            within = sum(((part - part.mean(0)) ** 2).sum(1).mean() for part in (one, two))
            fisher = ((one.mean(0) - two.mean(0)) ** 2).sum() / max(within, 1e-12)
            same = np.where(high, high.sum(), (~high).sum()) - 1
            own = (distance * (high[:, None] == high)).sum(1) / same
            other = (distance * (high[:, None] != high)).sum(1) / (len(high) - same - 1)
            silhouette = ((other - own) / np.maximum(np.maximum(own, other), 1e-12)).mean()
        result |= {f"fisher_{target}": float(fisher), f"silhouette_{target}": float(silhouette)}
    return result


# ---------------------------------------------------------------------------------------------


def fold_list(text: str) -> list[int]:
    """Folds of "1-3,5", sorted."""
    if not re.fullmatch(r"[1-9]\d{0,3}(-[1-9]\d{0,3})?(,[1-9]\d{0,3}(-[1-9]\d{0,3})?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give 1-5, or 1,3,5, or a mix")
    ends = [item.split("-") for item in text.split(",")]
    return sorted({fold for e in ends for fold in range(int(e[0]), int(e[-1]) + 1)})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory holding fold1, ...")
    p.add_argument("--folds", type=fold_list, help="1-5, or 1,3,5, or a mix; default: all")
    p.add_argument("--failed", type=fold_list, help="folds to show as missing in any case")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    p.add_argument("--json", action="store_true", help="print all figures as JSON instead")
    return p.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Prints the report; 0, or 1 where a fold is missing."""
    experiments = [read_experiment(run, args.folds, args.failed) for run in args.runs]
    single = len(experiments) == 1
    text = folds_text if single else comparison_text
    subject = experiments[0] if single else experiments
    print(json.dumps([asdict(e) for e in experiments]) if args.json else text(subject))
    if args.markdown:
        args.markdown.write_text(text(subject, markdown=True) + "\n", encoding="utf-8")
    return int(any(e.missing for e in experiments))


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ReportError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
