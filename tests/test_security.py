"""Hostile input does nothing but give an error: python -m pytest tests/test_security.py

The scripts run in a folder of their own, with a payload that would leave a file there; and the
tracked files are searched for calls that could run what they read.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import quick_flags
from helpers import ROOT, OnLine, Run

import data
import predict
import report
import train
from util.files import run_script

# pattern -> a line that it must find
BANNED_IN_PROGRAMS = {
    r"\b(import|from) +_?(pickle|cPickle|dill|joblib|shelve|marshal|yaml)\b": "import pickle",
    r"\b(pickle|joblib|yaml|marshal)\.\w*load": "pickle.loads(x)",
    r"np\.load\((?!.*allow_pickle=False)": "np.load(path)",
    r"allow_pickle *= *True": "np.save(path, x, allow_pickle=True)",
    r"from_pretrained\((?!.*(trust_remote_code|\*\*options))": "AutoModel.from_pretrained(name)",
}
BANNED = {
    r"torch\.load\((?!.*weights_only=True)": "torch.load(path)",
    r"weights_only *= *False": "torch.load(path, weights_only=False)",
    r"trust_remote_code[\"']?\s*[=:] *True": '"trust_remote_code": True',
    r"(?<![\w.])(eval|exec|__import__)\(": "x = eval(text)",
    r"shell *= *True": "subprocess.run(command, shell=True)",
    r"\bos\.(system|popen)\(": "os.system(command)",
    r"tempfile\.mktemp\(": "tempfile.mktemp()",
    r"[\"' =(]/(tmp|var/tmp|dev/shm)/": 'open("/tmp/x")',
    r"torch\.distributed\.checkpoint": "import torch.distributed.checkpoint",
}
BANNED_IN_SHELL = {r"(^|[\s;(])eval\s": "eval $command", r"[\"' =(]/tmp/": "> /tmp/x"}
# The first two make hostile files, the last stands for python, which runs what follows -c
EXEMPT = ("test_security.py", "test_input_faults.py", "warm_python.py")


def tracked_files():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in names.stdout.decode().split("\0") if name]


def test_no_tracked_file_contains_a_call_that_could_run_what_it_reads():
    found, searched = [], 0
    for path in tracked_files():
        if path.name in EXEMPT or path.suffix not in (".py", ".sh", ""):
            continue
        is_shell = path.suffix == ".sh" or path.name == "run"
        patterns = BANNED_IN_SHELL if is_shell else BANNED
        if path.parent.name != "tests" and not is_shell:
            patterns = patterns | BANNED_IN_PROGRAMS
        lines = path.read_text().splitlines()
        searched += len(lines)
        for row, line in enumerate(lines, 1):
            found += [f"{path.name} row {row}: {p}" for p in patterns if re.search(p, line)]
    assert not found
    assert searched > 5000


@pytest.mark.parametrize("patterns", [BANNED_IN_PROGRAMS, BANNED, BANNED_IN_SHELL])
def test_each_banned_pattern_finds_its_example(patterns):
    for pattern, example in patterns.items():
        assert re.search(pattern, example), pattern


# ---------------------------------------------------------------- checkpoints


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def zipped(path):
    torch.save({"model": Payload(), "config": {}, "args": {}, "state": Payload()}, path)


def legacy(path):
    torch.save({"model": Payload()}, path, _use_new_zipfile_serialization=False)


def pickled(path):
    path.write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")


MAIN = {
    "data.py": (data.inspect, data.parse_args),
    "train.py": (train.main, train.parse_args),
    "predict.py": (predict.main, predict.parse_args),
    "report.py": (report.main, report.parse_args),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(script, *argv) -> (exit code, what it said), with tmp_path as working directory."""
    monkeypatch.chdir(tmp_path)

    def run(script, *argv):
        main, parse_args = MAIN[script]
        try:
            code = run_script(script, lambda: main(parse_args(list(map(str, argv)))))
        except SystemExit as error:  # a wrong flag
            code = error.code
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, said.err or said.out

    return run


