"""Human raters: how corpora give them, what one of them reaches, how reliable their mean is."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from conftest import quick_flags
from test_report import run

import data
import train
from util.intervals import human_ceiling
from util.runs import run_dir


def ratings_of(utterances):
    """Table of {utt_id: ratings of one target}."""
    rows = [(u, f"r{i}", x) for u, xs in utterances.items() for i, x in enumerate(xs)]
    return pd.DataFrame(rows, columns=["utt_id", "rater", "valence"])


def rows_of(ratings):
    """A dialogue per utterance, speakers unknown."""
    return pd.DataFrame({"utt_id": ratings["utt_id"].unique()}).assign(
        dialog=lambda rows: rows["utt_id"], speaker=""
    )


def test_a_ceiling_is_the_one_worked_out_by_hand():
    ratings = ratings_of({"a": [1, 3], "b": [4, 4], "c": [2, 2, 5], "alone": [9], "x": [1, 9]})
    rows = rows_of(ratings).query("utt_id != 'x'")  # not in the test split
    human = human_ceiling(ratings, rows, "valence")
    # (rating, mean of the others) and weight, of a and b 1/2, of c 1/3
    pairs = [(1, 3, 1 / 2), (3, 1, 1 / 2), (4, 4, 1 / 2), (4, 4, 1 / 2)]
    pairs += [(2, 3.5, 1 / 3), (2, 3.5, 1 / 3), (5, 2, 1 / 3)]
    one, others, w = np.array(pairs).T
    mean_one, mean_others = np.average(one, weights=w), np.average(others, weights=w)
    assert mean_one == pytest.approx(3) == mean_others  # (2 + 4 + 3) / 3
    cov = np.average((one - 3) * (others - 3), weights=w)
    squares = np.average((one - 3) ** 2 + (others - 3) ** 2, weights=w)
    assert human["ccc"] == pytest.approx(2 * cov / squares)
    assert human["utterances"] == ["a", "b", "c"] and human["raters"] == pytest.approx(7 / 3)
    # each halves' correlation is one of 2 x 3 cases: a rated (1, 3) or (3, 1), and half of c
    possible = set()
    for a in ((1, 3), (3, 1)):
        for c in ((2, 5), (3.5, 2)):  # means of two raters and of one
            r = np.corrcoef([a[0], 4, c[0]], [a[1], 4, c[1]])[0, 1]
            possible.add(2 * r / (1 + r))
    assert min(possible) <= human["reliability"] <= max(possible)
    shuffled = human_ceiling(ratings.sample(frac=1, random_state=1), rows, "valence")
    assert shuffled["ccc"] == pytest.approx(human["ccc"])


@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_ceiling_and_reliability_of_known_noise_are_those_of_the_closed_form(noise):
    rng, raters, count = np.random.default_rng(0), 4, 3000
    values = rng.normal(size=(count, 1)) + noise * rng.normal(size=(count, raters))
    ratings = ratings_of({f"u{i}": row for i, row in enumerate(values)})
    human = human_ceiling(ratings, rows_of(ratings), "valence")
    expected = 2 / (2 + noise**2 + noise**2 / (raters - 1))
    assert human["ccc"] == pytest.approx(expected, abs=0.02)
    assert human["interval"][0] < expected < human["interval"][1]
    assert human["interval"][1] - human["interval"][0] < 0.1
    assert human["reliability"] == pytest.approx(1 / (1 + noise**2 / raters), abs=0.02)


def test_raters_who_agree_reach_1_and_those_who_guess_0():
    rng = np.random.default_rng(0)
    same = ratings_of({f"u{i}": [x] * 3 for i, x in enumerate(rng.normal(size=50))})
    human = human_ceiling(same, rows_of(same), "valence")
    assert human["ccc"] == pytest.approx(1) and human["reliability"] == pytest.approx(1)
    guessed = ratings_of({f"u{i}": row for i, row in enumerate(rng.normal(size=(3000, 3)))})
    human = human_ceiling(guessed, rows_of(guessed), "valence")
    assert abs(human["ccc"]) < 0.05 and abs(human["reliability"]) < 0.06
    constant = ratings_of({f"u{i}": [3, 3] for i in range(9)})
    assert np.isnan(human_ceiling(constant, rows_of(constant), "valence")["reliability"])
    single = ratings_of({"a": [1], "b": [2, np.nan]})
    assert human_ceiling(single, rows_of(single), "valence") is None


# --- a run


def test_a_run_keeps_its_ratings_and_the_report_sets_them_beside_the_model(
    corpus, small_wavlm, tmp_path, no_pictures, capsys
):
    rng = np.random.default_rng(0)
    manifest = pd.read_csv(corpus, dtype={"session": str})
    parts = []
    for rater in ("ann", "bob", "cy"):
        part = manifest.assign(rater=rater)
        part = part[part["utt_id"] != "s1d0t0"] if rater != "ann" else part  # rated by one
        for target in ("valence", "arousal"):
            part[target] = (part[target] + rng.normal(0, 0.1, len(part))).clip(0, 1).round(3)
        parts.append(part)
    table = pd.concat(parts)
    path = corpus.parent / "rated.csv"
    table.to_csv(path, index=False, quoting=csv.QUOTE_MINIMAL)
    flags = quick_flags(path, small_wavlm, tmp_path)
    args = train.parse_args([*flags, "--epochs", "1", "--name", "rated"])
    assert train.main(args) == 0
    directory = run_dir(args)
    kept = pd.read_csv(directory / "ratings_test.csv")
    test = table[table["session"] == "1"]
    assert len(kept) == len(test) == 3 * 24 - 2 and [*kept][:2] == ["utt_id", "rater"]
    capsys.readouterr()
    assert run(directory.parent, "--folds", "1", "--json") == 0
    [figures] = json.loads(capsys.readouterr().out)
    rows = pd.read_csv(directory / "predictions_test.csv")
    human = human_ceiling(kept, rows, "valence")
    found = figures["ceiling"]["valence"]
    assert found["ccc"] == pytest.approx(human["ccc"]) and found["utterances"] == 23
    of_these = rows[rows["utt_id"].isin(human["utterances"])]
    y, p = of_these["valence"], of_these["pred_valence"]
    model = 2 * y.cov(p, ddof=0) / (y.var(ddof=0) + p.var(ddof=0) + (y.mean() - p.mean()) ** 2)
    assert found["model"] == pytest.approx(model, abs=1e-6)
    assert run(directory.parent, "--folds", "1", "--out", tmp_path) == 0
    text, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    title = f"{directory.parent}: what human raters reach on its test utterances"
    assert title in text and title in page and f"{human['ccc']:.3f}" in text
    # data.py: over all utterances
    data.inspect(data.parse_args(["--data", str(path), "--cache_dir", str(tmp_path / "cache")]))
    text = capsys.readouterr().out
    assert "human raters: CCC of one" in text and "(71 utterances of 3.0 raters)" in text
    header = "utt_id,rater,valence\na,b,"
    for damage in ("utt_id\na\n", f"{header}high\n", f"{header}inf\n"):
        (directory / "ratings_test.csv").write_text(damage)
        assert run(directory.parent, "--folds", "1") == 0
        text = capsys.readouterr().out
        assert "ceiling: not given" in text and title not in text and "pooled" in text
