"""Files that are complete or not there, the caches made of them, and how scripts end.

Everything is written aside, synced and renamed, so a process may be killed at any moment. A cache
is checked when it is opened. A file whose name begins with a dot may be deleted while nothing runs.
Not here: what a run writes (runs.py).
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

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
        if not version_of(package, name):
            fix = f"pip install {package}{otherwise}"
            raise UserError(f"{needed_by} needs {package}, which is not installed: {fix}") from None
        cause = error.__cause__ or error
        broken = package
        for frame, _ in traceback.walk_tb(cause.__traceback__):  # the last one that is installed
            module = frame.f_globals.get("__name__", "").partition(".")[0]
            if module != "torch" and version_of(module, module):
                broken = module
        version, text = version_of(broken, broken), str(cause).partition("\n")[0][:160]
        fault = f"{broken} {version} does not work ({type(cause).__name__}: {text})"
        fix = f"install one that fits torch {torch.__version__}{otherwise}"
        raise UserError(f"{needed_by} needs {package}, but {fault}: {fix}") from None


@functools.cache
def version_of(package: str, module: str) -> str:
    """Version of the installed package, or of another one that brings the module; "" of none."""
    brought_by = importlib.metadata.packages_distributions()
    names = brought_by.get(module.partition(".")[0], [package])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(names[0])
    return ""


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
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def run_script(name: str, command: Callable[[], int | None]) -> int:
    """The exit code of a script: that of `command`; 2 and one line after a wrong flag or file.

    141, as the shell says it, if the reader of its output has gone: `python data.py ... | head`.
    """
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed, as by >&-: another file would take its place
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    except (UserError, OSError) as error:
        code = 2
        say(f"{name}: error: {disk_fault(error) if isinstance(error, OSError) else error}")
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # let Python's last flush find a place
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code or 0


def say(text: str) -> None:
    """A line on stderr, or nowhere: `2>&1 | head` must not end what goes on."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def disk_fault(error: OSError) -> str:
    """What failed on which file and, if its disk is full, on which disk."""
    if not error.filename:
        return f"standard output: {error.strerror}" if error.errno in DISK_FULL else str(error)
    text = f"{error.filename}: {error.strerror}"
    if error.errno not in DISK_FULL:
        return text
    place = Path(error.filename).absolute().parent
    while not os.path.ismount(place):
        place = place.parent
    return f"{text} (disk of {place}): free some there, or write elsewhere"


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


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


def check_disk_space(
    directory: Path,
    num_bytes: int,
    what: str,
    fix: str = "free disk space there, or set another --cache_dir",
) -> None:
    """UserError if `num_bytes` do not fit the disk of `directory`, which need not exist yet."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            f"{what} would need {gib(num_bytes)} in {directory}, where {gib(free)} are free: {fix}"
        )


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def build_dir(target: Path, fill: Callable[[Path], object]) -> Path:
    """`target`, filled by `fill(directory)` if it did not exist; never visible half-written.

    The lock only avoids double work (flock does nothing on some network disks); the rename is what
    keeps the cache complete. If two processes build, the first rename wins. UserError if the disk
    is full or cannot be written.
    """
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
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


def build_cache(target: Path, fill: Callable[[Path], object]) -> Path:
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

    build_dir(target, fill_and_seal)
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


def digest(*parts: object) -> str:
    """16 hex digits over the JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of every weight: a cache made with other weights is another cache."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def progress(iterable: object, total: int, what: str) -> tqdm:
    return tqdm(iterable, total=total, desc=what, disable=None, leave=False)  # None: terminal only
