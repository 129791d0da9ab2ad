"""A Transformer as the step of a generation: what `nn.decoding` asks for the next token's scores.

Shapes: B rows of the batch, T tokens, V ids.
"""

import torch
from torch import Tensor

from ...errors import InputError
from .cache import Memory
from .transformer import EncoderDecoder, Transformer


class CachedDecoder:
    """Feeds tokens to a module and keeps what it has computed of earlier ones.

    Args:
        module: a `Transformer` with mask "causal" or "prefix" and a head for tokens, or an `EncoderDecoder`.
        mask: 1 where a token of the prompt is real, `(B, T)`; prompts of different lengths are padded on the left.
        segments: segment numbers of the prompt `(B, T)`; what follows it has `next_segment`.
        next_segment: segment of the generated tokens; None: the module has no segments.
        source: of an `EncoderDecoder`: token ids `(B, S)`.
        source_mask: 1 where they are real.
        memory_length: of relative positions: how many tokens to remember.
    """

    def __init__(
        self,
        module: Transformer | EncoderDecoder,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        next_segment: int | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        memory_length: int = 0,
    ) -> None:
        if isinstance(module, EncoderDecoder) != (source is not None):
            raise InputError("CachedDecoder(source=...): give it with an EncoderDecoder, and only then")
        if mask is not None and not bool(mask[:, -1].all()):
            raise InputError("CachedDecoder(mask=...): pad prompts on the left, so that all of them end together")
        self.module = module
        self.mask, self.segments, self.next_segment = mask, segments, next_segment
        self.memory = Memory(memory_length) if module.config.positions == "relative" else None
        self.cache = module.new_cache() if self.memory is None else None
        self.seen = 0
        self.padding = None if mask is None else (mask == 0).sum(-1, keepdim=True)
        self.source = self.source_mask = None
        if isinstance(module, EncoderDecoder):
            assert source is not None
            with torch.no_grad():
                self.source, self.source_mask = module.encode(source, source_mask), source_mask

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Take in the next tokens `(B, T)`, first those of the prompt; return the scores of the one after, `(B, V)`."""
        mask, self.mask = self.mask, None
        if isinstance(self.module, EncoderDecoder):
            assert self.source is not None
            hidden = self.module.decode(tokens, self.source, self.source_mask, mask, self.cache)
            return self.module.logits(hidden[:, -1])
        segments = self.segments
        if segments is None and self.next_segment is not None and self.seen:
            segments = torch.full_like(tokens, self.next_segment)
        self.segments = None
        positions = None
        if self.padding is not None:  # the first real token of every row is the first
            places = torch.arange(self.seen, self.seen + tokens.shape[1], device=tokens.device)
            positions = (places - self.padding).clamp(min=0)
        self.seen += tokens.shape[1]
        hidden = self.module(tokens, mask, segments, positions=positions, cache=self.cache, memory=self.memory)
        return self.module.logits(hidden[:, -1])

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.cache is not None:
            self.cache.reorder(rows)
        if self.memory is not None:
            self.memory.reorder(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]
        if self.source is not None:
            self.source = self.source[rows]
            self.source_mask = None if self.source_mask is None else self.source_mask[rows]
