"""WavLM alone: any Hugging Face WavLM checkpoint in one file, numerically equal to transformers'.

    from wavlm import load_wavlm
    model = load_wavlm("tiny")                       # random weights, no download
    model = load_wavlm("microsoft/wavlm-large")      # hub name, or a local Hugging Face directory
    model.set_trainable("top:4")
    states, frame_mask = model(input_values, attention_mask, layers=[6, 12, 18, 24])

To use it elsewhere, copy this file. It needs torch; huggingface_hub and safetensors are imported
only where weights are read or written.

Not here: LayerDrop (taken as 0 whatever the config says: a rank that skips a layer breaks DDP),
SpecAugment (masked_spec_embed is kept only to be saved again), adapters, task heads, and the
input's normalisation (zero mean, unit variance per utterance over its real samples, the caller's).

Shapes: B utterances, L samples, T frames (about L / 320), D width, H heads, N layers,
W = T rounded up to a multiple of 8.

Padding: where feat_extract_norm is "layer" (Large), pass attention_mask; padding then does not
change an utterance's output. Where it is "group" (Base), the first norm averages over all L
samples, padding included, exactly as transformers does: such checkpoints were trained on
zero-padded batches without a mask.

References: Chen et al. 2021 (arXiv 2110.13900); transformers' modeling_wavlm.py, which
tests/test_wavlm.py compares every hidden state and gradient with.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

ATTENTIONS = ("sdpa", "eager")
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
CNN_SLICE_SAMPLES = 30 * 16_000  # the frozen CNN takes about this much at a time: bounds its peak
# Added to the scores of padding. exp of it is 0, yet float16 holds it; where all keys are padding
# the softmax stays finite (-inf gives NaN) and the log-sum-exp keeps digits (-1e38 keeps none).
PADDING_BIAS = -30_000.0


# ---------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class WavLMConfig:
    """The fields of a WavLM config.json that matter here, by transformers' names and defaults.

    `final_layer_norm` is ours: False after `WavLM.truncate`, which leaves an inner layer last.
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
    mask_time_prob: float = 0.05  # with mask_feature_prob: does masked_spec_embed exist?
    mask_feature_prob: float = 0.0
    final_layer_norm: bool = True
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "WavLMConfig":
        """Config from a config.json's dict, all of which is kept to be saved again.

        ValueError on a norm or activation that this file does not have.
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"raw"}
        config = cls(**{k: v for k, v in raw.items() if k in names}, raw=dict(raw))
        for name, allowed in (
            ("feat_extract_norm", ("layer", "group")),
            ("hidden_act", ACTIVATIONS),
            ("feat_extract_activation", ACTIVATIONS),
        ):
            if getattr(config, name) not in allowed:
                got = getattr(config, name)
                raise ValueError(f"{name} is {got!r}, not one of {', '.join(allowed)}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers and `from_dict` read."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        raw = fields.pop("raw")
        return {**raw, **fields, "model_type": "wavlm", "architectures": ["WavLMModel"]}


# base and large are microsoft/wavlm-base(-plus) and -large: shapes checked by parameter count,
# dropouts from memory [guess] (a loaded checkpoint brings its own). tiny is ours: 1 M parameters,
# 0.16 GFLOP per second of audio in a forward of 4 s [measured].
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
class ConvLayer(nn.Module):
    """One strided convolution; norm is "layer" (over channels), "group" (over time) or None."""

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
        self.activation = ACTIVATIONS[config.feat_extract_activation]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm == "layer":
            x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        elif self.norm == "group":
            x = self.layer_norm(x)
        return self.activation(x)


class FeatureExtractor(nn.Module):
    """The CNN: (B, L) waveform to (B, T, conv_dim[-1]) features, 50 frames per second."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        norms = ["layer"] * len(config.conv_dim)
        if config.feat_extract_norm == "group":
            norms = ["group"] + [None] * (len(config.conv_dim) - 1)
        self.conv_layers = nn.ModuleList(ConvLayer(config, i, n) for i, n in enumerate(norms))

    def forward(self, input_values: Tensor) -> Tensor:
        x = input_values[:, None]  # (B, 1, L)
        for layer in self.conv_layers:
            x = layer(x)  # (B, conv_dim, frames so far)
        return x.transpose(1, 2)  # (B, T, conv_dim)


class FeatureProjection(nn.Module):
    """Layer norm and a linear map of the CNN's features to the Transformer's width."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(self.layer_norm(x)))


class PositionConv(nn.Module):
    """Position embedding by a wide grouped convolution over time, same length out as in."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.num_conv_pos_embeddings
        groups = config.num_conv_pos_embedding_groups
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=2 / math.sqrt(kernel * width))
        nn.init.zeros_(conv.bias)
        self.conv = weight_norm(conv, dim=2)
        self.activation = ACTIVATIONS[config.feat_extract_activation]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2))[..., : x.shape[1]]  # an even kernel gives T + 1 frames
        return self.activation(y).transpose(1, 2)


