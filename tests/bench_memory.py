"""Planned against measured peaks of a training step, over a grid of settings.

    python tests/bench_memory.py            # on a CPU against the profiler: minutes
    python tests/bench_memory.py --quick    # one precision, one shape

On CUDA the measured side is torch.cuda.max_memory_allocated; on a CPU it is the profiler's record
of every allocation, which includes the workspaces of CPU kernels that no plan knows. Run by hand.
"""

import argparse
import functools
import gc
import sys
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import flags
import memory
import step
from util import distributed


def grid(cuda: bool, quick: bool) -> list[list[str]]:
    """The flags of each setting."""
    everything = ["--unfreeze", "all"]
    variations = [
        *(["--unfreeze", what] for what in ("none", "top:2", "transformer", "all")),
        ["--unfreeze", "none", "--augment"],
        ["--lora", "8"],
        *([*everything, "--attention", kind] for kind in ("sdpa", "eager")),
        [*everything, "--gradient_checkpointing"],
        [*everything, "--gradient_checkpointing", "--attention", "eager"],
        [*everything, "--gradient_accumulation_steps", "3"],
        [*everything, "--pooling", "attention", "--layers", "1", "2"],
        [*everything, "--context", "2", "--feedback"],
    ]
    amps = ("fp16", "bf16", "off") if cuda else ("off", "bf16")
    sizes = ("base", "large") if cuda else ("tiny",)
    shapes = (("8", "5.7"), ("4", "11")) if cuda else (("4", "2.5"), ("6", "1"))
    if quick:
        amps, sizes, shapes = amps[:1], sizes[-1:], shapes[:1]
    settings = [
        ["--wavlm", size, "--amp", amp, "--batch_size", batch, "--max_seconds", seconds, *more]
        for size in sizes
        for amp in amps
        for batch, seconds in shapes
        for more in variations
    ]
    cnn = ["--batch_size", "4", "--max_seconds", "2.5", "--base_channels", "16", "--encoder"]
    return settings + [[*cnn, encoder] for encoder in ("convnext", "baseline")]


def measured_bytes(
    args: argparse.Namespace, shape: data.InputShape, device: torch.device, seed: int = 0
) -> int:
    """Bytes of tensors at the peak of a real second step."""
    torch.manual_seed(seed)
    gc.collect()
    held = 0
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
    model = step.build_model(args, shape).to(device)
    optimizer = step.build_optimizer(model, args)
    run = functools.partial(memory.random_step, model, optimizer, args, shape, args.unfreeze)
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    states = [t for state in optimizer.state.values() for t in state.values()]
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return held + peak


def planned_bytes(args: argparse.Namespace, shape: data.InputShape) -> int:
    """Bytes at the planned peak of that step, evaluation left out."""
    return memory.Planner(args, shape).trace(args, args.unfreeze).peak_bytes


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="one precision and one shape")
    quick = p.parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for words in grid(device.type == "cuda", quick):
        args = flags.parse_args(["--prosody", "none", "--device", device.type, *words], 1)
        shape = memory.shape_of(args)
        planned, real = planned_bytes(args, shape), measured_bytes(args, shape, device)
        rows.append(
            {
                "setting": " ".join(words),
                "planned MiB": planned / 2**20,
                "measured MiB": real / 2**20,
                "error %": 100 * (planned / real - 1),
            }
        )
        print(rows[-1]["setting"], file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.2f"))
    errors = table["error %"]
    print(
        f"errors {errors.min():+.2f} % to {errors.max():+.2f} % over {len(table)} settings; ",
        end="",
    )
    print(distributed.device_name(device), f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
