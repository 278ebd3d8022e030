"""Tables, intervals and pictures of experiments, from what train.py wrote.

    python report.py runs/demo                         # folds, mean, intervals, speakers, emotions
    python report.py runs/demo --out runs/demo         # the same with pictures in report.html
    python report.py runs/demo runs/baseline           # comparison, best first; also written to .
    python report.py runs/demo --folds 1-3 --json      # figures of these folds alone
    python report.py runs/a runs/b --ensemble          # and those of the mean of their predictions
    python report.py runs/a runs/b --baseline runs/a   # differences to this one, not to the best

A fold without readable files is shown as missing, with the reason; then nothing that spans folds
is given and the exit code is 1. The mean of the folds' CCCs and the pooled CCC (one CCC over all
test utterances) are two figures: pooling also sees shifts between folds. Intervals are percentile
bootstraps of pooled CCCs that draw all utterances of a speaker together, since these are not
independent; dialogues are drawn if fewer than five speakers are known. Of an experiment with seeds
(launch.sh --seeds) all figures are means over seeds, and intervals draw seeds, too. Differences of
experiments are paired: on the seeds and utterances that both predicted, with the same draws. Where
the corpus has several raters, what one of them reaches stands beside.
Exit code: 0 complete; 1 a fold is missing; 2 wrong flags or files (one line, no traceback).
train.py uses against_frozen. Not here: intervals and pictures (util/), predictions.
"""

import argparse
import base64
import contextlib
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from corpora import TESTS
from flags import FREE_ON_RESUME
from model import ModelConfig, metrics
from util.files import (
    UserError,
    in_words,
    optional_module,
    replace_text,
    run_script,
    say,
    without_nan,
)
from util.intervals import RESAMPLES, cluster_ids, human_ceiling, intervals, resampled_cccs
from util.pictures import plot_all, separation
from util.runs import (
    predicted,
    read_json,
    read_predictions,
    read_ratings,
    read_records,
    read_vectors,
    tensors,
)

MIN_UTTERANCES = 10  # a CCC of fewer is not shown [guess]
MAX_GROUPS = 20  # rows of a breakdown; a corpus may have a thousand speakers

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


class Cell(NamedTuple):
    """Place of a run in its experiment."""

    seed: int  # -1: launched without --seeds
    fold: int

    @property
    def path(self) -> str:
        """Its directory below that of the experiment."""
        return f"fold{self.fold}" if self.seed < 0 else f"seed{self.seed}/fold{self.fold}"

    @property
    def name(self) -> str:
        return str(self.fold) if self.seed < 0 else self.path

    @property
    def title(self) -> str:
        return f"fold {self.fold}" if self.seed < 0 else self.path


@dataclass
class Experiment:
    """Figures of one experiment directory; what spans runs is None where one is missing."""

    name: str
    num_folds: int  # of the corpus, as far as the directory shows
    targets: list[str]
    folds: dict[Cell, dict[str, float] | None]  # its figures; None = missing
    problems: dict[Cell, str]  # missing run -> why
    parts: dict[Cell, pd.DataFrame] = field(repr=False)  # its test rows
    others: dict[str, pd.DataFrame] = field(repr=False)  # rows of further test splits, all runs
    notes: list[str]
    mean: dict[str, float] | None = None
    std: dict[str, float] | None = None  # over folds, in root mean square over seeds; None: one
    std_of_seeds: dict[str, float] | None = None  # of the seeds' means; None for a single seed
    pooled: dict[str, float] | None = None  # as model.metrics, RMSE in the label's scale
    interval: dict[str, tuple[float, float]] | None = None  # 95 % of each pooled CCC
    clusters: str = ""  # what the bootstrap draws: "10 speakers"
    separation: dict[str, float] | None = None  # mean over runs
    ceiling: dict[str, dict] | None = None  # target -> human_ceiling, and the model's CCC on it
    difference: dict | str | None = None  # paired_difference to the best, or to --baseline

    @property
    def seeds(self) -> list[int]:
        """Its seeds, in order; [-1] without --seeds."""
        return sorted({cell.seed for cell in self.folds})

    @property
    def num_runs(self) -> int:
        return self.num_folds * len(self.seeds)


# ---------------------------------------------------------------------------------------------
# Reading


