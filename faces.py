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
import dataclasses
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from corpora import Utterance, natural, read_corpus, read_files
from util.audio import seconds_of
from util.files import (
    UserError,
    described,
    optional_module,
    progress_bar,
    replacing,
    run_script,
    weights_digest,
)

IMAGES = {".jpg", ".jpeg", ".png"}
VIDEOS = {
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm",
    ".wmv",
}  # fmt: skip
DAY = 86_400.0  # seconds: behind the end of any video


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the pictures of an utterance are: a folder of images, or a part of a video."""

    path: Path
    start: float = 0.0  # seconds of the video
    end: float = DAY


def find_sources(args: argparse.Namespace) -> dict[str, Source]:
    """utt_id -> its pictures, of every utterance that is wanted."""
    videos: dict[str, Path] = {}
    for path in [u.path for u in read_files(filter(None, [args.video_dir])).utterances]:
        if path.suffix.lower() in VIDEOS and videos.setdefault(path.stem, path) != path:
            both = f"{videos[path.stem]} and {path}"
            raise UserError(f"--video_dir: {both} have one name: remove one")
    sources = {name: Source(path) for name, path in videos.items()}
    above = {folder for path in videos.values() for folder in path.parents}
    for flag, base in (("--video_dir", args.video_dir), ("--face_dir", args.face_dir)):
        if base and not Path(base).is_dir():
            raise UserError(f"{flag} {base}: not a directory")
        folders = [path for path in Path(base).iterdir() if path.is_dir()] if base else []
        # crops come second, so they replace frames
        sources |= {path.name: Source(path) for path in folders if path not in above}
    if args.data:
        corpus = read_corpus(args.data, args.data_dir, args.label_range, args.cache_dir)
        for u in corpus.utterances:
            if u.utt_id not in sources and u.dialog in videos:
                sources[u.utt_id] = part_of(videos[u.dialog], u, corpus.name)
        sources = {u.utt_id: sources.get(u.utt_id) for u in corpus.utterances}
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
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES]
    found = [path for path in found if not path.name.startswith(".")]
    return sorted(found, key=lambda path: natural(path.name))


# ---------------------------------------------------------------------------------------------
# Videos


def video_reader() -> Callable[[Path, np.ndarray], Iterator[Image.Image]]:
    """frames_by_opencv or frames_by_torchcodec; UserError if neither is installed and works."""
    faults = []
    for module, package, read in (
        ("cv2", "opencv-python-headless", frames_by_opencv),
        ("torchcodec.decoders", "torchcodec", frames_by_torchcodec),
    ):
        try:
            optional_module(module, package, "--video_dir with videos")
            return read
        except UserError as error:
            faults.append(str(error))
    raise UserError(" | or ".join(faults))


def frames_by_opencv(path: Path, times: np.ndarray) -> Iterator[Image.Image]:
    """What the video shows at each of the times (seconds, ascending), until it ends."""
    cv2 = optional_module("cv2", "opencv-python-headless", "it")
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


def frames_by_torchcodec(path: Path, times: np.ndarray) -> Iterator[Image.Image]:
    """The same."""
    decoders = optional_module("torchcodec.decoders", "torchcodec", "it")
    try:
        video = decoders.VideoDecoder(path, dimension_order="NHWC")
        begin, end = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds
        for time in times[times < end]:
            frame = video.get_frame_played_at(max(float(time), begin))
            yield Image.fromarray(frame.data.numpy())
    except (RuntimeError, ValueError) as error:  # also where FFmpeg's libraries are not found
        fault = f"torchcodec cannot read it as a video ({str(error).partition(chr(10))[0][:120]})"
        if "libtorchcodec" in fault:
            fault += ": install FFmpeg's libraries, or opencv-python-headless"
        raise UserError(f"{path}: {fault}") from None


# ---------------------------------------------------------------------------------------------
# Embeddings


def load_vision_model(args: argparse.Namespace) -> tuple[object, torch.nn.Module]:
    """(processor, model) in evaluation mode."""
    flag, options = f"--vision_model {args.vision_model}", {"trust_remote_code": False}
    transformers = optional_module("transformers", "transformers", flag)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(args.vision_model, **options)
        model = transformers.AutoModel.from_pretrained(args.vision_model, **options)
    except Exception as error:  # not there, no vision model, or a package that it imports is broken
        fault = described("transformers", "transformers", error)
        raise UserError(f"{flag}: cannot be loaded ({fault})") from None
    return processor, model.to(args.device).eval()


def embedder(
    processor: object, model: torch.nn.Module, args: argparse.Namespace
) -> Callable[[Iterator[Image.Image], bool], np.ndarray]:
    """(images, are they crops?) -> (T, D) float32."""

    @torch.inference_mode()
    def embed(pictures: list[Image.Image], are_crops: bool) -> torch.Tensor:
        options = {}
        if are_crops:
            pictures = [picture.resize((224, 224)) for picture in pictures]
            options = {"do_resize": False, "do_center_crop": False}
        pixels = processor(pictures, return_tensors="pt", **options)["pixel_values"]
        output = model(pixel_values=pixels.to(args.device))
        hidden = output.last_hidden_state  # (B, 1 + patches, D), or (B, D, H, W) of a CNN
        return hidden[:, 0] if hidden.ndim == 3 else output.pooler_output.flatten(1)  # (B, D)

    def embed_all(pictures: Iterator[Image.Image], are_crops: bool) -> np.ndarray:
        vectors = []
        while batch := list(itertools.islice(pictures, args.batch_size)):
            vectors.append(embed(batch, are_crops).float().cpu())
        return torch.cat(vectors).numpy() if vectors else np.zeros((0, 0), dtype=np.float32)

    return embed_all


def extract(args: argparse.Namespace) -> None:
    """Writes the missing files; OUT/extract.json names the weights, so two models never mix."""
    sources = find_sources(args)
    has_videos = any(source.path.is_file() for source in sources.values())
    read_video = video_reader() if has_videos else None
    processor, model = load_vision_model(args)
    out = Path(args.features_dir)
    out.mkdir(parents=True, exist_ok=True)
    made_by = [weights_digest(model.state_dict()), processor.to_json_string()]
    made_by += [args.fps] if has_videos else []
    stamp = out / "extract.json"
    if stamp.exists() and json.loads(stamp.read_text()) != made_by:
        fault = f"{out} holds features of another model, or at another --fps"
        raise UserError(f"{fault}: choose another --features_224_dir")
    stamp.write_text(json.dumps(made_by))
    embed = embedder(processor, model, args)
    missing = defaultdict(list)  # file or folder -> utterances: a video is read once for all
    for utt_id, source in sources.items():
        if not (out / f"{utt_id}.npy").exists():
            missing[source.path].append(utt_id)
    written = 0
    for path, utt_ids in progress_bar(missing.items(), len(missing), "faces"):
        if path.is_dir():
            are_crops = bool(args.face_dir) and path.parent == Path(args.face_dir)
            pictures = (Image.open(file).convert("RGB") for file in image_files(path))
            features = {utt_ids[0]: embed(pictures, are_crops)}
        else:
            parts = {utt_id: sources[utt_id] for utt_id in utt_ids}
            features = features_of_video(path, parts, args.fps, read_video, embed)
        for utt_id, vectors in features.items():
            with replacing(out / f"{utt_id}.npy") as file:
                np.save(file, vectors)
        written += len(features)
    print(f"{out}: {written} files written, {len(sources) - written} were there")


def features_of_video(
    path: Path, parts: dict[str, Source], fps: float, read_video: Callable, embed: Callable
) -> dict[str, np.ndarray]:
    """utt_id -> (T, D) of its part of a video, which is read once; UserError if it ends before."""
    times = [np.arange(part.start, part.end, 1 / fps) for part in parts.values()]
    owners = np.repeat(np.arange(len(parts)), [len(some) for some in times])
    order = np.argsort(np.concatenate(times), kind="stable")
    vectors = embed(read_video(path, np.concatenate(times)[order]), False)
    owners = owners[order][: len(vectors)]
    features = {}
    for i, (utt_id, part) in enumerate(parts.items()):
        features[utt_id] = vectors[owners == i]
        lacking = part.end - part.start - len(features[utt_id]) / fps
        if not len(features[utt_id]) or (part.end < DAY and lacking > max(0.5, 2 / fps)):
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
    add("--label_range", nargs=2, type=float, metavar=("LO", "HI"), help="scale of the labels")
    add("--cache_dir", default="cache", help="directory of the demo corpus")
    args = parser.parse_args(argv)
    args.label_range = tuple(args.label_range) if args.label_range else None
    if not (args.video_dir or args.face_dir):
        parser.error("give --video_dir, --face_dir, or both")
    if not 0 < args.fps <= 1000:
        parser.error(f"--fps {args.fps:g}: must be above 0, at most 1000")
    return args


if __name__ == "__main__":
    args = parse_args()
    sys.exit(run_script("faces.py", lambda: extract(args)))
