"""The example of each rule of `encoded`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import bench_encoded as bench
import mutants_encoded_fim as gaps
import mutants_encoded_ids as ids
import mutants_encoded_images as images
import mutants_encoded_labels as labels
import mutants_encoded_lines as lines
import mutants_encoded_packing as packing
import mutants_encoded_pairs as pairs
import mutants_encoded_prompts as prompts
import mutants_encoded_texts as texts
from bench_encoded import encode, hold_pairs, pack, scored_prompt
from gallery import Artifact, Example


class EncodedExample(Example):
    def sound(self, artifact: Artifact) -> None:
        for line in artifact["lines"]:
            line.update(encode(line))


class ML501(EncodedExample):
    also = "ML506"

    def broken(self, artifact: Artifact) -> None:
        artifact["lines"][0]["labels"] = [float(label) for label in artifact["lines"][0]["labels"]]

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"][0]["labels"] = [int(label) for label in artifact["lines"][0]["labels"]]


class ML502(EncodedExample):
    mutant = lines.dropped_row

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"][1] = dict(artifact["lines"][1])


class ML503(EncodedExample):
    mutant = lines.doubled_row

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"][0] = dict(artifact["lines"][0])


class ML504(EncodedExample):
    mutant = lines.shuffled

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"].sort(key=lambda line: line["row"])


class ML505(EncodedExample):
    def broken(self, artifact: Artifact) -> None:
        artifact["lines"][0]["messages"] = artifact["lines"][0]["messages"][1:]
        artifact["lines"][0].update(encode(artifact["lines"][0]))

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"][0]["messages"] = artifact["dataset"][0]["messages"]
        artifact["lines"][0].update(encode(artifact["lines"][0]))


class ML506(EncodedExample):
    mutant = labels.response_marker_not_found


class ML507(EncodedExample):
    mutant = ids.call_id_of_another_vendor

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"][1]["messages"][1]["tool_calls"][0]["id"] = "abcdefghi"
        artifact["dataset"][1] = artifact["lines"][1]


class ML508(EncodedExample):
    mutant = labels.last_turn_alone_in_each_row


class ML510(EncodedExample):
    mutant = packing.padding_trained

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"][0]["attention_mask"] = [1] * len(artifact["lines"][0]["input_ids"]) + [0]
        artifact["lines"][0]["input_ids"] += [0]
        artifact["lines"][0]["labels"] += [-100]


class ML511(EncodedExample):
    mutant = packing.padding_between_turns

    def sound(self, artifact: Artifact) -> None:
        artifact["lines"][0]["input_ids"].append(0)
        artifact["lines"][0]["labels"].append(-100)


class ML512(EncodedExample):
    mutant = packing.positions_that_run_on

    def sound(self, artifact: Artifact) -> None:
        artifact["packed"][0] = pack(artifact["dataset"][:2])


class ML513(EncodedExample):
    mutant = packing.packed_with_a_mask_of_ones

    def sound(self, artifact: Artifact) -> None:
        artifact["packed"][0].pop("attention_mask", None)


class ML514(EncodedExample):
    mutant = packing.first_label_of_a_conversation

    def sound(self, artifact: Artifact) -> None:
        start = artifact["packed"][0]["position_ids"].index(0, 1)
        artifact["packed"][0]["labels"][start] = -100


class ML515(EncodedExample):
    mutant = packing.packed_conversation_is_lost

    def sound(self, artifact: Artifact) -> None:
        artifact["packed"][0] = {**artifact["packed"][0], **pack(artifact["dataset"][:2])}


class ML516(EncodedExample):
    mutant = packing.packed_in_another_order

    def sound(self, artifact: Artifact) -> None:
        artifact["packed"][0].update(pack(artifact["packed"][0]["conversations"]))


class ML520(EncodedExample):
    mutant = ids.added_token


class ML521(EncodedExample):
    mutant = ids.double_bos


class ML522(EncodedExample):
    mutant = ids.last_eos_dropped


class ML523(EncodedExample):
    mutant = ids.injection_in_the_user_text


class ML524(EncodedExample):
    mutant = ids.rendered_and_encoded_again


class ML525(EncodedExample):
    mutant = texts.system_dropped


class ML526(EncodedExample):
    mutant = texts.system_in_the_first_turn


class ML527(EncodedExample):
    mutant = texts.invented_system_prompt


class ML528(EncodedExample):
    mutant = texts.space_after_the_marker


class ML529(EncodedExample):
    mutant = texts.texts_trimmed


class ML530(EncodedExample):
    mutant = texts.tools_dropped


class ML531(EncodedExample):
    mutant = ids.cut_inside_an_answer


class ML532(EncodedExample):
    mutant = ids.stale_cache


class ML533(EncodedExample):
    mutant = texts.a_turn_is_lost


class ML534(EncodedExample):
    mutant = ids.another_answer


class ML535(EncodedExample):
    mutant = ids.encodings_mixed_up


class ML540(EncodedExample):
    mutant = labels.labels_of_another_length


class ML541(EncodedExample):
    mutant = labels.shifted_already


class ML542(EncodedExample):
    mutant = labels.foreign_label


class ML543(EncodedExample):
    mutant = labels.assistant_only_loss_ignored


class ML544(EncodedExample):
    mutant = labels.response_marker_not_found


class ML545(EncodedExample):
    mutant = labels.first_token_masked


class ML546(EncodedExample):
    mutant = labels.pad_is_eos


class ML547(EncodedExample):
    mutant = labels.prompt_of_length_two


class ML548(EncodedExample):
    mutant = labels.call_without_its_marker


class ML549(EncodedExample):
    mutant = labels.weight_ignored


class ML550(EncodedExample):
    mutant = labels.span_beside_the_answer


class ML551(EncodedExample):
    mutant = labels.last_turn_alone


class ML517(EncodedExample):
    mutant = packing.numbers_change_a_token_too_late

    def sound(self, artifact: Artifact) -> None:
        # gaps are no fault, nor is padding behind, nor one number for a row that is not packed
        mask = packing.number_conversations(artifact)
        mask[:] = [2 * number for number in mask]
        bench.pad(artifact["packed"][0], 0, mask=False)
        artifact["packed"][0]["attention_mask"] += [0] * 3
        artifact["packed"][0]["position_ids"] += [0] * 3
        artifact["lines"][0]["attention_mask"] = [1] * len(artifact["lines"][0]["input_ids"])


class ML519(EncodedExample):
    mutant = packing.left_padding_under_a_mask_of_ones

    def sound(self, artifact: Artifact) -> None:
        bench.pad(artifact["lines"][0], 0, left=True)
        # padding behind the row is never attended to, and positions that start anew keep padding out
        bench.pad(artifact["lines"][1], 2, mask=False)
        line = artifact["lines"][2]
        bench.pad(line, 2, left=True, mask=False)
        line["position_ids"] = [*range(3), *range(len(line["input_ids"]) - 3)]


class ML552(EncodedExample):
    mutant = packing.mask_of_ids_hides_eos

    def sound(self, artifact: Artifact) -> None:
        bench.pad(artifact["lines"][0], 2)


class ML553(EncodedExample):
    mutant = ids.closed_twice

    def sound(self, artifact: Artifact) -> None:
        # not trained on, it is padding with EOS
        bench.pad(artifact["lines"][0], 2, count=1)


class ML554(EncodedExample):
    mutant = texts.control_character_lost

    def sound(self, artifact: Artifact) -> None:
        texts.change_texts(artifact, ["Ring\tthe bell", "Voila\u0300\t."], str)


class ML555(EncodedExample):
    mutant = texts.parallel_calls_one_by_one

    def sound(self, artifact: Artifact) -> None:
        texts.parallel_calls_one_by_one.change(artifact)
        artifact["lines"][1].update(encode(artifact["lines"][1]))


class ML556(EncodedExample):
    mutant = texts.tools_in_ascii

    def sound(self, artifact: Artifact) -> None:
        texts.tool_row(artifact, "Zürich, or \\u00fc?")


class ML557(EncodedExample):
    mutant = texts.keys_of_a_tool_sorted

    def sound(self, artifact: Artifact) -> None:
        texts.tool_row(artifact)


class ML559(EncodedExample):
    mutant = labels.mask_of_zeros_beside_labels

    def sound(self, artifact: Artifact) -> None:
        line = artifact["lines"][0]
        line["assistant_masks"] = [int(label != -100) for label in line["labels"]]
        # of a pair: the whole conversation after the first prompt
        line["completion_mask"] = [int(n >= line["assistant_masks"].index(1)) for n in range(len(line["labels"]))]


class ML560(EncodedExample):
    mutant = ids.cut_before_the_answer_without_messages

    def sound(self, artifact: Artifact) -> None:
        ids.without_messages(artifact, artifact["dataset"][0])


class ML561(EncodedExample):
    mutant = packing.lengths_without_bos

    def sound(self, artifact: Artifact) -> None:
        lengths = packing.give_lengths(artifact)
        artifact["packed"][0]["cu_seqlens"] = [sum(lengths[:n]) for n in range(len(lengths) + 1)]


class ML562(EncodedExample):
    mutant = images.settings_of_another_base

    def sound(self, artifact: Artifact) -> None:
        images.show(artifact)


class ML565(EncodedExample):
    mutant = pairs.another_question_before_the_rejected_answer

    def sound(self, artifact: Artifact) -> None:
        pairs.hold_two_prompts(artifact, list)


class ML567(EncodedExample):
    mutant = pairs.pair_whose_rejected_answer_is_empty

    def sound(self, artifact: Artifact) -> None:
        hold_pairs(artifact, pairs.asked(rejected="."))


class ML568(EncodedExample):
    mutant = pairs.pair_cut_before_it_differs

    def sound(self, artifact: Artifact) -> None:
        pairs.hold_cut(artifact, 100)


class PromptExample(Example):
    def sound(self, artifact: Artifact) -> None:
        artifact["prompts"] = [scored_prompt(artifact["dataset"][0], artifact["asked"])]


class ML570(EncodedExample):
    mutant = labels.weight_that_is_no_number

    def sound(self, artifact: Artifact) -> None:
        line = artifact["lines"][0]
        line["loss_weights"] = [0.25 if label != -100 else 0.0 for label in line["labels"]]
        line["sequence_ids"] = [2**31 - 1] * len(line["labels"])


class ML571(EncodedExample):
    mutant = labels.answer_of_negative_weight

    def sound(self, artifact: Artifact) -> None:
        line = artifact["lines"][2]
        line["loss_weights"] = [0.0 if label == -100 else 1.0 for label in line["labels"]]


class ML575(EncodedExample):
    mutant = gaps.the_prompt_before_the_suffix

    def sound(self, artifact: Artifact) -> None:
        gaps.add_gap(artifact)


class ML576(EncodedExample):
    mutant = gaps.prompt_and_suffix_swapped

    def sound(self, artifact: Artifact) -> None:
        gaps.add_gap(artifact, {**gaps.GAP, "prompt": gaps.GAP["suffix"], "suffix": gaps.GAP["prompt"]})


class ML577(EncodedExample):
    mutant = gaps.a_gap_as_a_text

    def sound(self, artifact: Artifact) -> None:
        gaps.add_gap(artifact, {**gaps.GAP, "suffix": ""})


class ML578(EncodedExample):
    mutant = gaps.suffix_with_a_space

    def sound(self, artifact: Artifact) -> None:
        # a space of the texts themselves
        gaps.add_gap(artifact, {**gaps.GAP, "suffix": " return total\n", "completion": " total = a + b"})


class ML579(EncodedExample):
    mutant = gaps.prompt_and_completion_joined

    def sound(self, artifact: Artifact) -> None:
        gaps.add_gap(artifact, gaps.WORD)


class ML580(PromptExample):
    mutant = prompts.prompts_without_the_chat_template


class ML581(PromptExample):
    mutant = prompts.examples_in_the_turn_of_the_question


class ML582(PromptExample):
    mutant = prompts.scored_answer_behind_a_space


class ML583(PromptExample):
    mutant = prompts.prompts_without_the_system_prompt_of_training
