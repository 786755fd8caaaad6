"""The model card of an exported network: its results, use, limits, data, architecture, training, checks and licence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from dist_train import __version__, config, data_prep
from dist_train.inference.trained_network import TrainedNetwork, stamp
from dist_train.reports.architecture import markdown, totals
from dist_train.reports.markdown import code, literal, table
from dist_train.reports.plots import DATASETS
from dist_train.reports.statistics import often_taken_for, proportion
from dist_train.runs.run import Run

PICTURES = "pictures.py"  # beside the exported files: a copy of data_prep/pictures.py
_LABELS = {"code": "digest of dist_train's code", "threads": "CPU threads", "instructions": "CPU instructions"}
# by data set: a description, the known limits, the licence terms
_DATA = {
    "cifar10": (
        "CIFAR-10 (Krizhevsky 2009, *Learning Multiple Layers of Features from Tiny Images*): 60,000 colour "
        "photographs of ten kinds of animals and vehicles, of which 10,000 are the test set.",
        [
            "Its images are part of the 80 Million Tiny Images, which were found through search engines by English "
            "nouns (2008) and withdrawn in 2020 for offensive labels and images. What they show, and from which "
            "countries, nobody chose.",
            "3.3 % of the test images have near duplicates among the training images (Barz and Denzler 2020, *Do we "
            "train on test data?*), and on photographs collected anew in the same manner such networks are 3 to 15 "
            "points less accurate (Recht et al. 2019, *Do ImageNet Classifiers Generalize to ImageNet?*). Expect less "
            "than the accuracy given here.",
        ],
        "The authors of CIFAR-10 state no licence for its images; they ask to be cited.",
    ),
    "digits": (
        "scikit-learn's digits (Alpaydin and Kaynak 1998, *Optical Recognition of Handwritten Digits*): 1,797 grey "
        "images of 8x8 pixels, here scaled to 32x32. Every fifth image of a class is a test image.",
        [
            "They come from thirteen people, each of whom is in the training set and in the test set: of another "
            "person's handwriting expect less than the accuracy given here.",
            "They are small and clean, light on dark, and in the middle of the image. The network is for trying things "
            "out.",
        ],
        "The digits are under CC BY 4.0, of the UCI Machine Learning Repository.",
    ),
}


@dataclass(frozen=True)
class Check:
    """The comparison of a file with the network that it was exported from. size: in bytes. difference: the largest
    between two logits. same: the number of images with the same answer."""

    file: str
    size: int
    sha256: str
    difference: float
    same: int


@dataclass(frozen=True)
class Checked:
    """The comparison of all files. images: the number of images. description: of the images, in words. largest_logit:
    the largest magnitude of a logit."""

    images: int
    description: str
    largest_logit: float
    checks: Sequence[Check]


@dataclass(frozen=True)
class Results:
    """The results of a network in its run folder: the summary and the last evaluation, each empty where it is missing
    or belongs to other weights."""

    summary: dict[str, Any]
    evaluation: dict[str, Any]

    @classmethod
    def of(cls, network: TrainedNetwork, run: Run | None) -> Results:
        """The results of a network. run: that trained it, None where that is not known. Raises UserError for damaged
        files."""
        summary, evaluation = (run.summary, run.evaluation or {}) if run else ({}, {})
        return cls(
            summary if summary.get("weights_sha256") == stamp(network)["weights_sha256"] else {},
            evaluation if evaluation.get("step") == network.step else {},
        )


def card(network: TrainedNetwork, results: Results, checked: Checked) -> str:
    """The README.md of an export, in Markdown with front matter. Only the checked files are described."""
    digest = stamp(network)["weights_sha256"]
    summary, evaluation = results.summary, results.evaluation
    height, width, channels = network.image_shape
    name, classes = DATASETS.get(network.dataset) or literal(network.dataset), map(literal, network.classes)
    about, biases, terms = _DATA.get(
        network.dataset,
        (
            f"Images of the data set {name}, which were read from folders, one for each class.",
            ["How they were collected, and so what is rare among them, is not known."],
            "What may be done with a network trained on these images depends on the terms of the images.",
        ),
    )
    equal = summary.get("equal_images")
    size = totals(network.config.model, (channels, height, width), len(network.classes))
    parts = {
        "": f"{_purpose(network)} A block network: every block mixes several convolutions of the same input, with "
        f"weights that a small layer computes from each image. {size['parameters']:,} parameters, {size['flops']:,} "
        f"floating-point operations an image; trained for {network.step:,} steps.",
        "Results": _results(network, summary, evaluation),
        "Use": _use(network, [check.file for check in checked.checks]),
        "Limits": _list(
            f"Every picture is given one of these {len(network.classes)} classes, also one that shows none of them. A "
            f"high probability is no sign that it does.",
            f"It sees {width}x{height} pixels: of a larger picture the middle, scaled down.",
            "The metrics are for pictures like those of the test set, from one training with one seed. Other cameras, "
            "places and times, and pictures that are meant to mislead, were not tested.",
            "It was made for research on training. Do not let it decide anything about people, or where a wrong answer "
            "does harm.",
            *([f"{equal:,} of the test images have the pixels of training images."] if equal else []),
            *biases,
        ),
        "Data": f"{about} The network was trained on the training images only, normalised by their mean and standard "
        f"deviation; classes: {', '.join(classes)}.",
        "Architecture": markdown(network.config.model, (channels, height, width), len(network.classes)),
        "Training": _training(network, summary),
        "How it was checked": _checked(network, checked),
        "The same weights, bit for bit": _reproduction(network, digest),
        "Licence": f"dist_train is under the MIT licence, and so are these files unless their publisher states "
        f"otherwise. {terms}",
    }
    sections = [f"## {title}\n\n{text}" if title else text for title, text in parts.items()]
    front_matter = yaml.safe_dump(_front(network, evaluation), sort_keys=False, allow_unicode=True)
    return (
        "\n\n".join([f"---\n{front_matter}---", f"# {name}, classified by a block network", *map(str.strip, sections)])
        + "\n"
    )


def _front(network: TrainedNetwork, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The front matter of the card, in the format of Hugging Face."""
    front: dict[str, Any] = {
        "license": "mit",
        "library_name": "dist_train",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "block-network", "dynamic-convolution"],
        "datasets": [network.dataset],
        "metrics": ["accuracy"],
    }
    if evaluation:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": network.dataset, "name": network.dataset, "split": evaluation["split"]},
            "metrics": [
                {"type": "accuracy", "value": evaluation[key], "name": name}
                for key, name in (("accuracy", "accuracy"), ("accuracy_tta", "accuracy with test-time augmentation"))
                if key in evaluation
            ],
        }
        front["model-index"] = [{"name": f"block-network-{network.dataset}", "results": [result]}]
    return front


