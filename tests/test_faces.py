"""faces.py: features of folders of images and of videos."""

import sys

import numpy as np
import pytest
from conftest import tiny_vision_model
from PIL import Image

import faces
from util.files import UserError

STAND_IN = """
import numpy as np
CAP_PROP_FPS, CAP_PROP_POS_MSEC = 5, 0
class VideoCapture:  # of a file that np.save has written, 25 frames per second
    def __init__(self, path):
        try:
            self.frames, self.count = np.load(path), 0
        except ValueError:
            self.frames = None
    def isOpened(self):
        return self.frames is not None
    def get(self, what):
        return 25.0 if what == CAP_PROP_FPS else 40.0 * (self.count - 1)
    def read(self):
        self.count += 1
        if self.count > len(self.frames):
            return False, None
        return True, self.frames[self.count - 1][:, :, ::-1]
"""


def extract(tmp_path, *flags, out="out"):
    argv = ["--features_224_dir", tmp_path / out, "--vision_model", tmp_path / "model", *flags]
    faces.extract(faces.parse_args(list(map(str, argv))))
    return {path.stem: np.load(path) for path in (tmp_path / out).glob("*.npy")}


def save_images(folder, pictures):
    folder.mkdir(parents=True)
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_faces_writes_one_array_per_utterance_and_resumes(tmp_path):
    tiny_vision_model(tmp_path / "model")
    rng = np.random.default_rng(0)
    for utt_id, count, root in (("a", 12, "v"), ("b", 3, "v"), ("b", 2, "f")):
        pictures = rng.integers(0, 255, (count, 224, 224, 3), dtype=np.uint8)
        save_images(tmp_path / root / utt_id, pictures)
    flags = ["--video_dir", tmp_path / "v", "--face_dir", tmp_path / "f", "--batch_size"]
    first = extract(tmp_path, *flags, "5")
    assert first["a"].shape == (12, 16) and first["b"].shape == (2, 16)  # the crops win
    out = tmp_path / "out"
    (out / "b.npy").unlink()
    stamp = (out / "a.npy").stat().st_mtime_ns
    np.testing.assert_array_equal(extract(tmp_path, *flags, "5")["b"], first["b"])
    assert (out / "a.npy").stat().st_mtime_ns == stamp
    (out / "a.npy").unlink()
    again = extract(tmp_path, *flags, "1")  # frame 10 after frame 9, whatever the batch size
    np.testing.assert_allclose(again["a"], first["a"], atol=1e-5)
    tiny_vision_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="of another model"):
        extract(tmp_path, *flags, "5")
    (tmp_path / "v/empty").mkdir()
    with pytest.raises(UserError, match=r"1 of 3 utterances have no .jpg or .png.*\(empty\)"):
        extract(tmp_path, *flags, "5")


def add_module(monkeypatch, folder, name, text):
    """A module before any real one; the test leaves no trace of it."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, name, None)  # what was imported before comes back
    del sys.modules[name]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module cv2 that reads what np.save has written."""
    add_module(monkeypatch, tmp_path, "cv2", STAND_IN)


HEADER = "utt_id,path,start,end,dialog,valence,arousal,speaker\n"


def write_corpus(tmp_path, rows):
    """A manifest of parts of one recording, and V with a video of dialogue d and one of e."""
    (tmp_path / "x.wav").touch()
    (tmp_path / "m.csv").write_text(HEADER + rows.replace(" ", ",x.wav,").replace(";", "\n"))
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 255, (2, 50, 32, 48, 3), dtype=np.uint8)  # 2 s each
    (tmp_path / "v/Session1/avi").mkdir(parents=True)
    for name, video in zip(("Session1/avi/d.avi", "e.mp4"), videos):
        with open(tmp_path / "v" / name, "wb") as file:
            np.save(file, video)
    return videos


