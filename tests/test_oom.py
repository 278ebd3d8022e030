"""Out of memory in a step: all ranks split the micro-batch alike and lose nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import quick_flags

ROOT = Path(__file__).parent.parent
# Runs train.py with a model that has no memory for more than MOST utterances at a time, on the
# given ranks: as its forward ends, as backward begins, or in the middle of backward.
RUNNER = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import train
from model import EmotionModel

where, ranks, most = sys.argv.pop(1), sys.argv.pop(1).split(","), int(sys.argv.pop(1))
forward = EmotionModel.forward


def short_of_memory(self, batch, teacher_forcing=0.0):
    preds = forward(self, batch, teacher_forcing)
    labels = batch["labels"]
    if len(labels) <= most or labels.is_meta or os.environ.get("RANK", "0") not in ranks:
        return preds
    if where == "forward":
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail(gradient):
        handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory")

    if preds.requires_grad:
        layer = self.encoder.wavlm.encoder.layers[0].feed_forward.output_dense.weight
        handle = (layer if where == "middle" else preds).register_hook(fail)
    return preds


EmotionModel.forward = short_of_memory
sys.exit(train.run())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus, small_wavlm):
    """Flags of all runs."""
    return [*quick_flags(corpus, small_wavlm, tmp_path_factory.mktemp("oom")), "--max_steps", "3"]


def launch(base, name, *flags, world_size=1, short=None):
    """The run's directory; `short`: (where, ranks, most utterances)."""
    out = Path(base[base.index("--out") + 1])
    command = [sys.executable]
    if world_size > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(world_size)]
    command.append(str(ROOT / "train.py"))
    if short:
        command[-1] = str(out.parent / "runner.py")
        (out.parent / "runner.py").write_text(RUNNER.format(root=str(ROOT)))
        command += [str(word) for word in short]
    command += [*base, "--name", name, *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return out / name / "fold1", run


def weights(directory):
    return torch.load(directory / "best.pt", map_location="cpu", weights_only=True)["model"]


def assert_same_run(one, two):
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [
        [json.loads(line).get("loss") for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (one, two)
    ]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def configured(base):
    """What the others must equal: runs that were given the small micro-batch."""
    found = {}
    for ranks, flags in ((1, ["--batch_size", "4"]), (2, ["--batch_size", "2"])):
        flags += ["--global_batch_size", "16"]
        found[ranks], run = launch(base, f"configured{ranks}", *flags, world_size=ranks)
        assert run.returncode == 0, run.stderr[-2000:]
    return found


def test_a_step_that_runs_out_of_memory_is_done_in_smaller_pieces(base, configured):
    directory, run = launch(base, "one", "--batch_size", "16", short=("forward", "0", 4))
    assert run.returncode == 0, run.stderr[-2000:]
    assert "going on with batch_size 4 x accumulation 4" in run.stdout
    assert_same_run(configured[1], directory)


@pytest.mark.parametrize(
    ("where", "ranks"), [("forward", "1"), ("backward", "0,1"), ("middle", "0"), ("middle", "1")]
)
def test_ranks_agree_on_it_wherever_it_strikes(base, configured, where, ranks):
    name = f"two-{where}-{ranks.replace(',', '')}"
    directory, run = launch(base, name, "--batch_size", "8", world_size=2, short=(where, ranks, 2))
    assert run.returncode == 0, run.stderr[-2000:]
    assert "going on with batch_size 2 x accumulation 4" in run.stdout
    assert_same_run(configured[2], directory)


def test_a_run_that_backed_off_is_resumed_with_its_small_pieces(base, configured):
    flags = ["--batch_size", "16", "--save_every", "1"]
    directory, run = launch(base, "resumed", *flags, "--max_steps", "3", short=("backward", "0", 4))
    assert run.returncode == 0, run.stderr[-2000:]
    last = torch.load(directory / "last.pt", weights_only=True)
    assert last["args"]["batch_size"] == 16 and last["state"]["batch_size"] == 4
    (directory / "result.json").unlink()  # as if it had been killed before the test
    _, again = launch(base, "resumed", *flags, "--resume")
    assert again.returncode == 0 and "batch 4 x accumulation 4" in again.stdout, again.stderr[
        -2000:
    ]
    assert_same_run(configured[1], directory)


def test_where_nothing_is_left_to_split_the_message_says_what_to_do(base):
    directory, run = launch(base, "none", "--batch_size", "2", short=("forward", "0", 0))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "--gradient_checkpointing" in run.stderr
    assert not (directory / "best.pt").exists()
