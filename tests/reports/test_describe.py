"""Architectures as tables and pictures, against the real network."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import trainer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_train import config
from dist_train.commands.describe import main
from dist_train.config.settings import BatchNormConfig, Block, Convolution, ModelConfig, Output, Stem, Where
from dist_train.errors import UserError
from dist_train.model.network import BlockNetwork, MixedBlock
from dist_train.model.shapes import flops, shapes
from dist_train.reports.architecture import KNOWN, Shape, layers, markdown, text, totals
from dist_train.reports.drawing import figure, svg

ODD = ModelConfig(
    stem=Stem(kind="conv", kernel=7, padding=3, stride=2, channels=32, activation="silu"),
    blocks=[
        Block(
            channels=64,
            convolutions=[
                Convolution(kernel=3, groups=32),
                Convolution(kernel=3, dilation=2, groups=16),
                Convolution(kernel=5, groups=32, bias=True),
                Convolution(kernel=1),
                Convolution(kernel=7, dilation=12, groups=16),
                Convolution(kernel=11, groups=32),
            ],
            norm="branch",
            activate="branch",
            activation="silu",
            coefficients="softmax",
            temperature=2.5,
            pool=2,
            pool_kind="avg",
            dropout=0.15,
        ),
        Block(
            channels=48,
            convolutions=[Convolution(stride=2, padding=3), Convolution(kernel=1, stride=2, padding=2)],
            activation="identity",
            coefficients="sigmoid",
            per_image=False,
            pool="all",
        ),
    ],
    output=Output(hidden=[128, 64], dropout=0.2),
)
ARCHITECTURES: dict[str, tuple[ModelConfig, Shape, int]] = {
    **{name: (config.load(name, None, []).model, (3, 32, 32), 10) for name in config.presets()},
    "odd": (ODD, (3, 48, 40), 100),
}


def run(layer: nn.Module, x: Tensor) -> tuple[tuple[int, ...], int]:
    """The shape of what a layer gives for one image, and the operations that torch counts for it."""
    with FlopCounterMode(display=False) as counter:
        shape = tuple(layer(x).shape[1:])
    return shape, int(counter.get_total_flops())


@torch.no_grad()
def ran(network: BlockNetwork, image_shape: Shape) -> list[tuple[tuple[int, ...], int]]:
    """The same of all layers in their order, each convolution on its own; of what follows a sum, the shape."""
    network.eval()
    x = torch.zeros(1, *image_shape)
    found: list[tuple[tuple[int, ...], int]] = [(image_shape, 0)]
    if network.stem is not None:
        found.append(run(network.stem, x))
        x = network.stem_activation(network.stem(x))
    for block in network.blocks:
        assert isinstance(block, MixedBlock)
        found += [run(convolution, x) for convolution in block.convolutions]
        found.append(run(block.mixing, x.mean((2, 3))))
        x = block(x)
        found.append((tuple(x.shape[1:]), 0))
    x = x.mean((2, 3))
    for layer in [*network.output.hidden, network.output.logits]:
        found.append(run(layer, x))
        x = layer(x)
    return found


def same_as_the_network(model: ModelConfig, image_shape: Shape, classes: int) -> None:
    network = BlockNetwork(model, image_shape, classes)
    rows = layers(model, image_shape, classes)
    assert [(row.shape, row.flops) for row in rows] == ran(network, image_shape)
    parts = {"input": nn.Module(), "stem": network.stem or nn.Module(), "output": network.output}
    parts |= {f"block {number}": block for number, block in enumerate(network.blocks, 1)}
    for part, module in parts.items():
        own = [row for row in rows if row.part == part]
        parameters = list(module.parameters())
        assert sum(row.parameters for row in own) == sum(p.numel() for p in parameters), part
        assert sum(row.learned for row in own) == sum(p.numel() for p in parameters if p.requires_grad), part
    for number, block in enumerate(network.blocks, 1):
        assert isinstance(block, MixedBlock)
        branches = [[*convolution.parameters()] for convolution in block.convolutions]
        after = [p for norm in block.norms for p in norm.parameters()]
        if block.config.norm == "branch":
            branches = [[*branch, *norm.parameters()] for branch, norm in zip(branches, block.norms, strict=True)]
            after = []
        found = [row.parameters for row in rows if row.part == f"block {number}"]
        assert found == [sum(p.numel() for p in own) for own in (*branches, [*block.mixing.parameters()], after)]
    whole = totals(model, image_shape, classes)
    assert whole["parameters"] == sum(p.numel() for p in network.parameters())
    assert whole["bytes"] == sum(p.numel() * p.element_size() for p in network.parameters())
    assert whole["flops"] == sum(map(sum, flops(model, image_shape, classes)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_the_networks(name: str) -> None:
    same_as_the_network(*ARCHITECTURES[name])


@st.composite
def architectures(draw: st.DrawFn) -> ModelConfig:
    """Any network of a few small blocks; some have images too small for their pooling."""
    stem = Stem(
        kind=draw(st.sampled_from(["none", "conv", "whiten"])),
        kernel=draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        channels=12,
    )
    blocks, channels = [], {"none": 3, "conv": 12, "whiten": 6 * stem.kernel**2}[stem.kind]
    for _ in range(draw(st.integers(1, 3))):
        width, stride, more = (draw(st.sampled_from(n)) for n in ([3, 8, 12], [1, 2], [0, 2]))
        convolutions = []
        for kernel, dilation in draw(
            st.lists(st.sampled_from([(1, 1), (3, 1), (3, 2), (5, 1), (2, 2)]), min_size=1, max_size=4)
        ):
            divisors = [g for g in range(1, channels + 1) if channels % g == 0 and width % g == 0]
            padding = dilation * (kernel - 1) // 2 + more
            convolutions.append(
                Convolution(
                    kernel=kernel,
                    dilation=dilation,
                    groups=draw(st.sampled_from(divisors)),
                    stride=stride,
                    padding=padding if more else draw(st.sampled_from(["same", padding])),
                    bias=draw(st.booleans()),
                )
            )
        places: list[Where] = ["branch", "post", "none"]
        where = st.sampled_from(places)
        blocks.append(
            Block(
                channels=width,
                convolutions=convolutions,
                norm=draw(where),
                activate=draw(where),
                activation=draw(st.sampled_from(["relu", "identity"])),
                coefficients=draw(st.sampled_from(["raw", "softmax", "sigmoid"])),
                temperature=draw(st.sampled_from([1.0, 0.5])),
                per_image=draw(st.booleans()),
                pool=draw(st.sampled_from([1, 2, "all"])),
                pool_at=draw(st.sampled_from(["sum", "end"])),
                dropout=draw(st.sampled_from([0.0, 0.5])),
            )
        )
        channels = width
    return ModelConfig(
        blocks=blocks,
        stem=stem,
        output=Output(hidden=draw(st.lists(st.just(10), max_size=2)), bias=draw(st.booleans())),
        batch_norm=BatchNormConfig(scale=draw(st.booleans())),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(architectures(), st.integers(6, 12), st.integers(6, 12))
def test_any_architecture_is_described_correctly(model: ModelConfig, height: int, width: int) -> None:
    try:
        layers(model, (3, height, width), 10)
    except UserError:
        assume(False)
    same_as_the_network(model, (3, height, width), 10)


@pytest.mark.parametrize("name", config.presets())
def test_table_fits_a_terminal_and_its_shares_add_up(name: str) -> None:
    lines = text(*ARCHITECTURES[name]).splitlines()
    assert max(map(len, lines)) <= 100
    n = totals(*ARCHITECTURES[name])
    assert f"{n['parameters']:,}" in next(line for line in lines if line.startswith("total"))
    parts = [line.split() for line in lines if line.startswith(("stem", "block", "output"))]
    for column, total in ((-4, n["parameters"]), (-2, n["flops"])):
        assert sum(int(words[column].replace(",", "")) for words in parts) == total
    of_model = config.load(name, None, []).model
    rows = markdown(*ARCHITECTURES[name]).splitlines()
    assert rows[1] == "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    assert all(row.count("|") == 8 for row in rows if row.startswith("|"))
    assert sum(row.startswith("| **block") for row in rows) == len(of_model.blocks)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_picture_has_every_text_on_the_page_and_none_over_another(name: str) -> None:
    drawn = figure(*ARCHITECTURES[name], name)
    drawn.canvas.draw()
    boxes = {words: words.get_window_extent() for words in drawn.texts if words.get_text()}
    for words, box in boxes.items():
        assert all(drawn.bbox.contains(x, y) for x, y in (box.min, box.max)), words
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)
    assert drawn.get_size_inches()[0] < 4.3  # for a phone
    shown = [words.get_text() for words in boxes]
    for number, block in enumerate(ARCHITECTURES[name][0].blocks, 1):
        assert f"block {number}" in shown
        start, end = ("FC ", f" {len(block.convolutions)}") if block.per_image else ("2 learned", "numbers")
        assert sum(words.startswith(start) and words.endswith(end) for words in shown)


def test_svg_can_be_embedded_in_any_page() -> None:
    first, second = svg(*ARCHITECTURES["odd"], 'a <b> & "c"'), svg(*ARCHITECTURES["odd"], 'a <b> & "c"')
    assert first == second
    root = ElementTree.fromstring(first)
    assert root.get("width") == "100%"
    assert root.get("height") is None
    assert root.get("aria-label") == 'a <b> & "c": a network of 2 blocks'
    space = "{http://www.w3.org/2000/svg}"
    for element in root.iter():
        assert not element.get("id"), "two pictures on a page would share it"
        assert not {space + "style", space + "script", space + "image"} & {element.tag}
    assert not any(found in first for found in ("url(", "href", "#000000", "#ffffff", "#010203"))
    words = [element.text for element in root.iter(f"{space}text")]
    assert {"11x11", "d12", "g16", "softmax T2.5", "32 x 24 x 20", "100 logits", 'a <b> & "c"'} <= {*words}
    for element in root.iter(f"{space}text"):
        assert "fill: currentColor" in element.get("style", "")


def test_command_takes_presets_files_run_folders_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["digits", "model.blocks.0.channels=48", "--picture", tmp_path / "a.svg"]
    done = trainer(*arguments, module="dist_train describe", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("digits: images of 3 x 32 x 32, 10 classes\n")
    assert "48 x 8 x 8" in done.stdout
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"

    run_dir = tmp_path / "some-run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(config.to_toml(config.load("seed", None, [])))
    found = {}
    for what in (run_dir, run_dir / "config.toml", "seed"):
        assert main([str(what), "--json"]) == 0
        found[what] = json.loads(capsys.readouterr().out)
    assert found[run_dir] == found[run_dir / "config.toml"] == {**found["seed"], "name": "some-run"}
    rows = layers(*ARCHITECTURES["seed"])
    assert [row["name"] for row in found["seed"]["layers"]] == [row.name for row in rows]
    assert found["seed"]["totals"] == totals(*ARCHITECTURES["seed"])

    for suffix, begin in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        path = tmp_path / f"a{suffix}"
        assert main(["digits", "--markdown", "--picture", str(path)]) == 0
        assert path.read_bytes().startswith(begin)
    assert capsys.readouterr().out.count("| **block 2** |") == 2


def test_images_are_those_of_the_data(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def images(*arguments: object) -> tuple[list[int], int]:
        assert main([*map(str, arguments), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found["image_shape"], found["classes"]

    manifest = json.loads((digits / "manifest.json").read_text())
    assert manifest["image_shape"][:2] == [*KNOWN["digits"][0]]
    assert len(manifest["classes"]) == KNOWN["digits"][1]
    assert images("digits", f"data.dir={digits}") == ([3, 32, 32], 10)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "image_shape": [24, 40, 3], "classes": ["a", "b"]}))
    there = f"data.dir={tmp_path}"
    assert images("digits", there) == ([3, 24, 40], 2)
    assert images("digits", there, "--image-size", 20) == ([3, 20, 20], 2)
    assert images("digits", there, "--image-size", "20x16", "--classes", 7) == ([3, 20, 16], 7)
    away = ["data.dataset=mine", f"data.dir={tmp_path / 'away'}"]
    assert images("digits", *away, "data.image_size=64", "--classes", 7) == ([3, 64, 64], 7)
    assert main(["digits", *away, "--image-size", "64"]) == 2
    assert "--classes" in capsys.readouterr().err


def test_bad_architecture_gets_the_trainers_sentence(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"data.dir={digits}", "model.blocks.1.convolutions.0.groups=5"]
    refused = trainer("--preset", "digits", *arguments, "--run-dir", tmp_path / "run")
    assert main(["digits", *arguments, "--picture", str(tmp_path / "a.png")]) == refused.returncode == 2
    shown = capsys.readouterr()
    assert shown.err == refused.stderr
    assert shown.err.startswith("dist_train: model.blocks: block 2, convolution 1: groups = 5 ")
    assert shown.out == ""
    assert not (tmp_path / "a.png").exists()
    # also for the smaller images that training begins with
    assert main(["digits", "data.smaller=[{size=2,until=1}]"]) == 2
    with pytest.raises(UserError) as error:
        shapes(config.load("digits", None, []).model, (3, 2, 2))
    assert capsys.readouterr().err == f"dist_train: {error.value}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digist"], "digist: neither a preset (block94, "),
        (["digits", "--picture", "a.jpg"], "--picture a.jpg: "),
        (["digits", "--picture", "no/such/folder/a.png"], "--picture no/such/folder/a.png: cannot be written"),
        (["digits", "epohcs=3"], "did you mean train.epochs?"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
