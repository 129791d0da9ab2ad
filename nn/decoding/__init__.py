"""From scores to answers, and how good the answers are."""

from .beams import beam_search
from .cliques import batched_maximal_cliques, maximal_cliques
from .event_metrics import EventScores, count_matches
from .events import decode_event_batch, decode_events
from .filters import no_repeat_ngram, repetition_penalty, top_k_filter, top_p_filter
from .generation import Decoder, FunctionDecoder, greedy, sample
from .rules import Constraint, prefix_constraint

__all__ = [
    "Constraint",
    "Decoder",
    "EventScores",
    "FunctionDecoder",
    "batched_maximal_cliques",
    "beam_search",
    "count_matches",
    "decode_event_batch",
    "decode_events",
    "greedy",
    "maximal_cliques",
    "no_repeat_ngram",
    "prefix_constraint",
    "repetition_penalty",
    "sample",
    "top_k_filter",
    "top_p_filter",
]
