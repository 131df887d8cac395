"""Tell whether pytest has missed the user's configuration because of a path that follows one of our options.

pytest looks for its configuration before it knows a plugin's options, and takes each word that is a path for a place
of tests: `--mistral-tokenizer /models/x` makes it look in `/models/x` and above, `--mistral-tokenizer=/models/x` not.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.conformance.checks import ROOT
from pytest_mistral_lora.plugin.items import CheckItem, SuiteCollector
from pytest_mistral_lora.plugin.options import PATH_FLAGS
from pytest_mistral_lora.plugin.settings import PluginSettings

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.checks import Check
    from pytest_mistral_lora.conformance.targets import Target
    from pytest_mistral_lora.plugin.xfails import Xfail


_FILES = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")


def unread_configuration(config: pytest.Config, flags: tuple[str, ...]) -> str:
    """Return a sentence that names the configuration that pytest did not read, or nothing.

    Args:
        config: A configured session's.
        flags: The options that take a path.
    """
    params = config.invocation_params
    flag = next((word for word in params.args if word in flags), None)
    if flag is None or config.getoption("rootdir") or config.getoption("inifilename"):
        return ""
    folders = (params.dir, *params.dir.parents)
    if config.inipath is not None and config.inipath.parent in folders:
        return ""
    missed = next((path for folder in folders for name in _FILES if (path := Path(folder, name)).is_file()), None)
    return f"pytest has not read {missed}: write {flag}=PATH, with an equals sign" if missed else ""


_WORK = "mistral_lora_work"
_COUNTS = "mistral_lora_counts"


class Suite:
    """Hooks of a session that runs the suite.

    Attributes:
        settings: What was asked for.
        outcomes: One record for each check that has run, in the order in which they ended.
    """

    def __init__(self, config: pytest.Config, settings: PluginSettings) -> None:
        self.settings = settings
        self.outcomes: list[dict[str, Any]] = []
        self._collected = 0
        self._deselected = 0
        worker = getattr(config, "workerinput", None)
        self._is_worker = worker is not None
        self._work_folder = Path(worker[_WORK]) if worker else _temporary_folder(config)
        if _nothing_asked_for(config):
            config.args = []  # not public, and the only way to keep pytest from collecting the current folder

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist where all of them may write."""
        node.workerinput[_WORK] = str(self._work_folder)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Learn from a worker what was collected and deselected: every worker collects the same."""
        counts = getattr(node, "workeroutput", {}).get(_COUNTS, (self._collected, self._deselected))
        self._collected, self._deselected = counts

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the checks, before `-k`, `-m` and `--lf` choose among the items."""
        suite = SuiteCollector.from_parent(
            session, name=ROOT, nodeid=ROOT, checks=self._checks(), settings=self.settings
        )
        report = session.ihook.pytest_make_collect_report(collector=suite)
        session.ihook.pytest_collectreport(report=report)
        items += report.result
        self._collected = len(report.result)

    def _checks(self) -> Iterator[Check]:
        """Yield the checks: whatever goes wrong here is an error of the collection, with its name."""
        from pytest_mistral_lora.conformance.checks import Settings
        from pytest_mistral_lora.conformance.collect import collect

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
        from pytest_mistral_lora.conformance.targets import embedded_targets, named_targets

        given = self.settings
        if not given.names_targets:
            return embedded_targets()
        return named_targets(
            tokenizers=given.tokenizers,
            recipes=given.recipes,
            adapters=given.adapters,
            encoded=given.encoded,
            runners=given.runners,
            base=given.base,
        )

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Count the checks that the user chose to leave out."""
        self._deselected += sum(isinstance(item, CheckItem) for item in items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Let the first tiny train run in a process of its own, beside the other checks, which come before it."""
        process = None if self._is_worker or session.config.option.collectonly else self._train_beside(session)
        try:
            return (yield)
        finally:
            if process is not None:
                process.terminate()
                process.wait()

    def _train_beside(self, session: pytest.Session) -> subprocess.Popen[bytes] | None:
        checks = [item.check for item in session.items if isinstance(item, CheckItem)]
        first = next((check for check in checks if check.subject == "train"), None)
        if first is None or first is checks[0]:
            return None
        from pytest_mistral_lora.conformance.train.tiny_run import start

        return start(first.target, self._work_folder, device=self.settings.device)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Carry the findings on the report, as plain data that also crosses to another process."""
        report = yield
        if isinstance(item, CheckItem) and report.when == "call":
            outcome = "known" if hasattr(report, "wasxfail") else report.outcome
            record = item.check.record(item.result, outcome=outcome, seconds=report.duration)
            report.mistral_golden = {  # type: ignore[attr-defined]
                **record,
                "findings": [finding.to_json() for finding in item.unknown],
                "known": [{"id": xfail.id, "reason": xfail.reason} for xfail in item.known],
            }
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a check came to."""
        data = getattr(report, "mistral_golden", None)
        if data is not None:
            self.outcomes.append(data)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print one table, and say what was not checked."""
        from pytest_mistral_lora.plugin.summary import write

        counts = {"deselected": self._deselected, "not_run": self._not_run}
        write(terminalreporter, self.outcomes, self.settings, unused=self._unused(), **counts)
        for xfail in self._unmatched():
            terminalreporter.write_line(
                f"{xfail.place}: {xfail.id} matches nothing: it is mended, or misspelt; remove it", red=True
            )
        unread = unread_configuration(terminalreporter.config, PATH_FLAGS)
        if unread:
            terminalreporter.write_line(unread, yellow=True)

    def _unused(self) -> list[Path]:
        if not self.settings.golden_folders:
            return []
        from pytest_mistral_lora.conformance.user_goldens import unused

        return list(unused(self.settings.golden_folders, self._targets()))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report, and fail a run whose list of known deviations is out of date."""
        if (
            not self._is_worker
            and self._unmatched()
            and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        ):
            session.exitstatus = exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._is_worker:
            session.config.workeroutput[_COUNTS] = (self._collected, self._deselected)  # type: ignore[attr-defined]
        elif self.settings.report is not None:
            from pytest_mistral_lora.report.session import report_data, write_report

            counts = {"deselected": self._deselected, "not_run": self._not_run}
            write_report(self.settings.report, report_data(self.outcomes, int(exitstatus), **counts))

    def _unmatched(self) -> list[Xfail]:
        """Return the known deviations that nothing showed, after a run in which all of them could have been seen."""
        given = self.settings
        if self._deselected or self._not_run or given.skip_training or not given.expects_every_xfail:
            return []
        seen = {known["id"] for outcome in self.outcomes for known in outcome["known"]}
        return [xfail for xfail in given.xfails if xfail.id not in seen]

    @property
    def _not_run(self) -> int:
        """How many chosen checks did not run: `-x`, an interruption, or `--collect-only`."""
        return self._collected - self._deselected - len(self.outcomes)


def _temporary_folder(config: pytest.Config) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mistral-golden-"))
    # not in pytest_sessionfinish: --help and a later usage error configure pytest, but start no session
    config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))
    return folder


def _nothing_asked_for(config: pytest.Config) -> bool:
    """Return whether neither the command line nor `testpaths` says what to collect."""
    return config.args_source == pytest.Config.ArgsSource.INVOCATION_DIR
