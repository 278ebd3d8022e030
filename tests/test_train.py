"""train.py: equal updates however a batch is split, caches, resume, errors, every encoder."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from helpers import (
    NO_DROPOUT,
    Run,
    assert_same,
    assert_same_outcome,
    data_flags,
    is_model,
    raise_on,
    run_ranks,
    write_arrays,
)
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

import predict
import report
from model import EmotionModel
from train import parse_args
from wavlm import WavLM, load_wavlm, save_wavlm

TARGETS = ("valence", "arousal")
STILL = ("--lr", "0", "--encoder_lr", "0", "--max_steps", "1")  # the weights of the start


@pytest.fixture
def trained(flags, tmp_path):
    """trained(name, *flags): a complete Run of the small corpus and model."""

    def trained(name, *more):
        run = Run([*flags, *more], tmp_path / name)
        assert run.train() == 0
        return run

    return trained


@pytest.fixture
def incomplete(corpus, tmp_path):
    """Flags of data that lacks labels: of valence in test and most of train, of arousal in dev."""

    def drop(table):
        session, third = table["session"], table.index % 3 == 0
        table.loc[session == 2, "arousal"] = np.nan
        table.loc[(session == 1) & third | (session == 3) & ~third, "valence"] = np.nan
        return table

    return data_flags(corpus, tmp_path, drop)


def caches(directory):
    return sorted(directory.glob("hidden-*"))


def predicted(run, table, root, path):
    """predict.py's answers on a table, with utterances as the index."""
    words = ["--checkpoint", run.directory, "--data", table, "--data_dir", root, "--out", path]
    assert predict.main(predict.parse_args([str(word) for word in words])) == 0
    return pd.read_csv(path, index_col="utt_id").filter(like="pred_")


# --- contract 1: the same global batch gives the same update


SPLITS = {  # flags, whether labels are missing (so that some micro-batches have none of valence)
    "ccc": ("--epochs 3", True),
    "mse, feedback": (
        "--epochs 2 --loss mse --exact_ccc off --context 2 --feedback",
        True,
    ),
    "progressive": ("--epochs 3 --context 2 --unfreeze 1:none,2:all,3:top:1", False),
}


