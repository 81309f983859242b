"""Push, pull and model cards: the only package of this project that sends requests to the Hub."""

from .download import PullResult, pull
from .facts import FACTS_NAME, ClassScore, ConfusionMatrix, DataFacts, Metric, SplitFacts, TrainingFacts
from .model_card import CARD_NAME, CardSource, is_edited, render_card
from .publish import PushResult, push
from .remote import HubError
from .staging import Card, PushedFile

__all__ = [
    "CARD_NAME", "FACTS_NAME", "Card", "CardSource", "ClassScore", "ConfusionMatrix", "DataFacts", "HubError",
    "Metric", "PullResult", "PushResult", "PushedFile", "SplitFacts", "TrainingFacts", "is_edited", "pull", "push",
    "render_card",
]  # fmt: skip
