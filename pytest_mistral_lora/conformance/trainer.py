"""The checks of a trainer in this process before its first step: its model, its tokenizer and its template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pytest_mistral_lora.checkpoint.loaded_tokenizer import text_tokenizer
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG
from pytest_mistral_lora.conformance.adapter.configuration import layer_findings
from pytest_mistral_lora.conformance.adapter.weights import TOWER
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.loaded_model import as_configured, as_stored, new_rows
from pytest_mistral_lora.conformance.model_targets import MODEL_PLACE, TOKENIZER_PLACE, TrainerTarget, WatchedTarget
from pytest_mistral_lora.conformance.tokenizer import ids as tokenizer_ids
from pytest_mistral_lora.errors import and_more

_OF_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_delta|token_adapter)\.")
_NO_ADAPTER = "the model has no LoRA adapter"


def checks(target: TrainerTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a trainer's tokenizer, of its template, and of the layers that it trains."""
    yield Check(target, "tokenizer", "oracle", partial(_oracle, target))
    yield Check(target, "tokenizer", "bos-eos-unk", partial(_named_tokens, target))
    yield Check(target, "tokenizer", "model-config", partial(_model_config, target))
    yield Check(target, "train", "loaded-as-configured", partial(as_configured, target))
    yield Check(target, "train", "loaded-as-stored", partial(as_stored, target))
    yield Check(target, "train", "new-rows", partial(new_rows, target))
    yield Check(target, "adapter", "template-of-base", partial(_template, target))
    yield Check(target, "adapter", "placement", partial(_placement, target))
    yield Check(target, "train", "frozen-adapter-is-refused", partial(_frozen, target))
    yield Check(target, "train", "every-layer-moved", partial(_every_layer, target))
    yield Check(target, "train", "only-lora-changed", partial(_only_lora, target))
    for case, reason in target.left_out.items():
        yield Check(target, "encoded", case, partial(Result, not_checked=reason))


def watched_checks(target: WatchedTarget, settings: Settings) -> Iterator[Check]:
    """Yield a check for each result of what was watched."""
    for (subject, case), result in target.results.items():
        yield Check(target, subject, case, partial(_as_watched, result))


def _as_watched(result: Result) -> Result:
    return result


def _oracle(target: TrainerTarget) -> Result:
    if target.known.oracle is not None:
        return Result(facts=(("oracle of", target.known.text),))
    step = 'Name it: guard(trainer, tokenizer="spm-v3"), or give a checkpoint folder or a tokenizer file.'
    expected = "the vocabulary of a known tokenizer"
    return Result((Finding("ML229", target.known.reason, TOKENIZER_PLACE, expected, fix=step),))


def _named_tokens(target: TrainerTarget) -> Result:
    if text_tokenizer(target.processing_class) is None:
        return Result(not_checked="the trainer has no processing_class with a tokenizer")
    return Result(tuple(tokenizer_ids.named_tokens(target)))


def _model_config(target: TrainerTarget) -> Result:
    """Judge the ids in the model's configurations, and the rows of its embeddings.

    A pad token that is an EOS is a fault if the collator masks the labels by the id of the padding. If the batches have
    labels at EOS, it does not.
    """
    if MODEL_CONFIG not in target.tokenizer.files.names:
        reason = "the model has no configuration of transformers"
        return Result((*target.pad_findings, *_embeddings(target)), not_checked=reason)
    found = list(tokenizer_ids.model_config(target))
    if target.trains_eos:
        found = [finding for finding in found if finding.rule != "ML204"]
    if target.pad_findings:
        # transformers writes the id of the tokenizer's pad token into the model's configurations
        found = [replace(finding, effect_of="ML204") if finding.rule == "ML204" else finding for finding in found]
    if embeddings := list(_embeddings(target)):
        # the `vocab_size` of the configuration is that of the embeddings
        found = [finding for finding in found if finding.rule != "ML215"]
    return Result((*target.pad_findings, *found, *embeddings))


