"""Labels that train on other tokens than the assistant's."""

from __future__ import annotations

from bench_encoded import ROWS, change_labels, encode, encode_text, pad
from gallery import Artifact, mutant


@mutant("ML546", "I01", says="the EOS of turn 1 is masked")
def pad_is_eos(artifact: Artifact) -> None:
    """The collator masks the pad id, which is also EOS, so it masks the EOS of each answer."""
    pad(artifact["lines"][0], 2)
    change_labels(artifact, 0, lambda n, token, label: -100 if token == 2 else label)


@mutant("ML546")
def eos_masked_in_some_rows(artifact: Artifact) -> None:
    """The last token of a row is masked."""
    artifact["lines"][3]["labels"][-1] = -100


@mutant("ML544 ML506", "I04", says="no token is trained on")
def mask_of_zeros(artifact: Artifact) -> None:
    """The assistant mask of a template without generation blocks is zero everywhere."""
    for row in range(len(artifact["lines"])):
        change_labels(artifact, row, lambda n, token, label: -100)


@mutant("ML544 ML506", "I05")
def response_marker_not_found(artifact: Artifact) -> None:
    """The collator searches for the ids of `[/INST]` and a space, finds none, and masks the row."""
    marker = [*encode_text("5")[:1], 4]
    ids = artifact["lines"][0]["input_ids"]
    assert not any(ids[n : n + 2] == marker for n in range(len(ids)))
    change_labels(artifact, 0, lambda n, token, label: -100)


@mutant("ML547", "I13", says="of: user")
def prefix_difference(artifact: Artifact) -> None:
    """Every token after the encoding of system and first user message is trained on: v3 moves the system prompt."""
    line = artifact["lines"][0]
    prefix = len(encode({"messages": [*line["messages"][:3]]})["input_ids"]) - 3
    user = range(prefix, line["input_ids"].index(4, prefix) + 1)
    change_labels(artifact, 0, lambda n, token, label: token if n in user else label)


@mutant("ML550", "I13", says="is masked")
def span_beside_the_answer(artifact: Artifact) -> None:
    """A span of a prefix encoding lies on the system prompt; the answer that it was meant for is masked."""
    line = artifact["lines"][0]
    first = [n for n, label in enumerate(line["labels"]) if label != -100][:3]
    change_labels(artifact, 0, lambda n, token, label: token if 14 <= n < 17 else -100 if n in first else label)


@mutant("ML550", says="are masked")
def half_an_answer(artifact: Artifact) -> None:
    """Part of an answer is masked."""
    trained = [n for n, label in enumerate(artifact["lines"][3]["labels"]) if label != -100]
    change_labels(artifact, 3, lambda n, token, label: -100 if n in trained[2:4] else label)


@mutant("ML541", "I31", says="shifted by -2 tokens")
def mask_shifted_by_two(artifact: Artifact) -> None:
    """The prompt's length is short by two: every span begins and ends too early."""
    labels = artifact["lines"][0]["labels"]
    change_labels(artifact, 0, lambda n, token, label: token if n + 2 < len(labels) and labels[n + 2] != -100 else -100)


@mutant("ML547", "I31", says="of: user")
def prompt_of_length_two(artifact: Artifact) -> None:
    """The length of a BatchEncoding, which is 2, was taken for the prompt's."""
    change_labels(artifact, 3, lambda n, token, label: token if n >= 2 else -100)


@mutant("ML541", says="the id of a neighbour")
def shifted_already(artifact: Artifact) -> None:
    """Labels are shifted before the model shifts them again."""
    for line in artifact["lines"]:
        line["labels"] = [*line["labels"][1:], -100]


@mutant("ML542", says="another token's")
def foreign_label(artifact: Artifact) -> None:
    """One label is the id of another token."""
    artifact["lines"][3]["labels"][-2] = 17


@mutant("ML543", "I33", says="every token is trained on")
def assistant_only_loss_ignored(artifact: Artifact) -> None:
    """The loss is over the whole sequence."""
    for row in range(len(artifact["lines"])):
        change_labels(artifact, row, lambda n, token, label: token)


@mutant("ML545", says="the first of an answer")
def first_token_masked(artifact: Artifact) -> None:
    """Spans of characters leave out the space before an answer that does not fuse with it."""
    last = max(n for n, label in enumerate(artifact["lines"][2]["labels"]) if label == -100)
    assert artifact["lines"][2]["input_ids"][last + 1] == encode_text("5")[0]
    artifact["lines"][2]["labels"][last + 1] = -100


@mutant("ML548", says="[TOOL_CALLS]")
def call_without_its_marker(artifact: Artifact) -> None:
    """The marker of a tool call is taken for structure and masked."""
    change_labels(artifact, 1, lambda n, token, label: -100 if token == 5 else label)


@mutant("ML547", says="of: tool")
def tool_result_trained(artifact: Artifact) -> None:
    """A tool's result is trained on as if the assistant said it."""
    ids = artifact["lines"][1]["input_ids"]
    result = range(ids.index(8), ids.index(9))
    change_labels(artifact, 1, lambda n, token, label: token if n in result else label)


@mutant("ML549", says="of weight 0")
def weight_ignored(artifact: Artifact) -> None:
    """An answer of weight 0 is trained on."""
    row = {"messages": [{**m, "weight": 1} if "weight" in m else m for m in ROWS[2]["messages"]]}
    artifact["lines"][2]["labels"] = encode(row)["labels"]


@mutant("ML551 ML506", says="the answer of turn 1 is masked")
def last_turn_alone(artifact: Artifact) -> None:
    """The last answer alone is trained on."""
    last = max(n for n, label in enumerate(artifact["lines"][0]["labels"]) if label == -100)
    change_labels(artifact, 0, lambda n, token, label: -100 if n <= last else label)


