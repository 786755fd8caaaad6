"""Shows an architecture as a table, and draws it.

    dist-train describe block94
    dist-train describe mine.toml model.blocks.0.channels=96 --picture mine.svg

The architecture is that of a preset, a TOML file or a run folder, with settings over it as the trainer takes them.
FLOPs are those of the convolutions and linear layers in the forward pass of one image, two for each multiply-add.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dist_train import config
from dist_train.command_line import Parser, command, positive
from dist_train.config.settings import Config
from dist_train.errors import DONE, UserError, show
from dist_train.files import write_atomic
from dist_train.reports.architecture import images, layers, markdown, shape_text, text, totals
from dist_train.reports.drawing import PICTURES, figure, image_bytes
from dist_train.runs.layout import SETTINGS


def _resolve(what: str, settings: list[str]) -> tuple[str, Config]:
    """The name and the configuration of a preset, a TOML file or a run folder. Raises UserError."""

    path = Path(what)
    if what in config.presets():
        return what, config.load(what, None, settings)
    if path.is_dir():
        path /= SETTINGS
    if not path.exists():
        raise UserError(
            f"{what}: neither a preset ({', '.join(config.presets())}) nor a TOML file or run folder; name one"
        )
    name = path.resolve().parent.name if path.name == SETTINGS else path.stem
    return name, config.load(None, path, settings)


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = Parser("describe", __doc__)
    parser.add_argument("what", metavar="PRESET|FILE", type=str, help="a preset, a TOML file, or a run folder")
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", help="settings over those of the preset or the file"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON in place of the table")
    form.add_argument("--markdown", action="store_true", help="print Markdown in place of the table")
    parser.add_argument(
        "--picture", metavar="FILE", type=Path, help="draw the architecture to this .svg, .png or .pdf file"
    )
    parser.add_argument(
        "--image-size",
        metavar="N|HxW",
        type=_size,
        help="height and width of the images in pixels (default: those of the data set)",
    )
    parser.add_argument(
        "--classes", metavar="N", type=positive, help="number of classes (default: those of the data set)"
    )
    options = parser.parse_intermixed_args(arguments)
    picture: Path | None = options.picture
    if picture and picture.suffix not in PICTURES:
        raise UserError(f"--picture {picture}: end the file's name in {', '.join(PICTURES)}")
    name, settings = _resolve(options.what, options.settings)
    image_shape, classes = images(settings.data, options.image_size, options.classes)
    architecture = settings.model, image_shape, classes
    table = text(*architecture)
    for smaller in settings.data.smaller:  # raises UserError for images that the network cannot take
        layers(settings.model, (3, smaller.size, smaller.size), classes)
    if picture:
        try:
            write_atomic(picture, image_bytes(figure(*architecture, name), picture.suffix))
        except OSError as error:
            raise UserError(f"--picture {picture}: cannot be written ({error.strerror}); name another file") from None
    if options.json:
        rows = [asdict(row) for row in layers(*architecture)]
        head = {"name": name, "image_shape": image_shape, "classes": classes}
        print(json.dumps({**head, "layers": rows, "totals": totals(*architecture)}, indent=2))
    elif options.markdown:
        show(*markdown(*architecture).splitlines())
    else:
        show(f"{name}: images of {shape_text(image_shape)}, {classes} classes", "", *table.splitlines())
        if picture:
            show(f"picture: {picture}")
    return DONE


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return positive(height), positive(width or height)
