"""Which samples, in which order, with which pixels; on any number of ranks and from either loader."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import environment, needs_ffcv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train import data_prep
from dist_train.config.settings import DataConfig, Smaller, TrainConfig
from dist_train.data.augment import augment, cut_out
from dist_train.data.batches import Data
from dist_train.data.dataset import manifest
from dist_train.data_prep import ffcv_library
from dist_train.distributed.ranks import Ranks
from dist_train.errors import UserError
from dist_train.randomness import derive, sample_bits, uniform_integers


def loaded(folder: Path, rank: int = 0, world_size: int = 1, batch_size: int = 256, **fields: Any) -> Data:
    config = DataConfig(dataset="digits", dir=str(folder), **fields)
    ranks = Ranks(rank, world_size, torch.device("cpu"), torch.device("cpu"))
    return Data(config, TrainConfig(epochs=1, batch_size=batch_size, microbatches=4, seed=3), manifest(config), ranks)


@pytest.fixture(params=[pytest.param("ffcv", marks=needs_ffcv), "map"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What streams: ffcv, or the memory map that takes its place where it is not installed."""
    if request.param == "map":
        monkeypatch.setattr(ffcv_library, "version", lambda: None)
    return str(request.param)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("flip", ["random", "alternate"])
def test_stream_and_resident_and_ranks_give_the_same_microbatches(digits: Path, flip: str) -> None:
    resident = loaded(digits, flip=flip, translate=2, cutout=8)
    steps = resident.steps(3)
    expected = [[(m.slot, m.images, m.labels, m.indices) for m in next(steps)] for _ in range(4)]
    streams = [loaded(digits, rank, 2, loader="stream", flip=flip, translate=2, cutout=8) for rank in (0, 1)]
    iterators = [stream.steps(3) for stream in streams]
    for whole in expected:  # crosses the end of the first epoch after two steps
        parts = [(m.slot, m.images.clone(), m.labels.clone(), m.indices) for i in iterators for m in next(i)]
        for mine, theirs in zip(whole, parts, strict=True):
            assert mine[0] == theirs[0]
            for a, b in zip(mine[1:], theirs[1:], strict=True):
                assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert expected[0][0][1].is_contiguous(memory_format=torch.channels_last)


