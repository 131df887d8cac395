"""The command line: `mistral-lora VERB …`. Every verb is a thin front of a function that Python can call."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.errors import (
    EXIT_FINDING,
    EXIT_INTERRUPTED,
    EXIT_OK,
    InputError,
    MistralLoraError,
    RowError,
    RowsError,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.records.verify import Fact

_EXITS = (
    "Exit codes: 0 fine, 1 a finding or a failed run, 2 bad usage or bad input, 3 out of memory, "
    "130 interrupted (Ctrl-C), 143 terminated (SIGTERM)."
)

_AUDIT_JSON = """\
With --json, each finding is one JSON object on a line of its own: rule, class (its name in the table of classes),
severity, index (the row's number, null for a whole file), state, place, found, expected, detail and row (the chat row
as one line of JSON). The last line is {"summary": {...}} with rows, sound, wrong, not_judged, packed, tokens,
supervised_tokens, findings and classes (rule, class and count of each)."""

_TRAINING = "pytest_mistral_lora.training"
_OWN_COMMANDS = {
    "train": (f"{_TRAINING}.__main__", "train a recipe's adapter (recipe.yaml)"),
    "runner": ("pytest_mistral_lora.runners.runner_command", "make the environments of other trainers"),
    "smoke": (f"{_TRAINING}.answers.smoke_command", "load an adapter afresh, and compare with transcripts"),
    "merge": (f"{_TRAINING}.merge.command", "add an adapter to its base's weights, and prove the merged model"),
    "export": (f"{_TRAINING}.export.command", "write a recipe's run for another runner: trl, axolotl, llamafactory"),
}
"""Verbs whose module has a command line of its own, so that a launcher or a test can start it by `-m`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in _OWN_COMMANDS:
        module, _ = _OWN_COMMANDS[words[0]]
        return int(import_module(module).main(words[1:], prog=f"mistral-lora {words[0]}"))
    given = _parser().parse_args(words)
    try:
        return int(given.run(given))
    except MistralLoraError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # the reader of our output has gone, as `head` does; Python must not complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FINDING
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mistral-lora",
        description="Train LoRA adapters on Mistral models, and hold what is trained on to Mistral's own tokenization.",
        epilog=_EXITS,
    )
    parser.add_argument("--version", action="version", version=f"pytest-mistral-lora {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (_, text) in _OWN_COMMANDS.items():
        verbs.add_parser(name, help=text)
    _add_check(verbs)
    _add_render(verbs)
    _add_template(verbs)
    _add_audit(verbs)
    _add_verify(verbs)
    _add_note(verbs)
    _add_diff(verbs)
    _add_rules(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text.capitalize() + ".", epilog=_EXITS
    )
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")
    return verb


def _add_tokenizer(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tokenizer",
        required=True,
        type=_tokenizer,
        metavar="PATH",
        help="checkpoint folder, tekken.json, tokenizer.model.vN, or the name of a shipped one (spm-v3)",
    )


def _tokenizer(text: str) -> Path:
    path = Path(text)
    if path.exists():
        return path
    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer

    return shipped_tokenizer(text) if text in SHIPPED else path


def _add_check(verbs: Any) -> None:
    verb = _verb(verbs, "check", _check, "judge recipes with all their rows, checkpoints' tokenizers and adapters")
    verb.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="recipe.yaml, adapter folder, checkpoint or tokenizer file"
    )
    verb.add_argument("--base", type=Path, metavar="DIR", help="the base checkpoint of the adapters")
    verb.add_argument("--train", action="store_true", help="also train a tiny model with each tokenizer")
    verb.add_argument("--examples", type=int, default=20, metavar="N", help="generated rows for each law (default: 20)")


