"""train.py: equal updates however a batch is split, resume bit for bit, errors, every encoder."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data as vadata
import train
from data import BatchSpec
from model import moment_sums
from train import (
    build_model,
    build_optimizer,
    evaluate,
    load_data,
    lr_at,
    main,
    param_groups,
    parse_args,
    parse_unfreeze,
    run,
    set_trainable,
    train_step,
    unfreeze_at,
)
from util.files import UserError
from util.runs import read_checkpoint, run_dir

ROOT = Path(__file__).parent.parent
NO_DROPOUT = ("--dropout", "0", "--wavlm_dropout", "0")


def weights_of(args, file="last.pt"):
    return read_checkpoint(run_dir(args) / file)["model"]


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            torch.testing.assert_close(one[name], other[name], msg=name, **tolerance)
        else:
            assert torch.equal(one[name], other[name]), name


def records(args, event):
    lines = (run_dir(args) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def step_on(args, model, batches, steps=1):
    """`steps` updates on the same micro-batches, from a copy of the model."""
    model = copy.deepcopy(model)
    optimizer = build_optimizer(model, args)
    set_trainable(model, args.unfreeze)
    model.train()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    args.amp = args.amp or "off"
    for step in range(steps):
        train_step(model, model, batches, optimizer, scaler, args, step)
    return model.state_dict()


def prepared(flags, *more):
    args = parse_args([*flags, *more])
    _, splits, dataset, _ = load_data(args)
    torch.manual_seed(args.seed)
    return args, splits, dataset, build_model(args, 0, 0)


# --- contract 1: the same global batch gives the same update


@pytest.mark.parametrize("loss", ["ccc", "mse"])
def test_four_micro_batches_give_the_update_of_one_batch(flags, loss):
    args, splits, dataset, model = prepared(flags, "--loss", loss, *NO_DROPOUT)
    rows = splits["train"][:16].tolist()
    whole = [dataset[BatchSpec(tuple((row,) for row in rows), 0)]]
    parts = [dataset[BatchSpec(tuple((r,) for r in rows[i::4]), 0)] for i in range(4)]
    one, four = (step_on(args, model, batches, steps=5) for batches in (whole, parts))
    assert_same(one, four, rtol=1e-3, atol=2e-5)
    start = model.state_dict()
    moved = max((one[k].double() - start[k].double()).abs().max() for k in one)
    assert moved > 1e-3  # five steps did go somewhere


def test_under_autocast_the_split_matters_no_more_than_its_rounding(flags):
    args, splits, dataset, model = prepared(flags, *NO_DROPOUT)
    rows = splits["train"][:16].tolist()
    whole = [dataset[BatchSpec(tuple((row,) for row in rows), 0)]]
    parts = [dataset[BatchSpec(tuple((r,) for r in rows[i::4]), 0)] for i in range(4)]
    exact = step_on(args, model, whole, steps=5)
    half = parse_args([*flags, *NO_DROPOUT, "--amp", "bf16"])
    one, four = (step_on(half, model, batches, steps=5) for batches in (whole, parts))

    def distance(a, b):
        return sum((a[k].double() - b[k].double()).square().sum() for k in a) ** 0.5

    assert 0 < distance(one, four) < 1.5 * distance(one, exact)
    assert distance(one, four) < 0.3 * distance(one, model.state_dict())


def test_averaging_micro_batch_cccs_is_another_update(flags):
    args, splits, dataset, model = prepared(flags, "--exact_ccc", "off", *NO_DROPOUT)
    rows = splits["train"][:16].tolist()
    whole = [dataset[BatchSpec(tuple((row,) for row in rows), 0)]]
    parts = [dataset[BatchSpec(tuple((r,) for r in rows[i::4]), 0)] for i in range(4)]
    one, four = (step_on(args, model, batches) for batches in (whole, parts))
    assert max((one[k].double() - four[k].double()).abs().max() for k in one) > 1e-4


def test_the_second_forward_of_exact_ccc_draws_the_dropout_of_the_first(flags, monkeypatch):
    args, splits, dataset, model = prepared(flags)
    rows = splits["train"][:12].tolist()
    batches = [dataset[BatchSpec(tuple((r,) for r in rows[i::3]), 0)] for i in range(3)]
    seen = []
    monkeypatch.setattr(
        train, "moment_sums", lambda p, y: seen.append(p.detach().clone()) or moment_sums(p, y)
    )
    step_on(args, model, batches)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:]):
        assert torch.equal(first, second)
    first = seen[0]
    seen.clear()
    step_on(parse_args([*flags, "--seed", "1"]), model, batches)
    assert not torch.equal(seen[0][1:], first[1:])  # and dropout was on


@pytest.mark.parametrize(
    "extra",
    [
        ["--epochs", "1"],
        ["--epochs", "1", "--context", "2"],
        ["--unfreeze", "1:none,2:all,3:top:1", "--epochs", "3", "--batch_size", "2"],
    ],
    ids=["single", "context", "progressive and accumulated"],
)
def test_two_ranks_give_the_losses_and_weights_of_one(flags, extra):
    """Dropout off (its draws depend on the split); the plan, CCC and DDP are what is compared."""
    flags = [*flags, *NO_DROPOUT, "--global_batch_size", "16", *extra]
    size = "2" if "--batch_size" in extra else "4"  # 2 ranks x 4 micro-steps, or x 2
    alone = parse_args([*flags, "--batch_size", "8", "--name", "alone"])
    assert main(alone) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "train.py", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--batch_size", size, "--name", "ranks"],
        cwd=ROOT,
        env=env,
        check=True,
        timeout=300,
    )
    ranks = parse_args([*flags, "--batch_size", size, "--name", "ranks"])
    for one, two in zip(records(alone, "train"), records(ranks, "train"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-5)
    assert_same(weights_of(alone), weights_of(ranks), rtol=1e-3, atol=2e-5)
    alone_csv, ranks_csv = (run_dir(a) / "predictions_test.csv" for a in (alone, ranks))
    assert len(alone_csv.read_text().splitlines()) == 25  # 24 test utterances, each once
    one, two = (np.genfromtxt(f, delimiter=",", skip_header=1) for f in (alone_csv, ranks_csv))
    np.testing.assert_allclose(one[:, -2:], two[:, -2:], atol=1e-4)


@pytest.mark.parametrize("encoder", ["wavlm", "convnext", "baseline"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(flags, encoder):
    more = ["--encoder", encoder, "--base_channels", "4", "--num_blocks", "2"]
    args, splits, dataset, model = prepared(flags, *more)
    batch = [dataset[BatchSpec(tuple((row,) for row in splits["train"][:8].tolist()), 0)]]

    def step():
        kept = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
        with keep:
            model.train()(batch[0])
        return sum(x.numel() for x in kept), step_on(args, model, batch, steps=2)

    plain, weights = step()
    train.set_checkpointing(model, True)
    checkpointed, same = step()
    assert checkpointed < 0.95 * plain
    assert_same(weights, same)


def test_an_encoder_without_gradient_checkpointing_says_so(flags, monkeypatch):
    args, *_, model = prepared(flags, "--encoder", "baseline", "--gradient_checkpointing")
    del model.encoder.gradient_checkpointing
    monkeypatch.setattr(train, "build_model", lambda *_: model)
    with pytest.raises(UserError, match="--encoder baseline knows no --gradient_checkpointing"):
        main(args)


# --- contract 3: resume


SETTINGS = {
    "plain": [],
    "dialogues": ["--context", "4", "--feedback", "--augment", "--ema_alpha", "learned"],
    "progressive": [
        "--unfreeze",
        "1:none,2:top:1,3:all",
        "--epochs",
        "3",
        "--scheduler",
        "plateau",
    ],
    "accumulated bf16": [
        "--amp",
        "bf16",
        "--batch_size",
        "4",
        "--gradient_accumulation_steps",
        "2",
    ],
    "workers": ["--num_workers", "2", "--augment", "--patience", "3"],
    "frozen": ["--unfreeze", "none", "--max_seconds", "1.5", "--batch_size", "4"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(flags, setting, monkeypatch):
    flags = [*flags, *SETTINGS[setting]]
    whole = parse_args([*flags, "--name", "whole"])
    assert main(whole) == 0
    steps = len(records(whole, "train"))
    parted = [*flags, "--name", "parted"]
    step_line = train.step_line
    for stop_at in (2, steps - 1):

        def stopping(record, step, *rest, stop_at=stop_at):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_line(record, step, *rest)

        monkeypatch.setattr(train, "step_line", stopping)
        assert main(parse_args([*parted, "--resume"])) == 75
        assert read_checkpoint(run_dir(parse_args(parted)) / "last.pt")["state"]["step"] == stop_at
    monkeypatch.setattr(train, "step_line", step_line)
    assert main(parse_args([*parted, "--resume"])) == 0
    parted = parse_args(parted)
    for file in ("last.pt", "best.pt"):
        assert_same(weights_of(whole, file), weights_of(parted, file))
    for event in ("train", "dev", "test"):
        for one, two in zip(records(whole, event), records(parted, event), strict=True):
            timing = {"audio_seconds_per_second", "data_share", "padded_share", "ms_per_step"}
            timing |= {"peak_gib"}
            assert {k: v for k, v in one.items() if k not in timing} == {
                k: v for k, v in two.items() if k not in timing
            }
    test_csv = "predictions_test.csv"
    assert (run_dir(whole) / test_csv).read_bytes() == (run_dir(parted) / test_csv).read_bytes()


def test_a_complete_run_has_nothing_to_resume(flags):
    assert main(parse_args(flags)) == 0
    before = (run_dir(parse_args(flags)) / "result.json").read_bytes()
    assert main(parse_args([*flags, "--resume"])) == 0
    assert (run_dir(parse_args(flags)) / "result.json").read_bytes() == before


# --- the cache of a frozen encoder


def whole_weights(args):
    """All weights of a run's last.pt, its frozen WavLM included."""
    return {**read_checkpoint(run_dir(args) / "frozen.pt")["model"], **weights_of(args)}


