"""`trust_remote_code`: a repo's own classes, from the commit that the recipe pins, and no code otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pico_chat
import pytest
import yaml
from exported import TOLERANCES, Exported, silent, write_images
from hub_server import TOKEN, HubServer, configure
from huggingface_hub import close_session
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    dynamic_module_utils,
)

from vlm_export import pipeline
from vlm_export.apps.exported_repo import open_model
from vlm_export.errors import InputError
from vlm_export.files import Work
from vlm_export.hub import push_folder
from vlm_export.measure.bench import bench
from vlm_export.recipe import load_recipe
from vlm_export.runtime.images import open_image
from vlm_export.runtime.options import Options

REPO = "tester/odd"
# A llava whose features are twice as large, in a file that says when it is run.
CODE = """
from pathlib import Path
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

Path({marker!r}).write_text("run")

class OddConfig(LlavaConfig):
    model_type = "odd_llava"

class Twice(LlavaMultiModalProjector):
    def forward(self, image_features):
        return 2 * super().forward(image_features)

class OddLlava(LlavaForConditionalGeneration):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.multi_modal_projector = Twice(config)
"""
AUTO_MAP = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForImageTextToText": "modeling_odd.OddLlava"}


class Repo:
    """A repo of the local Hub with a model and its code, and a recipe for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.marker = folder / "marker"
        self.checkpoint = pico_chat.write_llava(folder / "checkpoint")
        pico_chat.write_adapter(folder / "adapter", self.checkpoint)
        state = AutoModelForImageTextToText.from_pretrained(self.checkpoint).state_dict()
        save_file(state, self.checkpoint / "model.safetensors")  # a class of its own is saved under its own names
        write_images(folder / "images")
        (self.checkpoint / "modeling_odd.py").write_text(CODE.format(marker=str(self.marker)))
        self.commit = self.change()

    def change(self, **values: Any) -> str:
        config = json.loads((self.checkpoint / "config.json").read_text())
        config |= {"model_type": "odd_llava", "auto_map": AUTO_MAP} | values
        (self.checkpoint / "config.json").write_text(json.dumps(config))
        commit = push_folder(REPO, self.checkpoint, message="change").commit
        assert commit is not None
        return commit

    def recipe(self, **values: Any) -> Exported:
        settings = {
            "name": "odd",
            "model": REPO,
            "revision": self.commit,
            "adapters": [{"path": "adapter"}],
            "layout": "chat",
            "generation": {"max_new_tokens": 4},
            "golden": {"images": ["images/*.png"], "prompts": ["<image>a cat", "<image>b"]},
            "tolerances": TOLERANCES,
        }
        path = self.folder / "odd.yaml"
        path.write_text(yaml.safe_dump(settings | values))
        return Exported(load_recipe(path), Work(self.folder / "work"))

    def merge(self, **values: Any) -> Exported:
        made = self.recipe(**values)
        pipeline.run_merge(made.recipe, made.work, silent)
        return made


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repo]:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with HubServer(tmp_path / "hub") as server:
        configure(monkeypatch, server.url, tmp_path / "home", TOKEN)
        yield Repo(tmp_path)
        close_session()
    CONFIG_MAPPING._extra_content.clear()
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._extra_content.clear()


