"""Files that are complete or not there, the caches made of them, and how scripts end.

Everything is written aside, synced and renamed, so a process may be killed at any moment. A cache
is checked when it is opened. A file whose name begins with a dot may be deleted while nothing runs.
Not here: what a run writes (util/runs.py).
"""

import contextlib
import errno
import fcntl
import gc
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, TextIO

import numpy as np
import torch
from tqdm import tqdm

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class UserError(ValueError):
    """A user's mistake; the message has all: flag, or file and row; what is allowed; the fix.

    Scripts print it in one line and exit with code 2.
    """


def optional_module(name: str, package: str, needed_by: str, otherwise: str = "") -> ModuleType:
    """A module of a package that not every command needs. UserError if it is absent, or broken."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # built for another torch, numpy or CUDA, it raises anything
        fault = "is not installed"
        if getattr(error, "name", "") != name.partition(".")[0]:  # the module that was not found
            fault = f"does not work ({described(package, error)})"
        fix = f"pip install --upgrade {package}{otherwise}"
        raise UserError(f"{needed_by} needs {package}, which {fault}: {fix}") from None


def described(package: str, error: Exception) -> str:
    """The package with its version, and what it raised, in one line."""
    version = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(package)
    text = str(error).strip().partition("\n")[0][:160]
    return f"{f'{package} {version}'.strip()}: {type(error).__name__}: {text}"


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, which becomes `previous`, when the block ends well.

    Synced, then renamed. OSError names the file; what was there stays.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.aside")
    try:
        with open(aside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        other = error.filename not in (None, str(aside))  # of a file that was read meanwhile
        raise OSError(error.errno, error.strerror, error.filename if other else str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def open_standard_streams() -> None:
    """Opens closed ones (`>&-`) on /dev/null, or a file opened later would take their place."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def silence(stream: TextIO) -> None:
    """Redirects a stream, whose disk is full or whose reader has gone, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """A line on stderr, or nowhere: `2>&1 | head` must not end what goes on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def in_words(names: Sequence[str]) -> str:
    """a, b and c"""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def run_script(name: str, command: Callable[[], int | None]) -> int:
    """The exit code of a script: that of `command`; 2 and one line after a wrong flag or file.

    141, as the shell says it, if the reader of its output has gone: `python data.py ... | head`.
    """
    open_standard_streams()
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        code = 141
    except (UserError, OSError) as error:
        code = 2
        say(f"{name}: error: {disk_fault(error) if isinstance(error, OSError) else error}")
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    return code or 0


def disk_fault(error: OSError) -> str:
    """What failed on which file and, if its disk is full, on which disk."""
    if not error.filename:
        return f"standard output: {error.strerror}" if error.errno in DISK_FULL else str(error)
    text = f"{error.filename}: {error.strerror}"
    if error.errno not in DISK_FULL:
        return text
    return f"{text} (disk of {disk_of(Path(error.filename))}): free some there, or write elsewhere"


def disk_of(path: Path) -> str:
    """Where its disk is mounted, with the space that is left there."""
    place = path.absolute()
    while not os.path.ismount(place):  # a path that does not exist is none
        place = place.parent
    return f"{place} ({shutil.disk_usage(place).free / 2**20:.0f} MiB free)"


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def without_nan(content: object) -> object:
    """The content as JSON can hold it, with None for NaN: a target's score without a label."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def sha256(file: BinaryIO, size: int) -> bytes:
    """32 bytes over the first `size` of the file, which is then at `size`."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


# ---------------------------------------------------------------------------------------------
# Caches


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def build_dir(target: Path, fill: Callable[[Path], object], wait: bool = True) -> Path | None:
    """`target`, filled by `fill(directory)` if it did not exist; never visible half-written.

    None, without `wait`, if another process is filling it now. The lock only avoids double work
    (flock does nothing on some network disks); the rename is what keeps the cache complete, and of
    two processes the first one wins. UserError if the disk is full or cannot be written.
    """
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            except OSError:
                pass  # this disk knows no locks
            if target.exists():
                return target
            aside.mkdir()
            fill(aside)
            for path in [*aside.rglob("*"), aside]:
                sync(path)
            os.rename(aside, target)
    except OSError as error:
        if not os.path.isdir(target):
            raise UserError(
                f"--cache_dir {target.parent}: {target.name} cannot be written "
                f"({error.strerror or error}): free disk space there, or set another --cache_dir"
            ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def build_cache(target: Path, fill: Callable[[Path], object], wait: bool = True) -> Path | None:
    """build_dir, with a check of every file against its size and SHA-256 in seals.json.

    All bytes are read and hashed when the cache is opened for the first time, and again whenever
    the size or the time of the last change of a file differs from what .NAME.checked beside the
    cache says; otherwise only these two are compared. So damage by a disk that changes bytes
    and not the time is not seen until that file is deleted. UserError names a damaged cache.
    """

    def fill_and_seal(aside: Path) -> None:
        fill(aside)
        seals = {path.name: seal(path) for path in aside.iterdir()}
        (aside / "seals.json").write_text(json.dumps(seals))

    if build_dir(target, fill_and_seal, wait) is None:
        return None
    stamp = target.with_name(f".{target.name}.checked")
    try:
        seals = json.loads((target / "seals.json").read_text())
        stats = [(target / name).stat() for name in [*seals, "seals.json"]]
        found = json.dumps([[stat.st_size, stat.st_mtime_ns] for stat in stats])
        if stamp.exists() and stamp.read_bytes() == found.encode():
            return target
        intact = all(seal(target / name) == sealed for name, sealed in seals.items())
    except (OSError, ValueError, AttributeError, TypeError):  # the last two: not a JSON object
        intact = False
    if not intact:
        raise UserError(f"{target} is damaged: delete it, it is built again")
    with contextlib.suppress(OSError):  # a cache that may only be read is hashed every time
        replace_text(stamp, found)
    return target


def seal(path: Path) -> list:
    """[bytes, SHA-256] of a file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        return [size, sha256(file, size).hex()]


def cached_array(target: Path, build: Callable[[], np.ndarray]) -> np.ndarray:
    """The array that `build` returns, from the cache if it is there."""

    def fill(aside: Path) -> None:
        content = io.BytesIO()  # np.save into a file does not see every failed write
        np.save(content, build())
        (aside / "values.npy").write_bytes(content.getvalue())

    build_cache(target, fill)
    return np.load(target / "values.npy", allow_pickle=False)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Pauses the search for cycles, as a decorator or in a with block.

    It takes a third of the time in which the objects of 150,000 rows are made [measured].
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def digest(*parts: object) -> str:
    """16 hex digits over the JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def array_digest(array: np.ndarray) -> str:
    """16 hex digits over type, shape and content; of a large array, over eight of its rows."""
    if array.nbytes > 1 << 16 and array.ndim > 1:
        array = array[np.linspace(0, len(array) - 1, 8).astype(int)]
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()[:16]


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """Hash of every weight: a cache made with other weights is another cache."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def progress_bar(iterable: object, total: int, what: str) -> tqdm:
    return tqdm(iterable, total=total, desc=what, disable=None, leave=False)  # None: terminal only
