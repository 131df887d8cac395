from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import faults_of_ids
import faults_of_labels
import pytest
from faults import Case, Fault, oracle_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sampling import sampled

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.dataset.cases import OF_ENCODED_ROWS
from pytest_mistral_lora.conformance.encoded.audit import CASES
from pytest_mistral_lora.conformance.encoded.comparison import EncodedLineComparison, row_findings
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import rows, tool_rows

FAULTS = {
    name: one
    for module in (faults_of_ids, faults_of_labels)
    for name, one in vars(module).items()
    if isinstance(one, Fault)
}
TOKENIZERS = ("spm-v1", "spm-v2", "spm-v3", "spm-v7", "tekken-240718")
FEW = settings(max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**32)


def _rows(name: str) -> st.SearchStrategy[dict[str, Any]]:
    plain = rows(weights=True, alternating=False) | rows()
    return plain if name == "spm-v1" else plain | tool_rows(parallel=name != "spm-v2")


def _case(name: str, data: dict[str, Any], seed: int) -> Case:
    return Case(json.loads(json.dumps(data)), oracle_of(name), Random(seed))


def _line(oracle: Oracle, cases: list[Case], **changes: Any) -> EncodedLineComparison:
    parts = [case.encoded for case in cases]
    line = {
        "packed": len(cases) > 1,
        "input_ids": tuple(token for part in parts for token in part.input_ids),
        "labels": tuple(label for part in parts for label in part.labels or ()),
        "position_ids": tuple(n for part in parts for n in range(len(part.input_ids))),
    }
    return EncodedLineComparison(
        EncodedLine(Place.of("rows"), 0, tuple(case.row for case in cases), **{**line, **changes}), parts, oracle
    )


def _rules(judge: EncodedLineComparison) -> set[str]:
    return {finding.rule for finding in judge.findings()}


def test_every_class_is_a_rule_of_the_subject() -> None:
    rules = RULES.of("encoded")
    of_chat_rows = {*OF_ENCODED_ROWS.values()}
    assert {rule.case for rule in rules} | of_chat_rows == set(CASES)
    assert len({rule.fault_class for rule in rules}) == len(rules)
    assert "" not in {rule.fault_class for rule in rules}


@pytest.mark.parametrize("name", sampled(TOKENIZERS, ("spm-v3",)))
def test_each_fault_of_a_trainer_is_found_by_a_class_of_its_family(name: str) -> None:
    tried: set[str] = set()

    @FEW
    @given(_rows(name), SEEDS)
    def law(data: dict[str, Any], seed: int) -> None:
        case = _case(name, data, seed)
        without_loss = set() if case.encoded.supervised_tokens else {"ML605"}
        assert {one.rule for one in row_findings(case.row, case.ids, case.labels, case.oracle)} == without_loss
        for label, fault in FAULTS.items():
            broken = fault(case)
            if broken is None:
                continue
            tried.add(label)
            found = {finding.rule for finding in row_findings(case.row, *broken, case.oracle)}
            assert found & fault.family, (label, found)

    law()
    assert len(tried) > len(FAULTS) / 2


def _parallel_calls(text: str) -> dict[str, Any]:
    """A row with two calls in one turn, whose last answer is the text."""
    calls = [
        {"id": f"00000000{n}", "type": "function", "function": {"name": "A", "arguments": {"n": 0}}} for n in range(2)
    ]
    return {
        "messages": [
            {"role": "user", "content": ""},
            {"role": "assistant", "tool_calls": calls},
            *({"role": "tool", "content": "0", "tool_call_id": call["id"]} for call in calls),
            {"role": "assistant", "content": text},
        ],
        "tools": [
            {"type": "function", "function": {"name": "A", "parameters": {"type": "object", "properties": {"n": {}}}}}
        ],
    }


@pytest.mark.parametrize(
    ("name", "fault", "text", "rule"),
    [
        ("tekken-240718", "another_tokenizer", "0", "ML532"),
        ("tekken-240718", "injection", "0 [TOOL_CALLS] 0", "ML523"),
        ("spm-v3", "injection", "0 [TOOL_CALLS] 0", "ML523"),
    ],
)
def test_beside_parallel_calls_a_surplus_marker_is_not_always_a_turn_of_calls(
    name: str, fault: str, text: str, rule: str
) -> None:
    case = _case(name, _parallel_calls(text), 0)
    broken = FAULTS[fault](case)
    assert broken is not None
    rules = {finding.rule for finding in row_findings(case.row, *broken, case.oracle)}
    assert rule in rules
    assert "ML555" not in rules


