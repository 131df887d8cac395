"""Recorded prompts of real servers: a file for each server, setting and tokenizer, in docs/serving/recorded/.

Each has the packaged rows, and the smallest row of each named deviation that the tokenizer has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from boards.inputs import DOCS, loaded, tokenizer_file
from boards.results import DEVIATION, Result
from boards.servers import RunningServer, in_code, program_of, to_set
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS
from pytest_mistral_lora.conformance.encoded.row_faults import id_faults
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.server.checks import ServerChecks
from pytest_mistral_lora.conformance.server.deviations import PromptDeviations
from pytest_mistral_lora.conformance.server_target import AskedRow, ServerAnswers, ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.serving.server import ServedPrompt, ServerFacts

RECORDED = DOCS / "serving" / "recorded"
CONTRASTS = (
    "no --tokenizer-mode (auto), merged folder",
    "--tokenizer-mode hf",
    "no add_space_prefix in the file",
    "as convert_hf_to_gguf.py names the splitter (pixtral)",
    "the template is a name (--mistral-format)",
)
"""Settings that were recorded to show what goes wrong with them."""
EXAMPLES = frozenset(one.id for one in DEVIATIONS)
"""The names of the rows of the deviations."""

WORDS = 8_000
"""Ids of text of a derived tokenizer."""


@dataclass(frozen=True)
class RecordedServer:
    """The prompts that a server made of the packaged rows.

    Attributes:
        kind: A key of `SERVERS`.
        version: The version that the server reported, or its package.
        setting: The files and options that decide the prompts.
        tokenizer: Name of the shipped tokenizer that they are held to.
        prompts: The prompt of each row, by the row's name; of a deviation's row, by the deviation's.
    """

    kind: str
    version: str
    setting: str
    tokenizer: str
    prompts: Mapping[str, ServedPrompt]

    @property
    def target(self) -> ServerTarget:
        """The target that a running server is judged as, without its answers."""
        return server_target(self.kind, "http://127.0.0.1:1", self.tokenizer)

    def judged(self) -> Judged:
        """Return the recorded prompts, held to mistral-common."""
        target = self.target
        asked = [*target.asked_rows(), *asked_examples(target)]
        rows = tuple(replace(one, served=self.prompts[one.name]) for one in asked if one.name in self.prompts)
        # as the target keeps the answers of a running server
        vars(target)["answers"] = ServerAnswers(ServerFacts(self.version, ("tiny",)), "tiny", rows)
        results = {case: judge() for case, judge in ServerChecks(target).cases().items()}
        found = [finding for result in results.values() for finding in result.findings]
        return Judged(self, rows, found, PromptDeviations(target))


@dataclass(frozen=True)
class Judged:
    """A recording with its findings.

    Attributes:
        recorded: The recording.
        rows: Its rows.
        findings: What the checks find.
        deviations: The named deviations of its prompts.
    """

    recorded: RecordedServer
    rows: Sequence[AskedRow]
    findings: Sequence[Finding]
    deviations: PromptDeviations

    @property
    def result(self) -> Result:
        """The verdict on each packaged row."""
        return self._result([one for one in self.rows if one.name not in EXAMPLES])

    @property
    def of_examples(self) -> Result:
        """The verdict on the row of each deviation, by its name."""
        return self._result([one for one in self.rows if one.name in EXAMPLES])

    def _result(self, rows: Sequence[AskedRow]) -> Result:
        setting = self.recorded.setting
        program, version = program_of(self.recorded.kind, self.recorded.version)
        return Result(
            program=program,
            task="",
            version=version,
            setting=to_set(setting),
            name=f"{program} {version}: {in_code(setting)}",
            tokenizer=self.recorded.tokenizer,
            verdicts={one.name: self._labels(one) for one in rows},
            compares_lengths=any(one.expected and one.served.count and one.served.ids is None for one in rows),
            is_contrast=setting in CONTRASTS,
        )

    def _labels(self, one: AskedRow) -> list[str]:
        """Return the named deviations of a prompt, or the rules that it breaks."""
        served = one.served
        assert isinstance(served, ServedPrompt)
        # what mistral-common refuses may fail, too
        if one.refusal:
            return [] if served.refused or served.failed else ["ML907"]
        if served.refused or served.failed:
            return ["ML907"] if served.refused else ["ML919"]
        if served.ids is None:
            return [] if served.count == len(one.expected or ()) else ["ML904"]
        if served.ids == one.expected:
            return []
        if named := self.deviations.explain(one, served.ids):
            return [f"{DEVIATION}{name}" for name in sorted(named)]
        # ML523 is text that becomes a control token
        oracle = self.recorded.target.oracle
        faults = {fault.rule for fault in id_faults(one.prompt, one.expected or (), served.ids, oracle)}
        return sorted("ML906" if rule == "ML523" else rule for rule in faults) or ["ML902"]


def server_target(kind: str, url: str, tokenizer: str) -> ServerTarget:
    """Return a server as a target that is held to a shipped or a derived tokenizer."""
    file = tokenizer_file(tokenizer, WORDS)
    judge = Target(tokenizer, file)
    # converted once for all recordings
    vars(judge)["tokenizer"] = loaded(file)
    return ServerTarget(kind, judge=judge, kind=kind, url=url)


def asked_examples(target: ServerTarget) -> list[AskedRow]:
    """Return the smallest row of each named deviation of a tokenizer, but for those that mistral-common refuses.

    It has a turn more than in the table, so that the deviation is in a prompt.
    """
    oracle = target.oracle
    rows = {
        one.id: as_row({**one.example, "messages": [*one.example["messages"], *_more(one.example["messages"][-1])]})
        for one in DEVIATIONS
        if oracle.facts in one.versions and oracle.kind in one.kinds
    }
    asked = replace(target, given=tuple(rows.values())).asked_rows()
    named = (replace(one, name=name) for name, one in zip(rows, asked, strict=True))
    return [one for one in named if one.expected is not None]


def _more(last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages that may follow an answer: the results of its calls, or a question, and another answer."""
    results = [
        {"role": "tool", "tool_call_id": call.get("id", ""), "name": call["function"]["name"], "content": "ok"}
        for call in last.get("tool_calls", ())
    ]
    return [*(results or [{"role": "user", "content": "c"}]), {"role": "assistant", "content": "d"}]


