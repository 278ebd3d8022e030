"""What one training step allocates and computes, found without running it.

train.train_step itself, with the real model and optimizer, runs on torch's meta device, whose
tensors have shapes and no bytes, under a mode that sees every allocation and every operator. A
changed model is therefore accounted for with no line changed here. What meta tensors would do
otherwise than CUDA is corrected in `CudaRules` (autocast and its cache of half-precision weights,
one-byte dropout masks, the memory-efficient attention kernel) and in `kernel_bytes` (what kernels
take for themselves); sizes are rounded and packed into segments as CUDA's caching allocator does.

memory.py makes plans of it. Not here: cuDNN's workspaces, torch.compile (traced as eager).
"""

import argparse
import bisect
import contextlib
import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

import data as vadata
from model import AUTOCAST, TARGETS

KINDS = (
    "parameters", "gradients", "optimizer", "autocast copies", "activations", "transient",
    "workspaces",
)  # fmt: skip
# What a step does, as a vector: flops in half and in single precision, bytes that operators other
# than matrix products read and write, operators. `Machine.seconds` turns it into time.
WORK = ("half flops", "single flops", "bytes moved", "operators")


def on_cuda(args: argparse.Namespace) -> bool:
    return args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())


def cublas_bytes() -> int:
    """Torch's workspaces for cuBLAS, one for forward's thread and one for backward's."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return 2 * (2**25 if hopper else 8_519_680)


class Tracker(TorchDispatchMode):
    """Notes when each storage is allocated and freed, and what every operator has to do.

    events: (storage, +bytes or -bytes, phase) in order, storages numbered from 1.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.rounding = 512 if on_gpu else 1  # of CUDA's caching allocator
        self.phase = "forward"
        self.events: list[tuple[int, int, str]] = []
        self.work: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(WORK)))  # by phase
        self.ids: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.last_id = 0
        self.known: dict[tuple, tuple] = {}

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        before = self.last_id
        outputs = [t for t in tree_leaves(out) if is_meta(t)]
        for tensor in outputs:
            self.see(tensor)
        self.spike(kernel_bytes(func._overloadpacket, args, out, self.on_gpu))
        if self.last_id > before or func._schema.is_mutable:  # not a view
            self.count(func, args, kwargs, out, outputs)
        return out

    def run(self, func: object, args: tuple, kwargs: dict) -> object:
        """func(*args, **kwargs), from memory where it was called with the like before.

        Layers are alike, and torch takes up to a millisecond to find a shape.
        """
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        key = (func, spec, *(description(leaf) for leaf in leaves))
        try:
            if key in self.known:
                fresh, spec = self.known[key]
                tensors = (
                    torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                    for shape, stride, dtype in fresh
                )
                return tree_unflatten(tensors, spec)
        except TypeError:  # a leaf that cannot be compared
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        outputs, spec = tree_flatten(out)
        inputs = {leaf.untyped_storage() for leaf in leaves if is_meta(leaf)}
        if all(is_meta(o) and o.untyped_storage() not in inputs for o in outputs):
            fresh = [(o.shape, o.stride(), o.dtype) for o in outputs]
            self.known[key] = (fresh, spec)
        return out

    def count(
        self, func: object, args: tuple, kwargs: dict, out: object, outputs: list[Tensor]
    ) -> None:
        work = self.work[self.now()]
        work[3] += 1
        if func is torch.ops.aten.convolution_backward.default:
            grad, _, weight = args[:3]  # the registry's formula knows no groups
            flops = 4 * grad.numel() * weight[0].numel()
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        else:
            inputs = [t for t in tree_leaves(args) if is_meta(t)]
            work[2] += sum(t.numel() * t.itemsize for t in (*inputs, *outputs))
            return
        half = any(t.dtype in (torch.float16, torch.bfloat16) for t in outputs)
        work[0 if half else 1] += flops

    def now(self) -> str:
        in_backward = torch._C._current_graph_task_id() != -1
        return "backward" if in_backward and self.phase == "forward" else self.phase

    def see(self, tensor: Tensor) -> int:
        """The storage's number; a storage not seen before counts as allocated now."""
        storage = tensor.untyped_storage()
        if storage in self.ids:
            return self.ids[storage]
        self.last_id += 1
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        self.ids[storage] = number = self.last_id
        self.events.append((number, size, self.now()))
        weakref.finalize(storage, self.free, number, size).atexit = False
        return number

    def free(self, number: int, size: int) -> None:
        self.events.append((number, -size, self.now()))

    def spike(self, size: int) -> None:
        """What a kernel takes from the allocator and gives back."""
        if size == 0:
            return
        self.last_id += 1
        self.events += [(self.last_id, size, self.now()), (self.last_id, -size, self.now())]


