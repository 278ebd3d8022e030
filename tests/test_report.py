"""report.py on small run directories whose figures are computed by hand or in closed form."""

import base64
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import quick_flags
from matplotlib.image import imread

import report
import train
from util import files, intervals, pictures, runs

ROOT = Path(__file__).parent.parent
TARGETS = ("valence", "arousal")


def write_fold(directory, fold, cccs, num_folds=3, speakers=2, utterances=8, **changes):
    """One finished fold whose test CCCs are `cccs`; its predictions are labels plus noise.

    Its result has a figure more than those of other folds: it is not read.
    """
    directory = directory / f"fold{fold}"
    directory.mkdir(parents=True)
    scores = dict(zip((f"ccc_{target}" for target in TARGETS), cccs))
    scores |= {"ccc_mean": sum(cccs) / 2, f"another_{fold}": 1.0}
    scores |= {f"{name}_{target}": 0.5 for name in ("pcc", "rmse") for target in TARGETS}
    result = {
        "name": directory.parent.name, "fold": fold, "num_folds": num_folds, "best_epoch": 4 + fold,
        "seconds": 1800, "peak_gib_measured": float(fold), "parameters_trainable": 2_500_000,
        "dev": scores, "test": scores,
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result | changes))
    rng = np.random.default_rng(fold)
    labels, noise = rng.uniform(1, 5, (utterances, 2)), rng.standard_normal((utterances, 2))
    rows = pd.DataFrame({"utt_id": [f"u{fold}-{i}" for i in range(utterances)]})
    rows = rows.assign(dialog=f"d{fold}", speaker=[f"{fold}-{i % speakers}" for i in rows.index])
    rows = rows.assign(emotion="", seconds=2.0 + rows.index)
    rows[list(TARGETS)] = labels
    rows[[f"pred_{target}" for target in TARGETS]] = labels + 0.3 * noise
    rows.to_csv(directory / "predictions_test.csv", index=False)
    vectors = rng.standard_normal((utterances, 12)).astype(np.float16)
    np.save(directory / "embedding_test.npy", vectors)
    (directory / "args.json").write_text("{}")
    with open(directory / "metrics.jsonl", "w") as file:
        for epoch in range(1, 5):
            values = {"step": 10 * epoch, "epoch": epoch}
            file.write(json.dumps({"event": "train", **values, "loss": 1 / epoch}) + "\n")
            dev = {f"dev/ccc_{name}": 0.1 * epoch for name in (*TARGETS, "mean")}
            file.write(json.dumps({"event": "dev", **values, **dev}) + "\n")
    return directory


