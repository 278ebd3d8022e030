"""Faults done to real runs: damage, full disks, signals, dead and hung ranks and workers, two runs
in one directory. Their kills at random moments, in numbers, are fault_kills.py's."""

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
from fault_kills import (
    ROOT,
    OnLine,
    Run,
    assert_same_outcome,
    processes_of,
    raise_on,
    real_fp16,
    run_ranks,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
from train import cli, main, parse_args
from util.checkpoints import read_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def whole(corpus, small_wavlm, tmp_path_factory):
    """A run that was never disturbed, of the flags of `flags`."""
    directory = tmp_path_factory.mktemp("whole")
    undisturbed = Run(quick_flags(corpus, small_wavlm, directory), directory)
    assert main(parse_args(undisturbed.flags)) == 0
    return undisturbed


def progress_of(run, name="last.pt"):
    return read_checkpoint(run.directory / name)["progress"]


LONG = ("--epochs", "2000", "--eval_every", "3")  # minutes: it is stopped before


def ended_by(process, seconds):
    """Seconds until the process has ended; fails after `seconds`."""
    begin = time.monotonic()
    process.wait(seconds)
    return time.monotonic() - begin


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


# --- checkpoints


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
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
    last, previous = str(tmp_path / "last.pt"), str(tmp_path / "previous.pt")
    for step in range(2):
        calls.clear()
        save_checkpoint(tmp_path / "last.pt", {"step": step})
    aside = calls[0][1]
    assert calls == [
        ("fsync", aside), ("replace", last, previous), ("replace", aside, last),
        ("fsync", str(tmp_path)),
    ]  # fmt: skip


def damages(seed, count):
    """{name: function that does it to a file}; `count` flipped bits and truncations."""
    rng = random.Random(seed)

    def flip(path):
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    def cut(path):
        os.truncate(path, rng.randrange(1, path.stat().st_size))

    return {
        **{f"flipped bit {i}": flip for i in range(count)},
        **{f"truncated {i}": cut for i in range(count)},
        "empty": lambda path: os.truncate(path, 0),
        "missing": Path.unlink,
        "text": lambda path: path.write_text("not a checkpoint " * 99),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    }


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_no_damage_to_a_checkpoint_is_silent(flags, tmp_path, capsys, count):
    """Either the run ends like an undamaged one, from previous.pt, or it is refused in a line."""
    flags = [*flags, "--unfreeze", "1:none,2:all", "--save_every", "1"]
    whole = Run(flags, tmp_path / "whole")
    assert main(parse_args(whole.flags)) == 0
    stopped = Run(flags, tmp_path / "stopped")
    with raise_on(r"^step +4/"):
        assert main(parse_args(stopped.flags)) == 75
    other = Run([*flags, "--seed", "1"], tmp_path / "other")
    assert main(parse_args(other.flags)) == 0
    capsys.readouterr()

    def resumed(*damaged, until="done in"):
        directory = tmp_path / "case"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "stopped", directory)
        victim = Run(flags, directory)
        for name, harm in damaged:
            harm(victim.directory / name)
        with raise_on(until):
            code = cli([*victim.flags, "--resume"])
        return victim, code, capsys.readouterr()

    kinds = damages(0, count)
    for i, (kind, harm) in enumerate(kinds.items()):
        to_the_end = i == 0 or count > 1  # the others begin from the same older checkpoint
        until = "done in" if to_the_end else "^vatune"
        victim, code, said = resumed(("last.pt", harm), until=until)
        assert code == (0 if to_the_end else 75), (kind, said.err)
        assert "last.pt" in said.out and "continuing from" in said.out, kind
        if to_the_end:
            assert_same_outcome(whole, victim)

    def swap(path):
        shutil.copy(other.directory / path.name, path)

    harms = damages(1, count) | {"swapped": swap}
    cases = [[("last.pt", swap)], [("last.pt", Path.unlink), ("previous.pt", harms["empty"])]]
    cases += [[("last.pt", harms["truncated 0"]), ("previous.pt", harms["flipped bit 0"])]]
    cases += [[(name, harm)] for name in ("best.pt", "frozen.pt") for harm in harms.values()]
    for case in cases:
        _, code, said = resumed(*case)
        assert code == 2 and len(said.err.strip().splitlines()) == 1, (case, said.err)
        assert "start anew with --overwrite" in said.err, case
    print(f"{len(kinds)} fell back to previous.pt, {len(cases)} were refused, 0 silent")


