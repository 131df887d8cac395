"""No trainer, evaluator, server or quantiser is named outside `field`: in no title, why or fix, and in no code."""

from __future__ import annotations

import io
import re
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pytest_mistral_lora
from pytest_mistral_lora.programs.facts import programs
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.serving.servers import SERVERS

PACKAGE = Path(pytest_mistral_lora.__file__).parent
WITHOUT_A_ROOM = ("Unsloth", "torchtune", "LM Studio", "llm-compressor", "AutoGPTQ", "AutoAWQ", "OpenRLHF", "NeMo-RL")
"""Programs that change as fast, and that no part of `field` is about yet."""
CITATION = re.compile(r"https?://\S+|[\w.-]+/[\w.-]+(#\d+)?")
"""A thread, a file or a repository, which the source of a rule and a comment may name."""
TEXTS = {tokenize.STRING, tokenize.COMMENT, tokenize.NAME}


def names() -> set[str]:
    """The names of programs: those of the registries, of facts about programs that are no library, and some more."""
    found = {name for one in TRAINERS.of_this_package() for name in (one.name, one.title, one.distribution)}
    found |= {name for one in SERVERS.of_this_package() if one.name != "openai" for name in (one.name, one.title)}
    of_facts = [program for program in programs().values() if program.kind != "library"]
    found |= {name for program in of_facts for name in (program.program, program.title)}
    return found | {*WITHOUT_A_ROOM}


@cache
def pattern() -> re.Pattern[str]:
    """Match each name in any spelling: `llama.cpp`, `llamacpp`, `llama_cpp`, `LlamaCpp`."""
    spellings = {"[-_. ]?".join(map(re.escape, re.split(r"[-_. ]", name.lower()))) for name in names()}
    return re.compile(
        rf"(?<![a-z0-9])({'|'.join(sorted(spellings, key=len, reverse=True))})(?![a-z0-9])", re.IGNORECASE
    )


def texts_of_code(source: str) -> Iterator[tuple[int, str]]:
    """Yield the words, texts and comments of a module, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in TEXTS:
            yield token.start[0], token.string


def texts_of_data(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts of a table, with their keys; a source may cite a thread, and people search by any name."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in {"source", "symptoms"}:
                yield from texts_of_data(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from texts_of_data(item, path)
    elif isinstance(value, str):
        yield path, value


def named(texts: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Return the names of programs in texts, each with its place."""
    known = pattern()
    found = [(place, known.search(CITATION.sub("", text))) for place, text in texts]
    return [(place, match[0]) for place, match in found if match]


def outside(suffix: str) -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob(f"*{suffix}")) if "field" not in path.relative_to(PACKAGE).parts]


def test_each_program_is_known_in_its_spellings() -> None:
    known = pattern()
    for text in (
        "vLLM",
        "llama.cpp",
        "llamacpp",
        "LLaMA-Factory",
        "LlamaFactory",
        "ms-swift",
        "TRL's",
        "lm_eval",
        "Ollama",
    ):
        assert known.search(text), text
    for text in ("control", "llama", "transformers", "patrol", "evaluation", "swift"):
        assert not known.search(text), text


def named_in(suffix: str, texts_of: Callable[[str], Iterable[tuple[Any, str]]]) -> dict[str, list[tuple[Any, str]]]:
    """Return the names of programs in the files of a suffix outside `field`, by file."""
    known = pattern()
    texts = {path: path.read_text(encoding="utf-8") for path in outside(suffix)}
    assert texts
    # most files have no such name at all, and need not be taken apart
    found = {
        str(path.relative_to(PACKAGE)): named(texts_of(text)) for path, text in texts.items() if known.search(text)
    }
    return {path: places for path, places in found.items() if places}


def test_no_code_names_a_program() -> None:
    assert named_in(".py", texts_of_code) == {}


def test_no_table_names_a_program() -> None:
    assert named_in(".toml", lambda text: texts_of_data(tomllib.loads(text))) == {}


def test_no_page_names_a_program() -> None:
    assert named_in(".jinja", lambda text: enumerate(text.splitlines(), 1)) == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""As vLLM does."""', [(1, "vLLM")]),
        ("x = 1\nfor_trl = 2", [(2, "trl")]),
        ("# see huggingface/trl#3091", []),
        ("# TRL does so: huggingface/trl#3091", [(1, "TRL")]),
        ('link = "https://github.com/vllm-project/vllm"', []),
    ],
)
def test_a_name_is_found_and_a_citation_is_none(source: str, found: list[tuple[int, str]]) -> None:
    assert named(texts_of_code(source)) == found