@pytest.fixture
def train_flags(corpus, small_wavlm, no_pictures):
    """Flags of a run of one step, in the working directory."""
    return [*quick_flags(corpus, small_wavlm, Path()), "--max_steps", "1"]


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("make", [zipped, legacy, pickled])
def test_a_hostile_checkpoint_is_refused_by_whatever_loads_one(
    tmp_path, make, hashed, run, corpus, train_flags
):
    """Also with the hash that a checkpoint of ours ends with, which anybody can compute."""
    best, last = tmp_path / "best.pt", tmp_path / "runs/x/fold1/last.pt"
    last.parent.mkdir(parents=True)
    make(best)
    with contextlib.suppress(Exception):  # a bare pickle runs, and then is no checkpoint
        torch.load(best, weights_only=False)
    (tmp_path / "pwned").unlink()  # the payload is live where nothing holds it back
    if hashed:
        best.write_bytes(best.read_bytes() + hashlib.sha256(best.read_bytes()).digest())
    last.write_bytes(best.read_bytes())
    (last.parent / "args.json").write_text("{}")
    (tmp_path / "args.json").write_text(json.dumps(vars(train.parse_args(train_flags))))
    audio = corpus.parent / "s1d0t0.wav"
    for named, script, *argv in (
        ("--checkpoint", "predict.py", "--checkpoint", tmp_path, audio, "--out", "out.csv"),
        ("--init_from best.pt", "train.py", *train_flags, "--init_from", "best.pt"),
        ("last.pt", "train.py", *train_flags, "--name", "x", "--resume"),
    ):
        code, said = run(script, *argv)
        assert code == 2 and named in said.splitlines()[-1] and " not " in said
    assert not list(tmp_path.rglob("*pwned*")) and not (tmp_path / "out.csv").exists()


# ---------------------------------------------------------------- paths and names

NAMES = (
    "; touch pwned.wav",
    "$(touch pwned).wav",
    "`touch pwned`.wav",
    "| touch pwned.wav",
    "-rf.wav",
    "\"'.wav",
    "line\nbreak; touch pwned.wav",
    "%s{0}\\n.wav",
)


def tones(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        wave = 0.3 * np.sin(np.arange(8000) * (0.05 + 0.01 * i))
        soundfile.write(folder / name.replace("/", "_"), wave, 16_000)


@pytest.mark.parametrize(
    ("script", "path"),
    [("data.py", "link.wav"), ("data.py", "/etc/passwd"), ("train.py", "../secret.wav")],
)
def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path, script, path, run, train_flags):
    tones(tmp_path / "root", ["a.wav"])
    tones(tmp_path, ["secret.wav"])
    (tmp_path / "root" / "link.wav").symlink_to(tmp_path / "secret.wav")
    text = f"utt_id,path,valence,arousal\na,a.wav,0.5,0.5\nb,{path},0.5,0.5\n"
    (tmp_path / "root" / "m.csv").write_text(text)
    flags = train_flags[2:] if script == "train.py" else ["--cache_dir", "cache"]
    code, said = run(script, *flags, "--data", "root/m.csv")
    assert code == 2 and "m.csv row 3" in said and "leaves the data root" in said


def test_hostile_names_are_names_and_nothing_else(tmp_path, run, train_flags):
    """Audio and utterances with such names are trained on, inspected and predicted."""
    names = [f"{name[:-4]}{i}.wav" for name in NAMES for i in range(5)]
    tones(tmp_path / "audio", names)
    rows = ["utt_id,path,valence,arousal,session,dialog,speaker"]
    for i, name in enumerate(name for name in names if "\n" not in name):
        cell = '"' + name.replace('"', '""') + '"'
        utt_id = '"' + f"{i} {name}".replace("\\", "_").replace('"', '""') + '"'
        rows.append(f"{utt_id},{cell},{i % 10 / 10},{i % 7 / 7},s{i % 3} $(touch pwned),d{i},p{i}")
    (tmp_path / "audio" / "m.csv").write_text("\n".join(rows))
    checkpoint = tmp_path / "runs/; touch pwned/fold1"
    for script, *argv in (
        ("data.py", "--data", "audio/m.csv", "--cache_dir", "cache"),
        ("train.py", *train_flags[2:], "--data", "audio/m.csv", "--name", "; touch pwned"),
        ("predict.py", "--checkpoint", checkpoint, "audio", "--out", "out.csv"),
        ("report.py", "runs/; touch pwned"),
    ):
        code, said = run(script, *argv)
        assert code == 0 or (script == "report.py" and code == 1), said  # folds are missing
    assert (checkpoint / "skipped.csv").read_text() == "utt_id,file,reason\n"
    assert not {p.name for p in tmp_path.rglob("*pwned*")} - {"; touch pwned", *names}


# ---------------------------------------------------------------- ports


def tell_listeners():
    """The addresses on which a rank listens, in its console; the store is the launcher's."""
    store = int(os.environ["MASTER_PORT"])

    def tell():
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                address, port = local.split(":")
                ours = f"socket:[{rest[5]}]" in links and int(port, 16) != store
                if state == "0A" and ours:  # it listens
                    print("listens on", address, flush=True)
        print("on interface", os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)

    OnLine(r"^step +1/", tell).__enter__()


def test_ranks_of_one_machine_listen_on_its_loopback_alone(tmp_path, train_flags):
    run = Run(train_flags, tmp_path, 2)
    assert run.in_ranks(fault=(tell_listeners,)) == [0, 0], run.console()
    found = re.findall("listens on (.*)", run.console())
    assert len(found) >= 2 and set(found) == {"0100007F"}, found  # 127.0.0.1
    # where a host's name stands for its loopback, they would have been there unasked
    assert run.console().count("on interface lo\n") == 2
