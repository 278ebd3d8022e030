"""Every flag of train.py, the presets, and the arithmetic of batch sizes.

    python train.py --help

A preset only sets flags, and a flag given by hand wins. A wrong flag ends the program with one line
and exit code 2, on every rank alike, before any process group exists. After parse_args nothing
changes the flags except split_batch, when a batch size was chosen or halved.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from corpora import LABELS, is_table
from data import BALANCE_BINS
from model import ENCODERS, GATES, ModelConfig
from step import PLATEAU_EVALS, parse_unfreeze, reads_cache, stages
from util.distributed import read_ranks, uses_cuda
from util.files import UserError
from util.runs import MODEL_FLAGS, read_flags
from wavlm import ATTENTIONS, SIZES

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
    "resume", "overwrite", "num_workers", "log_every", "cache_dir", "out", "data_dir", "dry_run",
    "gpu_gib", "memory_fraction", "preset", "device", "plot_every", "separation_every",
    "save_every", "timeout", "keep_last",
}  # fmt: skip

# A run with --init_from takes the model flags of its start, except for these.
FREE_WITH_INIT_FROM = {
    "max_seconds", "context", "wavlm", "wavlm_revision", "speaker", "vectors", "attention",
}  # fmt: skip

GPU_GIB = 24.0  # assumed size of a GPU that is not in this machine
AUTO_STEPS = 20  # --batch_size auto leaves at least so many steps in an epoch


def at_least(low: float, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` on."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}, and finite")
        return value

    parse.__name__ = kind.__name__  # which argparse names: "invalid int value"
    return parse


def share(text: str) -> float:
    """An argparse type: a number in 0..1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be in 0..1")
    return value


def size_or_auto(text: str) -> int | str:
    """An argparse type: a whole number from 1 on, or auto."""
    if text != "auto" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} must be at least 1, or auto")
    return text if text == "auto" else int(text)


