"""Mistral's own tokenization, the truth for ids: the only package that imports mistral-common's encoders.

mistral-common encodes each row. A trace of its public per-message encoders and of its text tokenizer gives the turn
and the text of every token: nothing is searched for in text or ids, since text may contain marker strings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby, starmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import mistral_common
import numpy

from pytest_mistral_lora.chat.chunks.chunk_type import BlockType, ChunkData, ImageSizes, chunk_of_block
from pytest_mistral_lora.chat.chunks.registry import block_literals, blocks_in, type_of
from pytest_mistral_lora.chat.encoded import ANSWERS, EncodedRow
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.oracle.encoder_trace import EncoderTrace, TracedText, spans_of, split_turn
from pytest_mistral_lora.chat.oracle.hazards import PROBE, refuse_damaged
from pytest_mistral_lora.chat.oracle.rejections import explain, is_our_call, taken_by, version_violation
from pytest_mistral_lora.chat.oracle.request import PlainRows, RowFeatures, remember_tools, request_data
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file, shipped_files
from pytest_mistral_lora.chat.oracle.versions import EXACT_TEMPLATES, SUPPORTED, VersionFacts, version_facts
from pytest_mistral_lora.chat.reading import in_utf8
from pytest_mistral_lora.chat.rebinding import rebound
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.isolated import trust
from pytest_mistral_lora.chat.turns import Turn
from pytest_mistral_lora.errors import (
    LibraryError,
    MistralLoraError,
    NoOracleError,
    NoTemplateError,
    OracleRejection,
    TokenizerError,
    UncheckedRowError,
    loading,
)
from pytest_mistral_lora.places import Place

VERSION: str = mistral_common.__version__


def _missing_api(error: ImportError) -> LibraryError:
    return LibraryError(
        f"mistral-common {VERSION} lacks an API that this package uses: {error}",
        expected=f"mistral-common{SUPPORTED}",
        next_step=f"Install it: pip install 'mistral-common{SUPPORTED}'",
    )


try:
    from mistral_common.protocol.instruct.messages import FinetuningMessage
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    from pytest_mistral_lora.chat.oracle.quick_tekken import load_tokenizer
except ImportError as error:
    raise _missing_api(error) from error

WRITES_TEMPLATES = EXACT_TEMPLATES.contains(VERSION, prereleases=True)
"""Whether this version of mistral-common generates chat templates with the ids of its encoder."""

SHIPPED = {
    "spm-v1": "tokenizer.model.v1",
    "spm-v2": "mistral_instruct_tokenizer_240216.model.v2",
    "spm-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "spm-v7": "mistral_instruct_tokenizer_241114.model.v7",
    "spm-v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
    "tekken-240718": "tekken_240718.json",
    "tekken-240911": "tekken_240911.json",
}
"""Our name for each tokenizer file that mistral-common ships, and the file's name."""

_SPM_NAMES = "SentencePiece file named *.model.v1 … *.model.v7"
_Request = ChatCompletionRequest[FinetuningMessage]
_Prepared = TypeVar("_Prepared")


def shipped_tokenizer(name: str) -> Path:
    """Return the path of a tokenizer file that mistral-common ships.

    Raises:
        TokenizerError: If `name` is not a key of `SHIPPED`, or this mistral-common does not ship the file.
    """
    if name not in SHIPPED:
        raise TokenizerError(f"unknown tokenizer {name!r}", expected="one of " + ", ".join(SHIPPED))
    path = shipped_files() / SHIPPED[name]
    if not path.is_file():
        raise TokenizerError(f"mistral-common {VERSION} does not ship {SHIPPED[name]}", place=str(path))
    return path


def is_mistral_tokenizer(given: Any) -> bool:
    """Return whether a value is a `MistralTokenizer` of mistral-common."""
    return isinstance(given, MistralTokenizer)


class _BlockEncoder:
    """Makes the ids of blocks in the place of mistral-common's encoder of images, which opens paths and URLs."""

    def __init__(self, theirs: Any, ids: Callable[[ChunkData], list[int]]) -> None:
        self.image_config = theirs.image_config
        self.special_ids = theirs.special_ids
        self._ids = ids

    def __call__(self, content: Any) -> SimpleNamespace:
        """Return the ids of a chunk, and no picture.

        Raises:
            MistralLoraError: If the chunk is none of this package.
        """
        chunk = chunk_of_block(content.get_url()) if hasattr(content, "get_url") else None
        if chunk is None:
            raise MistralLoraError("a picture is encoded by its size, and never opened")
        return SimpleNamespace(tokens=self._ids(chunk), image=numpy.empty(0))


