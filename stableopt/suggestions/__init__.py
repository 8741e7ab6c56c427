"""`suggest`: the largest linearly stable learning rates of SGD and AdamW at a point, by batch size."""

from stableopt.suggestions.result import Suggestion, Suggestions
from stableopt.suggestions.suggest import suggest

__all__ = ["Suggestion", "Suggestions", "suggest"]
