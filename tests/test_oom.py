"""Out of memory in a step: all ranks split the micro-batch alike and lose nothing. In evaluation:
each rank splits its own batches, and the results are those of an undisturbed run."""

import os
import re

import numpy as np
import pytest
import torch
from conftest import quick_flags
from helpers import Run, assert_same, is_model
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import data
from data import SAMPLE_RATE


def shorten_memory(where, ranks, limit, spared=0, error=None):
    """Handle of a hook: models of the given ranks, "0" or "1", run out of memory.

    In training with more than `limit` utterances, as forward ends, as backward begins or in the
    middle of backward, after `spared` forwards; in evaluation with more than `limit` seconds,
    padding included, in an encoder.
    """
    forwards = []

    def fault():  # a new one each time: its traceback keeps a step's tensors alive
        return error or torch.OutOfMemoryError("CUDA out of memory")

    def after_forward(module, _, preds):
        if not is_model(module, preds) or len(preds) <= limit:
            return
        forwards.append(1)
        if len(forwards) <= spared:
            return
        if where == "forward":
            raise fault()

        def fail(gradient):
            handle.remove()
            raise fault()

        if preds.requires_grad:
            layer = module.encoder.wavlm.encoder.layers[0].feed_forward.output_dense.weight
            handle = (layer if where == "middle" else preds).register_hook(fail)

    def before_encoding(module, inputs):
        if type(module).__name__ == "WavLMEncoder" and not module.training:
            audio = inputs[0]["input_values"]
            if audio.numel() > limit * SAMPLE_RATE and not audio.is_meta:
                raise fault()

    here = os.environ.get("RANK", "0") in ranks
    if where == "evaluation":
        data.EVAL_SECONDS = 3  # several batches for each rank
        return register_module_forward_pre_hook(before_encoding) if here else None
    return register_module_forward_hook(after_forward) if here else None


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus, small_wavlm):
    """Flags of all runs, and the folder for them."""
    folder = tmp_path_factory.mktemp("oom")
    return quick_flags(corpus, small_wavlm, folder), folder


def launch(base, name, words, ranks=1, short=None):
    """A run that has ended; `short`: arguments of shorten_memory."""
    run = Run([*base[0], *words.split()], base[1] / name, ranks)
    codes = run.in_ranks(fault=(shorten_memory, *short) if short else None)
    assert codes == [0] * ranks, run.console()
    return run


def assert_same_run(one, two):
    assert_same(one.weights("best.pt"), two.weights("best.pt"))
    assert one.losses() == two.losses() and len(one.losses()) >= 2


@pytest.fixture(scope="module")
def configured(base):
    """{ranks: what the others must equal}: runs that were given the small micro-batch."""
    words = "--global_batch_size 16 --batch_size"
    return {n: launch(base, f"configured{n}", f"{words} {4 // n}", n) for n in (1, 2)}


@pytest.mark.parametrize(
    ("where", "which"), [("forward", "1"), ("backward", "01"), ("middle", "0")]
)
def test_ranks_agree_on_smaller_pieces_wherever_it_strikes(base, configured, where, which):
    run = launch(base, f"two-{where}", "--batch_size 8", 2, (where, which, 2))
    assert "continuing with batch_size 2 x accumulation 4" in run.console()
    assert_same_run(configured[2], run)


@pytest.mark.parametrize("which", ["0", "1"])
def test_the_other_rank_gets_the_buckets_of_this_very_step(base, which):
    """DDP arranges its buckets anew in the second step, which is the one that fails here."""
    words = "--batch_size 4 --d_hidden 384"  # more than one bucket
    run = launch(base, f"buckets-{which}", words, 2, ("middle", which, 2, 1))
    assert "step 2: out of memory" in run.console()
    assert "batch_size 2 x accumulation 2" in run.console() and len(run.losses()) == 6


def test_a_run_that_backed_off_is_resumed_with_its_small_pieces(base, configured):
    words = "--batch_size 16 --save_every 1"
    run = launch(base, "resumed", words, short=("backward", "0", 4))
    assert_same_run(configured[1], run)
    last = run.checkpoint()
    assert last["args"]["batch_size"] == 16 and last["batch_size"] == 4
    (run.directory / "result.json").unlink()  # as if it had been killed before the test
    again = launch(base, "resumed", f"{words} --resume")
    assert again.train_log().count("batch 4 x accumulation 4") == 1
    assert_same_run(configured[1], again)


@pytest.mark.parametrize(
    ("error", "splits"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("[enforce fail] data. DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (torch.distributed.DistBackendError("NCCL error: out of memory"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_out_of_memory_is_known_by_its_words(base, error, splits, tmp_path):
    run = Run([*base[0], "--max_steps", "1"], tmp_path)
    hook = shorten_memory("forward", "0", 4, error=error)
    try:
        assert run.train() == (0 if splits else 1)
    finally:
        hook.remove()
    said = "out of memory" in run.train_log() and "batch_size 4 x accumulation 2"
    assert (said and said in run.train_log()) == splits


def test_where_nothing_is_left_to_split_the_message_says_what_to_do(base):
    run = Run([*base[0], "--batch_size", "2"], base[1] / "none")
    assert run.in_ranks(fault=(shorten_memory, "forward", "0", 0)) == [1]
    assert "Traceback" not in run.console() and "--gradient_checkpointing" in run.console()
    assert not (run.directory / "best.pt").exists()


# --- evaluation


@pytest.mark.parametrize(("ranks", "which"), [(1, "0"), (2, "1")])
def test_evaluation_goes_on_in_smaller_pieces(base, ranks, which):
    words = f"--batch_size {8 // ranks}"
    undisturbed = launch(base, f"undisturbed-{ranks}", words, ranks)
    run = launch(base, f"pieces-{ranks}", words, ranks, ("evaluation", which, 1.5))
    # Once in each of two epochs, dev and test: what failed is not tried again. Rank 0 has the log
    said = "evaluation: out of memory (CUDA out of memory): going on with 1."
    assert run.console().count(said) == (4 if which == "0" else 0), run.console()
    assert_same_run(undisturbed, run)
    np.testing.assert_allclose(run.predictions(), undisturbed.predictions(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_frozen_encoders_states_are_made_in_smaller_pieces(base, tmp_path, pooling):
    words, found = f"--unfreeze none --max_steps 1 --pooling {pooling} --cache_dir", []
    for name, short in (("whole", None), ("pieces", ("evaluation", "0", 1.5))):
        launch(base, f"{name}-{pooling}", f"{words} {tmp_path / name}", short=short)
        (values,) = (tmp_path / name).glob("hidden-*/part-*/hidden.bin")
        found.append(np.fromfile(values, np.float16))
    np.testing.assert_allclose(*found, rtol=0, atol=0.005)  # float16 of values up to 5


def test_an_utterance_that_has_no_room_alone_ends_all_ranks_in_a_line(base):
    run = Run([*base[0], "--batch_size", "4"], base[1] / "alone", 2)
    assert run.in_ranks(fault=(shorten_memory, "evaluation", "1", 0.2)) == [1, 1]
    said = run.console()
    assert "Traceback" not in said
    assert re.search(r"rank 1: out of memory: not enough .* 0\.. s .*: lower --max_seconds", said)
    assert "train.py: error: out of memory: another rank is out of memory" in said
