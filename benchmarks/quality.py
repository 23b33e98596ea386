"""What each dtype of the captioner of real size costs in quality: its decoder beside PyTorch, token by token.

python benchmarks/quality.py                                   # every dtype, exported into a folder that goes away
python benchmarks/quality.py --dtype int8 --dtype q8           # these
python benchmarks/quality.py --work FOLDER                     # merged/ and repo/ of this work folder, as they are

The checkpoint is that of recipes/real-captioner without its adapter, which makes English improbable; merged and
exported in the captioner layout. The decoder gets the embeddings of a passage's first tokens in place of an image, then
one token after the other with its cache, whatever it would have said itself. Each distribution is compared with
PyTorch's in float32: Kullback-Leibler divergence in nats (softmax in float64), the best token, and the negative
log-likelihood of the passage's own next token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Row
from transformers import PreTrainedTokenizerFast

from vlm_export.dtypes import DTYPES
from vlm_export.files import Work
from vlm_export.manifest import ONNX, load_manifest
from vlm_export.merging import merge
from vlm_export.preprocessing import pixel_values
from vlm_export.runtime.drivers import Driver, choose_driver
from vlm_export.runtime.repo import SUFFIXES, open_repo
from vlm_export.runtime.sessions import Sessions
from vlm_export.verify.golden import GoldenFolder

PASSAGES = Path(__file__).with_name("passages.txt")
PREFIX = 8  # tokens whose embeddings stand for an image
DECODER = "decoder_model_merged"


@dataclass(frozen=True)
class Passage:
    """A text as PyTorch reads it.

    Attributes:
        prefix: what comes before it, `[1, rows, hidden] float32`.
        targets: its tokens, `[tokens] int64`.
        logits: what PyTorch expects in the place of each, `[tokens, vocabulary]`.
    """

    prefix: np.ndarray
    targets: np.ndarray
    logits: np.ndarray

    def first(self, tokens: int) -> Passage:
        """So many of its tokens."""
        return Passage(self.prefix, self.targets[:tokens], self.logits[:tokens])


@dataclass(frozen=True)
class Quality:
    """A decoder beside PyTorch, one value a token: divergence, whether the best is the same, both log-likelihoods."""

    divergence: np.ndarray
    same_best: np.ndarray
    log_likelihood: np.ndarray
    reference_log_likelihood: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.divergence)

    @property
    def kl(self) -> float:
        """The mean, in nats."""
        return float(self.divergence.mean())

    @property
    def worst_kl(self) -> float:
        return float(self.divergence.max())

    @property
    def top1(self) -> float:
        """The share of tokens at which the best is PyTorch's."""
        return float(self.same_best.mean())

    @property
    def nll(self) -> float:
        return float(-self.log_likelihood.mean())

    @property
    def reference_nll(self) -> float:
        return float(-self.reference_log_likelihood.mean())


def texts() -> list[str]:
    """The passages."""
    return [text.strip() for text in PASSAGES.read_text(encoding="utf-8").split("\n-----\n")]


@torch.inference_mode()
def read_passages(merged: Path, tokens: int | None = None) -> list[Passage]:
    """The passages as the merged checkpoint in PyTorch reads them; `tokens` is how many of each, if not all."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(merged)
    _, model = merge.attach(merged, [])
    model.eval()
    return [_read(model, np.array(tokenizer(text)["input_ids"][:tokens])) for text in texts()]


def _read(model: Any, ids: np.ndarray) -> Passage:
    return _after(model, model.get_input_embeddings()(torch.from_numpy(ids[None, :PREFIX])), ids[PREFIX:])


@torch.inference_mode()
def read_captions(merged: Path, recorded: GoldenFolder) -> list[Passage]:
    """Golden captions with the end token, behind the prefix that PyTorch makes of their pictures."""
    _, model = merge.attach(merged, [])
    model.eval()
    found = []
    for path, image in zip(recorded.image_paths(), recorded.facts.images, strict=True):
        pixels = torch.from_numpy(pixel_values([path], recorded.facts.image_processor))
        found.append(_after(model, model.image_features(pixels), np.array(image.token_ids)))
    return found


def _after(model: Any, prefix: torch.Tensor, targets: np.ndarray) -> Passage:
    text = model.get_input_embeddings()(torch.from_numpy(targets[None, :-1]))
    logits = model.language_model(inputs_embeds=torch.cat([prefix, text], dim=1)).logits
    return Passage(prefix.numpy(), targets, logits[0, prefix.shape[1] - 1 :].numpy())


def measure(repo: Path, dtype: str, passages: Sequence[Passage], threads: int = 0) -> Quality:
    """The decoder of one dtype, on the passages."""
    opened = open_repo(repo)
    driver = choose_driver(opened.files).on(Sessions(repo / ONNX, SUFFIXES[dtype], threads))
    parts = [_compare(np.stack(list(_logits(driver, passage))), passage) for passage in passages]
    return Quality(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _logits(driver: Driver, passage: Passage) -> Iterator[np.ndarray]:
    """`[vocabulary]` after the prefix, and after each token that follows it but the last."""
    run = driver.prefill({"image_features": passage.prefix, "input_ids": np.empty((1, 0), np.int64)})
    yield run.logits[0, -1]
    for token in passage.targets[:-1]:
        run = driver.step(np.array([[token]]), run.cache, {"image_features": passage.prefix})
        yield run.logits[0, -1]


def _compare(logits: np.ndarray, passage: Passage) -> tuple[np.ndarray, ...]:
    """What `Quality` has, of one passage."""
    found, reference = _log_softmax(logits), _log_softmax(passage.logits)
    places = np.arange(len(found)), passage.targets
    divergence = (np.exp(reference) * (reference - found)).sum(axis=-1)
    same_best = found.argmax(axis=-1) == reference.argmax(axis=-1)
    return divergence, same_best, found[places], reference[places]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def decoder_mb(repo: Path, dtype: str) -> float:
    """Size of the decoder's files."""
    name = f"{DECODER}{SUFFIXES[dtype]}.onnx"
    return sum(file.stat().st_size for file in (repo / ONNX).glob(f"{name}*")) / 1e6


def row(repo: Path, dtype: str, quality: Quality) -> Row:
    """One line of the table."""
    return {
        "dtype": dtype,
        "decoder MB": decoder_mb(repo, dtype),
        "KL, nats": f"{quality.kl:.2g}",
        "worst token": f"{quality.worst_kl:.2g}",
        "top-1": f"{quality.top1:.1%}",
        "NLL": f"{quality.nll:.4f}",
        "PyTorch's NLL": f"{quality.reference_nll:.4f}",
        "tokens": quality.tokens,
    }


def compare(work: Work, dtypes: Sequence[str], tokens: int | None) -> list[Row]:
    """A line for each dtype, or for every one that the repo has."""
    passages = read_passages(work.merged, tokens)
    found = []
    for dtype in dtypes or load_manifest(work.repo).dtypes:
        harness.progress(f"reading in {dtype}")
        found.append(row(work.repo, dtype, measure(work.repo, dtype, passages)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="repeats (all)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="what was merged and exported before")
    parser.add_argument("--tokens", type=int, help="of each passage (all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what is exported here, for the next run")
    options = parser.parse_args()
    if options.work:
        rows = compare(Work(options.work), options.dtype, options.tokens)
    else:
        with harness.workspace(options.keep) as folder:
            rows = compare(harness.real_repo(folder, options.dtype, adapter=False), options.dtype, options.tokens)
    harness.report("quality", rows, prefix=PREFIX)


if __name__ == "__main__":
    main()
