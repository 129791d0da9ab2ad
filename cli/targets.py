"""From a config to objects: `_target_` names a class, the keys beside it its arguments, `_partial_` makes a factory.

A config may come from an unknown run directory, so a `_target_` is held to an allow-list, by the name that is written
and by the module that the object truly belongs to. Everything is checked before anything is made, and what was
checked is what is called: names are resolved here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .errors import one_line, suggest

ALLOWED = (
    "kexue",
    "torch.optim",
    "torch.nn",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.plugins",
    "pytorch_lightning.profilers",
    "torchmetrics",
)
ALLOW_VARIABLE = "KEXUE_ALLOW_TARGETS"
_SPECIAL = ("_target_", "_partial_")


def resolve(target: object, where: str) -> Callable[..., Any]:
    """Import what `target` names.

    Args:
        target: dotted path of a class or function.
        where: dotted key of the config, for the message.

    Raises:
        InputError: outside the allow-list, by name or by the object's own module; not found; not callable.
    """
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise InputError(f"{where}._target_: {target!r} is not the dotted path of a class")
    parts = target.split(".")
    if not _allowed(target) or any(part.startswith("_") for part in parts):
        raise _refusal(target, where)
    found, rest = _import_longest(parts, where)
    for name in rest:
        if not hasattr(found, name):
            options = [option for option in dir(found) if not option.startswith("_")]
            raise InputError(f"{where}._target_: {target}: no {name} in {found.__name__}; {suggest(name, options)}")
        found = getattr(found, name)
    if isinstance(found, types.ModuleType) or not callable(found):
        raise InputError(f"{where}._target_: {target} is not a class or function")
    if not _allowed(f"{getattr(found, '__module__', None)}."):
        raise _refusal(target, where)
    return found


def check(node: object, where: str = "", supplied: Mapping[str, tuple[str, ...]] | None = None) -> None:
    """Check every `_target_` in a plain (resolved) config: allowed, there, its keys and values fitting the signature.

    Args:
        node: dicts, lists and plain values.
        where: dotted key of `node`.
        supplied: for a dotted key, arguments that the program adds itself; `("*",)` for "not known yet".

    Raises:
        InputError: one line with the dotted key and the nearest right name.
    """
    for key, child in _children(node, where):
        check(child, key, supplied)
    if isinstance(node, dict) and "_target_" in node:
        partial = node.get("_partial_", False)
        if not isinstance(partial, bool):
            raise InputError(f"{where}._partial_={partial!r}: use true or false")
        added = (supplied or {}).get(where, ())
        check_arguments(resolve(node["_target_"], where), node, where, added, complete=not partial)


def check_arguments(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    where: str,
    supplied: tuple[str, ...] = (),
    *,
    complete: bool = True,
) -> None:
    """Check that `given` and what is `supplied` bind to the signature of `target`, and the types of plain values.

    Args:
        target: class or function.
        given: keys and values of the config.
        where: dotted key, for the message.
        supplied: arguments that the program adds; `("*",)` for "not known yet".
        complete: whether all arguments without a default must be there.

    Raises:
        InputError: unknown key, key that the program itself supplies, value of another type, missing argument.
    """
    parameters = inspect.signature(target).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    hints = _hints(target)
    for key, value in given.items():
        if key in _SPECIAL:
            continue
        if key in supplied:
            raise InputError(f"{where}.{key}: kexue sets this itself; remove the key")
        if key not in named:
            if inspect.Parameter.VAR_KEYWORD in kinds:
                continue
            nearest = suggest(f"{where}.{key}", [f"{where}.{name}" for name in named if name not in supplied])
            raise InputError(f"{where}.{key}: no such key; {nearest}")
        if key in hints and not fits(value, hints[key]):
            raise InputError(f"{where}.{key}={value!r}: expected {_describe(hints[key])}")
    if complete and "*" not in supplied:
        for name in named:
            if parameters[name].default is inspect.Parameter.empty and name not in given and name not in supplied:
                raise InputError(f"{where}.{name}: missing; type {where}.{name}=VALUE")


def build(node: Any, where: str = "", **arguments: Any) -> Any:
    """Make what a plain config describes; `arguments` are added to those of the outermost `_target_`.

    Raises:
        InputError: what `check` raises, and a ValueError of a constructor, with the dotted key before it.
    """
    made = {key: build(child, _join(where, key)) for key, child in node.items()} if isinstance(node, dict) else node
    if isinstance(node, list):
        return [build(child, _join(where, index)) for index, child in enumerate(node)]
    if not isinstance(node, dict) or "_target_" not in node:
        return made
    target = resolve(node["_target_"], where)
    keywords = {key: value for key, value in made.items() if key not in _SPECIAL} | arguments
    if node.get("_partial_", False):
        return functools.partial(target, **keywords)
    try:
        return target(**keywords)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {one_line(error)}") from error


def fits(value: object, hint: Any) -> bool:
    """Whether a plain config value may be given for an argument annotated with `hint`; an unknown kind of hint fits."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (isinstance(value, dict) and "_target_" in value):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is typing.Annotated:
        return fits(value, options[0])
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in options)
    kind = origin or (type(None) if hint is None else hint)
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, list):
        return issubclass(list, kind) or kind in (tuple, set, frozenset)
    if isinstance(value, str) and issubclass(kind, Path):
        return True
    return isinstance(value, kind)


def _import_longest(parts: list[str], where: str) -> tuple[Any, list[str]]:
    """Import the longest leading part of a path that is a module; return it and the attributes that follow."""
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            return importlib.import_module(name), parts[length:]
        except ModuleNotFoundError as error:
            # Only "this path is no module" is an answer; a module that misses its own dependency must say so.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise InputError(f"{where}._target_: {name} needs {error.name}; pip install {error.name}") from error
    raise InputError(f"{where}._target_: no package {parts[0]} is installed; check the spelling or install it")


def _allowed(path: str) -> bool:
    own = [name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip()]
    return any(path.startswith(f"{package}.") for package in (*ALLOWED, *own))


def _refusal(target: str, where: str) -> InputError:
    own = target.split(".")[0]
    return InputError(
        f"{where}._target_: {target} is outside {', '.join(ALLOWED)}; "
        f"if you trust the package, set {ALLOW_VARIABLE}={own} in the environment"
    )


def _children(node: object, where: str) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        yield from ((_join(where, key), child) for key, child in node.items())
    elif isinstance(node, list):
        yield from ((_join(where, index), child) for index, child in enumerate(node))


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if isinstance(target, type) else target)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read
        return {}


def _describe(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(option) for option in options))
    if origin is typing.Literal:
        return " or ".join(str(option) for option in options)
    if hint is type(None) or hint is None:
        return "null"
    kind = origin or hint
    return {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false"}.get(
        getattr(kind, "__name__", ""), getattr(kind, "__name__", str(kind))
    )
