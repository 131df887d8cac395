"""The training template, judged by transformers' own masks: what TRL and others train on with it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from derived_tekken import DERIVED, derived_tokenizer
from each_oracle import ALL, WITH_TOOLS, of_each
from hypothesis import given, settings
from sampling import sampled

from pytest_mistral_lora import cli
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import BackendComparison, compare
from pytest_mistral_lora.chat.templates.generation_blocks import has_generation
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, official_template, training_template
from pytest_mistral_lora.errors import NoTemplateError, RowError
from pytest_mistral_lora.records.goldens import packaged_cases, packaged_golden
from pytest_mistral_lora.strategies import rows, tool_rows

NAMES = [*SHIPPED, *DERIVED]
ANSWER = {"role": "assistant", "content": "b"}


@dataclass(frozen=True)
class Trained:
    """A tokenizer with its training template, as a trainer uses the two."""

    tokenizer: CheckpointTokenizer
    official: ChatTemplate
    template: str

    def labels(self, row: Row | Mapping[str, Any], template: str | None = None) -> tuple[int, ...]:
        row = as_row(row)
        given = {"reasoning_effort": row.reasoning_effort, "response_format": row.response_format}
        settings = {name: value for name, value in given.items() if value is not None}
        result = self.tokenizer.fast.apply_chat_template(
            [{key: value for key, value in message.items() if key != "weight"} for message in row.messages],
            tools=list(row.tools) if row.tools else None,
            chat_template=template or self.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **settings,
        )
        pairs = zip(result["input_ids"], result["assistant_masks"], strict=True)
        return tuple(token if marked else IGNORE_INDEX for token, marked in pairs)

    def compare(self, row: Row | Mapping[str, Any]) -> BackendComparison:
        return compare(row, self.tokenizer.oracle, self.official)

    @functools.cached_property
    def marked(self) -> ChatTemplate:
        marked = ChatTemplate(self.tokenizer.fast, self.template)
        return marked

    def check(self, row: Row | Mapping[str, Any]) -> None:
        """The text is the official template's, and the labels are the oracle's but for a named deviation."""
        comparison = self.compare(row)
        assert comparison.unexplained == ""
        if comparison.template is None:
            assert comparison.deviations
            return
        assert self.official.render(row) == self.marked.render(row), "other text"
        if comparison.equal and not has_weight_0(row):
            assert self.labels(row) == comparison.oracle.labels, "other labels"


def has_weight_0(row: Row | Mapping[str, Any]) -> bool:
    return any(message.get("weight") == 0 for message in as_row(row).messages)


@functools.cache
def trained(name: str) -> Trained:
    tokenizer = converted_tokenizer(name)
    official = ChatTemplate(tokenizer.fast)
    return Trained(tokenizer, official, training_template(tokenizer))


@pytest.mark.parametrize("name", sampled(SHIPPED, ("spm-v2", "spm-v7m1", "tekken-240718")))
def test_packaged_rows_get_the_recorded_labels(name: str) -> None:
    one = trained(name)
    oracle = one.tokenizer.oracle
    goldens = [packaged_golden(oracle.sha256, case.name) for case in packaged_cases() if case.fits(oracle)]
    sound = [golden for golden in goldens if not golden.deviations and not has_weight_0(golden.row)]
    assert len(sound) > 20
    for golden in sound:
        assert one.marked.render(golden.row) == one.official.render(golden.row), golden.case
        assert one.labels(golden.row) == golden.encoded.labels, golden.case


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVED)
def test_packaged_rows_get_the_oracles_labels(name: str) -> None:
    one = trained(name)
    cases = [case for case in packaged_cases() if case.fits(one.tokenizer.oracle)]
    assert sum(one.compare(case.row).equal for case in cases) > 20
    for case in cases:
        one.check(case.row)


@settings(max_examples=10)
@given(row=rows())
@of_each(*SHIPPED, made=trained)
def test_generated_rows_get_the_oracles_labels(one: Trained, row: dict[str, Any]) -> None:
    one.check(row)


@settings(max_examples=10)
@given(row=tool_rows())
@of_each(*WITH_TOOLS, made=trained)
def test_generated_tool_rows_get_the_oracles_labels(one: Trained, row: dict[str, Any]) -> None:
    one.check(row)


@pytest.mark.slow
@settings(max_examples=50)
@given(row=rows() | tool_rows())
@of_each(*ALL, made=trained)
def test_many_rows_get_the_oracles_labels(one: Trained, row: dict[str, Any]) -> None:
    if one.tokenizer.oracle.version != "v1" or not row.get("tools"):
        one.check(row)


@pytest.mark.parametrize("name", SHIPPED)
def test_each_answer_is_marked_to_its_eos(name: str) -> None:
    one = trained(name)
    row = {"messages": [{"role": "user", "content": "a"}, ANSWER, {"role": "user", "content": "c"}, ANSWER]}
    assert one.labels(row).count(one.tokenizer.oracle.eos_id) == 2


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - {"spm-v1"}))
def test_a_tool_call_is_marked_from_its_marker_on(name: str) -> None:
    one = trained(name)
    case = next(case for case in packaged_cases() if case.name == "tool-call")
    marker = next(token for token, text in one.tokenizer.oracle.control_tokens.items() if text == "[TOOL_CALLS]")
    assert marker in one.labels(case.row)


def test_a_template_cannot_leave_out_an_answer_of_weight_0() -> None:
    one = trained("spm-v3")
    row = {"messages": [{"role": "user", "content": "a"}, {**ANSWER, "weight": 0}]}
    assert one.compare(row).oracle.supervised_tokens == 0
    assert one.labels(row).count(IGNORE_INDEX) < len(one.labels(row))


def _without_blocks(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{%- endgeneration %}", "")


def _closed_before_eos(template: str) -> str:
    open_end = template.replace("{%- endgeneration %}", "")
    return open_end.replace("        {{- eos_token }}", "{%- endgeneration %}{{- eos_token }}")


@pytest.mark.parametrize("broken", [_without_blocks, _closed_before_eos])
def test_labels_of_a_wrong_training_template_are_found(broken: Callable[[str], str]) -> None:
    good = trained("spm-v3")
    wrong = replace(good, template=broken(good.template))
    row = {"messages": [{"role": "user", "content": "a"}, ANSWER]}
    good.check(row)
    with pytest.raises(AssertionError, match="other labels"):
        wrong.check(row)


def test_text_of_a_wrong_training_template_is_found() -> None:
    good = trained("spm-v3")
    wrong = replace(good, template=good.template.replace("{% generation %}", "{% generation %}."))
    with pytest.raises(AssertionError, match="other text"):
        wrong.check({"messages": [{"role": "user", "content": "a"}, ANSWER]})


def test_a_template_without_answers_is_refused(tmp_path: Path) -> None:
    tokenizer = trained("spm-v3").tokenizer.fast
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(NoTemplateError, match="no branch for messages of the role assistant"):
        training_template(CheckpointTokenizer(tmp_path, "none"))
    # by its vocabulary it is Mistral's, and so is its template
    assert training_template(tmp_path) == trained("spm-v3").template


def test_a_template_that_has_blocks_is_taken_as_it_is(tmp_path: Path) -> None:
    trained("spm-v3").tokenizer.fast.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(trained("spm-v3").template)
    own = CheckpointTokenizer(tmp_path, "none")
    assert training_template(own) == official_template(own) == trained("spm-v3").template


def test_the_command_writes_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(shipped_tokenizer("spm-v7"))
    assert cli.main(["template", "--tokenizer", path, "--output", str(tmp_path / "training.jinja")]) == 0
    assert (tmp_path / "training.jinja").read_text() == training_template(path)
    assert cli.main(["template", "--tokenizer", path]) == 0
    assert capsys.readouterr().out == training_template(path) + "\n"


def written(tokenizer: Path, prompt: Path, output: Path) -> str:
    """Write the template with a system prompt by the command, and return it."""
    words = ["template", "--tokenizer", str(tokenizer), "--system-prompt", str(prompt), "--output", str(output)]
    assert cli.main(words) == 0
    return output.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["spm-v3", "spm-v7"])
def test_the_command_writes_a_system_prompt_that_is_the_users_or_a_templates_own(name: str, tmp_path: Path) -> None:
    tokenizer = shipped_tokenizer(name)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Answer in verse,\nas « Ronsard » did.\n", encoding="utf-8")
    template = written(tokenizer, prompt, tmp_path / "chat_template.jinja")
    question = {"role": "user", "content": "a"}
    as_system = {"role": "system", "content": "Answer in verse,\nas « Ronsard » did."}
    rendered = ChatTemplate(trained(name).tokenizer.fast, template).render({"messages": [question, ANSWER]})
    assert rendered == trained(name).official.render({"messages": [as_system, question, ANSWER]})
    # the prompt of a template is kept
    assert written(tokenizer, tmp_path / "chat_template.jinja", tmp_path / "again.jinja") == template


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("prompt.txt", "Today is {today}, before that {yesterday}.", "holds {today}, {yesterday}, which no library"),
        ("prompt.txt", " \n", "the system prompt is empty"),
        ("prompt.txt", "Say [INST] and </s>.", "spells control tokens (</s>, [INST])"),
        ("prompt.txt", "caf\udce9", "not valid UTF-8"),
        ("own.jinja", "{{ messages[0].content }}", "the chat template has no system prompt of its own"),
        (
            "own.jinja",
            "{%- if messages[0].role != 'system' %}[SYSTEM_PROMPT]It is {{ strftime_now('%Y-%m-%d') }}.[/SYSTEM_PROMPT]"
            "{%- endif %}{%- for message in messages %}{{ message.content }}{%- endfor %}",
            "the system prompt holds the date of today",
        ),
    ],
    ids=["braces", "empty", "control-tokens", "encoding", "no-prompt", "clock"],
)
def test_a_system_prompt_that_no_model_should_read_is_refused(
    name: str, text: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / name, tmp_path / "chat_template.jinja"
    file.write_bytes(text.encode(errors="surrogateescape"))
    tokenizer = str(shipped_tokenizer("spm-v7"))
    words = ["template", "--tokenizer", tokenizer, "--system-prompt", str(file), "--output", str(output)]
    assert cli.main(words) == 2
    assert found in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_a_template_of_v11_may_refuse_thinking(capsys: pytest.CaptureFixture[str]) -> None:
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "c"}, {"type": "text", "text": "b"}]}
    row = {"messages": [{"role": "user", "content": "a"}, thought]}
    path = str(derived_tokenizer("derived-v11"))
    templates = {}
    for flags in ([], ["--no-thinking"]):
        assert cli.main(["template", "--tokenizer", path, *flags]) == 0
        templates[len(flags)] = ChatTemplate(trained("derived-v11").tokenizer.fast, capsys.readouterr().out[:-1])
    assert templates[0].render(row).endswith("<think>c</think>b</s>")
    with pytest.raises(RowError, match="the chat template refuses the row"):
        templates[1].render(row)
    assert templates[1].render({"messages": [row["messages"][0], ANSWER]}).endswith("[/INST]b</s>")


@pytest.mark.parametrize("unit", ["{", "{#", "{%a", "{%a'", '{%a"', "{%a%", "{% "])
def test_the_tags_of_a_template_without_ends_take_no_time(unit: str) -> None:
    start = time.process_time()
    assert not has_generation(unit * 60_001)
    assert time.process_time() - start < 3
