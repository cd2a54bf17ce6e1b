"""The guard: what a batch of edits did to the model as a whole, and whether it may stay.

Weights that are changed act on every text. Edits that each look right can add up to a model that says nothing sensible
any more, or a single one can explode ("disabling edits", 2403.07175; collapse, 2402.09656, where perplexity is found to
tell it). So after every batch four things are looked at:

* whether everything is finite;
* how much the batch added to the norm of each matrix's change, in norms of the matrix;
* how well conditioned the system was that the method solved, if it says so (`Written.condition`);
* the perplexity of a short fixed prose under this adapter alone, against the base model's.

Perplexity decides, because the others do not say what was harmed: on atlas fine-tuning changes a matrix by one and a
half times its norm before prose suffers, and a change that leaves ordinary keys alone may be as large as it likes.
Where nothing was learnt, nothing can be lost: on a model that finds the prose less likely than chance does (a random
one, or one of another language) perplexity only has to be finite.

Adapters with a router are not guarded: what matches no edit is answered by the base model, bit for bit, and what an
edit writes is checked when it is written (`adapters.base.check_change`).

Knows models and adapters. Knows nothing of how edits are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from errata.adapters import Adapter
from errata.datasets.builtin import held_out_texts
from errata.edit import Edit
from errata.model import EditableModel
from errata.model.anatomy import output_width

__all__ = ["Guard", "GuardMode", "GuardRecord", "Verdict", "guard_summary", "guard_words"]

Verdict = Literal["ok", "warn", "collapse"]
GuardMode = Literal["refuse", "warn", "off"]

_SEVERITY: dict[Verdict, int] = {"ok": 0, "warn": 1, "collapse": 2}

# Perplexity as a multiple of the base model's; its logarithm is the mean rise of the loss, in nats per token. Over five
# hundred tokens that is known to about 0.06 once damage shows (docs/guard.md). A tenth more (0.10) is then just told
# from nothing; half more (0.41) clearly, and also from a doubling (0.69), before which a collapse is to be called.
_WARN_RISE, _COLLAPSE_RISE = 1.1, 1.5
# All texts are read only where the first has become less likely by this much: most batches cost some fifty tokens.
_LOOK_CLOSER = 1.05
# A batch after which a matrix's change is longer by the matrix's own norm: it is less an edit than another matrix.
_WARN_GROWTH = 1.0
# A solve in float64 loses as many digits as the condition has. From 1e8 on fewer are left than factors in float32 hold;
# from the inverse of float64's epsilon on, none.
_WARN_CONDITION, _COLLAPSE_CONDITION = 1e8, 4.5e15

_EVALUATED = 300  # the first held-out texts are those that evaluation reads by default
_TEXTS = 12
_MAX_LENGTH = 128  # tokens of a text: all of it, unless a token is a letter


@dataclass(frozen=True)
class GuardRecord:
    """What was found after one batch.

    Attributes:
        edit_ids: the batch; kept: False where it was taken back.
        reasons: what is not as it should be, in words, the worst first.
        relative_norms: by module, the norm of the adapter's whole change over the base weight's.
        perplexity, base_perplexity: of the prose that was read, with the adapter and without; None where it was not
            read or is no finite number.
        condition: of the system that was solved, if the method says it.
    """

    edit_ids: tuple[str, ...]
    verdict: Verdict
    kept: bool
    reasons: tuple[str, ...]
    relative_norms: dict[str, float]
    perplexity: float | None
    base_perplexity: float | None
    condition: float | None

    def to_record(self) -> dict[str, Any]:
        """As JSON, with None for what is no finite number."""
        norms = {module: _finite(norm) for module, norm in self.relative_norms.items()}
        return {**asdict(self), "relative_norms": norms, "condition": _finite(self.condition)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def guard_summary(records: Sequence[GuardRecord]) -> dict[str, Any] | None:
    """All batches in one JSON object: how many got which verdict, and the last of the worst. None where none was
    guarded."""
    if not records:
        return None
    counts: dict[str, int] = {verdict: sum(record.verdict == verdict for record in records) for verdict in _SEVERITY}
    # The last of equals: what a run has come to.
    worst = max(reversed(records), key=lambda record: _SEVERITY[record.verdict])
    return {"batches": len(records), **counts, "taken_back": sum(not r.kept for r in records), **worst.to_record()}


def guard_words(records: Sequence[GuardRecord]) -> str:
    """What was found after one batch or more, on one line."""
    found = guard_summary(records)
    assert found is not None
    counted = ", ".join(f"{found[verdict]} {verdict}" for verdict in _SEVERITY if found[verdict])
    taken_back = f", {found['taken_back']} taken back" if found["taken_back"] else ""
    reasons = "".join(f"; {reason}" for reason in found["reasons"])
    return f"guard: of {found['batches']} batches {counted}{taken_back}{reasons}"


class Guard:
    """Watches one adapter that changes weights.

    Args:
        adapter: attached to the model.
        mode: "refuse" takes a batch back that is called a collapse, "warn" only says so.
    """

    def __init__(self, model: EditableModel, adapter: Adapter, mode: GuardMode = "refuse") -> None:
        self._model, self._adapter, self._mode = model, adapter, mode
        self._texts = held_out_texts(_EVALUATED + _TEXTS)[_EVALUATED:]
        with model.bare():
            # By how many of the texts are read.
            self._base = {count: self._read(count) for count in (1, _TEXTS)}
        self._can_read = self._base[_TEXTS] < output_width(model.module(model.anatomy.head))
        self._measured: tuple[tuple[int, ...], dict[str, float]] = (), {}
        self._norms_before: dict[str, float] = {}
        self._restore: Callable[[], None] | None = None

    def begin(self) -> None:
        """Before a batch is written: what the adapter goes back to."""
        self._norms_before = self._relative_norms()
        self._restore = self._adapter.snapshot()

    def examine(self, edits: Sequence[Edit], condition: float | None = None, *, force: bool = False) -> GuardRecord:
        """After it was written. A batch that is called a collapse is taken back, unless `force` or the mode keep it."""
        assert self._restore is not None, "begin() comes before"
        norms = self._relative_norms()
        found = [self._of_norm(module, norm) for module, norm in norms.items()]
        if condition is not None:
            found.append(_of_condition(condition))
        perplexity = base = None
        if all(math.isfinite(norm) for norm in norms.values()):
            perplexity, base = self._perplexity()
            found.append(self._of_perplexity(perplexity, base))
        problems = sorted((f for f in found if f is not None), key=lambda problem: -_SEVERITY[problem[0]])
        verdict: Verdict = problems[0][0] if problems else "ok"
        kept = verdict != "collapse" or force or self._mode != "refuse"
        if not kept:
            self._restore()
        self._restore = None  # it holds on to what the batch has replaced
        return GuardRecord(
            tuple(edit.id for edit in edits),
            verdict,
            kept,
            tuple(words for _, words in problems),
            dict(norms),
            _finite(perplexity),
            _finite(base),
            condition,
        )

    def _read(self, count: int) -> float:
        """Perplexity of the first texts, with whatever acts now."""
        return self._model.perplexity(self._texts[:count], max_length=_MAX_LENGTH)

    def _relative_norms(self) -> dict[str, float]:
        versions = tuple(one.version for one in self._adapter.contributions().values())
        if versions != self._measured[0]:
            changes = self._adapter.layer_changes(self._model)
            self._measured = versions, {change.module: change.relative_norm for change in changes}
        return self._measured[1]

    def _perplexity(self) -> tuple[float, float]:
        """With the adapter and without it; of one text, and of all of them where that one has become less likely."""
        for count in self._base:
            with self._model.selecting(self._adapter.name):
                now = self._read(count)
            if now < _LOOK_CLOSER * self._base[count] or not self._can_read:
                break
        return now, self._base[count]

    def _of_norm(self, module: str, norm: float) -> tuple[Verdict, str] | None:
        if not math.isfinite(norm):
            return "collapse", f"the change of {module} is not finite"
        growth = norm - self._norms_before.get(module, 0.0)
        if growth < _WARN_GROWTH:
            return None
        return "warn", f"the change of {module} became longer by {growth:.3g} times the weight's norm in one batch"

    def _of_perplexity(self, now: float, base: float) -> tuple[Verdict, str] | None:
        if not math.isfinite(base):
            return None
        if not math.isfinite(now):
            return "collapse", "the perplexity of plain prose is no finite number any more"
        rise = now / base
        if rise < _WARN_RISE or not self._can_read:
            return None
        verdict: Verdict = "collapse" if rise >= _COLLAPSE_RISE else "warn"
        return verdict, (
            f"the perplexity of plain prose is {now:.4g}, {rise:.2f} times the base model's {base:.4g} ({_WARN_RISE} "
            f"times is a warning, {_COLLAPSE_RISE} a collapse)"
        )


def _of_condition(condition: float) -> tuple[Verdict, str] | None:
    if condition < _WARN_CONDITION:
        return None
    verdict: Verdict = "warn" if condition < _COLLAPSE_CONDITION else "collapse"
    digits = max(0, round(-math.log10(condition * 2.2e-16))) if math.isfinite(condition) else 0
    return verdict, f"the system that was solved has condition {condition:.1e}, which leaves {digits} correct digits"
