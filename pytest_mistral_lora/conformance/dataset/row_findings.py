"""The findings of one row: refused or changed by the recipe's policies, against a law, or with a suspicious text."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.diff import TokenDiff
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Policy, PolicyFault
from pytest_mistral_lora.chat.rows import Row, beyond_text, imported, text_of, weight_of
from pytest_mistral_lora.chat.tool_arguments import argument_faults, argument_object, forbidden_values, is_cut_json
from pytest_mistral_lora.conformance.dataset.file_signs import repairs_decoding
from pytest_mistral_lora.conformance.dataset.row_texts import (
    LOST_LETTERS,
    MISSING_VALUES,
    RowText,
    strings_of,
    texts_of,
)
from pytest_mistral_lora.conformance.finding import Finding, shown_difference
from pytest_mistral_lora.conformance.mask.checks import LAWS
from pytest_mistral_lora.conformance.mask.row_laws import RowLaw
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.recognition import IDS
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts
    from pytest_mistral_lora.chat.templates.compare import BackendComparison

_ROW_CHARACTERS = 2000
"""Longest row that is printed with its finding: the place is enough to find longer ones."""


def printed_row(row: Row) -> str:
    """Return a row as its finding prints it; empty if it is too long."""
    text = row.to_jsonl()
    return text if len(text) <= _ROW_CHARACTERS else ""


def backend_findings(row: Row, comparison: BackendComparison, oracle: Oracle) -> Iterator[Finding]:
    """Yield ML603 for each difference between the backends that no named deviation explains.

    Args:
        row: The row, or a prompt of it.
        comparison: Its comparison.
        oracle: The oracle.
    """
    from pytest_mistral_lora.chat.templates.compare import is_prompt
    from pytest_mistral_lora.conformance.template import difference_words

    for difference in comparison.differences:
        sides = comparison.sides_of(difference)
        # the labels are compared once the ids are equal
        parts: dict[str, Any] = {"detail": ""}
        if sides is not None:
            names = ("mistral-common", "chat template")
            diff = TokenDiff.of((sides[0][0], None), (sides[1][0], None), oracle.piece, names)
            parts = shown_difference(diff, row.place)
        text, ids = difference_words(difference, is_prompt=is_prompt(row))
        detail = "\n".join(filter(None, (ids, parts["detail"])))
        parts |= {"detail": detail, "shape": difference.shape, "name": difference.fault}
        if difference.shape:
            # each difference of a row is a finding: one that packaged rows show, too, is theirs, and any other stands
            parts["effect_of"] = f"ML004 {difference.shape}"
        yield Finding("ML603", text, row.place, row=printed_row(row), **parts)


_FAULTS = {"no-labels": "ML606", "nothing-supervised": "ML605", "too-long": "ML607"}


def fault_finding(fault: PolicyFault, error: RowError, encoded: EncodedRow, cut: Mapping[str, int]) -> Finding:
    """Return the finding for a refused row; for too long a row, with the parts that a cut would remove."""
    detail = error.next_step
    if fault == "too-long":
        detail = f"a cut would remove {_listed(cut)}"
        if cut["supervised tokens"] == encoded.supervised_tokens:
            detail += "; nothing that is trained on would be left"
    return Finding(_FAULTS[fault], error.found, error.place, error.expected, detail)


def _listed(cut: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in cut.items() if number)


_CHANGES = {
    "too-long": "dropped: {tokens} tokens, more than training.max_length = {max_length}",
    "nothing-supervised": "dropped: no token is trained on",
    "cut": "cut to training.max_length = {max_length}, without {cut}",
    "without-loss": "kept, though no token is trained on",
}


def changes(row: Row, encoded: EncodedRow, policy: Policy, cut: Mapping[str, int]) -> Iterator[tuple[str, Finding]]:
    """Yield the name and the finding of each change that a recipe's policy makes to an accepted row."""
    for change in policy.apply(encoded).changes:
        known = {"tokens": len(encoded.input_ids), "max_length": policy.max_length, "cut": _listed(cut)}
        yield change, Finding("ML620", _CHANGES[change].format(**known), row.place)


