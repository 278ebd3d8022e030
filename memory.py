"""Bytes and hours of training before it is run, for exactly the flags that train.py takes.

    python memory.py --wavlm large --unfreeze all --batch_size 8 --max_seconds 8
    python memory.py --wavlm large --unfreeze all --batch_size auto --gpu rtx3090 --json
    python memory.py --preset full --data iemocap --data_dir D --gpus 4
    python memory.py --calibrate        # measures this machine's speed once, in under a minute

The bytes are those of step.train_step on the meta device (util/tracing.py), so a changed model is
planned with no line changed here. In every phase of a step they are linear in the batch size: two
traces give the line, and one more confirms the batch it proposes. The hours are the floating-point
operations of that step at a machine's rate. Also here: the search behind --batch_size auto.

tests/bench_memory.py compares plans with real steps. GiB = 2^30 bytes.
Tags: [measured] by us, [P] published, [guess].
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import data as vadata
import flags
import step
from corpora import Corpus, make_splits, num_folds, read_corpus
from model import TARGETS, EmotionModel
from step import Progress
from util import distributed, tracing
from util.distributed import GIB, capacity_gib, uses_cuda
from util.files import UserError
from util.tracing import KINDS, Trace
from wavlm import read_config

CONTEXT_GIB, NCCL_GIB = 0.45, 0.4  # outside the allocator: CUDA context with its kernels [guess]
ALLOCATOR_SLACK = 0.02  # of the peak, lost in the allocator's segments [guess]
FITS, TIGHT = 0.90, 0.97  # shares of the card: clips of many lengths fragment what is reserved
CUBLAS_BYTES, HOPPER_CUBLAS_BYTES = 8_519_680, 2**25  # per thread: forward's and backward's [P]
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PADDED = 1.06  # seconds with padding per second of audio, in batches of like length [measured]
UTILIZATION = (0.1, 0.5)  # share of a card's published peak that training reaches [guess]
CPU_TFLOPS = 0.05  # of one core, float32 [guess]

# GiB, dense half-precision and TF32 (float32 if a card has no TF32) TFLOPS [P: vendors]
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
    "context", "feature_cache", "augment", "exact_ccc",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The plan


@dataclass
class Plan:
    """Bytes at the worst moment, by kind; they add up to peak_bytes."""

    bytes: dict[str, int]  # by KINDS
    moment: str  # forward | backward | optimizer | evaluation
    outside_gib: float  # beside the allocator: CUDA context, NCCL
    capacity_gib: float  # of the card, or free RAM
    batch_size: int
    on_gpu: bool

    @property
    def peak_bytes(self) -> int:
        """Tensors alone: what torch.cuda.max_memory_allocated shows."""
        return sum(self.bytes.values())

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / GIB

    @property
    def needed_gib(self) -> float:
        """What the card must have."""
        return self.peak_gib * (1 + ALLOCATOR_SLACK * self.on_gpu) + self.outside_gib

    @property
    def verdict(self) -> str:
        share = self.needed_gib / self.capacity_gib
        return "fits" if share < FITS else "tight" if share < TIGHT else "does not fit"

    def as_dict(self) -> dict:
        names = ("peak_bytes", "peak_gib", "needed_gib", "verdict")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def line(self) -> str:
        parts = ", ".join(f"{kind} {n / GIB:.2f}" for kind, n in self.bytes.items() if n)
        return (
            f"memory plan {self.peak_gib:.2f} GiB of tensors at the peak ({self.moment}): {parts} "
            f"| needs {self.needed_gib:.2f} of {self.capacity_gib:.1f} GiB: {self.verdict}"
        )


def make_batch(
    args: argparse.Namespace,
    shape: vadata.InputShape,
    size: int,
    device: torch.device,
    model: EmotionModel | None = None,
) -> dict[str, Tensor]:
    """A micro-batch of `size` utterances of shape.length, as data.Batches makes them, with random
    values. With `model`, its frozen encoder's hidden states take the place of audio."""

    def random(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(sizes, dtype=dtype, device=device)

    def real(frames: int) -> Tensor:
        return torch.ones(size, frames, dtype=torch.bool, device=device)

    turns = args.context if size % args.context == 0 else 1
    batch = {
        "labels": random(size, len(TARGETS)),
        "chunk_index": torch.arange(size, device=device).reshape(-1, turns),
    }
    if model is not None:
        hidden = (model.encoder.num_states, model.encoder.width)
        if args.pooling == "attention":
            frames = model.encoder.wavlm.frame_lengths(shape.length)
            batch["hidden"] = random(size, frames, *hidden, dtype=torch.float16)
            batch["frame_mask"] = real(frames)
        else:
            batch["hidden"] = random(size, *hidden, dtype=torch.float16)
    elif shape.frame_dim:
        batch["frames"] = random(size, shape.length, shape.frame_dim)
        batch["frame_mask"] = real(shape.length)
    else:
        samples = max(vadata.MIN_SAMPLES, shape.length)
        batch["input_values"], batch["attention_mask"] = random(size, samples), real(samples)
    if args.prosody == "egemaps":
        batch["prosody"] = random(size, 88)
    if shape.speaker_dim:
        batch["speaker"] = random(size, shape.speaker_dim)
    return batch


def evaluation_size(shape: vadata.InputShape) -> int:
    """Utterances of shape.length in one of evaluation's batches, whose size no flag decides."""
    return max(1, int(vadata.EVAL_SECONDS * shape.rate / shape.length))


def with_flags(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | changes)


def with_batch(args: argparse.Namespace, size: int, world_size: int) -> argparse.Namespace:
    """A copy of the flags with another micro-batch, and what follows from it.

    As with --batch_size auto if that was given; else the accumulation stays, not the global batch.
    """
    copy = with_flags(args)
    if args.batch_size != "auto":
        copy.global_batch_size = None
    flags.split_batch(copy, size, world_size)
    return copy


class Planner:
    """Plans of a run's flags and of variations of them; each trace is made once."""

    def __init__(
        self, args: argparse.Namespace, shape: vadata.InputShape, world_size: int = 1
    ) -> None:
        self.args, self.shape, self.world_size = args, shape, world_size
        self.on_gpu = uses_cuda(args.device)
        self.capacity_gib = capacity_gib(args.device, args.gpu_gib, args.memory_fraction)
        self.models: dict[str, EmotionModel] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.traces: dict[str, Trace] = {}

    def model(self, args: argparse.Namespace, stage: str) -> tuple[EmotionModel, object]:
        """(model on the meta device as `stage` trains it, its optimizer)."""
        if args.attention == "fused" and not self.on_gpu:
            args = with_flags(args, attention="blocks")
        key = repr((args.attention, args.layers, args.gradient_checkpointing))
        if key not in self.models:
            with torch.device("meta"), tracing.Tracker(False):  # which makes it fast
                self.models[key] = step.build_model(args, self.shape, load=False)
        model = self.models[key]
        if key + stage not in self.optimizers:
            self.optimizers[key + stage] = step.build_optimizer(
                model, with_flags(args, unfreeze=stage)
            )
        step.set_trainable(model, stage, args.train_only)
        return model, self.optimizers[key + stage]

    def trace(self, args: argparse.Namespace, stage: str, evaluate: bool = False) -> Trace:
        """A later step of `stage` (optimizer states exist), or a batch of evaluation in it.

        Of several micro-steps the last one runs, which finds gradients in place and the inputs of
        all of them.
        """
        if evaluate:
            args = with_flags(args, gradient_accumulation_steps=1, batch_size=1)
        settings = (stage, evaluate, args.batch_size, args.gradient_accumulation_steps, args.amp)
        settings += (args.attention, args.layers, args.gradient_checkpointing)
        key = repr(settings)
        if key not in self.traces:
            run = self.evaluate if evaluate else self.step
            self.traces[key] = run(args, stage)
        return self.traces[key]

    def step(self, args: argparse.Namespace, stage: str) -> Trace:
        model, optimizer = self.model(args, stage)
        model.train()
        meta, accumulation = torch.device("meta"), args.gradient_accumulation_steps
        frozen = model if step.reads_cache(args, stage) else None
        batch = make_batch(args, self.shape, args.batch_size, meta, frozen)
        others = (accumulation - 1) * sum(tensor.nbytes for tensor in batch.values())
        inputs = [*batch.values(), torch.empty(others, dtype=torch.uint8, device=meta)]
        batches = [batch | {"step_size": args.batch_size}]
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        def update(optimizer: tracing.InPlace) -> None:
            with distributed.without_ranks():
                step.train_step(model, batches, optimizer, scaler, args, Progress())

        return tracing.trace(
            model, optimizer, update, inputs, on_gpu=self.on_gpu, workspaces=self.workspaces(),
            with_gradients=accumulation > 1 or self.world_size > 1,
        )  # fmt: skip

    def evaluate(self, args: argparse.Namespace, stage: str) -> Trace:
        model, optimizer = self.model(args, stage)
        size = evaluation_size(self.shape)
        batch = make_batch(args, self.shape, size, torch.device("meta"))

        def encode(_: object) -> None:
            with step.inference(model), step.autocast(torch.device("meta"), args.amp):
                model.encode(batch)

        return tracing.trace(
            model, optimizer, encode, batch.values(), on_gpu=self.on_gpu,
            workspaces=self.workspaces(), with_gradients=self.world_size > 1,
        )  # fmt: skip

    def workspaces(self) -> int:
        """Bytes that cuBLAS holds."""
        if not self.on_gpu:
            return 0
        hopper = getattr(self.args, "gpu", None) in HOPPER
        if torch.cuda.is_available():
            hopper = torch.cuda.get_device_capability()[0] >= 9
        return 2 * (HOPPER_CUBLAS_BYTES if hopper else CUBLAS_BYTES)

    def peaks(self, args: argparse.Namespace, unfreeze: str) -> dict[str, np.ndarray]:
        """{phase: bytes (KINDS,) at its highest moment}; of a schedule, of its heaviest stage."""
        peaks: dict[str, np.ndarray] = {}
        for stage in step.stages(unfreeze):
            evaluation = self.trace(args, stage, evaluate=True).peaks()["forward"]
            found = self.trace(args, stage).peaks() | {"evaluation": evaluation}
            for phase, kinds in found.items():
                if phase not in peaks or kinds.sum() > peaks[phase].sum():
                    peaks[phase] = kinds
        return peaks

    def as_plan(self, size: int, peaks: dict[str, np.ndarray]) -> Plan:
        moment = max(peaks, key=lambda phase: peaks[phase].sum())
        kinds = dict(zip(KINDS, np.rint(peaks[moment]).astype(int).tolist()))
        outside = 0.0
        if self.on_gpu:
            outside = CONTEXT_GIB + (NCCL_GIB if self.world_size > 1 else 0.0)
        return Plan(kinds, moment, outside, self.capacity_gib, size, self.on_gpu)

    def plan(self, args: argparse.Namespace, unfreeze: str | None = None) -> Plan:
        """The worst moment with utterances of shape.length, evaluation included."""
        return self.as_plan(args.batch_size, self.peaks(args, unfreeze or args.unfreeze))

    def line(self, args: argparse.Namespace, unfreeze: str) -> Callable[[int], Plan]:
        """size -> plan, from the line through two traced sizes.

        Below them, where the frozen CNN's slices are not full, from the line to the smallest size:
        the highest moment is a convex function of the size, so that errs on the safe side.
        """
        few = args.context * math.ceil(8 / args.context)
        given = args
        if args.batch_size == "auto":
            given = with_flags(args, global_batch_size=None)
        traced = {
            size: self.peaks(with_batch(given, size, self.world_size), unfreeze)
            for size in (args.context, few, 4 * few)
        }

        def at(size: int) -> Plan:
            low, high = (args.context, few) if size < few else (few, 4 * few)
            share = (size - low) / (high - low)
            one, two = traced[low], traced[high]
            return self.as_plan(size, {p: one[p] + share * (two[p] - one[p]) for p in one})

        return at

    def largest(
        self, args: argparse.Namespace, sizes: Sequence[int], line: Callable[[int], Plan]
    ) -> Plan | None:
        """A plan of the largest of `sizes` that fits by the line and by a trace of its own; None
        if the smallest does not."""
        fitting = [size for size in sizes if line(size).verdict == "fits"] or sizes[:1]
        while fitting:
            size = fitting[-1]
            found = self.plan(with_batch(args, size, self.world_size))
            if found.verdict == "fits":
                return found
            fitting = [n for n in fitting if n <= 0.95 * size]
        return None


def plan(args: argparse.Namespace, shape: vadata.InputShape, world_size: int = 1) -> Plan:
    """The plan of a run: the heaviest stage's worst moment, evaluation included."""
    return Planner(args, shape, world_size).plan(args)


# ---------------------------------------------------------------------------------------------
# --batch_size auto


def batch_sizes(args: argparse.Namespace, world_size: int, largest: int = 1024) -> list[int]:
    """Micro-batches of complete chunks of turns; those that divide --global_batch_size, if given.

    UserError if there is none.
    """
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
    args: argparse.Namespace, shape: vadata.InputShape, world_size: int, largest: int = 1024
) -> Plan:
    """The plan of the largest micro-batch up to `largest` that fits; UserError if none does."""
    sizes = batch_sizes(args, world_size, largest)
    planner = Planner(args, shape, world_size)
    best = planner.largest(args, sizes, planner.line(args, args.unfreeze))
    if best is None:
        needed = planner.plan(with_batch(args, sizes[0], world_size)).needed_gib
        raise UserError(
            f"--batch_size auto: {sizes[0]} utterances of {shape.length / shape.rate:g} s need "
            f"{needed:.1f} GiB, more than {FITS:.0%} of {planner.capacity_gib:.1f}: lower "
            "--max_seconds, unfreeze less, or give --gradient_checkpointing"
        )
    return best


