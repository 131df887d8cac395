"""`mistral-lora smoke`: the answers of a saved adapter or merged model, in a new process."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.cli.judging import Judging, VerbView, add_judging_options, check_options
from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_device_option,
    print_json,
    shown_path,
    whole_number,
)
from pytest_mistral_lora.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.completions import FormatCheck
    from pytest_mistral_lora.conformance.check_options import CheckOptions
    from pytest_mistral_lora.conformance.finding import Result
    from pytest_mistral_lora.conformance.session import Session
    from pytest_mistral_lora.training.display import RunDisplay
    from pytest_mistral_lora.training.gate.folder import FolderGate
    from pytest_mistral_lora.training.generate.judge import TranscriptComparison

_DESCRIPTION = """\
Compare the answers of an adapter or merged model, which is loaded anew, with the answers that its run recorded. It
answers prompts greedily, encoded as in training.

With transcripts (those of the run, or --golden), each answer is compared with the recorded one. It is exact (the same
tokens), equivalent (another token only at a near tie, and the recorded answer is as likely as it was), or different.
With --gate, compare the model with its base on the held-out rows of its run, and on the rows of evaluation.retention: a
measurement fails if its whole interval is on the wrong side of the limit.
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
    target.add_argument(
        "--gate",
        action="store_true",
        help="compare base and adapter, or base and merged model, on the held-out rows of the run, as the recipe's "
        "evaluation.gate does",
    )
    parser.add_argument(
        "--dataset",
        type=INPUT,
        metavar="DIR",
        help="with --gate, the folder of the data files (default: the folder of the recipe)",
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
    add_judging_options(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, record or print answers; return 1 if a compared answer is different, or the gate fails.

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
    if args.gate and args.rows:
        raise InputError("--gate brings its own rows", expected="--gate or --rows")
    if args.dataset and not args.gate:
        raise InputError("--dataset is the folder of the gate's rows", expected="--gate beside it")
    if args.rows or args.record:
        _refuse_judging(args)
    from pytest_mistral_lora.chat.reading import existing_path
    from pytest_mistral_lora.records.files import require_folder

    # before torch is imported, which takes seconds
    require_folder(args.adapter)
    inputs = ((args.base, "the folder of a base"), (args.golden, "transcripts"), (args.rows, "rows"))
    for given, expected in (*inputs, (args.dataset, "the folder of the data files")):
        if given is not None:
            existing_path(given, expected)
    from pytest_mistral_lora.training.display import RunDisplay

    with RunDisplay.on_stderr() as display:
        display.start_bar()
        if args.update:
            return _update(args, display)
        if args.record:
            return _record(args, display)
        if args.gate:
            return _gate(args, display)
        return _answer(args, display) if args.rows else _compare(args, display)


def _refuse_judging(args: argparse.Namespace) -> None:
    """Refuse the options of judged answers, if answers are only printed or recorded.

    Raises:
        InputError: If one is given.
    """
    found = "without transcripts, no answer is judged"
    if args.output_format not in _PRINTED:
        raise InputError(found, place="--output-format", expected=f"{' or '.join(_PRINTED)}")
    for option in ("xfails", "write_xfails", "report"):
        if getattr(args, option):
            raise InputError(found, place=f"--{option.replace('_', '-')}", expected="neither --rows nor --record")


def _compare(args: argparse.Namespace, display: RunDisplay) -> int:
    from pytest_mistral_lora.conformance.transcript import answer_results
    from pytest_mistral_lora.training.generate.judge import compare

    options = check_options(args, fail_on=frozenset({"note"}))
    comparison = compare(args.adapter, args.golden, args.base, device=args.device, display=display)
    display.close()
    results = answer_results(comparison.judgements, comparison.golden)
    view = VerbView(
        lambda session: _comparison_lines(comparison),
        lambda session: _tier_line(comparison),
        partial(_print_comparison, comparison),
    )
    return _judge(args, comparison.golden, options, results, view)


def _judge(
    args: argparse.Namespace, path: Path, options: CheckOptions, results: Iterable[tuple[str, Result]], view: VerbView
) -> int:
    """Judge the results of the adapter's answers, and return the exit code.

    Args:
        args: The options.
        path: The path that the report names.
        options: What the user decides, which was read before the long work.
        results: The result of each check, by its case.
        view: What is printed.
    """
    from pytest_mistral_lora.conformance.model_targets import RecordTarget

    judging = Judging.of(args, paths=[{"path": str(path)}], options=options, view=view)
    return judging.judge([RecordTarget.of(args.adapter, "transcript", results)])


def _print_comparison(comparison: TranscriptComparison, session: Session) -> None:
    print_json({**comparison.to_json(), "passed": session.exit_code == EXIT_OK}, allow_nan=False)


def _comparison_lines(comparison: TranscriptComparison) -> list[str]:
    """Return a line for each transcript, with the first difference below it."""
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
    return lines


def _tier_line(comparison: TranscriptComparison) -> str:
    from pytest_mistral_lora.records.judgement import format_rates

    tiers = ", ".join(f"{count} {tier}" for tier, count in comparison.tiers.items())
    broken = sum(bool(judgement.broken_checks) for judgement in comparison.judgements)
    checks = f", {broken} with a broken check" if broken else ""
    checks += "".join(f"; {name}: {rate}" for name, rate in format_rates(comparison.judgements))
    return f"{tiers}{checks}; {comparison.precision} on {comparison.device}"


def _gate(args: argparse.Namespace, display: RunDisplay) -> int:
    from pytest_mistral_lora.conformance.finding import Result
    from pytest_mistral_lora.conformance.transcript import gate_results
    from pytest_mistral_lora.places import Place
    from pytest_mistral_lora.training.gate.folder import folder_gate

    options = check_options(args, fail_on=frozenset({"note"}))
    measured = folder_gate(args.adapter, args.base, dataset=args.dataset, device=args.device, display=display)
    display.close()
    # the rows were compared with the recorded ones: a gate without a decision is a pass of this check alone
    results = [("gate-rows", Result(facts=tuple(measured.rows.items())))]
    results += gate_results(measured.gate, Place.of(args.adapter))
    view = VerbView(
        lambda session: _gate_lines(measured),
        lambda session: f"gate: {measured.gate.verdict}. {measured.gate.how}",
        lambda session: print_json({**measured.to_json(), "passed": session.exit_code == EXIT_OK}),
    )
    return _judge(args, args.adapter, options, results, view)


def _gate_lines(measured: FolderGate) -> list[str]:
    from pytest_mistral_lora.records.gate import table_lines

    lines = [*table_lines(measured.gate, title=measured.kind), *measured.gate.reasons()]
    recorded = measured.recorded
    if recorded is not None and recorded.verdict != measured.gate.verdict:
        lines.append(f"The run recorded another verdict: {recorded.verdict}.")
    return lines


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
    "compare a model's answers with those that its run recorded",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora smoke lora-out",
        "mistral-lora smoke lora-out --rows rows.jsonl --record answers --check json",
        "mistral-lora smoke merged --golden lora-out/transcripts",
        "mistral-lora smoke lora-out --gate",
    ),
    failure="an answer is different, or the gate fails",
    memory_advice=_MEMORY_ADVICE,
)
