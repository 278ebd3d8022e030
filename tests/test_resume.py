"""Resume from every checkpoint there can be: after each step, and after each evaluation.

    python -m pytest tests/test_resume.py              # one rank and two, half a minute
    python -m pytest tests/test_resume.py -m slow      # six settings more, three minutes

A run is killed right after each of its saves and goes on with 0, 1 or 2 workers by turns; it must
end like one that was never killed. All that is random or remembered is in play in one setting or
another, and is asserted to be. And the data of a run that goes on must be that of its beginning.
"""

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import quick_flags, save_narrow_wavlm
from fault_kills import EVERYTHING, Run, assert_same_outcome, raise_on, real_fp16, run_ranks

from train import cli
from util.checkpoints import read_checkpoint

SETTINGS = {  # utterances of a step, flags
    "dialogues, feedback, augmentation": (8, [*EVERYTHING, "--epochs", "2"]),
    "progressive, dropout": (8, ["--unfreeze", "1:none,2:top:2,3:all", "--epochs", "3"]),
    "scaler, accumulation": (
        8, ["--amp", "fp16", "--device", "auto", "--gradient_accumulation_steps", "2", "--augment",
            "--epochs", "3", "--log_every", "4"],
    ),
    "plateau, early stopping": (  # without learning, the first epoch stays the best
        12, ["--scheduler", "plateau", "--patience", "5", "--epochs", "9", "--lr", "0",
             "--encoder_lr", "0"],
    ),
}  # fmt: skip


def prepare(setting, dies):
    """In a rank, before it starts: a scaler in play, and the kill."""
    if setting.startswith("scaler"):  # real fp16 on the CPU; a scale that overflows, and grows soon
        real_fp16(setattr, init_scale=2.0**17, growth_interval=2)
    replace = os.replace

    def replace_and_die(source, target):
        replace(source, target)
        if Path(target).name == "last.pt":
            os.kill(os.getpid(), signal.SIGKILL)

    if dies:
        os.replace = replace_and_die


def assert_in_play(setting, run):
    last = read_checkpoint(run.directory / "last.pt")
    progress, steps = last["progress"], [r for r in run.records() if r["event"] == "train"]
    if setting.startswith("scaler"):
        assert 0 < sum(step["skipped_steps"] for step in steps) < progress["step"] - 2
        assert last["scaler"]["scale"] != 2.0**17
    if setting.startswith("progressive"):  # none and top:2 read what lies below them from caches
        assert len(list((run.directory.parents[1] / "cache").glob("hidden-*"))) == 2
    if setting.startswith("plateau"):
        assert progress["lr_factor"] == 0.5 and progress["epoch"] == 6
        assert progress["stopped"] == "patience"


