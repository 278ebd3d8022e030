"""memory.py: bytes against closed forms and against the profiler's account of a real step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import memory
import train
from memory import GIB, plan

ROOT = Path(__file__).parent.parent
TINY = ["--wavlm", "tiny", "--prosody", "none", "--batch_size", "4", "--max_seconds", "2.5"]
LARGE = ["--wavlm", "large", "--prosody", "none", "--device", "cuda", "--batch_size", "8"]


def planned(*flags):
    args = train.parse_args(list(flags))
    return plan(args, 0, 0, args.max_seconds)


def real_peak(args, seconds):
    """Bytes alive at the peak of a real second step on CPU, from the profiler's memory events."""
    torch.manual_seed(0)
    model = train.build_model(args, 0, 0)
    optimizer = train.build_optimizer(model, args)
    train.set_trainable(model, args.unfreeze)
    model.train()
    args.amp = args.amp or "off"
    batches = []
    for _ in range(args.gradient_accumulation_steps):
        batch = {k: torch.ones_like(v, device="cpu") for k, v in shapes(args, seconds).items()}
        batch["input_values"].normal_()
        batch["chunk_index"] = torch.arange(args.batch_size).reshape(-1, args.context)
        batches.append(batch)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.train_step(model, model, batches, optimizer, scaler, args)
    states = [t for state in optimizer.state.values() for t in state.values()]
    inputs = [t for batch in batches for t in batch.values()]
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *states, *inputs])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train.train_step(model, model, batches, optimizer, scaler, args, 1)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return held + peak


def shapes(args, seconds):
    return memory.meta_batch(args, 0, 0, seconds)


@pytest.mark.parametrize(
    "flags",
    [
        ["--unfreeze", "all"],
        ["--unfreeze", "all", "--amp", "bf16"],
        ["--unfreeze", "all", "--gradient_checkpointing"],
        ["--unfreeze", "none"],
        ["--unfreeze", "transformer"],
        ["--unfreeze", "top:2"],
        ["--unfreeze", "all", "--gradient_accumulation_steps", "2"],
        ["--unfreeze", "all", "--context", "2", "--feedback"],
        ["--unfreeze", "all", "--attention", "eager", "--pooling", "attention"],
        ["--encoder", "convnext"],
        ["--encoder", "baseline"],
    ],
    ids=" ".join,
)
def test_the_planned_peak_is_the_profilers_account_of_a_real_step(flags):
    args = train.parse_args([*TINY, "--device", "cpu", *flags])
    predicted = plan(args, 0, 0, 2.5).peak_bytes
    assert predicted == pytest.approx(real_peak(args, 2.5), rel=0.01)


@pytest.mark.parametrize(
    ("unfreeze", "trained"), [("none", 0), ("top:6", 75_582_608), ("all", 315_452_096)]
)
def test_parameters_gradients_and_states_have_their_closed_forms(unfreeze, trained):
    with torch.device("meta"):
        args = train.parse_args([*LARGE, "--unfreeze", unfreeze])
        model = train.build_model(args, 0, 0, load=False)
    total = sum(p.numel() for p in model.parameters())
    trained += total - 315_453_120  # and all around WavLM
    kinds = planned(*LARGE, "--unfreeze", unfreeze, "--max_seconds", "8").bytes
    slack = 512 * 1000  # rounding of a thousand small tensors
    assert kinds["parameters"] == pytest.approx(4 * total, abs=slack)
    assert kinds["optimizer"] == pytest.approx(8 * trained, abs=2 * slack)


def test_with_accumulation_gradients_are_there_while_activations_are():
    flags = [*LARGE, "--unfreeze", "all", "--max_seconds", "8"]
    one, two = planned(*flags), planned(*flags, "--gradient_accumulation_steps", "2")
    assert one.bytes["gradients"] < 0.1 * GIB
    assert two.bytes["gradients"] == pytest.approx(4 * 318.5e6, rel=0.01)


def test_autocast_keeps_a_half_copy_of_every_matrix_that_trains():
    plan = planned(*LARGE, "--unfreeze", "transformer", "--max_seconds", "8")
    assert plan.bytes["autocast copies"] == pytest.approx(2 * 311e6, rel=0.08)
    off = planned(*LARGE, "--unfreeze", "transformer", "--max_seconds", "8", "--no_amp")
    assert off.bytes["autocast copies"] == 0
    assert off.bytes["activations"] > 1.4 * plan.bytes["activations"]


