"""memory.py, tracing.py, timing.py: bytes against real steps and closed forms, seconds, answers."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import memory
import timing
import train
from memory import FITS, GIB, Planner, plan
from util import tracing
from util.tracing import KINDS, Segment, blend

ROOT = Path(__file__).parent.parent
TINY = ["--wavlm", "tiny", "--prosody", "none", "--batch_size", "4", "--max_seconds", "2.5"]
LARGE = ["--wavlm", "large", "--prosody", "none", "--device", "cuda", "--batch_size", "8"]
ALL = [*LARGE, "--unfreeze", "all", "--max_seconds", "8"]


def planner_of(*flags, world_size=1):
    args = train.parse_args(list(flags))
    return Planner(args, (0, 0), args.max_seconds, world_size)


def step_of(*flags, world_size=1):
    """The trace of a step, without evaluation."""
    planner = planner_of(*flags, world_size=world_size)
    return planner.trace(planner.args.batch_size, planner.args.unfreeze)


def planned(*flags, world_size=1):
    args = train.parse_args(list(flags))
    return plan(args, 0, 0, args.max_seconds, world_size)


def kinds_at_peak(step):
    alive = step.timeline
    return dict(zip(KINDS, alive[alive.sum(1).argmax()].tolist()))


# ---------------------------------------------------------------- against real steps


@pytest.mark.parametrize(
    ("flags", "seconds"),
    memory.grid(False),
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_the_planned_peak_is_the_profilers_account_of_a_real_step(flags, seconds):
    args = train.parse_args(["--prosody", "none", "--device", "cpu", *flags])
    args.amp = args.amp or "off"
    step = Planner(args, (0, 0), seconds).trace(args.batch_size, args.unfreeze)
    real, _ = memory.measure(args, (0, 0), seconds, torch.device("cpu"))
    most = 1.02 if "--encoder" in flags else 1.01  # of a CNN's kernels we know less
    assert 0.995 * real <= step.timeline.sum(1).max() <= most * real


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_the_planned_peak_is_what_cuda_allocates(amp):
    args = train.parse_args([*TINY, "--unfreeze", "all", "--amp", amp, "--device", "cuda"])
    step = Planner(args, (0, 0), 2.5).trace(4, "all")
    real, _ = memory.measure(args, (0, 0), 2.5, torch.device("cuda"))
    assert step.timeline.sum(1).max() == pytest.approx(real, rel=0.05)


def test_evaluation_is_part_of_the_plan():
    """Of a frozen encoder whose states are cached, the pass that fills the cache is the worst."""
    flags = [*LARGE, "--max_seconds", "12"]
    cached = planned(*flags, "--unfreeze", "none")
    assert cached.moment == "evaluation"
    assert cached.peak_bytes > step_of(*flags, "--unfreeze", "none").timeline.sum(1).max()


# ---------------------------------------------------------------- terms in closed form


@pytest.mark.parametrize(
    ("unfreeze", "trained"), [("none", 0), ("top:6", 75_582_608), ("all", 315_452_096)]
)
def test_parameters_and_states_have_their_closed_forms(unfreeze, trained):
    with torch.device("meta"):
        args = train.parse_args([*LARGE, "--unfreeze", unfreeze])
        model = train.build_model(args, 0, 0, load=False)
    total = sum(p.numel() for p in model.parameters())
    trained += total - 315_453_120  # and all around WavLM
    kinds = planned(*LARGE, "--unfreeze", unfreeze, "--max_seconds", "8").bytes
    slack = 512 * 1000  # rounding of a thousand small tensors
    assert kinds["parameters"] == pytest.approx(4 * total, abs=slack)
    assert kinds["optimizer"] == pytest.approx(8 * trained, abs=3 * slack)


def test_with_accumulation_and_under_ddp_gradients_are_there_while_activations_are():
    one = kinds_at_peak(step_of(*ALL))
    assert one["gradients"] < 0.1 * GIB
    for other in (
        step_of(*ALL, "--gradient_accumulation_steps", "2"),
        step_of(*ALL, world_size=2),
    ):
        assert kinds_at_peak(other)["gradients"] == pytest.approx(4 * 318.5e6, rel=0.01)


def test_accumulation_holds_the_inputs_of_all_micro_steps():
    two, six = (step_of(*ALL, "--gradient_accumulation_steps", n) for n in ("2", "6"))
    inputs = 8 * 8 * 16_000 * (4 + 1)  # samples and their mask
    more = kinds_at_peak(six)["activations"] - kinds_at_peak(two)["activations"]
    assert more == pytest.approx(4 * inputs, rel=0.001)


def test_autocast_keeps_a_half_copy_of_every_matrix_that_trains():
    step = step_of(*LARGE, "--unfreeze", "transformer", "--max_seconds", "8")
    kinds = kinds_at_peak(step)
    assert kinds["autocast copies"] == pytest.approx(2 * 311e6, rel=0.08)
    off = kinds_at_peak(
        step_of(*LARGE, "--unfreeze", "transformer", "--max_seconds", "8", "--no_amp")
    )
    assert off["autocast copies"] == 0
    assert off["activations"] > 1.4 * kinds["activations"]


def test_checkpointing_keeps_the_input_of_every_layer_and_one_layers_inside():
    flags = [*LARGE, "--unfreeze", "transformer", "--max_seconds", "8", "--gradient_checkpointing"]
    kept = {n: step_of(*flags, "--layers", n).timeline for n in ("12", "24")}
    column = KINDS.index("activations")
    more = kept["24"][:, column].max() - kept["12"][:, column].max()
    frames = 399
    assert more == pytest.approx(12 * 8 * frames * 1024 * 2, rel=0.05)  # half precision


def test_eager_attention_keeps_its_scores():
    plain = kinds_at_peak(step_of(*ALL))["activations"]
    eager = kinds_at_peak(step_of(*ALL, "--attention", "eager"))["activations"]
    scores = 24 * 8 * 16 * 399**2
    assert 5 * scores < eager - plain < 8 * scores


def test_an_optimizer_that_is_not_fused_needs_temporaries(monkeypatch):
    def foreach(model, args):
        return torch.optim.AdamW(train.param_groups(model, args), foreach=True)

    fused = step_of(*ALL)
    monkeypatch.setattr(train, "build_optimizer", foreach)
    other = step_of(*ALL)
    bytes_of = 4 * 318.5e6
    more = other.peaks()["optimizer"].sum() - fused.peaks()["optimizer"].sum()
    assert more == pytest.approx(bytes_of, rel=0.03)  # at its highest, one temporary of them all
    assert kinds_at_peak(other)["optimizer"] == pytest.approx(2 * bytes_of, rel=0.01)


def test_frame_features_and_cached_states_are_inputs_of_their_shape(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((10, 40), np.float32))
    flags = ["--encoder", "transformer", "--features_dir", str(tmp_path), "--d_model", "64"]
    args = train.parse_args([*flags, "--prosody", "none", "--batch_size", "4"])
    assert memory.widths(args) == (0, 40)
    assert tracing.meta_batch(args, (0, 40), 4, 2.0)["frames"].shape == (4, 100, 40)
    pooled = tracing.meta_batch(train.parse_args(TINY), (0, 0), 4, 2.0, (3, 128))["hidden"]
    assert pooled.shape == (4, 3, 128)
    frames = train.parse_args([*TINY, "--pooling", "attention"])
    assert tracing.meta_batch(frames, (0, 0), 4, 2.0, (3, 128))["hidden"].shape == (4, 100, 3, 128)


def test_the_plan_follows_a_layer_that_is_added_to_the_model(monkeypatch):
    flags = [*TINY, "--unfreeze", "all", "--device", "cpu"]
    before, work_before = planned(*flags), step_of(*flags).work["forward"][1]
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
    parameters = after.bytes["parameters"] - before.bytes["parameters"]
    assert parameters == pytest.approx(4 * added, abs=2048)
    states = after.bytes["optimizer"] - before.bytes["optimizer"]
    assert states == pytest.approx(8 * added, abs=4096)
    assert step_of(*flags).work["forward"][1] - work_before == 2 * 4 * (2 * 192 * 50_000)


# ---------------------------------------------------------------- the allocator


def test_a_segment_reuses_what_was_freed_and_grows_by_pages():
    segment = Segment(page=100)
    for number, size in ((1, 30), (2, 60), (3, 20)):
        segment.allocate(number, size)
    assert segment.reserved == 200  # 110 in pages of 100
    segment.free(1)
    segment.allocate(4, 25)  # fits where 1 was
    assert segment.taken[4] == (0, 25) and segment.reserved == 200
    segment.free(2)
    segment.allocate(5, 65)  # what 4 left over and the place of 2 are one block now
    assert segment.taken[5] == (25, 65) and segment.reserved == 200
    for number in (3, 4, 5):
        segment.free(number)
    assert segment.free_blocks == [(0, 200)]


def test_what_is_reserved_is_a_little_more_than_what_is_allocated():
    step = step_of(*ALL)
    peak = step.timeline.sum(1).max()
    assert peak <= step.reserved_bytes() < 1.05 * peak


# ---------------------------------------------------------------- plans


def test_a_blend_of_two_traces_is_the_trace_between_them():
    planner = planner_of(*TINY, "--unfreeze", "all", "--device", "cpu")
    low, between, high = (planner.trace(n, "all") for n in (4, 7, 16))
    mixed = blend(low, high, (7 - 4) / (16 - 4))
    assert np.abs(mixed.timeline - between.timeline).max() <= 1024


@pytest.mark.parametrize("unfreeze", ["all", "top:2"])
def test_the_curve_over_batch_sizes_agrees_with_plans_of_their_own(unfreeze):
    planner = planner_of(*TINY, "--device", "cpu", "--max_seconds", "8")
    for size, line in zip(memory.BATCHES, planner.curve(memory.BATCHES, unfreeze)):
        alone = planner.plan(size, unfreeze)
        assert line.peak_bytes == pytest.approx(alone.peak_bytes, rel=0.02), size


def test_a_progressive_schedule_is_planned_for_its_heaviest_stage():
    flags = [*TINY, "--device", "cpu"]
    heaviest = planned(*flags, "--unfreeze", "all").peak_bytes
    assert planned(*flags, "--unfreeze", "1:none,2:top:1,3:all").peak_bytes == heaviest
    assert planned(*flags, "--unfreeze", "none").peak_bytes < heaviest


def test_planning_leaves_the_random_state_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    planned(*TINY, "--device", "cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("seconds", "times"), [("5.7", 1.7), ("11", 2.2)])
def test_a_card_holds_more_than_with_eager_attention(seconds, times):
    """Ours; transformers' eager attention keeps still more (README)."""
    flags = [*LARGE, "--unfreeze", "transformer", "--amp", "fp16", "--max_seconds", seconds]
    planner = planner_of(*flags)

    def fitting(**flags):  # utterances in 24 GiB, from the line through two plans
        few, many = (
            planner.trace(n, "transformer", **flags).timeline.sum(1).max() for n in (4, 12)
        )
        return 4 + (0.9 * 24 * GIB - few) * 8 / (many - few)

    assert fitting() >= times * fitting(attention="eager")