@pytest.fixture
def experiment(tmp_path):
    for fold, cccs in enumerate([(0.2, 0.6), (0.3, 0.7), (0.7, 0.8)], start=1):
        write_fold(tmp_path / "runs" / "one", fold, cccs)
    return tmp_path / "runs" / "one"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A comparison writes its files to the working directory."""
    monkeypatch.chdir(tmp_path)


def run(*argv):
    return report.main(report.parse_args([str(arg) for arg in argv]))


def figures_of(capsys, *argv):
    assert run(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_rows(experiment, folds="*"):
    paths = sorted(experiment.glob(f"{folds}/predictions_test.csv"))
    return pd.concat(runs.read_predictions(path, TARGETS) for path in paths)


test_rows.__test__ = False


def line_of(text, first):
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_mean_deviation_and_pooled_ccc_are_those_computed_by_hand(experiment, capsys):
    assert run(experiment) == 0
    text = capsys.readouterr().out
    # valence 0.2, 0.3, 0.7; arousal 0.6, 0.7, 0.8; mean 0.4, 0.5, 0.75
    assert line_of(text, "mean")[1:4] == ["0.400", "0.700", "0.550"]
    assert line_of(text, "std")[1:4] == ["0.265", "0.100", "0.180"]
    text_of_2 = " ".join(line_of(text, "2")[1:] + line_of(text.split("GiB")[1], "2")[1:])
    assert text_of_2 == "0.300 0.700 0.500 0.500 0.500 0.500 0.500 0.500 6 0.500 2.000"
    assert max(map(len, text.split("- pooled")[0].splitlines()[1:])) <= 80

    figures, rows = figures_of(capsys, experiment)[0], test_rows(experiment)
    for target in TARGETS:
        y, p = rows[target], rows[f"pred_{target}"]
        ccc = 2 * y.cov(p, ddof=0)
        ccc /= y.var(ddof=0) + p.var(ddof=0) + (y.mean() - p.mean()) ** 2
        assert figures["pooled"][f"ccc_{target}"] == pytest.approx(ccc, abs=1e-6)
        assert abs(ccc - figures["mean"][f"test/ccc_{target}"]) > 0.1  # it is not the mean
        low, high = figures["interval"][f"ccc_{target}"]
        assert low < ccc < high
    assert figures["clusters"] == "6 speakers"


def test_a_missing_fold_is_shown_and_only_folds_asked_for_are_averaged(experiment, capsys):
    (experiment / "fold5.log").touch()
    assert run(experiment) == 0
    assert "fold 5 is left out" in capsys.readouterr().out
    (experiment / "fold3" / "result.json").unlink()
    write_fold(experiment.parent / "some", 1, (0.2, 0.6), num_folds=4)
    (experiment.parent / "some" / "fold2.log").touch()  # a log and nothing else
    for words, said in (
        ((experiment,), "2 of 3 folds.*\nmean: not given, fold 3 is missing.*\nfold3: .*not done"),
        ((experiment.parent / "some",), "1 of 4 folds.*folds 2, 3, 4 are missing"),
        # launch.sh knows better than an older result
        ((experiment, "--folds", "1-2", "--failed", "2"), "fold 2 is missing.*fold2: this run"),
    ):
        assert run(*words) == 1
        text = capsys.readouterr().out
        assert re.search(said, text.replace("\n- ", "\n"), re.DOTALL)
        assert "missing" in line_of(text, "2" if len(words) > 1 else "3")
        assert "std" not in text and "pooled" not in text and "speaker" not in text
    for folds, means in (("1-2", ["0.250", "0.650", "0.450"]), ("1", ["0.200", "0.600", "0.400"])):
        assert run(experiment, "--folds", folds) == 0
        text = capsys.readouterr().out
        assert f"{folds[-1]} of 3 folds" in text and line_of(text, "mean")[1:4] == means
    for wrong in ("", "3-", "a", "1,,2"):
        with pytest.raises(SystemExit, match="2"):
            run(experiment, "--folds", wrong)
        assert "give 1-5, or 1,3,5, or a mix" in capsys.readouterr().err


def test_experiments_are_compared_best_first_and_incomplete_ones_last(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a table of short names is not cut
    for name, ccc in (("a|b", 0.1), ("good", 0.8), ("broken", 0.9)):
        for fold in (1, 2):
            write_fold(tmp_path / name, fold, (ccc, ccc), num_folds=2)
            change_predictions(tmp_path / name / f"fold{fold}", speaker=["a|b\nc", "<i>"] * 4)
            (tmp_path / name / f"fold{fold}" / "embedding_test.npy").unlink()
    (tmp_path / "broken" / "fold2" / "result.json").unlink()
    write_fold(tmp_path / "other", 1, (0.4, 0.4), num_folds=1, utterances=9)
    before = {path.name for path in tmp_path.iterdir()}
    assert run(tmp_path / "good") == 0
    assert line_of(capsys.readouterr().out, r"a|b\nc")[1] == "8"
    assert {path.name for path in tmp_path.iterdir()} == before  # of one nothing is written
    names = ["a|b", "broken", "good", "other"]
    assert run(*names) == 1
    text = capsys.readouterr().out
    table = text.split("\n\n")[1]
    order = [name for line in table.splitlines() for name in names if line.startswith(f"{name} ")]
    assert order == ["good", "other", "a|b", "broken"]
    row = " ".join(line_of(text, "good")[1:])
    assert row == "2/2 0.800 0.800 0.800 ± 0.000 2.50 M 1.000 2.000"
    assert "broken: mean: not given, fold 2 is missing" in text
    assert "other: tested on other utterances than" in text and "a|b: tested on" not in text
    # what a name holds breaks neither of the two files
    assert {path.name for path in tmp_path.iterdir()} - before == {
        "report.html", "experiment_comparison.md",
    }  # fmt: skip
    written = (tmp_path / "experiment_comparison.md").read_text()
    rows = [line.replace(r"\|", "") for line in written.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows[:6]] == [9] * 6
    page = (tmp_path / "report.html").read_text()
    assert "&lt;i&gt;" in page and "<i>" not in page


@pytest.mark.parametrize(
    ("speakers", "dialogs", "drawn", "count"),
    [
        ("ABCDE", "x", "5 speakers", 5),
        ("ABCD", "uvwxyz", "6 dialogues", 6),
        ([""], ["Unknown"], "12 utterances", 12),
        (["UNKNOWN", *"ABCD"], "uvwxyz", "6 dialogues", 6),
        ([*"ABCDE", "Unknown"], "x", "5 speakers", 5 + 2),  # the two of unknown speaker stand alone
    ],
)
def test_dialogues_are_drawn_where_fewer_than_five_speakers_are_known(
    speakers, dialogs, drawn, count
):
    rows = pd.DataFrame({"utt_id": [f"u{i}" for i in range(12)]})
    rows["speaker"] = [speakers[i % len(speakers)] for i in range(12)]
    rows["dialog"] = [dialogs[i % len(dialogs)] for i in range(12)]
    ids, clusters = intervals.cluster_ids(rows)
    assert clusters == drawn and len(set(ids.tolist())) == count


def test_bootstrap_interval_covers_the_true_ccc_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    rng = np.random.default_rng(2)
    # 40 speakers x 5 utterances, speaker offsets in label and prediction; population moments:
    # var y = 1 + 0.5, var p = 0.64 (1 + 0.5) + 0.36 + 0.2, cov = 0.8 (1 + 0.5), equal means
    truth = 2 * 0.8 * 1.5 / (1.5 + 0.64 * 1.5 + 0.36 + 0.2)
    ids = np.repeat(np.arange(40), 5)
    hits, trials = 0, 200
    for _ in range(trials // 2):  # two targets are two trials
        y = rng.normal(size=(200, 2)) + np.sqrt(0.5) * rng.normal(size=(40, 2))[ids]
        p = 0.8 * y + 0.6 * rng.normal(size=(200, 2)) + np.sqrt(0.2) * rng.normal(size=(40, 2))[ids]
        cccs = intervals.resampled_cccs(torch.tensor(p), torch.tensor(y), ids)
        interval = intervals.intervals(cccs, [*report.cccs_of(TARGETS)])
        hits += sum(interval[f"ccc_{t}"][0] <= truth <= interval[f"ccc_{t}"][1] for t in TARGETS)
    assert 0.88 <= hits / trials <= 0.99


def ccc(p, y):
    """Mean over the targets."""
    cov = ((p - p.mean(0)) * (y - y.mean(0))).mean(0)
    return np.mean(2 * cov / (p.var(0) + y.var(0) + (p.mean(0) - y.mean(0)) ** 2 + 1e-8))


def drawn_plainly(preds, labels, speakers, other=None):
    """Interval of the mean CCC (less that of `other`) in a plain loop over the same draws."""
    names, ids = np.unique(speakers, return_inverse=True)
    size, draws = len(names), np.random.default_rng(intervals.SEED)
    times = [draws.multinomial(size, np.full(size, 1 / size), size=100) for _ in range(2)]
    count = len(preds)
    seeds = draws.multinomial(count, np.full(count, 1 / count), size=200)
    values = []
    for of_cluster, of_seed in zip(np.concatenate(times), seeds):
        rows = np.repeat(np.arange(len(ids)), of_cluster[ids])
        both = [preds] if other is None else [preds, other]
        means = [np.average([ccc(p[rows], labels[rows]) for p in x], weights=of_seed) for x in both]
        values.append(means[0] - (means[1] if other is not None else 0))
    return np.quantile(values, (0.025, 0.975))


def change_predictions(directory, **columns):
    """Columns of the fold's predictions are replaced, each by a value, list or function of rows."""
    path = directory / "predictions_test.csv"
    rows = pd.read_csv(path, keep_default_na=False)
    rows.assign(**columns).to_csv(path, index=False)


