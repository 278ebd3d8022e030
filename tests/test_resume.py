"""Resume from every checkpoint there can be: after each step, and after each evaluation.

    python -m pytest tests/test_resume.py              # one rank, half a minute
    python -m pytest tests/test_resume.py -m slow      # four settings more, two minutes

A run is killed right after each of its saves and goes on with 0, 1 or 2 workers by turns; it must
end like one that was never killed. All that is random or remembered is in play in one setting or
another, and is asserted to be. And the data of a run that goes on must be that of its beginning.
"""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import quick_flags, save_narrow_wavlm
from helpers import EVERYTHING, Run, assert_same_outcome, raise_on, real_fp16, write_arrays

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
    last = run.checkpoint()
    progress = last["progress"]
    if setting.startswith("scaler"):
        skipped = sum(record["skipped_steps"] for record in run.records("train"))
        assert 0 < skipped < progress["step"] - 2
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
        pytest.param("dialogues, feedback, augmentation", 2, 2, marks=pytest.mark.slow),
        pytest.param("scaler, accumulation", 1, 2, marks=pytest.mark.slow),
        pytest.param("plateau, early stopping", 1, 1, marks=pytest.mark.slow),
        pytest.param("progressive, dropout", 0, 2, marks=pytest.mark.slow),
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
    assert whole.in_ranks(fault=(prepare, setting, False)) == [0] * ranks
    assert_in_play(setting, whole)
    saved, codes = [], [-signal.SIGKILL]
    while codes[0] == -signal.SIGKILL and len(saved) < 50:
        again = ["--resume", "--num_workers", str((workers + len(saved)) % 3)]
        codes = killed.in_ranks(*again, fault=(prepare, setting, True))
        progress = killed.checkpoint()["progress"]
        saved.append((progress["step"], progress["epoch"]))
    assert codes == [0] * ranks, killed.console()
    last, done = saved.pop()
    in_epoch = last // done
    steps = [(step, (step - 1) // in_epoch) for step in range(1, last + 1)]
    assert saved == sorted([*steps, *((in_epoch * epoch, epoch) for epoch in range(1, done + 1))])
    assert_in_play(setting, killed)
    assert_same_outcome(whole, killed)


def test_a_run_stopped_before_its_test_is_tested_from_the_same_cache(flags, tmp_path):
    whole, stopped = (
        Run([*flags, "--unfreeze", "none"], tmp_path / name) for name in ("whole", "stopped")
    )
    assert whole.train() == 0
    with raise_on(r"^best epoch .* dev CCC"):
        assert stopped.train() == 75
    assert stopped.train("--resume") == 0
    assert_same_outcome(whole, stopped)


# --- the data has changed


class Place:
    """A manifest, its clips, frames and vectors in a folder that can be moved or changed, with a
    run that was stopped and the undisturbed one."""

    def __init__(self, corpus, small_wavlm, folder):
        self.root, self.folder = folder / "here", folder
        flags = quick_flags(corpus, small_wavlm, folder)
        flags += ["--epochs", "1", "--save_every", "1", "--unfreeze", "none"]
        self.flags = [*flags, "--encoder", "transformer", "--d_model", "64", "--num_layers", "1"]
        shutil.copytree(corpus.parent, self.root, ignore=shutil.ignore_patterns("cache"))
        for name, shape in (("frames", (200, 96)), ("voices", (8,)), ("words", (5,))):
            write_arrays(self.root / name, *shape)
        self.whole = self.run(self.root, folder / "whole")
        assert self.whole.train() == 0
        with raise_on(r"^step +2/"):
            assert self.run(self.root, folder / "stopped").train() == 75

    def run(self, root, directory):
        """A Run on the data in `root`."""
        data = ["--data", str(root / "corpus.csv"), "--features_dir", str(root / "frames")]
        data += ["--speaker", str(root / "voices"), "--vectors", str(root / "words")]
        return Run([*self.flags, *data, "--gates", "vectors", "none"], directory)

    def stopped_run(self, root, directory):
        """The stopped run, with its data in another place."""
        shutil.copytree(self.folder / "stopped", directory)
        return self.run(root, directory)


@pytest.fixture(scope="module")
def place(corpus, small_wavlm, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        yield Place(corpus, small_wavlm, tmp_path_factory.mktemp("place"))


def edit(change):
    """The manifest's table becomes change(table)."""

    def apply(root):
        table = pd.read_csv(root / "corpus.csv")
        change(table).to_csv(root / "corpus.csv", index=False)

    return apply


def cell(utt_id, column, value):
    return edit(lambda t: t.assign(**{column: t[column].where(t["utt_id"] != utt_id, value)}))


def array(path, change):
    return lambda root: np.save(root / path, change(np.load(root / path)))


def copy(source, target):
    return lambda root: shutil.copy(root / source, root / target)


def backwards(root):
    samples, rate = soundfile.read(root / "s2d1t1.wav")
    soundfile.write(root / "s2d1t1.wav", samples[::-1], rate)


def add_a_row(root):
    for name in ("frames", "voices", "words"):
        copy(f"{name}/s3d2t3.npy", f"{name}/new.npy")(root)
    edit(lambda t: pd.concat([t, t[t["utt_id"] == "s3d2t3"].assign(utt_id="new")]))(root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit(lambda t: t.assign(valence=1 - t["valence"])), "valence has changed: 72 (as s3d0t0,"),
        (cell("s1d0t0", "arousal", 0.123), "arousal has changed: 1 (as s1d0t0, 0."),
        (cell("s3d2t3", "dialog", "3-3"), "dialog has changed: 1 "),
        (edit(lambda t: t[::-1]), "rows are in another order"),  # which is that of the turns
        (edit(lambda t: t[t["utt_id"] != "s3d2t3"]), "rows that are gone: 1 (as s3d2t3)"),
        (add_a_row, "rows that are new: 1 (as new)"),
        (backwards, "audio has changed: 1 (as s2d1t1)"),
        (copy("s3d0t0.wav", "s3d0t1.wav"), "audio has changed: 1 (as s3d0t1)"),
        (array("frames/s1d0t0.npy", lambda x: x[::-1]), "features has changed: 1 (as s1d0t0)"),
        (array("words/s2d0t1.npy", lambda x: x + 1e-6), "vectors has changed: 1 (as s2d0t1)"),
        (copy("voices/s1d0t0.npy", "voices/s1d0t1.npy"), "speaker vector has changed: 1 (as s1d0"),
    ],
)
def test_a_run_does_not_go_on_with_other_data_and_says_what_differs(
    place, tmp_path, capsys, change, said
):
    there = tmp_path / "there"
    shutil.copytree(place.root, there)
    change(there)
    assert place.stopped_run(there, tmp_path / "runs").train("--resume") == 2
    line = capsys.readouterr().err
    assert "--resume: the data differs from that of the interrupted run: " in line
    assert said in line and line.count("\n") == 1, line


def test_data_that_was_only_moved_goes_on_to_the_same_end(place, tmp_path):
    there = tmp_path / "there"
    for name in ("", "frames", "voices", "words"):  # other times of change, too
        (there / name).mkdir()
        for path in (place.root / name).iterdir():
            if path.is_file():
                shutil.copyfile(path, there / name / path.name)
    run = place.stopped_run(there, tmp_path / "runs")
    assert run.train("--resume") == 0
    assert_same_outcome(run, place.whole)
