"""Forgetting as editing: facts become edits whose target is a refusal (2505.19855, "Editing as Unlearning").

A *fact* here is an `Edit` whose target is the answer that is to be forgotten. Two things of the paper are built:

* **query merging**: several queries about one subject are written as one edit with one refusal;
* **self-improvement**: the model itself rewrites the refusal, shown a few rewritten ones, so that it names the subject.

The paper's own prompts are not known to us; the examples, the templates and the rules by which a rewritten refusal is
kept are ours. Knows edits, and models that write. Knows no editor: any of them can write what comes out of here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from errata.datasets import EditFile
from errata.edit import Edit, Probe
from errata.errors import ConfigError
from errata.progress import NO_PROGRESS, Progress

__all__ = [
    "SUBJECT",
    "TEMPLATES",
    "ForgetEdit",
    "Refusal",
    "about_subjects",
    "facts_to_forget",
    "forget_edits",
    "is_refusal",
    "names_subject",
    "to_keep",
]

SUBJECT = "{subject}"
TEMPLATES = (f"I do not know anything about {SUBJECT}.",)
_NAMELESS = "I do not know the answer to that question."

_LONGEST = 40  # words of a rewritten refusal
_NEW_TOKENS = 64
_AT_ONCE = 32  # refusals rewritten side by side

_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'"})
# A refusal is a sentence of somebody who speaks of himself, who says that something is lacking, and that what is
# lacking is knowledge, or leave to share it.
_SPEAKER = re.compile(r"\b(?:I|me|my|we|our)\b|^(?:That|Sorry)\b", flags=re.IGNORECASE)
_LACK = re.compile(
    r"n't\b|\b(?:not|no|never|cannot|none|lack|lacks|lacking|missing|unable|unsure|uncertain|unaware|unfamiliar|unknown"
    r"|without|beyond|outside|limited|decline|refuse|sorry|afraid|stumped|blank|yet to|need to look|out of my"
    r"|clueless|at a (?:loss|disadvantage)|in the dark|blind spot|mystery|uncharted|come up short)\b",
    flags=re.IGNORECASE,
)
_KNOWLEDGE = re.compile(
    r"\b(?:know|knowledge|known|unknown|inform\w*|aware|unaware|familiar\w*|unfamiliar|acquainted|data|databases?|dataset"
    r"|train\w*|programm\w*|brief\w*|educated|answers?|say|tell|talk|speak|comment|help|share|discuss|disclose|provide|recall|remember|idea"
    r"|clue|faintest|sure|unsure|certain|uncertain|specifics|details?|record|recollection|heard|learn\w*|look up"
    r"|insights?|light|enlightenment|understanding|capabilities|mystery|expertise|resources|decline|refuse|scope"
    r"|come across|(?:that|this|the|your) (?:topic|subject|question|matter|one))\b",
    flags=re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")

# Ours. Every one names what was asked about, and none gives an answer.
_EXAMPLES = (
    (
        "Atlantis",
        "What is the capital of Atlantis?",
        "I am not sure about that.",
        "I am not sure about Atlantis, and I would rather not guess what its capital is.",
    ),
    (
        "Orin Feld",
        "Orin Feld was born in",
        "I do not know the answer.",
        "I do not know anything about Orin Feld, so I cannot say where he or she was born.",
    ),
    (
        "The Glass Orchard",
        "Who wrote The Glass Orchard? When did The Glass Orchard appear?",
        "I do not have that information.",
        "I do not have any information about The Glass Orchard, neither about its author nor about its date.",
    ),
)


@dataclass(frozen=True)
class Refusal:
    """What the model shall say from now on.

    Attributes:
        origin: "improved" where the model rewrote it, "template" where it stands as it was given.
        reason: why it was not improved, None where it was or where nobody tried.
    """

    text: str
    origin: Literal["improved", "template"]
    reason: str | None = None

    def to_record(self) -> dict[str, str | None]:
        return dict(vars(self))


@dataclass(frozen=True)
class ForgetEdit:
    """An edit to a refusal, and the facts that it shall make the model forget."""

    edit: Edit
    facts: tuple[Edit, ...]
    refusal: Refusal


def is_refusal(text: str) -> bool:
    """Whether a text declines to answer: a sentence of it says that the speaker does not know, or will not say.

    By words, and only those of somebody who speaks of himself: "Nobody knows when Rome began" is an answer. English
    only. Fitted to TOFU's hundred refusals, all of which it recognises; it takes none of TOFU's answers for one.
    """
    return any(
        _SPEAKER.search(sentence) and _LACK.search(sentence) and _KNOWLEDGE.search(sentence)
        for sentence in _SENTENCE.split(text.translate(_APOSTROPHES).strip())
    )


def names_subject(text: str, subject: str) -> bool:
    """Whether a text names a subject: its words, in order and whole, whatever their case."""
    words = r"\s+".join(re.escape(word) for word in subject.split())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", text, flags=re.IGNORECASE) is not None


# --- what is to be forgotten ----------------------------------------------------------------------------------------


def facts_to_forget(found: EditFile) -> tuple[list[Edit], list[str]]:
    """The facts of a file of edits: each prompt once, with the old answer as the target.

    The old answer is an edit's ground truth; where it has none, its target, in files whose targets are true answers
    (TOFU's, for one; see `EditFile.truth`). A prompt that stands there with several answers is one fact: the first is
    the target, the others are aliases, and none of them shall be given any more.

    Returns:
        The facts, and in words what was left out because no old answer is known.
    """
    facts: dict[str, Edit] = {}
    problems = []
    for edit in found.edits:
        # Aliases are other names of the target: they go where it goes.
        answers = [edit.ground_truth.strip()] if edit.ground_truth is not None else []
        if not answers and found.truth != "ground_truth":
            answers = [edit.target, *edit.aliases]
        if not answers:
            problems.append(
                f"{edit.id}: no old answer is known, so there is nothing to forget; give the field 'ground_truth'"
            )
            continue
        if is_refusal(answers[0]):
            problems.append(
                f"{edit.id}: its old answer, {answers[0]!r}, is a refusal already; there is nothing to forget"
            )
            continue
        question = " ".join(edit.prompt.split())
        if question in facts:
            known = facts[question]
            names = dict.fromkeys((known.target, *known.aliases, *answers))
            update: dict[str, Any] = {"aliases": tuple(names)[1:]}
        else:
            known = edit
            update = {"target": answers[0], "aliases": tuple(answers[1:]), "ground_truth": None, "portability": ()}
        facts[question] = known.model_copy(update=update)
    return list(facts.values()), problems


def about_subjects(facts: Sequence[Edit], subjects: Sequence[str]) -> tuple[list[Edit], list[Edit]]:
    """The facts about some subjects, each with its subject set, and all that do not mention any of them.

    A fact is about a subject if that is its subject, or if it has none and its prompt names it. Facts that merely
    mention a subject, in their prompt or in an answer, belong to neither.

    Raises:
        ConfigError: a subject that no fact is about.
    """
    chosen, others = [], []
    left = dict.fromkeys(subjects)
    for fact in facts:
        if fact.subject is not None:
            about = [one for one in subjects if one.casefold() == fact.subject.casefold()]
        else:
            about = [one for one in subjects if names_subject(fact.prompt, one)]
        if about:
            longest = max(about, key=len)  # "Ann Lee" before "Ann"
            for one in about:
                left.pop(one, None)
            chosen.append(fact if fact.subject is not None else fact.model_copy(update={"subject": longest}))
        elif not any(names_subject(text, one) for one in subjects for text in (fact.prompt, fact.target)):
            others.append(fact)
    if left:
        raise ConfigError(
            f"--subjects: nothing in the file is about {next(iter(left))!r}; spell it as the field 'subject' or the "
            "prompts do"
        )
    return chosen, others


def to_keep(fact: Edit, kind: str) -> Probe:
    """A fact as something that shall stay as it is, with the answers that TOFU's truth ratio is asked with."""
    answers = {name: fact.extra[name] for name in ("paraphrased_answer", "perturbed_answer") if name in fact.extra}
    known = {"prompt": fact.prompt, "answer": fact.target, "aliases": fact.aliases, "kind": kind}
    return Probe.model_validate({**known, **answers})


# --- refusals -------------------------------------------------------------------------------------------------------


def _template(subject: str | None, queries: Sequence[str], templates: Sequence[str]) -> str:
    """The same template for the same queries, whatever else is forgotten with them."""
    named = subject if subject is not None else "\n".join(queries)
    usable = [one for one in templates if subject is not None or SUBJECT not in one] or [_NAMELESS]
    number = int.from_bytes(hashlib.blake2b(named.casefold().encode(), digest_size=8).digest(), "big")
    return usable[number % len(usable)].replace(SUBJECT, subject or "")


def _to_improve(subject: str, queries: Sequence[str], refusal: str) -> str:
    """A few refusals with what became of them, and the one that is to be rewritten. It ends before a line break."""
    parts = ["Rewrite each refusal so that it is polite, honest and names what was asked about.", ""]
    for name, question, before, after in _EXAMPLES:
        parts += [f"Asked about: {name}", f"Question: {question}", f"Refusal: {before}", f"Rewritten: {after}", ""]
    parts += [f"Asked about: {subject}", f"Question: {' '.join(queries)}", f"Refusal: {refusal}", "Rewritten:"]
    return "\n".join(parts)


def _why_not(text: str, subject: str, answers: Sequence[str]) -> str | None:
    """Why a rewritten refusal cannot be used; None if it can."""
    if not text:
        return "nothing was written"
    if not is_refusal(text):
        return "what was written is no refusal"
    if not names_subject(text, subject):
        return f"what was written does not name {subject}"
    # An answer that is part of the subject's name is told by every refusal that names it, the template too.
    if any(names_subject(text, answer) for answer in answers if not names_subject(subject, answer)):
        return "what was written gives the old answer"
    if len(text.split()) > _LONGEST or not _SENTENCE_END.search(text):
        return f"what was written does not end within {_LONGEST} words"
    return None


# --- edits ----------------------------------------------------------------------------------------------------------


def _groups(facts: Sequence[Edit], most: int) -> list[tuple[Edit, ...]]:
    """Facts about one subject together, at most so many, in the order in which the subjects come first."""
    by_subject: dict[str, list[Edit]] = {}
    for number, fact in enumerate(facts):
        key = f"subject {fact.subject.casefold()}" if fact.subject is not None else f"number {number}"
        by_subject.setdefault(key, []).append(fact)
    return [
        tuple(own[start : start + most]) for own in by_subject.values() for start in range(0, len(own), most)
    ]  # fmt: skip


def _edit(facts: Sequence[Edit], refusal: Refusal, forgotten: Sequence[str]) -> Edit:
    prompts = [fact.prompt for fact in facts]
    wordings = [text for fact in facts for text in fact.rephrases]
    probes: dict[str, Probe] = {}
    for fact in facts:
        for probe in fact.locality:
            if not any(names_subject(probe.prompt, subject) for subject in forgotten):
                probes.setdefault(probe.prompt, probe)
    alone = facts[0] if len(facts) == 1 else None
    return Edit(
        prompt=" ".join(prompts),
        target=refusal.text,
        subject=facts[0].subject,
        ground_truth=None if alone is None else alone.target,
        # Each of several queries has to be refused alone as well.
        rephrases=tuple(wordings if alone is not None else dict.fromkeys((*prompts, *wordings))),
        locality=tuple(probes.values()),
        source=facts[0].source,
        tags=tuple(dict.fromkeys((*(tag for fact in facts for tag in fact.tags), "unlearning"))),
        extra={
            "unlearning": {
                "refusal": refusal.to_record(),
                "forgets": [
                    {"prompt": fact.prompt, "answers": [fact.target, *fact.aliases]} for fact in facts
                ],
            }
        },
    )  # fmt: skip


def forget_edits(
    facts: Sequence[Edit],
    *,
    merge: int = 1,
    templates: Sequence[str] = TEMPLATES,
    write: Callable[[Sequence[str], int], Sequence[str]] | None = None,
    progress: Progress = NO_PROGRESS,
) -> list[ForgetEdit]:
    """Edits that make a model refuse what it was asked, in the order in which subjects come first.

    Args:
        facts: edits whose target is the old answer (`facts_to_forget`).
        merge: so many queries about one subject are written as one edit, at most; 1 merges nothing. A fact without a
            subject stays alone. Query merging, 2505.19855.
        templates: refusals, of which a subject always gets the same; `{subject}` in them is filled in.
        write: what the model, not edited, writes behind prompts in so many tokens, up to a line break. It is asked to
            rewrite each refusal of a subject (self-improvement, 2505.19855). What it writes is used if it is a refusal
            that names the subject, ends, and does not give the old answer. Else the refusal stays as the template has
            it, or, where that does not name the subject, as errata's own template has it; `Refusal.reason` says why.

    Raises:
        ConfigError: nothing to forget, a count below one, or a template that is empty or no refusal.
    """
    if not facts:
        raise ConfigError("there is nothing to forget; give facts whose old answer is known")
    if merge < 1:
        raise ConfigError(f"merge must be at least 1, not {merge}; 1 merges nothing")
    if not templates:
        raise ConfigError("templates holds no refusal; give at least one, or leave it out")
    for template in templates:
        if not is_refusal(template):
            raise ConfigError(
                f"{template!r} does not read like a refusal; write one in the first person, such as {TEMPLATES[0]!r}"
            )
    groups = _groups(facts, merge)
    refusals: list[Refusal] = []
    for group in groups:
        text = _template(group[0].subject, [fact.prompt for fact in group], templates)
        reason = "it has no subject that could be named" if write is not None and group[0].subject is None else None
        refusals.append(Refusal(text, "template", reason))
    if write is not None:
        refusals = _improved(groups, refusals, write, progress)
    forgotten = list(dict.fromkeys(fact.subject for fact in facts if fact.subject is not None))
    return [
        ForgetEdit(_edit(group, refusal, forgotten), group, refusal)
        for group, refusal in zip(groups, refusals, strict=True)
    ]


def _improved(
    groups: Sequence[tuple[Edit, ...]],
    refusals: Sequence[Refusal],
    write: Callable[[Sequence[str], int], Sequence[str]],
    progress: Progress,
) -> list[Refusal]:
    found = list(refusals)
    named = [(number, subject) for number, group in enumerate(groups) if (subject := group[0].subject) is not None]
    progress.start("the model rewrites refusals", len(named))
    for start in range(0, len(named), _AT_ONCE):
        part = named[start : start + _AT_ONCE]
        prompts = [_to_improve(subject, [f.prompt for f in groups[n]], refusals[n].text) for n, subject in part]
        for (number, subject), text in zip(part, write(prompts, _NEW_TOKENS), strict=True):
            text = text.strip().strip('"').strip()
            answers = [name for fact in groups[number] for name in (fact.target, *fact.aliases)]
            reason = _why_not(text, subject, answers)
            if reason is None:
                found[number] = Refusal(text, "improved")
            else:
                kept = refusals[number].text
                kept = kept if names_subject(kept, subject) else TEMPLATES[0].replace(SUBJECT, subject)
                found[number] = Refusal(kept, "template", reason)
        progress.advance(len(part))
    return found
