"""Other sizes for a Transformer that has weights already: its vocabulary, its positions, its keys.

Call these before the optimiser is made and before a strategy wraps the module: parameters are replaced.

Source: https://kexue.fm/archives/7325 and bert4keras for wider keys.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import InputError
from ..attention import Attention
from ..config import KERNELS, SYNTHESIZERS, TransformerConfig
from ..transformer import EncoderDecoder, Transformer


def resize_vocabulary(module: Transformer | EncoderDecoder, size: int) -> None:
    """Give a module `size` tokens: the first ones stay, rows of new ones are drawn as those of a new table are.

    The output that is tied to the table goes with it; the bias of a new token is 0.
    """
    if size < 1:
        raise InputError(f"resize_vocabulary(size={size}): use 1 or more")
    _change_tokens(module, lambda old, new: _resized(old, size, new), "resize_vocabulary")


def subset_vocabulary(module: Transformer | EncoderDecoder, ids: Sequence[int]) -> None:
    """Keep the tokens `ids`, which get the numbers 0, 1, ... in that order."""
    rows = module.config.vocab_size
    if not len(ids) or not 0 <= min(ids) <= max(ids) < rows:
        raise InputError(f"subset_vocabulary(ids=...): give at least one id, each from 0 to {rows - 1}")
    _change_tokens(module, lambda old, new: old[torch.tensor(list(ids), device=old.device)], "subset_vocabulary")


def extend_positions(module: Transformer | EncoderDecoder, max_length: int) -> None:
    """Make room for longer inputs in the learned table of positions: rows of new ones are drawn, and want training."""
    config, table = module.config, module.embedding.positions
    if table is None:
        raise InputError(
            f"extend_positions(module): positions={config.positions!r} have no table; build it with another max_length"
        )
    if any(kind in SYNTHESIZERS for kind in config.kinds):
        raise InputError(f"extend_positions(module): the scores of attention={config.attention!r} have this size, too")
    if max_length < config.max_length:
        raise InputError(f"extend_positions(max_length={max_length}): use {config.max_length} or more")
    _refuse_shards(module, "extend_positions")
    _replace(table, "weight", _resized(table.weight, max_length + config.first_position, config.init_std))
    table.num_embeddings = len(table.weight)
    _set_config(module, max_length=max_length, synthesizer_factors=())


def widen_keys(module: Transformer | EncoderDecoder, key_size: int) -> None:
    """Give queries and keys more features without a change of any output: the new ones start at 0.

    Scores are inner products over sqrt(key_size), so queries and keys are both multiplied by (new / old)^(1/4).

    Raises:
        InputError: the new size is smaller, or the scores depend on it in other ways: rotation has other wave lengths
            for other sizes, and the feature maps of linear attention are no inner products.
    """
    config = module.config
    if config.positions == "rope":
        raise InputError("widen_keys(module): positions='rope' turn other features by other angles; keep the size")
    if config.attention in KERNELS or not config.has_keys:
        raise InputError(f"widen_keys(module): attention={config.attention!r} has no inner products; use 'softmax'")
    if key_size < config.key_size:
        raise InputError(f"widen_keys(key_size={key_size}): use {config.key_size} or more")
    _refuse_shards(module, "widen_keys")
    old, factor = config.key_size, (key_size / config.key_size) ** 0.25

    def widen(rows: Tensor) -> Tensor:
        """Pad the rows `(N * K, ...)` of N heads."""
        heads = rows.unflatten(0, (-1, old)) * factor
        zeros = heads.new_zeros(len(heads), key_size - old, *heads.shape[2:])
        return torch.cat((heads, zeros), dim=1).flatten(0, 1)

    part: Any
    for part in module.modules():
        if isinstance(part, Attention):
            keys = 1 if part.query is not None else 2  # in cross-attention the queries are projected apart
            _widen(part.projection, widen, keys)
            part.widths = part.projection.parts  # type: ignore[assignment]
            for whole in (part.query, part.relative):
                if whole is not None:
                    _widen(whole, widen, 1)
        elif isinstance(biases := getattr(part, "biases", None), nn.Parameter):
            padded = torch.stack([widen(bias.flatten()).view(-1, key_size) for bias in biases.detach()])
            _replace(part, "biases", padded)
    _set_config(module, key_size=key_size)


def _widen(projection: Any, widen: Callable[[Tensor], Tensor], count: int) -> None:
    """Pad the first `count` parts of a projection."""
    for name in ("weight", "bias"):
        if (parameter := getattr(projection, name)) is not None:
            parts = parameter.detach().split(projection.parts)
            parts = [widen(part) if index < count else part for index, part in enumerate(parts)]
            sizes = tuple(len(part) for part in parts)
            _replace(projection, name, torch.cat(parts))
    projection.parts, projection.out_features = sizes, sum(sizes)


def _change_tokens(
    module: Transformer | EncoderDecoder, change: Callable[[Tensor, float], Tensor], function: str
) -> None:
    """Replace what has a row for each token; `change` gets the rows and the deviation of new ones."""
    _refuse_shards(module, function)
    table = module.embedding.tokens
    _replace(table, "weight", change(table.weight.detach(), module.config.init_std))
    table.num_embeddings = len(table.weight)
    if isinstance(module, Transformer) and module.masked_token_head is not None:
        _replace(module.masked_token_head, "bias", change(module.masked_token_head.bias.detach(), 0.0))
    _set_config(module, vocab_size=len(table.weight))


def _resized(rows: Tensor, size: int, std: float) -> Tensor:
    """The first `size` rows, and new ones where there are fewer."""
    new = rows.new_empty(max(size - len(rows), 0), *rows.shape[1:]).normal_(std=std)
    return torch.cat((rows.detach()[:size], new))


def _replace(owner: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(owner, name, nn.Parameter(tensor, requires_grad=getattr(owner, name).requires_grad))


def _set_config(module: nn.Module, **changes: Any) -> None:
    """Change the config of a module and of its parts."""
    part: Any
    for part in module.modules():
        if isinstance(config := getattr(part, "config", None), TransformerConfig):
            part.config = config.changed(**changes)


def _refuse_shards(module: nn.Module, function: str) -> None:
    if any(hasattr(parameter, "ds_shape") for parameter in module.parameters()):
        raise InputError(
            f"{function}(module): ZeRO stage 3 has cut its parameters; do it before, in a run of its own, and save it"
        )
