"""Real failures of LoRA fine-tunes on Mistral models: what went wrong, and where it was reported.

Ids are stable, and not all numbers are taken. The site's page of incidents is made from this table and the gallery.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Incident:
    """One failure that people met.

    Attributes:
        id: `I` and two digits.
        title: What went wrong.
        threads: Public threads about it.
        out_of_reach: Why nothing here can show it, and what would; empty where a mutant is caught.
    """

    id: str
    title: str
    threads: str
    out_of_reach: str = ""


INCIDENTS = (
    Incident(
        "I01",
        "Pad is EOS, and masking the pad id masks every real EOS",
        "huggingface/transformers#23530, huggingface/trl#976",
    ),
    Incident("I02", "The trainer appends no EOS to an answer", "huggingface/trl#1623, huggingface/trl#3091"),
    Incident("I03", "Template and tokenizer each write a BOS", "vllm-project/vllm#16976, huggingface/open-r1#462"),
    Incident(
        "I04",
        "A template without generation blocks gives an assistant mask of zeros",
        "huggingface/transformers#34172, huggingface/trl#4201",
    ),
    Incident(
        "I05",
        "The search for the response marker finds nothing, because its ids depend on the context",
        "huggingface/trl#588, unslothai/unsloth#1290",
    ),
    Incident("I06", "Truncation leaves a row without any label", "huggingface/trl#6668, huggingface/trl#6320"),
    Incident(
        "I07",
        "Gradient accumulation averages the means of micro-batches",
        "huggingface/transformers#34191, huggingface/transformers#35438",
    ),
    Incident(
        "I08",
        "A chat template differs from the official tokenization by a space",
        "mistralai/mistral-common#3, huggingface/transformers#26891",
    ),
    Incident(
        "I09",
        "The converted Tekken tokenizer splits text by a wrong pattern",
        "huggingface/transformers#42299, huggingface/transformers#42591",
    ),
    Incident(
        "I10",
        "apply_chat_template returns a mapping in place of the expected list of ids",
        "huggingface/transformers#41626, huggingface/transformers#42567",
    ),
    Incident(
        "I11",
        "Text that was rendered first loses its control tokens when it is encoded afterwards",
        "sgl-project/sglang#39773, jundot/omlx#2341",
    ),
    Incident(
        "I12",
        "The system prompt is in another turn than Mistral's, or missing",
        "mistralai/mistral-inference#35, axolotl-ai-cloud/axolotl#3736",
    ),
    Incident(
        "I13",
        "A mask is computed from prefix differences, but a shorter chat does not encode to a prefix of a longer one",
        "huggingface/trl#5213, axolotl-ai-cloud/axolotl#2179",
    ),
    Incident("I14", "A tool call's id is not nine letters or digits", "vllm-project/vllm#9019, ml-explore/mlx-lm#1375"),
    Incident(
        "I15",
        "A merge into a quantised or rounded base does not equal base plus adapter",
        "huggingface/peft#2321, huggingface/peft#1043",
    ),
    Incident(
        "I16", "The saved adapter is empty, or lacks trained tensors", "huggingface/peft#2892, huggingface/trl#4416"
    ),
    Incident(
        "I17",
        "The adapter's names match nothing in the base, and you only get a warning",
        "huggingface/transformers#38927, huggingface/peft#2699",
    ),
    Incident(
        "I18",
        "Activation checkpointing cuts the gradient of a frozen base's adapter",
        "huggingface/peft#137, huggingface/transformers#42489",
    ),
    Incident(
        "I19",
        "The adapter does not record the revision of its base",
        "huggingface/peft#1567, huggingface/transformers#29849",
    ),
    Incident("I20", "Packed conversations attend to one another", "huggingface/trl#1230, hiyouga/LlamaFactory#2289"),
    Incident(
        "I21",
        "A cache or a mask turns the isolation of packed conversations off without a warning",
        "huggingface/trl#5316, OpenRLHF/OpenRLHF#377",
    ),
    Incident("I22", "A user's text becomes control tokens", "huggingface/transformers#29279, vllm-project/vllm#31735"),
    Incident(
        "I23",
        "`legacy` puts a space after every control token",
        "huggingface/transformers#24569, huggingface/tokenizers#1448",
    ),
    Incident(
        "I24",
        "Another tokenizer class gives other ids",
        "verl-project/verl#6080, huggingface/transformers#42894",
    ),
    Incident(
        "I25",
        "tokenizer_config.json names a class that other versions do not have",
        "unslothai/unsloth#8444, huggingface/transformers#47553",
    ),
    Incident(
        "I26",
        "The served template differs from the trained one: it is stored in two files, or was moved",
        "huggingface/text-generation-inference#3247, hiyouga/LlamaFactory#8399",
    ),
    Incident("I31", "The length of a mapping is taken for the length of the prompt", "huggingface/trl#6105"),
    Incident("I33", "A fused loss ignores the assistant mask", "huggingface/trl#3781, huggingface/trl#3484"),
    Incident(
        "I34", "EOS is cut off or masked if a row is truncated", "meta-pytorch/torchtune#2792, huggingface/trl#4698"
    ),
    Incident("I35", "The seed does not reach the adapter's first values", "huggingface/trl#6688, huggingface/trl#1357"),
    Incident("I38", "A resized vocabulary does not fit the base", "huggingface/peft#1457, huggingface/peft#2898"),
    Incident(
        "I41",
        "A batch generates other tokens than each prompt alone",
        "huggingface/transformers#25921, huggingface/transformers#28491",
    ),
    Incident(
        "I42",
        "Prompts are padded on the right at generation",
        "unslothai/unsloth#3283, mistralai/mistral-inference#150",
    ),
    Incident(
        "I43",
        "FlashAttention 2 refuses rows that are padded on the right",
        "huggingface/trl#1018, axolotl-ai-cloud/axolotl#675",
    ),
    Incident("I44", "Gradients in half precision cannot be unscaled", "huggingface/peft#341, huggingface/peft#1706"),
    Incident(
        "I45",
        "The loss is NaN, and the run still succeeds",
        "hiyouga/LlamaFactory#3353, axolotl-ai-cloud/axolotl#1771",
    ),
    Incident(
        "I46",
        "The base is loaded in the checkpoint's precision instead of the one asked for",
        "huggingface/transformers#34919, huggingface/peft#2835",
    ),
    Incident(
        "I47",
        "mistral-common refuses a row that ends with an answer: it validates for serving",
        "mistralai/mistral-common#148, huggingface/transformers#38906",
    ),
    Incident(
        "I48",
        "Neighbouring messages of one role are refused, or joined in another way",
        "vllm-project/vllm#6862, unslothai/unsloth#334",
    ),
    Incident(
        "I49", "An adapter is loaded frozen, and training changes nothing", "huggingface/peft#282, huggingface/trl#6700"
    ),
    Incident("I50", "A misspelt target module is ignored", "dllm-reasoning/d1#6, huggingface/peft#974"),
    Incident(
        "I51",
        "Encoded rows are reused after the template or the tokenizer has changed",
        "allenai/open-instruct#1497, OptimalScale/LMFlow#394",
    ),
    Incident(
        "I52",
        "A generated text is compared word for word on other hardware",
        "huggingface/transformers#30797, huggingface/optimum#1598",
        "It takes two kinds of hardware. Prompts are compared by ids everywhere; completions by ids, and logits to the "
        "bit, on one CPU only (ML305, ML324); on a GPU logits have a tolerance. `--mistral-device cuda` shows it.",
    ),
    Incident("I53", "Packing drops the end of conversations", "huggingface/trl#3887, huggingface/trl#4554"),
    Incident(
        "I57",
        "The sliding window is not the checkpoint's",
        "axolotl-ai-cloud/axolotl#1214, huggingface/transformers#28115",
    ),
    Incident("I58", "mistral-common moves a name, and code that imports it breaks", "mistralai/mistral-finetune#110"),
    Incident(
        "I59",
        "White space around an answer is kept or stripped in another way than Mistral's",
        "huggingface/transformers#34214, vllm-project/vllm#9547",
    ),
    Incident(
        "I60",
        "A template renders without BOS and EOS, since the tokenizer has none set",
        "huggingface/transformers#27634, axolotl-ai-cloud/axolotl#1608",
    ),
    Incident(
        "I61", "An adapter is merged twice, or with another scale", "verl-project/verl#1821, huggingface/peft#2502"
    ),
    Incident(
        "N04",
        "Packed rows with a mask of numbers and positions that run on",
        "hiyouga/LLaMA-Factory#7318",
        "No fault of a model with plain RoPE, which sees differences of positions alone: the report counts such rows. "
        "Beside a config.json that scales by the position, they are ML512.",
    ),
    Incident("N06", "The mask of a packed sequence is cut at wrong places", "meta-pytorch/torchforge#546"),
    Incident("N07", "Padding on the left is attended to", "NVIDIA-NeMo/Automodel#3704"),
    Incident("N10", "Thinking is stripped from the answers", "fw-ai/cookbook#386"),
    Incident(
        "N13",
        "Arrow pads arguments with the columns of other tools, filled with null",
        "modelscope/ms-swift#10125, axolotl-ai-cloud/axolotl#3136",
    ),
    Incident("N14", "JSON with ASCII escapes in the ids", "theroyallab/tabbyAPI#459, microsoft/autogen#7730"),
    Incident("N16", "Parallel calls are rendered one by one", "THUDM/slime#2263"),
    Incident("N20", "The template closes the conversation with an EOS more", "huggingface/trl#5526"),
    Incident("N21", "An empty answer is put between tool and user", "NousResearch/hermes-agent#99155"),
    Incident(
        "N26",
        "Held-out rows are trained on, but for a space, case or punctuation",
        "TelecomsXChangeAPi/OpenTextShield#195",
    ),
    Incident(
        "N32",
        "ChatML is written with a tokenizer that has no such tokens",
        "huggingface/trl#3299, huggingface/open-r1#663",
    ),
    Incident(
        "N35",
        "Truncation and padding of a training run are saved into tokenizer.json",
        "vllm-project/llm-compressor#2917",
    ),
    Incident(
        "N27",
        "Pad is EOS, and the mask of ids hides every EOS from attention",
        "huggingface/trl#3091, huggingface/open-r1#663",
    ),
    Incident("N28", "The system prompt stands in an [INST] of its own", "pytorch/torchtune, models/mistral"),
    Incident(
        "N54",
        "Thoughts are written as letters for a base with thinking tokens",
        "modelscope/ms-swift#9427, unslothai/unsloth#6695",
    ),
    Incident(
        "N37",
        "The tensors are named as the text alone, and the server's model has images: the base answers",
        "vllm-project/vllm#34591, vllm-project/vllm#34186",
    ),
    Incident("N43", "rank_pattern is lost from the configuration", "huggingface/peft#2195, huggingface/peft#2550"),
    Incident(
        "N48",
        "A PiSSA adapter is put on the base that it was not trained on",
        "hiyouga/LlamaFactory#9404, huggingface/peft#2184",
    ),
    Incident("N56", "Escapes of JSON are trained on as text", "Kiln-AI/Kiln#95, cactus-compute/cactus#804"),
    Incident("N61", "Line breaks are escaped twice in the answers", "huggingface/datasets, JSON exports"),
    Incident("N63", "Arguments do not fit the tool's own schema", "ShishirPatil/gorilla, modelscope/ms-swift#10110"),
    Incident("N68", "Tool results do not belong to the calls before them", "mistralai/mistral-common, validator"),
    Incident(
        "N69", "Rows were rendered for a model of another family", "huggingface/trl#3299, axolotl-ai-cloud/axolotl#2710"
    ),
    Incident(
        "N70",
        "A checkpoint as transformers saves it, without Mistral's own file, is not judged at all",
        "axolotl-ai-cloud/axolotl#2710, huggingface/trl#3299, huggingface/transformers#42591",
    ),
    Incident(
        "N40",
        "A merged folder holds the base: LoRA was stripped, or a part of it lost",
        "PrimeIntellect-ai/prime-rl#1707, unslothai/unsloth#1763, unslothai/unsloth#2142",
    ),
    Incident(
        "N41",
        "A merged folder holds garbage, or changes that no adapter makes",
        "unslothai/unsloth#5410, unslothai/unsloth#3045",
    ),
    Incident(
        "N59",
        "The configuration of a merged model lost rope_theta",
        "vllm-project/vllm#42624, vllm-project/vllm#44158, Open-Athena/MarinFold#184",
    ),
    Incident("N71", "A merged model is called tied, and a server drops its head", "vllm-project/vllm#51063"),
    Incident("N46", "The chat template beside the adapter is not the base's", "OpenRLHF/OpenRLHF#1069"),
    Incident("N72", "The keys of tools are sorted on the way to the ids", "mistralai/mistral-common, instruct.py"),
    Incident("N73", "A normaliser or a filter changes characters", "huggingface/transformers#42591"),
    Incident("N80", "LoRA by last names is put on the vision tower, too", "huggingface/peft#2615"),
    Incident(
        "N81",
        "The usual pattern matches o_proj alone on a model with latent attention",
        "axolotl-ai-cloud/axolotl, examples/mistral4/qlora-text.yml",
    ),
    Incident(
        "N82",
        "Adapters of experts are dropped or transposed by servers",
        "vllm-project/vllm#41384, vllm-project/vllm#52194, sgl-project/sglang#25528, huggingface/peft#3112, "
        "NVIDIA-NeMo/Automodel#1755",
    ),
    Incident(
        "N84",
        "A combined adapter is √r times too strong: use_rslora is inherited from its sources",
        "huggingface/peft#3449, huggingface/peft#3473, huggingface/peft#3761",
        "the folder of an adapter does not show that it is a sum: `doctor` names the fault of PEFT, and `check` the "
        "scale of an adapter that can be one.",
    ),
    Incident(
        "N90",
        "llama.cpp puts a second space behind each control token of a SentencePiece model",
        "ggml-org/llama.cpp#7094",
    ),
    Incident(
        "N91",
        "A merged folder without tokenizer.model is converted without the scores of its pieces",
        "ggml-org/llama.cpp#8579",
    ),
    Incident(
        "N92",
        "A GGUF file has the name of a template in place of its text, and the user's text is lost",
        "ggml-org/llama.cpp#12524",
    ),
    Incident(
        "N93",
        "A flag promises an EOS that tokenizer.json does not write, and an upgrade of transformers believes the other",
        "embeddings-benchmark/mteb#5237",
    ),
    Incident(
        "N94",
        "Decoding removes the spaces before punctuation",
        "huggingface/transformers#44915, ml-explore/mlx-lm#1347",
    ),
    Incident(
        "N95", "generation_config.json has no EOS, or forbids it: generation does not stop", "huggingface/open-r1#663"
    ),
    Incident(
        "N96",
        "A penalty in generation_config.json changes every answer unasked",
        "NVIDIA-NeMo/RL#3497, EleutherAI/lm-evaluation-harness#3154",
    ),
    Incident(
        "N99",
        "A published template calls a macro without all of its arguments, and llama.cpp fails at each tool result",
        "mistralai/mistral-common#274",
    ),
    Incident(
        "N120",
        "Texts were read with a wrong encoding, or letters were replaced",
        "StonyBrookNLP/ircot#20, jsavelka/sbd_adjudicatory_dec#1, facebookresearch/flores#23",
    ),
    Incident("N121", "A model writes entities of HTML, which its data had", "argosopentech/argos-translate#39"),
    Incident("N122", "A model is trained on placeholders that nobody filled in", "hiyouga/LlamaFactory#2651"),
    Incident("N123", "A model writes [INST] after its answer", "sotopia-lab/sotopia-pi#17"),
    Incident("N124", "Inputs and answers are N/A, None or nothing", "tloen/alpaca-lora#32"),
    Incident("N125", "All rows of a task have one label", "allenai/natural-instructions#610"),
    Incident("N126", "A third of the answers was cut at the limit of the server", "vllm-project/speculators#835"),
    Incident("N127", "Answers differ with and without a system prompt", "meta-llama/llama3#203"),
    Incident("N128", "Calls of tools come in several forms", "Liquid4All/liquid-finetune#19"),
    Incident("N129", "A model is trained on the HTML of shared chats", "lm-sys/FastChat#3"),
    Incident(
        "N140",
        "A server wants the arguments of a call in the order of the schema, and the model has learned another",
        "ggml-org/llama.cpp#24351, ggml-org/llama.cpp#24516",
    ),
    Incident(
        "N141",
        "In a stream, [ARGS] is a part of a call, and its name and arguments are cut in the wrong places",
        "raullenchai/Rapid-MLX#579, vllm-project/vllm#17585, vllm-project/vllm#20028",
    ),
    Incident("N142", "A number in the arguments of a call arrives otherwise", "vllm-project/vllm#13622"),
    Incident(
        "N143",
        "Characters of several tokens arrive as U+FFFD",
        "vllm-project/vllm#8627, waybarrios/vllm-mlx#109",
    ),
    Incident(
        "N144",
        "The thinking of a model is lost, or its answer is taken for thinking",
        "sgl-project/sglang#26716, waybarrios/vllm-mlx#599, vllm-project/vllm#30391",
    ),
    Incident(
        "N145",
        "A server answers as the base under the name of an adapter, or as an adapter where none is asked for",
        "vllm-project/vllm#55193, ggml-org/llama.cpp#28674",
    ),
    Incident(
        "N146",
        "An evaluation feeds two BOS, and points of MMLU are lost",
        "princeton-pli/retaining-by-doing#5, EleutherAI/lm-evaluation-harness#2797",
    ),
    Incident(
        "N147",
        "A prompt of a pair is cut by characters, and its answers are cut apart",
        "unslothai/unsloth-zoo#1110",
    ),
    Incident(
        "N148",
        "A trainer of pairs appends EOS to answers that the template has closed",
        "huggingface/trl#4481, huggingface/trl#4908",
    ),
    Incident(
        "N160",
        "Both sides of a preference pair are equal, from the beginning or after a cut: the loss has no gradient",
        "OpenRLHF/OpenRLHF#1311, natolambert/rlhf-book#503, natolambert/rlhf-book#504",
    ),
    Incident("N161", "Preference data has empty answers", "hiyouga/LlamaFactory#3364"),
    Incident(
        "N162",
        "Chosen answers are longer, and the model learns to write at length",
        "eric-mitchell/direct-preference-optimization#35, princeton-nlp/SimPO#20",
    ),
    Incident(
        "N180",
        "The texts of a gap are encoded with the space that SentencePiece puts before a text",
        "ggml-org/llama.cpp#3503",
    ),
    Incident(
        "N181",
        "A gap is written in the order prefix, suffix, middle, or with a marker that the model has not learned",
        "ggml-org/llama.cpp#8016, abetlen/llama-cpp-python#1492",
    ),
    Incident(
        "N182",
        "A completion is asked for without the suffix that the request has",
        "vllm-project/vllm#9522",
    ),
    Incident(
        "N190",
        "Labels that are shifted already are shifted again by the model",
        "huggingface/transformers#32944, huggingface/transformers#44642",
    ),
    Incident(
        "N191",
        "A loss on the last answer alone is asked for, and is found in rows that do not ask for it",
        "NVIDIA-NeMo/Automodel#2347, inclusionAI/AReno#313, hiyouga/LLaMA-Factory#9314, modelscope/ms-swift#4596",
    ),
    Incident(
        "N200",
        "YaRN multiplies cosine and sine in one program, and not in another: mscale and apply_scale are not read",
        "vllm-project/vllm#48621, vllm-project/vllm#57563, sgl-project/sglang#22711, sgl-project/sglang#31232, "
        "ggml-org/llama.cpp#22612",
    ),
    Incident(
        "N201",
        "A release's config.json and params.json disagree on the attention factor, and a conversion is nonsense",
        "ollama/ollama#15975",
    ),
    Incident(
        "N202",
        "Queries are not scaled by their position: a class or a server does not read llama_4_scaling_beta",
        "vllm-project/vllm#48621",
    ),
    Incident(
        "N203",
        "A server loads the consolidated file of the base that lies beside merged weights",
        "vllm-project/vllm#28659, vllm-project/vllm#40765, modelscope/ms-swift#7074",
    ),
    Incident(
        "N204",
        "A server scales a rank-stabilised adapter by alpha / r: it is too weak by the root of the rank",
        "sgl-project/sglang#40835, NVIDIA/TensorRT-LLM#1668",
    ),
    Incident(
        "N206",
        "A server reads params.json, left beside weights of transformers, in place of their configuration",
        "vllm-project/vllm#33175, vllm-project/vllm#33253",
    ),
    Incident(
        "N207",
        "Experts that transformers keeps in one parameter are left out of an adapter, without a warning",
        "huggingface/peft#3009",
    ),
    Incident(
        "N208",
        "An image becomes another number of tokens in a trainer or a server than in mistral-common",
        "huggingface/transformers#37019, unslothai/unsloth#2225",
    ),
    Incident(
        "N205",
        "A run goes on from an adapter that is loaded in part, or replaced by a new one, and nothing says so",
        "jaredpalmer/kev#9, NVIDIA-NeMo/RL#3874, huggingface/lerobot#3459, verl-project/verl#3400",
    ),
)
"""Every incident, by id."""
