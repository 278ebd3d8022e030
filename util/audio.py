"""Decoding of one sound file: 16 kHz mono int16 of any format, or the reason why not.

What happens to each kind of odd or broken file is one table: tests/test_input_faults.py.
"""

import errno
import functools
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np
import soundfile
import soxr

from util.files import described

VERSION = 6  # raise it with every change of decode: it is part of the cache key
SAMPLE_RATE = 16_000
MIN_SAMPLES = 400  # WavLM's CNN needs this many; shorter clips are zero-padded to it
MAX_CLIP_SECONDS = 600  # a longer clip is taken for a forgotten start/end [guess]
RATES = (4_000, 384_000)  # Hz; a header that says anything else is taken for a damaged one [guess]
MAX_MISSING = 0.1  # share of a clip's samples; the label may belong to what is lost [guess]
NO_DECODER = "needs the program ffmpeg or the package torchcodec"  # how such a reason begins

# How files begin that libsndfile does not know: mp4, m4a, mov and 3gp; webm and mkv; avi; flv; wma;
# amr; aac; ac3; wv; ape; tta; mpc; mpeg. Nothing else is handed on: a playlist names other files.
FOREIGN = re.compile(
    rb".{4}(ftyp|moov|mdat|free|skip|wide)|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01|0&\xb2u|#!AMR"
    rb"|\xff[\xf0\xf1\xf8\xf9]|ADIF|\x0bw|wvpk|MAC |TTA1|MP\+|MPCK|\x00\x00\x01\xba|G.{187}G",
    re.DOTALL,
)


def check_header(text: str) -> tuple[float, str, list[str]]:
    """(promised length / length found, reason to skip or "", notes), from libsndfile's log.

    libsndfile believes a header or cuts it to the file, in silence. RIFF, W64, RF64, AIFF and AU
    are seen here; other formats do not open, or come out short when they are read.
    """
    notes = []
    pair = r"(?:data|riff|Riff size|SSND|Data Size) *: (\d+) \(should be (\d+)\)"
    promise = re.search(pair, text)
    says, has = map(int, promise.groups()) if promise else (1, 1)
    if not promise and "Exiting parser" in text:  # samples behind their chunk, or a broken chunk
        chunk = re.search(r"Length : (\d+)\n(?:.*\n)*data : (\d+)\n", text)
        if chunk and int(chunk[2]) < (1 - MAX_MISSING) * int(chunk[1]):
            says, has = int(chunk[1]), int(chunk[2])
    if says > 2**31 - 2**20:  # written into a pipe: its length was not known yet
        notes.append("no length in its header, kept")
        says = has
    names = ("Channels", "Sample Rate", "Block Align", "Bit Width", "Bytes/sec")
    lines = "".join(rf"  {name} +: (\d+).*\n" for name in names)
    wav = re.search(r"=> WAVE_FORMAT_PCM\n" + lines, text)
    if wav:
        channels, rate, align, bits, bytes_per_second = map(int, wav.groups())
        frame = channels * math.ceil(bits / 8)
        if align != frame:
            return 1.0, f"header contradicts itself ({align} or {frame} bytes per frame)", []
        if bytes_per_second != rate * frame:
            notes.append("header contradicts itself on bytes per second, kept")
    return says / max(has, 1), "", notes


def decode(
    path: Path, start: float = 0.0, end: float | None = None
) -> tuple[np.ndarray, str, list[str]]:
    """(int16 mono samples at SAMPLE_RATE, "", what was changed) or (no samples, reason, [])."""
    nothing = np.zeros(0, dtype=np.int16)
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return nothing, "no such file, or not a regular one", []
        if not os.access(path, os.R_OK):
            return nothing, "no permission to read it", []
        with soundfile.SoundFile(os.fsencode(path)) as file:
            rate, frames = file.samplerate, file.frames
            text = file.extra_info[len(f"File : {path}") :]  # a name could hold anything
            promised, reason, changes = check_header(text)
            if not RATES[0] <= rate <= RATES[1]:
                reason = f"sample rate outside {RATES[0]}..{RATES[1]} Hz ({rate})"
            first = round(start * rate)
            wanted = round(promised * frames if end is None else end * rate)
            last = min(wanted, frames)
            if last <= first:
                reason = reason or f"no samples (from {start:g} s on, of {frames / rate:.2f} s)"
            elif last - first > MAX_CLIP_SECONDS * rate:
                reason = reason or f"longer than {MAX_CLIP_SECONDS} s: give start and end"
            if reason:
                return nothing, reason, []
            file.seek(first)
            audio = file.read(last - first, dtype="float32", always_2d=True)  # (L, channels)
    # TypeError: a .raw file
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        wav, how = foreign_wav(path)
        if wav:
            samples, reason, changes = decode(Path(wav.name), start, end)
            return samples, reason, [] if reason else [how, *changes]
        return nothing, how or f"cannot be decoded ({str(error).split(': ')[-1]})", []
    missing = 1 - len(audio) / (wanted - first)
    if missing > MAX_MISSING:
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


