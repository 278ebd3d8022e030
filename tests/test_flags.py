"""Flags that no other test of a feature gives: what they change is seen where they act."""

import json

import huggingface_hub.constants
import pytest
import torch
from conftest import save_narrow_wavlm

import memory
from train import main, parse_args
from util.runs import run_dir


@pytest.mark.parametrize("choice", ["on", "off"])
def test_tf32_is_a_setting_of_matrix_products_and_convolutions(flags, choice):
    assert main(parse_args([*flags, "--dry_run", "--tf32", choice])) == 0
    assert torch.backends.cuda.matmul.allow_tf32 is (choice == "on")
    assert torch.backends.cudnn.allow_tf32 is (choice == "on")
    assert torch.backends.cudnn.deterministic  # whatever the choice: a resumed run repeats


def test_memory_fraction_is_the_share_of_the_card_that_is_planned_for(capsys):
    small = ["--encoder", "baseline", "--base_channels", "4", "--gpu_gib", "10", "--json"]
    assert memory.main([*small, "--memory_fraction", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["capacity_gib"] == 5.0


def test_d_prosody_is_the_width_of_the_prosody_code(flags):
    counts = []
    for width in ("8", "9"):
        own = ["--prosody", "egemaps", "--max_steps", "1", "--d_prosody", width, "--name", width]
        args = parse_args([*flags, *own])
        assert main(args) == 0
        result = json.loads((run_dir(args) / "result.json").read_text())
        counts.append(result["parameters_total"])
    assert counts[1] > counts[0]


def test_wavlm_revision_names_a_commit_of_the_hub(tmp_path, flags, monkeypatch):
    hub = tmp_path / "hub/models--lab--wavlm"  # as the hub's client keeps it
    for revision, commit, layers in (("main", "a" * 40, 2), ("v1", "b" * 40, 3)):
        save_narrow_wavlm(hub / "snapshots" / commit, layers)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, layers in (("main", 2), ("v1", 3)):
        chosen = ["--wavlm", "lab/wavlm", "--wavlm_revision", revision, "--max_steps", "1"]
        args = parse_args([*flags, *chosen, "--name", revision])
        assert main(args) == 0
        config = torch.load(run_dir(args) / "best.pt", weights_only=True)["config"]
        assert config["wavlm"]["num_hidden_layers"] == layers