def test_a_resume_from_the_spare_keeps_the_spare_until_there_is_a_better_one(flags, tmp_path):
    stopped = Run([*flags, "--save_every", "1"], tmp_path)
    with raise_on(r"^step +4/"):
        assert main(parse_args(stopped.flags)) == 75
    os.truncate(stopped.directory / "last.pt", 1000)
    assert progress_of(stopped, "previous.pt")["step"] == 5
    with raise_on(r"^step +6/"):
        assert main(parse_args([*stopped.flags, "--resume"])) == 75
    names = ("previous.pt", "last.pt")
    assert [progress_of(stopped, name)["step"] for name in names] == [6, 6]


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

    capsys.readouterr()
    with monkeypatch.context() as patch, OnLine(when, fill_disk):
        patch.setattr(os, "replace", replace_and_fill)
        try:
            assert cli(victim.flags) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(f"/{file}: File too large: raise the limit", said), (
        said
    )
    exists = (victim.directory / "last.pt").exists()
    assert (progress_of(victim)["step"] if exists else 0) == saved
    assert cli([*victim.flags, "--resume"]) == 0
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
    victim = Run([*flags, "--epochs", "1"], tmp_path)
    assert run_ranks(victim.flags, victim.log, 1, (lose_streams, kind, 1)) == [0]
    log = (victim.directory / "train.log").read_text()
    assert "done in" in log and (victim.directory / "result.json").exists()
    assert ("stdout cannot be written" in log) == (kind != "closed")
    assert run_ranks(victim.flags, victim.log, 1, (lose_streams, kind, 0, 1, 2)) == [2]
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
    assert cli(victim.flags) == 0
    said = capsys.readouterr()
    assert said.out.count("no TensorBoard (") == 1 and "built for another numpy" in said.out
    assert not said.err and victim.records()[0]["event"] == "train"


# --- signals


@pytest.mark.parametrize(
    ("line", "epoch"),
    [(r"^step +3/", 0), (r"^step +6/", 1), (r"^best epoch . . dev", 2)],
    ids=["first evaluation", "last evaluation", "test"],
)
def test_a_run_stopped_while_it_evaluates_resumes_bit_for_bit(flags, tmp_path, whole, line, epoch):
    parted = Run(flags, tmp_path)
    with raise_on(line):
        assert cli(parted.flags) == 75
    assert progress_of(parted)["epoch"] == epoch
    assert parted.status()["exit_code"] == 75
    assert cli([*parted.flags, "--resume"]) == 0
    assert_same_outcome(whole, parted)


def stop_in_evaluation():
    """SIGTERM to rank 1 in the second of its batches of evaluation, which are small."""
    data.EVAL_SECONDS, batches = 3, []

    def stop(module, inputs):
        if type(module).__name__ == "WavLMEncoder" and not module.training:
            batches.append(inputs)
            if len(batches) == 2 and os.environ["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)

    register_module_forward_pre_hook(stop)


def test_ranks_stop_together_in_the_middle_of_an_evaluation(flags, tmp_path):
    parted = Run([*flags, "--batch_size", "4", "--epochs", "1"], tmp_path)
    assert run_ranks(parted.flags, parted.log, 2, (stop_in_evaluation,)) == [75, 75]
    progress = progress_of(parted)
    assert (progress["step"], progress["epoch"]) == (3, 0)


def stop_in(monkeypatch, name):
    """SIGTERM to this process in the first call of a function, given by its full name."""
    module, _, attribute = name.rpartition(".")
    real = getattr(importlib.import_module(module), attribute)

    def stopping(*args, **named):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **named)

    monkeypatch.setattr(name, stopping)


