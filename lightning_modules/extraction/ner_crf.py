"""Named entities by tags of single tokens and a linear-chain CRF.  Shapes: W windows, T tokens, D features, L tags.

Of spans that overlap, tags can say one; the longest is learnt, the others are counted (`NerDataModule.setup`).

Source: https://kexue.fm/archives/5542 (CRF), https://kexue.fm/archives/7196 (its learning rate).  Checked against:
pytorch-crf, all paths enumerated.  Expected: see conf/experiment/ner_*.yaml.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...nn.decoding import TagScheme
from ...nn.decoding.tags import Cells, SchemeName
from ...nn.heads import LinearChainCRF
from ...nn.optim import OptimizerFactory, with_rates
from ...nn.transformer.config import Norm, Positions
from ..schedules import Schedule
from .encoder_module import check_rate, encoder_config
from .ner import EntityModule, inner_places


class TagHead(nn.Module):
    """Emissions of each token, and the CRF over them."""

    def __init__(self, dim: int, scheme: TagScheme, constrained: bool) -> None:
        super().__init__()
        self.emissions = nn.Linear(dim, scheme.num_tags)
        allowed, first, last = scheme.allowed() if constrained else (None, None, None)
        self.crf = LinearChainCRF(scheme.num_tags, allowed, first, last)

    def forward(self, features: Tensor, mask: Tensor, tags: Tensor | None = None) -> Tensor:
        """Loss of each window `(W,)`, or without tags the best ones `(W, T)`; see `LinearChainCRF`."""
        return self.crf(self.emissions(features), mask, tags)


class NerCRF(EntityModule):
    """Named entities by a linear-chain CRF.

    Args:
        vocab_size: number of token ids.
        types: names of the types.
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder.
        max_length: longest input, for positions other than "rope".
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        num_segments: what the data say of a token besides its id, such as the tags of a dictionary; 0: nothing.
        scheme: "BIO", "BIOS" or "BIOES" tags.
        constrained: forbid tags that cannot follow each other, in training and in decoding.
        crf_rate: learning rate of the transitions, in units of the others': an encoder that fits the emissions fast
            leaves them too small otherwise.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.

    Raises:
        InputError: a value out of range; types that are empty or repeated.
    """

    overlapping = False
    head: TagHead

    def __init__(
        self,
        vocab_size: int,
        types: list[str],
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        max_length: int = 512,
        positions: Positions = "rope",
        norm: Norm = "pre",
        num_segments: int = 0,
        scheme: SchemeName = "BIOES",
        constrained: bool = True,
        crf_rate: float = 1.0,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        config = encoder_config(
            vocab_size, dim, num_layers, num_heads, feedforward_dim, dropout, max_length, positions, norm, num_segments
        )
        super().__init__(types, config, warmup_steps, schedule, optimizer)
        check_rate("NerCRF", crf_rate)
        self.save_hyperparameters(ignore=["optimizer"])
        self.scheme = TagScheme(len(types), scheme)
        self.constrained = constrained
        self.crf_rate = crf_rate

    def make_head(self) -> TagHead:
        """A `TagHead` for the scheme."""
        return TagHead(self.config.dim, self.scheme, self.constrained)

    def losses(self, features: Tensor, batch: dict[str, Any], training: bool) -> dict[str, Tensor]:
        """Mean over windows of `-log p(tags)`; tags of special tokens are left out."""
        tags = self.scheme.tags(batch["flat_labels"], features.shape[1])[:, 1:-1]
        return {"tags": self.head(features[:, 1:-1], inner_places(batch)[:, 1:-1], tags).mean()}

    def find(self, features: Tensor, batch: dict[str, Any]) -> list[Cells]:
        """Spans of the best tags."""
        tags = self.head(features[:, 1:-1], inner_places(batch)[:, 1:-1])
        return [[(kind, first + 1, last + 1) for kind, first, last in row] for row in self.scheme.spans(tags)]

    def make_optimizer(self, factory: OptimizerFactory) -> torch.optim.Optimizer:
        """Transitions in a group of their own where their rate is another."""
        rates = {True: self.crf_rate, False: 1.0}
        return with_rates(factory, self.named_parameters(), lambda name: rates[name.startswith("head.crf.")])
