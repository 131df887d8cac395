"""What a run of the suite was asked for: every option and ini value read once, at configure time, and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.plugin.options import (
    ADAPTER,
    BASE,
    DEVICE,
    ENCODED,
    EXAMPLES,
    GOLDEN_DIR,
    RECIPE,
    REPORT,
    REQUIRE_MANIFEST,
    RUNNER,
    SEED,
    SKIP_TRAINING,
    STRICT,
    TOKENIZER,
    UPDATE,
    XFAILS,
    Option,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.targets import RunnerChoice
    from pytest_mistral_lora.plugin.xfails import Xfail

_DEFAULT_EXAMPLES = 20
_GOLDEN_FILES = ("*.jsonl", "templates/*/*.json", "transcripts/*/*.json")
_DEVICES = ("auto", "cpu", "cuda")
_REPORTS = (".json", ".html")


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """What a run of the suite was asked for, already checked.

    Attributes:
        tokenizers: Tokenizers to judge; with no target of any kind, the embedded default is.
        recipes: Recipes to judge.
        adapters: Adapter folders to judge.
        base: The base checkpoint's folder of the adapters, or None.
        encoded: Encoded-rows files to judge.
        runners: Other trainers to judge.
        require_manifest: Whether an adapter folder without a manifest fails.
        golden_folders: The user's own goldens.
        update: Whether to record them instead of judging by them.
        skip_training: Whether to leave out the end-to-end train.
        device: `auto`, `cpu` or `cuda`.
        examples: Hypothesis examples for each law.
        seed: Seed of the examples, or None for the usual ones.
        strict: Whether notes and things not checked fail.
        xfails: Known deviations that do not fail.
        expects_every_xfail: Whether each of them must be seen: not where other targets are judged than the
            configuration file names, whose list it is.
        report: Where to write the report, or None.
    """

    tokenizers: tuple[Path, ...]
    recipes: tuple[Path, ...]
    adapters: tuple[Path, ...]
    base: Path | None
    encoded: tuple[Path, ...]
    runners: tuple[RunnerChoice, ...]
    require_manifest: bool
    golden_folders: tuple[Path, ...]
    update: bool
    skip_training: bool
    device: str
    examples: int
    seed: int | None
    strict: bool
    xfails: tuple[Xfail, ...]
    expects_every_xfail: bool
    report: Path | None

    @property
    def names_targets(self) -> bool:
        """Whether any target is named: then the embedded default is not judged."""
        return bool(self.tokenizers or self.recipes or self.adapters or self.encoded or self.runners)

    @property
    def target_paths(self) -> tuple[tuple[str, Path], ...]:
        """Each target as it is named on the command line: option and path."""
        groups = (
            (TOKENIZER, self.tokenizers),
            (RECIPE, self.recipes),
            (ADAPTER, self.adapters),
            (BASE, () if self.base is None else (self.base,)),
            (ENCODED, self.encoded),
        )
        return tuple((option.flag, path) for option, paths in groups for path in paths)


def read(config: pytest.Config) -> PluginSettings:
    """Return the settings of a run of the suite.

    Raises:
        pytest.UsageError: If a value cannot be used; it names the key and where it was set.
    """
    settings = PluginSettings(
        tokenizers=_paths(config, TOKENIZER),
        recipes=_recipes(config),
        adapters=_paths(config, ADAPTER, folder=True),
        base=_base(config),
        encoded=_paths(config, ENCODED),
        runners=_runners(config),
        require_manifest=bool(_ini_value(config, REQUIRE_MANIFEST)[0]),
        golden_folders=_golden_folders(config),
        update=bool(config.getoption(UPDATE.dest)),
        skip_training=bool(config.getoption(SKIP_TRAINING.dest)),
        device=_device(config),
        examples=_number(config, EXAMPLES, _DEFAULT_EXAMPLES, least=1),
        seed=_seed(config),
        strict=bool(_value(config, STRICT)[0]),
        xfails=_xfails(config),
        expects_every_xfail=_expects_every_xfail(config),
        report=_report(config),
    )
    if settings.update:
        _check_update(config, settings)
    if settings.encoded and not settings.tokenizers and not settings.recipes:
        raise pytest.UsageError(
            f"{ENCODED.flag}: no tokenizer to hold the rows to; add {TOKENIZER.flag} PATH or {RECIPE.flag} PATH"
        )
    if settings.base is not None and not settings.adapters:
        raise pytest.UsageError(f"{BASE.flag} is the base of adapters, and there is none; add {ADAPTER.flag} PATH")
    return settings


def _value(config: pytest.Config, option: Option) -> tuple[Any, str]:
    """Return a setting and where it was set; the command line replaces the ini file."""
    value = config.getoption(option.dest)
    if value is not None or not option.ini:
        return value, option.flag
    return _ini_value(config, option.ini)


def _ini_value(config: pytest.Config, key: str) -> tuple[Any, str]:
    where = f"{key} in {config.inipath}" if config.inipath else key
    try:
        return config.getini(key), where
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
    return paths


def _golden_folders(config: pytest.Config) -> tuple[Path, ...]:
    folders = _paths(config, GOLDEN_DIR, folder=True)
    for folder in folders:
        if not any(True for pattern in _GOLDEN_FILES for _ in folder.glob(pattern)):
            where = _value(config, GOLDEN_DIR)[1]
            raise pytest.UsageError(f"{where}: neither rows (*.jsonl) nor recorded goldens in {folder}")
    return folders


def _recipes(config: pytest.Config) -> tuple[Path, ...]:
    paths = _paths(config, RECIPE)
    if paths:
        from pytest_mistral_lora.conformance.targets import RecipeTarget
        from pytest_mistral_lora.errors import MistralLoraError

        for path in paths:
            try:
                _ = RecipeTarget(path.name, path).recipe
            except MistralLoraError as error:
                raise pytest.UsageError(f"{_value(config, RECIPE)[1]}: {error}") from error
    return paths


def _runners(config: pytest.Config) -> tuple[RunnerChoice, ...]:
    values, where = _value(config, RUNNER)
    if not values:
        return ()
    from pytest_mistral_lora.conformance.targets import RunnerChoice
    from pytest_mistral_lora.errors import RunnerError

    try:
        return tuple(RunnerChoice.parse(value, _folder_of(config, RUNNER)) for value in values)
    except RunnerError as error:
        raise pytest.UsageError(f"{where}: {error}") from error


def _folder_of(config: pytest.Config, option: Option) -> Path:
    """Return the folder that the paths of a setting are relative to."""
    given = config.getoption(option.dest) is not None
    return config.invocation_params.dir if given or not config.inipath else config.inipath.parent


def _path(config: pytest.Config, option: Option) -> tuple[Path | None, str]:
    """Return the one path of a setting, and where it was set; a path of the ini file is relative to that file."""
    value, where = _value(config, option)
    if not value:
        return None, where
    path = _folder_of(config, option) / value
    if not path.exists():
        raise pytest.UsageError(f"{where}: no such file or folder: {path}")
    return path, where


def _base(config: pytest.Config) -> Path | None:
    path, where = _path(config, BASE)
    if path is not None and not path.is_dir():
        raise pytest.UsageError(f"{where}: not a folder: {path}")
    return path


def _xfails(config: pytest.Config) -> tuple[Xfail, ...]:
    path, where = _path(config, XFAILS)
    if path is None:
        return ()
    from pytest_mistral_lora.plugin.xfails import read as read_xfails

    try:
        return read_xfails(path)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"{where}: {error}") from error


def _expects_every_xfail(config: pytest.Config) -> bool:
    file, where = _value(config, XFAILS)
    named_here = any(config.getoption(option.dest) for option in (TOKENIZER, RECIPE, ADAPTER, ENCODED, RUNNER))
    return not file or where == XFAILS.flag or not named_here


def _device(config: pytest.Config) -> str:
    value, where = _value(config, DEVICE)
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
    return None if config.getoption(SEED.dest) is None else _number(config, SEED, 0, least=0)


def _report(config: pytest.Config) -> Path | None:
    value = config.getoption(REPORT.dest)
    if value is None:
        return None
    path = Path(config.invocation_params.dir, value)
    if path.suffix not in _REPORTS:
        raise pytest.UsageError(f"{REPORT.flag}: {value}; expected a name that ends in {' or '.join(_REPORTS)}")
    if path.is_dir():
        raise pytest.UsageError(f"{REPORT.flag}: a folder: {path}")
    if not path.parent.is_dir():
        raise pytest.UsageError(f"{REPORT.flag}: no such folder: {path.parent}")
    return path


def _check_update(config: pytest.Config, settings: PluginSettings) -> None:
    if not settings.golden_folders:
        raise pytest.UsageError(
            f"{UPDATE.flag}: there is nothing to record; add {GOLDEN_DIR.flag} PATH, a folder with rows in rows.jsonl"
        )
    for folder in settings.golden_folders:
        _refuse_packaged(folder)
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        raise pytest.UsageError(f"{UPDATE.flag} writes files and cannot be shared between workers; leave out -n")
    if os.environ.get("CI"):
        raise pytest.UsageError(f"{UPDATE.flag} is refused where CI is set: a golden that CI writes guards nothing")


def _refuse_packaged(folder: Path) -> None:
    from pytest_mistral_lora.records.goldens import goldens_folder

    if folder.resolve().is_relative_to(goldens_folder().resolve()):
        raise pytest.UsageError(
            f"{UPDATE.flag}: {folder} has the packaged goldens, which are never rewritten; give a folder of your own"
        )
