"""The targets of a run, from the given paths and names, and their checks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.objective import ANSWERS, Declaration, Objective
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.checks import Causes, Check, Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.model_targets import (
    AdapterTarget,
    GgufTarget,
    ModelFileTarget,
    TrainerTarget,
    WatchedTarget,
)
from pytest_mistral_lora.conformance.path_kinds import KINDS, RecognisedPath, makes_a_model
from pytest_mistral_lora.conformance.server_target import ParsersTarget, ServerChoice, ServerTarget
from pytest_mistral_lora.conformance.targets import (
    EMBEDDED_TRAINING,
    DatasetTarget,
    EncodedTarget,
    JudgedTarget,
    RecipeTarget,
    RunnerChoice,
    RunnerTarget,
    Target,
    embedded_targets,
    free_name,
    is_shipped,
    name_of,
)
from pytest_mistral_lora.errors import InputError, MistralLoraError, RowError
from pytest_mistral_lora.records.asking_limits import AskingLimits
from pytest_mistral_lora.records.manifest import MANIFEST

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.reading.row_source import RowSource
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.kept_results import KeptResults
    from pytest_mistral_lora.places import Place
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder


def targets_of(
    paths: Sequence[RecognisedPath],
    base: Path | None = None,
    oracle: str | None = None,
    tokenizer: Path | CheckpointTokenizer | None = None,
    loaded: Sequence[CheckpointTokenizer] = (),
    objective: Declaration | None = None,
    held: RowSource | None = None,
) -> list[Target]:
    """Return a target for each path; with no path, the embedded default.

    Args:
        paths: The paths.
        base: The base checkpoint's folder of the adapters, or None.
        oracle: The declared oracle of folders without a Mistral tokenizer file, or None.
        tokenizer: The tokenizer for rows and encoded rows, which is not judged itself; None for the tokenizers among
            the paths.
        loaded: Tokenizers to judge that are not paths.
        objective: The declared objective of rows and encoded rows, or None.
        held: Rows in memory, or None.

    Raises:
        InputError: If there are rows but no tokenizer for them, or `require_objectives` refuses the objective.
    """
    if not paths and not loaded and held is None:
        return embedded_targets()
    by_kind = {kind: [recognised.path for recognised in paths if recognised.kind == kind] for kind in KINDS}
    rows = [*by_kind["rows"], *by_kind["encoded"]]
    if rows and tokenizer is None and not loaded and not by_kind["tokenizer"] and not by_kind["recipe"]:
        title = next(recognised.title for recognised in paths if recognised.path == rows[0])
        words = shlex.join(["mistral-lora", "check", *(str(recognised.path) for recognised in paths), "--tokenizer"])
        raise InputError(
            f"this is {title}, and no tokenizer is given",
            place=str(rows[0]),
            expected="the tokenizer that encodes it: a folder, a file, or the name of a shipped one such as spm-v3",
            next_step=f"Name it: {words} spm-v3",
        )
    named = NamedPaths(
        tokenizers=[*by_kind["tokenizer"], *loaded],
        judges=() if tokenizer is None else (tokenizer,),
        recipes=by_kind["recipe"],
        contents={given.path: given.content for given in paths if given.content is not None},
        datasets=by_kind["rows"],
        encoded=by_kind["encoded"],
        adapters=by_kind["adapter"],
        ggufs=by_kind["gguf"],
        base=base,
        oracle=oracle,
        objective=objective,
        held=held,
    )
    targets = named.targets()
    require_objectives(targets)
    return targets


def require_objectives(targets: Sequence[Target]) -> None:
    """Refuse a declared objective that a tokenizer cannot express, or that the rows of a target do not take.

    Raises:
        InputError: If an objective is about a control token that the tokenizer lacks, the first record of a file is
            a pair, a rated answer or a completion, or a recipe among the targets declares another objective.
    """
    given = (target.objective for target in targets if isinstance(target, JudgedTarget))
    declared = next((one for one in given if one is not None), None)
    for target in targets:
        if declared is not None and isinstance(target, RecipeTarget):
            _require_same(target, declared)
        if target.declaration is None or (objective := target.declaration.objective) is None:
            continue
        if objective.without:
            oracle = None
            with suppress(MistralLoraError):  # a check reports it
                oracle = target.oracle
            if oracle is not None:
                objective.require(oracle.control_ids, oracle.version, target.declaration.by)
        refused = None if objective.is_default else _refused(target, objective)
        if refused is not None:
            raise InputError(
                f"{target.declaration.by}: {refused.found}", place=refused.place, expected=refused.expected
            )


def _require_same(target: RecipeTarget, declared: Declaration) -> None:
    """Refuse a declared objective that a recipe contradicts by its own key.

    Raises:
        InputError: If the recipe declares an objective, and not this one.
    """
    named: Mapping[Objective, Place] = {}
    with suppress(MistralLoraError):  # a check reports it
        named = target.recipe.objectives
    for objective, place in named.items():
        if objective != declared.objective and any(not one.is_default for one in named):
            found = f"two objectives are declared: {declared.words} and {objective} ({place})"
            raise InputError(found, place=str(target.path), expected="one objective, or the same in both")


def _refused(target: Target, objective: Objective) -> RowError | None:
    """Return the error of the first record of a target that takes no objective; None if it is a conversation."""
    from pytest_mistral_lora.chat.row_files import scan_records
    from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, scan_lines

    first: Sequence[Row] = ()
    if isinstance(target, DatasetTarget):
        with suppress(MistralLoraError, OSError):  # a check reports it
            for file in target.files:
                item = next(scan_records(replace(file, objective=ANSWERS)), None)
                first = (*first, *(item if isinstance(item, tuple) else ()))
    elif isinstance(target, EncodedTarget) and target.rows.is_repeatable:
        with suppress(MistralLoraError, OSError):
            line = next(scan_lines(target.rows, has_source=bool(target.dataset)), None)
            if isinstance(line, EncodedLine):
                if line.side is not None:
                    return line.side.kind.without_objective(objective, line.place.row)
                first = line.rows
    for row in first:
        try:
            row.with_objective(objective)
        except RowError as error:
            return error
    return None


@dataclass(frozen=True, kw_only=True)
class NamedPaths:
    """The paths that a run names, by what they hold; `targets()` makes a target of each.

    Attributes:
        tokenizers: Tokenizer files, checkpoint folders, or names of shipped tokenizers; or tokenizers that are loaded.
        judges: Tokenizers that encode the rows of the other targets, and are not targets themselves.
        recipes: Recipe files.
        contents: The bytes of recipes, and of the manifests of folders, that have been read, by path.
        datasets: Files of chat rows; each is judged with every tokenizer, or else with every recipe's.
        encoded: Encoded-rows files; they are compared with the first tokenizer or recipe.
        runners: Runners; each gets the rows of every dataset and recipe, or else the packaged ones with each tokenizer.
        allow_code: Whether the runners' configurations are used unchanged, with the code that they name.
        adapters: Adapter folders.
        ggufs: GGUF files; each is compared with the first tokenizer or recipe, or else with the recognised tokenizer.
        servers: Running servers; each is compared with the first tokenizer or recipe, and each adapter's transcripts.
        server_rows: Files of rows to ask each server in place of the packaged ones.
        server_answers: Whether each server is asked for the known answers, too.
        server_limits: The limits of the requests to each server, and the file that keeps the answers of the only one.
        base: The base checkpoint's folder of the adapters.
        oracle: The declared oracle of tokenizers and recipes without a Mistral tokenizer file, or None.
        objective: The declared objective of rows, encoded rows and runners, or None.
        held: Rows in memory, or None; they are judged with the first tokenizer or recipe.
    """

    tokenizers: Sequence[Path | CheckpointTokenizer] = ()
    judges: Sequence[Path | CheckpointTokenizer] = ()
    recipes: Sequence[Path] = ()
    contents: Mapping[Path, bytes] = field(default_factory=dict)
    datasets: Sequence[Path] = ()
    encoded: Sequence[Path] = ()
    runners: Sequence[RunnerChoice] = ()
    allow_code: bool = False
    adapters: Sequence[Path] = ()
    ggufs: Sequence[Path] = ()
    servers: Sequence[ServerChoice] = ()
    server_rows: Sequence[Path] = ()
    server_answers: bool = False
    server_limits: AskingLimits = field(default_factory=AskingLimits)
    base: Path | None = None
    oracle: str | None = None
    objective: Declaration | None = None
    held: RowSource | None = None

    def targets(self) -> list[Target]:
        """Return a target for each path, named after it; equal names get a number."""
        name, base = _Names(), None if self.base is None else BaseFolder(self.base)
        folders = [self._folder(path, base) for path in self.adapters]
        tokenizers = [self._tokenizer(path, name, trains=True) for path in self.tokenizers]
        encoders = [*(self._tokenizer(path, name, trains=False) for path in self.judges), *tokenizers]
        recipes = [self._recipe(path, name) for path in self.recipes]
        datasets = [*self._datasets(encoders or recipes, name)]
        judges = [*encoders, *recipes]
        # rows without a judge are compared with the embedded tokenizer
        of_rows = judges or [Target(EMBEDDED_TRAINING)]
        return [
            *tokenizers,
            *recipes,
            *datasets,
            *(EncodedTarget(name(path), path, judge=of_rows[0], objective=self.objective) for path in self.encoded),
            *([] if self.held is None else [self._held(self.held, of_rows[0], name)]),
            *self._runners([*datasets, *recipes] if datasets else of_rows, name),
            *(AdapterTarget(name(one.path), one.path, given=one, beside=folders) for one in folders),
            # a GGUF file without a judge is compared with the tokenizer that its vocabulary is recognised as
            *(
                (ModelFileTarget if makes_a_model(path) else GgufTarget)(
                    name(path),
                    path,
                    oracle_name=self.oracle,
                    judge=judges[0] if judges else None,
                    base=base,
                    folders=folders,
                )
                for path in self.ggufs
            ),
            *self._servers(of_rows[0], name),
        ]

    def _tokenizer(self, path: Path | CheckpointTokenizer, name: _Names, *, trains: bool) -> Target:
        if not isinstance(path, Path):
            return Target.of_loaded(path, name(path.path))
        if not is_shipped(path):
            return Target(name(path), path, trains=trains, oracle_name=self.oracle)
        from pytest_mistral_lora.chat.oracle import shipped_tokenizer

        return Target(name(path), shipped_tokenizer(str(path)), trains=trains)

    def _recipe(self, path: Path, name: _Names) -> RecipeTarget:
        target = RecipeTarget(name(path), path, trains=True, oracle_name=self.oracle)
        if path in self.contents:
            target.use_content(self.contents[path])
        return target

    def _folder(self, path: Path, base: BaseFolder | None) -> AdapterFolder:
        from pytest_mistral_lora.records.adapter_folder import AdapterFolder

        folder = AdapterFolder(path, base)
        if path in self.contents:
            folder.checkpoint.keep(MANIFEST, self.contents[path])
        return folder

    def _datasets(self, judges: Sequence[Target], name: _Names) -> Iterator[Target]:
        for judge in judges:
            suffix = f"-{judge.name}" if len(judges) > 1 else ""
            for path in self.datasets:
                of_judge = name(Path(f"{name_of(path)}{suffix}"))
                yield DatasetTarget(of_judge, path, judge=judge, objective=self.objective)

    def _held(self, rows: RowSource, judge: Target, name: _Names) -> Target:
        from pytest_mistral_lora.formats.recognition import ids_key
        from pytest_mistral_lora.formats.row_sources import first_records_of

        has_ids = any(ids_key(record.value) for record in first_records_of(rows))
        kind = EncodedTarget if has_ids else DatasetTarget
        return kind(name(Path(rows.place.source.name)), judge=judge, objective=self.objective, source=rows)

    def _runners(self, judges: Sequence[Target], name: _Names) -> Iterator[Target]:
        for runner in self.runners:
            title = name_of(Path(runner.runner)).removesuffix(".py")
            for judge in judges:
                of_judge = name(Path(f"{title}-{judge.name}"))
                yield RunnerTarget(
                    of_judge,
                    runner.config,
                    runner=runner.runner,
                    judge=judge,
                    allow_code=self.allow_code,
                    objective=self.objective,
                )

    def _servers(self, judge: Target, name: _Names) -> Iterator[Target]:
        for server in self.servers:
            if server.is_parsers:
                # they read answers, whatever adapter has said them
                yield server.target(name(server.name), judge)
                continue
            for adapter in self.adapters or (None,):
                title = server.name
                if adapter is not None and len(self.adapters) > 1:
                    title = Path(f"{server.name}-{name_of(adapter)}")
                # the answers depend on the server alone
                is_first = adapter is None or adapter == self.adapters[0]
                given = {"rows": tuple(self.server_rows), "asks_answers": self.server_answers and is_first}
                yield server.target(name(title), judge, adapter, limits=self.server_limits, **given)


class _Names:
    """The names of the targets of a run, which are parts of node ids: two targets must not share one."""

    def __init__(self) -> None:
        self._taken: list[str] = []

    def __call__(self, path: Path) -> str:
        """Return the name of a path's target; a taken name gets a number."""
        self._taken.append(free_name(name_of(path), self._taken))
        return self._taken[-1]


