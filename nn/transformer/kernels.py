"""Linear attention: weights that are inner products of features, so that sums over keys are taken once for all queries.

Shapes: B batch, N heads, T queries, S keys, F features, K key size, V value size, M degree.

Softmax attention weighs by exp(x), x = q.k. Random features (Performer) have products with this mean; the Taylor
series and the limit of (1 + x / n)^n approach it by polynomials. Their tensor powers hold each monomial many times;
here it stands once, weighted by the root of that number, which makes (K + 1)^M features C(K + M, M).

Source: https://kexue.fm/archives/8601; K. Choromanski et al. "Rethinking Attention with Performers" (arXiv 2009.14794);
A. Katharopoulos et al. "Transformers are RNNs" (arXiv 2006.16236).  Checked against: the plain tensor powers, the table
of all weights in float64, torch.nn.functional.scaled_dot_product_attention.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import combinations_with_replacement
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import LayerCache
from .config import Attention, TransformerConfig

CHUNK = 64  # tokens of a table of weights in causal sums
FLOOR = 1e-30


def _wide(x: Tensor) -> Tensor:
    """The same in float32 at least: exponentials and powers leave the range of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def num_features(kind: Attention, dim: int, degree: int, m: int) -> int:
    """How many features a kernel makes of a key of `dim` numbers; `m` of them are asked for where they are random."""
    return {"elu": dim, "favor": m}.get(kind, math.comb(dim + degree, degree))


def elu_features(x: Tensor) -> Tensor:
    """Positive features elu(x) + 1, `(..., K)` to `(..., K)`."""
    return F.elu(_wide(x)) + 1