def real_step(
    model: EmotionModel,
    args: argparse.Namespace,
    shape: vadata.InputShape,
    stage: str,
    device: torch.device,
) -> tuple[Callable[[], object], torch.optim.Optimizer]:
    """(a training step of `stage` on random utterances, its optimizer); all ranks call it."""
    optimizer = step.build_optimizer(model, with_flags(args, unfreeze=stage))
    step.set_trainable(model, stage, args.train_only)
    model.train()
    frozen = model if step.reads_cache(args, stage) else None
    batches = []
    for _ in range(args.gradient_accumulation_steps):
        batch = make_batch(args, shape, args.batch_size, device, frozen)
        batches.append(batch | {"step_size": args.global_batch_size})
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=args.amp == "fp16")

    def update() -> object:
        return step.train_step(model, batches, optimizer, scaler, args, Progress())

    return lambda: distributed.guard_memory(update, model, step.zero_sums(device)), optimizer


def fits_here(run: Callable[[], object]) -> bool:
    """Does run() find enough memory on every rank? (all ranks participate)"""
    found = True
    try:
        run()
    except (RuntimeError, MemoryError) as error:
        if not distributed.is_out_of_memory(error):
            raise
        found = False
    return not distributed.any_rank(not found)


def probe(
    model: EmotionModel, args: argparse.Namespace, shape: vadata.InputShape, device: torch.device
) -> bool:
    """True if steps of the longest utterances run in every stage, and a batch of evaluation.

    All ranks participate. The weights are put back. The second step has all optimizer states.
    """
    before = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    distributed.reset_peak(device)

    def evaluation() -> None:
        batch = make_batch(args, shape, evaluation_size(shape), device)
        with step.inference(model), step.autocast(device, args.amp):
            model.encode(batch)

    def steps(stage: str) -> bool:
        run, _ = real_step(model, args, shape, stage, device)
        return fits_here(run) and fits_here(run)

    try:
        return all(map(steps, step.stages(args.unfreeze))) and fits_here(evaluation)
    finally:
        model.zero_grad()
        model.load_state_dict(before)
        model.train()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def auto_batch(
    model: EmotionModel,
    args: argparse.Namespace,
    shape: vadata.InputShape,
    device: torch.device,
    world_size: int,
    largest: int,
) -> tuple[int, str]:
    """--batch_size auto: the plan proposes, a probe confirms, all ranks take the smallest.

    (micro-batch up to `largest`, how it was found) (all ranks participate); UserError if nothing
    fits.
    """
    sizes = batch_sizes(args, world_size, largest)
    fault = "--batch_size auto: nothing fits: lower --max_seconds, unfreeze less, or give "
    fault += "--gradient_checkpointing"
    try:
        size = largest_batch(args, shape, world_size, largest).batch_size
    except UserError as error:
        size, fault = 0, str(error)
    size = proposed = distributed.smallest(size)
    while size:
        trial = with_batch(args, size, world_size)
        trial.gradient_accumulation_steps = min(2, trial.gradient_accumulation_steps)
        if probe(model, trial, shape, device):
            peak = distributed.peak_gib(device)
            distributed.reset_peak(device)
            return size, f" | batch {size}, planned as {proposed} and probed at {peak:.2f} GiB"
        size = max((n for n in sizes if n <= 0.85 * size), default=0)
    raise UserError(fault)


