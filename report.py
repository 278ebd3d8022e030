"""Tables, intervals and pictures of experiments, from what train.py wrote.

    python report.py runs/demo                         # folds, mean, intervals, speakers, emotions
    python report.py runs/demo --out runs/demo         # the same with pictures in report.html
    python report.py runs/demo runs/baseline           # comparison, best first; also written to .
    python report.py runs/demo --folds 1-3 --json      # figures of these folds alone
    python report.py runs/a runs/b --ensemble          # and those of the mean of their predictions
    python report.py runs/a runs/b --baseline runs/a   # differences to this one, not to the best

A fold without readable files is shown as missing, with the reason; then nothing that spans folds
is given. The mean of the folds' CCCs and the pooled CCC (one over all test utterances) are two
figures: pooling also sees shifts between folds. Intervals are percentile bootstraps of pooled CCCs
that draw all utterances of a speaker together, since these are not independent, or of a dialogue if
fewer than five speakers are known. With seeds (launch.sh --seeds) all figures are means over seeds,
and intervals draw seeds, too. Differences of experiments are paired: on the seeds and utterances
that both predicted, with the same draws. What one human rater reaches stands beside, if known.
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
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from corpora import TESTS
from flags import FREE_ON_RESUME
from model import ModelConfig, metrics
from util import files, pictures, runs
from util.files import UserError
from util.intervals import RESAMPLES, cluster_ids, human_ceiling, intervals, resampled_cccs

MIN_UTTERANCES = 10  # a CCC of fewer is not shown [guess]
KEYS = ["seed", "utt_id"]  # of a test row in its experiment
MAX_GROUPS = 20  # rows of a breakdown; a corpus may have a thousand speakers
LINE = 80  # characters in a line of a table

# A fine-tuned run may differ from its frozen baseline in these flags and in no other
FREE_IN_BASELINE = FREE_ON_RESUME | {
    "unfreeze", "lr", "encoder_lr", "lr_reference_batch", "warmup", "scheduler", "epochs",
    "max_steps", "patience", "eval_every", "separation_every", "name", "feature_cache",
    "lora", "lora_alpha",
    # how a step is computed, not what it computes
    "batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile", "attention",
}  # fmt: skip


def columns_of(targets: Sequence[str]) -> dict[str, str]:
    """A run's figure -> its heading."""
    columns = {f"test/{key}": title for key, title in cccs_of(targets).items()}
    columns |= {f"test/pcc_{target}": f"PCC {target}" for target in targets}
    columns |= {f"test/rmse_{target}": f"RMSE {target}" for target in targets}
    columns |= {"dev/ccc_mean": "dev CCC", "best_epoch": "best epoch"}
    return columns | {"hours": "hours", "peak_gib": "peak GiB"}


def cccs_of(targets: Sequence[str]) -> dict[str, str]:
    """The CCCs among model.metrics -> their headings."""
    return {f"ccc_{name}": f"CCC {name}" for name in (*targets, "mean")}


class Run(NamedTuple):
    """Place of a run in its experiment."""

    seed: int  # -1: launched without --seeds
    fold: int

    @property
    def path(self) -> str:
        """Its directory below that of the experiment."""
        return f"fold{self.fold}" if self.seed < 0 else f"seed{self.seed}/fold{self.fold}"

    @property
    def name(self) -> str:
        return self.path.removeprefix("fold")


@dataclass
class Experiment:
    """Figures of one experiment directory; what spans runs is None where one is missing."""

    name: str
    num_folds: int  # of the corpus, as far as the directory shows
    targets: list[str]
    folds: dict[Run, dict[str, float] | None]  # figures of each run; None = missing
    problems: dict[Run, str]  # missing run -> why
    rows: pd.DataFrame = field(repr=False)  # read_run's of all runs, with their seed and fold
    notes: list[str]
    mean: dict[str, float] | None = None
    std: dict[str, float] | None = None  # over folds, in root mean square over seeds; None: one
    std_of_seeds: dict[str, float] | None = None  # of the seeds' means; None for a single seed
    pooled: dict[str, tuple] = field(default_factory=dict)  # test split -> pooled_scores
    separation: dict[str, float] | None = None  # mean over runs
    ceiling: dict[str, dict] | None = None  # target -> human_ceiling, and the model's CCC on it
    difference: dict | str | None = None  # paired_difference to the best, or to --baseline

    @property
    def present(self) -> list[Run]:
        return [run for run, figures in self.folds.items() if figures]

    @property
    def seeds(self) -> list[int]:
        """Its seeds, in order; [-1] without --seeds."""
        return sorted({run.seed for run in self.folds})

    @property
    def num_runs(self) -> int:
        return self.num_folds * len(self.seeds)

    @property
    def tests(self) -> pd.DataFrame:
        return self.rows[self.rows["split"] == "test"]


