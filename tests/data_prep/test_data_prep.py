"""data_prep through its command, on real beton files; then the functions that trainers call."""

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needs_ffcv

from dist_train import data_prep
from dist_train.data_prep import DataError, beton_file, datasets, ffcv_library
from dist_train.data_prep.__main__ import main

REPO = Path(__file__).resolve().parent.parent.parent
STEPS = ("data_prep: writing", "data_prep: downloading")
FILES = ("manifest.json", "test.beton", "train.beton")


def start(*arguments: object, **variables: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dist_train.data_prep", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=REPO,
        env={**os.environ, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    with start(*arguments, **variables) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_here(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Like run(), in this process: importing ffcv, which takes seconds, is then paid for once."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["data_prep", *map(str, arguments)])
        code = main()
    return subprocess.CompletedProcess([str(a) for a in arguments], code, out.getvalue(), err.getvalue())


def refused(result: "subprocess.CompletedProcess[str]", *words: str, code: int = 2) -> None:
    """The command ended with `code` and, as its last words, one sentence that contains all of `words`."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    sentence = [line for line in result.stderr.splitlines() if not line.startswith(STEPS)]
    assert len(sentence) == 1, result.stderr
    for word in words:
        assert word in sentence[0]


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {p.name: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in folder.iterdir()}


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def vouch_for(folder: Path, split: str) -> None:
    """Make the manifest agree with the beton file as it is now, so that only decoding can tell."""
    path = folder / f"{split}.beton"
    entry = {"bytes": path.stat().st_size, "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_manifest(folder, lambda raw: raw["splits"][split].update(entry))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    out = tmp_path_factory.mktemp("data") / "digits"
    threads = torch.get_num_threads()
    result = run_here("--dataset", "digits", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "digits, 1437 train and 360 test images of 32x32x3, ready" in result.stdout
    assert sorted(p.name for p in out.iterdir()) == list(FILES)
    assert torch.get_num_threads() == threads  # importing ffcv sets it to 1
    return out


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "digits"))


# --- the command --------------------------------------------------------------------------------------------


def test_second_run_is_quick_and_rewrites_nothing(digits: Path) -> None:
    before, started = snapshot(digits), time.monotonic()
    result = run("--dataset", "digits", "--out", digits)
    assert result.returncode == 0
    assert result.stderr == ""
    assert time.monotonic() - started < 5
    assert snapshot(digits) == before


def test_verify_accepts_what_was_written(digits: Path) -> None:
    result = run_here("--out", digits, "--verify")
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout
    assert result.stderr == ""  # no progress bars where nobody watches


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def flip(name: str, position: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return damage


def change(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda raw: raw.update({key: value}))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def as_version_3(folder: Path) -> None:
    """A file of a later ffcv, and a manifest that vouches for it."""
    content = (folder / "test.beton").read_bytes()
    (folder / "test.beton").write_bytes(b"\3" + content[1:])
    vouch_for(folder, "test")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(cut("train.beton", 5_000_000), ["train.beton", "5000000 bytes"], id="truncated"),
        pytest.param(cut("test.beton", 0), ["test.beton", "0 bytes"], id="empty"),
        pytest.param(flip("train.beton", 3_000_000), ["train.beton", "altered"], id="one pixel bit"),
        pytest.param(flip("test.beton", 0), ["test.beton", "altered"], id="one header bit"),
        pytest.param(write("train.beton", "hello"), ["train.beton", "5 bytes"], id="another file"),
        pytest.param(lambda f: (f / "test.beton").unlink(), ["test.beton", "No such file"], id="no test"),
        pytest.param(lambda f: (f / "manifest.json").unlink(), ["manifest.json is missing"], id="no manifest"),
        pytest.param(cut("manifest.json", 200), ["manifest.json", "not a manifest"], id="cut manifest"),
        pytest.param(write("manifest.json", "[1]"), ["manifest.json", "not a manifest"], id="other JSON"),
        pytest.param(change("format", 999), ["manifest.json", "format 999"], id="other format"),
        pytest.param(change("std", [0.2]), ["manifest.json", "missing or damaged"], id="short std"),
        pytest.param(change("splits", {}), ["manifest.json", "missing or damaged"], id="no splits"),
        pytest.param(change("ffcv_version", 1), ["manifest.json", "missing or damaged"], id="no version"),
        pytest.param(as_version_3, ["test.beton", "version 3 of the beton format"], id="other beton format"),
    ],
)
def test_damage_is_refused_with_a_remedy_and_left_alone(
    copy: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(copy)
    before = snapshot(copy)
    remedy = f"delete the folder {copy} and run python -m dist_train.data_prep --dataset digits --out {copy}"
    refused(run("--dataset", "digits", "--out", copy), str(copy), *words, remedy)
    with pytest.raises(DataError, match=remedy):
        data_prep.check(copy)
    assert snapshot(copy) == before


@pytest.mark.parametrize("writer", ["0.0.3", "1.0.2", "99.0", None])
def test_a_manifest_of_any_writer_is_read(copy: Path, writer: str | None) -> None:
    change("ffcv_version", writer)(copy)
    assert data_prep.check(copy).ffcv_version == writer


@needs_ffcv
def test_the_manifest_says_who_wrote_and_both_write_the_same(
    copy: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_prep.check(digits).ffcv_version == importlib.metadata.version("ffcv")
    monkeypatch.setattr(ffcv_library, "version", lambda: None)
    assert run_here("--dataset", "digits", "--out", copy, "--force").returncode == 0
    assert data_prep.verify(copy) == replace(data_prep.check(digits), ffcv_version=None)


@needs_ffcv
def test_a_copy_of_ffcv_without_metadata_is_used(copy: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(ffcv_library, "version", ffcv_library.version.__wrapped__)  # another cache than the process's
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert run_here("--dataset", "digits", "--out", copy, "--force").returncode == 0
    assert data_prep.verify(copy) == replace(data_prep.check(digits), ffcv_version="unknown")


def test_force_replaces_a_damaged_folder_by_the_same_bytes(copy: Path, digits: Path) -> None:
    cut("train.beton", 100)(copy)
    assert run_here("--dataset", "digits", "--out", copy, "--force").returncode == 0
    assert data_prep.check(copy) == data_prep.check(digits)
    assert sorted(p.name for p in copy.parent.iterdir()) == [".digits.lock", "digits"]


def test_other_data_set_is_refused(digits: Path) -> None:
    refused(run("--dataset", "cifar10", "--out", digits), "holds the data set digits, not cifar10")


def test_a_folder_with_other_peoples_files_is_never_deleted_nor_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for extra in ([], ["--force"]):
        result = run("--dataset", "digits", "--out", tmp_path, *extra)
        refused(result, "thesis.tex")
        assert "delete" not in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_missing_folder_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    result = run("--verify", "--out", out)
    refused(result, "is missing", f": run python -m dist_train.data_prep --dataset digits --out {out}")


def test_unwritable_out(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for out in (file, file / "below"):
        refused(run("--dataset", "digits", "--out", out), f"--out {out}", "choose a folder")
        refused(run("--dataset", "digits", "--out", out, "--force"), f"--out {out}", "choose a folder")
    assert file.read_text() == "x"


def test_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    # A limit on the size of files fails in the middle of a write, as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
        result = run_here("--dataset", "digits", "--out", tmp_path / "digits")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(result, "cannot be written", "enough space")
    assert [p.name for p in tmp_path.iterdir()] == [".digits.lock"]


def test_a_killed_write_leaves_nothing_whole_and_four_at_once_then_write_it_once(tmp_path: Path) -> None:
    out, half = tmp_path / "digits", tmp_path / ".digits.new.dist_train"
    with start("--dataset", "digits", "--out", out) as victim:
        file = half / "train.beton"
        while not (file.exists() and file.stat().st_size > 1 << 21):  # some of the pixels are there
            assert victim.poll() is None
            time.sleep(0.001)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert half.exists()
    assert not out.exists()
    with pytest.raises(DataError):
        data_prep.check(half)

    four = [start("--dataset", "digits", "--out", out) for _ in range(4)]
    said = [process.communicate(timeout=120)[1] for process in four]
    assert [process.returncode for process in four] == [0] * 4
    assert sum("writing" in text for text in said) == 1
    assert sum("waiting" in text for text in said) <= 3
    data_prep.check(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".digits.lock", "digits"]


@needs_ffcv
def test_no_shared_memory_is_needed(digits: Path, tmp_path: Path) -> None:
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("unshare is refused here: no small /dev/shm can be made")
    full = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero >/dev/shm/full && exec "$@"'
    command = [sys.executable, "-m", "dist_train.data_prep", "--dataset", "digits", "--out", str(tmp_path / "digits")]
    done = subprocess.run([*unshare, "bash", "-c", full, "bash", *command], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert data_prep.check(tmp_path / "digits") == data_prep.check(digits)


def test_no_network_is_reported_promptly_with_its_own_exit_code(tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")
    empty = {"CIFAR10_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "", "no_proxy": ""}
    started = time.monotonic()
    result = run("--out", tmp_path / "out", **nowhere, **empty)
    refused(result, "CIFAR-10 could not be downloaded", "CIFAR10_DIR", "--dataset digits", code=3)
    assert time.monotonic() - started < 60
    assert not (tmp_path / "out").exists()


def test_a_download_says_where_it_goes_and_draws_no_bar_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import CIFAR10

    parts = {name: {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]} for name in ("train", "test")}
    files = {**parts, "meta": {"label_names": ["cat", "dog"]}}
    sums = {}
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            data = pickle.dumps(content)
            sums[name] = hashlib.md5(data).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "filename", "cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", None)
    monkeypatch.setattr(CIFAR10, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": sums["meta"]})
    monkeypatch.setenv("CIFAR10_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for said in (f"data_prep: downloading CIFAR-10 into {tmp_path}/cache/dist_train/cifar10\n", ""):
        assert datasets.load("cifar10", None).classes == ("cat", "dog")
        assert capsys.readouterr() == ("", said)
    server.shutdown()
    server.server_close()


def test_wrong_source(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    refused(run("--source", source, "--out", out), f"--source {source} holds no folder cifar-10-batches-py")
    refused(run("--out", out, CIFAR10_DIR=str(source)), f"CIFAR10_DIR {source} holds no folder")
    refused(run("--dataset", "digits", "--source", source, "--out", out), f"--source {source}", "remove it")
    (source / "cifar-10-batches-py").mkdir(parents=True)
    (source / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not a pickle")
    refused(run_here("--source", source, "--out", out), "data_batch_1 is missing or not the official file")
    assert not out.exists()


# --- the functions ------------------------------------------------------------------------------------------


def test_importing_and_checking_stay_light(digits: Path) -> None:
    code = (
        "import sys, pathlib; from dist_train import data_prep; data_prep.check(pathlib.Path(sys.argv[1]));"
        "print({'torch', 'ffcv', 'torchvision', 'sklearn', 'numba'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(digits)]
    assert subprocess.run(command, cwd=REPO, text=True, capture_output=True).stdout == "set()\n"


def test_digits_are_sklearns_scaled_and_in_order(digits: Path) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    manifest = data_prep.check(digits)
    assert manifest.dataset == "digits"
    assert manifest.classes == tuple(f"digit {i}" for i in range(10))
    assert manifest.image_shape == (32, 32, 3)
    # Bilinear scaling by 4 spreads each pixel over 4x4 pixels, whose inner means give back the original
    # closely enough to tell every image from every other: use them to find each sample's place.
    flat = original.images.reshape(1797, 64)
    seen = []
    for split, count in (("train", 1437), ("test", 360)):
        images, labels = data_prep.read_split(digits, split)
        assert images.shape == (count, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.shape == (count,)
        assert labels.dtype == np.int64
        assert (images == images[..., :1]).all()  # gray
        small = images[..., 0].reshape(count, 8, 4, 8, 4)[:, :, 1:3, :, 1:3].mean(axis=(2, 4)) * 16 / 255
        distance = (flat**2).sum(axis=1) - 2 * small.reshape(count, 64) @ flat.T  # but for a term of each row
        place = distance.argmin(axis=1)
        assert (np.diff(place) > 0).all()  # the data set's own order
        assert (original.target[place] == labels).all()
        assert np.ptp(np.bincount(labels)) <= 0.05 * count  # stratified
        seen += place.tolist()
        if split == "train":
            assert np.allclose(images.mean(axis=(0, 1, 2)) / 255, manifest.mean)
            assert np.allclose(images.std(axis=(0, 1, 2)) / 255, manifest.std)
        content = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
        assert content == manifest.splits[split].content_sha256
    assert sorted(seen) == list(range(1797))


def test_reading_leaves_torch_threads_and_numpys_generator_alone(digits: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        np.random.seed(5)
        expected = np.random.rand()
        np.random.seed(5)
        data_prep.read_split(digits, "test")
        assert torch.get_num_threads() == 3
        assert np.random.rand() == expected
    finally:
        torch.set_num_threads(threads)


def test_unknown_names(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'valid' is not in"):
        data_prep.read_split(digits, "valid")
    with pytest.raises(DataError, match="'mnist' is unknown: choose one of cifar10, digits"):
        data_prep.prepare("mnist", tmp_path / "mnist")


def test_verify_finds_what_the_fast_check_cannot(copy: Path) -> None:
    edit_manifest(copy, lambda raw: raw["mean"].__setitem__(1, 0.4))
    data_prep.check(copy)
    with pytest.raises(DataError, match="mean or std"):
        data_prep.verify(copy)
    flip("train.beton", 3_000_000)(copy)
    vouch_for(copy, "train")
    data_prep.check(copy)
    with pytest.raises(DataError, match=r"train\.beton decodes to other samples"):
        data_prep.verify(copy)


def test_inconsistent_tables_are_refused(copy: Path, digits: Path) -> None:
    path = copy / "test.beton"
    beton_file.write(path, np.zeros((360, 40, 40, 3), np.uint8), np.zeros(360, np.int64))
    with pytest.raises(DataError, match="does not hold 360 raw images of 32x32"):
        data_prep.read_split(copy, "test")
    beton_file.write(path, np.zeros((360, 32, 32, 3), np.uint8), np.arange(360))
    with pytest.raises(DataError, match="labels up to 359 where the manifest has 10 classes"):
        data_prep.read_split(copy, "test")
    vouch_for(copy, "test")
    with pytest.raises(DataError, match="labels up to 359"):
        data_prep.check(copy)
    whole = (digits / "test.beton").read_bytes()
    # Nothing, less than a header, a header alone, half the pixels, and every sort of nonsense in the header.
    for content in (b"", whole[:10], whole[:30], whole[:2_500_000], b"\0" * 5000, b"\xff" * 5000):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be decoded"):
            data_prep.read_split(copy, "test")


# --- CIFAR-10 itself ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("CIFAR10_DIR"):
        pytest.skip("CIFAR10_DIR is not set, so there is no CIFAR-10 to test with")
    out = tmp_path_factory.mktemp("data") / "cifar10"
    result = run_here("--out", out)
    assert result.returncode == 0, result.stderr
    assert "cifar10, 50000 train and 10000 test images of 32x32x3, ready" in result.stdout
    return out


def test_cifar10_statistics_are_the_known_ones(cifar10: Path) -> None:
    manifest = data_prep.check(cifar10)
    assert manifest.classes[0] == "airplane"
    assert len(manifest.classes) == 10
    assert {name: split.count for name, split in manifest.splits.items()} == {"train": 50000, "test": 10000}
    assert np.allclose(manifest.mean, (0.4914, 0.4822, 0.4465), atol=5e-4)
    assert np.allclose(manifest.std, (0.2470, 0.2435, 0.2616), atol=5e-4)


def test_cifar10_decodes_to_torchvisions_arrays(cifar10: Path) -> None:
    from torchvision.datasets import CIFAR10

    for split in ("train", "test"):
        images, labels = data_prep.read_split(cifar10, split)
        original = CIFAR10(os.environ["CIFAR10_DIR"], train=split == "train")
        assert np.array_equal(images, original.data)
        assert np.array_equal(labels, original.targets)


def test_cifar10_source_may_be_the_batches_folder_itself(cifar10: Path, tmp_path: Path) -> None:
    batches = Path(os.environ["CIFAR10_DIR"]) / "cifar-10-batches-py"
    if not batches.is_dir():
        pytest.skip("CIFAR10_DIR is the batches folder itself already")
    from dist_train.data_prep.datasets import load

    assert len(load("cifar10", batches).splits["test"][1]) == 10000
