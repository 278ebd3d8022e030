"""memory.py and util/tracing.py: planned bytes against real steps and closed forms; the search
behind --batch_size auto; hours; the command line."""

import json

import numpy as np
import pytest
import torch
from bench_memory import measured_bytes
from torch.utils.checkpoint import checkpoint

import data
import flags
import memory
import step
import train
from data import InputShape
from memory import FITS, Planner
from model import AUTOCAST, ENCODERS
from util import distributed, tracing, trials
from util.distributed import GIB
from util.files import UserError
from util.runs import read_records
from util.tracing import KINDS

CPU = torch.device("cpu")
TINY = ["--wavlm", "tiny", "--prosody", "none", "--batch_size", "4", "--max_seconds", "2.5"]
LARGE = ["--wavlm", "large", "--prosody", "none", "--device", "cuda", "--batch_size", "8"]
ALL = [*LARGE, "--unfreeze", "all", "--max_seconds", "8"]


def planner_of(*words, world_size=1):
    args = flags.parse_args(list(words), world_size)
    return Planner(args, memory.shape_of(args), world_size)


def step_of(*words, world_size=1):
    """The trace of a step, without evaluation."""
    planner = planner_of(*words, world_size=world_size)
    return planner.trace(planner.args, planner.args.unfreeze)


def planned(*words):
    planner = planner_of(*words)
    return planner.plan(planner.args)


