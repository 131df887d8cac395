"""Who encoded which tokens: what mistral-common's encoders return, noted while they work, laid over the ids."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from pytest_mistral_lora.chat.encoded import Span, SpanKind
from pytest_mistral_lora.errors import MistralLoraError

_Text = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens that was encoded in one go.

    Attributes:
        turn: Index of the turn, or None for BOS.
        role: Role of the turn, or None for BOS.
        text: What was encoded, or None for a control token placed by id.
        ids: The tokens; a single one for a control token.
    """

    turn: int | None
    role: str | None
    text: str | None
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeardTurn:
    """What the encoder of one message returned, and the texts that it had encoded on the way.

    Attributes:
        role: Role of the message.
        ids: Its tokens.
        texts: Each text with its tokens, in the order in which they were encoded.
    """

    role: str
    ids: tuple[int, ...]
    texts: tuple[_Text, ...]


@dataclass
class Listener:
    """Stands between encoders and their callers, and notes what passes; not safe to share between threads.

    Attributes:
        turns: What has been heard since the list was last cleared.
    """

    turns: list[HeardTurn] = field(default_factory=list)
    _texts: list[_Text] = field(default_factory=list)

    def to_texts(self, encode: Callable[..., list[int]]) -> Callable[..., list[int]]:
        """Return an encoder of texts that notes what it returns."""

        def noting(s: str, *args: Any, **kwargs: Any) -> list[int]:
            ids = encode(s, *args, **kwargs)
            self._texts.append((s, tuple(ids)))  # a copy: the callers append to what they get
            return ids

        return noting

    def to_turns(self, role: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Return an encoder of messages that notes what it returns: ids, or a tuple that starts with them."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            self._texts.clear()
            result = encode(*args, **kwargs)
            ids = result[0] if isinstance(result, tuple) else result
            self.turns.append(HeardTurn(role, tuple(ids), tuple(self._texts)))
            return result

        return noting


def split_turn(turn: int, heard: HeardTurn, control: Container[int]) -> list[Piece]:
    """Lay the texts of a turn over its ids; text never holds a control token, so those part the turn into runs.

    Within a run the texts need not stand in the order in which they were encoded: v11 encodes a call's id first and
    puts it after the name.

    Raises:
        MistralLoraError: If the turn is not made of its texts and control tokens.
    """
    waiting = [(text, ids) for text, ids in heard.texts if ids]
    pieces: list[Piece] = []
    for is_control, group in itertools.groupby(heard.ids, control.__contains__):
        run = tuple(group)
        if is_control:
            pieces += [Piece(turn, heard.role, None, (token,)) for token in run]
            continue
        found = _texts_of(run, waiting)
        if found is None:
            raise MistralLoraError(f"a turn of role {heard.role} is built in a way that is not known")
        pieces += [Piece(turn, heard.role, text, ids) for text, ids in found]
        for one in found:
            waiting.remove(one)
    if waiting:
        raise MistralLoraError(f"a text was encoded that is not in its turn: {waiting[0][0]!r}")
    return pieces


def _texts_of(run: tuple[int, ...], texts: list[_Text]) -> list[_Text] | None:
    """Return the texts that a run of ids is made of, or None if it is not made of them."""
    if not run:
        return []
    for index, (text, ids) in enumerate(texts):
        if run[: len(ids)] == ids:
            rest = _texts_of(run[len(ids) :], texts[:index] + texts[index + 1 :])
            if rest is not None:
                return [(text, ids), *rest]
    return None


def spans_of(
    pieces: Iterable[Piece], supervised: Collection[int], eos_id: int, tool_calls_id: int | None
) -> tuple[list[int], list[Span]]:
    """Return the ids of pieces, and the spans that they make: neighbours of one turn and kind are one span.

    Args:
        pieces: The pieces of a row.
        supervised: The turns that are trained on.
        eos_id: Id of EOS.
        tool_calls_id: Id of `[TOOL_CALLS]`, if there is one.
    """
    ids: list[int] = []
    spans: list[Span] = []
    in_tool_call = False
    for piece in pieces:
        in_tool_call = tool_calls_id in piece.ids or (in_tool_call and piece.ids != (eos_id,))
        kind = _kind(piece, in_tool_call, eos_id)
        span = Span(piece.turn, piece.role, kind, len(ids), len(ids) + len(piece.ids), piece.turn in supervised)
        ids += piece.ids
        if spans and (spans[-1].turn, spans[-1].kind) == (span.turn, span.kind):
            span = dataclasses.replace(span, start=spans.pop().start)
        spans.append(span)
    return ids, spans


def _kind(piece: Piece, in_tool_call: bool, eos_id: int) -> SpanKind:
    if piece.role == "assistant" and piece.ids == (eos_id,):
        return "eos"
    if in_tool_call:
        return "tool_call"
    return "control" if piece.text is None else "text"
