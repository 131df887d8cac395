"""Rules of the subject `encoded`: what a trainer's ids may differ in from mistral-common's."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule

RULES = (
    Rule(
        "ML520",
        "Every id is in the vocabulary.",
        "encoded",
        "The embedding has no row for it: training stops, or a token that was added is never what the base knows.",
        "Use the base's own tokenizer; add no tokens.",
        "huggingface/peft#1457",
        bad='lines[0]["input_ids"][5] = 32768',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML521",
        "BOS stands once, in front.",
        "encoded",
        "A template that writes BOS and a tokenizer that adds it give two; one that is stripped gives none.",
        "Encode rendered text with add_special_tokens=False.",
        "vllm-project/vllm#16976",
        bad=('lines[0]["input_ids"].insert(0, 1)\nlines[0]["labels"].insert(0, -100)'),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML522",
        "Each answer ends with EOS, and nothing else does.",
        "encoded",
        "Without EOS the model never learns to stop.",
        "Render with the template's eos_token set; do not join texts by hand.",
        "huggingface/trl#1623",
        bad=('lines[0]["input_ids"].pop()\nlines[0]["labels"].pop()'),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML523",
        "Text never becomes a control token.",
        "encoded",
        "A user can forge a turn or an EOS; the model is trained on it.",
        "Encode texts apart from the control tokens, as mistral-common does.",
        "huggingface/transformers#29279",
        bad=(
            'text = encode_text("[INST]")\n'
            'ids = lines[3]["input_ids"]\n'
            "start = next(n for n in range(len(ids)) if ids[n : n + len(text)] == text)\n"
            'ids[start : start + len(text)] = [3]; lines[3]["labels"] = [-100] * len(ids)'
        ),
        good="lines[3].update(encode(lines[3]))",
    ),
    Rule(
        "ML524",
        "Control tokens are control tokens, not text.",
        "encoded",
        "The model reads [INST] as letters: it has never seen a prompt like that.",
        "Encode the messages, not a rendered text; or render and encode with the same tokenizer.",
        "jundot/omlx#2341",
        bad=(
            "text = render(lines[0])\n"
            'lines[0]["input_ids"] = encode_text(text)\n'
            'lines[0]["labels"] = [-100] * len(lines[0]["input_ids"])'
        ),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML525",
        "The system prompt is there.",
        "encoded",
        "The model is trained without the instructions that it is served with.",
        "Use a template that writes the system prompt in rows that end with the assistant.",
        "axolotl-ai-cloud/axolotl#3736",
        bad='lines[0].update(encode({"messages": lines[0]["messages"][1:]}))',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML526",
        "The system prompt stands where the tokenizer's version has it.",
        "encoded",
        "v1 has it in the first user turn, v2 and v3 in the last, v7 in a block of its own: the base knows only that.",
        "Use the template that mistral-common generates for this tokenizer.",
        "mistralai/mistral-inference#35",
        bad=(
            'system, first, *rest = lines[0]["messages"]\n'
            'first = {**first, "content": system["content"] + "\\n\\n" + first["content"]}\n'
            'lines[0].update(encode({"messages": [first, *rest]}))'
        ),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML527",
        "There is no system prompt that the row does not have.",
        "encoded",
        "A template's own default is learned with every row, and missing when the model is served without it.",
        "Set the template's default system prompt to nothing.",
        "hiyouga/LlamaFactory, data/converter.py",
        bad=(
            'prompt = {"role": "system", "content": "detailed thinking off"}\n'
            'lines[2].update(encode({"messages": [prompt, *lines[2]["messages"]]}))'
        ),
        good="lines[2].update(encode(lines[2]))",
    ),
    Rule(
        "ML528",
        "There is no whitespace around control tokens but mistral-common's.",
        "encoded",
        "One space more makes another first token of every turn.",
        "Use the template that mistral-common generates; load SentencePiece files with legacy=False.",
        "mistralai/mistral-common#3",
        bad=('lines[0]["input_ids"].insert(2, encode_text("5")[0])\nlines[0]["labels"].insert(2, -100)'),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML529",
        "Texts keep their own whitespace; an answer's trailing spaces alone are stripped.",
        "encoded",
        "A template that trims texts, or keeps what mistral-common strips, trains on other tokens before EOS.",
        "Strip the dataset itself, so that every path says the same.",
        "huggingface/transformers#34214",
        bad=(
            'stripped = [{**m, "content": m["content"].strip()} for m in lines[3]["messages"]]\n'
            'lines[3].update(encode({"messages": stripped}))'
        ),
        good="lines[3].update(encode(lines[3]))",
    ),
    Rule(
        "ML530",
        "Tools, calls and results have the form of the tokenizer's version.",
        "encoded",
        "The model is served with another form than it was trained on, and its calls cannot be parsed.",
        "Encode tool rows with mistral-common, or with the template that it generates.",
        "hiyouga/LlamaFactory, data/tool_utils.py",
        bad='lines[1].update(encode({"messages": lines[1]["messages"]}))',
        good="lines[1].update(encode(lines[1]))",
    ),
    Rule(
        "ML531",
        "A row is whole: it is not cut.",
        "encoded",
        "A row that is cut teaches the model to stop in the middle, or has no answer left.",
        "Raise the maximal length, or leave long rows out on purpose.",
        "meta-pytorch/torchtune#2792",
        bad=('for key in ("input_ids", "labels"):\n    lines[0][key] = lines[0][key][:-3]'),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML532",
        "Text has the ids that this tokenizer gives it.",
        "encoded",
        "Another tokenizer, merge order or cache gives other ids for the same text.",
        "Encode with the base's own tokenizer file; clear the cache of encoded rows.",
        "OptimalScale/LMFlow#394",
        bad='lines[0].update(encode_with("spm-v1", lines[0]))',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML533",
        "Every message is its own turn, or is joined as mistral-common joins it.",
        "encoded",
        "Turns are lost, cut in two, or joined with another separator than when the model is served.",
        "Let roles alternate in the dataset; use the template that mistral-common generates.",
        "vllm-project/vllm#6862",
        bad='lines[0].update(encode({"messages": [lines[0]["messages"][0], *lines[0]["messages"][3:]]}))',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML534",
        "Texts are those of the row.",
        "encoded",
        "The model is trained on something that the dataset does not say.",
        "Compare the text that is shown with the row; look for a filter or a template that rewrites texts.",
        "general",
        bad=(
            'answer = {"role": "assistant", "content": "Red."}\n'
            'lines[0].update(encode({"messages": [*lines[0]["messages"][:-1], answer]}))'
        ),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML535",
        "The ids are those of this row, not of another conversation.",
        "encoded",
        "Rows and encodings were mixed up, or the encodings come from an old cache.",
        "Encode again without a cache; write a row's number beside its ids.",
        "huggingface/datasets#7982",
        bad="lines[0].update(encode(dataset[2]))",
        good="lines[0].update(encode(lines[0]))",
    ),
)
