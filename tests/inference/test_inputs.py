"""From files to batches and back: what is found, in which order it is read, and the threads beside the network."""

import itertools
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isonext.data.pt_store import write_latent
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.inference.inputs import Job, find_jobs, load_batches, load_stored_latent, plan_batches
from isonext.utils.io import ahead, in_background, written_whole

#################################################################################
#                               Reading ahead                                   #
#################################################################################


@settings(deadline=None, max_examples=25)
@given(count=st.integers(0, 40), look_ahead=st.integers(0, 12))
def test_results_come_in_the_order_of_their_items_however_long_each_takes(count, look_ahead):
    def work(number):
        time.sleep((number * 7 % 5) / 5000)
        return number * number

    assert list(ahead(work, iter(range(count)), look_ahead)) == [number * number for number in range(count)]


@pytest.mark.parametrize("look_ahead", [1, 3, 8])
def test_no_more_than_so_many_are_read_ahead_of_the_one_in_use(look_ahead):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield number

    results = ahead(lambda number: number, endless(), look_ahead)
    for current in range(10):
        assert next(results) == current
        assert len(taken) <= current + 1 + look_ahead
    assert len(taken) > 10, "something was read ahead"
    results.close()


def test_it_is_read_in_other_threads_while_the_network_works():
    started, here = {}, threading.get_ident()

    def read(number):
        started[number] = threading.get_ident()
        return number

    results = ahead(read, range(6), 4)
    assert next(results) == 0
    patience = time.monotonic() + 10
    while len(started) < 5 and time.monotonic() < patience:  # nobody asks for more meanwhile
        time.sleep(0.001)
    assert sorted(started) == [0, 1, 2, 3, 4]
    assert here not in started.values()
    assert list(results) == [1, 2, 3, 4, 5]


def test_what_reading_raises_is_raised_in_its_place_after_all_that_came_before():
    def read(number):
        if number == 3:
            raise UserError("the third")
        return number

    results, got = ahead(read, range(10), 5), []
    with pytest.raises(UserError, match="the third"):
        for result in results:
            got.append(result)
    assert got == [0, 1, 2]


def test_an_error_of_the_items_themselves_is_let_through():
    def items():
        yield 1
        raise KeyError("items")

    with pytest.raises(KeyError, match="items"):
        list(ahead(str, items(), 2))


#################################################################################
#                            Writing in the background                          #
#################################################################################


def test_submitting_does_not_wait_and_everything_is_done_when_the_block_is_left():
    done, gate = [], threading.Event()

    def write(number):
        assert gate.wait(10)
        done.append(number)

    with in_background(32) as submit:
        for number in range(12):
            submit(write, number)
        assert done == []
        gate.set()
    assert sorted(done) == list(range(12))


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_a_submit_waits_while_too_many_calls_are_unfinished(at_once):
    lock, unfinished = threading.Lock(), [0]

    def slow():
        time.sleep(0.005)
        with lock:
            unfinished[0] -= 1

    with in_background(at_once) as submit:
        for _ in range(12):
            with lock:
                unfinished[0] += 1
            submit(slow)
            assert unfinished[0] <= at_once


def test_what_the_last_call_raises_is_raised_at_the_end():
    done, gate = [], threading.Event()

    def fail():
        gate.wait(10)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), in_background(32) as submit:
        submit(fail)
        submit(done.append, 1)
        done.append(2)
        gate.set()
    assert sorted(done) == [1, 2]


def test_what_an_early_call_raises_is_raised_soon_and_not_after_thousands_more():
    def fail():
        raise OSError("the disk is gone")

    submitted = 0
    with pytest.raises(OSError, match="the disk is gone"), in_background(32) as submit:
        for _ in range(1000):
            submit(fail if submitted == 0 else time.sleep, *([] if submitted == 0 else [0.001]))
            submitted += 1
    assert submitted < 100


