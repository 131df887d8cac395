"""The named deviations of answers: differences that change no meaning.

As for prompts, a deviation is accepted only if this table predicts the text, and the server and its version are known
to have it (`Server.known_deviations`). A difference that changes a call, or that makes a call of a text, is never
accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerDeviation:
    """One way in which a server changes an answer.

    Attributes:
        id: Its name.
        title: The change, in one sentence.
        part: The part of the message that it changes: `text` or `thinking`.
        only_before_calls: Whether only messages with calls have it.
        kinds: Tokenizer kinds that have it: `spm`, `tekken`.
        predict: Returns the changed part for a part.
    """

    id: str
    title: str
    part: str
    predict: Callable[[str], str]
    only_before_calls: bool = False
    kinds: frozenset[str] = frozenset({"spm", "tekken"})


ANSWER_DEVIATIONS = (
    AnswerDeviation(
        id="leading-white-space",
        title="White space at the beginning of a text is left out.",
        part="text",
        predict=str.lstrip,
    ),
    AnswerDeviation(
        id="first-space",
        title="A text begins with the space of its first SentencePiece token, which mistral-common leaves out.",
        part="text",
        kinds=frozenset({"spm"}),
        predict=lambda text: f" {text}",
    ),
    AnswerDeviation(
        id="line-breaks-before-call",
        title="White space at the end of a text before a call is left out.",
        part="text",
        only_before_calls=True,
        predict=str.rstrip,
    ),
    AnswerDeviation(
        id="thought-edges",
        title="White space at the end of a thought is left out.",
        part="thinking",
        predict=str.rstrip,
    ),
)
"""The closed table: answers that were forced on servers were changed so."""


def named_deviation(part: str, said: str, served: str, *, has_calls: bool, kind: str) -> AnswerDeviation | None:
    """Return the deviation that predicts a served part of an answer; None if no deviation does.

    Args:
        part: The part of the message.
        said: The part as the model said it.
        served: The part as the client gets it, which differs.
        has_calls: Whether the model said calls, too.
        kind: The kind of the tokenizer: `spm` or `tekken`.
    """
    if said == served:
        # the fault is one of several parts
        return None
    for deviation in ANSWER_DEVIATIONS:
        applies = deviation.part == part and kind in deviation.kinds
        if deviation.only_before_calls and not has_calls:
            continue
        if applies and deviation.predict(said) == served:
            return deviation
    return None
