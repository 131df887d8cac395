"""Rules of the subject `mask`: the laws of an encoded row."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule
from pytest_mistral_lora.conformance.rules.mask_pairs import RULES as _PAIRS

_FINETUNE = "mistral-finetune, finetune/data/tokenize.py"
_ORACLE = "mistral-common, tokens/tokenizers/instruct.py"

RULES = (
    Rule(
        "ML101",
        "Spans partition the row, and labels are what the spans say: the token's own id or -100.",
        "mask",
        "A mask that is shifted by one or has holes trains on the wrong tokens.",
        "Compute labels from the turn that each token was encoded for.",
        "PyTorch cross_entropy, ignore_index",
        bad=('after = lambda made: made | {"labels": [-100, *made["labels"][:-1]]}'),
        good=('after = lambda made: made | {"labels": [*made["labels"]]}'),
    ),
    Rule(
        "ML102",
        "No token of the system, the user or a tool is supervised, nor BOS.",
        "mask",
        "The model learns to speak for the user.",
        "Supervise assistant turns only; never search for marker strings or compare prefixes.",
        _FINETUNE,
        bad=('after = lambda made: supervised(made, lambda span: span["role"] in ("user", "assistant"))'),
        good=('after = lambda made: supervised(made, lambda span: span["role"] == "assistant")'),
    ),
    Rule(
        "ML103",
        "Every token of an assistant turn of weight 1 is supervised, and none of weight 0.",
        "mask",
        "Parts of the answer are not learned, or a bad answer is.",
        "Supervise the turn from its first token to EOS; carry the weight of each message through.",
        _FINETUNE,
        bad=(
            'row["messages"][-1]["weight"] = 0\n'
            'after = lambda made: supervised(made, lambda span: span["role"] == "assistant")'
        ),
        good=('row["messages"][-1]["weight"] = 0'),
    ),
    Rule(
        "ML104",
        "Every supervised turn ends with a supervised EOS.",
        "mask",
        "The model never learns to stop.",
        "Do not mask the pad id where pad is EOS; do not cut a turn before its EOS.",
        "huggingface/transformers#23530",
        bad=('after = lambda made: supervised(made, lambda span: span["supervised"] and span["kind"] != "eos")'),
        good=('after = lambda made: supervised(made, lambda span: span["supervised"])'),
    ),
    Rule(
        "ML105",
        "BOS stands once, in front.",
        "mask",
        "A template that writes BOS and a tokenizer that adds it give two.",
        "Encode rendered text with add_special_tokens=False.",
        "vllm-project/vllm#16976",
        bad=("bos = tokenizer.bos_id\nafter = lambda made: with_ids(made, 0, [bos, bos])"),
        good=("bos = tokenizer.bos_id\nafter = lambda made: with_ids(made, 0, [bos])"),
    ),
    Rule(
        "ML106",
        "Text never becomes a control token.",
        "mask",
        "A user can forge a turn or an EOS; the model is trained on it.",
        "Encode texts apart from the control tokens, as mistral-common does.",
        "huggingface/transformers#29279",
        bad=(
            "eos = tokenizer.eos_id  # as if the answer had spelled it\n"
            'after = lambda made: with_ids(made, made["spans"][-2]["start"], [eos])'
        ),
        good=('row["messages"][-1]["content"] = "</s>"'),
    ),
    Rule(
        "ML107",
        "A second, independent mask, read off the control tokens, agrees with the labels.",
        "mask",
        "Two ways to the same mask that disagree mean that one is wrong.",
        "Report it with the row.",
        _ORACLE,
        bad=('after = lambda made: supervised(made, lambda span: span["kind"] == "eos")'),
        good=('after = lambda made: supervised(made, lambda span: span["role"] == "assistant")'),
    ),
    Rule(
        "ML108",
        "The weights of alternating messages change no id.",
        "mask",
        "Masking a turn must not change the prompt.",
        "Keep weights out of the rendering.",
        _FINETUNE,
        bad=(
            'row = {"messages": [question, answer | {"weight": 0}, question, answer]}\n'
            'before = lambda row: row | {"messages": [m | {"content": str(m)} for m in row["messages"]]}'
        ),
        good=('row = {"messages": [question, answer | {"weight": 0}, question, answer]}'),
    ),
    Rule(
        "ML109",
        "What is supervised decodes to what the assistant says.",
        "mask",
        "The model is trained on a text that is not in the dataset.",
        "Compare the decoded span with the message; look for a wrong tokenizer or a wrong span.",
        _ORACLE,
        bad=(
            'never = tokenizer.encode_text("Never")[:1]\n'
            'after = lambda made: with_ids(made, made["spans"][-2]["start"], never)'
        ),
        good=(
            'it = tokenizer.encode_text("It is mild.")[:1]\n'
            'after = lambda made: with_ids(made, made["spans"][-2]["start"], it)'
        ),
    ),
    Rule(
        "ML110",
        "A tool call is supervised from its marker to EOS.",
        "mask",
        "Without the marker the model never starts a call.",
        "Supervise [TOOL_CALLS] and what follows it.",
        _FINETUNE,
        bad=("after = marker_apart"),
        good=("after = lambda made: made"),
    ),
    Rule(
        "ML111",
        "Encoding a row twice gives the same, and leaves the row as it was.",
        "mask",
        "A row that changes while it is encoded is trained on differently in the second epoch.",
        "Encode a copy.",
        "general",
        bad=(
            "turn = iter([True, False] * 50)\n"
            "after = lambda made: made if next(turn) else supervised(made, lambda span: False)"
        ),
        good=("after = lambda made: made"),
    ),
    Rule(
        "ML112",
        "The prompt at inference is the beginning of the row in training.",
        "mask",
        "The model is asked in another way than it was trained.",
        "Build the prompt by the same code as the training row.",
        _ORACLE,
        bad=("prompt = lambda row, tokenizer: tokenizer.encode_prompt(row)[1:]"),
        good=("prompt = lambda row, tokenizer: tokenizer.encode_prompt(row)"),
    ),
    *_PAIRS,
)
