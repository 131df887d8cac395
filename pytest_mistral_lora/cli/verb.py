"""The parts that verbs share: their parser, arguments that name paths and tokenizers, and JSON output."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pytest_mistral_lora.errors import InputError, PinError, one_line
from pytest_mistral_lora.escaping import printable, safe_json

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.objective import Objective

# argparse has no public name for the type that `add_subparsers` returns
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

PROGRAM = "mistral-lora"


_NARROWEST = 20
"""Columns that text is wrapped to at least: a terminal, or COLUMNS, can have one."""


def wrapped_text(text: str, title: str = "") -> str:
    """Return paragraphs, separated by blank lines, wrapped to the terminal's width, right of a title."""
    # leave two columns free, as argparse does; do not break a name such as --own-data
    width = max(_NARROWEST, shutil.get_terminal_size().columns) - (0 if title else 2)
    wrapper = textwrap.TextWrapper(
        width, initial_indent=title, subsequent_indent=" " * len(title), break_on_hyphens=False
    )
    return "\n\n".join(wrapper.fill(part) for part in text.split("\n\n"))


@dataclass
class Verb:
    """A verb of the command line.

    Attributes:
        name: The verb.
        summary: Its effect in one line, for the list of all verbs.
        add_options: Adds its options to its parser.
        run: Runs it with the parsed options and returns the exit code.
        description: Its effect, in paragraphs.
        examples: Whole command lines.
        failure: The reason of exit code 1, as the end of a sentence that begins with "The exit code is 1 if"; empty if
            the verb never returns 1.
        memory_advice: Advice for a user whose memory ran out.
        alias: A second name, which no list has; empty for none.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    description: str
    examples: Sequence[str]
    failure: str = ""
    memory_advice: str = ""
    alias: str = ""

    def add_parser(self, verbs: Verbs) -> None:
        """Add the parser of the verb to those of the program."""
        epilog = "\n".join([f"example{'s' * (len(self.examples) > 1)}:", *(f"  {line}" for line in self.examples)])
        epilog += "\n\n" + (wrapped_text(f"The exit code is 1 if {self.failure}.") + "\n" if self.failure else "")
        epilog += f"For all exit codes: {PROGRAM} --help"
        parser = verbs.add_parser(
            self.name,
            aliases=[self.alias] if self.alias else [],
            description=wrapped_text(self.description),
            epilog=epilog,
            # argparse's own formatter would join the lines of the examples
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # the parsed options carry their verb and parser, which saves a lookup by name
        parser.set_defaults(verb=self, parser=parser)
        self.add_options(parser)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="device of the models (default: auto)"
    )


def whole_number(text: str, least: int = 1) -> int:
    """Return a whole number.

    Args:
        text: Its digits.
        least: The smallest accepted number.

    Raises:
        argparse.ArgumentTypeError: If the text is not a whole number, is below `least`, or does not fit 64 bits.
    """
    if not text.isascii() or not text.isdecimal() or len(text) > 18 or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, {least} or more")
    return int(text)


@dataclass(frozen=True)
class PathArgument:
    """The type of an argument that may name a path: with it, a verb declares the paths that it reads and writes.

    Attributes:
        role: `read`; `written`, which must not be a path that is read; or `changed`, which is both.
        parse: Turns the word into a value: a path, or a text that may name one, as `NAME=PATH` does.
        beside: Returns the other file that is written with this file; None without another file.
        inside: Whether it may be in a folder that is read, because it belongs there.
    """

    role: Literal["read", "written", "changed"]
    parse: Callable[[str], Any] = Path
    beside: Callable[[Path], Path] | None = None
    inside: bool = False

    def __call__(self, text: str) -> Any:
        """Return the value of a word.

        Raises:
            argparse.ArgumentTypeError: If the word cannot be parsed; argparse would show this object for a ValueError.
        """
        try:
            return self.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(one_line(error)) from error


INPUT = PathArgument("read")
"""The type of a file or folder to read."""
NEW_FOLDER = PathArgument("written")
"""The type of a folder that a verb makes; the verb refuses an existing folder."""


def output_file(is_ours: Callable[[Path], bool] | None = None) -> Callable[[str], Path]:
    """Return the parser for a file that a verb writes at its end.

    It raises `argparse.ArgumentTypeError` if the file cannot be written, so that a long run does not fail at its end.

    Args:
        is_ours: Returns whether the same verb wrote an existing file, which it may then replace; None if the verb
            refuses existing files.
    """

    def parse(text: str) -> Path:
        from pytest_mistral_lora.records.files import require_writable

        try:
            return require_writable(Path(text), is_ours)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def refuse_clashes(args: argparse.Namespace) -> None:
    """Refuse a command line in which an output meets an input, whatever its verb.

    Raises:
        InputError: With the argument of the output.
    """
    from pytest_mistral_lora.conformance.path_kinds import paths_behind, paths_in
    from pytest_mistral_lora.records.files import refuse_input_as_output

    read: list[Path] = []
    written: dict[str, list[Path]] = {}
    inside: list[str] = []
    for action in args.parser._actions:  # argparse has no public name for its own arguments
        value, kind = getattr(args, action.dest, None), action.type
        if not isinstance(kind, PathArgument) or not value:
            continue
        values = value if isinstance(value, list) else [value]
        if kind.role == "read":
            read += [path for word in values for path in paths_in(str(word))]
        elif kind.role == "written":
            name = action.option_strings[0] if action.option_strings else action.metavar
            written[name] = values
            inside += [name] if kind.inside else []
            if kind.beside is not None:
                written[f"{name}, the page beside it"] = [kind.beside(path) for path in values]
    # only a command that writes opens its inputs for this
    if written:
        refuse_input_as_output(written, [path for path in read for path in paths_behind(path)], inside=inside)


def shown_path(path: Path | str) -> str:
    """Return a path, or a command with paths, for a line of text, with line ends in names escaped."""
    return printable(str(path), lines=False)


def add_tokenizer_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--tokenizer`, whose value `tokenizer_argument` reads."""
    parser.add_argument(
        "--tokenizer",
        required=required,
        type=PathArgument("read", tokenizer_argument),
        metavar="PATH",
        help="checkpoint folder, tekken.json, tokenizer.model.vN, the name of a tokenizer that mistral-common ships, "
        "such as spm-v3, a Hub repository at a commit, as OWNER/NAME@COMMIT, or a recipe, for that of its base",
    )


