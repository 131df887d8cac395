"""The checks of a Modelfile: its files, its template, its stop strings and its parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.oracle.versions import VERSIONS
from pytest_mistral_lora.chat.reading import read_bounded
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.dataset.texts import MARKER
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection, RowError, shortened
from pytest_mistral_lora.field.servers.ollama.go_template import GoTemplate, go_template, read_go_template
from pytest_mistral_lora.field.servers.ollama.modelfile import Command, Modelfile, read_modelfile
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.goldens import packaged_cases

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.conformance.model_targets import ModelFileTarget

_NUM_CTX, _NUM_PREDICT, _PENALTY = "num_ctx", "num_predict", "repeat_penalty"
_GREEDY: Mapping[str, float] = {_PENALTY: 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Parameters that change greedy answers, with the value that does not."""

_KNOWN = re.compile(
    "stop|seed|temperature|(?:top|min|typical)_[kp]|repeat_last_n|(?:repeat|presence|frequency)_penalty|(?:main|num)_gpu"
    "|num_(?:ctx|predict|keep|batch|thread)|use_mmap|draft_num_predict"
    # no longer used, and taken
    "|penalize_newline|low_vram|f16_kv|logits_all|vocab_only|use_mlock|mirostat(?:_tau|_eta)?|numa|tfs_z",
    re.IGNORECASE,
)
"""The parameters of Ollama (api/types.go, parser/parser.go; 2026)."""

_WRITTEN = re.compile(r"\[/?[A-Z_]+\]|</s>")
_ASK = "; ask the server what it feeds the model: mistral-lora serve-check"


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
        """ML934: TEMPLATE writes what the one of the export writes for this tokenizer."""
        command, oracle = self._modelfile.last("template"), self._oracle
        if renderer := self._modelfile.last("renderer"):
            return Result(not_checked=f"RENDERER {shortened(renderer.value)} writes the prompts{_ASK}")
        if command is None:
            return Result(not_checked="there is no TEMPLATE: the template of the model is taken; check its file")
        if isinstance(oracle, str):
            return Result(not_checked=oracle)
        place = self._modelfile.place(command)
        try:
            template = read_go_template(command.value)
        except InputError as error:
            return Result((Finding("ML934", f"TEMPLATE is not read: {error.found}", place, error.expected),))
        try:
            wanted = read_go_template(go_template(oracle))
        except InputError as error:
            return Result(not_checked=f"{error.found}{_ASK}")
        markers = sorted({*_WRITTEN.findall("".join(wanted.texts))})
        expected = f"the markers of version {oracle.facts.name}: {', '.join(markers)}"
        others = {*VERSIONS[-1].control_tokens} - {*oracle.control_tokens.values(), *markers}
        written = "".join(template.texts)
        if foreign := [one for one in (*re.findall(MARKER, written), *others) if one in written]:
            found = f"TEMPLATE writes {min(foreign, key=written.find)!r}, which is text to this model"
            return Result((Finding("ML934", found, place, expected),))
        if missing := [one for one in markers if one not in written and one not in command.value]:
            return Result((Finding("ML934", f"TEMPLATE does not write {', '.join(missing)}", place, expected),))
        return self._compared(template, wanted, place)

    def _compared(self, template: GoTemplate, wanted: GoTemplate, place: Place) -> Result:
        fact = "TEMPLATE", "writes what that of the export writes"
        if template == wanted:
            return Result(facts=(fact,))
        template, wanted = (one.without_tests_of_empty_texts() for one in (template, wanted))
        if template == wanted:
            return Result(facts=((fact[0], f"{fact[1]}, but for empty texts (empty-text-space)"),))
        parts = [list(zip_longest(one.texts, one.actions, fillvalue="")) for one in (template, wanted)]
        differing = next(pair for pair in zip_longest(*parts, fillvalue=("", "")) if pair[0] != pair[1])
        found, expected = (shortened(f"{text}{{{{ {action} }}}}" if action else text) for text, action in differing)
        if template.actions == wanted.actions:
            return Result((Finding("ML934", f"TEMPLATE writes {found}", place, expected),))
        return Result(not_checked=f"TEMPLATE has {found} where that of the export has {expected}{_ASK}")

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
        """ML937: the parameters and messages leave prompts and greedy answers as they are."""
        findings: list[Finding] = []
        findings += self._length_findings()
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
        for command in self._modelfile.commands:
            if command.name == "parameter" and not _KNOWN.fullmatch(command.word):
                found = f"PARAMETER {shortened(command.word)} is none of Ollama's"
                findings.append(Finding("ML937", found, self._modelfile.place(command), "a parameter that it has"))
        for name, effect in (
            ("system", "each request without a system prompt gets it"),
            ("message", "it is put before each chat"),
        ):
            if (command := self._modelfile.last(name)) is not None and command.value:
                found = f"{name.upper()} is {shortened(command.value)}: {effect}"
                expected = f"no {name.upper()}, unless the model was trained with it"
                findings.append(Finding("ML937", found, self._modelfile.place(command), expected))
        return Result(tuple(findings))

    def _length_findings(self) -> Iterator[Finding]:
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
        limits = self._modelfile.parameters(_NUM_PREDICT)
        most = _number(limits[-1]) if limits else -1
        # Ollama takes zero and less for no limit
        if most is None or 0 < most < (value or math.inf):
            found = f"num_predict is {shortened(limits[-1].value)}: answers end after as many tokens, without a word"
            yield Finding("ML937", found, self._modelfile.place(limits[-1]), "no num_predict, or -1")

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


def _answers(oracle: Oracle) -> list[tuple[str, str]]:
    """Return the answers of the packaged rows: each text with the name of its row."""
    return [
        (name, str(one["content"]))
        for name, row in plain_rows(oracle).items()
        for one in row.messages
        if one["role"] == "assistant"
    ]
