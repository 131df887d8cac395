"""Load the tokenizer of a checkpoint twice: Mistral's own (the oracle) and the one that transformers uses."""

from __future__ import annotations

import base64
import inspect
import json
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from pytest_mistral_lora.chat.oracle import SHIPPED, WRITES_TEMPLATES, Oracle
from pytest_mistral_lora.chat.reading import in_utf8, path_of, read_bounded, similar_path
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.isolated import ask
from pytest_mistral_lora.chat.templates.own_prompt import OwnSystemPrompt
from pytest_mistral_lora.checkpoint.kept_property import KeptProperty
from pytest_mistral_lora.checkpoint.quick_conversion import quick_conversion, with_quick_merges
from pytest_mistral_lora.checkpoint.recognition import NAME_IT, Recognition, accept_oracle, recognise
from pytest_mistral_lora.checkpoint.shared_conversion import converted_once
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    NO_ORACLE,
    SPM_MODEL,
    TOKENIZER_CONFIG,
    TokenizerFiles,
    in_folder,
    loaded_place,
    own_template,
    template_places,
)
from pytest_mistral_lora.checkpoint.tokenizer_folder import TOKENIZER_JSON as TOKENIZER_JSON
from pytest_mistral_lora.errors import InputError, NoOracleError, NoTemplateError, TokenizerError, loading
from pytest_mistral_lora.places import NOWHERE, Place

_LOADABLE = ((TOKENIZER_JSON,), (SPM_MODEL, TOKENIZER_CONFIG))
"""Groups of files; transformers needs one complete group."""
_IN_USE: WeakValueDictionary[tuple[Path, str], Oracle] = WeakValueDictionary()
"""The oracles that something holds, by file and its SHA-256: a Tekken file takes a second to load."""
_PROBE = "A text, with 12 numbers and an é."
_SPECIALS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


