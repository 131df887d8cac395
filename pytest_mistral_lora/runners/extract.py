"""Extraction without training: rows, a tokenizer and a runner's own configuration in, encoded rows out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.runners.environments import interpreter
from pytest_mistral_lora.runners.output import read_output
from pytest_mistral_lora.runners.process import run_limited, shown
from pytest_mistral_lora.runners.runner import TIME_LIMIT, Runner
from pytest_mistral_lora.runners.staging import stage_checkpoint

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
"""Nothing is fetched, reported or put on a GPU."""


@dataclass(frozen=True)
class Extraction:
    """What a runner made of rows.

    Attributes:
        file: The encoded-rows file: a line for each row, in order.
        config: The configuration that the runner read.
        environment: Version by distribution, as the runner's own Python says them.
        refused: How many rows have an error in place of ids.
        log: The last lines that the runner printed.
    """

    file: Path
    config: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    refused: int = 0
    log: str = ""

    @property
    def ran_under(self) -> str:
        """A line that says which versions and which configuration the runner ran under."""
        versions = ", ".join(f"{name} {version}" for name, version in self.environment.items())
        return f"{versions or 'versions not said'}; configuration {self.config}"


def extract(
    runner: Runner,
    rows: Sequence[Row],
    tokenizer: Path,
    output: Path,
    *,
    config: Path | None = None,
    python: Path | None = None,
    time_limit: float = TIME_LIMIT,
) -> Extraction:
    """Let a runner encode rows by its own code, and write what it made as encoded rows.

    Of the runner's configuration only model, data, output, device and precision are replaced. It runs in the current
    folder, which its relative paths are relative to.

    Args:
        runner: The runner.
        rows: The rows.
        tokenizer: A checkpoint folder or a single tokenizer file.
        output: The encoded-rows file to write: each row once, in order; one that the runner dropped, refused or made
            several sequences of has an `error`.
        config: The runner's own configuration file; None for its defaults.
        python: The Python of the environment that the runner is installed in; None for the one that `runner setup`
            made, or, for a runner that is installed beside this package, this Python.
        time_limit: Seconds that it may take.

    Raises:
        RunnerError: If the runner is not there, hangs, refuses its configuration or even a plain row, or writes
            something that is not its contract.
        TokenizerError: If the tokenizer cannot be loaded.
    """
    chosen = config or runner.config
    if not chosen.exists():
        raise RunnerError("no such file", place=str(chosen), expected=f"a configuration of {runner.title}")
    with tempfile.TemporaryDirectory(prefix=f"mistral-{runner.name}-") as temporary:
        work = Path(temporary)
        for name in ("checkpoint", "home", "tmp"):
            (work / name).mkdir()
        stage_checkpoint(CheckpointTokenizer(tokenizer), work / "checkpoint")
        # in ASCII: a script that splits the text into lines must not split at a line separator within a row
        write_text(work / "rows.jsonl", "".join(f"{json.dumps(row.to_json())}\n" for row in rows))
        command: list[str | Path] = [python or interpreter(runner), runner.script.absolute()]
        command += ["--rows", work / "rows.jsonl", "--checkpoint", work / "checkpoint"]
        command += ["--config", chosen.absolute(), "--output", work / "encoded.jsonl"]
        ended = run_limited(command, seconds=time_limit, folder=Path.cwd(), environment=_environment(work))
        if ended.code:
            raise RunnerError(
                f"{runner.title} ends with exit code {ended.code}: {ended.last_line}{shown(ended.tail)}",
                place=str(chosen),
            )
        result = read_output(work / "encoded.jsonl", len(rows))
    lines = list(result.lines(rows))
    write_text(output, "".join(f"{line}\n" for line in lines))
    refused = sum("input_ids" not in result.records.get(number, {}) for number in range(len(rows)))
    return Extraction(output, chosen, result.environment, refused, ended.tail)


def packaged_rows(oracle: Oracle) -> list[Row]:
    """Return the packaged rows that a tokenizer's version can encode."""
    return [case.row for case in packaged_cases() if oracle.version in case.versions]


def _environment(work: Path) -> dict[str, str]:
    """Return the runner's environment variables: caches and temporary files go where they are removed with the rest."""
    home = str(work / "home")
    own = {"HF_HOME": home, "HF_DATASETS_CACHE": f"{home}/datasets", "TMPDIR": str(work / "tmp")}
    return {**os.environ, **_QUIET, **own}
