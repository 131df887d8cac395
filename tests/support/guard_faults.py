"""Faults of a real `Trainer`, each with what the guard says first. `scripts/write_docs.py` makes a table of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from faulty_templates import CHATML_MARKED
from guarded_runs import chat_rows, decay_everything, detach_last_layer, encoded, optimize_base, scale_layers
from peft import LoraConfig
from planned_runs import SIZE, STEPS, TOKENIZER, Batch, Plan, Rows, mean_loss, token_losses
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from pytest_mistral_lora import training_template
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

BEFORE = "before a weight moves"

Planted = Callable[[Plan], None]


@dataclass(frozen=True)
class Fault:
    """A fault of a run.

    Attributes:
        plant: Plants it in a plan. Its name is that of the fault, its docstring says what is wrong.
        rule: The rule that is broken.
        place: The place of the first finding.
        says: Words of the first finding: what is wrong.
        token: The position of the first wrong token; a model that has learned the rows may have another one.
        count: The number of findings.
        moment: When the run is stopped.
        steps: For how many steps the model has learned the rows by heart, in each run.
        of_rows: Whether the rows show it with and without their messages.
        processes: The processes of the run; the last one has the fault.
        is_sampled: Whether each run of the tests has it; the sweeps have the others.
    """

    plant: Planted
    rule: str
    place: str
    says: str = ""
    token: str = ""
    count: int = 1
    moment: str = BEFORE
    steps: tuple[int, ...] = (0,)
    of_rows: bool = False
    processes: int = 1
    is_sampled: bool = False

    @property
    def name(self) -> str:
        return self.plant.__name__.replace("_", "-")

    @property
    def cause(self) -> str:
        return " ".join((self.plant.__doc__ or "").split())


def fault(rule: str, place: str, says: str = "", token: str = "", **given: Any) -> Callable[[Planted], Fault]:
    """Make a fault of the function that plants it."""
    return lambda plant: Fault(plant, rule, place, says, token, **given)


def of_loss(place: str, says: str, token: str, **given: Any) -> Callable[[Planted], Fault]:
    """Make a fault that the gradient shows, also of a model that has learned the rows by heart."""
    return fault("ML326", place, says, token, steps=(0, *STEPS), **given)


def faults(processes: int = 1) -> Iterator[Fault]:
    """Yield the faults of runs with so many processes, in the order in which they are written."""
    found = (value for value in globals().values() if isinstance(value, Fault))
    yield from (fault for fault in found if fault.processes == processes)


# -- rows


@fault("ML543", "train_dataset[0]", count=SIZE, of_rows=True)
def prompt_trained(plan: Plan) -> None:
    """The labels of each row are its ids: the prompt is trained on."""
    for row in plan.rows:
        row["labels"] = list(row["input_ids"])


@fault("ML546", "train_dataset[5]", "turn 1", is_sampled=True, of_rows=True)
def eos_masked(plan: Plan) -> None:
    """The EOS of a row has no label."""
    plan.rows[5]["labels"][-1] = -100


@fault("ML521", "train_dataset[0]", count=SIZE, of_rows=True)
def bos_twice(plan: Plan) -> None:
    """A text with `<s>` is encoded with `add_special_tokens=True`: BOS stands twice."""
    for row in plan.rows:
        row["input_ids"].insert(0, 1)
        row["labels"].insert(0, -100)


@fault("ML521", "train_dataset[0]", count=SIZE, of_rows=True)
def bos_absent(plan: Plan) -> None:
    """The rows begin without BOS."""
    for row in plan.rows:
        del row["input_ids"][0], row["labels"][0]


@fault("ML528", "train_dataset[0]", count=SIZE)
def space_behind_inst(plan: Plan) -> None:
    """A space stands behind `[INST]` that mistral-common does not write."""
    plan.has_messages = True
    for row in plan.rows:
        row["input_ids"].insert(2, 29473)
        row["labels"].insert(2, -100)


@fault("ML541", "train_dataset[0]", count=SIZE, of_rows=True)
def labels_shifted_in_rows(plan: Plan) -> None:
    """The labels of the rows are shifted, and the model shifts them again."""
    for row in plan.rows:
        row["labels"] = [*row["labels"][1:], -100]


@fault("ML545", "train_dataset[2]", of_rows=True)
def first_token_masked(plan: Plan) -> None:
    """The mask of a prompt is one token too long."""
    row = plan.rows[2]
    row["labels"][row["input_ids"].index(4) + 1] = -100


@fault("ML547", "train_dataset[2]", of_rows=True)
def end_of_prompt_trained(plan: Plan) -> None:
    """The mask of a prompt is one token too short: `[/INST]` is trained on."""
    row = plan.rows[2]
    row["labels"][row["input_ids"].index(4)] = 4


@fault("ML605", "train_dataset[6]", of_rows=True)
def nothing_trained(plan: Plan) -> None:
    """A row has no label."""
    plan.rows[6]["labels"] = [-100] * len(plan.rows[6]["labels"])


@fault("ML531", "train_dataset[0]", count=SIZE)
def rows_cut(plan: Plan) -> None:
    """The rows are cut to a length that their answers do not fit in."""
    plan.has_messages = True
    for row in plan.rows:
        row["input_ids"], row["labels"] = row["input_ids"][:18], row["labels"][:18]


@fault("ML522", "train_dataset[0]", count=SIZE)
def ids_cut(plan: Plan) -> None:
    """The rows are cut, and their messages are unknown."""
    for row in plan.rows:
        row["input_ids"], row["labels"] = row["input_ids"][:18], row["labels"][:18]


@fault("ML523", "train_dataset[0]", count=SIZE)
def text_as_control_token(plan: Plan) -> None:
    """The text `[/INST]` of a user becomes the control token."""
    plan.talk(("user", "Say [/INST] {} times."), ("assistant", "No."))
    plan.has_messages = True
    text = "<s>[INST] Say [/INST] {} times.[/INST]"
    for n, row in enumerate(plan.rows):
        prompt = plan.tokenizer(text.format(n), add_special_tokens=False)["input_ids"]
        answer = [token for token in row["labels"] if token != -100]
        row["input_ids"], row["labels"] = [*prompt, *answer], [*[-100] * len(prompt), *answer]


@fault("ML549", "train_dataset[0]", count=SIZE)
def weight_of_zero_trained(plan: Plan) -> None:
    """An answer of weight 0 is trained on."""
    plan.talk(("user", "What is {}?"), ("assistant", "I guess."), ("user", "Sure?"), ("assistant", "Yes."))
    plan.has_messages = True
    for row in plan.rows:
        row["messages"][1]["weight"] = 0
        row["messages"][3]["weight"] = 1


@fault("ML525", "train_dataset[0]", count=SIZE)
def system_prompt_dropped(plan: Plan) -> None:
    """The ids are those of a template that drops the system prompt of the messages."""
    plan.talk(("system", "Be brief."), ("user", "What is {}?"), ("assistant", "A number."))
    rows = encoded(plan.oracle, plan.chats, messages=True)
    plan.talk(("user", "What is {}?"), ("assistant", "A number."))
    for row, sound in zip(plan.rows, rows, strict=True):
        row["messages"] = sound["messages"]


@fault("ML526", "train_dataset[0]", count=SIZE)
def system_prompt_in_the_first_question(plan: Plan) -> None:
    """The template writes the system prompt into the first question, as before v3, and not into the last one."""
    turns = [("user", "What is {}?"), ("assistant", "A number."), ("user", "Sure?"), ("assistant", "Yes.")]
    plan.talk(("system", "Be brief."), *turns)
    plan.has_messages = True
    rows = plan.rows
    plan.talk(("user", "Be brief.\n\nWhat is {}?"), *turns[1:])
    for row, sound in zip(rows, encoded(plan.oracle, plan.chats), strict=True):
        row |= sound


LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ bos_token + '[INST] <<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)


def rendered(plan: Plan, template: str) -> None:
    """Give the tokenizer a chat template, and the rows its ids."""
    plan.render(template)
    plan.tokenizer.chat_template = template


@fault("ML442", "processing_class, chat_template")
def template_of_llama_2(plan: Plan) -> None:
    """The chat template is that of Llama 2, and the rows have its ids."""
    plan.talk(("system", "Be brief."), ("user", "What is {}?"), ("assistant", "A number."))
    plan.has_messages = True
    rendered(plan, LLAMA_2)


@fault("ML560", "train_dataset[0]", count=SIZE)
def chatml(plan: Plan) -> None:
    """The ids are those of ChatML, whose markers are plain text to this tokenizer."""
    plan.render(CHATML_MARKED)


@fault("ML442", "processing_class, chat_template")
def template_without_its_space(plan: Plan) -> None:
    """The chat template lacks a space, and the rows have its ids."""
    rendered(plan, training_template(plan.base).replace("[INST] ", "[INST]"))


@fault("ML442", "processing_class, chat_template")
def template_of_another_version(plan: Plan) -> None:
    """The chat template is that of another tokenizer version."""
    plan.talk(("system", "Be brief."), ("user", "What is {}?"), ("assistant", "A number."))
    plan.has_messages = True
    rendered(plan, training_template(shipped_tokenizer("spm-v7")))


@fault("ML532", "train_dataset[0]", count=SIZE)
def ids_of_another_tokenizer(plan: Plan) -> None:
    """The ids are those of the tokenizer of v1, whose words stand 768 ids lower."""
    plan.has_messages = True
    plan.tokens = "spm-v1"


@fault("ML520", "train_dataset[4]", "32768", of_rows=True)
def id_beyond_the_embeddings(plan: Plan) -> None:
    """A row has the id of a token that was added to the tokenizer, and the model has no embedding for it."""
    plan.rows[4]["input_ids"][5] = 32768


def _tool_talk(plan: Plan, call_id: str = "abcdefghi") -> None:
    call = {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    tool = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}
    plan.chats = [
        parse_row(
            {
                "messages": [
                    {"role": "user", "content": f"Is it warm, {n}?"},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": "warm", "tool_call_id": call_id, "name": "weather"},
                    {"role": "assistant", "content": "Yes."},
                ],
                "tools": [{"type": "function", "function": tool}],
            }
        )
        for n in range(SIZE)
    ]


@fault("ML530", "train_dataset[0]", count=SIZE)
def ids_of_tool_calls(plan: Plan) -> None:
    """The template writes other ids of the calls than the messages have."""
    _tool_talk(plan)
    plan.has_messages = True
    sound = [row["messages"] for row in plan.rows]
    _tool_talk(plan, call_id="123456789")
    del plan.rows
    for row, messages in zip(plan.rows, sound, strict=True):
        row["messages"] = messages


@fault("ML547", "train_dataset[0]", count=SIZE)
def result_of_a_tool_trained(plan: Plan) -> None:
    """The result of a tool is trained on."""
    _tool_talk(plan)
    for row in plan.rows:
        begin = row["input_ids"].index(8)
        end = row["input_ids"].index(9)
        row["labels"][begin:end] = row["input_ids"][begin:end]


# -- batches


@fault("ML510", "train_dataset[0]", "5 of 5 padding tokens")
def padding_trained(plan: Plan) -> None:
    """A collator gives the padding labels."""

    def change(batch: Batch) -> None:
        padding = batch["attention_mask"] == 0
        batch["labels"][padding] = batch["input_ids"][padding]

    plan.collated = change


@fault("ML519", "train_dataset[0]", "5 padding tokens")
def padding_attended_to(plan: Plan) -> None:
    """The padding stands in front, and the attention mask does not hide it."""
    plan.tokenizer.padding_side = "left"
    plan.collated = lambda batch: {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


@fault("ML552", "train_dataset[0]", token="token 4", count=2)
def token_hidden(plan: Plan) -> None:
    """The attention mask is made of the ids, and hides a token of the text that is the pad token."""

    def change(batch: Batch) -> None:
        batch["attention_mask"][:, 4] = 0

    plan.collated = change


@fault("ML546", "train_dataset[0]", "EOS", "turn 1", count=2, is_sampled=True)
def eos_masked_by_the_collator(plan: Plan) -> None:
    """The collator masks each EOS."""

    def change(batch: Batch) -> None:
        batch["labels"][batch["input_ids"] == 2] = -100

    plan.collated = change


@fault("ML204", "processing_class")
def eos_masked_as_padding(plan: Plan) -> None:
    """The pad token is EOS, and the collator masks the padding by its id."""
    plan.tokenizer.pad_token = plan.tokenizer.eos_token
    plan.before = lambda model: setattr(model.config, "pad_token_id", 2)
    eos_masked_by_the_collator.plant(plan)


@fault("ML546", "train_dataset[4]", "EOS", "turn 1", moment="at batch 3")
def collator_of_random_numbers(plan: Plan) -> None:
    """A collator masks the EOS of one row, and not each time."""
    seen: list[int] = []

    def change(batch: Batch) -> None:
        seen.append(len(seen))
        if len(seen) == 3:
            batch["labels"][0][batch["input_ids"][0] == 2] = -100

    plan.collated = change
    plan.settings["max_steps"] = 4


def _flattened(plan: Plan, **columns: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Join the rows of each batch, and make columns of the ids."""
    joined = DataCollatorWithFlattening()

    def collate(rows: Rows) -> Any:
        batch = joined(rows)
        return batch | {name: made(batch["input_ids"]) for name, made in columns.items()}

    plan.after = lambda trainer: setattr(trainer, "data_collator", collate if columns else joined)


