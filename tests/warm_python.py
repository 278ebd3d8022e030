"""A `python` that is quick to start, for a test that starts a hundred of them.

    python tests/warm_python.py DIR     # makes DIR/python and DIR/torchrun; serves until killed

DIR/python (-c CODE | -m MODULE | FILE) ... runs in a process forked from this one, which has
imported torch and other libraries but nothing of ours: with the caller's arguments, folder,
environment and descriptors 0 to 3, with its exit code, and with the signals that DIR/python gets.
"""

import atexit
import importlib
import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

LIBRARIES = (
    "torch", "torch._dynamo", "torch.utils.flop_counter", "torch.utils.tensorboard",
    "torch.distributed.run", "matplotlib.figure", "opensmile", "safetensors.torch", "soundfile",
    "soxr", "tqdm",
)  # fmt: skip
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
files = [0, 1, 2, 3] if os.path.exists("/proc/self/fd/3") else [0, 1, 2]
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(call).to_bytes(4, "big")], files)
    server.sendall(call)
    pid = int.from_bytes(server.recv(4), "big")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    sys.exit(int.from_bytes(server.recv(4), "big"))
"""
TORCHRUN = """#!/bin/sh
PYTHON_EXEC={python} exec {python} -m torch.distributed.run "$@"
"""


def serve(directory: Path) -> list[str]:
    """The arguments of a call; returns in a new process, with the folder and environment of it."""
    address = str(directory / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        torchrun = directory / "torchrun"
        torchrun.write_text(TORCHRUN.format(python=directory / "python"))
        torchrun.chmod(0o755)
        client = directory / "python"
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                break
            caller.close()
            while os.waitpid(-1, os.WNOHANG)[0]:  # at least this call has not ended
                pass
    head, files, *_ = socket.recv_fds(caller, 4, 4)
    call = caller.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    child = os.fork()
    if child:
        caller.send(child.to_bytes(4, "big"))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        caller.send((code if code >= 0 else 128 - code).to_bytes(4, "big"))
        os._exit(0)
    caller.detach()
    for number, file in enumerate(files):  # they are 3 or more, in rising order
        os.dup2(file, number)
    os.closerange(len(files), 64)
    argv, folder, environment = json.loads(call)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return argv


def run(argv: list[str]) -> None:
    """What python does with these arguments."""
    argv = [word for word in argv[:1] if word != "-u"] + argv[1:]
    if argv[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *argv[2:]], ""
        exec(argv[1], {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], os.getcwd()
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).absolute().parent)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    argv, code = serve(Path(sys.argv[1])), 0
    try:
        run(argv)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # taking down the imported modules would be half of the time