def _check(given: argparse.Namespace) -> int:
    # before the first import that reads it: a bar for each small model that is loaded would bury the findings
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pytest_mistral_lora.conformance.run import check
    from pytest_mistral_lora.report.session import report_data
    from pytest_mistral_lora.report.table import outcome_table

    records = []
    for record, result in check(given.paths, base=given.base, examples=max(1, given.examples), train=given.train):
        records.append(record)
        if not given.json and (result.findings or result.not_checked):
            words = {"failed": "FAILED", "skipped": f"not checked: {result.not_checked}", "passed": "note"}
            name = record["nodeid"].partition("::")[2]
            texts = [f"{name} {words[record['outcome']]}", *(finding.text() for finding in result.findings)]
            sys.stdout.write("\n".join(texts) + "\n\n")
    failed = any(record["outcome"] == "failed" for record in records)
    code = EXIT_FINDING if failed else EXIT_OK
    if given.json:
        data = report_data(records, code, deselected=0, not_run=0)
        sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(outcome_table(records, shutil.get_terminal_size().columns)) + "\n")
    return code


def _add_render(verbs: Any) -> None:
    verb = _verb(verbs, "render", _render, "show how each row of a chat JSONL file is encoded, and what is trained on")
    verb.add_argument("rows", type=Path, help="chat JSONL file")
    _add_tokenizer(verb)


