"""An entry of `datasets` in a configuration of Axolotl."""

from __future__ import annotations

from pydantic import BaseModel


class OwnFields(BaseModel, extra="forbid", strict=True):
    """Axolotl's `UserDefinedPrompterType`."""

    system_prompt: str | None = None
    system_format: str | None = None
    field_system: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    format: str | None = None
    no_input_format: str | None = None


class AxolotlEntry(BaseModel, extra="allow", strict=True):
    """The supported keys of Axolotl's `SFTDataset` and `DPODataset`."""

    path: str | None = None
    data_files: str | list[str] | None = None
    type: str | OwnFields | None = None
    field_messages: str | None = None
    field_system: str | None = None
    field_tools: str | None = None
    field_thinking: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    message_field_role: str | None = None
    message_field_content: str | None = None
    message_field_training: str | None = None
    message_property_mappings: dict[str, str] | None = None
    roles: dict[str, list[str]] | None = None
    roles_to_train: list[str] | None = None
    train_on_eos: str | None = None
    drop_system_message: bool | None = None
