"""SIGKILL at random moments: the resumed run ends with the files of one that was never killed.

    python -m pytest tests/fault_kills.py -m slow -s

`-s` shows the counts.
"""

import random
import time

import pytest
from helpers import EVERYTHING, Run, assert_same_outcome


def kill_and_compare(flags, directory, ranks, kills, rng, method="fork"):
    """(kills, of them within a save, starts, runs): of three kills, one comes early in the start,
    one at any time of the run's own, one as a save begins. A run that gets to its end before its
    kill is followed by another; each must end like one that was never killed.
    """
    whole = Run(flags, directory / "whole", ranks, method)
    assert whole.start().until(whole.status)
    begin = time.monotonic()
    assert whole.wait() == 0, whole.console()
    seconds = time.monotonic() - begin
    done = saves = starts = runs = 0
    while done < kills:
        runs += 1
        run = Run(flags, directory / f"killed{runs}", ranks, method)

        def saving(run=run):
            """Is a last.pt being written?"""
            return any(run.directory.glob(".last.pt.*.aside"))

        while done < kills and not (run.directory / "result.json").exists():
            before = run.status().get("time")
            run.start("--resume")
            starts += 1
            if done % 3 == 0:
                time.sleep(rng.uniform(0, 1))
            elif done % 3 == 1:
                run.until(lambda before=before: run.status().get("time") != before)  # noqa: B023
                time.sleep(rng.uniform(0, seconds))
            else:
                run.until(saving)
            if run.poll() is None:
                run.kill()
                done += 1
                saves += saving()
        assert run.start("--resume").wait() == 0, run.console()
        assert_same_outcome(whole, run)
    return done, saves, starts, runs


SETTINGS = {  # ranks, kills, flags
    "dialogues, plateau": (1, 8, [*EVERYTHING, "--scheduler", "plateau", "--save_every", "1"]),
    "progressive, 1 worker": (
        1, 8, ["--unfreeze", "1:none,2:top:1,3:all", "--num_workers", "1", "--patience", "3"],
    ),
    "accumulated bf16, 2 workers": (
        1, 8, ["--amp", "bf16", "--batch_size", "4", "--gradient_accumulation_steps", "2",
               "--num_workers", "2", "--augment", "--save_every", "2", "--log_every", "4"],
    ),
    "two ranks": (2, 6, [*EVERYTHING, "--batch_size", "4", "--save_every", "1"]),
    "two ranks, 2 workers": (
        2, 6, ["--batch_size", "4", "--num_workers", "2", "--augment", "--amp", "bf16",
               "--unfreeze", "1:top:1,3:all", "--scheduler", "plateau", "--save_every", "2"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "method"),
    [*((setting, "fork") for setting in SETTINGS), ("progressive, 1 worker", "forkserver")],
)
def test_a_killed_run_ends_like_one_that_was_never_killed(flags, tmp_path, setting, method):
    ranks, kills, more = SETTINGS[setting]
    flags = [*flags, "--epochs", "4", *more]
    rng = random.Random(setting)
    counts = kill_and_compare(flags, tmp_path, ranks, kills, rng, method)
    done, saves, starts, runs = counts
    print(f"{setting}, {method}: {done} kills, {saves} within a save, {starts} starts, {runs} runs")
