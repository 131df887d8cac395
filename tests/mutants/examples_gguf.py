"""The example of each rule of `gguf`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

from bench_gguf import setting, small_change, take_tekken
from gallery import Artifact, Example


class ML912(Example):
    def broken(self, artifact: Artifact) -> None:
        setting(artifact, "add_space_prefix", None)

    def sound(self, artifact: Artifact) -> None:
        setting(artifact, "add_space_prefix", False)


class ML913(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["fields"]["tokenizer.chat_template"] = "mistral-v3"

    def sound(self, artifact: Artifact) -> None:
        text = artifact["fields"]["tokenizer.chat_template"]
        artifact["fields"]["tokenizer.chat_template"] = "{# a comment #}" + text


class ML914(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["adapter_config"]["use_rslora"] = True

    def sound(self, artifact: Artifact) -> None:
        artifact["adapter_config"]["use_rslora"] = True
        artifact["adapter_fields"]["adapter.lora.alpha"] *= 2


class ML915(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["compared"] = False
        take_tekken(artifact)

    def sound(self, artifact: Artifact) -> None:
        artifact["compared"] = False


class ML916(Example):
    def broken(self, artifact: Artifact) -> None:
        small_change(artifact)
        artifact["tensors"] = artifact["before"]

    def sound(self, artifact: Artifact) -> None:
        small_change(artifact)


class ML917(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["fields"]["llama.rope.freq_base"] = 10_000.0

    def sound(self, artifact: Artifact) -> None:
        artifact["fields"]["llama.rope.freq_base"] = 1_000_000.0


class ML918(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["bytes"] = lambda data: data[: len(data) // 2]

    def sound(self, artifact: Artifact) -> None:
        artifact["bytes"] = lambda data: data
