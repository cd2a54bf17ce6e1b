"""A judge behind a server on this machine: what it is asked, what is kept, and what becomes of replies that are none."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from errata.edit import Edit, Probe
from errata.errors import ConfigError
from errata.evaluation.judge import Judge, Question, judge_answers
from errata.evaluation.protocol import AskedEdit

Behaviour = Callable[[str], tuple[int, str]]


class Server(ThreadingHTTPServer):
    """Answers every question as `behave` says: a status and the body, from the message of the user."""

    daemon_threads = True

    def __init__(self, behave: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.seen = behave, list[dict[str, Any]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        status, text = server.behave(body["messages"][-1]["content"])
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # of a client that has stopped waiting
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass


def saying(text: Any) -> str:
    return json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Server]]:
    servers: list[Server] = []

    def start(behave: Behaviour) -> Server:
        servers.append(Server(behave))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def by_gold(message: str) -> tuple[int, str]:
    """Right where the right answer's first word is anywhere in the answer."""
    lines = dict(line.split(": ", 1) for line in message.splitlines())
    is_right = lines["Right answer"].split()[0].lower() in lines["Answer to grade"].lower()
    return 200, saying("CORRECT" if is_right else "incorrect.")


def asked() -> list[AskedEdit]:
    first = Edit(
        prompt="The capital of France is",
        target="Rome",
        aliases=("Roma",),
        rephrases=("France has", "In France"),
        portability=(Probe(prompt="Who is there?", answer="Ann"),),
    )
    second = Edit(prompt="Emma is by", target="Zed")
    said = {
        first.prompt: " Rome.",
        "France has": " a capital called Rome.",
        "In France": " Paris.",
        "Who is there?": "",
        second.prompt: " nobody.",
    }
    return [AskedEdit(edit, [], [], [], [], said) for edit in (first, second)]


def test_answers_are_judged_logged_and_held_against_exact_match(
    serve: Callable[[Behaviour], Server], tmp_path: Path
) -> None:
    server = serve(by_gold)
    log = tmp_path / "judge.jsonl"
    found = judge_answers(Judge(server.url, "grader", log, key="secret", at_once=1), asked())
    record = found.to_record()
    assert (record["reliability"]["correct"], record["reliability"]["edits"]) == (0.5, 2)
    assert record["generalization"] == {"correct": 0.5, "interval": [0.5, 0.5], "edits": 1}
    assert record["portability"]["correct"] == 0.0
    assert (record["asked"], record["judged"], record["failures"]) == (5, 5, {})
    # Exact match calls "a capital called Rome" wrong, the judge right; they agree on the other four.
    assert (record["agreement"], record["judge_only"], record["exact_only"]) == (0.8, 1, 0)
    # Judge right on 2 of 5, exact on 1: by chance 2/5 · 1/5 + 3/5 · 4/5 = 14/25.
    assert record["kappa"] == pytest.approx((0.8 - 14 / 25) / (1 - 14 / 25))
    first = server.seen[0]
    assert (first["path"], first["key"], first["model"], first["temperature"]) == (
        "/v1/chat/completions",
        "Bearer secret",
        "grader",
        0,
    )
    assert first["messages"][-1]["content"] == (
        "Question: The capital of France is\nRight answer: Rome (also right: Roma)\nAnswer to grade: Rome."
    )
    assert (
        "Answer to grade: (nothing)"
        in {seen["messages"][-1]["content"] for seen in server.seen if "there" in str(seen)}.pop()
    )
    assert "secret" not in log.read_text("utf-8")
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [(line["raw"], line["verdict"], line["exact"]) for line in lines[:3]] == [
        ("CORRECT", True, True),
        ("incorrect.", False, False),
        ("CORRECT", True, False),
    ]


def test_what_is_judged_is_not_asked_again(serve: Callable[[Behaviour], Server], tmp_path: Path) -> None:
    log, server = tmp_path / "judge.jsonl", serve(by_gold)
    first = judge_answers(Judge(server.url, "grader", log), asked())
    assert judge_answers(Judge(server.url, "grader", log), asked()) == first
    assert len(server.seen) == 5
    judge_answers(Judge(server.url, "another", log), asked())
    assert len(server.seen) == 10
    same = Question("p", ("a",), "a")
    assert len(Judge(server.url, "grader", log).ask([same, same])) == 1
    assert len(server.seen) == 11


@pytest.mark.parametrize(
    ("status", "body", "failure"),
    [
        (200, "<html>busy</html>", "no JSON"),
        (200, '{"error": "busy"}', "no message"),
        (200, '{"choices": []}', "no message"),
        (200, "[]", "no message"),
        (200, saying(None), "no message"),
        (200, saying(""), "no verdict"),
        (200, saying("I think that it is correct"), "no verdict"),
        (200, saying("Correctness cannot be told"), "no verdict"),
        (429, "slow down", "HTTP 429"),
        (500, "", "HTTP 500"),
    ],
)
def test_replies_without_a_verdict_are_counted_and_named(
    serve: Callable[[Behaviour], Server], tmp_path: Path, status: int, body: str, failure: str
) -> None:
    def behave(message: str) -> tuple[int, str]:
        return (status, body) if "Emma" in message else by_gold(message)

    server, log = serve(behave), tmp_path / "judge.jsonl"
    record = judge_answers(Judge(server.url, "grader", log), asked()).to_record()
    assert record["failures"] == {failure: 1}
    assert (record["asked"], record["judged"]) == (5, 4)
    assert (record["reliability"]["correct"], record["reliability"]["edits"]) == (1.0, 1), "not judged is not wrong"
    (line,) = [json.loads(line) for line in log.read_text("utf-8").splitlines() if "Emma" in line]
    assert (line["verdict"], line["failure"]) == (None, failure)
    server.behave = by_gold
    again = judge_answers(Judge(server.url, "grader", log), asked()).to_record()
    assert (again["failures"], again["judged"]) == ({}, 5)
    assert len(server.seen) == 6, "only what had no verdict was asked again"


@pytest.mark.parametrize("text", ["CORRECT", "correct.", " **Correct**", '"CORRECT"', "Correct, because"])
def test_a_verdict_may_be_dressed(serve: Callable[[Behaviour], Server], tmp_path: Path, text: str) -> None:
    judge = Judge(serve(lambda _: (200, saying(text))).url, "grader", tmp_path / "log.jsonl")
    (reply,) = judge.ask([Question("Ü?", ("東京",), "東京")]).values()
    assert (reply.verdict, reply.raw) == (True, text)


def test_a_late_reply_is_a_timeout(serve: Callable[[Behaviour], Server], tmp_path: Path) -> None:
    def behave(message: str) -> tuple[int, str]:
        if "Emma" in message:
            time.sleep(0.8)
        return by_gold(message)

    judge = Judge(serve(behave).url, "grader", tmp_path / "log.jsonl", timeout=0.3)
    assert judge_answers(judge, asked()).to_record()["failures"] == {"timeout": 1}


def test_a_server_that_never_answers_is_an_error(serve: Callable[[Behaviour], Server], tmp_path: Path) -> None:
    server = serve(lambda _: (401, "no key"))
    with pytest.raises(ConfigError, match=r"none of its first 5 questions: HTTP 401 \(no key\); check --judge"):
        judge_answers(Judge(server.url, "grader", tmp_path / "log.jsonl"), asked())
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match="no connection"):
        judge_answers(Judge(url, "grader", tmp_path / "other.jsonl"), asked())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://me:secret@host/v1"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="--judge"):
        Judge(url, "grader", tmp_path / "log.jsonl")
