"""A completion: the tool calls that it makes, and whether it has the form that was asked for.

Loss can fall while the format falls apart, so a run and a transcript can name checks of the form.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_mistral_lora.chat.reading import answer_in_time
from pytest_mistral_lora.errors import InputError, one_line

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts


_ID = re.compile(r"[a-zA-Z0-9]{9}")


class MalformedCallError(ValueError):
    """The ids do not spell tool calls, or a text is not JSON; the message gives the fault."""


@dataclass(frozen=True, slots=True)
class GeneratedCall:
    """A tool call as it was generated.

    Attributes:
        name: The tool's name.
        arguments: The parsed JSON of its arguments; an object if the call is well-formed.
        id: Its id, a string if the call is well-formed; None if the tokenizer version writes none.
    """

    name: str
    arguments: Any
    id: Any


def read_calls(ids: Sequence[int], oracle: Oracle) -> list[GeneratedCall]:
    """Return the tool calls that a completion makes: the inverse of `Oracle.encode` on a turn with calls.

    Args:
        ids: The completion, with or without its closing EOS; text before the first call is allowed.
        oracle: Mistral's own tokenization of the model.

    Raises:
        MalformedCallError: If the completion has no call, or a call is not in the form of the tokenizer version.
    """
    ids = [token for token in ids if token != oracle.eos_id]
    if oracle.tool_calls_id not in ids:
        raise MalformedCallError("no [TOOL_CALLS]")
    ids = ids[ids.index(oracle.tool_calls_id) :]
    if oracle.facts.calls_as == "markers":
        return list(_marked_calls(ids, oracle))
    if ids.count(ids[0]) > 1:
        raise MalformedCallError("[TOOL_CALLS] twice in one turn")
    calls = _load_json(oracle.decode(ids[1:]))
    if not isinstance(calls, list) or not calls:
        raise MalformedCallError("what follows [TOOL_CALLS] is not a list of calls")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise MalformedCallError(f"not a call: {json.dumps(call, ensure_ascii=False)}")
    return [GeneratedCall(call["name"], call["arguments"], call.get("id")) for call in calls]


def call_violation(call: GeneratedCall, tools: Collection[str], facts: VersionFacts) -> str:
    """Return why a call is not well-formed; empty if it is.

    Args:
        call: The call.
        tools: Names of the tools that the conversation has.
        facts: The facts of the tokenizer version.
    """
    if call.name not in tools:
        return f"no tool is named {call.name!r}"
    if not isinstance(call.arguments, dict):
        return f"the arguments of {call.name} are {json.dumps(call.arguments, ensure_ascii=False)}, not an object"
    if facts.writes_call_ids and not (isinstance(call.id, str) and _ID.fullmatch(call.id)):
        return f"the id of {call.name} is {call.id!r}, not 9 letters and digits"
    return ""


def _marked_calls(ids: list[int], oracle: Oracle) -> Iterator[GeneratedCall]:
    """Yield the calls of a version that writes each call as markers, each followed by a text."""
    markers = ["[TOOL_CALLS]", *(["[CALL_ID]"] if oracle.facts.writes_call_ids else []), "[ARGS]"]
    starts = [index for index, token in enumerate(ids) if token in oracle.control_tokens]
    runs = [
        (oracle.control_tokens[ids[start]], oracle.decode(ids[start + 1 : end]))
        for start, end in itertools.pairwise([*starts, len(ids)])
    ]
    for first in range(0, len(runs), len(markers)):
        parts = runs[first : first + len(markers)]
        if [marker for marker, _ in parts] != markers:
            found = "".join(marker for marker, _ in parts)
            raise MalformedCallError(f"a call with the markers {found}, not {''.join(markers)}")
        texts = dict(parts)
        yield GeneratedCall(texts["[TOOL_CALLS]"], _load_json(texts["[ARGS]"]), texts.get("[CALL_ID]"))


def _load_json(text: str) -> Any:
    # A model's answer may repeat a key: JSON allows it, and the caller of the tool would read it. NaN is not JSON.
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedCallError(f"not valid JSON: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


Kind = Literal["json", "json_schema", "tool_call", "regex", "eos", "max_tokens"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Every kind of check."""


@dataclass(frozen=True, slots=True)
class AnswerToCheck:
    """A completion to check.

    Attributes:
        ids: Its tokens, a closing EOS included.
        text: The decoded text, without control tokens.
        stop: `eos`, or `length`.
        tools: The tools that the conversation has, in the OpenAI layout.
        oracle: Mistral's own tokenization of the model, which `tool_call` needs; None if the model has none.
    """

    ids: Sequence[int]
    text: str
    stop: str
    tools: Sequence[Mapping[str, Any]]
    oracle: Oracle | None


