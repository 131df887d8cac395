"""The folder that a runner gets as its model: a checkpoint's unchanged tokenizer, and a tiny model beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.facts import programs
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.secrets import is_secret_name
from pytest_mistral_lora.runners.environment import interpreter
from pytest_mistral_lora.runners.given_rows import by_record
from pytest_mistral_lora.runners.process import Ended, read_output, reader_of, run_limited, shown
from pytest_mistral_lora.runners.prompts import prompt_lines, read_prompt
from pytest_mistral_lora.runners.trainer import HARNESS, NOTHING, TIME_LIMIT, TRAINERS, Trainer

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
            found, place = "no tokenizer file", Place.of(tokenizer.path)
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


_ROWS, _ENCODED, _CONFIG = "rows.jsonl", "encoded.jsonl", "config.yaml"
_CHECKPOINT, _HOME, _TEMPORARY = "checkpoint", "home", "tmp"
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Variables that keep any runner from fetching, reporting, and using a GPU."""
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_[A-Z]+|TZ|TERM|COLUMNS|LINES|NO_COLOR|PYTHON\w+|VIRTUAL_ENV|CONDA_PREFIX"
    r"|LD_LIBRARY_PATH|DYLD_\w+|(OMP|MKL|OPENBLAS|NUMEXPR|KMP|GOMP|RAYON|VECLIB)_\w+|XDG_(CACHE|DATA|STATE)_HOME"
    r"|HF_HUB_CACHE|HUGGINGFACE_HUB_CACHE|TIKTOKEN_CACHE_DIR|TORCH_HOME|NLTK_DATA|NUMBA_CACHE_DIR|MPLCONFIGDIR"
    r"|SYSTEMROOT|SYSTEMDRIVE|COMSPEC|PATHEXT|WINDIR|APPDATA|LOCALAPPDATA|PROGRAMDATA|USERPROFILE|NUMBER_OF_PROCESSORS"
)
"""The names of the variables that a runner gets: of the system, of Python, of threads and of local caches.

No list of secrets could be complete, and a trainer reports to every service whose key it finds.
"""
_KEY_FILES = (
    "NETRC",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "BOTO_CONFIG",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
_KEY_FOLDERS = (
    *("CLOUDSDK_CONFIG", "AZURE_CONFIG_DIR", "KAGGLE_CONFIG_DIR", "DOCKER_CONFIG", "GH_CONFIG_DIR", "WANDB_CONFIG_DIR"),
    "MODELSCOPE_CREDENTIALS_PATH",
)
"""Variables that move the files in which libraries look for keys, by default in the home folder."""


def _is_passed(name: str) -> bool:
    return bool(_PASSED.fullmatch(name.upper())) and not is_secret_name(name)


def _environment(runner: Trainer, work: Path, *, is_this_python: bool) -> dict[str, str]:
    """Return the environment of a runner, without a token or key.

    Args:
        runner: The runner. A user's script may run any trainer: it gets the variables of each.
        work: The folder of the run.
        is_this_python: Whether this Python runs it.
    """
    home = str(work / _HOME)
    # caches and temporary files go into a folder that is removed afterwards
    folders = {"HF_HOME": home, "HF_DATASETS_CACHE": f"{home}/datasets", "TMPDIR": str(work / _TEMPORARY)}
    folders |= {"MODELSCOPE_CACHE": f"{home}/modelscope", "HF_TOKEN_PATH": f"{home}/no-token"}
    folders |= dict.fromkeys(_KEY_FILES, os.devnull) | dict.fromkeys(_KEY_FOLDERS, f"{home}/no-keys")
    passed = {name: value for name, value in os.environ.items() if _is_passed(name)}
    # models and data that are already on this machine; the token is beside this folder, not in it
    of_hub = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    passed.setdefault("HF_HUB_CACHE", passed.get("HUGGINGFACE_HUB_CACHE") or f"{os.path.expanduser(of_hub)}/hub")  # noqa: PTH111
    # these variables are for this Python: another Python would import this one's packages
    dropped = () if is_this_python else ("PYTHONPATH", "PYTHONHOME")
    quiet = dict(_QUIET)
    for trainer in (*TRAINERS.of_this_package(), runner):
        quiet |= trainer.variables
    return {name: value for name, value in passed.items() if name not in dropped} | quiet | folders


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
        """The versions, the task and the configuration of the run, and the notes about the rows as a whole.

        The last note is on a trainer that is newer than every fact about it.
        """
        versions = ", ".join(f"{name} {version}" for name, version in self.environment.items())
        config = "no configuration" if self.config == NOTHING else f"configuration {self.config}"
        task = (f"task {self.task}",) if self.task else ()
        newer = (
            f"{name}: {remark}"
            for name, version in self.environment.items()
            if (program := programs().get(name)) is not None
            and program.kind in ("trainer", "evaluator")
            and (remark := program.remark_on(version))
        )
        return "; ".join((versions or "versions not said", *task, config, *self.notes, *newer))


def extract(
    runner: Trainer,
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
    allow_code: bool = False,
) -> Extraction:
    """Let a runner encode rows by its own code, and write the result as encoded rows.

    Only model, data, output, device and precision of the runner's configuration are replaced. A packaged runner gets
    none of its keys that name code, a network or an upload; see `configuration`. The runner runs in the current folder;
    its relative paths start there.

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
        allow_code: Whether the configuration is used unchanged, with the code, networks and uploads that it names.

    Raises:
        RunnerError: If the runner is missing, hangs, passes a limit, refuses its configuration or even a plain row, or
            breaks the contract of its output; if the configuration names code that ids can depend on; or if a row is
            no conversation, and the runner is a packaged one.
        TokenizerError: If the tokenizer cannot be loaded.
    """
    other = next((row for row in rows if not row.kind.is_chat), None)
    if other is not None and runner.module:
        raise RunnerError(
            f"{runner.title} is given conversations, and this row is {other.kind.title}",
            place=other.place,
            next_step="Judge the rows that it has prepared: mistral-lora check FOLDER --tokenizer PATH",
        )
    # in ASCII: a script that splits the text into lines must not split at a line separator within a row
    records = [rows[0].kind.record(rows) for rows in by_record(rows)]
    given = "".join(f"{json.dumps(record)}\n" for record in records)
    source = CheckpointTokenizer(tokenizer, oracle)
    words = [*(["--own-data"] if own_data else []), *(["--task", task] if task else [])]
    chosen = config or runner.default_config(task)
    with _ended(runner, source, given, chosen, python, time_limit, words, allow_code=allow_code) as (file, notes):
        made = read_output(file, reader_of(len(records)))
    write_text(output, "".join(f"{line}\n" for line in made.lines(records)))
    refused = sum("error" in made.records.get(number, {"error": ""}) for number in range(len(records)))
    return Extraction(output, chosen, made.environment, (*made.notes, *notes), refused, task)


def extract_prompts(
    runner: Trainer,
    tokenizer: Path,
    output: Path,
    *,
    config: Path | None,
    python: Path | None = None,
    time_limit: float = TIME_LIMIT,
    oracle: str | None = None,
    allow_code: bool = False,
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
        allow_code: As for `extract`.

    Raises:
        RunnerError: As for `extract`, and if there is no configuration or no prompt.
        TokenizerError: If the tokenizer cannot be loaded.
    """
    if config is None:
        found, expected = f"{runner.title} has no tasks of its own", "a configuration with tasks: --config FILE"
        raise RunnerError(found, place=runner.name, expected=expected)
    source = CheckpointTokenizer(tokenizer, oracle)
    with _ended(runner, source, "", config, python, time_limit, allow_code=allow_code) as (file, left_out):
        made = read_output(file, read_prompt)
    if not made.records:
        notes = "; ".join(made.notes)
        raise RunnerError(f"it made no prompt{notes and f' ({notes})'}", place=str(config), expected="tasks of prompts")
    write_text(output, "".join(f"{line}\n" for line in prompt_lines(made, source.oracle)))
    return Extraction(output, config, made.environment, (*made.notes, *left_out))


@contextmanager
def _ended(
    runner: Trainer,
    tokenizer: CheckpointTokenizer,
    rows: str,
    config: Path,
    python: Path | None,
    time_limit: float,
    words: Sequence[str] = (),
    *,
    allow_code: bool,
) -> Iterator[tuple[Path, Sequence[str]]]:
    """Run a runner's script; yield the file that it wrote, which is removed after the block, and notes on its keys.

    Args:
        runner: The runner.
        tokenizer: The tokenizer to give it.
        rows: The rows to give it, as JSON Lines.
        config: The configuration file.
        python: As for `extract`.
        time_limit: As for `extract`.
        words: Further words of its command line.
        allow_code: As for `extract`.

    Raises:
        RunnerError: As for `extract`.
        TokenizerError: If the tokenizer cannot be loaded.
    """
    if config.is_dir() or not config.exists():
        found = "a folder" if config.is_dir() else "no such file"
        raise RunnerError(found, place=str(config), expected=f"a configuration of {runner.title}")
    # both before the folder is made, which takes seconds
    kept = None
    if runner.module and not allow_code:
        kept = runner.safe_configuration(config, own_data="--own-data" in words)
    found_python = interpreter(runner, python)
    with tempfile.TemporaryDirectory(prefix=f"mistral-{runner.name}-") as temporary:
        work = Path(temporary)
        for name in (_CHECKPOINT, _HOME, _TEMPORARY):
            (work / name).mkdir()
        stage_checkpoint(tokenizer, work / _CHECKPOINT)
        write_text(work / _ROWS, rows)
        if kept is not None:
            write_text(work / _CONFIG, yaml.safe_dump(kept.data, allow_unicode=True, sort_keys=False))
        ended = _run(runner, work, config, found_python, time_limit, words)
        if not (work / _ENCODED).is_file():
            found = f"{runner.title} ends without an error, and wrote no file{shown(ended.tail)}"
            raise RunnerError(found, expected="encoded rows, one JSON object a line, in the file that --output names")
        yield work / _ENCODED, [kept.note] if kept is not None and kept.note else []


def _run(runner: Trainer, work: Path, config: Path, python: Path, time_limit: float, words: Sequence[str]) -> Ended:
    given = work / _CONFIG
    command: list[str | Path] = [python, runner.script.absolute()]
    command += ["--config", given if given.is_file() else config.absolute()]
    for option, name in (("--rows", _ROWS), ("--checkpoint", _CHECKPOINT), ("--output", _ENCODED)):
        command += [option, work / name]
    command += words
    environment = _environment(runner, work, is_this_python=python == Path(sys.executable))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(HARNESS))))
    hint = "; give it fewer rows or more time (--time-limit), or look at what it waits for"
    ended = run_limited(command, seconds=time_limit, folder=Path.cwd(), environment=environment, hint=hint)
    if ended.code:
        raise RunnerError(f"{runner.title} {ended.reason}", place="" if config == NOTHING else str(config))
    return ended