def test_paired_differences_are_those_of_a_plain_loop_over_the_utterances_of_both(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for name, fold in itertools.product((one, two), (1, 2, 3)):
        write_fold(name, fold, (0.5, 0.5), speakers=4, utterances=12)
    for fold in (1, 2, 3):
        path = two / f"fold{fold}" / "predictions_test.csv"
        rows = pd.read_csv(path)
        rows["pred_valence"] += 0.1 * (-1) ** np.arange(12)
        rows[rows["utt_id"] != "u1-3"].to_csv(path, index=False)
    shutil.rmtree(two / "fold3")  # missing: the others are still compared
    assert run(two, one, "--json") == 1
    best, other = json.loads(capsys.readouterr().out)
    assert best["difference"] is None
    paired = other["difference"]
    assert paired["n"] == 23 and paired["clusters"] == "8 speakers"
    tables = []
    for name in (two, one):
        rows = test_rows(name, "fold[12]")
        tables.append(rows[rows["utt_id"] != "u1-3"].sort_values("utt_id"))
    labels, speakers = tables[0][list(TARGETS)].to_numpy(), tables[0]["speaker"]
    preds = [rows[runs.predicted(TARGETS)].to_numpy() for rows in tables]
    interval = drawn_plainly(preds[0][None], labels, speakers, preds[1][None])
    expected = [ccc(preds[0], labels) - ccc(preds[1], labels), *interval]
    assert paired["ccc_mean"] == pytest.approx(expected, abs=1e-9)

    assert run(two, one, "--baseline", two, "--out", tmp_path) == 1
    table = capsys.readouterr().out.split("Paired differences")[1]
    assert "less the baseline" in table and re.search(r"^\S*/one .* \+0", table, re.MULTILINE)
    with pytest.raises(files.UserError, match=r"--baseline .*other: not one"):
        run(one, two, "--baseline", tmp_path / "other")
    write_fold(three, 5, (0.5, 0.5), num_folds=5)
    change_predictions(two / "fold1", valence=3.0)
    for name, why in ((two, "their labels of the same utterances differ"), (three, "no test utt")):
        run(one, name)
        assert why in capsys.readouterr().out


def test_breakdown_counts_bias_and_error_are_those_computed_by_hand(tmp_path, capsys):
    directory = write_fold(tmp_path / "one", 1, (0.5, 0.5), num_folds=1, utterances=16)
    number = np.arange(16)
    label = (number // 2).astype(float)
    wrong = np.where(number % 2, 1.0, -2.0)  # speaker 1-1 one too high, speaker 1-0 two too low
    emotion = np.where(number < 12, "sad", "")
    columns = {"emotion": emotion, "valence": label, "pred_valence": label + wrong}
    change_predictions(directory, **columns, arousal=1.0, pred_arousal=1.0)
    assert run(tmp_path / "one") == 0
    text = capsys.readouterr().out
    # n, and of each target CCC (8 utterances are too few), RMSE, bias
    assert line_of(text, "1-0")[1:] == ["8", "-", "2.000", "-2.000", "-", "0.000", "+0.000"]
    assert line_of(text, "1-1")[1:] == ["8", "-", "1.000", "+1.000", "-", "0.000", "+0.000"]
    # 12 rows with six valences 0..5 and one arousal: variances 35/12 + (1.5)^2, mean error -0.5
    variance = 35 / 12
    ccc = 2 * variance / (variance + variance + 1.5**2 + 0.25)
    rmse = math.sqrt((1 + 4) / 2)
    assert line_of(text, "sad")[1:] == f"12 {ccc:.3f} {rmse:.3f} -0.500 - 0.000 +0.000".split()
    assert line_of(text, "unknown")[1] == "4"
    write_fold(tmp_path / "many", 1, (0.5, 0.5), num_folds=1, speakers=23, utterances=43)
    assert run(tmp_path / "many") == 0
    text = capsys.readouterr().out
    counts = [line.split()[1] for line in text.splitlines() if re.match(r"1-\d", line)]
    assert counts == ["2"] * 20 and "and 3 more" in text


HEADER = ",".join((*runs.TEXTS, "seconds", *TARGETS, *runs.predicted(TARGETS)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", "{", "cannot be read"),
        ("result.json", "[]", "cannot be read"),
        ("result.json", "{}", "has no 'seconds'"),
        ("result.json", '{"seconds": 1, "peak_gib_measured": 1, "dev": 1}', "cannot be read"),
        ("result.json", "nan", "test/ccc_arousal nan is not a finite number"),
        ("result.json", None, "not there, the run is not done"),
        ("predictions_test.csv", None, "cannot be read"),
        ("predictions_test.csv", HEADER, "no rows"),
        ("predictions_test.csv", b"\xff\xfe\x00", "cannot be read"),
        (
            "predictions_test.csv",
            "utt_id,dialog\nu,d\n",
            "column speaker, emotion, seconds, valence, ",
        ),
        (
            "predictions_test.csv",
            f"{HEADER}\nu,d,s,,1,1,2,3,4\nv,d,s,,1,1,2,nan,4\n",
            "row 3: pred_valence 'nan' is not a finite number",
        ),
        ("predictions_test.csv", f"{HEADER}\nu\n", "row 2: seconds '' is not a finite number"),
    ],
)
def test_a_damaged_fold_is_named_and_missing_and_the_others_are_shown(
    experiment, name, content, message, capsys
):
    path = experiment / "fold2" / name
    before = path.read_text()
    path.unlink()
    if content == "nan":
        path.write_text(before.replace('"ccc_arousal": 0.7', '"ccc_arousal": NaN'))
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    pictures = ["--out", experiment / "out"] if content == "{" else []
    assert run(experiment, *pictures) == 1
    text = capsys.readouterr().out
    assert line_of(text, "2")[1] == "missing" and line_of(text, "1")[1] == "0.200"
    assert "mean: not given, fold 2 is missing" in text
    assert re.search(f"- fold2: .*{name}.*{message}", text)
    if pictures:
        page = (experiment / "out" / "report.html").read_text()
        assert "<figcaption>curves" in page and "pictures of fold1, fold3" in page


def test_damaged_embeddings_are_named_and_only_the_separation_is_left_out(experiment, capsys):
    path = experiment / "fold2" / "embedding_test.npy"
    shapes = (np.ones((3, 4)), np.full((8, 4), "x"), np.full((8, 4), np.nan))
    for damage in (None, b"", b"\x93NUMPY", *shapes):
        path.unlink(missing_ok=True)
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        elif damage is not None:
            np.save(path, damage)
        assert run(experiment) == 0
        text = capsys.readouterr().out
        assert "separation: not given" in text and "fold2/embedding_test.npy: " in text
        assert "silhouette" not in text and line_of(text, "mean")[1] == "0.400"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda e: e / "nowhere", "no such directory"),
        (lambda e: e.parent, r"no folds \(fold1, fold2"),
        (lambda e: e / "fold1", "is one fold: give the directory above it"),
    ],
)
def test_what_is_no_experiment_is_refused(experiment, place, message):
    with pytest.raises(files.UserError, match=message):
        run(place(experiment))


