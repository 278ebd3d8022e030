"""Frame features from images: faces or video of each utterance -> OUT/<utt_id>.npy (T, D).

    python faces.py --face_dir F --features_224_dir OUT                  # every folder of F
    python faces.py --video_dir V --features_224_dir OUT --data my.csv   # those of a corpus
    python train.py --data my.csv --encoder transformer --features_dir OUT

An utterance is a folder of images, <utt_id>/*.jpg, or a video: <utt_id>.mp4 (.avi, .mkv, ...) in
V or below it or, with --data, the part of <dialog>.mp4 from `start` to `end` of the manifest, or
from onset to end of the turn in IEMOCAP. OpenCV or torchcodec, whichever is installed, takes --fps
frames per second from a video. Frames of --video_dir are resized and centre-cropped as the
processor of the model does; crops of --face_dir are used as they are, at 224 pixels.
Existing files are kept, so an interrupted run can be started again. Not here: face detection.
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from corpora import Utterance, natural, read_corpus, read_files
from util import files
from util.audio import seconds_of
from util.files import UserError

IMAGES = {".jpg", ".jpeg", ".png"}
VIDEOS = {
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm",
    ".wmv",
}  # fmt: skip
DAY = 86_400.0  # seconds: behind the end of any video


class Source(NamedTuple):
    """Where the pictures of an utterance are: a folder of images, or a part of a video."""

    path: Path
    start: float = 0.0  # seconds of the video
    end: float = DAY


def find_sources(args: argparse.Namespace) -> dict[str, Source]:
    """utt_id -> its pictures, of every utterance that is wanted."""
    for flag, base in (("--video_dir", args.video_dir), ("--face_dir", args.face_dir)):
        if base and not Path(base).is_dir():
            raise UserError(f"{flag} {base}: not a directory")
    bases = [Path(base) for base in (args.video_dir, args.face_dir) if base]
    videos: dict[str, Path] = {}
    for path in [u.path for u in read_files([args.video_dir or ""]).utterances]:
        if path.suffix.lower() in VIDEOS and videos.setdefault(path.stem, path) != path:
            both = f"{videos[path.stem]} and {path}"
            raise UserError(f"--video_dir: {both} have one name: remove one")
    sources = {name: Source(path) for name, path in videos.items()}
    above = {folder for path in videos.values() for folder in path.parents}
    for base in bases:  # crops come second, so they replace frames
        folders = [path for path in base.iterdir() if path.is_dir() and path not in above]
        sources |= {path.name: Source(path) for path in folders}
    if args.data:
        corpus = read_corpus(args.data, args.data_dir, None, args.cache_dir, targets=())
        wanted = {}
        for u in corpus.utterances:
            wanted[u.utt_id] = sources.get(u.utt_id)
            if u.utt_id not in sources and u.dialog in videos:
                wanted[u.utt_id] = part_of(videos[u.dialog], u, corpus.name)
        sources = wanted
    empty = [
        utt_id
        for utt_id, source in sources.items()
        if source is None or (source.path.is_dir() and not image_files(source.path))
    ]
    if empty or not sources:
        raise UserError(
            f"{len(empty)} of {len(sources)} utterances have no .jpg or .png in a folder of their "
            f"name, and no video, below --video_dir or --face_dir ({', '.join(empty[:3])})"
        )
    return sources


def part_of(video: Path, u: Utterance, corpus: str) -> Source:
    """The part of its dialogue's video that an utterance is."""
    if corpus == "iemocap":
        return Source(video, u.onset, u.onset + seconds_of(u.path))
    if u.end is None:
        fix = "give columns start and end, or a video of its own"
        raise UserError(f"{u.utt_id}: its part of {video} is not known: {fix}")
    return Source(video, u.start, u.end)


def image_files(folder: Path) -> list[Path]:
    """.jpg, .jpeg and .png files of a folder, frame 10 after frame 9."""
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in IMAGES]
    return [folder / name for name in sorted(names, key=natural) if name[0] != "."]


