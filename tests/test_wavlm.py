"""wavlm.py against transformers' WavLMModel (eager), and the promises of its docstrings.

python -m pytest tests/test_wavlm.py
"""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import WavLMConfig as HFConfig
from transformers import WavLMModel

import wavlm
from model import EmotionModel, ModelConfig
from util import trials
from wavlm import ATTENTIONS, SIZES, WavLM, WavLMConfig, WavLMError, attend, load_wavlm, save_wavlm

NARROW = WavLMConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    num_buckets=32, max_bucket_distance=60, feat_extract_norm="layer", do_stable_layer_norm=True,
    feat_proj_dropout=0.1,
)  # fmt: skip
NORMS = [(norm, stable) for norm in ("layer", "group") for stable in (True, False)]

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


def randomise(model):
    """Give every parameter a value that matters: norms, gates and biases start as constants."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (1.0 if "rel_attn_embed" in name else 0.1))
    return model


def pair(config, attention="fused", dtype=torch.float64):
    """transformers' model and ours with the same weights, dropout off."""
    reference = WavLMModel(HFConfig(**{**config.to_dict(), "layerdrop": 0.0}))
    randomise(reference).eval()
    ours = WavLM(config).eval()
    ours.load_state_dict(reference.state_dict())
    ours.attention = attention
    return reference.to(dtype), ours.to(dtype)


