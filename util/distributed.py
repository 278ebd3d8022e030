"""Processes of a run: ranks, signals, loader workers, and memory that runs out.

All ranks decide alike: a stop, or a lack of memory, on one rank reaches the others through one
small all-reduce over the CPU. Everything that waits has a time-out, and no process outlives the one
that started it. Nothing here knows the model or the run's files.
"""

import contextlib
import ctypes
import datetime
import inspect
import itertools
import logging
import math
import multiprocessing
import os
import platform
import re
import resource
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, get_worker_info

from util.files import UserError, disk_of

log = logging.getLogger("vatune")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RETRY_EXIT_CODE = os.EX_TEMPFAIL  # 75: stopped by a signal, resume me
START_SECONDS = 1800  # time-out up to the first step: compiling, cold disks [guess]
STALL_SECONDS = 3  # that a batch may take after a signal to stop [guess]
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_REMEDY = "give --num_workers 0, or more shared memory (docker run --shm-size 8g)"
GIB = 2**30

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when CUDA starts

stop_signals: list[float] = []  # times of those received so far; ranks agree on them after a step
raised_signals: list[int] = []  # those that raised Stopped, which a library may have replaced


class Stopped(BaseException):
    """A signal ended the run where there is nothing to save; the exit code is RETRY_EXIT_CODE."""


class NoBatch(Stopped):
    """A signal has arrived, and no batch for STALL_SECONDS; the other ranks do not know yet."""


class StepTooLarge(torch.OutOfMemoryError):
    """A step ran out of memory on some rank; raised on all ranks, before anything was updated."""


class FaultOnOtherRank(UserError):
    """Another rank found something wrong and has printed it; this one ends without a message."""


# ---------------------------------------------------------------------------------------------
# Signals


def handle_signals(at_once: bool) -> None:
    """Raise Stopped wherever a signal arrives, or only note it for the ranks to agree on."""

    def handler(number: int, _: object) -> None:
        stop_signals.append(time.monotonic())
        if at_once and len(stop_signals) == 1:  # a second one must not interrupt the clean-up
            raised_signals.append(number)
            raise Stopped

    for number in SIGNALS:
        signal.signal(number, handler)
    if at_once and stop_signals:
        raise Stopped


