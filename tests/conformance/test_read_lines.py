"""Lines without messages: padded, packed, cut, of another tokenizer; the ids are read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from encoded_files import Data, audit_findings, audit_rules, number_line, write_lines

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.audit import OF_CHAT_ROWS, Audit
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.formats.row_sources import FileRows


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Target("spm-v3").oracle


@pytest.fixture
def lines(oracle: Oracle) -> list[Data]:
    return [bare(number_line(oracle, number)) for number in range(3)]


def bare(line: Data) -> Data:
    return {key: line[key] for key in ("input_ids", "labels")}


def packed(lines: Sequence[Data]) -> Data:
    joined = {key: [value for line in lines for value in line[key]] for key in ("input_ids", "labels")}
    return joined | {"position_ids": [n for line in lines for n in range(len(line["input_ids"]))]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 2, 32768], ids=["unk", "eos", "added"])
def test_padding_is_left_out(side: str, pad: int, lines: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    for count, line in enumerate(lines, start=1):
        size = len(line["input_ids"])
        values = {
            "input_ids": (line["input_ids"], pad),
            "labels": (line["labels"], -100),
            "attention_mask": ([1] * size, 0),
        }
        for key, (own, padding) in values.items():
            line[key] = [padding] * count + own if side == "left" else own + [padding] * count
    assert audit_rules(write_lines(tmp_path, lines), oracle) == []


def test_a_packed_sequence_is_read_conversation_by_conversation(
    lines: list[Data], tmp_path: Path, oracle: Oracle
) -> None:
    audit = Audit(FileRows(write_lines(tmp_path, [packed(lines)])), oracle)
    assert [verdict.state for verdict in audit.verdicts()] == ["sound", "sound"]
    assert (audit.totals.figures.packed, audit.totals.figures.read_back) == (1, 1)
    lines[1]["labels"][-1] = -100
    [finding] = audit_findings(write_lines(tmp_path, [packed(lines)]), oracle)
    assert finding.rule == "ML546"
    assert str(finding.place).endswith(":1, conversations[1]")


def test_a_conversation_that_cannot_be_read_hides_no_other(lines: list[Data], tmp_path: Path, oracle: Oracle) -> None:
    start = len(lines[0]["input_ids"])
    lines[1] = {key: values[:3] for key, values in lines[1].items()}
    lines[2]["labels"][-1] = -100
    findings = audit_findings(write_lines(tmp_path, [packed(lines)]), oracle)
    found = {finding.rule: finding for finding in findings}
    assert found.keys() == {"ML560", "ML546"}
    assert str(found["ML560"].place).endswith("conversations[1]")
    assert found["ML560"].found.startswith(f"token {start + 3}: the ids end within")
    assert str(found["ML546"].place).endswith("conversations[2]")


def test_rows_without_labels_in_an_answer_are_counted(tmp_path: Path, oracle: Oracle) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    encoded = oracle.encode({"messages": messages})
    line = {"input_ids": [*encoded.input_ids], "labels": [*(encoded.labels or ())]}
    audit = Audit(FileRows(write_lines(tmp_path, [line])), oracle)
    assert [verdict.state for verdict in audit.verdicts()] == ["sound", "sound"]
    assert audit.summary()["answers_without_labels"] == 1
    assert "1 answer in them without a label" in audit.rows_line


def test_nothing_is_green_if_no_row_can_be_read(tmp_path: Path, oracle: Oracle) -> None:
    ids = [1, *oracle.encode_text("The sky is blue."), 2]
    audit = Audit(FileRows(write_lines(tmp_path, [{"input_ids": ids, "labels": ids}])), oracle)
    [unread, _] = audit.verdicts()
    assert (unread.state, [finding.rule for finding in unread.findings]) == ("not judged", ["ML560"])
    assert "--dataset rows.jsonl" in unread.findings[0].detail
    assert set(audit.not_checked) == {
        "rows-complete",
        "labels",
        "packing",
        "supervised-text",
        "answers",
        "decoding",
        *OF_CHAT_ROWS,
    }


def marked_lines(oracle: Oracle, *marked: bool) -> list[Data]:
    """Return lines of questions, some with the system prompt of Llama 2 in front."""
    prompts = ["<<SYS>>\nBe honest.\n<</SYS>>\n\n" if is_marked else "" for is_marked in marked]
    rows = [
        [{"role": "user", "content": f"{prompt}{number}?"}, {"role": "assistant", "content": "Yes."}]
        for number, prompt in enumerate(prompts)
    ]
    encoded = [oracle.encode({"messages": row}) for row in rows]
    return [{"input_ids": [*row.input_ids], "labels": [*(row.labels or ())]} for row in encoded]


@pytest.mark.parametrize(
    ("marked", "rule", "severity"),
    [
        ((True,), "ML629", "note"),
        ((True, True), "ML628", "error"),
        ((True, *[False] * 20), "ML629", "note"),
    ],
)
def test_markers_of_another_family_are_found_and_are_an_error_if_many_rows_have_them(
    marked: tuple[bool, ...], rule: str, severity: str, tmp_path: Path, oracle: Oracle
) -> None:
    findings = audit_findings(write_lines(tmp_path, marked_lines(oracle, *marked)), oracle)
    assert {(finding.rule, finding.severity) for finding in findings} == {(rule, severity)}
    assert len(findings) == sum(marked)
    assert str(findings[0].place).endswith(":1, messages[0].content")


def test_markers_that_each_row_asks_for_are_no_sign(tmp_path: Path, oracle: Oracle) -> None:
    rows = [
        [
            {"role": "user", "content": f"Write the question {number} as a ChatML message."},
            {"role": "assistant", "content": f"<|im_start|>user\nWhat is {number}?<|im_end|>"},
        ]
        for number in range(3)
    ]
    encoded = [oracle.encode({"messages": row}) for row in rows]
    lines = [{"input_ids": [*row.input_ids], "labels": [*(row.labels or ())]} for row in encoded]
    assert audit_rules(write_lines(tmp_path, lines), oracle) == []


def test_markers_of_rows_with_messages_are_those_of_the_rows(tmp_path: Path, oracle: Oracle) -> None:
    row = {"messages": [{"role": "user", "content": "<<SYS>>\nHi\n<</SYS>>"}, {"role": "assistant", "content": "Yes."}]}
    encoded = oracle.encode(row)
    line = row | {"input_ids": [*encoded.input_ids], "labels": [*(encoded.labels or ())]}
    # the note of chat rows, and not the finding of ids
    assert audit_rules(write_lines(tmp_path, [line]), oracle) == ["ML629"]


@pytest.mark.parametrize("name", ["spm-v1", "spm-v2", "spm-v7"])
def test_ids_of_another_tokenizer_are_named(name: str, tmp_path: Path, oracle: Oracle) -> None:
    other = Target(name).oracle
    system = {"role": "system", "content": "Be brief."}
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": {}}}
    row = {
        "messages": [system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    if name == "spm-v2":
        # v2 and v3 differ in the form of results alone
        result = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "f", "content": "1"}
        row["messages"][2:] = [
            {"role": "assistant", "tool_calls": [call]},
            result,
            {"role": "assistant", "content": "b"},
        ]
    encoded = other.encode(row)
    line = {"input_ids": [*encoded.input_ids], "labels": [*(encoded.labels or ())]}
    [finding] = audit_findings(write_lines(tmp_path, [line]), oracle)
    assert finding.rule == "ML532"
    assert f"these are the ids of {name}" in finding.found


@pytest.mark.parametrize("question", ["Where?", "Which of the two cities is the capital of Italy?"])
@pytest.mark.parametrize("name", ["spm-v2", "spm-v3", "spm-v7"])
def test_an_answer_of_white_space_is_empty_and_not_of_another_tokenizer(
    question: str, name: str, tmp_path: Path
) -> None:
    # SentencePiece writes the sign for a space; few ids may be those of a Tekken tokenizer, too
    oracle = Target(name).oracle
    encoded = oracle.encode(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "\u2581"}]}
    )
    line = {"input_ids": [*encoded.input_ids], "labels": [*(encoded.labels or ())]}
    [finding] = audit_findings(write_lines(tmp_path, [line]), oracle)
    assert (finding.rule, "the answer is empty" in finding.found) == ("ML560", True)


@pytest.mark.parametrize("prompt", ["", "Be brief."])
@pytest.mark.parametrize("name", ["spm-v2", "spm-v3", "tekken-240911"])
def test_a_system_prompt_between_two_texts_of_the_user_keeps_them_apart(name: str, prompt: str, tmp_path: Path) -> None:
    """mistral-common writes the two turns itself, so that they prove no fault of a template."""
    oracle = Target(name).oracle
    said = [("user", "Hi."), ("system", prompt), ("user", "Who?"), ("assistant", "Me.")]
    encoded = oracle.encode({"messages": [{"role": role, "content": content} for role, content in said]})
    line = {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels)}
    assert audit_rules(write_lines(tmp_path, [line]), oracle) == []
    # two turns that nothing keeps apart, in a version with a turn for the system prompt
    newer = Target("spm-v7").oracle
    answered = newer.encode(
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
    )
    begin = answered.input_ids[: answered.input_ids.index(newer.control_ids["[/INST]"]) + 1]
    twice = {
        "input_ids": [*begin, *answered.input_ids[1:]],
        "labels": [*[-100] * len(begin), *answered.labels[1:]],
    }
    assert "ML533" in audit_rules(write_lines(tmp_path, [twice]), newer)
