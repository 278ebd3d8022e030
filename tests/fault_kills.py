"""SIGKILL at random moments: the resumed run ends with the files of one that was never killed.

    python -m pytest tests/fault_kills.py -m slow -s

Single ranks are forked from a server that has train.py imported, so that most of a run's time is
its own; two ranks are started by torchrun, or forked alike where torchrun is not what is tested
(run_ranks). `-s` shows the counts.
"""

import functools
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from util.checkpoints import read_checkpoint

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "torch.utils.tensorboard", "fault_kills"])
TIMING = {
    "audio_seconds_per_second", "tflops", "data_share", "padded_share", "ms_per_step", "peak_gib",
}  # fmt: skip


class OnLine(logging.Filter):
    """Calls `act` as the run logs the `at`th line that matches `pattern`; used in a with block."""

    def __init__(self, pattern, act, at=1):
        super().__init__()
        self.pattern, self.act, self.at, self.seen = pattern, act, at, 0

    def filter(self, record):
        if re.search(self.pattern, record.getMessage()):
            self.seen += 1
            if self.seen == self.at:
                self.act()
        return True

    def __enter__(self):
        logging.getLogger("vatune").addFilter(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("vatune").removeFilter(self)


def raise_on(pattern, number=signal.SIGTERM, at=1):
    """A signal to this process as it logs a line."""
    return OnLine(pattern, functools.partial(signal.raise_signal, number), at)


def signal_on(pattern, number, rank="0"):
    """The same for a process of its own: a fault of run_ranks."""
    if os.environ.get("RANK", "0") == rank:
        raise_on(pattern, number).__enter__()


def real_fp16(patch, **settings):
    """--amp fp16 --device auto on a CPU, with these settings of GradScaler."""
    seen_by_flags = iter([True])
    patch(torch.cuda, "is_available", lambda: next(seen_by_flags, False))
    patch(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, **settings))


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
    import train

    Figure.savefig = lambda *_, **__: None  # most of a small run's time; torchrun's ranks draw
    if fault:
        fault[0](*fault[1:])
    sys.exit(train.cli(argv))


def run_ranks(argv, log, ranks, fault=None, seconds=120):
    """Exit codes of train.py's ranks, which share a console; `fault` as in fork."""
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # of the server
    env = {}
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = SERVER.Process(target=fork, args=(argv, log, env | own, fault))
        process.start()
        processes.append(process)
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


class Run:
    """A run directory, and the process that works on it."""

    def __init__(self, flags, directory, ranks=1, method="fork"):
        self.flags, self.ranks = [*flags, "--out", str(directory), "--name", "run"], ranks
        self.method = method  # of one rank's loader workers
        self.directory = directory / "run" / "fold1"
        self.log = directory / "console.log"
        directory.mkdir(parents=True, exist_ok=True)

    def start(self, *more, **env):
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
            os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # of the server
            args = (argv, self.log, env, None, self.method)
            self.process = SERVER.Process(target=fork, args=args)
            self.process.start()
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

    def console(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self):
        self.process.kill()
        self.wait()
        seconds = 2 if self.method == "fork" else 10  # a worker that starts imports torch first
        end = time.monotonic() + seconds
        while processes_of(self.directory.parent.parent):
            assert time.monotonic() < end, f"processes outlive the kill by {seconds} s"
            time.sleep(0.01)

    def records(self):
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def status(self):
        path = self.directory / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def outcome(self):
        """All that must not depend on where a run was interrupted."""

        def timeless(values):
            return {key: value for key, value in values.items() if key not in TIMING | {"seconds"}}

        last, best = (read_checkpoint(self.directory / name) for name in ("last.pt", "best.pt"))
        kept = {"progress": timeless(last["progress"])}
        kept |= {key: last[key] for key in ("model", "optimizer", "scaler", "meter")}
        kept |= {"best": best["model"], "records": [timeless(record) for record in self.records()]}
        kept |= {
            split: (self.directory / f"predictions_{split}.csv").read_bytes()
            for split in ("dev", "test")
        }
        return kept


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


def kill_and_compare(flags, directory, ranks, kills, rng, method="fork"):
    """(kills, of them within a save, starts, runs): of three kills, one comes early in the start,
    one at any time of the run's own, one as a save begins. A run that gets to its end before its
    kill is followed by another; each must end like one that was never killed.
    """
    whole = Run(flags, directory / "whole", ranks, method)
    assert whole.start().until(whole.status)
    begin = time.monotonic()
    assert whole.wait() == 0, whole.console()
    seconds = time.monotonic() - begin
    done = saves = starts = runs = 0
    while done < kills:
        runs += 1
        run = Run(flags, directory / f"killed{runs}", ranks, method)

        def saving(run=run):
            """Is a last.pt being written?"""
            return any(run.directory.glob(".last.pt.*.aside"))

        while done < kills and not (run.directory / "result.json").exists():
            before = run.status().get("time")
            run.start("--resume")
            starts += 1
            if done % 3 == 0:
                time.sleep(rng.uniform(0, 1))
            elif done % 3 == 1:
                run.until(lambda before=before: run.status().get("time") != before)  # noqa: B023
                time.sleep(rng.uniform(0, seconds))
            else:
                run.until(saving)
            if run.poll() is None:
                run.kill()
                done += 1
                saves += saving()
        assert run.start("--resume").wait() == 0, run.console()
        assert_same_outcome(whole, run)
    return done, saves, starts, runs


EVERYTHING = (
    "--context", "4", "--feedback", "--augment", "--ema_alpha", "learned", "--balance", "0.5",
)  # fmt: skip
SETTINGS = {  # ranks, kills, flags
    "dialogues, plateau": (1, 8, [*EVERYTHING, "--scheduler", "plateau", "--save_every", "1"]),
    "progressive, 1 worker": (
        1, 8, ["--unfreeze", "1:none,2:top:1,3:all", "--num_workers", "1", "--patience", "3"],
    ),
    "accumulated bf16, 2 workers": (
        1, 8, ["--amp", "bf16", "--batch_size", "4", "--gradient_accumulation_steps", "2",
               "--num_workers", "2", "--augment", "--save_every", "2", "--log_every", "4"],
    ),
    "two ranks": (2, 6, [*EVERYTHING, "--batch_size", "4", "--save_every", "1"]),
    "two ranks, 2 workers": (
        2, 6, ["--batch_size", "4", "--num_workers", "2", "--augment", "--amp", "bf16",
               "--unfreeze", "1:top:1,3:all", "--scheduler", "plateau", "--save_every", "2"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "method"),
    [*((setting, "fork") for setting in SETTINGS), ("progressive, 1 worker", "forkserver")],
)
def test_a_killed_run_ends_like_one_that_was_never_killed(flags, tmp_path, setting, method):
    ranks, kills, more = SETTINGS[setting]
    flags = [*flags, "--epochs", "4", *more]
    rng = random.Random(setting)
    counts = kill_and_compare(flags, tmp_path, ranks, kills, rng, method)
    done, saves, starts, runs = counts
    print(f"{setting}, {method}: {done} kills, {saves} within a save, {starts} starts, {runs} runs")
