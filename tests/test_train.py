"""train.py: equal updates however a batch is split, resume bit for bit, errors, every encoder."""

import copy
import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import quick_flags
from fault_kills import Run, assert_same_outcome, raise_on, run_ranks, signal_on
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

import data
import predict
import report
import step
from data import BatchSpec
from model import EmotionModel, metrics
from train import cli, main, parse_args
from util.checkpoints import read_checkpoint, save_checkpoint
from util.files import UserError
from util.runs import load_weights, read_predictions, run_dir
from wavlm import WavLM, load_wavlm, save_wavlm

NO_DROPOUT = ("--dropout", "0", "--wavlm_dropout", "0")
CPU = torch.device("cpu")
TARGETS = ("valence", "arousal")


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
    """Weights after `steps` updates on the same micro-batches, from a copy of the model."""
    model = copy.deepcopy(model)
    optimizer = step.build_optimizer(model, args)
    step.set_trainable(model, args.unfreeze)
    model.train()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for number in range(steps):
        step.train_step(model, batches, optimizer, scaler, args, step.Progress(step=number))
    return model.state_dict()


def prepared(flags, *more):
    args = parse_args([*flags, *more])
    fold = data.load_fold(args)
    torch.manual_seed(args.seed)
    return args, fold, step.build_model(args, fold.shape)


def split_batch(fold, count, parts):
    """Micro-batches of the first `count` utterances of the train split."""
    rows = fold.splits["train"][:count].tolist()
    labels = (~np.isnan(fold.dataset.labels[rows])).sum(0).tolist()
    specs = [BatchSpec(tuple((row,) for row in rows[i::parts]), 0, labels) for i in range(parts)]
    return [fold.dataset[spec] for spec in specs]


# --- contract 1: the same global batch gives the same update


@pytest.mark.parametrize("missing", [0, 5, 16])
@pytest.mark.parametrize("loss", ["ccc", "mse"])
def test_four_micro_batches_give_the_update_of_one_batch(flags, loss, missing):
    """Also if the first labels of valence are missing, so that some micro-batches have none."""
    args, fold, model = prepared(flags, "--loss", loss, *NO_DROPOUT)
    fold.dataset.labels[fold.splits["train"][:missing], 0] = np.nan
    one, four = (step_on(args, model, split_batch(fold, 16, n), steps=5) for n in (1, 4))
    assert_same(one, four, rtol=1e-3, atol=2e-5)
    start = model.state_dict()
    moved = max((one[k].double() - start[k].double()).abs().max() for k in one)
    assert moved > 1e-3  # five steps did go somewhere


@pytest.mark.parametrize("loss", ["ccc", "mse"])
def test_a_missing_label_is_as_if_its_utterance_were_not_there_for_this_target(flags, loss):
    """The gradient is that of the formulas, over 10 labels of valence and 16 of arousal."""
    args, fold, model = prepared(flags, "--loss", loss, *NO_DROPOUT, "--max_grad_norm", "0")
    fold.dataset.labels[fold.splits["train"][:6], 0] = np.nan
    (batch,) = split_batch(fold, 16, 1)

    def ccc(p, y):
        covariance = ((p - p.mean()) * (y - y.mean())).mean()
        spread = p.var(unbiased=False) + y.var(unbiased=False) + (p.mean() - y.mean()) ** 2
        return 2 * covariance / spread

    expected = 0
    for preds, labels in zip(model.train()(batch).T, batch["labels"].T):
        p, y = preds[~labels.isnan()].double(), labels[~labels.isnan()].double()
        mse = (p - y).square().mean()
        expected += 0.5 * (mse if loss == "mse" else 1 - ccc(p, y) + args.mse_weight * mse)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.zero_grad()
    result = step.train_step(model, [batch], optimizer, scaler, args, step.Progress())
    assert step.batch_loss(result.sums, args).item() == pytest.approx(expected.item(), abs=1e-6)
    for name, p in model.named_parameters():
        moved = before[name] - p.detach()
        torch.testing.assert_close(moved, gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_under_autocast_the_split_matters_no_more_than_its_rounding(flags):
    args, fold, model = prepared(flags, *NO_DROPOUT)
    exact = step_on(args, model, split_batch(fold, 16, 1), steps=5)
    half = parse_args([*flags, *NO_DROPOUT, "--amp", "bf16"])
    one, four = (step_on(half, model, split_batch(fold, 16, n), steps=5) for n in (1, 4))

    def distance(a, b):
        return sum((a[k].double() - b[k].double()).square().sum() for k in a) ** 0.5

    assert 0 < distance(one, four) < 1.5 * distance(one, exact)
    assert distance(one, four) < 0.3 * distance(one, model.state_dict())


def test_averaging_micro_batch_cccs_is_another_update(flags):
    args, fold, model = prepared(flags, "--exact_ccc", "off", *NO_DROPOUT)
    one, four = (step_on(args, model, split_batch(fold, 16, n)) for n in (1, 4))
    assert max((one[k].double() - four[k].double()).abs().max() for k in one) > 1e-4


def test_the_second_forward_of_exact_ccc_draws_the_dropout_of_the_first(flags):
    args, fold, model = prepared(flags)
    seen = []

    def note(module, _, output):
        if type(module) is type(model):
            seen.append(output.detach().clone())

    with register_module_forward_hook(note):
        step_on(args, model, split_batch(fold, 12, 3))
        assert len(seen) == 5  # the first micro-step keeps its graph, the others run twice
        assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[4])
        step_on(parse_args([*flags, "--seed", "1"]), model, split_batch(fold, 12, 3))
    assert not torch.equal(seen[5], seen[0])  # and dropout was on


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(["--epochs", "1"], marks=pytest.mark.slow),
        ["--epochs", "1", "--context", "2"],
        ["--unfreeze", "1:none,2:all,3:top:1", "--epochs", "3", "--batch_size", "2"],
    ],
    ids=["single", "context", "progressive and accumulated"],
)
def test_two_ranks_give_the_losses_and_weights_of_one(flags, tmp_path, extra):
    """Dropout off (its draws depend on the split); the plan, CCC and DDP are what is compared."""
    flags = [*flags, *NO_DROPOUT, "--global_batch_size", "16", *extra]
    size = "2" if "--batch_size" in extra else "4"  # 2 ranks x 4 micro-steps, or x 2
    alone = parse_args([*flags, "--batch_size", "8", "--name", "alone"])
    assert main(alone) == 0
    more = [*flags, "--batch_size", size, "--name", "ranks"]
    assert run_ranks(more, tmp_path / "log", 2) == [0, 0], (tmp_path / "log").read_text()
    ranks = parse_args(more)
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
    args, fold, model = prepared(flags, *more)
    batches = split_batch(fold, 8, 1)

    def kept_and_weights():
        kept = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
        with keep:
            model.train()(batches[0])
        return sum(x.numel() for x in kept), step_on(args, model, batches, steps=2)

    plain, weights = kept_and_weights()
    step.set_checkpointing(model, True)
    checkpointed, same = kept_and_weights()
    assert checkpointed < 0.95 * plain
    assert_same(weights, same)


