"""Corpora of emotional speech: what their files say about each utterance, and the folds.

    corpus = read_corpus("iemocap", "IEMOCAP_full_release", None)
    splits = make_splits(corpus, fold=1)

One file per corpus. To add one, write a reader that returns a Corpus and name it in READERS.
Nothing here opens an audio file: that is in data.py.
"""

import itertools
import math
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from corpora.base import (
    BLIND,
    LABELS,
    TESTS,
    Corpus,
    Skipped,
    Utterance,
    keep_usable,
    known_speaker,
    real_path,
    to_float,
    turn_order,
)
from corpora.demo import read_demo
from corpora.files import listed, read_files
from corpora.iemocap import read_iemocap
from corpora.manifest import read_csv
from corpora.msp_podcast import read_msp_podcast
from util.files import UserError, replace_text, without_gc

__all__ = [
    "BLIND", "LABELS", "MAX_SKIPPED", "TESTS", "Corpus", "Utterance", "is_table", "known_speaker",
    "listed", "make_splits", "num_folds", "read_corpus", "read_csv", "read_files", "read_texts",
    "real_path", "turn_order",
]  # fmt: skip

READERS = {  # --data: what reads --data_dir, and the range of its labels
    "iemocap": (read_iemocap, (1.0, 5.0)),
    "msp_podcast": (read_msp_podcast, (1.0, 7.0)),
}
MAX_SKIPPED = 0.05  # share of utterances; with more left out, it is not the corpus [guess]
SPLITS = ("train", "dev", "test")


def is_table(data: str) -> bool:
    """True if --data names a manifest."""
    return Path(data).suffix.lower() in (".csv", ".tsv", ".tab", ".txt")


@without_gc()
def read_corpus(
    data: str,
    data_dir: str | None,
    label_range: Sequence[float] | None,
    cache_dir: str | Path = "cache",
    targets: Sequence[str] | None = None,
) -> Corpus:
    """The corpus named by --data: demo, one of READERS, or the path of a .csv or .tsv.

    `data_dir` is required for READERS, and is the root of relative audio paths for a CSV
    (default: the folder of the CSV). `targets`: the labels to use; None: all that the corpus has;
    empty: none, and no row needs one. Raises UserError.
    """
    label_range = tuple(label_range) if label_range else None
    if label_range and not label_range[0] < label_range[1]:
        raise UserError(f"--label_range {label_range[0]:g} {label_range[1]:g}: LO must be below HI")
    known = ", ".join(READERS)
    if data in READERS and not data_dir:
        raise UserError(f"--data {data} needs --data_dir, the folder of your licensed copy")
    if data == "demo" and data_dir:
        fault = "--data demo is synthesised and reads no --data_dir"
        raise UserError(f"{fault}: give --data, {known} or a .csv")
    if data_dir and not Path(data_dir).is_dir():
        raise UserError(f"--data_dir {data_dir} is not a directory")
    try:
        if data == "demo":
            corpus = read_demo(Path(cache_dir), label_range)
        elif data in READERS:
            read, its_range = READERS[data]
            corpus = read(Path(data_dir), label_range or its_range)
        elif is_table(data):
            root = Path(data_dir) if data_dir else None
            corpus = read_csv(Path(data), root, label_range, targets)
        else:
            raise UserError(f"--data {data}: not one of demo, {known}, or a .csv or .tsv file")
    except OSError as error:
        raise UserError(f"{error.filename or data}: cannot be read ({error.strerror})") from None
    choose_targets(corpus, targets)
    if not corpus.utterances:
        reasons = "; ".join(f"{s.utt_id}: {s.reason}" for s in corpus.skipped[:3])
        where = data if is_table(data) else corpus.root
        raise UserError(f"{where}: no usable utterance ({reasons or 'nothing found'})")
    check_spelling(corpus)
    labelled = [u for u in corpus.utterances if u.split != BLIND]
    for label in corpus.targets:
        missing = sum(math.isnan(getattr(u, label)) for u in labelled)
        if missing:
            corpus.notes.append(f"{label} missing: {missing} utterances, kept for other targets")
    unknown = sum(not known_speaker(u.speaker) for u in labelled)
    if unknown:
        fault = "their speakers cannot be kept out of other splits"
        corpus.notes.append(f"speaker unknown: {unknown} utterances, {fault}")
    corpus.utterances.sort(key=turn_order)
    return corpus


