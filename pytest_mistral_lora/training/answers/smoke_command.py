"""The command line of `mistral-lora smoke`: an adapter in a new process, as it is used after training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError, MistralLoraError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.format_checks import FormatCheck
    from pytest_mistral_lora.training.answers.golden import Comparison
    from pytest_mistral_lora.training.answers.judging import Judgement

_DESCRIPTION = """\
Load base and adapter, or a merged model, afresh, and answer prompts greedily, encoded as in training. With golden
transcripts (those of the run, or --golden), say of each whether the answer is the recorded one: exact (the same
tokens), equivalent (another token only where the recorded choice was a near tie, and the recorded answer as likely as
it was), or different. With --rows alone, print the last answer of each row."""
_EXITS = "Exit codes: 0 as recorded, 1 an answer is different, 2 bad usage or bad input, 3 out of memory."


def main(arguments: Sequence[str] | None = None, *, prog: str = f"python -m {__spec__.name}") -> int:
    """Run the command line; returns the exit code."""
    parser = _parser(prog)
    given = parser.parse_args(arguments)
    if given.golden and given.rows:
        parser.error("--golden brings its own rows: give --golden or --rows")
    if given.record and not given.rows and not given.update:
        parser.error("--record needs --rows ROWS.jsonl, the conversations to answer, or --update")
    if given.update and (given.rows or given.check or not given.record):
        parser.error("--update asks the questions of --record FOLDER again: give it, and neither --rows nor --check")
    try:
        return _run(given)
    except (MistralLoraError, KeyboardInterrupt, MemoryError) as error:
        from pytest_mistral_lora.training.recovery.failure import exit_code

        sys.stderr.write(f"error: {error or 'interrupted'}\n")
        return exit_code(error)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION, epilog=_EXITS)
    parser.add_argument("adapter", type=Path, metavar="DIR", help="adapter folder, or a merged model's")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="base folder of an adapter (default: the one that DIR names)"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--golden", type=Path, metavar="FOLDER", help="transcripts to compare with (default: DIR/transcripts)"
    )
    target.add_argument("--record", type=Path, metavar="FOLDER", help="record the answers to --rows as transcripts")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="chat JSONL file: the last turn of each row is asked")
    parser.add_argument(
        "--check",
        action="append",
        default=[],
        metavar="CHECK",
        help="with --record, a form to hold each answer to (repeatable): json, tool_call, eos, json_schema=FILE, "
        "regex=PATTERN, max_tokens=N",
    )
    parser.add_argument(
        "--update", action="store_true", help="with --record, ask what its transcripts ask, and write over them"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the model runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _run(given: argparse.Namespace) -> int:
    if given.update:
        return _update(given)
    if given.record:
        return _record(given)
    return _answer(given) if given.rows else _compare(given)


def _compare(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.training.answers.golden import compare

    comparison = compare(given.adapter, given.golden, given.base, device=given.device)
    _write(given, comparison.to_json(), comparison_text(comparison))
    return EXIT_OK if comparison.passed else EXIT_FINDING


def comparison_text(comparison: Comparison) -> str:
    """Return a comparison for a terminal: a line for each transcript, and what is different below it."""
    lines = [line for one in comparison.judgements for line in _lines(one)]
    tiers = ", ".join(f"{count} {tier}" for tier, count in comparison.tiers.items())
    lines.append(f"{tiers}; {comparison.precision} on {comparison.device}")
    if not comparison.recorded_adapter:
        what = {"adapter": "adapter", "merged": "model than this merged one"}[comparison.kind]
        lines.append(f"The transcripts were recorded with another {what}.")
    return "\n".join(lines)


def _lines(one: Judgement) -> list[str]:
    from pytest_mistral_lora.training.answers.judging import difference_text

    lines = [f"{one.tier:<10}  {one.case}"]
    if one.difference is not None:
        lines += [f"  {line}" for line in difference_text(one)]
        lines += [f"  recorded: {one.golden_text!r}", f"  found:    {one.text!r}"]
    return lines + [f"  {check.name} failed: {check.reason}" for check in one.broken_checks]


def _record(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.chat.rows import read_rows
    from pytest_mistral_lora.training.answers.golden import record_rows

    files = record_rows(
        given.adapter,
        list(read_rows(given.rows)),
        given.record,
        given.base,
        max_new_tokens=given.max_new_tokens,
        checks=_checks(given.check),
        device=given.device,
    )
    _write(given, {"recorded": [str(file) for file in files]}, "\n".join(f"recorded {file}" for file in files))
    return EXIT_OK


def _update(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.training.answers.recording import record_again

    written = record_again(given.adapter, given.record, given.base, device=given.device)
    data = {str(file): state for file, state in written.items()}
    _write(given, {"written": data}, "\n".join(f"{state} {file}" for file, state in data.items()))
    return EXIT_OK


def _checks(words: Sequence[str]) -> tuple[FormatCheck, ...]:
    from pydantic import ValidationError

    from pytest_mistral_lora.training.recipe import Evaluation

    written = [
        {name: int(value) if value.isdecimal() and name == "max_tokens" else value} if value else name
        for name, _, value in (word.partition("=") for word in words)
    ]
    try:
        return Evaluation.model_validate({"generations": 1, "checks": written}).format_checks()
    except ValidationError as error:
        raise InputError(str(error.errors()[0]["msg"]), place="--check " + " ".join(words)) from error


def _answer(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.chat.rows import read_rows
    from pytest_mistral_lora.training.answers.golden import Adapted
    from pytest_mistral_lora.training.answers.smoke import smoke

    adapted = Adapted.find(given.adapter, given.base, device=given.device)
    rows = list(read_rows(given.rows))
    result = smoke(
        given.adapter, adapted.base, rows, max_new_tokens=given.max_new_tokens, device=adapted.device
    )  # fmt: skip
    lines = []
    for one in result["completions"]:
        verdict = "as in the row" if one["equal"] else "not as in the row"
        lines.append(f"row {one['row']}: {one['text']!r} (stopped by {one['stop']}, {verdict})")
    _write(given, result, "\n".join(lines))
    return EXIT_OK


def _write(given: argparse.Namespace, data: Any, text: str) -> None:
    shown = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) if given.json else text
    sys.stdout.write(f"{shown}\n")


if __name__ == "__main__":
    sys.exit(main())
