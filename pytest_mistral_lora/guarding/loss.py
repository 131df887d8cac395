"""The loss of a step: whether it trains for the labels of its batch, each shifted once, and for nothing else.

The labels of a batch of DPO or KTO are the tokens of its answers. Each answer has a weight of its own, and a sign.

The gradient of the step is the witness. It is an error only if the gradient proves it: a token that the labels do not
have is trained on as those are, a position is trained to produce another token than its label, or a label has no
gradient. Any other gradient at a position without a label is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.guarding.preferences import BatchSides
from pytest_mistral_lora.guarding.witness import (
    CERTAIN,
    EQUAL,
    EXACT,
    Directions,
    directions,
    likeliest_targets,
    trained_positions,
    why_no_directions,
)
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners.trainer import AnswerLoss, owner_of_loss

_MOST = 512
"""The most positions of a kind whose direction is computed: each takes a product with the head."""

_NOT_WEIGHTS = ("input_ids", "labels", "shift_labels", "position_ids", "token_type_ids", "attention_mask")
_SHIFTS = {
    2: "labels that are shifted twice",
    0: "labels that are not shifted",
    -1: "labels that are shifted the wrong way",
}

Columns = Mapping[str, torch.Tensor]
"""The columns of a batch that have a value for each token, `(batch, length)`, by name."""


@dataclass(frozen=True, slots=True)
class LossCall:
    """A call of `compute_loss` in training, and what its backward pass left.

    Attributes:
        columns: The columns of its batch, as they were before the call: see `columns_of`.
        hidden: The output of the decoder in each call that has a gradient, `(batch, length, hidden)`.
        gradients: The gradient of the step at each of them; None where no loss depends on it.
        precision: The dtype that the head computed in.
        sides: The sides of its rows, if its batch has answers that are compared; else None.
        left_out: Places whose gradient is not compared, `(batch, length)` bool; None for none.
    """

    columns: Columns
    hidden: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor | None]
    precision: torch.dtype = torch.float32
    sides: BatchSides | None = None
    left_out: torch.Tensor | None = None

    def with_answers(self, loss: AnswerLoss | None) -> LossCall:
        """Return the call with the tokens of answers as its labels, if its loss is one of answers.

        Tokens with another weight than the others of their answer are left out.
        """
        mask = self.columns.get("completion_mask")
        if loss is None or self.sides is None or mask is None:
            return replace(self, sides=None)
        tail = self.sides.beyond(mask) if loss.has_tail else torch.zeros_like(mask, dtype=torch.bool)
        labels = self.columns["input_ids"].masked_fill((mask == 0) | tail, IGNORE_INDEX)
        return replace(self, columns={**self.columns, "labels": labels}, left_out=_ahead(tail, 1))


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What a trainer declares about its loss.

    Attributes:
        place: The function that computes it, for findings.
        smoothing: `label_smoothing_factor`; 0 for none.
        processes: The processes of the run.
        head: The module that makes the logits.
        foreign: The class of the trainer with a loss of its own, such as `ORPOTrainer`; empty for a loss of labels.
        answers: What the trainer declares of a loss of answers; None for another one.
        no_signs: Why the signs of answers are not known; empty if they are.
        unread: Why the decoder's output is not compared with the batch; empty if it is.
        prompt: The kind of prompt learning that the model has; empty for none.
        spell: Returns the text of a token by its id.
        step: The step, for findings.
    """

    place: str = "compute_loss"
    smoothing: float = 0.0
    processes: int = 1
    head: Any = None
    foreign: str = ""
    answers: AnswerLoss | None = None
    no_signs: str = ""
    unread: str = ""
    prompt: str = ""
    spell: Callable[[int], str] = str
    step: str = "the first step"

    @classmethod
    def of(cls, trainer: Any, model: Any, step: str) -> LossSettings:
        """Read them from a `transformers.Trainer`, and from its model without wrappers."""
        owners = [base for base in type(trainer).__mro__ if "compute_loss" in vars(base)]
        owner = owners[0] if owners else type(trainer)
        function = getattr(trainer, "compute_loss_func", None)
        tokenizer = getattr(trainer, "processing_class", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        # a trainer that is made from one with a loss of its own calls it
        known = ((base.__name__, owner_of_loss(base)) for base in owners)
        foreign, library = next(((name, library) for name, library in known if library is not None), ("", None))
        answers = None if library is None else library.answer_loss(foreign, vars(trainer.args))
        return cls(
            place="compute_loss_func" if function is not None else f"{owner.__name__}.compute_loss",
            smoothing=0.0 if foreign else float(getattr(trainer.args, "label_smoothing_factor", 0.0) or 0.0),
            processes=int(getattr(trainer.args, "world_size", 1)),
            head=model.get_output_embeddings(),
            foreign=foreign,
            answers=answers,
            no_signs=_no_signs(answers, trainer),
            unread=_unread(trainer, model),
            prompt=_prompt(model),
            spell=lambda token: _spelled(tokenizer, token),
            step=step,
        )

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any, step: str) -> LossSettings:
        """Return those of a loop that declares nothing, with a loss of labels."""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return cls(
            place="loss",
            head=model.get_output_embeddings(),
            unread=_unread(None, model),
            prompt=_prompt(model),
            spell=lambda token: _spelled(tokenizer, token),
            step=step,
        )


