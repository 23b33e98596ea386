"""Kinds 6, 29, 33: the file of a sweep, and what it names."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import SWEEP, Case, rows
from bad.changes import BINARY, EMPTY, FOLDER, GONE, NOWHERE, PIPE, ZERO, append, raw, replace


def sweeps() -> Iterator[Case]:
    yield from rows(6, "captioner", SWEEP, "s.yaml", (append("dtypes: []\n"), "dtypes"), (append("name: u\n"), "name"))
    yield from rows(
        29,
        "captioner",
        SWEEP,
        "s.yaml",
        EMPTY,
        BINARY,
        (raw("- 1"), "mapping"),
        (raw("name: s"), "recipes"),
        (append("extra: 1\n"), "extra"),
        (append("extra: &a [*a]\n"), ""),
        (append("extra: !!python/object/apply:os.system [ls]\n"), ""),
        (replace("name: s", "name: ../s"), "name"),
        (replace("name: s", "name: 5"), "name"),
        (replace("- r.yaml", "- none.yaml"), "recipes.0: none.yaml"),
        (replace("- r.yaml", "- 5"), "recipes"),
        (replace("- r.yaml", '- "a\\0b"'), "recipes"),
        (replace("- r.yaml", "- images/0.png"), "recipes.0"),
        (replace("- r.yaml", "- s.yaml"), "", "s.yaml"),
        (replace("- path: adapter", "- path: none"), "none"),
        (replace("- path: adapter", "- path: 5"), "adapters"),
        (replace("- path: adapter", "- {}"), "adapters"),
        (replace("- path: adapter", '- path: "a\\0b"'), "adapters"),
        (replace("- path: adapter", "- {path: adapter, author: x}"), "adapters"),
        (replace("- captioner", "- nope"), "layouts"),
        (replace("- captioner", "- tasks"), "layouts: "),
        (replace("- q8", "- q9"), "dtypes"),
        (replace("- q8", "- 8"), "dtypes"),
        (replace("- ort", "- nope"), "runtimes"),
        (replace("rounds: 1", "rounds: 10000000000"), "bench"),
        (replace("rounds: 1", "rounds: x"), "bench"),
        (replace("org/{name}-{layout}-onnx", "org/onnx"), "push.repo_id"),
        (replace("org/{name}-{layout}-onnx", "nobody"), "push.repo_id"),
    )
    yield from rows(33, "captioner", SWEEP, "s.yaml", PIPE, FOLDER, ZERO, NOWHERE, GONE)
    yield from rows(
        29, "captioner", SWEEP, "r.yaml", (raw("x"), "mapping"), (replace("model: base", "model: 5"), "model")
    )
    yield from rows(29, "captioner", SWEEP, "adapter/adapter_config.json", GONE)
    yield from rows(29, "captioner", SWEEP, "base/config.json", raw("{"))
