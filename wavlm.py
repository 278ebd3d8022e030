"""WavLM alone: any Hugging Face WavLM checkpoint in one file, numerically equal to transformers'.

    from wavlm import load_wavlm
    model = load_wavlm("tiny")                       # random weights, no download
    model = load_wavlm("microsoft/wavlm-large")      # hub name, or a local Hugging Face directory
    model.set_trainable("top:4")                     # or add_lora(model, rank=8, alpha=8)
    states, frame_mask = model(input_values, attention_mask, layers=[6, 12, 18, 24])

To use it elsewhere, copy this file. It needs torch and numpy; huggingface_hub and safetensors are
imported only when weights are read or written. Attention on a CPU is a section of its own at the
end, which may be deleted.

Not here: LayerDrop (a rank that skips a layer breaks DDP), SpecAugment (masked_spec_embed is only
kept to be saved again), adapters, task heads. The caller gives each utterance zero mean and unit
variance over its real samples.

Shapes: B utterances, L samples, T frames (about L / 320), D width, H heads, d = D / H, N layers,
W = T rounded up to a multiple of 8.

Padding: if feat_extract_norm is "layer" (Large), pass attention_mask; padding then does not change
an utterance's output. If it is "group" (Base), the first norm averages over all L samples, padding
included: such checkpoints were trained on zero-padded batches without a mask.

References: Chen et al. 2021 (arXiv 2110.13900); transformers' modeling_wavlm.py, with which
tests/test_wavlm.py compares every hidden state and gradient.
"""

import dataclasses
import itertools
import json
import logging
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("vatune")

ATTENTIONS = ("fused", "sdpa", "eager")
CNN_SLICE_SAMPLES = 30 * 16_000  # the frozen CNN takes about this much at a time: bounds its peak
# Added to the scores of padding. Its exp is 0, yet float16 holds it; if all keys are padding the
# softmax stays finite (-inf gives NaN) and the log-sum-exp keeps its digits (-1e38 keeps none).
PADDING_BIAS = -30_000.0


class WavLMError(ValueError):
    """A checkpoint that cannot be read, or layers to train that do not exist; its one line
    names the file (or the flag of train.py) and the fix. Any other exception is a bug."""


# ---------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class WavLMConfig:
    """The fields of a WavLM config.json that matter here, with transformers' names and defaults.

    `final_layer_norm` is ours: False after `WavLM.truncate`, which makes an inner layer the last.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: Sequence[int] = (512,) * 7
    conv_kernel: Sequence[int] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: Sequence[int] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    num_buckets: int = 320
    max_bucket_distance: int = 800
    do_stable_layer_norm: bool = False
    mask_time_prob: float = 0.05  # masked_spec_embed exists if this or the next is above 0
    mask_feature_prob: float = 0.0
    final_layer_norm: bool = True
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: object = "WavLM config") -> "WavLMConfig":
        """Config from the dict of a config.json, all of which is kept to be saved again.

        WavLMError, which names `source`, for a value that this file has no code for.
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"raw"}
        config = cls(**{k: v for k, v in raw.items() if k in names}, raw=dict(raw))
        known = {"feat_extract_norm": ("layer", "group"), "hidden_act": ("gelu",)}
        known["feat_extract_activation"] = ("gelu",)
        for name, allowed in known.items():
            value = getattr(config, name)
            if value not in allowed:
                raise WavLMError(f"{source}: {name} is {value!r}, not {' or '.join(allowed)}")
        width, heads = config.hidden_size, config.num_attention_heads
        if heads < 1 or width % heads:
            raise WavLMError(f"{source}: {heads} attention heads do not divide hidden_size {width}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers and `from_dict` read."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        raw = fields.pop("raw")
        return {**raw, **fields, "model_type": "wavlm", "architectures": ["WavLMModel"]}


# base and large are microsoft/wavlm-base(-plus) and -large: shapes checked by parameter count,
# dropouts from memory [guess] (a checkpoint brings its config). tiny is ours: 1 M parameters.
SIZES = {
    "tiny": WavLMConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        conv_dim=(48,) * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        activation_dropout=0.0,
        mask_time_prob=0.0,
    ),
    "base": WavLMConfig(activation_dropout=0.0, feat_proj_dropout=0.1),
    "large": WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        activation_dropout=0.0,
        feat_proj_dropout=0.1,
        mask_time_prob=0.075,
    ),
}


# ---------------------------------------------------------------------------- CNN front end
def autocast_off(x: Tensor) -> torch.autocast:
    """No autocast for x's device. Meta tensors have none; they follow the CPU's."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x) in x's dtype, statistics in float32. Under autocast a module would keep a float32
    copy of x for backward, and return another that every linear map after it casts and keeps."""
    if x.dtype == norm.weight.dtype:
        return norm(x)
    with autocast_off(x):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


class ConvLayer(nn.Module):
    """One strided convolution, (B, T, C) to (B, T', C'), as matrix products over rows of frames:
    nothing is copied or transposed, 1.7 times as fast as nn.Conv1d on a CPU [measured].

    norm: "layer" (over channels), "group" (over time) or None.
    """

    def __init__(self, config: WavLMConfig, index: int, norm: str | None) -> None:
        super().__init__()
        in_dim = config.conv_dim[index - 1] if index else 1
        out_dim = config.conv_dim[index]
        kernel, stride = config.conv_kernel[index], config.conv_stride[index]
        self.conv = nn.Conv1d(in_dim, out_dim, kernel, stride, bias=config.conv_bias)
        if norm == "layer":
            self.layer_norm = nn.LayerNorm(out_dim)
        elif norm == "group":
            self.layer_norm = nn.GroupNorm(out_dim, out_dim)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        frames = (x.shape[1] - kernel) // stride + 1
        weight = self.conv.weight.permute(2, 1, 0)  # (kernel, C, C')
        step = kernel if x.shape[2] == 1 else stride  # copying the waveform costs little
        out = None
        for first in range(0, kernel, step):
            taps = weight[first : first + step]
            rows = x[:, first:].unfold(1, len(taps), stride)[:, :frames]  # (B, T', C, taps)
            rows, taps = rows.transpose(2, 3).flatten(2), taps.flatten(0, 1)
            if out is None:
                out = rows @ taps  # (B, T', C')
            else:
                out = torch.baddbmm(out, rows, taps.to(out.dtype).expand(len(x), -1, -1))
        if self.conv.bias is not None:
            out = out + self.conv.bias.to(out.dtype)
        if self.norm == "layer":
            out = layer_norm(self.layer_norm, out)
        elif self.norm == "group":
            out = self.layer_norm(out.transpose(1, 2)).transpose(1, 2)
        return F.gelu(out)


