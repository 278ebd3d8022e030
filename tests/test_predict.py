"""predict.py: the numbers of the run's own test split, files and manifests, ensembles, errors."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import predict
import train
from data import DataError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def trained(flags):
    """Run directory of a quick run, and its flags."""
    args = train.parse_args([*flags, "--epochs", "1", "--prosody", "egemaps"])
    assert train.main(args) == 0
    return train.run_dir(args)


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def predicted(argv, out):
    predict.main(predict.parse_args([*map(str, argv), "--out", str(out)]))
    return rows(out)


def test_files_get_the_predictions_that_training_wrote_for_its_test_split(
    trained, corpus, tmp_path
):
    expected = rows(trained / "predictions_test.csv")
    files = [corpus.parent / f"{row['utt_id']}.wav" for row in expected]
    got = predicted(["--checkpoint", trained, *files], tmp_path / "out.csv")
    assert [Path(row["utt_id"]).stem for row in got] == [row["utt_id"] for row in expected]
    for one, two in zip(got, expected):
        for column in ("pred_valence", "pred_arousal"):
            assert float(one[column]) == pytest.approx(float(two[column]), abs=1e-4)


def test_a_manifest_without_labels_tracks_the_turns_of_its_dialogues(flags, corpus, tmp_path):
    args = train.parse_args([*flags, "--epochs", "1", "--context", "4", "--feedback"])
    assert train.main(args) == 0
    expected = {r["utt_id"]: r for r in rows(train.run_dir(args) / "predictions_test.csv")}
    manifest = corpus.parent / "unlabelled.csv"
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, ["utt_id", "path", "dialog"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(r for r in rows(corpus) if r["utt_id"] in expected)
    checkpoint = ["--checkpoint", train.run_dir(args), "--data", manifest]
    got = predicted(checkpoint, tmp_path / "out.csv")
    assert len(got) == len(expected) == 24
    for row in got:
        assert float(row["pred_arousal"]) == pytest.approx(
            float(expected[row["utt_id"]]["pred_arousal"]), abs=1e-4
        )


def test_two_checkpoints_give_their_mean_and_spread(flags, corpus, tmp_path):
    runs = []
    for seed in ("1", "2"):
        args = train.parse_args([*flags, "--epochs", "1", "--seed", seed, "--name", seed])
        assert train.main(args) == 0
        runs.append(train.run_dir(args))
    clip = corpus.parent / "s1d0t0.wav"
    single = [predicted(["--checkpoint", run, clip], tmp_path / "1.csv")[0] for run in runs]
    each = [flag for run in runs for flag in ("--checkpoint", run)]
    both = predicted([*each, clip], tmp_path / "2.csv")[0]
    values = [float(row["pred_valence"]) for row in single]
    assert float(both["pred_valence"]) == pytest.approx(np.mean(values), abs=2e-6)
    assert float(both["std_valence"]) == pytest.approx(np.std(values, ddof=1), abs=2e-6)


def test_folders_are_searched_and_what_cannot_be_decoded_is_named(trained, tmp_path, capsys):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 0.1, 44_100)
    soundfile.write(folder / "a b'c.flac", noise, 44_100)
    (folder / "broken.wav").write_bytes(b"RIFF nonsense")
    (folder / "notes.txt").write_text("no audio")
    got = predicted(["--checkpoint", trained, tmp_path / "in"], tmp_path / "out.csv")
    assert [Path(row["utt_id"]).name for row in got] == ["a b'c.flac"]
    assert "broken.wav" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--checkpoint", "RUN", "nowhere.wav"], "nowhere.wav"),
        (["--checkpoint", "nowhere", "CLIP"], "--checkpoint nowhere.*: No such file"),
        (["--checkpoint", "CLIP", "CLIP"], "not a best.pt"),
    ],
)
def test_wrong_input_is_named(trained, corpus, tmp_path, argv, said):
    words = {"RUN": str(trained), "CLIP": str(corpus.parent / "s1d0t0.wav")}
    with pytest.raises(DataError, match=said):
        predicted([words.get(word, word) for word in argv], tmp_path / "out.csv")


def test_the_command_line_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "predict.py", "--checkpoint", "x", "y.wav", "--out", "z.csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "y.wav" in done.stderr
