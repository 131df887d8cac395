"""Settings beside the tokens: what is written around a text, how ids become text, answers end and images are cut."""

from __future__ import annotations

import json
from typing import Any

from bench_tokenizer import VERSION_5, rewrite
from gallery import Artifact, mutant

DECODER_THAT_CLEANS = {"type": "WordPiece", "prefix": "##", "cleanup": True}


@mutant("ML238", "N93", says="add_eos_token is true")
def promised_eos(artifact: Artifact) -> None:
    """`tokenizer_config.json` promises an EOS after every text, and the post-processor writes none."""
    artifact["tokenizer_config"]["add_eos_token"] = True


@mutant("ML227 ML238", "N93", says="add_bos_token is false")
def unannounced_bos(artifact: Artifact) -> None:
    """The post-processor writes a BOS before every text, and `tokenizer_config.json` denies it."""
    artifact["tokenizer_json"]["post_processor"] = artifact["bos_post_processor"]
    artifact["tokenizer_config"]["add_bos_token"] = False


@mutant("ML227 ML238", "N93", says="add_bos_token is false")
def unannounced_bos_within_a_sequence(artifact: Artifact) -> None:
    """The same, by the second of two post-processors."""
    processors = [artifact["tokenizer_json"]["post_processor"], artifact["bos_post_processor"]]
    artifact["tokenizer_json"]["post_processor"] = {"type": "Sequence", "processors": processors}
    artifact["tokenizer_config"]["add_bos_token"] = False


def decoders(artifact: Artifact, *more: Any) -> None:
    """Put decoders behind the one of the tokenizer."""
    decoder = artifact["tokenizer_json"]["decoder"]
    artifact["tokenizer_json"]["decoder"] = {"type": "Sequence", "decoders": [decoder, *more]}


@mutant("ML239", "N94", says='"He said, no! Is')
def decoder_that_cleans_spaces(artifact: Artifact) -> None:
    """The decoder removes spaces before punctuation."""
    decoders(artifact, DECODER_THAT_CLEANS)


@mutant("ML239", "N94")
def decoder_that_strips(artifact: Artifact) -> None:
    """The decoder strips the space with which an answer begins."""
    decoders(artifact, {"type": "Strip", "content": " ", "start": 1, "stop": 0})


@mutant("ML239", says="atoin")
def decoder_that_replaces_a_word(artifact: Artifact) -> None:
    """The decoder replaces a text that no probe has."""
    decoders(artifact, {"type": "Replace", "pattern": {"String": "ation"}, "content": "atoin"})


@mutant("ML239", "N94")
def decoder_is_lost(artifact: Artifact) -> None:
    """There is no decoder: tokens are joined as the vocabulary spells them."""
    artifact["tokenizer_json"]["decoder"] = None


@mutant("ML239", "N94", says="clean_up_tokenization_spaces" if VERSION_5 else "He said, no!")
def spaces_are_cleaned_up(artifact: Artifact) -> None:
    """The tokenizer is told to remove spaces before punctuation."""
    artifact["tokenizer_config"]["clean_up_tokenization_spaces"] = True


@mutant("ML240", "N95", says="eos_token_id is missing")
def no_eos_at_generation(artifact: Artifact) -> None:
    """The generation configuration has no EOS."""
    del artifact["generation_config"]["eos_token_id"]


@mutant("ML240", "N95", says="eos_token_id is missing")
def empty_generation_config(artifact: Artifact) -> None:
    """The generation configuration is empty."""
    artifact["generation_config"] = {}


@mutant("ML240", "N95", says="suppress_tokens forbids EOS")
def eos_is_suppressed(artifact: Artifact) -> None:
    """EOS is never sampled."""
    artifact["generation_config"]["suppress_tokens"] = [5, 2]


@mutant("ML240", "N95", says="bad_words_ids forbids EOS")
def eos_is_a_bad_word(artifact: Artifact) -> None:
    """EOS is one of the words that an answer must not have."""
    artifact["generation_config"]["bad_words_ids"] = [[1010, 1011], [2]]


