"""What evaluate.py can be asked for, and the settings that --sweep spans. Imports nothing that takes long."""

import math
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from isonext.errors import UserError


@dataclass(frozen=True)
class EvaluateOptions:
    checkpoint: str
    baselines: tuple[str, ...] = ()  # other checkpoints to compare with
    data: Path | None = None  # held-out pictures; None is the store's validation split
    train_data: Path | None = None  # pictures the classifier learns from; None is the config's
    pairs: bool = False  # files of one name are one picture in every style
    output: Path = Path("report")
    overrides: tuple[str, ...] = ()  # of the config: section.key=value
    strength: float = 1.0
    sweep: tuple[str, ...] = ()  # KEY=A,B
    quick: bool = False  # no way back, no FID, KID and LPIPS
    limit: int | None = None  # test pictures a style
    device: str = "auto"


@dataclass(frozen=True)
class Combination:
    """One setting of a sweep: a strength, and all overrides of the config."""

    strength: float
    overrides: tuple[str, ...]


def swept_combinations(options: EvaluateOptions) -> list[Combination]:
    """Every combination of the swept values, which go before --strength and --set; one where nothing is swept."""
    axes = []
    for text in options.sweep:
        name, _, values = text.partition("=")
        if not (name and values):
            raise UserError(f"--sweep {text}: write it as KEY=VALUE,VALUE, e.g. cfg_scale=1,1.5,2")
        axes.append([(name, value) for value in re.split(r",(?![^\[]*\])", values)])  # not those inside [0, 1]
    combinations = []
    for point in product(*axes):
        chosen: dict[str, Any] = {"strength": options.strength} | dict(point)
        try:
            strength = float(chosen.pop("strength"))
        except ValueError:
            strength = math.nan
        if not 0 <= strength <= 1:
            raise UserError("strength: must be a number from 0 to 1")
        swept = (f"inference.{name}={value}" for name, value in chosen.items())
        combinations.append(Combination(strength, (*options.overrides, *swept)))
    return combinations
