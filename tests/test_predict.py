"""predict.py: the numbers of the run's own test split, windows, dialogues, exports, errors."""

import csv
import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import quick_flags

import data
import predict
import train
from corpora import read_csv
from util import audio, files
from util.checkpoints import save_checkpoint
from util.files import UserError
from util.runs import load_model, run_dir
from wavlm import WavLM, WavLMConfig, load_wavlm, save_wavlm

ROOT = Path(__file__).parent.parent
DIALOGUES = ("--context", "4", "--prosody", "egemaps")
COLUMNS = ("pred_valence", "pred_arousal")


def run(flags, *extra):
    """Run directory of one epoch with these flags."""
    args = train.parse_args([*flags, "--epochs", "1", *extra])
    assert train.main(args) == 0
    return run_dir(args)


@pytest.fixture(scope="module")
def trained(corpus, small_wavlm, tmp_path_factory):
    """A run on single utterances; no test changes it."""
    flags = quick_flags(corpus, small_wavlm, tmp_path_factory.mktemp("trained"))
    return run(flags, "--prosody", "egemaps")


@pytest.fixture(scope="module", params=[(), ("--feedback",)], ids=["plain", "feedback"])
def dialogues(request, corpus, small_wavlm, tmp_path_factory):
    """A run on dialogues; no test changes it."""
    flags = quick_flags(corpus, small_wavlm, tmp_path_factory.mktemp("dialogues"))
    return run(flags, *DIALOGUES, *request.param)


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def values(table):
    return np.array([[float(row[column]) for column in COLUMNS] for row in table])


def predicted(argv, out):
    assert predict.main(predict.parse_args([*map(str, argv), "--out", str(out)])) == 0
    return rows(out)


