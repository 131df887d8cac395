"""What a trainer's script gets of a configuration that somebody else wrote: no code, no network, no upload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.runners.configuration import Configuration

CONFIGS = [(name, file) for name, trainer in TRAINERS.items() for file in sorted(trainer.config.parent.rglob("*.yaml"))]
Given = Callable[..., Configuration]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """Return what the script of a runner gets of a configuration."""
    monkeypatch.chdir(tmp_path)

    def given(name: str, text: str, **options: Any) -> Configuration:
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        return TRAINERS[name].safe_configuration(file, **options)

    return given


@pytest.mark.parametrize(("name", "file"), CONFIGS, ids=[file.name for _, file in CONFIGS])
def test_the_packaged_configurations_are_used_as_they_are(name: str, file: Path) -> None:
    made = TRAINERS[name].safe_configuration(file)
    assert made.note == ""
    written = yaml.safe_load(file.read_text()) or {}
    assert made.data.keys() - {"dataset_dir"} == written.keys() - {"dataset_dir"}
    for entry in written.get("datasets", ()):
        del entry["path"]
    if "dataset_dir" in written:
        written["dataset_dir"] = str(file.parent / written["dataset_dir"])
    assert made.data == written


LEFT_OUT = [
    ("trl", "trust_remote_code: true"),
    ("trl", "push_to_hub: true"),
    ("trl", "hub_model_id: me/model"),
    ("trl", "hub_token: hf_x"),
    ("trl", "report_to: wandb"),
    ("trl", "env: {HF_ENDPOINT: 'https://x'}"),
    ("trl", "model_init_kwargs: {trust_remote_code: true}"),
    ("trl", "accelerator_config: x.json"),
    ("axolotl", "trust_remote_code: true"),
    ("axolotl", "plugins: [mine.Plugin]"),
    ("axolotl", "push_dataset_to_hub: me/data"),
    ("axolotl", "hub_model_id: me/model"),
    ("axolotl", "wandb_project: p"),
    ("axolotl", "use_wandb: true"),
    ("axolotl", "mlflow_tracking_uri: http://x"),
    ("axolotl", "use_ray: true"),
    ("axolotl", "resources_per_worker: {GPU: 1}"),
    ("axolotl", "torchdistx_path: ../x"),
    ("axolotl", "pretraining_dataset: me/data"),
    ("axolotl", "vllm: {host: x}"),
    ("axolotl", "hf_use_auth_token: true"),
    ("llamafactory", "trust_remote_code: true"),
    ("llamafactory", "push_to_hub: true"),
    ("llamafactory", "export_hub_model_id: me/model"),
    ("llamafactory", "hf_hub_token: hf_x"),
    ("llamafactory", "use_swanlab: true"),
    ("llamafactory", "swanlab_lark_webhook_url: https://x"),
    ("llamafactory", "ray_init_kwargs: {address: 'ray://x'}"),
    ("llamafactory", "ray_num_workers: 2"),
    ("llamafactory", "reward_model: http://x"),
    ("llamafactory", "cache_dir: /x"),
    ("ms-swift", "callbacks: [mine]"),
    ("ms-swift", "push_to_hub: true"),
    ("ms-swift", "hub_token: x"),
    ("ms-swift", "swanlab_webhook_url: https://x"),
    ("ms-swift", "ENV: {LD_PRELOAD: x.so}"),
    ("ms-swift", "model_kwargs: '{\"trust_remote_code\": true}'"),
    ("ms-swift", "local_repo_path: x"),
    ("ms-swift", "use_ray: true"),
    ("ms-swift", "reward_funcs: [mine]"),
    ("ms-swift", "external_plug: evil.py"),
    ("ms-swift", "external-plugins: evil.py"),
    ("lm-eval", "trust_remote_code: true"),
    ("lm-eval", "confirm_run_unsafe_code: true"),
    ("lm-eval", "wandb_args: project=x"),
    ("lm-eval", "hf_hub_log_args: hub_results_org=x"),
    *((name, "an_unknown_key: 1") for name in TRAINERS),
]


@pytest.mark.parametrize(("name", "line"), LEFT_OUT)
def test_a_key_that_names_code_a_network_or_an_upload_is_left_out_and_listed(
    name: str, line: str, given: Given
) -> None:
    [key] = yaml.safe_load(line)
    made = given(name, f"learning_rate: 0.1\n{line}\n")
    assert key not in made.data
    assert made.left_out == [key]
    assert made.note.startswith(f"left out of the configuration: {key} (")
    assert "--allow-code" in made.note
    # the same key that asks for nothing is not worth a line
    assert given(name, f"{key}: false\n").note == ""


REFUSED = [
    ("axolotl", "trainer_cls: mine.Trainer"),
    ("axolotl", "datasets: [{path: x, type: mine.prompts}]"),
    ("axolotl", "datasets: [{path: x, type: mine.load}]"),
    ("axolotl", "datasets: [{path: x, type: os.path.load_x}]"),
    ("axolotl", "datasets: [{path: x, type: evil}]"),
    ("axolotl", "datasets: [{path: x, type: chat_template}, {path: y, type: a.b}]"),
    ("axolotl", "tokenizer_type: pipeline"),
    ("axolotl", f"model_type: {'For' * 100_000}!"),
    ("axolotl", "model_type: os.system"),
    ("axolotl", "chat_template_jinja: https://x/y.jinja"),
    ("ms-swift", "external_plugins: [evil.py]"),
    ("ms-swift", "custom_register_path: evil.py"),
    ("ms-swift", "custom_dataset_info: evil.json"),
    ("ms-swift", "system: --external_plugins=evil.py"),
    ("ms-swift", "new_special_tokens: [a, --external_plugins, evil.py]"),
    ("lm-eval", "include_path: tasks"),
    ("lm-eval", "tasks: [mmlu, ./mine.yaml]"),
    ("lm-eval", "tasks: mmlu,mine.yaml"),
    ("lm-eval", "tasks: [{task: mine, doc_to_text: x}]"),
    ("lm-eval", "tasks: [folder]"),
    ("trl", "chat_template_path: https://x/y.jinja"),
    # parsers of addresses drop these characters
    ("trl", "chat_template_path: ' https://x/y.jinja'"),
    ("trl", 'chat_template_path: "\\x01ht\\ttps:/\\n/x/y.jinja"'),
    ("llamafactory", "media_dir: ' s3://x/y'"),
]


@pytest.mark.parametrize(("name", "line"), REFUSED)
def test_code_on_which_ids_can_depend_is_refused_with_its_line(
    name: str, line: str, given: Given, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    [key] = yaml.safe_load(line)
    with pytest.raises(RunnerError) as caught:
        given(name, f"# ours\n{line}\n")
    assert str(caught.value.place) == f"{tmp_path / 'config.yaml'}:2, {key}"
    assert "--allow-code" in caught.value.next_step


@pytest.mark.parametrize("tag", ["!function mine.f", "!!python/object/apply:os.system [ls]", "!!python/name:os.system"])
@pytest.mark.parametrize("name", ["lm-eval", "trl"])
def test_a_tag_that_names_code_is_refused(name: str, tag: str, given: Given, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="not plain YAML") as caught:
        given(name, f"max_length: 1\nmetadata: {tag}\n")
    assert str(caught.value.place) == f"{tmp_path / 'config.yaml'}:2"


@pytest.mark.parametrize(
    "text",
    [
        "- a\n",
        "a: [\n",
        "1: a\n",
        "? [a]\n: b\n",
        "a: &a [*a]\n",
        "a: 2026-02-31\n",
        f"a: {'[' * 40}{']' * 40}\n",
        f"a: {'[' * 9000}\n",
        f"a: {'9' * 5000}\n",
        f"max_length: 1{':1' * 100_000}\n",
        f"max_length: 1{':1' * 1000}.5\n",
        f"a: 0x{'f' * 5000}\n",
        "a: \x00\n",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        "a: &a {k1: 1, k2: 2, k3: 3, k4: 4, k5: 5, k6: 6, k7: 7, k8: 8, k9: 9, k0: 0}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}]}}\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
        ),
        "a: &a {<<: *a}\n",
    ],
    ids=lambda text: text[:20].strip(),
)
def test_a_file_that_is_no_plain_configuration_is_refused_within_bounds(
    text: str, given: Given, tmp_path: Path
) -> None:
    with pytest.raises(RunnerError) as caught:
        given("trl", text)
    assert str(caught.value.place).startswith(str(tmp_path / "config.yaml"))


def test_the_keys_of_data_are_kept_for_own_data_alone(given: Given, tmp_path: Path) -> None:
    texts = {
        "trl": "dataset_name: data",
        "llamafactory": "tokenized_path: data",
        "ms-swift": "dataset: [data]",
    }
    for name, text in texts.items():
        [key] = yaml.safe_load(text)
        assert given(name, text).data.get(key) is None
        assert given(name, text, own_data=True).data == {**yaml.safe_load(text), **given(name, "").data}
        with pytest.raises(RunnerError, match="names a network"):
            given(name, text.replace("data]", "'https://x/y']").replace(": data", ": s3://x/y"), own_data=True)
    axolotl = "datasets: [{path: data, ds_type: json, type: chat_template}]"
    assert given("axolotl", axolotl).data == {"datasets": [{"type": "chat_template"}]}
    assert given("axolotl", axolotl, own_data=True).data == yaml.safe_load(axolotl)
    with pytest.raises(RunnerError, match="names code"):
        given("axolotl", axolotl.replace("data,", "data.py,"), own_data=True)


@pytest.mark.parametrize("path", ["' https://x/y'", '"\\thf://x/y"', '"\\x1fzip://x::https://y"', '"htt\\nps://x/y"'])
def test_an_address_as_data_is_refused_with_any_white_space(path: str, given: Given) -> None:
    with pytest.raises(RunnerError, match="names a network"):
        given("axolotl", f"datasets: [{{path: json, data_files: [{path}], type: alpaca}}]", own_data=True)
    with pytest.raises(RunnerError, match="names a network"):
        given("ms-swift", f"dataset: [{path}]", own_data=True)


@pytest.mark.parametrize("key", ["script_url", "hf_hub_url", "cloud_file_name"])
def test_data_that_are_described_beside_the_configuration_are_refused_too(
    key: str, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(f'{{"mine": {{"{key}": "x"}}}}')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RunnerError, match=key):
        given("llamafactory", "dataset: mine\n", own_data=True)


@pytest.mark.parametrize("key", ["script_url", "hf_hub_url", "cloud_file_name"])
def test_data_of_llamafactory_that_are_described_as_code_are_refused(key: str, given: Given, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(f'{{"mine": {{"{key}": "x"}}, "other": {{"file_name": "y"}}}}')
    with pytest.raises(RunnerError, match=key):
        given("llamafactory", "dataset: other, mine\n", own_data=True)
    assert given("llamafactory", "dataset: other\n", own_data=True).left_out == []
    # other rows take the place of these
    assert given("llamafactory", "dataset: mine\n").left_out == []


def test_keys_within_values_are_left_out_too(given: Given) -> None:
    made = given("axolotl", "datasets: [{path: x, type: chat_template, trust_remote_code: true, revision: abc}]\n")
    assert made.data == {"datasets": [{"type": "chat_template"}]}
    assert made.left_out == ["datasets[0].trust_remote_code", "datasets[0].revision"]
    made = given("lm-eval", "tasks: [mmlu]\nmodel_args: add_bos_token=True,base_url=http://x\n")
    assert made.data == {"tasks": ["mmlu"], "model_args": "add_bos_token=True"}
    assert made.left_out == ["model_args.base_url"]


def test_settings_of_the_rows_are_kept(given: Given) -> None:
    texts = {
        "trl": "max_length: 512\npacking: true\nassistant_only_loss: true\nchat_template_path: training.jinja\n",
        "axolotl": "datasets: [{type: {field_prompt: p, prompt_format: '[INST] {p}'}}, {type: chat_template.argilla}]\n"
        "chat_template: tokenizer_default\nsequence_len: 8\nspecial_tokens: {pad_token: <pad>}\nrl: dpo\n"
        "train_on_inputs: true\nsample_packing: true\ntokenizer_type: LlamaTokenizerFast\n",
        "llamafactory": "stage: dpo\ntemplate: mistral\ncutoff_len: 8\ntrain_on_prompt: true\nmask_history: true\n",
        "ms-swift": "model_type: mistral\nloss_scale: last_round\nmax_length: 8\nsystem: 'You are https://x.'\n",
        "lm-eval": "tasks: [mmlu, gsm8k_*]\nnum_fewshot: 5\nlimit: 3\nfewshot_as_multiturn: true\n",
    }
    for name, text in texts.items():
        made = given(name, text + "learning_rate: 0.1\nlora_r: 8\nsave_steps: 5\nwarmup_ratio: 0.1\nbf16: true\n")
        assert made.left_out == []
        assert made.data.items() >= yaml.safe_load(text).items()
