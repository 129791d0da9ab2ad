"""From the fields of a published config.json to a `TransformerConfig`, and back."""

from collections.abc import Mapping
from typing import Any

from ....errors import InputError
from ..config import TransformerConfig
from .families import LAYOUTS
from .layouts import Layout

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}

_TELLING = ("norm=", "positions=", "first_position=", "sharing=")
"""What tells the kinds apart, where none fits wholly."""


def conflicts(layout: Layout, config: TransformerConfig) -> list[str]:
    """What a config has that the layout cannot hold, each with what the layout has."""
    found = []
    for name, allowed in layout.fixed.items():
        if (value := getattr(config, name)) not in allowed:
            found.append(f"{name}={value!r} (there {' or '.join(map(repr, allowed))})")
    for name in layout.positive:
        if not getattr(config, name):
            found.append(f"{name}=0 (there 1 or more)")
    for name, other in layout.equal:
        if getattr(config, name) != getattr(config, other):
            found.append(f"{name}={getattr(config, name)} (there {other}={getattr(config, other)})")
    if config.num_heads * config.head_size != config.dim:
        found.append(f"head_size={config.head_size} (there dim / num_heads)")
    if config.activation not in _ACTIVATIONS.values():
        found.append(f"activation={config.activation!r} (there {' or '.join(sorted(set(_ACTIVATIONS.values())))})")
    if heads := [head for head in config.heads if head not in layout.heads]:
        found.append(f"heads={tuple(heads)} (there {' or '.join(layout.heads)})")
    return found


def layout_of(config: TransformerConfig) -> Layout:
    """The layout that the weights of a config are published in.

    Raises:
        InputError: there is none; the message names the options that the nearest one does not have.
    """
    found = {layout.name: conflicts(layout, config) for layout in LAYOUTS.values()}
    nearest = min(found, key=lambda name: (sum(c.startswith(_TELLING) for c in found[name]), len(found[name])))
    if found[nearest]:
        raise InputError(
            f"no layout of published weights holds this TransformerConfig; the nearest, {nearest!r}, "
            f"does not have {', '.join(found[nearest])}"
        )
    return LAYOUTS[nearest]


def options_from(layout: Layout, values: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `TransformerConfig` from the fields of a config.json.

    Args:
        layout: which one it is.
        values: the fields.
        changes: arguments that go before those from the file.
        where: path of the file, for messages.

    Raises:
        InputError: a field is missing, or has a value that the Transformer cannot do.
    """
    for name, allowed in layout.allowed.items():
        if (value := values.get(name, allowed[0])) not in allowed:
            raise InputError(f"{where}: {name}={value!r} cannot be loaded, only {' or '.join(map(repr, allowed))}")
    options: dict[str, Any] = {name: allowed[0] for name, allowed in layout.fixed.items()}
    for name, theirs in layout.fields.items():
        options[name] = values.get(theirs, layout.defaults.get(theirs))
        if theirs not in layout.defaults and type(options[name]) is not int:
            raise InputError(f"{where}: {theirs}={options[name]!r}, where {layout.name!r} needs a whole number")
    activation = options["activation"]
    if activation not in _ACTIVATIONS:
        field_name = layout.fields["activation"]
        raise InputError(f"{where}: {field_name}={activation!r} cannot be loaded, only {', '.join(_ACTIVATIONS)}")
    options["activation"] = _ACTIVATIONS[activation]
    options["feedforward_dim"] = options["feedforward_dim"] or 4 * options["dim"]
    options["embedding_dim"] = options.get("embedding_dim") or 0
    if "mask" in layout.fields:
        options["mask"] = "causal" if options["mask"] else "full"
    if "first_position" in layout.fields:
        options["first_position"] += 1  # of the padding
        options["max_length"] -= options["first_position"]
    if values.get("embd_pdrop", options["dropout"]) != options["dropout"] and "dropout" not in changes:
        raise InputError(
            f"{where}: embd_pdrop={values['embd_pdrop']} and resid_pdrop={options['dropout']} are one rate here; "
            "give it as dropout="
        )
    return {**options, "initialisation": "normal", **changes}


def values_from(layout: Layout, config: TransformerConfig) -> dict[str, Any]:
    """The fields of a config.json for a config: the inverse of `options_from`."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    options = {name: getattr(config, name) for name in layout.fields}
    options["activation"] = names[config.activation]
    if "mask" in layout.fields:
        options["mask"] = config.mask == "causal"
    if "first_position" in layout.fields:
        options["first_position"] -= 1
        options["max_length"] += config.first_position
    if "num_groups" in layout.fields and config.sharing == "none":
        options["num_groups"] = config.num_layers
    values = {layout.fields[name]: value for name, value in options.items()}
    if "resid_pdrop" in values:
        values |= {"embd_pdrop": config.dropout, "bos_token_id": None, "eos_token_id": None}
    if name := layout.class_for(config):
        values["architectures"] = [name]
    return {"model_type": layout.name, "tie_word_embeddings": True, **values}
