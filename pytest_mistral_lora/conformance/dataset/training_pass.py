"""The judge of the rows of a run, in the pass that encodes them: the rules of `check recipe.yaml`, and its words."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.checks import ROOT, Check
from pytest_mistral_lora.conformance.dataset.checks import (
    results_from_json,
    results_of,
    results_to_json,
    scan_plan,
    why_not_compared,
)
from pytest_mistral_lora.conformance.dataset.repeats import sketches_available
from pytest_mistral_lora.conformance.dataset.rows import DatasetPass, ScanPlan
from pytest_mistral_lora.conformance.groups import FILE_WIDTH, signs_among
from pytest_mistral_lora.conformance.kept_results import states_of_code
from pytest_mistral_lora.conformance.known import known_deviations, recipe_deviations
from pytest_mistral_lora.conformance.known_programs import observers_of_programs
from pytest_mistral_lora.conformance.pass_plan import loaded_judge
from pytest_mistral_lora.conformance.session import Session
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.errors import FindingsError, InputError
from pytest_mistral_lora.records.judged_rows import Judgement

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe
    from pytest_mistral_lora.training.rows.judgement import ChunkJudge

_LIBRARIES = ("jinja2", "mistral-common", "tokenizers", "transformers")


class TrainingPass:
    """The judge of the rows of a run: `RowsJudge` of `training.rows.judgement`.

    Attributes:
        target: The recipe with its tokenizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        encoder: Encoder,
        files: Sequence[DataFile],
        xfails: Path | None,
        finish: Callable[[Session, str], Any],
    ) -> None:
        """Prepare the judge.

        Args:
            recipe: The recipe.
            encoder: Its backend.
            files: Its files, those of `evaluation.retention` last.
            xfails: A file of known deviations beside that of the recipe, or None.
            finish: Returns the `Verdict` of a session that has run, and of a call.

        Raises:
            InputError: If the known deviations cannot be read.
        """
        self.target: RecipeTarget = RecipeTarget.of_run(recipe, encoder.tokenizer)
        recipe_deviations(recipe)  # the target reports none if they cannot be read
        self._options = CheckOptions(xfails=known_deviations(xfails, "--xfails"))
        self._files, self._finish = files, finish
        self._found = DatasetPass()

    @property
    def identity(self) -> Any:
        """What the results depend on beside the rows and their encoding, as plain JSON data."""
        tokenizer = self.target.tokenizer
        return {
            "recipe": str(self.target.path),
            "files": [(str(file.path), file.is_held_out, file.is_retention) for file in self._files],
            "tokenizer": [tokenizer.files.digests, tokenizer.declared],
            "libraries": {name: version(name) for name in _LIBRARIES},
            "sketches": sketches_available(),
            "observers": list(observers_of_programs()),
            "code": states_of_code(),
        }

    @cached_property
    def _no_comparison(self) -> str:
        return why_not_compared(self.target)

    @cached_property
    def _plan(self) -> ScanPlan:
        return scan_plan(self.target, self._files, self._no_comparison)

    def in_chunks(self, first: int, processes: int) -> Callable[[], ChunkJudge]:
        """Return what makes the judge of chunks in a process."""
        if processes > 1:
            return partial(_judge_of_files, partial(loaded_judge, self.target.tokenizer.loaded_fast, self._plan), first)
        return partial(_judge_of_files, lambda: self._judge, first)

    @cached_property
    def _judge(self) -> ChunkJudge:
        return self._plan.judge(self.target.tokenizer)

    def take(self, part: DatasetPass) -> None:
        """Take the part of a chunk."""
        self._found.extend(part)

    def refuse(self, file: int, error: InputError) -> None:
        """Take the error of a file that cannot be read, by its index among all files."""
        self._found.refuse(file, self._files[file], error)

    def results(self) -> str:
        """Return the results of all rows; the rules on whole files speak here."""
        return json.dumps(
            results_to_json(results_of(self.target, self._files, self._plan, self._found, self._no_comparison))
        )

    def decide(self, results: str) -> Judgement:
        """Return the judgement of the rows.

        Raises:
            FindingsError: If the rows have an error that is not accepted.
        """
        from pytest_mistral_lora.report import look_at_lines

        session, path = self._session(results), str(self.target.path)
        # of rows that nobody can judge, the error of the first says more
        if session.exit_code and not session.nothing_judged:
            stale = [xfail.unmatched for xfail in session.unmatched]
            found = [*session.cause_texts(FILE_WIDTH), *look_at_lines(signs_among(session.causes()))]
            lines = ["the rows do not pass, and no weight was loaded", *found, *stale]
            raise FindingsError(
                "\n".join([*lines, session.verdict()]),
                verdict=self._finish(session, f"train({path!r})"),
                next_step=f"Correct the rows, and judge them again: mistral-lora check {shlex.quote(path)}. "
                "Or accept a finding with a reason in a file for --xfails, or train on the rows as they are with "
                "--unjudged.",
            )
        known = {xfail.id: xfail.reason for outcome in session.outcomes for xfail in outcome.known}
        accepted = [{"id": name, "reason": reason} for name, reason in known.items()]
        notes = [f"note: {line.strip()}" for line in look_at_lines(session.causes())[1:]]
        return Judgement(is_judged=True, accepted=accepted, notes=notes)

    def _session(self, results: str) -> Session:
        """Return the session of the checks with these results, which has run."""
        session = Session(lambda: [self.target], self._options.settings(), self._options)
        for case, result in results_from_json(json.loads(results)).items():
            check = Check(self.target, "dataset", case, partial(lambda result: result, result))
            session.collected.append(f"{ROOT}::{check.name}")
            session.take(session.outcome_of(check, check.run()))
        return session


def _judge_of_files(make: Callable[[], ChunkJudge], first: int) -> ChunkJudge:
    """Return a judge of chunks whose files are counted from 0, of files that are counted from `first`."""
    judge = make()
    return lambda chunk, take: judge(replace(chunk, file=first + chunk.file), take)
