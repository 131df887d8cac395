"""Each check of a completion's form passes what is of that form, and says why something else is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pytest_mistral_lora.chat.completions import (
    KINDS,
    AnswerToCheck,
    FormatCheck,
    FormatVerdict,
    Kind,
    pass_rates,
    schema_violation,
    verdicts,
)
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import InputError

SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '[{"name": "weather", "arguments": {}, "id": "abcdefghi"}]'


def said(text: str, *, stop: str = "eos", tokens: int = 3) -> AnswerToCheck:
    return AnswerToCheck(range(tokens), text, stop, (), None)


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad", "reason"),
    [
        ("json", None, said('{"a": 1}'), said('{"a": 1'), "not valid JSON"),
        ("json", None, said(" [1] "), said("[NaN]"), "NaN is not valid JSON"),
        ("json", None, said("null"), said(""), "not valid JSON"),
        ("json", None, said("1"), said("[" * 100_000), "not valid JSON"),
        ("json_schema", SCHEMA, said('{"city": "Rome"}'), said('{"city": 1}'), "$.city: 1 is not of type 'string'"),
        ("json_schema", SCHEMA, said('{"city": ""}'), said("{}"), "'city' is a required property"),
        ("json_schema", SCHEMA, said('{"city": ""}'), said("Rome"), "not valid JSON"),
        ("regex", r"\d+", said("12"), said("12 "), "does not match"),
        ("regex", "a.*b", said("a\nb"), said("xab"), "does not match"),
        ("eos", None, said("a"), said("a", stop="length"), "stopped by length after 3 tokens"),
        ("max_tokens", 3, said("a"), said("a", tokens=4), "4 tokens, more than 3"),
    ],
)
def test_a_check_passes_its_form_and_no_other(
    kind: Kind, value: Any, good: AnswerToCheck, bad: AnswerToCheck, reason: str
) -> None:
    check = FormatCheck(kind, value)
    assert check.verdict(good) == FormatVerdict(check.name, "")
    assert reason in check.verdict(bad).reason
    assert not check.verdict(bad).passed
    assert FormatCheck.from_json(check.to_json()) == check


def test_a_tool_call_is_read_from_ids(oracle_of: Callable[[str], Oracle]) -> None:
    oracle, check = oracle_of("spm-v3"), FormatCheck("tool_call")

    def judged(*ids: int, tools: tuple[Any, ...] = (WEATHER,)) -> str:
        return check.verdict(AnswerToCheck(ids, oracle.decode(ids), "eos", tools, oracle)).reason

    spelled = oracle.encode_text(CALL)
    assert judged(oracle.tool_calls_id or 0, *spelled, oracle.eos_id) == ""
    assert judged(*spelled, oracle.eos_id) == "no [TOOL_CALLS]"
    assert "no tool is named 'weather'" in judged(oracle.tool_calls_id or 0, *spelled, tools=())
    with pytest.raises(InputError, match="no Mistral tokenizer"):
        check.verdict(said("x"))


def test_names_and_rates() -> None:
    checks = [FormatCheck("eos"), FormatCheck("max_tokens", 4), FormatCheck("regex", "x" * 60)]
    assert [check.name for check in checks] == ["eos", "max_tokens:4", f"regex:{'x' * 39}…"]
    judged = [verdicts(one, checks[:2]) for one in (said("a"), said("b", stop="length", tokens=9), said("c", tokens=5))]
    assert pass_rates(judged) == {"eos": pytest.approx(2 / 3), "max_tokens:4": pytest.approx(1 / 3)}
    assert pass_rates([]) == {}


DEEP: dict[str, Any] = {}
for _ in range(500):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("schema", "wrong"),
    [
        (SCHEMA, False),
        (True, False),
        ([], True),
        ({"type": "objekt"}, True),
        ({"$schema": 5}, True),
        pytest.param(DEEP, True, id="deep"),
    ],
)
def test_schemas_are_checked(schema: Any, wrong: bool) -> None:
    assert bool(schema_violation(schema)) is wrong


@pytest.mark.parametrize(
    ("schema", "text", "reason"),
    [
        ({"$ref": "#/definitions/city"}, "{}", "PointerToNowhere"),
        ({"$ref": "#"}, "{}", "maximum recursion depth"),
        ({"items": {"$ref": "#"}}, "[" * 400 + "]" * 400, "maximum recursion depth"),
        ({"multipleOf": 0.5}, "1e999", "cannot convert Infinity"),
        ({"multipleOf": 0.5}, "1" * 4000, "int too large"),
    ],
    ids=["nowhere", "circle", "deep answer", "infinity", "long number"],
)
def test_a_check_that_cannot_run_fails_with_its_reason(schema: Any, text: str, reason: str) -> None:
    found = FormatCheck("json_schema", schema).verdict(said(text)).reason
    assert found.startswith("the check cannot run: ")
    assert reason in found


def test_a_schema_elsewhere_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", opened.append)
    check = FormatCheck("json_schema", {"$ref": "http://127.0.0.1:9/schema.json"})
    assert "the check cannot run: Unresolvable" in check.verdict(said("{}")).reason
    assert opened == []


def test_every_kind_has_a_test() -> None:
    assert set(KINDS) == {"json", "json_schema", "tool_call", "regex", "eos", "max_tokens"}


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("regex", "(a+)+b", "a" * 60),
        ("json_schema", {"properties": {"x": {"pattern": "^(a+)+b$"}}}, '{"x": "' + "a" * 60 + '"}'),
    ],
)
def test_a_pattern_that_backtracks_is_ended(kind: Kind, value: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_mistral_lora.chat.reading.files.PATTERN_SECONDS", 0.5)
    assert "a pattern takes more than 0.5 s" in FormatCheck(kind, value).verdict(said(text)).reason


def test_a_pattern_of_a_schema_is_checked_and_a_broken_one_is_named() -> None:
    schema = {"properties": {"x": {"pattern": "^a$"}}}
    assert FormatCheck("json_schema", schema).verdict(said('{"x": "a"}')).passed
    assert "does not match" in FormatCheck("json_schema", schema).verdict(said('{"x": "b"}')).reason
    assert "the check cannot run: " in FormatCheck("regex", "(").verdict(said("x")).reason
