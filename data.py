"""Where a batch comes from: audio, its caches, features, batches.

    python data.py --data demo                                    # synthesise, inspect (seconds)
    python data.py --data my.csv --label_range 1 7                # your own manifest
    python data.py --data iemocap --data_dir IEMOCAP_full_release
    python data.py --data msp_podcast --data_dir MSP-PODCAST
    python data.py extract-faces --face_dir F --features_224_dir OUT [--data my.csv]

The way of the data: corpora.read_corpus -> load_audio -> corpora.make_splits -> Batches + TrainPlan
/ eval_plan. Caches live in --cache_dir, each under a key of what it was made from, so none is ever
stale. What happens to each kind of odd input is one table: tests/test_input_faults.py.
Not done here: face detection, voice activity detection, downloading of corpora.

Reference: eGeMAPS (Eyben et al. 2016).
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from corpora import (
    LABELS,
    MOST_SKIPPED,
    Corpus,
    Skipped,
    Utterance,
    check_skipped,
    describe_splits,
    known_speaker,
    make_splits,
    natural,
    num_folds,
    read_corpus,
    skipped_by_kind,
    write_skipped,
)
from model import TARGETS
from util.files import (
    UserError,
    build_cache,
    cached_array,
    digest,
    progress,
    replacing,
    weights_digest,
)

SAMPLE_RATE = 16_000
FRAME_RATE = 50  # frames per second of frozen features, as far as seconds are derived from them
MIN_SAMPLES = 400  # WavLM's CNN needs this many; shorter clips are zero-padded to it
MAX_CLIP_SECONDS = 600  # longer is taken for a forgotten start/end, not for an utterance [guess]
RATES = (4_000, 384_000)  # Hz; a header that says anything else is taken for a damaged one [guess]
MOST_MISSING = 0.1  # of a clip's samples; with more lost, its label may belong to the rest [guess]
GROUP_SECONDS = 2.0  # of audio, which one more pass of an encoder costs on its own [guess]
PREFETCH_FACTOR = 4  # micro-batches that a loader worker holds ready
EVAL_SECONDS = 64  # padded seconds per evaluation batch; fixed, so that results do not move
CORES = len(os.sched_getaffinity(0))


# ---------------------------------------------------------------------------------------------
# Decoding, audio pack

PACK_VERSION = 2  # raise it with every change of decode: it is part of the cache key


def check_header(log: str) -> tuple[float, str, list[str]]:
    """(promised length / length found, reason to skip or "", what to note), by libsndfile's log.

    libsndfile takes a header at its word or cuts it to the file, in silence. RIFF, W64, RF64,
    AIFF and AU are seen here; other formats do not open, or come out short when they are read.
    """
    notes = []
    promise = re.search(r"(?:data|riff|Riff size|SSND|Data Size) *: (\d+) \(should be (\d+)\)", log)
    says, has = map(int, promise.groups()) if promise else (1, 1)
    if not promise and "Exiting parser" in log:  # where the samples go on behind their chunk, or
        chunk = re.search(r"Length : (\d+)\n(?:.*\n)*data : (\d+)\n", log)  # a broken last chunk
        says, has = map(int, chunk.groups()) if chunk else (1, 1)
        says, has = (says, has) if has < (1 - MOST_MISSING) * says else (1, 1)
    if says > 2**31 - 2**20:  # written into a pipe: its length was not known yet
        notes.append("no length in its header, kept")
        says = has
    names = ("Channels", "Sample Rate", "Block Align", "Bit Width", "Bytes/sec")
    lines = "".join(rf"  {name} +: (\d+).*\n" for name in names)
    wav = re.search(r"=> WAVE_FORMAT_PCM\n" + lines, log)
    if wav:
        channels, rate, align, bits, bytes_per_second = map(int, wav.groups())
        frame = channels * math.ceil(bits / 8)
        if align != frame:
            return 1.0, f"header contradicts itself ({align} or {frame} bytes per frame)", []
        if bytes_per_second != rate * frame:
            notes.append("header contradicts itself on bytes per second, kept")
    return says / max(has, 1), "", notes


def decode(u: Utterance) -> tuple[np.ndarray, str, list[str]]:
    """(int16 mono samples at SAMPLE_RATE, "", what was changed), or (none, reason, [])."""
    nothing = np.zeros(0, dtype=np.int16)
    try:
        if not u.path.is_file():  # opening a pipe would wait for ever
            return nothing, "no such file, or not a regular one", []
        if not os.access(u.path, os.R_OK):
            return nothing, "no permission to read it", []
        with soundfile.SoundFile(u.path) as file:
            rate, frames = file.samplerate, file.frames
            log = file.extra_info[len(f"File : {u.path}") :]  # a name could hold anything
            promised, reason, changes = check_header(log)
            if not RATES[0] <= rate <= RATES[1]:
                reason = f"sample rate outside {RATES[0]}..{RATES[1]} Hz ({rate})"
            first = round(u.start * rate)
            wanted = round(promised * frames if u.end is None else u.end * rate)
            last = min(wanted, frames)
            if last <= first:
                reason = reason or f"no samples (from {u.start:g} s on, of {frames / rate:.2f} s)"
            elif last - first > MAX_CLIP_SECONDS * rate:
                reason = reason or f"longer than {MAX_CLIP_SECONDS} s: give start and end"
            if reason:
                return nothing, reason, []
            file.seek(first)
            audio = file.read(last - first, dtype="float32", always_2d=True)  # (L, channels)
    # TypeError: a .raw file; UnicodeError: a name that is not UTF-8
    except (soundfile.SoundFileError, OSError, TypeError, UnicodeError) as error:
        return nothing, f"cannot be decoded ({str(error).split(': ')[-1]})", []
    missing = 1 - len(audio) / (wanted - first)
    if missing > MOST_MISSING:
        return nothing, f"samples missing ({100 * missing:.0f} %)", []
    if not np.isfinite(audio).all():
        return nothing, "samples are not finite", []
    if missing > 0:
        changes.append("a little shorter than its header or end says, kept")
    if audio.shape[1] > 1:
        changes.append(f"mixed to mono from {audio.shape[1]} channels")
    mono = audio.mean(axis=1)  # (L,)
    if np.mean(mono**2) < 0.01 * np.mean(audio**2):
        changes.append("channels cancel out, the first one taken")
        mono = audio[:, 0]
    audio = mono
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE, quality="HQ")
        changes.append(f"resampled from {rate} Hz")
    peak = float(np.abs(audio).max(initial=0.0))
    if peak > 4:  # no overshoot: the file does not use the scale -1..1 [guess]
        return nothing, f"samples not in the scale -1..1 (up to {peak:.3g})", []
    if peak > 1.12:  # 1 dB: more than resampling overshoots by
        changes.append("above full scale, clipped")
    elif peak > 0.9999 and np.mean(np.abs(audio) > 0.9999) > 0.01:
        changes.append("clipped when it was recorded, kept")
    samples = np.clip(np.round(audio * 32768), -32768, 32767).astype(np.int16)
    if not len(samples) or int(samples.max()) - int(samples.min()) <= 2:  # a quiet constant
        return nothing, "no sound in it, all samples are alike", []
    if len(samples) < MIN_SAMPLES:
        samples = np.pad(samples, (0, MIN_SAMPLES - len(samples)))
        changes.append(f"padded to {MIN_SAMPLES} samples")
    return samples, "", changes


def identity(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file; (-1, -1) where it cannot be looked at."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


class AudioPack:
    """All audio as one int16 memory map, shared by folds, ranks and workers.

    `lengths` (N,) samples; `bad` row -> reason (length 0); `changes` what was done to how many.
    """

    def __init__(self, corpus: Corpus, cache_dir: str | Path) -> None:
        files = [(str(u.path), *identity(u.path), u.start, u.end) for u in corpus.utterances]
        versions = (PACK_VERSION, SAMPLE_RATE, soxr.__version__, soundfile.__libsndfile_version__)
        self.key = digest(versions, files)
        self.directory = Path(cache_dir) / f"audio-{self.key}"
        build_cache(self.directory, lambda aside: self._write(corpus.utterances, aside))
        index = json.loads((self.directory / "index.json").read_text())
        self.lengths = np.array(index["lengths"], dtype=np.int64)
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.bad = {int(row): reason for row, reason in index["bad"].items()}
        self.changes: dict[str, int] = index["changes"]
        self._samples: np.ndarray | None = None  # opened in the process that reads

    @staticmethod
    def _write(utterances: list[Utterance], aside: Path) -> None:
        lengths, bad, changes = [], {}, Counter[str]()
        with open(aside / "samples.i16", "wb") as file, ThreadPoolExecutor(CORES) as pool:
            blocks = range(0, len(utterances), 64)  # bounds what waits in memory
            for block in progress(blocks, len(blocks), "audio"):
                for audio, reason, changed in pool.map(decode, utterances[block : block + 64]):
                    if reason:
                        bad[len(lengths)] = reason
                    changes.update(changed)
                    lengths.append(len(audio))
                    file.write(audio.tobytes())
        index = {"lengths": lengths, "bad": bad, "changes": changes}
        (aside / "index.json").write_text(json.dumps(index))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_samples": None}  # a pickled memmap would carry the samples

    def part(self, rows: Sequence[int]) -> "AudioPack":
        """The same pack with only these rows, in this order."""
        part = object.__new__(AudioPack)
        part.__dict__ = self.__getstate__() | {"bad": {}}
        part.lengths, part.offsets = self.lengths[rows], self.offsets[rows]
        return part

    def read(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Samples start..stop of the row, float32 in [-1, 1]."""
        if self._samples is None:
            self._samples = np.memmap(self.directory / "samples.i16", dtype=np.int16, mode="r")
        length, offset = int(self.lengths[row]), int(self.offsets[row])
        stop = length if stop is None else min(stop, length)
        return self._samples[offset + start : offset + stop].astype(np.float32) / 32768


