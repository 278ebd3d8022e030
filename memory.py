"""Bytes and seconds of training before it is run, for exactly the flags that train.py takes.

    python memory.py --wavlm large --unfreeze all --batch_size 8 --max_seconds 8
    python memory.py --wavlm large --unfreeze all --batch_size auto --gpu rtx3090 --json
    python memory.py --preset full --data iemocap --data_dir D --gpus 4 --plot memory.png
    python memory.py --calibrate        # measures this machine's speed once, in under a minute
    python memory.py --measure          # predicted against real, over a grid of settings

Bytes come from util.tracing.py, which runs the project's own training step without data, so that a
changed model is planned right without a line changed here. Seconds are the operations of that step
at a machine's rates (timing.py).

The run-time side is here too: TF32, the memory cap, the measured peak, the probe behind
`--batch_size auto`, evaluation in pieces where memory is short. Not here: audio; of a corpus only
the lengths matter. GiB = 2^30 bytes.
Tags: [measured] by us, [P] published, [guess].
"""

import argparse
import bisect
import gc
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import data as vadata
import flags
import step as updates
from model import AUTOCAST
from timing import GPUS, Clock, calibrate, clips, device_name, machine
from util.distributed import (
    GIB,
    allow_tf32,
    capacity_gib,
    is_out_of_memory,
    peak_gib,
    reset_peak,
    smallest,
)
from util.files import UserError
from util.tracing import KINDS, Trace, blend, meta_batch, on_cuda, real_step, trace
from wavlm import read_config

log = logging.getLogger("vatune")

CONTEXT_GIB, NCCL_GIB = 0.45, 0.4  # outside the allocator: CUDA context with its kernels [guess]
FITS, TIGHT = 0.90, 0.97  # shares of the card: clips of many lengths fragment what is reserved
BATCHES = (1, 2, 4, 8, 16, 32, 64)

