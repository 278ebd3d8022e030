"""Speed and memory of WavLM's attention: eager, sdpa, fused and transformers, side by side.

    python tests/bench_attention.py                              # layers of WavLM-Large
    python tests/bench_attention.py --amp bf16 --frames 150 600
    python tests/bench_attention.py --attention_only              # without the linear maps
    python tests/bench_attention.py --model large                 # whole steps of train.py, a GPU

All of a line's rivals take turns within each run; what is printed are medians over runs, after
one warm-up, and ratios of medians. The layer runs forward and backward in training mode with the
checkpoint's dropout (0.1), all of its parameters and its input training. Run by hand; results go
into the README with machine and date.
"""

import argparse
import dataclasses
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
import wavlm
from memory import GIB, allow_tf32
from model import AUTOCAST
from util.tracing import meta_batch


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(
    rivals: dict[str, Callable[[], None]], runs: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """name -> (median milliseconds, GiB allocated at the peak above the start; 0 on a CPU)."""
    times = {name: [] for name in rivals}
    peaks = dict.fromkeys(rivals, 0.0)
    for run in range(runs + 1):
        for name, step in rivals.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            if run:
                times[name].append(1000 * (time.perf_counter() - start))
            if device.type == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated(device) - before) / GIB
    return {name: (statistics.median(times[name]), peaks[name]) for name in rivals}


def print_race(title: str, results: dict[str, tuple[float, float]], against: str) -> None:
    cells = [
        f"{name} {ms:.1f} ms" + (f" {gib:.2f} GiB" if gib else "")
        for name, (ms, gib) in results.items()
    ]
    ratio = results[against][0] / results["fused"][0]
    print(f"{title} | {' | '.join(cells)} | {against} / fused {ratio:.2f}", flush=True)


