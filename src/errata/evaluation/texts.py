"""What free text looks like after an edit: does it repeat itself, is it about the new object. Pure functions.

The two measures of ROME's CounterFact suite that look at generated text (2202.05262, appendix; its code's weights), and
how much of a long answer a text still tells.
Words are runs of letters and digits, and single marks; the original cuts with NLTK, so values differ a little.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["consistency", "fluency", "ngram_entropy", "recall_of", "words_of"]

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and marks of a text, in lower case."""
    return _WORD.findall(text.lower())


def ngram_entropy(words: Sequence[str], size: int) -> float:
    """Entropy of a text's n-grams, in bits; 0 for a text that has none."""
    counts = Counter(zip(*(words[start:] for start in range(size)), strict=False))
    total = counts.total()
    return -sum(n / total * math.log2(n / total) for n in counts.values()) if total else 0.0


def fluency(text: str) -> float:
    """Weighted entropy of pairs and triples of words, 100 · (⅔ H₂ + 4⁄3 H₃) / 2, as published; low where text repeats.

    It grows with the length of the text: compare texts of one length only. A hundred sane tokens give about 620 to 635.
    """
    words = words_of(text)
    return 100 * (2 / 3 * ngram_entropy(words, 2) + 4 / 3 * ngram_entropy(words, 3)) / 2


def consistency(text: str, references: Sequence[str], corpus: Sequence[str] = ()) -> float:
    """Cosine of the TF-IDF vectors of a text and of the references, joined; 0 where one has no words.

    Args:
        references: texts about the object that the edit names.
        corpus: documents from which the words' rarity is known; text and references themselves where there are none.
            log((1 + documents) / (1 + of them with the word)) + 1, as scikit-learn has it.
    """
    ours, theirs = Counter(words_of(text)), Counter(words_of(" ".join(references)))
    documents = [set(words_of(document)) for document in corpus] or [set(ours), set(theirs)]
    found = Counter(word for document in documents for word in document)

    def weighted(counts: Counter[str]) -> dict[str, float]:
        return {w: n * (math.log((1 + len(documents)) / (1 + found[w])) + 1) for w, n in counts.items()}

    first, second = weighted(ours), weighted(theirs)
    size = math.hypot(*first.values()) * math.hypot(*second.values())
    return sum(value * second.get(word, 0.0) for word, value in first.items()) / size if size else 0.0


def recall_of(answer: str, text: str) -> float:
    """ROUGE-L recall (Lin 2004): the longest run of the answer's words that stand in the text in this order, gaps
    allowed, as a share of the answer's words. TOFU's measure of how much of a long answer is still told.

    Marks are no words here. 0 for an answer without words.
    """
    wanted, said = ([word for word in words_of(one) if word[0].isalnum() or word[0] == "_"] for one in (answer, text))
    row = [0] * (len(said) + 1)
    for word in wanted:
        before = row
        row = [0]
        for at, other in enumerate(said):
            row.append(before[at] + 1 if word == other else max(before[at + 1], row[at]))
    return row[-1] / len(wanted) if wanted else 0.0
