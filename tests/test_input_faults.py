"""Odd and broken input, each kind made for real, with its outcome: FAULTS is the specification.

    python -m pytest tests/test_input_faults.py             # the table, 200 mutations per format
    python -m pytest tests/test_input_faults.py -m slow     # 2,800 more per format

Outcomes: KEPT (odd, but means what it says), FIXED (counted in corpus.notes), SKIPPED (named in
corpus.skipped with a reason), REFUSED (UserError with file and row, nothing is read). Audio of a
manifest is skipped where the file is broken and refused where the manifest is.
"""

import ast
import contextlib
import csv
import faulthandler
import functools
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import wave
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import soundfile

import corpora
import data
import predict
import train
from data import SAMPLE_RATE
from util import audio, files
from util.files import UserError

KEPT, FIXED, SKIPPED, REFUSED = "kept", "fixed", "skipped", "refused"
REPO = Path(data.__file__).parent
SECONDS = 1.0  # of the tone that every audio fault starts from


@pytest.fixture(autouse=True)
def nothing_hangs():
    """Ends the whole run with a traceback when one test takes longer than two minutes."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def tone(rate=SAMPLE_RATE, seconds=SECONDS):
    return 0.3 * np.sin(2 * np.pi * 200 * np.arange(int(seconds * rate)) / rate)


# ---------------------------------------------------------------- how audio faults are made


def sound(name="x.wav", samples=None, rate=SAMPLE_RATE, **options):
    """A maker of one sound file; it returns the cell `path` of its row in the manifest."""

    def make(root):
        soundfile.write(root / name, tone(rate) if samples is None else samples, rate, **options)
        return name

    return make


def cut(name, share, **options):
    """The beginning of a valid file."""

    def make(root):
        sound(name, **options)(root)
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: int(len(whole) * share)])
        return name

    return make


def hole(name):
    """A valid file with zeros in its middle."""

    def make(root):
        sound(name)(root)
        whole = bytearray((root / name).read_bytes())
        middle = len(whole) // 2
        whole[middle : middle + 300] = bytes(300)
        (root / name).write_bytes(whole)
        return name

    return make


def header(*patches, tail=b"", length=None):
    """A 16-bit wav with (offset, struct format, value) written over its 44 bytes of header."""

    def make(root):
        sound()(root)
        whole = bytearray((root / "x.wav").read_bytes())
        for offset, kind, value in patches:
            struct.pack_into(kind, whole, offset, value)
        (root / "x.wav").write_bytes(bytes(whole)[:length] + tail)
        return "x.wav"

    return make


def raw(content, name="x.wav"):
    def make(root):
        (root / name).write_bytes(content)
        return name

    return make


def link(target):
    def make(root):
        sound("real.wav")(root)
        sound("../outside.wav")(root)
        (root / "x.wav").symlink_to(target)
        return "x.wav"

    return make


def place(make_it):
    """Something that is not a regular file where the audio should be."""

    def make(root):
        make_it(root / "x.wav")
        return "x.wav"

    return make


def locked(mode_of_file, mode_of_folder):
    def make(root):
        (root / "sub").mkdir()
        sound("sub/x.wav")(root)
        os.chmod(root / "sub" / "x.wav", mode_of_file)
        os.chmod(root / "sub", mode_of_folder)
        return "sub/x.wav"

    return make


def times(start, end, make=None):
    """(cell path, cell start, cell end)"""
    return lambda root: ((make or sound())(root), start, end)


def one_bad(value):
    samples = tone()
    samples[5000] = value
    return samples


NAMES = (
    "ünïcödé 語.wav",
    "two  spaces.wav",
    "it's \"; touch x; $(touch x) `touch x`.wav",
    "%s,-r.wav",
)
STEREO = np.c_[tone(), tone()]
RATE, BYTES_PER_SECOND, CHANNELS, CODEC, ALIGN, BITS, DATA = 24, 28, 22, 20, 32, 34, 40  # offsets

SUBTYPES = ("PCM_U8", "PCM_24", "FLOAT", "ULAW", "IMA_ADPCM")
CONTAINERS = ("w64", "rf64", "aiff", "au")  # which say how long they are
RATES = (4_000, 11_025, 44_100, 192_000)

VIDEO = ("cannot be decoded (ffmpeg", "needs the program ffmpeg")  # with ffmpeg, and without
AUDIO = [
    # valid, if rare: read as they are
    *((x, sound(subtype=x), KEPT, "") for x in SUBTYPES),
    *((x, sound(f"x.{x}"), KEPT, "") for x in ("flac", "ogg", "mp3", *CONTAINERS, "caf")),
    ("wav extensible", sound(format="WAVEX"), KEPT, ""),
    ("opus", sound("x.ogg", format="OGG", subtype="OPUS"), KEPT, ""),
    ("flac named wav", sound("x.wav", format="FLAC"), KEPT, ""),
    ("no suffix", sound("x", format="WAV"), KEPT, ""),
    *((f"name {name}", sound(name), KEPT, "") for name in NAMES),
    ("name like a header", sound("=> WAVE_FORMAT_PCM data : 9 (should be 1).flac"), KEPT, ""),
    ("speech on a constant", sound(samples=tone() + 0.2), KEPT, ""),
    ("one byte too many", header(tail=b"x"), KEPT, ""),
    ("broken chunk after the samples", header(tail=b"LIST\xff\xff\0\0junk"), KEPT, ""),
    ("link inside the data root", link("real.wav"), KEPT, ""),
    ("times of NaN", times("nan", "NaN"), KEPT, ""),
    # mended and counted
    ("stereo", sound(samples=STEREO), FIXED, "mixed to mono from 2 channels"),
    ("opposite phases", sound(samples=STEREO * [1, -1]), FIXED, "the first one taken"),
    *((f"{x} Hz", sound(rate=x), FIXED, f"resampled from {x} Hz") for x in RATES),
    ("float of 1.5", sound(samples=tone() * 5, subtype="FLOAT"), FIXED, "above full scale"),
    ("overdriven", sound(samples=(tone() * 9).clip(-1, 1)), FIXED, "clipped when it was recorded"),
    *((f"{n} samples", sound(samples=tone()[:n]), FIXED, "padded to 400") for n in (100, 399)),
    ("wav without its last 5 %", cut("x.wav", 0.95), FIXED, "a little shorter than"),
    ("mp3 without its last 5 %", cut("x.mp3", 0.95), FIXED, "a little shorter than"),
    ("end a little behind the file", times("0", "1.05"), FIXED, "a little shorter than"),
    ("wav from a pipe", header((4, "<I", 2**32 - 1), (DATA, "<I", 2**32 - 1)), FIXED, "no length"),
    ("bytes per second wrong", header((BYTES_PER_SECOND, "<I", 5)), FIXED, "contradicts itself on"),
    # skipped and named
    ("half a wav", cut("x.wav", 0.5), SKIPPED, "samples missing (50 %)"),
    *((f"half a {x}", cut(f"x.{x}", 0.5), SKIPPED, "missing (50 %)") for x in CONTAINERS),
    *((f"half a {x}", cut(f"x.{x}", 0.5), SKIPPED, "be decoded") for x in ("caf", "flac", "ogg")),
    ("ogg without its last page", cut("x.ogg", 0.95), SKIPPED, "no samples"),
    ("half an opus", cut("x.opus", 0.5, format="OGG", subtype="OPUS"), SKIPPED, "cannot be"),
    ("half an mp3", cut("x.mp3", 0.5), SKIPPED, "samples missing"),
    ("zeros inside a flac", hole("x.flac"), SKIPPED, "cannot be decoded"),
    ("header alone", header(length=44), SKIPPED, "no samples"),
    ("empty file", raw(b""), SKIPPED, "cannot be decoded"),
    ("text", raw(b"this is no audio\n" * 50), SKIPPED, "cannot be decoded"),
    ("random bytes", raw(random.Random(0).randbytes(32_000)), SKIPPED, "cannot be decoded"),
    ("a damaged video", raw(b"\0\0\0\x20ftypisom" + bytes(5000), "x.mp4"), SKIPPED, VIDEO),
    ("headerless", raw(bytes(32_000), "x.raw"), SKIPPED, "cannot be decoded"),
    ("all zero", sound(samples=np.zeros(16_000)), SKIPPED, "no sound"),
    ("a constant", sound(samples=np.full(16_000, 0.5)), SKIPPED, "no sound"),
    ("too quiet", sound(samples=tone() * 1e-6, subtype="FLOAT"), SKIPPED, "no sound"),
    ("no samples", sound(samples=np.zeros(0)), SKIPPED, "no samples"),
    ("one NaN", sound(samples=one_bad(np.nan), subtype="FLOAT"), SKIPPED, "not finite"),
    ("scale of int16", sound(samples=tone() * 32768, subtype="FLOAT"), SKIPPED, "not in the scale"),
    ("1 Hz", header((RATE, "<I", 1)), SKIPPED, "outside 4000..384000 Hz (1)"),
    ("2 GHz", header((RATE, "<I", 2**31 - 1)), SKIPPED, "Hz (2147483647)"),
    ("0 Hz", header((RATE, "<I", 0)), SKIPPED, "cannot be decoded"),
    ("mono that says stereo", header((CHANNELS, "<H", 2)), SKIPPED, "contradicts itself (2 or 4"),
    ("unknown codec", header((CODEC, "<H", 0x99)), SKIPPED, "cannot be decoded"),
    ("header of an hour", header((DATA, "<I", 115_200_000)), SKIPPED, "samples missing (100 %)"),
    ("header of nothing", header((4, "<I", 0), (DATA, "<I", 0)), SKIPPED, "no samples"),
    ("11 minutes", sound(samples=tone(4000, 660), rate=4000), SKIPPED, "longer than 600 s"),
    ("no permission", locked(0, 0o755), SKIPPED, "no permission to read it"),
    ("start behind the file", times("5", ""), SKIPPED, "no samples (from 5 s on, of 1.00 s)"),
    ("end far behind the file", times("0", "9"), SKIPPED, "samples missing (89 %)"),
    # refused: the manifest is wrong
    ("missing file", lambda root: "x.wav", REFUSED, "does not exist (set --data_dir?)"),
    ("folder", place(Path.mkdir), REFUSED, "is not a file"),
    ("named pipe", place(os.mkfifo), REFUSED, "is not a file"),
    ("link to itself", link("x.wav"), REFUSED, ("cannot be followed", "does not exist")),
    ("link out of the data root", link("../outside.wav"), REFUSED, "leaves the data root"),
    ("device", link("/dev/zero"), REFUSED, "leaves the data root"),
    ("..", lambda root: "../" + link("real.wav")(root), REFUSED, "leaves the data root"),
    ("absolute path", lambda root: "/etc/passwd", REFUSED, "leaves the data root"),
    ("name of 300 letters", lambda root: "x" * 300, REFUSED, "cannot be followed"),
    ("line break in a name", sound("a\nb.wav"), REFUSED, "column path holds a line break"),
    ("NUL in a name", lambda root: "a\0.wav", REFUSED, ("column path holds", "not a UTF-8 CSV")),
    ("closed folder", locked(0o644, 0), REFUSED, "cannot be followed"),
    ("end before start", times("0.5", "0.2"), REFUSED, "start 0.5 and end 0.2"),
    ("negative start", times("-1", ""), REFUSED, "start -1"),
    ("start in words", times("soon", ""), REFUSED, "start 'soon' is not a number"),
    ("start of 1e290", times("1e290", "1e300"), REFUSED, "start 1e+290"),
]

# ---------------------------------------------------------------- manifests: text of the CSV

TARGETS = ("valence", "arousal")
HEADER = "utt_id,path,valence,arousal\n"
GOOD, MISSING = "b,a.wav,3,3\n", "valence missing: 1 utterances"
SEMI, RATED = HEADER.replace(",", ";"), HEADER[:-1] + ",rater,end\n"
UNKNOWN = ("", "nan", "N/A", "None", "<UNK>", "-", "?", "-1.0")
LINES = [  # all below the header, and why they are refused
    ("a,a.wav,7.2,3", "row 2: valence 7.2 is outside"),
    ("a,a.wav,inf,3", "row 2: valence 'inf' is not a number"),
    ("a,a.wav,1_2,3", "row 2: valence '1_2' is not"),
    ('a,a.wav,"2,5",3', "row 2: valence '2,5' is not a number"),
    ("a,a.wav,2,5,3", "row 2: more cells than"),
    ("a,a.wav,3,3\nb,a.w", "row 3: fewer cells than columns"),
    ('a,a.wav,3,"3\nb,a.wav,3,3', "not a UTF-8 CSV file"),
    ('a,a.wav,3,"3\nb,b.wav,3",3', "cells than columns"),
    ('a,"a.wav\n",3,3', "row 3: column path holds"),
    ("a,a.wav,3,3\n\na,a.wav,3,3", "row 4: utt_id a is already used in row 2"),
    ("x/a,a.wav,3,3", "row 2: utt_id 'x/a' must name"),
    ("..,a.wav,3,3", "utt_id '..' must name a file"),
    ("a" * 201 + ",a.wav,3,3", "1 to 200 bytes"),
]
CELLS = [  # one or two more columns, their cells, and why they are refused
    ("split", "", "row 2: split '' is not one of"),
    ("split", "held-out", "row 2: split 'held-out' is not"),
    ("Start,START", "0,1", "columns Start and START can both be start: rename one"),
    ("offset", "1", "offset can be a start or an end: rename it"),
    ("start_ms,end_ms", "1,9", "start_ms is not understood: rename it to start, in seconds"),
    ("start", "x", "row 2: start 'x' is not a number of seconds or h:mm:ss"),
    ("end", "1:61:00", "row 2: end '1:61:00' is not"),
    ("start,duration", "0,0", "start 0 and end 0 must satisfy"),
    *((c, name, f"row 2: {c} {name!r}") for c in ("session", "speaker") for name in UNKNOWN),
]
CSV = [
    ("column missing", "utt_id,path,valence\n", REFUSED, "column arousal is missing (found:"),
    ("no header", "", REFUSED, "column utt_id is missing (found: none)"),
    ("column twice", "utt_id,path,valence,arousal,valence\n", REFUSED, "valence occurs twice"),
    ("two names of the path", "id,file,wav,v,a\n", REFUSED, "file and wav can both be path"),
    ("no rows", HEADER, REFUSED, "no usable utterance"),
    ("not UTF-8", HEADER.encode() + b"\xe4,a.wav,3,3\n", REFUSED, "not a UTF-8 CSV"),
    ("UTF-16", (HEADER + "a,a.wav,3,3\n").encode("utf-16"), REFUSED, "not a UTF-8 CSV"),
    *((lines, f"{HEADER}{lines}\n", REFUSED, fault) for lines, fault in LINES),
    *((f"{c} {x}", f"{HEADER[:-1]},{c}\na,a.wav,3,3,{x}\n", REFUSED, f) for c, x, f in CELLS),
    ("decimal commas, points", SEMI + "a;a.wav;2,5;3.5\n", REFUSED, "commas (row 2) and points (r"),
    ("decimal commas", SEMI + "a;a.wav;2,5;3\n", FIXED, "decimal commas read as points: 1 cells"),
    *((f"one label {x}", f"{HEADER}a,a.wav,{x},3\n{GOOD}", FIXED, MISSING) for x in ("", "NaN")),
    ("no label", HEADER + "b,a.wav,,nan\na,a.wav,3,3\n", SKIPPED, "no label"),
    ("first row unlabelled", HEADER + "a,a.wav,,\na,a.wav,3,3\n", SKIPPED, "no label"),
    ("nobody reads", HEADER[:-1] + ",hue\na,a.wav,3,3,1\n", FIXED, "columns not used: hue"),
    ("other case", HEADER[:-1] + ",Session\na,a.wav,3,3,1\n", FIXED, "taken: Session as session"),
    ("clip twice", HEADER + "a,a.wav,3,3\nb,a.wav,3,3\n", KEPT, ""),
    ("rater twice", RATED + "a,a.wav,3,3,A,\na,a.wav,2,2,A,\n", REFUSED, "row 3: utt_id a is"),
    ("rater unknown", RATED + "a,a.wav,3,3,A,\na,a.wav,2,2,,\n", REFUSED, "give each rater a name"),
    ("two cuts rated", RATED + "a,a.wav,3,3,A,1\na,a.wav,2,2,B,.5\n", REFUSED, "another end"),
    ("two raters", RATED + "a,a.wav,1,5,A,\na,a.wav,4,,B,\n", FIXED, "several raters: 1 utter"),
    ("rating of 9", RATED + "a,a.wav,1,5,A,\na,a.wav,9,5,B,\n", REFUSED, "row 3: valence 9 is"),
    ("spaces and byte-order mark", "\ufeffutt_id, path ,valence,arousal\na, a.wav,3,3\n", KEPT, ""),
    ("Windows line ends", HEADER.replace("\n", "\r\n") + "a,a.wav,3,3\r\n", KEPT, ""),
]

MORE = [  # columns beside the four, their cells, what is read
    ("split,speaker", "Training,n/a", {"split": "train", "speaker": ""}),
    ("Begin Time (s),End Time (s)", ".2,.9", {"start": 0.2, "end": 0.9}),
    ("onset,offset", ".2,.9", {"start": 0.2, "end": 0.9}),
    ("from,to", ".2,.9", {"start": 0.2, "end": 0.9}),
    ("start,duration", ".2,.7", {"start": 0.2, "end": 0.9}),
    ("length", "9 words", {"start": 0.0, "end": None}),
    ("start,end", "0:00,0:00:00.900", {"start": 0.0, "end": 0.9}),
    ("start,end", "1:02:03,62:04.5", {"start": 3723, "end": 3724.5}),
    ("start,end", "0 days 00:00:00.2,1 days 00:00:01", {"start": 0.2, "end": 86401}),
    ("start,end", '0,"1 day, 0:00:01"', {"end": 86401}),
]
VALUES = [  # a manifest, and what is read of its first row beside a, a.wav, 3 and 2
    *((f"{HEADER[:-1]},{c}\na,a.wav,3,2,{cells}\n", values) for c, cells, values in MORE),
    ("Utt_ID,PATH,Valence,AROUSAL,Speaker\na,a.wav,3,2,Eve\n", {"speaker": "Eve"}),
    ("name,file,v,a,spk\na,a.wav,3,2,Eve\n", {"speaker": "Eve"}),
    ("id,audio_path,val,aro,speaker_id\na,a.wav,3,2,Eve\n", {"speaker": "Eve"}),
    (HEADER.replace(",", "\t") + "a\ta.wav\t3\t2\n", {}),
    (HEADER.replace(",", "|") + "a|a.wav|3|2\n", {}),
    (SEMI[:-1] + ";end\na;a.wav;3;2.0;0:00.5\n", {"end": 0.5}),
    (RATED + "a,a.wav,1,1,A,\nb,b.wav,1,1,A,\na,a.wav,5,,B,\na,a.wav,3,3,C,\n", {}),
]


@pytest.mark.parametrize(("text", "expected"), VALUES)
def test_a_manifest_is_read_by_any_usual_name_of_its_columns(tmp_path, text, expected):
    for name in "ab":
        sound(f"{name}.wav")(tmp_path)
    name = "m.TSV" if "\t" in text else "m.csv"
    (tmp_path / name).write_text(text, encoding="utf-8")
    corpus = corpora.read_corpus(str(tmp_path / name), None, (1, 5))
    u = corpus.utterances[0]
    assert (u.utt_id, u.path.name, u.valence, u.arousal) == ("a", "a.wav", 3, 2)
    assert {name: getattr(u, name) for name in expected} == pytest.approx(expected)
    if "rater" in text:
        assert [u.utt_id for u in corpus.utterances] == ["a", "b"]
        rated = corpus.ratings().query("utt_id == 'a'")
        assert rated["rater"].tolist() == [*"ABC"]
        values = rated[["valence", "arousal"]]
        np.testing.assert_array_equal(values, [[1, 1], [5, np.nan], [3, 3]])


# ---------------------------------------------------------------- published corpora: an edited tree

TURN = "[{0}.5 - {0}.9]\tSes01F_impro01_F00{0}\tneu\t[2.5000, 3.5000, 2.5000]\n"
TURNS = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n" + "".join(
    f"{TURN.format(i)}C-E2:\tNeutral;\t()\n\n" for i in range(3)
)
MSP_HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n"
MSP_ROWS = "".join(f"MSP-PODCAST_0001_000{i}.wav,N,2,6,4,1,Male,Train\n" for i in range(3))


def annotation(old, new, encoding="utf-8"):
    """An IEMOCAP tree of three turns, with `old` replaced by `new` in its annotation."""

    def make(root):
        folder = root / "Session1" / "sentences" / "wav" / "Ses01F_impro01"
        table = root / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
        folder.mkdir(parents=True)
        table.parent.mkdir(parents=True)
        for i in range(3):
            sound(f"Ses01F_impro01_F00{i}.wav")(folder)
        (folder / "._Ses01F_impro01_F000.wav").write_bytes(b"\0\5")
        assert old in TURNS
        table.write_bytes(TURNS.replace(old, new, 1).encode(encoding))
        return folder

    return make


def wavs(change):
    """The same tree with its folder of audio changed."""
    return lambda root: change(annotation("%", "%")(root))


def podcast(old="%", new="%", change=lambda folder: None, encoding="utf-8"):
    """An MSP-Podcast tree of three clips, with `old` replaced in the table, then `change`d."""

    def make(root):
        (root / "Audio").mkdir()
        for i in range(3):
            sound(f"MSP-PODCAST_0001_000{i}.wav")(root / "Audio")
        text = (MSP_HEADER + MSP_ROWS).replace(old, new, 1)
        (root / "labels_consensus.csv").write_bytes(text.encode(encoding))
        change(root / "Audio")

    return make


def in_place_of(name, make_it):
    def change(folder):
        (folder / name).unlink()
        make_it(folder / name)

    return change


def link_to(target):
    return lambda path: path.symlink_to(target)


FIRST, SECOND = "Ses01F_impro01_F000", "Ses01F_impro01_F001"
CLIP = "MSP-PODCAST_0001_0001.wav"
OUT, BAD = TURN.format(0).replace("[2.", "[2"), TURN.format(0).replace("[2.5", "[2.S")
MISSING_ROW = MSP_ROWS.splitlines()[0].replace("2,6,4", ",,") + "\n"
IEMOCAP = [
    ("Windows line ends", annotation("\n\n", "\r\n"), KEPT, ""),
    ("label of 5.5", annotation("[2.5000,", "[5.5000,"), FIXED, "label 5.5 outside 1..5 clipped:"),
    ("point lost in a label", annotation("[2.5000", "[25000"), SKIPPED, "far outside 1..5 (25000)"),
    ("label NaN", annotation("[2.5000", "[nan"), FIXED, "valence missing: 1 utterances"),
    ("no labels", annotation("[2.5000, 3.5000", "[nan, nan"), SKIPPED, "no label"),
    ("twice, first far out", annotation(TURN.format(0), OUT + TURN.format(0)), SKIPPED, "(25000)"),
    ("label with a letter", annotation("3.5000", "3.5O00"), SKIPPED, "label is not a number"),
    ("time with two points", annotation("0.5 -", "0.5.5 -"), SKIPPED, "time is not a number"),
    ("opening bracket lost", annotation("[0.5", "0.5"), SKIPPED, "annotation not understood"),
    ("no speaker in the turn", annotation(FIRST, "turn"), SKIPPED, "annotation not understood"),
    ("turn annotated twice", annotation(SECOND, FIRST), SKIPPED, "listed twice, first one kept"),
    ("turn renamed", annotation(FIRST, "Ses01F_impro01_F099"), SKIPPED, "audio file missing"),
    ("line lost", annotation(TURN.format(0), ""), SKIPPED, "no annotation"),
    ("empty annotation", annotation(TURNS, ""), REFUSED, "no usable utterance"),
    ("no audio folder", wavs(lambda f: f.rename(f"{f}_")), REFUSED, "no usable utterance"),
    ("audio missing", wavs(lambda f: (f / f"{FIRST}.wav").unlink()), SKIPPED, "audio file missing"),
    ("pipe as audio", wavs(in_place_of(f"{FIRST}.wav", os.mkfifo)), SKIPPED, "audio file missing"),
]
MSP = [
    ("label of 70", podcast("2,6", "2,70"), SKIPPED, "label far outside 1..7 (70)"),
    ("label empty", podcast("2,6", "2,"), FIXED, "valence missing: 1 utterances"),
    ("no labels", podcast("2,6", ","), SKIPPED, "no label"),
    ("label with a letter", podcast("2,6", "2,6O"), SKIPPED, "label is not a number"),
    ("twice, first unlabelled", podcast(MSP_HEADER, MSP_HEADER + MISSING_ROW), SKIPPED, "no label"),
    ("clip in the table twice", podcast("0000", "0001"), SKIPPED, "listed twice, first one kept"),
    ("no name", podcast("MSP-PODCAST_0001_0000.wav", ""), SKIPPED, "audio file missing"),
    ("unknown split", podcast("Train", "Trian"), REFUSED, "row 2: Split_Set 'Trian' is none of"),
    ("column missing", podcast("EmoVal", "Valence"), REFUSED, "column EmoVal is missing"),
    ("Test3", podcast("2,6,4,1,Male,Train", ",,,,,Test3"), FIXED, "Test3: 1 utterances have no"),
    ("unknown speaker", podcast("1,Male", "Unknown,Male"), FIXED, "speaker unknown: 1 utterances"),
    ("row missing", podcast(MSP_ROWS[: len(MSP_ROWS) // 3], ""), FIXED, "1 audio files have no"),
    ("audio missing", podcast(change=lambda f: (f / CLIP).unlink()), SKIPPED, "file missing"),
    ("pipe", podcast(change=in_place_of(CLIP, os.mkfifo)), SKIPPED, "not a regular one"),
    ("device", podcast(change=in_place_of(CLIP, link_to("/dev/zero"))), SKIPPED, "not a regular"),
    ("no table", lambda root: (root / "Audio").mkdir(), REFUSED, "no labels_consensus.csv"),
]

# ---------------------------------------------------------------- <utt_id>.npy of one utterance


def saved(array):
    return lambda path: np.save(path, array, allow_pickle=True)


def written(content):
    return lambda path: path.write_bytes(content)


def half_npy(path):
    np.save(path, np.zeros((20, 6)))
    os.truncate(path, 600)


def npy_header(shape, kind="'<f4'"):
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return written(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(96))


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, x=np.zeros((4, 6)))


NPY = [
    ("Fortran order", saved(np.asfortranarray(np.ones((4, 6)))), KEPT, ""),
    ("one dimension", saved(np.zeros(6)), REFUSED, "float64 (6,), expected numbers (T, D)"),
    ("other width", saved(np.zeros((4, 7))), REFUSED, "width 7, but the first file has 6"),
    ("no frames", saved(np.zeros((0, 6))), REFUSED, "expected numbers (T, D), not empty"),
    ("complex", saved(np.zeros((4, 6), complex)), REFUSED, "expected numbers"),
    ("pickled", saved(np.full((4, 6), None)), REFUSED, "not a plain .npy array"),
    ("pickled code", written(b"cposix\nsystem\n(S'touch pwned'\ntR."), REFUSED, "not a plain .npy"),
    ("NaN", saved(np.full((4, 6), np.nan)), REFUSED, "holds NaN or infinite values"),
    ("beyond float32", saved(np.full((4, 6), 1e300)), REFUSED, "holds NaN or infinite values"),
    ("cut off", half_npy, REFUSED, "not a plain .npy array"),
    ("an .npz", npz, REFUSED, "not a plain .npy array"),
    ("shape of a petabyte", npy_header((2**40, 1024)), REFUSED, "not a plain .npy array"),
    ("negative shape", npy_header((-4, 6)), REFUSED, "u003.npy"),
    ("code as header", npy_header("__import__('os').abort()"), REFUSED, "not a plain .npy"),
    ("missing", lambda path: None, REFUSED, "1 of 4 missing (u003.npy); faces.py makes"),
    ("pipe", os.mkfifo, REFUSED, "1 of 4 missing (u003.npy)"),
]
VECTORS = [
    ("missing", lambda path: None, REFUSED, "1 of 4 missing (u003.npy)"),
    ("two dimensions", saved(np.ones((1, 6))), REFUSED, "expected numbers (D,)"),
    ("zero", saved(np.zeros(6)), REFUSED, "1 embeddings are zero or not finite, the first is that"),
    ("NaN", saved(np.full(6, np.nan)), REFUSED, "u003.npy: holds NaN or infinite values"),
    ("cut off", half_npy, REFUSED, "not a plain .npy array"),
]


class Fault(NamedTuple):
    """`make` builds the input below a folder; `expected` is part of the note, reason or error."""

    source: str
    name: str
    make: object
    outcome: str
    expected: str | tuple[str, ...]  # one of these


KINDS = {
    "audio": AUDIO, "CSV": CSV, "IEMOCAP": IEMOCAP, "MSP-Podcast": MSP, "features": NPY,
    "speaker": VECTORS,
}  # fmt: skip
FAULTS = [Fault(source, *row) for source, rows in KINDS.items() for row in rows]


def manifest(root, *rows):
    with open(root / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(root / "manifest.csv")


def load(fault, root):
    """(corpus, pack or None) of the input with this fault; UserError where it is refused."""
    cache = root.parent / "cache"
    if fault.source == "audio":
        sound("good.wav")(root)
        made = fault.make(root)
        path, start, end = made if isinstance(made, tuple) else (made, "", "")
        row = ("0.5", "0.5", "anna")
        rows = [("a", "good.wav", *row, "", ""), ("b", path, *row, start, end)]
        header = ("utt_id", "path", "valence", "arousal", "speaker", "start", "end")
        corpus = corpora.read_corpus(manifest(root, header, *rows), None, None)
        return data.load_audio(corpus, cache, max_skipped=0.5)
    if fault.source in ("CSV", "IEMOCAP", "MSP-Podcast"):
        if fault.source == "CSV":
            sound("a.wav")(root)
            content = fault.make if isinstance(fault.make, bytes) else fault.make.encode()
            (root / "m.csv").write_bytes(content)
            corpus = corpora.read_corpus(str(root / "m.csv"), None, (1, 5), targets=TARGETS)
            corpus.notes = [note for note in corpus.notes if "speaker unknown" not in note]
        else:
            fault.make(root)
            kind = {"IEMOCAP": "iemocap", "MSP-Podcast": "msp_podcast"}[fault.source]
            corpus = corpora.read_corpus(kind, str(root), None, targets=TARGETS)
        return data.load_audio(corpus, cache, max_skipped=0.5)
    rows = [(f"u00{i}", sound(f"{i}.wav")(root), "0.5", "0.5", "anna") for i in range(4)]
    header = ("utt_id", "path", "valence", "arousal", "speaker")
    corpus = corpora.read_corpus(manifest(root, header, *rows), None, None)
    for i in range(3):
        np.save(root / f"u00{i}.npy", np.ones((4, 6) if fault.source == "features" else 6))
    fault.make(root / "u003.npy")
    if fault.source == "features":
        data.FrameFeatures(data.load_audio(corpus, cache)[0], root).read(3)
    else:
        data.speaker_embeddings(corpus, None, str(root), cache)
    return corpus, None


@contextlib.contextmanager
def without_privileges(root):
    """As a user who is not root, for whom permissions count."""
    if os.geteuid():
        yield
        return
    for folder in (root.parent, *list(root.parents)[1:4]):
        os.chmod(folder, folder.stat().st_mode | 0o055)
    os.chmod(root.parent, 0o777)
    os.chmod(root, 0o777)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.source}: {f.name!a}")
def test_each_fault_has_the_outcome_that_its_row_states(tmp_path, fault):
    root = tmp_path / "corpus"
    root.mkdir()
    is_locked = fault.name in ("no permission", "closed folder")
    with without_privileges(root) if is_locked else contextlib.nullcontext():
        try:
            corpus, pack = load(fault, root)
        except UserError as error:
            outcome, text = REFUSED, str(error)
            assert len(text.splitlines()) == 1 and (
                "manifest" not in text or re.search("row [34]", text)
            )
        else:
            text = " | ".join([s.reason for s in corpus.skipped] or corpus.notes)
            outcome = SKIPPED if corpus.skipped else FIXED if corpus.notes else KEPT
    assert outcome == fault.outcome, text
    if "first" in fault.name and "one kept" not in text:  # what was skipped hides no good row
        assert len(corpus.utterances) == {"CSV": 1}.get(fault.source, 3)
    expected = (fault.expected,) if isinstance(fault.expected, str) else fault.expected
    assert any(part in text for part in expected), text
    if outcome == SKIPPED:
        assert len(corpus.skipped) == 1 or fault.name in TWO_TURNS
        assert all(s.utt_id and s.file for s in corpus.skipped)
    if outcome != REFUSED and fault.source == "audio":
        check_audio(fault, corpus, pack)
    if outcome == FIXED:
        assert re.search(r"\b[12]\b", text) or "columns" in text  # it is counted


# a damaged line leaves two traces: the line, and the audio that has no annotation now
TWO_TURNS = [
    "opening bracket lost", "no speaker in the turn", "turn annotated twice", "turn renamed",
]  # fmt: skip


def check_audio(fault, corpus, pack):
    """The healthy clip is untouched, and what was read of the other is the tone it was made of."""
    np.testing.assert_allclose(pack.read(0), tone(), atol=1e-4)
    assert [u.utt_id for u in corpus.utterances] == ["a", "b"][: len(pack.lengths)]
    if fault.outcome == SKIPPED or "samples" in fault.name:
        return
    audio = pack.read(1)
    assert len(audio) == pytest.approx(SECONDS * SAMPLE_RATE, rel=0.1)
    spectrum = np.abs(np.fft.rfft(audio[4000:12000] * np.hanning(8000)))[10:]
    assert (np.argmax(spectrum) + 10) * 2 == 200
    level = np.sqrt(2 * np.mean(audio[4000:12000] ** 2))
    quiet_or_loud = ("float of 1.5", "overdriven", "speech on a constant")
    assert fault.name in quiet_or_loud or level == pytest.approx(0.3, rel=0.05)


def test_a_file_whose_name_is_not_utf_8_is_read(tmp_path):
    """Found in a folder only: a manifest is UTF-8."""
    path = tmp_path / os.fsdecode(b"x\xff.wav")
    sound("x.wav")(tmp_path)
    (tmp_path / "x.wav").rename(path)
    samples, reason, _ = audio.decode(path)
    assert len(samples) == SECONDS * SAMPLE_RATE and not reason


# ---------------------------------------------------------------- what was skipped


def test_skipped_csv_survives_any_name(tmp_path):
    missing = corpora.Skipped("a\nb", 'c"d,e.wav', "samples missing (50 %)")
    skipped = [missing, corpora.Skipped("\udcff", "语.wav", "not a file")]
    corpus = corpora.Corpus("c", tmp_path, (0, 1), [], skipped)
    corpora.write_skipped(tmp_path / "skipped.csv", corpus)
    with open(tmp_path / "skipped.csv", encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    assert names == ["utt_id", "file", "reason"]
    assert rows == [[*missing], ["\\udcff", "语.wav", "not a file"]]
    assert list(corpora.skipped_by_kind(corpus)) == ["samples missing", "not a file"]


def test_too_many_skipped_utterances_are_an_error_wherever_they_were_lost(tmp_path, capfd):
    """Annotation lines count like audio files, and the way to see all of them is named."""
    (tmp_path / "tree").mkdir()
    folder = annotation("[2.5000", "[2.S000")(tmp_path / "tree")
    corpus = corpora.read_corpus("iemocap", str(tmp_path / "tree"), None)
    fault = r"iemocap: 1 of 3 utterances cannot be used, more than 5 % \(.*not a number\)"
    with pytest.raises(UserError, match=fault):
        data.load_audio(corpus, tmp_path / "cache")
    (folder / f"{SECOND}.wav").write_bytes(b"")
    flags = ["--data", "iemocap", "--data_dir", str(tmp_path / "tree"), "--cache_dir"]
    flags += [str(tmp_path / "cache"), "--skipped", str(tmp_path / "skipped.csv")]
    assert files.run_script("data.py", lambda: data.inspect(data.parse_args(flags))) == 2
    (fault,) = capfd.readouterr().err.splitlines()
    assert "2 of 3" in fault and "--skipped" in fault
    rows = (tmp_path / "skipped.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["utt_id", FIRST, SECOND]


# ---------------------------------------------------------------- random mutations of valid files


def mutated(content, seed):
    """`content` with one to three random faults: bits, bytes, a cut, an insertion, a swap."""
    rng = random.Random(seed)
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, other = sorted(rng.randrange(len(content)) for _ in range(2))
        size = rng.randint(1, 40)
        kind = rng.choice(("bit", "byte", "cut", "insert", "delete", "swap", "repeat"))
        if kind == "bit":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            content[at] = rng.choice((rng.randrange(256), *b'0",.\n-'))
        elif kind == "cut":
            del content[max(1, other) :]
        elif kind == "insert":
            content[at:at] = rng.randbytes(size)
        elif kind == "delete":
            del content[at : min(at + size, len(content) - 1)]
        elif kind == "swap":
            a, b = content[at : at + size], content[other : other + size]
            content[at : at + size], content[other : other + size] = b, a
        else:
            content[at:at] = content[at : at + size]
    return bytes(content)


def fuzz_audio(root, seed, suffix):
    """Read as it was, or named as changed or unusable; a wav as Python's own reader reads it."""
    sound(f"whole.{suffix}", samples=tone(seconds=0.5))(root)
    path = root / f"x.{suffix}"
    path.write_bytes(mutated((root / f"whole.{suffix}").read_bytes(), seed))
    samples, reason, changes = audio.decode(path)
    if reason:
        assert not len(samples)
        return "skipped"
    assert samples.dtype == np.int16 and len(samples) >= audio.MIN_SAMPLES
    if changes:
        return "fixed"
    original = soundfile.read(root / f"whole.{suffix}", dtype="int16")[0]
    if suffix == "wav":
        with contextlib.suppress(wave.Error, EOFError), wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnchannels()) == (SAMPLE_RATE, 1)
            if file.getsampwidth() == 2:
                there = file.readframes(file.getnframes())
                there = np.frombuffer(there[: len(there) // 2 * 2], np.int16)
                np.testing.assert_array_equal(samples, there)
        assert len(samples) == pytest.approx(len(original), rel=0.12)
    else:  # these carry checksums
        assert len(samples) == len(original) and np.abs(samples - original).max() <= 1
    return "kept"


NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
FUZZ_ROWS = [(f"u{i:02}", f"u{i % 4:02}.wav", f"0.{i + 10}", f"0.{50 - i}") for i in range(16)]
FUZZ_CSV = "\n".join(
    ",".join(row) for row in [("utt_id", "path", "valence", "arousal"), *FUZZ_ROWS]
)


def cells_of(line):
    """The cells of a CSV line without line breaks in cells; None where quotes do not pair."""
    cells = re.findall(r' *("(?:[^"]|"")*"|[^",][^,]*|)(,|$)', line)
    if line and "".join("".join(cell) for cell in cells).replace(" ", "") != line.replace(" ", ""):
        return None
    cells = [cell for cell, _ in cells]
    cells = cells if line.endswith(",") or not cells or cells[-1] else cells[:-1]
    return [re.sub(r'^"(.*)"$', r"\1", cell).replace('""', '"').strip() for cell in cells]


def fuzz_csv(root, seed, _):
    """Each line is read as a strict parser reads it, or the file is refused."""
    for i in range(4):
        (root / f"u{i:02}.wav").touch()
    content = mutated(FUZZ_CSV.encode(), seed)
    (root / "m.csv").write_bytes(content)
    try:
        corpus = corpora.read_corpus(str(root / "m.csv"), None, None, targets=TARGETS)
    except UserError as error:
        assert re.search(r"m\.csv|no usable utterance|has no label of", str(error)), error
        return "refused"
    lines = [line for line in re.split("\r\n|\r|\n", content.decode("utf-8-sig")) if line]
    columns = [re.sub(r"[\W_]", "", column).lower() for column in cells_of(lines[0])]
    expected, unlabelled = {}, 0
    for line in lines[1:]:
        row = dict(zip(columns, cells_of(line), strict=True))
        labels = []
        for text in (row["valence"], row["arousal"]):
            assert re.fullmatch(NUMBER, text) or not re.search(r"\w", text)
            labels.append(float(text) if re.fullmatch(NUMBER, text) else math.nan)
        if np.isnan(labels).all():
            unlabelled += 1
        else:
            expected[row["uttid"]] = (str((root / row["path"]).resolve()), *labels)
    assert len(expected) + unlabelled == len(lines) - 1  # no line was lost
    found = {u.utt_id: (str(u.path), u.valence, u.arousal) for u in corpus.utterances}
    np.testing.assert_equal(found, expected)
    assert len(corpus.skipped) == unlabelled
    return "kept"


def fuzz_iemocap(root, seed, _):
    """Each turn has the labels of its own line, or is named; none is lost."""
    dialog = "Ses01F_impro01"
    folder = root / "Session1" / "sentences" / "wav" / dialog
    table = root / "Session1" / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
    turns = [f"{dialog}_{'FM'[i % 2]}{i // 2:03}" for i in range(12)]
    folder.mkdir(parents=True)
    table.parent.mkdir(parents=True)
    text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    for i, turn in enumerate(turns):
        (folder / f"{turn}.wav").touch()
        text += f"[{i}.5000 - {i}.9000]\t{turn}\tneu\t[2.{i + 10}00, 3.{i + 10}00, 2.5000]\n"
        text += "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
    table.write_bytes(mutated(text.encode(), seed))
    try:
        corpus = corpora.read_corpus("iemocap", str(root), None, targets=TARGETS)
    except UserError as error:
        assert "no usable utterance" in str(error)
        return "refused"
    lines = table.read_text("utf-8", errors="replace").splitlines()
    for u in corpus.utterances:
        own = [line for line in lines if re.search(rf"\t{re.escape(u.utt_id)}\t", line)]
        labels = re.fullmatch(rf".*\t\w+\t\[({NUMBER}), ({NUMBER}), .+\]\s*", own[0]).groups()
        assert [u.valence, u.arousal] == [min(5, max(1, float(x))) for x in labels]
    named = {u.utt_id for u in corpus.utterances} | {s.utt_id for s in corpus.skipped}
    assert set(turns) <= named
    return "skipped" if corpus.skipped else "kept"


def fuzz_npy(root, seed, _):
    """The array that the bytes say, or refused."""
    np.save(root / "whole.npy", np.arange(120, dtype=np.float32).reshape(20, 6))
    content = mutated((root / "whole.npy").read_bytes(), seed)
    (root / "u.npy").write_bytes(content)
    sound("u.wav")(root)
    corpus = corpora.Corpus("c", root, (0, 1), [corpora.Utterance("u", root / "u.wav", 0.5, 0.5)])
    corpus.seconds = np.ones(1)
    try:
        features = data.FrameFeatures(corpus, root)
        frames = features.read(0)
    except UserError as error:
        assert "u.npy" in str(error)
        return "refused"
    size = 10 + struct.unpack("<H", content[8:10])[0]
    says = ast.literal_eval(content[10:size].decode().strip())
    there = np.frombuffer(content[size:], says["descr"], math.prod(says["shape"]))
    there = there.reshape(says["shape"], order="F" if says["fortran_order"] else "C")
    np.testing.assert_array_equal(frames, there.astype(np.float32))
    assert features.dim == frames.shape[1] and features.lengths.tolist() == [len(frames)]
    return "kept"


FUZZERS = {
    "wav": fuzz_audio, "flac": fuzz_audio, "ogg": fuzz_audio, "csv": fuzz_csv,
    "iemocap": fuzz_iemocap, "npy": fuzz_npy,
}  # fmt: skip


@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 3000), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("kind", FUZZERS)
def test_random_mutations_never_crash_hang_or_give_a_wrong_label(tmp_path, kind, seeds):
    outcomes = Counter()
    for seed in seeds:
        root = tmp_path / str(seed)
        root.mkdir()
        start = time.monotonic()
        faulthandler.dump_traceback_later(60, exit=True)  # for this mutation alone
        try:
            outcomes[FUZZERS[kind](root, seed, kind)] += 1
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed} in {root}") from error
        assert time.monotonic() - start < 10
        shutil.rmtree(root)
    assert outcomes["skipped"] + outcomes["refused"] >= len(seeds) / 10, outcomes


