"""atlas's capability items as lm-evaluation-harness wants them, scored as `errata atlas info` scores them.

The harness finds these functions by name from the YAML files beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["documents", "score"]


def documents(capability: str, **_: Any) -> dict[str, Any]:
    """The fixed test items of one capability, as a data set with the split "test"."""
    from datasets import Dataset
    from errata.atlas.capabilities import CAPABILITIES

    items = CAPABILITIES[capability].test
    rows = [{"prompt": item.prompt, "answer": item.answer, "after": item.after or ""} for item in items]
    return {"test": Dataset.from_list(rows)}


def score(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer, or the result that a worked-out answer comes to, is right."""
    from errata.atlas.capabilities import Item
    from errata.atlas.examine import examine_item

    item = Item(document["prompt"], document["answer"], "", after=document["after"] or None)
    return {"exact": float(examine_item(results[0], item))}
