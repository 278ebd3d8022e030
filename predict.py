"""Valence, arousal, ... of recordings, in the label's scale, from trained checkpoints.

    python predict.py --checkpoint runs/demo/fold1 a.wav b.flac recordings/ --out out.csv
    python predict.py --checkpoint runs/x/fold1 --checkpoint runs/x/fold2 --data m.csv --out out.csv
    python predict.py --checkpoint runs/demo/fold1 long.wav --window 8 --hop 2 --plot . --out c.csv
    ls turns/*.wav | python predict.py --checkpoint runs/dialogues/fold1 --stream --state state
    python predict.py --checkpoint runs/demo/fold1 --export model

Input: files; folders, in which all is tried that is not something else by its name; @FILE or - for
a list of them in a file or on stdin, a path a line; or a CSV manifest (utt_id, path, and start,
end, dialog, speaker if it has them; labels are not needed); or a corpus, as in train.py. ffmpeg or
torchcodec, if installed, decodes what libsndfile does not know (m4a, mp4, webm, amr, ...).
Output: a row per utterance; several checkpoints give the mean and the standard deviation over them.
The utt_id of a file is its name without suffix or, if two files share it, the shortest end of its
path that no other file has.

A run that was trained on dialogues (--context above 1) tracks the turns of a manifest's dialogue in
order; a file, like a window, is a dialogue of one turn. --stream tracks the files it is given, or
the paths that come in on stdin, as one dialogue; an empty line begins the next.

Predictions equal those of the run's evaluation: to six decimals from audio, to about 1e-4 where
evaluation read float16 states of a frozen WavLM from the cache. They do not depend on what else is
predicted. On a CPU, a run trained under --amp fp16 is evaluated in fp32.

Audio is decoded into a temporary folder ($TMPDIR; 115 MB an hour, with --window that times window /
hop). What is missing or cannot be decoded is named on stderr and left out. Exit code: 0 done; 1
nothing could be decoded; 2 wrong flags or files.
Not here: training and personalisation (train.py --init_from RUN --train_only film).
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import data
from corpora import (
    BLIND,
    TESTS,
    Corpus,
    Utterance,
    is_table,
    listed,
    read_corpus,
    read_csv,
    read_files,
    turn_order,
)
from model import AUTOCAST, EmotionModel, track_dialogues
from util import distributed
from util.audio import seconds_of
from util.checkpoints import read_checkpoint, save_checkpoint
from util.files import (
    UserError,
    digest,
    in_words,
    progress_bar,
    replace_text,
    replacing,
    run_script,
    say,
    weights_digest,
)
from util.pictures import COLOURS, new_figure
from util.runs import MODEL_FLAGS, challenge_table, load_model, predicted, read_json
from wavlm import merge_lora, save_wavlm


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked; exits with code 2 and one line on those that exclude or need each other."""
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="python predict.py --checkpoint RUN [flags] [audio ...], see --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    p.add_argument("audio", nargs="*",
                   help="audio files, folders, - for a list on stdin, or @FILE for one in a file")
    p.add_argument("--checkpoint", action="append", required=True,
                   help="run directory, best.pt or exported directory; may be given several times")
    p.add_argument("--data", help="CSV manifest or corpus (as in train.py) instead of files")
    p.add_argument("--data_dir", help="root of the corpus, or of the manifest's paths; default: "
                   "its folder")
    p.add_argument("--split", choices=("train", "dev", *TESTS),
                   help=f"only this split of --data; {BLIND}: in the form of MSP-Podcast's "
                   "challenge (FileName, EmoAct, EmoVal, EmoDom)")
    p.add_argument("--out", help="CSV to write")
    p.add_argument("--cache_dir",
        help="keeps decoded audio and features for the next call; default: nothing is kept")
    p.add_argument("--features_dir", help="<utt_id>.npy (of a file: its name without suffix), for "
                   "a feature Transformer")
    p.add_argument("--vectors", action="append", metavar="DIR",
                   help="<utt_id>.npy (of a file: its name without suffix), a directory for each "
                   "of the run's --vectors, in the same order")
    p.add_argument("--speaker", help="as in train.py; default: what the run was trained with")
    p.add_argument("--max_seconds", type=float, help="use the beginning only; default: the run's")
    p.add_argument("--window", type=float, default=0.0,
                   help="seconds of each window of a curve over the whole file; 0 = off")
    p.add_argument("--hop", type=float, help="seconds between two windows' starts; default 2")
    p.add_argument("--plot", metavar="DIR", help="with --window: each curve as DIR/<file>.png")
    p.add_argument("--stream", action="store_true",
                   help="one line on stdout per utterance as it comes, state carried along")
    p.add_argument("--state", metavar="FILE",
                   help="with --stream: go on from the state in it, if any, and keep it there")
    p.add_argument("--export", metavar="DIR",
                   help="write the model, its card and WavLM alone, as safetensors")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                   help="auto: cuda if present")
    # fmt: on
    args = p.parse_args(argv)
    hop = 2.0 if args.hop is None else args.hop
    files, seconds, out = not (args.stream or args.export), args.max_seconds, args.out or "x.csv"
    for wrong, message in (
        (not files and len(args.checkpoint) > 1, "--stream and --export take one --checkpoint"),
        (args.export and (args.audio or args.data or args.stream), "--export takes a run alone"),
        (args.stream and (args.data or args.window), "--stream takes files: no --data, --window"),
        (args.state and not args.stream, "--state needs --stream"),
        (
            files and bool(args.audio) == bool(args.data),
            "give either audio files, - for a list of them on stdin, or --data CSV",
        ),
        (files == (args.out is None), "give --out CSV, but not with --stream and --export"),
        (not out.lower().endswith(".csv"), f"--out {out}: must end in .csv"),
        (not Path(out).absolute().parent.is_dir(), f"--out {out}: no such folder"),
        (args.window and seconds, "--window and --max_seconds exclude each other"),
        (args.window and args.features_dir, "--window cuts audio, not --features_dir"),
        ((args.data_dir or args.split) and not args.data, "--data_dir and --split need --data"),
        (args.split == BLIND and args.window, f"--split {BLIND} writes no windows"),
        (seconds is not None and not 0.1 <= seconds < math.inf, "--max_seconds: 0.1 or more"),
        (args.hop is not None and not args.window, "--hop is between windows: give --window"),
        (args.window and not args.window >= 0.1, "--window: 0.1 s or more"),
        (args.window and not 0 < hop <= args.window, f"--hop {hop:g}: need 0 < hop <= window"),
        (args.plot and not args.window, "--plot shows curves: give --window"),
    ):
        if wrong:
            p.error(message)
    args.hop = hop
    return args


