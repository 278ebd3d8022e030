"""Seconds from a warm start to the first step, over the size of the corpus.

    python tests/bench_scale.py --clips FOLDER                    # 10,000, 50,000 and 150,000 rows
    python tests/bench_scale.py --clips FOLDER --rows 2000 --keep scratch

A row is a cut of 0.1 to 0.2 s of a clip in FOLDER, whose manifest.csv has path and speaker. The
first start fills the caches; the second one is timed until its first step is logged, then stopped
by a signal. `CPU s` is user time, which a busy machine changes little; `worker MiB` is what a
loader process holds beyond what it shares with the others. Run by hand.
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parent.parent
IMPORTS = "import train"


def write_manifest(clips: Path, rows: int, path: Path) -> None:
    known = pd.read_csv(clips / "manifest.csv", dtype=str)
    rng = np.random.default_rng(0)
    picked = known.iloc[rng.integers(0, len(known), rows)]
    start = rng.uniform(0, 1.5, rows).round(3)
    table = pd.DataFrame(
        {
            "utt_id": [f"u{i}" for i in range(rows)],
            "path": picked["path"].to_numpy(),
            "start": start,
            "end": (start + rng.uniform(0.1, 0.2, rows)).round(3),
            "speaker": picked["speaker"].to_numpy(),
            "session": picked["speaker"].to_numpy(),
            "valence": rng.random(rows).round(3),
            "arousal": rng.random(rows).round(3),
        }
    )
    table.to_csv(path, index=False)


def first_step(manifest: Path, clips: Path, folder: Path) -> dict[str, float]:
    """Seconds to the first step of a new run, and MiB of its loader processes."""
    command = [sys.executable, "train.py", "--data", str(manifest), "--data_dir", str(clips)]
    command += ["--encoder", "baseline"]
    command += ["--base_channels", "4", "--prosody", "none", "--batch_size", "8", "--device", "cpu"]
    command += ["--num_workers", "2", "--log_every", "1", "--cache_dir", str(folder / "cache")]
    command += ["--out", str(folder), "--name", "bench", "--overwrite"]
    log = folder / "bench" / "fold1" / "metrics.jsonl"
    log.unlink(missing_ok=True)
    start = time.perf_counter()
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (log.exists() and log.read_text()):
        if run.poll() is not None:
            sys.exit(f"the run ended with {run.returncode}")
        time.sleep(0.02)
    seconds, cpu = time.perf_counter() - start, cpu_seconds(run.pid)
    private = [private_mib(pid) for pid in children(run.pid)]
    status = Path(f"/proc/{run.pid}/status").read_text()
    parent = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
    run.send_signal(signal.SIGTERM)
    run.wait()
    found = {"s to first step": seconds, "CPU s": cpu}
    return found | {"worker MiB": max(private), "parent RSS MiB": parent}


def cpu_seconds(pid: int) -> float:
    """User time so far, which a busy machine changes little."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def private_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--clips", type=Path, required=True, help="folder with manifest.csv")
    p.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 150_000])
    p.add_argument("--keep", type=Path, help="folder that keeps manifests and caches")
    args = p.parse_args()
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)
    imports = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        for rows in args.rows:
            manifest = folder / f"{rows}.csv"
            if not manifest.exists():
                write_manifest(args.clips, rows, manifest)
            cold = first_step(manifest, args.clips, folder)
            warm = first_step(manifest, args.clips, folder)
            warm["CPU s beyond imports"] = warm["CPU s"] - imports
            found.append({"rows": rows, "CPU s cold": cold["CPU s"], **warm})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(pd.DataFrame(found).to_string(index=False, float_format="%.1f"))
    print(f"imports {imports:.1f} s of CPU, {time.strftime('%F')}")


if __name__ == "__main__":
    main()