def load_audio(
    corpus: Corpus, cache_dir: str | Path, most_bad: float = MOST_SKIPPED
) -> tuple[Corpus, AudioPack]:
    """(corpus without the rows that have no usable audio, pack with the same rows).

    Rows lost are named in corpus.skipped; UserError when these, with those that the reader of the
    corpus named before, are a larger share than `most_bad`.
    """
    pack = AudioPack(corpus, cache_dir)
    lost = [(corpus.utterances[row], reason) for row, reason in sorted(pack.bad.items())]
    good = [row for row in range(len(corpus.utterances)) if row not in pack.bad]
    pack = pack.part(good)
    corpus = dataclasses.replace(
        corpus,
        utterances=[corpus.utterances[row] for row in good],
        skipped=corpus.skipped + [Skipped(u.utt_id, str(u.path), why) for u, why in lost],
        notes=corpus.notes + [f"audio {what}: {n} utterances" for what, n in pack.changes.items()],
        seconds=pack.lengths / SAMPLE_RATE,
    )
    check_skipped(corpus, most_bad)
    return corpus, pack


# ---------------------------------------------------------------------------------------------
# eGeMAPS and speaker embeddings


def egemaps_of(pack: AudioPack) -> np.ndarray:
    """(N, 88) float32 of a (part of a) pack, in this process."""
    import opensmile  # free for research only

    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    clips = (pack.read(row) for row in range(len(pack.lengths)))
    rows = [smile.process_signal(clip, SAMPLE_RATE).to_numpy()[0] for clip in clips]
    return np.array(rows, dtype=np.float32)


