"""From scores to answers, and how good the answers are."""

from .cliques import batched_maximal_cliques, maximal_cliques
from .event_metrics import EventScores, count_matches
from .events import decode_event_batch, decode_events

__all__ = [
    "EventScores",
    "batched_maximal_cliques",
    "count_matches",
    "decode_event_batch",
    "decode_events",
    "maximal_cliques",
]
