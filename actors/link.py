"""The way between a replica and its shard, beside Ray's calls: a Unix socket on the node that they share.

A call between actors takes a millisecond or two each way and wakes several threads of both processes; a turn needs one
before its first step, and every step one after it. Turns and outputs go this way, in order; chunks, and what happens
rarely, go by Ray. Messages are pickles: the socket lies in a folder that no other user can enter.
"""

from __future__ import annotations

import asyncio
import pickle
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("<Q")


class ReplicaEnd:
    """Listens at `address` until the shard has connected. For one event loop."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="reprise-")
        self.address = str(Path(self._folder, "shard"))
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(self.address)
            self._listener.listen(1)
            self._listener.setblocking(False)
        except BaseException:
            self.close()
            raise
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        """Returns when the shard is there; nobody else can connect after that."""
        connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=connection)
        self._stop_listening()

    def send(self, message: Any) -> None:
        """Does not wait. What is sent to a shard that is gone is lost: `receive` tells."""
        assert self._writer is not None, "the shard has not connected"
        if not self._writer.is_closing():
            self._writer.write(_framed(message))

    async def receive(self) -> Any:
        """The next message. ConnectionError when the shard is gone."""
        assert self._reader is not None, "the shard has not connected"
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return pickle.loads(await self._reader.readexactly(length))
        except asyncio.IncompleteReadError:
            raise ConnectionResetError("the shard has closed its end") from None

    def close(self) -> None:
        self._stop_listening()
        if self._writer is not None:
            self._writer.close()

    def _stop_listening(self) -> None:
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class ShardEnd:
    """Connected from its making on. One thread may send while another one receives."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._stream = self._socket.makefile("rb")

    def send(self, message: Any) -> None:
        """Returns when it is on its way. OSError when the replica is gone."""
        self._socket.sendall(_framed(message))

    def receive(self) -> Any:
        """Waits for the next message. ConnectionError when the replica is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def _read(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        if len(data) < num_bytes:
            raise ConnectionResetError("the replica has closed its end")
        return data

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


def _framed(message: Any) -> bytes:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data
