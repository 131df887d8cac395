"""The settings of a run: every option and ini value, read and checked once, when pytest is configured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_mistral_lora.places import Place
from pytest_mistral_lora.plugin.options import (
    ADAPTER,
    ALLOW_CODE,
    BASE,
    DATASET,
    DEVICE,
    ENCODED,
    EXAMPLES,
    FAIL_ON,
    GGUF,
    GOLDEN_DIR,
    NO_TRAIN,
    OBJECTIVE,
    OUTPUT_FORMAT,
    RECIPE,
    REPORT,
    REQUIRE_MANIFEST,
    RULES,
    RUNNER,
    SEED,
    SERVER,
    SERVER_ANSWERS,
    SERVER_ROWS,
    SERVER_SECONDS,
    TOKENIZER,
    UPDATE,
    WRITE_XFAILS,
    XFAILS,
)
from pytest_mistral_lora.plugin.values import (
    check_update,
    existing_paths,
    folder_of,
    ini_value,
    option_value,
    oracle_choice,
    read_paths,
    server_choices,
    server_limits,
    shown_path,
    tokenizer_paths,
    whole_number,
    written_file,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.objective import Declaration
    from pytest_mistral_lora.conformance.check_options import CheckOptions
    from pytest_mistral_lora.conformance.rule_set import RuleSet
    from pytest_mistral_lora.conformance.server_target import ServerChoice
    from pytest_mistral_lora.conformance.targets import RunnerChoice
    from pytest_mistral_lora.records.asking_limits import AskingLimits

_DEFAULT_EXAMPLES = 20
_GOLDEN_FILES = ("*.jsonl", "templates/*/*.json", "transcripts/*/*.json")
_DEVICES = ("auto", "cpu", "cuda")
_OUTPUT_FORMATS = ("text", "github")


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """The settings of a run of the suite, already checked.

    Attributes:
        tokenizers: Tokenizer files, checkpoint folders and names of shipped tokenizers, to check or to encode rows.
        recipes: Recipes to check.
        datasets: Files of rows to check.
        adapters: Adapter folders to check.
        base: Base checkpoint's folder of the adapters, or None.
        oracle: The declared oracle of folders without a Mistral tokenizer file, or None.
        objective: The declared objective of rows, encoded rows and runners, or None.
        encoded: Encoded-rows files to check.
        ggufs: GGUF files to check.
        servers: Running servers to check, each by its kind, its address, its version and its precision.
        server_rows: Files of rows to ask each server in place of the packaged ones.
        server_answers: Whether each server is asked for the known answers, too.
        server_limits: The limits of the requests to each server.
        runners: Other trainers to check.
        allow_code: Whether their configurations are used unchanged, with the code that they name.
        require_manifest: Whether an adapter folder without a manifest fails.
        golden_folders: Folders with the user's own goldens.
        update: Whether to record these goldens instead of comparing with them.
        options: What is judged by, and what fails.
        leaves_out_targets: Whether the command line replaces targets of the ini file.
        output_format: `text` or `github`.
        report: The file for the report, or None.
    """

    tokenizers: tuple[Path, ...]
    recipes: tuple[Path, ...]
    datasets: tuple[Path, ...]
    adapters: tuple[Path, ...]
    base: Path | None
    oracle: str | None
    objective: Declaration | None
    encoded: tuple[Path, ...]
    ggufs: tuple[Path, ...]
    servers: tuple[ServerChoice, ...]
    server_rows: tuple[Path, ...]
    server_answers: bool
    server_limits: AskingLimits
    runners: tuple[RunnerChoice, ...]
    allow_code: bool
    require_manifest: bool
    golden_folders: tuple[Path, ...]
    update: bool
    options: CheckOptions
    leaves_out_targets: bool
    output_format: str
    report: Path | None

    @property
    def names_targets(self) -> bool:
        """Whether any target is named, which replaces the embedded default."""
        return bool(self.target_paths or self.runners or self.servers)

    @property
    def target_paths(self) -> tuple[tuple[str, Path], ...]:
        """The option and the path of each target, as a command line names them."""
        groups = (
            (TOKENIZER, self.tokenizers),
            (RECIPE, self.recipes),
            (DATASET, self.datasets),
            (ADAPTER, self.adapters),
            (BASE, () if self.base is None else (self.base,)),
            (ENCODED, self.encoded),
            (GGUF, self.ggufs),
            (SERVER_ROWS, self.server_rows),
        )
        return tuple((option.flag, path) for option, paths in groups for path in paths)


def read_settings(config: pytest.Config) -> PluginSettings:
    """Read and check the settings of a run of the suite.

    Raises:
        pytest.UsageError: If a value is invalid; with the option, or the key and its file.
    """
    oracle = oracle_choice(config)
    settings = PluginSettings(
        tokenizers=tokenizer_paths(config),
        recipes=existing_paths(config, RECIPE, file=True),
        datasets=existing_paths(config, DATASET),
        adapters=existing_paths(config, ADAPTER, folder=True),
        base=next(iter(existing_paths(config, BASE, folder=True)), None),
        oracle=None if oracle is None else str(shown_path(config, Path(oracle))),
        objective=_objective(config),
        encoded=existing_paths(config, ENCODED),
        ggufs=existing_paths(config, GGUF, file=True),
        servers=server_choices(config),
        server_rows=existing_paths(config, SERVER_ROWS, file=True),
        server_answers=bool(option_value(config, SERVER_ANSWERS)[0]),
        server_limits=server_limits(config),
        runners=_runner_choices(config),
        allow_code=bool(option_value(config, ALLOW_CODE)[0]),
        require_manifest=bool(ini_value(config, REQUIRE_MANIFEST)[0]),
        golden_folders=_golden_folders(config),
        update=bool(config.getoption(UPDATE.dest)),
        options=_check_options(config),
        leaves_out_targets=_leaves_out_targets(config),
        output_format=_output_format(config),
        report=written_file(config, REPORT, _report_file),
    )
    _refuse_clashes(config, settings)
    if settings.update:
        check_update(config, settings.golden_folders)
    if (settings.encoded or settings.datasets) and not settings.tokenizers and not settings.recipes:
        flag = DATASET.flag if settings.datasets else ENCODED.flag
        named = f"PATH (a shipped one: {TOKENIZER.flag}=spm-v3)" if settings.datasets else "PATH"
        raise pytest.UsageError(
            f"{flag}: no tokenizer to check the rows against; add {TOKENIZER.flag} {named} or {RECIPE.flag} PATH"
        )
    if settings.servers and not settings.tokenizers and not settings.recipes:
        raise pytest.UsageError(
            f"{SERVER.flag}: no tokenizer to check the prompts against; add {TOKENIZER.flag} PATH or {RECIPE.flag} PATH"
        )
    if settings.server_rows and not settings.servers:
        raise pytest.UsageError(f"{SERVER_ROWS.flag} is for a server, and none is named; add {SERVER.flag} URL")
    if settings.server_answers and not settings.servers:
        raise pytest.UsageError(f"{SERVER_ANSWERS.flag} is for a server, and none is named; add {SERVER.flag} URL")
    if settings.server_limits.seconds and all(server.is_parsers for server in settings.servers):
        raise pytest.UsageError(
            f"{SERVER_SECONDS.flag} is for a running server, and none is named; add {SERVER.flag} URL"
        )
    if settings.base is not None and not settings.adapters and not settings.ggufs:
        raise pytest.UsageError(f"{BASE.flag} is the base of adapters, and there is none; add {ADAPTER.flag} PATH")
    if settings.objective is not None and not (settings.datasets or settings.encoded or settings.runners):
        raise pytest.UsageError(
            f"{OBJECTIVE.flag} is for rows, encoded rows and runners, and none is named; add {DATASET.flag}, "
            f"{ENCODED.flag} or {RUNNER.flag}. A recipe has the key training.objective"
        )
    return settings


def _leaves_out_targets(config: pytest.Config) -> bool:
    """Return whether an option replaces targets of the ini file, whose known deviations this run then cannot meet."""
    targets = (TOKENIZER, RECIPE, DATASET, ADAPTER, ENCODED, GGUF, SERVER, RUNNER)
    return any(config.getoption(option.dest) and ini_value(config, option.ini)[0] for option in targets)


def _new_file(path: Path) -> Path:
    from pytest_mistral_lora.conformance.check_options import require_new
    from pytest_mistral_lora.records.files import require_writable

    return require_writable(require_new(path, ""))


def _report_file(path: Path) -> Path:
    from pytest_mistral_lora.report import require_report_file

    return require_report_file(path)


def _refuse_clashes(config: pytest.Config, settings: PluginSettings) -> None:
    """Refuse a file to write that meets a path to read, or another file to write."""
    written = {WRITE_XFAILS.flag: settings.options.write_xfails, REPORT.flag: settings.report}
    outputs = {flag: [path] for flag, path in written.items() if path is not None}
    if not outputs:
        return
    from pytest_mistral_lora.errors import InputError
    from pytest_mistral_lora.records.files import refuse_input_as_output
    from pytest_mistral_lora.report import rows_page

    if settings.report is not None:
        outputs[f"{REPORT.flag}, the page beside it"] = [rows_page(settings.report)]
    try:
        refuse_input_as_output(outputs, read_paths(config))
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def _golden_folders(config: pytest.Config) -> tuple[Path, ...]:
    folders = existing_paths(config, GOLDEN_DIR, folder=True)
    if config.getoption(UPDATE.dest) and any(option_value(config, option)[0] for option in (TOKENIZER, RECIPE)):
        return folders  # an empty folder gets recordings of the packaged rows
    # otherwise, a run with a misspelt folder would compare nothing and pass
    for folder in folders:
        if not any(True for pattern in _GOLDEN_FILES for _ in folder.glob(pattern)):
            source = option_value(config, GOLDEN_DIR)[1]
            from pytest_mistral_lora.chat.remedies import DATA_SUFFIXES, import_step

            data = next((file for file in sorted(folder.glob("*")) if file.name.endswith(DATA_SUFFIXES)), None)
            step = "" if data is None else f". {import_step(str(data))}"
            raise pytest.UsageError(f"{source}: neither rows (*.jsonl) nor recorded goldens in {folder}{step}")
    return folders


def _runner_choices(config: pytest.Config) -> tuple[RunnerChoice, ...]:
    values, source = option_value(config, RUNNER)
    if not values:
        return ()
    from pytest_mistral_lora.conformance.targets import RunnerChoice
    from pytest_mistral_lora.errors import RunnerError

    try:
        return tuple(RunnerChoice.parse(value, shown_path(config, folder_of(config, RUNNER))) for value in values)
    except RunnerError as error:
        raise pytest.UsageError(f"{source}: {error}") from error


def _check_options(config: pytest.Config) -> CheckOptions:
    from pytest_mistral_lora.conformance.check_options import CheckOptions, parse_fail_on
    from pytest_mistral_lora.conformance.known import known_deviations
    from pytest_mistral_lora.errors import InputError

    (fail_on, fail_on_source), (_, xfails_source) = option_value(config, FAIL_ON), option_value(config, XFAILS)
    try:
        return CheckOptions(
            examples=whole_number(config, EXAMPLES, _DEFAULT_EXAMPLES, least=1),
            seed=None if config.getoption(SEED.dest) is None else whole_number(config, SEED, 0, least=0),
            device=_device_name(config),
            train=not config.getoption(NO_TRAIN.dest),
            fail_on=parse_fail_on(fail_on, fail_on_source),
            xfails=known_deviations(next(iter(existing_paths(config, XFAILS)), None), xfails_source),
            rules=_rules(config),
            write_xfails=written_file(config, WRITE_XFAILS, _new_file),
        )
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def _objective(config: pytest.Config) -> Declaration | None:
    value, source = option_value(config, OBJECTIVE)
    if value is None or (not value and source != OBJECTIVE.flag):
        return None
    # targets of the command line replace those of the ini file, and what it says about them
    is_option = source == OBJECTIVE.flag
    if (
        not is_option
        and _leaves_out_targets(config)
        and not any(config.getoption(option.dest) for option in (DATASET, ENCODED, RUNNER))
    ):
        return None
    from pytest_mistral_lora.chat.objective import Declaration, Objective
    from pytest_mistral_lora.errors import InputError

    try:
        return Declaration(Objective.of(value, source), OBJECTIVE.flag if is_option else OBJECTIVE.ini)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def _rules(config: pytest.Config) -> RuleSet | None:
    value, source = option_value(config, RULES)
    if not value:
        return None
    from pytest_mistral_lora.conformance.rule_set import RuleSet
    from pytest_mistral_lora.errors import InputError

    try:
        return RuleSet.of(value, source)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def _device_name(config: pytest.Config) -> str:
    value, source = option_value(config, DEVICE)
    device = value or "auto"
    if device not in _DEVICES:
        raise pytest.UsageError(f"{source}: {device!r}; expected one of {', '.join(_DEVICES)}")
    # refused here, not by the models: a run on the CPU would pass without the requested checks
    if device == "cuda":
        from pytest_mistral_lora.checkpoint.devices import choose_device
        from pytest_mistral_lora.errors import InputError

        try:
            choose_device(device, place=Place.of(source))
        except InputError as error:
            raise pytest.UsageError(str(error)) from error
    return str(device)


def _output_format(config: pytest.Config) -> str:
    value, source = option_value(config, OUTPUT_FORMAT)
    if not value:
        from pytest_mistral_lora.report.github import in_workflow

        return "github" if in_workflow() else "text"
    if value not in _OUTPUT_FORMATS:
        raise pytest.UsageError(f"{source}: {value!r}; expected one of {', '.join(_OUTPUT_FORMATS)}")
    return str(value)