# ---------------------------------------------------------------------------------------------
# What to predict


def cut_windows(corpus: Corpus, window: float, hop: float) -> Corpus:
    """The corpus with each utterance as windows (seconds), the last of which ends where it ends.

    An utterance that is no longer than a window is one window; so is a file that cannot be opened:
    decode() names it later.
    """
    cut = []
    for u in corpus.utterances:
        file_end = seconds_of(u.path)
        last = min(u.end or file_end, file_end) - window
        for start in np.arange(u.start, last - 1e-6, hop):
            cut.append(dataclasses.replace(u, start=float(start), end=float(start) + window))
        cut.append(dataclasses.replace(u, start=max(u.start, last)))
    return dataclasses.replace(corpus, utterances=cut)


def decode(corpus: Corpus, cache_dir: str) -> tuple[Corpus, data.PackedRows | None]:
    """Decoded audio, and the utterances that have any; stderr has what is left out."""
    for note in corpus.notes:
        say(f"note: {note}")
    pack = None
    if corpus.utterances:
        corpus, pack = data.load_audio(corpus, cache_dir, 1.0)  # however many are left out
    for utt_id, file, reason in corpus.skipped:
        long = " or --window" if reason.startswith("longer than") else ""
        say(f"skipped {utt_id} ({file}): {reason}{long}")
    return corpus, pack


# ---------------------------------------------------------------------------------------------
# Utterance vectors


