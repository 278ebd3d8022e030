"""launch.sh around a stub train.py: the queue, its logs, failures and interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLAGS = """
import argparse, os, sys, time

def parse_args(argv=None):
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("--out", default="runs")
    p.add_argument("--name", default="stub")
    p.add_argument("--fold", type=int, default=1)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--overwrite", action="store_true")
    if "train" not in sys.modules["__main__"].__dict__:  # launch.sh asks
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

train = True  # and not launch.sh's question
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
    (run / "last.pt").write_text("saved")
if env.get("STUB_STATUS"):
    status = {"exit_code": json.loads(env["STUB_STATUS"]), "reason": "a test"}
    (run / "status.json").write_text(json.dumps(status))
code = json.loads(env.get("STUB_CODES", "{}")).get(str(fold), 0)
if code == -9:
    os.kill(os.getpid(), signal.SIGKILL)
if code and not (args.resume and env.get("STUB_RESUMES")):
    print("fold", fold, "broke here", file=sys.stderr)
    sys.exit(code)
names = [f"{m}_{t}" for m in ("ccc", "pcc", "rmse") for t in ("valence", "arousal")]
scores = dict.fromkeys([*names, "ccc_mean"], 0.1 * fold)
result = {"fold": fold, "num_folds": 3, "best_epoch": 1, "seconds": 1, "dev": scores,
          "test": scores, "peak_gib_measured": 1, "parameters_trainable": 1}
(run / "result.json").write_text(json.dumps(result))
header = "utt_id,dialog,speaker,emotion,seconds,valence,arousal,pred_valence,pred_arousal\\n"
rows = [f"u{fold}{i},d,s{i},,2,{i},{i},{i},{i}\\n" for i in range(6)]
(run / "predictions_test.csv").write_text("".join([header, *rows]))
"""
REPORT = "import sys; print('report', sys.argv[1:])\n"
CPU = ("--", "--device", "cpu")


class Box:
    """A directory with launch.sh, the stub and a report that prints its arguments."""

    def __init__(self, path):
        self.path = path
        self.code = path / 'the code\'s "place"'
        self.code.mkdir()
        shutil.copy(ROOT / "launch.sh", self.code)
        (self.code / "train.py").write_text(TRAIN)
        (self.code / "report.py").write_text(REPORT)
        self.log = path / "stub.jsonl"

    def start(self, *argv, **env):
        drop = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "RANK")
        inherited = {key: value for key, value in os.environ.items() if key not in drop}
        env = {"PYTHON": sys.executable, "STUB_LOG": str(self.log), **env}
        return subprocess.Popen(
            [self.code / "launch.sh", *argv],
            cwd=self.path,
            env={**inherited, **env},
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


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def leftovers(group):
    """Pids that still live in a process group."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    found = []
    for pid in filter(alive, pids):
        try:
            found += [pid] if os.getpgid(pid) == group else []
        except ProcessLookupError:
            continue
    return found


def most_at_once(attempts):
    return max(sum(a["start"] <= b["start"] < a["end"] for a in attempts) for b in attempts)


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_folds_start_in_the_order_asked_and_two_at_a_time_on_the_cpu(box):
    code, output = box.run("--folds", "4,1-3", "--", "--device", "cpu", STUB_SECONDS="0.7")
    attempts = box.attempts()
    assert code == 0, output
    by_start = [a["fold"] for a in sorted(attempts, key=lambda a: a["start"])]
    assert set(by_start[:2]) == {4, 1} and set(by_start[2:]) == {2, 3}
    assert most_at_once(attempts) == 2
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {a["threads"] for a in attempts} == {str(threads)}
    assert {a["gpus"] for a in attempts} == {None}
    assert "report ['--folds', '4,1,2,3', '--', 'runs/stub']" in output


