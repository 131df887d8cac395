"""A trace of mistral-common's encoders: which turn and which text each token comes from.

The encoders are called through the trace, which notes their results. The notes are then aligned with the ids of the
conversation, so that no marker is searched for in text or ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.encoded import ANSWERS, Span, SpanKind
from pytest_mistral_lora.chat.turns import Part, Turn
from pytest_mistral_lora.errors import MistralLoraError

_BARE = {"bos": False, "eos": False}
_Text = tuple[str, tuple[int, ...]]


class TracedText(NamedTuple):
    """A run of tokens that was encoded in one go.

    Attributes:
        turn: Index of the turn, or None for BOS.
        role: Role of the turn, or None for BOS.
        text: The text that was encoded, or None for a control token placed by id.
        ids: The tokens; a single one for a control token.
    """

    turn: int | None
    role: str | None
    text: str | None
    ids: tuple[int, ...]


class TracedTurn(NamedTuple):
    """The result of the encoder of one message, and the texts that it encoded on the way.

    Attributes:
        role: Role of the message.
        ids: Its tokens.
        texts: Each text with its tokens, in the order in which they were encoded.
    """

    role: str
    ids: tuple[int, ...]
    texts: tuple[_Text, ...]


class TextCache(dict[str, tuple[int, ...]]):
    """The ids of the last encoded texts: system prompts, tools and short answers recur."""

    _CHARACTERS = 1_000_000
    _LONGEST = 50_000

    def __init__(self, encode: Callable[..., list[int]]) -> None:
        """Use `encode`, without BOS and EOS, for a text that is not kept."""
        super().__init__()
        self._encode = encode
        self._characters = 0

    def __missing__(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._encode(text, bos=False, eos=False))
        if len(text) <= self._LONGEST:
            self._characters += len(text)
            if self._characters > self._CHARACTERS:
                # all at once: a text that recurs is kept again with the next row
                self.clear()
                self._characters = len(text)
            self[text] = ids
        return ids


_ENCODERS = {
    "encode_system_message": "system",
    "encode_user_message": "user",
    "encode_assistant_message": "assistant",
    "encode_tool_message": "tool",
}


@dataclass
class EncoderTrace:
    """Notes the results of encoders that are called through it; not safe to share between threads.

    Attributes:
        turns: The turns that were encoded since the list was last cleared.
    """

    turns: list[TracedTurn] = field(default_factory=list)
    _texts: list[_Text] = field(default_factory=list)

    def follow(self, text: Any, instruct: Any) -> None:
        """Call the encoders of mistral-common's two tokenizers, of texts and of messages, through this trace.

        Their methods are replaced, so nothing else may use the two objects.
        """
        text.encode = partial(self.encode_text, text.encode, TextCache(text.encode))
        for name, role in _ENCODERS.items():
            setattr(instruct, name, partial(self.encode_message, role, getattr(instruct, name)))
        # encode_instruct decodes every conversation for a debugging text that we do not use.
        # Without it, rows take 34 % less CPU time: benchmarks/patches.py, decode.
        instruct.decode = lambda *args, **kwargs: ""

    def encode_text(
        self, encode: Callable[..., list[int]], known: TextCache, /, s: str, *args: Any, **kwargs: Any
    ) -> list[int]:
        """Encode a text by `encode`, whose bare results are `known`, and note it with its ids."""
        ids = known[s] if not args and kwargs == _BARE else tuple(encode(s, *args, **kwargs))
        self._texts.append((s, ids))
        return list(ids)  # A copy: mistral-common's callers append to the list that they get.

    def encode_message(self, role: str, encode: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Encode a message by `encode`, and note its result: ids, or a tuple that starts with ids."""
        self._texts.clear()
        result = encode(*args, **kwargs)
        ids = result[0] if isinstance(result, tuple) else result
        self.turns.append(TracedTurn(role, tuple(ids), tuple(self._texts)))
        return result


def split_turn(traced: TracedTurn, control: Container[int]) -> Turn:
    """Align the texts of a turn with its ids; text never holds a control token, so those split the turn into runs.

    Raises:
        MistralLoraError: If the turn is not made of its texts and control tokens.
    """
    texts = [text for text in traced.texts if text[1]]
    ids, start = traced.ids, 0
    parts: list[Part] = []
    for text in texts:
        while start < len(ids) and ids[start] in control:
            parts.append((None, ids[start : start + 1]))
            start += 1
        end = start + len(text[1])
        if ids[start:end] != text[1]:
            return Turn(traced.role, ids, _split_in_any_order(traced, texts, control))
        parts.append(text)
        start = end
    rest = [(None, (token,)) for token in itertools.takewhile(control.__contains__, ids[start:])]
    if start + len(rest) != len(ids):
        return Turn(traced.role, ids, _split_in_any_order(traced, texts, control))
    return Turn(traced.role, ids, [*parts, *rest])


def _split_in_any_order(traced: TracedTurn, texts: list[_Text], control: Container[int]) -> list[Part]:
    """Return the parts of a turn whose texts are not in the order of their encoding."""
    # v11 encodes the id of a tool call first, and puts it after the name.
    waiting = list(texts)
    parts: list[Part] = []
    for is_control, group in itertools.groupby(traced.ids, control.__contains__):
        run = tuple(group)
        if is_control:
            parts += [(None, (token,)) for token in run]
            continue
        found = _texts_of(run, waiting)
        if found is None:
            raise MistralLoraError(f"a turn of role {traced.role} is built in a way that is not known")
        parts += found
        for text in found:
            waiting.remove(text)
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
        tool_calls_id: Id of `[TOOL_CALLS]`; None if the version has no tools.
    """
    ids: list[int] = [bos_id]
    spans = [Span(None, None, "control", 0, 1, False)]
    eos = (eos_id,)
    in_tool_call = False
    for index, (role, _, parts) in enumerate(turns):
        is_supervised = index in supervised
        start = end = len(ids)
        last: SpanKind | None = None
        for text, tokens in parts:
            if not tokens:
                continue  # an empty text of a kind without turns
            is_eos = tokens == eos
            # A part is one control token or has none, so the first token of a part decides.
            in_tool_call = tokens[0] == tool_calls_id or (in_tool_call and not is_eos)
            kind: SpanKind = "control" if text is None else "text"
            if is_eos and role in ANSWERS:
                kind = "eos"
            elif in_tool_call:
                kind = "tool_call"
            if kind != last:
                if last is not None:
                    spans.append(Span(index, role, last, start, end, is_supervised))
                start, last = end, kind
            ids += tokens
            end += len(tokens)
        if last is not None:
            spans.append(Span(index, role, last, start, end, is_supervised))
    return ids, spans