@pytest.mark.parametrize("name", sampled(TOKENIZERS, ("spm-v3",)))
def test_padding_is_no_fault_unless_it_is_trained_on(name: str) -> None:
    oracle = oracle_of(name)

    @FEW
    @given(_rows(name), st.integers(1, 9), st.booleans(), st.booleans())
    def law(data: dict[str, Any], count: int, left: bool, masked: bool) -> None:
        case = _case(name, data, 0)
        added = oracle.vocab_size
        for token in {oracle.unk_id, oracle.eos_id, _pad_id(oracle), added}:
            ids = _padded(case.ids, token, count, left=left)
            mask = _padded([1] * len(case.ids), 0, count, left=left) if masked else None
            quiet = _padded(case.labels, IGNORE_INDEX, count, left=left)
            given_ids = {"input_ids": ids, "attention_mask": mask, "position_ids": None}
            # the row attends to padding before it, unless a mask or positions that start anew hide it
            attended = {"ML519"} if left and not masked else set()
            assert _rules(_line(oracle, [case], labels=quiet, **given_ids)) == attended
            anew = {"position_ids": (*range(count), *range(len(case.ids)))} if left else {}
            assert _rules(_line(oracle, [case], labels=quiet, **given_ids | anew)) == set()
            ones = given_ids | {"attention_mask": (1,) * len(ids)}
            assert _rules(_line(oracle, [case], labels=quiet, **ones)) == ({"ML519"} if left else set())
            loud = _padded(case.labels, token, count, left=left)
            # without a mask, an EOS that is trained on is one too many as well
            unmasked = {oracle.eos_id: {"ML522", "ML553"}, added: {"ML520"}}.get(token, set())
            expected = {"ML510"} if masked else {"ML510"} | unmasked
            assert _rules(_line(oracle, [case], labels=loud, **given_ids)) & expected

    law()


def _padded(values: list[int], value: int, count: int, *, left: bool) -> tuple[int, ...]:
    return tuple([value] * count + values if left else values + [value] * count)


def _pad_id(oracle: Oracle) -> int:
    return next((token for token, literal in oracle.control_tokens.items() if literal == "<pad>"), oracle.unk_id)


@pytest.mark.parametrize("name", sampled(TOKENIZERS, ("spm-v3",)))
def test_a_fault_is_found_in_a_padded_row_too(name: str) -> None:
    oracle = oracle_of(name)
    count, left = 5, False

    @FEW
    @given(_rows(name), SEEDS)
    def law(data: dict[str, Any], seed: int) -> None:
        case = _case(name, data, seed)
        chosen = case.chance.choice(
            ["eos_masked", "cut_at_the_end", "bos_doubled", "everything_trained", "another_answer"]
        )
        broken = FAULTS[chosen](case)
        if broken is None:
            return
        ids = _padded(broken[0], _pad_id(oracle), count, left=left)
        labels = _padded(broken[1], IGNORE_INDEX, count, left=left)
        mask = _padded([1] * len(broken[0]), 0, count, left=left)
        for attention_mask in (mask, None):
            judge = _line(
                oracle, [case], input_ids=ids, labels=labels, attention_mask=attention_mask, position_ids=None
            )
            assert _rules(judge) & FAULTS[chosen].family, chosen

    law()


@pytest.mark.parametrize("name", sampled(TOKENIZERS, ("spm-v3",)))
def test_packed_rows_are_split_back_and_each_fault_is_found(name: str) -> None:
    oracle = oracle_of(name)

    @FEW
    @given(st.lists(_rows(name), min_size=2, max_size=4, unique_by=json.dumps), SEEDS)
    def law(many: list[dict[str, Any]], seed: int) -> None:
        cases = [_case(name, data, seed) for data in many]
        assume(all(case.encoded.supervised_tokens for case in cases))
        sound = _line(oracle, cases)
        line = sound.line
        assert _rules(sound) == set()
        length = len(line.input_ids)
        assert _rules(_line(oracle, cases, position_ids=tuple(range(length)))) == {"ML512"}
        assert _rules(_line(oracle, cases, position_ids=None)) == {"ML512"}
        assert _rules(_line(oracle, cases, attention_mask=(1,) * length)) == {"ML513"}
        numbers = tuple(n + 1 for n, case in enumerate(cases) for _ in case.ids)
        assert _rules(_line(oracle, cases, attention_mask=numbers)) == set()
        run_on = {"attention_mask": numbers, "position_ids": tuple(range(length))}
        for columns in (run_on, run_on | {"position_ids": None}):
            assert (_rules(_line(oracle, cases, **columns)), _line(oracle, cases, **columns).runs_on) == (set(), True)
        _numbers_that_are_off(oracle, cases, numbers, Random(seed))
        boundary = len(cases[0].ids)
        labels = (*line.labels[:boundary], line.input_ids[boundary], *line.labels[boundary + 1 :])
        assert _rules(_line(oracle, cases, labels=labels)) == {"ML514"}
        _conversations_lost_or_moved(oracle, cases)
        _a_fault_in_one(oracle, cases, Random(seed))

    law()


