"""The configuration: what beats what, what is written, and how mistakes are answered."""

from __future__ import annotations

import math
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import tomli_w

from dist_train import config
from dist_train.config import loading
from dist_train.config.effects import check_effects
from dist_train.config.settings import Select
from dist_train.config.trees import leaves
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
    found = config.load(preset, None, ["optim.stem.until=0.25", "record.tags=['a', 'b']"])
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(found))
    again = config.load(None, file, [])
    assert again == found
    assert config.digest(again) == config.digest(found)


# They name the folders of existing runs.
DIGESTS = {
    "block94": "4e093ce1",
    "block95": "3766db6b",
    "block96": "8a1ea07c",
    "digits": "739f5657",
    "seed": "8bb0e35c",
}


def test_the_digests_of_presets_stay() -> None:
    assert {preset: config.digest(config.load(preset, None, [])) for preset in config.presets()} == DIGESTS


@pytest.mark.parametrize(
    ("epochs", "sizes", "stem", "start"), [(8, [(20, 0.25), (24, 0.5)], 0.125, 0.75), (2, [(20, 1.0)], 0.5, 0.75)]
)
def test_configurations_of_earlier_versions_had_phases_in_epochs(
    epochs: float, sizes: list[tuple[int, float]], stem: float, start: float, tmp_path: Path
) -> None:
    (tmp_path / "now.toml").write_text(config.to_toml(config.load("block94", None, [f"epochs={epochs}"])))
    tree = config.read_toml(tmp_path / "now.toml")
    tree["data"]["smaller"] = [{"size": 20, "until_epoch": 2}, {"size": 24, "until_epoch": 4.0}]
    del tree["optim"]["stem"]["until"]
    tree["optim"]["stem"]["until_epoch"] = 1.0
    tree["train"]["select"] = {"fraction": 0.5, "from_epoch": start * epochs}
    tree["model"]["batch_norm"]["momentum"] = 0.1
    text = tomli_w.dumps(tree)
    (tmp_path / "config.toml").write_text(text)
    found = config.parse(text)
    assert found == config.load(None, tmp_path / "config.toml", [])
    (tmp_path / "mine.toml").write_text("[[data.smaller]]\nsize = 20\nuntil_epoch = 2\n")
    with pytest.raises(UserError, match=r"smaller\.0\.until_epoch: there is no such setting; did you mean until\?"):
        config.load("block94", tmp_path / "mine.toml", [])
    assert [(size.size, size.until) for size in found.data.smaller] == sizes
    assert found.optim.stem.until == stem
    assert found.train.select == Select(0.5, start)
    damages: list[dict[str, Any]] = [
        {"train": {}},
        {"train": {"epochs": "8"}},
        {"data": {"smaller": 7}},
        {"optim": [1]},
    ]
    for damage in damages:
        with pytest.raises(UserError):
            config.parse(tomli_w.dumps(tree | damage))


def test_only_what_reaches_the_weights_binds_a_run(tmp_path: Path) -> None:
    base = config.load("block94", None, [])
    (tmp_path / "config.toml").write_text(config.to_toml(base))
    free = ["record.wandb=offline", "checkpoint.keep=9", "data.dir=/elsewhere", "data.source=/there", "loader=stream"]
    free += ["device=cpu", "backend=gloo", "timeout=9", "log_every=7"]
    found = config.load("block94", None, free)
    assert config.difference(base, found) == []
    assert config.digest(base) == config.digest(found)
    config.check_folder(tmp_path, found)
    # a new run gets another folder; a run that is resumed in its own may change it
    threads = config.load("block94", None, ["threads=2"])
    assert config.difference(base, threads) == ["train.threads"]
    assert config.digest(base) != config.digest(threads)
    config.check_folder(tmp_path, threads)
    other = config.load("block94", None, ["seed=1", "threads=2", "model.blocks.1.convolutions.1.kernel=5"])
    assert config.difference(base, other) == ["model.blocks.1.convolutions.1.kernel", "train.seed", "train.threads"]
    assert config.digest(base) != config.digest(other)
    with pytest.raises(UserError, match=r"another model\.blocks\.1\.convolutions\.1\.kernel, train\.seed;"):
        config.check_folder(tmp_path, other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["epoch=3"], "epoch: there is no such setting; did you mean train.epochs?"),
        (["decay=3"], "decay: there is no such setting; did you mean optim.default.weight_decay?"),
        (["batch=3"], "batch: there is no such setting; did you mean train.batch_size?"),
        (["gpus=3"], "gpus: there is no such setting; dist-train train --help lists all"),
        (["amp=true"], "amp: there is no such setting; dist-train train --help lists all"),
        (["=3"], "'': there is no such setting; dist-train train --help lists all"),
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
        (["train.select={fraction=0}"], "train.select.fraction = 0: input should be greater than 0"),
        (["train.select.fraction=1.5"], "train.select.fraction = 1.5: input should be less than or equal to 1"),
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