def choose_batch(
    args: argparse.Namespace,
    fold: vadata.Fold,
    model: EmotionModel,
    ranks: distributed.Ranks,
    last: dict | None,
) -> str:
    """Sets the batch sizes that are not known yet; returns how one was found, for the log.

    `last`: content of last.pt, whose run had found its micro-batch. All ranks participate.
    """
    if last:
        flags.split_batch(
            args, last["batch_size"], ranks.world_size, total=last["global_batch_size"]
        )
    elif args.batch_size == "auto":
        largest = len(fold.splits["train"]) // (flags.AUTO_STEPS * ranks.world_size)
        size, note = auto_batch(
            model, args, fold.shape, ranks.device, ranks.world_size, max(args.context, largest)
        )
        flags.split_batch(args, size, ranks.world_size)
        return note
    return ""


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


def device_name(cuda: bool) -> str:
    return distributed.device_name(torch.device("cuda" if cuda else "cpu"))


def known_gpu(name: str) -> str | None:
    """Which of GPUS "NVIDIA GeForce RTX 4090" is; an L40S is no L4, and a T400 no T4."""

    def spaced(gpu: str) -> str:
        return re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", " ?", gpu)

    return next((gpu for gpu in GPUS if re.search(rf"\b{spaced(gpu)}\b", name.lower())), None)