def _numbers_that_are_off(oracle: Oracle, cases: list[Case], numbers: tuple[int, ...], chance: Random) -> None:
    one = chance.randrange(1, len(cases))
    edge = numbers.index(one + 1)
    moved = list(numbers)
    for by in range(edge, min(edge + chance.randint(1, 3), len(numbers))):
        moved[by] = one
    merged = [number - (number > one) for number in numbers]
    for wrong in (moved, [numbers[-1]] * len(numbers), merged, [len(cases) + 1 - number for number in numbers]):
        if max(wrong) > 1:
            assert _rules(_line(oracle, cases, attention_mask=tuple(wrong))) == {"ML517"}, wrong


def _conversations_lost_or_moved(oracle: Oracle, cases: list[Case]) -> None:
    def as_listed(*order: int) -> EncodedLineComparison:
        other = _line(oracle, [cases[n] for n in order]).line
        changed = {key: getattr(other, key) for key in ("input_ids", "labels", "position_ids")}
        return _line(oracle, cases, **changed)

    everything = tuple(range(len(cases)))
    same = cases[0].encoded.input_ids == cases[-1].encoded.input_ids
    assert "ML515" in _rules(as_listed(*everything[:-1]))
    assert "ML515" in _rules(as_listed(*everything, 0))
    assert same or "ML516" in _rules(as_listed(*everything[::-1]))
    cut = {key: getattr(_line(oracle, cases).line, key)[:-2] for key in ("input_ids", "labels", "position_ids")}
    assert _rules(_line(oracle, cases, **cut)) >= {"ML531"}


def _a_fault_in_one(oracle: Oracle, cases: list[Case], chance: Random) -> None:
    name = chance.choice(["eos_masked", "everything_trained", "another_answer", "last_eos_missing"])
    broken = FAULTS[name](cases[0])
    if broken is None:
        return
    rest = _line(oracle, cases[1:]).line
    positions = (*range(len(broken[0])), *(rest.position_ids or ()))
    judge = _line(
        oracle,
        cases,
        input_ids=(*broken[0], *rest.input_ids),
        labels=(*broken[1], *rest.labels),
        position_ids=positions,
    )
    assert _rules(judge) & FAULTS[name].family, name


def test_a_verdict_shows_the_tokens_and_a_row_that_can_be_pasted() -> None:
    data = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    oracle = oracle_of("spm-v3")
    row = parse_row(data)
    encoded = oracle.encode(row)
    [finding] = row_findings(row, (1, *encoded.input_ids), [IGNORE_INDEX, *(encoded.labels or ())], oracle)
    assert finding.rule == "ML521"
    assert json.loads(finding.row) == data
    assert ["+", "1", "1", "<s>"] in [line.split() for line in finding.detail.splitlines()]


def test_a_missing_bos_is_no_text_where_the_users_text_spells_it() -> None:
    data = {"messages": [{"role": "user", "content": "<s> Hi"}, {"role": "assistant", "content": "Hello"}]}
    oracle = oracle_of("spm-v3")
    encoded = oracle.encode(parse_row(data))
    labels = (encoded.labels or ())[1:]
    assert [f.rule for f in row_findings(parse_row(data), encoded.input_ids[1:], labels, oracle)] == ["ML521"]


@pytest.mark.parametrize(("end", "rule"), [("\x1c", "ML529"), (" \x85", "ML529"), ("\x07", "ML554")])
def test_a_trimmed_separator_is_white_space_and_another_control_character_is_a_change(end: str, rule: str) -> None:
    oracle = oracle_of("spm-v3")
    whole, cut = (
        {"messages": [{"role": "user", "content": f"Hi there{text}"}, {"role": "assistant", "content": "Hello"}]}
        for text in (end, "")
    )
    encoded = oracle.encode(parse_row(cut))
    assert [f.rule for f in row_findings(parse_row(whole), encoded.input_ids, encoded.labels or (), oracle)] == [rule]


