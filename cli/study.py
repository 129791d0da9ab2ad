"""Run a study: counts and figures about networks, without training one.

usage: kexue study [NAME [KEY=VALUE ...] [output=FOLDER]]

  kexue study                                     lists the studies
  kexue study transformer_cost                    prints its tables
  kexue study transformer_cost dim=1024 num_layers=24 num_heads=16 feedforward_dim=4096 lengths=[512,4096]
  kexue study transformer_cost output=FOLDER      writes them there as well (CSV, JSON), with figures (PNG)

The keys are the arguments of the study's function; `kexue study NAME keys` lists them with their defaults.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any, get_type_hints

from ..errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from ..analysis.findings import Findings, Table

WIDTH = 130  # of what is not a terminal
PACKAGE = __name__.rsplit(".", 2)[0] + ".analysis.studies"


def run(args: list[str]) -> int:
    """List the studies, or run one; see the module's help."""
    if not args:
        found = studies()
        width = max(len(name) for name in found)
        for name, line in found.items():
            print(f"{name:<{width}}  {line}")
        return 0
    name, *words = args
    function = _load(name)
    if words == ["keys"]:
        print(_keys(function))
        return 0
    options, output = read_options(name, function, words)
    findings = function(**options)
    for table in findings.tables:
        show(table)
    for remark in findings.remarks:
        print(remark)
    if output is not None:
        _write(findings, output, {"study": name, **options})
    return 0


def studies() -> dict[str, str]:
    """Names of all studies in alphabetical order, each with the first line of its file; nothing heavy is imported."""
    folder = resources.files(PACKAGE.split(".", 1)[0]).joinpath(*PACKAGE.split(".")[1:])
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".py")), key=lambda file: file.name)
    docs = {file.name[:-3]: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    return {name: (doc or "").partition("\n")[0] for name, doc in docs.items() if not name.startswith("_")}


def read_options(name: str, function: Callable[..., Any], words: list[str]) -> tuple[dict[str, Any], Path | None]:
    """Turn `KEY=VALUE` words into arguments of a study.

    Returns:
        The arguments, and the folder of `output=`.

    Raises:
        InputError: no such key, or a value of another type.
    """
    from pathlib import Path

    import yaml

    from .targets import check_arguments

    options: dict[str, Any] = {}
    output = None
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise InputError(f"kexue study {name} {word}: give KEY=VALUE words; `kexue study {name} keys` lists them")
        if key == "output":
            output = Path(value).expanduser()
            continue
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{name}.{key}={value}: not a value; a list is written [1,2,3]") from error
    hints = get_type_hints(function)
    for key, value in options.items():
        if hints.get(key) == tuple[int, ...]:
            options[key] = _whole_numbers(f"{name}.{key}", value)
    check_arguments(function, options, name)
    return options, output


def _whole_numbers(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(entry) is not int for entry in value):
        raise InputError(f"{key}={value}: expected a list of whole numbers, such as {key}=[128,512]")
    return tuple(value)


def _load(name: str) -> Callable[..., Findings]:
    from .errors import suggest

    known = studies()
    if name not in known:
        raise InputError(f"{name}: no such study; {suggest(name, known)}")
    return import_module(f"{PACKAGE}.{name}").study


def _keys(function: Callable[..., Any]) -> str:
    lines = (inspect.getdoc(function) or "").partition("Args:\n")[2].splitlines()
    parts = [line.strip().partition(": ") for line in lines]
    about = {name: text for name, _, text in parts}
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    words = {name: f"{name}={_word(default)}" for name, default in defaults.items()}
    width = max(len(word) for word in words.values())
    return "\n".join(f"{word:<{width}}  {about.get(name, '')}".rstrip() for name, word in words.items())


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def show(table: Table) -> None:
    """Print a table with numbers as people read them; a column "... [bytes]" gets units."""
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        numbers = any(not isinstance(row[index], str) for row in table.rows)
        shown.add_column(column.removesuffix(" [bytes]"), justify="right" if numbers else "left")
    for row in table.rows:
        shown.add_row(*(_cell(column, value) for column, value in zip(table.columns, row, strict=True)))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(shown)


def readable_bytes(count: float) -> str:
    """A number of bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def readable_count(count: float) -> str:
    """A large number with the letter of its thousands: 1.5 G is 1.5 * 10^9."""
    for letter in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:.4g} {letter}".rstrip()
        count /= 1000
    return f"{count:,.4g} P"


def _cell(column: str, value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    if column.endswith("[bytes]"):
        return readable_bytes(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if abs(value) < 10**6 else readable_count(value)


def _write(findings: Findings, folder: Path, options: Mapping[str, Any]) -> None:
    import csv
    import json

    from ..analysis.findings import draw

    folder.mkdir(parents=True, exist_ok=True)
    for table in findings.tables:
        with (folder / f"{table.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table.columns)
            writer.writerows(table.rows)
    tables = {table.name: table.records() for table in findings.tables}
    content = {"options": options, "remarks": findings.remarks, "tables": tables}
    (folder / "findings.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    drawn = draw(findings.figures, folder)
    names = [f"{table.name}.csv" for table in findings.tables] + [path.name for path in drawn]
    print(f"everything lies in {folder}: findings.json, {', '.join(names)}")