@lru_cache
def _monomials(dim: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Monomials in `dim` variables: their factors `(M, F)`, 0 for the constant 1, and their weights `(2, F)`.

    Weights of the series: root of 1 / prod c_i! over the variables, where c_i counts factor i. Of the limit: root of
    M! / prod c_i! over variables and constant. Arrays, since a cached tensor would belong to the mode it was made in.
    """
    rows = list(combinations_with_replacement(range(dim + 1), degree))
    counts = [Counter(row) for row in rows]
    repeats = np.array([math.prod(math.factorial(c) for c in count.values()) for count in counts], dtype=np.float64)
    constants = np.array([math.factorial(count[0]) for count in counts], dtype=np.float64)
    return np.array(rows).T.copy(), np.sqrt(np.stack((constants / repeats, math.factorial(degree) / repeats)))


def _polynomial_features(x: Tensor, degree: int, row: int) -> Tensor:
    """Weighted monomials of x, `(..., K)` to `(..., F)`; `row` of the weights."""
    factors, weights = _monomials(x.shape[-1], degree)
    padded = F.pad(x, (1, 0), value=1.0)
    features = torch.as_tensor(weights[row], dtype=x.dtype, device=x.device)
    for index in torch.as_tensor(factors, device=x.device):
        features = features * padded.gather(-1, index.expand(*x.shape[:-1], -1))
    return features


def taylor_features(x: Tensor, degree: int) -> Tensor:
    """Features with products sum_(j <= degree) (q.k)^j / j!, `(..., K)` to `(..., F)`; positive for even degrees."""
    return _polynomial_features(_wide(x), degree, 0)


def limit_features(x: Tensor, degree: int) -> Tensor:
    """Features with products (1 + q.k / degree)^degree, `(..., K)` to `(..., F)`; never negative for even degrees."""
    return _polynomial_features(_wide(x) / math.sqrt(degree), degree, 1)


def taylor_error_bound(x: Tensor, degree: int) -> Tensor:
    """Upper bound of |exp(x) - its Taylor polynomial|, the remainder of Lagrange."""
    return x.clamp(min=0).exp() * x.abs() ** (degree + 1) / math.factorial(degree + 1)


def limit_relative_error(x: Tensor, degree: int) -> Tensor:
    """Leading term of 1 - (1 + x / degree)^degree / exp(x); an upper bound where x is not negative."""
    return x.square() / (2 * degree)


def orthogonal_gaussian(num_features: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal vectors `(F, K)` in float64, orthogonal within blocks of K: kernels estimated so vary less.

    Directions are rows of uniformly random rotations, lengths are drawn anew, on the CPU whatever the default device.
    """
    blocks = -(-num_features // dim)
    draws = torch.randn(2, blocks, dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    directions, triangle = torch.linalg.qr(draws[0])
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()  # without them QR prefers some directions
    rows = (directions * signs[:, None, :]).mT * draws[1].norm(dim=-1, keepdim=True)
    return rows.flatten(0, 1)[:num_features]


def random_exponents(x: Tensor, projection: Tensor) -> Tensor:
    """Logarithms of random features, w.x - |x|^2 / 2 for each row w of the projection, `(..., K)` to `(..., F)`."""
    x = _wide(x)
    return x @ projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


def random_features(x: Tensor, projection: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Positive random features of Performer, `(..., K)` to `(..., F)`: their products have the mean exp(q.k).

    A `shift` `(..., 1)` is taken from the exponents. Attention stays the same for any shift of a query, and for one
    shift of all keys. The rows of the projection `(F, K)` are standard normal.
    """
    return (random_exponents(x, projection) - shift).exp() / math.sqrt(len(projection))


def _weighted_sums(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Sums of values weighted by products of features, `(B, N, T, V)`; causal: over keys up to the query.

    Causal sums go by chunks: a table of weights within a chunk, and one sum `(F, V)` for all chunks before it.
    """
    if not causal:
        return query @ (key.mT @ value)
    length = query.shape[-2]
    chunk = min(CHUNK, length)
    room = -length % chunk
    query, key, value = (F.pad(x, (0, 0, 0, room)).unflatten(-2, (-1, chunk)) for x in (query, key, value))
    before = F.pad((key[:, :, :-1].mT @ value[:, :, :-1]).cumsum(2), (0, 0, 0, 0, 1, 0))
    sums = (query @ key.mT).tril() @ value + query @ before
    return sums.flatten(2, 3)[:, :, :length]


def _seen(
    query: Tensor, key: Tensor, value: Tensor, numerator: tuple[Tensor, Tensor] | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Weighted sums of values `(B, N, T, V)` and the sums of the weights `(B, N, T, 1)`."""
    value = value.to(query.dtype)
    ones = torch.ones_like(value[..., :1])
    if numerator is None:
        sums = _weighted_sums(query, key, torch.cat((value, ones), dim=-1), causal)
        return sums[..., :-1], sums[..., -1:]
    return _weighted_sums(*numerator, value, causal), _weighted_sums(query, key, ones, causal)


def linear_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    *,
    numerator: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    floor: float = FLOOR,
) -> Tensor:
    """Attention with weights proportional to products of features.

    Args:
        query_features: `(B, N, T, F)`.
        key_features: `(B, N, S, F)`; zero for padding.
        value: `(B, N, S, V)`.
        numerator: features of queries and keys before normalisation where they differ: rotated ones, of any sign.
        causal: no key after the query is seen; S = T.
        floor: smaller sums of weights count as this, so a query that sees no key gives zeros.

    Returns:
        `(B, N, T, V)` in the dtype of the values; computed in that of the features.
    """
    top, bottom = _seen(query_features, key_features, value, numerator, causal)
    return (top / bottom.clamp(min=floor)).to(value.dtype)


class LinearState(NamedTuple):
    """What is left of all keys and values so far.

    Attributes:
        sums: of keys times values, `(B, N, F, V)`.
        total: of keys, `(B, N, F)`.
        shift: what was taken from the exponents of the keys, `(B, N, 1, 1)`.
    """

    sums: Tensor
    total: Tensor
    shift: Tensor


def linear_attention_step(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    state: LinearState | None = None,
    *,
    numerator: tuple[Tensor, Tensor] | None = None,
    shift: Tensor | None = None,
    causal: bool = True,
    floor: float = FLOOR,
) -> tuple[Tensor, LinearState]:
    """`linear_attention` of T new tokens to themselves and to all before, which only the state remembers.

    Args:
        query_features, key_features, value, numerator, floor: as in `linear_attention`, with S = T.
        state: what the last call returned; None at first.
        shift: what was taken from the exponents of these keys `(B, N, 1, 1)`; the state is brought to it.
        causal: no new key after the query is seen.

    Returns:
        `(B, N, T, V)` in the dtype of the values, and the new state in that of the features.
    """
    top_query, top_key = numerator or (query_features, key_features)
    top, bottom = _seen(query_features, key_features, value, numerator, causal)
    sums, total = top_key.mT @ value.to(top_key.dtype), key_features.sum(-2)
    shift = sums.new_zeros(*sums.shape[:2], 1, 1) if shift is None else shift
    if state is not None:
        scale = (state.shift - shift).exp()
        past, past_total = state.sums * scale, state.total[..., None] * scale
        top, bottom = top + top_query @ past, bottom + query_features @ past_total
        sums, total = sums + past, total + past_total[..., 0]
    return (top / bottom.clamp(min=floor)).to(value.dtype), LinearState(sums, total, shift)


class LinearKernel(nn.Module):
    """Attention by a feature map, as `TransformerConfig.attention` names it.

    The random vectors of "favor" are a buffer that checkpoints hold, drawn with a fixed seed: every process and every
    layer has the same.
    """

    projection: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kind = config.attention
        polynomial = {"taylor": taylor_features, "limit": limit_features}.get(self.kind)
        self.map = elu_features if polynomial is None else partial(polynomial, degree=config.kernel_degree)
        # Products of polynomial features are exact only up to rounding, so a weight of about zero may have any sign.
        self.floor = FLOOR if polynomial is None else 1e-6
        if self.kind == "favor":
            self.register_buffer("projection", torch.empty(config.num_features, config.key_size))
            self.redraw(torch.Generator().manual_seed(0))

    def redraw(self, generator: torch.Generator) -> None:
        """Draw new random vectors; every process must come with a generator in the same state, on the CPU."""
        rows, columns = self.projection.shape
        self.projection.copy_(orthogonal_gaussian(rows, columns, generator))

    def features(
        self, query: Tensor, key: Tensor, keys: Tensor | None = None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of queries `(B, N, T, F)` and keys `(B, N, S, F)`, and the shift of the keys if they are random.

        Random features are divided by their maximum: of each query, and of all keys of a row and head, which cancels in
        the weights; `past` is that of earlier keys, `(B, N, 1, 1)`. Padding, False in `keys` `(B, S)`, gets zeros.
        """
        padding = None if keys is None else ~keys[:, None, :, None]
        if self.kind == "favor":
            query, key = random_exponents(query, self.projection), random_exponents(key, self.projection)
            if padding is not None:
                key = key.masked_fill(padding, -torch.inf)  # not after the exponential, which may overflow there
            shift = key.detach().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(key.dtype).min)
            shift = shift if past is None else shift.maximum(past)
            return (query - query.detach().amax(-1, keepdim=True)).exp(), (key - shift).exp(), shift
        query, key = self.map(query), self.map(key)
        return query, key if padding is None else key.masked_fill(padding, 0.0), None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        keys: Tensor | None = None,
        causal: bool = False,
        rotation: Callable[[Tensor], Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `(B, N, T, K)`, scaled so that its products with the keys are the scores.
            key: `(B, N, S, K)`.
            value: `(B, N, S, V)`.
            keys: True where a key is real, `(B, S)`.
            causal: no key after the query is seen.
            rotation: turns the features of queries and keys by their positions, in the numerator only.
            cache: holds the state of earlier tokens, and then that of all.

        Returns:
            `(B, N, T, V)` in the dtype of the values; computed in float32 at least, under autocast as well.
        """
        with torch.autocast(query.device.type, enabled=False):
            state = None if cache is None else cast(LinearState | None, cache.state)
            query, key, shift = self.features(query, key, keys, None if state is None else state.shift)
            numerator = None if rotation is None else (rotation(query), rotation(key))
            if cache is None:
                return linear_attention(query, key, value, numerator=numerator, causal=causal, floor=self.floor)
            mixed, cache.state = linear_attention_step(
                query, key, value, state, numerator=numerator, shift=shift, causal=causal, floor=self.floor
            )
        return mixed
