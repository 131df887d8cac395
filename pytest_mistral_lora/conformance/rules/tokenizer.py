"""Rules of the subject `tokenizer`: is what transformers loads the tokenizer that mistral-common knows?"""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules.rule import Rule

RULES = (
    Rule(
        "ML201",
        "The checkpoint's tokenizer loads, as mistral-common's and as transformers'.",
        "tokenizer",
        "Without both, nothing can be compared.",
        "Read the cause; a SentencePiece file needs a name like tokenizer.model.v3.",
        "general",
    ),
    Rule(
        "ML202",
        "Every control token of mistral-common is the same special token in transformers, and no other token is.",
        "tokenizer",
        "A swapped or missing control token turns structure into text.",
        "Take tokenizer files of one revision; do not add or rename special tokens.",
        "huggingface/transformers#42894",
    ),
    Rule(
        "ML203",
        "BOS, EOS and UNK of transformers are those of mistral-common.",
        "tokenizer",
        "Templates write {{ bos_token }} and {{ eos_token }}: unset or wrong, rows have no end.",
        "Set bos_token, eos_token and unk_token in tokenizer_config.json.",
        "axolotl-ai-cloud/axolotl#1608",
    ),
    Rule(
        "ML204",
        "The pad token is not an EOS.",
        "tokenizer",
        "Collators mask the pad id, and every real EOS with it: the model never stops.",
        "Use <pad> where the vocabulary has it, else <unk>.",
        "huggingface/transformers#23530",
    ),
    Rule(
        "ML205",
        "Bare text gets the same ids from transformers as from mistral-common.",
        "tokenizer",
        "A wrong pre-tokenizer, merge order or `legacy` flag changes ids all over the data.",
        "Load SentencePiece files with legacy=False; take tokenizer.json of the pinned revision.",
        "huggingface/transformers#42299",
    ),
    Rule(
        "ML206",
        "A tokenizer that is saved and loaded again gives the same ids and the same template.",
        "tokenizer",
        "What is shipped with the adapter is not what it was trained with.",
        "Save with the transformers version that loads; compare the files.",
        "huggingface/transformers#47553",
    ),
    Rule(
        "ML207",
        "A shipped tokenizer file is the file that the goldens were recorded with.",
        "tokenizer",
        "A tokenizer from another version or revision has other ids.",
        "Install a mistral-common that ships it, or record the goldens again.",
        "general",
    ),
    Rule(
        "ML208",
        "The base checkpoint is at hand, and is the one that is pinned.",
        "tokenizer",
        "A tokenizer or weights of another revision are another model.",
        "Fetch the pinned revision once; pin what is meant.",
        "huggingface/peft#1567",
    ),
)