def test_a_video_gives_the_features_of_its_frames_at_fps_of_each_utterance_in_it(
    tmp_path, stand_in
):
    tiny_vision_model(tmp_path / "model")
    rows = "b 0.4,1.4,d,.1,.2,p;a 0,0.5,d,.1,.2,q;e 0,2,x,.3,.4,r"
    d, e = write_corpus(tmp_path, rows)
    flags = ["--data", tmp_path / "m.csv", "--fps", "10"]
    got = extract(tmp_path, "--video_dir", tmp_path / "v", *flags)
    times = {"a": np.arange(0, 0.5, 0.1), "b": np.arange(0.4, 1.4, 0.1), "e": np.arange(0, 2, 0.1)}
    for name, its_times in times.items():
        frames = (e if name == "e" else d)[((its_times + 1e-3) * 25).astype(int)]
        save_images(tmp_path / "frames" / name, frames)
    expected = extract(tmp_path, "--video_dir", tmp_path / "frames", *flags, out="frames_out")
    assert got.keys() == expected.keys() == {"a", "b", "e"}
    for name, values in got.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)
    alone = extract(tmp_path, "--video_dir", tmp_path / "v", out="alone")  # complete videos
    assert {name: len(values) for name, values in alone.items()} == {"d": 10 * 2, "e": 10 * 2}
    with pytest.raises(UserError, match="at another --fps"):
        extract(tmp_path, "--video_dir", tmp_path / "v", "--fps", "5", out="alone")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("c 1,3,d,.1,.2,p", r"d\.avi: ends before c does, 3 s into it"),
        ("c ,,d,.1,.2,p", r"c: its part of .*d\.avi is not known: give columns start and end"),
        ("c 0,1,f,.1,.2,p", "1 of 1 utterances have no .jpg or .png .* and no video"),
        ("b 0,1,b,.1,.2,p", r"b\.mkv: OpenCV cannot open it as a video"),
        ("e 0,1,e,.1,.2,p;two", r"--video_dir: .*e\.mov and .*e\.mp4 have one name"),
    ],
)
def test_a_video_that_does_not_fit_is_named(tmp_path, stand_in, rows, said):
    tiny_vision_model(tmp_path / "model")
    write_corpus(tmp_path, rows.removesuffix(";two"))
    (tmp_path / "v/b.mkv").write_text("no video")
    if rows.endswith("two"):
        (tmp_path / "v/e.mov").touch()
    with pytest.raises(UserError, match=said):
        extract(tmp_path, "--video_dir", tmp_path / "v", "--data", tmp_path / "m.csv")


def test_without_a_package_that_decodes_videos_one_line_names_those_that_would(
    tmp_path, monkeypatch
):
    tiny_vision_model(tmp_path / "model")
    write_corpus(tmp_path, "a 0,1,d,.1,.2,p")
    for name in ("cv2", "torchcodec"):
        add_module(monkeypatch, tmp_path, name, "raise RuntimeError('built for another CUDA')")
    with pytest.raises(UserError, match=r"opencv-python-headless.*torchcodec") as caught:
        extract(tmp_path, "--video_dir", tmp_path / "v")
    assert "\n" not in str(caught.value)


def test_a_real_video_is_read_by_opencv_where_it_is_installed(tmp_path):
    cv2 = pytest.importorskip("cv2")
    tiny_vision_model(tmp_path / "model")
    (tmp_path / "v").mkdir()
    writer = cv2.VideoWriter(
        str(tmp_path / "v/a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 64)
    )
    greys = np.linspace(0, 250, 50).astype(np.uint8)
    frames = np.broadcast_to(greys[:, None, None, None], (50, 64, 64, 3))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame))
    writer.release()
    save_images(tmp_path / "frames/a", frames)
    got = extract(tmp_path, "--video_dir", tmp_path / "v")["a"]
    all_of_them = extract(tmp_path, "--video_dir", tmp_path / "frames", out="frames_out")["a"]
    nearest = np.linalg.norm(got[:, None] - all_of_them, axis=2).argmin(1)  # compression is lossy
    assert nearest.tolist() == [int(2.5 * i) for i in range(20)]
