"""Train one fold: WavLM, a CNN or a feature Transformer, to valence and arousal.

    python train.py --preset demo                                        # two minutes on two cores
    python train.py --data iemocap --data_dir IEMOCAP_full_release --fold 1 --preset verify
    torchrun --standalone --nproc_per_node 2 train.py --preset demo      # DDP, same losses
    ./launch.sh --folds 1-5 --gpus 0,1,2,3 -- --data iemocap --data_dir ... --preset full

One process per GPU, one fold per run; folds in parallel are launch.sh's business. Decoding is in
data.py, what a tensor passes through in model.py, bytes in memory.py.

A step is one optimizer update; one forward/backward is a micro-step. The random numbers of a
micro-step are a function of (seed, step, micro-step, rank) and nothing else, so a step can be run
again, and a resumed run repeats the uninterrupted one bit for bit.
"""

import ctypes
import os
import signal
import sys

if __name__ == "__main__":  # before the imports, which take seconds
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(os.EX_TEMPFAIL))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank does not outlive its torchrun
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

import argparse
import contextlib
import datetime
import itertools
import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data as vadata
import memory
import report
from corpora import Corpus, make_splits, num_folds, read_corpus, write_skipped
from model import (
    AUTOCAST,
    ENCODERS,
    TARGETS,
    EmotionModel,
    ModelConfig,
    loss_from_sums,
    metrics,
    moment_sums,
    track_dialogues,
)
from report import plot_run
from util.distributed import (
    RETRY_EXIT_CODE,
    START_SECONDS,
    StepTooLarge,
    Stopped,
    agree_on_memory,
    all_reduce,
    any_rank,
    exchange_nothing,
    handle_signals,
    kill_workers,
    machine_fault,
    patiently,
    set_rank_timeout,
    start_ranks,
    start_worker,
    stop_signals,
    until_stopped,
    wrap_ddp,
)
from util.files import UserError, digest, progress, weights_digest
from util.log import (
    Hints,
    Meter,
    git_commit,
    score_line,
    start_logging,
    startup_block,
    step_line,
    trainable_line,
    versions,
)
from util.runs import (
    MODEL_FLAGS,
    WAVLM,
    RunFiles,
    check_resumable,
    end_status,
    load_last,
    load_model,
    load_weights,
    prepare_run_dir,
    read_checkpoint,
    read_json,
    read_records,
    run_dir,
    save_checkpoint,
    wavlm_weights,
)
from wavlm import ATTENTIONS, SIZES, WavLM, load_wavlm, read_config

log = logging.getLogger("vatune")

STANDARD = {"batch_size": 8, "d_prosody": 64, "d_hidden": 256}
PRESETS = {
    "demo": {
        "data": "demo", "wavlm": "tiny", "unfreeze": "all", "epochs": 6, "batch_size": 16,
        "lr": 1e-3, "encoder_lr": 1e-3, "device": "cpu", "num_workers": 0, "name": "demo",
    },
    "verify": {"fold": 1, "epochs": 20, "unfreeze": "all", "batch_size": 8},
    "standard": STANDARD,
    "full": STANDARD | {"epochs": 50},
    "max": {
        "batch_size": 12, "d_prosody": 128, "d_hidden": 384, "d_state": 128, "mamba_layers": 3,
        "layers": [3, 6, 9, 12, 15, 18, 21, 24],
    },
    "large_batch": {"batch_size": 1024, "lr_reference_batch": 32},  # 128 for feature Transformers
}  # fmt: skip

# A resumed run may differ from the interrupted one in these flags and in no other.
FREE_ON_RESUME = {
    "resume", "overwrite", "num_workers", "prefetch_factor", "log_every", "cache_dir", "out",
    "data_dir", "dry_run", "gpu_gib", "memory_fraction", "preset", "device", "plot_every",
    "save_every", "timeout",
}  # fmt: skip

# A model that starts from another one keeps that one's flags but for these.
FREE_OF_START = {"max_seconds", "context", "wavlm", "wavlm_revision", "speaker"}

LEAST_STEPS = 20  # in an epoch, when --batch_size auto may choose


