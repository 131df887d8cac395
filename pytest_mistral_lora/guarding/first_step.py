"""The first step of a run, watched: the call of `compute_loss`, and the call of the model in it.

Nothing is computed twice: the batch, the logits and the loss are those of the run itself. A process watches its own
first step, and waits for no other process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import one_line
from pytest_mistral_lora.guarding.loss import LossCall, LossSettings, columns_of, has_token_losses, judge_loss
from pytest_mistral_lora.guarding.packing import arguments_of, judge_call

_PARAMETERS = ("model", "inputs", "return_outputs", "num_items_in_batch")
"""The parameters of `Trainer.compute_loss`."""

LOSS, PACKING = "first-loss", "packed-as-unpacked"
"""The checks of the first step."""

WAITING = {case: Result(not_checked="the run has not come to its first step") for case in (LOSS, PACKING)}
"""The results before the first step."""


class FirstStepWatch:
    """Watches the first step of a run, and reports its results before the optimizer moves a weight.

    While it waits, it stands in the trainer's place of `compute_loss`, and before the decoder of the model. It leaves
    both at the first call in training, and returns what the trainer's `compute_loss` returns.
    """

    def __init__(self, args: Any, model: Any, trainer: Any, report: Callable[[Mapping[str, Result]], None]) -> None:
        """Begin to watch.

        Args:
            args: The `TrainingArguments`.
            model: The model, without wrappers.
            trainer: The trainer; None if it is unknown, and the loss cannot be watched.
            report: Gets the result of each check, once.
        """
        self._trainer, self._report = trainer, report
        self._results = dict(WAITING)
        self._is_over = False
        self._own = self._put_in_place()
        self._hook = self._hooked(args, model)

    def _put_in_place(self) -> Any:
        """Stand in the place of the trainer's `compute_loss`, and return what stood there."""
        if self._trainer is None:
            self._results[LOSS] = Result(not_checked="the guard knows no trainer: call guard(trainer)")
            return None
        own = getattr(self._trainer, "compute_loss", None)
        if own is None:
            reason = f"the {type(self._trainer).__name__} has no compute_loss"
            self._results[LOSS] = Result(not_checked=reason)
            return None
        self._stand_in = _StandIn(own, self._compute_loss)
        self._before = vars(self._trainer).get("compute_loss")
        self._trainer.compute_loss = self._stand_in
        return own

    def _hooked(self, args: Any, model: Any) -> Any:
        """Watch the first call of the decoder, which makes the mask of packed rows."""
        if getattr(args, "torch_compile", False):
            self._results[PACKING] = Result(not_checked="a compiled model is not watched")
            return None
        try:
            decoder = model.get_decoder()
            return decoder.register_forward_pre_hook(self._take_call, with_kwargs=True)
        except Exception as error:  # a model of a kind that is not known
            self._results[PACKING] = _failed(error)
            return None

    def _take_call(self, decoder: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not decoder.training:
            return
        self._unhook()
        self._results[PACKING] = _attempted(lambda: judge_call(decoder, arguments_of(decoder, given, named)))

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _compute_loss(self, *given: Any, **named: Any) -> Any:
        model = given[0] if given else named.get("model")
        if self._is_over or not getattr(model, "training", True):
            return self._own(*given, **named)
        self._leave_place()
        call = {**dict(zip(_PARAMETERS, given, strict=False)), **named}
        batch = call.get("inputs")
        columns = _attempted_columns(batch)
        try:
            with _watched(model) as outputs:
                returned = self._own(*given, **named)
        except BaseException:
            self.leave()
            raise
        loss = returned[0] if isinstance(returned, tuple) else returned
        self._results[LOSS] = _attempted(lambda: self._judged(loss, columns, call, batch, outputs))
        self.end()
        return returned

    def _judged(
        self, loss: Any, columns: dict[str, Any], call: Mapping[str, Any], batch: Any, outputs: list[tuple[Any, Any]]
    ) -> Result:
        if not isinstance(batch, Mapping):
            return Result(not_checked=f"the batch of compute_loss is a {type(batch).__name__}, not a mapping")
        settings = LossSettings.of(self._trainer)
        if batch.get("shift_labels") is not None and settings.processes > 1:
            return Result(not_checked="the labels of the batch are split among processes")
        output, labels = outputs[0] if outputs else (None, None)
        items = call.get("num_items_in_batch")
        number = None if items is None else float(items)
        seen = LossCall(columns, loss, number, output, None if labels is None else labels.detach().cpu())
        return judge_loss(seen, settings)

    def _leave_place(self) -> None:
        """Give the trainer its `compute_loss` back."""
        if self._own is None or vars(self._trainer).get("compute_loss") is not self._stand_in:
            return
        if self._before is None:
            del self._trainer.compute_loss
        else:
            self._trainer.compute_loss = self._before

    def end(self) -> None:
        """Stop watching, and report what was found, unless that was done before.

        Raises:
            GuardError: If the guard stops the run.
        """
        if self._is_over:
            return
        self.leave()
        if self._own is not None and self._results[LOSS] is WAITING[LOSS]:
            self._results[LOSS] = Result(not_checked="the first step did not call the trainer's compute_loss")
        if self._results[PACKING] is WAITING[PACKING]:
            self._results[PACKING] = Result(not_checked="the first step did not call the model's decoder")
        self._report(self._results)

    def leave(self) -> None:
        """Stop watching."""
        self._is_over = True
        self._leave_place()
        self._unhook()


class _StandIn:
    """Stands in the place of a trainer's `compute_loss`; a copy of the trainer, or a pickled one, has the method."""

    def __init__(self, own: Any, watched: Callable[..., Any]) -> None:
        self._own, self._watched = own, watched
        functools.update_wrapper(self, own)  # who asks for the signature gets the method's

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._watched(*given, **named)

    def __reduce__(self) -> Any:
        return _same, (self._own,)


def _same(value: Any) -> Any:
    return value


def _attempted_columns(batch: Any) -> dict[str, Any]:
    try:
        return columns_of(batch)
    except Exception:  # the check then says that there are no labels
        return {}


@contextmanager
def _watched(model: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Yield a list that gets the first output of the model with losses of tokens, and the labels that the model got.

    An output with a gradient goes before one without: a call without is a look at the model, as for a distillation.
    """
    found: list[tuple[Any, Any]] = []
    best = -1

    def take(module: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        # one with logits first: a trainer may call a fused head only for figures, if the loss has a function of its own
        nonlocal best
        worth = (1 + torch.is_grad_enabled()) if has_token_losses(output) else 0
        if worth > best:
            best = worth
            found[:] = [(output, named.get("labels"))]

    hook = model.register_forward_hook(take, with_kwargs=True) if hasattr(model, "register_forward_hook") else None
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()


def _attempted(judge: Callable[[], Result]) -> Result:
    """Return a result; a check that fails must not end the run."""
    try:
        return judge()
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> Result:
    return Result(not_checked=f"{type(error).__name__}: {one_line(error)}")


def calling_trainer(callback: Any) -> Any:
    """Return the trainer that calls this callback; None if none does.

    A trainer does not pass itself to its callbacks, so it is looked for among the callers.

    Args:
        callback: A callback of the trainer.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if hasattr(type(trainer), "compute_loss"):
            callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
            if any(each is callback for each in callbacks):
                return trainer
        frame = frame.f_back
    return None
