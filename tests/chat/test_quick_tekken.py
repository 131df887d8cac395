"""A Tekken file is loaded faster than by mistral-common, and into the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from derived_tekken import cut_tokenizer, tokenizer_named
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sampling import sampled

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.oracle.quick_tekken import QuickTekkenizer, load_tokenizer

from_file = vars(Tekkenizer)["from_file"].__func__
"""The function of mistral-common: other tests share the files that they parse."""


def pieces(file: Path) -> list[str]:
    """Return what a `QuickTekkenizer` takes its pieces for."""
    made: list[str] = from_file(QuickTekkenizer, file)._vocab
    return made


def parts(loaded: Any) -> dict[str, Any]:
    """Return what a text tokenizer has, but for the object of another library, which compares by identity."""
    return {name: value for name, value in vars(loaded.instruct_tokenizer.tokenizer).items() if name != "_model"}


@pytest.mark.parametrize("name", sampled(["tekken-cut", "tekken-240718", "tekken-240911"], {"tekken-cut"}))
def test_a_file_is_loaded_into_what_mistral_common_makes(name: str) -> None:
    file = tokenizer_named(name)
    loaded, plain = load_tokenizer(str(file)), MistralTokenizer.from_file(file)
    assert parts(loaded) == parts(plain)
    assert pieces(file) == parts(plain)["_vocab"]
    assert type(loaded.instruct_tokenizer.tokenizer) is Tekkenizer
    assert type(loaded.instruct_tokenizer) is type(plain.instruct_tokenizer)


def test_mistral_common_decodes_a_sample_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[list[int]] = []
    decode = Tekkenizer.decode

    def noted(self: Tekkenizer, tokens: list[int], *rest: Any, **more: Any) -> str:
        decoded.append(tokens)
        return decode(self, tokens, *rest, **more)

    monkeypatch.setattr(Tekkenizer, "decode", noted)
    pieces(shipped_tokenizer("tekken-240911"))
    assert 1000 + 256 < len(decoded) < 4_000


def test_pieces_that_another_mistral_common_makes_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    file = cut_tokenizer()
    before, decode = pieces(file), Tekkenizer.decode
    monkeypatch.setattr(Tekkenizer, "decode", lambda self, *tokens, **more: decode(self, *tokens, **more).upper())
    assert pieces(file) == [piece.upper() for piece in before] != before


def test_pieces_that_are_kept_elsewhere_are_mistral_commons() -> None:
    assert object.__new__(QuickTekkenizer)._pieces is None
