"""The recorded keys that each class reads are those that change the logits of tiny models of the installed version."""

from __future__ import annotations

import pytest
import record_read_keys
import transformers
from packaging.version import Version

from pytest_mistral_lora.checkpoint.read_keys import newest_read_keys, read_keys


def test_the_classes_of_the_installed_version_read_the_recorded_keys() -> None:
    running = transformers.__version__
    seen = {name: frozenset(keys) for name, keys in record_read_keys.seen().items()}
    assert seen == {name: keys for name, keys in read_keys(running).items() if name in seen}
    assert seen.keys() >= {"MistralForCausalLM", "LlamaForCausalLM"}


@pytest.mark.parametrize(
    ("version", "scales"), [("4.50", False), ("4.57.6", False), ("4.58.1", False), ("5.24.0", True), ("9.0.dev0", True)]
)
def test_a_version_has_the_keys_of_the_newest_recorded_one_up_to_it(version: str, scales: bool) -> None:
    assert ("Ministral3ForCausalLM" in read_keys(version)) is scales


def test_queries_are_scaled_by_the_newer_classes_alone() -> None:
    scaling = {name for name, keys in newest_read_keys().items() if "llama_4_scaling_beta" in keys}
    assert scaling == {"Ministral3ForCausalLM", "Mistral4ForCausalLM"}
    # the name that params.json has is read by no class
    assert not any("llama_4_scaling" in keys for keys in newest_read_keys().values())
    assert max(map(Version, record_read_keys.recorded())) >= Version("5.24")
