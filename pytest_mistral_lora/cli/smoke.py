"""`mistral-lora smoke`: the answers of a saved adapter or merged model, in a new process."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.cli.judging import add_format_option, judged_by, print_verdict
from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_device_option,
    print_json,
    shown_path,
    whole_number,
)
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.completions import FormatCheck
    from pytest_mistral_lora.report.judged import Outcome
    from pytest_mistral_lora.training.display import RunDisplay
    from pytest_mistral_lora.training.generate.judge import TranscriptComparison

_DESCRIPTION = """\
Load base and adapter, or a merged model, and answer prompts greedily, encoded as in training.

With transcripts (those of the run, or --golden), compare each answer with the recorded one. It is exact (the same
tokens), equivalent (another token only at a near tie, and the recorded answer is as likely as it was), or different.
With --rows alone, print the answer to each row, which is not judged: the exit code is 0 whatever it is. A row may end
with its question; an answer to compare with is then missing, and the row is not checked."""

_PRINTED = ("text", "json")
"""The formats of answers that are only printed."""

_MEMORY_ADVICE = "Use the memory of the host with --device cpu, or shorter answers with --max-new-tokens."


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=INPUT, metavar="DIR", help="folder of an adapter or of a merged model")
    parser.add_argument(
        "--base", type=INPUT, metavar="DIR", help="base folder of an adapter (default: the base that the adapter names)"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--golden", type=INPUT, metavar="FOLDER", help="transcripts to compare with (default: DIR/transcripts)"
    )
    target.add_argument(
        "--record",
        # an adapter's transcripts are in its folder
        type=PathArgument("written", inside=True),
        metavar="FOLDER",
        help="record the answers to --rows as transcripts",
    )
    parser.add_argument(
        "--rows",
        type=INPUT,
        metavar="FILE",
        help="chat JSONL file; the model answers the last turn of each row, which may be missing",
    )
    parser.add_argument(
        "--check",
        type=PathArgument("read", str),
        action="append",
        default=[],
        metavar="CHECK",
        help="with --record, a format that each answer must have (repeatable): json, tool_call, eos, json_schema=FILE, "
        "regex=PATTERN, max_tokens=N",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="with --record, answer the prompts of its transcripts again, and rewrite them",
    )
    parser.add_argument(
        "--max-new-tokens", type=whole_number, default=256, metavar="N", help="longest answer, in tokens (default: 256)"
    )
    add_device_option(parser)
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, record or print answers; return 1 if a compared answer is different.

    Raises:
        InputError: If options contradict each other, or a file cannot be used.
    """
    # argparse can make options exclusive, but cannot require one of two for a third
    if args.golden and args.rows:
        raise InputError("--golden brings its own rows", expected="--golden or --rows")
    if args.record and not args.rows and not args.update:
        raise InputError("--record needs conversations to answer", expected="--rows ROWS.jsonl, or --update")
    if args.update and (args.rows or args.check or not args.record):
        raise InputError(
            "--update repeats the prompts of --record FOLDER", expected="--record, and neither --rows nor --check"
        )
    if args.check and not args.record:
        raise InputError("--check is recorded with the answers", expected="--record FOLDER beside it")
    if (args.rows or args.record) and args.output_format not in _PRINTED:
        raise InputError(
            "without transcripts, no answer is judged", place="--output-format", expected=f"{' or '.join(_PRINTED)}"
        )
    from pytest_mistral_lora.chat.reading import existing_path
    from pytest_mistral_lora.records.files import require_folder

    # before torch is imported, which takes seconds
    require_folder(args.adapter)
    for given, expected in ((args.base, "the folder of a base"), (args.golden, "transcripts"), (args.rows, "rows")):
        if given is not None:
            existing_path(given, expected)
    from pytest_mistral_lora.training.display import RunDisplay

    with RunDisplay.on_stderr() as display:
        display.start_bar()
        if args.update:
            return _update(args, display)
        if args.record:
            return _record(args, display)
        return _answer(args, display) if args.rows else _compare(args, display)


def _compare(args: argparse.Namespace, display: RunDisplay) -> int:
    from pytest_mistral_lora.training.generate.judge import compare

    comparison = compare(args.adapter, args.golden, args.base, device=args.device, display=display)
    display.close()
    if args.output_format not in _PRINTED:
        _print_judged(args.output_format, comparison)
        return EXIT_OK if comparison.passed else EXIT_FINDING
    _print(args, comparison.to_json(), _comparison_text(comparison))
    return EXIT_OK if comparison.passed else EXIT_FINDING


def _comparison_text(comparison: TranscriptComparison) -> str:
    """Return a line for each transcript, with the first difference below it, and the count of each tier."""
    from pytest_mistral_lora.records.judgement import difference_text

    lines = []
    for judgement in comparison.judgements:
        lines.append(f"{judgement.tier:<10}  {judgement.case}")
        if judgement.difference is not None:
            lines += [f"  {line}" for line in difference_text(judgement)]
            lines += [f"  recorded: {judgement.golden_text!r}", f"  found:    {judgement.text!r}"]
        lines += [f"  {check.name} failed: {check.reason}" for check in judgement.broken_checks]
    if not comparison.recorded_adapter:
        model = {"adapter": "adapter", "merged": "model than this merged one"}[comparison.kind]
        lines.append(f"The transcripts were recorded with another {model}.")
    lines.append(_tier_line(comparison))
    return "\n".join(lines)


