"""Measuring: what an edit achieved, and what else it changed."""

from errata.evaluation.comparison import Comparison
from errata.evaluation.metrics import Measure, Score
from errata.evaluation.protocol import PROTOCOL, Checkpoint, Examination, Result, run_sequence

__all__ = ["PROTOCOL", "Checkpoint", "Comparison", "Examination", "Measure", "Result", "Score", "run_sequence"]
