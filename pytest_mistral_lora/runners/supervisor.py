"""Start a command, adopt every process that it leaves, and end them all: a program of the standard library alone.

    python -I -S supervisor.py STATUS HOLD BYTES COMMAND...

A group of processes is not all of a command's: a daemon begins a session of its own. On Linux, orphans become children
of this process, so that none is out of reach. The pipe STATUS gets the line `pid N` of the command, and then `error N`
with the number of the error that starting it raised, or `code N`. When the pipe HOLD ends or has a byte, also because
the process at its other end was killed, everything below this process is ended, and it ends itself.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

_ADOPT_ORPHANS = 36
"""PR_SET_CHILD_SUBREAPER of Linux's `prctl`."""
_ROUNDS = 500
_SPARE_TASKS = 2048
"""Processes and threads that the user may have beside those that run already; those of root are not limited."""


def processes() -> dict[int, tuple[int, int, str]]:
    """Return parent, group and state of each process of the system; empty if it does not show them."""
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():  # noqa: PTH208, PTH112
        if name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    # the name of the command may hold spaces and brackets
                    state, parent, group = file.read().rpartition(b")")[2].split()[:3]
                found[int(name)] = int(parent), int(group), state.decode()
    return found


def descendants(root: int) -> dict[int, int]:
    """Return the group of each living process below a process, by its id."""
    table = processes()
    children: dict[int, list[int]] = {}
    for process, (parent, _, _) in table.items():
        children.setdefault(parent, []).append(process)
    found: dict[int, int] = {}
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        waiting += below
        found.update({process: table[process][1] for process in below if table[process][2] not in "ZX"})
    return found


def end_all(find: Callable[[], dict[int, int]]) -> None:
    """End processes until none is found.

    Args:
        find: Returns the group of each process that is left, by its id.
    """
    stopped: set[int] = set()
    for _ in range(_ROUNDS):
        found = find()
        if not found:
            return
        if new := found.keys() - stopped:
            # first stopped, so that none starts another one while the next is ended
            _signal(new, signal.SIGSTOP)
            stopped |= new
            continue
        # a whole group at once, also of those that were started meanwhile
        for group in {*found.values()} - {os.getpgid(0)}:
            with suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        _signal(found, signal.SIGKILL)
        stopped.clear()
        time.sleep(0.01)


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with suppress(OSError):
            os.kill(process, number)


def _start(command: list[str], status: int, most_bytes: int, is_counted: bool) -> int:
    """Start the command under limits, in a session of its own, and return its id."""
    import resource

    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        # handlers of this process end with it, but what it ignores would stay ignored
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit(resource.RLIMIT_FSIZE, most_bytes)
        if is_counted:
            _limit(resource.RLIMIT_NPROC, _own_tasks() + _SPARE_TASKS)
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(status, b"error %d\n" % (error.errno or 0))
    finally:
        os._exit(127)
    return 0


def _limit(kind: int, most: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    value = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (value, value))


def _own_tasks() -> int:
    """Return how many processes and threads this user has."""
    found = 0
    for process in processes():
        with suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == os.getuid():  # noqa: PTH116
                found += len(os.listdir(f"/proc/{process}/task"))  # noqa: PTH208
    return found


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)


def main(words: list[str]) -> None:
    """Run the command until it ends and its starter has seen it."""
    status, hold, most_bytes = map(int, words[:3])
    for handle in (status, hold):
        os.set_inheritable(handle, False)
    _adopt_orphans()
    awake, wake = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    command = _start(words[3:], status, most_bytes, sys.platform == "linux" and os.getuid() != 0)
    os.write(status, b"pid %d\n" % command)
    while not select.select([hold], [], [], 0)[0]:
        with suppress(ChildProcessError):
            while True:
                process, code = os.waitpid(-1, os.WNOHANG)
                if not process:
                    break
                if process == command:
                    os.write(status, b"code %d\n" % os.waitstatus_to_exitcode(code))
        select.select([hold, awake], [], [])
        with suppress(BlockingIOError):
            os.read(awake, 4096)
    with suppress(OSError):
        # without /proc, the group is all that can be found
        os.killpg(command, signal.SIGKILL)
    end_all(lambda: descendants(os.getpid()))


if __name__ == "__main__":
    main(sys.argv[1:])
