"""Subject `tokenizer`: a checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, partial

from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.reading import in_utf8
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    NO_ORACLE,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.folder_contents import other_files
from pytest_mistral_lora.conformance.targets import NO_FILES, Target
from pytest_mistral_lora.conformance.tokenizer import folder as tokenizer_folder
from pytest_mistral_lora.conformance.tokenizer import ids as tokenizer_ids
from pytest_mistral_lora.conformance.tokenizer import template_traits
from pytest_mistral_lora.conformance.tokenizer.configurations import configurations_agree
from pytest_mistral_lora.conformance.tokenizer.folder import MISTRAL_COMMON
from pytest_mistral_lora.conformance.tokenizer.images import image_settings
from pytest_mistral_lora.conformance.tokenizer.template_traits import PLAIN, TemplateTraits
from pytest_mistral_lora.errors import TokenizerError

Judge = Callable[[Target], Iterator[Finding] | Result]

FILES: dict[str, Judge] = {
    "one-tokenizer": tokenizer_folder.one_tokenizer,
    "one-revision": tokenizer_folder.one_revision,
    "declarations-agree": tokenizer_folder.files_agree,
    "class": tokenizer_folder.tokenizer_class,
    "nothing-cut-or-padded": tokenizer_folder.nothing_cut_or_padded,
    "decoding": tokenizer_ids.decoding,
    "model-config": tokenizer_ids.model_config,
    "configurations": configurations_agree,
    "image-settings": image_settings,
    "template-places": tokenizer_folder.one_template,
    "has-template": tokenizer_folder.has_template,
}
"""Checks of a folder: its files among themselves."""

_OF_OBJECTS = ("decoding",)
"""The checks of `FILES` that a tokenizer in memory has, too."""
_OF_FOLDERS = ("backend", "other-files", *(case for case in FILES if case not in _OF_OBJECTS))
"""The checks of a folder that a tokenizer in memory does not have."""
_UNREAD = "template-beside-tekken"
"""The check of `TRAITS` that depends on the files beside the template."""

_NEEDS = {
    "declarations-agree": (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS),
    "class": (TOKENIZER_JSON, TOKENIZER_CONFIG),
    "nothing-cut-or-padded": (TOKENIZER_JSON,),
    "decoding": (TOKENIZER_JSON,),
    "model-config": (MODEL_CONFIG, GENERATION_CONFIG),
    "configurations": (MODEL_CONFIG,),
}
"""Files of which a check needs at least one; otherwise it would pass on nothing."""

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
    "template-drops-no-thought": template_traits.dropped_thoughts,
    "template-bos-eos": template_traits.rendered_ends,
    "template-prompt": template_traits.prompt_is_the_beginning,
    "template-encoded-again": template_traits.encoded_again,
    "template-beside-tekken": template_traits.unread_template,
    "template-thinking": template_traits.guessed_thinking,
}
"""Checks of the chat template with the tokenizer."""


def oracle(target: Target) -> Result:
    """Judge which Mistral tokenizer is a target's oracle: its own file, or a recognised or declared tokenizer."""
    tokenizer = target.tokenizer
    tokenizer.files.refuse_hazards()
    declared = tokenizer.files.oracle_file
    if declared is not None and declared == tokenizer.path:
        return Result(facts=(("template of", "mistral-common generates it, since a single file has none"),))
    if declared is not None:
        return Result()
    if not tokenizer.is_there:
        return Result(not_checked="there is no tokenizer: see the check `file`")
    found = tokenizer.recognition
    if found.oracle is not None:
        return Result(facts=(("oracle of", found.text),))
    if found.name == NO_ORACLE:
        return Result(not_checked=found.reason)
    rule, expected = ("ML230", "its own ids") if found.declared else ("ML229", "the vocabulary of a known tokenizer")
    return Result((Finding(rule, found.reason, tokenizer.place, expected),))


_CHANGES = (
    "conversations are encoded by mistral-common, and the chat template is not read; a row that ends with an answer is "
    "refused in its default mode; return_assistant_tokens_mask is ignored; a rendered text cannot be encoded again"
)


