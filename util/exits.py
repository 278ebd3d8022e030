"""How a run of train.py ends: its exit code, one line that says why, and status.json."""

import argparse
import contextlib
import errno
import json
import os
import platform
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from util import distributed
from util.distributed import RETRY_EXIT_CODE, Stopped
from util.files import UserError, disk_of, replace_text, say
from util.runs import read_json, run_dir

DISK_REMEDIES = {
    errno.ENOSPC: "free disk space on {}",
    errno.EDQUOT: "free disk space, your quota on {} is used up",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    **dict.fromkeys((errno.EIO, errno.EROFS, errno.EACCES), "make it writable"),
}


def exit_code(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Exit code of main(args): 0 done, 75 resume me, 2 wrong flags or data, 1 anything else.

    Every rank prints its own reason, if it has one. Mistakes of the user and faults of the machine
    are one or two lines; everything else keeps its traceback.
    """
    rank, code, reason = os.environ.get("RANK", "0"), 1, "done"
    try:
        code = main(args)
    except Stopped:
        code = RETRY_EXIT_CODE
    except distributed.FaultOnOtherRank:
        return 2
    except UserError as error:
        code, reason = 2, str(error)
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
        reason = machine_fault(error, run_dir(args), args.timeout)
        if distributed.raised_signals:  # Stopped broke a library's thread or process pool
            code = RETRY_EXIT_CODE
        elif not reason:
            reason = f"{type(error).__name__}: {error}"
            say(traceback.format_exc())
        distributed.kill_workers()  # freeing `error` frees the loader, which waits for its workers
    if code == RETRY_EXIT_CODE:
        reason = "stopped by a signal: continue with --resume"
    elif code:
        where = "" if rank == "0" else f"rank {rank}: "
        say(f"train.py: error: {where}{reason}")
    end_status(run_dir(args), code, reason)
    distributed.kill_workers()
    return code


def end_status(directory: Path, exit_code: int, reason: str) -> None:
    """Completes status.json of this process or its torchrun, which turns every exit code into 1.

    The first rank that ends says why: torchrun ends the others by a signal.
    """
    status = read_json(directory / "status.json")
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    ours = status.get("pid") == os.getpid()
    ours = ours or (by_torchrun and status.get("launcher") == os.getppid())
    if ours and status.get("host") == platform.node() and status.get("exit_code") is None:
        now = {"exit_code": exit_code, "reason": reason, "time": time.time()}
        with contextlib.suppress(OSError):  # no room for a new file
            replace_text(directory / "status.json", json.dumps(status | now, indent=1) + "\n")


def machine_fault(error: Exception, directory: Path, timeout: float) -> str:
    """One or two lines on a fault of the machine, with what to do; "" for any other error."""
    text = str(error) or type(error).__name__
    first_line = text.splitlines()[0]
    if isinstance(error, FloatingPointError):
        return text
    if distributed.is_out_of_memory(error):
        return f"out of memory: {first_line}"
    if isinstance(error, OSError) and error.errno in DISK_REMEDIES:
        where = Path(error.filename or fullest_disk(directory))
        remedy = DISK_REMEDIES[error.errno].format(disk_of(where))
        return f"{where}: {error.strerror}: {remedy}, then rerun with --resume"
    if text.startswith("DataLoader"):
        shared_memory = f"shared memory: {disk_of(distributed.SHARED_MEMORY)}"
        return (
            f"{first_line.strip(' .')}{faulty_children()}: rerun with --resume; if memory ran out "
            f"({shared_memory}), {distributed.SHARED_MEMORY_REMEDY}"
        )
    if isinstance(error, dist.DistError) or "third_party/gloo" in text:
        return (
            f"a rank died, or gave no answer for --timeout {timeout:g} s; look for its own "
            f"message, then rerun with --resume ({first_line[:120]})"
        )
    return ""


def fullest_disk(directory: Path) -> Path:
    """Which of the disks that a run in `directory` writes to has least space left."""
    places = [directory, Path(tempfile.gettempdir()), distributed.SHARED_MEMORY]
    return min(filter(Path.exists, places), key=lambda place: shutil.disk_usage(place).free)


def faulty_children() -> str:
    """Pids and states of child processes that are dead, stopped or waiting for a disk, on Linux."""
    stats = []
    time.sleep(0.2)  # one that dies closes its connections before it counts as dead
    with contextlib.suppress(OSError):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in children]
    states = [(stat.split()[0], stat.rpartition(")")[2].split()[0]) for stat in stats]
    names = {"Z": "is dead", "T": "is stopped", "D": "waits for a disk"}
    faulty = [f"worker {pid} {names[state]}" for pid, state in states if state in names]
    return f" ({', '.join(faulty)})" if faulty else ""
