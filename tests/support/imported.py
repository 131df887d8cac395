"""Records as plain data, in the forms that trainers write, and the rows that an import makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from pytest_mistral_lora.formats.convert import Source, convert
from pytest_mistral_lora.formats.declarations import declared_sources
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.report import LOSSES, Report

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
BARE = TOOL["function"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(call_id: str, arguments: Any = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments or {}}}


def calls(*made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(made), **more}


def result(call_id: str, content: Any = "1", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, **more}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **more}


USER, ANSWER, SYSTEM = user("u"), answer("a"), {"role": "system", "content": "s"}
GOOD = chat(USER, ANSWER)
CALL_TEXT = json.dumps({"name": "f", "arguments": {"x": 1}})


def converted(path: Path, *, layout: Layout | None = None) -> tuple[list[Any], Report]:
    report = Report()
    return list(convert([Source(path, layout or Layout())], report, lossy=LOSSES)), report


def lines(records: Any) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode()


def written(path: Path, *records: Any) -> Path:
    path.write_bytes(lines(records))
    return path


def imported(path: Path, *names: str) -> list[Any]:
    report = Report()
    found = list(convert(declared_sources(path, names)[0], report, lossy=LOSSES))
    assert report.fault_lines() == []
    return found


def declared_rows(path: Path, *names: str) -> tuple[list[Any], Report]:
    sources, remarks = declared_sources(path, names)
    report = Report(remarks=remarks)
    found = list(convert(sources, report, lossy=LOSSES))
    assert report.fault_lines() == []
    return found, report


def llamafactory(folder: Path, entry: dict[str, Any], *records: Any) -> Path:
    (folder / "rows.json").write_text(json.dumps(records), "utf-8")
    path = folder / "dataset_info.json"
    path.write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}), "utf-8")
    return path


def axolotl(folder: Path, entry: dict[str, Any], *records: Any, **config: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    path = folder / "axolotl.yaml"
    path.write_text(
        yaml.safe_dump({"base_model": "x", "datasets": [{"path": "rows.jsonl", **entry}], **config}), "utf-8"
    )
    return path
