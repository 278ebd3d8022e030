"""Hints: each is provoked in a real run, on the CPU; those about a GPU with a stand-in for it."""

import csv
import dataclasses
import os
import signal
import time

import pytest
import torch

import memory
import train
from data import Batches
from train import main, parse_args
from util import log as watch
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
    read = Batches.__getitem__

    def slowly(self, spec):
        time.sleep(0.2)
        return read(self, spec)

    monkeypatch.setattr(Batches, "__getitem__", slowly)
    hint = only(hints_of(flags, waits=True))
    assert int(hint.split("%")[0]) > 50 and WAITING in hint and "raise --num_workers (0)" in hint


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
    real = torch.amp.GradScaler
    scalers = iter([real("cpu", init_scale=2.0**127, backoff_factor=0.999)])  # the run's; others
    monkeypatch.setattr(  # are those of the memory plan
        torch.amp, "GradScaler", lambda *a, **k: next(scalers, None) or real(*a, **k)
    )
    hint = only(hints_of([*flags, "--mse_weight", "1000"]))
    assert hint.startswith("GradScaler skipped 1 of the last 1 steps") and "--amp bf16" in hint


def test_a_loss_that_diverges(flags):
    wild = ["--loss", "mse", "--lr", "1", "--scheduler", "none", "--warmup", "1"]
    hints = hints_of([*flags, *wild, "--max_grad_norm", "0", "--epochs", "6"])
    assert any("the loss diverges, it has risen from" in hint for hint in hints), hints


def test_a_flat_dev_ccc(flags):
    hint = only(hints_of([*flags, "--lr", "0", "--encoder_lr", "0", "--epochs", "8"]))
    assert hint.startswith("dev CCC has been flat for 5 evaluations")
    assert hint.endswith("raise --encoder_lr (0) or unfreeze more")


def test_a_falling_dev_ccc(flags, monkeypatch):
    metrics, falling = train.metrics, iter((0.5, 0.4, 0.3, 0.2, 0.1, 0.1))

    def worse(preds, labels, scale):
        return metrics(preds, labels, scale=scale) | {"ccc_mean": next(falling)}

    monkeypatch.setattr(train, "metrics", worse)
    hint = only(hints_of([*flags, "--epochs", "4", "--unfreeze", "none"]))
    assert hint.startswith("dev CCC has fallen 3 times in a row, from 0.5000 to 0.2000: lower --lr")


def test_a_resumed_run_remembers(flags, monkeypatch):
    frozen = [*flags, "--lr", "0", "--encoder_lr", "0", "--epochs", "8"]
    update_state, evaluations = train.update_state, []

    def stopping(*args):
        evaluations.append(args)
        if len(evaluations) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update_state(*args)

    monkeypatch.setattr(train, "update_state", stopping)
    assert main(parse_args(frozen)) == 75
    assert "dev CCC has been flat for 5 evaluations" in only(hints_of([*frozen, "--resume"]))


@pytest.fixture
def gpu_hints(monkeypatch):
    """Feeds five log lines of a GPU of 24 GiB that computes for `busy` of the time."""

    def hints(busy, caplog, **record):
        args = parse_args(["--wavlm", "tiny", "--unfreeze", "all", "--amp", "fp16"])
        monkeypatch.setattr(watch, "gpu_busy_share", lambda _: busy)
        monkeypatch.setattr(memory, "capacity_gib", lambda _: 24.0)
        monkeypatch.setattr(watch.log, "propagate", True)
        hints = watch.Hints(args, torch.device("cuda"), [], ((0, 0), 12.0, 1, 300))
        line = {"event": "train", "loss": 0.5, "skipped_steps": 0, "ms_per_step": 100.0}
        caplog.clear()
        for _ in range(6):
            hints.after_steps({**line, "data_share": 0.0, "padded_share": 0.1, **record})
        return list(dict.fromkeys(entry.getMessage() for entry in caplog.records))

    return hints


def test_an_idle_gpu_and_an_empty_card(gpu_hints, caplog):
    idle, empty = gpu_hints(0.3, caplog, peak_gib=2.0)
    assert idle == "hint | the GPU computes 30% of the time: raise --batch_size"
    size = int(empty.split("--batch_size ")[1].split()[0])
    assert empty.startswith("hint | 2.0 of 24.0 GiB are used") and 8 < size <= 300
    assert gpu_hints(0.9, caplog, peak_gib=20.0) == []
    waiting = gpu_hints(0.3, caplog, peak_gib=20.0, data_share=0.6)
    assert "waiting for data" in only(waiting)  # and not: raise --batch_size


def test_how_busy_a_gpu_is_comes_from_nvidia_smi(tmp_path, monkeypatch):
    card = dataclasses.make_dataclass("Card", [("uuid", str, "abc")])()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watch.gpu_busy_share(torch.device("cuda")) == 1.0  # none here: no hint
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$4" = GPU-abc ] && echo 37\n')
    smi.chmod(0o755)
    assert watch.gpu_busy_share(torch.device("cuda")) == 0.37