# ---------------------------------------------------------------------------------------------
# Reading


def read_experiment(
    directory: Path, args: argparse.Namespace, targets: Sequence[str] | None = None
) -> Experiment:
    """The experiment with all its runs, or those of --folds and --seeds; UserError without one.

    K folds are expected of each seed: num_folds of any result.json or, without one, the highest
    fold that left a directory or a log. A --failed run is missing: what is on disk is older.
    `targets`: read the figures of these alone; None: those of the first run that is done.
    """
    found, notes = found_runs(directory, args.seeds)
    done = [run for run in found if (directory / run.path / "result.json").exists()]
    targets = list(targets or targets_of(directory / (done or found)[0].path))
    figures, tables, problems = {}, {}, {}
    for run in found:
        try:
            figures[run], rows = read_run(directory / run.path, targets)
            tables[run] = rows.assign(seed=run.seed, fold=run.fold)
        except UserError as error:
            problems[run] = str(error)
    num_folds = max([result["num_folds"] for result in figures.values()] or [r.fold for r in found])
    left_out = [f"fold {run.name}" for run in found if run.fold > num_folds]
    notes += [f"{name} is left out: the corpus has {num_folds} folds" for name in left_out]
    problems |= dict.fromkeys(args.failed, "this run of it failed")
    wanted = [
        Run(seed, fold)
        for seed in args.seeds or sorted({run.seed for run in found})
        for fold in args.folds or range(1, num_folds + 1)
    ]
    missing = {r: problems.get(r, "not run") for r in wanted if r not in figures or r in problems}
    none = pd.DataFrame(columns=[*KEYS, "fold", "split"])
    present = [tables[run] for run in wanted if run not in missing] or [none]
    return Experiment(
        name=str(directory),
        num_folds=num_folds,
        targets=targets,
        folds={run: None if run in missing else figures[run] for run in wanted},
        problems=missing,
        rows=pd.concat(present, ignore_index=True),
        notes=[f"{directory}: {note}" for note in notes],
    )


