"""Trials on the device before the first step: what does not work there is replaced, not trusted.

A kernel or a compiler may be missing, or wrong, on a GPU that nobody here has seen. Each trial runs
once, in the run's precision, against plain torch, and says in one line of the log what it found.
"""

import argparse
import logging
import math

import numpy as np
import torch
from torch import Tensor

import data
from model import AUTOCAST, EmotionModel
from step import autocast, inference, set_trainable, stages, to_device
from util import distributed
from wavlm import PADDING_BIAS, attend, dense_table

log = logging.getLogger("vatune")

# of a trial's results, relative to the largest of each; float32 may be TF32 [guess]
TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}


def check_attention(model: EmotionModel, args: argparse.Namespace, device: torch.device) -> None:
    """Falls back to sdpa, with a line in the log, if --attention fused does not work on the device.

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
    if not error <= TOLERANCE[dtype]:
        wavlm.attention = "sdpa"
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
    errors = [(a - b).abs().max() / a.abs().max() for a, b in zip(*results)]
    return float(torch.stack(errors).float().max())


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
        error = float((trial() - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE[AUTOCAST[args.amp]]:
            reason = f"it differs from the plain layers by {error:.0e} of the largest value"
    except Exception as fault:  # of dynamo, inductor, triton, a C compiler: no common base class
        reason = in_one_line(fault)
    if distributed.any_rank(bool(reason)):
        model.zero_grad()
        torch.compiler.set_stance("force_eager")
        reason = reason or "another rank cannot"
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
        layers = model.encoder.blocks
    for layer in layers:
        layer.compile(dynamic=True)


def in_one_line(fault: Exception) -> str:
    """Kind and text of what a kernel or a compiler raised."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:160]}"