# ---------------------------------------------------------------------------------------------
# Videos


def read_video(path: Path, times: np.ndarray) -> Iterator[Image.Image]:
    """What the video shows at each of the times (seconds, ascending), until it ends.

    UserError if neither OpenCV nor torchcodec is installed and works.
    """
    faults = []
    for module, package, read in (
        ("cv2", "opencv-python-headless", frames_by_opencv),
        ("torchcodec.decoders", "torchcodec", frames_by_torchcodec),
    ):
        try:
            decoder = files.optional_module(module, package, "--video_dir with videos")
        except UserError as error:
            faults.append(str(error))
        else:
            return read(decoder, path, times)
    raise UserError(" | or ".join(faults))


def frames_by_opencv(cv2: ModuleType, path: Path, times: np.ndarray) -> Iterator[Image.Image]:
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise UserError(f"{path}: OpenCV cannot open it as a video")
    length = 1 / max(video.get(cv2.CAP_PROP_FPS), 1.0)  # of a frame, in seconds
    is_read, following = video.read()
    shown, begin, end = None, 0.0, 0.0  # begin is that of `following`, end that of `shown`
    for time in times:
        while is_read and begin <= time + 1e-3:
            shown, end = following, begin + length
            is_read, following = video.read()
            begin = video.get(cv2.CAP_PROP_POS_MSEC) / 1000 or end
        if not is_read and time >= end:
            return
        yield Image.fromarray(shown[:, :, ::-1].copy())  # BGR


def frames_by_torchcodec(
    decoders: ModuleType, path: Path, times: np.ndarray
) -> Iterator[Image.Image]:
    try:
        video = decoders.VideoDecoder(path, dimension_order="NHWC")
        begin, end = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds
        for time in times[times < end]:
            frame = video.get_frame_played_at(max(float(time), begin))
            yield Image.fromarray(frame.data.numpy())
    except (RuntimeError, ValueError) as error:  # also where FFmpeg's libraries are not found
        fault = str(error).partition("\n")[0][:120]
        fix = "install FFmpeg's libraries, or opencv-python-headless"
        raise UserError(f"{path}: torchcodec cannot read it ({fault}): {fix}") from None


# ---------------------------------------------------------------------------------------------
# Embeddings


def load_vision_model(args: argparse.Namespace) -> tuple[object, torch.nn.Module]:
    """(processor, model) in evaluation mode."""
    flag, options = f"--vision_model {args.vision_model}", {"trust_remote_code": False}
    transformers = files.optional_module("transformers", "transformers", flag)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(args.vision_model, **options)
        model = transformers.AutoModel.from_pretrained(args.vision_model, **options)
    except Exception as error:  # not there, no vision model, or a package that it imports is broken
        fault = files.described("transformers", error)
        raise UserError(f"{flag}: cannot be loaded ({fault})") from None
    return processor, model.to(args.device).eval()


@torch.inference_mode()
def embed(
    pictures: Iterator[Image.Image], are_crops: bool, vision: tuple, args: argparse.Namespace
) -> np.ndarray:
    """(T, D) float32 of the images, by the (processor, model)."""
    (processor, model), vectors = vision, []
    while batch := list(itertools.islice(pictures, args.batch_size)):
        options = {}
        if are_crops:
            batch = [picture.resize((224, 224)) for picture in batch]
            options = {"do_resize": False, "do_center_crop": False}
        pixels = processor(batch, return_tensors="pt", **options)["pixel_values"]
        output = model(pixel_values=pixels.to(args.device))
        hidden = output.last_hidden_state  # (B, 1 + patches, D), or (B, D, H, W) of a CNN
        hidden = hidden[:, 0] if hidden.ndim == 3 else output.pooler_output.flatten(1)  # (B, D)
        vectors.append(hidden.float().cpu())
    return torch.cat(vectors).numpy() if vectors else np.zeros((0, 0), dtype=np.float32)


