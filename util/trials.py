"""Trials on the device before the first step: what does not work there is replaced, not trusted.

A kernel or a compiler may be missing, or wrong, on a GPU that nobody here has seen. Each trial runs
once, in the run's precision, against plain torch, and says in one line of the log what it found.
The batch of --batch_size auto, which memory.py plans, is tried as well.
"""

import argparse
import functools
import importlib.util
import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import data
import flags
import memory
from model import AUTOCAST, EmotionModel, selective_scan
from step import autocast, build_optimizer, inference, set_trainable, stages, to_device
from util import distributed
from util.files import UserError
from wavlm import PADDING_BIAS, attend, dense_table

log = logging.getLogger("vatune")

# of a trial's results, relative to the largest of each; float32 may be TF32 [guess]
TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
# mamba-ssm's reference is within 2e-7, 6e-4 and 6e-3 [measured, CPU]
SCAN_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
ON_ANOTHER = "it does not on another rank"


def in_one_line(fault: Exception) -> str:
    """Kind and text of what a kernel or a compiler raised."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:160]}"


def check_attention(model: EmotionModel, args: argparse.Namespace, device: torch.device) -> None:
    """Falls back to sdpa, with a line in the log, if --attention fused does not work on the device
    of some rank (all ranks participate).

    It is tried once, in the run's precision: its kernel may be missing, or wrong, on a new GPU.
    """
    if args.encoder != "wavlm" or args.attention != "fused":
        return
    wavlm, dtype = model.encoder.wavlm, AUTOCAST[args.amp]
    heads = wavlm.config.num_attention_heads
    try:
        error = attention_error(heads, wavlm.config.hidden_size // heads, dtype, device)
        reason = f"it differs from eager attention by {error:.0e} of the largest value"
    except Exception as fault:  # of a kernel: anything
        error, reason = math.inf, in_one_line(fault)
    if distributed.any_rank(not error <= TOLERANCE[dtype]):
        wavlm.attention = "sdpa"
        if error <= TOLERANCE[dtype]:
            reason = ON_ANOTHER
        log.info(f"--attention fused does not work on {device}, sdpa is used: {reason}")


@torch.enable_grad()
def attention_error(heads: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference of fused from eager attention, forward and backward, with padding; NaN if
    a value is."""
    frames, padded, real = 29, 32, 20  # no multiple of 8; the second utterance is shorter
    generator = torch.Generator().manual_seed(0)  # not the run's
    shapes = [(2, heads, frames, width)] * 3 + [(2, heads, frames, 1), (heads, frames + padded - 1)]
    leaves = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    ]
    key_bias = torch.zeros(2, 1, 1, padded, dtype=dtype, device=device)
    key_bias[1, ..., real:frames] = PADDING_BIAS
    is_real = torch.ones(2, 1, frames, 1, dtype=torch.bool, device=device)
    is_real[1, :, real:] = False
    results = []
    for kind in ("eager", "fused"):
        position = leaves[4] if kind == "fused" else dense_table(leaves[4], frames)
        out = attend(*leaves[:4], position, key_bias, 0.0, kind).float() * is_real
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    return deviation(*results)