_ROOM = "pytest_mistral_lora.conformance"
SUBJECT_CHECKS = {
    "tokenizer": ("tokenizer.checks", "checks"),
    "template": ("template", "checks"),
    "user goldens": ("user_goldens", "rendering_checks"),
    "mask": ("mask.checks", "checks"),
    "recipe": ("dataset.recipe", "recipe_checks"),
    "dataset": ("dataset.checks", "checks"),
    "encoded": ("encoded.audit", "checks"),
    "adapter": ("adapter.checks", "checks"),
    "merged": ("merged.checks", "checks"),
    "manifest": ("manifest", "checks"),
    "transcript": ("transcript", "checks"),
    "user transcripts": ("user_goldens", "transcript_checks"),
    "train": ("train.checks", "checks"),
    "runner": ("runner", "checks"),
    "gguf": ("gguf.checks", "checks"),
    "server": ("server.checks", "checks"),
    "answer": ("answer.checks", "checks"),
    "trainer": ("trainer", "checks"),
    "watched": ("trainer", "watched_checks"),
}
"""The module and function of the checks of each subject, which is imported when one of its targets is collected."""

_OF_TOKENIZER = ("tokenizer", "template", "user goldens", "mask")
_OF_USER_GOLDENS = ("user goldens", "user transcripts")
_OF_TARGET: dict[type[Target], tuple[str, ...]] = {
    Target: _OF_TOKENIZER,
    # first: an unusable recipe, base or tokenizer is then this subject's finding
    RecipeTarget: ("recipe", *_OF_TOKENIZER, "dataset"),
    DatasetTarget: ("dataset",),
    EncodedTarget: ("encoded",),
    RunnerTarget: ("runner",),
    AdapterTarget: ("adapter", "manifest", "transcript", "user transcripts"),
    GgufTarget: ("gguf",),
    ModelFileTarget: ("gguf",),
    ServerTarget: ("server", "answer"),
    ParsersTarget: ("answer",),
    TrainerTarget: ("trainer",),
    WatchedTarget: ("watched",),
}
"""The subjects of each kind of target, in order; a merged model has `merged` in place of `adapter`."""

