"""report.py on small run directories whose figures are computed by hand or in closed form."""

import csv
import json
import statistics
import subprocess
import sys

import numpy as np
import pytest

import report
from model import TARGETS


def write_fold(directory, fold, cccs, num_folds=3, speakers=2, utterances=8, **changes):
    """One finished fold whose test CCCs are `cccs`; its predictions are labels plus noise."""
    directory = directory / f"fold{fold}"
    directory.mkdir(parents=True)
    scores = dict(zip((f"ccc_{target}" for target in TARGETS), cccs))
    scores |= {"ccc_mean": sum(cccs) / 2}
    scores |= {f"{name}_{target}": 0.5 for name in ("pcc", "rmse") for target in TARGETS}
    result = {
        "name": directory.parent.name, "fold": fold, "num_folds": num_folds, "best_epoch": 4 + fold,
        "seconds": 1800, "peak_gib_measured": fold, "parameters_trainable": 2_500_000,
        "dev": scores, "test": scores,
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result | changes))
    rng = np.random.default_rng(fold)
    with open(directory / "predictions_test.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = ["utt_id", "dialog", "speaker", "emotion", "seconds", *TARGETS]
        writer.writerow([*names, *(f"pred_{target}" for target in TARGETS)])
        for i in range(utterances):
            speaker = f"{fold}-{i % speakers}"
            labels = rng.uniform(1, 5, 2)
            preds = labels + 0.3 * rng.standard_normal(2)
            writer.writerow([f"u{fold}-{i}", f"d{fold}", speaker, "", 2.0, *labels, *preds])
    return directory


@pytest.fixture
def experiment(tmp_path):
    for fold, cccs in enumerate([(0.2, 0.6), (0.3, 0.7), (0.7, 0.8)], start=1):
        write_fold(tmp_path / "runs" / "one", fold, cccs)
    return tmp_path / "runs" / "one"


def run(*argv):
    return report.main(report.parse_args([str(arg) for arg in argv]))


def line_of(text, first):
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_mean_and_sample_deviation_over_folds_are_those_computed_by_hand(experiment, capsys):
    assert run(experiment) == 0
    text = capsys.readouterr().out
    # valence 0.2, 0.3, 0.7; arousal 0.6, 0.7, 0.8; mean 0.4, 0.5, 0.75
    assert line_of(text, "mean")[1:4] == ["0.400", "0.700", "0.550"]
    assert line_of(text, "std")[1:4] == ["0.265", "0.100", "0.180"]
    row = "0.300 0.700 0.500 0.500 0.500 0.500 0.500 0.500 6 0.500 2.000"
    assert " ".join(line_of(text, "2")[1:]) == row


def test_pooled_ccc_is_one_ccc_over_all_test_utterances_and_not_the_mean(experiment, capsys):
    assert run(experiment, "--json") == 0
    [figures] = json.loads(capsys.readouterr().out)
    rows = []
    for fold in (1, 2, 3):
        with open(experiment / f"fold{fold}" / "predictions_test.csv", newline="") as file:
            rows += csv.DictReader(file)
    for target in TARGETS:
        y = [float(row[target]) for row in rows]
        p = [float(row[f"pred_{target}"]) for row in rows]
        my, mp = statistics.fmean(y), statistics.fmean(p)
        cov = statistics.fmean((a - my) * (b - mp) for a, b in zip(y, p))
        ccc = 2 * cov / (statistics.pvariance(y) + statistics.pvariance(p) + (my - mp) ** 2)
        assert figures["pooled"][f"ccc_{target}"] == pytest.approx(ccc, abs=1e-6)
        assert abs(ccc - figures["mean"][f"test/ccc_{target}"]) > 0.1
        low, high = figures["interval"][f"ccc_{target}"]
        assert low < ccc < high
    assert figures["utterances"] == 24 and figures["clusters"] == "6 speakers"


def test_a_missing_fold_is_shown_and_no_mean_is_given(experiment, capsys):
    (experiment / "fold3" / "result.json").unlink()
    assert run(experiment) == 1
    text = capsys.readouterr().out
    assert line_of(text, "3")[1] == "missing"
    assert "mean: not given, fold 3 is missing" in text
    assert "std" not in text and "pooled" not in text


def test_folds_that_left_only_a_log_or_nothing_are_missing_too(experiment, capsys):
    (experiment / "fold5.log").touch()
    assert run(experiment) == 1
    assert "folds 4, 5 are missing" in capsys.readouterr().out


def test_folds_asked_for_are_averaged_alone_and_the_heading_says_so(experiment, capsys):
    (experiment / "fold3" / "result.json").unlink()
    assert run(experiment, "--folds", "1-2") == 0
    text = capsys.readouterr().out
    assert "2 of 3 folds" in text
    assert line_of(text, "mean")[1:4] == ["0.250", "0.650", "0.450"]


def test_a_fold_said_to_have_failed_is_missing_though_an_older_result_is_there(experiment, capsys):
    assert run(experiment, "--failed", "2") == 1
    text = capsys.readouterr().out
    assert line_of(text, "2")[1] == "missing" and "mean: not given, fold 2 is missing" in text


def test_one_fold_has_a_mean_and_no_deviation(tmp_path, capsys):
    write_fold(tmp_path / "one", 1, (0.2, 0.6), num_folds=1)
    assert run(tmp_path / "one") == 0
    text = capsys.readouterr().out
    assert line_of(text, "mean")[1] == "0.200" and "std" not in text


def test_experiments_are_compared_best_first_and_incomplete_ones_last(tmp_path, capsys):
    for name, ccc in (("bad", 0.1), ("good", 0.8), ("middling", 0.5), ("broken", 0.9)):
        for fold in (1, 2):
            write_fold(tmp_path / name, fold, (ccc, ccc), num_folds=2)
    (tmp_path / "broken" / "fold2" / "result.json").unlink()
    write_fold(tmp_path / "other", 1, (0.4, 0.4), num_folds=1, utterances=9)
    names = ["bad", "broken", "good", "middling", "other"]
    table = tmp_path / "experiment_comparison.md"
    assert run(*(tmp_path / name for name in names), "--markdown", table) == 1
    text = capsys.readouterr().out
    order = [name for line in text.splitlines()[2:7] for name in names if f"/{name} " in line]
    assert order == ["good", "middling", "other", "bad", "broken"]
    row = " ".join(line_of(text, str(tmp_path / "good"))[1:])
    assert row == "2/2 0.800 0.800 0.800 ± 0.000 2.50 M 1.00 2.00"
    assert "broken: mean not given, fold 2 is missing" in text
    assert "other: tested on other utterances than" in text and "bad: tested on" not in text
    rows = [line.count("|") for line in table.read_text().splitlines() if line.startswith("|")]
    assert rows == [9] * 7


def test_dialogues_are_drawn_where_fewer_than_five_speakers_are_known():
    def columns(speakers, dialogs):
        rows = range(12)
        return {
            "utt_id": np.array([f"u{i}" for i in rows]),
            "speaker": np.array([speakers[i % len(speakers)] for i in rows]),
            "dialog": np.array([dialogs[i % len(dialogs)] for i in rows]),
        }

    assert report.cluster_ids(columns("ABCDE", "x"))[1] == "5 speakers"
    assert report.cluster_ids(columns("ABCD", "uvwxyz"))[1] == "6 dialogues"
    assert report.cluster_ids(columns([""], ["Unknown"]))[1] == "12 utterances"
    ids, _ = report.cluster_ids(columns(["A", "B", "C", "D", "E", "Unknown"], "x"))
    assert len(set(ids.tolist())) == 5 + 2  # the two of unknown speaker stand alone


def test_bootstrap_equals_a_plain_loop_that_repeats_the_utterances_of_drawn_speakers():
    torch = report.torch
    rng = np.random.default_rng(1)
    labels, noise = rng.normal(size=(2, 40, 2))
    preds, labels, ids = torch.tensor(labels + noise), torch.tensor(labels), np.arange(40) % 8
    draws = np.random.default_rng(report.SEED)
    cccs = []
    for _ in range(report.RESAMPLES // 100):
        for times in draws.multinomial(8, np.full(8, 1 / 8), size=100):
            rows = np.repeat(np.arange(40), times[ids])
            cccs.append(report.metrics(preds[rows], labels[rows])["ccc_valence"])
    expected = np.quantile(cccs, (0.025, 0.975))
    assert report.bootstrap(preds, labels, ids)["ccc_valence"] == pytest.approx(expected, abs=1e-9)


def test_bootstrap_interval_covers_the_true_ccc_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(report, "RESAMPLES", 500)
    torch = report.torch
    rng = np.random.default_rng(2)
    # 40 speakers x 5 utterances, speaker offsets in label and prediction; population moments:
    # var y = 1 + 0.5, var p = 0.64 (1 + 0.5) + 0.36 + 0.2, cov = 0.8 (1 + 0.5), equal means
    truth = 2 * 0.8 * 1.5 / (1.5 + 0.64 * 1.5 + 0.36 + 0.2)
    ids = np.repeat(np.arange(40), 5)
    hits, trials = 0, 200
    for _ in range(trials // 2):  # two targets are two trials
        y = rng.normal(size=(200, 2)) + np.sqrt(0.5) * rng.normal(size=(40, 2))[ids]
        p = 0.8 * y + 0.6 * rng.normal(size=(200, 2)) + np.sqrt(0.2) * rng.normal(size=(40, 2))[ids]
        interval = report.bootstrap(torch.tensor(p), torch.tensor(y), ids)
        hits += sum(interval[f"ccc_{t}"][0] <= truth <= interval[f"ccc_{t}"][1] for t in TARGETS)
    assert 0.88 <= hits / trials <= 0.99


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: e / "nowhere", "no such directory"),
        (lambda e: e.parent, r"no folds \(fold1, fold2"),
        (lambda e: e / "fold1", "is one fold: give the directory above it"),
        (lambda e: (e / "fold2" / "result.json").write_text("{"), "result.json: cannot be read"),
        (lambda e: (e / "fold2" / "result.json").write_text("[]"), "result.json: cannot be read"),
        (lambda e: (e / "fold2" / "result.json").write_text("{}"), "result.json: has no 'dev'"),
        (lambda e: (e / "fold2" / "predictions_test.csv").unlink(), "cannot be read"),
        (lambda e: (e / "fold2" / "predictions_test.csv").write_text("utt_id\n"), "no rows"),
        (
            lambda e: (e / "fold2" / "predictions_test.csv").write_text("utt_id,dialog\nu,d\n"),
            "fold2/predictions_test.csv: column speaker, valence, arousal, pred_valence, "
            "pred_arousal is missing",
        ),
        (
            lambda e: (e / "fold2" / "predictions_test.csv").write_text(
                "utt_id,dialog,speaker,valence,arousal,pred_valence,pred_arousal\n"
                "u,d,s,1,2,3,4\nv,d,s,1,2,nan,4\n"
            ),
            "predictions_test.csv row 3: pred_valence nan is not a finite number",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_file_and_what_is_wrong(experiment, damage, message):
    directory = damage(experiment)
    if not hasattr(directory, "name"):
        directory = experiment
    with pytest.raises(report.ReportError, match=message):
        run(directory)


def test_the_command_ends_with_one_line_and_exit_code_2_on_bad_input(tmp_path):
    command = [sys.executable, report.__file__, str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"report.py: error: {tmp_path / 'nowhere'}: no such directory\n"


@pytest.mark.parametrize("folds", ["", "0", "3-", "a", "1,,2"])
def test_a_wrong_folds_list_exits_with_code_2(experiment, folds, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(experiment, "--folds", folds)
    assert exit_info.value.code == 2
    assert "give 1-5, or 1,3,5, or a mix" in capsys.readouterr().err


# --- pictures and separation


def test_separation_is_high_for_separated_halves_and_none_for_noise():
    rng = np.random.default_rng(0)
    labels = rng.uniform(size=(200, 2))
    noise = rng.standard_normal((200, 8))
    apart = noise + 10 * (labels[:, :1] > np.median(labels[:, 0]))
    figures = report.separation(apart, labels)
    assert figures["fisher_valence"] > 5 and figures["silhouette_valence"] > 0.5
    assert figures["fisher_arousal"] < 0.1 and abs(figures["silhouette_arousal"]) < 0.05


def test_fisher_ratio_and_silhouette_equal_their_definitions():
    vectors = np.array([[0.0], [2.0], [10.0], [14.0]])
    labels = np.array([[0.1, 0.1], [0.2, 0.2], [0.8, 0.8], [0.9, 0.9]])
    figures = report.separation(vectors, labels)
    assert figures["fisher_valence"] == pytest.approx((12 - 1) ** 2 / (1 + 4))
    silhouettes = [(12 - 2) / 12, (10 - 2) / 10, (9 - 4) / 9, (13 - 4) / 13]
    assert figures["silhouette_valence"] == pytest.approx(np.mean(silhouettes))


def test_separation_of_constant_labels_is_zero():
    figures = report.separation(np.random.default_rng(0).standard_normal((10, 3)), np.ones((10, 2)))
    assert set(figures.values()) == {0.0}
