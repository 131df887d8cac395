"""The example of each rule of `tokenizer`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import mutants_tokenizer_configurations as configurations
import mutants_tokenizer_derivatives as derivatives
import mutants_tokenizer_files as files
import mutants_tokenizer_settings as settings
import mutants_tokenizer_templates as templates
import mutants_tokenizer_tokens as tokens
from gallery import Artifact, Example
from mutants_tokenizer_derivatives import chatml_derivative, thinking_folder

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, official_template, training_template


class ML201(Example):
    mutant = files.unknown_model_type

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_json"]["model"]["type"] = "BPE"


class ML202(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tokenizer_json"]["added_tokens"][3]["special"] = False

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_json"]["added_tokens"][3]["special"] = True


class ML203(Example):
    mutant = tokens.unk_is_inst

    def sound(self, artifact: Artifact) -> None:
        artifact["special_tokens_map"]["unk_token"] = artifact["tokenizer_config"]["unk_token"] = "<unk>"


class ML204(Example):
    mutant = tokens.pad_is_eos

    def sound(self, artifact: Artifact) -> None:
        artifact["special_tokens_map"]["pad_token"] = artifact["tokenizer_config"]["pad_token"] = "<pad>"


class ML205(Example):
    mutant = tokens.wrong_split_pattern

    def sound(self, artifact: Artifact) -> None:
        split = artifact["tokenizer_json"]["pre_tokenizer"]["pretokenizers"][0]
        split["behavior"] = "Isolated"


class ML206(Example):
    mutant = templates.template_with_carriage_returns

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "chat_template.jinja").unlink()
        artifact["tokenizer_config"]["chat_template"] = artifact["template"]


class ML207(Example):
    mutant = files.shipped_file_of_other_bytes

    def sound(self, artifact: Artifact) -> None:
        artifact["recorded"] = artifact["recorded"].lower()


class ML208(Example):
    mutant = files.branch_for_a_pin

    def sound(self, artifact: Artifact) -> None:
        artifact["pinned"] = "3f9c2e1b7a6d4c5080912efab3467dc15e8f20a9"


class ML209(Example):
    mutant = files.lfs_pointer

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "special_tokens_map.json").write_text("{}")


class ML210(Example):
    mutant = files.link_out_of_the_folder

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "chat_template.json").write_text("{}")


class ML211(Example):
    mutant = files.two_versions_side_by_side

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "notes.txt").write_bytes(artifact["shipped"]("spm-v1"))


class ML212(Example):
    mutant = files.files_of_two_commits

    def sound(self, artifact: Artifact) -> None:
        artifact["fetched"]["tokenizer.json"] = artifact["fetched"]["config.json"]


class ML213(Example):
    mutant = tokens.special_tokens_map_differs

    def sound(self, artifact: Artifact) -> None:
        artifact["special_tokens_map"]["eos_token"] = "</s>"


class ML214(Example):
    mutant = tokens.two_tokens_swapped

    def sound(self, artifact: Artifact) -> None:
        vocab = artifact["tokenizer_json"]["model"]["vocab"]
        vocab["ing"], vocab["ed"] = (vocab["ing"], vocab["ed"])


class ML215(Example):
    mutant = tokens.vocabulary_without_rows

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["vocab_size"] = artifact["config"]["vocab_size"]


class ML216(Example):
    mutant = tokens.rows_without_tokens

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["vocab_size"] = artifact["config"]["vocab_size"] + 64


class ML217(Example):
    mutant = tokens.another_eos_at_generation

    def sound(self, artifact: Artifact) -> None:
        artifact["generation_config"]["eos_token_id"] = [2]


class ML218(Example):
    mutant = tokens.class_that_is_unknown

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"


class ML220(Example):
    mutant = templates.template_differs_between_places

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["chat_template"] = (artifact["folder"] / "chat_template.jinja").read_text()


class ML221(Example):
    mutant = templates.endless_loop

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = (
            "{% for a in range(9) %}{% for b in range(9) %}{% endfor %}{% endfor %}" + artifact["template"]
        )


class ML222(Example):
    mutant = templates.missing_variable

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = artifact["template"] + "{{ closing_words | default('') }}"


class ML223(Example):
    mutant = templates.clock

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = "{% set today = '01 January 2024' %}" + artifact["template"]


class ML224(Example):
    mutant = templates.own_prompt_with_a_placeholder

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = artifact["with_own_prompt"](artifact["template"], "")


class ML225(Example):
    mutant = templates.system_prompt_dropped

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = artifact["template"]


class ML226(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["template"] = artifact["template"].replace("{{- bos_token }}", "")

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = artifact["template"].replace("{{- bos_token }}", "{{- '<s>' }}")


class ML227(Example):
    mutant = templates.bos_again_by_the_tokenizer

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_json"]["post_processor"] = artifact["tokenizer_json"]["post_processor"]


class ML228(Example):
    mutant = tokens.control_tokens_are_split

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["split_special_tokens"] = False


class ML229(Example):
    mutant = derivatives.unknown_vocabulary

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "tekken.json").unlink()
        artifact["oracle"] = str(artifact["own_tekken"])


class ML230(Example):
    mutant = derivatives.another_family_is_named

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "tekken.json").unlink()
        artifact["oracle"] = str(artifact["own_tekken"])


class ML231(Example):
    mutant = files.truncation_is_saved

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_json"]["truncation"] = None


class ML232(Example):
    mutant = files.padding_of_batches_is_saved

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_json"]["padding"] = None


class ML233(Example):
    mutant = files.template_is_not_copied

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "chat_template.jinja").write_text(artifact["template"])


class ML234(Example):
    mutant = derivatives.heading_in_the_prompt_alone

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] += "{% if add_generation_prompt %}{% endif %}"


class ML235(Example):
    mutant = derivatives.chatml_with_tekken_left_in

    def sound(self, artifact: Artifact) -> None:
        chatml_derivative(artifact["folder"])
        (artifact["folder"] / "tekken.json").unlink()
        artifact["oracle"] = "none"


class ML236(Example):
    mutant = derivatives.training_template_beside_tekken

    def sound(self, artifact: Artifact) -> None:
        artifact["template"] = training_template(artifact["folder"])
        (artifact["folder"] / "tekken.json").unlink()
        artifact["oracle"] = str(artifact["own_tekken"])


class ML237(Example):
    mutant = derivatives.guessed_thinking

    def sound(self, artifact: Artifact) -> None:
        thinking_folder(artifact["folder"])
        tokenizer = CheckpointTokenizer(artifact["folder"])
        (artifact["folder"] / "chat_template.jinja").write_text(official_template(tokenizer, thinking=False))


class ML238(Example):
    mutant = settings.promised_eos

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"] |= {"add_bos_token": False, "add_eos_token": False}


class ML239(Example):
    mutant = settings.decoder_that_cleans_spaces

    def sound(self, artifact: Artifact) -> None:
        settings.decoders(artifact, {"type": "Fuse"})
        artifact["tokenizer_config"]["clean_up_tokenization_spaces"] = False


class ML240(Example):
    mutant = settings.eos_is_suppressed

    def sound(self, artifact: Artifact) -> None:
        artifact["generation_config"] |= {"suppress_tokens": [3, 4], "bad_words_ids": [[2, 1010]], "max_length": 4096}


class ML241(Example):
    mutant = settings.repetitions_are_punished

    def sound(self, artifact: Artifact) -> None:
        neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "temperature": 0.15, "do_sample": True}
        artifact["generation_config"] |= neutral


class ML242(Example):
    mutant = settings.patches_of_another_model

    def sound(self, artifact: Artifact) -> None:
        settings.with_images(artifact, preprocessor__patch_size={"height": 28, "width": 28})
        artifact["config"]["image_token_index"] = 10


class ML243(Example):
    mutant = configurations.attention_is_scaled_in_one_format

    def sound(self, artifact: Artifact) -> None:
        configurations.take_ministral_3(artifact)


class ML244(Example):
    mutant = configurations.class_without_scaled_queries

    def sound(self, artifact: Artifact) -> None:
        configurations.take_ministral_3(artifact)
