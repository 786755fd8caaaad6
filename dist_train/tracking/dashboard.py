"""The W&B workspace of a project: panels for the metrics that its runs log."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dist_train.errors import UserError
from dist_train.tracking.worker import logged_in

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "Block networks"
BLOCKS = 6  # of the default preset
_RUNS = 100  # the most runs in a panel that compares runs
_GPUS = 8  # the most GPUs of rank 0's host in a panel of W&B's own system metrics


def workspace(project: str, entity: str = "", name: str = NAME, blocks: int = BLOCKS) -> Workspace:
    """The definition of the workspace, made without a server. blocks: the number of blocks with a panel of their mixing
    coefficients. Raises UserError for a name that W&B does not accept."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2 import interface as wr

    def steps(title: str, key: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x="step", y=[f"train/{key}"], **options)

    def epochs(title: str, *keys: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x="epoch", y=[f"eval/{key}" for key in keys], **options)

    def ranks(title: str, key: str) -> Any:
        return wr.LinePlot(title=title, x="elapsed_seconds", metric_regex=f"^ranks/{key}/rank[0-9]+$")

    def gpus(title: str, key: str) -> Any:
        y = [wr.Metric(f"system/gpu.{number}.{key}") for number in range(_GPUS)]
        return wr.LinePlot(title=title, x="RelativeTime(Process)", y=[*y])

    def chart(key: str, kind: str, fields: dict[str, str], title: str) -> Any:
        """A custom chart over the table that `wandb.plot` logged with it, with the query that wandb itself uses."""
        table = {"summaryTable": {"tableKey": f"evaluation/{key}_table"}}
        query = {"id": None, "name": None, "_defaultColorIndex": None, **table}
        return wr.CustomChart(query=query, chart_name=kind, chart_fields=fields, chart_strings={"title": title})

    varied = ("optim.kernels.lr", "train.epochs", "train.batch_size", "train.label_smoothing", "train.seed")
    smooth = {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.9, "smoothing_show_original": True}
    sections = {
        "Loss and accuracy": [
            epochs("test accuracy, every run", "test_accuracy", max_runs_to_show=_RUNS),
            epochs("accuracy", "train_accuracy", "val_accuracy", "test_accuracy"),
            wr.BarPlot(
                title="test accuracy, last epoch",
                metrics=["test_accuracy", "test_accuracy_tta"],
                max_runs_to_show=_RUNS,
            ),
            steps("training loss, every step", "loss", log_y=True, **smooth),
            epochs("loss", "train_loss", "val_loss", "test_loss", log_y=True),
            steps("training accuracy, every step", "accuracy", **smooth),
        ],
        "Speed and optimisation": [
            steps("images per second", "images_per_second"),
            steps("share of the matrix product's rate (MFU)", "mfu"),
            wr.ScatterPlot(
                title="test accuracy against seconds of training",
                x=wr.SummaryMetric("train_seconds"),
                y=wr.SummaryMetric("test_accuracy"),
            ),
            steps("learning rate of the kernels", "lr"),
            steps("norm of the gradient", "grad_norm", log_y=True),
        ],
        "Mixing coefficients": [
            wr.LinePlot(
                title=f"block {number}: mean and standard deviation over the test images",
                x="epoch",
                metric_regex=f"^mixing/block{number}/",
            )
            for number in range(1, blocks + 1)
        ],
        "The end": [
            chart(
                "confusion_matrix",
                "wandb/confusion_matrix/v1",
                {axis: axis for axis in ("Actual", "Predicted", "nPredictions")},
                "Confusion matrix",
            ),
            chart("calibration", "wandb/line/v0", {"x": "confidence", "y": "accuracy"}, "Calibration"),
            wr.WeavePanelSummaryTable(table_name="evaluation/coefficients_by_class"),
            wr.WeavePanelSummaryTable(table_name="evaluation/wrong"),
            wr.MediaBrowser(title="plots", media_keys=["plots/loss", "plots/accuracy"], num_columns=2),
        ],
        "Sweeps": [
            wr.ParallelCoordinatesPlot(
                title="settings and accuracy on held-out images",
                columns=[
                    *(wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in varied),
                    wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("eval/val_accuracy")),
                ],
            ),
            wr.ParameterImportancePlot(with_respect_to="eval/val_accuracy"),
            wr.RunComparer(diff_only=True),
        ],
        "System": [
            ranks("processor of each rank, % of a core", "cpu_percent"),
            ranks("memory of each rank, GiB", "resident_gib"),
            ranks("GPU of each rank, %", "gpu_percent"),
            ranks("memory that torch has on each rank's GPU, GiB", "gpu_reserved_gib"),
            ranks("power of each rank's GPU, W", "gpu_watts"),
            ranks("temperature of each rank's GPU, degrees Celsius", "gpu_celsius"),
            gpus("GPUs of rank 0's host, %", "gpu"),
            gpus("memory of the GPUs of rank 0's host, %", "memoryAllocated"),
            wr.LinePlot(title="memory of rank 0's host, %", x="RelativeTime(Process)", y=["system/memory_percent"]),
        ],
    }
    wide, closed = ("The end",), ("Sweeps", "System")
    section_views = []
    for title, panels in sections.items():
        for number, panel in enumerate(panels):  # by default random: equal definitions would differ
            panel._id = _short(f"{title}/{number}")
        columns = 2 if title in wide else 3
        layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))  # no second page
        section_views.append(ws.Section(name=title, panels=panels, is_open=title not in closed, layout_settings=layout))
    first = ("test_accuracy", "test_accuracy_tta", "val_accuracy", "train_seconds", "mfu")
    pinned = ws.RunsetSettings(pinned_columns=[f"summary:{key}" for key in first])
    try:
        return ws.Workspace(entity=entity, project=project, name=name, sections=section_views, runset_settings=pinned)
    except ValueError:
        raise UserError(f"--name {name}: W&B accepts no emoji in names; write it in plain letters") from None


def _short(text: str) -> str:
    """Eleven hexadecimal digits of the text's SHA-256, for W&B's ids."""
    return hashlib.sha256(text.encode()).hexdigest()[:11]


def save(view: Workspace) -> str:
    """Save the workspace, replacing an earlier one of the same name, and return its address. Without an entity it
    belongs to the user's default one. Raises UserError without a login, and when W&B does not accept the workspace."""
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    import wandb
    from wandb_workspaces.workspaces.internal import View

    settings = wandb.setup().settings
    if not logged_in(settings):
        raise UserError(f"not logged in at {settings.base_url}; run wandb login, or print the definition with --json")
    try:
        view.entity = view.entity or settings.entity or wandb.Api().default_entity or ""
        key = _short(f"{view.entity}/{view.project}/{view.name}")
        view._internal_name = f"nw-{key}-v"  # W&B's naming scheme of saved views
        with suppress(ValueError):  # there is no earlier one
            view._internal_id = View.from_name(view.entity, view.project, key).id
        view.save()  # type: ignore[no-untyped-call]
        return str(view.url)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{settings.base_url} did not accept a workspace for project {view.entity}/{view.project} ({reason}); fix "
            f"the login, --entity or --project, or print the definition with --json"
        ) from None