# ---------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, as torchrun's variables tell; alone without them."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def uses_cuda(device: str) -> bool:
    """Does --device auto, cpu or cuda mean a GPU here?"""
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def read_ranks() -> tuple[int, int, int]:
    """(rank, local rank, world size) by torchrun's variables, (0, 0, 1) without them.

    UserError if they are left over from something else, or if another launcher than torchrun has
    started several processes, each of which would train alone.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    found = "environment: " + ", ".join(f"{name} is {text!r}" for name, text in given.items())
    fix = f"start several ranks with torchrun, or unset {' '.join(given)} for one process"
    if not all(re.fullmatch("[0-9]{1,9}", text) for text in given.values()):
        raise UserError(f"{found}, must be a whole number: {fix}")
    numbers = {name: int(text) for name, text in given.items()}
    rank, local_rank = numbers.get("RANK", 0), numbers.get("LOCAL_RANK", 0)
    world_size = numbers.get("WORLD_SIZE", 1)
    if (rank, local_rank, world_size) == (0, 0, 1):
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            refuse_other_launchers()
        return 0, 0, 1
    missing = [name for name in (*names, "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise UserError(f"{found}, but {missing[0]} is not set: {fix}")
    if not local_rank <= rank < world_size:
        raise UserError(f"{found}, needs LOCAL_RANK <= RANK < WORLD_SIZE: {fix}")
    return rank, local_rank, world_size


def refuse_other_launchers() -> None:
    """UserError if one of them has started several processes."""
    given = os.environ
    names = {
        "OMPI_COMM_WORLD_SIZE": "mpirun",
        "PMI_SIZE": "mpiexec",
        "SLURM_STEP_NUM_TASKS": "srun",
    }
    in_batch_script = "SLURM_PROCID" not in given or given.get("ENVIRONMENT") == "BATCH"
    if "SLURM_STEP_NUM_TASKS" not in given and not in_batch_script:
        names["SLURM_NTASKS"] = "srun"
    for name, launcher in names.items():
        if re.fullmatch("[0-9]+", given.get(name, "")) and int(given[name]) > 1:
            raise UserError(
                f"environment: {name} is {given[name]}, so {launcher} has started as many "
                "processes, each of which would train alone: start ranks with torchrun, or one "
                f"task with {launcher} -n 1"
            )


def find_ranks(device: str) -> Ranks:
    """Rank and device of this process; UserError if its GPU is not there. CUDA starts here, since
    the first look at its memory needs it."""
    rank, local_rank, world_size = read_ranks()
    if not uses_cuda(device):
        return Ranks(rank, local_rank, world_size, torch.device("cpu"))
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU (torch.cuda.is_available() is False)")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node: local rank {local_rank} needs GPU {local_rank}, this machine has "
            f"{torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return Ranks(rank, local_rank, world_size, torch.device("cuda", local_rank))


def start_ranks(ranks: Ranks, seconds: float) -> None:
    """Starts the process group (all ranks participate); within one machine it stays on loopback."""
    if ranks.world_size == 1:
        return
    if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks.world_size) and sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    backend = "cpu:gloo,cuda:nccl" if ranks.cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))


def end_ranks() -> None:
    """Waits for all ranks and ends the process group (all ranks participate)."""
    wait_for_ranks()
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_ranks() -> None:
    """Returns when every rank has reached this call (all ranks participate)."""
    if dist.is_initialized():
        dist.barrier()


def set_rank_timeout(seconds: float) -> None:
    """Time-out of every later collective; torch below 2.15 has it under another name."""
    if dist.is_initialized():
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(datetime.timedelta(seconds=seconds))


@dataclass
class Collectives:
    """Whether collectives are on, and what the current step has exchanged (guard_memory)."""

    off: bool = False
    sums: bool = False
    buckets: int = 0
    agreed: bool = False

    @property
    def on(self) -> bool:
        return dist.is_initialized() and not self.off


collectives = Collectives()


@contextlib.contextmanager
def without_ranks() -> Iterator[None]:
    """No collective of the block waits for another rank: for a step that is planned or tried."""
    collectives.off = True
    try:
        yield
    finally:
        collectives.off = False


def world_size() -> int:
    return dist.get_world_size() if collectives.on else 1


def rank() -> int:
    return dist.get_rank() if collectives.on else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place (all ranks participate)."""
    if collectives.on:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """True on every rank if it is on one (all ranks participate, over the CPU)."""
    return all_reduce(torch.tensor(float(flag))).item() > 0


def gather(value: object) -> list:
    """The values of all ranks, in their order (all ranks participate)."""
    values = [value] * world_size()
    if collectives.on:
        dist.all_gather_object(values, value)
    return values


def raise_together(fault: UserError | None) -> None:
    """Raises a rank's own fault, and FaultOnOtherRank on the others (all ranks participate)."""
    if any_rank(fault is not None):
        raise fault or FaultOnOtherRank("another rank has printed the reason")


def wrap_ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DistributedDataParallel over the parameters that train now; the model itself without ranks.

    Buffers are normalisers, fitted before and never changed: none is broadcast.
    """
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters  # the flag's name has changed
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ddp_model = DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, **{buffers: False}
    )
    ddp_model.register_comm_hook(None, average_bucket)
    return ddp_model


def synchronised(ddp_model: torch.nn.Module, on: bool) -> contextlib.AbstractContextManager:
    """Gradients are averaged over ranks in the backward that begins here, or only accumulated."""
    if on or not isinstance(ddp_model, DistributedDataParallel):
        return contextlib.nullcontext()
    return ddp_model.no_sync()


# ---------------------------------------------------------------------------------------------
# A step that runs out of memory on one rank ends alike on all
#
# The others wait for it in the collectives of the step, which are always these, in this order: the
# order of DDP's buckets (in the second step), the batch's sums (sum_over_ranks), the buckets of
# gradients, and the agreement (agree_on_step).
# So the rank records what it has exchanged (`collectives`), and sends zeros for the rest.


def sum_over_ranks(sums: Tensor) -> None:
    """Adds up a step's sums over all ranks, in place; once in every step (all participate)."""
    all_reduce(sums)
    collectives.sums = True


