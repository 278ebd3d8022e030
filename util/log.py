"""What a run says while it goes on: the start-up block, log lines, and what is wrong with it."""

import argparse
import contextlib
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
from util.distributed import all_reduce

log = logging.getLogger("vatune")

MAX_SKIPPED = 20  # steps in a row that GradScaler may skip; a start skips about ten [guess]

# When a hint is given [all guesses]
WAITING = 0.2  # share of the step time spent waiting for data, in two log lines in a row
PADDED = 0.35  # share of padding in the batches, in two log lines in a row
SKIPPED = 0.1  # share of the steps that GradScaler skips, after its start
BUSY = 0.5  # share of the time in which the GPU computes
FILLED = 0.4  # share of the card's memory that is used
RISEN = 1.25  # factor on the lowest loss; both are means of five log lines
FALLING = 3  # evaluations in a row, each with a lower dev CCC than the one before
FLAT, FLAT_WITHIN = 5, 0.01  # evaluations whose dev CCCs lie that close together
FLAT_UNTIL = 0.7  # share of the epochs after which a cosine schedule makes everything flat


class Meter:
    """What happened since the last log line; read() averages it over steps and ranks.

    Losses stay on the device until then, so that a step never waits for the GPU. The first step
    after a start or an evaluation warms up and does not count for speed.
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
# Hints


class Hints:
    """What is wrong with a run, and the remedy: a log line of each kind, once. For rank 0 alone.

    `records` are those of metrics.jsonl so far; `where` are the arguments of memory.largest_batch
    behind the flags.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        records: list[dict],
        where: tuple,
    ) -> None:
        self.args, self.device, self.where = args, device, where
        self.train = [record for record in records if record["event"] == "train"]
        self.dev = [record for record in records if record["event"] == "dev"]
        self.busy: list[float] = []
        self.said: set[str] = set()
        if args.loss == "ccc" and args.global_batch_size < 2:
            self.say(
                "single", "--global_batch_size 1: a CCC of one utterance is 0, only MSE trains"
            )

    def say(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            log.warning(f"hint | {text}")

    def lately(self, key: str) -> float:
        """The lower value of the last two log lines; 0 before there are two."""
        return min(r.get(key, 0.0) for r in self.train[-2:]) if len(self.train) > 1 else 0.0

    def after_steps(self, record: dict, cached: bool = False) -> None:
        """Looks at the record of a log line; `cached`: hidden states are read, by no worker."""
        self.train.append(record)
        args, waiting, padded = self.args, self.lately("data_share"), self.lately("padded_share")
        if waiting > WAITING:
            workers = f"raise --num_workers ({args.num_workers}), or " * (not cached)
            self.say(
                "data",
                f"{waiting:.0%} of the time is spent waiting for data: {workers}put --cache_dir "
                "and --features_dir on a local disk",
            )
        if padded > PADDED:
            why = " (--context mixes lengths)" * (args.context > 1)
            self.say(
                "padding",
                f"{padded:.0%} of the batches is padding{why}: lower --max_seconds, or "
                "--batch_size with a higher --gradient_accumulation_steps",
            )
        if len(self.train) > 1 and record["skipped_steps"] > SKIPPED * args.log_every:
            self.say(
                "scaler",
                f"GradScaler skipped {record['skipped_steps']} of the last {args.log_every} steps: "
                "gradients overflow: give --amp bf16, or lower --lr and --encoder_lr",
            )
        means = [
            statistics.fmean(r["loss"] for r in self.train[i : i + 5])
            for i in range(len(self.train) - 4)
        ]
        if len(means) > 5 and means[-1] > RISEN * min(means):
            self.say(
                "loss",
                f"the loss diverges, it has risen from {min(means):.3g} to {means[-1]:.3g}: lower "
                "--lr and --encoder_lr, or raise --warmup",
            )
        if self.device.type == "cuda":
            self.look_at_gpu(record, waiting)

    def look_at_gpu(self, record: dict, waiting: float) -> None:
        """The first five log lines decide; the median, since one may meet a pause."""
        if len(self.busy) == 5 or "ms_per_step" not in record:
            return
        self.busy.append(gpu_busy_share(self.device))
        if len(self.busy) < 5:
            return
        busy, card = statistics.median(self.busy), memory.capacity_gib(self.args)
        if busy < BUSY and waiting <= WAITING:
            self.say("gpu", f"the GPU computes {busy:.0%} of the time: raise --batch_size")
        if record["peak_gib"] < FILLED * card:
            anew = argparse.Namespace(**vars(self.args) | {"global_batch_size": None})
            size = 0
            with contextlib.suppress(ValueError):  # the plan disagrees with the card
                size = memory.largest_batch(anew, *self.where).batch_size  # takes seconds, once
            if size > self.args.batch_size:
                self.say(
                    "memory",
                    f"{record['peak_gib']:.1f} of {card:.1f} GiB are used: --batch_size {size} "
                    "fits by plan (python memory.py), in place of accumulation or with a new "
                    "learning rate",
                )

    def after_evaluation(self, record: dict) -> None:
        """Looks at the record of an evaluation on dev."""
        self.dev.append(record)
        cccs = [r["dev/ccc_mean"] for r in self.dev]
        trains_wavlm = self.args.encoder == "wavlm" and self.args.unfreeze != "none"
        rate = "--encoder_lr" if trains_wavlm else "--lr"
        rate = f"{rate} ({getattr(self.args, rate[2:]):g})"
        last = cccs[-FALLING - 1 :]
        if len(last) > FALLING and last == sorted(set(last), reverse=True):
            self.say(
                "falling",
                f"dev CCC has fallen {FALLING} times in a row, from {last[0]:.4f} to "
                f"{last[-1]:.4f}: lower {rate}; the best epoch is kept, --patience ends earlier",
            )
        last = cccs[-FLAT:]
        early = record["epoch"] <= FLAT_UNTIL * self.args.epochs
        if len(last) == FLAT and max(last) - min(last) < FLAT_WITHIN and early:
            less = " or unfreeze more" * (self.args.encoder == "wavlm")
            self.say(
                "flat",
                f"dev CCC has been flat for {FLAT} evaluations, {min(last):.4f} to "
                f"{max(last):.4f}: raise {rate}{less}",
            )


def gpu_busy_share(device: torch.device) -> float:
    """Of the last second or less, by nvidia-smi; 1 where that cannot tell."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i"]
    try:
        card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        run = subprocess.run([*query, card], capture_output=True, text=True, timeout=10, check=True)
        return float(run.stdout) / 100
    except (OSError, ValueError, RuntimeError, AssertionError, subprocess.SubprocessError):
        return 1.0


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
    software = " | ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        (
            f"vatune {git_commit()} | {software}",
            f"device {device} x {ranks} | {precision[args.amp]} | seed {args.seed}",
            describe_splits(corpus, splits),
            *(f"note: {note}" for note in corpus.notes),
            *(f"skipped: {why}: {len(s)}" for why, s in skipped_by_kind(corpus).items()),
            f"batch {size} x accumulation {args.gradient_accumulation_steps} x ranks {ranks} = "
            f"{whole} per step | {plan.steps_per_epoch} steps per epoch | "
            f"{total_steps} steps in all",
            f"unfreeze {args.unfreeze} | " * (args.encoder == "wavlm")
            + f"trains now {trainable_line(optimizer)}",
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
