"""Run code in a copy of this process, as a worker of a loader runs: nothing that it changes is changed here.

The copy is forked. It has its own memory and, on Linux, its own offsets in open files. `shared_with_copy` finds what it
shares with this process all the same.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.errors import one_line

_PATIENCE = 60.0
"""Seconds to wait for an item of the copy: a lock that another thread held at the fork is never released in it."""

_OPEN_FILES = Path("/proc/self/fd")


class NoCopyError(Exception):
    """Code that could not run in a copy of this process.

    Attributes:
        reason: Why not, for people.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def run_in_copy(produce: Callable[[], Iterator[Any]]) -> list[Any]:
    """Return what a generator yields in a copy of this process.

    Args:
        produce: Makes the generator, whose items can be pickled. It begins with the random states of this process.

    Raises:
        NoCopyError: If there is no copy, or it ends early or waits too long.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise NoCopyError("this system cannot fork a process")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    state = random.getstate()
    copy = context.Process(target=_serve, args=(produce, sender, receiver, state), name="mistral-guard")
    try:
        with warnings.catch_warnings():
            # Python and JAX warn of a fork beside threads; a copy that waits for one of them is ended
            warnings.simplefilter("ignore")
            copy.start()
    except (OSError, AssertionError) as error:  # no memory for it; or this process is a daemon, which has no children
        sender.close()
        receiver.close()
        raise NoCopyError(f"no process can be forked: {one_line(error)}") from error
    sender.close()
    try:
        return list(_received(receiver))
    except EOFError:
        copy.join(_PATIENCE)
        raise NoCopyError(f"the reading process ended early, with exit code {copy.exitcode}") from None
    finally:
        receiver.close()
        copy.kill()
        copy.join()
        with suppress(ValueError):  # if SIGCHLD is ignored, its end is not known
            copy.close()


def _received(receiver: Connection) -> Iterator[Any]:
    while True:
        if not receiver.poll(_PATIENCE):
            raise NoCopyError(f"the reading process gave nothing for {_PATIENCE:.0f} s")
        kind, value = pickle.loads(receiver.recv_bytes())
        if kind == "end":
            return
        if kind == "error":
            raise NoCopyError(f"the reading process ended with {value}")
        yield value


def _serve(produce: Callable[[], Iterator[Any]], sender: Connection, receiver: Connection, state: Any) -> None:
    """Send the items, in the copy. It ends here: no exit handler of the run is called, and no buffer is written."""
    try:
        receiver.close()
        _settle(state)
        for item in produce():
            sender.send_bytes(pickle.dumps(("item", item)))
        sender.send_bytes(pickle.dumps(("end", None)))
    except BaseException as error:
        with suppress(BaseException):
            text = f"{type(error).__name__}: {one_line(error)}"
            sender.send_bytes(pickle.dumps(("error", text)))
    finally:
        os._exit(0)


def _settle(state: Any) -> None:
    """Make the copy silent, single-threaded and independent of the files of the run."""
    silent = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(silent, output)
    _own_offsets()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the copy
    torch.set_num_threads(1)
    random.setstate(state)  # Python seeds it anew after a fork


def _own_offsets() -> None:
    """Open each file of this process anew for reading: a forked process shares the offsets."""
    if sys.platform != "linux":
        return
    import fcntl  # of POSIX alone

    for link in list(_OPEN_FILES.iterdir()):
        number = int(link.name)
        with suppress(OSError):
            flags = fcntl.fcntl(number, fcntl.F_GETFL)
            is_read = flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)
            if not (is_read and stat.S_ISREG(os.fstat(number).st_mode)):
                continue
            offset = os.lseek(number, 0, os.SEEK_CUR)
            again = os.open(link, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))
            os.lseek(again, offset, os.SEEK_SET)
            os.dup2(again, number, inheritable=os.get_inheritable(number))
            os.close(again)
