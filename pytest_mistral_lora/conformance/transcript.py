"""Subject `transcript`: whether an adapter or a merged model answers like its golden transcripts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter.checks import AdapterChecks
from pytest_mistral_lora.conformance.adapter.weights import reason_not_to_load
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.errors import InputError, PinError, TokenizerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.gate import Gate
from pytest_mistral_lora.records.goldens import golden_paths
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load

if TYPE_CHECKING:
    from torch import nn

    from pytest_mistral_lora.checkpoint.encoder import Encoder
    from pytest_mistral_lora.records.judgement import AnswerJudgement
    from pytest_mistral_lora.training.generate.model_spec import ModelSpec

_NO_TRANSCRIPTS = "no transcripts: record some with mistral-lora smoke DIR --record FOLDER --rows FILE"


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of the transcripts in an adapter folder."""
    model = model_of(target.adapter, settings.device)
    judged = TranscriptChecks(model, target.folder / TRANSCRIPTS)
    cases = {"files": judged.files}
    if judged.golden.is_dir():
        cases |= {"recorded-on": judged.recorded_on, "prompts": judged.prompts}
        cases |= {"answers": judged.answers, "formats": judged.formats}
    gate = recorded_gate(target.adapter)
    if gate is not None:
        cases["gate"] = partial(_judge_gate, gate, Place.of(target.adapter.manifest_file))
    for case, judge in cases.items():
        yield Check(target, "transcript", case, judge)


def recorded_gate(folder: AdapterFolder) -> Gate | None:
    """Return the gate that the manifest of a folder records; None if it records none, or is not valid."""
    manifest = folder.valid_manifest
    return None if manifest is None else Gate.recorded_in(manifest.data)


def _judge_gate(gate: Gate, place: Place) -> Result:
    """Judge the numbers that a run recorded; a recorded verdict is not read."""
    results = [result for _, result in gate_results(gate, place.within("evaluation"))]
    findings = tuple(finding for result in results for finding in result.findings)
    reasons = [result.not_checked for result in results if result.not_checked]
    return Result(findings, "; ".join(reasons), facts=(("gate", gate.verdict),))


def gate_results(gate: Gate, place: Place) -> Iterator[tuple[str, Result]]:
    """Yield the name and the result of each line of a gate: one that failed is a finding, an undecided one not checked.

    Args:
        gate: The gate.
        place: The place of findings.
    """
    for line in gate.lines:
        name = f"gate-{line.name.replace(' ', '-')}"
        facts = tuple(line.to_json().items())
        if line.verdict == "failed":
            yield name, Result((Finding("ML807", line.found, place, line.expected, gate.how),), facts=facts)
        else:
            yield name, Result(not_checked=f"{line.name}: {line.reason}" if line.reason else "", facts=facts)


def transcript_findings(adapter: Path, golden: Path, base: Path | None = None) -> Iterator[Finding]:
    """Yield the differences between an adapter's answers and golden transcripts, perhaps recorded by another adapter.

    Args:
        adapter: The adapter's folder.
        golden: A transcript, or a folder of transcripts.
        base: The base's folder, or None to look for it; nothing is fetched.

    Raises:
        InputError: If transcripts, adapter or base are missing, or no answer can be judged.
    """
    folder = AdapterFolder(adapter, BaseFolder(base) if base else None)
    judged = TranscriptChecks(TranscriptModel(folder, "auto"), golden)
    if not judged.paths:
        raise InputError(_NO_TRANSCRIPTS, place=str(golden))
    if judged.model.missing:
        raise InputError(judged.model.missing, place=str(adapter))
    # on another base, answers differ for another reason than the adapter
    yield from judged.files().findings
    foreign = tuple(judged.foreign_base_findings())
    yield from foreign
    if not foreign:
        results = [judge() for judge in (judged.prompts, judged.answers, judged.formats)]
        findings = [finding for result in results for finding in result.findings]
        yield from findings
        reason = next((result.not_checked for result in results if result.not_checked), "")
        if reason and not findings and judged.transcripts:
            raise InputError(f"no answer was judged: {reason}", place=str(adapter))


def read_transcripts(paths: Iterable[Path]) -> tuple[Sequence[Transcript], Sequence[Finding]]:
    """Return the transcripts of files, and a finding for each file that is not a transcript."""
    found, wrong = [], []
    for path in paths:
        try:
            found.append(load(path))
        except InputError as error:
            wrong.append(Finding("ML801", error.found, error.place, "a golden transcript"))
    return found, wrong


def prompt_finding(encoder: Encoder, transcript: Transcript, place: Place | None = None) -> Finding | None:
    """Return the finding of a transcript whose prompt now has other ids than recorded; None if they are equal.

    Args:
        encoder: The encoder of the model.
        transcript: The transcript.
        place: The place of its file; None for the name of its case.
    """
    from pytest_mistral_lora.records.judgement import check_prompt

    try:
        check_prompt(encoder, transcript)
    except InputError as error:
        return Finding("ML802", error.found, place or error.place, error.expected, error.next_step)
    return None