def moves_in_backward(args: Any) -> str:
    """Return the name of an optimizer that moves weights in the backward pass; empty for another one.

    Args:
        args: The `TrainingArguments`; None if there are none.
    """
    optimizer = getattr(args, "optim", "")
    name = str(getattr(optimizer, "value", optimizer))
    return name if "lomo" in name or "layerwise" in name else ""


def _unread(trainer: Any, model: Any) -> str:
    """Return why the decoder's output does not show the loss of each token of a batch; empty if it does."""
    if isinstance(getattr(trainer, "model_wrapped", None), torch.nn.DataParallel):
        return "DataParallel divides the batch among copies of the model"
    if optimizer := moves_in_backward(getattr(trainer, "args", None)):
        return f"the optimizer {optimizer} moves weights in the backward pass"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "cut_cross_entropy" in getattr(base.forward, "__module__", ""):
        return "cut-cross-entropy drops the gradient of sure tokens"
    return ""


def _prompt(model: Any) -> str:
    """Return the kind of prompt learning that a model has; empty for none."""
    adapters = (getattr(model, "peft_config", None) or {}).values()
    return next((each.peft_type.value for each in adapters if getattr(each, "is_prompt_learning", False)), "")


def _no_signs(answers: AnswerLoss | None, trainer: Any) -> str:
    """Return why it is not known which answers a loss raises; empty if it is, or if there is none of answers."""
    if answers is None:
        return ""
    if not answers.has_signs:
        return f"signs: a loss of the type {answers.types} may lower a chosen answer, or raise a rejected one"
    # what others add to the loss may turn when the model has learned
    is_first = getattr(getattr(trainer, "state", None), "global_step", 0) == 0
    own = type(trainer).__name__
    return "" if is_first or own == answers.name else f"signs: {own} may change the loss of {answers.name}"


def _spelled(tokenizer: Any, token: int) -> str:
    texts = tokenizer.convert_ids_to_tokens([token]) if hasattr(tokenizer, "convert_ids_to_tokens") else [None]
    return f"token {token}" if not isinstance(texts[0], str) else f"{texts[0]!r} ({token})"


