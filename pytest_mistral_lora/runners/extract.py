"""The folder that a runner gets as its model: a checkpoint's unchanged tokenizer, and a tiny model beside it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pytest_mistral_lora.chat.fim import FimRow
from pytest_mistral_lora.chat.pairs import record_of
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.runners.given_rows import by_record
from pytest_mistral_lora.runners.process import Ended, read_output, reader_of, run_limited, shown
from pytest_mistral_lora.runners.prompts import prompt_lines, read_prompt
from pytest_mistral_lora.runners.runner import NOTHING, TIME_LIMIT, Runner, interpreter

_HIDDEN_SIZE = 8


def stage_checkpoint(tokenizer: CheckpointTokenizer, folder: Path) -> None:
    """Write a checkpoint that a runner can load, into an empty folder.

    A checkpoint folder's tokenizer files are copied, so that the runner reads them as usual. A bare tokenizer
    file, which no runner loads, is converted as for the Hub: `tokenizer.json`, and the chat template that
    mistral-common generates.

    Args:
        tokenizer: The tokenizer.
        folder: The folder to write.

    Raises:
        TokenizerError: If the tokenizer cannot be loaded.
        RunnerError: If the folder has no tokenizer that a runner could load.
    """
    tokenizer.files.refuse_hazards()
    if tokenizer.path.is_file():
        tokenizer.fast.save_pretrained(folder)
    else:
        # without the checkpoint's own `config.json`, which describes another model than the tiny one
        names = [name for name in tokenizer.files.names if name != MODEL_CONFIG]
        if not names:
            found, place = "no tokenizer file", str(tokenizer.path)
            raise RunnerError(found, place=place, expected="a checkpoint folder with its tokenizer")
        for name in names:
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(tokenizer.files.file(name), target)
    _write_model(tokenizer, folder)


def _write_model(tokenizer: CheckpointTokenizer, folder: Path) -> None:
    """Write a model that knows every id: no runner trains it, but every runner loads a model."""
    import torch
    from safetensors.torch import save_file
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=max(tokenizer.oracle.vocab_size, 16),
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=_HIDDEN_SIZE,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=_HIDDEN_SIZE,
        tie_word_embeddings=False,
        architectures=["MistralForCausalLM"],
        bos_token_id=tokenizer.oracle.bos_id,
        eos_token_id=tokenizer.oracle.eos_id,
    )
    config.save_pretrained(folder)
    # the caller's random state does not change
    with torch.random.fork_rng(devices=[]):
        save_file(MistralForCausalLM(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


_ROWS, _ENCODED = "rows.jsonl", "encoded.jsonl"
_CHECKPOINT, _HOME, _TEMPORARY = "checkpoint", "home", "tmp"
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DISABLE_VERSION_CHECK": "0",
    "PYTHONUNBUFFERED": "1",
}
"""Variables that keep the runner from fetching, reporting, and using a GPU."""


@dataclass(frozen=True)
class Extraction:
    """A runner's encoded rows, and the environment that made them.

    Attributes:
        file: The encoded-rows file: a line for each row, in order.
        config: The configuration that the runner read.
        environment: Version by distribution, reported by the runner's own Python.
        notes: The script's notes about the rows as a whole.
        refused: Number of rows with an error in place of ids.
        task: The runner's command for preferences; empty for chat rows.
    """

    file: Path
    config: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refused: int = 0
    task: str = ""

    @property
    def ran_under(self) -> str:
        """The versions, the task and the configuration of the run, and the script's notes about the rows as a whole."""
        versions = ", ".join(f"{name} {version}" for name, version in self.environment.items())
        config = "no configuration" if self.config == NOTHING else f"configuration {self.config}"
        task = (f"task {self.task}",) if self.task else ()
        return "; ".join((versions or "versions not said", *task, config, *self.notes))


def extract(
    runner: Runner,
    rows: Sequence[Row],
    tokenizer: Path,
    output: Path,
    *,
    config: Path | None = None,
    python: Path | None = None,
    time_limit: float = TIME_LIMIT,
    own_data: bool = False,
    task: str = "",
    oracle: str | None = None,
) -> Extraction:
    """Let a runner encode rows by its own code, and write the result as encoded rows.

    Only model, data, output, device and precision of the runner's configuration are replaced. The runner runs in the
    current folder; its relative paths start there.

    Args:
        runner: The runner.
        rows: The rows; both sides of a preference pair follow each other.
        tokenizer: A checkpoint folder or a single tokenizer file.
        output: The encoded-rows file to write: each row once, in order; a row that the runner dropped, refused or
            turned into several sequences has an `error`.
        config: The runner's own configuration file; None for its defaults.
        python: The Python of the environment that the runner is installed in; None for the one that `runner setup` made
            or, if the runner is installed beside this package, for this Python.
        time_limit: Seconds that the runner may take.
        own_data: Whether to keep the data that the configuration names, such as those of an exported run. `rows` are
            then the chat rows behind that data, in order.
        task: The runner's command for preferences, one of its `tasks`; empty for chat rows.
        oracle: The declared oracle of a folder without a Mistral tokenizer file, or None.

    Raises:
        RunnerError: If the runner is missing, hangs, refuses its configuration or even a plain row, or breaks the
            contract of its output; or if a row is fill-in-the-middle, and the runner is a packaged one.
        TokenizerError: If the tokenizer cannot be loaded.
    """
    gap = next((row for row in rows if isinstance(row, FimRow)), None)
    if gap is not None and runner.module:
        raise RunnerError(
            f"{runner.title} is given conversations, and this row is fill-in-the-middle",
            place=gap.place,
            next_step="Judge the rows that it has prepared: mistral-lora audit FOLDER --tokenizer PATH",
        )
    # in ASCII: a script that splits the text into lines must not split at a line separator within a row
    records = [record_of(rows) if rows[0].side else rows[0].to_json() for rows in by_record(rows)]
    given = "".join(f"{json.dumps(record)}\n" for record in records)
    source = CheckpointTokenizer(tokenizer, oracle)
    words = [*(["--own-data"] if own_data else []), *(["--task", task] if task else [])]
    chosen = config or runner.default_config(task)
    with _ended(runner, source, given, chosen, python, time_limit, words) as file:
        made = read_output(file, reader_of(len(records)))
    write_text(output, "".join(f"{line}\n" for line in made.lines(records)))
    refused = sum("error" in made.records.get(number, {"error": ""}) for number in range(len(records)))
    return Extraction(output, chosen, made.environment, made.notes, refused, task)


