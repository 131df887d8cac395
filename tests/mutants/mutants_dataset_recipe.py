"""Recipes that `mistral-lora train` refuses, for themselves or for their base."""

from __future__ import annotations

import yaml
from bench_dataset import set_training, write_rows
from gallery import Artifact, mutant


@mutant("ML640", says="training.step")
def recipe_with_a_misspelt_key(artifact: Artifact) -> None:
    """A key of the recipe is misspelt."""
    artifact["recipe"]["training"] = {"step": 1}


@mutant("ML640", says="appears twice")
def recipe_with_a_key_twice(artifact: Artifact) -> None:
    """A key of the recipe stands there twice, and YAML keeps the second."""
    artifact["recipe"] = yaml.safe_dump(artifact["recipe"]) + "output: elsewhere\n"


@mutant("ML640", says="a branch or tag")
def base_at_a_branch(artifact: Artifact) -> None:
    """The base is named by a branch, which moves."""
    artifact["recipe"]["base"]["revision"] = "main"


@mutant("ML675", says="2")
def learning_rate_without_its_exponent(artifact: Artifact) -> None:
    """The learning rate is 2 in place of 2e-4."""
    set_training(artifact, learning_rate=2)


def use_columns(artifact: Artifact, **keys: str) -> None:
    """Make the rows Alpaca's, and declare the columns of its fields."""
    texts = [[message["content"] for message in row["messages"]][-2:] for row in artifact["rows"][:4]]
    artifact["rows"] = [{"instruction": question, "output": answer} for question, answer in texts]
    source = {"path": "rows.jsonl", "format": "alpaca", "layout": {"keys": keys}}
    artifact["recipe"]["data"]["train"] = [source]


@mutant("ML676", says="reads 'output' as the prompt, 'instruction' as the answer")
def columns_exchanged(artifact: Artifact) -> None:
    """The columns of prompts and of answers are exchanged in their declaration."""
    use_columns(artifact, instruction="output", output="instruction")


@mutant("ML641", "I33", says="'qproj' matches nothing")
def misspelt_target_modules(artifact: Artifact) -> None:
    """A target of the adapter is misspelt."""
    artifact["recipe"]["lora"] = {"target_modules": ["qproj", "v_proj"]}


@mutant("ML641", says="'lm_haed' matches nothing")
def misspelt_module_to_save(artifact: Artifact) -> None:
    """A module that is to be trained in full is misspelt."""
    artifact["recipe"]["lora"] = {"modules_to_save": ["lm_haed"]}


@mutant("ML641", says="'lm_head' is one with embed_tokens")
def head_of_a_tied_base(artifact: Artifact) -> None:
    """The head is to be trained in full, and the base ties it to its embeddings."""
    artifact["config"]["tie_word_embeddings"] = True
    artifact["recipe"]["lora"] = {"modules_to_save": ["lm_head"]}


@mutant("ML641", says="MistralLarge4ForConditionalGeneration: its sparse attention")
def architecture_that_is_not_trained(artifact: Artifact) -> None:
    """The base is of an architecture that is not trained."""
    names = {"architectures": ["MistralLarge4ForConditionalGeneration"], "model_type": "mistral_large4"}
    artifact["config"] = {**names, "text_config": artifact["config"]}


@mutant("ML641", says="LlamaForCausalLM, which no tokenizer of Mistral's is an oracle for")
def architecture_without_an_oracle(artifact: Artifact) -> None:
    """The base is trained by its template alone, and the recipe asks for Mistral's tokenizer."""
    artifact["config"] |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _mixtral(artifact: Artifact, *targets: str) -> None:
    artifact["config"] |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2}
    artifact["recipe"]["lora"] = {"target_modules": [*targets]}


@mutant("ML641", says="'gate' is of a router or its experts in MixtralForCausalLM")
def router_as_a_target(artifact: Artifact) -> None:
    """The router of a Mixtral is to be adapted."""
    _mixtral(artifact, "q_proj", "gate")


@mutant("ML641", says="'all-linear' has the MLP of each layer, and in MixtralForCausalLM these are experts")
def experts_as_targets(artifact: Artifact) -> None:
    """Every linear layer of a Mixtral is to be adapted, its router and experts among them."""
    _mixtral(artifact, "all-linear")


@mutant(
    "ML641", says="'linear_1' matches nothing, outside the decoder layers only: model.multi_modal_projector.linear_1"
)
def projector_as_a_target(artifact: Artifact) -> None:
    """The projector of a model of text and images is to be adapted by rows of text."""
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    artifact["config"] = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {**artifact["config"], "architectures": None},
        "vision_config": {**vision, "num_attention_heads": 2, "head_dim": 8},
    }
    artifact["recipe"]["lora"] = {"target_modules": ["q_proj", "linear_1"]}