def test_jobs_and_the_users_own_thread_count_are_kept(box):
    argv = ("--folds", "1-3", "--jobs", "1", "--", "--device", "cpu")
    code, _ = box.run(*argv, OMP_NUM_THREADS="7", STUB_SECONDS="0.3")
    assert code == 0
    assert most_at_once(box.attempts()) == 1
    assert {a["threads"] for a in box.attempts()} == {"7"}


def test_each_gpu_holds_one_fold_at_a_time_and_sees_no_other_gpu(box):
    code, _ = box.run("--folds", "1-5", "--gpus", "0,2,3", STUB_SECONDS="0.6")
    attempts = box.attempts()
    assert code == 0 and len(attempts) == 5
    assert {a["gpus"] for a in attempts} == {"0", "2", "3"}
    for gpu in ("0", "2", "3"):
        assert most_at_once([a for a in attempts if a["gpus"] == gpu]) == 1


def test_gpus_are_found_by_cuda_visible_devices_or_nvidia_smi(box):
    assert box.run("--folds", "1-2", CUDA_VISIBLE_DEVICES="5,7")[0] == 0
    assert {a["gpus"] for a in box.attempts()} == {"5", "7"}
    box.log.unlink()
    (box.path / "bin").mkdir()
    smi = box.path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    assert box.run("--folds", "1-2", "--", "--overwrite", PATH=path)[0] == 0
    assert {a["gpus"] for a in box.attempts()} == {"0", "1"}
    box.log.unlink()
    smi.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert box.run("--folds", "1", "--", "--overwrite", PATH=path)[0] == 0
    assert {a["gpus"] for a in box.attempts()} == {None}


def test_spaces_quotes_and_dollars_in_names_survive(box):
    name = "a b'c\"d $(touch oops) *"
    code, output = box.run("--folds", "1", "--", "--name", name, "--device", "cpu")
    assert code == 0, output
    assert (box.path / "runs" / name / "fold1" / "result.json").exists()
    log = (box.path / "runs" / name / "fold1.log").read_text()
    assert log.startswith("=== ") and "hello from fold 1" in log
    assert box.attempts()[0]["argv"] == ["--name", name, "--device", "cpu", "--fold", "1"]
    assert not (box.path / "oops").exists()


def test_a_failed_fold_stops_no_other_and_is_named_with_the_end_of_its_log(box):
    code, output = box.run(
        "--folds", "1-4", "--", "--device", "cpu", STUB_CODES='{"1": 1, "3": -9}'
    )
    assert code == 1
    assert {a["fold"] for a in box.attempts()} == {1, 2, 3, 4}
    assert "fold 1 failed with exit code 1 " in output
    assert "fold 3 failed with exit code 137 " in output
    assert "report ['--folds', '1,2,3,4', '--failed', '1,3', '--', 'runs/stub']" in output
    assert "fold 2 done in" in output and "fold 4 done in" in output
    end = output.partition("fold 1 is missing; the end of runs/stub/fold1.log:")[2]
    assert "    fold 1 broke here" in end


def test_the_table_shows_a_failed_fold_as_missing_and_refuses_the_mean(box):
    shutil.copy(ROOT / "report.py", box.code)
    env = {"PYTHONPATH": str(ROOT)}
    argv = ("--folds", "1-3", "--jobs", "3", "--", "--device", "cpu")
    code, output = box.run(*argv, STUB_CODES='{"3": 1}', **env)
    assert code == 1
    assert "mean: not given, fold 3 is missing" in output
    code, output = box.run(*argv, **env)
    assert code == 0, output
    assert ["mean", "0.200"] in [line.split()[:2] for line in output.splitlines()]


