"""Subject `template`: goldens, and the chat template compared with mistral-common on the packaged rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.diff import TokenDiff, with_shape
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, imported
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result, shown_difference
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import MistralLoraError, OracleRejection, RowError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.goldens import (
    Case,
    Golden,
    golden_paths,
    goldens_folder,
    library_versions,
    load,
    packaged_cases,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.templates import ChatTemplate
    from pytest_mistral_lora.chat.templates.compare import Difference
    from pytest_mistral_lora.programs.templates import PublishedTemplate

UNSTEADY = {"unsteady": "ML021", "surrogate": "ML022"}
"""The rule of each kind of error that is a fault of the template for any row."""


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each packaged case, and one of `apply_chat_template`.

    A shipped tokenizer has its own goldens; any other tokenizer is judged by the rows of all versions.
    """
    if target.path is None:
        for path in golden_paths(goldens_folder() / "templates" / target.name):
            yield Check(target, "template", path.stem, partial(lambda path: judge(target, load(path)), path))
    else:
        for case in packaged_cases():
            yield Check(target, "template", case.name, partial(_check_packaged, target, case))
        if target.is_folder or target.is_in_memory:
            yield Check(target, "template", "published", partial(_check_published, target))
    yield Check(target, "template", "apply-chat-template", partial(_check_applied, target))


def _check_applied(target: Target) -> Result:
    """Check that `apply_chat_template` gives a row the ids of its own rendering."""
    template = target.template
    rendered = 0
    # every fourth row: the call fails for all rows or none, and rendering every row twice is slow
    for case in packaged_cases()[::4]:
        try:
            expected, found = template.ids(case.row), template.applied(case.row)
        except RowError:
            continue  # the template refuses the row: the checks of the packaged rows report it
        rendered += 1
        if tuple(found) != expected:
            differs = (
                f"apply_chat_template gives {len(found)} ids, and others than the {len(expected)} of what it renders"
            )
            return Result((Finding("ML008", differs, row=case.row.to_jsonl()),))
    return Result(not_checked="" if rendered else "the chat template renders none of the packaged rows")


def _check_packaged(target: Target, case: Case) -> Result:
    golden: Golden | None = None
    if target.shipped_name is not None:
        # a file with the bytes of a shipped tokenizer has its goldens, under any name
        path = goldens_folder() / "templates" / target.shipped_name / f"{case.name}.json"
        if not path.is_file():
            return Result(not_checked=f"{target.oracle.version} cannot encode this case")
        golden = load(path)
    elif not case.fits(target.oracle):
        return Result(not_checked=f"{target.oracle.version} cannot encode this case")
    result = judge(target, golden or case)
    if result.findings or target.has_template:
        return result
    # mistral-common's ids equal the recorded ones: the case is about the template
    return Result(not_checked=target.no_template)


def _check_published(target: Target) -> Result:
    """Name the published template that a tokenizer has, and judge whether the engines of servers render it: ML023."""
    from pytest_mistral_lora.chat.oracle import VERSION
    from pytest_mistral_lora.programs.templates import published_templates

    target.tokenizer.files.refuse_hazards()
    source = target.tokenizer.template_text
    if source is None:
        return Result(not_checked="there is no chat template")
    register = published_templates()
    published = register.find(source)
    if published is not None:
        findings = tuple(_engine_findings(published, register.engines, template_file(target)))
        return Result(findings, facts=(("template of", f"that of {published.title} ({register.date}), unchanged"),))
    if _is_generated(target, source):
        return Result(facts=(("template of", f"mistral-common {VERSION} generates it"),))
    return Result()