def share_or_learned(text: str) -> str:
    """An argparse type: a number in 0..1, as text, or learned."""
    if text != "learned":
        share(text)
    return text


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Train one fold: valence, arousal, ... by WavLM, a CNN or a Transformer.",
        usage="python train.py [flags]; --help explains all of them",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    rate = at_least(0, float)
    # fmt: off
    add = p.add_argument_group("data").add_argument
    add("--data", default="demo", help="demo, iemocap, msp_podcast, or a .csv or .tsv file")
    add("--data_dir", help="root of iemocap or msp_podcast, or of the audio paths in a CSV")
    add("--fold", type=at_least(1), default=1, help="test session 1..K; dev is the next one")
    add("--label_range", type=float, nargs=2, metavar=("LO", "HI"),
        help="scale of the labels; default: the corpus's; for a CSV that of --init_from, else 0 1")
    add("--max_seconds", type=at_least(0.1, float), default=12.0,
        help="longest clip; training takes a random window of longer ones, evaluation the start")
    add("--context", type=at_least(1), default=1,
        help="turns per dialogue chunk; 1 = single utterances")
    add("--num_workers", type=at_least(0), default=2, help="loader workers per rank")
    add("--cache_dir", default="cache",
        help="directory of all caches: decoded audio, features, hidden states")
    add("--feature_cache", choices=("auto", "on", "off", "exact"), default="auto",
        help="run the frozen part of WavLM (unfreeze none, top:K or lora) once per utterance and "
        "keep what the rest reads in --cache_dir, in half precision, or the run's (exact); "
        "utterances above --max_seconds: their beginning; auto: on unless --augment")
    add("--balance", type=share, default=0.0,
        help="draw rare labels more often: an utterance in proportion to (number of train "
        f"utterances in its cell of a grid of {BALANCE_BINS} bins per target of weight above 0) ** "
        "-BALANCE; 0 = off, 1 = all cells alike")
    add("--augment", action="store_true", help="gain, noise, speed and time masks in training")

    add = p.add_argument_group("model").add_argument
    add("--targets", choices=LABELS, nargs="+", default=list(ModelConfig.targets),
        help="labels to learn, in the order of all columns; a row needs one of them")
    add("--encoder", choices=ENCODERS, default="wavlm", help="module that turns input into frames")
    add("--wavlm", default="microsoft/wavlm-large",
        help=f"hub name, local directory, checkpoint file, or random weights: {', '.join(SIZES)}")
    add("--wavlm_revision", help="hub commit or tag of --wavlm")
    add("--wavlm_dropout", type=share, help="replaces all dropouts of the WavLM checkpoint")
    add("--layers", type=int, nargs="+", help="hidden states to mix; default: quarter points")
    add("--lora", type=at_least(0), default=0, metavar="R",
        help="train updates of rank R of the q, k, v and out projections in all of WavLM's layers, "
        "at --lr, instead of WavLM itself (--unfreeze none then means lora); 0 = off. It saves "
        "memory; that it helps valence is shown by no published figure")
    add("--lora_alpha", type=rate, default=0.0, metavar="ALPHA",
        help="updates of --lora count ALPHA / R times; 0 = R, so once: the rate alone decides")
    add("--pooling", choices=("mean", "attention", "stats"), default="mean",
        help="how frames become one utterance vector; stats: mean and standard deviation")
    add("--features_dir", "--features_224_dir", help="<utt_id>.npy (T, D) for the Transformers")
    add("--feature_rate", type=at_least(0.01, float),
        help="frames per second in --features_dir; default: from frames and seconds of audio")
    add("--prosody", choices=("egemaps", "none"), default="egemaps",
        help="88 functionals by opensmile, which is free for research only")
    add("--speaker", default="none",
        help="ecapa, xvector, a directory of <utt_id>.npy or of an x-vector model, or none")
    add("--vectors", action="append", metavar="DIR",
        help="<utt_id>.npy (D,), a vector per utterance of any origin, such as text.py's; "
        "standardised on train; may be given several times")
    add("--no_film", action="store_true", help="do not condition the speech on the speaker")
    add("--d_prosody", type=at_least(1), default=64, help="width of the prosody code")
    add("--d_hidden", type=at_least(2), default=256,
        help="hidden width of FiLM, updater and heads")
    add("--d_state", type=at_least(0), default=64, help="width of the dialogue state; 0 = none")
    add("--ema_alpha", type=share_or_learned, default="0.8",
        help="decay of the dialogue state in [0, 1), or learned")
    add("--mamba_layers", type=at_least(0), default=2,
        help="Mamba blocks in the updater; 0 = linear")
    add("--feedback", action="store_true",
        help="feed the previous prediction; teacher forcing falls from 1 to 0 over the epochs")
    add("--gates", nargs="+", choices=GATES,
        help="what each target's head can weigh against its other inputs, in the order of the "
        "targets; default: prosody for valence where there is prosody, else speech")
    add("--d_model", type=at_least(64), default=768, help="width of the feature Transformer")
    add("--num_layers", type=at_least(1), default=4, help="layers of the feature Transformer")
    add("--base_channels", type=at_least(1), default=64,
        help="channels of the CNN's first block")
    add("--num_blocks", type=at_least(1), default=4, help="blocks of the CNN")
    add("--dropout", type=share, default=0.2, help="dropout outside WavLM, which has its own")

    add = p.add_argument_group("optimization").add_argument
    add("--epochs", type=at_least(1), default=20, help="passes over the train split")
    add("--max_steps", type=at_least(-1), default=-1,
        help="stop after this many steps; -1 = off")
    add("--batch_size", type=size_or_auto, default=8,
        help="utterances per GPU and micro-step; auto: the largest that fits, planned, "
        f"then tried, and leaves {AUTO_STEPS} steps in an epoch")
    add("--gradient_accumulation_steps", type=at_least(1),
        help="micro-steps per step; default 1")
    add("--global_batch_size", type=at_least(1),
        help="= batch_size x accumulation x ranks, which is the default")
    add("--lr", type=rate, default=1e-4, help="peak learning rate of everything except WavLM")
    add("--encoder_lr", type=rate, default=1e-5, help="peak learning rate of WavLM")
    add("--lr_reference_batch", type=at_least(0), default=0,
        help="multiply both rates by global_batch_size / this; 0 = off")
    add("--weight_decay", type=rate, default=0.01, help="weight decay of AdamW, on matrices only")
    add("--max_grad_norm", type=rate, default=1.0, help="clip the gradient norm; 0 = off")
    add("--scheduler", choices=("none", "cosine", "plateau"), default="cosine",
        help=f"plateau: halve the rates after {PLATEAU_EVALS} evaluations without a better dev CCC")
    add("--warmup", type=share, default=0.1, help="share of all steps used for warm-up")
    add("--unfreeze", default="none",
        help="part of WavLM that trains: none, all, transformer, top:K, or a schedule "
        "EPOCH:WHAT,... e.g. 1:none,6:top:4,9:all; with --lora, also lora, e.g. 1:none,4:lora")
    add("--loss", choices=("ccc", "mse"), default="ccc", help="ccc: 1 - CCC + mse_weight x MSE")
    add("--mse_weight", type=rate, default=0.1, help="weight of MSE in --loss ccc")
    add("--target_weights", type=rate, nargs="+", metavar="W",
        help="weight of each of --targets in the loss, divided by their sum; default: equal")
    add("--valence_weight", type=share,
        help="weight of valence in [0, 1], while other targets share the rest; default: equal")
    add("--exact_ccc", choices=("on", "off"), default="on",
        help="CCC of the global batch; with accumulation this costs one more forward, a third more "
        "time. off: mean of the micro-batches' CCCs, 0.13 too low at 4 utterances [measured]")
    add("--patience", type=at_least(0), default=0,
        help="stop after this many evaluations without a better dev CCC; 0 = off")
    add("--seed", type=at_least(0), default=0, help="random seed")

    add = p.add_argument_group("precision and memory").add_argument
    add("--amp", choices=("fp16", "bf16", "off"),
        help="autocast; default fp16 (with GradScaler) on a GPU, off on a CPU")
    add("--no_amp", dest="amp", action="store_const", const="off", help="same as --amp off")
    add("--tf32", choices=("on", "off"), default="on",
        help="TF32 in matrix products and convolutions of float32 tensors on a GPU")
    add("--gradient_checkpointing", action="store_true",
        help="keep only layer inputs for backward, which then runs each layer again")
    add("--compile", action="store_true", help="torch.compile the encoder's layers")
    add("--attention", choices=ATTENTIONS, default="fused",
        help="kernel of WavLM's attention; fused keeps no frames x frames tensor for backward")
    add("--gpu_gib", type=at_least(0.1, float),
        help=f"GPU memory to plan for, GiB; default: the GPU here, or {GPU_GIB:g} without one")
    add("--memory_fraction", type=share, default=0.0,
        help="cap this process at a share of the GPU's memory; 0 = off")

    add = p.add_argument_group("evaluation and output").add_argument
    add("--eval_every", type=at_least(1), default=1, help="epochs between evaluations on dev")
    add("--log_every", type=at_least(1), default=20, help="steps between log lines")
    add("--plot_every", type=at_least(0), default=0,
        help="epochs between pictures; 0 = at the end only")
    add("--separation_every", type=at_least(0), default=0,
        help="epochs between separation figures of the embeddings; 0 = off")
    add("--save_every", type=at_least(0), default=0,
        help="steps between checkpoints; 0 = at epoch ends")
    add("--keep_last", action="store_true",
        help="keep last.pt and previous.pt of a finished run; best.pt is always kept")
    add("--out", default="runs", help="directory of all runs")
    add("--name",
        help="name of the experiment, in OUT/NAME/foldK; default CORPUS-ENCODER; of one with "
        "several seeds NAME/seedS, with --seed S")

    add = p.add_argument_group("run").add_argument
    add("--preset", choices=sorted(PRESETS), help="sets flags; a flag given by hand wins")
    add("--resume", action="store_true", help="continue from last.pt; start if there is none")
    add("--overwrite", action="store_true", help="delete the run directory first")
    add("--init_from", help="run directory, best.pt or export to start from, with its model flags")
    add("--train_only", choices=("film",), help="freeze everything else (personalisation)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if present")
    add("--timeout", type=at_least(1, float), default=300.0,
        help="end the run after this many seconds without another rank's answer or a batch")
    add("--dry_run", action="store_true", help="print the run and its memory, then stop")
    # fmt: on
    return p


