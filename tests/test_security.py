"""Hostile input does nothing but give an error: python -m pytest tests/test_security.py

Real commands in real processes, in a folder of their own, with a payload that would leave a file
there; and a search of the tracked files for calls that could run what they read.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fault_kills import OnLine, run_ranks

from flags import parse_args
from util import runs
from util.files import UserError

REPO = Path(__file__).resolve().parents[1]

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
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True)
    return [REPO / name for name in names.stdout.decode().split("\0") if name]


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


def hostile_zip(path):
    torch.save({"model": Payload(), "config": {}, "args": {}, "state": Payload()}, path)


def hostile_legacy(path):
    torch.save({"model": Payload()}, path, _use_new_zipfile_serialization=False)


def hostile_pickle(path):
    path.write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")


HOSTILE = [hostile_zip, hostile_legacy, hostile_pickle]


def run(folder, script, *argv):
    """The finished process of `python script argv` with `folder` as working directory."""
    return subprocess.run(
        [sys.executable, str(REPO / script), *map(str, argv)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def assert_refused(done, folder, *fragments):
    """Exit code 2, no traceback, a last line with the fragments, and no trace of the payload."""
    assert not list(folder.rglob("*pwned*"))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    for fragment in fragments:
        assert fragment in last


@pytest.mark.parametrize("make", HOSTILE)
def test_the_payload_is_live_where_nothing_holds_it_back(tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x.pt")
    with contextlib.suppress(Exception):  # a bare pickle runs, and then is no checkpoint
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "pwned").exists()


@pytest.fixture(scope="module")
def train_flags(corpus, small_wavlm):
    """Flags of a run of one step."""
    return [
        "--data", corpus, "--wavlm", small_wavlm, "--layers", "1", "2", "--prosody", "none",
        "--unfreeze", "all", "--max_steps", "1", "--batch_size", "8", "--d_hidden", "16",
        "--d_state", "8", "--mamba_layers", "1", "--num_workers", "0", "--device", "cpu",
        "--cache_dir", corpus.parent / "cache",
    ]  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE)
def test_a_hostile_checkpoint_is_refused_by_each_function_that_loads_one(
    tmp_path, make, monkeypatch
):
    """Also with the hash that a checkpoint of ours ends with, which anybody can compute."""
    monkeypatch.chdir(tmp_path)
    best = tmp_path / "best.pt"
    make(best)
    for _ in range(2):
        with pytest.raises(UserError, match=r"--checkpoint .*best.pt.* not "):
            runs.load_model(tmp_path, "--checkpoint")
        with pytest.raises(UserError, match=r"best.pt"):
            runs.read_checkpoint(best)
        assert not (tmp_path / "pwned").exists()
        best.write_bytes(best.read_bytes() + hashlib.sha256(best.read_bytes()).digest())


def test_a_hostile_checkpoint_is_an_error_for_predict(tmp_path, corpus):
    hostile_zip(tmp_path / "best.pt")
    audio = corpus.parent / "s1d0t0.wav"
    done = run(tmp_path, "predict.py", "--checkpoint", tmp_path, audio, "--out", "out.csv")
    assert_refused(done, tmp_path, "--checkpoint", "best.pt")
    assert not (tmp_path / "out.csv").exists()


def test_a_hostile_checkpoint_is_an_error_for_init_from(tmp_path, train_flags):
    hostile_zip(tmp_path / "best.pt")
    flags = vars(parse_args([str(flag) for flag in train_flags]))
    (tmp_path / "args.json").write_text(json.dumps(flags))
    done = run(tmp_path, "train.py", *train_flags, "--init_from", "best.pt")
    assert_refused(done, tmp_path, "--init_from best.pt")


def test_a_hostile_last_pt_is_an_error_for_resume(tmp_path, train_flags):
    directory = tmp_path / "runs" / "x" / "fold1"
    directory.mkdir(parents=True)
    (directory / "args.json").write_text("{}")
    hostile_zip(directory / "last.pt")
    done = run(tmp_path, "train.py", *train_flags, "--name", "x", "--resume")
    assert_refused(done, tmp_path, "last.pt")


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


def tones(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        wave = 0.3 * np.sin(np.arange(8000) * (0.05 + 0.01 * i))
        soundfile.write(folder / name.replace("/", "_"), wave, 16_000)


@pytest.mark.parametrize(
    ("script", "path"),
    [("data.py", "link.wav"), ("data.py", "/etc/passwd"), ("train.py", "../secret.wav")],
)
def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path, script, path, train_flags):
    tones(tmp_path / "root", ["a.wav"])
    tones(tmp_path, ["secret.wav"])
    (tmp_path / "root" / "link.wav").symlink_to(tmp_path / "secret.wav")
    text = f"utt_id,path,valence,arousal\na,a.wav,0.5,0.5\nb,{path},0.5,0.5\n"
    (tmp_path / "root" / "m.csv").write_text(text)
    flags = train_flags[2:] if script == "train.py" else ["--cache_dir", "cache"]
    done = run(tmp_path, script, *flags, "--data", "root/m.csv")
    assert_refused(done, tmp_path, "m.csv row 3", "leaves the data root")


def test_hostile_names_are_names_and_nothing_else(tmp_path, train_flags):
    """Audio and utterances with such names are trained on, inspected and predicted."""
    tones(tmp_path / "audio")
    rows = ["utt_id,path,valence,arousal,session,dialog,speaker"]
    for i, name in enumerate(name for name in NAMES * 5 if "\n" not in name):
        cell = '"' + name.replace('"', '""') + '"'
        utt_id = '"' + f"{i} {name}".replace("\\", "_").replace('"', '""') + '"'
        rows.append(f"{utt_id},{cell},{i % 10 / 10},{i % 7 / 7},s{i % 3} $(touch pwned),d{i},p{i}")
    (tmp_path / "audio" / "m.csv").write_text("\n".join(rows))
    done = run(tmp_path, "data.py", "--data", "audio/m.csv", "--cache_dir", "cache")
    assert done.returncode == 0, done.stderr
    flags = [*train_flags[2:], "--data", "audio/m.csv", "--name", "; touch pwned"]
    done = run(tmp_path, "train.py", *flags, "--cache_dir", "c")
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "runs" / "; touch pwned" / "fold1"
    assert (checkpoint / "skipped.csv").read_text() == "utt_id,file,reason\n"
    done = run(tmp_path, "predict.py", "--checkpoint", checkpoint, "audio", "--out", "out.csv")
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "report.py", "runs/; touch pwned")
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr  # 1: folds are missing
    created = {p.name for p in tmp_path.rglob("*pwned*")} - {"; touch pwned", *NAMES}
    assert not created


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
    flags = [*map(str, train_flags), "--out", str(tmp_path / "runs")]
    log = tmp_path / "log"
    assert run_ranks(flags, log, 2, (tell_listeners,)) == [0, 0], log.read_text()
    found = re.findall("listens on (.*)", log.read_text())
    assert len(found) >= 2 and set(found) == {"0100007F"}, found  # 127.0.0.1
    # where a host's name stands for its loopback, they would have been there unasked
    assert log.read_text().count("on interface lo\n") == 2
