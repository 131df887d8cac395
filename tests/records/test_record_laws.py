"""Laws of what is recorded: what a hash is blind to, what it sees, and that a transcript's file is the transcript."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sample_transcripts import reordered_parameters, transcript, weather_row

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.fields import IN_ORDER
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.records.files import is_held_out, sha256_ids, sha256_rows
from pytest_mistral_lora.records.transcripts import Transcript, load, violations
from pytest_mistral_lora.strategies import rows

CHATS = rows().map(parse_row)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


def hashed(data: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.write_bytes(data)
        return sha256_rows(list(read_rows(file)))


def lines(chats: list[Row]) -> list[str]:
    return [json.dumps(row.to_json(), ensure_ascii=False) for row in chats]


def reordered(value: Any, reverse: bool) -> Any:
    if isinstance(value, dict):
        return {
            key: value[key] if key in IN_ORDER else reordered(value[key], reverse)
            for key in sorted(value, reverse=reverse)
        }
    return [reordered(one, reverse) for one in value] if isinstance(value, list) else value


@given(chats=st.lists(CHATS, min_size=1, max_size=3), data=st.data())
def test_a_hash_of_rows_is_blind_to_how_the_file_is_written(chats: list[Row], data: st.DataObject) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    written = []
    for row in chats:
        written += [""] * data.draw(st.integers(0, 2))
        escaped, spaced = data.draw(st.booleans()), data.draw(st.booleans())
        value = reordered(row.to_json(), data.draw(st.booleans()))
        separators = (" , ", " : ") if spaced else (",", ":")
        written.append(json.dumps(value, ensure_ascii=escaped, separators=separators))
    text = ("\ufeff" if data.draw(st.booleans()) else "") + end.join(written) + data.draw(st.sampled_from(["", end]))
    assert hashed(text.encode()) == sha256_rows(chats) == hashed("\n".join(lines(chats)).encode())


@given(chats=st.lists(CHATS, min_size=2, max_size=4, unique_by=lambda row: row.to_jsonl()), data=st.data())
def test_a_hash_of_rows_sees_their_order_and_their_number(chats: list[Row], data: st.DataObject) -> None:
    other = data.draw(st.permutations(chats))
    assert (sha256_rows(other) == sha256_rows(chats)) is (other == chats)
    assert len({sha256_rows(chats), sha256_rows(chats[:-1]), sha256_rows([*chats, chats[0]])}) == 3


def test_a_hash_of_rows_sees_a_key_order_that_changes_ids() -> None:
    row = parse_row(weather_row())
    other = parse_row(reordered_parameters(weather_row()))
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    assert oracle.encode(row).input_ids != oracle.encode(other).input_ids
    assert sha256_rows([row]) != sha256_rows([other])
    assert row != other
    # both are on one side of a split by hash
    assert {is_held_out(row, share / 20) == is_held_out(other, share / 20) for share in range(20)} == {True}


@given(text=TEXTS, change=st.sampled_from(["NFC", "NFD", "NFKC", "space", "newline"]))
def test_a_hash_of_rows_sees_each_character(text: str, change: str) -> None:
    ends = {"space": text + " ", "newline": text.replace(" ", "\n") + "\r"}
    other = ends[change] if change in ends else unicodedata.normalize(change, text)
    assume(other != text)

    def line(content: str) -> bytes:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{content}b"}]
        return json.dumps({"messages": messages}).encode()

    assert hashed(line(text)) != hashed(line(other))


def test_a_composed_letter_is_not_its_parts() -> None:
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "%s"}]}'
    assert hashed((line % "caf\u00e9").encode()) != hashed((line % "cafe\u0301").encode())


@given(ids=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4), other=st.data())
def test_a_hash_of_ids_sees_where_a_row_ends(ids: list[list[int]], other: st.DataObject) -> None:
    flat = [one for row in ids for one in row]
    cuts = sorted(other.draw(st.lists(st.integers(0, len(flat)), max_size=3)))
    parts = [flat[a:b] for a, b in zip([0, *cuts], [*cuts, len(flat)], strict=True)]
    assert (sha256_ids(parts) == sha256_ids(ids)) is (parts == ids)


NUMBERS = st.floats(-50, 0).map(lambda value: round(value, 6) + 0.0)
CHECKS = st.one_of(
    st.sampled_from([FormatCheck("json"), FormatCheck("eos"), FormatCheck("tool_call")]),
    TEXTS.map(lambda text: FormatCheck("regex", text)),
    st.integers(1, 9).map(lambda most: FormatCheck("max_tokens", most)),
    st.sampled_from([FormatCheck("json_schema", {"type": "string"}), FormatCheck("json_schema", False)]),
)


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    length = draw(st.integers(1, 5))
    stop = draw(st.sampled_from(["eos", "length"]))
    numbers = st.lists(st.integers(0, 2**17), min_size=length, max_size=length).map(tuple)
    reasons = [(check, draw(TEXTS | st.just(""))) for check in draw(st.lists(CHECKS, max_size=3))]
    return transcript(
        row=draw(CHATS),
        prompt_ids=draw(st.lists(st.integers(0, 2**17), min_size=1, max_size=5).map(tuple)),
        completion_ids=draw(numbers),
        runner_up_ids=draw(numbers),
        text=draw(TEXTS | st.just("")),
        stop=stop,
        max_new_tokens=length if stop == "length" else draw(st.integers(length, 99)),
        logprobs=draw(st.lists(NUMBERS, min_size=length, max_size=length).map(tuple)),
        margins=draw(st.lists(NUMBERS.map(abs), min_size=length, max_size=length).map(tuple)),
        checks=tuple({**check.to_json(), "passed": not why, "reason": why} for check, why in reasons),
        device=draw(st.sampled_from(["cpu", "cuda"])),
        precision=draw(st.sampled_from(get_args(Precision))),
    )


@given(one=transcripts())
def test_a_transcript_is_read_as_it_was_written(one: Transcript) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = one.write(Path(folder))
        assert load(file) == one
        assert load(file).to_text() == one.to_text() == file.read_text(encoding="utf-8")
    assert one.to_text().count("\n") == len(one.to_json()) + 2


OTHER_TYPES = {bool: 7, int: "7", float: "0.5", str: 7, list: {}, dict: [], type(None): 7}
FREE = ("$.row.messages", "$.row.tools", "$.answer")
"""Parts that the rules of a chat row judge, not the schema."""


def places(value: Any, path: str = "$") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, parent and key of everything in a transcript that its schema names."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        here = f"{path}.{key}" if isinstance(key, str) else f"{path}[{key}]"
        yield here, value, key
        if here not in FREE:
            yield from places(inner, here)


SAMPLE = transcript(checks=({"name": "short", "kind": "max_tokens", "value": 9, "passed": True, "reason": ""},))
PATHS = [path for path, _, _ in places(SAMPLE.to_json())]


def broken(path: str) -> tuple[dict[str, Any], Any, Any]:
    data = json.loads(SAMPLE.to_text())
    [(parent, key)] = [(parent, key) for one, parent, key in places(data) if one == path]
    return data, parent, key


def test_every_part_of_a_transcript_is_tried() -> None:
    assert len(PATHS) == len(set(PATHS)) > 40
    assert violations(SAMPLE.to_json(), "row-0001") == []


@pytest.mark.parametrize("path", PATHS)
def test_another_type_is_a_violation_at_its_path(path: str) -> None:
    data, parent, key = broken(path)
    parent[key] = OTHER_TYPES[type(parent[key])]
    assert any(str(one.place) == path for one in violations(data, "row-0001")), violations(data, "row-0001")


@pytest.mark.parametrize("path", [path for path in PATHS if not path.endswith("]")])
def test_a_missing_key_is_a_violation_at_its_path(path: str) -> None:
    data, parent, key = broken(path)
    del parent[key]
    optional = path == "$.row.tools"
    found = [one for one in violations(data, "row-0001") if path in str(one.place)]
    assert [(str(one.place), one.found) for one in found] == ([] if optional else [(path, "")])
