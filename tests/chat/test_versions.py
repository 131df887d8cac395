"""The table of versions against mistral-common: each fact is read from what its own encoder writes for a row."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import DERIVED, derived_tokenizer
from each_oracle import ALL, oracle_named
from mistral_common.exceptions import InvalidToolMessageException, MistralCommonException
from mistral_common.protocol.instruct.chunk import ImageURLChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion

import pytest_mistral_lora
from pytest_mistral_lora.chat.oracle import Oracle, versions
from pytest_mistral_lora.chat.oracle.versions import TABLE, VERSIONS, VersionFacts, names_with, version_facts
from pytest_mistral_lora.conformance.mask.checks import LAWS
from pytest_mistral_lora.errors import TokenizerError
from pytest_mistral_lora.records import goldens

PACKAGE = Path(pytest_mistral_lora.__file__).parent
USERS = ({"role": "user", "content": "First?"}, {"role": "user", "content": "Second?"})
ANSWER = {"role": "assistant", "content": "Answer."}
THOUGHT = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"}]
TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}
IDS = ("abcdefgh1", "abcdefgh2")
BESIDE = {"<s>", "</s>", "[PREFIX]", "[SUFFIX]", "[THINK]", "[/THINK]"}
"""Control tokens that are no fact of a version: those of every version, of infilling, and of files that think."""


def call(*ids: str | None, **more: Any) -> dict[str, Any]:
    calls = [{"id": call_id, "type": "function", "function": {"name": "probe", "arguments": {}}} for call_id in ids]
    return {"role": "assistant", "tool_calls": calls, **more}


def result(call_id: str | None, content: Any = "plain") -> dict[str, Any]:
    return {"role": "tool", "name": "probe", "tool_call_id": call_id, "content": content}


def written(oracle: Oracle, *messages: Mapping[str, Any], **more: Any) -> str | None:
    """Return what mistral-common itself writes for a row, its control tokens spelled; None if it refuses the row."""
    try:
        ids = oracle.reference({"messages": list(messages), **more})
    except (MistralCommonException, ValueError, AssertionError):
        return None
    runs = groupby(ids, oracle.control_tokens.__contains__)
    texts = [[*run] if is_control else [oracle.decode([*run])] for is_control, run in runs]
    return "".join(oracle.control_tokens.get(part, part) for run in texts for part in run)


def between(text: str | None, start: str, end: str) -> str | None:
    if text is None or start not in text:
        return None
    return text.partition(start)[2].partition(end)[0].strip()


def control_tokens(oracle: Oracle) -> frozenset[str]:
    """Return the control tokens that an encoder of the version looks up when it is made."""
    asked: list[str] = []
    lookup = oracle._text.get_special_token

    def get_special_token(literal: str) -> int:
        asked.append(literal)
        return int(lookup(literal))

    oracle._text.get_special_token = get_special_token
    try:
        type(oracle._instruct)(oracle._text)
    finally:
        del oracle._text.get_special_token
    return frozenset(asked) - BESIDE


def system_in(oracle: Oracle) -> str:
    row = {"messages": [{"role": "system", "content": "System."}, USERS[0], ANSWER, USERS[1], ANSWER]}
    [role_and_turn] = {(part.role, part.turn) for part in oracle.traced_texts(row) if "System." in (part.text or "")}
    first = min(part.turn for part in oracle.traced_texts(row) if part.role == "user" and part.turn is not None)
    return {("system", 0): "own-turn", ("user", first): "first-user-turn"}.get(role_and_turn, "last-user-turn")


def opens_with_user(oracle: Oracle) -> bool:
    encoded = oracle.encode({"messages": [{"role": "system", "content": "System."}, ANSWER]})
    return any(span.role == "user" for span in encoded.spans)


def tools_in(oracle: Oracle) -> str | None:
    text = written(oracle, USERS[0], ANSWER, USERS[1], ANSWER, tools=[TOOL]) or ""
    if "probe" not in text:
        return None
    return "first-user-turn" if text.index("probe") < text.index("First?") else "last-user-turn"


def written_call(oracle: Oracle) -> str | None:
    return between(written(oracle, USERS[0], call(IDS[0]), result(IDS[0]), ANSWER), "[TOOL_CALLS]", "</s>")


def calls_as(oracle: Oracle) -> str | None:
    text = written_call(oracle)
    if text is None:
        return None
    if isinstance(json.loads(text) if text.startswith("[{") else None, list):
        return "list"
    assert text.endswith("[ARGS]{}") or "[ARGS]" in text
    return "markers"


def call_ids(oracle: Oracle) -> str | None:
    takes = {
        name: written(oracle, USERS[0], call(call_id), result(call_id), ANSWER) is not None
        for name, call_id in (("optional", None), ("any", "any form!"), ("nine", IDS[0]))
    }
    return next((name for name, taken in takes.items() if taken), None)


def keeps_calls(oracle: Oracle) -> bool:
    text = written(oracle, USERS[0], call(IDS[0]), result(IDS[0]), ANSWER, USERS[1], ANSWER) or ""
    return "probe" in text and "plain" in text


def results_as(oracle: Oracle) -> str | None:
    text = between(written(oracle, USERS[0], call(IDS[0]), result(IDS[0]), ANSWER), "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
    forms = {
        json.dumps([{"name": "probe", "content": "plain"}]): "name",
        json.dumps({"content": "plain", "call_id": IDS[0]}): "id",
        f"{IDS[0]}[TOOL_CONTENT]plain": "id-and-text",
        "plain": "text",
    }
    return None if text is None else forms[text]


def result_chunks(oracle: Oracle) -> bool:
    if tools_in(oracle) is None:
        return False
    image = ImageURLChunk(image_url="https://example.org/a.png")
    messages = [
        UserMessage(content="First?"),
        AssistantMessage(tool_calls=[ToolCall(id=IDS[0], function=FunctionCall(name="probe", arguments="{}"))]),
        ToolMessage(name="probe", tool_call_id=IDS[0], content=[image]),
    ]
    try:
        get_validator(oracle._text.version, ValidationMode.test).validate_request(
            ChatCompletionRequest(messages=messages)
        )
    except InvalidToolMessageException:
        return False
    return True


def sorts_results(oracle: Oracle) -> bool:
    results = [result(call_id, f"of {call_id}") for call_id in IDS]
    texts = [written(oracle, USERS[0], call(*IDS), *order, ANSWER) for order in (results, results[::-1])]
    return texts[0] is not None and texts[0] == texts[1]


def joint(oracle: Oracle) -> str | None:
    chunks = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    text = written(oracle, {"role": "user", "content": chunks}, ANSWER)
    return between(f"{text}".replace("\n", "|"), "One.", "Two.")


def thinking_oracle(oracle: Oracle) -> Oracle:
    """Return a tokenizer of the same version whose vocabulary has the markers of thinking, if it can have them."""
    name = next((name for name in DERIVED if oracle_named(name) is oracle), None)
    if name is None or "[THINK]" in oracle.control_tokens.values():
        return oracle
    path = derived_tokenizer(name)
    text = path.read_text("utf-8").replace("<SPECIAL_30>", "[THINK]").replace("<SPECIAL_31>", "[/THINK]")
    folder = path.parent / "thinking"
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(text, "utf-8")
    return Oracle(folder / "tekken.json")


DERIVATIONS: Mapping[str, Callable[[Oracle], Any]] = {
    "name": lambda oracle: oracle._text.version.value,
    "control_tokens": control_tokens,
    "system_in": system_in,
    "opens_with_user": opens_with_user,
    "tools_in": tools_in,
    "calls_as": calls_as,
    "writes_call_ids": lambda oracle: IDS[0] in (written_call(oracle) or ""),
    "call_ids": call_ids,
    "parallel_calls": lambda oracle: written(oracle, USERS[0], call(*IDS), *map(result, IDS), ANSWER) is not None,
    "keeps_calls": keeps_calls,
    "text_beside_calls": lambda oracle: (
        written(oracle, USERS[0], call(IDS[0], content="Text."), result(IDS[0]), ANSWER) is not None
    ),
    "results_as": results_as,
    "result_chunks": result_chunks,
    "sorts_results": sorts_results,
    "joint": lambda oracle: str(joint(oracle)).replace("|", "\n"),
    "strips_answers": lambda oracle: f"{written(oracle, USERS[0], {**ANSWER, 'content': 'b  '})}".endswith("b</s>"),
    "thinking": lambda oracle: (
        written(thinking_oracle(oracle), USERS[0], {"role": "assistant", "content": THOUGHT}) is not None
    ),
    "system_thinking": lambda oracle: (
        written(thinking_oracle(oracle), {"role": "system", "content": THOUGHT}, USERS[0], ANSWER) is not None
    ),
    "plain_thinking": lambda oracle: "<think>" in oracle.chat_template(),
    "settings": lambda oracle: "[MODEL_SETTINGS]" in f"{written(oracle, USERS[0], ANSWER, reasoning_effort='high')}",
}
"""Reads each fact from a tokenizer by mistral-common alone."""


@pytest.mark.parametrize("fact", DERIVATIONS)
def test_each_fact_is_what_mistral_common_does(fact: str) -> None:
    found = {name: DERIVATIONS[fact](oracle_named(name)) for name in ALL}
    assert found == {name: getattr(oracle_named(name).facts, fact) for name in ALL}


def test_each_fact_of_each_version_is_derived() -> None:
    assert [*DERIVATIONS] == [field.name for field in fields(VersionFacts)]
    assert {oracle_named(name).facts for name in ALL} == {*VERSIONS}
    known = [version.value for version in TokenizerVersion]
    assert [facts.name for facts in VERSIONS] == [name for name in known if name in {one.name for one in VERSIONS}]


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> str:
    """The newest version, which is taken out of the table."""
    *older, facts = VERSIONS
    monkeypatch.setattr(versions, "VERSIONS", tuple(older))
    return facts.name


def test_a_tokenizer_of_an_unknown_version_is_refused_with_what_to_do(newest: str) -> None:
    path = derived_tokenizer(f"derived-{newest}")
    with pytest.raises(TokenizerError) as caught:
        Oracle(path)
    assert str(caught.value.place) == str(path)
    assert f"version {newest} " in caught.value.found
    assert caught.value.expected == f"one of {', '.join(facts.name for facts in VERSIONS[:-1])}"
    assert TABLE in caught.value.next_step
    assert "pip install --upgrade pytest-mistral-lora" in caught.value.next_step
    assert (PACKAGE.parent / TABLE).samefile(str(versions.__file__))


def test_a_packaged_row_of_an_unknown_version_names_the_table(newest: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(TABLE)) as caught:
        goldens.packaged_cases()
    assert "cases.json, " in str(caught.value.place)


def test_the_versions_of_a_fact_in_words() -> None:
    assert names_with(lambda facts: facts.thinking, from_then_on="from {} on") == "from v13 on"
    assert names_with(lambda facts: facts.call_ids == "nine", from_then_on="") == "v3, v7, v11"
    assert names_with(lambda facts: facts.plain_thinking, from_then_on="", only="of {}") == "of v11"
    assert names_with(lambda facts: facts.name == "v17", from_then_on="") == "no known version"


def test_a_law_that_does_not_hold_names_the_versions_that_it_holds_for() -> None:
    laws = {law.rule: law for law in LAWS}
    oldest = oracle_named("spm-v1")
    reasons = {rule: law.unfit(oldest) for rule, law in laws.items() if law.unfit(oldest)}
    first = {rule: reason.removeprefix("tokenizer v1: this law holds for ") for rule, reason in reasons.items()}
    known = {
        **dict.fromkeys(("ML107", "ML110"), "v2 and later"),
        "ML123": "v7 and later",
        "ML125": "v13 and later",
    }
    assert first == known


def spelled_versions(source: str) -> list[int]:
    """Return the lines of a module that spell a version, other than to ask the table for it."""
    if not re.search(r"""["']v\d+["']""", source):
        return []  # to parse it takes far longer
    tree = ast.parse(source)
    asked = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "version_facts"
        for argument in node.args
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.fullmatch(r"v\d+", f"{node.value}") and id(node) not in asked
    ]


def test_no_other_module_spells_a_version() -> None:
    # a reproduction makes a tokenizer file of the version that has the fault
    modules = [
        path for path in PACKAGE.rglob("*.py") if path != PACKAGE.parent / TABLE and path.parent.name != "reproductions"
    ]
    sources = {str(path): path.read_text("utf-8") for path in modules}
    assert {path: lines for path, source in sources.items() if (lines := spelled_versions(source))} == {}
    assert spelled_versions('version_facts("v7")') == []
    assert spelled_versions('if version == "v15":\n    pass') == [1]


def test_an_unknown_version_has_no_facts() -> None:
    with pytest.raises(TokenizerError, match="tokenizer version v17 is not supported"):
        version_facts("v17")
