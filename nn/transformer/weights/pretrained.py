"""Published weights into a Transformer, strictly, and back.

Source: the models of transformers 5.23.  Checked against: their logits, hidden states and gradients.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....errors import InputError
from ..config import Head, TransformerConfig
from ..residual import Projection
from ..transformer import Transformer
from . import files
from .configs import layout_of, options_from, values_from
from .families import LAYOUTS
from .fitting import check
from .layouts import Address, Layout

CHANGES = (
    "dropout",
    "attention_dropout",
    "feedforward_dropout",
    "mask",
    "activation",
    "attention_scale",
    "scale_base",
    "scale_floor",
    "norm_eps",
    "initialisation",
    "init_std",
)
"""What may differ from the file: nothing that adds or removes weights."""

PER_TOKEN = ("embedding.tokens.weight", "masked_token_head.bias")
"""Parameters with a row for each token."""


def from_pretrained(
    name: str | Path,
    *,
    heads: Literal["all"] | Sequence[Head] = "all",
    unshare: bool = False,
    vocabulary: Sequence[int] | None = None,
    ignore: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **changes: Any,
) -> Transformer:
    """Build the Transformer of published weights, in evaluation mode as transformers gives its models.

    The layouts are those of BERT, RoBERTa, ALBERT, RoFormer and GPT-2 in transformers, and of GPT2_ML. Every weight of
    the Transformer must be in the file and every weight of the file have its place; all that differ are named at once.

    In a LightningModule:

        def configure_model(self) -> None:
            if self.net is None:
                self.net = from_pretrained("folder", heads=()).train()

    Lightning leaves every module in the mode it finds: without `train()` fine-tuning would go without dropout.
    Every process maps the file and copies one weight after another, under ZeRO stage 3 into its shards.

    Args:
        name: a folder with config.json and model.safetensors or pytorch_model.bin, whole or in pieces; or a name on
            the hub.
        heads: those of the file that are built, or "all" that it has; with `()` none, so that no parameter is without
            a gradient in fine-tuning.
        unshare: give every layer of an ALBERT its own copy of the block that it shares.
        vocabulary: ids of the tokens that are kept, in their new order; None: all.
        ignore: patterns of names in the file that are left out deliberately, such as "classifier.*".
        dtype: of the parameters; None: PyTorch's default, whatever the file has.
        revision: of the name on the hub.
        cache_dir: where the hub's files are kept.
        **changes: arguments of `TransformerConfig` that go before the file's: rates of dropout, `mask`, and others
            that change no weights.

    Raises:
        InputError: nothing of that name, a config that the Transformer cannot do, or weights that do not fit.
    """
    _check_changes("from_pretrained", changes)
    folder = files.find_folder(name, revision, cache_dir)
    where = str(folder / files.CONFIG)
    values, weights = files.read_json(folder / files.CONFIG), files.Weights(folder)
    layout = _layout(values, weights, where)
    entries = _entries(layout, weights, ignore)
    options = options_from(layout, values, changes, where)
    options["heads"] = _heads(layout, entries, heads)
    config = TransformerConfig(**options)
    source = _Source(layout, weights, entries, config)
    if unshare:
        config, source.blocks = _unshared(config, layout)
    if vocabulary is not None:
        source.keep = _kept(vocabulary, config.vocab_size)
        config = config.changed(vocab_size=len(source.keep))
    with torch.device("meta"):  # nothing is drawn for parameters that are read
        module = Transformer(config)
    if next(module.parameters()).is_meta:  # not under ZeRO stage 3, which makes its shards at once
        device = torch.get_default_device()
        module.to_empty(device="cpu" if device.type == "meta" else device)
    if dtype is not None:
        module.to(dtype)
    check(folder, layout, weights, entries, source.wanted(module), module.config)
    source.fill(module)
    return module.eval()


def to_pretrained(module: Transformer, folder: str | Path, **changes: Any) -> None:
    """Write config.json and model.safetensors as transformers reads them, and as `from_pretrained` does.

    Where transformers has no class with just these heads, the class named in config.json is the one that holds most.

    Args:
        module: with whole parameters; of a ZeRO run, build it anew and load the checkpoint's weights first.
        folder: made if it is not there.
        **changes: arguments of `TransformerConfig` that are written in place of the module's, where the layout cannot
            say them: `mask="full"` for weights that were trained with a prefix mask.

    Raises:
        InputError: no layout has what the config has; the message names it.
    """
    _check_changes("to_pretrained", changes)
    if any(hasattr(parameter, "ds_shape") for parameter in module.parameters()):
        raise InputError(
            "to_pretrained(module): ZeRO stage 3 has cut its parameters; load its checkpoint into a new one"
        )
    config = module.config.changed(**changes)
    layout = layout_of(config)
    with_heads = bool(layout.classes and set(config.heads) - {"pooler"})
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        address = layout.address(name, range(config.depth), config.group_size)
        parts = parameter.detach().split(_heights(module, name, len(parameter), address))
        for theirs, part in zip(address.names, parts, strict=True):
            full = layout.prefixed(theirs, address.head) if with_heads else theirs
            tensors[full] = (part.T if address.transposed else part).cpu().contiguous()
    for theirs, make in layout.computed.items():
        if (tensor := make(config)) is not None:
            tensors[layout.prefixed(theirs, None) if with_heads else theirs] = tensor
    values = values_from(layout, config)
    values["dtype"] = str(next(module.parameters()).dtype).removeprefix("torch.")
    files.write(Path(folder), values, tensors)


class _Source:
    """Weights of a folder on their way into a module."""

    def __init__(
        self, layout: Layout, weights: files.Weights, entries: dict[str, str], config: TransformerConfig
    ) -> None:
        self.layout = layout
        self.weights = weights
        self.entries = entries
        self.vocab_size = config.vocab_size
        self.group_size = config.group_size
        self.blocks = list(range(config.depth))
        """Which of the file's blocks each block of the module takes."""
        self.keep: Tensor | None = None
        """The tokens that are kept; None: all."""

    def addresses(self, module: Transformer) -> dict[str, Address]:
        """Where each parameter is."""
        names = (name for name, _ in module.named_parameters())
        return {name: self.layout.address(name, self.blocks, self.group_size) for name in names}

    def wanted(self, module: Transformer) -> dict[str, tuple[int, ...]]:
        """The shape that each entry must have."""
        wanted: dict[str, tuple[int, ...]] = {}
        addresses = self.addresses(module)
        for name, parameter in module.named_parameters():
            rows, *columns = getattr(parameter, "ds_shape", parameter.shape)
            heights = _heights(module, name, self.vocab_size if name in PER_TOKEN else rows, addresses[name])
            for theirs, height in zip(addresses[name].names, heights, strict=True):
                wanted[theirs] = (*columns, height) if addresses[name].transposed else (height, *columns)
        return wanted

    @torch.no_grad()
    def fill(self, module: Transformer) -> None:
        """Copy every parameter."""
        addresses = self.addresses(module)
        for name, parameter in module.named_parameters():
            address = addresses[name]
            with _whole(parameter):
                parts = parameter.split(_heights(module, name, len(parameter), address))
                for theirs, part in zip(address.names, parts, strict=True):
                    tensor = self.weights[self.entries[theirs]]
                    if self.keep is not None and name in PER_TOKEN:
                        tensor = tensor[self.keep]
                    part.copy_(tensor.T if address.transposed else tensor)


