"""Tables, intervals and pictures of experiments, and a live view, from what train.py wrote.

    python report.py runs/demo                         # folds, mean, intervals, speakers, emotions
    python report.py runs/demo --out runs/demo         # the same with pictures in report.html
    python report.py runs/demo runs/baseline           # comparison, best first; also written to .
    python report.py runs/demo --folds 1-3 --json      # figures of these folds alone
    python report.py runs/demo --status                # where each fold is now

A fold without readable files is shown as missing, with the reason; then nothing that spans folds
is given and the exit code is 1. The mean of the folds' CCCs and the pooled CCC (one CCC over all
test utterances) are two figures: pooling also sees shifts between folds. Intervals are percentile
bootstraps of pooled CCCs that draw all utterances of a speaker together, since these are not
independent; dialogues are drawn if fewer than five speakers are known. Differences of experiments
are paired: on the utterances that both predicted, with the same draws.
Exit code: 0 complete; 1 a fold is missing; 2 wrong flags or files (one line, no traceback).
train.py uses plot_run, separation and against_frozen. Not here: training, predictions.
"""

import argparse
import base64
import contextlib
import datetime
import io
import json
import math
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corpora import known_speaker
from flags import FREE_ON_RESUME
from model import TARGETS, concordance, metrics, moment_sums
from util.files import UserError, replace_text
from util.runs import read_json, read_predictions, read_records, read_vectors, tensors

if TYPE_CHECKING:  # matplotlib and scikit-learn are imported where they are used: they take seconds
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESAMPLES = 2000
SEED = 0
MIN_CLUSTERS = 5  # fewer speakers than this say little about the next one [guess]
MIN_UTTERANCES = 10  # a CCC of fewer is not shown [guess]
MAX_GROUPS = 20  # rows of a breakdown; a corpus may have a thousand speakers
MAX_VECTORS = 1000  # embeddings that are measured or drawn
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
CCCS = {f"ccc_{name}": f"CCC {name}" for name in (*TARGETS, "mean")}
STATUS = ["state", "epoch", "step", "best dev CCC", "audio-s/s", "peak GiB", "time left", "written"]

# A fine-tuned run may differ from its frozen baseline in these flags and in no other
FREE_IN_BASELINE = FREE_ON_RESUME | {
    "unfreeze", "lr", "encoder_lr", "lr_reference_batch", "warmup", "scheduler", "epochs",
    "max_steps", "patience", "eval_every", "separation_every", "name", "feature_cache",
    # how a step is computed, not what it computes
    "batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile", "attention",
}  # fmt: skip

Block = tuple[str, object]  # ("heading" | "text", str), ("list", [str]), ("table", DataFrame) ...


@dataclass
class Experiment:
    """Figures of one experiment directory; what spans folds is None where a fold is missing."""

    name: str
    num_folds: int  # of the corpus, as far as the directory shows
    folds: dict[int, dict[str, float] | None]  # fold -> its FIGURES; None = missing
    problems: dict[int, str]  # missing fold -> why
    parts: dict[int, pd.DataFrame] = field(repr=False)  # fold -> its test rows
    notes: list[str] = field(default_factory=list)
    mean: dict[str, float] | None = None
    std: dict[str, float] | None = None  # sample standard deviation; None for a single fold
    pooled: dict[str, float] | None = None  # as model.metrics, RMSE in the label's scale
    interval: dict[str, tuple[float, float]] | None = None  # 95 % of each pooled CCC
    clusters: str = ""  # what the bootstrap draws: "10 speakers"
    separation: dict[str, float] | None = None  # mean over folds
    less_the_best: dict | str | None = None  # paired_difference to the best of several


# ---------------------------------------------------------------------------------------------
# Reading


