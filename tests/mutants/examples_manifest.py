"""The example of each rule of `manifest`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import json

import mutants_manifest_base as base
import mutants_manifest_files as files
import mutants_manifest_restated as restated
import mutants_manifest_schema as schema
from committed import commit_all
from gallery import Artifact, Example


class ML701(Example):
    mutant = schema.revision_is_a_branch

    def sound(self, artifact: Artifact) -> None:
        artifact["manifest"]["x-note"] = "keys of your own begin with x-"


class ML702(Example):
    mutant = files.alpha_edited

    def sound(self, artifact: Artifact) -> None:
        config = artifact["folder"] / "adapter_config.json"
        config.touch()


class ML703(Example):
    mutant = base.base_of_another_commit

    def sound(self, artifact: Artifact) -> None:
        artifact["manifest"]["x-base"] = "a local one"


class ML704(Example):
    mutant = schema.manifest_missing

    def sound(self, artifact: Artifact) -> None:
        artifact["require_manifest"] = True


class ML705(Example):
    mutant = files.template_in_two_places

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"] / "tokenizer_config.json").write_text("{}")
        artifact["list_file"]("tokenizer_config.json")


class ML706(Example):
    mutant = files.rows_edited

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0].write_text(artifact["rows"][0].read_text())


class ML707(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["manifest"]["parent"] = artifact["parent"]

    def sound(self, artifact: Artifact) -> None:
        artifact["manifest"]["x-parent"] = artifact["parent"]


class ML708(Example):
    mutant = files.file_that_came_later

    def sound(self, artifact: Artifact) -> None:
        (artifact["folder"].parent / "notes.txt").write_text("later")


class ML709(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["manifest"]["training"]["sliding_window"] = 4096

    def sound(self, artifact: Artifact) -> None:
        artifact["manifest"]["training"]["sliding_window"] = None


class ML710(Example):
    mutant = files.merged_with_other_answers

    def sound(self, artifact: Artifact) -> None:
        artifact["merged_manifest"]["parent"]["greedy_equal"] = True


class ML711(Example):
    mutant = base.epsilon_of_the_base_edited

    def sound(self, artifact: Artifact) -> None:
        file = artifact["base"] / "config.json"
        changed = {"dtype": "bfloat16", "transformers_version": "4.51.3", "use_cache": False}
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


class ML712(Example):
    mutant = files.manifest_cut_down_after_its_commit

    def sound(self, artifact: Artifact) -> None:
        commit_all(artifact["folder"].parent)
        artifact["manifest"]["x-note"] = "more is no less"


class ML713(Example):
    mutant = files.two_paths_under_one_name

    def sound(self, artifact: Artifact) -> None:
        for name in ("manifest", "merged_manifest"):
            artifact[name]["deployment"] = {"as": "adapter", "name": "support"}


class ML715(Example):
    mutant = files.start_trained_again_after_the_run

    def sound(self, artifact: Artifact) -> None:
        files.gone_on_from(artifact)


class ML716(Example):
    mutant = restated.gate_that_was_cut_out

    def sound(self, artifact: Artifact) -> None:
        artifact["manifest"]["recipe"]["evaluation"]["gate"] = False
