"""What a trainer itself makes of plain rows with a recipe's settings, recorded with the trainer's runner.

The runner has to be installed: `mistral-lora runner setup axolotl`. It gets the recipe's own file, or for a template of
LLaMA-Factory its default configuration with that template, and a checkpoint as on the Hub with the base's tokenizer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import yaml
from boards.inputs import derived_tekken

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tiny_model import TinyKind, write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.runners import TRAINERS, Trainer
from pytest_mistral_lora.runners.extract import extract
from recipes_of_trainers.recordings import FOLDER

FILE = FOLDER / "runs.json"
PLAIN = ("single", "multi-turn", "system", "system-multi-turn")
THINKING = ("thinking", "thinking-multi-turn")
_NAMES = ((*PLAIN, "tool-call"), THINKING)
"""The packaged rows that are given, in runs of their own: Axolotl asks for contents of one form in a file."""
_WORDS = 8_000


def record_run(key: str, name: str, tokenizer: str, config: Path | dict[str, Any], date: str) -> None:
    """Run a trainer with the settings of a recipe, and add the verdict to the record.

    Args:
        key: The key of the recipe.
        name: The trainer's runner.
        tokenizer: The name of the tokenizer.
        config: The recipe's file, or keys beside the runner's defaults.
        date: The day.
    """
    runner = TRAINERS[name]
    verdicts, environment = _run(runner, tokenizer, config)
    entry = {"runner": runner.title, "version": environment[runner.distribution], "recorded": date, "rows": verdicts}
    write_json(FILE, dict(sorted({**read_runs(), key: entry}.items())))


def read_runs() -> dict[str, dict[str, Any]]:
    """Return what is recorded, by the key of a recipe."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    return found


def key_of(repository: str, recipe: str, tokenizer: str) -> str:
    """Return the key of a recipe, or of a template, with a tokenizer."""
    return f"{repository}:{recipe} with {tokenizer}"


def _run(
    runner: Trainer, tokenizer: str, config: Path | dict[str, Any]
) -> tuple[dict[str, list[str]], Mapping[str, str]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint, oracle = _checkpoint(tokenizer, folder, has_own_file=isinstance(config, Path))
        if isinstance(config, dict):
            keys = yaml.safe_load(runner.config.read_text(encoding="utf-8")) | config
            shutil.copytree(runner.config.parent, folder, dirs_exist_ok=True)
            config = folder / "run.yaml"
            config.write_text(yaml.safe_dump(keys), encoding="utf-8")
        known = Oracle(oracle)
        verdicts: dict[str, list[str]] = {}
        environment: Mapping[str, str] = {}
        for names in _NAMES:
            rows = dict(_rows(names, known))
            if not rows:
                continue
            with chdir(folder):
                output = folder / f"{names[0]}.jsonl"
                made = extract(runner, [*rows.values()], checkpoint, output, config=config, oracle=str(oracle))
            environment = made.environment
            for (name, row), line in zip(rows.items(), output.read_text(encoding="utf-8").splitlines(), strict=True):
                encoded = json.loads(line)
                if "error" in encoded:
                    verdicts[name] = ["ML502"]
                    continue
                findings = row_findings(row, encoded["input_ids"], encoded["labels"], known)
                verdicts[name] = [finding.rule for finding in findings]
        return verdicts, environment


def _rows(names: Sequence[str], oracle: Oracle) -> Iterator[tuple[str, Row]]:
    """Yield the packaged rows of some names that a tokenizer encodes; with thinking, each content as chunks."""
    cases = {case.name: case for case in packaged_cases()}
    for name in names:
        case = cases[name]
        if not case.fits(oracle):
            continue
        data = json.loads(case.row.to_jsonl())
        for message in data["messages"] if names is THINKING else ():
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        yield name, parse_row(data)


def _checkpoint(tokenizer: str, folder: Path, *, has_own_file: bool) -> tuple[Path, Path]:
    """Make a checkpoint folder as on the Hub, with a processor, and return it with Mistral's own tokenizer file.

    Args:
        tokenizer: The name of the tokenizer.
        folder: An empty folder.
        has_own_file: Whether Mistral's own file stays in the checkpoint, which a trainer then loads first.
    """
    file = shipped_tokenizer(tokenizer) if tokenizer in SHIPPED else None
    if file is None:
        (folder / "derived").mkdir()
        file = derived_tekken().write_derived(tokenizer, folder / "derived", words=_WORDS)
    checkpoint = folder / "checkpoint"
    write_tiny_base(checkpoint, file, architecture=TinyKind.labelled("wrapped-ministral3").architecture)
    CheckpointTokenizer(checkpoint).fast.save_pretrained(checkpoint)
    for own in (TEKKEN, *(path.name for path in checkpoint.glob("tokenizer.model*"))):
        if not has_own_file:
            (checkpoint / own).unlink(missing_ok=True)
    return checkpoint, file
