"""The parts that verbs share: their parser, the option `--tokenizer`, and JSON output."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_mistral_lora.cli.named_tokenizers import tokenizer_path

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_mistral_lora.conformance.groups import FindingGroups
    from pytest_mistral_lora.report.judged import JudgedCase

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
        choices=("text", "json", "github", "junit", "sarif"),
        default="text",
        help="github prints annotations and adds to the job's summary, junit prints a test file for any CI system, "
        "sarif a log for code scanning (default: text)",
    )
    parser.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="output_format",
        help="print JSON instead of text, as --output-format json",
    )


def print_line(text: str) -> None:
    """Print a line to standard output, at once: another stream may follow."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_judged(
    output_format: str,
    command: str,
    causes: FindingGroups,
    cases: Sequence[JudgedCase],
    verdict: str,
    subject: Path | str = "",
) -> None:
    """Print a verdict for another machine: `github`, `junit` or `sarif`.

    Args:
        output_format: The format.
        command: The verb.
        causes: The findings by cause.
        cases: All that was judged.
        verdict: The last line of the same verdict as text.
        subject: The file or folder that was judged.
    """
    from pytest_mistral_lora.conformance.groups import FILE_WIDTH
    from pytest_mistral_lora.report.judged import Judged

    found = [{**cause.to_json(), "text": cause.text(FILE_WIDTH)} for cause in causes]
    judged = Judged(f"{PROGRAM} {command}", found, cases, verdict, str(subject))
    if output_format == "sarif":
        from pytest_mistral_lora.report.code_scanning import sarif_data

        print_json(sarif_data(judged))
    elif output_format == "junit":
        from pytest_mistral_lora.report.junit import junit_text

        sys.stdout.write(junit_text(judged))
    else:
        from pytest_mistral_lora.report.github import add_job_summary, annotation_lines

        sys.stdout.write("".join(f"{line}\n" for line in (*annotation_lines(found), verdict)))
        add_job_summary(judged)


def add_tokenizer_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--tokenizer`, whose value `tokenizer_path` reads."""
    parser.add_argument(
        "--tokenizer",
        required=required,
        type=tokenizer_path,
        metavar="PATH",
        help="checkpoint folder, tekken.json, tokenizer.model.vN, the name of a tokenizer that mistral-common ships, "
        "such as spm-v3, or a Hub repository at a commit, as OWNER/NAME@COMMIT",
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
