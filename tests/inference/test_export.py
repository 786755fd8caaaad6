"""Exported files against the formula, of a network with everything that an architecture can have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, environment, trainer
from PIL import Image
from torch import Tensor

from dist_train import config, data_prep, load
from dist_train.errors import UserError
from dist_train.inference import export, model_card
from dist_train.reports.statistics import proportion
from dist_train.runs import layout
from dist_train.runs.run import Run

# torch.export.load of torch 2.9, in the card's snippet as anywhere: it reads tensors from the bytes of the file
TORCH_2_9 = "ignore:The given buffer is not writable:UserWarning"
ODD = """
[data]
dataset = "digits"
holdout = 37

[model]
stem = { kind = "whiten", kernel = 3, activation = "silu" }
output = { hidden = [20, 12], activation = "gelu", dropout = 0.2 }
batch_norm = { scale = false }

[[model.blocks]]
channels = 24
convolutions = [{ kernel = 3, groups = 6 }, { kernel = 3, dilation = 2, bias = true }, { kernel = 1 }]
norm = "branch"
activate = "branch"
activation = "silu"
coefficients = "softmax"
temperature = 2.0
pool = 2
dropout = 0.1

[[model.blocks]]
channels = 16
convolutions = [{ kernel = 3, padding = 1, stride = 2 }, { kernel = 1, stride = 2, bias = true }]
coefficients = "sigmoid"
norm = "none"
pool_at = "sum"
pool = 2
pool_kind = "avg"

[[model.blocks]]
channels = 24
convolutions = [{ kernel = 3 }, { kernel = 1 }, { kernel = 1 }]
per_image = false
pool = "all"

[optim.default]
algorithm = "adamw"
lr = 0.01

[train]
epochs = 2
batch_size = 128
microbatches = 4
precision = "fp32"

