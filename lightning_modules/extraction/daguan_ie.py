"""Fields of sentences whose words are numbers: an encoder of its own, a look at the neighbours, tags or borders.

The 9th place of the Daguan cup 2019.  Shapes: W windows, T tokens, D features, L tags, K types.

The encoder learns from sentences without labels first (`MaskedLM`) and comes in by `technique=[start_from]`. Over it
stand an LSTM or convolutions, and one of two heads: tags with a CRF, or the classes of first and last tokens. The
plan with several dropout masks before the tags is `technique=[multi_sample_dropout]` on `head.emissions`, with
`reduction=mean_logits`; the slow weights are `technique=[lookahead]`; the vote over folds is `kexue predict` with
several runs.

Source: https://kexue.fm/archives/7196 (rates of a CRF); lonePatient, "daguan_2019_rank9" (the system).  Checked
against: the formulas written plainly.  Expected: see conf/experiment/daguan_2019.yaml.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...nn.decoding import TagScheme
from ...nn.decoding.tags import SchemeName
from ...nn.heads import StartEndHead, decode_start_end, start_end_classes, start_end_loss
from ...nn.heads.start_end import StartLabel
from ...nn.optim import OptimizerFactory, with_rates
from ...nn.transformer.config import Norm, Positions
from ...nn.trunks import ConvolutionTrunk, LSTMTrunk
from ..schedules import Schedule
from .encoder_module import encoder_config
from .ner import Cells, EntityModule, inner_places
from .ner_crf import TagHead

Trunk = Literal["lstm", "convolution", "none"]
Head = Literal["crf", "span"]


class DaguanIE(EntityModule):
    """Fields of one of several types, which do not overlap.

    Args:
        vocab_size: number of token ids.
        types: names of the types.
        dim: width of the encoder.
        num_layers: blocks of the encoder.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise networks.
        dropout: rate everywhere in the encoder, and before the trunk.
        max_length: longest input, for positions other than "rope".
        positions: "rope", "learned" or "sinusoidal".
        norm: "pre" or "post".
        num_segments: what the data say of a token besides its id, such as the tags of a dictionary; 0: nothing.
        trunk: what stands on the encoder: a bidirectional "lstm", "convolution"s with growing distance, or "none".
        trunk_layers: of the LSTM; how often the convolutions are applied.
        trunk_dropout: rate between the layers of the LSTM, before each application of the convolutions.
        head: tags with a "crf", or the classes of the first and the last token of a "span".
        scheme: of the tags, "BIO", "BIOS" or "BIOES".
        start_label: what the search for last tokens is told of the first, "hard" or "soft", see `StartEndHead`.
        encoder_rate: learning rate of the encoder's last block, in units of the trunk's and the head's.
        layer_decay: of each block below, in units of the one above; the embeddings are the lowest.
        crf_rate: learning rate of the transitions, in units of the head's.
        warmup_steps: steps over which the learning rate rises to its full value.
        schedule: what it does afterwards: "constant", or "linear" down to 0 at the trainer's last step.
        optimizer: how to make the optimizer; AdamW with learning rate 5e-4 when None. Not saved in checkpoints.
            Biases and norms have no weight decay.

    Raises:
        InputError: a value out of range; types that are empty or repeated.
    """

    overlapping = False
    head: TagHead | StartEndHead

    def __init__(
        self,
        vocab_size: int,
        types: list[str],
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.2,
        max_length: int = 512,
        positions: Positions = "rope",
        norm: Norm = "pre",
        num_segments: int = 0,
        trunk: Trunk = "lstm",
        trunk_layers: int = 2,
        trunk_dropout: float = 0.35,
        head: Head = "crf",
        scheme: SchemeName = "BIOS",
        start_label: StartLabel = "soft",
        encoder_rate: float = 1.0,
        layer_decay: float = 1.0,
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
        for name, value, allowed in (
            ("trunk", trunk, get_args(Trunk)),
            ("head", head, get_args(Head)),
            ("start_label", start_label, get_args(StartLabel)),
        ):
            if value not in allowed:
                raise InputError(f"DaguanIE({name}={value!r}): use one of {', '.join(allowed)}")
        rates = {"encoder_rate": encoder_rate, "layer_decay": layer_decay, "crf_rate": crf_rate}
        if wrong := [f"{name}={rate}" for name, rate in rates.items() if rate <= 0]:
            raise InputError(f"DaguanIE({wrong[0]}): use a number above 0")
        if trunk_layers < 1 or not 0 <= trunk_dropout < 1:
            raise InputError(
                f"DaguanIE(trunk_layers={trunk_layers}, trunk_dropout={trunk_dropout}): use 1 or more, and a rate "
                "from 0 to below 1"
            )
        self.save_hyperparameters(ignore=["optimizer"])
        self.trunk_kind: Trunk = trunk
        self.trunk_layers = trunk_layers
        self.trunk_dropout = trunk_dropout
        self.head_kind: Head = head
        self.scheme = TagScheme(len(types), scheme)
        self.start_label: StartLabel = start_label
        self.rates = rates

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "trunk"):
            self.trunk = self._make_trunk()

    def make_head(self) -> TagHead | StartEndHead:
        """A `TagHead` or a `StartEndHead`."""
        if self.head_kind == "crf":
            return TagHead(self.config.dim, self.scheme, constrained=True)
        return StartEndHead(self.config.dim, len(self.types), self.start_label)

    def features(self, batch: dict[str, Any]) -> Tensor:
        """The trunk's output `(W, T, D)`."""
        hidden = super().features(batch)
        return hidden if self.trunk is None else self.trunk(hidden, batch["mask"])

    def losses(self, features: Tensor, batch: dict[str, Any], training: bool) -> dict[str, Tensor]:
        """Mean over windows of `-log p(tags)`, or of both classes' cross-entropy; special tokens are left out."""
        places = inner_places(batch)[:, 1:-1]
        if isinstance(self.head, TagHead):
            tags = self.scheme.tags(batch["flat_labels"], features.shape[1])[:, 1:-1]
            return {"tags": self.head(features[:, 1:-1], places, tags).mean()}
        starts, ends = (part[:, 1:-1] for part in start_end_classes(batch["flat_labels"], features.shape[1]))
        first, last = self.head(features[:, 1:-1], starts if training else None)
        return {"borders": start_end_loss(first, last, (starts, ends), places)}

    def find(self, features: Tensor, batch: dict[str, Any]) -> list[Cells]:
        """Spans of the best tags, or of the best classes."""
        places = inner_places(batch)[:, 1:-1]
        if isinstance(self.head, TagHead):
            rows = self.scheme.spans(self.head(features[:, 1:-1], places))
        else:
            starts, ends = (scores.argmax(-1) for scores in self.head(features[:, 1:-1]))
            rows = decode_start_end(starts, ends, places)
        return [[(kind, first + 1, last + 1) for kind, first, last in row] for row in rows]

    def make_optimizer(self, factory: OptimizerFactory) -> torch.optim.Optimizer:
        """One group for each learning rate, with weight decay and without."""
        return with_rates(factory, self.named_parameters(), self.rate_of, spare_biases=True)

    def rate_of(self, name: str) -> float:
        """Learning rate of a parameter, in units of the head's."""
        if name.startswith("head.crf."):
            return self.rates["crf_rate"]
        if not name.startswith("encoder."):
            return 1.0
        depth = self.config.num_layers
        block, below = "encoder.layers.blocks.", 0
        if name.startswith(block):
            below = depth - 1 - int(name.removeprefix(block).split(".")[0])
        elif name.startswith("encoder.embedding."):
            below = depth
        return self.rates["encoder_rate"] * self.rates["layer_decay"] ** below

    def _make_trunk(self) -> nn.Module | None:
        dim, layers, inner = self.config.dim, self.trunk_layers, self.trunk_dropout
        makers: dict[Trunk, Callable[[], nn.Module | None]] = {
            "lstm": lambda: LSTMTrunk(dim, layers, self.config.dropout, inner),
            "convolution": lambda: ConvolutionTrunk(dim, iterations=layers, dropout=inner),
            "none": lambda: None,
        }
        return makers[self.trunk_kind]()