def found_runs(directory: Path, seeds: list[int] | None) -> tuple[list[Run], list[str]]:
    """Runs that left a directory or a log, those of `seeds` alone, and what else there is.

    UserError where there is none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    paths = [*directory.glob("fold*"), *directory.glob("seed*/fold*")]
    pattern = re.compile(r"(?:seed(0|[1-9]\d*)/)?fold([1-9]\d*)(?:\.log)?")
    matches = [pattern.fullmatch(path.relative_to(directory).as_posix()) for path in paths]
    found = sorted({Run(int(match[1] or -1), int(match[2])) for match in matches if match})
    if not found and (directory / "args.json").exists():
        raise UserError(f"{directory} is one fold: give the directory above it")
    if not found:
        raise UserError(f"{directory}: no folds (fold1, fold2, ...) in it")
    of_seeds = [run for run in found if run.seed >= 0 and run.seed in (seeds or [run.seed])]
    if seeds and not of_seeds:
        raise UserError(f"{directory}: no run of --seeds in it (seed{seeds[0]}/fold1, ...)")
    alone = [f"fold {run.fold}" for run in found if run.seed < 0]
    if of_seeds and alone:
        return of_seeds, [f"{', '.join(alone)}, beside the seeds, left out"]
    return of_seeds or found, []


def targets_of(run: Path) -> list[str]:
    """The targets of a run; older code knew two and did not write them down."""
    return runs.read_json(run / "result.json").get("targets") or list(ModelConfig.targets)


def read_run(directory: Path, targets: Sequence[str]) -> tuple[dict[str, float], pd.DataFrame]:
    """Figures of a run that is done, for some or all of its targets, and the rows of its test
    splits; UserError says what is missing or wrong."""
    path = directory / "result.json"
    if not path.exists():
        raise UserError(f"{path}: not there, the run is not done")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result |= {"hours": result["seconds"] / 3600, "peak_gib": result["peak_gib_measured"]}
        for split in ("dev", "test"):
            result |= {f"{split}/{key}": value for key, value in result[split].items()}
            cccs = [result[f"{split}/ccc_{target}"] for target in targets]  # None without a label
            known = [ccc for ccc in cccs if ccc is not None]
            result[f"{split}/ccc_mean"] = float(np.mean(known)) if known else None
        keys = (*columns_of(targets), "parameters_trainable", "num_folds")
        figures = {key: math.nan if result[key] is None else result[key] for key in keys}
        wrong = [key for key in keys if math.isinf(figures[key]) or math.isnan(result[key] or 0)]
    except KeyError as error:
        raise UserError(f"{path}: has no {error}") from error
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if wrong:
        raise UserError(f"{path}: {wrong[0]} {figures[wrong[0]]} is not a finite number")
    paths = {split: directory / f"predictions_{split}.csv" for split in TESTS}
    tables = [
        runs.read_predictions(path, targets).assign(split=split)
        for split, path in paths.items()
        if split == "test" or path.exists()
    ]
    return figures, pd.concat(tables)


# ---------------------------------------------------------------------------------------------
# Figures that span runs


def summarise(e: Experiment) -> None:
    """Fills in what spans the runs of an experiment that has them all."""
    table = pd.DataFrame(list(e.folds.values()))
    of_seed = [part for _, part in table.groupby([run.seed for run in e.folds])]
    e.mean = table.mean(skipna=False).to_dict()
    if len(of_seed[0]) > 1:
        variance = pd.DataFrame([part.var(skipna=False) for part in of_seed]).mean(skipna=False)
        e.std = variance.pow(0.5).to_dict()
    if len(of_seed) > 1:
        means = pd.DataFrame([part.mean(skipna=False) for part in of_seed])
        e.std_of_seeds = means.std(skipna=False).to_dict()
    for split, rows in e.rows.groupby("split"):
        if split == "test" or rows[e.targets].notna().any(axis=None):
            e.pooled[split] = pooled_scores(rows, e.targets)
    for name, figures_of in (("separation", mean_separation), ("ceiling", ceiling)):
        try:
            setattr(e, name, figures_of(e))
        except UserError as error:  # of its files, or of a package that is broken
            e.notes.append(f"{name}: not given, {error}")


def mean_metrics(rows: pd.DataFrame, targets: Sequence[str]) -> dict[str, float]:
    """Mean over seeds of model.metrics of each."""
    scores = [metrics(*runs.tensors(part, targets), targets) for _, part in rows.groupby("seed")]
    return pd.DataFrame(scores).mean(skipna=False).to_dict()


def shared_rows(
    one: pd.DataFrame, two: pd.DataFrame, targets: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Test rows of the seeds and utterances of both, in the order of the first; UserError if there
    are none or if their labels differ."""
    if not set(one["seed"]) & set(two["seed"]):
        raise UserError("no seed in common (--seeds for both, or for neither)")
    one, two = one.drop_duplicates(KEYS), two.drop_duplicates(KEYS)
    shared = one[KEYS].merge(two[KEYS])
    if shared.empty:
        raise UserError("no test utterance in common")
    one, two = shared.merge(one), shared.merge(two)
    if not np.allclose(one[list(targets)], two[list(targets)], equal_nan=True):
        raise UserError("their labels of the same utterances differ")
    return one, two


def pooled_scores(
    rows: pd.DataFrame, targets: Sequence[str], less: pd.DataFrame | None = None
) -> tuple[dict[str, float], dict[str, tuple[float, float]], str]:
    """mean_metrics, the 95 % interval of each CCC, and what the bootstrap draws beside seeds.

    `less`: other predictions of the same rows, whose scores are subtracted in each draw.
    """
    ids, clusters = cluster_ids(rows)
    seeds = pd.factorize(rows["seed"])[0]
    scores = mean_metrics(rows, targets)
    draws = resampled_cccs(*runs.tensors(rows, targets), ids, seeds)
    if less is not None:
        others = mean_metrics(less, targets)
        scores = {key: scores[key] - others[key] for key in scores}
        draws = draws - resampled_cccs(*runs.tensors(less, targets), ids, seeds)
    return scores, intervals(draws, list(cccs_of(targets))), clusters


def paired_difference(one: pd.DataFrame, two: pd.DataFrame, targets: Sequence[str]) -> dict:
    """Pooled CCCs of test rows `one` minus those of `two` on the seeds and utterances of both.

    {"n", "clusters", "ccc_valence": (difference, low, high), ...}; UserError says why not.
    """
    one, two = shared_rows(one.sort_values(KEYS), two, targets)
    scores, ends, clusters = pooled_scores(one, targets, two)
    count = one["seed"].nunique()
    if count > 1:
        clusters += f" x {count} seeds"
    differences = {key: (scores[key], *ends[key]) for key in ends}
    return {"n": one["utt_id"].nunique(), "clusters": clusters, **differences}


def mean_separation(e: Experiment) -> dict[str, float]:
    """separation() of the embeddings, mean over runs of what all of them have."""
    figures = []
    for run, rows in e.tests.groupby(["seed", "fold"]):
        vectors = runs.read_vectors(Path(e.name) / Run(*run).path, len(rows))
        _, labels = runs.tensors(rows, e.targets)
        figures.append(pictures.separation(vectors, labels, rows["speaker"].tolist(), e.targets))
    return pd.DataFrame(figures).dropna(axis="columns").mean().to_dict()


