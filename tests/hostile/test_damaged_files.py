"""Every field of every file that is read, replaced by two dozen wrong values: one line, or a load that can be used."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from helpers import TINY
from hostile.wrong import DEEP, PLAIN, deep_list, fields, judge, named, with_field, wrong_tensors
from isonext import checkpoint as checkpoint_file
from isonext.checkpoint import Checkpoint, build_model, export_checkpoint, load_checkpoint, load_model
from isonext.config import config_from_dict
from isonext.data import pt_store
from isonext.data.autoencoder import weights_digest
from isonext.data.dataset import load_split, open_store
from isonext.data.external import survey
from isonext.data.model_folder import read_header, read_model
from isonext.data.pt_store import read_latent, write_latent
from isonext.data.shards import read_alike, read_shard
from isonext.data.store import LatentSpec, StoreMeta
from isonext.flow.base import Base
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import TransferSettings
from isonext.inference.structure_file import Structure, _seal, load_structure, refuse_other_shape, save_structure
from isonext.pipeline import front_line
from isonext.training.optim import Guard, make_optimizer
from isonext.training.state import TrainState

CONFIG = config_from_dict({name: values for name, values in TINY.items() if name != "checkpoint"})
SPEC = LatentSpec("dct:f4c12", 12, 4, 16, ["ink", "oil"], mean=[0.5] * 12, std=[2.0] * 12)
ENTRIES = ["ink/a.png.pt", "oil/b.png.pt"]
CPU = torch.device("cpu")


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory) -> tuple[Path, dict]:
    """A checkpoint after a step of AdamW, and its tree."""
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("checkpoint") / "a.pt", build_model(CONFIG, SPEC)
    optimizer = make_optimizer(model, CONFIG.training)
    (model(torch.randn(2, 12, 4, 4), torch.rand(2), torch.tensor([0, 2])) - 1).square().sum().backward()
    optimizer.step()
    shapes = ((2, 12), (2, 12), (2, 3, 12, 2, 2))
    base, guard = Base(0.8, 2, *map(torch.ones, shapes)), {"norms": [1.5], "skipped": 2, "in_a_row": 0}
    weights = model.state_dict()
    log, point = {"sums": torch.ones(2, 4), "clipped": 1}, {"cfg_scale": 1.0, "style_success": 0.5, "ssim": 0.25}
    front = {"scale": 1.0, "ceiling": 1.0, "pictures": 4, "points": [point]}
    own = {"run": "0" * 32, "log": log, "front": front}
    Checkpoint(CONFIG, SPEC, base, "digest", guard, 7, 3, weights, weights, optimizer.state_dict(), **own).save(path)
    return path, torch.load(path, weights_only=True)


def use_checkpoint(path: Path, part: str) -> None:
    """Load it, and do with its parts what transfers and training do."""
    checkpoint = load_checkpoint(path)
    model, noise, styles = load_model(checkpoint, path, CPU), torch.zeros(2, 12, 4, 4), torch.tensor([0, 1])
    assert checkpoint.base.x0(noise, noise, styles).isfinite().all()
    if checkpoint.base.can_sample:
        checkpoint.base.sample(noise, torch.tensor([0.0, 0.999]), styles)
    Guard(checkpoint.guard).passes(1.0)
    assert checkpoint.step + checkpoint.epoch + checkpoint.ema_head_start < 2**60
    assert len(checkpoint.run.encode()) < 256
    if checkpoint.log:
        assert (torch.zeros(2, 4) + checkpoint.log["sums"]).isfinite().all() and checkpoint.log["clipped"] < 2**60
    if checkpoint.front:
        assert "\n" not in front_line(checkpoint.front)
    if part == "optimizer":
        state = TrainState.start(model.requires_grad_(), checkpoint.config.training)
        state.load_tree(vars(checkpoint), path)
        model(noise, torch.zeros(2), styles).sum().backward()
        state.take_step(checkpoint.config.training, 10)


def wrong_for(path: tuple) -> dict:
    """Values for a field of a checkpoint; a config's fields are plain."""
    return {"missing": ...} | PLAIN | {"deep": deep_list()} | ({} if path[0] == "config" else wrong_tensors())


