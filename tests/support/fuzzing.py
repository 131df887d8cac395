"""What every fuzzer shares: seeds, processes under limits, and the counts of a run.

A fuzzer takes a `Campaign` from the fixture `campaign`, makes one hostile input from each of its `seeds`, and has
`Campaign.verb` run a verb of the command line on it, as a user does. By default a campaign has a fixed number of cases.

- `MISTRAL_LORA_FUZZ_SECONDS=3600` runs new cases for that time: `tox run -e fuzz` does. Fuzzers that call the package
  in this process, without a campaign, run for `SECONDS`.
- `MISTRAL_LORA_FUZZ_SEED=17` runs the one case that a failure names.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("MISTRAL_LORA_FUZZ_SECONDS", "1"))
"""The time of a fuzzer that is bounded by time and not by a number of cases."""
MIB = 1 << 20
PEAK = 1024
"""The most MiB that a verb may take beside the libraries and the size of its input."""
_LIMIT = 4 * PEAK  # of address space, so that no case takes the memory of the machine
_CODES = frozenset((0, 1, 2))
_PRELOADED = (
    "pytest_mistral_lora.cli",
    "pytest_mistral_lora.formats.sources",
    "pytest_mistral_lora.conformance.dataset.checks",
)


@dataclass(frozen=True)
class Outcome:
    """The end of one verb.

    Attributes:
        code: The exit code; negative for the signal that ended it.
        output: What it wrote to stdout and stderr.
        seconds: Its time on the clock.
        peak: The most MiB of it and of its processes, beside those of the libraries.
        hung: Whether it did not end in time.
    """

    code: int
    output: str
    seconds: float
    peak: float
    hung: bool


@dataclass
class Campaign:
    """One run of a fuzzer, and its counts.

    Attributes:
        name: The name of the fuzzer.
        cases: The number of its seeds by default.
    """

    name: str
    cases: int
    counts: dict[str, int] = field(default_factory=dict)
    peak: float = 0.0

    def seeds(self) -> Iterator[int]:
        """Yield the seed of each case."""
        one, seconds = os.environ.get("MISTRAL_LORA_FUZZ_SEED"), float(os.environ.get("MISTRAL_LORA_FUZZ_SECONDS", 0))
        if one is not None:
            yield int(one)
            return
        end, seed = time.monotonic() + seconds, 0
        while time.monotonic() < end if seconds else seed < self.cases:
            yield seed
            seed += 1

    def count(self, kind: str, number: int = 1) -> None:
        """Count cases of a kind."""
        self.counts[kind] = self.counts.get(kind, 0) + number

    def verb(
        self,
        seed: int,
        words: Sequence[object],
        folder: Path,
        *,
        seconds: float = 60.0,
        codes: frozenset[int] = _CODES,
        input_bytes: int = 0,
    ) -> Outcome:
        """Run a verb in a process of its own, and fail if it ends in a way that no input may end it.

        Args:
            seed: The seed of the case, for the message.
            words: The words after the program's name.
            folder: The working folder.
            seconds: The most seconds of a CPU.
            codes: The exit codes that are fine.
            input_bytes: The size of the input, which the memory may have beside.
        """
        found = run_verb(words, folder, seconds=seconds)
        self.peak = max(self.peak, found.peak)
        left = [path.name for path in folder.rglob("*.unfinished")]
        faults = {
            "hangs": found.hung,
            "tracebacks": "Traceback (most recent call last)" in found.output,
            "crashes": not found.hung and found.code not in codes,
            "unfinished files": bool(left),
            "peaks": found.peak > PEAK + input_bytes / MIB,
        }
        self.count("cases")
        self.count("refused", found.code == 2)
        for kind, is_so in faults.items():
            self.count(kind, is_so)
        named = [kind for kind, is_so in faults.items() if is_so]
        assert not named, (
            f"{self.name}, {', '.join(named)}: to repeat it, set MISTRAL_LORA_FUZZ_SEED={seed}\n"
            f"mistral-lora {' '.join(map(str, words))}\ncode {found.code}, {found.seconds:.1f} s, "
            f"{found.peak:.0f} MiB, {left}\n{found.output[-4000:]}"
        )
        return found

    def line(self) -> str:
        """Return the counts in words."""
        counts = {"cases": 0, "tracebacks": 0, "hangs": 0, **self.counts}
        shown = ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
        return f"fuzz: {self.name}: {shown}, peak {self.peak:,.0f} MiB"


MakeCampaign = Callable[[str, int], Campaign]
"""The fixture `campaign`."""


def run_verb(words: Sequence[object], folder: Path, *, seconds: float = 60.0) -> Outcome:
    """Run a verb of the command line in a copy of a process that has imported the package.

    Args:
        words: The words after the program's name.
        folder: The working folder.
        seconds: The most seconds of a CPU, after which it is killed; it may wait for four times as long.
    """
    server = _server()
    with tempfile.NamedTemporaryFile() as output:
        asked = {"words": [*map(str, words)], "folder": str(folder), "output": output.name, "seconds": seconds}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        text = Path(output.name).read_text(encoding="utf-8", errors="backslashreplace")
    return Outcome(output=text, **answer)


@functools.cache
def _server() -> Any:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)

    def end() -> None:
        server.communicate()

    atexit.register(end)
    return server


def _serve() -> None:
    for name in _PRELOADED:
        __import__(name)
    gc.freeze()
    base = _answer({"words": ["--version"], "folder": "/", "output": os.devnull, "seconds": 60}, 0.0)["peak"]
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(json.loads(line), base)) + "\n")
        sys.stdout.flush()


def _answer(asked: dict[str, Any], base: float) -> dict[str, Any]:
    start = time.monotonic()
    child = os.fork()
    if not child:
        _become(asked)
    handle = os.pidfd_open(child)
    # a machine that has more to do gives it a part of a CPU: the clock says nothing of the verb
    late = not select.select([handle], [], [], 5 * asked["seconds"])[0]
    os.close(handle)
    if late:
        os.kill(child, signal.SIGKILL)
        # the processes that it has started are of its group, unless it was killed before it had one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code,
        "seconds": time.monotonic() - start,
        "peak": max(0.0, usage.ru_maxrss / 1024 - base),  # of a verb that reads nothing, the noise of the libraries
        "hung": late or code == -signal.SIGXCPU,
    }


def _become(asked: dict[str, Any]) -> None:
    """Run the verb in this process, and end it."""
    import resource

    os.setsid()
    limit = math.ceil(asked["seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(asked["output"], os.O_WRONLY | os.O_APPEND), number)
    # new objects: the old ones have what the process before wrote, and read ahead
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    os.chdir(asked["folder"])
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _LIMIT * MIB, used + _LIMIT * MIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 1
    try:
        from pytest_mistral_lora.cli import main

        code = main(asked["words"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
