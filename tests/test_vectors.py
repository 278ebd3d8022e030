"""--vectors and --gates: what a run learns, predicts, refuses, resumes and plans."""

import json
import re

import numpy as np
import pytest
from conftest import quick_flags
from helpers import Run, assert_same_outcome, run_ranks
from test_predict import predicted, rows, streamed, values
from test_resume import prepare

import memory
import predict
from train import cli, main, parse_args
from util.checkpoints import read_checkpoint
from util.files import UserError
from util.runs import run_dir

WIDTHS = {"one": 20, "two": 30}


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """Two directories of vectors that know valence and arousal, and have a constant."""
    root, rng = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0)
    for folder, label in (("one", "valence"), ("two", "arousal")):
        (root / folder).mkdir()
        for row in rows(corpus):
            copies = float(row[label]) + 0.02 * rng.standard_normal(WIDTHS[folder] - 1)
            np.save(root / folder / f"{row['utt_id']}.npy", np.r_[100 + 9 * copies, 7])
    return root


def given(folders, *names):
    return [word for name in names for word in ("--vectors", str(folders / name))]


@pytest.fixture(scope="module")
def trained(corpus, small_wavlm, folders, tmp_path_factory):
    """(flags, directory) of a run with all of it; no test changes it."""
    flags = quick_flags(corpus, small_wavlm, tmp_path_factory.mktemp("trained"))
    flags += [*given(folders, "one", "two"), "--gates", "vectors", "none", "--pooling", "stats"]
    flags += ["--lr", "1e-2", "--encoder_lr", "0", "--unfreeze", "none", "--epochs", "12"]
    assert main(parse_args(flags)) == 0
    return flags, run_dir(parse_args(flags))


def test_what_vectors_know_is_learned_and_standardised_on_train_alone(trained, folders):
    directory = trained[1]
    test = json.loads((directory / "result.json").read_text())["test"]
    assert min(test["ccc_valence"], test["ccc_arousal"]) > 0.8
    train = json.loads((directory / "splits.json").read_text())["train"]
    side_by_side = np.hstack(
        [[np.load(folders / name / f"{utt_id}.npy") for utt_id in train] for name in WIDTHS]
    )
    weights = read_checkpoint(directory / "best.pt")["model"]
    np.testing.assert_allclose(weights["vectors.mean"], np.mean(side_by_side, 0), rtol=1e-4)
    expected = np.std(side_by_side, 0)
    expected[[19, 49]] = 1  # constants keep their unit
    np.testing.assert_allclose(weights["vectors.std"], expected, rtol=1e-3)


def test_predict_needs_the_vectors_of_the_run_and_gives_its_numbers(
    trained, folders, corpus, tmp_path, capsys, monkeypatch
):
    _, directory = trained
    expected = rows(directory / "predictions_test.csv")
    files = [corpus.parent / f"{row['utt_id']}.wav" for row in expected]
    both = given(folders, "one", "two")
    run = ["--checkpoint", directory]
    got = predicted([*run, *both, *files], tmp_path / "out.csv")
    np.testing.assert_allclose(values(got), values(expected), atol=1e-3)  # from a float16 cache
    windows = predicted([*run, *both, *files[:2], "--window", "9"], tmp_path / "windows.csv")
    np.testing.assert_allclose(values(windows), values(got[:2]), atol=1.1e-6)
    lines, _ = streamed([*run, *both, *files[:2]], capsys, monkeypatch)
    np.testing.assert_allclose(values(lines), values(got[:2]), atol=1.1e-6)
    predict.main(predict.parse_args([*map(str, run), "--export", str(tmp_path / "export")]))
    assert "vectors of widths 20, 30" in (tmp_path / "export/README.md").read_text()
    again = ["--checkpoint", tmp_path / "export", *both, *files]
    assert values(predicted(again, tmp_path / "again.csv")).tolist() == values(got).tolist()
    (tmp_path / "new.wav").write_bytes(files[0].read_bytes())
    (tmp_path / f"{files[0].stem}.wav").write_bytes(files[1].read_bytes())
    for wrong, said in (
        ([files[0]], r"reads vectors of widths 20, 30: give --vectors DIR .*text\.py makes"),
        ([*both[:2], files[0]], r"--vectors: widths \(20,\), .* trained on \(20, 30\)"),
        ([*both[2:], *both[:2], files[0]], r"--vectors: widths \(30, 20\)"),
        ([*both, tmp_path / "new.wav"], r"1 of 1 missing \(new\.npy\); text\.py makes"),
        ([*both, files[0], tmp_path / files[0].name], r"\.npy could belong to .* and .*rename"),
    ):
        with pytest.raises(UserError, match=said):
            predicted([*run, *wrong], tmp_path / "none.csv")


