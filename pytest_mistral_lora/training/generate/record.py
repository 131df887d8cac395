"""Record a model's answers: as golden transcripts, and in rounds during a run, with the pass rates of format checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from pytest_mistral_lora.chat.completions import AnswerToCheck, FormatCheck, FormatVerdict, pass_rates, verdicts
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import NoOracleError, RecipeError
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript
from pytest_mistral_lora.training.callbacks import FORMAT
from pytest_mistral_lora.training.devices import engine
from pytest_mistral_lora.training.generate.answers import Completion, generate, last_turn_ids
from pytest_mistral_lora.training.recipe import Evaluation

_T = TypeVar("_T")

GENERATIONS = "generations.jsonl"
"""File of a run with the answers during training: one line per step and row."""

# Digits of recorded log-probabilities: far finer than any tolerance, and the same for equal runs.
_DECIMALS = 6
_PACKAGES = ("mistral-common", "peft", "tokenizers", "torch", "transformers")


def answer_of(completion: Completion, row: Row, encoder: Encoder) -> AnswerToCheck:
    """Return a completion as format checks take it; the oracle is None for a tokenizer without one."""
    try:
        oracle = encoder.tokenizer.oracle
    except NoOracleError:
        oracle = None
    return AnswerToCheck(completion.ids, completion.text, completion.stop, row.tools or (), oracle)


def record(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    completions: Iterable[Completion],
    *,
    identity: Mapping[str, Any],
    precision: Precision,
    max_new_tokens: int,
    checks: Sequence[FormatCheck] = (),
) -> list[Transcript]:
    """Return a transcript of each completion; nothing is written.

    Args:
        model: The model that answered, in eval mode.
        encoder: The backend that makes prompts.
        rows: The rows that were answered.
        completions: The result of `generate` for them.
        identity: The `model` of each transcript.
        precision: dtype of the base's weights.
        max_new_tokens: The limit that `generate` had, in tokens.
        checks: Format checks to apply to each completion.

    Raises:
        RowError: If a row cannot be encoded.
    """
    constant: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "model": dict(identity),
        "tokenizer": tokenizer_identity(encoder),
        "recorded_with": {name: version(name) for name in _PACKAGES},
        "device": torch.device(model.device).type,
        "precision": precision,
    }
    found = []
    for row, completion in zip(rows, completions, strict=True):
        prompt = encoder.prompt(row)
        checked = verdicts(answer_of(completion, row, encoder), checks)
        logprobs = next_token_logprobs(model, prompt, completion.ids)
        found.append(
            Transcript(
                case=f"row-{completion.row + 1:04}",
                row=row,
                prompt_ids=prompt,
                completion_ids=completion.ids,
                text=completion.text,
                stop=completion.stop,
                checks=tuple(
                    {**check.to_json(), "passed": verdict.passed, "reason": verdict.reason}
                    for check, verdict in zip(checks, checked, strict=True)
                ),
                **_likelihood(logprobs, completion.ids),
                **constant,
            )
        )
    return found


def tokenizer_identity(encoder: Encoder) -> dict[str, Any]:
    """Return a transcript's `tokenizer`: the backend, and version, name and hash of its file."""
    file = encoder.file
    by_oracle = encoder.backend == "mistral-common" or oracle_file(encoder.tokenizer.path) is not None
    return {
        "backend": encoder.backend,
        "version": encoder.tokenizer.oracle.version if by_oracle else None,
        "file": encoder.file_name,
        "sha256": sha256_file(file),
    }


def _likelihood(logprobs: torch.Tensor, ids: Sequence[int]) -> dict[str, Any]:
    """Return `logprobs`, `margins` and `runner_up_ids` of a completion, one value a token.

    With log-probabilities l and a chosen token c, the runner-up r is the argmax of l over all other tokens, and the
    margin is l[c] - l[r]: negative if the completion is not greedy.
    """
    chosen = torch.tensor(ids)[:, None]
    chosen_logprobs = logprobs.gather(1, chosen)
    others, runner_up = logprobs.scatter(1, chosen, -torch.inf).max(dim=1, keepdim=True)
    return {
        # adding zero turns -0.0 into 0.0
        "logprobs": tuple(round(min(value, 0.0), _DECIMALS) + 0.0 for value in chosen_logprobs.squeeze(1).tolist()),
        "margins": tuple(round(value, _DECIMALS) + 0.0 for value in (chosen_logprobs - others).squeeze(1).tolist()),
        "runner_up_ids": tuple(runner_up.squeeze(1).tolist()),
    }