def test_an_error_in_the_block_is_the_one_that_is_raised_and_what_was_submitted_is_still_done():
    done = []

    def slow(number):
        time.sleep(0.02)
        done.append(number)

    with pytest.raises(ZeroDivisionError), in_background(32) as submit:
        for number in range(3):
            submit(slow, number)
        _ = 1 / 0
    assert sorted(done) == [0, 1, 2]


def test_two_files_saved_at_once_whose_long_names_begin_alike_keep_their_own_contents(tmp_path):
    """Four threads save results, and pictures named after their prompts begin alike."""
    names = [tmp_path / f"{'a photograph of ' * 5}{number}.png" for number in (1, 2)]
    with written_whole(names[0]) as first, written_whole(names[1]) as second:
        first.write_text("one")
        second.write_text("two")
    assert [name.read_text() for name in names] == ["one", "two"]


#################################################################################
#                               What is to be done                              #
#################################################################################


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_folder_gives_every_picture_below_it_the_same_name_below_the_output(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "notes.txt", ".hidden.png"):
        touch(tmp_path / "in" / name)
    jobs = find_jobs(tmp_path / "in", tmp_path / "out")
    assert jobs == [
        Job(tmp_path / "in" / name, tmp_path / "out" / name) for name in ("a.JPG", "b.png", "deep/er/c.webp")
    ]


def test_a_result_whose_suffix_is_not_written_becomes_a_png_and_other_files_are_counted(tmp_path):
    for name in ("a.gif", "b.JP2", "c.jfif", "notes.txt"):
        touch(tmp_path / "in" / name)
    left_out = Counter()
    jobs = find_jobs(tmp_path / "in", tmp_path / "out", left_out)
    assert [job.output.name for job in jobs] == ["a.gif.png", "b.JP2.png", "c.jfif"] and left_out == {".txt": 1}


def test_an_output_that_a_linked_folder_of_the_input_leads_to_is_refused(tmp_path):
    touch(tmp_path / "in" / "a.png")
    touch(tmp_path / "out" / "deep" / "b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out" / "deep")
    with pytest.raises(UserError, match="lies there, by a link"):
        find_jobs(tmp_path / "in", tmp_path / "out")


def test_a_picture_that_size_would_enlarge_without_bounds_is_skipped_before_it_is(tmp_path):
    jobs = drawn(tmp_path, [(1, 5000), (16, 16)])
    skipped = []
    batches = list(load_batches(plan_batches(jobs, 512, 2), fake_pipeline(), 512, 2, skipped))
    assert [job.source for batch in batches for job in batch.jobs] == [jobs[1].source]
    (line,) = skipped
    assert line.startswith(f"{jobs[0].source}: ") and "512 x 2560000" in line


def test_a_result_too_wide_for_its_format_is_refused_before_the_work(tmp_path):
    Image.new("L", (66000, 1)).save(tmp_path / "wide.png")
    job = Job(tmp_path / "wide.png", tmp_path / "wide.jpg")
    words = r"wide\.png: its result .*wide\.jpg: would have 66000 x 1 pixels, a \.jpg has at most 65500 a side"
    with pytest.raises(UserError, match=words):
        list(load_batches(plan_batches([job], None, 1), fake_pipeline(), None, 1, None))


def test_a_sheet_of_styles_too_wide_for_its_format_is_refused_before_the_work(tmp_path):
    Image.new("L", (8200, 1)).save(tmp_path / "a.png")
    job = Job(tmp_path / "a.png", tmp_path / "a.jpg")
    assert len(list(load_batches(plan_batches([job], None, 1), fake_pipeline(), None, 1, None, on_sheet=3))) == 1
    with pytest.raises(UserError, match=r"a\.jpg: would have 65654 x \d+ pixels"):  # 8 x (8200 + 6) + 6
        list(load_batches(plan_batches([job], None, 1), fake_pipeline(), None, 1, None, on_sheet=9))


