"""Run every benchmark in turn and write docs/benchmarks.md and one JSON file each.

OMP_NUM_THREADS=1 python benchmarks/run_all.py
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = {
    "loop_overhead": ["--log-every", "50"],
    "zero": [],
    "zero_results": [],
    "gloo": [],
    "event_decoding": [],
}
# Too long for every run: the page shows what they wrote when they last ran.
LONG = {
    "gplinker_duee": "Trained from scratch on 892 rows, 70 epochs, seed 42, two threads on two free cores.",
}


def main() -> None:
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    parts = [
        "# Benchmarks\n",
        f"{datetime.date.today().isoformat()}, {platform.machine()}, CPU only, one thread a process. `make bench` runs "
        "them all and writes this page; each table names its script and command.\n",
    ]
    for name, arguments in SCRIPTS.items():
        command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
        print(f"{name} ...", flush=True)
        done = subprocess.run([*command, "--json", str(results / f"{name}.json")], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        table = done.stdout[done.stdout.index("###") :].strip()
        shown = " ".join(["OMP_NUM_THREADS=1 python", f"benchmarks/{name}.py", *arguments])
        parts.append(f"#{table.removeprefix('##')}\n\n`{shown}`\n")
    for name, remark in LONG.items():
        file = results / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            shown = f"KEXUE_DATA=FOLDER python benchmarks/{name}.py --json {file.relative_to(HERE.parent)}"
            parts.append(f"## {found['name']}\n\n{remark}\n\n{table(found['rows'])}\n\n`{shown}`\n")
    page = HERE.parent / "docs" / "benchmarks.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
