"""What no row of the corpus can tell: a file that changes while it is served, a picture that is too large, no home."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bad.corpus import CASES
from vlm_export.errors import LONGEST_LINE, InputError, one_line, shown
from vlm_export.merging.expressions import check_end
from vlm_export.runtime import templates
from vlm_export.runtime.images import MOST_PIXELS, open_image
from vlm_export.web.site_server import application

SECRET = b"what is nobody's business"


def test_every_kind_is_described() -> None:
    said = Path(__file__).with_name("kinds.md").read_text()
    described = {int(number) for number in re.findall(r"^\| (\d+)", said, re.MULTILINE)}
    assert {case.kind for case in CASES} <= described
    assert len(CASES) >= 250


def fetched(site: dict[str, Path | bytes], address: str, between: Any) -> tuple[int, bytes]:
    """The status and the body of an answer, with something done between the server's start and the request."""
    app, sent = application(site), []
    waiting = [{"type": "http.request", "body": b"", "more_body": False}]
    between()

    async def receive() -> Any:
        return waiting.pop() if waiting else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/{address}",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("become", ["a link", "a pipe", "nothing", "a folder"])
def test_a_served_file_that_is_no_longer_its_own(become: str, tmp_path: Path) -> None:
    outside, file = tmp_path / "secret", tmp_path / "site" / "a.json"
    outside.write_bytes(SECRET)
    file.parent.mkdir()
    file.write_bytes(b"{}")
    assert fetched({"a.json": file}, "a.json", lambda: None) == (200, b"{}")

    def spoil() -> None:
        file.unlink()
        if become == "a link":
            file.symlink_to(outside)
        elif become == "a pipe":
            os.mkfifo(file)
        elif become == "a folder":
            file.mkdir()

    status, body = fetched({"a.json": file}, "a.json", spoil)
    assert status == 404 and SECRET not in body


def test_a_picture_with_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (12_000, 12_000)).save(path)
    with pytest.raises(InputError, match=rf"large\.png: .*144,000,000 pixels, and at most {MOST_PIXELS:,}"):
        open_image(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without an entry")
def test_a_user_without_a_home() -> None:
    code = "import os, pwd; from vlm_export.files import cache_folder; os.setuid(4242); cache_folder()"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "InputError: no home folder to keep a cache in: set HOME or VLM_EXPORT_CACHE" in done.stderr


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb", "x" * 5000, "\ud800", "a\0b"])
def test_a_name_of_any_kind_stays_in_its_line(name: str) -> None:
    line = one_line(f"error: {name}: {shown(name)}: do this")
    assert len(line) <= LONGEST_LINE and line.isprintable() and line.endswith(": do this")


def test_usual_expressions_end() -> None:
    """Those that fine-tuning libraries write, against names as models have them."""
    names = [
        f"model.{part}.layers.{layer}.self_attn.{name}_proj"
        for part in ("language_model", "vision_tower.encoder")
        for layer in range(80)
        for name in "qkvo"
    ]
    usual = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.)"
    )
    check_end(Path("adapter_config.json"), [("target_modules", usual), ("target_modules", r".*(q|v)_proj")], names)


def test_limits_of_a_template_leave_no_trace() -> None:
    """Nor do they touch what a long conversation needs."""
    turns = [{"role": "user", "content": "word " * 50} for _ in range(200)]
    before = sys.gettrace()
    template = "{% for turn in messages %}{{ turn.role ~ ': ' + turn.content | trim }}\n{% endfor %}"
    text = templates.render(template, turns, {}, "here")
    assert text.count("user: word") == 200 and sys.gettrace() is before
