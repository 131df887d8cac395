"""The display of a long command on standard error: a bar on a terminal, plain lines in a pipe; imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self, TextIO

from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.escaping import UNMIXED, own_stream, printable
from pytest_mistral_lora.training.devices import is_main

_FRAMES_PER_SECOND = 2
"""Frames of the bar: each takes Python time from a step on a CPU."""
_SECONDS_BETWEEN_LINES = 5.0
"""Least seconds between two lines about the same work, without a bar."""


def clock_text(seconds: float) -> str:
    """Return a duration as `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class RunDisplay(AbstractContextManager["RunDisplay"]):
    """Prints the progress of a run, line by line, and draws a bar below the lines if the stream is a terminal.

    The bar is removed at the end of the block, whatever ends it.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a display.

        Args:
            stream: The terminal, pipe or file; None to show nothing.
            clock: Returns seconds.
        """
        self._stream, self._clock = stream, clock
        self._begin = self._last_line = clock()
        self._console: Any = None
        self._bar: Any = None
        if stream is not None and stream.isatty():
            from rich.console import Console

            self._console = Console(file=own_stream(stream), highlight=False, markup=False, emoji=False, soft_wrap=True)

    @classmethod
    def on_stderr(cls) -> Self:
        """Return a display on standard error; only the main process of a run shows anything."""
        return cls(sys.stderr if is_main() else None)

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_shown(self) -> bool:
        """Whether anything is shown."""
        return self._stream is not None

    @property
    def seconds(self) -> float:
        """Seconds since the display was made."""
        return self._clock() - self._begin

    def line(self, text: str, style: str = "") -> None:
        """Print a line; the style, one of rich's, is for terminals."""
        text, self._last_line = printable(text), self._clock()
        if self._console is not None:
            from rich.text import Text

            self._console.print(Text(text, style=style))
        elif self._stream is not None:
            self._stream.write(f"{text}\n")
            # readers of a pipe or a followed log file want each line when it is written
            self._stream.flush()

    def facts(self, facts: Mapping[str, str]) -> None:
        """Print a line for each fact: its name and its text."""
        for name, text in facts.items():
            if self._console is not None:
                from rich.text import Text

                self._console.print(Text.assemble((f"{name}: ", "bold"), printable(text)))
            else:
                self.line(f"{name}: {text}")

    def phase(self, text: str) -> None:
        """Print the current phase of the run, with the time; it stays beside the bar."""
        self.line(f"{clock_text(self.seconds)} {text}", "dim")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=printable(text, lines=False))

    def start_bar(self) -> None:
        """Draw a bar without a length, on a terminal that can redraw a line."""
        if self._console is None or self._console.is_dumb_terminal or self._bar is not None:
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), BarColumn(20), TextColumn("{task.description}", markup=False))
        # transient: the lines above remain, and hold everything that the last frame of the bar shows
        self._bar = Progress(
            *columns,
            console=self._console,
            transient=True,
            refresh_per_second=_FRAMES_PER_SECOND,
            expand=False,
            **UNMIXED,
        )
        self._bar.add_task("", total=None)
        self._bar.start()

    def advance(self, step: int, steps: int, text: str = "") -> None:
        """Move the bar to a step.

        Args:
            step: Finished steps.
            steps: Steps of the whole run.
            text: Text behind the step's number.
        """
        if self._bar is not None:
            description = printable(f"step {step}/{steps}{text and f', {text}'}", lines=False)
            # draw the last step immediately: a run of a few quick steps may show no other frame
            last = step == steps
            self._bar.update(self._bar.task_ids[0], total=steps, completed=step, description=description, refresh=last)

    def count(self, done: int, total: int, noun: str) -> None:
        """Show how much of the current phase is done: on the bar; without a bar, in a line every few seconds.

        Args:
            done: The number of finished things.
            total: The number of all of them.
            noun: The name of one of them.
        """
        text = f"{done:,} of {counted(total, noun)}"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], total=total, completed=done, description=text, refresh=done == total
            )
        else:
            self.meanwhile(text)

    def meanwhile(self, text: str) -> None:
        """Print a line about work that goes on, if the last line is some seconds old."""
        if self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self.phase(text)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
