"""Manifests beside files that are not those of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bench_adapter import TENSORS
from bench_manifest import MANIFEST, TEMPLATE, TOKENIZER, _edit, _other_tokenizer
from committed import commit_all
from gallery import Artifact, mutant
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.manifest import sealed
from pytest_mistral_lora.records.parents import facts_of
from pytest_mistral_lora.records.tensors import sha256_tensors


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


@mutant("ML702 ML716", says="files.DECISION.md.text")
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


@mutant("ML706", "I51", says="masking.ids_sha256")
def ids_of_a_cache(artifact: Artifact) -> None:
    """The run took its ids from a cache that another template had filled."""
    artifact["manifest"]["masking"]["ids_sha256"] = "1" * 64


@mutant("ML706", says="dataset_sha256")
def rows_edited(artifact: Artifact) -> None:
    """An answer was corrected after the run."""
    rows = artifact["rows"][0]
    rows.write_text(rows.read_text().replace("Paris", "Lyon"))


@mutant("ML708", says="later.txt")
def file_that_came_later(artifact: Artifact) -> None:
    """There is a file that the run did not write."""
    (artifact["folder"] / "later.txt").write_text("later")


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


@mutant("ML712", says="not recorded: base_config, tokenizer, template")
def manifest_cut_down_after_its_commit(artifact: Artifact) -> None:
    """The manifest was committed, and then replaced by one of an older version that records four keys."""
    commit_all(artifact["folder"].parent)
    keys = ("base", "revision", "base_weights_sha256", "dataset_sha256", "seed")
    artifact["manifest"] = {key: artifact["manifest"][key] for key in keys}


@mutant("ML712", says="not listed: README.md")
def note_removed_from_the_list_after_its_commit(artifact: Artifact) -> None:
    """The manifest was committed; then the model card was removed, and listed no more."""
    commit_all(artifact["folder"].parent)
    del artifact["manifest"]["files"]["README.md"]
    (artifact["folder"] / "README.md").unlink()


@mutant("ML712", says="not recorded: base_config")
def cut_down_manifest_that_was_committed(artifact: Artifact) -> None:
    """The manifest that records less was committed, too: an older commit has the record of the same weights."""
    folder = artifact["folder"]
    commit_all(folder.parent)
    data = json.loads((folder / MANIFEST).read_text())
    del data["base_config"]
    write_json(folder / MANIFEST, sealed(data))
    commit_all(folder.parent)
    artifact["manifest"] = data


def gone_on_from(artifact: Artifact) -> Path:
    """Record that the run went on from an adapter beside it, and return that adapter."""
    first = Path(shutil.copytree(artifact["folder"], artifact["folder"].parent / "first"))
    parent = AdapterFolder(first)
    artifact["manifest"]["recipe"]["lora"]["start"] = str(first)
    artifact["manifest"]["lora"]["start"] = {
        "path": str(first),
        "manifest_sha256": parent.manifest_sha256,
        "tensors_sha256": parent.tensors_sha256,
        "config_sha256": parent.sha256("adapter_config.json"),
        **facts_of(parent.require_manifest().data),
        "held_out_loss": None,
        "parent_held_out_loss": None,
        "not_compared": "nothing is held out",
    }
    return first


@mutant("ML715", "N205", says="lora.start.tensors_sha256 is")
def start_trained_again_after_the_run(artifact: Artifact) -> None:
    """The adapter that the run went on from has other tensors now, and the record of the old ones."""
    file = gone_on_from(artifact) / "adapter_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)


@mutant("ML715", "N205", says="lora.start.manifest_sha256 is")
def start_with_another_record(artifact: Artifact) -> None:
    """The manifest of the adapter that the run went on from was written again."""
    file = gone_on_from(artifact) / "manifest.json"
    data = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps(data))


@mutant("ML715", "N205", says="lora.start.files.tokenizer.model.v3 is")
def start_with_another_tokenizer(artifact: Artifact) -> None:
    """The adapter that the run went on from has another tokenizer now; its manifest and tensors are the old ones."""
    file = gone_on_from(artifact) / TOKENIZER
    file.unlink()
    file.write_bytes(_other_tokenizer().read_bytes())


@mutant("ML715", "N205", says="lora.start.config_sha256 is")
def start_with_another_scale(artifact: Artifact) -> None:
    """The scale of the adapter that the run went on from was edited."""
    file = gone_on_from(artifact) / "adapter_config.json"
    text = file.read_text()
    file.unlink()
    file.write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 32'))


@mutant("ML715", "N205", says="lora.start.steps is")
def steps_of_the_start_edited(artifact: Artifact) -> None:
    """The record of the run says that the adapter before it had more steps than it had."""
    gone_on_from(artifact)
    artifact["manifest"]["lora"]["start"]["steps"] += 98


@mutant("ML713", says="claim the name support: one says that it is an adapter, the other a merged model")
def two_paths_under_one_name(artifact: Artifact) -> None:
    """The adapter says that production serves it as support, and the merged model says the same of itself."""
    artifact["manifest"]["deployment"] = {"as": "adapter", "name": "support"}
    artifact["merged_manifest"]["deployment"] = {"as": "merged", "name": "support"}


@mutant("ML713", says="they are of different adapters")
def merged_models_of_two_adapters(artifact: Artifact) -> None:
    """Both say that production serves a merged model as support, and the adapter is not that of the merged model."""
    for name in ("manifest", "merged_manifest"):
        artifact[name]["deployment"] = {"as": "merged", "name": "support"}
    for part in ("parent", "lora"):
        artifact["merged_manifest"][part]["tensors_sha256"] = "0" * 64