def parse_args(
    argv: list[str] | None = None, world_size: int | None = None, device: str = "auto"
) -> argparse.Namespace:
    """Flags after presets, checked, with amp, name and the batch sizes filled in.

    `world_size`: number of ranks, by default torchrun's; `device`: default of --device. With
    --batch_size auto, accumulation and global batch size stay as they were given until there is a
    model. Exits with code 2 and one line on a wrong flag.
    """
    parser = build_parser()
    parser.set_defaults(device=device)
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse_with_defaults(parser, argv)
        check(args)
        if args.batch_size != "auto":
            split_batch(args, args.batch_size, world_size or read_ranks()[2])
    except UserError as error:
        parser.error(str(error))
    return args


def parse_with_defaults(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Flags over those of --init_from's model over those of the preset over the defaults."""
    given, _ = parser.parse_known_args(argv)
    if given.preset:
        flags = dict(PRESETS[given.preset])
        if given.preset == "large_batch" and given.encoder.endswith("transformer"):
            flags["batch_size"] = 128
        parser.set_defaults(**flags)
    known, start = vars(given).keys() & MODEL_FLAGS, {}
    if given.init_from:
        start = read_flags(given.init_from, "--init_from")
        defaults = {k: v for k, v in start.items() if k in known}
        if given.vectors:  # argparse would append them to the default
            defaults.pop("vectors", None)
        parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if start:
        for flag in sorted(known - FREE_WITH_INIT_FROM):
            old, new = start.get(flag, parser.get_default(flag)), getattr(args, flag)
            if new != old:
                raise UserError(f"--{flag} {new}: the model of --init_from has {old}: leave it out")
        if is_table(args.data):
            args.label_range = args.label_range or start["label_range"]
    if args.train_only:
        if given.unfreeze != "none":
            raise UserError(f"--train_only freezes WavLM: remove --unfreeze {given.unfreeze}")
        args.unfreeze = "none"  # a preset may have set it
    elif args.lora and given.unfreeze == "none":
        args.unfreeze = "lora"
    set_weights(args)
    args.amp = args.amp or ("fp16" if uses_cuda(args.device) else "off")
    corpus = Path(args.data).stem if is_table(args.data) else args.data
    args.name = args.name or f"{corpus}-{args.encoder}"
    return args


def set_weights(args: argparse.Namespace) -> None:
    """Fills in target_weights, of sum 1, and valence_weight; UserError if they contradict."""
    targets, weights, share_of_valence = args.targets, args.target_weights, args.valence_weight
    others = len(targets) - 1
    given = f"--valence_weight {share_of_valence}"
    if len(set(targets)) < len(targets):
        raise UserError(f"--targets {' '.join(targets)}: give each target once")
    if share_of_valence is not None:
        if weights:
            raise UserError(f"{given} and --target_weights exclude each other")
        if "valence" not in targets:
            raise UserError(f"{given}: valence is not among --targets {' '.join(targets)}")
        if not others and share_of_valence != 1:
            raise UserError(f"{given}: valence is the only target: remove it")
        rest = (1 - share_of_valence) / max(1, others)
        weights = [share_of_valence if target == "valence" else rest for target in targets]
    elif weights:
        shown = " ".join(f"{weight:g}" for weight in weights)
        if len(weights) != len(targets):
            need = f"--targets {' '.join(targets)} needs {len(targets)}"
            raise UserError(f"--target_weights {shown}: {need}, one for each")
        if not 0 < sum(weights) < math.inf:
            raise UserError(f"--target_weights {shown}: one must be above 0, and the sum finite")
        weights = [weight / sum(weights) for weight in weights]
    args.target_weights = weights or [1 / len(targets)] * len(targets)
    args.valence_weight = dict(zip(targets, args.target_weights)).get("valence")


def check(args: argparse.Namespace) -> None:
    """UserError on flags that exclude or need each other."""
    low, high = args.label_range or (0, 1)
    name = args.name.removesuffix(f"/seed{args.seed}")
    schedule, trained = parse_unfreeze(args.unfreeze), stages(args.unfreeze)
    reads_features = args.encoder.endswith("transformer")
    cached = args.feature_cache in ("on", "exact")
    absent = [directory for directory in args.vectors or () if not Path(directory).is_dir()]
    gates, inputs = args.gates or (), {"speech", "none"}  # what a gate can single out
    if args.vectors:
        inputs.add("vectors")
    if args.prosody != "none":
        inputs.add("prosody")
    for flag in ("separation_every", "plot_every"):
        if getattr(args, flag) % args.eval_every:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be a multiple of --eval_every")
    # fmt: off
    for wrong, message in (
        (args.max_steps == 0, "--max_steps 0: must be at least 1, or -1 for no limit"),
        (args.seed >= 2**63, f"--seed {args.seed}: must be below 2^63"),
        (1 in (args.dropout, args.wavlm_dropout), "--dropout 1 leaves nothing: must be below 1"),
        (args.ema_alpha != "learned" and float(args.ema_alpha) == 1,
         "--ema_alpha 1 never changes the state: must be below 1"),
        (not -math.inf < low < high < math.inf, "--label_range LO HI: LO must be below HI"),
        (is_table(args.data) and not Path(args.data).is_file(),
         f"--data {args.data}: no such file"),
        (args.resume and args.overwrite, "--resume and --overwrite exclude each other"),
        ("/" in name or name in ("", ".", ".."),
         f"--name {args.name}: must not contain / (but for NAME/seed{args.seed}, by which "
         f"launch.sh --seeds names the runs with --seed {args.seed})"),
        (reads_features and not args.features_dir, "the Transformers need --features_dir DIR"),
        (args.features_dir and not reads_features,
         f"--features_dir is not used by --encoder {args.encoder}: remove it"),
        (absent, f"--vectors {' '.join(absent)}: no such directory (text.py makes one)"),
        (args.feature_rate and not args.features_dir, "--feature_rate is that of --features_dir"),
        (args.augment and reads_features,
         "--augment works on waveforms, but this encoder reads --features_dir"),
        (reads_features and args.d_model % 64, "--d_model: must be a multiple of 64"),
        (args.encoder == "lightweight_transformer" and args.d_model % 256,
         "--d_model: must be a multiple of 256, of which a quarter is used"),
        (args.feedback and (args.context == 1 or not args.d_state),
         "--feedback needs a previous turn: give --context above 1 and --d_state"),
        (args.speaker != "none" and args.no_film,
         f"--speaker {args.speaker} is read by FiLM alone: remove it, or --no_film"),
        (gates and len(gates) != len(args.targets),
         f"--gates {' '.join(gates)}: give one for each of {' '.join(args.targets)}"),
        (not inputs.issuperset(gates),
         f"--gates {' '.join(gates)}: the inputs are {' '.join(sorted(inputs - {'none'}))}: "
         "name these or none, or give --prosody egemaps or --vectors DIR"),
        (args.train_only and not args.init_from, "--train_only needs --init_from, a trained model"),
        (args.train_only and args.no_film, "--train_only film needs FiLM: remove --no_film"),
        (args.amp == "fp16" and not uses_cuda(args.device),
         "--amp fp16 needs a GPU: use --amp bf16 or off on a CPU"),
        (schedule[-1][0] > args.epochs,
         f"--unfreeze {args.unfreeze}: its last epoch is after --epochs {args.epochs}"),
        (args.lora and args.encoder != "wavlm",
         f"--lora {args.lora} is for WavLM, not for --encoder {args.encoder}"),
        (args.lora and not args.train_only and {*trained, "none"} != {"none", "lora"},
         f"--lora {args.lora} trains none of WavLM's weights: remove --unfreeze {args.unfreeze}"),
        (not args.lora and ("lora" in trained or args.lora_alpha),
         "--unfreeze lora and --lora_alpha need a rank, --lora R"),
        (cached and args.augment,
         f"--feature_cache {args.feature_cache} keeps what WavLM makes of the recording itself, "
         "--augment changes it every epoch: remove one of the two"),
        (cached and args.encoder != "wavlm",
         f"--feature_cache {args.feature_cache} is for WavLM, not for --encoder {args.encoder}"),
        (cached and not any(reads_cache(args, stage) for stage in trained),
         f"--feature_cache {args.feature_cache}: --unfreeze {args.unfreeze} freezes no layers"),
    ):
        if wrong:
            raise UserError(message)
    # fmt: on


# ---------------------------------------------------------------------------------------------
# Batch sizes: batch_size x gradient_accumulation_steps x ranks = global_batch_size


def split_batch(
    args: argparse.Namespace, size: int, world_size: int, total: int | None = None
) -> None:
    """Sets batch_size, accumulation and global batch size; UserError if they contradict.

    `total`: global batch size that a run has already, whose accumulation then follows.
    """
    if size % args.context:
        raise UserError(
            f"--batch_size {size} is not a multiple of --context {args.context}: "
            "a micro-batch holds complete chunks of turns"
        )
    per_micro_step = size * world_size
    wanted = args.gradient_accumulation_steps if total is None else None
    total = total or args.global_batch_size or per_micro_step * (wanted or 1)
    accumulation, rest = divmod(total, per_micro_step)
    if rest or accumulation < 1:
        raise UserError(
            f"--global_batch_size {total} is not a multiple of "
            f"batch_size {size} x {world_size} ranks = {per_micro_step}"
        )
    if wanted not in (None, accumulation):
        raise UserError(
            f"--global_batch_size {total} needs --gradient_accumulation_steps {accumulation}, "
            f"not {wanted}"
        )
    args.batch_size, args.global_batch_size = size, total
    args.gradient_accumulation_steps = accumulation


def halve_batch(args: argparse.Namespace, world_size: int) -> None:
    """At most half the micro-batch in the same global batch; OutOfMemoryError if there is none."""
    for size in range(args.batch_size // 2, 0, -1):
        if size % args.context == 0 and args.global_batch_size % (size * world_size) == 0:
            split_batch(args, size, world_size, args.global_batch_size)
            return
    raise torch.OutOfMemoryError(
        f"no room for --batch_size {args.batch_size}, which cannot be split further: lower "
        "--max_seconds or --context, unfreeze less, or give --gradient_checkpointing"
    )
