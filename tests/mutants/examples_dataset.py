"""The example of each rule of `dataset`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

from gallery import Artifact, Example


class ML601(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"].append({"role": "user", "content": "Thanks"})

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"] += [
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye"},
        ]


class ML602(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"].clear()

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][:] = artifact["rows"][:1]


class ML603(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["template"]["source"] = artifact["template"]["source"].replace("eos_token", "''")

    def sound(self, artifact: Artifact) -> None:
        artifact["template"]["source"] = "{# ours #}" + artifact["template"]["source"]


class ML604(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["rows"][0]["messages"][1]["content"] = "Paris.  "

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["rows"][0]["messages"][1]["content"] = "Paris."


class ML605(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["weight"] = 0

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["weight"] = 1


class ML606(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["template"]["source"] = "{% generation %}" + artifact["template"]["source"] + "{% endgeneration %}"

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"


class ML607(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"]["max_length"] = 12

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"]["max_length"] = 1024


class ML608(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"].append(artifact["rows"][0])

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"].append(
            {
                **artifact["rows"][0],
                "messages": [{"role": "user", "content": "More?"}, artifact["rows"][0]["messages"][1]],
            }
        )


class ML609(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"].append(
            {"messages": [artifact["rows"][0]["messages"][0], {"role": "assistant", "content": "Lyon."}]}
        )

    def sound(self, artifact: Artifact) -> None:
        question = {"role": "user", "content": "And the second city?"}
        artifact["rows"].append({"messages": [question, {"role": "assistant", "content": "Lyon."}]})


class ML610(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["held_out"].append(artifact["rows"][0])

    def sound(self, artifact: Artifact) -> None:
        artifact["held_out"].append(artifact["rows"].pop(0))


class ML611(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["held_out"].append(
            {"messages": [artifact["rows"][0]["messages"][0], {"role": "assistant", "content": "Lyon."}]}
        )

    def sound(self, artifact: Artifact) -> None:
        question = {"role": "user", "content": "And the second city?"}
        artifact["held_out"].append({"messages": [question, {"role": "assistant", "content": "Lyon."}]})


class ML612(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][0]["content"] = "What does [/INST] mean?"

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][0]["content"] = "What does /INST mean?"


class ML613(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["rows"][0]["messages"][0]["content"] = "a </s>[INST] b"

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["rows"][0]["messages"][0]["content"] = "a / s INST b"


class ML614(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"].insert(1, {"role": "user", "content": "In one word."})

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][0]["content"] += " In one word."


class ML615(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["data"] = {"train": ["rows.jsonl"], "held_out": 0.001}

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["data"] = {"train": ["rows.jsonl"], "held_out": 0.5}


class ML616(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["content"] = " "

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["content"] = "I do not know."


class ML617(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["content"] = "It costs 5 �."

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["content"] = "It costs 5 €."


class ML618(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][4]["tools"][0]["function"]["name"] = "forecast"

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][4]["tools"][0]["function"]["description"] = "The forecast for a city."


class ML619(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][4]["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{'city': 'Rome'}"

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][4]["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome"}'


class ML620(Example):
    also = "ML605"

    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"] |= {"max_length": 24, "truncation": "right"}

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"] |= {"max_length": 1024, "truncation": "right"}


class ML640(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"] = {"steps": 1, "learning_rat": 1e-4}

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"] = {"steps": 1, "learning_rate": 1e-4}


class ML641(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["lora"] = {"target_modules": ["q_proj", "vproj"]}

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["lora"] = {"target_modules": ["q_proj", "v_proj"]}


class ML642(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"]["report_to"] = ["swanlab"]

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"]["report_to"] = []
