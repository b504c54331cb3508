"""What a cable carries: a plain stream of bytes between two hosts, or one byte to and fro.
``flows.py serve | send HOST BYTES | ping HOST TIMES``

Timed without the start of the programs: of a stream until the receiver had all of it and said so.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from tests.cluster.host import Host

PORT = 5201
_CHUNK_BYTES = 1 << 20
_PING, _LAST = b"p", b"."


def payload_rate(sender: Host, receiver: Host, num_bytes: int = 64 << 20) -> float:
    """Payload bytes a second that one TCP connection moves from ``sender`` to ``receiver``."""
    return num_bytes / _seconds(sender, receiver, "send", num_bytes)


def round_trip_s(first: Host, second: Host, times: int = 30) -> float:
    """Shortest time of a byte from ``first`` to ``second`` and back: the cables', without what a busy machine adds."""
    return _seconds(first, second, "ping", times)


def _seconds(sender: Host, receiver: Host, what: str, number: int) -> float:
    script = [sys.executable, "-m", "tests.cluster.flows"]
    server = receiver.start([*script, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        return float(sender.run([*script, what, receiver.address, str(number)], timeout_s=60).stdout)
    finally:
        server.kill()
        server.communicate()


def _serve() -> None:
    with socket.create_server(("", PORT)) as listener:
        print("ready", flush=True)
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    chunk = bytearray(_CHUNK_BYTES)
    with connection:
        while received := connection.recv_into(chunk):
            if chunk[:received] == _PING:
                connection.sendall(_PING)
        connection.sendall(_LAST)


def _send(connection: socket.socket, num_bytes: int) -> float:
    chunk = bytes(_CHUNK_BYTES)
    started = time.perf_counter()
    for start in range(0, num_bytes, _CHUNK_BYTES):
        connection.sendall(chunk[: num_bytes - start])
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    return time.perf_counter() - started


def _ping(connection: socket.socket, times: int) -> float:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        connection.sendall(_PING)
        connection.recv(1)
        taken.append(time.perf_counter() - started)
    return min(taken)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve()
    else:
        with socket.create_connection((sys.argv[2], PORT)) as peer:
            print({"send": _send, "ping": _ping}[sys.argv[1]](peer, int(sys.argv[3])))
