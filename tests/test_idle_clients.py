"""Clients that hold a connection and neither send nor read: they lose it, and others are answered meanwhile."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import httpx2
import pytest
import uvicorn
from bad.requests import asking, served

from vlm_export.apps.serve import Limits, server
from vlm_export.runtime import Model
from vlm_export.web import site_server
from vlm_export.web.connections import Patience
from vlm_export.web.listening import listen

LONG, SHORT = 60.0, 0.3
GRAPH = bytes(500_000)
GET = "GET /graph.onnx HTTP/1.1\r\nHost: localhost\r\n"
ENDLESS = {"max_tokens": 10**6, "min_new_tokens": 10**6}
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return served(tmp_path_factory.mktemp("served"), positions=10**7)


def serving(model: Model, limits: Limits) -> AbstractContextManager[tuple[str, int]]:
    """The address of a server of a model."""
    return listening(server(model, limits))


def serving_site(patience: Patience) -> AbstractContextManager[tuple[str, int]]:
    """The address of a server of files, one of them large."""
    return listening(
        site_server.server(site_server.application({"graph.onnx": GRAPH, "index.html": b"page"}), patience)
    )


@contextmanager
def listening(running: uvicorn.Server) -> Iterator[tuple[str, int]]:
    """A server's address. Its sockets have small buffers, so that they are soon full."""
    with listen(0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            running.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def connected(address: tuple[str, int], sent: str = "") -> socket.socket:
    """A client's socket, with a small buffer too."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(address)
    client.sendall(sent.encode())
    return client


def request(**parameters: Any) -> str:
    body = json.dumps(asking(**parameters))
    return f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}"


def answered(address: tuple[str, int]) -> bool:
    """Whether another client gets an answer."""
    url = f"http://{address[0]}:{address[1]}/v1/chat/completions"
    return httpx2.post(url, json=asking(max_tokens=3), timeout=20).status_code == 200


def all_of(client: socket.socket) -> bytes:
    """What a client gets until its connection is closed."""
    got = b""
    try:
        while part := client.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


def state(address: tuple[str, int]) -> dict[str, Any]:
    return httpx2.get(f"http://{address[0]}:{address[1]}/health", timeout=20).json()


@pytest.mark.parametrize("sent", ["", "P", f"{HEAD}X-More: "], ids=["nothing", "a byte", "half a head"])
def test_a_client_that_sends_no_whole_head(sent: str, model: Model) -> None:
    with serving(model, Limits(patience=Patience(head=SHORT))) as address, connected(address, sent) as client:
        assert all_of(client) == b""
        assert answered(address)


def test_the_second_request_of_a_connection_has_the_same_time(model: Model) -> None:
    with serving(model, Limits(patience=Patience(head=SHORT))) as address, connected(address) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nG")
        assert all_of(client).startswith(b"HTTP/1.1 200")


def test_a_body_that_stays_out(model: Model) -> None:
    """Whether all of it or the next piece."""
    for patience in (Patience(body=LONG, body_pause=SHORT), Patience(body=SHORT, body_pause=LONG)):
        with serving(model, Limits(patience=patience)) as address:
            with connected(address, f"{HEAD}Content-Length: 100\r\n\r\n{{") as client:
                assert b"408" in all_of(client).splitlines()[0]
            assert answered(address)


def test_bodies_that_stay_out_hold_no_place_of_others(model: Model) -> None:
    """Neither one that is answered, nor the last of those that arrive: the idlest of these goes."""
    limits = Limits(queue=0, arriving=2, patience=Patience(body=LONG, body_pause=LONG, body_grace=0.1))
    with serving(model, limits) as address, ExitStack() as opened:
        idle = [opened.enter_context(connected(address, f"{HEAD}Content-Length: 100\r\n\r\n{{")) for _ in range(2)]
        time.sleep(0.2)
        assert answered(address)
        assert b"408" in all_of(idle[0]).splitlines()[0]
        idle[1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            idle[1].recv(1)


def test_a_client_that_reads_nothing_of_a_stream(model: Model) -> None:
    """It has the only place until its time is over, and the next one gets it."""
    with serving(model, Limits(queue=1, patience=Patience(write=SHORT))) as address:
        with connected(address, request(stream=True, **ENDLESS)) as client:
            while not state(address)["running"]:
                time.sleep(0.01)
            assert answered(address)
            assert all_of(client).startswith(b"HTTP/1.1 200")
        assert state(address) | {"running": 0, "waiting": 0} == state(address)


def test_a_client_that_reads_slowly_is_served(model: Model) -> None:
    asked = request(stream=True, max_tokens=800, min_new_tokens=800)
    with serving(model, Limits(patience=Patience(write=2))) as address, connected(address, asked) as client:
        got = b""
        while b"[DONE]" not in got:
            time.sleep(0.005)
            got += client.recv(4096)


def test_a_client_that_leaves_its_answer_in_the_buffers(model: Model) -> None:
    """Its answer is complete, and would wait to be read for ever."""
    with serving(model, Limits(patience=Patience(write=SHORT))) as address:
        one = "GET /page.js HTTP/1.1\r\nHost: localhost\r\n"
        with connected(address, f"{one}\r\n" * 9 + f"{one}Connection: close\r\n\r\n") as client:
            time.sleep(3 * SHORT)
            assert answered(address)
            assert len(all_of(client)) < 10 * len(httpx2.get(f"http://{address[0]}:{address[1]}/page.js").content)


def test_connections_beyond_the_limit(model: Model) -> None:
    """The one that has waited longest goes, and never one that is being answered."""
    with serving(model, Limits(patience=Patience(head=LONG, connections=3))) as address, ExitStack() as opened:
        busy = opened.enter_context(connected(address, request(stream=True, **ENDLESS)))
        assert busy.recv(4).startswith(b"HTTP")
        idle = [opened.enter_context(connected(address)) for _ in range(4)]
        assert [all_of(one) for one in idle[:2]] == [b"", b""]
        for one in (busy, idle[3]):
            one.settimeout(0.05)
        assert busy.recv(1)
        with pytest.raises(TimeoutError):
            idle[3].recv(1)


@pytest.mark.parametrize(
    "sent",
    ["", "G", GET, f"POST{GET[3:]}Content-Length: 9\r\n\r\n"],
    ids=["nothing", "a byte", "half a head", "no body"],
)
def test_a_client_of_the_demo_that_stops_sending(sent: str) -> None:
    with serving_site(Patience(head=SHORT)) as address, connected(address, sent) as client:
        assert all_of(client).startswith(b"HTTP/1.1 405" if sent.startswith("POST") else b"")


def test_a_client_of_the_demo_that_reads_nothing() -> None:
    with serving_site(Patience(write=SHORT)) as address, connected(address, f"{GET}\r\n") as client:
        time.sleep(3 * SHORT)
        assert len(all_of(client)) < len(GRAPH)


def test_a_client_of_the_demo_that_reads_slowly_gets_all_of_a_file() -> None:
    with serving_site(Patience(head=SHORT, write=0.5)) as address, connected(address, f"{GET}\r\n") as client:
        got, begun = 0, time.monotonic()
        while got < len(GRAPH):
            time.sleep(0.005)
            part = client.recv(4096)
            assert part, f"dropped after {got} bytes"
            got += len(part)
        assert time.monotonic() - begun > 0.5


def test_connections_of_the_demo_beyond_the_limit() -> None:
    with serving_site(Patience(head=LONG, connections=2)) as address, ExitStack() as opened:
        reading = opened.enter_context(connected(address, f"{GET}\r\n"))
        assert reading.recv(4).startswith(b"HTTP")
        idle = [opened.enter_context(connected(address)) for _ in range(2)]
        assert all_of(idle[0]) == b""
        assert reading.recv(1)


def test_the_demo_waits_long_for_a_page_that_makes_a_session() -> None:
    """While it does, it reads nothing; what sends no request is as idle as at any server."""
    assert site_server.READERS.write >= 300 and site_server.READERS.head == Patience().head