# ---------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Path of a CSV of 6 clips of 0.4 s."""
    root = tmp_path_factory.mktemp("clips")
    rows = [("utt_id", "path", "valence", "arousal", "session")]
    for i in range(6):
        samples = tone(seconds=0.4) * (i + 1) / 12
        sound(f"u{i:02}.wav", samples=samples)(root)
        rows.append((f"u{i:02}", f"u{i:02}.wav", i / 12, 1 - i / 12, f"s{i % 3}"))
    return Path(manifest(root, *rows))


def hidden_states(pack, cache):
    """Stands for a frozen encoder: a row's states are its own samples."""

    def compute(rows):
        return {"hidden": [pack.read(row)[:600].reshape(10, 3, 20) for row in rows]}

    num_bytes = np.full(len(pack.lengths), 2400)
    return data.frozen_states(pack.key, cache, pack.lengths, num_bytes, compute)


def all_caches(path, cache):
    """{cache: array of all that is read from it}; fills those that are missing."""
    _, pack = data.load_audio(corpora.read_corpus(str(path), None, None), cache)
    rows = range(len(pack.lengths))
    egemaps = data.egemaps(pack, cache)
    hidden = hidden_states(pack, cache)
    return {
        "audio": np.stack([pack.read(row) for row in rows]),
        "egemaps": egemaps,
        "hidden": np.stack([hidden.read(row)["hidden"] for row in rows]),
    }


