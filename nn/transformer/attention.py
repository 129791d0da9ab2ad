"""Multi-head attention with every kind of score, in one module.

Shapes: B batch, T queries, S keys, D features, N heads, K key size, V value size.

Plain softmax goes through PyTorch's fused kernels. Whatever needs the whole table of scores (talking heads,
Synthesizers, relative positions) is computed plainly: scores, mix, mask, softmax in float32, mix, weighted sum.

Source: https://kexue.fm/archives/4765; https://kexue.fm/archives/7325 and N. Shazeer et al. "Talking-Heads Attention"
(arXiv 2003.02436); https://kexue.fm/archives/8823 (entropy-invariant scale); Z. Dai et al. "Transformer-XL" (arXiv
1901.02860).  Checked against: torch.nn.MultiheadAttention, the models of transformers, and the formulas in float64.
"""

import math
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import LayerCache
from .config import KERNELS, SYNTHESIZERS, TransformerConfig
from .kernels import LinearKernel
from .masks import Visibility
from .positions import relative_shift, rotate
from .residual import Projection
from .synthesizer import ScoreMixture, SynthesizerScores


@dataclass(frozen=True)
class Context:
    """What all layers of a pass share.

    Attributes:
        visible: which keys a query sees.
        angles: rotation of queries and keys by position, `(T, K / 2)` or `(B, 1, T, K / 2)`.
        distances: sinusoids of the distances `(P, D)` of relative positions.
        biases: relative positions: what is added to queries for their content and for their distance, `(2, N, K)`.
        source_visible: of cross-attention: which tokens of the source a query sees.
    """

    visible: Visibility
    angles: Tensor | None = None
    distances: Tensor | None = None
    biases: Tensor | None = None
    source_visible: Visibility | None = None


def entropy_factor(counts: Tensor, base: int = 512, floor: int = 16) -> Tensor:
    """The entropy-invariant scale relative to 1 / sqrt(K): log(n) / log(base), n the visible keys, at least `floor`."""
    return counts.clamp(min=floor).log() / math.log(base)


def takes_runs(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch has a kernel for sequences of variable length for such tensors."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and find_spec("torch.nn.attention.varlen") is not None
    )


def attend_in_runs(query: Tensor, key: Tensor, value: Tensor, visible: Visibility) -> Tensor:
    """Softmax attention within each packed sequence, `(B, N, T, V)`, without scores between different ones."""
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = visible.runs
    flat_query, flat_key, flat_value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    window = (-1, 0) if visible.causal else (-1, -1)
    groups = query.shape[1] != key.shape[1]
    mixed = varlen_attn(
        flat_query, flat_key, flat_value, borders, borders, longest, longest, window_size=window, enable_gqa=groups
    )
    assert isinstance(mixed, Tensor)
    return mixed.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