@pytest.mark.parametrize(
    "phase",
    [
        "torch.from_numpy",
        "fcntl.lockf",
        "torch.optim.AdamW",
        "torch.utils.tensorboard.SummaryWriter",
    ],
)
def test_a_signal_in_a_start_is_75_and_the_next_start_is_like_the_first(
    flags, tmp_path, monkeypatch, whole, phase
):
    parted = Run(flags, tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, phase)
        assert cli([*parted.flags, "--resume"]) == 75
    assert cli([*parted.flags, "--resume"]) == 0
    assert_same_outcome(whole, parted)
    assert not list(parted.directory.glob(".*"))


def test_a_signal_while_a_cache_fills_leaves_no_half_of_it(flags, tmp_path, monkeypatch):
    cache, fsync = tmp_path / "cache", os.fsync
    flags = [*flags, "--unfreeze", "none", "--cache_dir", str(cache)]
    for what in ("/cache/.audio-", "/.part-0000"):

        def stopping(handle, what=what):
            if what in os.readlink(f"/proc/self/fd/{handle}"):
                signal.raise_signal(signal.SIGUSR1)
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stopping)
            assert cli([*flags, "--resume"]) == 75
        folders = [path.name for path in cache.rglob("*") if path.is_dir()]
        assert not [name for name in folders if name.startswith((".", "part-"))]
    assert cli([*flags, "--resume"]) == 0


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
    assert ended_by(process, 10) < 10 and process.returncode == 75


# --- ranks and workers

MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but RANK is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', must be a whole number"),
        ({"RANK": ""}, "RANK is '', must be a whole number"),
        ({"RANK": "first"}, "RANK is 'first', must be a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', must be a whole number"),
        ({"RANK": "1"}, "RANK is '1', but LOCAL_RANK is not set"),
        ({"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is"),
        ({"WORLD_SIZE": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS is 2, so"),
        (
            {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **MASTER},
            "WORLD_SIZE is '2', MASTER_PORT is '29500', needs LOCAL_RANK <= RANK < WORLD_SIZE",
        ),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_NTASKS is 2, so srun has started"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is 4, so srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, so mpirun has started"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE is 2, so mpiexec has started"),
        # one process
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "3"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # the shell of salloc
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, None),
    ],
)
def test_variables_of_other_launchers_are_one_line_that_names_them_and_torchrun(
    monkeypatch, capsys, variables, said
):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", *MASTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if said is None:
        assert parse_args([]).global_batch_size == 8
        return
    with pytest.raises(SystemExit, match="2"):
        parse_args([])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: environment: " in line and said in line and "torchrun" in line


def ranks_of(agent):
    """{rank: pid} of torchrun's ranks that train."""
    found = {}
    for pid in workers_of(agent):
        names = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(n[5:]): pid for n in names if n.startswith(b"RANK=")}
    return found


def under_way(run):
    count = len(run.records())
    assert run.until(lambda: len(run.records()) > count + 2, 100), run.console()
    return ranks_of(run.process.pid)


def gone(directory, seconds):
    begin = time.monotonic()
    while processes_of(directory):
        assert time.monotonic() - begin < seconds, "processes are left"
        time.sleep(0.02)
    return time.monotonic() - begin


@pytest.fixture
def two_ranks(flags, tmp_path):
    more = ["--batch_size", "4", "--num_workers", "1", "--timeout", "5", *LONG]
    return Run([*flags, *more], tmp_path / "two", ranks=2)


def signal_in_step(number):
    """A signal to rank 1 in its fourth step."""
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == 4 and os.environ["RANK"] == "1":
            signal.raise_signal(number)

    register_optimizer_step_post_hook(count)


def test_a_signal_to_one_rank_stops_both_at_one_step(two_ranks):
    argv = [*two_ranks.flags, "--save_every", "1000000"]
    assert run_ranks(argv, two_ranks.log, 2, (signal_in_step, signal.SIGTERM)) == [75, 75]
    assert two_ranks.status()["exit_code"] == 75, two_ranks.console()
    last = progress_of(two_ranks)
    assert last["step"] == two_ranks.status()["step"] == two_ranks.records()[-1]["step"]
    gone(two_ranks.directory.parent.parent, 2)


def test_ranks_and_workers_die_with_their_torchrun(two_ranks):
    two_ranks.start()
    ranks = under_way(two_ranks)
    assert all(workers_of(pid) for pid in ranks.values())
    os.kill(two_ranks.process.pid, signal.SIGKILL)
    assert gone(two_ranks.directory.parent.parent, 2) < 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("whom", ["agent", 0, 1])
