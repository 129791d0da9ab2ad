"""Sizes and choices of a Transformer, checked once, before any network is built.

One dataclass describes every Transformer of the project: the modules, the weight layouts, the cost formulas and the
planner all read it.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ...errors import InputError

Attention = Literal[
    "softmax",
    "dense",
    "factorised_dense",
    "random",
    "factorised_random",
    "mixture",
    "elu",
    "favor",
    "taylor",
    "limit",
]
Mask = Literal["full", "causal", "prefix"]
Positions = Literal["rope", "learned", "sinusoidal", "relative", "none"]
Norm = Literal["pre", "post", "deepnorm", "gpt2_ml"]
NormKind = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
Scale = Literal["sqrt", "log_n"]
TalkingHeads = Literal["none", "pre", "post", "both"]
Sharing = Literal["none", "all", "attention", "feedforward"]
Initialisation = Literal["uniform", "normal", "xavier"]
DeepNormConstants = Literal["paper", "sgd", "adam", "lamb"]
Head = Literal["pooler", "masked_lm", "lm", "sentence"]

SYNTHESIZERS = ("dense", "factorised_dense", "random", "factorised_random")
KERNELS = ("elu", "favor", "taylor", "limit")


@dataclass(frozen=True)
class TransformerConfig:
    """What a Transformer is made of.

    Widths and counts given as 0 take their default when the dataclass is made, so that all read the same number later.

    Attributes:
        vocab_size: number of token ids.
        dim: width of the hidden states, D.
        num_layers: how often a block is applied (with `group_size` above 1: a group of blocks).
        num_decoder_layers: blocks of the decoder of an `EncoderDecoder`; 0 for a single stack.
        num_heads: attention heads of a block.
        feedforward_dim: inner width of the position-wise network.
        dropout: rate on embeddings and on the branches of a block.
        attention_dropout: rate on the attention weights; None takes `dropout`.
        feedforward_dropout: rate on the inner values of the position-wise network.
        max_length: longest input in tokens where a table or a score matrix has that size; unused otherwise.

        embedding_dim: width of the embedding tables where it differs from `dim` (a projection follows); 0: `dim`.
        num_segments: rows of the segment table; 0 for none.
        embedding_norm: normalise the embeddings; None does unless `norm="pre"`.
        positions: how a token learns its place: rotated queries and keys ("rope"), a trained table ("learned"), fixed
            sinusoids, the relative scores of Transformer-XL, or not at all.
        first_position: 0 numbers tokens by index. Otherwise real tokens are counted from this row of the table on and
            padding has the row before, as in RoBERTa (2).
        rope_base: longest wave length of the rotation, over 2 pi.
        clamp_length: relative positions: distances beyond it count as it; 0 for no limit.

        attention: how a query weighs its keys: inner products and softmax; a Synthesizer (Tay et al. 2020); a
            `mixture` of softmax and Synthesizers; or linear attention by a feature map: `elu` + 1, `favor` (Performer),
            and the series `taylor` and `limit` of the exponential.
        mixture: kinds whose scores `attention="mixture"` adds, by trained weights that sum to 1.
        num_kv_heads: key and value heads, each shared by a group of query heads; 0: one each.
        key_size: width of a query and a key; 0: dim / num_heads.
        head_size: width of a value; 0: dim / num_heads.
        attention_scale: scores over sqrt(key_size), or those times log(visible keys) / log(scale_base), which keeps the
            entropy of the weights where the number of keys grows (kexue.fm 8823).
        scale_base: the number of keys at which "log_n" changes nothing.
        scale_floor: fewer visible keys count as so many.
        talking_heads: mix the heads before the softmax, after it, or both (Shazeer et al. 2020).
        num_key_heads: heads before the first mix; 0: num_heads.
        num_value_heads: heads after the second mix; 0: num_heads.
        attention_bias: biases in the projections of attention.
        output_projection: project the concatenated heads; without it they are the output.
        synthesizer_dim: hidden width of dense scores; 0: dim / num_heads.
        synthesizer_rank: inner width of factorised random scores.
        synthesizer_factors: widths (a, b) of factorised dense scores, a * b = max_length; empty: the squarest pair.
        trainable_scores: random scores are trained; else they stay as they were drawn.
        num_features: random features of "favor".
        kernel_degree: degree of "taylor" and "limit"; even, so that weights are positive.
        mask: which keys a query sees: all; none after itself; or, "prefix", all of segment 0 and none after itself in
            segment 1 (UniLM).

        activation: non-linearity of the position-wise network.
        gated: multiply its inner values by a second projection (GLU).
        feedforward_bias: biases in it.
        norm: normalisation before each branch and once at the end; after each residual sum; the latter with the
            constants of DeepNet; or the three norms of a GPT2_ML block.
        norm_kind: LayerNorm or RMSNorm.
        norm_eps: its epsilon.
        deepnorm_constants: for which optimiser: those of the paper (derived for SGD), or of kexue.fm 8978.
        initialisation: of the linear layers: PyTorch's own, normal with `init_std`, or Xavier. "deepnorm" takes Xavier.
        init_std: deviation of embeddings, and of linear layers where normal.

        sharing: what the layers of a group share (ALBERT): nothing, whole blocks, attention, or position-wise networks.
        num_groups: into how many groups the layers are cut.
        group_size: different blocks that a group applies one after another.
        heads: what stands on the hidden states: "pooler" (tanh layer on the first token), "masked_lm" (layer, norm,
            tied output, bias), "lm" (tied output), "sentence" (two classes on the pooled vector).

    Raises:
        InputError: a value or combination that is not possible; the message names what is.
    """

    vocab_size: int
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    feedforward_dim: int = 1024
    dropout: float = 0.1
    max_length: int = 512
    positions: Positions = "rope"
    norm: Norm = "pre"
    activation: Activation = "gelu"
    mask: Mask = "full"
    attention: Attention = "softmax"

    num_decoder_layers: int = 0
    attention_dropout: float | None = None
    feedforward_dropout: float = 0.0
    embedding_dim: int = 0
    num_segments: int = 0
    embedding_norm: bool | None = None
    first_position: int = 0
    rope_base: float = 10000.0
    clamp_length: int = 0

    mixture: tuple[Attention, ...] = ()
    num_kv_heads: int = 0
    key_size: int = 0
    head_size: int = 0
    attention_scale: Scale = "sqrt"
    scale_base: int = 512
    scale_floor: int = 16
    talking_heads: TalkingHeads = "none"
    num_key_heads: int = 0
    num_value_heads: int = 0
    attention_bias: bool = True
    output_projection: bool = True
    synthesizer_dim: int = 0
    synthesizer_rank: int = 8
    synthesizer_factors: tuple[int, ...] = ()
    trainable_scores: bool = True
    num_features: int = 256
    kernel_degree: int = 2

    gated: bool = False
    feedforward_bias: bool = True
    norm_kind: NormKind = "layer"
    norm_eps: float = 1e-5
    deepnorm_constants: DeepNormConstants = "paper"
    initialisation: Initialisation = "uniform"
    init_std: float = 0.02

    sharing: Sharing = "none"
    num_groups: int = 1
    group_size: int = 1
    heads: tuple[Head, ...] = ()

    _given: ClassVar[dict[str, Any]]  # set in each instance: what its constructor was called with

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        object.__setattr__(self, "_given", given)
        self._check_values()
        self._resolve()
        for wrong, arguments, remedy in self._conflicts():
            if wrong:
                given = ", ".join(f"{name}={getattr(self, name)!r}" for name in arguments.split())
                raise InputError(f"TransformerConfig({given}): {remedy}")

    def _check_values(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if get_origin(hint) is tuple and value is not None:
                object.__setattr__(self, field.name, tuple(value))  # YAML and JSON give lists
                hint = get_args(hint)[0]
            values = getattr(self, field.name) if isinstance(value, (list, tuple)) else (value,)
            if get_origin(hint) is Literal and (wrong := [v for v in values if v not in get_args(hint)]):
                allowed = ", ".join(get_args(hint))
                raise InputError(f"TransformerConfig({field.name}={wrong[0]!r}): use one of {allowed}")
            lowest = 0 if field.name in _MAY_BE_ZERO else 1
            for number in values:
                if type(number) is int and number < lowest:
                    raise InputError(f"TransformerConfig({field.name}={value}): use {lowest} or more")
        for name in ("dropout", "attention_dropout", "feedforward_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise InputError(f"TransformerConfig({name}={getattr(self, name)}): use 0 or more and less than 1")

    def _resolve(self) -> None:
        """Put in the values that 0, None and () stand for."""
        if self.dim % self.num_heads and not (self.key_size and self.head_size and self.synthesizer_dim):
            raise InputError(
                f"TransformerConfig(dim={self.dim}, num_heads={self.num_heads}): num_heads must divide dim, or give "
                "key_size, head_size and synthesizer_dim"
            )
        width = self.dim // self.num_heads
        defaults = {
            "embedding_dim": self.dim,
            "num_kv_heads": self.num_heads,
            "key_size": width,
            "head_size": width,
            "num_key_heads": self.num_heads,
            "num_value_heads": self.num_heads,
            "synthesizer_dim": width,
            "synthesizer_factors": _squarest(self.max_length),
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.attention_dropout is None:
            object.__setattr__(self, "attention_dropout", self.dropout)
        if self.embedding_norm is None:
            object.__setattr__(self, "embedding_norm", self.norm != "pre")

    def _conflicts(self) -> list[tuple[bool, str, str]]:
        """Combinations that no network has: (whether it is one, the arguments concerned, what is possible)."""
        synthetic = self.attention in (*SYNTHESIZERS, "mixture")
        kernel, talking = self.attention in KERNELS, self.talking_heads != "none"
        before, after = self.talking_heads in ("pre", "both"), self.talking_heads in ("post", "both")
        factors = self.synthesizer_factors
        return [
            (self.num_heads % self.num_kv_heads != 0, "num_heads num_kv_heads", "num_kv_heads must divide num_heads"),
            (
                talking and self.num_kv_heads != self.num_heads,
                "talking_heads num_kv_heads",
                "talking heads have keys and values of their own; leave num_kv_heads out",
            ),
            (
                not before and self.num_key_heads != self.num_heads,
                "num_key_heads num_heads talking_heads",
                "they differ only with talking_heads='pre' or 'both'",
            ),
            (
                not after and self.num_value_heads != self.num_heads,
                "num_value_heads num_heads talking_heads",
                "they differ only with talking_heads='post' or 'both'",
            ),
            (kernel and talking, "attention talking_heads", "linear attention has no scores to mix; use 'none'"),
            (
                kernel and self.mask == "prefix",
                "attention mask",
                "a sum over keys cannot end at another key for each query; use mask='full' or 'causal'",
            ),
            (
                kernel and self.positions == "relative",
                "attention positions",
                "linear attention has no scores to add to",
            ),
            (
                synthetic and self.positions in ("rope", "relative") and "softmax" not in self.mixture,
                "attention positions",
                "synthetic scores have no queries and keys; use positions='learned', 'sinusoidal' or 'none'",
            ),
            (
                self.attention_scale == "log_n" and (self.attention in SYNTHESIZERS or self.attention == "elu"),
                "attention attention_scale",
                "scales inner products of queries and keys; use 'sqrt'",
            ),
            (
                synthetic and self.num_kv_heads != self.num_heads,
                "attention num_kv_heads",
                "synthetic scores have no keys to share; leave num_kv_heads out",
            ),
            (
                synthetic and self.num_decoder_layers > 0,
                "attention num_decoder_layers",
                "synthetic scores have no meaning for the keys of another sequence; use one stack",
            ),
            (
                kernel and self.num_decoder_layers > 0,
                "attention num_decoder_layers",
                "use attention='softmax' in an encoder-decoder",
            ),
            (
                (self.attention == "mixture") != bool(self.mixture),
                "attention mixture",
                "give at least two kinds with attention='mixture', and none otherwise",
            ),
            (
                self.attention == "mixture"
                and (len(self.mixture) < 2 or not set(self.mixture) <= {"softmax", *SYNTHESIZERS}),
                "mixture",
                f"use two or more of softmax, {', '.join(SYNTHESIZERS)}",
            ),
            (
                len(factors) != 2 or factors[0] * factors[-1] != self.max_length,
                "synthesizer_factors max_length",
                f"give two factors of max_length, such as {_squarest(self.max_length)}",
            ),
            (self.scale_base < 2, "scale_base", "use 2 or more"),
            (
                self.kernel_degree % 2 == 1,
                "kernel_degree",
                "an odd degree gives negative weights; use an even one",
            ),
            (
                self.positions == "rope" and self.key_size % 2 == 1,
                "positions key_size dim num_heads",
                "key_size must be even",
            ),
            (
                self.positions in ("sinusoidal", "relative") and self.dim % 2 == 1,
                "positions dim",
                "dim must be even",
            ),
            (
                self.positions == "sinusoidal" and self.embedding_dim % 2 == 1,
                "positions embedding_dim",
                "embedding_dim must be even",
            ),
            (
                self.positions == "relative" and self.num_decoder_layers > 0,
                "positions num_decoder_layers",
                "use 'learned', 'sinusoidal' or 'rope' in an encoder-decoder",
            ),
            (
                self.first_position > 0 and self.positions != "learned",
                "first_position positions",
                "counting from a row of the table needs positions='learned'",
            ),
            (
                not self.output_projection and self.num_value_heads * self.head_size != self.dim,
                "output_projection num_value_heads head_size dim",
                "without a projection num_value_heads * head_size must be dim",
            ),
            (
                self.norm == "gpt2_ml" and self.num_decoder_layers > 0,
                "norm num_decoder_layers",
                "the block has no place for cross-attention; use one stack",
            ),
            (
                self.num_decoder_layers > 0 and self.mask != "full",
                "mask num_decoder_layers",
                "an encoder-decoder is causal in its decoder by itself; use mask='full'",
            ),
            (
                self.sharing != "none" and self.num_layers % self.num_groups != 0,
                "num_layers num_groups",
                "num_groups must divide num_layers",
            ),
            (
                self.sharing == "none" and (self.num_groups, self.group_size) != (1, 1),
                "sharing num_groups group_size",
                "groups need sharing='all', 'attention' or 'feedforward'",
            ),
            (
                self.sharing != "none" and self.num_decoder_layers > 0,
                "sharing num_decoder_layers",
                "groups are for a single stack; use sharing='none'",
            ),
            ("sentence" in self.heads and "pooler" not in self.heads, "heads", "'sentence' stands on 'pooler'; add it"),
        ]

    def changed(self, **changes: Any) -> "TransformerConfig":
        """The same but for some values. Unlike `dataclasses.replace`, what was left to a default follows them."""
        return TransformerConfig(**{**self._given, **changes})

    @property
    def depth(self) -> int:
        """Blocks that a token passes in the (first) stack."""
        return self.num_layers * self.group_size

    @property
    def kinds(self) -> tuple[Attention, ...]:
        """The kinds of scores that are added: one, or those of the mixture."""
        return self.mixture or (self.attention,)

    @property
    def has_keys(self) -> bool:
        """Whether attention has queries and keys."""
        return any(kind not in SYNTHESIZERS for kind in self.kinds)

    @property
    def why_not_packed(self) -> str | None:
        """Why sequences cannot share a row under this kind of attention; None where they can."""
        if self.attention in KERNELS:
            return f"attention={self.attention!r} sums over all keys of a row; use length buckets"
        if any(kind in SYNTHESIZERS for kind in self.kinds):
            return f"attention={self.attention!r} takes scores by place in the row; use length buckets"
        return None


_MAY_BE_ZERO = {
    "num_decoder_layers", "num_segments", "first_position", "clamp_length", "embedding_dim", "num_kv_heads", "key_size",
    "head_size", "num_key_heads", "num_value_heads", "synthesizer_dim",
}  # fmt: skip


def _squarest(number: int) -> tuple[int, int]:
    """The pair of factors that are closest to each other, the smaller first."""
    first = next(a for a in range(int(number**0.5), 0, -1) if number % a == 0)
    return first, number // first