def ceiling(e: Experiment) -> dict[str, dict] | None:
    """Target -> human_ceiling on the test utterances, with "model": the CCC of the predictions on
    these. None where the runs have no ratings."""
    parts = [runs.read_ratings(Path(e.name) / run.path, e.targets) for run in e.folds]
    ratings = pd.concat(parts).drop_duplicates(["utt_id", "rater"])  # each seed has the same ones
    found = {}
    for target in e.targets:
        human = human_ceiling(ratings, e.tests, target)
        if human:
            rated = e.tests[e.tests["utt_id"].isin(human["utterances"])]
            human["model"] = mean_metrics(rated, [target])[f"ccc_{target}"]
            found[target] = human | {"utterances": len(human["utterances"])}
    return found or None


def against_frozen(run: Path) -> str:
    """Gain of a finished fold over its frozen baseline on the test split, in one line.

    The baseline is the fold with the best dev CCC among those of the same --out and number with
    WavLM frozen that agree in all flags that both know, but for FREE_IN_BASELINE.
    """
    flags, targets = runs.read_json(run / "args.json"), targets_of(run)
    out = run.parents[1 + str(flags.get("name")).count("/")]
    results = [*out.glob(f"*/{run.name}/result.json"), *out.glob(f"*/seed*/{run.name}/result.json")]
    baselines, refused = [], []
    for other in sorted(path.parent for path in results if path.parent != run):
        others = runs.read_json(other / "args.json")
        if others.get("unfreeze") != "none":
            continue
        differ = [
            f"--{flag} ({others[flag]}, here {flags[flag]})"
            for flag in sorted((flags.keys() & others.keys()) - FREE_IN_BASELINE)
            if flags[flag] != others[flag]
        ]
        if differ:
            refused.append((len(differ), f" ({other} differs in {', '.join(differ)})"))
            continue
        with contextlib.suppress(UserError):  # damaged
            figures, _ = read_run(other, targets)
            baselines.append((figures["dev/ccc_mean"], other))
    if not baselines:
        nearest = min(refused)[1] if refused else ""
        return (
            f"no frozen baseline of this fold in {out}{nearest}: the same command "
            "with --unfreeze none --name frozen makes one, then report.py compares the two"
        )
    _, baseline = max(baselines)
    tables = [read_run(path, targets)[1].assign(seed=-1) for path in (run, baseline)]
    try:
        paired = paired_difference(*(t[t["split"] == "test"] for t in tables), targets)
    except UserError as error:
        return f"no comparison with {baseline}: {error}"
    cccs = ", ".join(f"{name} {cell(paired[f'ccc_{name}'])}" for name in (*targets, "mean"))
    return (
        f"test CCC less that of the frozen {baseline}: {cccs} (95 % intervals over "
        f"{paired['clusters']}, {paired['n']} utterances; an interval with 0 inside shows no gain)"
    )


def ensemble_of(experiments: list[Experiment]) -> dict:
    """Figures of the mean of the test predictions of all runs of a fold, against the best single
    run; all have the same targets.

    Each seed of an experiment is a member. The best one is chosen on dev: the best on test would be
    too good by chance. UserError if a run is missing, or if two members were not tested on the same
    utterances with the same labels.
    """
    if any(e.problems for e in experiments):
        raise UserError("--ensemble: a run is missing: give --folds and --seeds that all RUNs have")
    targets, members, dev = experiments[0].targets, {}, {}
    for e in experiments:
        for seed in e.seeds:
            name = e.name if seed < 0 else f"{e.name}/seed{seed}"
            members[name] = e.tests[e.tests["seed"] == seed].assign(seed=-1)
            cccs = [figs["dev/ccc_mean"] for run, figs in e.folds.items() if run.seed == seed]
            dev[name] = float(np.mean(cccs))
    if len(members) < 2:
        raise UserError("--ensemble: give several RUNs, or one with several seeds")
    first, mean = next(iter(members.items()))
    preds = []
    for name, rows in members.items():
        if not rows["utt_id"].is_unique or set(rows["utt_id"]) != set(mean["utt_id"]):
            pair = f"{first} and {name}"
            raise UserError(f"--ensemble: {pair} were not tested on the same utterances, once each")
        _, rows = shared_rows(mean, rows, targets)
        preds.append(rows[runs.predicted(targets)])
    mean = mean.assign(**dict(zip(runs.predicted(targets), np.mean(preds, axis=0).T)))
    best = max(dev, key=lambda name: np.nan_to_num(dev[name], nan=-1))
    scores, differences = {}, {}
    for fold, rows in mean.groupby("fold"):
        scores[fold] = mean_metrics(rows, targets)
        differences[fold] = paired_difference(rows, members[best], targets)
    pooled, interval, clusters = pooled_scores(mean, targets)
    return {
        "members": list(members),
        "best": best,
        "best_dev_ccc": dev[best],
        "best_pooled": mean_metrics(members[best], targets),
        "targets": targets,
        "folds": scores,
        "folds_difference": differences,
        "mean": pd.DataFrame(list(scores.values())).mean(skipna=False).to_dict(),
        "pooled": pooled,
        "interval": interval,
        "clusters": clusters,
        "difference": paired_difference(mean, members[best], targets),
    }