def streamed(argv, capsys, monkeypatch, stdin=""):
    """(rows printed, stderr) of --stream."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(stdin))))
    logging.getLogger("vatune").handlers.clear()  # those of train.main, which print to stdout
    capsys.readouterr()
    assert predict.main(predict.parse_args([*map(str, argv), "--stream"])) == 0
    said = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(said.out))), said.err


def manifest_of(table, corpus, path):
    """CSV without labels of the utterances of a predictions table, in the corpus' order."""
    names = {row["utt_id"] for row in table}
    with open(corpus.parent / path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["utt_id", "path", "dialog"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows(corpus) if row["utt_id"] in names)
    return corpus.parent / path


# --- the same numbers as in training


def test_files_get_the_predictions_that_training_wrote_for_its_test_split(
    trained, corpus, tmp_path
):
    expected = rows(trained / "predictions_test.csv")
    files = [corpus.parent / f"{row['utt_id']}.wav" for row in expected]
    got = predicted(["--checkpoint", trained, *files], tmp_path / "out.csv")
    assert [row["utt_id"] for row in got] == [row["utt_id"] for row in expected]
    assert [row["path"] for row in got] == [str(file) for file in files]
    assert {row["dialog"] for row in got} == {""}
    np.testing.assert_allclose(values(got), values(expected), atol=1.1e-6)  # six decimals each


def test_a_base_type_wavlm_read_from_the_cache_predicts_alike_whatever_else_is_predicted(
    flags, corpus, small_wavlm, tmp_path
):
    """Its first norm sees padding; float16 states of the cache leave 1e-3 of a scale of 1."""
    config = json.loads((small_wavlm / "config.json").read_text())
    config = WavLMConfig.from_dict(config | {"feat_extract_norm": "group"})
    torch.manual_seed(0)
    save_wavlm(WavLM(config), tmp_path / "base")
    directory = run(flags, "--wavlm", str(tmp_path / "base"), "--unfreeze", "none", "--lr", "0.05")
    expected = rows(directory / "predictions_test.csv")
    files = [corpus.parent / f"{row['utt_id']}.wav" for row in expected]
    got = predicted(["--checkpoint", directory, *files], tmp_path / "out.csv")
    np.testing.assert_allclose(values(got), values(expected), atol=1e-3)
    for i in (0, 7):
        alone = predicted(["--checkpoint", directory, files[i]], tmp_path / "one.csv")
        np.testing.assert_allclose(values(alone), values(got[i : i + 1]), atol=1.1e-6)


def test_files_of_one_name_are_told_apart_by_the_shortest_end_of_their_paths(
    trained, corpus, tmp_path
):
    clip = corpus.parent / "s1d0t0.wav"
    files = ["a/one.wav", "b/one.wav", "b/two.wav", "c/x/y.wav", "d/x/y.wav", "d/z.wav", "d/z.flac"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / file, *soundfile.read(clip))
    got = predicted(
        ["--checkpoint", trained, *(tmp_path / file for file in files)], tmp_path / "out.csv"
    )
    names = "a/one.wav b/one.wav two c/x/y.wav d/x/y.wav z.wav z.flac"
    assert [row["utt_id"] for row in got] == names.split()


def test_a_manifest_without_labels_tracks_the_turns_of_its_dialogues(dialogues, corpus, tmp_path):
    expected = rows(dialogues / "predictions_test.csv")
    manifest = manifest_of(expected, corpus, "unlabelled.csv")
    got = predicted(["--checkpoint", dialogues, "--data", manifest], tmp_path / "out.csv")
    assert [row["utt_id"] for row in got] == [row["utt_id"] for row in expected]
    np.testing.assert_allclose(values(got), values(expected), atol=1.1e-6)


def test_turns_are_tracked_in_time_order_and_come_back_in_the_manifests(
    dialogues, corpus, tmp_path
):
    clip, rate = soundfile.read(corpus.parent / "s1d0t0.wav")
    soundfile.write(tmp_path / "long.wav", np.concatenate([clip] * 3), rate)
    third = len(clip) / rate
    lines = [f"t{i},long.wav,{i * third},{(i + 1) * third},d,{'AB'[i % 2]}\n" for i in range(3)]
    got = []
    for order in ([0, 1, 2], [2, 0, 1]):
        text = "utt_id,path,start,end,dialog,speaker\n" + "".join(lines[i] for i in order)
        (tmp_path / "m.csv").write_text(text)
        argv = ["--checkpoint", dialogues, "--data", tmp_path / "m.csv"]
        got.append(predicted(argv, tmp_path / "out.csv"))
    assert [row["utt_id"] for row in got[1]] == ["t2", "t0", "t1"]
    assert [row["dialog"] for row in got[1]] == ["d"] * 3  # of two speakers
    np.testing.assert_allclose(values(got[1]), values(got[0])[[2, 0, 1]], atol=1.1e-6)
    assert len({row["pred_valence"] for row in got[0]}) == 3  # the same clip, another state


def test_two_checkpoints_give_their_mean_and_spread(trained, dialogues, corpus, tmp_path):
    runs = [trained, dialogues]
    clip = corpus.parent / "s1d0t0.wav"
    single = values([predicted(["--checkpoint", r, clip], tmp_path / "1.csv")[0] for r in runs])
    each = [flag for directory in runs for flag in ("--checkpoint", directory)]
    both = predicted([*each, clip], tmp_path / "2.csv")
    np.testing.assert_allclose(values(both)[0], single.mean(0), atol=2e-6)
    assert float(both[0]["std_valence"]) == pytest.approx(single.std(0, ddof=1)[0], abs=2e-6)


def limit_layer_norm(monkeypatch, fails):
    """WavLM's layer norms, of width 32 here, go through `fails(batch size)`."""
    layer_norm = torch.nn.functional.layer_norm

    def limited(x, *args, **kwargs):
        if x.shape[-1] == 32:
            fails(len(x))
        return layer_norm(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", limited)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        None,  # what torch itself raises here
    ],
)
def test_out_of_memory_smaller_batches_give_the_same_numbers(
    trained, corpus, tmp_path, monkeypatch, error
):
    files = sorted(corpus.parent.glob("s1*.wav"))
    expected = predicted(["--checkpoint", trained, *files], tmp_path / "1.csv")
    sizes = []

    def fail(size):
        sizes.append(size)
        if size > 5 or len(sizes) == 12:  # also once in the middle
            if error is None:
                torch.empty(2**58)
            raise error

    limit_layer_norm(monkeypatch, fail)
    got = predicted(["--checkpoint", trained, *files], tmp_path / "2.csv")
    assert sizes[:4] == [24, 12, 6, 3] and max(sizes[4:]) <= 3 and min(sizes) == 1
    assert [row["utt_id"] for row in got] == [row["utt_id"] for row in expected]
    np.testing.assert_allclose(values(got), values(expected), atol=1.1e-6)


