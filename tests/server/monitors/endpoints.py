"""HTTP endpoints for webhooks: what they were sent, and what they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Post:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass
class Endpoint:
    """A server on a free port. `answers`: status lines in turn, the last again and again; None hangs."""

    answers: list[str | None]
    port: int = 0
    posts: list[Post] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?a=1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.posts.append(Post(request.split()[1], headers, body))
            answer = self.answers[min(len(self.posts), len(self.answers)) - 1]
            if answer is None:
                # Until the caller gives up.
                await reader.read()
            else:
                writer.write(answer.encode())
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


OK = "HTTP/1.1 204 No Content\r\n\r\n"
BROKEN = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
REFUSED = "HTTP/1.1 400 Bad Request\r\n\r\n"
MOVED = "HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/\r\n\r\n"


@asynccontextmanager
async def endpoint(*answers: str | None) -> AsyncIterator[Endpoint]:
    made = Endpoint(list(answers))
    server = await asyncio.start_server(made._serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