def header_seconds(path: Path, start: float = 0.0, end: float | None = None) -> float:
    """About how long the decoded clip will be; 0 if libsndfile does not know the file."""
    try:
        if end is None:
            end = soundfile.info(os.fsencode(path)).duration if path.is_file() else start
    except (soundfile.SoundFileError, OSError, TypeError):
        end = start
    return min(max(0.0, end - start), MAX_CLIP_SECONDS)


def seconds_of(path: Path) -> float:
    """Duration of a file, or 0 if it cannot be decoded."""
    try:
        return soundfile.info(os.fsencode(path)).duration
    except (soundfile.SoundFileError, OSError, TypeError):
        wav, _ = foreign_wav(path)
        return soundfile.info(wav.name).duration if wav else 0.0


# ---------------------------------------------------------------------------------------------
# Formats that libsndfile does not know


@functools.cache  # a package that breaks takes its time, every time
def torchcodec() -> tuple[ModuleType | None, str]:
    """(torchcodec.decoders, ""), or (None, why not)."""
    try:
        from torchcodec import decoders
    except ModuleNotFoundError:
        return None, NO_DECODER
    except Exception as error:  # built for another torch, it raises anything
        return None, f"{NO_DECODER}, which does not work ({described('torchcodec', error)})"
    return decoders, ""


def foreign_decoder() -> str:
    """What is installed that decodes FOREIGN files, or ""."""
    return shutil.which("ffmpeg") or ("torchcodec" if torchcodec()[0] else "")


def foreign_wav(path: Path) -> tuple[IO | None, str]:
    """(temporary .wav of a FOREIGN file, how it was made), or (None, why not); "" of others.

    The .wav, in $TMPDIR, is deleted when it is neither in use nor among the last that were made.
    """
    try:
        stat = path.stat()
        with open(path, "rb") as file:
            known = FOREIGN.match(file.read(256))
    except OSError:
        known = None
    return convert(path, stat.st_size, stat.st_mtime_ns) if known else (None, "")


@functools.lru_cache(maxsize=8)  # utterances of one recording come one after the other
def convert(path: Path, size: int, mtime: int) -> tuple[IO | None, str]:
    """foreign_wav of a file that has this size and time of the last change."""
    wav = tempfile.NamedTemporaryFile(prefix="vatune-", suffix=".wav")  # noqa: SIM115 returned
    program = shutil.which("ffmpeg")
    reason = by_ffmpeg(program, path, wav) if program else by_torchcodec(path, wav)
    if reason:
        return None, reason
    return wav, f"decoded by {'ffmpeg' if program else 'torchcodec'}"


def by_ffmpeg(program: str, path: Path, wav: IO) -> str:
    """Fills the .wav; the reason why it could not."""
    source = ["-nostdin", "-nostats", "-protocol_whitelist", "file", "-i", f"file:{path}"]
    target = ["-map", "0:a:0", "-c:a", "pcm_s16le", "-rf64", "auto", "-y", wav.name]
    try:
        done = subprocess.run([program, *source, *target], capture_output=True)
    except OSError as error:
        return f"cannot be decoded (ffmpeg: {error.strerror})"
    said = done.stderr.decode(errors="replace")
    if "matches no streams" in said:
        return "cannot be decoded (there is no audio in it)"
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())
    if done.returncode:
        return f"cannot be decoded (ffmpeg: {(said.splitlines() or ['no message'])[-1]})"
    duration = re.search(r"Duration: (\d+):(\d+):(\d+\.\d+)", said)
    if duration and re.search("partial file|ended prematurely", said):
        hours, minutes, seconds = map(float, duration.groups())
        return missing_of(wav, 3600 * hours + 60 * minutes + seconds)
    return ""


def by_torchcodec(path: Path, wav: IO) -> str:
    """Fills the .wav; the reason why it could not."""
    decoders, reason = torchcodec()
    if decoders is None:
        return reason
    try:
        decoder = decoders.AudioDecoder(path)
        samples = decoder.get_all_samples()
    except (RuntimeError, OSError, ValueError) as error:
        fault = str(error).partition("\n")[0][:120]
        if "libtorchcodec" in fault:  # without FFmpeg's libraries it breaks when it is first used
            return f"{NO_DECODER}, which does not work ({fault})"
        return f"cannot be decoded (torchcodec: {fault})"
    soundfile.write(wav.name, samples.data.numpy().T, samples.sample_rate, "PCM_16")
    return missing_of(wav, decoder.metadata.duration_seconds_from_header or 0.0)


def missing_of(wav: IO, seconds: float) -> str:
    """The reason to skip a recording of so many seconds if too few of them are in the .wav."""
    missing = 1 - soundfile.info(wav.name).duration / max(seconds, 1e-3)
    return f"samples missing ({100 * missing:.0f} %)" if missing > MAX_MISSING else ""