def build_inputs(
    corpus: Corpus,
    pack: data.PackedRows,
    cache_dir: str,
    args: argparse.Namespace,
    model: EmotionModel,
    flags: dict,
) -> data.Batches:
    """What the model of a run trained with `flags` reads of the corpus."""
    config = model.config
    reads_features, reads_speaker = config.frame_dim > 0, config.speaker_dim > 0
    for flag, value, is_read in (
        ("--features_dir", args.features_dir, reads_features),
        ("--speaker", args.speaker, reads_speaker),
        ("--vectors", " ".join(args.vectors or ()), config.vector_dims),
    ):
        if value and not is_read and len(args.checkpoint) == 1:  # of several, another may read it
            raise UserError(f"{flag} {value}: the run was trained without such input: remove it")
    if reads_features and not args.features_dir:
        raise UserError("the run reads feature files: give --features_dir DIR")
    if config.vector_dims and not args.vectors:
        widths = ", ".join(map(str, config.vector_dims))
        wanted = f"the run reads vectors of widths {widths}: give --vectors DIR for each"
        raise UserError(f"{wanted}{data.MAKERS['--vectors']}")
    named = corpus
    if not args.data:  # .npy files belong to a recording by its name without suffix
        stems = [dataclasses.replace(u, utt_id=u.path.stem) for u in corpus.utterances]
        named = dataclasses.replace(corpus, utterances=stems)
    features = prosody = speaker = None
    if reads_features:
        trained = config.frame_rate or None  # None: a run of older code
        features = data.FrameFeatures(named, args.features_dir)
        if trained and not flags["feature_rate"] and not 0.9 < features.rate / trained < 1.1:
            fault = f"{features.rate:g} frames per second, but the run was trained on {trained:g}"
            raise UserError(f"--features_dir {args.features_dir}: {fault}")
        features.rate = trained or features.rate
    if config.prosody_dim:
        prosody = data.egemaps(pack, cache_dir)
    if reads_speaker:
        kind, device = args.speaker or flags["speaker"], str(next(model.parameters()).device)
        if kind == "none":
            raise UserError("--speaker none: the run was trained with speaker embeddings")
        speaker = data.speaker_embeddings(named, pack, kind, cache_dir, device)
    expected = tuple(config.vector_dims)
    vectors, found = data.all_vectors(named, args.vectors if expected else (), cache_dir)
    if found != expected:
        fault = f"widths {found}, but the run was trained on {expected}"
        raise UserError(f"--vectors: {fault}: give its directories, in its order")
    dataset = data.Batches(
        labels=np.zeros((len(corpus.utterances), len(config.targets)), dtype=np.float32),
        pack=None if features else pack,
        features=features,
        prosody=prosody,
        speaker=speaker,
        max_seconds=args.window or args.max_seconds or flags["max_seconds"],
        augment=False,
        seed=0,
        vectors=vectors,
    )
    if dataset.num_cut:
        cut = f"{dataset.num_cut} longer than {dataset.max_seconds:g} s: their beginning is used"
        say(f"note: {cut}, as in evaluation; --window 8 gives a curve over all")
    return dataset


def evaluated_as(flags: dict, device: torch.device) -> torch.autocast:
    """Autocast, and TF32 set, as the run was evaluated; both fp16 and TF32 only on a GPU."""
    distributed.allow_tf32(flags["tf32"] == "on")
    amp = flags["amp"] if device.type == "cuda" or flags["amp"] == "bf16" else "off"
    return torch.autocast(device.type, AUTOCAST[amp], enabled=amp != "off")


def encode(dataset: data.Batches, model: EmotionModel) -> Tensor:
    """Utterance vectors (N, U) of all rows, in the batches of train.py's evaluation.

    UserError if memory does not suffice for one utterance.
    """
    rows, device = np.arange(len(dataset.lengths)), next(model.parameters()).device
    plan = data.eval_plan(dataset, rows, 0, 1, model.sees_padding)
    batches = progress_bar((dataset[spec] for spec in plan), len(plan), "encode")
    turns = torch.zeros(len(rows), model.width, device=device)
    try:
        for some, vectors in distributed.encode_in_pieces(model.encode, batches, device):
            turns[some] = vectors
    except torch.OutOfMemoryError as error:
        raise UserError(f"{error} or --window") from None
    return turns


# ---------------------------------------------------------------------------------------------
# Files, windows and manifests


def read_inputs(args: argparse.Namespace) -> Corpus:
    """The files, or the utterances of --data and --split, which need no labels."""
    if not args.data:
        return read_files(listed(args.audio))
    if is_table(args.data) or Path(args.data).is_file():
        root = Path(args.data_dir) if args.data_dir else None
        corpus = read_csv(Path(args.data), root, None, targets=())
    else:
        corpus = read_corpus(args.data, args.data_dir, None, targets=())
    if args.split:
        chosen = [u for u in corpus.utterances if u.split == args.split]
        if not chosen:
            there = in_words(sorted({u.split for u in corpus.utterances} - {""}))
            raise UserError(f"--split {args.split}: {args.data} has {there or 'no splits'}")
        corpus.utterances = chosen
    return corpus


