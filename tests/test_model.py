"""model.py: sums, metrics, encoders' masks, Mamba and streaming, parameter counts."""

import logging
import math
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch

from model import (
    ENCODERS,
    EmotionModel,
    LogMel,
    Mamba,
    ModelConfig,
    Pooling,
    concordance,
    loss_from_sums,
    metrics,
    moment_sums,
)  # fmt: skip
from util import trials
from util.files import UserError
from wavlm import SIZES, WavLM

CPU = torch.device("cpu")
TARGETS = ("valence", "arousal")
SMALL = {"d_hidden": 16, "d_state": 8, "base_channels": 8, "d_model": 64, "num_layers": 2}


def small_model(encoder="wavlm", **flags):
    torch.manual_seed(0)
    wavlm = WavLM(SIZES["tiny"]) if encoder == "wavlm" else None
    flags = SMALL | {"encoder": encoder, "frame_dim": 12, "prosody_dim": 0} | flags
    return EmotionModel(ModelConfig(**flags), wavlm)


def small_batch(lengths, chunk_index=None, seed=0):
    rng = np.random.default_rng(seed)
    longest, count = max(lengths), len(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    audio = torch.from_numpy(rng.standard_normal((count, longest)).astype("float32")) * 0.1
    frames = torch.from_numpy(rng.standard_normal((count, longest // 320, 12)).astype("float32"))
    frame_mask = torch.arange(longest // 320) < torch.tensor(lengths).unsqueeze(1) // 320
    return {
        "input_values": audio * mask,
        "attention_mask": mask,
        "frames": frames * frame_mask.unsqueeze(2),
        "frame_mask": frame_mask,
        "prosody": torch.from_numpy(rng.standard_normal((count, 88)).astype("float32")),
        "speaker": torch.from_numpy(rng.standard_normal((count, 192)).astype("float32")),
        "labels": torch.from_numpy(rng.uniform(size=(count, 2)).astype("float32")),
        "chunk_index": torch.arange(count).unsqueeze(1) if chunk_index is None else chunk_index,
    }


def lin_ccc(p, y):
    """Lin (1989) as written there."""
    return (
        2
        * np.mean((p - p.mean()) * (y - y.mean()))
        / (p.var() + y.var() + (p.mean() - y.mean()) ** 2)
    )


# --- metrics and losses


def test_ccc_pcc_and_rmse_equal_their_closed_forms():
    rng = np.random.default_rng(0)
    preds, labels = rng.uniform(size=(50, 2)), rng.uniform(size=(50, 2))
    result = metrics(torch.from_numpy(preds), torch.from_numpy(labels), TARGETS, scale=4)
    for i, target in enumerate(TARGETS):
        p, y = preds[:, i], labels[:, i]
        assert result[f"ccc_{target}"] == pytest.approx(lin_ccc(p, y), abs=1e-6)
        assert result[f"pcc_{target}"] == pytest.approx(np.corrcoef(p, y)[0, 1], abs=1e-9)
        assert result[f"rmse_{target}"] == pytest.approx(4 * math.sqrt(np.mean((p - y) ** 2)))
    assert result["ccc_mean"] == pytest.approx((result["ccc_valence"] + result["ccc_arousal"]) / 2)
    with pytest.raises(ValueError, match="no utterance"):
        metrics(torch.zeros(0, 2), torch.zeros(0, 2), TARGETS)


def test_exchanged_sums_give_the_ccc_and_the_gradient_of_the_batch_and_mean_ccc_does_not():
    torch.manual_seed(0)
    labels = torch.rand(32, 2)
    preds = (labels + 0.3 * torch.randn(32, 2)).clamp(0, 1).requires_grad_()
    sums, weights = moment_sums(preds, labels), (0.5, 0.5)
    loss_from_sums(sums, "ccc", weights, 0.1).backward()
    at_once, preds.grad = preds.grad, None
    parts = [moment_sums(p, y) for p, y in zip(preds.split(4), labels.split(4))]
    total, mean = sum(parts).detach(), torch.stack([concordance(part) for part in parts]).mean(0)
    torch.testing.assert_close(concordance(total), concordance(sums))
    assert (mean - concordance(sums)).abs().max() > 0.02
    for part in parts:
        loss_from_sums(total + part - part.detach(), "ccc", weights, 0.1).backward()
    torch.testing.assert_close(preds.grad, at_once, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", ["ccc", "mse"])
def test_loss_and_gradient_are_finite_on_degenerate_batches_and_zero_at_weight_0(loss):
    constant = torch.full((8, 2), 0.5)
    for preds, labels in (
        (torch.rand(1, 2), torch.rand(1, 2)),
        (constant, torch.rand(8, 2)),
        (torch.rand(8, 2), constant),
    ):
        preds = preds.clone().requires_grad_()
        value = loss_from_sums(moment_sums(preds, labels), loss, (1.0, 0.0), 0.1)
        value.backward()
        assert value.isfinite() and preds.grad.isfinite().all()
        assert (preds.grad[:, 1] == 0).all()


# --- encoders


def alone(batch, i, length):
    """Utterance i of a batch of small_batch, without padding."""
    cut = {"input_values": length, "attention_mask": length}
    cut |= {"frames": length // 320, "frame_mask": length // 320}
    parts = {name: batch[name][i : i + 1, :stop] for name, stop in cut.items()}
    return parts | {"chunk_index": torch.zeros(1, 1, dtype=torch.long)}


@pytest.mark.parametrize("pooling", ["mean", "attention", "stats"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_padded_utterance_gives_the_same_prediction_as_alone(encoder, pooling):
    model = small_model(encoder, pooling=pooling).eval()
    lengths = [9_000, 16_000, 4_000, 12_345]
    together = small_batch(lengths)
    with torch.no_grad():
        batched = model(together)
        for i, length in enumerate(lengths):
            pred = model(alone(together, i, length))
            torch.testing.assert_close(pred, batched[i : i + 1], rtol=1e-4, atol=1e-5)


def test_stats_pooling_is_numpys_mean_and_deviation_of_the_real_frames_of_each_layer():
    rng, lengths = np.random.default_rng(0), [7, 12, 1]
    layers = rng.normal(3, 2, (2, 3, 12, 5)).astype("float32")  # of three utterances
    mask = torch.arange(12) < torch.tensor(lengths).unsqueeze(1)
    pooling = Pooling("stats", 2, 5)
    with torch.no_grad():
        pooling.layer_weights.copy_(torch.tensor([0.3, -0.5]))
    with torch.autocast("cpu", torch.bfloat16):  # moments stay in float32
        prepared = pooling.prepare([torch.from_numpy(layer) for layer in layers], mask)
    pooled = pooling(prepared, mask)
    assert pooled.shape == (3, 10) and prepared.dtype == torch.float32
    weights = np.exp([0.3, -0.5]) / np.exp([0.3, -0.5]).sum()

    def normal(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5)

    for i, length in enumerate(lengths):
        moments = []
        for layer in layers:
            frames = layer[i, :length]
            moments.append(np.r_[normal(frames.mean(0)), normal(frames.std(0))])
        expected = torch.from_numpy(weights @ moments).float()
        torch.testing.assert_close(pooled[i].detach(), expected, rtol=1e-4, atol=1e-5)


def test_stats_pooling_has_a_finite_gradient_on_constant_frames_and_on_a_single_one():
    frames = torch.randn(3, 4, 6)
    frames[0] = 2.5
    frames.requires_grad_()
    mask = torch.tensor([[True] * 4, [True, False, False, False], [True, True, False, False]])
    pooling = Pooling("stats", 1, 6)
    pooled = pooling(pooling.prepare([frames], mask), mask)
    (pooled * torch.randn(12)).sum().backward()
    assert pooled.isfinite().all() and frames.grad.isfinite().all()
    assert (pooled[:2, 6:] == 0).all()  # nothing deviates
    assert (frames.grad[~mask] == 0).all() and (frames.grad[2, :2] != 0).any()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_bfloat16_autocast_trains_and_ignores_padding(encoder, checkpointing):
    model = small_model(encoder, dropout=0.0)
    getattr(model.encoder, "wavlm", model.encoder).gradient_checkpointing = checkpointing
    lengths = [16_000, 9_000]
    together = small_batch(lengths)
    with torch.autocast("cpu", torch.bfloat16):
        preds = model.train()(together)
        loss_from_sums(moment_sums(preds, together["labels"]), "ccc", (0.5, 0.5), 0.1).backward()
        model.eval()
        batched = model(together)
        pred = model(alone(together, 1, 9_000))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.isfinite().all() for p in trained)
    torch.testing.assert_close(pred, batched[1:], rtol=0, atol=0.01)


def test_a_layer_that_the_wavlm_does_not_have_names_the_flag():
    for layers in ((2, 5), (-1,)):
        with pytest.raises(UserError, match=rf"--layers {layers[-1]}: .*has layers 0 to 4"):
            small_model(layers=layers)


@pytest.mark.parametrize("encoder", ["wavlm", "convnext", "transformer"])
def test_groups_of_like_length_change_neither_predictions_nor_gradients(encoder):
    model = small_model(encoder, dropout=0.0).eval()
    batch = small_batch([16_000, 12_345, 9_000, 4_000], torch.tensor([[2, 0], [1, 3]]))
    lengths = [batch["frame_mask"].shape[1], 29] if "transformer" in encoder else [16_000, 9_000]
    results = []
    for groups in ([], [(0, 2, lengths[0]), (2, 4, lengths[1])]):
        model.zero_grad()
        preds = model(batch | {"groups": groups})
        preds.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"preds": preds.detach(), **gradients})
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"speaker_dim": 192, "prosody_dim": 88},
        {"pooling": "attention", "ema_alpha": -1.0, "feedback": True},
        {"film": False, "d_state": 0},
        {"mamba_layers": 0},
        {"encoder": "convnext", "pooling": "stats", "speaker_dim": 192},
        {"encoder": "baseline"},
        {"encoder": "transformer"},
        {"encoder": "lightweight_transformer", "pooling": "attention"},
    ],
    ids=str,
)
def test_every_trainable_parameter_gets_a_gradient(flags):
    """DDP with find_unused_parameters=False relies on it."""
    model = small_model(**flags)
    if model.config.encoder == "wavlm":
        model.encoder.wavlm.set_trainable("all")
    batch = small_batch([9_000, 16_000, 4_000], torch.tensor([[0, 1], [2, -1]]))
    sums = moment_sums(model(batch), batch["labels"])
    loss_from_sums(sums, "ccc", (0.5, 0.5), 0.1).backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []


def test_mel_filters_equal_those_of_transformers():
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(201, 80, 0, 8000, 16_000, norm=None, mel_scale="htk")
    torch.testing.assert_close(
        LogMel().filters, torch.from_numpy(filters).float(), rtol=1e-4, atol=1e-5
    )
    shortest, mask = LogMel()(torch.randn(1, 400), torch.ones(1, 400, dtype=torch.bool))
    assert shortest.shape == (1, 1, 80) and mask.all()


def test_log_mel_equals_torchaudios():
    try:
        from torchaudio.transforms import MelSpectrogram
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or for another torch
        pytest.skip(f"torchaudio: {error}")
    waveform = 0.1 * torch.randn(2, 16_000)
    theirs = MelSpectrogram(16_000, 400, hop_length=160, n_mels=80, center=False)(waveform)
    theirs = theirs.transpose(1, 2).clamp(min=1e-10).log10()
    theirs = theirs - theirs.mean((1, 2), keepdim=True)
    theirs = theirs / (theirs.square().mean((1, 2), keepdim=True).sqrt() + 0.1)
    ours, _ = LogMel()(waveform, torch.ones_like(waveform, dtype=torch.bool))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_chunks_of_turns_are_tracked_apart_and_predictions_return_to_their_places():
    model = small_model().eval()
    batch = small_batch([8_000] * 5, torch.tensor([[3, 1, 4], [0, 2, -1]]))
    with torch.no_grad():
        preds = model(batch)
        turns = model.encode(batch)
        first, _ = model.track(turns[[3, 1, 4]].unsqueeze(0))
        second, _ = model.track(turns[[0, 2]].unsqueeze(0))
    torch.testing.assert_close(preds[[3, 1, 4]], first[0])
    torch.testing.assert_close(preds[[0, 2]], second[0])


# --- dialogue state


@pytest.mark.parametrize("flags", [{}, {"feedback": True}, {"ema_alpha": -1.0}, {"d_state": 0}])
def test_streaming_one_turn_at_a_time_equals_the_dialogue_at_once(flags):
    model = small_model(**flags).eval()
    turns = torch.randn(2, 7, model.width)
    with torch.no_grad():
        at_once, last = model.track(turns)
        state, steps = None, []
        for t in range(7):
            pred, state = model.track(turns[:, t : t + 1], state)
            steps.append(pred)
        halves, middle = model.track(turns[:, :3])
        rest, _ = model.track(turns[:, 3:], middle)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat((halves, rest), 1), at_once, rtol=1e-5, atol=1e-6)
    if "ema" in last:
        torch.testing.assert_close(state["ema"], last["ema"], rtol=1e-5, atol=1e-6)


def test_mamba_equals_transformers_and_its_gradients():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=32, state_size=16, conv_kernel=4, expand=2, use_bias=False)
    theirs, ours = MambaMixer(config, layer_idx=0), Mamba(32)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(3, 11, 32)
    mine, his = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out, expected = ours(mine)[0], theirs(his)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, his.grad, rtol=1e-4, atol=1e-6)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-5)