class FeatureExtractor(nn.Module):
    """The CNN: (B, L) waveform to (B, T, conv_dim[-1]) features, 50 frames per second."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        norms = ["layer"] * len(config.conv_dim)
        if config.feat_extract_norm == "group":
            norms = ["group"] + [None] * (len(config.conv_dim) - 1)
        self.conv_layers = nn.ModuleList(ConvLayer(config, i, n) for i, n in enumerate(norms))

    def forward(self, input_values: Tensor) -> Tensor:
        x = input_values[..., None]  # (B, L, 1)
        for layer in self.conv_layers:
            x = layer(x)  # (B, frames so far, conv_dim)
        return x


class FeatureProjection(nn.Module):
    """Layer norm, and a linear map from the CNN's channels to the Transformer's width."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)
        self.dropout = Dropout(config.feat_proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(layer_norm(self.layer_norm, x)))


class PositionConv(nn.Module):
    """Position embedding by a wide grouped convolution over time; the length stays the same."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.num_conv_pos_embeddings
        groups = config.num_conv_pos_embedding_groups
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=2 / math.sqrt(kernel * width))
        nn.init.zeros_(conv.bias)
        self.conv = weight_norm(conv, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            # under bfloat16, oneDNN on a CPU with AMX gives wrong sums for groups of 8 channels
            # [measured with torch 2.14.1: tiny's output was 45 % off]
            with torch.autocast("cpu", enabled=False):
                y = self.conv(x.to(self.conv.bias.dtype).transpose(1, 2)).to(x.dtype)
        else:
            y = self.conv(x.transpose(1, 2))
        y = y[..., : x.shape[1]]  # an even kernel gives T + 1 frames
        return F.gelu(y).transpose(1, 2)


# ---------------------------------------------------------------------------- attention
class Attention(nn.Module):
    """Self-attention with a gated relative position bias: gate[b, h, i] * table[h, i, j], a gate of
    the layer's input and a table that layer 1 has for all layers."""

    def __init__(self, config: WavLMConfig, has_table: bool) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.dropout = config.attention_dropout
        self.num_buckets, self.max_distance = config.num_buckets, config.max_bucket_distance
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))
        self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
        if has_table:
            self.rel_attn_embed = nn.Embedding(self.num_buckets, self.num_heads)

    def position_bias(self, num_frames: int) -> Tensor:
        """(H, T + W - 1) bias before gating; that of key j for query i is at j - i + T - 1."""
        width = -(-num_frames // 8) * 8
        device = self.rel_attn_embed.weight.device
        distance = torch.arange(1 - num_frames, width, device=device)  # j - i
        half = self.num_buckets // 2  # buckets per direction: the first half of them hold one
        exact = half // 2  # distance each, the width of the others grows with the distance
        far = distance.abs().clamp(min=exact)
        log_ratio = torch.log(far.float() / exact) / math.log(self.max_distance / exact)
        far = (exact + log_ratio * (half - exact)).long().clamp(max=half - 1)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far) + (distance > 0) * half
        return self.rel_attn_embed(bucket).t()

    def gate(self, x: Tensor) -> Tensor:
        """(B, H, T, 1) factor of the position bias, in float32 or wider."""
        # transformers sums each four of the eight outputs; summing the weights is the same map
        weight = self.gru_rel_pos_linear.weight.view(2, 4, self.head_dim).sum(1)
        bias = self.gru_rel_pos_linear.bias.view(2, 4).sum(1)
        logits = F.linear(x.unflatten(-1, (self.num_heads, self.head_dim)), weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        a, b = torch.sigmoid(logits).unbind(-1)  # (B, T, H) each
        gate = a * (b * self.gru_rel_pos_const.flatten() - 1.0) + 2.0
        return gate.transpose(1, 2)[..., None]

    def forward(self, x: Tensor, position: Tensor, key_bias: Tensor | None, kind: str) -> Tensor:
        split = (self.num_heads, self.head_dim)
        q = self.q_proj(x).unflatten(-1, split).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).unflatten(-1, split).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, self.gate(x).to(q.dtype), position, key_bias, dropout, kind)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


def attend(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, position: Tensor, key_bias: Tensor | None,
    dropout: float, kind: str,
) -> Tensor:  # fmt: skip
    """(B, H, T, d) softmax(q k' / sqrt(d) + gate * table + key_bias) v, computed as `kind` says.

    gate (B, H, T, 1) and key_bias (B, 1, 1, W) have q's dtype. `position` is what the table is
    made of, (H, T + W - 1), for "fused", and `dense_table` of it in q's dtype for the others.
    Of all (B, H, T, T), "fused" keeps nothing for backward, "sdpa" and "eager" one or more.
    "blocks" is what "fused" does on a CPU, on any device: memory.py plans a CPU by it.
    """
    if kind in ("fused", "blocks"):
        on_cpu = kind == "blocks" or q.device.type == "cpu"
        way = block_attention if on_cpu else KernelAttention.apply
        return way(q, k, v, gate, position, key_bias, dropout)
    bias = dense_bias(gate, position, key_bias)
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    if kind == "eager":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
        return F.dropout(scores.softmax(-1), dropout) @ v
    raise ValueError(f"attention {kind!r} is not one of {ATTENTIONS}")


