"""The demo corpus: synthesised speech of ten speakers in IEMOCAP's layout, with known emotion.

Pitch, level, tempo, tilt and jitter follow valence and arousal; each speaker has another voice, so
that a model must learn the cues and not the speakers. No data, no download.

References: vowel formants (Peterson & Barney 1952).
"""

import wave
from collections import Counter
from pathlib import Path

import numpy as np

from corpora.base import Corpus
from corpora.iemocap import read_iemocap
from util.files import build_dir, progress_bar

RATE = 16_000  # Hz of the files
DEMO_VERSION = 4  # raise it with every change below: it is the cache key
# formants 1-3 in Hz of men's /a i u e o/ [Peterson & Barney 1952]
VOWELS = np.array(
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]],
    dtype=np.float64,
)


def read_demo(cache_dir: Path, label_range: tuple[float, float] | None) -> Corpus:
    """The demo corpus, synthesised on first use."""
    root = build_dir(cache_dir / f"demo-v{DEMO_VERSION}", write_demo)
    return read_iemocap(root, label_range or (1.0, 5.0), "demo")


def synthesise(
    voice: dict[str, float],
    valence: float,
    arousal: float,
    seconds: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """(L,) float32 speech-like babble; valence and arousal in about [-1, 1].

    Arousal moves pitch level, loudness, tempo and spectral tilt; valence moves the pitch contour
    (rising or falling, wide or flat), the formants (a smile shortens the tract) and jitter.
    Noise is added to every cue.
    """

    def cue(x: float) -> float:
        return x + 0.2 * float(rng.standard_normal())

    hop, fft = 128, 512
    length = int(seconds * RATE)
    t = np.arange(0, length, hop) / RATE  # (T,) frame times
    # syllables and pauses
    tempo = voice["tempo"] * 2 ** (0.45 * cue(arousal))
    count = max(2, round(seconds * tempo * 0.9))
    durations = np.exp(0.25 * rng.standard_normal(count))
    durations[-1] *= 1.5  # final lengthening
    pauses = np.where(rng.random(count) < 0.12, rng.uniform(0.4, 1.2, count), 0.0)
    ends = np.cumsum(durations + pauses)
    starts, voiced_ends, scale = ends - durations - pauses, ends - pauses, seconds / ends[-1]
    syllable = np.searchsorted(ends * scale, t, side="right").clip(0, count - 1)
    phase = (t / scale - starts[syllable]) / (voiced_ends - starts)[syllable]  # above 1 = pause
    loudness = np.exp(0.2 * rng.standard_normal(count))
    vowel = np.sin(np.pi * phase.clip(0, 1)) ** 0.7 * loudness[syllable]
    fricative = ((phase < 0.2) * (rng.random(count) < 0.5)[syllable]).astype(np.float64)
    # pitch in semitones, then pulses with jitter and shimmer
    smile = cue(valence)
    accents = np.interp(t, (starts + 0.4 * durations) * scale, rng.standard_normal(count))
    semitones = (
        5.0 * cue(arousal)
        + 4.0 * cue(valence) * (2 * t / seconds - 1)
        + 2.0 * cue(valence) * (phase.clip(0, 1) - 0.5)
        + 1.6 * 2 ** (1.0 * cue(valence)) * accents
    )
    f0 = np.interp(np.arange(length) / RATE, t, voice["f0"] * 2 ** (semitones / 12))
    cycles = np.cumsum(f0.clip(60, 600)) / RATE
    pulses = np.interp(np.arange(1, int(cycles[-1])), cycles, np.arange(length))
    jitter = 0.012 * 2 ** (-2.0 * cue(valence))
    pulses += jitter * rng.standard_normal(len(pulses)) * RATE / voice["f0"]
    pulses = pulses.clip(0, length - 2)
    heights = 1 + 3 * jitter * rng.standard_normal(len(pulses))
    whole = pulses.astype(np.int64)
    source = np.bincount(whole, heights * (1 - pulses + whole), length)
    source += np.bincount(whole + 1, heights * (pulses - whole), length)
    # vocal tract: resonances per frame, applied to the short-time spectrum
    f = np.fft.rfftfreq(fft, 1 / RATE)[None] + 1  # (1, F)
    tilt = voice["tilt"] - 0.65 * cue(arousal)
    response = np.tile((1 + f / 300) ** -tilt, (len(t), 1))  # (T, F)
    targets = VOWELS[rng.integers(0, len(VOWELS), count)]
    middles = (starts + 0.5 * durations) * scale
    for k, bandwidth in enumerate((70, 90, 130, 200)):
        track = np.interp(t, middles, targets[:, k]) if k < 3 else np.full(len(t), 3500.0)
        formant = (track * voice["tract"] * (1 + 0.1 * smile))[:, None]
        response *= formant**2 / np.hypot(formant**2 - f**2, f * bandwidth)
    breath = 0.02 * rng.standard_normal(length)
    speech = filter_frames(source + breath, response * vowel[:, None], hop, fft)
    noise = rng.standard_normal(length)
    hiss = filter_frames(noise, fricative[:, None] * (f / 8000) ** 2, hop, fft)
    speech = speech / np.sqrt(np.mean(speech**2)) + 0.3 * hiss
    gain = 10 ** ((voice["level"] + 5 * cue(arousal) - 28) / 20)
    room = 10 ** (-62 / 20) * rng.standard_normal(length)
    return np.tanh(gain * speech + room).astype(np.float32)


def filter_frames(audio: np.ndarray, response: np.ndarray, hop: int, fft: int) -> np.ndarray:
    """(L,) filtered by a spectrum per frame, response (T, fft / 2 + 1); windowed overlap-add."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft) / fft)
    padded = np.pad(audio, (fft // 2, fft + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, fft)[::hop][: len(response)]
    frames = np.fft.irfft(np.fft.rfft(frames * window) * response, fft)  # (T, fft)
    out = np.zeros((len(response) + fft // hop) * hop)
    for k in range(fft // hop):
        out[k * hop : (k + len(response)) * hop] += frames[:, k * hop : (k + 1) * hop].ravel()
    return out[fft // 2 : fft // 2 + len(audio)]


def write_demo(root: Path) -> None:
    """5 sessions, each with a woman and a man and 10 dialogues of 10-14 turns."""
    dialogues = [(session, i) for session in range(1, 6) for i in range(10)]
    for session, i in progress_bar(dialogues, len(dialogues), "demo corpus"):
        rng = np.random.default_rng((DEMO_VERSION, session, i))
        dialog = f"Ses{session:02d}{'FM'[i % 2]}_impro{i // 2 + 1:02d}"
        wavs = root / f"Session{session}" / "sentences" / "wav" / dialog
        wavs.mkdir(parents=True)
        table = root / f"Session{session}" / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
        table.parent.mkdir(parents=True, exist_ok=True)
        entries, clock, numbers = [], 5.0, Counter[str]()
        mood = rng.uniform(-0.9, 0.9, 2)  # valence, arousal
        for turn in range(rng.integers(10, 15)):
            letter = "FM"[(turn + i) % 2]
            mood = (0.9 * mood + 0.3 * rng.standard_normal(2)).clip(-1, 1)
            valence, arousal = (mood + 0.3 * rng.standard_normal(2)).clip(-1, 1)
            seconds = float(np.exp(0.8 + 0.45 * rng.standard_normal()).clip(1, 6))
            utt_id = f"{dialog}_{letter}{numbers[letter]:03d}"
            numbers[letter] += 1
            audio = synthesise(demo_voice(session, letter), valence, arousal, seconds, rng)
            # not by soundfile, whose callbacks lose a full disk's error and a signal's exception
            wide = np.rint(audio.astype(np.float64) * 2**31).clip(-(2**31), 2**31 - 1)
            with wave.open(str(wavs / f"{utt_id}.wav"), "wb") as wav:
                wav.setparams((1, 2, RATE, 0, "NONE", ""))
                wav.writeframes((wide.astype(np.int64) >> 16).astype("<i2").tobytes())
            raters = rng.choice([2, 3], p=[0.7, 0.3])
            truth = 3 + 1.8 * np.array([valence, arousal, 0.6 * arousal + 0.2 * valence])
            votes = np.round(truth + 0.5 * rng.standard_normal((raters, 3))).clip(1, 5)
            word = ("ang" if valence < 0 else "hap") if arousal > 0 else "sad"
            word = "neu" if abs(valence) + abs(arousal) < 0.6 else word
            word = "xxx" if rng.random() < 0.25 else word  # raters without a majority
            means = ", ".join(f"{x:.4f}" for x in votes.mean(axis=0))
            lines = [f"[{clock:.4f} - {clock + seconds:.4f}]\t{utt_id}\t{word}\t[{means}]"]
            lines += [f"C-E{k}:\t{word};\t()" for k in range(2, 5)]
            lines += [
                f"A-E{k}:\tval {v:.0f}; act {a:.0f}; dom  {d:.0f};\t()"
                for k, (v, a, d) in enumerate(votes, 1)
            ]
            entries.append((utt_id, "\n".join(lines)))
            clock += seconds + rng.uniform(-0.3, 0.8)  # turns may overlap
        header = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        table.write_text(header + "\n\n".join(text for _, text in sorted(entries)) + "\n")


def demo_voice(session: int, letter: str) -> dict[str, float]:
    """The same voice in every dialogue of the session."""
    rng = np.random.default_rng((DEMO_VERSION, session, ord(letter)))
    woman = letter == "F"
    return {
        "f0": (205 if woman else 115) * rng.uniform(0.93, 1.07),  # Hz at rest
        "tract": (1.15 if woman else 1.0) * rng.uniform(0.96, 1.04),  # on all formants
        "tempo": 4.2 * rng.uniform(0.9, 1.1),  # syllables per second
        "level": rng.uniform(-2, 2),  # dB
        "tilt": 1.5 + rng.uniform(-0.06, 0.06),  # spectrum falls with this power of frequency
    }
