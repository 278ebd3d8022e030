"""Faults done to real runs: damage, full disks, signals, dead and hung ranks and workers, two runs
in one directory. Their kills at random moments, in numbers, are fault_kills.py's."""

import functools
import importlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_flags
from helpers import (
    ROOT,
    OnLine,
    Run,
    assert_same_outcome,
    is_model,
    processes_of,
    raise_on,
    real_fp16,
    wait_for,
    write_arrays,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
from train import parse_args

LONG = ("--epochs", "2000", "--eval_every", "3")  # minutes: it is stopped before


@pytest.fixture(scope="module")
def whole(corpus, small_wavlm, tmp_path_factory):
    """A run that was never disturbed, of the flags of `flags`."""
    directory = tmp_path_factory.mktemp("whole")
    undisturbed = Run(quick_flags(corpus, small_wavlm, directory), directory)
    assert undisturbed.train() == 0
    return undisturbed


def step_of(run, name="last.pt"):
    return run.checkpoint(name)["progress"]["step"]


def assert_saved_at_its_last_step(run):
    assert step_of(run) == run.status()["step"] == run.records()[-1]["step"]


def gone(directory, seconds=2):
    return wait_for(lambda: not processes_of(directory), seconds)


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


# --- checkpoints


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(flags, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def watched_replace(source, target):
        calls.append(("replace", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    run = Run([*flags, "--epochs", "1", "--save_every", "2"], tmp_path)
    assert run.train() == 0
    last, previous = str(run.directory / "last.pt"), str(run.directory / "previous.pt")
    at = calls.index(("replace", last, previous))
    aside = calls[at + 1][1]
    saving = [call for call in calls[:at] if call == ("fsync", aside)]  # beside other files
    assert len(saving) == 1 and calls[at + 1] == ("replace", aside, last)
    assert ("fsync", str(run.directory)) in calls[at + 2 :]


DAMAGES = {  # content, a place in it, that of another run -> content, or None for no file
    "flipped": lambda x, at, _: x[:at] + bytes([x[at] ^ 1 << at % 8]) + x[at + 1 :],
    "cut": lambda x, at, _: x[:at],
    "empty": lambda *_: b"",
    "missing": lambda *_: None,
    "text": lambda *_: b"not a checkpoint " * 99,
    "longer": lambda x, *_: x + b"x",
    "of another run": lambda x, at, other: other,
}


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_no_damage_to_a_checkpoint_is_silent(flags, tmp_path, capsys, count):
    """Either the run ends like an undamaged one, from previous.pt, or it is refused in a line."""
    flags, rng = [*flags, "--unfreeze", "1:none,2:all", "--save_every", "1"], random.Random(0)
    whole, stopped = Run(flags, tmp_path / "whole"), Run(flags, tmp_path / "stopped")
    other = Run([*flags, "--seed", "1"], tmp_path / "other")
    with raise_on(r"^step +4/"):
        assert stopped.train() == 75
    assert whole.train() == other.train() == 0
    capsys.readouterr()

    def resumed(damaged, until="done in"):
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        shutil.copytree(tmp_path / "stopped", tmp_path / "case")
        victim = Run(flags, tmp_path / "case")
        for name, kind in damaged.items():
            path = victim.directory / name
            content, theirs = path.read_bytes(), (other.directory / name).read_bytes()
            changed = DAMAGES[kind](content, rng.randrange(1, len(content)), theirs)
            path.unlink() if changed is None else path.write_bytes(changed)
        with raise_on(until):
            code = victim.train("--resume")
        return victim, code, capsys.readouterr()

    kinds = ["flipped", "cut"] * count + ["empty", "missing", "text", "longer"]
    for i, kind in enumerate(kinds):
        to_the_end = i == 0 or count > 1  # the others begin from the same older checkpoint
        victim, code, said = resumed({"last.pt": kind}, "done in" if to_the_end else "^vatune")
        assert code == (0 if to_the_end else 75), (kind, said.err)
        assert "last.pt" in said.out and "continuing from" in said.out, kind
        if to_the_end:
            assert_same_outcome(whole, victim)
    cases = [{"last.pt": "of another run"}, {"last.pt": "missing", "previous.pt": "empty"}]
    cases += [{"last.pt": "cut", "previous.pt": "flipped"}]
    cases += [{"frozen.pt": kind} for kind in ("flipped", "missing", "of another run")]
    cases += [{"best.pt": kind} for kind in [*kinds, "of another run"]]
    for case in cases:
        _, code, said = resumed(case)
        assert code == 2 and len(said.err.strip().splitlines()) == 1, (case, said.err)
        assert "start anew with --overwrite" in said.err, case
    print(f"{len(kinds)} fell back to previous.pt, {len(cases)} were refused, 0 silent")


def test_a_resume_from_the_spare_keeps_the_spare_until_there_is_a_better_one(flags, tmp_path):
    stopped = Run([*flags, "--save_every", "1"], tmp_path)
    with raise_on(r"^step +4/"):
        assert stopped.train() == 75
    os.truncate(stopped.directory / "last.pt", 1000)
    assert step_of(stopped, "previous.pt") == 5
    with raise_on(r"^step +6/"):
        assert stopped.train("--resume") == 75
    assert [step_of(stopped, name) for name in ("previous.pt", "last.pt")] == [6, 6]


@pytest.mark.parametrize(
    ("when", "limit", "file", "saved"),
    [
        (r"^vatune", 100, "args.json", 0),
        (r"^step +2/", 0, "metrics.jsonl", 0),
        ("best.pt", 0, "(last.pt|metrics.jsonl)", 0),  # a thread writes it while training goes on
        ("last.pt", 0, "(status.json|metrics.jsonl)", 3),
        (r"^epoch +2 . dev", 400_000, "last.pt", 3),
        ("predictions_test.csv", 0, "embedding_test.npy", 6),
    ],
)
def test_a_full_disk_spares_what_is_there_and_the_run_goes_on_after(
    flags, tmp_path, capsys, monkeypatch, whole, when, limit, file, saved
):
    """From a line of the log or the first file of a name on, no file may exceed `limit` bytes."""
    victim = Run(flags, tmp_path / "victim")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    replace = os.replace

    def fill_disk(*_, **__):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def replace_and_fill(source, target):
        replace(source, target)
        if Path(target).name == when:
            fill_disk()

    with monkeypatch.context() as patch, OnLine(when, fill_disk):
        patch.setattr(os, "replace", replace_and_fill)
        try:
            assert victim.train() == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert re.search(f"/{file}: File too large: raise the limit", said), said
    assert (step_of(victim) if (victim.directory / "last.pt").exists() else 0) == saved
    assert victim.train("--resume") == 0
    assert_same_outcome(whole, victim)
    assert not list(victim.directory.glob(".*"))


def lose_streams(kind, *numbers):
    """What the shell does for `| head`, `> /dev/full` and `>&-`."""
    for number in numbers:
        if kind == "closed":
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
            os.close(number)
        elif kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        else:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, number)


@pytest.mark.parametrize("kind", ["closed", "full", "without a reader"])
def test_a_run_goes_on_when_its_output_is_closed_or_full_and_an_error_keeps_its_code(
    flags, tmp_path, kind
):
    victim = Run([*flags, "--max_steps", "1"], tmp_path)
    assert victim.in_ranks(fault=(lose_streams, kind, 1)) == [0]
    log = victim.train_log()
    assert "done in" in log and (victim.directory / "result.json").exists()
    assert ("stdout cannot be written" in log) == (kind != "closed")
    assert victim.in_ranks(fault=(lose_streams, kind, 0, 1, 2)) == [2]
    assert victim.console() == ""


@pytest.mark.parametrize(
    ("use", "error"),
    [
        ("import", RuntimeError),
        ("__init__", OSError),
        ("add_scalar", AttributeError),
        ("close", RuntimeError),
    ],
)
def test_a_broken_tensorboard_is_one_line_and_the_run_goes_on(
    flags, tmp_path, capsys, monkeypatch, error, use
):
    def broken(*_, **__):
        raise error("built for another numpy")

    class Finder:
        def find_spec(self, name, *_):
            return broken() if name == "torch.utils.tensorboard" else None

    if use == "import":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    else:
        monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{use}", broken)
    victim = Run([*flags, "--max_steps", "1"], tmp_path)
    assert victim.train() == 0
    said = capsys.readouterr()
    assert said.out.count("no TensorBoard (") == 1 and "built for another numpy" in said.out
    assert not said.err and victim.records()[0]["event"] == "train"


# --- signals


@pytest.mark.parametrize(
    ("where", "epochs"),
    [
        ("torch.from_numpy", None),
        ("fcntl.lockf", None),
        ("torch.optim.AdamW", None),
        ("torch.utils.tensorboard.SummaryWriter", None),
        (r"^step +3/", 0),  # in the first evaluation
        (r"^step +6/", 1),  # in the last one
        (r"^best epoch . . dev", 2),  # in the test
    ],
)
def test_a_run_stopped_in_its_start_or_an_evaluation_ends_like_one_that_was_not(
    flags, tmp_path, monkeypatch, whole, where, epochs
):
    """SIGTERM in the first call of a library's function, or after a line of the log."""

    def stop(*args, **named):
        patch.undo()
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **named)

    parted = Run(flags, tmp_path)
    with monkeypatch.context() as patch, raise_on(where):
        if epochs is None:
            module, _, attribute = where.rpartition(".")
            real = getattr(importlib.import_module(module), attribute)
            patch.setattr(where, stop)
        assert parted.train("--resume") == 75
    if epochs is not None:
        assert parted.checkpoint()["progress"]["epoch"] == epochs
        assert parted.status()["exit_code"] == 75
    assert parted.train("--resume") == 0
    assert_same_outcome(whole, parted)
    assert not list(parted.directory.glob(".*"))


def on_batch(number, training, act):
    """Calls `act` before the `number`th batch of training or of evaluation, whose batches become
    small."""
    data.EVAL_SECONDS, batches = 1, []

    def count(module, inputs):
        if type(module).__name__ == "WavLMEncoder" and module.training == training:
            batches.append(1)
            if len(batches) == number:
                act()

    register_module_forward_pre_hook(count)


def stop_in_evaluation():
    if os.environ["RANK"] == "1":
        on_batch(2, False, lambda: signal.raise_signal(signal.SIGTERM))
    else:
        on_batch(0, False, None)


def test_ranks_stop_together_in_the_middle_of_an_evaluation(flags, tmp_path):
    parted = Run([*flags, "--batch_size", "4", "--epochs", "1"], tmp_path, 2)
    assert parted.in_ranks(fault=(stop_in_evaluation,)) == [75, 75]
    assert parted.checkpoint()["progress"]["epoch"] == 0 and step_of(parted) == 3


def test_a_signal_while_a_cache_fills_leaves_no_half_of_it(flags, tmp_path, monkeypatch):
    cache, fsync = tmp_path / "cache", os.fsync
    run = Run([*flags, "--unfreeze", "none", "--cache_dir", str(cache)], tmp_path)
    for what in ("/cache/.audio-", "/.part-0000"):

        def stopping(handle, what=what):
            if what in os.readlink(f"/proc/self/fd/{handle}"):
                signal.raise_signal(signal.SIGUSR1)
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stopping)
            assert run.train("--resume") == 75
        folders = [path.name for path in cache.rglob("*") if path.is_dir()]
        assert not [name for name in folders if name.startswith((".", "part-"))]
    assert run.train("--resume") == 0


def test_a_signal_at_any_moment_saves_and_the_run_ends_the_same(flags, tmp_path):
    """To all processes of the run at once, as a terminal does: workers live on."""
    flags = [*flags, "--num_workers", "1", "--epochs", "8", "--log_every", "2"]
    whole, parted = Run(flags, tmp_path / "whole"), Run(flags, tmp_path / "parted")
    assert whole.start().wait() == 0, whole.console()
    rng = random.Random(0)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        parted.start("--resume")
        assert parted.until(lambda: parted.status().get("pid") == parted.process.pid)
        time.sleep(rng.uniform(0, 0.2))  # of seconds
        os.killpg(parted.process.pid, number)
        begin = time.monotonic()
        assert parted.wait() == parted.status()["exit_code"] == 75, parted.console()
        assert time.monotonic() - begin < 10
        assert not processes_of(tmp_path / "parted")
    assert parted.start("--resume").wait() == 0, parted.console()
    assert_same_outcome(whole, parted)


def test_a_signal_among_the_imports_is_75(flags):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags])
    time.sleep(1)  # of about five
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 75


