"""Load on a llama-server: clients that stream completions at the same time, and what became of each request.

The client is ours, on asyncio alone. A well-kept generator such as GuideLLM 0.8 brings some eighty packages, PyTorch and a hub's tokenizers
among them, and makes prompts of a length in its own tokens. A prompt here is a list of the server's token ids, so its length is exact, and
it works without a hub. On a machine that computes on its CPU the generator must be small, too.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from turbo_gguf.measure.result import Answer

HOST = "127.0.0.1"

DIGITS = 4
"""Of the seconds that are kept: a tenth of a millisecond."""


class Request(msgspec.Struct, frozen=True):
    """One completion to ask for."""

    prompt: tuple[int, ...]  # token ids
    n_gen: int  # tokens to generate


class _Failed(Exception):
    """A request that has no complete answer."""


def drive(port: int, requests: Sequence[Request], *, clients: int, timeout: float) -> tuple[tuple[Answer, ...], float]:
    """Send all requests from so many clients, each of which takes the next one when it has its answer.

    Args:
        port: of the server, on this machine.
        requests: in the order in which they are sent.
        clients: requests that are under way at the same time.
        timeout: seconds after which a request has failed.

    Returns:
        Answers in the order of the requests, and the seconds from the first request to the last answer.
    """
    return asyncio.run(_drive(port, requests, clients, timeout))


async def _drive(port: int, requests: Sequence[Request], clients: int, timeout: float) -> tuple[tuple[Answer, ...], float]:
    began = time.perf_counter()
    found: dict[int, Answer] = {}
    todo = iter(enumerate(requests))

    async def client() -> None:
        for number, request in todo:
            found[number] = await _answer(port, request, timeout, began)

    await asyncio.gather(*(client() for _ in range(clients)))
    return tuple(found[number] for number in sorted(found)), time.perf_counter() - began


async def _answer(port: int, request: Request, timeout: float, began: float) -> Answer:
    """Send one request, and note when its tokens come."""
    sent = time.perf_counter()
    times: list[tuple[float, int]] = []  # when so many tokens had come
    error = ""
    try:
        async with asyncio.timeout(timeout):
            await _complete(port, request, times)
    except _Failed as failed:
        error = str(failed)
    except TimeoutError:
        error = f"no end after {timeout:g} s"
    except (OSError, EOFError, ValueError) as failed:  # refused, cut, or not what HTTP or JSON is
        error = f"{type(failed).__name__}: {failed}"
    return Answer(
        prompt=len(request.prompt),
        sent=round(sent - began, DIGITS),
        seconds=round(time.perf_counter() - sent, DIGITS),
        tokens=times[-1][1] if times else 0,
        first=round(times[0][0] - sent, DIGITS) if times else None,
        gaps=tuple(round(gap, DIGITS) for gap in gaps(times)),
        error=error,
    )


def gaps(times: Sequence[tuple[float, int]]) -> Iterable[float]:
    """Seconds between tokens.

    A server holds tokens back until they are whole characters. Those that come at once share the time since the last ones; of the first
    ones only the first counts.

    Args:
        times: when so many tokens had come, ascending in both.
    """
    for (before, had), (now, has) in pairwise(times):
        yield from [(now - before) / (has - had)] * (has - had)


async def _complete(port: int, request: Request, times: list[tuple[float, int]]) -> None:
    """Ask for a completion and append to ``times``.

    Raises:
        _Failed: refused, cut short, or not what was asked for.
        OSError, EOFError, ValueError: the connection, or what came over it.
    """
    body = {
        "prompt": request.prompt,
        "n_predict": request.n_gen,
        "stream": True,
        "cache_prompt": False,  # each request pays for its prompt
        "ignore_eos": True,
        "temperature": 0,
        "response_fields": ["stop", "stop_type", "tokens_predicted", "tokens_evaluated"],  # the last event would repeat the prompt
    }
    async for event in _events(port, json.dumps(body).encode()):
        if "error" in event:
            raise _Failed(_text_of(event["error"]))
        count = int(event.get("tokens_predicted", 0))
        if count > (times[-1][1] if times else 0):
            times.append((time.perf_counter(), count))
        if event.get("stop"):
            _check_end(event, request)
            return
    raise _Failed(f"the stream ended after {times[-1][1] if times else 0} of {request.n_gen} tokens")


def _check_end(event: dict[str, Any], request: Request) -> None:
    """All of the prompt was read, and all tokens came. There may be a few more, to end a character."""
    if event.get("tokens_evaluated") != len(request.prompt):
        raise _Failed(f"the server read {event.get('tokens_evaluated')} tokens of a prompt of {len(request.prompt)}")
    if event.get("tokens_predicted", 0) < request.n_gen:
        why = event.get("stop_type") or "no reason"
        raise _Failed(f"{event.get('tokens_predicted', 0)} tokens of {request.n_gen} ({why})")


def _text_of(error: object) -> str:
    """What an error of the server says."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


# --- HTTP -----------------------------------------------------------------------------------------------------------------


async def _events(port: int, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """Post to ``/completion``; the events of its stream.

    Raises:
        _Failed: another status than 200.
        OSError, EOFError, ValueError: the connection, or what came over it.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = f"POST /completion HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        await writer.drain()
        status, headers = await _head(reader)
        lines = _lines(_chunks(reader) if headers.get("transfer-encoding", "").lower() == "chunked" else _rest(reader, headers))
        if status != 200:
            raise _Failed(f"HTTP {status}: {_message(b''.join([line async for line in lines]))}")
        async for line in lines:
            name, _, value = line.partition(b":")
            if name in (b"data", b"error") and value.strip() != b"[DONE]":
                event = json.loads(value)
                if not isinstance(event, dict):
                    raise ValueError(f"an event that is no object: {value[:80]!r}")
                yield event if name == b"data" else {"error": event}
    finally:
        writer.close()


def _message(text: bytes) -> str:
    """What the body of a refusal says."""
    try:
        found = json.loads(text)
        return _text_of(found["error"] if isinstance(found, dict) and "error" in found else found)
    except ValueError:
        return text[:200].decode("utf-8", errors="replace")


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    _, status, *_ = (await _line(reader)).split(maxsplit=2)
    headers = {}
    while line := await _line(reader):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(status), headers


async def _line(reader: asyncio.StreamReader) -> str:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the connection was closed")
    return line.decode("latin-1").rstrip("\r\n")


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Body of an answer in chunks."""
    while size := int((await _line(reader)).partition(";")[0], 16):
        yield await reader.readexactly(size)
        await _line(reader)


async def _rest(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Body of an answer whose length is known, or that goes on to the end of the connection."""
    length = headers.get("content-length")
    yield await (reader.read() if length is None else reader.readexactly(int(length)))


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of a body, without their ends and without empty ones."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.strip():
                yield line.rstrip(b"\r")
    if rest.strip():
        yield rest
