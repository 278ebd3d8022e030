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
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import data
from model import (
    AUTOCAST,
    EmotionModel,
    ModelConfig,
    loss_from_sums,
    metrics,
    moment_sums,
    track_dialogues,
)
from util import distributed, runs
from util.files import UserError, digest, in_words, weights_digest
from wavlm import (
    LORA,
    WavLM,
    WavLMError,
    load_wavlm,
    read_config,
)

log = logging.getLogger("vatune")

PLATEAU_EVALS = 3  # evaluations without a better dev CCC, after which plateau halves the rates


# ---------------------------------------------------------------------------------------------
# What trains, and when

STAGES = r"none|all|transformer|lora|top:[1-9]\d*"


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
    """True if no pre-trained weight of WavLM trains in this stage."""
    return args.encoder == "wavlm" and stage in ("none", "lora")


def stays_frozen(args: argparse.Namespace, epoch: int) -> bool:
    """True if WavLM is frozen from the start through `epoch` (from 0)."""
    schedule = parse_unfreeze(args.unfreeze)
    return all(is_frozen(args, stage) for first, stage in schedule if first <= epoch + 1)


def reads_cache(args: argparse.Namespace, stage: str) -> bool:
    """True if what lies below the lowest trained block comes from the cache in this stage."""
    wanted = args.feature_cache in ("on", "exact")
    wanted = wanted or (args.feature_cache == "auto" and not args.augment)
    return wanted and args.encoder == "wavlm" and stage not in ("transformer", "all")


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
    settings["targets"] = tuple(args.targets)
    settings["layers"] = tuple(args.layers or ())
    settings["prosody_dim"] = ModelConfig.prosody_dim if args.prosody == "egemaps" else 0
    settings["ema_alpha"] = -1.0 if args.ema_alpha == "learned" else float(args.ema_alpha)
    settings["film"] = not args.no_film
    settings["speaker_dim"] = 0 if args.no_film else shape.speaker_dim
    settings["vector_dims"] = shape.vector_dims
    settings["gates"] = tuple(args.gates or ())
    settings["frame_dim"] = shape.frame_dim
    settings["frame_rate"] = float(shape.rate) if shape.frame_dim else 0.0
    wavlm = None
    if args.encoder == "wavlm":
        source = (args.wavlm, args.wavlm_revision, args.wavlm_dropout)
        try:
            wavlm = load_wavlm(*source) if load else WavLM(read_config(*source))
        except WavLMError as error:
            raise UserError(f"--wavlm {error}") from error
        settings["wavlm"] = wavlm.config.to_dict()
        if args.lora > wavlm.config.hidden_size:
            width = f"{wavlm.config.hidden_size}, the width of this WavLM"
            raise UserError(f"--lora {args.lora}: must be at most {width}; 8 is usual")
    model = EmotionModel(ModelConfig(**settings), wavlm)
    set_checkpointing(model, args.gradient_checkpointing)
    return model


def start_model(args: argparse.Namespace, fold: data.Fold) -> EmotionModel:
    """The model before its first step, the same on every rank."""
    if not args.init_from:
        model = build_model(args, fold.shape)
        inputs = ((model.prosody, fold.dataset.prosody), (model.vectors, fold.dataset.vectors))
        for module, values in inputs:
            if module is not None:
                module.fit(torch.from_numpy(values[fold.splits["train"]]))
        return model
    model, _ = runs.load_model(args.init_from, "--init_from")
    runs.check_unseen(args.init_from, fold.corpus, fold.splits)
    expected = (model.config.speaker_dim, model.config.frame_dim)
    found = (fold.shape.speaker_dim, fold.shape.frame_dim)
    if expected != found:
        raise UserError(
            f"--init_from: its model reads speaker vectors and frames of widths {expected}, "
            f"--speaker and --features_dir have {found} (0 = none)"
        )
    expected = tuple(model.config.vector_dims)
    if expected != fold.shape.vector_dims:
        fault = f"its model reads vectors of widths {expected}, not {fold.shape.vector_dims}"
        raise UserError(f"--init_from: {fault}: give its --vectors, in its order")
    if args.encoder == "wavlm":
        model.encoder.wavlm.attention = args.attention
        config = read_config(args.wavlm, args.wavlm_revision, args.wavlm_dropout)
        given, own = (config.hidden_size, config.num_hidden_layers), model.config.wavlm
        if given != (own["hidden_size"], own["num_hidden_layers"]):
            fault = "the model of --init_from holds a WavLM of another size"
            raise UserError(f"--wavlm {args.wavlm}: {fault}: leave it out")
    set_checkpointing(model, args.gradient_checkpointing)
    return model