def batch(lengths):
    """input_values (B, L), zeros behind each end, and attention_mask (B, L) bool."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), max(lengths)) * mask, mask


def weighted_sum(states):
    """A scalar in which every element of every state has its own weight."""
    generator = torch.Generator().manual_seed(1)
    return sum((s * torch.randn(s.shape, generator=generator)).sum() for s in states)


def assert_equal_states_and_gradients(config, attention, input_values, mask):
    """Both models in float64, where only the order of summation differs."""
    reference, ours = pair(config, attention)
    input_values = input_values.double()
    out = reference(
        input_values,
        attention_mask=None if mask is None else mask.long(),
        output_hidden_states=True,
    )
    wanted = [*out.hidden_states[:-1], out.last_hidden_state]  # the last after the final layer norm
    got, frame_mask = ours(input_values, mask, layers=range(len(wanted)))
    assert sorted(got) == list(range(len(wanted)))
    assert (frame_mask is None) == (mask is None)
    if mask is not None:  # frames of padding hold arbitrary numbers, which nothing may read
        wanted = [state * frame_mask[..., None] for state in wanted]
        got = {i: state * frame_mask[..., None] for i, state in got.items()}
    for i, state in enumerate(wanted):
        torch.testing.assert_close(got[i], state, rtol=1e-9, atol=1e-9, msg=f"hidden state {i}")
    weighted_sum(wanted).backward()
    weighted_sum(got.values()).backward()
    ours_by_name = dict(ours.named_parameters())
    for name, p in reference.named_parameters():
        grad = ours_by_name[name].grad
        if name == "masked_spec_embed":
            assert grad is None
            continue
        error = (grad - p.grad).abs().max() / p.grad.abs().max().clamp(min=1e-2)
        assert error < 1e-8, f"gradient of {name}: relative error {error:.2e}"


def kept_bytes(function):
    """Bytes of the tensors that `function()` keeps for backward, each storage once, by shape."""
    kept = {}

    def pack(t):
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage()._cdata] = (tuple(t.shape), t.numel() * t.element_size(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return [(shape, size) for shape, size, _ in kept.values()], result


# ---------------------------------------------------------------- equal to transformers
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("num_frames", [1, 24, 141])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("norm", "stable"), NORMS)
def test_every_hidden_state_and_gradient_equals_transformers(
    norm, stable, masked, num_frames, attention
):
    config = dataclasses.replace(NARROW, feat_extract_norm=norm, do_stable_layer_norm=stable)
    config = dataclasses.replace(config, conv_bias=masked)  # either value once, at no extra run
    full = 400 + 320 * (num_frames - 1)  # the fewest samples that give so many frames
    input_values, mask = batch([full + 100, max(400, full // 2), max(400, full // 3 + 7)])
    assert_equal_states_and_gradients(config, attention, input_values, mask if masked else None)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_published_depths_and_buckets_equal_transformers_at_a_narrow_width(size):
    heads = SIZES[size].num_attention_heads
    config = dataclasses.replace(
        SIZES[size], hidden_size=4 * heads, intermediate_size=96, conv_dim=(24,) * 7
    )
    assert_equal_states_and_gradients(config, "fused", *batch([16_000, 9_000]))


@pytest.mark.parametrize(("buckets", "max_distance"), [(320, 800), (32, 128)])
def test_the_position_table_equals_transformers_beyond_the_maximum_distance(buckets, max_distance):
    config = dataclasses.replace(NARROW, num_buckets=buckets, max_bucket_distance=max_distance)
    reference, ours = pair(config)
    num_frames = max_distance + 203
    wanted = reference.encoder.layers[0].attention.compute_bias(num_frames, num_frames)
    position = ours.encoder.layers[0].attention.position_bias(num_frames)
    table = wavlm.dense_table(position, num_frames)
    assert table.shape == (4, num_frames, math.ceil(num_frames / 8) * 8)
    assert torch.equal(table[..., :num_frames], wanted)


def test_only_the_layers_asked_for_come_back_and_none_above_them_is_computed():
    model = WavLM(NARROW).eval()
    input_values, mask = batch([8_000])
    every, frame_mask = model(input_values, mask, layers=range(4))
    last, _ = model(input_values, mask)
    assert list(last) == [3] and torch.equal(last[3], every[3])
    assert frame_mask.shape == every[0].shape[:2]
    model.encoder.layers[2] = None  # computing it would raise
    some, _ = model(input_values, mask, layers=[2, 0])
    assert sorted(some) == [0, 2] and torch.equal(some[2], every[2])


# ---------------------------------------------------------------- padding
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stable", [True, False])
def test_a_padded_utterance_gives_the_same_states_as_alone(stable, attention):
    model = randomise(WavLM(dataclasses.replace(NARROW, do_stable_layer_norm=stable))).eval()
    model.attention = attention
    lengths = [30_000, 16_000, 5_321, 400]
    input_values, mask = batch(lengths)
    together, frame_mask = model(input_values, mask, layers=range(4))
    assert frame_mask.sum(1).tolist() == model.frame_lengths(torch.tensor(lengths)).tolist()
    for row, length in enumerate(lengths):
        alone, _ = model(input_values[row : row + 1, :length], layers=range(4))
        for layer, state in alone.items():
            padded = together[layer][row, frame_mask[row]]
            torch.testing.assert_close(padded, state[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_utterance_that_is_all_padding_gives_no_nan_and_changes_no_other(attention, dtype):
    model = randomise(WavLM(NARROW)).eval()
    model.attention = attention
    input_values, mask = batch([9_000, 9_000])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        before, _ = model(input_values, mask)
        mask[1] = False
        after, frame_mask = model(input_values, mask)
    assert not frame_mask[1].any()
    assert torch.equal(before[3][0], after[3][0])
    after[3].float().sum().backward()
    assert torch.isfinite(after[3]).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_frame_lengths_are_those_of_the_convolutions():
    model = WavLM(SIZES["tiny"])
    seconds = {400: 1, 16_000: 49, 48_000: 149, 80_000: 249}
    for num_samples, num_frames in seconds.items():
        assert model.frame_lengths(num_samples) == num_frames
        assert model.feature_extractor(torch.zeros(1, num_samples)).shape[1] == num_frames
    lengths = torch.tensor(list(seconds))
    assert model.frame_lengths(lengths).tolist() == list(seconds.values())
    assert model.frame_lengths(lengths.numpy()).tolist() == list(seconds.values())


# ---------------------------------------------------------------- training
# WavLM-Large by arithmetic: attention, feed-forward, norms and gate of a layer; the CNN
LAYER = 4 * (1024**2 + 1024) + (2 * 1024 * 4096 + 4096 + 1024) + 4 * 1024 + (64 * 8 + 8 + 16)
CNN = 512 * 10 + 4 * 512**2 * 3 + 2 * 512**2 * 2 + 7 * 2 * 512
TRAINABLE = {
    "none": 0,
    "top:1": LAYER + 2 * 1024,
    "top:6": 6 * LAYER + 2 * 1024,
    "top:24": 24 * LAYER + 2 * 1024 + 320 * 16,
    "transformer": 315_453_120 - 1024 - CNN,
    "all": 315_453_120 - 1024,
}


def test_exactly_the_parameters_named_by_unfreeze_train_and_each_gets_a_gradient():
    with torch.device("meta"):
        models = {size: WavLM(config) for size, config in SIZES.items()}
    counts = {size: sum(p.numel() for p in m.parameters()) for size, m in models.items()}
    assert counts == {"tiny": 971_408, "base": 94_381_936, "large": 315_453_120}
    model = models["large"]
    for what, count in TRAINABLE.items():
        model.set_trainable(what)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in trainable.values()) == count
        states, _ = model(torch.empty(2, 16_000, device="meta"))
        assert states[24].requires_grad == (what != "none")
        if trainable:
            states[24].sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trainable)
        model.zero_grad()


@pytest.mark.parametrize("stable", [True, False])
def test_truncate_keeps_hidden_states_and_leaves_no_parameter_without_gradient(stable, tmp_path):
    model = randomise(WavLM(dataclasses.replace(NARROW, do_stable_layer_norm=stable))).eval()
    input_values, mask = batch([5_000, 4_000])
    full, frame_mask = model(input_values, mask, layers=range(4))
    for kept in (3, 2, 0):
        model.truncate(kept)
        states, _ = model(input_values, mask, layers=range(kept + 1))
        assert all(torch.equal(states[i], full[i]) for i in range(kept + 1))
        save_wavlm(model, tmp_path)
        loaded = load_wavlm(str(tmp_path)).eval()
        assert torch.equal(loaded(input_values, mask)[0][kept], full[kept])
        if kept == 2:
            theirs = WavLMModel.from_pretrained(tmp_path).eval()
            out = theirs(input_values, attention_mask=mask.long(), output_hidden_states=True)
            difference = (out.hidden_states[2] - full[2])[frame_mask]
            assert difference.abs().max() < 1e-4
        for what in ("all", "transformer", "top:2") if kept > 1 else ("all", "transformer"):
            model.set_trainable(what)
            model.zero_grad()
            weighted_sum(model(input_values, mask)[0].values()).backward()
            assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_layers_that_do_not_exist_are_refused():
    model = WavLM(NARROW)
    for what in ("top:0", "top:4", "top:", "top:x", "some", ""):
        with pytest.raises(WavLMError, match=f"--unfreeze {what}: .*between 1 and 3"):
            model.set_trainable(what)
    for layers in ([4], [-1], []):
        with pytest.raises(ValueError, match=r"layers .* has layers 0 to 3"):
            model(torch.zeros(1, 400), layers=layers)
    with pytest.raises(ValueError, match=r"layers 9: .* 0 to 3"):
        model.truncate(9)


@pytest.mark.parametrize("what", ["none", "top:1", "transformer", "all"])
def test_dropout_acts_only_in_training_and_only_where_something_trains(what):
    model = WavLM(NARROW)
    model.set_trainable(what)
    input_values, mask = batch([9_000, 5_000])
    model.train()
    kept, (one, _) = kept_bytes(lambda: model(input_values, mask, layers=range(4)))
    two, _ = model(input_values, mask, layers=range(4))
    assert bool(kept) == (what != "none")  # what is frozen keeps nothing for backward
    differ = [not torch.equal(one[i], two[i]) for i in range(4)]
    first = {"none": 4, "top:1": 3, "transformer": 0, "all": 0}[what]
    assert differ == [i >= first for i in range(4)]
    model.eval()
    one, two = model(input_values, mask), model(input_values, mask)
    assert torch.equal(one[0][3], two[0][3])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("what", ["top:2", "all"])
def test_gradient_checkpointing_changes_no_gradient_with_dropout_on(what, attention):
    gradients, sizes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = randomise(WavLM(NARROW)).train()
        model.attention, model.gradient_checkpointing = attention, recompute
        model.set_trainable(what)
        input_values, mask = batch([9_000, 5_000])
        torch.manual_seed(1)
        kept, (states, _) = kept_bytes(lambda m=model, x=input_values, y=mask: m(x, y))
        weighted_sum(states.values()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        dense = [shape for shape, _ in kept if shape[-2:] == (27, 27)]
        assert bool(dense) == (attention != "fused" and not recompute)
        sizes.append(sum(size for _, size in kept))
    assert sizes[1] < 0.85 * sizes[0]
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_frozen_cnn_gives_the_same_in_slices(norm):
    model = WavLM(dataclasses.replace(NARROW, feat_extract_norm=norm)).eval()
    input_values, mask = batch([150_000, 180_000, 90_000])  # more than 30 s together
    at_once, _ = model(input_values, mask, layers=[0])
    model.set_trainable("transformer")
    sliced, _ = model(input_values, mask, layers=[0])
    torch.testing.assert_close(sliced[0], at_once[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- memory, precision, devices
def attention_inputs(num_frames, dtype, device="cpu", kind="fused", heads=4, head_dim=64):
    """q, k, v, gate, position, key_bias of 2 utterances; all but the last train."""
    width = math.ceil(num_frames / 8) * 8
    shapes = [(2, heads, num_frames, head_dim)] * 3 + [(2, heads, num_frames, 1)]
    shapes += [(heads, num_frames + width - 1) if kind == "fused" else (heads, num_frames, width)]
    tensors = [torch.randn(s, dtype=dtype, device=device).requires_grad_() for s in shapes]
    return [*tensors, torch.zeros(2, 1, 1, width, dtype=dtype, device=device)]


def test_fused_attention_keeps_nothing_for_backward_that_grows_with_frames_squared_on_cuda():
    for attention, dense_tensors in (("fused", 0), ("eager", 1)):
        inputs = attention_inputs(77, torch.half, "meta", kind=attention)
        kept, _ = kept_bytes(partial(attend, *inputs, 0.0, attention))
        assert sum(math.prod(shape) >= 2 * 4 * 77**2 for shape, _ in kept) == dense_tensors


# ---------------------------------------------------------------- fused attention
def fused(*inputs):
    return attend(*inputs, 0.0, "fused")


def kernel(*inputs):
    """What attend does on CUDA."""
    return wavlm.KernelAttention.apply(*inputs, 0.0)


def assert_equals_eager(inputs, counts, tolerance, attention=fused):
    """Output and gradients of inputs in their dtype against eager attention in float64."""
    num_frames = inputs[0].shape[2]
    exact = [x.detach().double().requires_grad_() for x in inputs[:5]]
    table = wavlm.dense_table(exact[4], num_frames)
    wanted = attend(*exact[:4], table, inputs[5].double(), 0.0, "eager")
    got = attention(*inputs)
    real = torch.arange(num_frames) < torch.tensor(counts)[:, None]
    real = real[:, None, :, None].to(got.device)
    weight = torch.randn_like(wanted) * real
    wanted_grads = torch.autograd.grad(wanted, exact, weight)
    got_grads = torch.autograd.grad(got, inputs[:5], weight.to(got.dtype))
    names = ("output", "q", "k", "v", "gate", "position")
    pairs = zip((wanted * real, *wanted_grads), (got * real, *got_grads))
    for name, (want, have) in zip(names, pairs):
        error = (want - have).abs().max() / want.abs().max().clamp(min=0.1)
        assert error < tolerance, f"{name}: {error:.2e} at T = {num_frames}"
        assert have.shape == want.shape and torch.isfinite(have).all()


TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
TOLERANCES += [(torch.float16, 0.005)]
LENGTHS = (1, 2, 7, 8, 9, 63, 150, 301)


def ragged(inputs, num_frames):
    """The same with the second utterance padded, to half and to nothing."""
    for count in dict.fromkeys((num_frames, (num_frames + 1) // 2, 0)):
        padding = inputs[5].clone()
        padding[1, ..., count:num_frames] = wavlm.PADDING_BIAS
        yield [*inputs[:5], padding], [num_frames, count]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_fused_attention_on_cpu_equals_eager_at_every_length(dtype, tolerance):
    for num_frames in LENGTHS:
        inputs = attention_inputs(num_frames, dtype, head_dim=16)
        for padded, counts in ragged(inputs, num_frames):
            assert_equals_eager(padded, counts, tolerance)

    for num_frames, heads in ((400, 3), (700, 2), (1500, 1)):  # in blocks of heads and of rows
        inputs = attention_inputs(num_frames, dtype, heads=heads, head_dim=16)
        inputs[5][1, ..., 390:num_frames] = wavlm.PADDING_BIAS
        assert heads * num_frames**2 > wavlm.CPU_BLOCK
        assert_equals_eager(inputs, [num_frames, 390], max(tolerance, 2e-5))


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_attention_drops_the_same_in_forward_and_backward(frozen):
    inputs = attention_inputs(6, torch.float64, heads=2, head_dim=2)
    inputs[5][1, ..., 4:6] = wavlm.PADDING_BIAS
    inputs[4].requires_grad_(not frozen)  # the position table below top:K is frozen

    def seeded(*tensors):
        torch.manual_seed(3)
        return attend(*tensors, inputs[5], 0.3, "fused")

    assert torch.autograd.gradcheck(seeded, inputs[:5])
    exact = fused(*inputs)
    mean = sum(attend(*inputs, 0.3, "fused") for _ in range(400)) / 400
    assert (mean - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_dropout_drops_its_share_and_keeps_the_mean():
    kept = wavlm.keep_mask(np.random.SFC64(1), 0.1, torch.empty(1_000_003))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(0.9, abs=0.0015)  # five standard deviations
    x = torch.ones(1000, 1000, requires_grad=True)
    y = wavlm.Dropout(0.25)(x)
    assert y.mean().item() == pytest.approx(1, abs=0.003)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)  # of ones: zero where dropped, the scale where kept
    assert wavlm.Dropout(0.25).eval()(x) is x
    torch.manual_seed(5)
    first = wavlm.Dropout(0.25)(x)
    assert not torch.equal(first, wavlm.Dropout(0.25)(x))
    torch.manual_seed(5)
    assert torch.equal(first, wavlm.Dropout(0.25)(x))


def plain_forward(q, k, v, bias, _a, _b, _c, _d, dropout, causal, lse):
    """What the CUDA kernel computes, (B, T, H, d) in and out; no dropout."""
    assert bias.dtype == q.dtype and all(s % 8 == 0 for s in bias.stride()[:-1])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + bias
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1), torch.tensor(0), torch.tensor(0), q.shape[1], k.shape[1]


def plain_backward(grad, q, k, v, bias, out, *_rest, num_splits_key):
    """Its gradients, by autograd."""
    assert num_splits_key == 1  # or gradients of keys are added in any order
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v, bias)]
        inputs[3] = bias.detach().contiguous().requires_grad_()
        scores = torch.einsum("bihd,bjhd->bhij", *inputs[:2]) * q.shape[-1] ** -0.5 + inputs[3]
        again = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), inputs[2])
    torch.testing.assert_close(again, out)
    return torch.autograd.grad(again, inputs, grad)


def test_the_cuda_path_around_its_kernel_equals_eager(monkeypatch):
    """Plain torch takes the place of the kernel, on CPU tensors."""
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", plain_forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", plain_backward)
    for num_frames in (1, 7, 8, 30):
        inputs = attention_inputs(num_frames, torch.float64, head_dim=8)
        for padded, counts in ragged(inputs, num_frames):
            if counts[1]:  # if all is padding the two differ, and nothing reads them
                assert_equals_eager(padded, counts, 1e-12, kernel)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES[1:])
def test_fused_attention_on_cuda_equals_eager_and_repeats_bit_for_bit(dtype, tolerance):
    for num_frames in (*LENGTHS, 1500):
        inputs = attention_inputs(num_frames, dtype, "cuda")
        for padded, counts in ragged(inputs, num_frames):
            if counts[1]:
                assert_equals_eager(padded, counts, max(tolerance, 1e-3))
        grads = []
        for _ in range(2):
            torch.manual_seed(1)
            out = attend(*inputs, 0.1, "fused")
            grads.append(torch.autograd.grad(out, inputs[:5], torch.ones_like(out)))
        assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_the_feed_forward_keeps_its_input_and_not_its_activation():
    torch.manual_seed(0)
    layer = wavlm.FeedForward(SIZES["tiny"])
    plain = torch.nn.Sequential(layer.intermediate_dense, torch.nn.GELU(), layer.output_dense)
    layer.eval()
    x = torch.randn(3, 5, 128, requires_grad=True)
    weight = torch.randn(3, 5, 128)
    results = []
    for module in (layer, plain):
        kept, y = kept_bytes(lambda m=module: m(x))
        grads = torch.autograd.grad(y, [x, *plain.parameters()], weight)
        results.append((sum(size == 4 * 3 * 5 * 512 for _, size in kept), y, *grads))
    assert results[0][0] == 1 and results[1][0] == 2
    for got, wanted in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stable", [True, False])
def test_bfloat16_autocast_on_cpu_stays_close_to_float32(stable, attention):
    model = WavLM(dataclasses.replace(NARROW, do_stable_layer_norm=stable)).eval()
    model.attention = attention
    input_values, mask = batch([9_000, 5_000])
    exact, frame_mask = model(input_values, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model(input_values, mask)
    rough[3].float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    error = (rough[3].float() - exact[3])[frame_mask]
    assert error.square().mean().sqrt() < 0.02 * exact[3][frame_mask].square().mean().sqrt()


@pytest.mark.slow
def test_a_layer_compiles_as_one_graph_that_serves_every_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = WavLM(dataclasses.replace(NARROW, num_hidden_layers=1)).train()
    model.attention = "sdpa"  # fused on a CPU is a loop, which breaks the graph
    for layer in model.encoder.layers:
        layer.compile(backend=counter, fullgraph=True, dynamic=True)
    compiled = []
    for length in (9_000, 5_000, 12_345):
        input_values, mask = batch([length, length // 2])
        model(input_values, mask)[0][1].sum().backward()
        compiled.append(counter.frame_count)
    assert compiled[0] >= 1 and compiled[-1] == compiled[1] <= 4


def test_a_compiled_layer_keeps_no_attention_bias():
    """The kernel's attention, on meta tensors, through the partitioner that inductor uses."""
    kept = []

    def forward_graph(graph, _):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        values = [node.meta["val"] for node in output.args[0] if hasattr(node, "meta")]
        kept.extend(value.shape for value in values if isinstance(value, torch.Tensor))
        return graph.forward

    backend = aot_autograd(
        fw_compiler=forward_graph,
        bw_compiler=lambda graph, _: graph.forward,
        partition_fn=min_cut_rematerialization_partition,
    )
    model = EmotionModel(ModelConfig(prosody_dim=0), WavLM(NARROW))
    trials.compile_layers(model)  # its settings of torch
    with torch.device("meta"):
        layer = wavlm.Layer(NARROW, True).half().train()
        frames, padded, heads = 65, 72, NARROW.num_attention_heads
        x = torch.randn(2, frames, NARROW.hidden_size, dtype=torch.half, requires_grad=True)
        position = torch.randn(heads, frames + padded - 1, requires_grad=True)
        key_bias = torch.zeros(2, 1, 1, padded, dtype=torch.half)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    compiled(x, position, key_bias, "fused").sum().backward()
    assert kept and not [s for s in kept if len(s) > 3 and min(s[-2:]) >= frames]  # (B, H, T, T)


def test_the_random_sizes_start_as_transformers_starts():
    ours = dict(WavLM(SIZES["tiny"]).named_parameters())
    config = {k: v for k, v in SIZES["tiny"].to_dict().items() if k != "final_layer_norm"}
    for name, p in WavLMModel(HFConfig(**config)).named_parameters():
        if "pos_conv_embed" in name:  # transformers' draw is lost behind weight norm
            continue
        mine = ours[name].detach()
        assert mine.mean().item() == pytest.approx(p.mean().item(), abs=0.05 + 2 * p.std().item())
        if p.numel() > 1000:
            assert mine.std().item() == pytest.approx(p.std().item(), rel=0.1)
    conv = WavLM(SIZES["tiny"]).encoder.pos_conv_embed.conv
    assert conv.weight.std().item() == pytest.approx(2 / math.sqrt(128 * 128), rel=0.05)
