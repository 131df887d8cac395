"""The known answers: questions, and what a model says to each, for every version of Mistral's tokenizers.

Their ids are those of the oracle, and their message is the row's own. So whatever reads an answer can be judged by
them: a decoder, a grammar, a server's parser, a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.answer_message import AnswerMessage
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle.versions import VersionFacts, versions_between
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.goldens import goldens_folder

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """A question, and the answer to it.

    Attributes:
        name: Its name, as a file may have it.
        description: What it shows, in one sentence.
        row: The conversation; its last turn is the answer, and no other conversation has its question.
        settings: Keys of OpenAI's request beside messages, tools and `response_format`: `tool_choice`,
            `parallel_tool_calls`.
        versions: Tokenizer versions that can encode it.
        needs: Fields of `RowFeatures` that its tokenizer must have.
    """

    name: str
    description: str
    row: Row
    settings: Mapping[str, Any]
    versions: frozenset[VersionFacts]
    needs: tuple[str, ...] = ()

    def fits(self, oracle: Oracle) -> bool:
        """Return whether a tokenizer can encode it."""
        return oracle.facts in self.versions and all(getattr(oracle.features, name) for name in self.needs)

    def message(self, oracle: Oracle) -> AnswerMessage:
        """Return the message that a client should get."""
        return AnswerMessage.of_last_turn(self.row, oracle.facts)

    def prompt_ids(self, oracle: Oracle) -> tuple[int, ...]:
        """Return the ids of the prompt, BOS first.

        Raises:
            OracleRejection: If the tokenizer cannot encode it.
        """
        return oracle.encode_prompt(self.row)

    def answer_ids(self, oracle: Oracle) -> tuple[int, ...]:
        """Return the ids that the model says, with the closing EOS.

        Raises:
            OracleRejection: If the tokenizer cannot encode it.
        """
        encoded = oracle.encode(self.row)
        turn = encoded.spans[-1].turn
        return encoded.input_ids[next(span.start for span in encoded.spans if span.turn == turn) :]


def known_answers() -> list[KnownAnswer]:
    """Return the known answers.

    Raises:
        TokenizerError: If one names a version that is not supported.
    """
    path = goldens_folder() / "answers.json"
    answers = []
    for data in read_json(path):
        place = Place.of(path) / str(data["case"])
        versions = versions_between(data.get("since"), data.get("until"), place=place)
        row = parse_row(data["row"], place=place)
        needs = tuple(data.get("needs", ()))
        answers.append(KnownAnswer(data["case"], data["description"], row, data.get("request", {}), versions, needs))
    return answers
