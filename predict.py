"""Valence and arousal of recordings, in the label's own scale, from trained checkpoints.

    python predict.py --checkpoint runs/demo/fold1 a.wav b.flac recordings/ --out out.csv
    python predict.py --checkpoint runs/x/fold1 --checkpoint runs/x/fold2 --data m.csv --out out.csv

Files, folders of files, or a CSV manifest (utt_id, path, and start, end, dialog, speaker if it has
them; labels are not needed). Several checkpoints give the mean and, over them, the standard
deviation. A run that was trained on dialogues (--context above 1) tracks the turns of a manifest's
dialogue in order; a file alone is a dialogue of one turn. Nothing is cached: audio is decoded into
a temporary folder. A file that cannot be decoded is named on stderr and left out.

Not here: training; streaming turn by turn is EmotionModel.track, which takes and gives the state.
"""

import argparse
import csv
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

import data as vadata
from model import TARGETS, EmotionModel, ModelConfig, encode_rows, track_dialogues

WAVLM = "encoder.wavlm."  # where WavLM's weights are in an EmotionModel
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    p.add_argument("audio", nargs="*", help="audio files, or folders that are searched for them")
    p.add_argument("--checkpoint", action="append", required=True,
                   help="run directory or best.pt; may be given several times")
    p.add_argument("--data", help="CSV manifest instead of files")
    p.add_argument("--data_dir", help="root of the manifest's paths; default: its folder")
    p.add_argument("--out", required=True, help="CSV to write")
    p.add_argument("--features_dir", help="<utt_id>.npy, for a feature Transformer")
    p.add_argument("--speaker", help="as in train.py; default: what the run was trained with")
    p.add_argument("--max_seconds", type=float, help="use the beginning only; default: the run's")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                   help="auto: cuda if present")
    # fmt: on
    args = p.parse_args(argv)
    if bool(args.audio) == bool(args.data):
        p.error("give either audio files and folders, or --data CSV")
    return args


def sha256(file: BinaryIO, size: int) -> bytes:
    """32 bytes over the first `size` of the file, which is then at `size`."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def read_checkpoint(path: Path) -> dict:
    """What train.py saved, unpickled (tensors and plain values) after its hash was verified.

    DataError names a file that is missing, damaged or not of train.py.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size - 32  # the hash, see train.save_checkpoint
            if size <= 0 or sha256(file, size) != file.read(32):
                fault = f"{path}: damaged, or not a best.pt, last.pt or frozen.pt of train.py"
                raise vadata.DataError(fault)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except vadata.DataError:
        raise
    except OSError as error:
        raise vadata.DataError(f"{path}: {error.strerror.lower()}") from None
    except Exception as error:  # weights_only refuses more than tensors and plain values
        fault = f"{path}: not a checkpoint of train.py ({type(error).__name__})"
        raise vadata.DataError(fault) from None


def load_weights(model: EmotionModel, weights: dict[str, Tensor], directory: Path) -> None:
    """Fills the model; a WavLM that did not train is in the directory's frozen.pt."""
    if model.config.encoder == "wavlm" and not any(name.startswith(WAVLM) for name in weights):
        weights = weights | read_checkpoint(directory / "frozen.pt")["model"]
    model.load_state_dict(weights)


def load_model(path: str | Path, flag: str) -> tuple[EmotionModel, dict]:
    """(model in eval mode, the checkpoint's dict) of a run directory or a best.pt.

    DataError names `flag` and the file when it is missing or not ours.
    """
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    try:
        checkpoint = read_checkpoint(path)
        model = EmotionModel(ModelConfig(**checkpoint["config"]))
        load_weights(model, checkpoint["model"], path.parent)
    except vadata.DataError as error:
        raise vadata.DataError(f"{flag} {error} (give a run directory)") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        raise vadata.DataError(f"{flag} {path}: not a best.pt of train.py ({reason})") from None
    return model.eval(), checkpoint


def corpus_of_files(paths: list[str]) -> vadata.Corpus:
    """An unlabelled corpus of audio files; folders are searched for what soundfile reads."""
    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()}
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix.lower() in suffixes | {".mp3"})
            files += sorted(p for p in found if p.is_file() and p.name[0] != ".")
        elif path.is_file():
            files.append(path)
        else:
            raise vadata.DataError(f"{path}: no such file or folder")
    if not files:
        raise vadata.DataError(f"no audio files in {' '.join(paths)}")
    nan = float("nan")
    utterances = [vadata.Utterance(str(p), p, nan, nan, dialog=str(p)) for p in files]
    return vadata.Corpus("files", Path("."), (0.0, 1.0), utterances)