def extract_prompts(
    runner: Runner,
    tokenizer: Path,
    output: Path,
    *,
    config: Path | None,
    python: Path | None = None,
    time_limit: float = TIME_LIMIT,
    oracle: str | None = None,
) -> Extraction:
    """Let an evaluation's harness make the prompts of its tasks, and write them as encoded rows; see `prompts`.

    Args:
        runner: The harness.
        tokenizer: As for `extract`.
        output: The encoded-rows file to write.
        config: The harness's own configuration file, which names the tasks.
        python: As for `extract`.
        time_limit: As for `extract`.
        oracle: As for `extract`.

    Raises:
        RunnerError: As for `extract`, and if there is no configuration or no prompt.
        TokenizerError: If the tokenizer cannot be loaded.
    """
    if config is None:
        found, expected = f"{runner.title} has no tasks of its own", "a configuration with tasks: --config FILE"
        raise RunnerError(found, place=runner.name, expected=expected)
    source = CheckpointTokenizer(tokenizer, oracle)
    with _ended(runner, source, "", config, python, time_limit) as file:
        made = read_output(file, read_prompt)
    if not made.records:
        notes = "; ".join(made.notes)
        raise RunnerError(f"it made no prompt{notes and f' ({notes})'}", place=str(config), expected="tasks of prompts")
    write_text(output, "".join(f"{line}\n" for line in prompt_lines(made, source.oracle)))
    return Extraction(output, config, made.environment, made.notes)


@contextmanager
def _ended(
    runner: Runner,
    tokenizer: CheckpointTokenizer,
    rows: str,
    config: Path,
    python: Path | None,
    time_limit: float,
    words: Sequence[str] = (),
) -> Iterator[Path]:
    """Run a runner's script, and yield the file that it wrote, which is removed after the block.

    Args:
        runner: The runner.
        tokenizer: The tokenizer to give it.
        rows: The rows to give it, as JSON Lines.
        config: The configuration file.
        python: As for `extract`.
        time_limit: As for `extract`.
        words: Further words of its command line.

    Raises:
        RunnerError: As for `extract`.
        TokenizerError: If the tokenizer cannot be loaded.
    """
    if config.is_dir() or not config.exists():
        found = "a folder" if config.is_dir() else "no such file"
        raise RunnerError(found, place=str(config), expected=f"a configuration of {runner.title}")
    # before the folder is made, which takes seconds
    found_python = interpreter(runner, python)
    with tempfile.TemporaryDirectory(prefix=f"mistral-{runner.name}-") as temporary:
        work = Path(temporary)
        for name in (_CHECKPOINT, _HOME, _TEMPORARY):
            (work / name).mkdir()
        stage_checkpoint(tokenizer, work / _CHECKPOINT)
        write_text(work / _ROWS, rows)
        ended = _run(runner, work, config, found_python, time_limit, words)
        if not (work / _ENCODED).is_file():
            found = f"{runner.title} ends without an error, and wrote no file{shown(ended.tail)}"
            raise RunnerError(found, expected="encoded rows, one JSON object a line, in the file that --output names")
        yield work / _ENCODED


def _run(runner: Runner, work: Path, config: Path, python: Path, time_limit: float, words: Sequence[str]) -> Ended:
    command: list[str | Path] = [python, runner.script.absolute(), "--config", config.absolute()]
    for option, name in (("--rows", _ROWS), ("--checkpoint", _CHECKPOINT), ("--output", _ENCODED)):
        command += [option, work / name]
    command += words
    home = str(work / _HOME)
    # caches and temporary files go into a folder that is removed afterwards
    folders = {"HF_HOME": home, "HF_DATASETS_CACHE": f"{home}/datasets", "TMPDIR": str(work / _TEMPORARY)}
    folders["MODELSCOPE_CACHE"] = f"{home}/modelscope"
    # these variables are for this Python: another Python would import this one's packages
    dropped = () if python == Path(sys.executable) else ("PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | _QUIET | folders
    hint = "; give it fewer rows or more time (--time-limit), or look at what it waits for"
    ended = run_limited(command, seconds=time_limit, folder=Path.cwd(), environment=environment, hint=hint)
    if ended.code:
        raise RunnerError(f"{runner.title} {ended.reason}", place="" if config == NOTHING else str(config))
    return ended
