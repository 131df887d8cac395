"""What the recorded keys of a recipe mean: its base, the layers that it adapts, and what it makes of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes_of_trainers.bases import Base, base_of
from recipes_of_trainers.layers import Target
from recipes_of_trainers.rows import Layout

Value = Mapping[str, Any]
"""A recorded key: its `value`, its `line`, and the `path` of its file, if that is another than the recipe's."""


@dataclass(frozen=True)
class Scoreboard:
    """The rows were taken out of the trainer itself: a configuration of the scoreboard, with a tokenizer."""

    configuration: str
    tokenizer: str


@dataclass(frozen=True)
class Run:
    """The rows were taken out of the trainer itself, with the recipe's own file: see `runs`.

    Attributes:
        thinks: Whether the recipe's data have thinking.
    """

    thinks: bool = False


@dataclass(frozen=True)
class Everything:
    """Every token of a conversation is trained on."""


@dataclass(frozen=True)
class EosIsPadding:
    """The collator makes the labels, and masks the EOS, since it is the padding, too."""


HOW: Mapping[type, str] = {
    Layout: "the layout of the template",
    Scoreboard: "the layout of the template",
    Run: "what the trainer makes of the rows",
    Everything: "every token is a label",
    EosIsPadding: "the pad token is EOS, and the collator masks it",
}
"""What causes the findings in rows, in words."""


@dataclass(frozen=True)
class Meaning:
    """What a recipe does.

    Attributes:
        base: The key that names its base.
        known: What is known of the base.
        target: What it adapts; None if it trains every weight, or for the reason in `layers`.
        target_key: The key that names it.
        layers: Why the layers are not judged.
        rows: What it makes of rows, or the reason why that is not judged.
        rows_key: The key that decides it.
        has_images: Whether its rows have images or sounds.
        remark: What else a reader should know of its rows.
    """

    base: Value | None
    known: Base | None = None
    target: Target | None = None
    target_key: Value | None = None
    layers: str = ""
    rows: Layout | Scoreboard | Run | Everything | EosIsPadding | str = ""
    rows_key: Value | None = None
    has_images: bool = False
    remark: str = ""
    models: tuple[str, ...] = field(default=())


_NO_TURNS = "a text without turns ({}), which no layout of Mistral's applies to"
_ALL_TEXT = "the whole text is trained on"
_WHOLE = f"{_ALL_TEXT}, the instruction too"
_FULL = "every weight is trained"


def axolotl(keys: Mapping[str, Value], path: str) -> Meaning:
    """Axolotl: `lora_target_linear` adds the names of all linear layers but the head."""
    get = _values(keys)
    base = keys["base_model"]
    known = base_of(base["value"])
    has_images = bool(get("processor_type"))
    named = get("lora_target_modules")
    by_name = bool(get("lora_target_linear"))
    modules = named if isinstance(named, str) else tuple(named or ())
    target = Target(modules, by_name=by_name) if get("adapter") else None
    target_key = keys.get("lora_target_linear" if by_name else "lora_target_modules")
    kind, kind_key = get("datasets[0].type"), keys.get("datasets[0].type")
    rows: Any
    if has_images:
        rows = "rows with images"
    elif known is not None and known.label == "voxtral":
        rows = "the base is a model of audio"
    elif get("rl"):
        rows, kind_key = (
            f"preferences (rl: {get('rl')}) in ChatML, which no tokenizer of Mistral's is an oracle for",
            keys["rl"],
        )
    elif kind == "chat_template" and get("tokenizer_use_mistral_common") and known is not None:
        rows = Run(thinks="think" in str(get("datasets[0].path")))
    elif kind == "chat_template":
        rows = "the template and the tokenizer are those of the base's repository, which cannot be had here"
    elif kind is None:
        rows, kind_key = _NO_TURNS.format("`format` of its own"), keys.get("datasets[0].path")
    else:
        rows = _NO_TURNS.format(f"`type: {kind}`")
    return Meaning(
        base, known, target, target_key, "" if target else _FULL, rows, kind_key, has_images or _is_audio(known)
    )


def _is_audio(known: Base | None) -> bool:
    return known is not None and known.label == "voxtral"


