"""The command line `mistral-lora VERB ...`: one parser, one table of verbs, one of exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn
from urllib.parse import urlsplit

from pytest_mistral_lora import __version__
from pytest_mistral_lora.cli import (
    chat,
    check,
    compare,
    doctor,
    manifests,
    merge,
    other_trainers,
    render,
    rows,
    rules,
    serve_check,
    smoke,
    start,
    train,
)
from pytest_mistral_lora.cli.verb import PROGRAM, Verb, refuse_clashes, shown_path, wrapped_text
from pytest_mistral_lora.errors import (
    EXIT_BAD_INPUT,
    EXIT_FINDING,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OUT_OF_MEMORY,
    EXIT_TERMINATED,
    InputError,
    MistralLoraError,
    Terminated,
    did_you_mean,
    disk_fault,
    exit_code_of,
    interruption,
    is_disk_fault,
    is_out_of_memory,
    is_raised_here,
)
from pytest_mistral_lora.escaping import safe_streams
from pytest_mistral_lora.extras import is_installed, missing_extra

__all__ = ["EXIT_CODES", "VERBS", "main"]

# The modules of the verbs import torch and other slow libraries in their functions, not at the top: `mistral-lora
# --help`, a misspelt option or a wrong key in a recipe is then answered quickly.
_GROUPS = {
    "in the order of a day": (
        start.INIT,
        rows.IMPORT,
        rows.STATS,
        check.VERB,
        render.VERB,
        train.VERB,
        manifests.VERIFY,
        smoke.VERB,
        chat.VERB,
        merge.VERB,
        other_trainers.EXPORT,
        serve_check.VERB,
    ),
    "more": (
        doctor.VERB,
        start.PIN,
        rules.VERB,
        compare.VERB,
        manifests.DIFF,
        manifests.NOTE,
        other_trainers.TEMPLATE,
        other_trainers.RUNNER,
    ),
}

VERBS: dict[str, dict[str, Verb]] = {group: {verb.name: verb for verb in verbs} for group, verbs in _GROUPS.items()}
"""Every verb by its name, in the groups and the order of `mistral-lora --help`."""

EXIT_CODES = {
    EXIT_OK: "no finding, no difference, no failure",
    EXIT_FINDING: "a finding, a difference or a failed run",
    EXIT_BAD_INPUT: "bad usage or bad input",
    EXIT_OUT_OF_MEMORY: "out of memory, on a GPU or on the host",
    EXIT_INTERRUPTED: "interrupted (Ctrl-C)",
    EXIT_TERMINATED: "terminated (SIGTERM)",
}
"""The exit codes of every verb."""

_DESCRIPTION = """\
Check Mistral fine-tunes against Mistral's own tokenization, train LoRA adapters, and verify and merge them. To try it,
offline: mistral-lora init --demo. For the options and examples of a verb: mistral-lora VERB --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: The words after the program's name; None for this process's own.

    Returns:
        The exit code, a key of `EXIT_CODES`.

    Raises:
        SystemExit: If the words cannot be parsed (code 2), or ask for help or the version (code 0).
    """
    _open_streams()
    try:
        with safe_streams():
            try:
                return _run_verb(list(sys.argv[1:] if arguments is None else arguments))
            finally:
                sys.stdout.flush()  # at exit it is too late: Python itself would report a closed pipe
    except OSError as error:
        if error.filename or not (error.errno == errno.EPIPE or is_disk_fault(error)):
            raise
        if not is_raised_here(error):
            sys.stderr.write(f"error: a file that a library writes: {error.strerror}\n")
            return EXIT_FINDING
        # The reader of the output has gone, as `head` does, or the disk is full. The verdict is lost, so this is not a
        # success. The rest goes to /dev/null, or Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            sys.stderr.write(f"error: standard output: {error.strerror}\n")
        return EXIT_FINDING


def _open_streams() -> None:
    """Make both streams accept every text: a locale or a closed stream must not lose a verdict."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(io.FileIO(os.devnull, "w")), encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _run_verb(words: list[str]) -> int:
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_BAD_INPUT
    if not sys.stderr.isatty():
        # bars of transformers and the Hub redraw a line, and a log file keeps each; read on their first import
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not is_installed("torch"):
        # else transformers warns everybody who checks a tokenizer that no models are available
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # pydantic looks for plugins in the metadata of every package, and one damaged file ends its import
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    advice = ""
    try:
        _require_endpoint()
        # parsing may take long: it fetches the files of `--tokenizer OWNER/NAME@COMMIT`
        with _sigterm_as_exception():
            args = _parsed(parser, words)
            args.words, advice = words, args.verb.memory_advice
            refuse_clashes(args)
            try:
                return int(args.verb.run(args))
            except SystemExit as ended:  # of foreign code: the verbs return a code
                if ended.code not in (None, 0):
                    raise
                raise InputError("code that this command called ended it, by sys.exit(0)") from ended
    except (Exception, KeyboardInterrupt) as caught:  # SystemExit keeps its own code
        error = interruption(caught) or missing_extra(caught) or caught
        message = _error_message(error, advice)
        if not message:
            raise
        sys.stderr.write(f"error: {message}\n")
        return exit_code_of(error)


