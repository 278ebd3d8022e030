"""What the frozen part of WavLM makes of a clip is computed once: from the cache and in exact CCC's
second pass, a step is the one from audio."""

import re
import shutil

import pytest
from conftest import quick_flags, save_narrow_wavlm
from helpers import Run, assert_same

import data
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
def test_a_step_from_the_cache_is_the_step_from_audio_in_every_stage(flags, tmp_path, more):
    runs = {}
    for how in ("off", "exact", "on"):
        runs[how] = Run([*flags, *STAGES, *more, "--feature_cache", how], tmp_path / how)
        assert runs[how].train() == 0
    caches = list((tmp_path / "cache").glob("hidden-*"))
    assert len(caches) == 6  # three stages, two precisions
    for how, tolerance in (("exact", 1e-4), ("on", 2e-2)):
        for event, key in (("train", "loss"), ("dev", "dev/ccc_mean"), ("test", "test/ccc_mean")):
            pairs = zip(runs[how].records(event), runs["off"].records(event), strict=True)
            assert all(a[key] == pytest.approx(b[key], abs=tolerance) for a, b in pairs), key


def test_under_bf16_the_cache_holds_the_streams_own_bits(flags, tmp_path):
    more = ["--unfreeze", "top:2", "--layers", "3", "--amp", "bf16", "--batch_size", "1"]
    off, on = (
        Run([*flags, *more, "--max_steps", "4", "--feature_cache", how], tmp_path / how)
        for how in ("off", "on")
    )
    assert off.train() == on.train() == 0
    assert_same(off.weights(), on.weights())


def test_a_resumed_run_goes_on_from_the_parts_that_are_there(flags, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "PART_SECONDS", 5)
    flags = [*flags, "--unfreeze", "top:1", "--max_steps", "2"]
    whole, again = Run(flags, tmp_path / "whole"), Run(flags, tmp_path / "again")
    assert whole.train() == 0
    parts = sorted((tmp_path / "cache").glob("hidden-*/part-*"))
    assert len(parts) > 3
    kept = parts[0].stat().st_mtime_ns
    for part in parts[2:]:
        shutil.rmtree(part)
    assert again.train() == 0
    assert sorted((tmp_path / "cache").glob("hidden-*/part-*")) == parts
    assert parts[0].stat().st_mtime_ns == kept
    assert_same(again.weights(), whole.weights())


def test_a_cache_that_does_not_fit_the_disk_is_refused_with_its_size(
    flags, tmp_path, monkeypatch, capsys
):
    run = Run([*flags, "--max_steps", "1", "--overwrite"], tmp_path)
    assert run.train() == 0  # caches audio
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run.train("--unfreeze", "top:1") == 2
    said = capsys.readouterr().err
    assert re.search(r"would need \d.* GiB in .*--feature_cache off", said), said


def test_exact_ccc_runs_the_frozen_part_of_a_micro_batch_once(flags, monkeypatch, tmp_path):
    encoded = []
    forward = FeatureExtractor.forward

    def counted(self, x):
        encoded.append(0 if x.is_meta else len(x))
        return forward(self, x)

    monkeypatch.setattr(FeatureExtractor, "forward", counted)
    flags = [*flags, "--unfreeze", "top:1", "--feature_cache", "off", "--max_steps", "1"]
    run = Run([*flags, "--batch_size", "4", "--gradient_accumulation_steps", "3"], tmp_path)
    assert run.train() == 0
    dev, test = len(run.predictions("dev")), len(run.predictions("test"))
    assert sum(encoded) == 12 + 2 * dev + test
