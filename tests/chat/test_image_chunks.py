"""Pictures become grids of tokens by their size, as mistral-common cuts and places them: no path or URL is opened."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from each_oracle import oracle_named
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image

from pytest_mistral_lora.chat.chunks.chunk_type import ImageSizes
from pytest_mistral_lora.chat.chunks.image import IMAGE, grid_of, grid_of_transformers
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.objective import TURNS, Objective
from pytest_mistral_lora.chat.oracle.read_back import UnreadableIdsError, read_back
from pytest_mistral_lora.chat.reading import pictures
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import MistralLoraError, RowError, UncheckedRowError
from pytest_mistral_lora.places import Place

SEEING = ("spm-v7m1", "tekken-240911")
A, B = {"type": "image_url", "image_url": {"url": "pictures/a.png"}}, {"type": "image_url", "image_url": "b.jpg"}
TEXT, MORE = {"type": "text", "text": "Look at"}, {"type": "text", "text": "this [IMG] letter."}
GRIDS = {"A": (4, 3), "B": (19, 2)}
"""Columns and lines of 64x48 and 300x20 pixels, by patches of 16."""
SIZES = [ImageSizes(16, 1024, 1), ImageSizes(14, 1540, 2), ImageSizes(14, 1024, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset with two pictures, and one beside the folder."""
    folder = tmp_path_factory.mktemp("seen") / "data"
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(folder / "pictures" / "a.png")
    Image.new("L", (300, 20)).save(folder / "b.jpg")
    Image.new("RGB", (10, 10)).save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


def row_of(content: Any, folder: Path | None, system: str = "") -> Row:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A red square."}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    place = {} if folder is None else {"place": Place.of(folder / "rows.jsonl", 1)}
    return parse_row({"messages": messages}, **place)


def picture(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}


def png(width: int, height: int, **how: Any) -> bytes:
    data = io.BytesIO()
    Image.new("1", (width, height)).save(data, "PNG", **how)
    return data.getvalue()


@pytest.mark.parametrize("sizes", SIZES)
def test_the_grid_is_that_of_mistral_common(sizes: ImageSizes) -> None:
    config = ImageConfig(sizes.patch, sizes.longest, sizes.merge)
    encoder = ImageEncoder(config, SpecialImageIDs(10, 12, 13))
    draw = random.Random(0)
    odd = [(1, 1), (5000, 1), (1, 5000), (5000, 2), (1024, 1024), (1540, 1541), (3096, 389), (2018, 2705), (1723, 166)]
    for width, height in [*odd, *((draw.randint(1, 4000), draw.randint(1, 4000)) for _ in range(291))]:
        expected = encoder._image_to_num_tokens(SimpleNamespace(size=(width, height)))
        assert grid_of(width, height, sizes) == expected
        literals = grid_of(width, height, sizes).literals
        assert len(literals) == (expected[0] + 1) * expected[1]
        chunk, length = IMAGE.read([*literals, "[IMG]"], sizes)
        assert length == len(literals)
        assert grid_of(chunk["width"], chunk["height"], sizes) == expected


def test_transformers_rounds_a_side_that_is_scaled_down() -> None:
    assert (grid_of(3096, 389, SIZES[0]), grid_of_transformers(3096, 389, SIZES[0])) == ((64, 9), (64, 8))
    assert (grid_of(2018, 2705, SIZES[1]), grid_of_transformers(2018, 2705, SIZES[1])) == ((42, 55), (41, 55))
    assert grid_of_transformers(5000, 2, SIZES[0]).lines == 0
    assert grid_of_transformers(1000, 900, SIZES[0]) == grid_of(1000, 900, SIZES[0])


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize(
    ("content", "order"),
    [
        # mistral-common says that it will leave the first two as they are: then this fails, and so do recorded ids
        ([TEXT, A], "A Look at"),
        ([TEXT, MORE, A], "A Look at"),
        ([A, TEXT], "A Look at"),
        ([TEXT, A, MORE], "Look at A this [IMG] letter."),
        ([TEXT, A, B], "Look at A B"),
    ],
)
@pytest.mark.parametrize("name", SEEING)
def test_pictures_stand_where_mistral_common_puts_them(
    name: str, content: Any, order: str, system: str, folder: Path
) -> None:
    oracle, row = oracle_named(name), row_of(content, folder, system)
    encoded = oracle.encode(row)
    assert encoded.input_ids == oracle.reference(row)
    ids, shown = list(encoded.input_ids), []
    literals = [oracle.control_tokens.get(token, "") for token in ids]
    at = literals.index("[INST]") + 1
    while literals[at] != "[/INST]":
        end = next(n for n in range(at, len(ids)) if (literals[n] == "") != (literals[at] == ""))
        end = at + IMAGE.read(literals[at:end], oracle.image_sizes or SIZES[0])[1] if literals[at] else end
        grid = grid_of(64, 48, SIZES[0]).literals
        shown.append(oracle.decode(ids[at:end]) if not literals[at] else "AB"[literals[at:end] != grid])
        at = end
    text = " ".join(part.strip() for part in shown).removeprefix(system).strip()
    assert text.startswith(order)
    again = read_back(encoded.input_ids, oracle)
    assert oracle.encode(again).input_ids == encoded.input_ids


