"""One run as one page: `report.html` holds its curves, predictions, pictures and config, and loads nothing."""

from __future__ import annotations

import base64
import csv
import html
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from ...redaction import hide, without_secrets
from ...wandb_records import read_records, record_files
from ..config import CONFIG_FILE
from ..run_dir import METRICS_FILE, PROVENANCE_FILE, write_text

REPORT_FILE = "report.html"
MAX_POINTS = 1500
MAX_PICTURES = 48
_STAGES = ("train", "val", "test")
_SYSTEM = {  # of W&B's names, what says most
    "cpu": "CPU of this process, %",
    "memory_percent": "memory of the machine, %",
    "proc.memory.rssMB": "memory of this process, MB",
    "proc.cpu.threads": "threads",
    "network.sent": "network sent, bytes",
    "network.recv": "network received, bytes",
    "disk.out": "disk written, MB",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run directory from what lies there.

    Returns:
        Its path.
    """
    page = (resources.files(__name__.rpartition(".")[0]) / "page.html").read_text(encoding="utf-8")
    content = report_content(folder)
    # Inside a script element only "</" and "<!" could end it; JSON may write them otherwise.
    data = hide(json.dumps(content, ensure_ascii=False, allow_nan=False)).replace("<", "\\u003c")
    text = page.replace("{{title}}", html.escape(content["name"])).replace("{{data}}", data)
    path = folder / REPORT_FILE
    write_text(path, text)
    return path


def report_content(folder: Path) -> dict[str, Any]:
    """All that the page shows, as plain data."""
    import yaml

    config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return {
        "name": str(config.get("name", folder.name)),
        "folder": str(folder),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "final": _json(folder / METRICS_FILE),
        "charts": charts(read_series(folder / "metrics.csv")),
        "system": system_charts(folder),
        "predictions": predictions(folder),
        "pictures": pictures(folder),
        "config": flat(without_secrets(config)),
        "provenance": flat(_json(folder / PROVENANCE_FILE)),
    }


def read_series(file: Path) -> dict[str, list[tuple[float, float | None]]]:
    """Curves of `metrics.csv`: key -> (step, value), None where a value is not finite."""
    series: dict[str, list[tuple[float, float | None]]] = {}
    if not file.is_file():
        return series
    with file.open(newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            step = _number(row.pop("step", None))
            for key, text in row.items():
                if step is None or not text or key == "epoch":
                    continue
                try:
                    value = float(text)
                except ValueError:  # a text that somebody logged
                    continue
                series.setdefault(key, []).append((step, value if math.isfinite(value) else None))
    return series


def charts(series: Mapping[str, list[tuple[float, float | None]]]) -> list[dict[str, Any]]:
    """Curves laid out in charts: one for each metric, in which training, validation and test stand together."""
    found: dict[str, dict[str, Any]] = {}
    for key, points in series.items():
        prefix, _, name = key.partition("/")
        staged = prefix in _STAGES and bool(name)
        title, line = (name, prefix) if staged else (key, key)
        chart = found.setdefault(
            title, {"title": title, "x": "step", "group": "metrics" if staged else "run", "lines": []}
        )
        chart["lines"].append({"name": line, "points": thinned(points)})
    order = {stage: index for index, stage in enumerate(_STAGES)}
    for chart in found.values():
        chart["lines"].sort(key=lambda line: order.get(line["name"], len(order)))
    return sorted(found.values(), key=lambda c: (c["group"], c["title"] != "loss"))


def system_charts(folder: Path) -> list[dict[str, Any]]:
    """What W&B's process measured of the machine, if the run was recorded by it: all starts in a row, in minutes."""
    lines: dict[str, list[tuple[float, float | None]]] = {}
    begin: datetime | None = None
    for file in record_files(folder):
        for record in read_records(file):
            if record.get("type") != "stats":
                continue
            moment = datetime.fromisoformat(record["stats"]["timestamp"][:19]).replace(tzinfo=UTC)
            begin = begin or moment
            for key, value in record["stats"]["item"].items():
                title = _system_title(key)
                if title is not None and isinstance(value, int | float):
                    lines.setdefault(title, []).append(((moment - begin).total_seconds() / 60, float(value)))
    return [
        {"title": title, "x": "minutes", "group": "system", "lines": [{"name": title, "points": thinned(points)}]}
        for title, points in lines.items()
    ]


def predictions(folder: Path) -> dict[str, Any] | None:
    """The table of predictions with its images in it; None where there is none."""
    file = folder / "predictions" / "test.jsonl"
    if not file.is_file():
        return None
    counts, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        image = row["input"].get("image") if isinstance(row["input"], dict) else None
        if image is not None:
            row["input"] = {"image": _embedded(file.parent, image)}
    return {"counts": counts, "rows": rows}


def pictures(folder: Path) -> list[dict[str, str]]:
    """The newest pictures of `plots`, embedded; a series is named by its folder."""
    found = sorted((folder / "plots").rglob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [
        {
            "title": path.relative_to(folder / "plots").with_suffix("").as_posix(),
            "source": _embedded(folder / "plots", path.relative_to(folder / "plots").as_posix()) or "",
        }
        for path in found[:MAX_PICTURES]
    ]


def thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most about `MAX_POINTS` points: of each stretch the lowest and the highest, so that no spike disappears."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if point[1] is not None]
        ends = {min(finite, key=_value), max(finite, key=_value)} if finite else {stretch[0]}
        gaps = {point for point in stretch if point[1] is None}
        kept.extend(sorted(ends | set(list(gaps)[:1]), key=lambda point: point[0]))
    return kept


def flat(node: Any) -> list[tuple[str, str]]:
    """Nested dicts and lists as dotted keys and texts."""
    return list(_flat(node))


def _flat(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if not children or not node:
        if key:
            yield key, json.dumps(node, ensure_ascii=False) if not isinstance(node, str) else node
        return
    for name, child in children:
        yield from _flat(child, f"{key}.{name}" if key else str(name))


def _value(point: tuple[float, float | None]) -> float:
    return point[1] if point[1] is not None else math.nan


def _system_title(key: str) -> str | None:
    if key.startswith("gpu.") and key.rsplit(".", 1)[-1] in ("gpu", "memoryAllocated", "temp", "powerWatts"):
        return key
    if key.startswith("disk.") and key.endswith(".out"):
        key = "disk.out"
    return _SYSTEM.get(key)


def _embedded(folder: Path, name: str) -> str | None:
    """A PNG below `folder` as a data URI; None when it is missing or, by its name, somewhere else."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
