"""The Mistral tokenizer that a tokenizer object of transformers has, by the files that it was loaded from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle, is_mistral_tokenizer
from pytest_mistral_lora.chat.reading import path_of
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.recognition import (
    Recognition,
    StoredVocabulary,
    accept_vocabulary,
    recognise_vocabulary,
)
from pytest_mistral_lora.checkpoint.tokenizer_folder import NO_ORACLE, TOKENIZER_CONFIG, GivenFiles
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, NoOracleError, NoTemplateError, in_brackets, one_line
from pytest_mistral_lora.places import NamedSource, Place

ACCEPTED = (
    "a fast tokenizer of transformers, a MistralCommonBackend, a MistralTokenizer of mistral-common, the name of a "
    "shipped tokenizer such as spm-v3, or the path of a tokenizer file or checkpoint folder"
)
"""What a function takes for a tokenizer, in words."""

IN_MEMORY = "tokenizer in memory"
"""The name of a tokenizer without a path."""

_PLACE = Place(NamedSource("tokenizer", is_value=True))
_NAME_IT = (
    "Pass MistralTokenizer.from_file(PATH) with its tekken.json or tokenizer.model.vN, or the path of its folder."
)


def attribute_of(foreign: Any, name: str) -> Any:
    """Return an attribute of a foreign object; None if it has none, or raises an error in place of one."""
    try:
        return getattr(foreign, name, None)
    except Exception:  # of foreign code, which may raise any
        return None


def text_tokenizer(loaded: Any) -> Any:
    """Return the tokenizer of a processor of text and images, or the tokenizer itself; None if there is none."""
    # mistral-common's own backend has a tokenizer inside, too, which is not one of transformers
    inner = attribute_of(loaded, "tokenizer")
    found = inner if attribute_of(inner, "save_pretrained") is not None else loaded
    return found if attribute_of(found, "convert_ids_to_tokens") is not None else None


def source_of(loaded: Any) -> CheckpointTokenizer | None:
    """Return the file or folder that a tokenizer was loaded from; None if it is not on this machine.

    Args:
        loaded: A tokenizer of transformers, loaded from a folder or from the Hub's cache, or made in memory.
    """
    place = place_of(loaded)
    if place is None:
        return None
    source = CheckpointTokenizer(place)
    return source if source.is_there else None


class MistralObject(CheckpointTokenizer):
    """The file of a tokenizer of mistral-common that a program has in memory."""

    @property
    def is_object(self) -> bool:
        """Whether a program has it in memory: yes."""
        return True


@dataclass(frozen=True, eq=False)
class LoadedTokenizer(CheckpointTokenizer):
    """The tokenizer of a program, in memory: nothing lies at its path, which is the name of its files.

    Attributes:
        given_template: The chat template in place of the tokenizer's: a text, or texts by name; None for the
            tokenizer's.
    """

    given_template: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Take the path as it is."""

    @classmethod
    def of(
        cls,
        fast: Any,
        files: GivenFiles,
        known: Recognition,
        template: str | Mapping[str, str] | None = None,
        declared: str | None = None,
    ) -> LoadedTokenizer:
        """Return the tokenizer of a program.

        Args:
            fast: The tokenizer of transformers; None if the program has none.
            files: The configurations of the program's model.
            known: The Mistral tokenizer that applies.
            template: As for `given_template`.
            declared: The oracle as a setting names it, or None.
        """
        tokenizer = cls(files.path, declared, template)
        tokenizer.use_files(files)
        tokenizer.use_recognition(known)
        if fast is not None:
            tokenizer.use_fast(fast)
        return tokenizer

    @cached_property
    def oracle(self) -> Oracle:
        """Mistral's own tokenization, by the files or the vocabulary of the program's tokenizer.

        Raises:
            NoOracleError: If no known tokenizer has its vocabulary.
        """
        if self.recognition.oracle is None:
            expected = "" if self.declared == NO_ORACLE else "the vocabulary of a known tokenizer"
            step = "" if self.declared == NO_ORACLE else _NAME_IT
            raise NoOracleError(self.recognition.reason, place=self.place, expected=expected, next_step=step)
        return self.recognition.oracle

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template that was given, or else the tokenizer's.

        Raises:
            NoTemplateError: If there is none.
        """
        if self.template_text is None:
            raise NoTemplateError(
                "the tokenizer has no chat template",
                place=self.place,
                expected="a text as its chat_template, or as the argument template",
            )
        return ChatTemplate(self.fast, self._templates)

    @property
    def _templates(self) -> Any:
        return self.fast.chat_template if self.given_template is None else self.given_template

    @property
    def template_text(self) -> str | None:
        """The chat template for every row; None if there is none."""
        stored = self._templates if self.has_fast else self.given_template
        text = stored.get("default") if isinstance(stored, Mapping) else stored
        return text if isinstance(text, str) and text else None

    @property
    def template_place(self) -> Place:
        """The place of the template: the tokenizer's key, or the argument."""
        return self.place / "chat_template" if self.given_template is None else TEMPLATE_PLACE

    @property
    def is_on_disk(self) -> bool:
        """Whether another process loads the same tokenizer: no."""
        return False

    @property
    def is_object(self) -> bool:
        """Whether a program has it in memory: yes."""
        return True

    @property
    def is_converted(self) -> bool:
        """Whether the tokenizer is made here: no, a program has it."""
        return False

    @property
    def is_there(self) -> bool:
        """Whether there is a tokenizer."""
        return self.has_fast

    @property
    def has_fast(self) -> bool:
        """Whether the program has a tokenizer of transformers."""
        return "fast" in vars(self)


