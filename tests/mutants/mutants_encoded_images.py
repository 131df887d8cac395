"""Images that a trainer has cut or placed otherwise than mistral-common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench_encoded import hold_row, shared_oracle
from gallery import Artifact, mutant

from pytest_mistral_lora.chat.chunks.chunk_type import ImageSizes
from pytest_mistral_lora.chat.chunks.image import grid_of, grid_of_transformers

TOKENIZER = "spm-v7m1"
WIDTH, HEIGHT = 1092, 69
"""The size of the picture: scaled down, one side is rounded otherwise by transformers."""


def show(artifact: Artifact) -> None:
    """Let the files hold a row with an image, whose size stands beside it."""
    image = {"type": "image_url", "image_url": "https://example.org/sky.png", "width": WIDTH, "height": HEIGHT}
    asked = {"role": "user", "content": [image, {"type": "text", "text": "Which colour is it?"}]}
    hold_row(artifact, {"messages": [asked, {"role": "assistant", "content": "Blue."}]}, TOKENIZER)


def cut_otherwise(artifact: Artifact, cut: Callable[[list[int]], list[int]]) -> None:
    """Change the tokens behind [INST] up to the end of the image."""
    line = artifact["lines"][0]
    oracle = shared_oracle(TOKENIZER)
    ids, end = line["input_ids"], line["input_ids"].index(oracle.control_ids["[IMG_END]"]) + 1
    changed = [*ids[:2], *cut(ids[2:end])]
    line["input_ids"] = [*changed, *ids[end:]]
    line["labels"] = [*[-100] * len(changed), *line["labels"][end:]]


def grid(literals: list[str]) -> list[int]:
    return [shared_oracle(TOKENIZER).control_ids[literal] for literal in literals]


@mutant("ML562", "N208", says="cut by patches of 14, 2 to a token, up to 1540 pixels")
def settings_of_another_base(artifact: Artifact) -> None:
    """The image is cut by the settings of another base."""
    show(artifact)
    cut_otherwise(artifact, lambda ids: grid(grid_of(WIDTH, HEIGHT, ImageSizes(14, 1540, 2)).literals))


@mutant("ML562", "N208", says="rounded down")
def rounded_as_transformers_rounds(artifact: Artifact) -> None:
    """A side that is scaled down is rounded down."""
    show(artifact)
    cut_otherwise(artifact, lambda ids: grid(grid_of_transformers(WIDTH, HEIGHT, ImageSizes(16, 1024, 1)).literals))


@mutant("ML562", says="1 image of 1 lost")
def the_image_is_lost(artifact: Artifact) -> None:
    """A collator for texts leaves the image out."""
    show(artifact)
    cut_otherwise(artifact, lambda ids: [])


@mutant("ML562", says="of a grid has")
def a_break_is_lost(artifact: Artifact) -> None:
    """A line has no break."""
    show(artifact)
    cut_otherwise(artifact, lambda ids: [*ids[:64], *ids[65:]])


@mutant("ML562", says="at another place")
def behind_the_text(artifact: Artifact) -> None:
    """A template leaves the image behind its text."""
    show(artifact)
    line: dict[str, Any] = artifact["lines"][0]
    oracle = shared_oracle(TOKENIZER)
    ids = line["input_ids"]
    end, closing = (ids.index(oracle.control_ids[literal]) for literal in ("[IMG_END]", "[/INST]"))
    line["input_ids"] = [*ids[:2], *ids[end + 1 : closing], *ids[2 : end + 1], *ids[closing:]]
