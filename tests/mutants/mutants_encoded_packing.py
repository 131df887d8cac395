"""Padding, and several conversations in one sequence."""

from __future__ import annotations

import copy
import itertools

from bench_encoded import ROWS, change_labels, pack, pad
from gallery import Artifact, mutant


@mutant("ML510", "I01")
def padding_trained(artifact: Artifact) -> None:
    """The labels are a copy of the padded ids."""
    pad(artifact["lines"][0], 2, label=2)


@mutant("ML510 ML519")
def padding_trained_without_a_mask(artifact: Artifact) -> None:
    """As before at the left, and no attention mask says which tokens are padding."""
    pad(artifact["lines"][0], 0, left=True, label=0, mask=False)


@mutant("ML511")
def padding_between_turns(artifact: Artifact) -> None:
    """Each turn was padded for itself."""
    line = artifact["lines"][0]
    line["attention_mask"] = [1] * len(line["input_ids"])
    for key, value in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        line[key].insert(9, value)


@mutant("ML512", "I20", says="no position_ids")
def packed_without_positions(artifact: Artifact) -> None:
    """Conversations are put one after the other, and nothing keeps them apart."""
    del artifact["packed"][0]["position_ids"]


@mutant("ML512", "I20", says="expected: 0")
def positions_that_run_on(artifact: Artifact) -> None:
    """Positions do not start again."""
    artifact["packed"][0]["position_ids"] = list(range(len(artifact["packed"][0]["input_ids"])))


@mutant("ML513", "I21")
def packed_with_a_mask_of_ones(artifact: Artifact) -> None:
    """The collator adds an attention mask, so the restarting positions are ignored."""
    artifact["packed"][0]["attention_mask"] = [1] * len(artifact["packed"][0]["input_ids"])


@mutant("ML514")
def first_label_of_a_conversation(artifact: Artifact) -> None:
    """A conversation's BOS is trained on."""
    line = artifact["packed"][0]
    line["labels"][line["position_ids"].index(0, 1)] = 1


@mutant("ML531 ML506", "I53", "I34", says="conversations[2]: cut at the end")
def packed_tail_is_cut(artifact: Artifact) -> None:
    """The part of a conversation that does not fit into a sequence is thrown away."""
    for key in ("input_ids", "labels", "position_ids"):
        artifact["packed"][0][key] = artifact["packed"][0][key][:-2]


@mutant("ML515 ML506", "I53", says="conversations [2] of 3 are not there")
def packed_conversation_is_lost(artifact: Artifact) -> None:
    """A conversation did not fit and is missing."""
    artifact["packed"][0].update({**pack(ROWS[:2]), "conversations": artifact["packed"][0]["conversations"]})


@mutant("ML515 ML506", says="none of its conversations")
def packed_conversation_is_doubled(artifact: Artifact) -> None:
    """A conversation is in a sequence twice."""
    artifact["packed"][0].update(
        {**pack([*ROWS[:3], ROWS[0]]), "conversations": artifact["packed"][0]["conversations"]}
    )


@mutant("ML516")
def packed_in_another_order(artifact: Artifact) -> None:
    """The conversations are listed in another order than they stand in."""
    artifact["packed"][0].update({**pack(ROWS[2::-1]), "conversations": artifact["packed"][0]["conversations"]})


@mutant("ML546", "I01", says="conversations[0]")
def packed_eos_masked(artifact: Artifact) -> None:
    """The EOS of each answer in a sequence is masked."""
    line = artifact["packed"][0]
    line["labels"] = [-100 if label == 2 else label for label in line["labels"]]


def number_conversations(artifact: Artifact) -> list[int]:
    """Give the first packed sequence a mask with a number for each conversation, and return it."""
    line = artifact["packed"][0]
    starts = [n for n, position in enumerate(line["position_ids"]) if position == 0]
    line["attention_mask"] = [sum(start <= n for start in starts) for n in range(len(line["input_ids"]))]
    mask: list[int] = line["attention_mask"]
    return mask


@mutant("ML517", "N06", says="has the numbers 1 and 2, cut at token")
def numbers_change_a_token_too_early(artifact: Artifact) -> None:
    """The lengths of the conversations were counted before BOS was added."""
    mask = number_conversations(artifact)
    mask[:] = [*mask[1:], mask[-1]]


@mutant("ML517", "N06", says="conversation 1 has the numbers 1 and 2")
def numbers_change_a_token_too_late(artifact: Artifact) -> None:
    """The lengths of the conversations are one too long."""
    mask = number_conversations(artifact)
    mask[:] = [mask[0], *mask[:-1]]


@mutant("ML517", "N06", says="conversations 1 and 2 share the number 2")
def two_conversations_share_a_number(artifact: Artifact) -> None:
    """The last two conversations have one number, and see each other."""
    mask = number_conversations(artifact)
    mask[:] = [min(number, 2) for number in mask]


@mutant("ML517", "N06", says="has the number 2, after 3")
def numbers_go_down(artifact: Artifact) -> None:
    """The numbers go down, and kernels count the lengths of the conversations by going up."""
    mask = number_conversations(artifact)
    mask[:] = [4 - number for number in mask]