TEMPLATE_PLACE = Place(NamedSource("template", is_value=True))
"""The place of a chat template that is given as a text."""


def is_tokenizer(given: Any) -> bool:
    """Return whether a value is a tokenizer that `given_tokenizer` takes, and not a path or a name."""
    return isinstance(given, CheckpointTokenizer) or _mistral_tokenizer(given) is not None or _has_vocabulary(given)


def tokenizer_or_path(given: Any) -> Any:
    """Return a tokenizer in memory as it is, and a path or a name as a path, whether or not anything is there.

    Raises:
        InputError: If it is something else, or no file system has such a path.
    """
    if is_tokenizer(given):
        return given
    if not isinstance(given, str | os.PathLike):
        found = f"no tokenizer{in_brackets(given)}: {type(given).__name__}"
        raise InputError(found, place="tokenizer=", expected=ACCEPTED)
    return path_of(given, "a tokenizer", place=Place.of("tokenizer="))


def require_template(template: Any) -> str | None:
    """Return a chat template that a function was given as a text; None if it was not given.

    Raises:
        InputError: If it is not a text, or is empty.
    """
    if template is None or (isinstance(template, str) and template.strip()):
        return template
    found = "an empty text" if isinstance(template, str) else f"a {type(template).__name__}{in_brackets(template)}"
    raise InputError(found, place="template=", expected="the text of a Jinja chat template")


def given_tokenizer(given: Any, template: str | None = None, oracle: str | None = None) -> CheckpointTokenizer:
    """Return the tokenizer that a program has in memory, with the Mistral tokenizer that applies.

    A tokenizer of mistral-common is judged by its file.

    Args:
        given: A value for which `is_tokenizer` is true.
        template: The text of a chat template in place of the tokenizer's; None for the tokenizer's.
        oracle: The declared oracle of a tokenizer that was not loaded from a Mistral tokenizer file; None to recognise
            it.

    Raises:
        InputError: If it is not a fast tokenizer of transformers, and has no file.
        TokenizerError: If the oracle does not load, or with a template, if transformers cannot load the file.
    """
    if not isinstance(given, CheckpointTokenizer) and _mistral_tokenizer(given) is not None:
        stored = attribute_of(given, "chat_template")
        template = template or (stored if isinstance(stored, str) and stored else None)
        given = MistralObject(_mistral_file(given))
    if isinstance(given, CheckpointTokenizer):
        if template is None:
            return given
        return LoadedTokenizer.of(given.fast, _no_files(given.place), recognition_of(given), template, given.declared)
    fast = text_tokenizer(given)
    # by name, since transformers is imported by who has such an object
    is_of_transformers = any(kind.__name__ == "PreTrainedTokenizerBase" for kind in type(fast).__mro__)
    if not is_of_transformers or not attribute_of(fast, "is_fast"):
        raise InputError(f"a {type(fast).__name__}, which is not a fast tokenizer", place=_PLACE, expected=ACCEPTED)
    source = source_of(fast)
    has_file = source is not None and source.files.oracle_file is not None
    known = recognition_of(source) if source is not None and has_file else recognise_loaded(fast, oracle)
    # a processor has a template of its own
    stored = attribute_of(given, "chat_template") if given is not fast else None
    own = stored if isinstance(stored, str | Mapping) and stored else None
    return LoadedTokenizer.of(fast, _no_files(_PLACE), known, template or own, None if has_file else oracle)