def read_texts(data: str, data_dir: str | None) -> dict[str, str]:
    """utt_id -> what is said, "" if there is no transcript, of every utterance of --data.

    No row needs a label. UserError if there is no transcript of more than MAX_SKIPPED of them.
    """
    corpus = read_corpus(data, data_dir, None, targets=())
    known = corpus.texts()
    lacking = [u.utt_id for u in corpus.utterances if u.utt_id not in known]
    if len(lacking) > MAX_SKIPPED * len(corpus.utterances):
        count = f"{len(lacking)} of {len(corpus.utterances)} utterances have no transcript"
        expected = "a column text of a .csv, dialog/transcriptions of IEMOCAP, or Transcripts/"
        raise UserError(f"{data}: {count} ({', '.join(lacking[:3])}): expected {expected}")
    return {u.utt_id: " ".join(known.get(u.utt_id, "").split()) for u in corpus.utterances}


def choose_targets(corpus: Corpus, targets: Sequence[str] | None) -> None:
    """Sets corpus.targets, and keeps the rows that can be used for them.

    UserError if the corpus has no label of one of them.
    """
    values = {label: [getattr(u, label) for u in corpus.utterances] for label in LABELS}
    there = [label for label in LABELS if not all(map(math.isnan, values[label]))]
    missing = [target for target in targets or () if target not in there]
    if missing and there:
        fault = f"--targets {' '.join(targets)}: {corpus.name} has no label of {missing[0]}"
        raise UserError(f"{fault}: it has {', '.join(there)}")
    corpus.targets = tuple(there if targets is None else targets)
    keep_usable(corpus, corpus.targets)


def check_spelling(corpus: Corpus) -> None:
    """UserError if two speakers or two sessions are one, spelled in two ways."""
    for attribute in ("speaker", "session"):
        named: dict[str, Utterance] = {}
        for u in corpus.utterances:
            named.setdefault(getattr(u, attribute), u)
        spelled: dict[object, str] = {}
        for name, u in named.items():
            number = to_float(name)  # 7, 07 and 7.0
            folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
            other = spelled.setdefault(folded if math.isnan(number) else number, name)
            if other != name:
                both = f"{other} in {named[other].place()} and {name} in {u.place()}"
                fix = "give one name if they are one, else two that differ"
                raise UserError(f"{corpus.name}: {attribute} {both} differ in spelling: {fix}")


# ---------------------------------------------------------------------------------------------
# Splits


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key under which Session10 comes after Session2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def num_folds(corpus: Corpus) -> int:
    """The number of sessions, or 1 if the corpus brings its own splits."""
    return 1 if corpus.utterances[0].split else len({u.session for u in corpus.utterances})


def make_splits(corpus: Corpus, fold: int) -> dict[str, np.ndarray]:
    """{"train", "dev", "test"} -> sorted int64 rows of corpus.utterances; others of TESTS if the
    corpus has them.

    The corpus' own splits if it has them; else test = the fold-th session, dev = the next one
    (cyclic), train = the others. Raises UserError if that is impossible, a split is empty, or
    a known speaker or the same audio is in two splits. More test splits may share speakers with
    any, and audio with each other.
    """
    folds = num_folds(corpus)
    if corpus.utterances[0].split:
        of_row = [u.split for u in corpus.utterances]
    elif folds < 3:
        fault = f"{corpus.name}: {folds} session(s), but train, dev and test need at least 3"
        raise UserError(f"{fault}: add a column split, session, or speaker (each a session)")
    else:
        names = sorted({u.session for u in corpus.utterances}, key=natural)
        split_of = {names[(fold - 1) % folds]: "test", names[fold % folds]: "dev"}
        of_row = [split_of.get(u.session, "train") for u in corpus.utterances]
    if not 1 <= fold <= folds:
        raise UserError(f"--fold {fold}: {corpus.name} has folds 1..{folds}")
    every = dict.fromkeys((*SPLITS, *TESTS))  # test is in both
    splits = {s: np.flatnonzero(np.array(of_row) == s).astype(np.int64) for s in every}
    splits = {s: rows for s, rows in splits.items() if s in SPLITS or len(rows)}
    found: dict[str, str] = {}  # speaker -> split
    for split in SPLITS:
        rows = splits[split]
        if not len(rows):
            raise UserError(f"{corpus.name} fold {fold}: the {split} split is empty")
        for u in (corpus.utterances[row] for row in rows):
            if known_speaker(u.speaker) and found.setdefault(u.speaker, split) != split:
                both = f"{found[u.speaker]} and {split} (there {u.utt_id})"
                raise UserError(f"{corpus.name} fold {fold}: speaker {u.speaker} is in both {both}")
    check_overlap(corpus, splits, f"{corpus.name} fold {fold}")
    return splits