def columns_of(batch: Any) -> dict[str, torch.Tensor]:
    """Return copies of the columns of a batch that have a value for each token: `compute_loss` may change the batch.

    Args:
        batch: The batch, as `compute_loss` gets it.

    Returns:
        The columns by name, on the CPU; empty if the batch has no `input_ids` of the shape `(batch, length)`.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return {}
    return {
        str(name): values.detach().to("cpu", copy=True)
        for name, values in batch.items()
        if isinstance(values, torch.Tensor) and values.shape == ids.shape
    }


def judge_loss(call: LossCall, settings: LossSettings) -> Result:
    """Compare what a step trains for with the labels of its batch.

    Args:
        call: The call, after its backward pass.
        settings: What the trainer declares.
    """
    call = call.with_answers(settings.answers)
    if reason := _not_comparable(call, settings):
        return Result(not_checked=reason)
    comparison = _Comparison(call, settings)
    reason = why_no_directions(settings.head)
    return comparison.of_positions(reason) if reason else comparison.result()


def _not_comparable(call: LossCall, settings: LossSettings) -> str:
    """Return why the step cannot be compared; empty if it can."""
    if settings.unread:
        return settings.unread
    labels = call.columns.get("labels")
    if settings.foreign and call.sides is None:
        return f"{settings.foreign} computes a loss of its own, which is not that of labels"
    if labels is None:
        return "the batch has no `labels` of the shape of its `input_ids`: its loss is another one"
    if "shift_labels" in call.columns and settings.processes > 1:
        return "the labels of the batch are split among processes"
    if not bool((labels[:, 1:] != IGNORE_INDEX).any()):
        return "no token of the first batch has a label"
    if len(call.hidden) != 1:
        number = len(call.hidden) or "no"
        return f"{settings.place} made {number} calls of the model's decoder with a gradient, not one"
    if call.hidden[0].shape[:2] != labels.shape:
        if settings.prompt:
            return f"{settings.prompt} adds tokens that are not in the batch"
        return f"the decoder's output is {tuple(call.hidden[0].shape[:2])} tokens, and the labels {tuple(labels.shape)}"
    gradient = call.gradients[0]
    if gradient is not None and not bool(gradient.isfinite().all()):
        return f"the gradient of {settings.step} is not finite"
    return ""


def _ahead(values: torch.Tensor, by: int, fill: int = 0) -> torch.Tensor:
    """Return what stands `by` places further on in each row, or before if it is negative; `fill` outside of the row."""
    if by < 0:
        return torch.nn.functional.pad(values[:, :by], (-by, 0), value=fill)
    return torch.nn.functional.pad(values[:, by:], (0, by), value=fill)


@dataclass(frozen=True)
class _Positions:
    """Some positions of a batch, with what their gradients show of one token each.

    Attributes:
        at: Their rows and places, `(positions, 2)` int64.
        tokens: The token of each, `(positions,)` int64.
        shown: What the gradients show of it.
    """

    at: torch.Tensor
    tokens: torch.Tensor
    shown: Directions

    def __len__(self) -> int:
        return len(self.at)

    def where(self, mask: torch.Tensor) -> _Positions:
        """Return those of a mask, `(positions,)` bool."""
        return _Positions(self.at[mask], self.tokens[mask], self.shown.where(mask))


@dataclass(frozen=True)
class _Comparison:
    """What the gradient of a step shows, beside the labels of its batch."""

    call: LossCall
    settings: LossSettings

    @property
    def _ids(self) -> torch.Tensor:
        return self.call.columns["input_ids"].clamp(min=0)

    @cached_property
    def _wanted(self) -> torch.Tensor:
        """The label that each place is to produce, `(batch, length)`; `IGNORE_INDEX` where it has none."""
        return _ahead(self.call.columns["labels"], 1, IGNORE_INDEX)

    @cached_property
    def _gradient(self) -> torch.Tensor:
        gradient = self.call.gradients[0]
        return torch.zeros_like(self.call.hidden[0]) if gradient is None else gradient

    @cached_property
    def _is_trained(self) -> torch.Tensor:
        """Where the step has a loss that is compared, `(batch, length)` bool."""
        is_trained = trained_positions(self._gradient)
        return is_trained if self.call.left_out is None else is_trained & ~self.call.left_out

    @property
    def _precision(self) -> torch.dtype:
        return self.call.precision if self.call.precision in EXACT else torch.bfloat16

    def _bound(self, bounds: Mapping[torch.dtype, float]) -> float:
        return bounds[self._precision]

    def _pulls(self, at: torch.Tensor, tokens: torch.Tensor) -> _Positions:
        """Return what the gradients at some places show of a token each, whatever the sign of their row is."""
        rows, places = (index.to(self._gradient.device) for index in at.unbind(-1))
        hidden, gradient = self.call.hidden[0][rows, places], self._gradient[rows, places]
        return _Positions(at, tokens, directions(self.settings.head, hidden, gradient, tokens, self.settings.smoothing))

    def _signed(self, pulls: _Positions) -> _Positions:
        """Return what gradients show if each is multiplied by the sign of its row."""
        signs, shown = self._signs[pulls.at[:, 0]], pulls.shown
        return replace(pulls, shown=replace(shown, cosines=shown.cosines * signs, weights=shown.weights * signs))

    def _at(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the rows and places of a mask, `(positions, 2)` int64; at most `_MOST`."""
        at = mask.nonzero()
        return at if len(at) <= _MOST else at[torch.linspace(0, len(at) - 1, _MOST).long()]

    def _look(self, mask: torch.Tensor, tokens: torch.Tensor) -> _Positions:
        """Return what the gradients at a mask show of these tokens, `(batch, length)`; at most `_MOST`."""
        at = self._at(mask)
        return self._signed(self._pulls(at, tokens[at[:, 0], at[:, 1]]))

    @cached_property
    def _pulled(self) -> _Positions:
        """Positions with a label that have a gradient, with the label, whatever the sign of their row is."""
        at = self._at(self._has_label & self._is_trained)
        return self._pulls(at, self._wanted[at[:, 0], at[:, 1]])

    @cached_property
    def _is_clear(self) -> torch.Tensor:
        """Which of these have a label that a direction can prove, `(positions,)` bool."""
        return self._pulled.shown.prove(self._precision)

    @cached_property
    def _signs(self) -> torch.Tensor:
        """Whether the step raises the labels of a row, or lowers them: 1 or -1, `(batch,)` float32.

        All labels are to be raised. An answer has the sign of most of its tokens, or if none tells, the one that it
        should have.
        """
        sides = self.call.sides
        if sides is None:
            return torch.ones(len(self._wanted))
        cosines, rows = self._pulled.shown.cosines, self._pulled.at[:, 0]
        is_exact = self._is_clear & (cosines.abs() >= self._bound(EXACT))
        found = torch.zeros(len(self._wanted)).index_add_(0, rows[is_exact], cosines[is_exact]).sign()
        return torch.where(found == 0, sides.are_wanted.float() * 2 - 1, found)

    def _proven(self, seen: _Positions) -> torch.Tensor:
        """Return at which positions the gradient is that of the token, `(positions,)` bool."""
        return (seen.shown.cosines >= self._bound(EXACT)) & seen.shown.prove(self._precision)

    def _other_targets(self, seen: _Positions) -> _Positions:
        """Return those of the positions whose gradient has the direction of another token, with this token."""
        if not len(seen):
            return seen
        rows, places = (index.to(self._gradient.device) for index in seen.at.unbind(-1))
        signs = self._signs.to(rows.device)[rows, None]
        targets = likeliest_targets(self.settings.head, self._gradient[rows, places] * signs)
        tried = [self._signed(self._pulls(seen.at, tokens)) for tokens in targets.unbind(-1)]
        best = torch.stack([each.shown.cosines for each in tried]).argmax(0)
        found = _Positions(
            seen.at,
            targets.gather(-1, best[:, None])[:, 0],
            Directions(
                *(
                    torch.stack([getattr(each.shown, name) for each in tried]).gather(0, best[None])[0]
                    for name in Directions.__slots__
                )
            ),
        )
        return found.where((found.shown.cosines >= self._bound(EXACT)) & (found.tokens != seen.tokens))

    @cached_property
    def _has_label(self) -> torch.Tensor:
        """Which positions are to produce a label, `(batch, length)` bool."""
        return self._wanted != IGNORE_INDEX

    @cached_property
    def _labelled(self) -> _Positions:
        """Positions with a label that have a gradient, with the label."""
        return self._signed(self._pulled)

    @cached_property
    def _is_exact(self) -> torch.Tensor:
        """Which of them are trained to produce their label, `(positions,)` bool."""
        return self._is_clear & (self._labelled.shown.cosines >= self._bound(EXACT))

    @cached_property
    def _exact(self) -> _Positions:
        return self._labelled.where(self._is_exact)

    @cached_property
    def _elsewhere(self) -> _Positions:
        """Positions with a label whose gradient has the direction of another token, with this token."""
        return self._other_targets(self._labelled.where(~self._is_exact & (self._is_clear | (len(self._exact) == 0))))

    @cached_property
    def _following(self) -> _Positions:
        """Positions without a label that have a gradient, with the next token."""
        return self._look(~self._has_label & self._is_trained, _ahead(self._ids, 1))

    @cached_property
    def _others(self) -> _Positions:
        """Those of them whose gradient has the direction of another token than the next one, with this token."""
        return self._other_targets(self._following.where(~self._proven(self._following)))

    def of_positions(self, reason: str) -> Result:
        """Return what the positions with a gradient show by themselves.

        Args:
            reason: Why the tokens that they are trained to produce cannot be told.
        """
        outside = ~self._has_label & self._is_trained
        for weights in self._weights():
            outside &= weights == 0
        findings = []
        if count := int(outside.sum()):
            row, place = outside.nonzero()[0].tolist()
            first = self._token(row, place, int(_ahead(self._ids, 1)[row, place]))
            text = f"a loss reaches {counted(count, 'position')} {self._outside}: the first is {first}"
            expected = "no gradient there, or a column of weights"
            findings.append(Finding("ML327", text, Place.of(self.settings.place), expected))
        facts = (("labels", int(self._has_label.sum())), ("positions with a gradient", int(self._is_trained.sum())))
        return Result(tuple(findings), not_checked="" if findings else f"tokens: {reason}", facts=facts)

    def result(self) -> Result:
        """Return the findings, or why nothing can be said."""
        facts = (
            ("labels", int(self._has_label.sum())),
            ("positions with a gradient", int(self._is_trained.sum())),
            ("compared", int(self._is_clear.sum())),
        )
        if self.call.sides is not None and not bool(self._is_trained.any()):
            return Result(not_checked="no answer of the first batch has a gradient", facts=facts)
        shift = self._shift()
        errors = [self._error(f"trains on {shift}", self._of_target(self._elsewhere))] if shift else [*self._errors()]
        findings = errors or [*self._notes()]
        return Result(tuple(findings), not_checked="" if findings else self._unknown(), facts=facts)

    def _unknown(self) -> str:
        """Return what is not known of a step without a finding; empty if nothing."""
        compared = int(self._is_clear.sum())
        if unclear := compared - len(self._exact):
            count = counted(compared, f"compared {self._noun}")
            return f"the gradient of {unclear} of {count} is not that of one token, as in a distillation"
        if len(self._labelled) and not compared:
            return f"tokens: the model is too sure of each {self._noun} for its direction to be told"
        return self.settings.no_signs

    @property
    def _noun(self) -> str:
        """What a token that is to be trained on is called."""
        return "label" if self.call.sides is None else "answer token"

    @property
    def _outside(self) -> str:
        return "without a label" if self.call.sides is None else "outside of the answers"

    def _shift(self) -> str:
        """Return the name of the labels if the tokens that are trained for stand elsewhere in the row; else empty."""
        elsewhere, others = self._elsewhere, self._others
        if not len(elsewhere) or 2 * len(elsewhere) < len(self._labelled) - len(self._exact):
            return ""
        at, tokens = torch.cat([elsewhere.at, others.at]), torch.cat([elsewhere.tokens, others.tokens])
        for by, name in _SHIFTS.items():
            there = _ahead(self._ids, by, -1)[at[:, 0], at[:, 1]]
            # as many tokens of the row prove what the direction of each may not
            if 4 * int((there == tokens).sum()) >= 3 * len(tokens):
                return name
        return ""

    def _errors(self) -> Iterator[Finding]:
        trained = self._following.where(self._proven(self._following) & self._weigh_as(self._following, self._exact))
        trained = trained.where(~self._is_declared(trained))
        constant = self._others.where(self._proven(self._others) & ~self._is_declared(self._others))
        constant = constant.where(self._weigh_as(constant, self._exact))
        lacks = self._has_label & ~self._is_trained & self._is_used[:, None]
        lacking = self._look(lacks, self._wanted)
        lacking = lacking.where(1 - lacking.shown.probabilities > CERTAIN)
        if self.call.precision == torch.float16:  # its numbers end at 2**-24
            lacking = lacking.where(torch.zeros(len(lacking), dtype=torch.bool))
        labels = counted(int(self._has_label.sum()), self._noun)
        is_labelled = self.call.columns["labels"] != IGNORE_INDEX
        if (
            len(trained)
            and len(lacking)
            and torch.equal(self._is_trained[self._is_used, :-1], is_labelled[self._is_used, :-1])
        ):
            yield self._error(f"trains on the mask of the {self._noun}s, not shifted", self._of_next(trained))
            return
        if len(trained) and not (len(constant) and set(trained.tokens.tolist()) <= set(constant.tokens.tolist())):
            yield self._error(f"trains on {self._kind(trained)} {self._outside}", self._of_next(trained))
        if len(constant):
            yield self._error(
                f"trains for {counted(len(constant), 'token')} {self._outside}", self._of_target(constant)
            )
        sides = self.call.sides
        if sides is not None and not self.settings.no_signs and len(swapped := self._swapped(sides)):
            are_wanted = [bool(sides.are_wanted[row]) for row in set(swapped.at[:, 0].tolist())]
            counts = zip(("lowers", "raises"), sides.names, (True, False), strict=True)
            faults = [
                f"{verb} {counted(are_wanted.count(side), f'{name} answer')}"
                for verb, name, side in counts
                if side in are_wanted
            ]
            yield self._error(" and ".join(faults), self._of_next(swapped))
        # what pushes another token up pushes a sure label down, but not each with the same weight
        if len(avoided := self._avoided()):
            against = "to avoid" if self.call.sides is None else "against their answer"
            yield self._error(f"trains {against} {len(avoided)} of {labels}", self._of_next(avoided))
        elif len(elsewhere := self._with_weight(self._elsewhere.where(self._proven(self._elsewhere)))):
            count = f"{len(elsewhere)} of {labels}"
            yield self._error(f"trains for other tokens than {count}", self._of_target(elsewhere))
        if len(lacking):
            yield self._error(f"does not train on {int(lacks.sum())} of {labels}", self._of_next(lacking))

    @cached_property
    def _is_used(self) -> torch.Tensor:
        """Which rows are to have a loss of each label, `(batch,)` bool: a loss of answers may be zero for one.

        If no answer has a gradient, these are the rows whose prompts are trained on as answers are.
        """
        if self.call.sides is None:
            return torch.ones(len(self._wanted), dtype=torch.bool)
        is_used = (self._has_label & self._is_trained).any(-1)
        prompts = self._following.where(self._proven(self._following))
        if not bool(is_used.any()):
            is_used[prompts.where(self._weigh_as(prompts, prompts)).at[:, 0]] = True
        return is_used

    def _swapped(self, sides: BatchSides) -> _Positions:
        """Return the tokens of answers that are lowered and should be raised, or the other way round.

        A loss may lower both answers of each pair, the rejected one more. Where the model knows two tokens, what lowers
        one raises the other: only answers whose tokens have one weight tell their sign.
        """
        exact, is_raised = self._exact, self._signs > 0
        if 4 * len(exact) < 3 * int(self._is_clear.sum()) or not self._are_even(exact, _one(exact)):
            return exact.where(torch.zeros(len(exact), dtype=torch.bool))
        rows = torch.zeros_like(sides.are_wanted).index_fill_(0, exact.at[:, 0], True)
        is_wrong = is_raised != sides.are_wanted
        if sides.are_paired and bool((rows & ~is_raised & ~sides.are_wanted).any()):
            is_wrong &= is_raised
        return exact.where(is_wrong[exact.at[:, 0]])

    def _avoided(self) -> _Positions:
        """Return the positions that are trained to avoid their label, with the weight of the others.

        Another term of the loss may push a label down, but not each of them alike. An answer without an exact token has
        no sign that is known.
        """
        is_avoided = self._labelled.shown.cosines <= -self._bound(EXACT)
        if self.call.sides is not None:
            is_avoided &= torch.isin(self._labelled.at[:, 0], self._exact.at[:, 0])
        elif not len(self._exact) and not bool(is_avoided.all()):
            is_avoided = torch.zeros_like(is_avoided)
        return self._with_weight(self._labelled.where(is_avoided))

    def _with_weight(self, seen: _Positions) -> _Positions:
        """Return the positions that have the weight of the labels of their row.

        The sum of two terms of a loss may have any direction: with the exact ones they must explain most of the labels,
        and where none is exact, be most of all.
        """
        exact = self._exact
        alike = seen.where(self._weigh_as(seen, exact if len(exact) else seen))
        is_explained = 4 * (len(alike) + len(exact)) >= 3 * int(self._is_clear.sum())
        if not len(exact):
            is_explained &= 2 * len(alike) >= len(self._labelled) and len(alike) > 1
        return alike.where(torch.full((len(alike),), is_explained))

    def _notes(self) -> Iterator[Finding]:
        place = Place.of(self.settings.place)
        undeclared = self._following.where(~self._is_declared(self._following))
        if len(undeclared):
            count = counted(len(undeclared), "position")
            text = f"another term of the loss reaches {count} {self._outside}: {self._of_next(undeclared)}"
            yield Finding("ML327", text, place, "no gradient there, or a column of weights")
        elif spread := self._spread():
            text = f"the {self._noun}s of a row weigh differently in the loss of {self.settings.step}: {spread}"
            yield Finding("ML327", text, place, "one weight, or a column of weights")

    def _weigh_as(self, seen: _Positions, exact: _Positions) -> torch.Tensor:
        """Return which positions have the weight of the labels of their row, `(positions,)` bool.

        A row without a label is compared with the others. If the labels have several weights, these may be multiplied
        by the probability of the token (dynamic fine-tuning).
        """
        share = _one if self._are_even(exact, _one(exact)) else _probability
        known, own = exact.shown.weights.abs() / share(exact), seen.shown.weights.abs() / share(seen)
        same = torch.zeros(len(seen), dtype=torch.bool)
        for number, row in enumerate(seen.at[:, 0]):
            beside = known[exact.at[:, 0] == row]
            beside = beside if len(beside) else known
            same[number] = len(beside) > 0 and self._are_equal(torch.cat([beside, own[number : number + 1]]))
        return same

    def _are_even(self, seen: _Positions, share: torch.Tensor) -> bool:
        """Return whether the positions of each row have one weight, but for a factor of each."""
        weights, rows = seen.shown.weights.abs() / share, seen.at[:, 0]
        return all(self._are_equal(weights[rows == row]) for row in set(rows.tolist()))

    def _are_equal(self, weights: torch.Tensor) -> bool:
        return 0 < float(weights.max()) <= float(weights.min()) * (1 + 2 * self._bound(EQUAL))

    def _weights(self) -> Iterator[torch.Tensor]:
        """Yield the columns of the batch that weigh tokens with and without a label, at the place that predicts them.

        A column of zeros and ones that has one for other tokens, too, is a mask, and no weight of a prompt.
        """
        is_labelled = self.call.columns["labels"] != IGNORE_INDEX
        for name, values in self.call.columns.items():
            weights = values.double()
            if (
                name in _NOT_WEIGHTS
                or not bool(weights.isfinite().all())
                or not bool((weights[is_labelled] != 0).all())
            ):
                continue
            is_mask = bool(((weights == 0) | (weights == 1)).all())
            if not is_mask or torch.equal(weights != 0, is_labelled):
                yield _ahead(weights, 1)

    def _is_declared(self, seen: _Positions) -> torch.Tensor:
        """Return which positions a column of weights gives a loss, `(positions,)` bool."""
        found = torch.zeros(len(seen), dtype=torch.bool)
        for weights in self._weights():
            found |= weights[seen.at[:, 0], seen.at[:, 1]] != 0
        return found

    def _spread(self) -> str:
        """Return the least weight of the labels of a row, if nothing declares that they differ."""
        exact, rows = self._exact, self._exact.at[:, 0]
        declared = [weights[rows, exact.at[:, 1]].float() for weights in self._weights()]
        if any(self._are_even(exact, share) for share in (_one(exact), _probability(exact), *declared)):
            return ""
        shares = [float((own := exact.shown.weights[rows == row]).min() / own.max()) for row in set(rows.tolist())]
        return f"from {min(shares):.3g} to 1 of the largest"

    def _kind(self, trained: _Positions) -> str:
        """Return the tokens that are trained on in words: padding, each token, or their number."""
        mask = self.call.columns.get("attention_mask")
        count = counted(int((~self._has_label & self._is_trained).sum()), "token")
        rows, places = trained.at[:, 0], trained.at[:, 1] + 1
        if mask is not None and not bool(mask[rows, places].any()):
            return f"the padding, {count}"
        is_text = torch.ones_like(self._has_label) if mask is None else mask != 0
        others = (~self._has_label & _ahead(is_text.long(), 1).bool())[:, :-1]
        return f"every token, the prompt included: {count}" if bool(self._is_trained[:, :-1][others].all()) else count

    def _of_next(self, seen: _Positions) -> str:
        return f"the first is {self._token(*next(_each(seen)))}"

    def _of_target(self, seen: _Positions) -> str:
        row, place, token = next(_each(seen))
        wanted = int(self._wanted[row, place])
        label = f"no {self._noun}" if wanted == IGNORE_INDEX else f"the {self._noun} {self.settings.spell(wanted)}"
        return f"the first is {self._token(row, place, token)}, which has {label}"

    def _token(self, row: int, place: int, token: int) -> str:
        words = f"row {row}" if self.call.sides is None else self.call.sides.row(row)
        return f"{self.settings.spell(token)} at {words}, token {place + 1}"

    def _error(self, fault: str, first: str) -> Finding:
        count = counted(int(self._has_label.sum()), "token")
        which = "with a label" if self.call.sides is None else "of the answers"
        expected = f"a loss of the {count} {which}, each predicted from the tokens before it"
        return Finding("ML326", f"{self.settings.step} {fault}: {first}", Place.of(self.settings.place), expected)


def _one(seen: _Positions) -> torch.Tensor:
    return torch.ones(len(seen))


def _probability(seen: _Positions) -> torch.Tensor:
    return seen.shown.probabilities.clamp(min=torch.finfo(torch.float32).tiny)


def _each(seen: _Positions) -> Iterator[tuple[int, int, int]]:
    """Yield the row, the place and the token of each position."""
    for (row, place), token in zip(seen.at.tolist(), seen.tokens.tolist(), strict=True):
        yield row, place, token
