"""The parts of a Transformer and what each of them costs; `transformer_cost` puts them together.

Shapes: B batch, T queries, S keys, D features, N heads, K key size, V value size, F features of a kernel.

Source: https://kexue.fm/archives/8610.  Checked against: torch.utils.flop_counter.FlopCounterMode and the modules of
`nn.transformer`, number by number.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..nn.transformer.config import KERNELS, Attention, TransformerConfig
from ..nn.transformer.kernels import CHUNK, num_features
from ..nn.transformer.synthesizer import synthesizer_parameters

FLOAT32 = 4  # statistics of norms and the log-sums of a softmax are float32 in every precision


@dataclass
class Part:
    """One kind of work, summed over all layers.

    Attributes:
        name: what it is.
        in_blocks: whether it lies in the blocks, which recomputation runs again.
        macs: of a forward pass.
        backward_macs: of the backward pass: mostly twice as many, for the gradients of both factors.
        parameters: trained ones; what layers share counts once.
        saved_bytes: activations that the backward pass needs.
        product_bytes: results of the products, which selective recomputation keeps.
    """

    name: str
    in_blocks: bool
    macs: int = 0
    backward_macs: int = 0
    parameters: int = 0
    saved_bytes: int = 0
    product_bytes: int = 0


class Workload(NamedTuple):
    """What passes through the network.

    Attributes:
        batch: sequences, B.
        length: tokens of each, T; of the target where there is a decoder.
        source_length: tokens of each source, for an encoder-decoder; 0: `length`.
        predictions: places at which scores of tokens are computed; None: all of them.
        bytes_per_value: of an activation: 4 in float32, 2 in half precision.
        fused: whether plain softmax attention goes through a fused kernel. It keeps no table of scores, and its
            backward pass computes them again: 2.5 times the forward's products in place of 2.
    """

    batch: int = 1
    length: int = 512
    source_length: int = 0
    predictions: int | None = None
    bytes_per_value: int = 4
    fused: bool = True


@dataclass
class Tally:
    """Sums up parts; `times` and `copies` say how often what is added is applied and how often it exists."""

    config: TransformerConfig
    work: Workload
    parts: dict[str, Part] = field(default_factory=dict)
    times: int = 1
    copies: int = 1
    in_blocks: bool = False

    def add(
        self,
        name: str,
        macs: int = 0,
        *,
        backward_macs: int | None = None,
        parameters: int = 0,
        saved: int = 0,
        result: int = 0,
    ) -> None:
        """Add work: MACs and parameters as they are, kept values in bytes, the result of a product in values."""
        part = self.parts.setdefault(name, Part(name, self.in_blocks))
        part.macs += self.times * macs
        part.backward_macs += self.times * (2 * macs if backward_macs is None else backward_macs)
        part.parameters += self.copies * parameters
        part.saved_bytes += self.times * saved
        part.product_bytes += self.times * result * self.work.bytes_per_value

    def linear(self, name: str, rows: int, inputs: int, outputs: int, bias: bool = True) -> None:
        """A linear layer on so many rows, which keeps its input."""
        self.add(
            name,
            rows * inputs * outputs,
            parameters=(inputs + bias) * outputs,
            saved=rows * inputs * self.work.bytes_per_value,
            result=rows * outputs,
        )

    def norm(self, rows: int, width: int = 0, name: str = "norms") -> None:
        """A norm keeps its input and, for each row, deviation and (LayerNorm) mean."""
        width = width or self.config.dim
        kinds = 2 if self.config.norm_kind == "layer" else 1
        saved = rows * (width * self.work.bytes_per_value + kinds * FLOAT32)
        self.add(name, parameters=kinds * width, saved=saved)

    def dropout(self, name: str, rate: float | None, values: int) -> None:
        """A dropout keeps a mask of one byte for each value."""
        self.add(name, saved=values if rate else 0)


def count_embedding(tally: Tally, length: int) -> None:
    config, rows = tally.config, tally.work.batch * length
    width, tables = config.embedding_dim, config.vocab_size + config.num_segments
    if config.positions == "learned":
        tables += config.max_length + config.first_position
    numbers = 8 * (2 if config.num_segments else 1)
    tally.add("embeddings", parameters=tables * width, saved=rows * numbers)
    if config.embedding_norm:
        tally.norm(rows, width, "embeddings")
    tally.dropout("embeddings", config.dropout, rows * width)
    if width != config.dim:
        tally.linear("embedding projection", rows, width, config.dim)


def count_stack(tally: Tally, length: int, source_length: int = 0) -> None:
    """The blocks of a stack, in a decoder with attention to a source."""
    config, rows = tally.config, tally.work.batch * length
    layers = config.num_decoder_layers if source_length else config.depth
    distinct = config.num_groups * config.group_size
    blocks = distinct if config.sharing == "all" else layers
    tally.times, tally.in_blocks = layers, True

    tally.copies = distinct if config.sharing in ("all", "attention") else layers
    _count_attention(tally, length, length)
    if source_length:
        _count_attention(tally, length, source_length, cross=True)
    tally.copies = distinct if config.sharing in ("all", "feedforward") else layers
    _count_feedforward(tally, rows)
    tally.copies = blocks
    for _ in range(3 if source_length else 2):
        tally.norm(rows)
        tally.dropout("residual dropout", config.dropout, rows * config.dim)

    tally.times, tally.copies, tally.in_blocks = 1, 1, False
    if config.norm == "pre":
        tally.norm(rows, name="last norm")
    if config.positions == "relative":
        tally.add("distance biases", parameters=2 * config.num_key_heads * config.key_size)


def _count_feedforward(tally: Tally, rows: int) -> None:
    config, value = tally.config, tally.work.bytes_per_value
    width, bias = config.feedforward_dim, config.feedforward_bias
    tally.linear("feed-forward, inner", rows, config.dim, width * (2 if config.gated else 1), bias)
    # ReLU and tanh keep their result, the others their input; what the outer layer keeps is counted with it.
    kept = 0 if config.activation in ("relu", "tanh") and not config.feedforward_dropout else rows * width
    if config.gated:
        kept = 3 * rows * width
    tally.add("activation", saved=kept * value)
    tally.dropout("activation", config.feedforward_dropout, rows * width)
    tally.linear("feed-forward, outer", rows, width, config.dim, bias)


def _count_attention(tally: Tally, queries: int, keys: int, cross: bool = False) -> None:
    """One attention of a block; queries and keys of one sequence, T = S, unless it attends to a source."""
    config, batch, value = tally.config, tally.work.batch, tally.work.bytes_per_value
    key_heads = value_heads = config.num_kv_heads
    if config.talking_heads != "none":
        key_heads, value_heads = config.num_key_heads, config.num_value_heads
    query_width, key_width = config.num_key_heads * config.key_size, key_heads * config.key_size
    value_width, bias = value_heads * config.head_size, config.attention_bias
    if cross:
        tally.linear("projections", batch * queries, config.dim, query_width, bias)
        tally.linear("projections", batch * keys, config.dim, key_width + value_width, bias)
    else:
        width = value_width + (query_width + key_width if config.has_keys else 0)
        tally.linear("projections", batch * queries, config.dim, width, bias)
    if config.attention in KERNELS:
        _count_kernel(tally, batch, queries)
    elif config.kinds == ("softmax",) and config.talking_heads == "none" and config.positions != "relative":
        kept = batch * (queries * query_width + keys * (key_width + value_width))
        if tally.work.fused and config.positions == "rope" and not cross:
            # Rotated queries and keys beside the projection that the values are a view of, and a result laid out as
            # they are, which the output projection copies.
            kept += batch * (2 * queries * query_width + keys * key_width)
        tally.add("attention inputs", saved=kept * value)
        _count_fused(tally, batch * config.num_heads, queries, keys)
    else:
        _count_scores(tally, batch, queries, keys)
    mixed = config.num_value_heads * config.head_size
    if config.output_projection:
        tally.linear("output projection", batch * queries, mixed, config.dim, bias)


def _count_fused(tally: Tally, tables: int, queries: int, keys: int) -> None:
    """Plain softmax attention, which a fused kernel may compute without keeping a table of scores."""
    config, value, cells = tally.config, tally.work.bytes_per_value, tables * queries * keys
    key, head = config.key_size, config.head_size
    if not tally.work.fused:
        tally.add("scores", cells * key, saved=cells * FLOAT32, result=cells)
        tally.dropout("scores", config.attention_dropout, cells * (1 + value))
        tally.add("weighted sum", cells * head, result=tables * queries * head)
        return
    tally.add("scores", cells * key, backward_macs=3 * cells * key, saved=tables * queries * FLOAT32)
    saved = tables * queries * head  # the result, which the output projection keeps as well
    tally.add("weighted sum", cells * head, backward_macs=2 * cells * head, result=saved)


def _count_scores(tally: Tally, batch: int, queries: int, keys: int) -> None:
    """Attention whose tables of scores are computed plainly; random ones are the same for the whole batch."""
    config, value = tally.config, tally.work.bytes_per_value
    before, heads, after = config.num_key_heads, config.num_heads, config.num_value_heads
    random = set(config.kinds) <= {"random", "factorised_random"}
    tables = 1 if random else batch
    cells = tables * queries * keys
    # Scores that are not trained need no gradient, nor do the weights made of them before the first trained mix.
    fixed = random and not config.trainable_scores and not config.mixture
    tally.add("attention inputs", saved=batch * keys * after * config.head_size * value)
    for kind in config.kinds:
        if kind == "softmax":
            kept = before * config.key_size * batch * (queries + keys) * value
            tally.add("scores", before * cells * config.key_size, saved=kept, result=before * cells)
        else:
            _count_synthesizer(tally, kind, batch * queries, queries, keys)
    if config.mixture:
        tally.add("mixture", parameters=len(config.mixture), saved=len(config.mixture) * before * cells * value)
    if config.positions == "relative":
        _count_distances(tally, batch, queries, keys)
    if config.talking_heads in ("pre", "both"):
        macs = before * heads * cells
        tally.add(
            "talking heads",
            macs,
            backward_macs=macs if fixed else 2 * macs,
            parameters=before * heads,
            saved=before * cells * value,
            result=heads * cells,
        )
        fixed = False
    tally.add("weights", saved=heads * cells * FLOAT32)
    if config.talking_heads in ("post", "both"):
        macs = heads * after * cells
        tally.add(
            "talking heads",
            macs,
            backward_macs=macs if fixed else 2 * macs,
            parameters=heads * after,
            saved=after * cells * value,
            result=after * cells,
        )
        fixed = False
    tally.dropout("weights", config.attention_dropout, after * cells * (1 + value))
    mixed = batch * after * queries * config.head_size
    macs = mixed * keys
    tally.add("weighted sum", macs, backward_macs=macs if fixed else 2 * macs, result=mixed)


def _count_distances(tally: Tally, batch: int, queries: int, keys: int) -> None:
    """Scores of relative positions. Their sinusoids are fixed: the projection has a gradient for its weights only."""
    config, value = tally.config, tally.work.bytes_per_value
    distances = keys if config.mask == "causal" else keys + queries - 1
    width = config.num_key_heads * config.key_size
    macs, table = distances * config.dim * width, batch * config.num_key_heads * queries * distances
    tally.add(
        "distance projection",
        macs,
        backward_macs=macs,
        parameters=config.dim * width,
        saved=distances * width * value,
        result=distances * width,
    )
    tally.add("distance scores", table * config.key_size, saved=batch * queries * width * value, result=table)


def _count_synthesizer(tally: Tally, kind: Attention, rows: int, queries: int, keys: int) -> None:
    """Scores made of one token, or of positions alone."""
    config, value, heads = tally.config, tally.work.bytes_per_value, tally.config.num_key_heads
    tally.add("synthetic scores", parameters=synthesizer_parameters(config, kind))
    if kind == "dense":
        width = heads * config.synthesizer_dim
        kept = 2 * rows * width * value
        tally.add("synthetic scores", rows * config.dim * width, saved=kept, result=rows * width)
        tally.add("scores", rows * width * keys, result=rows * heads * keys)
    elif kind == "factorised_dense":
        width = heads * sum(config.synthesizer_factors)
        tally.add("synthetic scores", rows * config.dim * width, saved=rows * width * value, result=rows * width)
    elif kind == "factorised_random":
        macs = heads * queries * keys * config.synthesizer_rank
        backward = 2 * macs if config.trainable_scores else 0
        tally.add("scores", macs, backward_macs=backward, result=heads * queries * keys)


def _count_kernel(tally: Tally, batch: int, length: int) -> None:
    """Linear attention, whose values have a column of ones beside them for the sum of the weights."""
    config = tally.config
    heads, key, columns = batch * config.num_heads, config.key_size, config.head_size + 1
    features = num_features(config.attention, key, config.kernel_degree, config.num_features)
    rotated = config.attention == "elu" and config.positions == "rope"
    if config.attention == "favor":
        macs = heads * 2 * length * key * features  # the random vectors need no gradient
        tally.add("features", macs, backward_macs=macs, result=heads * 2 * length * features)
    copies = 1 if config.attention in ("elu", "favor") else 2 * config.kernel_degree - 1
    copies += rotated + (config.mask != "full" and length % CHUNK > 0)  # chunks are filled up in a copy
    tally.add("features", saved=heads * 2 * length * (copies * features + key) * FLOAT32)
    tally.add("attention inputs", saved=heads * length * 2 * columns * FLOAT32)
    if config.mask == "full":
        macs = heads * length * features * columns
        ones = heads * length * features * rotated  # a column of ones of its own has no gradient
        tally.add("sums over keys", macs, backward_macs=2 * macs - ones, result=heads * features * columns)
        tally.add("weighted sum", macs, result=heads * length * columns)
        return
    chunk = min(CHUNK, length)
    chunks = -(-length // chunk)
    places, table = chunks * chunk, chunks * chunk * chunk
    macs, ones = heads * (places - chunk) * features * columns, heads * (places - chunk) * features * rotated
    tally.add("sums over keys", macs, backward_macs=2 * macs - ones, result=heads * chunks * features * columns)
    tally.add("scores", heads * table * features * (1 + rotated), result=heads * table * (1 + rotated))
    macs, ones = heads * (table + places * features) * columns, heads * table * rotated
    saved = heads * (table + chunks * features * columns) * FLOAT32
    tally.add("weighted sum", macs, backward_macs=2 * macs - ones, saved=saved, result=2 * heads * places * columns)


def count_heads(tally: Tally) -> None:
    config, work = tally.config, tally.work
    rows = work.batch * work.length if work.predictions is None else work.predictions
    if "pooler" in config.heads:
        tally.linear("pooler", work.batch, config.dim, config.dim)
    if "sentence" in config.heads:
        tally.linear("sentence head", work.batch, config.dim, 2)
    if "masked_lm" in config.heads:
        tally.linear("masked LM head", rows, config.dim, config.embedding_dim)
        tally.norm(rows, config.embedding_dim, "masked LM head")
        tally.add("masked LM head", parameters=config.vocab_size)
        _count_table(tally, "masked LM head", rows)
    if "lm" in config.heads:
        if config.embedding_dim != config.dim:
            tally.linear("LM head", rows, config.dim, config.embedding_dim, bias=False)
        _count_table(tally, "LM head", rows)


def _count_table(tally: Tally, name: str, rows: int) -> None:
    """The product with the table of embeddings, whose parameters are counted there."""
    config = tally.config
    tally.add(
        name,
        rows * config.embedding_dim * config.vocab_size,
        saved=rows * config.embedding_dim * tally.work.bytes_per_value,
        result=rows * config.vocab_size,
    )
