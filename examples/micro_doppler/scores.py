"""What evaluate.py measures: read pictures back to dB, tell users apart, compare distributions, report.

Pictures are (N, 1, s, s) dB, the mean over blocks where the file has more than 64 pixels a side. Figures are means with
an interval over *recordings*, as pictures of one overlap in time and are no independent samples: Wilson's for shares, a
jackknife's for distances between recordings, a bootstrap's for the rest.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from tqdm import tqdm

from isonext.data import images
from isonext.data.autoencoder import load_autoencoder
from isonext.errors import UserError
from isonext.evaluation.intervals import FEWEST, Estimate, bootstrap, estimate
from isonext.evaluation.metrics import distances, nearest_distance
from isonext.evaluation.report import plain
from isonext.utils.io import natural_order, written_whole
from radar import RANGE_DB, SIZES, Radar, from_rgb, ridge_speeds, step_rate

SIDE = 64  # pixels a side that classifiers and distances see
Figure = Estimate | None


#################################################################################
#                                   Pictures                                    #
#################################################################################


@dataclass
class Spectrograms:
    """The pictures of one folder, N of them."""

    pictures: Tensor  # (N, 1, s, s) dB
    user: Tensor  # (N,) int64
    recording: Tensor  # (N,) int64; every generated picture is one of its own
    speed: Tensor  # (N,) m/s of the torso's ridge
    steps: Tensor  # (N,) steps a second
    off_map: Tensor  # (N,) distance of the colours from the colour map, in 8-bit steps
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.user)

    def part(self, chosen: Tensor) -> "Spectrograms":
        """Those at `chosen`, a mask or an index."""
        tensors = (self.pictures, self.user, self.recording, self.speed, self.steps, self.off_map)
        return Spectrograms(*(tensor[chosen] for tensor in tensors))

    def mean(self, values: Tensor) -> Estimate:
        """Of a value a picture: each recording's own mean comes first, and the interval is over recordings."""
        return estimate(values, self.recording)


