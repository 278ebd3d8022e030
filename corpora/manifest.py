"""A CSV of your own: utt_id, path, valence, arousal[, dominance, start, end, session, ...].

Columns are known by their usual other names, too, and cells may be separated by commas, semicolons
or tabs. Unlike a published corpus it is the user's to repair: the first fault raises UserError with
its row. Only rows without any label are skipped.
"""

import dataclasses
import functools
import math
import os
import re
import stat
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corpora import base
from corpora.base import BLIND, LABELS, Corpus, Utterance, is_missing, known_speaker
from util.files import UserError

OTHER_NAMES = {  # of a column, without case, blanks, - and _
    "utt_id": "id name utt utterance utteranceid segment segmentid clip clipid",
    "path": "file filename filepath fname wav wavfile wavpath audio audiofile audiopath",
    "valence": "val v emoval",
    "arousal": "aro a act activation emoact",
    "dominance": "dom d emodom",
    "start": "onset begin starttime begintime onsettime tstart tmin xmin from",
    "end": "offset stop endtime stoptime offsettime tend tmax xmax to",
    "duration": "dur length len",
    "split": "splitset partition subset",
    "session": "sessionid",
    "dialog": "dialogue dialogid dialogueid conversation conversationid",
    "speaker": "spk spkid spkr spkrid speakerid speakername subject subjectid actor actorid "
    "participant participantid",
    "gender": "sex",
    "emotion": "emo emoclass",
    "rater": "raterid annotator annotatorid evaluator evaluatorid worker workerid coder listener",
}
NAMES = ("session", "dialog", "speaker", "gender", "emotion")  # columns of free text
TIMES = ("start", "end", "duration")
COLUMNS = ("utt_id", "path", *LABELS, *TIMES, "split", "rater", *NAMES, "text")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "val", "valid", "validation"), "dev"),
    **dict.fromkeys(("eval", "evaluation"), "dev"),  # refused beside another name of dev
    **dict.fromkeys(("test", "testing", "test1"), "test"),
    "test2": "test2",
    **dict.fromkeys(("test3", "blind"), BLIND),
}
LATEST = 1e6  # seconds; a start or end behind it is taken for a damaged number [guess]
CLOCK = re.compile(  # 0 days 01:02:03.5, 1:02:03.5, 62:03.5
    r"(?:(?:([0-9]+) days?,? )?([0-9]+):(?=[0-5]?[0-9]:))?([0-9]+):([0-5]?[0-9](?:\.[0-9]+)?)"
)


def read_csv(
    path: Path,
    root: Path | None,
    label_range: tuple[float, float] | None,
    targets: Sequence[str] | None = None,
) -> Corpus:
    """The manifest, with relative audio paths below `root` (default: the folder of the CSV).

    `targets`: the labels to read, whose columns must be there; None: all that it has. Without any
    (prediction) labels are NaN. Audio must be below the root, links followed: a manifest from
    elsewhere cannot make us open other files.
    """
    root = (root or path.parent).resolve()
    corpus = Corpus(path.stem, root, label_range or (0.0, 1.0), [])
    names, lines, separator = base.read_table(path)
    columns = match_columns(path, names, targets, corpus.notes)
    if separator != ",":
        numbers = [position for column, position in columns.items() if column in (*TIMES, *LABELS)]
        point_decimals(path, lines, numbers, corpus.notes)
    if targets is None:
        targets = [label for label in LABELS if label in columns]
    ratings: dict[str, dict[str, Utterance]] = defaultdict(dict)  # utt_id -> rater -> row
    unlabelled: list[Utterance] = []
    sessions: dict[str, str] = {}  # dialog -> session
    folders: dict[str, Path] = {}  # of audio files, see real_path
    words, texts = set(), {}  # those of the column split; utt_id -> what is said
    for row, line in lines:
        cells = {column: line[i] for column, i in columns.items()}
        try:
            u = read_row(row, cells, root, folders, targets)
            words.add(cells.get("split", "").lower())
            if targets and u.split != BLIND and all(math.isnan(getattr(u, t)) for t in targets):
                unlabelled.append(u)
                continue
            if u.utt_id in ratings:
                check_rating(u, ratings[u.utt_id], cells.get("rater"))
        except UserError as error:
            raise UserError(f"{path.name} row {row}: {error}") from None
        if "session" in cells and sessions.setdefault(u.dialog, u.session) != u.session:
            # the dialogues of each session are numbered anew
            u = dataclasses.replace(u, dialog=f"{u.session}_{u.dialog}")
        ratings[u.utt_id][cells.get("rater", "")] = u
        if "text" in cells:
            texts.setdefault(u.utt_id, cells["text"])
    check_splits(path, words)
    check_range(corpus, path, ratings, targets, label_range)
    for u in unlabelled:
        if "rater" not in columns or u.utt_id not in ratings:
            corpus.skip(u.utt_id, u.path, "no label")
    corpus.utterances = with_onsets([mean_rating([*rows.values()]) for rows in ratings.values()])
    corpus.texts = functools.partial(dict, texts)
    several = sum(len(rows) > 1 for rows in ratings.values())
    if several:
        rated = [
            (utt_id, rater, *(getattr(u, label, math.nan) for label in LABELS))
            for utt_id, rows in ratings.items()
            for rater, u in rows.items()
        ]
        corpus.ratings = functools.partial(base.table_of_ratings, rated)
        corpus.notes.append(f"several raters: {several} utterances, the mean of them is taken")
    return corpus


