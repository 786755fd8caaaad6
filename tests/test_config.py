"""The configuration: what beats what, what is written, and how mistakes are answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_train import config
from dist_train.config import loading
from dist_train.errors import UserError


def test_command_line_beats_file_beats_preset_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nepochs = 5\nlabel_smoothing = 0.1\n[model.output]\nhidden = [32]\n")
    found = config.load("block94", file, ["train.epochs=6", "seed=4", "model.blocks.1.channels=128"])
    assert (found.train.epochs, found.train.label_smoothing, found.train.seed) == (6, 0.1, 4)
    assert found.train.batch_size == 2000  # the preset's
    assert found.train.timeout == 600  # the default
    assert found.model.output.hidden == [32]
    assert found.model.output.bias is False  # tables are merged
    assert [block.channels for block in found.model.blocks[:3]] == [64, 128, 256]


@pytest.mark.parametrize("preset", config.presets())
def test_a_written_configuration_reads_back_the_same(preset: str, tmp_path: Path) -> None:
    found = config.load(preset, None, ["optim.stem.until_epoch=2.5", "record.tags=['a', 'b']"])
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(found))
    again = config.load(None, file, [])
    assert again == found
    assert config.digest(again) == config.digest(found)


def test_only_what_reaches_the_weights_binds_a_run() -> None:
    base = config.load("block94", None, [])
    free = ["record.wandb=offline", "checkpoint.keep=9", "data.dir=/elsewhere", "loader=stream", "timeout=9"]
    assert config.difference(base, config.load("block94", None, free)) == []
    assert config.digest(base) == config.digest(config.load("block94", None, free))
    other = config.load("block94", None, ["seed=1", "model.blocks.1.convolutions.1.kernel=5"])
    assert config.difference(base, other) == ["model.blocks.1.convolutions.1.kernel", "train.seed"]
    assert config.digest(base) != config.digest(other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["epoch=3"], "epoch: there is no such setting; did you mean train.epochs?"),
        (["train.epoch=3"], "train.epoch: there is no such setting; did you mean epochs?"),
        (["trian.epochs=3"], "trian: there is no such setting; did you mean train?"),
        (
            ["model.blocks.0.chanels=3"],
            "model.blocks.0.chanels: there is no such setting; did you mean channels?",
        ),
        (
            ["model.blocks.0.convolutions=[{kernel=3, dilatoin=2}]"],
            "model.blocks.0.convolutions.0.dilatoin: there is no such setting; did you mean dilation?",
        ),
        (["train.epochs=many"], 'train.epochs = "many": '),
        (["train.epochs=0"], "train.epochs = 0: input should be greater than 0"),
        (["train.microbatches=2.5"], "train.microbatches = 2.5: "),
        (["precision=int8"], "train.precision = \"int8\": input should be 'bf16', 'fp16' or 'fp32'"),
        (["lr=0.1"], "lr: this could be optim.default.lr or optim.kernels.lr"),
        (["train.epochs"], "train.epochs: settings are written key=value"),
        (["model.blocks.9.channels=3"], "there is nothing at model.blocks.9.channels"),
        (["model.blocks.0.convolutions.0.padding=wide"], "model.blocks.0.convolutions.0.padding"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(settings: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load("block94", None, settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_presets_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean block94"):
        config.load("blok94", None, [])
    with pytest.raises(UserError, match=r"absent\.toml: cannot be read"):
        config.load(None, tmp_path / "absent.toml", [])
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(UserError, match="not valid TOML"):
        config.load(None, broken, [])
    with pytest.raises(UserError, match="model: this setting is missing; give a --preset"):
        config.load(None, None, [])


def test_help_has_every_setting_with_its_real_default(tmp_path: Path) -> None:
    text = config.reference()
    shown = re.findall(r"(?<=\s)((?:data|optim|train|evaluate|checkpoint|record|model)\.[\w.]+=\S+)", text)
    names = [setting.partition("=")[0] for setting in shown]
    of_kinds = {name for name in loading._leaves(config.Config) if name.count(".") == 2 and name.startswith("optim.")}
    unset = of_kinds - {name for name in of_kinds if name.startswith("optim.default")} | {"optim.default.until_epoch"}
    assert {*names} == {*loading._leaves(config.Config)} - unset - {"model.blocks"}
    file = tmp_path / "least.toml"
    file.write_text("[[model.blocks]]\nchannels = 8\nconvolutions = [{}]\n")
    least, written_out = config.load(None, file, []), config.load(None, file, shown)
    assert [config.to_dict(c) | {"optim": c.optim.group("kernels")} for c in (least, written_out)] == [
        config.to_dict(least) | {"optim": least.optim.group("kernels")}
    ] * 2
