"""Rules of the subject `template`: goldens, and the chat template against mistral-common."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule

_FINETUNE = "mistral-finetune, finetune/data/tokenize.py"
_ORACLE = "mistral-common, tokens/tokenizers/instruct.py"

RULES = (
    Rule(
        "ML001",
        "A golden has the form that the schema says, and its supervised text is the assistant's text.",
        "template",
        "A golden that contradicts itself guards nothing.",
        "Record it again: pytest --mistral-golden --mistral-golden-update, or scripts/record_goldens.py.",
        "JSON Schema 2020-12",
        bad=('golden["labels"] = golden["labels"][:-1]'),
        good=('golden["labels"] = list(golden["labels"])'),
    ),
    Rule(
        "ML002",
        "mistral-common gives a golden row the recorded ids.",
        "template",
        "The reference itself has moved: a model trained under one version is served under another.",
        "Pin mistral-common to the version of the base model's release, or read its changelog and record again.",
        _ORACLE,
        bad=('golden["input_ids"][3] += 1'),
        good=('golden["input_ids"][3] += 0'),
    ),
    Rule(
        "ML003",
        "A golden row has the recorded labels and spans.",
        "template",
        "Other tokens carry loss than when the golden was recorded.",
        "Find the change that moved the mask; record again only if it was meant.",
        _FINETUNE,
        bad=('golden["spans"][-1]["supervised"] = False\ngolden["labels"][-1] = -100'),
        good=('golden["spans"][-1]["supervised"] = True\ngolden["labels"][-1] = golden["input_ids"][-1]'),
    ),
    Rule(
        "ML004",
        "The chat template gives the ids of mistral-common, but for the named deviations.",
        "template",
        "Training and serving see different prompts; quality is lost without any error.",
        "Use the template that mistral-common generates for this tokenizer, or train with the mistral-common backend.",
        "mistralai/mistral-common#3",
        bad=('template = template.replace("[INST] ", "[INST]")'),
        good=('template = template.replace("[INST] ", "[INST] ")'),
    ),
    Rule(
        "ML005",
        "The chat template shows no deviation that was not recorded.",
        "template",
        "An upgrade of transformers or mistral-common changed how the template renders or is encoded.",
        "Pin the versions that recorded the golden, or read the deviation's reason and record again.",
        "huggingface/transformers#42299",
        bad=('rows[0]["messages"][-1]["content"] = "A space follows. "\ngolden = record(rows[0]) | {"deviations": []}'),
        good=('rows[0]["messages"][-1]["content"] = "A space follows. "\ngolden = record(rows[0])'),
    ),
    Rule(
        "ML006",
        "The template's generation blocks mark exactly the tokens that the oracle supervises.",
        "template",
        "Trainers that use the assistant mask train on other tokens than they should.",
        "Put {% generation %} around the whole answer and its EOS.",
        "huggingface/transformers#34172",
        bad=(
            "answer = \"{{- render_content(content=message['content'], context_name='assistant message contents') \"\n"
            'template = template.replace(answer + "-}}", "{% generation %}" + answer + "-}}{% endgeneration %}")'
        ),
        good=(
            "from pytest_mistral_lora.chat.templates.generation_blocks import with_generation\n"
            "template = with_generation(template)"
        ),
    ),
    Rule(
        "ML007",
        "Every row of a golden folder is recorded, and recorded as it is now.",
        "template",
        "A row without a golden is not guarded.",
        "Record it: pytest --mistral-golden --mistral-golden-dir PATH --mistral-golden-update.",
        "general",
        bad=('rows[0]["messages"][0]["content"] = "Another question?"'),
        good=('rows[0]["messages"][0]["content"] = "Another question?"\ngolden = record(rows[0])'),
    ),
    Rule(
        "ML008",
        "apply_chat_template gives the ids of what it renders.",
        "template",
        "A caller that takes a mapping for a list, or encodes the rendered text in another way, trains on other ids.",
        "Take `input_ids` where a mapping comes back; never encode rendered text by a tokenizer of another class.",
        "huggingface/transformers#41626, sgl-project/sglang#39773",
        bad=("def applied(row, sound=applied):\n    return [len(sound(row)), 2]"),
        good=("def applied(row, sound=applied):\n    return sound(row)"),
    ),
    Rule(
        "ML009",
        "The rendering of a row says which tokens are the assistant's.",
        "template",
        "Through such a template nothing can be trained on: a trainer that asks for the assistant's mask gets zeros.",
        "Put {% generation %} around each answer and its EOS, or train with the mistral-common backend.",
        "huggingface/transformers#34172, huggingface/trl#4201",
        severity="note",
        bad=("template = template.replace(\"message['role'] == 'assistant'\", \"'assistant' == message['role']\")"),
        good=("template = template.replace(\"message['role'] == 'assistant'\", \"message.role == 'assistant'\")"),
    ),
)