# Shapes of hub checkpoints, so that planning needs no network
KNOWN_SHAPES = {
    "microsoft/wavlm-large": "large", "microsoft/wavlm-base": "base",
    "microsoft/wavlm-base-plus": "base",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The plan


@dataclass
class Plan:
    """Bytes at the worst moment, by kind; they add up to peak_bytes."""

    bytes: dict[str, int]  # by KINDS
    moment: str  # forward | backward | optimizer | evaluation
    reserved_bytes: int  # by the allocator, around peak_bytes; on a CPU the same
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
        return self.reserved_bytes / GIB + self.outside_gib

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


class Planner:
    """Plans of a run's flags and of variations of them; each trace is made once."""

    def __init__(
        self,
        args: argparse.Namespace,
        widths: tuple[int, int],
        seconds: float,
        world_size: int = 1,
    ) -> None:
        self.args, self.widths, self.seconds, self.world_size = args, widths, seconds, world_size
        self.capacity_gib = capacity_gib(args.device, args.gpu_gib, args.memory_fraction)
        self.traces: dict[str, Trace] = {}

    def trace(
        self, size: int, stage: str, seconds: float = 0.0, evaluate: bool = False, **flags: object
    ) -> Trace:
        """A step of `size` utterances of `seconds` (default: the longest), or an evaluation."""
        args = argparse.Namespace(**vars(self.args) | flags | {"unfreeze": stage})
        where = (size, seconds or self.seconds, stage, self.world_size, evaluate)
        key = repr((where, sorted(vars(args).items(), key=lambda item: item[0])))
        if key not in self.traces:
            self.traces[key] = trace(args, self.widths, *where)
        return self.traces[key]

    def evaluation(self, stage: str, seconds: float = 0.0, **flags: object) -> Trace:
        """One of evaluation's batches, whose size depends on no flag."""
        size = max(1, int(vadata.EVAL_SECONDS / (seconds or self.seconds)))
        flags |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": False}
        return self.trace(size, stage, seconds, evaluate=True, **flags)

    def peaks(
        self, size: int, unfreeze: str, between: tuple[int, int] | None = None, **flags: object
    ) -> dict[str, np.ndarray] | None:
        """{phase: bytes by KINDS at its highest moment, then bytes reserved but not used}.

        Of a schedule, each phase's heaviest stage. Evaluation runs beside optimizer states. With
        `between`, a step is a blend of those of two other sizes; None where there is none.
        """
        peaks: dict[str, np.ndarray] = {}
        for stage in sorted({what for _, what in updates.parse_unfreeze(unfreeze)}):
            if between:
                ends = (self.trace(n, stage, **flags) for n in between)
                step = blend(*ends, (size - between[0]) / (between[1] - between[0]))
                if step is None:
                    return None
            else:
                step = self.trace(size, stage, **flags)
            evaluation = self.evaluation(stage, **flags).peaks()["evaluation"]
            for kind in ("gradients", "optimizer"):
                evaluation[KINDS.index(kind)] = step.at_start()[KINDS.index(kind)]
            spare = step.reserved_bytes() - step.timeline.sum(1).max()
            for phase, kinds in (*step.peaks().items(), ("evaluation", evaluation)):
                if phase not in peaks or kinds.sum() > peaks[phase][:-1].sum():
                    peaks[phase] = np.append(kinds, spare)
        return peaks

    def as_plan(self, size: int, peaks: dict[str, np.ndarray]) -> Plan:
        moment, worst = max(peaks.items(), key=lambda item: item[1][:-1].sum())
        kinds = dict(zip(KINDS, (round(n) for n in worst[:-1].tolist())))
        outside = 0.0
        if on_cuda(self.args):
            outside = CONTEXT_GIB + NCCL_GIB * (self.world_size > 1)
        reserved = sum(kinds.values()) + round(float(worst[-1]))
        return Plan(kinds, moment, reserved, outside, self.capacity_gib, size, on_cuda(self.args))

    def plan(self, size: int, unfreeze: str, **flags: object) -> Plan:
        return self.as_plan(size, self.peaks(size, unfreeze, **flags))

    def curve(self, sizes: Sequence[int], unfreeze: str, **flags: object) -> list[Plan]:
        """Plans over `sizes`, not each of them traced.

        They follow from the traces of two sizes, or, where these differ in their events, of every
        second size, and the others lie between, phase by phase.
        """
        found: dict[int, dict | None] = {}
        if len(sizes) > 3:
            ends = (sizes[-3], sizes[-1])
            found = {size: self.peaks(size, unfreeze, ends, **flags) for size in sizes[1:]}
        if None in found.values() or not found:
            found = {size: self.peaks(size, unfreeze, **flags) for size in sizes[::-2]}
        found[sizes[0]] = self.peaks(sizes[0], unfreeze, **flags)
        for low, size, high in zip(sizes, sizes[1:], sizes[2:]):
            if size not in found:
                share, one, two = (size - low) / (high - low), found[low], found[high]
                found[size] = {p: one[p] + share * (two[p] - one[p]) for p in one}
        return [self.as_plan(size, found[size]) for size in sizes]

    def largest(
        self,
        sizes: Sequence[int],
        unfreeze: str,
        near: tuple[Plan, Plan] | None = None,
        **flags: object,
    ) -> Plan | None:
        """The largest of `sizes` that fits, to 2 %, traced itself; None when not even one does.

        Bytes are close to linear in the batch: the line through two plans finds it soon. `near`:
        two plans to begin with.
        """
        one, two = near or (
            self.plan(sizes[n], unfreeze, **flags) for n in (0, min(7, len(sizes) - 1))
        )
        low, high, fitting = -1, len(sizes), None
        while high - low > 1 and (low < 0 or sizes[min(high, len(sizes) - 1)] > 1.02 * sizes[low]):
            steps, gained = two.batch_size - one.batch_size, two.needed_gib - one.needed_gib
            most = sizes[-1]
            if steps * gained > 0:
                room = FITS * self.capacity_gib - two.needed_gib
                most = two.batch_size + room * steps / gained
            place = min(max(bisect.bisect(sizes, most) - 1, low + 1), high - 1)
            one, two = two, self.plan(sizes[place], unfreeze, **flags)
            if two.verdict == "fits":
                low, fitting = place, two
            else:
                high = place
        return fitting


def plan(args: argparse.Namespace, shape: vadata.InputShape, world_size: int = 1) -> Plan:
    """The heaviest stage's worst moment with utterances of `seconds`, evaluation included."""
    widths, seconds = (shape.speaker_dim, shape.frame_dim), shape.length / shape.rate
    planner = Planner(args, widths, seconds, world_size)
    return planner.plan(args.batch_size, args.unfreeze)


def batch_sizes(args: argparse.Namespace, world_size: int, most: int = 1024) -> list[int]:
    """Micro-batches of whole chunks of turns; those that divide --global_batch_size, if given."""
    sizes = range(args.context, most + 1, args.context)
    if not args.global_batch_size:
        return list(sizes)
    return [size for size in sizes if args.global_batch_size % (size * world_size) == 0]


def largest_batch(
    args: argparse.Namespace,
    widths: tuple[int, int],
    seconds: float,
    world_size: int = 1,
    most: int = 1024,
) -> Plan:
    """The plan of the largest micro-batch up to `most` that fits; ValueError when none does."""
    sizes = batch_sizes(args, world_size, most)
    if not sizes:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} is not a multiple of "
            f"--context {args.context} x {world_size} ranks"
        )
    steps = None if args.global_batch_size else args.gradient_accumulation_steps or 1
    flags = argparse.Namespace(**vars(args) | {"gradient_accumulation_steps": steps})
    planner = Planner(flags, widths, seconds, world_size)
    best = planner.largest(sizes, args.unfreeze)
    if best is None:
        needed = planner.plan(sizes[0], args.unfreeze).needed_gib
        raise UserError(
            f"--batch_size auto: {sizes[0]} utterances of {seconds:g} s need {needed:.1f} GiB, "
            f"more than {FITS:.0%} of {planner.capacity_gib:.1f}: lower --max_seconds, unfreeze "
            "less, or give --gradient_checkpointing"
        )
    return best


