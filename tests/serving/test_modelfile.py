"""A Modelfile: the grammar of Ollama, its template, its stop strings, its parameters, and the files that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from derived_tekken import write_derived

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.ollama.go_template import go_template
from pytest_mistral_lora.field.servers.ollama.modelfile import Command, Modelfile, read_modelfile
from pytest_mistral_lora.judging import judge

SETTINGS = "PARAMETER repeat_penalty 1\nPARAMETER num_ctx 4096\n"
TESTED = '{{ if $m.Content }}{{ " " }}{{ $m.Content }}{{ end }}'
LIBRARY = """\
{{- if .Messages }}
{{- range $index, $_ := .Messages }}
{{- if eq .Role "user" }}
{{- if and (eq (len (slice $.Messages $index)) 1) $.Tools }}[AVAILABLE_TOOLS] {{ $.Tools }}[/AVAILABLE_TOOLS]
{{- end }}[INST] {{ if and $.System (eq (len (slice $.Messages $index)) 1) }}{{ $.System }}

{{ end }}{{ .Content }}[/INST]
{{- else if eq .Role "assistant" }}
{{- if .Content }} {{ .Content }}
{{- else if .ToolCalls }}[TOOL_CALLS] [
{{- range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{- end }}]
{{- end }}</s>
{{- else if eq .Role "tool" }}[TOOL_RESULTS] {"content": {{ .Content }}} [/TOOL_RESULTS]
{{- end }}
{{- end }}
{{- else }}[INST] {{ if .System }}{{ .System }}

{{ end }}{{ .Prompt }}[/INST]
{{- end }} {{ .Response }}
{{- if .Response }}</s>
{{- end }}"""
"""That of Mistral 7B v0.3 in the library of Ollama."""


def read(text: str) -> Modelfile:
    return read_modelfile(Path("Modelfile"), text)


def test_the_commands_are_those_of_ollama() -> None:
    text = (
        '\ufeff# a comment\n\nFrom ./model.gguf \r\n\tTEMPLATE """{{ .Prompt }}\n# no comment\n"""\n'
        'parameter STOP "a b"\nMESSAGE user Hi, "you"\nsystem \'x\'\nLICENSE """a""" b"""\n'
    )
    assert read(text).commands == (
        Command("from", "./model.gguf", 3),
        Command("template", "{{ .Prompt }}\n# no comment\n", 4),
        Command("parameter", "a b", 7, "STOP"),
        Command("message", 'Hi, "you"', 8, "user"),
        Command("system", "'x'", 9),
        Command("license", 'a""" b', 10),
    )


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("", "", "has no FROM"),
        ("# FROM x\n", "", "has no FROM"),
        ("FROM x\nTEMPERATURE 1\n", ":2", "begins with 'temperature'"),
        ("FROM x\n\nPARAMETER\n", ":3", "PARAMETER is followed by ''"),
        ("FROM x\nPARAMETER stop\n", ":2", "PARAMETER has no value"),
        ("FROM x\nMESSAGE bot Hi\n", ":2", "MESSAGE is followed by 'bot'"),
        ('FROM x\nSYSTEM """a\nb', ":2", "the quotes of SYSTEM are not closed"),
        ("FROM\n", ":1", "FROM has no value"),
    ],
)
def test_a_file_that_ollama_refuses_is_named_with_its_line(text: str, line: str, found: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text)
    assert caught.value.found.startswith(found)
    assert str(caught.value.place) == f"Modelfile{line}"


def write(folder: Path, text: str) -> Path:
    path = folder / "Modelfile"
    path.write_text(text, encoding="utf-8")
    return path


def test_stop_strings_are_judged_by_the_vocabulary(tmp_path: Path) -> None:
    stops = ("[INST]", "</s>", "<|im_end|>", "France", "[/INST]")
    lines = "".join(f"PARAMETER stop {stop}\n" for stop in stops)
    verdict = judge(write(tmp_path, f"FROM mistral\n{lines}{SETTINGS}"), tokenizer="spm-v3")
    assert [(finding.rule, finding.place.line) for finding in verdict.findings] == [("ML936", 4), ("ML935", 5)]


def test_what_is_not_there_is_not_checked(tmp_path: Path) -> None:
    path = write(tmp_path, f"FROM mistral\n{SETTINGS}")
    assert "no tokenizer to compare with: name it with --tokenizer" in str(judge(path))
    verdict = judge(path, tokenizer="spm-v3")
    assert not verdict.findings
    assert "there is no TEMPLATE" in str(verdict)


def test_an_adapter_that_is_missing_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = write(tmp_path, f"FROM ./model\nADAPTER adapter.gguf\n{SETTINGS}")
    [finding] = judge(path, tokenizer="spm-v3").findings
    assert (finding.rule, finding.place.line) == ("ML938", 2)
    (tmp_path / "adapter.gguf").touch()
    assert not judge(path, tokenizer="spm-v3").findings


