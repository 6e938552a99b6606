"""FID, KID and LPIPS by torchmetrics, where it and the weights of its networks are at hand.

Nothing is downloaded here. What is missing is said in one line of the report; USAGE_GUIDE.md says how to get it.
"""

import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isonext.evaluation.intervals import Estimate
from isonext.evaluation.metrics import kernel_estimate

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's conversion of the network of the FID paper
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's; LPIPS' own weights come with torchmetrics
BATCH = 32


class Perceptual:
    """The networks that could be loaded, and in `missing` a line for each that could not."""

    def __init__(self, size: int) -> None:
        """`size` is the side of the pictures in pixels."""
        self.fid: Any = None  # torchmetrics', which is imported where it is there
        self.lpips: Any = None
        self.missing: list[str] = []
        why = _missing(("torchmetrics", "torch_fidelity"), INCEPTION)
        if why:
            self.missing.append(f"FID and KID were not measured: {why}")
        else:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self.fid = FrechetInceptionDistance(feature_extractor_weights_path=str(_weights(INCEPTION)))
        too_small = "it needs pictures of 64 px" if size < 64 else None
        why = too_small or _missing(("torchmetrics", "torchvision"), ALEXNET)
        if why:
            self.missing.append(f"LPIPS was not measured: {why}")
        else:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.lpips = LearnedPerceptualImagePatchSimilarity("alex", reduction="none")

    @torch.inference_mode()
    def figures(self, results: Tensor, before: Tensor, real: Tensor) -> dict[str, Tensor | Estimate | float]:
        """Transfers against their sources and against real pictures of the target, all (N, 3, S, S) in [-1, 1]."""
        values: dict[str, Tensor | Estimate | float] = {}
        if self.fid and min(len(results), len(real)) > 1:
            values |= self._inception_distances(results, real)
        if self.lpips:
            pairs = zip(results.split(BATCH), before.split(BATCH), strict=True)
            values["lpips_to_source"] = torch.cat([self.lpips(a, b).reshape(-1) for a, b in pairs])
            self.lpips.reset()
        return values

    def _inception_distances(self, results: Tensor, real: Tensor) -> dict[str, Estimate | float]:
        """FID and KID; of the latter the mean is torchmetrics', over random subsets, and the interval the jackknife's.

        The deviation that torchmetrics gives is of a subset and not of the mean; it is zero where a subset is the whole
        set. What the choice of subsets adds to the mean's variance is that of one subset over their number.
        """
        from torchmetrics.image.kid import KernelInceptionDistance

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that KID keeps all features in memory
            kid = KernelInceptionDistance(self.fid.inception, subset_size=min(100, len(results), len(real)))
        for pictures, is_real in ((results, False), (real, True)):
            for part in pictures.split(BATCH):
                for metric in (self.fid, kid):
                    metric.update(_bytes(part), real=is_real)
        with torch.random.fork_rng(devices=[]):  # torchmetrics draws KID's subsets from the global generator
            torch.manual_seed(0)
            mean, deviation = (value.item() for value in kid.compute())
        whole = kernel_estimate(torch.cat(kid.fake_features), torch.cat(kid.real_features))
        reach = math.hypot(whole.high - whole.mean, 1.96 * deviation / kid.subsets**0.5)
        distance = self.fid.compute().item()
        self.fid.reset()
        return {"fid": distance, "kid": Estimate(mean, mean - reach, mean + reach)}


def _bytes(pixels: Tensor) -> Tensor:
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _weights(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _missing(packages: tuple[str, ...], weights: str) -> str | None:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
        return f"{', '.join(absent)} not installed (pip install -r requirements/eval.txt)"
    return None if _weights(weights).exists() else f"no weights at {_weights(weights)} (see USAGE_GUIDE.md)"
