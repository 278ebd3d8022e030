"""Tables, pictures and a live view of experiments, from what train.py left in their directories.

    python report.py runs/demo                         # folds, mean, intervals, speakers, emotions
    python report.py runs/demo --out runs/demo         # the same and pictures in report.html
    python report.py runs/demo runs/baseline           # comparison, best first; also written to .
    python report.py runs/demo --folds 1-3 --json      # figures of these folds alone
    python report.py runs/demo --status                # where each fold is now

A fold without readable files is shown as missing, with the reason; then nothing that spans folds
is given and the exit code is 1. The mean of the folds' CCCs and the pooled CCC (one CCC over all
test utterances) are two figures: pooling also sees shifts between folds. Intervals are percentile
bootstraps of pooled CCCs over whole speakers, since utterances of one speaker are not independent;
over dialogues where fewer than five speakers are known. Differences of experiments are paired: on
the utterances that both predicted, with the same draws.
Exit code: 0 complete; 1 a fold is missing; 2 wrong flags or files (one line, no trace).
Also here: what a run writes, and how well its embeddings separate. Not here: training, predictions.
"""

import argparse
import base64
import contextlib
import csv
import datetime
import html
import io
import json
import math
import os
import platform
import re
import socket
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
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
MIN_UTTERANCES = 10  # a CCC of fewer is not shown [guess]
MOST_ROWS = 20  # of a breakdown; a corpus may have a thousand speakers
UNKNOWN = {"", "Unknown"}
SILENT = 600  # seconds without a record after which a run that left no status is not running

# A fold's figure -> its heading; FIGURES are all that are read
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
FIGURES = (*COLUMNS, "parameters_trainable", "num_folds")
TEXTS = ("utt_id", "dialog", "speaker", "emotion")  # columns of predictions_<split>.csv
NUMBERS = ("seconds", *TARGETS, *(f"pred_{target}" for target in TARGETS))
STATUS = [
    "fold", "state", "epoch", "step", "best dev CCC", "audio-s/s", "peak GiB", "time left",
    "last record",
]  # fmt: skip

Columns = dict[str, np.ndarray]  # of a predictions CSV: TEXTS as text, NUMBERS as float64, (N,)
Block = tuple[str, object]  # of a report: "heading", "text", "list", "table" or "picture"


class ReportError(ValueError):
    """Files that cannot be read; the message is complete and main exits with code 2."""


@dataclass
class Experiment:
    """Figures of one experiment directory; what spans folds is None where a fold is missing."""

    name: str
    num_folds: int  # of the corpus, as far as the directory shows
    folds: dict[int, dict[str, float] | None]  # fold -> its FIGURES; None = missing
    problems: dict[int, str]  # missing fold -> why
    parts: dict[int, Columns] = field(repr=False)  # fold -> its test rows
    notes: list[str] = field(default_factory=list)
    mean: dict[str, float] | None = None
    std: dict[str, float] | None = None  # sample standard deviation; None for a single fold
    pooled: dict[str, float] | None = None  # as model.metrics, RMSE in the label's own scale
    interval: dict[str, tuple[float, float]] | None = None  # 95 % of each pooled CCC
    clusters: str = ""  # what the bootstrap draws: "10 speakers"
    separation: dict[str, float] | None = None  # mean over folds


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
    """The experiment with all its folds, or those of `asked`; ReportError where it has none.

    All its folds are 1..K: K is num_folds of any result.json, or the highest fold that left a
    directory or a log. A fold in `failed` is missing whatever is on disk: an older run's.
    """
    read, problems = {}, {}
    for fold in found_folds(directory):
        try:
            read[fold] = read_fold(directory / f"fold{fold}")
        except ReportError as error:
            problems[fold] = str(error)
    said = {figures["num_folds"] for figures, _ in read.values()}
    num_folds = int(max({*read, *problems} | said))
    problems |= dict.fromkeys(failed or (), "this run of it failed")
    wanted = asked or range(1, num_folds + 1)
    missing = {k: problems.get(k, "not run") for k in wanted if k not in read or k in problems}
    folds = {fold: None if fold in missing else read[fold][0] for fold in wanted}
    parts = {fold: read[fold][1] for fold in folds if fold not in missing}
    experiment = Experiment(str(directory), num_folds, folds, missing, parts)
    if not missing:
        columns = {key: [figures[key] for figures in folds.values()] for key in FIGURES}
        experiment.mean = {key: statistics.mean(values) for key, values in columns.items()}
        if len(folds) > 1:
            experiment.std = {key: statistics.stdev(values) for key, values in columns.items()}
        rows = pooled_rows(parts.values())
        preds, labels = tensors(rows)
        ids, experiment.clusters = cluster_ids(rows)
        experiment.pooled = metrics(preds, labels)
        experiment.interval = intervals(resampled_cccs(preds, labels, ids))
        experiment.separation = mean_separation(experiment)
    return experiment