def average_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own average of a bucket of gradients, recorded."""
    collectives.buckets += 1
    return allreduce_hook(state, bucket)


def agree_on_step(fault: str = "", no_batch: bool = False) -> bool:
    """After backward and before the update: has any rank got a signal to stop?

    All ranks participate. On all of them, StepTooLarge if one has run out of memory (`fault`), and
    Stopped if one has got no batch after a signal.
    """
    flags = torch.tensor([float(bool(fault)), float(no_batch), float(bool(stop_signals))])
    faults, stalls, stops = all_reduce(flags)
    collectives.agreed = True
    if faults:
        raise StepTooLarge(fault or "another rank is out of memory")
    if stalls:
        raise Stopped
    return bool(stops)


def guard_memory(update: Callable[[], Any], ddp_model: torch.nn.Module, zero_sums: Tensor) -> Any:
    """update(), a training step; StepTooLarge on all ranks if one of them runs out of memory.

    `zero_sums`: zeros like the sums that the step exchanges.
    """
    begin_step(ddp_model)
    try:
        return update()
    except (RuntimeError, MemoryError) as error:
        if collectives.agreed or not is_out_of_memory(error):
            raise
        fault = str(error) or "MemoryError"  # Python's own has no text
    # The error and the step's tensors in its traceback are gone here, which makes room.
    exchange_zeros(ddp_model, zero_sums)
    agree_on_step(fault)
    raise AssertionError("agree_on_step raises for a fault")


def leave_step(ddp_model: torch.nn.Module, zero_sums: Tensor) -> None:
    """After NoBatch: takes part in the step with zeros, so that no rank waits for this one, and all
    others raise Stopped before they update anything."""
    begin_step(ddp_model)
    exchange_zeros(ddp_model, zero_sums)
    with contextlib.suppress(Stopped):
        agree_on_step(no_batch=True)


def begin_step(ddp_model: torch.nn.Module) -> None:
    """Nothing of this step's collectives is done."""
    collectives.sums, collectives.buckets, collectives.agreed = False, 0, False
    if isinstance(ddp_model, DistributedDataParallel):
        ddp_model.reducer._rebuild_buckets()  # in the second step, else in its forward


def exchange_zeros(ddp_model: torch.nn.Module, zero_sums: Tensor) -> None:
    """Completes the step's collectives, so that the other ranks do not wait for this one."""
    if not collectives.sums:
        sum_over_ranks(zero_sums)
    if not isinstance(ddp_model, DistributedDataParallel):
        return
    ddp_model.logger.set_runtime_stats_and_log()  # its record is older than the rebuilt buckets
    logged = ddp_model._get_ddp_logging_data()
    sizes = logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]  # bytes, as text
    for size in sizes.split(", ")[collectives.buckets :]:
        dist.all_reduce(torch.zeros(int(size) // 4, device=zero_sums.device))


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's allocator and libraries, torch on a CPU and numpy; not for a collective."""
    words = r"(out of|not enough|can't allocate) memory|_ALLOC_FAILED"
    words += "|unable to find an engine"  # cuDNN's, if none of its workspaces found room
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, dist.DistError)
        and re.search(words, str(error)) is not None
    )


def encode_in_pieces(
    encode: Callable[[dict], Any], batches: Iterable[dict], device: torch.device
) -> Iterator[tuple[list[int], Any]]:
    """(rows, encode(batch on the device)) of evaluation batches, in pieces if memory is short.

    A piece is some of the batch's utterances with the padding that they have in it, so results
    differ by rounding alone, also if an encoder sees padding. After a failure, later pieces of this
    call hold no more audio than fitted.
    torch.OutOfMemoryError if there is no memory for one utterance.
    """
    limit = math.inf  # seconds of audio in a piece, padding included
    for batch in batches:
        count = len(batch["rows"])
        seconds = batch["audio_seconds"] / (1 - batch["padded_share"]) / count  # per utterance
        start, size = 0, max(1, int(min(count, limit / seconds)))
        while start < count:
            rows = slice(start, start + size)
            try:
                piece = {
                    key: value[rows].to(device, non_blocking=True)
                    for key, value in batch.items()
                    if isinstance(value, Tensor)
                }
                encoded = encode(piece)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise torch.OutOfMemoryError(
                        f"not enough memory for {seconds:.1f} s of audio at once: lower "
                        "--max_seconds"
                    ) from None
                size //= 2
                limit = size * seconds
                reason = str(error).partition("\n")[0][:120]
                log.info(
                    f"evaluation: out of memory ({reason}): going on with {limit:.1f} s at once"
                )
                continue
            yield batch["rows"][rows], encoded
            start += size


