"""Runs of TRL's trainers, sound ones and those with a fault, by the form of their rows. TRL is imported by each run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from faulty_templates import CHATML, CHATML_MARKED
from guarded_runs import TRL_SETTINGS, Losses, chat_rows

from pytest_mistral_lora import CheckpointTokenizer, Row, training_template
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

Record = dict[str, Any]
MODULES = {
    "SFT": "trl",
    "DPO": "trl",
    "KTO": "trl",
    "Reward": "trl",
    "ORPO": "trl.experimental.orpo",
    "CPO": "trl.experimental.cpo",
}
FORMS = ("messages", "prompt-completion", "texts", "text", "ids", "packed", "pairs", "text-pairs")


@dataclass(frozen=True)
class Run:
    """What a user gives a trainer of TRL.

    Attributes:
        rows: The rows.
        settings: The keys of its configuration.
        template: The chat template of the tokenizer.
        arguments: More arguments of the trainer.
        tokens: The named tokens of the tokenizer that are changed.
        kind: The trainer, a key of `MODULES`.
        change: Changes the model before the trainer is made.
        after: Changes the trainer's model.
        named: The tokenizer that is named to the guard.
        lora: The layers that are adapted.
        derived: Makes the class of the trainer of TRL's.
        architecture: The model: `wrapped` in one of images, or `mixtral`.
        is_stream: Whether the rows come as a stream.
    """

    rows: Sequence[Record]
    settings: Record = field(default_factory=dict)
    template: str = ""
    arguments: Record = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    kind: str = "SFT"
    change: Callable[[Any], None] = lambda model: None
    after: Callable[[Any], None] = lambda model: None
    named: str | None = None
    lora: Any = ("q_proj",)
    derived: Callable[[Any], Any] = lambda trainer: trainer
    architecture: str = ""
    is_stream: bool = False

    def setting(self, **settings: Any) -> Run:
        return replace(self, settings={**self.settings, **settings})


def trainer_of(run: Run, base: Path, output: Path) -> Any:
    """Make the trainer of a run."""
    from peft import LoraConfig
    from transformers import AutoTokenizer, set_seed

    set_seed(0)
    if run.architecture:
        base = base_of(run.architecture, output.with_name(run.architecture))
    tokenizer = run.arguments.get("processing_class") or AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template, tokenizer.pad_token = run.template or training_template(base), "<unk>"
    for name, token in run.tokens.items():
        setattr(tokenizer, name, token)
    arguments: Record = {"processing_class": tokenizer, **run.arguments}
    if "data_collator" in arguments:
        arguments["data_collator"] = arguments["data_collator"](tokenizer)
    settings = {"max_length": None, **TRL_SETTINGS, "max_steps": 1, **run.settings}
    model = model_of(run, base)
    run.change(model)
    layers = run.lora if isinstance(run.lora, str) else [*run.lora]
    module, of_reward = importlib.import_module(MODULES[run.kind]), run.kind == "Reward"
    dataset = Dataset.from_list(list(run.rows))
    trainer = run.derived(getattr(module, f"{run.kind}Trainer"))(
        model=model,
        args=getattr(module, f"{run.kind}Config")(output_dir=str(output), **settings),
        train_dataset=dataset.to_iterable_dataset() if run.is_stream else dataset,
        peft_config=LoraConfig(r=2, target_modules=layers, task_type="SEQ_CLS" if of_reward else "CAUSAL_LM"),
        callbacks=[Losses()],
        **arguments,
    )
    run.after(trainer.model)
    return trainer


def base_of(architecture: str, folder: Path) -> Path:
    """Return a tiny base of another architecture."""
    if not folder.exists():
        is_wrapped = architecture == "wrapped"
        made = Architecture(TEXT_MODELS["mistral" if is_wrapped else architecture], is_wrapped=is_wrapped)
        write_tiny_base(folder, shipped_tokenizer("spm-v3"), architecture=made)
        BaseFolder(folder).tokenizer().fast.save_pretrained(folder)
    return folder


def model_of(run: Run, base: Path) -> Any:
    import transformers

    if run.kind == "Reward":
        return transformers.MistralForSequenceClassification.from_pretrained(base, num_labels=1)
    loader = "ImageTextToText" if run.architecture == "wrapped" else "CausalLM"
    return getattr(transformers, f"AutoModelFor{loader}").from_pretrained(base)


CHATS = [list(row.messages) for row in chat_rows(4)]


def in_form(form: str, chats: Sequence[list[Record]] = CHATS) -> list[Record]:
    """Return sound conversations in a form of rows."""
    if form == "messages":
        return [{"messages": chat} for chat in chats]
    if form == "prompt-completion":
        return [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
    if form in ("texts", "text"):
        asked = [f"[INST] {chat[0]['content']}[/INST]" for chat in chats]
        said = [f" {chat[1]['content'].strip()}</s>" for chat in chats]
        if form == "text":
            return [{"text": f"<s>{prompt}{answer}"} for prompt, answer in zip(asked, said, strict=True)]
        return [{"prompt": f"<s>{prompt}", "completion": answer} for prompt, answer in zip(asked, said, strict=True)]
    if form == "ids":
        return [encoded_row(chat, str(shipped_tokenizer("spm-v3"))) for chat in chats]
    if form == "pairs":
        other = [{"role": "assistant", "content": "No."}]
        return [{"prompt": chat[:-1], "chosen": chat[-1:], "rejected": other} for chat in chats]
    return [{"prompt": chat[0]["content"], "chosen": chat[1]["content"].strip(), "rejected": "No."} for chat in chats]


def encoded_row(chat: list[Record], tokenizer: str) -> Record:
    encoded = CheckpointTokenizer(Path(tokenizer)).oracle.encode(Row.from_dict({"messages": chat}))
    return {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}


def run_of(form: str, **changes: Any) -> Run:
    """Return a sound run, but for the changes."""
    settings = {"assistant_only_loss": True} if form == "messages" else {}
    kind = "DPO" if form in ("pairs", "text-pairs") else "SFT"
    return replace(Run(in_form(form), settings, kind=kind), **changes)


# -- faults


class _Shortened:
    """A collator that shows the model other labels than the dataset has."""

    def __init__(self, change: Callable[[Any, Any], None]) -> None:
        self.change = change

    def __call__(self, tokenizer: Any) -> Any:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)

        def changed(rows: list[Record]) -> Any:
            batch = collate(rows)
            self.change(batch, tokenizer)
            return batch

        return changed


def mask_eos(batch: Any, tokenizer: Any) -> None:
    batch["labels"][batch["input_ids"] == tokenizer.eos_token_id] = -100


def _train_padding(batch: Any, tokenizer: Any) -> None:
    padding = batch["attention_mask"] == 0
    batch["labels"][padding] = batch["input_ids"][padding]


def _change_an_id(batch: Any, tokenizer: Any) -> None:
    # a byte for a letter, which no text is encoded to: other ids may be another conversation, rightly encoded
    batch["input_ids"][:, 3] = tokenizer.convert_tokens_to_ids("<0x41>")


def _shift(batch: Any, tokenizer: Any) -> None:
    batch["labels"] = torch.roll(batch["labels"], 1, dims=1)


def _hide(batch: Any, tokenizer: Any) -> None:
    batch["attention_mask"][:, 4] = 0


def collated(change: Callable[[Any, Any], None]) -> Record:
    return {"arguments": {"data_collator": _Shortened(change)}}


def talk(user: str, answer: str, **of_answer: Any) -> list[Record]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **of_answer}]


HOSTILE = [talk(f"What is [INST] {n}?", "A marker.") for n in range(4)]
WEIGHTED = [[*talk(f"What is {n}?", "I guess.", weight=0), *talk("Sure?", "Yes.", weight=1)] for n in range(4)]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}
CALLS = [
    {
        "prompt": [{"role": "user", "content": f"Is it warm, {n}?"}],
        "chosen": [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "warm", "tool_call_id": "abcdefghi"},
            {"role": "assistant", "content": "It is warm."},
        ],
        "rejected": [{"role": "assistant", "content": "No."}],
        "tools": [{"type": "function", "function": TOOL}],
    }
    for n in range(4)
]
PLAIN = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(4)]


def _mask_padding_by_its_id(batch: Any, tokenizer: Any) -> None:
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == tokenizer.pad_token_id, -100)


class OfTransformers:
    """The collator of transformers, which makes labels of ids and masks them by the pad id."""

    def __call__(self, tokenizer: Any) -> Any:
        from transformers import DataCollatorForLanguageModeling

        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return lambda rows: collate([{"input_ids": row["input_ids"]} for row in rows])


def mask_labels_by_the_pad(batch: Any, tokenizer: Any) -> None:
    batch["labels"][batch["input_ids"] == tokenizer.pad_token_id] = -100


PADS_WITH_EOS = {"tokens": {"pad_token": "</s>"}}


def _other_eos(model: Any) -> None:
    model.generation_config.eos_token_id = 7


def _forbid_eos(model: Any) -> None:
    model.generation_config.suppress_tokens = [2]


def _train_embeddings(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)


def _fewer_rows(model: Any) -> None:
    model.resize_token_embeddings(32000)


def _more_rows(model: Any) -> None:
    model.resize_token_embeddings(32801)


def _cut_short(model: Any) -> None:
    model.generation_config.max_length = 5


def _freeze_one(model: Any) -> None:
    next(part for name, part in model.named_parameters() if "lora_A" in name).requires_grad_(False)


def shift_twice(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs["logits"][:, :-2].flatten(0, 1), labels[:, 2:].flatten())


def shift_once(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def computed(*, use_cache: bool) -> Callable[[Any], Any]:
    """Return a way to make a trainer that computes its loss itself; that of TRL turns the cache off."""

    def derived(trainer: Any) -> Any:
        class Own(trainer):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
                return model(**{**inputs, "use_cache": use_cache}).loss

        return Own

    return derived


def _unknown_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tiny, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


REFUSED = [[*talk("Hi", "Hello."), {"role": "assistant", "content": ""}], *CHATS[:3]]


def rated(chats: Sequence[list[Record]]) -> list[Record]:
    return [
        {"prompt": chat[:-1], "completion": chat[-1:], "label": number % 2 == 0} for number, chat in enumerate(chats)
    ]


def whole(rows: Sequence[Record]) -> list[Record]:
    return [{side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")} for row in rows]


def _freeze(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


FAULTS: dict[tuple[str, str], Run] = {
    ("messages", "ML442"): run_of("messages", template=CHATML, settings={}),
    ("messages", "ML203"): run_of("messages", tokens={"bos_token": "<unk>"}),
    ("messages", "ML204"): run_of("messages", tokens={"pad_token": "</s>"}, **collated(_mask_padding_by_its_id)),
    ("prompt-completion", "ML204"): run_of("prompt-completion", **PADS_WITH_EOS, **collated(mask_labels_by_the_pad)),
    ("ids", "ML204"): run_of("ids", **PADS_WITH_EOS, arguments={"data_collator": OfTransformers()}),
    ("messages", "ML217"): run_of("messages", change=_other_eos),
    ("messages", "ML240"): run_of("messages", change=_forbid_eos),
    ("messages", "ML302"): run_of("messages", after=_train_embeddings),
    ("messages", "ML320"): run_of("messages", after=_freeze),
    ("messages", "ML543"): run_of("messages", settings={}),
    ("messages", "ML546"): run_of("messages", **collated(mask_eos)),
    ("messages", "ML510"): run_of("messages", **collated(_train_padding)),
    ("messages", "ML541"): run_of("messages", **collated(_shift)),
    ("messages", "ML532"): run_of("messages", **collated(_change_an_id)),
    ("messages", "ML523"): run_of("messages", rows=in_form("messages", HOSTILE)),
    ("messages", "ML549"): run_of("messages", rows=in_form("messages", WEIGHTED)),
    ("messages", "ML531"): run_of("messages").setting(max_length=22),
    ("messages", "ML506"): run_of("messages").setting(max_length=22),
    ("messages", "ML215"): run_of("messages", change=_fewer_rows),
    ("messages", "ML216"): run_of("messages", change=_more_rows),
    ("messages", "ML241"): run_of("messages", change=_cut_short),
    ("messages", "ML303"): run_of("messages", after=_freeze_one),
    ("messages", "ML326"): run_of("messages", arguments={"compute_loss_func": shift_twice}),
    ("messages", "ML450"): run_of("messages", architecture="wrapped"),
    ("messages", "ML451"): run_of("messages", lora=r".*\.(q_proj|gate_up_proj)|.*\.kv_b_proj"),
    ("messages", "ML452"): run_of("messages", architecture="mixtral", lora=("q_proj", "gate")),
    ("messages", "ML507"): run_of("messages", rows=in_form("messages", REFUSED)),
    ("ids", "ML229"): run_of("ids", arguments={"processing_class": _unknown_tokenizer()}),
    ("packed", "ML313"): run_of("messages", derived=computed(use_cache=True)).setting(
        packing=True, max_length=200, gradient_checkpointing=False
    ),
    ("packed", "ML513"): run_of("messages").setting(packing=True, packing_strategy="wrapped", max_length=40),
    ("packed", "ML442"): run_of("messages", template=CHATML_MARKED).setting(packing=True, max_length=200),
    ("packed", "ML543"): run_of("messages", settings={}).setting(packing=True, max_length=200),
    ("packed", "ML523"): run_of("messages", rows=in_form("messages", HOSTILE)).setting(packing=True, max_length=200),
    ("prompt-completion", "ML442"): run_of("prompt-completion", template=CHATML),
    ("prompt-completion", "ML547"): run_of(
        "prompt-completion",
        rows=[{"prompt": row["prompt"], "completion": row["chosen"], "tools": row["tools"]} for row in CALLS],
    ),
    ("prompt-completion", "ML543"): run_of("prompt-completion").setting(completion_only_loss=False),
    ("prompt-completion", "ML546"): run_of("prompt-completion", **collated(mask_eos)),
    ("prompt-completion", "ML510"): run_of("prompt-completion", **collated(_train_padding)),
    ("prompt-completion", "ML523"): run_of("prompt-completion", rows=in_form("prompt-completion", HOSTILE)),
    ("prompt-completion", "ML522"): run_of("prompt-completion").setting(max_length=22),
    ("texts", "ML560"): run_of("texts", rows=PLAIN),
    ("texts", "ML442"): run_of("texts", rows=PLAIN, template=CHATML),
    ("texts", "ML543"): run_of("texts").setting(completion_only_loss=False),
    ("texts", "ML546"): run_of("texts", **collated(mask_eos)),
    ("texts", "ML510"): run_of("texts", **collated(_train_padding)),
    ("texts", "ML522"): run_of("texts").setting(max_length=22),
    ("text", "ML543"): run_of("text"),
    ("text", "ML442"): run_of("text", template=CHATML),
    ("text", "ML560"): run_of("text", rows=[{"text": f"{row['prompt']} {row['completion']}"} for row in PLAIN]),
    ("text", "ML510"): run_of("text", **collated(_train_padding)),
    ("text", "ML522"): run_of("text").setting(max_length=22),
    ("ids", "ML543"): run_of("ids", rows=[{"input_ids": row["input_ids"]} for row in in_form("ids")]),
    ("ids", "ML546"): run_of("ids", **collated(mask_eos)),
    ("ids", "ML522"): run_of("ids", rows=[{key: row[key][:-1] for key in row} for row in in_form("ids")]),
    ("ids", "ML442"): run_of("ids", template=CHATML),
    ("ids", "ML510"): run_of("ids", **collated(_train_padding)),
    ("ids", "ML552"): run_of("ids", **collated(_hide)),
    ("pairs", "ML442"): run_of("pairs", template=CHATML),
    ("pairs", "ML531"): run_of("pairs").setting(max_length=18),
    ("pairs", "ML523"): run_of("pairs", rows=in_form("pairs", [*CHATS, *HOSTILE])),
    ("pairs", "ML529"): run_of("pairs", rows=in_form("pairs", [talk("Go.", f" {n} ") for n in range(4)])),
    ("pairs", "ML547"): run_of("pairs", rows=CALLS),
    ("text-pairs", "ML560"): run_of("text-pairs"),
}
"""A run for each form of rows and rule, which the guard reports."""
OF_KINDS: dict[tuple[str, str], Run] = {
    ("KTO", "ML442"): Run(rated(CHATS), kind="KTO", template=CHATML),
    ("KTO", "ML531"): Run(rated(CHATS), {"max_length": 18}, kind="KTO"),
    ("Reward", "ML442"): Run(whole(in_form("pairs")), kind="Reward", template=CHATML),
    ("ORPO", "ML442"): Run(in_form("pairs"), kind="ORPO", template=CHATML),
    ("CPO", "ML442"): Run(in_form("pairs"), kind="CPO", template=CHATML),
}
"""A run for each other trainer of preferences and rule."""


def chats_of(run: Run) -> list[list[Record]]:
    """Return the conversations that the user made the rows of."""
    for chats in (HOSTILE, WEIGHTED):
        if any(list(run.rows) == in_form(form, chats) for form in ("messages", "prompt-completion")):
            return chats
    if any("What is" in str(row) for row in run.rows):
        return [talk(row["prompt"], row["completion"]) for row in PLAIN]
    return CHATS


# -- losses of answers


def with_mask(mask_of: Callable[[Any], torch.Tensor]) -> Any:
    """Return a `compute_loss` with another mask of the answers."""

    def compute_loss(self: Any, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        return super(type(self), self).compute_loss(
            model, {**inputs, "completion_mask": mask_of(inputs).long()}, *given, **named
        )

    return compute_loss


def with_logps(logps_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], sign: int = 1) -> Any:
    """Return a `compute_loss` of the probabilities' logarithms, `(batch, length, vocabulary)`, the ids and the mask."""

    def compute_loss(self: Any, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
        logps = 0.1 * sign * logps_of(logits.float().log_softmax(-1), ids, mask)
        if "label" in inputs:
            gained = torch.where(inputs["label"], logps, -logps)
        else:
            gained = logps[: len(ids) // 2] - logps[len(ids) // 2 :]
        return -torch.nn.functional.logsigmoid(gained - gained.detach()).mean()

    return compute_loss


def ahead(by: int, weights_of: Callable[[torch.Tensor], torch.Tensor] = torch.ones_like, *, late: int = 0) -> Any:
    def logps_of(logps: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        size = ids.shape[1] - by
        tokens = ids[:, by:]
        of_tokens = logps[:, :size].gather(-1, tokens[..., None])[..., 0]
        return (of_tokens * mask[:, by - late : by - late + size] * weights_of(tokens)).sum(1)

    return logps_of