def _purpose(network: TrainedNetwork) -> str:
    height, width, _ = network.image_shape
    names = f": {', '.join(map(literal, network.classes))}" if len(network.classes) <= 20 else ""
    return f"Classifies colour images of {width}x{height} pixels into {len(network.classes)} classes{names}."


def _results(network: TrainedNetwork, summary: dict[str, Any], evaluation: dict[str, Any]) -> str:
    if not evaluation:
        return "There is no evaluation of these weights; `dist-train evaluate` makes one."
    images, tta = evaluation["images"], network.config.evaluate.tta
    views = {"mirror": "mirrored views", "shift": "mirrored and shifted views"}.get(tta, "several views of an image")
    results = [("test set", images, evaluation["accuracy"], evaluation["loss"])]
    if "accuracy_tta" in evaluation:
        results.append((f"the same, averaged over {views}", images, evaluation["accuracy_tta"], evaluation["loss_tta"]))
    if "val_accuracy" in summary:
        held_out = network.config.data.holdout
        results.append(("held out of the training set", held_out, summary["val_accuracy"], summary["val_loss"]))
    rows = [[name, f"{count:,}", *_share(accuracy, count), f"{loss:.4f}"] for name, count, accuracy, loss in results]
    text = table(["images of", "images", "accuracy", "95 % interval", "loss"], rows)

    precision = network.config.train.precision
    arithmetic = "Computed in float32" if precision == "fp32" else f"Computed in {precision}, as in training"
    fp32 = "" if precision == "fp32" else " The exported files compute in float32, which may change a few answers."
    text += (
        f"\n{arithmetic}, at the end: nothing was chosen by the test set during the run. Intervals are Wilson's, for "
        f"the choice of the test images.{fp32}\n\n"
    )
    classes = []
    names = [literal(name) for name in evaluation["classes"]]
    others = often_taken_for(evaluation, names)
    for number, (name, row) in enumerate(zip(names, evaluation["confusion"], strict=True)):
        count = sum(row)
        share = _share(row[number] / count, count) if count else ["", ""]
        classes.append([name, f"{count:,}", *share, others[number]])
    text += table(["class", "images", "accuracy", "95 % interval", "most often taken for"], classes)
    calibration = evaluation["calibration"]
    confidence = sum(part["count"] * part["confidence"] for part in calibration["bins"] if part["count"]) / images
    return text + (
        f"\nThe mean confidence of the answers is {100 * confidence:.1f} %, where "
        f"{100 * evaluation['accuracy']:.1f} % are right; expected calibration error "
        f"{100 * calibration['ece']:.1f} % ({len(calibration['bins'])} bins)."
    )


