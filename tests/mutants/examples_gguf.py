"""The example of each rule of `gguf`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import mutants_gguf_modelfile as modelfile
import mutants_gguf_tokenizer as tokenizer
import mutants_gguf_weights as weights
from bench_gguf import oracle, setting, small_change, take_modelfile, take_tekken
from gallery import Artifact, Example

from pytest_mistral_lora.field.servers.ollama.go_template import go_template


class ML912(Example):
    mutant = tokenizer.no_space_setting

    def sound(self, artifact: Artifact) -> None:
        setting(artifact, "add_space_prefix", False)


class ML913(Example):
    mutant = tokenizer.name_for_a_template

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
    mutant = weights.base_in_place_of_the_merged_model

    def sound(self, artifact: Artifact) -> None:
        small_change(artifact)


class ML917(Example):
    mutant = weights.rope_of_another_model

    def sound(self, artifact: Artifact) -> None:
        artifact["fields"]["llama.rope.freq_base"] = 1_000_000.0


class ML918(Example):
    mutant = weights.cut_off

    def sound(self, artifact: Artifact) -> None:
        artifact["bytes"] = lambda data: data


class ML920(Example):
    mutant = tokenizer.turn_ends_at_a_tool_call

    def sound(self, artifact: Artifact) -> None:
        setting(artifact, "eot_token_id", 2)
        setting(artifact, "fim_sep_token_id", 1 << 20)


class ML938(Example):
    mutant = modelfile.model_of_another_name

    def sound(self, artifact: Artifact) -> None:
        take_modelfile(artifact)


class ML934(Example):
    mutant = modelfile.template_of_chatml

    def sound(self, artifact: Artifact) -> None:
        # without its test of empty texts, which is a named deviation
        template = go_template(oracle()).replace(
            '{{ if $m.Content }}{{ " " }}{{ $m.Content }}{{ end }}', " {{$m.Content}}"
        )
        take_modelfile(artifact, template=f'TEMPLATE """{template}"""')


class ML935(Example):
    mutant = modelfile.answers_end_at_a_full_stop

    def sound(self, artifact: Artifact) -> None:
        take_modelfile(artifact, more="PARAMETER stop [INST]")


class ML936(Example):
    mutant = modelfile.stop_of_another_family

    def sound(self, artifact: Artifact) -> None:
        take_modelfile(artifact, more="PARAMETER stop </s>")


class ML937(Example):
    mutant = modelfile.context_left_to_the_server

    def sound(self, artifact: Artifact) -> None:
        take_modelfile(artifact, context="PARAMETER num_ctx 512", more="PARAMETER num_predict -1")
