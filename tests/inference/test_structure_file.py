"""What a transfer keeps: the structure file against damage and edits, and the certificate against counting by hand."""

import hashlib
import json
import struct
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from isonext.data.autoencoder import DctCodec
from isonext.errors import UserError
from isonext.flow.certificate import Certificate, digest, likely_cause
from isonext.flow.solvers import LATTICE, LatticeState
from isonext.flow.transfer import TransferSettings
from isonext.inference.structure_file import Structure, fixed_bits, load_structure, refuse_other_bits, save_structure
from isonext.pipeline import Pipeline
from model import ARITHMETIC

SHAPE = (1, 2, 3, 2)


def points(seed, shape=SHAPE, bound=2**62):
    return torch.randint(-bound, bound, shape, generator=torch.Generator().manual_seed(seed))


def a_structure(seed=0, **changes) -> Structure:
    state = LatticeState(points(seed), points(seed + 1))
    how = TransferSettings(num_steps=7, strength=0.75, cfg_scale=2.5, cfg_interval=(0.1, 0.9), skip=2)
    bits = {"checkpoint": "c" * 64, "precision": "bf16", "compiled": False, "tf32": True, "device": "x", "torch": "2"}
    bits["network"] = ARITHMETIC
    return replace(Structure(state, "ink", "oil", how, (12, 8), "f" * 64, bits), **changes)


def assert_same(one: Structure, other: Structure) -> None:
    for part in ("position", "defect"):
        a, b = (getattr(structure.state, part) for structure in (one, other))
        assert a.dtype == b.dtype == torch.int64 and torch.equal(a, b)
    for name in ("source", "target", "settings", "size", "original", "bits"):
        assert getattr(one, name) == getattr(other, name)


