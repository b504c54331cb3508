"""A set with samples broken in every way, loaded by DALI in large runs: a process of its own, which a crash would end.

``python -m tests.unit.broken_batches FOLDER BATCH`` compares every batch with that of the whole set with stand-ins,
and prints the ids of the samples that were named.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.dali_loader import DaliLoader
from hpctrain.data.index import Index
from hpctrain.data.types import Request
from tests.unit.pictures import encoded, index_of, picture, picture_set

SAMPLES = 128
#: Samples that are PNGs, the others being JPEGs.
PNGS = (51, 111)


def broken(files: list[bytes]) -> dict[int, bytes]:
    """What becomes of samples, by id; all stand far enough apart that each one's successor is whole."""
    shapes = dict.fromkeys((3, 77, 127), b"this is no picture" * 20)
    shapes |= {sample: encoded(picture(30, 30)) for sample in (9, 120)}  # smaller than any of the set
    for sample in (15, 90):
        data, start = bytearray(files[sample]), files[sample].index(b"\xff\xc4") + 4
        end = data.rindex(b"\xff\xda")
        data[start:end] = bytes(end - start)
        shapes[sample] = bytes(data)
    shapes |= {sample: files[sample][: len(files[sample]) * 19 // 20] for sample in (21, 63)}
    shapes |= {sample: bytes(len(files[sample])) for sample in (31, 99)}
    shapes[41] = b""
    for sample in PNGS:  # the headers are sound: only decoding tells
        data, start = bytearray(files[sample]), files[sample].index(b"IDAT") + 4
        data[start : start + 200] = bytes(200)
        shapes[sample] = bytes(data)
    return shapes


def loader_of(index: Index, batch: int) -> DaliLoader:
    config = DataConfig(image_size=32, max_corrupt_share=0.2)
    return DaliLoader(config, index, seed=1, device=torch.device("cpu"), batch_size=batch, threads=2)


def main(folder: Path, batch: int) -> None:
    for name in ("plain", "whole", "broken"):
        (folder / name).mkdir()
    plain = picture_set(folder / "plain", SAMPLES)
    files = [Path(path).read_bytes() for path in plain.shards]
    for sample in PNGS:
        files[sample] = encoded(picture(64, 48, sample), image_format="PNG")
    whole = index_of(folder / "whole", files)
    faults = broken(files)
    spoilt = index_of(folder / "broken", [faults.get(sample, data) for sample, data in enumerate(files)])
    samples = whole.samples.copy()
    samples["length"] = spoilt.samples["length"]
    loader = loader_of(Index(samples, spoilt.shards, whole.classes), batch)
    starts = [(epoch, start) for epoch in range(2) for start in range(0, SAMPLES, batch)]
    requests = [Request(np.arange(start, start + batch), epoch, batch, "train") for epoch, start in starts]
    stand_ins = np.array([(sample + (sample in faults)) % SAMPLES for sample in range(SAMPLES)])
    asked = [Request(stand_ins[r.sample_ids], r.epoch, r.valid, r.mode) for r in requests]
    for shown, expected in zip(loader.load(requests), loader_of(whole, batch).load(asked), strict=True):
        assert torch.equal(shown.images, expected.images)
        assert torch.equal(shown.labels, expected.labels)
    named = sorted(int(Path(line.split(":")[0]).stem) for line in loader.corrupt)
    print(json.dumps({"broken": sorted(faults), "named": named}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