def extract(args: argparse.Namespace) -> None:
    """Writes the missing files; OUT/extract.json names the weights, so two models never mix."""
    sources = find_sources(args)
    vision = load_vision_model(args)
    processor, model = vision
    out = Path(args.features_dir)
    out.mkdir(parents=True, exist_ok=True)
    made_by = [files.weights_digest(model.state_dict()), processor.to_json_string()]
    if any(source.path.is_file() for source in sources.values()):
        made_by.append(args.fps)
    stamp = out / "extract.json"
    if stamp.exists() and json.loads(stamp.read_text()) != made_by:
        fault = f"{out} holds features of another model, or at another --fps"
        raise UserError(f"{fault}: choose another --features_224_dir")
    stamp.write_text(json.dumps(made_by))
    missing = defaultdict(dict)  # file or folder -> utterances: a video is read once for all
    for utt_id, source in sources.items():
        if not (out / f"{utt_id}.npy").exists():
            missing[source.path][utt_id] = source
    written = 0
    for path, parts in files.progress_bar(missing.items(), len(missing), "faces"):
        if path.is_dir():
            are_crops = bool(args.face_dir) and path.parent == Path(args.face_dir)
            pictures = (Image.open(file).convert("RGB") for file in image_files(path))
            (utt_id,) = parts
            features = {utt_id: embed(pictures, are_crops, vision, args)}
        else:
            features = features_of_video(path, parts, vision, args)
        for utt_id, vectors in features.items():
            with files.replacing(out / f"{utt_id}.npy") as file:
                np.save(file, vectors)
        written += len(features)
    print(f"{out}: {written} files written, {len(sources) - written} were there")


def features_of_video(
    path: Path, parts: dict[str, Source], vision: tuple, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """utt_id -> (T, D) of its part of a video, which is read once; UserError if it ends before."""
    counts = [max(1, round((part.end - part.start) * args.fps)) for part in parts.values()]
    times = [part.start + np.arange(n) / args.fps for part, n in zip(parts.values(), counts)]
    owners = np.repeat(np.arange(len(parts)), counts)
    order = np.argsort(np.concatenate(times), kind="stable")
    pictures = read_video(path, np.concatenate(times)[order])
    vectors = embed(pictures, False, vision, args)
    owners = owners[order][: len(vectors)]
    features = {}
    for i, (utt_id, part) in enumerate(parts.items()):
        features[utt_id] = vectors[owners == i]
        lacking = part.end - part.start - len(features[utt_id]) / args.fps
        if not len(features[utt_id]) or (part.end < DAY and lacking > max(0.5, 2 / args.fps)):
            fault = f"ends before {utt_id} does, {part.end:g} s into it"
            raise UserError(f"{path}: {fault if len(vectors) else 'no frame can be read'}")
    return features


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="frame features from images and videos")
    add = parser.add_argument
    add("--video_dir", help="VIDEO_DIR/<utt_id>/*.jpg or *.png, or <utt_id> or <dialog> as video")
    add("--face_dir", help="224-pixel crops in folders; used in place of --video_dir")
    add("--fps", type=float, default=10.0, help="frames per second taken from a video")
    add("--features_224_dir", "--features_dir", dest="features_dir", required=True)
    add("--vision_model", default="facebook/dinov2-base", help="hub name or local directory")
    add("--batch_size", type=int, default=32, help="images per forward")
    add("--device", default="cpu", help="torch device")
    add("--data", help="only the utterances of this corpus: demo, iemocap, msp_podcast, or a .csv")
    add("--data_dir", help="root of the corpus, or of the relative paths in a CSV")
    add("--cache_dir", default="cache", help="directory of the demo corpus")
    args = parser.parse_args(argv)
    if not (args.video_dir or args.face_dir):
        parser.error("give --video_dir, --face_dir, or both")
    if not 0 < args.fps <= 1000:
        parser.error(f"--fps {args.fps:g}: must be above 0, at most 1000")
    return args


if __name__ == "__main__":
    args = parse_args()
    sys.exit(files.run_script("faces.py", lambda: extract(args)))