_WHAT = "a tokenizer file, or the folder of a checkpoint or tokenizer"


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A tokenizer file, or a folder that holds one.

    Attributes:
        path: The file or folder.
        declared: The oracle of a folder without a Mistral tokenizer file, as a setting names it: a shipped tokenizer,
            a path, or `none`. None to recognise it by its vocabulary.
    """

    path: Path
    declared: str | None = None

    def __post_init__(self) -> None:
        try:
            path = path_of(self.path, _WHAT)
        except InputError as error:
            raise TokenizerError(error.found, expected=error.expected) from error
        object.__setattr__(self, "path", path)  # a text is taken, too
        if not path.exists():
            found = f"no such file or folder{similar_path(path, SHIPPED)}"
            raise TokenizerError(found, place=str(path), expected=_WHAT)

    @cached_property
    def files(self) -> TokenizerFiles:
        """The files that decide how text becomes ids."""
        return TokenizerFiles(self.path)

    def use_files(self, files: TokenizerFiles) -> None:
        """Use files of the same path that another object shares, so that each is read once."""
        vars(self)["files"] = files

    @property
    def place(self) -> Place:
        """The place of the file or folder."""
        return self.files.place()

    def use_recognition(self, found: Recognition) -> None:
        """Use the Mistral tokenizer that another object has found for a folder without a Mistral tokenizer file."""
        vars(self)["recognition"] = found

    @cached_property
    def oracle(self) -> Oracle:
        """Mistral's own tokenization: by the Mistral tokenizer file, or the recognised tokenizer.

        Raises:
            NoOracleError: If the Mistral tokenizer file is missing, and the vocabulary is not a known tokenizer's.
            TokenizerError: If it cannot be loaded.
        """
        self.files.refuse_hazards()
        file = self.files.oracle_file
        if file is not None:
            return _oracle_of(file, self.files)
        found = self.recognition
        if found.oracle is None:
            raise NoOracleError(
                f"no Mistral tokenizer file, and {found.reason}",
                place=self.place,
                expected="tekken.json or tokenizer.model.vN",
                next_step="" if self.declared == NO_ORACLE else NAME_IT,
            )
        return found.oracle

    @cached_property
    def recognition(self) -> Recognition:
        """The known tokenizer whose vocabulary a folder without a Mistral tokenizer file has.

        Raises:
            TokenizerError: If a setting names no tokenizer, or transformers cannot load the folder.
        """
        self.files.refuse_hazards()
        if self.declared == NO_ORACLE:
            return Recognition(None, NO_ORACLE, declared=True, reason="the oracle is declared as none")
        if self.declared is not None:
            return accept_oracle(self.declared, self.files, self.fast if self.loads_as_it_is else None)
        return recognise(self.files)

    def require_same_ids(self) -> None:
        """Refuse a recognised folder if its tokenizer gives other ids than the oracle: a server would use those ids.

        Raises:
            TokenizerError: If an id or a probe differs, or no oracle applies.
        """
        if self.files.oracle_file is not None:
            return
        _ = self.oracle
        found = accept_oracle(self.recognition.name, self.files, self.fast if self.loads_as_it_is else None)
        if found.oracle is None:
            see = f"See all differences: mistral-lora check {shlex.quote(str(self.path))}"
            raise TokenizerError(found.reason, place=str(self.path), next_step=see)

    @property
    def has_oracle(self) -> bool:
        """Whether a Mistral tokenizer applies: the folder's own file, or a known one."""
        return self.files.oracle_file is not None or self.recognition.oracle is not None

    @property
    def has_template(self) -> bool:
        """Whether a folder has a chat template of its own; if not, `template` is what mistral-common generates."""
        return self.template_text is not None

    @KeptProperty
    def fast(self) -> Any:
        """The `transformers` tokenizer (a `PreTrainedTokenizerFast`), with the checkpoint's own chat template.

        transformers loads it from a folder with `tokenizer.json`, or with `tokenizer.model` and a
        `tokenizer_config.json`. For a bare Mistral tokenizer file, or any other folder, it is converted from that
        file, with the folder's template, or else the one that mistral-common generates for it.

        Raises:
            TokenizerError: If transformers cannot load it.
        """
        # before any library opens a file of an untrusted folder
        self.files.refuse_hazards()
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        with in_utf8(self.path) as named, loading("transformers", self.path):
            if not self.loads_as_it_is:
                converted = convert(self.oracle)
                default = own_template(self.files) or converted.chat_template
                # named templates, such as `tool_use`, from the place that transformers reads first
                more = {name: next(iter(texts.values())) for name, texts in template_places(self.files).items()}
                converted.chat_template = {**more, "default": default} if more.keys() - {"default"} else default
                return converted
            # with tekken.json beside it, transformers 5 would choose mistral-common's own backend, without a template
            tokenizer = AutoTokenizer.from_pretrained(named, mistral_format=False, trust_remote_code=False)
            # transformers accepts a setting of the wrong type silently, and fails at the first use
            tokenizer.decode(tokenizer(_PROBE)["input_ids"])
            repr(tokenizer.special_tokens_map)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TokenizerError(f"a {type(tokenizer).__name__}", place=str(self.path), expected="a fast tokenizer")
        return tokenizer

    @property
    def template_text(self) -> str | None:
        """The chat template of a folder; None if it has none of its own."""
        return own_template(self.files)

    @property
    def template_place(self) -> Place:
        """The place of the folder's own template; empty for the template that mistral-common generates for a file."""
        files = self.files
        return in_folder(files.path, loaded_place(files)) if files.path.is_dir() else NOWHERE

    @property
    def is_on_disk(self) -> bool:
        """Whether another process loads the same tokenizer from its path."""
        return True

    @property
    def is_object(self) -> bool:
        """Whether a program has it in memory, so that files beside its own are not known."""
        return False

    @property
    def is_converted(self) -> bool:
        """Whether the `transformers` tokenizer is made here, from another file than `tokenizer.json`."""
        return TOKENIZER_JSON not in self.files.names

    @property
    def has_fast(self) -> bool:
        """Whether there is a `transformers` tokenizer, or files that it is made of."""
        return True

    @property
    def loaded_fast(self) -> Any:
        """The `transformers` tokenizer, if it is loaded and another process of this run can receive it; else None."""
        fast = vars(self).get("fast")
        # the other process may not know a user's own class
        return fast if type(fast).__module__.startswith("transformers.") else None

    def use_fast(self, fast: Any) -> None:
        """Use the `transformers` tokenizer that another process of this run has loaded from the same path."""
        vars(self)["fast"] = fast

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the `transformers` tokenizer.

        Raises:
            NoTemplateError: If it has no template.
            TokenizerError: If transformers cannot load the tokenizer.
        """
        return ChatTemplate(self.fast, blocks=lambda chunk: self.oracle.block_of(chunk))

    @property
    def is_there(self) -> bool:
        """Whether the path holds any tokenizer at all: Mistral's own, or one that transformers loads."""
        return self.files.oracle_file is not None or self.loads_as_it_is or SPM_MODEL in self.files.names

    @property
    def loads_as_it_is(self) -> bool:
        """Whether transformers loads the folder: from `tokenizer.json`, or `tokenizer.model` and its configuration."""
        return any(all(map(self.files.is_file, names)) for names in _LOADABLE)