def set_checkpointing(model: EmotionModel, on: bool) -> None:
    """Sets --gradient_checkpointing; UserError if the encoder has none."""
    encoder = model.encoder.wavlm if model.config.encoder == "wavlm" else model.encoder
    if hasattr(encoder, "gradient_checkpointing"):
        encoder.gradient_checkpointing = on
    elif on:
        raise UserError(f"--encoder {model.config.encoder} has no --gradient_checkpointing")


def param_groups(model: EmotionModel, args: argparse.Namespace) -> list[dict]:
    """AdamW groups of everything that some stage trains: WavLM and the rest, matrices and vectors.

    WavLM trains at encoder_lr, updates of --lora and the rest at lr; weight decay is on tensors of
    two dimensions or more. AdamW leaves alone what has no gradient, so the groups serve all stages.
    """
    scale = args.global_batch_size / args.lr_reference_batch if args.lr_reference_batch else 1.0
    rates = {"wavlm": args.encoder_lr * scale} | dict.fromkeys(("lora", "rest"), args.lr * scale)
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
        part = "wavlm" if runs.is_pretrained(name) else "rest"
        part = "lora" if name.endswith(LORA) else part
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
    best_ccc: float = -math.inf  # selection_score of best_epoch
    best_epoch: int = 0  # from 1
    bad_evals: int = 0  # evaluations since best_epoch
    plateau_evals: int = 0  # evaluations without a better CCC since lr_factor fell
    lr_factor: float = 1.0
    seconds: float = 0.0
    stopped: str = ""  # why the run ended before its last epoch

    def update(self, ccc: float, patience: int, scheduler: str) -> bool:
        """Counts an evaluation for --patience and --scheduler plateau; True if it is the best.

        `ccc`: the selection_score of dev.
        """
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


def trained_targets(args: argparse.Namespace) -> list[str]:
    """The targets whose weight is above 0."""
    return [target for target, weight in zip(args.targets, args.target_weights) if weight]


def selection_score(scores: dict[str, float], args: argparse.Namespace) -> float:
    """The mean CCC of the targets that train, among the metrics of a split.

    UserError if the split has a label of none of them.
    """
    trained = trained_targets(args)
    cccs = [scores[f"ccc_{target}"] for target in trained]
    cccs = [ccc for ccc in cccs if not math.isnan(ccc)]
    if not cccs:
        weights = " ".join(f"{weight:g}" for weight in args.target_weights)
        raise UserError(
            f"--target_weights {weights}: {in_words(trained)} alone trains, but dev has no label "
            "of it, so no epoch is the best: give another weight (or --valence_weight) or labels"
        )
    return statistics.fmean(cccs)


def selection_notes(args: argparse.Namespace, fold: data.Fold) -> list[str]:
    """What is unusual in the choice of the best epoch; UserError if dev has no label for it."""
    trained = in_words(trained_targets(args))
    labels = fold.labels[fold.splits["dev"]]
    perfect = selection_score(metrics(labels, labels, args.targets), args)
    notes = []
    if not all(args.target_weights):
        notes.append(f"the best epoch is that of the highest dev CCC of {trained}")
    if perfect < 0.01:  # of constant labels it is 0
        notes.append(f"no dev CCC of {trained} can differ from 0: epoch 1 counts as the best")
    return notes