def test_training_starts_without_what_only_pictures_and_separation_need():
    code = "import sys, train; print({'matplotlib', 'sklearn', 'jinja2'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "matplotlib" not in done.stdout and "sklearn" not in done.stdout, done.stdout
    assert done.returncode == 0, done.stderr


# --- the page


def test_the_page_needs_nothing_but_itself_and_its_pictures_decode(experiment):
    assert run(experiment, "--out", experiment) == 0
    text = (experiment / "report.html").read_text()
    without = re.sub(r'src="data:image/png;base64,([^"]*)"', "", text)
    assert "src=" not in without and "href" not in without and "http:" not in without
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    shapes = [imread(BytesIO(base64.b64decode(picture))).shape for picture in pictures]
    assert len(shapes) == 4 and all(height > 300 and width > 600 for height, width, _ in shapes)
    assert "script" not in text


# --- pictures and separation


def test_a_run_draws_its_pictures_and_leaves_what_the_report_reads(
    corpus, small_wavlm, tmp_path, capsys
):
    flags = [*quick_flags(corpus, small_wavlm, tmp_path), "--name", "real"]
    flags += ["--separation_every", "1", "--plot_every", "1"]
    assert train.main(train.parse_args(flags)) == 0
    experiment = tmp_path / "runs" / "real"
    names = {path.name for path in (experiment / "fold1").iterdir()}
    drawn = {f"{n}.png" for n in ("curves", "scatter", "circumplex", "embedding")}
    assert names >= drawn | {"embedding_test.npy"}
    records = runs.read_records(experiment / "fold1")
    curve = pictures.plot_curves({"real": records}, TARGETS).axes[1].lines[0]
    assert list(curve.get_xdata()) == [1, 2]  # not the scores of the best epoch again
    figures = [record for record in records if record["event"] == "separation"]
    assert len(figures) == 2 and figures[0].keys() >= {
        "separation/silhouette_valence", "separation/ks_arousal", "separation/speaker_accuracy",
    }  # fmt: skip
    assert run(experiment, "--folds", "1") == 0
    assert "accuracy" in capsys.readouterr().out


