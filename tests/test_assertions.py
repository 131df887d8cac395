"""The assertions about one row, and about rows that a trainer encoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_mistral_lora.assertions import (
    assert_encoded_rows_sound,
    assert_labels_exact,
    assert_no_control_token_injection,
    assert_template_faithful,
)
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, RowError, RowsError

FILE = shipped_tokenizer("spm-v3")
ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And [INST] grass?"},
        {"role": "assistant", "content": "Green."},
    ]
}

Labels = list[int]


@pytest.fixture(scope="module")
def tokenizer() -> CheckpointTokenizer:
    return CheckpointTokenizer(FILE)


@pytest.fixture(scope="module")
def encoded(tokenizer: CheckpointTokenizer) -> EncodedRow:
    return tokenizer.oracle.encode(ROW)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: CheckpointTokenizer) -> Path:
    tokenizer.fast.save_pretrained(tmp_path / "checkpoint")
    shutil.copy(FILE, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _labels(encoded: EncodedRow) -> Labels:
    assert encoded.labels is not None
    return list(encoded.labels)


def _report(error: pytest.ExceptionInfo[AssertionError]) -> list[str]:
    return str(error.value).splitlines()


def test_the_official_template_is_faithful_whatever_names_the_tokenizer(
    checkpoint: Path, tokenizer: CheckpointTokenizer
) -> None:
    plain = {"messages": [ROW["messages"][1], ROW["messages"][2]]}
    for given in (tokenizer, FILE, str(FILE), checkpoint, CheckpointTokenizer(checkpoint)):
        assert_template_faithful(plain, given)


def test_a_template_with_one_space_less_is_not_faithful(checkpoint: Path) -> None:
    plain = {"messages": [ROW["messages"][1], ROW["messages"][2]]}
    file = checkpoint / "chat_template.jinja"
    template = file.read_text(encoding="utf-8")
    assert template.count("[INST] ") > 0
    file.write_text(template.replace("[INST] ", "[INST]"), encoding="utf-8")
    with pytest.raises(AssertionError) as error:
        assert_template_faithful(plain, checkpoint)
    assert _report(error)[0].startswith("ML004 ")
    assert any(line.split()[:2] == [">", "2"] for line in _report(error))


def test_generation_blocks_that_leave_eos_out_are_not_faithful(checkpoint: Path) -> None:
    plain = {"messages": [ROW["messages"][1], ROW["messages"][2]]}
    simple = (
        "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}[/INST]"
        "{% else %}{% generation %} {{ message['content'] }}INSIDE{% endgeneration %}OUTSIDE{% endif %}{% endfor %}"
    )
    file = checkpoint / "chat_template.jinja"
    file.write_text(simple.replace("INSIDE", "</s>").replace("OUTSIDE", ""))
    assert_template_faithful(plain, checkpoint)
    file.write_text(simple.replace("INSIDE", "").replace("OUTSIDE", "</s>"))
    with pytest.raises(AssertionError) as error:
        assert_template_faithful(plain, checkpoint)
    assert _report(error)[0].startswith("ML006 ")


def test_the_oracles_own_ids_and_labels_are_exact(tokenizer: CheckpointTokenizer, encoded: EncodedRow) -> None:
    assert_labels_exact(ROW, encoded.input_ids, _labels(encoded), tokenizer)
    assert_labels_exact(ROW, list(encoded.input_ids), _labels(encoded), FILE)
    feature = {"input_ids": list(encoded.input_ids), "labels": _labels(encoded)}
    assert_labels_exact(ROW, feature, feature, tokenizer)
    ids, labels = (torch.tensor(one) for one in feature.values())
    assert_labels_exact(ROW, ids[None], labels[None], tokenizer)
    assert_labels_exact(ROW, list(ids), list(labels), tokenizer)


@pytest.mark.parametrize("labels", [None, "x", {"labels": [True]}, torch.tensor([0.5]), [[1], [2]], {"input_ids": [1]}])
def test_labels_of_no_row_are_refused(labels: Any, tokenizer: CheckpointTokenizer, encoded: EncodedRow) -> None:
    with pytest.raises(InputError, match="not the labels of one row"):
        assert_labels_exact(ROW, encoded.input_ids, labels, tokenizer)


def test_another_object_in_place_of_a_tokenizer_is_refused(encoded: EncodedRow) -> None:
    wrong: Any = Oracle(FILE)
    with pytest.raises(InputError, match="no tokenizer that can be judged: Oracle"):
        assert_labels_exact(ROW, encoded.input_ids, _labels(encoded), wrong)


def _shifted(labels: Labels, ids: tuple[int, ...]) -> Labels:
    return [*labels[1:], IGNORE_INDEX]


def _eos_masked(labels: Labels, ids: tuple[int, ...]) -> Labels:
    return [*labels[:-1], IGNORE_INDEX]


def _user_supervised(labels: Labels, ids: tuple[int, ...]) -> Labels:
    return [*labels[:3], ids[3], *labels[4:]]


def _everything_supervised(labels: Labels, ids: tuple[int, ...]) -> Labels:
    return list(ids)


def _last_turn_alone(labels: Labels, ids: tuple[int, ...]) -> Labels:
    last = max(n for n, label in enumerate(labels) if label == IGNORE_INDEX)
    return [IGNORE_INDEX] * last + labels[last:]


def _another_token(labels: Labels, ids: tuple[int, ...]) -> Labels:
    return [*labels[:-1], labels[-1] + 1]


WRONG_LABELS = {
    _shifted: "ML541",
    _eos_masked: "ML546",
    _user_supervised: "ML547",
    _everything_supervised: "ML543",
    _last_turn_alone: "ML551",
    _another_token: "ML542",
}


@pytest.mark.parametrize("mutate", WRONG_LABELS)
def test_wrong_labels_fail_by_their_class_and_the_first_of_them_is_shown(
    mutate: Callable[[Labels, tuple[int, ...]], Labels], tokenizer: CheckpointTokenizer, encoded: EncodedRow
) -> None:
    right = _labels(encoded)
    wrong = mutate(right, encoded.input_ids)
    with pytest.raises(AssertionError) as error:
        assert_labels_exact(ROW, encoded.input_ids, wrong, tokenizer)
    first = next(n for n, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1])
    assert [line.split()[0] for line in _report(error) if line.startswith("ML")] == [WRONG_LABELS[mutate]]
    assert any(line.split()[:2] == [">", str(first)] for line in _report(error))
    assert f"  row:      {json.dumps(ROW)}" in _report(error)


def test_too_few_labels_fail(tokenizer: CheckpointTokenizer, encoded: EncodedRow) -> None:
    with pytest.raises(AssertionError) as error:
        assert_labels_exact(ROW, encoded.input_ids, _labels(encoded)[:-1], tokenizer)
    length = len(encoded.input_ids)
    assert _report(error)[0] == f"ML540 {length - 1} labels for {length} tokens"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda ids: ids[:-1], "ML522 the EOS at the end is missing"),
        (lambda ids: (ids[0], *ids), "ML521 BOS is there 2 times"),
        (lambda ids: (*ids[:4], 8000, *ids[5:]), "ML534 after [INST]: "),
    ],
)
def test_other_ids_fail_by_their_class(
    change: Callable[[tuple[int, ...]], tuple[int, ...]],
    line: str,
    tokenizer: CheckpointTokenizer,
    encoded: EncodedRow,
) -> None:
    ids = change(encoded.input_ids)
    with pytest.raises(AssertionError) as error:
        assert_labels_exact(ROW, ids, [IGNORE_INDEX] * len(ids), tokenizer)
    assert _report(error)[0].startswith(line)


def test_the_oracles_own_ids_inject_nothing(tokenizer: CheckpointTokenizer, encoded: EncodedRow) -> None:
    assert "[INST]" in ROW["messages"][3]["content"]
    assert_no_control_token_injection(ROW, encoded.input_ids, tokenizer)


def test_a_text_that_became_a_control_token_is_an_injection(
    tokenizer: CheckpointTokenizer, encoded: EncodedRow
) -> None:
    control = next(token for token, literal in tokenizer.oracle.control_tokens.items() if literal == "[INST]")
    with pytest.raises(AssertionError) as error:
        assert_no_control_token_injection(ROW, (*encoded.input_ids[:4], control, *encoded.input_ids[4:]), tokenizer)
    assert _report(error)[:2] == [f"ML106 [INST] (id {control}) 3 times", "  expected: 2 times"]


def test_the_naive_way_to_encode_injects(tokenizer: CheckpointTokenizer) -> None:
    text = "<s>" + "".join(f"[INST] {message['content']}[/INST]" for message in ROW["messages"])
    ids = tokenizer.fast(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(AssertionError) as error:
        assert_no_control_token_injection(ROW, ids, tokenizer)
    assert _report(error)[0].startswith("ML106 ")


def test_a_control_token_that_is_missing_fails_too(tokenizer: CheckpointTokenizer, encoded: EncodedRow) -> None:
    with pytest.raises(AssertionError) as error:
        assert_no_control_token_injection(ROW, encoded.input_ids[:-1], tokenizer)
    assert _report(error)[:2] == ["ML106 </s> (id 2) 1 times", "  expected: 2 times"]


def test_a_row_that_is_no_row_is_an_error_of_its_own(tokenizer: CheckpointTokenizer) -> None:
    for check in (
        lambda row: assert_template_faithful(row, tokenizer),
        lambda row: assert_labels_exact(row, [1], [1], tokenizer),
        lambda row: assert_no_control_token_injection(row, [1], tokenizer),
    ):
        with pytest.raises(RowError, match="bot"):
            check({"messages": [{"role": "bot", "content": "x"}]})


@pytest.fixture
def write_encoded(tmp_path: Path, encoded: EncodedRow) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        good = {**ROW, "row": 0, "input_ids": list(encoded.input_ids), "labels": _labels(encoded), "source": "mine"}
        path = tmp_path / "encoded.jsonl"
        lines = [good, {**good, **changes}, good]
        path.write_text("".join(json.dumps({**line, "row": row}) + "\n" for row, line in enumerate(lines)))
        return path

    return write


def test_encoded_rows_of_the_oracle_are_sound(
    write_encoded: Callable[..., Path], tokenizer: CheckpointTokenizer
) -> None:
    assert_encoded_rows_sound(write_encoded(), tokenizer)
    assert_encoded_rows_sound(str(write_encoded()), FILE)


def test_one_wrong_label_of_a_file_is_named_by_its_line(
    write_encoded: Callable[..., Path], tokenizer: CheckpointTokenizer, encoded: EncodedRow
) -> None:
    path = write_encoded(labels=_eos_masked(_labels(encoded), encoded.input_ids))
    with pytest.raises(AssertionError) as error:
        assert_encoded_rows_sound(path, tokenizer)
    assert [line for line in _report(error) if line.startswith("ML")] == [
        f"ML546 {path}:2: the EOS of turn 3 is masked"
    ]


def test_ids_of_another_conversation_are_named_by_their_line(
    write_encoded: Callable[..., Path], tokenizer: CheckpointTokenizer
) -> None:
    other = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    path = write_encoded(**other)
    with pytest.raises(AssertionError) as error:
        assert_encoded_rows_sound(path, tokenizer)
    assert _report(error)[0].startswith(f"ML535 {path}:2: it says 'Which colour is the sky?")


@pytest.mark.parametrize("changes", [{"labels": None}, {"input_ids": [1.5]}, {"labels": [True]}, {"messages": []}])
def test_a_line_that_is_no_encoded_row_is_an_error_of_its_own(
    changes: dict[str, Any], write_encoded: Callable[..., Path], tokenizer: CheckpointTokenizer
) -> None:
    with pytest.raises(RowsError, match=r"1 bad row\n.*encoded.jsonl:2[:,] "):
        assert_encoded_rows_sound(write_encoded(**changes), tokenizer)


def test_an_empty_file_is_not_sound(tmp_path: Path, tokenizer: CheckpointTokenizer) -> None:
    (tmp_path / "encoded.jsonl").touch()
    with pytest.raises(RowsError, match="the file has no rows"):
        assert_encoded_rows_sound(tmp_path / "encoded.jsonl", tokenizer)


def test_a_wrong_line_is_named_beside_one_that_cannot_be_read(
    write_encoded: Callable[..., Path], tokenizer: CheckpointTokenizer, encoded: EncodedRow
) -> None:
    path = write_encoded(labels=_eos_masked(_labels(encoded), encoded.input_ids))
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(AssertionError) as error:
        assert_encoded_rows_sound(path, tokenizer)
    text = str(error.value)
    assert text.startswith("ML546 ")
    assert "1 bad row" in text