def _is_generated(target: Target, source: str) -> bool:
    """Return whether a template is the one that mistral-common generates, with or without generation blocks."""
    from pytest_mistral_lora.chat.templates.renderer import training_source
    from pytest_mistral_lora.programs.templates import template_text

    # a folder without an oracle, or without a tokenizer: other checks report it
    with suppress(MistralLoraError):
        oracle = target.oracle
        generated = [oracle.chat_template()]
        if oracle.facts.plain_thinking:
            generated.append(oracle.chat_template(plain_thinking=False))
        generated += [training_source(text) or text for text in generated]
        return template_text(source) in map(template_text, generated)
    return False


def _engine_findings(template: PublishedTemplate, versions: Mapping[str, str], place: Place) -> Iterator[Finding]:
    """Yield ML023 for each error that the engine of a server, of a version, ended in on the packaged rows."""
    from pytest_mistral_lora.serving.servers import SERVERS

    for name, verdict in template.engines.items():
        for error, cases in verdict.failed.items():
            found = (
                f"{SERVERS[name].title} {versions[name]} fails at {len(cases)} of {verdict.rows} packaged prompts, "
                f"the first of them {cases[0]}: {error}"
            )
            yield Finding("ML023", found, place, "a prompt, as jinja2 renders it", fix=_engine_fix(template.own_prompt))


def _engine_fix(own_prompt: str) -> str:
    """Return the fix of ML023, which keeps the template's own system prompt, if it writes one."""
    prompt = {"none": "", "note": "{own_template}", "error": "prompt.txt"}[own_prompt]
    write = _write_template(prompt)
    return f"Start the server with the template that mistral-common generates: {write}."


def judge(target: Target, case: Golden | Case) -> Result:
    """Judge a target by a golden, or by a case whose ids are not recorded for this target.

    A target without a chat template is judged only by the recorded ids.
    """
    golden = case if isinstance(case, Golden) else None
    try:
        encoded = target.oracle.encode(case.row)
    except OracleRejection as error:
        if golden:
            finding = Finding("ML002", error.found, Place.of(golden.path), "the recorded ids", row=case.row.to_jsonl())
            return Result((finding,))
        return Result(not_checked=f"{target.oracle.version} cannot encode this case: {error.found}")
    findings = list(_against_record(target, golden, encoded)) if golden else []
    # chat templates have a layout of conversations alone
    if not findings and target.has_template and case.row.kind.is_chat:
        from pytest_mistral_lora.chat.templates.compare import prompts_of

        file = template_file(target)
        judged = partial(
            template_findings,
            target.oracle,
            target.template,
            place=_place_of_case(case, file),
            file=file,
            versions=_versions(golden) if golden else running_versions(),
        )
        findings += judged(case.row, recorded=golden.deviations if golden else None)
        for prompt in () if findings else prompts_of(case.row):
            # a prompt can be refused where the row is not
            with suppress(OracleRejection):
                findings += judged(prompt, as_prompt=True)
    return Result(tuple(findings))


def template_file(target: Target) -> Place:
    """Return the place of a tokenizer's own template; empty for what mistral-common generates for a file."""
    return target.tokenizer.template_place


def _place_of_case(case: Golden | Case, template: Place) -> Place:
    """Return the place of a difference on a packaged row, the template's file; on a user's golden, the golden."""
    if not isinstance(case, Golden):
        return template or Place.of(case.name)
    is_packaged = case.path.is_relative_to(goldens_folder())
    return template if template and is_packaged else _place(case)


def _place(golden: Golden) -> Place:
    if not golden.path.is_relative_to(goldens_folder()):
        return Place.of(golden.path)  # a user's golden: CI shows a finding beside the file
    return Place.of(f"{golden.path.parent.name}/{golden.path.name}")