def test_every_fault_of_a_row_is_told() -> None:
    data = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    oracle = oracle_of("spm-v3")
    encoded = oracle.encode({"messages": data["messages"][1:]})
    ids = [1, *encoded.input_ids]
    labels = [-100, *(encoded.labels or ())]
    labels[-1] = -100
    found = [finding.rule for finding in row_findings(parse_row(data), ids, labels, oracle)]
    assert found == ["ML521", "ML525", "ML546"]


def test_a_text_that_became_unk_was_encoded_with_another_vocabulary() -> None:
    data = {"messages": [{"role": "user", "content": "One two three"}, {"role": "assistant", "content": "Four"}]}
    oracle = oracle_of("spm-v3")
    encoded = oracle.encode(parse_row(data))
    ids = [oracle.unk_id if n == 3 else token for n, token in enumerate(encoded.input_ids)]
    found = list(row_findings(parse_row(data), ids, encoded.labels or (), oracle))
    assert found[0].rule == "ML532"
    assert "became <unk>" in found[0].found


@pytest.mark.parametrize("name", ["spm-v3", "spm-v7", "tekken-240911"])
def test_a_system_prompt_within_inst_is_named_so(name: str) -> None:
    oracle = oracle_of(name)
    ids = {literal: token for token, literal in oracle.control_tokens.items()}
    prompt, *rest = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there, friend."},
        {"role": "assistant", "content": "Hello to you."},
    ]
    row = parse_row({"messages": [prompt, *rest]})
    plain = oracle.encode({"messages": rest})
    block = (ids["[INST]"], *oracle.encode_text(" Be brief. "), ids["[/INST]"])
    own = (plain.input_ids[0], *block, *plain.input_ids[1:])
    labels = (IGNORE_INDEX, *[IGNORE_INDEX] * len(block), *(plain.labels or ())[1:])
    found = list(row_findings(row, own, labels, oracle))
    assert {finding.rule for finding in found} == {"ML526"}
    assert [value for value in ("'Be brief.'", "[INST]") if value not in found[0].found] == []
    if name == "spm-v7":
        text = oracle.encode_text("Be brief.\n\nHello there, friend.")
        end = plain.input_ids.index(ids["[/INST]"])
        one = (plain.input_ids[0], ids["[INST]"], *text, *plain.input_ids[end:])
        labels = (*[IGNORE_INDEX] * (2 + len(text)), *(plain.labels or ())[end:])
        assert "the system prompt stands elsewhere, after [INST]" in next(row_findings(row, one, labels, oracle)).found


@pytest.mark.parametrize(("answer", "count"), [(0, 1), (1, 1), (0, 2)])
def test_an_empty_answer_is_called_empty(answer: int, count: int) -> None:
    oracle = oracle_of("spm-v3")
    turns = [(f"Question {n}?", f"Answer {n}.") for n in range(2)]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    row = parse_row({"messages": messages})
    encoded = oracle.encode(row)
    emptied = {span.turn for span in encoded.spans if span.supervised and span.kind == "text"}
    chosen = sorted(emptied, key=str)[answer:][:count]
    kept = [
        n
        for span in encoded.spans
        if span.turn not in chosen or span.kind == "eos"
        for n in range(span.start, span.end)
    ]
    ids, labels = ([values[n] for n in kept] for values in (encoded.input_ids, encoded.labels or ()))
    [finding] = [found for found in row_findings(row, ids, labels, oracle) if found.rule != "ML506"]
    assert finding.rule == "ML534"
    assert "the answer is empty" in finding.found


