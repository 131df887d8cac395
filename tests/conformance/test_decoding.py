"""Decoding by a tokenizer of another family: what its decoder changes, and what its vocabulary lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pytest_mistral_lora.checkpoint.recognition import PROBES
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.ids import decoding


def byte_tokenizer(folder: Path, alphabet: list[str], decoder: Any, **special: str) -> Target:
    """Save a byte-level tokenizer with these bytes, and return it as a target without a Mistral tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE(**special))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoder
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, special_tokens=[*special.values()])
    backend.train_from_iterator(["Hello, world!"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return Target("other", folder, oracle_name="none")


# byte 0x16, which a probe has, as byte-level tokenizers spell it
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WITHOUT_A_BYTE = [spelling for spelling in BYTES if spelling != chr(0x16 + 0x100)]


@pytest.mark.parametrize("special", [{}, {"unk_token": "<unk>"}], ids=["dropped", "unknown"])
def test_a_byte_that_the_vocabulary_lacks_is_no_fault_of_the_decoder(tmp_path: Path, special: dict[str, str]) -> None:
    [probe] = [text for text in PROBES if "\x16" in text]
    target = byte_tokenizer(tmp_path, WITHOUT_A_BYTE, decoders.ByteLevel(), **special)
    fast = target.tokenizer.fast
    assert fast.decode(fast(probe, add_special_tokens=False)["input_ids"]) != probe
    assert list(decoding(target)) == []


@pytest.mark.parametrize("alphabet", [BYTES, WITHOUT_A_BYTE], ids=["all bytes", "one is missing"])
def test_a_decoder_that_cleans_is_found_whatever_the_vocabulary_has(tmp_path: Path, alphabet: list[str]) -> None:
    cleaning = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(" ,", ","), decoders.Fuse()])
    [finding] = decoding(byte_tokenizer(tmp_path, alphabet, cleaning))
    assert (finding.rule, finding.severity) == ("ML239", "error")


def test_another_family_s_decoder_that_keeps_every_text_is_sound(tmp_path: Path) -> None:
    assert list(decoding(byte_tokenizer(tmp_path, BYTES, decoders.ByteLevel()))) == []


def test_a_vocabulary_without_any_text_leaves_nothing_to_decode(tmp_path: Path) -> None:
    # a conversion that lost its vocabulary: three special tokens, and no probe has an id
    backend = tokenizers.Tokenizer(models.BPE())
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    assert list(decoding(Target("other", tmp_path, oracle_name="none"))) == []
