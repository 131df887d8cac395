from __future__ import annotations

import json
from typing import Any

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import RULES


def test_rules_are_listed_a_line_each(capsys: Any) -> None:
    assert main(["rules"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RULES)


def test_a_rule_is_explained(capsys: Any) -> None:
    assert main(["rules", "ML204"]) == 0
    out = capsys.readouterr().out
    rule = RULES["ML204"]
    for text in (rule.title, rule.why, rule.fix, rule.source, *rule.bad.splitlines(), *rule.good.splitlines()):
        assert text in out


def test_rules_as_json(capsys: Any) -> None:
    assert main(["rules", "ML204", "--json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)] == ["ML204"]


def test_what_is_no_rule_is_bad_usage(capsys: Any) -> None:
    assert main(["rules", "ML999"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no rule 'ML999'")
    assert "mistral-lora rules" in error