_Results = dict[tuple[Path, str | None, str, str], Result]
"""Results by the place of the tokenizer, its declared oracle, the subject and the case."""


def collect(targets: Sequence[Target], settings: Settings, kept: KeptResults | None = None) -> Iterator[Check]:
    """Yield every check of the targets; no tokenizer or model is loaded before a check runs.

    The checks of the tiny train come last, so that it can run beside the others.

    Args:
        targets: The targets.
        settings: The settings of the run.
        kept: The results of earlier runs; None to run every check. With them, a recipe's base is opened here.
    """
    results: _Results = {}
    causes = Causes(settings.shared_folder)
    for target in targets:
        yield from (replace(check, causes=causes) for check in _checks(target, settings, results, kept))
    for target in targets:
        if target.trains and not settings.skip_training:
            yield from (replace(check, causes=causes) for check in _subject_checks("train", target, settings))


def _checks(target: Target, settings: Settings, results: _Results, kept: KeptResults | None = None) -> Iterator[Check]:
    for named in next(_OF_TARGET[kind] for kind in type(target).mro() if kind in _OF_TARGET):
        if named in _OF_USER_GOLDENS and not settings.golden_folders:
            continue
        make = partial(_made_checks, named, target, settings, results)
        yield from make() if kept is None else kept.checks_of(named, target, settings, make)
    if isinstance(target, RecipeTarget):
        # an unchanged recipe is not parsed again to find what it has made
        output = None if kept is None else kept.outputs.get(target.name)
        if (made := AdapterTarget.made_by(target, output)) is not None:
            yield from _checks(made, settings, results, kept)


