"""The checks of a Modelfile: its files, its template, its stop strings and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.diff import TokenDiff
from pytest_mistral_lora.chat.reading import read_bounded
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.encoded.row_faults import id_faults
from pytest_mistral_lora.conformance.finding import Finding, Result, first_of_each_cause, shown_difference
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection, RowError, shortened
from pytest_mistral_lora.field.servers.ollama.modelfile import Command, Modelfile, read_modelfile
from pytest_mistral_lora.field.servers.ollama.rendered import rendered
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.serving.server import chat_request

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.conformance.model_targets import ModelFileTarget

_SHOWN = 3
_NUM_CTX, _PENALTY = "num_ctx", "repeat_penalty"
_GREEDY: Mapping[str, float] = {_PENALTY: 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Parameters that change greedy answers, with the value that does not."""


def model_file_cases(target: ModelFileTarget) -> Mapping[str, Callable[[], Result]]:
    """Return the checks of a Modelfile, by name; for one that Ollama refuses, only the check that says so."""
    path = target.model_file
    try:
        data = read_bounded(path)
        modelfile = read_modelfile(path, data.decode("utf-8"))
    except UnicodeDecodeError:
        finding = Finding("ML938", "is not UTF-8", Place.of(path), "a text")
        return {"model-file": lambda: Result((finding,))}
    except InputError as error:
        finding = Finding("ML938", error.found, error.place, error.expected)
        return {"model-file": lambda: Result((finding,))}
    judged = ModelfileChecks(target, modelfile)
    return {
        "model-file": judged.files,
        "served-template": judged.template,
        "stop-strings": judged.stops,
        "parameters": judged.parameters,
    }


def plain_rows(oracle: Oracle) -> dict[str, Row]:
    """Return the packaged rows of texts alone that mistral-common takes, by name: a Go template can render them."""
    found = {}
    for case in packaged_cases():
        row = case.row
        plain = not row.tools and all(
            set(one) <= {"role", "content", "weight"} and one["role"] != "tool" and isinstance(one["content"], str)
            for one in row.messages
        )
        settings = case.needs or row.reasoning_effort is not None or row.response_format is not None
        if plain and not settings and oracle.facts in case.versions and row.assistant_groups():
            try:
                oracle.encode_prompt(row)
            except (OracleRejection, RowError):
                continue
            found[case.name] = row
    return found


