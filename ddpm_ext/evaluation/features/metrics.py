r"""Distances and scores of two sets of images, from feature arrays alone: pure functions in float64.

Features have shape (N, d), one row per image, as a tensor or a numpy array on any device; everything is computed there
in float64. `real` is the reference, `fake` the generated set. What grows with N² is computed in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError, is_whole

__all__ = [
    "FeatureStatistics",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_per_class",
    "inception_score",
    "kernel_distance",
    "nearest",
    "polynomial_mmd",
    "precision_recall",
    "rbf_mmd",
]

Array = Tensor | np.ndarray
BLOCK_ELEMENTS = 2**24  # of an N x N matrix this many numbers are in memory at once


class FeatureStatistics(NamedTuple):
    """First two moments of a feature set: all that the Fréchet distance needs."""

    mean: Tensor  # (d,), float64
    covariance: Tensor  # (d, d), float64, divided by N - 1
    num_images: int  # N


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy, averaged over subsets."""

    mean: float
    std: float  # over the subsets, as KID is reported
    standard_error: float  # std / √subsets: what another draw of subsets would change


class InceptionScore(NamedTuple):
    """exp of the mutual information of image and predicted class, averaged over splits."""

    mean: float
    std: float  # over the splits, N - 1 in the denominator


class PrecisionRecall(NamedTuple):
    """How much of the fake set looks real, and how much of the real set is covered; each in [0, 1] but density."""

    precision: float
    recall: float
    density: float
    coverage: float


def check_count(name: str, value: int, at_least: int = 1) -> None:
    """Raise a ValueError unless a number is an int of at least so much."""
    if not is_whole(value) or value < at_least:
        raise UserError(f"{name} must be an int of at least {at_least}, got {value!r}.")


def as_features(features: Array, name: str = "features", at_least: int = 2) -> Tensor:
    """A float64 matrix (N, d) of finite numbers, or a ValueError that says what came instead."""
    x = features if isinstance(features, Tensor) else torch.from_numpy(np.asarray(features))
    if x.ndim != 2 or x.shape[1] == 0 or x.is_complex():
        raise UserError(f"{name} must be one row of numbers per image, shape (N, d), got shape {tuple(x.shape)}.")
    if x.shape[0] < at_least:
        raise UserError(f"{name} has {x.shape[0]} images, but this metric needs at least {at_least}.")
    x = x.detach().to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"{name} contains NaN or infinity: the extractor or the generator diverged.")
    return x


def feature_statistics(features: Array) -> FeatureStatistics:
    """Mean and covariance (divided by N - 1) of a feature set of at least 2 images."""
    x = as_features(features)
    mean = x.mean(0)
    centred = x - mean
    return FeatureStatistics(mean, centred.T @ centred / (len(x) - 1), len(x))


def check_statistics(name: str, statistics: FeatureStatistics) -> None:
    """Raise a ValueError unless mean and covariance fit each other and are finite."""
    mean, covariance = statistics.mean, statistics.covariance
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{name} must have a mean of shape (d,) and a covariance of shape (d, d), got {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}. Compute both from the same features."
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{name} has NaN or infinity in its statistics. Compute them again.")


def frechet_distance(real: FeatureStatistics, fake: FeatureStatistics) -> float:
    r"""Squared Fréchet (2-Wasserstein) distance of two Gaussians; FID when the features are Inception's.

        FD = ‖μ_1 - μ_2‖² + tr C_1 + tr C_2 - 2 Σ √λ_i(C_1 C_2)

    With C = A Aᵀ from the eigenvalues of C, the √λ_i(C_1 C_2) are the singular values of A_1ᵀ A_2. No square root is
    taken of a rounding error there, so the result also holds for singular covariances (N < d), where the matrix square
    root of the product fails. Source: Heusel et al. 2017, arXiv:1706.08500, Eq. (6).
    """
    check_statistics("real", real)
    check_statistics("fake", fake)
    _check_sizes(real.mean[None], fake.mean[None])
    overlap = torch.linalg.svdvals(_square_root(real.covariance).T @ _square_root(fake.covariance)).sum()
    distance = (real.mean - fake.mean).square().sum() + real.covariance.trace() + fake.covariance.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # a distance below 0 is rounding


def frechet_distance_per_class(
    real: Array, real_labels: Sequence[int], fake: Array, fake_labels: Sequence[int] | None
) -> dict[int, float]:
    """Return the Fréchet distance of the images of each class that both sets have.

    Args:
        real: Features of the reference, shape (N, d).
        real_labels: Their N classes.
        fake: Features of the generated images, shape (M, d).
        fake_labels: Their M classes.

    Raises:
        UserError: a class of the generated images has fewer than 2 images on either side.
    """
    x, y = as_features(real, "real"), as_features(fake, "fake")
    of_real, of_fake = torch.as_tensor(real_labels), torch.as_tensor(fake_labels)
    found = {}
    for c in sorted(set(of_fake.tolist())):
        parts = x[of_real == c], y[of_fake == c]
        found[c] = frechet_distance(*map(feature_statistics, parts))
    return found