@pytest.mark.parametrize("name", SEEING)
def test_no_token_of_a_picture_has_a_loss_under_any_objective(name: str, folder: Path) -> None:
    oracle, row = oracle_named(name), row_of([A, TEXT, B], folder)
    for word in TURNS:
        encoded = oracle.encode(row.with_objective(Objective.of(word, "here")))
        assert encoded.labels is not None
        trained = {token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label >= 0}
        assert oracle.eos_id in trained
        assert not trained & oracle.block_ids


def test_the_size_comes_from_the_header_or_from_beside_the_picture(folder: Path) -> None:
    [content] = [row_of([A, B], folder).messages[0]["content"]]
    assert [(chunk["width"], chunk["height"]) for chunk in content] == [(64, 48), (300, 20)]
    inline = row_of([picture(png(7, 9))], None).messages[0]["content"][0]
    assert (inline["width"], inline["height"]) == (7, 9)
    declared = {"type": "image_url", "image_url": "https://example.org/a.png", "width": 64, "height": 48}
    oracle = oracle_named("tekken-240911")
    assert oracle.encode(row_of([declared], folder)) == oracle.encode(row_of([A], folder))
    with pytest.raises(RowError, match="64x40, and the picture has 64x48"):
        row_of([{**A, "width": 64, "height": 40}], folder)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:9/a.png",
        "http://127.0.0.1:9/a.png",
        "file://{folder}/pictures/a.png",
        "{folder}/pictures/a.png",
        "../outside.png",
        "link.png",
        "pictures/../../outside.png",
        "missing.png",
        "ftp://example.org/a.png",
        "/dev/zero",
    ],
)
def test_what_is_outside_of_the_folder_is_never_opened(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*given: Any) -> None:
        pytest.fail(f"opened: {given}")

    monkeypatch.setattr(pictures, "_reader", opened)
    with pytest.raises(UncheckedRowError) as caught:
        row_of([{"type": "image_url", "image_url": {"url": url.format(folder=folder)}}], folder)
    assert caught.value.reason == "image of unknown size"
    assert caught.value.place.field == "messages[0].content[0]"


def test_mistral_common_gets_no_path_and_no_url(folder: Path) -> None:
    oracle = oracle_named("tekken-240911")
    asked = {"role": "user", "content": [{"type": "image_url", "image_url": f"file://{folder}/b.jpg"}]}
    given = {"messages": [asked, {"role": "assistant", "content": "Grey."}]}
    request = pytest.importorskip("mistral_common.protocol.instruct.request").ChatCompletionRequest
    with pytest.raises(MistralLoraError, match="never opened"):
        oracle.library_tokenizer.encode_chat_completion(request.model_validate(given))


def test_a_tokenizer_without_settings_of_images_does_not_judge_them(folder: Path) -> None:
    for name in ("spm-v3", "spm-v1", "tekken-240718"):
        with pytest.raises(UncheckedRowError) as caught:
            oracle_named(name).encode(row_of([A, TEXT], folder))
        assert "no settings of images" in caught.value.reason


@pytest.mark.parametrize(
    ("literals", "found"),
    [
        (["[IMG]", "[IMG_BREAK]", "[IMG]", "[IMG]", "[IMG_END]"], "line 2 of a grid has 2 [IMG], and the first has 1"),
        (["[IMG]", "[IMG_BREAK]", "[IMG]"], "a grid without [IMG_END] behind 1 whole lines"),
        (["[IMG]", "[IMG_BREAK]", "[IMG_END]"], "line 2 of a grid has 0 [IMG], and the first has 1"),
        (["[IMG]"] * 65 + ["[IMG_END]"], "a grid of 65x1 tokens is larger than any picture becomes"),
    ],
)
def test_a_grid_that_no_picture_has_is_not_read_back(literals: list[str], found: str) -> None:
    oracle = oracle_named("tekken-240911")
    ids = [oracle.control_ids[literal] for literal in ("<s>", "[INST]", *literals, "[/INST]")]
    with pytest.raises(UnreadableIdsError) as caught:
        read_back([*ids, *oracle.encode_text("Red."), oracle.eos_id], oracle)
    assert (caught.value.token, caught.value.found) == (2, found)


def test_hostile_headers_end_no_run() -> None:
    """1,000 headers that were changed, cut or made up are a size, or an error of the row."""
    sources = [png(64, 48), png(3, 3)]
    for name in ("JPEG", "WEBP", "GIF", "BMP"):
        data = io.BytesIO()
        Image.new("RGB", (30, 20)).save(data, name)
        sources.append(data.getvalue())
    draw, read = random.Random(1), 0
    for number in range(1000):
        data = bytearray(sources[number % len(sources)])
        for _ in range(draw.randint(0, 6)):
            data[draw.randrange(min(60, len(data)))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        try:
            width, height = (
                row_of([picture(bytes(data))], None).messages[0]["content"][0][key] for key in IMAGE.measures
            )
            assert 0 < width * height <= pictures.MAX_PIXELS
            read += 1
        except RowError:
            continue
    assert 50 < read < 900


def test_a_picture_of_too_many_pixels_is_refused() -> None:
    header = bytearray(png(1, 1))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(RowError, match="a picture that cannot be read"):
        row_of([picture(bytes(header))], None)


def test_the_row_is_written_as_it_was_read(folder: Path) -> None:
    row = row_of([A, TEXT], folder)
    again = parse_row(json.loads(row.to_jsonl()))
    assert again == row
