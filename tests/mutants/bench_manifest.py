"""Manifests, and the folders that they speak of, that are broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_adapter import CONFIG, TENSORS, settings
from declared import declare
from gallery import Artifact, mutant
from safetensors.torch import load_file, save_file
from trained import WEIGHTS, copied, replace_weights, trained

from pytest_mistral_lora.conformance.checks import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.records.files import sha256_file, write_json
from pytest_mistral_lora.records.manifest import sealed
from pytest_mistral_lora.records.tensors import sha256_tensors

MANIFEST = "manifest.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.model.v3"
COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"


class ManifestBench:
    """Makes a trained adapter with its base and rows, and the merged model, and judges their manifests."""

    subject = "manifest"

    def make(self, folder: Path) -> Artifact:
        """Make a trained adapter, its base, its rows and the merged model below a folder."""
        source = trained()
        adapter, base, merged = folder / "lora", folder / "base", folder / "merged"
        for one, target in ((source.adapter, adapter), (source.base, base), (source.merged, merged)):
            copied(one, target)
        rows = folder / "rows.jsonl"
        rows.write_bytes(source.rows.read_bytes())
        manifest = json.loads((adapter / MANIFEST).read_text())
        merged_manifest = json.loads((merged / MANIFEST).read_text())
        return {
            "folder": adapter,
            "manifest": manifest,
            "list_file": partial(_list_file, adapter, manifest),
            "base": base,
            "rows": [rows],
            "merged": merged,
            "merged_manifest": merged_manifest,
            "parent": dict(merged_manifest["parent"]),
            "require_manifest": False,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on both folders."""
        torch.set_num_threads(1)
        folder, merged, base = artifact["folder"], artifact["merged"], artifact["base"]
        _write_changed(artifact["manifest"], folder, trained().adapter)
        _write_changed(artifact["merged_manifest"], merged, trained().merged)
        rows = tuple(artifact["rows"])
        targets = [AdapterTarget("lora", folder, base=base, dataset=rows)]
        targets.append(AdapterTarget("merged", merged, base=base, dataset=rows))
        chosen = settings(folder, require_manifest=artifact["require_manifest"])
        checks = [check for check in collect(targets, chosen) if check.subject == self.subject]
        return [finding for check in checks for finding in check.run().findings]


BENCH = ManifestBench()


def _write_changed(data: object, folder: Path, source: Path) -> None:
    if (folder / MANIFEST).is_file() and json.loads((source / MANIFEST).read_text()) != data:
        declare(folder, data)


def _list_file(folder: Path, manifest: dict[str, Any], name: str) -> None:
    file = folder / name
    manifest["files"][name] = {"sha256": sha256_file(file), "size": file.stat().st_size}


def _four_keys(artifact: Artifact) -> None:
    keys = ("base", "revision", "dataset_sha256", "seed", "base_weights_sha256")
    artifact["manifest"] = {key: artifact["manifest"][key] for key in keys}


