"""Subject `tokenizer`: a checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import RecipeTarget, Target
from pytest_mistral_lora.conformance.tokenizer import backend, recognised, template_traits
from pytest_mistral_lora.conformance.tokenizer import folder as tokenizer_folder
from pytest_mistral_lora.conformance.tokenizer import ids as tokenizer_ids
from pytest_mistral_lora.conformance.tokenizer.template_traits import TemplateTraits

Judge = Callable[[Target], Iterator[Finding]]

FILES: dict[str, Judge] = {
    "one-tokenizer": tokenizer_folder.one_tokenizer,
    "one-revision": tokenizer_folder.one_revision,
    "declarations-agree": tokenizer_folder.files_agree,
    "class": tokenizer_folder.tokenizer_class,
    "nothing-cut-or-padded": tokenizer_folder.nothing_cut_or_padded,
    "model-config": tokenizer_ids.model_config,
    "template-places": tokenizer_folder.one_template,
    "has-template": tokenizer_folder.has_template,
}
"""Checks of a folder: its files among themselves."""

IDS: dict[str, Judge] = {
    "control-tokens": tokenizer_ids.control_tokens,
    "bos-eos-unk": tokenizer_ids.named_tokens,
    "pad-is-not-eos": tokenizer_ids.pad,
    "vocabulary": tokenizer_ids.vocabulary,
    "text-ids": tokenizer_ids.text_ids,
    "save-and-load": tokenizer_ids.save_and_load,
}
"""Checks of the tokenizer that transformers loads."""

TRAITS: dict[str, Callable[[TemplateTraits], Iterator[Finding]]] = {
    "template-bounds": template_traits.bounds,
    "template-clock-and-defaults": template_traits.clock_and_defaults,
    "template-drops-nothing": template_traits.dropped_texts,
    "template-bos-eos": recognised.rendered_ends,
    "template-prompt": recognised.prompt_is_the_beginning,
    "template-encoded-again": template_traits.encoded_again,
    "template-beside-tekken": backend.unread_template,
    "template-thinking": backend.guessed_thinking,
}
"""Checks of the chat template with the tokenizer."""


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a target's tokenizer."""
    yield Check(target, "tokenizer", "file", partial(tokenizer_folder.file, target))
    folder = isinstance(target, RecipeTarget) or (target.path is not None and target.path.is_dir())
    if target.path is not None:
        yield Check(target, "tokenizer", "oracle", partial(recognised.oracle, target))
    if folder:
        yield Check(target, "tokenizer", "backend", partial(backend.loaded, target))
    for case, judge in {**(FILES if folder else {}), **IDS}.items():
        yield Check(target, "tokenizer", case, partial(_judge_target, target, judge))
    template = _TemplateOnce(target)
    for case, trait in TRAITS.items():
        yield Check(target, "tokenizer", case, partial(_judge_trait, template, trait))


def _judge_target(target: Target, judge: Judge) -> Result:
    return Result(tuple(judge(target)))


class _TemplateOnce:
    """The traits of a target's template, computed once for all checks."""

    def __init__(self, target: Target) -> None:
        self._target = target

    @cached_property
    def traits(self) -> TemplateTraits | Result:
        """The traits; a result with the reason if there is no template."""
        return template_traits.of_target(self._target)

    @cached_property
    def bounds(self) -> tuple[Finding, ...]:
        """The findings for which the template must not, or cannot, be used."""
        return () if isinstance(self.traits, Result) else tuple(template_traits.bounds(self.traits))


def _judge_trait(template: _TemplateOnce, judge: Callable[[TemplateTraits], Iterator[Finding]]) -> Result:
    traits = template.traits
    if isinstance(traits, Result):
        return traits
    if judge is template_traits.bounds:
        return Result(template.bounds)
    if template.bounds and traits.unusable:
        return Result(not_checked=f"{template.bounds[0].rule}: {template.bounds[0].found}")
    return Result(tuple(judge(traits)))