def kinds_at_peak(trace):
    alive = trace.timeline
    return dict(zip(KINDS, alive[alive.sum(1).argmax()].tolist()))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A directory of frame features of width 40."""
    directory = tmp_path_factory.mktemp("features")
    np.save(directory / "a.npy", np.zeros((10, 40), np.float32))
    return str(directory)


# ---------------------------------------------------------------- against real steps


@pytest.mark.parametrize(
    "words",
    [
        ["--unfreeze", "none"],
        ["--unfreeze", "top:2"],
        ["--unfreeze", "transformer", "--attention", "sdpa"],
        ["--unfreeze", "all"],
        ["--unfreeze", "all", "--attention", "eager"],
        ["--unfreeze", "all", "--gradient_checkpointing"],
        ["--unfreeze", "all", "--gradient_accumulation_steps", "3"],
        ["--unfreeze", "all", "--pooling", "attention", "--layers", "1", "2"],
        ["--unfreeze", "all", "--context", "2", "--feedback"],
        ["--lora", "8", "--gradient_checkpointing"],
        ["--encoder", "convnext", "--base_channels", "16", "--pooling", "stats"],
        ["--encoder", "baseline", "--base_channels", "16"],
        ["--encoder", "transformer", "--d_model", "128", "--features_dir"],
        ["--encoder", "lightweight_transformer", "--d_model", "256", "--features_dir"],
    ],
    ids=" ".join,
)
def test_the_planned_peak_is_the_profilers_account_of_a_real_step(words, features):
    if words[-1] == "--features_dir":
        words = [*words, features]
    planner = planner_of(*TINY, "--device", "cpu", "--amp", "off", *words)
    real = measured_bytes(planner.args, planner.shape, CPU)
    trace = planner.trace(planner.args, planner.args.unfreeze)
    assert trace.peak_bytes == pytest.approx(real, rel=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_the_planned_peak_is_what_cuda_allocates(amp):
    planner = planner_of(*TINY, "--unfreeze", "all", "--amp", amp, "--device", "cuda")
    real = measured_bytes(planner.args, planner.shape, torch.device("cuda"))
    assert planner.trace(planner.args, "all").peak_bytes == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    ("words", "mib"),  # torch.cuda.max_memory_allocated, torch 2.11.0+cu130, 2026-11-28
    [
        ("--unfreeze top:2", 1764.6),
        ("--unfreeze all --attention sdpa", 7450.5),
        ("--unfreeze all --gradient_checkpointing", 6155.1),
        ("--unfreeze all --gradient_accumulation_steps 3", 8163.1),
        ("--lora 8", 3256.4),
    ],
)
def test_the_plan_is_what_an_h100_allocated(words, mib):
    planner = planner_of(*LARGE, "--amp", "fp16", "--max_seconds", "5.7", *words.split())
    planner.args.gpu = "h100"
    peak = planner.trace(planner.args, planner.args.unfreeze).peak_bytes
    assert peak / 2**20 == pytest.approx(mib, rel=0.005)


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_is_planned_in_half_precision_and_takes_less(encoder, amp, features):
    words = ["--device", "cuda", "--encoder", encoder, "--unfreeze", "all", "--batch_size", "32"]
    if "transformer" in encoder:
        words += ["--features_dir", features]
    half, single = (step_of(*TINY, *words, "--amp", way) for way in (amp, "off"))
    assert half.peak_bytes < single.peak_bytes
    assert half.flops.sum(0)[0] > 0.9 * half.flops.sum() and single.flops.sum(0)[0] == 0


def test_feature_frames_are_planned_at_their_own_rate_and_length(features):
    words = ["--encoder", "transformer", "--d_model", "128", "--features_dir", features]
    args = flags.parse_args([*TINY, *words, "--device", "cuda"], 1)
    slow, fast = InputShape(0, 40, 100, 10.0), InputShape(0, 40, 1000, 100.0)  # both 10 s
    batch = memory.make_batch(Planner(args, fast).model, args, fast, 4, cached=False)
    assert batch["frames"].shape == (4, 1000, 40) and batch["frame_mask"].shape == (4, 1000)
    bytes_of = [Planner(args, s).trace(args, "none").peaks()["forward"] for s in (slow, fast)]
    column = KINDS.index("activations")
    assert bytes_of[1][column] == pytest.approx(10 * bytes_of[0][column], rel=0.1)
    assert memory.evaluation_size(fast) == memory.evaluation_size(slow) == 6


# ---------------------------------------------------------------- tracing any torch model


@pytest.mark.parametrize(
    ("dims", "takes"), [((0, 1), True), ((-3, -2), True), (None, False), ((), False), (2, False)]
)
def test_a_sum_over_many_rows_takes_room_for_partial_sums_however_it_is_written(dims, takes):
    x = torch.empty(64, 300, 1024, dtype=torch.float16, device="meta")
    model = torch.nn.Linear(1, 1, device="meta")
    step = tracing.trace(model, None, lambda _: x.sum(dims, keepdim=True), [x], on_gpu=True)
    assert (step.peak_bytes - x.nbytes > 10 * 2**20) is takes


class Layers(torch.nn.Module):
    """Linear layers, each run again in backward."""

    def __init__(self, count, width, recompute):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
            )
            for _ in range(count)
        )
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_plain_model_is_traced_to_its_closed_form(recompute, amp):
    count, width, rows = 4, 64, 1024
    with torch.device("meta"):
        model, x = Layers(count, width, recompute), torch.empty(rows, width)
    optimizer = torch.optim.AdamW(model.parameters())

    def run(optimizer):
        with step.autocast(torch.device("meta"), amp):
            y = model(x)
        y.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = tracing.trace(model, optimizer, run, [x], on_gpu=True)
    numbers = sum(p.numel() for p in model.parameters())
    peak = found.peaks()
    slack = 512 * 3 * 4 * count
    assert peak["optimizer"][KINDS.index("gradients")] == pytest.approx(4 * numbers, abs=slack)
    assert peak["forward"][KINDS.index("optimizer")] == pytest.approx(8 * numbers, abs=slack)
    layers = count + 5 if recompute else 5 * count  # an input is 1, what is inside a layer 4
    kept = rows * width * layers * AUTOCAST[amp].itemsize
    activations = peak["forward"][KINDS.index("activations")]
    assert activations == pytest.approx(kept, rel=0.3)
    assert found.flops[:, 0 if amp == "fp16" else 1].sum() == found.flops.sum()
    product = 2 * rows * 4 * width * width
    again = count if recompute else 0  # the first of two: the second keeps only its input
    backward = 4 * count + again - 1  # the input needs no gradient
    assert found.flops[0].sum() == 2 * count * product
    assert found.flops[1].sum() == backward * product


def test_a_layer_added_to_the_model_is_planned_and_the_random_state_is_left_alone():
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    plans = []
    for extra in (False, True):
        planner = planner_of(*TINY, "--unfreeze", "all", "--device", "cpu")
        heads = planner.model.heads
        if extra:
            with torch.device("meta"):
                heads["valence"] = torch.nn.Sequential(
                    torch.nn.Linear(192, 50_000), torch.nn.Linear(50_000, 192), heads["valence"]
                )
        flops = planner.trace(planner.args, "all").flops[0, 1]
        plans.append((planner.plan(planner.args).bytes, flops))
    assert torch.equal(random_state, torch.get_rng_state())
    (before, flops), (after, more_flops) = plans
    added = 192 * 50_000 * 2 + 50_000 + 192
    for kind, size in (("parameters", 4), ("optimizer", 8)):
        assert after[kind] - before[kind] == pytest.approx(size * added, abs=4096)
    assert more_flops - flops == 2 * 4 * (2 * 192 * 50_000)


# ---------------------------------------------------------------- terms in closed form


@pytest.mark.parametrize(
    ("unfreeze", "trained"), [("none", 0), ("top:6", 75_582_608), ("all", 315_452_096)]
)
def test_parameters_and_states_have_their_closed_forms(unfreeze, trained):
    planner = planner_of(*LARGE, "--unfreeze", unfreeze, "--max_seconds", "8")
    total = sum(p.numel() for p in planner.model.parameters())
    trained += total - 315_453_120  # and all around WavLM
    kinds = planner.plan(planner.args).bytes
    slack = 512 * 1000  # rounding of a thousand small tensors
    assert kinds["parameters"] == pytest.approx(4 * total, abs=slack)
    assert kinds["optimizer"] == pytest.approx(8 * trained, abs=3 * slack)


def test_gradients_are_there_beside_activations_with_accumulation_and_ranks():
    assert kinds_at_peak(step_of(*ALL))["gradients"] < 0.1 * GIB
    for other in (step_of(*ALL, "--gradient_accumulation_steps", "2"), step_of(*ALL, world_size=2)):
        assert kinds_at_peak(other)["gradients"] == pytest.approx(4 * 318.5e6, rel=0.01)


def test_autocast_keeps_half_copies_of_matrices_and_checkpointing_the_inputs_of_layers():
    words = [*LARGE, "--unfreeze", "transformer", "--max_seconds", "8"]
    kinds, off = (kinds_at_peak(step_of(*words, "--amp", amp)) for amp in ("fp16", "off"))
    assert kinds["autocast copies"] == pytest.approx(2 * 311e6, rel=0.08)
    assert off["autocast copies"] == 0 and off["activations"] > 1.4 * kinds["activations"]
    words, column = [*words, "--gradient_checkpointing", "--layers"], KINDS.index("activations")
    few, many = (step_of(*words, layer).timeline[:, column].max() for layer in ("12", "24"))
    assert many - few == pytest.approx(12 * 8 * 399 * 1024 * 2, rel=0.05)  # in half precision
    trace, column = step_of(*words, "24"), KINDS.index("autocast copies")
    in_backward = trace.timeline[trace.phases == 1, column].max()
    assert 0 < in_backward < 2 * 12.6e6 * 2  # of the one or two layers that are computed again


def test_the_hidden_states_of_a_frozen_encoder_are_planned_at_their_pooled_size():
    """Then the pass that fills the cache, in evaluation's batches, is the worst moment."""
    words = [*LARGE, "--max_seconds", "12", "--unfreeze", "none"]
    cached = planned(*words)
    assert cached.moment == "evaluation"
    assert cached.peak_gib > step_of(*words).peak_bytes / GIB
    attentive = step_of(*words, "--pooling", "attention")
    assert attentive.peak_bytes > step_of(*words).peak_bytes + 8 * 599 * 4 * 1024 * 2


