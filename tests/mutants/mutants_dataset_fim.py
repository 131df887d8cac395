"""Faults of fill-in-the-middle rows: texts that overlap, markers of other models, suffixes that were lost."""

from __future__ import annotations

from collections.abc import Callable

from bench_dataset import SPACED, gap
from gallery import Artifact, mutant

MANY = 25
_LINES = "    total = first + second\n    mean = total / 2\n    return mean, total\n"


def add_gaps(artifact: Artifact, made: Callable[[int], dict[str, str]] = gap) -> None:
    """Add many fill-in-the-middle rows."""
    artifact["rows"] += [made(number) for number in range(MANY)]


@mutant("ML670", says="the completion decodes to ' area_0")
def completions_with_the_space_of_a_text(artifact: Artifact) -> None:
    """The tokenizer encodes each completion as a text of its own, with SentencePiece's space in front."""
    artifact["tokenizer"] = SPACED
    add_gaps(artifact)


@mutant("ML601", says="fill-in-the-middle without a completion")
def a_suffix_without_a_completion(artifact: Artifact) -> None:
    """A row has a prompt and a suffix alone."""
    artifact["rows"].append({"prompt": "def f():", "suffix": "return 1"})


@mutant("ML601", says="beside a suffix")
def tools_beside_a_suffix(artifact: Artifact) -> None:
    """A fill-in-the-middle row has tools."""
    artifact["rows"].append({**gap(1), "tools": [{}]})


@mutant("ML601", says="no chat template renders")
def gaps_by_the_chat_template(artifact: Artifact) -> None:
    """The recipe trains through the chat template, which has no layout for a gap."""
    artifact["recipe"]["backend"] = "chat-template"
    artifact["rows"].append(gap(1))


@mutant("ML612", says="the text spells </s>, [SUFFIX]")
def a_gap_that_spells_markers(artifact: Artifact) -> None:
    """A row has the letters of control tokens."""
    artifact["rows"].append(gap(1, suffix="[SUFFIX] and </s>"))


@mutant("ML612", says="the text spells [PREFIX]")
def a_gap_that_spells_one_marker(artifact: Artifact) -> None:
    """A row has the letters of one control token, and no other bracket."""
    artifact["rows"].append(gap(1, suffix="# [PREFIX]"))


@mutant("ML616", says="the completion is empty")
def an_empty_completion(artifact: Artifact) -> None:
    """A row has nothing to fill in."""
    artifact["rows"].append(gap(1) | {"completion": ""})


@mutant("ML671", says="in 1 of 1 row")
def one_completion_goes_on_into_the_suffix(artifact: Artifact) -> None:
    """The completion of one row is the rest of the file."""
    artifact["rows"].append(gap(1, suffix=_LINES, completion="first, second = 1, 2\n" + _LINES))


@mutant("ML671", says="completion: ends with 'total = first + second")
def completions_go_on_into_the_suffix(artifact: Artifact) -> None:
    """The completions end in the middle of their suffixes."""
    add_gaps(
        artifact, lambda number: gap(number, suffix=f"{_LINES}# {number}", completion=f"first = {number}\n{_LINES}")
    )


@mutant("ML672", says="completion: begins with 'def mean_0")
def completions_repeat_the_prompt(artifact: Artifact) -> None:
    """The completions hold the prompts, too."""
    prompt = "def mean_{}(first, second, third):\n    count = 3\n    "
    add_gaps(
        artifact,
        lambda number: gap(number, prompt=prompt.format(number), completion=f"{prompt.format(number)}x = {number}"),
    )


@mutant("ML673", says="prompt: '<fim_prefix>'")
def prompts_with_starcoder_s_markers(artifact: Artifact) -> None:
    """The prompts were rendered for StarCoder."""
    add_gaps(artifact, lambda number: gap(number, prompt=f"<fim_prefix>def f_{number}():\n<fim_suffix>"))


@mutant("ML673", says="suffix: '<|fim_middle|>'")
def suffixes_with_qwen_s_markers(artifact: Artifact) -> None:
    """The suffixes were rendered for Qwen."""
    add_gaps(artifact, lambda number: gap(number, suffix=f"return {number}<|fim_middle|>"))


@mutant("ML674", says="an empty suffix in 25 of 25 rows")
def suffixes_lost(artifact: Artifact) -> None:
    """A converter has lost all suffixes."""
    add_gaps(artifact, lambda number: gap(number, suffix=""))


@mutant("ML612 ML639", says="completion: ")
def completions_that_end_with_letters_of_eos(artifact: Artifact) -> None:
    """The completions end with the letters of `</s>`."""
    add_gaps(artifact, lambda number: gap(number, completion=f"area_{number} = {number}</s>"))
