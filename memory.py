"""Bytes of a training step before it is run, for exactly the flags that train.py takes.

    python memory.py --wavlm large --unfreeze all --batch_size 8 --max_seconds 8
    python memory.py --wavlm large --unfreeze top:6 --amp fp16 --gpu_gib 24 --json

One real optimizer step (train.train_step, with the real model and optimizer) runs on torch's meta
device under a mode that sees every allocation, so a changed model is planned right without a line
changed here. What meta tensors would do otherwise than CUDA is corrected in `CudaRules`: autocast
and its cache of half-precision weights, one-byte dropout masks, the memory-efficient attention
kernel, fused AdamW. Sizes are rounded to 512 bytes, as CUDA's allocator does.

The run-time side is here too: TF32, the memory cap, the measured peak. Not here: audio; of a corpus
only the longest clip matters. GiB = 2^30 bytes.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wavlm import BlockAttention

GIB = 2**30
CONTEXT_GIB = 0.45  # CUDA context with its kernels, more with NCCL [guess, to be measured]
WORKSPACE_GIB = 0.03  # cuBLAS on Hopper; 0.008 on Ampere and Ada
FRAGMENTATION = 1.03  # what the allocator reserves over what it hands out [guess]
BATCHES = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("parameters", "gradients", "optimizer", "autocast copies", "activations", "transient")

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when CUDA starts


# ---------------------------------------------------------------------------------------------
# Run time


def configure(args: argparse.Namespace, device: torch.device) -> None:
    """Applies --tf32 and --memory_fraction, and starts the measurement of the peak."""
    torch.backends.cuda.matmul.allow_tf32 = args.tf32 == "on"
    torch.backends.cudnn.allow_tf32 = args.tf32 == "on"
    if device.type == "cuda":
        if args.memory_fraction:
            torch.cuda.set_per_process_memory_fraction(args.memory_fraction, device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Measured peak: allocated tensors on CUDA, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


# ---------------------------------------------------------------------------------------------
# Tracing one step


@dataclass
class Plan:
    """Bytes at the worst moment of a step, by kind; they add up to peak_bytes."""

    peak_bytes: int
    moment: str  # forward | backward | optimizer
    bytes: dict[str, int]  # by KINDS
    on_gpu: bool
    gpu_gib: float

    @property
    def peak_gib(self) -> float:
        """Tensors alone: what torch.cuda.max_memory_allocated shows."""
        return self.peak_bytes / GIB

    @property
    def needed_gib(self) -> float:
        """With the CUDA context, workspaces and the allocator's loss: what the card must have."""
        if not self.on_gpu:
            return self.peak_gib
        return self.peak_gib * FRAGMENTATION + CONTEXT_GIB + WORKSPACE_GIB

    @property
    def verdict(self) -> str:
        share = self.needed_gib / self.gpu_gib
        return "fits" if share < 0.9 else "tight" if share < 0.97 else "does not fit"

    def as_dict(self) -> dict:
        return asdict(self) | {"needed_gib": self.needed_gib, "verdict": self.verdict}

    def line(self) -> str:
        parts = ", ".join(f"{kind} {self.bytes[kind] / GIB:.2f}" for kind in KINDS)
        text = (
            f"memory plan {self.peak_gib:.2f} GiB of tensors at the peak ({self.moment}): {parts}"
        )
        if self.on_gpu:
            text += f" | needs {self.needed_gib:.2f} of {self.gpu_gib:g} GiB: {self.verdict}"
        return text