def matters(part: str, rest: tuple) -> bool:
    """Whether a field is not one of many alike: options of the optimizer, which nobody reads, and of the config, which
    tests/test_config.py goes through."""
    if part == "optimizer":
        return rest[:2] in ((), ("state",), ("state", 0)) or len(rest) < 3 or rest[2] == "params"
    return part != "config" or len(rest) < 2 or rest[0] == "model"


PARTS = ("config", "latents", "base", "store", "guard", "step", "epoch", "model", "ema", "optimizer", "ema_head_start",
         "run", "log", "front", "version", "teacher", "format")  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_with_one_wrong_field_is_one_line_or_a_network(good_checkpoint, monkeypatch, part):
    path, tree = good_checkpoint
    before, cases, faults = listing(path.parent), 0, []
    for field in [(part,), *((part, *rest) for rest in fields(tree[part]) if matters(part, rest))]:
        for name, value in wrong_for(field).items():
            damaged, cases = with_field(tree, field, value), cases + 1
            monkeypatch.setattr(checkpoint_file, "load_data", lambda *_, damaged=damaged: damaged)
            fault = judge(lambda: use_checkpoint(path, part), path)
            faults += [f"{named(field)} = {name}: {fault}"] if fault else []
    assert not faults, f"{len(faults)} of {cases}:\n" + "\n".join(faults)
    assert cases >= 20 and listing(path.parent) == before


