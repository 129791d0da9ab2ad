"""Run benchmarks in turn and write docs/benchmarks.md from all results that there are.

    OMP_NUM_THREADS=1 python benchmarks/run_all.py [NAME ...]

Without names, those run that take minutes; the long ones run when they are named. KEXUE_DATA names the folder of real
data where a benchmark reads some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from common import table

HERE = Path(__file__).parent
# Name of the result -> script and arguments.
SCRIPTS = {
    "loop_overhead": ["loop_overhead", "--log-every", "50", "--steps", "300", "--repeats", "11", "--batch", "2"],
    "loop_overhead_one_layer": ["loop_overhead", "--one-layer", "--steps", "1000", "--repeats", "7", "--batch", "2"],
    "zero": ["zero"],
    "zero_results": ["zero_results"],
    "gloo": ["gloo"],
    "preemption": ["preemption"],
    "event_decoding": ["event_decoding"],
    "crf": ["crf"],
    "entity_dictionary": ["entity_dictionary"],
    "transformer_training": ["transformer", "--part", "training"],
    "transformer_generation": ["transformer", "--part", "generation"],
    "transformer_products": ["transformer", "--part", "products"],
    "packing": ["packing"],
    "multi_sample_dropout_cost": ["multi_sample_dropout", "--part", "cost"],
    "recompute": ["recompute", "--plot", "docs/recompute_front.png"],
    "lookahead_syncs": ["lookahead", "--part", "syncs"],
    "lookahead_steps": ["lookahead", "--part", "steps"],
    "loss_weighting_cost": ["loss_weighting", "--part", "cost"],
    "loss_weighting_tasks": ["loss_weighting", "--part", "tasks"],
}
READING = ("mrc_cmrc2018", "mrc_dureader_robust", "mrc_dureader_checklist", "dgcnn_webqa")
LONG = {
    "gplinker_duee": ["gplinker_duee"],
    "relation_gplinker": ["relation_duie"],
    "relation_lic2020": ["relation_duie", "model=lic2020_relation", "trainer.max_epochs=10"],
    "global_pointer": ["global_pointer"],
    "extraction_peer_weibo": ["extraction_peer", "--set", "weibo", "--seeds", "42", "43"],
    "extraction_peer_duie": ["extraction_peer", "--set", "duie", "trainer.max_epochs=5"],
    "ner_daguan": ["ner", "--set", "daguan", "--model", "daguan_ie"],
    "lic2020_event": ["gplinker_duee", "--experiment", "lic2020_event"],
    **{
        f"ner_{name}_{model}": ["ner", "--set", name, "--model", f"ner_{model}"]
        for name in ("cluener", "resume", "weibo")
        for model in ("crf", "global_pointer")
    },
    "entity_linking": ["entity_linking"],
    "decoding": ["decoding", "RUN", "..."],
    **{name: ["reading", name] for name in READING},
    "multi_sample_dropout": ["multi_sample_dropout", "--plot", "docs/multi_sample_dropout.png"],
    "multi_sample_dropout_smoothed": [
        "multi_sample_dropout",
        "--label-smoothing",
        "0.1",
        "--plot",
        "docs/multi_sample_dropout_smoothed.png",
    ],
    "label_smoothing": ["label_smoothing", "--plot", "docs/label_smoothing.png"],
    "deepnorm_depth": ["deepnorm_depth", "--part", "updates"],
    "deepnorm_depth_training": ["deepnorm_depth", "--part", "training", "--plot", "docs/deepnorm_update.png"],
    "loss_weighting_digits": ["loss_weighting", "--part", "digits"],
    "kill_test": ["kill_test"],
}
NEED_DATA = (
    "packing",
    "gplinker_duee",
    "relation_gplinker",
    "relation_lic2020",
    "lic2020_event",
    "entity_linking",
    *READING,
    "multi_sample_dropout",
    "multi_sample_dropout_smoothed",
    "label_smoothing",
)
NEED_DATA += tuple(name for name in LONG if name.startswith(("ner_", "extraction_peer_")))
REMARKS = {
    "loop_overhead": (
        "The overhead does not depend on the model; two images a batch leave its own noise small. The clock of this "
        "machine moves by a third between turns: compare contenders of one run, the fastest turns, and the calls. "
        "Six other runs of the day gave kexue's default 0.86, 1.22, 1.24, 1.25, 1.53 and 1.74 ms, beside 0.99, 1.38, "
        "1.49, 1.23 and 2.11 ms of Lightning lean (none in the last), while the bare step went from 4.2 to 5.7 ms."
    ),
    "extraction_peer_duie": "Scores after the last of 5 epochs on the dev sample; a run for each, one seed.",
    "extraction_peer_weibo": "Scores after the last epoch, medians of two seeds.",
    "transformer_training": (
        "The small shape by 15 repeats; three runs of it gave 0.997, 1.011 and 1.029. BERT-base: 25 November."
    ),
    "dgcnn_webqa": "The evaluation of a run that took about 4 minutes of one core.",
    "relation_gplinker": "Trained in two parts, interrupted and continued: 27 minutes of processor time.",
    "gplinker_duee": "Trained from scratch on 892 rows, 70 epochs, seed 42, two threads on two free cores.",
}


def main() -> None:
    """Run what was asked for, then write the page."""
    scripts = SCRIPTS | LONG
    chosen = sys.argv[1:] or list(SCRIPTS)
    if unknown := set(chosen) - set(scripts):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; choose from {', '.join(scripts)}")
    for name in chosen:
        script, *arguments = scripts[name]
        if name in NEED_DATA and "KEXUE_DATA" not in os.environ:
            print(f"{name}: left out, it reads real data; set KEXUE_DATA to their folder")
            continue
        print(f"{name} ...", flush=True)
        command = [sys.executable, str(HERE / f"{script}.py"), *arguments, "--json", str(result_of(name))]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    page = HERE.parent / "docs" / "benchmarks.md"
    page.write_text("\n".join(sections(scripts)), encoding="utf-8")
    print(f"wrote {page}")


def result_of(name: str) -> Path:
    """Where a benchmark writes its figures."""
    return HERE / "results" / f"{name}.json"


def sections(scripts: dict[str, list[str]]) -> list[str]:
    """The page: a table for every result, with its date and the command that gives it."""
    parts = [
        "# Benchmarks\n",
        "CPU, one thread a process, unless a table says otherwise. `make bench` runs those that take minutes and "
        "writes this page; `KEXUE_DATA` names the folder of real data.\n",
    ]
    for name, (script, *arguments) in scripts.items():
        for file in sorted(HERE.glob(f"results/{name}*.json")):
            if file.stem != name and file.stem in scripts:
                continue  # a benchmark of its own whose name begins alike
            found = json.loads(file.read_text(encoding="utf-8"))
            machine = found["machine"]
            shown = " ".join(["python", f"benchmarks/{script}.py", *arguments])
            where = machine.get("gpu", f"{machine['processor']}, {machine['threads']} thread(s)")
            stamp = f"{machine['date']}, {where}, torch {machine['torch']}: `{machine.get('command', shown)}`"
            remark = f"{REMARKS[name]}\n\n" if name in REMARKS else ""
            parts.append(f"## {found['name']}\n\n{remark}{table(found['rows'])}\n\n{stamp}\n")
    return parts


if __name__ == "__main__":
    main()
