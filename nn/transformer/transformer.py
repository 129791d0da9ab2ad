"""The Transformer: one stack of blocks, or an encoder and a decoder.  Shapes: B batch, T tokens, D features, V ids.

Source: https://kexue.fm/archives/4765; ALBERT (arXiv 1909.11942) for groups; https://kexue.fm/archives/7187 for layers
that stop sharing.  Checked against: the models of transformers, torch.nn.TransformerEncoderLayer.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from .attention import Context
from .blocks import TransformerBlock
from .cache import Cache, Memory
from .config import TransformerConfig
from .embeddings import Embedding, places_of
from .heads import MaskedTokenHead, Pooler, TokenHead
from .masks import Visibility, visibility
from .positions import distance_vectors, position_angles
from .residual import Projection, Stack, make_norm, residual_constants


class Layers(nn.Module):
    """A stack of blocks and the norm at its end.

    Args:
        config: sizes and choices.
        stack: which part of an encoder-decoder this is; a decoder attends to a source as well.
    """

    def __init__(self, config: TransformerConfig, stack: Stack = "encoder") -> None:
        super().__init__()
        self.config = config
        cross = stack == "decoder"
        constants = residual_constants(config, stack)
        group_size, num_groups = config.group_size, config.num_groups
        if config.sharing == "all":
            count = num_groups * group_size
        else:
            count = config.num_decoder_layers if cross else config.depth
        self.blocks = nn.ModuleList(TransformerBlock(config, constants, cross) for _ in range(count))
        self.order = list(range(count))
        if config.sharing != "none":
            groups = [layer * num_groups // config.num_layers for layer in range(config.num_layers)]
            firsts = [group * group_size + inner for group in groups for inner in range(group_size)]
            if config.sharing == "all":
                self.order = firsts
            else:
                self._share(config.sharing, firsts)
        self.norm = make_norm(config) if config.norm == "pre" else None
        self.biases = None
        if config.positions == "relative":
            self.biases = nn.Parameter(torch.zeros(2, config.num_key_heads, config.key_size))

    def _share(self, part: str, firsts: list[int]) -> None:
        """Give the blocks of a group the attention, or the position-wise network, of its first block."""
        leaders: dict[int, nn.Module] = {}
        for block, first in zip(self.blocks, firsts, strict=True):
            setattr(block, part, leaders.setdefault(first, getattr(block, part)))

    def forward(
        self,
        hidden: Tensor,
        visible: Visibility,
        places: Tensor,
        cache: Cache | None = None,
        memory: Memory | None = None,
        source: Tensor | None = None,
        source_visible: Visibility | None = None,
    ) -> list[Tensor]:
        """Pass `(B, T, D)` through the blocks.

        Args:
            hidden: embeddings.
            visible: which keys a query sees.
            places: position of each token, `(T,)` or `(B, T)`.
            cache: of a generation.
            memory: of earlier segments; it takes up this one.
            source: hidden states of the encoder `(B, S, D)`.
            source_visible: which of them a query sees.

        Returns:
            The input and the output of every block, the last one normalised where the stack ends with a norm.
        """
        config, context = self.config, Context(visible, source_visible=source_visible)
        if config.positions == "rope":
            angles = position_angles(places, config.key_size, base=config.rope_base)
            context = replace(context, angles=angles if places.dim() == 1 else angles[:, None])
        elif config.positions == "relative":
            distances = distance_vectors(
                visible.num_queries,
                visible.num_keys,
                config.dim,
                both_ways=not visible.causal,
                clamp=config.clamp_length,
                device=hidden.device,
            )
            context = replace(context, distances=distances, biases=self.biases)
        states = [hidden]
        remembered = memory.states if memory is not None and memory.states else None
        for layer, index in enumerate(self.order):
            states.append(
                self.blocks[index](
                    states[-1],
                    context,
                    None if cache is None else cache.layers[layer],
                    None if remembered is None else remembered[layer],
                    source,
                )
            )
        if memory is not None:
            memory.update(states[:-1], visible.keys)
        if self.norm is not None:
            states[-1] = self.norm(states[-1])
        return states


class Transformer(nn.Module):
    """Token ids to contextual vectors, and on to what the config's `heads` ask for.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.num_decoder_layers:
            raise InputError("Transformer(num_decoder_layers=...): one stack has no decoder; use EncoderDecoder")
        self.config = config
        self.embedding = Embedding(config)
        self.layers = Layers(config)
        self.pooler = Pooler(config) if "pooler" in config.heads else None
        self.sentence_head = Projection(config.dim, 2, config) if "sentence" in config.heads else None
        self.masked_token_head = MaskedTokenHead(config) if "masked_lm" in config.heads else None
        self.token_head = TokenHead(config) if "lm" in config.heads else None

    def blocks(self) -> nn.ModuleList:
        """The repeated units."""
        return self.layers.blocks

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        sequences: Tensor | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Encode a batch.

        Args:
            ids: token ids `(B, T)`.
            mask: 1 where a token is real, `(B, T)`; None when all are.
            segments: segment numbers `(B, T)`; None: all 0. A prefix mask reads them, too.
            positions: position of every token `(B, T)`, where rows hold several sequences.
            sequences: number of the sequence that a token belongs to `(B, T)`, 0 at padding: tokens of different
                sequences do not see each other.
            cache: keys and values of earlier tokens, `new_cache()` for the first pass; `ids` and `mask` are then
                those of the new tokens.
            memory: hidden states of earlier segments, for relative positions.

        Returns:
            `(B, T, D)`; values at padded places are finite and mean nothing.

        Raises:
            InputError: the input is longer than `max_length`, or what is asked does not go with the config.
        """
        return self.hidden_states(
            ids, mask, segments, positions=positions, sequences=sequences, cache=cache, memory=memory
        )[-1]

    def hidden_states(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        sequences: Tensor | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> list[Tensor]:
        """The embeddings and the output of every block, `(B, T, D)` each; arguments as in `forward`."""
        config, (batch, length) = self.config, ids.shape
        if sequences is not None:
            self._check_packing(positions, cache, memory)
        past, kind, seen_segments = 0, config.mask, segments
        if cache is not None:
            past = cache.length
            mask = cache.extend(batch, length, mask)
            if past and kind == "prefix":  # what follows the prefix and its first tokens sees all of them
                kind, seen_segments = "causal", None
        if positions is None:
            positions = places_of(config, length, past, mask, ids.device)
        else:
            positions = positions + config.first_position
        if memory is not None:
            if config.positions != "relative":
                raise InputError(f"TransformerConfig(positions={config.positions!r}): a memory needs 'relative'")
            mask = memory.extend(batch, length, mask)
            past = memory.size
        visible = visibility(
            kind,
            length,
            ids.device,
            past=past,
            mask=mask,
            segments=seen_segments,
            sequences=sequences,
            nearest=memory.length if memory is not None and memory.same_length else 0,
        )
        return self.layers(self.embedding(ids, positions, segments), visible, positions, cache, memory)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, `(..., V)`, from hidden states `(..., D)` of whichever places are wanted."""
        head = self.masked_token_head if self.masked_token_head is not None else self.token_head
        if head is None:
            raise InputError("TransformerConfig(heads=...): 'masked_lm' or 'lm' gives scores of tokens; add one")
        return head(hidden, self.embedding.tokens)

    def pooled(self, hidden: Tensor) -> Tensor:
        """A vector of each sequence, `(B, D)`, from its hidden states `(B, T, D)`."""
        if self.pooler is None:
            raise InputError("TransformerConfig(heads=...): 'pooler' gives a vector of the sequence; add it")
        return self.pooler(hidden)

    def sentence_logits(self, hidden: Tensor) -> Tensor:
        """Scores `(B, 2)` of the two classes of sentence pairs, from hidden states `(B, T, D)`."""
        if self.sentence_head is None:
            raise InputError("TransformerConfig(heads=...): 'sentence' gives scores of sentence pairs; add it")
        return self.sentence_head(self.pooled(hidden))

    def new_cache(self) -> Cache:
        """An empty cache for a generation.

        Raises:
            InputError: tokens see what comes after them.
        """
        if self.config.mask == "full":
            raise InputError("TransformerConfig(mask='full'): a cache needs mask='causal' or 'prefix'")
        if self.config.positions == "relative":
            raise InputError("TransformerConfig(positions='relative'): generate with a Memory in place of a cache")
        return Cache(len(self.layers.order))

    def _check_packing(self, positions: Tensor | None, cache: Cache | None, memory: Memory | None) -> None:
        if self.config.why_not_packed:
            raise InputError(f"TransformerConfig: {self.config.why_not_packed}")
        if positions is None or cache is not None or memory is not None:
            raise InputError("Transformer(sequences=...): packed rows need positions=, and no cache or memory")


