"""One update of the model, and everything it needs: model, optimizer, train_step, evaluate.

train_step is the equation of the update. A step is one optimizer update; one forward and backward
is a micro-step. The random numbers of a micro-step are a function of (seed, step, micro-step, rank)
and nothing else, so a step can be run again, and a resumed run repeats the uninterrupted one bit
for bit.

Not here: what happens around a step (train.py), flags (flags.py), what guards a step against a lack
of memory (util/distributed.py).
"""

import argparse
import contextlib
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import data
from model import (
    AUTOCAST,
    TARGETS,
    EmotionModel,
    ModelConfig,
    loss_from_sums,
    moment_sums,
    track_dialogues,
)
from util import distributed
from util.files import UserError, digest, progress_bar, weights_digest
from wavlm import WavLM, WavLMError, load_wavlm, read_config

log = logging.getLogger("vatune")

PLATEAU_EVALS = 3  # evaluations without a better dev CCC, after which plateau halves the rates


# ---------------------------------------------------------------------------------------------
# What trains, and when

STAGES = r"none|all|transformer|top:[1-9]\d*"


def parse_unfreeze(text: str) -> list[tuple[int, str]]:
    """[(first epoch, stage)], epochs from 1; UserError on anything else."""
    if re.fullmatch(STAGES, text):
        return [(1, text)]
    schedule = []
    for part in text.split(","):
        match = re.fullmatch(rf"(\d+):({STAGES})", part)
        if match is None:
            raise UserError(f"--unfreeze {text}: none, all, transformer, top:K, or EPOCH:WHAT,...")
        schedule.append((int(match[1]), match[2]))
    epochs = [epoch for epoch, _ in schedule]
    if epochs[0] != 1 or epochs != sorted(set(epochs)):
        raise UserError(f"--unfreeze {text}: epochs must start at 1 and rise")
    return schedule


def stage_at(unfreeze: str, epoch: int) -> str:
    """The stage of --unfreeze in `epoch` (from 0)."""
    return [stage for first, stage in parse_unfreeze(unfreeze) if first <= epoch + 1][-1]


def stages(unfreeze: str) -> list[str]:
    """The stages of --unfreeze, in order, each once."""
    return list(dict.fromkeys(stage for _, stage in parse_unfreeze(unfreeze)))


def is_frozen(args: argparse.Namespace, stage: str) -> bool:
    """True if nothing of WavLM trains in this stage."""
    return args.encoder == "wavlm" and stage == "none"


def stays_frozen(args: argparse.Namespace, epoch: int) -> bool:
    """True if WavLM is frozen from the start through `epoch` (from 0)."""
    schedule = parse_unfreeze(args.unfreeze)
    return all(is_frozen(args, stage) for first, stage in schedule if first <= epoch + 1)


def reads_cache(args: argparse.Namespace, stage: str) -> bool:
    """True if the hidden states of this stage come from the cache."""
    wanted = args.feature_cache == "on" or (args.feature_cache == "auto" and not args.augment)
    return wanted and is_frozen(args, stage)


def set_trainable(model: EmotionModel, stage: str, train_only: str | None = None) -> None:
    """Sets requires_grad of every parameter for a stage of --unfreeze."""
    if model.config.encoder == "wavlm":
        try:
            model.encoder.wavlm.set_trainable(stage)
        except WavLMError as error:  # top:K of fewer layers
            raise UserError(str(error)) from error
    if train_only == "film":
        model.requires_grad_(False)
        model.film.requires_grad_(True)