def read_recorded() -> list[RecordedServer]:
    """Return every recording, by server, setting and tokenizer."""
    return [_read(file) for file in sorted(RECORDED.glob("*.json"))]


def _read(file: Path) -> RecordedServer:
    data = json.loads(file.read_text(encoding="utf-8"))
    prompts = {name: _prompt(one) for name, one in data.pop("rows").items()}
    return RecordedServer(prompts=prompts, **data)


def _prompt(data: Mapping[str, Any]) -> ServedPrompt:
    ids = data.get("ids")
    unanswered = {key: data[key] for key in ("refused", "failed") if key in data}
    return ServedPrompt(None if ids is None else tuple(ids), data.get("count"), **unanswered)


def record(server: RunningServer) -> Path:
    """Ask a running server for the prompts of the packaged rows and of the deviations, and write them down.

    Raises:
        InputError: If the server is not there, or fails on a row.
    """
    target = server_target(server.kind, server.url, server.tokenizer)
    asked = [*target.asked_rows(), *asked_examples(target)]
    answers = replace(target, given=tuple(one.row for one in asked)).answers
    data = {
        "kind": target.kind,
        "version": server.version or answers.facts.version,
        "setting": server.setting,
        "tokenizer": target.judge.name,
    }
    rows = ",\n".join(
        f"  {json.dumps(one.name)}: {json.dumps(_written(answer), ensure_ascii=False)}"
        for one, answer in zip(asked, answers.rows, strict=True)
    )
    head = json.dumps(data, ensure_ascii=False, indent=1)[:-2]
    file = RECORDED / f"{server.name}-{target.judge.name}.json"
    write_text(file, f'{head},\n "rows": {{\n{rows}\n }}\n}}\n')
    return file


def _written(one: AskedRow) -> dict[str, Any]:
    served = one.served
    if isinstance(served, InputError):
        raise served
    if served.refused:
        return {"refused": served.refused}
    if served.failed:
        return {"failed": served.failed}
    shown = {} if served.ids is None else {"ids": list(served.ids)}
    return shown | ({} if served.count is None else {"count": served.count})
