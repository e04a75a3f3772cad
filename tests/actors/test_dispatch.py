"""Work is cut so that workers end together, and nothing is lost or done twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.actors.dispatch import Dispatch, wave_sizes


@given(st.integers(0, 2000), st.integers(1, 9), st.integers(1, 40))
def test_sizes_cover_the_work_and_never_grow(items: int, workers: int, smallest: int) -> None:
    sizes = wave_sizes(items, workers, smallest)
    assert sum(sizes) == items
    assert sizes == sorted(sizes, reverse=True)
    assert all(size >= smallest for size in sizes[:-1])


@given(
    st.integers(1, 300), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60)
)
def test_every_item_is_answered_once_whoever_dies(
    items: int, workers: int, events: list[tuple[int, bool]]
) -> None:
    dispatch = Dispatch(items, workers, min_chunk=4, max_tries=1000)
    answered: list[int] = []
    script = iter(events)
    while not dispatch.finished:
        for index in range(workers):
            if f"w{index}" not in dispatch.busy:
                dispatch.take(f"w{index}")
        index, dies = next(script, (0, False))
        worker = dispatch.busy[index % len(dispatch.busy)]
        if dies:
            assert dispatch.lost(worker)
        else:
            chunk = dispatch.done(worker)
            answered += range(chunk.start, chunk.stop)
    assert sorted(answered) == list(range(items))


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0])
def test_workers_of_unequal_speed_end_within_one_small_chunk(ratio: float) -> None:
    dispatch = Dispatch(256, 2, min_chunk=8)
    free_at, speed, longest_last = {"slow": 0.0, "fast": 0.0}, {"slow": 1.0, "fast": ratio}, 0
    while not dispatch.finished:
        worker = min(free_at, key=lambda name: free_at[name])
        chunk = dispatch.take(worker)
        if chunk is None:
            break
        dispatch.done(worker)
        free_at[worker] += (chunk.stop - chunk.start) / speed[worker]
        longest_last = chunk.stop - chunk.start
    assert longest_last <= 8
    assert abs(free_at["slow"] - free_at["fast"]) <= 24
    assert max(free_at.values()) <= 1.1 * 256 / (1 + ratio)


def test_a_chunk_that_kills_again_and_again_is_given_up() -> None:
    dispatch = Dispatch(4, 1, max_tries=2)
    dispatch.take("a")
    assert dispatch.lost("a")
    assert dispatch.lost("bystander")  # holds nothing
    dispatch.take("b")
    assert not dispatch.lost("b")


def test_a_busy_worker_takes_no_second_chunk() -> None:
    dispatch = Dispatch(100, 2)
    dispatch.take("a")
    with pytest.raises(ValueError, match="holds a chunk"):
        dispatch.take("a")