class ModelfileChecks:
    """The checks of a Modelfile: each method is a check."""

    def __init__(self, target: ModelFileTarget, modelfile: Modelfile) -> None:
        self._target, self._modelfile = target, modelfile

    @cached_property
    def _oracle(self) -> Oracle | str:
        """The tokenizer, or why none is known."""
        try:
            return self._target.tokenizer.oracle
        except MistralLoraError as error:
            return f"no tokenizer to compare with: name it with --tokenizer ({error.found})"

    def files(self) -> Result:
        """ML938: the files that the commands name are there."""
        findings, facts = [], []
        for name in ("from", "adapter"):
            command = self._modelfile.last(name)
            if command is None:
                continue
            file = self._modelfile.file(command)
            # a FROM without a file is the name of a model in a registry
            looks_like_a_path = name == "adapter" or command.value.startswith((".", "/", "~"))
            if file is None and looks_like_a_path:
                found = f"{name.upper()} {shortened(command.value)}: no such file or folder"
                findings.append(Finding("ML938", found, self._modelfile.place(command), "a file of this machine"))
            facts.append((name.upper(), str(file or command.value)))
        return Result(tuple(findings), facts=tuple(facts))

    def template(self) -> Result:
        """ML934: TEMPLATE renders each packaged row of texts with the ids of mistral-common."""
        command, oracle = self._modelfile.last("template"), self._oracle
        if command is None:
            return Result(not_checked="there is no TEMPLATE: the template of the model is taken; check its file")
        if isinstance(oracle, str):
            return Result(not_checked=oracle)
        rows = {name: row for name, row in plain_rows(oracle).items() if not _deviates(row, oracle)}
        try:
            texts = rendered(command.value, [_messages(row) for row in rows.values()])
            fast = self._target.tokenizer.fast
        except MistralLoraError as error:
            return Result(not_checked=f"{error.found}{error.next_step and f': {error.next_step}'}")
        place, findings, right = self._modelfile.place(command), [], 0
        for (name, row), text in zip(rows.items(), texts, strict=True):
            if isinstance(text, InputError):
                findings.append(Finding("ML934", f"is not rendered: {text.found}", place, "a Go template"))
                break
            expected = oracle.encode_prompt(row)
            ids = (oracle.bos_id, *fast(text, add_special_tokens=False)["input_ids"])
            right += ids == expected
            if ids != expected:
                findings += _differences(name, row, oracle, expected, ids, place)
        text = f"{right} of {len(rows)} prompts of texts have the ids of mistral-common"
        thinks = oracle.facts.thinking and "[THINK]" in oracle.control_ids
        text += "; thoughts of a history are not compared" if thinks else ""
        kept = first_of_each_cause(findings, _SHOWN, place)
        return Result(tuple(kept), facts=(("prompts of", text),))

    def stops(self) -> Result:
        """ML935 and ML936: no stop string cuts an answer, and each can be reached."""
        oracle, findings = self._oracle, []
        if isinstance(oracle, str):
            return Result(not_checked=oracle)
        literals = {*oracle.control_tokens.values(), oracle.piece(oracle.eos_id)}
        answers = _answers(oracle)
        for command in self._modelfile.parameters("stop"):
            text, place = command.value, self._modelfile.place(command)
            if text in literals:
                continue  # a control token is never a part of a text
            cut = next((name for name, answer in answers if text in answer), None)
            if cut is not None:
                found = f"stop {shortened(text)} is in an answer ({cut}), which ends there"
                findings.append(Finding("ML935", found, place, "a control token, such as '</s>', or no stop"))
            else:
                count = len(oracle.encode_text(text))
                found = f"stop {shortened(text)} is no token of {oracle.path.name}, but text of {count} tokens"
                findings.append(Finding("ML936", found, place, "a control token, such as '</s>', or no stop"))
        return Result(tuple(findings))

    def parameters(self) -> Result:
        """ML937: the parameters leave prompts and greedy answers as they are."""
        findings: list[Finding] = []
        findings += self._context_findings()
        for name, neutral in _GREEDY.items():
            given = self._modelfile.parameters(name)
            command = given[-1] if given else None
            value = _number(command)
            if command is not None and value != neutral:
                found = f"{name} is {shortened(command.value)}: greedy answers change"
                findings.append(Finding("ML937", found, self._modelfile.place(command), f"{neutral:g}"))
            elif command is None and name == _PENALTY:
                found = f"{name} is missing, and Ollama takes 1.1: greedy answers change"
                findings.append(Finding("ML937", found, self._modelfile.place(None), "PARAMETER repeat_penalty 1"))
        if (system := self._modelfile.last("system")) is not None and system.value:
            found = f"SYSTEM is {shortened(system.value)}: each request without a system prompt gets it"
            expected = "no SYSTEM, unless the model was trained with it"
            findings.append(Finding("ML937", found, self._modelfile.place(system), expected))
        return Result(tuple(findings))

    def _context_findings(self) -> Iterator[Finding]:
        given = self._modelfile.parameters(_NUM_CTX)
        command = given[-1] if given else None
        value, longest = _number(command), self._longest
        place = self._modelfile.place(command)
        if command is None:
            found = "num_ctx is missing: Ollama takes a length of its own, and cuts a longer prompt without a word"
            yield Finding("ML937", found, place, "PARAMETER num_ctx with the length of your prompts and answers")
        elif value is None or value < 1:
            yield Finding("ML937", f"num_ctx is {shortened(command.value)}", place, "a number of tokens")
        elif longest and value > longest:
            yield Finding("ML937", f"num_ctx is {value:g}", place, f"at most {longest}, the model's own context")

    @property
    def _longest(self) -> int | None:
        """The context of the GGUF file that FROM names; None if it is not at hand."""
        file = self._modelfile.file(self._modelfile.last("from"))
        if file is None or not file.is_file():
            return None
        try:
            content = self._target.content
        except InputError:
            return None
        value = content.fields.get(f"{content.architecture}.context_length")
        return value if type(value) is int else None


def _number(command: Command | None) -> float | None:
    try:
        return None if command is None else float(command.value)
    except ValueError:
        return None


def _messages(row: Row) -> list[dict[str, str]]:
    """Return the messages of a request: the prompt alone, as text."""
    return [{"role": one["role"], "content": one["content"]} for one in chat_request(row)["messages"]]


def _deviates(row: Row, oracle: Oracle) -> bool:
    """Return whether no TEMPLATE can be exact for a row.

    Text of a prompt can spell a control token; Ollama joins system messages that follow each other; and a template
    keeps the spaces at the end of an answer, which mistral-common takes away.
    """
    prompt = row.messages[: row.assistant_groups()[-1][0]]
    texts = [str(one["content"]) for one in prompt]
    spelled = any(literal in text for literal in oracle.control_tokens.values() for text in texts)
    roles = [one["role"] for one in prompt]
    joined = any(first == second == "system" for first, second in pairwise(roles))
    padded = any(text != text.rstrip() for text, role in zip(texts, roles, strict=True) if role == "assistant")
    return spelled or joined or padded


def _answers(oracle: Oracle) -> list[tuple[str, str]]:
    """Return the answers of the packaged rows: each text with the name of its row."""
    return [
        (name, str(one["content"]))
        for name, row in plain_rows(oracle).items()
        for one in row.messages
        if one["role"] == "assistant"
    ]


def _differences(
    name: str, row: Row, oracle: Oracle, expected: Sequence[int], ids: Sequence[int], place: Place
) -> Iterator[Finding]:
    """Yield ML934 for each class of a prompt's difference."""
    difference = TokenDiff.of((tuple(expected), None), (tuple(ids), None), oracle.piece, ("mistral-common", "TEMPLATE"))
    prompt = replace(row, messages=row.messages[: row.assistant_groups()[-1][0]])
    for fault in id_faults(prompt, tuple(expected), tuple(ids), oracle):
        parts = shown_difference(difference, Place.of(name))
        found = f"{name}: {fault.found} ({fault.rule})"
        yield Finding("ML934", found, place, fault.expected, row=row.to_jsonl(), **parts)
