"""What the frozen part of WavLM makes of a clip is computed once: from the cache and in exact CCC's
second pass, a step is the one from audio."""

import shutil

import pytest
import torch
from conftest import quick_flags, save_narrow_wavlm
from test_train import caches, records, weights_of

import data
from train import main, parse_args
from util.runs import run_dir
from wavlm import FeatureExtractor

STAGES = ["--unfreeze", "1:none,2:top:1,3:top:2", "--epochs", "3"]


@pytest.fixture(scope="module")
def deep_wavlm(tmp_path_factory):
    """Directory of a WavLM with three narrow layers and dropout."""
    return save_narrow_wavlm(tmp_path_factory.mktemp("deep"), 3)


@pytest.fixture
def flags(corpus, deep_wavlm, tmp_path, no_pictures):
    flags = quick_flags(corpus, deep_wavlm, tmp_path)
    return [*flags, "--layers", "1", "2", "3", "--cache_dir", str(tmp_path / "cache")]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--pooling", "attention", "--context", "2"],
        ["--pooling", "stats"],
    ],
)
def test_a_step_from_the_cache_is_the_step_from_audio_in_every_stage(flags, more):
    runs = {}
    for how in ("off", "exact", "on"):
        args = parse_args([*flags, *STAGES, *more, "--feature_cache", how, "--name", how])
        assert main(args) == 0
        runs[how] = args
    assert len(caches(runs["on"])) == 6  # three stages, two precisions
    for how, tolerance in (("exact", 1e-4), ("on", 2e-2)):
        for event, key in (("train", "loss"), ("dev", "dev/ccc_mean"), ("test", "test/ccc_mean")):
            pairs = zip(records(runs[how], event), records(runs["off"], event), strict=True)
            assert all(a[key] == pytest.approx(b[key], abs=tolerance) for a, b in pairs), key


def test_under_bf16_the_cache_holds_the_streams_own_bits(flags):
    runs = {}
    for how in ("off", "on"):
        args = parse_args(
            [*flags, "--unfreeze", "top:2", "--layers", "3", "--amp", "bf16", "--batch_size", "1",
             "--max_steps", "4", "--feature_cache", how, "--name", how]
        )  # fmt: skip
        assert main(args) == 0
        runs[how] = args
    ours, theirs = weights_of(runs["on"]), weights_of(runs["off"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_goes_on_from_the_parts_that_are_there(flags, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "PART_SECONDS", 5)
    flags = [*flags, "--unfreeze", "top:1", "--max_steps", "2", "--name"]
    args = parse_args([*flags, "whole"])
    assert main(args) == 0
    (cache,) = caches(args)
    parts = sorted(cache.glob("part-*"))
    assert len(parts) > 3
    kept = parts[0].stat().st_mtime_ns
    for part in parts[2:]:
        shutil.rmtree(part)
    assert main(parse_args([*flags, "again"])) == 0
    assert sorted(cache.glob("part-*")) == parts and parts[0].stat().st_mtime_ns == kept
    again = weights_of(parse_args([*flags, "again"]))
    assert all(torch.equal(again[name], value) for name, value in weights_of(args).items())


def test_exact_ccc_runs_the_frozen_part_of_a_micro_batch_once(flags, monkeypatch):
    encoded = []
    forward = FeatureExtractor.forward

    def counted(self, x):
        encoded.append(0 if x.is_meta else len(x))
        return forward(self, x)

    monkeypatch.setattr(FeatureExtractor, "forward", counted)
    flags = [*flags, "--unfreeze", "top:1", "--feature_cache", "off", "--max_steps", "1"]
    args = parse_args([*flags, "--batch_size", "4", "--gradient_accumulation_steps", "3"])
    assert main(args) == 0
    dev, test = (
        len((run_dir(args) / f"predictions_{split}.csv").read_text().splitlines()) - 1
        for split in ("dev", "test")
    )
    assert sum(encoded) == 12 + 2 * dev + test
