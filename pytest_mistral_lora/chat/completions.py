"""Read tool calls from the ids that a model generated: the way back from what `Oracle.encode` does with them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.mistral_common import Oracle


_ID = re.compile(r"[a-zA-Z0-9]{9}")
_AS_ONE_LIST = ("v2", "v3", "v7")
"""Versions that write all calls of a turn as one JSON list; the later ones write each call after a marker."""
_WITH_ID = ("v3", "v7", "v11")


class MalformedCallError(ValueError):
    """Ids that do not spell tool calls; says what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as it was generated.

    Attributes:
        name: The tool's name.
        arguments: What its arguments parse to.
        id: Its id; None where the tokenizer version writes none.
    """

    name: str
    arguments: Any
    id: str | None


def read_calls(ids: Sequence[int], oracle: Oracle) -> list[Call]:
    """Return the tool calls that a completion makes.

    Args:
        ids: The completion, with or without its closing EOS; text before the first call is allowed.
        oracle: Mistral's own tokenization of the model.

    Raises:
        MalformedCallError: If there is no call, or one that is not written as the tokenizer version writes calls.
    """
    ids = [token for token in ids if token != oracle.eos_id]
    if oracle.tool_calls_id not in ids:
        raise MalformedCallError("no [TOOL_CALLS]")
    calls = ids[ids.index(oracle.tool_calls_id) :]
    return _of_list(calls, oracle) if oracle.version in _AS_ONE_LIST else list(_one_by_one(calls, oracle))


def call_violation(call: Call, tools: Collection[str], version: str) -> str:
    """Return why a call is not well-formed; empty where it is.

    Args:
        call: The call.
        tools: Names of the tools that the conversation has.
        version: The tokenizer version.
    """
    if call.name not in tools:
        return f"no tool is named {call.name!r}"
    if not isinstance(call.arguments, dict):
        return f"the arguments of {call.name} are {json.dumps(call.arguments, ensure_ascii=False)}, not an object"
    if version in _WITH_ID and not _ID.fullmatch(call.id or ""):
        return f"the id of {call.name} is {call.id!r}, not 9 letters and digits"
    return ""


def _of_list(ids: list[int], oracle: Oracle) -> list[Call]:
    if ids.count(ids[0]) > 1:
        raise MalformedCallError("[TOOL_CALLS] twice in one turn")
    calls = _json_at(oracle.decode(ids[1:]))
    if not isinstance(calls, list) or not calls:
        raise MalformedCallError("what follows [TOOL_CALLS] is not a list of calls")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise MalformedCallError(f"not a call: {json.dumps(call, ensure_ascii=False)}")
    return [Call(call["name"], call["arguments"], call.get("id")) for call in calls]


def _one_by_one(ids: list[int], oracle: Oracle) -> Iterator[Call]:
    markers = ["[TOOL_CALLS]", *(["[CALL_ID]"] if oracle.version in _WITH_ID else []), "[ARGS]"]
    runs = list(_marked_runs(ids, oracle))
    for first in range(0, len(runs), len(markers)):
        parts = runs[first : first + len(markers)]
        if [marker for marker, _ in parts] != markers:
            found = "".join(marker for marker, _ in parts)
            raise MalformedCallError(f"a call with the markers {found}, not {''.join(markers)}")
        texts = dict(parts)
        yield Call(texts["[TOOL_CALLS]"], _json_at(texts["[ARGS]"]), texts.get("[CALL_ID]"))


def _marked_runs(ids: list[int], oracle: Oracle) -> Iterator[tuple[str, str]]:
    """Yield each control token with the text that follows it."""
    starts = [index for index, token in enumerate(ids) if token in oracle.control_tokens]
    for start, end in itertools.pairwise([*starts, len(ids)]):
        yield oracle.control_tokens[ids[start]], oracle.decode(ids[start + 1 : end])


def _json_at(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise MalformedCallError(f"not valid JSON: {error}") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


Kind = Literal["json", "json_schema", "tool_call", "regex", "eos", "max_tokens"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Every kind of check."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, as the checks look at it.

    Attributes:
        ids: Its tokens, a closing EOS included.
        text: The same as text, without control tokens.
        stop: `eos`, or `length`.
        tools: The tools that the conversation has, in the OpenAI layout.
        oracle: Mistral's own tokenization of the model; None where there is none, which `tool_call` needs.
    """

    ids: Sequence[int]
    text: str
    stop: str
    tools: Sequence[Mapping[str, Any]]
    oracle: Oracle | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check came to.

    Attributes:
        name: The check's name.
        reason: Why it failed; empty where it passed.
    """

    name: str
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the completion is of that form."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class FormatCheck:
    """One check of a completion's form.

    Attributes:
        kind: What is checked.
        value: The JSON Schema of `json_schema`, the pattern of `regex` (the whole text must match), the tokens of
            `max_tokens` (EOS included); None for the others.
        name: What rates and verdicts call it.
    """

    kind: Kind
    value: Any = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.kind if self.value is None else f"{self.kind}:{_short(self.value)}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FormatCheck:
        """Return the check that `to_json` wrote."""
        return cls(data["kind"], data.get("value"), data["name"])

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain JSON data; `value` is left out where there is none."""
        value = {} if self.value is None else {"value": self.value}
        return {"name": self.name, "kind": self.kind, **value}

    def verdict(self, answer: Answer) -> Verdict:
        """Judge a completion.

        Raises:
            InputError: If `tool_call` is asked for where there is no Mistral tokenizer to read calls with.
        """
        return Verdict(self.name, _CHECKS[self.kind](answer, self.value))


