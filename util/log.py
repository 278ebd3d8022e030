"""Log of a run: speed and losses between two lines, the start-up block, hints on what is wrong."""

import argparse
import datetime
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from corpora import Corpus, describe_splits, skipped_by_kind
from data import Fold, TrainPlan
from util import distributed
from util.files import silence
from util.runs import RunFiles

log = logging.getLogger("vatune")

MAX_SKIPPED = 20  # steps in a row that GradScaler may skip; the first ten or so are usual [guess]


class Meter:
    """What happened since the last log line; read() averages it over steps and ranks.

    Losses stay on the device until then, so that a step never waits for the GPU. The first step
    after a start or an evaluation warms up and does not count for speed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.unread: list[tuple[int, Tensor, Tensor, list[int]]] = []  # steps on the device
        self.losses: list[float] = []  # from check(); these three are in a checkpoint
        self.norms: list[float] = []
        self.skipped = 0  # steps in a row
        self.restart()

    def state(self) -> dict:
        """What a resumed run needs for its next log line to be that of an uninterrupted one."""
        return {"losses": self.losses, "norms": self.norms, "skipped": self.skipped}

    def load_state(self, state: dict) -> None:
        self.losses, self.norms = state["losses"], state["norms"]
        self.skipped = state["skipped"]

    def restart(self) -> None:
        """Start the clock at the end of the next step."""
        self.steps = -1
        self.start = self.waited = self.audio_seconds = self.padded_seconds = 0.0

    def timed(self, steps: Iterator) -> Iterator:
        """Passes `steps` on and counts the time spent waiting for them."""
        while True:
            before = time.perf_counter()
            item = next(steps, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            yield item

    def add(self, step: int, loss: Tensor, norm: Tensor, batches: list[dict]) -> None:
        """Counts a step of this rank."""
        self.unread.append((step, loss, norm, [row for batch in batches for row in batch["rows"]]))
        self.steps += 1
        self.audio_seconds += sum(batch["audio_seconds"] for batch in batches)
        self.padded_seconds += sum(b["audio_seconds"] / (1 - b["padded_share"]) for b in batches)
        if self.steps == 0:
            self.restart()
            self.steps, self.start = 0, time.perf_counter()

    def check(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, corpus: Corpus
    ) -> None:
        """FloatingPointError on a value that is not finite (all ranks participate).

        It reads the steps since the last check, the weights and AdamW's moments. It waits for the
        device, so it runs before a log line and before anything is saved, not in every step.
        GradScaler skips steps of infinite gradients; MAX_SKIPPED in a row are an error.
        """
        if not self.unread:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [
            state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
        ]
        weight_norm = torch.nn.utils.get_total_norm(parameters).item()
        moment_norm = torch.nn.utils.get_total_norm(moments).item()
        finite = math.isfinite(weight_norm) and math.isfinite(moment_norm)
        last_step = self.unread[-1][0]
        for step, loss, norm, rows in self.unread:
            self.losses.append(loss.item())
            self.norms.append(norm.item())
            self.skipped = 0 if math.isfinite(self.norms[-1]) else self.skipped + 1
            bad = self.skipped >= (MAX_SKIPPED if scaler.is_enabled() else 1)
            bad = bad or not math.isfinite(self.losses[-1])
            if bad or (step == last_step and not finite):
                names = [
                    corpus.utterances[row].utt_id
                    for rank_rows in distributed.gather(rows)
                    for row in rank_rows
                ]
                raise FloatingPointError(
                    f"step {step}: loss {self.losses[-1]:.4g}, gradient norm {self.norms[-1]:.4g}, "
                    f"weight norm {weight_norm:.4g}, norm of AdamW's moments {moment_norm:.4g}, "
                    f"scale {scaler.get_scale():g} on "
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
            sums = torch.tensor([self.audio_seconds, self.padded_seconds, self.waited])  # over gloo
            real, padded, waited = distributed.all_reduce(sums).tolist()
            record["audio_seconds_per_second"] = real / elapsed
            record["padded_share"] = 1 - real / padded
            record["data_share"] = waited / elapsed / distributed.world_size()
            record["ms_per_step"] = 1000 * elapsed / self.steps
        record["peak_gib"] = distributed.peak_gib(self.device)
        self.losses, self.norms = [], []
        self.restart()
        self.steps, self.start = 0, time.perf_counter()
        return record


# ---------------------------------------------------------------------------------------------
# Hints: what is wrong with a run, and the remedy


def give_hints(args: argparse.Namespace, files: RunFiles) -> None:
    """Logs what the records of metrics.jsonl show to be wrong, each kind once."""
    for kind, text in hints(args, files.history[-500:]).items():
        if kind not in files.hints:
            files.hints.add(kind)
            log.warning(f"hint | {text}")


def hints(args: argparse.Namespace, history: list[dict]) -> dict[str, str]:
    """{kind: text} of what the latest records show to be wrong; all thresholds are [guess]."""
    found = {}
    if args.loss == "ccc" and args.global_batch_size < 2:
        found["single"] = "--global_batch_size 1: a CCC of one utterance is 0, only MSE trains"
    train = [record for record in history if record["event"] == "train"]
    waiting = [record.get("data_share", 0.0) for record in train[-2:]]
    if len(waiting) == 2 and min(waiting) > 0.2:
        found["data"] = (
            f"{min(waiting):.0%} of the time is spent waiting for data: raise --num_workers "
            f"({args.num_workers}), or put --cache_dir and --features_dir on a local disk"
        )
    losses = [record["loss"] for record in train]
    means = [statistics.fmean(losses[i : i + 5]) for i in range(len(losses) - 4)]
    if len(means) > 5 and means[-1] > 1.25 * min(means):
        found["loss"] = (
            f"the loss diverges, it has risen from {min(means):.3g} to {means[-1]:.3g}: lower "
            "--lr and --encoder_lr, or raise --warmup"
        )
    chosen_by = [f"dev/ccc_{t}" for t, w in zip(args.targets, args.target_weights) if w]
    dev = [record for record in history if record["event"] == "dev"]
    cccs = [statistics.fmean(r[name] for name in chosen_by if name in r) for r in dev]
    early = bool(history) and history[-1]["epoch"] <= 0.7 * args.epochs  # cosine flattens the rest
    if len(cccs) > 4 and max(cccs[-4:]) < cccs[-5] + 0.01 and early:
        way = "flat" if min(cccs[-4:]) > cccs[-5] - 0.01 else "falling"
        found["dev"] = (
            f"dev CCC has been {way} for 4 evaluations, from {cccs[-5]:.4f} to {cccs[-1]:.4f}: "
            "change the learning rates, or what --unfreeze trains; the best epoch is kept"
        )
    return found


# ---------------------------------------------------------------------------------------------
# Lines


def start_logging(path: Path | None, console: bool) -> None:
    """Log lines go to train.log, and to stdout without breaking a progress bar."""

    class Console(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                tqdm.write(self.format(record), file=sys.stdout)
                sys.stdout.flush()
            except OSError as error:
                silence(sys.stdout)
                log.warning(f"stdout cannot be written ({error.strerror}): the run goes on")

    def end_thread(fault: threading.ExceptHookArgs) -> None:
        if fault.exc_type is not OSError:  # TensorBoard's, which its next call raises
            threading.__excepthook__(fault)

    threading.excepthook = end_thread
    logging.raiseExceptions = False  # a full disk is reported once, by the failed save
    log.handlers.clear()
    log.addHandler(logging.NullHandler())  # else Python prints warnings of the other ranks
    log.setLevel(logging.INFO)
    log.propagate = False
    if console:
        log.addHandler(Console())
    if path is not None:
        log.addHandler(logging.FileHandler(path))


def startup_block(
    args: argparse.Namespace,
    fold: Fold,
    plan: TrainPlan,
    total_steps: int,
    ranks: distributed.Ranks,
    commit: str,
) -> str:
    """Lines that a person checks before leaving a run alone."""
    precision = {"fp16": "fp16 autocast with GradScaler", "bf16": "bf16 autocast", "off": "fp32"}
    corpus, count = fold.corpus, ranks.world_size
    software = " | ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        (
            f"vatune {commit} | {software}",
            f"device {ranks.device} x {count} | {precision[args.amp]} | seed {args.seed}",
            describe_splits(corpus, fold.splits),
            *(f"note: {note}" for note in corpus.notes),
            *(f"skipped: {why}: {len(s)}" for why, s in skipped_by_kind(corpus).items()),
            f"batch {args.batch_size} x accumulation {args.gradient_accumulation_steps} x ranks "
            f"{count} = {args.global_batch_size} utterances per step | {plan.steps_per_epoch} "
            f"steps per epoch | {total_steps} steps in total",
            "flags " + json.dumps(vars(args)),
        )
    )


def trainable_line(optimizer: torch.optim.Optimizer, stage: str) -> str:
    """Parameters that train in a stage, per group, with the group's peak learning rate."""
    parts = []
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"] if p.requires_grad) / 1e6
        parts.append(f"{group['name']} {count:.3f} M at lr {group['peak_lr']:.1e}")
    return f"unfreeze {stage} | trains {', '.join(parts)}"


def step_line(record: dict[str, float], step: int, scaler: torch.amp.GradScaler) -> str:
    """The log line of a record."""
    total_steps = record["total_steps"]
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
    if "peak_share" in record:
        line += f" | {record['tflops']:.0f} TFLOPS, {record['peak_share']:.0%} of the card's peak"
    return line + f" | peak {record['peak_gib']:.2f} GiB"


def score_line(what: str, scores: dict[str, float], targets: Sequence[str]) -> str:
    """The CCCs in words, and their mean if there are several; "-" for a target without a label."""
    shown = {name: f"{scores[f'ccc_{name}']:.4f}" for name in targets}
    if len(targets) > 2:  # val, aro, dom: a line has 80 characters
        shown = {name[:3]: value for name, value in shown.items()}
    if len(targets) > 1:
        shown["mean"] = f"{scores['ccc_mean']:.4f}"
    ccc = " ".join(f"{name} {value}" for name, value in shown.items())
    return f"{what} CCC {ccc.replace(' nan', ' -')}"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def git_commit() -> str:
    try:
        here = Path(__file__).parent
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