def slots(keys: Mapping[str, Value], path: str) -> Meaning:
    """LLaMA-Factory and ms-swift: a template that is registered for models."""
    get = _values(keys)
    names = tuple(get("models"))
    known = base_of(_best(names))
    # a template is for conversations, whichever of its models is trained
    layers = "the trainer's default, which is on the scoreboard of layers"
    rows: Any
    if "format_user" in keys:
        is_inside = get("template_class") == "Llama2Template"
        system = _slots(get("format_system") or ["{{content}}"])
        answer = _slots(get("format_assistant") or ["{{content}}", "{eos_token}"])
        rows = Layout(_slots(get("format_prefix")), _slots(get("format_user")), answer, system, is_inside=is_inside)
        key = keys["format_system"]
    elif get("template") in ("llama", "mistral_nemo"):
        # both shipped Tekken files of v3 have the same ids of text and control tokens
        column = (known.tokenizer if known else "").replace("tekken-240718", "tekken-240911")
        rows = Scoreboard({"llama": "ms-swift"}.get(get("template"), "ms-swift-nemo"), column)
        key = keys["template"]
    elif get("template") == "zephyr" or "system_prefix" not in keys:
        rows, key = "a layout that is not Mistral's", keys["template"]
    else:
        invents = bool(get("default_system")) or get("template_cls") in _OWN_SYSTEM
        system = tuple(part.removeprefix("<s>").replace("{{SYSTEM}}", "{content}") for part in get("system_prefix"))
        rows = Layout(("{bos}",), _slots(get("prompt")), ("{content}", "{eos}"), system, invents=invents)
        key = keys["default_system"] if get("default_system") else keys.get("template_cls", keys["template"])
    return Meaning(keys["template"], known, None, None, layers, rows, key, models=names)


_OWN_SYSTEM = ("Mistral2506Template", "Mistral2512Template", "Mistral2512ThinkingTemplate")
"""Classes of ms-swift that put the checkpoint's SYSTEM_PROMPT.txt, with today's date, where none is given."""


def _best(names: tuple[str, ...]) -> str:
    """Return the model of a group that was trained on conversations, with the newest tokenizer."""
    instruct = [name for name in names if (known := base_of(name)) and known.is_instruct] or list(names)
    return max(instruct, key=lambda name: (base_of(name) or Base("", "", is_instruct=False)).tokenizer)


def _slots(parts: list[str]) -> tuple[str, ...]:
    spelled = {"{{content}}": "{content}", "{{QUERY}}": "{content}", "{bos_token}": "{bos}", "{eos_token}": "{eos}"}
    found = []
    for part in parts:
        for theirs, ours in spelled.items():
            part = part.replace(theirs, ours)
        found.append(part)
    return tuple(found)


def nemo(keys: Mapping[str, Value], path: str) -> Meaning:
    """NeMo AutoModel: wildcards; by `exclude_modules` every linear layer but those; by neither, `*_proj`."""
    get = _values(keys)
    base = keys.get("model.pretrained_model_name_or_path") or keys.get("model.config.pretrained_model_name_or_path")
    known = base_of(base["value"]) if base else None
    data = str(get("dataset._target_")).rpartition(".")[2]
    has_images = "Vlm" in str(get("recipe")) or "VLM" in str(get("recipe"))
    key = next((keys[f"peft.{name}"] for name in _NEMO if f"peft.{name}" in keys and get(f"peft.{name}")), None)
    target = None
    if key is not None:
        value = key["value"]
        listed = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
        chosen: dict[str, Any] = {_NEMO[name]: listed or True for name in _NEMO if keys.get(f"peft.{name}") is key}
        target = Target(**chosen)
    layers = "" if target else _FULL
    if "mock" in str(get("dataset._target_")):
        target, layers = None, "a benchmark on random tokens"
        rows = "a benchmark on random tokens"
    elif has_images:
        rows = "rows with images"
    elif "retrieval" in path:
        target, layers, rows = None, "a model of embeddings", "queries and documents for a model of embeddings"
    elif known is not None and known.is_instruct and data == "make_squad_dataset":
        rows = "the trainer is not installed; its code masks the question (`formatting_utils.py`)"
    else:
        rows = _NO_TURNS.format(f"`{data}`")
    return Meaning(base, known, target, key, layers, rows, keys.get("dataset._target_"), has_images)


_NEMO = {"match_all_linear": "every_linear", "target_modules": "patterns", "exclude_modules": "exclude"}