# ---------------------------------------------------------------------------------------------
# Columns


def match_columns(
    path: Path, columns: list[str], targets: Sequence[str] | None, notes: list[str]
) -> dict[str, int]:
    """{column: its position in the file}, with what was taken and what was left out in `notes`.

    UserError if one is missing or could be either of two. `targets` as in read_csv.
    """
    column_of = {plain(column): column for column in COLUMNS}
    for column, others in OTHER_NAMES.items():
        column_of |= dict.fromkeys(others.split(), column)
    candidates: dict[str, list[str]] = defaultdict(list)
    for name in columns:
        if plain(name) in column_of:
            candidates[column_of[plain(name)]].append(name)
    taken = {}
    for column, names in candidates.items():
        first, *others = [name for name in names if plain(name) == plain(column)] or names
        if others and (targets is None or column in targets or column not in LABELS):
            both = f"columns {first} and {others[0]} can both be {column}"
            raise UserError(f"{path.name}: {both}: rename one")
        taken[column] = first
    if "start" not in taken or "end" in taken:
        taken.pop("duration", None)
    if plain(taken.get("end", "")) == "offset" and "start" not in taken:
        fault = "column offset can be a start or an end"
        raise UserError(f"{path.name}: {fault}: rename it to start or end")
    for name in columns:  # such as start_ms or endSample
        words = {"begin": "start", "onset": "start", "stop": "end", "offset": "end"}
        times = {words.get(word, word) for word in words_of(name)} & {"start", "end"}
        lacking = sorted(times - taken.keys())
        if lacking and name not in taken.values():
            fix = f"rename it to {lacking[0]}, in seconds"
            raise UserError(f"{path.name}: column {name} is not understood: {fix}")
    labels = [label for label in LABELS if label in taken]
    base.require(path, ("utt_id", "path"), list(taken), columns)
    for target in (labels or LABELS)[:1] if targets is None else targets:
        if target not in taken:
            fault = f"column {target} is missing ({base.found(columns)})"
            fix = f"--targets takes what there is: {', '.join(labels) or 'no label'}"
            raise UserError(f"{path.name}: {fault}: {fix}")
    for label in labels:
        if targets and label not in targets:
            del taken[label]
    renamed = [f"{name} as {column}" for column, name in taken.items() if name != column]
    unused = [name for name in columns if name and name not in taken.values()]
    for what, names in (("taken", renamed), ("not used", sorted(unused))):
        if names:
            notes.append(f"columns {what}: {', '.join(names)}")
    return {column: columns.index(name) for column, name in taken.items()}


