"""Out of memory in a step: all ranks split the micro-batch alike and lose nothing. In evaluation:
each rank splits its own batches, and the results are those of an undisturbed run."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_flags
from helpers import run_ranks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import data
from data import SAMPLE_RATE
from model import EmotionModel, ModelConfig
from train import main, parse_args
from util import distributed
from util.checkpoints import read_checkpoint
from util.runs import read_records
from wavlm import SIZES, WavLMConfig

CPU = torch.device("cpu")


def shorten_memory(where, ranks, limit, spared=0):
    """Handle of a hook: models of the given ranks, "0" or "1", run out of memory.

    In training with more than `limit` utterances, as forward ends, as backward begins or in the
    middle of backward, after `spared` forwards; in evaluation with more than `limit` seconds,
    padding included, in an encoder.
    """
    forwards = []

    def error():  # a new one each time: its traceback keeps a step's tensors alive
        return torch.OutOfMemoryError("CUDA out of memory")

    def after_forward(module, _, preds):
        if type(module).__name__ != "EmotionModel" or preds.is_meta or len(preds) <= limit:
            return
        forwards.append(1)
        if len(forwards) <= spared:
            return
        if where == "forward":
            raise error()

        def fail(gradient):
            handle.remove()
            raise error()

        if preds.requires_grad:
            layer = module.encoder.wavlm.encoder.layers[0].feed_forward.output_dense.weight
            handle = (layer if where == "middle" else preds).register_hook(fail)

    def before_encoding(module, inputs):
        if type(module).__name__ == "WavLMEncoder" and not module.training:
            audio = inputs[0]["input_values"]
            if audio.numel() > limit * SAMPLE_RATE and not audio.is_meta:
                raise error()

    here = os.environ.get("RANK", "0") in ranks
    if where == "evaluation":
        data.EVAL_SECONDS = 3  # several batches for each rank
        return register_module_forward_pre_hook(before_encoding) if here else None
    return register_module_forward_hook(after_forward) if here else None


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus, small_wavlm):
    """Flags of all runs."""
    return [*quick_flags(corpus, small_wavlm, tmp_path_factory.mktemp("oom"))]


def launch(base, name, *flags, ranks=1, short=None):
    """(the run's directory, exit codes, console); `short`: (where, ranks, most)."""
    out = Path(base[base.index("--out") + 1])
    log = out.parent / f"{name}.log"
    fault = (shorten_memory, *short) if short else None
    codes = run_ranks([*base, "--name", name, *flags], log, ranks, fault)
    return out / name / "fold1", codes, log.read_text()


def assert_same_run(one, two):
    first, second = (read_checkpoint(directory / "best.pt")["model"] for directory in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[r["loss"] for r in read_records(d) if r["event"] == "train"] for d in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) >= 2


@pytest.fixture(scope="module")
def configured(base):
    """What the others must equal: runs that were given the small micro-batch."""
    found = {}
    for ranks, flags in ((1, ["--batch_size", "4"]), (2, ["--batch_size", "2"])):
        flags += ["--global_batch_size", "16"]
        found[ranks], codes, said = launch(base, f"configured{ranks}", *flags, ranks=ranks)
        assert codes == [0] * ranks, said
    return found


def test_a_step_that_runs_out_of_memory_is_done_in_smaller_pieces(base, configured):
    directory, codes, said = launch(base, "one", "--batch_size", "16", short=("forward", "0", 4))
    assert codes == [0], said
    assert "continuing with batch_size 4 x accumulation 4" in said
    assert_same_run(configured[1], directory)


@pytest.mark.parametrize(
    ("where", "which"), [("forward", "1"), ("backward", "01"), ("middle", "0"), ("middle", "1")]
)
def test_ranks_agree_on_it_wherever_it_strikes(base, configured, where, which):
    name, short = f"two-{where}-{which}", (where, which, 2)
    directory, codes, said = launch(base, name, "--batch_size", "8", ranks=2, short=short)
    assert codes == [0, 0], said
    assert "continuing with batch_size 2 x accumulation 4" in said
    assert_same_run(configured[2], directory)


@pytest.mark.parametrize("which", ["0", "1"])
def test_the_other_rank_gets_the_buckets_of_this_very_step(base, which):
    """DDP arranges its buckets anew in the second step, which is the one that fails here."""
    flags = ["--batch_size", "4", "--d_hidden", "384"]  # more than one bucket
    name, short = f"buckets-{which}", ("middle", which, 2, 1)
    directory, codes, said = launch(base, name, *flags, ranks=2, short=short)
    assert codes == [0, 0], said
    assert "step 2: out of memory" in said and "batch_size 2 x accumulation 2" in said
    assert len([r for r in read_records(directory) if r["event"] == "train"]) == 6


def test_a_run_that_backed_off_is_resumed_with_its_small_pieces(base, configured):
    flags = ["--batch_size", "16", "--save_every", "1"]
    directory, codes, said = launch(base, "resumed", *flags, short=("backward", "0", 4))
    assert codes == [0], said
    last = read_checkpoint(directory / "last.pt")
    assert last["args"]["batch_size"] == 16 and last["batch_size"] == 4
    (directory / "result.json").unlink()  # as if it had been killed before the test
    _, codes, said = launch(base, "resumed", *flags, "--resume")
    assert (
        codes == [0]
        and "batch 4 x accumulation 4" in said.rpartition("done in")[0].rpartition("done in")[2]
    ), said
    assert_same_run(configured[1], directory)


def test_where_nothing_is_left_to_split_the_message_says_what_to_do(base):
    directory, codes, said = launch(base, "none", "--batch_size", "2", short=("forward", "0", 0))
    assert codes == [1] and "Traceback" not in said
    assert "--gradient_checkpointing" in said
    assert not (directory / "best.pt").exists()


# --- evaluation


def predictions(directory):
    columns = ("pred_valence", "pred_arousal")
    with open(directory / "predictions_test.csv", newline="") as file:
        return np.array([[float(row[c]) for c in columns] for row in csv.DictReader(file)])


@pytest.fixture(scope="module")
def undisturbed(base):
    """{ranks: directory} of runs whose evaluation has room."""
    found = {}
    for ranks in (1, 2):
        flags = ["--batch_size", str(8 // ranks)]
        found[ranks], codes, said = launch(base, f"undisturbed{ranks}", *flags, ranks=ranks)
        assert codes == [0] * ranks, said
    return found


@pytest.mark.parametrize(("ranks", "which"), [(1, "0"), (2, "1"), (2, "01")])
def test_evaluation_goes_on_in_smaller_pieces(base, undisturbed, ranks, which):
    name, short = f"pieces-{ranks}-{which}", ("evaluation", which, 1.5)
    flags = ["--batch_size", str(8 // ranks)]
    directory, codes, said = launch(base, name, *flags, ranks=ranks, short=short)
    assert codes == [0] * ranks, said
    # Once in each of two epochs, dev and test: what failed is not tried again. Rank 0 has the log
    failures = said.count("evaluation: out of memory (CUDA out of memory): going on with 1.")
    assert failures == (4 if "0" in which else 0), said
    assert_same_run(undisturbed[ranks], directory)
    expected, got = predictions(undisturbed[ranks]), predictions(directory)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_frozen_encoders_states_are_made_in_smaller_pieces(base, tmp_path, pooling, monkeypatch):
    monkeypatch.setattr(data, "EVAL_SECONDS", 3)
    found = []
    for name in ("whole", "pieces"):
        flags = ["--unfreeze", "none", "--pooling", pooling, "--cache_dir", str(tmp_path / name)]
        args = parse_args([*base, *flags, "--name", f"{name}-{pooling}", "--max_steps", "1"])
        hook = shorten_memory("evaluation", "0", 1.5) if name == "pieces" else None
        try:
            assert main(args) == 0
        finally:
            if hook:
                hook.remove()
        (cache,) = (tmp_path / name).glob("hidden-*")
        (values,) = cache.glob("part-*/hidden.bin")
        found.append(np.fromfile(values, np.float16))
    np.testing.assert_allclose(*found, rtol=0, atol=0.005)  # float16 of values up to 5


def test_an_utterance_that_has_no_room_alone_ends_all_ranks_in_a_line(base):
    short = ("evaluation", "1", 0.2)
    _, codes, said = launch(base, "alone", "--batch_size", "4", ranks=2, short=short)
    assert codes == [1, 1] and "Traceback" not in said
    assert re.search(r"rank 1: out of memory: not enough .* 0\.. s .*: lower --max_seconds", said)
    assert "train.py: error: out of memory: another rank is out of memory" in said


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_pieces_keep_the_padding_of_their_batch(norm):
    """The group norm of smaller WavLMs sees padding: padded anew, an utterance would differ."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "feat_extract_norm": norm}
    config = WavLMConfig.from_dict(SIZES["tiny"].to_dict() | shape)
    model = EmotionModel(ModelConfig(wavlm=config.to_dict(), layers=(1,), prosody_dim=0)).eval()
    batch = {"rows": [7, 5, 3, 2, 0], "padded_share": 0.5, "audio_seconds": 5 * 0.25}
    batch["input_values"], batch["attention_mask"] = data.pad(
        [np.random.default_rng(i).standard_normal(1600 * (5 - i)) for i in range(5)]
    )
    batch["input_values"] = batch["input_values"].float()
    calls = []

    def short(piece):
        calls.append(len(piece["input_values"]))
        if calls[-1] > 2:
            raise MemoryError
        return model.encode(piece)

    with torch.no_grad():
        expected = model.encode(batch)
        rows, pieces = zip(*distributed.encode_in_pieces(short, [batch, batch], CPU))
    assert calls == [5, 2, 2, 1, 2, 2, 1]
    assert rows == ([7, 5], [3, 2], [0]) * 2
    torch.testing.assert_close(torch.cat(pieces), expected.repeat(2, 1), rtol=1e-5, atol=1e-5)
    alone = {key: batch[key][4:, :1600] for key in ("input_values", "attention_mask")}
    with torch.no_grad():
        differs = not torch.allclose(model.encode(alone), expected[4:], rtol=1e-4, atol=1e-4)
    assert differs == (norm == "group")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (MemoryError(), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (torch.distributed.DistBackendError("NCCL error: out of memory"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_out_of_memory_is_known_by_its_words(error, is_one):
    assert distributed.is_out_of_memory(error) == is_one
    with pytest.raises(RuntimeError, match="can't allocate memory") as real:
        torch.empty(2**58)  # what torch itself raises here
    assert distributed.is_out_of_memory(real.value)