# ---------------------------------------------------------------------------------------------
# A report is a list of sections, shown as text, Markdown or HTML


@dataclass
class Section:
    """A title; a table of texts, named by its first column; notes; pictures."""

    title: str
    table: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)  # name -> PNG in base64


def table_of(rows: list[dict], columns: list[str] | None = None) -> pd.DataFrame:
    """Rows of {column: value} as texts."""
    columns = columns or list(dict.fromkeys(column for row in rows for column in row))
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    return pd.DataFrame(cells, columns=columns, dtype=object)  # names need not be UTF-8


def cell(value: object) -> str:
    """Three decimals of a number, [low, high] of two, difference [low, high] of three; "-" of none
    or NaN."""
    if isinstance(value, tuple):
        template = "[{:.3f}, {:.3f}]" if len(value) == 2 else "{:+.3f} [{:+.3f}, {:+.3f}]"
        return "-" if math.isnan(value[0]) else template.format(*value)
    if pd.isna(value):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def fold_sections(e: Experiment) -> list[Section]:
    """One experiment: its runs, then the figures over all of them, or why there are none."""
    what, spread = "fold", {"std": e.std}
    title = f"{len(e.present)} of {e.num_runs} folds, each on its own test set"
    if e.seeds != [-1]:
        what, spread = "run", {"std of folds": e.std, "std of seeds": e.std_of_seeds}
        count = f"{len(e.seeds)} seeds x {e.num_folds} folds"
        title = f"{len(e.present)} of {e.num_runs} runs, {count}"
    columns = columns_of(e.targets)
    missing = {f"test/ccc_{e.targets[0]}": "missing"}
    shown = {run.name: figures or missing for run, figures in e.folds.items()}
    shown |= {name: figures for name, figures in {"mean": e.mean, **spread}.items() if figures}
    rows = [{what: name} | figures for name, figures in shown.items()]
    table = table_of(rows, [what, *columns]).rename(columns=columns)
    notes = not_given(e) + e.notes
    if e.std and e.std_of_seeds:
        notes.append(
            "std of folds: within a seed (root mean square over seeds); of seeds: of means"
        )
    sections = [Section(f"{e.name}: {title}", table, notes)]
    for split, (scores, interval, drawn) in e.pooled.items():
        title = "All folds pooled" if split == "test" else f"Another test split: {split}"
        count = e.rows[e.rows["split"] == split]["utt_id"].nunique()
        if e.std_of_seeds:
            drawn += f" and, independently, of the {len(e.seeds)} seeds, whose CCCs are averaged"
        note = (
            f"pooled: one CCC over all {count} test utterances (not the mean over folds); interval "
            f"from {RESAMPLES} bootstrap draws of {drawn}"
        )
        sections.append(Section(title, pooled_table(e.targets, scores, interval), [note]))
    sections += ceiling_sections(e)
    if not e.problems:
        sections += breakdown(e, "speaker") + breakdown(e, "emotion")
    return sections


def not_given(e: Experiment) -> list[str]:
    """Why there is no mean, and what is wrong with each missing run."""
    if not e.problems:
        return []
    what = "fold" if e.seeds == [-1] else "run"
    are = f"{what} {{}} is" if len(e.problems) == 1 else f"{what}s {{}} are"
    why = f"mean: not given, {are.format(', '.join(run.name for run in e.problems))} missing"
    return [why, *(f"{run.path}: {problem}" for run, problem in e.problems.items())]


def pooled_table(
    targets: Sequence[str], scores: dict[str, float], interval: dict[str, tuple[float, float]]
) -> pd.DataFrame:
    """A row per target, and for their mean if there are several."""
    rows = []
    for name in [*targets, "mean"] if len(targets) > 1 else targets:
        row = {
            "pooled": name,
            "CCC": scores[f"ccc_{name}"],
            "95 % interval": interval[f"ccc_{name}"],
        }
        rows.append(row | {"PCC": scores.get(f"pcc_{name}"), "RMSE": scores.get(f"rmse_{name}")})
    return table_of(rows)


