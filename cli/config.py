"""Hydra, kept in one place: composing a run's config, reading it back from a run directory, explaining what is wrong.

Hydra's compose API is used without its application frame: it would change the working directory, name run directories
by the clock of each rank and start other processes with another command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import InputError
from ..redaction import is_secret_variable, secrets_in
from .cluster import Cluster
from .errors import one_line, suggest
from .targets import check, check_arguments, fits

CONFIG_MODULE = __name__.rsplit(".", 2)[0] + ".conf"
CONFIG_FILE = "config.yaml"
TRAINER_KEYS_OF_KEXUE = ("strategy", "callbacks", "logger", "default_root_dir", "use_distributed_sampler")
_ROOT_HINTS: dict[str, Any] = {
    "name": str,
    "seed": int | None,
    "run_dir": str | None,
    "resume": str | None,
    "monitor": str,
    "mode": Literal["min", "max"],
}
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*)")


def compose_run(overrides: list[str]) -> DictConfig:
    """Compose the config of a new run from the package's own groups.

    Args:
        overrides: words of Hydra's override grammar, such as `experiment=gplinker_event` or `trainer.devices=2`.

    Raises:
        InputError: what is wrong in which word, with the nearest right one.
    """
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return _compose("config", overrides)


def load_run(run_dir: Path, overrides: list[str]) -> DictConfig:
    """Read the config of an existing run, changed by `overrides` (keys only: groups were chosen when it was trained).

    A run directory may have been moved: paths inside the old one are changed to the new one.

    Raises:
        InputError: no run there, or a wrong override.
    """
    run_dir = run_dir.resolve()
    if not (run_dir / CONFIG_FILE).is_file():
        raise InputError(f"run={run_dir}: no {CONFIG_FILE} there; give the folder that kexue fit wrote")
    with initialize_config_dir(str(run_dir), version_base="1.3"):
        config = _compose(Path(CONFIG_FILE).stem, overrides)
    old = config.get("run_dir")
    moved = _moved(OmegaConf.to_container(config), str(old), str(run_dir))
    return DictConfig(moved) if old else config


def plain(config: DictConfig, run_dir: Path | str) -> dict[str, Any]:
    """The config as dicts, lists and values, all interpolations resolved, with this run directory.

    Raises:
        InputError: an interpolation that cannot be resolved, or one that would write a secret into `config.yaml`.
    """
    config = config.copy()
    config.run_dir = str(run_dir)
    for key, value in _leaves(OmegaConf.to_container(config, resolve=False)):
        for name in _ENVIRONMENT.findall(value) if isinstance(value, str) else ():
            if is_secret_variable(name) or "$" in name:
                raise _secret(f"{key}={value}")
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {one_line(str(error).splitlines()[0])}") from error
    assert isinstance(resolved, dict)
    if secret := next(secrets_in(resolved), None):
        raise _secret(secret)
    return {str(key): value for key, value in resolved.items()}


def _secret(where: str) -> InputError:
    return InputError(
        f"{where}: a secret would be written to {CONFIG_FILE}; leave it in the environment, libraries read their own "
        "variables"
    )


def validate(config: dict[str, Any]) -> None:
    """Check a plain config before anything is made of it: allowed targets, known keys, types of values.

    Raises:
        InputError: one line with the dotted key.
    """
    from pytorch_lightning import Trainer

    for key, hint in _ROOT_HINTS.items():
        if not fits(config.get(key), hint):
            raise InputError(
                f"{key}={config.get(key)!r}: not a value for {key}; see the comments in kexue's conf/config.yaml"
            )
    for key in ("trainer", "strategy", "data", "model", "technique", "callbacks", "logger"):
        if not isinstance(config.get(key), dict):
            raise InputError(f"{key}={config.get(key)!r}: expected keys below {key}, such as {key}.NAME=VALUE")
    check_arguments(Trainer, config["trainer"], "trainer", TRAINER_KEYS_OF_KEXUE)
    if config.get("cluster"):
        check_arguments(Cluster, config["cluster"], "cluster")
    check(config, supplied={"strategy": ("techniques",), "model": ("*",)})
    for key in ("strategy", "data", "model"):
        if "_target_" not in config[key]:
            raise InputError(f"{key}._target_: missing; choose a {key} group or set {key}._target_=CLASS")


def _compose(name: str, overrides: list[str]) -> DictConfig:
    parsed = [_parse(word) for word in overrides]
    for word in parsed:
        _check_choice(word)
    try:
        return compose(name, overrides=overrides)
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        options = _options(group) if group else []
        advice = suggest(choice, options, "kexue list shows them" if group == "experiment" else "see --help")
        raise InputError(f"{group or name}={choice}: no such {group or 'config'}; {advice}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain_override(name, parsed, error) from error


def _parse(word: str) -> Override:
    if word.startswith("-"):
        raise InputError(f"{word}: no such option; kexue takes KEY=VALUE words, such as trainer.max_epochs=3")
    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = one_line(error)
        raise InputError(
            f"{word}: not a KEY=VALUE word ({reason}); quote the value if it holds brackets, commas, = or spaces"
        ) from error
    if parsed.is_sweep_override():
        raise InputError(f"{word}: several values; write KEY=[A,B] for a list, or quote a text that holds a comma")
    return parsed


def _check_choice(word: Override) -> None:
    """A group is chosen by name: Hydra itself only says that a number is none."""
    options, choice = _options(word.key_or_group), word.value()
    if options and isinstance(choice, int | float | bool | dict):
        raise InputError(f"{word.input_line}: no such {word.key_or_group}; {suggest(str(choice), options)}")


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def _explain_override(name: str, overrides: list[Override], error: Exception) -> InputError:
    """Find the word that Hydra could not apply and the key that was probably meant."""
    # "To append use +key" is right for a new key, but far more often the key is misspelt.
    found = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(error))
    if not isinstance(error, ConfigCompositionException) or found is None:
        return InputError(one_line(error))
    key = found.group(1).split("@")[0]
    groups = [word for word in overrides if word.key_or_group == "hydra.searchpath" or _is_group(word)]
    chosen = [word.input_line or "" for word in groups]
    try:
        known = [dotted for dotted, _ in _leaves(OmegaConf.to_container(compose(name, overrides=chosen)), inner=True)]
    except HydraException:
        known = []
    return InputError(f"{key}: no such key; {suggest(key, known)}")


def _is_group(word: Override) -> bool:
    return bool(_options(word.key_or_group)) and not word.is_delete() and not word.is_add()


def _leaves(node: Any, key: str = "", *, inner: bool = False) -> Iterator[tuple[str, Any]]:
    """All values of nested dicts and lists with their dotted keys, with `inner` also the keys of dicts."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if key and (inner or not isinstance(node, dict | list)):
        yield key, node
    for name, child in children:
        yield from _leaves(child, f"{key}.{name}" if key else str(name), inner=inner)


def _moved(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return {key: _moved(child, old, new) for key, child in node.items()}
    if isinstance(node, list):
        return [_moved(child, old, new) for child in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node
