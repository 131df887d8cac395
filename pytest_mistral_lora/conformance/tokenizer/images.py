"""How transformers turns images into tokens, compared with the image settings of Mistral's own tokenizer file.

transformers: models/pixtral/processing_pixtral.py and image_processing_pixtral.py. mistral-common: tokens/tokenizers/
image.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import short_json

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.chunks.chunk_type import ImageSizes

_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_INDEXES = ("image_token_index", "image_token_id")
"""The keys of `config.json` for the id at which the model puts an image: transformers reads both names."""
_DEFAULTS = {"patch_size": 16, "spatial_merge_size": 1}
"""What PixtralProcessor takes if a key is missing."""


def image_settings(target: Target) -> Result:
    """Judge the image settings of a processor's files, and the id of an image's token in `config.json`: ML242."""
    files = target.tokenizer.files
    processor, preprocessor = files.json(PROCESSOR_CONFIG), files.json(PREPROCESSOR_CONFIG)
    # transformers 5 saves the settings of the image processor within those of the processor
    nested = processor.get("image_processor")
    parts = {PREPROCESSOR_CONFIG: preprocessor, PROCESSOR_CONFIG: nested if isinstance(nested, dict) else {}}
    named = tuple(_image_token_findings(target))
    if not any("patch_size" in part or "size" in part for part in (processor, *parts.values())):
        return Result(named)  # a model of text alone, or a folder without its processor
    file = files.oracle_file
    sizes = None if file is None else target.oracle.image_sizes
    if file is None or sizes is None:
        reason = "no tekken.json" if file is None else f"no image settings in {file.name}"
        return Result(named, "" if named else f"{reason} to compare those of the processor with")
    found = [(PROCESSOR_CONFIG, *differs) for differs in _processor_differs(processor, sizes)]
    found += [(name, *differs) for name, part in parts.items() for differs in _image_processor_differs(part, sizes)]
    findings = (
        Finding("ML242", shown, files.place(name), f"{expected}, as in {file.name}") for name, shown, expected in found
    )
    return Result((*named, *findings))


def _image_token_findings(target: Target) -> Iterator[Finding]:
    """Yield ML242 if the model's configuration names another id for the token of an image than the tokenizer."""
    files = target.tokenizer.files
    config = files.json(MODEL_CONFIG)
    given = {key: config[key] for key in _INDEXES if config.get(key) is not None}
    if not given:
        return
    if files.oracle_file is not None:
        expected = target.oracle.control_ids.get(_TOKENS["image_token"])
    else:
        expected = target.tokenizer.fast.get_vocab().get(_TOKENS["image_token"])
    for key, value in given.items():
        if expected is not None and value != expected:
            wanted = f"{expected}, the id of {_TOKENS['image_token']}"
            yield Finding("ML242", f"{key} is {short_json(value)}", files.place(MODEL_CONFIG), wanted)


def _processor_differs(config: Mapping[str, Any], sizes: ImageSizes) -> Iterator[tuple[str, str]]:
    """Yield what is found and expected of each setting by which the processor writes the tokens of an image."""
    defaults = _DEFAULTS if config.get("processor_class") == "PixtralProcessor" else {}
    for key, expected in (("patch_size", sizes.patch), ("spatial_merge_size", sizes.merge)):
        value = config.get(key, defaults.get(key, expected))
        if value != expected:
            state = "" if key in config else "missing, and transformers takes "
            yield f"{key} is {state}{short_json(value)}", str(expected)
    for key, literal in _TOKENS.items():
        if config.get(key, literal) != literal:
            yield f"{key} is {short_json(config[key])}", repr(literal)


def _image_processor_differs(config: Mapping[str, Any], sizes: ImageSizes) -> Iterator[tuple[str, str]]:
    """Yield what is found and expected of each setting by which an image is scaled."""
    patch = config.get("patch_size", sizes.patch)
    sides = [*patch.values()] if isinstance(patch, dict) else [patch]
    # the processor gives it the side of a whole token in place of its own value
    if not any(all(side == right for side in sides) for right in (sizes.patch, sizes.patch * sizes.merge)):
        yield f"patch_size is {short_json(patch)}", str(sizes.patch)
    size = config.get("size", sizes.longest)
    longest = size.get("longest_edge") if isinstance(size, dict) else size
    if longest != sizes.longest:
        yield f"size is {short_json(size)}", f'{{"longest_edge": {sizes.longest}}}'
