"""Tests of data.py: python -m pytest tests/test_data.py (under a minute, nothing downloaded).

Odd and broken input is in test_input_faults.py.
"""

import contextlib
import itertools
import os
import pickle
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import corpora
import data
from corpora import demo
from data import (
    SAMPLE_RATE,
    Batches,
    BatchSpec,
    FrameFeatures,
    TrainPlan,
    groups_of_like_length,
)
from util import files
from util.files import UserError

TARGETS = ("valence", "arousal")


def tone(seconds, rate=SAMPLE_RATE, pitch=200.0):
    t = np.arange(int(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * pitch * t) + 0.1 * np.sin(2 * np.pi * 3 * pitch * t)


def write_wav(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(0.5), SAMPLE_RATE)


def read(folder, text, clips=("a.wav", "b.wav"), label_range=None):
    """The corpus of a manifest with this text."""
    for clip in clips:
        write_wav(folder / clip)
    (folder / "manifest.csv").write_text(text, encoding="utf-8")
    return corpora.read_corpus(str(folder / "manifest.csv"), None, label_range)


def corpus_of(folder, seconds, sessions=3, dialogs=1):
    """A CSV corpus of tones: utterance i lasts seconds[i], sessions and dialogues take turns."""
    lines = ["utt_id,path,valence,arousal,session,dialog,speaker"]
    for i, length in enumerate(seconds):
        soundfile.write(folder / f"u{i:03d}.wav", tone(length, pitch=100 + i), SAMPLE_RATE)
        s = i % sessions
        d = f"d{s}_{i // sessions % dialogs}"
        lines.append(f"u{i:03d},u{i:03d}.wav,{i / len(seconds)},0.5,s{s},{d},p{s}")
    (folder / "c.csv").write_text("\n".join(lines))
    return corpora.read_corpus(str(folder / "c.csv"), None, None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(corpus, pack, cache folder) of 24 short tones."""
    folder = tmp_path_factory.mktemp("small")
    corpus = corpus_of(folder, np.linspace(0.2, 1.2, 24), dialogs=2)
    return *data.load_audio(corpus, folder / "cache"), folder / "cache"


def batches_of(corpus, pack, features=None, prosody=None, speaker=None, max_seconds=10, **options):
    options = {"augment": False, "seed": 0} | options
    labels = corpus.labels(TARGETS)
    return Batches(labels, pack, features, prosody, speaker, max_seconds, **options)


# ---------------------------------------------------------------- IEMOCAP

IEMOCAP_TABLE = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[20.5000 - 22.0000]\tSes01F_impro01_M000\txxx\t[2.0000, 4.0000, 3.0000]
C-E2:\tNeutral;\t()
C-F1:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()
A-E4:\tval 2; act 3; dom  3;\t(breathing)
A-F1:\tval 5; act 5; dom  5;\t()

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[5.5000, 2.5000, 0.5000]
A-E3:\tval 4; act ; dom  2;\t()

[7.0000 - 9.0000]\tSes01F_impro01_M001\tfru\t[1.5000, 0.5000, 2.5000]

[30.0000 - 31.0000]\tSes01F_impro01_F001\tang\t[1.5000, 4.5000, 4.5000]

[30.0000 - 31.0000]\tSes01F_impro01_F002\tang\t[not understood]
A-E3:\tval 1; act 1; dom  1;\t()
"""


@pytest.fixture
def iemocap(tmp_path):
    def dialogue(session, name, table, turns):
        folder = tmp_path / f"Session{session}" / "dialog" / "EmoEvaluation"
        (folder / "Categorical").mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(table)
        (folder / f"._{name}.txt").write_bytes(b"\x00\x05\x16\x07 Mac OS X \xff")
        (folder / "Categorical" / f"{name}_e2_cat.txt").write_text(table)
        for turn in turns:
            path = tmp_path / f"Session{session}/sentences/wav/{name}/{name}_{turn}.wav"
            write_wav(path)
            path.with_name(f"._{path.name}").write_bytes(b"\x00\x05")

    turns = ("F000", "M000", "M001")  # F001 has no audio
    dialogue(1, "Ses01F_impro01", IEMOCAP_TABLE, turns)
    for session in (2, 3):
        name = f"Ses0{session}M_script01_1b"
        table = "".join(
            f"[{i}.5 - {i + 1}.0]\t{name}_{t}\tneu\t[{i + 1}.5, 2.5, 2.5]\n"
            for i, t in enumerate(turns)
        )
        dialogue(session, name, table, turns)
    return tmp_path


def rated(corpus, columns=TARGETS):
    return corpus.ratings()[["utt_id", "rater", *columns]].values.tolist()


def test_iemocap_is_read_with_exact_counts_speakers_order_labels_and_raters(iemocap):
    corpus = corpora.read_corpus("iemocap", str(iemocap), None, targets=TARGETS)
    first = corpus.utterances[:3]  # by start time, not as in the file
    assert [u.utt_id[-4:] for u in first] == ["F000", "M001", "M000"]
    assert [u.gender for u in first] == ["F", "M", "M"] and first[2].emotion == "xxx"
    # two of Ses01M are from a dialogue whose prefix says F
    speakers = {"Ses01F": 1, "Ses01M": 2, "Ses02F": 1, "Ses02M": 2, "Ses03F": 1, "Ses03M": 2}
    assert Counter(u.speaker for u in corpus.utterances) == speakers
    assert {u.session for u in corpus.utterances} == {"Session1", "Session2", "Session3"}
    missing, damaged = corpus.skipped
    assert missing[::2] == ("Ses01F_impro01_F001", "audio file missing")
    assert missing.file.endswith("Ses01F_impro01/Ses01F_impro01_F001.wav")
    assert damaged.utt_id == "Ses01F_impro01.txt row 17"
    np.testing.assert_allclose(corpus.labels(TARGETS)[0], [1.0, 0.375])
    np.testing.assert_allclose(corpus.labels(("arousal", "valence"))[2], [0.75, 0.25])
    assert "label 5.5 outside 1..5 clipped: 1 utterances" in corpus.notes
    assert "label 0.5 outside 1..5 clipped: 1 utterances" in corpus.notes
    # evaluators, not the actors on themselves, nor those of a turn that was not understood
    one, two = first[2].utt_id, first[0].utt_id
    assert rated(corpus)[:2] == [[one, "E3", 3, 2], [one, "E4", 2, 3]]
    assert rated(corpus, ["valence", "dominance"])[2:] == [[two, "E3", 4, 2]]
    assert np.isnan(rated(corpus)[2][3])


@pytest.mark.parametrize(
    ("kind", "folder", "fault"),
    [
        ("iemocap", True, "no Session.*EmoEvaluation"),
        ("iemocap", False, "needs --data_dir"),
        ("demo", True, "reads no --data_dir: give --data, iemocap"),
        ("nothing", True, "--data nothing: not one of demo, iemocap, msp_podcast, or a .csv"),
    ],
)
def test_a_wrong_data_or_data_dir_is_refused(tmp_path, kind, folder, fault):
    with pytest.raises(UserError, match=fault):
        corpora.read_corpus(kind, str(tmp_path) if folder else None, None, tmp_path)


# ---------------------------------------------------------------- MSP-Podcast

MSP_ROWS = [
    ("MSP-PODCAST_0001_0002.wav", "N", 2.0, 6.0, "1", "Male", "Train"),
    ("MSP-PODCAST_0001_0001.wav", "H", 7.5, 1.0, "1", "Male", "Train"),
    ("MSP-PODCAST_0002_0001.wav", "A", 4.0, 4.0, "2", "Female", "Development"),
    ("MSP-PODCAST_0003_0001.wav", "A", 4.0, 4.0, "3", "Female", "Validation"),
    ("MSP-PODCAST_0004_0001.wav", "A", 4.0, 4.0, "4", "Female", "Test1"),
    ("MSP-PODCAST_0005_0001.wav", "A", 4.0, 4.0, "Unknown", "Unknown", "Test1"),
    ("MSP-PODCAST_0006_0001.wav", "A", 4.0, 4.0, "Unknown", "Unknown", "Train"),
    ("MSP-PODCAST_0007_0001.wav", "A", 4.0, 4.0, "7", "Male", "Test2"),
    ("MSP-PODCAST_0008_0001.wav", "", "", "", "", "", "Test3"),
    ("MSP-PODCAST_0009_0001.wav", "A", 4.0, 4.0, "9", "Male", "Train"),  # no audio
]


@pytest.mark.parametrize(
    ("table", "audio"),
    [("labels_consensus.csv", "Audios"), ("Labels/labels_concensus.csv", "Audio")],
)
def test_msp_podcast_is_read_with_exact_counts_and_its_own_splits(tmp_path, table, audio):
    (tmp_path / "Labels").mkdir()
    header = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n"
    lines = [f"{n},{c},{a},{v},3.0,{s},{g},{split}\n" for n, c, a, v, s, g, split in MSP_ROWS]
    (tmp_path / table).write_text(header + "".join(lines))
    for name, *_ in MSP_ROWS[:-1]:
        write_wav(tmp_path / audio / name)
    corpus = corpora.read_corpus("msp_podcast", str(tmp_path), None)
    first, second = corpus.utterances[:2]
    assert (first.utt_id, second.utt_id) == ("MSP-PODCAST_0001_0001", "MSP-PODCAST_0001_0002")
    assert (second.arousal, second.valence) == (2.0, 6.0)  # the file says arousal first
    np.testing.assert_allclose(corpus.labels(TARGETS)[1], [5 / 6, 1 / 6], rtol=1e-6)
    assert corpora.num_folds(corpus) == 1
    splits = corpora.make_splits(corpus, 1)
    counts = {"train": 3, "dev": 2, "test": 2, "test2": 1, "test3": 1}
    assert {s: len(rows) for s, rows in splits.items()} == counts
    missing = str(tmp_path / audio / "MSP-PODCAST_0009_0001.wav")
    assert corpus.skipped == [("MSP-PODCAST_0009_0001", missing, "audio file missing")]
    for note in ("Test2: 1", "Test3: 1", "speaker unknown: 2", "label 7.5 outside 1..7 clipped: 1"):
        assert f"{note} utterances" in " | ".join(corpus.notes)


NAMES = ("MSP-PODCAST_0001_0001", "MSP-PODCAST_0001_0002")
DETAILED = [  # labels_detailed.csv, and whether it is understood
    ("FileName,WorkerID,EmoClass_Major,EmoAct,EmoVal,EmoDom\nONE.wav,W1,Neutral,2,6,4\n"
     "ONE.wav,W2,Neutral,3,5,4\nTWO.wav,W1,Neutral,7,1,4\n", True),
    ('FileName,Detail\nONE.wav,"W1; Neutral; Concerned,Neutral; A:2.000; V:6.000; D:4.000;"\n'
     "ONE.wav,W2; Other-Curious; A:3.0; V:5.0; D:4.0;\nTWO.wav,W1; Sad; ; A:7; V:1; D:4;\n", True),
    ("", False),
    ("FileName,EmoAct,EmoVal\nONE.wav,1,2\n", False),
    ("File,Detail\nONE.wav,W2; Sad; ; A:3.0; V:5.0; D:4.0;\n", False),
    ("File,WorkerID,EmoAct,EmoVal\nONE.wav,W2,3,5\n", False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "understood"), DETAILED)
def test_msp_podcast_gives_its_workers_in_each_form_of_labels_detailed(
    tmp_path, text, understood, caplog
):
    (tmp_path / "Audios").mkdir()
    rows = "FileName,EmoAct,EmoVal,Split_Set\n"
    for name in NAMES:
        (tmp_path / f"Audios/{name}.wav").touch()
        rows += f"{name}.wav,2.5,5.5,Train\n"
    (tmp_path / "labels_consensus.csv").write_text(rows)
    text = text.replace("ONE", NAMES[0]).replace("TWO", NAMES[1])
    (tmp_path / "labels_detailed.csv").write_text(text)
    corpus = corpora.read_corpus("msp_podcast", str(tmp_path), None)
    assert [(u.valence, u.arousal) for u in corpus.utterances] == [(5.5, 2.5)] * 2
    one, two = NAMES
    ratings = [[one, "W1", 6, 2], [one, "W2", 5, 3], [two, "W1", 1, 7]]
    assert rated(corpus) == (ratings if understood else [])
    if not understood:
        assert caplog.messages[0].startswith("labels_detailed.csv is not understood")


# ---------------------------------------------------------------- CSV

HEADER = "utt_id,path,valence,arousal\n"


def test_a_csv_without_label_range_must_hold_labels_in_0_to_1(tmp_path):
    fault = r"row 3: valence 4.6 is outside 0..1 .*--label_range 0 5\?"
    with pytest.raises(UserError, match=fault):
        read(tmp_path, HEADER + "a,a.wav,0.2,1\nb,b.wav,4.6,3\n")
    assert read(tmp_path, HEADER + "a,a.wav,0.2,1\n").label_range == (0.0, 1.0)
    with pytest.raises(UserError, match="LO must be below HI"):
        read(tmp_path, HEADER + "a,a.wav,0.2,1\n", label_range=(5.0, 1.0))
    text = HEADER + "a,a.wav,1,5\nb,b.wav,2,3\n"
    notes = read(tmp_path, text, label_range=(0, 100)).notes
    assert notes[0] == "labels lie in 1..5 of 0..100: is --label_range right?"
    assert "lie in" not in "".join(read(tmp_path, text, label_range=(1, 5)).notes)


def test_without_sessions_each_speaker_is_one_and_without_speakers_it_is_an_error(tmp_path):
    clips = [f"{i}.wav" for i in range(24)]
    rows = "".join(f"u{i},{i}.wav,3,3,p{i % 12}\n" for i in range(24))
    corpus = read(tmp_path, "utt_id,path,valence,arousal,speaker\n" + rows, clips, (1, 5))
    assert corpora.num_folds(corpus) == 12
    test = corpora.make_splits(corpus, 3)["test"]
    assert {corpus.utterances[row].speaker for row in test} == {"p2"}  # p2 before p10
    corpus = read(tmp_path, HEADER + "a,a.wav,3,3\n", label_range=(1, 5))
    with pytest.raises(UserError, match="split, session, or speaker"):
        corpora.make_splits(corpus, 1)


TURNS = [  # columns, cells of each row after the labels -> (dialogue, turn) in order
    # the dialogues of each session are numbered anew
    ("session,dialog", ("s0,1", "s1,1", "s0,1", "s1,1"), "1:0 1:2 s1_1:1 s1_1:3"),
    ("speaker,dialog", ("A,d", "B,d", "A,d", "B,d"), "d:0 d:1 d:2 d:3"),
    # without times on a common clock, turns keep the order of the file
    ("start,dialog", (",d", ",d", ",d"), "d:0 d:1 d:2"),
    ("start,dialog", ("0,d", "0,d", "0,d"), "d:0 d:1 d:2"),
    ("start,dialog", ("0.1,d", ",d", "0,d"), "d:0 d:1 d:2"),
    ("start,dialog", ("2,d", "1,d", "0,d"), "d:0 d:1 d:2"),
]


@pytest.mark.parametrize(("columns", "cells", "order"), TURNS)
def test_turns_are_in_order_and_dialogues_of_sessions_apart(tmp_path, columns, cells, order):
    clips = [f"{i}.wav" for i in range(len(cells))]
    rows = [f"{i},{i}.wav,3,3,{more}\n" for i, more in enumerate(cells)]
    text = f"utt_id,path,valence,arousal,{columns}\n" + "".join(rows)
    corpus = read(tmp_path, text, clips, (1, 5))
    assert " ".join(f"{u.dialog}:{u.utt_id}" for u in corpus.utterances) == order


# ---------------------------------------------------------------- splits


def test_test_is_the_folds_session_and_dev_the_next_one_and_no_speaker_is_in_two(small):
    corpus, _, _ = small
    for fold in (1, 2, 3):
        splits = corpora.make_splits(corpus, fold)
        chosen = {s: [corpus.utterances[row] for row in rows] for s, rows in splits.items()}
        assert {u.session for u in chosen["test"]} == {f"s{fold - 1}"}
        assert {u.session for u in chosen["dev"]} == {f"s{fold % 3}"}
        assert sorted(np.concatenate(list(splits.values()))) == list(range(24))
        speakers = [{u.speaker for u in part} for part in chosen.values()]
        assert sum(map(len, speakers)) == len(set.union(*speakers))
    for fold in (0, 4):
        with pytest.raises(UserError, match=r"folds 1..3"):
            corpora.make_splits(corpus, fold)


SPLITS = [  # columns after the labels; path and cells of each row; error of fold 1, or none
    ("split", ("a,train", "b,Valid", "c,TESTING"), ""),
    ("split", ("a,training", "b,val", "c,test"), ""),
    ("split", ("a,train", "b,eval", "c,test"), ""),
    ("split", ("a,train", "b,dev", "c,eval"), "splits dev and eval: rename one"),
    ("split", ("a,train", "b,test"), "the dev split is empty"),
    ("session,speaker", ("a,0,anna", "b,1,ben", "c,2,anna"), "speaker anna is in both"),
    ("session", ("a,s1", "b,S1", "c,s2"), r"s1 in row 2 \(u0\) and S1 in row 3 .*in spelling"),
    ("speaker", ("a,ANNA", "b,ben", "c,anna"), r"ANNA in row 2 \(u0\) and anna in row 4"),
    ("speaker", ("a,1", "b,2", "c,01"), "speaker 1 in row 2 .* and 01 in row 4"),
    ("speaker", ("a,José", "b,2", "c,Jose\u0301"), "differ in spelling"),
    # the same audio in two splits
    ("split", ("a,train", "a,dev", "c,test"), r"row 2 \(u0\) in train and row 3 \(u1\) in dev are"),
    ("split", ("a,train", "b,dev", "../corpus/a,test"), "row 2 .* in train and row 4 .* in test"),
    ("split", ("a,train", "link,dev", "c,test"), "the same part of .*/a.wav: remove one"),
    ("split,start,end", ("a,train,0,.3", "a,dev,.2,.5", "c,test,0,.5"), "the same part of"),
    ("split,start,end", ("a,train,,", "b,dev,,", "a,test,.3,.4"), "row 2 .* and row 4 .* in test"),
    ("split,start,end", ("a,train,0,.3", "a,dev,.3,.5", "c,test,0,.5"), ""),
    ("session,start,end", ("a,0,0,.3", "b,1,0,.3", "a,2,.2,.4"), "the same part of"),
    # two people who talk at the same time, and one clip that is said to be of two
    ("speaker,start,end", ("a,0,0,.3", "b,1,0,.3", "a,2,.2,.5"), ""),
    ("speaker,start,end", ("a,0,0,.3", "b,1,0,.3", "a,2,.1,.4"), "the same part of"),
    ("speaker", ("a,0", "b,1", "a,2"), "the same part of"),
]


@pytest.mark.parametrize(("columns", "rows", "fault"), SPLITS)
def test_splits_that_share_a_speaker_or_audio_are_refused_by_name(tmp_path, columns, rows, fault):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/link.wav").symlink_to("a.wav")
    text = f"utt_id,path,valence,arousal,{columns}\n"
    for i, row in enumerate(rows):
        path, _, cells = row.partition(",")
        text += f"u{i},{path}.wav,{i},3,{cells}\n"
    expected = pytest.raises(UserError, match=fault) if fault else contextlib.nullcontext()
    with expected:
        corpus = read(tmp_path / "corpus", text, ("a.wav", "b.wav", "c.wav"), (0, 5))
        corpus, _ = data.load_audio(corpus, tmp_path / "cache")
        splits = corpora.make_splits(corpus, 1)
        if columns == "split":
            assert {s: r.tolist() for s, r in splits.items()} == {
                "train": [0],
                "dev": [1],
                "test": [2],
            }


# ---------------------------------------------------------------- audio pack


def test_sixteen_bit_samples_at_16_khz_are_kept_and_a_very_short_clip_is_padded(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "b.wav", tone(0.01), SAMPLE_RATE)
    corpus = read(tmp_path, HEADER + "a,a.wav,0.5,0.5\nb,b.wav,0.5,0.5\n", clips=())
    corpus, pack = data.load_audio(corpus, tmp_path / "cache")
    np.testing.assert_array_equal(pack.read(0), samples.astype(np.float32) / 32768)
    np.testing.assert_array_equal(pack.read(0, 100, 200), pack.read(0)[100:200])
    assert pack.lengths.tolist() == [5000, 400] and not pack.read(1)[160:].any()
    assert "audio padded to 400 samples: 1 utterances" in corpus.notes


def test_start_and_end_cut_turns_out_of_one_long_file(tmp_path):
    audio = np.r_[tone(1.0), tone(1.0, pitch=1000), tone(1.0)]
    soundfile.write(tmp_path / "d.wav", audio, SAMPLE_RATE)
    text = "utt_id,path,valence,arousal,start,end,dialog\n"
    text += "c,d.wav,0.5,0.5,2.0,,d\nb,d.wav,0.5,0.5,1.0,2.0,d\na,d.wav,0.5,0.5,0,1.25,d\n"
    corpus, pack = data.load_audio(read(tmp_path, text, clips=()), tmp_path / "cache")
    assert [u.utt_id for u in corpus.utterances] == ["a", "b", "c"]  # by start
    assert pack.lengths.tolist() == [20000, 16000, 16000]
    pitches = [np.argmax(np.abs(np.fft.rfft(pack.read(row)[:16000]))) for row in range(3)]
    assert pitches == [200, 1000, 200]


def test_the_key_of_decoded_audio_follows_the_content_of_files_and_start_and_end(tmp_path):
    def key(row="a,a.wav,0.5,0.5,0,0.4\n"):
        corpus = read(tmp_path, "utt_id,path,valence,arousal,start,end\n" + row, clips=())
        return data.load_audio(corpus, tmp_path / "cache")[1].key

    write_wav(tmp_path / "a.wav")
    first = key()
    assert key() == first
    assert key("a,a.wav,0.9,0.1,0,0.4\n") == first  # labels are not audio
    assert key("a,a.wav,0.5,0.5,0,0.3\n") != first
    assert key("a,a.wav,0.5,0.5,0.1,0.4\n") != first
    os.utime(tmp_path / "a.wav", ns=(1, 1))  # same size, other time: content may have changed
    assert key() != first


def test_an_unusable_file_is_skipped_and_named_and_rows_stay_aligned(tmp_path):
    all_rows = corpus_of(tmp_path, [0.2 + 0.01 * i for i in range(24)])
    all_rows.utterances[5].path.write_text("this is no audio")
    corpus, pack = data.load_audio(all_rows, tmp_path / "cache")
    assert len(corpus.utterances) == 23 == len(pack.lengths)
    assert [s.utt_id for s in corpus.skipped] == [all_rows.utterances[5].utt_id]
    for row, u in enumerate(corpus.utterances):
        seconds = 0.2 + 0.01 * int(u.utt_id[1:])
        assert len(pack.read(row)) == pytest.approx(seconds * SAMPLE_RATE, abs=1)
    again, _ = data.load_audio(all_rows, tmp_path / "cache")  # from the cache: the same story
    assert again.skipped == corpus.skipped and again.notes == corpus.notes
    all_rows.utterances[6].path.write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 24 utterances cannot be used, more than 5 %"):
        data.load_audio(all_rows, tmp_path / "cache")


# ---------------------------------------------------------------- prosody, speakers, features


def test_egemaps_equals_opensmile_called_directly_in_one_thread_and_in_several(tmp_path):
    opensmile = pytest.importorskip("opensmile")
    _, pack = data.load_audio(corpus_of(tmp_path, [0.3] * 51), tmp_path / "cache")
    features = data.egemaps(pack, tmp_path / "cache")  # 51 clips: several threads
    assert features.shape == (51, 88) and features.dtype == np.float32
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    rows = [0, 20, 50]
    part = pack.part(rows)
    part.key = "three"
    few = data.egemaps(part, tmp_path / "cache")
    for i, row in enumerate(rows):
        expected = smile.process_signal(pack.read(row), SAMPLE_RATE).to_numpy()[0]
        np.testing.assert_array_equal(features[row], expected.astype(np.float32))
        np.testing.assert_array_equal(few[i], features[row])
    np.testing.assert_array_equal(data.egemaps(part, tmp_path / "cache"), few)  # cached


def tiny_xvector(folder, seed=0):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(seed)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        tdnn_dim=(16, 16, 16, 16, 24), xvector_output_dim=12,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def test_speaker_embeddings_come_from_a_local_xvector_model_and_follow_its_weights(small, tmp_path):
    corpus, pack, _ = small
    tiny_xvector(tmp_path / "model")
    vectors = data.speaker_embeddings(corpus, pack, str(tmp_path / "model"), tmp_path / "cache")
    assert vectors.shape == (24, 12) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    tiny_xvector(tmp_path / "model", seed=1)
    other = data.speaker_embeddings(corpus, pack, str(tmp_path / "model"), tmp_path / "cache")
    assert np.abs(other - vectors).max() > 0.01  # no cache survives a change of weights


def test_speaker_embeddings_come_from_a_directory_of_npy_files_and_of_nothing_else(small, tmp_path):
    corpus, pack, cache = small
    for i, u in enumerate(corpus.utterances):
        np.save(tmp_path / f"{u.utt_id}.npy", np.array([3.0, 4.0, i]))
    vectors = data.speaker_embeddings(corpus, pack, str(tmp_path), cache)
    np.testing.assert_allclose(vectors[0], [0.6, 0.8, 0.0], rtol=1e-6)
    with pytest.raises(UserError, match="--speaker nobody: not ecapa"):
        data.speaker_embeddings(corpus, pack, "nobody", cache)


@pytest.mark.parametrize("rate", [50, 100, 12.5])
def test_seconds_of_feature_files_are_counted_at_their_own_rate(tmp_path, rate):
    """The rate is that of frames and audio; windows, cap and evaluation batches follow it."""
    corpus, _ = data.load_audio(corpus_of(tmp_path, [1.0, 2.0, 4.0] * 2), tmp_path / "cache")
    for u in corpus.utterances:
        frames = round(rate * soundfile.info(u.path).duration) - 1  # as convolutions leave it
        np.save(tmp_path / f"{u.utt_id}.npy", np.arange(frames * 6.0).reshape(-1, 6))
    features = FrameFeatures(corpus, tmp_path)
    assert features.dim == 6 and features.rate == pytest.approx(rate, rel=0.05)
    assert re.fullmatch(r"features: [\d.]+ frames per second", features.describe())
    dataset = batches_of(corpus, None, features=features, max_seconds=2.5)
    longest = np.argmax(features.lengths)
    assert dataset.lengths[longest] == int(2.5 * features.rate) and dataset.num_cut == 2
    batch = dataset[BatchSpec(((0,), (int(longest),)))]
    assert batch["frames"].shape[1] == dataset.lengths[longest]
    assert batch["frame_mask"].sum(1).tolist() == dataset.lengths[[0, longest]].tolist()
    assert batch["audio_seconds"] == pytest.approx(3.5, rel=0.1)
    assert len(data.eval_plan(dataset, np.arange(6), 0, 1)) == 1  # 64 s of audio
    twice = FrameFeatures(corpus, tmp_path, 2 * rate)  # --feature_rate wins
    assert batches_of(corpus, None, features=twice, max_seconds=2.5).num_cut == 0
    with pytest.raises(UserError, match="--augment works on waveforms"):
        batches_of(corpus, None, features=features, augment=True)


def test_feature_files_that_do_not_follow_the_audio_are_said_to(small, tmp_path):
    corpus, _, _ = small
    for u in corpus.utterances:
        np.save(tmp_path / f"{u.utt_id}.npy", np.zeros((16, 6)))
    said = FrameFeatures(corpus, tmp_path).describe()
    assert re.search(r"frames per second, but \d+.* to \d+.* do they belong to this audio", said)


# ---------------------------------------------------------------- batches


def test_a_batch_is_padded_with_zeros_behind_the_mask_and_keeps_the_chunks(small):
    corpus, pack, _ = small
    batch = batches_of(corpus, pack)[BatchSpec(((4, 5), (9,)))]
    rows = sorted([4, 5, 9], key=lambda row: -pack.lengths[row])
    lengths = pack.lengths[rows]
    assert batch["rows"] == rows
    assert batch["chunk_index"].tolist() == [[rows.index(4), rows.index(5)], [rows.index(9), -1]]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].sum(1).tolist() == lengths.tolist()
    assert batch["input_values"].shape == (3, lengths.max())
    assert not batch["input_values"][~batch["attention_mask"]].any()
    np.testing.assert_array_equal(batch["input_values"][0, : lengths[0]], pack.read(rows[0]))
    np.testing.assert_array_equal(batch["labels"], corpus.labels(TARGETS)[rows])
    assert batch["audio_seconds"] == pytest.approx(lengths.sum() / SAMPLE_RATE)
    assert batch["groups"] == [(0, 3, lengths.max())]  # so little is not worth a second pass
    assert batch["padded_share"] == pytest.approx(1 - lengths.mean() / lengths.max())
    prosody = np.full((24, 88), np.nan, dtype=np.float32)
    speaker = np.arange(72, dtype=np.float32).reshape(24, 3)
    dataset = batches_of(corpus, pack, prosody=prosody, speaker=speaker)
    single = dataset[BatchSpec(((4,), (2,), (9,)))]
    assert single["rows"] == [4, 2, 9] and "groups" not in single
    assert single["prosody"].isnan().all()
    assert single["speaker"].tolist() == [[12, 13, 14], [6, 7, 8], [27, 28, 29]]


def test_groups_of_like_length_are_the_cheapest_cut():
    rng = np.random.default_rng(0)
    for count in range(1, 9):
        lengths = np.sort(rng.integers(1, 200, count))[::-1]
        costs = []
        for cuts in itertools.product((False, True), repeat=count - 1):
            starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), count]
            costs.append(sum(40 + (b - a) * lengths[a] for a, b in itertools.pairwise(starts)))
        groups = groups_of_like_length(lengths, 40)
        assert [start for start, *_ in groups] + [count] == [0, *(stop for _, stop, _ in groups)]
        assert all(longest == lengths[a:b].max() for a, b, longest in groups)
        assert sum(40 + (b - a) * longest for a, b, longest in groups) == min(costs)