def rows_of(count, speakers=2, seed=0, targets=TARGETS):
    rng = np.random.default_rng(seed)
    labels = rng.uniform(1, 5, (count, len(targets)))
    rows = pd.DataFrame({"seconds": rng.uniform(1, 12, count)})
    rows["speaker"] = [f"speaker {i % speakers}" for i in range(count)]
    rows[list(targets)] = labels
    preds = labels + 0.5 * rng.standard_normal((count, len(targets)))
    rows[[f"pred_{target}" for target in targets]] = preds
    return rows


@pytest.mark.parametrize(
    ("count", "speakers", "folds", "targets"),
    [
        (1, 1, 1, TARGETS),
        (90, 30, 8, TARGETS),
        (40, 2, 1, ("valence",)),
        (40, 2, 2, ("arousal", "dominance", "valence")),
    ],
)
def test_no_two_texts_of_a_picture_overlap(count, speakers, folds, targets):
    rng = np.random.default_rng(0)
    names = [f"fold {i + 1}" for i in range(folds)]
    parts = {name: rows_of(count, speakers, seed, targets) for seed, name in enumerate(names)}
    vectors = {name: rng.standard_normal((count, 7)) for name in names}
    keys = {"loss": 1.0} | {f"dev/ccc_{target}": 0.5 for target in targets}
    lines = [{"event": "train", "step": i, "epoch": i, **keys} for i in range(4)]
    figures = pictures.plot_all(dict.fromkeys(names, lines), parts, vectors, targets)
    drawn = ["curves", "scatter", "circumplex", "embedding"]
    if len(targets) < 2:
        drawn.remove("circumplex")
    assert list(figures) == drawn[: 4 if count > 1 else 3]  # one point has no components
    for name, figure in figures.items():
        figure.draw_without_rendering()
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        for axis in figure.axes:
            texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
            texts += axis.get_legend().get_texts() if axis.get_legend() else []
        texts = {id(text): text for text in texts if text.get_text() and text.get_visible()}
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts.values()]
        for (one, box), (two, other) in itertools.combinations(boxes, 2):
            assert not box.overlaps(other), (name, one, two)
        frame = figure.bbox.padded(1)
        assert all(frame.contains(*corner) for _, box in boxes for corner in box.corners()), name


