"""The base that an adapter's configuration names, compared with the base that it is judged on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import MistralLoraError, short_json
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.base_location import RecordedBase, locate_base

_OTHERS = "gemma|phi-?[34]|falcon|gpt-|granite|olmo|deepseek"
"""Words of the names of models of other classes than `TEXT_MODELS`."""

_VOCABULARIES = (
    (r"mistral-7b(-instruct)?-v0\.[12]\b", 32000),
    (r"mixtral-8x7b", 32000),
    (r"mistral-7b(-instruct)?-v0\.3\b", 32768),
    (r"codestral-22b|mistral-large(-instruct)?-24", 32768),
    (r"nemo|ministral|mistral-small|devstral|magistral|pixtral", 131072),
)
"""Names of published models, each with its number of ids."""

_ADDED = 512
"""The most tokens by which a fine-tune enlarges a vocabulary."""

_GIVE = "the base that the adapter was trained on: name it with --base"


def named_base_findings(folder: AdapterFolder) -> Iterator[Finding]:
    """Yield ML429 if the base at hand is not the one that the configuration names.

    The named base proves it if it is on this machine: its configuration computes something else. A name alone may be
    that of a mirror or of an old folder, so that it is no proof. With a manifest, its subject compares the two.
    """
    name, base = folder.config.get("base_model_name_or_path"), folder.given_base
    if base is None or not isinstance(name, str) or len(name) > 4096 or folder.valid_manifest is not None:
        return
    place = Place.of(folder.config_file)
    try:
        named = locate_base(RecordedBase(name, folder.recorded_base.revision), folder.path).folder
        if named is not None:
            yield from _compared(named, base, place)
            return
    except (MistralLoraError, OSError):
        pass  # what cannot be read proves nothing: its name is left
    yield from _by_name(name, base, place)


def _compared(named: BaseFolder, base: BaseFolder, place: Place) -> Iterator[Finding]:
    if named.path.resolve() == base.path.resolve():
        return
    recorded, now = named.canonical_config, base.canonical_config
    differs = [key for key, value in recorded.items() if now.get(key) != value]
    if differs:
        key = differs[0]
        found = f"names {named}, whose {key} is {short_json(recorded[key])}, and that of {base} is "
        yield Finding("ML429", found + short_json(now.get(key)), place, _GIVE, severity="error")


def _by_name(name: str, base: BaseFolder, place: Place) -> Iterator[Finding]:
    last = re.split(r"[/\\]", name.lower().rstrip("/\\"))[-1]
    try:
        kind, size = str(base.facts.text.get("model_type")), base.vocab_size
    except MistralLoraError:
        return  # other checks report a base that cannot be read
    types = {model.model_type for model in TEXT_MODELS.values() if re.search(model.named, last)}
    # a later class of a family has a type that begins like it
    if (types or re.search(_OTHERS, last)) and not any(map(kind.startswith, types)):
        yield Finding("ML429", f"names {name!r}, and {base} is a model of type {kind}", place, _GIVE)
        return
    expected = next((count for pattern, count in _VOCABULARIES if re.search(pattern, last)), None)
    if expected is not None and not expected <= size <= expected + _ADDED:
        found = f"names {name!r}, which has {expected:,} ids, and {base} has {size:,}"
        yield Finding("ML429", found, place, _GIVE)