def words_of(name: str) -> list[str]:
    """StartTime, start_time, "start time (s)" -> start, time."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).strip().casefold())
    words = [word for word in words if word]
    units = ("s", "sec", "secs", "second", "seconds")
    return words[:-1] if len(words) > 1 and words[-1] in units else words


def plain(name: str) -> str:
    return "".join(words_of(name))


def check_splits(path: Path, words: set[str]) -> None:
    """UserError if eval stands beside another name of dev (one of them is a test split), or test1
    beside test."""
    for split, special in (("dev", {"eval", "evaluation"}), ("test", {"test1"})):
        alike = sorted(word for word in words if SPLITS.get(word) == split)
        if len(alike) > 1 and special & set(alike):
            fix = "rename one of them to test, test2 or the other"
            raise UserError(f"{path.name}: splits {alike[0]} and {alike[1]}: {fix}")


def point_decimals(
    path: Path, lines: list[tuple[int, list[str]]], positions: list[int], notes: list[str]
) -> None:
    """Writes 2,5 as 2.5 in these columns; UserError if others of their cells have points."""
    commas, points = [], []
    for row, cells in lines:
        for i in positions:
            if is_missing(cells[i]):
                continue
            if "." in cells[i]:
                points.append(row)
            elif "," in cells[i]:
                commas.append(row)
                cells[i] = cells[i].replace(",", ".")
    if commas and points:
        fault = f"decimal commas (row {commas[0]}) and points (row {points[0]})"
        raise UserError(f"{path.name}: {fault}: use one of them")
    if commas:
        notes.append(f"decimal commas read as points: {len(commas)} cells")


# ---------------------------------------------------------------------------------------------
# Rows


def to_seconds(text: str) -> float:
    """Seconds of 83.5, 1:23.5, 0:01:23.5 or "0 days 00:01:23.5"; NaN if it is none of them."""
    match = CLOCK.fullmatch(text)
    if not match:
        return base.to_float(text)
    days, hours, minutes, seconds = map(float, match.groups(default="0"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def read_row(
    row: int, cells: dict[str, str], root: Path, folders: dict[str, Path], targets: Sequence[str]
) -> Utterance:
    """The utterance of one line; UserError without the file's name and the row."""
    labels = dict.fromkeys(LABELS, math.nan)
    for target in targets:
        labels[target] = base.to_label(cells[target])
        if labels[target] == math.inf:
            raise UserError(f"{target} {cells[target]!r} is not a number")
    times = dict.fromkeys(TIMES, math.nan)
    for column in TIMES:
        if column in cells:
            times[column] = to_seconds(cells[column])
            if math.isnan(times[column]) and not is_missing(cells[column]):
                raise UserError(f"{column} {cells[column]!r} is not a number of seconds or h:mm:ss")
    start = 0.0 if math.isnan(times["start"]) else times["start"]
    end = start + times["duration"] if "duration" in cells else times["end"]
    if not 0 <= start < LATEST or end <= start or end > LATEST:
        raise UserError(f"start {start:g} and end {end:g} must satisfy 0 <= start < end, in s")

    utt_id = cells["utt_id"]
    if not re.fullmatch(r"[^./\\][^/\\]*", utt_id) or len(utt_id.encode()) > 200:
        fault = "must name a file: no slash, no leading dot, 1 to 200 bytes"
        raise UserError(f"utt_id {utt_id!r} {fault}")
    split = cells.get("split", "").lower()
    if "split" in cells and split not in SPLITS:
        fault = "is not one of train, dev, test, test2, test3"
        raise UserError(f"split {cells['split']!r} {fault}")
    names = {column: cells.get(column, "") for column in NAMES}
    if "session" not in cells:
        names["session"] = names["speaker"]  # each speaker is a session
    column = "session" if "session" in cells else "speaker"
    if targets and not split and column in cells and not known_speaker(names["session"]):
        raise UserError(f"{column} {names['session']!r} is unknown, but each {column} is a fold")
    names = {column: name if known_speaker(name) else "" for column, name in names.items()}
    names["dialog"] = names["dialog"] or utt_id
    return Utterance(
        utt_id, audio_file(cells["path"], root, folders), **labels, start=start,
        end=None if math.isnan(end) else end, onset=times["start"], split=SPLITS.get(split, ""),
        row=row, **names,
    )  # fmt: skip