def _training(network: TrainedNetwork, summary: dict[str, Any]) -> str:
    t, data = network.config.train, network.config.data
    augmented = [
        *([f"mirrored ({data.flip})"] if data.flip != "none" else []),
        *([f"shifted by up to {data.translate} pixels"] if data.translate else []),
        *([f"a square of {data.cutout} pixels cut out"] if data.cutout else []),
        *(f"at {s.size}x{s.size} pixels until {100 * s.until:g} % of the run" for s in data.smaller),
    ]
    facts = {
        "epochs, steps": f"{t.epochs:g}, {network.step:,}",
        "batch": f"{t.batch_size:,} images in {t.microbatches} microbatches",
        **({"trained on": t.select.words} if t.select.words else {}),
        "precision": t.precision,
        "seed": t.seed,
        "augmentation": ", ".join(augmented) or "none",
    }
    if summary:
        facts["computed by"] = f"{summary['device']}, {summary['world_size']} rank{'s' * (summary['world_size'] > 1)}"
        facts["time"] = f"{summary['train_seconds']:,.1f} s, {summary['images_per_second']:,.0f} images/s"
        facts["commit"] = summary["git_commit"] or "none"
    for environment in network.environments:
        facts |= {_LABELS.get(key, key): value for key, value in environment.items()}
    moves = len(network.environments) - 1
    note = f"\nThe run was resumed in another environment {moves} time{'s' * (moves > 1)}; the last one is given.\n"
    text = table(["", ""], [[literal(name), literal(str(value))] for name, value in facts.items()]) + note * (moves > 0)
    toml = config.to_toml(network.config).strip()
    configuration = f"<summary>The whole configuration (config.toml)</summary>\n\n{code('toml', toml)}"
    return f"{text}\n<details>{configuration}\n\n</details>"


def _checked(network: TrainedNetwork, checked: Checked) -> str:
    rows = [
        [
            check.file,
            f"{check.size:,}",
            f"{check.difference:.2g}",
            f"{check.same} of {checked.images}",
            f"`{check.sha256}`",
        ]
        for check in checked.checks
    ]
    return (
        f"Each file was read back and given {literal(checked.description)}, in batches of several sizes; its logits, "
        f"of up to {checked.largest_logit:.3g}, were compared with those of the network in the trainer's own code.\n\n"
        + table(["file", "bytes", "largest difference", "same answers", "SHA-256"], rows)
    )


