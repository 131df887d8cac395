"""Rules of the subject `mask`: laws that look at two encodings, or hold one to mistral-common."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule

RULES = (
    Rule(
        "ML113",
        "Arguments of a tool call as an object, as its JSON and as that JSON written otherwise give equal ids.",
        "mask",
        "Two datasets with the same calls train differently, and one exporter's escapes become the model's.",
        "Parse arguments and write them again; give a template that pastes them an object.",
        "mistral-common, protocol/instruct/normalize.py",
        bad=("before = lambda row: pasted(row)  # arguments that are a string, as they are"),
        good=("before = lambda row: row"),
    ),
    Rule(
        "ML114",
        "`strict` in a tool changes no id.",
        "mask",
        "A flag for the server's decoder would change the prompt.",
        "Leave `strict` out of the rendering, as mistral-common does.",
        "mistral-common, protocol/instruct/normalize.py",
        bad=(
            'row["tools"][0]["function"]["strict"] = True\n'
            'before = lambda row: row | {"tools": [told(tool, str(tool)) for tool in row["tools"]]}'
        ),
        good=('row["tools"][0]["function"]["strict"] = True'),
    ),
    Rule(
        "ML115",
        "From v11 on, results of parallel tool calls give the same ids in any order.",
        "mask",
        "Where a result no longer shows its call's id, another order pairs it with another call.",
        "Put tool results in the order of the calls before they are rendered.",
        "mistral-common, protocol/instruct/normalize.py",
        bad=(
            "tokenizer = newer_tokenizer\n"
            "before = lambda row: renamed(row)  # ids of calls in the order of their results"
        ),
        good=("tokenizer = newer_tokenizer\nbefore = lambda row: row"),
    ),
    Rule(
        "ML116",
        "Neighbouring messages of the user, or of the assistant, are one turn: texts with a blank line between.",
        "mask",
        "A template that refuses or joins them otherwise trains on another prompt than the server builds.",
        "Join neighbours with a blank line before they are rendered.",
        "vllm-project/vllm#6862",
        bad=('before = lambda row: said(row, lambda text: text.replace("\\n\\n", " "))'),
        good=("before = lambda row: said(row, lambda text: text)"),
    ),
    Rule(
        "ML117",
        "One more question and answer change no earlier turn of the assistant, nor its labels.",
        "mask",
        "A mask from prefixes is wrong where the system prompt or the tools stand beside the last question.",
        "Encode the whole conversation once, and take the mask from the turn that each token was encoded for.",
        "huggingface/trl#5213",
        bad=('after = lambda made: supervised(made, lambda span: span["turn"] == made["spans"][-1]["turn"])'),
        good=('after = lambda made: supervised(made, lambda span: span["role"] == "assistant")'),
    ),
    Rule(
        "ML118",
        "What the system messages say is in the row.",
        "mask",
        "The model is trained without the instructions that it is served with.",
        "Use a template that renders the system prompt also where the row ends with an answer.",
        "axolotl-ai-cloud/axolotl#3736",
        bad=('before = lambda row: row | {"messages": [m for m in row["messages"] if m["role"] != "system"]}'),
        good=('before = lambda row: row | {"messages": [*row["messages"]]}'),
    ),
    Rule(
        "ML119",
        "A row's ids are those that mistral-common gives when it is called as its documentation does.",
        "mask",
        "Every other law could hold for ids that no Mistral model was trained on.",
        "Report it with the row and the version of mistral-common.",
        "mistral-common, tokens/tokenizers/mistral.py",
        bad=("before = lambda row: said(row, str.lower)"),
        good=("before = lambda row: said(row, str)"),
    ),
    Rule(
        "ML120",
        "A conversation is refused exactly where mistral-common refuses it, and for the same reason.",
        "mask",
        "What training accepts and a server refuses cannot be served; what training refuses is lost.",
        "Validate for finetuning: a row ends with an answer, and tool-call ids have nine letters or digits.",
        "vllm-project/vllm#9019, mistralai/mistral-common#148",
        bad=(
            'row["messages"] = row["messages"][:-1]  # it ends with a tool result\n'
            'before = lambda row: row | {"messages": [*row["messages"], answer]}'
        ),
        good=('row["messages"] = row["messages"][:-1]  # it is refused'),
    ),
    Rule(
        "ML121",
        "mistral-common builds conversations from the per-message encoders that this version knows.",
        "mask",
        "After a change of its interface, labels would be laid over the wrong tokens, or an import would fail.",
        "Pin mistral-common to a supported version, or use a newer version of this package.",
        "mistralai/mistral-finetune#110",
        bad=("tokenizer = changed_tokenizer"),
        good=("tokenizer = newer_tokenizer"),
    ),
)
