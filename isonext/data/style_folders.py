"""The folders of pictures: which ones are the styles, and which of them look as if they were none."""

from collections import Counter
from pathlib import Path

from isonext.data import images
from isonext.errors import UserError
from isonext.utils.io import natural_order
from isonext.utils.schema import Mismatch, style_name

SPLIT_NAMES = ("train", "test", "val", "valid", "validation", "holdout")
Styles = dict[str, list[Path]]  # name -> its pictures, relative to its folder


def find_styles(raw_root: Path, expected: int | None, left_out: Counter[str] | None = None) -> Styles:
    """The folders are the styles, in natural order; `expected` is how many there must be, where the config says so.

    `left_out` is told of other files as by `images.find_pictures`.
    """
    if not raw_root.is_dir():
        raise UserError(f"{raw_root}: no such folder; put one folder of pictures a style there (data.raw_data_root)")
    folders = [path for path in raw_root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folders.sort(key=lambda path: natural_order(path.name))
    if left_out is not None:
        beside = [path for path in raw_root.iterdir() if not (path.is_dir() or path.name.startswith("."))]
        left_out.update(f"{path.suffix.lower()} beside the folders" for path in beside)
    styles = {path.name: images.find_pictures(path, left_out) for path in folders}
    if not styles:
        raise UserError(f"{raw_root}: holds no folders; make one folder of pictures a style there")
    hint = held_out_hint(raw_root, styles)
    for name, pictures in styles.items():
        try:
            style_name(name, "folder")
        except Mismatch as error:
            raise UserError(f"{raw_root}: {error}; rename it") from None
        if not pictures:
            raise UserError(f"{raw_root / name}: holds no pictures ({' '.join(images.READABLE)}); fill or remove it")
        if _repeats_styles(name, styles) and all(len(path.parts) > 1 for path in pictures):
            raise UserError(f"{raw_root / name}: has no pictures but those in folders named like other styles; {hint}")
    if expected not in (None, len(styles)):
        counted = f"{raw_root}: {len(styles)} folders ({', '.join(styles)}), but data.num_classes = {expected}"
        raise UserError(f"{counted}; {hint}" if hint else counted)
    return styles


def held_out_hint(raw_root: Path, styles: Styles) -> str | None:
    """What is wrong, most likely, where a folder that counts as a style looks like held-out pictures; else None."""
    if len(styles) == 1:
        return None
    splits = [name for name in styles if name.lower() in SPLIT_NAMES]
    if len(splits) == len(styles):
        train = next((name for name in splits if name.lower() == "train"), splits[0])
        return (
            f"{raw_root}: its folders ({', '.join(splits)}) look like splits, not styles; set data.raw_data_root to "
            f"the one that holds the training pictures' styles, e.g. {raw_root / train}"
        )
    suspects = [str(raw_root / name) for name in styles if name in splits or _repeats_styles(name, styles)]
    if not suspects:
        return None
    looks = (
        f"{suspects[0]} looks like a folder of held-out pictures, not a style; move it"
        if len(suspects) == 1
        else f"{' and '.join(suspects)} look like folders of held-out pictures, not styles; move them"
    )
    return f"{looks} out of {raw_root} (e.g. to test_data/)"


def _repeats_styles(name: str, styles: Styles) -> bool:
    """Whether a style's pictures lie in folders, all of which are named like other styles."""
    inner = {path.parts[0] for path in styles[name] if len(path.parts) > 1}
    return bool(inner) and inner <= styles.keys() - {name}
