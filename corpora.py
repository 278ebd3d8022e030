"""Corpora of emotional speech: what their files say about each utterance, and the folds.

    corpus = read_corpus("iemocap", "IEMOCAP_full_release", None)
    splits = make_splits(corpus, fold=1)

A reader returns a Corpus of Utterances; to add one, write it and name it in read_corpus's
`readers`. Nothing here opens an audio file: that is data.py's.

References: IEMOCAP (Busso et al. 2008), MSP-Podcast (Lotfian & Busso 2019).
"""

import csv
import dataclasses
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from demo import demo_corpus
from util.files import UserError, replace_text

MOST_SKIPPED = 0.05  # of a corpus' utterances; with more left out, it is not the corpus [guess]
SPLITS = ("train", "dev", "test")
LABELS = ("valence", "arousal")  # fields of Utterance that hold ratings, columns of a manifest


@dataclass(frozen=True)
class Utterance:
    """One row of the corpus. Labels are in the corpus' own scale."""

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
    onset: float = 0.0  # place of the turn in its dialogue; only sorts


class Skipped(NamedTuple):
    """One utterance that was left out."""

    utt_id: str
    file: str
    reason: str


@dataclass
class Corpus:
    """All utterances, sorted by turn_order: a dialogue's rows are its turns."""

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


# ---------------------------------------------------------------------------------------------
# Readers


def read_corpus(
    data: str,
    data_dir: str | None,
    label_range: tuple[float, float] | None,
    cache_dir: str | Path = "cache",
) -> Corpus:
    """The corpus named by --data: demo, iemocap, msp_podcast, or the path of a .csv.

    `data_dir` is required for iemocap and msp_podcast, and is the root of relative audio paths
    for a CSV (default: the CSV's folder). Raises UserError.
    """
    if label_range is not None and not label_range[0] < label_range[1]:
        raise UserError(f"--label_range {label_range[0]:g} {label_range[1]:g}: LO must be below HI")
    readers = {  # --data: who reads it, and the scale of its labels
        "iemocap": (read_iemocap, (1.0, 5.0)),
        "msp_podcast": (read_msp_podcast, (1.0, 7.0)),
    }
    if data in readers and not data_dir:
        raise UserError(f"--data {data} needs --data_dir, the folder of your licensed copy")
    if data == "demo" and data_dir:
        known = ", ".join(readers)
        raise UserError(
            f"--data demo is synthesised and reads no --data_dir: give --data, {known} or a .csv"
        )
    if data_dir and not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir} is not a directory")
    try:
        if data == "demo":
            corpus = read_iemocap(demo_corpus(Path(cache_dir)), label_range or (1.0, 5.0), "demo")
        elif data in readers:
            read, scale = readers[data]
            corpus = read(Path(data_dir), label_range or scale)
        elif data.endswith(".csv"):
            corpus = read_csv(Path(data), Path(data_dir) if data_dir else None, label_range)
        else:
            known = ", ".join(("demo", *readers))
            raise UserError(f"--data {data}: not one of {known}, or a .csv file")
    except OSError as error:
        raise UserError(f"{error.filename or data}: cannot be read ({error.strerror})") from None
    if not corpus.utterances:
        reasons = "; ".join(f"{s.utt_id}: {s.reason}" for s in corpus.skipped[:3])
        where = data if data.endswith(".csv") else corpus.root
        raise UserError(f"{where}: no usable utterance ({reasons or 'nothing found'})")
    unknown = sum(not known_speaker(u.speaker) for u in corpus.utterances)
    if unknown:
        note = f"speaker unknown: {unknown} utterances, whose place in one split cannot be checked"
        corpus.notes.append(note)
    corpus.utterances.sort(key=turn_order)
    return corpus


def turn_order(u: Utterance) -> tuple[str, float, str]:
    """Sort key that puts a dialogue's turns one after the other."""
    return u.dialog, u.onset, u.utt_id


def known_speaker(name: str) -> bool:
    return name.lower() not in ("", "unknown")


def to_float(text: str) -> float:
    """The number, or NaN where it is none; unlike float() without 1_5, inf and other alphabets."""
    number = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text)
    return float(text) if number else math.nan


