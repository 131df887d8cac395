"""GGUF files with another tokenizer or template."""

from __future__ import annotations

from typing import Any

from bench_gguf import FIELD, oracle, setting, take_tekken
from gallery import Artifact, mutant
from gguf_files import (
    NORMAL,
)


def changed(artifact: Artifact, name: str, number: int, value: Any) -> None:
    """Change an entry of a list of the tokenizer."""
    values = list(artifact["fields"][FIELD + name])
    values[number] = value
    setting(artifact, name, values)


def swapped(artifact: Artifact, name: str, first: int, second: int) -> None:
    values = list(artifact["fields"][FIELD + name])
    values[first], values[second] = values[second], values[first]
    setting(artifact, name, values)


@mutant(
    "ML912",
    "N90",
    says="add_space_prefix is missing, and readers take true: each control token is followed by a second space",
)
def no_space_setting(artifact: Artifact) -> None:
    """tokenizer_config.json had no add_prefix_space: the converter leaves the field out, and the default is true."""
    setting(artifact, "add_space_prefix", None)


@mutant("ML912", "N90")
def space_prefix(artifact: Artifact) -> None:
    """add_space_prefix is true."""
    setting(artifact, "add_space_prefix", True)


@mutant("ML912", "N91", says="scores are wrong")
def no_scores(artifact: Artifact) -> None:
    """The folder had no tokenizer.model: every score is -1000, and every control token from id 3 on is text."""
    size = oracle().vocab_size
    setting(artifact, "scores", [-1000.0] * size)
    types = list(artifact["fields"][FIELD + "token_type"])
    setting(artifact, "token_type", [types[n] if n < 3 or types[n] == 6 else NORMAL for n in range(size)])


@mutant("ML912", says="scores are wrong, the first is that of")
def two_scores_swapped(artifact: Artifact) -> None:
    """Two pieces have each other's score."""
    swapped(artifact, "scores", 1500, 1600)


@mutant("ML912")
def scores_left_out(artifact: Artifact) -> None:
    """There are no scores at all."""
    setting(artifact, "scores", None)


@mutant("ML912", says="ids stand for other bytes")
def two_tokens_swapped(artifact: Artifact) -> None:
    """Two pieces have each other's id."""
    swapped(artifact, "tokens", 1500, 1600)


@mutant("ML912", says="(id 3): user defined")
def marker_is_user_defined(artifact: Artifact) -> None:
    """[INST] is a user defined token: a text that spells it becomes the marker."""
    changed(artifact, "token_type", 3, 4)


@mutant("ML912", says="have a wrong type")
def word_is_control(artifact: Artifact) -> None:
    """A word is a control token, which no text becomes."""
    changed(artifact, "token_type", 1500, 3)


@mutant("ML912", says="have a wrong type")
def byte_is_text(artifact: Artifact) -> None:
    """The token of a byte is text."""
    changed(artifact, "token_type", 900, NORMAL)


@mutant("ML912")
def no_types(artifact: Artifact) -> None:
    """There are no token types."""
    setting(artifact, "token_type", None)


@mutant("ML912", says="eos_token_id is 0")
def eos_is_unk(artifact: Artifact) -> None:
    """EOS is <unk>: no answer ends."""
    setting(artifact, "eos_token_id", 0)


@mutant("ML912 ML915", says="eos_token_id is missing, and readers take 11")
def eos_left_out_of_tekken(artifact: Artifact) -> None:
    """The id of EOS is left out, and the one that readers take is another token."""
    artifact["compared"] = False
    take_tekken(artifact)
    setting(artifact, "eos_token_id", None)


@mutant("ML912", says="add_bos_token is false")
def no_bos(artifact: Artifact) -> None:
    """The file says not to put <s> before a prompt."""
    setting(artifact, "add_bos_token", False)


@mutant("ML912", says="add_eos_token is true")
def prompt_ends(artifact: Artifact) -> None:
    """The file says to put </s> behind a prompt."""
    setting(artifact, "add_eos_token", True)


@mutant("ML912", says="tokenizer.ggml.model is 't5'")
def unigram(artifact: Artifact) -> None:
    """The vocabulary is declared as a Unigram model's."""
    setting(artifact, "model", "t5")