def test_a_run_without_vectors_refuses_them_in_predict_and_in_init_from(
    finished, flags, folders, corpus, tmp_path, capsys
):
    clip, one = corpus.parent / "s1d0t0.wav", given(folders, "one")
    with pytest.raises(UserError, match=r"--vectors .*: the run was trained without such input"):
        predicted(["--checkpoint", finished[1], *one, clip], tmp_path / "out.csv")
    assert cli([*flags, "--init_from", str(finished[1]), *one]) == 2
    assert "reads vectors of widths (), not (20,)" in capsys.readouterr().err


def test_a_model_that_starts_from_another_takes_its_vectors_from_the_flags_or_from_it(
    trained, flags, folders
):
    more = ["--init_from", str(trained[1]), "--epochs", "1", "--unfreeze", "none", "--lr", "0"]
    flags = [word for word in flags if word not in ("--prosody", "none")]
    scores, both = [], given(folders, "one", "two")
    for name, vectors in (("its", []), ("given", both)):
        args = parse_args([*flags, *more, *vectors, "--name", name])
        assert args.vectors == both[1::2]
        assert main(args) == 0
        scores.append(json.loads((run_dir(args) / "result.json").read_text())["test"])
    assert scores[0] == scores[1] and scores[0]["ccc_mean"] > 0.8
    with pytest.raises(SystemExit):
        parse_args([*flags, *more, "--gates", "none", "none"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"--vectors \S+: 1 of 72 missing \(s2d1t1\.npy\); text\.py makes such files"),
        ([1, 1e300, 0], r"s2d1t1\.npy: holds NaN or infinite values"),  # in float32
        ([1, 2, 3, 4], r"s2d1t1\.npy: width 4, but the first file has 3"),
        ([[1, 2, 3]], r"s2d1t1\.npy: int64 \(1, 3\), expected numbers \(D,\)"),
    ],
    ids=str,
)
def test_a_wrong_vector_file_is_named_in_one_line(flags, corpus, tmp_path, content, said, capsys):
    for row in rows(corpus):
        np.save(tmp_path / f"{row['utt_id']}.npy", np.ones(3))
    (tmp_path / "s2d1t1.npy").unlink()
    if content is not None:
        np.save(tmp_path / "s2d1t1.npy", np.array(content))
    assert cli([*flags, "--vectors", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert re.search(said, line) and line.count("\n") == 1, line


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (["speech"], "--gates speech: give one for each of valence arousal"),
        (["prosody", "none"], "--gates prosody none: the inputs are speech:"),
        (["speech", "vectors"], "give --prosody egemaps or --vectors DIR"),
        (["speech", "text"], "invalid choice: 'text'"),
        (["vectors", "none", "--vectors", "nowhere"], "--vectors nowhere: no such directory"),
    ],
)
def test_gates_that_do_not_fit_the_model_are_refused(flags, gates, said, capsys):
    with pytest.raises(SystemExit):
        parse_args([*flags, "--gates", *gates])
    assert said in capsys.readouterr().err


def test_memory_plans_the_vectors_of_the_first_files(folders, tmp_path):
    words = ["--wavlm", "tiny", "--device", "cpu", "--prosody", "none", "--batch_size", "4"]

    def parameters(*more):
        args, _ = memory.parse_args([*words, *more])
        planner = memory.Planner(args, memory.shape_of(args))
        assert planner.plan(args).peak_gib > 0
        return sum(p.numel() for p in planner.model.parameters())

    # read by two gates, two nets and the updater, each 256 wide
    extra = parameters(*given(folders, "one", "two")) - parameters()
    assert extra == 50 * 256 * 5
    (tmp_path / "v").mkdir()
    with pytest.raises(UserError, match=r"--vectors .*: no <utt_id>\.npy in one of them"):
        parameters("--vectors", str(tmp_path / "v"))


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_end_as_two_that_were_not_and_as_one(trained, tmp_path):
    flags = [*trained[0], "--epochs", "2", "--save_every", "1", "--context", "2", "--dropout", "0"]
    flags += ["--unfreeze", "top:1", "--feature_cache", "exact", "--encoder_lr", "1e-3"]
    flags += ["--wavlm_dropout", "0", "--gradient_accumulation_steps", "2", "--batch_size"]
    one = Run([*flags, "8"], tmp_path / "one")
    whole, killed = (Run([*flags, "4"], tmp_path / name, 2) for name in ("whole", "killed"))
    assert run_ranks(one.flags, one.log, 1) == [0]
    assert run_ranks(whole.flags, whole.log, 2) == [0, 0]
    again = [*killed.flags, "--resume"]
    assert 0 not in run_ranks(again, killed.log, 2, (prepare, "", True))  # dies after a save
    assert run_ranks(again, killed.log, 2) == [0, 0], killed.console()
    assert_same_outcome(whole, killed)
    for ours, theirs in zip(one.records(), whole.records(), strict=True):
        for key in ours.keys() & {"loss", "dev/ccc_mean", "test/ccc_mean"}:
            assert ours[key] == pytest.approx(theirs[key], abs=2e-4), key