def egemaps(corpus: Corpus, pack: AudioPack, cache_dir: str | Path) -> np.ndarray:
    """(N, 88) float32 eGeMAPSv02 functionals, NaN where opensmile leaves one undefined."""
    try:
        import opensmile
    except ImportError:
        raise UserError(
            "--prosody egemaps needs opensmile; install it, or --prosody none"
        ) from None

    def build() -> np.ndarray:
        count = len(pack.lengths)
        if count < 50:  # starting processes would take longer
            return egemaps_of(pack)
        parts = [pack.part(range(i, min(i + 16, count))) for i in range(0, count, 16)]
        spawn = multiprocessing.get_context("spawn")  # fork is not safe once torch has threads
        with ProcessPoolExecutor(CORES, spawn, torch.set_num_threads, (1,)) as pool:
            done = progress(pool.map(egemaps_of, parts), len(parts), "eGeMAPS")
            return np.concatenate(list(done))

    key = digest(pack.key, opensmile.__version__, "eGeMAPSv02")
    return cached_array(Path(cache_dir) / f"egemaps-{key}", build)


def speaker_embeddings(
    corpus: Corpus, pack: AudioPack, kind: str, cache_dir: str | Path, device: str = "cpu"
) -> np.ndarray:
    """(N, S) float32, L2-normalised, each from its utterance alone.

    `kind`: ecapa, xvector, a local x-vector model directory, or a directory of <utt_id>.npy (S,).
    """
    folder = Path(kind)
    if kind not in ("ecapa", "xvector") and not folder.is_dir():
        raise UserError(f"--speaker {kind}: not ecapa, xvector, none or a directory")
    if folder.is_dir() and not (folder / "config.json").exists():
        paths = npy_files(corpus, folder, "--speaker")
        size = open_npy(paths[0], 1, None).shape[0]
        vectors = np.stack([open_npy(path, 1, size) for path in paths]).astype(np.float32)
    else:
        embed, key = ecapa(cache_dir, device) if kind == "ecapa" else xvector(kind, device)

        def build() -> np.ndarray:
            rows = progress(range(len(pack.lengths)), len(pack.lengths), "speakers")
            clips = (pack.read(row) for row in rows)
            # below a second, statistics over frames are noise or undefined: repeat the clip
            clips = (np.tile(clip, math.ceil(SAMPLE_RATE / len(clip))) for clip in clips)
            with torch.inference_mode():
                return np.stack([embed(clip).float().cpu().numpy() for clip in clips])

        vectors = cached_array(Path(cache_dir) / f"speaker-{digest(pack.key, key)}", build)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    broken = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(broken):
        fault = f"{len(broken)} embeddings are zero or not finite"
        utt_id = corpus.utterances[broken[0]].utt_id
        raise UserError(f"--speaker {kind}: {fault}, the first is that of {utt_id}")
    return vectors / norms