def test_what_the_autoencoder_raises_is_a_line_for_each_picture_of_the_batch_alone(tmp_path):
    jobs, skipped, pipeline = drawn(tmp_path, [(4, 4), (4, 4), (6, 6)]), [], fake_pipeline()
    encode = pipeline.encode

    def fail(pixels):
        if pixels.shape[-1] == 4:
            raise RuntimeError("not enough memory\nfor this")
        return encode(pixels)

    pipeline.encode = fail
    batches = list(load_batches(plan_batches(jobs, None, 2), pipeline, None, 2, skipped))
    assert [job.source for batch in batches for job in batch.jobs] == [jobs[2].source]
    advice = "a smaller --size or --batch_size takes less"
    assert skipped == [f"{job.source}: cannot be encoded (not enough memory); {advice}" for job in jobs[:2]]
    with pytest.raises(RuntimeError, match="not enough memory"):
        list(load_batches(plan_batches(jobs[:1], None, 1), pipeline, None, 1, None))


def test_one_picture_may_change_its_format(tmp_path):
    source = touch(tmp_path / "a.png")
    assert find_jobs(source, tmp_path / "new" / "b.webp") == [Job(source, tmp_path / "new" / "b.webp")]


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("nowhere", "out", ["nowhere", "no such file or folder"]),
        ("in", "in", ["overwritten"]),
        ("in", "in/out", ["overwritten"]),
        ("in", "in/../in/deep/..", ["overwritten"]),
        ("link", "in/out", ["overwritten"]),
        ("in/a.png", "in/a.png", ["overwritten"]),
        ("in", "file.png", ["is a file", "give a folder"]),
        ("empty", "out", ["holds no pictures", ".png"]),
        ("in/a.png", "empty", ["is a folder"]),
        ("in/a.png", "out", ["file name ending in", ".png"]),
        ("in/a.png", "out.gif", ["file name ending in", ".png"]),
    ],
)
def test_what_would_go_wrong_at_the_end_is_refused_at_the_start(tmp_path, source, output, words):
    touch(tmp_path / "in" / "a.png")
    touch(tmp_path / "in" / "deep" / "b.png")
    touch(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(UserError) as caught:
        find_jobs(tmp_path / source, tmp_path / output)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


#################################################################################
#                                    Batches                                    #
#################################################################################


def drawn(folder: Path, sizes: list[tuple[int, int] | None]) -> list[Job]:
    """Plain pictures of the sizes (width, height), number n of grey n; None is a broken one."""
    jobs = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:02}.png"
        if size is None:
            path.write_bytes(b"no picture")
        else:
            Image.new("RGB", size, (number,) * 3).save(path)
        jobs.append(Job(path, folder / "out" / path.name))
    return jobs


def fake_pipeline(compiled: bool = False) -> SimpleNamespace:
    """Its latents are the 8-bit values of the pixels."""
    any_size = {"check_size": lambda path, size: None}
    return SimpleNamespace(compiled=compiled, encode=lambda pixels: (pixels + 1) * 127.5, **any_size)


def greys(batch) -> list[int]:
    flat = batch.latents.flatten(1)
    assert (flat == flat[:, :1]).all()
    return flat[:, 0].round().int().tolist()


def test_pictures_of_one_size_share_batches_wherever_they_stand(tmp_path):
    small, wide = (4, 3), (6, 3)
    jobs = drawn(tmp_path, [small, small, small, wide, small, None, small, wide, wide])
    skipped = []
    batches = list(load_batches(plan_batches(jobs, None, 2), fake_pipeline(), None, 2, skipped))
    assert [greys(batch) for batch in batches] == [[0, 1], [2, 4], [6], [3, 7], [8]]
    assert [batch.size for batch in batches] == [(3, 4)] * 3 + [(3, 6)] * 2
    assert [jobs.index(job) for batch in batches for job in batch.jobs] == [0, 1, 2, 4, 6, 3, 7, 8]
    assert skipped == [f"{jobs[5].source}: not a picture"]