def test_augmentation_is_a_function_of_seed_epoch_and_row_and_absent_in_evaluation(small):
    corpus, pack, _ = small

    def audio(epoch, seed=0, row=20, augment=True):
        dataset = batches_of(corpus, pack, augment=augment, seed=seed)
        return dataset[BatchSpec(((row,),), epoch)]["input_values"][0]

    assert all(torch.equal(audio(epoch), audio(epoch)) for epoch in range(4))
    rngs = map(np.random.default_rng, range(20))
    drawn = [audio(epoch, seed) for epoch in range(4) for seed in range(3)]
    assert len({tuple(a.tolist()) for a in drawn}) > 8
    np.testing.assert_array_equal(audio(-1), pack.read(20))
    np.testing.assert_array_equal(audio(3, augment=False), pack.read(20))
    for waveform in drawn:
        assert waveform.isfinite().all() and waveform.abs().max() <= 1
        assert 0.9 < len(waveform) / pack.lengths[20] < 1.12
    silence = [data.augment_waveform(np.zeros(4000, np.float32), rng) for rng in rngs]
    assert np.isfinite(np.concatenate(silence)).all()


def test_augmented_audio_never_exceeds_max_seconds_nor_falls_below_400_samples(small, tmp_path):
    corpus, pack, _ = small
    dataset = batches_of(corpus, pack, augment=True, max_seconds=0.5)
    specs = [BatchSpec(((23,),), epoch) for epoch in range(30)]
    assert max(dataset[spec]["input_values"].shape[1] for spec in specs) <= 8000
    soundfile.write(tmp_path / "a.wav", tone(0.025), SAMPLE_RATE)
    corpus = read(tmp_path, HEADER + "a,a.wav,0.5,0.5\n", clips=())
    dataset = batches_of(*data.load_audio(corpus, tmp_path / "cache"), augment=True)
    specs = [BatchSpec(((0,),), epoch) for epoch in range(30)]
    assert min(dataset[spec]["input_values"].shape[1] for spec in specs) == 400