def predict(args: argparse.Namespace, device: torch.device) -> int:
    """Writes args.out, and the pictures; the exit code."""
    corpus = read_inputs(args)
    inputs = [args.data or "", *(u.path for u in corpus.utterances)]
    if os.path.realpath(args.out) in map(os.path.realpath, inputs) or Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is an input, or a folder: give another name")
    if args.window:
        corpus = cut_windows(corpus, args.window, args.hop)
    preds, first = [], None  # of each checkpoint (N, E), in the label's scale; the first one
    with tempfile.TemporaryDirectory(prefix="vatune-") as temporary:
        cache_dir = args.cache_dir or temporary
        corpus, pack = decode(corpus, cache_dir)
        if not corpus.utterances:
            if any(os.path.exists(skipped.file) for skipped in corpus.skipped):
                say("predict.py: nothing could be decoded")
                return 1
            raise UserError(f"no audio files in {args.data or ' '.join(args.audio[:3])}")
        for path in args.checkpoint:
            model, checkpoint = load_model(path, "--checkpoint")
            scale = (sorted(model.config.targets), *checkpoint["label_range"])
            first = first or (scale, model.config.targets)
            if scale != first[0]:
                raise UserError(
                    f"--checkpoint {path}: the runs differ in targets or label range: "
                    f"{scale}, not {first[0]}"
                )
            flags, (low, high) = checkpoint["args"], checkpoint["label_range"]
            order = list(range(len(corpus.utterances)))
            dialogs = order  # each utterance is one
            if flags["context"] > 1 and args.data and not args.window:
                order = sorted(order, key=lambda row: turn_order(corpus.utterances[row]))
                dialogs = [u.dialog for u in corpus.utterances]
            with torch.no_grad(), evaluated_as(flags, device):
                dataset = build_inputs(corpus, pack, cache_dir, args, model.to(device), flags)
                turns = encode(dataset, model)
                tracked = track_dialogues(model, turns[order], [dialogs[row] for row in order])
            targets = first[1]
            tracked = tracked[:, [model.config.targets.index(target) for target in targets]]
            preds.append(torch.empty_like(tracked))
            preds[-1][order] = low + (high - low) * tracked
    if args.split == BLIND:
        means = torch.stack(preds).double().mean(0).numpy()
        table = challenge_table(corpus.utterances, means, targets)
    else:
        table = table_of(corpus, torch.stack(preds), targets, bool(args.window))
    replace_text(Path(args.out), table.to_csv(index=False, float_format="%.6f"))
    if args.plot:
        plot_windows(Path(args.plot), table, targets, (low, high))
    count = f"{len(table)} {'windows' if args.window else 'utterances'}"
    scale = f"{in_words(targets)} in {low:g}..{high:g}"
    print(f"{count}, {len(corpus.skipped)} skipped, {scale}: {args.out}")
    return 0


def table_of(corpus: Corpus, preds: Tensor, targets: list[str], windows: bool) -> pd.DataFrame:
    """A row per utterance or window: mean and standard deviation over preds (M, N, E)."""
    utterances = corpus.utterances
    texts = {"utt_id": [u.utt_id for u in utterances]}
    texts["path"] = [path_of(u, corpus) for u in utterances]
    if not windows:
        texts |= {name: [getattr(u, name) for u in utterances] for name in ("dialog", "speaker")}
    table = pd.DataFrame(texts, dtype=object)  # names need not be UTF-8
    if windows:
        table["start"] = [u.start for u in utterances]
        table["end"] = table["start"] + corpus.seconds
    else:
        table["seconds"] = corpus.seconds
    table[predicted(targets)] = preds.mean(0).numpy()
    if len(preds) > 1:
        table[[f"std_{target}" for target in targets]] = preds.std(0).numpy()
    return table


def path_of(u: Utterance, corpus: Corpus) -> str:
    """The file as it was given; of a manifest, below its folder or --data_dir."""
    return str(u.path.relative_to(corpus.root) if u.path.is_relative_to(corpus.root) else u.path)


