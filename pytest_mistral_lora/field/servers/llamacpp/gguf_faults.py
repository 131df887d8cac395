"""What llama.cpp does wrong with a GGUF file, whatever its converter."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.faults import ProgramFault
from pytest_mistral_lora.records.gguf_file import GgufFile

_SPLIT_BY_PATTERN = "gpt2"
"""The value of `tokenizer.ggml.model` of a vocabulary like Tekken's."""
_STOPS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_STOP_TEXTS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<\uff5cend▁of▁sentence\uff5c>",
)
"""Texts of tokens at which llama.cpp ends an answer without being told: `llama_vocab::impl::load`."""


def gguf_faults(file: GgufFile, oracle: Oracle) -> Iterator[ProgramFault]:
    """Yield ML915 for a splitter that ends words at combining marks, and ML920 for each wrong stop."""
    if file.setting("model") == _SPLIT_BY_PATTERN:
        found = "Hindi, Tamil, Thai and other text with combining marks gets more ids than in training"
        yield ProgramFault("ML915", found, "", Place.of(file.path), "")
    yield from stop_faults(file, oracle)


def stop_faults(file: GgufFile, oracle: Oracle) -> Iterator[ProgramFault]:
    """Yield ML920 for each token besides EOS at which llama.cpp ends an answer."""
    place, tokens = Place.of(file.path), file.setting("tokens")
    if not isinstance(tokens, list) or not isinstance(next(iter(tokens), None), str):
        return  # another finding says so
    stops: dict[int, str] = {}
    for name in _STOPS:
        key = f"{name}_token_id"
        number = file.setting(key)
        # llama.cpp ignores an id that no token has
        if type(number) is int and 0 <= number < len(tokens):
            stops.setdefault(number, f"tokenizer.ggml.{key} is {number}")
    for number, text in enumerate(tokens):
        if text in _STOP_TEXTS:
            stops.setdefault(number, f"id {number} is spelled as another family's end")
    for number, reason in sorted(stops.items()):
        if number != oracle.eos_id:
            yield ProgramFault("ML920", reason, f"answers end at {tokens[number]!r}", place, str(oracle.eos_id))
