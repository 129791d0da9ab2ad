"""DGCNN: questions answered by dilated gated convolutions over each passage, and a vote of the passages.

Shapes: B questions, Q tokens of a question, R rows (passages, or windows of long ones), T tokens, D features.

The question becomes a vector, which joins every token of a passage. Of every token the model says how likely an answer
begins, and ends, there; both are multiplied by how likely the passage holds an answer at all, so that a passage without
one says nothing. Two versions were published: "open", over characters; and that of the competition, over words with
eight hand-made features, positions, and heads of two layers.

Source: https://kexue.fm/archives/5409 (competition), https://kexue.fm/archives/6906 (open).  Checked against: the
formulas written plainly, a search over all spans.  Expected: see conf/experiment/dgcnn_webqa.yaml.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.records import Answer
from ...errors import InputError
from ...nn.decoding import likely_spans
from ...nn.decoding.answer_metrics import Counting
from ...nn.decoding.voting import Voting
from ...nn.gated_convolution import AttentionPooling, GatedStack, GateNoise
from ...nn.losses.focal import focal_loss
from ...nn.optim import OptimizerFactory
from ...nn.transformer import Table, sinusoids
from ..schedules import Schedule, check_schedule, scheduled
from .reading import Finding, ReadingModule, elect

Version = Literal["open", "competition"]
QUESTION_DILATIONS = (1, 2, 1)
PASSAGE_DILATIONS = (1, 2, 4, 8, 16, 1)
"""Together they see 32 tokens to both sides; the last block, which sees its neighbours only, is for fine adjustment."""


class PassageReader(nn.Module):
    """Tokens of passages, `(R, T, 2 D)`, each knowing the passage around it and the question.

    Args:
        vocab_size: number of token ids.
        num_features: hand-made features of a token.
        dim: width D.
        dropout: rate on the embeddings.
        gate_rate: rate of the noise on the gates.
        version: see the module.
        word_dim: width of the frozen vectors of words that come with a batch; 0: there are none. The open version adds
            them to its characters; the competition's, where a token is a word, has them in place of a table.
    """

    def __init__(
        self,
        vocab_size: int,
        num_features: int,
        dim: int,
        dropout: float,
        gate_rate: float,
        version: Version,
        word_dim: int = 0,
    ) -> None:
        super().__init__()
        noise: GateNoise = "dropout" if version == "open" else "uniform"
        self.dim = dim
        self.with_positions = version == "competition"
        self.tokens = None if word_dim and version == "competition" else Table(vocab_size, dim, std=0.1)
        self.words = None
        if word_dim and (self.tokens is not None or word_dim != dim):
            self.words = nn.Linear(word_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.question = GatedStack(dim, dilations=QUESTION_DILATIONS, noise=noise, rate=gate_rate)
        self.pooling = AttentionPooling(dim)
        width = 2 * dim + num_features
        self.mix = None
        if version == "open":
            self.mix, width = nn.Linear(width, dim, bias=False), dim
        else:
            width += dim
        self.passage = GatedStack(
            width, dim, dilations=PASSAGE_DILATIONS, project=version == "open", noise=noise, rate=gate_rate
        )

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Read a batch, see `PassageCollator`."""
        asked = self.question(self._embed(batch, "questions", "question_words"), batch["question_mask"])
        vector = self.pooling(asked, batch["question_mask"])[batch["owners"]]
        told = self._embed(batch, "ids", "words")
        vector = vector[:, None].expand(-1, told.shape[1], -1)
        parts = [told, vector, *([batch["features"].to(told.dtype)] if "features" in batch else [])]
        if self.with_positions:
            parts.append(sinusoids(told.shape[1], self.dim, told.device).to(told.dtype).expand_as(told))
        inputs = torch.cat(parts, -1)
        read = self.passage(inputs if self.mix is None else self.mix(inputs), batch["mask"])
        return torch.cat((read, vector), -1)

    def _embed(self, batch: dict[str, Any], ids: str, words: str) -> Tensor:
        parts = [] if self.tokens is None else [self.tokens(batch[ids])]
        if "word_vectors" in batch:
            vectors = batch["word_vectors"] if self.words is None else self.words(batch["word_vectors"])
            parts.append(F.embedding(batch[words], vectors))
        return self.dropout(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])