def dense_table(position: Tensor, num_frames: int) -> Tensor:
    """(H, T, W) from position (H, T + W - 1): row i, column j holds the bias of distance j - i. W
    columns, not T: the memory-efficient kernel wants row strides that are multiples of 8."""
    # size, not shape: torch 2.11 fails to compile a shape with a length it knows (the heads)
    rows_reversed = position.unfold(1, position.size(1) - num_frames + 1, 1)
    return rows_reversed.flip(1).contiguous()  # flip alone may give columns the stride of rows


def dense_bias(gate: Tensor, table: Tensor, key_bias: Tensor | None) -> Tensor:
    """(B, H, T, T), a view with row stride W: what is added to the scores."""
    bias = gate * table if key_bias is None else torch.addcmul(key_bias, gate, table)
    return bias[..., : table.size(1)]


def antidiagonal_sums(x: Tensor) -> Tensor:
    """(H, R + n - 1) sums of x (H, R, n) over i + j = 0, 1, ..., in float32 or wider."""
    heads, rows, columns = x.shape
    wide = columns + rows - 1
    slanted = F.pad(x, (0, rows - 1)).as_strided(
        (heads, rows, wide), (rows * wide, wide - 1, 1)
    )  # row i shifted right by i: zeros of the padding come in at both ends
    return slanted.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


class KernelAttention(torch.autograd.Function):
    """The "fused" attention on CUDA: the memory-efficient kernel, its bias rebuilt in backward.
    Deterministic: keys are not split, so no two blocks of the kernel add to one gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, position: Tensor,
        key_bias: Tensor | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, d)
        table = dense_table(position.to(q.dtype), q.shape[1])
        bias = dense_bias(gate, table, key_bias)
        out, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            q, k, v, bias, None, None, None, None, dropout, 0, True
        )
        ctx.save_for_backward(q, k, v, gate, position, key_bias, out, lse, seed, offset)
        ctx.dropout = dropout
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate, position, key_bias, out, lse, seed, offset = ctx.saved_tensors
        num_frames = q.shape[1]
        table = dense_table(position.to(q.dtype), num_frames)
        bias = dense_bias(gate, table, key_bias)
        dq, dk, dv, dbias = torch.ops.aten._efficient_attention_backward(
            grad.transpose(1, 2), q, k, v, bias, out, None, None, num_frames, num_frames, lse,
            ctx.dropout, seed, offset, 0, True, num_splits_key=1,
        )  # fmt: skip
        del bias
        dgate = torch.einsum("bhij,hij->bhi", dbias, table[..., :num_frames])[..., None]
        dposition = None
        if ctx.needs_input_grad[4]:
            dtable = torch.einsum("bhij,bhi->hij", dbias, gate[..., 0])
            dposition = antidiagonal_sums(dtable.flip(1))  # (H, 2T - 1): no key is beyond T
            dposition = F.pad(dposition, (0, position.shape[1] - dposition.shape[1]))
        return (*(g.transpose(1, 2) for g in (dq, dk, dv)), dgate, dposition, None, None)


class GeluLinear(torch.autograd.Function):
    """linear(gelu(x), weight, bias) that keeps x for backward and computes gelu(x) again, in under
    1 % of a layer's time [measured, CPU]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.ops.aten.gelu_backward(grad @ weight, x)
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        flat = grad.flatten(0, -2)
        return dx, flat.mT @ F.gelu(x).flatten(0, -2), flat.sum(0)


class FeedForward(nn.Module):
    """Two linear maps with gelu between them."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_dropout = Dropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.intermediate_dense(x)
        if self.intermediate_dropout.p == 0:
            weight, bias = self.output_dense.weight.to(x.dtype), self.output_dense.bias.to(x.dtype)
            return self.output_dropout(GeluLinear.apply(x, weight, bias))
        return self.output_dropout(self.output_dense(self.intermediate_dropout(F.gelu(x))))


class Layer(nn.Module):
    """One Transformer layer; norms come first (do_stable_layer_norm) or after each residual."""

    def __init__(self, config: WavLMConfig, has_table: bool) -> None:
        super().__init__()
        self.norm_first = config.do_stable_layer_norm
        self.attention = Attention(config, has_table)
        self.dropout = Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, position: Tensor, key_bias: Tensor | None, kind: str) -> Tensor:
        if self.norm_first:
            y = layer_norm(self.layer_norm, x)
            x = x + self.dropout(self.attention(y, position, key_bias, kind))
            return x + self.feed_forward(layer_norm(self.final_layer_norm, x))
        x = x + self.dropout(self.attention(x, position, key_bias, kind))
        x = layer_norm(self.layer_norm, x)
        return layer_norm(self.final_layer_norm, x + self.feed_forward(x))


class Encoder(nn.Module):
    """Position convolution, layers, and the norm that stands before or after all layers."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.pos_conv_embed = PositionConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(Layer(config, i == 0) for i in range(config.num_hidden_layers))
        self.norm_first = config.do_stable_layer_norm

    def embed(self, x: Tensor) -> Tensor:
        """Hidden state 0 (B, T, D): what layer 1 reads."""
        x = x + self.pos_conv_embed(x)
        return self.dropout(x if self.norm_first else layer_norm(self.layer_norm, x))