def clip_labels(corpus: Corpus) -> None:
    """Clip published labels that leave the nominal range, and note each value with its count.

    IEMOCAP has 5.5 and 0.5. Further out than a quarter of the range is no rating but a damaged
    number: the utterance is skipped.
    """
    lo, hi = corpus.label_range
    margin, outside, kept = (hi - lo) / 4, Counter[float](), []
    for u in corpus.utterances:
        labels = [getattr(u, label) for label in LABELS]
        wrong = [x for x in labels if not lo <= x <= hi]
        if any(not lo - margin <= x <= hi + margin for x in wrong):
            reason = f"label far outside {lo:g}..{hi:g} ({wrong[0]:g})"
            corpus.skipped.append(Skipped(u.utt_id, str(u.path), reason))
            continue
        outside.update(wrong)
        clipped = dict(zip(LABELS, np.clip(labels, lo, hi).tolist()))
        kept.append(dataclasses.replace(u, **clipped) if wrong else u)
    corpus.utterances = kept
    corpus.notes += [
        f"label {value:g} outside {lo:g}..{hi:g} clipped: {n} utterances"
        for value, n in sorted(outside.items())
    ]


def read_iemocap(root: Path, label_range: tuple[float, float], name: str = "iemocap") -> Corpus:
    """IEMOCAP as released. Emotion `xxx` (no majority) is kept: its dimensions are as good."""
    if (root / "IEMOCAP_full_release").is_dir():
        root = root / "IEMOCAP_full_release"
    corpus = Corpus(name, root, label_range, [])
    # *.txt of this folder only: its subfolders repeat every turn once per evaluator
    files = [
        path
        for path in sorted(root.glob("Session*/dialog/EmoEvaluation/*.txt"))
        if not path.name.startswith("._")  # resource forks of the machine that packed the release
    ]
    if not files:
        raise UserError(f"{root}: no Session*/dialog/EmoEvaluation/*.txt (set --data_dir)")
    turn_line = re.compile(r"\[([\d.]+) - ([\d.]+)\]\t([\w.-]+)\t(\w+)\t\[(.+), (.+), (.+)\]\s*")
    turn_name = re.compile(r"_([FM])\d{3}")
    seen = set()
    for path in files:
        session, dialog = path.parents[2].name, path.stem
        for row, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            # neither a turn nor a damaged one: header, blank, or an evaluator's C-/A- line
            if not line.startswith("[") and not turn_name.search(line):
                continue
            match = turn_line.fullmatch(line)
            letters = turn_name.findall(match[3]) if match else []
            if not letters:
                where = f"{path.name} row {row}"
                corpus.skipped.append(Skipped(where, str(path), "annotation not understood"))
                continue
            utt_id, gender = match[3], letters[-1]  # not the letter of the prefix
            wav = root / session / "sentences" / "wav" / dialog / f"{utt_id}.wav"
            onset, end, valence, arousal = map(to_float, (match[1], match[2], match[5], match[6]))
            reason = ""
            if utt_id in seen:
                reason = "annotated twice, first one kept"
            elif not math.isfinite(onset + end + valence + arousal):
                reason = "label or time is not a number"
            elif not wav.is_file():
                reason = "audio file missing"
            seen.add(utt_id)
            if reason:
                corpus.skipped.append(Skipped(utt_id, str(wav), reason))
                continue
            u = Utterance(utt_id, wav, valence, arousal, session=session, dialog=dialog)
            speaker = f"Ses{re.sub('[^0-9]', '', session).zfill(2)}{gender}"
            who = {"speaker": speaker, "gender": gender, "emotion": match[4], "onset": onset}
            corpus.utterances.append(dataclasses.replace(u, **who))
    for wav in sorted(root.glob("Session*/sentences/wav/*/*.wav")):
        if wav.stem not in seen and not wav.name.startswith("._"):
            corpus.skipped.append(Skipped(wav.stem, str(wav), "no annotation"))
    clip_labels(corpus)
    return corpus


def read_table(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, cells by column) per line of a CSV; row is the line number in the file, header = 1.

    Strict, because a stray quote or a cut-off file would otherwise swallow rows in silence.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = reader.fieldnames = [c.strip() for c in reader.fieldnames or []]
            twice = [column for column, n in Counter(columns).items() if n > 1 and column]
            missing = [column for column in required if column not in columns]
            for column in twice + missing:
                fault = "occurs twice" if column in twice else "is missing"
                found = ", ".join(columns) or "none"
                fix = ": separate the cells with commas" * (";" in found or "\t" in found)
                raise UserError(f"{path.name}: column {column} {fault} (found: {found}){fix}")
            for cells in reader:
                row = f"{path.name} row {reader.line_num}"
                if None in cells:
                    fault = f"more cells than columns ({len(columns)}); quote cells with a comma"
                    raise UserError(f"{row}: {fault}")
                if None in cells.values():
                    raise UserError(f"{row}: fewer cells than columns ({len(columns)})")
                for column, text in cells.items():
                    if re.search(r"[\x00-\x1f\x7f]", text):
                        fault = "holds a line break or control character (a stray quote?)"
                        raise UserError(f"{row}: column {column} {fault}")
                yield reader.line_num, {column: text.strip() for column, text in cells.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path.name}: not a UTF-8 CSV file ({error}): save it as one") from None


