"""MSP-Podcast (Lotfian & Busso 2019) with its own splits and, from labels_detailed, its raters.

Test1 is the test split; Test2 is scored apart; Test3, which has no labels, is predicted.
"""

import functools
import logging
import math
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd

from corpora.base import BLIND, Corpus, Utterance, read_table, require, table_of_ratings, to_label
from util.files import UserError

log = logging.getLogger("vatune")

SPLITS = {
    "train": "train", "development": "dev", "validation": "dev", "test1": "test",
    "test2": "test2", "test3": BLIND,
}  # fmt: skip
# "WORKER00000012; Neutral; Concerned; A:4.0; V:3.0; D:4.0;", in a cell of labels_detailed.csv
DETAIL = (
    r"(?P<worker>[^;]*);.*?\bA:(?P<EmoAct>[^;]*);\s*V:(?P<EmoVal>[^;]*);(?:\s*D:(?P<EmoDom>[^;]*))?"
)


def read_msp_podcast(root: Path, label_range: tuple[float, float]) -> Corpus:
    """The corpus below `root`. The parts of a podcast are taken for the turns of a dialogue."""
    names = ("labels_consensus.csv", "labels_concensus.csv")  # an old release misspells it
    tables = [folder / name for folder in (root, root / "Labels") for name in names]
    table = next(filter(Path.is_file, tables), None)
    if table is None:
        raise UserError(f"{root}: no labels_consensus.csv (or Labels/ with it) (set --data_dir)")
    folder = next(filter(Path.is_dir, (root / "Audio", root / "Audios")), None)
    if folder is None:
        raise UserError(f"{root}: no Audio or Audios folder (set --data_dir)")
    corpus = Corpus("msp_podcast", root, label_range, [])
    audio = {name for name in os.listdir(folder) if name[0] != "."}
    named, silent = set(), 0
    columns, rows = read_table(table)
    require(table, ("FileName", "EmoAct", "EmoVal", "Split_Set"), columns, columns)
    for row, texts in rows:
        cells = dict(zip(columns, texts))
        name, split = cells["FileName"], SPLITS.get(cells["Split_Set"].lower())
        if split is None:
            fault = f"Split_Set {cells['Split_Set']!r} is none of {', '.join(SPLITS)}"
            raise UserError(f"{table.name} row {row}: {fault}")
        named.add(name)
        if split == BLIND and name not in audio:  # not everybody has it
            silent += 1
            continue
        utt_id, podcast = Path(name).stem or f"row {row}", re.match(r"MSP-PODCAST_\d+", name)
        u = Utterance(
            utt_id, folder / name, valence=to_label(cells["EmoVal"]),
            arousal=to_label(cells["EmoAct"]), dominance=to_label(cells.get("EmoDom", "")),
            split=split, dialog=podcast[0] if podcast else utt_id,
            speaker=cells.get("SpkrID", ""), gender=cells.get("Gender", ""),
            emotion=cells.get("EmoClass", ""),
        )  # fmt: skip
        if name in audio:
            corpus.utterances.append(u)
        else:
            corpus.skip(utt_id, u.path, "audio file missing")
    for name in sorted(audio - named):
        if "_test3_" in name:  # some releases leave Test3 out of the table
            blind = Utterance(Path(name).stem, folder / name, math.nan, math.nan, split=BLIND)
            corpus.utterances.append(replace(blind, dialog=blind.utt_id))
            named.add(name)
    corpus.ratings = functools.partial(read_detailed, table.with_name("labels_detailed.csv"))
    corpus.texts = functools.partial(read_transcripts, root / "Transcripts")
    splits = Counter(u.split for u in corpus.utterances)
    for count, note in (
        (splits["test2"], f"Test2: {splits['test2']} utterances are scored beside Test1"),
        (splits[BLIND], f"Test3: {splits[BLIND]} utterances have no labels and are predicted"),
        (silent, f"Test3: {silent} utterances have no audio and are left out"),
        (len(audio - named), f"{len(audio - named)} audio files have no row in {table.name}"),
    ):
        if count:
            corpus.notes.append(note)
    return corpus


def read_transcripts(folder: Path) -> dict[str, str]:
    """utt_id -> its words, from <utt_id>.txt."""
    files = folder.glob("*.txt")
    return {path.stem: path.read_text("utf-8-sig", errors="replace") for path in files}


def read_detailed(path: Path) -> pd.DataFrame:
    """What each worker rated, as table_of_ratings; without rows where a release lacks the file.

    It has a line per clip and worker, with the ratings in columns or together in one cell (DETAIL).
    One that has neither is named in the log: the labels are the consensus in any case.
    """
    if not path.is_file():
        return table_of_ratings()
    labels = ["EmoVal", "EmoAct", "EmoDom"]
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not {"EmoVal", "EmoAct"} <= {*table}:
            table = table[["FileName"]].join(table.iloc[:, 1].str.extract(DETAIL))
        worker = next(name for name in table if re.search("worker|rater|annotator", name.lower()))
        table = table[["FileName", worker]].join(table.reindex(columns=labels))
    except (OSError, ValueError, LookupError, StopIteration) as error:
        fault = str(error).partition("\n")[0] or "no column of workers"
        log.warning(f"{path.name} is not understood, its raters are not used: {fault}")
        return table_of_ratings()
    table[labels] = table[labels].apply(pd.to_numeric, errors="coerce")
    table["FileName"] = table["FileName"].str.rsplit(".", n=1).str[0]  # utt_id
    return table_of_ratings(table.to_numpy())
