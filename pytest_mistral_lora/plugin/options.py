"""Options, their ini twins, and the one frozen object that they become at configure time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

IniType = Literal["paths", "string", "bool", "int"]


@dataclass(frozen=True, slots=True)
class Option:
    """An option of the command line and its twin in the ini file.

    Attributes:
        flag: The option.
        help: What it does.
        ini: Name of the twin, or empty if there is none.
        ini_type: The twin's type.
        metavar: Name of the value; empty for a switch.
        repeatable: Whether it may be given several times.
    """

    flag: str
    help: str
    ini: str = ""
    ini_type: IniType = "string"
    metavar: str = ""
    repeatable: bool = False

    @property
    def dest(self) -> str:
        """Name of the parsed value."""
        return self.flag.removeprefix("--").replace("-", "_")


_GOLDEN = Option(
    "--mistral-golden",
    "Collect and run the Mistral conformance suite, beside whatever else was asked for. With no path given and no "
    "testpaths, only the suite. Names no target: every tokenizer that mistral-common ships, and a tiny LoRA train.",
)
_TOKENIZER = Option(
    "--mistral-tokenizer",
    "Judge this tokenizer or checkpoint folder, or single tokenizer file (*.model.vN, tekken.json). Repeatable. "
    "Replaces the embedded default.",
    "mistral_tokenizers",
    "paths",
    "PATH",
    repeatable=True,
)
_GOLDEN_DIR = Option(
    "--mistral-golden-dir",
    "Your own goldens: rows in *.jsonl, and what was recorded of them under templates/<target>/. Repeatable.",
    "mistral_golden_dirs",
    "paths",
    "PATH",
    repeatable=True,
)
_UPDATE = Option(
    "--mistral-golden-update",
    "Record or rewrite the goldens of --mistral-golden-dir from its rows, and list each file. "
    "Refused where CI is set and with pytest-xdist.",
)
_SKIP_TRAINING = Option("--mistral-golden-skip-training", "Leave out the end-to-end train.")
_DEVICE = Option(
    "--mistral-device", "Where models run: auto (default), cpu or cuda.", "mistral_device", "string", "DEVICE"
)
_EXAMPLES = Option(
    "--mistral-examples", "Hypothesis examples for each law (default 20).", "mistral_examples", "int", "N"
)
_SEED = Option("--mistral-seed", "Explore other Hypothesis examples than the usual ones.", metavar="N")
_STRICT = Option("--mistral-strict", "Notes and things that could not be checked fail too.", "mistral_strict", "bool")
_REPORT = Option("--mistral-report", "Write every check and finding to this file (.json).", metavar="PATH")

OPTIONS = (
    _GOLDEN,
    _TOKENIZER,
    _GOLDEN_DIR,
    _UPDATE,
    _SKIP_TRAINING,
    _DEVICE,
    _EXAMPLES,
    _SEED,
    _STRICT,
    _REPORT,
)
"""Every option; the help text is made from this table."""

PATH_FLAGS = tuple(option.flag for option in OPTIONS if option.metavar == "PATH")
"""The options that take a path."""

_DEFAULT_EXAMPLES = 20
_GOLDEN_FILES = ("*.jsonl", "templates/*/*.json")
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """What a run of the suite was asked for, already checked.

    Attributes:
        tokenizers: Paths to judge; empty for the embedded default.
        golden_folders: The user's own goldens.
        update: Whether to record them instead of judging by them.
        skip_training: Whether to leave out the end-to-end train.
        device: `auto`, `cpu` or `cuda`.
        examples: Hypothesis examples for each law.
        seed: Seed of the examples, or None for the usual ones.
        strict: Whether notes and things not checked fail.
        report: Where to write the report, or None.
    """

    tokenizers: tuple[Path, ...]
    golden_folders: tuple[Path, ...]
    update: bool
    skip_training: bool
    device: str
    examples: int
    seed: int | None
    strict: bool
    report: Path | None


def add(parser: pytest.Parser) -> None:
    """Add every option and ini twin to pytest's parser."""
    group = parser.getgroup("mistral", "Mistral LoRA conformance")
    for option in OPTIONS:
        if option.metavar:
            action = "append" if option.repeatable else "store"
            group.addoption(option.flag, action=action, metavar=option.metavar, help=option.help)
        else:
            group.addoption(option.flag, action="store_true", default=None, help=option.help)
        if option.ini:
            parser.addini(option.ini, f"{option.help} (as {option.flag})", type=option.ini_type, default=None)