def _made_checks(named: str, target: Target, settings: Settings, results: _Results) -> Iterator[Check]:
    is_merged = named == "adapter" and isinstance(target, AdapterTarget) and target.is_merged
    subject = "merged" if is_merged else named
    # which of the user's goldens apply depends on the target's name
    is_shared = subject in _OF_TOKENIZER and subject != "user goldens" and not target.is_in_memory
    for check in _subject_checks(subject, target, settings):
        yield replace(check, judge=partial(_judge_once, check, results)) if is_shared else check


def _subject_checks(subject: str, target: Target, settings: Settings) -> Iterator[Check]:
    module, function = SUBJECT_CHECKS[subject]
    found: Iterator[Check] = getattr(import_module(f"{_ROOM}.{module}"), function)(target, settings)
    return found


def _judge_once(check: Check, results: _Results) -> Result:
    """Return the result of a check, or of the same check of another target with the same tokenizer.

    A recipe and its base folder are such targets, and so are two recipes with one base. Each target has every check,
    but the hundred checks of the shared tokenizer run once.
    """
    # here and not in `collect`: the base of a recipe is searched for when its first check runs
    tokenizer = check.target.tokenizer
    key = (tokenizer.path.resolve(), tokenizer.declared, check.subject, check.case)
    if key not in results:
        results[key] = check.judge()
    return results[key]