def find_users(root: Path) -> dict[str, list[Path]]:
    """Pictures by user: `<user>/*.png`, or `<user>_001.png`; a picture named grid is none."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found: dict[str, list[Path]] = {}
    for path in images.find_pictures(root):
        if path.stem != "grid":
            user = path.parts[0] if len(path.parts) > 1 else path.stem.rpartition("_")[0] or path.stem
            found.setdefault(user, []).append(path)
    if not found:
        raise UserError(f"{root}: no pictures; it needs a folder for each user, or files named <user>_001.png")
    return {user: found[user] for user in sorted(found, key=natural_order)}


def picture_side(root: Path, names: list[Path]) -> int:
    """Of the first picture that can be read."""
    sides = (images.picture_size(root / name) for name in names)
    width, height = next((side for side in sides if side), (0, 0))
    if width != height or width not in SIZES:
        known = ", ".join(map(str, SIZES))
        raise UserError(f"{root}: {width} x {height} pixels; spectrograms are square, of {known} a side")
    return width


def read(
    root: Path,
    users: list[str],
    side: int,  # pixels
    radar: Radar,
    generated: bool = False,
    through: Callable[[Image.Image], Image.Image] | None = None,  # what is done to a picture before it is measured
) -> Spectrograms:
    """Every picture below `root` as dB and what it tells; unreadable ones are named and skipped."""
    found = find_users(root)
    if strangers := [user for user in found if user not in users]:
        raise UserError(f"{root}: {strangers[0]} is no user of --real_train, which has {', '.join(users)}")
    rows, skipped, recordings = [], 0, {}
    names = [(users.index(user), name) for user, paths in found.items() for name in paths]
    for user, name in tqdm(names, desc=root.name, unit="picture", disable=None):
        try:
            picture = images.open_square(root / name, side)
            picture = through(picture) if through else picture
        except images.BadPicture as error:
            if not through:  # else it was named when its pictures were read as they are
                print(f"skipped: {error}")
            skipped += 1
            continue
        db, off_map = from_rgb(np.asarray(picture))
        key = name if generated else (user, name.stem.rpartition("_")[0] or name.stem)
        recording = recordings.setdefault(key, len(recordings))
        small = F.interpolate(torch.from_numpy(db)[None, None].float(), (min(side, SIDE),) * 2, mode="area")[0]
        rows.append((small, user, recording, ridge_speeds(db, radar).mean(), step_rate(db, radar), off_map))
    if not rows:
        raise UserError(f"{root}: not one of its pictures can be read")
    pictures, *values = zip(*rows, strict=True)
    return Spectrograms(torch.stack(pictures), *(torch.tensor(np.array(each)) for each in values), skipped)


def coding(name: str) -> Callable[[Image.Image], Image.Image]:
    """A picture encoded and decoded by an autoencoder: nothing generated from its latents can be nearer to the real."""
    codec = load_autoencoder(name, torch.device("cpu"))

    @torch.inference_mode()
    def through(picture: Image.Image) -> Image.Image:
        return images.to_picture(codec.decode(codec.encode(images.to_pixels(images.to_bytes(picture))[None]))[0])

    return through


def radar_of(root: Path) -> Radar:
    """The radar that users.json names; that of simulate.py's defaults where there is none."""
    path = root / "users.json"
    if not path.exists():
        return Radar()
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return Radar(settings["carrier_ghz"] * 1e9, settings["prf"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it or simulate anew") from None


#################################################################################
#                                  Who is it?                                   #
#################################################################################


class UserClassifier(nn.Module):
    """A small convolutional network that says who walks. The mean is over time alone: which speed an echo has is
    what tells, and when a step falls is chance."""

    def __init__(self, users: int, side: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width * (side // 8), users)

    def forward(self, pictures: Tensor) -> Tensor:
        """dB (B, 1, s, s') -> logits (B, users)."""
        return self.head(self.features(pictures * (2 / RANGE_DB) + 1).mean(3).flatten(1))

    @torch.inference_mode()
    def hits(self, known: Spectrograms) -> Tensor:
        """(N,) bool: is the picture taken for one of its own user?"""
        return torch.cat([self(part).argmax(1) for part in known.pictures.split(64)]) == known.user


def train_classifier(known: Spectrograms, users: int, steps: int, seed: int, batch_size: int = 64) -> UserClassifier:
    """On random spans of 7/8 of the time, each user drawn equally often; never mirrored, as nobody walks backwards.
    Deterministic on a CPU."""
    generator, side = torch.Generator().manual_seed(seed), known.pictures.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UserClassifier(users, side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    weights = 1.0 / known.user.bincount(minlength=users)[known.user].double()
    span = side * 7 // 8
    for _ in tqdm(range(steps), desc="user classifier", unit="step", disable=None):
        index = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        start = int(torch.randint(0, side - span + 1, (), generator=generator))
        loss = F.cross_entropy(model(known.pictures[index, :, :, start : start + span]), known.user[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.eval()


def as_many(known: Spectrograms, like: Spectrograms, seed: int) -> Spectrograms:
    """Of every user as many random pictures as `like` has (or all, if there are fewer)."""
    shuffled = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    counts = like.user.bincount(minlength=int(known.user.max()) + 1)
    chosen = [shuffled[known.user[shuffled] == user][:count] for user, count in enumerate(counts.tolist())]
    return known.part(torch.cat(chosen))


#################################################################################
#                            Various, not copied, like                          #
#################################################################################


def diversity(known: Spectrograms) -> Figure:
    """dB: root-mean-square distance of each picture to the others of its user, but for those of its own recording; the
    mean over recordings. None where no user has two.

    Its interval is of leaving out each recording in turn, since each takes part in the others' distances too: the
    recordings' own values alone scatter half as much as the figure does.
    """
    whole, without = [], []  # of a user's recordings: (R,) their values; (R, R) the same but for the q-th, a row each
    for user in known.user.unique():
        some = known.part(known.user == user)
        flat = some.pictures.flatten(1)
        member = F.one_hot(some.recording.unique(return_inverse=True)[1]).double()  # (N, R)
        sums, counts = member.T @ distances(flat, flat).double() @ member, member.sum(0)
        others = counts.sum() - counts
        sums.fill_diagonal_(0)
        whole.append(sums.sum(1) / (counts * others))  # 0 / 0 for the only one
        less = (sums.sum(1) - sums) / (counts * (others - counts[:, None]))
        without.append(less.fill_diagonal_(torch.nan))
    own = torch.cat(whole)
    count, mean = int((~own.isnan()).sum()), own.nanmean().item()
    if count < FEWEST:
        return Estimate(mean, math.nan, math.nan) if count else None
    rows = [torch.cat([*whole[:n], row, *whole[n + 1 :]]) for n, less in enumerate(without) for row in less]
    left = torch.stack(rows).nanmean(1)[~own.isnan()]
    reach = 1.96 * ((count - 1) * left.var(correction=0).item()) ** 0.5
    return Estimate(mean, mean - reach, mean + reach)


def distance_by_user(a: Spectrograms, b: Spectrograms, value: Callable[[Spectrograms], Tensor]) -> Estimate:
    """Wasserstein-1 distance of a value's distributions within each user of `a`; the mean over users."""
    users = a.user.unique()
    pairs = [(value(a)[a.user == user], value(b)[b.user == user]) for user in users]
    return bootstrap(torch.tensor([wasserstein_distance(x.numpy(), y.numpy()) for x, y in pairs]))


def figures_of(
    some: Spectrograms, train: Spectrograms, nearest: Tensor, classifier: UserClassifier
) -> dict[str, Figure]:
    """What is measured in the same way of held-out and of generated pictures; `nearest` (N,) dB to training ones."""
    return {
        "recognised": some.mean(classifier.hits(some)),
        "nearest_db": some.mean(nearest),
        "speed_mps": some.mean(some.speed),
        "steps_per_s": some.mean(some.steps),
        "speed_distance": distance_by_user(some, train, lambda each: each.speed),
        "steps_distance": distance_by_user(some, train, lambda each: each.steps),
        "off_map": some.mean(some.off_map),
    }


def measure(
    train: Spectrograms,
    test: Spectrograms,
    made: Spectrograms | None,
    users: list[str],
    steps: int,  # of a classifier's training
    seed: int,
    coded: Spectrograms | None = None,  # the held-out pictures through the autoencoder
) -> dict[str, dict[str, Figure]]:
    """Figures of "real" (held-out) and, if there are any, "coded" and "generated" pictures; None: there are too few."""

    classifier = train_classifier(train, len(users), steps, seed)
    sets = {"real": test} | ({"coded": coded} if coded else {}) | ({"generated": made} if made else {})
    nearest = {name: nearest_distance(some.pictures, train.pictures) for name, some in sets.items()}
    figures = {name: figures_of(some, train, nearest[name], classifier) for name, some in sets.items()}
    for name, some in (sets | {"real": train}).items():
        figures[name]["diversity_db"] = diversity(some)
    if len(sets) == 1:
        return figures
    for name, some in sets.items():  # as near as the nearest twentieth of what cannot be a copy
        figures[name]["copies"] = some.mean(nearest[name] < nearest["real"].quantile(0.05))
    if made is None:
        return figures
    asked = test.part(torch.isin(test.user, made.user))
    for name, some in (("real", as_many(train, made, seed)), ("generated", made)):
        if len(made.user.unique()) > 1 and len(asked):
            learnt = train_classifier(some, len(users), steps, seed)
            figures[name]["teaches"] = asked.mean(learnt.hits(asked))
    return figures


#################################################################################
#                                  The report                                   #
#################################################################################

ROWS = {  # figure: what it is, what the column "real" holds
    "recognised": ("taken for their own user", "held-out"),
    "teaches": ("held-out pictures recognised after training on this set", "as many of --real_train"),
    "diversity_db": ("distance between pictures of a user, dB", "--real_train"),
    "nearest_db": ("distance to the nearest training picture, dB", "held-out"),
    "copies": ("nearer to it than 95 % of the held-out ones", "held-out"),
    "speed_mps": ("torso speed, m/s", "held-out"),
    "speed_distance": ("its Wasserstein distance to training, by user", "held-out"),
    "steps_per_s": ("steps a second", "held-out"),
    "steps_distance": ("its Wasserstein distance to training, by user", "held-out"),
    "off_map": ("colours off the colour map, 8-bit steps", "held-out"),
}


def table(figures: dict[str, dict[str, Figure]], counts: dict[str, int], users: int) -> str:
    """Markdown: a line a figure, a column a set."""
    lines = [
        f"{users} users, chance {1 / users:.3f}; pictures: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
        "",
        "| mean [95 % interval] | " + " | ".join(figures) + " | real is |",
        "| --- |" + " --- |" * (len(figures) + 1),
    ]
    for name, (what, of) in ROWS.items():
        values = [column.get(name) for column in figures.values()]
        if any(values):
            shown = " | ".join("-" if value is None else str(value) for value in values)
            lines.append(f"| {what} | {shown} | {of} |")
    return "\n".join(lines)


def evaluate(args: argparse.Namespace) -> int:
    """evaluate.py, once its flags are read; 1 if pictures had to be skipped."""
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be 1 or more")
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: the report is a .json, with an .md beside it")
    found = find_users(args.real_train)
    users, radar = list(found), radar_of(args.real_train)
    if len(users) < 2:
        raise UserError(f"{args.real_train}: one user only; there is nobody to be told apart from")
    side = picture_side(args.real_train, [name for paths in found.values() for name in paths])
    train, test = (read(root, users, side, radar) for root in (args.real_train, args.real_test))
    made = read(args.generated, users, side, radar, generated=True) if args.generated else None
    coded = read(args.real_test, users, side, radar, through=coding(args.autoencoder)) if args.autoencoder else None
    sets = {"training": train, "held-out": test} | ({"generated": made} if made else {})
    if absent := set(range(len(users))) - set(train.user.tolist()):
        raise UserError(f"{args.real_train}: no readable picture of {users[min(absent)]}")
    figures = measure(train, test, made, users, args.steps, args.seed, coded)
    counts = {name: len(each) for name, each in sets.items()}
    text = table(figures, counts, len(users))
    columns = {name: plain(column) for name, column in figures.items()}
    tree = {"users": users, "pictures": counts, "figures": columns, "steps": args.steps, "seed": args.seed}
    for path, content in (
        (args.output, json.dumps(tree, indent=1, allow_nan=False)),
        (args.output.with_suffix(".md"), text),
    ):
        with written_whole(path) as beside:
            beside.write_text(content + "\n", encoding="utf-8")
    print(f"{text}\n\nwritten to {args.output} and {args.output.with_suffix('.md')}")
    return int(any(each.skipped for each in sets.values()))
