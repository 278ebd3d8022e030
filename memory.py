"""Bytes and hours of training before it is run, for exactly the flags that train.py takes.

    python memory.py --wavlm large --unfreeze all --batch_size 8 --max_seconds 8
    python memory.py --wavlm large --unfreeze all --batch_size auto --gpu rtx3090 --json
    python memory.py --preset full --data iemocap --data_dir D --gpus 4
    python memory.py --calibrate        # measures this machine's speed once, in under a minute

The bytes are those of step.train_step on the meta device (util/tracing.py), so a changed model is
planned with no line changed here. In every phase of a step they are linear in the batch size: two
traces give the line, and one more confirms the batch it proposes. The hours are the floating-point
operations of that step at a machine's rate. Nothing here is tried on the device but --calibrate.

tests/bench_memory.py compares plans with real steps. GiB = 2^30 bytes.
Tags: [measured] by us, [P] published, [guess].
"""

import argparse
import functools
import json
import logging
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import data
import flags
import step
from corpora import make_splits, num_folds
from model import AUTOCAST, EmotionModel
from step import Progress
from util import distributed, runs, tracing
from util.distributed import GIB, uses_cuda
from util.files import UserError, replace_text, run_script
from util.tracing import KINDS, Trace
from wavlm import read_config

CONTEXT_GIB, NCCL_GIB = 0.45, 0.4  # outside the allocator: CUDA context with its kernels [guess]
ALLOCATOR_SLACK = 0.02  # of the peak, lost in the allocator's segments [guess]
FITS, TIGHT = 0.90, 0.97  # shares of the card: clips of many lengths fragment what is reserved
CUBLAS_BYTES, HOPPER_CUBLAS_BYTES = 8_519_680, 2**25  # per thread: forward's and backward's [P]
BATCHES = (1, 4, 8, 16, 32, 64)
LESS_MEMORY = "lower --max_seconds, unfreeze less, or give --gradient_checkpointing"
PADDED = 1.06  # seconds with padding per second of audio, in batches of like length [measured]
UTILIZATION = (0.1, 0.5)  # share of a card's published peak that training reaches [guess]
HOPPER_UTILIZATION = (0.03, 0.5)  # small batches wait for Python [measured on an H100]
CPU_TFLOPS = 0.05  # of one core, float32 [guess]

log = logging.getLogger("vatune")

# GiB, and TFLOPS in dense half precision and in TF32 (float32 without it) [P: vendors]
GPUS = {
    "t4": (15, 65, 8.1), "v100": (32, 125, 15.7), "rtx2080ti": (11, 53.8, 13.4),
    "rtx3090": (24, 71, 35.6), "rtx4090": (24, 165, 82.6), "rtx5090": (32, 210, 105),
    "a5000": (24, 111, 55.6), "a6000": (48, 155, 77.4), "rtx6000ada": (48, 364, 182),
    "l4": (24, 121, 60), "l40s": (48, 362, 183), "a100": (80, 312, 156), "h100": (80, 989, 494),
    "h200": (141, 989, 494),
}  # fmt: skip
HOPPER = ("h100", "h200")

# Shapes of hub checkpoints, so that planning needs no network
KNOWN_SHAPES = {
    "microsoft/wavlm-large": "large", "microsoft/wavlm-base": "base",
    "microsoft/wavlm-base-plus": "base",
}  # fmt: skip

