"""MSP-Podcast (Lotfian & Busso 2019) with its own splits.

Test2 is read but is in no split; Test3 has no labels.
"""

import math
import os
import re
from collections import Counter
from pathlib import Path

from corpora.base import Corpus, Utterance, clip_labels, read_table, to_float
from util.files import UserError

SPLITS = {
    "train": "train", "development": "dev", "validation": "dev", "test1": "test",
    "test2": "test2", "test3": "test3",
}  # fmt: skip


def read_msp_podcast(root: Path, label_range: tuple[float, float]) -> Corpus:
    """The corpus below `root`. The parts of a podcast are taken for the turns of a dialogue."""
    names = ("labels_consensus.csv", "labels_concensus.csv")  # an old release misspells it
    tables = [folder / name for folder in (root, root / "Labels") for name in names]
    tables = [path for path in tables if path.is_file()]
    folders = [root / name for name in ("Audio", "Audios") if (root / name).is_dir()]
    if not tables:
        raise UserError(f"{root}: no labels_consensus.csv (or Labels/ with it) (set --data_dir)")
    if not folders:
        raise UserError(f"{root}: no Audio or Audios folder (set --data_dir)")
    table, folder = tables[0], folders[0]
    corpus = Corpus("msp_podcast", root, label_range, [])
    audio = {name for name in os.listdir(folder) if name[0] != "."}
    counts = Counter[str]()  # rows per split
    seen = set()
    for row, cells in read_table(table, ("FileName", "EmoAct", "EmoVal", "Split_Set")):
        name, split = cells["FileName"], SPLITS.get(cells["Split_Set"].lower())
        if split is None:
            fault = f"Split_Set {cells['Split_Set']!r} is none of {', '.join(SPLITS)}"
            raise UserError(f"{table.name} row {row}: {fault}")
        twice = name in seen
        seen.add(name)
        if split == "test3":
            counts[split] += 1
            continue
        arousal, valence = to_float(cells["EmoAct"]), to_float(cells["EmoVal"])
        utt_id = Path(name).stem or f"row {row}"
        if twice:
            corpus.skip(utt_id, folder / name, "in the table twice, first one kept")
        elif not math.isfinite(valence + arousal):
            corpus.skip(utt_id, folder / name, "label is not a number")
        elif name not in audio:
            corpus.skip(utt_id, folder / name, "audio file missing")
        else:
            counts[split] += 1
            podcast = re.match(r"MSP-PODCAST_\d+", name)
            u = Utterance(
                utt_id, folder / name, valence=valence, arousal=arousal,
                split=split, dialog=podcast[0] if podcast else utt_id,
                speaker=cells.get("SpkrID", ""), gender=cells.get("Gender", ""),
                emotion=cells.get("EmoClass", ""),
            )  # fmt: skip
            corpus.utterances.append(u)
    if counts["test2"]:
        corpus.notes.append(f"Test2: {counts['test2']} utterances are read but are in no split")
    if counts["test3"]:
        corpus.notes.append(f"Test3: {counts['test3']} utterances have no labels")
    if audio - seen:
        corpus.notes.append(f"{len(audio - seen)} audio files have no row in {table.name}")
    clip_labels(corpus)
    return corpus