def unsloth(keys: Mapping[str, Value], path: str) -> Meaning:
    """Unsloth: `FastLanguageModel` leaves the model of images out, and `FastVisionModel` adapts it by default."""
    base = _first(keys, ".from_pretrained(model_name)") or _called(keys, "from_pretrained")
    known = base_of(base["value"]) if base and isinstance(base["value"], str) else None
    sees = "FastVisionModel.get_peft_model(finetune_vision_layers)" in keys
    has_images = "UnslothVisionDataCollator" in keys
    named = _first(keys, ".get_peft_model(target_modules)")
    of_text = "FastLanguageModel.get_peft_model(target_modules)" in keys
    modules = tuple(named["value"] if named else _chosen(keys))
    target = Target(modules, of_text=of_text and known is not None and known.label.startswith("wrapped"))
    target_key = named or keys.get("FastVisionModel.get_peft_model(finetune_vision_layers)")
    text = _first(keys, "(dataset_text_field)")
    remark = ""
    rows: Any
    if has_images or sees:
        rows, key = "rows with images", _first(keys, "UnslothVisionDataCollator")
    elif "GRPOTrainer" in keys:
        rows, key = "GRPO trains on what the model writes, and has no labels", keys["GRPOTrainer"]
    elif _first(keys, "DPOTrainer"):
        rows, key = "preference pairs in Zephyr's layout", _first(keys, "DPOTrainer")
    elif "train_on_responses_only" in keys:
        rows, key = "the trainer is not installed", keys["train_on_responses_only"]
    elif "tokenizer.apply_chat_template" in keys and text:
        rows, key = Everything(), text
        chosen = keys.get("get_chat_template(chat_template)")
        remark = "in ChatML, whatever the base's layout is" if chosen and chosen["value"] == "chatml" else ""
    else:
        rows, key = _NO_TURNS.format("a field `text`"), text
        remark = _WHOLE if "Alpaca" in path else _ALL_TEXT
    return Meaning(base, known, target, target_key, "", rows, key, has_images or sees, remark)


_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def _chosen(keys: Mapping[str, Value]) -> tuple[str, ...]:
    """Return the layers that Unsloth's `finetune_…_modules` choose, of text and images alike."""
    wanted = [
        key["value"] for name in ("attention", "mlp") if (key := _first(keys, f"(finetune_{name}_modules)")) is not None
    ]
    return _ATTENTION * bool(wanted[0]) + _MLP * bool(wanted[1]) if len(wanted) == 2 else (*_ATTENTION, *_MLP)


def notebook(keys: Mapping[str, Value], path: str) -> Meaning:
    """A notebook that calls transformers, PEFT and TRL."""
    base = keys.get("base_model_id") or keys.get("Mistral3ForConditionalGeneration.from_pretrained")
    known = base_of(base["value"]) if base else None
    named = keys.get("LoraConfig(target_modules)")
    target = Target(tuple(named["value"])) if named else None
    has_images = "Mistral3ForConditionalGeneration.from_pretrained" in keys
    pad = keys.get("tokenizer.pad_token")
    rows: Any
    if has_images:
        rows, key = "rows with images", base
    elif pad and pad["value"] == "tokenizer.eos_token" and _first(keys, "Collator", "(mlm)"):
        rows, key = EosIsPadding(), pad
    else:
        rows, key = _NO_TURNS.format("a prompt of its own"), base
    remark = _WHOLE if isinstance(rows, EosIsPadding) else ""
    return Meaning(base, known, target, named, "" if target else _FULL, rows, key, has_images, remark)


def peft_script(keys: Mapping[str, Value], path: str) -> Meaning:
    """PEFT's `examples/sft/train.py`: the rows are rendered into one text, which TRL trains on as a whole."""
    return _trl_text(
        keys, "lora_target_modules", keys.get("dataset_text_field"), "in ChatML, whatever the base's layout is"
    )


def handbook(keys: Mapping[str, Value], path: str) -> Meaning:
    """The alignment handbook: TRL's SFT trainer without `assistant_only_loss` trains on the questions, too."""
    if "/sft/" in path:
        columns = keys.get("dataset_mixture.datasets[0].columns")
        return _trl_text(keys, "lora_target_modules", columns, "in Zephyr's layout, as the recipe sets it")
    reason = "preference pairs in a layout that is not Mistral's"
    meaning = _trl_text(keys, "lora_target_modules", keys.get("beta"), "")
    return Meaning(
        meaning.base, meaning.known, meaning.target, meaning.target_key, meaning.layers, reason, keys.get("beta")
    )


def _trl_text(keys: Mapping[str, Value], targets: str, key: Value | None, remark: str) -> Meaning:
    base = keys["model_name_or_path"]
    named = keys.get(targets)
    value = named["value"] if named else None
    modules: Any = value
    if isinstance(value, str) and value != "all-linear":
        modules = tuple(value.split(","))
    target = Target(tuple(modules) if isinstance(modules, list) else modules) if named else None
    known = base_of(base["value"])
    return Meaning(base, known, target, named, "" if target else _FULL, Everything(), key, remark=remark)