def test_flops_are_those_of_the_closed_form():
    """102 GFLOP per second of audio in training with the CNN frozen, 37 forward."""
    words = [*LARGE, "--unfreeze", "transformer", "--max_seconds", "10", "--no_amp"]
    planner = planner_of(*words)
    found = planner.trace(planner.args, "transformer").flops.sum()
    assert found / (8 * 10) == pytest.approx(102e9, rel=0.06)
    forward = planner.trace(planner.args, "transformer", "evaluation").flops.sum()
    assert forward / 60 == pytest.approx(37e9, rel=0.06)


# ---------------------------------------------------------------- plans


def test_a_schedule_is_planned_for_its_heaviest_stage():
    words = [*TINY, "--device", "cpu", "--unfreeze"]
    heaviest = planned(*words, "all").peak_gib
    assert planned(*words, "1:none,2:top:1,3:all").peak_gib == heaviest
    assert planned(*words, "none").peak_gib < heaviest


@pytest.mark.parametrize("unfreeze", ["all", "top:2"])
def test_the_line_over_batch_sizes_agrees_with_traces(unfreeze):
    planner = planner_of(*TINY, "--device", "cuda", "--max_seconds", "8", "--unfreeze", unfreeze)
    line = planner.line(unfreeze)
    for size in (1, 8, 16, 32, 128):
        alone = planner.plan(memory.with_batch(planner.args, size, 1))
        assert line(size).peak_gib == pytest.approx(alone.peak_gib, rel=0.03), size