def _render(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.chat.rendering import encoded_text
    from pytest_mistral_lora.chat.rows import scan_rows
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    oracle = CheckpointTokenizer(given.tokenizer).oracle
    errors: list[RowError] = []
    for item in scan_rows(given.rows):
        try:
            if isinstance(item, RowError):
                raise item
            encoded = oracle.encode(item)
        except RowError as error:
            errors.append(error)
            continue
        if given.json:
            data = {**item.to_json(), "input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}
            sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
        else:
            sys.stdout.write(f"{item.place}\n{encoded_text(encoded, oracle.piece)}\n")
    if errors:
        raise RowsError(errors, place=str(given.rows))
    return EXIT_OK


def _add_template(verbs: Any) -> None:
    verb = _verb(verbs, "template", _template, "write the official chat template with {%% generation %%} blocks")
    _add_tokenizer(verb)
    verb.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: standard output)")


def _template(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.checkpoint.training_template import training_template
    from pytest_mistral_lora.records.files import write_text

    text = training_template(given.tokenizer)
    if given.json:
        text = json.dumps({"tokenizer": str(given.tokenizer), "template": text}, ensure_ascii=False)
    if given.output:
        write_text(given.output, text)
    else:
        sys.stdout.write(f"{text}\n")
    return EXIT_OK


def _add_audit(verbs: Any) -> None:
    from pytest_mistral_lora.runners.audit_options import add_options

    verb = _verb(verbs, "audit", _audit, "hold a trainer's encoded rows (input_ids and labels) against mistral-common")
    verb.add_argument(
        "rows", type=Path, nargs="?", help="encoded-rows JSONL: row, messages or conversations, input_ids, labels"
    )
    _add_tokenizer(verb)
    verb.add_argument(
        "--dataset",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="chat JSONL file that the rows come from, in order (repeatable): what is missing or changed is said",
    )
    verb.add_argument("--show", type=int, default=5, metavar="N", help="findings of a class to print (default 5)")
    add_options(verb)
    verb.epilog = f"{_AUDIT_JSON} {_EXITS}"


def _audit(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.encoded.audit import Audit
    from pytest_mistral_lora.conformance.encoded.audit_report import write_json, write_text
    from pytest_mistral_lora.runners.audit_options import encoded_rows

    with encoded_rows(given) as rows:
        audit = Audit(rows, CheckpointTokenizer(given.tokenizer).oracle, tuple(given.dataset))
        failed = write_json(audit, sys.stdout) if given.json else write_text(audit, sys.stdout, max(0, given.show))
    audit.raise_unreadable()
    return EXIT_FINDING if failed else EXIT_OK


def _add_verify(verbs: Any) -> None:
    verb = _verb(verbs, "verify", _verify, "compute every fact of an adapter's manifest again that can be")
    verb.add_argument("folder", type=Path, help="adapter's or merged model's folder, with manifest.json")
    verb.add_argument("--base", type=Path, metavar="DIR", help="where the base checkpoint is now")
    verb.add_argument(
        "--dataset",
        type=Path,
        action="append",
        metavar="PATH",
        help="training file, in recipe order (repeatable), or a folder with all data files",
    )
    verb.add_argument(
        "--rerun",
        action="store_true",
        help="also train again from the manifest alone, and compare the adapter's tensors: equal bit for bit on the "
        "same machine and libraries on a CPU, within a tolerance elsewhere",
    )
    verb.add_argument("--parent", type=Path, metavar="DIR", help="the adapter that a merged model was made of")


def _verify(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.records.verify import verify

    dataset = given.dataset[0] if given.dataset and len(given.dataset) == 1 else given.dataset
    facts = verify(given.folder, base=given.base, dataset=dataset, parent=given.parent)
    if given.rerun:
        from pytest_mistral_lora.training.rerun import rerun

        again = rerun(
            given.folder, base=given.base, dataset=dataset, progress="bar" if sys.stderr.isatty() else "lines"
        )
        facts.append(again.fact)
    if given.json:
        sys.stdout.write(json.dumps([asdict(fact) for fact in facts], ensure_ascii=False, indent=2, default=str) + "\n")
    else:
        for fact in facts:
            sys.stdout.write(f"{fact.state:<13}  {fact.name}{_shown(fact)}\n")
    return EXIT_FINDING if any(fact.state == "mismatch" for fact in facts) else EXIT_OK


def _shown(fact: Fact) -> str:
    """Return what a line says of a fact beside its state: why it is in this state, where that is not plain."""
    if fact.state == "mismatch":
        return f": {fact.found}; recorded {fact.recorded}"
    return f": {fact.found}" if fact.state == "not available" or fact.name == "rerun" else ""


def _add_note(verbs: Any) -> None:
    text = "make DECISION.md and README.md of a folder again from its manifest, and keep what its author wrote"
    verb = _verb(verbs, "note", _note, text)
    verb.add_argument("folder", type=Path, help="adapter or merged folder with manifest.json")


def _note(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.records.notes import write_notes

    files = [str(file) for file in write_notes(given.folder)]
    sys.stdout.write(json.dumps(files) + "\n" if given.json else "".join(f"{file}\n" for file in files))
    return EXIT_OK


def _add_diff(verbs: Any) -> None:
    verb = _verb(verbs, "diff", _diff, "say in what two runs differ: recorded facts, tensors and answers")
    for name in ("a", "b"):
        verb.add_argument(name, type=Path, metavar=name.upper(), help="adapter or merged folder, or manifest.json")
    verb.epilog = "Exit codes: 0 nothing differs, 1 something does, 2 bad usage or bad input."


def _diff(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.records.diff import diff
    from pytest_mistral_lora.report.difference import diff_data, diff_lines

    found = diff(given.a, given.b)
    if given.json:
        sys.stdout.write(json.dumps(diff_data(found), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write("\n".join(diff_lines(found, shutil.get_terminal_size().columns)) + "\n")
    return EXIT_OK if found.equal else EXIT_FINDING


def _add_rules(verbs: Any) -> None:
    verb = _verb(verbs, "rules", _rules, "list the rules of the suite, or explain those that are named")
    verb.add_argument("ids", nargs="*", metavar="ID", help="rule to explain, such as ML204")


def _rules(given: argparse.Namespace) -> int:
    from pytest_mistral_lora.conformance.rules import RULES

    unknown = [name for name in given.ids if name not in RULES]
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is no rule", expected="an id such as ML204", next_step="List them: mistral-lora rules."
        )
    chosen = [RULES[name] for name in given.ids or RULES]
    if given.json:
        sys.stdout.write(json.dumps([asdict(rule) for rule in chosen], ensure_ascii=False, indent=2) + "\n")
    elif given.ids:
        sys.stdout.write("\n\n".join(rule.text() for rule in chosen) + "\n")
    else:
        lines = (f"{rule.id}  {rule.subject:<10}  {rule.severity:<5}  {rule.title}\n" for rule in chosen)
        sys.stdout.writelines(lines)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
