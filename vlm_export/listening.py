"""Sockets that the servers listen at: this machine's own, unless the user names another address."""

from __future__ import annotations

import errno
import os
import socket

from vlm_export.errors import InputError

HOST = "127.0.0.1"
LOOPBACK = (HOST, "localhost", "::1")


def listen(port: int, host: str = HOST) -> socket.socket:
    """A listening socket; port 0 is any that is free.

    Raises:
        InputError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        next_step = "choose another with --port" if error.errno == errno.EADDRINUSE else "choose another with --host"
        reason = os.strerror(error.errno) if error.errno else str(error)  # its own text repeats the address
        raise InputError(f"{host}:{port}: {reason}: {next_step}") from error


def url_of(listening: socket.socket, host: str = HOST) -> str:
    """The address under which it is reached, with a slash at the end."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}/"