def loaded(target: Target) -> Result:
    """Name the backend of a folder with tekken.json, and its effects, in the facts."""
    files = target.tokenizer.files
    if TEKKEN not in files.names or not target.tokenizer.loads_as_it_is or files.json(TOKENIZER_CONFIG).get("auto_map"):
        return Result()
    files.refuse_hazards()
    import transformers

    # ask transformers instead of reading the files: the choice has a dozen conditions, which change between versions;
    # other checks report a folder that does not load
    name = ""
    with suppress(Exception), in_utf8(files.path) as named:
        load = transformers.AutoTokenizer.from_pretrained
        name = type(load(named, local_files_only=True, trust_remote_code=False)).__name__
    if name not in MISTRAL_COMMON:
        return Result()
    takes = f"AutoTokenizer takes {name} in transformers {transformers.__version__}"
    return Result(facts=(("backend of", f"{takes}: {_CHANGES}; mistral_format=False loads the other files"),))


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a target's tokenizer."""
    if target.is_in_memory:
        yield from _loaded_checks(target)
        return
    yield Check(target, "tokenizer", "file", partial(tokenizer_folder.file, target))
    folder = target.is_folder
    if target.path is not None:
        yield Check(target, "tokenizer", "oracle", partial(oracle, target))
    if folder:
        yield Check(target, "tokenizer", "backend", partial(loaded, target))
        yield Check(target, "tokenizer", "other-files", partial(_other_files, target))
    if target.loaded is not None and target.loaded.is_object:
        yield from _left_out(target, _OF_FOLDERS)
    for case, judge in {**(FILES if folder else {}), **IDS}.items():
        yield Check(target, "tokenizer", case, partial(_judge_files, target, case, judge))
    yield from _trait_checks(target)


def _loaded_checks(target: Target) -> Iterator[Check]:
    """Yield the checks of a tokenizer in memory; those of files are not made."""
    yield Check(target, "tokenizer", "oracle", partial(oracle, target))
    yield from _left_out(target, ("file", *_OF_FOLDERS, _UNREAD))
    for case, judge in {**{case: FILES[case] for case in _OF_OBJECTS}, **IDS}.items():
        yield Check(target, "tokenizer", case, partial(_judge_object, target, judge))
    yield from (check for check in _trait_checks(target) if check.case != _UNREAD)


def _left_out(target: Target, cases: Iterable[str]) -> Iterator[Check]:
    for case in cases:
        yield Check(target, "tokenizer", case, partial(Result, not_checked=NO_FILES))


def _judge_object(target: Target, judge: Judge) -> Result:
    found = judge(target)
    return found if isinstance(found, Result) else Result(tuple(found))


def _trait_checks(target: Target) -> Iterator[Check]:
    template = cache(partial(_traits_and_bounds, target))  # computed once for all checks
    for case, trait in TRAITS.items():
        yield Check(target, "tokenizer", case, partial(_judge_trait, template, trait))


def _other_files(target: Target) -> Result:
    """Name the files of a checkpoint that no check reads."""
    return other_files(target.tokenizer.path)


def _judge_files(target: Target, case: str, judge: Judge) -> Result:
    found = judge(target)
    if isinstance(found, Result):
        return found
    findings, needed = tuple(found), _NEEDS.get(case, ())
    is_judged = findings or not needed or not set(needed).isdisjoint(target.tokenizer.files.names)
    return Result(findings, "" if is_judged else f"there is no {' or '.join(needed)}")


def _traits_and_bounds(target: Target) -> tuple[TemplateTraits, tuple[Finding, ...]] | Result:
    """Return the traits of a target's template, and the findings that rule out its use.

    Returns:
        Without a template, a result with the reason.
    """
    _ = target.tokenizer.fast  # a tokenizer that does not load is an error of the check, not a missing template
    try:
        traits = TemplateTraits(target)
    except TokenizerError as error:
        return Result(not_checked=str(error))
    return traits, tuple(template_traits.bounds(traits))


def _judge_trait(
    template: Callable[[], tuple[TemplateTraits, tuple[Finding, ...]] | Result],
    judge: Callable[[TemplateTraits], Iterator[Finding]],
) -> Result:
    found = template()
    if isinstance(found, Result):
        return found
    traits, bounds = found
    if judge is template_traits.bounds:
        return Result(bounds)
    if bounds and any(name not in traits.rendered.texts for name in PLAIN):
        return Result(not_checked=f"{bounds[0].rule}: {bounds[0].found}")
    return Result(tuple(judge(traits)))
