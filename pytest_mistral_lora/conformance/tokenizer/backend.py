"""The backend that AutoTokenizer of transformers takes for a folder, and the parts of the folder that it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pytest_mistral_lora.chat.templates.generation_blocks import has_generation
from pytest_mistral_lora.checkpoint.tokenizer_folder import TEKKEN, TOKENIZER_CONFIG, loaded_place
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.template_traits import TemplateTraits

MISTRAL_COMMON = ("MistralCommonBackend", "MistralCommonTokenizer")
"""The classes of transformers that hand a conversation to mistral-common, and do not read the chat template."""

_CHANGES = (
    "conversations are encoded by mistral-common, and the chat template is not read; a row that ends with an answer is "
    "refused in its default mode; return_assistant_tokens_mask is ignored; a rendered text cannot be encoded again"
)
_AVOID = "mistral_format=False loads the other files"


def loaded(target: Target) -> Result:
    """Name the backend of a folder with tekken.json in the facts, with all that it changes."""
    files = target.tokenizer.files
    if TEKKEN not in files.names or not target.tokenizer.loads_as_it_is or files.json(TOKENIZER_CONFIG).get("auto_map"):
        return Result()
    files.refuse_hazards()
    name = taken_class(files.path)
    if name not in MISTRAL_COMMON:
        return Result()
    return Result(
        facts=(("backend of", f"AutoTokenizer takes {name} in transformers {_version()}: {_CHANGES}; {_AVOID}"),)
    )


def taken_class(folder: Path) -> str:
    """Return the name of the class that AutoTokenizer makes of a folder; empty if it cannot load it."""
    from transformers import AutoTokenizer

    # asked, and not derived from the files: the choice has a dozen conditions, which change between versions; a folder
    # that does not load is reported by other checks
    with suppress(Exception):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return type(tokenizer).__name__
    return ""


def unread_template(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML235 for a template of another layout beside tekken.json, ML236 for one whose blocks nobody reads."""
    files = traits.tokenizer.files
    if TEKKEN not in files.names or not traits.tokenizer.loads_as_it_is:
        return
    place = str(files.file(TEKKEN))
    question = next(iter(traits.rendered.texts.values()), "")
    if "[INST]" not in question:
        found = f"{loaded_place(files)} renders {question[:60]!r}; beside {TEKKEN}, {_who()} [INST] in its place"
        yield Finding("ML235", found, place, f"no {TEKKEN} beside a template of another layout")
    elif has_generation(traits.template.source):
        yield Finding("ML236", f"{loaded_place(files)} has generation blocks; beside {TEKKEN}, {_who()} no mask", place)


def guessed_thinking(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML237 for a template of v11 that writes thinking as text in <think>: no such file shows whether it may."""
    oracle = traits.oracle
    if oracle is not None and oracle.version == "v11" and "<think>" in traits.template.source:
        found = (
            "the chat template writes thinking as <think> text, and no tokenizer of v11 shows whether its model thinks"
        )
        yield traits.finding("ML237", found, "the template of a model that thinks in this way")


def _who() -> str:
    from packaging.version import Version

    number = _version()
    known = Version(number) >= Version("5.15")
    return (
        f"AutoTokenizer of transformers {number if known else '5.15 and later'} takes MistralCommonBackend, which gives"
    )


def _version() -> str:
    import transformers

    return str(transformers.__version__)