def _reproduction(network: TrainedNetwork, digest: str) -> str:
    size = network.image_shape[0] if network.dataset not in data_prep.DATASETS else 0
    data = network.config.data
    write = data_prep.command(network.dataset, data.folder, image_size=size, drop_equal=data.drop_equal)
    environment = network.environments[-1]
    device = literal(environment["device"])
    content = " and ".join(f"`{sha}` ({split})" for split, sha in network.content_sha256.items())
    commands = f"{write}\npython -m dist_train.main --config config.toml --run-dir runs/again"
    return (
        f"{code('bash', commands)}\n\n"
        f"With dist_train {__version__}, torch {environment['torch']}, and a device like {device}, on "
        f"any number of ranks, the weights and BatchNorm statistics after step {network.step:,} are these, with the "
        f"SHA-256 `{digest}` (at the end of a run, `weights_sha256` in its summary.json). Under another version or on "
        f"another kind of device they may differ in rounding. The images are the same where `manifest.json` beside the "
        f"betons has the same `content_sha256`: {content}."
    )


def _use(network: TrainedNetwork, files: Sequence[str]) -> str:
    height, width, channels = network.image_shape
    bits = f", grey_bits={network.grey_bits}" if network.grey_bits else ""
    read = f'image = read_picture("image.png", {height}{bits})  # uint8 (height, width, RGB)'
    snippets = {
        "model.safetensors": (
            "the weights, with the configuration and the classes in its metadata; for dist_train",
            "from dist_train import load\n\n"
            'network = load("model.safetensors")  # a torch.nn.Module\n'
            'print(network.predict("image.png", top=3))  # also a list of paths, PIL images, arrays or tensors',
        ),
        "model.pt2": (
            f"a graph of torch.export, written by torch {torch.__version__.partition('+')[0]}; needs torch",
            "import json\n\nimport torch\nfrom pictures import read_picture\n\n"
            'metadata = {"classes": ""}\n'
            'network = torch.export.load("model.pt2", extra_files=metadata).module()\n'
            'classes = json.loads(metadata["classes"])\n'
            f"{read}\n"
            "images = torch.from_numpy(image).permute(2, 0, 1)[None] / 255\n"
            "probabilities = network(images).softmax(1)[0]\n"
            "print(classes[probabilities.argmax()], probabilities.max().item())",
        ),
        "model.onnx": (
            "for ONNX Runtime and other software that reads ONNX; the classes are in its metadata",
            "import json\n\nimport numpy as np\nimport onnxruntime\nfrom pictures import read_picture\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])\n'
            f"{read}\n"
            "images = image.astype(np.float32).transpose(2, 0, 1)[None] / 255\n"
            '(logits,) = session.run(["logits"], {"images": images})\n'
            "print(classes[logits[0].argmax()])",
        ),
    }
    usage = "\n\n".join(
        f"**{file}**: {words}.\n\n{code('python', lines)}" for file, (words, lines) in snippets.items() if file in files
    )
    graphs = (
        f"The graphs take `images`, float32 RGB from 0 to 1 of shape (N, {channels}, {height}, {width}), any N, "
        f"and give `logits`, float32 (N, {len(network.classes)}). The images' normalisation is inside. [{PICTURES}]"
        f"({PICTURES}) reads a picture as the training images were read: turned by EXIF, transparent parts on white, "
        f"16 bits as 8, scaled, and cropped to its middle. A picture read otherwise may be classified otherwise.\n\n"
    )
    return (graphs if {"model.pt2", "model.onnx"} & {*files} else "") + usage


def _share(accuracy: float, images: int) -> list[str]:
    low, high = proportion(round(accuracy * images), images)
    return [f"{100 * accuracy:.2f} %", f"{100 * low:.2f} to {100 * high:.2f}"]


def _list(*items: str) -> str:
    return "\n".join(f"- {item}" for item in items)
