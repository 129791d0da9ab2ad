"""Show every experiment with one line each.

usage: kexue list

Each is started with `kexue fit experiment=NAME`.
"""

from __future__ import annotations

from importlib import resources

from ..errors import InputError


def run(args: list[str]) -> int:
    """Print the experiments; nothing heavy is imported."""
    if args:
        raise InputError(f"kexue list {args[0]}: list takes no arguments")
    found = experiments()
    width = max(len(name) for name in found)
    for name, line in found.items():
        print(f"{name:<{width}}  {line}")
    return 0


def experiments() -> dict[str, str]:
    """Names of all experiments in alphabetical order, each with the description in its file's head."""
    folder = resources.files(__name__.rsplit(".", 2)[0] + ".conf") / "experiment"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): _description(file.read_text(encoding="utf-8")) for file in files}


def _description(text: str) -> str:
    """The first comment; Hydra wants its own `# @package` line before any other."""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""
