"""The findings of one row of a dataset: laws of its encoding, signs of another pipeline, calls of tools."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import SOUND, found, make_target, said, v3, write_rows

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.conformance.dataset.checks import dataset_results, file_results
from pytest_mistral_lora.conformance.dataset.row_findings import call_findings, law_findings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.places import Place


def test_the_laws_of_an_encoded_row_are_held_against_every_row() -> None:
    oracle = v3().oracle
    row = parse_row(SOUND[2], place=Place.of("rows.jsonl", 3))
    encoded = oracle.encode(row)
    assert list(law_findings(row, encoded, oracle)) == []
    last = encoded.spans[-1]
    without_eos = replace(encoded, labels=(*(encoded.labels or ())[: last.start], -100))
    broken = list(law_findings(row, without_eos, oracle))
    assert {finding.rule for finding in broken} == {"ML101", "ML104", "ML107"}
    assert {str(finding.place) for finding in broken} == {"rows.jsonl:3"}


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("weight", [0, 1])
def test_rows_with_tools_and_weights_are_held_to_the_laws_of_all_rows(weight: int) -> None:
    oracle = v3().oracle
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [CALL], "weight": weight},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    row = parse_row({"messages": messages, "tools": TOOLS})
    encoded = oracle.encode(row)
    assert list(law_findings(row, encoded, oracle)) == []
    ids, labels = (*encoded.input_ids[:-2], 1000, 2), (*(encoded.labels or ())[:-2], 5, -100)
    other = replace(encoded, input_ids=ids, labels=labels)
    expected = {"ML101", "ML104", "ML109"} | ({"ML107"} if weight else set())
    assert {finding.rule for finding in law_findings(row, other, oracle)} == expected


def test_rows_of_every_kind_keep_the_laws(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"},
        {"role": "assistant", "content": "b\u2581c "},
    ]
    mixed = {"messages": [*messages, {"role": "assistant", "content": "d", "weight": 0}, *messages], "tools": TOOLS}
    weighted = said("a", "b", "c", "d")
    weighted["messages"][1]["weight"] = 0
    results = dataset_results(make_target(tmp_path, [weighted, mixed, {"messages": messages, "tools": TOOLS}]))
    assert results["laws-hold"] == Result()


SPEAKING = {
    "escapes": [
        'In JSON you may write `caf\\u00e9` or "caf\\u00e9" for café.',
        "Match Han with [\\u4e00-\\u9fff]+, and print '\\u4f60\\u597d'.",
        '{"city": "Z\\u00fcrich", "note": "one\\ntwo"}',
        "<p>Caf&eacute; &amp; bar</p>",
        "AT&T; a&b; and &hellip; is an entity. C:\\Users\\U0 has none.",
    ],
    "line breaks": [
        "A line ends with \\n, on Windows with \\r\\n, as in `a\\nb`.",
        'print("Hello.\\nBye.\\n") prints two lines.',
        "$a\\neq b \\nRightarrow c$, C:\\new\\notes, (\\n)",
        "x\\neq y, y\\nleq z, and z\\notin M; the folder is docs\\new",
        "split(',\\n') and join('\\n\\n')",
    ],
    "markers": [
        "ChatML opens a turn with <|im_start|> and ends it with <|im_end|> before a newline.",
        "```\n<|im_start|>user\nHi<|im_end|>\n```",
        "Write `### Instruction:` above it.\n\n### Notes\n\nNone.",
        "`<start_of_turn>` is Gemma's, <|eot_id|> is Llama's, and <s> is ours.",
        "Human: Hello.\nAssistant: Hi! That is a dialogue.",
        "<\uff5cUser\uff5c> opens a turn of DeepSeek, and <\uff5cAssistant\uff5c> the next.",
        "gpt-oss opens a turn with <|start|>user<|message|> and ends it with <|end|>, it says.",
        "Compose with f <| g |> h, or with <|> alone; `<tool_call>` is a tag of Qwen's.",
        "User: is a label, and so is Assistant: in this sentence.",
        "<PRE>\nkept lines\n</PRE> is a tag of HTML.",
        "The merchant's number goes into <MID>, and the ending into <SUF>",
        "Code Llama fills a gap by `<PRE> a <SUF> b <MID>`.",
    ],
    "thoughts": ["R1 writes <think> first.", "`<think>x</think>` is its form.", "I think, therefore I am. <thinking>"],
}


@pytest.mark.parametrize("subject", SPEAKING)
def test_rows_that_speak_of_signs_are_no_signs(subject: str, tmp_path: Path) -> None:
    rows = [said(f"{number}: {text}", text) for number, text in enumerate(SPEAKING[subject])]
    results = dataset_results(make_target(tmp_path, [*rows, *SOUND]))
    assert {finding.rule for finding in found(results)} <= {"ML612"}


def test_one_row_in_a_file_is_a_note_and_many_in_one_of_two_files_are_an_error(tmp_path: Path) -> None:
    plain = [said(f"Question {number}?", f"Answer {number} für dich.") for number in range(20)]
    one = said("Where do we meet?", "In the caf\\u00e9.")
    [note] = found(dataset_results(make_target(tmp_path, [*plain, one])), "ML624", "ML625")
    assert (note.rule, str(note.place)) == ("ML625", f"{tmp_path / 'rows.jsonl'}:21, messages[1].content")
    many = [said(f"Where do we meet at {number}?", f"In caf\\u00e9 {number}.") for number in range(4)]
    findings = found(dataset_results(make_target(tmp_path, plain, many)), "ML624", "ML625")
    assert [finding.rule for finding in findings] == ["ML624"] * 4


TURNS = [
    "<|im_start|>user\nHi {}<|im_end|>",
    "<|start_header_id|>user<|end_header_id|>\n\nHi {}<|eot_id|>",
    "<start_of_turn>user\nHi {}<end_of_turn>",
    "<|user|>\nHi {}<|end|>",
    "<<SYS>>\nBe brief.\n<</SYS>>\n\nHi {}",
    "<|start_of_role|>user<|end_of_role|>Hi {}<|end_of_text|>",
    "<|start|>user<|message|>Hi {}<|end|>",
    "<|start|>functions.now to=assistant<|channel|>commentary<|message|>Hi {}<|end|>",
    "<|channel|>final<|message|>Hi {}<|return|>",
    "<\uff5cUser\uff5c>Hi {}",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>Be brief.<\uff5cUser\uff5c>Hi {}<\uff5cAssistant\uff5c>",
    "<\uff5cAssistant\uff5c>Hi {}<\uff5cend\u2581of\u2581sentence\uff5c>",
    # gaps of Code Llama, StarCoder, Qwen and DeepSeek-Coder
    "<PRE> def area_{}(a, b): <SUF> return area <MID>",
    "<PRE> <SUF> return area <MID> def area_{}(a, b):",
    "<fim_prefix>def area_{}(a, b):<fim_suffix>return area<fim_middle>",
    "<|fim_prefix|>def area_{}(a, b):<|fim_suffix|>return area<|fim_middle|>",
    "<\uff5cfim\u2581begin\uff5c>def area_{}(a, b):<\uff5cfim\u2581hole\uff5c>return area<\uff5cfim\u2581end\uff5c>",
]
PARTS = [
    "Hi {}<|im_end|>",
    "<|im_start|>user\nHi {}",
    "### Instruction:\nHi {}\n\n### Response:\n",
    "Hi {}<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>Hi {}",
    "Hi {}<|return|>",
    "User: Hi {}\nAssistant:",
    "<fim_prefix>def area_{}(a, b):",
]


@pytest.mark.parametrize(("text", "severity"), [*((t, "error") for t in TURNS), *((t, "note") for t in PARTS)])
def test_a_complete_turn_of_another_family_is_an_error(text: str, severity: str, tmp_path: Path) -> None:
    rows = [said(text.format(number), f"Hello {number}.") for number in range(3)]
    many = found(dataset_results(make_target(tmp_path, [*rows, *SOUND])), "ML628", "ML629")
    assert {(finding.rule, finding.severity) for finding in many} == {("ML628", severity)}
    one = found(dataset_results(make_target(tmp_path, [*rows[:1], *SOUND])), "ML628", "ML629")
    assert [(finding.rule, finding.severity) for finding in one] == [("ML629", "note")]


def test_the_errors_behind_many_notes_are_kept(tmp_path: Path) -> None:
    notes = [said(f"Hi {number}<|im_end|>", f"Hello {number}.") for number in range(30)]
    errors = [said(TURNS[0].format(number), f"Yes {number}.") for number in range(30)]
    findings = found(dataset_results(make_target(tmp_path, [*notes, *errors])), "ML628")
    assert str(findings[0].place) == f"{tmp_path / 'rows.jsonl'}:31, messages[0].content"
    assert sum(finding.more or 1 for finding in findings if finding.severity == "error") == 30
    assert sum(finding.more or 1 for finding in findings if finding.severity == "note") == 30


def test_an_instruction_beside_the_turn_asks_for_none(tmp_path: Path) -> None:
    rows = [said(TURNS[0].format(f"in JSON {n}"), f"Hello {n}.", system="Answer in JSON format.") for n in range(3)]
    findings = found(dataset_results(make_target(tmp_path, rows)), "ML628")
    assert {finding.severity for finding in findings} == {"error"}


def test_line_breaks_in_letters_are_a_note(tmp_path: Path) -> None:
    rows = [said(f"What is thing {number}?", f"It is {number}.\\nThat is all.") for number in range(20)]
    findings = found(dataset_results(make_target(tmp_path, rows)))
    assert {(finding.rule, finding.severity) for finding in findings} == {("ML626", "note")}


@pytest.mark.parametrize(("lost", "severity"), [(1, ""), (2, ""), (3, "error")])
def test_lost_letters_are_an_error_beyond_a_twentieth_of_the_answers(lost: int, severity: str, tmp_path: Path) -> None:
    rows = [
        said(f"Where is {n}?", f"In the caf{chr(0xFFFD) if n < lost else 'é'} {n}.", "And?", f"{n}.") for n in range(20)
    ]
    findings = found(dataset_results(make_target(tmp_path, rows)), "ML636")
    assert [finding.severity for finding in findings] == [severity] * bool(severity)
    if findings:
        assert "in 3 of 40 answers (7.5%)" in findings[0].found


def test_letters_that_a_prompt_has_lost_are_no_lost_answers(tmp_path: Path) -> None:
    rows = [said(f"Is caf\ufffd {number} whole?", f"A letter of caf\ufffd {number} is lost.") for number in range(20)]
    assert found(dataset_results(make_target(tmp_path, rows)), "ML636") == []


HOME = {"type": "object", "properties": {"city": {"type": "string"}, "age": {"type": ["integer", "null"]}}}


@pytest.mark.parametrize(
    ("answer", "kind", "found_at"),
    [
        ("null", "json_schema", "'null' at $"),
        ("None", "json_schema", "'None' at $"),
        ('{"city": null}', "json_schema", "'null' at $.city"),
        ('{"city": NaN}', "json_schema", "'NaN' at $"),
        ("N/A", "json_object", "'N/A' at $"),
        ('{"city": "Rome", "age": null}', "json_schema", ""),
        # JSON Schema allows further keys
        ('{"city": "Rome", "town": null}', "json_schema", ""),
        ("Rome", "json_schema", ""),
        ("null", "text", ""),
    ],
)
def test_a_word_for_no_value_is_an_error_if_the_schema_forbids_it(
    answer: str, kind: str, found_at: str, tmp_path: Path
) -> None:
    named = {"json_schema": {"name": "home", "schema": HOME}} if kind == "json_schema" else {}
    row = {**said("Extract the city.", answer), "response_format": {"type": kind, **named}}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    findings = found(file_results(path, v3()), "ML643")
    assert [(finding.severity, str(finding.place)) for finding in findings] == [
        ("error", f"{path}:1, messages[1].content")
    ] * bool(found_at)
    assert all(finding.found.startswith(f"{found_at}, ") for finding in findings)


def cut_call(arguments: str, *, weight: int = 1, parameters: Any = TOOLS[0]["function"]["parameters"]) -> Finding:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call], "weight": weight}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    [finding] = call_findings(parse_row({"messages": messages, "tools": tools}))
    assert (finding.rule, str(finding.place)) == ("ML619", "messages[1].tool_calls[0].function.arguments")
    return finding


WHOLE = r'{"a": ["\u00e9\n", -1.5e-3, true, null], "b": {"c": false}}'


@pytest.mark.parametrize("length", range(1, len(WHOLE)))
def test_arguments_that_were_cut_are_an_error(length: int) -> None:
    assert cut_call(WHOLE[:length]).severity == "error"
    # as ids have them
    assert cut_call(json.dumps(WHOLE[:length])).severity == "error"


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ("{'city': 'Os", {}),
        (json.dumps("{'city': 'Os"), {}),
        (json.dumps('{"city": "Oslo"}'), {}),
        ('{"city": Os', {}),
        ('{"city": "Oslo"} and', {}),
        ('{"city": .', {}),
        ('{"city": "\\q\\u', {}),
        ('["Os', {}),
        ('{"city": "Os', {"weight": 0}),
        ('{"city": "Os', {"parameters": {}}),
    ],
)
def test_other_arguments_that_are_no_json_are_a_note(arguments: str, keys: dict[str, Any]) -> None:
    assert cut_call(arguments, **keys).severity == "note"


LATEST = "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}},
        {"$ref": "#"},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
        {"properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}},
        {"properties": {"a": {"pattern": "("}}},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {"b": {}}, "$ref": "#/$defs/b"},
        {"properties": {"a": True}, "patternProperties": {"^x": {}}, "additionalProperties": False},
        {"patternProperties": {"(a+)+$": {"type": "integer"}}, "additionalProperties": False},
        {"$schema": LATEST, "properties": {"a": {"type": "string", "items": [{"type": "string"}]}}},
        *({"$schema": odd, "properties": {"a": {"type": "string"}}} for odd in (5, [], {}, None)),
        # the backend `chat-template` alone takes tools that are no JSON Schema
        {"type": "strng"},
        {"properties": {"n": {"multipleOf": 0.5}}},
        {"properties": 5},
        {"properties": {"a": 5}},
        {"properties": {"a": {"$ref": 5}}},
        {"properties": {"a": {"enum": 5}}},
        {"anyOf": [5]},
        {"allOf": {"a": 1}},
        {"required": 5},
        {"$id": 5, "$ref": "#/x"},
    ],
)
def test_a_schema_that_cannot_be_followed_judges_nothing(schema: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"a": "a" * 40 + "!", "a" * 40 + "!": "b", "n": 10**400}
    arguments = {"a": "a"} if "additionalProperties" in schema else arguments
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert list(call_findings(parse_row({"messages": messages, "tools": tools}))) == []


def test_a_number_that_no_float_holds_is_not_judged() -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": 10**400}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    schema = {"properties": {"a": {"multipleOf": 0.5}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert list(call_findings(parse_row({"messages": messages, "tools": tools}))) == []


def test_results_of_parallel_calls_may_come_in_any_order() -> None:
    calls = [{"id": name * 9, "type": "function", "function": {"name": name, "arguments": {}}} for name in "fgh"]
    results = [{"role": "tool", "tool_call_id": name * 9, "name": name, "content": "1"} for name in "hfg"]
    turns = [{"role": "assistant", "tool_calls": calls[:2]}, {"role": "assistant", "tool_calls": calls[2:]}, *results]
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in "fgh"]
    messages = [{"role": "user", "content": "a"}, *turns, {"role": "assistant", "content": "b"}]
    assert list(call_findings(parse_row({"messages": messages, "tools": tools}))) == []
    without_ids = [{**call, "id": None} for call in calls[:1]]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": without_ids}, results[1]]
    assert list(call_findings(parse_row({"messages": messages, "tools": tools}))) == []