def read_msp_podcast(root: Path, label_range: tuple[float, float]) -> Corpus:
    """MSP-Podcast with its own splits. Test2 is read but lies in no split; Test3 has no labels."""
    names = ("labels_consensus.csv", "labels_concensus.csv")  # the second is an old release's
    tables = [p for d in (root, root / "Labels") for p in (d / n for n in names) if p.is_file()]
    folders = [root / d for d in ("Audio", "Audios") if (root / d).is_dir()]
    if not tables or not folders:
        what = "Audio or Audios folder" if tables else "labels_consensus.csv (or Labels/ with it)"
        raise UserError(f"{root}: no {what} (set --data_dir)")
    corpus = Corpus("msp_podcast", root, label_range, [])
    audio = {name for name in os.listdir(folders[0]) if name[0] != "."}
    unused, test3 = set(audio), 0
    seen = set()
    splits = {"train": "train", "development": "dev", "validation": "dev", "test1": "test"}
    splits |= {"test2": "test2", "test3": "test3"}
    for row, cells in read_table(tables[0], ("FileName", "EmoAct", "EmoVal", "Split_Set")):
        name, split = cells["FileName"], splits.get(cells["Split_Set"].lower())
        utt_id = Path(name).stem or f"row {row}"
        if split is None:
            fault = f"Split_Set {cells['Split_Set']!r} is none of {', '.join(splits)}"
            raise UserError(f"{tables[0].name} row {row}: {fault}")
        arousal, valence = to_float(cells["EmoAct"]), to_float(cells["EmoVal"])
        unused.discard(name)
        if split == "test3":
            test3 += 1
            continue
        reason = ""
        if name in seen:
            reason = "in the table twice, first one kept"
        elif not math.isfinite(valence + arousal):
            reason = "label is not a number"
        elif name not in audio:
            reason = "audio file missing"
        seen.add(name)
        if reason:
            corpus.skipped.append(Skipped(utt_id, str(folders[0] / name), reason))
            continue
        podcast = re.match(r"MSP-PODCAST_\d+", name)  # its parts are in time order
        u = Utterance(utt_id, folders[0] / name, valence, arousal, split=split)
        who = {"speaker": cells.get("SpkrID", ""), "gender": cells.get("Gender", "")}
        who |= {"dialog": podcast[0] if podcast else utt_id}
        who |= {"emotion": cells.get("EmoClass", "")}
        corpus.utterances.append(dataclasses.replace(u, **who))
    test2 = sum(u.split == "test2" for u in corpus.utterances)
    for count, note in (
        (test2, "Test2: {} utterances are read but belong to no split"),
        (test3, "Test3: {} utterances have no labels"),
        (len(unused), f"{{}} audio files have no row in {tables[0].name}"),
    ):
        corpus.notes += [note.format(count)] if count else []
    clip_labels(corpus)
    return corpus