class Attention(nn.Module):
    """Attention of a block: of a sequence to itself, or to a source.

    Args:
        config: sizes and choices.
        beta: initial gain of values and output.
        cross: attend to another sequence.
    """

    def __init__(self, config: TransformerConfig, beta: float = 1.0, cross: bool = False) -> None:
        super().__init__()
        self.config = config
        keys, values = config.num_kv_heads, config.num_kv_heads
        if config.talking_heads != "none":
            keys, values = config.num_key_heads, config.num_value_heads
        bias = config.attention_bias
        widths = (config.num_key_heads * config.key_size, keys * config.key_size, values * config.head_size)
        gains = (1.0, 1.0, beta)
        self.query = None
        if not config.has_keys:
            widths, gains = widths[2:], gains[2:]
        elif cross:
            self.query = Projection(config.dim, widths[0], config, bias=bias)
            widths, gains = widths[1:], gains[1:]
        self.widths = widths
        self.projection = Projection(config.dim, widths, config, gains=gains, bias=bias)
        self.output: nn.Module = nn.Identity()
        if config.output_projection:
            inputs = config.num_value_heads * config.head_size
            self.output = Projection(inputs, config.dim, config, gains=(beta,), bias=bias)

        self.relative = None
        if config.positions == "relative" and not cross:
            self.relative = Projection(config.dim, config.num_key_heads * config.key_size, config, bias=False)
        self.scores = nn.ModuleDict({k: SynthesizerScores(config, k) for k in config.kinds if k in SYNTHESIZERS})
        self.mixture = ScoreMixture(len(config.mixture)) if config.mixture else None
        self.kernel = LinearKernel(config) if config.attention in KERNELS else None
        before, after = config.talking_heads in ("pre", "both"), config.talking_heads in ("post", "both")
        self.mix_scores = HeadMix(config.num_key_heads, config.num_heads) if before else None
        self.mix_weights = HeadMix(config.num_heads, config.num_value_heads) if after else None
        self.is_fused = config.kinds == ("softmax",) and config.talking_heads == "none" and self.relative is None

    def forward(
        self,
        hidden: Tensor,
        context: Context,
        cache: LayerCache | None = None,
        memory: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each row.

        Args:
            hidden: `(B, T, D)`.
            context: masks and positions of the pass.
            cache: keys and values of earlier tokens; the new ones are added.
            memory: hidden states of earlier tokens `(B, M, D)`, keys and values only.
            source: hidden states of another sequence `(B, S, D)` to attend to.

        Returns:
            `(B, T, D)`.
        """
        cross = self.query is not None
        visible = context.visible
        query, key, value = self._project(hidden, cache, memory, source)
        if cross and context.source_visible is not None:
            visible = context.source_visible
        elif query is not None and key is not None and context.angles is not None and self.config.attention != "elu":
            query, key = rotate(query, context.angles), rotate(key, context.angles)
        if cache is not None and not cross and self.kernel is None:
            key = key if key is None else cache.keys.append(key)
            value = cache.values.append(value)
        if self.kernel is not None:
            assert query is not None
            assert key is not None
            mixed = self._linear(query, key, value, context, cache)
        elif self.is_fused:
            assert query is not None
            assert key is not None
            mixed = self._fused(query, key, value, visible)
        else:
            mixed = self._plain(hidden, query, key, value, visible, context)
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def _project(
        self, hidden: Tensor, cache: LayerCache | None, memory: Tensor | None, source: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Queries `(B, N, T, K)`, keys `(B, N, S, K)` and values `(B, N, S, V)` of the new tokens or of the source."""
        config = self.config
        if self.query is None:
            joined = hidden if memory is None else torch.cat((memory, hidden), dim=1)
            *first, value = self.projection(joined).split(self.widths, dim=-1)
            value = _heads(value, config.head_size)
            if not first:
                return None, None, value
            query, key = (_heads(part, config.key_size) for part in first)
            return query[:, :, -hidden.shape[1] :], key, value
        query = _heads(self.query(hidden), config.key_size)
        if cache is not None and cache.source is not None:
            return query, *cache.source
        key, value = self.projection(source).split(self.widths, dim=-1)
        key, value = _heads(key, config.key_size), _heads(value, config.head_size)
        if cache is not None:
            cache.source = (key, value)
        return query, key, value

    def _sharpen(self, query: Tensor, visible: Visibility) -> Tensor:
        """Apply the entropy-invariant scale where it is wanted."""
        if self.config.attention_scale == "sqrt":
            return query
        factor = entropy_factor(visible.counts, self.config.scale_base, self.config.scale_floor)
        return (query * factor).to(query.dtype)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility) -> Tensor:
        """Softmax attention by a fused kernel."""
        query = self._sharpen(query, visible)
        groups = query.shape[1] != key.shape[1]
        dropout = self.config.attention_dropout if self.training else 0.0
        if visible.sequences is not None and visible.segments is None and not dropout and takes_runs(query, value):
            return attend_in_runs(query, key, value, visible)
        if visible.is_triangle:
            return F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout or 0.0, is_causal=True, enable_gqa=groups
            )
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible.allowed, dropout_p=dropout or 0.0, enable_gqa=groups
        )

    def _linear(self, query: Tensor, key: Tensor, value: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        """Attention by a feature map. Only the mask of real keys and causality apply."""
        assert self.kernel is not None
        visible, angles = context.visible, context.angles
        rotation = partial(rotate, angles=angles) if angles is not None and self.config.attention == "elu" else None
        root = self.config.key_size**-0.25
        if (repeats := query.shape[1] // key.shape[1]) > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        keys = None if visible.keys is None else visible.keys[:, -key.shape[2] :]
        return self.kernel(
            self._sharpen(query, visible) * root,
            key * root,
            value,
            keys=keys,
            causal=visible.causal,
            rotation=rotation,
            cache=cache,
        )

    def _plain(
        self,
        hidden: Tensor,
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor,
        visible: Visibility,
        context: Context,
    ) -> Tensor:
        """Attention with the whole table of scores."""
        parts = []
        for kind in self.config.kinds:
            if kind != "softmax":
                parts.append(self.scores[kind](hidden, visible.num_keys, visible.num_keys - visible.num_queries))
            elif query is not None and key is not None:
                parts.append(self._inner(query, key, visible, context))
        scores = parts[0] if self.mixture is None else self.mixture(parts)
        if self.mix_scores is not None:
            scores = self.mix_scores(scores)
        if visible.allowed is not None:  # after the mix, which would multiply it by signed weights
            scores = scores.masked_fill(~visible.allowed, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        if self.mix_weights is not None:
            weights = self.mix_weights(weights)
        weights = F.dropout(weights, self.config.attention_dropout or 0.0, self.training)
        if (repeats := weights.shape[1] // value.shape[1]) > 1:
            value = value.repeat_interleave(repeats, 1)
        return weights @ value

    def _inner(self, query: Tensor, key: Tensor, visible: Visibility, context: Context) -> Tensor:
        """Scaled inner products of queries and keys, with those of relative positions where there are any."""
        if (repeats := query.shape[1] // key.shape[1]) > 1:
            key = key.repeat_interleave(repeats, 1)
        scale = self.config.key_size**-0.5
        if self.relative is None or context.distances is None or context.biases is None:
            return self._sharpen(query * scale, visible) @ key.transpose(-1, -2)
        content, distance = context.biases[:, :, None].to(query.dtype)
        places = _heads(self.relative(context.distances.to(query.dtype)), self.config.key_size)
        content = self._sharpen((query + content) * scale, visible)
        distance = self._sharpen((query + distance) * scale, visible)
        return content @ key.transpose(-1, -2) + relative_shift(distance @ places.transpose(-1, -2), key.shape[2])


class HeadMix(nn.Module):
    """Linear mix of the tables of all heads, `(B, N, T, S)` to `(B, N', T, S)`: the identity at first where N' = N."""

    def __init__(self, heads: int, outputs: int) -> None:
        super().__init__()
        start = torch.eye(heads) if heads == outputs else torch.randn(outputs, heads) / math.sqrt(heads)
        self.weight = nn.Parameter(start)

    def forward(self, tables: Tensor) -> Tensor:
        return torch.einsum("mn,bnts->bmts", self.weight.to(tables.dtype), tables)


def _heads(features: Tensor, size: int) -> Tensor:
    """Cut `(..., T, N * size)` into heads `(..., N, T, size)`."""
    return features.unflatten(-1, (-1, size)).transpose(-2, -3)