def read(config: pytest.Config) -> PluginSettings | None:
    """Return the settings of this run, or None if the suite was not asked for.

    Raises:
        pytest.UsageError: If a value cannot be used; it names the key and where it was set.
    """
    if not config.getoption(_GOLDEN.dest):
        _refuse_without_golden(config)
        return None
    settings = PluginSettings(
        tokenizers=_paths(config, _TOKENIZER),
        golden_folders=_paths(config, _GOLDEN_DIR, folder=True),
        update=bool(config.getoption(_UPDATE.dest)),
        skip_training=bool(config.getoption(_SKIP_TRAINING.dest)),
        device=_device(config),
        examples=_number(config, _EXAMPLES, _DEFAULT_EXAMPLES, least=1),
        seed=_seed(config),
        strict=bool(_value(config, _STRICT)[0]),
        report=_report(config),
    )
    if settings.update:
        _check_update(config, settings)
    return settings


def _refuse_without_golden(config: pytest.Config) -> None:
    given = [option.flag for option in OPTIONS if config.getoption(option.dest)]
    if given:
        raise pytest.UsageError(f"{given[0]} has no effect without {_GOLDEN.flag}; add it, or leave {given[0]} out")


def _value(config: pytest.Config, option: Option) -> tuple[Any, str]:
    """Return a setting and where it was set; the command line replaces the ini file."""
    value = config.getoption(option.dest)
    if value is not None or not option.ini:
        return value, option.flag
    where = f"{option.ini} in {config.inipath}" if config.inipath else option.ini
    try:
        return config.getini(option.ini), where
    except (pytest.UsageError, TypeError, ValueError) as error:
        # pytest says what is wrong, but not always with which key and file
        raise pytest.UsageError(f"{where}: {error}") from error


def _paths(config: pytest.Config, option: Option, *, folder: bool = False) -> tuple[Path, ...]:
    values, where = _value(config, option)
    base = config.invocation_params.dir
    paths = tuple(base / value if isinstance(value, str) else value for value in values or ())
    for path in paths:
        if not path.exists():
            raise pytest.UsageError(f"{where}: no such file or folder: {path}")
        if folder and not path.is_dir():
            raise pytest.UsageError(f"{where}: not a folder: {path}")
        if folder and not any(True for pattern in _GOLDEN_FILES for _ in path.glob(pattern)):
            raise pytest.UsageError(f"{where}: neither rows (*.jsonl) nor recorded goldens in {path}")
    return paths


def _device(config: pytest.Config) -> str:
    value, where = _value(config, _DEVICE)
    device = value or "auto"
    if device not in _DEVICES:
        raise pytest.UsageError(f"{where}: {device!r}; expected one of {', '.join(_DEVICES)}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError(f"{where}: cuda, but torch {torch.__version__} finds no CUDA device here")
    return str(device)


def _number(config: pytest.Config, option: Option, default: int, *, least: int) -> int:
    value, where = _value(config, option)
    if value in (None, ""):
        return default
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise pytest.UsageError(f"{where}: {value!r}; expected a whole number from {least} on")
    return number


def _seed(config: pytest.Config) -> int | None:
    return None if config.getoption(_SEED.dest) is None else _number(config, _SEED, 0, least=0)


def _report(config: pytest.Config) -> Path | None:
    value = config.getoption(_REPORT.dest)
    if value is None:
        return None
    path = Path(config.invocation_params.dir, value)
    if path.suffix != ".json":
        raise pytest.UsageError(f"{_REPORT.flag}: {value}; expected a name that ends in .json")
    if path.is_dir():
        raise pytest.UsageError(f"{_REPORT.flag}: a folder: {path}")
    if not path.parent.is_dir():
        raise pytest.UsageError(f"{_REPORT.flag}: no such folder: {path.parent}")
    return path


def _check_update(config: pytest.Config, settings: PluginSettings) -> None:
    if not settings.golden_folders:
        raise pytest.UsageError(f"{_UPDATE.flag}: there is nothing to record; add {_GOLDEN_DIR.flag} PATH")
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        raise pytest.UsageError(f"{_UPDATE.flag} writes files and cannot be shared between workers; leave out -n")
    if os.environ.get("CI"):
        raise pytest.UsageError(f"{_UPDATE.flag} is refused where CI is set: a golden that CI writes guards nothing")