class Oracle:
    """Mistral's own tokenization for one tokenizer file.

    Attributes:
        path: The tokenizer file.
        version: The tokenizer version: `v1`, `v2`, `v3`, `v7`, …
        facts: The facts of that version.
        kind: `spm` or `tekken`.
        bos_id: Id of `<s>`.
        eos_id: Id of `</s>`.
        unk_id: Id of `<unk>`.
        vocab_size: Number of ids; ids are `range(vocab_size)`.
    """

    @classmethod
    def load(cls, tokenizer: str | Path) -> Oracle:
        """Load the Mistral tokenizer of a name, a file or a folder.

        Args:
            tokenizer: The name of a tokenizer that mistral-common ships, such as `spm-v3`; a tokenizer file; or a
                checkpoint folder with `tekken.json` or `tokenizer.model.vN`. A path that exists comes first.

        Raises:
            NoOracleError: If a folder has no Mistral tokenizer file. This method reads Mistral's own files alone.
                `CheckpointTokenizer(folder).oracle` recognises such a folder by its vocabulary, as `audit` and `judge`
                do.
            TokenizerError: If there is no such tokenizer, or its file cannot be loaded.

        Example:
            >>> from pytest_mistral_lora import Oracle, Row
            >>> oracle = Oracle.load("spm-v3")
            >>> hello = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
            >>> oracle.encode(Row.from_dict(hello)).input_ids
            (1, 3, 16127, 4, 23325, 2)
        """
        path = Path(tokenizer)
        if not path.exists():
            name = str(tokenizer)
            return cls(shipped_tokenizer(name) if name in SHIPPED else path)
        file = oracle_file(path)
        if file is None:
            raise NoOracleError(
                "no Mistral tokenizer file",
                place=str(path),
                expected="tekken.json or tokenizer.model.vN",
                next_step=(
                    "Name the tokenizer that the folder was made from, such as spm-v3. To recognise the folder by its "
                    "vocabulary, import CheckpointTokenizer from pytest_mistral_lora, and take "
                    f"CheckpointTokenizer(Path({str(path)!r})).oracle."
                ),
            )
        return cls(file)

    def __init__(self, path: str | Path, *, sha256: str | None = None, read: Callable[[], bytes] | None = None) -> None:
        """Load a tokenizer file.

        Args:
            path: A `tekken.json`, or a SentencePiece file whose name ends in `.model.vN`.
            sha256: The SHA-256 of the file, in hex; None to compute it when it is asked for.
            read: Returns the bytes of the file, which may have been read already; None to read it. mistral-common
                takes a path, and opens the file again.

        Raises:
            TokenizerError: If the file is missing, is not a Mistral tokenizer, does not give its version, or is of a
                version that this package does not support.
        """
        self.path: Path = Path(path)
        if not self.path.is_file():
            raise TokenizerError(
                "no such tokenizer file",
                place=str(self.path),
                expected=f"a tokenizer file, a folder with one, or one of {', '.join(SHIPPED)}",
                next_step="Load a name or a folder with Oracle.load.",
            )
        # mistral-common takes any `*.model` for v1: a v3 file of that name would be encoded wrongly without an error.
        if self.path.suffix == ".model":
            raise TokenizerError(
                "the name does not give the tokenizer version",
                place=str(self.path),
                expected=f"a {_SPM_NAMES}",
                next_step="Copy it under a name that ends in its version.",
            )
        if self.path.suffix == ".json" and self.path.parent != shipped_files():
            refuse_damaged(self.path, read)
        if sha256 is not None:
            vars(self)["sha256"] = sha256
        expected = f"a tekken.json, or a {_SPM_NAMES}"
        with in_utf8(self.path) as named, loading(f"mistral-common {VERSION}", self.path, expected):
            self._instruct: Any = load_tokenizer(str(named)).instruct_tokenizer
            self._text: Any = self._instruct.tokenizer
            version = self._text.version
            self.facts: VersionFacts = version_facts(version.value, place=Place.of(self.path))
            self._normalizer = get_normalizer(version, self._text.model_settings_builder)
            self._validators = {mode: remember_tools(get_validator(version, mode)) for mode in ValidationMode}
            self.bos_id: int = self._text.bos_id
            self.eos_id: int = self._text.eos_id
            self.unk_id: int = self._text.unk_id
            # the library raises an error or panics if a pattern backtracks endlessly
            self._text.encode(PROBE, bos=False, eos=False)
        self.version: str = self.facts.name
        self.kind: Literal["spm", "tekken"] = "tekken" if isinstance(self._text, Tekkenizer) else "spm"
        self.vocab_size: int = self._text.n_words
        if wrong := version_violation(self.facts, set(self.control_tokens.values())):
            expected = "a file whose name or configuration gives its true version"
            raise TokenizerError(wrong, place=str(self.path), expected=expected)
        self._templates: dict[bool | None, str] = {}
        self._prepared: dict[Any, Any] = {}
        self._trace = EncoderTrace()
        self._trace.follow(self._text, self._instruct)
        if self._instruct.image_encoder is not None:
            vars(self._instruct)["image_encoder"] = _BlockEncoder(self._instruct.image_encoder, self.block_of)
        self._plain_rows = PlainRows(self._normalised)

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process boundaries as a path: the tokenizer is loaded again there."""
        return Oracle, (self.path,)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the tokenizer file, in hex."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def control_tokens(self) -> Mapping[int, str]:
        """Every control token: id to literal. Text never encodes to one of these ids."""
        return {token: self._text.id_to_piece(token) for token in sorted(self._text.special_ids)}

    @cached_property
    def control_ids(self) -> Mapping[str, int]:
        """The id of each control token by its literal."""
        return {literal: token for token, literal in self.control_tokens.items()}

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """What finds the spelling of a control token in a text."""
        return re.compile("|".join(map(re.escape, self.control_tokens.values())))

    @cached_property
    def markers(self) -> Mapping[int, str]:
        """The ids that no text encodes to, with their literals: the control tokens and `<unk>`."""
        return {self.unk_id: "<unk>", **self.control_tokens}

    @property
    def block_ids(self) -> frozenset[int]:
        """The control tokens of blocks, such as those of images, which have no loss under any objective."""
        return frozenset(self.control_ids[literal] for literal in block_literals() if literal in self.control_ids)

    def block_of(self, chunk: ChunkData) -> list[int]:
        """Return the ids of a measured chunk whose tokens are a block.

        Raises:
            UncheckedRowError: If the tokenizer has no such block.
        """
        kind, sizes = type_of(chunk), self.image_sizes
        literals = kind.literals_of(chunk, sizes) if isinstance(kind, BlockType) and sizes is not None else ()
        return [self.control_ids[literal] for literal in literals]

    @property
    def byte_pairs(self) -> tuple[str, Sequence[bytes]] | None:
        """The pattern of a Tekken file, and its tokens but the control tokens, by id; None for SentencePiece."""
        if self.kind != "tekken":
            return None
        model = self._text._model
        return model._pat_str, sorted(model._mergeable_ranks, key=model._mergeable_ranks.__getitem__)

    @property
    def tool_calls_id(self) -> int | None:
        """Id of `[TOOL_CALLS]`, or None if the version has no tools."""
        return self.control_ids.get("[TOOL_CALLS]")

    @property
    def image_sizes(self) -> ImageSizes | None:
        """The sizes by which images become tokens, as the tokenizer file has them; None if it takes no images."""
        encoder = self._instruct.image_encoder
        if encoder is None:
            return None
        config = encoder.image_config
        return ImageSizes(config.image_patch_size, config.max_image_size, config.spatial_merge_size)

    @cached_property
    def features(self) -> RowFeatures:
        """The fields that its rows may have beside texts and tools."""
        return RowFeatures.of(self.facts, self.control_tokens.values(), self._text.model_settings_builder)

    def encode(self, row: Row | Mapping[str, Any]) -> EncodedRow:
        """Encode a row as it is trained on.

        Every token of an assistant turn of weight 1 is supervised, from its first token to the closing EOS; of a row
        of another kind, the turn that the model writes. A row with a declared objective is supervised by that.

        Raises:
            RowError: If `row` is plain data and not a row.
            OracleRejection: If mistral-common's finetuning validation refuses the conversation, with its reason.
        """
        row = as_row(row)
        turns = row.kind.turns(self, row)
        of_messages = row.trained_weights()
        weights = [of_messages[group[0]] for group in row.assistant_groups()]
        assistant = [index for index, turn in enumerate(turns) if turn.role in ANSWERS]
        if len(assistant) != len(weights):
            raise MistralLoraError(f"mistral-common {VERSION} made {len(assistant)} assistant turns of {len(weights)}")
        supervised = {index for index, weight in zip(assistant, weights, strict=True) if weight}
        spans = spans_of(self.bos_id, turns, supervised, self.eos_id, self.tool_calls_id)
        return EncodedRow.from_spans(*spans).under(row.objective, self.control_ids)

    def traced_texts(self, row: Row | Mapping[str, Any], *, as_prompt: bool = False) -> list[TracedText]:
        """Return the texts and control tokens that mistral-common encoded: their ids, joined, are `input_ids`.

        Args:
            row: The row.
            as_prompt: Whether to encode it like `encode_prompt`.

        Raises:
            OracleRejection: As for `encode`.
        """
        row = as_row(row)
        turns = row.kind.prompt_turns(self, row) if as_prompt else row.kind.turns(self, row)
        parts = ((index, turn.role, *part) for index, turn in enumerate(turns) for part in turn.parts)
        return [TracedText(None, None, None, (self.bos_id,)), *starmap(TracedText, parts)]

    def encode_prompt(self, row: Row | Mapping[str, Any]) -> tuple[int, ...]:
        """Encode the messages before the last assistant turn, or the texts before a completion, as at inference.

        Raises:
            OracleRejection: If nothing comes before the last assistant turn, or mistral-common refuses it.
        """
        row = as_row(row)
        return (self.bos_id, *(token for turn in row.kind.prompt_turns(self, row) for token in turn.ids))

    def reference(self, row: Row | Mapping[str, Any]) -> tuple[int, ...]:
        """Encode by `MistralTokenizer.encode_chat_completion` alone, as mistral-common's documentation does.

        Raises:
            RowError: If `row` is plain data and not a row.
            Exception: Any error of mistral-common for a conversation that it refuses.
        """
        return tuple(
            self.library_tokenizer.encode_chat_completion(_Request.model_validate(request_data(as_row(row)))).tokens
        )

    @cached_property
    def library_tokenizer(self) -> Any:
        """mistral-common's `MistralTokenizer` of the file, for its own functions."""
        # A second instruct tokenizer over the same text tokenizer, without the wrapped encoders of this oracle.
        plain = type(self._instruct)(self._text, self._instruct.image_encoder, self._instruct.audio_encoder)
        return MistralTokenizer(plain, get_validator(self._text.version, ValidationMode.finetuning), self._normalizer)

    def prepared(self, prepare: Callable[[Oracle], _Prepared]) -> _Prepared:
        """Return what a function prepares for the rows of this tokenizer; it is prepared once."""
        if prepare not in self._prepared:
            self._prepared[prepare] = prepare(self)
        found: _Prepared = self._prepared[prepare]
        return found

    def traced_ids(self, role: str, encode: Callable[[Any], Iterable[int]]) -> list[int]:
        """Return the ids that a kind's own encoding gives, in the trace, which then forgets the row before.

        Args:
            role: The role of what is encoded.
            encode: Is given mistral-common's instruct tokenizer, and returns the ids.
        """
        self._trace.turns.clear()
        found: list[int] = self._trace.encode_message(role, lambda: [int(token) for token in encode(self._instruct)])
        return found

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode bare text: no BOS, no EOS, and no control token even if the text spells one."""
        return tuple(self._text.encode(text, bos=False, eos=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, leaving control tokens out.

        An id that is not in the vocabulary becomes U+FFFD: a model with a larger output layer can generate it.
        """
        if len(ids) and 0 <= min(ids) <= max(ids) < self.vocab_size:
            return str(self._text.decode([*ids], special_token_policy=SpecialTokenPolicy.IGNORE))
        parts = groupby(ids, lambda token: 0 <= token < self.vocab_size)
        return "".join(
            str(self._text.decode([*run], special_token_policy=SpecialTokenPolicy.IGNORE))
            if is_known
            else "\ufffd" * len([*run])
            for is_known, run in parts
        )

    def piece(self, token: int) -> str:
        """Return one token as it is written in the vocabulary, for reports."""
        if not 0 <= token < self.vocab_size:
            return "<not in the vocabulary>"
        return str(self._text.id_to_piece(token))

    @cached_property
    def vocabulary(self) -> tuple[bytes, ...]:
        """The bytes of each id: of a piece or a control token, its spelling; never U+FFFD for a part of a character."""
        return tuple(map(self.token_bytes, range(self.vocab_size)))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id, as `vocabulary` has them: making all of them takes a tenth of a second."""
        if self.kind == "tekken":
            return bytes(self._text.id_to_byte_piece(token, SpecialTokenPolicy.KEEP))
        return self.piece(token).encode()

    def chat_template(self, *, plain_thinking: bool | None = None, system_prompt: str | None = None) -> str:
        """Return the Jinja chat template that mistral-common generates for this tokenizer.

        Args:
            plain_thinking: False to refuse thinking in v11, which mistral-common's guess (None) writes as `<think>`.
            system_prompt: A system prompt for conversations without one.

        Raises:
            NoTemplateError: If this version of mistral-common generates templates with other ids than its encoder's.
        """
        if not WRITES_TEMPLATES:
            raise NoTemplateError(
                f"mistral-common {VERSION} generates chat templates with other ids than its encoder's",
                expected=f"mistral-common{EXACT_TEMPLATES}, or a folder with a chat template",
            )
        if system_prompt is not None:
            # in a turn of its own, mistral-common writes it without the space that SentencePiece has before each text
            space = " " if self.kind == "spm" and self.facts.system_in == "own-turn" else ""
            # it holds a text of a file, so it is rendered like a foreign template
            return self._generated_template(plain_thinking, space + system_prompt)
        if plain_thinking not in self._templates:
            self._templates[plain_thinking] = trust(self._generated_template(plain_thinking, None))
        return self._templates[plain_thinking]

    def _generated_template(self, plain_thinking: bool | None, system_prompt: str | None) -> str:
        # mistral-common would load the file again, which takes 1.3 CPU seconds for Tekken: give it this tokenizer.
        # See benchmarks/patches.py, template.
        try:  # versions before 1.11.6 lack it
            from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
        except ImportError as error:
            raise _missing_api(error) from error
        stand_in = SimpleNamespace(from_file=lambda _: self.library_tokenizer)
        generate = rebound(convert_tokenizer_to_chat_template, MistralTokenizer=stand_in)
        return str(generate(self.path, system_prompt, True, plain_thinking))

    def _normalised(self, row: Row, mode: ValidationMode = ValidationMode.finetuning) -> Any:
        """Return the normalised request of a row, or raise mistral-common's error if it is refused."""
        # one pass of pydantic for the whole request: message by message takes twice as long
        request = self._validators[mode].validate_request(_Request.model_validate(request_data(row)))
        return self._normalizer.from_chat_completion_request(request)

    def chat_turns(self, row: Row, *, as_prompt: bool = False) -> list[Turn]:
        """Return the turns of a conversation after BOS.

        Args:
            row: The row.
            as_prompt: Whether it is a prompt at inference, and not a row to train on.

        Raises:
            OracleRejection: If mistral-common refuses the conversation, with its reason.
        """
        mode = ValidationMode.test if as_prompt else ValidationMode.finetuning
        if self.facts.tools_in is None and row.tools:
            raise OracleRejection(
                f"tools are given, but tokenizer {self.version} has no tools: mistral-common would leave them out",
                place=row.place / "tools",
                expected=f"a row without tools, or a tokenizer {taken_by(lambda facts: facts.tools_in)}",
            )
        sizes = self.image_sizes
        for chunk, kind in blocks_in(message.get("content") for message in row.messages):
            if reason := kind.unencoded_by(sizes):
                found = f"{kind.shown(chunk)}: {reason} ({self.path.name})"
                raise UncheckedRowError(found, reason=f"{kind.title} ({reason})", place=row.place)
        self._trace.turns.clear()
        try:
            request = self._plain_rows.request(row) if mode == ValidationMode.finetuning else None
            tokens = self._instruct.encode_instruct(request or self._normalised(row, mode)).tokens
        except Exception as error:
            # MistralCommonException, pydantic's ValidationError or a bare AssertionError, by the reason of the refusal
            if is_our_call(error):
                raise LibraryError(
                    f"mistral-common {VERSION} is not called as this package calls it: {error}",
                    expected=f"mistral-common{SUPPORTED}",
                    next_step="If it is newer than the versions that were tried, install an older one, and report it.",
                ) from error
            raise explain(error, row, self.version) from error
        turns = [split_turn(traced, self.control_tokens.keys()) for traced in self._trace.turns]
        if [self.bos_id, *chain.from_iterable(turn.ids for turn in turns)] != tokens:
            raise MistralLoraError(
                f"mistral-common {VERSION} builds a conversation in a way that this package does not know",
                place=row.place,
                next_step="Please report it with the row; until then use another mistral-common version.",
            )
        return turns
