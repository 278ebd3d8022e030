"""Hints on what is wrong with a run."""

import time

import pytest
from helpers import raise_on
from torch.utils.data import DataLoader

from train import main, parse_args
from util.log import hints
from util.runs import run_dir

WAITING = "of the time is spent waiting for data"


def hints_of(flags, waits=False):
    """Hints in train.log of a run with these flags; on a busy machine any run may wait for data."""
    args = parse_args(flags)
    assert main(args) == 0
    lines = (run_dir(args) / "train.log").read_text().splitlines()
    found = [line.removeprefix("hint | ") for line in lines if line.startswith("hint | ")]
    return [hint for hint in found if waits or WAITING not in hint]


def test_a_run_without_trouble_has_no_hint(flags):
    assert hints_of(flags) == []


def test_waiting_for_data_is_told_once_with_its_remedy(flags, monkeypatch):
    batches_of = DataLoader.__iter__

    def slowly(loader):
        for batch in batches_of(loader):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(DataLoader, "__iter__", slowly)
    [hint] = hints_of([*flags, "--epochs", "1"], waits=True)
    assert WAITING in hint and "raise --num_workers (0)" in hint


def test_a_resumed_run_remembers_what_it_was_about_to_tell(flags):
    frozen = [*flags, "--lr", "0", "--encoder_lr", "0", "--epochs", "8"]
    with raise_on(r"^epoch +3 . dev"):
        assert main(parse_args(frozen)) == 75
    [hint] = hints_of([*frozen, "--resume"])
    assert hint.startswith("dev CCC has been flat for 4 evaluations")


FALLING = [
    {"event": "dev", "epoch": epoch, "dev/ccc_mean": ccc}
    for epoch, ccc in enumerate((0.5, 0.45, 0.4, 0.3, 0.2), start=1)
]
RISING = [{"event": "train", "epoch": 1.0, "loss": 0.5 + 0.05 * max(0, i - 3)} for i in range(11)]


@pytest.mark.parametrize(
    ("history", "text"),
    [
        (FALLING, "dev CCC has been falling for 4 evaluations, from 0.5000 to 0.2000: change"),
        (RISING, "the loss diverges, it has risen from 0.51 to 0.75: lower --lr and --encoder_lr"),
    ],
)
def test_what_gets_worse_is_told_as_soon_as_it_is_certain(history, text):
    """Of records as metrics.jsonl has them: no small run falls for certain."""
    args = parse_args(["--unfreeze", "none"])
    assert hints(args, history[:3]) == {}
    [found] = hints(args, history).values()
    assert found.startswith(text)
