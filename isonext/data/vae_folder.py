"""A folder or hub repository of one of diffusers' autoencoders, or of a whole pipeline with one, as its model."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

from isonext.data.vae_rules import rule_of
from isonext.errors import UserError, first_line

PARTS = ("vae", "vqvae", "movq")  # where a pipeline keeps its autoencoder
WEIGHTS = "diffusion_pytorch_model"
COUNTER = ".num_batches_tracked"  # of a batch norm's training: some converters leave it out
MOST_LAYERS, WIDEST = 1000, 2**20
WAYS_OUT = "give --set autoencoder.name= a local diffusers folder or checkpoint file, or the built-in codec: dct"


def load_folder(name: str, download: bool) -> Any:
    """The model, in float32, whatever it was saved as. Without `download` a hub repository must be in the cache."""
    import diffusers
    import torch  # these two take seconds to import
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # without a network it would tell of every retry; the one line below tells the rest
    diffusers.utils.logging.set_verbosity_error()  # it warns of keys that it wrote into the config itself
    warnings.filterwarnings("ignore", module="huggingface_hub")  # of its own use by diffusers
    try:
        part, config = _find_config(name, download)
        rule_of(config.get("_class_name"))
        _refuse_absurd(config)
        if part:
            print(f"autoencoder {name}: a whole pipeline, of which its {part} is taken", file=sys.stderr)
        options = {"subfolder": part, "local_files_only": not download, "torch_dtype": torch.float32}
        kind = getattr(diffusers, config["_class_name"], None)
        if kind is None:
            raise ValueError(f"diffusers {diffusers.__version__} has no {config['_class_name']} yet; update it")
        vae, loading = _from_pretrained(kind, name, options)
        counters = [key for key in loading["missing_keys"] if key.endswith(COUNTER)]
        for key in counters:
            vae.get_buffer(key).zero_()
        if missing := sorted({*loading["missing_keys"]} - {*counters}):  # diffusers would leave these random
            raise ValueError(f"{len(missing)} weights are missing, e.g. {missing[0]}")
        return vae
    except Exception as error:  # diffusers lets many types out of a broken folder; the answer is the same
        reason = (
            f"this folder does not load ({first_line(error)})" if Path(name).exists() else _hub_reason(error, download)
        )
        raise UserError(f"autoencoder {name}: {reason}; {WAYS_OUT}") from None


def _refuse_absurd(config: dict[str, Any]) -> None:
    """ValueError where a config asks for layers or widths that no autoencoder has: building them would never end."""
    for key, value in config.items():
        bound = MOST_LAYERS if "blocks" in key or "layers" in key else WIDEST
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool) and not abs(number) <= bound:
                raise ValueError(f"its config has {key} = {number:g}: more than {bound}")


def _find_config(name: str, download: bool) -> tuple[str | None, dict[str, Any]]:
    """The part of a pipeline that is its autoencoder, or None, and the autoencoder's config."""
    import diffusers

    def read(part: str | None) -> dict[str, Any]:
        return diffusers.AutoencoderKL.load_config(name, subfolder=part, local_files_only=not download)

    folder = Path(name)
    if folder.is_dir():
        parts = [part for part in PARTS if (folder / part / "config.json").is_file()]
        alone = (folder / "config.json").is_file() or not parts
        part = None if alone else parts[0]
        return part, read(part)
    try:
        return None, read(None)
    except OSError as error:
        if not _lacks_the_file(error, download):
            raise
    return PARTS[0], read(PARTS[0])


def _from_pretrained(kind: Any, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """Of a folder that was saved with a variant alone, as fp16, that one."""
    folder = Path(name, options["subfolder"] or "")
    if folder.is_dir():
        return kind.from_pretrained(name, output_loading_info=True, variant=_only_variant(folder), **options)
    try:
        return kind.from_pretrained(name, output_loading_info=True, **options)
    except OSError as error:
        if not _lacks_the_file(error, not options["local_files_only"]):
            raise
    return kind.from_pretrained(name, output_loading_info=True, variant="fp16", **options)


def _only_variant(folder: Path) -> str | None:
    """None where there are plain weights, or none at all; of several variants the first by its name."""
    files = sorted(file.name for file in folder.glob(f"{WEIGHTS}*"))
    if any(re.fullmatch(rf"{WEIGHTS}(-\d+-of-\d+)?\.(safetensors|bin)", file) for file in files):
        return None
    found = (re.fullmatch(rf"{WEIGHTS}\.(\w+?)(-\d+-of-\d+)?\.(safetensors|bin)", file) for file in files)
    return next((match[1] for match in found if match), None)


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what caused it, and so on."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    return chain


def _lacks_the_file(error: BaseException, download: bool) -> bool:
    """Whether the hub, or where nothing is downloaded its cache, answered that this file is not there."""
    from huggingface_hub import constants, errors

    online = download and not constants.HF_HUB_OFFLINE  # there, what is not in the cache means that no hub was reached
    return any(
        isinstance(part, errors.EntryNotFoundError)
        and not (online and isinstance(part, errors.LocalEntryNotFoundError))
        for part in _chain(error)
    )


def _hub_reason(error: BaseException, download: bool) -> str:
    """Why a name that is no local folder did not load: diffusers wraps the cause in a guess of its own."""
    from huggingface_hub import errors

    chain = _chain(error)
    hub = "not in the cache, and the hub was not reached" if download else "and not in the cache"
    for kind, reason in (
        (errors.GatedRepoError, "is gated on the hub: accept its terms there, and log in by `hf auth login`"),
        (errors.RepositoryNotFoundError, "no such local folder, and the hub has none, or it is private"),
        (errors.HFValidationError, "no such local folder, and no name that the hub could have"),
        (errors.LocalEntryNotFoundError, f"no such local folder, {hub}"),
    ):
        if any(isinstance(part, kind) for part in chain):
            return reason
    return f"does not load from the hub or its cache ({first_line(chain[-1])})"