def fill_in_child(path, cache, start, unlocked, out):
    if unlocked:  # as on a network disk where locks do nothing
        files.fcntl.flock = lambda *_: None
    start.wait()
    np.savez(out, **all_caches(path, cache))


@pytest.mark.parametrize("unlocked", [False, True])
def test_processes_that_fill_one_cache_at_once_all_read_what_one_alone_writes(
    clips, tmp_path, unlocked
):
    pytest.importorskip("opensmile")
    alone, cache = all_caches(clips, tmp_path / "alone"), tmp_path / "cache"
    fork = multiprocessing.get_context("fork")
    start, outs = fork.Barrier(3), [tmp_path / f"{i}.npz" for i in range(3)]
    children = [
        fork.Process(target=fill_in_child, args=(clips, cache, start, unlocked, out))
        for out in outs
    ]
    for child in children:
        child.start()
    for child, out in zip(children, outs):
        child.join(60)
        assert child.exitcode == 0
        with np.load(out) as found:
            for name, array in alone.items():
                np.testing.assert_array_equal(found[name], array)
    left = {p.name.split("-")[0] for p in cache.iterdir() if p.name[0] != "."}
    assert left == {"audio", "egemaps", "hidden"}


def flip(path, seed):
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    path.write_bytes(content)


DAMAGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": Path.unlink,
    "flipped bit": lambda path: flip(path, 1),
}


