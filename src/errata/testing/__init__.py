"""For tests of errata and of methods that others add: tiny models and the suite every method runs."""

from errata.testing.conformance import Case, check_editor, conformance_checks
from errata.testing.models import FAMILIES, byte_tokenizer, metaspace_tokenizer, tiny_hf_model, tiny_model

__all__ = [
    "FAMILIES",
    "Case",
    "byte_tokenizer",
    "check_editor",
    "conformance_checks",
    "metaspace_tokenizer",
    "tiny_hf_model",
    "tiny_model",
]
