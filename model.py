"""EmotionModel: valence and arousal of an utterance, with the dialogue before it as context.

An encoder (WavLM, a CNN on log-mel, a Transformer on frame features) gives frame states. They are
pooled to one vector, scaled and shifted by the speaker (FiLM), joined with prosody and with vectors
of any origin, tracked over the dialogue (Mamba updater, EMA state) and read by one gated head per
target. The losses and the metrics are also here. Not here: files, flags, distributed launch.

Shapes: B utterances, L samples, T frames (about L / 320), D encoder width, N layers, H heads,
C dialogue chunks, K turns in a chunk, U = D (2 D with stats pooling) + d_prosody + vectors,
E targets.
Masks: True = real, False = padding, everywhere in this file.

References: WavLM arXiv:2110.13900; FiLM arXiv:1709.07871; Mamba arXiv:2312.00752;
ConvNeXt arXiv:2201.03545; CCC: Lin, Biometrics 45 (1989), with 1/n moments.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.files import UserError
from wavlm import WavLM, WavLMConfig, add_lora, autocast_off

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}
ENCODERS = ("wavlm", "convnext", "baseline", "transformer", "lightweight_transformer")
GATES = ("speech", "prosody", "vectors", "none")  # what a head's gate weighs against all else


@dataclass
class ModelConfig:
    """Everything that decides the shape of an EmotionModel, in plain values that JSON can hold."""

    targets: tuple[str, ...] = ("valence", "arousal")  # column order of preds and labels
    encoder: str = "wavlm"  # one of ENCODERS
    wavlm: dict | None = None  # a Hugging Face WavLM config.json, for encoder "wavlm"
    layers: tuple[int, ...] = ()  # hidden states to mix; () = the quarter points
    pooling: str = "mean"  # mean | attention | stats
    attention: str = "fused"  # WavLM's attention: fused | sdpa | eager
    lora: int = 0  # rank of the updates of WavLM's attention; 0 = none
    lora_alpha: float = 0.0  # they count lora_alpha / lora times; 0 = once
    frame_dim: int = 0  # width of the feature files, for the feature Transformers
    frame_rate: float = 0.0  # frames per second of those that it was trained on
    speaker_dim: int = 0  # width of the speaker embedding; 0 = FiLM on a learned vector
    prosody_dim: int = 88  # eGeMAPS functionals; 0 = no prosody
    vector_dims: tuple[int, ...] = ()  # widths of further vectors per utterance, in their order
    gates: tuple[str, ...] = ()  # one of GATES per target; () = valence prosody, others speech
    film: bool = True
    d_speaker: int = 192
    d_prosody: int = 64
    d_hidden: int = 256
    d_state: int = 64  # 0 = no dialogue state
    ema_alpha: float = 0.8  # -1 = learned, started at 0.8
    mamba_layers: int = 2
    feedback: bool = False  # the previous prediction is an input of the updater
    d_model: int = 768
    num_layers: int = 4
    base_channels: int = 64
    num_blocks: int = 4
    dropout: float = 0.2


# ---------------------------------------------------------------------------------------------
# Encoders: batch -> (list of hidden states (B, T, D), frame_mask (B, T)). `width` is D,
# `num_states` the length of the list.


class WavLMEncoder(nn.Module):
    """WavLM on the zero-mean, unit-variance waveform; one hidden state per layer to mix."""

    def __init__(self, config: ModelConfig, wavlm: WavLM | None) -> None:
        super().__init__()
        self.wavlm = wavlm or WavLM(WavLMConfig.from_dict(config.wavlm))
        depth = self.wavlm.config.num_hidden_layers
        quarters = sorted({math.ceil(depth * q / 4) for q in (1, 2, 3, 4)})
        self.layers = config.layers or tuple(quarters)
        for layer in self.layers:
            if not 0 <= layer <= depth:
                raise UserError(f"--layers {layer}: this WavLM has layers 0 to {depth}")
        if list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"--layers {' '.join(map(str, self.layers))}: each once, and rising")
        self.wavlm.truncate(max(self.layers))  # layers above the last one used cost memory only
        self.wavlm.attention = config.attention
        self.width = self.wavlm.config.hidden_size
        self.num_states = len(self.layers)
        # a "group" front end was trained on zero-padded audio without a mask
        self.takes_mask = self.wavlm.config.feat_extract_norm == "layer"

    def forward(self, batch: dict) -> tuple[list[Tensor], Tensor]:
        if "stream" in batch:
            stream, frame_mask = batch["stream"], batch["frame_mask"]
            # from a cache it may have another precision than the run
            if not torch.is_autocast_enabled("cpu" if stream.is_meta else stream.device.type):
                stream = stream.to(self.wavlm.feature_projection.projection.weight.dtype)
        else:
            stream, frame_mask, _ = self.run_frozen(batch)  # nothing is frozen: the waveform
        mask = frame_mask if self.takes_mask else None
        above = self.wavlm.run_trained(stream, mask, self.layers)
        return list(above.values()), frame_mask

    def run_frozen(self, batch: dict) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What no training changes: (`stream`, which the lowest block that trains reads,
        frame_mask (B, T), the hidden states to mix that lie below it)."""
        waveform, mask = batch["input_values"], batch["attention_mask"]  # (B, L), (B, L)
        lengths = mask.sum(1)
        count = lengths.unsqueeze(1)
        mean = (waveform * mask).sum(1, keepdim=True) / count
        centred = (waveform - mean) * mask
        waveform = centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / count + 1e-7)
        stream, frame_mask, states = self.wavlm.run_frozen(
            waveform, mask if self.takes_mask else None, self.layers
        )
        if frame_mask is None:
            frames = self.wavlm.frame_lengths(lengths).unsqueeze(1)
            num_frames = self.wavlm.frame_lengths(waveform.shape[1])
            frame_mask = torch.arange(num_frames, device=frames.device) < frames  # (B, T)
        return stream, frame_mask, list(states.values())


