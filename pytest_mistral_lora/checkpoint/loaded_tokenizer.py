"""The Mistral tokenizer that a tokenizer object of transformers has, by the files that it was loaded from."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.recognition import Recognition, StoredVocabulary, recognise_vocabulary
from pytest_mistral_lora.checkpoint.tokenizer_folder import TOKENIZER_CONFIG, GivenFiles
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import one_line


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


@dataclass(frozen=True)
class LoadedTokenizer(CheckpointTokenizer):
    """The tokenizer of a program, in memory: nothing lies at its path, which is the name of its files."""

    def __post_init__(self) -> None:
        """Take the path as it is."""

    @classmethod
    def of(cls, fast: Any, files: GivenFiles, known: Recognition) -> LoadedTokenizer:
        """Return the tokenizer of a program.

        Args:
            fast: The tokenizer of transformers; None if the program has none.
            files: The configurations of the program's model.
            known: The Mistral tokenizer that applies.
        """
        tokenizer = cls(files.path)
        tokenizer.use_files(files)
        tokenizer.use_recognition(known)
        if fast is not None:
            tokenizer.use_fast(fast)
        return tokenizer

    @property
    def has_fast(self) -> bool:
        """Whether the program has a tokenizer of transformers."""
        return "fast" in vars(self)


def recognise_loaded(loaded: Any) -> Recognition:
    """Return the Mistral tokenizer of a loaded tokenizer by its vocabulary, or the reason why none applies.

    Args:
        loaded: A tokenizer of transformers.
    """
    try:
        added = {number: str(token) for number, token in loaded.added_tokens_decoder.items()}
        stored = StoredVocabulary.of(loaded.get_vocab(), added, type(loaded).__name__)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        reason = f"the vocabulary of a {type(loaded).__name__} cannot be read: {one_line(error)}"
        return Recognition(None, "", reason=reason)
    templates = getattr(loaded, "chat_template", None)
    template = templates.get("default") if isinstance(templates, dict) else templates
    return recognise_vocabulary(stored, template if isinstance(template, str) else "")


def recognition_of(tokenizer: CheckpointTokenizer) -> Recognition:
    """Return the Mistral tokenizer of a file or folder, also if it is the folder's own file.

    Raises:
        TokenizerError: If a file is dangerous, or does not load.
    """
    if tokenizer.files.oracle_file is None:
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
