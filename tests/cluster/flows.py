"""A plain stream of bytes between two hosts: what a cable carries. ``flows.py serve PORT | send HOST PORT BYTES``

The sender prints the seconds until the receiver had all of it and said so; timed without the start of the programs.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from tests.cluster.host import Host

PORT = 5201
_CHUNK_BYTES = 1 << 20


def payload_rate(sender: Host, receiver: Host, num_bytes: int = 64 << 20) -> float:
    """Payload bytes a second that one TCP connection moves from ``sender`` to ``receiver``."""
    script = [sys.executable, "-m", "tests.cluster.flows"]
    server = receiver.start([*script, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        sent = sender.run([*script, "send", receiver.address, str(num_bytes)], timeout_s=60)
    finally:
        server.kill()
        server.communicate()
    return num_bytes / float(sent.stdout)


def _serve() -> None:
    with socket.create_server(("", PORT)) as listener:
        print("ready", flush=True)
        connection, _ = listener.accept()
    chunk = bytearray(_CHUNK_BYTES)
    with connection:
        while connection.recv_into(chunk):
            pass
        connection.sendall(b".")


def _send(host: str, num_bytes: int) -> None:
    chunk = bytes(_CHUNK_BYTES)
    with socket.create_connection((host, PORT)) as connection:
        started = time.perf_counter()
        for start in range(0, num_bytes, _CHUNK_BYTES):
            connection.sendall(chunk[: num_bytes - start])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        print(time.perf_counter() - started)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve()
    else:
        _send(sys.argv[2], int(sys.argv[3]))