def _edit(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit adapter_config.json, and list it as it now is."""
    file = artifact["folder"] / CONFIG
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    artifact["list_file"](CONFIG)


@mutant("ML701", says="not valid JSON")
def manifest_cut_off(artifact: Artifact) -> None:
    """The manifest ends early."""
    file = artifact["folder"] / MANIFEST
    file.write_text(file.read_text()[:100])


@mutant("ML701", says="is a directory")
def manifest_is_a_folder(artifact: Artifact) -> None:
    """manifest.json is a folder."""
    (artifact["folder"] / MANIFEST).unlink()
    (artifact["folder"] / MANIFEST).mkdir()


@mutant("ML701", says="leads out of the folder")
def manifest_linked_from_elsewhere(artifact: Artifact) -> None:
    """manifest.json is a link to another folder's."""
    (artifact["folder"] / MANIFEST).unlink()
    (artifact["folder"] / MANIFEST).symlink_to(artifact["merged"] / MANIFEST)


@mutant("ML701", says="$.seed")
def seed_missing(artifact: Artifact) -> None:
    """There is no seed."""
    del artifact["manifest"]["seed"]


@mutant("ML701", "I19", says='"main"')
def revision_is_a_branch(artifact: Artifact) -> None:
    """The revision is a branch."""
    artifact["manifest"]["revision"] = "main"


@mutant("ML701", "I19", says='"v0.3"')
def revision_is_a_tag(artifact: Artifact) -> None:
    """The revision is a tag, in a manifest of four keys."""
    _four_keys(artifact)
    artifact["manifest"]["revision"] = "v0.3"


@mutant("ML701", "I19", says=COMMIT[:7])
def revision_is_short(artifact: Artifact) -> None:
    """The revision is the beginning of a commit."""
    artifact["manifest"]["revision"] = COMMIT[:7]


@mutant("ML701", "I19", says="placeholder")
def revision_is_made_up(artifact: Artifact) -> None:
    """The revision has the form of a commit that nobody made."""
    artifact["manifest"]["revision"] = "0" * 40


@mutant("ML701", "I19", says="base_weights_sha256")
def nothing_pins_the_base(artifact: Artifact) -> None:
    """There is neither a revision nor a hash of the weights."""
    del artifact["manifest"]["base_weights_sha256"]


@mutant("ML701", says="$.files")
def listed_file_that_leads_out(artifact: Artifact) -> None:
    """A listed file is outside the folder."""
    artifact["manifest"]["files"]["../rows.jsonl"] = {"sha256": sha256_file(artifact["rows"][0]), "size": 1}


@mutant("ML701", says="$.template.file")
def template_that_leads_out(artifact: Artifact) -> None:
    """The recorded template is a file outside the folder."""
    file = artifact["folder"] / TEMPLATE
    outside = file.parent.parent / TEMPLATE
    outside.write_bytes(file.read_bytes())
    artifact["manifest"]["template"]["file"] = f"../{TEMPLATE}"


@mutant("ML702 ML705", says="leads out of the folder")
def template_that_is_a_link_out(artifact: Artifact) -> None:
    """The template is a link to the same text outside the folder."""
    file = artifact["folder"] / TEMPLATE
    file.rename(file.parent.parent / TEMPLATE)
    file.symlink_to(file.parent.parent / TEMPLATE)


@mutant("ML702", says="seal is")
def value_changed_afterwards(artifact: Artifact) -> None:
    """A value of the manifest was changed after the run."""
    file = artifact["folder"] / MANIFEST
    file.write_text(file.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))


@mutant("ML702", says="files.DECISION.md.text")
def value_changed_and_sealed_again(artifact: Artifact) -> None:
    """A value of the manifest was changed after the run, and the manifest sealed again: the note says otherwise."""
    data = json.loads((artifact["folder"] / MANIFEST).read_text())
    data["training"]["learning_rate"] = 0.02
    write_json(artifact["folder"] / MANIFEST, sealed(data))


@mutant("ML702", says="files.DECISION.md.sha256")
def decision_changed_afterwards(artifact: Artifact) -> None:
    """A figure of the decision record was changed after the run."""
    file = artifact["folder"] / "DECISION.md"
    file.write_text(file.read_text().replace("2 of 5 rows", "9 of 5 rows"))


@mutant("ML705", says="template.probe_sha256")
def library_that_renders_otherwise(artifact: Artifact) -> None:
    """The probe's ids are others than in the run: tokenizer and template are the same, and a library has moved."""
    artifact["manifest"]["template"]["probe_sha256"] = "1" * 64


@mutant("ML702", says="DECISION.md")
def listed_file_missing(artifact: Artifact) -> None:
    """A listed file is not there."""
    (artifact["folder"] / "DECISION.md").unlink()


@mutant("ML702", "I16", says="lora.layers is 7")
def adapter_saved_again_in_part(artifact: Artifact) -> None:
    """The adapter was saved again without one layer, and the manifest lists the new file."""
    file = artifact["folder"] / TENSORS
    tensors = load_file(file)
    kept = {name: one.clone() for name, one in tensors.items() if "layers.1.self_attn.q_proj" not in name}
    save_file(kept, file)
    artifact["list_file"](TENSORS)
    artifact["manifest"]["lora"]["tensors_sha256"] = sha256_tensors(kept)


@mutant("ML702", "I61", says="lora.alpha is 32")
def alpha_edited(artifact: Artifact) -> None:
    """The scale was doubled in the configuration."""
    _edit(artifact, lambda config: config.update(lora_alpha=32))


