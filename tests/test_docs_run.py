"""Every block of code of README.md and docs/ is run as it stands, on a small captioner in a folder like the pages' own.

Commands run in this process, each block from the state that its page supposes; a state that blocks share is made once.
The Hub is one of this machine, and has a captioner, a chat model or a checkpoint by the name that the page uses. What
cannot run stands in `NOT_RUN` with the reason; a block that is neither run nor there fails.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pico
import pico_chat
import pico_florence
import pytest
import yaml
from click.testing import CliRunner, Result
from documented import DOCS, ROOT, Snippet, prose_and_code
from elsewhere import CDN, IN_NODE, IN_PAGE, cdn
from exported import record
from hub_server import TOKEN, HubServer, configure
from huggingface_hub import close_session
from PIL import Image

from vlm_export import hub
from vlm_export.cli import main
from vlm_export.files import read_json
from vlm_export.publish.addresses import HUB
from vlm_export.recipe import find_recipe, load_recipe
from vlm_export.verify.golden import load_golden
from vlm_export.web import chromium, node_runtime
from vlm_export.web.site_server import ISOLATION, SiteServer, files_under

BLOCKS = [block for page in (ROOT / "README.md", *DOCS) for block in prose_and_code(page)[1]]
GOLDEN = ROOT / "golden" / "shapes-captioner" / "images"
BINARIES = Path(sys.executable).parent
PICTURES = [f"0{number}.png" for number in range(2)]
CARD = "---\nlicense: mit\n---\n"
RECIPE: dict[str, Any] = {
    "name": "my-captioner",
    "model": "./runs/my-captioner",
    "dtypes": ["fp32", "q8"],
    "golden": {"images": ["photos/*.png"]},
    "hub": {"license": "mit"},
}
SWEEP = {"name": "captioners", "recipes": ["my-captioner.yaml"], "adapters": ["runs/my-lora"], "dtypes": ["q8"]}

# What begins so is not run, and why.
NOT_RUN = {
    "git clone …": "the tests run in a clone",
    "pip install .": "test_wheel.py installs the package into an environment of its own",
    "apt-get install": "installs programs for the whole machine",
    "brew install": "installs programs for the whole machine",
    "winget install": "installs programs for the whole machine",
    "py -3.11": "runs on Windows alone",
    "make demo": "installs; what it does then test_cli.py does, in four commands",
    "make test": "these tests themselves",
    "make check": "what CI runs beside the tests",
    "vlm-export verify --runtime webgpu": "a minute without a graphics card; test_browser.py verifies there",
    "pytest": "these tests themselves",
    "python scripts/families.py": "writes a page; test_families.py compares it",
    "Recipe →": "a drawing",
    "decoder_model_merged in q8: first wrong": "what a command prints",
    "max_tokens, ": "names of parameters; test_serve.py has them",
    "client = openai": "has dots for a picture; test_the_client_that_help_shows fills them in",
    "name: llava-1.5-7b": "7 B parameters; read below",
    "Component(": "a part of a file of a family; test_docs.py looks for its names",
    '"llava_onevision, ': "a part of a test",
    '"llava": Base(': "a part of a test",
    "python benchmarks/kills.py": "an hour; test_kills.py kills at a few places",
    "python scripts/reliability/pushes.py": "minutes; test_hub_faults.py pushes a few times",
    "python scripts/reliability/mutations.py": "hours; tests/bad/test_mutations.py has the first of another seed",
    "build/captioners/index.html": "names of files",
    "a small yellow triangle": "what a program prints",
    "g++ -std=c++17": "test_single.py builds and runs it",
    "pip install 'vlm-export[sweep": "the tests have it, or do without",
    "ray start ": "starts servers on three machines; test_sweep.py has a cluster on one",
    "vlm-export sweep /shared/": "the same",
    "vlm-export sweep captioners.yaml --address": "the same",
    "- uses: actions/cache": "a part of a workflow of GitHub",
}
# Runs elsewhere as it stands: its page, what it begins with, and the test.
ELSEWHERE = {
    ("quick-start.md", "$ vlm-export"): ("test_quick_start.py", "test_the_commands_print_what_the_page_shows"),
    ("server.md", "import base64"): ("test_serve_page.py", "test_the_example_of_the_docs_runs"),
    ("single.md", "session = "): ("test_single.py", "test_the_example_in_python"),
    ("single.md", "const image = "): ("test_single.py", "test_the_example_in_node"),
    ("single.md", "Ort::Session session"): ("test_single.py", "test_the_example_in_cpp"),
}
# A line of usage: click's own, compared by test_docs_snippets.py.
USAGE = re.compile(r"vlm-export .*(\[(OPTIONS|ARGS|COMMAND)\]|REPO_ID)")
SHELL = re.compile(r"vlm-export |echo |_VLM_EXPORT|curl ")
CHANGES = ("init", "convert", "golden", "merge", "onnx", "verify", "push", "bench", "sweep")
SERVES = ("vlm-export serve", "vlm-export demo")
# What is added to a line so that it is done soon, takes a free port and opens no window.
ADDED = {
    "bench": "--rounds 1 --new-tokens 4",
    "serve": "--port 0",
    "demo": "--port 0 --no-open",
    "sweep": "--in-process",
}
FEWER = {  # where a line does not name one
    "--dtype": lambda command, line: command == "bench" or "wasm" in line,
    "--runtime": lambda command, line: command in ("bench", "convert"),
}
IN_WASM = "vlm-export verify --runtime ort --runtime node --runtime wasm --dtype q8"
TYPED = {"vlm-export chat": "hello\n/quit\n", "vlm-export cache clean": "y\n"}
CHECKPOINTS = ("vlm-export convert org/", "vlm-export init org/", "vlm-export inspect HuggingFaceTB/")
CHATS = ("vlm-export chat org/", "vlm-export run org/model photo.jpg --prompt")


def lines(block: Snippet) -> list[str]:
    """The commands of a block, without comments."""
    text = block.text.replace("<name>", "my-captioner.yaml")
    return [command for line in text.splitlines() if (command := re.sub(r"\s+#.*", "", line.strip()))]


def is_shell(block: Snippet) -> bool:
    return block.language in ("", "text", "sh") and bool(SHELL.match(block.text)) and not USAGE.match(block.text)


def why_not(text: str) -> str:
    """The reason in `NOT_RUN`, or nothing."""
    return next((reason for start, reason in NOT_RUN.items() if text.strip().startswith(start)), "")


def elsewhere(block: Snippet) -> tuple[str, str] | None:
    return next(
        (test for (page, start), test in ELSEWHERE.items() if block.page.name == page and block.text.startswith(start)),
        None,
    )


def starts(line: str, table: Any) -> bool:
    return line.startswith(tuple(table))


COMMANDS = [block for block in BLOCKS if is_shell(block)]
INSTALLS = [  # and goes on with commands
    block
    for block in BLOCKS
    if block not in COMMANDS
    and not USAGE.match(block.text)
    and why_not(block.text)
    and any(map(SHELL.match, lines(block)))
]
RECIPES = [block for block in BLOCKS if block.language == "yaml" and not why_not(block.text)]
SCRIPTS = [block for block in BLOCKS if block.language == "js" and not elsewhere(block)]
PROGRAMS = [block for block in BLOCKS if block.language == "python" and not elsewhere(block)]


@dataclass
class Places:
    """Folders as the commands of a page leave them, each made once, and what the Hub has.

    Attributes:
        root: where they are.
        hubs: by what their `org/model` is.
        made: by the commands that were run in them.
    """

    root: Path
    hubs: Mapping[str, HubServer]
    made: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def after(self, block: Snippet) -> None:
        """Run a block's commands where its page supposes that they are run; a command's examples are each by itself."""
        together = [[line] for line in lines(block)] if block.page.name == "commands.md" else [lines(block)]
        for commands in together:
            self.run(commands, self.begin(commands))

    def begin(self, commands: list[str]) -> tuple[str, ...]:
        """Who begins with a checkpoint has no recipe yet; everybody else has one, and what was made by it."""
        first = next((line for line in commands if starts(line, ("vlm-export init", "vlm-export convert"))), "")
        if first and not first.endswith(".yaml"):
            return ("new",)
        if any("verify" in line and "wasm" in line for line in commands):  # looked at once for all
            self.run([IN_WASM], ("converted",))
            return ("converted", IN_WASM)
        return ("converted",)

    def run(self, commands: list[str], state: tuple[str, ...]) -> None:
        folder = self.made[state]
        for line in commands:
            if why_not(line):
                continue
            if line.split()[1] not in CHANGES:
                self.typed(line, folder)
                continue
            state = (*state, line)
            if state not in self.made:
                copy = Path(shutil.copytree(folder, tempfile.mkdtemp(dir=self.root), dirs_exist_ok=True))
                self.typed(line, copy)
                self.made[state] = copy
            folder = self.made[state]

    def typed(self, line: str, folder: Path) -> None:
        """Run one line, which has to end well."""
        kind = "checkpoint" if starts(line, CHECKPOINTS) else "chat" if starts(line, CHATS) else "captioner"
        with self.at(kind, folder) as patch:
            if starts(line, SERVES) and "--export" not in line:
                answers(line)
            elif line.startswith("vlm-export"):
                done = in_this_process(line, next((TYPED[each] for each in TYPED if line.startswith(each)), None))
                assert done.exit_code == 0, f"{line}: {done.stderr}{done.stdout}"
            elif line.startswith("curl "):
                self.piped(line, folder)
            else:
                patch.setenv("HOME", str(folder))
                patch.setenv("PATH", f"{BINARIES}:/usr/bin:/bin")
                (folder / ".config" / "fish" / "completions").mkdir(parents=True, exist_ok=True)
                subprocess.run(["bash", "-c", line], check=True)

    def piped(self, line: str, folder: Path) -> None:
        """What curl fetches is the picture itself."""
        curl, _, line = line.partition(" | ")
        assert re.fullmatch(r"curl -s https://example.org/photo.jpg", curl)
        done = in_this_process(line, (folder / "photo.jpg").read_bytes())
        assert (done.exit_code, done.stdout.strip()) == (0, caption()), done.stderr

    @contextlib.contextmanager
    def at(self, kind: str, folder: Path) -> Iterator[pytest.MonkeyPatch]:
        """In a folder, with the Hub of a kind, and a cache that may be deleted."""
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
            configure(patch, self.hubs[kind].url, self.root / f"home of {kind}", TOKEN)
            yield patch
            close_session()  # whose connections are to this Hub


def in_this_process(line: str, typed: str | bytes | None = None) -> Result:
    program, *arguments = shlex.split(line)
    assert program == "vlm-export"
    more = shlex.split(ADDED.get(arguments[0], ""))
    for option, value in (("--dtype", "q8"), ("--runtime", "ort")):
        if option not in arguments and FEWER[option](arguments[0], arguments):
            more += [option, value]
    with pytest.MonkeyPatch.context() as patch:
        if arguments[0] == "cache":
            patch.setenv("VLM_EXPORT_CACHE", "cache")
            patch.setenv("VLM_EXPORT_STRUCTURES", "cache/structures")
            Path("cache/structures").mkdir(parents=True, exist_ok=True)
        return CliRunner().invoke(main, [*arguments, *more], input=typed)


def answers(line: str) -> None:
    """A server says where it is, answers there, and ends when it is interrupted."""
    with started(line) as address, urlopen(address) as answer:
        assert answer.status == 200


@contextlib.contextmanager
def started(line: str) -> Iterator[str]:
    """A server's address, while it runs."""
    _, *arguments = shlex.split(line)
    command = [sys.executable, "-m", "vlm_export", *arguments, *ADDED[arguments[0]].split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert found, said + process.communicate()[1]
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def caption() -> str:
    """What the captioner says of photo.jpg."""
    recorded = load_golden(ROOT / "golden" / "shapes-captioner")
    return next(image.caption for image in recorded.facts.images if image.file == PICTURES[0])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    root = tmp_path_factory.mktemp("places")
    chat = _chat_model(root / "chat")
    with contextlib.ExitStack() as stack:
        stack.callback(close_session)
        names = ("checkpoint", "captioner", "chat")
        owners = ("tester", "org", "you", "HuggingFaceTB")
        hubs = {name: stack.enter_context(HubServer(root / f"hub of {name}", namespaces=owners)) for name in names}
        found = Places(root, hubs)
        found.made[("new",)] = new = _begun(root / "new")
        converted = Path(shutil.copytree(new, root / "converted"))
        for name in ("vlm-export.yaml", "my-captioner.yaml"):
            (converted / name).write_text(yaml.safe_dump(RECIPE))
        (converted / "captioners.yaml").write_text(yaml.safe_dump(SWEEP))
        with found.at("captioner", converted):
            for line in ("golden", "merge", "onnx", "verify"):
                done = CliRunner().invoke(main, line.split())
                assert done.exit_code == 0, f"{line}: {done.stderr}{done.stdout}"
            repo = converted / "build" / "my-captioner" / "repo"
            hub.push_folder("org/model", repo, message="the captioner")
            hub.push_folder("you/my-captioner", repo, message="the captioner")
        shutil.copytree(repo, converted / "path" / "to" / "repo")
        shutil.copytree(chat / "repo", converted / "build" / "my-chat-model" / "repo")
        shutil.copytree(chat.parent / "checkpoint", converted / "runs" / "my-model")
        pico_florence.write_checkpoint(converted / "runs" / "my-florence")
        found.made[("converted",)] = converted
        plain = Path(shutil.copytree(converted / "build" / "my-captioner" / "merged", root / "plain"))
        (plain / "README.md").write_text(CARD)
        pico.write_peft_adapter(new / "runs" / "lora", read_json(plain / "config.json"), lora_alpha=0.1)
        shutil.copytree(new / "runs" / "lora", new / "runs" / "my-lora")
        shutil.copytree(new / "runs" / "lora", converted / "runs" / "my-lora")
        with found.at("checkpoint", converted):
            for name in ("org/model", "org/base"):
                hub.push_folder(name, plain, message="the base")
            small = pico_chat.write_tiled(root / "smolvlm")
            hub.push_folder("HuggingFaceTB/SmolVLM-256M-Instruct", small, message="stand-in")
        with found.at("chat", converted):
            hub.push_folder("org/model", chat / "repo", message="the chat model")
        yield found


def _begun(folder: Path) -> Path:
    """What a user has: a fine-tuned captioner, pictures, and one picture more."""
    checkpoint = Path(
        shutil.copytree(ROOT / "recipes" / "shapes-captioner" / "checkpoint", folder / "runs/my-captioner")
    )
    (checkpoint / "README.md").write_text(CARD)
    (folder / "photos").mkdir()
    for name in PICTURES:
        shutil.copy(GOLDEN / name, folder / "photos")
    shutil.copy(GOLDEN / PICTURES[0], folder / "photo.jpg")
    return folder


def _chat_model(folder: Path) -> Path:
    """The work folder of an exported chat model of random weights, its checkpoint beside it."""
    pico_chat.write_llava(folder / "checkpoint")
    made = record(folder, layout="chat", golden={"images": ["images/*.png"], "prompts": ["<image> a cat"]})
    made.export("chat", ["fp32"])
    return made.work.root


def test_every_block_is_run_or_says_why_not() -> None:
    run = [*COMMANDS, *INSTALLS, *RECIPES, *SCRIPTS, *PROGRAMS]
    others = [block for block in BLOCKS if block not in run and not USAGE.match(block.text)]
    assert [str(block) for block in others if not elsewhere(block) and not why_not(block.text)] == []
    typed = [line for block in (*COMMANDS, *INSTALLS) for line in lines(block)]
    assert [line for line in typed if not SHELL.match(line) and not why_not(line)] == []


def test_no_reason_is_left_over() -> None:
    texts = [text.strip() for block in BLOCKS for text in (block.text, *block.text.splitlines())]
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)] == []
    for file, test in ELSEWHERE.values():
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