class Tracker(TorchDispatchMode):
    """Notes when each storage is allocated and freed; `at` counts the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.moment = self.phase = "forward"
        self.born: dict[int, tuple[int, int, str]] = {}  # id -> (birth, bytes, phase)
        self.died: dict[int, int] = {}
        self.at = self.peak_at = self.last_id = 0
        self.ids: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> int:
        """The storage's id; a storage not seen before counts as allocated now."""
        storage = tensor.untyped_storage()
        if storage in self.ids:
            return self.ids[storage]
        self.at, self.last_id = self.at + 1, self.last_id + 1
        size = -(-storage.nbytes() // 512) * 512
        in_backward = torch._C._current_graph_task_id() != -1
        phase = "backward" if in_backward and self.phase == "forward" else self.phase
        self.ids[storage] = self.last_id
        self.born[self.last_id] = (self.at, size, phase)
        weakref.finalize(storage, self.free, self.last_id, size)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_at, self.moment = self.live, self.at, phase
        return self.last_id

    def free(self, storage_id: int, size: int) -> None:
        self.at += 1
        self.live -= size
        self.died[storage_id] = self.at

    def at_peak(self) -> dict[int, int]:
        """id -> bytes of the storages alive at the peak."""
        never = self.at + 1
        return {
            i: size
            for i, (birth, size, _) in self.born.items()
            if birth <= self.peak_at < self.died.get(i, never)
        }


HALF = {
    F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d, torch.matmul, Tensor.matmul,
    Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, torch.baddbmm, torch.einsum,
    F.scaled_dot_product_attention,
}  # fmt: skip
SINGLE = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.layer_norm}