def kernel_distance(
    real: Array, fake: Array, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    r"""Kernel distance with the polynomial kernel, unbiased; KID when the features are Inception's.

        k(x, y) = (x·y/d + 1)³        MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean k(x_i, y_j)

    averaged over random subsets of both sets. Source: Bińkowski et al. 2018, arXiv:1801.01401, §4.

    Args:
        real: Features of real images, shape (N, d).
        fake: Of generated ones, shape (M, d).
        num_subsets: How many pairs of subsets.
        subset_size: Images of each.
        seed: Of the choice of subsets.
    """
    x, y = as_features(real, "real"), as_features(fake, "fake")
    _check_sizes(x, y)
    check_count("subset_size", subset_size, at_least=2)
    check_count("num_subsets", num_subsets)
    if subset_size > min(len(x), len(y)):
        raise UserError(
            f"subset_size must be between 2 and the smaller set, got {subset_size} with {len(x)} real and {len(y)} "
            "fake images. Generate more images or make the subsets smaller."
        )
    rng = np.random.default_rng(seed)

    def subset(z: Tensor) -> Tensor:
        return z[torch.from_numpy(rng.choice(len(z), subset_size, replace=False)).to(z.device)]

    values = torch.tensor([polynomial_mmd(subset(x), subset(y)) for _ in range(num_subsets)], dtype=torch.float64)
    std = values.std(correction=0).item()
    return KernelDistance(values.mean().item(), std, std / num_subsets**0.5)


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of two sets with the kernel (x·y/d + 1)³; see `kernel_distance`."""
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / d + 1).pow(3) for a, b in ((x, x), (y, y), (x, y)))
    within_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    within_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within_x + within_y - 2 * xy.mean()).item()


def rbf_mmd(real: Array, fake: Array, *, sigma: float = 10.0, scale: float = 1000.0, unbiased: bool = False) -> float:
    r"""Squared MMD with the Gaussian kernel; CMMD when the features are CLIP's embeddings of unit length.

        k(x, y) = exp(-‖x - y‖² / (2σ²))      scale · [mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)]

    The published code takes the means over all pairs, i = j too; `unbiased` leaves those out.
    Source: Jayasumana et al. 2024, arXiv:2401.09603, §4 (σ = 10, times 1000).

    Args:
        real: Features of real images, shape (N, d).
        fake: Of generated ones, shape (M, d).
        sigma: Width of the kernel, in units of the features.
        scale: Factor of the result.
        unbiased: Leave pairs i = j out.
    """
    x, y = as_features(real, "real"), as_features(fake, "fake")
    _check_sizes(x, y)
    if not sigma > 0:
        raise UserError(f"sigma must be positive, got {sigma}.")

    def mean_kernel(a: Tensor, b: Tensor, leave_out_diagonal: bool) -> float:
        total = sum(torch.exp(-block / (2 * sigma**2)).sum().item() for _, block in _squared_distances(a, b))
        if leave_out_diagonal:  # k(x, x) = 1
            return (total - len(a)) / (len(a) * (len(a) - 1))
        return total / (len(a) * len(b))

    within = mean_kernel(x, x, unbiased) + mean_kernel(y, y, unbiased)
    return scale * (within - 2 * mean_kernel(x, y, False))


def inception_score(logits: Array, *, splits: int = 10) -> InceptionScore:
    r"""Inception score of a classifier's logits, shape (N, classes).

        IS = exp( mean_i KL(p(y | x_i) ‖ p(y)) ),  p(y) = mean_i p(y | x_i), over consecutive splits

    The splits are equal but for one image. One image alone would be its own p(y) and score 1 whatever it shows, so
    that a split has at least 2. Source: Salimans et al. 2016, arXiv:1606.03498, §4 (10 splits).
    """
    check_count("splits", splits)
    x = as_features(logits, "logits", at_least=1)
    if x.shape[1] < 2:
        raise UserError(f"logits must have at least 2 classes, got {x.shape[1]}.")
    if len(x) < 2 * splits:
        raise UserError(
            f"logits has {len(x)} images, but {splits} splits of at least 2 need {2 * splits}. Generate more images or "
            "ask for fewer splits."
        )
    scores = []
    for part in x.log_softmax(1).tensor_split(splits):
        log_marginal = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp().item())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0)


def precision_recall(real: Array, fake: Array, *, k: int = 3, density_k: int = 5) -> PrecisionRecall:
    r"""Improved precision and recall, density and coverage from balls around every image.

    The ball of an image reaches to its k-th nearest neighbour in its own set (itself left out), border included.

        precision  share of fake inside any real ball           recall    share of real inside any fake ball
        density    mean number of real balls around a fake / k  coverage  share of real balls with a fake inside

    Memory beside the features is bounded whatever N is. Distances that differ by rounding count as equal, which matters
    for pixel features: they lie on a lattice. Sources: Kynkäänniemi et al. 2019, arXiv:1904.06991, Eqs. (1)-(2), for
    precision and recall (k = 3); Naeem et al. 2020, arXiv:2002.09797, Eqs. (3)-(4), for the others (k = 5).

    Args:
        real: Features of real images, shape (N, d).
        fake: Of generated ones, shape (M, d).
        k: Neighbours of precision and recall.
        density_k: Neighbours of density and coverage.
    """
    check_count("k", k)
    check_count("density_k", density_k)
    x = as_features(real, "real", at_least=max(k, density_k) + 1)
    y = as_features(fake, "fake", at_least=k + 1)
    _check_sizes(x, y)
    centre = _centre(x)
    x, y = x - centre, y - centre
    x_radius, x_density_radius = _squared_radii(x, (k, density_k))
    (y_radius,) = _squared_radii(y, (k,))

    real_balls_around = torch.zeros(len(y), dtype=torch.int64, device=x.device)
    precise = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    recalled, covered = [], []
    for rows, block in _squared_distances(x, y):
        inside = block <= x_density_radius[rows, None]
        real_balls_around += inside.sum(0)
        covered.append(inside.any(1))
        precise |= (block <= x_radius[rows, None]).any(0)
        recalled.append((block <= y_radius).any(1))
    return PrecisionRecall(
        precision=precise.double().mean().item(),
        recall=torch.cat(recalled).double().mean().item(),
        density=real_balls_around.double().mean().item() / density_k,
        coverage=torch.cat(covered).double().mean().item(),
    )


def nearest(query: Array, reference: Array, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices, each (N, k), of the k nearest reference rows of every query row, nearest first.

    Args:
        query: Shape (N, d).
        reference: Shape (M, d).
        k: How many, at most M.
    """
    check_count("k", k)
    x, y = as_features(query, "query", at_least=1), as_features(reference, "reference", at_least=k)
    _check_sizes(x, y)
    centre = _centre(y)
    parts = [block.topk(k, dim=1, largest=False) for _, block in _squared_distances(x - centre, y - centre)]
    return torch.cat([part.values for part in parts]).sqrt(), torch.cat([part.indices for part in parts])


