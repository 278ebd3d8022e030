"""Imports run one way, and nothing of ours is imported late, patched or loaded twice."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"util." + name for name in ("files", "audio", "checkpoints", "tracing", "distributed")}
BASE |= {"wavlm"}
BELOW = {  # what a module may import of ours
    "util.files": set(),
    "util.audio": {"util.files"},
    "util.checkpoints": {"util.files"},
    "util.tracing": {"util.files"},
    "util.distributed": {"util.files"},
    "wavlm": {"util.files"},
    "corpora": BASE,
    "model": BASE,
}
for name in (
    "util.intervals",
    "data",
    "util.runs",
    "util.exits",
    "util.pictures",
    "util.log",
    "step",
    "flags",
    "memory",
    "util.trials",
    "report",
    "train",
):
    BELOW[name] = set(BELOW)  # all that stand before it
BELOW["predict"] = BELOW["train"] - {"step", "flags", "memory"}
BELOW["faces"] = {"util.files", "util.audio", "corpora"}
BELOW["text"] = {"util.files", "corpora"}


def module_of(path):
    """util.files of util/files.py; a package is one module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "corpora" else ".".join(parts)


FILES = [*ROOT.glob("*.py"), *ROOT.glob("util/[a-z]*.py"), *ROOT.glob("corpora/*.py")]
OURS = {module_of(path) for path in FILES}


def imports(node):
    """Modules named by an import statement; a name of a package may be one."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}


def ours(node):
    return {module_of(ROOT / name.replace(".", "/")) for name in imports(node)} & OURS


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path):
    tree, name = ast.parse(path.read_text()), module_of(path)
    assert name in BELOW, "a file that is not in the order"
    kinds = (ast.Import, ast.ImportFrom)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    used = set().union(*map(ours, found)) - {name}
    assert used <= BELOW[name], f"{name} imports {sorted(used - BELOW[name])}"
    late = [node.lineno for node in found if node not in tree.body and ours(node)]
    assert not late, f"imported inside a function or an if, in lines {late}"
    mocks = [node.lineno for node in found if any("mock" in name for name in imports(node))]
    assert not mocks


def test_python_train_py_loads_train_once():
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"flags", "step", "util.runs"} <= loaded and "train" not in loaded