# ---------------------------------------------------------------------------- the model
class WavLM(nn.Module):
    """WavLM with random weights; parameter names are those of transformers' WavLMModel.

    `attention` (one of ATTENTIONS) and `gradient_checkpointing` (recompute each trainable layer in
    backward) are plain attributes. Everything trains until `set_trainable` says otherwise.
    """

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = "fused"
        self.gradient_checkpointing = False
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:
            self.masked_spec_embed = nn.Parameter(torch.rand(config.hidden_size))
        self.encoder = Encoder(config)
        self.apply(partial(_init_weights, std=config.initializer_range))
        projection = self.feature_projection.projection
        bound = projection.in_features**-0.5
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.uniform_(projection.bias, -bound, bound)
        self.frozen_blocks = 0
        self.set_trainable("all")

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """The hidden states of `layers`, {layer: (B, T, D)}, and frame_mask (B, T) or None.

        attention_mask (B, L): 1 or True = sample, 0 = padding, all of it behind the samples.
        frame_mask: True = frame; other frames hold arbitrary finite numbers. Layer 0 is the input
        of layer 1; layer N, the default, is the output, after the final layer norm if the config
        has one (transformers' last_hidden_state). Nothing above the highest layer is computed, so
        `truncate` to it before training, or DDP waits for gradients that never come.
        """
        num_layers = len(self.encoder.layers)
        layers = [num_layers] if layers is None else layers
        if not layers or min(layers) < 0 or max(layers) > num_layers:
            raise ValueError(f"layers {list(layers)}: this WavLM has layers 0 to {num_layers}")
        x, frame_mask, states = self.run_frozen(input_values, attention_mask, layers)
        return states | self.run_trained(x, frame_mask, layers), frame_mask

    def run_frozen(
        self, input_values: Tensor, attention_mask: Tensor | None, layers: Sequence[int]
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """The part of forward below the lowest block that trains, which depends on the input alone.

        (what that block reads, frame_mask, those of `layers` that lie below it). What it reads is
        the waveform if all blocks train, the CNN's features (B, T, conv_dim) if all but the CNN do,
        else a hidden state (B, T, D). `run_trained` goes on from there.
        """
        frame_mask = None
        if attention_mask is not None:
            num_frames = self.frame_lengths(input_values.shape[1])
            lengths = self.frame_lengths(attention_mask.sum(1))
            frame_mask = torch.arange(num_frames, device=lengths.device) < lengths[:, None]
        stop = min(self.frozen_blocks, 2 + max(layers))
        with torch.no_grad():
            x, states = self._run_blocks(input_values, frame_mask, layers, 0, stop)
        return x, frame_mask, states

    def run_trained(
        self, x: Tensor, frame_mask: Tensor | None, layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """The rest of forward from `run_frozen`'s x: the hidden states that were still missing."""
        return self._run_blocks(x, frame_mask, layers, self.frozen_blocks, 2 + max(layers))[1]

    def _run_blocks(
        self, x: Tensor, frame_mask: Tensor | None, layers: Sequence[int], first: int, stop: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Blocks first..stop - 1 (0 the CNN, 1 the embedding, 1 + i layer i), all of them frozen or
        all trained: what comes out, and those of `layers` that are among them."""
        states: dict[int, Tensor] = {}
        position = key_bias = None
        for block in range(first, stop):
            if block == 0:
                x = self._features(x)  # (B, T, conv_dim)
            elif block == 1:
                x = self.feature_projection(x)  # (B, T, D)
                if frame_mask is not None:
                    x = x.masked_fill(~frame_mask[..., None], 0.0)
                x = self.encoder.embed(x)
            else:
                if position is None:
                    position, key_bias = self._biases(x, frame_mask)
                x = self._layer(block - 1, x, position, key_bias)
            if block - 1 in layers:
                states[block - 1] = x
        return x, states

    def _features(self, input_values: Tensor) -> Tensor:
        if self.frozen_blocks == 0:
            return self.feature_extractor(input_values)
        rows = max(1, CNN_SLICE_SAMPLES // input_values.shape[1])
        return torch.cat([self.feature_extractor(x) for x in input_values.split(rows)])

    def _biases(self, x: Tensor, frame_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What every layer adds to its scores: (position bias before gating, that of padding); x
        has the dtype that linear layers compute in: the weights' dtype or autocast's."""
        num_frames = x.shape[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_blocks < 3):
            position = self.encoder.layers[0].attention.position_bias(num_frames)
            width = position.shape[1] - num_frames + 1
            if self.attention in ("sdpa", "eager"):
                position = dense_table(position.to(x.dtype), num_frames)
        if frame_mask is None:
            return position, None
        key_bias = x.new_zeros(len(x), 1, 1, width)
        key_bias[..., :num_frames].masked_fill_(~frame_mask[:, None, None], PADDING_BIAS)
        return position, key_bias

    def _layer(self, i: int, x: Tensor, position: Tensor, key_bias: Tensor | None) -> Tensor:
        """Hidden state i from that of layer i - 1."""
        layer = self.encoder.layers[i - 1]
        trains = torch.is_grad_enabled() and self.frozen_blocks < 2 + i
        if trains and self.gradient_checkpointing:
            x = checkpoint(layer, x, position, key_bias, self.attention, use_reentrant=False)
        else:
            x = layer(x, position, key_bias, self.attention)
        if i == len(self.encoder.layers) and self._has_final_norm():
            x = layer_norm(self.encoder.layer_norm, x)
        return x

    def frame_lengths(self, lengths: Any) -> Any:
        """Frames that the CNN makes of `lengths` samples (int, array or tensor; at least 400)."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def set_trainable(self, what: str) -> None:
        """Freeze all blocks below the lowest that trains; WavLMError for any other `what`.

        what: "none"; "all"; "transformer" (all but the CNN); "top:K" (the last K layers and the
        final layer norm; the relative position table belongs to layer 1 and stays frozen with it);
        "lora" (what `add_lora` has added, and nothing else; blocks from layer 1 on then train).
        Frozen blocks run under no_grad and in eval mode. masked_spec_embed never trains, nor does
        a final layer norm that is not applied.
        """
        depth = len(self.encoder.layers)
        frozen_blocks = {"all": 0, "transformer": 1, "none": depth + 2}
        frozen_blocks |= {f"top:{k}": depth + 2 - k for k in range(1, depth + 1)}
        if any(name.endswith(LORA) for name, _ in self.named_parameters()):
            frozen_blocks["lora"] = 2
        if what not in frozen_blocks:
            raise WavLMError(
                f"--unfreeze {what}: give none, all, transformer, or top:K with K between 1 and "
                f"{depth}, the layers that this WavLM keeps"
            )
        self.frozen_blocks = frozen_blocks[what]
        self.requires_grad_(False)
        for block in self._blocks()[self.frozen_blocks :]:
            block.requires_grad_(True)
        if what == "lora":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.endswith(LORA))
        self.train(self.training)

    def train(self, mode: bool = True) -> "WavLM":
        """As nn.Module.train, but frozen blocks stay in eval mode (no dropout)."""
        super().train(mode)
        for block in self._blocks()[: self.frozen_blocks]:
            block.eval()
        return self

    def truncate(self, num_layers: int) -> None:
        """Drop all layers above `num_layers`; hidden states keep their meaning and gradients.

        A final layer norm is then no longer applied (its weights stay, frozen, to be saved).
        Call `set_trainable` after it: the lowest block that trains stays the same.
        """
        depth = len(self.encoder.layers)
        if not 0 <= num_layers <= depth:
            raise ValueError(f"layers {num_layers}: this WavLM has layers 0 to {depth}")
        if num_layers == depth:
            return
        del self.encoder.layers[num_layers:]
        self.config = dataclasses.replace(
            self.config, num_hidden_layers=num_layers, final_layer_norm=False
        )
        if self.config.do_stable_layer_norm:
            self.encoder.layer_norm.requires_grad_(False)

    def _has_final_norm(self) -> bool:
        return self.config.do_stable_layer_norm and self.config.final_layer_norm

    def _blocks(self) -> list[nn.ModuleList]:
        """What freezes together, in forward's order: the CNN, the embedding, then each layer."""
        encoder = self.encoder
        embedding = [self.feature_projection, encoder.pos_conv_embed, encoder.dropout]
        blocks = [[self.feature_extractor], embedding, *([layer] for layer in encoder.layers)]
        if not self.config.do_stable_layer_norm:
            embedding.append(encoder.layer_norm)
        elif self._has_final_norm():
            blocks[-1].append(encoder.layer_norm)
        return [nn.ModuleList(block) for block in blocks]


def _init_weights(module: nn.Module, std: float) -> None:
    """transformers' initialisation; modules with another scheme overwrite it."""
    if isinstance(module, ConvLayer):
        nn.init.kaiming_normal_(module.conv.weight)
        if module.conv.bias is not None:
            bound = (module.conv.in_channels * module.conv.kernel_size[0]) ** -0.5
            nn.init.uniform_(module.conv.bias, -bound, bound)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)


# ---------------------------------------------------------------------------- low-rank updates
LORA = (".lora_a", ".lora_b")  # how the names of their parameters end
LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LowRankLinear(nn.Module):
    """A linear map with weight W + scale * B A (arXiv 2106.09685), W that of `plain`: A (R, in) and
    B (out, R), which starts at zero, train, and W stays as it is."""

    def __init__(self, plain: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = plain.weight, plain.bias, scale
        self.lora_a = nn.Parameter(plain.weight.new_empty(rank, plain.in_features))
        self.lora_b = nn.Parameter(plain.weight.new_zeros(plain.out_features, rank))
        bound = plain.in_features**-0.5  # as in the authors' code
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)
        return F.linear(x, self.weight, self.bias) + update


def add_lora(model: WavLM, rank: int, alpha: float) -> None:
    """Gives q, k, v and out of every layer an update of this rank, times alpha / rank, which
    changes nothing yet; `set_trainable("lora")` then trains the updates alone."""
    for layer in model.encoder.layers:
        for name in LORA_PROJECTIONS:
            plain = getattr(layer.attention, name)
            setattr(layer.attention, name, LowRankLinear(plain, rank, alpha / rank))


@torch.no_grad()
def merge_lora(model: WavLM) -> None:
    """Adds the updates of `add_lora` to the weights: the model is an ordinary WavLM again."""
    for layer in model.encoder.layers:
        for name in LORA_PROJECTIONS:
            updated = getattr(layer.attention, name)
            plain = nn.Linear(*updated.weight.shape).to(updated.weight)  # width to width
            plain.weight.copy_(updated.weight + updated.scale * updated.lora_b @ updated.lora_a)
            plain.bias.copy_(updated.bias)
            setattr(layer.attention, name, plain)


# ---------------------------------------------------------------------------- weights on disk
def load_wavlm(name: str, revision: str | None = None, dropout: float | None = None) -> WavLM:
    """A WavLM in float32, with the weights that `name` stands for.

    name: "tiny", "base" or "large" (random weights); a directory or a hub repository with
    config.json and model.safetensors or pytorch_model.bin, in one file or in shards; or a file in
    one of the forms below. `revision` is a branch, tag or commit of the hub. `dropout`, if given,
    replaces the four dropouts of the checkpoint. WavLMError if it is not exactly a WavLM.
    """
    config = read_config(name, revision, dropout)
    if name in SIZES:
        return WavLM(config)
    checkpoint = read_checkpoint(name, revision)
    if checkpoint.prefix or checkpoint.naming != "transformers":
        log.info(
            f"{checkpoint.path}: a complete WavLM, names of {checkpoint.naming} with prefix "
            f"{checkpoint.prefix!r}; dropout {config.hidden_dropout:g}"
        )
    with torch.device("meta"):
        model = WavLM(config)
    state = checkpoint.state
    if hasattr(model, "masked_spec_embed"):  # torchaudio has none, and nothing here reads it
        state.setdefault("masked_spec_embed", torch.zeros(config.hidden_size))
    else:
        state.pop("masked_spec_embed", None)
    try:
        model.to_empty(device="cpu").load_state_dict(state)  # copies, to float32
    except RuntimeError as error:  # names or shapes
        found = f"weights do not fit the config: {str(error).partition(':')[2][:400]}"
        raise unusable(checkpoint.path, found) from error
    return model


def read_config(
    name: str, revision: str | None = None, dropout: float | None = None
) -> WavLMConfig:
    """The config of a WavLM; arguments and WavLMError as in `load_wavlm`."""
    config = SIZES.get(name) or WavLMConfig.from_dict(*find_config(name, revision))
    if dropout is None:
        return config
    names = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout")
    return dataclasses.replace(config, **dict.fromkeys(names, dropout))


def save_wavlm(model: WavLM, directory: str | Path) -> None:
    """Write config.json and model.safetensors, which `load_wavlm` and transformers load. After
    `truncate` the last state is transformers' hidden_states[-1], not its last_hidden_state, which
    is after the final layer norm."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")


def find_config(name: str, revision: str | None) -> tuple[dict[str, Any], Path]:
    """(the config.json of a WavLM or what stands for it, the file that it is from)."""
    folder = folder_of(name)
    path = find_file(folder, ("config.json",), revision)
    if path is None or name != folder:
        checkpoint = read_checkpoint(name, revision)
        if path is None or checkpoint.cfg:
            return config_from_weights(checkpoint), checkpoint.path
    raw = read_json(path)
    if raw.get("model_type") != "wavlm":
        raise unusable(path, f"model_type is {raw.get('model_type')!r}, not 'wavlm'")
    return raw, path


def find_file(name: str, files: Sequence[str], revision: str | None) -> Path | None:
    """Path of the first of `files` in a directory, None if it has none, or in a hub repository."""
    if Path(name).exists():
        paths = (Path(name) / file for file in files)
        return next((path for path in paths if path.is_file()), None)
    if name.count("/") > 1:  # a path rather than a name of the hub
        raise unusable(name, "no such file or directory")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except Exception as error:  # of the hub, the network, the disk: no common base class
            missing = isinstance(error, EntryNotFoundError)  # or offline and not cached
            if not missing or file == files[-1]:
                found = f"no such file or directory, and from the hub: {error}"
                raise unusable(name, found) from error


def folder_of(name: str) -> str:
    """Where the files of a checkpoint are: `name`, or the directory of a file."""
    return str(Path(name).parent) if Path(name).is_file() else name


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unusable(path, error) from error
    if not isinstance(content, dict):
        raise unusable(path, "not a JSON object")
    return content


def unusable(source: str | Path, found: object, remedy: str = "") -> WavLMError:
    """The error for a checkpoint that is not there or not a WavLM, in one line."""
    remedy = remedy or (
        f"give {', '.join(SIZES)}, a directory with config.json and model.safetensors, a "
        "checkpoint file, or a hub name like microsoft/wavlm-large"
    )
    return WavLMError(f"{source}: {' '.join(str(found).split())} ({remedy})")


class Checkpoint(NamedTuple):
    """The tensors of a WavLM on disk; most formats read one when it is used."""

    path: Path
    state: dict[str, Tensor]  # by names of transformers
    naming: str  # whose names they had, a value of MARKS
    prefix: str  # what stood before those names
    cfg: dict[str, Any]  # the config of fairseq, else empty


def read_checkpoint(name: str, revision: str | None) -> Checkpoint:
    """The WavLM in a file, a directory or a hub repository."""
    folder = folder_of(name)
    path = Path(name) if folder != name else find_file(folder, WEIGHTS, revision)
    if path is None:
        raise unusable(name, f"no {WEIGHTS[0]} or {WEIGHTS[1]} in this directory")
    if path.suffix != ".json":
        return find_wavlm(path, *read_tensors(path))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(read_json(path).get("weight_map", {}).values())):
        shard_path = find_file(folder, (shard,), revision)
        if shard_path is None:
            raise unusable(path, f"{shard} is missing", "copy every file that this one names")
        tensors |= read_tensors(shard_path)[0]
    return find_wavlm(path, tensors, {})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, cfg of fairseq or {}) of a file."""
    with open(path, "rb") as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer, not the file that it stands for"
        raise unusable(path, found, "run `git lfs pull` in its directory")
    try:
        if head[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path), {}
        mmap = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what the two libraries raise has no common base class
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            found = f"holds Python objects ({refused[1]}), which could run code when they are read"
            remedy = "if you trust it, load it and save its state_dict alone with torch.save"
        else:
            reason = f"{type(error).__name__} {str(error).partition('. ')[0]}"
            found = f"damaged, cut short or no checkpoint: {reason}"
            remedy = "copy or download it again"
        raise unusable(path, found, remedy) from error
    cfg = content.get("cfg") if isinstance(content, dict) else None
    return dict(flat_tensors(content)), cfg if isinstance(cfg, dict) else {}


def flat_tensors(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, named by the keys on the way to them."""
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from flat_tensors(value, f"{prefix}.{key}" if prefix else str(key))


# ---------------------------------------------------------------------------- forms of checkpoints
# The names of Microsoft's original files (fairseq's), of torchaudio's and of transformers', of
# a WavLM alone or inside a larger model: below wavlm., in state_dict, and so on.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in this order
WEIGHTS += tuple(f"{name}.index.json" for name in WEIGHTS)
# what DistributedDataParallel, FSDP and torch.compile insert into names, at any depth
WRAPPERS = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
MARKS = {  # a name that each WavLM has once: whose it is
    "encoder.pos_conv_embed.conv.bias": "transformers",
    "encoder.pos_conv.0.bias": "fairseq",
    "encoder.transformer.pos_conv_embed.conv.bias": "torchaudio",
}
TO_TRANSFORMERS = (  # no pattern of one naming matches a name of another
    # fairseq
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^mask_emb$", "masked_spec_embed"),
    (r"^(feature_extractor\.conv_layers\.\d+)\.0\.", r"\1.conv."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.2\.(1\.)?", r"\1.layer_norm."),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn\.", ".attention."),
    (r"\.grep_linear\.", ".gru_rel_pos_linear."),
    (r"\.grep_a$", ".gru_rel_pos_const"),
    (r"\.relative_attention_bias\.", ".rel_attn_embed."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
    # torchaudio
    (r"^encoder\.feature_projection\.", "feature_projection."),
    (r"^encoder\.transformer\.", "encoder."),
    (r"\.attention\.attention\.", ".attention."),
    # weight norm before torch 2
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
PARTS = ("feature_extractor.", "feature_projection.", "encoder.", "masked_spec_embed")
FROM_CFG = {  # our field: that of fairseq
    "hidden_act": "activation_fn",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "feat_proj_dropout": "dropout_input",
    "do_stable_layer_norm": "layer_norm_first",
    "max_bucket_distance": "max_distance",
}
PUBLISHED_CNN = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"


def find_wavlm(path: Path, tensors: dict[str, Tensor], cfg: dict[str, Any]) -> Checkpoint:
    """The only WavLM among the tensors, without what does not belong to it."""
    plain = {re.sub(WRAPPERS, "", name): name for name in tensors}
    marked = [(name, mark) for name in plain for mark in MARKS if f".{name}".endswith(f".{mark}")]
    if not marked:
        names = ", ".join([*tensors][:3]) or "none"
        raise unusable(path, f"no WavLM in it; its tensors are {names} ...")
    if len(marked) > 1:
        prefixes = ", ".join(repr(name.removesuffix(mark)) for name, mark in marked)
        raise unusable(path, f"more than one model in it: {prefixes}", "save the WavLM alone")
    ((name, mark),) = marked
    prefix = name.removesuffix(mark)
    state = {}
    for name, original in plain.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        for pattern, replacement in TO_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        if ".attention.in_proj_" in name:  # torchaudio has the three in one
            for part, tensor in zip("qkv", tensors[original].chunk(3)):
                state[name.replace("in_proj_", f"{part}_proj.")] = tensor
        elif name.startswith(PARTS):
            state[name] = tensors[original]
    if ".attention." in "".join(state) and "gru_rel_pos_const" not in "".join(state):
        raise unusable(path, "a HuBERT or wav2vec 2.0, not a WavLM: it has no gated position bias")
    return Checkpoint(path, state, MARKS[mark], plain[prefix + mark].removesuffix(mark), cfg)


def config_from_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """A config.json for weights that come without one, from their shapes and the cfg of fairseq.

    Shapes do not show strides, max_bucket_distance and whether norms come first; without a cfg they
    are taken to be those of the published WavLMs.
    """
    path, state, naming, _, cfg = checkpoint
    if naming == "transformers":
        raise unusable(path, "no config.json beside it", "copy it from where the weights are from")

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise unusable(path, f"incomplete, without {name}")
        return state[name].shape

    num_convs = sum(name.endswith(".conv.weight") for name in state)
    convs = [shape(f"feature_extractor.conv_layers.{i}.conv.weight") for i in range(num_convs)]
    cnn = []  # (kernel, stride) of each layer
    layers = str(cfg.get("conv_feature_layers", PUBLISHED_CNN))
    for group, times in re.findall(r"\[(.*?)\](?: *\* *(\d+))?", layers):
        cnn += re.findall(r"(\d+), *(\d+)\)", group) * int(times or 1)
    if [int(kernel) for kernel, _ in cnn] != [conv[2] for conv in convs]:
        raise unusable(path, "the strides of its CNN are unknown", "put a config.json beside it")
    width, group_width, kernel = shape(
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    )
    layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in state
    layer = "encoder.layers.0."
    return {
        "model_type": "wavlm",
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".gru_rel_pos_const") for name in state),
        "num_attention_heads": shape(f"{layer}attention.gru_rel_pos_const")[1],
        "intermediate_size": shape(f"{layer}feed_forward.intermediate_dense.weight")[0],
        "num_buckets": shape(f"{layer}attention.rel_attn_embed.weight")[0],
        "conv_dim": [conv[0] for conv in convs],
        "conv_kernel": [conv[2] for conv in convs],
        "conv_stride": [int(stride) for _, stride in cnn],
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in state,
        "num_conv_pos_embeddings": kernel,
        "num_conv_pos_embedding_groups": width // group_width,
        "feat_extract_norm": "layer" if layer_norms else "group",
        "do_stable_layer_norm": layer_norms,
        **{ours: cfg[theirs] for ours, theirs in FROM_CFG.items() if theirs in cfg},
    }


# ---------------------------------------------------------------------------- attention on a CPU
# For those who train without a GPU: faster than "eager", and no T x T scores are kept. If you only
# use GPUs, delete this section with the branch of `attend` that calls it; Dropout is nn.Dropout.
CPU_BLOCK = 400_000  # scores at a time: 1.6 MB, about a cache [measured]


class Block(NamedTuple):
    """Some query rows of some heads of one utterance of n frames, its keys in reverse order.

    With reversed keys the bias of row i and column j is at i + j + constant in the reversed
    `position`: an overlapping view of a few kB instead of a T x T table.
    """

    at: tuple[int, slice, slice]  # utterance, heads, rows
    keys: Tensor  # (heads, n, d)
    values: Tensor  # (heads, n, d)
    bias: Tensor  # (heads, rows, n) view, before gating
    diagonals: slice  # where that view lies in the reversed position
    probs: Tensor  # (heads, rows, n), a buffer that the next block uses again
    scratch: Tensor  # another
    keep: Tensor | None  # dropout: 1 = kept, 0 = dropped


def attention_blocks(
    inputs: tuple[Tensor | None, ...], dropout: float, seed: int
) -> Iterator[Block]:
    """Softmaxed scores of `attend`'s q, k, v, gate, position and key_bias, block by block, the same
    in forward and backward; padding is left out."""
    q, k, v, gate, position, key_bias = inputs
    batch, num_heads, num_frames, width = q.shape
    last = position.shape[1] - num_frames  # index of distance 0 in the reversed position
    position = position.to(q.dtype).flip(1)
    counts = [num_frames] * batch
    if q.is_meta:
        counts = [num_frames]  # no values: one utterance shows what all of them allocate
    elif key_bias is not None:
        counts = (key_bias[:, 0, 0, :num_frames] == 0).sum(1).tolist()
    bits = np.random.SFC64(seed)
    for b, count in enumerate(counts):
        if count == 0:
            continue
        keys, values = k[b, :, :count].flip(1), v[b, :, :count].flip(1)
        heads = min(num_heads, max(1, CPU_BLOCK // count**2))
        rows = min(count, max(1, CPU_BLOCK // (heads * count)))
        buffers = q.new_empty(3, heads * rows * count)
        head_spans = [slice(i, min(i + heads, num_heads)) for i in range(0, num_heads, heads)]
        row_spans = [slice(i, min(i + rows, count)) for i in range(0, count, rows)]
        for h, r in itertools.product(head_spans, row_spans):
            shape = (h.stop - h.start, r.stop - r.start, count)
            probs, scratch, keep = (x[: math.prod(shape)].view(shape) for x in buffers)
            first = last + 1 - count + r.start
            diagonals = slice(first, first + shape[1] + count - 1)
            bias = position[h, diagonals].unfold(1, count, 1)
            torch.mul(gate[b, h, r], bias, out=probs)
            probs.baddbmm_(q[b, h, r], keys[h].mT, alpha=width**-0.5)
            torch.softmax(probs, -1, out=probs)
            keep = keep_mask(bits, dropout, keep) if dropout else None
            yield Block((b, h, r), keys[h], values[h], bias, diagonals, probs, scratch, keep)


class BlockAttention(torch.autograd.Function):
    """The "fused" attention on a CPU: scores exist in two cache-sized buffers and nowhere else.
    Rows of padding come out as 0 and take no gradient."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, position: Tensor,
        key_bias: Tensor | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        inputs = (q, k, v, gate, position, key_bias)
        seed = int(torch.randint(2**62, ())) if dropout else 0
        out = q.new_zeros(q.transpose(1, 2).shape).transpose(1, 2)
        for block in attention_blocks(inputs, dropout, seed):
            if dropout:
                block.probs.mul_(block.keep)
            out[block.at] = torch.bmm(block.probs, block.values)
        ctx.save_for_backward(*inputs)
        ctx.dropout, ctx.seed = dropout, seed
        return out.mul_(keep_scale(dropout)) if dropout else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # read once: checkpointing allows no more
        q, _, _, gate, position, _ = inputs
        scale = q.shape[-1] ** -0.5
        if ctx.dropout:
            grad = grad * keep_scale(ctx.dropout)
        dq, dk, dv = (q.new_zeros(q.transpose(1, 2).shape).transpose(1, 2) for _ in range(3))
        dgate, dposition = torch.zeros_like(gate), torch.zeros_like(position)
        for block in attention_blocks(inputs, ctx.dropout, ctx.seed):
            (b, h, r), probs, dprobs = block.at, block.probs, block.scratch
            count = probs.shape[2]
            dout = grad[b, h, r]
            kept = torch.mul(probs, block.keep, out=dprobs) if ctx.dropout else probs
            dv[b, h, :count] += torch.bmm(kept.mT, dout).flip(1)
            torch.bmm(dout, block.values.mT, out=dprobs)
            if ctx.dropout:
                dprobs.mul_(block.keep)
            dscores = torch._softmax_backward_data(
                dprobs, probs, -1, probs.dtype, grad_input=dprobs
            )
            dq[block.at] = torch.bmm(dscores, block.keys).mul_(scale)
            dk[b, h, :count] += torch.bmm(dscores.mT, q[block.at]).flip(1).mul_(scale)
            dgate[block.at] = torch.mul(dscores, block.bias, out=probs).sum(-1, keepdim=True)
            if ctx.needs_input_grad[4]:
                torch.mul(dscores, gate[block.at], out=probs)
                dposition[h, block.diagonals] += antidiagonal_sums(probs)
        return dq, dk, dv, dgate, dposition.flip(1), None, None


# a loop over blocks, with draws that torch.compile cannot see into
block_attention = torch.compiler.disable(BlockAttention.apply)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with keep_mask's draws, seeded by torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        active = self.training and self.p > 0
        if not active or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        bits = np.random.SFC64(int(torch.randint(2**62, ())))
        return x * keep_mask(bits, self.p, x.new_empty(x.shape)).mul_(keep_scale(self.p))


def keep_mask(bits: np.random.SFC64, dropout: float, out: Tensor) -> Tensor:
    """Fills the contiguous `out` with 1 (kept) and 0 (dropped), in steps of 2^-16 in probability;
    torch's draw takes seven times as long on a CPU [measured]."""
    if not out.is_meta:
        words = bits.random_raw(-(-out.numel() // 4)).view(np.int16)[: out.numel()]
        torch.ge(torch.from_numpy(words), round(dropout * 65_536) - 32_768, out=out.view(-1))
    return out


def keep_scale(dropout: float) -> float:
    """What the kept values are multiplied by, exact for keep_mask's probability."""
    return 65_536 / (65_536 - round(dropout * 65_536))
