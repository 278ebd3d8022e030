"""Checkpoints: files that are complete or not there, written while training goes on.

A checkpoint holds tensors and plain values, and ends with its SHA-256. Writer copies it to host
memory at once and writes it in a thread, so that the loop waits for the copy, not for the disk.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from util.files import UserError, replacing, sha256


class Hashed:
    """A file that is only written to, and the SHA-256 of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha = file, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.sha.update(block)
        return self.file.write(block)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, content: dict) -> None:
    """The content, with its SHA-256 as the last 32 bytes; a last.pt that is there becomes
    previous.pt. OSError names the file; what was there stays."""
    previous = path.with_name("previous.pt") if path.name == "last.pt" else None
    with replacing(path, previous) as file:
        hashed = Hashed(file)
        try:
            torch.save(content, hashed)
        except RuntimeError as error:  # torch puts its own error over the disk's
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.write(hashed.sha.digest())


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """What train.py saved, unpickled (tensors and plain values) after its hash was verified.

    UserError names a file that is missing, damaged or not of train.py.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size - 32  # the hash
            if size <= 0 or sha256(file, size) != file.read(32):
                fault = f"{path}: damaged, or not a best.pt, last.pt or frozen.pt of train.py"
                raise UserError(fault)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    except Exception as error:  # weights_only refuses more than tensors and plain values
        fault = f"{path}: not a checkpoint of train.py ({type(error).__name__})"
        raise UserError(fault) from None


class Writer:
    """Writes checkpoints in a thread; one call is in flight at most, and the next one waits for it.

    What a call writes was copied before it returned. The copies stay allocated for the next call;
    those of a GPU's tensors are pinned.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self.pending: Future | None = None
        self.copies: dict[tuple, Tensor] = {}  # by address, shape and type of the original

    def write(self, contents: dict[Path, dict], then: Callable[[], object]) -> None:
        """Saves each content, in order, then calls `then`. OSError of the call before this one."""
        self.wait()
        copies: dict[tuple, Tensor] = {}
        contents = {path: self._copy(content, copies) for path, content in contents.items()}
        if any(copy.is_pinned() for copy in copies.values()):
            torch.cuda.synchronize()
        self.copies = copies

        def save() -> None:
            for path, content in contents.items():
                save_checkpoint(path, content)
            then()

        self.pending = self.thread.submit(save)

    def wait(self) -> None:
        """Returns when nothing is in flight; OSError if it could not be written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _copy(self, value: Any, copies: dict[tuple, Tensor]) -> Any:
        """The value with its tensors in host memory, each once."""
        if isinstance(value, dict):
            return {key: self._copy(item, copies) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, copies) for item in value)
        if not isinstance(value, Tensor):
            return value
        key = (value.data_ptr(), value.shape, value.dtype, value.device)
        if key not in copies:
            copy = self.copies.get(key)
            if copy is None:
                pinned = value.device.type == "cuda"
                copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            copies[key] = copy.copy_(value.detach(), non_blocking=True)
        return copies[key]