def test_wrong_train_flags_exit_with_code_2_and_start_nothing(box):
    code, output = box.run("--folds", "1-3", "--", "--batch_size", "many")
    assert code == 2
    assert "train.py: error: argument --batch_size: invalid int value: 'many'" in output
    assert "usage: train.py" in output
    assert not box.attempts() and not (box.path / "runs").exists()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--folds", ""],
        ["--folds", "0"],
        ["--folds", "3-1"],
        ["--folds", "1,,2"],
        ["--folds", "1-3,2"],
        ["--folds", "a; touch oops"],
        ["--folds", "a[$(touch oops)]"],
        ["--folds", "1", "--jobs", "0"],
        ["--folds", "1", "--retries", "x"],
        ["--folds"],
        ["--folds", "1", "--preset", "demo"],
        ["--folds", "1", "--", "--fold", "2"],
        ["--folds", "1", "--gpus", "0,0"],
        ["--folds", "1", "--gpus", "0;1"],
        ["--folds", "1", "--gpus", "0,1", "--nproc_per_fold", "3"],
        ["--folds", "1", "--gpus", "0,1", "--jobs", "2"],
    ],
)
def test_wrong_launch_flags_exit_with_code_2_in_one_line_and_start_nothing(box, argv):
    code, output = box.run(*argv)
    assert code == 2
    assert output.startswith("launch.sh: error: ") and output.count("\n") == 1
    assert not box.attempts() and not (box.path / "oops").exists()


def test_a_failed_fold_is_retried_with_resume_and_appends_to_its_log(box):
    argv = ("--folds", "1-2", "--retries", "2", "--", "--device", "cpu")
    code, output = box.run(*argv, STUB_CODES='{"1": 75}', STUB_RESUMES="1")
    assert code == 0, output
    first, second = (a["argv"] for a in box.attempts() if a["fold"] == 1)
    assert "--resume" not in first and "--resume" in second
    assert "fold 1 was stopped by a signal" in output and "to be resumed" in output
    log = (box.path / "runs" / "stub" / "fold1.log").read_text()
    assert log.count("attempt 1:") == log.count("attempt 2:") == 1
    assert log.count("hello from fold 1") == 2


def test_a_stopped_fold_is_no_failed_one_but_is_missing(box):
    code, output = box.run("--folds", "1-2", "--", "--device", "cpu", STUB_CODES='{"1": 75}')
    assert code == 75
    assert "fold 1 was stopped by a signal" in output and "fold 1 is missing" in output
    assert "'--failed', '1'" in output


@pytest.mark.parametrize(("told", "code", "tries"), [(75, 75, 2), (2, 1, 1), (None, 1, 2)])
def test_status_json_tells_what_torchrun_hides(box, told, code, tries):
    argv = ("--folds", "1", "--retries", "1", "--", "--device", "cpu")
    env = {"STUB_CODES": '{"1": 1}', "STUB_STATUS": json.dumps(told)}
    assert box.run(*argv, **env)[0] == code
    assert len(box.attempts()) == tries


def test_an_older_status_json_is_not_believed(box):
    status = box.path / "runs" / "stub" / "fold1" / "status.json"
    status.parent.mkdir(parents=True)
    status.write_text('{"exit_code": 2, "reason": "old"}')
    os.utime(status, (1, 1))
    argv = ("--folds", "1", "--retries", "1", "--", "--device", "cpu")
    assert box.run(*argv, STUB_CODES='{"1": 1}')[0] == 1
    assert len(box.attempts()) == 2


def test_status_is_reports(box):
    code, output = box.run("status", "runs/a b")
    assert code == 0 and output == "report ['--status', 'runs/a b']\n"


def test_retries_are_counted_and_exit_code_2_is_never_retried(box):
    argv = ("--folds", "1-2", "--retries", "2", "--", "--device", "cpu")
    code, _ = box.run(*argv, STUB_CODES='{"1": 1, "2": 2}')
    assert code == 1
    folds = [a["fold"] for a in box.attempts()]
    assert folds.count(1) == 3 and folds.count(2) == 1