# Flags in which a finished run must agree for its speed to say something about this one
SPEED_FLAGS = (
    "encoder", "wavlm", "unfreeze", "amp", "batch_size", "gradient_accumulation_steps",
    "global_batch_size", "gradient_checkpointing", "attention", "layers", "compile", "max_seconds",
    "context", "feature_cache", "augment", "exact_ccc", "d_model", "num_layers", "base_channels",
    "num_blocks", "lora", "tf32",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The plan


@dataclass
class Plan:
    """The worst moment of a run with utterances of the longest length, evaluation included."""

    bytes: dict[str, int]  # by KINDS; without the allocator: torch.cuda.max_memory_allocated
    moment: str  # forward | backward | optimizer | evaluation
    batch_size: int
    peak_gib: float  # sum of bytes
    needed_gib: float  # with the allocator's slack, CUDA's context and NCCL
    capacity_gib: float  # of the card, or free RAM
    verdict: str  # fits | tight | does not fit
    # {stage: floating-point operations per second of audio in half and in single precision}
    flops: dict[str, list[float]]

    def line(self) -> str:
        parts = ", ".join(f"{kind} {n / GIB:.2f}" for kind, n in self.bytes.items() if n)
        return (
            f"memory plan {self.peak_gib:.2f} GiB of tensors at the peak ({self.moment}): {parts} "
            f"| needs {self.needed_gib:.2f} of {self.capacity_gib:.1f} GiB: {self.verdict}"
        )


def make_batch(
    model: EmotionModel, args: argparse.Namespace, shape: data.InputShape, size: int, cached: bool
) -> dict[str, Tensor]:
    """A micro-batch of `size` utterances of shape.length, as data.Batches makes them, with random
    values on the model's device; if `cached`, with what its frozen part makes of the audio."""
    samples = max(data.MIN_SAMPLES, shape.length)
    sizes = {"labels": (len(args.targets),)}
    if cached:
        mask, length = "frame_mask", model.encoder.wavlm.frame_lengths(samples)
        sizes |= model.frozen_shapes(samples)
    elif shape.frame_dim:
        mask, length = "frame_mask", shape.length
        sizes["frames"] = (length, shape.frame_dim)
    else:
        mask, length = "attention_mask", samples
        sizes["input_values"] = (length,)
    if args.prosody == "egemaps":
        sizes["prosody"] = (model.config.prosody_dim,)
    if shape.speaker_dim:
        sizes["speaker"] = (shape.speaker_dim,)
    if shape.vector_dims:
        sizes["vectors"] = (sum(shape.vector_dims),)
    turns = args.context if size % args.context == 0 else 1
    with next(model.parameters()).device:
        batch = {name: torch.rand(size, *dims) for name, dims in sizes.items()}
        batch["chunk_index"] = torch.arange(size).reshape(-1, turns)
        batch[mask] = torch.ones(size, length, dtype=torch.bool)
    for name in ("stream", "hidden"):  # as the cache holds them
        if name in batch:
            batch[name] = batch[name].to(step.stored_dtype(name, args))
    return batch


def evaluation_size(shape: data.InputShape) -> int:
    """Utterances of shape.length in one of evaluation's batches, whose size no flag decides."""
    return max(1, int(data.EVAL_SECONDS * shape.rate / shape.length))


def encode(
    model: EmotionModel, args: argparse.Namespace, shape: data.InputShape, part: str = "evaluation"
) -> None:
    """Runs one of evaluation's batches, of random values, or only what is "frozen" of it."""
    batch = make_batch(model, args, shape, evaluation_size(shape), cached=False)
    with step.inference(model), step.autocast(batch["labels"].device, args.amp):
        batch = model.encode_frozen(batch)
        if part == "evaluation":
            model.encode(batch)


def with_flags(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | changes)


def with_batch(args: argparse.Namespace, size: int, world_size: int) -> argparse.Namespace:
    """A copy of the flags with another micro-batch; unless --batch_size is auto, the accumulation
    stays, not the global batch."""
    copy = with_flags(args)
    if args.batch_size != "auto":
        copy.global_batch_size = None
    flags.split_batch(copy, size, world_size)
    return copy


def capacity_gib(args: argparse.Namespace) -> float:
    """Memory there is to fill: --gpu_gib, or else the GPU here, or the free RAM of a CPU."""
    if not uses_cuda(args.device):
        free = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        return int(free[1]) * 1024 / GIB
    gib = args.gpu_gib or flags.GPU_GIB
    if torch.cuda.is_available() and not args.gpu_gib:
        gib = torch.cuda.mem_get_info()[1] / GIB
    return gib * (args.memory_fraction or 1.0)


class Planner:
    """Plans of a run, and of the same run with other batch sizes or stages; each trace is made
    once. `args` of a method are the run's flags, with another batch size perhaps."""

    def __init__(
        self, args: argparse.Namespace, shape: data.InputShape, world_size: int = 1
    ) -> None:
        self.args, self.shape, self.world_size = args, shape, world_size
        self.on_gpu = uses_cuda(args.device)
        self.capacity_gib = capacity_gib(args)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.traces: dict[tuple, Trace] = {}

    @functools.cached_property
    def workspaces(self) -> int:
        """Bytes that cuBLAS holds."""
        if not self.on_gpu:
            return 0
        gpu = getattr(self.args, "gpu", None)
        hopper = gpu in HOPPER
        if torch.cuda.is_available() and not gpu:
            hopper = torch.cuda.get_device_capability()[0] >= 9
        return 2 * (HOPPER_CUBLAS_BYTES if hopper else CUBLAS_BYTES)

    @functools.cached_property
    def model(self) -> EmotionModel:
        args = self.args
        if args.attention == "fused" and not self.on_gpu:
            args = with_flags(args, attention="blocks")
        with torch.device("meta"), tracing.Tracker(False):  # which makes it fast
            return step.build_model(args, self.shape, load=False)

    def trace(self, args: argparse.Namespace, stage: str, what: str = "step") -> Trace:
        """A later step of `stage` (optimizer states exist), a batch of "evaluation" in it, or the
        "frozen" part of that.

        Of several micro-steps the last one runs, which finds gradients in place and the inputs of
        all of them.
        """
        accumulation = args.gradient_accumulation_steps if what == "step" else 1
        key = (stage, what, (args.batch_size, accumulation) if what == "step" else ())
        if key in self.traces:
            return self.traces[key]
        if stage not in self.optimizers:
            its_flags = with_flags(args, unfreeze=stage)
            self.optimizers[stage] = step.build_optimizer(self.model, its_flags)
        step.set_trainable(self.model, stage, args.train_only)
        self.model.train()
        inputs, batch = [], {}
        if what == "step":
            cached = step.reads_cache(args, stage)
            batch = make_batch(self.model, args, self.shape, args.batch_size, cached)
            others = (accumulation - 1) * self.held_bytes(batch, args)
            inputs = [*batch.values(), torch.empty(others, dtype=torch.uint8, device="meta")]

        def run(optimizer: tracing.InPlace) -> None:
            if what != "step":
                encode(self.model, args, self.shape, what)
                return
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            batches = [batch | {"step_size": (args.batch_size,)}]
            with distributed.without_ranks():
                step.train_step(self.model, batches, optimizer, scaler, args, Progress())

        self.traces[key] = tracing.trace(
            self.model, self.optimizers[stage], run, inputs, on_gpu=self.on_gpu,
            with_gradients=accumulation > 1 or self.world_size > 1, workspaces=self.workspaces,
        )  # fmt: skip
        return self.traces[key]

    def held_bytes(self, batch: dict[str, Tensor], args: argparse.Namespace) -> int:
        """Bytes that a micro-batch holds while the others run: exact CCC has put what the frozen
        part makes of the audio in its place."""
        held = sum(tensor.nbytes for tensor in batch.values())
        if "input_values" not in batch or args.exact_ccc == "off" or args.loss == "mse":
            return held
        size, samples = batch["input_values"].shape
        shapes = self.model.frozen_shapes(samples)
        if shapes and self.on_gpu:
            held -= batch["input_values"].nbytes + batch["attention_mask"].nbytes
        for name, shape in shapes.items():
            itemsize = 4 if name == "hidden" else AUTOCAST[args.amp].itemsize
            held += size * math.prod(shape) * itemsize
        return held

    def peaks(self, args: argparse.Namespace, unfreeze: str) -> dict[str, np.ndarray]:
        """{phase: bytes (KINDS,) at its highest moment}; of a schedule, of its heaviest stage."""
        peaks: dict[str, np.ndarray] = {}
        for stage in step.stages(unfreeze):
            evaluation = self.trace(args, stage, "evaluation").peaks()["forward"]
            found = self.trace(args, stage).peaks() | {"evaluation": evaluation}
            for phase, kinds in found.items():
                if phase not in peaks or kinds.sum() > peaks[phase].sum():
                    peaks[phase] = kinds
        return peaks

    def plan(self, args: argparse.Namespace) -> Plan:
        """The worst moment with utterances of shape.length, evaluation included."""
        seconds = args.batch_size * self.shape.length / self.shape.rate
        flops = {
            stage: (self.trace(args, stage).flops.sum(0) / seconds).tolist()
            for stage in step.stages(args.unfreeze)
        }
        return self.as_plan(args.batch_size, self.peaks(args, args.unfreeze), flops)

    def as_plan(
        self, size: int, peaks: dict[str, np.ndarray], flops: dict[str, list[float]]
    ) -> Plan:
        moment = max(peaks, key=lambda phase: peaks[phase].sum())
        kinds = dict(zip(KINDS, np.rint(peaks[moment]).astype(int).tolist()))
        peak = needed = sum(kinds.values()) / GIB
        if self.on_gpu:
            needed = peak * (1 + ALLOCATOR_SLACK) + CONTEXT_GIB
            needed += NCCL_GIB if self.world_size > 1 else 0.0
        share = needed / self.capacity_gib
        verdict = "fits" if share < FITS else "tight" if share < TIGHT else "does not fit"
        return Plan(kinds, moment, size, peak, needed, self.capacity_gib, verdict, flops)

    def line(self, unfreeze: str) -> Callable[[int], Plan]:
        """size -> plan, from the line through two traced sizes.

        Below them, where the frozen CNN's slices are not full, from the line to the smallest size:
        the highest moment is a convex function of the size, so that errs on the safe side.
        """
        given = with_flags(self.args, global_batch_size=None)
        one, few = given.context, given.context * math.ceil(8 / given.context)
        traced = {
            size: self.peaks(with_batch(given, size, self.world_size), unfreeze)
            for size in (one, few, 4 * few)
        }

        def at(size: int) -> Plan:
            low, high = (one, few) if size < few else (few, 4 * few)
            share = (size - low) / (high - low)
            peaks = {p: a + share * (traced[high][p] - a) for p, a in traced[low].items()}
            return self.as_plan(size, peaks, {})

        return at


def plan_run(
    args: argparse.Namespace, shape: data.InputShape, model: EmotionModel, world_size: int
) -> Plan | None:
    """The plan of a run; None, with a line in the log, if its step looks at values of tensors, as a
    changed one may: on the meta device they have none."""
    if args.encoder == "wavlm":  # a trial may have replaced the kernel of --attention
        args = with_flags(args, attention=model.encoder.wavlm.attention)
    try:
        return Planner(args, shape, world_size).plan(args)
    except (RuntimeError, TypeError) as error:
        text = str(error).partition("\n")[0]
        if "meta" not in text.lower():
            raise
        log.warning(
            f"memory is not planned, torch's meta device cannot run this step: {text[:160]}"
        )
        return None


# ---------------------------------------------------------------------------------------------
# The largest batch, for --batch_size auto


def batch_sizes(args: argparse.Namespace, world_size: int, largest: int = 1024) -> list[int]:
    """Micro-batches of complete chunks of turns; those that divide --global_batch_size, if given.
    UserError if there is none."""
    sizes = list(range(args.context, largest + 1, args.context))
    if args.global_batch_size:
        sizes = [size for size in sizes if args.global_batch_size % (size * world_size) == 0]
    if not sizes:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} is not a multiple of "
            f"--context {args.context} x {world_size} ranks"
        )
    return sizes


