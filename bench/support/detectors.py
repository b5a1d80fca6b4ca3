"""Other people's checks of a claimed result, with the thresholds that they publish, on the same recordings.

Each takes what was claimed and what an honest re-execution gives, and says whether it would notice.
"""

from collections.abc import Sequence
from statistics import mean, median

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.stage import CellResult

TOPLOC_TOP = 128
TOPLOC_TOKENS = 32
TOPLOC_EXPONENTS, TOPLOC_MEAN, TOPLOC_MEDIAN = 90, 10.0, 8.0
"""Ong et al. 2025, "TOPLOC" (arXiv 2501.16007): of the 128 largest of 32 tokens' last hidden states in bf16, at
least 90 exponents agree, and the mantissas of those differ by at most 10 on average and 8 in the median. The values
are those of the authors' `vllm_validate_poly.py`."""
IOTA_COSINE, IOTA_MAGNITUDE = 0.9, 0.8
"""Macrocosmos 2025, "IOTA": the validator's `COSINE_SIMILARITY_THRESHOLD` and `ACTIVATION_MAGNITUDE_THRESHOLD`, on
activations and their gradients."""

EXTRA_COMPUTE = {"toploc": 1 / 3, "iota": 1.0, "kmeans": 0.0, "majority_of_3": 2.0}
"""What each of these checks costs where it looks at every cell, as a share of the training's own compute: a forward
pass, a third of a cell; a whole cell again; hardly anything; two more replicas."""


def toploc_notices(claimed: CellResult, honest: CellResult) -> bool:
    """Whether TOPLOC's check of the activations y fails; it looks at nothing else, nor at losses."""
    if honest.y.dim() < 3:
        return False
    theirs, own = (y.flatten(0, 1).to(torch.bfloat16).split(TOPLOC_TOKENS) for y in (claimed.y, honest.y))
    return any(_toploc_fails(one, other) for one, other in zip(theirs, own, strict=True))


def _toploc_fails(claimed: Tensor, own: Tensor) -> bool:
    flat, other = own.flatten(), claimed.flatten()
    places = flat.float().abs().topk(min(TOPLOC_TOP, flat.numel())).indices
    (own_exponents, own_mantissas), (exponents, mantissas) = _parts(flat[places]), _parts(other[places])
    same = own_exponents == exponents
    gaps = (own_mantissas - mantissas).abs()[same].tolist() or [128.0]
    return int(same.sum()) < TOPLOC_EXPONENTS or mean(gaps) > TOPLOC_MEAN or median(gaps) > TOPLOC_MEDIAN


def _parts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return exponents and mantissas of bf16 values, without their signs, as the scheme encodes them."""
    bits = values.contiguous().view(torch.int16).to(torch.int32)
    return bits >> 7 & 0xFF, bits & 0x7F


def iota_notices(claimed: CellResult, honest: CellResult) -> bool:
    """Whether the activations or their gradients fail the test of size or of direction."""
    pairs = ((claimed.y, honest.y), (claimed.gx, honest.gx))
    return any(_iota_fails(one.flatten(), other.flatten()) for one, other in pairs if other.numel())


def _iota_fails(claimed: Tensor, own: Tensor) -> bool:
    sizes = sorted((float(claimed.norm()), float(own.norm())))
    if sizes[0] / max(sizes[1], 1e-8) < IOTA_MAGNITUDE:
        return True
    return not float(torch.nn.functional.cosine_similarity(claimed, own, dim=0)) > IOTA_COSINE


def clusters_notice(honest: Sequence[CellResult], claimed: Sequence[CellResult], seed: int = 0) -> list[bool]:
    """Return whom K-means takes for a cheat: gradients of one stage, projected to two dimensions and scaled.

    As the statistical detector of the TDML paper does: two clusters, of which the smaller is under suspicion. It
    sees the gradients that were sent only, honest ones first; nobody computes anything again.
    """
    rows = torch.stack([result.gw.double() for result in (*honest, *claimed)]).numpy()
    dice = np.random.default_rng(seed)
    points = rows @ dice.standard_normal((rows.shape[1], 2)) / rows.shape[1] ** 0.5
    points = (points - points.mean(0)) / np.maximum(points.std(0), 1e-12)
    member = _two_means(points, dice)
    suspect = int(member.sum() * 2 < len(member))
    return [bool(one == suspect) for one in member]


def _two_means(points: npt.NDArray[np.float64], dice: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the cluster, 0 or 1, of each point: the best of ten starts of Lloyd's algorithm."""
    best, least = np.zeros(len(points), np.int64), np.inf
    for _ in range(10):
        centres = points[dice.choice(len(points), 2, replace=False)]
        for _ in range(50):
            gaps = ((points[:, None] - centres) ** 2).sum(2)
            member = gaps.argmin(1)
            centres = np.stack([points[member == k].mean(0) if (member == k).any() else centres[k] for k in (0, 1)])
        if (spread := float(gaps.min(1).sum())) < least:
            best, least = member, spread
    return best


def majority_notices(claimed: Sequence[bytes]) -> list[bool]:
    """Return which of three replicas differ from the bytes that most of them sent."""
    usual = max(set(claimed), key=lambda one: (claimed.count(one), one))
    return [one != usual for one in claimed]
