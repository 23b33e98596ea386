"""The whole conversion of the bundled captioner, from LoRA checkpoint to captions made by stock transformers.js.

Runs the four commands as a user types them. The Hub that `push` uploads to is the tests' one, on the loopback
interface, so the demo needs neither an account nor a network; transformers.js then loads the repo from that server.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import TOKEN, HubServer  # noqa: E402

from vlm_export.recipe import find_recipe  # noqa: E402
from vlm_export.verify.golden import load_golden  # noqa: E402
from vlm_export.web import node_runtime  # noqa: E402
from vlm_export.web.captions import Item  # noqa: E402

REPO_ID = "acme/shapes-captioner"
COMMANDS = (
    "vlm-export merge",
    "vlm-export onnx --quantize int8",
    "vlm-export verify",
    f"vlm-export push {REPO_ID}",
)


def main() -> None:
    """Run the commands, then caption the golden images from the pushed repo and compare with PyTorch."""
    with tempfile.TemporaryDirectory(prefix="vlm-export-demo-") as folder, HubServer(Path(folder, "hub")) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(Path(folder, "home")),
        }
        for command in COMMANDS:
            print(f"\n$ {command}", flush=True)
            subprocess.run(shlex.split(command), env=environment, check=True)
        print(f"\nCaptions by stock transformers.js, which loads {REPO_ID} from the Hub at {hub.url}:\n", flush=True)
        sys.exit(0 if caption(hub.url) else 1)


def caption(url: str) -> bool:
    """Print each golden image's caption. Returns whether all are PyTorch's."""
    recipe = find_recipe("shapes-captioner")
    golden = load_golden(recipe.golden_dir)
    result = node_runtime.caption(
        node_runtime.RemoteModel(f"{url}/", REPO_ID),
        layout="captioner",
        dtype="int8",
        items=[Item(image=path) for path in golden.image_paths()],
        generation={},
    )
    equal = 0
    for image, made in zip(golden.facts.images, result.captions, strict=True):
        same = made.text == image.caption
        equal += same
        print(f"  {image.file}  {made.text}" + ("" if same else f"   (PyTorch: {image.caption})"))
    total = len(result.captions)
    print(f"\n{equal} of {total} captions from the int8 graphs and the image files are PyTorch's.")
    return equal == total


if __name__ == "__main__":
    main()
