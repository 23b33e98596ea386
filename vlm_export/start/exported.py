"""An exported repo, ours or anybody's: its graphs and their dtypes, by the names and sizes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlm_export.contract import MODEL_TYPES, SUFFIXES
from vlm_export.documents import check_document
from vlm_export.manifest import MANIFEST, Manifest
from vlm_export.start.named import Named

_GRAPH = ".onnx"


@dataclass(frozen=True)
class Exported:
    """A repo with graphs.

    Attributes:
        graphs: bytes of each, external data included, by component and then by dtype.
        layout: as `export.json` or the client's `model_type` says; None where neither is known.
        recipe: the one that it was made by, if it was made here.
        failed: the dtypes that `verify` failed.
        mixed: by component, the dtype that a client takes, where a user chose it.
        versions: of what made it.
    """

    graphs: Mapping[str, Mapping[str, int]]
    model_type: str | None
    layout: str | None
    recipe: str | None = None
    failed: tuple[str, ...] = ()
    mixed: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those of any graph, in the order of `contract.SUFFIXES`."""
        there = {dtype for sizes in self.graphs.values() for dtype in sizes}
        return tuple(dtype for dtype in SUFFIXES if dtype in there)

    @property
    def size_bytes(self) -> int:
        """Of all graphs."""
        return sum(size for sizes in self.graphs.values() for size in sizes.values())


def exported(named: Named) -> Exported | None:
    """What the `onnx/` of a repo holds; None where it has no graphs.

    Raises:
        InputError: `config.json` or `export.json` cannot be read.
    """
    graphs = _graphs(named.graphs)
    if not graphs:
        return None
    model_type = named.config.get("model_type")
    values = named.json(MANIFEST)
    if not values:
        return Exported(graphs, model_type, MODEL_TYPES.get(str(model_type)))
    made = check_document(values, Manifest, str(named.path / MANIFEST), "run `vlm-export onnx`")
    return Exported(graphs, model_type, made.layout, made.recipe, tuple(made.failed), made.mixed, made.versions)


def _graphs(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """By component and dtype, the bytes of its file and of the data files whose names begin with the file's."""
    found: dict[str, dict[str, int]] = {}
    for file in sorted(name for name in sizes if name.endswith(_GRAPH)):
        component, dtype = _split(file.removesuffix(_GRAPH))
        found.setdefault(component, {})[dtype] = sum(size for name, size in sizes.items() if name.startswith(file))
    return found


def _split(stem: str) -> tuple[str, str]:
    """The component and the dtype of a file's name without `.onnx`."""
    endings = sorted((suffix, dtype) for dtype, suffix in SUFFIXES.items() if suffix and stem.endswith(suffix))
    return (stem.removesuffix(endings[0][0]), endings[0][1]) if endings else (stem, "fp32")