def test_a_cache_that_was_damaged_afterwards_is_refused_whichever_file_and_damage(clips, tmp_path):
    pytest.importorskip("opensmile")
    all_caches(clips, tmp_path / "whole")
    paths = [p for p in (tmp_path / "whole").rglob("*") if p.is_file() and p.name[0] != "."]
    assert {p.name for p in paths} == {
        "values.bin", "values.json", "values.npy", "hidden.bin", "hidden.json", "decoding.json",
        "seals.json",
    }  # fmt: skip
    for path in paths:
        for name, damage in DAMAGES.items():
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            file = path.relative_to(tmp_path / "whole")
            damage(tmp_path / "copy" / file)
            with pytest.raises(UserError, match="is damaged: delete it") as error:
                all_caches(clips, tmp_path / "copy")
            assert str(file.parent) in str(error.value), name
            shutil.rmtree(tmp_path / "copy")


def test_an_intact_cache_is_hashed_once_and_again_when_its_size_or_time_has_changed(tmp_path):
    cache = tmp_path / "cache" / "x"
    files.build_cache(cache, lambda aside: (aside / "values.bin").write_bytes(bytes(1000)))
    values, fill = cache / "values.bin", None
    times = values.stat().st_atime_ns, values.stat().st_mtime_ns
    flip(values, 0)
    os.utime(values, ns=times)
    assert files.build_cache(cache, fill) == cache  # sizes and times alone
    os.utime(values)
    with pytest.raises(UserError, match="x is damaged: delete it"):
        files.build_cache(cache, fill)
    flip(values, 0)
    assert files.build_cache(cache, fill) == cache  # another time, the same bytes


