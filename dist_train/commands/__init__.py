"""The commands of dist-train: one module each, or the package that does the work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of dist-train. module: has `main(arguments) -> exit code`. summary: its line in `dist-train --help`."""

    module: str
    summary: str


COMMANDS = {
    "quickstart": Command("dist_train.launch.quickstart", "train on everything that this machine has"),
    "prepare": Command("dist_train.data_prep.__main__", "write a data set to beton files, or verify it"),
    "train": Command("dist_train.main", "train in this process, or on every rank that torchrun starts"),
    "submit": Command("dist_train.launch.submit", "submit a training, or an array of them, to Slurm"),
    "describe": Command("dist_train.commands.describe", "show an architecture as a table and as a picture"),
    "evaluate": Command("dist_train.commands.evaluate", "evaluate a trained network"),
    "predict": Command("dist_train.commands.predict", "classify pictures"),
    "export": Command("dist_train.commands.export", "write safetensors, torch.export and ONNX files, and a model card"),
    "table": Command("dist_train.commands.table", "compare runs in a table, with intervals over the seeds"),
    "diff": Command("dist_train.commands.diff", "compare two runs bit by bit, and print where they first differ"),
    "report": Command("dist_train.commands.report", "write an HTML page about one or several runs"),
    "plots": Command("dist_train.commands.plots", "draw the plots of a run again"),
    "upload": Command("dist_train.commands.upload", "send finished runs to Weights & Biases"),
    "dashboard": Command("dist_train.commands.dashboard", "make the Weights & Biases workspace of a project"),
}
ON_EVERY_RANK = ("train", "evaluate")  # commands that torchrun may start