@mutant("ML517", "N06", says="conversation 0 has the numbers 1 and 2")
def numbers_cut_a_single_row(artifact: Artifact) -> None:
    """A row that is not packed is cut in two by its mask."""
    line = artifact["lines"][0]
    line["attention_mask"] = [1] * 10 + [2] * (len(line["input_ids"]) - 10)


@mutant("ML517", "N06", says="attention_mask is 2 at its first token")
def number_of_a_lost_conversation(artifact: Artifact) -> None:
    """A row was cut out of a packed sequence, and kept the number that it had there."""
    line = artifact["lines"][0]
    line["attention_mask"] = [2] * len(line["input_ids"])


@mutant("ML517", "N06", says="sequence_ids: conversations 0 and 1 share the number 0")
def sequences_of_one_number(artifact: Artifact) -> None:
    """The column that numbers the conversations has one number for all of them."""
    line = artifact["packed"][0]
    line["sequence_ids"] = [0] * len(line["input_ids"])


@mutant("ML512", says="position -4 at token 0")
def positions_below_zero(artifact: Artifact) -> None:
    """The positions of a row were moved by padding that is no longer there."""
    line = artifact["lines"][0]
    line["position_ids"] = [n - 4 for n in range(len(line["input_ids"]))]


@mutant("ML512", says="position 0 at token 5")
def position_jumps_under_numbers(artifact: Artifact) -> None:
    """The mask keeps the conversations apart, and positions start anew within one."""
    line = artifact["packed"][0]
    number_conversations(artifact)
    line["position_ids"] = [n if n < 5 else n - 5 for n in range(len(line["input_ids"]))]


@mutant("ML519", "N07", says="the attention mask does not hide them")
def left_padding_under_a_mask_of_ones(artifact: Artifact) -> None:
    """Padding stands on the left, and the mask is 1 everywhere."""
    line = artifact["lines"][0]
    pad(line, 0, left=True, mask=False)
    line["attention_mask"] = [1] * len(line["input_ids"])


@mutant("ML519", "N07", says="no attention mask hides them")
def left_padding_without_a_mask(artifact: Artifact) -> None:
    """Padding stands on the left, and there is no mask."""
    pad(artifact["lines"][0], 2, left=True, mask=False)


@mutant("ML552", "N27", says="each with the id 2; the first is token")
def mask_of_ids_hides_eos(artifact: Artifact) -> None:
    """Pad is EOS, and the mask is made of the ids: it hides each EOS."""
    line = artifact["lines"][0]
    pad(line, 2)
    line["attention_mask"] = [int(token != 2) for token in line["input_ids"]]


@mutant("ML552 ML546", "N27", says="the attention mask hides 2 of the")
def mask_and_labels_of_ids_hide_eos(artifact: Artifact) -> None:
    """As before without padding, and the labels are made of the mask."""
    line = artifact["lines"][0]
    line["attention_mask"] = [int(token != 2) for token in line["input_ids"]]
    change_labels(artifact, 0, lambda n, token, label: -100 if token == 2 else label)


@mutant("ML552", "N27", says="tokens of the row, each with the id 1")
def mask_hides_bos(artifact: Artifact) -> None:
    """The mask is one to the right, and hides BOS."""
    artifact["lines"][0]["attention_mask"] = [0] + [1] * (len(artifact["lines"][0]["input_ids"]) - 1)


@mutant("ML502 ML506", says="conversations of the dataset are in no sequence")
def conversations_not_packed(artifact: Artifact) -> None:
    """The lines are packed, and the last conversations of the dataset are in none of them."""
    artifact["lines"] = [{"row": 0, **pack(copy.deepcopy(ROWS[:2]))}]


def give_lengths(artifact: Artifact) -> list[int]:
    """Give the first packed sequence the lengths of its conversations, and return them."""
    line = artifact["packed"][0]
    starts = [n for n, position in enumerate(line["position_ids"]) if position == 0]
    line["seq_lengths"] = [end - start for start, end in itertools.pairwise([*starts, len(line["input_ids"])])]
    lengths: list[int] = line["seq_lengths"]
    return lengths


@mutant("ML561", says="seq_lengths ends at token")
def lengths_without_bos(artifact: Artifact) -> None:
    """The lengths of the conversations were counted before BOS was added."""
    lengths = give_lengths(artifact)
    lengths[:] = [length - 1 for length in lengths]


@mutant("ML561", says="conversation 1 begins at token 27 by cu_seqlens, and at 28 by position_ids")
def sums_of_lengths_moved(artifact: Artifact) -> None:
    """The sums of the lengths, by which kernels cut, are one too small between the conversations."""
    lengths = give_lengths(artifact)
    ends = [*itertools.accumulate(lengths, initial=0)]
    artifact["packed"][0]["cu_seqlens"] = [0, *(end - 1 for end in ends[1:-1]), ends[-1]]


@mutant("ML561", says="seq_lengths names 2 conversations, and position_ids 3")
def two_lengths_are_one(artifact: Artifact) -> None:
    """Two conversations count as one."""
    lengths = give_lengths(artifact)
    lengths[1:] = [sum(lengths[1:])]