def _oracle_of(file: Path, files: TokenizerFiles) -> Oracle:
    """Return the oracle of a tokenizer file: the one that is in use, if the file is the same.

    Args:
        file: The file.
        files: The file alone, or the folder that holds it.
    """
    digest = files.sha256(file.name)
    key = (file.absolute(), digest)
    oracle = _IN_USE.get(key)
    if oracle is None:
        oracle = _IN_USE[key] = Oracle(file, sha256=digest, read=partial(files.take, file.name))
    files.release(file.name)
    return oracle


def convert(oracle: Oracle) -> Any:
    """Convert a Mistral tokenizer file to a `transformers` tokenizer with the generated chat template.

    It has no template under a version of mistral-common that generates none with its own ids.
    """
    template = oracle.chat_template() if WRITES_TEMPLATES else None
    tokenizer = converted_once(oracle, partial(_converted, oracle))
    tokenizer.chat_template = template
    return tokenizer


def _converted(oracle: Oracle) -> Any:
    """Return the `transformers` tokenizer of a Mistral tokenizer file, without a chat template."""
    with quick_conversion():
        return _from_file(oracle)


def _from_file(oracle: Oracle) -> Any:
    import transformers

    is_version_5 = hasattr(transformers, "TokenizersBackend")
    if oracle.kind == "tekken" and is_version_5:
        from transformers.integrations.mistral import convert_tekken_tokenizer

        # without a template, newer versions generate one, and load the whole file again for it
        takes_template = "chat_template" in inspect.signature(convert_tekken_tokenizer).parameters
        given = {"chat_template": ""} if takes_template else {}
        with in_utf8(oracle.path) as named:
            return with_quick_merges(convert_tekken_tokenizer)(str(named), **given)
    if oracle.kind == "tekken":
        return _from_tekken_before_5(oracle)
    # transformers looks for the exact name tokenizer.model; legacy=True would add a space after every control token,
    # and add_bos_token=True a second BOS before a rendered conversation
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(oracle.path, Path(folder) / "tokenizer.model")
        if is_version_5:
            # from version 5 on, LlamaTokenizer orders the merges by id, which splits runs of spaces wrongly
            return transformers.TokenizersBackend.from_pretrained(folder, legacy=False)
        return transformers.LlamaTokenizerFast.from_pretrained(
            folder, legacy=False, from_slow=True, add_bos_token=False
        )


class _Literals(list[str]):
    """Control literals. transformers 4 looks for each of 131,000 tokens in the list of a thousand."""

    def __contains__(self, token: object) -> bool:
        return token in self._set

    @cached_property
    def _set(self) -> frozenset[object]:
        return frozenset(self)