class PassageHead(nn.Module):
    """Log-probabilities that an answer begins, and ends, at a token, `(R, 2, T)`.

    Args:
        width: of the tokens.
        num_layers: 1 or 2, of what scores a token.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.pooling = AttentionPooling(width)
        self.passage = nn.Linear(width, 1)
        inner: list[nn.Module] = [nn.Linear(width, width // 2), nn.ReLU()] if num_layers == 2 else []
        self.tokens = nn.Sequential(*inner, nn.Linear(width // 2 if inner else width, 2))

    def forward(self, read: Tensor, mask: Tensor) -> Tensor:
        """Score tokens `(R, T, 2 D)`."""
        whole = self.passage(self.pooling(read, mask)).float()
        return F.logsigmoid(whole)[:, None] + F.logsigmoid(self.tokens(read).float()).transpose(1, 2)


class DGCNN(ReadingModule):
    """Reading comprehension over several passages by dilated gated convolutions.

    Args:
        vocab_size: number of token ids.
        num_features: hand-made features of a token; the data decide.
        word_dim: width of the words' vectors that come with the batches, 0 for none; the data decide.
        version: "open" or "competition".
        dim: width of the convolutions.
        dropout: rate on the embeddings.
        gate_rate: rate of the noise on the gates.
        unknown_rate: share of the tokens that are unknown in training, for questions and passages.
        unknown_id: the id that they get.
        gamma, alpha: of the focal loss.
        loss_scale: the loss is multiplied by it.
        max_answer: longest answer, in tokens as the data count them.
        least: what both probabilities of a span are above.
        voting: how the passages agree, see `vote`.
        counting: how answers are compared, see `AnswerScores`.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; RAdam with learning rate 1e-3 when None. Not saved in checkpoints.

    Raises:
        InputError: a value out of range.
    """

    reader: PassageReader
    head: PassageHead

    def __init__(
        self,
        vocab_size: int,
        num_features: int = 0,
        word_dim: int = 0,
        version: Version = "open",
        dim: int = 128,
        dropout: float = 0.1,
        gate_rate: float = 0.1,
        unknown_rate: float = 0.0,
        unknown_id: int = 1,
        gamma: float = 2.0,
        alpha: float = 0.25,
        loss_scale: float = 100.0,
        max_answer: float = 12,
        least: float = 0.1,
        voting: Voting = "vote",
        counting: Counting = "characters",
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        super().__init__(counting, abstains=False)
        for name, value, options in (("version", version, Version), ("voting", voting, Voting)):
            if value not in get_args(options):
                raise InputError(f"DGCNN({name}={value!r}): use one of {', '.join(get_args(options))}")
        for name, rate in (("dropout", dropout), ("gate_rate", gate_rate), ("unknown_rate", unknown_rate)):
            if not 0 <= rate < 1:
                raise InputError(f"DGCNN({name}={rate}): use a rate from 0 to below 1")
        if max_answer < 1:
            raise InputError(f"DGCNN(max_answer={max_answer}): use 1 or more")
        if not 0 <= least < 1:
            raise InputError(f"DGCNN(least={least}): use a probability from 0 to below 1")
        check_schedule("DGCNN", schedule)
        self.save_hyperparameters(ignore=["optimizer"])
        self.version: Version = version
        self.unknown_rate = unknown_rate
        self.unknown_id = unknown_id
        self.gamma, self.alpha, self.loss_scale = gamma, alpha, loss_scale
        self.max_answer = max_answer
        self.least = least
        self.voting: Voting = voting
        self.warmup_steps = warmup_steps
        self.schedule: Schedule = schedule
        self._sizes = (vocab_size, num_features, dim, dropout, gate_rate, version, word_dim)
        self._optimizer = optimizer or (lambda parameters: torch.optim.RAdam(parameters, lr=1e-3))

    def configure_model(self) -> None:
        if not hasattr(self, "reader"):
            self.reader = PassageReader(*self._sizes)
            self.head = PassageHead(2 * self.reader.dim, 1 if self.version == "open" else 2)

    def blocks(self) -> Iterable[nn.Module]:
        """The gated convolutions of question and passage."""
        return [*self.reader.question.blocks, *self.reader.passage.blocks]

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of starts and ends, `(R, 2, T)`."""
        return self.head(self.features(batch), batch["mask"])

    def features(self, batch: dict[str, Any]) -> Tensor:
        """The tokens of the passages as read, `(R, T, 2 D)`."""
        if self.training and self.unknown_rate:
            batch = batch | self._some_unknown(batch, "questions", "question_words")
            batch |= self._some_unknown(batch, "ids", "words")
        return self.reader(batch)

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Focal losses of starts and ends, given what `features` gives."""
        first, last = self.head(features, batch["mask"]).unbind(1)
        places = batch["places"]
        return {
            "start": self.loss_scale * focal_loss(first, batch["starts"], places, self.gamma, self.alpha),
            "end": self.loss_scale * focal_loss(last, batch["ends"], places, self.gamma, self.alpha),
        }

    def find(self, features: Tensor, batch: dict[str, Any]) -> list[Finding]:
        return self.answers(self.head(features, batch["mask"]), batch)

    @torch.no_grad()
    def answers(self, logs: Tensor, batch: dict[str, Any]) -> list[Finding]:
        """What the passages of each question agree upon, given log-probabilities `(R, 2, T)`.

        In a passage an answer counts as much as its most probable span; windows of one passage are that passage.
        """
        first, last = logs.exp().unbind(1)
        spans = likely_spans(first, last, batch["places"], self.max_answer, self.least, batch["lengths"])
        owners = batch["owners"].tolist()
        passages: dict[int, dict[int, list[tuple[float, Answer]]]] = defaultdict(lambda: defaultdict(list))
        for row, start, end, probability in zip(*(part.tolist() for part in spans), strict=True):
            owner, window = owners[row], batch["windows"][row]
            answer = window.answer(batch["records"][owner], start, end)
            passages[owner][window.passage].append((probability, answer))
        return [elect(passages[owner].values(), "max", self.voting) for owner in range(len(batch["records"]))]

    def _some_unknown(self, batch: dict[str, Any], ids: str, words: str) -> dict[str, Tensor]:
        chosen = torch.rand(batch[ids].shape, device=batch[ids].device) < self.unknown_rate
        unknown = {ids: batch[ids].masked_fill(chosen, self.unknown_id)}
        return unknown | ({words: batch[words].masked_fill(chosen, 0)} if words in batch else {})

    def configure_optimizers(self) -> Any:
        return scheduled(self, self._optimizer(self.parameters()), self.schedule, self.warmup_steps)