@pytest.mark.parametrize(
    ("setting", "workers", "ranks"),
    [
        ("dialogues, feedback, augmentation", 0, 1),
        pytest.param("scaler, accumulation", 1, 2, marks=pytest.mark.slow),
        pytest.param("plateau, early stopping", 1, 1, marks=pytest.mark.slow),
        pytest.param("progressive, dropout", 2, 1, marks=pytest.mark.slow),
        pytest.param("scaler, accumulation", 2, 1, marks=pytest.mark.slow),
        pytest.param("progressive, dropout", 0, 2, marks=pytest.mark.slow),
        pytest.param("plateau, early stopping", 1, 2, marks=pytest.mark.slow),
        pytest.param("dialogues, feedback, augmentation", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_after_every_save_ends_the_same(flags, tmp_path, setting, workers, ranks):
    size, more = SETTINGS[setting]
    size //= ranks * (2 if "--gradient_accumulation_steps" in more else 1)
    more = ["--save_every", "1", "--batch_size", str(size), "--num_workers", str(workers), *more]
    if setting.startswith("progressive"):
        deep = save_narrow_wavlm(tmp_path / "deep", 3)
        more += ["--wavlm", str(deep), "--layers", "1", "2", "3"]
    whole, killed = (
        Run([*flags, *more, "--cache_dir", str(tmp_path / name / "cache")], tmp_path / name, ranks)
        for name in ("whole", "killed")
    )
    assert run_ranks(whole.flags, whole.log, ranks, (prepare, setting, False)) == [0] * ranks
    assert_in_play(setting, whole)
    saved, codes = [], [-signal.SIGKILL]
    while codes[0] == -signal.SIGKILL and len(saved) < 50:
        again = [*killed.flags, "--resume", "--num_workers", str((workers + len(saved)) % 3)]
        codes = run_ranks(again, killed.log, ranks, (prepare, setting, True))
        progress = read_checkpoint(killed.directory / "last.pt")["progress"]
        saved.append((progress["step"], progress["epoch"]))
    assert codes == [0] * ranks, killed.console()
    last, done = saved.pop()
    in_epoch = last // done
    steps = [(step, (step - 1) // in_epoch) for step in range(1, last + 1)]
    assert saved == sorted([*steps, *((in_epoch * epoch, epoch) for epoch in range(1, done + 1))])
    assert_in_play(setting, killed)
    assert_same_outcome(whole, killed)


# --- the data has changed

TRANSFORMER = ["--encoder", "transformer", "--d_model", "64", "--num_layers", "1"]


class Place:
    """A manifest, its clips, frames and vectors in a folder that can be moved or changed, with a
    run that was stopped and the undisturbed one."""

    def __init__(self, corpus, small_wavlm, root):
        self.root, self.given = root / "here", []
        self.flags = quick_flags(corpus, small_wavlm, root)
        self.flags += ["--epochs", "1", "--save_every", "1", "--name", "run"]
        self.flags += [*TRANSFORMER, "--unfreeze", "none"]
        shutil.copytree(corpus.parent, self.root, ignore=shutil.ignore_patterns("cache"))
        rng = np.random.default_rng(0)
        for folder, shape in (("frames", (200, 96)), ("voices", (8,)), ("words", (5,))):
            (self.root / folder).mkdir()
            for path in self.root.glob("*.wav"):
                array = rng.standard_normal(shape).astype(np.float32)
                np.save(self.root / folder / f"{path.stem}.npy", array)
        self.run_dir = root / "runs/run/fold1"
        assert cli([*self.options(self.root), "--out", str(root / "whole")]) == 0
        with raise_on(r"^step +2/"):
            assert cli(self.options(self.root)) == 75
        shutil.copytree(root / "runs", root / "stopped")

    def options(self, root):
        folders = ["--features_dir", str(root / "frames"), "--speaker", str(root / "voices")]
        folders += ["--vectors", str(root / "words"), "--gates", "vectors", "none"]
        return [*self.flags, "--data", str(root / "corpus.csv"), *folders]

    def resume(self, root):
        """Exit code of the stopped run, resumed with the data in another place."""
        shutil.rmtree(self.run_dir.parents[1])
        shutil.copytree(self.run_dir.parents[2] / "stopped", self.run_dir.parents[1])
        return cli([*self.options(root), "--resume"])


@pytest.fixture(scope="module")
def place(corpus, small_wavlm, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        yield Place(corpus, small_wavlm, tmp_path_factory.mktemp("place"))


def edit(pattern, replacement):
    """In every line of the manifest that holds `pattern`."""

    def change(root):
        lines = (root / "corpus.csv").read_text().splitlines()
        lines = [replacement(line) if pattern in line else line for line in lines]
        (root / "corpus.csv").write_text("\n".join(filter(None, lines)) + "\n")

    return change


def label(line):
    return line.rpartition(",")[0] + ",0.123"


def invert(line):
    *cells, valence, arousal = line.split(",")
    return ",".join([*cells, str(round(1 - float(valence), 3)), arousal])


def backwards(root):
    samples, rate = soundfile.read(root / "s2d1t1.wav")
    soundfile.write(root / "s2d1t1.wav", samples[::-1], rate)


def reverse_frames(root):
    path = root / "frames/s1d0t0.npy"
    np.save(path, np.load(path)[::-1])


def reverse_rows(root):
    head, *lines = (root / "corpus.csv").read_text().splitlines()
    (root / "corpus.csv").write_text("\n".join([head, *lines[::-1]]) + "\n")


def add_a_row(root):
    for name in ("frames", "voices", "words"):
        shutil.copy(root / name / "s3d2t3.npy", root / name / "news3d2t3.npy")
    edit("s3d2t3,", lambda line: f"{line}\nnew{line}")(root)


def repeat_a_clip(root):
    shutil.copy(root / "s3d0t0.wav", root / "s3d0t1.wav")


def say_something_else(root):
    path = root / "words/s2d0t1.npy"
    np.save(path, np.load(path) + 1e-6)


def repeat_a_voice(root):
    shutil.copy(root / "voices/s1d0t0.npy", root / "voices/s1d0t1.npy")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit("s3d", invert), r"valence has changed: 24 .*s3d0t0, 0\.\d+ before and 0\.\d+ now"),
        (edit("s1d0t0,", label), r"arousal has changed: 1 .*s1d0t0, 0\.\d+ before and 0\.123"),
        (edit("s3d2t3,", lambda line: line.replace("3-2", "3-3")), "dialog has changed: 1 "),
        (reverse_rows, "rows are in another order"),  # which is that of the turns
        (edit("s3d2t3,", lambda line: ""), r"rows that are gone: 1 \(as s3d2t3\)"),
        (add_a_row, r"rows that are new: 1 \(as news3d2t3\)"),
        (backwards, r"whose audio has changed: 1 \(as s2d1t1\)"),
        (repeat_a_clip, r"whose audio has changed: 1 \(as s3d0t1\)"),
        (reverse_frames, r"whose features has changed: 1 \(as s1d0t0\)"),
        (say_something_else, r"whose vectors has changed: 1 \(as s2d0t1\)"),
        (repeat_a_voice, r"whose speaker vector has changed: 1 \(as s1d0t1\)"),
    ],
)
def test_a_run_does_not_go_on_with_other_data_and_says_what_differs(
    place, tmp_path, capsys, change, said
):
    there = tmp_path / "there"
    shutil.copytree(place.root, there)
    change(there)
    assert place.resume(there) == 2
    line = capsys.readouterr().err
    assert "--resume: the data differs from that of the interrupted run: " in line
    assert re.search(said, line) and line.count("\n") == 1, line


def test_data_that_was_only_moved_goes_on_to_the_same_end(place, tmp_path):
    there = tmp_path / "there"
    for name in ("", "frames", "voices", "words"):  # other times of change, too
        (there / name).mkdir()
        for path in (place.root / name).iterdir():
            if path.is_file():
                shutil.copyfile(path, there / name / path.name)
    assert place.resume(there) == 0
    names = ("predictions_dev.csv", "predictions_test.csv")
    whole = place.run_dir.parents[2] / "whole/run/fold1"
    for name in names:
        assert (place.run_dir / name).read_bytes() == (whole / name).read_bytes()
