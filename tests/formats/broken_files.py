"""Ten broken files of each format, with the verb that is to read them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROW = {"messages": TURNS}
LINE = json.dumps(ROW)
SHARED = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
IDS = {**ROW, "input_ids": [1, 3, 2], "labels": [-100, 3, 2]}
Write = Callable[[Path], None]


def _message(**fields: Any) -> dict[str, Any]:
    return {"messages": [TURNS[0], {"role": "assistant", "content": "b", **fields}]}


def _share(*messages: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"conversations": list(messages), **keys}


def _lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def _parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def _arrow(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _damaged(write: Write, *, keep: float = 1.0, flip: float | None = None) -> Write:
    """Write a file, and cut it or turn a byte."""

    def damage(path: Path) -> None:
        write(path)
        data = bytearray(path.read_bytes())
        if flip is not None:
            data[int(len(data) * flip)] ^= 0xFF
        path.write_bytes(data[: int(len(data) * keep)])

    return damage


def _zstd(data: bytes) -> bytes:
    import pyarrow as pa

    return bytes(pa.Codec("zstd").compress(data))


def _saved(path: Path, name: str = "state.json", content: str | None = None) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([ROW]).save_to_disk(path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)


ARRAYS = [
    "[",
    "[]",
    f"[{LINE}",
    f"[{LINE},]",
    f"[{LINE} {LINE}]",
    f"[{LINE}]]",
    json.dumps([ROW], indent=1)[:-4],
    repr([ROW]),
    "[1, 2]",
    f'{{"data": [{LINE}]}}',
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CSV = "instruction,output\n"
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
THREE = [ROW, ROW, ROW]
HUMAN, GPT = SHARED["conversations"]
BROKEN: dict[str, tuple[str, str, list[str | bytes | Write]]] = {
    "rows": (
        "render",
        "jsonl",
        [
            "",
            "\n \n",
            '{"messages": [{"role": "user", "content": "a"},]}\n',
            LINE + ",\n" + LINE + ",\n",
            repr(ROW) + "\n",
            LINE.replace('"b"', "NaN") + "\n",
            LINE[:40] + "\n" + LINE + "\n",
            LINE + LINE + "\n",
            b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n',
            _lines({"messages": []}, {"messages": [TURNS[0]]}, {"Messages": TURNS}, {"tools": []}, 5, [], "null"),
        ],
    ),
    "a JSON array": (
        "render",
        "json",
        ARRAYS,
    ),
    "a JSON array, imported": (
        "import",
        "json",
        ARRAYS,
    ),
    "JSON objects over several lines": (
        "import",
        "json",
        [
            "{\n",
            "{\n}",
            json.dumps(ROW, indent=2)[:-2],
            json.dumps(ROW, indent=2).replace('"b"', '"b",'),
            json.dumps(ROW, indent=2) + ",",
            json.dumps(ROW, indent=2) + "\n" + json.dumps(ROW, indent=2)[:30],
            json.dumps(ROW, indent=2).replace('"', "'"),
            json.dumps(ROW, indent=2).replace('"b"', "NaN"),
            json.dumps({"rows": [ROW]}, indent=2),
            json.dumps({"messages": []}, indent=2),
        ],
    ),
    "ShareGPT": (
        "render",
        "jsonl",
        [
            _lines(SHARED),
            _lines(SHARED, SHARED, SHARED),
            _lines(ROW, SHARED),
            _lines({"messages": SHARED["conversations"]}),
            _lines({"conversations": TURNS}),
            _lines({"conversations": json.dumps(SHARED["conversations"])}),
            _lines({"conversations": []}),
            _lines({"conversation": SHARED["conversations"]}),
            _lines({"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}),
            _lines({"messages": [{"role": "user", "value": "a"}, {"role": "assistant", "value": "b"}]}),
        ],
    ),
    "ShareGPT, imported": (
        "import",
        "jsonl",
        [
            _lines(_share()),
            _lines(_share({"from": "ghost", "value": "a"}, GPT)),
            _lines(_share({"from": "human"}, GPT)),
            _lines(_share(HUMAN)),
            _lines(_share(HUMAN, {"from": "gpt", "value": 5})),
            _lines(_share(HUMAN, {"from": "function_call", "value": "f()"})),
            _lines(_share(HUMAN, {"from": "observation", "value": "1"}, GPT)),
            _lines({**SHARED, "tools": "[{"}),
            _lines({**SHARED, "audios": ["a.wav"]}),
            _lines({"conversations": "[{"}),
        ],
    ),
    "Alpaca": (
        "import",
        "jsonl",
        [
            _lines({"instruction": "a", "output": ""}),
            _lines({"instruction": "a", "output": "b", "Messages": 1}),
            _lines({"instruction": 5, "output": "b"}),
            _lines({"instruction": "a", "output": ["b"]}),
            _lines({"instruction": "a", "output": None}),
            _lines({"instruction": "a"}),
            _lines({"instruction": "a", "output": "b", "history": ["x"]}),
            _lines({"instruction": "a", "output": "b", "history": "x"}),
            _lines({"instruction": "a", "output": "b", "system": 3}),
            _lines({"instruction": "a", "output": "b", "audio": "a.wav"}),
        ],
    ),
    "prompt and completion": (
        "import",
        "jsonl",
        [
            _lines({"prompt": "a", "completion": ""}),
            _lines({"prompt": "a", "completion": "b", "reasoning_efort": 1}),
            _lines({"prompt": "a", "completion": 5}),
            _lines({"prompt": TURNS[:1], "completion": []}),
            _lines({"prompt": [], "completion": TURNS[1:]}),
            _lines({"prompt": TURNS[:1], "completion": [{"role": "bot"}]}),
            _lines({"prompt": "a"}),
            _lines({"prompt": "a", "completion": "b", "reward": -1}),
            _lines({"question": "a", "answers": ["b"]}),
            _lines({"prompt": None, "completion": None}),
        ],
    ),
    "preference pairs": (
        "import",
        "jsonl",
        [
            _lines({**PAIR, "rejected": {"role": "bot", "content": "c"}}),
            _lines({**PAIR, "chosen": ""}),
            _lines({"chosen": "b", "rejected": "c"}),
            _lines({**PAIR, "chosen": TURNS[:1]}),
            _lines({**PAIR, "chosen": 5}),
            _lines({**PAIR, "prompt": 5}),
            _lines({"chosen": [], "rejected": []}),
            _lines({**PAIR, "rejected": None}),
            _lines({"prompt": "a", "chosen": "b"}),
            _lines({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}),
        ],
    ),
    "messages of OpenAI": (
        "render",
        "jsonl",
        [
            _lines(_message(tool_calls=[CALL], content=None)),
            _lines(_message(function_call={"name": "f", "arguments": "{}"})),
            _lines({"messages": [{"role": "developer", "content": "s"}, *TURNS]}),
            _lines({"messages": [*TURNS[:1], {"role": "function", "name": "f", "content": "1"}]}),
            _lines(_message(reasoning_content="x")),
            _lines(_message(train=False)),
            _lines(_message(mask=True)),
            _lines({"messages": [{**TURNS[0], "audios": ["a.wav"]}, TURNS[1]]}),
            _lines({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, TURNS[1]]}),
            _lines({**ROW, "tools": "[]"}),
        ],
    ),
    "CSV": (
        "import",
        "csv",
        [
            "\n",
            CSV,
            CSV + "a\n",
            CSV + "a,b,c\n",
            CSV + '"a,b\n',
            CSV + 'a,"b" c\n',
            "instruction,instruction\na,b\n",
            "x,y\n1,2\n",
            (CSV + "caf\xe9,b\n").encode("latin1"),
            "messages\n[{\n",
        ],
    ),
    "Parquet": (
        "import",
        "parquet",
        [
            b"PAR1",
            b"PAR1 and more",
            _damaged(partial(_parquet, rows=THREE), keep=0.5),
            _damaged(partial(_parquet, rows=THREE), keep=0.98),
            partial(_parquet, rows=[{"a": 1}]),
            partial(_parquet, rows=[{"text": "a"}]),
            partial(_parquet, rows=[{"messages": "x"}]),
            partial(_parquet, rows=[{"messages": None, "text": None, "a": 1}]),
            partial(_parquet, rows=[{"input_ids": [1], "labels": [1]}]),
            partial(_parquet, rows=[{"messages": [{"role": "bot", "content": "a"}]}]),
        ],
    ),
    "Arrow": (
        "import",
        "arrow",
        [
            b"ARROW1",
            b"\xff\xff\xff\xff",
            _damaged(partial(_arrow, rows=THREE), keep=0.3),
            _damaged(partial(_arrow, rows=THREE), keep=0.8),
            partial(_arrow, rows=[{"a": 1}]),
            partial(_arrow, rows=[{"text": "a"}]),
            partial(_arrow, rows=[{"messages": [{"role": "bot", "content": "a"}]}]),
            partial(_saved, content='{"_data_files": [{"filename": "../out.arrow"}]}'),
            partial(_saved, content="{"),
            partial(_saved, content="{}"),
        ],
    ),
    "compressed": (
        "import",
        "jsonl.gz",
        [
            gzip.compress(b""),
            gzip.compress(LINE.encode())[:20],
            gzip.compress(b"\n"),
            gzip.compress(b"PAR1"),
            gzip.compress(b"{"),
            gzip.compress(_lines({"text": "a"}).encode()),
            b"\x1f\x8b",
            b"\x1f\x8b and no more",
            b"\x28\xb5\x2f\xfd and no more",
            lambda path: path.write_bytes(_zstd(LINE.encode())[:20]) and None,
        ],
    ),
    "another encoding": (
        "render",
        "jsonl",
        [
            LINE.encode("utf-16"),
            LINE.encode("utf-16-le"),
            LINE.encode("utf-16-be"),
            LINE.encode("utf-32"),
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            "{\u201cmessages\u201d: []}\n",
            LINE.replace("a", "\xe4").encode("latin1"),
            b"\xff\xfe" + LINE.encode("utf-16-le")[:-1],
            (LINE + "\n\ufeff" + LINE).encode(),
        ],
    ),
    "encoded rows": (
        "check",
        "jsonl",
        [
            "",
            _lines(ROW),
            _lines(SHARED),
            _lines({"input_ids": [1], "labels": "1"}),
            _lines({**IDS, "input_ids": "1"}),
            _lines({**ROW, "input_ids": [1]}),
            _lines({**IDS, "row": -1}),
            json.dumps([IDS])[:-3],
            partial(_parquet, rows=[{**ROW, "input_ids": [1.5], "labels": [1]}]),
            _saved,
        ],
    ),
}