def _embeddings(target: TrainerTarget) -> Iterator[Finding]:
    tokens = target.oracle.vocab_size
    rows: dict[int, list[str]] = {}
    for name, module in (
        ("input", target.model.get_input_embeddings()),
        ("output", target.model.get_output_embeddings()),
    ):
        count = next(iter(embedding_shape(module)), 0)
        if 0 < count < tokens:
            rows.setdefault(count, []).append(name)
    for count, names in rows.items():
        beyond = [token for token in target.ids if token >= count]
        without = f", and the batches have the id {min(beyond)}{and_more(1, len(beyond))}" if beyond else ""
        sides = " and ".join(names)
        found = f"the {sides} embeddings have {count:,} rows, and the tokenizer has {tokens:,} tokens{without}"
        yield Finding("ML215", found, MODEL_PLACE, "a row for each token")


def embedding_shape(module: Any) -> Sequence[int]:
    """Return the rows and columns of an embedding or a head; nothing if they cannot be told here."""
    weight = getattr(module, "weight", None)
    # a weight that DeepSpeed shards has its whole shape beside it; one of FSDP may be empty here
    shape: Sequence[int] = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    return shape if len(shape) == 2 else ()


def _template(target: TrainerTarget) -> Result:
    if target.template_text is None:
        return Result(not_checked="the trainer's tokenizer has no chat template")
    found = target.template_findings
    # the fixes of the guard are those of a tokenizer in memory, and not of a file
    return replace(found, findings=tuple(replace(finding, fix="") for finding in found.findings))


def _placement(target: TrainerTarget) -> Result:
    """Judge the layers that have an adapter: of text, and not of the router or the experts."""
    names = sorted(target.adapter_tensors)
    if not names:
        return Result(not_checked=_NO_ADAPTER)
    found = []
    tower = [name for name in names if TOWER.search(name)]
    if tower and not target.has_inputs:
        first = f"{tower[0]}{and_more(1, len(tower))}"
        expected = "layers of the text alone, or batches with images"
        found.append(
            Finding(
                "ML450", f"the model of images is adapted, and no batch has an image: {first}", MODEL_PLACE, expected
            )
        )
    config = _lora_config(target)
    pattern = config.get("target_modules") if not config.get("exclude_modules") else None
    found += layer_findings(names, pattern, MODEL_PLACE, MODEL_PLACE)
    return Result(tuple(found), facts=(("adapter tensors", len(names)),))


def _lora_config(target: TrainerTarget) -> Mapping[str, Any]:
    """Return the configuration of the first active adapter; empty for a model that is not PEFT's."""
    configs = getattr(target.model, "peft_config", None) or {}
    config: Any = next(iter(configs.values()), None)
    return {} if config is None else dict(vars(config))


def _frozen(target: TrainerTarget) -> Result:
    tensors = target.adapter_tensors
    if not tensors:
        return Result(not_checked=_NO_ADAPTER)
    if any(parameter.requires_grad for parameter in tensors.values()):
        return Result()
    found = f"none of the {len(tensors)} tensors of the adapter can be trained: it is loaded for inference"
    return Result((Finding("ML320", found, MODEL_PLACE, "an adapter that can be trained"),))


def _every_layer(target: TrainerTarget) -> Result:
    tensors = target.adapter_tensors
    frozen = [name for name, parameter in tensors.items() if not parameter.requires_grad]
    if not tensors:
        return Result(not_checked=_NO_ADAPTER)
    if len(frozen) == len(tensors):
        return Result(not_checked="the whole adapter is frozen: see the check `frozen-adapter-is-refused`")
    of_a = {name for name in tensors if ".lora_A." in name}
    if of_a.issubset(frozen):  # LoRA-FA trains each B alone
        frozen = [name for name in frozen if name not in of_a]
    if not frozen:
        return Result()
    found = f"{len(frozen)} of {len(tensors)} tensors of the adapter are frozen, the first is {frozen[0]}"
    fix = "Call `requires_grad_(True)` on them before `train()`, or take their layers out of `target_modules`."
    return Result((Finding("ML303", found, MODEL_PLACE, "tensors that can be trained", fix=fix),))


def _only_lora(target: TrainerTarget) -> Result:
    if not target.adapter_tensors:
        return Result(not_checked=_NO_ADAPTER)
    trains_bias = _lora_config(target).get("bias", "none") != "none"
    others = [
        name
        for name, parameter in target.parameters.items()
        if parameter.requires_grad and not _OF_ADAPTER.search(name) and not (trains_bias and name.endswith(".bias"))
    ]
    if not others:
        return Result()
    found = f"{len(others)} tensors of the base can be trained beside the adapter, the first is {others[0]}"
    return Result((Finding("ML302", found, MODEL_PLACE, "a frozen base: requires_grad is false"),))