def description(value: object) -> object:
    """What of an operator's argument decides the shapes of its results."""
    if not isinstance(value, Tensor):
        return type(value), value
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device


def is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def kernel_bytes(op: object, args: tuple, out: object, on_gpu: bool) -> int:
    """What a kernel takes for itself: workspaces on CUDA, copies in oneDNN's layouts on a CPU."""
    aten = torch.ops.aten
    if on_gpu:
        if op is aten._efficient_attention_backward:
            return attention_backward_bytes(args[1])
        return 0
    if op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        return half_product_bytes(*args[-2:])
    if op is aten.convolution:
        x, weight = args[:2]
        return x.nbytes * (not x.is_contiguous()) + max(x.nbytes + weight.nbytes, out.nbytes)
    if op is aten.convolution_backward:
        return convolution_backward_bytes(*args[:3], out[0])
    return 0


def attention_backward_bytes(q: Tensor) -> int:
    """Of the memory-efficient kernel for q (B, T, H, d): tiles of 64 x 64 sums of dq in float32,
    and a number per row [source: mem_eff_attention/kernel_backward.h]."""
    batch, frames, heads, width = q.shape
    tiles = math.ceil(frames / 64) * math.ceil(width / 64)
    return 4 * batch * heads * (tiles * (64 * 64 + 4) + frames)


def half_product_bytes(a: Tensor, b: Tensor) -> int:
    """Of a @ b on a CPU in half precision: scratch, and copies of an `a` that is not contiguous
    and of a `b` that is expanded [measured]."""
    if a.dtype == torch.float32:
        return 0
    return 200_000 + a.nbytes * (not a.is_contiguous()) + b.nbytes * (0 in b.stride())


def convolution_backward_bytes(grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None) -> int:
    """On a CPU [measured]; a grouped one sums the weight's gradient per thread."""
    if weight.shape[1] == x.shape[1]:
        both = x.nbytes + grad.nbytes
        return both if dx is None else max(2 * x.nbytes - weight.nbytes, both)
    if weight.shape[1] == 1:  # depthwise
        return grad.nbytes
    threads, half = torch.get_num_threads(), weight.dtype != torch.float32
    return 4 * weight.nbytes * (threads + half) + x.nbytes + 2 * threads * grad.nbytes


HALF = {
    F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d, torch.matmul, Tensor.matmul,
    Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, torch.baddbmm, torch.einsum,
    F.scaled_dot_product_attention,
}  # fmt: skip
SINGLE = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.layer_norm}


