"""Seconds of training before it is run: the operations of a traced step at a machine's rates.

    python memory.py ...              # prints them beside the bytes
    python memory.py --calibrate      # measures this machine's rates once, in under a minute

A step's time is that of its matrix products, plus that of the bytes which all other operators read
and write; the time to start operators counts where it is longer. Not counted: loading of data, and
between ranks the exchange of gradients.
"""

import argparse
import json
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import data as vadata
import step as updates
from corpora import make_splits, num_folds, read_corpus
from util.tracing import on_cuda, real_step, trace

if TYPE_CHECKING:
    from memory import Planner

# GiB, dense half-precision and TF32 (fp32 where a card has no TF32) TFLOPS, GB/s [P: vendors]
GPUS = {
    "t4": (15, 65, 8.1, 320), "v100": (32, 125, 15.7, 900), "rtx2080ti": (11, 53.8, 13.4, 616),
    "rtx3090": (24, 71, 35.6, 936), "rtx4090": (24, 165, 82.6, 1008),
    "rtx5090": (32, 210, 105, 1792), "a5000": (24, 111, 55.6, 768), "a6000": (48, 155, 77.4, 768),
    "rtx6000ada": (48, 364, 182, 960), "l4": (24, 121, 60, 300), "l40s": (48, 362, 183, 864),
    "a100": (80, 312, 156, 2039), "h100": (80, 989, 494, 3350), "h200": (141, 989, 494, 4800),
}  # fmt: skip
ACHIEVED, ACHIEVED_BANDWIDTH = 0.6, 0.8  # of the published figures, in training [guess]


@dataclass
class Machine:
    """Rates that turn WORK into seconds."""

    name: str
    half_tflops: float
    single_tflops: float
    gb_per_second: float
    operator_us: float  # to start one
    source: str

    def seconds(self, work: np.ndarray) -> np.ndarray:
        """Seconds of work (..., WORK); operators start while earlier ones run."""
        half, single, moved, operators = np.moveaxis(work, -1, 0)
        busy = half / self.half_tflops / 1e12 + single / self.single_tflops / 1e12
        return np.maximum(
            busy + moved / self.gb_per_second / 1e9, operators * self.operator_us / 1e6
        )


def device_name(cuda: bool) -> str:
    if cuda:
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()} x {torch.get_num_threads()} threads"


def known_gpu(name: str) -> str | None:
    """Which of GPUS "NVIDIA GeForce RTX 4090" is; an L40S is no L4, and a T400 no T4."""

    def spaced(gpu: str) -> str:
        return re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", " ?", gpu)

    return next((gpu for gpu in GPUS if re.search(rf"\b{spaced(gpu)}\b", name.lower())), None)


def machine(args: argparse.Namespace, gpu: str | None = None) -> Machine:
    """--gpu's, else what --calibrate found on this machine, else an estimate."""
    cuda = on_cuda(args)
    here = not cuda or torch.cuda.is_available()
    path = Path(args.cache_dir) / "machine.json"
    if not gpu and here and path.exists():
        known = json.loads(path.read_text())
        if device_name(cuda) in known:
            return Machine(**known[device_name(cuda)])
    if not cuda:
        cores = torch.get_num_threads()
        return Machine("this CPU", 0.08 * cores, 0.04 * cores, 10, 10, "a guess: --calibrate")
    if not gpu and here:
        gpu = known_gpu(device_name(cuda))
    gpu = gpu or "rtx4090"
    _, half, single, bandwidth = GPUS[gpu]
    rates = (ACHIEVED * half, ACHIEVED * single, ACHIEVED_BANDWIDTH * bandwidth)
    return Machine(gpu, *rates, 5, f"estimate: {ACHIEVED:.0%} of its published peak")


