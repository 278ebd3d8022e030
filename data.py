"""Where a batch comes from: audio, its caches, features, batches.

    python data.py --data demo                                    # synthesise, inspect (seconds)
    python data.py --data my.csv --label_range 1 7                # your own manifest
    python data.py --data iemocap --data_dir IEMOCAP_full_release
    python data.py --data msp_podcast --data_dir MSP-PODCAST

Data flow: corpora.read_corpus -> load_audio -> corpora.make_splits -> Batches + TrainPlan
/ eval_plan. Caches are in --cache_dir, each under a key of what it was made from, so none is ever
stale. What happens to each kind of odd input is one table: tests/test_input_faults.py.
Not done here: voice activity detection, downloading of corpora. Features of images: faces.py, of
transcripts: text.py.

Reference: eGeMAPS (Eyben et al. 2016).
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import soxr
import torch
from torch.nn.utils.rnn import pad_sequence

import corpora
from corpora import Corpus, make_splits, read_corpus
from model import ModelConfig
from util import files
from util.audio import (
    MIN_SAMPLES,
    NO_DECODER,
    SAMPLE_RATE,
    VERSION,
    decode,
    foreign_decoder,
    header_seconds,
)
from util.files import UserError, digest
from util.intervals import human_ceiling

log = logging.getLogger("vatune")

FRAME_RATE = 50  # frames per second of feature files that are planned for without their audio
GROUP_SECONDS = 2.0  # of audio, which one more pass of an encoder costs in itself [guess]
BALANCE_BINS = 5  # per target, over the range of its labels [guess]
EVAL_SECONDS = 64  # padded seconds per evaluation batch; fixed, so that results do not move
PREFETCH = 4  # micro-batches that a loader process holds ready [guess]
CORES = len(os.sched_getaffinity(0))


# ---------------------------------------------------------------------------------------------
# Rows of different length in one memory map


class PackedRows:
    """Arrays of different length, one after the other in a memory map that all processes share.

    Row i is (lengths[i], *shape) of `dtype`: int16 audio (L,), which is read as float32 in [-1, 1],
    or hidden states. `key` names the content. A directory may hold several, by `name`.
    """

    def __init__(self, directory: Path, name: str = "values") -> None:
        index = json.loads((directory / f"{name}.json").read_text())
        self.file, self.key = directory / f"{name}.bin", directory.name
        self.dtype, self.shape = np.dtype(index["dtype"]), tuple(index["shape"])
        self.lengths = np.array(index["lengths"], dtype=np.int64)  # (N,)
        self.offsets = np.cumsum(self.lengths) - self.lengths  # (N,) along the first axis
        self._values: np.ndarray | None = None  # opened in the process that reads

    @staticmethod
    def write(directory: Path, rows: Iterable[np.ndarray], name: str = "values") -> None:
        lengths, values = [], np.zeros(0)
        with open(directory / f"{name}.bin", "wb") as file:
            for values in rows:
                file.write(values.tobytes())
                lengths.append(len(values))
        index = {"dtype": values.dtype.str, "shape": values.shape[1:], "lengths": lengths}
        (directory / f"{name}.json").write_text(json.dumps(index))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_values": None}  # a pickled memory map would carry its content

    def part(self, rows: Sequence[int]) -> "PackedRows":
        """The same memory map with only these rows, in this order."""
        part = copy.copy(self)
        part.offsets, part.lengths = self.offsets[rows], self.lengths[rows]
        return part

    def read(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy of start..stop of the row."""
        if self._values is None:
            flat = np.memmap(self.file, dtype=self.dtype, mode="r")
            self._values = flat.reshape(-1, *self.shape)
        length, offset = int(self.lengths[row]), int(self.offsets[row])
        stop = length if stop is None else min(stop, length)
        values = self._values[offset + start : offset + stop]
        if self.dtype == np.int16:
            return values.astype(np.float32) / 32768
        return np.array(values)


def announce_cache(directory: Path, num_bytes: int, what: str, fix: str = "") -> None:
    """Logs the size of a cache before it is filled. UserError if it does not fit the disk."""
    disk = directory.absolute()
    while not disk.exists():
        disk = disk.parent
    free = shutil.disk_usage(disk).free
    if num_bytes > free:
        need = f"{what} would need {files.gib(num_bytes)} in {directory.parent}"
        fix = f"free disk space there, or set another --cache_dir{fix}"
        raise UserError(f"{need}, where {files.gib(free)} are free: {fix}")
    log.info(f"{what}: writing {files.gib(num_bytes)} to {directory}")


