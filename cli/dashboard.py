"""Look at a run without an account, or put dashboards into Weights & Biases.

usage: kexue dashboard run=FOLDER [view=auto|html|terminal]
       kexue dashboard push [family=NAME] [project=kexue] [entity=NAME]
       kexue dashboard show [family=NAME]

  kexue dashboard run=runs/digits_multitask/2026-01-31_12-00-00
  kexue dashboard push family=extraction

run=FOLDER writes FOLDER/report.html: curves, system use, predictions, pictures and config in one file that loads
nothing from elsewhere. In a terminal it then opens W&B's terminal view of the run, if W&B recorded it; view=html leaves
that out, view=terminal opens it without writing the page.

push makes a workspace in W&B for each family of experiments, laid out by kexue; it needs a key and
pip install wandb-workspaces. show prints its JSON and sends nothing.
"""

from __future__ import annotations

_VIEWS = ("auto", "html", "terminal")


def run(args: list[str]) -> int:
    """Show or push; see the module's help."""
    from ..errors import InputError
    from .arguments import take

    if args and args[0] in ("push", "show"):
        action, *words = args
        values, others = take(words, {"family": "all", "project": "kexue", "entity": "-"})
        _refuse(others)
        return _workspaces(action, values["family"], values["project"], values["entity"])
    values, others = take(args, {"run": None, "view": "auto"})
    _refuse(others)
    if values["view"] not in _VIEWS:
        raise InputError(f"view={values['view']}: use one of {', '.join(_VIEWS)}")
    return _look(values["run"], values["view"])


def _refuse(words: list[str]) -> None:
    from ..errors import InputError

    if words:
        raise InputError(f"kexue dashboard {words[0]}: no such word; see kexue dashboard --help")


def _look(run: str, view: str) -> int:
    import sys
    from pathlib import Path

    from ..errors import InputError
    from ..wandb_records import record_files, show
    from .config import CONFIG_FILE
    from .dashboards.report import write_report

    folder = Path(run).expanduser().resolve()
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"run={run}: no {CONFIG_FILE} there; give the folder that kexue fit wrote")
    records = record_files(folder)
    if view == "terminal" and not records:
        raise InputError(f"run={run}: W&B recorded nothing there; train with logger=wandb, or use view=html")
    if view != "terminal":
        print(f"open {write_report(folder)}")
    if records and (view == "terminal" or (view == "auto" and sys.stdin.isatty() and sys.stdout.isatty())):
        return show(records[-1])
    return 0


def _workspaces(action: str, family: str, project: str, entity: str) -> int:
    from ..callbacks.wandb_start import has_wandb_key
    from ..errors import InputError
    from .dashboards.workspaces import FAMILIES, as_json, push, workspace
    from .errors import suggest

    if family != "all" and family not in FAMILIES:
        raise InputError(f"family={family}: no such family; {suggest(family, FAMILIES)}")
    names = list(FAMILIES) if family == "all" else [family]
    made = {name: workspace(name, project, entity) for name in names}  # all before the first is sent
    if action == "show":
        for name in names:
            print(as_json(made[name]))
        return 0
    if not has_wandb_key():
        raise InputError("no key for W&B: run `wandb login` or set WANDB_API_KEY; `kexue dashboard show` needs none")
    for name in names:
        print(f"{name}: {push(made[name])}")
    return 0