def test_it_is_compiled_by_what_full_batches_of_a_size_hold(tmp_path):
    small, wide, once = (4, 3), (6, 3), (2, 2)
    jobs, asked = drawn(tmp_path, [small, wide, small, once, small, wide, None, small, small]), []

    def compiles(size, pictures):
        asked.append((size, pictures))
        return pictures >= 4

    batches = plan_batches(jobs, None, 2, compiles)
    assert [(len(batch.jobs), batch.compiled) for batch in batches] == [
        (2, True), (2, True), (1, False), (2, False), (1, False), (1, False)
    ]  # fmt: skip
    assert set(asked) == {(small, 4), (small, 0), (wide, 2), (once, 0)}
    assert not any(batch.compiled for batch in load_batches(batches, fake_pipeline(), None, 2, []))  # no compiler
    loaded = list(load_batches(batches, fake_pipeline(compiled=True), None, 2, []))
    assert [batch.compiled for batch in loaded] == [True, True] + [False] * 3
    assert [len(batch.latents) for batch in loaded] == [2, 2, 1, 2, 1], "what is left over is not filled up"


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.sampled_from([(3, 2), (2, 3), None]), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    compiled=st.booleans(),
)
def test_every_good_picture_is_in_exactly_one_batch(tmp_path_factory, sizes, batch_size, compiled):
    jobs, skipped = drawn(tmp_path_factory.mktemp("batches"), sizes), []
    planned = plan_batches(jobs, None, batch_size, lambda size, pictures: compiled)
    batches = list(load_batches(planned, fake_pipeline(compiled), None, batch_size, skipped))
    good = [number for number, size in enumerate(sizes) if size]
    order = sorted(good, key=lambda number: sizes.index(sizes[number]))  # of one size together
    assert [job for batch in batches for job in batch.jobs] == [jobs[number] for number in order]
    assert [grey for batch in batches for grey in greys(batch)[: len(batch.jobs)]] == order
    counts = [sizes.count(size) for size in dict.fromkeys(filter(None, sizes))]
    expected = [min(batch_size, count - n) for count in counts for n in range(0, count, batch_size)]
    assert [len(batch.jobs) for batch in batches] == expected
    assert len(skipped) == len(sizes) - len(good)
    if compiled:  # filled up to one shape with the last picture, so that there is one graph
        for batch in batches:
            last = greys(batch)[len(batch.jobs) - 1]
            assert greys(batch)[len(batch.jobs) :] == [last] * (batch_size - len(batch.jobs))
            assert len(batch.latents) == batch_size
    else:
        assert all(len(batch.latents) == len(batch.jobs) for batch in batches)


def test_resizing_comes_before_batching_so_that_other_sizes_may_meet(tmp_path):
    jobs = drawn(tmp_path, [(8, 4), (16, 8), (4, 8)])
    batches = list(load_batches(plan_batches(jobs, 2, 8), fake_pipeline(), 2, 8, None))
    assert [(greys(batch), batch.size) for batch in batches] == [([0, 1], (2, 4)), ([2], (4, 2))]


def test_a_single_broken_picture_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not a picture"):
        list(load_batches(plan_batches(drawn(tmp_path, [None]), None, 1), fake_pipeline(), None, 1, None))


def test_a_stored_latent_is_standardised_and_knows_its_pictures_size(tmp_path):
    spec = LatentSpec("dct", 2, 4, 8, ["a", "b"], mean=[1.0, -1.0], std=[2.0, 0.5])
    latent = torch.arange(12.0).view(2, 2, 3)
    write_latent(tmp_path / "a.png.pt", latent, None, [0, 0])
    pipeline, job = (
        SimpleNamespace(spec=spec, device=torch.device("cpu"), check_size=lambda path, size: None),
        Job(tmp_path / "a.png.pt", tmp_path / "o.png"),
    )
    loaded = load_stored_latent(job, pipeline)
    expected = np.stack([(latent[0].numpy() - 1) / 2, (latent[1].numpy() + 1) / 0.5])
    np.testing.assert_array_equal(loaded.latents[0].numpy(), expected)
    assert (loaded.jobs, loaded.size) == ([job], (8, 12))
    spec.channels = 4
    with pytest.raises(UserError, match=r"has 2 channels, the checkpoint's latents 4"):
        load_stored_latent(job, pipeline)