def test_too_little_memory_for_one_utterance_and_other_faults_are_not_hidden(
    trained, corpus, tmp_path, monkeypatch
):
    for message, kind, said in (
        ("not enough memory", UserError, "lower --max_seconds"),
        ("an illegal memory access was encountered", RuntimeError, "illegal"),
    ):

        def fail(size, message=message):
            raise RuntimeError(message)

        with monkeypatch.context() as patch, pytest.raises(kind, match=said):
            limit_layer_norm(patch, fail)
            predicted(["--checkpoint", trained, corpus.parent / "s1d0t0.wav"], tmp_path / "out.csv")


# --- files and windows


def write_noise(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(os.fsencode(path), noise, 16_000, format="WAV")


def test_all_of_a_folder_is_tried_that_is_not_something_else_and_the_rest_is_named(
    trained, tmp_path, capsys
):
    folder, other = tmp_path / "in", tmp_path / "other"
    latin = os.fsdecode(b"caf\xe9.wav")
    for name in ("deep/a b'c.flac", "no_suffix", "z.opus", latin):
        write_noise(folder / name)
    write_noise(other / "linked.wav")
    (folder / "broken.wav").write_bytes(b"RIFF nonsense")
    (folder / ".hidden.wav").touch()
    for name in ("notes.txt", "more.txt", "x.json"):
        (folder / name).write_text("no audio")
    os.mkfifo(folder / "pipe.wav")
    for link, target in (
        ("a_link", "deep"), ("deep/up", ".."), ("linked", other), ("gone.wav", "nowhere"),
        ("self", "self"),
    ):  # fmt: skip
        (folder / link).symlink_to(target)
    got = predicted(["--checkpoint", trained, folder], tmp_path / "out.csv")
    assert {str(Path(row["path"]).relative_to(folder)) for row in got} == {
        "deep/a b'c.flac", "no_suffix", "z.opus", "linked/linked.wav", "caf\\udce9.wav",
    }  # fmt: skip
    said = capsys.readouterr()
    assert "1 .json" in said.err and "2 .txt" in said.err and "1 hidden" in said.err
    for name in ("broken.wav", "pipe.wav", "gone.wav", "in/self"):
        assert re.search(rf"skipped \w+ \(.*{name}\): ", said.err), name
    assert "5 utterances, 4 skipped" in said.out
    argv = ["--checkpoint", trained, folder / "broken.wav", "--out", tmp_path / "none.csv"]
    assert predict.main(predict.parse_args(list(map(str, argv)))) == 1
    assert not (tmp_path / "none.csv").exists()


def test_a_list_in_a_file_or_on_stdin_is_read_and_what_is_missing_is_named(
    trained, tmp_path, capsys, monkeypatch
):
    latin = os.fsdecode(b"caf\xe9.wav")
    for name in ("a b.wav", "-x.wav", latin, "deep/c.wav"):
        write_noise(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = b"a b.wav\r\n\n-x.wav\nno where.wav\ndeep\ncaf\xe9.wav"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text)
    for word in ("@list.txt", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        got = predicted(["--checkpoint", trained, word], tmp_path / "out.csv")
        assert [row["path"] for row in got] == ["a b.wav", "-x.wav", "deep/c.wav", "caf\\udce9.wav"]
        assert "skipped no where (no where.wav): no such file" in capsys.readouterr().err
    rows, said = streamed(["--checkpoint", trained, "@list.txt"], capsys, monkeypatch)
    assert len(rows) == 4 and "4 given, 1 skipped" in said


def test_the_extremes_of_audio_are_predicted_as_their_plain_form_or_named(
    trained, tmp_path, capsys
):
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    six = np.repeat(noise[:, None], 6, axis=1)
    files = {
        "plain": (noise, "FLOAT"), "double": (noise, "DOUBLE"), "six_channels": (six, "FLOAT"),
        "no_samples": (noise[:0], "FLOAT"), "one_sample": (noise[:1], "FLOAT"),
        "two_samples": (noise[:2], "FLOAT"), "long": (np.tile(noise[:1000], 9_620), "PCM_U8"),
    }  # fmt: skip
    for name, (samples, subtype) in files.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000, subtype=subtype)
    (tmp_path / "empty.wav").touch()
    got = predicted(["--checkpoint", trained, tmp_path], tmp_path / "out.csv")
    table = {row["utt_id"]: row for row in got}
    assert table.keys() == {"plain", "double", "six_channels", "two_samples"}
    alike = values(table[name] for name in ("plain", "double", "six_channels"))
    np.testing.assert_allclose(alike, alike[[0, 0, 0]], atol=1e-5)
    said = capsys.readouterr().err
    for name, reason in (
        ("empty", "cannot be decoded"), ("no_samples", "no samples"), ("one_sample", "no sound"),
        ("long", "longer than 600 s: give start and end or --window"),
    ):  # fmt: skip
        assert re.search(rf"skipped {name} \(.*\): {reason}", said), name


# --- formats that libsndfile does not know: here a .wav behind the first bytes of another format

FFMPEG = f"""#!{sys.executable}
import pathlib, sys
path, target = pathlib.Path(sys.argv[sys.argv.index("-i") + 1].removeprefix("file:")), sys.argv[-1]
content = path.read_bytes()[64:]
if not content:
    sys.exit("moov atom not found")
pathlib.Path(target).write_bytes(content)
"""
TORCHCODEC = """
import types, soundfile, torch
class AudioDecoder:
    def __init__(self, path):
        self.content = path.read_bytes()[64:]
        self.metadata = types.SimpleNamespace(duration_seconds_from_header=None)
        if not self.content:
            raise RuntimeError("moov atom not found")
    def get_all_samples(self):
        import io
        samples, rate = soundfile.read(io.BytesIO(self.content), dtype="float32", always_2d=True)
        return types.SimpleNamespace(data=torch.from_numpy(samples.T), sample_rate=rate)
"""
BEGINNINGS = {
    "a.m4a": b"\0\0\0\x20ftypM4A ", "b.webm": b"\x1aE\xdf\xa3", "c.amr": b"#!AMR\n",
    "d.aac": b"\xff\xf1\x50\x80", "e.wma": b"0&\xb2u\x8ef\xcf\x11",
    "f.avi": b"RIFF\1\2\3\4AVI LIST",
    "g.wav": b"\0\0\0\x18ftyp3gp4", "h": b"\0\0\0\x14ftypqt  ",
}  # fmt: skip


@pytest.fixture(params=["ffmpeg", "torchcodec", "none"])
def decoder(request, tmp_path, monkeypatch):
    """(name, what installs it) of a stand-in of what decodes more than libsndfile; none at first.

    Each file is decoded anew, as in a process of its own.
    """
    folder = tmp_path / "bin"
    (folder / "torchcodec").mkdir(parents=True)

    def forget():
        for function in (audio.torchcodec, audio.convert):
            function.cache_clear()

    def install():
        forget()
        if request.param == "ffmpeg":
            (folder / "ffmpeg").write_text(FFMPEG)
            (folder / "ffmpeg").chmod(0o755)
        elif request.param == "torchcodec":
            for name in ("torchcodec", "torchcodec.decoders"):
                del sys.modules[name]
            (folder / "torchcodec/__init__.py").touch()
            (folder / "torchcodec/decoders.py").write_text(TORCHCODEC)
            (folder / "torchcodec-0.9.dist-info").mkdir()
            metadata = "Metadata-Version: 2.1\nName: torchcodec\nVersion: 0.9\n"
            (folder / "torchcodec-0.9.dist-info/METADATA").write_text(metadata)
            (folder / "torchcodec-0.9.dist-info/top_level.txt").write_text("torchcodec\n")

    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    yield request.param, install
    forget()


def write_foreign(folder, source):
    """The sound in each of the formats, and one file without any."""
    folder.mkdir()
    for name, beginning in BEGINNINGS.items():
        (folder / name).write_bytes(beginning.ljust(64, b"\0") + source.read_bytes())
    (folder / "damaged.m4a").write_bytes(BEGINNINGS["a.m4a"].ljust(64, b"\0"))


def test_other_formats_are_read_like_a_wav_or_one_line_says_what_to_install(
    trained, decoder, corpus, tmp_path, capsys
):
    (name, install), clip = decoder, corpus.parent / "s1d0t0.wav"
    [expected] = values(predicted(["--checkpoint", trained, clip], tmp_path / "clip.csv"))
    write_foreign(tmp_path / "in", clip)
    argv = ["--checkpoint", trained, clip, tmp_path / "in"]
    install()
    for more in ([], ["--window", 0.2, "--hop", 0.2]):
        capsys.readouterr()
        got = predicted([*argv, *more], tmp_path / "out.csv")
        said = capsys.readouterr().err
        names = {Path(row["path"]).name for row in got}
        if name == "none":
            assert names == {clip.name}
            assert said.count("needs the program ffmpeg or the package torchcodec") == 9
            continue
        assert names == {clip.name, *BEGINNINGS} and "moov atom not found" in said
        if not more:
            np.testing.assert_allclose(values(got), np.tile(expected, (9, 1)), atol=1.1e-6)
        else:
            assert len(got) == 9 * len([row for row in got if row["path"] == str(clip)])


def test_training_reads_other_formats_too_once_there_is_what_decodes_them(
    decoder, corpus, tmp_path
):
    (name, install), clip = decoder, corpus.parent / "s1d0t0.wav"
    write_foreign(tmp_path / "in", clip)
    table = "utt_id,path,start,end\n"
    table += "first,IN/a.m4a,,\npart,IN/a.m4a,0.1,0.25\nother,IN/b.webm,0.1,0.25\nplain,CLIP,,\n"
    table = table.replace("IN", str(tmp_path / "in")).replace("CLIP", str(clip))
    (tmp_path / "in/m.csv").write_text(table)
    manifest = read_csv(tmp_path / "in/m.csv", Path("/"), None, targets=())
    found, _ = data.load_audio(manifest, tmp_path / "cache", 1.0)
    assert [u.utt_id for u in found.utterances] == ["plain"]
    assert {reason for _, _, reason in found.skipped} == {audio.NO_DECODER}
    install()
    found, pack = data.load_audio(manifest, tmp_path / "cache", 1.0)
    if name == "none":
        assert len(found.skipped) == 3
        return
    assert not found.skipped and f"audio decoded by {name}: 3 utterances" in found.notes
    np.testing.assert_array_equal(pack.read(0), pack.read(3))
    for row in (1, 2):
        np.testing.assert_array_equal(pack.read(row), pack.read(3, 1600, 4000))


# --- outputs that are closed or full


def ended(monkeypatch, stdout, argv):
    """Exit code of predict.py with that standard output."""
    logging.getLogger("vatune").handlers.clear()  # those of train.main, which print to stdout
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        args = predict.parse_args(list(map(str, argv)))
        return files.run_script("predict.py", lambda: predict.main(args))


def test_a_closed_or_full_standard_output_loses_neither_the_table_nor_a_word(
    trained, corpus, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out.csv"
    argv = ["--checkpoint", trained, corpus.parent / "s1d0t0.wav", "--out", out]
    full, (reader, writer) = os.open("/dev/full", os.O_WRONLY), os.pipe()
    os.close(reader)
    for stdout, code, said in (
        (None, 0, ""),
        (os.fdopen(writer, "w"), 141, ""),
        (os.fdopen(full, "w"), 2, "predict.py: error: standard output: No space left"),
    ):
        out.unlink(missing_ok=True)
        assert ended(monkeypatch, stdout, argv) == code
        assert capsys.readouterr().err.startswith(said) and len(rows(out)) == 1


def test_a_full_disk_names_the_file_and_the_disk_and_keeps_what_was_there(
    trained, corpus, tmp_path, monkeypatch, capsys
):
    out, fsync = tmp_path / "out.csv", os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("aside"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    out.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    argv = ["--checkpoint", trained, corpus.parent / "s1d0t0.wav", "--out", out]
    assert ended(monkeypatch, sys.stdout, argv) == 2
    said = capsys.readouterr().err
    disk = r"\(disk of /\S* \(\d+ MiB free\)\)"
    assert re.search(rf"error: {out}: No space left on device {disk}: free some", said)
    assert out.read_text() == "before"


BROKEN = "matplotlib tensorboard opensmile sklearn jinja2 torchcodec torchaudio speechbrain cv2"


def test_broken_packages_that_a_command_does_not_need_do_not_end_it(flags, corpus, tmp_path):
    directory = run(flags)
    for name in BROKEN.split():
        (tmp_path / "broken" / name).mkdir(parents=True)
        text = "raise OSError('libcudart.so.12: cannot open')"
        (tmp_path / "broken" / name / "__init__.py").write_text(text)
    code = f"""
import json, predict, report, sys
for words in {[["--help"], ["--checkpoint", str(directory), str(corpus.parent / "s1d0t0.wav")]]}:
    try:
        words += ["--out", "out.csv"]
        print(predict.main(predict.parse_args(words)))
        print(report.main(report.parse_args(["{directory.parent}", "--folds", "1"])))
        predict.main(predict.parse_args([*words, "--window", "0.5", "--hop", "0.5", "--plot", "p"]))
    except (SystemExit, ValueError) as error:
        print(type(error).__name__, error)
"""
    path = f"{tmp_path / 'broken'}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "usage: python predict.py" in done.stdout, done.stderr
    assert "1 utterances, 0 skipped" in done.stdout and "separation: not given" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert re.match(
        r"UserError a picture needs matplotlib, which does not work \(matplotlib \d", last
    )


# --- windows


def test_windows_cover_the_file_and_equal_the_same_cuts_of_a_manifest(trained, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, int(22_050 * 3.3))
    for folder, seconds in (("one", 3.3), ("two", 0.7)):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "a.wav", noise[: int(22_050 * seconds)], 22_050)
    argv = ["--checkpoint", trained, "--window", 1.5, "--hop", 0.5, "--plot", tmp_path / "png"]
    got = predicted([*argv, tmp_path / "one", tmp_path / "two"], tmp_path / "out.csv")
    cuts = [(float(row["start"]), float(row["end"])) for row in got]
    long = [(0, 1.5), (0.5, 2), (1, 2.5), (1.5, 3), (1.8, 3.3)]
    np.testing.assert_allclose(cuts, [*long, (0, 0.7)], atol=1e-3)
    assert list(got[0]) == ["utt_id", "path", "start", "end", *COLUMNS]

    with open(tmp_path / "cuts.csv", "w") as file:
        file.write("utt_id,path,start,end\n")
        file.writelines(f"{i},one/a.wav,{start},{end}\n" for i, (start, end) in enumerate(long))
    by_hand = ["--checkpoint", trained, "--data", tmp_path / "cuts.csv"]
    expected = predicted(by_hand, tmp_path / "cuts_out.csv")
    np.testing.assert_allclose(values(got)[:5], values(expected), atol=1.1e-6)

    (tmp_path / "m.csv").write_text("utt_id,path\na$b_$c,one/a.wav\nother,two/a.wav\n")
    predicted([*argv, "--data", tmp_path / "m.csv"], tmp_path / "out.csv")
    names = {"one_a.wav.png", "two_a.wav.png", "a$b_$c.png", "other.png"}  # utterances' names
    assert {path.name for path in (tmp_path / "png").iterdir()} == names


# --- dialogues as they happen


def test_a_stream_equals_the_batch_and_its_state_survives_the_process(
    dialogues, corpus, tmp_path, capsys, monkeypatch
):
    table = [{"utt_id": f"s1d{d}t{t}"} for d in (0, 1) for t in range(4)]
    manifest = manifest_of(table, corpus, "two.csv")
    argv = ["--checkpoint", dialogues, "--data", manifest]
    expected = values(predicted(argv, tmp_path / "o.csv"))
    files = [str(corpus.parent / f"{row['utt_id']}.wav") for row in table]
    run_flags = ["--checkpoint", dialogues]

    lines = "\n".join([*files[:4], "", "nowhere.wav", *files[4:]])
    whole, said = streamed(run_flags, capsys, monkeypatch, lines)
    assert [row["path"] for row in whole] == files
    np.testing.assert_allclose(values(whole), expected, atol=2e-6)
    assert "skipped nowhere (nowhere.wav)" in said
    assert "8 given, 1 skipped" in said and " us per" in said

    keep = [*run_flags, "--state", tmp_path / "state"]
    parts = [streamed([*keep, *part], capsys, monkeypatch)[0] for part in (files[:1], files[1:4])]
    assert parts[0] + parts[1] == whole[:4]
    assert streamed([*keep, *files[4:]], capsys, monkeypatch)[0] != whole[4:]
    assert streamed(keep, capsys, monkeypatch, f"\n{files[0]}\n")[0] == whole[:1]
    assert streamed(keep, capsys, monkeypatch, "\n")[0] == []
    assert streamed([*keep, *files[4:]], capsys, monkeypatch)[0] == whole[4:]


def test_a_state_of_another_checkpoint_or_of_nobody_is_refused(dialogues, corpus, tmp_path):
    clip, state = corpus.parent / "s1d0t0.wav", tmp_path / "state"
    for content, said in (
        ({"checkpoint": "another", "state": None}, "--state .*one of another checkpoint"),
        ({"model": {}}, "--state .*not a state"),
        (None, str(state)),
    ):
        if content is None:
            state.write_bytes(b"nonsense")
        else:
            save_checkpoint(state, content)
        argv = ["--checkpoint", dialogues, "--stream", "--state", state, clip]
        with pytest.raises(UserError, match=said):
            predict.main(predict.parse_args(list(map(str, argv))))


def test_a_run_on_single_utterances_carries_nothing(trained, corpus, tmp_path, capsys, monkeypatch):
    clip = corpus.parent / "s1d0t0.wav"
    twice, said = streamed(["--checkpoint", trained, clip, clip], capsys, monkeypatch)
    assert twice[0] == twice[1] and "nothing is carried" in said
    with pytest.raises(UserError, match="--state"):
        streamed(["--checkpoint", trained, clip, "--state", tmp_path / "s"], capsys, monkeypatch)


# --- export


@pytest.mark.parametrize(
    "extra",
    [("--unfreeze", "all"), ("--unfreeze", "none"), ("--layers", "1")],
    ids=["trained", "in frozen.pt", "without its top layer"],
)
def test_an_export_predicts_the_same_and_its_wavlm_loads_in_transformers(
    flags, corpus, tmp_path, extra
):
    from transformers import WavLMModel

    directory = run(flags, *extra)
    exported = tmp_path / "model"
    argv = ["--checkpoint", str(directory), "--export", str(exported)]
    assert predict.main(predict.parse_args(argv)) == 0
    clips = sorted(corpus.parent.glob("s1*.wav"))
    first, second = (
        (predicted(["--checkpoint", source, *clips], tmp_path / "out.csv"))
        for source in (directory, exported)
    )
    assert first == second

    model, _ = load_model(exported, "--checkpoint")
    theirs, info = WavLMModel.from_pretrained(exported / "wavlm", output_loading_info=True)
    assert not any(info.values())
    waveform = torch.randn(2, 9_000, generator=torch.manual_seed(0))
    mask = torch.arange(9_000) < torch.tensor([[9_000], [6_000]])
    with torch.no_grad():
        for attention_mask in (None, mask):
            states, frame_mask = model.encoder.wavlm(waveform, attention_mask)
            given = None if attention_mask is None else attention_mask.long()
            out = theirs.eval()(waveform, attention_mask=given, output_hidden_states=True)
            out = out.hidden_states[-1] if extra[0] == "--layers" else out.last_hidden_state
            real = slice(None) if frame_mask is None else frame_mask
            torch.testing.assert_close(states[max(states)][real], out[real], rtol=0, atol=1e-5)
    ours = load_wavlm(str(exported / "wavlm")).state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in model.encoder.wavlm.state_dict().items())
    again = ["--wavlm", str(exported / "wavlm"), "--layers", "1", "--name", "again"]
    assert run([*flags, *again]).exists()

    card, results = (exported / "README.md").read_text(), rows(directory / "predictions_test.csv")
    assert f"- test, {len(results)} utterances: CCC valence " in card
    assert "valence and arousal (in this order)" in card and "0 to\n1," in card
    with pytest.raises(UserError, match=r"model exists"):
        predict.main(predict.parse_args(argv))
    with pytest.raises(UserError, match="is an export already"):
        predict.export(str(exported), tmp_path / "twice")


def test_a_cnn_exports_without_a_wavlm_and_without_a_result_says_so(flags, tmp_path):
    directory = run(flags, "--encoder", "baseline", "--base_channels", "4", "--num_blocks", "2")
    (directory / "result.json").unlink()
    predict.export(str(directory / "best.pt"), tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    assert "not evaluated" in (tmp_path / "model/README.md").read_text()


# --- personalisation


def test_a_run_or_an_export_is_personalised_without_repeating_its_flags(flags, corpus, tmp_path):
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    for row in rows(corpus):
        np.save(vectors / f"{row['utt_id']}.npy", np.ones(3, dtype=np.float32))
    trained = run(flags, "--speaker", str(vectors), "--max_seconds", "0.7", "--name", "first")
    predict.export(str(trained), tmp_path / "model")
    manifest = corpus.parent / "new.csv"  # no column speaker: one is in all splits
    with open(manifest, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["utt_id", "path", "valence", "arousal", "split"])
        for i, r in enumerate(rows(corpus)[:14]):
            split = "train" if i < 10 else "dev" if i < 12 else "test"
            writer.writerow([r["utt_id"], r["path"], r["valence"], r["arousal"], split])
    for source in (trained, tmp_path / "model"):
        argv = ["--init_from", str(source), "--train_only", "film", "--data", str(manifest)]
        argv += ["--epochs", "5", "--num_workers", "0", "--name", source.name, "--device", "cpu"]
        argv += ["--out", str(tmp_path / "runs"), "--cache_dir", str(corpus.parent / "cache")]
        args = train.parse_args(argv)
        assert (args.max_seconds, args.d_hidden, args.speaker) == (0.7, 16, str(vectors))
        assert train.parse_args([*argv, "--max_seconds", "2"]).max_seconds == 2
        assert train.main(args) == 0
        before, _ = load_model(source, "")
        after, _ = load_model(run_dir(args), "")
        after = after.state_dict()
        moved = {k.split(".")[0] for k, v in before.state_dict().items() if not v.equal(after[k])}
        assert moved == {"film"}


# --- errors


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--checkpoint", "RUN", "nowhere.wav"], "nowhere.wav"),
        (["--checkpoint", "nowhere", "CLIP"], "--checkpoint nowhere.*: no such file"),
        (["--checkpoint", "CLIP", "CLIP"], "not a best.pt"),
        (["--checkpoint", "RUN", "CLIP", "--features_dir", "f"], "--features_dir f: .*remove it"),
        (["--checkpoint", "RUN", "CLIP", "--speaker", "xvector"], "--speaker xvector: .*remove it"),
        (["--checkpoint", "RUN", "--data", "CSV"], r"--out .* is an input, or a folder"),
        (["--checkpoint", "RUN", "CLIP"], r"--out .* is an input, or a folder"),
    ],
)
def test_wrong_input_is_named_and_what_is_read_is_not_written_over(
    trained, corpus, tmp_path, argv, said
):
    words = {"RUN": str(trained), "CLIP": str(corpus.parent / "s1d0t0.wav"), "CSV": str(corpus)}
    before, out = corpus.read_bytes(), corpus if "CSV" in argv else tmp_path / "out.csv"
    if argv[1:] == ["RUN", "CLIP"]:
        out.mkdir()
    with pytest.raises(UserError, match=said):
        predicted([words.get(word, word) for word in argv], out)
    assert corpus.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a.wav", "give --out"),
        ("a.wav --out a.wav", "--out a.wav: must end in .csv"),
        ("--out x.csv", "give either audio files, - for a list"),
        ("a.wav --data b.csv --out x.csv", "give either audio files, - for a list"),
        ("a.wav --out nowhere/x.csv", "--out nowhere/x.csv: no such folder"),
        ("a.wav --out x.csv --window 8 --hop 9", "0 < hop <= window"),
        ("a.wav --out x.csv --window 0.01", "0.1 s or more"),
        ("a.wav --out x.csv --max_seconds -1", "--max_seconds: 0.1 or more"),
        ("a.wav --out x.csv --max_seconds inf", "--max_seconds: 0.1 or more"),
        ("a.wav --out x.csv --data_dir d", "need --data"),
        ("a.wav --out x.csv --plot pictures", "give --window"),
        ("a.wav --out x.csv --hop 1", "--hop is between windows: give --window"),
        ("a.wav --out x.csv --window 1 --hop 2", "--hop 2: need 0 < hop <= window"),
        ("a.wav --out x.csv --state s", "--state needs --stream"),
        ("--stream --data b.csv", "--stream takes files"),
        ("--stream --checkpoint other", "one --checkpoint"),
        ("--export model a.wav", "--export takes a run alone"),
    ],
)
def test_flags_that_exclude_each_other_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.parse_args(["--checkpoint", "run", *words.split()])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 2  # usage, then the error


def test_a_kept_cache_gives_the_same_predictions_without_decoding_again(
    trained, corpus, tmp_path, monkeypatch
):
    words = ["--checkpoint", trained, corpus.parent / "s1d0t0.wav"]
    plain = predicted(words, tmp_path / "plain.csv")
    words += ["--cache_dir", tmp_path / "cache"]
    first = predicted(words, tmp_path / "first.csv")
    monkeypatch.setattr(data, "decode", lambda *_: pytest.fail("decoded again"))
    assert predicted(words, tmp_path / "second.csv") == first == plain