def found_folds(directory: Path) -> list[int]:
    """Folds that left a directory or a log; ReportError where there is none."""
    if not directory.is_dir():
        raise ReportError(f"{directory}: no such directory")
    names = [re.fullmatch(r"fold([1-9]\d*)(\.log)?", path.name) for path in directory.iterdir()]
    found = sorted({int(match[1]) for match in names if match})
    if not found and (directory / "args.json").exists():
        raise ReportError(f"{directory} is one fold: give the directory above it")
    if not found:
        raise ReportError(f"{directory}: no folds (fold1, fold2, ...) in it")
    return found


def read_fold(directory: Path) -> tuple[dict[str, float], Columns]:
    """(FIGURES, test rows) of a fold that is done."""
    path = directory / "result.json"
    if not path.exists():
        raise ReportError(f"{path}: not there, the run is not done")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        flat = {f"{s}/{key}": result[s][key] for s in ("dev", "test") for key in result[s]}
        flat |= {"best_epoch": result["best_epoch"], "hours": result["seconds"] / 3600}
        flat |= {"peak_gib": result["peak_gib_measured"], "num_folds": result.get("num_folds", 0)}
        flat["parameters_trainable"] = result["parameters_trainable"]
        figures = {key: float(flat[key]) for key in FIGURES}
    except KeyError as error:
        raise ReportError(f"{path}: has no {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read ({error})") from error
    for key, value in figures.items():
        if not math.isfinite(value):
            raise ReportError(f"{path}: {key} {value} is not a finite number")
    return figures, read_predictions(directory / "predictions_test.csv")


def read_predictions(path: Path) -> Columns:
    """Columns of a predictions CSV with one row at least; ReportError names the row."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ReportError(f"{path}: cannot be read ({error})") from error
    if not rows:
        raise ReportError(f"{path}: no rows")
    absent = [name for name in (*TEXTS, *NUMBERS) if name not in rows[0]]
    if absent:
        raise ReportError(f"{path}: column {', '.join(absent)} is missing")
    columns = {name: np.array([row[name] or "" for row in rows]) for name in TEXTS}
    for name in NUMBERS:
        values = [to_number(row[name]) for row in rows]
        for number, (value, row) in enumerate(zip(values, rows), start=2):
            if not math.isfinite(value):
                raise ReportError(f"{path} row {number}: {name} {row[name]} is not a finite number")
        columns[name] = np.array(values)
    return columns


def to_number(text: str | None) -> float:
    """nan for what is not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def read_vectors(directory: Path, count: int) -> np.ndarray:
    """Utterance vectors (count, U) of the test split, in the row order of its predictions."""
    path = directory / "embedding_test.npy"
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read ({error})") from error
    if vectors.ndim != 2 or len(vectors) != count or not is_finite(vectors):
        raise ReportError(f"{path}: {vectors.dtype} {vectors.shape}, not {count} finite rows")
    return vectors


