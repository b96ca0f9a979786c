"""Distances between feature sets against slow obvious versions, closed forms and torchmetrics on the same arrays."""

from __future__ import annotations

import math
import warnings

import numpy as np
import oracles
import pytest
import torch

from ddpm_ext.evaluation.features import metrics

AGREE = {"rel": 1e-6, "abs": 1e-6}


def two_sets(n: int = 40, m: int = 30, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mix, rng.normal(size=(m, d)) @ mix * 0.8 + 0.5


def lattice(n: int, seed: int) -> np.ndarray:
    """Integer rows with many equal distances and some equal rows."""
    return np.random.default_rng(seed).integers(0, 3, size=(n, 4)).astype(float)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    return metrics.frechet_distance(metrics.feature_statistics(x), metrics.feature_statistics(y))


def frechet_of(mean: torch.Tensor, covariance: torch.Tensor) -> float:
    """From these statistics to a standard normal of two dimensions."""
    real, fake = ((m.double(), c.double()) for m, c in ((mean, covariance), (torch.zeros(2), torch.eye(2))))
    return metrics.frechet_distance(metrics.FeatureStatistics(*real, 4), metrics.FeatureStatistics(*fake, 4))


@pytest.fixture
def torchmetrics_fid():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 6), (5, 30, 6), (4, 3, 6)])
def test_frechet_distance_is_the_slow_one_also_with_fewer_images_than_dimensions(n: int, m: int, d: int) -> None:
    x, y = two_sets(n, m, d)
    assert frechet(x, y) == pytest.approx(oracles.frechet_distance(x, y), **AGREE)


def test_frechet_distance_of_many_dimensions_and_few_images_has_the_closed_form_of_a_scaled_set() -> None:
    x = np.random.default_rng(0).normal(size=(20, 300))
    # y = s x + shift has C_y = s² C_x, so FD = ‖(s - 1) mean + shift‖² + (1 - s)² tr C_x, at any rank.
    expected = np.sum((x.mean(0) * -0.5 + 0.1) ** 2) + 0.25 * np.var(x, axis=0, ddof=1).sum()
    assert frechet(x, 0.5 * x + 0.1) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_constant_sets_their_distance() -> None:
    x, _ = two_sets()
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet(np.zeros((3, 2)), np.ones((4, 2))) == 2


def test_frechet_distance_agrees_with_torchmetrics(torchmetrics_fid) -> None:
    x, y = two_sets(60, 50, 8)
    stats = [metrics.feature_statistics(z) for z in (x, y)]
    theirs = torchmetrics_fid._compute_fid(stats[0].mean, stats[0].covariance, stats[1].mean, stats[1].covariance)
    assert metrics.frechet_distance(*stats) == pytest.approx(theirs.item(), **AGREE)


def test_polynomial_mmd_is_the_slow_one_and_torchmetrics() -> None:
    x, y = two_sets()
    ours = metrics.polynomial_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(oracles.polynomial_mmd(x, y), **AGREE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    x, y = two_sets(30, 30)  # theirs takes equal sizes
    ours = metrics.polynomial_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(kid.poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item(), **AGREE)


def test_kernel_distance_of_whole_sets_has_no_spread_and_of_subsets_is_unbiased() -> None:
    x, y = two_sets(30, 30)
    whole = oracles.polynomial_mmd(x, y)
    all_of_it = metrics.kernel_distance(x, y, num_subsets=3, subset_size=30)
    assert all_of_it.mean == pytest.approx(whole, **AGREE)
    assert all_of_it.std == pytest.approx(0, abs=1e-9 * whole)
    assert metrics.kernel_distance(x, y, num_subsets=1, subset_size=10).std == 0
    some = metrics.kernel_distance(x, y, num_subsets=400, subset_size=10, seed=1)
    assert some.standard_error == pytest.approx(some.std / 20)
    assert abs(some.mean - whole) < 4 * some.standard_error
    assert some == metrics.kernel_distance(x, y, num_subsets=400, subset_size=10, seed=1)
    assert some.mean != metrics.kernel_distance(x, y, num_subsets=400, subset_size=10, seed=2).mean


@pytest.mark.parametrize("unbiased", [False, True])
def test_rbf_mmd_is_the_slow_one(unbiased: bool) -> None:
    x, y = two_sets()
    expected = 1000 * oracles.rbf_mmd(x, y, 2.5, unbiased)
    assert metrics.rbf_mmd(x, y, sigma=2.5, unbiased=unbiased) == pytest.approx(expected, **AGREE)


def test_rbf_mmd_of_two_points_by_hand() -> None:
    x, y = np.zeros((2, 3)), np.full((2, 3), 10.0)  # ‖x - y‖² = 300, σ = 10: 2 - 2 exp(-1.5), times 1000
    assert metrics.rbf_mmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-1.5)), rel=1e-12)