@dataclass(frozen=True, slots=True)
class FormatVerdict:
    """The result of one check of a completion's form.

    Attributes:
        name: The check's name.
        reason: Why it failed; empty if it passed.
    """

    name: str
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the completion has that form."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class FormatCheck:
    """One check of a completion's form.

    Attributes:
        kind: The form that is checked.
        value: The JSON Schema of `json_schema`, the pattern of `regex` (the whole text must match), the tokens of
            `max_tokens` (EOS included); None for the others.
        name: Its name in rates and verdicts; by default the kind and the value.
    """

    kind: Kind
    value: Any = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            text = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
            short = text if len(text) <= 40 else f"{text[:39]}…"
            object.__setattr__(self, "name", self.kind if self.value is None else f"{self.kind}:{short}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FormatCheck:
        """Return the check that `to_json` wrote."""
        return cls(data["kind"], data.get("value"), data["name"])

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain JSON data; `value` is left out if it is None."""
        value = {} if self.value is None else {"value": self.value}
        return {"name": self.name, "kind": self.kind, **value}

    def verdict(self, answer: AnswerToCheck) -> FormatVerdict:
        """Judge a completion.

        Raises:
            InputError: If the kind is `tool_call` and the model has no Mistral tokenizer to read calls with.
        """
        if self.kind != "regex" and not (self.kind == "json_schema" and '"pattern' in json.dumps(self.value)):
            return FormatVerdict(self.name, _CHECKS[self.kind](answer, self.value))
        try:
            reason = str(answer_in_time(_CODE, [[*map(str, sys.path)], self.kind, self.value, answer.text]))
        except TimeoutError as error:
            reason = f"a pattern {error}: write it without repetitions of repetitions"
        except ValueError as error:
            reason = f"the check cannot run: {error}"
        return FormatVerdict(self.name, reason)


def verdicts(answer: AnswerToCheck, checks: Iterable[FormatCheck]) -> tuple[FormatVerdict, ...]:
    """Judge a completion by several checks, in the order given."""
    return tuple(check.verdict(answer) for check in checks)


def pass_rates(judged: Iterable[Iterable[FormatVerdict]]) -> dict[str, float]:
    """Return for each check the share of completions that passed it, from 0 to 1."""
    passed: dict[str, list[bool]] = {}
    for answer_verdicts in judged:
        for verdict in answer_verdicts:
            passed.setdefault(verdict.name, []).append(verdict.passed)
    return {name: sum(values) / len(values) for name, values in passed.items()}


def schema_violation(schema: Any) -> str:
    """Return why `schema` is not a JSON Schema; empty if it is one."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    if isinstance(schema, bool):
        return ""
    if not isinstance(schema, dict):
        return "it is not an object"
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"
    except (AttributeError, RecursionError) as error:  # a `$schema` that is not a text, or endless levels
        return f"it cannot be read: {one_line(error)}"
    return ""


def _json_violation(answer: AnswerToCheck, schema: Any) -> str:
    """Check that the text is JSON, and valid by the schema if one is given."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        data = _load_json(answer.text)
    except MalformedCallError as error:
        return str(error)
    if schema is None:
        return ""
    # an empty registry: a reference to another document is never fetched
    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
    try:
        worst = best_match(validator.iter_errors(data))
    except (Unresolvable, RecursionError, ArithmeticError) as error:
        # the answer may be nested deeper than Python recurses, or hold a number too large for a float
        return f"the check cannot run: {one_line(error)}"
    return "" if worst is None else f"{worst.json_path}: {worst.message:.300}"


def _tool_call_violation(answer: AnswerToCheck, value: Any) -> str:
    if answer.oracle is None:
        raise InputError(
            "there is no Mistral tokenizer to read tool calls with",
            place="the check tool_call",
            expected="a checkpoint with tekken.json or tokenizer.model.vN",
        )
    names = {tool["function"]["name"] for tool in answer.tools}
    facts = answer.oracle.facts
    try:
        calls = read_calls(answer.ids, answer.oracle)
    except MalformedCallError as error:
        return str(error)
    return next((wrong for call in calls if (wrong := call_violation(call, names, facts))), "")


_CHECKS: dict[Kind, Callable[[AnswerToCheck, Any], str]] = {
    "json": _json_violation,
    "json_schema": _json_violation,
    "tool_call": _tool_call_violation,
    "regex": lambda answer, pattern: (
        "" if re.fullmatch(pattern, answer.text, re.DOTALL) else f"the text does not match {pattern}"
    ),
    "eos": lambda answer, _: "" if answer.stop == "eos" else f"stopped by {answer.stop} after {len(answer.ids)} tokens",
    "max_tokens": lambda answer, most: "" if len(answer.ids) <= most else f"{len(answer.ids)} tokens, more than {most}",
}

_CODE = """import json, sys
path, kind, value, text = json.load(sys.stdin)
sys.path[:] = path
from pytest_mistral_lora.chat.completions import _CHECKS, AnswerToCheck
print(json.dumps(_CHECKS[kind](AnswerToCheck((), text, "", (), None), value)))"""
