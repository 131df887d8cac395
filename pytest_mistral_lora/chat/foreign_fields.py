"""The names that other formats give to roles and fields of messages; errors on them name the command to convert."""

from __future__ import annotations

CALL = "function_call"
"""The role of a message whose content is the JSON of tool calls, as in ShareGPT."""
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    # the other assistants of ShareGPT's own pages
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    CALL: CALL,
    "tool_call": CALL,
}
"""Names of roles in other formats, each with our name."""

FLAGS = {"weight": 1, "train": 1, "training": 1, "trainable": 1, "loss": 1, "loss_weight": 1, "loss_mask": 1, "mask": 0}
"""Fields of messages that decide about training: 1 if true means that the message is trained on, else 0."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of messages that hold the thinking."""
CONTENT = ("content", "value", "text", "parts")
"""Fields of messages that hold the content."""

PICTURES = ("image", "images")
"""Keys of records that hold pictures: paths or URLs, or objects with one."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of records that hold media: without them, the text would be trained alone."""
MEDIA_PARTS = frozenset((*MEDIA, "image_url", "input_image", "input_audio", "audio_url", "video_url", "file"))
"""Fields of messages, and types of chunks, that hold media."""
