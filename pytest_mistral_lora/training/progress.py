"""The progress of a run in words: its header, its steps, its answers and its end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback

from pytest_mistral_lora.errors import and_more, counted
from pytest_mistral_lora.training.callbacks import FORMAT
from pytest_mistral_lora.training.curves import PAGE
from pytest_mistral_lora.training.devices import device_count, engine, on_gpu, precision_of
from pytest_mistral_lora.training.display import RunDisplay, clock_text
from pytest_mistral_lora.training.layers import ranks_and_alphas
from pytest_mistral_lora.training.memory import memory_line
from pytest_mistral_lora.training.step.memory_need import in_words

if TYPE_CHECKING:
    from pytest_mistral_lora.training.generate.record import GenerationCallback
    from pytest_mistral_lora.training.prepare import Preparation
    from pytest_mistral_lora.training.step.trainer import LoraTrainer

_NAMES = {"loss": "loss", "eval_loss": "held-out loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}
"""Keys of the log that a line shows, with their names in the line."""

_LONGEST = 120
"""Characters of an answer that a line shows."""

_NAMED_FILES = 3


def trainable_parameters(prepared: Preparation) -> tuple[int, int]:
    """Return how many values of a run are trainable, and how many its base has, from shapes alone."""
    model, lora = prepared.base.empty_model(), prepared.recipe.lora
    shapes, count = ranks_and_alphas(lora, prepared.layers), 0
    for name, module in model.named_modules():
        if name in shapes:
            rows, columns = module.weight.shape
            count += shapes[name][0] * (rows + columns) + (rows if lora.dora else 0)
        elif name in prepared.saved:
            count += sum(parameter.numel() for parameter in module.parameters())
    return count, sum(parameter.numel() for parameter in model.parameters())


def _ranks(prepared: Preparation) -> str:
    ranks = [rank for rank, _ in ranks_and_alphas(prepared.recipe.lora, prepared.layers).values()]
    return f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"{ranks[0]}"


def data_facts(prepared: Preparation) -> dict[str, str]:
    """Return the facts of a run that do not depend on the machine, by name: base, rows, tokens, layers."""
    recipe, data, tally = prepared.recipe, prepared.data, prepared.data.train.figures.tally
    base = recipe.base
    pin = f"commit {base.revision}" if base.revision else f"weights {str(base.weights_sha256)[:12]}"
    rows = f"{len(data.train.rows):,} to train on, {len(data.held_out.rows):,} held out"
    names = [recipe.name_of(file.path) for file in data.files]
    share = tally.supervised_tokens / max(1, tally.tokens)
    return {
        "base": f"{base.label}, {pin}, {prepared.base.architecture.title}",
        "rows": f"{rows}, of {', '.join(names[:_NAMED_FILES])}{and_more(_NAMED_FILES, len(names))}",
        "tokens": f"{tally.tokens:,} in an epoch, {tally.supervised_tokens:,} of them supervised ({share:.0%})",
        "layers with an adapter": prepared.layers_line,
    }


def header(prepared: Preparation, work: Path) -> dict[str, str]:
    """Return the facts of a run before its weights are loaded, by their names.

    Args:
        prepared: The recipe with its rows.
        work: Folder of the checkpoints.
    """
    recipe, data, training = prepared.recipe, prepared.data, prepared.recipe.training
    count, all_numbers = trainable_parameters(prepared)
    steps = training.planned_steps(len(data.train.rows))
    epochs = steps / -(-len(data.train.rows) // training.batch_size)
    every = f"every {training.checkpoint_steps} steps" if training.checkpoint_steps else "by the clock"
    threads = counted(torch.get_num_threads(), "thread")
    device = torch.cuda.get_device_name() if on_gpu(training) else f"CPU, {threads}"
    if device_count() > 1:
        device += f", {device_count()} processes ({engine()})"
    memory = memory_line(recipe, prepared.base, prepared.layers, data.train.encoded)
    return {
        **data_facts(prepared),
        **({} if prepared.start is None else {"goes on from": prepared.start.written}),
        "trainable parameters": f"{count:,} (rank {_ranks(prepared)}), {count / all_numbers:.2%} of {all_numbers:,}",
        "device": f"{device}, {precision_of(training)}",
        **({"memory": memory.strip().removeprefix("memory: ")} if memory else {}),
        "steps": f"{steps:,} of {training.batch_size} rows, {counted(epochs, 'epoch')}; "
        f"a line every {training.logging_steps}",
        "output": f"{recipe.output}; until it is done, checkpoints ({every}) and {PAGE} in {work}",
    }


@dataclass(eq=False)
class ShowProgress(TrainerCallback):
    """Shows a line for each line of the log, the answers of each round, and a bar.

    It measures the time of steps alone: held-out losses, answers and checkpoints do not lower the tokens a second. Add
    it after all callbacks that log or ask for an evaluation.

    Attributes:
        display: The display of the run.
        trainer: The trainer.
        generations: The callback that generates the answers.
        clock: Returns seconds.
        supervised_tokens: Supervised tokens of the steps so far.
        busy_seconds: Duration of these steps.
        most_memory: The largest value that a line has shown, in bytes.
    """

    display: RunDisplay
    trainer: LoraTrainer
    generations: GenerationCallback
    clock: Callable[[], float] = field(default=time.monotonic, kw_only=True)
    supervised_tokens: int = field(default=0, init=False)
    busy_seconds: float = field(default=0.0, init=False)
    most_memory: int = field(default=0, init=False)
    _first: tuple[float, int] | None = field(default=None, init=False)
    _begin: float = field(default=0.0, init=False)
    _shown: str = field(default="", init=False)
    _last: tuple[int, float] = field(default=(0, 0.0), init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce the held-out loss before the first step, which may take long."""
        if args.eval_on_start:
            self._announce_evaluation()

    def _announce_evaluation(self) -> None:
        self.display.phase(f"computing the loss of {len(self.trainer.eval_dataset):,} held-out rows")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the step."""
        self._begin = self.clock()
        self._first = self._first or (self._begin, state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up seconds and tokens: the loss of the step was read, so that a GPU has finished it."""
        self.busy_seconds += self.clock() - self._begin
        self.supervised_tokens += self.trainer.step_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, show the answers of this step, and announce an evaluation."""
        self.display.advance(state.global_step, state.max_steps, self._shown)
        for text in answer_lines(self.generations.answers_of(state.global_step), state.max_steps):
            self.display.line(text)
        if control.should_evaluate and self.trainer.eval_dataset is not None:
            self._announce_evaluation()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the step and its numbers."""
        shown = (name for name in logs or {} if name in _NAMES or name.startswith(FORMAT))
        numbers = {_NAMES.get(name, name): logs[name] for name in shown}
        texts = [f"{name} {value:.4g}" for name, value in numbers.items()]
        if "loss" in numbers and self.busy_seconds > self._last[1]:
            # supervised tokens a second since the last line
            tokens, seconds = self._last
            rate = (self.supervised_tokens - tokens) / (self.busy_seconds - seconds)
            self._last = self.supervised_tokens, self.busy_seconds
            # the most that tensors had on the GPU so far, or what this process has on the host now
            on_cuda = self.trainer.args.device.type == "cuda"
            memory = int(torch.cuda.max_memory_allocated() if on_cuda else psutil.Process().memory_info().rss)
            self.most_memory = max(self.most_memory, memory)
            begin, done = self._first or (self._begin, 0)
            # with all that happens between steps: it happens again
            seconds = (self.clock() - begin) / max(1, state.global_step - done)
            left = clock_text(seconds * (state.max_steps - state.global_step))
            texts += [f"{rate:,.0f} supervised tokens/s", f"memory {in_words(memory)}", f"{left} left"]
            self._shown = ", ".join((texts[0], texts[-3], texts[-1]))  # as many as 80 columns hold
        if texts:
            style = "" if "loss" in numbers else "cyan"
            self.display.line(f"step {state.global_step}/{state.max_steps}: {', '.join(texts)}", style)