@mutant("ML702", "I61", says="lora.rslora is True")
def scaling_edited(artifact: Artifact) -> None:
    """The configuration scales by the root of the rank, and the run did not."""
    _edit(artifact, lambda config: config.update(use_rslora=True))


@mutant("ML702", "I50", says="lora.target_modules")
def targets_edited(artifact: Artifact) -> None:
    """The configuration names other layers than were trained."""
    _edit(artifact, lambda config: config.update(target_modules=["q_proj", "v_proj"]))


@mutant("ML703", "I19", says="revision is None")
def revision_missing_in_the_configuration(artifact: Artifact) -> None:
    """The manifest has the commit, and PEFT wrote none."""
    artifact["manifest"]["revision"] = COMMIT


@mutant("ML703", "I19", says="revision is main")
def configuration_of_another_revision(artifact: Artifact) -> None:
    """The configuration has the revision main."""
    _edit(artifact, lambda config: config.update(revision="main"))


@mutant("ML703", "I19", says="base is mistralai")
def configuration_of_another_base(artifact: Artifact) -> None:
    """The configuration names another base."""
    _edit(artifact, lambda config: config.update(base_model_name_or_path="mistralai/Mistral-7B-v0.1"))


@mutant("ML703", "I19", "I61", says="base_weights_sha256 is")
def base_merged_before(artifact: Artifact) -> None:
    """The available base is the model that the adapter was merged into."""
    (artifact["base"] / WEIGHTS).unlink()
    (artifact["base"] / WEIGHTS).hardlink_to(artifact["merged"] / WEIGHTS)


@mutant("ML703", "I19", says="base_weights_sha256 is")
def base_of_another_commit(artifact: Artifact) -> None:
    """One number of the base has changed."""
    replace_weights(artifact["base"] / WEIGHTS, **{"model.norm.weight": torch.full((128,), 2.0)})


@mutant("ML704", says="no manifest.json")
def manifest_missing(artifact: Artifact) -> None:
    """There is no manifest, and the user asks for one."""
    (artifact["folder"] / MANIFEST).unlink()
    artifact["require_manifest"] = True


@mutant("ML705", "I26", says="template.sha256")
def template_exchanged(artifact: Artifact) -> None:
    """The template differs from the one that was trained with."""
    (artifact["folder"] / TEMPLATE).write_text("{{ messages }}")
    artifact["list_file"](TEMPLATE)


@mutant("ML705", "I26", says="another chat template")
def template_in_two_places(artifact: Artifact) -> None:
    """tokenizer_config.json has another template than chat_template.jinja."""
    file = artifact["folder"] / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    artifact["list_file"](file.name)


@mutant("ML702 ML705", "I26", says="no such file")
def template_lost(artifact: Artifact) -> None:
    """The template was not copied with the adapter."""
    (artifact["folder"] / TEMPLATE).unlink()


@mutant("ML705 ML706", "I51", says="tokenizer.sha256")
def tokenizer_exchanged(artifact: Artifact) -> None:
    """The tokenizer differs from the one that encoded the rows."""
    (artifact["folder"] / TOKENIZER).write_bytes(_other_tokenizer().read_bytes())
    artifact["list_file"](TOKENIZER)


@mutant("ML705", "I51", says="base")
def tokenizer_of_the_base_exchanged(artifact: Artifact) -> None:
    """The available base has another tokenizer."""
    (artifact["base"] / TOKENIZER).write_bytes(_other_tokenizer().read_bytes())


def _other_tokenizer() -> Path:
    from pytest_mistral_lora.chat.oracle import shipped_tokenizer

    return shipped_tokenizer("spm-v1")


@mutant("ML706", "I51", says="masking.ids_sha256")
def ids_of_a_cache(artifact: Artifact) -> None:
    """The run took its ids from a cache that another template had filled."""
    artifact["manifest"]["masking"]["ids_sha256"] = "1" * 64


@mutant("ML706", says="dataset_sha256")
def rows_edited(artifact: Artifact) -> None:
    """An answer was corrected after the run."""
    rows = artifact["rows"][0]
    rows.write_text(rows.read_text().replace("Paris", "Lyon"))


@mutant("ML707", says="merged, and the folder holds an adapter")
def adapter_called_merged(artifact: Artifact) -> None:
    """The manifest of an adapter says that it is a merged model."""
    artifact["manifest"] |= {"kind": "merged", "parent": artifact["parent"]}