def _against_record(target: Target, golden: Golden, now: EncodedRow) -> Iterator[Finding]:
    row = golden.row.to_jsonl()
    law = golden.row.kind.text_law
    if law and (violation := imported(law)(golden.row, golden.encoded, target.oracle)):
        yield Finding("ML001", violation, _place(golden), "the assistant's own text", row=row)
        return
    recorded = (golden.encoded.input_ids, golden.encoded.labels)
    names = ("recorded", "mistral-common now")
    difference = TokenDiff.of(recorded, (now.input_ids, now.labels), target.oracle.piece, names, golden.encoded.spans)
    rule, found = "", ""
    if now.input_ids != golden.encoded.input_ids:
        rule, found = "ML002", "mistral-common gives other ids than recorded"
    elif now != golden.encoded:
        rule, found = "ML003", "labels or spans are not those recorded"
    if rule:
        parts = shown_difference(difference, _place(golden))
        detail = "\n".join(filter(None, (parts["detail"], _versions(golden))))
        found = with_shape(found, parts["shape"])
        yield Finding(rule, found, _place(golden), row=row, **{**parts, "detail": detail})


def template_findings(
    oracle: Oracle,
    template: ChatTemplate,
    row: Row,
    *,
    recorded: Collection[str] | None = None,
    place: Place = NOWHERE,
    file: Place = NOWHERE,
    versions: str = "",
    as_prompt: bool = False,
) -> Iterator[Finding]:
    """Yield each difference that a chat template makes to a row or a prompt, if no named deviation explains it.

    A row without a system message is compared behind the template's own system prompt, if it writes one:
    `own_prompt_finding` reports that once.

    Args:
        oracle: Mistral's own tokenization.
        template: The template with its tokenizer.
        row: The row, or a prompt of it.
        recorded: Named deviations recorded for this row; None to accept every named deviation.
        place: The file and line of the row, or the template's file.
        file: The template's file; may be empty.
        versions: Lines with the library versions of recording and of this run; by default only of this run.
        as_prompt: Whether it is a prompt: then its labels are not judged.

    Raises:
        OracleRejection: If mistral-common refuses the row.
    """
    from pytest_mistral_lora.chat.templates.compare import OTHER_LAYOUT, compare

    comparison = compare(row, oracle, template, as_prompt=as_prompt)
    versions, data = versions or running_versions(), row.to_jsonl()
    if comparison.refusal in UNSTEADY:
        yield Finding(UNSTEADY[comparison.refusal], comparison.unexplained, place, detail=versions, row=data)
        return
    fix = _fix(template) if comparison.differences else ""
    for difference in comparison.differences:
        found, ids = difference_words(difference, NOWHERE if file == place else file, is_prompt=as_prompt)
        sides = comparison.sides_of(difference)
        spans = comparison.oracle.spans if sides and sides[0][1] is not None else ()
        parts: dict[str, Any] = {"detail": ""}
        if sides:
            parts = shown_difference(TokenDiff.of(*sides, oracle.piece, _SIDES, spans), place)
        detail = "\n".join(filter(None, (ids, parts["detail"], versions)))
        parts |= {"detail": detail, "shape": difference.shape, "name": difference.fault}
        if difference.shape != OTHER_LAYOUT and not template.writes_controls:
            # what else it does differently goes with its layout
            parts["effect_of"] = "ML004"
        yield Finding("ML004", found, place, row=data, fix=fix, **parts)
    if comparison.differences or as_prompt:
        return
    expected, actual = comparison.oracle, comparison.template
    new = [name for name in comparison.deviations if recorded is not None and name not in recorded]
    if new:
        rule, found = "ML005", f"the chat template shows a deviation that was not recorded: {', '.join(new)}"
    elif comparison.equal and actual and actual.labels is not None and actual.labels != expected.labels:
        rule, found = "ML006", "the generation blocks mark other tokens than the assistant's"
    elif comparison.equal and actual and actual.labels is None:
        rule, found = "ML009", "the template's rendering does not mark the assistant's tokens"
    else:
        return
    parts = {"detail": ""}
    if actual:
        whole = ((expected.input_ids, expected.labels), (actual.input_ids, actual.labels))
        parts = shown_difference(TokenDiff.of(*whole, oracle.piece, _SIDES, expected.spans), place)
        if rule == "ML006":
            found = with_shape(found, parts["shape"])
    detail = "\n".join(filter(None, (parts["detail"], versions)))
    yield Finding(rule, found, place, row=data, **{**parts, "detail": detail})