@pytest.mark.parametrize("saves", [True, False])
def test_a_retry_resumes_only_a_checkpoint_of_this_launch_where_overwrite_is_given(box, saves):
    last = box.path / "runs" / "stub" / "fold1" / "last.pt"
    last.parent.mkdir(parents=True)
    last.write_text("of an older run")
    os.utime(last, (1, 1))
    argv = ("--folds", "1", "--retries", "1", "--", "--device", "cpu", "--overwrite")
    env = {"STUB_SAVES": "1"} if saves else {}
    assert box.run(*argv, STUB_CODES='{"1": 1}', **env)[0] == 1
    second = box.attempts()[1]["argv"]
    assert ("--resume" in second) == saves and ("--overwrite" in second) != saves


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)]
)
def test_an_interrupt_lets_folds_save_and_leaves_no_process(box, number, code):
    argv = ("--folds", "1-4", "--", "--device", "cpu")
    process = box.start(*argv, STUB_HANG="polite")
    wait_for(lambda: len(box.attempts()) == 2)
    os.killpg(process.pid, number)  # as the terminal does: the group of launch.sh
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    pids = [pid for a in box.attempts() for pid in a["pids"]]
    wait_for(lambda: not any(map(alive, pids)), 2)
    assert len(pids) == 4  # folds 3 and 4 were never started
    for fold in (1, 2):
        assert (box.path / "runs" / "stub" / f"fold{fold}" / "last.pt").exists()


@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupt_before_the_first_fold_starts_nothing(box, whole_group):
    process = box.start("--folds", "1", "--", "--device", "cpu", STUB_IMPORT_SECONDS="30")
    wait_for(lambda: children(process.pid))
    time.sleep(0.5)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    process.communicate(timeout=5)
    assert process.returncode == (130 if whole_group else 143)
    assert not box.attempts() and not (box.path / "runs").exists()
    assert not leftovers(process.pid)


def test_an_interrupt_between_two_attempts_starts_no_other(box):
    argv = ("--folds", "1", "--retries", "9999", "--", "--device", "cpu")
    process = box.start(*argv, STUB_CODES='{"1": 1}')
    wait_for(lambda: len(box.attempts()) == 2)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143
    count = len(box.attempts())
    time.sleep(1)
    assert len(box.attempts()) == count and not leftovers(process.pid)


def test_an_interrupt_during_the_report_leaves_nothing(box):
    (box.code / "report.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    process = box.start("--folds", "1", "--", "--device", "cpu")
    while process.stdout.readline() != "up\n":
        pass
    process.terminate()
    output, _ = process.communicate(timeout=5)
    assert process.returncode == 143 and "stopping" not in output
    assert (box.path / "runs" / "stub" / "fold1" / "result.json").exists()
    assert not leftovers(process.pid)


def test_torchrun_gets_its_own_gpus_per_fold_and_an_interrupt_reaches_every_rank(box):
    argv = ("--folds", "1-2", "--gpus", "0,1,2,3", "--nproc_per_fold", "2")
    process = box.start(*argv, STUB_HANG="polite")
    wait_for(lambda: len(box.attempts()) == 4, 50)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 143, output
    attempts = box.attempts()
    assert {(a["fold"], a["gpus"]) for a in attempts} == {(1, "0,1"), (2, "2,3")}
    assert sorted((a["fold"], a["rank"], a["world"]) for a in attempts) == [
        (1, "0", "2"), (1, "1", "2"), (2, "0", "2"), (2, "1", "2"),
    ]  # fmt: skip
    wait_for(lambda: not any(alive(pid) for a in attempts for pid in a["pids"]), 2)


@pytest.mark.slow
def test_a_fold_deaf_to_sigterm_is_killed_after_30_seconds(box):
    process = box.start("--folds", "1", "--", "--device", "cpu", STUB_HANG="deaf")
    wait_for(lambda: box.attempts())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    assert process.returncode == 143
    wait_for(lambda: not any(map(alive, box.attempts()[0]["pids"])), 2)


def test_help_prints_the_usage_of_launch_and_of_train(box):
    code, output = box.run("--help")
    assert code == 0
    assert output.startswith("Train folds in parallel") and "--nproc_per_fold N" in output
    code, output = box.run("--folds", "1", "--", "--help")
    assert code == 0 and "usage: train.py" in output and not box.attempts()


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", ROOT / "launch.sh"], check=True)
