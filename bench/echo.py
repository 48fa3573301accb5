"""A bare grpc.aio server that answers every call of one method with the same bytes: what a call costs without us.

    python -m bench.echo ADDRESS METHOD REPLY_FILE CERTIFICATE KEY CA

`METHOD` is `/package.Service/Method`. Mutual TLS and uvloop, as the services have them.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import grpc
import grpc.aio
import uvloop


async def serve(address: str, method: str, reply: bytes, files: tuple[bytes, bytes, bytes]) -> None:
    """Serve until SIGTERM."""
    certificate, key, authority = files

    async def echo(_request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return reply

    _, service, name = method.split("/")
    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(echo)
    server.add_registered_method_handlers(service, {name: handler})
    server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)], authority, True))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await server.start()
    await ended.wait()
    await server.stop(0)


def main() -> None:
    """Read the arguments and serve."""
    address, method, reply, *files = sys.argv[1:]
    certificate, key, authority = (Path(file).read_bytes() for file in files)
    uvloop.run(serve(address, method, Path(reply).read_bytes(), (certificate, key, authority)))


if __name__ == "__main__":
    main()
