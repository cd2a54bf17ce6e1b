"""Measuring: what an edit achieved, and what else it changed."""

from errata.evaluation.comparison import Comparison
from errata.evaluation.metrics import Measure, Score, finite_or_none
from errata.evaluation.protocol import PROTOCOL, Checkpoint, Examination, Result, run_sequence
from errata.evaluation.provenance import run_provenance

__all__ = [
    "PROTOCOL",
    "Checkpoint",
    "Comparison",
    "Examination",
    "Measure",
    "Result",
    "Score",
    "finite_or_none",
    "run_provenance",
    "run_sequence",
]
