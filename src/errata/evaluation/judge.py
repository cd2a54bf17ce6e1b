"""A language model as judge of answers, through any server that speaks OpenAI's chat protocol.

A judge sees through other spellings and wordings that exact match calls wrong, and makes mistakes of its own. So it
never stands alone: every reply is logged as it came, what could not be judged is counted by what went wrong, and
agreement with exact match is reported over all that was judged.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from errata.errors import ConfigError
from errata.evaluation.metrics import Measure, answers_exactly, best_answer, bootstrap_mean, finite_or_none
from errata.evaluation.protocol import AskedEdit
from errata.evaluation.rows import RowFile, digest
from errata.evaluation.significance import cohen_kappa
from errata.progress import NO_PROGRESS, Progress

__all__ = ["Judge", "Judged", "Question", "Reply", "judge_answers"]

_INSTRUCTION = (
    "You grade answers. You are given a question, or the beginning of a sentence, with its right answer, and what "
    "somebody answered. The answer is correct if it gives the right answer, in whatever words, and nothing that "
    "contradicts it. What is said after a complete answer does not matter, nor whether the right answer is true in "
    "the world. Reply with one word: CORRECT or INCORRECT."
)
_VERDICT = re.compile(r"\W*(correct|incorrect)\b", re.IGNORECASE)
_GIVE_UP_AFTER = 5  # failures before any verdict: then the server, not a question, is the matter
_PROPERTIES = ("reliability", "generalization", "portability")


@dataclass(frozen=True)
class Question:
    """What a judge is asked.

    Attributes:
        prompt: what the model was given; answers: its right answer by all its names; said: what the model wrote.
    """

    prompt: str
    answers: tuple[str, ...]
    said: str

    @property
    def is_exact(self) -> bool:
        """Whether exact match calls it right."""
        return bool(best_answer(answers_exactly, self.said, self.answers))

    def text(self) -> str:
        """The message that the judge reads."""
        first, *others = self.answers
        also = f" (also right: {'; '.join(others)})" if others else ""
        said = self.said.strip() or "(nothing)"
        return f"Question: {self.prompt}\nRight answer: {first}{also}\nAnswer to grade: {said}"


@dataclass(frozen=True)
class Reply:
    """What came of one question: a verdict, or the name of what went wrong.

    Attributes:
        raw: the judge's own words; of an error, what the server sent or the error's message.
        verdict: whether it calls the answer correct; None where `failure` says why there is none.
    """

    raw: str
    verdict: bool | None
    failure: str | None


class Judge:
    """Asks a server, and keeps every reply.

    Args:
        url: of the server's API ("http://localhost:8000/v1"); "/chat/completions" is put behind it unless it is there.
        model: the name under which the server knows the judge.
        log: JSONL of every question and reply. Questions that have a verdict there, from this judge and instruction,
            are not asked again.
        key: sent as bearer token, never logged.
        timeout: seconds for one reply; at_once: questions asked side by side.

    Raises:
        ConfigError: the URL is none of HTTP, or holds a password.
    """

    def __init__(
        self, url: str, model: str, log: Path, *, key: str | None = None, timeout: float = 60.0, at_once: int = 4
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--judge {url!r} is no address of a server; write http://HOST:PORT/v1")
        if parts.username or parts.password:
            raise ConfigError("--judge holds a name or password, which would be logged; give a key by the environment")
        base = url.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self.model, self.timeout, self.at_once = model, timeout, at_once
        self._key, self._log = key, RowFile(log, {"key", "raw", "verdict"})

    def ask(self, questions: Iterable[Question], progress: Progress = NO_PROGRESS) -> dict[Question, Reply]:
        """A reply to every question; each is asked once.

        Raises:
            ConfigError: the first questions all failed: the server is not there, or refuses.
        """
        known = {row["key"]: row for row in self._log.read() if row["verdict"] is not None}
        found: dict[Question, Reply] = {}
        waiting: list[Question] = []
        for question in dict.fromkeys(questions):
            row = known.get(self._row_key(question))
            if row is None:
                waiting.append(question)
            else:
                found[question] = Reply(row["raw"], row["verdict"], None)
        progress.start(f"asking the judge {self.model}", len(found) + len(waiting), done=len(found))
        pool = ThreadPoolExecutor(self.at_once)
        failed = 0
        try:
            for question, (reply, seconds) in zip(waiting, pool.map(self._timed, waiting), strict=True):
                found[question] = reply
                self._keep(question, reply, seconds)
                progress.advance()
                failed += reply.failure is not None
                if failed == len(found) >= min(_GIVE_UP_AFTER, len(waiting)):
                    raise ConfigError(
                        f"the judge at {self.url} answered none of its first {failed} questions: {reply.failure} "
                        f"({reply.raw[:200]}); check --judge, --judge-model and the key"
                    )
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _row_key(self, question: Question) -> str:
        return digest(json.dumps([_INSTRUCTION, self.model, question.text()]))

    def _keep(self, question: Question, reply: Reply, seconds: float) -> None:
        self._log.path.parent.mkdir(parents=True, exist_ok=True)
        self._log.append(
            {
                "key": self._row_key(question),
                "judge": self.model,
                "prompt": question.prompt,
                "answers": list(question.answers),
                "said": question.said,
                "raw": reply.raw,
                "verdict": reply.verdict,
                "failure": reply.failure,
                "exact": question.is_exact,
                "seconds": round(seconds, 3),
            }
        )

    def _timed(self, question: Question) -> tuple[Reply, float]:
        began = time.perf_counter()
        return self._reply(question), time.perf_counter() - began

    def _reply(self, question: Question) -> Reply:
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": _INSTRUCTION},
                {"role": "user", "content": question.text()},
            ],
            "temperature": 0,
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode("utf-8"), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                raw = response.read(1 << 20).decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            return Reply(error.read(2000).decode("utf-8", "replace"), None, f"HTTP {error.code}")
        except TimeoutError as error:
            return Reply(str(error), None, "timeout")
        except (OSError, ValueError, HTTPException) as error:  # URLError is an OSError; broken replies are of all three
            is_late = isinstance(getattr(error, "reason", None), TimeoutError)
            return Reply(str(error), None, "timeout" if is_late else "no connection")
        return _read_reply(raw)


def _read_reply(raw: str) -> Reply:
    """The verdict in a server's reply. Only its first word counts: a judge that explains itself first gives none."""
    try:
        text = json.loads(raw)["choices"][0]["message"]["content"]
    except ValueError:
        return Reply(raw, None, "no JSON")
    except (KeyError, IndexError, TypeError):
        return Reply(raw, None, "no message")
    if not isinstance(text, str):
        return Reply(raw, None, "no message")
    match = _VERDICT.match(text)
    return Reply(text, match.group(1).lower() == "correct", None) if match else Reply(text, None, "no verdict")


