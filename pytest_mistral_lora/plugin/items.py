"""The checks as pytest items: run, reported, and repeated by a command."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.conformance.checks import ROOT
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.escaping import printable, safe_text
from pytest_mistral_lora.plugin.settings import PluginSettings

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.checks import Check
    from pytest_mistral_lora.conformance.finding import Finding, Result
    from pytest_mistral_lora.conformance.known import Xfail


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
        """Return the message of an error of this project; any other error keeps its traceback."""
        if isinstance(excinfo.value, MistralLoraError):
            return safe_text(str(excinfo.value))
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
        from pytest_mistral_lora.conformance.groups import cause_texts

        # a test of the user may have gone to another folder
        home = chdir(self.config.invocation_params.dir)
        with home, warnings.catch_warnings(), self._progress_bar_allowed():
            # The libraries' warnings are not about the user's code, and the user's pytest may turn them into errors
            warnings.simplefilter("ignore")
            self.result = self.check.run()
        if self.unknown:
            from pytest_mistral_lora.report.judged import finding_properties

            # pytest writes them into its JUnit file, and pytest-xdist sends them to the process that does
            properties = finding_properties(finding.to_json() for finding in self.unknown)
            self.user_properties += [(name, printable(value, lines=False)) for name, value in properties]
        failing = cause_texts(one for one in self.unknown if one.severity == "error" or self.settings.strict)
        # with --mistral-strict a check that could not run fails; it has no rule, so that only its node id can accept it
        unchecked = f"not checked: {self.result.not_checked}" if self.result.not_checked else ""
        if unchecked and self.settings.strict and not any(one.id == self.nodeid for one in self.settings.xfails):
            failing.append(unchecked)
        if failing:
            raise CheckFailedError("\n\n".join([*failing, self.next_step()]))
        if any(finding.severity == "error" for finding in self.result.findings):
            pytest.xfail(printable("; ".join(xfail.reason for xfail in self.known), lines=False))
            # reached only with --runxfail, which makes pytest.xfail do nothing: the deviation fails like any finding
            raise CheckFailedError("\n\n".join([*cause_texts(self.result.findings), self.next_step()]))
        if unchecked:
            pytest.skip(safe_text(unchecked))

    @contextmanager
    def _progress_bar_allowed(self) -> Iterator[None]:
        """Let the check of a dataset, which may take minutes, draw its progress bar in spite of pytest's capture."""
        # pytest captures stderr as well: the bar would be part of the report, and nobody would see the check advance
        capture: Any = self.config.pluginmanager.getplugin("capturemanager")
        if self.check.subject != "dataset" or capture is None:
            yield
            return
        with capture.global_and_fixture_disabled():
            yield

    @property
    def known(self) -> list[Xfail]:
        """The known deviations that a finding of this check matches."""
        from pytest_mistral_lora.conformance.known import known_among

        return known_among(self.result.findings if self.result else (), self.nodeid, self.settings.xfails)

    @property
    def unknown(self) -> list[Finding]:
        """The findings that no known deviation covers."""
        from pytest_mistral_lora.conformance.known import unknown_among

        return unknown_among(self.result.findings if self.result else (), self.nodeid, self.settings.xfails)

    def next_step(self) -> str:
        """Return the commands of this check, each with its name, for people."""
        return "\n".join(
            f"{name + ':':<8}{printable(command, lines=False)}" for name, command in self.commands().items()
        )

    def commands(self) -> dict[str, str]:
        """Return the command that runs this check again, and for a golden of the user the one that updates it."""
        words = ["pytest", "--mistral-golden"]
        folders = [("--mistral-golden-dir", path) for path in self.settings.golden_folders]
        words += [f"{flag}={path}" for flag, path in (*self.settings.target_paths, *folders)]
        words += [f"--mistral-oracle={self.settings.oracle}"] if self.settings.oracle else []
        for choice in self.settings.runners:
            config = f"={choice.config}" if choice.config else ""
            words.append(f"--mistral-runner={choice.runner}{config}")
        words += [f"--mistral-server={one}" for one in self.settings.servers]
        if self.check.subject == "mask":  # the one subject whose checks generate rows
            words += ["--mistral-examples", str(self.settings.examples)]
            words += [] if self.settings.seed is None else ["--mistral-seed", str(self.settings.seed)]
        if self.settings.strict:
            words.append("--mistral-strict")
        command = shlex.join(words)
        found = {"rerun": f"{command} -k {shlex.quote(self.check.name)}"}
        if self.check.case.startswith("own-"):
            found["update"] = f"{command} --mistral-golden-update"
        return found

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the text of findings and of errors of this project; any other error keeps its traceback."""
        if isinstance(excinfo.value, CheckFailedError | MistralLoraError):
            return safe_text(str(excinfo.value))
        return safe_text(str(super().repr_failure(excinfo, style)))

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Return the name of the check in pytest's output; a check has no file and no line."""
        # not the node id: pytest replaces dots by :: in a name with which the node id ends
        return self.path, None, f"{ROOT} {self.check.name}"
