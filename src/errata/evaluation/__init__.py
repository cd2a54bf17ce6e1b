"""Measuring: what an edit achieved, and what else it changed."""

from errata.evaluation.comparison import HORIZON, Comparison
from errata.evaluation.metrics import Measure, Score, finite_or_none
from errata.evaluation.protocol import PROTOCOL, Checkpoint, Examination, Result, Singles, run_sequence, run_singles
from errata.evaluation.provenance import run_provenance

__all__ = [
    "HORIZON",
    "PROTOCOL",
    "Checkpoint",
    "Comparison",
    "Examination",
    "Measure",
    "Result",
    "Score",
    "Singles",
    "finite_or_none",
    "run_provenance",
    "run_sequence",
    "run_singles",
]
