"""Utterance and Corpus, and what the readers of corpora share.

A label of an utterance is in the scale of its corpus; Corpus.labels gives them in [0, 1].
"""

import csv
import dataclasses
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from util.files import UserError

LABELS = ("valence", "arousal", "dominance")  # fields of Utterance, columns of a manifest
TESTS = ("test", "test2", "test3")  # the first one is the headline
BLIND = "test3"  # its rows need no labels
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MISSING = {  # what tables write where they do not know, without punctuation: n/a, <unk>, -, ?
    "", "nan", "na", "none", "null", "nil", "missing", "undefined", "unk", "unknown",
    "unknownspeaker", "unspecified", "unidentified", "anonymous", "notavailable",
}  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """One row of the corpus."""

    utt_id: str
    path: Path
    valence: float  # NaN if it is missing, like each label
    arousal: float
    start: float = 0.0  # seconds inside `path`
    end: float | None = None  # None = to the end of the file
    session: str = ""
    dialog: str = ""
    speaker: str = ""
    gender: str = ""
    emotion: str = ""
    dominance: float = math.nan
    split: str = ""
    onset: float = 0.0  # position of the turn in its dialogue; only used to sort
    row: int = 0  # line of the manifest, the first one of several raters; 0 = no manifest

    def place(self) -> str:
        """How messages name it."""
        return f"row {self.row} ({self.utt_id})" if self.row else self.utt_id


class Skipped(NamedTuple):
    """One utterance that was left out."""

    utt_id: str
    file: str
    reason: str


def table_of_ratings(rows: Sequence[tuple] | np.ndarray = ()) -> pd.DataFrame:
    """A line per rating of an utterance by one rater; each rater's first one counts.

    rows: (utt_id, rater, *LABELS), NaN where a rating is missing; a reader that does not know the
    last LABELS may leave them out.
    """
    table = pd.DataFrame(rows).reindex(columns=range(2 + len(LABELS)))
    table.columns = ["utt_id", "rater", *LABELS]
    table[list(LABELS)] = table[list(LABELS)].astype(np.float64)
    return table.drop_duplicates(["utt_id", "rater"])


@dataclass
class Corpus:
    """All utterances, sorted by turn_order: the rows of a dialogue are its turns."""

    name: str
    root: Path
    label_range: tuple[float, float]
    utterances: list[Utterance]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was changed or ignored, with counts
    # who rated what, where raters are known; read when asked for, as some have a million rows
    ratings: Callable[[], pd.DataFrame] = table_of_ratings
    texts: Callable[[], dict[str, str]] = dict  # utt_id -> what is said, read when asked for
    targets: tuple[str, ...] = ()  # the LABELS that are used, in this order; set by read_corpus
    seconds: np.ndarray | None = None  # (N,) durations, known after load_audio
    audio: list[str] = field(default_factory=list)  # digests of the samples, known after it, too

    def labels(self, targets: Sequence[str]) -> np.ndarray:
        """(N, len(targets)) float32 in [0, 1], NaN if missing, in the order of `targets`."""
        lo, hi = self.label_range
        values = [[getattr(u, target) for target in targets] for u in self.utterances]
        return ((np.array(values, dtype=np.float64) - lo) / (hi - lo)).astype(np.float32)

    def skip(self, utt_id: str, file: Path, reason: str) -> None:
        self.skipped.append(Skipped(utt_id, str(file), reason))


def turn_order(u: Utterance) -> tuple[str, float, str]:
    """Sort key that puts the turns of a dialogue one after the other."""
    return u.dialog, u.onset, u.utt_id


def is_missing(text: str) -> bool:
    return re.sub(r"[\W_]+", "", text.lower()) in MISSING


@functools.lru_cache(maxsize=65_536)
def known_speaker(name: str) -> bool:
    return not is_missing(name) and to_float(name) != -1


def to_float(text: str) -> float:
    """The number, or NaN if it is none; unlike float() without 1_5, inf and other alphabets."""
    return float(text) if NUMBER.fullmatch(text) else math.nan


