"""Sockets that the servers listen at: this machine's own, unless the user names another address."""

from __future__ import annotations

import errno
import os
import re
import socket

from vlm_export.errors import InputError

HOST = "127.0.0.1"
LOOPBACK = (HOST, "localhost", "::1")
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:]+\])(?P<port>:[0-9]+)?")
_USUAL_PORTS = {"http": ":80", "https": ":443"}


def check_host(host: str) -> None:
    """Raises InputError for what is no address: sockets take an empty one for every address of this machine."""
    try:
        known = bool(host.strip()) and "\0" not in host and host.encode("idna")
    except UnicodeError:
        known = False
    if not known:
        raise InputError(f"--host: {host!r} is no address: give one, such as {HOST}, or leave the option out")


def check_origin(origin: str) -> None:
    """Raises InputError for what no browser sends as a page's `Origin`: scheme, host, and the port if it is unusual."""
    if origin == "*":
        raise InputError("--cors: * would let every page that a browser opens use the model: name each origin")
    found = _ORIGIN.match(origin.lower())
    if found is None:
        raise InputError(f"--cors: {origin!r} is no origin: give one as https://example.org or http://localhost:3000")
    usual = found["port"] == _USUAL_PORTS.get(found["scheme"])
    exact = f"{found['scheme']}://{found['host']}{'' if usual else found['port'] or ''}"
    if origin != exact:
        raise InputError(f"--cors: {origin}: a browser calls that origin {exact}")


def listen(port: int, host: str = HOST) -> socket.socket:
    """A listening socket; port 0 is any that is free.

    Raises:
        InputError: the address cannot be had.
    """
    check_host(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        next_step = "choose another with --port" if error.errno == errno.EADDRINUSE else "choose another with --host"
        # Its own text repeats the address; the resolver's numbers are below 0 and mean nothing to the system.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else str(error.strerror).partition(" (")[0]
        raise InputError(f"{host}:{port}: {reason}: {next_step}") from error


def url_of(listening: socket.socket, host: str = HOST) -> str:
    """The address under which it is reached, with a slash at the end."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}/"
