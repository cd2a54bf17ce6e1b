"""errata corrects what a language model believes, and can say what it did, what it cost, and take it back."""

__version__ = "0.1.0"
