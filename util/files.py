"""Files that are whole or not there, and the caches made of them.

Everything is written aside, synced and renamed, so a process may be killed at any moment. A cache
is checked by the seals of its files when it is read back. A name that begins with a dot is left
over from a killed process and may be deleted.
Not here: what a run writes (runs.py).
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

SEALED_BYTES = 2**26  # cached files up to this size are hashed when opened, larger ones measured


class UserError(ValueError):
    """A user's mistake; the message is complete (flag, or file and row; what is allowed; the fix).

    Scripts print it in one line and exit with code 2.
    """


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


def build_dir(target: Path, fill: Callable[[Path], object]) -> Path:
    """`target`, filled by `fill(directory)` if it did not exist; never visible half-written.

    The lock only avoids double work (flock does nothing on some network disks); what keeps the
    cache whole is the rename. Where two processes build, the first rename wins. UserError when
    the disk is full or cannot be written.
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
                f"({error.strerror or error}): make room there, or set another --cache_dir"
            ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def seal(path: Path) -> list:
    """[bytes, hash] of a file; the hash only up to SEALED_BYTES, more would take long to read."""
    size = path.stat().st_size
    return [size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= SEALED_BYTES else ""]


def build_cache(target: Path, fill: Callable[[Path], object]) -> Path:
    """build_dir with a seal on each file. UserError when one was damaged since it was written."""

    def fill_and_seal(aside: Path) -> None:
        fill(aside)
        seals = {path.name: seal(path) for path in aside.iterdir()}
        (aside / "seals.json").write_text(json.dumps(seals))

    build_dir(target, fill_and_seal)
    try:
        seals = json.loads((target / "seals.json").read_text())
        whole = seals == {name: seal(target / name) for name in seals}
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{target} is damaged: delete it, it is built again")
    return target


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
