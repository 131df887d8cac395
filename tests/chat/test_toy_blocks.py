"""Blocks that a test brings along are encoded, judged, read back and counted: no file of the package knows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from each_oracle import oracle_named
from toy_blocks import MAP, SOUND
from toys import ids_alone, with_ids, write_lines

from pytest_mistral_lora import audit, judge
from pytest_mistral_lora.chat.chunks.registry import chunk_types, register_types
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.oracle.read_back import UnreadableIdsError, read_back
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError

NAME = "spm-v7m1"
HEARD = {"type": "sound", "sound": "sounds/a.wav", "seconds": 3}
SEEN = {"type": "map", "rows": 2, "tiles": 3}
BLOCKS = {
    "sound": (HEARD, ["[PREFIX]", "[MIDDLE]", "[MIDDLE]", "[MIDDLE]"]),
    "map": (SEEN, [*["[TOOL_CONTENT]"] * 3, "[SUFFIX]"] * 2),
}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    register_types([SOUND.importable, MAP.importable])
    yield
    for kind in (SOUND, MAP):
        chunk_types().pop(kind.name)


def record(*chunks: Any, answer: str = "It is loud.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*chunks]}, {"role": "assistant", "content": answer}]}


TEXT = {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_encoded_and_read_back(name: str) -> None:
    chunk, literals = BLOCKS[name]
    oracle, row = oracle_named(NAME), Row.from_dict(record(chunk, TEXT))
    encoded = oracle.encode(row)
    block = [oracle.control_ids[literal] for literal in literals]
    assert list(encoded.input_ids[2 : 2 + len(block)]) == block
    assert encoded.input_ids == oracle.reference(row)
    again = read_back(encoded.input_ids, oracle)
    assert oracle.encode(again).input_ids == encoded.input_ids
    [read, _] = again.messages[0]["content"]
    assert {key: read[key] for key in chunk_types()[name].measures}.items() <= chunk.items()
    everything = oracle.encode(row.with_objective(Objective.of("everything", "here")))
    assert everything.labels is not None
    assert set(everything.labels[2 : 2 + len(block)]) == {-100}
    with pytest.raises(UnreadableIdsError):
        read_back([*encoded.input_ids[:2], block[0], *encoded.input_ids[2 + len(block) :]], oracle)


def test_only_the_user_has_it() -> None:
    with pytest.raises(RowError, match="sound of the user"):
        Row.from_dict(
            record(TEXT) | {"messages": [*record(TEXT)["messages"], {"role": "assistant", "content": [HEARD]}]}
        )


def test_its_files_are_named() -> None:
    assert (SOUND.assets(HEARD), MAP.assets(SEEN)) == (("sounds/a.wav",), ())


def test_a_file_of_them_is_judged(tmp_path: Path) -> None:
    words = ("loud", "soft", "high", "low")
    rows = [record(HEARD | {"seconds": n + 1}, SEEN, TEXT, answer=f"It is {word}.") for n, word in enumerate(words)]
    verdict = judge(write_lines(tmp_path / "rows.jsonl", rows), tokenizer=NAME)
    assert verdict.findings == ()
    facts = verdict.facts["rows.jsonl::dataset::statistics"]
    assert (facts["rows_with_sounds"], facts["rows_with_maps"], facts["rows_with_images"]) == (4, 4, 0)
    lines = with_ids(oracle_named(NAME), rows)
    for given in (lines, ids_alone(lines)):
        verdict = audit(given, tokenizer=NAME)
        assert verdict.findings == ()
        assert verdict.facts["rows::encoded::ids"]["judged"] == 4