@dataclass(frozen=True)
class Judged:
    """What a judge made of a result.

    Attributes:
        scores: per property, the share called correct; means per edit first, over prompts that have a verdict.
        asked: different questions; failures: how many of them have no verdict, by what went wrong.
        agreement: share of judged questions on which judge and exact match agree; kappa: Cohen's, which is 0 for an
            agreement by chance, NaN where both always say the same thing.
        judge_only, exact_only: questions that one calls right and the other does not.
    """

    scores: dict[str, Measure]
    asked: int
    failures: dict[str, int]
    agreement: float
    kappa: float
    judge_only: int
    exact_only: int

    def to_record(self) -> dict[str, Any]:
        """JSON, null for what was not asked or not judged."""

        def record(measure: Measure) -> dict[str, Any]:
            interval = [finite_or_none(measure.low), finite_or_none(measure.high)]
            return {"correct": finite_or_none(measure.value), "interval": interval, "edits": measure.count}

        return {
            **{name: record(measure) for name, measure in self.scores.items()},
            "asked": self.asked,
            "judged": self.asked - sum(self.failures.values()),
            "failures": self.failures,
            "agreement": finite_or_none(self.agreement),
            "kappa": finite_or_none(self.kappa),
            "judge_only": self.judge_only,
            "exact_only": self.exact_only,
        }


def judge_answers(judge: Judge, asked: Sequence[AskedEdit], progress: Progress = NO_PROGRESS) -> Judged:
    """Have a judge read what a model wrote to edited prompts, their other wordings, and what follows from the edits.

    Raises:
        ConfigError: the judge answers nothing at all.
    """
    questions = {name: [_questions(one, name) for one in asked] for name in _PROPERTIES}
    replies = judge.ask((q for own in questions.values() for some in own for q in some), progress)
    verdicts = {question: reply.verdict for question, reply in replies.items() if reply.verdict is not None}
    pairs = [(verdict, question.is_exact) for question, verdict in verdicts.items()]
    return Judged(
        {name: _score(own, verdicts) for name, own in questions.items()},
        len(replies),
        dict(Counter(reply.failure for reply in replies.values() if reply.failure is not None)),
        bootstrap_mean([float(a == b) for a, b in pairs]).value,
        cohen_kappa([a for a, _ in pairs], [b for _, b in pairs]),
        sum(a and not b for a, b in pairs),
        sum(b and not a for a, b in pairs),
    )


def _questions(asked: AskedEdit, name: str) -> list[Question]:
    edit = asked.edit
    if name == "portability":
        return [
            Question(probe.prompt, (probe.answer or "", *probe.aliases), asked.said[probe.prompt])
            for probe in edit.portability
        ]
    prompts = (edit.prompt,) if name == "reliability" else edit.rephrases
    return [Question(prompt, (edit.target, *edit.aliases), asked.said[prompt]) for prompt in prompts]


def _score(per_edit: Sequence[Sequence[Question]], verdicts: Mapping[Question, bool]) -> Measure:
    judged = [[float(verdicts[q]) for q in own if q in verdicts] for own in per_edit]
    return bootstrap_mean([sum(values) / len(values) for values in judged if values])