def read_csv(
    path: Path,
    root: Path | None,
    label_range: tuple[float, float] | None,
    labelled: bool = True,
) -> Corpus:
    """Any manifest: utt_id, path, valence, arousal[, start, end, session, dialog, ...].

    Without `labelled` (prediction) the columns of LABELS may lack, and labels are NaN.

    Unlike a published corpus it is the user's own to repair, so nothing is skipped: the first
    fault raises UserError with its row. Audio must lie below the root, links followed: a
    manifest from elsewhere cannot make us open other files.
    """
    root = (root or path.parent).resolve()
    lo, hi = label_range or (0.0, 1.0)
    corpus = Corpus(path.stem, root, (lo, hi), [])
    words = {"train": "train", "dev": "dev", "test": "test"}
    words |= dict.fromkeys(("development", "validation", "valid"), "dev")
    rows: dict[str, int] = {}  # utt_id -> row
    homes: dict[str, str] = {}  # dialog -> session
    turns: dict[str, list[tuple[float | None, Path]]] = {}  # dialog -> (start if given, file)
    targets = LABELS if labelled else ()
    known = {"", "utt_id", "path", *LABELS, "start", "end", "split"}
    known |= {"session", "dialog", "speaker", "gender", "emotion"}
    ignored: set[str] = set()  # columns
    for row, cells in read_table(path, ("utt_id", "path", *targets)):

        def refuse(fault: str, row: int = row) -> None:
            raise UserError(f"{path.name} row {row}: {fault}")

        utt_id, split = cells["utt_id"], cells.get("split", "").lower()
        numbers = dict.fromkeys(LABELS, math.nan) | {"start": 0.0, "end": math.inf}
        for column in (*targets, "start", "end"):
            if cells.get(column) or column in targets:
                numbers[column] = to_float(cells[column])
                if not math.isfinite(numbers[column]):
                    refuse(f"{column} {cells[column]!r} is not a number")
        *labels, start, end = numbers.values()
        if not re.fullmatch(r"[^./\\][^/\\]*", utt_id) or len(utt_id.encode()) > 200:
            fault = "must name a file: no slash, no leading dot, 1 to 200 bytes"
            refuse(f"utt_id {utt_id!r} {fault}")
        if rows.setdefault(utt_id, row) != row:
            refuse(f"utt_id {utt_id} is already used in row {rows[utt_id]}")
        try:
            audio = (root / cells["path"]).resolve()
            exists, is_file = audio.exists(), audio.is_file()
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, to 3.12
            refuse(f"path {cells['path']} cannot be followed ({error})")
        if not audio.is_relative_to(root):
            fault = f"leaves the data root {root} for {audio}"
            refuse(f"path {cells['path']} {fault} (set --data_dir?)")
        if not is_file:
            fault = "is not a file" if exists else "does not exist (set --data_dir?)"
            refuse(f"audio file {audio} {fault}")
        if "split" in cells and split not in words:
            refuse(f"split {cells['split']!r} is not one of train, dev, test")
        if "session" in cells and not cells["session"]:
            refuse("session is empty")
        speaker_is_session = "speaker" in cells and not {"session", "split"} & cells.keys()
        if labelled and speaker_is_session and not known_speaker(cells["speaker"]):
            fault = f"speaker {cells['speaker']!r} is unknown"
            refuse(f"{fault}: without a column session or split, each speaker is a session")
        ignored |= cells.keys() - known
        if not 0 <= start < min(end, 1e6) or 1e6 < end < math.inf:
            refuse(f"start {start:g} and end {end:g} must satisfy 0 <= start < end, in s")
        end = None if end == math.inf else end
        u = Utterance(utt_id, audio, **dict(zip(LABELS, labels)), start=start, end=end)
        names = {c: cells[c] for c in ("session", "speaker", "gender", "emotion") if c in cells}
        names.setdefault("session", cells.get("speaker", ""))  # none: a session per speaker
        dialog = cells.get("dialog") or utt_id
        if "session" in cells and homes.setdefault(dialog, cells["session"]) != cells["session"]:
            dialog = f"{names['session']}_{dialog}"  # dialogues numbered anew in each session
        names |= {"dialog": dialog, "split": words.get(split, "")}
        turns.setdefault(dialog, []).append((start if cells.get("start") else None, audio))
        corpus.utterances.append(dataclasses.replace(u, **names, onset=start))

    def is_timed(dialog: str) -> bool:
        """Are all starts given, and on a common clock: in fewer files than there are turns?"""
        starts, files = map(set, zip(*turns[dialog]))
        return None not in starts and len(starts) == len(turns[dialog]) > len(files)

    timed = {dialog for dialog in turns if is_timed(dialog)}  # the others: in the file's order
    corpus.utterances = [
        u if u.dialog in timed else dataclasses.replace(u, onset=rows[u.utt_id])
        for u in corpus.utterances
    ]
    ratings = [getattr(u, target) for u in corpus.utterances for target in targets]
    if ratings and 0 < max(ratings) - min(ratings) < (hi - lo) / 4:
        where = f"{min(ratings):g}..{max(ratings):g} of {lo:g}..{hi:g}"
        corpus.notes.append(f"labels lie in {where}: is --label_range right?")
    if ignored:
        corpus.notes.append(f"columns not used: {', '.join(sorted(ignored))}")
    least, most = min([lo if label_range else 1, *ratings]), max([hi, *ratings])
    better = f"--label_range {math.floor(least)} {math.ceil(most)}"
    for u in corpus.utterances:
        for target, x in ((target, getattr(u, target)) for target in targets):
            if not lo <= x <= hi:
                where = f"{path.name} row {rows[u.utt_id]}: {target} {x:g}"
                raise UserError(f"{where} is outside {lo:g}..{hi:g} (set {better}?)")
    return corpus