def case(block: Snippet) -> Any:
    marks = [pytest.mark.browser] if any("verify" in line and "wasm" in line for line in lines(block)) else []
    return pytest.param(block, marks=marks, id=str(block))


@pytest.mark.parametrize("block", [case(block) for block in (*COMMANDS, *INSTALLS)])
def test_commands(block: Snippet, places: Places) -> None:
    places.after(block)


def test_completion_is_there_in_a_new_shell(places: Places) -> None:
    """By each of the two ways that are shown for bash."""
    for block in (block for block in COMMANDS if "/.bashrc" in block.text):
        folder = Path(tempfile.mkdtemp(dir=places.root))
        for line in lines(block):
            places.typed(line, folder)
        environ = os.environ | {"HOME": str(folder), "PATH": f"{BINARIES}:/usr/bin:/bin"}
        shown = ["bash", "-ic", "complete -p vlm-export"]
        done = subprocess.run(shown, env=environ, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        assert done.stdout == "complete -o nosort -F _vlm_export_completion vlm-export\n"


def part_of(recipe: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A recipe with what a block says, in the sections that it names."""
    said = yaml.safe_load(text.replace("…", "{{ message['role'] }}: <image>{% endfor %}"))
    return {
        **recipe,
        **{key: {**recipe.get(key, {}), **of} if isinstance(of, dict) else of for key, of in said.items()},
    }


CHAT = {
    "name": "my-chat-model",
    "model": "./runs/my-model",
    "layout": "chat",
    "dtypes": ["fp32"],
    "golden": {"images": ["photos/*.png"], "prompts": ["<image> a cat"]},
    "generation": {"max_new_tokens": 4},
    "hub": {"license": "mit"},
}
TASKS = {**CHAT, "model": "./runs/my-florence"}
# By a key of the block: the recipe that it is a part of, and the commands that heed it.
PARTS: dict[str, tuple[Mapping[str, Any], list[str]]] = {
    "layout: tasks": (TASKS, ["golden"]),
    "prompts:": (CHAT, ["golden"]),
    "tokenizer:": (CHAT, ["golden", "merge", "onnx"]),
    "preprocess:": (RECIPE, ["onnx"]),
    "language:": (RECIPE, ["onnx", "verify --runtime ort", "push org/model --dry-run"]),
    "layout: single": (RECIPE, ["golden", "onnx", "verify --runtime ort"]),
    "generation: from_checkpoint": (RECIPE, ["golden", "onnx"]),
}


@pytest.mark.parametrize("block", [block for block in RECIPES if "name:" not in block.text.split()], ids=str)
def test_parts_of_a_recipe(block: Snippet, places: Places) -> None:
    recipe, commands = next(PARTS[key] for key in PARTS if key in block.text)
    folder = Path(shutil.copytree(places.made["converted",], tempfile.mkdtemp(dir=places.root), dirs_exist_ok=True))
    shutil.copytree(folder / "runs" / "my-model", folder / "path" / "to" / "processor")
    (folder / "vlm-export.yaml").write_text(yaml.safe_dump(part_of(recipe, block.text)))
    for line in commands:
        places.typed(f"vlm-export {line}", folder)
    said = yaml.safe_load(block.text)
    if "hub" in said:
        card = (folder / "build" / "my-captioner" / "repo" / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---\n")[1])
        assert {key: front[key] for key in said["hub"] if key not in ("pictures", "tags")} == {
            key: value for key, value in said["hub"].items() if key not in ("pictures", "tags")
        }
        assert set(said["hub"]["tags"]) <= set(front["tags"])


def test_a_whole_recipe(places: Places) -> None:
    [block] = [block for block in RECIPES if "model:" in block.text.split() and "name:" in block.text.split()]
    folder = Path(shutil.copytree(places.made["new",], tempfile.mkdtemp(dir=places.root), dirs_exist_ok=True))
    (folder / "vlm-export.yaml").write_text(block.text)
    shutil.copytree(places.root / "plain", folder / "path" / "to" / "checkpoint")
    shutil.copytree(folder / "runs" / "lora", folder / "path" / "to" / "peft-adapter")
    for picture in sorted((folder / "photos").iterdir()):
        Image.open(picture).convert("RGB").save(picture.with_suffix(".jpg"))
    for line in ("golden", "merge", "onnx", "convert --dry-run"):
        places.typed(f"vlm-export {line}", folder)
    assert read_json(folder / "build" / "my-captioner" / "repo" / "export.json")["dtypes"] == ["fp32", "int8", "q8"]


def test_a_whole_sweep(places: Places) -> None:
    """Adapters of every way to name them, planned."""
    [block] = [block for block in RECIPES if "recipes:" in block.text.split()]
    folder = Path(shutil.copytree(places.made["converted",], tempfile.mkdtemp(dir=places.root), dirs_exist_ok=True))
    (folder / "captioners.yaml").write_text(block.text)
    (folder / "my-captioner.yaml").rename(folder / "captioner.yaml")
    for name in ("week-41", "customers/one", "customers/two", "week-42/final"):
        shutil.copytree(folder / "runs" / "my-lora", folder / "runs" / name)
    with places.at("captioner", folder):
        hub.push_folder("org/captioner-lora", folder / "runs" / "my-lora", message="an adapter")
    places.typed("vlm-export sweep captioners.yaml --dry-run", folder)


def test_the_recipe_of_a_new_family_is_the_bundled_one(tmp_path: Path) -> None:
    [block] = [block for block in BLOCKS if block.text.startswith("name: llava-1.5-7b")]
    (tmp_path / "recipe.yaml").write_text(block.text)
    shown, bundled = load_recipe(tmp_path / "recipe.yaml").recipe, find_recipe("llava-1.5-7b").recipe
    for key in ("name", "model", "model_type", "layout", "dtypes", "golden"):
        assert getattr(shown, key) == getattr(bundled, key), key


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_python(block: Snippet, places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    with places.at("captioner", places.made["converted",]):
        exec(compile(block.text, block.page.name, "exec"), {})
    said = capsys.readouterr().out
    assert said.strip() == caption() if "Conversation" not in block.text else said.strip()


def test_the_client_that_help_shows(places: Places) -> None:
    """What `...` stands for is filled in, and the model is the one of this folder."""
    [block] = [block for block in BLOCKS if block.text.startswith("client = openai.OpenAI")]
    picture = base64.b64encode((places.made["converted",] / "photo.jpg").read_bytes()).decode()
    with places.at("captioner", places.made["converted",]), started("vlm-export serve") as address:
        code = block.text.replace("...", picture).replace("http://127.0.0.1:8000/", address)
        code = code.replace("shapes-captioner", "my-captioner").replace("client.chat", "answer = client.chat", 1)
        names: dict[str, Any] = {"openai": openai}
        exec(compile(code, block.page.name, "exec"), names)
        names["client"].close()
    assert names["answer"].choices[0].message.content == caption()


def shown_by(block: Snippet) -> str:
    """The name that a block gives to what the model said."""
    return "captions[0].text" if "captions" in block.text else "generated_text"


@pytest.mark.node
def test_javascript_in_node(places: Places, tmp_path: Path) -> None:
    """All in one process; what runs in pages alone is below."""
    blocks = [block for block in SCRIPTS if "in a browser" not in block.text]
    (tmp_path / "node_modules").symlink_to(node_runtime.node_home() / "node_modules")
    (tmp_path / "hub.mjs").write_text(IN_NODE.format(there=HUB, here=places.hubs["captioner"].url))
    shutil.copy(places.made["new",] / "photo.jpg", tmp_path)
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.mjs").write_text(f"{block.text}\nconsole.log({shown_by(block)});\n")
    (tmp_path / "all.mjs").write_text("".join(f"await import('./{number}.mjs');\n" for number in range(len(blocks))))
    command = ["node", "--import", "./hub.mjs", "all.mjs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, [caption()] * len(blocks)), done.stderr


IMPORTS = {"@huggingface/transformers": "/transformers/transformers.min.js", "vlm-export": "/vlm-export/index.js"}


@pytest.mark.node
@pytest.mark.browser
def test_javascript_in_a_page(places: Places, tmp_path: Path) -> None:
    """All in one page of one Chromium, behind an import map."""
    packages = node_runtime.node_home() / "node_modules"
    parts = "".join(f"await (async () => {{ {body(block)} said.push({shown_by(block)}); }})();\n" for block in SCRIPTS)
    code = f"{''.join(sorted({line for block in SCRIPTS for line in imports(block)}))}const said = [];\n{parts}"
    page = (
        f'<!doctype html><script type="importmap">{json.dumps({"imports": IMPORTS})}</script>'
        f'<script type="module">{code}window.said = said;</script>'
    )
    site = {
        "pasted.html": page.encode(),
        "empty.html": b"<!doctype html>",
        "photo.jpg": places.made["new",] / "photo.jpg",
        **files_under(
            {
                "/transformers/": packages / "@huggingface" / "transformers" / "dist",
                "/onnxruntime/": packages / "onnxruntime-web" / "dist",
                "/vlm-export/": ROOT / "vlm_export" / "js",
            }
        ),
    }
    with SiteServer(site, ISOLATION) as server:
        steps: list[list[Any]] = [
            ["addInitScript", {"content": IN_PAGE.format(there=HUB, here=places.hubs["captioner"].url)}],
            ["routeFromHAR", str(cdn(tmp_path)), {"url": f"{CDN}/**", "notFound": "abort"}],
            ["goto", f"{server.url}/pasted.html"],
            ["waitForFunction", "return window.said"],
            ["evaluate", "window.said"],
        ]
        seen = chromium.drive(f"{server.url}/empty.html", steps, chromium.WASM)
    assert seen.answers == [[caption()] * len(SCRIPTS)]


def imports(block: Snippet) -> list[str]:
    return [f"{line}\n" for line in block.text.splitlines() if line.startswith("import ")]


def body(block: Snippet) -> str:
    """A block but for its imports, which stand at a module's top."""
    return "\n".join(line for line in block.text.splitlines() if not line.startswith("import "))