def test_the_largest_batch_fits_and_the_next_does_not():
    planner = planner_of(*TINY, "--unfreeze", "all", "--device", "cuda", "--gpu_gib", "1.2")
    best = planner.largest(range(1, 513), "all")
    assert best.batch_size > 4 and best.verdict == "fits"
    more = int(1.02 * best.batch_size) + 1
    assert planner.plan(more, "all").verdict != "fits"
    assert planner.largest([512], "all") is None


# ---------------------------------------------------------------- --batch_size auto in train.py


def auto(tmp_path, *flags):
    return train.parse_args(
        [*TINY, "--unfreeze", "all", "--device", "cpu", "--batch_size", "auto", *flags]
    )


def test_auto_takes_what_plan_and_probe_agree_on_and_leaves_the_model_as_it_was(tmp_path):
    args = auto(tmp_path, "--global_batch_size", "12")
    args.amp = "off"
    model = train.build_model(args, 0, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size, said = memory.auto_batch(model, args, (0, 0), 2.5, torch.device("cpu"), 1, 100)
    assert size == 12 and "probed" in said
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())
    train.split_batch(args, size, 1)
    assert (args.batch_size, args.gradient_accumulation_steps) == (12, 1)


def test_auto_goes_down_to_a_divisor_while_the_probe_runs_out_of_memory(tmp_path, monkeypatch):
    args = auto(tmp_path, "--global_batch_size", "12")
    args.amp = "off"
    model = train.build_model(args, 0, 0)
    step = train.train_step

    def short_of_memory(model, ddp_model, batches, *rest, **kwargs):
        labels = batches[0]["labels"]
        if labels.device.type == "cpu" and len(labels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(model, ddp_model, batches, *rest, **kwargs)

    monkeypatch.setattr(train, "train_step", short_of_memory)
    size, _ = memory.auto_batch(model, args, (0, 0), 2.5, torch.device("cpu"), 1, 100)
    assert size == 4
    proposed = Planner(args, (0, 0), 2.5).plan(12, "all")
    monkeypatch.setattr(memory, "largest_batch", lambda *_: proposed)
    monkeypatch.setattr(train, "train_step", lambda *_: torch.empty(10**15))
    with pytest.raises(ValueError, match="nothing fits"):
        memory.auto_batch(model, args, (0, 0), 2.5, torch.device("cpu"), 1, 100)


def test_auto_that_finds_no_room_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "capacity_gib", lambda args: 0.01)
    args = auto(tmp_path)
    with pytest.raises(ValueError, match="--gradient_checkpointing"):
        memory.largest_batch(args, (0, 0), 2.5)


