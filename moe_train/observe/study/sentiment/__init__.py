"""The study of classifiers: sets of texts, models, and what the balance loss does to their experts."""

from moe_train.observe.study.sentiment.callback import SentimentStudyCallback
from moe_train.observe.study.sentiment.result import write_sentiment_study

__all__ = ["SentimentStudyCallback", "write_sentiment_study"]
