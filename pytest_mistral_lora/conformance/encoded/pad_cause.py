"""A pad token that is EOS as the cause of masked labels: shown by the labels that another pad token would leave."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.conformance.encoded.comparison import EncodedLineComparison
from pytest_mistral_lora.conformance.encoded.template_cause import Cause
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import TrainerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import MistralLoraError

_ENCODE_AGAIN = (
    'Set `"pad_token": "<pad>"` in `tokenizer_config.json` if the vocabulary has it, else `"pad_token": "<unk>"`, '
    "and encode the rows again; if EOS is masked then, too, mask padding by position: "
    "`labels[attention_mask == 0] = -100`."
)


@dataclass
class PadCause(Cause):
    """A pad token that is EOS: a collator that masks padding by its id has masked each EOS.

    A line is explained if all its EOS are masked, and other tokens are not. It is then compared again with the labels
    of its EOS as mistral-common has them, so that a fault beside the masked EOS is found, too.
    """

    rule = "ML204"
    case = "labels"

    def restored(self, comparison: EncodedLineComparison) -> EncodedLineComparison | None:
        """Return the comparison of a line with the labels of its EOS; None if the pad token has not masked them.

        Args:
            comparison: The line with mistral-common's encoding.
        """
        line, eos = comparison.line, comparison.oracle.eos_id
        expected = [label for encoded in comparison.expected for label in encoded.labels or ()]
        whole = tuple(token for encoded in comparison.expected for token in encoded.input_ids)
        if self.finding is None or line.masks or not comparison.comparable or comparison.ids != whole:
            return None
        at_eos = {n for n, token in zip(comparison.padding.real, comparison.ids, strict=True) if token == eos}
        is_masked = all(line.labels[n] == IGNORE_INDEX for n in at_eos)
        if not is_masked or all(label == IGNORE_INDEX for label in comparison.labels):
            return None
        wanted = dict(zip(comparison.padding.real, expected, strict=True))
        labels = [wanted[n] if n in at_eos else label for n, label in enumerate(line.labels)]
        if tuple(labels) == tuple(line.labels):
            return None
        return replace(comparison, line=replace(line, labels=tuple(labels)))


def pad_cause_of(target: Target | None) -> PadCause | None:
    """Return the pad token of the tokenizer that rows of a target are padded with; None if it is no EOS."""
    from pytest_mistral_lora.conformance.tokenizer.ids import pad

    if isinstance(target, TrainerTarget):
        return PadCause(judge=lambda: target.pad_findings[0], is_reported=True) if target.pad_findings else None
    # a tokenizer that is converted from Mistral's own file never pads with EOS
    is_converted = target is None or target.checkpoint is None or not target.tokenizer.loads_as_it_is
    if target is None or (is_converted and not target.is_in_memory):
        return None
    found: list[Finding] = []
    with suppress(MistralLoraError):  # a check of the tokenizer reports it
        found = [replace(finding, fix=_ENCODE_AGAIN) for finding in pad(target) if finding.rule == "ML204"]
    return PadCause(judge=lambda: found[0]) if found else None
