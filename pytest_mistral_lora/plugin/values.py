"""The values of options and ini keys, each with its source for error messages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.plugin.options import (
    GOLDEN_DIR,
    OPTIONS,
    ORACLE,
    SERVER,
    SERVER_SECONDS,
    TOKENIZER,
    UPDATE,
    WRITTEN,
    Option,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.server_target import ServerChoice
    from pytest_mistral_lora.records.asking_limits import AskingLimits


def option_value(config: pytest.Config, option: Option) -> tuple[Any, str]:
    """Return the value and its source, for error messages: the option, or the key of the ini file.

    Raises:
        pytest.UsageError: If pytest cannot read the value, or it has a null character.
    """
    value, source = config.getoption(option.dest), option.flag
    if value is None and option.ini:
        value, source = ini_value(config, option.ini)
    if any("\0" in str(part) for part in (value if isinstance(value, list) else [value])):
        raise pytest.UsageError(f"{source}: {value!r} has a null character, which no name of a file has")
    return value, source


def ini_value(config: pytest.Config, key: str) -> tuple[Any, str]:
    """Return the value of an ini key, and the key with its file.

    Raises:
        pytest.UsageError: If pytest cannot read the value.
    """
    source = f"{key} in {config.inipath}" if config.inipath else key
    try:
        return config.getini(key), source
    except (pytest.UsageError, TypeError, ValueError) as error:
        # pytest's own message does not always name the key and the file
        raise pytest.UsageError(f"{source}: {error}") from error


def existing_paths(
    config: pytest.Config, option: Option, *, folder: bool = False, file: bool = False
) -> tuple[Path, ...]:
    """Return the paths of a setting, as `shown_path` has them; with `folder` or `file`, each must be of that kind."""
    value, source = option_value(config, option)
    if isinstance(value, str):
        value = [value] if value else []
    paths = tuple(shown_path(config, folder_of(config, option) / path) for path in value or ())
    for path in paths:
        if not _is_there(config, path, source):
            raise pytest.UsageError(f"{source}: no such file or folder: {path}")
        if folder and not path.is_dir():
            raise pytest.UsageError(f"{source}: not a folder: {path}")
        if file and path.is_dir():
            raise pytest.UsageError(f"{source}: a folder: {path}")
    return paths


def _is_there(config: pytest.Config, path: Path, source: str) -> bool:
    try:
        # a fixture runs in a test, which may have changed the working directory
        return (config.invocation_params.dir / path).exists()
    except OSError as error:  # such as an unreadable folder or a name that is too long
        raise pytest.UsageError(f"{source}: {path}: {error.strerror}") from error


def written_file(config: pytest.Config, option: Option, check: Callable[[Path], Path]) -> Path | None:
    """Return the file that an option names for this run to write; None if the option is not given.

    Args:
        config: The configuration of a session.
        option: The option.
        check: Returns the path if it can be written without loss of other data: it is written last, and must not fail a
            long run.
    """
    value, source = option_value(config, option)
    if value is None:
        return None
    from pytest_mistral_lora.errors import InputError

    path = shown_path(config, config.invocation_params.dir / value)
    try:
        return check(path)
    except InputError as error:
        raise pytest.UsageError(f"{source}: {error}") from error


def read_paths(config: pytest.Config) -> Iterator[Path]:
    """Yield every existing path that a setting names, and the paths that a recipe among them names."""
    from pytest_mistral_lora.conformance.path_kinds import paths_behind, paths_in

    for option in OPTIONS:
        value = option_value(config, option)[0] if option.metavar and option not in WRITTEN else None
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str | Path):
                for path in paths_in(str(part), folder_of(config, option)):
                    yield from paths_behind(path)


def shown_path(config: pytest.Config, path: Path) -> Path:
    """Return a path as reports name it: relative to the folder where pytest was started, if it is inside.

    Checks can read this path: they run in that folder, even after a test changed the working directory.
    """
    from pytest_mistral_lora.records.files import path_from

    return path_from(config.invocation_params.dir, path)


def folder_of(config: pytest.Config, option: Option) -> Path:
    """Return the folder of a setting's relative paths: the current folder, or the ini file's."""
    given = config.getoption(option.dest) is not None
    return config.invocation_params.dir if given or not config.inipath else config.inipath.parent


def tokenizer_paths(config: pytest.Config) -> tuple[Path, ...]:
    """Return the tokenizers, as `shown_path` has them; the name of a shipped tokenizer does not change.

    Raises:
        pytest.UsageError: If a tokenizer neither exists nor is shipped.
    """
    from pytest_mistral_lora.conformance.targets import EMBEDDED
    from pytest_mistral_lora.errors import did_you_mean

    values, source = option_value(config, TOKENIZER)
    folder = folder_of(config, TOKENIZER)
    paths: list[Path] = []
    for value in values or ():
        path = folder / value
        # an ini value comes as a path beside the file
        is_there = _is_there(config, shown_path(config, path), source)
        is_name = path.name in EMBEDDED and path.parent == folder and not is_there
        if not is_there and not is_name:
            hint = did_you_mean(path.name, EMBEDDED)
            raise pytest.UsageError(
                f"{source}: no such file or folder: {shown_path(config, path)}{hint}; the names of shipped tokenizers "
                f"are {', '.join(EMBEDDED)}"
            )
        paths.append(Path(path.name) if is_name else shown_path(config, path))
    return tuple(paths)


def oracle_choice(config: pytest.Config) -> str | None:
    """Return the declared oracle: a name, or an absolute path.

    Raises:
        pytest.UsageError: If the value is neither the name of a shipped tokenizer nor a path.
    """
    value, source = option_value(config, ORACLE)
    if not value:
        return None
    from pytest_mistral_lora.checkpoint.recognition import known_choice
    from pytest_mistral_lora.errors import TokenizerError

    try:
        return known_choice(value, folder_of(config, ORACLE))
    except TokenizerError as error:
        raise pytest.UsageError(f"{source}: {error}") from error


def server_choices(config: pytest.Config) -> tuple[ServerChoice, ...]:
    """Return the servers that a run names.

    Raises:
        pytest.UsageError: If a kind or a precision is unknown, or an address is invalid.
    """
    values, source = option_value(config, SERVER)
    if not values:
        return ()
    from pytest_mistral_lora.conformance.server_target import ServerChoice
    from pytest_mistral_lora.errors import InputError

    try:
        return tuple(ServerChoice.parse(value) for value in values)
    except InputError as error:
        raise pytest.UsageError(f"{source}: {error}") from error


def server_limits(config: pytest.Config) -> AskingLimits:
    """Return how a run asks each server.

    Args:
        config: The configuration of a session.

    Raises:
        pytest.UsageError: If the limit is not a whole number from 1 on.
    """
    from pytest_mistral_lora.records.asking_limits import AskingLimits

    return AskingLimits(whole_number(config, SERVER_SECONDS, 0, least=1))


def whole_number(config: pytest.Config, option: Option, default: int, *, least: int) -> int:
    """Return the number that an option names, or the default.

    Raises:
        pytest.UsageError: If it is not a whole number, or is below `least`.
    """
    value, source = option_value(config, option)
    if value in (None, ""):
        return default
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise pytest.UsageError(f"{source}: {value!r}; expected a whole number, {least} or more")
    return number


def check_update(config: pytest.Config, folders: Sequence[Path]) -> None:
    """Refuse to record goldens that nobody would review, or that others rely on.

    Raises:
        pytest.UsageError: If the goldens have no folder, the folder is the packaged one, several workers would write
        the same files, or this is CI.
    """
    from pytest_mistral_lora.records.goldens import goldens_folder

    if not folders:
        raise pytest.UsageError(
            f"{UPDATE.flag}: there is nothing to record; add {GOLDEN_DIR.flag} PATH, a folder with rows in rows.jsonl"
        )
    for folder in folders:
        if folder.resolve().is_relative_to(goldens_folder().resolve()):
            raise pytest.UsageError(
                f"{UPDATE.flag}: {folder} has the packaged goldens, which are never rewritten; give your own folder"
            )
    # `workerinput` marks a worker of pytest-xdist, and `dist` the process that starts the workers
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        raise pytest.UsageError(f"{UPDATE.flag} writes files and cannot be shared between workers; leave out -n")
    if os.environ.get("CI"):
        raise pytest.UsageError(f"{UPDATE.flag} is refused if CI is set: a golden that CI writes guards nothing")