def lr_at(step: int, total_steps: int, warmup: float, scheduler: str) -> float:
    """Factor on the learning rates at `step` (from 0): linear warm-up, then flat or cosine to 0."""
    warmup_steps = int(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler in ("none", "plateau"):
        return 1.0
    if scheduler != "cosine":
        raise ValueError(f"no such scheduler: {scheduler}")
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------------------------------------
# Model and optimizer


def build_model(
    args: argparse.Namespace, shape: data.InputShape, load: bool = True
) -> EmotionModel:
    """The model that the flags describe; load=False builds WavLM without its weights (for meta)."""
    names = {f.name for f in fields(ModelConfig)} - {"wavlm"}
    settings = {name: value for name, value in vars(args).items() if name in names}
    settings["layers"] = tuple(args.layers or ())
    settings["prosody_dim"] = 88 if args.prosody == "egemaps" else 0
    settings["ema_alpha"] = -1.0 if args.ema_alpha == "learned" else float(args.ema_alpha)
    settings["film"] = not args.no_film
    settings["speaker_dim"] = 0 if args.no_film else shape.speaker_dim
    settings["frame_dim"] = shape.frame_dim
    wavlm = None
    if args.encoder == "wavlm":
        source = (args.wavlm, args.wavlm_revision, args.wavlm_dropout)
        try:
            wavlm = load_wavlm(*source) if load else WavLM(read_config(*source))
        except WavLMError as error:
            raise UserError(f"--wavlm {error}") from error
        settings["wavlm"] = wavlm.config.to_dict()
    model = EmotionModel(ModelConfig(**settings), wavlm)
    set_checkpointing(model, args.gradient_checkpointing)
    return model


def set_checkpointing(model: EmotionModel, on: bool) -> None:
    """Sets --gradient_checkpointing; UserError if the encoder has none."""
    encoder = model.encoder.wavlm if model.config.encoder == "wavlm" else model.encoder
    if hasattr(encoder, "gradient_checkpointing"):
        encoder.gradient_checkpointing = on
    elif on:
        raise UserError(f"--encoder {model.config.encoder} has no --gradient_checkpointing")


def compile_layers(model: EmotionModel) -> None:
    """Compiles the encoder's layers in place, for any length; state_dict keeps its names.

    All layers share one code object, whose variants (frozen or not, evaluation, a first layer fed
    by the frozen part) may be more than the 8 after which torch gives up and runs it uncompiled.
    """
    torch._dynamo.config.recompile_limit = 64
    # backward rebuilds attention's bias; without this, torch keeps forward's copy for it
    torch._functorch.config.ban_recompute_materialized_backward = False
    if model.config.encoder == "wavlm":
        layers = model.encoder.wavlm.encoder.layers
    else:
        layers = model.encoder.blocks
    for layer in layers:
        layer.compile(dynamic=True)


def param_groups(model: EmotionModel, args: argparse.Namespace) -> list[dict]:
    """AdamW groups of everything that some stage trains: WavLM and the rest, matrices and vectors.

    WavLM trains at encoder_lr, the rest at lr; weight decay is on tensors of two dimensions or
    more. AdamW leaves alone what has no gradient, so the groups serve all stages.
    """
    scale = args.global_batch_size / args.lr_reference_batch if args.lr_reference_batch else 1.0
    rates = {"wavlm": args.encoder_lr * scale, "rest": args.lr * scale}
    decays = {"decayed": args.weight_decay, "not decayed": 0.0}
    groups = {
        (part, kind): {
            "name": f"{part}, {kind}", "params": [], "peak_lr": lr, "lr": lr, "weight_decay": decay
        }
        for part, lr in rates.items()
        for kind, decay in decays.items()
    }  # fmt: skip
    ever_trained = {}
    for stage in stages(args.unfreeze):
        set_trainable(model, stage, args.train_only)
        ever_trained |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in ever_trained.items():
        part = "wavlm" if name.startswith("encoder.wavlm.") else "rest"
        kind = "decayed" if parameter.ndim >= 2 else "not decayed"
        groups[part, kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(model: EmotionModel, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW, fused: it has no temporaries, and takes a third of the time on a CPU [measured]."""
    groups = param_groups(model, args)
    fused = not groups[0]["params"][0].is_meta  # which has no fused kernel
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


# ---------------------------------------------------------------------------------------------
# One update


@dataclass
class Progress:
    """How far a run is; saved in last.pt."""

    step: int = 0  # optimizer updates done
    epoch: int = 0  # epochs done, with their evaluation
    best_ccc: float = -math.inf  # mean dev CCC of best_epoch
    best_epoch: int = 0  # from 1
    bad_evals: int = 0  # evaluations since best_epoch
    plateau_evals: int = 0  # evaluations without a better CCC since lr_factor fell
    lr_factor: float = 1.0
    seconds: float = 0.0
    stopped: str = ""  # why the run ended before its last epoch

    def update(self, ccc: float, patience: int, scheduler: str) -> bool:
        """Counts an evaluation for --patience and --scheduler plateau; True if it is the best."""
        better = ccc > self.best_ccc
        if better:
            self.best_ccc, self.best_epoch = ccc, self.epoch
            self.bad_evals = self.plateau_evals = 0
        else:
            self.bad_evals += 1
            self.plateau_evals += 1
        if scheduler == "plateau" and self.plateau_evals == PLATEAU_EVALS:
            self.lr_factor, self.plateau_evals = self.lr_factor / 2, 0
        if patience and self.bad_evals >= patience:
            self.stopped = "patience"
        return better


@dataclass
class StepResult:
    """What one update returns; sums and norm stay on the device."""

    sums: Tensor  # (6, 2) moment sums of the global batch
    gradient_norm: Tensor  # before clipping
    stop: bool  # some rank has received a signal


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Makes dropout of a micro-step depend on these four numbers alone."""
    entropy = np.random.SeedSequence((seed, step, micro_step, rank))
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Autocast of --amp; on the meta device, where torch has none, the CPU's stands for it."""
    kind = "cpu" if device.type == "meta" else device.type
    return torch.autocast(kind, AUTOCAST[amp], enabled=amp != "off")


def zero_sums(device: torch.device) -> Tensor:
    return torch.zeros(6, len(TARGETS), dtype=torch.float64, device=device)


def batch_loss(sums: Tensor, args: argparse.Namespace) -> Tensor:
    """Loss of the utterances behind moment sums (6, 2).

    A loss that is not a function of these sums belongs into train_step, beside this one.
    """
    return loss_from_sums(sums, args.loss, args.valence_weight, args.mse_weight)


def train_step(
    ddp_model: torch.nn.Module,
    batches: list[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    progress: Progress,
) -> StepResult:
    """One update from this rank's micro-batches (all ranks participate).

    The loss is computed from moment sums over the global batch; in each micro-step only its own
    share of them carries a gradient. With several micro-batches, a first forward of all of them
    under the same random numbers gives the sums; one micro-batch finds them in its only forward,
    and MSE needs no more than the number of utterances.
    """
    device = next(ddp_model.parameters()).device
    batches = [to_device(batch, device) for batch in batches]
    teacher_forcing = 1 - progress.epoch / max(1, args.epochs - 1)

    def forward(micro_step: int) -> Tensor:
        seed_micro_step(args.seed, progress.step, micro_step, distributed.rank())
        with autocast(device, args.amp):
            preds = ddp_model(batches[micro_step], teacher_forcing)  # (B, 2)
        return moment_sums(preds, batches[micro_step]["labels"])  # (6, 2) float64

    last = len(batches) - 1
    exact = args.loss == "mse" or args.exact_ccc == "on"
    two_passes = exact and args.loss != "mse" and last > 0
    total = zero_sums(device)
    if two_passes:
        with torch.no_grad():
            for micro_step in range(len(batches)):
                total += forward(micro_step)
        distributed.sum_over_ranks(total)
    elif args.loss == "mse":
        total[0] = batches[0]["step_size"]

    seen = zero_sums(device)
    for micro_step in range(len(batches)):
        with distributed.synchronised(ddp_model, micro_step == last):
            sums = forward(micro_step)
            seen += sums.detach()
            if micro_step == last and not two_passes:
                distributed.sum_over_ranks(seen)
                total = total if args.loss == "mse" else seen
            if exact:  # DDP averages over ranks, each of which holds its share of one sum
                loss = batch_loss(total + (sums - sums.detach()), args) * distributed.world_size()
            else:
                loss = batch_loss(sums, args) / len(batches)
            scaler.scale(loss).backward()

    stop = distributed.agree_on_step()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    # DDP's gradients are views of its buckets: dropped, accumulation would hold them twice
    optimizer.zero_grad(set_to_none=distributed.world_size() == 1)
    return StepResult(total if two_passes else seen, norm, stop)


# ---------------------------------------------------------------------------------------------
# Batches on their way to the model


def make_loader(
    dataset: data.Batches, plan: object, args: argparse.Namespace, device: torch.device
) -> DataLoader:
    """The batches of `plan` in order, decoded by num_workers processes; hidden states are read in
    this one."""
    workers = {}
    num_workers = args.num_workers if dataset.hidden is None else 0
    if num_workers:
        workers = {"prefetch_factor": data.PREFETCH, "persistent_workers": True}
        workers["worker_init_fn"] = distributed.start_worker
    return DataLoader(
        dataset,
        sampler=plan,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=distributed.share,
        pin_memory=device.type == "cuda",
        **workers,
    )


def bytes_on_their_way(dataset: data.Batches, args: argparse.Namespace) -> int:
    """Bytes of all batches that loader workers hold ready, if these are the largest."""
    width = 4 if dataset.features is None else 4 * dataset.features.dim
    length = max(args.batch_size * int(dataset.lengths.max()), data.EVAL_SECONDS * dataset.rate)
    return int(args.num_workers * data.PREFETCH * length * (width + 1))  # one byte for the mask


def group_micro_batches(batches: Iterator[dict], accumulation: int) -> Iterator[list[dict]]:
    """The micro-batches of one step at a time."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == accumulation:
            yield group
            group = []


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


# ---------------------------------------------------------------------------------------------
# Evaluation, and the hidden states of a frozen WavLM


@contextlib.contextmanager
def inference(model: EmotionModel) -> Iterator[None]:
    """Eval mode without gradients for the block."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


@dataclass
class Evaluation:
    """Results of evaluation, in the order of its rows, on the CPU."""

    preds: Tensor  # (n, 2) in [0, 1]
    vectors: Tensor  # (n, U) utterance vectors


def evaluate(
    model: EmotionModel,
    dataset: data.Batches,
    rows: np.ndarray,
    dialogs: list[str],
    args: argparse.Namespace,
    device: torch.device,
) -> Evaluation:
    """Predictions of `rows` (n,) of the dataset; all ranks must call it.

    Which utterances share a batch depends on their lengths alone, so the result depends neither on
    batch size nor on world size; every row counts once. With --context above 1 each dialogue is
    then tracked turn after turn, else each utterance is one. All ranks together raise Stopped if
    one has got a signal, and StepTooLarge if one has no memory for a single utterance.
    """
    plans = [
        data.eval_plan(dataset, rows, rank, distributed.world_size(), model.sees_padding)
        for rank in range(distributed.world_size())
    ]
    plan = plans[distributed.rank()]
    loader = distributed.with_timeout(make_loader(dataset, plan, args, device), args.timeout)
    batches = distributed.until_stopped(loader, polls=max(map(len, plans)))
    position = {row: i for i, row in enumerate(rows.tolist())}
    vectors = torch.zeros(len(rows), model.width, device=device)
    fault = ""
    with inference(model), autocast(device, args.amp):
        try:
            encoded = distributed.encode_in_pieces(model.encode, batches, device)
            for batch_rows, batch_vectors in encoded:
                vectors[[position[row] for row in batch_rows]] = batch_vectors
        except torch.OutOfMemoryError as error:
            fault = str(error)
            for _ in batches:  # keep polling: the other ranks wait for it
                pass
        distributed.agree_on_step(fault)
        distributed.all_reduce(vectors)  # each row was filled by one rank
        groups = rows.tolist() if args.context == 1 else [dialogs[row] for row in rows]
        preds = track_dialogues(model, vectors, groups)
    return Evaluation(preds, vectors.cpu())


def frozen_states(
    model: EmotionModel,
    dataset: data.Batches,
    args: argparse.Namespace,
    stage: str,
    device: torch.device,
) -> data.PackedRows | None:
    """WavLM's hidden states of all utterances if `stage` freezes it and they are cached, else None.

    Computed on first use, under a key of everything that decides them; folds share them. A clip
    longer than max_seconds is represented by its beginning.
    """
    if not reads_cache(args, stage):
        return None
    wavlm, pooled = model.encoder.wavlm, model.pooling.score is None
    key = digest(
        data.HIDDEN_VERSION, dataset.pack.key, len(dataset.lengths), args.max_seconds, args.amp,
        weights_digest(wavlm), wavlm.config.to_dict(), list(model.encoder.layers), pooled,
    )  # fmt: skip

    def encode(batch: dict) -> tuple[np.ndarray, list[int]]:
        with autocast(device, args.amp):
            states, mask = model.encoder(batch)
            hidden = model.pooling.prepare(states, mask)
        return hidden.half().cpu().numpy(), mask.sum(1).tolist()

    def compute() -> Iterator[tuple[int, np.ndarray]]:
        rows = np.arange(len(dataset.lengths))
        plan = data.eval_plan(dataset, rows, 0, 1, model.sees_padding)
        loader = distributed.with_timeout(make_loader(dataset, plan, args, device), args.timeout)
        batches = progress_bar(loader, len(plan), "hidden states")
        with inference(model):
            encoded = distributed.encode_in_pieces(encode, batches, device)
            for batch_rows, (hidden, counts) in encoded:
                for row, values, count in zip(batch_rows, hidden, counts):
                    yield row, values if pooled else values[:count]

    vectors = len(dataset.lengths)  # one per utterance, or one per frame
    if not pooled:
        vectors = int(wavlm.frame_lengths(dataset.lengths).sum())
    num_bytes = 2 * vectors * len(model.encoder.layers) * wavlm.config.hidden_size
    return data.hidden_states(key, args.cache_dir, compute, num_bytes)
