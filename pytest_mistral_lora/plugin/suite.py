"""The suite in one pytest session: its hooks collect the checks, gather their results and print the summary."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import chdir
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.conformance.checks import ROOT
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.plugin.items import CheckItem, SuiteCollector
from pytest_mistral_lora.plugin.options import PATH_FLAGS
from pytest_mistral_lora.plugin.settings import PluginSettings
from pytest_mistral_lora.plugin.summary import (
    OUTCOME,
    FailedChecks,
    write_annotations,
    write_left_out_tests,
    write_line,
    write_next,
    write_summary,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.session import Session
    from pytest_mistral_lora.conformance.targets import Target

_WORK = "mistral_lora_work"
_COLLECTED = "mistral_lora_collected"


class Suite:
    """Hooks of a pytest session that runs the suite.

    Attributes:
        settings: The settings of the run.
    """

    def __init__(self, config: pytest.Config, settings: PluginSettings) -> None:
        self.settings = settings
        worker = getattr(config, "workerinput", None)
        self._is_worker = worker is not None
        # paths of the settings are relative to it, and a user's test may change the working directory
        self._home = config.invocation_params.dir
        self._failed = FailedChecks(fails_notes=settings.options.fails_notes)
        self._leaves_out_tests = False
        if not self._is_worker:
            config.pluginmanager.register(self._failed, "mistral_lora_failed_checks")
        if worker:
            self._work_folder = Path(worker[_WORK])
        else:
            self._work_folder = Path(tempfile.mkdtemp(prefix="mistral-golden-"))
            # not in pytest_sessionfinish: --help and a later usage error configure pytest, but start no session
            config.add_cleanup(partial(shutil.rmtree, self._work_folder, ignore_errors=True))
        # With neither paths nor `testpaths`, pytest would collect the current folder beside the suite. `args` is not
        # public, but there is no other way to prevent it.
        if config.args_source == pytest.Config.ArgsSource.INVOCATION_DIR:
            config.args = []
            # `-o testpaths=` asks for the suite alone
            self._leaves_out_tests = not any(
                given.startswith("testpaths=") for given in config.option.override_ini or ()
            )

    @cached_property
    def session(self) -> Session:
        """The run of the suite.

        With pytest-xdist, each worker has its own suite, and the first process's suite takes the outcomes of all
        workers.
        """
        from pytest_mistral_lora.conformance.session import Session

        given = self.settings
        settings = given.options.settings(
            golden_folders=given.golden_folders,
            update=given.update,
            shared_folder=self._work_folder,
            require_manifest=given.require_manifest,
        )
        return Session(self._targets, settings, given.options, leaves_out_targets=given.leaves_out_targets)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Begin the run of the suite, and start its clock.

        Raises:
            pytest.UsageError: If the tokenizer or the rows of a target do not take the declared objective.
        """
        _ = self.session
        if self.settings.objective is not None:
            self._require_objective()

    def _require_objective(self) -> None:
        from pytest_mistral_lora.conformance.collection import require_objectives
        from pytest_mistral_lora.errors import InputError, MistralLoraError

        try:
            targets = self.session.targets
        except MistralLoraError:
            return  # the collection reports it
        try:
            with chdir(self._home):
                require_objectives(targets)
        except InputError as error:
            raise pytest.UsageError(str(error)) from error

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Give a worker of pytest-xdist the folder that all workers share."""
        node.workerinput[_WORK] = str(self._work_folder)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the counts of a worker; all workers collect and deselect the same checks."""
        session = self.session
        known = (session.collected, session.deselected)
        session.collected, session.deselected = getattr(node, "workeroutput", {}).get(_COLLECTED, known)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the checks, before `-k`, `-m` and `--lf` choose among the items."""
        # pytest's own collection walks files, and the suite has none: call its collector here, with its own report.
        # Errors of the targets are raised, and reported, in the collector.
        suite = SuiteCollector.from_parent(
            session,
            name=ROOT,
            nodeid=ROOT,
            checks=self.session.collect(),
            suite_session=self.session,
            settings=self.settings,
        )
        with chdir(self._home):
            report = session.ihook.pytest_make_collect_report(collector=suite)
        session.ihook.pytest_collectreport(report=report)
        items += report.result

    def _targets(self) -> list[Target]:
        from pytest_mistral_lora.conformance.collection import NamedPaths
        from pytest_mistral_lora.conformance.targets import embedded_targets

        given = self.settings
        if not given.names_targets:
            return embedded_targets()
        # the first process of pytest-xdist needs them only at the end, when a test may have changed the working
        # directory
        with chdir(self._home):
            return NamedPaths(
                # beside rows, a tokenizer only judges the rows: its own checks, and its model, are another run
                judges=given.tokenizers if given.datasets else (),
                tokenizers=() if given.datasets else given.tokenizers,
                recipes=given.recipes,
                datasets=given.datasets,
                adapters=given.adapters,
                encoded=given.encoded,
                ggufs=given.ggufs,
                servers=given.servers,
                server_rows=given.server_rows,
                server_answers=given.server_answers,
                server_limits=given.server_limits,
                runners=given.runners,
                allow_code=given.allow_code,
                base=given.base,
                oracle=given.oracle,
                objective=given.objective,
            ).targets()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Count the checks that the user deselected."""
        self.session.deselected += sum(isinstance(item, CheckItem) for item in items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Run the first tiny train in another process, in parallel with the checks before it."""
        end = None if self._is_worker or session.config.option.collectonly else self._start_training(session)
        try:
            return (yield)
        finally:
            if end is not None:
                end()

    def _start_training(self, session: pytest.Session) -> Callable[[], None] | None:
        """Start the first tiny train, and return the function that ends its process.

        None if no check needs the train, if its own check comes first and would wait, or if it cannot be started.
        """
        items = [item for item in session.items if isinstance(item, CheckItem)]
        first = next((item.check for item in items if item.check.subject == "train"), None)
        if first is None or first is items[0].check:
            return None
        from pytest_mistral_lora.conformance.train.started_run import start

        with chdir(self._home):
            return start(first.target, self._work_folder, device=self.settings.options.device)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put the outcome of a check on its report."""
        report = yield
        if isinstance(item, CheckItem) and report.when == "call":
            state: Any = "known" if hasattr(report, "wasxfail") else report.outcome
            outcome = replace(item.judged, state=state, seconds=report.duration, commands=item.commands())
            vars(report)[OUTCOME] = outcome
            if report.failed:
                vars(report)["mistral_rerun"] = item.next_step()
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_report_to_serializable(self) -> Generator[None, dict[str, Any] | None, dict[str, Any] | None]:
        """Write an outcome as plain data, for another process or a log of reports."""
        data = yield
        if data is None or data.get(OUTCOME) is None:
            return data
        return {**data, OUTCOME: data[OUTCOME].to_json()}

    @pytest.hookimpl(wrapper=True)
    def pytest_report_from_serializable(self) -> Generator[None, pytest.TestReport | None, pytest.TestReport | None]:
        """Read the outcome of a check in another process."""
        report = yield
        data = getattr(report, OUTCOME, None)
        if data is not None:
            vars(report)[OUTCOME] = CheckOutcome.from_json(data)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a check."""
        outcome = getattr(report, OUTCOME, None)
        # pytest-rerunfailures also reports repeated attempts, with an outcome of its own
        if outcome is not None and report.outcome in ("passed", "failed", "skipped"):
            self.session.take(outcome)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table, the notes, and the checks that could not run."""
        with chdir(self._home):
            self._failed.write_findings(terminalreporter)
            unused: list[Path] = []
            if self.settings.golden_folders:
                from pytest_mistral_lora.conformance.user_goldens import unused_folders

                unused += unused_folders(self.settings.golden_folders, self.session.targets)
            write_summary(terminalreporter, self.session, self.settings, unused=unused)
            if self._leaves_out_tests:
                write_left_out_tests(terminalreporter, self._home)
            write_next(terminalreporter, self.session)
        if self.settings.output_format == "github":
            with chdir(self._home):
                write_annotations(terminalreporter, self.session)
        for xfail in self.session.unmatched:
            write_line(terminalreporter, xfail.unmatched, red=True)
        unread = unread_configuration(terminalreporter.config, PATH_FLAGS)
        if unread:
            write_line(terminalreporter, unread, yellow=True)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report, and fail a run that judged nothing or whose list of known deviations is out of date."""
        if self._is_worker:
            vars(session.config)["workeroutput"][_COLLECTED] = (self.session.collected, self.session.deselected)
            return
        # a fixed deviation must leave the list, or the list would hide its return
        has_passed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if has_passed and (self.session.unmatched or self.session.nothing_judged):
            session.exitstatus = exitstatus = pytest.ExitCode.TESTS_FAILED
        with chdir(self._home):
            self.session.write_xfails()
        if self.settings.report is not None:
            params = session.config.invocation_params
            command = shlex.join(["pytest", *map(str, params.args)])
            with chdir(self._home):
                data = self.session.report(command, params.dir, int(exitstatus))
                self.session.write_reports([self.settings.report], data)


def unread_configuration(config: pytest.Config, flags: tuple[str, ...]) -> str:
    """Return a sentence that names the configuration file that pytest did not read; else empty.

    pytest looks for its configuration before it knows the options of a plugin, and takes each path among the words for
    a folder of tests: with `--mistral-tokenizer /models/x` it searches `/models/x` and above instead of the current
    folder. With `--mistral-tokenizer=/models/x` it does not.

    Args:
        config: The configuration of a session.
        flags: The options that take a path.
    """
    from pytest_mistral_lora.starter.settings import PYTEST_FILES

    params = config.invocation_params
    flag = next((word for word in params.args if word in flags), None)
    if flag is None or config.getoption("rootdir") or config.getoption("inifilename"):
        return ""
    folders = (params.dir, *params.dir.parents)
    if config.inipath is not None and config.inipath.parent in folders:
        return ""
    files = (Path(folder, name) for folder in folders for name in PYTEST_FILES)
    missed = next((file for file in files if file.is_file()), None)
    return f"pytest has not read {missed}: write {flag}=PATH, with an equals sign" if missed else ""