def ceiling_sections(e: Experiment) -> list[Section]:
    """What one human rater reaches, beside the model on the same utterances."""
    if not e.ceiling:
        return []
    rows = []
    for target, human in e.ceiling.items():
        row = {"human raters": target, "utterances": human["utterances"]}
        row |= {"raters each": f"{human['raters']:.1f}", "one rater": human["ccc"]}
        row |= {"95 % interval": human["interval"], "model": human["model"]}
        rows.append(row | {"reliability": human["reliability"]})
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


def breakdown(e: Experiment, column: str) -> list[Section]:
    """Table per speaker or emotion if there are two, the MAX_GROUPS largest; bias: pred - true."""
    groups = e.tests.groupby(e.tests[column].replace("", "unknown"))
    if len(groups) < 2:
        return []
    rows = []
    for name in sorted(groups.size().nlargest(MAX_GROUPS).index):
        group = groups.get_group(name)
        scores, of_one_seed = mean_metrics(group, e.targets), group.drop_duplicates("utt_id")
        row = {column: name, "n": len(of_one_seed)}
        for target in e.targets:
            known = of_one_seed[target].dropna()  # a CCC against two label values says little
            enough = len(known) >= MIN_UTTERANCES and known.nunique() > 2
            row[f"CCC {target}"] = scores[f"ccc_{target}"] if enough else None
            row[f"RMSE {target}"] = scores[f"rmse_{target}"]
            row[f"bias {target}"] = f"{(group[f'pred_{target}'] - group[target]).mean():+.3f}"
        rows.append(row)
    notes = []
    if len(groups) > MAX_GROUPS:
        notes = [f"and {len(groups) - MAX_GROUPS} more, none with more utterances than these"]
    return [Section(f"By {column}", table_of(rows), notes)]


def comparison_sections(
    experiments: list[Experiment], first: Experiment, args: argparse.Namespace
) -> list[Section]:
    """Table of all experiments in their order, then differences to `first`."""
    titles = cccs_of(first.targets)
    less, order = ("less the baseline", "") if args.baseline else ("less the best", ", best first")
    rows, differences = [], []
    notes = ["CCC: mean over folds ± standard deviation, on test; hours: all folds together"]
    if any(e.std_of_seeds for e in experiments):
        notes.append("of several seeds: mean over seeds and folds ± that of the seeds' means")
    for e in experiments:
        notes += [f"{e.name}: {note}" for note in not_given(e) + e.notes]
        row = {"experiment": e.name, "folds": f"{len(e.present)}/{e.num_runs}"}
        if e.problems:
            row[f"CCC {first.targets[0]}"] = "missing"
        else:
            row |= {title: e.mean[f"test/{key}"] for key, title in titles.items()}
            spread = e.std_of_seeds or e.std
            if spread:
                row["CCC mean"] = f"{row['CCC mean']:.3f} ± {spread['test/ccc_mean']:.3f}"
            row["parameters trainable"] = f"{e.mean['parameters_trainable'] / 1e6:.2f} M"
            row["hours"] = sum(figures["hours"] for figures in e.folds.values())
            row["peak GiB"] = max(figures["peak_gib"] for figures in e.folds.values())
            if set(e.tests["utt_id"]) != set(first.tests["utt_id"]):
                notes.append(f"{e.name}: tested on other utterances than {first.name}")
        rows.append(row)
        if e is first:
            continue
        row, paired = {less: e.name, "utterances": e.difference}, e.difference
        if isinstance(paired, dict):
            row["utterances"] = f"{paired['n']} of {paired['clusters']}"
            row |= {title: paired[key] for key, title in titles.items()}
        differences.append(row)
    explained = (
        f"pooled CCC less that of {first.name}, on test utterances that both predicted, with 95 % "
        f"intervals from {RESAMPLES} paired bootstrap draws; one with 0 inside shows no gain"
    )
    cccs = titles.values()
    columns = ["experiment", "folds", *cccs, "parameters trainable", "hours", "peak GiB"]
    differences = table_of(differences, [less, "utterances", *cccs])
    return [
        Section(f"{len(experiments)} experiments{order}", table_of(rows, columns), notes),
        Section("Paired differences", differences, [explained]),
        *ceiling_sections(first),
    ]


