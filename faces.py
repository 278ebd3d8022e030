"""Frame features from images: faces or video frames of each utterance -> OUT/<utt_id>.npy (T, D).

    python faces.py --face_dir F --features_224_dir OUT                  # every folder of F
    python faces.py --video_dir V --features_224_dir OUT --data my.csv   # those of a corpus
    python train.py --data my.csv --encoder transformer --features_dir OUT

Frames of --video_dir are resized and centre-cropped as the processor of the model does; crops of
--face_dir are used as they are, at 224 pixels. Existing files are kept, so an interrupted run can
be started again. Not done here: face detection, cutting videos into frames.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from corpora import natural, read_corpus
from util.files import (
    UserError,
    described,
    optional_module,
    progress_bar,
    replacing,
    run_script,
    weights_digest,
)


def image_folders(args: argparse.Namespace) -> dict[str, Path]:
    """utt_id -> folder of its images, of every utterance that is wanted."""
    folders: dict[str, Path] = {}
    for flag, base in (("--video_dir", args.video_dir), ("--face_dir", args.face_dir)):
        if base and not Path(base).is_dir():
            raise UserError(f"{flag} {base}: not a directory")
        if base:  # --face_dir comes second, so it replaces --video_dir
            folders |= {path.name: path for path in Path(base).iterdir() if path.is_dir()}
    wanted = sorted(folders)
    if args.data:
        corpus = read_corpus(args.data, args.data_dir, args.label_range, args.cache_dir)
        wanted = [u.utt_id for u in corpus.utterances]
    empty = [utt_id for utt_id in wanted if not image_files(folders.get(utt_id))]
    if empty or not wanted:
        raise UserError(
            f"{len(empty)} of {len(wanted)} utterances have no .jpg or .png in a folder of their "
            f"name below --video_dir or --face_dir ({', '.join(empty[:3])})"
        )
    return {utt_id: folders[utt_id] for utt_id in wanted}


def image_files(folder: Path | None) -> list[Path]:
    """.jpg, .jpeg and .png files of a folder, frame 10 after frame 9."""
    found = folder.iterdir() if folder else []
    found = [path for path in found if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    found = [path for path in found if not path.name.startswith(".")]
    return sorted(found, key=lambda path: natural(path.name))


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
    processor: object, model: torch.nn.Module, device: str
) -> Callable[[list[Path], bool], torch.Tensor]:
    """(image files, are they crops?) -> (B, D) embeddings."""

    @torch.inference_mode()
    def embed(files: list[Path], are_crops: bool) -> torch.Tensor:
        pictures = [Image.open(path).convert("RGB") for path in files]
        options = {}
        if are_crops:
            pictures = [picture.resize((224, 224)) for picture in pictures]
            options = {"do_resize": False, "do_center_crop": False}
        pixels = processor(pictures, return_tensors="pt", **options)["pixel_values"]
        output = model(pixel_values=pixels.to(device))
        hidden = output.last_hidden_state  # (B, 1 + patches, D), or (B, D, H, W) of a CNN
        return hidden[:, 0] if hidden.ndim == 3 else output.pooler_output.flatten(1)  # (B, D)

    return embed


def extract(args: argparse.Namespace) -> None:
    """Writes the missing files; OUT/extract.json names the weights, so two models never mix."""
    folders = image_folders(args)
    processor, model = load_vision_model(args)
    out = Path(args.features_dir)
    out.mkdir(parents=True, exist_ok=True)
    made_by = json.dumps([weights_digest(model.state_dict()), processor.to_json_string()])
    stamp = out / "extract.json"
    if stamp.exists() and stamp.read_text() != made_by:
        raise UserError(f"{out} holds features of another model: choose another --features_224_dir")
    stamp.write_text(made_by)
    embed = embedder(processor, model, args.device)
    missing = [utt_id for utt_id in folders if not (out / f"{utt_id}.npy").exists()]
    for utt_id in progress_bar(missing, len(missing), "faces"):
        are_crops = bool(args.face_dir) and folders[utt_id].parent == Path(args.face_dir)
        files = image_files(folders[utt_id])
        batches = [files[i : i + args.batch_size] for i in range(0, len(files), args.batch_size)]
        vectors = torch.cat([embed(batch, are_crops) for batch in batches])  # (T, D)
        with replacing(out / f"{utt_id}.npy") as file:
            np.save(file, vectors.float().cpu().numpy())
    print(f"{out}: {len(missing)} files written, {len(folders) - len(missing)} were there")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="frame features from images")
    add = parser.add_argument
    add("--video_dir", help="frames: VIDEO_DIR/<utt_id>/*.jpg or *.png")
    add("--face_dir", help="224-pixel crops in the same layout; used in place of --video_dir")
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
    return args


if __name__ == "__main__":
    args = parse_args()
    sys.exit(run_script("faces.py", lambda: extract(args)))
