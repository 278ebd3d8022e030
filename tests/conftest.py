"""Small inputs shared by the tests: a corpus of tones, a WavLM of two narrow layers."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start, too: on busy cores a second one waits

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from matplotlib.figure import Figure

DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # cuda: runs in float32 on the GPU
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the same on every machine


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Path of a CSV: 3 sessions x 2 speakers x 3 dialogues of 4 turns, 0.3-0.9 s, pitch = arousal
    and loudness = valence."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for session in range(1, 4):
        for dialog in range(6):
            for turn in range(4):
                utt_id = f"s{session}d{dialog}t{turn}"
                valence, arousal = rng.uniform(size=2).round(3)
                time = np.arange(int(rng.uniform(0.3, 0.9) * 16_000)) / 16_000
                tone = np.sin(2 * np.pi * (100 + 300 * arousal) * time) * (0.05 + 0.4 * valence)
                tone += 0.01 * rng.standard_normal(len(time))
                soundfile.write(root / f"{utt_id}.wav", tone, 16_000)
                speaker = f"{session}{'FM'[turn % 2]}"
                names = (utt_id, f"{utt_id}.wav", session, f"{session}-{dialog}", speaker)
                rows.append((*names, valence, arousal))
    columns = ("utt_id", "path", "session", "dialog", "speaker", "valence", "arousal")
    pd.DataFrame(rows, columns=columns).to_csv(root / "corpus.csv", index=False)
    return root / "corpus.csv"


def save_narrow_wavlm(directory, num_layers):
    """A WavLM with layers of width 32, dropout on."""
    from wavlm import SIZES, WavLM, WavLMConfig, save_wavlm

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "num_hidden_layers": num_layers, "num_attention_heads": 2,
        "intermediate_size": 64, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1,
    }  # fmt: skip
    save_wavlm(WavLM(WavLMConfig.from_dict(SIZES["tiny"].to_dict() | shape)), directory)
    return directory


@pytest.fixture(scope="session")
def small_wavlm(tmp_path_factory):
    """Directory of a WavLM with two narrow layers."""
    return save_narrow_wavlm(tmp_path_factory.mktemp("wavlm"), 2)


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory):
    """A --cache_dir in which the demo corpus is synthesised once for all tests."""
    return tmp_path_factory.mktemp("demo") / "cache"


def quick_flags(corpus, small_wavlm, directory):
    """Flags of a run of seconds on that corpus, with its run directory below `directory`."""
    return [
        "--data", str(corpus), "--wavlm", str(small_wavlm), "--layers", "1", "2",
        "--prosody", "none", "--unfreeze", "all", "--epochs", "2", "--batch_size", "8",
        "--lr", "1e-3", "--encoder_lr", "1e-3", "--d_hidden", "16", "--d_state", "8",
        "--mamba_layers", "1", "--num_workers", "0", "--log_every", "1",
        "--device", DEVICE, "--amp", "off", "--tf32", "off",
        "--cache_dir", str(corpus.parent / "cache"), "--out", str(directory / "runs"),
        "--keep_last",
    ]  # fmt: skip


@pytest.fixture
def no_pictures(monkeypatch):
    """They are half of a small run's time."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture
def flags(corpus, small_wavlm, tmp_path, no_pictures):
    return quick_flags(corpus, small_wavlm, tmp_path)


@pytest.fixture(scope="session")
def finished(corpus, small_wavlm, tmp_path_factory):
    """(flags, directory) of a run that is complete; tests leave it as it is."""
    from train import main, parse_args

    flags = quick_flags(corpus, small_wavlm, tmp_path_factory.mktemp("finished"))
    args = parse_args(flags)
    assert main(args) == 0
    return flags, Path(args.out) / args.name / "fold1"


def tiny_vision_model(folder, seed=0):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    BitImageProcessor(size={"shortest_edge": 64}, crop_size=size).save_pretrained(folder)