# each is out of range, not finite, or not what it seems
EXTREME = ["inf", "-inf", "nan", "-0.0", "1e308", "5e-324", "1e19", "9" * 5000, "0x" + "f" * 5000, "²", "٣", "true"]
EXTREME += ["-1", "1.5", "2147483648", "1e400", "1\ny = 2", "[" * 5000, "\udcff", "a\0b", "10000000000000000000"]


def test_every_number_is_finite_and_in_range_or_refused() -> None:
    block, conv = "model.blocks.0.", "model.blocks.0.convolutions.0."
    names = [*loading._leaves(config.Config), "model.output.hidden.0", "data.smaller.0.size", "model.blocks.²"]
    names += ["data.smaller.0.until", "model.blocks." + "9" * 5000, "a.\udcff", ".".join("a" * 3000)]
    names += [block + name for name in ("channels", "temperature", "pool", "dropout")]
    names += [conv + name for name in ("kernel", "dilation", "groups", "stride", "padding")]
    given = 0
    for name in names:
        for text in EXTREME:
            try:
                found = config.load("block94", None, ["model.output.hidden=[3]", f"{name}={text}"])
            except UserError:
                continue
            given += 1
            assert config.parse(config.to_toml(found)) == found
            for place, value in leaves(config.to_dict(found)):
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    most = 1e38 if isinstance(value, float) else 2**31  # float32's
                    assert abs(value) <= most or place == "train.seed", place
                    assert math.copysign(1, value) > 0 or value < 0, place
    assert given > 100


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("epochs=inf", "train.epochs = inf: input should be a finite number"),
        ("timeout=604801", "train.timeout = 604801: input should be less than or equal to 604800"),
        ("threads=100000", "train.threads = 100000: input should be less than or equal to 1024"),
        ("model.blocks.0.channels=10000000", "model.blocks.0.channels = 10000000: input should be less than or equal"),
        ("model.blocks.0.temperature=1e-300", "model.blocks.0.temperature = 1e-300: input should be greater than or"),
        ("seed=9223372036854775808", "train.seed: a whole number has at most 64 bits"),
        ("model.blocks.²=3", "there is nothing at model.blocks.²"),
        ("record.name=\udcff", "record.name = \udcff: not valid text"),
    ],
)
def test_numbers_out_of_range_are_refused(setting: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        config.load("block94", None, [setting])


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
    shown = re.findall(r"^  ([\w.]+=\S+)$", text, re.MULTILINE)
    undecided = re.findall(r"^  ([\w.]+) \((?:required|not set)\)$", text, re.MULTILINE)
    names = [*(setting.partition("=")[0] for setting in shown), *undecided]
    assert len(names) == len({*names})
    # those of the other groups are those of the first
    groups = {name for name in loading._leaves(config.Config) if name.count(".") == 2 and name.startswith("optim.")}
    others = {name for name in groups if not name.startswith("optim.default.")}
    listed = {name for name in names if ".0." in name}
    assert {*names} - listed == {*loading._leaves(config.Config)} - others
    file = tmp_path / "least.toml"
    file.write_text("[[data.smaller]]\nsize = 8\nuntil = 1\n[[model.blocks]]\nchannels = 8\nconvolutions = [{}]\n")
    given = [setting for setting in shown if setting != "data.smaller=[]"]
    least, written_out = config.load(None, file, []), config.load(None, file, given)
    assert [config.to_dict(c) | {"optim": c.optim.group("kernels")} for c in (least, written_out)] == [
        config.to_dict(least) | {"optim": least.optim.group("kernels")}
    ] * 2


def test_help_describes_every_setting() -> None:
    text = config.reference()
    assert max(map(len, text.splitlines())) <= 100
    flowing = " ".join(text.split())
    tables = [config.Config, *dict.fromkeys(table for _, table, _ in loading._sections(config.Config))]
    assert len(tables) == 16
    for table in tables[1:]:
        assert " ".join(table.__doc__.split()) in flowing, table
    for table in tables:
        for name, kind in get_type_hints(table).items():
            info = table.__pydantic_fields__[name]
            if not is_dataclass(kind):
                assert info.description, f"{table.__name__}.{name} has no text below it"
                for choice in choices(kind):
                    assert f"`{choice}`" in info.description, f"{table.__name__}.{name} does not say what {choice} is"
            assert " ".join((info.description or "").split()) in flowing, name


def choices(kind: Any) -> list[str]:
    """The names that a type allows."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [name for argument in get_args(kind) for name in choices(argument)]


def test_help_says_what_a_resumed_run_may_change() -> None:
    parts = re.split(r"\n(?=  \w|\[)", config.reference())
    marked = {part.split(maxsplit=1)[0]: " ".join(part.split()) for part in parts}

    def ending(words: str) -> set[str]:
        return {re.sub(r"=.*|[][]", "", name) for name, part in marked.items() if part.endswith(words)}

    data = ("data.dir", "data.source", "data.drop_equal", "data.loader")
    train = ("train.backend", "train.cuda_graphs", "train.timeout", "train.log_every")
    assert ending("Does not change the weights.") == {*data, *train, "checkpoint", "record"}
    assert ending("May change bits.") == {"train.threads", "train.device"}
    # a mark on a setting of a list's items would have no effect
    of_items = [table for key, table, _ in loading._sections(config.Config) if ".0" in key]
    assert len(of_items) == 3
    assert not any("Effect(" in str(info.metadata) for table in of_items for info in table.__pydantic_fields__.values())


@pytest.mark.parametrize(
    ("preset", "setting", "words"),
    [
        ("block94", "optim.kernels.weight_decay=0.1", 'has no effect, since algorithm = "muon" has none; set another'),
        ("block94", "model.blocks.0.temperature=2", 'coefficients = "raw"; set coefficients to softmax'),
        ("block94", "model.blocks.1.pool_kind=avg", "pool = 1; set pool"),
        ("block94", "model.stem.channels=9", 'kind = "whiten"; set kind to conv'),
        ("block94", "model.output={dropout=0.2}", "model.output.dropout = 0.2 has no effect, since hidden = []"),
        ("seed", "model.stem.kernel=5", 'kind = "none"; set kind'),
        ("seed", "train.select.size=16", "since fraction = 1; set fraction"),
        ("seed", "train.select.losses=last", "since fraction = 1; set fraction"),
        ("seed", "train.select={fraction=0.5, losses='last', size=16}", 'since losses = "last"; set losses to now'),
        ("seed", "train.select={fraction=0.5, start=0.4, until=0.4}", "start = 0.4 is not before until = 0.4"),
        ("seed", "train.select={fraction=0.5, start=0.4, until=0.2}", "start = 0.4 is not before until = 0.2"),
        ("seed", "optim.stem.lr=1", 'model.stem.kind = "none"; set that'),
        (
            "digits",
            "model.blocks=[{channels=8, activate='none', activation='relu', convolutions=[{}]}]",
            'activate = "none"; set activate',
        ),
    ],
)
def test_settings_without_effect_are_refused_where_they_are_given(preset: str, setting: str, words: str) -> None:
    found = config.load(preset, None, [setting])
    with pytest.raises(UserError, match=re.escape(words)):
        check_effects(found, config.given(None, [setting]))
    check_effects(found, [])


def test_presets_examples_and_a_runs_own_file_have_none(tmp_path: Path) -> None:
    for preset in config.presets():
        check_effects(config.load(preset, None, []), config.given(config.PRESETS / f"{preset}.toml", []))
    for example in (config.PRESETS.parent / "examples").glob("*.toml"):
        check_effects(config.load(None, example, []), config.given(example, []))
    # what a preset sets is not given, and may be without effect
    settings = ["model.stem.kind=none", "model.blocks.0.pool=1", "optim.kernels.algorithm=sgd"]
    found = config.load("block94", None, settings)
    check_effects(found, config.given(None, settings))
    (tmp_path / "config.toml").write_text(config.to_toml(found), encoding="utf-8")
    check_effects(found, config.given(tmp_path / "config.toml", []))
    mine = tmp_path / "mine.toml"
    mine.write_text("[optim.kernels]\nweight_decay = 0.1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"weight_decay = 0\.1 has no effect"):
        check_effects(config.load("block94", mine, []), config.given(mine, []))


@pytest.mark.parametrize(("batch_size", "use"), [(250, 248), (7, 8)])
def test_a_batch_that_does_not_split_is_refused(batch_size: int, use: int) -> None:
    words = f"train.batch_size = {batch_size} does not split into train.microbatches = 8 equal parts; use {use}"
    with pytest.raises(UserError, match=words):
        config.load("digits", None, [f"batch_size={batch_size}"])


@pytest.mark.parametrize("group", ["norms", "mixing", "output", "stem"])
def test_muon_is_for_kernels_alone(group: str) -> None:
    with pytest.raises(UserError, match=rf"optim\.{group}\.algorithm = muon: it is for kernels only"):
        config.load("block94", None, [f"optim.{group}.algorithm=muon"])