def identity(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file; (-1, -1) if it cannot be looked at."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def load_audio(
    corpus: Corpus, cache_dir: str | Path, max_skipped: float = corpora.MAX_SKIPPED
) -> tuple[Corpus, PackedRows]:
    """(corpus without the rows that have no usable audio, decoded audio of the same rows).

    Rows lost are named in corpus.skipped; UserError if these, with those that the reader of the
    corpus left out before, are a larger share than `max_skipped`.
    """
    utterances = corpus.utterances
    clips = [(u.path, u.start, u.end) for u in utterances]
    sources = [(str(path), *identity(path), *times) for path, *times in clips]
    versions = (VERSION, SAMPLE_RATE, soxr.__version__, soundfile.__libsndfile_version__)
    directory = Path(cache_dir) / f"audio-{digest(versions, sources)}"

    def fill(aside: Path) -> None:
        bad, changes, digests = {}, Counter[str](), []

        def rows() -> Iterator[np.ndarray]:
            for first in files.progress_bar(range(0, len(clips), 64), len(clips) // 64, "audio"):
                block = zip(*clips[first : first + 64])  # bounds what waits in memory
                for row, (samples, reason, changed) in enumerate(pool.map(decode, *block), first):
                    if reason:
                        bad[row] = reason
                    changes.update(changed)
                    digests.append(files.array_digest(samples))
                    yield samples

        with ThreadPoolExecutor(CORES) as pool:
            seconds = sum(pool.map(header_seconds, *zip(*clips)))
            announce_cache(directory, 2 * round(SAMPLE_RATE * seconds), "decoded audio")
            PackedRows.write(aside, rows())
        decoding = {"bad": bad, "changes": changes, "digests": digests}
        (aside / "decoding.json").write_text(json.dumps(decoding))

    decoding = json.loads((files.build_cache(directory, fill) / "decoding.json").read_text())
    lacking = any(reason.startswith(NO_DECODER) for reason in decoding["bad"].values())
    if lacking and foreign_decoder():  # it was installed after that cache was built
        directory = Path(cache_dir) / f"audio-{digest(versions, sources, foreign_decoder())}"
        decoding = json.loads((files.build_cache(directory, fill) / "decoding.json").read_text())
    bad = {int(row): reason for row, reason in decoding["bad"].items()}
    good = [row for row in range(len(utterances)) if row not in bad]
    pack = PackedRows(directory).part(good)
    notes = [f"audio {what}: {count} utterances" for what, count in decoding["changes"].items()]
    corpus = dataclasses.replace(
        corpus,
        utterances=[utterances[row] for row in good],
        skipped=list(corpus.skipped),
        notes=corpus.notes + notes,
        seconds=pack.lengths / SAMPLE_RATE,
        audio=[decoding["digests"][row] for row in good],
    )
    for row, reason in bad.items():
        corpus.skip(utterances[row].utt_id, utterances[row].path, reason)
    corpora.check_skipped(corpus, max_skipped)
    return corpus, pack


# ---------------------------------------------------------------------------------------------
# eGeMAPS and speaker embeddings


def egemaps_of(pack: PackedRows) -> np.ndarray:
    """(N, 88) float32 of a (part of a) pack, in this thread."""
    import opensmile  # free for research only

    try:
        smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    except Exception as error:  # a library of opensmile that does not load here
        fault = f"{files.described('opensmile', error)}: reinstall opensmile"
        raise UserError(f"--prosody egemaps: {fault}, or --prosody none") from None
    clips = (pack.read(row) for row in range(len(pack.lengths)))
    rows = [smile.process_signal(clip, SAMPLE_RATE).to_numpy()[0] for clip in clips]
    return np.array(rows, dtype=np.float32)


def egemaps(pack: PackedRows, cache_dir: str | Path) -> np.ndarray:
    """(N, 88) float32 eGeMAPSv02 functionals, NaN if opensmile leaves one undefined."""
    flag, otherwise = "--prosody egemaps", ", or --prosody none"
    opensmile = files.optional_module("opensmile", "opensmile", flag, otherwise)

    def build() -> np.ndarray:
        count = len(pack.lengths)
        parts = [pack.part(range(i, min(i + 16, count))) for i in range(0, count, 16)]
        pool = ThreadPoolExecutor(CORES)  # opensmile computes without Python's lock
        try:
            done = files.progress_bar(pool.map(egemaps_of, parts), len(parts), "eGeMAPS")
            return np.concatenate(list(done))
        finally:
            pool.shutdown(cancel_futures=True)

    key = digest(pack.key, opensmile.__version__, "eGeMAPSv02")
    return files.cached_array(Path(cache_dir) / f"egemaps-{key}", build)


def speaker_embeddings(
    corpus: Corpus, pack: PackedRows, kind: str, cache_dir: str | Path, device: str = "cpu"
) -> np.ndarray:
    """(N, S) float32, L2-normalised, each from one utterance alone.

    `kind`: ecapa, xvector, a local x-vector model directory, or a directory of <utt_id>.npy (S,).
    """
    if kind not in ("ecapa", "xvector") and not Path(kind).is_dir():
        raise UserError(f"--speaker {kind}: not ecapa, xvector, none or a directory")
    if holds_vectors(kind):
        vectors = utterance_vectors(corpus, kind, cache_dir, "--speaker")
    else:
        embed, weights = speaker_model(kind, cache_dir, device)

        def build() -> np.ndarray:
            rows = files.progress_bar(range(len(pack.lengths)), len(pack.lengths), "speakers")
            clips = (pack.read(row) for row in rows)
            # below a second, statistics over frames are noise or undefined: repeat the clip
            clips = (np.tile(clip, math.ceil(SAMPLE_RATE / len(clip))) for clip in clips)
            with torch.inference_mode():
                return np.stack([embed(clip).float().cpu().numpy() for clip in clips])

        directory = Path(cache_dir) / f"speaker-{digest(pack.key, weights)}"
        vectors = files.cached_array(directory, build)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    broken = np.flatnonzero(~(norms[:, 0] > 0) | np.isinf(norms[:, 0]))
    if len(broken):
        fault = f"{len(broken)} embeddings are zero or not finite"
        utt_id = corpus.utterances[broken[0]].utt_id
        raise UserError(f"--speaker {kind}: {fault}, the first is that of {utt_id}")
    return vectors / norms


def holds_vectors(kind: str) -> bool:
    """Is --speaker a directory of vectors, and not one of a model?"""
    return Path(kind).is_dir() and not (Path(kind) / "config.json").exists()


def speaker_model(
    kind: str, cache_dir: str | Path, device: str
) -> tuple[Callable[[np.ndarray], torch.Tensor], str]:
    """(waveform (L,) -> embedding (S,), digest of its weights) of a model for --speaker."""
    flag, otherwise = f"--speaker {kind}", ", or give a directory of <utt_id>.npy"
    hub = {"ecapa": "speechbrain/spkrec-ecapa-voxceleb", "xvector": "microsoft/wavlm-base-plus-sv"}
    source, package = hub.get(kind, kind), "speechbrain" if kind == "ecapa" else "transformers"
    if kind == "ecapa" or importlib.util.find_spec("torchaudio"):  # both import it
        files.optional_module("torchaudio", "torchaudio", flag, otherwise)
    try:
        if kind == "ecapa":
            return ecapa(source, Path(cache_dir) / "ecapa", device)
        return xvector(source, kind == "xvector" and not hub_answers(source, "config.json"), device)
    except Exception as error:  # of the packages, the hub, the files: no common base class
        fault = f"cannot load {source} ({files.described(package, error)})"
        mirror = "load it once where there is a network (or set HF_ENDPOINT to a mirror)"
        raise UserError(f"{flag}: {fault}: {mirror}, reinstall {package}{otherwise}") from None


def hub_answers(name: str, file: str) -> bool:
    """Has the hub the file, and says so within seconds? Its own client tries for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=5)
    except Exception:  # errors of the hub and of the network have no common base class
        return False
    return True


def xvector(
    source: str, local_files_only: bool, device: str
) -> tuple[Callable[[np.ndarray], torch.Tensor], str]:
    """speaker_model's result for an x-vector model of transformers."""
    import transformers

    options = {"trust_remote_code": False, "local_files_only": local_files_only}
    extractor = transformers.AutoFeatureExtractor.from_pretrained(source, **options)
    model = transformers.AutoModelForAudioXVector.from_pretrained(source, **options)
    model.to(device).eval()

    def embed(clip: np.ndarray) -> torch.Tensor:
        inputs = extractor(clip, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return model(inputs.input_values.to(device)).embeddings[0]

    return embed, files.weights_digest(model.state_dict()) + extractor.to_json_string()


def ecapa(
    source: str, folder: Path, device: str
) -> tuple[Callable[[np.ndarray], torch.Tensor], str]:
    """The same of speechbrain's ECAPA-TDNN (192-d). Never run by us: it needs torchaudio."""
    from speechbrain.inference.speaker import EncoderClassifier

    if not (folder / "hyperparams.yaml").exists() and not hub_answers(source, "hyperparams.yaml"):
        raise ConnectionError(f"it is not in {folder}, and the hub does not answer")
    options = {"savedir": str(folder), "run_opts": {"device": device}}
    model = EncoderClassifier.from_hparams(source, **options)

    def embed(clip: np.ndarray) -> torch.Tensor:
        return model.encode_batch(torch.from_numpy(clip).to(device)[None])[0, 0]

    return embed, files.weights_digest(model.state_dict())


# ---------------------------------------------------------------------------------------------
# Frozen features: vectors of utterances, and of their frames

MAKERS = {  # of the files of a flag
    "--features_dir": "; faces.py makes such files from images",
    "--vectors": "; text.py makes such files from transcripts",
    "--speaker": "",
}


def npy_files(corpus: Corpus, directory: str | Path, flag: str) -> list[Path]:
    """<directory>/<utt_id>.npy of every row; UserError names how many are missing."""
    if not Path(directory).is_dir():
        raise UserError(f"{flag} {directory}: no such directory{MAKERS[flag]}")
    owners: dict[str, Path] = {}
    for u in corpus.utterances:
        if owners.setdefault(u.utt_id, u.path) != u.path:
            both = f"{owners[u.utt_id]} and {u.path}"
            fix = "rename one, or give a manifest with other utt_ids"
            raise UserError(f"{flag}: {u.utt_id}.npy could belong to {both}: {fix}")
    paths = [Path(directory) / f"{u.utt_id}.npy" for u in corpus.utterances]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        lacking = f"{len(missing)} of {len(paths)} missing ({', '.join(missing[:3])})"
        raise UserError(f"{flag} {directory}: {lacking}{MAKERS[flag]}")
    return paths


def open_npy(path: Path, ndim: int, width: int | None) -> np.ndarray:
    """Memory-mapped array of `ndim` dimensions, the last one `width` (None: any)."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would open an .npz, too
    except Exception as error:  # whatever tokenize, ast and mmap raise on a damaged header
        raise UserError(f"{path}: not a plain .npy array ({error})") from None
    if array.ndim != ndim or array.dtype.kind not in "fiu" or 0 in array.shape:
        wanted = "(T, D)" if ndim == 2 else "(D,)"
        found = f"{array.dtype} {array.shape}"
        raise UserError(f"{path}: {found}, expected numbers {wanted}, not empty")
    if width not in (None, array.shape[-1]):
        raise UserError(f"{path}: width {array.shape[-1]}, but the first file has {width}")
    return array


def finite(path: Path, array: np.ndarray) -> np.ndarray:
    """A copy as float32. UserError on NaN, infinity, or what is beyond float32."""
    with np.errstate(over="ignore"):
        values = np.array(array, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds NaN or infinite values")
    return values


def utterance_vectors(
    corpus: Corpus, directory: str, cache_dir: str | Path, flag: str = "--vectors"
) -> np.ndarray:
    """(N, D) float32, finite, of a directory of <utt_id>.npy (D,)."""
    paths = npy_files(corpus, directory, flag)

    def build() -> np.ndarray:
        width = open_npy(paths[0], 1, None).shape[0]
        return np.stack([finite(path, open_npy(path, 1, width)) for path in paths])

    key = digest(str(Path(directory).resolve()), [(p.name, *identity(p)) for p in paths])
    return files.cached_array(Path(cache_dir) / f"vectors-{key}", build)


def all_vectors(
    corpus: Corpus, directories: Sequence[str], cache_dir: str | Path
) -> tuple[np.ndarray | None, tuple[int, ...]]:
    """((N, V) those of every --vectors DIR side by side, the width of each); None of none."""
    vectors = [utterance_vectors(corpus, directory, cache_dir) for directory in directories]
    widths = tuple(of_directory.shape[1] for of_directory in vectors)
    return np.hstack(vectors) if vectors else None, widths


class FrameFeatures:
    """Frozen features, one <utt_id>.npy (T, D) per utterance. `dim` = D, `lengths` (N,) frames.

    `rate`: frames per second, by default the median over the corpus of frames / seconds of audio.
    """

    def __init__(self, corpus: Corpus, features_dir: str | Path, rate: float | None = None) -> None:
        paths = npy_files(corpus, features_dir, "--features_dir")
        self.directory = Path(features_dir)
        self.names = np.array([path.name.encode() for path in paths])  # no objects for workers
        self.dim = open_npy(paths[0], 2, None).shape[1]
        lengths, digests = [], []
        for path in paths:
            array = open_npy(path, 2, self.dim)
            lengths.append(len(array))
            digests.append(files.array_digest(array))
        self.lengths, self.digests = np.array(lengths, dtype=np.int64), np.array(digests, "S16")
        self.rates = self.lengths / corpus.seconds
        self.rate = rate or float(f"{np.median(self.rates):.3g}")

    def describe(self) -> str:
        """Their rate, and whether it is that of most utterances, for the log."""
        text = f"features: {self.rate:g} frames per second"
        slack = 0.1 * self.rate + 2 * self.rates / self.lengths  # two frames more or less
        if np.mean(np.abs(self.rates - self.rate) > slack) > 0.05:
            low, high = np.percentile(self.rates, [5, 95])
            text += f", but {low:.3g} to {high:.3g} of most files: do they belong to this audio?"
        return text

    def read(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(T, D) float32. UserError if a value is not finite (found only here: needs all bytes)."""
        path = self.directory / self.names[row].decode()
        return finite(path, open_npy(path, 2, self.dim)[start:stop])


# ---------------------------------------------------------------------------------------------
# What the frozen part of WavLM makes of every utterance

FROZEN_VERSION = 3  # raise it with every change of what the model prepares: part of the cache key
PART_SECONDS = 600  # audio in one part of the cache, the most that a kill loses [guess]


class FrozenStates:
    """Results of EmotionModel.encode_frozen for every row of the corpus, on disk in parts.

    read(row): {"stream": (T, D), "hidden": (n, D) or (T, n, D)}, each if there is one, in the
    dtype of the cache; uint16 holds the bits of bfloat16.
    """

    def __init__(self, parts: list[tuple[Path, np.ndarray]]) -> None:
        self.parts = []
        count = sum(len(rows) for _, rows in parts)
        self.place = np.zeros((count, 2), dtype=np.int64)  # (N, 2): part, row in it
        for i, (directory, rows) in enumerate(parts):
            names = sorted(path.stem for path in directory.glob("*.bin"))
            self.parts.append({name: PackedRows(directory, name) for name in names})
            self.place[rows, 0], self.place[rows, 1] = i, np.arange(len(rows))
        self.has_frames = "stream" in self.parts[0] or len(self.parts[0]["hidden"].shape) == 2

    def read(self, row: int) -> dict[str, np.ndarray]:
        part, place = self.place[row].tolist()
        return {name: pack.read(place) for name, pack in self.parts[part].items()}


def frozen_states(
    key: str,
    cache_dir: str | Path,
    lengths: np.ndarray,
    num_bytes: np.ndarray,
    compute: Callable[[np.ndarray], dict[str, list[np.ndarray]]],
) -> FrozenStates:
    """The states of all rows from the cache; parts that are missing are computed first.

    All processes that need the cache, ranks and folds, fill it together: each takes the next part
    that no other is filling. A part is kept if the run is stopped. lengths (N,): samples; num_bytes
    (N,): size of a row's states; `compute`: {name: states of these rows, in their order}.
    The missing size is logged; UserError if the disk has no room for it.
    """
    directory = Path(cache_dir) / f"hidden-{key}-{PART_SECONDS}"  # which rows make a part
    order = np.argsort(-lengths, kind="stable")
    place = np.cumsum(lengths[order]) // (PART_SECONDS * SAMPLE_RATE)
    parts = [
        (directory / f"part-{i:04d}", order[place == number])
        for i, number in enumerate(np.unique(place))
    ]
    missing = [(target, rows) for target, rows in parts if not target.exists()]
    if missing:
        size = sum(int(num_bytes[rows].sum()) for _, rows in missing)
        fix = ", or give --feature_cache off"
        announce_cache(directory, size, "hidden states of the frozen part of WavLM", fix)
    for wait in (False, True):  # first what no other process is filling now
        for target, rows in files.progress_bar(parts, len(parts), "hidden states"):
            fill = functools.partial(write_states, rows, compute)
            files.build_cache(target, fill, wait)
    return FrozenStates(parts)


def write_states(rows: np.ndarray, compute: Callable, directory: Path) -> None:
    for name, states in compute(rows).items():
        PackedRows.write(directory, states, name)


# ---------------------------------------------------------------------------------------------
# Augmentation and batches


def augment_waveform(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(L,) -> (about L / speed,): speed, noise, gain and time masks, each with probability 1/2.

    Strengths [guess], mild enough to keep the emotion: speed moves pitch by at most 1.7 semitones.
    """
    use_speed, use_noise, use_gain, use_masks = rng.random(4) < 0.5
    if use_speed:
        audio = soxr.resample(audio, SAMPLE_RATE * rng.uniform(0.9, 1.1), SAMPLE_RATE, "MQ")
    if use_noise:
        noise = rng.standard_normal(len(audio), dtype=np.float32)
        if rng.random() < 0.5:  # pink: power falls with frequency
            spectrum = np.fft.rfft(noise)
            noise = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1), len(audio))
        snr = rng.uniform(10, 30)  # dB
        noise *= np.sqrt(np.mean(audio**2) / np.mean(noise**2)) * 10 ** (-snr / 20)
        audio = audio + noise
    if use_gain:
        audio = audio * 10 ** (rng.uniform(-6, 6) / 20)
    if use_masks:
        audio = audio.copy()
        for _ in range(2):
            width = int(rng.uniform(0, 0.1) * len(audio))
            start = rng.integers(0, len(audio) - width + 1)
            audio[start : start + width] = 0
    return np.clip(audio, -1, 1).astype(np.float32)


@dataclass(frozen=True)
class BatchSpec:
    """Which utterances form a batch: chunks of consecutive turns of one dialogue each."""

    chunks: tuple[tuple[int, ...], ...]  # rows of the corpus
    epoch: int = -1  # -1 = evaluation: no augmentation, no random window
    step_size: tuple[int, ...] = (0,)  # labels per target in the global batch that this is part of


@dataclass(eq=False)
class Batches(torch.utils.data.Dataset):
    """dataset[BatchSpec] -> batch, so that a DataLoader with batch_size=None takes a plan.

    `lengths` (N,): samples, or frames without a pack, after the cap of `max_seconds`; `rate`: how
    many of them are a second. Every draw is a function of (seed, epoch, row).
    """

    labels: np.ndarray
    pack: PackedRows | None
    features: FrameFeatures | None
    prosody: np.ndarray | None
    speaker: np.ndarray | None
    max_seconds: float
    augment: bool
    seed: int
    vectors: np.ndarray | None = None  # (N, D) those of all --vectors, side by side
    frozen: FrozenStates | None = None  # take the place of audio while they are set

    def __post_init__(self) -> None:
        if self.augment and self.pack is None:
            raise UserError("--augment works on waveforms, but this encoder reads --features_dir")
        source = self.features if self.pack is None else self.pack
        self.rate = SAMPLE_RATE if self.pack is not None else self.features.rate
        self.longest = max(1, int(self.max_seconds * self.rate))
        self.lengths = np.minimum(source.lengths, self.longest)
        self.num_cut = int((source.lengths > self.longest + 0.02 * self.rate).sum())

    def __getitem__(self, spec: BatchSpec) -> dict | UserError:
        """The batch, or in a loader process a UserError, which the parent raises.

        If it were raised there, torch would put a traceback into its message.
        """
        try:
            return self.collate(spec)
        except UserError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error

    def collate(self, spec: BatchSpec) -> dict:
        """All torch CPU tensors but the last five; turns of chunks are ordered by length:
        chunk_index (C, K) positions in the batch (-1 = padding),
        labels (B, E), input_values (B, L) and attention_mask (B, L) True = sample,
        frames (B, T, D) and frame_mask (B, T), stream and hidden as from EmotionModel.encode_frozen
        in the dtype of the cache,
        prosody (B, 88) raw with NaN, speaker (B, S), vectors (B, V) raw,
        rows (list, of the corpus), step_size (see BatchSpec), audio_seconds and padded_share
        (floats), and, if the turns of chunks mix lengths, groups [(start, stop, L)] of similar
        length, to be encoded apart.
        """
        rows = np.array([row for chunk in spec.chunks for row in chunk])
        width = max(len(chunk) for chunk in spec.chunks)
        order = np.arange(len(rows))
        if width > 1:
            order = np.argsort(-self.lengths[rows], kind="stable")
        chunk_index = np.full((len(spec.chunks), width), -1, dtype=np.int64)
        chunk_index[[[k < len(c) for k in range(width)] for c in spec.chunks]] = np.argsort(order)
        rows = rows[order].tolist()
        batch: dict = {
            "rows": rows,
            "chunk_index": torch.from_numpy(chunk_index),
            "labels": torch.from_numpy(self.labels[rows]),
            "step_size": spec.step_size,
            "audio_seconds": float(self.lengths[rows].sum()) / self.rate,
            "padded_share": 0.0,
        }
        real, rate = None, self.rate
        if self.frozen is not None:
            batch |= self._frozen_states(rows)
            real, rate = batch.get("frame_mask"), FRAME_RATE
        elif self.features is not None:
            frames = [self._window(self.features, row, spec.epoch)[0] for row in rows]
            batch["frames"], batch["frame_mask"] = pad(frames)
            real = batch["frame_mask"]
        else:
            audio = [self._waveform(row, spec.epoch) for row in rows]
            batch["input_values"], batch["attention_mask"] = pad(audio)
            real = batch["attention_mask"]
            batch["audio_seconds"] = float(real.sum()) / self.rate
        for name in ("prosody", "speaker", "vectors"):
            values = getattr(self, name)
            if values is not None:
                batch[name] = torch.from_numpy(values[rows])
        if real is not None:
            lengths, padded = real.sum(1).numpy(), real.numel()
            if width > 1 and ("stream" in batch or self.frozen is None):
                batch["groups"] = groups_of_like_length(lengths, GROUP_SECONDS * rate)
                padded = sum((stop - start) * longest for start, stop, longest in batch["groups"])
            batch["padded_share"] = 1.0 - float(lengths.sum()) / padded
        return batch

    def _frozen_states(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """stream, hidden and, if one of them has frames, frame_mask."""
        found, states = {}, [self.frozen.read(row) for row in rows]
        for name, first in states[0].items():
            values = [state[name] for state in states]
            if name == "stream" or first.ndim == 3:
                found[name], found["frame_mask"] = pad(values)
            else:
                found[name] = torch.from_numpy(np.stack(values))
            if first.dtype == np.uint16:
                found[name] = found[name].view(torch.bfloat16)
        return found

    def _window(
        self, source: PackedRows | FrameFeatures, row: int, epoch: int
    ) -> tuple[np.ndarray, np.random.Generator | None]:
        """At most max_seconds of the row, and the generator that goes on for augmentation.

        Training draws the place of the window (the same for audio and frames); evaluation takes
        the first.
        """
        rng = None if epoch < 0 else np.random.default_rng((self.seed, epoch, row))
        spare = max(0, int(source.lengths[row]) - self.longest)
        start = 0 if rng is None else int(rng.random() * (spare + 1))
        return source.read(row, start, start + self.longest), rng

    def _waveform(self, row: int, epoch: int) -> np.ndarray:
        audio, rng = self._window(self.pack, row, epoch)
        if self.augment and rng is not None:
            # slower speech is longer: keep the cap that memory was planned for
            audio = augment_waveform(audio, rng)[: max(MIN_SAMPLES, self.longest)]
        return np.pad(audio, (0, max(0, MIN_SAMPLES - len(audio))))


def pad(items: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrays (L_i, ...) -> zero-padded (B, L, ...) and a mask (B, L), True = real."""
    lengths = torch.tensor([len(item) for item in items])
    padded = pad_sequence([torch.from_numpy(item) for item in items], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def groups_of_like_length(lengths: np.ndarray, cost: float) -> list[tuple[int, int, float]]:
    """[(start, stop, longest)]: runs of lengths (B,), which are about in order, cut so that the
    padded total plus `cost` per run is smallest."""
    smallest, cuts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=int)
    for stop in range(1, len(lengths) + 1):
        longest = np.maximum.accumulate(lengths[:stop][::-1])[::-1]  # of a run from each start
        totals = smallest[:stop] + cost + np.arange(stop, 0, -1) * longest
        cuts[stop], smallest[stop] = totals.argmin(), totals.min()
    groups, stop = [], len(lengths)
    while stop:
        start = int(cuts[stop])
        groups.append((start, stop, lengths[start:stop].max().item()))
        stop = start
    return groups[::-1]


def label_bins(labels: np.ndarray) -> np.ndarray:
    """(n, K): the bin of each label, 0 to BALANCE_BINS - 1, and BALANCE_BINS if it is missing."""
    bins = np.clip(np.floor(labels * BALANCE_BINS), 0, BALANCE_BINS - 1)
    return np.where(np.isnan(labels), BALANCE_BINS, bins).astype(np.int64)


def balanced_draws(labels: np.ndarray, balance: float) -> np.ndarray:
    """(n,): how often each row of `labels` (n, K) is drawn in an epoch of n draws, on average.

    The targets span one grid. A row is drawn in proportion to (rows in its cell) ** -balance, so
    that each cell in use is drawn alike at 1, and each row at 0.
    """
    _, cell, counts = np.unique(label_bins(labels), axis=0, return_inverse=True, return_counts=True)
    weights = counts[cell.ravel()] ** -float(balance)
    return len(labels) * weights / weights.sum()


class TrainPlan:
    """The batches of an epoch for one rank: gradient_accumulation_steps specs per step.

    Global batches are formed first, from (seed, epoch, lengths, global size) alone, and only then
    dealt out: a step sees the same utterances however they are split over ranks and micro-steps.
    A global batch holds utterances of similar length; its micro-batches, sorted by length, go to
    the ranks in turn, so that ranks have equal work within a micro-step. Every epoch has
    `steps_per_epoch` steps. With --balance, some chunks are in it several times, others not.
    """

    # Sorting by length saves padding (IEMOCAP, batch 8: 1.05x instead of 2.2x [measured]) but
    # puts an utterance beside the same others every epoch; these two keep the others changing.
    WINDOW = 100  # global batches sorted together; at most half of the epoch
    BLUR = 0.03  # lengths are changed at random by up to this share before sorting

    def __init__(self, fold: "Fold", args: argparse.Namespace, rank: int, world_size: int) -> None:
        rows, labels = fold.splits["train"], fold.dataset.labels
        self.lengths, self.labelled = fold.dataset.lengths, ~np.isnan(labels)
        self.seed, self.context = args.seed, args.context
        self.rank, self.world_size = rank, world_size
        self.draws = None  # (N,) as from balanced_draws; a chunk has its turns' mean
        if args.balance:
            trained = np.array(args.target_weights) > 0
            self.draws = np.zeros(len(labels))
            self.draws[rows] = balanced_draws(labels[rows][:, trained], args.balance)
        self.accumulation = args.gradient_accumulation_steps
        self.micro_batches = self.accumulation * world_size  # in a step
        self.chunks_per_step = args.batch_size // self.context * self.micro_batches
        turns: dict[str, list[int]] = {}  # rows are in time order within a dialogue
        for row in np.sort(rows).tolist():
            turns.setdefault(fold.dialogs[row], []).append(row)
        self.dialogues = list(turns.values())
        chunks = sum(math.ceil(len(rows) / self.context) for rows in self.dialogues)
        self.steps_per_epoch = chunks // self.chunks_per_step
        if not self.steps_per_epoch:
            raise UserError(
                f"the train split holds {len(rows)} utterances, fewer than one global batch of "
                f"{args.batch_size} x {self.accumulation} x {world_size} (batch x accumulation x "
                f"ranks) in chunks of up to {self.context}: lower --batch_size or "
                "--global_batch_size"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and the step to start at (resume inside an epoch)."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accumulation

    def _chunks(self, rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Every dialogue cut into chunks, at positions drawn anew each epoch.

        The first chunk is at least as long as the remainder of turns / context, which keeps the
        number of chunks constant.
        """
        chunks = []
        for rows in self.dialogues:
            first = rng.integers((len(rows) - 1) % self.context + 1, self.context + 1)
            cuts = [0, *range(first, len(rows), self.context), len(rows)]
            chunks += [tuple(rows[a:b]) for a, b in itertools.pairwise(cuts)]
        return chunks

    def _balanced(
        self, chunks: list[tuple[int, ...]], rng: np.random.Generator
    ) -> list[tuple[int, ...]]:
        """As many chunks, each as often as its draws say, rounded up or down at random.

        Chunks of equal draws are neighbours when the fractions are rounded, so their number is
        that of the closed form, less than one off.
        """
        draws = np.array([self.draws[list(chunk)].mean() for chunk in chunks])
        order = rng.permutation(len(chunks))
        order = order[np.argsort(draws[order], kind="stable")]
        until = np.cumsum(draws[order])
        marks = (np.arange(len(chunks)) + rng.random()) * (until[-1] / len(chunks))
        return [chunks[i] for i in order[np.searchsorted(until, marks)]]

    def __iter__(self) -> Iterator[BatchSpec]:
        rng = np.random.default_rng((self.seed, self.epoch))
        chunks = self._chunks(rng)
        if self.draws is not None:
            chunks = self._balanced(chunks, rng)
        longest = np.array([max(self.lengths[row] for row in chunk) for chunk in chunks])
        order = rng.permutation(len(chunks))[: self.steps_per_epoch * self.chunks_per_step]
        blurred = longest * rng.uniform(1 - self.BLUR, 1 + self.BLUR, len(chunks))
        window = self.chunks_per_step * min(self.WINDOW, math.ceil(self.steps_per_epoch / 2))
        for first in range(0, len(order), window):
            part = order[first : first + window]
            order[first : first + window] = part[np.argsort(blurred[part], kind="stable")]
        steps = order.reshape(self.steps_per_epoch, self.chunks_per_step)
        steps = steps[rng.permutation(self.steps_per_epoch)]
        for step in steps[self.first_step :]:
            step = step[np.argsort(longest[step], kind="stable")]
            rows = [row for i in step for row in chunks[i]]
            step_size = tuple(self.labelled[rows].sum(0).tolist())
            micro_batches = step.reshape(self.micro_batches, -1)
            for micro_batch in micro_batches[self.rank :: self.world_size]:
                yield BatchSpec(tuple(chunks[i] for i in micro_batch), self.epoch, step_size)


def eval_plan(
    dataset: Batches, rows: np.ndarray, rank: int, world_size: int, unpadded: bool = False
) -> list[BatchSpec]:
    """This rank's batches for evaluation; over all ranks, every row once.

    Batches hold utterances of like length, EVAL_SECONDS of audio at most with their padding, and at
    least one utterance; `unpadded`: of equal length. Which utterances share a batch depends on no
    flag and not on world_size; ranks get batches of about equal total cost.
    """
    lengths, budget = dataset.lengths, EVAL_SECONDS * dataset.rate
    batches: list[list[int]] = []
    for row in sorted(np.asarray(rows).tolist(), key=lambda row: (-lengths[row], row)):
        longest = lengths[batches[-1][0]] if batches else 0
        full = not batches or (len(batches[-1]) + 1) * longest > budget
        if full or (unpadded and lengths[row] != longest):
            batches.append([])
        batches[-1].append(row)
    load = [0] * world_size
    specs = []
    for batch in sorted(batches, key=lambda b: -len(b) * int(lengths[b[0]])):
        receiver = load.index(min(load))
        load[receiver] += len(batch) * int(lengths[batch[0]])
        if receiver == rank:
            specs.append(BatchSpec(tuple((row,) for row in batch)))
    return specs


# ---------------------------------------------------------------------------------------------
# A fold of a corpus


@dataclass(frozen=True)
class InputShape:
    """Sizes of the inputs that the flags alone do not tell."""

    speaker_dim: int  # width of the speaker vectors; 0 = none
    frame_dim: int  # width of the feature files; 0 = none
    length: int  # samples of the longest utterance, or frames where features are read
    rate: float  # samples or frames per second
    vector_dims: tuple[int, ...] = ()  # width of each of --vectors


@dataclass
class Fold:
    """One fold of a corpus, ready to be batched."""

    corpus: Corpus
    splits: dict[str, np.ndarray]  # rows of the corpus, see make_splits
    dataset: Batches
    dialogs: list[str]  # of every row
    labels: torch.Tensor  # (N, E) in [0, 1]
    shape: InputShape
    digests: dict[str, list[str]]  # of every row: audio, features, speaker vector, vectors

    def in_label_scale(self, preds: torch.Tensor) -> torch.Tensor:
        """Predictions (n, E) in [0, 1] in the units of the labels."""
        low, high = self.corpus.label_range
        return low + (high - low) * preds

    def is_labelled(self, split: str) -> bool:
        return not bool(self.labels[self.splits[split]].isnan().all())

    def speakers(self, split: str) -> list[str]:
        return [self.corpus.utterances[row].speaker for row in self.splits[split]]


def load_corpus(
    args: argparse.Namespace, max_skipped: float = corpora.MAX_SKIPPED
) -> tuple[Corpus, PackedRows]:
    """The corpus that the flags name, and its decoded audio; see load_audio."""
    flags = (args.data, args.data_dir, args.label_range, args.cache_dir, args.targets)
    return load_audio(read_corpus(*flags), args.cache_dir, max_skipped)


def load_fold(args: argparse.Namespace) -> Fold:
    """The corpus, its splits for --fold and the inputs of the model; builds missing caches.

    Nothing is normalised here: the model's normaliser sees the train split alone.
    """
    corpus, pack = load_corpus(args)
    digests = {"audio": corpus.audio}
    features = prosody = speaker = None
    if args.features_dir:
        features = FrameFeatures(corpus, args.features_dir, args.feature_rate)
        corpus.notes.append(features.describe())
        digests["features"] = features.digests.astype(str).tolist()
    if args.prosody == "egemaps":
        prosody = egemaps(pack, args.cache_dir)
    if args.speaker != "none" and not args.no_film:
        speaker = speaker_embeddings(corpus, pack, args.speaker, args.cache_dir)
        if holds_vectors(args.speaker):
            digests["speaker vector"] = [files.array_digest(row) for row in speaker]
    vectors, vector_dims = all_vectors(corpus, args.vectors or (), args.cache_dir)
    if vectors is not None:
        digests["vectors"] = [files.array_digest(row) for row in vectors]
    dataset = Batches(
        labels=corpus.labels(corpus.targets),
        pack=None if features else pack,
        features=features,
        prosody=prosody,
        speaker=speaker,
        max_seconds=args.max_seconds,
        augment=args.augment,
        seed=args.seed,
        vectors=vectors,
    )
    if dataset.num_cut:
        what = "training takes a random window, or the beginning where hidden states are cached"
        longer = f"{dataset.num_cut} utterances are longer than --max_seconds {args.max_seconds:g}"
        corpus.notes.append(f"{longer}: {what}; evaluation takes the beginning")
    return Fold(
        corpus=corpus,
        splits=make_splits(corpus, args.fold),
        dataset=dataset,
        dialogs=[utterance.dialog for utterance in corpus.utterances],
        labels=torch.from_numpy(dataset.labels),
        shape=InputShape(
            speaker_dim=0 if speaker is None else speaker.shape[1],
            frame_dim=0 if features is None else features.dim,
            length=int(dataset.lengths.max()),
            rate=dataset.rate,
            vector_dims=vector_dims,
        ),
        digests=digests,
    )


# ---------------------------------------------------------------------------------------------
# python data.py


def inspect(args: argparse.Namespace) -> None:
    """Print what one should know before training. UserError: do not train on it."""
    corpus, pack = load_corpus(args, max_skipped=1.0)
    if args.skipped:
        corpora.write_skipped(Path(args.skipped), corpus)
    for note in corpus.notes:
        print(f"note        {note}")
    print(f"skipped     {len(corpus.skipped)}")
    for kind, skipped in corpora.skipped_by_kind(corpus).items():
        first = ", ".join(s.utt_id for s in skipped[:5])
        print(f"            {kind}: {len(skipped)} ({first}{', ...' if len(skipped) > 5 else ''})")
    corpora.check_skipped(corpus)
    utterances, seconds = corpus.utterances, corpus.seconds
    turns = Counter(u.dialog for u in utterances).values()
    speakers = {u.speaker for u in utterances if corpora.known_speaker(u.speaker)}
    low, p5, p50, p95, high = np.percentile(seconds, [0, 5, 50, 95, 100])
    print(f"corpus      {corpus.name} in {corpus.root}")
    print(f"utterances  {len(utterances)}, {seconds.sum() / 3600:.2f} h, {len(speakers)} speakers")
    print(f"dialogues   {len(turns)} of {min(turns)} to {max(turns)} turns")
    print(
        f"seconds     mean {seconds.mean():.2f}, p5 {p5:.2f}, p50 {p50:.2f}, p95 {p95:.2f}, "
        f"min {low:.2f}, max {high:.2f}"
    )
    for attribute in ("gender", "emotion"):
        counts = Counter(getattr(u, attribute) or "-" for u in utterances).most_common(12)
        print(f"{attribute + 's':<12}{', '.join(f'{name} {n}' for name, n in counts)}")
    print(f"audio pack  {pack.file.parent}, {files.gib(2 * pack.lengths.sum())}")
    print_labels(corpus)
    print_raters(corpus)
    for fold in [args.fold] if args.fold is not None else range(1, corpora.num_folds(corpus) + 1):
        splits = make_splits(corpus, fold)
        print(f"\nfold {fold}\n{corpora.describe_splits(corpus, splits)}")
        if args.balance:
            targets = args.targets or ModelConfig.targets
            print(describe_balance(corpus, targets, splits["train"], args.balance))


def describe_balance(
    corpus: Corpus, targets: Sequence[str], rows: np.ndarray, balance: float
) -> str:
    """Utterances of an epoch by bin of each label, without --balance and with it."""
    labels = corpus.labels(targets)[rows]
    draws, bins = balanced_draws(labels, balance), label_bins(labels)
    edges = [f"{edge:g}" for edge in np.linspace(*corpus.label_range, BALANCE_BINS + 1)]
    names = [f"{a}..{b}" for a, b in itertools.pairwise(edges)] + ["missing"]
    table = pd.DataFrame(index=names)
    for i, target in enumerate(targets):
        for name, weights in ((target, None), (f"{target} balanced", draws)):
            counts = np.bincount(bins[:, i], weights, minlength=len(names))
            table[name] = np.rint(counts).astype(int)
    cells, most = len(np.unique(bins, axis=0)), f"{draws.min():.2g} to {draws.max():.2g}"
    return (
        f"--balance {balance:g}, train utterances per epoch and bin\n{table.to_string()}\n"
        f"{cells} cells in use, an utterance is drawn {most} times"
    )


def print_labels(corpus: Corpus) -> None:
    """A histogram of each label and their correlations. UserError if one is constant."""
    lo, hi = corpus.label_range
    values = {name: [getattr(u, name) for u in corpus.utterances] for name in corpus.targets}
    labels = pd.DataFrame(values)
    half_bin = (hi - lo) / 16
    for name, values in labels.items():
        print(
            f"\n{name}, labels in {lo:g}..{hi:g}: mean {values.mean():.2f}, "
            f"standard deviation {values.std(ddof=0):.2f}"
        )
        if values.nunique() < 2:
            fault = f"{name} is {values.mean():g} everywhere, nothing to learn"
            raise UserError(f"{corpus.name}: {fault}")
        counts, _ = np.histogram(values.dropna(), bins=9, range=(lo - half_bin, hi + half_bin))
        for centre, count in zip(np.linspace(lo, hi, 9), counts):
            bar = "#" * round(30 * count / counts.max())
            print(f"{centre:6.2f} {count:6d} {bar}".rstrip())
    correlations = labels.corr()
    for one, two in itertools.combinations(corpus.targets, 2):
        print(f"correlation of {one} and {two} {correlations.loc[one, two]:+.2f}")


def print_raters(corpus: Corpus) -> None:
    """What one rater reaches against the mean of the others, where the corpus has several."""
    rows, ratings = pd.DataFrame([vars(u) for u in corpus.utterances]), corpus.ratings()
    found = {target: human_ceiling(ratings, rows, target) for target in corpus.targets}
    if not any(found.values()):
        return
    print("\nhuman raters: CCC of one with the mean of the others, reliability of the mean of all")
    for target, human in found.items():
        if human:
            low, high = human["interval"]
            print(
                f"{target:<12}CCC {human['ccc']:.3f} [{low:.3f}, {high:.3f}], reliability "
                f"{human['reliability']:.3f} ({len(human['utterances'])} utterances of "
                f"{human['raters']:.1f} raters)"
            )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="inspect a corpus before training")
    add = parser.add_argument
    add("--data", required=True, help="demo, iemocap, msp_podcast, or a .csv or .tsv")
    add("--data_dir", help="root of the corpus, or of the relative paths in a CSV")
    add("--label_range", nargs=2, type=float, metavar=("LO", "HI"), help="scale of the labels")
    add("--targets", choices=corpora.LABELS, nargs="+", help="labels to look at; default: all")
    add("--cache_dir", default="cache", help="directory of caches")
    add("--fold", type=int, help="print only this fold (default: all)")
    add("--skipped", metavar="CSV", help="file for the utterances left out, and why")
    help_text = "what train.py --balance makes of each bin of --targets, or of its default ones"
    add("--balance", type=float, default=0, help=help_text)
    args = parser.parse_args(argv)
    if not 0 <= args.balance <= 1:
        parser.error(f"--balance {args.balance:g}: must be in 0..1")
    return args


if __name__ == "__main__":
    args = parse_args()
    sys.exit(files.run_script("data.py", lambda: inspect(args)))
