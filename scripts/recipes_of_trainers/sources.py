"""The repositories whose recipes are recorded: which files, and which of their keys."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A repository with recipes.

    Attributes:
        repository: Its owner and name on GitHub.
        title: The trainer.
        reader: The function of `trainers` that says what the keys mean.
        files: A pattern of the paths of its recipes.
        keys: A pattern of the keys that are recorded.
    """

    repository: str
    title: str
    reader: str
    files: str
    keys: str

    @property
    def name(self) -> str:
        """The name of its file of facts."""
        return self.repository.replace("/", "-").lower()

    def is_recipe(self, path: str) -> bool:
        """Report whether a path is one of its recipes."""
        return re.search(self.files, path) is not None


_NOTEBOOK = (
    r"^Fast\w+\.from_pretrained(\(model_name\))?$|get_peft_model\(|apply_chat_template$|get_chat_template\(chat_template\)"
    r"|dataset_text_field|^(SFT|DPO|GRPO|Unsloth|transformers\.)?Trainer$|Trainer\(data_collator\)|train_on_responses_only|UnslothVision"
    r"DataCollator$|^base_model_id$|^model_name$|ForConditionalGeneration\.from_pretrained$|LoraConfig\(|Collator\w+\(mlm\)"
    r"|\.pad_token$|add_eos_token|\.jobs\.create\(model\)"
)

SOURCES = (
    Source(
        "axolotl-ai-cloud/axolotl",
        "Axolotl",
        "axolotl",
        r"^examples/(mistral|mistral4|magistral|devstral|ministral|ministral3|mistral-medium-3_5|mistral-small|pixtral"
        r"|voxtral)/.*\.ya?ml$",
        r"^(base_model|adapter|lora_(target|exclude|modules)\w*|unfrozen_parameters|datasets\[\d\]\.(type|path)|rl"
        r"|chat_template|tokenizer_use_mistral_common|processor_type|train_on_inputs|eot_tokens|special_tokens\.\w+"
        r"|tokens)$",
    ),
    Source(
        "modal-labs/llm-finetuning",
        "Axolotl, by Modal",
        "axolotl",
        r"^config/mi[sx]tral.*\.yml$",
        r"^(base_model|adapter|lora_(target|exclude|modules)\w*|datasets\[\d\]\.(path|type\.field_\w+)|train_on_inputs"
        r"|special_tokens\.\w+|tokens)$",
    ),
    Source(
        "hiyouga/LLaMA-Factory",
        "LLaMA-Factory",
        "slots",
        r"^src/llamafactory/extras/constants\.py$",
        "",
    ),
    Source("modelscope/ms-swift", "ms-swift", "slots", r"^swift/model/models/mistral\.py$", ""),
    Source(
        "NVIDIA-NeMo/Automodel",
        "NeMo AutoModel",
        "nemo",
        r"^examples/.*(devstral|mistral|ministral|mixtral)[^/]*\.ya?ml$",
        r"^(recipe|model\.(config\.)?pretrained_model_name_or_path|peft\.(match_all_linear|target_modules|exclude_modules)"
        r"|dataset\._target_|freeze_config\.\w+)$",
    ),
    Source(
        "unslothai/notebooks",
        "Unsloth",
        "unsloth",
        r"^nb/(Magistral|Ministral|Mistral|Pixtral|Zephyr)[^/]*\.ipynb$",
        _NOTEBOOK,
    ),
    Source(
        "huggingface/trl",
        "TRL",
        "notebook",
        r"^examples/notebooks/(grpo|sft)_ministral3_vl\.ipynb$",
        _NOTEBOOK,
    ),
    Source(
        "huggingface/peft",
        "PEFT",
        "peft_script",
        r"^examples/sft/run_(unsloth_peft|peft_multigpu)\.sh$",
        r"^(model_name_or_path|chat_template_format|dataset_text_field|lora_target_modules|append_concat_token)$",
    ),
    Source(
        "huggingface/alignment-handbook",
        "TRL, by the alignment handbook",
        "handbook",
        r"^recipes/(zephyr-7b-beta|zephyr-141b-A35b|constitutional-ai|pref_align_scan)/.*\.yaml$",
        r"^(model_name_or_path|use_peft|lora_target_modules|assistant_only_loss|dataset_mixture\.datasets\[0\]\.(id"
        r"|columns)|max_prompt_length|beta)$",
    ),
    Source(
        "brevdev/launchables",
        "transformers and PEFT, by Brev",
        "notebook",
        r"^((bio)?mistral-finetune|mistral-finetune-own-data|mixtral-finetune(-own-data)?)\.ipynb$",
        _NOTEBOOK,
    ),
    Source(
        "OpenRLHF/OpenRLHF",
        "OpenRLHF",
        "openrlhf",
        r"^examples/scripts/train_sft_mixtral_lora\.sh$",
        r"^(model\.model_name_or_path|data\.(input_key|output_key)|ds\.lora\.\w+)$",
    ),
    Source(
        "InternLM/xtuner",
        "XTuner",
        "xtuner",
        r"^xtuner/configs/(mistral|mixtral|zephyr|custom_dataset/\w+/(mistral|mixtral|zephyr))/.*\.py$",
        r"^(pretrained_model_name_or_path|prompt_template|dict\(target_modules\)|dict\(dataset_map_fn\)|data_path)$",
    ),
    Source(
        "pytorch/torchtune",
        "torchtune",
        "torchtune",
        r"^recipes/configs/mistral/7B_.*\.yaml$",
        r"^(model\._component_|model\.(lora_attn_modules|apply_lora_to_\w+)|tokenizer\.(_component_|path)"
        r"|dataset\.(_component_|train_on_input))$",
    ),
    Source(
        "Lightning-AI/litgpt",
        "LitGPT",
        "litgpt",
        r"^config_hub/finetune/mistral.*\.yaml$",
        r"^(checkpoint_dir|lora_(query|key|value|projection|mlp|head)|data\.class_path|data\.init_args\.(mask_prompt"
        r"|prompt_style))$",
    ),
    Source(
        "mistralai/mistral-finetune",
        "mistral-finetune",
        "mistral_finetune",
        r"^(example/7B\.yaml|tutorials/.*\.ipynb)$",
        r"^(lora\.rank|model_id_or_path|snapshot_download\(repo_id\))$",
    ),
    Source(
        "mistralai/cookbook",
        "Mistral's cookbook",
        "hosted",
        r"^(mistral/data_generation/synthetic_data_gen_and_finetune|mistral/deprecated/fine_tune/\w+"
        r"|third_party/wandb/02_finetune_and_eval|third_party/LlamaIndex/llamaindex_mistralai_finetuning)\.ipynb$",
        r"\.jobs\.create\(model\)|^MistralAIFinetuneEngine\(base_model\)$",
    ),
)