def test_a_damaged_checkpoint_on_the_disk_is_the_same(good_checkpoint, tmp_path):
    _, tree = good_checkpoint
    path, faults = tmp_path / "a.pt", []
    weight = ("ema", "head.weight")
    for name, value in ({"missing": ...} | PLAIN | wrong_tensors()).items():
        torch.save(with_field(tree, weight, value), path)
        fault = judge(lambda: load_model(load_checkpoint(path), path, CPU), path)
        faults += [f"{name}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 1000}, "num_layers = 1000, but the weights are of 1"),
        ({"num_layers": 10**7}, "num_layers"),
        ({"hidden_dim": 65536, "num_groups": 1, "expansion": 64}, "of another shape"),
        ({"hidden_dim": 10**12, "num_groups": 1}, "hidden_dim"),
        ({"style_dim": 65536, "time_dim": 65536}, "of another shape"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_had(good_checkpoint, tmp_path, changes, words):
    path, tree = tmp_path / "a.pt", good_checkpoint[1]
    torch.save(tree | {"config": tree["config"] | {"model": tree["config"]["model"] | changes}}, path)
    with pytest.raises(checkpoint_file.UserError, match=words):
        load_checkpoint(path)


#################################################################################
#                               The exported model                              #
#################################################################################


@pytest.fixture(scope="module")
def good_model(good_checkpoint, tmp_path_factory) -> tuple[Path, dict, dict]:
    """A folder of export.py, its header and its tensors."""
    folder = tmp_path_factory.mktemp("model")
    export_checkpoint(load_checkpoint(good_checkpoint[0]), good_checkpoint[0], folder, asdict(CONFIG))
    return folder, *read_model(folder)


def write_header(folder: Path, tensors: dict, header: dict) -> None:
    """A model.safetensors with this header, whatever it is, and the checksum that goes with it."""
    written = json.dumps(header).replace(json.dumps(DEEP), "[" * 10**5 + "]" * 10**5)
    save_file(tensors, folder / "model.safetensors", {"isonext": written, "sha256": weights_digest(tensors, written)})


def test_a_model_with_one_wrong_field_is_one_line_or_a_network(good_model):
    folder, header, tensors = good_model
    path, cases, faults = folder / "model.safetensors", 0, []
    entries = [("entries", name) for name in header["entries"]]
    for field in [
        ("format",),
        ("checkpoint",),
        ("entries",),
        *entries,
        *(("entries", "base", name) for name in ("strength", "cells")),
    ]:
        for name, value in ({"missing": ...} | PLAIN).items():
            write_header(folder, tensors, with_field(header, field, value))
            cases += 1
            fault = judge(lambda: use_checkpoint(folder, "model"), path) or judge(lambda: read_header(folder), path)
            faults += [f"{named(field)} = {name}: {fault}"] if fault else []
    write_header(folder, tensors, header)
    assert not faults, f"{len(faults)} of {cases}:\n" + "\n".join(faults)
    use_checkpoint(folder, "model")
    assert cases > 200 and [entry.name for entry in listing(folder)] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["network.head.weight", "base.mean", "base.layouts"])
def test_a_model_with_one_wrong_tensor_is_one_line_or_a_network(good_model, name):
    folder, header, tensors = good_model
    faults, wrong = [], wrong_tensors()
    for kind, value in ({kind: wrong[kind] for kind in STORED} | {"missing": ...}).items():
        write_header(folder, with_field(tensors, (name,), value), header)
        fault = judge(lambda: use_checkpoint(folder, "model"), folder / "model.safetensors")
        faults += [f"{kind}: {fault}"] if fault else []
    write_header(folder, tensors, header)
    assert not faults, "\n".join(faults)


#################################################################################
#                                   The store                                   #
#################################################################################


@pytest.fixture(scope="module")
def good_store(tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("store") / "latents"
    for number, entry in enumerate(ENTRIES):
        crops = torch.ones(1, 12, 4, 4)
        write_latent(root / entry, torch.full((12, 4, 4), float(number)), torch.ones(12, 4, 4), [1, 2], crops, crops)
    counts = {style: {"train": 1, "val": 0} for style in SPEC.styles}
    StoreMeta(SPEC, True, {"train": ENTRIES, "val": []}, counts, complete=True, crops=1).write(root)
    return root, json.loads((root / "meta.json").read_text())


def open_all(root: Path) -> None:
    """What training does with a store."""
    meta = open_store(root)
    for split in ("train", "val"):
        loaded = load_split(root, meta, split)
        assert loaded.spec.standardise(torch.from_numpy(loaded.latents).flatten(0, 1)).isfinite().all()


def test_a_meta_with_one_wrong_field_is_one_line_or_a_store(good_store):
    root, tree = good_store
    path, before, cases, faults = root / "meta.json", listing(root.parent), 0, []
    for field in fields(tree):
        for name, value in ({"missing": ...} | PLAIN).items():
            text = json.dumps(with_field(tree, field, value)).replace(json.dumps(DEEP), "[" * 10**5 + "]" * 10**5)
            path.write_text(text)
            cases += 1
            fault = judge(lambda: open_all(root), path)
            faults += [f"{named(field)} = {name}: {fault}"] if fault else []
    path.write_text(json.dumps(tree))
    assert not faults, f"{len(faults)} of {cases}:\n" + "\n".join(faults)
    assert cases > 400 and listing(root.parent) == before
    open_all(root)


@pytest.mark.parametrize("entry", ["ink/../../outside.pt", "../ink/a.pt", "/ink/a.pt", "ink//a.pt", "ink/a\0.pt"])
def test_an_entry_of_a_split_may_not_leave_the_store(good_store, entry):
    root, tree = good_store
    (root / "meta.json").write_text(json.dumps(tree | {"split": {"train": [entry, ENTRIES[1]], "val": []}}))
    (root.parent / "outside.pt").write_bytes((root / ENTRIES[0]).read_bytes())
    with pytest.raises(checkpoint_file.UserError, match=r"meta\.json: damaged .*split\.train\[0\]"):
        open_store(root)
    (root / "meta.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("part", ["latent", "flipped", "source", "crops", "crops_flipped"])
def test_a_latent_with_one_wrong_field_is_one_line_or_a_latent(good_store, monkeypatch, part):
    root, _ = good_store
    path, faults = root / ENTRIES[0], []
    tree = torch.load(path, weights_only=True)
    for name, value in ({"missing": ...} | PLAIN | {"deep": deep_list()} | wrong_tensors()).items():
        damaged = with_field(tree, (part,), value)
        monkeypatch.setattr(pt_store, "load_data", lambda *_, damaged=damaged: damaged)
        fault = judge(lambda: read_latent(path), path) or judge(lambda: open_all(root), path)
        faults += [f"{name}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


#################################################################################
#                                     Shards                                    #
#################################################################################

SHARD = {"latents": torch.ones(2, 12, 4, 4), "latents_flip": torch.ones(2, 12, 4, 4), "labels": torch.tensor([0, 1])}
STORED = ("another shape", "no dimension", "no numbers", "truths", "eight bits", "an empty tensor",
          "a number in a tensor")  # fmt: skip


def wrong_labels() -> dict[str, torch.Tensor]:
    kinds = (torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float16)
    huge = {"huge": torch.tensor([0, 2**62]), "negative": torch.tensor([-1, 0]), "lowest": torch.tensor([-(2**63), 1])}
    return huge | {str(kind): torch.tensor([0, 1]).to(kind) for kind in kinds}


@pytest.mark.parametrize("part", list(SHARD))
def test_a_shard_with_one_wrong_tensor_is_one_line_or_rows(tmp_path, part):
    path, faults, tensors = tmp_path / "latents.safetensors", [], wrong_tensors()
    for name, value in ({name: tensors[name] for name in STORED} | wrong_labels() | {"missing": ...}).items():
        save_file(with_field(SHARD, (part,), value), path)
        fault = judge(lambda: read_alike([path]), path) or judge(lambda: survey(tmp_path, CONFIG), path)
        faults += [f"{name}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("part", ["latents_crops", "latents_crops_flip"])
def test_a_shard_with_wrong_crops_is_one_line_or_rows(tmp_path, part):
    path, faults, tensors = tmp_path / "latents-00000.safetensors", [], wrong_tensors()
    crops = {name: torch.ones(2, 1, 12, 4, 4) for name in ("latents_crops", "latents_crops_flip")}
    pictures = {"pictures": json.dumps({entry: [1, 2] for entry in ENTRIES})}
    counts = {style: {"train": 1, "val": 0} for style in SPEC.styles}
    split = {"train": ENTRIES, "val": []}
    StoreMeta(SPEC, True, split, counts, complete=True, layout="safetensors", crops=1).write(tmp_path)
    halves = {"halves": torch.ones(2, 1, 12, 4, 4).half(), "none": torch.ones(2, 0, 12, 4, 4)}
    for name, value in ({name: tensors[name] for name in STORED} | halves | {"missing": ...}).items():
        save_file(with_field(SHARD | crops, (part,), value), path, pictures)
        fault = judge(lambda: open_all(tmp_path), path)
        faults += [f"{name}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)
    save_file(SHARD | crops, path, pictures)
    open_all(tmp_path)


def test_a_shard_with_other_names_of_pictures_is_one_line_or_rows(tmp_path):
    path, faults, tree = tmp_path / "latents-00000.safetensors", [], {entry: [1, 2] for entry in ENTRIES}
    cases = [with_field(tree, field, value) for field in fields(tree) for value in (..., *PLAIN.values())]
    cases += [*PLAIN.values(), *({name: [1, 2], "ink/a": [1, 2]} for name in map(str, PLAIN.values()))]
    for number, case in enumerate(cases):
        deep = json.dumps(case).replace(json.dumps(DEEP), "[" * 10**5 + "]" * 10**5)
        save_file(SHARD, path, {"pictures": deep})
        fault = judge(lambda: read_shard(path), path)
        faults += [f"{number}: {str(case)[:80]}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


#################################################################################
#                                The structure file                             #
#################################################################################


@pytest.fixture(scope="module")
def good_structure(tmp_path_factory) -> tuple[Path, dict, dict]:
    path = tmp_path_factory.mktemp("structure") / "kept.safetensors"
    state = LatticeState(torch.ones(1, 12, 4, 4, dtype=torch.int64), torch.ones(1, 12, 4, 4, dtype=torch.int64))
    bits = {"checkpoint": "c", "precision": "bf16", "compiled": False, "tf32": True, "device": "x", "torch": "2"}
    structure = Structure(state, "ink", "oil", TransferSettings(num_steps=3), (16, 15), "f" * 64, bits)
    save_structure(structure, path)
    tree = {name: getattr(structure, name) for name in ("source", "target", "size", "original", "bits")}
    tree |= {"format": 2, "settings": asdict(structure.settings)}
    return path, tree, {"position": state.position.int(), "defect": state.defect.int()}


PIPELINE = SimpleNamespace(codec=SimpleNamespace(factor=4), spec=SPEC, check_size=lambda path, size: None)


def use_structure(path: Path) -> None:
    """Both ways of using one begin so; its steps can then be counted."""
    structure = load_structure(path)
    refuse_other_shape(structure, PIPELINE, path)
    assert len(structure.settings.grid) < 20_000


def test_a_structure_with_one_wrong_field_is_one_line_or_a_structure(good_structure):
    path, tree, tensors = good_structure
    cases, faults = 0, []
    for field in fields(tree):
        for name, value in ({"missing": ...} | PLAIN).items():
            text = json.dumps(with_field(tree, field, value)).replace(json.dumps(DEEP), "[" * 10**5 + "]" * 10**5)
            save_file(tensors, path, {"structure": text, "sha256": _seal_of(text, tensors)})
            cases += 1
            fault = judge(lambda: use_structure(path), path)
            faults += [f"{named(field)} = {name}: {fault}"] if fault else []
    assert not faults, f"{len(faults)} of {cases}:\n" + "\n".join(faults)
    assert cases > 400 and len(listing(path.parent)) == 1


@pytest.mark.parametrize("part", ["position", "defect"])
@pytest.mark.parametrize("shape", [(12, 4, 4), (0, 12, 4, 4), (2, 12, 4, 4), (1, 12, 4, 3), (1, 11, 4, 4)])
@pytest.mark.parametrize("both", [True, False])
def test_a_structure_of_another_shape_is_one_line(good_structure, tmp_path, part, shape, both):
    _, tree, tensors = good_structure
    path, text = tmp_path / "a.safetensors", json.dumps(tree)
    wrong = tensors | dict.fromkeys(tensors if both else [part], torch.ones(shape, dtype=torch.int32))
    wrong = {name: tensor.clone() for name, tensor in wrong.items()}
    save_file(wrong, path, {"structure": text, "sha256": _seal_of(text, wrong)})
    with pytest.raises(checkpoint_file.UserError, match=r"a\.safetensors: "):
        use_structure(path)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int16, torch.float8_e5m2, torch.uint64])
def test_a_structure_of_other_numbers_is_one_line(good_structure, tmp_path, kind):
    _, tree, tensors = good_structure
    path, text, wrong = tmp_path / "a.safetensors", json.dumps(tree), tensors | {"defect": tensors["defect"].to(kind)}
    save_file(wrong, path, {"structure": text, "sha256": _seal_of(text, wrong)})
    with pytest.raises(checkpoint_file.UserError, match=r"a\.safetensors: "):
        use_structure(path)


def _seal_of(text: str, tensors: dict) -> str:
    """That of the program, which orders the tensors so; a type that it has no bytes of has none."""
    try:
        return _seal(text, {name: tensors[name] for name in ("position", "defect")})
    except (TypeError, RuntimeError):
        return ""