def check_overlap(corpus: Corpus, splits: dict[str, np.ndarray], where: str) -> None:
    """UserError if a part of a recording is in two splits.

    Two known speakers may talk at the same time: theirs must share half of the shorter one.
    """
    cuts = []
    for split, rows in splits.items():
        for row in rows.tolist():
            u, end = corpus.utterances[row], 1e9  # the end of the file is not known yet
            if corpus.seconds is not None:
                end = u.start + corpus.seconds[row]
            cuts.append((str(u.path), u.start, min(end, u.end or end), row, split))
    for path, cuts_of_file in itertools.groupby(sorted(cuts), key=operator.itemgetter(0)):
        latest: dict[tuple[str, str], tuple] = {}  # split, speaker -> what ends last of it
        for _, start, end, row, split in cuts_of_file:
            u = corpus.utterances[row]
            for (other_split, speaker), (its_start, its_end, its_row) in latest.items():
                shared, shorter = min(end, its_end) - start, min(end - start, its_end - its_start)
                crosstalk = speaker != u.speaker and all(map(known_speaker, (speaker, u.speaker)))
                apart = split != other_split and not {split, other_split} <= set(TESTS)
                if apart and shared > (shorter / 2 if crosstalk else 0.02):
                    both = f"{corpus.utterances[its_row].place()} in {other_split} and {u.place()}"
                    fix = "remove one, or keep both in one split or session"
                    fault = f"{both} in {split} are the same part of {path}: {fix}"
                    raise UserError(f"{where}: {fault}")
            if end > latest.get((split, u.speaker), (0, 0, 0))[1]:
                latest[split, u.speaker] = (start, end, row)


def describe_splits(corpus: Corpus, splits: dict[str, np.ndarray]) -> str:
    """One table: split, utterances, hours (known after load_audio), genders, sessions, speakers;
    then the label_notes."""
    table = []
    for split, rows in splits.items():
        chosen = [corpus.utterances[row] for row in rows]
        genders = sorted(Counter(u.gender or "?" for u in chosen).items())
        line = {
            "split": split,
            "utterances": len(rows),
            "hours": "-" if corpus.seconds is None else f"{corpus.seconds[rows].sum() / 3600:.2f}",
            "genders": " ".join(f"{gender} {count}" for gender, count in genders),
            "sessions": shorten({u.session for u in chosen}),
            "speakers": shorten({u.speaker for u in chosen}),
        }
        table.append(line)
    notes = [f"note: {note}" for note in label_notes(corpus, splits)]
    return "\n".join([pd.DataFrame(table).to_string(index=False), *notes])


def shorten(names: set[str], limit: int = 10) -> str:
    ordered = [name or "-" for name in sorted(names, key=natural)]
    more = f" ... ({len(ordered)})" if len(ordered) > limit else ""
    return " ".join(ordered[:limit]) + more


def label_notes(corpus: Corpus, splits: dict[str, np.ndarray]) -> list[str]:
    """Labels of a split and target that are none, one, or all the same; speakers of a test2 or
    test3 that training sees."""
    notes = []
    speakers = np.array([u.speaker for u in corpus.utterances])
    seen = {name for s in ("train", "dev") for name in speakers[splits[s]] if known_speaker(name)}
    for split, rows in splits.items():
        heard = sum(name in seen for name in speakers[rows])
        if heard and split not in SPLITS:
            notes.append(f"{split}: {heard} utterances are of speakers in train or dev")
        for target in () if split == BLIND else corpus.targets:
            labels = pd.Series([getattr(corpus.utterances[row], target) for row in rows]).dropna()
            if labels.nunique() > 1:
                continue
            found = f"all {len(labels)} labels of {target} are {labels.max():g}"
            if len(labels) < 2:
                found = f"{len(labels) or 'no'} label of {target}"
            effect = "there is nothing to learn" if split == "train" else "its CCC says nothing"
            notes.append(f"{split}: {found}: {effect}")
    return notes


# ---------------------------------------------------------------------------------------------
# Utterances left out


def check_skipped(corpus: Corpus, max_share: float = MAX_SKIPPED) -> None:
    """UserError if more than this share of all utterances was left out."""
    total = len(corpus.utterances) + len(corpus.skipped)
    if len(corpus.skipped) > max_share * total:
        first = "; ".join(f"{s.utt_id}: {s.reason}" for s in corpus.skipped[:3])
        raise UserError(
            f"{corpus.name}: {len(corpus.skipped)} of {total} utterances cannot be used, more than "
            f"{100 * max_share:g} % ({first}): repair or remove them; python data.py --data ... "
            "--skipped skipped.csv lists all"
        )


def skipped_by_kind(corpus: Corpus) -> dict[str, list[Skipped]]:
    """corpus.skipped by reason, without the particulars in brackets at its end."""
    kinds: dict[str, list[Skipped]] = {}
    for skipped in corpus.skipped:
        kinds.setdefault(skipped.reason.split(" (")[0], []).append(skipped)
    return kinds


def write_skipped(path: Path, corpus: Corpus) -> None:
    """CSV of corpus.skipped: utt_id, file, reason."""
    table = pd.DataFrame(corpus.skipped, columns=Skipped._fields, dtype=object)  # any bytes
    replace_text(path, table.to_csv(index=False))