def audio_file(text: str, root: Path, folders: dict[str, Path]) -> Path:
    """The real path of a cell; UserError if it is no file below the root."""
    path = os.path.join(root, text)
    try:
        audio = base.real_path(path, folders)
        if not str(audio).startswith(os.path.join(root, "")):  # is_relative_to is slow
            fault = f"leaves the data root {root} for {audio} (set --data_dir?)"
            raise UserError(f"path {text} {fault}")
        kind = os.stat(audio).st_mode
    except FileNotFoundError:
        raise UserError(f"audio file {path} does not exist (set --data_dir?)") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, to Python 3.12
        raise UserError(f"path {text} cannot be followed ({error})") from None
    if not stat.S_ISREG(kind):
        raise UserError(f"audio file {audio} is not a file")
    return audio


def check_rating(u: Utterance, others: dict[str, Utterance], rater: str | None) -> None:
    """UserError if `u` is no other rater's row of the same utterance."""
    first = next(iter(others.values()))
    used = f"utt_id {u.utt_id} is already used in row {first.row}"
    if rater is None:
        raise UserError(f"{used} (a column rater would make it another rating)")
    if is_missing(rater) or rater in others:
        raise UserError(f"{used}, with rater {rater!r}: give each rater a name and one row")
    for column in ("path", "start", "end", "session", "speaker", "split"):
        if getattr(u, column) != getattr(first, column):
            raise UserError(f"{used}, with another {column}: raters must rate the same clip")


def mean_rating(rows: list[Utterance]) -> Utterance:
    """The utterance with the mean of its raters' labels."""
    if len(rows) == 1:
        return rows[0]
    means = {}
    for label in LABELS:
        given = [getattr(u, label) for u in rows if not math.isnan(getattr(u, label))]
        means[label] = float(np.mean(given)) if given else math.nan
    return dataclasses.replace(rows[0], **means)


def with_onsets(utterances: list[Utterance]) -> list[Utterance]:
    """Turns are sorted by start if all starts of a dialogue are given and are on a common clock, in
    fewer files than there are turns; otherwise they stay in the order of the file."""
    dialogues: dict[str, list[Utterance]] = defaultdict(list)
    for u in utterances:
        dialogues[u.dialog].append(u)
    in_file_order = set()
    for dialog, turns in dialogues.items():
        onsets = {u.onset for u in turns}
        one_clock = len({u.path for u in turns}) < len(turns) == len(onsets)
        if not one_clock or any(map(math.isnan, onsets)):
            in_file_order.add(dialog)
    return [
        Utterance(**(vars(u) | {"onset": u.row})) if u.dialog in in_file_order else u
        for u in utterances  # dataclasses.replace takes three times as long
    ]


def check_range(
    corpus: Corpus,
    path: Path,
    ratings: dict[str, dict[str, Utterance]],
    targets: Sequence[str],
    label_range: tuple[float, float] | None,
) -> None:
    """UserError on a label outside the range; a note if all are in a corner of it."""
    lo, hi = corpus.label_range
    labels = [
        (getattr(u, target), target, u.row)
        for rows in ratings.values()
        for u in rows.values()
        for target in targets
        if not math.isnan(getattr(u, target))
    ]
    if not labels:
        return
    lowest, highest = min(labels)[0], max(labels)[0]
    low, high = math.floor(min(lo if label_range else 1, lowest)), math.ceil(max(hi, highest))
    for x, target, row in (min(labels), max(labels)):
        if not lo <= x <= hi:
            where = f"{path.name} row {row}: {target} {x:g}"
            raise UserError(f"{where} is outside {lo:g}..{hi:g} (set --label_range {low} {high}?)")
    if 0 < highest - lowest < (hi - lo) / 4:
        corner = f"{lowest:g}..{highest:g} of {lo:g}..{hi:g}"
        corpus.notes.append(f"labels lie in {corner}: is --label_range right?")