def next_token_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of `next_token_logits`, in nats, with the same shape."""
    return torch.log_softmax(next_token_logits(model, prompt, completion), dim=-1)


def next_token_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Return the logits that predict each token of a completion, from one forward pass.

    Args:
        model: A causal language model.
        prompt: Ids before the completion.
        completion: Ids to feed, whether or not the model would generate them.

    Returns:
        `(completion tokens, vocabulary)`, float32 on the CPU.
    """
    model.eval()
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *completion]], device=model.device)
        keep = len(completion) + 1  # from the last prompt token on; the last position predicts no given token
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=keep, use_cache=False).logits
        found: torch.Tensor = logits[0, :-1].float().cpu()
    return found


def format_checks(evaluation: Evaluation, encoder: Encoder) -> tuple[FormatCheck, ...]:
    """Return the format checks of a recipe.

    Raises:
        RecipeError: If a check cannot be made, or the base has no Mistral tokenizer, which checks of tool calls need.
    """
    checks = evaluation.format_checks()
    if any(check.kind == "tool_call" for check in checks) and not encoder.tokenizer.has_oracle:
        raise RecipeError(
            "tool_call, but the base has no Mistral tokenizer, which defines the format of a call",
            place=NOWHERE.within("evaluation", "checks"),
            expected="a base with tekken.json or tokenizer.model.vN, its name in base.oracle, or other checks",
        )
    return checks


@contextmanager
def preserve_rng_and_modes(model: Any) -> Iterator[None]:
    """Restore each module's training mode and the random generators, so that generation cannot change a run."""
    # each module's own mode: model.train() would also turn on dropout that a user turned off
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@dataclass(frozen=True)
class AnsweredRow:
    """A row, and what the model answered during a run.

    Attributes:
        asked: The text of the prompt, without control tokens.
        wanted: The text of the row's own answer, without control tokens.
        answers: The lines of `GenerationCallback.history` of the first and the last step, once if they are one step.
    """

    asked: str
    wanted: str
    answers: Sequence[Mapping[str, Any]]


