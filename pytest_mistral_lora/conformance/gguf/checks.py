"""The checks of a GGUF file: its tokenizer, weights and adapter, compared with their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.gguf.tokenizer import MODELS, stop_findings, template_findings, tokenizer_findings
from pytest_mistral_lora.conformance.model_targets import GgufTarget
from pytest_mistral_lora.errors import InputError, MistralLoraError, NoOracleError
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

_NO_MODEL = "no model folder to compare with: name it with --mistral-base"


def checks(target: GgufTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a GGUF file; for an unreadable file, only the check that reports it."""
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
        cases |= {"tokenizer": judged.tokenizer, "template": judged.template, "marks": judged.marks}
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
        """ML912: the tokenizer makes mistral-common's ids; ML920: answers end at EOS alone."""
        try:
            judge = self._target.tokenizer
        except NoOracleError as error:
            # every other check that needs it reports this reason
            return Result((Finding("ML912", error.found, error.place, error.expected, fix=error.next_step),))
        facts = (("oracle of", f"{judge.path.name} ({judge.oracle.version})"),)
        found = (*tokenizer_findings(self._gguf, judge.oracle), *stop_findings(self._gguf, judge.oracle))
        return Result(found, facts=facts)

    def template(self) -> Result:
        """ML913: the chat template renders the user's text as mistral-common does."""
        return Result(tuple(template_findings(self._gguf, self._target.tokenizer)))

    def marks(self) -> Result:
        """ML915: the splitter of llama.cpp reads combining marks as the tokenizer does."""
        if self._gguf.setting("model") != MODELS["tekken"]:
            return Result()
        # its pattern ends a word at each combining mark
        found = "Hindi, Tamil, Thai and other text with combining marks gets more ids than in training"
        return Result((Finding("ML915", found, self._place),))

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
            compared = ComparedWeights(self._gguf, self._target.model, self._target.base_folder)
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
            folder = AdapterFolder(self._target.adapter, self._target.base_folder)
            return Result(tuple(adapter_findings(self._gguf, folder)))
        except MistralLoraError as error:
            return Result(not_checked=str(error))