@pytest.mark.parametrize("setting", SPLITS)
def test_a_batch_split_into_micro_batches_and_over_ranks_gives_its_update(
    flags, trained, incomplete, tmp_path, setting
):
    """Dropout off: its draws depend on the split."""
    more, lacks_labels = SPLITS[setting]
    more = [*NO_DROPOUT, *more.split(), *(incomplete if lacks_labels else [])]
    more += ["--global_batch_size", "16", "--batch_size"]
    one, four = (trained(name, *more, size) for name, size in (("one", "16"), ("four", "4")))
    ranks = Run([*flags, *more, "4"], tmp_path / "ranks", 2)
    assert ranks.in_ranks() == [0, 0], ranks.console()
    assert len(one.predictions()) == 24  # each once
    for split in (four, ranks):
        assert len(one.losses()) > 1 and split.losses() == pytest.approx(one.losses(), abs=2e-5)
        assert_same(split.weights(), one.weights(), rtol=1e-3, atol=5e-5)
        pd.testing.assert_frame_equal(split.predictions(), one.predictions(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", ["ccc", "mse"])
def test_the_loss_and_its_gradient_are_those_of_the_formulas(trained, incomplete, loss):
    """A missing label is as if its utterance were not there for this target."""
    seen = []

    def watch(module, inputs, preds):
        if is_model(module, preds) and module.training:
            labels = inputs[0]["labels"]
            preds.register_hook(lambda grad: seen.append((preds.detach(), labels, grad)))

    with register_module_forward_hook(watch):
        run = trained("run", *incomplete, "--loss", loss, "--max_steps", "1", "--batch_size", "16")
    ((preds, labels, gradient),) = seen
    preds = preds.double().requires_grad_()
    expected = 0
    for p, y in zip(preds.T, labels.double().T):
        p, y = p[~y.isnan()], y[~y.isnan()]
        mse = (p - y).square().mean()
        covariance = ((p - p.mean()) * (y - y.mean())).mean()
        spread = p.var(correction=0) + y.var(correction=0) + (p.mean() - y.mean()) ** 2
        expected += 0.5 * (mse if loss == "mse" else 1 - 2 * covariance / spread + 0.1 * mse)
    expected.backward()
    assert 0 < labels[:, 0].isnan().sum() < 15
    assert run.losses() == pytest.approx([expected.item()], abs=1e-6)
    torch.testing.assert_close(gradient, preds.grad.float(), rtol=1e-3, atol=1e-6)


def test_the_split_matters_no_more_than_rounding_under_autocast_and_much_without_exact_ccc(trained):
    more = [*NO_DROPOUT, "--epochs", "5", "--eval_every", "5", "--global_batch_size", "16"]
    runs = {
        name: trained(name, *more, *words.split()).weights()
        for name, words in {
            "one": "--amp bf16 --batch_size 16",
            "four": "--amp bf16 --batch_size 4",
            "exact": "--batch_size 16",
            "mean of CCCs": "--batch_size 4 --exact_ccc off",
        }.items()
    }

    def distance(a, b):
        return sum((runs[a][k].double() - runs[b][k].double()).square().sum() for k in runs[a])

    assert 0 < distance("one", "four") < 2 * distance("one", "exact")
    assert distance("exact", "mean of CCCs") > 2 * distance("one", "exact")


def test_the_second_forward_of_exact_ccc_draws_the_dropout_of_the_first(trained):
    seen = []

    def note(module, _, preds):
        if is_model(module, preds) and module.training:
            seen.append(preds.detach().clone())

    more = ["--batch_size", "4", "--gradient_accumulation_steps", "3", "--max_steps", "1"]
    with register_module_forward_hook(note):
        trained("one", *more)
        assert len(seen) == 5  # the first micro-step keeps its graph, the others run twice
        assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[4])
        trained("other", *more, "--seed", "1")
    assert not torch.equal(seen[5], seen[0])  # and dropout was on


@pytest.mark.parametrize("encoder", ["wavlm", "convnext", "baseline"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(trained, encoder):
    more = ["--encoder", encoder, "--base_channels", "4", "--num_blocks", "2", "--max_steps", "2"]
    kept, runs = [], []
    for name, flag in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(0 if x.is_meta else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            runs.append(trained(name, *more, *flag))
        kept.append(sum(sizes))
    assert kept[1] < 0.95 * kept[0]
    assert_same(runs[0].weights(), runs[1].weights())


# --- contract 3: resume


SETTINGS = {  # tests/test_resume.py and tests/test_faults.py stop other runs
    "progressive": [
        "--unfreeze", "1:none,2:top:1,3:all", "--epochs", "3", "--scheduler", "plateau",
        "--num_workers", "2", "--patience", "3",
    ],
    "frozen, accumulated bf16": [
        "--unfreeze", "none", "--max_seconds", "0.8", "--amp", "bf16", "--batch_size", "4",
        "--gradient_accumulation_steps", "2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(flags, trained, setting, tmp_path):
    whole = trained("whole", *SETTINGS[setting])
    parted = Run([*flags, *SETTINGS[setting]], tmp_path / "parted")
    for stop_at in (1, whole.records()[-1]["step"] - 2):  # seen in the step after it
        with raise_on(rf"^step +{stop_at}/"):
            assert parted.train("--resume") == 75
        assert parted.checkpoint()["progress"]["step"] == stop_at + 1
    assert parted.train("--resume") == 0
    assert_same_outcome(whole, parted)


def test_a_finished_run_keeps_what_it_has_and_removes_what_only_a_resume_reads(
    flags, trained, tmp_path, capsys, corpus
):
    flags = [flag for flag in flags if flag != "--keep_last"]
    run = Run([*flags, "--unfreeze", "none"], tmp_path / "run")
    directory, kept = run.directory, tmp_path / "kept.pt"
    with raise_on(r"^step +5/"):
        assert run.train() == 75
    shutil.copy(directory / "last.pt", kept)
    assert run.train("--resume") == 0
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert files.keys() >= {"best.pt", "frozen.pt"}
    assert not files.keys() & {"last.pt", "previous.pt"}
    changed = data_flags(corpus, tmp_path, lambda table: table.replace({table.valence[3]: 0.123}))
    for argv, code, line in (
        ([], 2, "--overwrite"),
        (["--resume"], 0, f"{directory} is complete: nothing to resume"),
        (["--resume", "--lr", "0.5"], 2, "--lr was 0.001"),
        (["--resume", "--fold", "2"], 0, "done in"),
        (["--resume", *changed], 2, "the data differs from that of the interrupted run"),
    ):
        capsys.readouterr()
        assert run.train(*argv) == code
        said = capsys.readouterr()
        assert line in said.out + said.err
    for name in files.keys() - {"train.log", "status.json"}:
        assert (directory / name).read_bytes() == files[name], name
    for name, more, stays in (  # killed after result.json was written
        ("last.pt", ["--keep_last"], True), ("last.pt", [], False), ("previous.pt", [], False),
    ):  # fmt: skip
        shutil.copy(kept, directory / name)
        assert run.train("--resume", *more) == 0
        assert (directory / name).exists() == stays
    assert len(predicted(run, corpus, corpus.parent, tmp_path / "p.csv")) == 72


def test_a_kill_leaves_every_step_once_in_tensorboard_and_new_flags_do_not_stop_a_resume(
    flags, tmp_path, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = Run([*flags, "--save_every", "2", "--epochs", "3"], tmp_path)
    assert killed.in_ranks(fault=(die_on, r"^step +6/")) == [-signal.SIGKILL]
    last = killed.checkpoint()
    assert last["progress"]["step"] == 4
    del last["args"]["mse_weight"]  # as a train.py without this flag would have saved it
    content = io.BytesIO()
    torch.save(last, content)
    content.write(hashlib.sha256(content.getvalue()).digest())
    (killed.directory / "last.pt").write_bytes(content.getvalue())
    assert killed.train("--resume", "--lr", "0.5") == 2
    assert "--lr was 0.001" in capsys.readouterr().err
    time.sleep(1)  # TensorBoard reads its files in the order of the seconds in their names
    assert killed.train("--resume") == 0
    assert "--mse_weight 0.1 is new since the run began" in capsys.readouterr().out
    board = EventAccumulator(str(killed.directory / "tb"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 10))
    steps = [event.step for event in board.Scalars("dev/ccc_mean")]
    assert steps[:3] == [3, 6, 9]  # and the best epoch's at the end of the run


def die_on(pattern):
    raise_on(pattern, signal.SIGKILL).__enter__()


def test_the_default_number_of_workers_changes_nothing(finished, tmp_path):
    at = finished[0].index("--num_workers")
    run = Run([*finished[0][:at], *finished[0][at + 2 :]], tmp_path)
    assert parse_args(run.flags).num_workers > 0 and run.train() == 0
    for split in ("dev", "test"):
        name = f"predictions_{split}.csv"
        assert (run.directory / name).read_bytes() == (finished[1] / name).read_bytes()


# --- the cache of a frozen encoder


def test_the_cache_serves_all_folds_and_no_other_encoder(flags, small_wavlm, tmp_path):
    wavlm = load_wavlm(str(small_wavlm), None, None)
    with torch.no_grad():
        wavlm.encoder.layers[0].final_layer_norm.bias[0] += 1e-6
    save_wavlm(wavlm, tmp_path / "other")
    cache = tmp_path / "cache"
    more = ["--unfreeze", "none", "--max_steps", "1", "--overwrite", "--cache_dir", str(cache)]
    run, count = Run([*flags, *more], tmp_path), 0
    for words, new in (
        ("--augment", 0), ("", 1), ("--fold 2 --lr 0.5 --batch_size 4", 0), ("--layers 2", 1),
        ("--pooling attention", 1),
        ("--pooling stats", 1), ("--amp bf16", 1), ("--max_seconds 0.9", 1),
        (f"--wavlm {tmp_path / 'other'}", 1),  # one weight changed by a millionth
    ):  # fmt: skip
        assert run.train(*words.split()) == 0
        count += new
        assert len(caches(cache)) == count, words
    assert not any(name.startswith("encoder.wavlm.") for name in run.weights())


def test_a_progressive_run_leaves_the_cache_when_the_encoder_trains(trained, corpus, tmp_path):
    fed = []

    def note(module, inputs, output):
        if is_model(module, output) and module.training:
            fed.append("hidden" in inputs[0])

    with register_module_forward_hook(note):
        run = trained("run", "--unfreeze", "1:none,2:all,3:none", "--epochs", "3")
    assert fed == [True] * 3 + [False] * 3 + [True] * 3
    # the third epoch's states are those of the weights that the second one trained
    expected = predicted(run, corpus, corpus.parent, tmp_path / "p.csv").loc[
        run.predictions().index
    ]
    np.testing.assert_allclose(run.predictions(), expected, rtol=0, atol=1e-5)


def test_a_damaged_cache_is_refused_and_a_full_disk_named(flags, tmp_path, monkeypatch, capsys):
    more = ["--unfreeze", "none", "--max_steps", "1", "--cache_dir", str(tmp_path), "--overwrite"]
    run = Run([*flags, *more], tmp_path)
    assert run.train() == 0
    (cache,) = caches(tmp_path)
    (values,) = cache.glob("part-*/hidden.bin")
    with open(values, "ab") as file:
        file.write(b"xx")
    assert run.train() == 2 and "is damaged: delete it" in capsys.readouterr().err

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert run.train("--layers", "1") == 2
    said = capsys.readouterr().err
    assert re.search(r"--cache_dir .*: part-0000.*No space left on device", said), said
    assert [len(list(path.glob("part-*"))) for path in caches(tmp_path)] in ([0, 1], [1, 0])


# --- contract 4: evaluation


def test_evaluation_does_not_depend_on_what_shares_a_batch(trained, corpus, tmp_path):
    one, two = trained("one", *STILL), trained("two", *STILL, "--batch_size", "2")
    table = pd.read_csv(corpus)
    tests = table[table["session"] == 1]
    assert list(one.predictions().index) == list(tests["utt_id"])
    assert one.predictions().equals(two.predictions())
    tests.iloc[[0, 7, 23]].to_csv(tmp_path / "few.csv", index=False)
    alone = predicted(one, tmp_path / "few.csv", corpus.parent, tmp_path / "alone.csv")
    np.testing.assert_allclose(alone, one.predictions().loc[alone.index], rtol=1e-4, atol=1e-5)


def test_evaluation_with_context_tracks_whole_dialogues(trained):
    one, two, four = (
        trained(f"of {turns}", *STILL, "--context", turns).predictions() for turns in "124"
    )
    assert two.equals(four)
    equal = np.isclose(one, two, rtol=1e-4, atol=1e-5).all(1)
    assert list(one.index[equal]) == [name for name in one.index if name.endswith("t0")]


def test_a_run_with_missing_labels_is_scored_and_reported_by_those_there_are(
    flags, incomplete, tmp_path, capsys
):
    run = Run([*flags, *incomplete, "--epochs", "1"], tmp_path)
    for fold in ("1", "2", "3"):
        assert run.train("--fold", fold) == 0
        if fold == "1":
            assert "dev: no label of arousal: its CCC says nothing" in capsys.readouterr().out
    result = run.json("result.json")
    assert result["dev"]["ccc_arousal"] is None and result["dev"]["rmse_arousal"] is None
    assert result["dev"]["ccc_mean"] == result["dev"]["ccc_valence"]
    predict.export(str(run.directory), tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert re.search(r"- dev, 24 utterances: CCC valence -?0\.\d+\n", card), card
    table = pd.read_csv(run.directory / "predictions_test.csv")
    assert table.count()["valence"] == 16 and table.count()["arousal"] == 24
    for target in TARGETS:
        known = table.dropna(subset=target)
        found = {name: result["test"][f"{name}_{target}"] for name in ("ccc", "pcc", "rmse")}
        assert found == pytest.approx(figures(known[target], known[f"pred_{target}"]), abs=1e-5)
    capsys.readouterr()
    words = [str(tmp_path / "run"), str(tmp_path / "run"), "--out", str(tmp_path)]
    assert report.main(report.parse_args(words)) == 0
    said = capsys.readouterr().out
    assert "nan" not in said and (tmp_path / "report.html").exists()
    assert report.main(report.parse_args([words[0], "--json"])) == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["folds"]["2"]["test/ccc_arousal"] is None  # the test split of fold 2 is session 2
    assert found["mean"]["test/ccc_arousal"] is None and found["mean"]["test/ccc_valence"]
    files = sorted((tmp_path / "run").glob("*/predictions_test.csv"))
    pooled = pd.concat(map(pd.read_csv, files)).dropna(subset="arousal")
    ccc = figures(pooled["arousal"], pooled["pred_arousal"])["ccc"]
    assert found["pooled"]["ccc_arousal"] == pytest.approx(ccc, abs=1e-5)


def figures(labels, preds):
    covariance = np.cov(labels, preds, ddof=0)
    spread = covariance[0, 0] + covariance[1, 1] + (labels.mean() - preds.mean()) ** 2
    return {
        "ccc": 2 * covariance[0, 1] / spread,
        "pcc": np.corrcoef(labels, preds)[0, 1],
        "rmse": ((labels - preds) ** 2).mean() ** 0.5,
    }


# --- which epoch is the best


@pytest.mark.parametrize(
    ("weight", "figure"), [("1", "ccc_valence"), ("0", "ccc_arousal"), ("0.01", "ccc_mean")]
)
def test_the_best_epoch_is_that_of_the_targets_that_train(trained, weight, figure):
    run = trained("run", "--valence_weight", weight, "--epochs", "4", "--lr", "0.01")
    cccs = [record[f"dev/{figure}"] for record in run.records("dev")]
    assert run.json("result.json")["best_epoch"] == 1 + int(np.argmax(cccs))
    assert run.json("result.json")["dev"][figure] == pytest.approx(max(cccs), abs=1e-6)


@pytest.mark.parametrize(
    ("split", "target", "value", "words", "code", "said"),
    [
        ("dev", "valence", 0.5, "", 0, "dev: all 24 labels of valence are 0.5: its CCC says"),
        ("dev", "valence", 0.5, "--valence_weight 1", 0,
         "no dev CCC of valence can differ from 0: epoch 1 counts as the best"),
        ("dev", "valence", 0.5, "--valence_weight 0", 0, "highest dev CCC of arousal\n"),
        ("test", "arousal", 1, "", 0, "test: all 24 labels of arousal are 1: its CCC says"),
        ("train", "arousal", 0, "", 0, "train: all 24 labels of arousal are 0: there"),
        ("dev", "row", None, "", 0, "dev: 1 label of valence"),
        ("dev", "arousal", None, "--valence_weight 0", 2, "dev has no label of it"),
        ("dev", "arousal", None, "--valence_weight 0.5", 0, "dev: no label of arousal"),
    ],
)  # fmt: skip
def test_labels_that_give_no_score_are_told_at_the_start(
    corpus, flags, tmp_path, capsys, split, target, value, words, code, said
):
    def change(table):
        table["split"] = table["session"].map({1: "test", 2: "dev", 3: "train"})
        rows = table["split"] == split
        if target == "row":
            return table[~rows | (rows.cumsum() == 1)]
        table.loc[rows, target] = value
        return table

    run = Run([*flags, *data_flags(corpus, tmp_path, change), "--dry_run"], tmp_path)
    assert run.train(*words.split()) == code
    out = "".join(capsys.readouterr())
    assert said in out, out
    assert ("can differ" in out) == (target == "row" or words == "--valence_weight 1")


# --- the run directory


def test_a_run_leaves_the_files_of_the_design(finished):
    flags, directory = finished
    run = Run(flags, directory.parents[2])
    run.directory = directory
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        "args.json", "train.log", "metrics.jsonl", "last.pt", "best.pt", "result.json",
        "predictions_dev.csv", "predictions_test.csv", "splits.json", "tb",
        "curves.png", "scatter.png", "embedding.png",
    }  # fmt: skip
    result = run.json("result.json")
    assert result["splits"] == {"train": 24, "dev": 24, "test": 24}
    assert result["wavlm"] == parse_args(flags).wavlm and result["wavlm_revision"] is None
    assert result["fold"] == 1 and result["num_folds"] == 3 and result["label_range"] == [0, 1]
    assert all(-1 <= result[split]["ccc_mean"] <= 1 for split in ("dev", "test"))
    assert len(run.predictions()) == 24 and all(run.predictions().index.str.startswith("s1"))
    evaluations = run.records("dev")
    assert [record["epoch"] for record in evaluations] == [1, 2]
    best = max(record["dev/ccc_mean"] for record in evaluations)
    assert result["dev"]["ccc_mean"] == pytest.approx(best, abs=1e-6)


# --- what trains, and how fast


@pytest.mark.parametrize("scheduler", ["cosine", "none"])
def test_every_weight_is_in_one_group_at_its_rate_and_moves_from_its_stage_on(
    trained, small_wavlm, scheduler
):
    updates, models = [], []

    def watch(optimizer, *_):
        if not optimizer.param_groups[0]["params"][0].is_meta:  # as the memory plan's are
            updates.append([dict(group) for group in optimizer.param_groups])

    def note(module, _, output):
        if is_model(module, output):
            models.append(module)

    more = ["--encoder_lr", "1e-5", "--lr_reference_batch", "4"]  # half of --batch_size 8
    more += ["--unfreeze", "1:none,2:top:1", "--epochs", "4", "--warmup", "0.25"]
    hook = register_optimizer_step_post_hook(watch)
    with register_module_forward_hook(note):
        run = trained("run", *more, "--scheduler", scheduler)
    hook.remove()
    trained_ids = {id(p) for p in models[-1].parameters() if p.requires_grad}
    for number, groups in enumerate(updates):
        factor = min(1, (number + 1) / 4)  # 3 of 12 steps are the warm-up
        if number >= 3 and scheduler == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * (number - 3) / 9))
        for group in groups:
            peak = 2e-5 if group["name"].startswith("wavlm") else 2e-3
            assert group["lr"] == pytest.approx(peak * factor)
            assert len({p.ndim >= 2 for p in group["params"]}) == 1
            assert group["weight_decay"] == (0.01 if group["params"][0].ndim >= 2 else 0)
        ids = [id(p) for group in groups for p in group["params"]]
        assert set(ids) == trained_ids and len(ids) == len(set(ids))
    assert len(updates) == 12
    assert re.findall(r"epoch (\d) \| unfreeze (\S+)", run.train_log()) == [
        ("1", "none"), ("2", "top:1")
    ]  # fmt: skip
    end = run.weights()
    for name, before in load_wavlm(str(small_wavlm), None, None).state_dict().items():
        moves = name.startswith(("encoder.layers.1.", "encoder.layer_norm"))
        assert torch.equal(before, end[f"encoder.wavlm.{name}"]) != moves, name


@pytest.mark.parametrize(
    "words",
    [
        "--encoder transformer --d_model 64 --features_dir FRAMES --speaker VECTORS",
        "--encoder lightweight_transformer --d_model 256 --features_dir FRAMES --loss mse "
        "--max_grad_norm 0",
        "--pooling attention --d_state 0 --no_film --unfreeze transformer --attention eager "
        "--gradient_checkpointing",
        "--preset large_batch --batch_size 8 --speaker VECTORS",
    ],
)
def test_every_kind_of_model_trains_and_tests(trained, words, tmp_path):
    vectors, frames = write_arrays(tmp_path / "v", 24), write_arrays(tmp_path / "f", 7, 10)
    words = words.replace("VECTORS", vectors).replace("FRAMES", frames)
    run = trained("run", "--epochs", "1", "--num_layers", "1", *words.split())
    assert run.predictions().notna().all(axis=None)


def test_film_alone_can_be_trained_from_an_earlier_run(trained, finished):
    before = Run(finished[0], finished[1].parents[2])
    before.directory = finished[1]
    start = ["--init_from", str(finished[1]), "--train_only", "film", "--unfreeze", "none"]
    run = trained("run", *start)
    one, two = before.weights("best.pt"), run.weights("frozen.pt") | run.weights()
    assert {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])} == {"film"}


# --- torch.compile and fused attention


@pytest.mark.slow
def test_compiled_layers_train_like_plain_ones(trained):
    plain, compiled = trained("plain", *NO_DROPOUT), trained("other", *NO_DROPOUT, "--compile")
    assert plain.losses()[0] == pytest.approx(compiled.losses()[0], abs=1e-4)


@pytest.mark.slow
def test_where_compile_does_not_work_on_one_rank_the_run_is_that_without_it(flags, tmp_path):
    plain = Run([*flags, "--epochs", "1"], tmp_path / "plain", 2)
    broken = Run([*flags, "--epochs", "1", "--compile"], tmp_path / "compiled", 2)
    assert plain.in_ranks() == [0, 0], plain.console()
    fault = (without_compiler, str(tmp_path / "cache"))
    assert broken.in_ranks(fault=fault, seconds=500) == [0, 0], broken.console()
    said = [line for line in broken.console().splitlines() if "--compile does not work" in line]
    assert len(said) == 1 and "on cpu, the layers run as they are: " in said[0]
    assert "Traceback" not in broken.console()
    assert_same_outcome(plain, broken)


def without_compiler(folder):
    """In a rank, before it starts: rank 0 has no C++ compiler, and nothing is compiled yet."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}-{os.environ['RANK']}"
    if os.environ["RANK"] == "0":
        torch._inductor.config.cpp.cxx = ("/nowhere/g++",)


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_fused_attention_that_does_not_work_on_the_device_is_replaced_and_said(
    trained, monkeypatch, fault
):
    softmax = torch.softmax  # of the fused attention on a CPU; eager's is a method

    def broken(scores, dim, **options):
        if scores.is_meta:  # the plan's
            return softmax(scores, dim, **options)
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        return softmax(scores, dim, **options).mul_(1.5)

    monkeypatch.setattr(torch, "softmax", broken)
    log = trained("run", "--max_steps", "1", "--device", "cpu").train_log()
    said = [line for line in log.splitlines() if "sdpa is used" in line]
    reason = "RuntimeError: no kernel image" if fault == "raises" else "differs from eager"
    assert len(said) == 1 and reason in said[0]


# --- a researcher's own mistake


@pytest.mark.parametrize("broken", [EmotionModel, WavLM, "compiled layer"])
def test_an_error_in_code_that_a_researcher_changed_keeps_its_traceback(
    flags, tmp_path, broken, monkeypatch, capsys
):
    def fail(*args, **named):
        if broken != "compiled layer" or type(args[0]).__name__ == "Layer":
            raise KeyError("beta")

    run = Run(flags, tmp_path)
    if broken == "compiled layer":
        with register_module_forward_pre_hook(fail):
            assert run.train("--compile") == 1
    else:
        monkeypatch.setattr(broken, "__init__", fail)
        assert run.train() == 1
    said = capsys.readouterr()
    assert "Traceback" in said.err and 'raise KeyError("beta")' in said.err
    assert said.err.splitlines()[-1] == "train.py: error: KeyError: 'beta'"
    assert "--compile does not work" not in said.out


# --- flags


def test_presets_set_flags_a_flag_given_by_hand_wins_and_batch_sizes_follow_from_each_other():
    assert parse_args(["--preset", "max"]).d_state == 128
    args = parse_args(["--preset", "max", "--d_state", "32"])
    assert (args.d_state, args.mamba_layers) == (32, 3)
    assert parse_args(["--preset", "large_batch", "--encoder", "convnext"]).batch_size == 1024
    args = parse_args(["--batch_size", "4", "--global_batch_size", "32"])
    assert args.gradient_accumulation_steps == 8
    args = parse_args(["--batch_size", "4", "--gradient_accumulation_steps", "3"], world_size=2)
    assert args.global_batch_size == 24


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--encoder hubert", "--encoder"),
        ("--data nowhere.csv", "--data nowhere.csv: no such file"),
        ("--label_range 0 inf", "LO must be below HI"),
        ("--label_range 5 1", "LO must be below HI"),
        ("--seed 99999999999999999999", "below 2^63"),
        ("--gpu_gib -5", "--gpu_gib: -5 must be at least 0.1"),
        ("--epochs 0", "--epochs: 0 must be at least 1"),
        ("--max_steps 0", "--max_steps 0"),
        ("--max_seconds inf", "--max_seconds: inf must be at least 0.1, and finite"),
        ("--timeout nan", "--timeout: nan must be"),
        ("--ema_alpha 2", "--ema_alpha: 2 must be in 0..1"),
        ("--train_only film", "needs --init_from"),
        ("--init_from /nowhere", "--init_from /nowhere"),
        ("--batch_size 6 --global_batch_size 32", "not a multiple of batch_size 6"),
        ("--batch_size 4 --context 3", "not a multiple of --context 3"),
        ("--batch_size many", "--batch_size: many must be at least 1, or auto"),
        ("--encoder transformer", "--features_dir"),
        ("--features_dir x", "not used by --encoder wavlm"),
        ("--encoder lightweight_transformer --features_dir f --d_model 896", "multiple of 256"),
        ("--resume --overwrite", "exclude each other"),
        ("--amp fp16 --device cpu", "needs a GPU"),
        ("--name a/b", "--name a/b: must not contain /"),
        ("--name a/seed1", "must not contain / (but for NAME/seed0"),
        ("--name /seed1 --seed 1", "--name /seed1: must not contain /"),
        ("--feature_cache on --augment", "remove one of the two"),
        ("--feature_cache on --encoder convnext", "is for WavLM, not for --encoder conv"),
        ("--feature_cache on --unfreeze all", "--unfreeze all freezes no layers"),
        ("--unfreeze half", "--unfreeze half: none, all"),
        ("--unfreeze=", "--unfreeze : none, all"),
        ("--unfreeze top:0", "--unfreeze top:0"),
        ("--unfreeze 2:all", "epochs must start at 1 and rise"),
        ("--unfreeze 1:none,1:all", "epochs must start at 1 and rise"),
        ("--unfreeze 1:none,,2:all", "--unfreeze 1:none,,2:all: none, all"),
        ("--unfreeze 1:none,11:all --epochs 2", "its last epoch is after --epochs 2"),
        ("--feedback", "give --context above 1"),
        ("--feedback --context 4 --d_state 0", "and --d_state"),
        ("--speaker ecapa --no_film", "remove it, or --no_film"),
        ("--eval_every 2 --separation_every 3", "a multiple of --eval_every"),
        ("--eval_every 2 --plot_every 1", "a multiple of --eval_every"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(wrong.split())
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--out /proc/x", "--out: /proc/x/"),
        ("--fold 9", "9"),
        ("--label_range 0 0.5", "row"),
        ("--wavlm /nowhere", "--wavlm"),
        ("--unfreeze top:9", "--unfreeze top:9"),
        ("--layers 5", "--layers"),
        ("--batch_size 64", "--batch_size"),
        ("--encoder transformer --features_dir /nowhere", "--features_dir"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(flags, tmp_path, wrong, said, capsys):
    assert Run(flags, tmp_path).train(*wrong.split()) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 2


# --- --init_from


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--d_hidden 64", "--d_hidden 64: the model of --init_from has 16"),
        ("--prosody egemaps", "--prosody egemaps: the model of --init_from has none"),
        ("--dropout 0.9", "--dropout 0.9: the model of --init_from has 0.2"),
        ("--speaker VECTORS", "reads speaker vectors and frames of widths (0, 0)"),
    ],
)
def test_a_model_that_starts_from_another_keeps_its_flags(
    flags, finished, tmp_path, wrong, said, capsys
):
    wrong = wrong.replace("VECTORS", write_arrays(tmp_path / "vectors", 3)).split()
    assert Run(flags, tmp_path).train("--init_from", str(finished[1]), *wrong) == 2
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


def test_a_model_does_not_start_from_one_that_has_seen_its_dev_or_test(
    flags, finished, corpus, tmp_path, capsys, monkeypatch
):
    """However the corpus is spelled: fold 1 has test 1, dev 2, train 3; here another fold is."""
    start = ["--init_from", str(finished[1]), "--dry_run", "--data_dir", "/"]
    table = pd.read_csv(corpus)
    table["path"] = [str(corpus.parent / path) for path in table["path"]]
    shutil.copy(corpus, tmp_path / "copy.csv")
    renamed = table.assign(utt_id="x" + table["utt_id"])
    renamed.to_csv(tmp_path / "renamed.csv", index=False)
    copies = [shutil.copy(path, tmp_path / f"{i}.wav") for i, path in enumerate(table["path"])]
    table.assign(path=copies).to_csv(tmp_path / "others.csv", index=False)
    monkeypatch.chdir(corpus.parent)
    root = ["--data_dir", str(corpus.parent)]
    run = Run(flags, tmp_path)
    for fold, spelled, first, fault in (
        ("2", ["--data", "corpus.csv", *root], "s3d0t0", "dev here .* train"),
        ("3", ["--data", "./corpus.csv", *root], "s3d0t0", "test here .* train"),
        ("3", ["--data", str(tmp_path / "copy.csv"), *root], "s3d0t0", "test here .* train"),
        ("2", ["--data", str(tmp_path / "renamed.csv")], "xs3d0t0", "dev here .* train"),
    ):
        assert run.train(*start, *spelled, "--fold", fold) == 2, spelled
        said = capsys.readouterr().err
        wanted = rf"24 utterances of {fault} split: start from the run of this --fold"
        assert re.search(wanted.replace("here", rf"here \(as {first}\)"), said), said
    assert run.train(*start, "--data", "corpus.csv", *root, "--fold", "1") == 0
    others = ["--data", str(tmp_path / "others.csv"), "--fold", "3"]
    assert run.train(*start, *others) == 0  # other recordings of the same names


def test_labels_have_the_scale_of_the_run_to_start_from_only_in_a_csv(flags, trained):
    run = trained("run", "--label_range", "0", "2", "--max_steps", "1")
    start = ["--init_from", str(run.directory)]
    assert parse_args([*flags, *start]).label_range == [0, 2]
    assert parse_args([*flags, *start, "--data", "iemocap"]).label_range is None


# --- the machine and the directory


def test_a_batch_size_that_was_found_on_one_rank_is_not_split_in_silence(flags, tmp_path):
    run = Run([*flags, "--batch_size", "auto", "--global_batch_size", "3"], tmp_path)
    with raise_on(r"^step +1/"):
        assert run.train() == 75
    assert run_ranks([*run.flags, "--resume"], run.log, 2) == [2, 2]
    said = "the interrupted run had 1 ranks, this one has 2: start as many"
    assert said in run.console()


def test_the_gpu_is_set_before_its_memory_is_looked_at(flags, tmp_path, monkeypatch, capsys):
    """CUDA starts lazily, and torch's peak of a device that has not been started is an error."""
    calls = []

    def noted(name):
        return lambda *_, **__: calls.append(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("set_device", "manual_seed_all", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, noted(name))
    run = Run([*flags, "--device", "cuda"], tmp_path)
    assert run.train() == 1  # there is no GPU to put a model on
    assert calls.index("set_device") < calls.index("reset_peak_memory_stats")
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    for name, value in variables.items() | {("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")}:
        monkeypatch.setenv(name, value)
    assert run.train() == 2
    said = capsys.readouterr().err
    assert "--nproc_per_node: local rank 1 needs GPU 1, this machine has 1" in said


def test_overwrite_spares_a_directory_that_is_no_run(flags, tmp_path):
    run = Run(flags, tmp_path)
    run.directory.mkdir(parents=True)
    (run.directory / "thesis.tex").write_text("years of work")
    assert run.train("--overwrite") == 2
    assert (run.directory / "thesis.tex").exists()


# --- contract 8: nothing is stale, and normalisers see the train split alone


def test_other_audio_is_another_cache_and_only_train_audio_moves_a_normaliser(
    corpus, flags, tmp_path
):
    folder, cache = tmp_path / "corpus", tmp_path / "cache"
    shutil.copytree(corpus.parent, folder, ignore=shutil.ignore_patterns("cache"))
    table = pd.read_csv(corpus)  # 24 of 72 clips: their eGeMAPS take no processes
    table[table["dialog"].str.endswith(("-0", "-1"))].to_csv(folder / "corpus.csv", index=False)
    more = ["--data", str(folder / "corpus.csv"), "--cache_dir", str(cache), *STILL]
    run = Run([*flags, *more, "--unfreeze", "none", "--prosody", "egemaps"], tmp_path)
    fitted, answers = [], []
    for count, changed in enumerate((None, "s1d0t0.wav", "s3d0t0.wav"), start=1):  # test, train
        if changed:
            sound, rate = soundfile.read(folder / changed)
            soundfile.write(folder / changed, sound[::-1] * 0.5, rate)  # the same length
            os.utime(folder / changed, (1, 1))
        assert run.train("--overwrite") == 0
        for kind in ("hidden", "egemaps", "audio"):
            assert len(list(cache.glob(f"{kind}-*"))) == count, kind
        weights = run.weights()
        fitted.append(torch.stack([weights["prosody.mean"], weights["prosody.std"]]))
        answers.append(run.predictions())
    assert torch.equal(fitted[0], fitted[1]) and not torch.equal(fitted[0], fitted[2])
    moved = (answers[0] != answers[1]).any(axis=1)
    assert list(moved[moved].index) == ["s1d0t0"]
