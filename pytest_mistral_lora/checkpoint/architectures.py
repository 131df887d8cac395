"""The architectures whose text can be trained: the class to load, the place of its layers, and the names of tensors.

Everything that depends on the class of a base asks this module. It imports no class of transformers before a model is
loaded: the oldest supported version does not have them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.checkpoint.model_facts import ModelFacts
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.places import NOWHERE, Place


@dataclass(frozen=True, slots=True)
class TextModel:
    """A class of text models.

    Attributes:
        name: The class in transformers, as `architectures` of `config.json` names it.
        model_type: Its `model_type`, by which AutoModel chooses the class.
        attention: Last names of the linear layers of an attention block, in model order.
        mlp: Last names of the linear layers of an MLP; empty if the layer has experts instead, which are not adapted.
        since: The first version of transformers that has the class; empty if every supported version does.
        has_oracle: Whether it is Mistral's own. The others are trained only by their chat template.
        has_window: Whether attention can have a window (`sliding_window`).
        router: Last name of the module that chooses a token's experts; empty without experts.
        scales_from: The position from which its own default scales attention by the position; 0 if it does not.
        named: Words, as a regular expression, of the names of repositories that have such a model; empty if the words
            of another model name it, too.
    """

    name: str
    model_type: str
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    since: str = ""
    has_oracle: bool = True
    has_window: bool = True
    router: str = ""
    scales_from: int = 0
    named: str = ""

    @property
    def decoder(self) -> str:
        """The class of its decoder: the model without its head."""
        return f"{self.name.removesuffix('ForCausalLM')}Model"


# multi-head latent attention: queries, and keys with values, are projected through a narrow layer
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

_OF_MISTRAL = "mistral|ministral|devstral|magistral|codestral|pixtral|leanstral"

TEXT_MODELS: Mapping[str, TextModel] = {
    model.model_type: model
    for model in (
        TextModel("MistralForCausalLM", "mistral", named=_OF_MISTRAL),
        TextModel("MinistralForCausalLM", "ministral", named=_OF_MISTRAL),
        TextModel("Ministral3ForCausalLM", "ministral3", since="5.0", scales_from=16384, named=_OF_MISTRAL),
        TextModel("MixtralForCausalLM", "mixtral", mlp=(), router="gate", named="mixtral"),
        TextModel(
            "Mistral4ForCausalLM",
            "mistral4",
            attention=_LATENT,
            mlp=(),
            since="5.4",
            has_window=False,
            router="gate",
            scales_from=8192,
            named=_OF_MISTRAL,
        ),
        TextModel("LlamaForCausalLM", "llama", has_oracle=False, has_window=False, named="llama"),
        TextModel("Qwen2ForCausalLM", "qwen2", has_oracle=False, named="qwen-?2"),
        TextModel("Qwen3ForCausalLM", "qwen3", has_oracle=False, named="qwen-?3"),
    )
}
"""The text models by their `model_type`."""

WRAPPER = "Mistral3ForConditionalGeneration"
"""The class of models of text and images, around the text models of Mistral."""

_WRAPPER_TYPE = "mistral3"
_IN_WRAPPER = "mistral"  # transformers' default of `text_config`
_DEFAULT_WINDOW = 4096

TARGET_GROUPS = ("attention", "attention+mlp", "all-linear")
"""Names for groups of a decoder layer's linear layers, to use in place of the layers' names."""

EMBEDDINGS = ("embed_tokens", "lm_head")
"""Last names of the modules that a base may keep as one tensor."""

SUPPORTED = (*(model.name for model in TEXT_MODELS.values() if model.has_oracle), WRAPPER)
"""The classes whose text is trained as Mistral's own tokenizers write it."""

TEMPLATE_ALONE = tuple(model.name for model in TEXT_MODELS.values() if not model.has_oracle)
"""The classes that are trained only by `backend: chat-template`."""

ALL = (*SUPPORTED, *TEMPLATE_ALONE)
"""The classes that this project knows."""

