"""The Mistral tokenizer that a tokenizer object of transformers has, by the files that it was loaded from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.checkpoint.recognition import Recognition
from pytest_mistral_lora.checkpoint.tokenizer_folder import TOKENIZER_CONFIG
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import TokenizerError


def text_tokenizer(loaded: Any) -> Any:
    """Return the tokenizer of a processor of text and images, or the tokenizer itself; None if there is none."""
    # mistral-common's own backend has a tokenizer inside, too, which is not one of transformers
    inner = getattr(loaded, "tokenizer", None)
    found = inner if hasattr(inner, "save_pretrained") else loaded
    return found if hasattr(found, "convert_ids_to_tokens") else None


def source_of(loaded: Any) -> CheckpointTokenizer | None:
    """Return the file or folder that a tokenizer was loaded from; None if it is not on this machine.

    Args:
        loaded: A tokenizer of transformers, loaded from a folder or from the Hub's cache, or made in memory.
    """
    place = _place_of(loaded)
    if place is None:
        return None
    source = CheckpointTokenizer(place)
    return source if source.is_there else None


def recognise_copy(loaded: Any, folder: Path) -> Recognition:
    """Return the Mistral tokenizer of a loaded tokenizer by a copy of its vocabulary, or the reason why none applies.

    Args:
        loaded: A tokenizer of transformers.
        folder: An empty folder for the copy.

    Raises:
        TokenizerError: If the tokenizer cannot be saved.
    """
    try:
        loaded.save_pretrained(folder)
    except (OSError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise TokenizerError(f"a {type(loaded).__name__} cannot be saved: {error}") from error
    return recognition_of(CheckpointTokenizer(folder))


def recognition_of(tokenizer: CheckpointTokenizer) -> Recognition:
    """Return the Mistral tokenizer of a file or folder, also if it is the folder's own file.

    Raises:
        TokenizerError: If a file is dangerous, or does not load.
    """
    if oracle_file(tokenizer.path) is None:
        return tokenizer.recognition
    oracle = tokenizer.oracle
    return Recognition(oracle, str(tokenizer.path), oracle.vocab_size, declared=True)


def _place_of(loaded: Any) -> Path | None:
    """Return the file or folder that a tokenizer was loaded from; None if it is not on this machine."""
    own = getattr(loaded, "_tokenizer_path", None)  # MistralCommonBackend: the file itself
    if own is not None and Path(own).is_file():
        return Path(own)
    name = getattr(loaded, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    with suppress(OSError):  # a name that is too long
        if Path(name).is_dir():
            return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    revision = getattr(loaded, "init_kwargs", {}).get("_commit_hash")
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(name, TOKENIZER_CONFIG, revision=revision)
        return Path(cached).parent if isinstance(cached, str) else None
    return None
