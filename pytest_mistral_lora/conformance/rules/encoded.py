"""Rules of the subject `encoded`: the lines of an encoded-rows file, and how they are padded and packed."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule

RULES = (
    Rule(
        "ML501",
        "Every line of an encoded-rows file can be read: JSON with messages, and integers as input_ids and labels.",
        "encoded",
        "What cannot be read is not judged, and a trainer that writes it may have trained on anything.",
        "Write one JSON object a line, as the documentation of the format says; the line and the field are named.",
        "JSON Lines",
        bad='lines[0]["labels"] = [float(label) for label in lines[0]["labels"]]',
        good='lines[0]["labels"] = [int(label) for label in lines[0]["labels"]]',
    ),
    Rule(
        "ML502",
        "Every row of the source is there: no number is left out, and no row is an error.",
        "encoded",
        "A row that a trainer drops in silence is not learned: too long, an unknown role, a template that refused it.",
        "Look in the trainer's log for what it filtered; correct the row, or take it out of the dataset on purpose.",
        "huggingface/trl#6320",
        bad="del lines[1]",
        good="lines[1] = dict(lines[1])",
    ),
    Rule(
        "ML503",
        "No row is there twice.",
        "encoded",
        "A row that comes twice counts twice in every epoch.",
        "Look for a sampler that pads the last batch, or for a file that was written to twice.",
        "general",
        bad="lines.append(lines[0])",
        good="lines[0] = dict(lines[0])",
    ),
    Rule(
        "ML504",
        "The rows come in the order of their numbers.",
        "encoded",
        "Rows in another order are another run: with the same seed a trainer then sees other batches.",
        "Write the rows in the order of the source, before they are shuffled.",
        "huggingface/trl#6688",
        bad="lines.reverse()",
        good='lines.sort(key=lambda line: line["row"])',
    ),
    Rule(
        "ML505",
        "The messages of a row are those of the dataset.",
        "encoded",
        "Some step before the tokenizer changed, mixed up or added rows; or the file is an old one.",
        "Encode the dataset again, without a cache; compare the row with the one that is named.",
        "allenai/open-instruct#1497",
        bad=('lines[0]["messages"] = lines[0]["messages"][1:]\nlines[0].update(encode(lines[0]))'),
        good=('lines[0]["messages"] = dataset[0]["messages"]\nlines[0].update(encode(lines[0]))'),
    ),
    Rule(
        "ML506",
        "The texts that are trained on are the texts of the assistants, each as often as it is said.",
        "encoded",
        "Answers that packing, truncation or a filter lost are not learned; those that came twice count twice.",
        "Raise the maximal length, or leave long rows out on purpose; look at what packing does with the rest.",
        "huggingface/trl#4554",
        bad='lines[0]["labels"] = [-100] * len(lines[0]["labels"])',
        good="lines[0].update(encode(lines[0]))",
    ),
    Rule(
        "ML507",
        "mistral-common accepts the row.",
        "encoded",
        "A row that Mistral's own validation refuses has no right encoding, and fails again when the model is served.",
        "Correct the row; the field is named. A tool call's id has nine letters or digits.",
        "vllm-project/vllm#9019",
        bad=('lines[1]["messages"][1]["tool_calls"][0]["id"] = "call_1"\ndataset[1] = lines[1]'),
        good=('lines[1]["messages"][1]["tool_calls"][0]["id"] = "abcdefghi"\ndataset[1] = lines[1]'),
    ),
    Rule(
        "ML510",
        "Padding is not trained on.",
        "encoded",
        "The model learns to write padding, or EOS after EOS.",
        "Set the labels of padding to -100, by the attention mask and not by the id.",
        "huggingface/transformers#23530",
        bad=(
            'lines[0]["attention_mask"] = [1] * len(lines[0]["input_ids"]) + [0]\n'
            'lines[0]["input_ids"] += [0]\n'
            'lines[0]["labels"] += [0]'
        ),
        good=(
            'lines[0]["attention_mask"] = [1] * len(lines[0]["input_ids"]) + [0]\n'
            'lines[0]["input_ids"] += [0]\n'
            'lines[0]["labels"] += [-100]'
        ),
    ),
    Rule(
        "ML511",
        "Padding stands at one end of a row.",
        "encoded",
        "Padding between tokens moves positions, or is attended to.",
        "Pad the whole row, not its turns.",
        "general",
        bad=('lines[0]["input_ids"].insert(5, 0)\nlines[0]["labels"].insert(5, -100)'),
        good=('lines[0]["input_ids"].append(0)\nlines[0]["labels"].append(-100)'),
    ),
    Rule(
        "ML512",
        "position_ids start at 0 for each conversation of a packed sequence, and go up by one.",
        "encoded",
        "Positions that run on let each conversation attend to those before it.",
        "Let the packing collator write position_ids that restart, and give no attention mask.",
        "huggingface/trl#1230",
        bad='packed[0]["position_ids"] = list(range(len(packed[0]["input_ids"])))',
        good="packed[0] = pack(dataset[:2])",
    ),
    Rule(
        "ML513",
        "No attention mask of ones goes with a packed sequence.",
        "encoded",
        "Where a mask is given, transformers does not look at position_ids: the conversations see each other.",
        "Leave attention_mask out of packed batches, or give each conversation a number of its own in it.",
        "huggingface/trl#3526",
        bad='packed[0]["attention_mask"] = [1] * len(packed[0]["input_ids"])',
        good='packed[0].pop("attention_mask", None)',
    ),
    Rule(
        "ML514",
        "The first token of each conversation of a packed sequence is not trained on.",
        "encoded",
        "Its label makes the end of one conversation predict the beginning of another.",
        "Set the label of the first token of each conversation to -100.",
        "huggingface/trl#3526",
        bad=(
            'start = packed[0]["position_ids"].index(0, 1)\npacked[0]["labels"][start] = packed[0]["input_ids"][start]'
        ),
        good=('start = packed[0]["position_ids"].index(0, 1)\npacked[0]["labels"][start] = -100'),
    ),
    Rule(
        "ML515",
        "A packed sequence holds each of its conversations once, and nothing else.",
        "encoded",
        "Packing loses what does not fit, or cuts it off into a sequence of its own.",
        "Pack whole conversations; leave out on purpose what is longer than a sequence.",
        "huggingface/trl#3887",
        bad='packed[0] = {**packed[0], **pack(dataset[:1]), "conversations": packed[0]["conversations"]}',
        good="packed[0] = {**packed[0], **pack(dataset[:2])}",
    ),
    Rule(
        "ML516",
        "The conversations of a packed sequence stand in the order in which they are listed.",
        "encoded",
        "What is said of one conversation is then true of another.",
        "List the conversations in the order of the sequence.",
        "general",
        bad='packed[0]["conversations"].reverse()',
        good='packed[0].update(pack(packed[0]["conversations"]))',
    ),
)