@dataclass
class StepResult:
    """What one update returns; sums and norm stay on the device."""

    sums: Tensor  # (6, E) moment sums of the global batch
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


def zero_sums(device: torch.device, args: argparse.Namespace) -> Tensor:
    return torch.zeros(6, len(args.targets), dtype=torch.float64, device=device)


def batch_loss(sums: Tensor, args: argparse.Namespace) -> Tensor:
    """Loss of the utterances behind moment sums (6, E).

    A loss that is not a function of these sums belongs in train_step, beside this one.
    """
    return loss_from_sums(sums, args.loss, args.target_weights, args.mse_weight)


def train_step(
    ddp_model: torch.nn.Module,
    batches: list[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    progress: Progress,
) -> StepResult:
    """One update from this rank's micro-batches (all ranks participate).

    The loss is a function of moment sums over the global batch, and the gradient of a micro-step
    flows through its own share of them. A single micro-batch finds the sums in its forward. With
    several, a first pass finds them and a second one the gradients, under the same random numbers
    and from the lowest block that trains; the first micro-batch keeps its graph instead. MSE needs
    no more than the number of labels, which is known before.
    """
    device = next(ddp_model.parameters()).device
    batches = [to_device(batch, device) for batch in batches]
    labels = [batch["labels"] for batch in batches]
    teacher_forcing = 1 - progress.epoch / max(1, args.epochs - 1)

    def forward(micro_step: int) -> Tensor:
        seed_micro_step(args.seed, progress.step, micro_step, distributed.rank())
        with autocast(device, args.amp):
            return ddp_model(batches[micro_step], teacher_forcing)  # (B, E)

    last = len(batches) - 1
    is_mse, exact = args.loss == "mse", args.exact_ccc == "on"
    two_passes = exact and not is_mse and last > 0
    total, first = zero_sums(device, args), None  # sums of the global batch
    if two_passes:
        model = getattr(ddp_model, "module", ddp_model)
        with torch.no_grad():
            with autocast(device, args.amp):
                batches = [model.encode_frozen(batch) for batch in batches]
            for micro_step in range(1, len(batches)):
                total += moment_sums(forward(micro_step), labels[micro_step])
        with distributed.synchronised(ddp_model, False):
            first = forward(0)
        total += moment_sums(first.detach(), labels[0])
        distributed.sum_over_ranks(total)
    elif is_mse:
        total[0] = torch.tensor(batches[0]["step_size"])

    seen = zero_sums(device, args)  # sums of the micro-steps so far
    for micro_step in range(len(batches)):
        with distributed.synchronised(ddp_model, micro_step == last):
            preds = forward(micro_step) if first is None else first
            first = None
            sums = moment_sums(preds, labels[micro_step])  # (6, E) float64
            seen += sums.detach()
            if micro_step == last and not two_passes:
                distributed.sum_over_ranks(seen)
                total = total if is_mse else seen
            if exact or is_mse:  # DDP averages over ranks, each of which holds its share of one sum
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
    # under DDP gradients are views of its buckets: if dropped, they would be allocated once more
    optimizer.zero_grad(set_to_none=distributed.world_size() == 1)
    return StepResult(total if two_passes else seen, norm, stop)


# ---------------------------------------------------------------------------------------------
# Batches on their way to the model


def loader_workers(dataset: data.Batches, args: argparse.Namespace) -> int:
    """Processes that make batches: none if these are cached vectors, which take no time."""
    small = dataset.frozen is not None and not dataset.frozen.has_frames
    return 0 if small else args.num_workers


def make_loader(
    dataset: data.Batches, plan: object, args: argparse.Namespace, device: torch.device
) -> DataLoader:
    """The batches of `plan` in order."""
    workers = {}
    num_workers = loader_workers(dataset, args)
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
    """Bytes of all batches that loader workers hold ready, if they are of the longest utterance."""
    longest = int(dataset.lengths.argmax())
    one = dataset.collate(data.BatchSpec(((longest,),)))
    size = sum(value.nbytes for value in one.values() if isinstance(value, Tensor))
    evaluated = data.EVAL_SECONDS * dataset.rate / dataset.lengths[longest]
    held = loader_workers(dataset, args) * data.PREFETCH
    return int(held * max(args.batch_size, evaluated) * size)


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

    preds: Tensor  # (n, E) in [0, 1]
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
) -> data.FrozenStates | None:
    """What the frozen part of WavLM makes of all utterances, if this stage reads it from the cache.

    Computed on first use, under a key of everything that decides it; ranks and folds share it. A
    clip longer than max_seconds is represented by its beginning. The model must be in this stage.
    """
    if not reads_cache(args, stage):
        return None
    wavlm, lengths = model.encoder.wavlm, dataset.lengths
    framewise = model.config.pooling == "attention"
    key = digest(
        data.FROZEN_VERSION, dataset.pack.key, len(lengths), args.max_seconds, args.amp,
        args.feature_cache == "exact",
        weights_digest({k: p for k, p in wavlm.named_parameters() if not p.requires_grad}),
        wavlm.frozen_blocks, wavlm.config.to_dict(), list(model.encoder.layers),
        model.config.pooling,
    )  # fmt: skip
    num_bytes = np.full(
        len(lengths), cached_bytes(model, args, np.maximum(lengths, data.MIN_SAMPLES))
    )

    def encode(batch: dict) -> list[dict[str, np.ndarray]]:
        with autocast(device, args.amp):
            batch = model.encode_frozen(batch)
        counts = batch["frame_mask"].sum(1).tolist()
        states = {name: batch[name] for name in ("stream", "hidden") if name in batch}
        states = {name: to_numpy(values, name, args) for name, values in states.items()}
        return [
            {
                name: values[i, :count] if name == "stream" or framewise else values[i]
                for name, values in states.items()
            }
            for i, count in enumerate(counts)
        ]

    def compute(rows: np.ndarray) -> dict[str, list[np.ndarray]]:
        found = {}
        plan = data.eval_plan(dataset, rows, 0, 1, model.sees_padding)
        with inference(model):
            batches = (dataset.collate(spec) for spec in plan)
            for batch_rows, states in distributed.encode_in_pieces(encode, batches, device):
                found |= zip(batch_rows, states)
        return {name: [found[row][name] for row in rows.tolist()] for name in found[rows[0]]}

    return data.frozen_states(key, args.cache_dir, lengths, num_bytes, compute)


def cached_bytes(model: EmotionModel, args: argparse.Namespace, samples: Any) -> Any:
    """Bytes in the cache of an utterance of `samples` (a number, or an array of them)."""
    shapes = model.frozen_shapes(samples)
    return sum(math.prod(s) * stored_dtype(name, args).itemsize for name, s in shapes.items())


def stored_dtype(name: str, args: argparse.Namespace) -> torch.dtype:
    """Precision in which the cache keeps `stream` or `hidden`: that of --amp is exact for the
    stream; float32 becomes half unless --feature_cache exact."""
    if name == "stream" and args.amp != "off":
        return AUTOCAST[args.amp]
    return torch.float32 if args.feature_cache == "exact" else torch.float16


def to_numpy(states: Tensor, name: str, args: argparse.Namespace) -> np.ndarray:
    """`stream` or `hidden` as the cache keeps them; bfloat16 as uint16."""
    stored = states.to(stored_dtype(name, args))
    if not stored.isfinite().all() and states.isfinite().all():
        raise UserError(
            "--feature_cache: WavLM's hidden states are beyond float16: give --feature_cache exact"
        )
    if stored.dtype == torch.bfloat16:
        stored = stored.view(torch.uint16)
    return stored.cpu().numpy()
