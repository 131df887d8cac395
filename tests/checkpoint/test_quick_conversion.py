"""Conversions that skip work give the tokenizer that transformers gives, and leave the process as it was."""

from __future__ import annotations

import copy
import copyreg
import gc
import inspect
import threading
from types import FunctionType
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pytest_mistral_lora.checkpoint import quick_conversion as module
from pytest_mistral_lora.checkpoint.quick_conversion import extract_merges, quick_conversion, with_quick_merges

mistral = pytest.importorskip("transformers.integrations.mistral")
convert = getattr(mistral, "convert_tekken_tokenizer", None)
converter = getattr(inspect.unwrap(convert), "__globals__", {}).get("MistralConverter") if convert else None
extract = getattr(converter, "_extract_merges", None)
newer_only = pytest.mark.skipif(extract is None, reason="this transformers makes the merges elsewhere")

TEXTS = (" a", "ab", "bc", "abc", " ab", " abc", "aa", "aaaa", "é", "你", "你好", "  ", "    ", " \n")
RANKS = [bytes([byte]) for byte in range(256)] + [text.encode() for text in TEXTS]


def ranks() -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate([*RANKS, b"\xff\xfe", b"a\xff", b"a\xff\xfe"])}


@newer_only
def test_the_merges_are_those_of_transformers_in_its_order() -> None:
    assert extract is not None
    (vocabulary, merges), (expected, theirs) = extract_merges(ranks()), extract(ranks())
    assert [*vocabulary.items()] == [*expected.items()]
    assert merges == theirs
    # "abc" and "aaaa" have two ways each, in the order of their parts
    assert merges.index(("a", "bc")) + 1 == merges.index(("ab", "c"))


@newer_only
def test_the_installed_transformers_has_the_merges_that_are_equalled() -> None:
    quick = with_quick_merges(convert)  # type: ignore[arg-type]
    assert quick is not convert
    assert isinstance(quick, FunctionType)
    assert quick.__globals__["MistralConverter"]._extract_merges is extract_merges
    # the library itself stays as it is
    assert converter._extract_merges is extract


@newer_only
def test_merges_that_another_transformers_makes_differently_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(bpe_ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
        return {}, []

    monkeypatch.setattr(converter, "_extract_merges", staticmethod(changed))
    assert with_quick_merges(convert) is convert  # type: ignore[arg-type]


def test_a_tokenizer_is_copied_by_other_threads_alone() -> None:
    made = Tokenizer(BPE({"a": 0}, []))
    copies: list[Any] = []
    with quick_conversion():
        assert copy.deepcopy(made) is made
        other = threading.Thread(target=lambda: copies.append(copy.deepcopy(made)))
        other.start()
        other.join()
    assert copies[0] is not made
    assert copies[0].to_str() == made.to_str()
    assert copy.deepcopy(made) is not made


@pytest.mark.parametrize("is_collecting", [True, False])
def test_the_process_is_as_before_even_after_an_error(is_collecting: bool) -> None:
    collects, before = gc.isenabled(), dict(copyreg.dispatch_table)
    try:
        (gc.enable if is_collecting else gc.disable)()
        with pytest.raises(ZeroDivisionError), quick_conversion():
            # the collector is held back, or this would pass
            _ = 1 / int(gc.isenabled())
        assert gc.isenabled() is is_collecting
        assert copyreg.dispatch_table == before
    finally:
        (gc.enable if collects else gc.disable)()


def test_an_installation_without_sources_has_its_own_merges() -> None:
    names: dict[str, Any] = {}
    exec("def made_from_text(): pass", names)
    assert module._source_digest(names["made_from_text"]) == ""