# ---------------------------------------------------------------------------- Transformer
class Attention(nn.Module):
    """Self-attention with a gated relative position bias: gate[b, h, i] * table[h, i, j].

    The gate is a function of the layer's input; the table is layer 0's and shared by all layers.
    """

    def __init__(self, config: WavLMConfig, has_table: bool) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.dropout = config.attention_dropout
        self.num_buckets = config.num_buckets
        self.max_distance = config.max_bucket_distance
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))
        self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
        if has_table:
            self.rel_attn_embed = nn.Embedding(self.num_buckets, self.num_heads)

    def position_table(self, num_frames: int) -> Tensor:
        """(H, T, W) bias before gating; columns from T on only make the row stride W.

        SDPA's memory-efficient kernel copies a bias whose strides are not multiples of 8.
        """
        width = -(-num_frames // 8) * 8
        device = self.rel_attn_embed.weight.device
        distance = torch.arange(1 - num_frames, width, device=device)  # j - i, (T + W - 1,)
        half = self.num_buckets // 2  # one half of the buckets per direction; of these, one half
        exact = half // 2  # holds one distance each, the other grows with the distance's logarithm
        far = distance.abs().clamp(min=exact)
        log_ratio = torch.log(far.float() / exact) / math.log(self.max_distance / exact)
        far = (exact + log_ratio * (half - exact)).long().clamp(max=half - 1)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far) + (distance > 0) * half
        values = self.rel_attn_embed(bucket).t()  # (H, T + W - 1)
        return values.unfold(1, width, 1).flip(1)  # (H, T, W), constant along each diagonal

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

    def forward(self, x: Tensor, table: Tensor, key_bias: Tensor | None, kind: str) -> Tensor:
        split = (self.num_heads, self.head_dim)
        q = self.q_proj(x).unflatten(-1, split).transpose(1, 2)  # (B, H, T, D / H)
        k = self.k_proj(x).unflatten(-1, split).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, self.gate(x).to(q.dtype), table, key_bias, dropout, kind)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    table: Tensor,
    key_bias: Tensor | None,
    dropout: float,
    kind: str,
) -> Tensor:
    """(B, H, T, D / H) softmax(q k' / sqrt(D / H) + gate * table + key_bias) v, by `kind`.

    gate (B, H, T, 1), table (H, T, W) and key_bias (B, 1, 1, W) have q's dtype (a mask of another
    dtype can give NaN through cuDNN). What each way keeps for backward per B * H * T^2 element:
    "eager" the softmax (and with dropout two more); "sdpa" the bias (CUDA) or the softmax (CPU).
    A way that keeps neither would be one more branch here.
    """
    bias = gate * table if key_bias is None else torch.addcmul(key_bias, gate, table)
    bias = bias[..., : k.shape[2]]  # (B, H, T, T), row stride W
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    if kind == "eager":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
        return F.dropout(scores.softmax(-1), dropout) @ v
    raise ValueError(f"attention {kind!r} is not one of {ATTENTIONS}")