def predict(
    model: EmotionModel,
    dataset: vadata.Batches,
    dialogs: list[str],
    amp: str,
    device: torch.device,
) -> Tensor:
    """preds (N, 2) in [0, 1] of the whole dataset, batched as train.py's evaluation is."""
    rows = np.arange(len(dialogs))
    plan = vadata.eval_plan(dataset.lengths, rows, 0, 1, vadata.EVAL_SECONDS * dataset.rate)

    def batches() -> Iterator[dict]:
        for spec in tqdm(plan, unit="batch", disable=not sys.stderr.isatty()):
            batch = dataset[spec]
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    model.to(device)
    with torch.autocast(device.type, AUTOCAST[amp], enabled=amp != "off"):
        return track_dialogues(model, encode_rows(model, batches(), rows.tolist()), dialogs)


def main(args: argparse.Namespace) -> None:
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    if args.data:
        root = Path(args.data_dir) if args.data_dir else None
        corpus = vadata.read_csv(Path(args.data), root, None, labelled=False)
    else:
        corpus = corpus_of_files(args.audio)
    preds = []  # per checkpoint (N, 2), in the label's own scale
    with tempfile.TemporaryDirectory(prefix="vatune-") as cache_dir:
        corpus, pack = vadata.load_audio(corpus, cache_dir, most_bad=1.0)
        for what, why in corpus.skipped:
            print(f"skipped {what}: {why}", file=sys.stderr)
        if not corpus.utterances:
            raise vadata.DataError("no audio file could be decoded")
        ranges = set()
        for path in args.checkpoint:
            model, checkpoint = load_model(path, "--checkpoint")
            flags, config = checkpoint["args"], model.config
            low, high = checkpoint["label_range"]
            ranges.add((low, high))
            features = prosody = speaker = None
            if config.encoder.endswith("transformer"):
                if not args.features_dir:
                    raise vadata.DataError(f"{path} reads feature files: give --features_dir DIR")
                features = vadata.FrameFeatures(corpus, args.features_dir)
            if config.prosody_dim:
                prosody = vadata.egemaps(corpus, pack, cache_dir)
            if config.speaker_dim:
                kind = args.speaker or flags["speaker"]
                speaker = vadata.speaker_embeddings(corpus, pack, kind, cache_dir, str(device))
            dataset = vadata.Batches(
                labels=np.zeros((len(corpus.utterances), len(TARGETS)), dtype=np.float32),
                pack=None if features else pack,
                features=features,
                prosody=prosody,
                speaker=speaker,
                max_seconds=args.max_seconds or flags["max_seconds"],
                augment=False,
                seed=0,
            )
            dialogs = [u.dialog if flags["context"] > 1 else u.utt_id for u in corpus.utterances]
            amp = flags["amp"] if cuda or flags["amp"] == "bf16" else "off"
            scaled = low + predict(model, dataset, dialogs, amp, device) * (high - low)
            preds.append(scaled)
        if len(ranges) > 1:
            raise vadata.DataError(
                f"--checkpoint: the runs differ in label range: {sorted(ranges)}"
            )
    write_csv(Path(args.out), corpus, torch.stack(preds))
    print(f"{len(corpus.utterances)} utterances, {len(corpus.skipped)} skipped: {args.out}")


def write_csv(path: Path, corpus: vadata.Corpus, preds: Tensor) -> None:
    """utt_id, dialog, speaker, seconds and the mean over checkpoints of preds (M, N, 2), with
    its standard deviation where M > 1."""
    header = ["utt_id", "dialog", "speaker", "seconds", *(f"pred_{t}" for t in TARGETS)]
    columns = [preds.mean(0)]
    if len(preds) > 1:
        header += [f"std_{t}" for t in TARGETS]
        columns.append(preds.std(0))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row, values in enumerate(torch.cat(columns, dim=1).tolist()):
            u = corpus.utterances[row]
            about = [u.utt_id, u.dialog, u.speaker, f"{corpus.seconds[row]:.3f}"]
            writer.writerow([*about, *(f"{value:.6f}" for value in values)])


if __name__ == "__main__":
    try:
        main(parse_args())
    except vadata.DataError as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        sys.exit(2)