def read_experiment(
    directory: Path,
    folds: list[int] | None = None,
    seeds: list[int] | None = None,
    failed: Sequence[Cell] = (),
    targets: Sequence[str] | None = None,
) -> Experiment:
    """The experiment with all its runs, or those of `folds` and `seeds`; UserError without one.

    K folds are expected of each seed: num_folds of any result.json or, without one, the highest
    fold that left a directory or a log. A run in `failed` is missing: what is on disk is older.
    `targets`: read the figures of these alone; None: those of the first run.
    """
    figures, parts, problems = {}, {}, {}
    found, notes = found_runs(directory, seeds)
    for cell in found:
        try:
            targets = targets or targets_of(directory / cell.path)
            figures[cell], parts[cell] = read_run(directory / cell.path, targets)
        except UserError as error:
            problems[cell] = str(error)
    targets = list(targets or ModelConfig.targets)
    num_folds = max([result["num_folds"] for result in figures.values()] or [c.fold for c in found])
    problems |= dict.fromkeys(failed, "this run of it failed")
    wanted = [
        Cell(seed, fold)
        for seed in seeds or sorted({cell.seed for cell in found})
        for fold in folds or range(1, num_folds + 1)
    ]
    missing = {k: problems.get(k, "not run") for k in wanted if k not in figures or k in problems}
    left_out = f"is left out: the corpus has {num_folds} folds"
    notes += [f"fold {cell.name} {left_out}" for cell in found if cell.fold > num_folds]
    experiment = Experiment(
        name=str(directory),
        num_folds=num_folds,
        targets=targets,
        folds={cell: None if cell in missing else figures[cell] for cell in wanted},
        problems=missing,
        parts={cell: parts[cell] for cell in wanted if cell not in missing},
        others=read_other_tests(directory, [k for k in wanted if k not in missing], targets),
        notes=[f"{directory}: {note}" for note in notes],
    )
    if not missing:
        summarise(experiment)
        experiment.separation = mean_separation(experiment)
        experiment.ceiling = ceiling(experiment)
    return experiment


def summarise(e: Experiment) -> None:
    """Fills in what spans the runs of an experiment that has them all."""
    table = pd.DataFrame(list(e.folds.values()))
    of_seed = [part for _, part in table.groupby([cell.seed for cell in e.folds])]
    e.mean = table.mean(skipna=False).to_dict()
    if len(of_seed[0]) > 1:
        variance = pd.DataFrame([part.var(skipna=False) for part in of_seed]).mean(skipna=False)
        e.std = variance.pow(0.5).to_dict()
    if len(of_seed) > 1:
        means = pd.DataFrame([part.mean(skipna=False) for part in of_seed])
        e.std_of_seeds = means.std(skipna=False).to_dict()
    e.pooled, e.interval, e.clusters = pooled_scores(all_rows(e), e.targets)


def all_rows(e: Experiment) -> pd.DataFrame:
    """Test rows of all runs, with their seed."""
    parts = [rows.assign(seed=cell.seed) for cell, rows in e.parts.items()]
    return pd.concat(parts, ignore_index=True)


def mean_metrics(rows: pd.DataFrame, targets: Sequence[str]) -> dict[str, float]:
    """Mean over seeds of model.metrics of each."""
    scores = [metrics(*tensors(part, targets), targets) for _, part in rows.groupby("seed")]
    return pd.DataFrame(scores).mean(skipna=False).to_dict()


def pooled_scores(
    rows: pd.DataFrame, targets: Sequence[str]
) -> tuple[dict[str, float], dict[str, tuple[float, float]], str]:
    """mean_metrics, the 95 % interval of each CCC, and what the bootstrap draws beside seeds."""
    ids, clusters = cluster_ids(rows)
    cccs = resampled_cccs(*tensors(rows, targets), ids, pd.factorize(rows["seed"])[0])
    return mean_metrics(rows, targets), intervals(cccs, list(cccs_of(targets))), clusters