def test_a_signal_to_the_agent_or_a_rank_saves(two_ranks, number, whom):
    two_ranks.start(PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1")
    ranks = under_way(two_ranks)
    os.kill(two_ranks.process.pid if whom == "agent" else ranks[whom], number)
    assert ended_by(two_ranks.process, 10) < 10
    assert two_ranks.status()["exit_code"] == 75, two_ranks.console()
    state = progress_of(two_ranks)
    assert state["step"] == two_ranks.records()[-1]["step"]
    gone(two_ranks.directory.parent.parent, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_launcher_saves_every_fold(two_ranks, number, code):
    argv = ["--folds", "1-2", "--nproc_per_fold", "2", "--", *two_ranks.flags]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with open(two_ranks.log, "ab") as log:
        two_ranks.process = subprocess.Popen(
            [ROOT / "launch.sh", *argv], stdout=log, stderr=log, env=env, start_new_session=True
        )
    folds = [Run(two_ranks.flags, two_ranks.log.parent) for _ in range(2)]
    folds[1].directory = folds[1].directory.with_name("fold2")
    assert two_ranks.until(lambda: all(len(fold.records()) > 2 for fold in folds), 100)
    two_ranks.process.send_signal(number)
    end = time.monotonic() + 10
    while any(fold.status()["exit_code"] is None for fold in folds):
        assert time.monotonic() < end, two_ranks.console()
        time.sleep(0.05)
    assert ended_by(two_ranks.process, 15) < 15 and two_ranks.process.returncode == code
    for fold in folds:
        assert fold.status()["exit_code"] == 75, two_ranks.console()
        assert progress_of(fold)["step"] == fold.records()[-1]["step"]
    gone(two_ranks.log.parent, 2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_other_within_5_seconds(two_ranks, rank):
    two_ranks.start("--timeout", "300")
    ranks = under_way(two_ranks)
    os.kill(ranks[rank], signal.SIGKILL)
    begin = time.monotonic()
    while processes_of(two_ranks.directory.parent.parent):
        assert time.monotonic() - begin < 5, two_ranks.console()
        time.sleep(0.02)
    assert two_ranks.wait() != 0
    if rank == 1:
        assert "a rank died" in two_ranks.console()
        assert two_ranks.status()["exit_code"] in (1, None)


@pytest.mark.slow
def test_a_hung_rank_is_noticed_within_its_time_out(two_ranks):
    two_ranks.start()
    hung = under_way(two_ranks)[1]
    os.kill(hung, signal.SIGSTOP)
    begin = time.monotonic()
    assert two_ranks.until(lambda: "gave no answer for --timeout 5 s" in two_ranks.console(), 30)
    assert time.monotonic() - begin < 5 + 5
    assert two_ranks.until(lambda: two_ranks.status()["exit_code"] == 1, 2)
    two_ranks.process.kill()
    gone(two_ranks.directory.parent.parent, 2)


def stop_workers():
    """SIGSTOP to the loader's workers between two epochs, in which they wait."""

    def stop():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)

    OnLine(r"^epoch +1 . dev", stop).__enter__()


def kill_a_worker(number):
    def kill():
        os.kill(multiprocessing.active_children()[0].pid, number)

    OnLine(r"^step +4/", kill).__enter__()


@pytest.mark.parametrize(
    "fault",
    [(kill_a_worker, signal.SIGKILL), (kill_a_worker, signal.SIGSTOP), (stop_workers,)],
    ids=["dead", "stopped", "stopped between two epochs"],
)
def test_a_dead_or_stalled_worker_is_one_line_that_names_it(flags, tmp_path, fault):
    victim = Run(
        [*flags, "--num_workers", "1", "--timeout", "2", *LONG, "--eval_every", "1"], tmp_path
    )
    assert run_ranks(victim.flags, victim.log, 1, fault, seconds=60) == [1]
    said = victim.console().split("train.py: error: ")[1]
    dead = r"DataLoader.*worker (\d+ is|\(pid\(s\) \d+\) exited) "  # torch has two sentences
    assert re.search(dead + ".*--resume.*--num_workers 0.*--shm-size", said), said
    assert "Traceback" not in victim.console() and len(said.strip().splitlines()) == 1
    assert victim.status()["exit_code"] == 1
    gone(tmp_path, 2)


def stall_and_stop(which, training):
    """In rank `which`, SIGSTOP to the workers once they have read some batches, and SIGTERM to the
    rank when it waits for more."""
    data.EVAL_SECONDS, forwards = 1, []

    def end():
        print("signal", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def stall(module, inputs):
        if type(module).__name__ == "WavLMEncoder" and module.training == training:
            forwards.append(1)
            if len(forwards) == 5:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGSTOP)
                threading.Timer(3, end).start()

    if os.environ.get("RANK", "0") == which:
        register_module_forward_pre_hook(stall)


@pytest.mark.parametrize(
    ("ranks", "training"),
    [pytest.param(1, True, marks=pytest.mark.slow), (2, True), (2, False)],
)
def test_a_signal_while_the_loader_stalls_ends_all_ranks_with_a_checkpoint_within_10_seconds(
    flags, tmp_path, ranks, training
):
    flags = [*flags, "--batch_size", "4", "--num_workers", "1", *LONG, "--eval_every", "2"]
    victim = Run(flags, tmp_path)
    fault = (stall_and_stop, str(ranks - 1), training)
    assert run_ranks(victim.flags, victim.log, ranks, fault) == [75] * ranks, victim.console()
    [begin] = re.findall(r"signal ([\d.]+)", victim.console())
    assert time.time() - float(begin) < 10
    assert progress_of(victim)["step"] == victim.status()["step"] == victim.records()[-1]["step"]
    gone(tmp_path, 2)


def test_shared_memory_that_is_too_small_is_told_before_workers_start(flags, capsys, monkeypatch):
    usage = shutil.disk_usage

    def small(path):
        found = usage(path)
        return found._replace(free=1 << 20) if str(path) == "/dev/shm" else found

    monkeypatch.setattr(shutil, "disk_usage", small)
    assert cli([*flags, "--num_workers", "2"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"--num_workers 2: .* need up to \d+ MiB of /dev/shm \(1 MiB free\)", said), (
        said
    )
    assert "give --num_workers 0" in said and "docker run --shm-size" in said
    assert cli([*flags, "--num_workers", "0", "--overwrite", "--max_steps", "1"]) == 0


def end_shared_memory():
    """No more of it from the fourth batch of a worker on, as torch says it."""
    share, shared = torch.Tensor.share_memory_, []

    def failing(tensor):
        shared.append(1)
        if len(shared) > 20:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device")
        return share(tensor)

    torch.Tensor.share_memory_ = failing


def test_shared_memory_that_ends_on_the_way_is_told_at_once(flags, tmp_path):
    victim = Run([*flags, "--num_workers", "1", *LONG], tmp_path)
    assert run_ranks(victim.flags, victim.log, 1, (end_shared_memory,), seconds=60) == [2]
    said = victim.console().split("train.py: error: ")[1]
    assert "No space left on device: give --num_workers 0, or more shared memory" in said
    assert len(said.strip().splitlines()) == 1 and "docker run --shm-size" in said


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_were_not_forked_end_with_their_rank(flags, tmp_path, method):
    victim = Run([*flags, "--num_workers", "1", *LONG], tmp_path, method=method)
    victim.start()
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
        (tmp_path / folder / "frames").mkdir()
        for i in range(72):
            name = f"s{i // 24 + 1}d{i // 4 % 6}t{i % 4}.npy"
            frames = np.full((200, 96), i / 72, np.float32)
            if folder == "bad" and fault == "not a number" and name[:2] == "s3":  # train
                frames[2, 2] = np.nan  # in none of the rows that ranks compare at the start
            np.save(tmp_path / folder / "frames" / name, frames)
    if fault == "missing":
        (tmp_path / "bad" / "frames" / "s1d0t0.npy").unlink()
    if fault == "unreadable clip":
        (tmp_path / "bad" / "s3d1t2.wav").write_text("no audio")
    more = ["--data", "corpus.csv", "--encoder", "transformer", "--features_dir", "frames"]
    more += ["--d_model", "64"]
    more += ["--num_layers", "1", "--batch_size", "4", "--unfreeze", "none"]
    more += ["--num_workers", workers]
    victim = Run([*flags, *more], tmp_path / "run")
    begin = time.monotonic()
    codes = run_ranks(victim.flags, victim.log, 2, (look_elsewhere, str(tmp_path)), seconds=60)
    assert codes[1] == 2 and codes[0] in (1, 2), (codes, victim.console())
    lines = [x for x in victim.console().splitlines() if x.startswith("train.py: error: rank 1: ")]
    assert len(lines) == 1 and re.search(said, lines[0]), victim.console()
    assert "Traceback" not in victim.console()
    assert time.monotonic() - begin < 30


# --- what is not finite


def test_a_loss_that_is_not_finite_ends_both_ranks_and_names_the_utterances_of_both(
    flags, tmp_path
):
    more = ["--batch_size", "4", "--lr", "1e30", "--encoder_lr", "1e30", "--warmup", "0"]
    victim = Run([*flags, *more, "--log_every", "100", "--save_every", "1"], tmp_path)
    assert run_ranks(victim.flags, victim.log, 2) == [1, 1]
    told = victim.console().split("train.py: error: step 1: ")[1].splitlines()[0]
    assert len([word for word in told.split() if word.startswith("s")]) >= 8 and "scale 1" in told
    assert victim.status()["exit_code"] == 1
    assert not list(victim.directory.glob("*.pt"))


def spoil_a_gradient():
    """NaN in one gradient of rank 1 in the third step."""
    forwards = []

    def spoil(module, _, preds):
        if type(module).__name__ == "EmotionModel" and module.training and not preds.is_meta:
            forwards.append(1)
            if len(forwards) == 3 and os.environ["RANK"] == "1":
                preds.register_hook(lambda gradient: gradient * float("nan"))

    register_module_forward_hook(spoil)


def test_a_gradient_that_is_not_finite_on_one_rank_ends_both_and_is_never_saved(flags, tmp_path):
    victim = Run([*flags, "--batch_size", "4", "--save_every", "1"], tmp_path)
    assert run_ranks(victim.flags, victim.log, 2, (spoil_a_gradient,)) == [1, 1]
    said = victim.console()
    assert "Traceback" not in said and "train.py: error: step 3: loss " in said
    assert "gradient norm nan, weight norm nan, norm of AdamW's moments nan, scale 1 on s" in said
    for path in victim.directory.glob("*.pt"):
        assert all(weight.isfinite().all() for weight in read_checkpoint(path)["model"].values())
    assert progress_of(victim)["step"] == 2


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("weight", r"weight norm inf, norm of AdamW's moments [\d.e-]+,"),
        ("moment", r"weight norm [\d.e-]+, norm of AdamW's moments inf,"),
    ],
)
def test_what_is_not_finite_is_named_weights_apart_from_moments(flags, where, said):
    steps = []

    def spoil(optimizer, *_):
        weight = optimizer.param_groups[0]["params"][0]
        if weight.is_meta:  # the memory plan's
            return
        steps.append(1)
        if len(steps) == 2:
            target = weight if where == "weight" else optimizer.state[weight]["exp_avg"]
            target.data.flatten()[0] = float("inf")

    hook = register_optimizer_step_post_hook(spoil)
    try:
        with pytest.raises(FloatingPointError, match=rf"step 2: loss .*{said}"):
            main(parse_args([*flags, "--save_every", "1"]))
    finally:
        hook.remove()


def test_twenty_skipped_steps_in_a_row_are_an_error(flags, monkeypatch):
    """test_resume has a run that skips fewer."""
    real_fp16(monkeypatch.setattr, init_scale=2.0**127, backoff_factor=0.9999)
    more = ["--amp", "fp16", "--device", "auto", "--epochs", "8", "--eval_every", "8"]
    with pytest.raises(FloatingPointError, match=r"step 20: loss .* scale 1.*e\+38 on s3"):
        main(parse_args([*flags, *more]))


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
    victim = Run([*flags, "--batch_size", "2", "--epochs", "1", "--log_every", "99"], tmp_path)
    assert run_ranks(victim.flags, victim.log, 2, (count_collectives,)) == [0, 0]
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