def test_a_cache_that_does_not_fit_the_disk_is_refused_before_anything_is_computed(tmp_path):
    def compute(rows):
        raise AssertionError("computed")

    fault = rf"would need 1048576.00 GiB in {tmp_path}/new, where .* GiB are free: free disk .*off"
    with pytest.raises(UserError, match=fault):
        data.frozen_states("key", tmp_path / "new", np.array([9]), np.array([2**50]), compute)


def fill_on_a_full_disk(path, cache, size):
    """In a process of its own, whose files end at `size` bytes: the write beyond fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.exit(files.run_script("data.py", lambda: all_caches(path, cache) and 0))


@pytest.mark.parametrize("size", [1_500, 20_000])
def test_a_write_that_fails_in_a_cache_is_one_line_and_leaves_nothing_half_written(
    clips, tmp_path, size, capfd
):
    cache = tmp_path / "cache"
    if size == 1_500:  # the pack is there; eGeMAPS, 2,240 bytes, does not fit
        pytest.importorskip("opensmile")
        data.load_audio(corpora.read_corpus(str(clips), None, None), cache)
    there = [p for p in cache.glob("*") if p.suffix != ".lock"]
    target = (clips, cache, size)
    child = multiprocessing.get_context("fork").Process(target=fill_on_a_full_disk, args=target)
    child.start()
    child.join(60)
    fault = capfd.readouterr().err
    assert child.exitcode == 2 and "Traceback" not in fault
    last = fault.splitlines()[-1]
    assert last.startswith(f"data.py: error: --cache_dir {cache}: ") and "free disk space" in last
    assert "cannot be written (File too large)" in last
    assert {p for p in cache.iterdir() if p.suffix != ".lock"} == {*there}
    assert len(all_caches(clips, cache)["audio"]) == 6  # with room it goes on


# ---------------------------------------------------------------- processes of a loader, pipes


def write_training_corpus(root, clips=24, frames=6):
    """Flags for a manifest with three sessions, and <utt_id>.npy of each utterance in npy/."""
    (root / "npy").mkdir()
    rows = [("utt_id", "path", "valence", "arousal", "session")]
    for i in range(clips):
        np.save(root / f"npy/u{i:02}.npy", np.random.default_rng(i).standard_normal((frames, 8)))
        sound(f"{i}.wav", samples=tone(seconds=0.3))(root)
        rows.append((f"u{i:02}", f"{i}.wav", i / clips, 1 - i / clips, f"s{i % 3}"))
    words = f"""--data {manifest(root, *rows)} --features_dir {root}/npy --out {root}/runs --name x
        --encoder lightweight_transformer --prosody none --d_model 256 --num_layers 1
        --cache_dir {root}/cache --device cpu --num_workers 0"""
    return words.split()


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_nan_that_a_loader_process_finds_is_one_line_with_the_name_of_the_file(
    tmp_path, num_workers, capfd
):
    flags = write_training_corpus(tmp_path)
    bad = tmp_path / "npy/u11.npy"  # of the train split of fold 1: read in the middle of the epoch
    np.save(bad, np.full((6, 8), np.nan))
    assert train.cli([*flags, "--batch_size", "1", "--num_workers", num_workers]) == 2
    said = capfd.readouterr()
    assert said.err == f"train.py: error: {bad}: holds NaN or infinite values\n"
    assert f"decoded audio: writing 0.00 GiB to {tmp_path}/cache/audio-" in said.out


def test_features_at_another_rate_than_those_of_the_run_are_refused_by_predict(tmp_path, capfd):
    flags = write_training_corpus(tmp_path, frames=30)  # in 0.3 s
    assert train.cli([*flags, "--max_seconds", "0.2", "--max_steps", "1"]) == 0
    said = capfd.readouterr().out
    assert "note: features: 100 frames per second\n" in said
    assert "24 utterances are longer than --max_seconds 0.2: training takes a random window" in said
    (tmp_path / "half").mkdir()
    for file in (tmp_path / "npy").iterdir():
        np.save(tmp_path / "half" / file.name, np.load(file)[::2])
    run, out = tmp_path / "runs/x/fold1", tmp_path / "p.csv"
    flags = ["--checkpoint", str(run), "--data", flags[1], "--device", "cpu", "--out", str(out)]
    for folder, code in (("npy", 0), ("half", 2)):
        args = predict.parse_args([*flags, "--features_dir", str(tmp_path / folder)])
        assert files.run_script("predict.py", functools.partial(predict.main, args)) == code
    assert "half: 50 frames per second, but the run was trained on 100" in capfd.readouterr().err
    preds, tested = (
        pd.read_csv(path).set_index("utt_id")["pred_valence"]
        for path in (out, run / "predictions_test.csv")
    )
    assert preds[tested.index].tolist() == tested.tolist()  # from the same first 20 frames


def test_output_into_a_closed_pipe_ends_quietly(tmp_path):
    path = write_training_corpus(tmp_path)[1]
    command = f"{sys.executable} {REPO}/data.py --data {path} --cache_dir {tmp_path}/cache"
    command += " | (exec <&-; sleep 0); exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (141, "")