def deviation(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of each tensor; NaN if a value is."""
    errors = [(a - b).abs().max() / a.abs().max() for a, b in zip(expected, found)]
    return float(torch.stack(errors).float().max())


def check_scan(model: EmotionModel, args: argparse.Namespace, device: torch.device) -> None:
    """Scans complete dialogues by mamba_ssm if it is installed and works on the device of every
    rank; the log says which scan is used (all ranks participate).

    A package that was built for another torch, CUDA or GPU may be imported and yet fail when it is
    called, or give wrong numbers. With feedback no dialogue is scanned at once.
    """
    installed = importlib.util.find_spec("mamba_ssm") is not None
    unused = model.updater is None or not len(model.updater.blocks) or args.feedback
    if unused or not distributed.any_rank(installed):
        return
    reason = ""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        scan = functools.partial(selective_scan_fn, delta_softplus=True, return_last_state=True)
        dtypes = (torch.float32, AUTOCAST[args.amp])
        errors = {dtype: scan_error(scan, device, dtype) for dtype in dtypes}
        if not all(error <= SCAN_TOLERANCE[dtype] for dtype, error in errors.items()):
            figures = " and ".join(f"{error:.0e}" for error in errors.values())
            reason = f"it differs from PyTorch by {figures} of the largest value"
    except Exception as fault:  # a broken package may raise anything
        reason = in_one_line(fault)
    if distributed.any_rank(bool(reason)):
        remedy = f"docs/benchmarks.md: a mamba-ssm for torch {torch.__version__}"
        reason = reason or ON_ANOTHER
        log.info(f"dialogues are scanned in PyTorch, not by mamba_ssm: {reason} ({remedy})")
        return
    for block in model.updater.blocks:
        block.scan = scan
    log.info("dialogues are scanned by mamba_ssm, which agrees with PyTorch")


@torch.enable_grad()
def scan_error(scan: Callable, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of a scan on `device` from ours on the CPU, forward and backward."""
    generator = torch.Generator().manual_seed(0)  # not the run's
    shapes = [(2, 32, 9), (2, 32, 9), (32, 16), (2, 16, 9), (2, 16, 9), (32,), (2, 32, 9), (32,)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[2] = -inputs[2].exp()  # a
    weight = torch.randn(2, 32, 9, generator=generator)
    results = []
    for function, where in ((selective_scan, torch.device("cpu")), (scan, device)):
        leaves = [
            # a, d and dt_bias stay in float32
            x.to(where, torch.float32 if i in (2, 5, 7) else dtype, copy=True).requires_grad_()
            for i, x in enumerate(inputs)
        ]
        y, state = function(*leaves)
        gradients = torch.autograd.grad((y.float() * weight.to(where)).sum(), leaves)
        results.append([x.detach().float().cpu() for x in (y, state, *gradients)])
    return deviation(*results)


def check_compile(
    model: EmotionModel, dataset: data.Batches, args: argparse.Namespace, device: torch.device
) -> None:
    """Compiles the layers, or leaves them as they are, with a line in the log, if that does not
    work on the device of some rank (all ranks participate).

    They are tried on two clips, in the run's precision and in every stage. The same runs without
    torch.compile first, so that an error of the model itself keeps its traceback.
    """
    median = np.argsort(dataset.lengths)[len(dataset.lengths) // 2 :][:2].tolist()
    batch = to_device(dataset.collate(data.BatchSpec(tuple((row,) for row in median))), device)

    def trial() -> Tensor:
        with autocast(device, args.amp):
            for stage in stages(args.unfreeze):
                set_trainable(model, stage, args.train_only)
                vectors = model.encode(batch)
                if vectors.requires_grad:
                    vectors.square().sum().backward()
            model.zero_grad()
            with inference(model):
                return model.encode(batch).cpu()  # waits for the device

    expected, reason = trial(), ""
    compile_layers(model)
    try:
        error = deviation([expected], [trial()])
        if not error <= TOLERANCE[AUTOCAST[args.amp]]:
            reason = f"it differs from the plain layers by {error:.0e} of the largest value"
    except Exception as fault:  # of dynamo, inductor, triton, a C compiler: no common base class
        reason = in_one_line(fault)
    if distributed.any_rank(bool(reason)):
        model.zero_grad()
        torch.compiler.set_stance("force_eager")
        reason = reason or ON_ANOTHER
        log.info(f"--compile does not work on {device}, the layers run as they are: {reason}")


def compile_layers(model: EmotionModel) -> None:
    """Compiles the encoder's layers in place, for any length; state_dict keeps its names.

    All layers share one code object, whose variants (frozen or not, evaluation, a first layer fed
    by the frozen part) may be more than the 8 after which torch gives up and runs it uncompiled.
    """
    torch.compiler.set_stance("default")
    torch._dynamo.config.recompile_limit = 64
    # backward rebuilds attention's bias; without this, torch keeps forward's copy for it
    torch._functorch.config.ban_recompute_materialized_backward = False
    if model.config.encoder == "wavlm":
        layers = model.encoder.wavlm.encoder.layers
    else:
        layers = getattr(model.encoder, "blocks", None)
        if layers is None:
            raise UserError(f"--compile: --encoder {model.config.encoder} names no blocks")
    for layer in layers:
        layer.compile(dynamic=True)


def probe(model: EmotionModel, args: argparse.Namespace, shape: data.InputShape) -> bool:
    """True if steps of the longest utterances run in every stage, and a batch of evaluation (all
    ranks participate). The weights are put back."""
    before = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    fits = True
    try:
        for stage in stages(args.unfreeze):
            optimizer = build_optimizer(model, memory.with_flags(args, unfreeze=stage))
            for _ in range(2):  # the second has all optimizer states
                memory.random_step(model, optimizer, args, shape, stage)
        memory.encode(model, args, shape)
    except (RuntimeError, MemoryError) as error:  # in a step: StepTooLarge, on all ranks
        if not distributed.is_out_of_memory(error):
            raise
        fits = False
    finally:
        optimizer = None  # makes room
        model.zero_grad()
        model.load_state_dict(before)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return not distributed.any_rank(not fits)


def auto_batch(
    model: EmotionModel,
    args: argparse.Namespace,
    shape: data.InputShape,
    ranks: distributed.Ranks,
    largest: int,
) -> tuple[int, str]:
    """(micro-batch up to `largest`, how it was found) for --batch_size auto.

    The plan proposes, a probe confirms, all ranks take the smallest (all ranks participate).
    UserError if nothing fits.
    """
    world_size, device = ranks.world_size, ranks.device
    fault = f"--batch_size auto: nothing fits: {memory.LESS_MEMORY}"
    try:
        size = memory.largest_batch(args, shape, world_size, largest).batch_size
    except UserError as error:
        size, fault = 0, str(error)
    size = proposed = min(distributed.gather(size))
    while size:
        trial = memory.with_batch(args, size, world_size)
        trial.gradient_accumulation_steps = min(2, trial.gradient_accumulation_steps)
        distributed.reset_peak(device)
        if probe(model, trial, shape):
            peak = distributed.peak_gib(device)
            distributed.reset_peak(device)
            return size, f" | batch {size}, planned as {proposed} and probed at {peak:.2f} GiB"
        smaller = [n for n in memory.batch_sizes(args, world_size, size) if n <= 0.85 * size]
        size = max(smaller, default=0)
    raise UserError(fault)


def choose_batch(
    args: argparse.Namespace,
    fold: data.Fold,
    model: EmotionModel,
    ranks: distributed.Ranks,
    last: dict | None,
) -> str:
    """Sets the batch sizes that are not known yet; returns how one was found, for the log.

    `last`: content of last.pt, whose run had found its micro-batch. All ranks participate.
    """
    if last:
        total = last["global_batch_size"]
        flags.split_batch(args, last["batch_size"], ranks.world_size, total=total)
    elif args.batch_size == "auto":
        largest = len(fold.splits["train"]) // (flags.AUTO_STEPS * ranks.world_size)
        largest = max(args.context, largest)
        size, note = auto_batch(model, args, fold.shape, ranks, largest)
        flags.split_batch(args, size, ranks.world_size)
        return note
    return ""