def add_objective_option(parser: argparse.ArgumentParser) -> None:
    """Add `--objective`, the words of a declared `Objective`; None if none is declared."""

    def objective(text: str) -> Objective:
        from pytest_mistral_lora.chat.objective import Objective

        try:
            return Objective.of(text, "--objective")
        except InputError as error:
            raise argparse.ArgumentTypeError(f"{error.found}; expected {error.expected}") from error

    parser.add_argument(
        "--objective",
        type=objective,
        metavar="WORDS",
        help="tokens that have a loss: answers (default), last-answer, last-round or everything, and no-thinking and "
        "no-calls, which take some away: last-answer,no-thinking",
    )


def refuse_objective(recipe: Path) -> None:
    """Refuse `--objective` beside a recipe.

    Raises:
        InputError: Always.
    """
    found = f"--objective is for data, and {recipe} is a recipe, which declares its own: training.objective"
    raise InputError(found, next_step="Leave --objective out.")


def add_oracle_option(parser: argparse.ArgumentParser) -> None:
    """Add `--oracle`, which accepts the name of a tokenizer that mistral-common ships, a path, or `none`."""

    def oracle_choice(text: str) -> str:
        from pytest_mistral_lora.checkpoint.recognition import known_choice
        from pytest_mistral_lora.errors import TokenizerError

        try:
            return known_choice(text)
        except TokenizerError as error:
            raise argparse.ArgumentTypeError(
                f"{str(error.place)!r}: {error.found}; expected {error.expected}"
            ) from error

    parser.add_argument(
        "--oracle",
        type=PathArgument("read", oracle_choice),
        metavar="NAME|PATH",
        help="Mistral tokenizer of a folder without tekken.json and tokenizer.model.vN: a name such as spm-v3, a path, "
        "or none (default: recognised by the vocabulary)",
    )


def print_json(data: Any, *, indented: bool = True, allow_nan: bool = True) -> None:
    """Print data as JSON, with readable text.

    Args:
        data: The data; a value without a JSON type, such as a path, is printed as text.
        indented: Whether to indent it for people, instead of printing one line.
        allow_nan: Whether to print NaN and infinity, which strict parsers of JSON refuse.

    Raises:
        ValueError: If a number is NaN or infinite and `allow_nan` is false.
    """
    sys.stdout.write(f"{safe_json(data, indent=2 if indented else None, allow_nan=allow_nan)}\n")


def tokenizer_argument(text: str) -> Path:
    """Return the tokenizer that a word of the command line names, as `tokenizer_path` does.

    Raises:
        argparse.ArgumentTypeError: If the files of a repository cannot be found or fetched.
    """
    from pytest_mistral_lora.conformance.named_tokenizer import tokenizer_path

    try:
        return tokenizer_path(text)
    except PinError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def name_of(path: Path) -> str:
    """Return the name of a tokenizer for people: a shipped name, a repository with its commit, or the path."""
    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
    from pytest_mistral_lora.checkpoint.hub_cache import snapshot_of

    if (snapshot := snapshot_of(path)) is not None:
        return "@".join(snapshot)
    return next((name for name in SHIPPED if shipped_tokenizer(name) == path), str(path))
