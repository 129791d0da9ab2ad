"""W&B workspaces as code: for each family of experiments what to look at, in which order."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from typing import Any

from ...callbacks.wandb_run import STEP
from ...errors import InputError


@dataclass(frozen=True)
class Family:
    """What a dashboard shows of a family's runs.

    Attributes:
        title: of the workspace.
        scores: logged keys by which runs are judged, the first one in the list of runs too.
        pictures: keys of logged pictures.
    """

    title: str
    scores: tuple[str, ...]
    pictures: tuple[str, ...] = ()


FAMILIES = {
    "extraction": Family(
        "Extraction",
        ("val/argument_f1", "val/event_f1", "val/type_f1", "val/argument_precision", "val/argument_recall"),
    ),
    "imaging": Family(
        "Imaging",
        ("val/digit_accuracy", "val/parity_accuracy", "val/pixel_sum_mae", "test/digit_accuracy"),
        pictures=("test/confusion_matrix",),
    ),
}


def workspace(name: str, project: str, entity: str) -> Any:
    """The workspace of a family, of W&B's own class; nothing is sent.

    Args:
        name: family.
        project: W&B project.
        entity: user or team; "-" for the one that the key belongs to.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ImportError("dashboards need wandb-workspaces: pip install wandb-workspaces")
    from wandb_workspaces import expr
    from wandb_workspaces.reports import v2 as panels
    from wandb_workspaces.workspaces import RunsetSettings, Section, SectionLayoutSettings, Workspace, WorkspaceSettings

    family = FAMILIES[name]

    def lines(title: str, *keys: str, log: bool | None = None) -> Any:
        return panels.LinePlot(title=title, x=STEP, y=list(keys), log_y=log)

    def section(title: str, *found: Any, opened: bool = True) -> Any:
        return Section(
            name=title, panels=list(found), is_open=opened, layout_settings=SectionLayoutSettings(columns=3, rows=2)
        )

    sections = [
        section("Scores", *(lines(key, key) for key in family.scores)),
        section("Loss", lines("loss", "train/loss", "val/loss", log=True)),
        section(
            "Predictions",
            panels.WeavePanelSummaryTable(table_name="test/predictions"),
            *(panels.MediaBrowser(title=key, media_keys=[key]) for key in family.pictures),
        ),
        section(
            "Speed and memory",
            lines("samples per second", "throughput/samples_per_second"),
            lines("seconds per step", "throughput/step_seconds"),
            lines("peak memory, GiB", "memory/peak_gib"),
            panels.LinePlot(title="learning rate", x=STEP, metric_regex="lr-.*"),
            opened=False,
        ),
        section("Differences between runs", panels.RunComparer(diff_only="split"), opened=False),
    ]
    return Workspace(
        entity=entity,
        project=project,
        name=f"kexue: {family.title}",
        sections=sections,
        settings=WorkspaceSettings(x_axis=STEP, max_runs=20),
        runset_settings=RunsetSettings(
            filters=[expr.Config("family") == name],
            groupby=[expr.Metric("Group")],
            order=[expr.Ordering(expr.Summary(family.scores[0]), ascending=False)],
            pinned_columns=["run:displayName", f"summary:{family.scores[0]}", "config:strategy._target_"],
        ),
    )


def as_json(made: Any) -> str:
    """What would be sent, as W&B's own JSON."""
    return made._to_model().model_dump_json(by_alias=True, exclude_none=True)


def push(made: Any) -> str:
    """Save a workspace in W&B.

    Returns:
        Its address.

    Raises:
        InputError: W&B refuses it or cannot be reached.
    """
    import wandb
    from wandb.errors import Error

    try:
        if made.entity == "-":
            made.entity = wandb.Api().default_entity
        with contextlib.redirect_stderr(io.StringIO()):  # it says there where it was saved, as we do
            made.save()
    except (Error, OSError, ValueError) as error:
        raise InputError(f"W&B did not take the workspace {made.name!r}: {error}") from error
    return made.url