# selective_scan_fn as mamba-ssm has it, in plain PyTorch and in another order of operations
REFERENCE = """
import torch

calls = []

def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    assert u.shape[2] > 1 and delta_softplus and return_last_state
    calls.append(u.shape)
    delta = torch.nn.functional.softplus(delta.float() + delta_bias[:, None])
    h, out = u.new_zeros(len(u), *A.shape, dtype=torch.float32), []
    for t in range(u.shape[2]):
        h = h * torch.exp(delta[:, :, t, None] * A)
        h = h + (delta[:, :, t] * u[:, :, t].float())[..., None] * B[:, None, :, t].float()
        out.append((h * C[:, None, :, t].float()).sum(-1) + D * u[:, :, t].float())
    y = torch.stack(out, dim=2) * torch.nn.functional.silu(z.float())
    return y.to(u.dtype), h.detach()
"""
LATE = REFERENCE.replace("    assert", "    raise RuntimeError('no kernel image')\n    assert")
SAYS = "dialogues are scanned in PyTorch, not by mamba_ssm: "
PACKAGES = {  # what is installed: the line in the log
    REFERENCE: "dialogues are scanned by mamba_ssm",
    REFERENCE.replace("* torch.exp", "+ torch.exp"): f"{SAYS}it differs",
    REFERENCE.replace("D * u", "D.detach() * u"): f"{SAYS}RuntimeError",  # no gradient
    REFERENCE.replace("z.float())", "z.float()) * torch.nan"): f"{SAYS}it differs",
    LATE: f"{SAYS}RuntimeError: no kernel image",
    "import selective_scan_cuda_of_another_torch": f"{SAYS}ModuleNotFoundError: No module",
    "raise RuntimeError('CUDA 13.0\\nand 13.2')": f"{SAYS}RuntimeError: CUDA 13.0 and 13.2",
    "raise OSError('libcudart.so.12')": f"{SAYS}OSError: libcudart",
    "import torch; torch.no_such_name": f"{SAYS}AttributeError: module 'torch'",
}