def layer_rivals(
    batch_size: int, frames: int, amp: str, dropout: float, device: torch.device
) -> dict[str, Callable[[], None]]:
    """One training step of a layer of WavLM-Large each, the first, which owns the bias table."""
    from transformers import WavLMConfig
    from transformers.models.wavlm.modeling_wavlm import WavLMEncoderLayerStableLayerNorm

    config = dataclasses.replace(
        wavlm.SIZES["large"], hidden_dropout=dropout, attention_dropout=dropout
    )
    known = {k: v for k, v in config.to_dict().items() if k != "final_layer_norm"}
    theirs = WavLMEncoderLayerStableLayerNorm(WavLMConfig(**known), True).train().to(device)
    ours = wavlm.Layer(config, True).train()
    ours.load_state_dict(theirs.state_dict())
    ours.to(device)
    dtype = AUTOCAST[amp]  # of the residual stream, as in the whole model
    x = torch.randn(batch_size, frames, 1024, device=device, dtype=dtype, requires_grad=True)
    given = torch.randn_like(x)
    mask = torch.ones(batch_size, frames, dtype=torch.bool, device=device)

    def step(forward: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=amp != "off"):
            out = forward()
        out.backward(given.to(out.dtype))
        for parameter in (x, *theirs.parameters(), *ours.parameters()):
            parameter.grad = None

    def of_ours(kind: str) -> Tensor:
        position = ours.attention.position_bias(frames)
        key_bias = x.new_zeros(batch_size, 1, 1, -(-frames // 8) * 8)
        if kind != "fused":
            position = wavlm.dense_table(position.to(dtype), frames)
        return ours(x, position, key_bias, kind)

    kinds = {kind: (lambda k=kind: step(lambda: of_ours(k))) for kind in wavlm.ATTENTIONS}
    return kinds | {"transformers": lambda: step(lambda: theirs(x, mask, None)[0])}


def attention_rivals(
    batch_size: int, frames: int, amp: str, dropout: float, device: torch.device
) -> dict[str, Callable[[], None]]:
    """`wavlm.attend` forward and backward, 16 heads of 64."""
    dtype = AUTOCAST[amp]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    width = -(-frames // 8) * 8
    q, k, v = (leaf(batch_size, frames, 16, 64).transpose(1, 2) for _ in range(3))
    gate, position = leaf(batch_size, 16, frames, 1), leaf(16, frames + width - 1)
    key_bias = torch.zeros(batch_size, 1, 1, width, device=device, dtype=dtype)
    inputs = [q, k, v, gate, position]

    def step(kind: str) -> None:
        table = position if kind == "fused" else wavlm.dense_table(position, frames)
        out = wavlm.attend(q, k, v, gate, table, key_bias, dropout, kind)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return {kind: (lambda kind=kind: step(kind)) for kind in wavlm.ATTENTIONS}


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = race({"mm": lambda: torch.mm(a, b)}, 20, device)
    return 2 * size**3 / times["mm"][0] / 1e9


def step_flops(args: argparse.Namespace, seconds: float) -> float:
    """FLOPs of the Transformer's linear maps and attention in one step, CNN and heads left out."""
    config = wavlm.SIZES[args.wavlm]
    frames = wavlm.WavLM(dataclasses.replace(config, num_hidden_layers=0)).frame_lengths(
        int(seconds * 16_000)
    )
    width, inner = config.hidden_size, config.intermediate_size
    layer = 2 * frames * (4 * width**2 + 2 * width * inner) + 4 * frames**2 * width
    trained = {"none": 0, "all": config.num_hidden_layers}.get(args.unfreeze, 6)
    return args.batch_size * layer * (config.num_hidden_layers + 2 * trained)


def whole_steps(args: argparse.Namespace, device: torch.device) -> None:
    """train_step of train.py on one batch, over what is unfrozen, precision, switches."""
    peaks = {amp: matmul_peak(AUTOCAST[amp], device) for amp in args.amps}
    print("matmul peak", {amp: f"{peak:.0f} TFLOP/s" for amp, peak in peaks.items()})
    switches = ([], ["--gradient_checkpointing"], ["--compile"])
    for seconds, batch_size in zip(args.seconds, args.batch_sizes):
        for unfreeze in ("none", "top:6", "all"):
            for amp in args.amps:
                for more in switches:
                    flags = ["--wavlm", args.model, "--prosody", "none", "--unfreeze", unfreeze]
                    flags += ["--amp", amp, "--batch_size", str(batch_size), "--device"]
                    run_step(train.parse_args([*flags, device.type, *more]), seconds, peaks[amp])


def run_step(args: argparse.Namespace, seconds: float, peak: float) -> None:
    device = torch.device(args.device)
    model = train.build_model(args, 0, 0).to(device)
    optimizer = train.build_optimizer(model, args)
    train.set_trainable(model, args.unfreeze)
    model.train()
    if args.compile:
        train.compile_layers(model)
    shapes = meta_batch(args, 0, 0, seconds)
    batch = {k: torch.ones(v.shape, dtype=v.dtype, device=device) for k, v in shapes.items()}
    batch["input_values"].normal_()
    batch["labels"].uniform_()
    batch["chunk_index"] = torch.arange(args.batch_size, device=device)[:, None]
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    for _ in range(3):
        train.train_step(model, model, [batch], optimizer, scaler, args)
    held = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    step = {"fused": lambda: train.train_step(model, model, [batch], optimizer, scaler, args)}
    ((ms, gib),) = race(step, 8, device).values()
    tflops = step_flops(args, seconds) / ms / 1e9
    print(
        f"{args.wavlm} {seconds:g} s x {args.batch_size} | unfreeze {args.unfreeze} | {args.amp}"
        f"{' | checkpointing' * args.gradient_checkpointing}{' | compile' * args.compile} | "
        f"{ms:.0f} ms | {1000 * seconds * args.batch_size / ms:.0f} audio-s/s | "
        f"{tflops:.0f} TFLOP/s, {tflops / peak:.0%} of matmul | peak {held + gib:.2f} GiB",
        flush=True,
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--frames", type=int, nargs="+", default=[150, 300, 600, 1000])
    p.add_argument("--tokens", type=int, default=1200, help="batch size x frames, about")
    p.add_argument("--amp", choices=AUTOCAST, default="off", help="precision of the layer")
    p.add_argument("--dropout", type=float, default=0.1, help="hidden and attention dropout")
    p.add_argument("--attention_only", action="store_true", help="wavlm.attend alone")
    p.add_argument("--model", choices=wavlm.SIZES, help="whole training steps of this size")
    p.add_argument("--seconds", type=float, nargs="+", default=[5.0, 11.0], help="with --model")
    p.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 16], help="one per --seconds")
    p.add_argument("--amps", nargs="+", choices=AUTOCAST, default=["fp16", "bf16"])
    p.add_argument("--runs", type=int, default=9, help="of which the median is taken")
    args = p.parse_args()
    allow_tf32(True)  # as train.py does
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.model:
        whole_steps(args, device)
        return
    rivals, against = layer_rivals, "transformers"
    if args.attention_only:
        rivals, against = attention_rivals, "eager"
    for frames in args.frames:
        batch_size = max(1, args.tokens // frames)
        entries = rivals(batch_size, frames, args.amp, args.dropout, device)
        title = f"T {frames} B {batch_size} amp {args.amp} dropout {args.dropout:g}"
        print_race(title, race(entries, args.runs, device), against)


if __name__ == "__main__":
    main()
