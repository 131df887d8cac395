"""`guard(trainer)` and `MistralGuard`: stop a run, or warn, before the first step of any trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from pytest_mistral_lora.chat.objective import Declaration
from pytest_mistral_lora.errors import GuardError, InputError
from pytest_mistral_lora.guarding.batches import RaisedError, without_new_loaders
from pytest_mistral_lora.guarding.loop import LoopWatch
from pytest_mistral_lora.guarding.loss import moves_in_backward
from pytest_mistral_lora.guarding.processes import log_crash
from pytest_mistral_lora.guarding.run_judge import RunJudge
from pytest_mistral_lora.guarding.settings import GuardSettings, OnFinding
from pytest_mistral_lora.guarding.steps import calling_trainer
from pytest_mistral_lora.judging import AnyTokenizer, Verdict


class MistralGuard(TrainerCallback):
    """Judges the first batches of a run, its model and its tokenizer before the first step.

    Give it to a trainer by `callbacks=[MistralGuard()]`, or call `guard(trainer)`, which also knows the trainer's
    dataset with the messages of the rows. The loss of the first step and the call of the model in it are judged in that
    step, before the optimizer moves a weight.

    The batches of a dataset in memory are made before the first step, by the trainer's own collator and a copy of its
    sampler: the run draws the same batches as without the guard. Each is compared with the one that the model gets.
    Batches that cannot be made so, such as those of a stream (an `IterableDataset`) or of a collator of your own, are
    judged one by one as the model gets them, each before its own gradient.

    Args:
        tokenizer: The Mistral tokenizer, as for `audit`: a path or a name, or a tokenizer in memory. None for the
            trainer's `processing_class`, by its files or by its vocabulary.
        objective: The objective by which the labels are judged, such as `last-answer`, as for `judge`.
        batches: The number of first batches, each of which is judged or compared with one that was. The rest of the
            epoch is judged before the first step if its rows are in memory, for ten seconds at most.
        every: One later step in so many is judged, by its first batch and its gradient. None measures how many: they
            take less than 0.5 % of the time of the run.
        on_finding: `stop` raises `GuardError` before a weight moves. `warn` logs the verdict, writes it to
            `mistral-guard.json` and `mistral-guard.html` in the output folder, and lets the run go on.
        rules: As for `judge`.

    Raises:
        InputError: If an argument has another value, or the tokenizer is not there.

    Example:
        >>> from pytest_mistral_lora import MistralGuard
        >>> MistralGuard(tokenizer="spm-v3", batches=2, on_finding="warn").verdict is None
        True
    """

    def __init__(
        self,
        *,
        tokenizer: AnyTokenizer | None = None,
        objective: str | None = None,
        batches: int = 8,
        every: int | None = None,
        on_finding: OnFinding = "stop",
        rules: str | None = None,
    ) -> None:
        self._settings = GuardSettings.given(tokenizer, objective, batches, every, on_finding, rules)
        self._trainer: Any = None
        self._judge: RunJudge | None = None

    def use_trainer(self, trainer: Any) -> None:
        """Take the messages of the rows from the dataset that a trainer has when its run begins."""
        self._trainer = trainer

    def use_declaration(self, declared: Declaration | None) -> None:
        """Judge the labels by the objective that a trainer's configuration declares; None if it declares nothing.

        Raises:
            InputError: If the guard was given another objective.
        """
        agreed = Declaration.agreed(self._settings.objective, declared)
        self._settings = replace(self._settings, objective=agreed)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict; None before the run has begun."""
        return None if self._judge is None else self._judge.verdict

    def check(self) -> Verdict:
        """Judge the run before it is begun: its first batches, and the gradient of the first one; no weight moves.

        The trainer's own `training_step` takes the first batch forward and backward. Gradients, modes and random states
        are put back, and `train()` is guarded as before. One more batch of a stream is read.

        Returns:
            The verdict.

        Raises:
            InputError: If the guard knows no trainer, as `guard(trainer)` does, or the optimizer of the trainer moves
                weights in the backward pass, such as LOMO.
            GuardError: As for `on_train_begin`.
            Exception: As for `on_train_begin`.
        """
        trainer = self._trainer
        if trainer is None:
            raise InputError("no trainer", place="MistralGuard", expected="guard(trainer).check()")
        if optimizer := moves_in_backward(trainer.args):
            found = f"optim={optimizer!r}, which moves weights in the backward pass"
            raise InputError(found, place="check()", expected="another optimizer; train() is guarded with this one")
        with without_new_loaders(trainer):
            loader = trainer.get_train_dataloader()
        self._judge = RunJudge(self._settings, trainer.args, trainer.model, trainer.processing_class, loader)
        try:
            self._judge.rehearse(trainer)
        except RaisedError as found:
            raise found.error from None
        if self._judge.verdict is None:
            raise GuardError("the run was not judged: the log has the error of the guard")
        return self._judge.verdict

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Judge the first batches, and begin to watch the steps.

        Raises:
            GuardError: If a finding is an error, in any process, and the guard is to stop the run.
            Exception: What the dataset or the collator raises in one of these batches, with its place as a note.
        """
        if self._judge is not None:  # of an earlier training, which may have been stopped
            self._judge.leave()
        trainer = calling_trainer(self) if self._trainer is None else self._trainer
        self._judge = RunJudge(self._settings, args, model, processing_class, train_dataloader)
        with _survived():
            self._judge.begin(state, trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step, which may be one that is judged."""
        with _survived():
            if self._judge is not None:
                self._judge.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Judge what a step trains for: its gradients are there, and no weight has moved.

        Raises:
            GuardError: As for `on_train_begin`.
        """
        with _survived():
            if self._judge is not None:
                self._judge.judge_step()
                self._judge.look_at_step(optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Judge what the first steps have moved.

        Raises:
            GuardError: As for `on_train_begin`.
        """
        with _survived():
            if self._judge is not None:
                self._judge.judge_learning(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what the run has given, if it had fewer batches than the guard judges.

        Raises:
            GuardError: As for `on_train_begin`.
        """
        with _survived():
            if self._judge is not None:
                self._judge.end()


@contextmanager
def _survived() -> Iterator[None]:
    """Let the run go on after an error of the guard itself.

    Raises:
        GuardError: If the guard stops the run.
        Exception: What the dataset or the collator of the run raises.
    """
    try:
        yield
    except GuardError:
        raise
    except RaisedError as found:
        raise found.error from None
    except Exception as error:
        log_crash(error)


class Guard:
    """What `guard` is: call it for a trainer of transformers, and use its `watch` for a loop of your own."""

    def __call__(
        self,
        trainer: Any,
        *,
        tokenizer: AnyTokenizer | None = None,
        objective: str | None = None,
        batches: int = 8,
        every: int | None = None,
        on_finding: OnFinding = "stop",
        rules: str | None = None,
    ) -> MistralGuard:
        """Let a trainer judge its first batches, its model and its tokenizer before the first step.

        Call it before `trainer.train()`.

        Args:
            trainer: A `transformers.Trainer`, or a trainer that is made from it, such as an `SFTTrainer`.
            tokenizer: The Mistral tokenizer: a folder, a file, the name of a shipped one such as `spm-v3`, or a
                tokenizer in memory. None for the trainer's `processing_class`.
            objective: What is to be trained on, such as `last-answer`; None for every answer.
            batches: The number of first batches, each of which is judged.
            every: One later step in so many is judged. None measures how many: less than 0.5 % of the run's time.
            on_finding: `stop` raises `GuardError` before a weight moves. `warn` logs the verdict, writes it to
                `mistral-guard.json` and `mistral-guard.html` in the output folder, and lets the run go on.
            rules: The version by whose rules findings fail, such as `0.1`; None for all rules.

        Returns:
            The guard. After the start of the run, its `verdict` is the verdict.

        Raises:
            InputError: If the trainer takes no callback, or an argument has another value.

        Example:
            >>> from pytest_mistral_lora import guard
            >>> guard("my trainer")
            Traceback (most recent call last):
            ...
            pytest_mistral_lora.errors.InputError: trainer: a str; expected a transformers.Trainer
        """
        if not hasattr(trainer, "add_callback"):
            raise InputError(f"a {type(trainer).__name__}", place="trainer", expected="a transformers.Trainer")
        callback = MistralGuard(
            tokenizer=tokenizer, objective=objective, batches=batches, every=every, on_finding=on_finding, rules=rules
        )
        callback.use_trainer(trainer)
        trainer.add_callback(callback)
        return callback

    @staticmethod
    def watch(
        model: Any,
        *,
        tokenizer: Any = None,
        objective: str | None = None,
        every: int | None = None,
        on_finding: OnFinding = "stop",
        rules: str | None = None,
    ) -> LoopWatch:
        """Return a context manager around each step of a loop of Accelerate, Fabric or PyTorch: make it once.

        Args:
            model: The model, as the loop calls it: perhaps in the wrapper of a library.
            tokenizer: A tokenizer or processor of transformers, which is judged, too; or a folder, a file, or the name
                of a shipped one such as `spm-v3`.
            objective: What is to be trained on, such as `last-answer`; None for every answer.
            every: One later step in so many is judged. None measures how many: less than 0.5 % of the run's time.
            on_finding: `stop` raises `GuardError` before the optimizer steps or, if it does not step in the block, when
                the block ends. `warn` logs the verdict, and lets the loop go on.
            rules: The version by whose rules findings fail, such as `0.1`; None for all rules.

        Returns:
            The context manager. Its `verdict` is the verdict so far.

        Raises:
            InputError: If the model is no module of PyTorch, or an argument has another value.

        Example:
            >>> from pytest_mistral_lora import guard
            >>> guard.watch("my model")
            Traceback (most recent call last):
            ...
            pytest_mistral_lora.errors.InputError: model: a str; expected a torch.nn.Module
        """
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"a {type(model).__name__}", place="model", expected="a torch.nn.Module")
        is_of_transformers = isinstance(tokenizer, PreTrainedTokenizerBase | ProcessorMixin)
        named, processing_class = (None, tokenizer) if is_of_transformers else (tokenizer, None)
        settings = GuardSettings.given(named, objective, 1, every, on_finding, rules)
        return LoopWatch(model, settings, processing_class)


guard = Guard()
"""Judges a run: `guard(trainer)` for a trainer of transformers, `guard.watch(model)` for a loop of your own."""
