"""The settings of a run: every option and ini value, read and checked once, when pytest is configured."""

from __future__ import annotations

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
    ORACLE,
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
    check_update,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.targets import RunnerChoice
    from pytest_mistral_lora.plugin.items import Xfail

_DEFAULT_EXAMPLES = 20
_GOLDEN_FILES = ("*.jsonl", "templates/*/*.json", "transcripts/*/*.json")
_DEVICES = ("auto", "cpu", "cuda")
_REPORTS = (".json", ".html")


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """The settings of a run of the suite, already checked.

    Attributes:
        tokenizers: Tokenizer files and checkpoint folders to check.
        recipes: Recipes to check.
        adapters: Adapter folders to check.
        base: Base checkpoint's folder of the adapters, or None.
        oracle: The declared oracle of folders without a Mistral tokenizer file, or None.
        encoded: Encoded-rows files to check.
        runners: Other trainers to check.
        require_manifest: Whether an adapter folder without a manifest fails.
        golden_folders: Folders with the user's own goldens.
        update: Whether to record these goldens instead of comparing with them.
        skip_training: Whether to leave out the end-to-end train.
        device: `auto`, `cpu` or `cuda`.
        examples: Hypothesis examples for each law.
        seed: Seed of the examples, or None for the same examples in every run.
        strict: Whether notes and checks that could not run fail, too.
        xfails: Known deviations that do not fail.
        expects_every_xfail: Whether an xfail that matches nothing is an error.
        report: The file for the report, or None.
    """

    tokenizers: tuple[Path, ...]
    recipes: tuple[Path, ...]
    adapters: tuple[Path, ...]
    base: Path | None
    oracle: str | None
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
        """Whether any target is named, which replaces the embedded default."""
        return bool(self.tokenizers or self.recipes or self.adapters or self.encoded or self.runners)

    @property
    def target_paths(self) -> tuple[tuple[str, Path], ...]:
        """The option and the path of each target, as a command line names them."""
        groups = (
            (TOKENIZER, self.tokenizers),
            (RECIPE, self.recipes),
            (ADAPTER, self.adapters),
            (BASE, () if self.base is None else (self.base,)),
            (ENCODED, self.encoded),
        )
        return tuple((option.flag, path) for option, paths in groups for path in paths)


def read_settings(config: pytest.Config) -> PluginSettings:
    """Read and check the settings of a run of the suite.

    Raises:
        pytest.UsageError: If a value cannot be used; with the option, or the key and its file.
    """
    # A list of known deviations in the ini file is about the targets of the ini file. With other targets on the
    # command line, an xfail that matches nothing is no sign that it is out of date.
    xfails_file, xfails_source = _option_value(config, XFAILS)
    other_targets = any(config.getoption(option.dest) for option in (TOKENIZER, RECIPE, ADAPTER, ENCODED, RUNNER))
    settings = PluginSettings(
        tokenizers=_existing_paths(config, TOKENIZER),
        recipes=_existing_paths(config, RECIPE, file=True),
        adapters=_existing_paths(config, ADAPTER, folder=True),
        base=next(iter(_existing_paths(config, BASE, folder=True)), None),
        oracle=oracle_choice(config),
        encoded=_existing_paths(config, ENCODED),
        runners=_runner_choices(config),
        require_manifest=bool(_ini_value(config, REQUIRE_MANIFEST)[0]),
        golden_folders=_golden_folders(config),
        update=bool(config.getoption(UPDATE.dest)),
        skip_training=bool(config.getoption(SKIP_TRAINING.dest)),
        device=_device_name(config),
        examples=_whole_number(config, EXAMPLES, _DEFAULT_EXAMPLES, least=1),
        seed=None if config.getoption(SEED.dest) is None else _whole_number(config, SEED, 0, least=0),
        strict=bool(_option_value(config, STRICT)[0]),
        xfails=_known_deviations(config),
        expects_every_xfail=not xfails_file or xfails_source == XFAILS.flag or not other_targets,
        report=_report_file(config),
    )
    if settings.update:
        check_update(config, settings.golden_folders)
    if settings.encoded and not settings.tokenizers and not settings.recipes:
        raise pytest.UsageError(
            f"{ENCODED.flag}: no tokenizer to check the rows against; add {TOKENIZER.flag} PATH or {RECIPE.flag} PATH"
        )
    if settings.base is not None and not settings.adapters:
        raise pytest.UsageError(f"{BASE.flag} is the base of adapters, and there is none; add {ADAPTER.flag} PATH")
    return settings


def oracle_choice(config: pytest.Config) -> str | None:
    """Return the declared oracle: a name, or an absolute path.

    Raises:
        pytest.UsageError: If it is neither the name of a shipped tokenizer nor a path.
    """
    value, source = _option_value(config, ORACLE)
    if not value:
        return None
    from pytest_mistral_lora.checkpoint.recognition import known_choice
    from pytest_mistral_lora.errors import TokenizerError

    try:
        return known_choice(value, _folder_of(config, ORACLE))
    except TokenizerError as error:
        raise pytest.UsageError(f"{source}: {error}") from error


