"""What a Transformer costs: multiplications, parameters and kept activations of each part.

Counts are multiply-accumulate operations (MACs) of matrix products; 1 MAC is 2 FLOPs. Looking up an embedding is no
product. Norms, activations, softmax and dropout are left out: they cost memory traffic, not arithmetic.

Source: https://kexue.fm/archives/8610.  Checked against: torch.utils.flop_counter.FlopCounterMode and the modules of
`nn.transformer`, number by number.
"""

from dataclasses import dataclass

from ..nn.transformer.config import TransformerConfig
from .step_cost import Recompute
from .transformer_parts import Part, Tally, Workload, count_embedding, count_heads, count_stack


@dataclass(frozen=True)
class TransformerCost:
    """The cost of one pass, part by part.

    Attributes:
        config: of the network.
        workload: what passes through it.
        parts: in the order in which a token meets them.
        block_input_bytes: inputs of all blocks, which recomputation keeps.
    """

    config: TransformerConfig
    workload: Workload
    parts: tuple[Part, ...]
    block_input_bytes: int

    @property
    def parameters(self) -> int:
        """Parameters of the module."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiplications of a forward pass."""
        return sum(part.macs for part in self.parts)

    def share(self, part: Part) -> float:
        """Share of a part in the multiplications."""
        return part.macs / self.macs

    @property
    def quadratic_macs(self) -> int:
        """Multiplications of the forward pass that grow with the square of the length."""
        return sum(part.macs for part in self.parts if part.name in QUADRATIC)

    def forward_flops(self) -> int:
        """FLOPs of a forward pass."""
        return 2 * self.macs

    def step_flops(self, recompute: Recompute = "off") -> int:
        """FLOPs of forward and backward pass, as torch's counter sees them.

        Selective recomputation keeps the results of all products, so none is repeated. A block ends its second pass
        as soon as the backward pass has what it needs: the outermost product of a pre-norm block is not among it.
        """
        again = sum(part.macs for part in self.parts if part.in_blocks) if recompute == "full" else 0
        if recompute == "full" and self.config.norm == "pre" and not self.config.dropout:
            again -= next(part.macs for part in self.parts if part.name == "feed-forward, outer")
        return 2 * (sum(part.macs + part.backward_macs for part in self.parts) + again)

    def saved_bytes(self, recompute: Recompute = "off") -> int:
        """Activations kept for the backward pass, which end with the forward pass."""
        outside = sum(part.saved_bytes for part in self.parts if not part.in_blocks)
        if recompute == "off":
            return sum(part.saved_bytes for part in self.parts)
        return outside + self.block_input_bytes + (self._products() if recompute == "selective" else 0)

    def peak_bytes(self, recompute: Recompute = "off") -> int:
        """Activations held at most: what is kept, and what one block holds while it is computed again."""
        if recompute == "off":
            return self.saved_bytes()
        blocks = self.config.depth + self.config.num_decoder_layers
        inside = sum(part.saved_bytes for part in self.parts if part.in_blocks)
        again = inside if recompute == "full" else inside - min(inside, self._products())
        return self.saved_bytes(recompute) + again // blocks

    def _products(self) -> int:
        return sum(part.product_bytes for part in self.parts if part.in_blocks)


QUADRATIC = ("scores", "weighted sum", "talking heads", "distance scores")


def transformer_cost(config: TransformerConfig, workload: Workload | None = None) -> TransformerCost:
    """Count the parts of a `Transformer`, or of an `EncoderDecoder` where the config has decoder layers.

    Rows are taken to be full: where padding is masked, random scores are mixed for each row of the batch.
    """
    work = workload or Workload()
    source = work.source_length or work.length if config.num_decoder_layers else work.length
    tally = Tally(config, work)
    count_embedding(tally, source + (work.length if config.num_decoder_layers else 0))
    count_stack(tally, source)
    inputs = config.depth * source
    if config.num_decoder_layers:
        count_stack(tally, work.length, source)
        inputs += config.num_decoder_layers * work.length
    count_heads(tally)
    block_inputs = inputs * work.batch * config.dim * work.bytes_per_value
    return TransformerCost(config, work, tuple(tally.parts.values()), block_inputs)