def beyond(
    row: Row, encoded: EncodedRow, layout: EncodedRow, max_length: int, facts: VersionFacts | None
) -> dict[str, int]:
    """Count the tokens, supervised tokens, closing EOS and system prompts that a cut at `max_length` would remove.

    Args:
        row: The row.
        encoded: The encoding that is trained on.
        layout: mistral-common's encoding, whose spans give the owner of each token; `encoded` without an oracle.
        max_length: Tokens that a cut would leave.
        facts: The facts of the tokenizer version; None without an oracle.
    """
    labels = (encoded.labels or ())[:max_length]
    closing = [span for span in layout.spans if span.kind == "eos" and span.end > max_length]
    start: int | None = None
    if any(message["role"] == "system" for message in row.messages):
        place = "own-turn" if facts is None else facts.system_in
        role = "system" if place == "own-turn" else "user"
        starts = [span.start for span in layout.spans if span.role == role and span.kind == "text"]
        if starts:
            start = starts[-1] if place == "last-user-turn" else starts[0]
    return {
        "tokens": len(encoded.input_ids) - max_length,
        "supervised tokens": encoded.supervised_tokens - sum(label != IGNORE_INDEX for label in labels),
        "closing </s>": len(closing),
        "system prompt": int(start is not None and start >= max_length),
    }


ON_EVERY_KIND = frozenset({"ML101", "ML102", "ML103", "ML104", "ML105"})
"""Rules of the laws that hold for a row of any kind."""

ON_EVERY_ROW = frozenset({"ML101", "ML102", "ML103", "ML104", "ML105", "ML107", "ML109", "ML110"})
"""Rules of the laws that look at one encoding; the other laws encode the row again, and run only with Hypothesis."""


def law_findings(row: Row, encoded: EncodedRow, oracle: Oracle) -> Iterator[Finding]:
    """Yield the laws that mistral-common's encoding of a row breaks."""
    kind = row.kind
    rules = ON_EVERY_ROW if kind.is_chat else ON_EVERY_KIND
    # that of conversations is one of the laws below
    law_of_texts = imported(kind.text_law) if kind.text_law and kind.text_rule not in rules else None
    if law_of_texts is not None and (violation := law_of_texts(row, encoded, oracle)):
        yield Finding(kind.text_rule, violation, row.place)
    weights = any(message["role"] == "assistant" and not weight_of(message) for message in row.messages)
    for law in oracle.prepared(_laws_of_one_encoding):
        # in the mask from the control tokens, every answer has a loss
        if law.rule not in rules or (weights and law.rule == "ML107"):
            continue
        if violation := law.violation(row, encoded, oracle):
            yield Finding(law.rule, violation, row.place, name=law.name)


def _laws_of_one_encoding(oracle: Oracle) -> tuple[RowLaw, ...]:
    return tuple(law for law in LAWS if law.rule in ON_EVERY_ROW and not law.unfit(oracle))


def column_finding(keys: Sequence[str], place: Place, path: Path, rows: str = "the row") -> Finding:
    """Return the finding of columns that another trainer may train on, beside the messages.

    Args:
        keys: The columns.
        place: The place of the row, or of its file.
        path: The file.
        rows: The rows that have them, in words.
    """
    names = " and ".join(f"`{key}`" for key in keys)
    found = f"{rows} has {names} beside its messages, which alone are judged here"
    if keys[0] not in (*IDS, "labels"):
        return Finding("ML635", found, place, "messages alone, or the column alone")
    step = f"Judge the ids and labels: mistral-lora check {shlex.quote(str(path))} --tokenizer PATH"
    return Finding("ML634", found, place, "rows without ids, or their judgement as encoded rows", step)


_DAMAGED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
"""U+FFFD, and control characters other than tab, newline, carriage return and U+0085."""


