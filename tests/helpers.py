"""Runs of train.py and faults in them: in this process, in forked ranks, or under torchrun.

Forked ranks come from a server that has imported train.py, so that most of their time is their own.
"""

import functools
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEVICE
from matplotlib.figure import Figure

import train

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "torch.utils.tensorboard", "helpers"])
NO_DROPOUT = ("--dropout", "0", "--wavlm_dropout", "0")
EVERYTHING = (
    "--context", "4", "--feedback", "--augment", "--ema_alpha", "learned", "--balance", "0.5",
)  # fmt: skip
TIMING = {
    "audio_seconds_per_second", "tflops", "peak_share", "data_share", "padded_share",
    "ms_per_step", "peak_gib", "seconds",
}  # fmt: skip


# --- faults


class OnLine(logging.Filter):
    """Calls `act` when the run logs the first line that matches `pattern`; for a with block."""

    def __init__(self, pattern, act):
        super().__init__()
        self.pattern, self.act, self.seen = pattern, act, False

    def filter(self, record):
        if not self.seen and re.search(self.pattern, record.getMessage()):
            self.seen = True
            self.act()
        return True

    def __enter__(self):
        logging.getLogger("vatune").addFilter(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("vatune").removeFilter(self)


def raise_on(pattern, number=signal.SIGTERM):
    """A signal to this process when it logs a line."""
    return OnLine(pattern, functools.partial(signal.raise_signal, number))


def is_model(module, output):
    """Is this a real forward of the whole model, and not the memory plan's?"""
    return type(module).__name__ == "EmotionModel" and not output.is_meta


def real_fp16(patch, **settings):
    """--amp fp16 --device auto on a CPU, with these settings of GradScaler."""
    seen_by_flags = iter([True])
    patch(torch.cuda, "is_available", lambda: next(seen_by_flags, False))
    patch(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, **settings))


# --- processes


def fork(argv, log, env, fault=None, method="fork"):
    """train.py in this process, as from a shell; `fault`: a function of a test module, and its
    arguments, called before; `method`: how loader workers start."""
    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # as train.py's first lines do
        signal.signal(number, lambda *_: sys.exit(75))
    os.environ.update(env)
    torch.set_num_threads(1)  # the server has read OMP_NUM_THREADS already
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    Figure.savefig = lambda *_, **__: None  # most of a small run's time; torchrun's ranks draw
    if fault:
        fault[0](*fault[1:])
    sys.exit(train.cli(argv))


def start_process(*args):
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # of the server
    process = SERVER.Process(target=fork, args=args)
    process.start()
    return process


def run_ranks(argv, log, ranks, fault=None, seconds=120):
    """Exit codes of train.py's ranks, which share a console; `fault` as in fork."""
    if DEVICE == "cuda" and ranks > torch.cuda.device_count():
        pytest.skip(f"needs {ranks} GPUs")
    env = {}
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(start_process(argv, log, env | own, fault))
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def processes_of(mark):
    """Pids of the living processes that have `mark` in their command line or open console."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            dead = (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            names = (path / "cmdline").read_bytes().decode(errors="replace")
            if not dead and int(path.name) != os.getpid():
                output = os.readlink(path / "fd" / "1")
                if str(mark) in names or output.startswith(f"{mark}/"):
                    found.append(int(path.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds):
    """Waits until `condition()` holds; returns the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - begin


# --- a run


class Run:
    """A run directory, and what trains in it."""

    def __init__(self, flags, directory, ranks=1, method="fork"):
        self.flags, self.ranks = [*flags, "--out", str(directory), "--name", "run"], ranks
        self.method = method  # of one rank's loader workers
        fold = flags[flags.index("--fold") + 1] if "--fold" in flags else 1
        self.directory = directory / "run" / f"fold{fold}"
        self.log = directory / "console.log"
        directory.mkdir(parents=True, exist_ok=True)

    def train(self, *more):
        """Exit code of train.py in this process."""
        try:
            return train.cli([*self.flags, *more])
        except SystemExit as error:  # a wrong flag
            return error.code

    def in_ranks(self, *more, fault=None, seconds=120):
        """Exit codes of forked ranks, see run_ranks."""
        return run_ranks([*self.flags, *more], self.log, self.ranks, fault, seconds)

    def start(self, *more, **env):
        """A process of its own; two ranks are started by torchrun."""
        argv = [*self.flags, *more]
        env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        if self.ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(self.ranks), str(ROOT / "train.py"), *argv]
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=os.environ | env, start_new_session=True
                )
        else:
            self.process = start_process(argv, self.log, env, None, self.method)
        return self

    def wait(self, seconds=240):
        """Exit code."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(seconds)
        self.process.join(seconds)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode

    def poll(self):
        popen = isinstance(self.process, subprocess.Popen)
        return self.process.poll() if popen else self.process.exitcode

    def until(self, condition, seconds=60):
        """Waits until `condition()` holds; False when the run ended first."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if condition():
                return True
            assert time.monotonic() < end, self.console()
            time.sleep(0.001)
        return False

    def kill(self):
        self.process.kill()
        self.wait()
        seconds = 2 if self.method == "fork" else 10  # a worker that starts imports torch first
        wait_for(lambda: not processes_of(self.directory.parent.parent), seconds)

    def console(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def train_log(self):
        return (self.directory / "train.log").read_text()

    def records(self, event=None):
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in found if event in (None, record["event"])]

    def losses(self):
        return [record["loss"] for record in self.records("train")]

    def status(self):
        return self.json("status.json")

    def json(self, name):
        path = self.directory / name
        return json.loads(path.read_text()) if path.exists() else {}

    def checkpoint(self, name="last.pt"):
        return torch.load(self.directory / name, weights_only=True)

    def weights(self, name="last.pt"):
        return self.checkpoint(name)["model"]

    def predictions(self, split="test"):
        """Columns pred_*, with utterances as the index."""
        table = pd.read_csv(self.directory / f"predictions_{split}.csv", index_col="utt_id")
        return table.filter(like="pred_")

    def outcome(self):
        """All that must not depend on where a run was interrupted."""

        def timeless(values):
            return {key: value for key, value in values.items() if key not in TIMING}

        last = self.checkpoint()
        kept = {"progress": timeless(last["progress"])}
        kept |= {key: last[key] for key in ("model", "optimizer", "scaler", "meter")}
        kept["best"] = self.weights("best.pt")
        kept["records"] = [timeless(record) for record in self.records()]
        for split in ("dev", "test"):
            kept[split] = (self.directory / f"predictions_{split}.csv").read_bytes()
        return kept


def same(one, other):
    """Equality down to the bits of tensors, in nested dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_outcome(one, other):
    one, other = one.outcome(), other.outcome()
    for key in one:
        assert same(one[key], other[key]), key


def assert_same(one, other, **tolerance):
    """Of two models' weights: to the bit, or to a tolerance."""
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            torch.testing.assert_close(one[name], other[name], msg=name, **tolerance)
        else:
            assert torch.equal(one[name], other[name]), name


# --- inputs


def write_arrays(folder, *shape):
    """The folder, with <utt_id>.npy of random numbers for every utterance of the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(72):
        name = f"s{i // 24 + 1}d{i // 4 % 6}t{i % 4}.npy"
        np.save(folder / name, rng.standard_normal(shape, dtype=np.float32))
    return str(folder)


def data_flags(corpus, folder, change):
    """Flags of the corpus with another table, change(table)."""
    path = folder / "changed.csv"
    change(pd.read_csv(corpus)).to_csv(path, index=False)
    return ["--data", str(path), "--data_dir", str(corpus.parent)]
