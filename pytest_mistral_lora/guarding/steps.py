"""The steps of a run, watched: the batch of `compute_loss`, and the decoder's output with its gradient.

Nothing is computed twice: they are those of the run itself, and are judged before the optimizer moves a weight.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import torch

from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import one_line
from pytest_mistral_lora.guarding.loss import LossCall, LossSettings, columns_of, judge_loss
from pytest_mistral_lora.guarding.packing import arguments_of, judge_call
from pytest_mistral_lora.guarding.preferences import BatchSides
from pytest_mistral_lora.guarding.witness import trained_positions

_PARAMETERS = ("model", "inputs", "return_outputs", "num_items_in_batch")
"""The parameters of `Trainer.compute_loss`."""

LOSS, PACKING = "first-loss", "packed-as-unpacked"
"""The checks of a step."""

WAITING = {case: Result(not_checked="the run has not come to its first step") for case in (LOSS, PACKING)}
"""The results before the first step."""


class StepWatch:
    """Watches the decoder of a model: the batch of a step that is judged, and the decoder's output with its gradient.

    It stands behind the decoder from before the first step on: a compiled model calls no hook that comes later. Hooks
    only record, and only in a step that is to be judged.

    Attributes:
        why_no_batch: Why a step that was judged has shown no batch.
        seen: The columns of the batch of the step that was judged last, and the positions that have a gradient,
            `(batch, length)` bool; None if the batch has no labels of its own, or its gradient was not seen.
    """

    why_no_batch = "the step did not call the model with a batch"

    def __init__(self, model: Any, settings: Callable[[str], LossSettings], *, is_compiled: bool = False) -> None:
        """Begin to watch.

        Args:
            model: The model, without wrappers.
            settings: Returns what is declared about the loss of a step, by the name of the step.
            is_compiled: Whether the model is compiled, and calls no hooks.
        """
        self._model, self._settings = model, settings
        self._results = dict(WAITING)
        self._is_judged = self._records = False
        self._name = ""
        self.seen: tuple[Mapping[str, torch.Tensor], torch.Tensor] | None = None
        self._forget()
        self._hook = self._hooked(is_compiled=is_compiled)

    def _forget(self) -> None:
        self._columns: dict[str, torch.Tensor] = {}
        self._sides: BatchSides | None = None
        self._batch: Any = None
        self._hidden: list[torch.Tensor] = []
        self._gradients: dict[int, torch.Tensor] = {}
        self._dtypes: set[torch.dtype] = set()

    def _hooked(self, *, is_compiled: bool) -> Any:
        """Watch the calls of the decoder: their arguments, and what they return with its gradient."""
        if is_compiled:
            self._results |= dict.fromkeys(WAITING, Result(not_checked="a compiled model is not watched"))
            return None
        try:
            decoder = self._model.get_decoder()
            return decoder.register_forward_hook(self._take_call, with_kwargs=True)
        except Exception as error:  # a model of a kind that is not known
            self._results |= dict.fromkeys(WAITING, _failed(error))
            return None

    def begin_step(self, *, is_judged: bool, name: str = "the first step") -> None:
        """Begin a step; the gradient of its first batch is recorded if it is to be judged.

        Args:
            is_judged: Whether it is.
            name: The step, for findings.
        """
        self._forget()
        self._is_judged, self._name = is_judged, name

    def begin_batch(self, batch: Any) -> None:
        """Record the calls of the decoder until `end_batch`, if this is the first batch of a step that is judged.

        Args:
            batch: The batch, with its labels.
        """
        if self._is_judged and self._batch is None:
            self._batch = batch
            with suppress(Exception):  # the check then says that there are no labels
                self._columns = columns_of(batch)
                self._sides = BatchSides.of(batch) if self._columns else None
            self._records = True

    def end_batch(self) -> None:
        """Record no more calls."""
        self._records = False

    def _take_call(self, decoder: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if not decoder.training:
            return
        if self._results[PACKING] is WAITING[PACKING]:
            self._results[PACKING] = _attempted(lambda: judge_call(decoder, arguments_of(decoder, given, named)))
        if self._records:
            try:
                self._take_output(output)
            except Exception as error:  # an error in a hook would end the run
                self._results[LOSS] = _failed(error)

    def _take_output(self, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, torch.Tensor):
            return
        if torch.is_grad_enabled() and not hidden.requires_grad and self._trains_head_alone():
            hidden.requires_grad_()
        # a call without a gradient is a look at the model, as for a distillation
        if hidden.requires_grad:
            number = len(self._hidden)
            self._hidden.append(hidden.detach())
            self._dtypes |= _dtypes_of(hidden)
            register_hook: Any = hidden.register_hook  # without types
            register_hook(partial(self._take_gradient, self._gradients, number))

    def _trains_head_alone(self) -> bool:
        """Return whether nothing below the head is trained: the decoder's output then has no gradient by itself."""
        head = self._model.get_output_embeddings()
        own = set() if head is None else {id(parameter) for parameter in head.parameters()}
        trained = {id(parameter) for parameter in self._model.parameters() if parameter.requires_grad}
        return bool(trained) and trained <= own

    @staticmethod
    def _take_gradient(gradients: dict[int, torch.Tensor], number: int, gradient: torch.Tensor) -> None:
        gradients[number] = gradient.detach()

    def results(self) -> Mapping[str, Result]:
        """Return the result of each check of a judged step: call it when the step has its gradients."""
        results = dict(self._results)
        if results[LOSS] is WAITING[LOSS]:
            results[LOSS] = Result(not_checked=self.why_no_batch) if self._batch is None else _attempted(self._judged)
        if results[PACKING] is WAITING[PACKING]:
            results[PACKING] = Result(not_checked="the step did not call the model's decoder")
        self.begin_step(is_judged=False)
        return results

    def _judged(self) -> Result:
        if not isinstance(self._batch, Mapping):
            return Result(not_checked=f"the batch is a {type(self._batch).__name__}, not a mapping")
        gradients = [self._gradients.get(number) for number in range(len(self._hidden))]
        if len(gradients) == 1 and gradients[0] is not None and "labels" in self._columns:
            trained = trained_positions(gradients[0])
            self.seen = (self._columns, trained) if trained.shape == self._columns["labels"].shape else None
        settings = self._settings(self._name)
        if isinstance(settings.head, torch.nn.Module):
            self._dtypes |= {parameter.dtype for parameter in settings.head.parameters()}
        floats = (dtype for dtype in self._dtypes if dtype.is_floating_point)
        precision = max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
        return judge_loss(LossCall(self._columns, self._hidden, gradients, precision, self._sides), settings)

    def leave(self) -> None:
        """Stop watching."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class TrainerWatch(StepWatch):
    """Watches the steps of a trainer: it stands in the place of `compute_loss`, and sees each batch of the training.

    Attributes:
        why_no_batches: Why no batch can be seen; empty if they can.
    """

    why_no_batch = "the step did not call the trainer's compute_loss"

    def __init__(self, args: Any, model: Any, trainer: Any, take: Callable[[Any], None]) -> None:
        """Begin to watch.

        Args:
            args: The `TrainingArguments`.
            model: The model, without wrappers.
            trainer: The trainer; None if it is unknown, and the loss cannot be watched.
            take: Called with each batch of the training, before the model gets it.
        """
        self._trainer, self._take = trainer, take
        self._is_inside = False
        self.why_no_batches = ""
        super().__init__(
            model, partial(LossSettings.of, trainer, model), is_compiled=bool(getattr(args, "torch_compile", False))
        )
        self._own = self._put_in_place()

    def _put_in_place(self) -> Any:
        """Stand in the place of the trainer's `compute_loss`, and return what stood there."""
        own = getattr(self._trainer, "compute_loss", None)
        if self._trainer is None:
            self.why_no_batches = "the guard knows no trainer: call guard(trainer)"
        elif own is None:
            self.why_no_batches = f"the {type(self._trainer).__name__} has no compute_loss"
        if own is None:
            self._results[LOSS] = Result(not_checked=self.why_no_batches)
            return None
        self._stand_in = _StandIn(own, self._compute_loss)
        self._before = vars(self._trainer).get("compute_loss")
        self._trainer.compute_loss = self._stand_in
        return own

    def _compute_loss(self, *given: Any, **named: Any) -> Any:
        model = given[0] if given else named.get("model")
        if self._is_inside or not getattr(model, "training", True):
            return self._own(*given, **named)
        self._is_inside = True
        batch = {**dict(zip(_PARAMETERS, given, strict=False)), **named}.get("inputs")
        try:
            self._take(batch)
            self.begin_batch(batch)
            return self._own(*given, **named)
        except BaseException:
            self.leave()
            raise
        finally:
            self._is_inside = False
            self.end_batch()

    def leave(self) -> None:
        """Stop watching, and give the trainer its `compute_loss` back."""
        if self._own is not None and vars(self._trainer).get("compute_loss") is self._stand_in:
            if self._before is None:
                del self._trainer.compute_loss
            else:
                self._trainer.compute_loss = self._before
        super().leave()


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


def _dtypes_of(hidden: torch.Tensor) -> set[torch.dtype]:
    """Return the dtypes of a step at the output of the decoder; the one with the fewest digits decides."""
    device = hidden.device.type
    return {hidden.dtype, *([torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else [])}


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
