"""launch.sh around stubs of train.py, flags.py and report.py: queue, logs, failures, interrupts."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, wait_for

FLAGS = """
import argparse, os, sys, time

def parse_args(argv=None, world_size=None):
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("--out", default="runs")
    p.add_argument("--name", default="stub")
    p.add_argument("--fold", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--overwrite", action="store_true")
    if sys.argv[0] == "train.py":  # launch.sh asks
        time.sleep(float(os.environ.get("STUB_ASK_SECONDS", 0)))
    return p.parse_args(argv)
"""
RUNS = """
from pathlib import Path

def run_dir(args):
    return Path(args.out) / args.name / f"fold{args.fold}"
"""
# What it does is in the environment; it leaves one JSON line per attempt in STUB_LOG.
TRAIN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from flags import parse_args

args, env, start = parse_args(), os.environ, time.time()
fold, run = args.fold, Path(args.out) / args.name / f"fold{args.fold}"
run.mkdir(parents=True, exist_ok=True)
print("hello from fold", fold, flush=True)

def record(**values):
    values |= {"fold": fold, "argv": sys.argv[1:], "rank": env.get("RANK"),
               "gpus": env.get("CUDA_VISIBLE_DEVICES"), "threads": env.get("OMP_NUM_THREADS")}
    with open(env["STUB_LOG"], "a") as file:
        file.write(json.dumps(values) + "\\n")

def save_and_exit(*_):
    (run / "last.pt").write_text("saved")
    sys.exit(75)

if env.get("STUB_HANG"):  # with a child that ignores SIGTERM
    saves = env["STUB_HANG"] == "saves on SIGTERM"
    ignores = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    signal.signal(signal.SIGTERM, save_and_exit if saves else signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", ignores])
    record(pids=[os.getpid(), child.pid])
    while True:
        time.sleep(0.1)
time.sleep(float(env.get("STUB_SECONDS", 0.1)))
record(start=start, end=time.time())
if env.get("STUB_SAVES"):
    (run / env["STUB_SAVES"]).write_text("saved")
if env.get("STUB_STATUS"):
    status = {"exit_code": json.loads(env["STUB_STATUS"]), "reason": "a test"}
    (run / "status.json").write_text(json.dumps(status))
code = json.loads(env.get("STUB_CODES", "{}")).get(str(fold), 0)
if code == -9:
    os.kill(os.getpid(), signal.SIGKILL)
if code and not (args.resume and env.get("STUB_RESUMES")):
    print("fold", fold, "broke here", file=sys.stderr)
    sys.exit(code)
(run / "result.json").write_text("{}")
"""
REPORT = "import sys; print('report', sys.argv[1:])\n"
CPU = ("--", "--device", "cpu")


class Box:
    """A directory with launch.sh, stubs of ours and a report that prints its arguments."""

    def __init__(self, path):
        self.path, self.run_dir = path, path / "runs/stub/fold1"
        self.code = path / 'the code\'s "place"'
        (self.code / "util").mkdir(parents=True)
        shutil.copy(ROOT / "launch.sh", self.code)
        files = {"flags": FLAGS, "util/runs": RUNS, "train": TRAIN, "report": REPORT}
        for name, text in files.items():
            (self.code / f"{name}.py").write_text(text)
        self.log = path / "stub.jsonl"

    def start(self, *argv, **env):
        drop = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "RANK")
        inherited = {key: value for key, value in os.environ.items() if key not in drop}
        return subprocess.Popen(
            [self.code / "launch.sh", *argv],
            cwd=self.path,
            env=inherited | {"PYTHON": sys.executable, "STUB_LOG": str(self.log)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a pytest in the background ignores SIGINT, and bash cannot undo that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *argv, **env):
        """Exit code and output of launch.sh."""
        process = self.start(*argv, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def attempts(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def of_an_older_run(self, name, text):
        """A file in the directory of fold 1 that was there before launch.sh started."""
        self.run_dir.mkdir(parents=True)
        (self.run_dir / name).write_text(text)
        os.utime(self.run_dir / name, (1, 1))

    def pids(self):
        return [pid for attempt in self.attempts() for pid in attempt.get("pids", [])]

    def end(self, process, code, seconds=40):
        """What it prints until it has ended with this exit code, and left no process."""
        output, _ = process.communicate(timeout=seconds)
        assert process.returncode == code, output
        assert not leftovers(process.pid)
        wait_for(lambda: not any(map(alive, self.pids())), 2)
        return output


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def leftovers(group):
    """Pids that still live in a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if alive(path.name) and os.getpgid(int(path.name)) == group:
                found.append(path.name)
    return found


def at_once(attempts):
    """The largest number of attempts that ran at the same time."""
    return max(sum(a["start"] <= b["start"] < a["end"] for a in attempts) for b in attempts)


# ---------------------------------------------------------------------------------------------
# The queue


def test_folds_start_in_the_order_asked_and_two_at_a_time_on_the_cpu(box):
    code, output = box.run("--folds", "4,1-3", *CPU, STUB_SECONDS="0.7")
    attempts = box.attempts()
    assert code == 0, output
    by_start = [a["fold"] for a in sorted(attempts, key=lambda a: a["start"])]
    assert set(by_start[:2]) == {4, 1} and set(by_start[2:]) == {2, 3}
    assert at_once(attempts) == 2
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(a["threads"], a["gpus"]) for a in attempts} == {(str(threads), None)}
    assert "report ['--folds', '4,1,2,3', '--', 'runs/stub']" in output


def test_jobs_and_the_thread_count_of_the_user_are_kept(box):
    argv = ("--folds", "1-2", "--jobs", "1", *CPU)
    assert box.run(*argv, OMP_NUM_THREADS="7", STUB_SECONDS="0.3")[0] == 0
    assert at_once(box.attempts()) == 1
    assert {a["threads"] for a in box.attempts()} == {"7"}


def test_each_gpu_holds_one_fold_at_a_time_and_sees_no_other_gpu(box):
    code, _ = box.run("--folds", "1-5", "--gpus", "0,2,3", STUB_SECONDS="0.6")
    attempts = box.attempts()
    assert code == 0 and len(attempts) == 5
    assert {a["gpus"] for a in attempts} == {"0", "2", "3"}
    for gpu in ("0", "2", "3"):
        assert at_once([a for a in attempts if a["gpus"] == gpu]) == 1


def test_gpus_are_found_by_cuda_visible_devices_or_nvidia_smi(box):
    smi = box.path / "bin/nvidia-smi"
    smi.parent.mkdir()
    path = {"PATH": f"{smi.parent}:{os.environ['PATH']}"}
    for script, env, expected in (
        ("exit 1", {"CUDA_VISIBLE_DEVICES": "5,7"}, {"5", "7"}),
        ("printf '0\\n1\\n'", path, {"0", "1"}),
        ("echo 'No devices were found'; exit 6", path, {None}),
    ):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        assert box.run("--folds", "1-2", "--", "--overwrite", **env)[0] == 0
        assert {a["gpus"] for a in box.attempts()} == expected
        box.log.unlink()


def test_a_failed_fold_stops_no_other_and_is_named_with_the_end_of_its_log(box):
    code, output = box.run("--folds", "1-4", *CPU, STUB_CODES='{"1": 1, "3": -9}')
    assert code == 1
    assert {a["fold"] for a in box.attempts()} == {1, 2, 3, 4}
    assert "fold 1 failed with exit code 1 " in output
    assert "fold 3 failed with exit code 137 " in output
    assert "report ['--folds', '1,2,3,4', '--failed', '1,3', '--', 'runs/stub']" in output
    assert "fold 2 done in" in output and "fold 4 done in" in output
    end = output.partition("fold 1 is missing; the end of runs/stub/fold1.log:")[2]
    assert "    fold 1 broke here" in end


def test_folds_go_on_when_nobody_reads_the_output_any_more(box):
    (box.code / "report.py").write_text("raise SystemExit(141)  # as the real one does then")
    process = box.start("--folds", "1-3", *CPU, STUB_SECONDS="0.3")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0
    assert {a["fold"] for a in box.attempts()} == {1, 2, 3}


def test_every_seed_runs_every_fold_in_a_directory_of_its_own_whatever_the_name(box):
    name = "a b'c\"d $(touch oops) *"
    argv = ("--folds", "1-2", "--seeds", "0,7", *CPU, "--name", name)
    code, output = box.run(*argv, STUB_CODES='{"2": 1}')
    assert code == 1
    common = ["--device", "cpu", "--name", name, "--seed"]
    assert sorted(a["argv"] for a in box.attempts()) == [
        [*common, str(seed), "--name", f"{name}/seed{seed}", "--fold", str(fold)]
        for seed in (0, 7)
        for fold in (1, 2)
    ]
    runs = box.path / "runs" / name
    assert all((runs / f"seed{seed}/fold1/result.json").exists() for seed in (0, 7))
    log = (runs / "seed7" / "fold2.log").read_text()
    assert log.startswith("=== ") and "hello from fold 2" in log
    assert "seed7/fold2 failed with exit code 1 " in output
    assert f"seed0/fold2 is missing; the end of runs/{name}/seed0/fold2.log:" in output
    asked, _, failed = output.partition("'--failed', '")
    assert asked.endswith("report ['--folds', '1,2', '--seeds', '0,7', ")
    assert sorted(failed.partition("'")[0].split(",")) == ["seed0/fold2", "seed7/fold2"]
    # the same command with --resume
    assert box.run(*argv, "--resume", STUB_CODES='{"2": 1}', STUB_RESUMES="1")[0] == 0
    assert all("--resume" in a["argv"] for a in box.attempts()[4:])
    assert not list(box.path.rglob("oops"))


# ---------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags",
    [
        "", "--folds", "--folds ''", "--folds 0", "--folds 3-1", "--folds 1,,2", "--folds 1-3,2",
        "--folds 'a[$(touch oops)]; touch oops'", "--folds 1 --jobs 0", "--folds 1 --retries x",
        "--folds 1 --preset demo", "--folds 1 -- --fold 2", "--folds 1 --gpus 0,0",
        "--folds 1 --gpus '0;1'", "--folds 1 --gpus 0,1 --nproc_per_fold 3",
        "--folds 1 --gpus 0,1 --jobs 2", "--folds 1 --seeds ''", "--folds 1 --seeds 4-0",
        "--folds 1 --seeds 0,0", "--folds 1 --seeds 07", "--folds 1 --seeds 0 -- --seed=1",
    ],
)  # fmt: skip
def test_wrong_launch_flags_exit_with_code_2_in_one_line_and_start_nothing(box, flags):
    code, output = box.run(*shlex.split(flags))
    assert code == 2
    assert output.startswith("launch.sh: error: ") and output.count("\n") == 1
    assert not box.attempts() and not (box.path / "oops").exists()


def test_wrong_flags_of_train_start_nothing_and_help_prints_both_usages(box):
    code, output = box.run("--folds", "1-3", "--", "--batch_size", "many")
    assert code == 2
    assert "train.py: error: argument --batch_size: invalid int value: 'many'" in output
    code, output = box.run("--help")
    assert code == 0
    assert output.startswith("Train folds in parallel") and "--nproc_per_fold N" in output
    code, output = box.run("--folds", "1", "--", "--help")
    assert code == 0 and "usage: train.py" in output
    assert not box.attempts() and not (box.path / "runs").exists()


def test_the_real_flags_py_and_util_answer_what_launch_asks(box):
    for file in ("flags.py", "util/runs.py"):  # the others are found by PYTHONPATH
        (box.code / file).unlink()
    (box.code / "train.py").write_text(TRAIN.replace("from flags", "from stub_flags"))
    (box.code / "stub_flags.py").write_text(FLAGS)
    argv = ("--folds", "1", "--seeds", "3", *CPU, "--name", "real")
    code, output = box.run(*argv, PYTHONPATH=str(ROOT))
    assert code == 0, output
    assert (box.path / "runs/real/seed3/fold1/result.json").exists()


def test_shellcheck_finds_nothing():  # also in the script for the first GPU
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", ROOT / "launch.sh", ROOT / "tests/gpu.sh"], check=True)


# ---------------------------------------------------------------------------------------------
# Retries


def test_a_stopped_fold_is_retried_with_resume_and_appends_to_its_log(box):
    argv = ("--folds", "1-2", "--retries", "2", *CPU)
    code, output = box.run(*argv, STUB_CODES='{"1": 75}', STUB_RESUMES="1")
    assert code == 0, output
    first, second = (a["argv"] for a in box.attempts() if a["fold"] == 1)
    assert "--resume" not in first and "--resume" in second
    assert "fold 1 was stopped by a signal" in output and "to be resumed" in output
    log = (box.path / "runs/stub/fold1.log").read_text()
    assert log.count("attempt 1:") == log.count("attempt 2:") == 1
    assert log.count("hello from fold 1") == 2


@pytest.mark.parametrize(
    ("status", "codes", "code", "tries"),
    [
        (None, {1: 1, 2: 2}, 1, [3, 1]),  # 2: wrong flags, which stay wrong
        (None, {1: 75}, 75, [3, 1]),
        (75, {1: 1}, 75, [3, 1]),  # torchrun turns every code into 1; status.json has the real one
        (2, {1: 1}, 1, [1, 1]),
    ],
)
def test_retries_are_counted_and_exit_code_2_is_never_retried(box, status, codes, code, tries):
    box.of_an_older_run("status.json", '{"exit_code": 2, "reason": "old"}')  # does not count
    env = {"STUB_CODES": json.dumps(codes)}
    if status:
        env["STUB_STATUS"] = json.dumps(status)
    found, output = box.run("--folds", "1-2", "--retries", "2", *CPU, **env)
    folds = [a["fold"] for a in box.attempts()]
    assert (found, [folds.count(1), folds.count(2)]) == (code, tries), output
    assert "fold 1 is missing" in output and "'--failed', '" in output
    assert ("was stopped by a signal" in output) == (code == 75)


@pytest.mark.parametrize("saves", ["last.pt", "result.json", ""])
def test_with_overwrite_a_retry_resumes_only_a_checkpoint_of_this_launch(box, saves):
    box.of_an_older_run("last.pt", "old")
    argv = ("--folds", "1", "--retries", "1", *CPU, "--overwrite")
    assert box.run(*argv, STUB_CODES='{"1": 1}', STUB_SAVES=saves)[0] == 1
    second = box.attempts()[1]["argv"]
    assert ("--resume" in second) == bool(saves) and ("--overwrite" in second) != bool(saves)


# ---------------------------------------------------------------------------------------------
# Interrupts


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)]
)
def test_an_interrupt_lets_folds_save_and_leaves_no_process(box, number, code):
    process = box.start("--folds", "1-4", *CPU, STUB_HANG="saves on SIGTERM")
    wait_for(lambda: len(box.attempts()) == 2, 20)
    os.killpg(process.pid, number)  # as the terminal does: the group of launch.sh
    box.end(process, code)
    assert len(box.pids()) == 4  # folds 3 and 4 were never started
    for fold in (1, 2):
        assert (box.path / f"runs/stub/fold{fold}/last.pt").exists()


@pytest.mark.parametrize(
    ("kill", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_an_interrupt_before_the_first_fold_starts_nothing(box, kill, number):
    process = box.start("--folds", "1", *CPU, STUB_ASK_SECONDS="30")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(children.read_text, 20)
    time.sleep(0.5)
    kill(process.pid, number)
    box.end(process, 128 + number, 5)
    assert not box.attempts() and not (box.path / "runs").exists()


def test_an_interrupt_between_two_attempts_starts_no_other(box):
    process = box.start("--folds", "1", "--retries", "9999", *CPU, STUB_CODES='{"1": 1}')
    wait_for(lambda: len(box.attempts()) == 2, 20)
    process.terminate()
    box.end(process, 143)
    count = len(box.attempts())
    time.sleep(1)
    assert len(box.attempts()) == count


def test_an_interrupt_during_the_report_leaves_nothing(box):
    (box.code / "report.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    process = box.start("--folds", "1", *CPU)
    while process.stdout.readline() != "up\n":
        pass
    process.terminate()
    assert "stopping" not in box.end(process, 143, 5)
    assert (box.run_dir / "result.json").exists()


def test_torchrun_gets_its_own_gpus_per_fold_and_an_interrupt_reaches_every_rank(box):
    argv = ("--folds", "1-2", "--gpus", "0,1,2,3", "--nproc_per_fold", "2")
    process = box.start(*argv, STUB_HANG="saves on SIGTERM")
    wait_for(lambda: len(box.attempts()) == 4, 50)
    process.send_signal(signal.SIGTERM)
    box.end(process, 143)
    assert sorted((a["fold"], a["gpus"], a["rank"]) for a in box.attempts()) == [
        (1, "0,1", "0"), (1, "0,1", "1"), (2, "2,3", "0"), (2, "2,3", "1"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_fold_that_ignores_sigterm_is_killed_after_30_seconds(box):
    process = box.start("--folds", "1", *CPU, STUB_HANG="ignores SIGTERM")
    wait_for(box.attempts, 20)
    process.send_signal(signal.SIGTERM)
    box.end(process, 143)