[evaluate]
tta = "shift"
"""


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a trained network."""
    folder = tmp_path_factory.mktemp("runs") / "odd"
    (folder.parent / "odd.toml").write_text(ODD)
    settings = [
        "--config",
        folder.parent / "odd.toml",
        f"data.dir={digits}",
        "train.device=cpu",
        "record.wandb=disabled",
    ]
    done = trainer(*settings, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> subprocess.CompletedProcess[str]:
    """The command for all formats; its files are in the run folder."""
    return exporting(run)


def exporting(*arguments: object) -> subprocess.CompletedProcess[str]:
    return trainer(*arguments, module="dist_train export", timeout=300)


def last(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.pt"))


def formula(run: Path, x: Tensor) -> Tensor:
    """The logits of floats from 0 to 1, (N, C, H, W), from the architecture's description, in float64."""
    state = torch.load(last(run), weights_only=True)
    w = {name: tensor.double() for name, tensor in state["model"].items()}

    def conv(x: Tensor, block: int, branch: int, **how: int) -> Tensor:
        name = f"blocks.{block}.convolutions.{branch}"
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **how)

    def norm(x: Tensor, block: int, position: int) -> Tensor:
        name = f"blocks.{block}.norms.{position}"
        mean, var = (w[f"{name}.{what}"][:, None, None] for what in ("mean", "var"))
        found: Tensor = (x - mean) / (var + 1e-5).sqrt() + w[f"{name}.bias"][:, None, None]
        return found

    def fc(x: Tensor, block: int) -> Tensor:
        if block == 2:
            learned: Tensor = w["blocks.2.mixing.bias"].expand(len(x), -1)
            return learned
        return F.linear(x.mean((2, 3)), w[f"blocks.{block}.mixing.fc.weight"], w[f"blocks.{block}.mixing.fc.bias"])

    def total(a: Tensor, branches: list[Tensor]) -> Tensor:
        found: Tensor = torch.einsum("nl,lnchw->nchw", a, torch.stack(branches))
        return found

    mean, std = (torch.tensor(state["data"][what], dtype=torch.float64)[:, None, None] for what in ("mean", "std"))
    x = F.silu(F.conv2d((x.double() - mean) / std, w["stem.weight"], w["stem.bias"]))
    branches = [conv(x, 0, 0, padding=1, groups=6), conv(x, 0, 1, padding=2, dilation=2), conv(x, 0, 2)]
    branches = [F.silu(norm(branch, 0, position)) for position, branch in enumerate(branches)]
    x = F.max_pool2d(total((fc(x, 0) / 2).softmax(1), branches), 2)
    x = F.gelu(
        F.avg_pool2d(total(fc(x, 1).sigmoid(), [conv(x, 1, 0, stride=2, padding=1), conv(x, 1, 1, stride=2)]), 2)
    )
    x = total(fc(x, 2), [conv(x, 2, 0, padding=1), conv(x, 2, 1), conv(x, 2, 2)])
    x = F.gelu(norm(x, 2, 0)).amax((2, 3))
    for layer in ("output.hidden.0", "output.hidden.1"):
        x = F.gelu(F.linear(x, w[f"{layer}.weight"], w[f"{layer}.bias"]))
    return F.linear(x, w["output.logits.weight"], w["output.logits.bias"])


def test_the_command_says_what_it_wrote_and_nothing_else(run: Path, exported: subprocess.CompletedProcess[str]) -> None:
    assert (exported.returncode, exported.stderr) == (0, "")
    _, *rows, end = exported.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["model.safetensors", "model.pt2", "model.onnx"]
    for row in rows:
        name, size, difference, same, _, images = row.split()
        assert int(size.replace(",", "")) == (run / "export" / name).stat().st_size
        assert (same, images) == ("256", "256")
        assert float(difference) < 1e-4
    assert rows[0].split()[2] == "0"
    assert "compared on 256 test images of digits" in end
    names = {*layout.EXPORTED.values(), "README.md", "config.toml", "pictures.py"}
    assert {path.name for path in (run / "export").iterdir()} == names
    for path in (run / "export").iterdir():  # nothing of the machine it was made on
        assert not re.search(rb"/tmp/|/home/|dist_train/\w+\.py", path.read_bytes()), path


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt2", "model.onnx"])
@pytest.mark.parametrize("count", [1, 2, 11])
def test_files_give_the_logits_of_the_formula(
    run: Path, exported: subprocess.CompletedProcess[str], file: str, count: int
) -> None:
    read = export.reader(run / "export" / file)
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        found = read(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), formula(run, images), atol=1e-6, rtol=1e-5)


def test_safetensors_are_the_run_bit_for_bit(
    run: Path, exported: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    file = run / "export" / "model.safetensors"
    again, trained = load(file, "cpu"), load(run, "cpu")
    images = data_prep.read_split(trained.config.data.folder, "test")[0][:50]
    assert torch.equal(again.logits(images, "shift"), trained.logits(images, "shift"))
    assert again.state_dict().keys() == trained.state_dict().keys()
    for found, expected in zip(again.state_dict().values(), trained.state_dict().values(), strict=True):
        assert torch.equal(found, expected)
    for name in ("classes", "image_shape", "dataset", "content_sha256", "step", "environments"):
        assert getattr(again, name) == getattr(trained, name)
    assert config.digest(again.config) == config.digest(trained.config)
    assert again.config == config.load(None, run / "export" / "config.toml", [])
    assert again.config.data.dir == ""

    damaged = bytearray(file.read_bytes())
    damaged[-9] ^= 1
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match="do not match their SHA-256"):
        load(tmp_path / "model.safetensors")