# ---------------------------------------------------------------------------------------------
# Splits


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key under which Session10 comes after Session2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def sessions(corpus: Corpus) -> list[str]:
    return sorted({u.session for u in corpus.utterances}, key=natural)


def num_folds(corpus: Corpus) -> int:
    """The number of sessions, or 1 where the corpus brings its own splits."""
    return 1 if corpus.utterances[0].split else len(sessions(corpus))


def make_splits(corpus: Corpus, fold: int) -> dict[str, np.ndarray]:
    """{"train", "dev", "test"} -> sorted int64 rows of corpus.utterances.

    The corpus' own splits where it has them; else test = the fold-th session, dev = the next one
    (cyclic), train = the others. Raises UserError when that is impossible, a split is empty, or
    a known speaker is in two splits.
    """
    folds, names = num_folds(corpus), sessions(corpus)
    if corpus.utterances[0].split:
        of_row = [u.split for u in corpus.utterances]
    elif folds < 3:
        fault = f"{corpus.name}: {folds} session(s), but train, dev and test need at least 3"
        raise UserError(f"{fault}: add a column split, session, or speaker (each a session)")
    else:
        role = {names[(fold - 1) % folds]: "test", names[fold % folds]: "dev"}
        of_row = [role.get(u.session, "train") for u in corpus.utterances]
    if not 1 <= fold <= folds:
        raise UserError(f"--fold {fold}: {corpus.name} has folds 1..{folds}")
    splits = {s: np.flatnonzero(np.array(of_row) == s).astype(np.int64) for s in SPLITS}
    home: dict[str, str] = {}  # speaker -> split
    for split, rows in splits.items():
        if not len(rows):
            raise UserError(f"{corpus.name} fold {fold}: the {split} split is empty")
        for u in (corpus.utterances[row] for row in rows):
            if known_speaker(u.speaker) and home.setdefault(u.speaker, split) != split:
                both = f"{home[u.speaker]} and {split} (there {u.utt_id})"
                raise UserError(f"{corpus.name} fold {fold}: speaker {u.speaker} is in both {both}")
    return splits


def describe_splits(corpus: Corpus, splits: dict[str, np.ndarray]) -> str:
    """One table: split, utterances, hours (known after load_audio), genders, sessions, speakers."""
    table = [("split", "utterances", "hours", "genders", "sessions", "speakers")]
    for split, rows in splits.items():
        chosen = [corpus.utterances[row] for row in rows]
        hours = "-" if corpus.seconds is None else f"{corpus.seconds[rows].sum() / 3600:.2f}"
        genders = sorted(Counter(u.gender or "?" for u in chosen).items())
        names = (shorten({u.session for u in chosen}), shorten({u.speaker for u in chosen}))
        table.append(
            (split, str(len(rows)), hours, " ".join(f"{g} {n}" for g, n in genders), *names)
        )
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)) for line in table]
    return "\n".join(line.rstrip() for line in lines)


def shorten(names: set[str], most: int = 10) -> str:
    ordered = [name or "-" for name in sorted(names, key=natural)]
    return " ".join(ordered[:most]) + (f" ... ({len(ordered)})" if len(ordered) > most else "")


# ---------------------------------------------------------------------------------------------
# Utterances left out


def check_skipped(corpus: Corpus, most_bad: float = MOST_SKIPPED) -> None:
    """UserError when more than this share of all utterances was left out."""
    total = len(corpus.utterances) + len(corpus.skipped)
    if len(corpus.skipped) > most_bad * total:
        first = "; ".join(f"{s.utt_id}: {s.reason}" for s in corpus.skipped[:3])
        raise UserError(
            f"{corpus.name}: {len(corpus.skipped)} of {total} utterances cannot be used, more than "
            f"{100 * most_bad:g} % ({first}): repair or remove them; python data.py --data ... "
            "--skipped skipped.csv lists all"
        )


def skipped_by_kind(corpus: Corpus) -> dict[str, list[Skipped]]:
    """corpus.skipped under its reasons, each without the particulars in brackets at its end."""
    kinds: dict[str, list[Skipped]] = {}
    for skipped in corpus.skipped:
        kinds.setdefault(skipped.reason.split(" (")[0], []).append(skipped)
    return kinds


def write_skipped(path: Path, corpus: Corpus) -> None:
    """CSV of corpus.skipped: utt_id, file, reason."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([Skipped._fields, *corpus.skipped])
    replace_text(path, text.getvalue())