def found_runs(directory: Path, seeds: list[int] | None) -> tuple[list[Cell], list[str]]:
    """Runs that left a directory or a log, those of `seeds` alone, and what else there is.

    UserError where there is none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    paths = [*directory.glob("fold*"), *directory.glob("seed*/fold*")]
    pattern = re.compile(r"(?:seed(0|[1-9]\d*)/)?fold([1-9]\d*)(?:\.log)?")
    matches = [pattern.fullmatch(path.relative_to(directory).as_posix()) for path in paths]
    found = sorted({Cell(int(match[1] or -1), int(match[2])) for match in matches if match})
    if not found and (directory / "args.json").exists():
        raise UserError(f"{directory} is one fold: give the directory above it")
    if not found:
        raise UserError(f"{directory}: no folds (fold1, fold2, ...) in it")
    of_seeds = [cell for cell in found if cell.seed >= 0]
    if seeds:
        of_seeds = [cell for cell in of_seeds if cell.seed in seeds]
        if not of_seeds:
            raise UserError(f"{directory}: no run of --seeds in it (seed{seeds[0]}/fold1, ...)")
    if not of_seeds:
        return found, []
    alone = [f"fold {cell.fold}" for cell in found if cell.seed < 0]
    notes = [f"{', '.join(alone)}, beside the seeds, left out"] if alone else []
    return of_seeds, notes


def targets_of(run: Path) -> list[str]:
    """The targets of a run; older code knew two and did not write them down."""
    return read_json(run / "result.json").get("targets") or list(ModelConfig.targets)


def read_other_tests(
    directory: Path, cells: list[Cell], targets: Sequence[str]
) -> dict[str, pd.DataFrame]:
    """Rows of the test splits beside `test` that have labels, by split, over the runs."""
    others = {}
    for split in TESTS[1:]:
        paths = {cell: directory / cell.path / f"predictions_{split}.csv" for cell in cells}
        tables = [
            read_predictions(path, targets).assign(seed=cell.seed)
            for cell, path in paths.items()
            if path.exists()
        ]
        rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        if len(rows) and rows[list(targets)].notna().any(axis=None):
            others[split] = rows
    return others


def read_run(directory: Path, targets: Sequence[str]) -> tuple[dict[str, float], pd.DataFrame]:
    """(figures, test rows) of a run that is done, for some or all of its targets."""
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


def test_rows(e: Experiment) -> pd.DataFrame:
    """Test rows of all runs by seed and utt_id, in their order."""
    rows = all_rows(e).drop_duplicates(["seed", "utt_id"])
    return rows.set_index(["seed", "utt_id"], drop=False).rename_axis([None, None]).sort_index()


def paired_difference(one: Experiment, two: Experiment) -> dict | str:
    """Pooled CCCs of `one` minus those of `two` on the seeds, test utterances and targets of both,
    or why not.

    {"to": name of `two`, "n", "clusters", "ccc_valence": (difference, low, high), ...}
    """
    if not (one.parts and two.parts):
        return "no fold of one of them is there"
    if not set(one.seeds) & set(two.seeds):
        return "no seed in common"
    rows_one, rows_two = test_rows(one), test_rows(two)
    shared = rows_one.index.intersection(rows_two.index)
    if not len(shared):
        return "no test utterance in common"
    targets = [target for target in one.targets if target in two.targets]
    if not targets:
        return "no target in common"
    rows_one, rows_two = rows_one.loc[shared], rows_two.loc[shared]
    preds_one, labels = tensors(rows_one, targets)
    preds_two, others = tensors(rows_two, targets)
    if not torch.allclose(labels, others, equal_nan=True):
        return "their labels of the same utterances differ"
    ids, clusters = cluster_ids(rows_one)
    seeds = pd.factorize(rows_one["seed"])[0]
    score_one, score_two = (mean_metrics(rows, targets) for rows in (rows_one, rows_two))
    draws_one, draws_two = (
        resampled_cccs(preds, labels, ids, seeds) for preds in (preds_one, preds_two)
    )
    ends = intervals(draws_one - draws_two, list(cccs_of(targets)))
    differences = {key: (score_one[key] - score_two[key], *ends[key]) for key in ends}
    if seeds.max():
        clusters += f" x {seeds.max() + 1} seeds"
    return {"to": two.name, "n": rows_one["utt_id"].nunique(), "clusters": clusters, **differences}


def run_alone(
    name: str, folds: dict[int, tuple[dict[str, float], pd.DataFrame]], targets: list[str]
) -> Experiment:
    """An experiment of one seed, of its (figures, test rows) by fold."""
    cells = {Cell(-1, fold): run for fold, run in folds.items()}
    figures = {cell: figures for cell, (figures, _) in cells.items()}
    parts = {cell: rows for cell, (_, rows) in cells.items()}
    return Experiment(name, len(folds), targets, figures, {}, parts, others={}, notes=[])


def against_frozen(run: Path) -> str:
    """Gain of a finished fold over its frozen baseline on the test split, in one line.

    The baseline is the fold with the best dev CCC among those of the same --out and number with
    WavLM frozen that agree in all flags that both know, but for FREE_IN_BASELINE.
    """
    flags, targets = read_json(run / "args.json"), targets_of(run)
    out = run.parents[1 + str(flags.get("name")).count("/")]
    results = [*out.glob(f"*/{run.name}/result.json"), *out.glob(f"*/seed*/{run.name}/result.json")]
    baselines, refused = [], []
    for path in sorted(results):
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
            figures, _ = read_run(path.parent, targets)
            baselines.append((figures["dev/ccc_mean"], path.parent))
    if not baselines:
        nearest = min(refused)[1] if refused else ""
        return (
            f"no frozen baseline of this fold in {out}{nearest}: the same command "
            "with --unfreeze none --name frozen makes one, then report.py compares the two"
        )
    baseline = max(baselines)[1]
    one, two = (
        run_alone(str(path), {1: read_run(path, targets)}, targets) for path in (run, baseline)
    )
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
# Ensembles


def ensemble_of(experiments: list[Experiment]) -> "Ensemble":
    """The mean of the test predictions of all runs of a fold, against the best single run.

    Each seed of an experiment is a member. The best one is chosen on dev, over the same folds: the
    best on test would be too good by chance. A fold that a member lacks is left out; UserError if
    none is left, or if two members were not tested on the same utterances.
    """
    members: dict[str, dict[int, tuple[dict[str, float], pd.DataFrame]]] = {}
    for e in experiments:
        for cell, figures in e.folds.items():
            name = e.name if cell.seed < 0 else f"{e.name}/seed{cell.seed}"
            folds = members.setdefault(name, {})
            if figures:
                folds[cell.fold] = (figures, e.parts[cell])
    if len(members) < 2:
        raise UserError("--ensemble: give several RUNs, or one with several seeds")
    lacking = {
        fold: [name for name in members if fold not in members[name]]
        for fold in sorted({cell.fold for e in experiments for cell in e.folds})
    }
    shared = [fold for fold, names in lacking.items() if not names]
    if not shared:
        raise UserError(f"--ensemble: no fold is there in all of {', '.join(members)}")
    targets = experiments[0].targets  # the same in all
    means = {
        fold: mean_run({name: members[name][fold][1] for name in members}, targets)
        for fold in shared
    }
    mean = run_alone(f"mean of {len(members)} runs", means, targets)
    mean.notes = [
        f"fold {fold} is left out: not there in {', '.join(names)}"
        for fold, names in lacking.items()
        if names
    ]
    dev = {
        name: float(np.mean([folds[fold][0]["dev/ccc_mean"] for fold in shared]))
        for name, folds in members.items()
    }
    best = max(dev, key=lambda name: np.nan_to_num(dev[name], nan=-1))
    single = run_alone(best, {fold: members[best][fold] for fold in shared}, targets)
    summarise(mean)
    summarise(single)
    mean.difference = paired_difference(mean, single)
    differences = {}
    for fold in shared:
        one = run_alone(mean.name, {fold: means[fold]}, targets)
        two = run_alone(best, {fold: members[best][fold]}, targets)
        differences[fold] = paired_difference(one, two)
    return Ensemble(list(members), mean, single, dev[best], differences)


@dataclass
class Ensemble:
    """Several runs as one."""

    members: list[str]
    mean: Experiment  # of their predictions; its difference is that to the best single one
    best: Experiment  # the one with the highest mean dev CCC
    best_dev_ccc: float
    fold_differences: dict[int, dict]  # the same of each fold


def mean_run(
    runs: dict[str, pd.DataFrame], targets: Sequence[str]
) -> tuple[dict[str, float], pd.DataFrame]:
    """(test figures, test rows) of the mean of the predictions of one fold, from rows by run.

    UserError if they were not tested on the same utterances with the same labels.
    """
    tables = {name: rows.set_index("utt_id", drop=False) for name, rows in runs.items()}
    first = next(iter(tables))
    rows = tables[first].rename_axis(None).copy()
    for name, table in tables.items():
        if not table.index.is_unique:
            twice = table.index[table.index.duplicated()][0]
            raise UserError(f"--ensemble: {name} has test utterance {twice} twice")
        alone = table.index.symmetric_difference(rows.index)
        if len(alone):
            pair = f"{first} and {name}"
            raise UserError(f"--ensemble: {alone[0]} is a test utterance of one of {pair} alone")
        labels = [tensors(t.loc[rows.index], targets)[1] for t in (rows, table)]
        if not torch.allclose(*labels, equal_nan=True):
            raise UserError(f"--ensemble: labels of the same utterances differ in {first}, {name}")
    values = [table.loc[rows.index, predicted(targets)] for table in tables.values()]
    rows[predicted(targets)] = np.mean(values, axis=0)
    scores = metrics(*tensors(rows, targets), targets)
    figures = dict.fromkeys(columns_of(targets), math.nan)
    return figures | {f"test/{name}": value for name, value in scores.items()}, rows


# ---------------------------------------------------------------------------------------------
# Human raters, and embeddings


def ceiling(e: Experiment) -> dict[str, dict] | None:
    """Target -> human_ceiling on the test utterances, with "model": the CCC of the predictions on
    these. None where the runs have no ratings; a note if these are damaged."""
    rows = all_rows(e)
    try:
        parts = [read_ratings(Path(e.name) / cell.path, e.targets) for cell in e.parts]
    except UserError as error:
        e.notes.append(f"human raters: not given, {error}")
        return None
    ratings = pd.concat(parts).drop_duplicates(["utt_id", "rater"])  # each seed has the same ones
    found = {}
    for target in e.targets:
        human = human_ceiling(ratings, rows, target)
        if human:
            rated = rows[rows["utt_id"].isin(human["utterances"])]
            human["model"] = mean_metrics(rated, [target])[f"ccc_{target}"]
            found[target] = human | {"utterances": len(human["utterances"])}
    return found or None


def mean_separation(experiment: Experiment) -> dict[str, float] | None:
    """Mean over runs of what all runs have; None, and a note, where embeddings are missing."""
    figures = []
    for cell, rows in experiment.parts.items():
        try:
            vectors = read_vectors(Path(experiment.name) / cell.path, len(rows))
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
    """One experiment: its runs, then the figures over all of them, or why there are none."""
    what, spread = "fold", {"std": e.std}
    title = f"{e.name}: {len(e.parts)} of {e.num_runs} folds, each on its own test set"
    if e.seeds != [-1]:
        what, spread = "run", {"std of folds": e.std, "std of seeds": e.std_of_seeds}
        runs = f"{len(e.parts)} of {e.num_runs} runs, {len(e.seeds)} seeds x {e.num_folds} folds"
        title = f"{e.name}: {runs}"
    rows, columns = [], columns_of(e.targets)
    for cell, figures in e.folds.items():
        shown = {f"CCC {e.targets[0]}": "missing"}
        if figures:
            shown = {title: figures[key] for key, title in columns.items()}
        rows.append({what: cell.name} | shown)
    for name, figures in {"mean": e.mean, **spread}.items():
        if figures:
            rows.append({what: name} | {title: figures[key] for key, title in columns.items()})
    folds = Section(title, table_of(rows, [what, *columns.values()]), not_given(e) + e.notes)
    if e.problems:
        return [folds]
    everything = all_rows(e)
    explained = (
        f"pooled: one CCC over all {len(everything) // len(e.seeds)} test utterances (not the mean "
        f"over folds); interval from {RESAMPLES} bootstrap draws of {e.clusters}"
    )
    if e.std_of_seeds:
        explained += f" and, independently, of the {len(e.seeds)} seeds, whose CCCs are averaged"
    if e.std and e.std_of_seeds:
        folds.notes.append(
            "std of folds: within a seed (root mean square over seeds); std of seeds: of the "
            "seeds' means over folds"
        )
    pooled = Section("All folds pooled", pooled_table(e.targets, e.pooled, e.interval), [explained])
    sections = [folds, pooled, *ceiling_sections(e)]
    for split, rows in e.others.items():
        scores, interval, clusters = pooled_scores(rows, e.targets)
        count = len(rows) // rows["seed"].nunique()
        note = f"{count} utterances; intervals from {RESAMPLES} bootstrap draws of {clusters}"
        table = pooled_table(e.targets, scores, interval)
        sections.append(Section(f"Another test split: {split}", table, [note]))
    for column in ("speaker", "emotion"):
        sections += breakdown(everything, column, e.targets)
    return sections


def brackets(interval: tuple[float, float]) -> str | None:
    """[0.123, 0.456], or None of NaN."""
    return None if math.isnan(interval[0]) else "[{:.3f}, {:.3f}]".format(*interval)


def ceiling_sections(e: Experiment) -> list[Section]:
    """What one human rater reaches, beside the model on the same utterances."""
    if not e.ceiling:
        return []
    rows = []
    for target, human in e.ceiling.items():
        row = {"human raters": target, "utterances": human["utterances"]}
        row |= {"raters each": f"{human['raters']:.1f}", "one rater": human["ccc"]}
        row |= {"95 % interval": brackets(human["interval"]), "model": human["model"]}
        rows.append(row | {"reliability": human["reliability"]})
    human = next(iter(e.ceiling.values()))
    notes = [
        "one rater: CCC of a rating with the mean of the other raters of the utterance, which "
        "counts once however many they are (leave one rater out); interval from "
        f"{RESAMPLES} bootstrap draws of {human['clusters']}",
        "model: pooled CCC on the same utterances; it may be above one rater, being compared with "
        "the mean of all",
        "reliability of that mean: split half, Spearman-Brown corrected; no model's PCC is above "
        "its square root, but for chance",
    ]
    title = f"{e.name}: what human raters reach on its test utterances"
    return [Section(title, table_of(rows), notes)]


def ensemble_sections(ensemble: Ensemble) -> list[Section]:
    """The mean of the predictions: its folds, then all of them pooled."""
    mean, best = ensemble.mean, ensemble.best
    rows, titles = [], cccs_of(mean.targets)
    for (_, fold), figures in mean.folds.items():
        row = {"fold": fold} | {title: figures[f"test/{key}"] for key, title in titles.items()}
        row["mean less the best"] = signed(ensemble.fold_differences[fold]["ccc_mean"])
        rows.append(row)
    row = {"fold": "mean"} | {title: mean.mean[f"test/{key}"] for key, title in titles.items()}
    title = f"Ensemble: mean of the test predictions of {len(ensemble.members)} runs"
    notes = [f"of {', '.join(ensemble.members)}", *mean.notes]
    notes.append(
        f"best: {best.name}, the single run with the highest mean dev CCC "
        f"({ensemble.best_dev_ccc:.3f}); one chosen on test would look better than it is"
    )
    folds = Section(title, table_of([*rows, row]), notes)
    pooled = pooled_table(mean.targets, mean.pooled, mean.interval)
    pooled = pooled[["pooled", "CCC", "95 % interval"]]
    keys = [f"ccc_{name}" for name in pooled["pooled"]]
    pooled["best"] = [cell(best.pooled[key]) for key in keys]
    pooled["less the best"] = [signed(mean.difference[key]) for key in keys]
    explained = (
        f"{mean.difference['n']} test utterances; 95 % intervals from {RESAMPLES} bootstrap "
        f"draws of {mean.clusters}, paired for the difference: with 0 inside it shows none"
    )
    return [folds, Section("Ensemble, all folds pooled", pooled, [explained])]


def pooled_table(
    targets: Sequence[str], scores: dict[str, float], interval: dict[str, tuple[float, float]]
) -> pd.DataFrame:
    """A row per target, and for their mean if there are several."""
    rows = []
    for name in (*targets, "mean")[: len(targets) + (len(targets) > 1)]:
        row = {"pooled": name, "CCC": scores[f"ccc_{name}"]}
        row["95 % interval"] = brackets(interval[f"ccc_{name}"])
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
        group = groups.get_group(name)
        preds, labels = tensors(group, targets)
        scores, bias = mean_metrics(group, targets), (preds - labels).nanmean(0).tolist()
        row = {column: name, "n": len(labels) // group["seed"].nunique()}
        for i, target in enumerate(targets):  # a CCC against two label values says little
            known = labels[: row["n"], i][~labels[: row["n"], i].isnan()]  # of one seed
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
    """Why there is no mean, and what is wrong with each missing run."""
    if not e.problems:
        return []
    folds = "fold {} is" if len(e.problems) == 1 else "folds {} are"
    if e.seeds != [-1]:
        folds = folds.replace("fold", "run")
    why = f"mean: not given, {folds.format(', '.join(cell.name for cell in e.problems))} missing"
    return [why, *(f"{cell.title}: {problem}" for cell, problem in e.problems.items())]


def comparison_sections(
    experiments: list[Experiment], baseline: Experiment | None
) -> list[Section]:
    """Table of all experiments in their order, then differences to the best, or to the `baseline`;
    their targets are the same."""
    first = baseline or experiments[0]
    titles = cccs_of(first.targets)
    rows, differences = [], []
    notes = ["CCC: mean over folds ± standard deviation, on test; hours: all folds together"]
    if any(e.std_of_seeds for e in experiments):
        notes.append("of several seeds: mean over seeds and folds ± that of the seeds' means")
    for e in experiments:
        row = {"experiment": e.name, "folds": f"{len(e.parts)}/{e.num_runs}"}
        rows.append(row)
        notes += [f"{e.name}: {note}" for note in not_given(e) + e.notes]
        if e.problems:
            row[f"CCC {first.targets[0]}"] = "missing"
            continue
        row |= {title: e.mean[f"test/{key}"] for key, title in titles.items()}
        spread = e.std_of_seeds or e.std
        if spread:
            row["CCC mean"] = f"{row['CCC mean']:.3f} ± {spread['test/ccc_mean']:.3f}"
        row["parameters trainable"] = f"{e.mean['parameters_trainable'] / 1e6:.2f} M"
        row["hours"] = sum(figures["hours"] for figures in e.folds.values())
        row["peak GiB"] = max(figures["peak_gib"] for figures in e.folds.values())
        if set(test_rows(e)["utt_id"]) != set(test_rows(first)["utt_id"]):
            notes.append(f"{e.name}: tested on other utterances than {first.name}")
    less, order = ("less the baseline", "") if baseline else ("less the best", ", best first")
    for e in [e for e in experiments if e is not first]:
        row, paired = {less: e.name, "utterances": e.difference}, e.difference
        if isinstance(paired, dict):
            row["utterances"] = f"{paired['n']} of {paired['clusters']}"
            row |= {title: signed(paired[key]) for key, title in titles.items()}
        differences.append(row)
    explained = (
        f"pooled CCC less that of {first.name}, on test utterances that both predicted, with 95 % "
        f"intervals from {RESAMPLES} paired bootstrap draws; an interval with 0 inside shows none"
    )
    cccs = titles.values()
    columns = ["experiment", "folds", *cccs, "parameters trainable", "hours", "peak GiB"]
    differences = table_of(differences, [less, "utterances", *cccs])
    return [
        Section(f"{len(experiments)} experiments{order}", table_of(rows, columns), notes),
        Section("Paired differences", differences, [explained]),
        *ceiling_sections(first),
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


def picture_section(e: Experiment) -> Section:
    """The pictures of one experiment, of the folds that are there, and of the first seed."""
    records, parts, vectors = {}, {}, {}
    for cell in [cell for cell in e.parts if cell.seed == min(e.parts).seed]:
        name, run, rows = cell.title, Path(e.name) / cell.path, e.parts[cell]
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


# ---------------------------------------------------------------------------------------------


def seed_list(text: str, first: int = 0) -> list[int]:
    """Numbers of "1-3,5", sorted; `first` is the lowest one possible."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give 1-5, or 1,3,5, or a mix")
    ends = [item.split("-") for item in text.split(",")]
    numbers = sorted({number for e in ends for number in range(int(e[0]), int(e[-1]) + 1)})
    if not numbers or numbers[0] < first:
        raise argparse.ArgumentTypeError(f"{text!r}: give {first}-5, or 1,3,5, or a mix")
    return numbers


