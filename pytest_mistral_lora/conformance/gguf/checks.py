"""The checks of a GGUF file: its tokenizer, weights and adapter, compared with their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

from pytest_mistral_lora.chat.rows import imported
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result
from pytest_mistral_lora.conformance.gguf.tokenizer import default_end, template_findings, tokenizer_findings
from pytest_mistral_lora.conformance.model_targets import GgufTarget, ModelFileTarget
from pytest_mistral_lora.conformance.program_faults import findings_of_programs
from pytest_mistral_lora.errors import InputError, MistralLoraError, NoOracleError
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.places import Place

_OWN_CASES = ("file", "tokenizer", "template", "architecture", "weights", "adapter-tensors")
_OF_MODEL_FILES = ("model-file", "served-template", "stop-strings", "parameters")
"""The checks of a file by which a server makes a model."""
_NO_MODEL = "no model folder to compare with: name it with --mistral-base"


def checks(target: GgufTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a GGUF file, or of a file that names one; if it is unreadable, only the one that says so."""
    if isinstance(target, ModelFileTarget):
        from pytest_mistral_lora.serving.servers import SERVERS

        for server in SERVERS.of_this_package():
            of_server = imported(server.model_file_checks)(target) if server.model_file_checks else {}
            for case, judge in of_server.items():
                yield Check(target, "gguf", case, judge)
        return
    try:
        judged = GgufChecks(target)
    except InputError as error:
        finding = Finding("ML918", error.found, error.place, error.expected)
        yield Check(target, "gguf", "file", partial(Result, (finding,)))
        return
    cases: dict[str, Callable[[], Result]] = {"file": judged.file}
    if target.content.is_adapter:
        cases |= {"adapter-tensors": judged.adapter_tensors}
    else:
        cases |= {"tokenizer": judged.tokenizer, "template": judged.template}
        # the rules of programs that read such files
        cases |= {case: partial(judged.read_by, case) for case in judged.cases_of_readers}
        cases |= {"architecture": judged.architecture, "weights": judged.weights}
    for case, judge in cases.items():
        yield Check(target, "gguf", case, judge)


class GgufChecks:
    """The checks of a GGUF file: each method is a check, and they share the file."""

    def __init__(self, target: GgufTarget) -> None:
        """Read the file.

        Raises:
            InputError: If the file cannot be read.
        """
        self._target, self._gguf = target, target.content
        self._place = Place.of(target.file)

    def file(self) -> Result:
        """ML918: the file can be read, and holds a model or an adapter."""
        kind = "adapter" if self._gguf.is_adapter else "model"
        if not self._gguf.tensors and self._gguf.parts < 2:
            return Result((Finding("ML918", "holds no tensor", self._place, "the tensors of a model or an adapter"),))
        return Result(facts=(("gguf", f"{kind}, {self._gguf.architecture}, {len(self._gguf.tensors)} tensors"),))

    def tokenizer(self) -> Result:
        """ML912: the tokenizer makes mistral-common's ids; and the rules of readers about it."""
        try:
            judge = self._target.tokenizer
        except NoOracleError as error:
            # every other check that needs it reports this reason
            return Result((Finding("ML912", error.found, error.place, error.expected, fix=error.next_step),))
        facts = [("oracle of", f"{judge.path.name} ({judge.oracle.version})")]
        if end := default_end(self._gguf, judge.oracle):
            facts.append(("end of answers of", end))
        found = (*tokenizer_findings(self._gguf, judge.oracle), *self.read_by("tokenizer").findings)
        return Result(found, facts=tuple(facts))

    def template(self) -> Result:
        """ML913: the chat template renders the user's text as mistral-common does."""
        return Result(tuple(template_findings(self._gguf, self._target.tokenizer)))

    @cached_property
    def _of_readers(self) -> list[Finding]:
        """What the known readers of such files do wrong with this one."""
        from pytest_mistral_lora.serving.servers import SERVERS

        oracle, servers = self._target.tokenizer.oracle, SERVERS.of_this_package()
        return list(findings_of_programs(fault for one in servers for fault in one.gguf_faults(self._gguf, oracle)))

    @property
    def cases_of_readers(self) -> list[str]:
        """The checks that only rules of readers report to."""
        return list(
            dict.fromkeys(rule.case for rule in RULES.of("gguf") if rule.case not in (*_OWN_CASES, *_OF_MODEL_FILES))
        )

    def read_by(self, case: str) -> Result:
        """The rules of readers that report to a check."""
        return Result(tuple(finding for finding in self._of_readers if RULES[finding.rule].case == case))

    def architecture(self) -> Result:
        """ML917: the sizes and settings of the architecture are those of the checkpoint."""
        from pytest_mistral_lora.conformance.gguf.weights import architecture_findings

        if self._target.model is None:
            return Result(not_checked=_NO_MODEL)
        return Result(tuple(architecture_findings(self._gguf, self._target.model)))

    def weights(self) -> Result:
        """ML916: the weights are the checkpoint's, within the error of the quantisation."""
        from pytest_mistral_lora.conformance.gguf.weights import ComparedWeights

        if self._target.model is None:
            return Result(not_checked=_NO_MODEL)
        if self._gguf.parts > 1:
            return Result(not_checked="one of several files: join them with llama-gguf-split --merge")
        require_extra("gguf")
        try:
            compared = ComparedWeights(self._gguf, self._target.model, self._target.base)
            found = tuple(compared.findings())
            return Result(found, facts=(("weights of", compared.text),))
        except MistralLoraError as error:
            return Result(not_checked=str(error))

    def adapter_tensors(self) -> Result:
        """ML914: the tensors and the scale are those of the safetensors file."""
        from pytest_mistral_lora.conformance.gguf.weights import adapter_findings

        if self._target.adapter is None:
            return Result(not_checked="no adapter folder to compare with: name it with --mistral-adapter")
        require_extra("gguf")
        try:
            return Result(tuple(adapter_findings(self._gguf, self._target.adapter)))
        except MistralLoraError as error:
            return Result(not_checked=str(error))