def caches(args):
    return sorted(Path(args.cache_dir).glob("hidden-*"))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_frozen_run_from_the_cache_learns_what_one_from_audio_learns(flags, pooling, tmp_path):
    flags = [*flags, "--unfreeze", "none", "--pooling", pooling, "--cache_dir", str(tmp_path)]
    on, off = (parse_args([*flags, "--name", how, "--feature_cache", how]) for how in ("on", "off"))
    assert main(off) == 0 and not caches(off)
    assert main(on) == 0 and len(caches(on)) == 1
    assert_same(weights_of(on), weights_of(off), rtol=0.02, atol=0.004)  # Adam of float16 inputs
    for event, key in (("train", "loss"), ("test", "test/ccc_mean")):
        pairs = zip(records(on, event), records(off, event), strict=True)
        assert all(one[key] == pytest.approx(two[key], abs=0.01) for one, two in pairs)
    assert not any(name.startswith("encoder.wavlm.") for name in weights_of(on))


def test_the_cache_serves_all_folds_and_no_other_encoder(flags, tmp_path, monkeypatch):
    flags = [*flags, "--unfreeze", "none", "--max_steps", "1", "--cache_dir", str(tmp_path)]
    count = 0
    for more, new in (
        ([], 1), (["--fold", "2"], 0), (["--lr", "0.5", "--batch_size", "4"], 0),
        (["--layers", "2"], 1), (["--pooling", "attention"], 1), (["--amp", "bf16"], 1),
        (["--max_seconds", "0.9"], 1),
    ):  # fmt: skip
        args = parse_args([*flags, *more, "--overwrite"])
        assert main(args) == 0
        count += new
        assert len(caches(args)) == count, more
    real = train.build_model

    def shifted(*args, **kwargs):
        model = real(*args, **kwargs)
        if kwargs.get("load", True):
            with torch.no_grad():
                model.encoder.wavlm.encoder.layers[0].final_layer_norm.bias[0] += 1e-6
        return model

    monkeypatch.setattr(train, "build_model", shifted)
    assert main(parse_args([*flags, "--overwrite"])) == 0
    assert len(caches(args)) == count + 1  # one weight changed by a millionth


