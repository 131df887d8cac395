"""An encoded row as text: who owns each run of tokens, and what is trained on."""

from __future__ import annotations

from collections.abc import Callable

from pytest_mistral_lora.chat.encoded import EncodedRow


def encoded_text(encoded: EncodedRow, piece: Callable[[int], str]) -> str:
    """Return one line for each span: its tokens' range, whether they are trained on, turn, role, kind, pieces.

    Args:
        encoded: The row.
        piece: Gives the vocabulary's spelling of an id.
    """
    lines = []
    for span in encoded.spans:
        owner = "-" if span.turn is None else f"turn {span.turn} {span.role}"
        state = "train" if span.supervised else "-100"
        pieces = " ".join(piece(token) for token in encoded.input_ids[span.start : span.end])
        lines.append(f"  {span.start:>5}-{span.end:<5} {state:<6} {owner:<18} {span.kind:<10} {pieces}")
    trained = f"{encoded.supervised_tokens} of {len(encoded.input_ids)} tokens are trained on"
    return "\n".join([*lines, f"  {trained}"])