def _no_files(place: Place) -> GivenFiles:
    return GivenFiles(Path(IN_MEMORY), home=place)


def _has_vocabulary(given: Any) -> bool:
    return not isinstance(given, type) and attribute_of(text_tokenizer(given), "get_vocab") is not None


def _mistral_tokenizer(given: Any) -> Any:
    """Return the `MistralTokenizer` that a value is or has inside; None if it has none."""
    if is_mistral_tokenizer(given):
        return given
    # MistralCommonBackend
    inner = None if isinstance(given, type) else attribute_of(text_tokenizer(given), "tokenizer")
    return inner if is_mistral_tokenizer(inner) else None


def _mistral_file(given: Any) -> Path:
    """Return the file of a tokenizer of mistral-common.

    Raises:
        InputError: If it is not there any more, or the tokenizer was not loaded from a file.
    """
    file = None
    with suppress(AttributeError, ValueError):  # it was not loaded from a file
        file = Path(_mistral_tokenizer(given).instruct_tokenizer.tokenizer.file_path)
    if file is None or not file.is_file():
        why = "which was not loaded from a file" if file is None else f"whose file is missing: {file}"
        raise InputError(
            f"a {type(given).__name__} {why}", place=_PLACE, expected="one that is loaded from a file that exists"
        )
    return file


def recognise_loaded(loaded: Any, oracle: str | None = None) -> Recognition:
    """Return the Mistral tokenizer of a loaded tokenizer by its vocabulary, or the reason why none applies.

    Args:
        loaded: A tokenizer of transformers.
        oracle: The declared oracle, or None.

    Raises:
        TokenizerError: If the declared oracle does not load.
    """
    if oracle == NO_ORACLE:
        return Recognition(None, NO_ORACLE, declared=True, reason="the oracle is declared as none")
    try:
        added = {number: str(token) for number, token in loaded.added_tokens_decoder.items()}
        stored = StoredVocabulary.of(loaded.get_vocab(), added, type(loaded).__name__)
    except Exception as error:  # of foreign code, which may raise any
        reason = f"the vocabulary of a {type(loaded).__name__} cannot be read: {one_line(error)}"
        return Recognition(None, "", reason=reason)
    if oracle is not None:
        return accept_vocabulary(oracle, stored, loaded)
    templates = attribute_of(loaded, "chat_template")
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


def place_of(loaded: Any) -> Path | None:
    """Return the file or folder that a tokenizer or a configuration was loaded from; None if it is not here."""
    own = attribute_of(loaded, "_tokenizer_path")  # MistralCommonBackend: the file itself
    if own is not None and Path(own).is_file():
        return Path(own)
    name = attribute_of(loaded, "name_or_path")
    if not isinstance(name, str) or not name:
        return None
    with suppress(OSError, ValueError):  # a name that is too long, or has a null character
        if Path(name).is_dir():
            return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    revision = dict(attribute_of(loaded, "init_kwargs") or {}).get("_commit_hash")
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(name, TOKENIZER_CONFIG, revision=revision)
        return Path(cached).parent if isinstance(cached, str) else None
    return None
