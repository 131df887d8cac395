"""Read data files: strict JSON Lines, in chunks, by several processes. The only I/O of `chat`."""

from pytest_mistral_lora.chat.reading.files import (
    JSON_LIMIT,
    STRICT,
    answer_in_time,
    existing_path,
    fault_of,
    first_values,
    lines_of,
    loads_strict,
    open_regular,
    opened,
    parse_json,
    read_bounded,
    read_json,
    read_line,
    scan_jsonl,
    scan_lines,
)

__all__ = [
    "JSON_LIMIT",
    "STRICT",
    "answer_in_time",
    "existing_path",
    "fault_of",
    "first_values",
    "lines_of",
    "loads_strict",
    "open_regular",
    "opened",
    "parse_json",
    "read_bounded",
    "read_json",
    "read_line",
    "scan_jsonl",
    "scan_lines",
]