# ---------------------------------------------------------------- seconds


def test_flops_are_those_of_the_closed_form():
    """FACTS: 102 GFLOP per second of audio in training with the CNN frozen, 37 forward."""
    flags = [*LARGE, "--unfreeze", "transformer", "--max_seconds", "10", "--no_amp"]
    planner = planner_of(*flags)
    step = sum(planner.trace(8, "transformer").work.values())
    assert step[:2].sum() / (8 * 10) == pytest.approx(102e9, rel=0.06)
    forward = planner.evaluation("transformer").work["evaluation"]
    assert forward[:2].sum() / 60 == pytest.approx(37e9, rel=0.06)


def test_a_step_of_other_lengths_is_found_from_two(monkeypatch):
    planner = planner_of(*ALL)
    clips = timing.clips(planner.args, from_data=False)
    clock = timing.Clock(planner, timing.Machine("m", 50.0, 25.0, 800.0, 0.0, ""), clips)
    found = clock.micro_steps("all", np.array([4]), np.array([5.0]))
    work = planner.trace(4, "all", 5.0).work
    traced = clock.machine.seconds(work["forward"] + work["backward"])
    assert found == pytest.approx(float(traced), rel=0.03)


def test_hours_follow_from_epochs_stages_and_cards():
    planner = planner_of(*TINY, "--device", "cuda", "--epochs", "6")
    clips = timing.clips(planner.args, from_data=False)
    assert len(clips.splits["train"]) == 6409 and clips.seconds.max() == planner.args.max_seconds
    clock = timing.Clock(planner, timing.machine(planner.args, "a100"), clips)
    rows = {row["unfreeze"]: row for row in memory.costs(clock, 8, 1, gpus=2)}
    frozen, top, whole, progressive = rows.values()
    assert frozen["fold_hours"] < top["fold_hours"] < whole["fold_hours"]
    assert frozen["fold_hours"] < progressive["fold_hours"] < whole["fold_hours"]
    assert whole["series_hours"] == pytest.approx(5 * whole["fold_hours"])
    assert whole["parallel_hours"] == pytest.approx(3 * whole["fold_hours"])
    two = timing.Clock(planner_of(*TINY, world_size=2), clock.machine, clips)
    assert two.epoch("all", 4, 1) < 0.7 * clock.epoch("all", 4, 1)
    dev = two.forward("all", clips.seconds[clips.splits["dev"]])
    seconds, fold = two.fold("all", 4, 1)
    assert fold == pytest.approx(two.planner.args.epochs * (seconds + dev / 2))  # ranks share it
    (row, *_) = memory.costs(two, 4, 1, gpus=5)
    assert row["parallel_hours"] == pytest.approx(3 * row["fold_hours"])  # two folds at a time


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA RTX A6000", "a6000"),
        ("Tesla T4", "t4"),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx2080ti"),
    ],
)
def test_a_card_is_known_by_its_whole_name(name, gpu):
    assert timing.known_gpu(name) == gpu


