"""A trained network in use: from Python and from the command line, on all sorts of pictures and of files."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, TINY, command, environment, trainer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dist_train import TrainedNetwork, data_prep, load, predict
from dist_train.commands.predict import begins_a_picture
from dist_train.config.trees import leaves
from dist_train.data.batches import Data
from dist_train.data.dataset import manifest
from dist_train.distributed.ranks import Ranks
from dist_train.errors import UserError
from dist_train.inference.trained_network import Picture
from dist_train.runs import checkpoint
from dist_train.runs.checkpoint import DataDescription

Answer = list[tuple[str, float]]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a trained network."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    settings = ["--preset", "digits", f"data.dir={digits}", *TINY, "train.device=cpu", "precision=fp32"]
    done = trainer(*settings, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def network(run: Path) -> TrainedNetwork:
    return load(run, "cpu")


@pytest.fixture(scope="module")
def pixels(digits: Path) -> NDArray[np.uint8]:
    """Test images, (N, 32, 32, 3)."""
    return data_prep.read_split(digits, "test")[0]


def last(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.pt"))


def formula(run: Path, x: Tensor) -> Tensor:
    """The preset's logits of floats from 0 to 1, (N, C, H, W), from its description, in float64."""
    state = torch.load(last(run), weights_only=True)
    w = {name: tensor.double() for name, tensor in state["model"].items()}

    def after(x: Tensor, block: str) -> Tensor:
        mean, var = (w[f"{block}.norms.0.{what}"][:, None, None] for what in ("mean", "var"))
        scale, shift = (w[f"{block}.norms.0.{what}"][:, None, None] for what in ("weight", "bias"))
        return F.max_pool2d(F.gelu((x - mean) / (var + 1e-5).sqrt() * scale + shift), 2)

    def coefficients(x: Tensor, block: str) -> Tensor:
        fc = w[f"{block}.mixing.fc.weight"], w[f"{block}.mixing.fc.bias"]
        return F.linear(x.mean((2, 3)), *fc)[:, :, None, None, None]

    mean, std = (torch.tensor(state["data"][what], dtype=torch.float64)[:, None, None] for what in ("mean", "std"))
    x = F.gelu(F.conv2d((x.double() - mean) / std, w["stem.weight"], w["stem.bias"], stride=2, padding=1))
    a, kernels = coefficients(x, "blocks.0"), [w[f"blocks.0.convolutions.{i}.weight"] for i in range(2)]
    x = after(a[:, 0] * F.conv2d(x, kernels[0], padding=1) + a[:, 1] * F.conv2d(x, kernels[1]), "blocks.0")
    a, kernels = coefficients(x, "blocks.1").softmax(1), [w[f"blocks.1.convolutions.{i}.weight"] for i in range(3)]
    first, second = F.conv2d(x, kernels[0], padding=1), F.conv2d(x, kernels[1], padding=2, dilation=2)
    x = after(a[:, 0] * first + a[:, 1] * second + a[:, 2] * F.conv2d(x, kernels[2]), "blocks.1")
    return F.linear(x.mean((2, 3)), w["output.logits.weight"], w["output.logits.bias"])


