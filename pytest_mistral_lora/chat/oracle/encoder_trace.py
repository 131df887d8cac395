"""Who encoded which tokens: what mistral-common's encoders return, noted while they work, laid over the ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.encoded import Span, SpanKind
from pytest_mistral_lora.errors import MistralLoraError

_Text = tuple[str, tuple[int, ...]]
_Part = tuple[str | None, tuple[int, ...]]
"""A text with its tokens, or None with one control token: plain tuples, since a data set has millions of them."""


class Piece(NamedTuple):
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


class HeardTurn(NamedTuple):
    """What the encoder of one message returned, and the texts that it had encoded on the way.

    Attributes:
        role: Role of the message.
        ids: Its tokens.
        texts: Each text with its tokens, in the order in which they were encoded.
    """

    role: str
    ids: tuple[int, ...]
    texts: tuple[_Text, ...]


class Turn(NamedTuple):
    """A turn, and what it is made of.

    Attributes:
        role: Role of the message.
        ids: Its tokens.
        parts: Runs of them, in order, that were encoded in one go: text and tokens, or None and one control token.
    """

    role: str
    ids: tuple[int, ...]
    parts: list[_Part]


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


def split_turn(heard: HeardTurn, control: Container[int]) -> Turn:
    """Lay the texts of a turn over its ids; text never holds a control token, so those part the turn into runs.

    Raises:
        MistralLoraError: If the turn is not made of its texts and control tokens.
    """
    texts = [text for text in heard.texts if text[1]]
    parts = _split_in_order(heard, texts, control)
    return Turn(heard.role, heard.ids, _split_in_any_order(heard, texts, control) if parts is None else parts)


def _split_in_order(heard: HeardTurn, texts: list[_Text], control: Container[int]) -> list[_Part] | None:
    """Return the parts of a turn, or None if its texts do not stand in the order in which they were encoded."""
    ids, start = heard.ids, 0
    parts: list[_Part] = []
    for text in texts:
        while start < len(ids) and ids[start] in control:
            parts.append((None, ids[start : start + 1]))
            start += 1
        end = start + len(text[1])
        if ids[start:end] != text[1]:
            return None
        parts.append(text)
        start = end
    rest = [(None, (token,)) for token in itertools.takewhile(control.__contains__, ids[start:])]
    return [*parts, *rest] if start + len(rest) == len(ids) else None


def _split_in_any_order(heard: HeardTurn, texts: list[_Text], control: Container[int]) -> list[_Part]:
    """Return the parts of a turn: v11 encodes the id of a tool call first, and puts it after the name."""
    waiting = list(texts)
    parts: list[_Part] = []
    for is_control, group in itertools.groupby(heard.ids, control.__contains__):
        run = tuple(group)
        if is_control:
            parts += [(None, (token,)) for token in run]
            continue
        found = _texts_of(run, waiting)
        if found is None:
            raise MistralLoraError(f"a turn of role {heard.role} is built in a way that is not known")
        parts += found
        for one in found:
            waiting.remove(one)
    if waiting:
        raise MistralLoraError(f"a text was encoded that is not in its turn: {waiting[0][0]!r}")
    return parts


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
    bos_id: int, turns: Iterable[Turn], supervised: Collection[int], eos_id: int, tool_calls_id: int | None
) -> tuple[list[int], list[Span]]:
    """Return the ids of a conversation, and the spans that they make: neighbours of one turn and kind are one span.

    Args:
        bos_id: Id of BOS.
        turns: The turns after it.
        supervised: The indices of those that are trained on.
        eos_id: Id of EOS.
        tool_calls_id: Id of `[TOOL_CALLS]`, if there is one.
    """
    ids: list[int] = [bos_id]
    spans = [Span(None, None, "control", 0, 1, False)]
    in_tool_call = False
    for index, turn in enumerate(turns):
        start, last = len(ids), None
        for text, tokens in turn.parts:
            is_eos = tokens == (eos_id,)
            # a control token is a part of its own
            in_tool_call = tokens[0] == tool_calls_id or (in_tool_call and not is_eos)
            kind = _kind(turn.role, text, is_eos, in_tool_call)
            if last is not None and kind != last:
                spans.append(Span(index, turn.role, last, start, len(ids), index in supervised))
                start = len(ids)
            last = kind
            ids += tokens
        if last is not None:
            spans.append(Span(index, turn.role, last, start, len(ids), index in supervised))
    return ids, spans


def _kind(role: str, text: str | None, is_eos: bool, in_tool_call: bool) -> SpanKind:
    if is_eos and role == "assistant":
        return "eos"
    if in_tool_call:
        return "tool_call"
    return "control" if text is None else "text"