def xvector(kind: str, device: str) -> tuple[Callable[[np.ndarray], torch.Tensor], str]:
    """(waveform (L,) -> embedding (S,), cache key) of a transformers x-vector model."""
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    source = "microsoft/wavlm-base-plus-sv" if kind == "xvector" else kind
    try:
        options = {"trust_remote_code": False}
        extractor = AutoFeatureExtractor.from_pretrained(source, **options)
        model = AutoModelForAudioXVector.from_pretrained(source, **options).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--speaker {kind}: cannot load {source} ({error})") from None

    def embed(clip: np.ndarray) -> torch.Tensor:
        inputs = extractor(clip, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return model(inputs.input_values.to(device)).embeddings[0]

    return embed, weights_digest(model) + extractor.to_json_string()


def ecapa(cache_dir: str | Path, device: str) -> tuple[Callable[[np.ndarray], torch.Tensor], str]:
    """The same for speechbrain's ECAPA-TDNN (192-d). Never run by us: it needs torchaudio."""
    try:
        from speechbrain.inference.speaker import EncoderClassifier
    except ImportError as error:
        fault = f"--speaker ecapa needs speechbrain ({error})"
        raise UserError(f"{fault}: install it, or use --speaker xvector") from None
    model = EncoderClassifier.from_hparams(
        "speechbrain/spkrec-ecapa-voxceleb",
        savedir=str(Path(cache_dir) / "ecapa"),
        run_opts={"device": device},
    )

    def embed(clip: np.ndarray) -> torch.Tensor:
        return model.encode_batch(torch.from_numpy(clip).to(device)[None])[0, 0]

    return embed, weights_digest(model)


# ---------------------------------------------------------------------------------------------
# Frozen frame features


def npy_files(corpus: Corpus, directory: str | Path, flag: str) -> list[Path]:
    """<directory>/<utt_id>.npy of every row; UserError names how many are missing."""
    if not Path(directory).is_dir():
        raise UserError(f"{flag} {directory}: no such directory")
    paths = [Path(directory) / f"{u.utt_id}.npy" for u in corpus.utterances]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        first = ", ".join(missing[:3])
        raise UserError(f"{flag} {directory}: {len(missing)} of {len(paths)} missing ({first})")
    return paths


def open_npy(path: Path, ndim: int, width: int | None) -> np.ndarray:
    """Memory-mapped array of `ndim` dimensions, the last one `width` (None: any)."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would open an .npz, too
    except Exception as error:  # whatever tokenize, ast and mmap raise on a damaged header
        raise UserError(f"{path}: not a plain .npy array ({error})") from None
    if array.ndim != ndim or array.dtype.kind not in "fiu" or 0 in array.shape:
        wanted = "(T, D)" if ndim == 2 else "(S,)"
        raise UserError(
            f"{path}: {array.dtype} {array.shape}, expected numbers {wanted}, not empty"
        )
    if width not in (None, array.shape[-1]):
        raise UserError(f"{path}: width {array.shape[-1]}, but the first file has {width}")
    return array


class FrameFeatures:
    """Frozen features, one <utt_id>.npy (T, D) per utterance. `dim` = D, `lengths` (N,) frames."""

    def __init__(self, corpus: Corpus, features_dir: str | Path) -> None:
        try:
            self.paths = npy_files(corpus, features_dir, "--features_dir")
        except UserError as error:
            raise UserError(f"{error}; to make them: python data.py extract-faces") from None
        self.dim = open_npy(self.paths[0], 2, None).shape[1]
        lengths = [len(open_npy(path, 2, self.dim)) for path in self.paths]
        self.lengths = np.array(lengths, dtype=np.int64)

    def read(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(T, D) float32. UserError if a value is not finite (found only here: needs all bytes)."""
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is refused
            frames = np.array(open_npy(self.paths[row], 2, self.dim)[start:stop], np.float32)
        if not np.isfinite(frames).all():
            raise UserError(f"{self.paths[row]}: holds NaN or infinite values")
        return frames


# ---------------------------------------------------------------------------------------------
# Hidden states of a frozen encoder

HIDDEN_VERSION = 1  # raise it with every change of what the model prepares: part of the cache key


class HiddenStates:
    """What a frozen encoder makes of every utterance, float16, in one flat memory map.

    A row holds one vector (N, D) where `pooled`, else one per frame; rows lie in the order in
    which `compute` yielded them, (corpus row, (T, N, D)), each once.
    """

    def __init__(
        self,
        key: str,
        cache_dir: str | Path,
        compute: Callable[[], Iterator[tuple[int, np.ndarray]]],
        pooled: bool,
    ) -> None:
        self.directory = Path(cache_dir) / f"hidden-{key}"
        self.pooled = pooled
        build_cache(self.directory, lambda aside: self._write(compute(), aside))
        index = json.loads((self.directory / "index.json").read_text())
        self.counts = np.array(index["counts"], dtype=np.int64)  # (rows,) vectors
        self.offsets = np.array(index["offsets"], dtype=np.int64)
        self.shape = tuple(index["shape"])  # (N, D)
        self._values: np.ndarray | None = None  # opened in the process that reads

    @staticmethod
    def _write(rows: Iterator[tuple[int, np.ndarray]], aside: Path) -> None:
        counts, offsets, total, shape = {}, {}, 0, ()
        with open(aside / "values.f16", "wb") as file:
            for row, values in rows:
                file.write(values.astype(np.float16).tobytes())
                counts[row], offsets[row], shape = len(values), total, values.shape[1:]
                total += len(values)
        index = {
            name: [of[row] for row in range(len(of))]
            for name, of in (("counts", counts), ("offsets", offsets))
        }
        (aside / "index.json").write_text(json.dumps(index | {"shape": shape}))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_values": None}

    def read(self, row: int) -> np.ndarray:
        """(T, N, D) float16; T = 1 where pooled."""
        if self._values is None:
            flat = np.memmap(self.directory / "values.f16", dtype=np.float16, mode="r")
            self._values = flat.reshape(-1, *self.shape)
        offset = int(self.offsets[row])
        return np.array(self._values[offset : offset + int(self.counts[row])])


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
    step_size: int = 0  # utterances in the global batch that this one is a part of


class Batches(torch.utils.data.Dataset):
    """dataset[BatchSpec] -> batch, so that a DataLoader with batch_size=None takes a plan.

    `lengths` (N,): samples, or frames where there is no pack, after the cap of `max_seconds`;
    `rate`: how many of them are a second. Every draw is a function of (seed, epoch, row).
    """

    def __init__(
        self,
        labels: np.ndarray,
        pack: AudioPack | None,
        features: FrameFeatures | None,
        prosody: np.ndarray | None,
        speaker: np.ndarray | None,
        max_seconds: float,
        augment: bool,
        seed: int,
    ) -> None:
        if augment and pack is None:
            raise UserError("--augment works on waveforms, but this encoder reads --features_dir")
        self.labels, self.pack, self.features = labels, pack, features
        self.prosody, self.speaker = prosody, speaker
        self.max_seconds, self.augment, self.seed = max_seconds, augment, seed
        self.rate = SAMPLE_RATE if pack is not None else FRAME_RATE
        source = pack if pack is not None else features
        self.lengths = np.minimum(source.lengths, int(max_seconds * self.rate))
        self.hidden: HiddenStates | None = None  # takes the place of audio while it is set

    def __getitem__(self, spec: BatchSpec) -> dict:
        """All torch CPU tensors but the last four; turns of chunks are ordered by length:
        chunk_index (C, K) positions in the batch (-1 = padding),
        labels (B, 2), input_values (B, L) and attention_mask (B, L) True = sample,
        frames (B, T, D) and frame_mask (B, T), hidden (B, N, D) or (B, T, N, D) float16,
        prosody (B, 88) raw with NaN, speaker (B, S),
        rows (list of the corpus'), audio_seconds and padded_share (floats), and, where the turns
        of chunks mix lengths, groups [(start, stop, L)] of like length, to be encoded apart.
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
        }
        batch["audio_seconds"] = float(self.lengths[rows].sum()) / self.rate
        batch["padded_share"], real = 0.0, None
        if self.hidden is not None:
            states = [self.hidden.read(row) for row in rows]
            if self.hidden.pooled:
                batch["hidden"] = torch.from_numpy(np.concatenate(states))
            else:
                batch["hidden"], real = pad(states)
                batch["frame_mask"] = real
        elif self.features is not None:
            frames = [self._window(self.features, FRAME_RATE, row, spec.epoch)[0] for row in rows]
            batch["frames"], batch["frame_mask"] = pad(frames)
            real = batch["frame_mask"]
        elif self.pack is not None:
            audio = [self._waveform(row, spec.epoch) for row in rows]
            batch["input_values"], batch["attention_mask"] = pad(audio)
            real = batch["attention_mask"]
            batch["audio_seconds"] = float(real.sum()) / self.rate
        if self.prosody is not None:
            batch["prosody"] = torch.from_numpy(self.prosody[rows])
        if self.speaker is not None:
            batch["speaker"] = torch.from_numpy(self.speaker[rows])
        if real is not None:
            lengths, padded = real.sum(1).numpy(), real.numel()
            if width > 1 and self.hidden is None:
                batch["groups"] = groups_of_like_length(lengths, GROUP_SECONDS * self.rate)
                padded = sum((stop - start) * longest for start, stop, longest in batch["groups"])
            batch["padded_share"] = 1.0 - float(lengths.sum()) / padded
        return batch

    def _window(
        self, source: AudioPack | FrameFeatures, rate: int, row: int, epoch: int
    ) -> tuple[np.ndarray, np.random.Generator | None]:
        """At most max_seconds of the row, and the generator that goes on for augmentation.

        Training draws the place of the window (the same for audio and frames); evaluation takes
        the first.
        """
        rng = None if epoch < 0 else np.random.default_rng((self.seed, epoch, row))
        most = int(self.max_seconds * rate)
        spare = max(0, int(source.lengths[row]) - most)
        start = 0 if rng is None else int(rng.random() * (spare + 1))
        return source.read(row, start, start + most), rng

    def _waveform(self, row: int, epoch: int) -> np.ndarray:
        audio, rng = self._window(self.pack, SAMPLE_RATE, row, epoch)
        if self.augment and rng is not None:
            audio = augment_waveform(audio, rng)
            # slower speech is longer: keep the cap that memory was planned for
            audio = audio[: max(MIN_SAMPLES, int(self.max_seconds * SAMPLE_RATE))]
        return np.pad(audio, (0, max(0, MIN_SAMPLES - len(audio))))


def pad(items: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrays (L_i, ...) -> zero-padded (B, L, ...) and a mask (B, L), True = real."""
    lengths = torch.tensor([len(item) for item in items])
    kind = torch.from_numpy(items[0]).dtype
    padded = torch.zeros(len(items), int(lengths.max()), *items[0].shape[1:], dtype=kind)
    for i, item in enumerate(items):
        padded[i, : len(item)] = torch.from_numpy(item)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def groups_of_like_length(lengths: np.ndarray, cost: float) -> list[tuple[int, int, float]]:
    """[(start, stop, longest)], the cut of lengths (B,), about in order, into runs that makes the
    padded total, and `cost` for each run, least."""
    least, cuts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=int)
    for stop in range(1, len(lengths) + 1):
        longest = np.maximum.accumulate(lengths[:stop][::-1])[::-1]  # of a run from each start
        totals = least[:stop] + cost + np.arange(stop, 0, -1) * longest
        cuts[stop], least[stop] = totals.argmin(), totals.min()
    groups, stop = [], len(lengths)
    while stop:
        start = int(cuts[stop])
        groups.append((start, stop, lengths[start:stop].max().item()))
        stop = start
    return groups[::-1]