def fold_list(text: str) -> list[int]:
    return seed_list(text, first=1)


def cell_list(text: str) -> list[Cell]:
    """Runs of "1,3" (folds) or "seed0/fold1,seed0/fold3"."""
    matches = [re.fullmatch(r"(?:seed(\d+)/fold)?(\d+)", item) for item in text.split(",")]
    if not all(matches):
        raise argparse.ArgumentTypeError(f"{text!r}: give 1,3 or seed0/fold1,seed0/fold3")
    return [Cell(int(match[1] or -1), int(match[2])) for match in matches]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN",
        help="directory holding fold1, ..., or seed0/fold1, ...")  # fmt: skip
    p.add_argument("--folds", type=fold_list, help="1-5, or 1,3,5, or a mix; default: all")
    p.add_argument("--seeds", type=seed_list, help="0-4, or 0,2,4, or a mix; default: all")
    p.add_argument("--failed", type=cell_list, default=[],
        help="folds, or seed0/fold1, ..., to show as missing in any case")  # fmt: skip
    p.add_argument("--ensemble", action="store_true",
        help="also score the mean of the test predictions of all RUNs and seeds")  # fmt: skip
    p.add_argument("--baseline", type=Path, metavar="RUN",
        help="one of the RUNs: differences to it, not to the best, and RUNs in the "
        "order given")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="DIR",
        help="write report.html, of several RUNs experiment_comparison.md too; default: . for "
        "several RUNs, nowhere for one")  # fmt: skip
    p.add_argument("--json", action="store_true",
        help="print all figures as JSON instead: a list, in the order of the table; of several "
        "RUNs, difference holds the paired differences: [difference, low, high]; with --ensemble, "
        "that is the last")  # fmt: skip
    return p.parse_args(argv)


