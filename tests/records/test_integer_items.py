"""Lists of integers in records, which are judged at once where the schema asks for nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pytest_mistral_lora.records.schema import RecordSchema

BOUNDED = {"type": "integer", "minimum": 0, "maximum": 9}


@pytest.mark.parametrize(
    ("items", "value"),
    [
        (BOUNDED, [0, 9]),
        (BOUNDED, []),
        (BOUNDED, [3, -1, 4]),
        (BOUNDED, [3, 10]),
        (BOUNDED, [1, True]),
        (BOUNDED, [1, 2.0]),
        (BOUNDED, [1, 2.5]),
        (BOUNDED, [1, "2"]),
        (BOUNDED, [1, None, [2]]),
        (BOUNDED, "12"),
        ({"type": "integer"}, [-(10**30), 10**30]),
        ({"type": "integer", "enum": [1, 2]}, [1, 3]),
        ({"type": "integer", "exclusiveMinimum": 0}, [1, 0]),
        ({"type": "string"}, [1]),
        (False, [1]),
        (True, [1]),
    ],
)
def test_integers_are_judged_as_jsonschema_judges_them(items: Any, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    schema = {"type": "object", "properties": {"ids": {"items": items}}}
    file.write_text(json.dumps(schema))
    expected = {error.json_path for error in Draft202012Validator(schema).iter_errors({"ids": value})}
    assert {str(violation.place) for violation in RecordSchema(file).violations({"ids": value})} == expected