def is_finite(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool(np.isfinite(values).all())


def read_json(path: Path) -> dict:
    """Empty where the file is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_records(directory: Path) -> list[dict]:
    """Records of metrics.jsonl; without lines that are torn or not of ours."""
    path = directory / "metrics.jsonl"
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the run is writing it, or was killed while it did
        if isinstance(record, dict) and {"event", "step"} <= record.keys():
            numbers = (value for key, value in record.items() if key != "event")
            if all(isinstance(value, (int, float)) for value in numbers):
                records.append(record)
    return records


# ---------------------------------------------------------------------------------------------
# Figures over folds


def pooled_rows(parts: Iterable[Columns]) -> Columns:
    """Test rows of several folds in one table."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in (*TEXTS, *NUMBERS)}


def tensors(rows: Columns) -> tuple[Tensor, Tensor]:
    """preds, labels (N, 2)."""
    columns = ([f"pred_{target}" for target in TARGETS], TARGETS)
    return tuple(torch.from_numpy(np.stack([rows[n] for n in names], axis=1)) for names in columns)


def test_set(experiment: Experiment) -> set[str]:
    return {utt_id for rows in experiment.parts.values() for utt_id in rows["utt_id"].tolist()}


def cluster_ids(rows: Columns) -> tuple[np.ndarray, str]:
    """Cluster of each row (N,) from 0, and what the clusters are: "10 speakers".

    Speakers, or dialogues where fewer than MIN_CLUSTERS speakers are known, or else single
    utterances. An utterance of unknown speaker (dialogue) is a cluster of its own.
    """
    names = {"speaker": "speakers", "dialog": "dialogues", "utt_id": "utterances"}
    for column in names:
        known = set(rows[column].tolist()) - UNKNOWN
        if len(known) >= MIN_CLUSTERS or column == "utt_id":
            break
    pairs = zip(rows[column].tolist(), rows["utt_id"].tolist())
    keys = [key if key in known else f"utterance {utt_id}" for key, utt_id in pairs]
    return np.unique(keys, return_inverse=True)[1], f"{len(known)} {names[column]}"


def resampled_cccs(preds: Tensor, labels: Tensor, ids: np.ndarray) -> np.ndarray:
    """CCC of each column of preds, labels (N, C) in each resample, (RESAMPLES, C).

    Whole clusters are drawn; ids (N,) as from cluster_ids. A CCC needs six sums only, so a resample
    adds up its clusters' sums. The same draws on every call.
    """
    rows = moment_sums(preds[None], labels[None])  # (6, N, C), each utterance's own
    size = int(ids.max()) + 1
    sums = torch.zeros(6, size, rows.shape[2], dtype=torch.float64)
    sums.index_add_(1, torch.from_numpy(ids), rows)
    rng = np.random.default_rng(SEED)
    cccs = []
    for _ in range(0, RESAMPLES, 100):  # 100 at a time: bounded memory for 100 000 clusters
        times = rng.multinomial(size, np.full(size, 1 / size), size=100)  # (100, clusters)
        drawn = torch.einsum("rc,fct->frt", torch.from_numpy(times).double(), sums)
        cccs.append(concordance(drawn))  # (100, C)
    return torch.cat(cccs).numpy()


def intervals(cccs: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % percentile interval per target and of their mean, from (RESAMPLES, 2)."""
    cccs = np.column_stack((cccs, cccs.mean(1)))
    low, high = np.quantile(cccs, (0.025, 0.975), axis=0).tolist()
    return dict(zip([f"ccc_{name}" for name in (*TARGETS, "mean")], zip(low, high)))


def paired_difference(one: Experiment, two: Experiment) -> dict | str:
    """Pooled CCCs of `one` minus those of `two` on the test utterances of both, or why not.

    "n", "clusters", "ccc_valence": (difference, low, high), ...; the two share every draw.
    """
    if not (one.parts and two.parts):
        return "no fold of one of them is there"
    rows = [pooled_rows(e.parts.values()) for e in (one, two)]
    shared, *index = np.intersect1d(*(part["utt_id"] for part in rows), return_indices=True)
    if not len(shared):
        return "no test utterance in common"
    rows = [{name: part[name][i] for name in part} for part, i in zip(rows, index)]
    (preds_one, labels), (preds_two, others) = (tensors(part) for part in rows)
    if not torch.allclose(labels, others):
        return "their labels of the same utterances differ"
    ids, clusters = cluster_ids(rows[0])
    scores = [metrics(preds, labels) for preds in (preds_one, preds_two)]
    cccs = resampled_cccs(torch.cat((preds_one, preds_two), 1), torch.cat((labels, labels), 1), ids)
    ends = intervals(cccs[:, :2] - cccs[:, 2:])
    differences = {key: (scores[0][key] - scores[1][key], *ends[key]) for key in ends}
    return {"n": len(shared), "clusters": clusters, **differences}


# ---------------------------------------------------------------------------------------------
# How well embeddings separate


def separation(
    vectors: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    speakers: list[str] | np.ndarray,
    most: int = 1000,
) -> dict[str, float]:
    """How far high and low valence and arousal (split at the median) lie apart, and the speakers.

    vectors (n, U), labels (n, 2), speakers (n); at most `most` evenly spaced rows are used. Per
    target: fisher, the squared distance of the two means over the sum of the mean squared distances
    to them; silhouette (Rousseeuw 1987, Euclidean); and distances() of the positions on the line
    through the two means. Then speaker_probe(). A target whose split leaves fewer than two
    utterances on a side is left out.
    """
    keep = np.linspace(0, len(vectors) - 1, min(most, len(vectors))).astype(int)
    vectors = np.asarray(vectors)[keep].astype(np.float64)
    labels, speakers = np.asarray(labels)[keep], np.asarray(speakers)[keep]
    distance = torch.cdist(*[torch.from_numpy(vectors)] * 2).numpy()  # (n, n)
    result = {}
    for i, target in enumerate(TARGETS):
        high = labels[:, i] > np.median(labels[:, i])
        if not 1 < high.sum() < len(high) - 1:
            continue
        one, two = vectors[high], vectors[~high]
        within = sum(((part - part.mean(0)) ** 2).sum(1).mean() for part in (one, two))
        same = np.where(high, high.sum(), (~high).sum()) - 1
        own = (distance * (high[:, None] == high)).sum(1) / same
        other = (distance * (high[:, None] != high)).sum(1) / (len(high) - same - 1)
        positions = held_out_positions(vectors, high)
        figures = {
            "fisher": ((one.mean(0) - two.mean(0)) ** 2).sum() / max(within, 1e-12),
            "silhouette": ((other - own) / np.maximum(np.maximum(own, other), 1e-12)).mean(),
            **distances(positions[high], positions[~high]),
        }
        result |= {f"{name}_{target}": float(value) for name, value in figures.items()}
    return result | speaker_probe(vectors, speakers)


def fifths(groups: np.ndarray) -> np.ndarray:
    """0..4 (n,): the rows of each group in five consecutive parts, mostly other dialogues."""
    part = np.zeros(len(groups), dtype=int)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        part[rows] = np.arange(len(rows)) * 5 // len(rows)
    return part


def held_out_positions(vectors: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(n,) positions along the line from the low mean to the high one, 0 half-way.

    Each fifth is placed on a line drawn without it: with more dimensions than rows, any noise
    would separate on its own line.
    """
    positions, part = np.zeros(len(high)), fifths(high)
    for held_out in range(5):
        test = part == held_out
        low_mean, high_mean = (vectors[~test & half].mean(0) for half in (~high, high))
        line = high_mean - low_mean
        line /= max(np.linalg.norm(line), 1e-12)
        positions[test] = (vectors[test] - (low_mean + high_mean) / 2) @ line
    return positions


def distances(one: np.ndarray, two: np.ndarray) -> dict[str, float]:
    """Distances of two samples of numbers, (n,) and (m,).

    bhattacharyya: of the Gaussians with their means and variances, 0 to infinity. ks: the largest
    difference of the two distribution functions. hellinger and jensen_shannon (root of the
    divergence in bits): of histograms whose bins hold equal shares of both together; 0..1, and
    above 0 for equal distributions too, about sqrt(bins / 8 n).
    """
    both = np.sort(np.concatenate((one, two)))
    below = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (one, two)]
    bins = int(np.clip(np.sqrt(min(len(one), len(two))), 2, 30))
    edges = np.quantile(both, np.arange(1, bins) / bins)
    p, q = (
        np.bincount(np.searchsorted(edges, x, side="right"), minlength=bins) / len(x)
        for x in (one, two)
    )
    middle = np.where(p + q > 0, (p + q) / 2, 1)
    bits = sum((r * np.log2(np.where(r > 0, r / middle, 1))).sum() / 2 for r in (p, q))
    u, v = (max(x.var(), 1e-12) for x in (one, two))
    gap = (one.mean() - two.mean()) ** 2 / (4 * (u + v))
    return {
        "bhattacharyya": gap + 0.5 * math.log((u + v) / (2 * math.sqrt(u * v))),
        "ks": np.abs(below[0] - below[1]).max(),
        "hellinger": math.sqrt(max(0.0, 1 - np.sqrt(p * q).sum())),
        "jensen_shannon": math.sqrt(max(0.0, bits)),
    }


def speaker_probe(vectors: np.ndarray, speakers: np.ndarray) -> dict[str, float]:
    """How well a linear probe reads off the speaker, and chance: leakage where well above it.

    speaker_accuracy: mean over speakers of the share of their utterances told right by a ridge
    regression on the speakers' indicators, each fifth of a speaker held out in turn. Speakers with
    fewer than five of the rows are left out; nothing comes back for fewer than two speakers.
    """
    names, counts = np.unique(speakers, return_counts=True)
    names = [name for name, n in zip(names, counts) if n >= 5 and name not in UNKNOWN]
    if len(names) < 2:
        return {}
    keep = np.isin(speakers, names)
    vectors, speakers = vectors[keep], speakers[keep]
    vectors = (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-12)
    is_speaker = (speakers[:, None] == names).astype(np.float64)  # (n, S)
    gram, part = vectors @ vectors.T, fifths(speakers)  # the dual form: n rows, however wide
    ridge = 0.1 * np.trace(gram) / len(gram)  # [guess]
    right = np.zeros(len(speakers))
    for held_out in range(5):
        train, test = part != held_out, part == held_out
        share = is_speaker[train].mean(0)
        solve = gram[train][:, train] + ridge * np.eye(train.sum())
        scores = gram[test][:, train] @ np.linalg.solve(solve, is_speaker[train] - share) + share
        right[test] = scores.argmax(1) == is_speaker[test].argmax(1)
    accuracy = statistics.mean(right[speakers == name].mean() for name in names)
    return {"speaker_accuracy": float(accuracy), "speaker_chance": 1 / len(names)}


def mean_separation(experiment: Experiment) -> dict[str, float] | None:
    """Mean over folds of what all folds have; None, and a note, where embeddings are missing."""
    figures = []
    for fold, rows in experiment.parts.items():
        try:
            vectors = read_vectors(Path(experiment.name) / f"fold{fold}", len(rows["utt_id"]))
        except ReportError as error:
            experiment.notes.append(f"separation: not given, {error}")
            return None
        figures.append(separation(vectors, tensors(rows)[1], rows["speaker"]))
    keys = [key for key in figures[0] if all(key in fold for fold in figures)]
    return {key: statistics.mean(fold[key] for fold in figures) for key in keys}


# ---------------------------------------------------------------------------------------------
# Reports are blocks, shown as text, Markdown or HTML


def fold_blocks(e: Experiment) -> list[Block]:
    """One experiment: its folds, then the figures over all of them, or why there are none."""
    rows = [["fold", *COLUMNS.values()]]
    named = {str(fold): values for fold, values in e.folds.items()} | {"mean": e.mean, "std": e.std}
    for name, values in named.items():
        if values:
            form = {"best_epoch": ".3g"}
            rows.append([name, *(f"{values[key]:{form.get(key, '.3f')}}" for key in COLUMNS)])
        elif name.isdigit():
            rows.append([name, "missing", *"-" * (len(COLUMNS) - 1)])
    scope = f"{len(e.folds)} of {e.num_folds} folds, each on its own test set"
    blocks = [("heading", f"{e.name}: {scope}"), ("table", rows)]
    if e.problems:
        reasons = [f"fold {fold}: {why}" for fold, why in e.problems.items()]
        return [*blocks, ("text", f"mean: {not_given(e)}"), ("list", reasons)]
    everything = pooled_rows(e.parts.values())
    rows = [["pooled", "CCC", "95 % interval", "PCC", "RMSE"]]
    for name in (*TARGETS, "mean"):
        low, high = e.interval[f"ccc_{name}"]
        rest = [f"{e.pooled[f'{key}_{name}']:.3f}" for key in ("pcc", "rmse") if name in TARGETS]
        ccc = f"{e.pooled[f'ccc_{name}']:.3f}"
        rows.append([name, ccc, f"[{low:.3f}, {high:.3f}]", *(rest or "--")])
    count = len(everything["utt_id"])
    about = (
        f"pooled: one CCC over all {count} test utterances (not the mean over folds); "
        f"interval from {RESAMPLES} bootstrap draws of {e.clusters}"
    )
    blocks += [("text", about), ("table", rows)]
    blocks += [*breakdown(everything, "speaker"), *breakdown(everything, "emotion")]
    return [*blocks, ("list", e.notes)]


def separation_blocks(experiments: list[Experiment]) -> list[Block]:
    """Table of separation(), means over folds, a column per experiment."""
    keys = dict.fromkeys(key for e in experiments for key in e.separation or ())
    rows = [["embeddings", *(e.name for e in experiments)]]
    for key in keys:
        values = [(e.separation or {}).get(key) for e in experiments]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        rows.append([key.replace("_", " "), *cells])
    return [("table", rows)] if keys else []


def breakdown(rows: Columns, column: str) -> list[Block]:
    """Table per speaker or emotion of at least two, the MOST_ROWS largest; bias: pred - true."""
    names, counts = np.unique(rows[column], return_counts=True)
    if len(names) < 2:
        return []
    headings = [f"{what} {target}" for what in ("CCC", "RMSE", "bias") for target in TARGETS]
    table = [[column, "n", *headings]]
    preds_labels = tensors(rows)
    for name in sorted(names[np.argsort(-counts, kind="stable")[:MOST_ROWS]]):
        preds, labels = (values[rows[column] == name] for values in preds_labels)
        scores, bias = metrics(preds, labels), (preds - labels).mean(0).tolist()
        cells = []
        for i, target in enumerate(TARGETS):  # a CCC against two label values says little
            enough = len(labels) >= MIN_UTTERANCES and len(labels[:, i].unique()) > 2
            cells.append(f"{scores[f'ccc_{target}']:.3f}" if enough else "-")
        cells += [f"{scores[f'rmse_{target}']:.3f}" for target in TARGETS]
        table.append([name or "unknown", str(len(labels)), *cells, *(f"{b:+.3f}" for b in bias)])
    more = f"and {len(names) - MOST_ROWS} more, each with fewer utterances"
    return [("table", table), *([("text", more)] if len(names) > MOST_ROWS else [])]


def not_given(e: Experiment) -> str:
    """Why there is no mean: "not given, fold 3 is missing"."""
    if len(e.problems) == 1:
        return f"not given, fold {min(e.problems)} is missing"
    return f"not given, folds {', '.join(map(str, e.problems))} are missing"


def comparison_blocks(experiments: list[Experiment]) -> list[Block]:
    """Table of all experiments in their order, then differences to the first."""
    heading = ["experiment", "folds", *(f"CCC {target}" for target in TARGETS), "CCC mean"]
    rows = [[*heading, "parameters trainable", "hours", "peak GiB"]]
    notes = ["CCC: mean over folds ± standard deviation, on test; hours: all folds together"]
    for e in experiments:
        scope = f"{len(e.parts)}/{e.num_folds}"
        if e.problems:
            rows.append([e.name, scope, "missing", *"-----"])
            notes.append(f"{e.name}: mean {not_given(e)}")
            notes += [f"{e.name} fold {fold}: {why}" for fold, why in e.problems.items()]
            continue
        spread = f" ± {e.std['test/ccc_mean']:.3f}" if e.std else ""
        costs = [
            f"{e.mean['parameters_trainable'] / 1e6:.2f} M",
            f"{sum(values['hours'] for values in e.folds.values()):.2f}",
            f"{max(values['peak_gib'] for values in e.folds.values()):.2f}",
        ]
        cccs = [f"{e.mean[f'test/ccc_{name}']:.3f}" for name in (*TARGETS, "mean")]
        rows.append([e.name, scope, *cccs[:-1], cccs[-1] + spread, *costs])
        if test_set(e) != test_set(experiments[0]):
            notes.append(f"{e.name}: tested on other utterances than {experiments[0].name}")
        notes += [f"{e.name}: {note}" for note in e.notes]
    blocks = [("heading", f"{len(experiments)} experiments, best first")]
    blocks += [("table", rows), ("list", notes)]

    best = experiments[0]
    rows = [["less the best", "utterances", *(f"CCC {name}" for name in (*TARGETS, "mean"))]]
    for e in experiments[1:]:
        paired = paired_difference(e, best)
        if isinstance(paired, str):
            rows.append([e.name, paired, *"---"])
            continue
        cells = [paired[f"ccc_{name}"] for name in (*TARGETS, "mean")]
        cells = [f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in cells]
        rows.append([e.name, f"{paired['n']} of {paired['clusters']}", *cells])
    about = (
        f"pooled CCC less that of {best.name}, on test utterances that both predicted, with 95 % "
        f"intervals from {RESAMPLES} paired bootstrap draws; where 0 is inside, none is shown"
    )
    return [*blocks, ("heading", "Paired differences"), ("table", rows), ("text", about)]


def as_text(blocks: list[Block], markdown: bool = False) -> str:
    """Without pictures. On a terminal, a heading of two words stands on two lines."""
    parts = []
    for kind, content in blocks:
        if kind == "table" and markdown:
            cells = [[cell.replace("|", "\\|") for cell in row] for row in content]
            cells.insert(1, [":--", *("--:" for _ in cells[0][1:])])
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
        elif kind == "table":
            heads = [heading.rpartition(" ")[::2] for heading in content[0]]
            rows = [*map(list, zip(*heads)), *content[1:]]
            rows = rows if any(rows[0]) else rows[1:]
            widths = [max(map(len, column)) for column in zip(*rows)]
            rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
            parts.append("\n".join("  ".join(row).rstrip() for row in rows))
        elif kind == "list":
            parts += ["\n".join(f"- {item}" for item in content)] if content else []
        elif kind in ("heading", "text"):
            parts.append("## " * (markdown and kind == "heading") + content)
    return "\n\n".join(parts)


def as_html(blocks: list[Block]) -> str:
    """One page with all in it: no script, nothing from a network, which its policy forbids."""
    parts = []
    for kind, content in blocks:
        if kind == "table":
            rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in content]
            body = "".join(f"<tr>{row}</tr>\n" for row in rows[1:])
            head = rows[0].replace("td>", "th>")
            parts.append(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>")
        elif kind == "list":
            items = "".join(f"<li>{html.escape(item)}</li>" for item in content)
            parts.append(f"<ul>{items}</ul>" if items else "")
        elif kind == "picture":
            caption, figure = content
            png = io.BytesIO()
            figure.savefig(png, format="png")
            uri = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            caption = html.escape(caption)
            image = f'<img src="{uri}" alt="{caption}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        else:
            tag = {"heading": "h2", "text": "p"}[kind]
            parts.append(f"<{tag}>{html.escape(content)}</{tag}>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vatune report</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ccc }}
th:first-child, td:first-child {{ text-align: left }}
h2 {{ margin-top: 2.5rem }} img {{ max-width: 100% }} figure {{ margin: 1.5rem 0 }}
</style></head><body>
{chr(10).join(parts)}
</body></html>
"""


# ---------------------------------------------------------------------------------------------
# Pictures. Colours of Okabe and Ito, which the colour-blind tell apart, and cividis

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "o^sDv<>"


def plot_run(directory: Path, split: str, vectors: Tensor) -> None:
    """The pictures of a run; vectors (n, U) in the row order of predictions_<split>.csv."""
    parts = {directory.name: read_predictions(directory / f"predictions_{split}.csv")}
    records = {directory.name: read_records(directory)}
    for name, figure in plot_all(records, parts, {directory.name: vectors.numpy()}).items():
        figure.savefig(directory / f"{name}.png")


def picture_blocks(e: Experiment) -> list[Block]:
    """The pictures of one experiment, of the folds that are there."""
    runs = {f"fold {fold}": Path(e.name) / f"fold{fold}" for fold in e.parts}
    parts, vectors = dict(zip(runs, e.parts.values())), {}
    for name, run in runs.items():
        with contextlib.suppress(ReportError):  # named in the notes
            vectors[name] = read_vectors(run, len(parts[name]["utt_id"]))
    records = {name: read_records(run) for name, run in runs.items()}
    figures = plot_all(records, parts, vectors) if parts else {}
    scope = f"{e.name}, {', '.join(runs)}"
    return [("picture", (f"{name}: {scope}", figure)) for name, figure in figures.items()]


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
    figure, axes = new_figure(3)
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
    preds, labels = (values.numpy() for values in tensors(rows))
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
    figure, axes = new_figure(3, len(maps))
    for row, (name, (vectors, columns)) in enumerate(maps.items()):
        keep = np.linspace(0, len(vectors) - 1, min(most, len(vectors))).astype(int)
        centred = vectors[keep].astype(np.float64)
        centred -= centred.mean(0)
        _, values, components = np.linalg.svd(centred, full_matrices=False)
        share = np.append(values**2, 0) / max((values**2).sum(), 1e-12)
        points = np.pad(centred @ components[:2].T, ((0, 0), (0, 1)))[:, :2]  # (n, 2), n = 1 too
        *pair, last = axes[3 * row : 3 * row + 3]
        for axis, target in zip(pair, TARGETS):
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
        for axis, what in zip((*pair, last), (*TARGETS, "speaker")):
            axis.set(xlabel=f"PC 1 ({share[0]:.0%})", ylabel=f"PC 2 ({share[1]:.0%})")
            axis.set_title(f"{name}: {what}")
    return figure


# ---------------------------------------------------------------------------------------------
# Watching


def status_text(directory: Path, asked: list[int] | None = None) -> str:
    """Where each fold is now, and below the table why some have ended."""
    rows, reasons = [STATUS], []
    for fold in asked or found_folds(directory):
        cells, reason = fold_status(directory / f"fold{fold}", time.time())
        rows.append([str(fold), *cells])
        reasons += [f"fold {fold}: {reason}"] if reason else []
    return as_text([("heading", str(directory)), ("table", rows), ("list", reasons)])


def fold_status(directory: Path, now: float) -> tuple[list[str], str]:
    """(cells of the status table: state, epoch, ...; why it ended, or "") of one fold.

    Running is what says so and whose process lives, or, where that cannot be seen (another
    machine, no status.json), what wrote something in the last SILENT seconds.
    """
    files = [directory / name for name in ("metrics.jsonl", "status.json", "args.json")]
    written = [path.stat().st_mtime for path in files if path.is_file()]
    if not written:
        return ["missing", *"-" * (len(STATUS) - 2)], ""
    status, age = read_json(directory / "status.json"), now - max(written)
    code = status.get("exit_code")
    state, reason = "running", ""
    if (directory / "result.json").exists():
        state = "done"
    elif isinstance(code, int):
        state = "stopped" if code == 75 else "failed"
        reason = f"exit code {code}: {status.get('reason') or 'see train.log'}"
    elif isinstance(status.get("pid"), int) and status.get("host") == socket.gethostname():
        if not Path(f"/proc/{status['pid']}").exists():
            state, reason = "failed", f"its process {status['pid']} is gone without an exit code"
    elif age > SILENT:
        state, reason = "stopped", f"nothing written for {clock(age)}"

    records = read_records(directory)
    train = [r for r in records if r["event"] == "train"]
    dev = [r["dev/ccc_mean"] for r in records if r["event"] == "dev" and "dev/ccc_mean" in r]
    last = train[-1] if train else {}
    step, total = last.get("step", 0), last.get("total_steps")
    left = "-"
    if state == "running" and total and "ms_per_step" in last:
        left = clock((total - step) * last["ms_per_step"] / 1000)
    epochs = read_json(directory / "args.json").get("epochs", "?")
    formats = {"audio_seconds_per_second": ".0f", "peak_gib": ".2f"}
    speed, peak = (f"{last[k]:{form}}" if k in last else "-" for k, form in formats.items())
    best = f"{max(dev):.4f}" if dev else "-"
    place = [f"{last.get('epoch', 0):.2f}/{epochs}", f"{step}/{total or '?'}"]
    return [state, *place, best, speed, peak, left, f"{clock(age)} ago"], reason


def clock(seconds: float) -> str:
    """0:41:07"""
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


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
    p.add_argument("--status", action="store_true", help="show where each fold is now, and stop")
    p.add_argument("--out", type=Path, metavar="DIR",
        help="write report.html, of several RUNs experiment_comparison.md too; default: . for "
        "several RUNs, nowhere for one")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print all figures as JSON instead")
    return p.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Prints the report and writes its files; 0, or 1 where a fold is missing."""
    if args.status:
        print("\n\n".join(status_text(run, args.folds) for run in args.runs))
        return 0
    experiments = [read_experiment(run, args.folds, args.failed) for run in args.runs]
    experiments.sort(key=lambda e: -e.mean["test/ccc_mean"] if e.mean else 2)  # missing ones last
    several = len(experiments) > 1
    blocks = comparison_blocks(experiments) if several else fold_blocks(experiments[0])
    blocks += separation_blocks(experiments)
    if args.json:
        figures = [{k: v for k, v in vars(e).items() if k != "parts"} for e in experiments]
        print(json.dumps(figures))
    else:
        print(as_text(blocks))
    out = args.out or (Path() if several else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        if several:
            table = as_text(blocks, markdown=True) + "\n"
            (out / "experiment_comparison.md").write_text(table, encoding="utf-8")
        page = list(blocks)
        for e in experiments:
            page += [*(fold_blocks(e) if several else []), *picture_blocks(e)]
        (out / "report.html").write_text(as_html(page), encoding="utf-8")
        print(f"\nwritten: {out / 'report.html'}", file=sys.stderr)
    return int(any(e.problems for e in experiments))


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ReportError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
