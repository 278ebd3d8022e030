"""Tables, intervals and pictures of experiments, from what train.py wrote.

    python report.py runs/demo                         # folds, mean, intervals, speakers, emotions
    python report.py runs/demo --out runs/demo         # the same with pictures in report.html
    python report.py runs/demo runs/baseline           # comparison, best first; also written to .
    python report.py runs/demo --folds 1-3 --json      # figures of these folds alone

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
import io
import json
import logging
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corpora import TESTS, known_speaker
from flags import FREE_ON_RESUME
from model import ModelConfig, concordance, metrics, moment_sums
from util.files import (
    UserError,
    in_words,
    optional_module,
    replace_text,
    run_script,
    say,
    without_nan,
)
from util.runs import read_json, read_predictions, read_records, read_vectors, tensors

if TYPE_CHECKING:  # matplotlib and scikit-learn are imported where they are used: they take seconds
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger("vatune")

RESAMPLES = 2000
SEED = 0
MIN_CLUSTERS = 5  # fewer speakers than this say little about the next one [guess]
MIN_UTTERANCES = 10  # a CCC of fewer is not shown [guess]
MAX_GROUPS = 20  # rows of a breakdown; a corpus may have a thousand speakers
MAX_VECTORS = 1000  # embeddings that are measured or drawn

LINE = 80  # characters in a line of a table
MAX_NAME = 20  # characters of a name that count for it

# A fine-tuned run may differ from its frozen baseline in these flags and in no other
FREE_IN_BASELINE = FREE_ON_RESUME | {
    "unfreeze", "lr", "encoder_lr", "lr_reference_batch", "warmup", "scheduler", "epochs",
    "max_steps", "patience", "eval_every", "separation_every", "name", "feature_cache",
    "lora", "lora_alpha",
    # how a step is computed, not what it computes
    "batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile", "attention",
}  # fmt: skip


def columns_of(targets: Sequence[str]) -> dict[str, str]:
    """A fold's figure -> its heading."""
    return {
        **{f"test/ccc_{target}": f"CCC {target}" for target in targets},
        "test/ccc_mean": "CCC mean",
        **{f"test/pcc_{target}": f"PCC {target}" for target in targets},
        **{f"test/rmse_{target}": f"RMSE {target}" for target in targets},
        "dev/ccc_mean": "dev CCC",
        "best_epoch": "best epoch",
        "hours": "hours",
        "peak_gib": "peak GiB",
    }


def cccs_of(targets: Sequence[str]) -> dict[str, str]:
    """The CCCs among model.metrics -> their headings."""
    return {f"ccc_{name}": f"CCC {name}" for name in (*targets, "mean")}


@dataclass
class Experiment:
    """Figures of one experiment directory; what spans folds is None where a fold is missing."""

    name: str
    num_folds: int  # of the corpus, as far as the directory shows
    targets: list[str]
    folds: dict[int, dict[str, float] | None]  # fold -> its figures; None = missing
    problems: dict[int, str]  # missing fold -> why
    parts: dict[int, pd.DataFrame] = field(repr=False)  # fold -> its test rows
    others: dict[str, pd.DataFrame] = field(repr=False)  # rows of further test splits, all folds
    notes: list[str]
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
    directory: Path,
    asked: list[int] | None = None,
    failed: list[int] | None = None,
    targets: Sequence[str] | None = None,
) -> Experiment:
    """The experiment with all its folds, or those of `asked`; UserError where it has none.

    K folds are expected: num_folds of any result.json or, without one, the highest fold that left
    a directory or a log. A fold in `failed` is missing: what is on disk is older. `targets`: read
    the figures of these alone; None: those of the first fold.
    """
    figures, parts, problems = {}, {}, {}
    found = found_folds(directory)
    for fold in found:
        try:
            targets = targets or targets_of(directory / f"fold{fold}")
            figures[fold], parts[fold] = read_fold(directory / f"fold{fold}", targets)
        except UserError as error:
            problems[fold] = str(error)
    targets = list(targets or ModelConfig.targets)
    num_folds = max([result["num_folds"] for result in figures.values()] or found)
    problems |= dict.fromkeys(failed or (), "this run of it failed")
    wanted = asked or range(1, num_folds + 1)
    missing = {k: problems.get(k, "not run") for k in wanted if k not in figures or k in problems}
    left_out = f"is left out: the corpus has {num_folds} folds"
    experiment = Experiment(
        name=str(directory),
        num_folds=num_folds,
        targets=targets,
        folds={fold: None if fold in missing else figures[fold] for fold in wanted},
        problems=missing,
        parts={fold: parts[fold] for fold in wanted if fold not in missing},
        others=read_other_tests(directory, [k for k in wanted if k not in missing], targets),
        notes=[f"{directory}: fold {fold} {left_out}" for fold in found if fold > num_folds],
    )
    if not missing:
        table = pd.DataFrame(list(experiment.folds.values()))
        experiment.mean = table.mean(skipna=False).to_dict()
        if len(table) > 1:
            experiment.std = table.std(skipna=False).to_dict()
        rows = pd.concat(experiment.parts.values(), ignore_index=True)
        preds, labels = tensors(rows, targets)
        ids, experiment.clusters = cluster_ids(rows)
        experiment.pooled = metrics(preds, labels, targets)
        experiment.interval = intervals(resampled_cccs(preds, labels, ids), targets)
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