def median_seconds(work: Callable[[], object], cuda: bool, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def calibrate(args: argparse.Namespace) -> Machine:
    """Measures this machine and remembers it in --cache_dir.

    Bandwidth and the cost of an operator come from loops over one operator; the two rates of
    matrix products are those at which a real step of two layers of WavLM-Large takes its time.
    """
    cuda = on_cuda(args)
    device = torch.device("cuda" if cuda else "cpu")
    large, small = torch.ones(2**26, device=device), torch.ones(1, device=device)
    bandwidth = 2 * large.nbytes / median_seconds(lambda: large.mul_(1.0), cuda) / 1e9
    operator = median_seconds(lambda: [small.mul_(1.0) for _ in range(1000)], cuda) * 1e3
    found = Machine(device_name(cuda), 1.0, 1.0, bandwidth, operator, "")
    for rate, amp in (("single", "off"), ("half", "fp16" if cuda else "bf16")):
        flags = {"wavlm": "large", "layers": [2], "unfreeze": "transformer", "amp": amp}
        flags |= {"prosody": "none", "gradient_accumulation_steps": 1, "batch_size": 4}
        setting = argparse.Namespace(**vars(args) | flags)
        model = updates.build_model(setting, vadata.InputShape(0, 0, 0, 0)).to(device)
        run, _ = real_step(model, setting, (0, 0), 5.0, "transformer", device)
        measured = median_seconds(run, cuda, 3)
        work = sum(trace(setting, (0, 0), 4, 5.0, "transformer").work.values())
        other = work.copy()
        other[0 if rate == "half" else 1] = 0
        left = max(measured - float(found.seconds(other)), 0.1 * measured)
        setattr(found, f"{rate}_tflops", (work - other).sum() / left / 1e12)
    found.source = f"calibrated {time.strftime('%Y-%m-%d')}"
    path = Path(args.cache_dir) / "machine.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {found.name: asdict(found)}, indent=1))
    return found


@dataclass
class Clips:
    """Lengths of a fold's utterances, and where they are from."""

    seconds: np.ndarray  # (N,) capped at --max_seconds
    dialogs: list[str]
    splits: dict[str, np.ndarray]  # train, dev, test: rows
    folds: int
    source: str


def clips(args: argparse.Namespace, from_data: bool) -> Clips:
    """Of the corpus where --data was given, else as many and as long as IEMOCAP's fold 1."""
    if from_data:
        corpus = read_corpus(args.data, args.data_dir, args.label_range, args.cache_dir)
        corpus, _ = vadata.load_audio(corpus, args.cache_dir)
        seconds, dialogs = corpus.seconds, [u.dialog for u in corpus.utterances]
        splits, folds = make_splits(corpus, args.fold), num_folds(corpus)
        source = args.data
    else:  # log-normal, mean 4.46 s [measured]
        counts = {"train": 6409, "dev": 1811, "test": 1819}
        seconds = np.exp(np.random.default_rng(0).normal(1.26, 0.66, sum(counts.values())))
        seconds = seconds.clip(0.585, 34.14)
        ends = np.cumsum([0, *counts.values()])
        splits = {name: np.arange(a, b) for name, a, b in zip(counts, ends, ends[1:])}
        dialogs, folds = [str(i // 66) for i in range(len(seconds))], 5
        source = "IEMOCAP's number and lengths of utterances (give --data for your own)"
    return Clips(np.minimum(seconds, args.max_seconds), dialogs, splits, folds, source)


class Clock:
    """Seconds per epoch and per fold, from the work of traced steps and a machine's rates."""

    def __init__(self, planner: "Planner", machine: Machine, clips: Clips) -> None:
        self.planner, self.machine, self.clips = planner, machine, clips
        self.long = planner.seconds
        self.short = max(self.long / 3, 2 * vadata.MIN_SAMPLES / vadata.SAMPLE_RATE)

    def per_clip(self, long: np.ndarray, short: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """(M, WORK) of clips of `seconds` (M,), a seconds + b seconds^2 through two known ones."""
        b = (long / self.long - short / self.short) / (self.long - self.short)
        a = long / self.long - b * self.long
        return seconds[:, None] * (a + b * seconds[:, None])

    def micro_steps(
        self, stage: str, counts: np.ndarray, seconds: np.ndarray, **flags: object
    ) -> float:
        """Seconds of forward and backward of M batches of `counts` clips of `seconds`."""
        few, many = (
            self.planner.args.context,
            8 * self.planner.args.context,
        )  # --batch_size's default

        def work(size: int, length: float) -> np.ndarray:
            by_phase = self.planner.trace(size, stage, length, **flags).work
            return by_phase["forward"] + by_phase["backward"]

        long = (work(many, self.long) - work(few, self.long)) / (many - few)
        constant = work(few, self.long) - few * long
        short = (work(many, self.short) - constant) / many
        per_batch = constant + counts[:, None] * self.per_clip(long, short, seconds)
        return float(self.machine.seconds(per_batch).sum())

    def slower(self, **flags: object) -> float:
        """Seconds of a step of the longest clips with `flags`, over those without."""
        args = self.planner.args
        stage = updates.stage_at(args.unfreeze, args.epochs - 1)

        def seconds(**flags: object) -> float:
            step = self.planner.trace(args.batch_size, stage, **flags)
            return float(self.machine.seconds(sum(step.work.values())))

        return seconds(**flags) / seconds()

    def forward(self, stage: str, seconds: np.ndarray, **flags: object) -> float:
        """Seconds of a forward of clips of `seconds` (M,), as evaluation does it."""

        def work(length: float) -> np.ndarray:
            size = max(1, int(vadata.EVAL_SECONDS / length))
            return self.planner.evaluation(stage, length, **flags).work["evaluation"] / size

        per_clip = self.per_clip(work(self.long), work(self.short), seconds)
        return float(self.machine.seconds(per_clip.sum(0)))

    def epoch(self, stage: str, batch_size: int, accumulation: int, **flags: object) -> float:
        """Seconds of one rank's training over the train split."""
        args = argparse.Namespace(**vars(self.planner.args) | flags)
        rate = vadata.SAMPLE_RATE
        plan = vadata.TrainPlan(
            (self.clips.seconds * rate).astype(np.int64), self.clips.splits["train"],
            self.clips.dialogs, batch_size, accumulation, args.context, 0,
            self.planner.world_size, args.seed,
        )  # fmt: skip
        counts, longest = [], []
        for spec in plan:
            seconds = self.clips.seconds[[row for chunk in spec.chunks for row in chunk]]
            groups = [(0, len(seconds), seconds.max())]
            if args.context > 1:
                seconds = -np.sort(-seconds)
                groups = vadata.groups_of_like_length(seconds, vadata.GROUP_SECONDS)
            counts += [stop - start for start, stop, _ in groups]
            longest += [most for *_, most in groups]
        counts, longest = np.array(counts), np.array(longest)
        total = self.micro_steps(stage, counts, longest, **flags)
        twice = accumulation > 1 and args.exact_ccc == "on" and args.loss == "ccc"
        if twice and not updates.reads_cache(args, stage):
            total += self.forward(stage, np.repeat(longest, counts), **flags)
        step = self.planner.trace(8 * args.context, stage, self.long, **flags)
        return total + plan.steps_per_epoch * float(self.machine.seconds(step.work["optimizer"]))

    def fold(
        self, unfreeze: str, batch_size: int, accumulation: int, **flags: object
    ) -> tuple[float, float]:
        """Seconds of (the last epoch, the whole fold with evaluations and hidden states)."""
        args = argparse.Namespace(**vars(self.planner.args) | flags)
        epochs = Counter(updates.stage_at(unfreeze, epoch) for epoch in range(args.epochs))
        everything, dev = self.clips.seconds, self.clips.seconds[self.clips.splits["dev"]]
        total = 0.0
        for stage, count in epochs.items():
            seconds = self.epoch(stage, batch_size, accumulation, **flags)
            total += count * seconds
            if updates.reads_cache(args, stage):
                total += self.forward(stage, everything, **flags)
            else:
                ranks = self.planner.world_size  # which share the dev split
                total += count / args.eval_every * self.forward(stage, dev, **flags) / ranks
        return seconds, total