_SIDES = ("mistral-common", "chat template")


def difference_words(difference: Difference, file: Place = NOWHERE, *, is_prompt: bool = False) -> tuple[str, str]:
    """Return a difference between a template and mistral-common in words, and a line with its texts and ids.

    The line is empty if the words have no shape, which says all that is known.

    Args:
        difference: The difference.
        file: The template's file, to name it; may be empty.
        is_prompt: Whether it is a difference of a prompt.
    """
    where = " in a prompt" if is_prompt else ""
    named = f"the chat template{f' {file}' if file else ''} differs from mistral-common{where}"
    if " → " not in difference.shape:
        return f"{named}: {difference.found}", ""
    return with_shape(named, difference.shape), difference.found


def _fix(template: ChatTemplate) -> str:
    """Return the fix for a template with its own system prompt; empty for the fix of the rule.

    The template that mistral-common generates has no system prompt: if it replaces a published template, the published
    prompt is lost.
    """
    if template.own_prompt() is None:
        return ""
    return (
        "If Mistral published this template, keep it and train with `backend: mistral-common`, or serve with "
        f"mistral-common's template and the same system prompt: {_write_template('{own_template}')}. "
        "If you accept this difference, list its name or its check as a known deviation."
    )


def _write_template(prompt: str) -> str:
    """Return the command that writes mistral-common's template with a system prompt, if one is given."""
    system_prompt = f" --system-prompt {prompt}" if prompt else ""
    return f"`mistral-lora template --tokenizer {{checkpoint}}{system_prompt} --output served/chat_template.jinja`"


def own_prompt_finding(template: ChatTemplate, place: Place, *, has_oracle: bool = True) -> Finding | None:
    """Return ML224 for a template that writes its own system prompt; None for other templates.

    It is an error if the prompt holds a name in braces that no library replaces, or changes with the clock.

    Args:
        template: The template with its tokenizer.
        place: The template's file or folder.
        has_oracle: Whether mistral-common generates a template for the tokenizer, which the fix then names.
    """
    from pytest_mistral_lora.chat.templates.faults import OWN_PROMPT

    prompt = template.own_prompt()
    if prompt is None:
        return None
    faults = [f"holds {', '.join(prompt.placeholders)}, which no library replaces"] if prompt.placeholders else []
    faults += ["holds the date of today"] if prompt.is_dated(template.source) else []
    found = f"a conversation without a system prompt gets one of {len(prompt.text):,} characters: {prompt.text[:120]!r}"
    choice = (
        "keep the template, write the system prompt that you serve into each row, and train with "
        "`backend: mistral-common`; or serve with mistral-common's template and a prompt of your choice: "
        f"{_write_template('prompt.txt' if faults else '{own_template}')}; or accept it by name in the "
        f"list of known deviations: `{OWN_PROMPT}  # reason`."
    )
    return Finding(
        "ML224",
        f"{found}; it {' and '.join(faults)}" if faults else found,
        place,
        "no system prompt that the row does not have",
        detail="\n".join(["the prompt:", *(f"| {line}".rstrip() for line in prompt.text.splitlines())]),
        fix=f"Choose: {choice}" if has_oracle else "",
        name=OWN_PROMPT,
        severity="error" if faults else RULES["ML224"].severity,
    )


def _versions(golden: Golden) -> str:
    recorded = ", ".join(f"{name} {number}" for name, number in golden.recorded_with.items())
    return f"recorded: {recorded}\n{running_versions()}"


@cache  # each finding names them, and a version is read from the files of its package
def running_versions() -> str:
    """Return a line with the versions of the libraries that determine ids."""
    return "running:  " + ", ".join(f"{name} {number}" for name, number in library_versions().items())