def to_label(text: str) -> float:
    """The number, NaN if it is missing, inf if it is damaged (keep_usable then skips the row)."""
    value = to_float(text)
    return math.inf if math.isnan(value) and not is_missing(text) else value


def real_path(path: str, folders: dict[str, Path]) -> Path:
    """The path with its links followed. `folders`: those met before, resolved; a corpus has few."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):
        return Path(path).resolve()
    if folder not in folders:
        folders[folder] = Path(folder).resolve()
    return folders[folder] / name


def keep_usable(corpus: Corpus, targets: Sequence[str]) -> None:
    """Leaves the first usable row of each utterance; the others are skipped by name.

    A row is usable if it has a label of one of the targets, or needs none. A label somewhat outside
    the nominal range is clipped, and each such value noted with its count: IEMOCAP has 5.5 and 0.5.
    One further out than a quarter of the range is a damaged number and no rating.
    """
    lo, hi = corpus.label_range
    margin, outside, kept = (hi - lo) / 4, Counter[float](), {}
    others = [label for label in LABELS if label not in targets]
    for u in corpus.utterances:
        labels = {target: getattr(u, target) for target in targets}
        wrong = [x for x in labels.values() if x < lo or x > hi]
        far = [x for x in wrong if x < lo - margin or x > hi + margin]
        reason = ""
        if math.inf in wrong:
            reason = "label is not a number"
        elif far:
            reason = f"label far outside {lo:g}..{hi:g} ({far[0]:g})"
        elif targets and all(map(math.isnan, labels.values())) and u.split != BLIND:
            reason = "no label"
        elif u.utt_id in kept:
            reason = "listed twice, first one kept"
        if reason:
            corpus.skip(u.utt_id, u.path, reason)
            continue
        kept[u.utt_id] = u
        if wrong or not all(math.isnan(getattr(u, label)) for label in others):
            outside.update(wrong)
            clipped = {target: float(np.clip(x, lo, hi)) for target, x in labels.items()}
            labels = dict.fromkeys(others, math.nan) | clipped
            kept[u.utt_id] = dataclasses.replace(u, **labels)
    corpus.utterances = list(kept.values())
    for value, count in sorted(outside.items()):
        corpus.notes.append(f"label {value:g} outside {lo:g}..{hi:g} clipped: {count} utterances")


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """(columns, [(line in the file, cells)], separator) of a table as text, separated by commas,
    semicolons, tabs or bars: by what its header has most of.

    Strict, because a stray quote or a truncated file would otherwise swallow rows in silence.
    """
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = max(",;\t|", key=header.count)
            file.seek(0)
            lines = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
            columns = [name.strip() for name in next(lines, [])]
            for cells in filter(None, lines):
                where = f"{path.name} row {lines.line_num}"
                if len(cells) != len(columns):
                    more = "fewer" if len(cells) < len(columns) else "more"
                    fault = f"{more} cells than columns ({len(columns)})"
                    raise UserError(f"{where}: {fault}; quote cells that hold a {separator!r}")
                if CONTROL.search("".join(cells)):
                    column = next(c for c, text in zip(columns, cells) if CONTROL.search(text))
                    fault = "holds a line break or control character (a stray quote?)"
                    raise UserError(f"{where}: column {column} {fault}")
                rows.append((lines.line_num, [text.strip() for text in cells]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path.name}: not a UTF-8 CSV file ({error}): save it as one") from None
    for column, count in Counter(columns).items():
        if column and count > 1:
            raise UserError(f"{path.name}: column {column} occurs twice ({found(columns)})")
    return columns, rows, separator


def require(path: Path, required: Sequence[str], there: Sequence[str], columns: list[str]) -> None:
    """UserError if a required column is not `there`; it names the `columns` of the file."""
    for column in required:
        if column not in there:
            raise UserError(f"{path.name}: column {column} is missing ({found(columns)})")


def found(columns: list[str]) -> str:
    return f"found: {', '.join(columns) or 'none'}"