# ---------------------------------------------------------------------------------------------
# Real steps: probe, measurement


def probe(
    model: torch.nn.Module,
    args: argparse.Namespace,
    widths: tuple[int, int],
    seconds: float,
    device: torch.device,
) -> bool:
    """Does a step of the longest clips run, in every stage? The weights are put back.

    Forward, backward, optimizer, and a batch of evaluation; the second step has all states.
    """
    before = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    run = None
    reset_peak(device)
    try:
        for stage in {what for _, what in updates.parse_unfreeze(args.unfreeze)}:
            run, _ = real_step(model, args, widths, seconds, stage, device)
            run()
            run()
        size = max(1, int(vadata.EVAL_SECONDS / seconds))
        audio = meta_batch(args, widths, size, seconds)
        batch = {key: torch.ones_like(value, device=device) for key, value in audio.items()}
        dtype = AUTOCAST[args.amp]
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=args.amp != "off"):
            model.eval().encode(batch)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        run = None  # its optimizer goes
        model.zero_grad()
        model.load_state_dict(before)
        model.train()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def auto_batch(
    model: torch.nn.Module,
    args: argparse.Namespace,
    shape: vadata.InputShape,
    device: torch.device,
    world_size: int,
    most: int,
) -> tuple[int, str]:
    """--batch_size auto: the plan proposes, a probe confirms, all ranks take the smallest.

    (micro-batch up to `most`, how it was found) (all ranks participate); ValueError when nothing
    fits.
    """

    widths, seconds = (shape.speaker_dim, shape.frame_dim), shape.length / shape.rate
    sizes, fault = batch_sizes(args, world_size, most), ""
    try:
        size = largest_batch(args, widths, seconds, world_size, most).batch_size
    except UserError as error:
        size, fault = 0, str(error)
    size = proposed = smallest(size)
    while size:
        steps = args.gradient_accumulation_steps or 1
        if args.global_batch_size:
            steps = args.global_batch_size // (size * world_size)
        trial = {"batch_size": size, "gradient_accumulation_steps": min(2, steps)}
        trial = argparse.Namespace(**vars(args) | trial | {"global_batch_size": size})
        if smallest(int(probe(model, trial, widths, seconds, device))):
            found = (
                f" | batch {size}, planned as {proposed} and probed at {peak_gib(device):.2f} GiB"
            )
            reset_peak(device)
            return size, found
        size = max((n for n in sizes if n <= 0.85 * size), default=0)
    raise UserError(
        fault
        or "--batch_size auto: nothing fits: lower --max_seconds, unfreeze less, "
        "or give --gradient_checkpointing"
    )