def verdicts(answer: Answer, checks: Iterable[FormatCheck]) -> tuple[Verdict, ...]:
    """Judge a completion by several checks, in their order."""
    return tuple(check.verdict(answer) for check in checks)


def rates(judged: Iterable[Iterable[Verdict]]) -> dict[str, float]:
    """Return for each check the share of completions that passed it, from 0 to 1."""
    passed: dict[str, list[bool]] = {}
    for one in judged:
        for verdict in one:
            passed.setdefault(verdict.name, []).append(verdict.passed)
    return {name: sum(values) / len(values) for name, values in passed.items()}


def schema_violation(schema: Any) -> str:
    """Return why `schema` is not a JSON Schema; empty where it is one."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    if isinstance(schema, bool):
        return ""
    if not isinstance(schema, dict):
        return "it is no object"
    try:
        validator_for(schema, default=_newest()).check_schema(schema)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"
    return ""


def _newest() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator


def _json(answer: Answer, value: Any) -> str:
    return _parsed(answer.text)[1]


def _json_schema(answer: Answer, schema: Any) -> str:
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for

    data, reason = _parsed(answer.text)
    if reason:
        return reason
    error = best_match(validator_for(schema, default=_newest())(schema).iter_errors(data))
    return "" if error is None else f"{error.json_path}: {error.message}"


def _parsed(text: str) -> tuple[Any, str]:
    try:
        return json.loads(text, parse_constant=_refuse_check), ""
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON: {error}"


def _refuse_check(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _tool_call(answer: Answer, value: Any) -> str:
    if answer.oracle is None:
        raise InputError(
            "there is no Mistral tokenizer to read tool calls with",
            place="the check tool_call",
            expected="a checkpoint with tekken.json or tokenizer.model.vN",
        )
    names = {tool["function"]["name"] for tool in answer.tools}
    version = answer.oracle.version
    try:
        calls = read_calls(answer.ids, answer.oracle)
    except MalformedCallError as error:
        return str(error)
    return next((wrong for call in calls if (wrong := call_violation(call, names, version))), "")


def _regex(answer: Answer, pattern: Any) -> str:
    return "" if re.fullmatch(pattern, answer.text, re.DOTALL) else f"the text does not match {pattern}"


def _eos(answer: Answer, value: Any) -> str:
    return "" if answer.stop == "eos" else f"stopped by {answer.stop} after {len(answer.ids)} tokens"


def _max_tokens(answer: Answer, most: Any) -> str:
    return "" if len(answer.ids) <= most else f"{len(answer.ids)} tokens, more than {most}"


_CHECKS: dict[Kind, Callable[[Answer, Any], str]] = {
    "json": _json,
    "json_schema": _json_schema,
    "tool_call": _tool_call,
    "regex": _regex,
    "eos": _eos,
    "max_tokens": _max_tokens,
}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
