"""Push, pull and model cards: the only room that talks to the Hub."""

from .facts import FACTS_NAME, ClassScore, ConfusionMatrix, DataFacts, Metric, SplitFacts, TrainingFacts

__all__ = [
    "FACTS_NAME",
    "ClassScore",
    "ConfusionMatrix",
    "DataFacts",
    "Metric",
    "SplitFacts",
    "TrainingFacts",
]
