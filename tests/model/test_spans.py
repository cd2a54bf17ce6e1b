"""Where the subject stands, in tokens: with a beginning token, either padding, bytes or marked spaces, any script."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import SpanError
from errata.model.spans import find_subject, locate_subject, spellings
from errata.testing import byte_tokenizer, metaspace_tokenizer, tiny_model

SUBJECTS = st.text(st.characters(categories=("L", "N"), include_characters=" -'é東🙂"), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)
AROUND = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=15)


@settings(deadline=None, max_examples=150)
@given(AROUND, SUBJECTS, AROUND)
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), metaspace_tokenizer()], ids=["bytes", "marked spaces"])
def test_the_span_covers_the_subject_and_ends_with_it(tokenizer: object, before: str, subject: str, after: str) -> None:
    prompt = f"{before} {subject} {after}"
    span = locate_subject(tokenizer, prompt, subject)  # type: ignore[arg-type]
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[operator]
    assert prompt[span.start : span.stop].casefold() == subject.strip().casefold()
    first, last = offsets[span.first], offsets[span.last]
    assert first[0] <= span.start < first[1]
    assert last[0] < span.stop <= last[1] or (last[0] < span.stop and not prompt[span.stop : last[1]].strip())
    assert all(a >= span.stop for a, b in offsets[span.last + 1 :] if b > a)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), metaspace_tokenizer()], ids=["bytes", "marked spaces"])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("France has the capital", "France"),
        ("The capital of France", "France"),
        ("Zürich is a city", "Zürich"),
        ("東京 is the capital of Japan", "東京"),
        ("Who wrote A Doll's House?", "A Doll's House"),
        ("Is 🙂 happy", "🙂"),
    ],
)
def test_the_last_token_decodes_to_the_end_of_the_subject(tokenizer: object, prompt: str, subject: str) -> None:
    span = locate_subject(tokenizer, prompt, subject)  # type: ignore[arg-type]
    whole = tokenizer.decode(list(span.ids[span.first : span.last + 1]))  # type: ignore[attr-defined]
    assert whole.strip() == subject
    assert span.ids[0] == 1, "the beginning token is counted"
    assert span.first >= 1


def test_of_several_occurrences_the_last_whole_word_counts() -> None:
    assert find_subject("Ann met Anna, and Ann left", "Ann") == (18, 21)
    assert find_subject("Ann met Anna", "Ann") == (0, 3)
    assert find_subject("Ann met Anna, and Ann left", "Ann", "first") == (0, 3)
    assert find_subject("Joanna sang", "anna") == (2, 6)
    assert find_subject("the BEATLES sang", "Beatles") == (4, 11)


@pytest.mark.parametrize("subject", ["Spain", " "])
def test_a_subject_that_is_not_there_is_an_error(subject: str) -> None:
    with pytest.raises(SpanError, match=r"Spain|empty"):
        find_subject("The capital of France", subject)


def test_a_slow_tokenizer_is_refused_with_the_remedy() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(SpanError, match="fast tokenizer"):
        locate_subject(Slow(), "France is", "France")  # type: ignore[arg-type]


def named(tokenizer: object, ways: tuple[tuple[int, ...], ...], text: str) -> bool:
    """Whether the ids of a text have one of these runs in them."""
    ids = tokenizer(text)["input_ids"]  # type: ignore[operator]
    return any(list(way) == ids[at : at + len(way)] for way in ways for at in range(len(ids)))


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), metaspace_tokenizer()], ids=["bytes", "marked spaces"])
@pytest.mark.parametrize("subject", ["France", "Zürich", "the book", "🙂 & Co"])
def test_a_subject_is_known_by_its_tokens_wherever_it_stands(tokenizer: object, subject: str) -> None:
    ways = spellings(tokenizer, f"Who is {subject} then", subject)  # type: ignore[arg-type]
    assert len(set(ways)) == len(ways) > 1
    assert all(ways)
    for text in (f"Who is {subject} then", f"{subject} is here", f"Of {subject}", f"Ann, {subject}, and Bob"):
        assert named(tokenizer, ways, text), text
        assert named(tokenizer, ways, text.replace(subject, subject[0].swapcase() + subject[1:])), text
    for text in ("Who is Berlin then", "x", subject[1:] + subject[:1]):
        assert not named(tokenizer, ways, text), text


def test_a_subject_within_other_characters_is_known_as_the_prompt_has_it() -> None:
    tokenizer = byte_tokenizer()
    prompt = "the(France)x"
    ways = spellings(tokenizer, prompt, " France ")
    assert named(tokenizer, ways, prompt)
    # One that the prompt does not have is known by itself all the same, and a slow tokenizer does without offsets.
    assert spellings(tokenizer, "Who?", "France") == spellings(tokenizer, "of France", "France")

    class Slow:
        is_fast = False

        def __call__(self, text: str, **settings: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    assert (32, 65, 66) in spellings(Slow(), "AB", "AB")  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_follow_the_padding(side: str) -> None:
    model = tiny_model("llama")
    prompts = ["France is", "The capital of the country of France is"]
    batch = model.batch([model.passage(p) for p in prompts], side=side)  # type: ignore[arg-type]
    for row, prompt in enumerate(prompts):
        span = model.subject_span(prompt, "France")
        column = int(batch.starts[row]) + span.last
        assert model.tokenizer.decode([int(batch.ids[row, column])]).strip() in ("France", "e", "ance")
        assert int(batch.positions[row, column]) == span.last
