"""Opening the folder of a run, which one job at a time may use, and which has the checkpoint to resume from."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from dist_train import config
from dist_train.data_prep import Manifest
from dist_train.errors import UserError
from dist_train.files import claimed, remove_partial, write_atomic
from dist_train.runs import checkpoint, layout
from dist_train.runs.checkpoint import Checkpoint, DataDescription

_CLAIM = 5.0  # seconds to wait for the ranks of a run that was just stopped to leave its folder


def open_folder(run_dir: Path, settings: config.Config, held: ExitStack) -> Path | None:
    """Create or check a run folder, and lock it until `held` is closed. Returns its newest whole checkpoint, None
    without one. Raises UserError when the folder is in use, belongs to another run, or cannot be written."""
    checkpoints = layout.checkpoint_folder(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
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
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another folder") from None
    return checkpoint.newest(checkpoints)


def check_data(resumed: Checkpoint, data: Manifest, run_dir: Path) -> None:
    """Raises UserError when the run of a checkpoint was trained on other pixels or labels."""
    trained_on = resumed.data
    # checkpoints of earlier versions have no description of the data set, or one without digests
    if trained_on and trained_on.content_sha256 not in ({}, DataDescription.of(data).content_sha256):
        raise UserError(
            f"--run-dir {run_dir} belongs to a run on other images of {data.dataset}, whose betons were written anew "
            f"since; start in another folder, or restore the old ones"
        )
