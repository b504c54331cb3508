"""Windows and flips: functions of (seed, epoch, id) that lie within the picture and have the stated distribution."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.config.schema import DataConfig
from hpctrain.data.augment import Views, centre_windows, flips, random_windows
from hpctrain.data.hashing import stream_key, uniforms
from hpctrain.data.index import RECORD, Index
from hpctrain.data.types import Request

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def full(count: int, value: int) -> np.ndarray:
    return np.full(count, value, dtype=np.int32)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    st.integers(0, 2**63),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(lambda pair: (min(pair), max(pair))),
)
def test_windows_lie_within_the_picture(
    samples: list[tuple[int, int, int]], key: int, area: tuple[float, float], aspect: tuple[float, float]
) -> None:
    ids, widths, heights = (np.array(column) for column in zip(*samples, strict=True))
    x, y, w, h = random_windows(key, ids, widths, heights, area, aspect).T
    assert (x >= 0).all() and (y >= 0).all() and (w >= 1).all() and (h >= 1).all()
    assert (x + w <= widths).all() and (y + h <= heights).all()


def test_a_window_does_not_depend_on_its_batch() -> None:
    ids = np.random.default_rng(1).permutation(10_000)[:257]
    widths, heights = 100 + ids % 400, 100 + ids % 300
    together = random_windows(9, ids, widths, heights, AREA, ASPECT)
    for row in (0, 3, 100, 256):
        alone = random_windows(9, ids[[row]], widths[[row]], heights[[row]], AREA, ASPECT)
        assert np.array_equal(alone[0], together[row])
        assert flips(9, ids[[row]])[0] == flips(9, ids)[row]


def test_distribution_of_windows_in_a_large_square_picture() -> None:
    count = 20_000
    x, y, w, h = random_windows(4, np.arange(count), full(count, 4000), full(count, 4000), (0.08, 0.5), ASPECT).T
    share, log_aspect = w * h / 4000**2, np.log(w / h)
    # All first tries fit: the share is uniform, and so is the logarithm of the aspect.
    assert np.allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.122, 0.29, 0.458], atol=0.01)
    assert np.allclose(np.quantile(log_aspect, [0.1, 0.5, 0.9]), np.log(4 / 3) * np.array([-0.8, 0, 0.8]), atol=0.01)
    place = np.stack([x / (4000 - w), y / (4000 - h)])
    assert np.allclose(np.quantile(place, [0.1, 0.5, 0.9], axis=1), np.array([[0.1], [0.5], [0.9]]), atol=0.015)
    assert abs(np.corrcoef(place)[0, 1]) < 0.03 and abs(np.corrcoef(share, place[0])[0, 1]) < 0.03


def test_a_picture_too_narrow_for_any_try_gets_its_centre() -> None:
    (window,) = random_windows(1, np.array([5]), full(1, 1000), full(1, 10), (0.9, 1.0), ASPECT)
    assert window.tolist() == [493, 0, 13, 10]


def test_centre_windows() -> None:
    windows = centre_windows(np.array([500, 375, 100]), np.array([375, 500, 100]), 0.875)
    assert windows.tolist() == [[86, 23, 328, 328], [23, 86, 328, 328], [6, 6, 88, 88]]
    assert centre_windows(np.array([1]), np.array([3]), 0.2).tolist() == [[0, 1, 1, 1]]


def test_flips_take_half_and_change_with_the_epoch() -> None:
    ids = np.arange(10_000)
    first, second = flips(stream_key(1, 0, 4), ids), flips(stream_key(1, 1, 4), ids)
    assert abs(first.mean() - 0.5) < 0.02
    assert abs((first == second).mean() - 0.5) < 0.02


def test_hash_of_counters_does_not_change_between_versions() -> None:
    """Crops and orders of a resumed run rely on it."""
    assert stream_key(1, 2, 3) == FIXED_KEY
    assert np.allclose(uniforms(FIXED_KEY, np.array([0, 10**12]), 2), FIXED_UNIFORMS, rtol=0, atol=1e-15)


FIXED_KEY = 2_869_315_087_210_772_132
FIXED_UNIFORMS = [[0.7373984277883664, 0.3545726466933592], [0.5692036085853746, 0.7488793986173867]]


def _request(mode: str, epoch: int = 0) -> Request:
    return Request(np.arange(4), epoch, 4, mode)  # type: ignore[arg-type]


def _views(**options: object) -> Views:
    samples = np.zeros(4, RECORD)
    samples["width"], samples["height"] = [50, 60, 70, 80], [80, 70, 60, 50]
    return Views(DataConfig(**options), 1, Index(samples, (), ()))  # type: ignore[arg-type]


def test_training_views_change_with_the_epoch_and_evaluation_views_do_not() -> None:
    views, ids = _views(), np.arange(4)
    assert not np.array_equal(views.of(_request("train", 0), ids)[0], views.of(_request("train", 1), ids)[0])
    first, second = views.of(_request("eval", 0), ids), views.of(_request("eval", 1), ids)
    assert np.array_equal(first[0], second[0])
    assert not first[1].any()


def test_training_without_crops_and_flips_shows_what_evaluation_shows() -> None:
    views, ids = _views(crop="centre", flip=False), np.arange(4)
    for train, evaluation in zip(views.of(_request("train"), ids), views.of(_request("eval"), ids), strict=True):
        assert np.array_equal(train, evaluation)
