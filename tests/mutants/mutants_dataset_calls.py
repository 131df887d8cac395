"""Tool calls and results that do not fit the tools of a row."""

from __future__ import annotations

import json

from bench_dataset import arguments_of, parameters_of, turn_of
from gallery import Artifact, mutant


@mutant("ML618", says="calls 'weather', which the row does not offer")
def call_without_tools(artifact: Artifact) -> None:
    """A tool is called, and the row has no tools."""
    del artifact["rows"][4]["tools"]


@mutant("ML619", says="JSON that was encoded twice")
def arguments_encoded_twice(artifact: Artifact) -> None:
    """The arguments of a call went through json.dumps twice."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = json.dumps(json.dumps({"city": "Rome"}))


@mutant("ML619", says="a text that is not strict JSON: the key 'city' appears twice")
def arguments_with_a_key_twice(artifact: Artifact) -> None:
    """An argument of a call is there twice, and mistral-common keeps the second alone."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome", "city": "Genoa"}'


@mutant("ML619", says="a text that is not strict JSON: Unterminated string")
def arguments_that_were_cut(artifact: Artifact) -> None:
    """The server that wrote a call was out of tokens."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = '{"city": "Ro'


@mutant("ML625", says="arguments has 'f\\\\u00e9' as letters")
def arguments_with_the_escape_of_a_letter(artifact: Artifact) -> None:
    """An argument was written twice as JSON."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = {"city": "Caf\\u00e9"}


@mutant("ML636", says="'Ã¼' for 'ü'")
def arguments_decoded_as_windows_1252(artifact: Artifact) -> None:
    """An argument is UTF-8 that was read as Windows-1252."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = {"city": "MÃ¼nchen"}


@mutant("ML636", says="'Ã¼' for 'ü'")
def results_decoded_as_windows_1252(artifact: Artifact) -> None:
    """A result is."""
    turn_of(artifact, 4, 2)["content"] = "MÃ¼nchen: mild and dry"


@mutant("ML643", says="'nan'")
def arguments_missing_in_a_table(artifact: Artifact) -> None:
    """An argument was missing in a table."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = {"city": "nan"}


@mutant("ML619", says="a text that is not strict JSON: NaN")
def arguments_that_are_not_a_number(artifact: Artifact) -> None:
    """The arguments of a call have NaN, which Python writes and no other caller reads."""
    arguments = json.dumps({"city": "Rome", "days": float("nan")})
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = arguments


@mutant("ML619", says="JSON, but not an object")
def arguments_as_a_list(artifact: Artifact) -> None:
    """The arguments of a call are a list."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = '["Rome"]'


@mutant("ML621", "N68", says="the id 'zzzzzzzzz' is of no call")
def result_of_no_call(artifact: Artifact) -> None:
    """A tool result has the id of another call, which tokenizers up to v11 do not look at."""
    turn_of(artifact, 4, 2)["tool_call_id"] = "zzzzzzzzz"


@mutant("ML621", "N68", says="was answered already")
def two_results_of_one_call(artifact: Artifact) -> None:
    """Two calls were made, and one of them is answered twice."""
    second = {**turn_of(artifact, 4, 1)["tool_calls"][0], "id": "secondone"}
    turn_of(artifact, 4, 1)["tool_calls"].append(second)
    artifact["rows"][4]["messages"].insert(3, dict(turn_of(artifact, 4, 2)))


@mutant("ML621", "N68", says="the result is of 'clock'")
def result_of_another_tool(artifact: Artifact) -> None:
    """A tool result names another tool than the call."""
    turn_of(artifact, 4, 2)["name"] = "clock"


@mutant("ML622", "N63", says="$: 'city' is a required property")
def required_argument_is_missing(artifact: Artifact) -> None:
    """A call leaves out an argument that the tool requires."""
    parameters_of(artifact)["required"] = ["city"]
    arguments_of(artifact).clear()


@mutant("ML622", "N63", says="$.days: '3' is not of type 'integer'")
def argument_of_another_type(artifact: Artifact) -> None:
    """A number is written as a text, in arguments that are themselves a text."""
    parameters_of(artifact)["properties"]["days"] = {"type": "integer"}
    arguments = json.dumps({"city": "Rome", "days": "3"})
    turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"] = arguments


@mutant("ML622", "N63", says="Additional properties are not allowed ('town' was unexpected)")
def argument_of_another_name(artifact: Artifact) -> None:
    """A call has an argument that the tool, which allows no others, does not have."""
    parameters_of(artifact)["additionalProperties"] = False
    arguments_of(artifact)["town"] = arguments_of(artifact).pop("city")


@mutant("ML622", "N63", says="$.place.kind: 'moon' is not one of ['city', 'lake']")
def nested_argument_out_of_its_enum(artifact: Artifact) -> None:
    """A value deep in the arguments is none of those that the schema lists, by a reference."""
    parameters = parameters_of(artifact)
    parameters["definitions"] = {"kind": {"enum": ["city", "lake"]}}
    parameters["properties"]["place"] = {"type": "object", "properties": {"kind": {"$ref": "#/definitions/kind"}}}
    arguments_of(artifact)["place"] = {"kind": "moon"}


@mutant("ML623", "N13", says="null at $.days, which the tool does not take")
def arguments_padded_with_null(artifact: Artifact) -> None:
    """Arrow gave the call the columns of another tool, filled with null."""
    arguments_of(artifact)["days"] = None


@mutant("ML623", "N13", says="null at $.place.kind")
def nested_arguments_padded_with_null(artifact: Artifact) -> None:
    """The same deeper, under a key that the tool has with another type."""
    parameters_of(artifact)["properties"]["place"] = {"type": "object", "properties": {"kind": {"type": "string"}}}
    arguments_of(artifact)["place"] = {"kind": None}


@mutant("ML623", "N13", says="null at $.stops[0].kind")
def arguments_in_a_list_padded_with_null(artifact: Artifact) -> None:
    """The same in the objects of a list, whose schema is a reference."""
    parameters_of(artifact)["$defs"] = {"stop": {"type": "object", "properties": {"name": {"type": "string"}}}}
    parameters_of(artifact)["properties"]["stops"] = {"type": "array", "items": {"$ref": "#/$defs/stop"}}
    arguments_of(artifact)["stops"] = [{"name": "Rome", "kind": None}]


@mutant("ML623", "N13", says="null at $.place.kind")
def arguments_of_one_of_two_forms_padded_with_null(artifact: Artifact) -> None:
    """The same in an argument that may have one of two forms."""
    forms = [{"type": "object", "properties": {one: {"type": "string"}}} for one in ("name", "code")]
    parameters_of(artifact)["properties"]["place"] = {"anyOf": forms}
    arguments_of(artifact)["place"] = {"name": "Rome", "kind": None}