def machine(args: argparse.Namespace, gpu: str | None = None) -> Machine:
    """--gpu's published peak, else what --calibrate found here, else this device's peak."""
    cuda = uses_cuda(args.device)
    here = not cuda or torch.cuda.is_available()
    path = Path(args.cache_dir) / "machine.json"
    if not gpu and here and path.exists():
        known = json.loads(path.read_text()).get(device_name(cuda), {})
        if "utilization" in known:
            return Machine(**known)
    low, high = UTILIZATION
    source = f"{low:.0%} to {high:.0%} of its published peak (--calibrate narrows it)"
    if not cuda:
        peak = CPU_TFLOPS * torch.get_num_threads()
        return Machine("this CPU", peak, peak, UTILIZATION, "a guess: --calibrate")
    if not gpu and here:
        gpu = known_gpu(device_name(cuda))
    gpu = gpu or "rtx4090"
    return Machine(gpu, GPUS[gpu][1], GPUS[gpu][2], UTILIZATION, source)


def calibrate(args: argparse.Namespace) -> Machine:
    """Measures a real step of two layers of WavLM-Large here, and keeps the rates in
    --cache_dir."""
    cuda, shape = uses_cuda(args.device), vadata.InputShape(0, 0, 5 * vadata.SAMPLE_RATE, 16_000)
    device, rates = torch.device("cuda" if cuda else "cpu"), []
    for amp in ("fp16" if cuda else "bf16", "off"):
        setting = with_flags(
            args, wavlm="large", layers=[2], unfreeze="transformer", amp=amp, prosody="none",
            speaker="none", encoder="wavlm", gradient_accumulation_steps=1, batch_size=4,
            global_batch_size=4,
        )  # fmt: skip
        model = step.build_model(setting, shape).to(device)
        run, _ = real_step(model, setting, shape, "transformer", device)
        work = Planner(setting, shape).trace(setting, "transformer").flops.sum()
        rates.append(work / median_seconds(run, cuda) / 1e12)
    found = Machine(device_name(cuda), *rates, (1.0, 1.0), f"calibrated {time.strftime('%F')}")
    path = Path(args.cache_dir) / "machine.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {found.name: asdict(found)}, indent=1))
    return found


