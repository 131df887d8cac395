"""Mistral's own tokenization, the truth for ids: the only module that imports mistral-common.

A row is encoded by mistral-common itself. While it works, the calls of its public per-message encoders and of its
text tokenizer are recorded; the recordings say which turn every token belongs to and which text it came from. Nothing
is searched for in text or ids, and no prefixes are compared: text may contain marker strings, and v2 and v3 put the
system prompt and the tools beside the *last* user turn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.protocol.instruct.messages import (
    FinetuningAssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from pytest_mistral_lora.chat.encoded import EncodedRow, Span, SpanKind
from pytest_mistral_lora.chat.refusals import explain
from pytest_mistral_lora.chat.rows import Row, as_row, weight_of
from pytest_mistral_lora.errors import MistralLoraError, OracleRejection, TokenizerError

VERSION: str = mistral_common.__version__

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

_ENCODERS = {
    "encode_system_message": "system",
    "encode_user_message": "user",
    "encode_assistant_message": "assistant",
    "encode_tool_message": "tool",
}
_MESSAGES: dict[str, Any] = {
    "system": SystemMessage,
    "user": UserMessage,
    "assistant": FinetuningAssistantMessage,
    "tool": ToolMessage,
}


def shipped_tokenizer(name: str) -> Path:
    """Return the path of a tokenizer file that mistral-common ships.

    Raises:
        TokenizerError: If `name` is not a key of `SHIPPED`, or this mistral-common does not ship the file.
    """
    if name not in SHIPPED:
        raise TokenizerError(f"unknown tokenizer {name!r}", expected="one of " + ", ".join(SHIPPED))
    path = Path(mistral_common.__file__).parent / "data" / SHIPPED[name]
    if not path.is_file():
        raise TokenizerError(f"mistral-common {VERSION} does not ship {SHIPPED[name]}", place=str(path))
    return path


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens that mistral-common encoded in one go.

    Attributes:
        turn: Index of the turn, or None for BOS.
        role: Role of the turn, or None for BOS.
        text: What was encoded, or None for a control token placed by id.
        ids: The tokens; a single one for a control token; none for an empty text.
    """

    turn: int | None
    role: str | None
    text: str | None
    ids: tuple[int, ...]


_Text = tuple[str, tuple[int, ...]]
_Turn = tuple[str, tuple[int, ...], tuple[_Text, ...]]


