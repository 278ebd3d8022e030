"""A CSV of your own: utt_id, path, valence, arousal[, start, end, session, dialog, ...].

Unlike a published corpus it is the user's to repair, so nothing is skipped: the first fault raises
UserError with its row.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from corpora.base import LABELS, Corpus, Utterance, known_speaker, read_table, to_float
from util.files import UserError

NAMES = ("session", "dialog", "speaker", "gender", "emotion")  # optional columns of free text
COLUMNS = {"", "utt_id", "path", *LABELS, "start", "end", "split", *NAMES}
SPLITS = {
    "train": "train", "dev": "dev", "development": "dev", "validation": "dev", "valid": "dev",
    "test": "test",
}  # fmt: skip
LATEST = 1e6  # seconds; a start or end behind it is taken for a damaged number [guess]


def read_csv(
    path: Path,
    root: Path | None,
    label_range: tuple[float, float] | None,
    labelled: bool = True,
) -> Corpus:
    """The manifest, with relative audio paths below `root` (default: the folder of the CSV).

    Without `labelled` (prediction) the columns of LABELS may be missing, and labels are NaN. Audio
    must be below the root, links followed: a manifest from elsewhere cannot make us open other
    files.
    """
    root = (root or path.parent).resolve()
    lo, hi = label_range or (0.0, 1.0)
    corpus = Corpus(path.stem, root, (lo, hi), [])
    targets = LABELS if labelled else ()
    rows: dict[str, int] = {}  # utt_id -> row
    sessions: dict[str, str] = {}  # dialog -> session
    starts: dict[str, list[float | None]] = defaultdict(list)  # dialog -> start if it is given
    files: dict[str, set[Path]] = defaultdict(set)  # dialog -> files
    columns: set[str] = set()
    for row, cells in read_table(path, ("utt_id", "path", *targets)):
        columns |= cells.keys()
        try:
            u = read_row(cells, root, targets)
            if rows.setdefault(u.utt_id, row) != row:
                raise UserError(f"utt_id {u.utt_id} is already used in row {rows[u.utt_id]}")
        except UserError as error:
            raise UserError(f"{path.name} row {row}: {error}") from None
        if "session" in cells and sessions.setdefault(u.dialog, u.session) != u.session:
            # the dialogues of each session are numbered anew
            u = dataclasses.replace(u, dialog=f"{u.session}_{u.dialog}")
        starts[u.dialog].append(u.start if cells.get("start") else None)
        files[u.dialog].add(u.path)
        corpus.utterances.append(u)

    # Turns are sorted by start if all starts of a dialogue are given and are on a common clock, in
    # fewer files than there are turns; otherwise they stay in the order of the file.
    for i, u in enumerate(corpus.utterances):
        given = set(starts[u.dialog])
        turns = len(starts[u.dialog])
        if None in given or len(given) < turns or len(files[u.dialog]) == turns:
            corpus.utterances[i] = dataclasses.replace(u, onset=rows[u.utt_id])
    check_range(corpus, path, rows, targets, label_range)
    if columns - COLUMNS:
        corpus.notes.append(f"columns not used: {', '.join(sorted(columns - COLUMNS))}")
    return corpus


def read_row(cells: dict[str, str], root: Path, targets: Sequence[str]) -> Utterance:
    """The utterance of one line; UserError without the file's name and the row."""
    numbers = dict.fromkeys(LABELS, math.nan) | {"start": 0.0, "end": math.inf}
    for column in (*targets, "start", "end"):
        if cells.get(column) or column in targets:
            numbers[column] = to_float(cells[column])
            if not math.isfinite(numbers[column]):
                raise UserError(f"{column} {cells[column]!r} is not a number")
    start, end = numbers["start"], numbers["end"]
    if not 0 <= start < min(end, LATEST) or LATEST < end < math.inf:
        raise UserError(f"start {start:g} and end {end:g} must satisfy 0 <= start < end, in s")

    utt_id = cells["utt_id"]
    if not re.fullmatch(r"[^./\\][^/\\]*", utt_id) or len(utt_id.encode()) > 200:
        fault = "must name a file: no slash, no leading dot, 1 to 200 bytes"
        raise UserError(f"utt_id {utt_id!r} {fault}")
    try:
        audio = (root / cells["path"]).resolve()
        exists, is_file = audio.exists(), audio.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, to Python 3.12
        raise UserError(f"path {cells['path']} cannot be followed ({error})") from None
    if not audio.is_relative_to(root):
        fault = f"leaves the data root {root} for {audio} (set --data_dir?)"
        raise UserError(f"path {cells['path']} {fault}")
    if not is_file:
        fault = "is not a file" if exists else "does not exist (set --data_dir?)"
        raise UserError(f"audio file {audio} {fault}")

    names = {column: cells.get(column, "") for column in NAMES}
    split = cells.get("split", "").lower()
    if "split" in cells and split not in SPLITS:
        raise UserError(f"split {cells['split']!r} is not one of train, dev, test")
    if "session" not in cells:
        names["session"] = names["speaker"]  # each speaker is a session
        if targets and "speaker" in cells and not split and not known_speaker(names["speaker"]):
            fault = "is unknown: without a column session or split, each speaker is a session"
            raise UserError(f"speaker {names['speaker']!r} {fault}")
    elif not names["session"]:
        raise UserError("session is empty")
    names["dialog"] = names["dialog"] or utt_id
    labels = {label: numbers[label] for label in LABELS}
    end = None if end == math.inf else end
    split = SPLITS.get(split, "")
    return Utterance(
        utt_id, audio, **labels, start=start, end=end, onset=start, split=split, **names
    )


def check_range(
    corpus: Corpus,
    path: Path,
    rows: dict[str, int],
    targets: Sequence[str],
    label_range: tuple[float, float] | None,
) -> None:
    """UserError on a label outside the range; a note if all are in a corner of it."""
    lo, hi = corpus.label_range
    ratings = [getattr(u, target) for u in corpus.utterances for target in targets]
    if ratings and 0 < max(ratings) - min(ratings) < (hi - lo) / 4:
        found = f"{min(ratings):g}..{max(ratings):g} of {lo:g}..{hi:g}"
        corpus.notes.append(f"labels lie in {found}: is --label_range right?")
    lowest, highest = min([lo if label_range else 1, *ratings]), max([hi, *ratings])
    better = f"--label_range {math.floor(lowest)} {math.ceil(highest)}"
    for u in corpus.utterances:
        for target in targets:
            x = getattr(u, target)
            if not lo <= x <= hi:
                where = f"{path.name} row {rows[u.utt_id]}: {target} {x:g}"
                raise UserError(f"{where} is outside {lo:g}..{hi:g} (set {better}?)")