def _from_tekken_before_5(oracle: Oracle) -> Any:
    """Convert a Tekken file with transformers 4, whose own function fails on a file without `special_tokens`.

    That function also ignores the file's pre-tokenizer pattern (huggingface/transformers#42299).
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral import MistralConverter

    # in a Tekken file the ids of the ranked tokens begin after those of the control tokens, and more tokens are ranked
    # than the vocabulary takes
    data = json.loads(oracle.path.read_text(encoding="utf-8"))
    specials = _Literals(oracle.control_tokens.values())
    ranked = data["vocab"][: oracle.vocab_size - len(specials)]
    vocab: dict[str | bytes, int] = {literal: token for token, literal in oracle.control_tokens.items()}
    vocab |= {base64.b64decode(entry["token_bytes"]): len(specials) + rank for rank, entry in enumerate(ranked)}
    converter = MistralConverter(vocab=vocab, pattern=data["config"]["pattern"], additional_special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        **{f"{name}_token": literal for name, literal in _SPECIALS.items()},
    )


def training_template(
    tokenizer: str | Path | CheckpointTokenizer, *, thinking: bool = True, system_prompt: str | None = None
) -> str:
    """Return the training template of a tokenizer, as Jinja text.

    Args:
        tokenizer: A checkpoint folder, or a single tokenizer file (`*.model.vN`, `tekken.json`). With a
            Mistral tokenizer file, or the vocabulary of a known tokenizer without additions, the template is the one
            that mistral-common generates for it; else the folder's own.
        thinking: False for a template of v11 that refuses thinking chunks, in place of writing them as `<think>` text.
        system_prompt: A system prompt that the template writes into conversations without one.

    Raises:
        TokenizerError: If the tokenizer cannot be loaded, or has a template of its own and you give a system prompt.
        NoTemplateError: If no template exists, or it has no branch for the assistant's messages.
    """
    loaded = tokenizer if isinstance(tokenizer, CheckpointTokenizer) else CheckpointTokenizer(path_of(tokenizer, _WHAT))
    source = official_template(loaded, thinking=thinking, system_prompt=system_prompt)
    marked: str | None = ask({"asked": "training-source", "source": source})["source"]
    if marked is None:
        raise NoTemplateError(
            "the chat template has no branch for messages of the role assistant",
            place=str(loaded.path),
            next_step="Put {% generation %} and {% endgeneration %} around what it writes for them.",
        )
    return marked


def official_template(
    tokenizer: CheckpointTokenizer, *, thinking: bool = True, system_prompt: str | None = None
) -> str:
    """Return the template that mistral-common generates, or a checkpoint's own if no Mistral tokenizer applies.

    Args:
        tokenizer: The tokenizer.
        thinking: False to leave out the `<think>` text that is generated for every file of v11.
        system_prompt: A system prompt that the template writes into conversations without one.

    Raises:
        TokenizerError: If the tokenizer cannot be loaded, or has a template of its own and you give a system prompt.
        NoTemplateError: If no template exists.
    """
    # a derivative with its own tokens, such as ChatML's, has its own template, too
    if tokenizer.files.oracle_file is not None or tokenizer.recognition.is_exact:
        plain_thinking = None if thinking else False
        return tokenizer.oracle.chat_template(plain_thinking=plain_thinking, system_prompt=system_prompt)
    if system_prompt is not None:
        raise TokenizerError(
            "a system prompt is written into mistral-common's template, and this tokenizer has a template of its own",
            place=str(tokenizer.path),
            expected="a Mistral tokenizer",
            next_step="Write the prompt into its chat_template.jinja.",
        )
    return tokenizer.template.source


def system_prompt_of(path: Path, tokenizer: CheckpointTokenizer) -> str:
    """Return the system prompt of a text file, or the one that a chat template (`*.jinja`) writes by itself.

    Args:
        path: The file, in UTF-8.
        tokenizer: The tokenizer that renders the template, and whose control tokens the prompt must not spell.

    Raises:
        InputError: If the file cannot be read, the template has no prompt of its own, or the prompt is empty, holds
            names in braces that no library replaces, a date of today, or control tokens other than pairs of thinking.
    """
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("not valid UTF-8", place=str(path), next_step="Save the file as UTF-8.") from error
    prompt = OwnSystemPrompt(text.removesuffix("\n"))
    step = "Write the prompt as you serve it into a text file, and name that: --system-prompt prompt.txt"
    if path.suffix == ".jinja":
        template = ChatTemplate(tokenizer.fast, text)
        found = template.own_prompt()
        if found is None:
            raise InputError("the chat template has no system prompt of its own", place=str(path), next_step=step)
        prompt = found
        if prompt.is_dated(text):
            raise InputError("the system prompt holds the date of today", place=str(path), next_step=step)
    if not prompt.text.strip():
        raise InputError("the system prompt is empty", place=str(path))
    if prompt.placeholders:
        names = ", ".join(prompt.placeholders)
        found_names = f"the system prompt holds {names}, which no library replaces"
        raise InputError(found_names, place=str(path), expected="the text that the model is to read", next_step=step)
    parts = [prompt.content] if isinstance(prompt.content, str) else [part[part["type"]] for part in prompt.content]
    literals = [literal for part in parts for literal in tokenizer.oracle.control_tokens.values() if literal in part]
    if literals:
        found_literals = f"the system prompt spells control tokens ({', '.join(dict.fromkeys(literals))})"
        raise InputError(found_literals, place=str(path), expected="text that no library takes for control tokens")
    return prompt.text