def measure(
    args: argparse.Namespace, widths: tuple[int, int], seconds: float, device: torch.device
) -> tuple[int, int]:
    """(bytes allocated, bytes reserved) at the peak of a real second step.

    On CUDA by the allocator's own count; on a CPU by the profiler's record of every allocation,
    which shares nothing with `Tracker`.
    """
    torch.manual_seed(0)
    gc.collect()
    held = 0
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
    model = updates.build_model(args, vadata.InputShape(*widths, 0, 0)).to(device)
    run, between = real_step(model, args, widths, seconds, args.unfreeze, device)
    run()
    if device.type == "cuda":
        reset_peak(device)
        run()
        peak = torch.cuda.max_memory_allocated(device) - held
        return peak, torch.cuda.max_memory_reserved(device)
    held = sum(tensor.nbytes for tensor in between())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return held + peak, held + peak


def grid(cuda: bool) -> list[tuple[list[str], float]]:
    """(flags, seconds) of the settings that --measure and the tests go through."""
    all_of_it = ["--unfreeze", "all"]
    variations = [
        *(["--unfreeze", what] for what in ("none", "top:2", "transformer", "all")),
        ["--unfreeze", "none", "--augment"],
        *([*all_of_it, "--attention", kind] for kind in ("sdpa", "eager")),
        [*all_of_it, "--gradient_checkpointing"],
        [*all_of_it, "--gradient_checkpointing", "--attention", "eager"],
        [*all_of_it, "--gradient_accumulation_steps", "3"],
        [*all_of_it, "--pooling", "attention", "--layers", "1", "2"],
        [*all_of_it, "--context", "2", "--feedback"],
    ]
    amps = ("fp16", "bf16", "off") if cuda else ("off", "bf16")
    sizes = ("base", "large") if cuda else ("tiny",)
    shapes = ((8, 5.7), (4, 11.0)) if cuda else ((4, 2.5), (6, 1.0))
    settings = [
        (["--wavlm", size, "--amp", amp, "--batch_size", str(batch), *flags], seconds)
        for size in sizes
        for amp in amps
        for batch, seconds in shapes
        for flags in variations
    ]
    cnn = ["--batch_size", "4", "--base_channels", "16", "--encoder"]
    settings += [([*cnn, encoder], 2.5) for encoder in ("convnext", "baseline")]
    return settings


# ---------------------------------------------------------------------------------------------
# Command line


def widths(args: argparse.Namespace) -> tuple[int, int]:
    """(speaker_dim, frame_dim) that the flags lead to, from a file where there is one.

    ValueError when --features_dir holds none.
    """

    def width_of(directory: str) -> int | None:
        file = next(iter(sorted(Path(directory).glob("*.npy"))), None)
        return np.load(file, mmap_mode="r", allow_pickle=False).shape[-1] if file else None

    speaker = {"none": 0, "ecapa": 192, "xvector": 512}.get(args.speaker)
    if speaker is None:
        speaker = width_of(args.speaker) or 512  # an x-vector model
    frames = 0
    if args.features_dir:
        frames = width_of(args.features_dir)
        if frames is None:
            raise UserError(f"--features_dir {args.features_dir}: no <utt_id>.npy there")
    return speaker, frames