def test_a_card_to_plan_for_counts_more_than_the_card_that_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 140 * GIB))
    plan = ["--wavlm", "tiny", "--device", "cuda"]
    assert memory.capacity_gib(train.parse_args(plan)) == 140
    assert memory.capacity_gib(memory.parse_args([*plan, "--gpu", "rtx3090"])[0]) == 24
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.capacity_gib(train.parse_args(plan)) == memory.GPU_GIB


@pytest.mark.parametrize("context", [3, 5, 64, 100])
def test_any_length_of_chunks_is_planned(context):
    flags = ["--encoder", "baseline", "--base_channels", "8", "--prosody", "none"]
    flags += ["--context", str(context), "--batch_size", str(context), "--max_seconds", "1"]
    args, own = memory.parse_args(flags)
    found = memory.answers(Planner(args, (0, 0), 1.0), own)
    assert len(found["sizes"]) > 1 and all(size % context == 0 for size in found["sizes"])
    assert all(largest % context == 0 for largest in found["largest"].values())


@pytest.mark.slow
def test_calibration_is_remembered_and_predicts_a_step_it_has_not_seen(tmp_path):
    args = train.parse_args([*TINY, "--device", "cpu", "--cache_dir", str(tmp_path)])
    timing.calibrate(args)
    machine = timing.machine(args)
    assert machine.source.startswith("calibrated")
    flags = {"wavlm": "base", "layers": [4], "unfreeze": "transformer", "amp": "off"}
    other = argparse.Namespace(**vars(args) | flags)
    model = train.build_model(other, 0, 0)
    run, _ = tracing.real_step(model, other, (0, 0), 4.0, "transformer", torch.device("cpu"))
    real = timing.median_seconds(run, False, 3)
    work = tracing.trace(other, (0, 0), 4, 4.0, "transformer").work
    assert float(machine.seconds(sum(work.values()))) == pytest.approx(real, rel=0.6)