@mutant("ML508", "N191", says="follow the objective last-answer")
def last_turn_alone_in_each_row(artifact: Artifact) -> None:
    """The last answer alone is trained on in each of six conversations, and no setting of ours says so."""
    artifact["dataset"] = [
        {
            "messages": [
                {"role": "user", "content": f"Where is {town}?"},
                {"role": "assistant", "content": f"{town} is in {country}."},
                {"role": "user", "content": f"Is {town} warm?"},
                {"role": "assistant", "content": f"In summer, {town} is."},
            ]
        }
        for town, country in (
            ("Rome", "Italy"),
            ("Porto", "Portugal"),
            ("Graz", "Austria"),
            ("Brno", "Czechia"),
            ("Lyon", "France"),
            ("Turku", "Finland"),
        )
    ]
    artifact["lines"] = [{"row": index, **row, **encode(row)} for index, row in enumerate(artifact["dataset"])]
    for index, line in enumerate(artifact["lines"]):
        last = max(n for n, label in enumerate(line["labels"]) if label == -100)
        change_labels(artifact, index, lambda n, token, label, last=last: -100 if n <= last else label)


@mutant("ML540")
def labels_of_another_length(artifact: Artifact) -> None:
    """Ids were padded and labels were not."""
    artifact["lines"][0]["input_ids"] += [0, 0]


@mutant("ML559", says="assistant_masks is 0 at")
def mask_of_zeros_beside_labels(artifact: Artifact) -> None:
    """The labels are right, and the mask beside them, of a template without generation blocks, is zero."""
    line = artifact["lines"][0]
    line["assistant_masks"] = [0] * len(line["input_ids"])


@mutant("ML543")
def saved_dataset_that_trains_on_everything(artifact: Artifact) -> None:
    """A dataset that a trainer prepared is saved to disk with the labels of its collator: every token."""
    artifact["saved"] = True
    change_labels(artifact, 0, lambda n, token, label: token)


@mutant("ML543")
def mask_of_ones_in_a_saved_dataset(artifact: Artifact) -> None:
    """The dataset has the mask alone that labels are made of, and it is 1 everywhere."""
    artifact["saved"] = True
    for number, line in enumerate(artifact["lines"]):
        labels = line.pop("labels")
        line["assistant_masks"] = [1 if number == 0 else int(label != -100) for label in labels]


@mutant("ML501", says="is missing, and so is a mask")
def saved_dataset_without_labels(artifact: Artifact) -> None:
    """The dataset has ids alone, and its trainer would train on all of them."""
    artifact["saved"] = True
    for line in artifact["lines"]:
        del line["labels"]


@mutant("ML559", says="loss_mask is 0 at")
def loss_mask_leaves_out_eos(artifact: Artifact) -> None:
    """The labels are right, and the mask by which the loss is multiplied leaves out each EOS."""
    line = artifact["lines"][0]
    line["loss_mask"] = [int(label not in (-100, 2)) for label in line["labels"]]


@mutant("ML559", says="loss_weights is 0 at")
def loss_weights_of_zero(artifact: Artifact) -> None:
    """The labels are right, and the weights of the loss are 0 for the last answer."""
    line = artifact["lines"][0]
    last = max(n for n, label in enumerate(line["labels"]) if label == -100)
    line["loss_weights"] = [0.5 if label != -100 and n < last else 0.0 for n, label in enumerate(line["labels"])]


@mutant("ML543")
def weights_of_one_in_a_saved_dataset(artifact: Artifact) -> None:
    """The dataset has weights alone, and they are 1 at each token."""
    artifact["saved"] = True
    for number, line in enumerate(artifact["lines"]):
        labels = line.pop("labels")
        line["loss_weights"] = [1.0 if number == 0 or label != -100 else 0.0 for label in labels]


@mutant("ML570", says="loss_weights is nan at token")
def weight_that_is_no_number(artifact: Artifact) -> None:
    """The weights of a row were divided by the number of its answers, which was counted as 0."""
    artifact["saved"] = True
    line = artifact["lines"][0]
    line["loss_weights"] = [float("nan") if label != -100 else 0.0 for label in line["labels"]]


@mutant("ML570", says="attention_mask is -1 at token")
def mask_that_is_negative(artifact: Artifact) -> None:
    """The mask was made for an addition, where a hidden token has a negative number."""
    line = artifact["lines"][0]
    line["attention_mask"] = [-1] * len(line["input_ids"])


@mutant("ML570", says="assistant_masks is 2 at token")
def sum_of_two_masks(artifact: Artifact) -> None:
    """The mask of the answers is the sum of two masks."""
    line = artifact["lines"][0]
    line["assistant_masks"] = [2 * int(label != -100) for label in line["labels"]]


@mutant("ML570", says="sequence_ids is 4611686018427387904 at token")
def sequence_of_a_hash(artifact: Artifact) -> None:
    """The conversations are numbered by a hash, which the int32 of a kernel does not hold."""
    line = artifact["packed"][0]
    line["sequence_ids"] = [2**62] * len(line["input_ids"])


@mutant("ML571", says="loss_weights is -1.0 at token")
def answer_of_negative_weight(artifact: Artifact) -> None:
    """An answer that is not wanted has a negative weight beside the labels of the answers."""
    line = artifact["lines"][0]
    last = max(n for n, label in enumerate(line["labels"]) if label == -100)
    line["loss_weights"] = [
        0.0 if label == -100 else 1.0 if n < last else -1.0 for n, label in enumerate(line["labels"])
    ]