def plot_windows(
    directory: Path, table: pd.DataFrame, targets: Sequence[str], label_range: tuple[float, float]
) -> None:
    """<utt_id>.png, with _ for /: predictions at the middles of the windows, in a band of one
    standard deviation."""
    directory.mkdir(parents=True, exist_ok=True)
    for utt_id, windows in table.groupby("utt_id"):
        figure, [axis] = new_figure(1, width=9)
        x = (windows["start"] + windows["end"]) / 2
        for target, colour in zip(targets, COLOURS):
            mean, std = windows[f"pred_{target}"], windows.get(f"std_{target}", 0)
            axis.plot(x, mean, ".-", lw=1.2, color=colour, label=target)
            axis.fill_between(x, mean - std, mean + std, alpha=0.25, lw=0, color=colour)
        axis.set(xlabel="middle of the window, s", ylim=label_range, title=utt_id)
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=len(targets))
        with replacing(directory / f"{utt_id.replace('/', '_')}.png") as file:
            figure.savefig(file, format="png")


# ---------------------------------------------------------------------------------------------
# A dialogue as it happens


def stream(args: argparse.Namespace, device: torch.device) -> int:
    """Prints a CSV line per utterance as it comes, tracked as part of its dialogue; the exit code.

    The state is saved before the line is printed: who has the line can go on from there.
    """
    model, checkpoint = load_model(args.checkpoint[0], "--checkpoint")
    flags, (low, high) = checkpoint["args"], checkpoint["label_range"]
    carries, state = flags["context"] > 1, None
    if not carries:
        fault = "the run was trained on single utterances (--context 1): nothing is carried"
        if args.state:
            raise UserError(f"--state {args.state}: {fault}: remove it")
        say(f"note: {fault}")
    if args.state:
        key = digest(weights_digest(model.state_dict()), dataclasses.asdict(model.config))
        state = read_state(Path(args.state), key, device)
    model.to(device)
    print(",".join(["utt_id", "path", "seconds", *predicted(model.config.targets)]), flush=True)
    microseconds, skipped = [], 0
    for path in listed(args.audio or ["-"]):
        rows = pd.DataFrame()
        if not path:  # a dialogue ends
            state = None
        else:
            with tempfile.TemporaryDirectory(prefix="vatune-") as cache_dir:
                corpus, pack = decode(read_files([path]), cache_dir)
                if not corpus.utterances:
                    skipped += 1
                    continue
                with torch.no_grad(), evaluated_as(flags, device):
                    dataset = build_inputs(corpus, pack, cache_dir, args, model, flags)
                    turns = encode(dataset, model)  # (K, U), K = 1 unless it is a folder
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    preds, after = model.track(turns.unsqueeze(0 if carries else 1), state)
                    preds = (low + (high - low) * preds.float().flatten(0, 1)).cpu()
                    microseconds.append(1e6 * (time.perf_counter() - start) / len(preds))
            state = after if carries else None
            rows = table_of(corpus, preds.unsqueeze(0), model.config.targets, windows=False)
            rows = rows.drop(columns=["dialog", "speaker"])
            rows["seconds"] = rows["seconds"].map("{:.3f}".format)
        if args.state:
            save_checkpoint(Path(args.state), {"checkpoint": key, "state": state})
        text = rows.to_csv(index=False, header=False, float_format="%.6f")
        print(text.encode(errors="backslashreplace").decode(), end="", flush=True)
    cost = f"{statistics.median(microseconds):.0f}" if microseconds else "-"
    say(
        f"{len(microseconds)} given, {skipped} skipped, {in_words(model.config.targets)} in {low:g}"
        f"..{high:g} | beyond the encoder {cost} us per utterance (median)"
    )
    return 1 if skipped and not microseconds else 0


def read_state(path: Path, key: str, device: torch.device) -> dict | None:
    """What EmotionModel.track returned when the state was saved; None if a dialogue begins.

    UserError if it is not a state, or that of a checkpoint with another key.
    """
    if not path.exists():
        return None
    content = read_checkpoint(path, device)
    if content.get("checkpoint") != key:
        fault = "not a state of predict.py, or one of another checkpoint"
        raise UserError(f"--state {path}: {fault}: give another file, or delete it")
    return content["state"]