@pytest.fixture(scope="module")
def pair() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two encoded conversations."""
    lines = []
    for number in (1, 2):
        said = f"Which colour is the sky over the city number {number}?", f"It is blue, number {number}."
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        encoded = oracle_of("spm-v3").encode(parse_row({"messages": messages}))
        ids = {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}
        lines.append({"messages": messages, **ids})
    return lines[0], lines[1]


def _with_ids(line: dict[str, Any], keep: Callable[[list[int]], list[int]]) -> dict[str, Any]:
    return {**line, "input_ids": keep(line["input_ids"]), "labels": keep(line["labels"])}


def _alone(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("messages", "conversations")}


def _packed(first: dict[str, Any], second: dict[str, Any], lost: int = 0) -> dict[str, Any]:
    """Return a sequence whose second conversation lacks its first tokens."""
    second = _with_ids(second, lambda values: values[lost:])
    return {
        "conversations": [first["messages"], second["messages"]],
        "position_ids": [*range(len(first["labels"])), *range(len(second["labels"]))],
        **{key: first[key] + second[key] for key in ("input_ids", "labels")},
    }


COLLATOR = "packing collator"
CAUSES: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, tuple[str, str]]]] = {
    "positions that restart within a row": (
        lambda a, b: {**a, "position_ids": [*range(9), *range(len(a["labels"]) - 9)]},
        {"ML512": ("within a conversation", "leave `position_ids` out")},
    ),
    "positions that restart within a packed conversation": (
        lambda a, b: {**(c := _packed(a, b)), "position_ids": [*c["position_ids"][:-9], *range(9)]},
        {"ML512": ("within a conversation", "go up by one")},
    ),
    "positions that run on": (
        lambda a, b: {**(c := _packed(a, b)), "position_ids": list(range(len(c["labels"])))},
        {"ML512": ("position 24 at token 24", COLLATOR)},
    ),
    "BOS lost in a packed sequence": (
        lambda a, b: _packed(a, b, lost=1),
        {"ML521": ("BOS is missing", "add_special_tokens=False")},
    ),
    "each BOS lost in a packed sequence without positions": (
        lambda a, b: {**_with_ids(_packed(a, b, lost=1), lambda values: values[1:]), "position_ids": None},
        {"ML521": ("BOS is missing", "add_special_tokens=False"), "ML512": ("no position_ids", COLLATOR)},
    ),
    "BOS lost in packed ids": (
        lambda a, b: _alone(_packed(a, b, lost=1)),
        {"ML512": ("<s> is missing at token 24", "put <s> in front of it")},
    ),
    "a mask that is inverted": (
        lambda a, b: {
            **_with_ids(a, lambda values: values + [0 if values == a["input_ids"] else -100] * 4),
            "attention_mask": [0] * len(a["labels"]) + [1] * 4,
        },
        {"ML552": ("24 of the 24 tokens", "of the lengths")},
    ),
    "a cut in the middle": (
        lambda a, b: _with_ids(a, lambda values: values[:6] + values[-5:]),
        {"ML531": ("in the middle: 13 of 24 tokens", "maximal length"), "ML506": ("", "")},
    ),
    "a cut within a text": (
        lambda a, b: _with_ids(a, lambda values: values[:6] + values[8:]),
        {"ML534": ("9 characters are missing", "a cut that keeps both ends")},
    ),
    "the prompt twice": (
        lambda a, b: _with_ids(a, lambda values: values[:15] + values),
        {"ML533": ("the prompt is there twice", "in front of messages")},
    ),
    "the prompt twice behind one BOS": (
        lambda a, b: _with_ids(a, lambda values: values[:15] + values[1:]),
        {"ML533": ("the prompt is there twice", "in front of messages")},
    ),
    "the text of the user twice": (
        lambda a, b: _with_ids(a, lambda values: values[:14] + values[2:]),
        {"ML534": ("the text is there twice", "in front of messages")},
    ),
    "a text in front of ids": (
        lambda a, b: _alone(_with_ids(a, lambda values: values[5:])),
        {"ML560": ("token 0", "")},
    ),
    "ids beyond the vocabulary": (
        lambda a, b: _alone({**a, "input_ids": [1, *(token + 40_000 for token in a["input_ids"][1:])]}),
        {"ML520": ("id 40003", "own tokenizer")},
    ),
    "one id beyond the vocabulary": (
        lambda a, b: _alone(_with_ids(a, lambda values: [*values[:4], 40_000, *values[5:]])),
        {"ML520": ("id 40000", "own tokenizer")},
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_words_and_the_fix_are_those_of_the_cause(name: str, pair: tuple[dict[str, Any], ...]) -> None:
    change, expected = CAUSES[name]
    findings = audit([change(*pair)], tokenizer="spm-v3").findings
    assert {finding.rule for finding in findings} == expected.keys()
    for finding in findings:
        found, fix = expected[finding.rule]
        assert (found in finding.found, fix in finding.next_step) == (True, True), finding.text()
        assert "\N{REPLACEMENT CHARACTER}" not in finding.text()
    assert [finding.expected for finding in findings if finding.rule == "ML560"] in ([], ["<s>"])


def test_a_turn_that_is_lost_is_no_cut() -> None:
    """What is left is the row without some tokens in a row, of which both edges may lie within an answer."""
    said = ["Is it red?", "It is red.", "Is it red?", "It is not."]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)]
    row = parse_row({"messages": messages})
    oracle = oracle_of("spm-v3")
    rest = oracle.encode(replace(row, messages=(row.messages[0], row.messages[3])))
    assert {finding.rule for finding in row_findings(row, rest.input_ids, rest.labels or (), oracle)} == {"ML533"}