class TranscriptModel:
    """The model of a folder, loaded once for all checks of its transcripts.

    Attributes:
        folder: The folder of the adapter or merged model.
        device: `auto`, `cpu` or `cuda`.
    """

    def __init__(self, folder: AdapterFolder, device: str) -> None:
        self.folder: AdapterFolder = folder
        self.device: str = device
        self._shortage: str | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        """The model, before any weight is loaded.

        Raises:
            InputError: If adapter and base do not go together.
        """
        from pytest_mistral_lora.training.generate.model_spec import ModelSpec

        return ModelSpec.of(self.folder, device=self.device)

    @property
    def missing(self) -> str:
        """Why the base is not found; empty if it is, and for a merged model."""
        return "" if self.folder.kind == "merged" else self.folder.located_base.missing

    def make_room(self) -> str:
        """Release the model of another folder, and return why this one cannot be loaded; empty if it can."""
        if self._shortage is None:
            load_model.cache_clear()
            # cached: after this model is loaded, the free memory means nothing
            self._shortage = self.missing or reason_not_to_load(self.folder.base)
        return self._shortage


@lru_cache(maxsize=1)  # the checks of one folder are collected one after the other
def model_of(folder: AdapterFolder, device: str) -> TranscriptModel:
    """Return the model of a folder, shared by its own transcripts and the user's."""
    return TranscriptModel(folder, device)


@lru_cache(maxsize=1)  # folders are judged one after the other, and memory may hold only one model
def load_model(model: TranscriptModel) -> nn.Module:
    """Return the model in eval mode."""
    loaded: nn.Module = model.spec.load()
    return loaded


