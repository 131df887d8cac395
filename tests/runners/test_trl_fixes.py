"""Each fix that the guard prints for a run of TRL, followed: the run is then green."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from faulty_templates import CHATML, CHATML_MARKED
from guarded_runs import TRL_SETTINGS, chat_rows

from pytest_mistral_lora import CheckpointTokenizer, GuardError, Row, guard, training_template
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.guarding.forms import fixes_of
from pytest_mistral_lora.guarding.steps import LOSS, PACKING
from pytest_mistral_lora.guarding.verdict import OF_ANY
from pytest_mistral_lora.programs.fixes import fixes_in
from pytest_mistral_lora.runners import TRAINERS

trl = pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

# TRL, PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

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

    def setting(self, **settings: Any) -> Run:
        return replace(self, settings={**self.settings, **settings})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_base(tmp_path_factory.mktemp("trl") / "base", shipped_tokenizer("spm-v3"))
    BaseFolder(folder).tokenizer().fast.save_pretrained(folder)
    return folder


def findings_of(run: Run, base: Path, output: Path) -> list[Any]:
    """Return the findings of the guard on a run that it may stop."""
    from peft import LoraConfig
    from transformers import AutoTokenizer

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
    trainer = run.derived(getattr(module, f"{run.kind}Trainer"))(
        model=model,
        args=getattr(module, f"{run.kind}Config")(output_dir=str(output), **settings),
        train_dataset=Dataset.from_list(list(run.rows)),
        peft_config=LoraConfig(r=2, target_modules=layers, task_type="SEQ_CLS" if of_reward else "CAUSAL_LM"),
        **arguments,
    )
    run.after(trainer.model)
    callback = guard(trainer, tokenizer=run.named)
    with suppress(GuardError):
        trainer.train()
    assert callback.verdict is not None
    return list(callback.verdict.findings)


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


def _mask_eos(batch: Any, tokenizer: Any) -> None:
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


def _said(user: str, answer: str, **of_answer: Any) -> list[Record]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **of_answer}]


LONG = "The colour of a clear and quiet sea on a warm day in the early summer of the year is blue"
HOSTILE = [_said(f"What is [INST] {n}?", "A marker.") for n in range(4)]
WEIGHTED = [[*_said(f"What is {n}?", "I guess.", weight=0), *_said("Sure?", "Yes.", weight=1)] for n in range(4)]
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


class _OfTransformers:
    """The collator of transformers, which makes labels of ids and masks them by the pad id."""

    def __call__(self, tokenizer: Any) -> Any:
        from transformers import DataCollatorForLanguageModeling

        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return lambda rows: collate([{"input_ids": row["input_ids"]} for row in rows])


def _mask_labels_by_the_pad(batch: Any, tokenizer: Any) -> None:
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


def _shift_twice(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs["logits"][:, :-2].flatten(0, 1), labels[:, 2:].flatten())


def _shift_once(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _computed(*, use_cache: bool) -> Callable[[Any], Any]:
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


REFUSED = [[*_said("Hi", "Hello."), {"role": "assistant", "content": ""}], *CHATS[:3]]


def _rated(chats: Sequence[list[Record]]) -> list[Record]:
    return [
        {"prompt": chat[:-1], "completion": chat[-1:], "label": number % 2 == 0} for number, chat in enumerate(chats)
    ]


def _whole(rows: Sequence[Record]) -> list[Record]:
    return [{side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")} for row in rows]


def _freeze(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


FAULTS: dict[tuple[str, str], Run] = {
    ("messages", "ML442"): run_of("messages", template=CHATML, settings={}),
    ("messages", "ML203"): run_of("messages", tokens={"bos_token": "<unk>"}),
    ("messages", "ML204"): run_of("messages", tokens={"pad_token": "</s>"}, **collated(_mask_padding_by_its_id)),
    ("prompt-completion", "ML204"): run_of("prompt-completion", **PADS_WITH_EOS, **collated(_mask_labels_by_the_pad)),
    ("ids", "ML204"): run_of("ids", **PADS_WITH_EOS, arguments={"data_collator": _OfTransformers()}),
    ("messages", "ML217"): run_of("messages", change=_other_eos),
    ("messages", "ML240"): run_of("messages", change=_forbid_eos),
    ("messages", "ML302"): run_of("messages", after=_train_embeddings),
    ("messages", "ML320"): run_of("messages", after=_freeze),
    ("messages", "ML543"): run_of("messages", settings={}),
    ("messages", "ML546"): run_of("messages", **collated(_mask_eos)),
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
    ("messages", "ML326"): run_of("messages", arguments={"compute_loss_func": _shift_twice}),
    ("messages", "ML450"): run_of("messages", architecture="wrapped"),
    ("messages", "ML451"): run_of("messages", lora=r".*\.(q_proj|gate_up_proj)|.*\.kv_b_proj"),
    ("messages", "ML452"): run_of("messages", architecture="mixtral", lora=("q_proj", "gate")),
    ("messages", "ML507"): run_of("messages", rows=in_form("messages", REFUSED)),
    ("ids", "ML229"): run_of("ids", arguments={"processing_class": _unknown_tokenizer()}),
    ("packed", "ML313"): run_of("messages", derived=_computed(use_cache=True)).setting(
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
    ("prompt-completion", "ML546"): run_of("prompt-completion", **collated(_mask_eos)),
    ("prompt-completion", "ML510"): run_of("prompt-completion", **collated(_train_padding)),
    ("prompt-completion", "ML523"): run_of("prompt-completion", rows=in_form("prompt-completion", HOSTILE)),
    ("prompt-completion", "ML522"): run_of("prompt-completion").setting(max_length=22),
    ("texts", "ML560"): run_of("texts", rows=PLAIN),
    ("texts", "ML442"): run_of("texts", rows=PLAIN, template=CHATML),
    ("texts", "ML543"): run_of("texts").setting(completion_only_loss=False),
    ("texts", "ML546"): run_of("texts", **collated(_mask_eos)),
    ("texts", "ML510"): run_of("texts", **collated(_train_padding)),
    ("texts", "ML522"): run_of("texts").setting(max_length=22),
    ("text", "ML543"): run_of("text"),
    ("text", "ML442"): run_of("text", template=CHATML),
    ("text", "ML560"): run_of("text", rows=[{"text": f"{row['prompt']} {row['completion']}"} for row in PLAIN]),
    ("text", "ML510"): run_of("text", **collated(_train_padding)),
    ("text", "ML522"): run_of("text").setting(max_length=22),
    ("ids", "ML543"): run_of("ids", rows=[{"input_ids": row["input_ids"]} for row in in_form("ids")]),
    ("ids", "ML546"): run_of("ids", **collated(_mask_eos)),
    ("ids", "ML522"): run_of("ids", rows=[{key: row[key][:-1] for key in row} for row in in_form("ids")]),
    ("ids", "ML442"): run_of("ids", template=CHATML),
    ("ids", "ML510"): run_of("ids", **collated(_train_padding)),
    ("ids", "ML552"): run_of("ids", **collated(_hide)),
    ("pairs", "ML442"): run_of("pairs", template=CHATML),
    ("pairs", "ML531"): run_of("pairs").setting(max_length=18),
    ("pairs", "ML523"): run_of("pairs", rows=in_form("pairs", [*CHATS, *HOSTILE])),
    ("pairs", "ML529"): run_of("pairs", rows=in_form("pairs", [_said("Go.", f" {n} ") for n in range(4)])),
    ("pairs", "ML547"): run_of("pairs", rows=CALLS),
    ("text-pairs", "ML560"): run_of("text-pairs"),
}
"""A run for each form of rows and rule, which the guard reports."""
OF_KINDS: dict[tuple[str, str], Run] = {
    ("KTO", "ML442"): Run(_rated(CHATS), kind="KTO", template=CHATML),
    ("KTO", "ML531"): Run(_rated(CHATS), {"max_length": 18}, kind="KTO"),
    ("Reward", "ML442"): Run(_whole(in_form("pairs")), kind="Reward", template=CHATML),
    ("ORPO", "ML442"): Run(in_form("pairs"), kind="ORPO", template=CHATML),
    ("CPO", "ML442"): Run(in_form("pairs"), kind="CPO", template=CHATML),
}
"""A run for each other trainer of preferences and rule."""


# -- what a user does whom a fix tells so


def _set(name: str, value: Any) -> Callable[[Run, str], Run]:
    return lambda run, fix: run.setting(**{name: value})


def _write_template(run: Run, fix: str) -> Run:
    [command] = re.findall(r"`(mistral-lora template [^`]*)`", fix)
    Path("training.jinja").unlink(missing_ok=True)
    assert main(shlex.split(command)[1:]) == 0
    return run.setting(chat_template_path="training.jinja")


def _set_template(run: Run, fix: str) -> Run:
    [path] = re.findall(r"chat_template = training_template\((.*?)\)`", fix)
    return replace(run, template=training_template(ast.literal_eval(path)))


def _leave_out_collator(run: Run, fix: str) -> Run:
    return replace(run, arguments={})


def _chats_of(run: Run) -> list[list[Record]]:
    """Return the conversations that the user made the rows of."""
    for chats in (HOSTILE, WEIGHTED):
        if any(list(run.rows) == in_form(form, chats) for form in ("messages", "prompt-completion")):
            return chats
    if any("What is" in str(row) for row in run.rows):
        return [_said(row["prompt"], row["completion"]) for row in PLAIN]
    return CHATS


def _give_ids(run: Run, fix: str) -> Run:
    [path] = re.findall(r"CheckpointTokenizer\((.*?)\)\.oracle", fix)
    rows = [encoded_row(chat, ast.literal_eval(path)) for chat in _chats_of(run)]
    return replace(run, rows=rows, settings={**run.settings, "assistant_only_loss": False})


def _give_messages(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("messages", _chats_of(run)))


def _give_prompt_and_completion(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("prompt-completion", _chats_of(run)))


def _leave_out_hostile(run: Run, fix: str) -> Run:
    return replace(run, rows=[row for row in run.rows if "[INST]" not in str(row["prompt"])])


def _strip_answers(run: Run, fix: str) -> Run:
    def stripped(said: list[Record]) -> list[Record]:
        return [message | {"content": message["content"].rstrip(" ")} for message in said]

    return replace(run, rows=[row | {side: stripped(row[side]) for side in ("chosen", "rejected")} for row in run.rows])


def _move_calls(run: Run, fix: str) -> Run:
    rows = [row | {"prompt": row["prompt"] + row["chosen"][:-1], "chosen": row["chosen"][-1:]} for row in run.rows]
    return replace(run, rows=rows)


def _give_pairs(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("pairs"))


def _set_tokens(run: Run, fix: str) -> Run:
    return replace(run, tokens={})


def _set_ids(run: Run, fix: str) -> Run:
    def set_ids(model: Any) -> None:
        model.config.bos_token_id = model.generation_config.bos_token_id = 1
        model.config.eos_token_id = model.generation_config.eos_token_id = 2

    return replace(run, change=set_ids)


def _allow_eos(run: Run, fix: str) -> Run:
    def allow(model: Any) -> None:
        run.change(model)
        model.generation_config.suppress_tokens, model.generation_config.eos_token_id = None, 2

    return replace(run, change=allow)


def _as_loaded(run: Run, fix: str) -> Run:
    return replace(run, after=lambda model: None)


def _leave_out_loss(run: Run, fix: str) -> Run:
    return replace(run, arguments={**run.arguments, "compute_loss_func": _shift_once})


def _ask_for_no_cache(run: Run, fix: str) -> Run:
    return replace(run, derived=_computed(use_cache=False))


def _unchanged(run: Run, fix: str) -> Run:
    return replace(run, change=lambda model: None)


def _adapt(run: Run, fix: str) -> Run:
    [layers] = re.findall(r"`target_modules=(.*?)`", fix)
    return replace(run, lora=ast.literal_eval(layers))


def _name_tokenizer(run: Run, fix: str) -> Run:
    [name] = re.findall(r"guard\(trainer, tokenizer=\"(.*?)\"\)", fix)
    return replace(run, named=name)


def _correct_rows(run: Run, fix: str) -> Run:
    return replace(run, rows=in_form("messages"))


STEPS: tuple[tuple[str, Callable[[Run, str], Run]], ...] = (
    ("Give ids in place of", _give_ids),
    ("give ids: columns `input_ids`", _give_ids),
    ("Leave out the rows that the finding names", _leave_out_hostile),
    ("Strip the answers", _strip_answers),
    ("Put calls and results into `prompt`", _move_calls),
    ("Make both anew, `input_ids` and `labels`", _give_ids),
    ("Give `messages` in its place", _give_messages),
    ("and `completion: [{", _give_prompt_and_completion),
    ('and `"completion": [{', _give_prompt_and_completion),
    ("and `chosen` and `rejected` alike", _give_pairs),
    ("`assistant_only_loss: true`", _set("assistant_only_loss", True)),
    ("`completion_only_loss: true`", _set("completion_only_loss", True)),
    ("`max_length: null`", _set("max_length", None)),
    ("`packing: false`", _set("packing", False)),
    ("`chat_template_path: training.jinja`", _write_template),
    ("chat_template = training_template(", _set_template),
    ('`tokenizer.eos_token = "</s>"`', _set_tokens),
    ('`tokenizer.pad_token = "<pad>"`', _set_tokens),
    ("`model.config.eos_token_id = 2`", _set_ids),
    ("`model.generation_config.suppress_tokens = None`", _allow_eos),
    ("`parameter.requires_grad_(False)`", _as_loaded),
    ("is_trainable=True", _as_loaded),
    ("once and where the label is not -100", _leave_out_loss),
    ("Set `use_cache=False`", _set("use_cache", False)),
    ("`compute_loss` of your own must not ask for a cache", _ask_for_no_cache),
    ("eave `resize_token_embeddings` out", _unchanged),
    ("Take the keys out of the model", _unchanged),
    ("`requires_grad_(True)` on them", _as_loaded),
    ("`target_modules=", _adapt),
    ("Name it: guard(", _name_tokenizer),
    ("Correct the row", _correct_rows),
    ("eave `data_collator`", _leave_out_collator),
)
"""The words of a fix that tell a step, and the step."""


def followed(run: Run, fix: str) -> Run:
    steps = [step for words, step in STEPS if words in fix]
    assert steps, fix
    for step in steps:
        run = step(run, fix)
    return run


@pytest.mark.parametrize(("form", "rule"), [*FAULTS, *OF_KINDS])
def test_the_run_is_green_once_its_fixes_are_followed(
    form: str, rule: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = (FAULTS | OF_KINDS)[form, rule]
    found = findings_of(run, base, tmp_path / "out")
    assert rule in {finding.rule for finding in found}
    for fix in dict.fromkeys(finding.next_step for finding in found):
        run = followed(run, fix)
    assert findings_of(run, base, tmp_path / "out") == []


@pytest.mark.parametrize("form", ["messages", "prompt-completion", "texts", "text", "ids"])
def test_a_pad_token_that_is_eos_is_the_one_cause_of_masked_eos(form: str, base: Path, tmp_path: Path) -> None:
    run = run_of(form, **PADS_WITH_EOS, **collated(_mask_labels_by_the_pad))
    first, *others = findings_of(run, base, tmp_path / "out")
    assert (first.rule, str(first.place), dict(first.covers)["ML546"]) == ("ML204", "processing_class", 4)
    # each token of a rendered text is trained on
    assert {finding.rule for finding in others} == ({"ML543"} if form == "text" else set())
    # with another pad token, the same collator masks no EOS
    after = findings_of(_set_tokens(run, first.next_step), base, tmp_path / "out")
    assert {finding.rule for finding in after} == {finding.rule for finding in others}


def test_a_fault_beside_a_pad_token_that_is_eos_stays(base: Path, tmp_path: Path) -> None:
    run = run_of("messages", **PADS_WITH_EOS, arguments={"data_collator": _OfTransformers()})
    first, *others = findings_of(run, base, tmp_path / "out")
    assert (first.rule, {rule for rule, _ in first.covers}) == ("ML204", {"ML204", "ML546", "ML547"})
    assert [finding.rule for finding in others] == ["ML543"] * 4
    assert {finding.rule for finding in findings_of(_set_tokens(run, ""), base, tmp_path / "out")} == {"ML543"}


def test_eos_that_the_dataset_has_masked_is_no_fault_of_the_pad_token(base: Path, tmp_path: Path) -> None:
    rows = [row | {"labels": [-100 if label == 2 else label for label in row["labels"]]} for row in in_form("ids")]
    found = findings_of(run_of("ids", rows=rows, **PADS_WITH_EOS), base, tmp_path / "out")
    assert "ML546" in {finding.rule for finding in found}
    assert {finding.covers for finding in found} == {()}


def test_eos_that_another_token_pads_is_masked_by_the_collator(base: Path, tmp_path: Path) -> None:
    found = findings_of(run_of("messages", **collated(_mask_eos)), base, tmp_path / "out")
    assert {finding.rule for finding in found} == {"ML546"}
    sound = run_of("messages", **PADS_WITH_EOS)
    assert findings_of(sound, base, tmp_path / "out") == []


def test_every_line_of_fixes_is_followed() -> None:
    lines = {(form, key): fix for form in FORMS for key, fix in TRAINERS["trl"].fixes(form).items()}
    lines |= {("guard", key): fix for key, fix in fixes_in(OF_ANY)["guard"].items() if key not in ("ML004", "ML442")}
    reached = {(form, fixes_of(TRAINERS["trl"], form).get(rule, "")) for form, rule in FAULTS}
    reached |= {("guard", fixes_in(OF_ANY)["guard"].get(rule, "")) for _, rule in FAULTS}
    assert {line for line, fix in lines.items() if (line[0], fix) not in reached} == set()


def test_every_fix_for_the_model_and_the_tokenizer_is_followed() -> None:
    checks = {
        "tokenizer": ("oracle", "bos-eos-unk", "model-config"),
        "adapter": ("placement",),
        "train": ("frozen-adapter-is-refused", "every-layer-moved", "only-lora-changed", LOSS, PACKING),
        "encoded": ("file",),
    }
    rules = {"ML313"} | {
        rule.id for subject, cases in checks.items() for case in cases for rule in RULES.of(subject, case)
    }
    # a declared oracle, the folder of an adapter, a loss that nothing explains, and files: nothing of a trainer
    rules -= {"ML230", "ML454", "ML327", "ML501", "ML570"}
    assert rules - {rule for _, rule in FAULTS} == {"ML453"}  # it has the line of ML452


def test_every_rule_of_rows_has_a_fix_in_the_words_of_each_form() -> None:
    cases = {"ids", "labels", "packing", "supervised-text"}
    rules = {rule.id for rule in RULES.of("encoded") if cases & set(rule.cases)}
    assert {(form, rule) for form in FORMS for rule in rules if rule not in fixes_of(TRAINERS["trl"], form)} == set()