def _require_endpoint() -> None:
    """Refuse an address of the Hub that its library cannot parse, which would fail in any import of transformers.

    Raises:
        InputError: If `HF_ENDPOINT` is not an address.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(endpoint).port
    except ValueError as error:
        expected = "an address such as https://huggingface.co"
        raise InputError(f"{endpoint!r} is not an address: {error}", place="HF_ENDPOINT", expected=expected) from error


_NO_VERBS = {
    "gate": ": a gate is the key evaluation.gate of a recipe, and mistral-lora train asks it",
}
"""What to run in place of a word that is no verb, though documents have it."""


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse words; an unknown verb or option is refused with the most similar one."""
    names = [name for verbs in VERBS.values() for name in verbs]
    known = [*names, *(verb.alias for verbs in VERBS.values() for verb in verbs.values() if verb.alias)]
    if any("\0" in word for word in words):
        parser.error("a word with a null character, which no name of a file has")
    if without := next((word for word in words if re.fullmatch(r"--[a-z][\w-]*=--", word)), None):
        # argparse takes `--` for the end of the options, also as a value, and returns an empty list instead of a text
        parser.error(f"{without}: expected a value")
    words = _verb_first(words, known)
    # argparse has suggestions only from Python 3.14 on; before, it prints all choices
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in known:
        hint = did_you_mean(first, names) or _NO_VERBS.get(first, f": choose one of {', '.join(names)}")
        parser.error(f"unknown verb {first!r}{hint}")
    args, unknown = parser.parse_known_args(words)
    if unknown:
        options = re.findall(r"--[a-z][\w-]*", args.parser.format_usage())
        name = unknown[0].partition("=")[0]
        hint = did_you_mean(name, options) if name.startswith("-") else ""
        args.parser.error(f"unrecognized arguments: {shown_path(' '.join(unknown))}{hint}")
    return args


def _verb_first(words: list[str], names: Sequence[str]) -> list[str]:
    """Return the words with the options before a verb behind it: `--json check rows.jsonl` as `check --json …`."""
    if not words or not words[0].startswith("-") or words[0] in ("-h", "--help", "--version"):
        return words
    at = next((number for number, word in enumerate(words) if word in names), 0)
    return [words[at], *words[:at], *words[at + 1 :]] if at else words


class _Parser(argparse.ArgumentParser):
    """A parser that names the error first: the usage of some verbs is longer than a terminal."""

    def error(self, message: str) -> NoReturn:
        """Print an error and the usage, and exit with code 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n\n")
        self.print_usage(sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    sections = [wrapped_text(_DESCRIPTION)]
    width = max(len(name) for verbs in VERBS.values() for name in verbs) + 1
    for group, verbs in VERBS.items():
        lines = [wrapped_text(verb.summary, f"  {name:<{width}}") for name, verb in verbs.items()]
        sections.append("\n".join([f"{group}:", *lines]))
    codes = "\n".join(["exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())])
    parser: argparse.ArgumentParser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [-h] [--version] VERB ...",
        description="\n\n".join(sections),
        epilog=codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pytest-mistral-lora {__version__}")
    # argparse can only list all verbs at once, without groups: the description lists them, and argparse does not
    subparsers = parser.add_subparsers(prog=PROGRAM, metavar="VERB", required=True, help=argparse.SUPPRESS)
    for verbs in VERBS.values():
        for verb in verbs.values():
            verb.add_parser(subparsers)
    return parser


def _error_message(error: BaseException, memory_advice: str) -> str:
    """Return the message for an error; empty for a fault of this program, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or ("terminated" if isinstance(error, Terminated) else "interrupted")
    # before the check for memory: a message of ours may quote torch's
    if isinstance(error, MistralLoraError):
        return str(error)
    if reason := disk_fault(error):
        return reason
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename!r}"
    if is_out_of_memory(error):
        reason = f": {error}" if str(error) else ""
        return f"out of memory{reason}" + (f"\n{memory_advice}" if memory_advice else "")
    return ""


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, so that temporary folders and child processes are cleaned up.

    Handlers that others have set stay, and Python runs handlers only in the main thread.
    """
    process = os.getpid()

    def raise_terminated(number: int, frame: object) -> None:
        # a forked child inherits the handler, and must still end without a traceback
        if os.getpid() != process:
            os._exit(EXIT_TERMINATED)
        raise Terminated

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
