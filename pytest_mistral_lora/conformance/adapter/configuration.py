"""`adapter_config.json`, and the layers of the tensors: sound, as named, of the base's class, and served."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from pytest_mistral_lora.checkpoint.architectures import (
    ALL,
    TEXT_MODELS,
    Architecture,
    architecture_of,
)
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter.layout import AdapterLayout
from pytest_mistral_lora.conformance.adapter.weights import TOWER, TensorSummary
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError, PinError, and_more, short_json
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import key_faults
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

_PIN = "a full commit: 40 lower-case hex digits"


def configuration_findings(folder: AdapterFolder) -> Iterator[Finding]:
    """Yield the keys of a configuration that are missing, not supported, or have a value that LoRA cannot have."""
    for fault in key_faults(folder.config):
        rule = "ML408" if fault.supported else "ML422"
        yield Finding(rule, fault.found, Place.of(folder.config_file), fault.expected)


def target_findings(
    folder: AdapterFolder,
    modules: Sequence[str],
    linear: Iterable[str],
    unmatched: Iterable[tuple[str, str]],
    converted: Collection[str],
) -> Iterator[Finding]:
    """Yield each name and pattern of a configuration that matches no module: PEFT silently accepts them.

    Args:
        folder: The adapter.
        modules: Dotted names of every module of the base.
        linear: The modules that LoRA can adapt.
        unmatched: Key and pattern of each regular expression that matches no module.
        converted: Names of `target_modules` that PEFT replaces by others when it loads the adapter.
    """
    config, place = folder.config, Place.of(folder.config_file)
    targets, have = config.get("target_modules"), sorted({name.rpartition(".")[2] for name in linear})
    # as PEFT matches: a target is whole parts of a name, a saved module is any end of a name
    for key, names, mark in (("target_modules", targets, "."), ("modules_to_save", config.get("modules_to_save"), "")):
        for name in names if isinstance(names, list) else []:
            if name not in converted and not any(f"{mark}{module}".endswith(f"{mark}{name}") for module in modules):
                yield Finding("ML409", f"{key} has {name!r}, which matches nothing", place, ", ".join(have))
    layers = config.get("layers_to_transform")
    # a model with images has two lists of layers
    lists = Counter(parent for name in modules if (parent := name.rpartition(".")[0]).endswith("layers"))
    count = max(lists.values(), default=0)
    for index in layers if isinstance(layers, list) else [layers]:
        if index is not None and not 0 <= index < count:
            yield Finding("ML409", f"layers_to_transform has {index}", place, f"one of {count} layers")
    for key, pattern in unmatched:
        yield Finding("ML409", f"{key} has {pattern!r}, which matches nothing", place, "a pattern of its layers")


def base_findings(folder: AdapterFolder, pinned: bool) -> Iterator[Finding]:
    """Yield the faults in the name and the revision of the base.

    Args:
        folder: The adapter.
        pinned: Whether the manifest has a commit of the base, or the hash of its weights.
    """
    from pytest_mistral_lora.checkpoint.pins import check_revision

    config, place = folder.config, Place.of(folder.config_file)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name.strip():
        yield Finding(
            "ML410", f"base_model_name_or_path is {short_json(name)}", place, "the base that it was trained on"
        )
    if revision is not None:
        if not isinstance(revision, str) or len(revision) > 100:
            yield Finding("ML410", f"revision {short_json(revision)} is not a pin", place, _PIN)
            return
        try:
            check_revision(revision)
        except PinError as error:
            yield Finding("ML410", error.found, place, _PIN)
    elif not pinned:
        expected = "the commit of the base, or a manifest with the hash of its weights"
        yield Finding("ML411", f"the revision of {short_json(name)} is not recorded", place, expected)


LARGEST_SCALE = 32
"""The largest scale with which adapters are trained: `lora_alpha` 32 at rank 1."""


def scale_findings(folder: AdapterFolder, layout: AdapterLayout) -> Iterator[Finding]:
    """Yield a finding if the change of a layer is multiplied by more than anybody trains with."""
    high = {layer: scale for layer, scale in layout.scalings.items() if scale > LARGEST_SCALE}
    if not high:
        return
    layer, scale = max(high.items(), key=lambda item: item[1])
    found = f"the change of {layer}{and_more(1, len(high))} is multiplied by {scale:g}"
    yield Finding(
        "ML428", found, Place.of(folder.config_file), f"{LARGEST_SCALE} at most: lora_alpha / r as in training"
    )


_ROUTER = re.compile(r"\.(?:mlp|block_sparse_moe)\.(?:gate|router)(?=\.)")
_EXPERTS = re.compile(r"\.(?:mlp|block_sparse_moe)\.(?:shared_)?experts?(?=\.)")
_LAYER = re.compile(r"\.layers\.\d+\.(?P<block>self_attn|mlp)\.(?P<kind>\w+)\.(?:lora_|base_layer\.)")
# (?!…) and (?<!…), up to one group deep: they name layers that are not adapted
_NOT_THESE = re.compile(r"\(\?<?!(?:[^()]|\([^()]*\))*\)")
_KINDS = tuple(dict.fromkeys(kind for model in TEXT_MODELS.values() for kind in (*model.attention, *model.mlp)))


def placement_findings(folder: AdapterFolder, summaries: Mapping[str, TensorSummary]) -> Iterator[Finding]:
    """Yield the tensors on layers outside the text model, and the layers that the pattern names but that have none."""
    names, place = sorted(folder.tensors), Place.of(folder.tensors_file)
    tower = [name for name in names if TOWER.search(name)]
    still = [name for name in tower if ".lora_B" in name and summaries[name].largest == 0]
    if still:
        found = f"{len(tower)} of {len(names)} tensors are on the model of images, and {len(still)} of them never moved"
        expected = r"layers of the text alone: model\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
        yield Finding("ML450", f"{found}; the first is {still[0]}", place, expected)
    config = folder.config
    pattern = None if config.get("exclude_modules") else config.get("target_modules")
    yield from layer_findings(names, pattern, place, Place.of(folder.config_file))


def layer_findings(names: Sequence[str], pattern: object, place: Place, config_place: Place) -> Iterator[Finding]:
    """Yield the kinds of layer that a pattern names and that have no adapter, and adapters on router and experts.

    Args:
        names: The names of the adapter's tensors, in order.
        pattern: `target_modules`. A list is not judged: the check `configuration` compares its names with the base.
        place: The place of the tensors.
        config_place: The place of the configuration.
    """
    if isinstance(pattern, str):
        words = re.findall(r"[A-Za-z]\w*", re.sub(r"\\[A-Za-z]", " ", _NOT_THESE.sub(" ", pattern)))
        stems = words if "_proj" in pattern else []
        targeted = [kind for kind in _KINDS if kind in words or kind.removesuffix("_proj") in stems]
        moved = {match["kind"] for match in map(_LAYER.search, names) if match}
        missing = [kind for kind in targeted if kind not in moved]
        adapted = [kind for kind in _KINDS if kind in moved]
        if missing and adapted:
            found = f"target_modules names {', '.join(missing)}, and {', '.join(adapted)} alone is adapted"
            yield Finding("ML451", found, config_place, "a layer of each kind that it names")
    for rule, sign, part in (("ML452", _ROUTER, "the router"), ("ML453", _EXPERTS, "the experts")):
        found_names = [name for name in names if sign.search(name)]
        if found_names:
            found = f"{part} of the model changed: {found_names[0]}{and_more(1, len(found_names))}"
            yield Finding(rule, found, place, "the attention alone")


def class_findings(folder: AdapterFolder, base: BaseFolder) -> Iterator[Finding]:
    """Yield a finding if the adapter was made for a base of another class, by its names or by the class it records."""
    try:
        architecture = architecture_of(base.config)
    except ValueError:
        return  # an unknown class: names and shapes are not checked
    place, expected = Place.of(folder.tensors_file), f"an adapter of a {architecture.title}, as {base} is one"
    for name in sorted(folder.tensors):
        if reason := _foreign(name, architecture):
            yield Finding("ML454", f"{name}: {reason}", place, expected)
            return
    recorded = folder.config.get("auto_mapping")
    made_for = recorded.get("base_model_class") if isinstance(recorded, dict) else None
    if made_for in ALL and made_for != architecture.name:
        found = f"auto_mapping has the class {made_for}, which the adapter was trained on"
        yield Finding("ML454", found, Place.of(folder.config_file), expected)


def _foreign(name: str, architecture: Architecture) -> str:
    """Return why no layer of a class can have a tensor of this name; empty if a layer can."""
    text = architecture.text
    if TOWER.search(name):
        return "" if architecture.is_wrapped else "the base has no model of images"
    if _ROUTER.search(name) or _EXPERTS.search(name):
        return f"{text.name} has no experts" if text.mlp else ""
    match = _LAYER.search(name)
    if match is None or match["kind"] not in _KINDS:
        return ""
    kind, block = match["kind"], match["block"]
    if block == "self_attn" and kind not in text.attention:
        return f"{text.name} has no {kind}: its attention is {', '.join(text.attention)}"
    # the first layers of a model with experts may have a plain MLP
    if block == "mlp" and text.model_type == "mixtral":
        return f"{text.name} has no {kind}: experts are in its place"
    return ""


_TEXT_ALONE = re.compile(r"^base_model\.model\.(?:model\.)?layers\.\d+\.")


def refusal_findings(folder: AdapterFolder, layout: AdapterLayout) -> Iterator[Finding]:
    """Yield each setting with which a known server does not load an adapter, or applies it differently from PEFT."""
    from pytest_mistral_lora.conformance.program_faults import findings_of_programs
    from pytest_mistral_lora.serving.servers import SERVERS

    servers = SERVERS.of_this_package()
    yield from findings_of_programs(fault for one in servers for fault in one.adapter_faults(folder, layout.scalings))


def combined_facts(folder: AdapterFolder) -> tuple[tuple[str, str], ...]:
    """Return the scale of an adapter whose configuration is one that PEFT gives a sum of rsLoRA adapters.

    An adapter that was trained so has the same configuration: this is no finding.
    """
    config = folder.config
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    is_like_combined = config["r"] == config["lora_alpha"] > 1 and not has_patterns and not folder.has_manifest
    if not (config.get("use_rslora") and is_like_combined):
        return ()
    from pytest_mistral_lora.programs.facts import find_fact

    known = find_fact("combined-rslora")
    of_sums = "" if known is None else f"; if it is a sum of adapters: {known.symptom}. Change: {known.way_out}"
    return (("scale of", f"√{config['r']}{of_sums}"),)


def dropped_findings(folder: AdapterFolder, base: BaseFolder) -> Iterator[Finding]:
    """Yield a finding if the base is a model with images, and the tensors have the names of a text model."""
    is_wrapped = base.facts.is_wrapped
    try:
        tensors = folder.tensors
    except InputError:
        return
    names = [name for name in sorted(tensors) if _TEXT_ALONE.match(name)]
    if names and is_wrapped:
        found = f"{names[0]}{and_more(1, len(names))}: the layers of {base} are below language_model"
        right = names[0].replace("base_model.model.model.", "base_model.model.").replace(
            "base_model.model.", "base_model.model.model.language_model."
        )  # fmt: skip
        yield Finding("ML425", found, Place.of(folder.tensors_file), right)
