"""Which pictures are drawn at a step: every style as often as any other, where the config asks for that."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isonext.config import TrainingConfig
from isonext.data.dataset import LatentSplit
from isonext.data.store import LatentSpec
from isonext.flow.base import Base
from isonext.training import batches
from isonext.training.batches import draw_batch
from isonext.training.resume import FIXED


def split_of(counts: list[int]) -> LatentSplit:
    """Pictures of as many styles, those of a style not side by side; a latent's one number is its picture's."""
    styles = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    styles = styles[torch.randperm(len(styles), generator=torch.Generator().manual_seed(1))]
    latents = np.arange(len(styles), dtype=np.float32).reshape(1, -1, 1, 1, 1)
    spec = LatentSpec("dct:f4c1", 1, 4, 4, [str(style) for style in range(len(counts))], mean=[0.0], std=[1.0])
    return LatentSplit(spec, latents, styles, [f"{style}/{n}" for n, style in enumerate(styles.tolist())])


def drawn(split: LatentSplit, batch: int, steps: range, rows: slice = batches.ALL, **options) -> list[int]:
    """The pictures of these steps, one after another."""
    training = TrainingConfig(batch_size=batch, balance="equal", **options)
    return [
        int(number)
        for step in steps
        for number in draw_batch(split, Base(), training, step, len(split.spec.styles), rows).x1.flatten()
    ]


def test_two_styles_of_six_and_two_pictures_by_hand():
    split = split_of([6, 2])
    styles = split.styles.tolist()
    seen = drawn(split, 4, range(2))  # an epoch: 8 pictures, 4 of each style
    assert [styles[number] for number in seen] == [0, 1] * 4
    large, small = seen[::2], seen[1::2]
    assert len(set(large)) == 4, "four of the six"
    assert set(small[:2]) == set(small[2:]) == {n for n, style in enumerate(styles) if style == 1}
    following = drawn(split, 4, range(2, 4))[::2]
    assert set(large) | set(following[:2]) == {n for n, style in enumerate(styles) if style == 0}, "the rest come first"


COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, batch=st.integers(1, 12), epoch=st.integers(0, 3), seed=st.integers(0, 3))
def test_over_an_epoch_styles_differ_by_one_draw_at_most_and_so_do_the_pictures_of_a_style(counts, batch, epoch, seed):
    split, batch = split_of(counts), min(batch, sum(counts))
    steps = sum(counts) // batch
    seen = drawn(split, batch, range(epoch * steps, (epoch + 1) * steps), seed=seed)
    styles = Counter(split.styles[seen].tolist())
    assert max(styles.values()) - min(styles[style] for style in range(len(counts))) <= 1
    from_start = [*drawn(split, batch, range(epoch * steps), seed=seed), *seen]
    for style, count in enumerate(counts):
        mine = [number for number in from_start if split.styles[number] == style]
        for start in range(0, len(mine), count):  # each picture once before any comes twice
            assert len(set(mine[start : start + count])) == len(mine[start : start + count])


def test_a_style_of_fewer_pictures_than_a_batch_has_its_share_of_every_batch():
    split, small = split_of([40, 3]), Counter()
    for step in range(4):
        seen = drawn(split, 16, range(step, step + 1))
        assert Counter(split.styles[seen].tolist()) == {0: 8, 1: 8}
        small.update(n for n in seen if split.styles[n] == 1)
        assert len(small) == 3 and max(small.values()) - min(small.values()) <= 1


def test_equal_draws_are_a_function_of_seed_and_step_and_a_process_reads_its_own_rows():
    split = split_of([9, 4, 2])
    forwards = [drawn(split, 6, range(step, step + 1)) for step in range(8)]
    batches.balanced_order.cache_clear()
    backwards = [drawn(split, 6, range(step, step + 1)) for step in reversed(range(8))][::-1]
    assert forwards == backwards
    assert len({tuple(batch) for batch in forwards}) == 8
    assert drawn(split, 6, range(1), seed=1) != forwards[0]
    for rank in range(2):
        assert drawn(split, 6, range(3, 4), slice(rank, None, 2)) == forwards[3][rank::2]


@pytest.mark.parametrize("counts", [[5, 5, 5], [12, 2, 1]])
def test_natural_is_the_default_and_draws_every_picture_once_an_epoch(counts):
    split, training = split_of(counts), TrainingConfig(batch_size=5)
    assert training.balance == "natural"
    seen = [n for step in range(3) for n in draw_batch(split, Base(), training, step, 3).x1.flatten().int().tolist()]
    assert sorted(seen) == list(range(15))


def test_a_run_may_go_on_with_another_balance():
    assert "balance" not in FIXED
