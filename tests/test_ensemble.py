"""report.py --ensemble, against numpy on hand-made runs."""

import json

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
    run,
    write_fold,
)
from test_seeds import SCORES, grid, noisy, quick, rows_of

from util import files

__all__ = ["elsewhere", "grid", "quick"]  # fixtures


@pytest.fixture
def three(tmp_path):
    """Runs a, b, c of two folds; b is best on dev and not on test."""
    for i, name in enumerate("abc"):
        for fold in (1, 2):
            path = write_fold(tmp_path / name, fold, (0.5, 0.5), 2, speakers=4, utterances=12)
            noisy(path, i, size=(0.5, 1.0, 0.5)[i])
            result = json.loads((path / "result.json").read_text())
            result["dev"] = {f"ccc_{target}": (0.5, 0.9, 0.6)[i] for target in TARGETS}
            (path / "result.json").write_text(json.dumps(result))
            rows = pd.read_csv(path / "predictions_test.csv", keep_default_na=False)
            rows.sample(frac=1, random_state=i).to_csv(path / "predictions_test.csv", index=False)
    return [tmp_path / name for name in "abc"]


def test_an_ensemble_is_the_mean_of_the_predictions_less_the_best_on_dev(three, tmp_path, capsys):
    *singles, ensemble = figures_of(capsys, *three, "--ensemble")
    assert len(singles) == 3 and set(ensemble["members"]) == set(map(str, three))
    assert ensemble["best"] == str(three[1]) and ensemble["best_dev_ccc"] == pytest.approx(0.9)
    preds, cccs = {}, {}
    for fold in (1, 2):
        read = [pd.read_csv(path / f"fold{fold}/predictions_test.csv") for path in three]
        tables = [table.sort_values("utt_id") for table in read]
        preds[fold] = [table[[f"pred_{t}" for t in TARGETS]].to_numpy() for table in tables]
        labels, speakers = tables[0][list(TARGETS)].to_numpy(), tables[0]["speaker"]
        cccs[fold] = (labels, speakers, *(ccc(p, labels) for p in (np.mean(preds[fold], 0),)))
        assert ensemble["folds"][str(fold)]["ccc_mean"] == pytest.approx(cccs[fold][2])
        less = ensemble["folds_difference"][str(fold)]["ccc_mean"]
        assert less[0] == pytest.approx(cccs[fold][2] - ccc(preds[fold][1], labels), abs=1e-6)
    labels, speakers = (np.concatenate([cccs[fold][i] for fold in (1, 2)]) for i in (0, 1))
    mean, best = (
        np.concatenate([choose(preds[fold]) for fold in (1, 2)])
        for choose in (lambda x: np.mean(x, 0), lambda x: x[1])
    )
    assert ensemble["pooled"]["ccc_mean"] == pytest.approx(ccc(mean, labels), abs=1e-6)
    interval = drawn_plainly(mean[None], labels, speakers, best[None])
    expected = (ccc(mean, labels) - ccc(best, labels), *interval)
    assert ensemble["difference"]["ccc_mean"] == pytest.approx(expected, abs=1e-6)
    assert run(*three, "--ensemble") == 0
    text = capsys.readouterr().out
    assert f"best: {three[1]}, the single run with the highest mean dev CCC (0.900)" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("Ensemble") == 2 and "Ensemble, all folds pooled" in page
    assert "Ensemble, all folds pooled" in (tmp_path / "experiment_comparison.md").read_text()


def test_the_seeds_of_one_experiment_are_an_ensemble(grid, capsys):
    [_, ensemble] = figures_of(capsys, grid, "--ensemble")
    assert ensemble["members"] == [f"{grid}/seed{seed}" for seed in SCORES]
    preds, labels, _ = rows_of(grid, SCORES)
    assert ensemble["pooled"]["ccc_mean"] == pytest.approx(ccc(preds.mean(0), labels), abs=1e-6)


def test_an_ensemble_of_unlike_runs_is_refused_with_what_differs(three):
    with pytest.raises(files.UserError, match="give several RUNs, or one with several seeds"):
        run(three[0], "--ensemble")
    with pytest.raises(files.UserError, match="a run is missing: give --folds"):
        run(*three, "--ensemble", "--folds", "2-3")
    for change, message in (
        ({"valence": 9.0}, "labels of the same utterances differ"),
        ({"utt_id": ["u2-1"] * 12}, "the same utterances, once each"),
        ({"utt_id": [f"x{i}" for i in range(12)]}, "not tested on the same utterances"),
    ):
        change_predictions(three[1] / "fold2", **change)
        with pytest.raises(files.UserError, match=message):
            run(*three, "--ensemble")
