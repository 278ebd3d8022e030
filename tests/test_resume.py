"""Resume from every checkpoint there can be: after each step, and after each evaluation.

    python -m pytest tests/test_resume.py              # one rank and two, half a minute
    python -m pytest tests/test_resume.py -m slow      # six settings more, three minutes

A run is killed right after each of its saves and goes on with 0, 1 or 2 workers by turns; it must
end like one that was never killed. All that is random or remembered is in play in one setting or
another, and is asserted to be.
"""

import os
import signal
from pathlib import Path

import pytest
from fault_kills import EVERYTHING, Run, assert_same_outcome, real_fp16, run_ranks

from util.runs import read_checkpoint

SETTINGS = {  # utterances of a step, flags
    "dialogues, feedback, augmentation": (12, [*EVERYTHING, "--epochs", "2"]),
    "progressive, dropout": (8, ["--unfreeze", "1:none,2:top:1,3:all", "--epochs", "3"]),
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
    whole, killed = (Run([*flags, *more], tmp_path / name, ranks) for name in ("whole", "killed"))
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
    assert_same_outcome(whole, killed)
