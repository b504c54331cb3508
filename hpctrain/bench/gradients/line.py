"""What the bench and a rank of a competitor say to each other: JSON objects, one a line, over a local socket.

The bench orders, the rank obeys and answers once; in between it may say that it is alive.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hpctrain.errors import MachineError

#: a message with this key alone says "I am alive"
BEAT = "beat"
#: most often that a rank says so, in seconds
_BEAT_EVERY_S = 1.0

Message = dict[str, Any]


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Listener:
    """Where ranks call. The socket has no file (Linux's abstract names), so nothing is left behind."""

    def __init__(self, name: str) -> None:
        self.address = name
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind("\0" + name)
        self._socket.listen(1024)

    def accept(self, timeout_s: float) -> Call | None:
        """The next rank of this user that calls, or None when none does in time."""
        self._socket.settimeout(timeout_s)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        pid, uid, _ = struct.unpack(
            "iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        )
        if uid != os.geteuid():
            connection.close()
            return None
        return Call(connection, pid)

    def close(self) -> None:
        self._socket.close()


class Call:
    """The bench's end of the line to one rank, whose process is ``pid``."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._unread = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Whether there was still a rank to send to."""
        try:
            self._connection.sendall(encode(message))
        except OSError:
            return False
        return True

    def read(self) -> list[Message] | None:
        """The messages that have arrived, perhaps none; None when the rank has hung up. Call it when readable."""
        try:
            received = self._connection.recv(1 << 16)
        except ConnectionError:
            return None
        if not received:
            return None
        *lines, self._unread = (self._unread + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def read_one(self, deadline: float) -> Message:
        """The first message, by the ``deadline`` of the host's clock; MachineError when there is none."""
        messages: list[Message] | None = []
        while messages == [] and wait_readable([self], deadline - time.monotonic()):
            messages = self.read()
        if not messages:
            raise MachineError(f"process {self.pid} has called the bench and said nothing")
        return messages[0]

    def close(self) -> None:
        self._connection.close()


def wait_readable(calls: list[Call], timeout_s: float) -> list[Call]:
    """Those of ``calls`` with something to read, after at most ``timeout_s``."""
    with selectors.DefaultSelector() as selector:
        for call in calls:
            selector.register(call, selectors.EVENT_READ, call)
        return [key.data for key, _ in selector.select(max(0.0, timeout_s))]


class Caller:
    """A rank's end. When the bench is gone, so is this process, whatever it is doing."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect("\0" + address)
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._beaten_at = time.monotonic()
        threading.Thread(target=self._read, name="hpctrain-orders", daemon=True).start()

    def next_order(self) -> Message:
        """Sleep until there is one."""
        return self._orders.get()

    def answer(self, message: Mapping[str, Any]) -> None:
        self._socket.sendall(encode(message))

    def beat(self) -> None:
        """Say that this rank moves on; call it as often as convenient."""
        now = time.monotonic()
        if now - self._beaten_at > _BEAT_EVERY_S:
            self._beaten_at = now
            self.answer({BEAT: True})

    def _read(self) -> None:
        # A bench that goes with something unread resets the line instead of closing it.
        with suppress(ConnectionError), self._socket.makefile("rb") as lines:
            for line in lines:
                self._orders.put(json.loads(line))
        os._exit(1)