@mutant("ML641", says="of model_type 'ministral'")
def model_type_of_another_class(artifact: Artifact) -> None:
    """The configuration names two classes, and AutoModel goes by the second."""
    artifact["config"]["model_type"] = "ministral"


@mutant("ML641", says="its layer_types are 'full_attention'")
def layer_types_that_are_no_list(artifact: Artifact) -> None:
    """The kinds of the layers are one word."""
    artifact["config"] |= {"sliding_window": 8, "layer_types": "full_attention"}


@mutant("ML641", says="no model can be made of it")
def configuration_without_a_model(artifact: Artifact) -> None:
    """The configuration has a value of the wrong type."""
    artifact["config"]["hidden_size"] = "16"


@mutant("ML641", says="num_hidden_layers is 1000000000")
def configuration_with_a_billion_layers(artifact: Artifact) -> None:
    """The configuration has more layers than can be made."""
    artifact["config"]["num_hidden_layers"] = 10**9


@mutant("ML641", says="is quantised: quant_method 'bitsandbytes'")
def quantised_base(artifact: Artifact) -> None:
    """The base is saved in 8 bits."""
    artifact["config"]["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@mutant("ML641", says="no model_type")
def configuration_without_a_type(artifact: Artifact) -> None:
    """The base's configuration names its architecture, and no type."""
    del artifact["config"]["model_type"]


@mutant("ML641", says="quantis")
def quantisation_without_a_method(artifact: Artifact) -> None:
    """The base declares a quantisation, and none of its values: transformers does not load it."""
    artifact["config"]["quantization_config"] = {}


@mutant("ML641", says="quant_method 'modelopt', quant_algo 'NVFP4'")
def base_in_nvfp4(artifact: Artifact) -> None:
    """The base is in NVFP4, as some of Mistral's checkpoints are."""
    artifact["config"]["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@mutant("ML641", says="weight_block_size is [128]")
def fp8_base_with_a_block_of_one_side(artifact: Artifact) -> None:
    """The base is in FP8, and the size of a block has one side only."""
    artifact["config"]["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128]}


@mutant("ML641", says="the tokenizer has 32768 ids, the model 32000")
def tokenizer_with_more_ids_than_the_model(artifact: Artifact) -> None:
    """The tokenizer has ids that the model does not have."""
    artifact["config"]["vocab_size"] = 32000


@mutant("ML641", says="loggers that transformers knows")
def unknown_logger(artifact: Artifact) -> None:
    """A logger is misspelt."""
    set_training(artifact, report_to=["tensorbord"])


@mutant("ML642", says="'swanlab' is not installed")
def logger_that_is_not_installed(artifact: Artifact) -> None:
    """A logger of the recipe is not installed here."""
    set_training(artifact, report_to=["swanlab"])


@mutant("ML641", says="kernels for a GPU")
def kernels_on_a_cpu_by_choice(artifact: Artifact) -> None:
    """The recipe chooses the CPU, and kernels that run on GPUs alone."""
    set_training(artifact, device="cpu", kernels="liger")


@mutant("ML641", says="'fp16', and the run is on the CPU")
def fp16_on_a_cpu_by_choice(artifact: Artifact) -> None:
    """The recipe chooses the CPU, and a precision for GPUs."""
    set_training(artifact, device="cpu", precision="fp16")


@mutant("ML641", says="No such file")
def schema_that_is_missing(artifact: Artifact) -> None:
    """The JSON Schema of a format check is missing."""
    artifact["recipe"]["evaluation"] = {"generations": 1, "checks": [{"json_schema": "answer.json"}]}


@mutant("ML641", says="out is not a folder")
def file_in_place_of_the_output(artifact: Artifact) -> None:
    """A file has the name of the output folder."""
    (artifact["folder"] / "out").write_text("")


@mutant("ML641", says="is inside the base")
def output_inside_the_base(artifact: Artifact) -> None:
    """The output is a folder of the base."""
    artifact["recipe"]["base"] = {"path": "base", "weights_sha256": "0" * 64}
    artifact["recipe"]["output"] = "base/out"


@mutant("ML641", says="models holds")
def output_that_holds_the_rows(artifact: Artifact) -> None:
    """The rows are in the folder that is to be the output."""
    (artifact["folder"] / "models").mkdir()
    write_rows(artifact["folder"] / "models" / "rows.jsonl", artifact["rows"])
    artifact["recipe"]["data"]["train"] = ["models/rows.jsonl"]
    artifact["recipe"]["output"] = "models"


@mutant("ML641", says="which a finished run removes")
def rows_in_the_work_folder(artifact: Artifact) -> None:
    """The rows are in the work folder, which a finished run removes."""
    (artifact["folder"] / "out.work").mkdir()
    write_rows(artifact["folder"] / "out.work" / "rows.jsonl", artifact["rows"])
    artifact["recipe"]["data"]["train"] = ["out.work/rows.jsonl"]
