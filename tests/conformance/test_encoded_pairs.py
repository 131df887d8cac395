"""Encoded preference pairs: each side is judged as an encoded row is, and a pair has laws of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from each_oracle import NEWER, WITH_TOOLS, of_each, oracle_named
from encoded_files import audit_findings, audit_rules, write_lines
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preference_records import (
    Data,
    kto,
    older,
    orpo,
    pair,
    reward,
    said,
    texts_pair,
    with_ids,
    with_masks,
    without_texts,
)
from read_back_limits import looks_like_a_fault
from sampling import sampled

from pytest_mistral_lora import audit as audit_rows
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.strategies import hostile_text, plain_text, rows, tool_rows

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
FORMS: dict[str, Callable[[Data], list[Data]]] = {
    "DPO": lambda record: [record],
    "older DPO": lambda record: [older(record)],
    "KTO": kto,
    "older KTO": lambda record: list(map(older, kto(record))),
    "ORPO": lambda record: [orpo(record)],
    "reward": lambda record: [reward(record)],
}
few = settings(max_examples=7)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return oracle_named("spm-v3")


def broken_rules(records: list[Data], oracle: Oracle, folder: Path) -> set[str]:
    found = audit_findings(write_lines(folder, records), oracle)
    # generated texts spell control tokens, and generated calls repeat a key: chat rows have a note on that, too
    return {finding.rule for finding in found if finding.severity == "error" or finding.rule < "ML600"}


def cut_at_last_question(row: Data) -> tuple[list[Data], list[Data]]:
    messages = row["messages"]
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    return messages[: last + 1], messages[last + 1 :]


# What mistral-common makes of a prompt and its answers is sound, in each form, with the texts and without.


def test_pairs_of_texts_are_sound(tmp_path: Path) -> None:
    @few
    @given(row=rows(), answer=st.one_of(plain_text(), hostile_text()), form=st.sampled_from([*FORMS]))
    @of_each("spm-v1", "spm-v3", "derived-v15")
    def law(oracle: Oracle, row: Data, answer: str, form: str) -> None:
        prompt, chosen = cut_at_last_question(row)
        rejected = [said("assistant", answer)]
        words = [text.replace("\u2581", " ").split() for text in (chosen[0]["content"], answer)]
        # white space alone is no answer, and two equal answers are no pair
        assume(all(words) and words[0] != words[1])
        assume(not any(looks_like_a_fault({"messages": prompt + side}, oracle) for side in (chosen, rejected)))
        made = FORMS[form](with_ids(oracle, pair(prompt, chosen, rejected)))
        assert broken_rules(made, oracle, tmp_path) == set()
        # without control tokens or labels, nothing shows where a question ends
        if oracle.facts.control_tokens or form != "reward":
            assert broken_rules(list(map(without_texts, made)), oracle, tmp_path) == set()

    law()


def test_pairs_with_calls_are_sound(tmp_path: Path) -> None:
    @few
    @given(row=tool_rows(text=plain_text(), max_turns=2))
    @of_each("spm-v2", "spm-v3", "spm-v7")
    def law(oracle: Oracle, row: Data) -> None:
        prompt, chosen = cut_at_last_question(row)
        record = with_masks(
            oracle, with_ids(oracle, pair(prompt, chosen, [said("assistant", "No tool.")], row["tools"]))
        )
        assert broken_rules([record], oracle, tmp_path) == set()

    law()


# Each side has the laws of encoded rows.


def coloured(oracle: Oracle, **changes: Any) -> Data:
    history = [said("system", "Be brief."), said("user", "Which colour is grass?"), said("assistant", "Green.")]
    prompt = [*history, said("user", "And, as a token, </s> and the sky?")]
    made = pair(prompt, [said("assistant", "Blue, mostly.")], [said("assistant", "I do not know.")])
    return with_ids(oracle, made) | changes


@pytest.mark.parametrize("name", ["spm-v1", "derived-v7"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_wrong_boundary_is_found(side: str, name: str, tmp_path: Path) -> None:
    oracle = oracle_named(name)
    record = coloured(oracle)
    alone = orpo(record)
    alone[f"{side}_labels"][len(record["prompt_ids"])] = -100
    for made in (alone, without_texts(alone)):
        [finding] = [f for f in audit_findings(write_lines(tmp_path, [made]), oracle) if f.rule != "ML565"]
        assert finding.rule == "ML545"
        assert str(finding.place).endswith(f"rows.jsonl:1, {side}")
    # the last token of the prompt is taken for the first of each answer
    early = record | {"prompt_ids": record["prompt_ids"][:-1]}
    early |= {key: record["prompt_ids"][-1:] + record[key] for key in ("chosen_ids", "rejected_ids")}
    for made in (early, without_texts(early)):
        assert audit_rules(write_lines(tmp_path, [made]), oracle) == ["ML547", "ML547"]


def second_eos(oracle: Oracle, record: Data) -> Data:
    return record | {"chosen_ids": [*record["chosen_ids"], oracle.eos_id]}


def no_eos(oracle: Oracle, record: Data) -> Data:
    return record | {"rejected_ids": record["rejected_ids"][:-1]}


def control_tokens_of_texts(oracle: Oracle, record: Data) -> Data:
    letters = list(oracle.encode_text("And </s>"))[1:]
    ids = record["prompt_ids"]
    at = next(n for n in range(len(ids)) if ids[n : n + len(letters)] == letters)
    return record | {"prompt_ids": [*ids[:at], oracle.eos_id, *ids[at + len(letters) :]]}


def second_bos(oracle: Oracle, record: Data) -> Data:
    return record | {"prompt_ids": [oracle.bos_id, *record["prompt_ids"]]}


@pytest.mark.parametrize(
    ("change", "rules", "alone"),
    [
        (second_eos, ["ML553"], ["ML553"]),
        (no_eos, ["ML522"], ["ML522"]),
        (control_tokens_of_texts, ["ML523", "ML523"], ["ML523", "ML523"]),
        (second_bos, ["ML521", "ML521"], ["ML521", "ML521"]),
    ],
)
def test_a_fault_of_ids_is_found(
    change: Callable[[Oracle, Data], Data], rules: list[str], alone: list[str], tmp_path: Path, oracle: Oracle
) -> None:
    record = change(oracle, coloured(oracle))
    assert audit_rules(write_lines(tmp_path, [record]), oracle) == rules
    assert audit_rules(write_lines(tmp_path, [without_texts(record)]), oracle) == alone


def test_a_result_of_a_tool_that_is_scored_is_found(tmp_path: Path, oracle: Oracle) -> None:
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "12"}
    called = [{"role": "assistant", "tool_calls": [CALL]}, result, said("assistant", "It is.")]
    record = with_ids(oracle, pair([said("user", "Is it warm?")], called, [said("assistant", "No idea.")], [TOOL]))
    for made in (record, without_texts(record)):
        [finding] = audit_findings(write_lines(tmp_path, [made]), oracle)
        assert (finding.rule, str(finding.place).rpartition(":")[2]) == ("ML547", "1, chosen")
        assert "of: tool" in finding.found


def test_answers_of_the_prompt_must_not_be_scored(tmp_path: Path, oracle: Oracle) -> None:
    record = coloured(oracle)
    audit = Audit(FileRows(write_lines(tmp_path, [without_texts(record)])), oracle)
    assert [verdict.state for verdict in audit.verdicts()] == ["sound"] * 3
    assert audit.summary()["answers_without_labels"] == 0
    scored = orpo(record)
    start = oracle.encode({"messages": record["prompt"][:3]}).supervised_tokens
    eos = record["prompt_ids"].index(oracle.eos_id)
    scored["chosen_labels"][eos - start + 1 : eos + 1] = record["prompt_ids"][eos - start + 1 : eos + 1]
    assert "ML549" in audit_rules(write_lines(tmp_path, [scored]), oracle)


def test_rejected_answers_may_be_such_that_decoding_forbids_them(tmp_path: Path, oracle: Oracle) -> None:
    strange = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome▁Nord"}'}}
    called = [{"role": "assistant", "tool_calls": [strange]}]
    record = pair([said("user", "Is it warm?")], [said("assistant", "No.")], called, [TOOL])
    assert audit_rules(write_lines(tmp_path, [with_ids(oracle, record)]), oracle) == []
    swapped = record | {"chosen": record["rejected"], "rejected": record["chosen"]}
    assert audit_rules(write_lines(tmp_path, [with_ids(oracle, swapped)]), oracle) == ["ML649"]


# A pair has laws of its own.


def test_the_labels_of_a_reward_model_are_not_checked(tmp_path: Path, oracle: Oracle) -> None:
    for form, checked in (("reward", False), ("DPO", True)):
        audit = Audit(FileRows(write_lines(tmp_path, FORMS[form](coloured(oracle)))), oracle)
        assert [verdict.state for verdict in audit.verdicts()] == ["sound"] * 3
        assert ("labels" not in audit.not_checked) is checked
        assert (audit.totals.figures.supervised > 0) is checked


def test_two_prompts_are_found(tmp_path: Path, oracle: Oracle) -> None:
    record, other = (with_ids(oracle, texts_pair(f"Is it {word}?", "Yes.", "No.")) for word in ("warm", "cold"))
    mixed = {key: value for key, value in orpo(record).items() if key not in ("prompt", "chosen", "rejected")}
    mixed |= {key: value for key, value in orpo(other).items() if key in ("rejected_input_ids", "rejected_labels")}
    [finding] = audit_findings(write_lines(tmp_path, [mixed]), oracle)
    assert finding.rule == "ML565"
    assert "'▁warm' before the chosen answer" in finding.found
    assert str(finding.place).endswith("rows.jsonl:1")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [orpo, reward])
def test_padding_of_a_batch_is_no_part_of_a_side(
    form: Callable[[Data], Data], side: str, tmp_path: Path, oracle: Oracle
) -> None:
    record = form(coloured(oracle))
    longest = 3 + max(len(record[key]) for key in record if key.endswith("_ids"))
    for name in ("chosen", "rejected"):
        ids = "chosen_ids" if form is reward else "chosen_input_ids"
        ids = ids.replace("chosen", name)
        record[f"{name}_attention_mask"] = [1] * len(record[ids])
        for key, pad in ((ids, 0), (f"{name}_labels", -100), (f"{name}_attention_mask", 0)):
            if key in record:
                padding = [pad] * (longest - len(record[key]))
                record[key] = padding + record[key] if side == "left" else record[key] + padding
    for made in (record, without_texts(record)):
        assert audit_rules(write_lines(tmp_path, [made]), oracle) == []


@pytest.mark.parametrize(
    ("rejected", "rules"),
    [("Red.", ["ML655"]), ("Red.  ", ["ML655"]), ("\nRed.", ["ML655"]), ("red.", []), ("Red .", [])],
)
@pytest.mark.parametrize("name", ["spm-v3", "derived-v7"])
def test_equal_answers_are_found(rejected: str, rules: list[str], name: str, tmp_path: Path) -> None:
    oracle = oracle_named(name)
    record = with_ids(oracle, texts_pair("Which colour?", "Red.", rejected))
    for made in (record, without_texts(record)):
        assert audit_rules(write_lines(tmp_path, [made]), oracle) == rules


@pytest.mark.parametrize("name", sampled((*WITH_TOOLS, *NEWER), (WITH_TOOLS[0], NEWER[-1])))
def test_one_call_with_two_ids_is_one_answer(name: str, tmp_path: Path) -> None:
    oracle = oracle_named(name)
    question = [{"role": "user", "content": "Which weather?"}]
    first, second, other = (
        [{"role": "assistant", "tool_calls": [{**CALL, "id": call_id, "function": {**CALL["function"], **function}}]}]
        for call_id, function in (
            ("abcdefghi", {}),
            ("ihgfedcba", {}),
            ("ihgfedcba", {"arguments": '{"city": "Oslo"}'}),
        )
    )
    record = with_ids(oracle, pair(question, first, second, [TOOL]))
    for made in (record, without_texts(record)):
        [finding] = audit_findings(write_lines(tmp_path, [made]), oracle)
        assert (finding.rule, str(finding.place)) == ("ML655", f"{tmp_path / 'rows.jsonl'}:1")
    record = with_ids(oracle, pair(question, first, other, [TOOL]))
    for made in (record, without_texts(record)):
        assert audit_rules(write_lines(tmp_path, [made]), oracle) == []


@pytest.mark.parametrize(
    ("ids", "words"), [([], "has no token"), ([2], "nothing but EOS"), ([29473, 2], "white space")]
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_answer_is_found(side: str, ids: list[int], words: str, tmp_path: Path, oracle: Oracle) -> None:
    record = coloured(oracle) | {side: [said("assistant", "")], f"{side}_ids": ids}
    for made in (record, without_texts(record)):
        [finding] = audit_findings(write_lines(tmp_path, [made]), oracle)
        assert finding.rule == "ML567"
        assert words in finding.found
        assert str(finding.place).endswith(f"rows.jsonl:1, {side}")


def test_a_cut_that_leaves_no_difference_is_found(tmp_path: Path, oracle: Oracle) -> None:
    record = with_ids(oracle, texts_pair("Which?", "It is the colour of grass.", "It is the colour of the sky."))
    for length, pair_rules in ((4, ["ML568"]), (6, [])):
        cut = record | {key: record[key][:length] for key in ("chosen_ids", "rejected_ids")}
        assert audit_rules(write_lines(tmp_path, [cut]), oracle) == ["ML531", *pair_rules, "ML531", "ML506"]
        assert sorted(audit_rules(write_lines(tmp_path, [without_texts(cut)]), oracle)) == [
            "ML522",
            "ML522",
            *pair_rules,
        ]


@pytest.mark.parametrize("form", ["DPO", "KTO", "reward"])
def test_the_lengths_of_the_sides_are_in_the_line_of_the_rows(form: str, tmp_path: Path, oracle: Oracle) -> None:
    answers = ("Yes, that is so, as far as I know.", "No.")
    records = [with_ids(oracle, texts_pair(f"Is it {n}?", *answers)) for n in range(2)]
    made = [line for record in records for line in FORMS[form](record)]
    audit = Audit(FileRows(write_lines(tmp_path, made)), oracle)
    assert [verdict.findings for verdict in audit.verdicts() if verdict.findings] == []
    lengths = "2 wanted answers of 12.0 tokens in the mean, 2 unwanted answers of 2.0 tokens in the mean"
    assert audit.rows_line.endswith(lengths)


@pytest.mark.parametrize(("value", "rules"), [(1, []), (2, ["ML570"]), (-1, ["ML570"])])
def test_the_mask_of_a_side_is_0_or_1(value: int, rules: list[str], tmp_path: Path, oracle: Oracle) -> None:
    record = coloured(oracle)
    for name in ("chosen", "rejected"):
        masked = record | {f"{name}_mask": [value] * len(record[f"{name}_ids"])}
        found = audit_findings(write_lines(tmp_path, [masked]), oracle)
        assert [finding.rule for finding in found] == rules
        assert all(str(finding.place).endswith(f":1, {name}") for finding in found)


# Records and files.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected_ids": None}, "rejected_ids: is missing"),
        ({"rejected_ids": [1.5]}, "rejected_ids[0]: 1.5"),
        ({"prompt_ids": "1 2"}, "prompt_ids: is a string"),
        ({"chosen_mask": [1]}, "chosen_mask: 1 values for"),
        ({"chosen": [said("bot", "x")]}, "messages[4].role"),
        ({"chosen_ids": None, "rejected_ids": None, "completion_ids": [2]}, "label: is missing"),
        ({"chosen_ids": None, "rejected_ids": None, "completion_ids": [2], "label": "good"}, "label: 'good'"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(change: Data, words: str, tmp_path: Path, oracle: Oracle) -> None:
    record = {key: value for key, value in (coloured(oracle) | change).items() if value is not None}
    other = with_ids(oracle, texts_pair("Is it warm?", "Yes.", "No."))
    lines = [other, record, no_eos(oracle, coloured(oracle))]
    unreadable, fault = audit_findings(write_lines(tmp_path, lines), oracle)
    assert (unreadable.rule, fault.rule) == ("ML501", "ML522")
    assert ":2" in str(unreadable.place)
    assert words in unreadable.text()


def test_the_two_lines_of_a_pair_are_one_record_of_the_source(tmp_path: Path, oracle: Oracle) -> None:
    lines = [coloured(oracle, row=number) for number in (0, 1, 1, 3)]
    found = [(finding.rule, finding.found) for finding in audit_findings(write_lines(tmp_path, lines), oracle)]
    assert found[:2] == [("ML503", "row 1 comes again"), ("ML502", "1 of 4 rows are not there: 2")]
    # both answers of row 1 are trained on once more; the text of row 1 is also that of rows 0 and 3
    assert [rule for rule, _ in found[2:]] == ["ML506", "ML608"]
    assert found[2][1].startswith("2 texts ")
    assert found[3][1] == "the row is there 4 times"
    audit = Audit(FileRows(write_lines(tmp_path, lines)), oracle)
    indices = [verdict.index for verdict in audit.verdicts()]
    assert indices == [0, 0, 1, 1, 1, 1, 3, 3, None]
    assert (audit.summary()["rows"], audit.summary()["pairs"]) == (8, 4)
    assert "4 pairs" in audit.rows_line


def test_pairs_of_a_dataset_judge_ids_without_messages(tmp_path: Path, oracle: Oracle) -> None:
    rows = [texts_pair(f"Is it {n}?", f"It is {n}.", f"No, {n + 1}.") for n in range(4)]
    dataset = write_lines(tmp_path, rows, "dataset.jsonl")
    records = [without_texts(with_ids(oracle, row)) for row in rows]
    path = write_lines(tmp_path, records)
    assert audit_rules(path, oracle, dataset) == []
    records[1]["rejected_ids"], records[2]["rejected_ids"] = records[2]["rejected_ids"], records[1]["rejected_ids"]
    found = audit_findings(write_lines(tmp_path, records), oracle, dataset)
    assert [(finding.rule, str(finding.place).rpartition(":")[2]) for finding in found] == [
        ("ML534", "2, rejected"),
        ("ML534", "3, rejected"),
    ]


def test_pairs_that_are_not_those_of_the_dataset_are_found(tmp_path: Path, oracle: Oracle) -> None:
    rows = [texts_pair(f"Is it {n}?", f"It is {n}.", f"No, {n + 1}.") for n in range(4)]
    dataset = write_lines(tmp_path, rows, "dataset.jsonl")
    records = [with_ids(oracle, row) for row in rows]
    changed = with_ids(oracle, rows[1] | {"rejected": [said("assistant", "Never.")]})
    found = audit_findings(write_lines(tmp_path, [records[0], changed, records[3]]), oracle, dataset)
    assert [(finding.rule, finding.found) for finding in found[:2]] == [
        ("ML505", "the messages are not those of row 1"),
        ("ML502", "1 of 4 rows are not there: 2"),
    ]
    assert str(found[0].place).endswith(":2, rejected")


def test_a_label_that_is_not_that_of_the_dataset_is_found(tmp_path: Path, oracle: Oracle) -> None:
    records = [line for n in range(3) for line in kto(with_ids(oracle, texts_pair(f"Is it {n}?", "Yes.", "No.")))]
    rated = [{key: line[key] for key in ("prompt", "completion", "label")} for line in records]
    dataset = write_lines(tmp_path, rated, "dataset.jsonl")
    assert audit_rules(write_lines(tmp_path, records), oracle, dataset) == []
    records[3]["label"] = True
    numbered = [line | {"row": number} for number, line in enumerate(records)]
    for made in (numbered, list(map(without_texts, numbered))):
        [finding] = audit_findings(write_lines(tmp_path, made), oracle, dataset)
        assert (finding.rule, finding.found) == ("ML505", "the label is not that of row 3")


@pytest.mark.parametrize("form", FORMS)
def test_files_of_trainers_are_recognised_by_their_columns(form: str, tmp_path: Path, oracle: Oracle) -> None:
    prompt = [said("user", "Is it warm?")]
    called = [{"role": "assistant", "tool_calls": [CALL]}]
    records = [
        with_ids(oracle, texts_pair("Is it warm?", "Yes.", "No.")),
        with_ids(oracle, pair(prompt, called, [said("assistant", "No.")], [TOOL])),
    ]
    made = [line for record in records for line in FORMS[form](record)]
    keys = dict.fromkeys(key for line in made for key in line)
    table = datasets.Dataset.from_list([{key: line.get(key) for key in keys} for line in made])
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    # a row of Arrow has the keys of all rows
    for path in (tmp_path / "saved", tmp_path / "rows.parquet", write_lines(tmp_path, made)):
        assert recognised(path, None).kind == "encoded"
        assert audit_rules(path, oracle) == [], path
    verdict = audit_rows(table, tokenizer="spm-v3")
    assert verdict.ok
    assert verdict.facts["rows::encoded::ids"]["judged"] == 4


def test_messages_of_a_table_may_be_texts_of_json(tmp_path: Path, oracle: Oracle) -> None:
    record = with_ids(oracle, texts_pair("Which colour?", "Red.", "Blue."))
    # the messages alone tell that one of the two EOS was a text
    record |= {"chosen": [said("assistant", "</s>")], "chosen_ids": [oracle.eos_id, oracle.eos_id]}
    table = record | {key: [json.dumps(message) for message in record[key]] for key in ("prompt", "chosen", "rejected")}
    datasets.Dataset.from_list([table]).to_parquet(tmp_path / "rows.parquet")
    assert "ML523" in audit_rules(tmp_path / "rows.parquet", oracle)


def test_python_names_the_row_and_its_side(oracle: Oracle) -> None:
    other = with_ids(oracle, texts_pair("Is it warm?", "Yes.", "No."))
    verdict = audit_rows([other, no_eos(oracle, coloured(oracle))], tokenizer="spm-v3")
    assert [(finding.rule, str(finding.place)) for finding in verdict.findings] == [("ML522", "rows[1], rejected")]


def test_hundreds_of_sound_pairs_have_no_finding(tmp_path: Path, oracle: Oracle) -> None:
    records = [
        with_ids(oracle, texts_pair(f"What is {n} and {n % 7}?", f"It is {n + n % 7}.", f"Perhaps {n * 3 + 1}?"))
        for n in range(300)
    ]
    for made in (records, list(map(without_texts, records))):
        audit = Audit(FileRows(write_lines(tmp_path, made)), oracle)
        assert not [finding for verdict in audit.verdicts() for finding in verdict.findings]
        assert (audit.judged, audit.totals.sides.pairs) == (600, 300)