class TrainPlan:
    """The batches of an epoch for one rank: gradient_accumulation_steps specs per step.

    Global batches are formed first, from (seed, epoch, lengths, global size) alone, and only then
    dealt out: a step sees the same utterances however they are split over ranks and micro-steps.
    A global batch holds utterances of like length; its micro-batches, sorted by length, go to
    the ranks in turn, so that ranks have equal work within a micro-step.

    A micro-batch holds `batch_size` utterances or, with a `budget`, as many as fit into so many
    padded samples (units of `lengths`; give at least the longest clip), the same number in each
    micro-batch of a step. Then the number of steps differs a little between epochs.
    """

    # Sorting by length saves padding (IEMOCAP, batch 8: 1.05x instead of 2.2x [measured]) but
    # gives an utterance the same company every epoch; these two keep the company changing.
    WINDOW = 100  # global batches sorted together; at most half of the epoch
    BLUR = 0.03  # lengths are changed at random by up to this share before sorting

    def __init__(
        self,
        lengths: np.ndarray,
        rows: np.ndarray,
        dialogs: Sequence[str],
        batch_size: int,
        gradient_accumulation_steps: int,
        context: int,
        rank: int,
        world_size: int,
        seed: int,
        budget: float | None = None,
    ) -> None:
        if batch_size % context:
            raise ValueError(f"batch_size {batch_size} is not divisible by context {context}")
        self.lengths, self.context, self.seed = lengths, context, seed
        self.rank, self.world_size, self.budget = rank, world_size, budget
        self.accumulation = gradient_accumulation_steps
        self.micro_batches = gradient_accumulation_steps * world_size  # in a step
        self.chunks_per_batch = batch_size // context
        turns: dict[str, list[int]] = {}  # rows are in time order within a dialogue
        for row in np.sort(rows).tolist():
            turns.setdefault(dialogs[row], []).append(row)
        self.dialogues = list(turns.values())
        self._counts: dict[int, int] = {}
        if not self.steps_in(0):
            raise UserError(
                f"the train split holds {len(rows)} utterances in chunks of up to "
                f"{context}, fewer than one global batch of {batch_size} x "
                f"{gradient_accumulation_steps} x {world_size} (batch x accumulation x ranks): "
                "lower --batch_size or --global_batch_size"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and the step to start at (resume inside an epoch)."""
        self.epoch, self.first_step = epoch, first_step

    @property
    def steps_per_epoch(self) -> int:
        return self.steps_in(0)

    def steps_in(self, epoch: int) -> int:
        if epoch not in self._counts:
            self._counts[epoch] = len(self._steps(epoch)[1])
        return self._counts[epoch]

    def steps_before(self, epoch: int) -> int:
        return sum(self.steps_in(e) for e in range(epoch))

    def __len__(self) -> int:
        return (self.steps_in(self.epoch) - self.first_step) * self.accumulation

    def _chunks(self, rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Every dialogue cut into chunks, at a place drawn anew each epoch.

        The first chunk is at least as long as the remainder of turns / context, which keeps the
        number of chunks constant.
        """
        chunks = []
        for rows in self.dialogues:
            first = rng.integers((len(rows) - 1) % self.context + 1, self.context + 1)
            cuts = [0, *range(first, len(rows), self.context), len(rows)]
            chunks += [tuple(rows[a:b]) for a, b in itertools.pairwise(cuts)]
        return chunks

    def _steps(self, epoch: int) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
        """(chunks, indices into them per step, in the order of training)."""
        rng = np.random.default_rng((self.seed, epoch))
        chunks = self._chunks(rng)
        longest = np.array([max(self.lengths[row] for row in chunk) for chunk in chunks])
        order = rng.permutation(len(chunks))
        blurred = longest * rng.uniform(1 - self.BLUR, 1 + self.BLUR, len(chunks))
        if self.budget is None:
            size = self.chunks_per_batch * self.micro_batches
            order = order[: len(order) // size * size]
        else:  # on average
            size = int(self.budget * self.micro_batches / (longest.mean() * self.context))
        window = max(1, size * min(self.WINDOW, math.ceil(len(order) / size / 2)))
        steps, rest = [], order[:0]
        for part in np.split(order, range(window, len(order), window)):
            part = np.concatenate((rest, part[np.argsort(blurred[part], kind="stable")]))
            while count := self._fitting(longest[part]):
                steps.append(part[:count])
                part = part[count:]
            rest = part
        return chunks, [steps[i] for i in rng.permutation(len(steps))]

    def _fitting(self, longest: np.ndarray) -> int:
        """How many of the chunks, about in order of length, make a step; 0 = too few are left."""
        if self.budget is None:
            count = self.chunks_per_batch * self.micro_batches
            return count if count <= len(longest) else 0
        counts = np.arange(self.micro_batches, len(longest) + 1, self.micro_batches)
        if not len(counts):
            return 0
        padded = counts // self.micro_batches * self.context
        padded = padded * np.maximum.accumulate(longest)[counts - 1]
        return int(counts[max(0, np.searchsorted(padded, self.budget, side="right") - 1)])

    def __iter__(self) -> Iterator[BatchSpec]:
        chunks, steps = self._steps(self.epoch)
        longest = np.array([max(self.lengths[row] for row in chunk) for chunk in chunks])
        for step in steps[self.first_step :]:
            step = step[np.argsort(longest[step], kind="stable")]
            step_size = sum(len(chunks[i]) for i in step)
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
    mine = []
    for batch in sorted(batches, key=lambda b: -len(b) * int(lengths[b[0]])):
        lightest = load.index(min(load))
        load[lightest] += len(batch) * int(lengths[batch[0]])
        if lightest == rank:
            mine.append(BatchSpec(tuple((row,) for row in batch)))
    return mine


# ---------------------------------------------------------------------------------------------
# A fold of a corpus


@dataclass(frozen=True)
class InputShape:
    """Sizes of the inputs that the flags alone do not tell."""

    speaker_dim: int  # width of the speaker vectors; 0 = none
    frame_dim: int  # width of the feature files; 0 = none
    length: int  # samples of the longest utterance, or frames where features are read
    rate: float  # samples or frames per second


@dataclass
class Fold:
    """One fold of a corpus, ready to be batched."""

    corpus: Corpus
    splits: dict[str, np.ndarray]  # train, dev, test: rows of the corpus
    dataset: Batches
    dialogs: list[str]  # of every row
    labels: torch.Tensor  # (N, 2) in [0, 1]
    shape: InputShape

    def in_label_scale(self, preds: torch.Tensor) -> torch.Tensor:
        """Predictions (n, 2) in [0, 1] in the units of the labels."""
        low, high = self.corpus.label_range
        return low + (high - low) * preds

    def plan_batches(self, args: argparse.Namespace, rank: int, world_size: int) -> TrainPlan:
        """The train split's batches of this rank."""
        return TrainPlan(
            lengths=self.dataset.lengths,
            rows=self.splits["train"],
            dialogs=self.dialogs,
            batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            context=args.context,
            rank=rank,
            world_size=world_size,
            seed=args.seed,
        )

    def speakers(self, split: str) -> list[str]:
        return [self.corpus.utterances[row].speaker for row in self.splits[split]]


def load_fold(args: argparse.Namespace) -> Fold:
    """The corpus, its splits for --fold and the inputs of the model; builds missing caches.

    Nothing is normalised here: the model's normaliser sees the train split alone.
    """
    label_range = tuple(args.label_range) if args.label_range else None
    corpus = read_corpus(args.data, args.data_dir, label_range, Path(args.cache_dir))
    corpus, pack = load_audio(corpus, args.cache_dir)
    features = prosody = speaker = None
    if args.features_dir:
        features = FrameFeatures(corpus, args.features_dir)
    if args.prosody == "egemaps":
        prosody = egemaps(corpus, pack, args.cache_dir)
    if args.speaker != "none" and not args.no_film:
        speaker = speaker_embeddings(corpus, pack, args.speaker, args.cache_dir)
    dataset = Batches(
        labels=corpus.labels(TARGETS),
        pack=None if features else pack,
        features=features,
        prosody=prosody,
        speaker=speaker,
        max_seconds=args.max_seconds,
        augment=args.augment,
        seed=args.seed,
    )
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
        ),
    )


