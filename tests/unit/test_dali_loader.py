"""DALI shows exactly what is asked for, whatever the file, and survives files that are broken."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps

from hpctrain.config.schema import DataConfig
from hpctrain.data.dali_loader import DaliLoader
from hpctrain.data.dali_trial import DaliTrial
from hpctrain.data.index import Index
from hpctrain.data.pillow_loader import PillowLoader
from hpctrain.data.types import Batch, Mode, Request
from hpctrain.errors import MachineError, UserError
from tests.needs import needs
from tests.unit.pictures import encoded, index_of, picture, picture_set

needs("nvidia.dali")

CPU = torch.device("cpu")

#: Mean absolute difference between DALI's and Pillow's picture of one window, on the scale 0-255, that the
#: documentation states: rounding of two resizers, and Pillow's shortcut on windows much larger than the output.
BOUND = 1.0

#: Statistics that leave values on the scale 0-255.
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def loader_of(index: Index, batch: int = 4, **options: Any) -> DaliLoader:
    options = {"image_size": 32, "max_corrupt_share": 0.2, **PLAIN, **options}
    return DaliLoader(DataConfig(**options), index, seed=1, device=CPU, batch_size=batch, threads=2)


def requests_of(index: Index, batch: int = 4, epochs: int = 2, mode: Mode = "train") -> list[Request]:
    starts = range(0, len(index) - batch + 1, batch)
    return [Request(np.arange(s, s + batch), epoch, batch, mode) for epoch in range(epochs) for s in starts]


def kept(batches: Any) -> list[Batch]:
    """Copies of batches, which are only valid until the next one."""
    return [replace(batch, images=batch.images.clone(), labels=batch.labels.clone()) for batch in batches]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.request is other.request


def shown_whole(files: list[bytes], folder: Path, **options: Any) -> np.ndarray:
    """The centre squares of pictures whose shorter side is 48, at that size: decoding without resizing."""
    index = index_of(folder, files)
    loader = loader_of(index, batch=len(files), image_size=48, eval_crop=1.0, **options)
    (batch,) = kept(loader.load(requests_of(index, len(files), 1, "eval")))
    loader.close()
    return batch.images.permute(0, 2, 3, 1).numpy()


def centre_square(image: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    side = min(upright.size)
    x, y = (upright.size[0] - side) // 2, (upright.size[1] - side) // 2
    return np.asarray(upright.crop((x, y, x + side, y + side)))


def test_every_orientation_is_turned_upright_exactly(tmp_path: Path) -> None:
    files = [encoded(picture(64, 48), orientation) for orientation in range(1, 9)]
    for shown, data in zip(shown_whole(files, tmp_path), files, strict=True):
        assert np.array_equal(shown, centre_square(Image.open(io.BytesIO(data))))


def test_formats_and_colour_spaces_are_decoded_as_pillow_does(tmp_path: Path) -> None:
    base = picture(64, 48)
    files = [encoded(base.convert(mode)) for mode in ("RGB", "L", "CMYK")]
    files += [encoded(base.convert(mode), image_format="PNG") for mode in ("RGB", "L", "LA", "RGBA", "P", "1")]
    files += [encoded(base, 6, "PNG")]
    for shown, data in zip(shown_whole(files, tmp_path), files, strict=True):
        image = Image.open(io.BytesIO(data))
        assert np.array_equal(shown, centre_square(image.convert("RGB") if image.mode != "RGB" else image))


def test_grey_output(tmp_path: Path) -> None:
    base = picture(64, 48)
    files = [encoded(base), encoded(base.convert("L")), encoded(base, image_format="PNG")]
    shown = shown_whole(files, tmp_path, channels=1)
    assert shown.shape == (3, 48, 48, 1)
    for pixels, data in zip(shown[..., 0], files, strict=True):
        image = Image.open(io.BytesIO(data))
        image.draft("L", image.size)  # of a JPEG, luminance as it is stored
        assert np.abs(pixels - centre_square(image.convert("L"))).max() <= 1


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_agree_with_pillows_within_the_stated_bound(tmp_path: Path, mode: Mode, channels: int) -> None:
    sizes = [(40, 30), (64, 64), (33, 200), (500, 375), (1400, 1050), (120, 90), (90, 120), (300, 400)]
    files = [encoded(picture(w, h, seed=w), 1 + n) for n, (w, h) in enumerate(sizes)]
    index = index_of(tmp_path, files)
    options = {"image_size": 64, "channels": channels, **PLAIN}
    dali = loader_of(index, len(files), **options)
    pillow = PillowLoader(DataConfig(**options), index, seed=1, device=CPU, batch_size=len(files), threads=1)
    requests = requests_of(index, len(files), 3, mode)
    for ours, reference in zip(dali.load(requests), pillow.load(requests), strict=True):
        difference = (ours.images - reference.images).abs().mean(dim=(1, 2, 3))
        assert difference.max() < BOUND, difference
        assert torch.equal(ours.labels, reference.labels)


def test_batches_are_contiguous_float32_and_normalised(tmp_path: Path) -> None:
    index = picture_set(tmp_path, 8)
    statistics: dict[str, Any] = {"mean": (100.0, 110.0, 120.0), "std": (50.0, 60.0, 70.0)}
    requests = requests_of(index, epochs=1)
    plain_batches = kept(loader_of(index).load(requests))
    for plain, normal in zip(plain_batches, loader_of(index, **statistics).load(requests), strict=True):
        assert normal.images.dtype == torch.float32
        assert normal.images.is_contiguous()
        mean, std = (torch.tensor(statistics[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        assert torch.allclose(normal.images, (plain.images - mean) / std, atol=1e-6)


def test_a_batch_depends_on_its_request_alone(tmp_path: Path) -> None:
    index = picture_set(tmp_path)
    requests = requests_of(index)
    whole = kept(loader_of(index).load(requests))
    assert_same(whole, kept(loader_of(index).load(requests)))
    assert_same(whole[5:], kept(loader_of(index).load(requests[5:])))
    loader = loader_of(index)
    stream = loader.load(iter(requests))
    assert_same(whole[:3], kept(next(stream) for _ in range(3)))
    stream.close()  # type: ignore[attr-defined]  # left in the middle, as a run that stops does
    assert_same(whole, kept(loader.load(requests)))
    assert_same(whole, kept(loader.load(requests)))
    assert list(loader.load([])) == []
    assert_same(whole[:1], kept(loader.load(requests[:1])))


@pytest.fixture
def broken_set(tmp_path: Path) -> tuple[Index, Index]:
    """The same pictures, whole, and with samples 5, 6 and 17 broken in three ways."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = picture_set(tmp_path / "whole")
    files = [Path(path).read_bytes() for path in whole.shards]
    # Cut off near its end: what a decoder of the window's part alone would not notice.
    files[5] = files[5][: len(files[5]) * 19 // 20]
    files[6] = b"this is no picture" * 20
    files[17] = encoded(picture(41, 37))
    broken = index_of(tmp_path / "broken", files)
    samples = broken.samples.copy()
    samples[["width", "height"]] = whole.samples[["width", "height"]]
    return whole, Index(samples, broken.shards, broken.classes)


def test_corrupt_samples_are_replaced_by_their_successor(broken_set: tuple[Index, Index]) -> None:
    whole, broken = broken_set
    loader = loader_of(broken)
    shown = kept(loader.load(requests_of(broken)))
    stand_ins = np.arange(len(whole))
    stand_ins[[5, 6, 17]] = [7, 7, 18]
    asked = [Request(stand_ins[r.sample_ids], r.epoch, r.valid, r.mode) for r in requests_of(whole)]
    expected = kept(loader_of(whole).load(asked))
    for batch, other in zip(shown, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)
    assert len(loader.corrupt) == 3
    for line, sample, words in zip(loader.corrupt, (5, 6, 17), ("truncated", "identify", "41 x 37"), strict=True):
        assert line.startswith(broken.shards[sample])
        assert words in line


def test_a_cut_off_file_is_found_even_where_its_window_is_whole(broken_set: tuple[Index, Index]) -> None:
    index = broken_set[1].select(np.array([5, 7, 8, 9]))
    loader = loader_of(index, max_corrupt_share=0.3, crop_area=(0.01, 0.02))
    list(loader.load(requests_of(index)))
    assert [line.split(":")[0] for line in loader.corrupt] == [index.shards[5]]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("batch", [4, 64])
def test_no_fault_of_a_file_ends_the_process(batch: int, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.unit.broken_batches", str(tmp_path), str(batch)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["named"] == answer["broken"]


def test_a_good_file_of_rare_make_is_shown(tmp_path: Path) -> None:
    files = [encoded(picture(64, 48, seed)) for seed in range(48)]
    (tmp_path / "plain").mkdir()
    (tmp_path / "rare").mkdir()
    plain = index_of(tmp_path / "plain", files)
    rare = index_of(tmp_path / "rare", [data + b"more" if n % 7 == 0 else data for n, data in enumerate(files)])
    loader, requests = loader_of(rare, 48), requests_of(plain, 48)
    assert_same(kept(loader_of(plain, 48).load(requests)), kept(loader.load(requests)))
    assert loader.corrupt == []


def test_too_many_corrupt_samples_end_the_run(broken_set: tuple[Index, Index]) -> None:
    index = broken_set[1]
    loader = loader_of(index, max_corrupt_share=0.1, path="some/set")
    with pytest.raises(UserError, match=r"3 of 24 samples \(12\.50%\) .* data\.max_corrupt_share = 10\.00%") as caught:
        list(loader.load(requests_of(index)))
    assert index.shards[17] in str(caught.value)
    assert "`hpctrain data verify some/set`" in str(caught.value)


def test_errors_met_while_reading_ahead_come_as_they_are(broken_set: tuple[Index, Index]) -> None:
    whole, broken = broken_set
    with pytest.raises(UserError, match=r"^1 of 24 samples"):
        list(loader_of(broken, max_corrupt_share=0.0).load(requests_of(broken)))
    Path(whole.shards[9]).unlink()
    loader = loader_of(whole)
    with pytest.raises(MachineError, match=r"0009\.jpg cannot be read: No such file"):
        list(loader.load(requests_of(whole)))
    assert len(kept(loader.load(requests_of(whole)[:2]))) == 2, "the loader itself is still of use"


@pytest.mark.parametrize("sound", [False, True], ids=["in doubt", "met in a run"])
def test_what_only_dali_refuses_is_found_by_trying(
    broken_set: tuple[Index, Index], sound: bool, monkeypatch: Any
) -> None:
    loader = loader_of(broken_set[1].select(np.array([16, 17, 18, 19])), max_corrupt_share=0.3)
    monkeypatch.setattr("hpctrain.data.standins.fault_of", lambda data, record: None)
    monkeypatch.setattr("hpctrain.data.standins.is_sound", lambda data, record: sound)
    (batch,) = kept(loader.load([Request(np.arange(4), 0, 4, "train")]))
    assert [line.split(": ")[1] for line in loader.corrupt] == ["DALI cannot decode it, though Pillow can"]
    assert torch.equal(batch.images[1], batch.images[2])


def test_each_trial_is_of_the_file_it_is_given(broken_set: tuple[Index, Index]) -> None:
    index = broken_set[1]
    trial = DaliTrial(DataConfig(image_size=32), index, CPU)
    faults = [trial(sample, Path(index.shards[sample]).read_bytes()) is not None for sample in range(len(index))]
    assert [sample for sample, fault in enumerate(faults) if fault] == [5, 6, 17]


def test_a_failure_that_is_no_samples_fault_ends_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    index = picture_set(tmp_path, 4)
    loader = loader_of(index)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hpctrain.data.dali_loader.take_output", fail)
    with pytest.raises(MachineError, match="decodes one by one: out of memory"):
        list(loader.load(requests_of(index, epochs=1)))


def test_memory_does_not_grow(tmp_path: Path) -> None:
    index = picture_set(tmp_path)
    loader = loader_of(index)
    process = psutil.Process()
    requests = requests_of(index, epochs=50)

    def resident_mib() -> float:
        for _ in loader.load(requests):
            pass
        gc.collect()
        return process.memory_info().rss / 2**20

    resident_mib()
    sizes = [resident_mib() for _ in range(11)]
    growth = [after - before for before, after in pairwise(sizes)]
    assert min(growth) < 2, "a leak grows in every round, the allocator's pools in some"
