"""The page of published chat templates, made from their register when the site is built."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_mistral_lora.chat.templates.faults import FAULTS
from pytest_mistral_lora.programs.templates import EngineVerdict, PublishedTemplate, published_templates
from pytest_mistral_lora.records.goldens import packaged_cases

_SHA256_DIGITS = 16
_OWN_PROMPTS = {
    "none": "no",
    "note": "yes",
    "error": "yes, with a date or a name in braces",
}


def published_page() -> str:
    """Return the page, as Markdown."""
    register = published_templates()
    lines = [
        "# Published templates",
        "",
        "To see which published template your checkpoint has, run `mistral-lora check` on its folder:",
        "",
        "```text",
        f"template of my-mistral: that of mistralai/Ministral-3-8B-Instruct-2512 ({register.date}), unchanged",
        "```",
        "",
        "Line endings and a newline at the very end do not count. A changed copy has no such line: it is judged like",
        "any template.",
        "",
        f"The templates are those of the package {register.package} of {register.date}; a repository may have changed",
        "its template since. No text of them is stored here: the register has hashes and verdicts.",
        "",
        "## Verdicts",
        "",
        f"Each template was judged on those of the {len(packaged_cases())} packaged rows that its tokenizer can",
        "encode. *jinja2* names the causes of all differences from mistral-common",
        f"{register.mistral_common}, besides the [named deviations](deviations.md) and the template's own system",
        f"prompt. *llama.cpp* compares the prompts of the server of build {register.engines['llamacpp']} with those of",
        "jinja2, for the rows that jinja2 renders. A template that fails there is the note [ML023](rules/ML023.md).",
        "",
        "| template | judged with | own system prompt | jinja2 | llama.cpp | SHA-256 |",
        "|---|---|---|---|---|---|",
        *(_row(template) for template in register.templates),
        "",
        "A `derived-…` tokenizer is a file that the tests derive from a shipped vocabulary, with the special tokens of",
        "that version: mistral-common ships none of it.",
        "",
        "## Causes",
        "",
        "| cause | the template |",
        "|---|---|",
        *_causes(register.templates),
        "",
        "Any other cause is the shape of a difference: the control token before it, and the change from the",
        "expected to the found text.",
        "",
        "## Rows of llama.cpp",
        "",
        "| row | its content |",
        "|---|---|",
        *_cases(register.templates),
        "",
        "llama.cpp's server parses the arguments of calls and the tools before it renders them, so it can write them",
        "differently from jinja2, whatever the template is.",
        "",
        "This page is made by `scripts/write_docs.py` from `pytest_mistral_lora/field/templates/published.toml`, which",
        "`scripts/record_published_templates.py` writes.",
    ]
    return "\n".join(lines) + "\n"


def _row(template: PublishedTemplate) -> str:
    causes = ", ".join(f"`{cause}`" for cause in template.causes) or "no difference"
    cells = (
        template.title.replace(", ", "<br>"),
        f"{template.judged_with} ({template.version})",
        _OWN_PROMPTS[template.own_prompt],
        causes,
        _engine(template.engines["llamacpp"]),
        f"`{template.sha256[:_SHA256_DIGITS]}…`",
    )
    return f"| {' | '.join(cells)} |"


def _engine(verdict: EngineVerdict) -> str:
    parts = [f"{verdict.same} of {verdict.rows} prompts are the same"]
    parts += [f"{error}: {len(cases)}" for error, cases in verdict.failed.items()]
    if verdict.other:
        parts.append(f"another text: {', '.join(f'`{name}`' for name in verdict.other)}")
    if verdict.unread:
        parts.append(f"refused by the server, not by the template: {len(verdict.unread)}")
    return "; ".join(parts)


def _causes(templates: tuple[PublishedTemplate, ...]) -> Iterator[str]:
    seen = {cause for template in templates for cause in template.causes}
    yield from (f"| `{fault.id}` | {fault.title} |" for fault in FAULTS if fault.id in seen)


def _cases(templates: tuple[PublishedTemplate, ...]) -> Iterator[str]:
    seen = {name for template in templates for name in _odd_rows(template.engines["llamacpp"])}
    yield from (f"| `{case.name}` | {case.description} |" for case in packaged_cases() if case.name in seen)


def _odd_rows(verdict: EngineVerdict) -> Iterator[str]:
    yield from (*verdict.other, *verdict.unread)
    for cases in verdict.failed.values():
        yield from cases