def test_exported_graphs_have_the_metadata_to_use_them(run: Path, exported: subprocess.CompletedProcess[str]) -> None:
    classes = [f"digit {i}" for i in range(10)]
    carried = {"classes": "", "dataset": "", "weights_sha256": "", "config": ""}
    torch.export.load(run / "export" / "model.pt2", extra_files=carried)
    session = onnxruntime.InferenceSession(run / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("images", ["batch", 3, 32, 32], "tensor(float)")
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 10])]
    summary = json.loads((run / "summary.json").read_text())
    for found in (carried, session.get_modelmeta().custom_metadata_map):
        assert json.loads(found["classes"]) == classes
        assert found["dataset"] == "digits"
        assert found["weights_sha256"] == summary["weights_sha256"]
        assert found["config"] == (run / "export" / "config.toml").read_text()
    operators = {node.op_type for node in onnx.load(run / "export" / "model.onnx").graph.node}
    assert operators >= {"Conv", "BatchNormalization", "Gelu", "Gemm", "Softmax"}
    assert not operators & {"Loop", "If", "Scan", "Dropout"}


# --- the model card -----------------------------------------------------------------------------------------


def test_the_card_has_the_metrics_of_the_run(
    run: Path, exported: subprocess.CompletedProcess[str], digits: Path
) -> None:
    text = (run / "export" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    read = yaml.safe_load(front)
    summary, evaluation = (json.loads((run / file).read_text()) for file in ("summary.json", "evaluation.json"))
    (result,) = read["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [summary["test_accuracy"], summary["test_accuracy_tta"]]
    assert (read["license"], read["datasets"], read["pipeline_tag"]) == ("mit", ["digits"], "image-classification")

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("| ")]
    for name, key, images in (
        ("test set", "test_accuracy", 360),
        ("the same, averaged over mirrored and shifted views", "test_accuracy_tta", 360),
        ("held out of the training set", "val_accuracy", 37),
    ):
        low, high = proportion(round(summary[key] * images), images)
        expected = [name, str(images), f"{100 * summary[key]:.2f} %", f"{100 * low:.2f} to {100 * high:.2f}"]
        assert expected in [row[:4] for row in rows]
    for number, name in enumerate(evaluation["classes"]):
        of_class = evaluation["confusion"][number]
        (row,) = [row for row in rows if row[0] == name]
        assert row[:3] == [name, str(sum(of_class)), f"{100 * of_class[number] / sum(of_class):.2f} %"]
    for words in (
        "floating-point operations an image",
        "expected calibration error",
        f"`{summary['weights_sha256']}`",
        f"`{data_prep.check(digits).splits['train'].content_sha256}` (train)",
        "| **block 3** |",
        "python -m dist_train.data_prep --dataset digits --out data/digits",
        "thirteen people",
    ):
        assert words in body
    assert (run / "export" / "config.toml").read_text() in body


def test_the_card_has_names_of_classes_as_they_are(run: Path) -> None:
    network = load(last(run))
    odd = ["a|b", "*star*", "<b>bold</b>", "[link](http://x)", "\x1b[31m", "`code`", "&amp;"]
    network.classes = (*odd, *network.classes[len(odd) :])
    results = model_card.Results.of(network, Run(run))
    results.evaluation["classes"] = [*network.classes]
    body = model_card.card(network, results, model_card.Checked(1, "noise", 1.0, []))
    shown = [r"a\|b", r"\*star\*", r"\<b\>bold\</b\>", r"\[link\](http\://x)", r"\\x1b\[31m", r"\`code\`", r"\&amp;"]
    assert body.count(", ".join(shown)) == 2
    assert all(f"\n| {name} | " in body for name in shown)
    assert not any(name in body.replace("\\", "") and name in body for name in odd[:3])


def test_the_card_s_snippets_run(run: Path, exported: subprocess.CompletedProcess[str], digits: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (run / "export" / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    # a picture that no step of the reading leaves as it is: large, wide, transparent beside the digit, turned by EXIF
    pixels = Image.fromarray(data_prep.read_split(digits, "test")[0][5]).resize((96, 96))
    picture = Image.new("RGBA", (140, 96))
    picture.paste(pixels, (22, 0))
    picture.putalpha(Image.fromarray(np.maximum(np.asarray(picture)[..., 0], 90)))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees to the right
    image = run / "export" / "image.png"
    picture.transpose(Image.Transpose.ROTATE_90).save(image, exif=turned)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", TORCH_2_9, "-c", "\n".join(snippets)],
        cwd=run / "export",
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (name, probability), *_ = load(run, "cpu").predict(image)[0]
    image.unlink()
    of_dist_train, of_torch, of_onnx = done.stdout.splitlines()
    assert of_dist_train.startswith(f"[[('{name}', {probability:.3f}"[:-1])
    assert of_torch.rpartition(" ")[0] == of_onnx == name
    assert float(of_torch.rpartition(" ")[2]) == pytest.approx(probability, abs=1e-4)


# --- what can go wrong --------------------------------------------------------------------------------------


def test_a_checkpoint_alone_and_without_the_extra(run: Path, tmp_path: Path) -> None:
    """No run folder, no betons, no onnxruntime: what can be made is made and checked on random pixels."""
    path = tmp_path / "mine.pt"
    state = torch.load(last(run), weights_only=True)
    torch.save({**state, "config": re.sub(r'dir = ".*?"', 'dir = "nowhere"', state["config"])}, path)
    code = "import sys; sys.modules['onnxruntime'] = None; from dist_train.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "export", path, "--format", "onnx", "safetensors"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == "dist_train: model.onnx needs onnxruntime: pip install onnx onnxscript onnxruntime\n"
    assert "256 images of random pixels, as the test images of digits were not available" in done.stdout
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        *("model.safetensors", "README.md", "config.toml", "pictures.py")
    }
    card = (tmp_path / "export" / "README.md").read_text()
    assert "There is no evaluation of these weights" in card
    assert "model-index" not in card
    assert "model.onnx" not in card
    assert torch.equal(
        load(tmp_path / "export" / "model.safetensors").logits(np.zeros((1, 32, 32, 3), np.uint8)),
        load(path).logits(np.zeros((1, 32, 32, 3), np.uint8)),
    )


def test_a_file_that_differs_is_named_and_removed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    (wrong,) = export.export(load(run, "cpu"), tmp_path, ["safetensors"], run)
    assert wrong.startswith(f"{tmp_path / 'model.safetensors'}: its logits differ by 0 where")
    assert not (tmp_path / "model.safetensors").exists()
    assert "model.safetensors" not in (tmp_path / "README.md").read_text()


def test_bad_input(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = exporting(run, "--out", tmp_path / "file" / "folder")
    assert done.returncode == 2
    assert done.stderr == (
        f"dist_train: --out {tmp_path / 'file' / 'folder'}: cannot be made (Not a directory); name another folder\n"
    )


def test_the_card_says_how_many_test_images_are_training_images(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    words = "of the test images have the pixels of training images"
    for count in (0, 1234):
        summary = json.loads((copy / "summary.json").read_text())
        (copy / "summary.json").write_text(json.dumps({**summary, "equal_images": count}))
        assert not export.export(load(copy, "cpu"), tmp_path, ["safetensors"], copy)
        card = (tmp_path / "README.md").read_text()
        assert (f"- 1,234 {words}.\n" in card) == (words in card) == bool(count)


def test_metrics_of_other_weights_are_omitted(run: Path, tmp_path: Path) -> None:
    """A checkpoint before the last: the metrics of the run belong to other weights."""
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    state = torch.load(last(copy), weights_only=True)
    state["step"] -= 1
    state["model"]["output.logits.bias"] += 1
    torch.save(state, copy / "checkpoints" / "step-00000001.pt")
    network = load(copy / "checkpoints" / "step-00000001.pt", "cpu")
    assert not export.export(network, tmp_path, ["safetensors"], copy)
    assert "There is no evaluation" in (tmp_path / "README.md").read_text()
