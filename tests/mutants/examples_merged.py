"""The example of each rule of `merged`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

from bench_merged import CHATML, HEAD, K1, NORM, Q1, changed, edit_tokenizer, low_rank_head, random_like
from gallery import Artifact, Example


class ML421(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["config"]["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["quantization_config"] = None


class ML430(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tensors"][NORM] += 0.125

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][NORM] = artifact["before"][NORM].clone()


class ML431(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tensors"][Q1] = random_like(artifact["tensors"][Q1])

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][Q1] = changed(artifact, Q1, 1.5)


class ML432(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tensors"][K1] = artifact["before"][K1].clone()

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][K1] = changed(artifact, K1, 0.5)


class ML433(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tensors"][Q1] = changed(artifact, Q1, 100)

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][Q1] = changed(artifact, Q1, 1.5)


class ML434(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["adapter_at_hand"] = True
        for name in [name for name in artifact["tensors"] if "_proj" in name]:
            artifact["tensors"][name] = changed(artifact, name, 0.5)

    def sound(self, artifact: Artifact) -> None:
        artifact["adapter_at_hand"] = True


class ML435(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["config"]["rope_parameters"] = {"rope_type": "default"}

    def sound(self, artifact: Artifact) -> None:
        del artifact["config"]["rope_parameters"]
        artifact["config"]["rope_theta"] = 1_000_000


class ML436(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["config"]["tie_word_embeddings"] = True

    def sound(self, artifact: Artifact) -> None:
        artifact["config"]["tie_word_embeddings"] = False


class ML437(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.float() for name, tensor in artifact["tensors"].items()}

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"] = {name: tensor.clone() for name, tensor in artifact["tensors"].items()}


class ML438(Example):
    def broken(self, artifact: Artifact) -> None:
        for name, before in artifact["before"].items():
            if ".layers.2." in name:
                artifact["tensors"][name] = before.clone()

    def sound(self, artifact: Artifact) -> None:
        artifact["adapter_at_hand"] = True


class ML439(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tensors"][HEAD] = low_rank_head(artifact)

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][HEAD] = artifact["before"][HEAD].clone()


class ML440(Example):
    def broken(self, artifact: Artifact) -> None:
        edit_tokenizer(artifact, lambda data: data.update(normalizer={"type": "Lowercase"}))

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["padding_side"] = "left"


class ML441(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["eos_token"] = "[INST]"

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer_config"]["pad_token"] = "[control_12]"


class ML442(Example):
    def broken(self, artifact: Artifact) -> None:
        (artifact["folder"] / "chat_template.jinja").write_text(CHATML)

    def sound(self, artifact: Artifact) -> None:
        file = artifact["folder"] / "chat_template.jinja"
        file.write_text(file.read_text() + "\n")
