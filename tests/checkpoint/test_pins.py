"""Pins, against a Hub on 127.0.0.1: huggingface_hub reads its environment once, so each call is its own process."""

from __future__ import annotations

import hashlib
import json
import shlex
import socket
import sys

import pytest
from pinned_hub import REPO, TOKENIZER, Place

from pytest_mistral_lora import places
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.pins import check_revision
from pytest_mistral_lora.errors import PinError

COMMIT = hashlib.sha1(b"some commit").hexdigest()


def test_a_full_lower_case_commit_is_a_pin() -> None:
    assert check_revision(COMMIT) == COMMIT


@pytest.mark.parametrize(
    "revision",
    ["main", "v0.3", "", "refs/pr/1", COMMIT[:7], COMMIT[:39], COMMIT + "0", COMMIT.upper(), COMMIT + "\n"],
)
def test_anything_that_can_move_or_be_misread_is_not_a_pin(revision: str) -> None:
    with pytest.raises(PinError) as caught:
        check_revision(revision, place=places.Place.of("recipe.yaml").within("base", "revision"))
    assert repr(revision) in caught.value.found
    assert str(caught.value.place) == "recipe.yaml, base.revision"
    assert caught.value.next_step == "Print the newest: mistral-lora pin owner/name"


@pytest.mark.parametrize(
    "revision", ["0" * 40, "f" * 40, "deadbeef" * 5, "0123456789" * 4, "0123456789abcdef" * 2 + "01234567"]
)
def test_a_made_up_commit_is_not_a_pin(revision: str) -> None:
    with pytest.raises(PinError, match=f"'{revision}' is a placeholder"):
        check_revision(revision)


def test_without_weights_only_configuration_and_tokenizer_are_fetched(
    place: Place, model_files: dict[str, bytes]
) -> None:
    folder = place.fetch(place.old)
    assert folder == place.snapshot(place.old)
    wanted = {name for name in model_files if not name.endswith(".safetensors")}
    assert {file.name for file in folder.iterdir()} == wanted
    assert {name: (folder / name).read_bytes() for name in wanted} == {name: model_files[name] for name in wanted}
    assert place.hub.requested(TOKENIZER), "the log of requests is what the next line reads"
    assert not [path for path in place.hub.requested("") if path.endswith((".safetensors", ".py", ".bin"))]


def test_with_weights_safetensors_are_fetched_once_and_no_pickle_or_code(
    place: Place, model_files: dict[str, bytes]
) -> None:
    folder = place.fetch(place.old, weights=True, verify=True)
    assert {file.name for file in folder.iterdir()} == set(model_files)
    fetched = {path for path in place.hub.requested("") if "/resolve/" in path}
    assert fetched == {f"/{REPO}/resolve/{place.old}/{name}" for name in model_files}


def test_the_resolved_folder_loads_in_transformers(place: Place, model_files: dict[str, bytes]) -> None:
    import torch
    from safetensors.torch import load
    from transformers import AutoModelForCausalLM

    folder = place.fetch(place.old, weights=True)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    saved = load(model_files["model.safetensors"])
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved)


def test_a_pin_stays_where_it_is_when_the_branch_moves(place: Place, model_files: dict[str, bytes]) -> None:
    assert place.repository.branches["main"] == place.new
    old, new = (place.fetch(commit) for commit in (place.old, place.new))
    assert (old / TOKENIZER).read_bytes() == model_files[TOKENIZER]
    assert (new / TOKENIZER).read_bytes() == shipped_tokenizer("spm-v2").read_bytes()


def test_the_error_for_a_branch_names_the_commit_it_points_to(place: Place) -> None:
    answer = place.resolve("main", place="recipe.yaml, base.revision")
    assert answer["error"].startswith("recipe.yaml, base.revision: ")
    assert "'main' is not a pin" in answer["error"]
    assert answer["next_step"].startswith(f"main is {place.new} now")


def test_offline_the_error_for_a_branch_names_the_commit_it_pointed_to_when_fetched(place: Place) -> None:
    call = "import sys, huggingface_hub as hub; hub.hf_hub_download(sys.argv[1], 'config.json')"
    assert place.run([sys.executable, "-c", call, REPO]).returncode == 0
    assert f"main was {place.new} when it was last fetched" in place.resolve("main", offline=True)["next_step"]
    (place.home / "secret").write_text(COMMIT)
    assert COMMIT not in place.resolve("../../../secret", offline=True)["next_step"]


def test_an_absent_revision_is_an_error_that_names_the_newest(place: Place) -> None:
    answer = place.resolve(COMMIT)
    assert answer["found"] == f"{REPO} has no commit {COMMIT}"
    assert place.new in answer["next_step"]


def test_an_absent_repository_is_an_error(place: Place) -> None:
    answer = place.resolve(COMMIT, repo="tiny/absent")
    assert f" {place.hub.url}/tiny/absent" in answer["found"]
    assert "HF_TOKEN" in answer["next_step"]


def test_a_name_that_is_no_repository_id_is_an_error(place: Place) -> None:
    assert "is not the id of a Hub repository" in place.resolve(COMMIT, repo="a/b/c")["found"]


def test_a_gated_repository_is_an_error_that_tells_of_the_licence(place: Place) -> None:
    place.repository.gated = True
    answer = place.resolve(place.old)
    assert answer["found"] == f"access to {place.hub.url}/{REPO} is gated"
    assert "Accept its licence" in answer["next_step"]
    assert "hf auth login" in answer["next_step"]


def test_an_unreachable_endpoint_is_an_error_and_the_cache_still_serves(place: Place) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        answer = place.resolve(place.old, endpoint=nobody)
        assert answer["found"].startswith(f"cannot fetch {REPO} from {nobody}: Connect")
        assert "HF_ENDPOINT" in answer["next_step"]
        place.fetch(place.old)
        assert place.fetch(place.old, endpoint=nobody) == place.snapshot(place.old)


def test_offline_an_empty_cache_is_an_error_whose_command_fills_it(place: Place) -> None:
    answer = place.resolve(place.old, offline=True)
    assert "offline mode is on" in answer["found"]
    command = shlex.split(answer["next_step"].removeprefix("Fetch it once: "))
    assert command[0] == "HF_HUB_OFFLINE=0"
    done = place.run(command[1:])
    assert done.returncode == 0, done.stderr
    asked = len(place.hub.requests)
    assert place.fetch(place.old, offline=True) == place.snapshot(place.old)
    assert len(place.hub.requests) == asked


def test_offline_a_cache_without_the_weights_does_not_pass_for_one_with_them(place: Place) -> None:
    place.fetch(place.old)
    answer = place.resolve(place.old, offline=True, weights=True)
    assert "offline mode is on" in answer["found"]
    assert "weights=True" in answer["next_step"]


def test_a_missing_shard_is_named(place: Place, model_files: dict[str, bytes]) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    commit = place.repository.commit(
        {
            "config.json": model_files["config.json"],
            "model.safetensors.index.json": index.encode(),
            "model-00001-of-00002.safetensors": model_files["model.safetensors"],
        }
    )
    assert place.resolve(commit, weights=True)["found"].endswith("has no model-00002-of-00002.safetensors")


def test_a_repository_with_nothing_to_use_is_an_error(place: Place) -> None:
    commit = place.repository.commit({"README.md": b"# Nothing\n"})
    assert place.resolve(commit)["found"].endswith("has no configuration or tokenizer file")
