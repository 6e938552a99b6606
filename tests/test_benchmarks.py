"""The benchmarks and the smoke check: each runs, and its last line is JSON with what its table says."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from fake_peer import write_fake_peer
from helpers import CHECKPOINT, ROOT, call, call_within, refused, second_stage
from isonext.config import config_to_dict
from isonext.data import images
from isonext.evaluation.evaluator import load_styles
from isonext.evaluation.metrics import ssim
from small_vaes import save_small


@pytest.mark.slow
def test_smoke_check_passes_and_is_readable():
    done = call(ROOT, "test_model.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout and "FAIL" not in done.stdout
    assert "0 elements differ" in done.stdout


@pytest.mark.slow
def test_validation_benchmark_counts_what_a_run_looks_at_and_saves_nothing(store, make_config):
    config = make_config(store, {"training.stage1_epochs": 7, "training.val_every_epochs": 2})
    (store / "c.json").write_text(json.dumps(config_to_dict(config)))
    done = call(store, ROOT / "benchmarks/validation.py", "--config", "c.json", "--steps", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["validations"], figures["with_figures"], figures["previews"]) == (4, 4, 7)
    assert figures["step_s"] > 0 and 0 < figures["share"] < 1
    assert not (store / "run").exists()


@pytest.mark.slow
def test_step_benchmark_ends_with_one_json_line():
    flags = ["--hidden_dim", "32", "--num_layers", "1", "--batch_size", "2", "--latent_size", "8", "--rounds", "2"]
    done = call(ROOT, "benchmarks/train_step.py", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"plain_ms", "default_ms", "ratio", "matmul_share", "floor_share", "device"} <= figures.keys()
    assert {"matrix multiplies forward", "matrix multiplies backward", "optimizer", "average"} <= figures[
        "where_ms"
    ].keys()
    # By hand: 128 positions; stem and head 9 * 4 * 32 = 1152 multiply-adds each, depthwise 49 * 32 = 1568, pointwise
    # 2 * 32 * 128 = 8192, so 12064 forward; three times that, less the stem's input gradient; two operations each.
    assert figures["step_gflop"] == round(128 * 2 * (3 * 12064 - 1152) / 1e9, 2)


@pytest.mark.slow
def test_step_benchmark_times_the_network_of_a_config_and_names_its_attention(tmp_path):
    script = tmp_path / "without_rate.py"  # what the machine can do at most takes long, and was measured above
    script.write_text(f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
benchmark = importlib.import_module("benchmarks.train_step")
benchmark.matmul_rate = lambda device: 1e11
benchmark.VARIANTS = benchmark.VARIANTS[:4]  # up to the default: each that is compiled takes long too
benchmark.run(benchmark.main, benchmark.build_parser())
""")
    flags = ["--config", "configs/digits.json", "--set", "model.hidden_dim=48", "--set", "model.num_layers=1"]
    done = call(ROOT, script, *flags, "--batch_size", "2", "--latent_size", "8", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["network"] == "DiT, 1 blocks"
    assert figures["attention"] == "scaled_dot_product_flash_attention_for_cpu"
    assert {"attention forward", "attention backward"} <= figures["where_ms"].keys()
    assert "floor_ms" not in figures


@pytest.mark.slow
def test_plan_benchmark_finds_the_estimate_near_what_is_measured():
    done = call(ROOT, "benchmarks/plan.py", "--device", "cpu", "--sizes", "32x2x16x8", "64x1x8x4")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert [(row["size"], row["recompute"]) for row in figures["rows"]] == [
        (size, recompute) for size in ("32x2x16x8", "64x1x8x4") for recompute in ("none", "selective", "full")
    ]
    assert figures["worst"] == max(abs(row["error"]) for row in figures["rows"]) <= 0.15
    done = call(ROOT, "benchmarks/plan.py", "--sizes", "32x2x16")
    refused((done.returncode, done.stdout, done.stderr), "32x2x16", "DxNxSIDExPICTURES")


@pytest.mark.slow
def test_solver_benchmark_tells_which_method_comes_back(studio):
    flags = ["--checkpoint", CHECKPOINT, "--data", "raw_data", "--pictures", "3", "--steps", "4", "--grids", "uniform"]
    done = call(studio, "benchmarks/solvers.py", *flags, "--methods", "alf", "euler", "rk4", "rk4+fixed_point")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert [row["nfe"] for row in rows.values()][:3] == ["5", "4", "16"]
    assert rows["alf"]["differ"] == 0 and rows["alf"]["back_rms"] == 0 and rows["alf"]["elements"] == 3 * 12 * 8 * 8
    assert rows["euler"]["back_rms"] > 10 * rows["rk4+fixed_point"]["back_rms"] > 0
    assert rows["euler"]["transfer_rms"] > rows["alf"]["transfer_rms"]  # first order against second


@pytest.mark.slow
def test_folder_benchmark_compares_a_folder_with_its_legs(studio):
    flags = ["--checkpoint", CHECKPOINT, "--data", "raw_data/cold", "--batch_size", "4", "--rounds", "1"]
    done = call(studio, "benchmarks/folder.py", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["pictures"] == 16
    assert figures["share"] == pytest.approx(figures["folder_per_s"] / figures["legs_per_s"], rel=1e-2)


@pytest.mark.slow
def test_transfer_benchmark_times_the_parts_of_each_batch_size(studio):
    flags = ["--checkpoint", CHECKPOINT, "--batch_sizes", "1", "3", "--rounds", "1"]
    done = call(studio, "benchmarks/transfer.py", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["batch"], row["nfe"]) for row in rows] == [(1, 21 + 2 * 21), (3, 21 + 2 * 21)]
    for row in rows:  # of one round, so that the parts add up
        parts = [row[part] for part in ("encode", "invert", "generate", "decode")]
        assert row["all"] == pytest.approx(sum(parts), abs=0.05) and row["speed"] == row["network_speed"] == 1


GENERATOR = """
import torch
def define_G(input_nc, output_nc, ngf, netG, norm):
    assert (input_nc, output_nc, ngf, netG, norm) == (3, 3, 64, 'resnet_9blocks', 'instance')
    return torch.nn.Conv2d(3, 3, 1)
"""


@pytest.mark.slow
def test_transfer_benchmark_times_stage_2_beside_its_teacher_and_a_peers_generator(studio, tmp_path):
    code = write_fake_peer(tmp_path / "code")
    (code / "models" / "networks.py").write_text(GENERATOR)
    second = second_stage(studio / CHECKPOINT, tmp_path / "stage2_epoch1.pt")
    flags = ["--checkpoint", second, "--batch_sizes", "2", "--rounds", "1", "--steps", "1", "3", "--code", code]
    done = call(studio, "benchmarks/transfer.py", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = [(row["name"], row["nfe"]) for row in rows]
    assert found == [("alf, 20 steps", 21 + 2 * 21), ("map, 1 steps", 1), ("map, 3 steps", 5), ("ResNet-9", 1)]
    network = [row["invert"] + row["generate"] for row in rows]
    for row, own in zip(rows, network, strict=True):
        assert row["network_speed"] == pytest.approx(network[0] / own, abs=0.02, rel=0.1)  # of rounded ms
        assert row["speed"] == pytest.approx(rows[0]["all"] / row["all"], rel=0.05)
    (code / "models" / "networks.py").unlink()
    refused(call_within(studio, "benchmarks.transfer", *map(str, flags)), "--code", "no models/networks.py", "checkout")


@pytest.mark.slow
def test_folder_benchmark_measures_a_folder_of_mixed_sizes(studio):
    flags = [
        "--checkpoint",
        CHECKPOINT,
        "--data",
        "raw_data/cold",
        "--sizes",
        "2",
        "--batch_size",
        "4",
        "--rounds",
        "1",
    ]
    done = call(studio, "benchmarks/folder.py", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["pictures"], figures["sizes"]) == (16, 2)
    assert figures["first_s"].keys() == figures["again_s"].keys() == {"off", "auto", "on"}
    assert figures["compiled"] == {"off": 0, "auto": 0, "on": 4}  # two batches a size; so few do not pay
    assert figures["first_s"]["on"] > figures["again_s"]["on"], "compiling takes time"


@pytest.mark.slow
def test_generation_benchmark_sets_samples_beside_real_latents(studio):
    flags = ["--checkpoint", CHECKPOINT, "--store", "latents", "--pictures", "8"]
    done = call(studio, "benchmarks/generation.py", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["real"] < min(figures["drawn"], figures["training"]), "one step of training draws no pictures"
    other = call(studio, "benchmarks/generation.py", *flags[:-1], "3")
    refused((other.returncode, other.stdout, other.stderr), "--pictures 3: must be 4 or more")


@pytest.mark.slow
def test_sample_benchmark_compares_one_process_with_two(studio):
    flags = ["--num_samples", "4", "--batch_size", "2", "--num_steps", "2", "--cfg_scale", "2", "--rounds", "1"]
    done = call(studio, "benchmarks/sample.py", "--checkpoint", CHECKPOINT, *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["nfe"] == 2 * (2 + 1)
    assert figures["ratio"] == pytest.approx(figures["two_per_s"] / figures["one_per_s"], abs=1e-3)
    done = call(studio, "benchmarks/sample.py", "--checkpoint", CHECKPOINT, *flags, "--cfg_scale", "nan")
    refused((done.returncode, done.stdout, done.stderr), "sample.py failed", "cfg_scale")


@pytest.mark.slow
def test_preprocess_benchmark_compares_with_the_bare_encoder(tmp_path):
    flags = ["--size", "32", "--pictures", "20", "--num_workers", "0", "--rounds", "1"]
    done = call(tmp_path, "benchmarks/preprocess.py", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["pictures"] == 20 and {"bare_per_s", "whole_share", "device"} <= figures.keys()
    assert figures["whole_share"] == pytest.approx(figures["whole_per_s"] / figures["bare_per_s"], rel=1e-2)


@pytest.mark.slow
def test_autoencoder_benchmark_compares_the_ways_of_computing(tmp_path):
    folder = str(save_small("Tiny", tmp_path / "vae"))
    done = call(
        tmp_path,
        "benchmarks/autoencoder.py",
        "--autoencoder",
        folder,
        "--sizes",
        "32",
        "--rounds",
        "1",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["before"] == "nhwc float32"
    assert figures["default"]["encode"] == figures["default"]["decode"]
    assert {"nchw float32", "nhwc float32", figures["default"]["decode"]} <= figures["32"].keys()
    for way, row in figures["32"].items():
        assert row["encode"] > 0 and row["decode"] > 0
        assert row["both_db"] == pytest.approx(figures["32"]["nchw float32"]["both_db"], abs=0.1)
        assert f"both {row['both_db']:6.2f} dB" in next(line for line in done.stdout.splitlines() if f" {way} " in line)
    bad = call(tmp_path, "benchmarks/autoencoder.py", "--autoencoder", "dct")
    assert bad.returncode == 2 and "has no weights" in bad.stderr and bad.stderr.count("\n") == 1


PEERS = ("--checkpoint", CHECKPOINT, "--train_data", "raw_data", "--data", "held_out", "--device", "cpu")


@pytest.fixture
def peer_studio(studio, tmp_path):
    """A studio with 5 test pictures of `cold` and 3 of `warm`, and a checkout beside it."""
    if not (studio / "held_out").exists():
        for style, count in (("cold", 5), ("warm", 3)):
            (studio / "held_out" / style).mkdir(parents=True)
            for picture in sorted((studio / "raw_data" / style).iterdir())[:count]:
                shutil.copy(picture, studio / "held_out" / style)
    return studio, write_fake_peer(tmp_path / "code")


def ssim_of_copies(studio, source, target):
    """Mean over the test pictures of one style, each to the other style's of its number, counted round."""
    before, after = (
        torch.stack([images.to_pixels(images.to_bytes(images.open_picture(path))) for path in sorted(folder.iterdir())])
        for folder in (studio / "held_out" / source, studio / "held_out" / target)
    )
    return ssim(before, after[torch.arange(len(before)) % len(after)]).mean().item()


@pytest.mark.slow
def test_peers_benchmark_trains_a_peer_for_its_time_and_scores_what_it_made(peer_studio):
    studio, code = peer_studio
    before = sorted(path.name for path in code.rglob("*"))
    flags = ["--peer", "cut", "--code", code, "--minutes", "0.02", "--sweep", "strength=1", "cfg_scale=1"]
    done = call(studio, "benchmarks/peers.py", *PEERS, *flags, "--output", "report/cut")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    ours, *rows = figures["rows"]
    assert ours["name"] == "ours, strength 1, scale 1" and ours["seconds"] is None
    assert [row["name"] for row in rows] == ["cut, 0.01 minutes each way", "cut, 0.02 minutes each way"]
    for row, share in zip(rows, (0.5, 1), strict=True):
        assert 2 * 1.2 * share <= row["seconds"] <= 2 * (1.2 * share + 0.4)
        # A step takes 0.01 s, and what is half-written when the time is over does not count; a start takes some.
        assert row["steps"] % 5 == 0 and 0 < row["steps"] <= row["seconds"] / 2 / 0.01
        for way in (("cold", "warm"), ("warm", "cold")):
            found = row["->".join(way)]["ssim_to_source"]["mean"]
            assert found == pytest.approx(ssim_of_copies(studio, *way), abs=1e-5)
        assert row["cold->warm"]["style_success"]["mean"] == row["warm->cold"]["style_success"]["mean"] == 1
    assert figures["classifier_accuracy_uncoded"]["mean"] == 1
    assert [(margin["source"], margin["ours"]) for margin in figures["margins"]] == [
        (style, ours["name"] if ours[way]["style_success"]["mean"] == 1 else None)
        for style, way in (("cold", "cold->warm"), ("warm", "warm->cold")) * 2
    ]
    assert (studio / "report/cut/front.png").exists()
    assert len(list((studio / "report/cut").glob("*/cold_to_warm.png"))) == 3
    assert sorted(path.name for path in code.rglob("*")) == before, "the checkout is the user's"


def test_peers_benchmark_trains_cyclegan_once_and_knows_which_picture_became_what(peer_studio, tmp_path):
    studio, code = peer_studio
    peers = importlib.import_module("benchmarks.peers")
    pictures = load_styles(studio / "held_out", ["cold", "warm"], 32)
    reddish = SimpleNamespace(predict=lambda pixels: (pixels[:, 0] > pixels[:, 2]).float().mean((1, 2)).round().long())
    evaluator = SimpleNamespace(styles=["cold", "warm"], test=pictures, classifier=reddish)
    checkout = peers.Checkout(code, peers.PEERS["cyclegan"], None, 32, tmp_path / "work", tmp_path)
    (row,) = peers.run_peer(checkout, evaluator, studio / "raw_data", "cyclegan", 0.8)
    assert row.name == "cyclegan, both ways" and 0.8 <= row.seconds <= 1.2 and row.steps % 5 == 0
    there, back = row.directions["cold", "warm"], row.directions["warm", "cold"]
    assert len(there.names) == 5 and there.by_picture("style_success").all()
    assert there.by_picture("ssim_to_source").mean().item() == pytest.approx(
        ssim_of_copies(studio, "cold", "warm"), abs=1e-5
    )
    assert back.names == ["000", "001", "002"] and not back.by_picture("style_success").any()
    warm = torch.stack(list(pictures["warm"].values()))
    assert back.by_picture("ssim_to_source").tolist() == pytest.approx(ssim(warm, warm.flip(2)).tolist(), abs=1e-5)


def test_peers_benchmark_refuses_bad_input_in_one_line(peer_studio, tmp_path):
    studio, code = peer_studio
    (tmp_path / "empty/cold").mkdir(parents=True)
    (tmp_path / "empty/warm").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    shutil.copytree(code, tmp_path / "half")
    (tmp_path / "half/models/cut_model.py").unlink()
    base = dict(zip(PEERS[::2], PEERS[1::2], strict=True)) | {"--peer": "cut", "--code": code, "--minutes": "1"}
    for changes, words in (
        ({"--code": tmp_path / "other"}, ("--code", "other: has no train.py", "checkout")),
        ({"--code": tmp_path / "half"}, ("half: has no models/cut_model.py",)),
        ({"--code": tmp_path / "nowhere"}, ("nowhere: has no train.py",)),
        ({"--peer": "pix2pix"}, ("--peer pix2pix", "cut, cyclegan")),
        ({"--minutes": "0"}, ("--minutes 0: must be more than 0",)),
        ({"--minutes": "-3"}, ("--minutes -3: must be more than 0",)),
        ({"--minutes": "nan"}, ("--minutes nan: must be more than 0",)),
        ({"--train_data": tmp_path / "empty"}, ("empty", "holds no pictures")),
        ({"--data": tmp_path / "empty"}, ("--data", "empty", "holds no pictures")),
        ({"--data": tmp_path / "nowhere"}, ("--data", "nowhere", "holds no pictures")),
        ({"--checkpoint": tmp_path / "none.pt"}, ("none.pt", "no such checkpoint")),
    ):
        flags = [str(text) for pair in (base | changes).items() for text in pair]
        refused(call_within(studio, "benchmarks.peers", *flags), *words)
    assert not (studio / "report/peers").exists()


def test_peers_benchmark_says_what_a_checkout_lacks_before_any_time_is_spent(peer_studio, tmp_path):
    studio, code = peer_studio
    flags = [*PEERS, "--peer", "cut", "--code", str(code), "--output", "report/lacks"]
    (code / "train.py").write_text("import dominate_is_not_here")
    refused(call_within(studio, "benchmarks.peers", *flags), "needs the package dominate_is_not_here; pip install")
    (code / "train.py").write_text("raise ValueError('no such\\nnorm')")
    refused(call_within(studio, "benchmarks.peers", *flags), "train.py ended with status 1 (norm)", "cut.log")


def test_peers_benchmark_refuses_a_time_in_which_the_peer_saves_nothing(peer_studio, tmp_path):
    studio, code = peer_studio
    peers = importlib.import_module("benchmarks.peers")
    (code / "train.py").write_text("")  # ends at once
    pictures = load_styles(studio / "held_out", ["cold", "warm"], 32)
    evaluator = SimpleNamespace(styles=["cold", "warm"], test=pictures)
    checkout = peers.Checkout(code, peers.PEERS["cut"], None, 32, tmp_path / "work", tmp_path)
    with pytest.raises(peers.UserError, match=r"--minutes 0.5: cut saved no weights within 0.5 of it; give more"):
        peers.run_peer(checkout, evaluator, studio / "raw_data", "cut", 30)


def test_peers_benchmark_trains_ours_with_the_epochs_that_fit_the_time(tmp_path, monkeypatch):
    peers = importlib.import_module("benchmarks.peers")
    asked: list[tuple[str, int, float]] = []

    def run_metered(command, log, limit_s, on_gpu, graceful):
        flags = [text for text in command if "stage1_epochs" in text]
        epochs = int(flags[0].rpartition("=")[2]) if flags else 0
        asked.append((command[1].rpartition("/")[2], epochs, limit_s))
        return (5 + 2 * epochs, 0) if epochs else (10, 1)  # a bad picture was passed over

    monkeypatch.setattr(peers, "run_metered", run_metered)
    monkeypatch.setattr(peers, "newest_checkpoint", lambda folder: (folder / "stage1_epoch41.pt", None))
    args = SimpleNamespace(output=tmp_path, train_data=tmp_path, config="c.json", overrides=[], minutes=100 / 60)
    path, seconds = peers.train_ours(args, torch.device("cpu"), 100)
    # 97 s less 10 of preprocessing and 5 of a start leave 82, or 41 epochs of 2 s; the two short runs do not count.
    assert asked == [
        ("preprocess_latents.py", 0, 100), ("train.py", 1, 100), ("train.py", 3, 100), ("train.py", 41, 90)
    ]  # fmt: skip
    assert seconds == 10 + 5 + 2 * 41 and path == tmp_path / "ours/run/stage1_epoch41.pt"
    with pytest.raises(peers.UserError, match="an epoch of ours takes 17 s"):
        peers.train_ours(args, torch.device("cpu"), 16)
