"""Bytes and floating-point operations of a call on meta tensors, found without running it.

    tracing.trace(model, optimizer, run, inputs, on_gpu=True)

A model on torch's meta device has shapes and no numbers. `trace` runs a training step (or anything
else) on it under a mode that sees every allocation and every operator, so a changed model is
accounted for with no line changed here. Two corrections make meta tensors allocate what CUDA's do:
`CudaRules` (the casts of autocast with its cache of half-precision weights, one-byte dropout masks,
the memory-efficient attention kernel) and `workspace_bytes` (what kernels take for themselves).

Assumed: the optimizer updates in place, as fused ones do. Not here: workspaces of cuDNN,
torch.compile (traced as eager), kernels of a CPU. Nothing here knows a particular model.
"""

import contextlib
import functools
import inspect
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

KINDS = (
    "parameters", "gradients", "optimizer", "autocast copies", "activations", "transient",
    "workspaces",
)  # fmt: skip
PHASES = ("forward", "backward", "optimizer")
ROUNDING = 512  # bytes, of CUDA's caching allocator
BLOCKS = 2_112  # of 128 threads that an H100 runs at once; 1,536 on an RTX 4090 [P: vendor]

# Operators that CUDA's autocast runs in half precision, and those that it runs in float32, by the
# names of their Python functions [torch: CUDA operators that autocast to float16 / float32].
# Not here: sum and prod, of which autocast changes the result's dtype alone.
HALF = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "matmul",
    "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "baddbmm", "einsum",
    "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip
SINGLE = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "softplus", "exp", "expm1", "log",
    "log10", "log1p", "log2", "pow", "__pow__", "__rpow__", "reciprocal", "rsqrt", "norm", "cumsum",
    "cumprod", "cosine_similarity", "cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Allocations and operations


known: dict[tuple, object] = {}  # results of operators by what decides their shapes


class Tracker(TorchDispatchMode):
    """Records when each storage is allocated and freed, and the FLOPs of every operator.

    events: (storage, +bytes or -bytes, in backward?) in order, storages numbered from 1.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.events: list[tuple[int, int, bool]] = []
        self.flops: dict[tuple[bool, bool], int] = defaultdict(int)  # (in backward?, in half?)
        self.ids: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.last_id = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        outputs = [out] if isinstance(out, Tensor) else tree_leaves(out)
        outputs = [tensor for tensor in outputs if is_meta(tensor)]
        for tensor in outputs:
            self.see(tensor)
        if func._overloadpacket in flop_registry and outputs:
            half = outputs[0].dtype in (torch.float16, torch.bfloat16)
            self.flops[in_backward(), half] += flops(func, args, kwargs, out)
        if self.on_gpu and (size := workspace_bytes(func._overloadpacket, args)):
            self.last_id += 1
            self.events.append((self.last_id, size, in_backward()))
            self.events.append((self.last_id, -size, in_backward()))
        return out

    def run(self, func: object, args: tuple, kwargs: dict) -> object:
        """func(*args, **kwargs), from memory if it was called with the like before.

        Layers are alike, and torch takes up to a millisecond to find the shape of a result. An
        operator in place has nothing to compute: it returns its first argument.
        """
        schema = func._schema
        if schema.is_mutable:
            in_place = schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
            return args[0] if in_place and is_meta(args[0]) else func(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        key = (func, description(args), description(tuple(kwargs.items())))
        if key in known:
            return rebuilt(known[key])
        out = func(*args, **kwargs)
        inputs = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if is_meta(leaf)}
        outputs = tree_leaves(out)
        if all(is_meta(o) and o.untyped_storage() not in inputs for o in outputs):
            known[key] = description(out)
        return out

    def see(self, tensor: Tensor) -> int:
        """The storage's number; a storage not seen before counts as allocated now."""
        storage = tensor.untyped_storage()
        number = self.ids.get(storage)
        if number is None:
            self.last_id = number = self.last_id + 1
            size = storage.nbytes()
            if self.on_gpu:
                size = -(-size // ROUNDING) * ROUNDING
            self.ids[storage] = number
            self.events.append((number, size, in_backward()))
            weakref.finalize(storage, self.free, number, size).atexit = False
        return number

    def free(self, number: int, size: int) -> None:
        self.events.append((number, -size, in_backward()))


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


class Like(tuple):
    """(shape, strides, dtype, device) of a tensor."""


def description(value: object) -> object:
    """What of an operator's arguments decides the shapes of its results; it can be compared."""
    if isinstance(value, Tensor):
        return Like((value.shape, value.stride(), value.dtype, value.device))
    if isinstance(value, (tuple, list)):
        return tuple(map(description, value))
    return type(value), value  # True, 1 and 1.0 are equal


def rebuilt(value: object) -> object:
    """Tensors like those described."""
    if isinstance(value, Like):
        shape, strides, dtype, device = value
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return tuple(map(rebuilt, value))


def flops(func: object, args: tuple, kwargs: dict, out: object) -> int:
    if func is torch.ops.aten.convolution_backward.default:
        grad, _, weight = args[:3]  # the registry's formula does not know groups
        return 4 * grad.numel() * weight[0].numel()
    return flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)


