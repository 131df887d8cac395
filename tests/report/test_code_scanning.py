from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from judged_samples import HOSTILE, judged, write_file

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.report.judged import sarif_data

TEXT = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {"text": {"type": "string"}},
}
LEVEL = {"enum": ["none", "note", "warning", "error"]}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required.split(),
        "additionalProperties": False,
        "properties": properties,
    }


# The part of SARIF 2.1.0 that is written, with what GitHub asks for beyond it: a file for each result.
SARIF = _object(
    "$schema version runs",
    **{"$schema": {"const": "https://json.schemastore.org/sarif-2.1.0.json"}},
    version={"const": "2.1.0"},
    runs={
        "type": "array",
        "minItems": 1,
        "items": _object(
            "tool results",
            tool=_object(
                "driver",
                driver=_object(
                    "name",
                    name={"type": "string"},
                    version={"type": "string"},
                    rules={
                        "type": "array",
                        "uniqueItems": True,
                        "items": _object(
                            "id",
                            id={"type": "string"},
                            shortDescription=TEXT,
                            fullDescription=TEXT,
                            help=TEXT,
                            helpUri={"type": "string", "format": "uri"},
                            defaultConfiguration=_object("", level=LEVEL),
                        ),
                    },
                ),
            ),
            results={
                "type": "array",
                "items": _object(
                    "message ruleId locations",
                    ruleId={"type": "string"},
                    level=LEVEL,
                    message=TEXT,
                    partialFingerprints={"type": "object", "additionalProperties": {"type": "string"}},
                    locations={
                        "type": "array",
                        "minItems": 1,
                        "items": _object(
                            "physicalLocation",
                            physicalLocation=_object(
                                "artifactLocation",
                                artifactLocation=_object("uri", uri={"type": "string", "pattern": r"^[!-~]+$"}),
                                region=_object("startLine", startLine={"type": "integer", "minimum": 1}),
                            ),
                        ),
                    },
                ),
            },
        ),
    },
)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path, "ä b.jsonl")
    found = Finding("ML601", HOSTILE, Place.of("ä b.jsonl", record=3).within("messages", 0))
    data = sarif_data(judged(found, Finding("ML428", "x", Place.of("http://127.0.0.1:1")), subject="ä b.jsonl"))
    loaded: dict[str, Any] = json.loads(json.dumps(data))
    return loaded


def test_a_log_is_sarif(log: dict[str, Any]) -> None:
    jsonschema.validate(log, SARIF)
    [run] = log["runs"]
    assert [(one["ruleId"], one["level"]) for one in run["results"]] == [("ML601", "error"), ("ML428", "note")]
    assert {one["id"] for one in run["tool"]["driver"]["rules"]} == {"ML601", "ML428"}
    places = [one["locations"][0]["physicalLocation"] for one in run["results"]]
    # a finding without a file is shown at the artifact that was judged: GitHub refuses a log in which one has none
    uri = "%C3%A4%20b.jsonl"
    assert places == [
        {"artifactLocation": {"uri": uri}, "region": {"startLine": 3}},
        {"artifactLocation": {"uri": uri}},
    ]


@pytest.mark.parametrize("fault", ["no location", "no message", "line 0", "level"])
def test_a_log_that_github_refuses_is_none(log: dict[str, Any], fault: str) -> None:
    broken = copy.deepcopy(log)
    result = broken["runs"][0]["results"][0]
    if fault == "no location":
        result["locations"] = []
    elif fault == "no message":
        del result["message"]
    elif fault == "line 0":
        result["locations"][0]["physicalLocation"]["region"]["startLine"] = 0
    else:
        result["level"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SARIF)


def test_a_cause_keeps_its_fingerprint_if_its_row_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fingerprint(record: int, found: str = "'bot'") -> str:
        [result] = sarif_data(judged(Finding("ML601", found, Place.of("rows.jsonl", record), row="{}")))["runs"][0][
            "results"
        ]
        text: str = result["partialFingerprints"]["cause/v1"]
        return text

    assert fingerprint(3) == fingerprint(9)
    assert fingerprint(3) != fingerprint(3, "no answer")


def test_a_log_without_findings_closes_the_alerts() -> None:
    log = sarif_data(judged())
    jsonschema.validate(log, SARIF)
    assert log["runs"][0]["results"] == []
