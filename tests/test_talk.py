"""`vlm-export chat` as it is typed: turns, pictures, errors that end nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pico_chat
import pytest
from click.testing import CliRunner, Result
from exported import Exported, write_images
from test_chat_families import prepare

from vlm_export.apps.chat import Talk
from vlm_export.apps.load import load
from vlm_export.cli import main
from vlm_export.runtime import Conversation, Options
from vlm_export.runtime.images import open_image


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    exported = prepare(tmp_path_factory.mktemp("llava"), pico_chat.write_llava)
    exported.export("chat")
    return exported


def talk(made: Exported, typed: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["chat", str(made.work.repo), *map(str, arguments)], input=typed)


def test_turns_are_those_of_a_conversation(made: Exported, tmp_path: Path) -> None:
    write_images(tmp_path, count=2)
    first, second = sorted(tmp_path.iterdir())
    expected = Conversation(load(made.work.repo))
    options = Options(max_new_tokens=5)
    texts = [
        expected.say("what is it", [open_image(first)], options).text,
        expected.say("and now", [open_image(second)], options).text,
        expected.say("why", [], options).text,
    ]
    typed = f"what is it\n\n/image {second}\nand now\nwhy\n/quit\nnever heard\n"
    result = talk(made, typed, first, "--max-new-tokens", 5)
    assert (result.exit_code, result.stdout) == (0, "".join(f"{text}\n" for text in texts))


def test_a_new_conversation_forgets(made: Exported) -> None:
    once = talk(made, "hello\n", "--max-new-tokens", 5).stdout
    result = talk(made, "hello\nhello\n/new\nhello\n", "--max-new-tokens", 5)
    lines = result.stdout.splitlines(keepends=True)
    assert lines[0] == lines[2] == once
    assert "a new conversation" in result.stderr


def test_what_cannot_be_done_ends_nothing(made: Exported, tmp_path: Path) -> None:
    typed = f"/image {tmp_path / 'none.png'}\n/what\nhello\n"
    result = talk(made, typed, "--max-new-tokens", 5)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)
    assert f"error: {tmp_path / 'none.png'}: no such image" in result.stderr
    assert "/image FILE shows a picture" in result.stderr


def test_a_captioner_does_not_talk(default_repo: Path) -> None:
    result = CliRunner().invoke(main, ["chat", str(default_repo)], input="hello\n")
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and "takes no prompt" in line


def test_ctrl_c_stops_an_answer_and_nothing_else(made: Exported) -> None:
    pieces: list[str] = []

    def write(piece: str) -> None:
        if not pieces:
            signal.raise_signal(signal.SIGINT)
        pieces.append(piece)

    model, options = load(made.work.repo), Options(min_new_tokens=12, max_new_tokens=12)
    whole: list[str] = []
    assert Talk(model, options, whole.append, pytest.fail).hear("hello")
    assert Talk(model, options, write, pytest.fail).hear("hello")
    assert "".join(whole).startswith("".join(pieces).rstrip()) and len("".join(pieces)) < len("".join(whole))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
