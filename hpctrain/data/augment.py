"""What is shown of a sample: the crop window and the flip, as pure functions of (seed, epoch, sample id).

Windows are (x, y, width, height) in pixels of the upright picture, computed on the host for a whole request
at once and handed to whatever decodes, so that all loaders show the same. Nothing here sees a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hpctrain.config.schema import DataConfig
from hpctrain.data.hashing import stream_key, uniforms
from hpctrain.data.index import Index
from hpctrain.data.types import Request

_WINDOW, _FLIP = 3, 4

#: Tries at a window that lies within the picture before the centre is taken.
TRIES = 10


def random_windows(
    key: int,
    sample_ids: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> np.ndarray:
    """Windows [n, 4] int32 of random area share and aspect (Szegedy et al. 2015, section 6).

    The share of the area is uniform in ``area``, the logarithm of width / height uniform between those of
    ``aspect``; the first of ten tries that fits is placed uniformly, and where none fits the largest centred
    window with an allowed aspect is taken. Depends on the machine at most in the last bit of exp: a window that
    differs by one pixel, once in some 1e12.
    """
    draws = uniforms(key, sample_ids, 2 * TRIES + 2)
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    areas = (area[0] + (area[1] - area[0]) * draws[:, :TRIES]) * (widths * heights)[:, None]
    low, high = math.log(aspect[0]), math.log(aspect[1])
    aspects = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    tried_w = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    tried_h = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    fits = (tried_w >= 1) & (tried_w <= widths[:, None]) & (tried_h >= 1) & (tried_h <= heights[:, None])
    rows, first = np.arange(len(sample_ids)), fits.argmax(axis=1)
    found = fits[rows, first]
    fallback_w, fallback_h = _fitting_sizes(widths, heights, aspect)
    w = np.where(found, tried_w[rows, first], fallback_w)
    h = np.where(found, tried_h[rows, first], fallback_h)
    x = np.where(found, draws[:, -2] * (widths - w + 1), (widths - w) // 2)
    y = np.where(found, draws[:, -1] * (heights - h + 1), (heights - h) // 2)
    return np.stack([x.astype(np.int32), y.astype(np.int32), w.astype(np.int32), h.astype(np.int32)], axis=1)


def _fitting_sizes(
    widths: np.ndarray, heights: np.ndarray, aspect: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the largest windows with an aspect between the two limits."""
    w = np.minimum(widths, np.rint(heights * aspect[1])).astype(np.int64)
    h = np.minimum(heights, np.rint(widths / aspect[0])).astype(np.int64)
    return np.maximum(w, 1), np.maximum(h, 1)


def centre_windows(widths: np.ndarray, heights: np.ndarray, share: float) -> np.ndarray:
    """Centred square windows [n, 4] int32 whose side is ``share`` of the shorter side of the picture."""
    sides = np.maximum(np.rint(np.minimum(widths, heights) * share).astype(np.int32), 1)
    return np.stack([(widths - sides) // 2, (heights - sides) // 2, sides, sides], axis=1).astype(np.int32)


def flips(key: int, sample_ids: np.ndarray) -> np.ndarray:
    """Which of the samples are mirrored: bool [n], true for half of them."""
    return uniforms(key, sample_ids, 1)[:, 0] < 0.5


@dataclass(frozen=True, slots=True)
class Views:
    """The windows and flips a configuration asks for, for samples of one index."""

    config: DataConfig
    seed: int
    index: Index

    def of(self, request: Request, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows [n, 4] int32 and flips [n] bool of ``sample_ids``, in the mode and epoch of ``request``."""
        records = self.index.samples[sample_ids]
        widths, heights = records["width"].astype(np.int32), records["height"].astype(np.int32)
        config, training = self.config, request.mode == "train"
        if training and config.crop == "random":
            key = stream_key(self.seed, request.epoch, _WINDOW)
            windows = random_windows(key, sample_ids, widths, heights, config.crop_area, config.crop_aspect)
        else:
            windows = centre_windows(widths, heights, config.eval_crop)
        if training and config.flip:
            return windows, flips(stream_key(self.seed, request.epoch, _FLIP), sample_ids)
        return windows, np.zeros(len(sample_ids), dtype=bool)
