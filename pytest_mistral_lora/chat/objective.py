"""Objectives: the tokens of a row that have a loss, as one table of words.

An objective is declared: by `training.objective`, `--objective`, or the configuration of a trainer. `answers` is the
default. A message of weight 0 has no loss under any objective. `Row.trained_weights` weighs the turns by it, and
`EncodedRow.under` gives each token its label.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from pytest_mistral_lora.errors import InputError, did_you_mean
from pytest_mistral_lora.places import Place

TURNS = {
    "answers": "all that the model writes, with each closing EOS",
    "last-answer": "the last answer alone",
    "last-round": "each answer behind the last message of the user",
    "everything": "every token but padding, images and messages of weight 0",
}
"""The words for the turns that have a loss, with their meanings; one of them is in each objective."""
MODIFIERS = {
    "no-thinking": "not from [THINK] to [/THINK]",
    "no-calls": "not from the first [TOOL_CALLS] of an answer to its EOS",
}
"""The words that take the loss of some tokens away, with their meanings."""
WORDS = {**TURNS, **MODIFIERS}

NEEDS = {"no-thinking": "[THINK]", "no-calls": "[TOOL_CALLS]"}
"""The control token without which a modifier says nothing."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The tokens of a row that have a loss.

    Attributes:
        turns: A key of `TURNS`.
        without: Keys of `MODIFIERS`, in the order of the table.
    """

    turns: str = "answers"
    without: tuple[str, ...] = ()

    @classmethod
    def of(cls, words: str, place: Place | str) -> Objective:
        """Return the objective that words name, such as `last-answer,no-thinking`.

        Args:
            words: Words of the tables, joined by commas. Without a word for turns, they are `answers`.
            place: The option or key that has them.

        Raises:
            InputError: If a word is unknown or is there twice, or two words name turns.
        """
        expected = f"words joined by commas, of {', '.join(WORDS)}: last-answer,no-thinking"
        if not isinstance(words, str):
            raise InputError(f"{words!r} is no objective", place=place, expected=expected)
        named = [word.strip() for word in words.split(",")]
        for word in named:
            if word not in WORDS:
                raise InputError(
                    f"{word!r} is no objective{did_you_mean(word, list(WORDS))}", place=place, expected=expected
                )
        if len(set(named)) < len(named):
            raise InputError(f"{words!r} names a word twice", place=place, expected=expected)
        turns = [word for word in named if word in TURNS]
        if len(turns) > 1:
            found = f"{words!r} names {' and '.join(turns)}"
            raise InputError(found, place=place, expected=f"one of {', '.join(TURNS)}")
        return cls(turns[0] if turns else "answers", tuple(word for word in MODIFIERS if word in named))

    def __str__(self) -> str:
        """Return the words, as `of` reads them."""
        return ",".join((self.turns, *self.without))

    @property
    def meaning(self) -> str:
        """The objective in words."""
        return "; ".join(WORDS[word] for word in (self.turns, *self.without))

    @property
    def is_default(self) -> bool:
        """Whether it is the objective of a run that declares none."""
        return self == ANSWERS

    @property
    def is_of_turns(self) -> bool:
        """Whether each turn of the model has a loss as a whole or not at all, and nothing else has one."""
        return not self.without and self.turns != "everything"

    @classmethod
    def expressible(cls, controls: Collection[str]) -> Iterator[Objective]:
        """Yield each objective that says something for a tokenizer, those of few words first.

        Args:
            controls: The control tokens of the tokenizer.
        """
        modifiers = [word for word in MODIFIERS if NEEDS[word] in controls]
        for count in range(len(modifiers) + 1):
            for turns, without in itertools.product(TURNS, itertools.combinations(modifiers, count)):
                yield cls(turns, without)

    def require(self, controls: Collection[str], version: str, place: Place | str) -> None:
        """Refuse an objective that says nothing for a tokenizer.

        Args:
            controls: The control tokens of the tokenizer.
            version: Its version.
            place: The option or key that has the objective.

        Raises:
            InputError: If a word is about a control token that the tokenizer does not have.
        """
        for word in self.without:
            if NEEDS[word] not in controls:
                raise InputError(
                    f"{word} is about {NEEDS[word]}, which the tokenizer ({version}) does not have",
                    place=place,
                    expected=f"an objective without {word}",
                )


ANSWERS = Objective()
"""The objective of a run that declares none."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """An objective, and who declares it; two are equal if they declare the same.

    Attributes:
        objective: The objective; None if no word expresses what is declared: labels are then not judged.
        by: The option, or the key of a configuration with its value, such as `mask_history: true`.
    """

    objective: Objective | None
    by: str = field(compare=False)

    @classmethod
    def given(cls, words: str | None) -> Declaration | None:
        """Return the objective that an argument `objective=` declares; None without one.

        Raises:
            InputError: As for `Objective.of`.
        """
        return None if words is None else cls(Objective.of(words, "objective="), "objective=")

    @property
    def words(self) -> str:
        """The objective, and who declares it."""
        return f"{'not expressible' if self.objective is None else self.objective} ({self.by})"

    def __str__(self) -> str:
        """Return the line of a verdict."""
        return f"objective: {self.words}"

    @classmethod
    def agreed(cls, *declared: Declaration | None) -> Declaration | None:
        """Return the first of several declarations about the same rows; None if there is none.

        Args:
            *declared: The declarations; None for each that says nothing.

        Raises:
            InputError: If two declare different objectives.
        """
        known = [declaration for declaration in declared if declaration is not None]
        for other in known[1:]:
            if other.objective != known[0].objective:
                found = f"two objectives are declared: {known[0].words} and {other.words}"
                raise InputError(found, expected="one objective, or the same in both")
        return known[0] if known else None