def median_seconds(run: Callable[[], object], cuda: bool) -> float:
    times = []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def finished_speed(args: argparse.Namespace) -> float | None:
    """Seconds of audio per second of a finished run below --out, on this device and with these
    settings; None without one."""
    cuda = uses_cuda(args.device)
    if cuda and not torch.cuda.is_available():
        return None
    for path in sorted(Path(args.out).glob("*/fold*/result.json")):
        result = json.loads(path.read_text())
        given = json.loads((path.parent / "args.json").read_text())
        known = KNOWN_SHAPES.get(given.get("wavlm"), given.get("wavlm"))
        given["wavlm"] = known
        same = all(given.get(name) == getattr(args, name) for name in SPEED_FLAGS)
        if same and result.get("device") == device_name(cuda):
            return result["audio_seconds_per_second"]
    return None


@dataclass
class Clips:
    """Seconds of audio in a fold's splits, and where they are from."""

    seconds: dict[str, float]  # train, dev, test
    folds: int
    source: str


def decoded_corpus(args: argparse.Namespace) -> Corpus:
    """That of --data, with seconds."""
    label_range = tuple(args.label_range) if args.label_range else None
    corpus = read_corpus(args.data, args.data_dir, label_range, args.cache_dir)
    return vadata.load_audio(corpus, args.cache_dir)[0]