def test_an_encoder_without_gradient_checkpointing_says_so(flags):
    *_, model = prepared(flags, "--encoder", "baseline")
    del model.encoder.gradient_checkpointing
    with pytest.raises(UserError, match="--encoder baseline has no --gradient_checkpointing"):
        step.set_checkpointing(model, True)


# --- contract 3: resume


SETTINGS = {
    "plain": [],
    "dialogues": ["--context", "4", "--feedback", "--augment", "--ema_alpha", "learned"],
    "progressive": [
        "--unfreeze", "1:none,2:top:1,3:all", "--epochs", "3", "--scheduler", "plateau",
    ],
    "accumulated bf16": [
        "--amp", "bf16", "--batch_size", "4", "--gradient_accumulation_steps", "2",
    ],
    "workers": ["--num_workers", "2", "--augment", "--patience", "3"],
    "frozen": ["--unfreeze", "none", "--max_seconds", "1.5", "--batch_size", "4"],
}  # fmt: skip


SLOWER = ("plain", "dialogues", "accumulated bf16")  # tests/test_resume.py kills runs like these


@pytest.mark.parametrize(
    "setting",
    [pytest.param(s, marks=pytest.mark.slow) if s in SLOWER else s for s in SETTINGS],
)
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(flags, setting, tmp_path):
    flags = [*flags, *SETTINGS[setting]]
    whole, parted = Run(flags, tmp_path / "whole"), Run(flags, tmp_path / "parted")
    assert main(parse_args(whole.flags)) == 0
    steps = whole.records()[-1]["step"]
    for stop_at in (1, steps - 2):  # seen in the step after it
        with raise_on(rf"^step +{stop_at}/"):
            assert main(parse_args([*parted.flags, "--resume"])) == 75
        last = read_checkpoint(parted.directory / "last.pt")
        assert last["progress"]["step"] == stop_at + 1
    assert main(parse_args([*parted.flags, "--resume"])) == 0
    assert_same_outcome(whole, parted)


