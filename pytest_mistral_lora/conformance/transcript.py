"""An adapter that is asked: its base, and the model, loaded once for all of its checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.adapter.base import enough_memory
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import AdapterTarget
from pytest_mistral_lora.errors import InputError, PinError, TokenizerError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder, LocatedBase, is_merged

if TYPE_CHECKING:
    from pytest_mistral_lora.records.transcripts import Transcript
    from pytest_mistral_lora.training.generate.compare import Adapted
    from pytest_mistral_lora.training.generate.judge import AnswerJudgement


@dataclass(frozen=True, eq=False)
class Answering:
    """An adapter, or a merged model, under judgement.

    Attributes:
        folder: Its folder.
        given: The base that the user named, or None.
        device: Where the model runs: `auto`, `cpu` or `cuda`.
    """

    folder: Path
    given: Path | None
    device: str

    @cached_property
    def base(self) -> LocatedBase:
        """The base, if it is found; a merged model is its own."""
        return AdapterFolder(self.folder).locate_base(self.folder if self.merged else self.given)

    @cached_property
    def merged(self) -> bool:
        """Whether it is a merged model."""
        return is_merged(self.folder)

    @cached_property
    def missing(self) -> str:
        """Why the adapter cannot be asked; empty where it can, as far as its files are sound."""
        if self.base.folder is None:
            return self.base.missing
        _loaded.cache_clear()  # the model of the adapter before takes memory that this one may need
        return enough_memory(self.base.folder)

    @cached_property
    def adapted(self) -> Adapted:
        """The adapter and its base, before a weight is loaded.

        Raises:
            InputError: If they do not go together.
        """
        from pytest_mistral_lora.training.generate.compare import Adapted

        return Adapted.find(self.folder, None if self.merged else self.base.folder, device=self.device)

    @property
    def model(self) -> Any:
        """Base with adapter, in eval mode."""
        return _loaded(self)


@lru_cache(maxsize=1)  # adapters are judged one after the other, and memory may hold only one model
def _loaded(answering: Answering) -> Any:
    return answering.adapted.load()


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an adapter folder's transcripts, and of those that the user has recorded of it."""
    from pytest_mistral_lora.conformance.user_goldens import transcript_checks as transcript_checks

    answering = Answering(target.folder, target.base, settings.device)
    judged = Judged(answering, target.folder / "transcripts")
    cases = {"files": judged.files}
    if judged.golden.is_dir():
        cases |= {"recorded-on": judged.recorded_on, "prompts": judged.prompts}
        cases |= {"answers": judged.answers, "formats": judged.formats}
    for case, judge in cases.items():
        yield Check(target, "transcript", case, judge)
    yield from transcript_checks(target, settings, answering)


def transcript_findings(adapter: Path, golden: Path, base: Path | None = None) -> Iterator[Finding]:
    """Yield in what an adapter differs from golden transcripts, which another adapter may have recorded.

    Args:
        adapter: The adapter's folder.
        golden: A transcript, or a folder of transcripts.
        base: The base's folder, or None: then it is looked for.

    Raises:
        InputError: If there are no transcripts, no adapter, or the base is not at hand.
    """
    answering = Answering(adapter, base, "auto")
    judged = Judged(answering, golden)
    if judged.absent:
        raise InputError(judged.absent, place=str(golden))
    if answering.base.folder is None:
        raise InputError(answering.base.missing, place=str(adapter))
    yield from judged.files().findings
    foreign = tuple(judged.foreign_base())
    yield from foreign
    if not foreign:
        for judge in (judged.prompts, judged.answers, judged.formats):
            yield from judge().findings


