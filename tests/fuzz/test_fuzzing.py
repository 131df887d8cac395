"""The processes of the fuzzers: they see what no input may do."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import Campaign, MakeCampaign


def test_a_verb_that_refuses_its_input_is_counted(campaign: MakeCampaign, tmp_path: Path) -> None:
    refusals = campaign("one refusal", 1)
    found = refusals.verb(0, ["import", "nothing.json", "--to", "rows.jsonl"], tmp_path)
    assert (found.code, found.hung) == (2, False)
    assert "no such file or folder" in found.output
    assert 0 <= found.peak < 100
    assert refusals.line().startswith("fuzz: one refusal: 1 cases, 0 tracebacks, 0 hangs, 1 refused")


@pytest.mark.parametrize("kind", ["hangs", "unfinished files", "crashes", "tracebacks"])
def test_what_no_input_may_do_fails(tmp_path: Path, kind: str) -> None:
    (tmp_path / "rows.json").write_text('[{"messages": []}]')
    words, seconds, codes = ["import", "rows.json", "--to", "rows.jsonl"], 60.0, frozenset((0, 1, 2))
    if kind == "hangs":
        seconds = 0.0
    elif kind == "unfinished files":
        (tmp_path / ".x.unfinished").touch()
    elif kind == "crashes":
        codes = frozenset((0,))
    else:
        (tmp_path / "rows.json").write_text('{"Traceback (most recent call last)": 1}')
    fuzzer = Campaign("faults", 1)
    with pytest.raises(AssertionError, match=rf"faults, {kind}: .*MISTRAL_LORA_FUZZ_SEED=5"):
        fuzzer.verb(5, words, tmp_path, seconds=seconds, codes=codes)
    assert fuzzer.counts[kind] == 1


def test_a_campaign_has_its_number_of_cases_or_a_time_or_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MISTRAL_LORA_FUZZ_SECONDS", "MISTRAL_LORA_FUZZ_SEED"):
        monkeypatch.delenv(name, raising=False)
    fuzzer = Campaign("seeds", 3)
    assert [*fuzzer.seeds()] == [0, 1, 2]
    monkeypatch.setenv("MISTRAL_LORA_FUZZ_SECONDS", "0.05")
    assert len([*fuzzer.seeds()]) > 3
    monkeypatch.setenv("MISTRAL_LORA_FUZZ_SEED", "7")
    assert [*fuzzer.seeds()] == [7]
