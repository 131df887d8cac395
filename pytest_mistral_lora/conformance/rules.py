"""The closed list of rules. An id never changes its meaning; help, findings and tests are made from this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule that an artifact must keep.

    Attributes:
        id: `ML` and three digits.
        title: What must hold, in one sentence.
        subject: The subject of the suite that checks it.
        why: What goes wrong where it is broken.
        fix: What to do about it.
        source: Where the rule comes from: a thread, a specification, the reference's code.
    """

    id: str
    title: str
    subject: str
    why: str
    fix: str
    source: str


_FINETUNE = "mistral-finetune, finetune/data/tokenize.py"
_ORACLE = "mistral-common, tokens/tokenizers/instruct.py"

_TABLE = (
    Rule(
        "ML001",
        "A golden has the form that the schema says, and its supervised text is the assistant's text.",
        "template",
        "A golden that contradicts itself guards nothing.",
        "Record it again: pytest --mistral-golden --mistral-golden-update, or scripts/record_goldens.py.",
        "JSON Schema 2020-12",
    ),
    Rule(
        "ML002",
        "mistral-common gives a golden row the recorded ids.",
        "template",
        "The reference itself has moved: a model trained under one version is served under another.",
        "Pin mistral-common to the version of the base model's release, or read its changelog and record again.",
        _ORACLE,
    ),
    Rule(
        "ML003",
        "A golden row has the recorded labels and spans.",
        "template",
        "Other tokens carry loss than when the golden was recorded.",
        "Find the change that moved the mask; record again only if it was meant.",
        _FINETUNE,
    ),
    Rule(
        "ML004",
        "The chat template gives the ids of mistral-common, but for the named deviations.",
        "template",
        "Training and serving see different prompts; quality is lost without any error.",
        "Use the template that mistral-common generates for this tokenizer, or train with the mistral-common backend.",
        "mistralai/mistral-common#3",
    ),
    Rule(
        "ML005",
        "The chat template shows no deviation that was not recorded.",
        "template",
        "An upgrade of transformers or mistral-common changed how the template renders or is encoded.",
        "Pin the versions that recorded the golden, or read the deviation's reason and record again.",
        "huggingface/transformers#42299",
    ),
    Rule(
        "ML006",
        "The template's generation blocks mark exactly the tokens that the oracle supervises.",
        "template",
        "Trainers that use the assistant mask train on other tokens than they should.",
        "Put {% generation %} around the whole answer and its EOS.",
        "huggingface/transformers#34172",
    ),
    Rule(
        "ML007",
        "Every row of a golden folder is recorded, and recorded as it is now.",
        "template",
        "A row without a golden is not guarded.",
        "Record it: pytest --mistral-golden --mistral-golden-dir PATH --mistral-golden-update.",
        "general",
    ),
    Rule(
        "ML101",
        "Spans partition the row, and labels are what the spans say: the token's own id or -100.",
        "mask",
        "A mask that is shifted by one or has holes trains on the wrong tokens.",
        "Compute labels from the turn that each token was encoded for.",
        "PyTorch cross_entropy, ignore_index",
    ),
    Rule(
        "ML102",
        "No token of the system, the user or a tool is supervised, nor BOS.",
        "mask",
        "The model learns to speak for the user.",
        "Supervise assistant turns only; never search for marker strings or compare prefixes.",
        _FINETUNE,
    ),
    Rule(
        "ML103",
        "Every token of an assistant turn of weight 1 is supervised, and none of weight 0.",
        "mask",
        "Parts of the answer are not learned, or a bad answer is.",
        "Supervise the turn from its first token to EOS; carry the weight of each message through.",
        _FINETUNE,
    ),
    Rule(
        "ML104",
        "Every supervised turn ends with a supervised EOS.",
        "mask",
        "The model never learns to stop.",
        "Do not mask the pad id where pad is EOS; do not cut a turn before its EOS.",
        "huggingface/transformers#23530",
    ),
    Rule(
        "ML105",
        "BOS stands once, in front.",
        "mask",
        "A template that writes BOS and a tokenizer that adds it give two.",
        "Encode rendered text with add_special_tokens=False.",
        "vllm-project/vllm#16976",
    ),
    Rule(
        "ML106",
        "Text never becomes a control token.",
        "mask",
        "A user can forge a turn or an EOS; the model is trained on it.",
        "Encode texts apart from the control tokens, as mistral-common does.",
        "huggingface/transformers#29279",
    ),
    Rule(
        "ML107",
        "A second, independent mask, read off the control tokens, agrees with the labels.",
        "mask",
        "Two ways to the same mask that disagree mean that one is wrong.",
        "Report it with the row.",
        _ORACLE,
    ),
    Rule(
        "ML108",
        "The weights of alternating messages change no id.",
        "mask",
        "Masking a turn must not change the prompt.",
        "Keep weights out of the rendering.",
        _FINETUNE,
    ),
    Rule(
        "ML109",
        "What is supervised decodes to what the assistant says.",
        "mask",
        "The model is trained on a text that is not in the dataset.",
        "Compare the decoded span with the message; look for a wrong tokenizer or a wrong span.",
        _ORACLE,
    ),
    Rule(
        "ML110",
        "A tool call is supervised from its marker to EOS.",
        "mask",
        "Without the marker the model never starts a call.",
        "Supervise [TOOL_CALLS] and what follows it.",
        _FINETUNE,
    ),
    Rule(
        "ML111",
        "Encoding a row twice gives the same, and leaves the row as it was.",
        "mask",
        "A row that changes while it is encoded is trained on differently in the second epoch.",
        "Encode a copy.",
        "general",
    ),
    Rule(
        "ML112",
        "The prompt at inference is the beginning of the row in training.",
        "mask",
        "The model is asked in another way than it was trained.",
        "Build the prompt by the same code as the training row.",
        _ORACLE,
    ),
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
        "ML301",
        "A tiny model learns a handful of conversations by heart and says them again through the inference path.",
        "train",
        "Template, labels, saving or loading is broken somewhere between training and inference.",
        "Read the other findings of this subject first: they say which part.",
        "general",
    ),
    Rule(
        "ML302",
        "Only LoRA tensors change in training.",
        "train",
        "The base is not the base any more, and an adapter-only save loses what was trained.",
        "Freeze the base; look at modules_to_save and at tied embeddings.",
        "huggingface/peft#137",
    ),
    Rule(
        "ML303",
        "Every targeted layer is trained.",
        "train",
        "Layers that never move are a silent loss of capacity.",
        "Check target_modules and activation checkpointing (use_reentrant=False).",
        "huggingface/transformers#42489",
    ),
    Rule(
        "ML304",
        "The loss falls.",
        "train",
        "Nothing is learned.",
        "Check the learning rate, the labels and which parameters are trainable.",
        "huggingface/peft#282",
    ),
    Rule(
        "ML305",
        "Base and adapter, loaded afresh in a new process, give the logits of the trained model.",
        "train",
        "What is saved is not what was trained.",
        "Compare the adapter's keys with the base's; look for warnings when it is loaded.",
        "huggingface/transformers#38927",
    ),
    Rule(
        "ML306",
        "The loss has no gradient where the next label is -100.",
        "train",
        "Tokens of the user are trained on in spite of the mask.",
        "Check the shift of the labels and the loss function.",
        "huggingface/trl#3781",
    ),
    Rule(
        "ML307",
        "The same seed gives the same adapter, and another seed another one.",
        "train",
        "A run cannot be reproduced from its manifest.",
        "Set the seed before the adapter is made; fix the order of the data.",
        "huggingface/trl#6688",
    ),
    Rule(
        "ML308",
        "manifest.json is valid, and what it says is true of the files.",
        "train",
        "An adapter without its story cannot be trusted.",
        "Do not edit the output folder; train again.",
        "huggingface/peft#1567",
    ),
    Rule(
        "ML401",
        "An adapter holds two tensors for each adapted layer of its base, and nothing else.",
        "adapter",
        "PEFT only warns about tensors that are missing or match nothing, and serves the base as it was.",
        "Save the adapter again from the trained model; compare its names with the base's layers.",
        "huggingface/transformers#38927",
    ),
    Rule(
        "ML402",
        "Every tensor of an adapter is finite.",
        "adapter",
        "One NaN makes every answer NaN.",
        "Lower the learning rate; look at the training log for the first step that was not finite.",
        "hiyouga/LlamaFactory#3353",
    ),
    Rule(
        "ML403",
        "Every adapted layer was trained: its lora_B is not zero.",
        "adapter",
        "A layer whose lora_B is zero does nothing.",
        "Check that the parameters were trainable and in the optimizer.",
        "tloen/alpaca-lora#446",
    ),
    Rule(
        "ML404",
        "The tensors have the rank that the configuration says.",
        "adapter",
        "The scale alpha / r is wrong, or the adapter does not load.",
        "Do not edit adapter_config.json.",
        "huggingface/peft#2502",
    ),
)

RULES = {rule.id: rule for rule in _TABLE}
"""Every rule, by id."""
