"""Tokenizer folders that are broken on purpose, each with the rule that must catch it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AddedToken, AutoTokenizer

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer


def _json(file: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def pad_is_eos(folder: Path) -> None:
    _json(folder / "tokenizer_config.json", lambda data: data.update(pad_token="</s>"))


def no_bos(folder: Path) -> None:
    _json(folder / "tokenizer_config.json", lambda data: data.update(bos_token=None, add_bos_token=False))


def eos_is_inst(folder: Path) -> None:
    _json(folder / "tokenizer_config.json", lambda data: data.update(eos_token="[/INST]"))


def swapped_control_tokens(folder: Path) -> None:
    def swap(data: Any) -> None:
        names = {"[INST]": "[/INST]", "[/INST]": "[INST]"}
        for token in data["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocab = data["model"]["vocab"]
        vocab["[INST]"], vocab["[/INST]"] = vocab["[/INST]"], vocab["[INST]"]

    _json(folder / "tokenizer.json", swap)


def control_token_as_text(folder: Path) -> None:
    def demote(data: Any) -> None:
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "[INST]"]

    def forget(data: Any) -> None:
        data.pop("added_tokens_decoder", None)
        for key, value in data.items():
            if isinstance(value, list):
                data[key] = [token for token in value if token != "[INST]"]

    _json(folder / "tokenizer.json", demote)
    _json(folder / "tokenizer_config.json", forget)


def another_version(folder: Path) -> None:
    CheckpointTokenizer(shipped_tokenizer("spm-v1")).fast.save_pretrained(folder)


def another_version_of_the_oracle(folder: Path) -> None:
    (folder / "tokenizer.model.v3").unlink()
    shutil.copy(shipped_tokenizer("spm-v7"), folder / "tokenizer.model.v7")


def one_token_more(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.save_pretrained(folder)


def space_after_control_tokens(folder: Path) -> None:
    """`legacy=True`, the default of the class: every control token is followed by a space."""
    bare = folder / "bare"
    bare.mkdir()
    shutil.copy(shipped_tokenizer("spm-v3"), bare / "tokenizer.model")
    _fast_class().from_pretrained(bare, legacy=True).save_pretrained(folder)


def _fast_class() -> Any:
    return getattr(transformers, "TokenizersBackend", transformers.LlamaTokenizerFast)


def merges_by_id(folder: Path) -> None:
    """What LlamaTokenizer does with a .model in transformers 5: runs of spaces merge first."""

    def reorder(data: Any) -> None:
        vocab = data["model"]["vocab"]
        data["model"]["merges"].sort(key=lambda pair: vocab["".join(pair)])

    _json(folder / "tokenizer.json", reorder)


MUTANTS: dict[Callable[[Path], None], str] = {
    pad_is_eos: "ML204",
    no_bos: "ML203",
    eos_is_inst: "ML203",
    swapped_control_tokens: "ML202",
    control_token_as_text: "ML202",
    another_version: "ML202",
    another_version_of_the_oracle: "ML202",
    one_token_more: "ML202",
    space_after_control_tokens: "ML205",
    merges_by_id: "ML205",
}


def test_the_tokenizer_as_it_is_breaks_no_rule(pristine: Path, findings_of: Callable[..., list]) -> None:
    assert findings_of(pristine, "tokenizer") == []


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda function: function.__name__)
def test_a_broken_tokenizer_is_caught(
    mutate: Callable[[Path], None], checkpoint: Path, findings_of: Callable[..., list]
) -> None:
    mutate(checkpoint)
    assert MUTANTS[mutate] in {finding.rule for finding in findings_of(checkpoint, "tokenizer")}


def test_a_tokenizer_that_does_not_load_is_a_finding(checkpoint: Path, findings_of: Callable[..., list]) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    found = findings_of(checkpoint, "tokenizer")
    assert {finding.rule for finding in found} == {"ML201"}
    assert "transformers cannot load it" in found[0].text()


def test_a_shipped_file_of_other_bytes_is_caught(v3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_mistral_lora.conformance import tokenizer
    from pytest_mistral_lora.records import goldens

    recorded = {**goldens.shipped_hashes(), "spm-v3": "0" * 64}
    monkeypatch.setattr(goldens, "shipped_hashes", lambda: recorded)
    [finding] = tokenizer._file(v3)
    assert (finding.rule, finding.expected) == ("ML207", "0" * 64)