def _heights(module: nn.Module, name: str, rows: int, address: Address) -> Sequence[int]:
    """How many rows of a parameter belong to each name there."""
    if len(address.names) == 1:
        return (rows,)
    projection = module.get_submodule(name.rpartition(".")[0])
    assert isinstance(projection, Projection)
    return projection.parts


@contextmanager
def _whole(parameter: Any) -> Iterator[None]:
    """Bring a parameter together that ZeRO stage 3 has cut, and cut it again; for others do nothing.

    DeepSpeed puts both methods on the parameters; each process writes the same values.
    """
    cut = hasattr(parameter, "ds_shape")
    if cut:
        parameter.all_gather()
    yield
    if cut:
        parameter.partition(has_been_updated=True)


def _check_changes(function: str, changes: Iterable[str]) -> None:
    if wrong := [name for name in changes if name not in CHANGES]:
        raise InputError(
            f"{function}({wrong[0]}=...): follows from the weights; what may be changed: {', '.join(CHANGES)}"
        )


def _layout(values: Mapping[str, Any], weights: Iterable[str], where: str) -> Layout:
    kind = values.get("model_type")
    if kind == "gpt2" and any(name.endswith("emb_norm.weight") for name in weights):
        kind = "gpt2_ml"  # its published folders say "gpt2"
    if kind not in LAYOUTS:
        raise InputError(f"{where}: model_type={kind!r} cannot be loaded, only {', '.join(LAYOUTS)}")
    return LAYOUTS[kind]


def _entries(layout: Layout, weights: Iterable[str], ignore: Sequence[str]) -> dict[str, str]:
    """Name in the layout's table to name in the file, without what is ignored.

    The names of a bare model have no prefix; files converted from TensorFlow call the weights of norms gamma and beta;
    of tied weights either name may be there.
    """
    entries: dict[str, str] = {}
    for name in weights:
        if any(fnmatchcase(name, pattern) for pattern in ignore):
            continue
        known = re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name.removeprefix(layout.prefix)))
        entries[name if known in entries else known] = name
    for twin, original in layout.twins.items():
        if original not in entries and twin in entries:
            entries[original] = entries.pop(twin)
    return entries


def _heads(layout: Layout, entries: Iterable[str], heads: Literal["all"] | Sequence[Head]) -> tuple[Head, ...]:
    if heads == "all":
        there = {layout.head_of(name) for name in entries}
        return tuple(head for head, table in layout.heads.items() if head in there or not table)
    if wrong := [head for head in heads if head not in layout.heads]:
        raise InputError(
            f"from_pretrained(heads={tuple(heads)!r}): weights of {layout.name!r} have no {wrong[0]!r}; "
            f"use 'all' or some of {', '.join(layout.heads)}"
        )
    return tuple(heads)


def _unshared(config: TransformerConfig, layout: Layout) -> tuple[TransformerConfig, list[int]]:
    """The config of a Transformer that shares nothing, and which block of the file each of its layers takes."""
    if config.sharing != "all":
        raise InputError(f"from_pretrained(unshare=True): the layers of {layout.name!r} share nothing; leave it out")
    groups = (layer * config.num_groups // config.num_layers for layer in range(config.num_layers))
    blocks = [group * config.group_size + inner for group in groups for inner in range(config.group_size)]
    return config.changed(sharing="none", num_groups=1, group_size=1, num_layers=len(blocks)), blocks


def _kept(vocabulary: Sequence[int], vocab_size: int) -> Tensor:
    if not len(vocabulary) or not 0 <= min(vocabulary) <= max(vocabulary) < vocab_size:
        raise InputError(f"from_pretrained(vocabulary=...): give at least one id, each from 0 to {vocab_size - 1}")
    return torch.tensor(list(vocabulary))