# ---------------------------------------------------------------- command line


def test_the_command_line_prints_all_of_it_and_a_picture(tmp_path):
    flags = [*TINY, "--unfreeze", "all", "--plot", str(tmp_path / "m.png")]
    command = [sys.executable, str(ROOT / "memory.py"), *flags]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    for words in ("peak", "largest", "one switch", "h per fold", "estimate"):
        assert words in found.stdout
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


def test_answers_add_up_and_ways_to_a_global_batch_are_sorted_by_time():
    flags = [*TINY, "--unfreeze", "all", "--global_batch_size", "16", "--world_size", "2", "--json"]
    args, own = memory.parse_args(flags)
    found = json.loads(json.dumps(memory.answers(Planner(args, (0, 0), 2.5, 2), own)))
    assert found["plan"]["peak_bytes"] == sum(found["plan"]["bytes"].values())
    peaks = [row["peak_gib"] for row in found["table"]["all"]]
    assert peaks == sorted(peaks) and found["largest"]["all"] > 64
    assert found["switches"]["--attention eager"]["time"] > 1
    ways = found["ways"]
    assert {2 * w["batch_size"] * w["gradient_accumulation_steps"] for w in ways} == {16}
    seconds = [way["epoch_seconds"] for way in ways]
    assert seconds == sorted(seconds) and len(seconds) == 8
    assert "ways to 16 per step" in memory.text(found)
    for way in ways:  # accumulated or not
        flags = {"gradient_checkpointing": way["gradient_checkpointing"]}
        flags |= {"gradient_accumulation_steps": way["gradient_accumulation_steps"]}
        planned = Planner(args, (0, 0), 2.5, 2).plan(way["batch_size"], "all", **flags)
        assert way["needed_gib"] == planned.needed_gib


def test_batch_size_auto_is_answered_with_the_cards_memory():
    args, _ = memory.parse_args(
        [*TINY, "--batch_size", "auto", "--gpu_gib", "2", "--unfreeze", "all"]
    )
    assert 64 < args.batch_size < 1024
    best = Planner(args, (0, 0), 2.5).plan(args.batch_size, "all")
    assert 0.95 * FITS < best.needed_gib / 2 < FITS


def test_a_flag_counts_as_given_with_an_equals_sign_too():
    args, own = memory.parse_args([*TINY, "--gpu", "t4"])
    assert args.gpu_gib == memory.GPUS["t4"][0] and not own.from_data and not own.wants_global
    flags = [*TINY, "--gpu", "t4", "--gpu_gib=12", "--data=demo", "--global_batch_size=16"]
    args, own = memory.parse_args(flags)
    assert args.gpu_gib == 12 and own.from_data and own.wants_global


@pytest.fixture
def refused(capsys):
    """refused(*flags): what is on stderr when the command ends with code 2."""

    def run(*flags):
        try:
            code = memory.main([*TINY, *flags])
        except SystemExit as end:  # argparse's
            code = end.code
        assert code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--wavlm", "/nowhere"], "--wavlm"),
        (["--batch_size", "0"], "--batch_size"),
        (["--batch_size", "many"], "--batch_size many"),
        (["--gpu", "riva128"], "riva128"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "2", "--world_size", "4"], "--gpus 2"),
        (["--gpu", "t4", "--device", "cpu"], "--gpu"),
        (["--layers", "99"], "--layers"),
        (["--batch_size", "auto", "--unfreeze", "all", "--gpu_gib", "0.1"], "--batch_size auto"),
        (["--data", "nowhere.csv"], "--data nowhere.csv"),
        (["--nonsense", "1"], "--nonsense"),
        (["--plot", "/nowhere/m.png"], "/nowhere/m.png"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(flags, said, refused):
    wrong = refused(*flags)
    assert said in wrong and len(wrong.strip().splitlines()) <= 3


def test_a_checkpoint_directory_that_cannot_be_read_is_named(tmp_path, refused):
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in refused("--wavlm", str(tmp_path))


def test_a_hub_checkpoint_is_planned_without_network():
    args, _ = memory.parse_args(["--unfreeze", "all"])
    assert args.wavlm == "large"  # of microsoft/wavlm-large, train.py's default
