"""Opening the folder of a run, which one job at a time may use, and which has the checkpoint to resume from."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from dist_train import config
from dist_train.data_prep import Manifest
from dist_train.errors import UserError, reason
from dist_train.files import claimed, remove_partial, write_atomic
from dist_train.runs import checkpoint, layout
from dist_train.runs.checkpoint import Checkpoint, DataDescription

_CLAIM = 5.0  # seconds to wait for the ranks of a run that was just stopped to leave its folder


def open_folder(run_dir: Path, settings: config.Config, held: ExitStack) -> Path | None:
    """Create or check a run folder, and lock it until `held` is closed. Returns its newest whole checkpoint, None
    without one. Raises UserError when the folder is in use, belongs to another run, has files that are not of a run,
    only damaged checkpoints, or results without a checkpoint, or cannot be written."""
    checkpoints = layout.checkpoint_folder(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _check_names(run_dir)
        held.enter_context(claimed(layout.lock_path(run_dir), _CLAIM))
        config.check_folder(run_dir, settings)
        remove_partial(run_dir)
        write_atomic(run_dir / layout.SETTINGS, config.to_toml(settings).encode())
        checkpoint.clean(checkpoints)
    except BlockingIOError as error:
        raise UserError(
            f"--run-dir {run_dir} is in use by {error}; wait for it, stop it, or name another folder"
        ) from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({reason(error)}); name another folder") from None
    newest = checkpoint.newest(checkpoints)
    if newest is None and (run_dir / layout.SUMMARY).exists():
        raise UserError(
            f"--run-dir {run_dir}: holds the results of a run, but no checkpoint of it; name another folder to train "
            f"again, or remove {layout.SUMMARY} to start the run over in this one"
        )
    return newest


def _check_names(run_dir: Path) -> None:
    """Raises UserError where a run in this folder would write to files of somebody else."""
    for link in layout.links(run_dir):
        raise UserError(
            f"--run-dir {run_dir}: {link.name} in it is a symbolic link, and a run writes in its own folder only; "
            f"remove the link, or name another folder"
        )
    present = [name for name in layout.RECORD if (run_dir / name).exists()]
    if present and not layout.is_run(run_dir):
        raise UserError(
            f"--run-dir {run_dir}: holds {present[0]}, but no {layout.SETTINGS} of a run; restore that, or name "
            f"another folder"
        )


def check_data(resumed: Checkpoint, data: Manifest, run_dir: Path) -> None:
    """Raises UserError when the run of a checkpoint was trained on other pixels or labels."""
    trained_on = resumed.data
    # checkpoints of earlier versions have no description of the data set, or one without digests
    if trained_on and trained_on.content_sha256 not in ({}, DataDescription.of(data).content_sha256):
        raise UserError(
            f"--run-dir {run_dir} belongs to a run on other images of {data.dataset}, whose betons were written anew "
            f"since; start in another folder, or restore the old ones"
        )
