"""Queue, fair share and budgets under a clock of our own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.actors.serving.limits import Admission, Budget, FairQueue, KeyBudgets, Place
from fewstep.actors.serving.refusals import BudgetSpent, QueueFull


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def place(key: str = "a", cost: float = 10.0, weight: float = 1.0, priority: int = 0) -> Place:
    return Place(key, weight, cost, priority)


def serve(queue: FairQueue, num: int) -> list[str]:
    """Keys in the order of service, one at a time."""
    order = []
    for _ in range(num):
        found = queue.pop()
        assert found is not None
        order.append(found.key)
        queue.end(found, found.cost)
    return order


def test_a_flood_of_one_key_does_not_delay_another() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.push(place("flood"))
    assert serve(queue, 5) == ["flood"] * 5
    queue.push(place("late"))
    assert "late" in serve(queue, 2)


def test_shares_follow_the_weights_and_the_work_not_the_number_of_requests() -> None:
    queue = FairQueue()
    for _ in range(300):
        queue.push(place("light", cost=10))
        queue.push(place("heavy", cost=30))
        queue.push(place("double", cost=10, weight=2.0))
    order = serve(queue, 200)
    work = {
        "light": order.count("light") * 10,
        "heavy": order.count("heavy") * 30,
        "double": order.count("double") * 10,
    }
    assert work["heavy"] == pytest.approx(work["light"], abs=30)
    assert work["double"] == pytest.approx(2 * work["light"], abs=40)


def test_what_an_answer_took_counts_not_what_was_expected() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.push(place("guesses_low", cost=1))
        queue.push(place("honest", cost=20))
    took = {"guesses_low": 0.0, "honest": 0.0}
    for _ in range(60):
        found = queue.pop()
        assert found is not None
        took[found.key] += 20
        queue.end(found, 20)
    assert abs(took["guesses_low"] - took["honest"]) <= 20


def test_idling_earns_no_credit() -> None:
    queue = FairQueue()
    for _ in range(40):
        queue.push(place("busy"))
    serve(queue, 20)
    for _ in range(20):
        queue.push(place("sleeper"))
    order = serve(queue, 20)
    assert 8 <= order.count("busy") <= 12


def test_a_quick_return_does_not_erase_the_debt() -> None:
    # One at a time: the key is idle for a moment between any two of its requests.
    queue = FairQueue()
    for _ in range(40):
        queue.push(place("steady"))
    order = []
    queue.push(place("quick"))
    for _ in range(30):
        found = queue.pop()
        assert found is not None
        order.append(found.key)
        queue.end(found, found.cost)
        if found.key == "quick":
            queue.push(place("quick"))
    assert 14 <= order.count("quick") <= 16


def test_priority_decides_within_a_key_only() -> None:
    queue = FairQueue()
    low, high, other = place(), place(priority=5), place("b")
    for item in (low, high, other):
        queue.push(item)
    assert queue.pop() is high
    assert queue.pop() is other
    assert queue.pop() is low


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 50), st.sampled_from(["pop", "leave"]))))
def test_nothing_is_lost_and_nothing_is_kept(items: list[tuple[str, float, str]]) -> None:
    queue = FairQueue()
    places = [place(key, cost) for key, cost, _ in items]
    for item in places:
        queue.push(item)
    for item, (_, _, how) in zip(places, items, strict=True):
        if how == "leave":
            queue.remove(item)
    left = sum(how == "pop" for _, _, how in items)
    assert len(queue) == left
    assert sorted(serve(queue, left)) == sorted(key for key, _, how in items if how == "pop")
    assert queue.pop() is None
    assert queue._counters == {} == queue._waiting == queue._running


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    clock = Clock()
    admission = Admission(8, 4, clock)  # nine slots, see Admission
    running = [place() for _ in range(9)]
    for item in running:
        admission.offer([item])
    assert {item.state for item in running} == {"running"}
    waiting = [place() for _ in range(4)]
    admission.offer(waiting)
    with pytest.raises(QueueFull) as caught:
        admission.offer([place()])
    assert caught.value.headers == {"retry-after": "5"}
    for item in running[:4]:  # two answers a second
        clock.now += 0.5
        admission.end(item, 10)
    assert [item.state for item in waiting] == ["running"] * 4
    admission.offer([place() for _ in range(4)])
    with pytest.raises(QueueFull) as caught:
        admission.offer([place() for _ in range(4)])
    assert caught.value.retry_after_s == pytest.approx(4 / (4 / 1.5))


def test_places_end_once_wherever_they_are() -> None:
    admission = Admission(1, 10, Clock())
    places = [place() for _ in range(5)]
    admission.offer(places)
    assert (admission.num_running, admission.num_waiting) == (2, 3)
    for item in places[::-1] * 2:
        admission.end(item, 1)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


def test_a_request_larger_than_the_queue_runs_when_it_is_alone() -> None:
    admission = Admission(1, 2, Clock())
    admission.offer([place() for _ in range(10)])
    assert admission.num_waiting == 8
    with pytest.raises(QueueFull):
        admission.offer([place()])


def test_a_slot_is_announced_once() -> None:
    admission, told = Admission(1, 10, Clock()), []
    places = [Place("a", 1.0, 1.0, ready=lambda index=index: told.append(index)) for index in range(4)]
    admission.offer(places)
    assert told == [0, 1]
    admission.end(places[0], 1)
    assert told == [0, 1, 2]


def test_budgets_go_into_debt_and_refill() -> None:
    clock = Clock()
    budget = Budget(60.0, clock)
    budget.spend(90)
    assert budget.wait_s() == pytest.approx(30, abs=0.01)
    clock.now += 31
    assert budget.wait_s() == 0
    clock.now += 1000
    assert (budget.spend(0), budget.level) == (None, 60.0)
    assert Budget(None, clock).wait_s() == 0


def test_a_key_is_told_which_budget_is_spent() -> None:
    clock = Clock()
    budgets = KeyBudgets(requests=2, tokens=100, seconds=None, clock=clock)
    budgets.check()
    budgets.check()
    with pytest.raises(BudgetSpent, match="2 requests a minute"):
        budgets.check()
    clock.now += 60
    budgets.check()
    budgets.spend(500, 3.0)
    with pytest.raises(BudgetSpent, match="100 tokens a minute") as caught:
        budgets.check()
    assert caught.value.headers["retry-after"] == "241"