def test_a_model_of_its_own_code(repo: Repo, own_graph_cache: Path) -> None:
    made = repo.recipe(trust_remote_code=True)
    pipeline.run_golden(made.recipe, silent)
    assert repo.marker.read_text() == "run"
    pipeline.run_merge(made.recipe, made.work, silent)
    made.export("chat")
    assert not own_graph_cache.exists(), "code that no key knows was traced and kept"
    config = json.loads((made.work.repo / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert "auto_map" not in config
    report = made.verify("ort")
    assert report.verdict == "pass", report.failures
    [image, *_] = sorted((repo.folder / "golden" / "odd" / "images").iterdir())
    measured = bench(made.work.repo, [image], runtimes=("ort",), dtypes=("fp32",), new_tokens=2, rounds=1)
    assert "tok/s" in pipeline.run_card(made.recipe, made.work, asdict(measured)).read_text()
    assert "odd_llava" not in CONFIG_MAPPING, "what a stage registered for itself is gone with it"
    lines: list[str] = []
    model = open_model(str(made.recipe.path), made.work.root, backend="torch", notify=lines.append)
    assert lines == [f"warning: trust_remote_code: runs code of {REPO}@{repo.commit}"]
    said = [
        each.generate([open_image(image)], "What is it?", Options()).token_ids
        for each in (model, open_model(str(made.recipe.path), made.work.root, backend="onnx", dtype="fp32"))
    ]
    assert said[0] == said[1]
    # Without the code the same weights are another model.
    golden = load_file(repo.folder / "golden" / "odd" / "golden.safetensors")
    plain = json.loads((repo.checkpoint / "config.json").read_text()) | {"model_type": "llava"}
    del plain["auto_map"]
    (repo.checkpoint / "config.json").write_text(json.dumps(plain))
    made = repo.recipe(model="checkpoint", revision=None)
    pipeline.run_golden(made.recipe, silent)
    other = load_file(repo.folder / "golden" / "odd" / "golden.safetensors")
    ratio = golden["case0/image_features"] / other["case0/image_features"]
    assert (ratio - 2).abs().max() < 1e-4


@pytest.mark.parametrize("values", [{}, {"trust_remote_code": False}])
def test_no_code_without_the_key(values: dict[str, Any], repo: Repo) -> None:
    with pytest.raises(
        InputError, match=r"model_type 'odd_llava' is not supported; .*auto_map names is run with `trust_remote_code"
    ):
        repo.merge(**values)
    repo.merge(**values, revision=repo.change(model_type="llava"))  # the library's class, whatever auto_map says
    assert not repo.marker.exists()


def test_the_commit_is_pinned(repo: Repo) -> None:
    for revision in (None, "main", repo.commit[:12], repo.commit + "0"):
        with pytest.raises(
            InputError,
            match=rf"odd\.yaml: trust_remote_code: runs code of {REPO}; pin it: `revision` must be a commit",
        ):
            repo.recipe(trust_remote_code=True, revision=revision)
    later = repo.commit
    (repo.checkpoint / "modeling_odd.py").write_text("raise RuntimeError('newer code')")
    assert repo.change() != later
    repo.merge(trust_remote_code=True)
    assert repo.marker.exists()


def test_a_local_folder_has_no_commit(repo: Repo) -> None:
    with pytest.raises(InputError, match=r"odd\.yaml: trust_remote_code: checkpoint is a local folder, whose code no"):
        repo.merge(trust_remote_code=True, model="checkpoint")
    assert not repo.marker.exists()


def test_adapters_have_no_such_key(repo: Repo) -> None:
    with pytest.raises(InputError, match=r"adapters\.0\.trust_remote_code: unknown key"):
        repo.recipe(adapters=[{"path": "adapter", "trust_remote_code": True}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {}}, "config.json: auto_map names no AutoConfig; remove trust_remote_code"),
        ({"auto_map": AUTO_MAP | {"AutoConfig": "tester/other--modeling_odd.OddConfig"}}, "is not code of this repo"),
        ({"auto_map": AUTO_MAP | {"AutoConfig": "../modeling_odd.OddConfig"}}, "is not code of this repo"),
        ({"auto_map": AUTO_MAP | {"AutoConfig": "modeling_odd.Nothing"}}, "modeling_odd.Nothing cannot be imported: "),
        ({"auto_map": AUTO_MAP | {"AutoConfig": "modeling_odd.Path"}}, "auto_map: Path derives from no family's"),
    ],
)
def test_code_that_cannot_be_used(changes: dict[str, Any], message: str, repo: Repo) -> None:
    commit = repo.change(**changes)
    with pytest.raises(InputError, match=f"{REPO}@{commit}: .*{message}"):
        repo.merge(trust_remote_code=True, revision=commit)
