"""A hostile chat template is refused in bounded time and memory, and a harmless one is not."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from converted import converted_tokenizer
from each_oracle import oracle_named
from sampling import sampled

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.reading import limited
from pytest_mistral_lora.chat.reading.limited import KeptProcess, Limits
from pytest_mistral_lora.chat.templates import ChatTemplate, isolated
from pytest_mistral_lora.chat.templates.isolated import WITHOUT_LIMITS, ask, render_process, trust
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import MistralLoraError, NoTemplateError, RenderError, RowError
from pytest_mistral_lora.records.goldens import packaged_cases

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
    "chance for each": "{{ [messages, messages] | map('random') | list }}",
    "filler text": "{{ lipsum(n=999999) }}",
    "a long template": "x" * 1_000_001,
    "a number squared": "{% set ns = namespace(x=3) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "shared lists compared": "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(40) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "wrapped words": "{{ ('a ' * 4000000) | wordwrap(1) | length }}",
    "a long number divided": "{% set x = 7 ** 3000000 %}{% for i in range(999) %}{% set y = x // 3 %}{% endfor %}",
    "lists sorted": "{% for i in range(9999) %}{{ range(99999) | groupby('real') | length }}{% endfor %}",
    "a translated text": "{{ ('a' * 9999).translate({97: 'b' * 999999}) | length }}",
    "bytes": "{{ ('a'.encode() * 9999999999) | length }}",
    "a sum of lists": "{% set ns = namespace(x=[[1] * 3000] * 3000) %}{{ ns.x | sum(start=[]) | length }}",
}
FAILS = {
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "attributes": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
    "a format that reads attributes": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a file": "{% include '/etc/passwd' %}",
    "a division by zero": "{{ 1 // 0 }}",
    "a missing key": "{{ messages[7]['content'] + 1 }}",
    "a change of the row": "{{ messages.append(1) }}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "half a surrogate pair in the source": "\ud800",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "not a template": "{% if %}",
}


HARMLESS = {
    "a namespace that holds itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "an iterator that is read twice": "{% set g = messages | map(attribute='role') %}{{ g | first }}{{ g | first }}",
    "a filter of that name": "{{ '_spend' is filter }}{{ 'count_literal' is filter }}",
    "a date": "{{ strftime_now('%Y') }}",
    "recursion": "{% macro m(n) %}{% if n %}{{ n }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "all kinds of joins": "{{ 'a' ~ 1 ~ nothing ~ [2] ~ none }}{{ 'b' + 'c' * 3 + '%s' % 4 }}{{ 7 // 2 ** 2 }}",
    "undefined keys": "{{ messages[0].nothing is defined }}{{ messages[0]['content'] | default('x') | upper }}",
}


@pytest.fixture(scope="module")
def process() -> Iterator[KeptProcess]:
    """A process with narrow limits, so that the tests are fast."""
    started = render_process(Limits(cpu_seconds=0.5, memory=256 << 20))
    yield started
    started.close()


def question(source: str, asked: str = "mark") -> dict[str, Any]:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return {"asked": asked, "source": source, "messages": [*ROW.messages], "tools": None, "variables": variables}


@pytest.fixture(scope="module")
def tokenizer() -> CheckpointTokenizer:
    return converted_tokenizer("spm-v3")


@pytest.mark.parametrize("name", sampled(OVERRUNS, ("a text that doubles", "a wide number")))
def test_a_template_that_overruns_is_refused_in_time(name: str, process: KeptProcess) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = process.ask({**question(OVERRUNS[name]), "foreign": True})
    assert found["kind"] in ("limit", "overrun"), found
    assert re.search(r"more than .*\d|uses .*['\d]", found["found"])
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10
    # the next row is rendered, by a new process if need be
    assert process.ask({**question("{{ bos_token }}"), "foreign": True})["text"] == "<s>"


def test_a_template_that_has_overrun_is_not_run_again(
    tokenizer: CheckpointTokenizer, process: KeptProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "renderer", lambda: process)
    template = ChatTemplate(tokenizer.fast, OVERRUNS["nested loops"])
    for row in (ROW, ROW):
        with pytest.raises(RowError, match=r" 0\.5 seconds of CPU time") as error:
            template.encode(row)
        assert isinstance(error.value.__cause__, RenderError)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == before


@pytest.mark.parametrize("name", FAILS)
def test_a_template_that_fails_is_refused(name: str, tokenizer: CheckpointTokenizer) -> None:
    with pytest.raises(RowError, match=r"the chat template (refuses the row: |writes half)"):
        ChatTemplate(tokenizer.fast, FAILS[name]).encode(ROW)


def test_a_long_row_is_not_refused(tokenizer: CheckpointTokenizer) -> None:
    template = ChatTemplate(tokenizer.fast)
    long = {"messages": [{"role": role, "content": "word " * 200} for role in ("user", "assistant") * 500]}
    assert template.render(long).count("word") == 200_000


def test_a_constant_that_no_memory_holds_is_not_made(process: KeptProcess) -> None:
    never = {**question("{% if false %}{{ 'a' * 99999999999 }}{% endif %}"), "foreign": True}
    assert process.ask(never)["text"] == ""


@pytest.mark.parametrize("name", HARMLESS)
def test_a_template_is_rendered_alike_here_and_there(name: str, process: KeptProcess) -> None:
    found = process.ask({**question(HARMLESS[name]), "foreign": True})
    trust(HARMLESS[name])
    assert found == ask(question(HARMLESS[name]))


def test_packaged_rows_are_rendered_alike_by_a_foreign_template(tokenizer: CheckpointTokenizer) -> None:
    own = ChatTemplate(tokenizer.fast)
    foreign = ChatTemplate(tokenizer.fast, own.source + "{# foreign #}")

    def outcomes(template: ChatTemplate) -> Iterator[Any]:
        for case in packaged_cases():
            try:
                yield template.encode(case.row), template.applied(case.row)
            except RowError as error:
                yield str(error)

    assert list(outcomes(own)) == list(outcomes(foreign))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ strftime_now('%f') }}", "unsteady"),
        ("{{ messages[0].get }}", "unsteady"),
        ("{{ messages | map(attribute='role') }}", "unsteady"),
        ("{{ '\\ud800' }}", "surrogate"),
        ("{{ messages.append(1) }}", "forbidden"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 1 // 0 }}", "error"),
    ],
)
def test_errors_have_a_kind(source: str, kind: str, process: KeptProcess) -> None:
    assert process.ask({**question(source), "foreign": True})["kind"] == kind


@pytest.mark.parametrize("asked", ["mark", "render"])
def test_a_text_that_spells_an_address_is_steady(asked: str, process: KeptProcess) -> None:
    spelled = "<object at 0x7f00>"
    in_row = {**question("{{ messages[0].content }}", asked), "messages": [{"role": "user", "content": spelled}]}
    assert process.ask({**in_row, "foreign": True})["text"] == spelled
    assert process.ask({**question(spelled, asked), "foreign": True})["text"] == spelled


def test_a_foreign_template_is_not_rendered_without_limits(
    tokenizer: CheckpointTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where a process has no timer of its CPU time."""
    monkeypatch.delattr(signal, "setitimer")
    foreign = ChatTemplate(tokenizer.fast, "{{ bos_token }}")
    with pytest.raises(NoTemplateError, match=f"set {WITHOUT_LIMITS}=1"):
        foreign.render(ROW)
    assert ChatTemplate(tokenizer.fast, oracle_named("spm-v3").chat_template()).render(ROW).startswith("<s>[INST]")
    monkeypatch.setenv(WITHOUT_LIMITS, "1")
    assert foreign.render(ROW) == "<s>"