# ---------------------------------------------------------------------------------------------
# Export


def export(path: str, directory: Path) -> None:
    """Writes config.json and model.safetensors, which load_model reads, README.md (a model card)
    and, of a WavLM, wavlm/ for transformers' WavLMModel and train.py --wavlm.

    Updates of --lora are merged: what is exported is a model without them. The directory appears
    when it is complete. UserError if it exists.
    """
    model, checkpoint = load_model(path, "--checkpoint")
    if "name" not in checkpoint["args"]:
        raise UserError(f"--checkpoint {path} is an export already: give a run directory")
    if model.config.lora:
        merge_lora(model.encoder.wavlm)
        model.config = dataclasses.replace(model.config, lora=0, lora_alpha=0.0)
        checkpoint["args"] |= {"lora": 0, "lora_alpha": 0.0}
    if directory.exists():
        raise UserError(f"--export {directory} exists: delete it, or give another")
    run = Path(path) if Path(path).is_dir() else Path(path).parent
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    content = {"targets": model.config.targets, "config": dataclasses.asdict(model.config)}
    flags = {k: v for k, v in checkpoint["args"].items() if k in MODEL_FLAGS | {"amp", "tf32"}}
    content |= {"label_range": checkpoint["label_range"], "args": flags}
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        replace_text(aside / "config.json", json.dumps(content, indent=1) + "\n")
        replace_text(aside / "README.md", model_card(run, checkpoint, model.config.targets))
        if model.config.encoder == "wavlm":
            save_wavlm(model.encoder.wavlm, aside / "wavlm")
        os.rename(aside, directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--export {directory}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


CARD = """\
# {name}

Predicts {targets} (in this order) of an utterance of speech, on the labels' scale {low:g} to
{high:g}, from its first {max_seconds:g} s{vectors}. Trained with vatune (commit {commit}) on
{data}, encoder {encoder}, prosody {prosody}{origin}.

{scores}

Use: `python predict.py --checkpoint THIS_DIRECTORY a.wav --out out.csv`. If there is a `wavlm/`, it
is the encoder alone, for `transformers.WavLMModel.from_pretrained` and `train.py --wavlm`. A run
whose --layers leave out the top one has trained its `hidden_states[-1]`, not `last_hidden_state`.

Research only, and not for decisions about people: speech unlike that of the corpus is untested, and
eGeMAPS, if used, comes from opensmile, which is free for research only.
"""


def model_card(run: Path, checkpoint: dict, targets: Sequence[str]) -> str:
    """README.md of an export: figures from the run's result.json, or that there is none."""
    flags, result = checkpoint["args"], read_json(run / "result.json")
    scores = "There is no result.json: the run was not evaluated on test."
    if result:
        scores = f"Scores of fold {result['fold']} of {result['num_folds']}:\n"
        for split in ("dev", *(name for name in TESTS if name in result)):  # dev chose the epoch
            found = {target: result[split][f"ccc_{target}"] for target in targets}
            cccs = [f"CCC {t} {ccc:.3f}" for t, ccc in found.items() if ccc is not None]
            scores += f"\n- {split}, {result['splits'][split]} utterances: {', '.join(cccs)}"
    origin = vectors = ""
    if flags["init_from"]:
        origin = f", starting from {Path(flags['init_from']).name}"
    if flags["train_only"]:
        origin += "; only FiLM was trained: if on one speaker, for that speaker alone"
    widths = checkpoint["config"].get("vector_dims", ())
    if widths:
        vectors = f" and vectors of widths {', '.join(map(str, widths))} (`--vectors DIR` for each)"
    low, high = checkpoint["label_range"]
    values = {"low": low, "high": high, "scores": scores, "origin": origin, "vectors": vectors}
    values |= {"commit": result.get("git_commit", "unknown"), "targets": in_words(targets)}
    return CARD.format(**(flags | values | {"data": Path(flags["data"]).name}))


# ---------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Predicts, streams or exports; the exit code. UserError carries a message for the user."""
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    device = torch.device("cuda" if cuda else "cpu")
    if args.export:
        export(args.checkpoint[0], Path(args.export))
        return 0
    return stream(args, device) if args.stream else predict(args, device)


if __name__ == "__main__":
    sys.exit(run_script("predict.py", lambda: main(parse_args())))