@mutant("ML912", says="1 tokens more")
def one_token_more(artifact: Artifact) -> None:
    """A fine-tune added a token."""
    for name, value in (("tokens", "<|im_start|>"), ("scores", 0.0), ("token_type", 4)):
        setting(artifact, name, [*artifact["fields"][FIELD + name], value])


@mutant("ML912 ML913 ML915", says="'llama', the kind of")
def another_tokenizer_named(artifact: Artifact) -> None:
    """The file has a Tekken vocabulary, and its folder SentencePiece's."""
    take_tekken(artifact)


@mutant("ML912 ML915", says="'pixtral'")
def splitter_of_llama_3(artifact: Artifact) -> None:
    """The converter took Tekken for Pixtral, whose texts llama.cpp splits as Llama 3 does."""
    artifact["compared"] = False
    take_tekken(artifact)
    setting(artifact, "pre", "pixtral")


@mutant("ML913", "N92", says="not a template")
def name_for_a_template(artifact: Artifact) -> None:
    """The converter wrote the name of a template that llama.cpp knows."""
    artifact["fields"]["tokenizer.chat_template"] = "mistral-v3"


@mutant("ML913", says="ChatML")
def no_template(artifact: Artifact) -> None:
    """There is no template."""
    artifact["fields"]["tokenizer.chat_template"] = None


@mutant("ML913", says="differs from mistral-common")
def template_without_a_space(artifact: Artifact) -> None:
    """The template leaves the space behind [INST] out."""
    text = artifact["fields"]["tokenizer.chat_template"]
    assert "[INST] " in text
    artifact["fields"]["tokenizer.chat_template"] = text.replace("[INST] ", "[INST]")


@mutant("ML913")
def template_that_does_not_parse(artifact: Artifact) -> None:
    """The template is cut off."""
    text = artifact["fields"]["tokenizer.chat_template"]
    artifact["fields"]["tokenizer.chat_template"] = text[: len(text) // 2]


@mutant("ML912", says="has no list tokenizer.ggml.tokens")
def no_tokens(artifact: Artifact) -> None:
    """The file has no vocabulary."""
    setting(artifact, "tokens", None)


@mutant("ML912 ML915", says="has no list tokenizer.ggml.merges")
def no_merges(artifact: Artifact) -> None:
    """The file has a vocabulary of bytes, and no merges."""
    take_tekken(artifact)
    artifact["compared"] = False
    setting(artifact, "merges", None)


@mutant("ML912 ML915", says="after a merge to id")
def merges_out_of_order(artifact: Artifact) -> None:
    """Two merges have each other's place: another token is made first."""
    take_tekken(artifact)
    artifact["compared"] = False
    swapped(artifact, "merges", 0, 1000)


@mutant("ML912 ML915", says="no merge gives")
def merge_lost(artifact: Artifact) -> None:
    """The last merge is missing: its token is never made."""
    take_tekken(artifact)
    artifact["compared"] = False
    setting(artifact, "merges", artifact["fields"][FIELD + "merges"][:-1])


@mutant("ML920", says="eot_token_id is 5: answers end at '[TOOL_CALLS]'")
def turn_ends_at_a_tool_call(artifact: Artifact) -> None:
    """The end of a turn is [TOOL_CALLS]."""
    setting(artifact, "eot_token_id", 5)


@mutant("ML920", says="eom_token_id is 4")
def message_ends_at_the_next_turn(artifact: Artifact) -> None:
    """The end of a message is [/INST]."""
    setting(artifact, "eom_token_id", 4)


@mutant("ML920", says="fim_pad_token_id is 0")
def padding_ends_an_answer(artifact: Artifact) -> None:
    """The padding of fill-in-the-middle is <unk>."""
    setting(artifact, "fim_pad_token_id", 0)


@mutant("ML912 ML920", says="answers end at '<|im_end|>'")
def word_that_llama_cpp_knows(artifact: Artifact) -> None:
    """A word of the vocabulary is spelled as another family's end of a turn."""
    changed(artifact, "tokens", 1500, "<|im_end|>")