NOT_JUDGED = (
    (
        "mistralai/Mistral-*, the model cards on the Hub",
        "the Hub could not be reached; a card's snippets are not a repository's files",
    ),
    (
        "unslothai/unsloth",
        "the defaults of a user interface (`studio/…/model_defaults/mistral/`), which chooses layers by the data",
    ),
    (
        "huggingface/autotrain-advanced, mosaicml/llm-foundry, ludwig-ai/ludwig, ml-explore/mlx-lm",
        "no training recipe that names a Mistral base",
    ),
    (
        "unslothai/notebooks, copies for Kaggle, AMD and courses, and as scripts",
        "the same recipes as the notebooks in `nb/` above",
    ),
    ("brevdev/launchables, `mistral-finetune-nemo.ipynb`", "NeMo's older scripts, whose settings are in their files"),
    (
        "NVIDIA/NeMo, NVIDIA-NeMo/Megatron-Bridge",
        "functions over Megatron's models, whose layers have other names than those of transformers",
    ),
    ("SkyPilot, Databricks, SageMaker and other platforms", "not read: they wrap a trainer"),
    ("huggingface/cookbook", "its notebooks for Mistral ask a model, and train none"),
    ("huggingface/trl, `examples/scripts/`", "the scripts name bases of other families"),
    (
        "huggingface/peft, other examples",
        "the recipes name bases of other families, or collate rows by code that is not a setting",
    ),
    ("Llama, Qwen and other bases in the same repositories", "not Mistral's"),
)
"""Where recipes were looked for and not judged, with the reason."""
