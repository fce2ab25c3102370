"""Load on a stand-in for llama-server. Risks: wrong prompts, wrong times, too many or too few at once, failures that look like answers."""

from __future__ import annotations

import socket
import time

import pytest
from fake_server import Plan, Server
from local_server import running

from turbo_gguf.measure import load
from turbo_gguf.measure.load import Request
from turbo_gguf.measure.result import Answer

N_GEN = 6


def ask(*lengths: int, slots: int = 8, clients: int = 1, timeout: float = 20.0, **plan: object) -> tuple[tuple[Answer, ...], Server]:
    with running(Server(slots, Plan(**plan))) as server:  # type: ignore[arg-type]
        requests = [Request(tuple(range(n)), N_GEN) for n in lengths]
        answers, seconds = load.drive(server.server_port, requests, clients=clients, timeout=timeout)
        assert seconds >= max(answer.sent + answer.seconds for answer in answers) - 0.001
    return answers, server


def test_prompts_are_sent_as_tokens_and_nothing_is_reused() -> None:
    answers, server = ask(3, 5)
    assert [answer.prompt for answer in answers] == [3, 5] and not any(answer.error for answer in answers)
    for body, length in zip(server.bodies, (3, 5), strict=True):
        assert body["prompt"] == list(range(length)) and body["n_predict"] == N_GEN
        assert body["cache_prompt"] is False and body["ignore_eos"] is True and body["stream"] is True


def test_times_of_an_answer() -> None:
    (answer,), _ = ask(3, delay=0.02)
    assert answer.tokens == N_GEN and len(answer.gaps) == N_GEN - 1
    assert answer.first is not None and 0.02 <= answer.first < answer.seconds
    assert all(0.015 < gap < 1 for gap in answer.gaps)
    assert answer.first + sum(answer.gaps) == pytest.approx(answer.seconds, abs=0.02)


@pytest.mark.parametrize("body", ["chunked", "pieces", "plain"])
def test_every_way_to_send_a_body(body: str) -> None:
    answers, _ = ask(3, 4, body=body)
    assert [(answer.tokens, answer.error) for answer in answers] == [(N_GEN, "")] * 2


def test_so_many_at_once_and_no_more() -> None:
    answers, server = ask(*range(3, 15), clients=4, delay=0.01)
    assert server.most == 4
    assert [answer.prompt for answer in answers] == list(range(3, 15)), "answers are in the order of the requests"
    first_end = min(answer.sent + answer.seconds for answer in answers)
    assert sum(answer.sent < first_end - 0.001 for answer in answers) == 4, "each client waits for its answer"  # times are rounded


def test_a_request_without_a_slot_waits_for_its_first_token() -> None:
    answers, _ = ask(3, 4, 5, slots=1, clients=3, delay=0.02)
    waits = sorted(answer.first or 0 for answer in answers)
    assert waits[1] > waits[0] + 4 * 0.02 and waits[2] > waits[1] + 4 * 0.02


def test_tokens_that_come_at_once_share_their_time() -> None:
    assert list(load.gaps([(1.0, 2), (4.0, 5), (5.0, 6)])) == [1.0, 1.0, 1.0, 1.0]
    assert list(load.gaps([])) == list(load.gaps([(1.0, 1)])) == []
    (answer,), _ = ask(3, held=3)
    assert answer.tokens == N_GEN and len(answer.gaps) == 3, "of the first three only the first one counts"


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        ("refused", "HTTP 503: no slot for you"),
        ("error", "out of memory"),
        ("cut", "the stream ended after 3 of 6 tokens"),
        ("short", "3 tokens of 6 (limit)"),
        ("lost", "the server read 2 tokens of a prompt of 5"),
        ("silent", "no end after 0.3 s"),
        ("no json", "JSONDecodeError: "),
        ("no http", "ValueError: "),
    ],
)
def test_a_failure_has_its_reason_and_the_others_go_on(failure: str, why: str) -> None:
    answers, _ = ask(3, 5, 4, length=5, failure=failure, timeout=0.3 if failure == "silent" else 20)
    assert answers[1].error.startswith(why)
    assert [answer.error for answer in (answers[0], answers[2])] == ["", ""]
    assert [answer.tokens for answer in (answers[0], answers[2])] == [N_GEN] * 2


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        began = time.monotonic()
        answers, _ = load.drive(free.getsockname()[1], [Request((1, 2), 4)] * 3, clients=2, timeout=20)
    assert time.monotonic() - began < 10
    assert [(answer.tokens, answer.first) for answer in answers] == [(0, None)] * 3
    assert all(answer.error.startswith("ConnectionRefusedError") for answer in answers)