class Oracle:
    """Mistral's own tokenization for one tokenizer file.

    Attributes:
        path: The tokenizer file.
        version: The tokenizer version: `v1`, `v2`, `v3`, `v7`, …
        kind: `spm` or `tekken`.
        bos_id: Id of `<s>`.
        eos_id: Id of `</s>`.
        unk_id: Id of `<unk>`.
        vocab_size: Number of ids; ids are `range(vocab_size)`.
    """

    def __init__(self, path: str | Path) -> None:
        """Load a tokenizer file.

        Args:
            path: A `tekken.json`, or a SentencePiece file whose name ends in `.model.vN`.

        Raises:
            TokenizerError: If the file is missing, is not a Mistral tokenizer, or does not say its version.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise TokenizerError("no such tokenizer file", place=str(self.path))
        if self.path.suffix == ".model":  # mistral-common would take it for v1, whatever it is
            raise TokenizerError(
                "the name does not say the tokenizer version",
                place=str(self.path),
                expected="a SentencePiece file named *.model.v1 … *.model.v7",
                next_step="Copy it under a name that ends in its version.",
            )
        try:
            self._instruct: Any = MistralTokenizer.from_file(str(self.path)).instruct_tokenizer
            self._text: Any = self._instruct.tokenizer
            version = self._text.version
            self._normalizer = get_normalizer(version, self._text.model_settings_builder)
            self._validators = {mode: get_validator(version, mode) for mode in ValidationMode}
        except Exception as error:  # mistral-common raises many types for a file that is not a tokenizer
            raise TokenizerError(
                f"mistral-common {VERSION} cannot load it: {error}",
                place=str(self.path),
                expected="a tekken.json, or a SentencePiece file named *.model.v1 … *.model.v7",
            ) from error
        self.version: str = version.value
        self.kind = "tekken" if isinstance(self._text, Tekkenizer) else "spm"
        self.bos_id: int = self._text.bos_id
        self.eos_id: int = self._text.eos_id
        self.unk_id: int = self._text.unk_id
        self.vocab_size: int = self._text.n_words
        self._check_vocabulary()
        self._listen()

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
    def tool_calls_id(self) -> int | None:
        """Id of `[TOOL_CALLS]`, or None where the version has no tools."""
        return next((token for token, literal in self.control_tokens.items() if literal == "[TOOL_CALLS]"), None)

    def encode(self, row: Row | Mapping[str, Any]) -> EncodedRow:
        """Encode a row as it is trained on.

        Supervised is every token of an assistant turn of weight 1, from its first token to the closing EOS.

        Raises:
            RowError: If `row` is plain data and not a row.
            OracleRejection: If mistral-common's finetuning validation refuses the conversation; it says why.
        """
        row = as_row(row)
        weights = [weight_of(row.messages[group[0]]) for group in row.assistant_groups()]
        return self._with_spans(self.pieces(row), weights)

    def pieces(self, row: Row | Mapping[str, Any]) -> list[Piece]:
        """Return what mistral-common encoded, piece by piece; the ids of all pieces are the row's `input_ids`.

        Raises:
            OracleRejection: As for `encode`.
        """
        return self._run(as_row(row), ValidationMode.finetuning)

    def encode_prompt(self, row: Row | Mapping[str, Any]) -> tuple[int, ...]:
        """Encode what comes before the last assistant turn, as at inference: the ids that the turn follows.

        Raises:
            OracleRejection: If nothing comes before the last assistant turn, or mistral-common refuses it.
        """
        row = as_row(row)
        start = row.assistant_groups()[-1][0]
        prompt = Row(row.messages[:start], row.tools, row.place)
        return tuple(token for piece in self._run(prompt, ValidationMode.test) for token in piece.ids)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode bare text: no BOS, no EOS, no control tokens whatever it says."""
        return tuple(self._text.encode(text, bos=False, eos=False))

    def decode(self, ids: tuple[int, ...] | list[int]) -> str:
        """Decode ids to text, leaving control tokens out."""
        return str(self._text.decode(list(ids), special_token_policy=SpecialTokenPolicy.IGNORE))

    def piece(self, token: int) -> str:
        """Return one token as it is written in the vocabulary, for reports."""
        if not 0 <= token < self.vocab_size:
            return "<not in the vocabulary>"
        return str(self._text.id_to_piece(token))

    def chat_template(self) -> str:
        """Return the Jinja chat template that mistral-common generates for this tokenizer."""
        return convert_tokenizer_to_chat_template(self.path)

    def _check_vocabulary(self) -> None:
        """Refuse a version that the vocabulary belies: SentencePiece gives `<unk>` for a marker it does not have."""
        markers = {"[INST]": self.version != "v1"}
        if self.version not in ("v1", "v2", "v3"):
            markers["[SYSTEM_PROMPT]"] = True
        literals = set(self.control_tokens.values())
        for marker, expected in markers.items():
            if (marker in literals) is not expected:
                raise TokenizerError(
                    f"it says that it is {self.version}, but its vocabulary has {'no' if expected else 'a'} {marker}",
                    place=str(self.path),
                    expected="a file whose name or configuration says its true version",
                )

    def _listen(self) -> None:
        """Note what the encoders return. The objects are this oracle's own, so nothing else is changed."""
        self._heard_texts: list[_Text] = []
        self._heard_turns: list[_Turn] = []
        self._text.encode = self._noting_text(self._text.encode)
        for name, role in _ENCODERS.items():
            setattr(self._instruct, name, self._noting_turn(role, getattr(self._instruct, name)))
        # encode_instruct decodes every conversation for a debugging text that we do not use; it is a third of its time
        self._instruct.decode = lambda *args, **kwargs: ""

    def _noting_text(self, encode: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def noting(s: str, *args: Any, **kwargs: Any) -> list[int]:
            ids = encode(s, *args, **kwargs)
            self._heard_texts.append((s, tuple(ids)))  # a copy: the callers append to what they get
            return ids

        return noting

    def _noting_turn(self, role: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._heard_texts.clear()
            result = encode(*args, **kwargs)
            ids = result[0] if isinstance(result, tuple) else result
            self._heard_turns.append((role, tuple(ids), tuple(self._heard_texts)))
            return result

        return noting

    def _run(self, row: Row, mode: ValidationMode) -> list[Piece]:
        if self.version == "v1" and row.tools:
            raise OracleRejection(
                "tools are given, but tokenizer v1 has no tools: mistral-common would leave them out",
                place=f"{row.place}, tools" if row.place else "tools",
                expected="a row without tools, or a tokenizer from v2 on",
            )
        self._heard_turns.clear()
        try:
            request = self._validators[mode].validate_request(_request(row))
            tokens = self._instruct.encode_instruct(self._normalizer.from_chat_completion_request(request)).tokens
        except Exception as error:  # MistralCommonException, pydantic's, and bare assertions, by case
            raise explain(error, row, self.version) from error
        pieces = [Piece(None, None, None, (self.bos_id,))]
        for turn, heard in enumerate(self._heard_turns):
            pieces += _split(turn, *heard, self.control_tokens.keys())
        if [token for piece in pieces for token in piece.ids] != list(tokens):
            raise MistralLoraError(
                f"mistral-common {VERSION} builds a conversation in a way that this version does not know",
                place=row.place,
                next_step="Please report it with the row; until then use another mistral-common version.",
            )
        return pieces

    def _with_spans(self, pieces: list[Piece], weights: list[int]) -> EncodedRow:
        assistants = {turn: weights[n] for n, turn in enumerate(self._assistant_turns(len(weights)))}
        ids: list[int] = []
        spans: list[Span] = []
        in_tool_call = False
        for piece in pieces:
            in_tool_call = self.tool_calls_id in piece.ids or (in_tool_call and piece.ids != (self.eos_id,))
            kind = self._kind(piece, in_tool_call)
            start = len(ids)
            ids += piece.ids
            supervised = bool(assistants.get(piece.turn, 0)) if piece.turn is not None else False
            span = Span(piece.turn, piece.role, kind, start, len(ids), supervised)
            if spans and (spans[-1].turn, spans[-1].kind) == (span.turn, span.kind):
                span = dataclasses.replace(span, start=spans.pop().start)
            spans.append(span)
        return EncodedRow.from_spans(ids, spans)

    def _assistant_turns(self, expected: int) -> list[int]:
        turns = [turn for turn, (role, _, _) in enumerate(self._heard_turns) if role == "assistant"]
        if len(turns) != expected:
            raise MistralLoraError(f"mistral-common {VERSION} made {len(turns)} assistant turns of {expected}")
        return turns

    def _kind(self, piece: Piece, in_tool_call: bool) -> SpanKind:
        if piece.role == "assistant" and piece.ids == (self.eos_id,):
            return "eos"
        if in_tool_call:
            return "tool_call"
        return "control" if piece.text is None else "text"


def _request(row: Row) -> ChatCompletionRequest[Any]:
    messages = []
    for message in row.messages:
        data = {key: value for key, value in message.items() if value is not None}
        if data["role"] == "assistant":
            # an absent weight is 1, so that a spelled-out 1 does not split a turn
            data["weight"] = weight_of(message)
            data["tool_calls"] = [_with_known_id(call) for call in data.get("tool_calls", ())] or None
        messages.append(_MESSAGES[data["role"]].model_validate(data))
    tools = [Tool.model_validate(_without_nulls(tool)) for tool in row.tools or ()]
    return ChatCompletionRequest(messages=messages, tools=tools or None)


def _with_known_id(call: Mapping[str, Any]) -> dict[str, Any]:
    """Leave a null id out: mistral-common has its own way to say that there is none."""
    return {key: value for key, value in call.items() if key != "id" or value is not None}


def _without_nulls(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool["function"].items() if value is not None}
    return {"type": "function", "function": function}


def _split(turn: int, role: str, ids: tuple[int, ...], texts: tuple[_Text, ...], control: Set[int]) -> list[Piece]:
    """Lay the texts of a turn over its ids; text never holds a control token, so those part the turn into runs.

    Within a run the texts need not stand in the order in which they were encoded: v11 encodes a call's id first and
    puts it after the name.
    """
    waiting = [(text, text_ids) for text, text_ids in texts if text_ids]
    pieces: list[Piece] = []
    for is_control, group in itertools.groupby(ids, control.__contains__):
        run = tuple(group)
        found = None if is_control else _texts_of(run, waiting)
        if is_control:
            pieces += [Piece(turn, role, None, (token,)) for token in run]
        elif found is None:
            raise MistralLoraError(f"mistral-common {VERSION} builds a turn of role {role} in a way that is not known")
        else:
            pieces += [Piece(turn, role, text, text_ids) for text, text_ids in found]
            for text in found:
                waiting.remove(text)
    if waiting:
        raise MistralLoraError(f"mistral-common {VERSION} encoded a text that is not in its turn: {waiting[0][0]!r}")
    return pieces


def _texts_of(run: tuple[int, ...], texts: list[_Text]) -> list[_Text] | None:
    """Return the texts that a run of ids is made of, or None if it is not made of them."""
    if not run:
        return []
    for index, (text, text_ids) in enumerate(texts):
        if run[: len(text_ids)] == text_ids:
            rest = _texts_of(run[len(text_ids) :], texts[:index] + texts[index + 1 :])
            if rest is not None:
                return [(text, text_ids), *rest]
    return None
