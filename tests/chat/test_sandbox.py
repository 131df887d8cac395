"""A hostile chat template is refused in bounded time and memory, and a harmless one is not."""

from __future__ import annotations

import time

import pytest
from converted import converted_tokenizer

from pytest_mistral_lora.chat.oracle import SHIPPED
from pytest_mistral_lora.chat.rows import parse_row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.sandbox import SECONDS, BoundedTemplate, OverrunError
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RowError

ROW = parse_row({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}"
DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"

OVERRUNS = {
    "nested loops": LOOP + ENDS,
    "nested loops in a macro": "{% macro m() %}" + LOOP + "x" * 99 + ENDS + "{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(40) }}",
    "a text that doubles": DOUBLE.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
    "a text that doubles by joining": DOUBLE.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
    "a list that doubles": DOUBLE.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    "a list of itself twice, written": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]")
    + "{{ ns.x | tojson }}",
    "a list of itself twice, shown": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
    "a text times a number": "{{ bos_token * 99999999999 }}",
    "a constant text times a number": "{% if false %}{{ 'a' * 99999999999 }}{% endif %}",
    "a constant power": "{% if false %}{{ 10 ** (10 ** 10) }}{% endif %}",
    "a power": "{{ messages | length ** 999999999999 }}{{ (messages | length) ** 999999999999 }}",
    "a wide number": "{{ '%99999999999d' % 1 }}",
    "a wide number by format": "{{ '{:>{w}}'.format(1, w=99999999999) }}",
    "a wide number by a constant format": "{{ '{:>99999999999}'.format(1) }}",
    "a centred text": "{{ bos_token.center(99999999999) }}",
    "a centred text by a filter": "{{ bos_token | center(99999999999) }}",
    "tabs": "{{ '\t'.expandtabs(2000000000) }}",
    "every place replaced": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "a joined list": "{{ range(99999) | join('b' * 99999) }}",
    "a joined mapped list": "{{ range(99999) | map('string') | join('b' * 99999) }}",
    "wide JSON": "{{ messages | tojson(indent=999999999) }}",
    "chance": "{{ messages | random }}",
    "filler text": "{{ lipsum(n=999999) }}",
    "a long template": "x" * 1_000_001,
}
FAILS = {
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a namespace that holds itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "attributes": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
    "a format that reads attributes": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a file": "{% include '/etc/passwd' %}",
    "a division by zero": "{{ 1 // 0 }}",
    "a missing key": "{{ messages[7]['content'] + 1 }}",
    "a change of the row": "{{ messages.append(1) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "not a template": "{% if %}",
}


@pytest.fixture(scope="module")
def tokenizer() -> CheckpointTokenizer:
    return converted_tokenizer("spm-v3")


@pytest.mark.parametrize("name", OVERRUNS)
def test_a_template_that_overruns_is_refused_in_time(name: str, tokenizer: CheckpointTokenizer) -> None:
    template = ChatTemplate(tokenizer.fast, OVERRUNS[name])
    start = time.monotonic()
    with pytest.raises(RowError, match=r"the chat template (takes|makes|uses|has) ") as error:
        template.encode(ROW)
    assert isinstance(error.value.__cause__, OverrunError)
    assert time.monotonic() - start < 2 * SECONDS
    with pytest.raises(RowError, match="the chat template refuses the row"):  # at once, from now on
        template.render(ROW)


@pytest.mark.parametrize("name", FAILS)
def test_a_template_that_fails_is_refused(name: str, tokenizer: CheckpointTokenizer) -> None:
    with pytest.raises(RowError, match="the chat template refuses the row: "):
        ChatTemplate(tokenizer.fast, FAILS[name]).encode(ROW)


def test_a_long_row_is_not_refused(tokenizer: CheckpointTokenizer) -> None:
    template = ChatTemplate(tokenizer.fast)
    long = {"messages": [{"role": role, "content": "word " * 200} for role in ("user", "assistant") * 500]}
    assert template.render(long).count("word") == 200_000


@pytest.mark.parametrize("name", SHIPPED)
def test_the_official_templates_take_few_steps(name: str) -> None:
    source = converted_tokenizer(name).fast.chat_template
    bounded = BoundedTemplate(source)
    bounded.run({"messages": list(ROW.messages), "tools": None, "bos_token": "<s>", "eos_token": "</s>"})
    assert bounded._budget.steps > 499_000


def test_an_undefined_variable_prints_as_nothing_as_in_transformers() -> None:
    BoundedTemplate("{{ nothing }}{{ 'a' ~ nothing }}").run({})
