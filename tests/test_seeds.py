"""report.py over seeds x folds, against numpy on hand-made runs."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from test_report import (
    TARGETS,
    ccc,
    change_predictions,
    drawn_plainly,
    elsewhere,
    figures_of,
    line_of,
    run,
    write_fold,
)

from util import files, intervals

__all__ = ["elsewhere"]  # a fixture of all tests here, too
SCORES = {  # seed -> fold -> test CCC of valence and arousal
    0: {1: (0.2, 0.6), 2: (0.4, 0.8)},
    3: {1: (0.1, 0.5), 2: (0.5, 0.5)},
    4: {1: (0.3, 0.9), 2: (0.9, 0.7)},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, no_pictures):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)


def noisy(directory, seed, size=0.5):
    """Other predictions than those of the same fold of another seed."""
    rows = pd.read_csv(directory / "predictions_test.csv")
    noise = np.random.default_rng(seed).normal(size=(len(rows), 2)) * size
    changed = {f"pred_{t}": rows[f"pred_{t}"] + noise[:, i] for i, t in enumerate(TARGETS)}
    change_predictions(directory, **changed)


def write_grid(directory, scores=SCORES, first_noise=0, **options):
    for seed, folds in scores.items():
        for fold, cccs in folds.items():
            options = {"num_folds": 2, "speakers": 4, "utterances": 12} | options
            noisy(write_fold(directory / f"seed{seed}", fold, cccs, **options), first_noise + seed)
    return directory


@pytest.fixture
def grid(tmp_path):
    return write_grid(tmp_path / "runs" / "grid")


def rows_of(directory, seeds, folds=(1, 2)):
    """(predictions, labels) of each seed (S, N, 2), and the speaker of each row."""
    tables = [
        pd.concat(
            pd.read_csv(directory / f"seed{seed}/fold{fold}/predictions_test.csv") for fold in folds
        )
        for seed in seeds
    ]
    preds = np.array([table[[f"pred_{t}" for t in TARGETS]] for table in tables])
    return preds, tables[0][list(TARGETS)].to_numpy(), tables[0]["speaker"].to_numpy()


def test_mean_spreads_and_intervals_over_seeds_and_folds_are_those_of_numpy(grid, capsys):
    [figures] = figures_of(capsys, grid)
    values = np.array([[SCORES[seed][fold][0] for fold in (1, 2)] for seed in SCORES])  # valence
    key = "test/ccc_valence"
    assert figures["mean"][key] == pytest.approx(values.mean())
    assert figures["std"][key] == pytest.approx(np.sqrt(values.var(1, ddof=1).mean()))
    assert figures["std_of_seeds"][key] == pytest.approx(values.mean(1).std(ddof=1))
    assert figures["folds"].keys() == {f"seed{s}/fold{f}" for s in SCORES for f in (1, 2)}
    preds, labels, speakers = rows_of(grid, SCORES)
    expected = np.mean([ccc(p, labels) for p in preds])
    assert figures["pooled"]["ccc_mean"] == pytest.approx(expected, abs=1e-6)
    interval = drawn_plainly(preds, labels, speakers)
    assert figures["interval"]["ccc_mean"] == pytest.approx(interval, abs=1e-6)
    one_seed = figures_of(capsys, grid, "--seeds", "0")[0]["interval"]["ccc_mean"]
    alone = drawn_plainly(preds[:1], labels, speakers)
    assert one_seed == pytest.approx(alone, abs=1e-6)
    assert run(grid) == 0
    text = capsys.readouterr().out
    assert "6 of 6 runs, 3 seeds x 2 folds" in text and "all 24 test utterances" in text
    assert line_of(text, "seed3/fold2")[1] == "0.500" and line_of(text, "1-0")[1] == "3"
    shown = [line.split()[3] for line in text.splitlines() if line.startswith("std of")]
    assert shown[:2] == [f"{figures[name][key]:.3f}" for name in ("std", "std_of_seeds")]


def test_no_mean_is_given_if_a_run_of_the_grid_is_missing(grid, capsys):
    shutil.rmtree(grid / "seed3" / "fold2")
    assert run(grid) == 1
    text = capsys.readouterr().out
    assert "5 of 6 runs" in text and line_of(text, "seed3/fold2")[1] == "missing"
    assert "mean: not given, run seed3/fold2 is missing" in text and "std of" not in text
    assert "- seed3/fold2: not run" in text
    assert run(grid, "--seeds", "0,4") == 0
    assert "4 of 4 runs" in capsys.readouterr().out
    failed = "seed0/fold1,seed4/fold2"
    assert run(grid, "--seeds", "0,4", "--failed", failed) == 1
    text = capsys.readouterr().out
    assert "runs seed0/fold1, seed4/fold2 are missing" in text
    assert run(grid, "--seeds", "0-1", "--folds", "1") == 1
    assert "seed1/fold1: not run" in capsys.readouterr().out
    with pytest.raises(files.UserError, match="no run of --seeds in it"):
        run(grid, "--seeds", "7-9")
    for wrong in ("--seeds=4-0", "--seeds=a", "--failed=seed0", "--failed=a"):
        with pytest.raises(SystemExit):
            run(grid, wrong)


def test_seeds_of_a_corpus_with_one_fold_have_a_spread_between_them_alone(tmp_path, capsys):
    scores = {seed: {1: (0.1 * seed, 0.5)} for seed in (1, 2, 3)}
    grid = write_grid(tmp_path / "msp", scores, num_folds=1)
    for path in grid.glob("seed*/fold1/predictions_test.csv"):
        shutil.copy(path, path.with_name("predictions_test2.csv"))
    [figures] = figures_of(capsys, grid)
    assert figures["others"]["test2"]["pooled"] == figures["pooled"]
    assert figures["others"]["test2"]["interval"] == figures["interval"]
    assert figures["std"] is None
    assert figures["std_of_seeds"]["test/ccc_valence"] == pytest.approx(0.1)
    write_fold(tmp_path / "msp", 1, (0.9, 0.9), num_folds=1)  # a run without --seeds
    assert run(tmp_path / "msp", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "fold 1, beside the seeds, left out" in text
    assert "test2" in text and "all 12 test utterances" in text
    assert "pictures of seed1/fold1" in (tmp_path / "report.html").read_text()


def test_experiments_are_paired_over_the_seeds_and_folds_that_both_have(grid, tmp_path, capsys):
    scores = {seed: SCORES[seed] for seed in (3, 4)} | {9: SCORES[0]}
    other = write_grid(tmp_path / "runs" / "other", scores, first_noise=100)
    for path in (grid / "seed3" / "fold1", other / "seed4" / "fold1"):
        shutil.rmtree(path)
    assert run(grid, other, "--baseline", other, "--json") == 1  # runs are missing
    paired = json.loads(capsys.readouterr().out)[0]["difference"]
    (preds, labels, _), (others, *_) = (rows_of(p, (3, 4), (2,)) for p in (grid, other))
    expected = np.mean([ccc(p, labels) - ccc(o, labels) for p, o in zip(preds, others)])
    interval = drawn_plainly(preds, labels, [f"u2-{i}" for i in range(12)], others)
    assert paired["ccc_mean"] == pytest.approx((expected, *interval), abs=1e-6)
    assert paired["n"] == 12 and paired["clusters"] == "12 utterances x 2 seeds"
    write_fold(tmp_path / "plain", 1, (0.5, 0.5), num_folds=1)
    assert run(grid, tmp_path / "plain") == 1 and "no seed in common" in capsys.readouterr().out