class TranscriptChecks:
    """The checks of transcripts against a model: each method is a check, and all share the model's answers.

    Attributes:
        model: The model.
        golden: The transcripts' folder, or one transcript.
    """

    def __init__(self, model: TranscriptModel, golden: Path) -> None:
        self.model: TranscriptModel = model
        self.golden: Path = golden

    @cached_property
    def paths(self) -> list[Path]:
        """The files of the transcripts."""
        return [self.golden] if self.golden.is_file() else golden_paths(self.golden)

    @cached_property
    def _read(self) -> tuple[Sequence[Transcript], Sequence[Finding]]:
        return read_transcripts(self.paths)

    @property
    def transcripts(self) -> Sequence[Transcript]:
        """The readable transcripts."""
        return self._read[0]

    @cached_property
    def _moved_prompts(self) -> dict[str, Finding]:
        """A finding for each transcript whose prompt now has other ids than recorded, by case."""
        places = {transcript.case: _file_of(transcript.case, self.golden) for transcript in self.transcripts}
        found = {
            transcript.case: prompt_finding(self.model.spec.encoder, transcript, places[transcript.case])
            for transcript in self.transcripts
        }
        return {case: finding for case, finding in found.items() if finding}

    @cached_property
    def _foreign_ids(self) -> dict[str, Finding]:
        """A finding for each transcript with ids that the model lacks, by case."""
        found, known = {}, self.model.spec.base.vocab_size
        for transcript in self.transcripts:
            try:
                transcript.require_ids_below(known)
            except InputError as error:
                place = _file_of(transcript.case, self.golden).within(*error.place.part)
                found[transcript.case] = Finding("ML806", error.found, place, error.expected, error.next_step)
        return found

    @cached_property
    def _judgements(self) -> Sequence[AnswerJudgement]:
        """The judgement of each transcript whose prompt has the recorded ids."""
        from pytest_mistral_lora.training.generate.judge import judge

        spec, moved = self.model.spec, self._moved_prompts
        # another prompt has another answer, which is not a fault of the adapter
        chosen = [
            transcript
            for transcript in self.transcripts
            if transcript.case not in moved and transcript.case not in self._foreign_ids
        ]
        model = load_model(self.model) if chosen else None
        return [judge(model, spec.encoder, transcript, precision=spec.precision) for transcript in chosen]

    @cached_property
    def _nothing_to_answer(self) -> str:
        try:
            return "" if self._judgements else "no transcript can be asked: see the check `prompts`"
        except (PinError, TokenizerError):
            raise
        except InputError:
            # the checks of the adapter name the tensor; PEFT's refusal must not end them
            if self.model.folder.kind == "merged" or not AdapterChecks(self.model.folder).misfits:
                raise
            return "adapter and base do not fit: see the checks of the adapter"

    @cached_property
    def _not_judged(self) -> str:
        """Why prompts and answers are not checked; empty if they are."""
        if not self.paths:
            return _NO_TRANSCRIPTS
        if not self.transcripts:
            return "no transcript can be read: see the check `files`"
        if self.model.missing:
            return self.model.missing
        try:
            foreign = list(self.foreign_base_findings())
        except (PinError, TokenizerError):
            raise
        except InputError as error:
            return f"adapter and base cannot be read: {error}"
        if foreign:
            return "the base is another one: see the check `recorded-on`"
        return self.model.make_room()

    def foreign_base_findings(self) -> Iterator[Finding]:
        """Yield a finding for each transcript that was recorded on another base.

        Raises:
            InputError: If adapter and base do not go together.
        """
        weights = self.model.spec.identity["base_weights_sha256"]
        for transcript in self.transcripts:
            recorded = transcript.model["base_weights_sha256"]
            if recorded != weights:
                found = f"the base's weights have SHA-256 {weights}"
                yield Finding("ML803", found, _file_of(transcript.case, self.golden), f"{recorded}, as recorded")

    def files(self) -> Result:
        """Check that every transcript keeps its schema and does not contradict itself."""
        return Result(tuple(self._read[1])) if self.paths else Result(not_checked=_NO_TRANSCRIPTS)

    def recorded_on(self, *, checks_adapter: bool = True) -> Result:
        """Check that the transcripts were recorded on the base and, if they are the folder's own, with its adapter."""
        if not self.paths or self.model.missing:
            return Result(not_checked=self.model.missing if self.paths else _NO_TRANSCRIPTS)
        try:
            tensors = self.model.spec.identity["tensors_sha256"]
            foreign = [*self.foreign_base_findings()]
        except (PinError, TokenizerError):
            raise
        except InputError as error:
            return Result((Finding("ML803", error.found, error.place, error.expected),))
        for transcript in self.transcripts if checks_adapter else ():
            recorded = transcript.model["tensors_sha256"]
            if recorded != tensors:
                kind = "model" if self.model.folder.kind == "merged" else "adapter"
                found = f"the {kind}'s tensors have SHA-256 {tensors}"
                foreign.append(
                    Finding("ML803", found, _file_of(transcript.case, self.golden), f"{recorded}, as recorded")
                )
        return Result(tuple(foreign))

    def prompts(self) -> Result:
        """Check that the prompts have the recorded ids, and that the model has all of these ids."""
        if self._not_judged:
            return Result(not_checked=self._not_judged)
        return Result((*self._moved_prompts.values(), *self._foreign_ids.values()))

    def answers(self) -> Result:
        """Check that the adapter answers as recorded, or equivalently."""
        if reason := self._not_judged or self._nothing_to_answer:
            return Result(not_checked=reason)
        findings = [finding for judgement in self._judgements for finding in different_answer(judgement, self.golden)]
        tiers = [judgement.tier for judgement in self._judgements]
        return Result(tuple(findings), facts=tuple((tier, tiers.count(tier)) for tier in dict.fromkeys(tiers)))

    def formats(self) -> Result:
        """Check that the answers keep their recorded formats."""
        if reason := self._not_judged or self._nothing_to_answer:
            return Result(not_checked=reason)
        from pytest_mistral_lora.records.judgement import format_rates

        findings = (finding for judgement in self._judgements for finding in broken_formats(judgement, self.golden))
        return Result(tuple(findings), facts=format_rates(self._judgements))


def answer_results(judgements: Sequence[AnswerJudgement], golden: Path) -> Iterator[tuple[str, Result]]:
    """Yield the name and the result of each transcript: another answer or a broken format is a finding.

    The last result is that of all: how many answers have each recorded format.

    Args:
        judgements: The judgement of each transcript.
        golden: The transcripts' folder, or one transcript.
    """
    from pytest_mistral_lora.records.judgement import format_rates

    for judgement in judgements:
        findings = (*different_answer(judgement, golden), *broken_formats(judgement, golden))
        yield judgement.case, Result(findings, facts=(("tier", judgement.tier),))
    if rates := format_rates(judgements):
        yield "formats", Result(facts=rates)


def different_answer(judgement: AnswerJudgement, golden: Path) -> Iterator[Finding]:
    """Yield the finding of an answer that differs from the one recorded in a folder or file of transcripts."""
    from pytest_mistral_lora.records.judgement import difference_text

    if judgement.tier == "different":
        token = judgement.difference.token if judgement.difference else 0
        detail = "\n".join([f"tier: {judgement.tier}", *difference_text(judgement)])
        place = _file_of(judgement.case, golden).at_token(token)
        yield Finding("ML804", f"answered {judgement.text!r}", place, repr(judgement.golden_text), detail)


def broken_formats(judgement: AnswerJudgement, golden: Path) -> Iterator[Finding]:
    """Yield a finding for each recorded format that an answer breaks."""
    for check in judgement.broken_checks:
        place = _file_of(judgement.case, golden)
        yield Finding("ML805", f"{check.name}: {check.reason}", place, "passed, as recorded")


def _file_of(case: str, golden: Path) -> Place:
    return Place.of(golden if golden.is_file() else golden / f"{case}.json")