@mutant("ML702 ML703 ML707", says="adapter, and the folder holds a full model")
def merged_model_called_an_adapter(artifact: Artifact) -> None:
    """The manifest of a merged model says that it is an adapter."""
    artifact["merged_manifest"] = {**artifact["manifest"], "files": artifact["merged_manifest"]["files"]}


@mutant("ML708", says="later.txt")
def file_that_came_later(artifact: Artifact) -> None:
    """There is a file that the run did not write."""
    (artifact["folder"] / "later.txt").write_text("later")


@mutant("ML711", "I57", says="sliding_window is 4096")
def window_of_the_base_edited(artifact: Artifact) -> None:
    """The base's configuration has an attention window that the run did not have."""
    file = artifact["base"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": 4096}))


@mutant("ML711", "I38", says="vocab_size is 32000")
def base_with_fewer_embeddings(artifact: Artifact) -> None:
    """The base's configuration has fewer embeddings than the tokenizer has ids."""
    file = artifact["base"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 32000}))


@mutant("ML709", "I51", says="tokenizer.vocab_size is 32768")
def tokenizer_of_another_size(artifact: Artifact) -> None:
    """The manifest records fewer ids than the tokenizer has."""
    artifact["manifest"]["tokenizer"]["vocab_size"] = 32000


@mutant("ML709", "I46", says="is in BF16")
def adapter_saved_in_another_dtype(artifact: Artifact) -> None:
    """The adapter was saved in bfloat16, and the run was in float32."""
    file = artifact["folder"] / TENSORS
    tensors = {name: one.bfloat16() for name, one in load_file(file).items()}
    save_file(tensors, file)
    artifact["list_file"](TENSORS)
    artifact["manifest"]["lora"]["tensors_sha256"] = sha256_tensors(tensors)


@mutant("ML709", "I46", says="model.safetensors is in")
def merged_in_another_dtype(artifact: Artifact) -> None:
    """The manifest has bfloat16, and the merged weights are float32."""
    artifact["merged_manifest"]["parent"]["merge_dtype"] = "bfloat16"


@mutant("ML710", "I15", says="merged in nf4")
def merged_in_four_bits(artifact: Artifact) -> None:
    """The adapter was merged into four-bit weights."""
    artifact["merged_manifest"]["parent"]["merge_dtype"] = "nf4"


@mutant("ML710", "I15", says="logits are up to 0.5")
def merged_with_other_logits(artifact: Artifact) -> None:
    """The merged model's logits were far from those of base and adapter."""
    artifact["merged_manifest"]["parent"]["max_abs_logit_difference"] = 0.5


@mutant("ML710", "I15", says="answers otherwise")
def merged_with_other_answers(artifact: Artifact) -> None:
    """The merged model gave other answers than base and adapter."""
    artifact["merged_manifest"]["parent"]["greedy_equal"] = False


def _configured(artifact: Artifact, **values: object) -> None:
    """Edit the base's config.json."""
    file = artifact["base"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@mutant("ML711", says="base_config.sliding_window is 4096")
def window_of_the_base_lost(artifact: Artifact) -> None:
    """The base's configuration lost its null window, and transformers takes its default."""
    file = artifact["base"] / "config.json"
    data = json.loads(file.read_text())
    del data["sliding_window"]
    file.write_text(json.dumps(data))


@mutant("ML711", says="base_config.rms_norm_eps is 1e-05")
def epsilon_of_the_base_edited(artifact: Artifact) -> None:
    """The base has another epsilon than in training."""
    _configured(artifact, rms_norm_eps=1e-5)


@mutant("ML711", says="base_config.hidden_act is gelu")
def activation_of_the_base_edited(artifact: Artifact) -> None:
    """The base has another activation than in training."""
    _configured(artifact, hidden_act="gelu")


@mutant("ML711", says="base_config.rope is")
def rotary_base_edited(artifact: Artifact) -> None:
    """The base's rotary embedding turns at another rate."""
    _configured(artifact, rope_parameters={"rope_theta": 1e6 + 1, "rope_type": "default"})


@mutant("ML711", says="base_config.eos_token_id is 3")
def end_of_the_base_edited(artifact: Artifact) -> None:
    """The base ends with another token than in training."""
    _configured(artifact, eos_token_id=3)
