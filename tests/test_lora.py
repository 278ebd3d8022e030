"""--lora: updates beside a WavLM whose own weights stay: closed forms, runs, exports, plans."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import NO_DROPOUT, Run, assert_same, assert_same_outcome, raise_on

import data
import predict
import step
from flags import parse_args
from train import cli
from util.runs import load_model, run_dir
from wavlm import ATTENTIONS, LORA, add_lora, load_wavlm, merge_lora

CPU = torch.device("cpu")
LORA_4 = ["--unfreeze", "none", "--lora", "4"]


def built(flags, *more):
    """(args, the model that a run of these flags starts with)."""
    args = parse_args([*flags, *more])
    shape = data.load_fold(args).shape
    torch.manual_seed(args.seed)
    return args, step.build_model(args, shape)


@pytest.fixture
def audio():
    generator = torch.manual_seed(1)
    mask = torch.arange(9_000) < torch.tensor([[9_000], [6_000]])
    return torch.randn(2, 9_000, generator=generator), mask


def outputs(model, audio):
    return torch.stack(list(model(*audio, layers=(0, 1, 2))[0].values()))


def updates_of(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(LORA)}


@pytest.fixture
def pair(small_wavlm):
    """A WavLM, and the same with updates of rank 3 that count twice and are not zero."""
    plain = load_wavlm(str(small_wavlm)).eval()
    updated = copy.deepcopy(plain)
    add_lora(updated, 3, 6.0)
    for parameter in updates_of(updated).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return plain, updated


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_an_update_changes_nothing_before_it_trains_and_is_the_one_merged_after(
    pair, audio, kind, amp
):
    plain, updated = pair
    plain.attention = updated.attention = kind
    with torch.no_grad(), step.autocast(CPU, amp):
        before, trained = outputs(plain, audio), outputs(updated, audio)
        assert torch.equal(trained[0], before[0]) and not torch.equal(trained[1], before[1])
        merge_lora(updated)
        error = (outputs(updated, audio) - trained).abs().max()
        assert error < (1e-5 if amp == "off" else 0.05) * before.abs().max()
        assert plain.state_dict().keys() == updated.state_dict().keys()
        add_lora(plain, 3, 6.0)
        assert torch.equal(outputs(plain, audio), before)


def test_gradients_of_an_update_are_those_of_the_dense_weight_times_the_other_factor(pair, audio):
    _, updated = pair
    merged = copy.deepcopy(updated)
    merge_lora(merged)
    updated.set_trainable("lora")
    for model in (updated.double(), merged.double()):
        outputs(model, (audio[0].double(), audio[1])).square().sum().backward()
    moved = {name for name, p in updated.named_parameters() if p.grad is not None}
    assert moved == updates_of(updated).keys() and len(moved) == 2 * 4 * 2
    for layer, dense_layer in zip(updated.encoder.layers, merged.encoder.layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            low, dense = getattr(layer.attention, name), getattr(dense_layer.attention, name)
            for ours, theirs in (
                (low.lora_a.grad, 2 * low.lora_b.T @ dense.weight.grad),
                (low.lora_b.grad, 2 * dense.weight.grad @ low.lora_a.T),
            ):
                assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_a_model_starts_as_without_updates_and_has_a_group_of_its_own_for_them(flags):
    _, plain = built(flags, "--unfreeze", "none")
    args, model = built(flags, *LORA_4, "--encoder_lr", "0.5")
    assert parse_args(["--preset", "verify", "--lora", "4"]).unfreeze == args.unfreeze == "lora"
    before, now = plain.state_dict(), model.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before)
    groups = {group["name"]: group for group in step.param_groups(model, args)}
    assert groups["lora, decayed"]["lr"] == args.lr and "wavlm, decayed" not in groups
    trained = [p.numel() for p in groups["lora, decayed"]["params"]]
    assert trained == [4 * 32] * 2 * 4 * 2  # two factors, four projections, two layers


def test_a_run_moves_updates_and_heads_alone_and_its_export_is_a_plain_wavlm(
    flags, corpus, audio, tmp_path
):
    from transformers import WavLMModel

    flags = [*flags, *LORA_4, "--lora_alpha", "8"]
    run = Run(flags, tmp_path / "run")
    assert run.train() == 0
    assert "unfreeze lora | trains lora, decayed 0.002 M at lr 1.0e-03" in run.train_log()
    directory = run.directory
    for name in ("last.pt", "best.pt"):
        saved = {k for k in run.weights(name) if k.startswith("encoder.")}
        assert len(saved) == 2 * 4 * 2 and all(key.endswith(LORA) for key in saved)
    assert not any(key.endswith(LORA) for key in run.weights("frozen.pt"))
    model, _ = load_model(directory, "")
    _, before = built(flags)
    weights, old = model.state_dict(), before.state_dict()
    still = {name for name in weights if torch.equal(weights[name], old[name])}
    assert still == {k for k in weights if k.startswith("encoder.") and not k.endswith(LORA)}

    predict.export(str(directory), tmp_path / "model")
    exported, content = load_model(tmp_path / "model", "")
    assert exported.config.lora == 0 == content["args"]["lora"]
    theirs = WavLMModel.from_pretrained(tmp_path / "model" / "wavlm").eval()
    with torch.no_grad():
        states, _ = model.encoder.wavlm(*audio)
        found = theirs(audio[0], attention_mask=audio[1].long()).last_hidden_state
        torch.testing.assert_close(found[0], states[2][0], rtol=0, atol=1e-5)
    clips, csvs = [str(path) for path in sorted(corpus.parent.glob("s1*.wav"))], []
    for source in (directory, tmp_path / "model"):
        argv = ["--checkpoint", str(source), "--out", str(tmp_path / "out.csv"), *clips]
        assert predict.main(predict.parse_args(argv)) == 0
        csvs.append(pd.read_csv(tmp_path / "out.csv").filter(like="pred_").to_numpy())
    assert csvs[0].shape == (24, 2) and np.abs(csvs[0] - csvs[1]).max() < 1e-5

    start = [*flags, "--init_from", str(directory), "--train_only", "film", "--name", "again"]
    assert cli(start) == 0
    after = load_model(run_dir(parse_args(start)), "")[0].state_dict()
    assert {k.split(".")[0] for k in after if not torch.equal(after[k], weights[k])} == {"film"}


def test_a_step_is_the_same_from_cache_and_audio_with_and_without_checkpointing(flags, tmp_path):
    run, weights = Run([*flags, *LORA_4, "--epochs", "1", "--overwrite"], tmp_path), []
    for more in ("off", "exact", "exact --gradient_checkpointing"):
        assert run.train("--feature_cache", *more.split()) == 0
        weights.append(run.weights())
    assert_same(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert_same(weights[1], weights[2])


def test_a_run_whose_updates_begin_later_resumes_bit_for_bit(flags, tmp_path):
    flags = [*flags, "--unfreeze", "1:none,2:lora", "--lora", "2", "--amp", "bf16"]
    whole, parted = Run(flags, tmp_path / "whole"), Run(flags, tmp_path / "parted")
    assert whole.train() == 0
    with raise_on(rf"^step +{whole.records()[-1]['step'] - 2}/"):
        assert parted.train() == 75
    assert parted.train("--resume") == 0
    assert_same_outcome(whole, parted)


@pytest.mark.slow
def test_two_ranks_that_accumulate_give_the_losses_and_weights_of_one(flags, tmp_path):
    flags = [*flags, *NO_DROPOUT, *LORA_4, "--global_batch_size", "16", "--epochs", "1"]
    alone = Run([*flags, "--batch_size", "16"], tmp_path / "alone")
    ranks = Run([*flags, "--batch_size", "4"], tmp_path / "ranks", 2)
    assert alone.train() == 0 and ranks.in_ranks() == [0, 0], ranks.console()
    assert alone.losses() == pytest.approx(ranks.losses(), abs=2e-5)
    assert_same(alone.weights(), ranks.weights(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--lora", "4"], "--lora 4 trains none of WavLM's weights: remove --unfreeze all"),
        (["--lora", "4", "--unfreeze", "1:lora,2:top:1"], "remove --unfreeze 1:lora,2:top:1"),
        (["--lora", "4", "--encoder", "baseline"], "is for WavLM, not for --encoder baseline"),
        (["--lora", "-1"], "--lora: -1 must be at least 0"),
        (["--unfreeze", "lora"], "--unfreeze lora and --lora_alpha need a rank, --lora R"),
        (["--lora_alpha", "8"], "--lora_alpha need a rank"),
        ([*LORA_4, "--layers", "0"], "K between 1 and 0, the layers that this WavLM keeps"),
        ([*LORA_4, "--lora", "33"], "--lora 33: must be at most 32"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(flags, wrong, said, capsys):
    try:
        assert cli([*flags, *wrong]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert said in capsys.readouterr().err
