"""The parts that verbs share: their parser, the option `--tokenizer`, and JSON output."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

# argparse has no public name for the type that `add_subparsers` returns
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

PROGRAM = "mistral-lora"


def wrapped_text(text: str) -> str:
    """Return paragraphs, which blank lines separate, wrapped to the terminal's width as argparse wraps them."""
    # argparse leaves two columns free, and so do we; a name such as --own-data must not be broken
    wrapper = textwrap.TextWrapper(shutil.get_terminal_size().columns - 2, break_on_hyphens=False)
    return "\n\n".join(wrapper.fill(part) for part in text.split("\n\n"))


def add_verb(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    description: str,
    examples: Sequence[str],
    failure: str = "",
    memory_advice: str = "",
) -> argparse.ArgumentParser:
    """Add the parser of a verb.

    Args:
        verbs: The subparsers of the program.
        name: The verb.
        run: Runs it with the parsed options and returns the exit code.
        description: Its effect, in paragraphs.
        examples: Whole command lines.
        failure: The reason of exit code 1, as the end of a sentence that begins with "The exit code is 1 if"; empty if
            it never is.
        memory_advice: Sentences for a reader whose memory has run out.
    """
    epilog = "\n".join(["examples:" if len(examples) > 1 else "example:", *(f"  {line}" for line in examples)])
    epilog += "\n\n" + (wrapped_text(f"The exit code is 1 if {failure}.") + "\n" if failure else "")
    epilog += f"For all exit codes: {PROGRAM} --help"
    parser = verbs.add_parser(
        name,
        description=wrapped_text(description),
        epilog=epilog,
        # argparse's own formatter would join the lines of the examples
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # the parsed options carry their verb's function and parser, so that nobody has to look them up by name
    parser.set_defaults(run=run, parser=parser, memory_advice=memory_advice)
    return parser


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Add `--output-format` to a verb that judges, and `--json` as its short form."""
    parser.add_argument(
        "--output-format",
        choices=("text", "json", "github", "sarif"),
        default="text",
        help="github prints annotations of a workflow, sarif a log for code scanning (default: text)",
    )
    parser.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="output_format",
        help="print JSON instead of text, as --output-format json",
    )


def print_findings(causes: Sequence[Mapping[str, Any]], output_format: str) -> None:
    """Print findings by cause as annotations of GitHub (`github`) or as SARIF (`sarif`)."""
    from pytest_mistral_lora.report.code_scanning import github_lines, sarif_data

    if output_format == "sarif":
        print_json(sarif_data(causes))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in github_lines(causes)))


def add_tokenizer_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--tokenizer`, which accepts a path or the name of a tokenizer that mistral-common ships."""

    def tokenizer_path(text: str) -> Path:
        path = Path(text)
        # a path first: a folder named spm-v3 is the user's own tokenizer, and a path costs no import
        if path.exists():
            return path
        from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer

        return shipped_tokenizer(text) if text in SHIPPED else path

    parser.add_argument(
        "--tokenizer",
        required=required,
        type=tokenizer_path,
        metavar="PATH",
        help="checkpoint folder, tekken.json, tokenizer.model.vN, or the name of a tokenizer that mistral-common "
        "ships, such as spm-v3",
    )


def add_oracle_option(parser: argparse.ArgumentParser) -> None:
    """Add `--oracle`, which accepts the name of a tokenizer that mistral-common ships, a path, or `none`."""

    def oracle_choice(text: str) -> str:
        from pytest_mistral_lora.checkpoint.recognition import known_choice
        from pytest_mistral_lora.errors import TokenizerError

        try:
            return known_choice(text)
        except TokenizerError as error:
            raise argparse.ArgumentTypeError(f"{error.place!r}: {error.found}; expected {error.expected}") from error

    parser.add_argument(
        "--oracle",
        type=oracle_choice,
        metavar="NAME|PATH",
        help="Mistral tokenizer of a folder without tekken.json and tokenizer.model.vN: a name such as spm-v3, a path, "
        "or none (default: recognised by the vocabulary)",
    )


def print_json(data: Any, *, allow_nan: bool = True) -> None:
    """Print data as indented JSON, in which text stays readable.

    Args:
        data: The data; a value that JSON has no type for, such as a path, is printed as its text.
        allow_nan: Whether NaN and infinity are printed, which strict parsers of JSON refuse.

    Raises:
        ValueError: If a number is NaN or infinite, and that is not allowed.
    """
    text = json.dumps(data, ensure_ascii=False, indent=2, default=str, allow_nan=allow_nan)
    sys.stdout.write(f"{text}\n")
