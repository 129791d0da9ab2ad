"""LIC2020 reading comprehension: an encoder over question and passage that points at the answer.

Shapes: B questions, R rows (windows of their passages), T tokens, D features, P targets, K candidates.

Two softmaxes over the places of a window ask for the first and the last token of the answer, or one softmax over all
pairs asks for both; [CLS] stands for "not in this window". Candidates of all windows vote by their text.

Source: https://kexue.fm/archives/7321; windows, pairs and [CLS] as in CLUE-bert4keras.  Checked against:
`BertForQuestionAnswering` of transformers, a search over all spans.  Expected: see conf/experiment/mrc_*.yaml.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...nn.decoding import best_pairs, best_spans
from ...nn.decoding.answer_metrics import Counting
from ...nn.decoding.answer_spans import Spans
from ...nn.decoding.voting import Voting
from ...nn.heads import PairHead, SpanHead
from ...nn.losses.answer_span import Several, pair_loss, position_loss
from ...nn.optim import OptimizerFactory
from ...nn.transformer import Transformer, TransformerConfig, encode
from ...nn.transformer.config import Norm, Positions
from ..schedules import Schedule, check_schedule, scheduled
from .reading import Finding, ReadingModule, elect

AnswerHead = Literal["positions", "pairs"]


class Lic2020MRC(ReadingModule):
    """Reading comprehension by a pointer into the passage.

    Args:
        vocab_size: number of token ids.
        num_segments: 2, or 3 where tokens of the passage that the question has are marked.
        max_length: longest row, for positions other than "rope".
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder.
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        head: "positions", a softmax for the first and one for the last token, or "pairs", one over both.
        head_size: width of queries and keys of "pairs".
        several: which loss a question with several answers has, see `nn.losses.answer_span`.
        max_answer: most tokens of an answer.
        num_candidates: spans of a window that are looked at, K.
        voting: how the windows agree, see `vote`.
        abstains: whether questions may have no answer; if not, the best span is always given.
        counting: how answers are compared, see `AnswerScores`.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.

    Raises:
        InputError: a value out of range.
    """

    encoder: Transformer
    head: SpanHead | PairHead

    def __init__(
        self,
        vocab_size: int,
        num_segments: int = 2,
        max_length: int = 512,
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        positions: Positions = "rope",
        norm: Norm = "pre",
        head: AnswerHead = "positions",
        head_size: int = 64,
        several: Several = "any",
        max_answer: int = 64,
        num_candidates: int = 20,
        voting: Voting = "vote",
        abstains: bool = False,
        counting: Counting = "common_string",
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        super().__init__(counting, abstains)
        for name, value, options in (
            ("head", head, AnswerHead),
            ("several", several, Several),
            ("voting", voting, Voting),
        ):
            if value not in get_args(options):
                raise InputError(f"Lic2020MRC({name}={value!r}): use one of {', '.join(get_args(options))}")
        for name, value in (("max_answer", max_answer), ("num_candidates", num_candidates)):
            if value < 1:
                raise InputError(f"Lic2020MRC({name}={value}): use 1 or more")
        check_schedule("Lic2020MRC", schedule)
        self.save_hyperparameters(ignore=["optimizer"])
        self.config = TransformerConfig(
            vocab_size,
            dim,
            num_layers,
            num_heads,
            feedforward_dim,
            dropout,
            max_length,
            positions,
            norm,
            feedforward_dropout=dropout,
            num_segments=num_segments,
        )
        self.head_kind: AnswerHead = head
        self.head_size = head_size
        self.several: Several = several
        self.max_answer = max_answer
        self.num_candidates = num_candidates
        self.voting: Voting = voting
        self.warmup_steps = warmup_steps
        self.schedule: Schedule = schedule
        self._optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=5e-4))

    def configure_model(self) -> None:
        if not hasattr(self, "encoder"):
            self.encoder = Transformer(self.config)
            dim = self.config.dim
            self.head = SpanHead(dim) if self.head_kind == "positions" else PairHead(dim, self.head_size)

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated units of the encoder."""
        return self.encoder.blocks()

    def forward(self, ids: Tensor, mask: Tensor, segments: Tensor, places: Tensor) -> Tensor:
        """Scores of the head, `(R, 2, T)` or `(R, T, T)`, for token ids `(R, T)`; see `WindowCollator`."""
        return self.head(self.encoder(ids, mask, segments), places)

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean of the cross-entropies of first and last token, or the one of pairs, given hidden states `(R, T, D)`."""
        loss = pair_loss if self.head_kind == "pairs" else position_loss
        return {"span": loss(self.head(features, batch["places"]), batch["targets"], self.several)}

    def features(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states of the rows, `(R, T, D)`."""
        return encode(self.encoder, batch)

    def find(self, features: Tensor, batch: dict[str, Any]) -> list[Finding]:
        spans, none = self.candidates(self.head(features, batch["places"]), batch["places"])
        return self.answers(spans, none, batch)

    @torch.no_grad()
    def candidates(self, scores: Tensor, places: Tensor) -> tuple[Spans, Tensor]:
        """The best spans of every row with their log-probabilities `(R, K)`, and that of "no answer here" `(R,)`."""
        logs = scores.float()
        if self.head_kind == "pairs":
            logs = logs.flatten(1).log_softmax(-1).view_as(logs)
            return best_pairs(logs, places, self.max_answer, self.num_candidates), logs[:, 0, 0]
        first, last = logs.log_softmax(-1).unbind(1)
        spans = best_spans(first, last, places, self.max_answer, self.num_candidates)
        return spans, first[:, 0] + last[:, 0]

    def answers(self, spans: Spans, none: Tensor, batch: dict[str, Any]) -> list[Finding]:
        """What the windows of each question agree upon.

        In a window, probabilities of spans with the same text add up. The margin is the log-probability of the best
        span of all windows less that of "no answer" in the window that is least sure of it.
        """
        logs, firsts, lasts = (part.tolist() for part in spans)
        rows: dict[int, list[int]] = defaultdict(list)
        for row, owner in enumerate(batch["owners"].tolist()):
            rows[owner].append(row)
        silent = none.tolist()
        found: list[Finding] = []
        for owner, record in enumerate(batch["records"]):
            groups = []
            for row in rows[owner]:
                window, candidates = batch["windows"][row], zip(logs[row], firsts[row], lasts[row], strict=True)
                groups.append(
                    [
                        (math.exp(log), window.answer(record, first, last))
                        for log, first, last in candidates
                        if log > -math.inf
                    ]
                )
            answer, _ = elect(groups, "sum", self.voting)
            highest = max(logs[row][0] for row in rows[owner])
            found.append((answer, highest - min(silent[row] for row in rows[owner])))
        return found

    def configure_optimizers(self) -> Any:
        return scheduled(self, self._optimizer(self.parameters()), self.schedule, self.warmup_steps)