class FeedForward(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.intermediate_dropout(self.activation(self.intermediate_dense(x)))
        return self.output_dropout(self.output_dense(x))


class Layer(nn.Module):
    """One Transformer layer; norms come first (do_stable_layer_norm) or after each residual."""

    def __init__(self, config: WavLMConfig, has_table: bool) -> None:
        super().__init__()
        self.norm_first = config.do_stable_layer_norm
        self.attention = Attention(config, has_table)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, table: Tensor, key_bias: Tensor | None, kind: str) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.layer_norm(x), table, key_bias, kind))
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.dropout(self.attention(x, table, key_bias, kind)))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    """Position convolution, layers, and the norm that stands before or after all layers."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.pos_conv_embed = PositionConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(Layer(config, i == 0) for i in range(config.num_hidden_layers))
        self.norm_first = config.do_stable_layer_norm

    def embed(self, x: Tensor) -> Tensor:
        """Hidden state 0 (B, T, D): what layer 1 reads."""
        x = x + self.pos_conv_embed(x)
        return self.dropout(x if self.norm_first else self.layer_norm(x))


# ---------------------------------------------------------------------------- the model
class WavLM(nn.Module):
    """WavLM with random weights; parameter names are those of transformers' WavLMModel.

    `attention` ("sdpa" or "eager") and `gradient_checkpointing` (recompute each trainable layer
    in backward) are plain attributes. Everything trains until `set_trainable` says otherwise.
    """

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = "sdpa"
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
        """The hidden states asked for, {layer: (B, T, D)}, and frame_mask (B, T) or None.

        input_values (B, L) are used as they are. attention_mask (B, L): 1 or True = sample,
        0 = padding, all of it behind the samples. frame_mask: True = frame. Layer 0 is the input
        of layer 1, layer N the output, after the final layer norm where the config has one
        (transformers' last_hidden_state); default: the last. Nothing above the highest is
        computed, so `truncate` to it before training, or DDP waits for gradients that never come.
        Frames of padding hold arbitrary finite numbers. ValueError on a layer outside 0..N.
        """
        num_layers = len(self.encoder.layers)
        layers = [num_layers] if layers is None else layers
        if not layers or min(layers) < 0 or max(layers) > num_layers:
            raise ValueError(f"--layers {list(layers)}: give layers between 0 and {num_layers}")
        grad = torch.is_grad_enabled()

        with torch.set_grad_enabled(grad and self.frozen_blocks < 1):
            if self.frozen_blocks < 1:
                features = self.feature_extractor(input_values)  # (B, T, conv_dim)
            else:
                rows = max(1, CNN_SLICE_SAMPLES // input_values.shape[1])
                features = torch.cat([self.feature_extractor(x) for x in input_values.split(rows)])

        num_frames = features.shape[1]
        frame_mask = None
        if attention_mask is not None:
            lengths = self.frame_lengths(attention_mask.sum(1))
            frame_mask = torch.arange(num_frames, device=lengths.device) < lengths[:, None]

        with torch.set_grad_enabled(grad and self.frozen_blocks < 2):
            x = self.feature_projection(features)  # (B, T, D)
            dtype = x.dtype  # what linear layers compute in: the weights' dtype or autocast's
            if frame_mask is not None:
                x = x.masked_fill(~frame_mask[..., None], 0.0)
            x = self.encoder.embed(x)

        states = {0: x} if 0 in layers else {}
        if max(layers) > 0:
            with torch.set_grad_enabled(grad and self.frozen_blocks < 3):
                table = self.encoder.layers[0].attention.position_table(num_frames).to(dtype)
            key_bias = None
            if frame_mask is not None:
                key_bias = table.new_zeros(frame_mask.shape[0], 1, 1, table.shape[-1])
                key_bias[..., :num_frames].masked_fill_(~frame_mask[:, None, None], PADDING_BIAS)
        for i, layer in enumerate(self.encoder.layers[: max(layers)], start=1):
            trains = grad and self.frozen_blocks < 2 + i
            with torch.set_grad_enabled(trains):
                if trains and self.gradient_checkpointing:
                    x = checkpoint(layer, x, table, key_bias, self.attention, use_reentrant=False)
                else:
                    x = layer(x, table, key_bias, self.attention)
                if i == num_layers and self._has_final_norm():
                    x = self.encoder.layer_norm(x)
            if i in layers:
                states[i] = x
        return states, frame_mask

    def frame_lengths(self, lengths: Any) -> Any:
        """Frames that the CNN makes of `lengths` samples (int, numpy array or tensor, 400 on)."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def set_trainable(self, what: str) -> None:
        """Freeze all blocks below the lowest that trains; ValueError on anything else.

        what: "none"; "all"; "transformer" (all but the CNN); "top:K" (the last K layers and the
        final layer norm; the relative position table belongs to layer 1 and stays frozen with it).
        Frozen blocks run under no_grad and in eval mode, also after `train()`. masked_spec_embed
        never trains, nor a final layer norm that is not applied.
        """
        num_layers = len(self.encoder.layers)
        if what in ("none", "all", "transformer"):
            self.frozen_blocks = {"all": 0, "transformer": 1, "none": num_layers + 2}[what]
        else:
            kind, _, count = what.partition(":")
            if kind != "top" or not count.isdecimal() or not 1 <= int(count) <= num_layers:
                raise ValueError(
                    f"--unfreeze {what}: give none, all, transformer, or top:K with K between 1 "
                    f"and {num_layers}, the layers that this WavLM keeps"
                )
            self.frozen_blocks = num_layers + 2 - int(count)
        self.requires_grad_(False)
        for block in self._blocks()[self.frozen_blocks :]:
            for module in block:
                module.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "WavLM":
        """As nn.Module.train, but frozen blocks stay in eval mode (no dropout)."""
        super().train(mode)
        for block in self._blocks()[: self.frozen_blocks]:
            for module in block:
                module.eval()
        return self

    def truncate(self, num_layers: int) -> None:
        """Drop all layers above `num_layers`; hidden states keep their meaning and gradients.

        A final layer norm is then no longer applied (its weights stay, frozen, to be saved).
        What trains is kept as the same blocks: call `set_trainable` after it.
        """
        if not 0 <= num_layers <= len(self.encoder.layers):
            raise ValueError(
                f"--layers {num_layers}: this WavLM has layers 0 to {len(self.encoder.layers)}"
            )
        if num_layers == len(self.encoder.layers):
            return
        del self.encoder.layers[num_layers:]
        self.config = dataclasses.replace(
            self.config, num_hidden_layers=num_layers, final_layer_norm=False
        )
        if self.config.do_stable_layer_norm:
            self.encoder.layer_norm.requires_grad_(False)

    def _has_final_norm(self) -> bool:
        return self.config.do_stable_layer_norm and self.config.final_layer_norm

    def _blocks(self) -> list[list[nn.Module]]:
        """The CNN, the embedding, then each layer: what freezes as one, in forward's order."""
        encoder = self.encoder
        embedding = [self.feature_projection, encoder.pos_conv_embed, encoder.dropout]
        blocks = [[self.feature_extractor], embedding, *([layer] for layer in encoder.layers)]
        if not self.config.do_stable_layer_norm:
            blocks[1].append(encoder.layer_norm)
        elif self._has_final_norm():
            blocks[-1].append(encoder.layer_norm)
        return blocks


def _init_weights(module: nn.Module, std: float) -> None:
    """transformers' initialisation; modules with their own scheme overwrite it."""
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


# ---------------------------------------------------------------------------- weights on disk
def read_config(
    name: str, revision: str | None = None, dropout: float | None = None
) -> WavLMConfig:
    """The shape of a WavLM by size, local directory or hub name; ValueError as `load_wavlm`.

    `dropout`, where given, takes the place of all four dropouts of the checkpoint.
    """
    if dropout is not None:
        names = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout")
        config = read_config(name, revision)
        return dataclasses.replace(config, **dict.fromkeys(names, dropout))
    if name in SIZES:
        return SIZES[name]
    with _naming_the_flag(name):
        raw = json.loads(_fetch(name, ("config.json",), revision).read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.get("model_type") != "wavlm":
            found = raw.get("model_type") if isinstance(raw, dict) else None
            raise ValueError(f"config.json has model_type {found!r}, not 'wavlm'")
        return WavLMConfig.from_dict(raw)


def load_wavlm(name: str, revision: str | None = None, dropout: float | None = None) -> WavLM:
    """A WavLM by size ("tiny", "base", "large": random), local directory or hub name, in float32.

    model.safetensors is preferred; pytorch_model.bin is read with weights_only. A checkpoint of a
    task model ("wavlm." prefix) gives its encoder. `revision` is a branch, tag or commit of the
    hub. `dropout`, where given, takes the place of the checkpoint's. ValueError, one line that
    names --wavlm, on anything unreadable or not exactly a WavLM.
    """
    config = read_config(name, revision, dropout)
    if name in SIZES:
        return WavLM(config)
    with _naming_the_flag(name):
        state = _read_weights(_fetch(name, ("model.safetensors", "pytorch_model.bin"), revision))
        with torch.device("meta"):
            model = WavLM(config)
        _load_state(model, state)
    return model


@contextlib.contextmanager
def _naming_the_flag(name: str) -> Iterator[None]:
    """Whatever a reader raises becomes a ValueError of one line: the fix is another --wavlm."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"--wavlm {name}: {reason} (give {', '.join(SIZES)}, a directory with config.json and "
            f"model.safetensors, or a hub name like microsoft/wavlm-large)"
        ) from error


def _fetch(name: str, files: Sequence[str], revision: str | None) -> Path:
    """Path of the first of `files` that the directory or hub repository `name` has."""
    if Path(name).exists():
        for file in files:
            if (Path(name) / file).is_file():
                return Path(name) / file
        raise ValueError(f"no {' or '.join(files)} in this directory")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in files[:-1]:
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except EntryNotFoundError:
            continue  # not in the repository, or offline and not in the local cache
    return Path(hf_hub_download(name, files[-1], revision=revision))


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors on CPU under transformers' present names, heads dropped."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if any(key.startswith("wavlm.") for key in state):
        state = {k.removeprefix("wavlm."): v for k, v in state.items() if k.startswith("wavlm.")}
    conv = "encoder.pos_conv_embed.conv."
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if conv + old in state:
            state[f"{conv}parametrizations.weight.{new}"] = state.pop(conv + old)
    return state


def _load_state(model: WavLM, state: dict[str, Tensor]) -> None:
    """Fill a model that was built on the meta device; every name and shape must agree."""
    wanted = model.state_dict()
    if "masked_spec_embed" not in wanted:
        state.pop("masked_spec_embed", None)
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"weights do not fit: {what}: {', '.join(names[:5])}{more}")
    model.to_empty(device="cpu").load_state_dict(state)  # copies, to float32


def save_wavlm(model: WavLM, directory: str | Path) -> None:
    """Write config.json and model.safetensors, which `load_wavlm` and transformers load.

    Of a truncated model with a final layer norm, transformers' last_hidden_state is normed and
    ours is not (its hidden_states[-1] is ours).
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(config, encoding="utf-8")