def auto(*words):
    flags_of_all = [*TINY, "--max_seconds", "0.5", "--unfreeze", "all", "--device", "cpu"]
    return flags.parse_args([*flags_of_all, "--batch_size", "auto", *words], 1)


def test_the_largest_batch_fits_and_a_larger_one_does_not():
    args = auto("--device", "cuda", "--gpu_gib", "1.2", "--max_seconds", "2.5")
    shape = memory.shape_of(args)
    best = memory.largest_batch(args, shape, 1)
    assert best.batch_size > 4 and best.verdict == "fits"
    more = memory.with_batch(args, int(1.05 * best.batch_size) + 1, 1)
    assert Planner(args, shape).plan(more).verdict != "fits"


def tried(args, largest=100):
    """auto_batch on a model of its own: (size, what it said, the model)."""
    shape = memory.shape_of(args)
    model = step.build_model(args, shape)
    return *trials.auto_batch(model, args, shape, distributed.find_ranks("cpu"), largest), model


def test_auto_takes_what_plan_and_probe_agree_on_and_leaves_the_model_as_it_was():
    torch.manual_seed(3)
    before = step.build_model(auto(), InputShape(0, 0, 40_000, 16_000)).state_dict()
    torch.manual_seed(3)
    size, said, model = tried(auto("--global_batch_size", "12"))
    assert size == 12 and "planned as 12 and probed at" in said
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_auto_works_with_rates_and_accumulation_that_follow_the_batch():
    for words in ([], ["--gradient_accumulation_steps", "2"]):
        assert tried(auto("--lr_reference_batch", "32", *words), largest=6)[0] == 6
    args, _ = memory.parse_args([*TINY, "--preset", "large_batch", "--batch_size", "auto"])
    assert args.batch_size == "auto" and args.lr_reference_batch == 32
    assert memory.largest_batch(args, memory.shape_of(args), 1).batch_size > 8


class LittleMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """Losses of more than `most` utterances find no memory on a real device."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_prediction = func is torch.ops.aten.sigmoid.default and out.shape[-1] == 1
        if is_prediction and not out.is_meta and len(out) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out


def test_auto_goes_down_to_a_divisor_and_says_what_to_do_if_there_is_no_room():
    with LittleMemory(4):
        assert tried(auto("--global_batch_size", "12"))[0] == 4
    with LittleMemory(0), pytest.raises(UserError, match="nothing fits"):
        tried(auto("--global_batch_size", "12"))
    args = auto("--device", "cuda", "--gpu_gib", "0.1")
    with pytest.raises(UserError, match="--gradient_checkpointing"):
        memory.largest_batch(args, memory.shape_of(args), 1)


# ---------------------------------------------------------------- hours and cards


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
def test_a_card_is_known_by_its_full_name(name, gpu):
    assert memory.known_gpu(name) == gpu


@pytest.fixture
def answer(capsys):
    """answer(*words): what the command prints as JSON."""

    def run(*words):
        assert memory.main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_hours_are_a_range_that_follows_from_epochs_stages_and_cards(answer):
    words = [*TINY, "--epochs", "6", "--gpu", "a100"]
    schedules = ("none", "top:4", "all", "1:none,3:top:4,5:all")
    found = {what: answer(*words, "--gpus", "2", "--unfreeze", what)["hours"] for what in schedules}
    frozen, top, everything, progressive = (np.array(row["fold"]) for row in found.values())
    assert (frozen < top).all() and (top < everything).all() and (progressive < everything).all()
    assert everything[1] == pytest.approx(5 * everything[0])  # 50 % and 10 % of the peak
    assert found["all"]["all_folds"][0] == pytest.approx(3 * everything[0])  # 5 folds on 2 cards
    two = answer(*words, "--world_size", "2", "--unfreeze", "all")["hours"]
    assert two["fold"][0] == pytest.approx(everything[0] / 2, rel=0.01)
    assert two["all_folds"][0] == pytest.approx(5 * two["fold"][0])


def test_a_finished_run_with_the_same_settings_gives_one_number(answer, tmp_path):
    """Other runs do not, nor one whose args.json is missing or damaged."""
    words = [*TINY, "--device", "cpu", "--out", str(tmp_path), "--epochs", "2"]
    result = {"device": distributed.device_name(CPU), "audio_seconds_per_second": 100.0}
    for name, args in (("a", None), ("b", "{"), ("c", json.dumps(answer(*words)["flags"]))):
        run = tmp_path / name / "fold1"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(result))
        hours = answer(*words)["hours"]
        assert hours["source"] != "a finished run here" and len(set(hours["fold"])) == 2
        if args:
            (run / "args.json").write_text(args)
    hours = answer(*words)["hours"]
    assert hours["source"] == "a finished run here" and len(set(hours["fold"])) == 1
    other = answer(*words, "--attention", "eager")["hours"]
    assert other["source"] != hours["source"]


@pytest.mark.slow
def test_calibration_is_remembered(tmp_path, capsys):
    words = [*TINY, "--device", "cpu", "--cache_dir", str(tmp_path)]
    assert memory.main([*words, "--calibrate"]) == 0
    assert "TFLOPS" in capsys.readouterr().out
    assert memory.machine(memory.parse_args(words)[0]).source.startswith("calibrated")


# ---------------------------------------------------------------- command line


def test_the_command_prints_a_plan_and_a_table_whose_rows_have_no_updates_of_other_rows(capsys):
    rows = []
    for more in (["--unfreeze", "all"], ["--lora", "128"]):
        assert memory.main([*TINY, *more, "--batch_size", "64"]) == 0
        said = capsys.readouterr().out
        for words in ("card must have", "largest", "1:none,7:top:4,13:all", "10% to 50%"):
            assert words in said
        rows.append([line for line in said.splitlines() if line.startswith(("all ", "top:4 "))])
    assert len(rows[0]) == 2 and rows[0] == rows[1]


def test_json_holds_the_plan_and_the_hours_of_this_setting(answer):
    words = [*TINY, "--unfreeze", "all", "--global_batch_size", "16", "--world_size", "2"]
    found = answer(*words)
    assert found.keys() == {"flags", "plan", "hours"}
    assert found["plan"]["peak_gib"] == sum(found["plan"]["bytes"].values()) / GIB
    words = ["--batch_size", "auto", "--gpu_gib", "2", "--unfreeze", "all"]
    found = answer(*TINY, *words)["plan"]
    assert 64 < found["batch_size"] < 1024
    assert 0.93 * FITS < found["needed_gib"] / 2 < FITS


@pytest.mark.parametrize("context", [3, 100])
def test_any_length_of_chunks_is_planned(context, capsys):
    words = ["--encoder", "baseline", "--base_channels", "8", "--prosody", "none", "--context"]
    words += [str(context), "--batch_size", str(context), "--max_seconds", "1"]
    assert memory.main(words) == 0
    table = capsys.readouterr().out.split("GiB at batch size")[1].splitlines()
    sizes, largest = table[0].split()[:6], table[1].split()[7]
    assert [int(size) for size in sizes] == [context * n for n in (1, 4, 8, 16, 32, 64)]
    assert int(largest) > 0 and int(largest) % context == 0


def test_a_card_gives_its_memory_unless_it_was_given_and_hub_names_need_no_network():
    args, own = memory.parse_args(["--unfreeze", "all", "--gpu", "t4"])
    assert args.gpu_gib == memory.GPUS["t4"][0] and not own.from_data
    assert args.wavlm == "large"  # of microsoft/wavlm-large, train.py's default
    args, own = memory.parse_args([*TINY, "--gpu", "t4", "--gpu_gib=12", "--data=demo"])
    assert args.gpu_gib == 12 and own.from_data


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "0"], "--batch_size"),
        (["--gpu", "riva128"], "riva128"),
        (["--gpus", "2", "--world_size", "4"], "--gpus 2"),
        (["--gpu", "t4", "--device", "cpu"], "--gpu"),
        (["--batch_size", "auto", "--unfreeze", "all", "--gpu_gib", "0.1"], "--batch_size auto"),
        (["--encoder", "transformer", "--features_dir", "/nowhere"], "--features_dir"),
        (["--data", "nowhere.csv"], "--data nowhere.csv"),
        (["--nonsense", "1"], "--nonsense"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(words, said, capsys):
    try:
        code = memory.main([*TINY, *words])
    except SystemExit as end:  # argparse's
        code = end.code
    wrong = capsys.readouterr().err
    assert code == 2 and said in wrong and len(wrong.strip().splitlines()) <= 3


# ---------------------------------------------------------------- the plan of a run


def test_a_run_tells_its_operations_per_second_of_audio(finished):
    flags, directory = finished
    result = json.loads((directory / "result.json").read_text())
    args = train.parse_args(flags)
    (gflop,) = result["gflop_per_audio_second"].values()
    planner = Planner(args, data.load_fold(args).shape)
    seconds = args.batch_size * planner.shape.length / data.SAMPLE_RATE
    assert gflop == pytest.approx(planner.trace(args, "all").flops.sum() / seconds / 1e9)
    steps = [r for r in read_records(directory) if "tflops" in r]
    for record in steps:
        speed = record["audio_seconds_per_second"]
        assert record["tflops"] == pytest.approx(gflop * speed / 1000)
    assert result["tflops"] == pytest.approx(np.median([r["tflops"] for r in steps]))
    assert result["peak_share"] is None  # of a CPU


@pytest.mark.parametrize("amp", ["fp16", "off"])
def test_the_share_of_a_known_card_is_that_of_its_published_peak(amp, monkeypatch):
    found = planned(*ALL, "--amp", amp)
    ranks = distributed.Ranks(0, 0, 2, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4090")
    speeds = memory.achieved(found, "all", 100.0, ranks)
    half, single = (x * 100 / 1e12 for x in found.flops["all"])
    assert speeds["tflops"] == pytest.approx(half + single)
    assert speeds["peak_share"] == pytest.approx((half / 165 + single / 82.6) / 2)
    assert (half > single) == (amp == "fp16")
