"""Audio files without labels: what predict.py is given on its command line.

Nothing is opened here but folders and lists: whether a file is audio shows when it is decoded.
"""

import math
import mimetypes
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from corpora.base import Corpus, Utterance
from util.files import UserError


def listed(words: Iterable[str]) -> Iterator[str]:
    """The words; in place of - the lines of stdin, in place of @FILE those of the file."""
    for word in words:
        if word == "-":
            lines = sys.stdin.buffer
        elif word.startswith("@") and not os.path.exists(word):
            try:
                lines = Path(word[1:]).read_bytes().splitlines()
            except OSError as error:
                raise UserError(f"{word}: {error.strerror.lower()}") from None
        else:
            yield word
            continue
        for line in lines:  # names need not be UTF-8; Windows begins a list with a mark
            yield os.fsdecode(line.rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf"))


def read_files(paths: Iterable[str]) -> Corpus:
    """The files, and those in folders that are not something else by their names.

    Missing files and folders that cannot be searched are skipped; what is not tried, for its name,
    is counted in the notes.
    """
    corpus, files = Corpus("files", Path("."), (0.0, 1.0), []), []
    for path in map(Path, filter(None, paths)):
        if os.path.isdir(path):
            files += files_below(path, corpus)
        elif os.path.exists(path):
            files.append(path)
        else:
            corpus.skip(path.stem, path, "no such file or folder")
    for name, file in zip(names_of(files), files):
        corpus.utterances.append(Utterance(name, file, math.nan, math.nan))
    return corpus


def files_below(folder: Path, corpus: Corpus) -> list[Path]:
    """Files in a folder and in those below it, linked ones too; each folder once."""
    files, others, seen = [], Counter[str](), set()
    types = mimetypes.MimeTypes()  # as Python knows them, on any machine
    pending = [folder]
    while pending:
        place = pending.pop(0)
        try:
            stat = os.stat(place)
            entries = [] if (stat.st_dev, stat.st_ino) in seen else list(os.scandir(place))
        except OSError as error:
            corpus.skip(place.name, place, f"cannot be searched ({error.strerror})")
            continue
        seen.add((stat.st_dev, stat.st_ino))
        for entry in entries:
            kind = types.guess_type(entry.name)[0]  # None: anything
            if entry.name.startswith("."):
                others["hidden"] += 1
            elif os.path.isdir(entry.path):
                # linked ones come last: a file is named by its own folder
                at = len(pending) if entry.is_symlink() else 0
                pending.insert(at, Path(entry.path))
            elif kind is None or kind.startswith(("audio/", "video/")):
                files.append(Path(entry.path))
            else:
                others[Path(entry.name).suffix] += 1
    if others:
        counts = ", ".join(f"{count} {kind}" for kind, count in others.items())
        corpus.notes.append(f"{folder}: not tried, no audio by name: {counts}")
    return sorted(files)


def names_of(files: list[Path]) -> list[str]:
    """The stem of each file, or the shortest end of its path that is the name of no other."""
    candidates = []
    for file in files:
        parts = file.absolute().parts[1:]
        ends = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        candidates.append([file.stem, *ends])
    uses = Counter(name for names in candidates for name in {*names})
    unique = [[name for name in names if uses[name] == 1] for names in candidates]
    return [alone[0] if alone else names[-1] for alone, names in zip(unique, candidates)]
