"""Faults and healthy runs of TRL's trainers, as `guard_faults` and `guard_healthy` have those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from faulty_templates import CHATML_MARKED
from guard_faults import Fault, fault
from guard_healthy import Healthy, healthy
from planned_runs import TOKENIZER
from trl_runs import (
    CALLS,
    CHATS,
    HOSTILE,
    PADS_WITH_EOS,
    WEIGHTED,
    Run,
    ahead,
    collated,
    computed,
    in_form,
    mask_eos,
    mask_labels_by_the_pad,
    rated,
    run_of,
    shift_twice,
    talk,
    whole,
    with_logps,
    with_mask,
)

from pytest_mistral_lora import training_template
from pytest_mistral_lora.chat.oracle import shipped_tokenizer

PACKED = {"packing": True, "max_length": 200}
ROWS = len(CHATS)


def trl_faults() -> Iterator[Fault]:
    """Yield the faults in the order in which they are written; each has a function that returns a `Run`."""
    yield from (value for value in globals().values() if isinstance(value, Fault))


def trl_healthy_runs() -> Iterator[Healthy]:
    """Yield the healthy runs, likewise."""
    yield from (value for value in globals().values() if isinstance(value, Healthy))


def _template(old: str, new: str) -> str:
    template = training_template(shipped_tokenizer(TOKENIZER))
    assert old in template
    return template.replace(old, new)


# -- SFT


@fault("ML543", "train_dataset[0]", count=ROWS)
def sft_on_every_message() -> Run:
    """Rows of messages without `assistant_only_loss`: the questions are trained on."""
    return run_of("messages", settings={})


@fault("ML543", "train_dataset[0], conversations[0]", count=ROWS)
def sft_packed_on_every_message() -> Run:
    """Packed rows of messages without `assistant_only_loss`."""
    return run_of("messages", settings=PACKED)


@fault("ML543", "batches[0][0], conversations[0]", count=ROWS)
def sft_padding_free_on_every_message() -> Run:
    """Flattened batches (`padding_free`) of messages without `assistant_only_loss`."""
    return run_of("messages", settings={"padding_free": True})


@fault("ML543", "train_dataset[0]", count=ROWS)
def sft_on_prompts() -> Run:
    """Prompts and completions with `completion_only_loss=False`."""
    return run_of("prompt-completion").setting(completion_only_loss=False)


@fault("ML546", "train_dataset[0]", "EOS", "turn 1", count=ROWS)
def sft_marks_without_eos() -> Run:
    """The `{% generation %}` block of the chat template ends before EOS."""
    ended = _template("{{- eos_token }}", "{%- endgeneration %}{{- eos_token }}")
    return run_of("messages", template=ended.replace("{%- endgeneration %}{%- elif", "{%- elif"))


@fault("ML442", "processing_class, chat_template")
def sft_template_of_chatml() -> Run:
    """The chat template is that of ChatML."""
    return run_of("messages", template=CHATML_MARKED)


@fault("ML442", "processing_class, chat_template")
def sft_template_without_its_space() -> Run:
    """The chat template lacks a space."""
    return run_of("messages", template=_template("[INST] ", "[INST]"))


@fault("ML442", "processing_class, chat_template")
def sft_packed_template_without_its_space() -> Run:
    """The chat template lacks a space, and the rows are packed."""
    return run_of("messages", template=_template("[INST] ", "[INST]")).setting(**PACKED)


@fault("ML442", "processing_class, chat_template")
def sft_padding_free_template_without_its_space() -> Run:
    """The chat template lacks a space, and the batches are flattened."""
    return run_of("messages", template=_template("[INST] ", "[INST]")).setting(padding_free=True)


@fault("ML522", "train_dataset[1]", "EOS", count=ROWS - 1)
def sft_answers_cut() -> Run:
    """`max_length` cuts the completions."""
    return run_of("prompt-completion").setting(max_length=22)


@fault("ML204", "processing_class")
def sft_eos_masked_as_padding() -> Run:
    """The pad token is EOS, and the collator masks the labels by its id."""
    return run_of("prompt-completion", **PADS_WITH_EOS, **collated(mask_labels_by_the_pad))


@fault("ML546", "train_dataset[0]", "EOS", "turn 1", count=ROWS)
def sft_eos_masked() -> Run:
    """The collator masks each EOS."""
    return run_of("messages", **collated(mask_eos))


@fault("ML523", "train_dataset[0]", "[INST]", count=ROWS)
def sft_text_as_control_token() -> Run:
    """A question has the text `[INST]`, which becomes the control token."""
    return run_of("messages", rows=in_form("messages", HOSTILE))


@fault("ML549", "train_dataset[0]", "4 tokens", count=ROWS)
def sft_weight_of_zero() -> Run:
    """`assistant_only_loss` trains on answers of weight 0."""
    return run_of("messages", rows=in_form("messages", WEIGHTED))


@fault("ML543", "batches[0][3]")
def sft_row_of_a_stream() -> Run:
    """The prompt of the fourth row of a stream of ids is trained on."""
    rows = in_form("ids")
    rows[3]["labels"] = rows[3]["input_ids"]
    return run_of("ids", rows=rows, is_stream=True)


@fault("ML313", "model(…, use_cache=True)", "4 conversations of a row see each other")
def sft_packed_with_a_cache() -> Run:
    """`compute_loss` asks for a key-value cache, and packed conversations see each other."""
    return run_of("messages", derived=computed(use_cache=True)).setting(**PACKED, gradient_checkpointing=False)


@fault("ML326", "compute_loss_func", "labels that are shifted twice", "row 0, token 12")
def sft_labels_shifted_twice() -> Run:
    """`compute_loss_func` shifts the labels twice."""
    return run_of("messages", arguments={"compute_loss_func": shift_twice})


def _everything(trainer: Any) -> Any:
    class Everything(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            inputs["labels"] = inputs["input_ids"].clone()
            return super().compute_loss(model, inputs, *given, **named)

    return Everything


@fault("ML326", "Everything.compute_loss", "every token, the prompt included", "row 0, token 1")
def sft_loss_of_every_token() -> Run:
    """`compute_loss` replaces the labels by the ids; the fused head returns no logits."""
    return run_of("messages", derived=_everything)


# -- preferences


@fault("ML442", "processing_class, chat_template")
def dpo_template_without_its_space() -> Run:
    """The chat template of a DPO run lacks a space."""
    return run_of("pairs", template=_template("[INST] ", "[INST]"))


@fault("ML547", "train_dataset[0], chosen", "user", count=2 * ROWS)
def dpo_question_in_the_answers() -> Run:
    """The last question of a pair stands in its answers, and not in its prompt: it is scored."""
    before = talk("Hi", "Hello.")
    rows = [
        {"prompt": before, **{side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}}
        for row in in_form("pairs")
    ]
    return run_of("pairs", rows=rows)


@fault("ML531", "train_dataset[0], chosen", count=ROWS)
def dpo_answers_cut() -> Run:
    """`max_length` cuts the chosen answers."""
    return run_of("pairs").setting(max_length=18)


@fault("ML547", "train_dataset[0], chosen", "tool", "token 79", count=ROWS)
def dpo_result_of_a_tool() -> Run:
    """The result of a tool stands in the chosen answer, and is scored."""
    return run_of("pairs", rows=CALLS)


@fault("ML531", "train_dataset[0]", count=ROWS)
def kto_answers_cut() -> Run:
    """`max_length` cuts the answers of a KTO run."""
    return Run(rated(CHATS), {"max_length": 18}, kind="KTO")


@fault("ML442", "processing_class, chat_template")
def kto_template_without_its_space() -> Run:
    """The chat template of a KTO run lacks a space."""
    return Run(rated(CHATS), kind="KTO", template=_template("[INST] ", "[INST]"))


@fault("ML442", "processing_class, chat_template")
def reward_template_of_chatml() -> Run:
    """The chat template of a reward model is that of ChatML."""
    return Run(whole(in_form("pairs")), kind="Reward", template=CHATML_MARKED)


def _own_loss(compute_loss: Any) -> Any:
    return lambda trainer: type("Own", (trainer,), {"compute_loss": compute_loss})


@fault("ML326", "Own.compute_loss", "lowers 4 chosen answers and raises 4 rejected answers", "row 0, the chosen answer")
def dpo_sign_flipped() -> Run:
    """The loss of a DPO run lowers the chosen answers, and raises the rejected ones."""
    return run_of("pairs", derived=_own_loss(with_logps(ahead(1), sign=-1)))


@fault("ML326", "Own.compute_loss", "labels that are shifted twice", "row 0, the chosen answer")
def dpo_shifted_twice() -> Run:
    """The loss of a DPO run shifts the answers twice."""
    return run_of("pairs", derived=_own_loss(with_logps(ahead(2))))


@fault("ML326", "Own.compute_loss", "the mask of the answer tokens, not shifted", "row 1, the chosen answer, token 23")
def dpo_mask_not_shifted() -> Run:
    """The loss of a DPO run shifts the answers, and not their mask."""
    return run_of("pairs", derived=_own_loss(with_logps(ahead(1, late=1))))


@fault("ML326", "Own.compute_loss", "every token, the prompt included", "row 0, the chosen answer")
def dpo_prompt_scored() -> Run:
    """The loss of a DPO run is over the attention mask: the prompt is scored."""
    return run_of("pairs", derived=_own_loss(with_mask(lambda batch: batch["attention_mask"])))


@fault("ML326", "Own.compute_loss", "lowers 2 desirable answers and raises 2 undesirable answers")
def kto_sign_flipped() -> Run:
    """The loss of a KTO run lowers the desirable answers, and raises the others."""
    return Run(rated(CHATS), kind="KTO", derived=_own_loss(with_logps(ahead(1), sign=-1)))


@fault("ML326", "Own.compute_loss", "'</s>'")
def kto_without_eos() -> Run:
    """The loss of a KTO run leaves EOS out."""
    mask = with_mask(lambda batch: batch["completion_mask"] * (batch["input_ids"] != 2))
    return Run(rated(CHATS), kind="KTO", derived=_own_loss(mask))


# -- healthy runs

OWN = "computes a loss of its own"


@healthy()
def sft_padded() -> Run:
    """SFT on padded rows with `assistant_only_loss`"""
    return run_of("messages")


@healthy()
def sft_packed() -> Run:
    """SFT on packed rows"""
    return run_of("messages").setting(packing=True, max_length=64)


@healthy()
def sft_padding_free() -> Run:
    """SFT with `padding_free`"""
    return run_of("messages").setting(padding_free=True)


@healthy()
def sft_completion_only() -> Run:
    """SFT on prompts and completions"""
    return run_of("prompt-completion")


@healthy()
def sft_on_ids() -> Run:
    """SFT on ids and labels"""
    return run_of("ids")


@healthy()
def sft_on_a_stream() -> Run:
    """SFT on a stream"""
    return run_of("ids", is_stream=True)


@healthy()
def sft_pad_that_is_eos() -> Run:
    """SFT with the pad token EOS, padded"""
    return run_of("messages").setting(pad_token="</s>")


@healthy()
def sft_packed_pad_that_is_eos() -> Run:
    """SFT with the pad token EOS, packed"""
    return run_of("messages").setting(pad_token="</s>", packing=True, max_length=64)


@healthy()
def sft_padding_free_pad_that_is_eos() -> Run:
    """SFT with the pad token EOS, flattened"""
    return run_of("messages").setting(pad_token="</s>", padding_free=True)


@healthy()
def sft_dft() -> Run:
    """SFT with `loss_type="dft"`"""
    return run_of("messages").setting(loss_type="dft")


@healthy()
def sft_label_smoothing() -> Run:
    """SFT with `label_smoothing_factor`"""
    return run_of("messages").setting(label_smoothing_factor=0.1)


@healthy()
def sft_accumulated() -> Run:
    """SFT with gradient accumulation, packed"""
    return run_of("messages").setting(gradient_accumulation_steps=2, packing=True, max_length=64)


@healthy()
def dpo() -> Run:
    """DPO"""
    return run_of("pairs")


@healthy()
def kto() -> Run:
    """KTO"""
    return Run(rated(CHATS), kind="KTO")


@healthy(unchecked=OWN)
def reward() -> Run:
    """a reward model"""
    return Run(whole(in_form("pairs")), kind="Reward")


@healthy(unchecked=OWN)
def orpo() -> Run:
    """ORPO"""
    return replace(run_of("pairs"), kind="ORPO")


@healthy(unchecked=OWN)
def cpo() -> Run:
    """CPO"""
    return replace(run_of("pairs"), kind="CPO")