# ---------------------------------------------------------------------------------------------
# Memory and precision of the device


def configure_device(device: torch.device, tf32: bool, memory_fraction: float) -> None:
    """Applies --tf32 and --memory_fraction, makes cuDNN repeat itself, and starts the measurement
    of the peak."""
    allow_tf32(tf32)
    torch.backends.cudnn.deterministic = True  # two runs of a CNN differed [measured on an H100]
    if device.type == "cuda" and memory_fraction:
        torch.cuda.set_per_process_memory_fraction(memory_fraction, device)
    reset_peak(device)


def allow_tf32(on: bool) -> None:
    """TF32 in matrix products and convolutions of float32 tensors on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def reset_peak(device: torch.device) -> None:
    """Resets the measured peak of a GPU; that of a CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Measured peak: allocated tensors on CUDA, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def device_name(device: torch.device) -> str:
    """Model of the GPU, or of the processor with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()} x {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------
# Loader workers


def start_worker(_: int) -> None:
    """A loader worker ends when its rank does, and not before: a checkpoint may need it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    rank_process = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != rank_process.pid:  # a forkserver's child, or the rank has ended already
        threading.Thread(target=end_with, args=(rank_process.pid,), daemon=True).start()


def end_with(pid: int) -> None:
    """Ends this process at once when process `pid` has ended."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def check_shared_memory(num_bytes: int, workers: int) -> None:
    """UserError on all ranks if so many bytes, the batches that the workers of each rank may have
    on their way, do not fit into shared memory somewhere (all ranks participate)."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")  # not always a number if ranks are not torchrun's
    needed = num_bytes * (int(here) if here.isdigit() and world_size() > 1 else 1)
    fault = None
    if workers and SHARED_MEMORY.is_dir() and needed > shutil.disk_usage(SHARED_MEMORY).free:
        fault = UserError(
            f"--num_workers {workers}: batches on their way need up to {needed / 2**20:.0f} MiB of "
            f"{disk_of(SHARED_MEMORY)}: {SHARED_MEMORY_REMEDY}"
        )
    raise_together(fault)


def share(batch: dict | UserError) -> dict | UserError:
    """The batch, which a loader worker puts into shared memory; UserError if there is no room.

    torch would do it in a thread of the worker, whose errors nobody gets to know.
    """
    if get_worker_info() is None or isinstance(batch, UserError):
        return batch
    try:
        for value in batch.values():
            if isinstance(value, Tensor):
                value.share_memory_()
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return UserError(f"--num_workers: {reason}: {SHARED_MEMORY_REMEDY}")
    return batch


def with_timeout(loader: DataLoader, seconds: float) -> Iterator[dict]:
    """The loader's batches. RuntimeError if one takes longer than `seconds`, or its worker died;
    NoBatch if one takes long after a signal.

    DataLoader's own time-out does not reach into the passing of a tensor, where a stopped worker
    blocks, and reports a dead one only when it is over.
    """

    def look(*_: object) -> None:
        now = time.monotonic()
        if stop_signals and now - stop_signals[0] > STALL_SECONDS:
            raise NoBatch
        if now - begin > seconds:
            raise TimeoutError(f"no batch for --timeout {seconds:g} s")

    signal.signal(signal.SIGALRM, look)
    batches = None
    while True:
        begin = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        try:
            if batches is None:
                batches = iter(loader)  # waits for an answer of persistent workers
            batch = next(batches, None)
        except NoBatch:
            kill_workers()  # the loader's own end waits for each
            raise
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
    """Ends loader workers at once: a stopped one, or one waiting for a disk, would block exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
    for worker in multiprocessing.active_children():
        worker.kill()


def until_stopped(batches: Iterator[dict], polls: int) -> Iterator[dict]:
    """At most `polls` batches, the same number on every rank; Stopped on all if one has got a
    signal. agree_on_step must follow."""
    no_batch = False
    for _ in range(polls):
        if any_rank(bool(stop_signals)):
            raise Stopped
        try:
            yield from itertools.islice(batches, 1)
        except NoBatch:
            no_batch = True
    if no_batch:
        agree_on_step(no_batch=True)