def _check_sizes(x: Tensor, y: Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"Both sets must come from the same extractor: their features have {x.shape[1]} and {y.shape[1]} numbers."
        )


def _square_root(covariance: Tensor) -> Tensor:
    """A with A Aᵀ = C, one column per eigenvalue that is not rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    kept = values > rounding
    return vectors[:, kept] * values[kept].sqrt()


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of ‖x_i - y_j‖² with the rows i that each holds."""
    y_square = y.square().sum(1)
    size = max(1, BLOCK_ELEMENTS // len(y))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        part = x[rows]
        yield rows, torch.addmm(y_square + part.square().sum(1)[:, None], part, y.T, alpha=-2).clamp_(min=0)


def _centre(x: Tensor) -> Tensor:
    """The median of every feature. Around it distances lose few digits, however far away single rows lie."""
    return x.median(0).values


def _squared_radii(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Squared distance of every row to its k-th nearest other row and what rounding may add, shape (N,), for each k."""
    parts: list[list[Tensor]] = [[] for _ in ks]
    for rows, block in _squared_distances(x, x):
        block[torch.arange(len(block)), torch.arange(rows.start, rows.stop)] = torch.inf
        nearest_first = block.topk(max(ks), dim=1, largest=False).values
        for part, k in zip(parts, ks, strict=True):
            part.append(nearest_first[:, k - 1])
    radii, square = [torch.cat(part) for part in parts], x.square().sum(1)
    # A distance made of ‖x‖², ‖y‖² and d products is off by (d + 3) ε (‖x‖² + ‖y‖²) at most; on the border of a ball of
    # radius r around x, ‖y‖² <= 2 ‖x‖² + 2 r², and two distances are compared there.
    rounding = 6 * (x.shape[1] + 4) * torch.finfo(x.dtype).eps
    return [radius + rounding * (square + radius) for radius in radii]
