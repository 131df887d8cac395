"""Pictures beside the messages of a record become chunks of its messages, as the programs that wrote it place them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from imported import answer, chat, user, written

from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.convert import Source, conversions
from pytest_mistral_lora.formats.report import Report

TEXT = {"type": "text", "text": "u"}


def image(path: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": path, **more}


def imported_content(path: Path, record: dict[str, Any]) -> Any:
    report = Report()
    [result] = conversions(Source(written(path, record)), report)
    if isinstance(result, RowError):
        raise result
    assert "pictures" in report.changes
    return result.data["messages"][0]["content"]


@pytest.mark.parametrize(
    ("content", "images", "becomes"),
    [
        ("u", ["a.png"], [image("a.png"), TEXT]),
        ("u", ["a.png", "b.png"], [image("a.png"), image("b.png"), TEXT]),
        ([{"type": "image"}, TEXT], [{"path": "a.png", "bytes": None}], [image("a.png"), TEXT]),
        ([TEXT, image("a.png")], ["a.png"], [TEXT, image("a.png")]),
        ("<image>u<image>", ["a.png", "b.png"], [image("a.png"), TEXT, image("b.png")]),
        ("u<image>", [{"url": "a.png", "width": 3, "height": 2}], [TEXT, image("a.png", width=3, height=2)]),
        ("`<image>` u<image>", "a.png", [{"type": "text", "text": "`<image>` u"}, image("a.png")]),
    ],
)
def test_pictures_are_chunks_in_the_order_of_their_placeholders(
    content: Any, images: Any, becomes: Any, tmp_path: Path
) -> None:
    assert imported_content(tmp_path / "a.jsonl", chat(user(content), answer("a")) | {"images": images}) == becomes


@pytest.mark.parametrize(
    ("content", "images", "found"),
    [
        ("<image>u<image>", ["a.png"], "1 picture for 2 placeholders in the messages"),
        ("<image>u", ["a.png", "b.png"], "2 pictures for 1 placeholder in the messages"),
        ("```\n<image>\n```\nu", ["a.png"], "1 picture for 0 placeholders in the messages, and 1 in code"),
    ],
)
def test_another_number_of_placeholders_is_an_error(content: Any, images: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        imported_content(tmp_path / "a.jsonl", chat(user(content), answer("a")) | {"images": images})
    assert caught.value.found == found
    assert caught.value.place.field == "images"