@fault("ML313", "model.config", "2 conversations of a row see each other")
def packed_with_a_cache(plan: Plan) -> None:
    """Packed conversations see each other, since the model makes a key-value cache."""
    _flattened(plan)
    plan.settings["use_cache"] = True


@fault("ML513", "batches[0][0]", "an attention mask of ones")
def packed_with_one_mask(plan: Plan) -> None:
    """Packed conversations have one attention mask of ones, and see each other."""
    _flattened(plan, attention_mask=torch.ones_like)


@fault("ML512", "batches[0][0]", "position 21", "token 21")
def positions_that_go_on(plan: Plan) -> None:
    """The positions of packed conversations do not begin again."""
    _flattened(plan, position_ids=lambda ids: torch.arange(ids.shape[1])[None])


@fault("ML546", "train_dataset[9]", "EOS", "turn 1")
def row_of_a_later_batch(plan: Plan) -> None:
    """A row is faulty in the fifth of eight batches alone."""
    plan.chats = chat_rows(16)
    plan.settings["max_steps"] = 8
    plan.rows[9]["labels"][-1] = -100


@fault("ML546", "train_dataset[21]", "EOS", "turn 1")
def row_behind_the_first_batches(plan: Plan) -> None:
    """A row is faulty in the eleventh of twelve batches alone."""
    plan.chats = chat_rows(24)
    plan.settings["max_steps"] = 12
    plan.rows[21]["labels"][-1] = -100