def text_findings(row: Row, layout: EncodedRow) -> Iterator[Finding]:
    """Yield suspicious texts of a row: joined turns, empty answers, damaged characters, odd tool calls."""
    # the messages of a row of another kind are no turns
    answers = row.assistant_groups() if row.kind.is_chat else ()
    groups = [(group, "assistant") for group in answers if len(group) > 1]
    pairs = itertools.pairwise(enumerate(row.messages))
    groups += [([n, n + 1], "user") for (n, a), (_, b) in pairs if a["role"] == b["role"] == "user"]
    for group, role in groups:
        found = f"messages[{group[0]}] to [{group[-1]}] are joined into one {role} turn"
        yield Finding("ML614", found, row.place)
    turns: dict[int | None, set[str]] = {}
    for span in layout.spans:
        turns.setdefault(span.turn, set()).add(span.kind)
    trained = {span.turn for span in layout.spans if span.supervised}
    for turn, kinds in turns.items():
        if turn in trained and kinds == {"eos"}:
            yield Finding("ML616", f"{row.kind.answer_words(turn)} is empty: nothing but </s>", row.place)
    characters = {*_DAMAGED.findall("\n".join(strings_of(row.to_json())))}
    if characters and row.kind.is_chat:
        characters = {*_damaged_characters(row)}
    if characters:
        yield Finding(
            "ML617",
            f"the row has {', '.join(f'U+{ord(character):04X}' for character in sorted(characters))}",
            row.place,
        )
    yield from _tool_findings(row)
    yield from call_findings(row)
    if row.response_format is not None:
        yield from _forbidden_words(row, row.response_format)


def _forbidden_words(row: Row, response_format: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the answers with a word for a missing value that the schema of the row forbids."""
    kind, named = response_format.get("type", "text"), response_format.get("json_schema")
    schema = named.get("schema") if kind == "json_schema" and isinstance(named, Mapping) else {"type": "object"}
    if kind == "text" or not isinstance(schema, Mapping):
        return
    weights = row.trained_weights()
    for index, message in enumerate(row.messages):
        text = text_of(message.get("content")).strip()
        if message["role"] != "assistant" or not text or not weights[index]:
            continue
        for path, word in _missing_in(text, schema):
            found = f"{word!r} at {path}, which the schema of the row forbids"
            place, expected = row.place / "messages" / index / "content", "a value of the schema in response_format"
            yield Finding("ML643", found, place, expected, severity="error")
            break


def _missing_in(text: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the JSON path of each word for a missing value that a schema forbids, and the word."""
    words: list[str] = []
    try:
        # Python's parser reads NaN, which is not JSON
        value = json.loads(text, parse_constant=words.append)
    except (ValueError, RecursionError):
        yield from [("$", text)] if text in MISSING_VALUES else ()
        return
    yield from (("$", word) for word in words)
    for path, part in () if words else forbidden_values(value, schema):
        if part is None or (isinstance(part, str) and part in MISSING_VALUES):
            yield path, "null" if part is None else part


# the colours of a terminal
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_AROUND_LOST = re.compile(r"\w{0,20}\ufffd+\w{0,20}")


def _damaged_characters(row: Row) -> Iterator[str]:
    """Yield the damaged characters of a conversation, without those that it repairs, repeats or speaks of."""
    rest = row.to_json()
    for message in rest["messages"]:
        if message["role"] != "tool":
            message["content"] = beyond_text(message.get("content"))
    for text in strings_of(rest):
        yield from _DAMAGED.findall(_COLOUR.sub("", text))
    for said in texts_of(row):
        for character in {*_DAMAGED.findall(_COLOUR.sub("", said.text))}:
            is_about = _is_about_lost_letters(said) if character == "\ufffd" else _is_wrong_decoding(said, character)
            if not is_about:
                yield character


def _is_wrong_decoding(said: RowText, character: str) -> bool:
    """Return whether a control character of a prompt belongs to a wrong decoding that the answer repairs."""
    return "\x80" <= character <= "\x9f" and not said.is_answer and repairs_decoding(said)


def _is_about_lost_letters(said: RowText) -> bool:
    """Return whether U+FFFD in a text is what the row is about: it is repeated or repaired."""
    if said.speaks_of(LOST_LETTERS) or said.repeats("\ufffd"):
        return True
    # the answer has the word with its letter; each of its bytes may have become a U+FFFD
    words = (re.escape(found[0]).replace("\ufffd", r"\w") for found in _AROUND_LOST.finditer(said.text))
    return not said.is_answer and any(re.search(re.sub(r"(\\w)+", r"\\w{1,4}", word), said.answer) for word in words)


_COMPOSED = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "if")
"""Keys of a schema that can name properties elsewhere than under `properties`."""