def openrlhf(keys: Mapping[str, Value], path: str) -> Meaning:
    """OpenRLHF: without `ds.lora.target_modules`, every linear layer is adapted by PEFT's `all-linear`."""
    base = keys["model.model_name_or_path"]
    named = keys.get("ds.lora.target_modules")
    target = Target(named["value"] if named else "all-linear")
    key = named or keys["ds.lora.rank"]
    return Meaning(
        base, base_of(base["value"]), target, key, "", _NO_TURNS.format("`question`"), keys.get("data.input_key")
    )


def xtuner(keys: Mapping[str, Value], path: str) -> Meaning:
    """XTuner: names of layers are PEFT's; each answer ends with EOS, and each question begins with BOS."""
    base = keys.get("pretrained_model_name_or_path")
    known = base_of(base["value"]) if base and isinstance(base["value"], str) else None
    named = keys.get("dict(target_modules)")
    target = Target(tuple(named["value"])) if named and named["value"] else None
    layers = "" if target else _FULL
    if target is None and "qlora" in path:
        layers = "the trainer finds the linear layers by itself"
    template = keys.get("prompt_template")
    named_template = str(template["value"]).rpartition(".")[2] if template else ""
    rows: Layout | str = _NO_TURNS.format("pre-training")
    if named_template and named_template not in ("mistral", "mixtral"):
        rows = "a layout that is not Mistral's"
    elif named_template and (known is None or not known.is_instruct):
        rows = "the base has no layout of conversations of its own"
    elif named_template:
        # xtuner/utils/templates.py, line 151, and the function `encode_fn` of xtuner/dataset/utils.py
        rows = Layout((), ("{bos}", "[INST] {content} [/INST]"), ("{content}", "{eos}"), between=("\n",))
    return Meaning(base, known, target, named, layers, rows, template or base)


def torchtune(keys: Mapping[str, Value], path: str) -> Meaning:
    """Torchtune has a model and a tokenizer of its own."""
    base = keys.get("tokenizer.path")
    layers = "the model is torchtune's, with names of its own" if keys.get("model.lora_attn_modules") else _FULL
    data = keys.get("dataset._component_")
    named = str(data["value"]).rpartition(".")[2] if data else ""
    if not data or "alpaca" not in named:
        rows = "not for training on rows" if not data else _NO_TURNS.format(f"`{named}`")
        return Meaning(base, _of_path(base), None, None, layers, rows, data)
    return Meaning(base, _of_path(base), None, None, layers, "the trainer is not installed", data, remark=_WHOLE)


def litgpt(keys: Mapping[str, Value], path: str) -> Meaning:
    """LitGPT has a model of its own, and its own prompt styles."""
    base = keys.get("checkpoint_dir")
    masks = keys.get("data.init_args.mask_prompt")
    remark = _WHOLE if masks and not masks["value"] else ""
    reason = _NO_TURNS.format("`prompt_style: alpaca`")
    return Meaning(
        base, _of_path(base), None, None, "the model is LitGPT's, with names of its own", reason, masks, remark=remark
    )


def mistral_finetune(keys: Mapping[str, Value], path: str) -> Meaning:
    """mistral-finetune has a model of its own, and takes the ids from mistral-common."""
    base = keys.get("snapshot_download(repo_id)") or keys.get("model_id_or_path")
    known = base_of(base["value"]) if base and base["value"] else None
    return Meaning(
        base,
        known,
        None,
        None,
        "the model is the trainer's own",
        "the trainer is not installed; its ids are mistral-common's",
        base,
    )


def hosted(keys: Mapping[str, Value], path: str) -> Meaning:
    """A notebook that fine-tunes through Mistral's API."""
    base = next(iter(keys.values()), None)
    why = "the fine-tune runs on Mistral's servers"
    return Meaning(base, None, None, None, why, why, base)


READERS: Mapping[str, Callable[[Mapping[str, Value], str], Meaning]] = {
    reader.__name__: reader
    for reader in (
        *(axolotl, slots, nemo, unsloth, notebook, peft_script, handbook, openrlhf, xtuner, torchtune, litgpt),
        *(mistral_finetune, hosted),
    )
}


def _of_path(key: Value | None) -> Base | None:
    return base_of(str(key["value"]).removesuffix("/tokenizer.model")) if key else None


def _values(keys: Mapping[str, Value]) -> Callable[[str], Any]:
    return lambda name: keys[name]["value"] if name in keys else None


def _first(keys: Mapping[str, Value], *parts: str) -> Value | None:
    """Return the first key whose name has each of some parts, in the file's order."""
    return next((key for name, key in keys.items() if all(part in name for part in parts)), None)


def _called(keys: Mapping[str, Value], name: str) -> Value | None:
    return next((key for called, key in keys.items() if called.endswith(f".{name}")), None)