@fault("ML546", "train_dataset[6]", "EOS", "turn 1", count=2, moment="at step 4, before its weights move")
def collator_that_changes(plan: Plan) -> None:
    """A collator masks each EOS from its fourth batch on."""
    seen: list[int] = []

    def change(batch: Batch) -> None:
        seen.append(len(seen))
        if len(seen) > 3:
            batch["labels"][batch["input_ids"] == 2] = -100

    plan.collated = change
    plan.settings["max_steps"] = 4
    plan.guarded |= {"batches": 2, "every": 1}


class Stream(IterableDataset[Any]):
    """Rows without numbers."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@fault("ML543", "batches[1][1]", moment="at batch 2", is_sampled=True)
def fault_in_a_stream(plan: Plan) -> None:
    """The prompt of the fourth row of a stream is trained on."""
    plan.of_dataset = Stream
    plan.rows[3]["labels"] = list(plan.rows[3]["input_ids"])


@fault("ML546", "eval_dataset[3]")
def fault_in_the_evaluation(plan: Plan) -> None:
    """The EOS of a row for the evaluation has no label."""
    rows = encoded(plan.oracle, chat_rows(SIZE + 4)[SIZE:])
    rows[3]["labels"][-1] = -100
    plan.evaluation = Dataset.from_list(rows)


# -- the model, the adapter and the tokenizer


def _set_trainable(part: str, *, is_trained: bool) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(is_trained)

    return change


@fault("ML320", "model")
def adapter_frozen(plan: Plan) -> None:
    """The adapter is loaded without `is_trainable=True`: it is frozen."""
    plan.before = _set_trainable("", is_trained=False)


@fault("ML303", "model", is_sampled=True)
def adapter_frozen_in_part(plan: Plan) -> None:
    """The adapter of one kind of layers is frozen."""
    plan.before = _set_trainable("v_proj.lora_A", is_trained=False)


@fault("ML302", "model")
def base_trained_beside_the_adapter(plan: Plan) -> None:
    """The head of the base is trained beside the adapter, and is not saved with it."""
    plan.before = _set_trainable("lm_head", is_trained=True)


@fault("ML450", "model")
def adapter_on_the_model_of_images(plan: Plan) -> None:
    """The adapter is on the model of images, too, and no batch has an image."""
    architecture = Architecture(TEXT_MODELS["mistral"], is_wrapped=True)
    plan.base = write_tiny_base(plan.folder / "wrapped", shipped_tokenizer(TOKENIZER), architecture=architecture)
    plan.lora = {"target_modules": r".*(vision_tower|language_model).*\.(q_proj|v_proj)"}


@fault("ML452", "model")
def adapter_on_the_router(plan: Plan) -> None:
    """The adapter of a model with experts is on the router."""
    architecture = Architecture(TEXT_MODELS["mixtral"])
    plan.base = write_tiny_base(plan.folder / "mixtral", shipped_tokenizer(TOKENIZER), architecture=architecture)
    plan.lora = {"target_modules": ["q_proj", "gate"], "lora_dropout": 0.0}


def _without_tokenizer(trainer: Any) -> None:
    trainer.processing_class = trainer.callback_handler.processing_class = None


@fault("ML217", "model.config", "eos_token_id 5")
def eos_of_the_model(plan: Plan) -> None:
    """`eos_token_id` of the model is that of another tokenizer, and the trainer has none to set it by."""
    plan.before = lambda model: setattr(model.config, "eos_token_id", 5)
    plan.after = _without_tokenizer


@fault("ML217", "model.config", "bos_token_id 5")
def bos_of_the_model(plan: Plan) -> None:
    """`bos_token_id` of the model is that of another tokenizer, and the trainer has none to set it by."""
    plan.before = lambda model: setattr(model.config, "bos_token_id", 5)
    plan.after = _without_tokenizer


@fault("ML215", "processing_class", "32,769 tokens")
def pad_beyond_the_embeddings(plan: Plan) -> None:
    """A pad token was added to the tokenizer, and the model has no embedding for it."""
    plan.tokenizer.add_special_tokens({"pad_token": "<pad>"})


@fault("ML203", "processing_class")
def bos_of_the_tokenizer(plan: Plan) -> None:
    """The BOS token of the tokenizer is another one."""
    plan.tokenizer.bos_token = "<unk>"


@fault("ML215", "model")
def fewer_embeddings(plan: Plan) -> None:
    """The embeddings are cut to 32,000 rows, and the tokenizer has 32,768 tokens."""
    plan.before = lambda model: model.base_model.model.resize_token_embeddings(32000)


# -- the loss


def _divided(summed: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
    return summed / ((labels[:, 1:] != -100).sum() if items is None else items)


@of_loss("compute_loss_func", "labels that are shifted twice", "row 0, token 13", is_sampled=True)
def shifted_twice(plan: Plan) -> None:
    """`compute_loss_func` shifts the labels, and calls the loss of transformers, which shifts them again."""

    def shifts(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].contiguous()
        return ForCausalLMLoss(logits, labels[:, 1:], logits.shape[-1], num_items_in_batch=num_items_in_batch)

    plan.loss_func = shifts


@of_loss("compute_loss_func", "labels that are not shifted", "row 0, token 14")
def not_shifted(plan: Plan) -> None:
    """`compute_loss_func` compares each logit with the label of its own token."""
    plan.loss_func = lambda outputs, labels, num_items_in_batch=None: mean_loss(outputs.logits, labels, by=0)


@of_loss("OwnTrainer.compute_loss", "labels that are shifted the wrong way", "row 0, token 15")
def shifted_the_wrong_way(plan: Plan) -> None:
    """Each token is predicted from the tokens behind it."""
    plan.own_loss = lambda logits, batch: torch.nn.functional.cross_entropy(
        logits[:, 1:].flatten(0, 1), batch["labels"][:, :-1].flatten()
    )


@of_loss("OwnTrainer.compute_loss", "the mask of the labels, not shifted", "row 0, token 21")
def mask_not_shifted(plan: Plan) -> None:
    """The losses are shifted, and the mask of the labels is not."""

    def masked(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        mask = (batch["labels"] != -100)[:, :-1]
        return (token_losses(logits, batch["input_ids"]) * mask).sum() / mask.sum()

    plan.own_loss = masked


@of_loss("OwnTrainer.compute_loss", "24 tokens without a label", "row 0, token 1")
def labels_clamped(plan: Plan) -> None:
    """`labels.clamp(min=0)` makes each -100 a label of token 0."""
    plan.own_loss = lambda logits, batch: mean_loss(logits, batch["labels"].clamp(min=0))


@of_loss("OwnTrainer.compute_loss", "every token, the prompt included", "row 0, token 1", is_sampled=True)
def everything_trained(plan: Plan) -> None:
    """The loss is over the ids, and not over the labels: the prompt and the padding are trained on."""
    plan.own_loss = lambda logits, batch: mean_loss(logits, batch["input_ids"])


@of_loss("OwnTrainer.compute_loss", "24 tokens without a label", "row 0, token 1")
def all_but_padding_trained(plan: Plan) -> None:
    """The loss is over the ids but the padding: the prompt is trained on."""
    plan.own_loss = lambda logits, batch: mean_loss(
        logits, batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    )


@of_loss("OwnTrainer.compute_loss", "labels that are not shifted", "row 0, token 13")
def ids_not_shifted(plan: Plan) -> None:
    """The loss compares each logit with the id of its own token."""
    plan.own_loss = lambda logits, batch: mean_loss(logits, batch["input_ids"], by=0)


@of_loss("OwnTrainer.compute_loss", "the padding", "row 0, token 21")
def loss_of_padding(plan: Plan) -> None:
    """The padding has a loss, and the prompt has none."""
    plan.own_loss = lambda logits, batch: mean_loss(
        logits, batch["labels"].masked_fill(batch["attention_mask"] == 0, 0)
    )


@of_loss("OwnTrainer.compute_loss", "21 of 21 labels", "row 0, token 13")
def loss_of_the_prompt(plan: Plan) -> None:
    """The mask is the wrong way round: the prompt is trained on, and the answer is not."""

    def of_prompt(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        is_other = (batch["labels"] != -100) | (batch["attention_mask"] == 0)
        return mean_loss(logits, batch["input_ids"].masked_fill(is_other, -100))

    plan.own_loss = of_prompt


@of_loss("OwnTrainer.compute_loss", "20 of 21 labels", "row 0, token 13")
def loss_of_the_last_token(plan: Plan) -> None:
    """`logits[:, -2:]` leaves the loss of the last token of the batch alone."""
    plan.own_loss = lambda logits, batch: mean_loss(logits[:, -2:], batch["labels"][:, -2:])


@of_loss("OwnTrainer.compute_loss", "13 of 21 labels", "row 1, token 13")
def loss_of_half_the_batch(plan: Plan) -> None:
    """The second row of each batch has no loss."""
    plan.own_loss = lambda logits, batch: mean_loss(logits[:1], batch["labels"][:1])


@of_loss("OwnTrainer.compute_loss", "2 of 21 labels", "row 0, token 20")
def loss_without_eos(plan: Plan) -> None:
    """The loss leaves EOS out."""
    plan.own_loss = lambda logits, batch: mean_loss(logits, batch["labels"].masked_fill(batch["labels"] == 2, -100))


@of_loss("OwnTrainer.compute_loss", "21 of 21 labels", "row 0, token 13")
def constant_loss(plan: Plan) -> None:
    """The loss does not depend on the logits."""
    plan.own_loss = lambda logits, batch: logits.sum() * 0


@of_loss("OwnTrainer.compute_loss", "to avoid", "row 0, token 13")
def sign_flipped(plan: Plan) -> None:
    """The loss is a log-likelihood, and so the optimizer makes the labels less likely."""
    plan.own_loss = lambda logits, batch: -mean_loss(logits, batch["labels"])


def _shift_labels(plan: Plan, by: int) -> None:
    def change(batch: Batch) -> None:
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, by), value=-100)[:, by:].contiguous()

    plan.collated = change


@of_loss("Trainer.compute_loss", "labels that are shifted twice", "row 0, token 13")
def shift_labels_shifted_twice(plan: Plan) -> None:
    """The collator makes `shift_labels` of labels that are shifted already."""
    _shift_labels(plan, 2)


@of_loss("Trainer.compute_loss", "labels that are not shifted", "row 0, token 14")
def shift_labels_not_shifted(plan: Plan) -> None:
    """The collator makes `shift_labels`, and does not shift them."""
    _shift_labels(plan, 0)


class Relabelled(Trainer):  # type: ignore[misc]
    """A trainer that changes the labels, and lets the model compute the loss."""

    def compute_loss(self, model: Any, inputs: Any, **named: Any) -> Any:
        labels = inputs["labels"]
        inputs["labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        return super().compute_loss(model, inputs, **named)


@of_loss("Relabelled.compute_loss", "labels that are shifted twice", "row 0, token 13")
def labels_shifted_before_the_model(plan: Plan) -> None:
    """`compute_loss` shifts the labels, and the model shifts them again."""
    plan.after = lambda trainer: setattr(trainer, "__class__", Relabelled)


@fault("ML326", "compute_loss_func", "labels that are shifted twice", "row 0, token 13")
def shifted_twice_in_bfloat16(plan: Plan) -> None:
    """The model is in bfloat16, and its labels are shifted twice."""
    shifted_twice.plant(plan)
    plan.lora = None
    plan.before = lambda model: model.to(torch.bfloat16)


@fault("ML326", "compute_loss_func", "labels that are shifted twice", "row 0, token 13")
def shifted_twice_with_experts(plan: Plan) -> None:
    """The model has experts and a loss of its router, and its labels are shifted twice."""
    shifted_twice.plant(plan)
    with_experts(plan)


def with_experts(plan: Plan) -> None:
    """Give the model experts, and a loss of the router."""

    def change(model: Any) -> None:
        model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
        model.config.router_aux_loss_coef = 0.5

    architecture = Architecture(TEXT_MODELS["mixtral"])
    plan.base = write_tiny_base(plan.folder / "mixtral", shipped_tokenizer(TOKENIZER), architecture=architecture)
    plan.lora, plan.before = None, change


@fault("ML326", "compute_loss_func", "step 4 trains on labels that are shifted twice", moment="at step 4")
def loss_that_becomes_wrong(plan: Plan) -> None:
    """The loss shifts the labels twice from the fourth step on."""
    calls: list[int] = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        calls.append(len(calls))
        return mean_loss(outputs.logits, labels, by=2 if len(calls) > 3 else 1)

    plan.loss_func = loss
    plan.settings["max_steps"] = 6
    plan.guarded["every"] = 1


def _by_a_column(values: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Plan], None]:
    def plant(plan: Plan) -> None:
        def weighed(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
            weights = batch["loss_mask"][:, 1:]
            return (token_losses(logits, batch["input_ids"]) * weights).sum() / weights.sum()

        plan.own_loss = weighed
        plan.collated = lambda batch: batch | {"loss_mask": values(batch["labels"]).float()}

    return plant


@of_loss("OwnTrainer.compute_loss", "27 tokens without a label", "row 0, token 2")
def mask_of_the_loss_wider_than_the_labels(plan: Plan) -> None:
    """A column `loss_mask`, which the loss reads, is 1 on the prompt."""
    _by_a_column(lambda labels: torch.arange(labels.shape[1]).expand_as(labels) > 1)(plan)


@of_loss("OwnTrainer.compute_loss", "2 of 21 labels", "row 0, token 20")
def mask_of_the_loss_narrower_than_the_labels(plan: Plan) -> None:
    """A column `loss_mask`, which the loss reads, is 0 at EOS."""
    _by_a_column(lambda labels: (labels != -100) & (labels != 2))(plan)


# -- one of two processes


@fault("ML546", "train_dataset[2]", "EOS", "turn 1", processes=2, is_sampled=True)
def row_of_the_second_process(plan: Plan) -> None:
    """Of two processes, the second one has a row whose EOS has no label"""
    plan.rows[2]["labels"][-1] = -100


@fault("ML326", "compute_loss_func", "labels that are shifted twice", "row 0", processes=2)
def loss_of_the_second_process(plan: Plan) -> None:
    """Of two processes, the second one shifts the labels twice"""
    if os.environ["RANK"] == "1":
        shifted_twice.plant(plan)


# -- the model in memory, and what its first steps move


@fault("ML321", "model", "is multiplied by 1")
def scaled_layers(plan: Plan) -> None:
    """The layers of the adapter have half of the scale that its configuration gives."""
    plan.before = lambda model: scale_layers(model, 0.5)


@fault("ML321", "model.config", "num_key_value_heads")
def heads_of_another_model(plan: Plan) -> None:
    """The configuration of the model has other heads than its layers."""
    plan.before = lambda model: setattr(model.config, "num_key_value_heads", 1)


@fault("ML321", "model.config", "two tensors")
def head_that_is_untied(plan: Plan) -> None:
    """The configuration ties the head to the embeddings, and it is a tensor of its own."""
    plan.before = lambda model: setattr(model.config, "tie_word_embeddings", True)


@fault("ML321", "model", "'default' and 'second' act")
def second_adapter_that_acts(plan: Plan) -> None:
    """A second adapter acts beside the one that is trained."""

    def change(model: Any) -> None:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["default", "second"])

    plan.before = change


@fault("ML320", "lr_scheduler", "the learning rate is 0")
def rate_of_zero(plan: Plan) -> None:
    """The learning rate is 0 in each step."""
    plan.settings["learning_rate"] = 0.0


@fault("ML303", "model", "had no gradient", moment="after the first steps")
def output_that_is_detached(plan: Plan) -> None:
    """A layer of the adapter is cut off from the loss."""
    plan.before = detach_last_layer
    plan.settings["max_steps"] = 4


@fault("ML303", "model", "the optimizer does not have")
def optimizer_of_the_base(plan: Plan) -> None:
    """The optimizer was made before the adapter, and has the tensors of the base."""
    plan.after = optimize_base
    plan.settings["max_steps"] = 4


@fault("ML302", "model", "the optimizer moved", moment="after the first steps")
def optimizer_that_moves_the_base(plan: Plan) -> None:
    """The decay of weights reaches the frozen base."""
    plan.after = decay_everything
    plan.settings["max_steps"] = 4