def ensemble_sections(ensemble: dict) -> list[Section]:
    """The mean of the predictions: its folds, then all of them pooled."""
    targets, difference = ensemble["targets"], ensemble["difference"]
    rows = []
    for fold, figures in (ensemble["folds"] | {"mean": ensemble["mean"]}).items():
        row = {"fold": fold} | {title: figures[key] for key, title in cccs_of(targets).items()}
        less = ensemble["folds_difference"].get(fold, {})
        rows.append(row | {"mean less the best": less.get("ccc_mean")})
    title = f"Ensemble: mean of the test predictions of {len(ensemble['members'])} runs"
    notes = [
        f"of {', '.join(ensemble['members'])}",
        f"best: {ensemble['best']}, the single run with the highest mean dev CCC "
        f"({ensemble['best_dev_ccc']:.3f}); one chosen on test would look better than it is",
    ]
    pooled = pooled_table(targets, ensemble["pooled"], ensemble["interval"])
    pooled = pooled.drop(columns=["PCC", "RMSE"])
    keys = [f"ccc_{name}" for name in pooled["pooled"]]
    pooled["best"] = [cell(ensemble["best_pooled"][key]) for key in keys]
    pooled["less the best"] = [cell(difference[key]) for key in keys]
    explained = (
        f"{difference['n']} test utterances; 95 % intervals from {RESAMPLES} bootstrap "
        f"draws of {ensemble['clusters']}, paired for the difference: 0 inside shows no gain"
    )
    return [
        Section(title, table_of(rows), notes),
        Section("Ensemble, all folds pooled", pooled, [explained]),
    ]


def separation_sections(experiments: list[Experiment]) -> list[Section]:
    """separation(), means over folds, a row per experiment."""
    rows = [{"embeddings": e.name} | e.separation for e in experiments if e.separation]
    table = table_of(rows).rename(columns=lambda name: name.replace("_", " "))
    return [Section("Separation of the embeddings", table)] if rows else []


def picture_section(e: Experiment) -> Section:
    """The pictures of one experiment, of the folds that are there, and of the first seed."""
    records, parts, vectors = {}, {}, {}
    for run in [run for run in e.present if run.seed == e.present[0].seed]:
        directory = Path(e.name) / run.path
        rows = e.tests[(e.tests["seed"] == run.seed) & (e.tests["fold"] == run.fold)]
        records[run.path], parts[run.path] = runs.read_records(directory), rows
        with contextlib.suppress(UserError):  # named in the notes
            vectors[run.path] = runs.read_vectors(directory, len(rows))
    section = Section(f"{e.name}: pictures of {', '.join(parts)}")
    for name, figure in pictures.plot_all(records, parts, vectors, e.targets).items():
        png = io.BytesIO()
        figure.savefig(png, format="png")
        section.pictures[name] = base64.b64encode(png.getvalue()).decode()
    return section