@needs_ffcv
@pytest.mark.parametrize(("variables", "cores"), [({"NUMBA_NUM_THREADS": "1"}, None), ({}, {0})])
def test_streaming_keeps_torchs_number_of_threads(
    digits: Path, variables: dict[str, str], cores: set[int] | None
) -> None:
    """On which the bits depend, also where ffcv cannot use as many."""
    code = f"""
import os, torch
from pathlib import Path
from dist_train.data.loaders import Stream
from dist_train.config.settings import DataConfig
os.sched_setaffinity(0, {cores or "os.sched_getaffinity(0)"})
torch.set_num_threads(3)
stream = Stream(DataConfig(dataset="digits", dir={str(digits)!r}), "train", torch.device("cpu"))
for _ in range(2):
    print([torch.get_num_threads() for _ in stream.batches(torch.arange(300), 100)], torch.get_num_threads())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**environment(), **variables}, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == ["[3, 3, 3] 3"] * 2


def test_an_epoch_shows_each_sample_at_most_once_and_epochs_differ(digits: Path) -> None:
    data = loaded(digits)
    steps = data.steps(0)
    epochs = []
    for _ in range(2):
        seen = torch.cat([m.indices for _ in range(data.steps_per_epoch) for m in next(steps)])
        assert len(seen.unique()) == len(seen) == data.steps_per_epoch * 256
        epochs.append(seen)
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("loader", ["resident", "stream"])
def test_evaluation_counts_every_image_once(digits: Path, loader: str) -> None:
    expected = torch.from_numpy(data_prep.read_split(digits, "test")[1]).sort().values
    data = loaded(digits, loader=loader, eval_batch=100)
    for world_size in (1, 2, 3, 4, 7):
        labels = []
        for rank in range(world_size):
            data.ranks = Ranks(rank, world_size, torch.device("cpu"), torch.device("cpu"))
            labels += [batch_labels for _, _, batch_labels in data.evaluation("test")]
        assert torch.equal(torch.cat(labels).sort().values, expected)


def test_holdout_is_disjoint_and_the_same_for_every_seed(digits: Path) -> None:
    data = loaded(digits, holdout=300)
    config, ranks = data.config, data.ranks
    other = Data(config, TrainConfig(batch_size=256, microbatches=4, seed=99), data.manifest, ranks)
    assert torch.equal(data.indices["holdout"], other.indices["holdout"])
    assert len(data.indices["holdout"]) == 300
    both = torch.cat((data.indices["train"], data.indices["holdout"]))
    assert torch.equal(both.sort().values, torch.arange(1437))
    trained = torch.cat([m.indices for m in next(data.steps(0))])
    assert not set(trained.tolist()) & set(data.indices["holdout"].tolist())
    assert sum(len(labels) for _, _, labels in data.evaluation("holdout")) == 300


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["none", "random", "alternate"]),
    st.integers(0, 4),
    st.integers(0, 5),
    st.integers(0, 2**40),
    st.integers(2, 9),
)
def test_augmentation_is_a_mirrored_crop_of_the_reflected_image(
    flip: Literal["none", "random", "alternate"], translate: int, epoch: int, seed: int, side: int
) -> None:
    translate = min(translate, side - 1)
    images = torch.randint(0, 256, (5, side, side + 1, 3), dtype=torch.uint8)
    indices = torch.arange(5) * 1000
    config = DataConfig(flip=flip, translate=translate)
    found = augment(config, images, indices, seed, epoch).numpy()
    pad = [(translate, translate)] * 2 + [(0, 0)]
    for image, result in zip(images.numpy(), found, strict=True):
        # mirror first, then crop: every crop of the padded image or its mirror image is possible
        candidates = []
        for source in (image, image[:, ::-1]) if flip != "none" else (image,):
            padded = np.pad(source, pad, mode="reflect")
            shifts = range(2 * translate + 1)
            candidates += [padded[r : r + side, c : c + side + 1] for r in shifts for c in shifts]
        assert any(np.array_equal(result, candidate) for candidate in candidates)


def slow_augment(config: DataConfig, image: Tensor, index: int, seed: int, epoch: int) -> Tensor:
    """What augment does to one image, pixel by pixel."""
    height, width, _ = image.shape
    mirrored = across = down = 0
    sample = torch.tensor(index)
    if config.flip != "none":
        numbers = (epoch,) if config.flip == "random" else ()
        mirrored = int(sample_bits(sample, derive(seed, "flip", *numbers)) & 1)
        if config.flip == "alternate":
            mirrored = (mirrored + epoch) % 2
    if config.translate:
        bits = sample_bits(sample, derive(seed, "translate", epoch))
        across = int(uniform_integers(bits, 2 * config.translate + 1)) - config.translate
        down = int(uniform_integers(bits >> 32, 2 * config.translate + 1)) - config.translate
    result = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            source = (width - 1 - column if mirrored else column) + across
            result[row, column] = image[reflected(row + down, height), reflected(source, width)]
    return result


def reflected(position: int, size: int) -> int:
    position = abs(position)
    return 2 * (size - 1) - position if position >= size else position


@pytest.mark.parametrize("flip", ["none", "random", "alternate"])
@pytest.mark.parametrize("translate", [0, 2, 4])
def test_augmentation_is_that_of_the_slow_reference(
    flip: Literal["none", "random", "alternate"], translate: int
) -> None:
    images = torch.randint(0, 256, (20, 5, 7, 3), dtype=torch.uint8)
    indices = torch.randperm(1000)[:20]
    config = DataConfig(flip=flip, translate=translate)
    for epoch in (0, 3):
        found = augment(config, images, indices, 11, epoch)
        expected = [slow_augment(config, *pair, 11, epoch) for pair in zip(images, indices.tolist(), strict=True)]
        assert torch.equal(found, torch.stack(expected))


def test_normalising_and_cutting_out_are_those_of_the_plain_formulas(digits: Path) -> None:
    data = loaded(digits, flip="none", translate=0, cutout=3)
    plain = loaded(digits, flip="none", translate=0)
    batch, whole = next(data.steps(2))[1], next(plain.steps(2))[1]
    pixels = torch.from_numpy(data_prep.read_split(digits, "train")[0])[whole.indices]
    assert torch.equal(whole.images, (pixels * data.scale + data.shift).permute(0, 3, 1, 2))
    bits = sample_bits(batch.indices, derive(3, "cutout", 2 // data.steps_per_epoch))
    colour = torch.tensor([round(255 * mean) for mean in data.manifest.mean]).byte()
    for one, word in zip(pixels, bits, strict=True):
        row = int(uniform_integers(word, 32 - 3 + 1))
        column = int(uniform_integers(word >> 32, 32 - 3 + 1))
        one[row : row + 3, column : column + 3] = colour
    assert torch.equal(batch.images, (pixels * data.scale + data.shift).permute(0, 3, 1, 2))
    # the squares are made smaller with the images
    smaller = [Smaller(size=16, until=1, how="scale")]
    scaled = next(loaded(digits, flip="none", translate=0, cutout=3, smaller=smaller).steps(2))[1].images
    expected = F.interpolate(batch.images, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [1, 4, 5])
def test_squares_lie_inside_at_every_place(side: int) -> None:
    images = torch.randint(0, 200, (2000, 5, 7, 3), dtype=torch.uint8)
    before, colour = images.clone(), torch.tensor([255, 254, 253], dtype=torch.uint8)
    found = cut_out(images, sample_bits(torch.arange(2000), 7), side, colour)
    assert torch.equal(images, before)  # which a loader may use again
    cut = (found == colour).all(3)
    assert torch.equal(found[~cut], images[~cut])
    assert cut.sum((1, 2)).tolist() == [side**2] * 2000
    places = {tuple(row) for row in cut.flatten(1).int().argmax(1, keepdim=True).tolist()}
    assert len(places) == (5 - side + 1) * (7 - side + 1)
    assert cut.any(2).sum(1).tolist() == cut.any(1).sum(1).tolist() == [side] * 2000


@pytest.mark.parametrize("batch_size", [64, 176, 200, 232, 280, 352])  # 22, 8, 7, 6, 5 and 4 batches
def test_a_stream_that_is_left_early_ends_its_thread(digits: Path, batch_size: int, reader: str) -> None:
    before = set(threading.enumerate())
    data = loaded(digits, loader="stream", batch_size=batch_size)
    for pause in (0.0, 0.2):  # in which it fills its queue
        steps = data.steps(0)
        next(steps)
        time.sleep(pause)
        started = set(threading.enumerate()) - before
        threads = [t for t in started if reader == "map" or type(t).__name__ == "EpochIterator"]
        assert threads
        del steps
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_alternate_flip_mirrors_every_image_every_other_epoch() -> None:
    images = torch.arange(8 * 2 * 2 * 1, dtype=torch.uint8).view(8, 2, 2, 1)
    config = DataConfig(flip="alternate", translate=0)
    first, second, third = (augment(config, images, torch.arange(8), 0, epoch) for epoch in range(3))
    assert torch.equal(first, third)
    assert torch.equal(first, second.flip(2))
    mirrored = (first != images).flatten(1).any(1)
    assert 0 < mirrored.sum() < 8


def test_random_numbers_of_a_sample_are_uniform_and_do_not_depend_on_its_batch() -> None:
    indices = torch.arange(60_000)
    bits = sample_bits(indices, derive(1, "test"))
    assert torch.equal(bits[[5, 70]], sample_bits(torch.tensor([5, 70]), derive(1, "test")))
    for part in (bits, bits >> 32):
        counts = torch.bincount(uniform_integers(part, 5), minlength=5)
        assert counts.sum() == 60_000
        assert (counts - 12_000).abs().max() < 500
    assert abs((bits & 1).sum().item() - 30_000) < 600
    known = sample_bits(torch.tensor([1]), 0).item() % 2**64
    assert known == 0xE220A8397B1DCDAF  # the first output of SplitMix64 from seed 0


def test_a_batch_that_is_too_large_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match=r"holdout = 1400 .* 1437 training images"):
        loaded(digits, holdout=1400)


def test_a_square_larger_than_the_images_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cutout = 33 is larger than the images of digits \(32x32 pixels\)"):
        loaded(digits, cutout=33)
    next(loaded(digits, cutout=32).steps(0))


def test_smaller_images_are_the_middle_or_the_whole_scaled_down(digits: Path) -> None:
    phases = [Smaller(size=20, until=0.2, how="crop"), Smaller(size=13, until=0.6, how="scale")]
    plain, data = loaded(digits).steps(0), loaded(digits, smaller=phases)
    assert [data.image_size(step) for step in range(4)] == [(20, 20), (13, 13), (13, 13), (32, 32)]
    steps = data.steps(0)
    # each new pixel is an average of old ones with weights that fall linearly with the distance
    distance = (np.arange(13)[:, None] + 0.5) * 32 / 13 - (np.arange(32)[None] + 0.5)
    weights = np.clip(1 - np.abs(distance) * 13 / 32, 0, None)
    weights /= weights.sum(1, keepdims=True)
    for step in range(4):
        for whole, smaller in zip(next(plain), next(steps), strict=True):
            images = whole.images
            if step < 1:
                images = images[:, :, 6:26, 6:26]
            elif step < 3:
                images = torch.from_numpy(np.einsum("ih,nchw,jw->ncij", weights, images.double().numpy(), weights))
            torch.testing.assert_close(smaller.images, images.float(), rtol=0, atol=1e-5 if 0 < step < 3 else 0)
            assert torch.equal(whole.indices, smaller.indices)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([Smaller(size=24, until=1), Smaller(size=28, until=0.5)], "until must rise"),
        ([Smaller(size=40, until=0.2)], "size = 40 is larger than the images of digits"),
    ],
)
def test_impossible_sizes_are_refused(digits: Path, phases: list[Smaller], words: str) -> None:
    with pytest.raises(UserError, match=words):
        loaded(digits, smaller=phases)


def test_a_shift_out_of_sight_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match=r"data\.translate = 32 .* use at most 31"):
        loaded(digits, translate=32)
