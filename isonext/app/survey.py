"""What training on a folder would be: its pictures and odd files, the memory plan, and about how long it takes."""

import itertools
import math
import time
from collections import Counter
from pathlib import Path

import torch

from isonext.app.recipes import Training
from isonext.checkpoint import network_of
from isonext.config import Config
from isonext.data import images
from isonext.data.store import LatentSpec, read_meta
from isonext.data.style_folders import Styles, find_styles, held_out_hint
from isonext.models.cost import COPIES, step_flops
from isonext.training.memory_plan import assumed_latents, plan_lines
from isonext.utils.device import autocast, free_bytes, has_bf16
from model import count_parameters

MOST_HEADERS = 5000  # pictures whose headers are read
SHOWN = 5  # names of odd files
MOST_CELLS = 32  # side of the latents that a step is timed on
AT_ONCE = {"cpu": 1}  # pictures of that step; elsewhere 8, or the device would mostly wait
USABLE = 0.5  # of the free memory, that the timed step may take


def survey_folder(training: Training, device: torch.device) -> str:
    """Everything there is to know before the start, as lines; what stands in the way is the last of them."""
    data = training.config.data
    root, left_out = Path(data.raw_data_root), Counter[str]()
    styles = find_styles(root, data.num_classes, left_out)
    lines = [f"style {number} {name}: {len(found)} pictures" for number, (name, found) in enumerate(styles.items())]
    if left_out:
        lines.append(images.left_out_line(left_out))
    lines += odd_files(root, styles)
    if hint := held_out_hint(root, styles):
        lines.append(f"warning: {hint}")
    lines += ["", *plan_lines(training.config), ""]
    return "\n".join([*lines, estimate_line(training.config, styles, device)])


def odd_files(root: Path, styles: Styles) -> list[str]:
    """A line for the pictures whose headers cannot be read, of the first thousands; they will be skipped."""
    names = itertools.chain.from_iterable((Path(style) / name for name in found) for style, found in styles.items())
    looked = list(itertools.islice(names, MOST_HEADERS))
    odd = [name.as_posix() for name in looked if images.picture_size(root / name) is None]
    if not odd:
        return []
    more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    return [f"no pictures, by their headers: {', '.join(odd[:SHOWN])}{more}; they will be skipped"]


def estimate_line(config: Config, styles: Styles, device: torch.device) -> str:
    """How long the steps take, reckoned from one small step of the network itself."""
    meta = read_meta(Path(config.data.data_root))
    spec = meta.latents if meta else _expected(config, list(styles))
    pictures = sum(map(len, styles.values())) * (1 - config.data.val_fraction)
    batch, epochs = config.training.batch_size, config.training.stage1_epochs
    steps = int(pictures // batch) * epochs
    if not steps:
        return f"{pictures:.0f} training pictures are fewer than one batch of {batch}: lower the batch"
    with torch.device("meta"):
        whole = step_flops(network_of(config, spec)(), batch, spec.space)
    rate = measure_rate(config, spec, device)
    if rate is None:
        return f"{steps} steps; no estimate: the network does not fit the memory that is free"
    return f"{steps} steps, about {spoken(steps * whole / rate)} on this {device.type} (a rough reckoning)"


def measure_rate(config: Config, spec: LatentSpec, device: torch.device) -> float | None:
    """Floating-point operations a second in a training step of the config's network; None where memory is short."""
    make = network_of(config, spec)
    with torch.device("meta"):
        empty = make()
    if 4 * COPIES * count_parameters(empty) > USABLE * free_bytes(device):
        return None
    space = spec.space if empty.size else tuple(min(MOST_CELLS, side) for side in spec.space)
    count = AT_ONCE.get(device.type, 8)
    network = make().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks memory_format
    x = torch.randn(count, spec.channels, *space, device=device).contiguous(memory_format=torch.channels_last)
    t, style = torch.rand(count, device=device), torch.zeros(count, dtype=torch.int64, device=device)

    def step() -> float:
        started = time.perf_counter()
        with autocast(device, config.training.use_amp and has_bf16(device)):
            loss = network(x, t, style).float().square().mean()
        loss.backward()
        loss.item()  # waits for the device
        return time.perf_counter() - started

    step()  # warms up
    return step_flops(empty, count, space) / step()


def _expected(config: Config, styles: list[str]) -> LatentSpec:
    """The latents that preprocessing will make; UserError where nobody can know."""
    spec = assumed_latents(config)
    spec.styles = styles
    return spec


def spoken(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 5 h, 3 days."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{math.ceil(seconds / size)} {unit}"
    return f"{math.ceil(seconds / 86400)} days"