def targets_of(run: Path) -> list[str]:
    """The targets of a fold; older code knew two and did not write them down."""
    return read_json(run / "result.json").get("targets") or list(ModelConfig.targets)


def read_other_tests(
    directory: Path, folds: list[int], targets: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """Rows of the test splits beside `test` that have labels, by split, over the folds."""
    others = {}
    for split in TESTS[1:]:
        paths = [directory / f"fold{fold}" / f"predictions_{split}.csv" for fold in folds]
        tables = [read_predictions(path, targets) for path in paths if path.exists()]
        rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        if len(rows) and rows[list(targets)].notna().any(axis=None):
            others[split] = rows
    return others


def read_fold(directory: Path, targets: Sequence[str]) -> tuple[dict[str, float], pd.DataFrame]:
    """(figures, test rows) of a fold that is done, for some or all of its targets."""
    keys = (*columns_of(targets), "parameters_trainable", "num_folds")
    path = directory / "result.json"
    if not path.exists():
        raise UserError(f"{path}: not there, the run is not done")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if set(targets) != set(targets_of(directory)):
            for scores in (result["dev"], result["test"]):
                cccs = [scores[f"ccc_{target}"] for target in targets]
                cccs = [ccc for ccc in cccs if ccc is not None]
                scores["ccc_mean"] = statistics.fmean(cccs) if cccs else None
        result |= {f"{s}/{key}": result[s][key] for s in ("dev", "test") for key in result[s]}
        result |= {"hours": result["seconds"] / 3600, "peak_gib": result["peak_gib_measured"]}
        figures = {key: result[key] for key in keys}
        unlabelled = [key for key in keys if "/" in key and figures[key] is None]
        numbers = [key for key in keys if key not in unlabelled]
        wrong = [key for key in numbers if not math.isfinite(figures[key])]
        figures |= dict.fromkeys(unlabelled, math.nan)
    except KeyError as error:
        raise UserError(f"{path}: has no {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if wrong:
        raise UserError(f"{path}: {wrong[0]} {figures[wrong[0]]} is not a finite number")
    return figures, read_predictions(directory / "predictions_test.csv", targets)


# ---------------------------------------------------------------------------------------------
# Intervals and differences


def cluster_ids(rows: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Cluster of each row (N,) from 0, and what the clusters are: "10 speakers".

    Dialogues where fewer than MIN_CLUSTERS speakers are known, or else single utterances. An
    utterance of unknown speaker (dialogue) is a cluster by itself.
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
    """CCC of each column of preds, labels (N, C) in each resample of clusters, (RESAMPLES, C).

    A CCC needs six sums only, so a resample adds up those of its clusters; ids (N,) as from
    cluster_ids. The same draws on every call.
    """
    rows = moment_sums(preds[None], labels[None])  # (6, N, C), one utterance each
    size = int(ids.max()) + 1
    sums = torch.zeros(6, size, rows.shape[2], dtype=torch.float64)
    sums.index_add_(1, torch.from_numpy(ids), rows)
    rng = np.random.default_rng(SEED)
    cccs, without = [], torch.where(labels.isnan().all(0), torch.nan, 0.0)  # columns without label
    for _ in range(0, RESAMPLES, 100):  # 100 at a time: bounded memory for 100 000 clusters
        times = rng.multinomial(size, np.full(size, 1 / size), size=100)  # (100, clusters)
        drawn = torch.einsum("rc,fct->frt", torch.from_numpy(times).double(), sums)
        cccs.append(concordance(drawn) + without)  # (100, C)
    return torch.cat(cccs).numpy()


def intervals(cccs: np.ndarray, targets: Sequence[str]) -> dict[str, tuple[float, float]]:
    """95 % percentile interval per target and of their mean, from (RESAMPLES, E)."""
    cccs = np.column_stack((cccs, np.nanmean(cccs, 1)))
    low, high = np.quantile(cccs, (0.025, 0.975), axis=0).tolist()
    return dict(zip(cccs_of(targets), zip(low, high)))


def test_rows(e: Experiment) -> pd.DataFrame:
    """Test rows of all folds by utt_id, in its order."""
    rows = pd.concat(e.parts.values()).drop_duplicates("utt_id")
    return rows.set_index("utt_id", drop=False).rename_axis(None).sort_index()


def paired_difference(one: Experiment, two: Experiment) -> dict | str:
    """Pooled CCCs of `one` minus those of `two` on the test utterances and targets of both, or why
    not.

    {"to": name of `two`, "n", "clusters", "ccc_valence": (difference, low, high), ...}
    """
    if not (one.parts and two.parts):
        return "no fold of one of them is there"
    rows_one, rows_two = test_rows(one), test_rows(two)
    shared = rows_one.index.intersection(rows_two.index)
    if not len(shared):
        return "no test utterance in common"
    targets = [target for target in one.targets if target in two.targets]
    if not targets:
        return "no target in common"
    preds_one, labels = tensors(rows_one.loc[shared], targets)
    preds_two, others = tensors(rows_two.loc[shared], targets)
    if not torch.allclose(labels, others, equal_nan=True):
        return "their labels of the same utterances differ"
    ids, clusters = cluster_ids(rows_one.loc[shared])
    score_one, score_two = (metrics(preds, labels, targets) for preds in (preds_one, preds_two))
    # the same draws for both
    draws_one, draws_two = (resampled_cccs(preds, labels, ids) for preds in (preds_one, preds_two))
    ends = intervals(draws_one - draws_two, targets)
    differences = {key: (score_one[key] - score_two[key], *ends[key]) for key in ends}
    return {"to": two.name, "n": len(shared), "clusters": clusters, **differences}


def against_frozen(run: Path) -> str:
    """Gain of a finished fold over its frozen baseline on the test split, in one line.

    The baseline is the fold with the best dev CCC among those of the same --out and number with
    WavLM frozen that agree in all flags that both know, but for FREE_IN_BASELINE.
    """
    flags = read_json(run / "args.json")
    baselines, refused = [], []
    for path in sorted(run.parent.parent.glob(f"*/{run.name}/result.json")):
        others = read_json(path.with_name("args.json"))
        if path.parent == run or others.get("unfreeze") != "none":
            continue
        compared = sorted((flags.keys() & others.keys()) - FREE_IN_BASELINE)
        differ = [
            f"--{flag} ({others[flag]}, here {flags[flag]})"
            for flag in compared
            if flags[flag] != others[flag]
        ]
        if differ:
            refused.append((len(differ), f" ({path.parent} differs in {', '.join(differ)})"))
            continue
        with contextlib.suppress(UserError):  # damaged
            figures, _ = read_fold(path.parent, targets_of(run))
            baselines.append((figures["dev/ccc_mean"], path.parent))
    if not baselines:
        nearest = min(refused)[1] if refused else ""
        return (
            f"no frozen baseline of this fold in {run.parent.parent}{nearest}: the same command "
            "with --unfreeze none --name frozen makes one, then report.py compares the two"
        )
    baseline = max(baselines)[1]
    fold = int(run.name.removeprefix("fold"))
    one, two = (read_experiment(path.parent, [fold]) for path in (run, baseline))
    paired = paired_difference(one, two)
    if isinstance(paired, str):
        return f"no comparison with {baseline}: {paired}"
    names = [*one.targets, "mean"]
    cccs = ", ".join(f"{name} {signed(paired[f'ccc_{name}'])}" for name in names)
    return (
        f"test CCC less that of the frozen {baseline}: {cccs} (95 % intervals over "
        f"{paired['clusters']}, {paired['n']} utterances; an interval with 0 inside shows no gain)"
    )


def signed(difference: tuple[float, float, float]) -> str:
    """+0.012 [-0.003, +0.027], or - without one."""
    if math.isnan(difference[0]):
        return "-"
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)


# ---------------------------------------------------------------------------------------------
# Separation of embeddings


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


def mean_separation(experiment: Experiment) -> dict[str, float] | None:
    """Mean over folds of what all folds have; None, and a note, where embeddings are missing."""
    figures = []
    for fold, rows in experiment.parts.items():
        try:
            vectors = read_vectors(Path(experiment.name) / f"fold{fold}", len(rows))
            targets, speakers = experiment.targets, rows["speaker"].tolist()
            figures.append(separation(vectors, tensors(rows, targets)[1], speakers, targets))
        except UserError as error:  # also of a package that is broken
            experiment.notes.append(f"separation: not given, {error}")
            return None
    return pd.DataFrame(figures).dropna(axis="columns").mean().to_dict()


# ---------------------------------------------------------------------------------------------
# A report is a list of sections, shown as text, Markdown or HTML


@dataclass
class Section:
    """A title; a table of texts and numbers, named by its first column; notes; pictures."""

    title: str
    table: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)  # name -> PNG in base64


def fold_sections(e: Experiment) -> list[Section]:
    """One experiment: its folds, then the figures over all of them, or why there are none."""
    rows, columns = [], columns_of(e.targets)
    for name, figures in {**e.folds, "mean": e.mean, "std": e.std}.items():
        if figures:
            rows.append({"fold": name} | {title: figures[key] for key, title in columns.items()})
        elif name in e.problems:
            rows.append({"fold": name, f"CCC {e.targets[0]}": "missing"})
    title = f"{e.name}: {len(e.parts)} of {e.num_folds} folds, each on its own test set"
    folds = Section(title, table_of(rows, ["fold", *columns.values()]), not_given(e) + e.notes)
    if e.problems:
        return [folds]
    everything = pd.concat(e.parts.values(), ignore_index=True)
    pooled = pooled_table(e.targets, e.pooled, e.interval)
    explained = (
        f"pooled: one CCC over all {len(everything)} test utterances (not the mean over folds); "
        f"interval from {RESAMPLES} bootstrap draws of {e.clusters}"
    )
    sections = [folds, Section("All folds pooled", pooled, [explained])]
    for split, part in e.others.items():
        preds, labels = tensors(part, e.targets)
        ids, clusters = cluster_ids(part)
        ends = intervals(resampled_cccs(preds, labels, ids), e.targets)
        table = pooled_table(e.targets, metrics(preds, labels, e.targets), ends)
        note = f"{len(part)} utterances; intervals from {RESAMPLES} bootstrap draws of {clusters}"
        sections.append(Section(f"Another test split: {split}", table, [note]))
    for column in ("speaker", "emotion"):
        sections += breakdown(everything, column, e.targets)
    return sections


def pooled_table(
    targets: Sequence[str], scores: dict[str, float], interval: dict[str, tuple[float, float]]
) -> pd.DataFrame:
    """A row per target, and for their mean if there are several."""
    rows = []
    for name in (*targets, "mean")[: len(targets) + (len(targets) > 1)]:
        low, high = interval[f"ccc_{name}"]
        row = {"pooled": name, "CCC": scores[f"ccc_{name}"]}
        row["95 % interval"] = None if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"
        for metric in ("pcc", "rmse"):
            row[metric.upper()] = scores.get(f"{metric}_{name}")
        rows.append(row)
    return table_of(rows)


def breakdown(rows: pd.DataFrame, column: str, targets: Sequence[str]) -> list[Section]:
    """Table per speaker or emotion if there are two, the MAX_GROUPS largest; bias: pred - true."""
    groups = rows.groupby(rows[column].replace("", "unknown"))
    if len(groups) < 2:
        return []
    shown = []
    for name in sorted(groups.size().nlargest(MAX_GROUPS).index):
        preds, labels = tensors(groups.get_group(name), targets)
        scores, bias = metrics(preds, labels, targets), (preds - labels).nanmean(0).tolist()
        row = {column: name, "n": len(labels)}
        for i, target in enumerate(targets):  # a CCC against two label values says little
            known = labels[:, i][~labels[:, i].isnan()]
            enough = len(known) >= MIN_UTTERANCES and len(known.unique()) > 2
            row[f"CCC {target}"] = scores[f"ccc_{target}"] if enough else None
            row[f"RMSE {target}"] = scores[f"rmse_{target}"]
            row[f"bias {target}"] = f"{bias[i]:+.3f}"
        shown.append(row)
    notes = []
    if len(groups) > MAX_GROUPS:
        notes = [f"and {len(groups) - MAX_GROUPS} more, none with more utterances than these"]
    return [Section(f"By {column}", table_of(shown), notes)]


def not_given(e: Experiment) -> list[str]:
    """Why there is no mean, and what is wrong with each missing fold."""
    if not e.problems:
        return []
    folds = "fold {} is" if len(e.problems) == 1 else "folds {} are"
    why = f"mean: not given, {folds.format(', '.join(map(str, e.problems)))} missing"
    return [why, *(f"fold {fold}: {problem}" for fold, problem in e.problems.items())]


def comparison_sections(experiments: list[Experiment]) -> list[Section]:
    """Table of all experiments in their order, then differences to the first; their targets are the
    same."""
    best = experiments[0]
    titles = cccs_of(best.targets)
    rows, differences = [], []
    notes = ["CCC: mean over folds ± standard deviation, on test; hours: all folds together"]
    for e in experiments:
        row = {"experiment": e.name, "folds": f"{len(e.parts)}/{e.num_folds}"}
        rows.append(row)
        notes += [f"{e.name}: {note}" for note in not_given(e) + e.notes]
        if e.problems:
            row[f"CCC {best.targets[0]}"] = "missing"
            continue
        row |= {title: e.mean[f"test/{key}"] for key, title in titles.items()}
        if e.std:
            row["CCC mean"] = f"{row['CCC mean']:.3f} ± {e.std['test/ccc_mean']:.3f}"
        row["parameters trainable"] = f"{e.mean['parameters_trainable'] / 1e6:.2f} M"
        row["hours"] = sum(figures["hours"] for figures in e.folds.values())
        row["peak GiB"] = max(figures["peak_gib"] for figures in e.folds.values())
        if set(test_rows(e).index) != set(test_rows(best).index):
            notes.append(f"{e.name}: tested on other utterances than {best.name}")
    for e in experiments[1:]:
        row, paired = {"less the best": e.name, "utterances": e.less_the_best}, e.less_the_best
        if isinstance(paired, dict):
            row["utterances"] = f"{paired['n']} of {paired['clusters']}"
            row |= {title: signed(paired[key]) for key, title in titles.items()}
        differences.append(row)
    explained = (
        f"pooled CCC less that of {best.name}, on test utterances that both predicted, with 95 % "
        f"intervals from {RESAMPLES} paired bootstrap draws; an interval with 0 inside shows none"
    )
    cccs = titles.values()
    columns = ["experiment", "folds", *cccs, "parameters trainable", "hours", "peak GiB"]
    differences = table_of(differences, ["less the best", "utterances", *cccs])
    return [
        Section(f"{len(experiments)} experiments, best first", table_of(rows, columns), notes),
        Section("Paired differences", differences, [explained]),
    ]


def separation_sections(experiments: list[Experiment]) -> list[Section]:
    """separation(), means over folds, a row per experiment."""
    rows = [{"embeddings": e.name} | e.separation for e in experiments if e.separation]
    table = table_of(rows).rename(columns=lambda name: name.replace("_", " "))
    return [Section("Separation of the embeddings", table)] if rows else []


def table_of(rows: list[dict], columns: list[str] | None = None) -> pd.DataFrame:
    """Rows of {column: value} as texts."""
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    cells = [[cell(value) for value in row] for row in table.to_numpy()]
    return pd.DataFrame(cells, columns=table.columns, dtype=object)  # names need not be UTF-8


def cell(value: object) -> str:
    """Three decimals of a number, "-" without one."""
    if pd.isna(value):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def as_text(sections: list[Section], markdown: bool = False) -> str:
    """Without pictures. On a terminal, a heading of two words stands on two lines."""
    parts = []
    for section in sections:
        first, *others = section.table.columns
        if markdown:
            rows = [[first, *others], [":--", *["--:" for _ in others]]]
            rows += section.table.replace({r"\|": r"\\|", "\n": " "}, regex=True).values.tolist()
            lines = [f"| {' | '.join(row)} |" for row in rows]
        else:
            pairs = [name.rpartition(" ")[::2] for name in others]
            table = section.table.set_index(first).rename_axis(None)
            table.columns = pd.MultiIndex.from_tuples(pairs, names=["", first])
            blocks = ["\n".join(as_lines(part)) for part in cut_columns(table)]
            lines = "\n\n".join(blocks).splitlines()
        parts.append(f"## {section.title}" if markdown else section.title)
        parts.append("\n".join(lines).strip("\n"))
        parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(part for part in parts if part)


def as_lines(table: pd.DataFrame) -> list[str]:
    return [line.rstrip() for line in table.to_string(sparsify=False).splitlines()]


def cut_columns(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The table in parts of its columns, as many in each as LINE has room for; at least one."""
    excess = max(map(len, table.index)) - MAX_NAME  # of long names, which fit nowhere
    parts, start = [], 0
    for stop in range(2, table.shape[1] + 1):
        width = max(map(len, as_lines(table.iloc[:, start:stop])))
        if stop - start > 1 and width - max(0, excess) > LINE:
            parts.append(table.iloc[:, start : stop - 1])
            start = stop - 1
    return [*parts, table.iloc[:, start:]]


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
{% for section in sections %}<h2>{{ section.title }}</h2>
{% if section.table is not none %}{{ section.table.to_html(index=False) | safe }}{% endif %}
<ul>{% for note in section.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% for caption, png in section.pictures.items() %}<figure>
<img src="data:image/png;base64,{{ png }}" alt=""><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}{% endfor %}
</body></html>
"""


def as_html(sections: list[Section]) -> str:
    """The page; names of runs, speakers and files are escaped, in tables by pandas."""
    jinja2 = optional_module("jinja2", "jinja2", "report.html")
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    with pd.option_context("display.max_colwidth", None):
        return page.render(sections=sections)


# ---------------------------------------------------------------------------------------------
# Pictures, in colours of Okabe and Ito, which the colour-blind can tell apart, and cividis

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_run(directory: Path, split: str, vectors: Tensor, targets: Sequence[str]) -> None:
    """Writes the pictures of a run; vectors (n, U) in the row order of predictions_<split>.csv."""
    parts = {directory.name: read_predictions(directory / f"predictions_{split}.csv", targets)}
    records = {directory.name: read_records(directory)}
    try:
        figures = plot_all(records, parts, {directory.name: vectors.numpy()}, targets)
    except UserError as error:  # a package is broken, the run is not
        log.warning(f"no pictures: {error}")
        return
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png")


def picture_section(e: Experiment) -> Section:
    """The pictures of one experiment, of the folds that are there."""
    records, parts, vectors = {}, {}, {}
    for fold, rows in e.parts.items():
        name, run = f"fold {fold}", Path(e.name) / f"fold{fold}"
        records[name], parts[name] = read_records(run), rows
        with contextlib.suppress(UserError):  # named in the notes
            vectors[name] = read_vectors(run, len(rows))
    section = Section(f"{e.name}: pictures of {', '.join(parts)}")
    try:
        figures = plot_all(records, parts, vectors, e.targets)
    except UserError as error:  # a package is broken, the figures are not
        section.notes.append(f"not drawn: {error}")
        say(f"{e.name}: no pictures: {error}")
        return section
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png")
        section.pictures[name] = base64.b64encode(png.getvalue()).decode()
    return section


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
        scale=1, width=0.006, color=COLOURS[0],
    )  # fmt: skip
    axis.set(xlabel="valence", ylabel="arousal", title="true (dots) to predicted (cell means)")
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
        one, two = pca.explained_variance_ratio_
        row = axes[len(panels) * i : len(panels) * (i + 1)]
        for axis, what in zip(row, panels):
            axis.set(
                xlabel=f"PC 1 ({one:.0%})", ylabel=f"PC 2 ({two:.0%})", title=f"{name}: {what}"
            )
        for axis, target in zip(row, targets):
            figure.colorbar(axis.scatter(x, y, c=rows[target], s=10, cmap="cividis"), ax=axis)
        speakers = rows["speaker"].replace("", "unknown").str.slice(0, 24)
        frequent = speakers.value_counts().index[: len(COLOURS) - 1]
        speakers = speakers.where(speakers.isin(frequent), "others")
        for (speaker, mine), colour in zip(speakers.groupby(speakers), COLOURS):
            row[-1].scatter(x[mine.index], y[mine.index], s=10, color=colour, label=speaker)
        row[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
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
    p.add_argument("--out", type=Path, metavar="DIR",
        help="write report.html, of several RUNs experiment_comparison.md too; default: . for "
        "several RUNs, nowhere for one")  # fmt: skip
    p.add_argument("--json", action="store_true",
        help="print all figures as JSON instead: a list, best first; of several RUNs, "
        "less_the_best holds the paired differences: [difference, low, high]")  # fmt: skip
    return p.parse_args(argv)


def mean_ccc(e: Experiment) -> float:
    """Mean over folds and targets; below every other one if a fold is missing."""
    return e.mean["test/ccc_mean"] if e.mean else -2.0


def main(args: argparse.Namespace) -> int:
    """Writes the report's files and prints it; 0, or 1 where a fold is missing."""
    experiments = [read_experiment(run, args.folds, args.failed) for run in args.runs]
    several = len(experiments) > 1
    shared = [t for t in experiments[0].targets if all(t in e.targets for e in experiments)]
    if not shared:
        raise UserError(f"{' and '.join(e.name for e in experiments)}: no target in common")
    compared = {id(e): e for e in experiments}
    for e, run in zip(experiments, args.runs):
        if set(e.targets) != set(shared):  # the comparison is on what all have
            compared[id(e)] = read_experiment(run, args.folds, args.failed, shared)
            left_out = in_words([target for target in e.targets if target not in shared])
            compared[id(e)].notes.append(f"{left_out} is left out: another run has none")
    experiments.sort(key=lambda e: mean_ccc(compared[id(e)]), reverse=True)  # missing ones last
    rivals = [compared[id(e)] for e in experiments]
    for e, rival in zip(experiments[1:], rivals[1:]):
        e.less_the_best = rival.less_the_best = paired_difference(rival, rivals[0])
    sections = comparison_sections(rivals) if several else fold_sections(experiments[0])
    sections += separation_sections(experiments)
    out = args.out or (Path() if several else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        page = list(sections)
        if several:
            replace_text(out / "experiment_comparison.md", as_text(sections, markdown=True))
            page += [section for e in experiments for section in fold_sections(e)]
        page += [picture_section(e) for e in experiments if e.parts]
        replace_text(out / "report.html", as_html(page))
        say(f"written: {out / 'report.html'}")
    if args.json:
        figures = [{k: v for k, v in vars(e).items() if k != "parts"} for e in experiments]
        print(json.dumps(without_nan(figures)))
    else:
        print(as_text(sections))
    return int(any(e.problems for e in experiments))


if __name__ == "__main__":
    sys.exit(run_script("report.py", lambda: main(parse_args())))
