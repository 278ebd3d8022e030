"""--targets: any labels in any order, with rows that lack some of them; further test splits."""

import json
import math
import signal

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import quick_flags
from helpers import raise_on

import predict
import report
from train import cli, main, parse_args
from util.checkpoints import read_checkpoint, save_checkpoint
from util.runs import run_dir

VAD = ("arousal", "dominance", "valence")


@pytest.fixture(scope="module")
def labelled(corpus, tmp_path_factory):
    """The corpus with a dominance in every other row, and a row with no other label."""
    table = pd.read_csv(corpus)
    table["dominance"] = (table["valence"] + table["arousal"]).where(table.index % 2 == 0) / 2
    table.loc[70, ["valence", "arousal"]] = math.nan
    path = tmp_path_factory.mktemp("labelled") / "corpus.csv"
    table.to_csv(path, index=False)
    return ["--data", str(path), "--data_dir", str(corpus.parent)]


@pytest.fixture(scope="module")
def three(labelled, corpus, small_wavlm, tmp_path_factory):
    """(flags, args) of a finished run with three targets."""
    flags = quick_flags(corpus, small_wavlm, tmp_path_factory.mktemp("three"))
    flags = [*flags, *labelled, "--targets", *VAD, "--target_weights", "1", "2", "1"]
    flags += ["--context", "2", "--feedback"]
    args = parse_args(flags)
    assert main(args) == 0
    return flags, args


def columns_of(path):
    return list(pd.read_csv(path).columns)


def test_three_targets_are_in_every_file_in_the_order_of_the_flag(three, tmp_path, capsys):
    _, args = three
    directory = run_dir(args)
    assert args.target_weights == [0.25, 0.5, 0.25] and args.valence_weight == 0.25
    result = json.loads((directory / "result.json").read_text())
    scores = result["test"]
    assert result["targets"] == list(VAD)
    assert scores["ccc_mean"] == pytest.approx(np.mean([scores[f"ccc_{t}"] for t in VAD]))
    predicted = [f"pred_{target}" for target in VAD]
    assert columns_of(directory / "predictions_test.csv")[-6:] == [*VAD, *predicted]
    assert report.main(report.parse_args([str(directory.parent), "--folds", "1"])) == 0
    said = capsys.readouterr().out
    tables = [line for line in said.split("Separation")[0].splitlines() if line[:1] not in "/-"]
    assert max(map(len, tables)) <= 80
    out = tmp_path / "out.csv"
    flags = ["--checkpoint", str(directory), "--data", args.data, "--data_dir", args.data_dir]
    assert predict.main(predict.parse_args([*flags, "--out", str(out)])) == 0
    assert columns_of(out)[-3:] == predicted
    export = ["--checkpoint", str(directory), "--export", str(tmp_path / "model")]
    assert predict.main(predict.parse_args(export)) == 0
    assert "arousal, dominance and valence" in (tmp_path / "model/README.md").read_text()


