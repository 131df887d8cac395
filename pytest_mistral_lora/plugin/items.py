"""The checks as pytest items: run, reported, and repeated by a command."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.conformance.checks import ROOT
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.escaping import printable, safe_text
from pytest_mistral_lora.plugin.options import FAIL_ON, RULES, SERVER_SECONDS
from pytest_mistral_lora.plugin.settings import PluginSettings

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.checks import Check
    from pytest_mistral_lora.conformance.session import Session


class CheckFailedError(AssertionError):
    """Findings of one check, as text."""


class SuiteCollector(pytest.Collector):
    """The parent of all checks."""

    def __init__(
        self, *, checks: Iterable[Check], suite_session: Session, settings: PluginSettings, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._checks = checks
        self._given = {"suite_session": suite_session, "settings": settings}

    def collect(self) -> Iterator[pytest.Item]:
        """Yield an item for each check."""
        for check in self._checks:
            nodeid = f"{self.nodeid}::{check.name}"
            yield CheckItem.from_parent(self, name=check.name, nodeid=nodeid, check=check, **self._given)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the message of an error of this project; any other error keeps its traceback."""
        if isinstance(excinfo.value, MistralLoraError):
            return safe_text(str(excinfo.value))
        return super().repr_failure(excinfo)


class CheckItem(pytest.Item):
    """One check, run and reported by pytest."""

    def __init__(self, *, check: Check, suite_session: Session, settings: PluginSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check = check
        self.settings = settings
        self._session = suite_session
        self.judged = CheckOutcome.stopped(check)
        self.add_marker("mistral_golden")
        if check.subject == "train":
            self.add_marker("mistral_training")

    def runtest(self) -> None:
        """Run the check.

        Raises:
            CheckFailedError: If a rule is broken.
            pytest.xfail.Exception: If every broken rule is a known deviation.
            pytest.skip.Exception: If the check could not run.
        """
        from pytest_mistral_lora.conformance.groups import cause_texts

        # left by an earlier attempt, if pytest-rerunfailures repeats the check
        self.judged = CheckOutcome.stopped(self.check)
        # a user's test may have changed the working directory
        home = chdir(self.config.invocation_params.dir)
        with home, warnings.catch_warnings(), self._progress_bar_allowed():
            # The libraries' warnings are not about the user's code, and the user's pytest may turn them into errors
            warnings.simplefilter("ignore")
            result = self.check.run()
        judged = self.judged = self._session.outcome_of(self.check, result)
        if judged.findings:
            from pytest_mistral_lora.report.judged import finding_properties

            # pytest writes them into its JUnit file, and pytest-xdist sends them to the process that does
            properties = finding_properties(judged.findings)
            self.user_properties += [(name, printable(value, lines=False)) for name, value in properties]
        unchecked = f"not checked: {result.not_checked}"
        if judged.state == "failed":
            failing = judged.failing(notes=self._session.options.fails_notes)
            texts = [*cause_texts(failing), *([unchecked] if self._session.fails_unchecked(judged) else [])]
            raise CheckFailedError("\n\n".join([*texts, self.next_step()]))
        if judged.state == "known":
            pytest.xfail(printable("; ".join(xfail.reason for xfail in judged.known), lines=False))
            # reached only with --runxfail, which disables pytest.xfail: the deviation then fails like any finding
            raise CheckFailedError("\n\n".join([*cause_texts(result.findings), self.next_step()]))
        if judged.state == "skipped":
            pytest.skip(safe_text(unchecked))

    @contextmanager
    def _progress_bar_allowed(self) -> Iterator[None]:
        """Let the check of a dataset, which may take minutes, draw its progress bar despite pytest's capture."""
        # pytest captures stderr as well: the bar would end up in the report, invisible while the check runs
        capture: Any = self.config.pluginmanager.getplugin("capturemanager")
        if self.check.subject != "dataset" or capture is None:
            yield
            return
        with capture.global_and_fixture_disabled():
            yield

    def next_step(self) -> str:
        """Return the commands of this check, each with its name, for people."""
        return "\n".join(
            f"{name + ':':<8}{printable(command, lines=False)}" for name, command in self.commands().items()
        )

    def commands(self) -> dict[str, str]:
        """Return the command that runs this check again, and for a user's golden also the command that updates it."""
        words = ["pytest", "--mistral-golden"]
        folders = [("--mistral-golden-dir", path) for path in self.settings.golden_folders]
        words += [f"{flag}={path}" for flag, path in (*self.settings.target_paths, *folders)]
        words += [f"--mistral-oracle={self.settings.oracle}"] if self.settings.oracle else []
        if self.settings.objective is not None:
            words.append(f"--mistral-objective={self.settings.objective.objective}")
        for choice in self.settings.runners:
            config = f"={choice.config}" if choice.config else ""
            words.append(f"--mistral-runner={choice.runner}{config}")
        words += ["--mistral-allow-code"] if self.settings.allow_code else []
        words += [f"--mistral-server={server}" for server in self.settings.servers]
        words += ["--mistral-server-answers"] if self.settings.server_answers else []
        seconds, options = self.settings.server_limits.seconds, self.settings.options
        words += [f"{SERVER_SECONDS.flag}={seconds:g}"] if seconds else []
        if self.check.subject == "mask":  # only the checks of this subject generate rows
            words += ["--mistral-examples", str(options.examples)]
            words += [] if options.seed is None else ["--mistral-seed", str(options.seed)]
        words += [f"{FAIL_ON.flag}={','.join(sorted(options.fail_on))}"] if options.fail_on else []
        words += [] if options.rules is None else [f"{RULES.flag}={options.rules.version}"]
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
        # not the node id: pytest replaces dots by :: in a name that ends the node id
        return self.path, None, f"{ROOT} {self.check.name}"