class CudaRules(TorchFunctionMode):
    """Makes meta tensors allocate what CUDA tensors would."""

    def __init__(self, tracker: Tracker, dtype: torch.dtype | None, on_gpu: bool) -> None:
        super().__init__()
        self.tracker, self.dtype, self.on_gpu = tracker, dtype, on_gpu
        self.cache: dict[int, Tensor] = {}  # half copies of weights, alive until autocast ends
        self.copies: set[int] = set()
        self.enabled = self.recomputing = False
        self.depth = 0

    @contextlib.contextmanager
    def autocast(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True
    ) -> Iterator:
        """Stands in for torch.autocast; the cache of weights ends with the outermost one."""
        before, self.enabled, self.depth = self.enabled, enabled, self.depth + 1
        yield
        self.enabled, self.depth = before, self.depth - 1
        if self.depth == 0:
            self.cache.clear()

    def in_recomputation(self) -> contextlib.AbstractContextManager:
        """A mode is off inside backward: turns it on for modules that checkpointing runs there."""
        call = torch.nn.Module.__call__

        def call_with_rules(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
            if torch._C._current_graph_task_id() == -1 or self.recomputing:
                return call(module, *args, **kwargs)
            self.recomputing = True
            try:
                with self, self.autocast("cuda"):
                    return call(module, *args, **kwargs)
            finally:
                self.recomputing = False

        return mock.patch.object(torch.nn.Module, "__call__", call_with_rules)

    def half(self, value: object) -> object:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not is_weight(value):
            return value.to(self.dtype)
        if id(value) not in self.cache:
            self.cache[id(value)] = value.to(self.dtype)
            self.copies.add(self.tracker.see(self.cache[id(value)]))
        return self.cache[id(value)]

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self.enabled and self.dtype and func in HALF:
            args = torch.utils._pytree.tree_map(self.half, args)
            kwargs = {key: self.half(value) for key, value in kwargs.items()}
        if self.enabled and self.dtype and func in SINGLE:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        if func is Tensor.to and self.dtype and is_weight(args[0]):  # cast by the model itself
            out = func(*args, **kwargs)
            self.copies.add(self.tracker.see(out))
            return out
        if func is F.dropout and self.on_gpu:
            p, training = (*args[1:], 0.5, True)[:2]
            p, training = kwargs.get("p", p), kwargs.get("training", training)
            return torch.native_dropout(args[0], p, True)[0] if training and p else args[0]
        if func is F.scaled_dot_product_attention and self.on_gpu:
            return efficient_attention(*args, **kwargs)
        return func(*args, **kwargs)


def is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_leaf and value.requires_grad


def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """The kernel that CUDA takes where the bias needs a gradient: keeps no T x T probabilities."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, True, dropout_p)[0]


def unfused(params: list[dict], **flags: object) -> torch.optim.Optimizer:
    return AdamW(params, **flags | {"fused": False})


def meta_batch(
    args: argparse.Namespace, speaker_dim: int, frame_dim: int, seconds: float
) -> dict[str, Tensor]:
    """A micro-batch of the longest utterances, without data."""
    size = args.batch_size
    batch = {
        "labels": torch.empty(size, 2),
        "chunk_index": torch.arange(size).reshape(-1, args.context),
    }
    if frame_dim:
        frames = max(1, int(seconds * 50))
        batch["frames"] = torch.empty(size, frames, frame_dim)
        batch["frame_mask"] = torch.empty(size, frames, dtype=torch.bool)
    else:
        samples = max(400, int(seconds * 16_000))
        batch["input_values"] = torch.empty(size, samples)
        batch["attention_mask"] = torch.empty(size, samples, dtype=torch.bool)
    if args.prosody == "egemaps":
        batch["prosody"] = torch.empty(size, 88)
    if speaker_dim:
        batch["speaker"] = torch.empty(size, speaker_dim)
    return {key: value.to("meta") for key, value in batch.items()}


def plan(
    args: argparse.Namespace,
    speaker_dim: int,
    frame_dim: int,
    seconds: float,
    world_size: int = 1,
) -> Plan:
    """The heaviest stage's second step (optimizer states exist) with utterances of `seconds`.

    Under DDP gradients live in the buckets (gradient_as_bucket_view), which adds nothing.
    """
    import train  # which imports this file

    stages = {what for _, what in train.parse_unfreeze(args.unfreeze)}
    plans = [trace(args, speaker_dim, frame_dim, seconds, stage) for stage in sorted(stages)]
    return max(plans, key=lambda p: p.peak_bytes)


def trace(
    args: argparse.Namespace, speaker_dim: int, frame_dim: int, seconds: float, stage: str
) -> Plan:
    import train

    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    args = argparse.Namespace(**vars(args))
    args.amp = args.amp or ("fp16" if on_gpu else "off")
    tracker = Tracker()
    dtype = train.AUTOCAST[args.amp] if args.amp != "off" else None
    rules = CudaRules(tracker, dtype, on_gpu)
    with torch.device("meta"):
        model = train.build_model(args, speaker_dim, frame_dim, load=False)
    with mock.patch("torch.optim.AdamW", unfused):  # the fused one refuses meta tensors
        optimizer = train.build_optimizer(model, args)
    train.set_trainable(model, stage, args.train_only)
    model.train()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    fixed = [*model.parameters(), *model.buffers()]
    for tensor in fixed:
        tracker.see(tensor.data)
    parameters = {tracker.see(tensor.data) for tensor in fixed}
    states = set()
    for p in trained:  # as after the first step
        state = {name: torch.empty_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **state}
        states |= {tracker.see(tensor) for tensor in state.values()}
    gradients: set[int] = set()

    def before_update(*_: object) -> None:
        tracker.phase = "optimizer"
        gradients.update(tracker.see(p.grad) for p in trained if p.grad is not None)

    optimizer.step = lambda: before_update()  # fused: in place, no temporary
    batches = [
        meta_batch(args, speaker_dim, frame_dim, seconds)
        for _ in range(args.gradient_accumulation_steps)
    ]
    inputs = {tracker.see(tensor) for batch in batches for tensor in batch.values()}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with (
        torch.random.fork_rng(devices=[]),
        rules.in_recomputation() if on_gpu or dtype else contextlib.nullcontext(),
        mock.patch("torch.autocast", rules.autocast),
        contextlib.nullcontext() if on_gpu else mock.patch("wavlm.KernelAttention", BlockAttention),
        rules if on_gpu or dtype else contextlib.nullcontext(),
        tracker,
    ):
        train.train_step(model, model, batches, optimizer, scaler, args)
    counts: Counter = Counter()
    for i, size in tracker.at_peak().items():
        counts[
            "parameters" if i in parameters
            else "optimizer" if i in states
            else "gradients" if i in gradients
            else "autocast copies" if i in rules.copies
            else "activations" if i in inputs or tracker.born[i][2] == "forward"
            else "transient"
        ] += size  # fmt: skip
    kinds = {kind: counts[kind] for kind in KINDS}
    return Plan(tracker.peak, tracker.moment, kinds, on_gpu, args.gpu_gib)


# ---------------------------------------------------------------------------------------------
# Choosing


def widths(args: argparse.Namespace) -> tuple[int, int]:
    """(speaker_dim, frame_dim) that the flags lead to, from a file where there is one."""

    def width_of(directory: str, default: int) -> int:
        file = next(iter(sorted(Path(directory).glob("*.npy"))), None)
        if file is None:
            return default
        return np.load(file, mmap_mode="r", allow_pickle=False).shape[-1]

    known = {"none": 0, "ecapa": 192, "xvector": 512}
    speaker = known.get(args.speaker)
    speaker = width_of(args.speaker, 512) if speaker is None else speaker
    return speaker, width_of(args.features_dir, 768) if args.features_dir else 0


def with_batch(args: argparse.Namespace, batch_size: int, **flags: object) -> argparse.Namespace:
    changed = vars(args) | {"batch_size": batch_size, "global_batch_size": batch_size}
    return argparse.Namespace(**changed | flags)


def largest_batch(args: argparse.Namespace) -> int:
    """The largest micro-batch that fits the card; at most --global_batch_size, dividing it.

    ValueError when not even the smallest fits.
    """
    if torch.cuda.is_available() and args.device != "cpu":
        args.gpu_gib = torch.cuda.mem_get_info()[1] / GIB
    accumulation = args.gradient_accumulation_steps or (2 if args.global_batch_size else 1)
    most = args.global_batch_size or 1024
    sizes = list(range(args.context, most + 1, args.context))
    if args.global_batch_size:
        sizes = [n for n in sizes if args.global_batch_size % n == 0]
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        changed = with_batch(args, sizes[middle], gradient_accumulation_steps=accumulation)
        if plan(changed, *widths(args), args.max_seconds).verdict == "fits":
            low = middle
        else:
            high = middle
    if low < 0:
        raise ValueError(f"--batch_size auto: not even {args.context} fits {args.gpu_gib:g} GiB")
    return sizes[low]


def table(args: argparse.Namespace) -> dict[str, dict[int, Plan]]:
    """Plans by what is unfrozen and batch size."""
    what = ["none", "top:6", "all"] if args.encoder == "wavlm" else [args.unfreeze]
    plans = {}
    for unfreeze in what:
        with contextlib.suppress(ValueError):  # fewer than six layers
            plans[unfreeze] = {
                size: plan(
                    with_batch(args, size, unfreeze=unfreeze), *widths(args), args.max_seconds
                )
                for size in BATCHES
                if size % args.context == 0
            }
    return plans


def bar(size: int, whole: int) -> str:
    return "#" * round(40 * size / max(whole, 1))


def table_text(plans: dict[str, dict[int, Plan]]) -> str:
    """GiB that the card must have, by batch size, with a verdict."""
    sizes = sorted({size for row in plans.values() for size in row})
    lines = ["batch size" + "".join(f"{what:>24}" for what in plans)]
    for size in sizes:
        cells = (row[size] for row in plans.values())
        lines.append(
            f"{size:>10}" + "".join(f"{p.needed_gib:>9.2f} {p.verdict:>14}" for p in cells)
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """train.py's flags and --json; --device defaults to cuda, planned without one."""
    import train

    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    argv = [word for word in argv if word != "--json"]
    if "--device" not in argv and "demo" not in argv:
        argv += ["--device", "cuda"]
    args = train.parse_args(argv)
    args.amp = args.amp or ("off" if args.device == "cpu" else "fp16")
    args.json = as_json
    return args


def main(argv: list[str] | None = None) -> int:
    """Prints the plan and the table; 2 with one line on what cannot be planned."""
    try:
        args = parse_args(argv)
        chosen = plan(args, *widths(args), args.max_seconds)
        plans = table(args)
    except (ValueError, OSError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        rows = {what: {n: p.as_dict() for n, p in row.items()} for what, row in plans.items()}
        print(json.dumps({"plan": chosen.as_dict(), "table": rows}, indent=1))
        return 0
    where = f"GPU of {args.gpu_gib:g} GiB" if chosen.on_gpu else "CPU"
    print(
        f"{args.encoder}, batch {args.batch_size} x {args.gradient_accumulation_steps} micro-steps "
        f"of {args.max_seconds:g} s, unfreeze {args.unfreeze}, amp {args.amp}, {where}\n"
    )
    for kind, size in chosen.bytes.items():
        print(f"{kind:<16}{size / GIB:>8.2f} GiB  {bar(size, chosen.peak_bytes)}")
    print(f"{'peak':<16}{chosen.peak_gib:>8.2f} GiB  in {chosen.moment}")
    if chosen.on_gpu:
        print(f"{'card must have':<16}{chosen.needed_gib:>8.2f} GiB  with context and allocator")
    print(f"\n{table_text(plans)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