def test_a_progressive_run_leaves_the_cache_when_the_encoder_trains(flags, monkeypatch):
    fed = []
    step = train.train_step

    def seen(model, ddp_model, batches, *rest, **kwargs):
        if not batches[0]["labels"].is_meta:  # the memory plan takes steps, too
            fed.append("hidden" in batches[0])
        return step(model, ddp_model, batches, *rest, **kwargs)

    monkeypatch.setattr(train, "train_step", seen)
    args = parse_args([*flags, "--unfreeze", "1:none,2:top:1,3:none", "--epochs", "3"])
    assert main(args) == 0
    assert fed == [True] * 3 + [False] * 3 + [True] * 3
    # the third epoch's states are those of the weights that the second one trained
    model = build_model(args, 0, 0)
    best = read_checkpoint(run_dir(args) / "best.pt")
    assert best["epoch"] in (1, 2, 3)
    train.load_weights(model, best["model"], run_dir(args))
    _, splits, dataset, _ = load_data(args)
    dialogs = [str(row) for row in range(len(dataset.labels))]
    preds, _ = evaluate(model, dataset, splits["test"], dialogs, args, torch.device("cpu"))
    lines = (run_dir(args) / "predictions_test.csv").read_text().splitlines()
    column = lines[0].split(",").index("pred_valence")
    written = torch.tensor([float(line.split(",")[column]) for line in lines[1:]])
    torch.testing.assert_close(written, preds[:, 0], rtol=0, atol=1e-5)


