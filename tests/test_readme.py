"""README.md: every command in it parses, the first one runs, every flag it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import memory
import predict
import report
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PARSERS = {
    "train.py": train.parse_args,
    "data.py": data.parse_args,
    "predict.py": predict.parse_args,
    "report.py": report.parse_args,
    "memory.py": memory.parse_args,
}


def commands():
    """Shell words of every line in a bash block that starts one of our programs."""
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if any(word.endswith((".py", "launch.sh")) for word in words):
                yield words


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_parses(words):
    words = [re.sub(r"\$\w+", "1", word) for word in words if word != "&"]
    if words[0] == "./launch.sh":
        assert words[1] == "--folds"
        train.parse_args(words[words.index("--") + 1 :])
        return
    program = next(word for word in words if word.endswith(".py"))
    assert program in PARSERS
    flags = words[words.index(program) + 1 :]
    if "--init_from" in flags:  # its flags are read from a run that is not here
        place = flags.index("--init_from")
        del flags[place : place + 2]
    PARSERS[program](flags)


def test_the_first_command_runs(tmp_path, demo_cache):
    first = next(commands())
    assert first == ["python", "train.py", "--preset", "demo"]
    short = ["--max_steps", "2", "--prosody", "none", "--out", str(tmp_path / "runs")]
    short += ["--cache_dir", str(demo_cache)]
    subprocess.run([sys.executable, *first[1:], *short], cwd=ROOT, check=True, timeout=300)
    assert (tmp_path / "runs/demo/fold1/result.json").exists()


def test_every_flag_in_the_text_exists():
    benches = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/bench_*.py"))
    assert all(name in README for name in benches)
    known = "\n".join((ROOT / name).read_text() for name in (*PARSERS, "launch.sh", *benches))
    ours = re.sub(r"\btorchrun [^`]*?train\.py|#SBATCH.*|pip install.*", "", README)
    for flag in sorted(set(re.findall(r"(?<![\w-])--([a-z_0-9]+)", ours))):
        assert f"--{flag}" in known, flag