# ---------------------------------------------------------------------------------------------
# python data.py


def bars(values: np.ndarray, lo: float, hi: float) -> list[str]:
    """Nine lines of a histogram; the bins are centred on lo, ..., hi."""
    half = (hi - lo) / 16
    counts, _ = np.histogram(values, bins=9, range=(lo - half, hi + half))
    bins = zip(np.linspace(lo, hi, 9), counts)
    return [f"{centre:6.2f} {n:6d} {'#' * round(30 * n / counts.max())}" for centre, n in bins]


def inspect(args: argparse.Namespace) -> None:
    """Print what a careful person wants to know before training. UserError: do not train."""
    corpus = read_corpus(args.data, args.data_dir, args.label_range, args.cache_dir)
    corpus, pack = load_audio(corpus, args.cache_dir, most_bad=1.0)
    if args.skipped:
        write_skipped(Path(args.skipped), corpus)
    print("".join(f"note        {note}\n" for note in corpus.notes), end="")
    print(f"skipped     {len(corpus.skipped)}")
    for kind, skipped in skipped_by_kind(corpus).items():
        few = f"{', '.join(s.utt_id for s in skipped[:5])}{' ...' * (len(skipped) > 5)}"
        print(f"            {kind}: {len(skipped)} ({few})")
    check_skipped(corpus)
    utterances, seconds = corpus.utterances, corpus.seconds
    turns = Counter(u.dialog for u in utterances).values()
    speakers = {u.speaker for u in utterances if known_speaker(u.speaker)}
    p5, p50, p95 = np.percentile(seconds, [5, 50, 95])
    print(f"corpus      {corpus.name} in {corpus.root}")
    print(f"utterances  {len(utterances)}, {seconds.sum() / 3600:.2f} h, {len(speakers)} speakers")
    print(f"dialogues   {len(turns)} of {min(turns)} to {max(turns)} turns")
    print(
        f"seconds     mean {seconds.mean():.2f}, p5 {p5:.2f}, p50 {p50:.2f}, p95 {p95:.2f}, ",
        end="",
    )
    print(f"min {seconds.min():.2f}, max {seconds.max():.2f}")
    for title, attribute in (("genders", "gender"), ("emotions", "emotion")):
        counts = Counter(getattr(u, attribute) or "-" for u in utterances).most_common(12)
        print(f"{title:<12}{', '.join(f'{name} {n}' for name, n in counts)}")
    print(f"audio pack  {pack.directory}, {pack.lengths.sum() * 2 / 2**20:.0f} MiB")

    lo, hi = corpus.label_range
    labels = np.array([[getattr(u, label) for label in LABELS] for u in utterances])  # (N, 2)
    titles = [f"{LABELS[0]}, labels in {lo:g}..{hi:g}", *LABELS[1:]]
    print()
    for cells in [titles, *zip(*(bars(values, lo, hi) for values in labels.T))]:
        print("".join(f"{cell:<46}" for cell in cells).rstrip())
    for name, values in zip(LABELS, labels.T):
        print(f"{name} mean {values.mean():.2f}, standard deviation {values.std():.2f}")
        if values.std() == 0:
            raise UserError(f"{corpus.name}: {name} is {values[0]:g} everywhere, nothing to learn")
    for (one, x), (two, y) in itertools.combinations(zip(LABELS, labels.T), 2):
        print(f"correlation of {one} and {two} {np.corrcoef(x, y)[0, 1]:+.2f}")
    if args.features_dir:
        features = FrameFeatures(corpus, args.features_dir)
        frames = sum(len(features.read(row)) for row in range(len(utterances)))  # finds NaN
        print(f"features    {frames} frames, {features.dim} wide, all finite")
    for fold in [args.fold] if args.fold is not None else range(1, num_folds(corpus) + 1):
        print(f"\nfold {fold}\n{describe_splits(corpus, make_splits(corpus, fold))}")


