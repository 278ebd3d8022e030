"""A vector per utterance from its transcript: mean of a text encoder -> OUT/<utt_id>.npy (D,).

    python text.py --data my.csv --model roberta-large --out text       # its column `text`
    python text.py --data iemocap --data_dir IEMOCAP_full_release --model roberta-large --out text
    python train.py --data iemocap --data_dir IEMOCAP_full_release --vectors text

Transcripts: IEMOCAP's dialog/transcriptions, MSP-Podcast's Transcripts/, or the column `text` of a
CSV, which needs no labels: for predict.py, write one with utt_id, path and text. The model is any
text encoder or language model of transformers, by hub name or directory, with weights in
safetensors. An utterance without words gets what the model makes of its special tokens alone, or
zeros if it has none; texts beyond the model's length are cut. How many, is printed.
OUT/text.json names weights, layer and the tokens of each vector: an interrupted run can be started
again, a changed transcript is encoded anew, and another model is refused.
Not here: speech recognition.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpora import read_texts
from util import files
from util.files import UserError, digest


def load_text_model(args: argparse.Namespace) -> tuple[object, torch.nn.Module]:
    """(tokenizer, model in evaluation mode); of an encoder-decoder, its encoder."""
    flag, options = f"--model {args.model}", {"trust_remote_code": False}
    transformers = files.optional_module("transformers", "transformers", flag)
    transformers.logging.set_verbosity_error()  # what is missing is checked below
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, **options)
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, loaded = transformers.AutoModel.from_pretrained(args.model, **options)
        lacking = [name for name in loaded["missing_keys"] if "pooler" not in name]
        if lacking:
            raise ValueError(f"its weights lack {len(lacking)}, such as {min(lacking)}")
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        model = model.float().to(args.device).eval()
        embed(model, [tokenizer("a trial")["input_ids"]], None, 0)
        return tokenizer, model
    except Exception as error:  # not there, no text model, or a package that it imports is broken
        fault = files.described("transformers", error)
        fix = "give a text encoder in safetensors, which is here or can be downloaded"
        raise UserError(f"{flag}: cannot be used ({fault}): {fix}") from None


def tokens_of(
    tokenizer: object, model: torch.nn.Module, texts: dict[str, str]
) -> dict[str, list[int]]:
    """utt_id -> the tokens that the model reads; those beyond its length are cut, with a note."""
    limit = tokenizer.model_max_length
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        limit = min(limit, positions - 2)  # RoBERTa's begin at 2
    tokens = {u: tokenizer(said, verbose=False)["input_ids"] for u, said in texts.items()}
    long = [utt_id for utt_id in tokens if len(tokens[utt_id]) > limit]
    for utt_id in long:
        cut = tokenizer(texts[utt_id], truncation=True, max_length=limit)
        tokens[utt_id] = cut["input_ids"]
    if long:
        print(
            f"{len(long)} texts are longer than {limit} tokens ({', '.join(long[:3])}): cut there"
        )
    return tokens


@torch.inference_mode()
def embed(model: torch.nn.Module, batch: list[list[int]], layer: int | None, pad: int) -> Tensor:
    """(B, D) means over the tokens of each text; zeros of a text without any."""
    lengths = torch.tensor([len(tokens) for tokens in batch], device=model.device)
    longest = max(1, int(lengths.max()))
    ids = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in batch])
    mask = torch.arange(longest, device=model.device) < lengths.unsqueeze(1)  # True = token
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.long(),
        output_hidden_states=layer is not None,
    )
    hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
    real = mask.unsqueeze(2)  # (B, T, 1); hidden (B, T, D)
    return torch.where(real, hidden, 0).sum(1) / real.sum(1).clamp(min=1)


def open_output(out: Path, made_by: list, keys: dict[str, str]) -> list[str]:
    """Names of the vectors that are to be written; text.json then describes all.

    `keys`: utt_id -> digest of its tokens. Vectors of other tokens are deleted first. UserError if
    the directory holds what another model, or another program, has made.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamp, before = out / "text.json", {"made_by": None, "tokens": {}}
    if stamp.exists():
        before = json.loads(stamp.read_text())
    if before["made_by"] != made_by and any(out.glob("*.npy")):
        fault = "holds vectors of another model or --layer, or of another program"
        raise UserError(f"{out} {fault}: choose another --out")
    paths = {utt_id: out / f"{utt_id}.npy" for utt_id in keys}
    there = [utt_id for utt_id, path in paths.items() if path.exists()]
    changed = [utt_id for utt_id in there if keys[utt_id] != before["tokens"].get(utt_id)]
    for utt_id in changed:
        paths[utt_id].unlink()
    if changed:
        print(f"{len(changed)} vectors are of other transcripts ({min(changed)}): made anew")
    tokens = before["tokens"] | keys
    files.replace_text(stamp, json.dumps({"made_by": made_by, "tokens": tokens}))
    return [utt_id for utt_id, path in paths.items() if not path.exists()]


def extract(args: argparse.Namespace) -> None:
    """Writes the vectors that are missing."""
    texts = read_texts(args.data, args.data_dir)
    empty = [utt_id for utt_id, text in texts.items() if not text]
    if len(empty) == len(texts):
        raise UserError(f"{args.data}: none of its {len(texts)} utterances has a transcript")
    if empty:
        count = f"{len(empty)} of {len(texts)} utterances have no words ({', '.join(empty[:3])})"
        print(f"{count}: their vectors are those of an empty text")
    tokenizer, model = load_text_model(args)
    depth = getattr(model.config, "num_hidden_layers", 0)
    if args.layer is not None and not 0 <= args.layer <= depth:
        raise UserError(f"--layer {args.layer}: {args.model} has layers 0 to {depth}")
    tokens = tokens_of(tokenizer, model, texts)
    # a pooler is not used, and drawn at random where a checkpoint has none
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("pooler.")}
    keys = {utt_id: digest(of_text) for utt_id, of_text in tokens.items()}
    out = Path(args.out)
    missing = open_output(out, [files.weights_digest(weights), args.layer], keys)
    missing.sort(key=lambda utt_id: len(tokens[utt_id]))  # little padding
    batches = [missing[i : i + args.batch_size] for i in range(0, len(missing), args.batch_size)]
    for batch in files.progress_bar(batches, len(batches), "texts"):
        of_batch = [tokens[utt_id] for utt_id in batch]
        vectors = embed(model, of_batch, args.layer, tokenizer.pad_token_id or 0)
        for utt_id, vector in zip(batch, vectors.float().cpu().numpy()):
            if not np.isfinite(vector).all():
                raise UserError(f"--model {args.model}: its vector of {utt_id} is not finite")
            with files.replacing(out / f"{utt_id}.npy") as file:
                np.save(file, vector)
    print(f"{out}: {len(missing)} vectors written, {len(texts) - len(missing)} were there")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="vectors of transcripts for train.py --vectors")
    add = parser.add_argument
    add("--data", required=True, help="iemocap, msp_podcast, or a .csv with a column text")
    add("--data_dir", help="root of the corpus, or of the relative paths in a CSV")
    add("--model", default="roberta-large", help="hub name or local directory of a text encoder")
    add("--layer", type=int, help="hidden states to average, 0 = embeddings; default: the last")
    add("--out", required=True, help="directory of the vectors")
    add("--batch_size", type=int, default=32, help="texts per forward")
    add("--device", default="cpu", help="torch device")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size}: must be at least 1")
    return args


if __name__ == "__main__":
    args = parse_args()
    sys.exit(files.run_script("text.py", lambda: extract(args)))
