"""`export.json`: what an exported repo holds, and where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field, NonNegativeInt

from vlm_export.contract import SINGLE_GRAPH, LayoutName
from vlm_export.documents import load_document
from vlm_export.dtypes import DTYPES
from vlm_export.errors import InputError, shown
from vlm_export.own_files import own_file
from vlm_export.typed import command
from vlm_export.wanted import MIXED

MANIFEST = "export.json"
ONNX = "onnx"  # the folder of the graphs
_PLAIN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"  # a name without folders


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"is none of {', '.join(DTYPES)}")
    return name


def _known_layout(name: str) -> str:
    if name not in get_args(LayoutName):
        raise ValueError(f"is none of {', '.join(get_args(LayoutName))}")
    return name


_DtypeName = Annotated[str, AfterValidator(_known_dtype)]


@dataclass(frozen=True)
class GraphFile:
    """One graph of the repo: its size with external data, and in how many chunks that data lies.

    `rounded` says that its numbers of few bits are the nearest, for want of the memory to calibrate them.
    """

    component: Annotated[str, Field(pattern=_PLAIN)]
    dtype: _DtypeName
    file: Annotated[str, Field(pattern=_PLAIN)]
    size_bytes: NonNegativeInt
    data_chunks: NonNegativeInt
    rounded: bool = False


@dataclass(frozen=True)
class Range:
    """How large the numbers of a component become on sample inputs, in float32.

    Attributes:
        largest: the largest magnitude.
        where: the value that reaches it, and the weights before it.
        headroom: how many times as large it could be in float16, at most 65504.
        values: so many values and weights the component has.
        in_float32: so many of them float16 does not hold; its variants compute them in float32.
        begins: the first of those.
    """

    largest: float
    where: str
    headroom: float
    values: int
    in_float32: int = 0
    begins: str = ""

    @property
    def remedy(self) -> str:
        """In a line, what is done about numbers that float16 does not hold."""
        return (
            f"{self.in_float32} of {self.values} values are computed in float32: from {self.begins}, on they reach up "
            f"to {self.largest:,.0f}, and float16 ends at 65,504"
        )


@dataclass(frozen=True)
class Manifest:
    """`export.json`: what was exported, from which inputs, by which versions, and which dtypes `verify` failed.

    `dtypes` are those that every component has. `mixed` says by component which dtype a client is to take, where a user
    chose it; the component may be the only one that has it. `ranges` are those of the components that float16 variants
    were made of. `in_graph` are the image processor settings that the vision graph carries out; a client has nothing to
    do to pictures then. `commits` are, by a key of the recipe, what came of the Hub, as `org/model@…`.
    """

    recipe: str
    layout: Annotated[str, AfterValidator(_known_layout)]
    dtypes: list[_DtypeName]
    graphs: list[GraphFile]
    simplified: dict[str, dict[str, Any]]
    inputs_sha256: dict[str, str]
    versions: dict[str, str]
    failed: list[str] = field(default_factory=list)
    mixed: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    in_graph: dict[str, Any] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    schema: int = 1

    @property
    def verified(self) -> list[str]:
        """What `verify` runs: each dtype that every component has, and those that a user mixed."""
        return [*self.dtypes, *([MIXED] if self.mixed else [])]

    def usable(self) -> list[str]:
        """The dtypes that did not fail."""
        return [dtype for dtype in self.dtypes if dtype not in self.failed]


def complete_dtypes(graphs: Sequence[GraphFile], components: Sequence[str]) -> list[str]:
    """The dtypes that every component has, in the order in which they were written."""
    found: dict[str, set[str]] = {}
    for graph in graphs:
        found.setdefault(graph.dtype, set()).add(graph.component)
    return [dtype for dtype, having in found.items() if having >= set(components)]


def load_manifest(repo: Path) -> Manifest:
    """Read `export.json`.

    Raises:
        InputError: nothing was exported yet, or as of `load_document`.
    """
    if own_file(repo, MANIFEST) is None:
        if (repo / ONNX).is_dir():
            raise InputError(f"{repo / MANIFEST}: missing, so this is no repo of vlm-export's: run `{command('onnx')}`")
        raise InputError(f"{repo}: nothing exported yet: run `{command('onnx')}`")
    again = f"run `{command('onnx')}`"
    manifest = load_document(repo / MANIFEST, Manifest, again)
    for place, graph in enumerate(manifest.graphs):
        if (graph.component == SINGLE_GRAPH) != (manifest.layout == "single"):
            raise InputError(
                f"{repo / MANIFEST}: graphs.{place}.component: {shown(graph.component)} is none of layout "
                f"{manifest.layout}'s: {again}"
            )
    return manifest