@dataclass(frozen=True)
class Judged:
    """An adapter and its transcripts under judgement; each method is one check.

    Attributes:
        answering: The adapter.
        golden: The transcripts' folder, or one transcript.
    """

    answering: Answering
    golden: Path

    @property
    def absent(self) -> str:
        """Why there is nothing to judge; empty where there is."""
        return (
            "" if self._paths else "no transcripts: record some with mistral-lora smoke DIR --record FOLDER --rows FILE"
        )

    @property
    def _paths(self) -> list[Path]:
        from pytest_mistral_lora.records.transcripts import transcript_files

        return [self.golden] if self.golden.is_file() else transcript_files(self.golden)

    @cached_property
    def _read(self) -> tuple[Sequence[Transcript], Sequence[Finding]]:
        from pytest_mistral_lora.records.transcripts import load

        found, wrong = [], []
        for path in self._paths:
            try:
                found.append(load(path))
            except InputError as error:
                wrong.append(Finding("ML801", error.found, error.place, "a golden transcript"))
        return found, wrong

    @property
    def transcripts(self) -> Sequence[Transcript]:
        """The transcripts that can be read."""
        return self._read[0]

    @cached_property
    def judgements(self) -> Sequence[AnswerJudgement]:
        """What each transcript came to whose prompt is as it was."""
        from pytest_mistral_lora.training.generate.judge import judge

        adapted, moved = self.answering.adapted, self._moved
        chosen = [one for one in self.transcripts if one.case not in moved]
        model = self.answering.model if chosen else None
        return [judge(model, adapted.encoder, one, precision=adapted.precision) for one in chosen]

    @cached_property
    def _moved(self) -> dict[str, Finding]:
        """A finding for each transcript whose prompt is encoded otherwise, by case."""
        from pytest_mistral_lora.training.generate.judge import check_prompt

        found = {}
        for transcript in self.transcripts:
            try:
                check_prompt(self.answering.adapted.encoder, transcript)
            except InputError as error:
                found[transcript.case] = Finding("ML802", error.found, self._place(transcript.case), error.expected)
        return found

    @cached_property
    def _not_at_hand(self) -> str:
        """Why prompts and answers cannot be judged; empty where they can."""
        if self.absent or not self.transcripts:
            return self.absent or "no transcript can be read: see the check `files`"
        if self.answering.base.folder is None:
            return self.answering.missing
        try:
            foreign = list(self.foreign_base())
        except (PinError, TokenizerError):
            raise
        except InputError as error:
            return f"adapter and base cannot be read: {error}"
        if foreign:
            return "the base is another one: see the check `recorded-on`"
        return self.answering.missing

    def _place(self, case: str) -> str:
        return str(self.golden if self.golden.is_file() else self.golden / f"{case}.json")

    def foreign_base(self) -> Iterator[Finding]:
        """Yield each transcript that was recorded on another base.

        Raises:
            InputError: If adapter and base do not go together.
        """
        found = self.answering.adapted.identity["base_weights_sha256"]
        for one in self.transcripts:
            recorded = one.model["base_weights_sha256"]
            if recorded != found:
                says = f"the base's weights have SHA-256 {found}"
                yield Finding("ML803", says, self._place(one.case), f"{recorded}, as recorded")

    def files(self) -> Result:
        """Check that every transcript keeps its schema and does not contradict itself."""
        return Result(not_checked=self.absent) if self.absent else Result(tuple(self._read[1]))

    def recorded_on(self) -> Result:
        """Check that the folder's transcripts are of its own adapter, and of the base."""
        return self._recorded_on(own=True)

    def on_base(self) -> Result:
        """Check that the transcripts are of the base, whichever adapter they were recorded with."""
        return self._recorded_on(own=False)

    def _recorded_on(self, *, own: bool) -> Result:
        if self.absent or self.answering.base.folder is None:
            return Result(not_checked=self.absent or self.answering.missing)
        try:
            found = self.answering.adapted.identity["tensors_sha256"]
            foreign = [*self.foreign_base()]
        except (PinError, TokenizerError):
            raise
        except InputError as error:
            return Result((Finding("ML803", error.found, error.place, error.expected),))
        for one in self.transcripts if own else ():
            recorded = one.model["tensors_sha256"]
            if recorded != found:
                says = f"the {'model' if self.answering.merged else 'adapter'}'s tensors have SHA-256 {found}"
                foreign.append(Finding("ML803", says, self._place(one.case), f"{recorded}, as recorded"))
        return Result(tuple(foreign))

    def prompts(self) -> Result:
        """Check that the prompts are encoded into the recorded ids."""
        return Result(not_checked=self._not_at_hand) if self._not_at_hand else Result(tuple(self._moved.values()))

    def answers(self) -> Result:
        """Check that the adapter answers as recorded, or equivalently."""
        if self._not_at_hand:
            return Result(not_checked=self._not_at_hand)
        findings = tuple(self._different(one) for one in self.judgements if one.tier == "different")
        tiers = [one.tier for one in self.judgements]
        return Result(findings, facts=tuple((tier, tiers.count(tier)) for tier in dict.fromkeys(tiers)))

    def formats(self) -> Result:
        """Check that the answers keep the forms that they were recorded with."""
        if self._not_at_hand:
            return Result(not_checked=self._not_at_hand)
        return Result(
            tuple(
                Finding("ML805", f"{check.name}: {check.reason}", self._place(one.case), "passed, as recorded")
                for one in self.judgements
                for check in one.broken_checks
            )
        )

    def _different(self, one: AnswerJudgement) -> Finding:
        from pytest_mistral_lora.training.generate.judge import difference_text

        place = f"{self._place(one.case)}, token {one.difference.token if one.difference else 0}"
        detail = "\n".join([f"tier: {one.tier}", *difference_text(one)])
        return Finding("ML804", f"answered {one.text!r}", place, repr(one.golden_text), detail)