# ---------------------------------------------------------------------------------------------
# Flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags after presets (a flag given by hand wins), checked, with the batch sizes filled in.

    gradient_accumulation_steps and global_batch_size are both set on return. Exits with code 2
    and one line on a wrong flag, on every rank alike, before any process group exists.
    """
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="python train.py [flags], all of which --help explains",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = p.add_argument_group("data").add_argument
    add("--data", default="demo", help="demo, iemocap, msp_podcast, or a .csv file")
    add("--data_dir", help="root of iemocap or msp_podcast, or of the audio paths in a CSV")
    add("--fold", type=int, default=1, help="test session 1..K; dev is the next one")
    add("--label_range", type=float, nargs=2, metavar=("LO", "HI"),
        help="scale of the labels; default: the corpus's own, of a CSV that of --init_from or 0 1")
    add("--max_seconds", type=float, default=12.0,
        help="of a longer clip, training takes a random window and evaluation the beginning")
    add("--context", type=int, default=1, help="turns per dialogue chunk; 1 = single utterances")
    add("--num_workers", type=int, default=2, help="loader processes per rank")
    add("--prefetch_factor", type=int, default=4, help="micro-batches a loader process holds ready")
    add("--cache_dir", default="cache", help="decoded audio, eGeMAPS, speaker embeddings")
    add("--feature_cache", choices=("auto", "on", "off"), default="auto",
        help="while WavLM is frozen, run it once per utterance and keep its hidden states in "
        "--cache_dir (float16; means over time, or all frames for --pooling attention); auto: on "
        "unless --augment")
    add("--augment", action="store_true", help="gain, noise, speed and time masks in training")

    add = p.add_argument_group("model").add_argument
    add("--encoder", choices=ENCODERS, default="wavlm", help="what turns the input into frames")
    add("--wavlm", default="microsoft/wavlm-large",
        help=f"hub name, local directory, or random weights: {', '.join(SIZES)}")
    add("--wavlm_revision", help="hub commit or tag of --wavlm")
    add("--wavlm_dropout", type=float, help="in place of all dropouts of the WavLM checkpoint")
    add("--layers", type=int, nargs="+", help="hidden states to mix; default: quarter points")
    add("--pooling", choices=("mean", "attention"), default="mean", help="frames to utterance")
    add("--features_dir", "--features_224_dir", help="<utt_id>.npy (T, D) for the Transformers")
    add("--prosody", choices=("egemaps", "none"), default="egemaps",
        help="88 functionals by opensmile, which is free for research only")
    add("--speaker", default="none",
        help="ecapa, xvector, a DIR of <utt_id>.npy or of an x-vector model, or none")
    add("--no_film", action="store_true", help="do not condition the speech on the speaker")
    add("--d_prosody", type=int, default=64, help="width of the prosody code")
    add("--d_hidden", type=int, default=256, help="hidden width of FiLM, updater and heads")
    add("--d_state", type=int, default=64, help="width of the dialogue state; 0 = none")
    add("--ema_alpha", default="0.8", help="decay of the dialogue state in [0, 1), or learned")
    add("--mamba_layers", type=int, default=2, help="Mamba blocks in the updater; 0 = linear")
    add("--feedback", action="store_true",
        help="feed the previous prediction; teacher forcing falls from 1 to 0 over the epochs")
    add("--d_model", type=int, default=768, help="width of the feature Transformer")
    add("--num_layers", type=int, default=4, help="layers of the feature Transformer")
    add("--base_channels", type=int, default=64, help="channels of the CNN's first block")
    add("--num_blocks", type=int, default=4, help="blocks of the CNN")
    add("--dropout", type=float, default=0.2, help="everywhere but in WavLM, which has its own")

    add = p.add_argument_group("optimization").add_argument
    add("--epochs", type=int, default=20, help="passes over the train split")
    add("--max_steps", type=int, default=-1, help="stop after this many steps; -1 = off")
    add("--batch_size", default="8",
        help="utterances per GPU and micro-step; auto: the most that fit, by plan and probe, and "
        f"leave {LEAST_STEPS} steps in an epoch")
    add("--batch_seconds", type=float, default=0.0,
        help="in place of --batch_size: as many utterances as fit into so many seconds of audio, "
        "padding included, per GPU and micro-step; 0 = off")
    add("--gradient_accumulation_steps", type=int, help="micro-steps per step; default 1")
    add("--global_batch_size", type=int, help="= batch_size x accumulation x ranks; default: that")
    add("--lr", type=float, default=1e-4, help="peak learning rate of all that starts from scratch")
    add("--encoder_lr", type=float, default=1e-5, help="peak learning rate of WavLM")
    add("--lr_reference_batch", type=int, default=0,
        help="multiply both rates by global_batch_size / this; 0 = off")
    add("--weight_decay", type=float, default=0.01, help="AdamW's, on matrices only")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient norm; 0 = off")
    add("--scheduler", choices=("none", "cosine", "plateau"), default="cosine",
        help="plateau: halve the rates after 3 evaluations without a better dev CCC")
    add("--warmup", type=float, default=0.1, help="share of all steps with rising rates")
    add("--unfreeze", default="none",
        help="of WavLM: none, all, transformer, top:K, or EPOCH:WHAT,... e.g. 1:none,6:top:4,9:all")
    add("--loss", choices=("ccc", "mse"), default="ccc", help="ccc: 1 - CCC + mse_weight x MSE")
    add("--mse_weight", type=float, default=0.1, help="share of MSE in --loss ccc")
    add("--valence_weight", type=float, default=0.5, help="in [0, 1]; other targets share the rest")
    add("--exact_ccc", choices=("on", "off"), default="on",
        help="CCC of the global batch; with accumulation this costs one more forward, a third more "
        "time. off: mean of the micro-batches' CCCs, 0.13 too low at 4 utterances [measured]")
    add("--patience", type=int, default=0,
        help="stop after this many evaluations without a better dev CCC; 0 = off")
    add("--seed", type=int, default=0, help="of everything random")

    add = p.add_argument_group("precision and memory").add_argument
    add("--amp", choices=("fp16", "bf16", "off"),
        help="autocast; default fp16 (with GradScaler) on a GPU, off on a CPU")
    add("--no_amp", dest="amp", action="store_const", const="off", help="same as --amp off")
    add("--tf32", choices=("on", "off"), default="on", help="TF32 for what stays fp32 on a GPU")
    add("--gradient_checkpointing", action="store_true",
        help="keep only layer inputs for backward, which then runs each layer again")
    add("--compile", action="store_true", help="torch.compile the encoder's layers")
    add("--attention", choices=ATTENTIONS, default="fused",
        help="of WavLM; fused keeps nothing of size frames x frames for backward")
    add("--gpu_gib", type=float,
        help=f"card to plan for, GiB; default: the GPU here, or {memory.GPU_GIB:g} without one")
    add("--memory_fraction", type=float, default=0.0,
        help="cap this process at a share of the GPU's memory; 0 = off")

    add = p.add_argument_group("evaluation and output").add_argument
    add("--eval_every", type=int, default=1, help="epochs between evaluations on dev")
    add("--log_every", type=int, default=20, help="steps between log lines")
    add("--plot_every", type=int, default=0, help="epochs between pictures; 0 = at the end only")
    add("--separation_every", type=int, default=0,
        help="epochs between separation figures of the embeddings; 0 = off")
    add("--save_every", type=int, default=0, help="steps between checkpoints; 0 = at epoch ends")
    add("--out", default="runs", help="directory of all runs")
    add("--name", help="experiment, in OUT/NAME/foldK; default CORPUS-ENCODER")

    add = p.add_argument_group("run").add_argument
    add("--preset", choices=sorted(PRESETS), help="sets flags; a flag given by hand wins")
    add("--resume", action="store_true", help="continue from last.pt; start where there is none")
    add("--overwrite", action="store_true", help="delete the run directory first")
    add("--init_from", help="run directory, best.pt or export to start from, with its model flags")
    add("--train_only", choices=("film",), help="freeze everything else (personalisation)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if present")
    add("--timeout", type=float, default=300.0,
        help="seconds without an answer from another rank or from the loader that end the run")
    add("--dry_run", action="store_true", help="print the run and its memory, then stop")
    # fmt: on

    argv = sys.argv[1:] if argv is None else argv
    given, _ = p.parse_known_args(argv)
    start = None
    if given.preset:
        flags = dict(PRESETS[given.preset])
        if given.preset == "large_batch" and given.encoder.endswith("transformer"):
            flags["batch_size"] = 128
        p.set_defaults(**flags)
    if given.init_from:
        try:
            _, start = load_model(given.init_from, "--init_from")
        except UserError as error:
            p.error(str(error))
        p.set_defaults(**{k: v for k, v in start["args"].items() if k in MODEL_FLAGS})
    args = p.parse_args(argv)
    if start:
        for flag in sorted(start["args"].keys() & MODEL_FLAGS - FREE_OF_START):
            old, new = start["args"][flag], getattr(args, flag)
            if new != old:
                p.error(f"--{flag} {new}: the model of --init_from has {old}: leave it out")
        if args.data.endswith(".csv"):
            args.label_range = args.label_range or start["label_range"]
    check_flags(p, args)
    fill_batch_sizes(p, args)
    return args


def check_flags(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with code 2 on a value outside its range or on flags that exclude each other."""
    at_least = {
        "fold": 1, "context": 1, "num_workers": 0, "prefetch_factor": 1, "d_prosody": 1,
        "d_hidden": 2, "d_state": 0, "mamba_layers": 0, "num_layers": 1, "base_channels": 1,
        "num_blocks": 1, "epochs": 1, "max_steps": -1, "lr": 0, "encoder_lr": 0, "weight_decay": 0,
        "max_grad_norm": 0, "patience": 0, "eval_every": 1, "separation_every": 0, "plot_every": 0,
        "log_every": 1, "lr_reference_batch": 0, "batch_seconds": 0, "mse_weight": 0, "seed": 0,
        "max_seconds": 0.1, "save_every": 0, "timeout": 1, "gpu_gib": 0.1,
        "gradient_accumulation_steps": 1, "global_batch_size": 1,
    }  # fmt: skip
    for flag, low in at_least.items():
        value = getattr(args, flag)
        if value is not None and not low <= value < math.inf:
            p.error(f"--{flag} {value}: must be at least {low}, and finite")
    for flag in ("warmup", "valence_weight", "memory_fraction"):
        if not 0 <= getattr(args, flag) <= 1:
            p.error(f"--{flag} {getattr(args, flag)}: must be in 0..1")
    for flag in ("dropout", "wavlm_dropout"):
        if not 0 <= (getattr(args, flag) or 0) < 1:
            p.error(f"--{flag} {getattr(args, flag)}: must be in [0, 1)")
    for flag in ("separation_every", "plot_every"):
        if getattr(args, flag) % args.eval_every:
            p.error(f"--{flag} {getattr(args, flag)}: must be a multiple of --eval_every")
    if args.ema_alpha != "learned":
        try:
            valid = 0 <= float(args.ema_alpha) < 1
        except ValueError:
            valid = False
        if not valid:
            p.error(f"--ema_alpha {args.ema_alpha}: a number in [0, 1) or learned")
    if args.train_only:
        args.unfreeze = "none"
    try:
        stages = parse_unfreeze(args.unfreeze)
    except ValueError as error:
        p.error(str(error))
    is_csv = args.data.endswith(".csv")
    args.name = args.name or f"{Path(args.data).stem if is_csv else args.data}-{args.encoder}"

    low, high = args.label_range or (0, 1)
    reads_features, cached = args.encoder.endswith("transformer"), args.feature_cache == "on"
    late, never = stages[-1][0] > args.epochs, not any(is_frozen(args, what) for _, what in stages)
    for wrong, message in (
        (args.max_steps == 0, "--max_steps 0: must be at least 1, or -1 for no limit"),
        (args.seed >= 2**63, f"--seed {args.seed}: must be below 2^63"),
        (not -math.inf < low < high < math.inf, "--label_range LO HI: LO must be below HI"),
        (is_csv and not Path(args.data).is_file(), f"--data {args.data}: no such file"),
        (args.resume and args.overwrite, "--resume and --overwrite exclude each other"),
        ("/" in args.name or args.name in (".", ".."), f"--name {args.name}: without slashes"),
        (reads_features and not args.features_dir, "the Transformers need --features_dir DIR"),
        (
            args.features_dir and not reads_features,
            f"--features_dir is not used by --encoder {args.encoder}: remove it",
        ),
        (reads_features and args.d_model % 64, "--d_model: must be a multiple of 64"),
        (
            args.encoder == "lightweight_transformer" and args.d_model % 256,
            "--d_model: must be a multiple of 256, of which a quarter is used",
        ),
        (
            args.feedback and (args.context == 1 or not args.d_state),
            "--feedback feeds back the turn before: give --context above 1 and --d_state",
        ),
        (
            args.speaker != "none" and args.no_film,
            f"--speaker {args.speaker} is read by FiLM alone: remove it, or --no_film",
        ),
        (args.train_only and not args.init_from, "--train_only needs --init_from, a trained model"),
        (args.train_only and args.no_film, "--train_only film needs FiLM: remove --no_film"),
        (
            args.amp == "fp16" and args.device == "cpu",
            "--amp fp16 needs a GPU: use --amp bf16 or off with --device cpu",
        ),
        (late, f"--unfreeze {args.unfreeze}: its last epoch is after --epochs {args.epochs}"),
        (
            cached and args.augment,
            "--feature_cache on keeps what WavLM makes of the plain recording, --augment changes "
            "the recording every epoch: remove one of the two",
        ),
        (
            cached and args.encoder != "wavlm",
            f"--feature_cache on is for a frozen WavLM, not for --encoder {args.encoder}",
        ),
        (cached and never, f"--feature_cache on: --unfreeze {args.unfreeze} never freezes WavLM"),
    ):
        if wrong:
            p.error(message)