def _tier_line(comparison: TranscriptComparison) -> str:
    tiers = ", ".join(f"{count} {tier}" for tier, count in comparison.tiers.items())
    broken = sum(bool(judgement.broken_checks) for judgement in comparison.judgements)
    checks = f", {broken} with a broken check" if broken else ""
    return f"{tiers}{checks}; {comparison.precision} on {comparison.device}"


def _print_judged(output_format: str, comparison: TranscriptComparison) -> None:
    """Print the judgements for another machine: a case for each transcript."""
    from pytest_mistral_lora.conformance.groups import FindingGroups, cause_texts
    from pytest_mistral_lora.conformance.transcript import broken_formats, different_answer
    from pytest_mistral_lora.report.judged import JudgedCase

    causes, cases = FindingGroups(), []
    for judgement in comparison.judgements:
        findings = [*different_answer(judgement, comparison.golden), *broken_formats(judgement, comparison.golden)]
        for finding in findings:
            causes.add(finding, judgement.case)
        outcome: Outcome = "passed" if judgement.passed else "failed"
        text, data = "\n\n".join(cause_texts(findings)), [finding.to_json() for finding in findings]
        cases.append(JudgedCase(f"smoke.{comparison.golden.name}", judgement.case, outcome, text, data))
    print_verdict(output_format, judged_by("smoke", causes, cases, _tier_line(comparison), comparison.golden))


def _record(args: argparse.Namespace, display: RunDisplay) -> int:
    from pytest_mistral_lora.chat.row_files import read_rows
    from pytest_mistral_lora.training.generate.model_spec import record_rows

    files = record_rows(
        args.adapter,
        list(read_rows(args.rows)),
        args.record,
        args.base,
        max_new_tokens=args.max_new_tokens,
        checks=_format_checks(args.check),
        device=args.device,
        display=display,
    )
    display.close()
    lines = [f"recorded {shown_path(file)}" for file in files]
    _print(args, {"recorded": [str(file) for file in files]}, "\n".join(lines))
    return EXIT_OK


def _format_checks(words: Sequence[str]) -> tuple[FormatCheck, ...]:
    """Parse the values of `--check`, written as `NAME` or `NAME=VALUE`, by the recipe's own model of them."""
    from pydantic import ValidationError

    from pytest_mistral_lora.records.schema import error_in_words
    from pytest_mistral_lora.training.recipe import Evaluation

    # a regex or a file name may look like a number: only max_tokens takes one
    checks = [
        {name: int(value) if value.isdecimal() and name == "max_tokens" else value} if value else name
        for name, _, value in (word.partition("=") for word in words)
    ]
    try:
        return Evaluation.model_validate({"generations": 1, "checks": checks}).format_checks()
    except ValidationError as error:
        found = error_in_words(error.errors()[0], Evaluation)
        raise InputError(found, place="--check " + " ".join(words)) from error


def _update(args: argparse.Namespace, display: RunDisplay) -> int:
    from pytest_mistral_lora.training.generate.model_spec import record_again

    written = record_again(args.adapter, args.record, args.base, device=args.device, display=display)
    display.close()
    data = {str(file): state for file, state in written.items()}
    _print(args, {"written": data}, "\n".join(f"{state} {shown_path(file)}" for file, state in data.items()))
    return EXIT_OK


def _answer(args: argparse.Namespace, display: RunDisplay) -> int:
    from pytest_mistral_lora.training.generate.chat_session import read_prompt_rows
    from pytest_mistral_lora.training.generate.model_spec import model_spec, smoke

    prompts = read_prompt_rows(args.rows)
    spec = model_spec(args.adapter, args.base, device=args.device)
    unanswered = {index for index, prompt in enumerate(prompts) if not prompt.has_answer}
    result = smoke(
        spec,
        [prompt.row for prompt in prompts],
        unanswered=unanswered,
        max_new_tokens=args.max_new_tokens,
        display=display,
    )
    display.close()
    verdicts = {True: "as in the row", False: "not as in the row", None: "not checked"}
    lines, counts = [], Counter[str]()
    for completion in result["completions"]:
        verdict = verdicts[completion["equal"]]
        counts[verdict] += 1
        lines.append(f"row {completion['row']}: {completion['text']!r} (stopped by {completion['stop']}, {verdict})")
    states = ", ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts.values() if counts[verdict])
    lines.append(f"{states}; {spec.precision} on {spec.device}")
    _print(args, result, "\n".join(lines))
    return EXIT_OK


def _print(args: argparse.Namespace, data: Any, text: str) -> None:
    if args.output_format == "json":
        print_json(data, allow_nan=False)
    else:
        sys.stdout.write(f"{text}\n")


VERB = Verb(
    "smoke",
    "load an adapter or merged model, and compare or record its answers",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora smoke lora-out",
        "mistral-lora smoke lora-out --rows rows.jsonl --record answers --check json",
        "mistral-lora smoke merged --golden lora-out/transcripts",
    ),
    failure="an answer is different",
    memory_advice=_MEMORY_ADVICE,
)
