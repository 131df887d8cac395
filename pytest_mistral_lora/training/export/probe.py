"""The probe of a server: a tiny model that says known answers, by the tokenizer of the model that it stands for.

A server cannot be told what its model says. This model is trained, in all weights, until it says the ids of each known
answer. So whatever a client gets in another form was changed by the server: by its grammar, its parsers or its stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tiny_model import tiny_config, write_tiny_base
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.probe import PlantedAnswer

if TYPE_CHECKING:
    from pytest_mistral_lora.records.known_answers import KnownAnswer

MARGIN = 4.0
"""The least distance from the best other token, in logits. The rounding of an engine moves them by far less."""

STEPS = 200
"""The most steps of training; 20 to 60 are enough for the known answers."""

_LEARNING_RATE = 3e-3
_LONGEST_GROUP = 192
"""The most trained tokens at once: their logits over 131,072 tokens take 100 MB."""


def plant(
    folder: Path,
    oracle: Oracle,
    answers: Sequence[KnownAnswer],
    *,
    steps: int = STEPS,
    progress: Callable[[int, float], object] = lambda step, margin: None,
) -> list[PlantedAnswer]:
    """Write a tiny model that says answers, and return each with its margin.

    Args:
        folder: The folder of the model to make.
        oracle: The tokenizer.
        answers: The known answers that fit it.
        steps: The most steps of training.
        progress: Called before each step with its number and the smallest margin so far.

    Raises:
        InputError: If `folder` exists, or no answer fits the tokenizer.
    """
    planted = [
        PlantedAnswer(answer.name, answer.prompt_ids(oracle), answer.answer_ids(oracle))
        for answer in answers
        if answer.fits(oracle)
    ]
    if not planted:
        raise InputError("no known answer fits the tokenizer", place=str(oracle.path))
    write_tiny_base(folder, oracle.path)
    file = folder / "model.safetensors"
    # as write_tiny_base does: transformers' own loading and saving print bars
    model = AutoModelForCausalLM.from_config(tiny_config(oracle)).float()
    model.load_state_dict(load_file(file))
    margins = _train(model, planted, steps, progress)
    save_file(model.state_dict(), file, metadata={"format": "pt"})
    return [replace(answer, margin=margins[answer.name]) for answer in planted]


def _train(
    model: Any, planted: Sequence[PlantedAnswer], steps: int, progress: Callable[[int, float], object]
) -> dict[str, float]:
    """Train all weights until each token of each answer has the margin, and return the smallest margin of each."""
    by_length = sorted(planted, key=lambda answer: len(answer.prompt_ids) + len(answer.answer_ids))
    groups = [_Group.of(answers) for answers in _grouped(by_length)]
    count = sum(len(group.targets) for group in groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0)
    for step in range(steps + 1):
        margins: list[float] = []
        for group in groups:
            logits = group.logits(model)
            found = group.margins(logits)
            margins += found
            if min(found) < MARGIN:
                # the mean over all groups, in parts that fit into memory
                torch.autograd.backward(functional.cross_entropy(logits, group.targets, reduction="sum") / count)
        progress(step, min(margins))
        if min(margins) >= MARGIN or step == steps:
            break
        optimizer.step()
        optimizer.zero_grad()
    return dict(zip((answer.name for answer in by_length), margins, strict=True))


def _grouped(planted: Sequence[PlantedAnswer]) -> Iterator[list[PlantedAnswer]]:
    """Yield the answers in their order, in groups of at most `_LONGEST_GROUP` tokens, or of one longer answer."""
    group: list[PlantedAnswer] = []
    for answer in planted:
        if group and sum(len(other.answer_ids) for other in (*group, answer)) > _LONGEST_GROUP:
            yield group
            group = []
        group.append(answer)
    yield group


@dataclass(frozen=True)
class _Group:
    """Answers that are computed together.

    Attributes:
        ids: Prompts and answers, `(answers, longest)` int64, padded with 0 behind the answer, where nothing is trained.
        is_trained: The places whose next token is a token of an answer, `(answers, longest)` bool.
        targets: The next token of each of these places, `(places,)` int64.
        lengths: The number of tokens of each answer.
    """

    ids: torch.Tensor
    is_trained: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, planted: Sequence[PlantedAnswer]) -> _Group:
        longest = max(len(answer.prompt_ids) + len(answer.answer_ids) for answer in planted)
        ids = torch.zeros(len(planted), longest, dtype=torch.long)
        is_trained = torch.zeros(len(planted), longest, dtype=torch.bool)
        for index, answer in enumerate(planted):
            start, end = len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.answer_ids)
            ids[index, :end] = torch.tensor((*answer.prompt_ids, *answer.answer_ids))
            is_trained[index, start - 1 : end - 1] = True
        lengths = tuple(len(answer.answer_ids) for answer in planted)
        return cls(ids, is_trained, torch.roll(ids, -1, 1)[is_trained], lengths)

    def logits(self, model: Any) -> torch.Tensor:
        """Return the logits of the trained places, `(places, vocabulary)`; the others are not computed."""
        hidden = model.model(self.ids, use_cache=False).last_hidden_state[self.is_trained]
        found: torch.Tensor = model.lm_head(hidden)
        return found

    def margins(self, logits: torch.Tensor) -> list[float]:
        """Return the smallest distance of each answer's tokens from the best other token, in logits."""
        best = logits.detach().topk(2, -1)
        of_target = logits.detach().gather(1, self.targets[:, None])[:, 0]
        of_other = torch.where(best.indices[:, 0] == self.targets, best.values[:, 1], best.values[:, 0])
        return [float(part.min()) for part in torch.split(of_target - of_other, list(self.lengths))]