def read_experiment(
    directory: Path, asked: list[int] | None = None, failed: list[int] | None = None
) -> Experiment:
    """The experiment with all its folds, or those of `asked`; UserError where it has none.

    All its folds are 1..K: K is num_folds of any result.json or, without one, the highest fold
    that left a directory or a log. A fold in `failed` is missing: what is on disk is older.
    """
    read, problems = {}, {}
    for fold in found_folds(directory):
        try:
            read[fold] = read_fold(directory / f"fold{fold}")
        except UserError as error:
            problems[fold] = str(error)
    num_folds = max((int(figures["num_folds"]) for figures, _ in read.values()), default=0)
    num_folds = num_folds or max(*read, *problems, 1)
    problems |= dict.fromkeys(failed or (), "this run of it failed")
    wanted = asked or range(1, num_folds + 1)
    missing = {k: problems.get(k, "not run") for k in wanted if k not in read or k in problems}
    folds = {fold: None if fold in missing else read[fold][0] for fold in wanted}
    parts = {fold: read[fold][1] for fold in folds if fold not in missing}
    experiment = Experiment(str(directory), num_folds, folds, missing, parts)
    for fold in sorted({*read, *problems} - {*range(1, num_folds + 1)}):
        experiment.notes.append(
            f"{directory}: fold {fold} is left out: the corpus has {num_folds} folds"
        )
    if not missing:
        figures = pd.DataFrame(list(folds.values()))
        experiment.mean = figures.mean().to_dict()
        if len(folds) > 1:
            experiment.std = figures.std().to_dict()
        rows = pd.concat(parts.values(), ignore_index=True)
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


def read_fold(directory: Path) -> tuple[dict[str, float], pd.DataFrame]:
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
# Intervals and differences