def test_separation_is_high_for_separated_halves_and_speakers_and_none_for_noise():
    rng = np.random.default_rng(0)
    labels = rng.uniform(size=(200, 2))
    noise = rng.standard_normal((200, 800))  # more dimensions than rows
    apart = noise + 2 * (labels[:, :1] > np.median(labels[:, 0]))
    speakers = [f"s{i // 40}" for i in range(200)]
    figures = pictures.separation(apart, labels, speakers, TARGETS)
    assert figures["silhouette_valence"] > 0.2 and figures["ks_valence"] == 1
    assert abs(figures["silhouette_arousal"]) < 0.05 and figures["ks_arousal"] < 0.2
    assert figures["speaker_accuracy"] == pytest.approx(0.2, abs=0.1)
    assert figures["speaker_chance"] == 0.2
    hidden = 0.5 * rng.standard_normal((5, 800))[np.repeat(range(5), 40)]
    hidden += 3 * rng.standard_normal((200, 1)) * rng.standard_normal(800)  # something louder
    assert pictures.separation(noise + hidden, labels, speakers, TARGETS)["speaker_accuracy"] > 0.9
    few, constant = np.eye(10)[:, :2], np.ones((10, 2))  # nothing to tell apart
    for values, names in ((constant, "A" * 10), (few, "AAAABBBBCC"), (constant, [""] * 10)):
        assert pictures.separation(noise[:10], values, list(names), TARGETS) == {}