def extract_faces(args: argparse.Namespace) -> None:
    """Images of each utterance -> OUT/<utt_id>.npy (T, D) float32, in the order of file names.

    Resumable: existing files are kept; OUT/extract.json holds the weights' hash, so that two
    models are never mixed. Frames of --video_dir are resized and centre-cropped as the model's
    processor does, no face is searched; crops of --face_dir are taken whole at 224 pixels.
    """
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folders: dict[str, Path] = {}
    for base in filter(None, (args.video_dir, args.face_dir)):  # the later one wins
        if not Path(base).is_dir():
            raise UserError(f"{base} is not a directory (--video_dir, --face_dir)")
        folders |= {p.name: p for p in Path(base).iterdir() if p.is_dir()}
    wanted = sorted(folders)
    if args.data:
        corpus = read_corpus(args.data, args.data_dir, args.label_range, args.cache_dir)
        wanted = [u.utt_id for u in corpus.utterances]
    images = {utt_id: image_files(folders.get(utt_id)) for utt_id in wanted}
    empty = [utt_id for utt_id, files in images.items() if not files]
    if empty or not images:
        fault = f"{len(empty)} of {len(images)} utterances have no .jpg or .png in a folder of"
        raise UserError(
            f"{fault} their name below --video_dir or --face_dir ({', '.join(empty[:3])})"
        )
    try:
        options = {"trust_remote_code": False}
        processor = AutoImageProcessor.from_pretrained(args.vision_model, **options)
        model = AutoModel.from_pretrained(args.vision_model, **options).to(args.device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--vision_model {args.vision_model}: cannot be loaded ({error})") from None
    out = Path(args.features_dir)
    out.mkdir(parents=True, exist_ok=True)
    made_by = json.dumps([weights_digest(model), processor.to_json_string()])
    stamp = out / "extract.json"
    if stamp.exists() and stamp.read_text() != made_by:
        raise UserError(f"{out} holds features of another model: choose another --features_224_dir")
    stamp.write_text(made_by)

    def embed(files: list[Path], whole: bool) -> torch.Tensor:
        pictures = [Image.open(path).convert("RGB") for path in files]
        if whole:
            pictures = [picture.resize((224, 224)) for picture in pictures]
        options = {"do_resize": False, "do_center_crop": False} if whole else {}
        pixels = processor(pictures, return_tensors="pt", **options)["pixel_values"]
        output = model(pixel_values=pixels.to(args.device))
        hidden = output.last_hidden_state  # (B, 1 + patches, D), or (B, D, H, W) of a CNN
        return hidden[:, 0] if hidden.ndim == 3 else output.pooler_output.flatten(1)  # (B, D)

    todo = [utt_id for utt_id in wanted if not (out / f"{utt_id}.npy").exists()]
    for utt_id in progress(todo, len(todo), "faces"):
        whole = bool(args.face_dir) and folders[utt_id].parent == Path(args.face_dir)
        files = images[utt_id]
        parts = [files[i : i + args.batch_size] for i in range(0, len(files), args.batch_size)]
        with torch.inference_mode(), replacing(out / f"{utt_id}.npy") as file:
            np.save(file, torch.cat([embed(part, whole) for part in parts]).float().cpu().numpy())
    print(f"{out}: {len(todo)} files written, {len(wanted) - len(todo)} were there")


def image_files(folder: Path | None) -> list[Path]:
    """.jpg, .jpeg and .png files of a folder, frame 10 after frame 9."""
    found = folder.iterdir() if folder else []
    found = [p for p in found if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return sorted((p for p in found if p.name[0] != "."), key=lambda p: natural(p.name))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    faces = argv[:1] == ["extract-faces"]
    parser = argparse.ArgumentParser(
        description="frame features from images" if faces else "inspect a corpus"
    )
    add = parser.add_argument
    add("--data", required=not faces, help="demo, iemocap, msp_podcast, or a .csv")
    add("--data_dir", help="root of the corpus, or of a CSV's relative paths")
    add("--label_range", nargs=2, type=float, metavar=("LO", "HI"), help="scale of the labels")
    add("--cache_dir", default="cache", help="where caches are kept")
    if faces:
        add("--video_dir", help="frames: VIDEO_DIR/<utt_id>/*.jpg or *.png")
        add("--face_dir", help="224-pixel crops, laid out alike; wins over --video_dir")
        add("--features_224_dir", "--features_dir", dest="features_dir", required=True)
        add("--vision_model", default="facebook/dinov2-base", help="hub name or local directory")
        add("--batch_size", type=int, default=32, help="images per forward")
        add("--device", default="cpu", help="torch device")
    else:
        add("--fold", type=int, help="print only this fold (default: all)")
        add("--features_dir", help="check frame features too")
        add("--skipped", metavar="CSV", help="write utterances left out, and why, into this file")
    args = parser.parse_args(argv[faces:])
    args.command = extract_faces if faces else inspect
    args.label_range = tuple(args.label_range) if args.label_range else None
    if faces and not (args.video_dir or args.face_dir):
        parser.error("give --video_dir, --face_dir, or both")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        args.command(args)
    except (UserError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