def refusal(path) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(UserError) as caught:
        load_structure(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) > len(str(path)) + 10
    return line


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A structure file, its bytes, and how many of them are its header."""
    path = tmp_path_factory.mktemp("kept") / "kept.safetensors"
    save_structure(a_structure(), path)
    data = path.read_bytes()
    return path, data, 8 + struct.unpack("<Q", data[:8])[0]


#################################################################################
#                              What goes in comes out                           #
#################################################################################


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    bound=st.sampled_from([1, 2**20, 2**53, 2**63 - 1]),
    how=st.builds(
        TransferSettings,
        num_steps=st.integers(1, 100),
        strength=st.floats(0, 1),
        cfg_scale=st.floats(0, 100),
        guidance=st.sampled_from(["source", "null"]),
        cfg_interval=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple),
        latent_clamp=st.none() | st.floats(0, 10),
        cfg_rescale=st.floats(0, 1),
        time_grid=st.sampled_from(["uniform", "cosine"]),
        time_shift=st.floats(0.01, 100),
        skip=st.integers(0, 100),
        seed=st.integers(0, 2**63 - 1),
    ).filter(lambda how: how.skip <= how.num_steps),
    names=st.tuples(st.sampled_from(["ink", "a b", "ÿ"]), st.sampled_from(["油画", "a.b", 'quo"te', "👩‍🎨"])),
)
def test_a_structure_comes_back_bit_for_bit_with_its_settings(tmp_path_factory, seed, shape, bound, how, names):
    state = LatticeState(points(seed, shape, bound), points(seed + 1, shape, bound))
    made = a_structure(state=state, settings=how, source=names[0], target=names[1], size=(shape[2] * 4 - 1, 1))
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    save_structure(made, path)
    assert_same(load_structure(path), made)


def test_the_smallest_and_the_largest_integers_survive(tmp_path):
    extremes = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**53 + 1, 1]).view(1, 1, 2, 3)
    made = a_structure(state=LatticeState(extremes, -extremes.flip(3)))
    save_structure(made, tmp_path / "a.safetensors")
    assert_same(load_structure(tmp_path / "a.safetensors"), made)


def test_the_file_is_what_the_format_says_and_readable_without_this_program(kept):
    path, _, _ = kept
    made = a_structure()
    tensors = load_file(path)
    assert tensors.keys() == {"position", "defect"}
    assert torch.equal(tensors["position"], made.state.position) and torch.equal(tensors["defect"], made.state.defect)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["structure"])
    assert record["settings"]["num_steps"] == 7 and record["settings"]["skip"] == 2
    assert (record["source"], record["target"], record["size"], record["format"]) == ("ink", "oil", [12, 8], 2)


def test_states_that_are_views_of_something_larger_are_kept_as_they_look(tmp_path):
    large = points(5, (4, 3, 2, 2))
    views = LatticeState(large[1:2].permute(0, 3, 2, 1), large[2:3].permute(0, 3, 2, 1))
    made = a_structure(state=views)
    save_structure(made, tmp_path / "a.safetensors")
    assert_same(load_structure(tmp_path / "a.safetensors"), made)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64), (-(2**31), torch.int32)]
)
def test_numbers_that_fit_are_kept_in_32_bits(tmp_path, largest, dtype):
    position = torch.zeros(SHAPE, dtype=torch.int64)
    position[0, 1, 2, 1] = largest
    made = a_structure(state=LatticeState(position, torch.zeros_like(position)))
    save_structure(made, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert (tensors["position"].dtype, tensors["defect"].dtype) == (dtype, torch.int32)
    assert_same(load_structure(tmp_path / "a.safetensors"), made)


def test_a_file_takes_at_most_two_and_a_half_times_the_latent_in_float32(tmp_path):
    latent = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    state = LatticeState.at_picture(latent)
    made = a_structure(state=LatticeState(state.position, points(1, latent.shape, 2**22)))
    save_structure(made, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 2.5 * 4 * latent.numel()


def test_a_file_of_the_first_format_is_read_without_the_end_that_it_holds_besides(tmp_path):
    made = a_structure()
    tensors = {
        "position": made.state.position,
        "defect": made.state.defect,
        "end_position": points(8),
        "end_defect": points(9),
    }
    record = {name: getattr(made, name) for name in ("source", "target", "size", "original")}
    record["bits"] = {name: value for name, value in made.bits.items() if name != "network"}
    text = json.dumps(record | {"format": 1, "settings": asdict(made.settings)}, sort_keys=True)

    def seal() -> str:
        digested = hashlib.sha256(text.encode())
        for name, tensor in tensors.items():
            digested.update(str((name, tensor.dtype, tuple(tensor.shape))).encode() + tensor.numpy().tobytes())
        return digested.hexdigest()

    save_file(tensors, tmp_path / "a.safetensors", {"structure": text, "sha256": seal()})
    assert_same(load_structure(tmp_path / "a.safetensors"), replace(made, bits=made.bits | {"network": 1}))
    metadata = metadata_of(tmp_path / "a.safetensors")
    tensors["end_defect"][0, 0, 0, 0] += 1
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert "checksum" in refusal(tmp_path / "a.safetensors")


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    save_structure(a_structure(1), path)
    save_structure(a_structure(2), path)
    assert_same(load_structure(path), a_structure(2))
    assert list(path.parent.iterdir()) == [path]


#################################################################################
#                                 Damage and edits                              #
#################################################################################


def test_a_file_cut_off_anywhere_is_refused(kept, tmp_path):
    _, data, header = kept
    cut = tmp_path / "cut.safetensors"
    lengths = {*range(24), *range(24, len(data), 7), header - 1, header, header + 1, len(data) - 1}
    for length in lengths:
        cut.write_bytes(data[:length])
        refusal(cut)


def test_bytes_too_many_are_refused(kept, tmp_path):
    longer = tmp_path / "longer.safetensors"
    longer.write_bytes(kept[1] + b"\0")
    refusal(longer)


@settings(deadline=None, max_examples=400)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), in_header=st.booleans())
def test_one_changed_byte_anywhere_is_refused(kept, place, flip, in_header):
    path, data, header = kept
    position = int(place * header) if in_header else header + int(place * (len(data) - header))
    changed = bytearray(data)
    changed[position] ^= flip
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(changed)
    # The header is padded with blanks: another kind of white space there changes nothing that is read.
    if data[position : position + 1] == b" " and not data[position:header].strip() and changed[position] in b"\t\n\r":
        assert_same(load_structure(damaged), a_structure())
    else:
        refusal(damaged)


def metadata_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", ["position", "defect"])
def test_one_lattice_point_more_in_any_tensor_is_refused(kept, tmp_path, name):
    tensors = load_file(kept[0])
    tensors[name][0, 1, 2, 1] += 1
    save_file(tensors, tmp_path / "a.safetensors", metadata_of(kept[0]))
    assert "checksum" in refusal(tmp_path / "a.safetensors")
    tensors[name][0, 1, 2, 1] -= 1  # put back by other means than this program's, it is the file again
    save_file(tensors, tmp_path / "a.safetensors", metadata_of(kept[0]))
    assert_same(load_structure(tmp_path / "a.safetensors"), a_structure())


@pytest.mark.parametrize(
    "edit",
    [
        {"source": "oil"},
        {"original": "0" * 64},
        {"size": [12, 9]},
        {"bits": {}},
        {"settings": {}},
        {"settings": {"num_steps": 8}},
        {"extra": 1},
    ],
)
def test_an_edited_entry_is_refused_whatever_it_is(kept, tmp_path, edit):
    metadata = metadata_of(kept[0])
    record = json.loads(metadata["structure"])
    for name, value in edit.items():
        record[name] = record[name] | value if value and isinstance(value, dict) else value
    metadata["structure"] = json.dumps(record, sort_keys=True)
    save_file(load_file(kept[0]), tmp_path / "a.safetensors", metadata)
    assert "was changed after it was written" in refusal(tmp_path / "a.safetensors")


def swapped(tensors):
    return tensors | {"position": tensors["defect"], "defect": tensors["position"]}


def without_one(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "defect"}


def with_one_more(tensors):
    return tensors | {"more": torch.zeros(1)}


def reshaped(tensors):
    return tensors | {"position": tensors["position"].reshape(1, 3, 2, 2)}


def of_another_type(tensors):
    return tensors | {"defect": tensors["defect"].view(torch.float64)}


def of_a_type_that_numpy_lacks(tensors):
    return tensors | {"defect": tensors["defect"].bfloat16()}


@pytest.mark.parametrize(
    "change", [swapped, without_one, with_one_more, reshaped, of_another_type, of_a_type_that_numpy_lacks]
)
def test_other_tensors_under_the_old_checksum_are_refused(kept, tmp_path, change):
    save_file(change(load_file(kept[0])), tmp_path / "a.safetensors", metadata_of(kept[0]))
    refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("missing", ["structure", "sha256"])
def test_a_file_without_its_record_or_its_checksum_is_refused(kept, tmp_path, missing):
    metadata = {name: text for name, text in metadata_of(kept[0]).items() if name != missing}
    save_file(load_file(kept[0]), tmp_path / "a.safetensors", metadata)
    assert "not a structure file" in refusal(tmp_path / "a.safetensors")


def test_a_file_of_a_later_format_says_that_it_is_another_version_not_that_it_is_damaged(kept, tmp_path):
    metadata = metadata_of(kept[0])
    metadata["structure"] = metadata["structure"].replace('"format": 2', '"format": 3')
    save_file(load_file(kept[0]), tmp_path / "a.safetensors", metadata)
    assert "another version" in refusal(tmp_path / "a.safetensors")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "vae.safetensors")
    assert "--save_structure" in refusal(tmp_path / "vae.safetensors")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "vae.safetensors", {"format": "pt"})
    refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": null}',
        "5",
        '"x"',
        "null",
        "[" * 10**5,
    ],
    ids=lambda text: text[:8] or "empty",
)
def test_a_record_that_is_not_an_object_is_refused(kept, tmp_path, text):
    save_file(load_file(kept[0]), tmp_path / "a.safetensors", {"structure": text, "sha256": ""})
    refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"no tensors here, just a text\n" * 10])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "not a structure file" in refusal(tmp_path / "a.safetensors")


def test_a_checkpoint_of_torch_is_refused(tmp_path):
    torch.save({"position": torch.zeros(1)}, tmp_path / "a.pt")
    refusal(tmp_path / "a.pt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such structure file" in refusal(tmp_path / "nowhere.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    refusal(tmp_path / "folder.safetensors")


#################################################################################
#                            What else fixes the bits                           #
#################################################################################


@pytest.fixture
def pipeline(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"weights" * 1000)
    codec = DctCodec("dct")
    return Pipeline(torch.nn.Identity(), codec, None, torch.device("cpu"), bf16=True, path=tmp_path / "net.pt")


def test_the_bits_name_the_checkpoint_by_the_hash_of_its_file_and_how_it_is_run(pipeline):
    bits = fixed_bits(pipeline)
    assert bits["checkpoint"] == hashlib.sha256(b"weights" * 1000).hexdigest()
    assert (bits["precision"], bits["compiled"], bits["torch"]) == ("bf16", False, torch.__version__)
    pipeline.bf16, pipeline.compiled = False, True
    assert (fixed_bits(pipeline)["precision"], fixed_bits(pipeline)["compiled"]) == ("fp32", True)


def test_the_same_run_is_not_refused(pipeline, tmp_path):
    refuse_other_bits(a_structure(bits=fixed_bits(pipeline)), pipeline, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "there", "words"),
    [
        ("checkpoint", "0" * 64, ["another checkpoint", "0" * 20]),
        ("autoencoder", "0" * 64, ["another autoencoder", "--set autoencoder.name=FOLDER"]),
        ("precision", "fp32", ["another precision: fp32", "here it is bf16"]),
        ("compiled", True, ["another compiled: True", "here it is False"]),
        ("tf32", None, ["another tf32"]),
        ("device", "NVIDIA H200", ["another device: NVIDIA H200", "threads"]),
        ("torch", "1.0", ["another torch: 1.0", torch.__version__]),
        ("network", 1, ["another network: 1; here it is 2", "use the version of this program that made it"]),
    ],
)
def test_another_run_is_refused_by_what_differs_and_only_where_it_matters(pipeline, tmp_path, name, there, words):
    path = tmp_path / "a.safetensors"
    other = a_structure(bits=fixed_bits(pipeline) | {name: there})
    with pytest.raises(UserError) as caught:
        refuse_other_bits(other, pipeline, path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert all(word in line for word in words), line
    elsewhere = tuple(fixed_bits(pipeline).keys() - {name})
    refuse_other_bits(other, pipeline, path, elsewhere)
    with pytest.raises(UserError, match=f"another {name}"):
        refuse_other_bits(other, pipeline, path, (name,))


def test_one_changed_byte_of_the_checkpoint_is_another_checkpoint(pipeline, tmp_path):
    made = a_structure(bits=fixed_bits(pipeline))
    pipeline.path.write_bytes(b"weights" * 999 + b"weightz")
    with pytest.raises(UserError, match="another checkpoint"):
        refuse_other_bits(made, pipeline, tmp_path / "a.safetensors")


#################################################################################
#                                The certificate                                #
#################################################################################


def state(position, defect=None):
    position = torch.tensor(position).view(1, 1, 1, -1)
    defect = torch.zeros_like(position) if defect is None else torch.tensor(defect).view_as(position)
    return LatticeState(position, defect)


def test_the_certificate_counts_what_differs_by_hand():
    certificate = Certificate()
    certificate.compare(state([0, 5, -7, 9]), state([0, 5, -4, 8]))  # by 3 and by 1
    assert (certificate.elements, certificate.differing, certificate.largest) == (4, 2, 3)
    assert not certificate.exact
    line = certificate.line("the cause")
    assert "NOT exact: 2 of 4 elements differ" in line and f"{3 * LATTICE:.2g}" in line and line.endswith("the cause")


def test_a_defect_that_did_not_come_back_counts_although_the_picture_did():
    certificate = Certificate()
    certificate.compare(state([1, 2, 3]), state([1, 2, 3], [0, -6, 0]))
    assert (certificate.differing, certificate.largest) == (1, 6)
    certificate = Certificate()  # an element that differs in both is one element
    certificate.compare(state([1, 2, 3]), state([1, 4, 3], [0, -6, 0]))
    assert (certificate.differing, certificate.largest) == (1, 6)


def test_the_certificate_adds_up_over_batches_and_its_sha256_is_that_of_its_pictures_however_they_are_batched():
    parts = [points(seed, (count, 2, 3, 3)) for seed, count in enumerate((3, 1, 2))]
    certificate = Certificate()
    for part in parts:
        certificate.compare(LatticeState(part, part), LatticeState(part.clone(), part.clone()))
    together = np.concatenate([part.numpy() for part in parts]).astype("<i8")
    assert certificate.elements == together.size == 6 * 18 and certificate.exact
    each = sorted(hashlib.sha256(picture.tobytes()).hexdigest() for picture in together)
    assert certificate.sha256 == hashlib.sha256("".join(each).encode()).hexdigest()
    assert certificate.line("") == f"certificate: exact (0 of 108 elements differ), sha256 {certificate.sha256}"
    certificate.compare(state([1]), state([2]))
    certificate.compare(state([1]), state([1]))  # a later match does not make it exact again
    assert (certificate.elements, certificate.differing, certificate.exact) == (110, 1, False)


def test_certificates_of_several_processes_make_one():
    whole, first, second = Certificate(), Certificate(), Certificate()
    for number, certificate in enumerate((first, second, first)):
        start = points(number, (2, 1, 2, 2))
        back = start + 3 * number
        for one in (whole, certificate):
            one.compare(LatticeState(start, start), LatticeState(back, start))
    first.include(second)
    assert (first.elements, first.differing, first.largest) == (24, 16, 6)
    assert vars(first) == vars(whole) and first.sha256 == whole.sha256


def test_rows_that_only_fill_up_a_batch_are_not_certified():
    start = points(0, (4, 1, 2, 2), bound=1000)
    back = start.clone()
    back[2:] += 5
    zeros = torch.zeros_like(start)
    certificate = Certificate()
    certificate.compare(LatticeState(start, zeros), LatticeState(back, zeros), count=2)
    assert certificate.exact and certificate.elements == 8
    assert certificate.pictures == {hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in start[:2]}
    certificate.compare(LatticeState(start, zeros), LatticeState(back, zeros), count=3)
    assert (certificate.elements, certificate.differing, certificate.largest) == (20, 4, 5)


def test_plain_latents_are_compared_on_the_lattice():
    x = torch.tensor([0.5, -1.25, 3.0]).view(1, 1, 1, 3)
    certificate = Certificate()
    certificate.compare(x, x + torch.tensor([0.0, 2.5 * LATTICE, 0.3 * LATTICE]))
    assert (certificate.differing, certificate.largest) == (1, 2)  # halves go to the even: 2.5 points are 2
    expected = np.array([2**19, -1.25 * 2**20, 3 * 2**20], np.int64)
    assert certificate.sha256 == digest(x) == hashlib.sha256(expected.tobytes()).hexdigest()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), moved=st.integers(0, 12), by=st.integers(1, 2**40))
def test_as_many_elements_differ_as_were_moved(seed, moved, by):
    start = points(seed, (2, 1, 2, 3), bound=2**50)
    back = start.flatten().clone()
    back[torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:moved]] -= by
    certificate = Certificate()
    zeros = torch.zeros_like(start)
    certificate.compare(LatticeState(start, zeros), LatticeState(back.view_as(start), zeros))
    assert (certificate.differing, certificate.largest) == (moved, by if moved else 0)


def test_the_digest_tells_positions_apart_and_not_their_memory_layout():
    position = points(3, (1, 4, 3, 3))
    zeros = torch.zeros_like(position)
    channels_last = position.contiguous(memory_format=torch.channels_last)
    assert digest(LatticeState(position, zeros)) == digest(LatticeState(channels_last, position))
    position[0, 3, 2, 2] += 1
    assert digest(LatticeState(position, zeros)) != digest(LatticeState(channels_last, zeros))


def test_the_cause_names_the_method_that_is_exact():
    of_heun = likely_cause(TransferSettings(method="heun"))
    assert of_heun.startswith("heun") and "--method alf" in of_heun
    assert "tolerance" in likely_cause(TransferSettings(method="euler", inversion="fixed_point"))
    assert "deterministic" in likely_cause(TransferSettings())
