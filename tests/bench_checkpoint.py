"""How long a step waits for a checkpoint: a write in the loop against Writer, which copies.

    python tests/bench_checkpoint.py                   # 3.8 GB, WavLM-Large with AdamW's states
    python tests/bench_checkpoint.py --gb 0.5 --runs 3

Run by hand. `copy` is what a copy in host memory costs alone, `wait` what the loop waits for.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from util.checkpoints import Writer, save_checkpoint


def seconds(call: object) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--gb", type=float, default=3.8, help="size of the checkpoint, 1e9 bytes")
    p.add_argument("--runs", type=int, default=3, help="of which the median is taken")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = 300
    tensors = {
        str(i): torch.rand(int(args.gb * 1e9 / 4 / count), device=device) for i in range(count)
    }
    times = {"write in the loop": [], "copy": [], "wait": [], "until it is on the disk": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, writer = Path(folder) / "last.pt", Writer()
        copies = [tensor.cpu().clone() for tensor in tensors.values()]
        for _ in range(args.runs + 1):
            times["write in the loop"].append(
                seconds(lambda: save_checkpoint(path, {"model": tensors}))
            )
            times["copy"].append(
                seconds(lambda: [a.copy_(b) for a, b in zip(copies, tensors.values())])
            )
            wait = seconds(lambda: writer.write({path: {"model": tensors}}, then=lambda: None))
            times["wait"].append(wait)
            times["until it is on the disk"].append(wait + seconds(writer.wait))
    for name, values in times.items():
        print(f"{name:<24}{statistics.median(values[1:]):8.2f} s")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.gb} GB, {where}, torch {torch.__version__}, {time.strftime('%F')}")


if __name__ == "__main__":
    main()