def largest_batch(
    args: argparse.Namespace, shape: data.InputShape, world_size: int, largest: int = 1024
) -> Plan:
    """The plan of the largest micro-batch up to `largest` that fits, by the line over batch sizes
    and by a trace of its own; UserError if none does."""
    planner = Planner(args, shape, world_size)
    sizes, line = batch_sizes(args, world_size, largest), planner.line(args.unfreeze)
    fitting = [size for size in sizes if line(size).verdict == "fits"] or sizes[:1]
    for size in fitting[:: -max(1, len(fitting) // 20)]:  # the largest first, in steps of 5 %
        found = planner.plan(with_batch(args, size, world_size))
        if found.verdict == "fits":
            return found
    raise UserError(
        f"--batch_size auto: {size} utterances of {shape.length / shape.rate:g} s need "
        f"{found.needed_gib:.1f} GiB, more than {FITS:.0%} of {planner.capacity_gib:.1f}: "
        f"{LESS_MEMORY}"
    )


def random_step(
    model: EmotionModel,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    shape: data.InputShape,
    stage: str,
) -> None:
    """A training step of `stage` on random utterances (all ranks participate)."""
    step.set_trainable(model, stage, args.train_only)
    device, cached = next(model.parameters()).device, step.reads_cache(args, stage)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=args.amp == "fp16")

    def update() -> None:
        batches = []
        for _ in range(args.gradient_accumulation_steps):
            batch = make_batch(model, args, shape, args.batch_size, cached)
            batches.append(batch | {"step_size": (args.global_batch_size,)})
        step.train_step(model, batches, optimizer, scaler, args, Progress())

    distributed.guard_memory(update, model, step.zero_sums(device, args))


# ---------------------------------------------------------------------------------------------
# Hours: operations at a machine's rate


@dataclass
class Machine:
    """Rates that turn operations into seconds."""

    name: str
    half_tflops: float
    single_tflops: float
    utilization: tuple[float, float]  # lowest and highest share of these rates
    source: str

    def hours(self, flops: np.ndarray) -> np.ndarray:
        """(fewest, most) hours of flops (2,) in half and in single precision."""
        seconds = flops[0] / self.half_tflops / 1e12 + flops[1] / self.single_tflops / 1e12
        return seconds / np.array(self.utilization[::-1]) / 3600


def known_gpu(name: str) -> str | None:
    """Which of GPUS "NVIDIA GeForce RTX 4090" is; an L40S is no L4, and a T400 no T4."""

    def spaced(gpu: str) -> str:
        return re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", " ?", gpu)

    return next((gpu for gpu in GPUS if re.search(rf"\b{spaced(gpu)}\b", name.lower())), None)


def device_name(args: argparse.Namespace) -> str:
    """Name of the device that --device or --gpu means; an RTX 4090 if there is none."""
    if not uses_cuda(args.device):
        return distributed.device_name(torch.device("cpu"))
    if torch.cuda.is_available() and not args.gpu:
        return distributed.device_name(torch.device("cuda"))
    return args.gpu or "rtx4090"


def machine(args: argparse.Namespace) -> Machine:
    """What --calibrate found here, else the published peak of the card."""
    name = device_name(args)
    known = runs.read_json(Path(args.cache_dir) / "machine.json").get(name)
    if known:
        return Machine(**known)
    if not uses_cuda(args.device):
        peak = CPU_TFLOPS * torch.get_num_threads()
        return Machine("this CPU", peak, peak, UTILIZATION, "a guess: --calibrate")
    gpu = known_gpu(name) or "rtx4090"
    utilization = HOPPER_UTILIZATION if gpu in HOPPER else UTILIZATION
    low, high = utilization
    source = f"{low:.0%} to {high:.0%} of its published peak (--calibrate narrows it)"
    return Machine(gpu, *GPUS[gpu][1:], utilization, source)


def achieved(
    found: Plan, stage: str, audio_speed: float, ranks: distributed.Ranks
) -> dict[str, float]:
    """A speed in seconds of audio per second as "tflops" of all ranks, with padding and without
    exact CCC's first forward, and as "peak_share" of a card whose published peak is known."""
    tera = np.array(found.flops[stage]) * audio_speed / 1e12
    speeds = {"tflops": float(tera.sum())}
    gpu = known_gpu(distributed.device_name(ranks.device)) if ranks.cuda else None
    if gpu:
        speeds["peak_share"] = float((tera / GPUS[gpu][1:]).sum() / ranks.world_size)
    return speeds


def calibrate(args: argparse.Namespace) -> None:
    """Measures a real step of two layers of WavLM-Large here, and keeps the rates in
    --cache_dir."""
    device = torch.device("cuda" if uses_cuda(args.device) else "cpu")
    rates = []
    for amp in ("fp16" if device.type == "cuda" else "bf16", "off"):
        words = "--wavlm large --layers 2 --unfreeze transformer --prosody none --batch_size 4"
        words += f" --max_seconds 5 --device {device} --amp {amp}"
        setting = flags.parse_args(words.split(), 1)
        shape = shape_of(setting)
        model = step.build_model(setting, shape).to(device)
        optimizer = step.build_optimizer(model, setting)
        seconds = []
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            random_step(model, optimizer, setting, shape, "transformer")
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        work = Planner(setting, shape).trace(setting, "transformer").flops.sum()
        rates.append(work / statistics.median(seconds[1:]) / 1e12)
    name, source = distributed.device_name(device), f"calibrated {time.strftime('%F')}"
    found = Machine(name, *rates, (1.0, 1.0), source)
    path = Path(args.cache_dir) / "machine.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(runs.read_json(path) | {name: asdict(found)}, indent=1))
    print(f"{name}: {rates[0]:.3f} TFLOPS in half precision, {rates[1]:.3f} in single: {path}")


def finished_speed(args: argparse.Namespace) -> float | None:
    """Seconds of audio per second of a finished run below --out, on this device and with these
    settings; None without one."""
    out = Path(args.out)
    for path in (*out.glob("*/fold*/result.json"), *out.glob("*/seed*/fold*/result.json")):
        result, given = runs.read_json(path), runs.read_json(path.with_name("args.json"))
        given["wavlm"] = KNOWN_SHAPES.get(given.get("wavlm"), given.get("wavlm"))
        same = all(given.get(name) == getattr(args, name) for name in SPEED_FLAGS)
        if same and result.get("device") == device_name(args):
            return result.get("audio_seconds_per_second")
    return None


@dataclass
class Clips:
    """Seconds of audio in a fold's splits, and where they are from."""

    seconds: dict[str, float]  # train, dev, test
    count: int  # utterances
    folds: int
    source: str


def clips(args: argparse.Namespace, from_data: bool) -> Clips:
    """Those of the corpus if --data was given, else as many as in IEMOCAP's fold 1."""
    if from_data:
        corpus = data.load_corpus(args)[0]
        lengths = np.minimum(corpus.seconds, args.max_seconds)
        splits = make_splits(corpus, args.fold)
        seconds = {name: float(lengths[rows].sum()) for name, rows in splits.items()}
        return Clips(seconds, len(lengths), num_folds(corpus), args.data)
    counts = {"train": 6409, "dev": 1811, "test": 1819}  # log-normal, mean 4.46 s [measured]
    lengths = np.exp(np.random.default_rng(0).normal(1.26, 0.66, 10_000)).clip(0.585, 34.14)
    mean = float(np.minimum(lengths, args.max_seconds).mean())
    seconds = {name: count * mean for name, count in counts.items()}
    source = "IEMOCAP's number and lengths of utterances (--data: yours)"
    return Clips(seconds, sum(counts.values()), 5, source)


def fold_flops(planner: Planner, unfreeze: str, audio: Clips) -> np.ndarray:
    """(2,) operations of a fold in half and in single precision, on each rank: those per second of
    the longest utterances, times seconds of audio with padding."""
    args, longest = planner.args, planner.shape.length / planner.shape.rate
    trained, evaluated = args.batch_size * longest, evaluation_size(planner.shape) * longest
    total = np.zeros(2)
    counts = Counter(step.stage_at(unfreeze, epoch) for epoch in range(args.epochs))
    for stage, epochs in counts.items():
        encode = planner.trace(args, stage, "evaluation").flops.sum(0) / evaluated
        frozen = planner.trace(args, stage, "frozen").flops.sum(0) / evaluated
        per_second = planner.trace(args, stage).flops.sum(0) / trained
        if args.exact_ccc == "on" and args.loss == "ccc":  # all micro-steps but one run twice
            per_second = per_second + (1 - 1 / args.gradient_accumulation_steps) * (encode - frozen)
        if step.reads_cache(args, stage):
            total += frozen * sum(audio.seconds.values())
            encode = encode - frozen
        total += epochs * per_second * audio.seconds["train"]
        total += epochs / args.eval_every * encode * audio.seconds["dev"]
    return PADDED * total / planner.world_size


def cache_gib(planner: Planner, unfreeze: str, audio: Clips) -> float:
    """Size of the caches of frozen parts, which all folds share."""
    args, total = planner.args, 0.0
    samples = int(data.SAMPLE_RATE * sum(audio.seconds.values()) / audio.count)
    for stage in step.stages(unfreeze):
        if step.reads_cache(args, stage):
            step.set_trainable(planner.model, stage, args.train_only)
            total += audio.count * step.cached_bytes(planner.model, args, samples)
    return total / GIB


def hours(planner: Planner, own: argparse.Namespace, audio: Clips, unfreeze: str) -> dict:
    """(fewest, most) hours of a fold and of all folds on --gpus, and what they follow from."""
    args, speed = planner.args, machine(planner.args)
    of_fold, source = speed.hours(fold_flops(planner, unfreeze, audio)), speed.source
    measured = finished_speed(args) if unfreeze == args.unfreeze else None
    if measured:
        of_fold = np.full(2, args.epochs * audio.seconds["train"] / measured / 3600)
        source = "a finished run here"
    rounds = math.ceil(audio.folds / (own.gpus // own.world_size))
    return {
        "fold": of_fold.tolist(), "all_folds": (rounds * of_fold).tolist(),
        "cache_gib": cache_gib(planner, unfreeze, audio), "folds": audio.folds,
        "machine": speed.name, "source": source, "clips": audio.source,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Command line


def file_width(directory: str, ndim: int) -> int | None:
    """Width of the first .npy file there."""
    file = next(iter(sorted(Path(directory).glob("*.npy"))), None)
    return data.open_npy(file, ndim, None).shape[-1] if file else None


def shape_of(args: argparse.Namespace, from_data: bool = False) -> data.InputShape:
    """What the flags lead to without a corpus; widths are read from a file if there is one.

    UserError if --features_dir or --vectors holds none. The rate of features is that of the corpus
    if --data was given.
    """
    speaker = {"none": 0, "ecapa": 192, "xvector": 512}.get(args.speaker)
    if speaker is None:
        speaker = file_width(args.speaker, 1) or 512  # an x-vector model
    frames, rate = 0, data.SAMPLE_RATE
    if args.features_dir:
        frames, rate = file_width(args.features_dir, 2), args.feature_rate
        if frames is None:
            raise UserError(f"--features_dir {args.features_dir}: no <utt_id>.npy there")
        if not rate and from_data:
            rate = data.FrameFeatures(data.load_corpus(args)[0], args.features_dir).rate
        elif not rate:
            rate = data.FRAME_RATE
            fix = "give --feature_rate, or --data"
            print(f"feature files of {rate} frames per second are assumed: {fix}", file=sys.stderr)
    vectors = tuple(file_width(directory, 1) for directory in args.vectors or ())
    if None in vectors:
        raise UserError(f"--vectors {' '.join(args.vectors)}: no <utt_id>.npy in one of them")
    return data.InputShape(speaker, frames, max(1, int(args.max_seconds * rate)), rate, vectors)


def comparable(args: argparse.Namespace) -> list[str]:
    """What --unfreeze is compared with; an encoder other than WavLM has nothing to freeze."""
    if args.encoder != "wavlm" or args.train_only:
        return [args.unfreeze]
    top = min(6, max(args.layers or [read_config(args.wavlm).num_hidden_layers]))
    third = max(1, args.epochs // 3)
    rows = ["none", f"top:{top}", "all", args.unfreeze]
    if args.epochs >= 3 and "," not in args.unfreeze:
        rows.append(f"1:none,{third + 1}:top:{top},{2 * third + 1}:all")
    return list(dict.fromkeys(rows))


def plan_text(args: argparse.Namespace, found: Plan) -> str:
    """A plan for a person."""
    model = args.wavlm if args.encoder == "wavlm" else args.encoder
    on_gpu, peak = uses_cuda(args.device), sum(found.bytes.values())
    lines = [
        f"{model} | unfreeze {args.unfreeze} | batch {args.batch_size} x "
        f"{args.gradient_accumulation_steps} micro-steps of {args.max_seconds:g} s | "
        f"amp {args.amp} | {'GPU' if on_gpu else 'RAM'} of {found.capacity_gib:.1f} GiB",
        "",
    ]
    for kind, size in found.bytes.items():
        if size:
            bar = "#" * round(40 * size / peak)
            lines.append(f"{kind:<16}{size / GIB:>8.2f} GiB  {bar}".rstrip())
    lines.append(f"{'peak':<16}{found.peak_gib:>8.2f} GiB  in {found.moment}")
    if on_gpu:
        lines.append(
            f"{'card must have':<16}{found.needed_gib:>8.2f} GiB  with the allocator's slack and "
            f"CUDA's context: {found.verdict}"
        )
    return "\n".join(lines)


def span(hours: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in hours)
    return low if low == high else f"{low}-{high}"


def table_text(planner: Planner, own: argparse.Namespace, audio: Clips) -> str:
    """Bytes at other batch sizes and hours, for each choice of --unfreeze."""
    args, mark = planner.args, {"fits": " ", "tight": "?", "does not fit": "!"}
    every = batch_sizes(with_flags(args, global_batch_size=None), own.world_size)
    all_folds = f"{audio.folds} folds, {own.gpus} GPU" + ("s" if own.gpus > 1 else "")
    without_lora = Planner(with_flags(args, lora=0), planner.shape, planner.world_size)
    rows, sources = {}, []
    for unfreeze in comparable(args):
        row_planner = planner if "lora" in unfreeze or not args.lora else without_lora
        line, cost = row_planner.line(unfreeze), hours(row_planner, own, audio, unfreeze)
        row = {}
        for size in (args.context * n for n in BATCHES):
            row[size] = f"{line(size).needed_gib:.2f}{mark[line(size).verdict]}"
        row["largest"] = max((n for n in every if line(n).verdict == "fits"), default=0)
        row |= {"h per fold": span(cost["fold"]), all_folds: span(cost["all_folds"])}
        row["cache GiB"] = f"{cost['cache_gib']:.2f}"
        rows[unfreeze] = row
        sources.append(cost["source"])
    table = pd.DataFrame(rows.values(), index=list(rows))
    table.columns.name = "GiB at batch size"
    sources = ", ".join(dict.fromkeys(sources))
    return (
        f"{table.to_string()}\n(? tight, ! does not fit {planner.capacity_gib:.1f} GiB)\n"
        f"({args.epochs} epochs, {audio.source}; {cost['machine']}: {sources})"
    )


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """(train.py's flags, our own); --device defaults to cuda, planned for without one.

    Exits with code 2 and one line on a wrong flag.
    """
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="and every flag of train.py (python train.py --help)",
        usage="python memory.py [its own flags] [train.py's flags]",
        allow_abbrev=False,
    )
    # fmt: off
    p.add_argument("--gpu", choices=sorted(GPUS), help="card to plan for: its memory and speed")
    p.add_argument("--gpus", type=int, help="cards for the folds; default: --world_size")
    p.add_argument("--world_size", type=int, default=1, help="cards that share a fold (DDP)")
    p.add_argument("--json", action="store_true",
        help="the plan and hours of this setting as JSON, without the table")
    p.add_argument("--calibrate", action="store_true", help="measure this machine's speed and stop")
    # fmt: on
    own, rest = p.parse_known_args(argv)
    own.gpus = own.world_size if own.gpus is None else own.gpus
    if not 1 <= own.world_size <= own.gpus:
        p.error(f"--world_size {own.world_size} --gpus {own.gpus}: need 1 <= world_size <= gpus")
    given = {word.partition("=")[0] for word in rest}
    own.from_data = "--data" in given
    if own.gpu and "--gpu_gib" not in given:
        rest += ["--gpu_gib", str(GPUS[own.gpu][0])]
    default = "auto" if own.calibrate else "cuda"  # planned for without one
    args = flags.parse_args(rest, own.world_size, device=default)
    args.gpu = own.gpu
    args.wavlm = KNOWN_SHAPES.get(args.wavlm, args.wavlm)
    if own.gpu and args.device == "cpu":
        p.error("--gpu is a card to plan for: remove it, or --device cpu")
    return args, own


def run(args: argparse.Namespace, own: argparse.Namespace) -> None:
    """Prints what was asked for; UserError on what cannot be planned."""
    distributed.allow_tf32(args.tf32 == "on")
    if own.calibrate:
        calibrate(args)
        return
    shape = shape_of(args, own.from_data)
    if args.batch_size == "auto":
        best = largest_batch(args, shape, own.world_size)
        flags.split_batch(args, best.batch_size, own.world_size)
    planner = Planner(args, shape, own.world_size)
    found, audio = planner.plan(args), clips(args, own.from_data)
    if own.json:
        cost = hours(planner, own, audio, args.unfreeze)
        print(json.dumps({"flags": vars(args), "plan": asdict(found), "hours": cost}, indent=1))
    else:
        print(plan_text(args, found), flush=True)
        print(f"\n{table_text(planner, own, audio)}")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 2 with one line on what cannot be planned."""
    args, own = parse_args(argv)
    return run_script("memory.py", lambda: run(args, own))


if __name__ == "__main__":
    sys.exit(main())
