"""What each dtype of the captioner of real size costs in quality: its decoder beside PyTorch, token by token.

python benchmarks/quality.py                                   # every dtype, exported into a folder that goes away
python benchmarks/quality.py --dtype int8 --dtype q8           # these
python benchmarks/quality.py --permuted                        # with weights that no file of 4 bits had in this order
python benchmarks/quality.py --work FOLDER                     # merged/ and repo/ of this work folder, as they are

The checkpoint is that of recipes/real-captioner without its adapter, which makes English improbable; merged and
exported in the captioner layout. The decoder gets the embeddings of a passage's first tokens in place of an image, then
one token after the other with its cache, whatever it would have said itself. Each distribution is compared with
PyTorch's in float32: Kullback-Leibler divergence in nats (softmax in float64), the best token, and the negative
log-likelihood of the passage's own next token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
SAME_KL = 1e-9  # nats: what another order of float32 sums may do at a token
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
    model: Any
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
    return compared(partial(_logits, driver), passages)


def compared(read: Callable[[Passage], Iterable[np.ndarray]], passages: Sequence[Passage]) -> Quality:
    """What `read` expects in the place of each token, `[vocabulary]` each, beside what PyTorch does."""
    parts = [_compare(np.stack(list(read(passage))), passage) for passage in passages]
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


def row(name: str, size_mb: float, quality: Quality) -> Row:
    """One line of the table."""
    return {
        "decoder": name,
        "MB": size_mb,
        "KL, nats": f"{quality.kl:.2g}",
        "worst token": f"{quality.worst_kl:.2g}",
        "top-1": f"{quality.top1:.1%}",
        "NLL": f"{quality.nll:.4f}",
        "PyTorch's NLL": f"{quality.reference_nll:.4f}",
        "tokens": quality.tokens,
    }


def read_permuted(work: Work, permuted: Work, tokens: int | None = None) -> list[Passage]:
    """The passages as the permuted checkpoint reads them, after a look whether it reads them as the other does.

    Raises:
        ValueError: it does not.
    """
    found = read_passages(permuted.merged, tokens)
    same = [_compare(new.logits, old) for new, old in zip(found, read_passages(work.merged, tokens), strict=True)]
    worst = max(float(np.abs(divergence).max()) for divergence, *_ in same)
    if worst > SAME_KL:
        raise ValueError(f"{permuted.merged}: KL {worst:.2g} from {work.merged} at a token: not the same function")
    harness.progress(f"permuted: at most {worst:.2g} nats from the checkpoint at a token")
    return found


def compare(work: Work, passages: Sequence[Passage], dtypes: Sequence[str]) -> list[Row]:
    """A line for each dtype, or for every one that the repo has."""
    found = []
    for dtype in dtypes or load_manifest(work.repo).dtypes:
        harness.progress(f"reading in {dtype}")
        found.append(row(dtype, decoder_mb(work.repo, dtype), measure(work.repo, dtype, passages)))
    return found


def _passages(folder: Path, work: Work, options: argparse.Namespace) -> list[Passage]:
    if not options.permuted:
        return read_passages(work.merged, options.tokens)
    return read_permuted(harness.real_captioner(folder, adapter=False)[1], work, options.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="repeats (all)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="what was merged and exported before")
    parser.add_argument("--tokens", type=int, help="of each passage (all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what is exported here, for the next run")
    parser.add_argument("--permuted", action="store_true", help="of a checkpoint whose weights lie in another order")
    options = parser.parse_args()
    if options.work and options.permuted:
        parser.error("--permuted makes a work folder of its own: leave out --work")
    if options.work:
        work = Work(options.work)
        rows = compare(work, read_passages(work.merged, options.tokens), options.dtype)
    else:
        with harness.workspace(options.keep) as folder:
            work = harness.real_repo(folder, options.dtype, adapter=False, permuted=options.permuted)
            rows = compare(work, _passages(folder, work, options), options.dtype)
    harness.report("quality", rows, prefix=PREFIX)


if __name__ == "__main__":
    main()
