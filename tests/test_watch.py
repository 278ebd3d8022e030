"""Hints: each is provoked in a real run on the CPU."""

import csv
import time

from fault_kills import raise_on, real_fp16
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
    hints = [line.removeprefix("hint | ") for line in lines if line.startswith("hint | ")]
    return [hint for hint in hints if waits or WAITING not in hint]


def only(hints):
    assert len(hints) == 1, hints
    return hints[0]


def test_a_run_without_trouble_has_no_hint(flags):
    assert hints_of(flags) == []


def test_waiting_for_data(flags, monkeypatch):
    batches_of = DataLoader.__iter__

    def slowly(loader):
        for batch in batches_of(loader):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(DataLoader, "__iter__", slowly)
    hint = only(hints_of(flags, waits=True))
    assert WAITING in hint and "raise --num_workers (0)" in hint


def test_padding(flags, corpus, tmp_path):
    with open(corpus, newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):  # turns so short that no second pass of the encoder pays
        row |= {"path": str(corpus.parent / row["path"]), "start": 0, "end": 0.05 if i % 2 else 0.3}
    with open(tmp_path / "mixed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    flags = [*flags, "--data", str(tmp_path / "mixed.csv"), "--data_dir", str(corpus.parent)]
    hint = only(hints_of([*flags, "--context", "4"]))
    assert "of the batches is padding (--context mixes lengths): lower --max_seconds" in hint


def test_a_scaler_that_skips(flags, monkeypatch):
    real_fp16(monkeypatch.setattr, init_scale=2.0**127, backoff_factor=0.999)
    hint = only(hints_of([*flags, "--amp", "fp16", "--device", "auto"]))
    assert hint.startswith("GradScaler skipped 1 of the last 1 steps") and "--amp bf16" in hint


def test_a_loss_that_diverges(flags):
    wild = ["--loss", "mse", "--lr", "1", "--scheduler", "none", "--warmup", "1"]
    hints = hints_of([*flags, *wild, "--max_grad_norm", "0", "--epochs", "6"])
    assert any("the loss diverges, it has risen from" in hint for hint in hints), hints


def test_a_flat_dev_ccc(flags):
    hint = only(hints_of([*flags, "--lr", "0", "--encoder_lr", "0", "--epochs", "8"]))
    assert hint.startswith("dev CCC has been flat for 5 evaluations")
    assert hint.endswith("raise --encoder_lr (0) or unfreeze more")


def test_a_falling_dev_ccc():
    """Of records as metrics.jsonl has them: no small run falls for certain."""
    args = parse_args(["--unfreeze", "none"])
    history = [
        {"event": "dev", "epoch": epoch, "dev/ccc_mean": ccc}
        for epoch, ccc in enumerate((0.5, 0.4, 0.3, 0.2), start=1)
    ]
    assert list(hints(args, history[:3])) == []
    ((_, text),) = hints(args, history)
    assert text.startswith("dev CCC has fallen 3 times in a row, from 0.5000 to 0.2000: lower --lr")


def test_a_resumed_run_remembers(flags):
    frozen = [*flags, "--lr", "0", "--encoder_lr", "0", "--epochs", "8"]
    with raise_on(r"^epoch +3 . dev"):
        assert main(parse_args(frozen)) == 75
    assert "dev CCC has been flat for 5 evaluations" in only(hints_of([*frozen, "--resume"]))