# --- ranks and workers

MASTER = "MASTER_ADDR=localhost MASTER_PORT=29500"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=2", "WORLD_SIZE is '2', but RANK is not set"),
        ("WORLD_SIZE=", "WORLD_SIZE is '', must be a whole number"),
        ("RANK=first", "RANK is 'first', must be a whole number"),
        ("LOCAL_RANK=-1", "LOCAL_RANK is '-1', must be a whole number"),
        ("RANK=1", "RANK is '1', but LOCAL_RANK is not set"),
        ("RANK=1 LOCAL_RANK=0 WORLD_SIZE=2", "MASTER_PORT is not set"),
        ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_PORT=1", "MASTER_ADDR is"),
        (f"RANK=2 LOCAL_RANK=0 WORLD_SIZE=2 {MASTER}",
         "WORLD_SIZE is '2', MASTER_PORT is '29500', needs LOCAL_RANK <= RANK < WORLD_SIZE"),
        ("WORLD_SIZE=1 SLURM_NTASKS=2 SLURM_PROCID=0", "SLURM_NTASKS is 2, so srun has started"),
        ("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS is 4, so srun"),
        ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_SIZE is 2, so mpirun has started"),
        ("PMI_SIZE=2 PMI_RANK=0", "PMI_SIZE is 2, so mpiexec has started"),
        # one process
        ("WORLD_SIZE=1 RANK=0", None),
        ("SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_ARRAY_TASK_ID=3", None),
        ("SLURM_NTASKS=4", None),  # the shell of salloc
        ("SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1", None),
        ("SLURM_NTASKS=4 SLURM_PROCID=0 ENVIRONMENT=BATCH", None),
        ("OMPI_COMM_WORLD_SIZE=1 PMI_SIZE=1", None),
    ],
)  # fmt: skip
def test_variables_of_other_launchers_are_one_line_that_names_them_and_torchrun(
    monkeypatch, capsys, variables, said
):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    if said is None:
        assert parse_args([]).global_batch_size == 8
        return
    with pytest.raises(SystemExit, match="2"):
        parse_args([])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: environment: " in line and said in line and "torchrun" in line