def test_inception_score_is_the_slow_one_over_splits() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 7)) * 3
    assert metrics.inception_score(logits, splits=1).mean == pytest.approx(oracles.inception_score(logits), **AGREE)
    parts = [oracles.inception_score(part) for part in np.split(logits, 4)]
    ours = metrics.inception_score(logits, splits=4)
    assert ours.mean == pytest.approx(np.mean(parts), **AGREE)
    assert ours.std == pytest.approx(np.std(parts, ddof=1), **AGREE)


@pytest.mark.parametrize(("n", "splits"), [(12, 5), (25, 10), (23, 10), (99, 10), (20, 10), (2, 1)])
def test_inception_score_has_as_many_splits_as_asked(n: int, splits: int) -> None:
    """Sizes that differ by one at most, whatever the number of images."""
    logits = np.random.default_rng(n).normal(size=(n, 7)) * 3
    parts = np.array_split(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), splits)
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    ours = metrics.inception_score(logits, splits=splits)
    assert ours.mean == pytest.approx(np.mean(scores), **AGREE)
    assert ours.std == pytest.approx(np.std(scores, ddof=1) if splits > 1 else 0, **AGREE)


def test_inception_score_has_its_extremes() -> None:
    sure = np.kron(np.eye(5), np.ones((4, 1))) * 1000.0
    assert metrics.inception_score(sure, splits=1).mean == pytest.approx(5)  # every class, each with certainty
    assert metrics.inception_score(np.zeros((20, 5)), splits=2).mean == pytest.approx(1)  # knows nothing


def test_inception_score_agrees_with_torchmetrics() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = pytest.importorskip("torchmetrics.image.inception", reason="torchmetrics is not installed")
        score = image.InceptionScore(feature=torch.nn.Identity(), splits=4)
    logits = torch.randn(40, 7, dtype=torch.float64) * 3
    score.update(logits)
    torch.manual_seed(3)
    theirs = score.compute()  # it shuffles first
    torch.manual_seed(3)
    ours = metrics.inception_score(logits[torch.randperm(40)], splits=4)
    assert ours.mean == pytest.approx(theirs[0].item(), **AGREE)
    assert ours.std == pytest.approx(theirs[1].item(), **AGREE)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("elements", [64, 2**24])
@pytest.mark.parametrize("seed", [0, 1])
def test_precision_recall_density_coverage_are_the_slow_ones(
    k: int, elements: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", elements)  # 64: one or two rows at a time
    x, y = two_sets(40, 30, 3, seed)
    for real, fake in (
        (x, y),
        (lattice(50, seed), lattice(40, seed + 10) + 1),
        (lattice(30, seed) + 1e3, lattice(30, 5) + 1e3),
    ):
        expected = oracles.precision_recall(real, fake, k)[:2] + oracles.precision_recall(real, fake, k + 2)[2:]
        assert metrics.precision_recall(real, fake, k=k, density_k=k + 2) == pytest.approx(expected, **AGREE)


@pytest.mark.parametrize("far", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("where", ["real", "fake", "both"])
def test_one_image_far_away_changes_no_other_ball(far: float, where: str) -> None:
    """Rounding at the outlier's size must not blow up the balls of all others, nor tear those of a lattice."""
    for real, fake in (two_sets(40, 30, 3), (lattice(50, 0), lattice(40, 10) + 1)):
        if where != "fake":
            real[3] = far
        if where != "real":
            fake[7] = -2 * far
        expected = oracles.precision_recall(real, fake, 3)[:2] + oracles.precision_recall(real, fake, 5)[2:]
        assert metrics.precision_recall(real, fake) == pytest.approx(expected, **AGREE)


def test_nearest_keeps_its_digits_beside_an_image_far_away() -> None:
    x, y = two_sets()
    y[0] = 1e8
    expected = np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))
    distance, index = metrics.nearest(x, y, k=2)
    np.testing.assert_allclose(distance, np.sort(expected, axis=1)[:, :2], rtol=1e-9)
    np.testing.assert_array_equal(index, np.argsort(expected, axis=1)[:, :2])