def test_checkpointing_keeps_less_and_eager_attention_more():
    flags = [*LARGE, "--unfreeze", "transformer", "--max_seconds", "8"]
    plain = planned(*flags).bytes["activations"]
    assert planned(*flags, "--gradient_checkpointing").bytes["activations"] < 0.5 * plain
    assert planned(*flags, "--attention", "eager").bytes["activations"] > 1.3 * plain


def test_the_plan_follows_a_layer_that_is_added_to_the_model(monkeypatch):
    flags = [*TINY, "--unfreeze", "all", "--device", "cpu"]
    before = planned(*flags)
    build = train.build_model

    def hacked(*args, **kwargs):
        model = build(*args, **kwargs)
        model.heads["valence"] = torch.nn.Sequential(
            torch.nn.Linear(192, 50_000), torch.nn.Linear(50_000, 192), model.heads["valence"]
        )
        return model

    monkeypatch.setattr(train, "build_model", hacked)
    added = 192 * 50_000 * 2 + 50_000 + 192
    after = planned(*flags)
    assert after.bytes["parameters"] - before.bytes["parameters"] == pytest.approx(
        4 * added, abs=2048
    )
    assert after.bytes["optimizer"] - before.bytes["optimizer"] == pytest.approx(
        8 * added, abs=4096
    )


def test_a_progressive_schedule_is_planned_for_its_heaviest_stage():
    flags = [*TINY, "--device", "cpu"]
    heaviest = planned(*flags, "--unfreeze", "all").peak_bytes
    assert planned(*flags, "--unfreeze", "1:none,2:top:1,3:all").peak_bytes == heaviest
    assert planned(*flags, "--unfreeze", "none").peak_bytes < heaviest


def test_auto_takes_the_largest_batch_that_fits():
    flags = [*TINY, "--unfreeze", "all", "--device", "cuda", "--gpu_gib", "1.2"]
    size = train.parse_args([*flags, "--batch_size", "auto"]).batch_size
    assert size > 4
    assert planned(*flags, "--batch_size", str(size)).verdict == "fits"
    assert planned(*flags, "--batch_size", str(size + 1)).verdict != "fits"
    divided = train.parse_args([*flags, "--batch_size", "auto", "--global_batch_size", "6"])
    assert divided.batch_size * divided.gradient_accumulation_steps == 6


def test_planning_leaves_the_random_state_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    planned(*TINY, "--device", "cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_the_command_line_prints_a_table_or_json_and_exits_2_on_what_cannot_be_planned():
    def run(*flags):
        command = [sys.executable, "memory.py", *TINY, *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    text = run("--unfreeze", "all")
    assert text.returncode == 0 and "fits" in text.stdout and "peak" in text.stdout
    figures = json.loads(run("--unfreeze", "all", "--json").stdout)
    assert figures["plan"]["peak_bytes"] == sum(figures["plan"]["bytes"].values())
    sizes = [figures["table"]["all"][size]["peak_bytes"] for size in ("1", "8", "64")]
    assert sizes == sorted(sizes)
    for flags, said in (
        (["--wavlm", "/nowhere"], "--wavlm"),
        (["--batch_size", "0"], "batch_size"),
    ):
        wrong = run(*flags)
        assert wrong.returncode == 2 and said in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_planned_peak_is_what_cuda_allocates():
    args = train.parse_args([*TINY, "--unfreeze", "all", "--amp", "fp16", "--device", "cuda"])
    model = train.build_model(args, 0, 0).cuda()
    optimizer = train.build_optimizer(model, args)
    train.set_trainable(model, "all")
    batch = {k: torch.ones_like(v, device="cuda") for k, v in shapes(args, 2.5).items()}
    batch["chunk_index"] = torch.arange(4, device="cuda").unsqueeze(1)
    scaler = torch.amp.GradScaler("cuda")
    for step in range(3):
        torch.cuda.reset_peak_memory_stats()
        train.train_step(model, model, [batch], optimizer, scaler, args, step)
    real = torch.cuda.max_memory_allocated()
    assert plan(args, 0, 0, 2.5).peak_bytes == pytest.approx(real, rel=0.05)