class CudaRules(TorchFunctionMode):
    """Makes meta tensors allocate what CUDA tensors would."""

    def __init__(self, tracker: Tracker, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.tracker, self.dtype = tracker, dtype
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
        try:
            yield
        finally:  # checkpointing leaves a recomputation by an exception
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
            args = tree_map(self.half, args)
            kwargs = {key: self.half(value) for key, value in kwargs.items()}
        if self.enabled and self.dtype and self.tracker.on_gpu and func in SINGLE:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        if func is Tensor.to and self.dtype and is_weight(args[0]):  # cast by the model itself
            out = func(*args, **kwargs)
            self.copies.add(self.tracker.see(out))
            return out
        if func is F.dropout and self.tracker.on_gpu:
            p, training = (*args[1:], 0.5, True)[:2]
            p, training = kwargs.get("p", p), kwargs.get("training", training)
            return torch.native_dropout(args[0], p, True)[0] if training and p else args[0]
        if func is F.scaled_dot_product_attention and self.tracker.on_gpu:
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


@dataclass
class Trace:
    """What one step allocates, frees and computes."""

    events: list[tuple[int, int, str]]  # (storage, +-bytes, phase)
    kinds: dict[int, str]  # of storages; a storage without one is transient
    work: dict[str, np.ndarray]  # by phase, then by WORK
    start: int  # events before the step itself
    on_gpu: bool

    @functools.cached_property
    def timeline(self) -> np.ndarray:
        """(events, KINDS) bytes alive after each event."""
        column = {number: KINDS.index(kind) for number, kind in self.kinds.items()}
        columns = [column.get(number, KINDS.index("transient")) for number, _, _ in self.events]
        change = np.zeros((len(self.events), len(KINDS)), dtype=np.int64)
        change[np.arange(len(change)), columns] = [size for _, size, _ in self.events]
        if self.on_gpu:
            change[0, KINDS.index("workspaces")] += cublas_bytes()
        return change.cumsum(0)

    def at_start(self) -> np.ndarray:
        """(KINDS,) bytes that are there before the step."""
        return self.timeline[self.start - 1]

    def peaks(self) -> dict[str, np.ndarray]:
        """{phase: bytes (KINDS,) at its highest moment}."""
        alive = self.timeline
        phases = np.array([phase for _, _, phase in self.events])
        highest = {}
        for phase in dict.fromkeys(phases):
            part = alive[phases == phase]
            highest[phase] = part[part.sum(1).argmax()]
        return highest

    def reserved_bytes(self) -> int:
        """What CUDA's caching allocator takes for these events, with expandable segments."""
        if not self.on_gpu:
            return int(self.timeline.sum(1).max())
        pools = {True: Segment(2 * 2**20), False: Segment(20 * 2**20)}  # small: up to 1 MiB
        for number, size, _ in [(0, cublas_bytes(), ""), *self.events]:
            pool = pools[abs(size) <= 2**20]
            if size > 0:
                pool.allocate(number, size)
            elif size < 0:
                pool.free(number)
        return sum(pool.reserved for pool in pools.values())


def blend(low: Trace, high: Trace, share: float) -> Trace | None:
    """The trace of a batch between two others, `share` of the way; None where events differ.

    Every storage grows evenly with the batch; a frozen CNN's number of slices does not.
    """
    if len(low.events) != len(high.events):
        return None
    events = [
        (number, round(a + share * (b - a)), phase)
        for (number, a, phase), (_, b, _) in zip(low.events, high.events)
    ]
    return replace(low, events=events)


class Segment:
    """An expandable segment: best fit among the free blocks, else it grows by pages at its end."""

    def __init__(self, page: int) -> None:
        self.page, self.reserved = page, 0
        self.taken: dict[int, tuple[int, int]] = {}  # storage -> (address, bytes)
        self.free_blocks: list[tuple[int, int]] = []  # (address, bytes), sorted, never adjacent

    def allocate(self, number: int, size: int) -> None:
        fitting = [(b, address) for address, b in self.free_blocks if b >= size]
        if not fitting:
            address, last = self.free_blocks[-1] if self.free_blocks else (self.reserved, 0)
            if address + last != self.reserved:
                address, last = self.reserved, 0
            grown = -(-(size - last) // self.page) * self.page
            self.give_back(self.reserved, grown)
            self.reserved += grown
            fitting = [(last + grown, address)]
        block, address = min(fitting)
        self.free_blocks.remove((address, block))
        if block > size:
            bisect.insort(self.free_blocks, (address + size, block - size))
        self.taken[number] = (address, size)

    def free(self, number: int) -> None:
        self.give_back(*self.taken.pop(number))

    def give_back(self, address: int, size: int) -> None:
        """Adds a free block, joined with its neighbours."""
        place = bisect.bisect(self.free_blocks, (address, size))
        if place < len(self.free_blocks) and self.free_blocks[place][0] == address + size:
            size += self.free_blocks.pop(place)[1]
        if place and sum(self.free_blocks[place - 1]) == address:
            place -= 1
            before, length = self.free_blocks.pop(place)
            address, size = before, length + size
        self.free_blocks.insert(place, (address, size))


def meta_batch(
    args: argparse.Namespace,
    widths: tuple[int, int],
    size: int,
    seconds: float,
    hidden: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """A micro-batch of `size` utterances of `seconds`, as data.Batches', without data.

    `hidden`: (N, D) of WavLM's states, where these come from the cache in place of audio.
    """
    speaker_dim, frame_dim = widths
    frames = max(1, int(seconds * vadata.FRAME_RATE))
    chunks = torch.arange(size).reshape(-1, args.context if size % args.context == 0 else 1)
    batch = {"labels": torch.empty(size, len(TARGETS)), "chunk_index": chunks}
    if hidden and args.pooling == "mean":
        batch["hidden"] = torch.empty(size, *hidden, dtype=torch.float16)
    elif hidden:
        batch["hidden"] = torch.empty(size, frames, *hidden, dtype=torch.float16)
        batch["frame_mask"] = torch.empty(size, frames, dtype=torch.bool)
    elif frame_dim:
        batch["frames"] = torch.empty(size, frames, frame_dim)
        batch["frame_mask"] = torch.empty(size, frames, dtype=torch.bool)
    else:
        samples = max(vadata.MIN_SAMPLES, int(seconds * vadata.SAMPLE_RATE))
        batch["input_values"] = torch.empty(size, samples)
        batch["attention_mask"] = torch.empty(size, samples, dtype=torch.bool)
    if args.prosody == "egemaps":
        batch["prosody"] = torch.empty(size, 88)
    if speaker_dim:
        batch["speaker"] = torch.empty(size, speaker_dim)
    return {key: value.to("meta") for key, value in batch.items()}


def without_fused(on_gpu: bool, params: list[dict], **flags: object) -> AdamW:
    """AdamW as asked for, but for fused=True, which refuses meta tensors; `trace` stands in."""
    foreach = flags.get("foreach", on_gpu or None)  # CUDA's default
    optimizer = AdamW(params, **flags | {"fused": None, "foreach": foreach})
    optimizer.defaults["fused"] = flags.get("fused")
    return optimizer


def trace(
    args: argparse.Namespace,
    widths: tuple[int, int],
    size: int,
    seconds: float,
    stage: str,
    world_size: int = 1,
    evaluate: bool = False,
) -> Trace:
    """The second step (optimizer states exist) of `stage`, or a batch of evaluation in it.

    Of several micro-steps the second is run, which finds gradients in place, as all later ones do.
    Without gradient_accumulation_steps they follow from global_batch_size.
    """
    import step as updates

    on_gpu = on_cuda(args)
    args = argparse.Namespace(**vars(args) | {"batch_size": size})
    args.amp = args.amp or ("fp16" if on_gpu else "off")
    dtype = AUTOCAST[args.amp] if args.amp != "off" else None
    tracker = Tracker(on_gpu)
    rules = CudaRules(tracker, dtype)
    kinds: dict[int, str] = {}

    def tag(kind: str, tensors: Iterable[Tensor]) -> None:
        kinds.update({tracker.see(tensor): kind for tensor in tensors if is_meta(tensor)})

    adamw = functools.partial(without_fused, on_gpu)
    with torch.device("meta"), mock.patch("torch.optim.AdamW", adamw):
        model = updates.build_model(args, vadata.InputShape(*widths, 0, 0), load=False)
        optimizer = updates.build_optimizer(model, args)
    updates.set_trainable(model, stage, args.train_only)
    tag("parameters", (tensor.data for tensor in (*model.parameters(), *model.buffers())))
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = optimizer.defaults.get("fused")
    for p in trained:  # what the first step leaves behind
        p.grad = torch.empty_like(p)
        if fused:
            names = ("exp_avg", "exp_avg_sq")
            optimizer.state[p] = {name: torch.empty_like(p) for name in names}
            optimizer.state[p]["step"] = torch.empty((), device="meta")
    if not fused:
        optimizer.step()
    tag("optimizer", (t for state in optimizer.state.values() for t in state.values()))
    optimizer.zero_grad()
    steps = args.gradient_accumulation_steps or args.global_batch_size // (size * world_size)
    if evaluate:
        steps = 1
    elif world_size > 1:  # gradients are views of DDP's buckets, there from the start
        buckets = torch.empty(sum(p.numel() for p in trained), device="meta")
        for p, view in zip(trained, buckets.split([p.numel() for p in trained])):
            p.grad = view.view_as(p)
    elif steps > 1:
        for p in trained:
            p.grad = torch.empty_like(p)
    tag("gradients", (p.grad for p in trained if p.grad is not None))

    hidden = None
    if updates.reads_cache(args, stage) and not evaluate:
        hidden = (model.encoder.num_states, model.encoder.width)
    batch = meta_batch(args, widths, size, seconds, hidden)
    others = (steps - 1) * sum(tensor.nbytes for tensor in batch.values())
    others = torch.empty(others, dtype=torch.uint8, device="meta")  # of the other micro-steps
    tag("activations", (*batch.values(), others))

    def update() -> None:
        gradients = [p.grad for p in trained if p.grad is not None]
        tag("gradients", gradients)
        tracker.phase = "optimizer"
        if fused:  # in place; reads four numbers per parameter and writes three
            tracker.work["optimizer"][2] += 7 * sum(grad.nbytes for grad in gradients)
        else:
            type(optimizer).step(optimizer)

    start = len(tracker.events)
    emulated = bool(on_gpu or dtype)
    with (
        torch.random.fork_rng(devices=[]),
        rules.in_recomputation() if emulated else contextlib.nullcontext(),
        mock.patch("torch.autocast", rules.autocast),
        mock.patch("util.distributed.agree_on_step", lambda: False),
        mock.patch("torch.nn.utils.clip_grad_norm_", lambda *_: torch.zeros(())),  # few bytes, slow
        rules if emulated else contextlib.nullcontext(),
        tracker,
    ):
        if evaluate:
            model.eval()
            tracker.phase = "evaluation"
            with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
                model.encode(batch)
        else:
            model.train()
            batch["step_size"] = size
            optimizer.step = update
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            updates.train_step(model, [batch], optimizer, scaler, args, updates.Progress())
    kinds.update(dict.fromkeys(rules.copies, "autocast copies"))
    for number, change, phase in tracker.events:
        if change > 0 and phase in ("forward", "evaluation"):
            kinds.setdefault(number, "activations")
    return Trace(list(tracker.events), kinds, dict(tracker.work), start, on_gpu)


def real_step(
    model: torch.nn.Module,
    args: argparse.Namespace,
    widths: tuple[int, int],
    seconds: float,
    stage: str,
    device: torch.device,
) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    """(a training step of `stage` on random clips, all tensors that live between two of them)."""
    import step as updates

    hidden = None
    if updates.reads_cache(args, stage):
        hidden = (model.encoder.num_states, model.encoder.width)
    batches = []
    for _ in range(args.gradient_accumulation_steps):
        batch = {}
        batch["step_size"] = args.batch_size * args.gradient_accumulation_steps
        for key, like in meta_batch(args, widths, args.batch_size, seconds, hidden).items():
            if like.is_floating_point():
                batch[key] = torch.rand(like.shape, dtype=like.dtype, device=device)
            elif like.dtype == torch.bool:
                batch[key] = torch.ones(like.shape, dtype=torch.bool, device=device)
            else:  # chunk_index
                batch[key] = torch.arange(like.numel(), device=device).view(like.shape)
        batches.append(batch)
    optimizer = updates.build_optimizer(model, args)
    updates.set_trainable(model, stage, args.train_only)
    model.train()
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=args.amp == "fp16")

    def between() -> list[Tensor]:
        states = [t for state in optimizer.state.values() for t in state.values()]
        inputs = [t for batch in batches for t in batch.values() if isinstance(t, Tensor)]
        return [*model.parameters(), *model.buffers(), *states, *inputs]

    def run() -> object:
        return updates.train_step(model, batches, optimizer, scaler, args, updates.Progress())

    return run, between