def test_training_draws_a_window_and_evaluation_takes_the_first(small):
    corpus, pack, _ = small
    dataset = batches_of(corpus, pack, max_seconds=0.5)
    assert dataset.lengths.max() == 8000
    first = dataset[BatchSpec(((23,),))]["input_values"][0]
    np.testing.assert_array_equal(first, pack.read(23)[:8000])
    drawn = {tuple(dataset[BatchSpec(((23,),), e)]["input_values"][0].tolist()) for e in range(5)}
    assert len(drawn) == 5 and {len(window) for window in drawn} == {8000}


def test_spawned_workers_give_the_same_batches_and_pickles_carry_no_audio(small, tmp_path):
    corpus, pack, _ = small
    dataset = batches_of(corpus, pack, augment=True)
    specs = [BatchSpec(((i,), (i + 1,)), epoch=2) for i in range(4)]
    here = [dataset[spec] for spec in specs]  # opens the memory map before pickling
    assert len(pickle.dumps(dataset)) < 10_000
    for u in corpus.utterances:
        np.save(tmp_path / f"{u.utt_id}.npy", np.zeros((1, 1)))
    assert b"PosixPath" not in pickle.dumps(FrameFeatures(corpus, tmp_path).names)
    loader = torch.utils.data.DataLoader(
        dataset, sampler=specs, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for mine, theirs in zip(here, loader):
        assert torch.equal(mine["input_values"], theirs["input_values"])


# ---------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def iemocap_like():
    """(lengths, rows of the train split, dialogs) with IEMOCAP's sizes and durations."""
    rng = np.random.default_rng(0)
    seconds = np.exp(1.25 + 0.68 * rng.standard_normal(10_000)).clip(0.585, 34)
    lengths = (seconds * SAMPLE_RATE).astype(int)
    dialogs = [f"d{i // 66:03d}" for i in range(10_000)]
    return lengths, np.arange(6_000), dialogs


def plan(world, batch_size=8, accumulation=1, context=1, rank=0, world_size=1, seed=0, balance=0):
    lengths, rows, dialogs = world
    labels = np.random.default_rng(0).beta(4, 4, (len(lengths), 2))
    dataset = SimpleNamespace(lengths=lengths, labels=labels)
    fold = SimpleNamespace(dataset=dataset, splits={"train": rows}, dialogs=dialogs)
    args = SimpleNamespace(
        batch_size=batch_size, gradient_accumulation_steps=accumulation, context=context,
        seed=seed, balance=balance, target_weights=[0.5, 0.5],
    )  # fmt: skip
    return TrainPlan(fold, args, rank, world_size)


def rows_of(spec):
    return [row for chunk in spec.chunks for row in chunk]


def steps_of(world, batch_size, accumulation, world_size, context, balance):
    """The rows of every step, over all ranks."""
    steps = None
    for rank in range(world_size):
        p = plan(world, batch_size, accumulation, context, rank, world_size, balance=balance)
        p.set_epoch(3)
        specs = list(p)
        steps = steps or [[] for _ in range(p.steps_per_epoch)]
        assert len(specs) == len(p) == len(steps) * accumulation
        for i, spec in enumerate(specs):
            steps[i // accumulation] += rows_of(spec)
    assert balance or all(len(rows) == len(set(rows)) for rows in steps)
    return [sorted(rows) for rows in steps]


@pytest.mark.parametrize("balance", [0, 0.5])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_a_step_sees_the_same_utterances_however_it_is_split(iemocap_like, context, balance):
    lengths, rows, dialogs = iemocap_like
    world = (lengths, rows[:500], dialogs)
    whole = steps_of(world, 16, 1, 1, context, balance)
    for batch_size, accumulation, world_size in ((4, 4, 1), (4, 2, 2), (8, 1, 2)):
        assert steps_of(world, batch_size, accumulation, world_size, context, balance) == whole


def test_an_epoch_has_no_duplicates_and_drops_less_than_a_global_batch(iemocap_like):
    p = plan(iemocap_like, 8, 4)
    dropped = []
    for epoch in range(3):
        p.set_epoch(epoch)
        rows = [row for spec in p for row in rows_of(spec)]
        assert len(rows) == len(set(rows)) == p.steps_per_epoch * 32 > 6000 - 32
        dropped.append(set(range(6000)) - set(rows))
    assert dropped[0] != dropped[1] != dropped[2]


def test_plans_are_functions_of_epoch_and_seed_and_can_start_at_a_step(iemocap_like):
    def specs(epoch, seed=0, first_step=0):
        p = plan(iemocap_like, 4, 2, 2, rank=1, world_size=2, seed=seed)
        p.set_epoch(epoch, first_step)
        found = list(p)
        assert len(p) == len(found) and found[0].epoch == epoch
        return found

    assert specs(1) == specs(1)
    chunks = [{s.chunks for s in found} for found in (specs(1), specs(2), specs(1, seed=1))]
    assert chunks[0] != chunks[1] and chunks[0] != chunks[2]
    assert specs(5, first_step=7) == specs(5)[14:]


def padded_work(lengths, specs):
    return [len(rows_of(s)) * max(lengths[row] for row in rows_of(s)) for s in specs]


def test_ranks_have_equal_work_and_padding_is_below_a_tenth(iemocap_like):
    lengths = iemocap_like[0]
    ranks = [list(plan(iemocap_like, 8, rank=rank, world_size=4)) for rank in range(4)]
    work = np.array([padded_work(lengths, specs) for specs in ranks])  # (rank, step)
    assert (work.max(0).sum() / work.mean(0).sum()) < 1.06  # what waiting for the slowest costs
    specs = list(plan(iemocap_like, 8))
    real = sum(lengths[row] for spec in specs for row in rows_of(spec))
    assert sum(padded_work(lengths, specs)) / real < 1.1


def test_utterances_of_a_small_corpus_share_batches_with_others_each_epoch(iemocap_like):
    lengths, rows, dialogs = iemocap_like
    p = plan((lengths, rows[:64], dialogs))
    together = []
    for epoch in range(2):
        p.set_epoch(epoch)
        together.append({frozenset(rows_of(s)) for s in p})
    assert len(together[0] & together[1]) <= 2


def test_context_chunks_are_consecutive_turns_of_one_dialogue(iemocap_like):
    dialogs = iemocap_like[2]
    p = plan(iemocap_like, 8, context=4)
    starts = set()
    for epoch in range(3):
        p.set_epoch(epoch)
        for spec in p:
            assert len(spec.chunks) == 2
            for chunk in spec.chunks:
                assert list(chunk) == list(range(chunk[0], chunk[0] + len(chunk)))
                assert len({dialogs[row] for row in chunk}) == 1 and len(chunk) <= 4
                starts.add(chunk[0] % 66)
    assert len(starts) > 40  # chunks do not always start at the same turns


def test_a_train_split_smaller_than_a_global_batch_is_refused(iemocap_like):
    lengths, rows, dialogs = iemocap_like
    with pytest.raises(UserError, match=r"holds 30 utterances.*8 x 4 x 1"):
        plan((lengths, rows[:30], dialogs), 8, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_each_row_once_in_batches_that_world_size_does_not_change(
    iemocap_like, world_size
):
    lengths, rows, _ = iemocap_like
    clips = SimpleNamespace(lengths=lengths, rate=SAMPLE_RATE)
    alone = data.eval_plan(clips, rows, 0, 1)
    ranks = [data.eval_plan(clips, rows, rank, world_size) for rank in range(world_size)]
    together = [spec for specs in ranks for spec in specs]
    assert {spec.chunks for spec in together} == {spec.chunks for spec in alone}
    assert sorted(row for spec in together for row in rows_of(spec)) == rows.tolist()
    assert max(padded_work(lengths, together)) <= 64 * SAMPLE_RATE
    assert all(len(chunk) == 1 and spec.epoch == -1 for spec in together for chunk in spec.chunks)
    loads = [sum(padded_work(lengths, specs)) for specs in ranks]
    assert max(loads) < 1.01 * min(loads)


@pytest.mark.parametrize(
    ("lengths", "unpadded", "batches"),
    [
        ([32, 65, 32], False, [(0, 2), (1,)]),  # longer than the budget: alone
        ([5, 7, 5, 6], True, [(0, 2), (1,), (3,)]),
    ],
)
def test_evaluation_batches_keep_to_64_seconds_or_to_one_length(lengths, unpadded, batches):
    clips = SimpleNamespace(lengths=np.array(lengths), rate=1)
    specs = data.eval_plan(clips, np.arange(len(lengths)), 0, 1, unpadded)
    assert sorted(tuple(rows_of(spec)) for spec in specs) == batches


# ---------------------------------------------------------------- demo corpus


def test_the_synthesiser_is_deterministic_and_its_cues_go_the_right_way():
    voice = demo.demo_voice(1, "F")

    def level(arousal):
        rngs = map(np.random.default_rng, range(6))
        clips = [demo.synthesise(voice, 0.0, arousal, 1.5, rng) for rng in rngs]
        return np.mean([np.sqrt(np.mean(clip**2)) for clip in clips])

    a, b = (demo.synthesise(voice, 0.3, 0.3, 1.0, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (16000,) and np.isfinite(a).all() and np.abs(a).max() < 1
    assert level(0.9) > 1.5 * level(-0.9)


def test_the_demo_corpus_has_five_sessions_of_two_speakers_in_iemocap_layout(demo_cache):
    corpus = corpora.read_corpus("demo", None, None, demo_cache)
    assert 550 < len(corpus.utterances) < 680 and not corpus.skipped and not corpus.notes
    speakers = {(u.session, u.speaker) for u in corpus.utterances}
    assert speakers == {(f"Session{s}", f"Ses0{s}{g}") for s in range(1, 6) for g in "FM"}
    seconds = np.array([soundfile.info(u.path).duration for u in corpus.utterances])
    assert seconds.min() >= 0.99 and seconds.max() <= 6 and 2.2 < seconds.mean() < 2.8
    labels = corpus.labels(TARGETS)
    assert (labels.std(axis=0) > 0.2).all()
    assert abs(np.corrcoef(labels.T)[0, 1]) < 0.3
    dialogs = np.array([u.dialog for u in corpus.utterances])
    now = np.flatnonzero(dialogs[:-1] == dialogs[1:])
    for column in (0, 1):  # moods move slowly
        assert 0.4 < np.corrcoef(labels[now, column], labels[now + 1, column])[0, 1] < 0.9
    assert any(u.emotion == "xxx" for u in corpus.utterances)
    assert any(u.utt_id[5] != u.gender for u in corpus.utterances)  # the prefix is no speaker


# ---------------------------------------------------------------- command line


def test_the_command_line_prints_what_one_wants_to_know_before_training(tmp_path, capfd):
    corpus_of(tmp_path, [0.2 + 0.01 * i for i in range(24)])
    flags = data.parse_args(
        ["--data", str(tmp_path / "c.csv"), "--cache_dir", str(tmp_path / "cache")]
    )

    def inspect():
        return files.run_script("data.py", lambda: data.inspect(flags)), *capfd.readouterr()

    code, _, fault = inspect()
    assert code == 2 and "arousal is 0.5 everywhere, nothing to learn" in fault
    assert len(fault.splitlines()) == 1
    (tmp_path / "u000.wav").write_text("this is no audio")
    lines = (tmp_path / "c.csv").read_text().splitlines()
    varied = [line.replace(",0.5,", f",{i % 10 / 10},") for i, line in enumerate(lines)]
    (tmp_path / "c.csv").write_text("\n".join(varied))
    code, said, fault = inspect()
    assert (code, fault) == (0, "")  # no progress bar without a terminal
    for text in ("utterances  23", "3 speakers", "seconds     mean", "####", "skipped     1"):
        assert text in said
    assert "(u000)" in said and "correlation of valence and arousal" in said
    assert re.search(r"fold 3\nsplit +utterances.*\ntrain +\d+ +0.00 .*\n +dev ", said)
