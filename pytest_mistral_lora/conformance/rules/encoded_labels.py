"""Rules of the subject `encoded`: which tokens a trainer's labels may be wrong at."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule

RULES = (
    Rule(
        "ML540",
        "There is one label for each id.",
        "encoded",
        "Labels that are not as many as the ids belong to other tokens.",
        "Truncate and pad ids and labels together.",
        "PyTorch cross_entropy, ignore_index",
        bad='lines[0]["labels"].pop()',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML541",
        "Labels stand at their own tokens: the shift by one happens in the model.",
        "encoded",
        "Labels that are shifted already, or a mask that is, train every token one place off.",
        "Give labels as input_ids with -100; count the prompt's tokens, not the keys of a BatchEncoding.",
        "huggingface/trl#6105",
        bad='lines[0]["labels"] = lines[0]["labels"][1:] + [-100]',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML542",
        "A label is the token's own id, or -100.",
        "encoded",
        "The model is trained to say something else than the row.",
        "Make labels of input_ids, after the last change to them.",
        "PyTorch cross_entropy, ignore_index",
        bad='lines[0]["labels"][-1] += 1',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML543",
        "Not every token is trained on.",
        "encoded",
        "The model learns to speak for the user, and long prompts outweigh the answers.",
        "Turn on the trainer's loss on assistants only, and see that it is not ignored.",
        "huggingface/trl#3781",
        bad='lines[0]["labels"] = list(lines[0]["input_ids"])',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML544",
        "Something is trained on.",
        "encoded",
        "A row without loss is a waste; a batch of such rows has the loss NaN.",
        "Look at the maximal length, and at how the trainer finds the answers.",
        "huggingface/transformers#34172",
        bad='lines[0]["labels"] = [-100] * len(lines[0]["labels"])',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML545",
        "The first token of an answer is trained on.",
        "encoded",
        "The model does not learn how answers begin.",
        "Find answers by the tokens of their turn, not by characters: a space may be a token of its own.",
        "axolotl-ai-cloud/axolotl#2179",
        bad=(
            'first = next(n for n, label in enumerate(lines[0]["labels"]) if label != -100)\n'
            'lines[0]["labels"][first] = -100'
        ),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML546",
        "The EOS of each answer is trained on.",
        "encoded",
        "The model never learns to stop.",
        "Do not mask the pad id where pad is EOS.",
        "huggingface/transformers#23530",
        bad='lines[0]["labels"] = [-100 if label == 2 else label for label in lines[0]["labels"]]',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML547",
        "No token of the system, the user or a tool is trained on, nor BOS.",
        "encoded",
        "The model learns to speak for the user.",
        "Train on assistant turns only; never search for marker strings or compare prefixes.",
        "huggingface/trl#5213",
        bad='lines[0]["labels"][2:4] = lines[0]["input_ids"][2:4]',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML548",
        "The marker of a tool call is trained on.",
        "encoded",
        "Without the marker the model never starts a call.",
        "Train on [TOOL_CALLS] and what follows it.",
        "mistral-finetune, finetune/data/tokenize.py",
        bad='lines[1]["labels"] = [-100 if label == 5 else label for label in lines[1]["labels"]]',
        good="lines[1].update(encode(lines[1]))",
    ),
    Rule(
        "ML549",
        "An answer of weight 0 is not trained on.",
        "encoded",
        "An answer that was marked as bad is learned.",
        "Carry the weight of each message through to the labels.",
        "mistral-finetune, finetune/data/tokenize.py",
        bad=(
            'every = [{k: v for k, v in message.items() if k != "weight"} for message in lines[2]["messages"]]\n'
            'lines[2]["labels"] = encode({"messages": every})["labels"]'
        ),
        good="lines[2].update(encode(lines[2]))",
    ),
    Rule(
        "ML550",
        "What is trained on begins and ends with the answers.",
        "encoded",
        "A span that is off, as prefix differences give, trains on parts of prompts in place of answers.",
        "Take the spans from the turn that each token was encoded for; do not compare prefixes.",
        "huggingface/trl#6105",
        bad=(
            'prefix = len(encode({"messages": lines[0]["messages"][:3]})["input_ids"])\n'
            'ids = lines[0]["input_ids"]\n'
            'lines[0]["labels"] = [-100] * prefix + ids[prefix : prefix + 3] + [-100] * (len(ids) - prefix - 3)'
        ),
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML551",
        "Every answer of weight 1 is trained on.",
        "encoded",
        "Answers are rendered and not learned.",
        "Train on every assistant turn; give weight 0 to those that are not meant.",
        "mistral-finetune, finetune/data/tokenize.py",
        bad=(
            'last = max(n for n, label in enumerate(lines[0]["labels"]) if label == -100)\n'
            'lines[0]["labels"][:last] = [-100] * last'
        ),
        good="lines[0].update(encode(lines[0]))",
    ),
)
