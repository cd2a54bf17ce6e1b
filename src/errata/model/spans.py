"""Where a subject stands in a prompt, in tokens.

Knows texts and tokenizers; knows no model. The prompt is tokenised once, whole, and tokens are matched to the
subject's characters by offsets. Tokenising the parts and counting, as older code does, goes wrong when pairs merge
across the border, when a beginning token is added in one call only, or under left padding.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from errata.errors import SpanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SubjectSpan", "find_subject", "locate_subject", "spellings"]


@dataclass(frozen=True)
class SubjectSpan:
    """A subject in a tokenised prompt.

    Attributes:
        ids: token ids of the whole prompt, special tokens included, without padding.
        first, last: indices into `ids` of the first and last token that overlap the subject.
        start, stop: the subject's characters in the prompt.
    """

    ids: tuple[int, ...]
    first: int
    last: int
    start: int
    stop: int


def find_subject(prompt: str, subject: str, occurrence: Literal["first", "last"] = "last") -> tuple[int, int]:
    """Start and stop of the subject's characters in the prompt.

    Whole words are preferred ("Ann" is not found inside "Anna" while another "Ann" stands alone). The last
    occurrence is the default, because only there has the model read everything said of the subject before.

    Raises:
        SpanError: the subject is empty or does not occur.
    """
    if not subject.strip():
        raise SpanError(f"the subject of {prompt!r} is empty; give the words of the prompt that name it")
    subject = subject.strip()
    pattern = re.escape(subject)
    found = [m.span() for m in re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt)]
    found = found or [m.span() for m in re.finditer(pattern, prompt)]
    found = found or [m.span() for m in re.finditer(pattern, prompt, flags=re.IGNORECASE)]
    if not found:
        raise SpanError(f"the subject {subject!r} does not occur in the prompt {prompt!r}; it must be spelled as there")
    return found[0] if occurrence == "first" else found[-1]


def locate_subject(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    occurrence: Literal["first", "last"] = "last",
) -> SubjectSpan:
    """Tokenise a prompt and find the tokens of its subject.

    Raises:
        SpanError: the subject does not occur, or the tokenizer cannot report offsets.
    """
    start, stop = find_subject(prompt, subject, occurrence)
    if not getattr(tokenizer, "is_fast", False):
        raise SpanError(
            f"{type(tokenizer).__name__} does not report character offsets, which finding the subject needs; load "
            "the fast tokenizer of this model (tokenizer.json)"
        )
    encoding = tokenizer(prompt, return_offsets_mapping=True, padding=False)
    overlapping = [index for index, (a, b) in enumerate(encoding["offset_mapping"]) if b > a and a < stop and b > start]
    if not overlapping:
        raise SpanError(f"no token of {prompt!r} overlaps its subject {subject!r}; does the tokenizer drop characters?")
    return SubjectSpan(tuple(encoding["input_ids"]), overlapping[0], overlapping[-1], start, stop)


def spellings(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str) -> tuple[tuple[int, ...], ...]:
    """The token ids by which a text may name a subject: as the prompt does, and as it would stand elsewhere.

    With and without a space before it, and with its first letter large or small. Whatever a tokenizer makes of it
    within other words is not among them.
    """
    subject = subject.strip()
    forms = dict.fromkeys((subject, subject[:1].upper() + subject[1:], subject[:1].lower() + subject[1:]))
    found = [
        tuple(tokenizer(before + form, add_special_tokens=False, padding=False)["input_ids"])
        for form in forms
        for before in (" ", "")
    ]
    if getattr(tokenizer, "is_fast", False):
        with suppress(SpanError):
            span = locate_subject(tokenizer, prompt, subject)
            found.append(span.ids[span.first : span.last + 1])
    return tuple(dict.fromkeys(way for way in found if way))
