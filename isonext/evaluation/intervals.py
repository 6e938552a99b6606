"""A figure and how sure it is: 95 % intervals over pictures. Tensors in, numbers out."""

import math
from dataclasses import dataclass

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; its ends are NaN where there are too few pictures for one."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        ends = "no interval" if math.isnan(self.low) else f"{self.low:.3f}, {self.high:.3f}"
        return f"{self.mean:.3f} [{ends}]"


FEWEST = 5  # values of an interval: of fewer, not even the smallest and the largest hold the mean 9 times in 10


def percentiles(count: int) -> tuple[float, float]:
    """Which percentiles of resampled means make the 95 % interval of `count` values, as shares from 0 to 1.

    Those of 2.5 and 97.5 % hold the mean of five values 4 times in 5. Expanded ones make up for the resampled means'
    spread, which lacks sqrt(1 - 1 / n), and for what Student's t has in its tails (Hesterberg, Am. Stat. 69(4), 2015).
    """
    tail = float(ndtr((count / (count - 1)) ** 0.5 * stdtrit(count - 1, 0.025)))
    return tail, 1 - tail


def bootstrap(values: Tensor, seed: int = 0, resamples: int = 2000) -> Estimate:
    """The mean of (N,) values and the interval between expanded percentiles of its resampled means (Efron, Ann.
    Statist. 7(1), 1979); below five values there is none, and its ends are NaN."""
    values = values.double().flatten().cpu()
    if len(values) < FEWEST:
        return Estimate(values.mean().item(), math.nan, math.nan)
    index = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(percentiles(len(values)), dtype=torch.float64)
    low, high = torch.quantile(values[index].mean(1), ends).tolist()
    return Estimate(values.mean().item(), low, high)


def share(hits: Tensor) -> Estimate:
    """The mean of (N,) values from 0 to 1, most of them one or the other, and Wilson's interval of it (J. Am. Stat.
    Assoc. 22, 1927): resampling knows no doubt where all values are 1, and too little near there."""
    hits = hits.double().flatten().cpu()
    n, p, z = len(hits), hits.mean().item(), 1.96
    centre, reach = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return Estimate(p, max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale))


def share_difference(differences: Tensor) -> Estimate:
    """The mean of (N,) differences of shares, picture by picture, from -1 to 1, with the interval of Agresti & Min
    (Stat. Med. 24, 2005): two more pairs, one of them half won and half lost. Resampling equal values has no doubt."""
    d = differences.double().flatten().cpu()
    n = len(d) + 2
    centre = d.sum().item() / n
    reach = 1.96 * (((d.square().sum().item() + 1) / n - centre**2) / n) ** 0.5
    return Estimate(d.mean().item(), max(-1.0, centre - reach), min(1.0, centre + reach))


def estimate(values: Tensor, groups: Tensor | None = None) -> Estimate:
    """A mean with its interval: `share` of yes and no, `bootstrap` of measures.

    `groups` (N,) int64 say which values belong together (are of one picture, of one recording): the mean of each group
    comes first, and the interval is over groups.
    """
    own = (
        values if groups is None else torch.stack([values[groups == each].double().mean() for each in groups.unique()])
    )
    return share(own) if values.dtype == torch.bool else bootstrap(own)
