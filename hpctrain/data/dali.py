"""NVIDIA DALI's part of its loader: the pipelines, and whether there is a DALI at all.

This is the one file that imports nvidia.dali, and only when a pipeline is built. What is fed to a pipeline, and
what becomes of corrupt files, is ``hpctrain.data.dali_loader``.

What was found out about DALI 2.4 and is relied on (tests hold it): with ``adjust_orientation`` windows are in
coordinates of the upright picture; the CPU decoder gives Pillow's pixels for RGB, grey and CMYK JPEGs and PNGs;
after an error a pipeline is of no further use; with the dynamic executor, the default, an output lives as long as it
is referred to.

What was found out and has to be kept away from it: in a run of 32 pictures or more, one whose header its parser
refuses, or whose window leaves the picture, ends the process with a segmentation fault (its exception leaves while
other threads still parse). In smaller runs that is an exception, and what is wrong behind the headers, in the
compressed data, is one in runs of any size. So no file comes here before ``hpctrain.data.soundness`` is sure of its
headers or a run with it alone has gone well (``hpctrain.data.dali_trial``).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.config.schema import DataConfig
from hpctrain.data.index import Index
from hpctrain.data.normalise import channel_statistics
from hpctrain.topology.probe import Probe

#: Batches that DALI has in work while the trainer computes.
IN_WORK = 2

_PACKAGES = {13: "nvidia-dali-cuda130", 12: "nvidia-dali-cuda120"}


def build_pipeline(
    config: DataConfig,
    device: torch.device,
    batch_size: int,
    threads: int,
    source: Callable[[], tuple[Any, ...]],
    in_work: int = IN_WORK,
) -> Any:
    """The pipeline from files and views to pictures on ``device``: [batch, channels, size, size] float32, normalised.

    ``source`` gives the next batch, or raises StopIteration: files (a list of uint8 arrays), corners (x, y) and
    sizes (w, h) of the windows [batch, 2], flips [batch], int32. DALI reads all of them in place: they have to be
    contiguous and to outlive the pipeline or the batch. ``in_work`` batches are asked for before the first is given.
    """
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"
    pipeline = _new_pipeline(device, batch_size, threads, in_work)
    with pipeline:
        files, corners, sizes, flips = fn.external_source(
            source=source,
            num_outputs=4,
            no_copy=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 0],
        )
        pictures: Any = fn.decoders.image_slice(
            files,
            corners,
            sizes,
            device="mixed" if on_gpu and config.decode != "cpu" else "cpu",
            axis_names="WH",
            normalized_anchor=False,
            normalized_shape=False,
            adjust_orientation=True,
            output_type=types.RGB if config.channels == 3 else types.GRAY,
        )
        pipeline.set_outputs(_finished(pictures, flips, config, on_gpu))
    pipeline.build()
    return pipeline


def build_bare_pipeline(config: DataConfig, index: Index, batch_size: int, threads: int) -> Any:
    """What one would write with DALI alone, for comparison: its reader, its random crop and flip, on the CPU.

    Gives pictures [batch, channels, size, size] float32, normalised, of samples and windows that DALI draws.
    """
    from nvidia.dali import fn, types

    shards = [index.shards[number] for number in np.unique(index.samples["shard"])]
    packed = bool((index.samples["offset"] > 0).any())
    pipeline = _new_pipeline(torch.device("cpu"), batch_size, threads)
    with pipeline:
        read: Any = (
            fn.readers.webdataset(
                paths=shards, ext=["jpg;png", "cls"], missing_component_behavior="error", random_shuffle=True
            )
            if packed
            else fn.readers.file(files=shards, random_shuffle=True)
        )
        pictures: Any = fn.decoders.image_random_crop(
            read[0],
            random_area=list(config.crop_area),
            random_aspect_ratio=list(config.crop_aspect),
            output_type=types.RGB if config.channels == 3 else types.GRAY,
        )
        pipeline.set_outputs(_finished(pictures, fn.random.coin_flip(), config, on_gpu=False))
    pipeline.build()
    return pipeline


def take_output(pipeline: Any, device: torch.device) -> Tensor:
    """Wait for the oldest batch in work of ``pipeline``, built for ``device``; raises RuntimeError when it failed."""
    if device.type == "cpu":
        (pictures,) = pipeline.share_outputs()
        pipeline.release_outputs()
        shared: Tensor = torch.utils.dlpack.from_dlpack(pictures.as_tensor())
        return shared
    from nvidia.dali.plugin.pytorch import feed_ndarray

    # Bound to the stream that uses it and copied there: DALI may reuse its memory in the order of that stream,
    # while kernels that read the batch are still queued.
    stream = torch.cuda.current_stream(device)
    (pictures,) = pipeline.share_outputs(stream)
    tensor = pictures.as_tensor()
    images = torch.empty(tensor.shape(), dtype=torch.float32, device=device)
    feed_ndarray(tensor, images, cuda_stream=stream)
    pipeline.release_outputs()
    return images


def _new_pipeline(device: torch.device, batch_size: int, threads: int, in_work: int = IN_WORK) -> Any:
    from nvidia.dali.pipeline import Pipeline

    return Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=in_work,
        seed=1,
    )


def _finished(pictures: Any, flips: Any, config: DataConfig, on_gpu: bool) -> Any:
    """Resize, mirror and normalise."""
    from nvidia.dali import fn, types

    side = float(config.image_size)
    pictures = fn.resize(pictures, resize_x=side, resize_y=side, interp_type=types.INTERP_LINEAR, antialias=True)
    if on_gpu:
        # What the CPU decoded crosses as bytes, a quarter of the floats; what the GPU decoded is there already.
        pictures = pictures.gpu()
    mean, std = channel_statistics(config)
    return fn.crop_mirror_normalize(
        pictures, mirror=flips, mean=list(mean), std=list(std), dtype=types.FLOAT, output_layout="CHW"
    )


def package_name() -> str:
    """The distribution to install for the CUDA at hand; "nvidia-dali" itself is a placeholder that fails."""
    major = int((torch.version.cuda or "13").split(".")[0])
    return _PACKAGES.get(major, _PACKAGES[13])


def probe() -> Probe:
    """Whether DALI imports here, and its version."""
    remedy = f"pip install {package_name()}"
    try:
        import nvidia.dali
        import nvidia.dali.fn
    except (ImportError, OSError) as error:
        return Probe("dali", False, reason=f"nvidia.dali cannot be imported ({error})", remedy=remedy)
    installed = importlib.metadata.packages_distributions().get("nvidia", [])
    names = [name for name in installed if name.startswith("nvidia-dali")]
    versions = {name: importlib.metadata.version(name) for name in names} or {"dali": str(nvidia.dali.__version__)}
    return Probe("dali", True, versions=versions)
