"""A network of its own for pods on this machine: loopback and nothing else, with one door to a server outside.

    python -m tests.k8s.network inside PORT SOCKET        the network: PORT in there leads to SOCKET
    python -m tests.k8s.network outside SOCKET PORT       SOCKET, in the file system that both share, leads to PORT

Each prints a line when it is up. The network lives as long as a process in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # linux/sockios.h, linux/if.h

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def enter_network() -> None:
    """Move this process into a new network, and raise its loopback; needs root."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no network of one's own")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


async def inside(port: int, door: str) -> None:
    await _serve(
        await asyncio.start_server(_to(lambda: asyncio.open_unix_connection(door)), "127.0.0.1", port)
    )


async def outside(door: str, port: int) -> None:
    await _serve(
        await asyncio.start_unix_server(_to(lambda: asyncio.open_connection("127.0.0.1", port)), door)
    )


async def _serve(server: asyncio.Server) -> None:
    print("up", flush=True)
    async with server:
        await server.serve_forever()


def _to(connect: Connect) -> Handler:
    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await connect()
        await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))

    return hand_on


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


if __name__ == "__main__":
    os.umask(0)
    if sys.argv[1] == "inside":
        enter_network()
        asyncio.run(inside(int(sys.argv[2]), sys.argv[3]))
    else:
        asyncio.run(outside(sys.argv[2], int(sys.argv[3])))
