"""What a run says while it goes on: the start-up block, log lines, and what is wrong with it."""

import argparse
import datetime
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import memory
from corpora import Corpus, describe_splits, skipped_by_kind
from data import TrainPlan
from model import TARGETS
from processes import all_reduce

log = logging.getLogger("vatune")

MAX_SKIPPED = 20  # steps in a row that GradScaler may skip; a start skips about ten [guess]


class Meter:
    """What happened since the last log line; read() averages it over steps and ranks.

    Losses stay on the device until then, so that a step never waits for the GPU. The first step
    after a start or an evaluation warms up and counts neither for speed nor for memory.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.device, self.world_size = device, world_size
        self.unread: list[tuple[int, Tensor, Tensor, list[int]]] = []  # steps on the device
        self.losses, self.norms, self.skipped = [], [], 0  # floats, from check(); in a checkpoint
        self.restart()

    def state(self) -> dict:
        """What a resumed run needs for its next log line to be that of an uninterrupted one."""
        return {"losses": self.losses, "norms": self.norms, "skipped": self.skipped}

    def restart(self) -> None:
        """Start the clock at the end of the next step."""
        self.steps, self.waited, self.heard, self.padded, self.start = -1, 0.0, 0.0, 0.0, 0.0

    def timed(self, steps: Iterator) -> Iterator:
        """Passes `steps` on and counts the time spent waiting for them."""
        while True:
            before = time.perf_counter()
            item = next(steps, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            yield item

    def add(self, step: int, loss: Tensor, norm: Tensor, batches: list[dict]) -> float:
        """Seconds of audio in this rank's micro-batches."""
        self.unread.append((step, loss, norm, [row for batch in batches for row in batch["rows"]]))
        heard = sum(batch["audio_seconds"] for batch in batches)
        self.steps += 1
        self.heard += heard
        self.padded += sum(b["audio_seconds"] / (1 - b["padded_share"]) for b in batches)
        if self.steps == 0:
            self.restart()
            self.steps, self.start = 0, time.perf_counter()
        return heard

    def check(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, corpus: Corpus
    ) -> None:
        """FloatingPointError on a value that is not finite (all ranks participate).

        It reads the steps since the last check, and the weights and moments: it waits for the
        device, so it runs before a log line and before anything is saved, not in every step.
        GradScaler skips steps of infinite gradients, within reason.
        """
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [moment for state in optimizer.state.values() for moment in state.values()]
        weights = torch.nn.utils.get_total_norm(tensors).item() if self.unread else 0.0
        for step, loss, norm, rows in self.unread:
            self.losses.append(loss.item())
            self.norms.append(norm.item())
            self.skipped = 0 if math.isfinite(self.norms[-1]) else self.skipped + 1
            bad = self.skipped >= (MAX_SKIPPED if scaler.is_enabled() else 1)
            bad |= step == self.unread[-1][0] and not math.isfinite(weights)
            if bad or not math.isfinite(self.losses[-1]):
                gathered = [rows] * self.world_size
                if self.world_size > 1:
                    dist.all_gather_object(gathered, rows)
                names = [corpus.utterances[row].utt_id for rows in gathered for row in rows]
                raise FloatingPointError(
                    f"step {step}: loss {self.losses[-1]:.4g}, gradient norm {self.norms[-1]:.4g}, "
                    f"weight norm {weights:.4g}, scale {scaler.get_scale():g} on "
                    f"{' '.join(names[:32])}: lower --lr and --encoder_lr, or look at these"
                )
        self.unread = []

    def read(self, epoch: float, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """The record of a log line (all ranks participate)."""
        finite = [norm for norm in self.norms if math.isfinite(norm)]  # GradScaler skips the others
        record = {
            "epoch": epoch,
            "loss": statistics.fmean(self.losses),
            "gradient_norm": statistics.fmean(finite) if finite else math.inf,
            "skipped_steps": len(self.norms) - len(finite),
        }
        record |= {f"lr/{g['name']}": g["lr"] for g in optimizer.param_groups}
        elapsed = time.perf_counter() - self.start
        if self.steps > 0:
            sums = torch.tensor([self.heard, self.padded, self.waited])  # on the CPU: over gloo
            heard, padded, waited = all_reduce(sums, self.world_size).tolist()
            record["audio_seconds_per_second"] = heard / elapsed
            record["padded_share"] = 1 - heard / padded
            record["data_share"] = waited / elapsed / self.world_size
            record["ms_per_step"] = 1000 * elapsed / self.steps
        record["peak_gib"] = memory.peak_gib(self.device)
        self.losses, self.norms = [], []
        self.restart()
        self.steps, self.start = 0, time.perf_counter()
        return record


# ---------------------------------------------------------------------------------------------
# Lines


def start_logging(path: Path | None, console: bool) -> None:
    """Log lines go to train.log, and to stdout without breaking a progress bar."""

    class Console(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()

    logging.raiseExceptions = False  # a full disk is told once, by what cannot be saved
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    if console:
        log.addHandler(Console())
    if path is not None:
        log.addHandler(logging.FileHandler(path))


def startup_block(
    args: argparse.Namespace,
    corpus: Corpus,
    splits: dict[str, np.ndarray],
    plan: TrainPlan,
    total_steps: int,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> str:
    """What a person checks before they leave a run alone."""
    precision = {"fp16": "fp16 autocast with GradScaler", "bf16": "bf16 autocast", "off": "fp32"}
    ranks = args.global_batch_size // (args.batch_size * args.gradient_accumulation_steps)
    size, whole = args.batch_size, f"{args.global_batch_size} utterances"
    if args.batch_seconds:
        size = f"{args.batch_seconds:g} s of audio"
        whole = f"{args.batch_seconds * args.gradient_accumulation_steps * ranks:g} s"
    software = " | ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        (
            f"vatune {git_commit()} | {software}",
            f"device {device} x {ranks} | {precision[args.amp]} | seed {args.seed}",
            describe_splits(corpus, splits),
            *(f"note: {note}" for note in corpus.notes),
            *(f"skipped: {why}: {len(s)}" for why, s in skipped_by_kind(corpus).items()),
            f"batch {size} x accumulation {args.gradient_accumulation_steps} x ranks {ranks} = "
            f"{whole} per step | {plan.steps_in(0)} steps per epoch | {total_steps} steps in all",
            f"unfreeze {args.unfreeze} | now {trainable_line(optimizer)}",
            "flags " + json.dumps(vars(args)),
        )
    )


def trainable_line(optimizer: torch.optim.Optimizer) -> str:
    """Parameters that train now, per group, with the group's peak learning rate."""
    parts = []
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"] if p.requires_grad) / 1e6
        parts.append(f"{group['name']} {count:.3f} M at lr {group['peak_lr']:.1e}")
    return ", ".join(parts)


def step_line(
    record: dict[str, float], step: int, total_steps: int, scaler: torch.amp.GradScaler
) -> str:
    rates = dict.fromkeys(f"{v:.1e}" for k, v in record.items() if k.startswith("lr/"))
    line = (
        f"step {step:>5}/{total_steps} | epoch {record['epoch']:.2f} | loss {record['loss']:.4f} | "
        f"lr {'/'.join(rates)} | gnorm {record['gradient_norm']:.2f}"
    )
    if scaler.is_enabled():
        line += f" | scale {scaler.get_scale():.0f} skipped {record['skipped_steps']}"
    if "ms_per_step" in record:
        eta = datetime.timedelta(seconds=round((total_steps - step) * record["ms_per_step"] / 1000))
        line += (
            f" | {record['audio_seconds_per_second']:.0f} audio-s/s | "
            f"{record['ms_per_step']:.0f} ms/step (data {record['data_share']:.0%}, padding "
            f"{record['padded_share']:.0%}) | eta {eta}"
        )
    return line + f" | peak {record['peak_gib']:.2f} GiB"


def score_line(what: str, scores: dict[str, float]) -> str:
    ccc = " ".join(f"{target} {scores[f'ccc_{target}']:.4f}" for target in TARGETS)
    return f"{what} CCC {ccc} mean {scores['ccc_mean']:.4f}"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def git_commit() -> str:
    try:
        here = Path(__file__).parent
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
