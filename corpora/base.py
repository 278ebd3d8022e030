"""Utterance and Corpus, and what the readers of corpora share.

A label of an utterance is in the scale of its corpus; Corpus.labels gives them in [0, 1].
"""

import csv
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.files import UserError

LABELS = ("valence", "arousal")  # fields of Utterance that hold ratings, columns of a manifest


@dataclass(frozen=True)
class Utterance:
    """One row of the corpus."""

    utt_id: str
    path: Path
    valence: float
    arousal: float
    start: float = 0.0  # seconds inside `path`
    end: float | None = None  # None = to the end of the file
    session: str = ""
    dialog: str = ""
    speaker: str = ""
    gender: str = ""
    emotion: str = ""
    split: str = ""
    onset: float = 0.0  # position of the turn in its dialogue; only used to sort


class Skipped(NamedTuple):
    """One utterance that was left out."""

    utt_id: str
    file: str
    reason: str


@dataclass
class Corpus:
    """All utterances, sorted by turn_order: the rows of a dialogue are its turns."""

    name: str
    root: Path
    label_range: tuple[float, float]
    utterances: list[Utterance]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was changed or ignored, with counts
    seconds: np.ndarray | None = None  # (N,) durations, known after load_audio

    def labels(self, targets: Sequence[str]) -> np.ndarray:
        """(N, len(targets)) float32 in [0, 1], columns in the order of `targets`."""
        lo, hi = self.label_range
        values = [[getattr(u, target) for target in targets] for u in self.utterances]
        return ((np.array(values, dtype=np.float64) - lo) / (hi - lo)).astype(np.float32)

    def skip(self, utt_id: str, file: Path, reason: str) -> None:
        self.skipped.append(Skipped(utt_id, str(file), reason))


def turn_order(u: Utterance) -> tuple[str, float, str]:
    """Sort key that puts the turns of a dialogue one after the other."""
    return u.dialog, u.onset, u.utt_id


def known_speaker(name: str) -> bool:
    return name.lower() not in ("", "unknown")


def to_float(text: str) -> float:
    """The number, or NaN if it is none; unlike float() without 1_5, inf and other alphabets."""
    number = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text)
    return float(text) if number else math.nan


def clip_labels(corpus: Corpus) -> None:
    """Clip published labels that leave the nominal range, and note each value with its count.

    IEMOCAP has 5.5 and 0.5. A label further out than a quarter of the range is a damaged number
    and no rating: the utterance is skipped.
    """
    lo, hi = corpus.label_range
    margin, outside, kept = (hi - lo) / 4, Counter[float](), []
    for u in corpus.utterances:
        labels = [getattr(u, label) for label in LABELS]
        wrong = [x for x in labels if not lo <= x <= hi]
        if any(not lo - margin <= x <= hi + margin for x in wrong):
            corpus.skip(u.utt_id, u.path, f"label far outside {lo:g}..{hi:g} ({wrong[0]:g})")
            continue
        outside.update(wrong)
        clipped = dict(zip(LABELS, np.clip(labels, lo, hi).tolist()))
        kept.append(dataclasses.replace(u, **clipped) if wrong else u)
    corpus.utterances = kept
    for value, count in sorted(outside.items()):
        corpus.notes.append(f"label {value:g} outside {lo:g}..{hi:g} clipped: {count} utterances")


def read_table(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, cells by column) per line of a CSV; row is the line number in the file, header = 1.

    Strict, because a stray quote or a truncated file would otherwise swallow rows in silence.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            check_columns(path, reader.fieldnames, required)
            count = len(reader.fieldnames)
            for cells in reader:
                where = f"{path.name} row {reader.line_num}"
                if None in cells:
                    fix = "quote cells with a comma"
                    raise UserError(f"{where}: more cells than columns ({count}); {fix}")
                if None in cells.values():
                    raise UserError(f"{where}: fewer cells than columns ({count})")
                for column, text in cells.items():
                    if re.search(r"[\x00-\x1f\x7f]", text):
                        fault = "holds a line break or control character (a stray quote?)"
                        raise UserError(f"{where}: column {column} {fault}")
                yield reader.line_num, {column: text.strip() for column, text in cells.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path.name}: not a UTF-8 CSV file ({error}): save it as one") from None


def check_columns(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """UserError if a required column is missing, or any occurs twice."""
    found = ", ".join(columns) or "none"
    for column, count in Counter(columns).items():
        if column and count > 1:
            raise UserError(f"{path.name}: column {column} occurs twice (found: {found})")
    for column in required:
        if column not in columns:
            fault = f"{path.name}: column {column} is missing (found: {found})"
            if ";" in found or "\t" in found:
                fault += ": separate the cells with commas"
            raise UserError(fault)
