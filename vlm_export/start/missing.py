"""What a recipe's later commands will not find on this machine, or beside its model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from vlm_export import hub
from vlm_export.errors import InputError
from vlm_export.start.draft import Draft, reference_for
from vlm_export.start.figures import size
from vlm_export.start.inspection import this_machine
from vlm_export.web import node_runtime

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Missing:
    """What a later command will not find, and what to do about it."""

    command: str
    problem: str


def missing(found: Draft) -> list[Missing]:
    """What each later command will not find, in the order of the commands."""
    return [*_for_golden(found), *_for_merge(found), *_for_onnx(found), *_for_verify(), *_for_push(found)]


def _for_golden(found: Draft) -> Iterator[Missing]:
    names = {name for source in found.sources for name in source.sizes_bytes}
    if not names.intersection(_TOKENIZERS):
        yield Missing("golden", f"no tokenizer beside the model: save it there, or set `tokenizer` ({_TOKENIZERS[0]})")
    if not names.intersection(_PROCESSORS) and found.model.model_type != "prefix_conditioning_vlm":
        yield Missing("golden", f"no {_PROCESSORS[0]} beside the model: save its processor there, or set `processor`")
    if found.prompt is not None and found.prompt.problem:
        yield Missing("golden", found.prompt.problem)
    if found.model.model_type == "fast_vlm" and find_spec("timm") is None:
        yield Missing("golden", "timm, which builds the tower: `pip install 'vlm-export[fastvlm]'`")
    if not found.pictures.count:
        yield Missing("golden", "your own pictures (--images): 16 or more say more than 4 bundled photographs")


def _for_merge(found: Draft) -> Iterator[Missing]:
    if found.model.quantized:
        yield Missing("merge", f"plain weights: these are of {found.model.quantized}; `model` is better the original")
    model = reference_for(found.model.named, found.wishes.path).rpartition("/")[2]
    for adapter in found.adapters:
        base = adapter.base_model
        if base and base.rstrip("/").rpartition("/")[2] != model:
            yield Missing("merge", f"certainty: {adapter.named.reference} was trained on {base}; is that this model?")


def _for_onnx(found: Draft) -> Iterator[Missing]:
    expected, machine = found.model.expected(found.layout, found.wanted), this_machine()
    if expected is None:
        return
    disk = expected.disk_bytes + found.model.merged_bytes
    if disk > machine.disk_bytes:
        yield Missing(
            "onnx", f"disk: it takes {size(disk)}, and {size(machine.disk_bytes)} are free; --work is elsewhere"
        )
    if expected.memory_bytes > machine.memory_bytes:
        yield Missing("onnx", f"memory: {size(expected.memory_bytes)}, and {size(machine.memory_bytes)} are free")


def _for_verify() -> Iterator[Missing]:
    try:
        node_runtime.find_node()
    except InputError as error:
        yield Missing("verify", str(error))


def _for_push(found: Draft) -> Iterator[Missing]:
    if found.license is None:
        yield Missing("push", "a licence: no card names one; set hub.license, or --license")
    if not found.card.base_model:
        yield Missing("push", "what the model was made of: set hub.base_model to a Hub id")
    if not hub.has_token():
        yield Missing("push", f"a Hugging Face token: {hub.LOGIN}")
