"""Hints on what is wrong with a run."""

import json
import time

import pytest
from helpers import Run, raise_on
from torch.utils.data import DataLoader

WAITING = "of the time is spent waiting for data"


def hints_of(run, waits=False):
    """Hints in train.log; on a busy machine any run may wait for data."""
    lines = run.train_log().splitlines()
    found = [line.removeprefix("hint | ") for line in lines if line.startswith("hint | ")]
    return [hint for hint in found if waits or WAITING not in hint]


def test_a_run_without_trouble_has_no_hint(flags, tmp_path):
    run = Run(flags, tmp_path)
    assert run.train() == 0 and hints_of(run) == []


def test_waiting_for_data_is_told_once_with_its_remedy(flags, tmp_path, monkeypatch):
    batches_of = DataLoader.__iter__

    def slowly(loader):
        for batch in batches_of(loader):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(DataLoader, "__iter__", slowly)
    run = Run([*flags, "--epochs", "1"], tmp_path)
    assert run.train() == 0
    [hint] = hints_of(run, waits=True)
    assert WAITING in hint and "raise --num_workers (0)" in hint


@pytest.mark.parametrize(
    ("still", "losses", "cccs", "said"),
    [
        (True, [], [], "dev CCC has been flat for 4 evaluations"),
        (True, [], [0.9, 0.8, 0.7, 0.6], "dev CCC has been falling for 4 evaluations, from 0.9"),
        (False, [0.1] * 6 + [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [], "the loss diverges, it has risen"),
    ],
)
def test_a_resumed_run_remembers_what_it_was_about_to_tell(
    flags, tmp_path, still, losses, cccs, said
):
    """With other figures in its metrics.jsonl: no small run gets worse for certain."""
    rates = ["--lr", "0", "--encoder_lr", "0"] if still else []
    run = Run([*flags, *rates, "--epochs", "8"], tmp_path)
    with raise_on(r"^step +12/"):  # the fourth evaluation is left
        assert run.train() == 75
    assert hints_of(run) == []
    records = run.records()
    for event, key, values in (
        ("train", "loss", losses),
        ("dev", "dev/ccc_valence", cccs),
        ("dev", "dev/ccc_arousal", cccs),
    ):
        found = [record for record in records if record["event"] == event]
        for record, value in zip(found, values):
            record[key] = value
    lines = [json.dumps(record) + "\n" for record in records]
    (run.directory / "metrics.jsonl").write_text("".join(lines))
    assert run.train("--resume") == 0
    assert any(hint.startswith(said) for hint in hints_of(run)), hints_of(run)