@pytest.fixture
def mamba_ssm(tmp_path, monkeypatch):
    """Makes a package of that name out of a source, for this test."""

    def install(source):
        for folder in ("mamba_ssm", "mamba_ssm/ops"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "__init__.py").touch()
        (tmp_path / "mamba_ssm/ops/selective_scan_interface.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield install
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        del sys.modules[name]


@pytest.mark.parametrize("source", PACKAGES, ids=range(len(PACKAGES)))
def test_a_mamba_ssm_scans_dialogues_only_if_it_works_and_the_log_says_so(
    source, mamba_ssm, caplog
):
    model = small_model().eval()
    turns, alone = torch.randn(3, 5, model.width), torch.randn(3, 1, model.width)
    batch = small_batch([4_000] * 4, torch.tensor([[0, 1], [2, 3]]))

    def results():
        model.zero_grad()
        preds = model(batch)
        preds.sum().backward()
        with torch.no_grad():
            tracked, last = model.track(turns)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(model.track(turns)[0], tracked, rtol=0, atol=0.02)
            model.track(alone)  # a single turn, and a state to start from, are ours to scan
            after, _ = model.track(turns, last)
        return [preds, tracked, after, *(p.grad for p in model.updater.parameters())]

    wanted = results()
    mamba_ssm(source)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "vatune"):
        trials.check_scan(small_model(feedback=True), Namespace(feedback=True), CPU)
        assert caplog.messages == []
        torch.set_rng_state(before)
        trials.check_scan(model, Namespace(feedback=False, amp="bf16"), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(results(), wanted, rtol=1e-4, atol=1e-6)
    (line,) = caplog.messages
    assert line.startswith(PACKAGES[source])
    if source == REFERENCE:
        calls = sys.modules["mamba_ssm.ops.selective_scan_interface"].calls
        assert (3, 2 * 16, 5) in calls and (2, 2 * 16, 2) in calls


def test_mamba_equals_mamba_ssms_reference_where_it_is_installed():
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        pytest.skip(f"mamba_ssm: {error}")
    scan = partial(selective_scan_ref, delta_softplus=True, return_last_state=True)
    assert trials.scan_error(scan, CPU, torch.float32) < 1e-6


def test_the_ema_state_is_the_recurrence_of_its_definition():
    model = small_model().eval()
    turns = torch.randn(1, 5, model.width)
    with torch.no_grad():
        _, state = model.track(turns)
        update, _ = model.updater(turns, None)
    expected = sum(0.2 * 0.8 ** (4 - t) * update[:, t] for t in range(5))
    torch.testing.assert_close(state["ema"], expected)


def test_teacher_forcing_feeds_the_previous_label():
    model = small_model(feedback=True).eval()
    turns, labels = torch.randn(2, 4, model.width), torch.rand(2, 4, 2)
    with torch.no_grad():
        free, _ = model.track(turns)
        forced, _ = model.track(turns, None, labels, teacher_forcing=1.0)
        again, _ = model.track(turns, None, free, teacher_forcing=1.0)
    torch.testing.assert_close(again, free)
    torch.testing.assert_close(forced[:, 0], free[:, 0])  # no label before the first turn
    assert (forced[:, 1:] - free[:, 1:]).abs().max() > 0


# --- around the encoder


def test_undefined_prosody_becomes_the_train_mean():
    model = small_model(prosody_dim=88).eval()
    train = torch.randn(20, 88) * 3 + 1
    train[3, 5] = torch.nan
    model.prosody.fit(train)
    torch.testing.assert_close(model.prosody.mean[5], train[:, 5].nanmean())
    row = train[:1].clone()
    row[0, 7] = model.prosody.mean[7]
    holed = row.clone()
    holed[0, 7] = torch.nan
    torch.testing.assert_close(model.prosody(holed), model.prosody(row))


def test_a_gate_weighs_the_slice_that_was_named_and_none_weighs_nothing():
    shape = {"prosody_dim": 88, "vector_dims": (2, 3), "pooling": "stats", "d_state": 0}
    model = small_model(gates=("vectors", "none"), **shape).eval()
    speech = 2 * model.encoder.width
    slices = {"speech": (0, speech), "prosody": (speech, speech + 64)}
    slices["vectors"] = (speech + 64, speech + 69)
    assert model.width == speech + 69 and model.heads["arousal"].gate is None
    default = small_model(**shape).heads
    for head, name in (
        (model.heads["valence"], "vectors"),
        (default["valence"], "prosody"),
        (default["arousal"], "speech"),
    ):
        start, stop = slices[name]
        assert head.gated.nonzero().flatten().tolist() == list(range(start, stop))
    x = torch.randn(4, model.width)
    head = model.heads["arousal"]
    torch.testing.assert_close(head(x), head.net(x).sigmoid())
    batch = small_batch([9_000, 4_000]) | {"vectors": torch.randn(2, 5)}
    model.train()(batch).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "wavlm" not in n)


def test_film_is_the_identity_at_the_start():
    model = small_model(speaker_dim=192).eval()
    pooled = torch.randn(3, model.encoder.width)
    torch.testing.assert_close(model.film(pooled, torch.randn(3, 192)), pooled)


def test_parameter_counts_are_those_of_the_reference_model():
    with torch.device("meta"):
        model = EmotionModel(ModelConfig(speaker_dim=192), WavLM(SIZES["large"]))

    def millions(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    film = model.film
    assert sum(p.numel() for p in model.encoder.parameters()) == 315_453_120
    assert millions(model.prosody) == pytest.approx(0.02, abs=0.01)
    assert millions(film.speaker) == pytest.approx(0.07, abs=0.01)
    assert millions(film.film) == pytest.approx(0.58, abs=0.01)
    assert millions(model.updater) == pytest.approx(1.17, abs=0.01)
    assert millions(model.heads) == pytest.approx(1.24, abs=0.01)
    assert millions(model) == pytest.approx(318.54, abs=0.01)
    assert millions(model) - millions(model.encoder) == pytest.approx(3.08, abs=0.01)