def test_the_verb_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "FROM mistral\nTEMPERATURE 1\n")
    assert main(["check", str(path), "--tokenizer", "spm-v3"]) == 1
    out = capsys.readouterr().out
    assert "a Modelfile of Ollama" in out
    assert "ML938" in out


def judged(folder: Path, template: str, tokenizer: str | Path = "spm-v3") -> tuple[list[str], str]:
    """Return what is found in a Modelfile with a template, and the whole verdict."""
    verdict = judge(write(folder, f'FROM mistral\nTEMPLATE """{template}"""\n{SETTINGS}'), tokenizer=tokenizer)
    return [finding.found for finding in verdict.findings if finding.rule == "ML934"], str(verdict)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_template_of_the_export_is_sound(name: str, tmp_path: Path) -> None:
    template = go_template(Oracle(shipped_tokenizer(name)))
    spaced = template.replace("{{ ", "{{\n\t").replace('{{\n\t"[INST]" }}', "{{/* a turn */ -}}\n[INST]")
    for one in (template, spaced):
        found, text = judged(tmp_path, one, name)
        assert not found
        assert "4 checks passed" in text


@pytest.mark.parametrize("name", ["derived-v11", "derived-v13"])
def test_the_template_of_a_newer_version_is_sound(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    file = write_derived(name, folder, words=2000)
    found, text = judged(tmp_path, go_template(Oracle(file)), file)
    assert not found
    assert "4 checks passed" in text


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('{{ "[INST]" }}', "[INST] ", "'[INST] {{ if and $.System ( eq $i $turn ) }}'"),
        ('{{ "\\n\\n" }}{{ $m.Content }}\n', '{{ "\\n" }}{{ $m.Content }}\n', "'\\n{{ $m.Content }}'"),
        ('{{- if $open }}{{ "[/INST]" }}{{ end }}', "{{- if $open }}[/INST]{{ end }}\n", "'\\n'"),
        ("{{- $turn := -1 }}", "<s>{{ $turn := -1 }}", "'<s>{{ $turn := -1 }}'"),
        # the tokens of the version, and those of no other
        ('{{ "</s>" }}', "", "does not write </s>"),
        ('{{ "[INST]" }}', "[SYSTEM_PROMPT]", "'[SYSTEM_PROMPT]'"),
        ('{{ "</s>" }}', "<|im_end|></s>", "'<|im_end|>'"),
    ],
)
def test_each_character_that_is_written_counts(old: str, new: str, found: str, tmp_path: Path) -> None:
    template = go_template(Oracle(shipped_tokenizer("spm-v3")))
    assert old in template
    [text], _ = judged(tmp_path, template.replace(old, new))
    assert found in text


def test_an_empty_text_alone_is_no_finding(tmp_path: Path) -> None:
    template = go_template(Oracle(shipped_tokenizer("spm-v3")))
    assert template.count(TESTED[3:]) == 2
    spaced = template.replace(TESTED, " {{ $m.Content }}").replace("{{-" + TESTED[2:], '{{- "" }} {{ $m.Content }}')
    found, text = judged(tmp_path, spaced)
    assert not found
    assert "4 checks passed" in text
    # with the space of a test that is left out twice, each text has one too many
    assert judged(tmp_path, spaced.replace("[INST]", "[INST] "))[0]


@pytest.mark.parametrize(
    ("template", "first"),
    [
        (LIBRARY, "'{{ if .Messages }}' where that of the export has '{{ $turn := -1 }}'"),
        ("[INST] {{ .Prompt }}[/INST] {{ .Response }}</s>", "'[INST] {{ .Prompt }}'"),
    ],
)
def test_another_form_is_not_checked(template: str, first: str, tmp_path: Path) -> None:
    found, text = judged(tmp_path, template)
    assert not found
    assert first in text
    assert "mistral-lora serve-check" in text


def test_what_writes_no_prompt_is_not_judged(tmp_path: Path) -> None:
    path = write(tmp_path, f'FROM mistral\nTEMPLATE """{{{{ .Prompt }}}}"""\nRENDERER mistral\n{SETTINGS}')
    verdict = judge(path, tokenizer="spm-v3")
    assert not verdict.findings
    assert "RENDERER 'mistral' writes the prompts" in str(verdict)


@pytest.mark.parametrize(
    ("lines", "places"),
    [
        ("PARAMETER num_predict -1\nPARAMETER seed 1\nPARAMETER mirostat_tau 5\nPARAMETER num_predict 4096\n", []),
        ("PARAMETER num_predict 8\nPARAMETER num_predict 16\n", [5]),
        ("PARAMETER num_predict all\n", [4]),
        ("PARAMETER num_ctxt 9\nPARAMETER top_q 9\n", [4, 5]),
        ("MESSAGE user Hi\nMESSAGE assistant Yo\n", [5]),
    ],
)
def test_parameters_and_messages_are_judged(lines: str, places: list[int], tmp_path: Path) -> None:
    verdict = judge(write(tmp_path, f"FROM mistral\n{SETTINGS}{lines}"), tokenizer="spm-v3")
    assert [(finding.rule, finding.place.line) for finding in verdict.findings] == [("ML937", at) for at in places]