def cluster_ids(rows: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Cluster of each row (N,) from 0, and what the clusters are: "10 speakers".

    Speakers, or dialogues if fewer than MIN_CLUSTERS speakers are known, or else single
    utterances. An utterance of unknown speaker (dialogue) is a cluster by itself.
    """
    names = {"speaker": "speakers", "dialog": "dialogues", "utt_id": "utterances"}
    for column in names:
        known = rows[column].map(known_speaker)
        count = rows[column][known].nunique()
        if count >= MIN_CLUSTERS:
            break
    keys = rows[column].where(known, "utterance " + rows["utt_id"])
    return pd.factorize(keys, sort=True)[0], f"{count} {names[column]}"


def resampled_cccs(preds: Tensor, labels: Tensor, ids: np.ndarray) -> np.ndarray:
    """CCC of each column of preds, labels (N, C) in each resample, (RESAMPLES, C).

    Clusters are drawn with all their utterances; ids (N,) as from cluster_ids. A CCC needs six sums
    only, so a resample adds up its clusters' sums. The same draws on every call.
    """
    rows = moment_sums(preds[None], labels[None])  # (6, N, C), one utterance each
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
    return dict(zip(CCCS, zip(low, high)))


def test_rows(e: Experiment) -> pd.DataFrame:
    """Test rows of all folds by utt_id, in its order."""
    rows = pd.concat(e.parts.values()).drop_duplicates("utt_id")
    return rows.set_index(rows["utt_id"].rename(None)).sort_index()


def paired_difference(one: Experiment, two: Experiment) -> dict | str:
    """Pooled CCCs of `one` minus those of `two` on the test utterances of both, or why not.

    "to" (name of `two`), "n", "clusters", "ccc_valence": (difference, low, high), ...; both share
    every draw.
    """
    if not (one.parts and two.parts):
        return "no fold of one of them is there"
    rows_one, rows_two = test_rows(one), test_rows(two)
    shared = rows_one.index.intersection(rows_two.index)
    if not len(shared):
        return "no test utterance in common"
    preds_one, labels = tensors(rows_one.loc[shared])
    preds_two, others = tensors(rows_two.loc[shared])
    if not torch.allclose(labels, others):
        return "their labels of the same utterances differ"
    ids, clusters = cluster_ids(rows_one.loc[shared])
    score_one, score_two = metrics(preds_one, labels), metrics(preds_two, labels)
    cccs = resampled_cccs(torch.cat((preds_one, preds_two), 1), torch.cat((labels, labels), 1), ids)
    ends = intervals(cccs[:, : len(TARGETS)] - cccs[:, len(TARGETS) :])
    differences = {key: (score_one[key] - score_two[key], *ends[key]) for key in ends}
    return {"to": two.name, "n": len(shared), "clusters": clusters, **differences}


def frozen_baseline(run: Path) -> tuple[Path | None, str]:
    """(the finished fold that is this run with WavLM frozen, or None; then why there is none).

    It is the one with the best dev CCC among those of the same --out and fold that agree in all
    flags that both know, but for FREE_IN_BASELINE.
    """
    flags = read_json(run / "args.json")
    found, refused = [], []
    for path in sorted(run.parent.parent.glob(f"*/{run.name}/result.json")):
        others = read_json(path.with_name("args.json"))
        if path.parent == run or others.get("unfreeze") != "none":
            continue
        compared = sorted(flags.keys() & others.keys() - FREE_IN_BASELINE)
        differ = [flag for flag in compared if flags[flag] != others[flag]]
        if differ:
            values = [f"--{flag} ({others[flag]}, here {flags[flag]})" for flag in differ]
            refused.append((len(differ), f"{path.parent} differs in {', '.join(values)}"))
            continue
        with contextlib.suppress(UserError):  # damaged
            found.append((read_fold(path.parent)[0]["dev/ccc_mean"], path.parent))
    if found:
        return max(found)[1], ""
    return None, min(refused)[1] if refused else ""


def against_frozen(run: Path) -> str:
    """Gain of a finished fold over its frozen baseline on the test split, in one line."""
    baseline, differs = frozen_baseline(run)
    if baseline is None:
        return (
            f"no frozen baseline of this fold in {run.parent.parent}"
            f"{f' ({differs})' if differs else ''}: the same command with --unfreeze none --name "
            "frozen makes one, then report.py compares the two"
        )
    fold = int(run.name.removeprefix("fold"))
    one, two = (read_experiment(path.parent, [fold]) for path in (run, baseline))
    paired = paired_difference(one, two)
    if isinstance(paired, str):
        return f"no comparison with {baseline}: {paired}"
    cccs = ", ".join(f"{key.removeprefix('ccc_')} {signed(paired[key])}" for key in CCCS)
    return (
        f"test CCC less that of the frozen {baseline}: {cccs} (95 % intervals over "
        f"{paired['clusters']}, {paired['n']} utterances; an interval with 0 inside shows no gain)"
    )


def signed(difference: tuple[float, float, float]) -> str:
    """+0.012 [-0.003, +0.027]"""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)


# ---------------------------------------------------------------------------------------------
# Separation of embeddings


def separation(
    vectors: np.ndarray | Tensor, labels: np.ndarray | Tensor, speakers: list[str] | np.ndarray
) -> dict[str, float]:
    """How far high and low valence and arousal (split at the median) lie apart, and the speakers.

    vectors (n, U), labels (n, 2), speakers (n); at most MAX_VECTORS evenly spaced rows are used.
    silhouette_<target>: of the two halves, -1..1. ks_<target>: the Kolmogorov-Smirnov distance,
    0..1, of the halves' positions along the direction of a linear probe that did not see them.
    speaker_accuracy: mean over speakers of the share of utterances that a linear probe attributes
    correctly; leakage if well above speaker_chance. Probes are logistic regressions in five-fold
    cross-validation over consecutive rows. A target with fewer than five utterances in a half, and
    speakers with fewer than five, are left out.
    """
    from scipy.stats import ks_2samp
    from sklearn.metrics import recall_score, silhouette_score

    keep = evenly_spaced(len(vectors))
    vectors = np.asarray(vectors)[keep].astype(np.float64)
    labels, speakers = np.asarray(labels)[keep], np.asarray(speakers, dtype=object)[keep]
    result = {}
    for i, target in enumerate(TARGETS):
        high = labels[:, i] > np.median(labels[:, i])
        if min(high.sum(), (~high).sum()) < 5:
            continue
        positions = probe(vectors, high, "decision_function")
        result[f"silhouette_{target}"] = float(silhouette_score(vectors, high))
        result[f"ks_{target}"] = float(ks_2samp(positions[high], positions[~high]).statistic)
    counts = pd.Series(speakers).value_counts()
    names = [name for name, count in counts.items() if count >= 5 and known_speaker(name)]
    if len(names) > 1:
        known = np.isin(speakers, names)
        attributed = probe(vectors[known], speakers[known], "predict")
        accuracy = recall_score(speakers[known], attributed, average="macro")
        result |= {"speaker_accuracy": float(accuracy), "speaker_chance": 1 / len(names)}
    return result


def evenly_spaced(count: int) -> np.ndarray:
    """At most MAX_VECTORS of `count` rows."""
    return np.linspace(0, count - 1, min(MAX_VECTORS, count)).astype(int)


def probe(vectors: np.ndarray, classes: np.ndarray, method: str) -> np.ndarray:
    """What logistic regressions that have not seen a row (n, U) say of it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # C [guess]: strong, as there may be as many dimensions as rows
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return cross_val_predict(model, vectors, classes, cv=5, method=method)


def mean_separation(experiment: Experiment) -> dict[str, float] | None:
    """Mean over folds of what all folds have; None, and a note, where embeddings are missing."""
    figures = []
    for fold, rows in experiment.parts.items():
        try:
            vectors = read_vectors(Path(experiment.name) / f"fold{fold}", len(rows))
        except UserError as error:
            experiment.notes.append(f"separation: not given, {error}")
            return None
        figures.append(separation(vectors, tensors(rows)[1], rows["speaker"].tolist()))
    return pd.DataFrame(figures).dropna(axis="columns").mean().to_dict()


# ---------------------------------------------------------------------------------------------
# Reports are blocks, shown as text, Markdown or HTML


def table(what: str, rows: list[list[str]], columns: list[str]) -> Block:
    """A table of text; `what` is the heading of the rows' names, the first cell of each row."""
    names = pd.Index([row[0] for row in rows], dtype=object)  # names need not be UTF-8
    columns = pd.Index(columns, name=what, dtype=object)
    return "table", pd.DataFrame([row[1:] for row in rows], names, columns, dtype=object)


def fold_blocks(e: Experiment) -> list[Block]:
    """One experiment: its folds, then the figures over all of them, or why there are none."""
    rows = []
    for name, figures in [*e.folds.items(), ("mean", e.mean), ("std", e.std)]:
        if figures:
            cells = {key: f"{figures[key]:.3f}" for key in COLUMNS}
            cells["best_epoch"] = f"{figures['best_epoch']:.3g}"
            rows.append([str(name), *cells.values()])
        elif name in e.problems:
            rows.append([str(name), "missing", *["-"] * (len(COLUMNS) - 1)])
    scope = f"{len(e.parts)} of {e.num_folds} folds, each on its own test set"
    blocks = [("heading", f"{e.name}: {scope}"), table("fold", rows, list(COLUMNS.values()))]
    if e.problems:
        reasons = [f"fold {fold}: {why}" for fold, why in e.problems.items()]
        return [*blocks, ("text", f"mean: {not_given(e)}"), ("list", reasons + e.notes)]
    everything = pd.concat(e.parts.values(), ignore_index=True)
    rows = []
    for name in (*TARGETS, "mean"):
        low, high = e.interval[f"ccc_{name}"]
        rest = ["-", "-"]
        if name in TARGETS:
            rest = [f"{e.pooled[f'{key}_{name}']:.3f}" for key in ("pcc", "rmse")]
        rows.append([name, f"{e.pooled[f'ccc_{name}']:.3f}", f"[{low:.3f}, {high:.3f}]", *rest])
    explained = (
        f"pooled: one CCC over all {len(everything)} test utterances (not the mean over folds); "
        f"interval from {RESAMPLES} bootstrap draws of {e.clusters}"
    )
    pooled = table("pooled", rows, ["CCC", "95 % interval", "PCC", "RMSE"])
    blocks += [("text", explained), pooled, *breakdown(everything, "speaker")]
    return [*blocks, *breakdown(everything, "emotion"), ("list", e.notes)]


def separation_blocks(experiments: list[Experiment]) -> list[Block]:
    """Table of separation(), means over folds, a column per experiment."""
    figures = pd.DataFrame([e.separation or {} for e in experiments]).T
    cells = figures.map(lambda value: "-" if math.isnan(value) else f"{value:.3f}")
    rows = [[key.replace("_", " "), *row] for key, *row in cells.itertuples(name=None)]
    return [table("embeddings", rows, [e.name for e in experiments])] if rows else []


def breakdown(rows: pd.DataFrame, column: str) -> list[Block]:
    """Table per speaker or emotion if there are two, the MAX_GROUPS largest; bias: pred - true."""
    groups = rows.groupby(rows[column].replace("", "unknown"))
    sizes = groups.size().sort_values(ascending=False, kind="stable")
    if len(sizes) < 2:
        return []
    cells = []
    for name in sorted(sizes.index[:MAX_GROUPS]):
        preds, labels = tensors(groups.get_group(name))
        scores, bias = metrics(preds, labels), (preds - labels).mean(0).tolist()
        row = [name, str(len(labels))]
        for i, target in enumerate(TARGETS):  # a CCC against two label values says little
            enough = len(labels) >= MIN_UTTERANCES and len(labels[:, i].unique()) > 2
            row.append(f"{scores[f'ccc_{target}']:.3f}" if enough else "-")
        row += [f"{scores[f'rmse_{target}']:.3f}" for target in TARGETS]
        cells.append(row + [f"{value:+.3f}" for value in bias])
    headings = [f"{what} {target}" for what in ("CCC", "RMSE", "bias") for target in TARGETS]
    blocks = [table(column, cells, ["n", *headings])]
    if len(sizes) > MAX_GROUPS:
        more = f"and {len(sizes) - MAX_GROUPS} more, none with more utterances than these"
        blocks.append(("text", more))
    return blocks


def not_given(e: Experiment) -> str:
    """Why there is no mean: "not given, fold 3 is missing"."""
    if len(e.problems) == 1:
        return f"not given, fold {min(e.problems)} is missing"
    return f"not given, folds {', '.join(map(str, e.problems))} are missing"


def comparison_blocks(experiments: list[Experiment]) -> list[Block]:
    """Table of all experiments in their order, then differences to the first."""
    best = experiments[0]
    columns = ["folds", *CCCS.values(), "parameters trainable", "hours", "peak GiB"]
    rows, differences = [], []
    notes = ["CCC: mean over folds ± standard deviation, on test; hours: all folds together"]
    for e in experiments:
        scope = f"{len(e.parts)}/{e.num_folds}"
        if e.problems:
            rows.append([e.name, scope, "missing", *["-"] * (len(columns) - 2)])
            notes.append(f"{e.name}: mean {not_given(e)}")
            notes += [f"{e.name} fold {fold}: {why}" for fold, why in e.problems.items()]
            continue
        spread = f" ± {e.std['test/ccc_mean']:.3f}" if e.std else ""
        cccs = [f"{e.mean[f'test/{key}']:.3f}" for key in CCCS]
        folds = pd.DataFrame(list(e.folds.values()))
        size = f"{e.mean['parameters_trainable'] / 1e6:.2f} M"
        costs = [size, f"{folds['hours'].sum():.2f}", f"{folds['peak_gib'].max():.2f}"]
        rows.append([e.name, scope, *cccs[:-1], cccs[-1] + spread, *costs])
        if set(test_rows(e).index) != set(test_rows(best).index):
            notes.append(f"{e.name}: tested on other utterances than {best.name}")
        notes += [f"{e.name}: {note}" for note in e.notes]
    for e in experiments[1:]:
        if isinstance(e.less_the_best, str):
            differences.append([e.name, e.less_the_best, *["-"] * len(CCCS)])
            continue
        scope = f"{e.less_the_best['n']} of {e.less_the_best['clusters']}"
        differences.append([e.name, scope, *(signed(e.less_the_best[key]) for key in CCCS)])
    explained = (
        f"pooled CCC less that of {best.name}, on test utterances that both predicted, with 95 % "
        f"intervals from {RESAMPLES} paired bootstrap draws; an interval with 0 inside shows none"
    )
    return [
        ("heading", f"{len(experiments)} experiments, best first"),
        table("experiment", rows, columns),
        ("list", notes),
        ("heading", "Paired differences"),
        table("less the best", differences, ["utterances", *CCCS.values()]),
        ("text", explained),
    ]


def as_text(blocks: list[Block], markdown: bool = False) -> str:
    """Without pictures. On a terminal, a heading of two words stands on two lines."""
    parts = []
    for kind, content in blocks:
        if kind == "table" and markdown:
            head = [content.columns.name, *content.columns]
            rows = [head, [":--", *["--:"] * (len(head) - 1)], *content.itertuples(name=None)]
            rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        elif kind == "table":
            pairs = [name.rpartition(" ")[::2] for name in content.columns]
            if any(first for first, _ in pairs):
                names = ["", content.columns.name]
                content = content.set_axis(pd.MultiIndex.from_tuples(pairs, names=names), axis=1)
            lines = content.to_string().splitlines()
            parts.append("\n".join(line.rstrip() for line in lines))
        elif kind == "list" and content:
            parts.append("\n".join(f"- {item}" for item in content))
        elif kind == "heading" and markdown:
            parts.append(f"## {content}")
        elif kind in ("heading", "text"):
            parts.append(content)
    return "\n\n".join(parts)


# One file with all in it: no script, nothing from a network, which its policy forbids
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vatune report</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.45 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left }
h2 { margin-top: 2.5rem } img { max-width: 100% } figure { margin: 1.5rem 0 }
</style></head><body>
{% for kind, content in blocks %}{% if kind == "heading" %}<h2>{{ content }}</h2>
{% elif kind == "text" %}<p>{{ content }}</p>
{% elif kind == "list" and content %}<ul>
{% for item in content %}<li>{{ item }}</li>{% endfor %}
</ul>
{% elif kind == "table" %}<table>
<thead><tr><th>{{ content.columns.name }}</th>
{%- for name in content.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in content.itertuples(name=None) %}<tr>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% elif kind == "picture" %}<figure><img src="data:image/png;base64,{{ content[1] }}"
 alt="{{ content[0] }}"><figcaption>{{ content[0] }}</figcaption></figure>
{% endif %}{% endfor %}
</body></html>
"""


def as_html(blocks: list[Block]) -> str:
    """The page; names of runs, speakers and files are escaped."""
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(PAGE).render(blocks=blocks)


# ---------------------------------------------------------------------------------------------
# Watching


def status_text(directory: Path, asked: list[int] | None = None) -> str:
    """Where each fold is now, and below the table why some have ended."""
    rows, reasons = [], []
    for fold in asked or found_folds(directory):
        cells, reason = fold_status(directory / f"fold{fold}", time.time())
        rows.append([str(fold), *cells])
        reasons += [f"fold {fold}: {reason}"] if reason else []
    return as_text([("heading", str(directory)), table("fold", rows, STATUS), ("list", reasons)])


def fold_status(directory: Path, now: float) -> tuple[list[str], str]:
    """(cells of the status table: state, epoch, ...; why it ended, or "") of one fold.

    A fold is running if its status says so and its process lives or, if that cannot be seen
    (another machine, no status.json), if it wrote something in the last SILENT seconds.
    """
    files = [directory / name for name in ("metrics.jsonl", "status.json", "args.json")]
    written = [path.stat().st_mtime for path in files if path.is_file()]
    if not written:
        return ["missing", *["-"] * (len(STATUS) - 1)], ""
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
    dev = [r["dev/ccc_mean"] for r in records if r["event"] == "dev" and "dev/ccc_mean" in r]
    last = next((r for r in reversed(records) if r["event"] == "train"), {})
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
# Pictures, in colours of Okabe and Ito, which the colour-blind can tell apart, and cividis

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "o^sDv<>"
CIRCUMPLEX = [TARGETS.index("valence"), TARGETS.index("arousal")]  # columns of preds and labels


def plot_run(directory: Path, split: str, vectors: Tensor) -> None:
    """Writes the pictures of a run; vectors (n, U) in the row order of predictions_<split>.csv."""
    parts = {directory.name: read_predictions(directory / f"predictions_{split}.csv")}
    records = {directory.name: read_records(directory)}
    for name, figure in plot_all(records, parts, {directory.name: vectors.numpy()}).items():
        figure.savefig(directory / f"{name}.png")


def picture_blocks(e: Experiment) -> list[Block]:
    """The pictures of one experiment, of the folds that are there."""
    runs = {f"fold {fold}": Path(e.name) / f"fold{fold}" for fold in e.parts}
    parts, vectors = dict(zip(runs, e.parts.values())), {}
    for name, run in runs.items():
        with contextlib.suppress(UserError):  # named in the notes
            vectors[name] = read_vectors(run, len(parts[name]))
    records = {name: read_records(run) for name, run in runs.items()}
    blocks = []
    for name, figure in (plot_all(records, parts, vectors) if parts else {}).items():
        png = io.BytesIO()
        figure.savefig(png, format="png")
        caption = f"{name}: {e.name}, {', '.join(runs)}"
        blocks.append(("picture", (caption, base64.b64encode(png.getvalue()).decode())))
    return blocks


def plot_all(
    records: dict[str, list[dict]], parts: dict[str, pd.DataFrame], vectors: dict[str, np.ndarray]
) -> dict[str, "Figure"]:
    """Name -> picture, of runs by name; vectors (n, U) may be absent for some."""
    rows = pd.concat(parts.values(), ignore_index=True)
    figures = {"curves": plot_curves(records), "scatter": plot_scatter(rows)}
    figures |= {"circumplex": plot_circumplex(rows), "duration": plot_duration(rows)}
    if vectors:
        figures["embedding"] = plot_embedding(vectors, parts)
    return figures


def new_figure(columns: int, rows: int = 1, width: float = 4.4) -> tuple["Figure", list["Axes"]]:
    """A figure and its panels, row by row, each `width` inches wide."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names of files and speakers may hold a $
    figure = Figure(figsize=(width * columns, 3.6 * rows), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_dots(axis: "Axes", x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """Fainter the more there are."""
    alpha = float(np.clip(8 / math.sqrt(len(x)), 0.05, 0.6))
    axis.plot(x, y, ".", ms=5, mew=0, alpha=alpha, color=colour)


def plot_curves(runs: dict[str, list[dict]]) -> "Figure":
    """Training loss and dev CCCs over epochs, a line per run; from read_records."""
    figure, axes = new_figure(1 + len(TARGETS))
    panels = {"loss": "training loss"}
    panels |= {f"dev/ccc_{target}": f"dev CCC {target}" for target in TARGETS}
    for i, (name, records) in enumerate(runs.items()):
        colour, style = COLOURS[i % len(COLOURS)], ("o-", "^--", "s:")[i // len(COLOURS) % 3]
        for axis, key in zip(axes, panels):
            points = [
                (r["epoch"], r[key])
                for r in records
                if r["event"] != "test" and {"epoch", key} <= r.keys()
            ]
            x, y = np.array(points).reshape(-1, 2).T
            axis.plot(x, y, style, ms=3, lw=1.2, color=colour, label=name)
    for axis, label in zip(axes, panels.values()):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", frameon=False)
    return figure


def plot_scatter(rows: pd.DataFrame) -> "Figure":
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


def plot_circumplex(rows: pd.DataFrame) -> "Figure":
    """True places of utterances and predicted ones (means of cells), and the errors."""
    figure, (left, right) = new_figure(2)
    preds, labels = (values[:, CIRCUMPLEX].numpy() for values in tensors(rows))
    plot_dots(left, labels[:, 0], labels[:, 1], "black")
    cells = [pd.cut(labels[:, i], 7, labels=False) for i in (0, 1)]  # an even grid over the labels
    places = pd.DataFrame(np.hstack((labels, preds - labels)), columns=["x", "y", "dx", "dy"])
    grid = places.groupby(cells)
    arrows = grid.mean()[grid.size() >= 3]
    if len(arrows):
        left.quiver(
            arrows["x"], arrows["y"], arrows["dx"], arrows["dy"], angles="xy", scale_units="xy",
            scale=1, width=0.006, color=COLOURS[0],
        )  # fmt: skip
    left.set(xlabel="valence", ylabel="arousal", title="true (dots) to predicted (cell means)")
    x, y = places["dx"], places["dy"]
    reach = max(x.abs().max(), y.abs().max()) or 1.0
    extent = (-reach, reach, -reach, reach)
    bins = right.hexbin(x, y, gridsize=25, cmap="cividis", mincnt=1, extent=extent)
    figure.colorbar(bins, ax=right, label="utterances")
    right.axhline(0, color="grey", lw=0.8)
    right.axvline(0, color="grey", lw=0.8)
    right.plot(x.mean(), y.mean(), "X", ms=9, color=COLOURS[1], mec="white")
    title = f"errors; X: mean {x.mean():+.2f}, {y.mean():+.2f}"
    right.set(xlabel="predicted - true valence", ylabel="predicted - true arousal", title=title)
    right.set_aspect("equal")
    return figure


def plot_duration(rows: pd.DataFrame) -> "Figure":
    """Predicted minus true over seconds: utterances, and median and quartiles of equal shares."""
    figure, axes = new_figure(len(TARGETS))
    rows = rows.sort_values("seconds", kind="stable", ignore_index=True)
    shares = np.arange(len(rows)) * int(np.clip(len(rows) // 10, 1, 10)) // len(rows)
    middles = rows["seconds"].groupby(shares).median()
    for axis, target, colour in zip(axes, TARGETS, COLOURS):
        errors = rows[f"pred_{target}"] - rows[target]
        quartiles = errors.groupby(shares).quantile([0.25, 0.5, 0.75]).unstack()
        plot_dots(axis, rows["seconds"], errors, colour)
        axis.axhline(0, color="grey", lw=0.8)
        axis.fill_between(
            middles, quartiles[0.25], quartiles[0.75], alpha=0.25, color="black", lw=0,
            label="quartiles",
        )  # fmt: skip
        axis.plot(middles, quartiles[0.5], "o-", ms=3, color="black", label="median")
        axis.set(xlabel="seconds", ylabel=f"predicted - true {target}")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False)
    return figure


def plot_embedding(vectors: dict[str, np.ndarray], parts: dict[str, pd.DataFrame]) -> "Figure":
    """First two principal components, a row per run, coloured by each target and by speaker.

    Runs do not share an embedding space; of each at most MAX_VECTORS rows are shown.
    """
    panels = len(TARGETS) + 1
    figure, axes = new_figure(panels, len(vectors))
    for i, (name, values) in enumerate(vectors.items()):
        keep = evenly_spaced(len(values))
        rows = parts[name].iloc[keep].reset_index(drop=True)
        centred = values[keep].astype(np.float64)
        centred -= centred.mean(0)
        _, scales, components = np.linalg.svd(centred, full_matrices=False)
        share = np.append(scales**2, 0) / max((scales**2).sum(), 1e-12)
        x, y = np.pad(centred @ components[:2].T, ((0, 0), (0, 1)))[:, :2].T  # (n,) each, n >= 1
        *by_target, last = axes[panels * i : panels * (i + 1)]
        for axis, target in zip(by_target, TARGETS):
            dots = axis.scatter(x, y, c=rows[target], s=10, cmap="cividis")
            figure.colorbar(dots, ax=axis)
        frequent = sorted(rows["speaker"].value_counts().index[: len(COLOURS)])
        others = ~rows["speaker"].isin(frequent)
        if others.any():
            last.scatter(x[others], y[others], s=6, color="lightgrey", label="others")
        for speaker, colour, marker in zip(frequent, COLOURS, MARKERS):
            mine = rows["speaker"] == speaker
            label = (speaker or "unknown")[:24]
            last.scatter(x[mine], y[mine], s=10, color=colour, marker=marker, label=label)
        last.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis, what in zip((*by_target, last), (*TARGETS, "speaker")):
            axis.set(xlabel=f"PC 1 ({share[0]:.0%})", ylabel=f"PC 2 ({share[1]:.0%})")
            axis.set_title(f"{name}: {what}")
    return figure


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
    p.add_argument("--json", action="store_true",
        help="print all figures as JSON instead: a list, best first; of several RUNs, "
        "less_the_best holds the paired differences: [difference, low, high]")  # fmt: skip
    return p.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Writes the report's files and prints it; 0, or 1 where a fold is missing."""
    if args.status:
        print("\n\n".join(status_text(run, args.folds) for run in args.runs))
        return 0
    experiments = [read_experiment(run, args.folds, args.failed) for run in args.runs]
    experiments.sort(key=lambda e: -e.mean["test/ccc_mean"] if e.mean else 2)  # missing ones last
    for e in experiments[1:]:
        e.less_the_best = paired_difference(e, experiments[0])
    several = len(experiments) > 1
    blocks = comparison_blocks(experiments) if several else fold_blocks(experiments[0])
    blocks += separation_blocks(experiments)
    out = args.out or (Path() if several else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        if several:
            replace_text(out / "experiment_comparison.md", as_text(blocks, markdown=True) + "\n")
        page = list(blocks)
        for e in experiments:
            page += [*(fold_blocks(e) if several else []), *picture_blocks(e)]
        replace_text(out / "report.html", as_html(page))
    if args.json:
        figures = [{k: v for k, v in vars(e).items() if k != "parts"} for e in experiments]
        print(json.dumps(figures))
    else:
        print(as_text(blocks))
    if out:
        print(f"\nwritten: {out / 'report.html'}", file=sys.stderr)
    return int(any(e.problems for e in experiments))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    try:
        sys.exit(main(parse_args()))
    except (UserError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
