"""What a training step saves by computing the frozen part of WavLM once.

    python tests/bench_frozen.py --wavlm base --unfreeze top:3
    python tests/bench_frozen.py --wavlm large --unfreeze top:6 --batch_size 4 --runs 3

Steps on random utterances take turns: from audio, from the cache, and with the batch in two
micro-steps (exact CCC, and without). Printed are medians, their ratios, what the floating-point
operations of the plan promise, and the planned peaks. Run by hand.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import flags
import memory
import step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--wavlm", default="base", help="random weights of this size")
    p.add_argument("--unfreeze", default="top:3", help="as in train.py")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seconds", type=float, default=5.0, help="length of an utterance")
    p.add_argument("--amp", default="off", help="as in train.py")
    p.add_argument("--runs", type=int, default=5, help="of which the median is taken")
    own = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = ["--wavlm", own.wavlm, "--unfreeze", own.unfreeze, "--max_seconds", str(own.seconds)]
    words += ["--prosody", "none", "--amp", own.amp, "--device", device.type, "--batch_size"]
    audio = ["--feature_cache", "off"]
    halves = [*audio, "--gradient_accumulation_steps", "2"]
    settings = {
        "from audio": [str(own.batch_size), *audio],
        "from the cache": [str(own.batch_size)],
        "two micro-steps": [str(own.batch_size // 2), *halves],
        "two micro-steps, --exact_ccc off": [
            str(own.batch_size // 2), *halves, "--exact_ccc", "off"
        ],
    }  # fmt: skip
    parsed = {name: flags.parse_args([*words, *more], 1) for name, more in settings.items()}
    shape = memory.shape_of(parsed["from audio"])
    model = step.build_model(parsed["from audio"], shape).to(device)
    optimizer = step.build_optimizer(model, parsed["from audio"])
    times = {name: [] for name in settings}
    for _ in range(own.runs + 1):
        for name, args in parsed.items():
            start = time.perf_counter()
            memory.random_step(model, optimizer, args, shape, own.unfreeze)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, args in parsed.items():
        trace = memory.Planner(args, shape).trace(args, own.unfreeze)
        print(
            f"{name:<34}{medians[name]:8.3f} s  {medians['from audio'] / medians[name]:5.2f} times "
            f"as fast as from audio | planned peak {trace.peak_bytes / 2**30:.2f} GiB"
        )
    flops = [
        memory.Planner(parsed[name], shape).trace(parsed[name], own.unfreeze).flops.sum()
        for name in ("from audio", "from the cache")
    ]
    print(f"the operations promise {flops[0] / flops[1]:.2f} times from the cache")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{own.wavlm}, {own.unfreeze}, {own.batch_size} x {own.seconds:g} s, amp {own.amp}; ",
        end="",
    )
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