def test_augmentation_and_cache_exclude_each_other(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args([*flags, "--augment", "--feature_cache", "on"])
    assert "--feature_cache on" in capsys.readouterr().err
    args = parse_args([*flags, "--unfreeze", "none", "--augment", "--cache_dir", str(tmp_path)])
    assert main(args) == 0 and not caches(args)


def test_a_damaged_cache_is_refused_and_a_full_disk_named(flags, tmp_path, monkeypatch):
    flags = [*flags, "--unfreeze", "none", "--max_steps", "1", "--cache_dir", str(tmp_path)]
    args = parse_args(flags)
    assert main(args) == 0
    (cache,) = caches(args)
    with open(cache / "values.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match="is damaged: delete it"):
        main(parse_args([*flags, "--overwrite"]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.vadata.PackedRows, "write", full)
    with pytest.raises(UserError, match=r"--cache_dir .*: hidden-.*No space left.*free disk space"):
        main(parse_args([*flags, "--overwrite", "--layers", "1"]))
    assert caches(args) == [cache]


# --- contract 4: evaluation


def test_evaluation_does_not_depend_on_batch_size_and_keeps_the_order_of_rows(flags):
    args, splits, dataset, model = prepared(flags, "--amp", "off")
    rows = splits["test"]
    dialogs = [str(row) for row in range(len(dataset.labels))]
    device = torch.device("cpu")
    preds, _ = evaluate(model, dataset, rows, dialogs, args, device)
    args.batch_size, args.global_batch_size = 2, 2
    assert torch.equal(preds, evaluate(model, dataset, rows, dialogs, args, device)[0])
    model.eval()
    with torch.no_grad():
        for i in (0, 7, len(rows) - 1):
            alone = model(dataset[BatchSpec(((rows[i],),))])
            torch.testing.assert_close(preds[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_evaluation_with_context_tracks_whole_dialogues(flags):
    args, splits, dataset, model = prepared(flags, "--amp", "off", "--context", "2")
    rows = splits["test"]
    dialogs = [utt.dialog for utt in load_data(args)[0].utterances]
    preds, _ = evaluate(model, dataset, rows, dialogs, args, torch.device("cpu"))
    model.eval()
    first = [i for i, row in enumerate(rows) if dialogs[row] == dialogs[rows[0]]]
    with torch.no_grad():
        turns = torch.cat([model.encode(dataset[BatchSpec(((rows[i],),))]) for i in first])
        tracked = model.track(turns.unsqueeze(0))[0][0]
    assert len(first) == 4
    torch.testing.assert_close(preds[first], tracked, rtol=1e-4, atol=1e-5)


# --- the run directory


def test_a_run_leaves_the_files_of_the_design(flags):
    args = parse_args([*flags, "--fold", "2"])
    assert main(args) == 0
    names = {path.name for path in run_dir(args).iterdir()}
    assert names >= {
        "args.json", "train.log", "metrics.jsonl", "last.pt", "best.pt", "result.json",
        "predictions_dev.csv", "predictions_test.csv", "splits.json", "tb",
        "curves.png", "scatter.png", "embedding.png",
    }  # fmt: skip
    result = json.loads((run_dir(args) / "result.json").read_text())
    assert result["splits"] == {"train": 24, "dev": 24, "test": 24}
    assert result["wavlm"] == args.wavlm and result["wavlm_revision"] is None
    assert result["fold"] == 2 and result["num_folds"] == 3 and result["label_range"] == [0, 1]
    for split in ("dev", "test"):
        assert -1 <= result[split]["ccc_mean"] <= 1
    test = (run_dir(args) / "predictions_test.csv").read_text().splitlines()
    assert len(test) == 25 and all(line.startswith("s2") for line in test[1:])
    evaluations = records(args, "dev")
    assert [record["epoch"] for record in evaluations] == [1, 2]
    best = max(record["dev/ccc_mean"] for record in evaluations)
    assert result["dev"]["ccc_mean"] == pytest.approx(best, abs=1e-6)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(flags):
    runs = [parse_args([*flags, "--name", n, "--seed", s]) for n, s in ("a0", "b0", "c1")]
    for args in runs:
        assert main(args) == 0
    assert_same(weights_of(runs[0]), weights_of(runs[1]))
    losses = [[record["loss"] for record in records(args, "train")] for args in runs]
    assert losses[0] == losses[1] != losses[2]


# --- schedules


def test_unfreeze_schedules_parse_and_apply_from_their_epoch_on():
    schedule = parse_unfreeze("1:none,11:top:4,21:all")
    assert [unfreeze_at(schedule, epoch) for epoch in (0, 9, 10, 19, 20, 99)] == [
        "none", "none", "top:4", "top:4", "all", "all",
    ]  # fmt: skip
    assert parse_unfreeze("transformer") == [(1, "transformer")]


@pytest.mark.parametrize("text", ["some", "top:0", "2:all", "1:none,1:all", "1:none,,2:all", "1:x"])
def test_a_wrong_unfreeze_schedule_is_refused(text):
    with pytest.raises(ValueError, match="--unfreeze"):
        parse_unfreeze(text)


def test_learning_rate_rises_then_falls_to_zero_along_a_cosine():
    rates = [lr_at(step, 100, 0.1, "cosine") for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert {lr_at(step, 100, 0.0, "none") for step in range(100)} == {1.0}


def test_groups_hold_every_trained_parameter_once_at_its_rate(flags):
    args, _, _, model = prepared(flags, "--unfreeze", "1:none,2:top:1", "--encoder_lr", "1e-5")
    optimizer = build_optimizer(model, args)
    set_trainable(model, "top:1")
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})
    for group in optimizer.param_groups:
        assert group["peak_lr"] == (1e-5 if group["name"].startswith("wavlm") else 1e-3)
        decayed = all(p.ndim >= 2 for p in group["params"])
        assert group["weight_decay"] == (0.01 if decayed else 0)


def test_frozen_weights_do_not_move_and_unfrozen_ones_do(flags):
    args = parse_args([*flags, "--unfreeze", "top:1", "--weight_decay", "0.1"])
    start = build_model(args, 0, 0).encoder.state_dict()
    assert main(args) == 0
    end = weights_of(args)
    for name, before in start.items():
        layer_two = ".layers.1." in name or name.startswith("wavlm.encoder.layer_norm")
        assert torch.equal(before, end[f"encoder.{name}"]) != layer_two, name


# --- every encoder and option trains


@pytest.mark.parametrize(
    "extra",
    [
        ["--encoder", "convnext", "--base_channels", "4", "--num_blocks", "2"],
        ["--encoder", "baseline", "--base_channels", "4", "--num_blocks", "2"],
        ["--encoder", "transformer", "--d_model", "64", "--num_layers", "1"],
        ["--encoder", "lightweight_transformer", "--d_model", "256", "--num_layers", "1"],
        ["--prosody", "egemaps"],
        ["--speaker", "NPY"],
        ["--pooling", "attention", "--d_state", "0", "--no_film"],
        ["--gradient_checkpointing", "--unfreeze", "transformer", "--attention", "eager"],
        ["--loss", "mse", "--max_grad_norm", "0", "--scheduler", "none"],
        ["--preset", "large_batch", "--batch_size", "8"],
    ],
    ids=lambda extra: " ".join(extra),
)
def test_every_kind_of_model_trains_and_tests(flags, extra, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("vectors", "frames"):
        (tmp_path / name).mkdir()
    for session in range(1, 4):
        for dialog in range(6):
            for turn in range(4):
                utt_id = f"s{session}d{dialog}t{turn}.npy"
                np.save(tmp_path / "vectors" / utt_id, rng.standard_normal(24, dtype=np.float32))
                frames = rng.standard_normal((5 + turn, 10), dtype=np.float32)
                np.save(tmp_path / "frames" / utt_id, frames)
    extra = [str(tmp_path / "vectors") if flag == "NPY" else flag for flag in extra]
    if "transformer" in " ".join(extra[:2]):
        extra += ["--features_dir", str(tmp_path / "frames")]
    assert main(parse_args([*flags, "--epochs", "1", *extra])) == 0


def test_film_alone_can_be_trained_from_an_earlier_run(flags):
    first = parse_args([*flags, "--name", "first"])
    assert main(first) == 0
    personal = ["--name", "personal", "--init_from", str(run_dir(first)), "--train_only", "film"]
    second = parse_args([*flags, *personal])
    assert main(second) == 0
    before, after = weights_of(first, "best.pt"), whole_weights(second)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"film"}


@pytest.mark.slow
def test_compiled_layers_train_like_plain_ones(flags):
    losses = []
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        args = parse_args([*flags, "--name", name, *NO_DROPOUT, *extra])
        assert main(args) == 0
        losses.append([record["loss"] for record in records(args, "train")])
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-4)


# --- presets and errors


def test_presets_set_flags_and_a_flag_given_by_hand_wins():
    assert parse_args(["--preset", "max"]).d_state == 128
    args = parse_args(["--preset", "max", "--d_state", "32"])
    assert (args.d_state, args.mamba_layers) == (32, 3)
    assert parse_args(["--preset", "large_batch", "--encoder", "convnext"]).batch_size == 1024


def test_batch_sizes_are_derived_from_each_other(monkeypatch):
    args = parse_args(["--batch_size", "4", "--global_batch_size", "32"])
    assert args.gradient_accumulation_steps == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = parse_args(["--batch_size", "4", "--gradient_accumulation_steps", "3"])
    assert args.global_batch_size == 24


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--encoder", "hubert"], "--encoder"),
        (["--data", "nowhere.csv"], "--data nowhere.csv: no such file"),
        (["--label_range", "0", "inf"], "LO must be below HI"),
        (["--seed", "99999999999999999999"], "below 2^63"),
        (["--gpu_gib", "-5"], "--gpu_gib -5.0: must be at least 0.1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: must be at"),
        (["--global_batch_size", "-8"], "--global_batch_size -8: must be at least 1"),
        (["--train_only", "film"], "needs --init_from"),
        (["--unfreeze", "1:none,11:all", "--epochs", "2"], "its last epoch is after --epochs 2"),
        (["--batch_size", "6", "--global_batch_size", "32"], "not a multiple of batch_size 6"),
        (["--batch_size", "4", "--context", "3"], "not a multiple of --context 3"),
        (["--batch_size", "many"], "a number or auto"),
        (["--unfreeze", "half"], "--unfreeze half"),
        (["--encoder", "transformer"], "--features_dir"),
        (["--features_dir", "x"], "not used by --encoder wavlm"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--amp", "fp16", "--device", "cpu"], "needs a GPU"),
        (["--ema_alpha", "2"], "--ema_alpha 2"),
        (["--name", "a/b"], "--name"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--label_range", "5", "1"], "LO must be below HI"),
        (["--feature_cache", "on", "--augment"], "remove one of the two"),
        (["--init_from", "/nowhere"], "--init_from /nowhere"),
        (["--feature_cache", "on", "--encoder", "convnext"], "not for --encoder convnext"),
        (["--feature_cache", "on", "--unfreeze", "all"], "--unfreeze all never freezes WavLM"),
        (["--unfreeze", ""], "--unfreeze : none, all"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--max_seconds", "inf"], "--max_seconds inf: must be at least 0.1, and finite"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--feedback"], "give --context above 1"),
        (["--feedback", "--context", "4", "--d_state", "0"], "and --d_state"),
        (["--speaker", "ecapa", "--no_film"], "remove it, or --no_film"),
        (["--eval_every", "2", "--separation_every", "3"], "a multiple of --eval_every"),
        (["--eval_every", "2", "--plot_every", "1"], "a multiple of --eval_every"),
        (
            ["--encoder", "lightweight_transformer", "--features_dir", "f", "--d_model", "896"],
            "multiple of 256",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(wrong)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--out", "/proc/x"], "--out /proc/x: "),
        (["--fold", "9"], "9"),
        (["--label_range", "0", "0.5"], "row"),
        (["--wavlm", "/nowhere"], "--wavlm"),
        (["--unfreeze", "top:9"], "--unfreeze top:9"),
        (["--layers", "5"], "--layers"),
        (["--batch_size", "64"], "--batch_size"),
        (["--encoder", "transformer", "--features_dir", "/nowhere"], "--features_dir"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(flags, wrong, said, capsys):
    assert run([*flags, *wrong]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 2


def test_an_existing_run_is_not_touched_without_resume_or_overwrite(flags, capsys):
    assert run(flags) == 0
    before = (run_dir(parse_args(flags)) / "last.pt").read_bytes()
    capsys.readouterr()
    assert run(flags) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error
    assert (run_dir(parse_args(flags)) / "last.pt").read_bytes() == before
    assert run([*flags, "--resume", "--lr", "1"]) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--d_hidden", "64"], "--d_hidden 64: the model of --init_from has 16"),
        (["--prosody", "egemaps"], "--prosody egemaps: the model of --init_from has none"),
        (["--dropout", "0.9"], "--dropout 0.9: the model of --init_from has 0.2"),
        (["--speaker", "VECTORS"], "reads speaker vectors and frames of widths (0, 0)"),
    ],
)
def test_a_model_that_starts_from_another_keeps_its_flags(flags, tmp_path, wrong, said, capsys):
    for i in range(72):
        np.save(tmp_path / f"s{i // 24 + 1}d{i // 4 % 6}t{i % 4}.npy", np.ones(3, np.float32))
    assert run(flags) == 0
    start = ["--init_from", str(run_dir(parse_args(flags))), "--name", "next"]
    wrong = [str(tmp_path) if word == "VECTORS" else word for word in wrong]
    try:
        assert run([*flags, *start, *wrong]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert said in capsys.readouterr().err


def test_a_model_does_not_start_from_one_that_has_seen_its_dev_or_test(flags, capsys):
    assert run([*flags, "--fold", "1"]) == 0  # test 1, dev 2, train 3
    start = [*flags, "--init_from", str(run_dir(parse_args(flags))), "--name", "next"]
    for fold, fault in ((2, "of dev here .* train split"), (3, "of test here .* train split")):
        assert run([*start, "--fold", str(fold)]) == 2
        said = capsys.readouterr().err
        assert re.search(f"24 utterances {fault}: start from the run of this --fold", said)
    assert run([*start, "--fold", "1"]) == 0


def test_labels_have_the_scale_of_the_run_to_start_from_only_in_a_csv(flags):
    assert run([*flags, "--label_range", "0", "2"]) == 0
    start = ["--init_from", str(run_dir(parse_args(flags)))]
    assert parse_args([*flags, *start]).label_range == [0, 2]
    assert parse_args([*flags, *start, "--data", "iemocap"]).label_range is None


def test_a_batch_size_that_was_found_on_one_rank_is_not_split_in_silence(
    flags, monkeypatch, capsys
):
    flags = [*flags, "--batch_size", "auto", "--global_batch_size", "3"]
    monkeypatch.setattr(train, "step_line", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run(flags) == 75
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, found in (("start_ranks", None), ("any_rank", False)):
        monkeypatch.setattr(train, name, lambda *_, found=found: found)
    assert run([*flags, "--resume"]) == 2
    assert "--resume on 2 ranks: --global_batch_size 3 is not a multiple" in capsys.readouterr().err


def test_the_gpu_is_set_before_its_memory_is_looked_at(flags, monkeypatch):
    """CUDA starts lazily, and torch's peak of a device that has not been started is an error."""
    calls = []

    def noted(name, result=None):
        return lambda *_, **__: calls.append(name) or result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", noted("set_device"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", noted("manual_seed_all"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", noted("reset_peak"))
    monkeypatch.setattr(train, "build_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(parse_args([*flags, "--device", "cuda"]))
    assert calls.index("set_device") < calls.index("reset_peak")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"--nproc_per_node: rank 1 .* there are 1"):
        main(parse_args([*flags, "--device", "cuda"]))


def test_resuming_with_another_flag_is_refused(flags, capsys, monkeypatch):
    monkeypatch.setattr(train, "step_line", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(parse_args(flags)) == 75
    assert run([*flags, "--resume", "--lr", "0.5"]) == 2
    assert "--lr was 0.001" in capsys.readouterr().err


def test_overwrite_spares_a_directory_that_is_no_run(flags, capsys):
    directory = run_dir(parse_args(flags))
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    assert run([*flags, "--overwrite"]) == 2
    assert (directory / "thesis.tex").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_its_utterances(flags):
    with pytest.raises(FloatingPointError, match=r"step \d: loss .* on s\d.*: lower --lr"):
        main(parse_args([*flags, "--lr", "1e30", "--encoder_lr", "1e30", "--warmup", "0"]))
    assert not (run_dir(parse_args(flags)) / "best.pt").exists()


def test_data_errors_reach_the_caller_as_such(flags):
    with pytest.raises(UserError):
        main(parse_args([*flags, "--fold", "9"]))


def test_the_learning_rates_follow_the_batch_where_a_reference_is_given(flags):
    args, *_, model = prepared(flags, "--batch_size", "8", "--lr_reference_batch", "4")
    rates = {group["name"].split(",")[0]: group["peak_lr"] for group in param_groups(model, args)}
    assert rates == {"wavlm": 2 * args.encoder_lr, "rest": 2 * args.lr}


# --- contract 8: nothing is stale, and normalisers see the train split alone


def test_other_audio_is_another_cache_of_hidden_states_and_egemaps(corpus, flags, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.parent, folder, ignore=shutil.ignore_patterns("cache"))
    more = ["--data", str(folder / "corpus.csv"), "--cache_dir", str(tmp_path / "c")]
    more += ["--unfreeze", "none", "--prosody", "egemaps", "--max_steps", "1"]
    assert run([*flags, *more]) == 0
    args = parse_args([*flags, *more])
    loaded, *_, before = load_data(args)
    sound, rate = soundfile.read(folder / "s1d0t0.wav")
    soundfile.write(folder / "s1d0t0.wav", sound[::-1] * 0.5, rate)  # the same length
    os.utime(folder / "s1d0t0.wav", (1, 1))
    assert run([*flags, *more, "--overwrite"]) == 0
    for kind in ("hidden", "egemaps", "audio"):
        assert len(list((tmp_path / "c").glob(f"{kind}-*"))) == 2, kind
    *_, after = load_data(args)
    changed = (before != after).any(1)
    assert [u.utt_id for u, other in zip(loaded.utterances, changed) if other] == ["s1d0t0"]


def test_the_normaliser_of_a_run_sees_the_train_split_alone(flags, monkeypatch):
    real, spoiled = vadata.egemaps, {}

    def spoil(corpus, pack, cache_dir):
        rows = real(corpus, pack, cache_dir).copy()
        rows[[row for name in spoiled for row in spoiled[name]]] = 1e6
        return rows

    monkeypatch.setattr(vadata, "egemaps", spoil)
    flags, fitted = [*flags, "--prosody", "egemaps", "--epochs", "1"], []
    for name in ("plain", "spoiled"):
        args = parse_args([*flags, "--name", name])
        assert main(args) == 0
        weights = weights_of(args, "best.pt")
        fitted.append({k: v for k, v in weights.items() if k in ("prosody.mean", "prosody.std")})
        _, splits, *_ = load_data(args)
        spoiled |= {split: splits[split] for split in ("dev", "test")}
    assert len(fitted[0]) == 2
    assert_same(*fitted)