def test_a_row_needs_a_label_of_one_target_that_was_asked_for(three, labelled, flags, capsys):
    splits = json.loads((run_dir(three[1]) / "splits.json").read_text())
    assert sum(map(len, splits.values())) == 72
    assert cli([*flags, *labelled, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "skipped: no label: 1" in said and "columns not used: dominance" in said


def test_a_run_with_three_targets_resumes_bit_for_bit(three, tmp_path):
    flags, args = three
    flags = [*flags, "--out", str(tmp_path)]
    with raise_on(r"^step +2/", signal.SIGTERM):
        assert main(parse_args(flags)) == 75
    resumed = parse_args([*flags, "--resume"])
    assert main(resumed) == 0
    whole, parts = (read_checkpoint(run_dir(a) / "last.pt")["model"] for a in (args, resumed))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_one_target_is_scored_alone_and_needs_no_other_column(labelled, flags, tmp_path, capsys):
    path = tmp_path / "c.csv"
    pd.read_csv(labelled[1]).drop(columns=["arousal", "dominance"]).to_csv(path, index=False)
    flags = [*flags, *labelled[2:], "--data", str(path), "--targets", "valence"]
    assert cli(flags) == 0
    said = capsys.readouterr().out
    assert "test CCC valence" in said and "mean" not in said.split("test CCC")[1]
    scores = json.loads((run_dir(parse_args(flags)) / "result.json").read_text())["test"]
    assert scores["ccc_mean"] == scores["ccc_valence"] and len(scores) == 4


def test_runs_are_compared_on_the_targets_that_they_share(three, finished, tmp_path, capsys):
    runs = [str(run_dir(three[1]).parent), str(finished[1].parent)]
    flags = [*runs, "--folds", "1", "--out", str(tmp_path), "--json"]
    assert report.main(report.parse_args(flags)) == 0
    figures = json.loads(capsys.readouterr().out)
    paired = figures[1]["difference"]
    assert {"ccc_valence", "ccc_arousal"} < paired.keys() and "ccc_dominance" not in paired
    assert "dominance is left out" in (tmp_path / "experiment_comparison.md").read_text()


def test_a_checkpoint_of_before_the_flag_is_of_valence_and_arousal(finished, corpus, tmp_path):
    _, directory = finished
    best = read_checkpoint(directory / "best.pt")
    for content in (best["config"], best["args"]):
        del content["targets"]
    del best["args"]["target_weights"]
    best["args"]["valence_weight"] = 0.5
    save_checkpoint(tmp_path / "best.pt", best)
    out = tmp_path / "out.csv"
    said = ["--checkpoint", str(tmp_path), "--data", str(corpus), "--out", str(out)]
    assert predict.main(predict.parse_args(said)) == 0
    assert columns_of(out)[-2:] == ["pred_valence", "pred_arousal"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--targets", "dominance"], "column dominance is missing (found: "),
        (["--targets", "valence", "dominance"], "--targets takes what there is: valence, arousal"),
        (["--targets", "valence", "valence"], "--targets valence valence: give each target once"),
        (
            ["--targets", "arousal", "--valence_weight", "1"],
            "valence is not among --targets arousal",
        ),
        (["--targets", "valence", "--valence_weight", "0.5"], "valence is the only target"),
        (["--target_weights", "1"], "--target_weights 1: --targets valence arousal needs 2"),
        (["--target_weights", "0", "0"], "--target_weights 0 0: one must be above 0"),
        (["--target_weights", "1", "1", "--valence_weight", "1"], "exclude each other"),
        (["--targets", "joy"], "invalid choice: 'joy'"),
    ],
)
def test_targets_that_cannot_be_are_refused_in_a_line(flags, words, expected, capsys):
    try:
        code = cli([*flags, *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and expected in capsys.readouterr().err


def write_msp(root):
    """Clips of each split; Test3 has no labels, and one of it is not in the table."""
    (root / "Audios").mkdir(parents=True)
    splits = ["Train"] * 8 + ["Development"] * 4 + ["Test1"] * 3 + ["Test2"] * 3 + ["Test3"] * 2
    names = [f"MSP-PODCAST_{i:04d}_0001.wav" for i in range(len(splits))]
    rng = np.random.default_rng(0)
    for name in (*names, "MSP-PODCAST_test3_0001.wav"):
        soundfile.write(root / "Audios" / name, 0.1 * rng.standard_normal(8000), 16_000)
    table = pd.DataFrame({"FileName": names, "Split_Set": splits, "SpkrID": range(len(names))})
    for column in ("EmoDom", "EmoAct", "EmoVal"):
        labels = rng.uniform(1, 7, len(names)).round(2)
        table[column] = np.where(table["Split_Set"] == "Test3", "", labels.astype(str))
    table.to_csv(root / "labels_consensus.csv", index=False)


def test_each_test_split_of_msp_podcast_is_scored_or_predicted(flags, tmp_path, capsys):
    write_msp(tmp_path / "msp")
    msp = ["--data", "msp_podcast", "--data_dir", str(tmp_path / "msp")]
    args = parse_args([*flags, *msp, "--targets", *VAD, "--batch_size", "4"])
    assert main(args) == 0
    said, directory = capsys.readouterr().out, run_dir(args)
    assert "| test CCC " in said and "| test2 CCC " in said and "test3 predicted" in said
    result = json.loads((directory / "result.json").read_text())
    assert result["splits"]["test2"] == result["splits"]["test3"] == 3
    assert "test2" in result and "test3" not in result
    blind = pd.read_csv(directory / "test3.csv")
    labels = ["EmoAct", "EmoVal", "EmoDom"]
    assert list(blind.columns) == ["FileName", *labels]
    assert blind["FileName"].iloc[-1] == "MSP-PODCAST_test3_0001.wav" and len(blind) == 3
    assert blind[labels].min().min() >= 1 and 1.5 < blind[labels].max().max() <= 7
    again = ["--checkpoint", str(directory), *msp, "--out", str(tmp_path / "o.csv")]
    for more, count in (([], 21), (["--split", "test3"], 3)):
        assert predict.main(predict.parse_args([*again, *more])) == 0
        assert len(pd.read_csv(tmp_path / "o.csv")) == count
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "o.csv"), blind, atol=2e-6)
    assert report.main(report.parse_args([str(directory.parent)])) == 0
    assert "Another test split: test2" in capsys.readouterr().out


def test_a_csv_may_have_more_test_splits(corpus, flags, tmp_path, capsys):
    table = pd.read_csv(corpus)
    table["split"] = table["session"].map({1: "train", 2: "dev", 3: "test1"})
    table.loc[table.index[-4:], "split"] = "blind"
    table.loc[table.index[-8:-4], "split"] = "test2"
    table.loc[table.index[-4:], ["valence", "arousal"]] = math.nan
    table.to_csv(tmp_path / "c.csv", index=False)
    more = ["--data", str(tmp_path / "c.csv"), "--data_dir", str(corpus.parent)]
    args = parse_args([*flags, *more])
    assert main(args) == 0
    assert "test2 CCC valence" in capsys.readouterr().out
    assert len(pd.read_csv(run_dir(args) / "test3.csv")) == 4
    table.loc[0, "split"] = "test"
    table.to_csv(tmp_path / "c.csv", index=False)
    assert cli([*flags, *more, "--overwrite"]) == 2
    assert "splits test and test1: rename one" in capsys.readouterr().err