def mean_ccc(e: Experiment) -> float:
    """Mean over folds and targets; below every other one if a fold is missing."""
    return e.mean["test/ccc_mean"] if e.mean else -2.0


def main(args: argparse.Namespace) -> int:
    """Writes the report's files and prints it; 0, or 1 where a fold is missing."""
    experiments = [read_experiment(run, args.folds, args.seeds, args.failed) for run in args.runs]
    several = len(experiments) > 1
    shared = [t for t in experiments[0].targets if all(t in e.targets for e in experiments)]
    if not shared:
        raise UserError(f"{' and '.join(e.name for e in experiments)}: no target in common")
    if args.baseline not in (None, *args.runs):
        raise UserError(f"--baseline {args.baseline}: not one of the RUNs")
    pairs = []  # (experiment, the same on the targets that all have)
    for e, run in zip(experiments, args.runs):
        rival = e
        if set(e.targets) != set(shared):
            rival = read_experiment(run, args.folds, args.seeds, args.failed, shared)
            left_out = in_words([target for target in e.targets if target not in shared])
            rival.notes.append(f"{left_out} is left out: another run has none")
        pairs.append((e, rival))
    baseline = None
    if args.baseline:
        _, baseline = pairs[args.runs.index(args.baseline)]
    else:
        pairs.sort(key=lambda pair: mean_ccc(pair[1]), reverse=True)  # missing ones last
    experiments, rivals = map(list, zip(*pairs))
    first = baseline or rivals[0]
    for e, rival in pairs:
        if rival is not first:
            e.difference = rival.difference = paired_difference(rival, first)
    sections = comparison_sections(rivals, baseline) if several else fold_sections(experiments[0])
    figures = [as_figures(e) for e in experiments]
    if args.ensemble:
        ensemble = ensemble_of(rivals)
        sections += ensemble_sections(ensemble)
        figures.append(as_figures(ensemble.mean) | {
            "members": ensemble.members, "best": ensemble.best.name,
            "best_dev_ccc": ensemble.best_dev_ccc, "folds_difference": ensemble.fold_differences,
        })  # fmt: skip
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
        print(json.dumps(without_nan(figures)))
    else:
        print(as_text(sections))
    return int(any(e.problems for e in experiments))


def as_figures(e: Experiment) -> dict:
    """All of it, with figures in place of rows, for JSON."""
    figures = {key: value for key, value in vars(e).items() if key != "parts"}
    for key in ("folds", "problems"):
        figures[key] = {cell.name: value for cell, value in figures[key].items()}
    names = ("pooled", "interval", "clusters")
    figures["others"] = {
        split: dict(zip(names, pooled_scores(rows, e.targets))) for split, rows in e.others.items()
    }
    return figures


if __name__ == "__main__":
    sys.exit(run_script("report.py", lambda: main(parse_args())))
