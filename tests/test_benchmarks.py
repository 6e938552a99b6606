"""The benchmarks and the smoke check: each runs, and its last line is JSON with what its table says."""

import json

import pytest

from helpers import CHECKPOINT, ROOT, call, refused
from isonext.config import config_to_dict
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
        assert row["all"] == pytest.approx(sum(parts), abs=0.05)


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