@dataclass(eq=False)
class GenerationCallback(TrainerCallback):
    """Answers the same rows every few optimizer steps, and after the last one.

    Under DDP each process has the whole model, and answers its share of the rows with it; then all have all answers. If
    the processes share a model, each answers every row, because each token needs them all. The main process writes.

    Attributes:
        trainer: The trainer; its log gets the pass rates.
        model: The model in training (PEFT).
        encoder: The backend.
        rows: The rows to answer.
        checks: Format checks for each answer.
        max_new_tokens: Longest answer, in tokens.
        every: Optimizer steps between two rounds; None for the last step only.
        file: File that the answers are written to after each round.
    """

    trainer: Any
    model: Any
    encoder: Encoder
    rows: Sequence[Row]
    checks: Sequence[FormatCheck]
    max_new_tokens: int
    every: int | None
    file: Path
    _answers: dict[int, list[Completion]] = field(default_factory=dict)
    _lines: list[dict[str, Any]] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the answers of a killed run up to the step of the checkpoint that the run resumes from."""
        if state.global_step and self.file.is_file():
            lines = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
            self._lines = [line for line in lines if line["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer the rows if a round is due, or the run stops after this step."""
        due = self.every is not None and state.global_step % self.every == 0
        if self.rows and (due or control.should_training_stop):
            due_to_log = control.should_log
            self.answer_rows()
            # Logging the rates resets the flag: without this, the loss of this step would be lost.
            control.should_log = due_to_log

    def answer_rows(self) -> list[Completion]:
        """Return the answers at the trainer's current step; the first call of a step generates, logs and writes."""
        step = self.trainer.state.global_step
        if step in self._answers:
            return self._answers[step]
        with preserve_rng_and_modes(self.model):
            completions = self._over_processes(self._generate)
        self._answers = {step: completions}
        checked = self._checked(completions)
        # a resumed run answers the rows of its first step again: its lines replace those of the killed run
        self._lines = [line for line in self._lines if line["step"] != step]
        for completion, found in zip(completions, checked, strict=True):
            checks = {verdict.name: verdict.reason or "passed" for verdict in found}
            answer = {"text": completion.text, "stop": completion.stop, "equal": completion.equal}
            self._lines.append({"step": step, "row": completion.row, **answer, "checks": checks})
        # a run that resumes from the checkpoint of this step already has the rates in its log
        lines = (line for line in self.trainer.state.log_history if line["step"] == step)
        logged = any(name.startswith(FORMAT) for line in lines for name in line)
        if self.checks and completions and not logged:
            self.trainer.log({f"{FORMAT}{name}": rate for name, rate in pass_rates(checked).items()})
        if self.trainer.accelerator.is_main_process and completions:
            write_text(self.file, self.history)
        return completions

    def _generate(self, places: Sequence[int]) -> list[Completion]:
        rows = [self.rows[place] for place in places]
        found = generate(self.model, self.encoder, rows, max_new_tokens=self.max_new_tokens)
        return [replace(completion, row=place) for place, completion in zip(places, found, strict=True)]

    def _over_processes(self, work: Callable[[Sequence[int]], list[_T]]) -> list[_T]:
        """Return the results of `work` for all rows, in order; it gets the places of some rows.

        Under DDP each process does a share. All of them must call this.
        """
        if engine() != "ddp":
            return work(range(len(self.rows)))
        process, processes = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        found: list[_T] = []
        # a row each at a time: a process that waits longer than the limit of the engine would end the run
        for first in range(0, len(self.rows), processes):
            share = range(first, min(first + processes, len(self.rows)))[process : process + 1]
            found += gather_object(work(share))
        return found

    def answers_of(self, step: int) -> list[dict[str, Any]]:
        """Return the lines of `history` of a step."""
        return [line for line in self._lines if line["step"] == step]

    def answered_rows(self) -> list[AnsweredRow]:
        """Return the rows with their first and last answers; empty before the first round."""
        found = []
        for index, row in enumerate(self.rows):
            lines = [line for line in self._lines if line["row"] == index]
            if lines:
                ends = lines[:1] if len(lines) == 1 else [lines[0], lines[-1]]
                asked = self.encoder.decode(self.encoder.prompt(row))
                wanted = self.encoder.decode(last_turn_ids(self.encoder.encode(row)))
                found.append(AnsweredRow(asked, wanted, ends))
        return found

    @property
    def history(self) -> str:
        """All answers so far as JSON lines: step, row, text, stop, equality with the row, result of each check."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)

    def files(self, identity: Mapping[str, Any], precision: Precision) -> dict[str, str]:
        """Return the content of the files with answers, by name; empty without rows. All processes must call it.

        Args:
            identity: The `model` of each transcript.
            precision: dtype of the base's weights.
        """
        answers = self.answer_rows()

        def recorded(places: Sequence[int]) -> list[Transcript]:
            return record(
                self.model,
                self.encoder,
                [self.rows[place] for place in places],
                [answers[place] for place in places],
                identity=identity,
                precision=precision,
                max_new_tokens=self.max_new_tokens,
                checks=self.checks,
            )

        # the main process alone may know all of the identity
        transcripts = [replace(one, model=dict(identity)) for one in self._over_processes(recorded)]
        texts = {f"{TRANSCRIPTS}/{transcript.case}.json": transcript.to_text() for transcript in transcripts}
        return texts | ({GENERATIONS: self.history} if transcripts else {})

    def latest_rates(self) -> dict[str, float]:
        """Return the share of the answers at the current step that pass each check, from 0 to 1."""
        return pass_rates(self._checked(self.answer_rows()))

    def _checked(self, completions: Sequence[Completion]) -> list[tuple[FormatVerdict, ...]]:
        pairs = zip(completions, self.rows, strict=True)
        return [verdicts(answer_of(completion, row, self.encoder), self.checks) for completion, row in pairs]