def clips(args: argparse.Namespace, from_data: bool) -> Clips:
    """Those of the corpus if --data was given, else as many as in IEMOCAP's fold 1."""
    if from_data:
        corpus = decoded_corpus(args)
        lengths = np.minimum(corpus.seconds, args.max_seconds)
        splits = make_splits(corpus, args.fold)
        seconds = {name: float(lengths[rows].sum()) for name, rows in splits.items()}
        return Clips(seconds, num_folds(corpus), args.data)
    counts = {"train": 6409, "dev": 1811, "test": 1819}  # log-normal, mean 4.46 s [measured]
    lengths = np.exp(np.random.default_rng(0).normal(1.26, 0.66, 10_000)).clip(0.585, 34.14)
    mean = float(np.minimum(lengths, args.max_seconds).mean())
    seconds = {name: count * mean for name, count in counts.items()}
    return Clips(seconds, 5, "IEMOCAP's number and lengths of utterances (--data: yours)")


def fold_flops(planner: Planner, args: argparse.Namespace, unfreeze: str, clips: Clips) -> float:
    """(2,) operations of a fold in half and in single precision, on each rank.

    Those per second of the longest utterances, times seconds of audio with padding.
    """
    longest = planner.shape.length / planner.shape.rate
    evaluation_seconds = evaluation_size(planner.shape) * longest
    total = np.zeros(2)
    counts = Counter(step.stage_at(unfreeze, epoch) for epoch in range(args.epochs))
    for stage, epochs in counts.items():
        trace = planner.trace(args, stage)
        encode = planner.trace(args, stage, evaluate=True).flops.sum(0) / evaluation_seconds
        per_second = trace.flops.sum(0) / (args.batch_size * longest)
        exact = args.exact_ccc == "on" and args.loss == "ccc"
        if exact and args.gradient_accumulation_steps > 1:  # one more forward
            per_second = per_second + trace.flops[0] / (args.batch_size * longest)
        total += epochs * per_second * clips.seconds["train"]
        if step.reads_cache(args, stage):
            total += encode * sum(clips.seconds.values())
        else:
            total += epochs / args.eval_every * encode * clips.seconds["dev"]
    return PADDED * total / planner.world_size


# ---------------------------------------------------------------------------------------------
# Answers


def shape_of(args: argparse.Namespace, from_data: bool = False) -> vadata.InputShape:
    """What the flags lead to without a corpus; widths are read from a file if there is one.

    UserError if --features_dir holds none. Its rate is that of the corpus if --data was given.
    """

    def width_of(directory: str) -> int | None:
        file = next(iter(sorted(Path(directory).glob("*.npy"))), None)
        return np.load(file, mmap_mode="r", allow_pickle=False).shape[-1] if file else None

    speaker = {"none": 0, "ecapa": 192, "xvector": 512}.get(args.speaker)
    if speaker is None:
        speaker = width_of(args.speaker) or 512  # an x-vector model
    frames, rate = 0, vadata.SAMPLE_RATE
    if args.features_dir:
        frames, rate = width_of(args.features_dir), args.feature_rate
        if frames is None:
            raise UserError(f"--features_dir {args.features_dir}: no <utt_id>.npy there")
        if not rate and from_data:
            rate = vadata.FrameFeatures(decoded_corpus(args), args.features_dir).rate
        elif not rate:
            rate = vadata.FRAME_RATE
            fix = "give --feature_rate, or --data"
            print(f"feature files of {rate} frames per second are assumed: {fix}", file=sys.stderr)
    return vadata.InputShape(speaker, frames, max(1, int(args.max_seconds * rate)), rate)


