"""Speed and memory of WavLM's attention: eager, sdpa, fused and transformers, side by side.

    python tests/bench_attention.py                              # layers of WavLM-Large
    python tests/bench_attention.py --amp bf16 --frames 150 600
    python tests/bench_attention.py --model large                 # training steps of WavLM, a GPU

The rivals of a line take turns within each run. Printed are medians over runs, after one warm-up,
and ratios of medians. A layer runs forward and backward in training mode with the checkpoint's
dropout (0.1); all of its parameters and its input train. Run by hand; results go into the README
with machine and date.
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
import wavlm

GIB = 2**30
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}


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


def layer_rivals(
    batch_size: int, frames: int, amp: str, dropout: float, device: torch.device
) -> dict[str, Callable[[], None]]:
    """name -> a training step of the first layer of WavLM-Large, which holds the bias table."""
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
    dtype = AUTOCAST[amp]  # of the residual stream, as in the model
    x = torch.randn(batch_size, frames, 1024, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    mask = torch.ones(batch_size, frames, dtype=torch.bool, device=device)

    def step(forward: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=amp != "off"):
            out = forward()
        out.backward(gradient.to(out.dtype))
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


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = race({"mm": lambda: torch.mm(a, b)}, 20, device)
    return 2 * size**3 / times["mm"][0] / 1e9


def step_flops(model: wavlm.WavLM, batch_size: int, seconds: float) -> float:
    """FLOPs of the Transformer's linear maps and attention in a training step, without the CNN."""
    config = model.config
    frames = model.frame_lengths(int(seconds * 16_000))
    width, inner = config.hidden_size, config.intermediate_size
    layer = 2 * frames * (4 * width**2 + 2 * width * inner) + 4 * frames**2 * width
    frozen = min(max(model.frozen_blocks - 2, 0), config.num_hidden_layers)
    trained = config.num_hidden_layers - frozen
    return batch_size * layer * (config.num_hidden_layers + 2 * trained)


def training_steps(args: argparse.Namespace, device: torch.device) -> None:
    """Steps of one random batch, over what trains, precision, checkpointing and torch.compile."""
    peaks = {amp: matmul_peak(AUTOCAST[amp], device) for amp in args.amps}
    print("matmul peak", {amp: f"{peak:.0f} TFLOP/s" for amp, peak in peaks.items()})
    top = min(6, wavlm.SIZES[args.model].num_hidden_layers)
    for seconds, batch_size in zip(args.seconds, args.batch_sizes):
        for unfreeze in (f"top:{top}", "all"):
            for amp in args.amps:
                for switch in ("", "checkpointing", "compile"):
                    title = f"{args.model} {seconds:g} s x {batch_size} | {unfreeze} | {amp}"
                    if switch:
                        title += f" | {switch}"
                    model = build(args.model, unfreeze, switch, device)
                    step = training_step(model, batch_size, seconds, AUTOCAST[amp], device)
                    for _ in range(2):
                        step()
                    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                    ((ms, gib),) = race({"step": step}, args.runs, device).values()
                    tflops = step_flops(model, batch_size, seconds) / ms / 1e9
                    print(
                        f"{title} | {ms:.0f} ms | {1000 * seconds * batch_size / ms:.0f} audio-s/s "
                        f"| {tflops:.0f} TFLOP/s, {tflops / peaks[amp]:.0%} of matmul | "
                        f"peak {held / GIB + gib:.2f} GiB",
                        flush=True,
                    )


def build(size: str, unfreeze: str, switch: str, device: torch.device) -> wavlm.WavLM:
    model = wavlm.load_wavlm(size).to(device).train()
    model.set_trainable(unfreeze)
    model.gradient_checkpointing = switch == "checkpointing"
    if switch == "compile":
        # attention's bias is built again in backward; without this, torch keeps forward's for it
        torch._functorch.config.ban_recompute_materialized_backward = False
        for layer in model.encoder.layers:
            layer.compile(dynamic=True)
    return model


def training_step(
    model: wavlm.WavLM, batch_size: int, seconds: float, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """A step with AdamW and the mean of the last state as the loss."""
    waveform = torch.randn(batch_size, int(seconds * 16_000), device=device)
    mask = torch.ones(waveform.shape, dtype=torch.bool, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            states, _ = model(waveform, mask)
        (last,) = states.values()
        scaler.scale(last.float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--frames", type=int, nargs="+", default=[150, 300, 600, 1000])
    p.add_argument("--tokens", type=int, default=1200, help="batch size x frames, about")
    p.add_argument("--amp", choices=AUTOCAST, default="off", help="precision of the layer")
    p.add_argument("--dropout", type=float, default=0.1, help="hidden and attention dropout")
    p.add_argument("--model", choices=wavlm.SIZES, help="training steps of this size")
    p.add_argument("--seconds", type=float, nargs="+", default=[5.0, 11.0], help="with --model")
    p.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 16], help="one per --seconds")
    p.add_argument("--amps", nargs="+", choices=AUTOCAST, default=["fp16", "bf16"])
    p.add_argument("--runs", type=int, default=9, help="of which the median is taken")
    args = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True  # as in train.py
    torch.backends.cudnn.allow_tf32 = True
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.model:
        training_steps(args, device)
        return
    for frames in args.frames:
        batch_size = max(1, args.tokens // frames)
        rivals = layer_rivals(batch_size, frames, args.amp, args.dropout, device)
        results = race(rivals, args.runs, device)
        cells = [f"T {frames} B {batch_size} amp {args.amp} dropout {args.dropout:g}"]
        for name, (ms, gib) in results.items():
            cells.append(f"{name} {ms:.1f} ms" + (f" {gib:.2f} GiB" if gib else ""))
        ratio = results["transformers"][0] / results["fused"][0]
        print(" | ".join(cells), f"| transformers / fused {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
