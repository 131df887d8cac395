"""A check of the suite as a pytest item."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.conformance.checks import ROOT
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.plugin.settings import PluginSettings

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.checks import Check
    from pytest_mistral_lora.conformance.finding import Finding, Result
    from pytest_mistral_lora.conformance.targets import RunnerChoice
    from pytest_mistral_lora.plugin.xfails import Xfail


class CheckFailedError(AssertionError):
    """Findings of one check, as text."""


class SuiteCollector(pytest.Collector):
    """The parent of all checks."""

    def __init__(self, *, checks: Iterable[Check], settings: PluginSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._checks = checks
        self._settings = settings

    def collect(self) -> Iterator[pytest.Item]:
        """Yield an item for each check."""
        for check in self._checks:
            nodeid = f"{self.nodeid}::{check.name}"
            yield CheckItem.from_parent(self, name=check.name, nodeid=nodeid, check=check, settings=self._settings)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show our own errors as what they say."""
        if isinstance(excinfo.value, MistralLoraError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class CheckItem(pytest.Item):
    """One check, run and reported by pytest."""

    def __init__(self, *, check: Check, settings: PluginSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check = check
        self.settings = settings
        self.result: Result | None = None
        self.add_marker("mistral_golden")
        if check.subject == "train":
            self.add_marker("mistral_training")

    def runtest(self) -> None:
        """Run the check.

        Raises:
            CheckFailedError: If a rule is broken.
            pytest.xfail.Exception: If every broken rule is a known deviation.
            pytest.skip.Exception: If it could not be checked.
        """
        with warnings.catch_warnings(), self._progress_shown():
            # the libraries' warnings are not about the user's code, and may be errors in the user's configuration
            warnings.simplefilter("ignore")
            self.result = self.check.run()
        failing = [finding.text() for finding in self.unknown if finding.severity == "error" or self.settings.strict]
        unchecked = f"not checked: {self.result.not_checked}" if self.result.not_checked else ""
        if unchecked and self.settings.strict and not any(one.id == self.nodeid for one in self.settings.xfails):
            failing.append(unchecked)
        if failing:
            raise CheckFailedError("\n\n".join([*failing, self._next_step()]))
        if any(finding.severity == "error" for finding in self.result.findings):
            pytest.xfail("; ".join(xfail.reason for xfail in self.known))
            # --runxfail: a known deviation fails as any other
            raise CheckFailedError("\n\n".join([*(f.text() for f in self.result.findings), self._next_step()]))
        if unchecked:
            pytest.skip(unchecked)

    @contextmanager
    def _progress_shown(self) -> Iterator[None]:
        """Let a check that draws a progress bar reach the terminal: pytest would keep it for the report."""
        capture: Any = self.config.pluginmanager.getplugin("capturemanager")
        if self.check.subject != "dataset" or capture is None:
            yield
            return
        with capture.global_and_fixture_disabled():
            yield

    @property
    def known(self) -> list[Xfail]:
        """The known deviations that this check has shown."""
        findings = self.result.findings if self.result else ()
        return [one for one in self.settings.xfails if any(one.covers(f.rule, self.nodeid) for f in findings)]

    @property
    def unknown(self) -> list[Finding]:
        """The findings that are no known deviation."""
        findings = self.result.findings if self.result else ()
        return [f for f in findings if not any(one.covers(f.rule, self.nodeid) for one in self.settings.xfails)]

    def _next_step(self) -> str:
        rerun = f"rerun:  {self._command()} -k {shlex.quote(self.check.name)}"
        if not self.check.case.startswith("own-"):
            return rerun
        return f"{rerun}\nupdate: {self._command()} --mistral-golden-update"

    def _command(self) -> str:
        words = ["pytest", "--mistral-golden"]
        folders = [("--mistral-golden-dir", path) for path in self.settings.golden_folders]
        words += [f"{flag}={self._as_typed(path)}" for flag, path in (*self.settings.target_paths, *folders)]
        words += [f"--mistral-runner={self._runner_as_typed(choice)}" for choice in self.settings.runners]
        if self.check.subject == "mask":
            words += ["--mistral-examples", str(self.settings.examples)]
            words += [] if self.settings.seed is None else ["--mistral-seed", str(self.settings.seed)]
        if self.settings.strict:
            words.append("--mistral-strict")
        return shlex.join(words)

    def _runner_as_typed(self, choice: RunnerChoice) -> str:
        name = self._as_typed(Path(choice.runner)) if choice.runner.endswith(".py") else choice.runner
        return name if choice.config is None else f"{name}={self._as_typed(choice.config)}"

    def _as_typed(self, path: Path) -> str:
        here = self.config.invocation_params.dir
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show findings and our own errors as what they say; anything else with its traceback."""
        if isinstance(excinfo.value, CheckFailedError | MistralLoraError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Name the check: it has no file."""
        # pytest writes dots as :: where this is the end of the node id
        return self.path, None, f"{ROOT} {self.check.name}"