def answer_lines(answers: Sequence[Mapping[str, Any]], steps: int) -> Iterator[str]:
    """Yield a line for each line of `generations.jsonl`: whether it equals the row's answer, its checks, its text."""
    for answer in answers:
        verdict = "as in the row" if answer["equal"] else "not as in the row"
        broken = [f"{name}: {reason}" for name, reason in answer["checks"].items() if reason != "passed"]
        checks = f", {'; '.join(broken)}" if broken else ""
        text = repr(answer["text"])
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
        ended = f"{verdict}, ended by {answer['stop']}{checks}"
        yield f"step {answer['step']}/{steps}: answer {answer['row'] + 1}: {text} ({ended})"


def summary(log: Sequence[Mapping[str, Any]], progress: ShowProgress, seconds: float) -> dict[str, str]:
    """Return the facts of a run at its end, by their names.

    Args:
        log: The training log.
        progress: The callback of the run.
        seconds: Seconds since the run began.
    """
    found = {}
    for key in ("loss", "eval_loss"):
        lines = [line for line in log if key in line]
        if lines:
            found[_NAMES[key]] = " → ".join(f"{line[key]:.4g}" for line in (lines[0], *lines[1:][-1:]))
        if len(lines) == 1:
            found[_NAMES[key]] += f" at step {lines[0]['step']}, the only one that was measured"
    for key in dict.fromkeys(name for line in log for name in line if name.startswith(FORMAT)):
        rates = [line[key] for line in log if key in line]
        found[key] = " → ".join(f"{rate:.0%}" for rate in (rates[0], *rates[1:][-1:]))
    if progress.busy_seconds:
        rate = progress.supervised_tokens / progress.busy_seconds
        found["speed"] = f"{rate:,.0f} supervised tokens/s, at most {in_words(progress.most_memory)} of memory"
    return {**found, "time": clock_text(seconds)}


def next_commands(output: Path, *, answers: bool, chats: bool) -> list[str]:
    """Return the commands to run next with a finished adapter.

    Args:
        output: The adapter's folder.
        answers: Whether the run recorded answers, which `smoke` compares.
        chats: Whether it was trained on conversations: one of fill-in-the-middle alone has learned to fill gaps.
    """
    folder = shlex.quote(str(output))
    merged, files = (shlex.quote(str(output.with_name(f"{output.name}-{kind}"))) for kind in ("merged", "served"))
    served = [
        f"mistral-lora export {folder} --to SERVER --output {files}",
        f"mistral-lora serve-check URL --tokenizer {folder} --adapter {folder}",
    ]
    return [
        f"mistral-lora verify {folder}",
        f"mistral-lora smoke {folder}{'' if answers else ' --rows ROWS.jsonl'}",
        *([f"mistral-lora chat {folder}"] if chats else []),
        f"mistral-lora merge {folder} {merged}",
        *(served if chats else []),
    ]
