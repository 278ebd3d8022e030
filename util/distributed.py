"""Processes of a run: ranks, loader workers, the signals they get, and how they end.

All ranks decide alike: a stop, or memory that has run out, on one of them is told to the others by
one small all-reduce over the CPU. Whatever waits has a time-out, and no process outlives the one
that started it.
"""

import argparse
import contextlib
import ctypes
import datetime
import errno
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import memory
from model import EmotionModel
from util.files import UserError
from util.runs import run_dir

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RETRY_EXIT_CODE = os.EX_TEMPFAIL  # 75: stopped by a signal, resume me
START_SECONDS = 1800  # for the first step, before --timeout holds: compiling, cold disks [guess]
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES}
stop_signals: list[int] = []  # that came; ranks agree on them after a step and in evaluation
Averaged = torch.futures.Future[torch.Tensor]


class Stopped(BaseException):
    """A signal ended the run where there is nothing to save; run exits with RETRY_EXIT_CODE."""


class StepTooLarge(torch.OutOfMemoryError):
    """A step found no memory, on all ranks together and before anything was updated."""


def handle_signals(at_once: bool) -> None:
    """Raise Stopped wherever a signal strikes, or only note it for any_rank to find."""

    def handler(number: int, _: object) -> None:
        stop_signals.append(number)
        if at_once and len(stop_signals) == 1:  # a second one must not break the clearing up
            raise Stopped

    for number in SIGNALS:
        signal.signal(number, handler)
    if at_once and stop_signals:
        raise Stopped


# ---------------------------------------------------------------------------------------------
# Ranks


def start_ranks(cuda: bool, world_size: int, seconds: float) -> None:
    """The process group; torchrun has set the addresses. Within one machine it stays on it."""
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) and sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))


def set_rank_timeout(limit: datetime.timedelta) -> None:
    """Of every collective from now on; torch below 2.15 has it under another name."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(limit)


def all_reduce(tensor: Tensor, world_size: int) -> Tensor:
    """Sum over ranks, in place (all ranks participate)."""
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, world_size: int) -> bool:
    """True on every rank when it is on one (all ranks participate, over CPU: no wait for GPUs)."""
    return all_reduce(torch.tensor(float(flag)), world_size).item() > 0


def agree_on_memory(faults: list[str], world_size: int) -> None:
    """StepTooLarge on every rank when one is out of memory (all ranks participate)."""
    if any_rank(bool(faults), world_size):
        raise StepTooLarge(faults[0] if faults else "another rank is out of memory")


def wrap_ddp(model: EmotionModel, device: torch.device, world_size: int) -> torch.nn.Module:
    if world_size == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    ddp_model = DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )  # buffers are normalisers, fitted before
    ddp_model.exchanged = []  # indices of this step's buckets
    ddp_model.register_comm_hook(ddp_model.exchanged, exchange)
    return ddp_model


def exchange(exchanged: list[int], bucket: dist.GradBucket) -> Averaged:
    """DDP's own average of a bucket of gradients, noted."""
    exchanged.append(bucket.index())
    return allreduce_hook(None, bucket)


def exchange_nothing(ddp_model: DistributedDataParallel, device: torch.device) -> None:
    """Zeros for the buckets of this step that a rank still owes the others: without them these
    would wait in backward for one that has run out of memory."""
    ddp_model.logger.set_runtime_stats_and_log()  # its record is older than the rebuilt buckets
    logged = ddp_model._get_ddp_logging_data()
    sizes = logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]  # bytes
    for size in sizes.split(", ")[len(ddp_model.exchanged) :]:
        dist.all_reduce(torch.zeros(int(size) // 4, device=device))


# ---------------------------------------------------------------------------------------------
# Loader workers


def start_worker(_: int) -> None:
    """A loader process dies with its rank and not before: the rank's checkpoint needs it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if not multiprocessing.parent_process().is_alive():  # it was faster
            os.kill(os.getpid(), signal.SIGKILL)


def patiently(loader: DataLoader, seconds: float) -> Iterator[dict]:
    """The loader's batches; RuntimeError when one takes longer, or its worker died.

    DataLoader's own time-out does not reach into the passing of a tensor, where a stopped worker
    blocks, and hides a dead one until it is over.
    """

    def handler(*_: object) -> None:
        raise TimeoutError(f"no batch for --timeout {seconds:g} s")

    signal.signal(signal.SIGALRM, handler)
    batches = None
    while True:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            if batches is None:
                batches = iter(loader)  # waits for an answer of persistent workers
            batch = next(batches, None)
        except (TimeoutError, ConnectionError, EOFError) as error:
            raise RuntimeError(f"DataLoader: {error}") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if batch is None:
            return
        if isinstance(batch, UserError):  # found by a loader process, see data.Batches
            raise batch
        yield batch


def kill_workers() -> None:
    """At once: a stopped one, or one that waits for a disk, would be waited for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
    for worker in multiprocessing.active_children():
        worker.kill()


def until_stopped(batches: Iterator[dict], polls: int, world_size: int) -> Iterator[dict]:
    """At most `polls` batches; Stopped on all ranks when one has got a signal."""
    for _ in range(polls):
        if any_rank(bool(stop_signals), world_size):
            raise Stopped
        yield from itertools.islice(batches, 1)


# ---------------------------------------------------------------------------------------------
# What ended the run


def machine_fault(error: Exception, args: argparse.Namespace) -> str:
    """One or two lines on a fault that is not the code's, with what to do; "" for any other."""
    text = str(error) or type(error).__name__
    if isinstance(error, FloatingPointError):
        return text
    if memory.is_out_of_memory(error):
        return f"out of memory: {text.splitlines()[0]}"
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = error.filename or run_dir(args)
        return f"{where}: {error.strerror}: make room or mend the disk, then --resume"
    if text.startswith("DataLoader"):
        return f"{text.splitlines()[0].strip(' .')}{odd_children()}: continue with --resume"
    if isinstance(error, dist.DistError) or "gloo" in text:
        return (
            f"a rank died, or gave no answer for --timeout {args.timeout:g} s; look for its own "
            f"message, then continue with --resume ({text.splitlines()[0][:120]})"
        )
    return ""


def odd_children() -> str:
    """Pids and states of child processes that are dead, stopped or waiting for a disk, on Linux."""
    stats = []
    time.sleep(0.2)  # one that dies closes its connections before it counts as dead
    with contextlib.suppress(OSError):
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in children]
    states = [(stat.split()[0], stat.rpartition(")")[2].split()[0]) for stat in stats]
    names = {"Z": "is dead", "T": "is stopped", "D": "waits for a disk"}
    odd = [f"worker {pid} {names[state]}" for pid, state in states if state in names]
    return f" ({', '.join(odd)})" * bool(odd)
