"""From scores to answers, and how good the answers are."""

from .answer_metrics import AnswerScores, answer_f1, best_threshold, exact_match
from .answer_spans import best_pairs, best_spans, likely_spans
from .argument_metrics import ArgumentScores
from .beams import beam_search
from .cliques import batched_maximal_cliques, maximal_cliques
from .event_metrics import EventScores, count_matches
from .events import decode_event_batch, decode_events
from .filters import no_repeat_ngram, repetition_penalty, top_k_filter, top_p_filter
from .generation import Decoder, FunctionDecoder, greedy, sample
from .half_pointers import pair_nearest
from .relations import decode_relation_batch, merge_slots
from .rules import Constraint, prefix_constraint
from .spans import positive_spans
from .tags import TagScheme
from .typed_metrics import TypedScores
from .viterbi import best_paths
from .voting import vote
from .windows import merge_windows

__all__ = [
    "AnswerScores",
    "ArgumentScores",
    "Constraint",
    "Decoder",
    "EventScores",
    "FunctionDecoder",
    "TagScheme",
    "TypedScores",
    "answer_f1",
    "batched_maximal_cliques",
    "beam_search",
    "best_pairs",
    "best_paths",
    "best_spans",
    "best_threshold",
    "count_matches",
    "decode_event_batch",
    "decode_events",
    "decode_relation_batch",
    "exact_match",
    "greedy",
    "likely_spans",
    "maximal_cliques",
    "merge_slots",
    "merge_windows",
    "no_repeat_ngram",
    "pair_nearest",
    "positive_spans",
    "prefix_constraint",
    "repetition_penalty",
    "sample",
    "top_k_filter",
    "top_p_filter",
    "vote",
]