_NOT_TRAINED = {
    "MistralLarge4ForConditionalGeneration": "its sparse attention and experts are not known here",
    "VoxtralForConditionalGeneration": "it is a model of audio",
    "VoxtralRealtimeForConditionalGeneration": "it is a model of audio",
    "LlavaForConditionalGeneration": "it is an older model of text and images (Pixtral)",
    "PixtralForConditionalGeneration": "it is an older model of text and images",
    "MambaForCausalLM": "it has no attention (Codestral Mamba)",
    "Mamba2ForCausalLM": "it has no attention (Codestral Mamba)",
}
"""Classes of Mistral's checkpoints that are refused, and why."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The class of a checkpoint, by its `config.json`.

    Attributes:
        text: Its text model.
        is_wrapped: Whether the text model is a part of a model of text and images.
    """

    text: TextModel
    is_wrapped: bool = False

    @property
    def name(self) -> str:
        """The class of transformers that is loaded."""
        return WRAPPER if self.is_wrapped else self.text.name

    @property
    def title(self) -> str:
        """The class, with that of the text model in a wrapper."""
        return f"{WRAPPER} ({self.text.model_type})" if self.is_wrapped else self.text.name

    @property
    def tower(self) -> str:
        """Dotted name of the text model's decoder in memory, with a dot at its end."""
        return "model.language_model." if self.is_wrapped else "model."

    @property
    def layers(self) -> str:
        """Dotted name of the decoder layers in memory: `model.layers`; in a wrapper `model.language_model.layers`."""
        return f"{self.tower}layers"

    def model_class(self, place: Place = NOWHERE) -> Any:
        """Return the class of transformers.

        Args:
            place: The file that names it, for the error.

        Raises:
            PinError: If the installed version of transformers does not have it.
        """
        import transformers

        # a wrapper is older than some of its text models
        if not hasattr(transformers, self.text.name) or not hasattr(transformers, self.name):
            raise PinError(
                f"{self.title} is not in transformers {transformers.__version__}",
                place=place,
                expected=f"transformers {self.text.since or '4.57.1'} or later",
                next_step=f"pip install 'transformers>={self.text.since or '4.57.1'}'",
            )
        return getattr(transformers, self.name)

    def targets(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the last names of layers that are named singly or by group, each once and in order.

        Names that the class does not have are returned unchanged.

        Raises:
            ValueError: If a group has the layers of experts in this class, with the reason.
        """
        found: list[str] = []
        for name in names:
            if name in TARGET_GROUPS[1:] and not self.text.mlp:
                raise ValueError(
                    f"{name!r} has the MLP of each layer, and in {self.title} these are experts behind a router"
                )
            if name not in TARGET_GROUPS:
                found.append(name)
                continue
            found += self.text.attention
            if name != "attention":
                found += self.text.mlp
        return tuple(dict.fromkeys(found))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the class that transformers' AutoModel loads for a `config.json`, if this project knows it.

    Raises:
        ValueError: If the class is not known, or `architectures` and `model_type` differ, with what was found.
    """
    names, facts = config.get("architectures"), ModelFacts(config)
    if not (names is None or (isinstance(names, list) and all(isinstance(item, str) for item in names))):
        raise ValueError(f"of architectures {names!r}"[:200])
    kind = config.get("model_type")
    if kind is None and names and names[0] != WRAPPER:
        kind = next((model.model_type for model in TEXT_MODELS.values() if names == [model.name]), None)
    name = ", ".join(names) if names else ""
    if kind == _WRAPPER_TYPE and name in ("", WRAPPER):
        inner = facts.text.get("model_type", _IN_WRAPPER) if facts.is_wrapped else _IN_WRAPPER
        text = TEXT_MODELS.get(inner) if isinstance(inner, str) else None
        if text is None or not text.has_oracle:
            raise ValueError(f"{WRAPPER} around a text model of type {inner!r}"[:200])
        return Architecture(text, is_wrapped=True)
    text = TEXT_MODELS.get(kind) if isinstance(kind, str) else None
    if text is None or name not in ("", text.name):
        if name in ALL:
            raise ValueError(f"of model_type {kind!r}, which AutoModel does not load as {name}"[:200])
        raise ValueError(f"{name or kind}"[:200] + (f": {_NOT_TRAINED[name]}" if name in _NOT_TRAINED else ""))
    # AutoModel goes by `model_type`, not by `architectures`; with `layer_types` it takes a Mistral for a Ministral:
    # https://github.com/huggingface/transformers/blob/main/src/transformers/models/auto/configuration_auto.py
    types = facts.layer_types
    if text.model_type != "mistral" or types is None:
        return Architecture(text)
    if not isinstance(types, list):
        raise ValueError(f"a Ministral to AutoModel: its layer_types are {types!r}"[:200])
    # a Mistral has one window for all layers, and its default is not null
    plain = "full_attention" if config.get("sliding_window", _DEFAULT_WINDOW) is None else "sliding_attention"
    return Architecture(text if all(kind == plain for kind in types) else TEXT_MODELS["ministral"])


def is_known(config: Mapping[str, Any]) -> bool:
    """Report whether a `config.json` names a class of this module, whether or not its other keys fit."""
    known = {*ALL, *TEXT_MODELS, _WRAPPER_TYPE}
    names = config.get("architectures") or [config.get("model_type")]
    return isinstance(names, list) and not known.isdisjoint(map(str, names))


def spelled_name(name: str, names: Iterable[str]) -> str:
    """Return the name of a tensor in one spelling: a wrapper's are written under two prefixes on disk.

    Releases and transformers 4 and 5 write `language_model.model.layers…` and `language_model.lm_head`; in memory, and
    in an adapter, the same are `model.language_model.layers…` and `lm_head`.

    Args:
        name: The name.
        names: All names of the file or model, which show whether it is wrapped.
    """
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"language_model.{name.removeprefix(prefix)}"
    if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")):
        return name.removeprefix("model.")
    wrapped = name == "lm_head.weight" and any("language_model." in other for other in names)
    return f"language_model.{name}" if wrapped else name
