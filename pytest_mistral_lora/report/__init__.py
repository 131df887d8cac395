"""Reports: the checks of a session, for terminals, pages and other programs."""

from pytest_mistral_lora.report.lines import (
    NOTHING_WAS_JUDGED,
    basis_lines,
    brief_lines,
    commands_in,
    found_words,
    line_style,
    look_at_lines,
    objective_lines,
    unchecked_lines,
    verdict_line,
    write_styled,
)
from pytest_mistral_lora.report.report_file import RunFacts, report_data, require_report_file, rows_page, write_report

__all__ = [
    "NOTHING_WAS_JUDGED",
    "RunFacts",
    "basis_lines",
    "brief_lines",
    "commands_in",
    "found_words",
    "line_style",
    "look_at_lines",
    "objective_lines",
    "report_data",
    "require_report_file",
    "rows_page",
    "unchecked_lines",
    "verdict_line",
    "write_report",
    "write_styled",
]