def fill_batch_sizes(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sets accumulation and global batch size from each other and the number of ranks."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_seconds:
        if args.global_batch_size or args.lr_reference_batch:
            p.error(
                "--batch_seconds has no fixed number of utterances per step: remove "
                "--global_batch_size and --lr_reference_batch"
            )
        fewest = int(args.batch_seconds / args.max_seconds)  # what memory is planned for
        if fewest < args.context:
            p.error(
                f"--batch_seconds {args.batch_seconds:g} does not hold --context {args.context} "
                f"utterances of --max_seconds {args.max_seconds:g}: raise it, or lower those"
            )
        args.batch_size = fewest // args.context * args.context
    if args.batch_size == "auto":  # known once there is a model and a device
        return
    try:
        split_batch(args, int(args.batch_size), world_size)
    except ValueError as error:
        if "invalid literal" in str(error):
            p.error(f"--batch_size {args.batch_size}: a number or auto")
        p.error(str(error))


def split_batch(args: argparse.Namespace, batch_size: int, world_size: int) -> None:
    """Sets batch_size, accumulation and global batch size; ValueError where they contradict."""
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: must be at least 1")
    if batch_size % args.context:
        raise ValueError(
            f"--batch_size {batch_size} is not a multiple of --context {args.context}: "
            "a micro-batch holds whole chunks of turns"
        )
    per_step = batch_size * world_size
    whole = args.global_batch_size or per_step * (args.gradient_accumulation_steps or 1)
    accumulation, rest = divmod(whole, per_step)
    if rest or accumulation < 1:
        raise ValueError(
            f"--global_batch_size {whole} is not a multiple of "
            f"batch_size {batch_size} x {world_size} ranks = {per_step}"
        )
    if args.gradient_accumulation_steps not in (None, accumulation):
        raise ValueError(
            f"--global_batch_size {whole} needs --gradient_accumulation_steps {accumulation}, "
            f"not {args.gradient_accumulation_steps}"
        )
    args.batch_size, args.global_batch_size = batch_size, whole
    args.gradient_accumulation_steps = accumulation


def halve_batch(args: argparse.Namespace, world_size: int) -> None:
    """At most half the micro-batch in the same global batch; OutOfMemoryError where none is."""
    smaller = range(args.batch_size // 2, 0, -1)
    fitting = (
        n
        for n in smaller
        if n % args.context == 0 and args.global_batch_size % (n * world_size) == 0
    )
    size = next(fitting, 0)
    if not size or args.batch_seconds:
        what = "--batch_seconds" if args.batch_seconds else "--max_seconds or --context"
        raise torch.OutOfMemoryError(
            f"no room for --batch_size {args.batch_size}, which cannot be split further: lower "
            f"{what}, unfreeze less, or give --gradient_checkpointing"
        )
    args.gradient_accumulation_steps = None
    split_batch(args, size, world_size)


# ---------------------------------------------------------------------------------------------
# Pure helpers


def parse_unfreeze(text: str) -> list[tuple[int, str]]:
    """[(first epoch, what)], epochs from 1; ValueError names the flag and the fix."""
    what = r"none|all|transformer|top:[1-9]\d*"
    if re.fullmatch(what, text):
        return [(1, text)]
    stages = re.findall(rf"(\d+):({what})(?:,|$)", text)
    schedule = [(int(epoch), stage) for epoch, stage in stages]
    if not text or ",".join(f"{epoch}:{stage}" for epoch, stage in schedule) != text:
        raise ValueError(f"--unfreeze {text}: none, all, transformer, top:K, or EPOCH:WHAT,...")
    epochs = [epoch for epoch, _ in schedule]
    if epochs[0] != 1 or epochs != sorted(set(epochs)):
        raise ValueError(f"--unfreeze {text}: epochs must start at 1 and rise")
    return schedule


def unfreeze_at(schedule: list[tuple[int, str]], epoch: int) -> str:
    """What is trained in `epoch` (from 0)."""
    return [what for first, what in schedule if first <= epoch + 1][-1]


def lr_at(step: int, total_steps: int, warmup: float, scheduler: str) -> float:
    """Factor on the learning rates at `step` (from 0): linear warm-up, then flat or cosine to 0."""
    warmup_steps = int(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler != "cosine":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Dropout of a micro-step depends on these four numbers alone."""
    entropy = np.random.SeedSequence((seed, step, micro_step, rank))
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def set_trainable(model: EmotionModel, what: str, train_only: str | None = None) -> None:
    """requires_grad of every parameter for a stage of the schedule."""
    if model.config.encoder == "wavlm":
        model.encoder.wavlm.set_trainable(what)
    if train_only == "film":
        model.requires_grad_(False)
        model.film.requires_grad_(True)


def param_groups(model: EmotionModel, args: argparse.Namespace) -> list[dict]:
    """AdamW groups of all that any stage trains: WavLM and the rest, matrices and vectors.

    WavLM at encoder_lr, the rest at lr; weight decay on tensors of two dimensions or more.
    """
    schedule = parse_unfreeze(args.unfreeze)
    ever = {}
    for _, what in schedule:
        set_trainable(model, what, args.train_only)
        ever |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    scale = args.global_batch_size / args.lr_reference_batch if args.lr_reference_batch else 1.0
    rates = {"wavlm": args.encoder_lr * scale, "rest": args.lr * scale}
    groups = {}
    for name, parameter in ever.items():
        part = "wavlm" if name.startswith("encoder.wavlm.") else "rest"
        decay = parameter.ndim >= 2
        group = groups.setdefault(
            (part, decay),
            {
                "name": f"{part}, {'decayed' if decay else 'not decayed'}",
                "params": [],
                "peak_lr": rates[part],
                "lr": rates[part],
                "weight_decay": args.weight_decay if decay else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: EmotionModel, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW, fused: no temporaries, and on a CPU a third of the time [measured]."""
    return torch.optim.AdamW(param_groups(model, args), betas=(0.9, 0.98), fused=True)


def build_model(
    args: argparse.Namespace, speaker_dim: int, frame_dim: int, load: bool = True
) -> EmotionModel:
    """The model of these flags; load=False takes WavLM's shape without its weights (meta)."""
    names = {f.name for f in fields(ModelConfig)} & vars(args).keys() - {"wavlm"}
    flags = {name: getattr(args, name) for name in names}
    flags |= {
        "layers": tuple(args.layers or ()),
        "prosody_dim": 88 if args.prosody == "egemaps" else 0,
        "ema_alpha": -1.0 if args.ema_alpha == "learned" else float(args.ema_alpha),
        "film": not args.no_film,
        "speaker_dim": 0 if args.no_film else speaker_dim,
        "frame_dim": frame_dim,
    }
    wavlm = None
    if args.encoder == "wavlm":
        source = (args.wavlm, args.wavlm_revision, args.wavlm_dropout)
        wavlm = load_wavlm(*source) if load else WavLM(read_config(*source))
        flags["wavlm"] = wavlm.config.to_dict()
    model = EmotionModel(ModelConfig(**flags), wavlm)
    set_checkpointing(model, args.gradient_checkpointing)
    return model


def set_checkpointing(model: EmotionModel, on: bool) -> bool:
    """False where the encoder knows none."""
    target = model.encoder.wavlm if model.config.encoder == "wavlm" else model.encoder
    if hasattr(target, "gradient_checkpointing"):
        target.gradient_checkpointing = on
    return hasattr(target, "gradient_checkpointing")


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


# ---------------------------------------------------------------------------------------------
# One step, and evaluation


def train_step(
    model: EmotionModel,
    ddp_model: torch.nn.Module,
    batches: list[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    teacher_forcing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(moment sums of the global batch (6, 2), gradient norm) of one update (all ranks call it).

    StepTooLarge, on all ranks together and before anything is updated, when one runs out.

    The loss is that of the whole global batch: each micro-batch replaces its own share of the
    batch's moment sums by one that carries its gradient. The sums come from a first forward of
    all micro-batches under the same random numbers; with one micro-batch, or a loss that is
    linear in the sums (MSE), they need none.
    """
    device = next(model.parameters()).device
    dtype = AUTOCAST[args.amp]
    faults: list[str] = []  # what ran out of memory on this rank, which then only keeps company

    def attempt(work: Callable[[], Tensor | None]) -> Tensor | None:
        try:
            return None if faults else work()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            faults.append(str(error) or "MemoryError")  # Python's own says nothing
            return None

    def forward(module: torch.nn.Module, micro_step: int) -> Tensor:
        seed_micro_step(args.seed, step, micro_step, rank)
        with torch.autocast(device.type, dtype, enabled=args.amp != "off"):
            preds = module(batches[micro_step], teacher_forcing)
        return moment_sums(preds, batches[micro_step]["labels"])  # (6, 2) float64

    last = len(batches) - 1
    exact = args.loss == "mse" or args.exact_ccc == "on"
    total = torch.zeros(6, len(TARGETS), dtype=torch.float64, device=device)
    if args.loss == "mse":
        total[0] = sum(len(batch["labels"]) for batch in batches)
        all_reduce(total, world_size)  # n is all the gradient of a mean of squares needs
    elif exact and last > 0:
        with torch.no_grad():
            for micro_step in range(len(batches)):
                sums = attempt(lambda: forward(model, micro_step))  # noqa: B023 called at once
                total += 0 if sums is None else sums
        all_reduce(total, world_size)
        agree_on_memory(faults, world_size)

    if world_size > 1:
        ddp_model.exchanged.clear()
    seen = torch.zeros_like(total)
    for micro_step in range(len(batches)):
        syncs = micro_step == last or world_size == 1
        with contextlib.nullcontext() if syncs else ddp_model.no_sync():
            sums = attempt(lambda: forward(ddp_model, micro_step))  # noqa: B023
            seen += 0 if sums is None else sums.detach()
            if args.loss == "ccc" and exact and last == 0:
                total = all_reduce(seen.clone(), world_size)
            if sums is None:
                continue
            batch_sums = total + (sums - sums.detach()) if exact else sums
            loss = loss_from_sums(batch_sums, args.loss, args.valence_weight, args.mse_weight)
            # DDP averages gradients over ranks. Exact: each rank holds its share of one sum.
            loss = loss * world_size if exact else loss / len(batches)
            attempt(scaler.scale(loss).backward)
            sums = loss = batch_sums = None  # the graph, where backward did not consume it
    if faults and world_size > 1:
        exchange_nothing(ddp_model, device)
    agree_on_memory(faults, world_size)

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    # DDP's gradients are views of its buckets: dropped, accumulation would hold them twice
    optimizer.zero_grad(set_to_none=world_size == 1)
    return all_reduce(seen, world_size), norm


@torch.no_grad()
def evaluate(
    model: EmotionModel,
    dataset: vadata.Batches,
    rows: np.ndarray,
    dialogs: list[str],
    args: argparse.Namespace,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """(preds (n, 2) in [0, 1], utterance vectors (n, U)) of n `rows`, in their order, on CPU.

    All ranks must call it. Utterances are encoded in batches that depend on their lengths alone,
    so the result depends neither on batch size nor on world size; every row counts once. With
    --context above 1 whole dialogues are then tracked turn after turn, else each utterance is one.
    All ranks together raise Stopped when one has got a signal, and OutOfMemoryError when one has
    no room for an utterance alone.
    """
    budget = vadata.EVAL_SECONDS * dataset.rate
    plans = [
        vadata.eval_plan(dataset.lengths, rows, r, world_size, budget) for r in range(world_size)
    ]
    loader = make_loader(dataset, plans[rank], args, device)
    polls = max(map(len, plans))  # the same number on every rank
    batches = until_stopped(patiently(loader, args.timeout), polls, world_size)
    place = {row: i for i, row in enumerate(rows.tolist())}
    turns = torch.zeros(len(rows), model.width, device=device)
    faults: list[str] = []
    model.eval()
    with torch.autocast(device.type, AUTOCAST[args.amp], enabled=args.amp != "off"):
        try:
            for some, vectors in memory.encode_in_pieces(model.encode, batches, device):
                turns[[place[row] for row in some]] = vectors
        except torch.OutOfMemoryError as error:
            faults.append(str(error))
            for _ in batches:  # the other ranks' polls wait for this one's
                pass
        agree_on_memory(faults, world_size)
        all_reduce(turns, world_size)  # each row was filled by one rank
        groups = rows.tolist() if args.context == 1 else [dialogs[row] for row in rows]
        preds = track_dialogues(model, turns, groups)
    model.train()
    return preds, turns.cpu()


def is_frozen(args: argparse.Namespace, stage: str) -> bool:
    """Does nothing of WavLM train in this stage?"""
    return args.encoder == "wavlm" and stage == "none"


def reads_cache(args: argparse.Namespace, stage: str) -> bool:
    """Do the hidden states of this stage come from the cache?"""
    wanted = args.feature_cache == "on" or (args.feature_cache == "auto" and not args.augment)
    return wanted and is_frozen(args, stage)


def never_trains(args: argparse.Namespace, schedule: list[tuple[int, str]], epoch: int) -> bool:
    """Was WavLM frozen from the start to `epoch` (from 0)?"""
    return all(is_frozen(args, what) for first, what in schedule if first <= epoch + 1)


def weights_to_save(
    model: EmotionModel, args: argparse.Namespace, schedule: list[tuple[int, str]], epoch: int
) -> dict[str, Tensor]:
    """Of a WavLM that has not trained, the weights are in frozen.pt, once: 1.3 GB for Large."""
    weights = model.state_dict()
    if never_trains(args, schedule, epoch):
        weights = {k: v for k, v in weights.items() if not k.startswith(WAVLM)}
    return weights


def frozen_states(
    model: EmotionModel,
    dataset: vadata.Batches,
    args: argparse.Namespace,
    stage: str,
    device: torch.device,
) -> vadata.HiddenStates | None:
    """The encoder's hidden states of all utterances while `stage` freezes it, else None.

    Computed on first use, under a key of everything that decides them; folds share them. Of a
    clip longer than max_seconds they hold the beginning.
    """
    if not reads_cache(args, stage):
        return None
    wavlm, pooled = model.encoder.wavlm, model.pooling.score is None
    key = digest(
        vadata.HIDDEN_VERSION, dataset.pack.key, len(dataset.lengths), args.max_seconds, args.amp,
        weights_digest(wavlm), wavlm.config.to_dict(), list(model.encoder.layers), pooled,
    )  # fmt: skip

    @torch.no_grad()
    def compute() -> Iterator[tuple[int, np.ndarray]]:
        rows = np.arange(len(dataset.lengths))
        plan = vadata.eval_plan(dataset.lengths, rows, 0, 1)
        loader = make_loader(dataset, plan, args, device)

        def encode(batch: dict) -> tuple[np.ndarray, list[int]]:
            with torch.autocast(device.type, AUTOCAST[args.amp], enabled=args.amp != "off"):
                states, mask = model.encoder(batch)
                hidden = model.pooling.prepare(states, mask)
            return hidden.half().cpu().numpy(), mask.sum(1).tolist()

        model.eval()
        batches = progress(patiently(loader, args.timeout), len(plan), "hidden states")
        for some, (hidden, counts) in memory.encode_in_pieces(encode, batches, device):
            for row, values, count in zip(some, hidden, counts):
                yield row, values[None] if pooled else values[:count]
        model.train()

    return vadata.HiddenStates(key, args.cache_dir, compute, pooled)


def make_loader(
    dataset: vadata.Batches, plan: object, args: argparse.Namespace, device: torch.device
) -> DataLoader:
    """Batches of `plan` in order, decoded by num_workers processes; hidden states by this one."""
    num_workers = args.num_workers if dataset.hidden is None else 0
    workers = {}
    if num_workers:
        workers = {"prefetch_factor": args.prefetch_factor, "persistent_workers": True}
        workers |= {"worker_init_fn": start_worker}
    return DataLoader(
        dataset,
        sampler=plan,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        **workers,
    )


def steps_of(
    loader: Iterator[dict], accumulation: int, device: torch.device
) -> Iterator[list[dict]]:
    """The micro-batches of one step at a time, on the device."""
    batches = []
    for batch in loader:
        batches.append(to_device(batch, device))
        if len(batches) == accumulation:
            yield batches
            batches = []


# ---------------------------------------------------------------------------------------------


def load_data(
    args: argparse.Namespace,
) -> tuple[Corpus, dict[str, np.ndarray], vadata.Batches, np.ndarray | None]:
    """(corpus, splits, dataset, prosody); builds the caches that are missing."""
    cache_dir = Path(args.cache_dir)
    label_range = tuple(args.label_range) if args.label_range else None
    corpus = read_corpus(args.data, args.data_dir, label_range, cache_dir)
    corpus, pack = vadata.load_audio(corpus, cache_dir)
    splits = make_splits(corpus, args.fold)
    frames = prosody = speaker = None
    if args.features_dir:
        frames = vadata.FrameFeatures(corpus, args.features_dir)
    if args.prosody == "egemaps":
        prosody = vadata.egemaps(corpus, pack, cache_dir)
    if args.speaker != "none" and not args.no_film:
        speaker = vadata.speaker_embeddings(corpus, pack, args.speaker, cache_dir)
    dataset = vadata.Batches(
        labels=corpus.labels(TARGETS),
        pack=None if frames else pack,
        features=frames,
        prosody=prosody,
        speaker=speaker,
        max_seconds=args.max_seconds,
        augment=args.augment,
        seed=args.seed,
    )
    return corpus, splits, dataset, prosody


def check_unseen(args: argparse.Namespace, corpus: Corpus, splits: dict[str, np.ndarray]) -> None:
    """UserError when the run to start from has seen what is dev or test here. Of an export, or a
    run on another --data, nothing is known."""
    directory = Path(args.init_from)
    directory = directory if directory.is_dir() else directory.parent
    seen = read_json(directory / "splits.json")
    if read_json(directory / "args.json").get("data") != args.data:
        return
    for theirs, ours in (("train", "dev"), ("train", "test"), ("dev", "test")):
        names = [corpus.utterances[row].utt_id for row in splits[ours]]
        leaked = sorted({*names} & {*seen.get(theirs, ())})
        if leaked:
            raise UserError(
                f"--init_from {args.init_from}: {len(leaked)} utterances of {ours} here (as "
                f"{leaked[0]}) were in its {theirs} split: start from the run of this --fold"
            )


def input_widths(dataset: vadata.Batches) -> tuple[int, int]:
    """(speaker_dim, frame_dim) of the batches; 0 = absent."""
    speaker = 0 if dataset.speaker is None else dataset.speaker.shape[1]
    return speaker, 0 if dataset.features is None else dataset.features.dim


def compile_layers(model: EmotionModel) -> None:
    """Compiles the encoder's layers in place, for any length; state_dict keeps its names.

    All layers share one code object, whose variants (frozen or not, evaluation, a first layer fed
    by the frozen part) may be more than the 8 after which torch gives up and runs it plain.
    """
    torch._dynamo.config.recompile_limit = 64
    # attention's bias is built again in backward; without this, torch keeps forward's for it
    torch._functorch.config.ban_recompute_materialized_backward = False
    if model.config.encoder == "wavlm":
        layers = model.encoder.wavlm.encoder.layers
    else:
        layers = model.encoder.blocks
    for layer in layers:
        layer.compile(dynamic=True)


def update_state(state: dict, ccc: float, args: argparse.Namespace) -> bool:
    """Best score, patience and plateau after an evaluation; True when it is the best so far."""
    better = ccc > state["best_ccc"]
    if better:
        state |= {"best_ccc": ccc, "best_epoch": state["epoch"]}
    state["bad_evals"] = 0 if better else state["bad_evals"] + 1
    state["plateau_evals"] = 0 if better else state["plateau_evals"] + 1
    if args.scheduler == "plateau" and state["plateau_evals"] == 3:
        state |= {"lr_factor": state["lr_factor"] / 2, "plateau_evals": 0}
    if args.patience and state["bad_evals"] >= args.patience:
        state["stopped"] = "patience"
    return better


def main(args: argparse.Namespace) -> int:
    """Trains, evaluates and tests one fold; returns 0, or 75 when a signal stopped it.

    UserError carries a message for the user; all ranks raise together.
    """
    # Distributed: one process per GPU, from torchrun or alone
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU (torch.cuda.is_available() is False)")
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node: rank {local_rank} of this machine finds no GPU, there are "
            f"{torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    args.amp = args.amp or ("fp16" if cuda else "off")
    flags = dict(vars(args))  # a run may find another micro-batch, and is resumed with these
    schedule = parse_unfreeze(args.unfreeze)
    stop_signals.clear()
    handle_signals(at_once=True)  # up to the first step there is nothing to save

    # Data comes before the process group: no collective should wait for hours of decoding
    start_logging(None, console=rank == 0)
    corpus, splits, dataset, prosody = load_data(args)
    dialogs = [utt.dialog for utt in corpus.utterances]
    labels = torch.from_numpy(dataset.labels)  # (N, 2) in [0, 1]
    low, high = corpus.label_range
    longest = min(args.max_seconds, float(corpus.seconds.max()))

    if cuda:
        torch.cuda.set_device(device)  # and starts CUDA, which the first look at its memory needs
    if world_size > 1:
        start_ranks(cuda, world_size, max(START_SECONDS, args.timeout))
    directory = run_dir(args)
    files = fault = None
    if rank == 0 and not args.dry_run:
        try:
            lock = prepare_run_dir(args)
            start_logging(directory / "train.log", console=True)
            files = RunFiles(directory, lock)
        except UserError as error:
            fault = error
    if any_rank(fault is not None, world_size):
        raise fault or UserError("rank 0 refused the run directory")
    if any_rank(not args.dry_run and not directory.is_dir(), world_size):
        raise UserError(f"{directory}, made by rank 0, is not seen by all: --out on a shared disk?")

    # Seeds and precision
    torch.manual_seed(args.seed)
    memory.configure(args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # Model: the same initial weights on every rank; normalisers see the train split alone
    try:
        if args.init_from:
            model, _ = load_model(args.init_from, "--init_from")
            check_unseen(args, corpus, splits)
            reads = (model.config.speaker_dim, model.config.frame_dim)
            if reads != input_widths(dataset):
                raise UserError(
                    f"--init_from: its model reads speaker vectors and frames of widths {reads}, "
                    f"--speaker and --features_dir have {input_widths(dataset)} (0 = none)"
                )
        else:
            model = build_model(args, *input_widths(dataset))
            if prosody is not None:
                model.prosody.fit(torch.from_numpy(prosody[splits["train"]]))
        can_checkpoint = set_checkpointing(model, args.gradient_checkpointing)
        if args.gradient_checkpointing and not can_checkpoint:
            raise UserError(f"--encoder {args.encoder} knows no --gradient_checkpointing")
        model.to(device)
        if args.compile:
            compile_layers(model)
    except ValueError as error:  # a WavLM that cannot be read, layers that it does not have
        raise UserError(str(error)) from error

    # Resume, with the micro-batch that the interrupted run had found
    last, probed = load_last(directory) if args.resume else None, ""
    most = max(args.context, len(splits["train"]) // (LEAST_STEPS * world_size))  # in a micro-batch
    if last:
        decisive = {k: v for k, v in flags.items() if k not in FREE_ON_RESUME}
        check_resumable(decisive, last, directory, never_trains(args, schedule, 0))
        if (directory / "result.json").exists():
            log.info(f"{directory} is complete: nothing to resume")
            return 0
        args.global_batch_size = last["state"]["global_batch_size"]
        args.gradient_accumulation_steps = None
        try:
            split_batch(args, last["state"]["batch_size"], world_size)
        except ValueError as error:  # --batch_size auto had found another split
            fault = f"--resume on {world_size} ranks: {error}: resume on as many as it had"
            raise UserError(fault) from error
    elif args.batch_size == "auto":
        where = (input_widths(dataset), longest, device, world_size, most)
        try:
            size, probed = memory.auto_batch(model, args, *where)
        except ValueError as error:
            raise UserError(str(error)) from error
        split_batch(args, size, world_size)

    # Batches; optimizer over all that any stage trains (AdamW leaves alone what has no gradient)
    def batches_of_a_rank() -> vadata.TrainPlan:
        return vadata.TrainPlan(
            dataset.lengths, splits["train"], dialogs, args.batch_size,
            args.gradient_accumulation_steps, args.context, rank, world_size, args.seed,
            args.batch_seconds * dataset.rate if args.batch_seconds else None,
        )  # fmt: skip

    plan = batches_of_a_rank()
    total_steps = plan.steps_before(args.epochs)
    is_cut = 0 < args.max_steps < total_steps
    if is_cut:
        total_steps = args.max_steps
    try:
        optimizer = build_optimizer(model, args)
    except ValueError as error:  # --unfreeze top:K of fewer layers
        raise UserError(str(error)) from error
    state = {
        "step": 0, "epoch": 0, "best_ccc": -math.inf, "best_epoch": 0, "bad_evals": 0,
        "plateau_evals": 0, "lr_factor": 1.0, "seconds": 0.0, "audio_seconds": 0.0, "stopped": "",
        "records": 0, "batch_size": args.batch_size, "global_batch_size": args.global_batch_size,
    }  # fmt: skip
    meter = Meter(device, world_size)
    if last:
        load_weights(model, last["model"], directory)
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        state = last["state"]
        vars(meter).update(last["meter"])
    stage = unfreeze_at(schedule, state["epoch"])
    set_trainable(model, stage, args.train_only)
    if files and files.rewind(state["records"]) < state["records"]:
        log.warning(f"{directory}/metrics.jsonl lacks records of before step {state['step']}")

    planned = memory.plan(args, *input_widths(dataset), seconds=longest, world_size=world_size)
    log.info(startup_block(args, corpus, splits, plan, total_steps, optimizer, device))
    log.info(planned.line() + probed)
    if args.dry_run:
        return 0
    if files:
        files.write_json("args.json", vars(args))
        names = {k: [corpus.utterances[i].utt_id for i in rows] for k, rows in splits.items()}
        files.write_json("splits.json", names)
        write_skipped(directory / "skipped.csv", corpus)
        files.write_status(state["step"])
        where = (input_widths(dataset), longest, world_size, most)
        hints = Hints(args, device, read_records(directory), where)

    # DDP. `model` stays the bare module, for checkpoints and evaluation
    ddp_model = wrap_ddp(model, device, world_size)
    if files and not last and never_trains(args, schedule, 0):
        content = {"model": wavlm_weights(model), "args": flags}
        save_checkpoint(directory / "frozen.pt", content)
    dataset.hidden = frozen_states(model, dataset, args, stage, device)
    loader = make_loader(dataset, plan, args, device)
    model.train()
    started = time.perf_counter() - state["seconds"]
    on_terminal = rank == 0 and sys.stderr.isatty()
    bar = tqdm(total=total_steps, initial=state["step"], unit="step", disable=not on_terminal)

    def save() -> None:
        """last.pt of this step, by rank 0; meter.check has passed."""
        state["seconds"] = time.perf_counter() - started
        if files:
            state["records"] = files.records
            content = {"model": weights_to_save(model, args, schedule, epoch)}
            content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            content |= {"state": state, "meter": meter.state(), "args": flags}
            save_checkpoint(directory / "last.pt", content)
            files.write_status(state["step"])

    first_step = state["step"]
    handle_signals(at_once=False)  # from here on all ranks stop at the same step, and save it
    while not state["stopped"] and plan.steps_before(state["epoch"]) < total_steps:
        epoch = state["epoch"]
        if unfreeze_at(schedule, epoch) != stage:
            handle_signals(at_once=True)  # last.pt is of this very step, filling a cache takes long
            stage = unfreeze_at(schedule, epoch)
            optimizer.zero_grad(set_to_none=True)  # what is frozen now must not be updated
            set_trainable(model, stage, args.train_only)
            ddp_model = wrap_ddp(model, device, world_size)  # buckets of what trains now
            dataset.hidden = None
            dataset.hidden = frozen_states(model, dataset, args, stage, device)
            loader = make_loader(dataset, plan, args, device)
            handle_signals(at_once=False)
            log.info(f"epoch {epoch + 1} | unfreeze {stage} | {trainable_line(optimizer)}")
        epoch_start = plan.steps_before(epoch)
        plan.set_epoch(epoch, first_step=state["step"] - epoch_start)
        teacher_forcing = 1 - epoch / max(1, args.epochs - 1)
        interrupted = any_rank(bool(stop_signals), world_size)
        left = 0 if interrupted else total_steps - state["step"]  # 0, too: stopped while evaluating

        out_of_memory = ""
        arriving = patiently(loader, args.timeout)
        steps = meter.timed(steps_of(arriving, args.gradient_accumulation_steps, device))
        for batches in itertools.islice(steps, left):
            factor = state["lr_factor"]
            factor *= lr_at(state["step"], total_steps, args.warmup, args.scheduler)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

            try:
                sums, norm = train_step(
                    model, ddp_model, batches, optimizer, scaler, args,
                    state["step"], rank, world_size, teacher_forcing,
                )  # fmt: skip
            except StepTooLarge as error:
                out_of_memory = str(error).splitlines()[0]
                break
            state["step"] += 1
            bar.update()
            loss = loss_from_sums(sums, args.loss, args.valence_weight, args.mse_weight)
            state["audio_seconds"] += world_size * meter.add(state["step"], loss, norm, batches)
            if world_size > 1 and state["step"] == first_step + 1:
                set_rank_timeout(datetime.timedelta(seconds=args.timeout))

            if state["step"] % args.log_every == 0 or state["step"] == total_steps:
                meter.check(scaler, optimizer, corpus)
                progress = epoch + (state["step"] - epoch_start) / plan.steps_in(epoch)
                record = meter.read(progress, optimizer) | {"total_steps": total_steps}
                log.info(step_line(record, state["step"], total_steps, scaler))
                if files:
                    files.record("train", state["step"], record)
                    hints.after_steps(record, cached=dataset.hidden is not None)

            if args.save_every and state["step"] % args.save_every == 0:
                meter.check(scaler, optimizer, corpus)
                save()
                meter.restart()

            interrupted = any_rank(bool(stop_signals), world_size)
            if interrupted:
                break
        meter.check(scaler, optimizer, corpus)

        if out_of_memory:  # the same step again, in smaller pieces
            batches = arriving = steps = loader = ddp_model = None
            optimizer.zero_grad(set_to_none=True)
            halve_batch(args, world_size)
            state["batch_size"] = args.batch_size
            log.info(
                f"step {state['step'] + 1}: out of memory ({out_of_memory[:120]}): going on with "
                f"batch_size {args.batch_size} x accumulation {args.gradient_accumulation_steps}"
            )
            if cuda:
                torch.cuda.empty_cache()
            plan = batches_of_a_rank()
            loader = make_loader(dataset, plan, args, device)
            ddp_model = wrap_ddp(model, device, world_size)
            continue

        evaluates = (epoch + 1) % args.eval_every == 0 or state["step"] == total_steps
        if evaluates and not interrupted:
            try:
                preds, vectors = evaluate(
                    model, dataset, splits["dev"], dialogs, args, device, rank, world_size
                )
            except Stopped:  # the epoch then is not over: a resumed run evaluates it
                interrupted = True
        if not interrupted:
            state["epoch"] += 1
            if evaluates:
                scores = metrics(preds, labels[splits["dev"]], scale=high - low)
                better = update_state(state, scores["ccc_mean"], args)
                log.info(score_line(f"epoch {epoch + 1:>3} | dev", scores) + " | best" * better)
                if files:
                    record = {f"dev/{k}": v for k, v in scores.items()}
                    record = {"epoch": state["epoch"], **record}
                    files.record("dev", state["step"], record)
                    hints.after_evaluation(record)
                    if better:
                        content = {"model": weights_to_save(model, args, schedule, epoch)}
                        content |= {"config": asdict(model.config)}
                        content |= {"args": flags, "label_range": [low, high]}
                        save_checkpoint(directory / "best.pt", content | {"epoch": epoch + 1})
                        scaled = low + (high - low) * preds
                        files.write_predictions("dev", corpus, splits["dev"], scaled)
                    if args.separation_every and state["epoch"] % args.separation_every == 0:
                        speakers = [corpus.utterances[row].speaker for row in splits["dev"]]
                        figures = report.separation(vectors, labels[splits["dev"]], speakers)
                        figures = {f"separation/{k}": v for k, v in figures.items()}
                        files.record("separation", state["step"], figures)
                    if args.plot_every and state["epoch"] % args.plot_every == 0:
                        plot_run(directory, "dev", vectors)
                meter.restart()
        save()
        if interrupted:
            if world_size > 1:
                dist.barrier()  # torchrun ends all ranks after the first: rank 0 has saved
            log.info(f"stopped by a signal at step {state['step']}: continue with --resume")
            return RETRY_EXIT_CODE
    bar.close()

    # Test: once, with the best weights of the dev split
    if world_size > 1:
        dist.barrier()  # best.pt is written (all ranks participate)
    load_weights(model, read_checkpoint(directory / "best.pt")["model"], directory)
    if not never_trains(args, schedule, epoch=args.epochs):
        dataset.hidden = None  # the best epoch's encoder may be another one
    scores = {}
    for split in ("dev", "test"):
        preds, vectors = evaluate(
            model, dataset, splits[split], dialogs, args, device, rank, world_size
        )
        scores[split] = metrics(preds, labels[splits[split]], scale=high - low)
        log.info(score_line(f"best epoch {state['best_epoch']} | {split}", scores[split]))
        if files:
            files.write_predictions(split, corpus, splits[split], low + (high - low) * preds)
    if files:
        np.save(directory / "embedding_test.npy", vectors.half().numpy())  # rows: predictions_test
        record = {f"{split}/{k}": v for split in scores for k, v in scores[split].items()}
        files.record("test", state["step"], {"epoch": state["best_epoch"], **record})
        result = {
            "name": args.name, "fold": args.fold, "num_folds": num_folds(corpus),
            "encoder": args.encoder, "wavlm": args.wavlm if args.encoder == "wavlm" else None,
            "wavlm_revision": args.wavlm_revision, "data": args.data, "seed": args.seed,
            "best_epoch": state["best_epoch"], "epochs_run": state["epoch"],
            "stopped": state["stopped"] or ("max_steps" if is_cut else "epochs"),
            "seconds": state["seconds"],
            "audio_seconds_per_second": state["audio_seconds"] / max(state["seconds"], 1e-9),
            "peak_gib_predicted": planned.peak_gib, "peak_gib_measured": memory.peak_gib(device),
            "parameters_total": sum(p.numel() for p in model.parameters()),
            "parameters_trainable": sum(
                p.numel() for group in optimizer.param_groups for p in group["params"]
            ),
            "git_commit": git_commit(),
            "versions": versions(), "label_range": [low, high],
            "splits": {name: len(rows) for name, rows in splits.items()}, **scores,
        }  # fmt: skip
        plot_run(directory, "test", vectors)
        files.write_json("result.json", result)  # last: a run with it is complete
        if args.preset == "verify" and args.unfreeze != "none":
            log.info(report.against_frozen(directory))
        files.close()
        log.info(f"done in {state['seconds']:.0f} s: {directory / 'result.json'}")
    if world_size > 1:
        dist.destroy_process_group()
    return 0


def run(argv: list[str] | None = None) -> int:
    """main with exit codes: 0 done, 75 resume me, 2 wrong flags or data, 1 anything else.

    Users' mistakes and faults of the machine are told in one or two lines, without a trace.
    """
    args = parse_args(argv)
    rank, code, reason = int(os.environ.get("RANK", 0)), 1, "done"
    try:
        code = main(args)
    except Stopped:
        code = RETRY_EXIT_CODE
    except UserError as error:
        code, reason = 2, str(error)
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
        reason = machine_fault(error, args)
        if not reason:
            reason = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        kill_workers()  # before the loader goes with `error`, and waits for them
    if code == RETRY_EXIT_CODE:
        reason = "stopped by a signal: continue with --resume"
    elif code and (rank == 0 or code == 1):
        print(f"train.py: error: {f'rank {rank}: ' * (rank > 0)}{reason}", file=sys.stderr)
    end_status(run_dir(args), code, reason)
    kill_workers()
    return code


if __name__ == "__main__":
    sys.exit(run())