# --- in Python ----------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_formula(run: Path, network: TrainedNetwork, pixels: NDArray[np.uint8]) -> None:
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    expected = formula(run, floats)
    found = network.logits(pixels)
    assert (found.shape, found.dtype) == ((360, 10), torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    for images in (floats, floats.numpy(), floats.double()):
        torch.testing.assert_close(network.logits(images).double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(network(floats).double(), expected, atol=1e-4, rtol=0)
    for image in (0, 200):  # alone as among others
        torch.testing.assert_close(
            network.logits(pixels[image, None]).double(), expected[image, None], atol=1e-4, rtol=0
        )
    mirrored = 0.5 * expected + 0.5 * formula(run, floats.flip(3))
    torch.testing.assert_close(network.logits(pixels, "mirror").double(), mirrored, atol=1e-4, rtol=0)
    padded = F.pad(floats, (1, 1, 1, 1), "reflect")
    shifted = [formula(run, view) for x in (padded[..., :32, :32], padded[..., 2:, 2:]) for view in (x, x.flip(3))]
    of_shift = 0.5 * mirrored + 0.125 * torch.stack(shifted).sum(0)
    torch.testing.assert_close(network.logits(pixels, "shift").double(), of_shift, atol=1e-4, rtol=0)
    assert network.logits(pixels[:0]).shape == (0, 10)


def test_it_is_the_trained_network_bit_for_bit(run: Path, network: TrainedNetwork, pixels: NDArray[np.uint8]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    right = network.logits(pixels).argmax(1).numpy() == data_prep.read_split(network.config.data.folder, "test")[1]
    assert right.mean() == summary["test_accuracy"]
    settings = network.config
    alone = Ranks(0, 1, network.mean.device, network.mean.device)
    data = Data(settings.data, settings.train, manifest(settings.data), alone)
    ((_, images, _),) = data.evaluation("test")
    with torch.no_grad():
        assert torch.equal(network.network(images), network.logits(pixels))
    assert (network.step, network.dataset, network.image_shape) == (summary["steps"], "digits", (32, 32, 3))
    assert network.classes == tuple(f"digit {i}" for i in range(10))
    assert not network.training


def test_loading_draws_no_random_numbers(run: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(run, "cpu")
    assert torch.equal(torch.rand(3), expected)


def test_predict_takes_one_or_several_images_of_any_kind(
    run: Path, network: TrainedNetwork, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    probabilities = formula(run, torch.from_numpy(pixels[:2]).permute(0, 3, 1, 2) / 255).softmax(1)

    def check(answers: list[Answer], top: int) -> None:
        for answer, expected in zip(answers, probabilities, strict=False):
            order = expected.argsort(descending=True)[:top].tolist()
            assert [name for name, _ in answer] == [f"digit {i}" for i in order]
            assert [p for _, p in answer] == pytest.approx(expected[order].tolist(), abs=1e-4)

    path = tmp_path / "first.png"
    Image.fromarray(pixels[0]).save(path)
    floats = torch.from_numpy(pixels[0]).permute(2, 0, 1) / 255
    for one in (path, str(path), Image.open(path), pixels[0], torch.from_numpy(pixels[0]), floats, floats.numpy()):
        answers = network.predict(one)
        assert len(answers) == 1
        check(answers, 5)
    both = pixels[:2], torch.from_numpy(pixels[:2])
    manies: list[Picture | list[Picture]] = [*both, [path, pixels[1]], [floats, Image.fromarray(pixels[1])]]
    for many in manies:
        answers = network.predict(many, top=99)
        assert len(answers) == 2
        check(answers, 10)
    assert network.predict([]) == []
    shifted = network.predict(pixels, top=1, tta="shift")
    assert [answer[0][0] for answer in shifted] == [f"digit {i}" for i in network.logits(pixels, "shift").argmax(1)]
    assert predict(run, path, top=1, device="cpu") == network.predict(path, top=1)


def test_any_size_is_scaled_and_cut_as_in_data_prep(
    network: TrainedNetwork, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    wide = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    path = tmp_path / "images" / "a" / "wide.png"
    Image.fromarray(wide).save(path)
    middle = Image.fromarray(wide).resize((32, 32), Image.Resampling.BICUBIC, (8, 0, 56, 48))
    expected = network.predict(np.asarray(middle))
    floats = torch.from_numpy(wide).permute(2, 0, 1) / 255
    for one in (path, Image.open(path), wide, torch.from_numpy(wide), floats):
        assert network.predict(one) == expected
    grey = wide[..., 0]
    assert network.predict(grey) == network.predict(grey[..., None]) == network.predict(np.stack([grey] * 3, 2))

    shutil.copytree(path.parent, tmp_path / "images" / "b")
    for number in range(2, 6):
        for folder in "ab":
            shutil.copy(path, tmp_path / "images" / folder / f"{number}.png")
    data_prep.prepare("own", tmp_path / "betons", tmp_path / "images", image_size=32)
    assert network.predict(data_prep.read_split(tmp_path / "betons", "train")[0][0]) == expected


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 3, 32, 32), np.uint8), r"uint8 \(2, 3, 32, 32\): this network takes uint8 \(N, 32, 32, 3\)"),
        (np.zeros((2, 32, 32, 3), np.float32), r"floats from 0 to 1 \(N, 3, 32, 32\)"),
        (np.zeros((32, 32, 3), np.uint8), "predict takes any size"),
        (np.zeros((2, 3, 32, 32), np.int64), "images are int64"),
        (np.full((1, 3, 32, 32), 255.0), "from 255 to 255: give floats from 0 to 1"),
        (np.full((1, 3, 32, 32), -2.0), "not normalised"),
        (np.full((1, 3, 32, 32), np.nan), "from nan to nan"),
    ],
)
def test_wrong_input_is_refused(network: TrainedNetwork, images: NDArray[np.generic], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network.logits(images)


def test_wrong_pictures_are_refused(network: TrainedNetwork, tmp_path: Path) -> None:
    for picture in (np.zeros((3, 40, 40), np.uint8), np.zeros((40, 40, 3)), np.zeros((40, 40), np.int32)):
        with pytest.raises(ValueError, match=r"give uint8 \(H, W, 3\), or floats from 0 to 1 \(3, H, W\)"):
            network.predict(picture)
    with pytest.raises(UserError, match=r"nowhere.png: cannot be read \(No such file"):
        network.predict([np.zeros((32, 32, 3), np.uint8), tmp_path / "nowhere.png"])
    with pytest.raises(ValueError, match="from 0 to 2: give floats"):
        network.predict(torch.linspace(0, 2, 3 * 40 * 40).view(3, 40, 40))
    with pytest.raises(ValueError, match="top = 0"):
        network.predict(np.zeros((32, 32, 3), np.uint8), top=0)


# --- files --------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_damaged_newest_checkpoint_is_skipped_and_nothing_is_changed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    last(copy).write_bytes(last(run).read_bytes()[:-100])

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in copy.rglob("*")}

    before = files()
    assert load(copy, "cpu").step == min(int(path.stem[-8:]) for path in (copy / "checkpoints").glob("*.pt"))
    assert f"{last(copy)} does not match its checksum; the one before it is used" in capsys.readouterr().err
    assert files() == before
    with pytest.raises(UserError, match="does not match its checksum: it is damaged"):
        load(last(copy))


def test_other_files_are_refused_in_one_sentence(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    state = torch.load(last(run), weights_only=True)
    ran = tmp_path / "ran"

    def refused(words: str, path: Path = path) -> None:
        with pytest.raises(UserError, match=words) as found:
            load(path)
        assert "\n" not in str(found.value)

    path.write_bytes(last(run).read_bytes()[:-100])
    refused("is damaged, or not a file of dist_train")
    torch.save({**state, "config": Malicious(ran)}, path)
    refused("code in a file is never run")
    assert not ran.exists()
    torch.save({key: value for key, value in state.items() if key not in ("config", "data")}, path)
    refused("of an earlier version, which did not save the configuration")
    torch.save(state["model"], path)
    refused("not a file of dist_train")
    torch.save({**state, "model": {}}, path)
    refused("does not fit this version")
    broken = {name: tensor.clone() for name, tensor in state["model"].items()}
    broken["output.logits.weight"][2, 5] = float("inf")
    torch.save({**state, "model": broken}, path)
    refused(
        r"1 of the network's 21 tensors are not finite \(output.logits.weight is the first\); its training diverged"
    )
    broken["output.logits.weight"][:] = 3e38
    torch.save({**state, "model": broken}, path)
    with pytest.raises(UserError, match="the logits of 2 of 2 images are not finite"):
        load(path).predict(np.full((2, 32, 32, 3), 200, np.uint8))
    path.write_text("hello")
    refused("not a file of dist_train")
    path.with_suffix(".safetensors").write_text("hello")
    refused("not a file of dist_train", path.with_suffix(".safetensors"))
    refused("there is no such file", tmp_path / "nowhere")
    refused("holds no whole checkpoint", tmp_path)


def test_the_package_stays_free_of_torch() -> None:
    code = (
        "import dist_train, sys; assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys(); from dist_train import load"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=REPOSITORY)


def test_the_trainer_writes_what_a_checkpoint_holds(run: Path, digits: Path) -> None:
    state = torch.load(last(run), weights_only=True)
    found = checkpoint.read(last(run))
    assert found.data == DataDescription.of(data_prep.check(digits))
    written, again = (dict(leaves(each)) for each in (state, found.to_dict()))
    assert [*written] == [*again]
    for name, value in written.items():
        assert torch.equal(value, again[name]) if isinstance(value, Tensor) else value == again[name]


# --- the command --------------------------------------------------------------------------------------------


def said(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
    """The command's exit code, stdout and stderr."""
    done = forked.run(command(*arguments, module="dist_train predict"), REPOSITORY, environment(), stdin=stdin)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def pictures(pixels: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of all kinds, all but the small ones and the long one of the same digit, and broken ones."""
    folder = tmp_path_factory.mktemp("pictures")
    image = Image.fromarray(pixels[3])
    image.save(folder / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees to the right
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "exif.webp", lossless=True, exif=turned)
    image.save(folder / "frames.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")] * 2)
    (folder / "more").mkdir()
    image.convert("CMYK").save(folder / "more" / "cmyk.tif")
    image.convert("L").save(folder / "more" / "GREY.PNG")
    image.convert("RGBA").save(folder / "more" / "rgba.png")
    Image.new("RGB", (1, 1), "white").save(folder / "one.png")
    Image.new("RGB", (4000, 30), "white").save(folder / "long.jpg")
    (folder / "broken.jpg").write_bytes((folder / "long.jpg").read_bytes()[:-50])
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not a picture by its name")
    (folder / "words.png").write_text("not a picture by its content")
    (folder / ".hidden.png").write_text("passed over")
    return folder


def test_a_folder_of_all_kinds(run: Path, network: TrainedNetwork, pictures: Path, pixels: NDArray[np.uint8]) -> None:
    code, out, err = said(run, pictures, pictures / "nowhere.png", pictures / "notes.txt", "--json", "--batch", 3)
    rows = [json.loads(line) for line in out.splitlines()]
    answers = {
        str(Path(row["image"]).relative_to(pictures)): [(p["class"], p["probability"]) for p in row["predictions"]]
        for row in rows
    }
    same = ["a.png", "exif.webp", "frames.gif", "more/GREY.PNG", "more/cmyk.tif", "more/rgba.png"]
    assert [*answers] == [*same[:3], "long.jpg", *same[3:], "one.png"]
    expected = network.predict(pixels[3])[0]
    for name in same:
        assert [label for label, _ in answers[name]] == [label for label, _ in expected]
        assert [p for _, p in answers[name]] == pytest.approx([p for _, p in expected], abs=1e-5)
    assert [p for _, p in answers["one.png"]] == pytest.approx(
        [p for _, p in answers["long.jpg"]], abs=1e-6
    )  # all white
    assert code == 1
    said_of_folder = f"dist_train: {pictures}: skipped 1, since their names are not those of images: notes.txt"
    hidden = f"dist_train: {pictures}: skipped 1, since their names are those of hidden files: .hidden.png"
    assert {said_of_folder, hidden} <= {*err.splitlines()}
    named = [line.split(": ")[1] for line in err.splitlines() if "skipped" not in line]
    bad = ["broken.jpg", "empty.png", "words.png", "nowhere.png", "notes.txt"]
    assert named == [str(pictures / name) for name in bad]
    assert "(not an image)" in err
    assert "truncated" in err


def test_in_the_terminal(run: Path, pictures: Path, network: TrainedNetwork) -> None:
    code, out, err = said(last(run), pictures / "a.png", "--top", 2, "--tta", "shift")
    assert (code, err) == (0, "")
    (name, *rows), expected = out.splitlines(), network.predict(pictures / "a.png", 2, "shift")[0]
    assert name == str(pictures / "a.png")
    assert [row.split("  ")[2] for row in rows] == [label for label, _ in expected]
    assert [float(row.split()[2]) for row in rows] == pytest.approx([100 * p for _, p in expected], abs=0.006)
    assert len(rows) == 2


def test_standard_input(run: Path, pictures: Path) -> None:
    shown = said(run, "-", "--top", 1, stdin=(pictures / "frames.gif").read_bytes())
    assert (shown[0], shown[2]) == (0, "")
    answer = shown[1].removeprefix("-: ")
    assert answer.startswith("digit ")
    paths = f"{pictures / 'a.png'}\n\n{pictures / 'empty.png'}\n{pictures / 'more/rgba.png'}".encode()
    code, out, err = said(run, "-", "--top", 1, stdin=paths)
    assert (code, out) == (1, "".join(f"{pictures / name}: {answer}" for name in ("a.png", "more/rgba.png")))
    assert err == f"dist_train: {pictures / 'empty.png'}: cannot be read (not an image)\n"


def test_a_photograph_on_a_slow_standard_input(run: Path, pictures: Path, tmp_path: Path) -> None:
    """It begins with a colour profile, in which there is no zero byte for long, and its first byte comes alone."""
    file = io.BytesIO()
    Image.open(pictures / "a.png").save(file, "JPEG", quality=100, icc_profile=b"x" * 0x1234)
    content = file.getvalue()
    start, profile = content.index(b"\xff\xe0"), content.index(b"\xff\xe2")
    content = content[:start] + content[profile:]  # without JFIF's segment
    assert b"\0" not in content[:16]
    (tmp_path / "photo.jpg").write_bytes(content)
    expected = said(run, tmp_path / "photo.jpg", "--json")[1].replace(str(tmp_path / "photo.jpg"), "-")
    reading = subprocess.Popen(
        command(run, "-", "--json", module="dist_train predict"),
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert reading.stdin is not None
    reading.stdin.write(content[:1])
    time.sleep(0.2)
    out, err = reading.communicate(content[1:], timeout=120)
    assert (reading.returncode, out.decode(), err.decode()) == (0, expected, "")


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_kind_of_picture_is_known_by_its_first_bytes(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    file = io.BytesIO()
    Image.new("RGB", (300, 300)).save(file, kind)
    assert begins_a_picture(file.getvalue()[:16])


@pytest.mark.parametrize(
    ("head", "picture"),
    [
        (b"\xff\xd8\xff\xe1\x1f\xffhttp://ns.ad", True),  # a JPEG that begins with XMP
        (b"RIFF\x01\x01\x01\x01WEBPVP8 ", True),  # larger than 16 MB
        (b"P6\n1920 1080\n255", True),
        (b"", True),
        (b"P6/a.png\nP5.png\n", False),
        (b"BMW.jpg\nBM.png\n", False),
        (b"GIF89/cat.gif\n", False),
        (b"RIFF.png\n", False),
        (b"\xff\xd8.png\n", False),  # names need not be valid text
        (b"a\n", False),
    ],
)
def test_pictures_are_told_from_lists_of_paths(head: bytes, picture: bool) -> None:
    assert begins_a_picture(head[:16]) == picture


def test_a_closed_pipe_ends_the_command_quietly(run: Path, pictures: Path) -> None:
    line = shlex.join(command(run, *[pictures / "a.png"] * 200, "--batch", 1, module="dist_train predict"))
    done = subprocess.run(
        f"{line} | head -n 1",
        shell=True,
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"{pictures / 'a.png'}\n"
    assert done.stderr == ""


def test_bad_input(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step-00000009.pt"
    damaged.write_bytes(last(run).read_bytes()[:1000])
    code, out, err = said(damaged, tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"dist_train: {damaged}: is damaged")
    assert err.count("\n") == 1
