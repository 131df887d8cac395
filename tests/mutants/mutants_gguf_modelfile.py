"""Modelfiles that name no file, write another prompt, cut answers, or leave a setting to Ollama."""

from __future__ import annotations

from bench_gguf import oracle, take_modelfile
from gallery import Artifact, mutant

from pytest_mistral_lora.field.servers.ollama.go_template import go_template

CHATML = """TEMPLATE \"\"\"<|im_start|>user
{{ .Prompt }}<|im_end|>
<|im_start|>assistant
\"\"\""""
OLD = 'TEMPLATE """[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]"""'
"""A template of turns, without the version's spaces and ends."""


@mutant("ML938", says="FROM './modle.gguf': no such file")
def model_of_another_name(artifact: Artifact) -> None:
    """The file that FROM names is not there."""
    take_modelfile(artifact, source="FROM ./modle.gguf")


@mutant("ML938", says="begins with 'temperature'")
def parameter_without_its_word(artifact: Artifact) -> None:
    """A parameter is written as a command."""
    take_modelfile(artifact, more="temperature 0")


@mutant("ML938", says="quotes of TEMPLATE are not closed")
def quotes_left_open(artifact: Artifact) -> None:
    """The template does not end."""
    take_modelfile(artifact, template='TEMPLATE """{{ .Prompt }}')


@mutant("ML934", says="TEMPLATE writes '<|im_start|>'")
def template_of_chatml(artifact: Artifact) -> None:
    """The template is that of another family."""
    take_modelfile(artifact, template=CHATML)


@mutant("ML934", "I21", says="does not write </s>")
def template_of_an_older_version(artifact: Artifact) -> None:
    """The template has spaces around the user's text, and no end behind an answer."""
    take_modelfile(artifact, template=OLD)


@mutant("ML934", says="TEMPLATE writes '[INST] ")
def template_with_one_more_space(artifact: Artifact) -> None:
    """The template of the export has a space more behind [INST]."""
    template = go_template(oracle()).replace('{{ "[INST]" }}', "[INST] ")
    take_modelfile(artifact, template=f'TEMPLATE """{template}"""')


@mutant("ML934", says="TEMPLATE writes '[SYSTEM_PROMPT]'")
def template_of_a_newer_version(artifact: Artifact) -> None:
    """The template writes the system prompt as version 7 does."""
    template = go_template(oracle()) + "{{ if .System }}[SYSTEM_PROMPT] {{ .System }}[/SYSTEM_PROMPT]{{ end }}"
    take_modelfile(artifact, template=f'TEMPLATE """{template}"""')


@mutant("ML934", says="TEMPLATE is not read: an action")
def template_that_is_none(artifact: Artifact) -> None:
    """The template cannot be parsed."""
    take_modelfile(artifact, template='TEMPLATE """{{ .Prompt }"""')


@mutant("ML935", says="is in an answer")
def answers_end_at_a_full_stop(artifact: Artifact) -> None:
    """A stop string is a part of most answers."""
    take_modelfile(artifact, more="PARAMETER stop .")


@mutant("ML936", says="is no token of")
def stop_of_another_family(artifact: Artifact) -> None:
    """A stop string is the end of ChatML."""
    take_modelfile(artifact, more='PARAMETER stop "<|im_end|>"')


@mutant("ML937", says="num_ctx is missing")
def context_left_to_the_server(artifact: Artifact) -> None:
    """num_ctx is missing."""
    take_modelfile(artifact, context=None)


@mutant("ML937", says="num_ctx is 1e+06")
def context_beyond_the_model(artifact: Artifact) -> None:
    """num_ctx is larger than the model's context."""
    take_modelfile(artifact, context="parameter num_ctx 1000000")


@mutant("ML937", says="repeat_penalty is missing")
def penalty_left_to_the_server(artifact: Artifact) -> None:
    """repeat_penalty is missing."""
    take_modelfile(artifact, penalty=None)


@mutant("ML937", says="SYSTEM is")
def system_prompt_of_its_own(artifact: Artifact) -> None:
    """Each request gets a system prompt."""
    take_modelfile(artifact, more='System """You are a pirate.\nBe brief."""')


@mutant("ML937", says="num_predict is '16'")
def answers_of_few_tokens(artifact: Artifact) -> None:
    """Each answer ends after 16 tokens."""
    take_modelfile(artifact, more="PARAMETER num_predict 16")


@mutant("ML937", says="PARAMETER 'num_ctxt' is none")
def parameter_misspelled(artifact: Artifact) -> None:
    """A parameter has a name that Ollama does not know."""
    take_modelfile(artifact, more="PARAMETER num_ctxt 4096")


@mutant("ML937", says="MESSAGE is 'Hi'")
def message_before_each_chat(artifact: Artifact) -> None:
    """Each chat begins with a message of the Modelfile."""
    take_modelfile(artifact, more="MESSAGE user Hi")
