"""The named deviations of answers: differences that are known of a server and its versions, and change no meaning.

As for prompts, a deviation is accepted only if this table has it of the server and version, and predicts the text. A
difference that changes a call, or that makes a call of a text, is never accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerDeviation:
    """One way in which a server changes an answer.

    Attributes:
        id: Its name.
        title: The change, in one sentence.
        part: The part of the message that it changes: `text` or `thinking`.
        only_before_calls: Whether only messages with calls have it.
        kinds: Tokenizer kinds that have it: `spm`, `tekken`.
        servers: The servers that it was seen of, by the name of their kind, and their versions.
        predict: Returns the changed part for a part.
    """

    id: str
    title: str
    part: str
    servers: Mapping[str, SpecifierSet]
    predict: Callable[[str], str]
    only_before_calls: bool = False
    kinds: frozenset[str] = frozenset({"spm", "tekken"})

    def known_of(self, server: str, version: str) -> bool:
        """Return whether a server of a kind and version was seen to have it: `llamacpp`, `b11549-8b3f1c2`."""
        number = re.search(r"\d+(\.\d+)*", version)
        return number is not None and server in self.servers and number[0] in self.servers[server]


ANSWER_DEVIATIONS = (
    AnswerDeviation(
        id="leading-white-space",
        title="White space at the beginning of a text is left out.",
        part="text",
        servers={"llamacpp": SpecifierSet(">=11549")},
        predict=str.lstrip,
    ),
    AnswerDeviation(
        id="first-space",
        title="A text begins with the space of its first SentencePiece token, which mistral-common leaves out.",
        part="text",
        kinds=frozenset({"spm"}),
        servers={"llamacpp": SpecifierSet(">=11549")},
        predict=lambda text: f" {text}",
    ),
    AnswerDeviation(
        id="line-breaks-before-call",
        title="White space at the end of a text before a call is left out.",
        part="text",
        only_before_calls=True,
        servers={"vllm": SpecifierSet(">=0.32")},
        predict=str.rstrip,
    ),
    AnswerDeviation(
        id="thought-edges",
        title="White space at the end of a thought is left out.",
        part="thinking",
        servers={"vllm": SpecifierSet(">=0.32")},
        predict=str.rstrip,
    ),
)
"""The closed table: answers that were forced on these servers were changed so."""


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