def test_a_process_that_ends_while_idle_is_replaced(process: KeptProcess) -> None:
    harmless = {**question("{{ eos_token }}"), "foreign": True}
    process.ask(harmless)
    os.kill(process._started[os.getpid()].process.pid, signal.SIGKILL)
    assert process.ask(harmless)["text"] == "</s>"


def test_a_process_that_stops_is_ended_by_the_clock() -> None:
    process = render_process(Limits(seconds=0.2))
    process.ask({**question("a"), "foreign": True})
    os.kill(process._started[os.getpid()].process.pid, signal.SIGSTOP)
    assert "more than 0.2 seconds" in process.ask({**question("b"), "foreign": True})["found"]
    process.close()


def test_threads_and_forks_do_not_mix_their_answers(process: KeptProcess) -> None:
    def answers(mark: str) -> set[str]:
        return {process.ask({**question(f"{mark}{n}"), "foreign": True})["text"] for n in range(50)}

    found: list[set[str]] = []
    threads = [threading.Thread(target=lambda mark=mark: found.append(answers(mark))) for mark in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(sorted, found)) == [sorted(f"{mark}{n}" for n in range(50)) for mark in "abc"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to a size")
def test_the_process_imports_no_torch_keeps_its_memory_and_ends_with_its_parent() -> None:
    # transformers 4 imports torch itself, which takes half a gigabyte
    has_torch, most = (True, 1300) if version("transformers") < "5" else (False, 700)
    script = (
        "import resource, sys\n"
        "from pytest_mistral_lora.chat.templates.isolated import ask, renderer\n"
        "q = {'asked': 'render', 'source': 'a', 'messages': [], 'tools': None, 'variables': {}}\n"
        "assert ask(q)['text'] == 'a'\n"
        "pid = next(iter(renderer()._started.values())).process.pid\n"
        "maps = open(f'/proc/{pid}/maps').read()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        f"assert ('/torch/' in maps) is {has_torch}\n"
        "print(pid)\n"
        "for source in sys.argv[1:]:\n"
        "    assert 'kind' in renderer().ask({**q, 'foreign': True, 'source': source})\n"
        f"assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < {most} << 10\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, OVERRUNS["bytes"]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)


def test_an_interpreter_that_cannot_start_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "_CODE", "raise SystemExit(9)")
    with pytest.raises(MistralLoraError, match=r"does not start \(exit code 9\)"):
        render_process(Limits()).ask({**question("a"), "foreign": True})
