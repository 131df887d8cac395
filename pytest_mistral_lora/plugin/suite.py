"""The suite in one pytest session: its hooks collect the checks, gather their results and print the summary."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import chdir
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.conformance.checks import ROOT
from pytest_mistral_lora.plugin.items import CheckItem, SuiteCollector
from pytest_mistral_lora.plugin.options import PATH_FLAGS
from pytest_mistral_lora.plugin.settings import PluginSettings
from pytest_mistral_lora.plugin.summary import FailedChecks, write_annotations, write_line, write_summary

if TYPE_CHECKING:
    import subprocess

    from pytest_mistral_lora.conformance.checks import Check
    from pytest_mistral_lora.conformance.known import Xfail
    from pytest_mistral_lora.conformance.targets import Target

_WORK = "mistral_lora_work"
_COUNTS = "mistral_lora_counts"
# the files in which pytest itself looks for its configuration, in its order
_CONFIGURATION_FILES = (
    "pytest.toml",
    ".pytest.toml",
    "pytest.ini",
    ".pytest.ini",
    "pyproject.toml",
    "tox.ini",
    "setup.cfg",
)


class Suite:
    """Hooks of a session that runs the suite.

    Attributes:
        settings: The settings of the run.
        outcomes: One record for each check that has run, in the order in which the checks ended.
    """

    def __init__(self, config: pytest.Config, settings: PluginSettings) -> None:
        self.settings = settings
        self.outcomes: list[dict[str, Any]] = []
        self._started, self._start = datetime.now(UTC), time.perf_counter()
        self._collected = 0
        self._deselected = 0
        worker = getattr(config, "workerinput", None)
        self._is_worker = worker is not None
        # paths of the settings are relative to it, and a test of the user may go to another folder
        self._home = config.invocation_params.dir
        self._failed = FailedChecks(strict=settings.strict)
        if not self._is_worker:
            config.pluginmanager.register(self._failed, "mistral_lora_failed_checks")
        if worker:
            self._work_folder = Path(worker[_WORK])
        else:
            self._work_folder = Path(tempfile.mkdtemp(prefix="mistral-golden-"))
            # not in pytest_sessionfinish: --help and a later usage error configure pytest, but start no session
            config.add_cleanup(partial(shutil.rmtree, self._work_folder, ignore_errors=True))
        # With neither paths nor `testpaths`, pytest would collect the current folder beside the suite. `args` is not
        # public, but nothing else keeps it from that.
        if config.args_source == pytest.Config.ArgsSource.INVOCATION_DIR:
            config.args = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Give a worker of pytest-xdist the folder that all workers share."""
        node.workerinput[_WORK] = str(self._work_folder)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the counts of a worker, the same for each: every worker collects and deselects all checks."""
        counts = getattr(node, "workeroutput", {}).get(_COUNTS, (self._collected, self._deselected))
        self._collected, self._deselected = counts

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the checks, before `-k`, `-m` and `--lf` choose among the items."""
        # pytest's own collection walks files, and the suite has none: its collector is asked here, with its own report
        suite = SuiteCollector.from_parent(
            session, name=ROOT, nodeid=ROOT, checks=self._collected_checks(), settings=self.settings
        )
        with chdir(self._home):
            report = session.ihook.pytest_make_collect_report(collector=suite)
        session.ihook.pytest_collectreport(report=report)
        items += report.result
        self._collected = len(report.result)

    def _collected_checks(self) -> Iterator[Check]:
        """Yield the checks. It is a generator, so that its errors are raised, and reported, in the collector."""
        from pytest_mistral_lora.conformance.checks import Settings
        from pytest_mistral_lora.conformance.collection import collect

        given = self.settings
        settings = Settings(
            examples=given.examples,
            seed=given.seed,
            device=given.device,
            skip_training=given.skip_training,
            golden_folders=given.golden_folders,
            update=given.update,
            work_folder=self._work_folder,
            require_manifest=given.require_manifest,
        )
        yield from collect(self._targets(), settings)

    def _targets(self) -> list[Target]:
        from pytest_mistral_lora.conformance.collection import named_targets
        from pytest_mistral_lora.conformance.targets import embedded_targets

        given = self.settings
        if not given.names_targets:
            return embedded_targets()
        return named_targets(
            # with rows, a tokenizer is their judge: no model of it is made, and its own checks are another run
            **({"judges": given.tokenizers} if given.datasets else {"tokenizers": given.tokenizers}),
            recipes=given.recipes,
            datasets=given.datasets,
            adapters=given.adapters,
            encoded=given.encoded,
            ggufs=given.ggufs,
            servers=given.servers,
            server_rows=given.server_rows,
            runners=given.runners,
            base=given.base,
            oracle=given.oracle,
        )

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Count the checks that the user chose to leave out."""
        self._deselected += sum(isinstance(item, CheckItem) for item in items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Run the first tiny train in a process of its own, at the same time as the checks before it."""
        end = None if self._is_worker or session.config.option.collectonly else self._start_training(session)
        try:
            return (yield)
        finally:
            if end is not None:
                end()

    def _start_training(self, session: pytest.Session) -> Callable[[], None] | None:
        """Start the first tiny train, and return how to end its process.

        None if no check needs the train, if its own check comes first and would wait, or if it cannot be started.
        """
        items = [item for item in session.items if isinstance(item, CheckItem)]
        first = next((item.check for item in items if item.check.subject == "train"), None)
        if first is None or first is items[0].check:
            return None
        from pytest_mistral_lora.conformance.train.tiny_run import start

        with chdir(self._home):
            process = start(first.target, self._work_folder, device=self.settings.device)
        return None if process is None else partial(_end, process)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put the findings on the report, as plain data: pytest-xdist sends reports to another process."""
        report = yield
        if isinstance(item, CheckItem) and report.when == "call":
            outcome = "known" if hasattr(report, "wasxfail") else report.outcome
            record = item.check.record(item.result, outcome=outcome, seconds=report.duration)
            # pytest-xdist sends every attribute that is plain data
            vars(report)["mistral_golden"] = {
                **record,
                "findings": [finding.to_json() for finding in item.unknown],
                "known": [{"id": xfail.id, "reason": xfail.reason} for xfail in item.known],
                "commands": item.commands() if item.unknown else {},
            }
            if report.failed:
                vars(report)["mistral_rerun"] = item.next_step()
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the record of a check."""
        data = getattr(report, "mistral_golden", None)
        # pytest-rerunfailures reports an attempt that it repeats, too, with an outcome of its own
        if data is not None and report.outcome in ("passed", "failed", "skipped"):
            self.outcomes.append(data)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table, the notes, and the checks that could not run."""
        with chdir(self._home):
            self._failed.write_findings(terminalreporter)
            counts = {"deselected": self._deselected, "not_run": self._not_run}
            unused: list[Path] = []
            if self.settings.golden_folders:
                from pytest_mistral_lora.conformance.user_goldens import unused_folders

                unused += unused_folders(self.settings.golden_folders, self._targets())
            write_summary(terminalreporter, self.outcomes, self.settings, unused=unused, **counts)
        if self.settings.output_format == "github":
            with chdir(self._home):
                write_annotations(terminalreporter, self.outcomes)
        for xfail in self._unmatched_xfails():
            write_line(terminalreporter, xfail.unmatched, red=True)
        unread = unread_configuration(terminalreporter.config, PATH_FLAGS)
        if unread:
            write_line(terminalreporter, unread, yellow=True)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report, and fail a run that judged nothing or whose list of known deviations is out of date."""
        if not self._is_worker and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            from pytest_mistral_lora.report import nothing_was_judged

            # a known deviation that is fixed must leave the list, or the list would hide its return
            if self._unmatched_xfails() or nothing_was_judged(self.outcomes):
                session.exitstatus = exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._is_worker:
            vars(session.config)["workeroutput"][_COUNTS] = (self._collected, self._deselected)
            return
        if self.settings.baseline is not None:
            from pytest_mistral_lora.conformance.known import baseline_text
            from pytest_mistral_lora.records.files import write_text

            write_text(self._home / self.settings.baseline, baseline_text(self.outcomes, strict=self.settings.strict))
        if self.settings.report is not None:
            with chdir(self._home):
                self._write_report(self.settings.report, session.config, int(exitstatus))

    def _write_report(self, path: Path, config: pytest.Config, exit_status: int) -> None:
        from pytest_mistral_lora.conformance.groups import failed_rows, group_findings
        from pytest_mistral_lora.environment import known_cause_lines
        from pytest_mistral_lora.records.git import code_of
        from pytest_mistral_lora.report import RunFacts, report_data, write_report

        params, groups = config.invocation_params, group_findings(self.outcomes)
        command = shlex.join(["pytest", *map(str, params.args)])
        run = RunFacts(command, self._started, time.perf_counter() - self._start, code_of(params.dir))
        counts = {"deselected": self._deselected, "not_run": self._not_run}
        causes = [cause.to_json() for cause in groups]
        known = known_cause_lines(self.outcomes)
        data = report_data(self.outcomes, exit_status, run, causes=causes, known_faults=known, **counts)
        write_report(path, data, failed_rows(groups, self._targets() if causes else ()))

    def _unmatched_xfails(self) -> list[Xfail]:
        """Return the known deviations without a finding; none after a run that left out some of the checks."""
        given = self.settings
        if self._deselected or self._not_run or given.skip_training or not given.expects_every_xfail:
            return []
        seen = {known["id"] for outcome in self.outcomes for known in outcome["known"]}
        return [xfail for xfail in given.xfails if xfail.id not in seen]

    @property
    def _not_run(self) -> int:
        """Number of chosen checks that did not run, because of `-x`, an interruption, or `--collect-only`."""
        return self._collected - self._deselected - len(self.outcomes)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def unread_configuration(config: pytest.Config, flags: tuple[str, ...]) -> str:
    """Return a sentence that names the configuration file that pytest did not read; empty if there is none.

    pytest looks for its configuration before it knows the options of a plugin, and takes each word that is a path for
    a folder of tests: with `--mistral-tokenizer /models/x` it searches `/models/x` and above instead of the current
    folder. With `--mistral-tokenizer=/models/x` it does not.

    Args:
        config: The configuration of a session.
        flags: The options that take a path.
    """
    params = config.invocation_params
    flag = next((word for word in params.args if word in flags), None)
    if flag is None or config.getoption("rootdir") or config.getoption("inifilename"):
        return ""
    folders = (params.dir, *params.dir.parents)
    if config.inipath is not None and config.inipath.parent in folders:
        return ""
    files = (Path(folder, name) for folder in folders for name in _CONFIGURATION_FILES)
    missed = next((file for file in files if file.is_file()), None)
    return f"pytest has not read {missed}: write {flag}=PATH, with an equals sign" if missed else ""
