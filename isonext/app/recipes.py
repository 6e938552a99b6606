"""What may be trained from the page: a folder and a config that the server lists, a few numbers, and the commands."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isonext.config import Config, load_config
from isonext.errors import UserError
from isonext.training.folder import holds_checkpoints
from isonext.utils.io import natural_order

COMMANDS = Path(__file__).resolve().parents[2]  # where train.py lies
STORES = Path("latents")  # of what a config does not place itself
MOST_FOLDERS = 500


@dataclass(frozen=True)
class Recipe:
    """A training, as the page asks for it; None: as the config says."""

    pictures: str  # what the page calls a folder and a config
    config: str
    epochs: int | None = None
    size: int | None = None  # pixels
    batch: int | None = None
    dct: bool = False  # the built-in codec, which needs no weights


@dataclass(frozen=True)
class Training:
    """The same with its places, and the two commands that do it."""

    name: str  # of the run's folder below the root of runs
    folder: Path  # of the run
    config: Config
    preprocess: list[str]  # arguments behind `python`
    train: list[str]

    @property
    def commands(self) -> str:
        """What a person would type."""
        return "\n".join(shlex.join(["python", *map(_shorten, part)]) for part in (self.preprocess, self.train))


def list_folders(root: Path) -> list[tuple[str, str]]:
    """(label, value) of the folders of folders at and just below `root`, which may be data sets; "." is the root."""
    if not root.is_dir():
        return []
    inner = sorted(filter(_is_shown, root.iterdir()), key=lambda path: natural_order(path.name))
    sets = [path for path in inner if any(map(_is_shown, path.iterdir()))]
    own, others = [(str(root), ".")], [(str(path), path.name) for path in sets]
    # Where all of them hold folders it is likely that each is a data set.
    found = others + own if len(sets) == len(inner) else own + others
    return found[:MOST_FOLDERS] if inner else []


def list_configs() -> list[str]:
    """config.json and those of configs/, in the working directory."""
    found = [Path("config.json"), *sorted(Path("configs").glob("*.json"))]
    return [path.as_posix() for path in found if path.is_file()]


def plan_training(recipe: Recipe, pictures: Path, runs: Path) -> Training:
    """The commands of a recipe; UserError where it names what is not listed, or a number that no config may have.

    A config that is of this folder keeps its own places. Otherwise they are named after the folder, and after the
    config where that is not config.json. A run that has checkpoints is gone on with.
    """
    if recipe.pictures not in (value for _, value in list_folders(pictures)):
        raise UserError(f"{str(recipe.pictures)[:80]}: no such folder of pictures here; choose one from the list")
    if recipe.config not in list_configs():
        raise UserError(f"{str(recipe.config)[:80]}: no such config here; choose one from the list")
    folder, changes = pictures / recipe.pictures, _changes(recipe)
    config = load_config(recipe.config, _texts(changes))
    own = _real(config.data.raw_data_root) == _real(folder)
    if not (own and _real(config.checkpoint.save_dir).is_relative_to(_real(runs))):
        stem = Path(recipe.config).stem
        name = folder.name if stem in ("config", folder.name) else f"{folder.name}_{stem}"
        places = {"data.raw_data_root": folder, "data.data_root": STORES / name, "checkpoint.save_dir": runs / name}
        changes = {key: place.as_posix() for key, place in places.items()} | changes
    overrides = _texts(changes)
    config = load_config(recipe.config, overrides)
    run = Path(config.checkpoint.save_dir)
    flags = ["--config", recipe.config, *(part for text in overrides for part in ("--set", text))]
    return Training(
        _real(run).relative_to(_real(runs)).as_posix(),
        run,
        config,
        [str(COMMANDS / "preprocess_latents.py"), *flags],
        [str(COMMANDS / "train.py"), *flags, *(["--resume"] if holds_checkpoints(run) else [])],
    )


def arguments(part: list[str]) -> list[str]:
    """What to start for the arguments behind `python`."""
    return [sys.executable, *part]


def _changes(recipe: Recipe) -> dict[str, Any]:
    asked = {
        "training.stage1_epochs": recipe.epochs,
        "data.image_size": recipe.size,
        "training.batch_size": recipe.batch,
        "autoencoder.name": "dct" if recipe.dct else None,
    }
    return {key: value for key, value in asked.items() if value is not None}


def _texts(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


def _shorten(argument: str) -> str:
    """A command's path as from the working directory."""
    return os.path.relpath(argument) if argument.startswith(str(COMMANDS) + os.sep) else argument


def _is_shown(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))