def comparable(args: argparse.Namespace) -> list[str]:
    """What --unfreeze is compared with; an encoder other than WavLM has nothing to freeze."""
    if args.encoder != "wavlm" or args.train_only:
        return [args.unfreeze]
    depth = max(args.layers or [read_config(args.wavlm).num_hidden_layers])
    top = min(6, depth)
    third = max(1, args.epochs // 3)
    progressive = f"1:none,{third + 1}:top:{top},{2 * third + 1}:all"
    rows = ["none", f"top:{top}", "all", args.unfreeze]
    if args.epochs >= 3 and "," not in args.unfreeze:
        rows.append(progressive)
    return list(dict.fromkeys(rows))


def switches(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Flags that save memory or time, one at a time, as changes to `args`."""
    found: dict[str, dict[str, object]] = {}
    if on_cuda(args):
        half = args.amp != "off"
        found["--amp off" if half else "--amp fp16"] = {"amp": "off" if half else "fp16"}
    else:
        found["--amp bf16"] = {"amp": "bf16"}
    on = args.gradient_checkpointing
    name = "without --gradient_checkpointing" if on else "--gradient_checkpointing"
    found[name] = {"gradient_checkpointing": not on}
    if args.encoder == "wavlm":
        kinds = [kind for kind in ("fused", "eager") if kind != args.attention]
        found |= {f"--attention {kind}": {"attention": kind} for kind in kinds}
        depth = max(args.layers or [read_config(args.wavlm).num_hidden_layers])
        half = sorted({max(1, round(depth * q / 8)) for q in (1, 2, 3, 4)})
        found["--layers " + " ".join(map(str, half))] = {"layers": half}
    return found


def costs(clock: Clock, batch_size: int, accumulation: int, gpus: int) -> list[dict]:
    """What each way of unfreezing costs: GiB, seconds per epoch, hours of one and of all folds."""
    planner, rows = clock.planner, []
    for what in comparable(planner.args):
        epoch, fold = clock.fold(what, batch_size, accumulation)
        folds = clock.clips.folds
        at_once = max(1, gpus // planner.world_size)
        rows.append(
            {
                "unfreeze": what,
                "needed_gib": planner.plan(batch_size, what).needed_gib,
                "epoch_seconds": epoch,
                "fold_hours": fold / 3600,
                "series_hours": folds * fold / 3600,
                "parallel_hours": math.ceil(folds / at_once) * fold / 3600,
            }
        )
    return rows


def ways_to(clock: Clock, global_batch_size: int) -> list[dict]:
    """Settings with this global batch that fit the card, fastest first; the eight largest batches
    with and without checkpointing."""
    planner, args = clock.planner, clock.planner.args
    sizes = batch_sizes(args, planner.world_size, global_batch_size)[-8:]
    rows = []
    for checkpointing in (False, True):
        flags = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": None}
        slower = clock.slower(**flags)
        for plan in (planner.plan(size, args.unfreeze, **flags) for size in sizes):
            steps = global_batch_size // (plan.batch_size * planner.world_size)
            if plan.verdict != "does not fit":
                seconds, _ = clock.fold(args.unfreeze, plan.batch_size, steps)
                rows.append(
                    {
                        "batch_size": plan.batch_size,
                        "gradient_accumulation_steps": steps,
                        "gradient_checkpointing": checkpointing,
                        "needed_gib": plan.needed_gib,
                        "verdict": plan.verdict,
                        "epoch_seconds": slower * seconds,
                    }
                )
    return sorted(rows, key=lambda row: row["epoch_seconds"])


def answers(planner: Planner, own: argparse.Namespace) -> dict:
    """All that the command prints, in the order in which it does."""
    args = planner.args
    steps = args.gradient_accumulation_steps
    clock = Clock(planner, machine(args, own.gpu), clips(args, own.from_data))
    sizes = [n for n in BATCHES if n % args.context == 0]
    if len(sizes) < 2:
        sizes = [n * args.context for n in BATCHES[:4]]
    every = batch_sizes(argparse.Namespace(**vars(args) | {"global_batch_size": None}), 1)
    table, largest = {}, {}
    for what in comparable(args):
        if "," not in what:
            plans = planner.curve(sizes, what)
            table[what] = [plan.as_dict() for plan in plans]
            best = planner.largest(every, what, plans[-2:])
            largest[what] = best.batch_size if best else 0
    effects = {
        name: {
            "needed_gib": planner.plan(args.batch_size, args.unfreeze, **flags).needed_gib,
            "time": clock.slower(**flags),
        }
        for name, flags in ({"as given": {}} | switches(args)).items()
    }
    return {
        "flags": vars(args),
        "plan": planner.plan(args.batch_size, args.unfreeze).as_dict(),
        "sizes": sizes,
        "table": table,
        "largest": largest,
        "switches": effects,
        "ways": ways_to(clock, args.global_batch_size) if own.wants_global else [],
        "machine": asdict(clock.machine),
        "clips": f"{len(clock.clips.splits['train'])} training clips, {clock.clips.source}",
        "folds": clock.clips.folds,
        "gpus": own.gpus,
        "costs": costs(clock, args.batch_size, steps, own.gpus),
    }


def bar(size: int, whole: int) -> str:
    return "#" * round(40 * size / max(whole, 1))


def columns(rows: list[list[str]]) -> str:
    """Rows of cells, the first column to the left and the others to the right."""
    sizes = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(n) if i == 0 else cell.rjust(n) for i, (cell, n) in enumerate(cells))
        for cells in (zip(row, sizes) for row in rows)
    )


def text(found: dict) -> str:
    """`answers` for a person."""
    flags, plan = found["flags"], found["plan"]
    gpu = plan["on_gpu"]
    model = flags["wavlm"] if flags["encoder"] == "wavlm" else flags["encoder"]
    where = f"{'GPU' if gpu else 'RAM'} of {plan['capacity_gib']:.1f} GiB"
    blocks = [
        f"{model} | unfreeze {flags['unfreeze']} | batch {flags['batch_size']} x "
        f"{flags['gradient_accumulation_steps']} micro-steps of {flags['max_seconds']:g} s | "
        f"amp {flags['amp']} | {where}"
    ]
    rows = [
        f"{kind:<16}{n / GIB:>8.2f} GiB  {bar(n, plan['peak_bytes'])}".rstrip()
        for kind, n in plan["bytes"].items()
        if n
    ]
    rows.append(f"{'peak':<16}{plan['peak_gib']:>8.2f} GiB  in {plan['moment']}")
    if gpu:
        rows.append(
            f"{'card must have':<16}{plan['needed_gib']:>8.2f} GiB  with the allocator's "
            f"segments and CUDA's context: {plan['verdict']}"
        )
    blocks.append("\n".join(rows))

    mark = {"fits": " ", "tight": "?", "does not fit": "!"}
    rows = [["GiB at batch size", *map(str, found["sizes"]), "largest"]]
    for what, plans in found["table"].items():
        cells = [f"{p['needed_gib']:.2f}{mark[p['verdict']]}" for p in plans]
        rows.append([what, *cells, str(found["largest"][what])])
    blocks.append(f"{columns(rows)}\n(? tight, ! does not fit {plan['capacity_gib']:.1f} GiB)")

    rows = [["one switch at a time", "GiB", "time of a step"]]
    for name, effect in found["switches"].items():
        rows.append([name, f"{effect['needed_gib']:.2f}", f"x {effect['time']:.2f}"])
    blocks.append(columns(rows))

    if found["ways"]:
        wanted = flags["global_batch_size"]
        rows = [[f"ways to {wanted} per step", "batch", "accumulation", "GiB", "s per epoch"]]
        for way in found["ways"]:
            name = "checkpointing" if way["gradient_checkpointing"] else ""
            gib = f"{way['needed_gib']:.2f}{mark[way['verdict']]}"
            counts = (way["batch_size"], way["gradient_accumulation_steps"])
            rows.append([name, *map(str, counts), gib, f"{way['epoch_seconds']:.0f}"])
        blocks.append(columns(rows))

    folds, epochs = found["folds"], flags["epochs"]
    parallel = f"on {found['gpus']} GPU{'s' * (found['gpus'] > 1)}"
    rows = [["unfreeze", "GiB", "s per epoch", "h per fold", f"{folds} folds", parallel]]
    for cost in found["costs"]:
        hours = (cost["fold_hours"], cost["series_hours"], cost["parallel_hours"])
        numbers = (f"{cost['needed_gib']:.2f}", f"{cost['epoch_seconds']:.0f}")
        rows.append([cost["unfreeze"], *numbers, *(f"{h:.2f}" for h in hours)])
    speed = found["machine"]
    blocks.append(
        f"{columns(rows)}\n({epochs} epochs, {found['clips']}; {speed['name']}, {speed['source']})"
    )
    return "\n\n".join(blocks)


def plot(planner: Planner, found: dict, path: str) -> None:
    """Memory over a step, stacked by kind, and against the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    args, plan = planner.args, found["plan"]
    stage = updates.stage_at(args.unfreeze, args.epochs - 1)
    step = planner.trace(args.batch_size, stage)
    alive = step.timeline[step.start - 1 :] / GIB
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colours = ("#000000", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")
    left.stackplot(range(len(alive)), alive.T, labels=KINDS, colors=colours)
    phases = [phase for _, _, phase in step.events[step.start - 1 :]]
    left.set(xlabel="allocations and frees of one step", ylabel="GiB")
    left.set(xlim=(0, len(alive)), ylim=(0, 1.12 * alive.sum(1).max()))
    for phase in ("forward", "backward", "optimizer"):
        if phase in phases:
            first = phases.index(phase, 1)
            left.axvline(first, color="black", lw=0.6)
            left.text(first, 1.05 * alive.sum(1).max(), f" {phase}"[:11], fontsize="small")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize="small", ncols=4)
    for style, (what, plans) in zip(("o-", "s--", "^:", "d-."), found["table"].items()):
        right.plot(found["sizes"], [p["needed_gib"] for p in plans], style, label=what)
    right.axhline(plan["capacity_gib"], color="black", lw=0.8)
    right.text(found["sizes"][0], plan["capacity_gib"], "there is", va="bottom")
    right.set(xscale="log", yscale="log", xlabel="batch size", ylabel="GiB needed")
    right.set_xticks(found["sizes"], map(str, found["sizes"]))
    low, high = right.get_ylim()
    ticks = [n * 10**e for e in range(-3, 4) for n in (1, 2, 5) if low <= n * 10**e <= high]
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.legend(title="unfreeze")
    figure.savefig(path, dpi=120)


def measured_table(args: argparse.Namespace) -> str:
    """Predicted against real peaks of a training step, over `grid`."""
    device = torch.device("cuda" if on_cuda(args) else "cpu")
    rows = [["setting", "predicted MiB", "allocated", "error", "predicted reserve", "reserved"]]
    errors = []
    for words, seconds in grid(device.type == "cuda"):
        setting = flags.parse_args(["--prosody", "none", "--device", device.type, *words])
        setting.amp = setting.amp or ("fp16" if device.type == "cuda" else "off")
        step = Planner(setting, (0, 0), seconds).trace(setting.batch_size, setting.unfreeze)
        predicted, reserve = step.timeline.sum(1).max(), step.reserved_bytes()
        real, reserved = measure(setting, (0, 0), seconds, device)
        errors.append(predicted / real - 1)
        numbers = [f"{n / 2**20:.1f}" for n in (predicted, real, reserve, reserved)]
        name = " ".join(words) + f" ({seconds:g} s)"
        rows.append([name, *numbers[:2], f"{errors[-1]:+.2%}", *numbers[2:]])
        print(rows[-1][0], file=sys.stderr, flush=True)
    worst = f"errors {min(errors):+.2%} to {max(errors):+.2%} over {len(errors)} settings"
    return f"{columns(rows)}\n{worst}; {device_name(device.type == 'cuda')}"


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """(train.py's flags, our own); --device defaults to cuda, planned for without one.

    Exits with code 2 and one line on a wrong flag.
    """
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="and every flag of train.py (python train.py --help)",
        usage="python memory.py [flags of its own] [train.py's flags]",
        allow_abbrev=False,
    )
    # fmt: off
    p.add_argument("--gpu", choices=sorted(GPUS), help="card to plan for: its memory and speed")
    p.add_argument("--gpus", type=int, help="cards that folds are dealt to; default: --world_size")
    p.add_argument("--world_size", type=int, default=1, help="cards that share a fold (DDP)")
    p.add_argument("--json", action="store_true", help="all of it as JSON")
    p.add_argument("--plot", metavar="FILE", help="picture of memory over a step and over batches")
    p.add_argument("--calibrate", action="store_true", help="measure this machine's speed and stop")
    p.add_argument("--measure", action="store_true",
                   help="predicted against real peaks over a grid of settings, and stop")
    # fmt: on
    argv = sys.argv[1:] if argv is None else argv
    own, rest = p.parse_known_args(argv)
    own.gpus = own.world_size if own.gpus is None else own.gpus
    if not 1 <= own.world_size <= own.gpus:
        p.error(f"--world_size {own.world_size} --gpus {own.gpus}: need 1 <= world_size <= gpus")
    if own.plot and not Path(own.plot).absolute().parent.is_dir():
        p.error(f"--plot {own.plot}: there is no such directory")
    given = {word.partition("=")[0] for word in rest}
    own.from_data = "--data" in given
    own.wants_global = "--global_batch_size" in given
    if own.gpu and "--gpu_gib" not in given:
        rest += ["--gpu_gib", str(GPUS[own.gpu][0])]
    if True:
        args = flags.parse_args(rest, own.world_size)
        args.wavlm = KNOWN_SHAPES.get(args.wavlm, args.wavlm)
        if own.gpu and args.device == "cpu":
            p.error("--gpu is a card to plan for: remove it, or --device cpu")
        if args.device == "auto" and (own.gpu or not (own.calibrate or own.measure)):
            args.device = "cuda"
        args.amp = args.amp or ("fp16" if on_cuda(args) else "off")
        if args.batch_size == "auto" and not (own.calibrate or own.measure):
            best = largest_batch(args, widths(args), args.max_seconds, own.world_size)
            flags.split_batch(args, best.batch_size, own.world_size)
    return args, own


def main(argv: list[str] | None = None) -> int:
    """Prints what was asked for; 2 with one line on what cannot be planned."""
    try:
        args, own = parse_args(argv)
        allow_tf32(args.tf32 == "on")
        if own.measure:
            print(measured_table(args))
            return 0
        if own.calibrate:
            found = calibrate(args)
            print(
                f"{found.name}: {found.half_tflops:.3f} TFLOPS in half precision, "
                f"{found.single_tflops:.3f} in single, {found.gb_per_second:.1f} GB/s, "
                f"{found.operator_us:.1f} us per operator: {Path(args.cache_dir) / 'machine.json'}"
            )
            return 0
        planner = Planner(args, widths(args), args.max_seconds, own.world_size)
        found = answers(planner, own)
        if own.plot:
            plot(planner, found, own.plot)
    except (ValueError, OSError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if own.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