# --- the end of --preset verify


def test_a_verifying_run_ends_with_what_it_gained_over_the_best_frozen_one(flags, tmp_path, capsys):
    flags = [*flags, "--preset", "verify", "--epochs", "1", "--fold", "2"]

    def last_line(*more):
        args = train.parse_args([*flags, *more])
        assert train.main(args) == 0
        return (runs.run_dir(args) / "train.log").read_text().splitlines()[-2]

    def copy_frozen(name, dev, fold=2, **changed):
        """The frozen run with another dev CCC, in another fold or with other flags."""
        shutil.copytree(tmp_path / "frozen" / "fold2", tmp_path / "runs" / name / f"fold{fold}")
        for file, change in (
            ("args.json", changed),
            ("result.json", {"dev": {f"ccc_{t}": dev for t in TARGETS}}),
        ):
            path = tmp_path / "runs" / name / f"fold{fold}" / file
            content = json.loads(path.read_text())
            for key, value in change.items():
                content[key] = content[key] | value if isinstance(value, dict) else value
            path.write_text(json.dumps(content))

    assert "frozen" not in last_line("--unfreeze", "none", "--lr", "0.01", "--name", "frozen")
    shutil.move(tmp_path / "runs" / "frozen", tmp_path / "frozen")
    line = last_line("--name", "verify")
    assert line.startswith("no frozen baseline of this fold in ") and "--unfreeze none" in line
    verify = tmp_path / "runs" / "verify" / "fold2"
    copy_frozen("mse", 0.99, loss="mse", no_film=True)
    copy_frozen("tuned", 0.99, init_from=str(verify), no_film=True, loss="mse")
    line = report.against_frozen(verify)
    assert line.startswith("no frozen baseline of this fold in ")
    assert "runs/mse/fold2 differs in --loss (mse, here ccc), --no_film (True, here False)" in line

    copy_frozen("another_fold", 0.99, fold=3)
    copy_frozen("weak", 0.1)
    change_predictions(tmp_path / "runs/weak/fold2", pred_valence=0.5)
    copy_frozen("better", 0.2)
    line = report.against_frozen(verify)
    pair = [tmp_path / "runs" / name for name in ("verify", "better")]
    capsys.readouterr()
    two, one = figures_of(capsys, *pair, "--folds", "2", "--baseline", pair[1])[::-1]
    paired = one["difference"]
    assert line.startswith(f"test CCC less that of the frozen {pair[1]}/fold2: valence ")
    values = [float(x) for x in re.findall(r"[-+]\d\.\d{3}", line)]
    expected = [x for key in ("valence", "arousal", "mean") for x in paired[f"ccc_{key}"]]
    assert values == [round(x, 3) for x in expected]
    difference = one["mean"]["test/ccc_mean"] - two["mean"]["test/ccc_mean"]
    assert values[6] == pytest.approx(difference, abs=1e-3)
    assert f"{paired['clusters']}, {paired['n']} utterances" in line