def workspace_bytes(op: object, args: tuple) -> int:
    """What the memory-efficient attention kernel takes for itself in backward: tiles of 64 x 64
    sums of dq in float32, and a number per row [torch: mem_eff_attention/kernel_backward.h]; and
    what a sum takes."""
    if op is torch.ops.aten.sum and len(args) > 1:
        return sum_bytes(args[0], args[1] or ())
    if op is torch.ops.aten._efficient_attention_backward:
        batch, frames, heads, width = args[1].shape
    elif op is torch.ops.aten._scaled_dot_product_efficient_attention_backward:
        batch, heads, frames, width = args[1].shape
    else:
        return 0
    tiles = math.ceil(frames / 64) * math.ceil(width / 64)
    return 4 * batch * heads * (tiles * (64 * 64 + 4) + frames)


def sum_bytes(x: Tensor, dims: Sequence[int]) -> int:
    """Partial sums in float32 of a sum over many rows, such as the gradient of a bias: blocks of
    128 threads, each for four columns, share the rows [torch: cuda/Reduce.cuh, setReduceConfig]."""
    columns = x.shape[-1] if x.dim() else 0
    of_rows = {dim % x.dim() for dim in dims} == set(range(x.dim() - 1))
    if columns < 4 or not of_rows or not x.is_contiguous():
        return 0
    width = min(32, 2 ** int(math.log2(columns // 4)))  # threads beside each other
    values = math.ceil(x.numel() / columns / (128 // width))  # of a thread
    if values < 256:
        return 0
    most = math.ceil(BLOCKS / math.ceil(columns / (4 * width)))
    parts = min(max(most, math.ceil(values / 256)), math.ceil(values / 16))
    return 4 * columns * parts * 4 * width


# ---------------------------------------------------------------------------------------------
# What CUDA does otherwise than the meta device


class CudaRules(TorchFunctionMode):
    """Makes meta tensors allocate what CUDA tensors would.

    torch has no autocast for the meta device: code that runs there asks for the CPU's, which leaves
    meta tensors alone, and whose state says here what to cast.
    """

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.cache: dict[int, Tensor] = {}  # half copies of weights, alive until autocast ends
        self.copies: set[int] = set()  # their storages
        self.depth = 0  # of module calls inside backward

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func.__name__ in HALF:
                args, kwargs = self.cast(args, kwargs, torch.get_autocast_dtype("cpu"))
            elif func.__name__ in SINGLE:
                args, kwargs = self.cast(args, kwargs, torch.float32)
        elif self.cache and autocast_nesting() == 0:
            self.cache.clear()
        if func is Tensor.to and is_weight(args[0]):  # cast by the model itself
            out = func(*args, **kwargs)
            if out is not args[0]:
                self.copies.add(self.tracker.see(out))
            return out
        if not self.tracker.on_gpu:
            return func(*args, **kwargs)
        if func is F.dropout:
            return dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return efficient_attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return self_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def cast(self, args: tuple, kwargs: dict, dtype: torch.dtype) -> tuple[tuple, dict]:
        """The arguments as autocast passes them on; one tensor given twice stays one tensor."""
        seen: dict[int, Tensor] = {}

        def one(value: object) -> object:
            if not is_meta(value) or not value.is_floating_point() or value.dtype == torch.float64:
                return value
            if value.dtype == dtype:
                return value
            if dtype != torch.float32 and is_weight(value):
                return self.cached(value, dtype)
            if id(value) not in seen:
                seen[id(value)] = value.to(dtype)
            return seen[id(value)]

        return tree_map(one, args), tree_map(one, kwargs)

    def cached(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if id(weight) not in self.cache:
            self.cache[id(weight)] = weight.to(dtype)
            self.copies.add(self.tracker.see(self.cache[id(weight)]))
        return self.cache[id(weight)]

    @contextlib.contextmanager
    def in_recomputation(self) -> Iterator[None]:
        """A mode is off inside backward: turns it on for modules that checkpointing runs there."""

        def enter(*_: object) -> None:
            if in_backward():
                self.depth += 1
                if self.depth == 1:
                    self.__enter__()

        def leave(*_: object) -> None:
            if in_backward():
                self.depth -= 1
                if self.depth == 0:
                    self.__exit__(None, None, None)
                    self.cache.clear()  # recomputation has an autocast of its own

        before = module_hooks.register_module_forward_pre_hook(enter)
        after = module_hooks.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()


def autocast_nesting() -> int:
    """How many autocast blocks this code is in."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def is_weight(value: object) -> bool:
    """True for what autocast keeps a copy of: float32 leaves that train."""
    return is_meta(value) and value.is_leaf and value.requires_grad and value.dtype == torch.float32


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout with CUDA's one-byte mask."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention by the kernel that CUDA takes for a mask or a bias; it keeps
    no frames x frames probabilities."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def self_attention(*args: object, **kwargs: object) -> tuple[Tensor, None]:
    """F.multi_head_attention_forward of x (T, B, D) with itself, whose inside a mode cannot see."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    x, heads, mask = given.query, given.num_heads, given.attn_mask
    if given.key is not x or given.value is not x or given.need_weights:
        raise NotImplementedError("tracing knows nn.MultiheadAttention as self-attention alone")
    frames, batch, width = x.shape
    packed = F.linear(x, given.in_proj_weight, given.in_proj_bias)
    packed = packed.unflatten(-1, (3, heads, width // heads)).permute(2, 0, 1, 3, 4)
    q, k, v = packed.contiguous().permute(0, 2, 3, 1, 4)  #  each (B, H, T, d)
    if given.key_padding_mask is not None:
        padding = given.key_padding_mask[:, None, None].expand(-1, heads, frames, -1).to(q.dtype)
        mask = padding if mask is None else mask + padding
    dropout_p = given.dropout_p if given.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    out = out.permute(2, 0, 1, 3).reshape(frames, batch, width)
    return F.linear(out, given.out_proj_weight, given.out_proj_bias), None


# ---------------------------------------------------------------------------------------------
# The trace


@dataclass
class Trace:
    """What a call allocates, frees and computes."""

    timeline: np.ndarray  # (events, KINDS) bytes alive before the call, then after each event
    phases: np.ndarray  # (events,) indices into PHASES
    flops: np.ndarray  # (PHASES, 2), the columns in half and in single precision

    def peaks(self) -> dict[str, np.ndarray]:
        """{phase: bytes (KINDS,) at its highest moment}."""
        total = self.timeline.sum(1)
        highest = {}
        for number, phase in enumerate(PHASES):
            rows = np.flatnonzero(self.phases == number)
            if len(rows):
                highest[phase] = self.timeline[rows[total[rows].argmax()]]
        return highest

    @functools.cached_property
    def peak_bytes(self) -> int:
        return int(self.timeline.sum(1).max())


class InPlace:
    """An optimizer whose step allocates nothing, in place of one without a fused kernel here."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        pass


def trace(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    run: Callable[[InPlace | None], object],
    inputs: Iterable[Tensor] = (),
    *,
    on_gpu: bool,
    with_gradients: bool = False,
    workspaces: int = 0,
) -> Trace:
    """What `run(optimizer)` does; parameters, optimizer states and `inputs` are there before.

    `with_gradients`: so are the gradients of what trains, as while they are accumulated and under
    DistributedDataParallel. `workspaces`: bytes that libraries hold all the time. All tensors are
    on the meta device; the optimizer handed to `run` stands in for `optimizer`.
    """
    tracker = Tracker(on_gpu)
    rules = CudaRules(tracker)
    kinds: dict[int, str] = {}

    def tag(kind: str, tensors: Iterable[Tensor | None]) -> None:
        kinds.update({tracker.see(tensor): kind for tensor in tensors if is_meta(tensor)})

    trained = [p for p in model.parameters() if p.requires_grad]
    stand_in, states = None, []
    if optimizer is not None:
        stand_in = InPlace(optimizer)
        make_states(optimizer, trained)
        states = [value for p in trained for value in optimizer.state[p].values()]
    for p in trained:
        p.grad = torch.empty_like(p) if with_gradients else None
    tag("parameters", (tensor.data for tensor in (*model.parameters(), *model.buffers())))
    tag("optimizer", states)
    tag("gradients", (p.grad for p in trained))
    tag("activations", inputs)
    start = len(tracker.events) - 1
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: tag("gradients", [p.grad])) for p in trained
    ]
    try:
        with torch.random.fork_rng(devices=[]), rules.in_recomputation(), rules, tracker:
            run(stand_in)
    finally:
        for handle in handles:
            handle.remove()
        for p in trained:
            p.grad = None
    kinds.update(dict.fromkeys(rules.copies, "autocast copies"))
    return as_trace(tracker, kinds, start, workspaces)


def make_states(optimizer: torch.optim.Optimizer, trained: list[Tensor]) -> None:
    """The states that the optimizer has after its first step, for the parameters that train."""
    missing = [p for p in trained if p not in optimizer.state]
    if missing:
        for p in missing:
            p.grad = torch.empty_like(p)
        with Tracker(False):  # faster than without
            optimizer.step()
        optimizer.zero_grad()


def as_trace(tracker: Tracker, kinds: dict[int, str], start: int, workspaces: int) -> Trace:
    numbers, sizes, backward = map(np.array, zip(*tracker.events))
    last_backward = np.flatnonzero(backward)[-1] if backward.any() else len(backward)
    phases = np.where(np.arange(len(backward)) > last_backward, 2, backward.astype(int))
    for number, size, phase in zip(numbers.tolist(), sizes.tolist(), phases.tolist()):
        if size > 0 and phase == 0:
            kinds.setdefault(number, "activations")
    column = {number: KINDS.index(kind) for number, kind in kinds.items()}
    columns = [column.get(number, KINDS.index("transient")) for number in numbers.tolist()]
    change = np.zeros((len(sizes), len(KINDS)), dtype=np.int64)
    change[np.arange(len(sizes)), columns] = sizes
    change[0, KINDS.index("workspaces")] += workspaces
    flops = np.zeros((len(PHASES), 2))
    for (was_backward, half), count in tracker.flops.items():
        flops[int(was_backward), 0 if half else 1] += count
    return Trace(change.cumsum(0)[start:], phases[start:], flops)