@mutant("ML240", "N95", says="forced_bos_token_id is 1")
def first_token_is_forced(artifact: Artifact) -> None:
    """Every answer begins with BOS."""
    artifact["generation_config"]["forced_bos_token_id"] = 1


@mutant("ML241", "N96", says="repetition_penalty is 1.2")
def repetitions_are_punished(artifact: Artifact) -> None:
    """A penalty is saved with the model."""
    artifact["generation_config"]["repetition_penalty"] = 1.2


@mutant("ML241", "N96", says="no_repeat_ngram_size is 3")
def repeated_words_are_forbidden(artifact: Artifact) -> None:
    """No three tokens may come twice, in code and JSON too."""
    artifact["generation_config"]["no_repeat_ngram_size"] = 3


@mutant("ML241", says="max_length is 20")
def default_length_is_saved(artifact: Artifact) -> None:
    """The default length of transformers 4 is saved as if it had been chosen."""
    artifact["generation_config"]["max_length"] = 20


@mutant("ML241", says="forced_eos_token_id is 2")
def last_token_is_forced(artifact: Artifact) -> None:
    """A cut answer ends with EOS, as if it were whole."""
    artifact["generation_config"]["forced_eos_token_id"] = 2


@mutant("ML241", says="begin_suppress_tokens has EOS")
def no_answer_is_empty(artifact: Artifact) -> None:
    """EOS is not sampled first."""
    artifact["generation_config"]["begin_suppress_tokens"] = [2]


def with_images(artifact: Artifact, **changed: Any) -> None:
    """Give the tokenizer image settings, and the folder the files of a processor; keys of either may be changed."""
    folder = artifact["folder"]
    rewrite(folder / "tekken.json", lambda tekken: tekken.update(image=_IMAGE))
    processor = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    preprocessor = {"image_processor_type": "PixtralImageProcessor", "patch_size": 14, "size": {"longest_edge": 1540}}
    for name, config in (("processor", processor), ("preprocessor", preprocessor)):
        own = {key.partition("__")[2]: value for key, value in changed.items() if key.startswith(f"{name}__")}
        (folder / f"{name}_config.json").write_text(json.dumps(config | own))


_IMAGE = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}


@mutant("ML242", says="patch_size is 16")
def patches_of_another_model(artifact: Artifact) -> None:
    """The processor cuts images into other patches."""
    with_images(artifact, processor__patch_size=16)


@mutant("ML242", says="spatial_merge_size is 1")
def merge_is_lost(artifact: Artifact) -> None:
    """The processor writes four times the tokens."""
    with_images(artifact, processor__spatial_merge_size=1)


@mutant("ML242", says='size is {"longest_edge": 1024}')
def images_are_scaled_down(artifact: Artifact) -> None:
    """Images are scaled to another size."""
    with_images(artifact, preprocessor__size={"longest_edge": 1024})


@mutant("ML242", says='image_token is "<image>"')
def image_token_of_another_family(artifact: Artifact) -> None:
    """The processor writes a token that the tokenizer does not have."""
    with_images(artifact, processor__image_token="<image>")


@mutant("ML242", says='image_break_token is "[IMG_END]"')
def image_tokens_swapped(artifact: Artifact) -> None:
    """The processor ends each line of an image as if it were the last."""
    with_images(artifact, processor__image_break_token="[IMG_END]")


@mutant("ML242", says="patch_size is 8")
def patches_within_the_processor(artifact: Artifact) -> None:
    """The settings of the image processor stand within those of the processor, as transformers 5 saves them."""
    nested = {"patch_size": 8, "size": {"longest_edge": 1540}}
    with_images(artifact, processor__image_processor=nested)
    (artifact["folder"] / "preprocessor_config.json").unlink()


@mutant("ML242", says="image_token_index is 11")
def image_token_of_another_id(artifact: Artifact) -> None:
    """The model puts images at the id of another token."""
    with_images(artifact)
    artifact["config"]["image_token_index"] = 11


@mutant("ML242", says="image_token_id is 12")
def image_token_of_another_id_without_a_processor(artifact: Artifact) -> None:
    """The same under the name of transformers 5, in a folder without the files of a processor."""
    artifact["config"]["image_token_id"] = 12
