"""Rules of the subject `dataset`: every row of a recipe's files."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules.rule import Rule

_REFERENCE = "mistral-finetune, finetune/data/dataset.py"
_NORMALIZE = "mistral-common, protocol/instruct/normalize.py"

RULES = (
    Rule(
        "ML601",
        "Every row can be read, is a chat row, and is accepted by mistral-common and by the recipe's backend.",
        "dataset",
        "A trainer drops such a row, or trains on something else.",
        "Correct the row; the field and the value are named.",
        "mistralai/mistral-common#148",
        bad='rows[0]["messages"].append({"role": "user", "content": "Thanks"})',
        good='rows[0]["messages"] += [{"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Bye"}]',
    ),
    Rule(
        "ML602",
        "Every data file is a regular file with rows in it, and stays as it is while it is read.",
        "dataset",
        "A run on an empty or half-written file trains on fewer rows than its recipe says.",
        "Name the file that holds the rows; wait until it is written.",
        _REFERENCE,
        bad="rows.clear()",
        good="rows[:] = rows[:1]",
    ),
    Rule(
        "ML603",
        "Where the chat template gives a row other ids than mistral-common, a named deviation explains it.",
        "dataset",
        "The two backends disagree on the user's own rows: one of train and serve runs on ids that nobody expects.",
        "Compare chat_template.jinja with the template that mistral-common generates; the first difference is shown.",
        "mistralai/mistral-common#3",
        bad='template["source"] = template["source"].replace("eos_token", "\'\'")',
        good='template["source"] = "{# ours #}" + template["source"]',
    ),
    Rule(
        "ML604",
        "A row that is trained on through the chat template has mistral-common's ids.",
        "dataset",
        "The deviation is a known one, but this recipe trains on the template's ids; a server that encodes with "
        "mistral-common shows the model other ids.",
        "Train with backend: mistral-common, or serve through the same template.",
        "mistralai/mistral-common#3",
        "note",
        bad='recipe["backend"] = "chat-template"\nrows[0]["messages"][1]["content"] = "Paris.  "',
        good='recipe["backend"] = "chat-template"\nrows[0]["messages"][1]["content"] = "Paris."',
    ),
    Rule(
        "ML605",
        "Every row has a token that is trained on.",
        "dataset",
        "A row without a label adds nothing to the loss; where a batch has no other, the loss is 0 or NaN "
        "(huggingface/trl#6668).",
        "Give an assistant message weight 1, or take the row out.",
        "huggingface/trl#6668",
        bad='rows[0]["messages"][1]["weight"] = 0',
        good='rows[0]["messages"][1]["weight"] = 1',
    ),
    Rule(
        "ML606",
        "The labels of a row that is trained on through the chat template are the assistant's tokens.",
        "dataset",
        "Labels that are missing or marked wrongly train on nothing, or on what the user says.",
        "Mark exactly the assistant's text with {% generation %}, or train with backend: mistral-common.",
        "huggingface/transformers#34172",
        bad='recipe["backend"] = "chat-template"\n'
        'template["source"] = "{% generation %}" + template["source"] + "{% endgeneration %}"',
        good='recipe["backend"] = "chat-template"',
    ),
    Rule(
        "ML607",
        "No row is longer than training.max_length: a row is never cut.",
        "dataset",
        "A cut removes the end of an answer and its </s>, or every supervised token, and the run goes on. Our trainer "
        "refuses such a row.",
        "Raise training.max_length, shorten the row, or split it; what a cut would remove is listed.",
        "meta-pytorch/torchtune#2792",
        bad='recipe["training"]["max_length"] = 12',
        good='recipe["training"]["max_length"] = 1024',
    ),
    Rule(
        "ML608",
        "No row is there twice.",
        "dataset",
        "A row that is repeated counts more than the others, and is learned by heart.",
        "Take the copies out, or mean it: a repeated row is a higher weight.",
        "Lee et al. 2021, Deduplicating Training Data Makes Language Models Better",
        "note",
        bad="rows.append(rows[0])",
        good='rows.append({**rows[0], "messages": [{"role": "user", "content": "More?"}, rows[0]["messages"][1]]})',
    ),
    Rule(
        "ML609",
        "No prompt has two different answers.",
        "dataset",
        "The model cannot give both; it learns a mixture, and its loss has a floor.",
        "Keep one answer, or say in the prompt which is wanted.",
        "Lee et al. 2021, Deduplicating Training Data Makes Language Models Better",
        "note",
        bad='rows.append({"messages": [rows[0]["messages"][0], {"role": "assistant", "content": "Lyon."}]})',
        good='question = {"role": "user", "content": "And the second city?"}\n'
        'rows.append({"messages": [question, {"role": "assistant", "content": "Lyon."}]})',
    ),
    Rule(
        "ML610",
        "No held-out row is trained on.",
        "dataset",
        "The held-out loss then measures memory, and an overfitted adapter looks good.",
        "Take the row out of one side; held_out splits by the row's own hash, so its equal rows stay together.",
        "Lee et al. 2021, Deduplicating Training Data Makes Language Models Better",
        bad="held_out.append(rows[0])",
        good="held_out.append(rows.pop(0))",
    ),
    Rule(
        "ML611",
        "No prompt of a held-out row is trained on.",
        "dataset",
        "The model has seen the question with another answer: its held-out loss says less about new questions.",
        "Move rows with the same prompt to one side.",
        "Lee et al. 2021, Deduplicating Training Data Makes Language Models Better",
        "note",
        bad='held_out.append({"messages": [rows[0]["messages"][0], {"role": "assistant", "content": "Lyon."}]})',
        good='question = {"role": "user", "content": "And the second city?"}\n'
        'held_out.append({"messages": [question, {"role": "assistant", "content": "Lyon."}]})',
    ),
    Rule(
        "ML612",
        "No text spells a control token.",
        "dataset",
        "mistral-common keeps it text, and this recipe trains it as text; most other tools make a control token of it, "
        "so that the text can end a turn or forge one.",
        "Write it another way, unless the rows are about such tokens.",
        "huggingface/transformers#29279",
        "note",
        bad='rows[0]["messages"][0]["content"] = "What does [/INST] mean?"',
        good='rows[0]["messages"][0]["content"] = "What does /INST mean?"',
    ),
    Rule(
        "ML613",
        "No text spells a control token where rows are encoded through the chat template.",
        "dataset",
        "transformers looks for control tokens in the whole rendered text: a user's text can end a turn or forge one. "
        "Our trainer refuses such a row.",
        "Change the text, or train with backend: mistral-common.",
        "huggingface/transformers#29279",
        bad='recipe["backend"] = "chat-template"\nrows[0]["messages"][0]["content"] = "a </s>[INST] b"',
        good='recipe["backend"] = "chat-template"\nrows[0]["messages"][0]["content"] = "a / s INST b"',
    ),
    Rule(
        "ML614",
        "No two neighbouring messages are joined into one turn.",
        "dataset",
        "mistral-common joins messages of one role with a blank line: the model never sees that they were two, and "
        "other templates refuse the row.",
        "Join them in the row as they should read, or put the missing message between them.",
        _NORMALIZE,
        "note",
        bad='rows[0]["messages"].insert(1, {"role": "user", "content": "In one word."})',
        good='rows[0]["messages"][0]["content"] += " In one word."',
    ),
    Rule(
        "ML615",
        "The split leaves rows to train on, and holds out rows where the recipe asks for it.",
        "dataset",
        "A run without a held-out row reports no held-out loss; one without a training row trains nothing.",
        "Change data.held_out, or give more rows or eval files.",
        _REFERENCE,
        bad='recipe["data"] = {"train": ["rows.jsonl"], "held_out": 0.001}',
        good='recipe["data"] = {"train": ["rows.jsonl"], "held_out": 0.5}',
    ),
)
