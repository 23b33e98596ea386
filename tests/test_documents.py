"""vlm_export.documents: what one command wrote and another reads is whole and of this version, or a line says what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported import Exported, prepare

from vlm_export import pipeline
from vlm_export.errors import InputError
from vlm_export.publish import gate

DOCUMENTS: dict[str, tuple[str, str, Callable[[Exported], Any]]] = {
    "merge.json": ("merged/merge.json", "inputs_sha256", lambda made: made.export()),
    "export.json": ("repo/export.json", "graphs", lambda made: made.verify("ort")),
    "report.json": ("report/report.json", "files_sha256", lambda made: gate.check_verified(made.work)),
    "golden.json": ("../golden/pico/golden.json", "images", lambda made: made.verify("ort")),
    "bench.json": ("report/bench.json", "rows", lambda made: made.verify("ort")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made = prepare(tmp_path_factory.mktemp("whole"))
    made.export()
    made.verify("ort")
    benchmark = {
        "model": "pico",
        "layout": "captioner",
        "images": ["0.png"],
        "prompt": None,
        "new_tokens": 2,
        "rounds": 1,
        "machine": {"cpu": "one", "cpus": 1, "memory_bytes": 1, "system": "any"},
        "versions": {},
        "graphs_sha256": json.loads((made.work.report / "report.json").read_text())["graphs_sha256"],
        "rows": [],
        "schema": 1,
    }
    pipeline.run_card(made.recipe, made.work, benchmark)
    return made


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest, whole: Exported, tmp_path: Path) -> tuple[Path, str, Callable[[], Any]]:
    """A document of a copy, a key that it must have, and what reads it."""
    place, key, read = DOCUMENTS[request.param]
    made = whole.copy(tmp_path / "copy")
    read(made)
    return made.work.root / place, key, lambda: read(made)


def spoil(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


SPOILED: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "newer": (lambda values, key: values.update(schema=99), r"schema 99 is of a newer vlm-export; this one reads \d"),
    "older": (
        lambda values, key: values.update(schema=0),
        r"schema 0 is of an older vlm-export; .*`vlm-export \w+",
    ),
    "of no schema": (lambda values, key: values.pop("schema"), r"schema None is of an older vlm-export"),
    "a key is gone": (lambda values, key: values.pop(key), r"is damaged: {key}: field required: .*`vlm-export \w+"),
    "a key is a text": (lambda values, key: values.update({key: "nothing"}), r"is damaged: {key}: input should be a "),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_one_line_says_what_is_wrong(kind: str, document: tuple[Path, str, Callable[[], Any]]) -> None:
    path, key, read = document
    change, message = SPOILED[kind]
    spoil(path, lambda values: change(values, key))
    with pytest.raises(InputError, match=message.replace("{key}", key)) as caught:
        read()
    assert str(path.name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_no_json_object(text: str, document: tuple[Path, str, Callable[[], Any]]) -> None:
    path, _, read = document
    path.write_text(text)
    with pytest.raises(InputError, match=rf"{path.name}: (not readable as JSON|holds a JSON list, not an object)"):
        read()