def _tool_findings(row: Row) -> Iterator[Finding]:
    """Yield tools that are offered twice, and required arguments that their schema does not name."""
    known: dict[str, Any] = {}
    for index, tool in enumerate(row.tools or ()):
        function, place = tool["function"], row.place / "tools" / index / "function"
        name, schema = function["name"], function["parameters"]
        if name in known:
            same = "the same tool" if known[name] == function else "another tool of that name"
            yield Finding("ML653", f"{name!r} is offered twice: {same} is before it", place / "name", "one tool")
        known.setdefault(name, function)
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, Mapping) or not isinstance(required, list) or any(map(schema.get, _COMPOSED)):
            continue
        unnamed = [key for key in required if isinstance(key, str) and key not in properties]
        if unnamed:
            found = f"{', '.join(map(repr, unnamed))}, which properties do not name"
            expected = f"keys among {', '.join(map(repr, properties)) or 'no properties'}"
            yield Finding("ML654", found, place / "parameters" / "required", expected)


def call_findings(row: Row) -> Iterator[Finding]:
    """Yield calls of unknown tools, arguments that are not an object or do not fit the tool, results without call."""
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools or ()}
    weights = row.trained_weights() if parameters else ()
    for index, message in enumerate(row.messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            place = row.place / "messages" / index / "tool_calls" / number / "function"
            name, arguments = call["function"]["name"], call["function"].get("arguments")
            if name not in parameters:
                expected = f"one of {', '.join(sorted(parameters))}" if parameters else "a tool of the row"
                yield Finding("ML618", f"calls {name!r}, which the row does not offer", place / "name", expected)
            value, kind = argument_object(arguments)
            if value is None:
                finding = Finding("ML619", f"are {kind}", place / "arguments", "an object, or its JSON as a string")
                is_object = name in parameters and parameters[name].get("type") == "object"
                is_proven = is_object and weights[index] and is_cut_json(arguments)
                yield replace(finding, severity="error") if is_proven else finding
            elif name in parameters:
                # a call of weight 0 may be wrong on purpose: the model only reads it
                trained = bool(weights[index])
                yield from _argument_findings(value, parameters[name], place / "arguments", trained=trained)
    yield from _result_findings(row)


def _argument_findings(
    arguments: Mapping[str, Any], schema: Mapping[str, Any], place: Place, *, trained: bool
) -> Iterator[Finding]:
    """Yield nulls that the tool does not know, and the first way in which the rest breaks the tool's schema."""
    faults = argument_faults(arguments, schema)
    if faults.nulls:
        found = f"null at {', '.join(faults.nulls)}, which the tool does not take"
        yield Finding("ML623", found, place, "no such keys: a table format fills the columns of other rows with null")
    if faults.wrong and trained:
        yield Finding("ML622", faults.wrong, place, "arguments of the tool's own schema")


def _result_findings(row: Row) -> Iterator[Finding]:
    """Yield results whose id has no call in the turn before or is already answered, or that name another tool."""
    open_calls: dict[Any, str] = {}
    for index, message in enumerate(row.messages):
        if message["role"] != "tool":
            calls = message.get("tool_calls") or ()
            # two messages in a row that call tools are one turn
            kept = open_calls if calls and index and row.messages[index - 1].get("tool_calls") else {}
            open_calls = kept | {call.get("id"): call["function"]["name"] for call in calls}
            continue
        # up to v2 a call needs no id
        if (call_id := message.get("tool_call_id")) is None or None in open_calls:
            continue
        place = row.place / "messages" / index
        known = ", ".join(map(repr, open_calls)) or "a call before it"
        called = open_calls.pop(call_id, None)
        if called is None:
            found = f"the id {call_id!r} is of no call of the turn before, or was answered already"
            yield Finding("ML621", found, place / "tool_call_id", known)
        elif message.get("name") not in (None, "", called):
            found = f"the result is of {message['name']!r}, and the call was of {called!r}"
            yield Finding("ML621", found, place / "name", repr(called))
