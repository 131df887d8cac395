"""A server of somebody else in a process of its own, until the end of a block."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def started(command: Sequence[str], url: str, path: str, seconds: int, **options: Any) -> Iterator[str]:
    """Start a command, wait until the server answers at a path, and yield its address.

    Args:
        command: The words of the command.
        url: The address that it is to listen at.
        path: A path that answers once the server is ready.
        seconds: Longest wait.
        options: Those of `subprocess.Popen`.
    """
    # a group of its own: an engine of vLLM outlives the server that started it
    process = subprocess.Popen(list(command), start_new_session=True, **options)
    try:
        for _ in range(seconds):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            try:
                urllib.request.urlopen(f"{url}{path}", timeout=5).close()
            except urllib.error.HTTPError as error:
                # 503 is that of a server that loads its model; any other is an answer to look at
                if error.code != 503:
                    raise AssertionError(f"{url}{path}: HTTP {error.code}") from error
                time.sleep(1)
            except OSError:
                time.sleep(1)
            else:
                break
        else:
            raise AssertionError(f"no answer at {url}{path} in {seconds} s")
        yield url
    finally:
        for kill, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, 30)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, kill)
                process.wait(timeout=patience)