def test_precision_recall_of_equal_and_of_distant_sets() -> None:
    x, _ = two_sets()
    same, apart = metrics.precision_recall(x, x), metrics.precision_recall(x, x + 1e4)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density > 1
    assert apart == (0, 0, 0, 0)


def test_nearest_finds_the_copies() -> None:
    x, _ = two_sets()
    distance, index = metrics.nearest(x[[7, 3]], x, k=2)
    assert index[:, 0].tolist() == [7, 3]
    assert distance[:, 0].tolist() == pytest.approx([0, 0], abs=1e-6)  # √ of a rounding error
    others = sorted(np.linalg.norm(x - x[7], axis=1))
    assert distance[0, 1].item() == pytest.approx(others[1], rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: metrics.feature_statistics(x[:1]), "has 1 images, but this metric needs at least 2"),
        (lambda x, y: metrics.feature_statistics(x[:, 0]), r"shape \(N, d\), got shape \(40,\)"),
        (lambda x, y: metrics.feature_statistics(x * np.nan), "NaN or infinity"),
        (lambda x, y: frechet(x, y[:, :3]), "same extractor: their features have 6 and 3"),
        (lambda x, y: metrics.kernel_distance(x, y), "got 1000 with 40 real and 30 fake"),
        (
            lambda x, y: metrics.kernel_distance(x, y, subset_size=5, num_subsets=0),
            "num_subsets must be an int of at least 1",
        ),
        (lambda x, y: metrics.rbf_mmd(x, y, sigma=0), "sigma must be positive"),
        (
            lambda x, y: metrics.inception_score(x[:10], splits=10),
            "logits has 10 images, but 10 splits of at least 2 need 20",
        ),
        (lambda x, y: metrics.inception_score(x, splits=0), "splits must be an int of at least 1, got 0"),
        (lambda x, y: metrics.inception_score(x, splits=2.5), "splits must be an int of at least 1, got 2.5"),
        (lambda x, y: metrics.inception_score(x[:, :1]), "at least 2 classes, got 1"),
        (lambda x, y: metrics.precision_recall(x[:3], y), "real has 3 images, but this metric needs at least 6"),
        (lambda x, y: metrics.precision_recall(x, y, k=0), "k must be an int of at least 1, got 0"),
        (lambda x, y: metrics.precision_recall(x, y, density_k=2.5), "density_k must be an int of at least 1, got 2.5"),
        (lambda x, y: metrics.nearest(x, y, k=0), "k must be an int of at least 1, got 0"),
        (lambda x, y: frechet_of(torch.full((2,), math.nan), torch.eye(2)), "real has NaN or infinity"),
        (lambda x, y: frechet_of(torch.zeros(2), torch.eye(2) * math.inf), "real has NaN or infinity"),
        (
            lambda x, y: frechet_of(torch.zeros(3), torch.eye(2)),
            r"real must have a mean of shape .* got \(3,\) and \(2, 2",
        ),
        (lambda x, y: frechet_of(torch.zeros(1, 2), torch.eye(2)), r"real must have a mean of shape .* got \(1, 2\)"),
        (
            lambda x, y: metrics.kernel_distance(x, y, subset_size=2.5),
            "subset_size must be an int of at least 2, got 2.5",
        ),
        (lambda x, y: metrics.nearest(x, y[:2], k=3), "reference has 2 images, but this metric needs at least 3"),
    ],
)
def test_bad_input_is_a_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*two_sets())