def _option_value(config: pytest.Config, option: Option) -> tuple[Any, str]:
    """Return the value and its source, for error messages: the option, or the key of the ini file."""
    value = config.getoption(option.dest)
    if value is not None or not option.ini:
        return value, option.flag
    return _ini_value(config, option.ini)


def _ini_value(config: pytest.Config, key: str) -> tuple[Any, str]:
    source = f"{key} in {config.inipath}" if config.inipath else key
    try:
        return config.getini(key), source
    except (pytest.UsageError, TypeError, ValueError) as error:
        # pytest's own message does not always name the key and the file
        raise pytest.UsageError(f"{source}: {error}") from error


def _existing_paths(
    config: pytest.Config, option: Option, *, folder: bool = False, file: bool = False
) -> tuple[Path, ...]:
    """Return the paths of a setting, absolute; with `folder` or `file`, each must be one."""
    value, source = _option_value(config, option)
    values = ([value] if value else []) if isinstance(value, str) else value or []
    paths = tuple(_folder_of(config, option) / one for one in values)
    for path in paths:
        if not path.exists():
            raise pytest.UsageError(f"{source}: no such file or folder: {path}")
        if folder and not path.is_dir():
            raise pytest.UsageError(f"{source}: not a folder: {path}")
        if file and path.is_dir():
            raise pytest.UsageError(f"{source}: a folder: {path}")
    return paths


def _folder_of(config: pytest.Config, option: Option) -> Path:
    """Return the folder to which the paths of a setting are relative: the current one, or that of the ini file."""
    given = config.getoption(option.dest) is not None
    return config.invocation_params.dir if given or not config.inipath else config.inipath.parent


def _golden_folders(config: pytest.Config) -> tuple[Path, ...]:
    folders = _existing_paths(config, GOLDEN_DIR, folder=True)
    # a misspelt folder would otherwise be a green run that has compared nothing
    for folder in folders:
        if not any(True for pattern in _GOLDEN_FILES for _ in folder.glob(pattern)):
            source = _option_value(config, GOLDEN_DIR)[1]
            raise pytest.UsageError(f"{source}: neither rows (*.jsonl) nor recorded goldens in {folder}")
    return folders


def _runner_choices(config: pytest.Config) -> tuple[RunnerChoice, ...]:
    values, source = _option_value(config, RUNNER)
    if not values:
        return ()
    from pytest_mistral_lora.conformance.targets import RunnerChoice
    from pytest_mistral_lora.errors import RunnerError

    try:
        return tuple(RunnerChoice.parse(value, _folder_of(config, RUNNER)) for value in values)
    except RunnerError as error:
        raise pytest.UsageError(f"{source}: {error}") from error


def _known_deviations(config: pytest.Config) -> tuple[Xfail, ...]:
    from pytest_mistral_lora.plugin.items import read_xfails

    try:
        return tuple(xfail for path in _existing_paths(config, XFAILS) for xfail in read_xfails(path))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"{_option_value(config, XFAILS)[1]}: {error}") from error


def _device_name(config: pytest.Config) -> str:
    value, source = _option_value(config, DEVICE)
    device = value or "auto"
    if device not in _DEVICES:
        raise pytest.UsageError(f"{source}: {device!r}; expected one of {', '.join(_DEVICES)}")
    # refused here, not left to the models: a run on the CPU would pass without the checks that were asked for
    if device == "cuda":
        from pytest_mistral_lora.checkpoint.base_model import choose_device
        from pytest_mistral_lora.errors import InputError

        try:
            choose_device(device, place=source)
        except InputError as error:
            raise pytest.UsageError(str(error)) from error
    return str(device)


def _whole_number(config: pytest.Config, option: Option, default: int, *, least: int) -> int:
    value, source = _option_value(config, option)
    if value in (None, ""):
        return default
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise pytest.UsageError(f"{source}: {value!r}; expected a whole number, {least} or more")
    return number


def _report_file(config: pytest.Config) -> Path | None:
    value = config.getoption(REPORT.dest)
    if value is None:
        return None
    path = Path(config.invocation_params.dir, value)
    if path.suffix not in _REPORTS:
        raise pytest.UsageError(f"{REPORT.flag}: {value}; expected a name that ends in {' or '.join(_REPORTS)}")
    # the report is written last: a path that cannot be written must not end a long run
    if path.is_dir():
        raise pytest.UsageError(f"{REPORT.flag}: a folder: {path}")
    if not path.parent.is_dir():
        raise pytest.UsageError(f"{REPORT.flag}: no such folder: {path.parent}")
    return path