def comparable(args: argparse.Namespace) -> list[str]:
    """What --unfreeze is compared with; an encoder other than WavLM has nothing to freeze."""
    if args.encoder != "wavlm" or args.train_only:
        return [args.unfreeze]
    depth = max(args.layers or [read_config(args.wavlm).num_hidden_layers])
    top = min(6, depth)
    third = max(1, args.epochs // 3)
    rows = ["none", f"top:{top}", "all", args.unfreeze]
    if args.epochs >= 3 and "," not in args.unfreeze:
        rows.append(f"1:none,{third + 1}:top:{top},{2 * third + 1}:all")
    return list(dict.fromkeys(rows))


def switches(args: argparse.Namespace, can_checkpoint: bool) -> dict[str, dict[str, object]]:
    """Flags that save memory or time, one at a time, as changes to `args`."""
    found: dict[str, dict[str, object]] = {}
    half = "fp16" if uses_cuda(args.device) else "bf16"
    amp = half if args.amp == "off" else "off"
    found[f"--amp {amp}"] = {"amp": amp}
    if can_checkpoint:
        on = args.gradient_checkpointing
        name = "without --gradient_checkpointing" if on else "--gradient_checkpointing"
        found[name] = {"gradient_checkpointing": not on}
    if args.encoder == "wavlm":
        other = "eager" if args.attention != "eager" else "fused"
        found[f"--attention {other}"] = {"attention": other}
        depth = max(args.layers or [read_config(args.wavlm).num_hidden_layers])
        half_depth = sorted({max(1, round(depth * q / 8)) for q in (1, 2, 3, 4)})
        found["--layers " + " ".join(map(str, half_depth))] = {"layers": half_depth}
    return found


def answers(planner: Planner, own: argparse.Namespace) -> dict:
    """All that the command prints, in that order."""
    args, world_size = planner.args, planner.world_size
    audio, speed = clips(args, own.from_data), machine(args, own.gpu)
    sizes = [n for n in BATCHES if n % args.context == 0]
    if len(sizes) < 2:
        sizes = [n * args.context for n in BATCHES[:4]]
    every = batch_sizes(with_flags(args, global_batch_size=None), world_size)
    stage = step.stage_at(args.unfreeze, args.epochs - 1)
    table, largest, costs = {}, {}, []
    for what in comparable(args):
        if "," not in what:
            line = planner.line(args, what)
            table[what] = [line(size).as_dict() for size in sizes]
            fitting = [size for size in every if line(size).verdict == "fits"]
            largest[what] = max(fitting, default=0)
        hours = speed.hours(fold_flops(planner, args, what, audio))
        measured = finished_speed(args) if what == args.unfreeze and not own.gpu else None
        if measured:
            hours = np.full(2, args.epochs * audio.seconds["train"] / measured / 3600)
        rounds = math.ceil(audio.folds / max(1, own.gpus // world_size))
        costs.append(
            {
                "unfreeze": what,
                "needed_gib": planner.plan(args, what).needed_gib,
                "fold_hours": hours.tolist(),
                "series_hours": (audio.folds * hours).tolist(),
                "parallel_hours": (rounds * hours).tolist(),
                "source": "a finished run here" if measured else speed.source,
            }
        )
    can_checkpoint = step.can_checkpoint(planner.model(args, stage)[0])
    compute = speed.hours(planner.trace(args, stage).flops.sum(0))[0]
    effects = {}
    for name, changes in ({"as given": {}} | switches(args, can_checkpoint)).items():
        changed = with_flags(args, **changes)
        effects[name] = {
            "needed_gib": planner.plan(changed).needed_gib,
            "compute": float(
                speed.hours(planner.trace(changed, stage).flops.sum(0))[0] / max(compute, 1e-12)
            ),
        }
    return {
        "sizes": sizes,
        "table": table,
        "largest": largest,
        "switches": effects,
        "machine": asdict(speed),
        "clips": audio.source,
        "folds": audio.folds,
        "gpus": own.gpus,
        "costs": costs,
    }


def plan_text(args: argparse.Namespace, found: Plan) -> str:
    """A plan for a person."""
    model = args.wavlm if args.encoder == "wavlm" else args.encoder
    where = f"{'GPU' if found.on_gpu else 'RAM'} of {found.capacity_gib:.1f} GiB"
    lines = [
        f"{model} | unfreeze {args.unfreeze} | batch {args.batch_size} x "
        f"{args.gradient_accumulation_steps} micro-steps of {args.max_seconds:g} s | "
        f"amp {args.amp} | {where}",
        "",
    ]
    for kind, size in found.bytes.items():
        if size:
            bar = "#" * round(40 * size / found.peak_bytes)
            lines.append(f"{kind:<16}{size / GIB:>8.2f} GiB  {bar}".rstrip())
    lines.append(f"{'peak':<16}{found.peak_gib:>8.2f} GiB  in {found.moment}")
    if found.on_gpu:
        lines.append(
            f"{'card must have':<16}{found.needed_gib:>8.2f} GiB  with the allocator's slack and "
            f"CUDA's context: {found.verdict}"
        )
    return "\n".join(lines)


def tables_text(args: argparse.Namespace, found: dict, capacity: float) -> str:
    """`answers` for a person."""
    mark = {"fits": " ", "tight": "?", "does not fit": "!"}

    def gib(plan: dict) -> str:
        return f"{plan['needed_gib']:.2f}{mark[plan['verdict']]}"

    def span(hours: list[float]) -> str:
        low, high = (f"{value:.2f}" for value in hours)
        return low if low == high else f"{low}-{high}"

    rows = {what: [gib(plan) for plan in plans] for what, plans in found["table"].items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=found["sizes"])
    table["largest"] = pd.Series(found["largest"])
    table.columns.name = "GiB at batch size"
    blocks = [f"{table.to_string()}\n(? tight, ! does not fit {capacity:.1f} GiB)"]

    effects = pd.DataFrame.from_dict(found["switches"], orient="index")
    effects.columns = pd.Index(["GiB", "x compute"], name="one switch at a time")
    blocks.append(effects.to_string(float_format="%.2f"))

    parallel = f"on {found['gpus']} GPU" + ("s" if found["gpus"] > 1 else "")
    costs = pd.DataFrame(
        {
            "unfreeze": cost["unfreeze"],
            "GiB": f"{cost['needed_gib']:.2f}",
            "h per fold": span(cost["fold_hours"]),
            f"{found['folds']} folds": span(cost["series_hours"]),
            parallel: span(cost["parallel_hours"]),
        }
        for cost in found["costs"]
    )
    sources = dict.fromkeys(cost["source"] for cost in found["costs"])
    blocks.append(
        f"{costs.to_string(index=False)}\n({args.epochs} epochs, {found['clips']}; "
        f"{found['machine']['name']}: {', '.join(sources)})"
    )
    return "\n\n".join(blocks)


# ---------------------------------------------------------------------------------------------
# Command line


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
    p.add_argument("--json", action="store_true", help="the plan as JSON, without the tables")
    p.add_argument("--table", action="store_true", help="the tables too, with --json")
    p.add_argument("--calibrate", action="store_true", help="measure this machine's speed and stop")
    # fmt: on
    own, rest = p.parse_known_args(sys.argv[1:] if argv is None else argv)
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
    if own.calibrate:
        found = calibrate(args)
        print(
            f"{found.name}: {found.half_tflops:.3f} TFLOPS in half precision, "
            f"{found.single_tflops:.3f} in single: {Path(args.cache_dir) / 'machine.json'}"
        )
        return
    shape = shape_of(args, own.from_data)
    if args.batch_size == "auto":
        best = largest_batch(args, shape, own.world_size)
        flags.split_batch(args, best.batch_size, own.world_size)
    planner = Planner(args, shape, own.world_size)
    found = planner.plan(args)
    if not own.json:
        print(plan_text(args, found))
    tables = {}
    if own.table or not own.json:
        tables = answers(planner, own)
    if own.json:
        print(json.dumps({"flags": vars(args), "plan": found.as_dict()} | tables, indent=1))
    else:
        print("\n" + tables_text(args, tables, found.capacity_gib))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 2 with one line on what cannot be planned."""
    args, own = parse_args(argv)
    distributed.allow_tf32(args.tf32 == "on")
    try:
        run(args, own)
    except UserError as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