def test_a_complete_run_has_nothing_to_resume_and_is_not_touched(finished, capsys):
    flags, directory = finished
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert cli(flags) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error
    assert cli([*flags, "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    for name in before.keys() - {"train.log", "status.json"}:
        assert (directory / name).read_bytes() == before[name], name


def test_a_finished_run_removes_what_only_a_resume_reads(flags, tmp_path, capsys, corpus):
    flags = [flag for flag in flags if flag != "--keep_last"] + ["--unfreeze", "none"]
    directory = run_dir(parse_args(flags))
    kept = directory / "kept.pt"
    with raise_on(r"^step +5/"):
        assert cli(flags) == 75
    shutil.copy(directory / "last.pt", kept)
    assert cli([*flags, "--resume"]) == 0
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert files.keys() >= {"best.pt", "frozen.pt"} and not files.keys() & {
        "last.pt",
        "previous.pt",
    }
    for argv, code, line in (
        ((), 0, f"{directory} is complete: nothing to resume"),
        (("--lr", "0.5"), 2, "--lr was 0.001"),
        (("--fold", "2"), 0, "done in"),
    ):
        capsys.readouterr()
        assert cli([*flags, "--resume", *argv]) == code
        said = capsys.readouterr()
        assert line in said.out + said.err
    for name in files.keys() - {"train.log", "status.json"}:
        assert (directory / name).read_bytes() == files[name], name
    for name, more, stays in (  # killed after result.json was written
        ("last.pt", ["--keep_last"], True), ("last.pt", [], False), ("previous.pt", [], False),
    ):  # fmt: skip
        shutil.copy(kept, directory / name)
        assert cli([*flags, "--resume", *more]) == 0
        assert (directory / name).exists() == stays
    answers = [
        "--checkpoint",
        str(directory),
        "--data",
        str(corpus),
        "--out",
        str(tmp_path / "p.csv"),
    ]
    assert predict.main(predict.parse_args(answers)) == 0
    table = pd.read_csv(corpus)
    table.loc[3, "valence"] = 0.123
    table["path"] = [str(corpus.parent / path) for path in table["path"]]
    table.to_csv(tmp_path / "changed.csv", index=False)
    changed = ["--data", str(tmp_path / "changed.csv"), "--data_dir", str(corpus.parent)]
    assert cli([*flags, *changed, "--name", "corpus-wavlm", "--resume"]) == 2
    assert "the data differs from that of the interrupted run" in capsys.readouterr().err


def test_a_flag_that_is_new_since_the_run_began_is_logged_and_another_value_refused(flags, capsys):
    with raise_on(r"^step +2/"):
        assert cli(flags) == 75
    last = run_dir(parse_args(flags)) / "last.pt"
    content = read_checkpoint(last)
    del content["args"]["mse_weight"]  # as a train.py without this flag would have saved it
    save_checkpoint(last, content)
    capsys.readouterr()
    assert cli([*flags, "--resume", "--lr", "0.5"]) == 2
    assert "--lr was 0.001" in capsys.readouterr().err
    assert cli([*flags, "--resume"]) == 0
    assert "--mse_weight 0.1 is new since the run began" in capsys.readouterr().out


def test_a_kill_and_a_resume_leave_every_step_once_in_tensorboard(flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = Run([*flags, "--save_every", "2", "--epochs", "3"], tmp_path)
    death = (signal_on, r"^step +6/", signal.SIGKILL)
    assert run_ranks(killed.flags, killed.log, 1, death) == [-signal.SIGKILL]
    assert read_checkpoint(killed.directory / "last.pt")["progress"]["step"] == 4
    time.sleep(1)  # TensorBoard reads its files in the order of the seconds in their names
    assert main(parse_args([*killed.flags, "--resume"])) == 0
    board = EventAccumulator(str(killed.directory / "tb"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 10))
    steps = [event.step for event in board.Scalars("dev/ccc_mean")]
    assert steps[:3] == [3, 6, 9]  # and the best epoch's at the end of the run


def test_the_default_number_of_workers_changes_nothing(finished, tmp_path):
    flags, directory = finished
    at = flags.index("--num_workers")
    args = parse_args([*flags[:at], *flags[at + 2 :], "--out", str(tmp_path)])
    assert args.num_workers > 0 and main(args) == 0
    assert_same(read_checkpoint(directory / "last.pt")["model"], weights_of(args))


# --- the cache of a frozen encoder


def whole_weights(args):
    """All weights of a run's last.pt, its frozen WavLM included."""
    return {**read_checkpoint(run_dir(args) / "frozen.pt")["model"], **weights_of(args)}


def caches(args):
    return sorted(Path(args.cache_dir).glob("hidden-*"))


@pytest.mark.parametrize(
    "pooling", [pytest.param("mean", marks=pytest.mark.slow), "attention", "stats"]
)
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


def test_the_cache_serves_all_folds_and_no_other_encoder(flags, tmp_path):
    flags = [*flags, "--unfreeze", "none", "--max_steps", "1", "--cache_dir", str(tmp_path)]
    count = 0
    for more, new in (
        ([], 1), (["--fold", "2"], 0), (["--lr", "0.5", "--batch_size", "4"], 0),
        (["--layers", "2"], 1), (["--pooling", "attention"], 1), (["--pooling", "stats"], 1),
        (["--amp", "bf16"], 1), (["--max_seconds", "0.9"], 1),
    ):  # fmt: skip
        args = parse_args([*flags, *more, "--overwrite"])
        assert main(args) == 0
        count += new
        assert len(caches(args)) == count, more
    wavlm = load_wavlm(args.wavlm, None, None)
    with torch.no_grad():
        wavlm.encoder.layers[0].final_layer_norm.bias[0] += 1e-6
    save_wavlm(wavlm, tmp_path / "other")
    assert main(parse_args([*flags, "--overwrite", "--wavlm", str(tmp_path / "other")])) == 0
    assert len(caches(args)) == count + 1  # one weight changed by a millionth


def test_a_progressive_run_leaves_the_cache_when_the_encoder_trains(flags):
    fed = []

    def note(module, inputs, output):
        if type(module).__name__ == "EmotionModel" and module.training and not output.is_meta:
            fed.append("hidden" in inputs[0])

    args = parse_args([*flags, "--unfreeze", "1:none,2:all,3:none", "--epochs", "3"])
    with register_module_forward_hook(note):
        assert main(args) == 0
    assert fed == [True] * 3 + [False] * 3 + [True] * 3
    # the third epoch's states are those of the weights that the second one trained
    fold = data.load_fold(args)
    model = step.build_model(args, fold.shape)
    load_weights(model, read_checkpoint(run_dir(args) / "best.pt")["model"], run_dir(args))
    preds = step.evaluate(model, fold.dataset, fold.splits["test"], fold.dialogs, args, CPU).preds
    with open(run_dir(args) / "predictions_test.csv", newline="") as file:
        written = torch.tensor([float(row["pred_valence"]) for row in csv.DictReader(file)])
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
    (values,) = cache.glob("part-*/hidden.bin")
    with open(values, "ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match="is damaged: delete it"):
        main(parse_args([*flags, "--overwrite"]))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match=r"--cache_dir .*: part-0000.*No space left on device"):
        main(parse_args([*flags, "--overwrite", "--layers", "1"]))
    assert [len(list(path.glob("part-*"))) for path in caches(args)] in ([0, 1], [1, 0])


# --- contract 4: evaluation


def test_evaluation_does_not_depend_on_batch_size_and_keeps_the_order_of_rows(flags):
    args, fold, model = prepared(flags)
    given = (model, fold.dataset, fold.splits["test"], fold.dialogs)
    preds = step.evaluate(*given, args, CPU).preds
    smaller = parse_args([*flags, "--batch_size", "2"])
    assert torch.equal(preds, step.evaluate(*given, smaller, CPU).preds)
    model.eval()
    with torch.no_grad():
        for i in (0, 7, len(preds) - 1):
            alone = model(fold.dataset[BatchSpec(((fold.splits["test"][i],),))])
            torch.testing.assert_close(preds[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_evaluation_with_context_tracks_whole_dialogues(flags):
    args, fold, model = prepared(flags, "--context", "2")
    rows, dialogs = fold.splits["test"], fold.dialogs
    preds = step.evaluate(model, fold.dataset, rows, dialogs, args, CPU).preds
    model.eval()
    first = [i for i, row in enumerate(rows) if dialogs[row] == dialogs[rows[0]]]
    with torch.no_grad():
        turns = [model.encode(fold.dataset[BatchSpec(((rows[i],),))]) for i in first]
        tracked = model.track(torch.cat(turns).unsqueeze(0))[0][0]
    assert len(first) == 4
    torch.testing.assert_close(preds[first], tracked, rtol=1e-4, atol=1e-5)


@pytest.fixture
def incomplete(corpus, flags, tmp_path):
    """Flags of a run without a third of the labels of valence, nor arousal in dev of fold 1."""
    table = pd.read_csv(corpus)
    table.loc[table["session"] == 2, "arousal"] = np.nan
    table.loc[(table["session"] != 2) & (table.index % 3 == 0), "valence"] = np.nan
    table.to_csv(tmp_path / "incomplete.csv", index=False)
    return [*flags, "--data", str(tmp_path / "incomplete.csv"), "--data_dir", str(corpus.parent)]


@pytest.mark.parametrize("loss", [["ccc"], ["mse"], ["mse", "--context", "2", "--feedback"]])
def test_missing_labels_are_the_same_however_a_batch_is_split(incomplete, tmp_path, loss):
    flags = [
        *incomplete,
        *NO_DROPOUT,
        "--global_batch_size",
        "16",
        "--loss",
        *loss,
        "--epochs",
        "1",
    ]
    if "--feedback" in loss:
        flags += ["--exact_ccc", "off"]  # does not matter to MSE
    alone = parse_args([*flags, "--batch_size", "16", "--name", "alone"])
    assert main(alone) == 0
    more = [*flags, "--batch_size", "4", "--name", "ranks"]
    assert run_ranks(more, tmp_path / "log", 2) == [0, 0], (tmp_path / "log").read_text()
    losses = [[r["loss"] for r in records(a, "train")] for a in (alone, parse_args(more))]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5) and losses[0]
    assert_same(weights_of(alone), weights_of(parse_args(more)), rtol=1e-3, atol=2e-5)


def test_a_run_with_missing_labels_is_scored_and_reported_by_those_there_are(
    incomplete, tmp_path, capsys
):
    for fold in ("1", "2", "3"):
        assert cli([*incomplete, "--fold", fold, "--name", "x"]) == 0
        if fold == "1":
            assert "dev: no label of arousal: its CCC says nothing" in capsys.readouterr().out
    directory = tmp_path / "runs/x"
    result = json.loads((directory / "fold1/result.json").read_text())
    assert result["dev"]["ccc_arousal"] is None and result["dev"]["rmse_arousal"] is None
    assert result["dev"]["ccc_mean"] == result["dev"]["ccc_valence"]
    predict.export(str(directory / "fold1"), tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert re.search(r"- dev, 24 utterances: CCC valence -?0\.\d+\n", card), card
    table = pd.read_csv(directory / "fold1/predictions_test.csv")
    known = table["valence"].notna()
    assert known.sum() == 16 and table["arousal"].notna().all()
    error = (table["valence"] - table["pred_valence"])[known]
    assert result["test"]["rmse_valence"] == pytest.approx((error**2).mean() ** 0.5, abs=1e-5)
    read_predictions(directory / "fold1/predictions_dev.csv", TARGETS)
    capsys.readouterr()
    words = [str(directory), str(directory), "--out", str(tmp_path)]
    assert report.main(report.parse_args(words)) == 0
    said = capsys.readouterr().out
    assert "nan" not in said and (tmp_path / "report.html").exists()
    assert report.main(report.parse_args([str(directory), "--json"])) == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["folds"]["2"]["test/ccc_arousal"] is None  # the test split of fold 2 is session 2
    assert found["mean"]["test/ccc_arousal"] is None and found["mean"]["test/ccc_valence"]
    pooled = pd.concat(pd.read_csv(p) for p in sorted(directory.glob("*/predictions_test.csv")))
    pooled = pooled.dropna(subset="arousal")
    covariance = np.cov(pooled["arousal"], pooled["pred_arousal"], ddof=0)
    shift = pooled["arousal"].mean() - pooled["pred_arousal"].mean()
    ccc = 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + shift**2)
    assert found["pooled"]["ccc_arousal"] == pytest.approx(ccc, abs=1e-5)


def test_a_dev_split_without_a_label_of_what_trains_is_refused(incomplete, capsys):
    assert cli([*incomplete, "--valence_weight", "0"]) == 2
    said = capsys.readouterr().err
    assert "--target_weights 0 1: arousal" in said and "dev has no label of it" in said
    assert len(said.splitlines()) == 1
    assert cli([*incomplete, "--valence_weight", "0", "--fold", "2", "--dry_run"]) == 0


def test_metrics_count_the_labels_of_each_target():
    rng = np.random.default_rng(0)
    preds, labels = torch.tensor(rng.uniform(size=(2, 20, 2)))
    known = torch.tensor(rng.uniform(size=20) < 0.6)
    whole = metrics(preds, labels, TARGETS)
    part = metrics(preds[known], labels[known], TARGETS)
    labels[~known, 0] = torch.nan
    found = metrics(preds, labels, TARGETS)
    for name in ("ccc", "pcc", "rmse"):
        assert found[f"{name}_valence"] == pytest.approx(part[f"{name}_valence"])
        assert found[f"{name}_arousal"] == pytest.approx(whole[f"{name}_arousal"])
    labels[:, 0] = torch.nan
    found = metrics(preds, labels, TARGETS)
    assert np.isnan(found["ccc_valence"]) and found["ccc_mean"] == found["ccc_arousal"]


# --- which epoch is the best


def test_the_best_epoch_is_that_of_the_targets_that_train(flags):
    args = parse_args([*flags, "--valence_weight", "1", "--epochs", "3", "--lr", "0.01"])
    assert main(args) == 0
    cccs = [record["dev/ccc_valence"] for record in records(args, "dev")]
    result = json.loads((run_dir(args) / "result.json").read_text())
    assert result["best_epoch"] == 1 + int(np.argmax(cccs))
    scores = {"ccc_valence": 0.1, "ccc_arousal": 0.9}
    for weight, score in (("1", 0.1), ("0", 0.9), ("0.5", 0.5), ("0.01", 0.5)):
        args = parse_args([*flags, "--valence_weight", weight])
        assert step.selection_score(scores, args) == pytest.approx(score)


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (("dev", "valence", [0.5]), [], ["dev: all 24 labels of valence are 0.5: its CCC says"]),
        (
            ("dev", "valence", [0.5]),
            ["--valence_weight", "1"],
            ["no dev CCC of valence can differ from 0: epoch 1 counts as the best"],
        ),
        (
            ("dev", "valence", [0.5]),
            ["--valence_weight", "0"],
            ["highest dev CCC of arousal\n"],
        ),
        (("test", "arousal", [1]), [], ["test: all 24 labels of arousal are 1: its CCC says"]),
        (
            ("train", "arousal", [0]),
            [],
            ["train: all 24 labels of arousal are 0: there"],
        ),
        (
            ("dev", "row", 1),
            [],
            ["dev: 1 label of valence", "dev: 1 label of arousal", "can differ"],
        ),
    ],
)
def test_labels_that_give_no_score_are_told_at_the_start(
    corpus, flags, tmp_path, capsys, change, words, said
):
    table = pd.read_csv(corpus)
    table["split"] = table["session"].map({1: "test", 2: "dev", 3: "train"})
    split, what, values = change
    rows = table["split"] == split
    if what == "row":
        table = table[~rows | (rows.cumsum() <= values)]
    else:
        table.loc[rows, what] = np.resize(values, rows.sum())
    table.to_csv(tmp_path / "corpus.csv", index=False)
    more = ["--data", str(tmp_path / "corpus.csv"), "--data_dir", str(corpus.parent), "--dry_run"]
    assert cli([*flags, *more, *words]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in said), out
    if words == ["--valence_weight", "0"]:
        assert "can differ" not in out


# --- the run directory


def test_a_run_leaves_the_files_of_the_design(corpus, small_wavlm, tmp_path):
    args = parse_args([*quick_flags(corpus, small_wavlm, tmp_path), "--fold", "2"])
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


def test_another_seed_is_another_run(flags, finished):
    args = parse_args([*flags, "--seed", "1"])  # the same seed: the default number of workers
    assert main(args) == 0
    first = parse_args(finished[0])
    assert records(args, "train")[0]["loss"] != records(first, "train")[0]["loss"]


# --- schedules


def test_unfreeze_schedules_parse_and_apply_from_their_epoch_on():
    stages = [step.stage_at("1:none,11:top:4,21:all", epoch) for epoch in (0, 9, 10, 19, 20, 99)]
    assert stages == ["none", "none", "top:4", "top:4", "all", "all"]
    assert step.stage_at("transformer", 3) == "transformer"


def test_learning_rate_rises_then_falls_to_zero_along_a_cosine():
    rates = [step.lr_at(number, 100, 0.1, "cosine") for number in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert {step.lr_at(number, 100, 0.0, "none") for number in range(100)} == {1.0}


def test_groups_hold_every_trained_parameter_once_at_its_rate(flags):
    more = ("--encoder_lr", "1e-5", "--lr_reference_batch", "4")  # half of --batch_size 8
    args, _, model = prepared(flags, "--unfreeze", "1:none,2:top:1", *more)
    optimizer = step.build_optimizer(model, args)
    step.set_trainable(model, "top:1")
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})
    for group in optimizer.param_groups:
        assert group["peak_lr"] == (2e-5 if group["name"].startswith("wavlm") else 2e-3)
        decayed = all(p.ndim >= 2 for p in group["params"])
        assert group["weight_decay"] == (0.01 if decayed else 0)


def test_frozen_weights_do_not_move_and_unfrozen_ones_do(flags):
    args, _, model = prepared(flags, "--unfreeze", "top:1", "--weight_decay", "0.1")
    start = model.encoder.state_dict()
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


def test_film_alone_can_be_trained_from_an_earlier_run(flags, finished):
    start = ["--init_from", str(finished[1]), "--train_only", "film", "--unfreeze", "none"]
    args = parse_args([*flags, *start])
    assert main(args) == 0
    before, after = read_checkpoint(finished[1] / "best.pt")["model"], whole_weights(args)
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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_where_compile_does_not_work_the_run_is_that_without_it(flags, tmp_path, ranks):
    plain = Run([*flags, "--epochs", "1"], tmp_path / "plain", ranks)
    broken = Run([*flags, "--epochs", "1", "--compile"], tmp_path / "compiled", ranks)
    assert run_ranks(plain.flags, plain.log, ranks) == [0] * ranks
    without = (without_compiler, tmp_path / "kernels")
    codes = run_ranks(broken.flags, broken.log, ranks, without, seconds=500)
    assert codes == [0] * ranks, broken.console()
    said = [line for line in broken.console().splitlines() if "--compile does not work" in line]
    assert len(said) == 1 and "on cpu, the layers run as they are: " in said[0]
    assert "Traceback" not in broken.console()
    assert_same_outcome(plain, broken)


def without_compiler(folder):
    """In a rank, before it starts: rank 0 has no C++ compiler, and nothing is compiled yet."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}-{os.environ.get('RANK', '0')}"
    if os.environ.get("RANK", "0") == "0":
        torch._inductor.config.cpp.cxx = ("/nowhere/g++",)


def test_an_error_of_the_model_itself_keeps_its_traceback_under_compile(flags, capsys):
    def fail(module, inputs):
        if type(module).__name__ == "Layer":
            raise ValueError("a mistake in my layer")

    with register_module_forward_pre_hook(fail):
        assert cli([*flags, "--compile"]) == 1
    said = capsys.readouterr()
    assert "Traceback" in said.err and "a mistake in my layer" in said.err
    assert "--compile does not work" not in said.out


# --- presets and errors


def test_presets_set_flags_and_a_flag_given_by_hand_wins():
    assert parse_args(["--preset", "max"]).d_state == 128
    args = parse_args(["--preset", "max", "--d_state", "32"])
    assert (args.d_state, args.mamba_layers) == (32, 3)
    assert parse_args(["--preset", "large_batch", "--encoder", "convnext"]).batch_size == 1024


def test_batch_sizes_are_derived_from_each_other():
    args = parse_args(["--batch_size", "4", "--global_batch_size", "32"])
    assert args.gradient_accumulation_steps == 8
    args = parse_args(["--batch_size", "4", "--gradient_accumulation_steps", "3"], world_size=2)
    assert args.global_batch_size == 24


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--encoder", "hubert"], "--encoder"),
        (["--data", "nowhere.csv"], "--data nowhere.csv: no such file"),
        (["--label_range", "0", "inf"], "LO must be below HI"),
        (["--seed", "99999999999999999999"], "below 2^63"),
        (["--gpu_gib", "-5"], "--gpu_gib: -5 must be at least 0.1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps: 0 must"),
        (["--global_batch_size", "-8"], "--global_batch_size: -8 must be at least 1"),
        (["--train_only", "film"], "needs --init_from"),
        (["--unfreeze", "1:none,11:all", "--epochs", "2"], "its last epoch is after --epochs 2"),
        (["--batch_size", "6", "--global_batch_size", "32"], "not a multiple of batch_size 6"),
        (["--batch_size", "4", "--context", "3"], "not a multiple of --context 3"),
        (["--batch_size", "many"], "--batch_size: many must be at least 1, or auto"),
        (["--unfreeze", "half"], "--unfreeze half"),
        (["--encoder", "transformer"], "--features_dir"),
        (["--features_dir", "x"], "not used by --encoder wavlm"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--amp", "fp16", "--device", "cpu"], "needs a GPU"),
        (["--ema_alpha", "2"], "--ema_alpha: 2 must be in 0..1"),
        (["--name", "a/b"], "--name a/b: must not contain /"),
        (["--name", "a/seed1"], "must not contain / (but for NAME/seed0"),
        (["--name", "/seed1", "--seed", "1"], "--name /seed1: must not contain /"),
        (["--epochs", "0"], "--epochs: 0 must be at least 1"),
        (["--label_range", "5", "1"], "LO must be below HI"),
        (["--feature_cache", "on", "--augment"], "remove one of the two"),
        (["--init_from", "/nowhere"], "--init_from /nowhere"),
        (
            ["--feature_cache", "on", "--encoder", "convnext"],
            "is for WavLM, not for --encoder conv",
        ),
        (["--feature_cache", "on", "--unfreeze", "all"], "--unfreeze all freezes no layers"),
        (["--unfreeze", ""], "--unfreeze : none, all"),
        (["--unfreeze", "top:0"], "--unfreeze top:0"),
        (["--unfreeze", "2:all"], "epochs must start at 1 and rise"),
        (["--unfreeze", "1:none,1:all"], "epochs must start at 1 and rise"),
        (["--unfreeze", "1:none,,2:all"], "--unfreeze 1:none,,2:all: none, all"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--max_seconds", "inf"], "--max_seconds: inf must be at least 0.1, and finite"),
        (["--timeout", "nan"], "--timeout: nan must be"),
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
        (["--out", "/proc/x"], "--out: /proc/x/"),
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
    assert cli([*flags, *wrong]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--d_hidden", "64"], "--d_hidden 64: the model of --init_from has 16"),
        (["--prosody", "egemaps"], "--prosody egemaps: the model of --init_from has none"),
        (["--dropout", "0.9"], "--dropout 0.9: the model of --init_from has 0.2"),
        (["--speaker", "VECTORS"], "reads speaker vectors and frames of widths (0, 0)"),
    ],
)
def test_a_model_that_starts_from_another_keeps_its_flags(
    flags, finished, tmp_path, wrong, said, capsys
):
    for i in range(72):
        np.save(tmp_path / f"s{i // 24 + 1}d{i // 4 % 6}t{i % 4}.npy", np.ones(3, np.float32))
    wrong = [str(tmp_path) if word == "VECTORS" else word for word in wrong]
    try:
        assert cli([*flags, "--init_from", str(finished[1]), *wrong]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert said in capsys.readouterr().err


def test_a_model_of_older_code_is_a_start_without_the_flags_that_it_did_not_know(
    flags, finished, tmp_path
):
    older = tmp_path / "older"
    shutil.copytree(finished[1], older)
    known = json.loads((older / "args.json").read_text())
    del known["lora"], known["pooling"]
    (older / "args.json").write_text(json.dumps(known))
    assert parse_args([*flags, "--init_from", str(older)]).pooling == "mean"
    with pytest.raises(SystemExit):
        parse_args([*flags, "--init_from", str(older), "--pooling", "attention"])


def manifest(corpus, path, prefix="", suffix=""):
    """The corpus under other names of its utterances, or with copies of its files."""
    with open(corpus, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        source = corpus.parent / row["path"]
        if suffix:
            shutil.copy(source, path.parent / f"{source.stem}{suffix}")
            source = path.parent / f"{source.stem}{suffix}"
        row |= {"utt_id": prefix + row["utt_id"], "path": str(source)}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_a_model_does_not_start_from_one_that_has_seen_its_dev_or_test(
    flags, finished, corpus, tmp_path, capsys, monkeypatch
):
    """However the corpus is spelled: fold 1 has test 1, dev 2, train 3; here another fold is."""
    start = [*flags, "--init_from", str(finished[1]), "--dry_run", "--data_dir", "/"]
    shutil.copy(corpus, tmp_path / "copy.csv")
    manifest(corpus, tmp_path / "renamed.csv", prefix="x")
    (tmp_path / "other").mkdir()
    manifest(corpus, tmp_path / "other" / "other.csv", suffix="_of_others.wav")
    monkeypatch.chdir(corpus.parent)
    root = ["--data_dir", str(corpus.parent)]
    for fold, spelled, first, fault in (
        ("2", ["--data", "corpus.csv", *root], "s3d0t0", "dev here .* train"),
        ("3", ["--data", "./corpus.csv", *root], "s3d0t0", "test here .* train"),
        ("3", ["--data", str(tmp_path / "copy.csv"), *root], "s3d0t0", "test here .* train"),
        ("2", ["--data", str(tmp_path / "renamed.csv")], "xs3d0t0", "dev here .* train"),
    ):
        assert cli([*start, *spelled, "--fold", fold]) == 2, spelled
        said = capsys.readouterr().err
        wanted = rf"24 utterances of {fault} split: start from the run of this --fold"
        assert re.search(wanted.replace("here", rf"here \(as {first}\)"), said), said
    assert cli([*start, "--data", "corpus.csv", *root, "--fold", "1"]) == 0
    others = ["--data", str(tmp_path / "other" / "other.csv"), "--fold", "3"]
    assert cli([*start, *others]) == 0  # other recordings of the same names


def test_labels_have_the_scale_of_the_run_to_start_from_only_in_a_csv(flags):
    assert cli([*flags, "--label_range", "0", "2", "--max_steps", "1"]) == 0
    start = ["--init_from", str(run_dir(parse_args(flags)))]
    assert parse_args([*flags, *start]).label_range == [0, 2]
    assert parse_args([*flags, *start, "--data", "iemocap"]).label_range is None


def test_a_batch_size_that_was_found_on_one_rank_is_not_split_in_silence(flags, tmp_path):
    flags = [*flags, "--batch_size", "auto", "--global_batch_size", "3"]
    with raise_on(r"^step +1/"):
        assert cli(flags) == 75
    assert run_ranks([*flags, "--resume"], tmp_path / "log", 2) == [2, 2]
    said = (tmp_path / "log").read_text()
    assert "the interrupted run had 1 ranks, this one has 2: start as many" in said


def test_the_gpu_is_set_before_its_memory_is_looked_at(flags, monkeypatch):
    """CUDA starts lazily, and torch's peak of a device that has not been started is an error."""
    calls = []

    def noted(name):
        return lambda *_, **__: calls.append(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", noted("set_device"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", noted("manual_seed_all"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", noted("reset_peak"))
    with pytest.raises((AssertionError, RuntimeError)):  # there is no GPU to put a model on
        main(parse_args([*flags, "--device", "cuda"]))
    assert calls.index("set_device") < calls.index("reset_peak")
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    for name, value in variables.items() | {("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")}:
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"--nproc_per_node: local rank 1 needs GPU 1, this machine has 1"
    ):
        main(parse_args([*flags, "--device", "cuda"]))


def test_overwrite_spares_a_directory_that_is_no_run(flags, capsys):
    directory = run_dir(parse_args(flags))
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    assert cli([*flags, "--overwrite"]) == 2
    assert (directory / "thesis.tex").exists()


@pytest.mark.parametrize("broken", [EmotionModel, WavLM, data.Batches])
def test_an_error_in_code_that_a_researcher_changed_keeps_its_traceback(
    flags, broken, monkeypatch, capsys
):
    def __init__(self, *args, **named):
        raise KeyError("beta")

    monkeypatch.setattr(broken, "__init__", __init__)
    assert cli(flags) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and 'raise KeyError("beta")' in error
    assert error.splitlines()[-1] == "train.py: error: KeyError: 'beta'"


# --- contract 8: nothing is stale, and normalisers see the train split alone


def test_other_audio_is_another_cache_and_only_train_audio_moves_a_normaliser(
    corpus, flags, tmp_path
):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.parent, folder, ignore=shutil.ignore_patterns("cache"))
    table = pd.read_csv(corpus)  # 24 of 72 clips: their eGeMAPS take no processes
    table[table["dialog"].str.endswith(("-0", "-1"))].to_csv(folder / "corpus.csv", index=False)
    more = ["--data", str(folder / "corpus.csv"), "--cache_dir", str(tmp_path / "c")]
    more += ["--unfreeze", "none", "--prosody", "egemaps", "--max_steps", "1", "--overwrite"]
    args, fitted, rows = parse_args([*flags, *more]), [], []
    for count, changed in enumerate((None, "s1d0t0.wav", "s3d0t0.wav"), start=1):  # test, train
        if changed:
            sound, rate = soundfile.read(folder / changed)
            soundfile.write(folder / changed, sound[::-1] * 0.5, rate)  # the same length
            os.utime(folder / changed, (1, 1))
        assert cli([*flags, *more]) == 0
        for kind in ("hidden", "egemaps", "audio"):
            assert len(list((tmp_path / "c").glob(f"{kind}-*"))) == count, kind
        weights = weights_of(args, "best.pt")
        fitted.append(torch.stack([weights["prosody.mean"], weights["prosody.std"]]))
        rows.append(data.load_fold(args).dataset.prosody)
    assert torch.equal(fitted[0], fitted[1]) and not torch.equal(fitted[0], fitted[2])
    names = [utterance.utt_id for utterance in data.load_fold(args).corpus.utterances]
    moved = [name for name, row, other in zip(names, rows[0], rows[1]) if (row != other).any()]
    assert moved == ["s1d0t0"]


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_fused_attention_that_does_not_work_on_the_device_is_replaced_and_said(
    flags, monkeypatch, capsys, fault
):
    softmax = torch.softmax  # of the fused attention on a CPU; eager's is a method

    def broken(scores, dim, **options):
        if scores.is_meta:  # the plan's
            return softmax(scores, dim, **options)
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        return softmax(scores, dim, **options).mul_(1.5)

    monkeypatch.setattr(torch, "softmax", broken)
    assert main(parse_args([*flags, "--max_steps", "1"])) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "sdpa is used" in line]
    reason = "RuntimeError: no kernel image" if fault == "raises" else "differs from eager"
    assert len(said) == 1 and reason in said[0]