def as_text(sections: list[Section]) -> str:
    """Without pictures. A heading of two words stands on two lines; wide tables are cut."""
    parts = []
    for section in sections:
        first, *others = section.table.columns
        table = section.table.set_index(first).rename_axis(None)
        pairs = [name.rpartition(" ")[::2] for name in others]
        table.columns = pd.MultiIndex.from_tuples(pairs, names=["", first])
        text = table.to_string(sparsify=False, line_width=LINE + 2)
        lines = [line.removesuffix("\\").rstrip() for line in text.splitlines()]
        notes = [f"- {note}" for note in section.notes]
        parts += [section.title, "\n".join(lines).strip("\n"), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def as_markdown(sections: list[Section]) -> str:
    parts = []
    for section in sections:
        columns = list(section.table)
        rows = [columns, [":--", *["--:" for _ in columns[1:]]]]
        rows += section.table.replace({r"\|": r"\\|", "\n": " "}, regex=True).values.tolist()
        table = [f"| {' | '.join(row)} |" for row in rows]
        notes = [f"- {note}" for note in section.notes]
        parts += [f"## {section.title}", "\n".join(table), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


# One file with all in it: no script, nothing from a network, which its policy forbids
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vatune report</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.45 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left }
h2 { margin-top: 2.5rem } img { max-width: 100% } figure { margin: 1.5rem 0 }
</style></head><body>
{% for section in sections %}<h2>{{ section.title }}</h2>
{% if section.table is not none %}
{{ section.table.to_html(index=False, border=0) | safe }}{% endif %}
<ul>{% for note in section.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% for caption, png in section.pictures.items() %}<figure>
<img src="data:image/png;base64,{{ png }}" alt=""><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}{% endfor %}
</body></html>
"""


def as_html(sections: list[Section]) -> str:
    """The page; names of runs, speakers and files are escaped, in tables by pandas."""
    jinja2 = files.optional_module("jinja2", "jinja2", "report.html")
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    with pd.option_context("display.max_colwidth", None):
        return page.render(sections=sections)


# ---------------------------------------------------------------------------------------------


def fold_list(text: str) -> list[int]:
    """Folds or seeds of "1-3,5", sorted."""
    numbers = set()
    if re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        for item in text.split(","):
            first, _, last = item.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text!r}: give 1-5, or 1,3,5, or a mix")
    return sorted(numbers)


def run_list(text: str) -> list[Run]:
    """Runs of "1,3" (folds) or "seed0/fold1,seed0/fold3"."""
    matches = [re.fullmatch(r"(?:seed(\d+)/fold)?(\d+)", item) for item in text.split(",")]
    if not all(matches):
        raise argparse.ArgumentTypeError(f"{text!r}: give 1,3 or seed0/fold1,seed0/fold3")
    return [Run(int(match[1] or -1), int(match[2])) for match in matches]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    # fmt: off
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                   help="directory holding fold1, ..., or seed0/fold1, ...")
    p.add_argument("--folds", type=fold_list, help="1-5, or 1,3,5, or a mix; default: all")
    p.add_argument("--seeds", type=fold_list, help="0-4, or 0,2,4, or a mix; default: all")
    p.add_argument("--failed", type=run_list, default=[],
                   help="folds, or seed0/fold1, ..., to show as missing in any case")
    p.add_argument("--ensemble", action="store_true",
                   help="also score the mean of the test predictions of all RUNs and seeds")
    p.add_argument("--baseline", type=Path, metavar="RUN",
                   help="one of the RUNs: differences to it, not to the best, and RUNs in the "
                   "order given")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="write report.html, of several RUNs experiment_comparison.md too; "
                   "default: . for several RUNs, nowhere for one")
    p.add_argument("--json", action="store_true",
                   help="print all figures as JSON instead: a list, in the order of the table; of "
                   "several RUNs, difference holds the paired differences: [difference, low, "
                   "high]; with --ensemble, that is the last")
    # fmt: on
    return p.parse_args(argv)


def as_figures(e: Experiment) -> dict:
    """All of it but rows, for JSON."""
    figures = {key: value for key, value in vars(e).items() if key != "rows"}
    for key in ("folds", "problems"):
        figures[key] = {run.name: value for run, value in figures[key].items()}
    names = ("pooled", "interval", "clusters")
    pooled = {split: dict(zip(names, scores)) for split, scores in e.pooled.items()}
    figures |= pooled.pop("test", dict.fromkeys(names))
    return figures | {"others": pooled}


def mean_ccc(e: Experiment) -> float:
    """Mean over folds and targets; below every other one if a fold is missing."""
    return e.mean["test/ccc_mean"] if e.mean else -2.0


def read_all(args: argparse.Namespace) -> list[Experiment]:
    """The experiments in the order given, with the figures of the targets that all have."""
    experiments = [read_experiment(run, args) for run in args.runs]
    shared = [t for t in experiments[0].targets if all(t in e.targets for e in experiments)]
    if not shared:
        raise UserError(f"{' and '.join(e.name for e in experiments)}: no target in common")
    for i, e in enumerate(experiments):
        left_out = [target for target in e.targets if target not in shared]
        if left_out:
            e = experiments[i] = read_experiment(args.runs[i], args, shared)
            e.notes.append(f"{files.in_words(left_out)} is left out: another run has none")
        if not e.problems:
            summarise(e)
    return experiments


def main(args: argparse.Namespace) -> int:
    """Prints the report and writes its files; 0, or 1 where a fold is missing."""
    if args.baseline not in (None, *args.runs):
        raise UserError(f"--baseline {args.baseline}: not one of the RUNs")
    experiments = read_all(args)
    several = len(experiments) > 1
    if args.baseline:
        first = experiments[args.runs.index(args.baseline)]
    else:
        experiments.sort(key=mean_ccc, reverse=True)  # missing ones last
        first = experiments[0]
    for e in experiments:
        if e is not first:
            try:
                e.difference = paired_difference(e.tests, first.tests, first.targets)
            except UserError as error:
                e.difference = str(error)
    figures = [as_figures(e) for e in experiments]
    sections = comparison_sections(experiments, first, args) if several else fold_sections(first)
    if args.ensemble:
        figures.append(ensemble_of(experiments))
        sections += ensemble_sections(figures[-1])
    sections += separation_sections(experiments)
    print(json.dumps(files.without_nan(figures)) if args.json else as_text(sections))
    out = args.out or (Path() if several else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        if several:
            files.replace_text(out / "experiment_comparison.md", as_markdown(sections))
            sections += [section for e in experiments for section in fold_sections(e)]
        sections += [picture_section(e) for e in experiments if e.present]
        files.replace_text(out / "report.html", as_html(sections))
        files.say(f"written: {out / 'report.html'}")
    return int(any(e.problems for e in experiments))


if __name__ == "__main__":
    sys.exit(files.run_script("report.py", lambda: main(parse_args())))