@pytest.fixture
def two_ranks(flags, tmp_path):
    more = ["--batch_size", "4", "--num_workers", "1", "--timeout", "5", *LONG]
    return Run([*flags, *more], tmp_path / "two", ranks=2)


def under_way(run):
    """{rank: pid} of torchrun's ranks, once they train."""
    count = len(run.records())
    assert run.until(lambda: len(run.records()) > count + 2, 100), run.console()
    found = {}
    for pid in workers_of(run.process.pid):
        names = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(n[5:]): pid for n in names if n.startswith(b"RANK=")}
    return found


def stop_in_step():
    """SIGTERM to rank 1 in its fourth step."""
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == 4 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)

    register_optimizer_step_post_hook(count)


def test_a_signal_to_one_rank_stops_both_at_one_step(two_ranks):
    codes = two_ranks.in_ranks("--save_every", "1000000", fault=(stop_in_step,))
    assert codes == [75, 75] and two_ranks.status()["exit_code"] == 75, two_ranks.console()
    assert_saved_at_its_last_step(two_ranks)
    gone(two_ranks.log.parent)


def test_ranks_and_workers_die_with_their_torchrun(two_ranks):
    two_ranks.start()
    ranks = under_way(two_ranks)
    assert all(workers_of(pid) for pid in ranks.values())
    os.kill(two_ranks.process.pid, signal.SIGKILL)
    gone(two_ranks.log.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number"),
    [("agent", signal.SIGTERM), ("agent", signal.SIGUSR1), (0, signal.SIGINT), (1, signal.SIGUSR1)],
)
def test_a_signal_to_the_agent_or_a_rank_saves(two_ranks, number, whom):
    two_ranks.start(PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1")
    ranks = under_way(two_ranks)
    os.kill(two_ranks.process.pid if whom == "agent" else ranks[whom], number)
    two_ranks.wait(10)
    assert two_ranks.status()["exit_code"] == 75, two_ranks.console()
    assert_saved_at_its_last_step(two_ranks)
    gone(two_ranks.log.parent)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_launcher_saves_every_fold(two_ranks, number, code):
    argv = ["--folds", "1-2", "--nproc_per_fold", "2", "--", *two_ranks.flags]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with open(two_ranks.log, "ab") as log:
        two_ranks.process = subprocess.Popen(
            [ROOT / "launch.sh", *argv], stdout=log, stderr=log, env=env, start_new_session=True
        )
    folds = [Run([*two_ranks.flags, "--fold", fold], two_ranks.log.parent) for fold in "12"]
    assert two_ranks.until(lambda: all(len(fold.records()) > 2 for fold in folds), 100)
    two_ranks.process.send_signal(number)
    wait_for(lambda: all(fold.status()["exit_code"] is not None for fold in folds), 10)
    assert two_ranks.process.wait(15) == code
    for fold in folds:
        assert fold.status()["exit_code"] == 75, two_ranks.console()
        assert_saved_at_its_last_step(fold)
    gone(two_ranks.log.parent)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_other_within_5_seconds(two_ranks, rank):
    two_ranks.start("--timeout", "300")
    os.kill(under_way(two_ranks)[rank], signal.SIGKILL)
    gone(two_ranks.log.parent, 5)
    assert two_ranks.wait() != 0
    if rank == 1:
        assert "a rank died" in two_ranks.console()
        assert two_ranks.status()["exit_code"] in (1, None)


@pytest.mark.slow
def test_a_hung_rank_is_noticed_within_its_time_out(two_ranks):
    two_ranks.start()
    os.kill(under_way(two_ranks)[1], signal.SIGSTOP)
    wait_for(lambda: "gave no answer for --timeout 5 s" in two_ranks.console(), 5 + 5)
    assert two_ranks.until(lambda: two_ranks.status()["exit_code"] == 1, 2)
    two_ranks.process.kill()
    gone(two_ranks.log.parent)


def stall_and_stop(training):
    """In rank 1, SIGSTOP to the workers once they have read some batches, and SIGTERM to the rank
    when it waits for more."""

    def end():
        print("signal", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def stall():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
        threading.Timer(3, end).start()

    on_batch(5 if os.environ["RANK"] == "1" else 0, training, stall)


@pytest.mark.parametrize("training", [True, False])
def test_a_signal_while_the_loader_stalls_ends_all_ranks_with_a_checkpoint_within_10_seconds(
    flags, tmp_path, training
):
    more = ["--batch_size", "4", "--num_workers", "1", *LONG, "--eval_every", "2"]
    victim = Run([*flags, *more], tmp_path, 2)
    assert victim.in_ranks(fault=(stall_and_stop, training)) == [75, 75], victim.console()
    [begin] = re.findall(r"signal ([\d.]+)", victim.console())
    assert time.time() - float(begin) < 10
    assert_saved_at_its_last_step(victim)
    gone(tmp_path)


def test_shared_memory_that_is_too_small_is_told_before_workers_start(
    flags, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage

    def small(path):
        found = usage(path)
        return found._replace(free=1 << 20) if str(path) == "/dev/shm" else found

    monkeypatch.setattr(shutil, "disk_usage", small)
    run = Run(flags, tmp_path)
    assert run.train("--num_workers", "2") == 2
    said = capsys.readouterr().err
    free = r"--num_workers 2: .* need up to \d+ MiB of /dev/shm \(1 MiB free\)"
    assert re.search(free + ".*give --num_workers 0.*docker run --shm-size", said), said
    assert run.train("--num_workers", "0", "--overwrite", "--max_steps", "1") == 0


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_were_not_forked_end_with_their_rank(flags, tmp_path, method):
    victim = Run([*flags, "--num_workers", "1", *LONG], tmp_path, method=method).start()
    assert victim.until(lambda: len(victim.records()) > 4), victim.console()
    assert len(processes_of(tmp_path)) > 1
    os.kill(victim.process.pid, signal.SIGKILL)
    gone(tmp_path, 10)  # a worker that is still starting ends when it has imported torch


def look_elsewhere(folder):
    """Rank 1 finds other files under the same relative names."""
    os.chdir(Path(folder) / ("bad" if os.environ["RANK"] == "1" else "good"))


@pytest.mark.parametrize(
    ("workers", "fault", "said"),
    [
        ("0", "not a number", r"s3d\dt\d\.npy"),  # in a batch
        ("2", "not a number", r"s3d\dt\d\.npy"),  # in a batch that a worker reads
        ("0", "missing", "s1d0t0"),  # at the start
        ("0", "unreadable clip", r"that of rank 0: rows that are gone: 1 \(as s3d1t2\)"),
    ],
)
def test_a_rank_whose_data_is_bad_says_so_and_all_ranks_end(
    flags, corpus, tmp_path, workers, fault, said
):
    for folder in ("good", "bad"):
        shutil.copytree(corpus.parent, tmp_path / folder, ignore=shutil.ignore_patterns("cache"))
        write_arrays(tmp_path / folder / "frames", 200, 96)
    frames = tmp_path / "bad" / "frames"
    if fault == "not a number":
        for path in frames.glob("s3*"):  # train
            array = np.load(path)
            array[2, 2] = np.nan  # in none of the rows that ranks compare at the start
            np.save(path, array)
    elif fault == "missing":
        (frames / "s1d0t0.npy").unlink()
    else:
        (tmp_path / "bad" / "s3d1t2.wav").write_text("no audio")
    more = ["--data", "corpus.csv", "--encoder", "transformer", "--features_dir", "frames"]
    more += ["--d_model", "64", "--num_layers", "1", "--batch_size", "4", "--unfreeze", "none"]
    victim = Run([*flags, *more, "--num_workers", workers], tmp_path / "run", 2)
    codes = victim.in_ranks(fault=(look_elsewhere, str(tmp_path)), seconds=30)
    assert codes[1] == 2 and codes[0] in (1, 2), (codes, victim.console())
    lines = [x for x in victim.console().splitlines() if x.startswith("train.py: error: rank 1: ")]
    assert len(lines) == 1 and re.search(said, lines[0]), victim.console()
    assert "Traceback" not in victim.console()


# --- what ends a run


def signal_workers(pattern, number):
    """A signal to the loader's workers when a line is logged."""

    def send():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)

    OnLine(pattern, send).__enter__()


def end_shared_memory():
    """No more of it from the fourth batch of a worker on, as torch says it."""
    share, shared = torch.Tensor.share_memory_, []

    def failing(tensor):
        shared.append(1)
        if len(shared) > 20:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device")
        return share(tensor)

    torch.Tensor.share_memory_ = failing


def spoil_a_gradient():
    """NaN in one gradient of rank 1 in the third step."""
    forwards = []

    def spoil(module, _, preds):
        if is_model(module, preds) and module.training:
            forwards.append(1)
            if len(forwards) == 3 and os.environ["RANK"] == "1":
                preds.register_hook(lambda gradient: gradient * float("nan"))

    register_module_forward_hook(spoil)


def spoil_after_a_step(where):
    """Infinity in a weight, or in one of its moments, after the second step."""
    steps = []

    def spoil(optimizer, *_):
        weight = optimizer.param_groups[0]["params"][0]
        if weight.is_meta:  # the memory plan's
            return
        steps.append(1)
        if len(steps) == 2:
            target = weight if where == "weight" else optimizer.state[weight]["exp_avg"]
            target.data.flatten()[0] = float("inf")

    register_optimizer_step_post_hook(spoil)


WORKER = "--num_workers 1 --timeout 2 --eval_every 1 --epochs 2000"
# torch has two sentences
DEAD = (
    r"DataLoader.*worker (\d+ is|\(pid\(s\) \d+\) exited) .*--resume.*--num_workers 0.*--shm-size"
)
HUGE = "--save_every 1 --batch_size 4 --log_every 100 --warmup 0 --lr 1e30 --encoder_lr 1e30"
NUMBER = r"[\d.e-]+"
SCALER = {"init_scale": 2.0**127, "backoff_factor": 0.9999}
ENDS = {  # ranks, flags, fault, exit code, step of last.pt or -1 for any, message
    "dead worker": (1, WORKER, (signal_workers, r"^step +4/", signal.SIGKILL), 1, -1, DEAD),
    "stopped worker": (1, WORKER, (signal_workers, r"^step +4/", signal.SIGSTOP), 1, -1, DEAD),
    "stopped worker between two epochs, which waits": (
        1, WORKER, (signal_workers, r"^epoch +1 . dev", signal.SIGSTOP), 1, -1, DEAD,
    ),
    "no shared memory left": (
        1, WORKER, (end_shared_memory,), 2, -1,
        "No space left on device: give --num_workers 0, or more shared memory.*--shm-size",
    ),
    "loss, with the utterances of both ranks": (
        2, HUGE, None, 1, 0, r"step 1: loss .*scale 1 on (s\dd\dt\d\W+){7}s"
    ),
    "gradient of one rank": (
        2, "--save_every 1 --batch_size 4", (spoil_a_gradient,), 1, 2, "step 3: loss .*gradient "
        "norm nan, weight norm nan, norm of AdamW's moments nan, scale 1 on s",
    ),
    "weight": (
        1, "--save_every 1", (spoil_after_a_step, "weight"), 1, 1,
        f"step 2: loss .*weight norm inf, norm of AdamW's moments {NUMBER},",
    ),
    "moment": (
        1, "--save_every 1", (spoil_after_a_step, "moment"), 1, 1,
        f"step 2: loss .*weight norm {NUMBER}, norm of AdamW's moments inf,",
    ),
    "twenty skipped steps in a row": (  # test_resume has a run that skips fewer
        1, "--amp fp16 --device auto --epochs 8 --eval_every 8",
        (functools.partial(real_fp16, setattr, **SCALER),), 1, -1,
        r"step 20: loss .* scale 1.*e\+38 on s3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
def test_what_ends_a_run_is_one_line_and_leaves_a_sound_checkpoint(flags, tmp_path, kind):
    ranks, words, fault, code, step, said = ENDS[kind]
    victim = Run([*flags, *words.split()], tmp_path, ranks)
    assert victim.in_ranks(fault=fault, seconds=60) == [code] * ranks, victim.console()
    lines = victim.console().partition("train.py: error: ")[2].strip().splitlines()
    assert "Traceback" not in victim.console() and len(lines) == ranks, victim.console()
    assert re.search(said, lines[0]), lines[0]
    assert victim.status()["exit_code"] == code
    for path in victim.directory.glob("*.pt"):
        assert all(weight.isfinite().all() for weight in victim.weights(path.name).values())
    saved = step_of(victim) if (victim.directory / "last.pt").exists() else 0
    assert step in (saved, -1)
    gone(tmp_path)


# --- collectives


def count_collectives():
    """Prints how many collectives a rank had begun before each update, DDP's buckets aside."""
    counted = []

    def counting(function):
        def call(*args, **named):
            if not named.get("async_op"):
                counted.append(function)
            return function(*args, **named)

        return call

    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier"):
        setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))

    def tell(optimizer, *_):
        if not optimizer.param_groups[0]["params"][0].is_meta:  # as the memory plan's are
            print("collectives", os.environ["RANK"], len(counted), flush=True)

    register_optimizer_step_post_hook(tell)


def test_a_step_has_at_most_three_collectives(flags, tmp_path):
    victim = Run([*flags, "--batch_size", "2", "--epochs", "1", "--log_every", "99"], tmp_path, 2)
    assert victim.in_ranks(fault=(count_collectives,)) == [0, 0]
    for rank in "01":
        found = re.findall(rf"collectives {rank} (\d+)", victim.console())
        counts = np.diff([int(count) for count in found])
        assert len(counts) >= 4 and 1 <= max(counts) <= 3, counts


# --- two runs


def test_of_two_runs_in_one_directory_exactly_one_wins(flags, tmp_path):
    one, two = Run(flags, tmp_path), Run(flags, tmp_path)
    two.log = tmp_path / "second.log"
    one.start("--resume")
    two.start("--overwrite")
    codes = [one.wait(), two.wait()]
    assert sorted(codes) == [0, 2], one.console() + two.console()
    loser = two if codes[1] else one
    assert "is in use by another run (pid " in loser.console()
    assert one.status()["exit_code"] == 0 and len(one.records()) == 9
