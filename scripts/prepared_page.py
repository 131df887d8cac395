"""The table of docs/prepared.md: in which sources of rows each rule is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from page_blocks import with_block

from pytest_mistral_lora.conformance.encoded.audit import OF_CHAT_ROWS
from pytest_mistral_lora.conformance.encoded.line_judge import BY_IDS
from pytest_mistral_lora.conformance.finding import ENCODED_CASES, RULES
from pytest_mistral_lora.conformance.row_pass import LOST_IN_IDS

PAGE = Path(__file__).parents[1] / "docs" / "prepared.md"

LOST_IN_PART: Mapping[str, str] = {
    "ML619": "ids have the arguments as mistral-common spells them: a key that is there twice is there once",
    "ML621": "ids of calls and names of results are not in the ids of each version",
    "ML629": "a text that is marked up for another family is ML584 in ids",
    "ML643": "ids have no schema of the answer, and before v7 the system prompt is a part of the user's text",
    "ML646": "before v7 the system prompt is a part of the user's text",
    "ML649": "the ids of U+2581 are those of a space, which is ML528 or ML529 at the end of an answer",
    "ML651": "ids have neither the schema of the answer nor strict",
    "ML663": "before v7 mistral-common itself writes the system prompt into a text of the user",
    "ML668": "beside ids is what a trainer keeps, such as `label`",
    "ML669": "beside ids is what a trainer keeps",
}
"""Rules that see conversations that are read back from ids, but not each fault: each with what the ids do not have."""
OF_WHOLE_FILES = frozenset(
    [
        "ML608",
        "ML609",
        "ML624",
        "ML626",
        "ML628",
        "ML630",
        "ML636",
        "ML637",
        "ML638",
        "ML639",
        "ML643",
        "ML644",
        "ML645",
        "ML646",
        "ML647",
        "ML658",
        "ML659",
        "ML660",
        *(f"ML{number}" for number in range(661, 669)),
        "ML671",
        "ML672",
        "ML673",
        "ML674",
    ]
)
"""Rules that only all rows of a file show: they do not fire on a sample, such as the batches of a guard.

Those that are errors of many rows have a note for one row, which fires there: `texts.SIGNS`.
"""


def prepared_page() -> str:
    """Return the page with its table."""
    return with_block(PAGE.read_text(encoding="utf-8"), "sources", "\n".join(_sources()))


def _sources() -> Iterator[str]:
    """Yield a table of the sources in which each rule on rows is found, or the reason why it is not."""
    yield "| rule | chat rows | ids with messages | ids alone | guard |"
    yield "|---|---|---|---|---|"
    for case in (*OF_CHAT_ROWS, *ENCODED_CASES):
        for rule in (rule.id for rule in RULES.of("dataset", case)):
            by_ids = BY_IDS.get(rule, "")
            alone = (
                by_ids or LOST_IN_IDS.get(rule) or (f"in part: {LOST_IN_PART[rule]}" if rule in LOST_IN_PART else "yes")
            )
            guard = "no: a sample" if rule in OF_WHOLE_FILES else alone
            yield f"| [{rule}](rules.md#{rule.lower()}) | yes | {by_ids or 'yes'} | {alone} | {guard} |"
