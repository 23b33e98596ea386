"""In how many captions of held-out scenes each dtype says what PyTorch says, token for token.

python benchmarks/captions.py                            # 300 scenes, every dtype, ONNX Runtime and Node
python benchmarks/captions.py --images 50 --dtype int8   # fewer
python benchmarks/captions.py --side 640 --dtype fp32 --work build/in-graph   # pictures that somebody must resize

The captioner is that of recipes/real-captioner, its graphs those that `make real` left in build/real-captioner. PyTorch
runs the checkpoint with its adapter attached by PEFT, greedily, in batches. Pictures have the size that the tower
takes, so that nothing resizes them, unless `--side` says so: then Pillow does it for PyTorch, and the client, or the
graph (`preprocess: graph`), for transformers.js. What was said is kept in captions.json of the work folder, and not
asked again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vlm_export.apps.load import load
from vlm_export.files import sha256, write_json
from vlm_export.manifest import ONNX, Manifest, load_manifest
from vlm_export.merging import merge
from vlm_export.preprocessing import image_processor_settings, load_tokenizer
from vlm_export.runtime.images import open_image
from vlm_export.runtime.options import Options
from vlm_export.verify.recording import eos_token_ids
from vlm_export.web import node_runtime
from vlm_export.web.captions import Item

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "real-captioner"))

import assemble
import scenes
from tower import IMAGE_SIZE

WORK = assemble.HERE.parents[1] / "build" / "real-captioner"
KEPT = "captions.json"
SCENES = assemble.HERE / "scenes.py"
BATCH = 20

Captions = list[list[int]]


def in_pytorch(paths: Sequence[Path]) -> Captions:
    """Greedy tokens of each picture, the end included."""
    checkpoint, model = merge.attach(assemble.checkpoint(), [])
    settings = image_processor_settings(checkpoint.path, checkpoint.family.image_processor(checkpoint.config), {})
    preprocessor = checkpoint.family.preprocessor(checkpoint.path, checkpoint.config, settings)
    reference = checkpoint.family.reference(model)
    end = eos_token_ids(checkpoint, load_tokenizer(checkpoint.path))
    found: Captions = []
    for start in range(0, len(paths), BATCH):
        inputs = [preprocessor.model_inputs(path, "") for path in paths[start : start + BATCH]]
        together = {name: torch.from_numpy(np.concatenate([one[name] for one in inputs])) for name in inputs[0]}
        with torch.inference_mode():
            made = reference.generate(
                together,
                do_sample=False,
                num_beams=1,
                eos_token_id=end,
                pad_token_id=end[0],
                max_new_tokens=assemble.MAX_NEW_TOKENS,
                return_dict_in_generate=True,
                output_scores=True,
            )
        found += [until(row, end) for row in made.sequences[:, -len(made.scores) :].tolist()]
    return found


def until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Up to the first end, without what pads a row of a batch."""
    place = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: place + 1]


def in_onnxruntime(repo: Path, paths: Sequence[Path], dtype: str) -> Captions:
    model = load(repo, dtype=dtype, backend="onnx")
    options = Options(max_new_tokens=assemble.MAX_NEW_TOKENS)
    return [list(model.generate([open_image(path)], None, options).token_ids) for path in paths]


def in_node(repo: Path, paths: Sequence[Path], dtype: str) -> Captions:
    items = [Item(path) for path in paths]
    options = {"max_new_tokens": assemble.MAX_NEW_TOKENS}
    made = node_runtime.caption(repo, layout="captioner", dtype=dtype, items=items, generation=options)
    return [list(caption.token_ids) for caption in made.captions]


RUNTIMES = {"ort": in_onnxruntime, "node": in_node}


def graphs_digest(repo: Path, manifest: Manifest, dtype: str) -> str:
    """Of a dtype's graphs: what other ones said is not what these say."""
    digests = [sha256(repo / ONNX / graph.file) for graph in manifest.graphs if graph.dtype == dtype]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="held-out scenes (300)")
    parser.add_argument("--dtype", action="append", help="repeats; every one that was exported")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="repeats; both")
    parser.add_argument("--side", type=int, default=IMAGE_SIZE, help="pixels of a picture's side (%(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="has the repo (build/real-captioner)")
    options = parser.parse_args()
    repo, kept_in = options.work / "repo", options.work / KEPT
    manifest = load_manifest(repo)
    dtypes = options.dtype or manifest.dtypes
    found = json.loads(kept_in.read_text()) if kept_in.is_file() else {}
    of = {**manifest.inputs_sha256, SCENES.name: sha256(SCENES), "side": str(options.side)}
    kept: dict[str, Captions] = found["said"] if found.get("of") == of else {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{seed:03}.png") for seed in range(options.images)]
        for seed, path in enumerate(paths):
            scenes.draw(scenes.held_out_scene(seed), options.side).save(path)
        wanted = {"pytorch": partial(in_pytorch, paths)} | {
            f"{name} {dtype} {graphs_digest(repo, manifest, dtype)}": partial(RUNTIMES[name], repo, paths, dtype)
            for dtype in dtypes
            for name in options.runtime or RUNTIMES
        }
        for name, ask in wanted.items():
            if len(kept.get(name, [])) < options.images:
                kept[name] = ask()
                write_json(kept_in, {"of": of, "said": kept})
    expected = kept["pytorch"][: options.images]
    tokenizer = load_tokenizer(repo)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    right = sum(text == scenes.held_out_scene(seed).caption for seed, text in enumerate(said))
    print(f"PyTorch: {right} of {options.images} captions exactly right ({right / options.images:.1%})")
    for name in list(wanted)[1:]:
        equal = sum(one == other for one, other in zip(kept[name], expected, strict=False))
        print(f"{name.rpartition(' ')[0]}: {equal} of {options.images} are PyTorch's ({equal / options.images:.1%})")


if __name__ == "__main__":
    main()
