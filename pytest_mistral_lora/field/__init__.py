"""What trainers, evaluators and servers do at a version: all that changes every few weeks, in one room.

The rest of the package knows these programs by `runners.trainer.Trainer`, `serving.server.Server` and
`programs.facts.Fact` alone, and works without this folder. docs/contributing.md tells how to add one.
"""

from collections.abc import Mapping

PROGRAMS: Mapping[str, Mapping[str, str]] = {
    "pytest_mistral_lora.trainers": {
        "trl": "pytest_mistral_lora.field.trainers.trl.trainer:TRL",
        "axolotl": "pytest_mistral_lora.field.trainers.axolotl.trainer:AXOLOTL",
        "llamafactory": "pytest_mistral_lora.field.trainers.llamafactory.trainer:LLAMAFACTORY",
        "ms-swift": "pytest_mistral_lora.field.trainers.ms_swift.trainer:MS_SWIFT",
        "lm-eval": "pytest_mistral_lora.field.trainers.lm_eval.trainer:LM_EVAL",
    },
    "pytest_mistral_lora.servers": {
        "llamacpp": "pytest_mistral_lora.field.servers.llamacpp.server:LLAMACPP",
        "vllm": "pytest_mistral_lora.field.servers.vllm.server:VLLM",
        "sglang": "pytest_mistral_lora.field.servers.sglang.server:SGLANG",
        "ollama": "pytest_mistral_lora.field.servers.ollama.server:OLLAMA",
    },
    "pytest_mistral_lora.facts": {"field": "pytest_mistral_lora.field.facts"},
    "pytest_mistral_lora.templates": {"field": "pytest_mistral_lora.field.templates"},
}
"""The programs by group and name: the same text that another package gives as an entry point."""