class LogMel(nn.Module):
    """Log-mel frames (B, T, 80) and frame_mask (B, T) of a 16 kHz waveform: 25 ms every 10 ms.

    Not centred: a frame is real if all its samples are, so padding changes no real frame. Each
    utterance has zero mean and unit variance over its real frames and all bands, which removes the
    level of the recording and keeps the shape of the spectrum.
    """

    n_fft, hop, n_mels = 400, 160, 80

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        self.register_buffer("filters", self.mel_filters(), persistent=False)

    def mel_filters(self, sample_rate: int = 16_000) -> Tensor:
        """Triangular filters on the HTK mel scale, (n_fft // 2 + 1, n_mels), peak 1."""
        top = 2595 * math.log10(1 + sample_rate / 2 / 700)
        edges = 700 * (10 ** (torch.linspace(0, top, self.n_mels + 2) / 2595) - 1)
        bins = torch.linspace(0, sample_rate / 2, self.n_fft // 2 + 1).unsqueeze(1)
        rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
        return torch.minimum(rising, falling).clamp(min=0)

    def forward(self, waveform: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_off(waveform):
            spectrum = torch.stft(
                waveform, self.n_fft, self.hop, window=self.window, center=False,
                return_complex=True,
            )  # fmt: skip
            power = spectrum.real.square() + spectrum.imag.square()  # (B, n_fft // 2 + 1, T)
            mel = power.transpose(1, 2) @ self.filters  #              (B, T, n_mels)
            frames = 1 + (mask.sum(1, keepdim=True) - self.n_fft) // self.hop
            frame_mask = torch.arange(mel.shape[1], device=mel.device) < frames
            real, count = frame_mask.unsqueeze(2), (frames * self.n_mels).unsqueeze(2)
            x = mel.clamp(min=1e-10).log10()
            x = x - (x * real).sum((1, 2), keepdim=True) / count
            deviation = ((x * real).square().sum((1, 2), keepdim=True) / count).sqrt()
            return x / (deviation + 0.1), frame_mask  # 0.1 keeps silence quiet


class UtteranceNorm(nn.Module):
    """x (B, C, T, M) with zero mean and unit variance per utterance, over channels, bands and real
    frames together, then a scale and shift per channel.

    Neither padding nor the split of a batch changes a result, as it would with BatchNorm; frames
    keep their relative levels, which LayerNorm over channels takes. With LogMel's normalisation it
    took the baseline's arousal CCC from 0.67 to 0.73 [measured, Berlin clips, one seed].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask (B, 1, T, 1), 1 = real; computed in float32, since sums run over an utterance."""
        dtype, x = x.dtype, x.float()
        count = mask.sum((1, 2, 3), keepdim=True) * x.shape[1] * x.shape[3]
        x = x - (x * mask).sum((1, 2, 3), keepdim=True) / count
        variance = (x * mask).square().sum((1, 2, 3), keepdim=True) / count
        return (x * torch.rsqrt(variance + 1e-5) * self.weight + self.bias).to(dtype)


class ConvBlock(nn.Module):
    """Block of the baseline: 3x3 convolution and max pooling by `stride` in time and mel."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1)
        self.norm = UtteranceNorm(after)
        self.pool = nn.MaxPool2d(stride)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.norm(self.conv(x * mask), mask))
        return self.dropout(self.pool(x)), shrink(mask, self.pool.kernel_size)


class ConvNeXtBlock(nn.Module):
    """A strided convolution that divides time and mel by `stride`, then a ConvNeXt block."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.stride = stride
        self.down = nn.Conv2d(before, after, stride, stride)
        self.depthwise = nn.Conv2d(after, after, 7, padding=3, groups=after)
        self.norm = UtteranceNorm(after)
        self.expand = nn.Conv2d(after, 4 * after, 1)
        self.project = nn.Conv2d(4 * after, after, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = self.down(x * mask), shrink(mask, self.stride)
        hidden = self.norm(self.depthwise(x * mask), mask)
        return x + self.dropout(self.project(F.gelu(self.expand(hidden)))), mask


def shrink(mask: Tensor, stride: int) -> Tensor:
    """mask (B, 1, T, 1) -> (B, 1, T / stride, 1): real if any of the frames was."""
    return F.max_pool2d(mask, (stride, 1))


class ConvEncoder(nn.Module):
    """A CNN on log-mel: `convnext` or `baseline`.

    Each of the first four blocks divides time and mel by 2 (convnext's first by 4), and channels
    double up to the fourth. Padding is set to zero before every convolution, so that a real frame
    has the neighbours that it would have if the utterance were alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.log_mel = LogMel()
        self.blocks = nn.ModuleList()
        self.num_states = 1
        self.width = 1  # channels after the blocks so far
        self.total_stride = 1
        self.gradient_checkpointing = False
        for i in range(config.num_blocks):
            channels = config.base_channels * 2 ** min(i, 3)
            stride = 2 if i < 4 else 1
            if config.encoder == "convnext":
                stride = 4 if i == 0 else stride
                block = ConvNeXtBlock(self.width, channels, stride, config.dropout)
            else:
                block = ConvBlock(self.width, channels, stride, config.dropout)
            self.blocks.append(block)
            self.width = channels
            self.total_stride *= stride
        self.norm = nn.LayerNorm(self.width)

    def forward(self, batch: dict) -> tuple[list[Tensor], Tensor]:
        x, mask = self.log_mel(batch["input_values"], batch["attention_mask"])  # (B, T, M), (B, T)
        padding = -x.shape[1] % self.total_stride
        x = F.pad(x, (0, 0, 0, padding)).unsqueeze(1)  #                    (B, 1, T, M)
        mask = F.pad(mask, (0, padding))[:, None, :, None].to(x.dtype)  #   (B, 1, T, 1)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x, mask = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x, mask = block(x, mask)  #                                 (B, C, T/s, M/s)
        frames = self.norm(x.mean(3).transpose(1, 2))  #                    (B, T/s, D)
        return [frames], mask[:, 0, :, 0] > 0


class FeatureTransformer(nn.Module):
    """A pre-norm Transformer over feature files; the lightweight one averages pairs of frames and
    has a quarter of the width, at 1/30 of the cost."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        light = config.encoder == "lightweight_transformer"
        self.width = config.d_model // 4 if light else config.d_model
        self.stride = 2 if light else 1
        self.num_states = 1
        self.gradient_checkpointing = False
        self.norm = nn.LayerNorm(config.frame_dim)
        self.project = nn.Linear(config.frame_dim, self.width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.width,
                nhead=max(1, self.width // 64),
                dim_feedforward=(2 if light else 4) * self.width,
                dropout=config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(self.width)

    def forward(self, batch: dict) -> tuple[list[Tensor], Tensor]:
        x, mask = self.norm(batch["frames"]), batch["frame_mask"]  # (B, T, frame_dim), (B, T)
        if self.stride > 1:
            padding = -x.shape[1] % self.stride
            weight = F.pad(mask, (0, padding)).unflatten(1, (-1, self.stride)).to(x.dtype)
            x = F.pad(x, (0, 0, 0, padding)).unflatten(1, (-1, self.stride))
            count = weight.sum(2)
            x = (x * weight.unsqueeze(3)).sum(2) / count.clamp(min=1).unsqueeze(2)
            mask = count > 0
        x = self.project(x)  # (B, T, D)
        x = x + sinusoids(x.shape[1], self.width, x.device).to(x.dtype)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, None, ~mask, use_reentrant=False)
            else:
                x = block(x, src_key_padding_mask=~mask)
        return [self.final_norm(x)], mask


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed position codes (length, width), arXiv:1706.03762."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angle = torch.arange(length, device=device).unsqueeze(1) * rate
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)[:, :width]


def mean_and_deviation(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (B, D) each, of x (B, T, D) over real frames; float32, 1/n. A
    deviation below 1e-4 counts as 1e-4 without gradient, which would be infinite at 0."""
    with autocast_off(x):
        x, real = x.float(), mask.unsqueeze(2)
        count = real.sum(1)
        mean = (x * real).sum(1) / count
        variance = ((x - mean.unsqueeze(1)) * real).square().sum(1) / count
        return mean, variance.clamp(min=1e-8).sqrt()


class Pooling(nn.Module):
    """pooled (B, D) from hidden states [(B, T, D)]: softmax mix of the layers, masked over time.

    With `stats` it is (B, 2 D), the means and then the standard deviations; `width` says which.
    Each layer is normalised before it is mixed, since the residual stream of a pre-norm WavLM grows
    with depth. Mean pooling is linear, so it comes first and the mix costs (B, D), not (B, T, D).
    `prepare` does what needs no weights; the cache of a frozen encoder holds its result in float16.
    """

    def __init__(self, kind: str, num_states: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.width = 2 * width if kind == "stats" else width
        self.layer_weights = nn.Parameter(torch.zeros(num_states)) if num_states > 1 else None
        self.score = None
        if kind == "attention":
            self.score = nn.Sequential(nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1))

    def prepare(self, states: list[Tensor], mask: Tensor) -> Tensor:
        """(B, N, width) over time, or (B, T, N, D) for attention; each vector of D normalised."""
        if self.kind == "stats":
            pairs = [torch.stack(mean_and_deviation(s, mask), dim=1) for s in states]  # (B, 2, D)
            return torch.stack([F.layer_norm(p, p.shape[-1:]).flatten(1) for p in pairs], dim=1)
        if self.score is None:
            weights = mask / mask.sum(1, keepdim=True)  # (B, T) sums to 1 over real frames
            states = [torch.einsum("bt,btd->bd", weights.to(s.dtype), s) for s in states]
        return torch.stack([F.layer_norm(s.float(), s.shape[-1:]) for s in states], dim=-2)

    def forward(self, prepared: Tensor, mask: Tensor | None) -> Tensor:
        if self.layer_weights is None:
            frames = prepared[..., 0, :]
        else:
            frames = self.layer_weights.softmax(0) @ prepared  # (B, D) or (B, T, D)
        if self.score is None:
            return frames
        scores = self.score(frames).squeeze(2).float().masked_fill(~mask, -torch.inf)
        return torch.einsum("bt,btd->bd", scores.softmax(1), frames)


# ---------------------------------------------------------------------------------------------
# Around the encoder: vectors of an utterance, prosody, speaker, FiLM


class Standardise(nn.Module):
    """Vectors (B, width), standardised with the train split's moments, which a checkpoint holds;
    NaN becomes the train mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Takes mean and std from values (n, width) of the train split, over the defined ones. What
        is constant there keeps its unit: elsewhere it may differ, and must not become huge."""
        mean = values.nanmean(0)
        std = (values - mean).square().nanmean(0).sqrt()
        self.mean.copy_(mean.nan_to_num(0.0))
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))  # 1 for NaN, too

    def forward(self, values: Tensor) -> Tensor:
        return ((values - self.mean) / self.std).nan_to_num(0.0).clamp(-10, 10)


class Prosody(Standardise):
    """eGeMAPS functionals (B, 88) -> (B, d_prosody); those of clips of a few periods may be NaN."""

    def __init__(self, prosody_dim: int, d_prosody: int, dropout: float) -> None:
        super().__init__(prosody_dim)
        self.net = nn.Sequential(
            nn.Linear(prosody_dim, 128),
            nn.LayerNorm(128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, d_prosody),
            nn.LayerNorm(d_prosody),
            nn.ReLU(),
        )

    def forward(self, prosody: Tensor) -> Tensor:
        return self.net(super().forward(prosody))


class SpeakerFiLM(nn.Module):
    """Scale and shift of the pooled speech (B, D) by the speaker embedding (arXiv:1709.07871), or
    without those by one learned vector, the same for all."""

    def __init__(self, speaker_dim: int, d_speaker: int, d_hidden: int, width: int) -> None:
        super().__init__()
        self.learned = self.speaker = None
        if speaker_dim:
            self.speaker = nn.Sequential(
                nn.Linear(speaker_dim, d_speaker), nn.ReLU(), nn.Linear(d_speaker, d_speaker)
            )
        else:
            self.learned = nn.Parameter(torch.randn(1, d_speaker))
        self.film = nn.Sequential(
            nn.Linear(d_speaker, d_hidden), nn.ReLU(), nn.Linear(d_hidden, 2 * width)
        )
        nn.init.zeros_(self.film[-1].weight)  # identity at the start
        nn.init.zeros_(self.film[-1].bias)

    def forward(self, pooled: Tensor, speaker: Tensor | None) -> Tensor:
        condition = self.learned if self.speaker is None else self.speaker(speaker)
        gamma, beta = self.film(F.normalize(condition, dim=1)).chunk(2, dim=1)
        return (1 + gamma.tanh()) * pooled + beta


# ---------------------------------------------------------------------------------------------
# Over the dialogue: Mamba updater and EMA state. Each call takes a state and returns the next, so
# a dialogue may be given at once, in chunks, or turn by turn, with the same result.


class Mamba(nn.Module):
    """The selective state space block of arXiv:2312.00752 in plain PyTorch.

    Parameter names are mamba-ssm's, so weights can be exchanged. Ours also takes the state to
    start from: conv (C, d_inner, d_conv - 1) and ssm (C, d_inner, d_state); None = zeros.
    `scan` is selective_scan or mamba_ssm's, which util/trials.py puts there if it works.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.scan = selective_scan
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.exp(torch.rand(self.d_inner) * math.log(100) + math.log(1e-3))  # 0.001 .. 0.1
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1

    def forward(
        self, hidden: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)  # each (C, d_inner, K)
        turns, width = x.shape[2], self.conv1d.kernel_size[0] - 1
        if state is None:
            x, ssm_state = F.pad(x, (width, 0)), None
        else:
            x, ssm_state = torch.cat((state[0].to(x.dtype), x), dim=2), state[1]
        conv_state = x[:, :, turns:]
        x = F.silu(self.conv1d(x))  #                                  (C, d_inner, K)
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt, b, c = self.x_proj(x.transpose(1, 2)).split(sizes, dim=2)
        dt = dt @ self.dt_proj.weight.t()  #                           (C, K, d_inner)
        a = -self.A_log.float().exp()  #                               (d_inner, d_state)
        dt, b, c = dt.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2)
        inputs = (x, dt, a, b, c, self.D.float(), z, self.dt_proj.bias.float())
        # mamba_ssm's takes no state, and no gradient flows through the one that it returns
        if state is None and turns > 1:
            y, ssm_state = self.scan(*inputs)
        else:
            y, ssm_state = selective_scan(*inputs, ssm_state)
        return self.out_proj(y.transpose(1, 2).to(hidden.dtype)), (conv_state, ssm_state)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y + d x) silu(z) (C, d_inner, K) and the last h of h_t = exp(dt a) h_{t-1} + dt x_t b_t,
    y_t = h_t c_t; arguments and shapes are those of mamba_ssm's selective_scan_fn.

    In fp32, step by step: for up to a hundred turns, unbind + addcmul + stack is 17 times as fast
    as indexing and 3 times as fast as an associative scan [measured, 2 CPU cores].
    """
    x, z, b, c = (v.transpose(1, 2).float() for v in (x, z, b, c))  # (C, K, d_inner or d_state)
    dt = F.softplus(dt.transpose(1, 2).float() + dt_bias)
    decay = torch.exp(dt.unsqueeze(3) * a)  #                     (C, K, d_inner, d_state)
    drive = (dt * x).unsqueeze(3) * b.unsqueeze(2)
    state = torch.zeros_like(drive[:, 0]) if state is None else state.float()
    states = []
    for decay_t, drive_t in zip(decay.unbind(1), drive.unbind(1)):
        state = torch.addcmul(drive_t, decay_t, state)
        states.append(state)
    y = torch.einsum("ckis,cks->cki", torch.stack(states, dim=1), c)
    return ((y + d * x) * F.silu(z)).transpose(1, 2), state


class Updater(nn.Module):
    """What a turn adds to the state, (C, K, width) -> (C, K, d_state): residual pre-norm Mamba."""

    def __init__(self, width: int, d_hidden: int, d_state: int, mamba_layers: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(width, d_hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(d_hidden) for _ in range(mamba_layers))
        self.blocks = nn.ModuleList(Mamba(d_hidden) for _ in range(mamba_layers))
        self.project_out = nn.Linear(d_hidden, d_state)
        self.norm = nn.LayerNorm(d_state)

    def forward(self, x: Tensor, states: list | None) -> tuple[Tensor, list]:
        x = self.project_in(x)
        states = states or [None] * len(self.blocks)
        after = []
        for norm, block, state in zip(self.norms, self.blocks, states):
            update, state = block(norm(x), state)
            x = x + update
            after.append(state)
        return self.norm(self.project_out(x)), after


class Head(nn.Module):
    """One target in [0, 1] from (..., inputs): a gate that weighs the inputs in the slice `gated`
    against all others (None = no gate), then three layers."""

    def __init__(self, inputs: int, gated: slice | None, d_hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = None
        if gated is not None:
            mask = torch.zeros(inputs, dtype=torch.bool)
            mask[gated] = True
            self.register_buffer("gated", mask, persistent=False)
            self.gate = nn.Sequential(
                nn.Linear(inputs, d_hidden), nn.Tanh(), nn.Linear(d_hidden, 2)
            )
        self.net = nn.Sequential(
            nn.Linear(inputs, d_hidden),
            nn.LayerNorm(d_hidden, elementwise_affine=False),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden, d_hidden // 2),
            nn.LayerNorm(d_hidden // 2, elementwise_affine=False),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_hidden // 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            gated, others = (2 * self.gate(x).softmax(-1)).chunk(2, dim=-1)  # 1 and 1 if undecided
            x = x * torch.where(self.gated, gated, others)
        return self.net(x).float().sigmoid()


class EmotionModel(nn.Module):
    """(B, E) predictions in [0, 1], in the order of config.targets, from a batch of data.py."""

    def __init__(self, config: ModelConfig, wavlm: WavLM | None = None) -> None:
        super().__init__()
        self.config = config
        if config.encoder == "wavlm":
            self.encoder = WavLMEncoder(config, wavlm)
        elif config.encoder in ("convnext", "baseline"):
            self.encoder = ConvEncoder(config)
        else:
            self.encoder = FeatureTransformer(config)
        self.pooling = Pooling(config.pooling, self.encoder.num_states, self.encoder.width)
        width = self.pooling.width
        places = {"none": None, "speech": slice(0, width)}
        self.film = self.prosody = self.vectors = self.updater = self.alpha_logit = None
        if config.film:
            self.film = SpeakerFiLM(config.speaker_dim, config.d_speaker, config.d_hidden, width)
        if config.prosody_dim:
            self.prosody = Prosody(config.prosody_dim, config.d_prosody, config.dropout)
            places["prosody"] = slice(width, width + config.d_prosody)
            width += config.d_prosody
        if config.vector_dims:
            self.vectors = Standardise(sum(config.vector_dims))
            places["vectors"] = slice(width, width + sum(config.vector_dims))
            width += sum(config.vector_dims)
        self.width = width  # U
        if config.d_state:
            inputs = width + len(config.targets) if config.feedback else width
            self.updater = Updater(inputs, config.d_hidden, config.d_state, config.mamba_layers)
            if config.ema_alpha < 0:
                self.alpha_logit = nn.Parameter(torch.tensor(math.log(0.8 / 0.2)))
        self.heads = nn.ModuleDict()
        for i, target in enumerate(config.targets):
            gate = "prosody" if target == "valence" and config.prosody_dim else "speech"
            gated = places[config.gates[i] if config.gates else gate]
            inputs = width + config.d_state
            self.heads[target] = Head(inputs, gated, config.d_hidden, config.dropout)
        if config.lora:  # last: everything else starts with the values that it has without
            add_lora(self.encoder.wavlm, config.lora, config.lora_alpha or config.lora)

    @property
    def sees_padding(self) -> bool:
        """True for Base-type WavLM, whose first norm ("group") runs over padding, too: evaluation
        then pads nothing, so that a result does not depend on what shares the batch."""
        return self.config.encoder == "wavlm" and not self.encoder.takes_mask

    def encode(self, batch: dict) -> Tensor:
        """Utterance vectors (B, U) in float32; none depends on another utterance."""
        batch = self.encode_frozen(batch)
        utterance = torch.cat([self.encode_speech(part) for part in split_by_length(batch)])
        if self.film is not None:
            utterance = self.film(utterance, batch.get("speaker"))
        if self.prosody is not None:
            utterance = torch.cat((utterance, self.prosody(batch["prosody"])), dim=1)
        if self.vectors is not None:
            utterance = torch.cat((utterance, self.vectors(batch["vectors"])), dim=1)
        return utterance.float()

    @torch.no_grad()
    def encode_frozen(self, batch: dict) -> dict:
        """The batch with what the frozen part of WavLM makes of the audio in the audio's place.

        hidden (B, n, D or 2 D), or (B, T, n, D) for attention: the prepared states of the n layers
        to mix that lie in it, if any; stream (B, T, D): what the lowest block that trains reads, if
        one does; frame_mask (B, T). Without audio or a frozen part the batch comes back as it is.
        """
        frozen = self.config.encoder == "wavlm" and self.encoder.wavlm.frozen_blocks > 0
        if not frozen or "input_values" not in batch:
            return batch
        replaced = ("input_values", "attention_mask", "groups")
        kept = {key: value for key, value in batch.items() if key not in replaced}
        parts, groups, start = [], [], 0
        for part in split_by_length(batch):
            stream, frame_mask, states = self.encoder.run_frozen(part)
            found = {"frame_mask": frame_mask}
            if len(states) < self.encoder.num_states:
                found["stream"] = stream
            if states:
                found["hidden"] = self.pooling.prepare(states, frame_mask)
            parts.append(found)
            groups.append((start, start + len(stream), stream.shape[1]))
            start += len(stream)
        if len(parts) > 1 and "stream" in parts[0]:
            kept["groups"] = groups
        return kept | {key: cat_padded([part[key] for part in parts]) for key in parts[0]}

    def frozen_shapes(self, samples: Any) -> dict[str, tuple]:
        """Shapes of what encode_frozen makes of an utterance of `samples`."""
        if self.config.encoder != "wavlm" or not self.encoder.wavlm.frozen_blocks:
            return {}
        wavlm, width = self.encoder.wavlm, self.encoder.width
        frames, shapes = wavlm.frame_lengths(samples), {}
        below = sum(layer + 2 <= wavlm.frozen_blocks for layer in self.encoder.layers)
        if below < self.encoder.num_states:
            only_cnn = wavlm.frozen_blocks == 1
            shapes["stream"] = (frames, wavlm.config.conv_dim[-1] if only_cnn else width)
        if below:
            shapes["hidden"] = (below, self.pooling.width)
            if self.config.pooling == "attention":
                shapes["hidden"] = (frames, below, width)
        return shapes

    def encode_speech(self, batch: dict) -> Tensor:
        """Pooled speech (B, D or 2 D): waveforms, feature frames, or what encode_frozen gives."""
        prepared, frame_mask = [], batch.get("frame_mask")
        if "hidden" in batch:
            prepared.append(batch["hidden"].float())
        if "stream" in batch or "hidden" not in batch:
            states, frame_mask = self.encoder(batch)
            prepared.append(self.pooling.prepare(states, frame_mask))
        return self.pooling(torch.cat(prepared, dim=-2), frame_mask)

    def track(
        self,
        turns: Tensor,
        state: dict | None = None,
        labels: Tensor | None = None,
        teacher_forcing: float = 0.0,
    ) -> tuple[Tensor, dict]:
        """preds (C, K, E) of turns (C, K, U) in time order, and the state after the last one.

        `state` is what an earlier call returned (None = a dialogue begins). With feedback, the
        label of the previous turn (labels are (C, K, E)) replaces its prediction with probability
        `teacher_forcing` (scheduled sampling, arXiv:1506.03099). Padding must follow the turns.
        """
        if not self.config.feedback:
            return self._track(turns, state or {})
        preds = []
        width = len(self.config.targets)
        state = state or {"preds": turns.new_full((len(turns), width), 0.5)}
        for t in range(turns.shape[1]):
            previous = state["preds"]
            if labels is not None and t > 0 and teacher_forcing > 0:
                forced = torch.rand(len(turns), 1, device=turns.device) < teacher_forcing
                forced = forced & ~labels[:, t - 1].isnan()  # a missing label replaces nothing
                previous = torch.where(forced, labels[:, t - 1], previous)
            turn = torch.cat((turns[:, t], previous.to(turns.dtype)), dim=1).unsqueeze(1)
            pred, state = self._track(turn, state)
            state["preds"] = pred[:, 0].detach()
            preds.append(pred)
        return torch.cat(preds, dim=1), state

    def _track(self, turns: Tensor, state: dict) -> tuple[Tensor, dict]:
        context = turns[..., : self.width]
        after = {}
        if self.updater is not None:
            update, after["mamba"] = self.updater(turns, state.get("mamba"))
            alpha = self.config.ema_alpha
            if self.alpha_logit is not None:
                alpha = self.alpha_logit.sigmoid()
            ema = state.get("ema", torch.zeros_like(update[:, 0], dtype=torch.float32))
            track = []
            for update_t in update.float().unbind(1):
                ema = alpha * ema + (1 - alpha) * update_t
                track.append(ema)
            after["ema"] = ema
            context = torch.cat((context, torch.stack(track, dim=1)), dim=2)
        preds = torch.cat([head(context) for head in self.heads.values()], dim=2)
        return preds, after

    def forward(self, batch: dict, teacher_forcing: float = 0.0) -> Tensor:
        """preds (B, E); `chunk_index` (C, K) places the utterances in dialogues, -1 = padding."""
        utterances = self.encode(batch)  #                       (B, U)
        chunks = batch["chunk_index"]
        places = chunks.clamp(min=0)
        turns = utterances[places]  #                            (C, K, U)
        labels = batch["labels"][places] if self.config.feedback else None
        preds, _ = self.track(turns, None, labels, teacher_forcing)
        flat = preds.new_zeros(len(utterances) + 1, preds.shape[2])  # the last row: padding (-1)
        flat = flat.index_put((chunks.flatten(),), preds.flatten(0, 1))
        return flat[:-1]


def split_by_length(batch: dict) -> list[dict]:
    """Parts of a batch for the encoder, each of similar length and padded to its longest only."""
    parts = []
    for start, stop, longest in batch.get("groups") or ():
        part = dict(batch)
        for name in ("input_values", "attention_mask", "frames", "frame_mask", "stream"):
            if name in batch:
                part[name] = batch[name][start:stop, :longest]
        if "hidden" in batch:
            hidden = batch["hidden"][start:stop]
            part["hidden"] = hidden if hidden.ndim == 3 else hidden[:, :longest]
        parts.append(part)
    return parts or [batch]


def cat_padded(parts: list[Tensor]) -> Tensor:
    """[(B_i, T_i, ...)] -> (sum of B_i, longest T, ...), padded with zeros (False)."""
    if len(parts) == 1:
        return parts[0]
    rows = [row for part in parts for row in part]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.no_grad()
def track_dialogues(model: EmotionModel, turns: Tensor, dialogs: Sequence[Hashable]) -> Tensor:
    """preds (n, E), float32 on CPU, of turns (n, U); those of one dialog, in order, share a state.
    Dialogues are tracked 64 at a time."""
    rows = {}
    for i, dialog in enumerate(dialogs):
        rows.setdefault(dialog, []).append(i)
    dialogues = [torch.tensor(row) for row in rows.values()]
    preds = torch.zeros(len(turns), len(model.config.targets))
    for start in range(0, len(dialogues), 64):
        chunk = dialogues[start : start + 64]
        index = nn.utils.rnn.pad_sequence(chunk, batch_first=True)  # (C, K), padded with 0
        tracked, _ = model.track(turns[index.to(turns.device)])
        for dialogue, values in zip(chunk, tracked.float().cpu()):
            preds[dialogue] = values[: len(dialogue)]
    return preds


# ---------------------------------------------------------------------------------------------
# Loss and metrics. CCC is a function of six sums over utterances, so the sums of any split of a
# batch give it exactly; an average of CCCs does not. A label that is missing (NaN) of one target
# takes its utterance out of the sums of that target alone.


def moment_sums(preds: Tensor, labels: Tensor) -> Tensor:
    """(6, E) in float64, per target over its labels: n, sum p, sum y, sum p^2, sum y^2, sum p y."""
    known = ~labels.isnan()
    p, y = torch.where(known, preds.double(), 0), torch.where(known, labels.double(), 0)
    return torch.stack((known.double(), p, y, p * p, y * y, p * y)).sum(1)


def moments(sums: Tensor) -> tuple[Tensor, ...]:
    """Means, 1/n variances and covariance (mp, my, vp, vy, cov), each (E,), of moment_sums."""
    n, p, y, pp, yy, py = sums
    n = n.clamp(min=1)
    mp, my = p / n, y / n
    return mp, my, pp / n - mp * mp, yy / n - my * my, py / n - mp * my


def concordance(sums: Tensor) -> Tensor:
    """CCC per target (E,); 0 if predictions or labels are constant or none (Lin 1989)."""
    mp, my, vp, vy, cov = moments(sums)
    return 2 * cov / (vp + vy + (mp - my) ** 2 + 1e-8)


def loss_from_sums(sums: Tensor, loss: str, weights: Sequence[float], mse_weight: float) -> Tensor:
    """Loss of a batch from its moment sums, with a weight of each target.

    ccc: 1 - weighted mean CCC + mse_weight * weighted MSE; mse: weighted MSE. Finite even for one
    utterance, constant predictions or a target without a label.
    """
    n, _, _, pp, yy, py = sums
    mse = sum(w * value for w, value in zip(weights, (pp - 2 * py + yy) / n.clamp(min=1)))
    if loss == "mse":
        return mse
    ccc = sum(w * value for w, value in zip(weights, concordance(sums)))
    return 1 - ccc + mse_weight * mse


def metrics(
    preds: Tensor, labels: Tensor, targets: Sequence[str], scale: float = 1.0
) -> dict[str, float]:
    """CCC, PCC and RMSE per target and the mean CCC of preds and labels (n, E), in float64.

    RMSE is multiplied by `scale` (the width of the label range gives the units of the labels).
    PCC of a constant is reported as 0. A target without a label has NaN, and no part in the mean.
    ValueError for an empty set.
    """
    if len(preds) == 0:
        raise ValueError("no utterance to compute a metric from")
    sums = moment_sums(preds.cpu(), labels.cpu())
    _, _, vp, vy, cov = moments(sums)
    n, _, _, pp, yy, py = sums
    ccc = torch.where(n > 0, concordance(sums), torch.nan)
    pcc = (cov / (vp * vy).clamp(min=0).sqrt()).nan_to_num(0, 0, 0)
    pcc = torch.where(n > 0, pcc, torch.nan)
    rmse = scale * ((pp - 2 * py + yy) / n).clamp(min=0).sqrt()
    result = {}
    for name, values in (("ccc", ccc), ("pcc", pcc), ("rmse", rmse)):
        result |= {f"{name}_{target}": float(v) for target, v in zip(targets, values)}
    return result | {"ccc_mean": float(ccc.nanmean())}
