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
import datetime
import html
import io
import json
import math
import re
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpora import known_speaker
from model import TARGETS, concordance, metrics, moment_sums
from pictures import plot_all, plot_run  # noqa: F401
from util.files import UserError, replace_text
from util.runs import (
    Columns,
    pooled_rows,
    read_json,
    read_predictions,
    read_records,
    read_vectors,
    tensors,
)

RESAMPLES = 2000
SEED = 0
MIN_CLUSTERS = 5  # fewer speakers than this say little about the next one [guess]
MIN_UTTERANCES = 10  # a CCC of fewer is not shown [guess]
MOST_ROWS = 20  # of a breakdown; a corpus may have a thousand speakers
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
STATUS = [
    "fold", "state", "epoch", "step", "best dev CCC", "audio-s/s", "peak GiB", "time left",
    "last record",
]  # fmt: skip

Block = tuple[str, object]  # of a report: "heading", "text", "list", "table" or "picture"


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
# Reading


def read_experiment(
    directory: Path, asked: list[int] | None = None, failed: list[int] | None = None
) -> Experiment:
    """The experiment with all its folds, or those of `asked`; UserError where it has none.

    All its folds are 1..K: K is num_folds of any result.json or, without one, the highest fold
    that left a directory or a log. A fold in `failed` is missing whatever is on disk: that is an
    older run's.
    """
    read, problems = {}, {}
    for fold in found_folds(directory):
        try:
            read[fold] = read_fold(directory / f"fold{fold}")
        except UserError as error:
            problems[fold] = str(error)
    said = {figures["num_folds"] for figures, _ in read.values()}
    num_folds = int(max(said) if any(said) else max(*read, *problems, 1))
    problems |= dict.fromkeys(failed or (), "this run of it failed")
    wanted = asked or range(1, num_folds + 1)
    missing = {k: problems.get(k, "not run") for k in wanted if k not in read or k in problems}
    folds = {fold: None if fold in missing else read[fold][0] for fold in wanted}
    parts = {fold: read[fold][1] for fold in folds if fold not in missing}
    experiment = Experiment(str(directory), num_folds, folds, missing, parts)
    for fold in {*read, *problems} - {*range(1, num_folds + 1)}:
        experiment.notes.append(
            f"{directory}: what is there of fold {fold} is left out: there are {num_folds}"
        )
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
    """Folds that left a directory or a log; UserError where there is none."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    names = [re.fullmatch(r"fold([1-9]\d*)(\.log)?", path.name) for path in directory.iterdir()]
    found = sorted({int(match[1]) for match in names if match})
    if not found and (directory / "args.json").exists():
        raise UserError(f"{directory} is one fold: give the directory above it")
    if not found:
        raise UserError(f"{directory}: no folds (fold1, fold2, ...) in it")
    return found


def read_fold(directory: Path) -> tuple[dict[str, float], Columns]:
    """(FIGURES, test rows) of a fold that is done."""
    path = directory / "result.json"
    if not path.exists():
        raise UserError(f"{path}: not there, the run is not done")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        flat = {f"{s}/{key}": result[s][key] for s in ("dev", "test") for key in result[s]}
        flat |= {"best_epoch": result["best_epoch"], "hours": result["seconds"] / 3600}
        flat |= {"peak_gib": result["peak_gib_measured"], "num_folds": result.get("num_folds", 0)}
        flat["parameters_trainable"] = result["parameters_trainable"]
        figures = {key: float(flat[key]) for key in FIGURES}
    except KeyError as error:
        raise UserError(f"{path}: has no {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for key, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"{path}: {key} {value} is not a finite number")
    return figures, read_predictions(directory / "predictions_test.csv")


# ---------------------------------------------------------------------------------------------
# Figures over folds


def test_set(experiment: Experiment) -> set[str]:
    return {utt_id for rows in experiment.parts.values() for utt_id in rows["utt_id"].tolist()}


def cluster_ids(rows: Columns) -> tuple[np.ndarray, str]:
    """Cluster of each row (N,) from 0, and what the clusters are: "10 speakers".

    Speakers, or dialogues where fewer than MIN_CLUSTERS speakers are known, or else single
    utterances. An utterance of unknown speaker (dialogue) is a cluster of its own.
    """
    names = {"speaker": "speakers", "dialog": "dialogues", "utt_id": "utterances"}
    for column in names:
        known = set(filter(known_speaker, rows[column].tolist()))
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
    ends = intervals(cccs[:, : len(TARGETS)] - cccs[:, len(TARGETS) :])
    differences = {key: (scores[0][key] - scores[1][key], *ends[key]) for key in ends}
    return {"n": len(shared), "clusters": clusters, **differences}


def frozen_baseline(run: Path) -> Path | None:
    """Of the finished folds in the same --out that kept the same WavLM frozen, on the same data and
    fold, the one with the best dev CCC."""
    own, found = read_json(run / "args.json"), []
    same = ("data", "fold", "label_range", "encoder", "wavlm", "wavlm_revision")
    for path in run.parent.parent.glob(f"*/{run.name}/result.json"):
        flags = read_json(path.with_name("args.json"))
        alike = all(flags.get(flag) == own.get(flag) for flag in same)
        frozen = flags.get("unfreeze") == "none" and not flags.get("init_from")
        if path.parent != run and alike and frozen:
            with contextlib.suppress(UserError):  # damaged
                found.append((read_fold(path.parent)[0]["dev/ccc_mean"], path.parent))
    return max(found)[1] if found else None


def against_frozen(run: Path) -> str:
    """What fine-tuning has gained on the test split of a finished fold, in one line."""
    baseline = frozen_baseline(run)
    if baseline is None:
        return (
            f"no frozen baseline of this fold in {run.parent.parent}: the same command with "
            "--unfreeze none --name frozen makes one, then report.py compares the two"
        )
    fold = int(run.name.removeprefix("fold"))
    paired = paired_difference(*(read_experiment(r.parent, [fold]) for r in (run, baseline)))
    if isinstance(paired, str):
        return f"no comparison with {baseline}: {paired}"
    cccs = ", ".join(
        "{} {:+.3f} [{:+.3f}, {:+.3f}]".format(name, *paired[f"ccc_{name}"])
        for name in (*TARGETS, "mean")
    )
    return (
        f"test CCC less that of the frozen {baseline}: {cccs} (95 % intervals over "
        f"{paired['clusters']}, {paired['n']} utterances; where 0 is inside, no gain is shown)"
    )


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
    names = [name for name, n in zip(names, counts) if n >= 5 and known_speaker(name)]
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
        except UserError as error:
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
    scope = f"{len(e.parts)} of {e.num_folds} folds, each on its own test set"
    blocks = [("heading", f"{e.name}: {scope}"), ("table", rows)]
    if e.problems:
        reasons = [f"fold {fold}: {why}" for fold, why in e.problems.items()]
        return [*blocks, ("text", f"mean: {not_given(e)}"), ("list", reasons + e.notes)]
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
            rows.append([e.name, scope, "missing", *"-" * (len(rows[0]) - 3)])
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
            rows.append([e.name, paired, *"-" * (len(rows[0]) - 2)])
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


def picture_blocks(e: Experiment) -> list[Block]:
    """The pictures of one experiment, of the folds that are there."""
    runs = {f"fold {fold}": Path(e.name) / f"fold{fold}" for fold in e.parts}
    parts, vectors = dict(zip(runs, e.parts.values())), {}
    for name, run in runs.items():
        with contextlib.suppress(UserError):  # named in the notes
            vectors[name] = read_vectors(run, len(parts[name]["utt_id"]))
    records = {name: read_records(run) for name, run in runs.items()}
    figures = plot_all(records, parts, vectors) if parts else {}
    scope = f"{e.name}, {', '.join(runs)}"
    return [("picture", (f"{name}: {scope}", figure)) for name, figure in figures.items()]


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
            replace_text(out / "experiment_comparison.md", table)
        page = list(blocks)
        for e in experiments:
            page += [*(fold_blocks(e) if several else []), *picture_blocks(e)]
        replace_text(out / "report.html", as_html(page))
        print(f"\nwritten: {out / 'report.html'}", file=sys.stderr)
    return int(any(e.problems for e in experiments))


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (UserError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
