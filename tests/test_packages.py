"""Packages that not every command needs may be absent or broken: nothing else then fails.

A broken one, built for another torch, numpy or CUDA, raises anything at import. Here stand-ins
raise in place of the real ones.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest

import train
from util.files import described

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "mamba_ssm", "opensmile", "tensorboard", "speechbrain", "torchaudio", "torchcodec", "cv2",
    "transformers", "matplotlib", "sklearn", "onnx", "onnxruntime", "tensorflow", "torchvision",
)  # fmt: skip
SCRIPTS = ("train.py", "memory.py", "data.py", "report.py", "predict.py", "faces.py")
HELP_OF_ALL = f"""
import runpy, sys
sys.path[0] = "."
for script in {SCRIPTS}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


def stand_ins(folder, packages, error="RuntimeError('built for another torch')"):
    """The folder, with packages that raise as they are imported."""
    for package in packages:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(f"raise {error}\n")
    return str(folder)


def python(*words, path, cwd=ROOT):
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_help_and_a_run_need_no_optional_package(flags, tmp_path):
    path = stand_ins(tmp_path / "broken", OPTIONAL)
    done = python("-c", HELP_OF_ALL, path=path)
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout for word in ("--unfreeze", "--calibrate", "--hop", "--video_dir")
    )
    done = python("train.py", *flags, "--plot_every", "1", "--separation_every", "1", path=path)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    for package in ("tensorboard", "matplotlib", "scikit-learn"):
        assert f"{package}, which does not work (" in done.stdout, package
    assert "no TensorBoard" in done.stdout and "same figures" in done.stdout
    run = tmp_path / "runs/corpus-wavlm/fold1"
    assert (run / "result.json").exists() and (run / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", ["RuntimeError('x')", "OSError('libfoo.so')", "AttributeError('np.bool')"]
)
def test_broken_packages_stop_neither_help_nor_the_demo(error, demo_cache, tmp_path):
    path = stand_ins(tmp_path / "broken", OPTIONAL, error)
    done = python("-c", HELP_OF_ALL, path=path)
    assert done.returncode == 0, done.stderr
    words = ["train.py", "--preset", "demo", "--max_steps", "2", "--cache_dir", demo_cache]
    done = python(*words, "--out", tmp_path, path=path)
    assert done.returncode == 2 and "or --prosody none" in done.stderr
    done = python(*words, "--prosody", "none", "--out", tmp_path, path=path)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr


# ---------------------------------------------------------------- where one is needed

WORKING = "class EncoderClassifier:\n    from_hparams = lambda *_, **__: 1 / 0\n"


@pytest.fixture
def mute_hub(monkeypatch):
    """A hub that takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        yield


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """packages({name: code}): stand-ins that this process imports."""

    def forget(tops):
        for module in [name for name in sys.modules if name.partition(".")[0] in tops]:
            monkeypatch.delitem(sys.modules, module)

    def make(codes):
        for name, code in codes.items():
            file = tmp_path / "stand_ins" / name.replace(".", "/") / "__init__.py"
            file.parent.mkdir(parents=True)  # a folder without __init__.py is a package, too
            file.write_text(code)
        forget({name.partition(".")[0] for name in codes})
        monkeypatch.syspath_prepend(tmp_path / "stand_ins")

    yield make
    forget({path.name for path in (tmp_path / "stand_ins").glob("*")})


RUNTIME = "raise RuntimeError('CUDA version mismatch\\nand a second line')"


@pytest.mark.parametrize(
    ("words", "codes", "said"),
    [
        (["--speaker", "ecapa"], {"torchaudio": RUNTIME}, ["torchaudio", "CUDA version mismatch)"]),
        (
            ["--speaker", "ecapa"],
            {"torchaudio": "", "speechbrain": "raise AttributeError('backend')"},
            ["reinstall speechbrain", "AttributeError: backend)", "<utt_id>.npy"],
        ),
        (["--speaker", "ecapa"], {"torchaudio": "", "speechbrain": ""}, ["speechbrain.inference"]),
        (
            ["--speaker", "ecapa"],
            {"torchaudio": "", "speechbrain.inference.speaker": WORKING},
            ["spkrec-ecapa-voxceleb", "hub does not answer", "<utt_id>.npy"],
        ),
        (
            ["--speaker", "xvector"],
            {"torchaudio": RUNTIME},
            ["--upgrade torchaudio, or give"],
        ),
        (["--speaker", "xvector"], {}, ["wavlm-base-plus-sv", "transformers", "HF_ENDPOINT"]),
        (["--prosody", "egemaps"], {"opensmile": RUNTIME}, ["opensmile", "or --prosody none"]),
        (
            ["--prosody", "egemaps"],
            {"opensmile": "__version__ = '2'\nFeatureSet = FeatureLevel = None\nSmile = None\n"},
            ["opensmile", "AttributeError", "or --prosody none"],
        ),
    ],
    ids=str,
)
def test_a_package_that_is_needed_and_broken_is_one_line(
    flags, tmp_path, packages, words, codes, said, capsys
):
    packages(codes)
    began = time.monotonic()
    more = ["--cache_dir", str(tmp_path / "cache"), *words]
    assert train.cli([*flags, *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert " ".join(words) in line and all(text in line for text in said), line
    assert time.monotonic() - began < 10


def test_a_hub_that_never_answers_is_told_within_seconds(flags, tmp_path, mute_hub, capsys):
    began = time.monotonic()
    assert train.cli([*flags, "--speaker", "xvector", "--cache_dir", str(tmp_path / "cache")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--speaker xvector: cannot load microsoft/wavlm-base-plus-sv" in line
    assert time.monotonic() - began < 15  # 5 s, and the corpus


def test_a_package_is_described_with_its_version():
    text = described("numpy", ValueError("one\ntwo"))
    assert text.startswith("numpy ") and text.endswith(": ValueError: one") and "." in text