class EncoderDecoder(nn.Module):
    """An encoder, and a causal decoder that attends to it, over one table of tokens.

    Args:
        config: sizes and choices; `num_decoder_layers` is 1 or more.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if not config.num_decoder_layers:
            raise InputError("EncoderDecoder(num_decoder_layers=0): use 1 or more, or Transformer for one stack")
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = Layers(config, "encoder")
        self.decoder = Layers(config, "decoder")
        self.token_head = TokenHead(config) if "lm" in config.heads else None

    def blocks(self) -> list[nn.Module]:
        """The repeated units of both stacks."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the target `(B, T, D)`.

        Args:
            source: token ids `(B, S)`.
            target: token ids `(B, T)`, each seen by those after it.
            source_mask: 1 where a token of the source is real.
            target_mask: 1 where a token of the target is real.
        """
        return self.decode(target, self.encode(source, source_mask), source_mask, target_mask)

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states of the source `(B, S, D)`."""
        places = places_of(self.config, ids.shape[1], 0, mask, ids.device)
        visible = visibility("full", ids.shape[1], ids.device, mask=mask)
        return self.encoder(self.embedding(ids, places), visible, places)[-1]

    def decode(
        self,
        ids: Tensor,
        source: Tensor,
        source_mask: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states of the target `(B, T, D)` over those of the source; with a cache, of its new tokens."""
        batch, length, past = *ids.shape, 0
        if cache is not None:
            past = cache.length
            mask = cache.extend(batch, length, mask)
        places = places_of(self.config, length, past, mask, ids.device)
        visible = visibility("causal", length, ids.device, past=past, mask=mask)
        keys = None if source_mask is None else source_mask.bool()
        source_visible = Visibility(length, source.shape[1], ids.device, keys=keys)
        hidden = self.embedding(ids, places)
        return self.decoder(hidden, visible, places, cache, source=source, source_visible=source_visible)[-1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, `(..., V)`."""
        if self.token_head is None:
            raise InputError("TransformerConfig(heads=...): 'lm' gives scores of tokens; add it")
        return self.token_head(hidden, self.embedding.tokens)

    def new_cache(self) -> Cache:
        """An empty cache for a generation."""
        return Cache(self.config.num_decoder_layers)


def unshared(module: Transformer) -> Transformer:
    """A Transformer whose layers are copies of those that `module` shares: equal at first, each trained on its own."""
    config = module.config.changed(sharing="none", num_groups=1, num_layers=module.config.depth, group_size=1)
    copied = Transformer(config)
    names = [f"layers.blocks.{layer}." for layer in range(config.num_layers)]
    state = {name: value for name, value in module.state_dict().items() if not name.startswith("layers.blocks.")}
    for name, index in zip(names, module.layers.order, strict=True):
        state |= {name + key: value for key, value in module.layers.blocks[index].state_dict().items()}
    weight = module.embedding.tokens.weight
    copied.to(weight.device, weight.dtype).load_state_dict(state)  # which copies the values
    return copied.train(module.training)


def take_last_norm(module: Transformer) -> nn.Module:
    """Take the norm at the end of a Transformer out and return it: what it gave is then this norm of the output.

    A head that normalises in its own way, under a condition for instance, starts from there.

    Raises:
        InputError: the last norm is not the last step, or belongs to earlier layers too.
    """
    layers = module.layers
    if layers.norm is not None:
        norm, layers.norm = layers.norm, None
        return norm
    block = layers.blocks[layers.order[-1]]
    if module.config.norm not in ("post", "deepnorm") or module.config.sharing != "none":
        raise InputError(
            f"take_last_norm: norm={module.config.norm!r} with sharing={module.config.sharing!r} has none of its own "
            "at the end; use norm='pre' or 'post', and sharing='none'"
        )
    last: Any = block.feedforward_norm
    block.feedforward_norm = nn.Identity()
    return last
