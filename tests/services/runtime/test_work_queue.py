"""The queue of a worker: order, fairness between callers, bounds and estimates, in simulated time."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_services.runtime.caller import Caller
from klein_services.runtime.errors import DeadlineUnreachable, QueueFull
from klein_services.runtime.urgency import Urgency
from klein_services.runtime.work_queue import (
    AGING_SECONDS,
    LARGE_PIXEL_COUNT,
    PATIENCE_SECONDS,
    Work,
    WorkQueue,
)

ALONE = Caller(name="alone")


class Simulator:
    """One thread that works off a queue; each work takes the seconds that its operation's name says."""

    def __init__(self, call_limit=10_000, pixel_limit=0, thread_count=1):
        self.queue = WorkQueue(call_limit, pixel_limit, thread_count, randomness=lambda: 0.5)
        self.now = 0.0
        self.served = []

    def add(self, seconds=1.0, *, caller=ALONE, urgency=Urgency.STANDARD, deadline=None, pixels=0):
        work = Work(
            operation=str(seconds),
            pixel_count=pixels,
            urgency=urgency,
            caller=caller,
            deadline=deadline,
            queued_at=self.now,
        )
        self.queue.add(work, self.now)
        return work

    def learn(self, *durations, pixels=0):
        """Has every duration measured."""
        for seconds in durations:
            for _ in range(3):
                self.queue.times.observe(str(seconds), pixels, seconds)

    def begin(self):
        return self.queue.take(self.now)

    def end(self, work):
        seconds = float(work.operation)
        self.now += seconds
        self.queue.done(work, seconds, is_measured=True)
        self.served.append(work)
        return work

    def run_one(self):
        return self.end(self.begin())

    def run_all(self):
        while len(self.queue):
            self.run_one()
        return self.served


durations = st.sampled_from([0.125, 0.5, 1.0, 4.0])
callers = st.sampled_from(
    [Caller(name="a"), Caller(name="b", weight=0.5), Caller(name="c", weight=4.0), Caller(name="d")]
)
deadlines = st.none() | st.floats(5_000, 50_000)


@given(st.lists(st.tuples(durations, st.sampled_from(Urgency), deadlines), max_size=30))
def test_one_caller_gets_classes_then_deadlines_then_arrival(arrivals):
    simulator = Simulator()
    works = [simulator.add(seconds, urgency=urgency) for seconds, urgency, _ in arrivals]
    works += [simulator.add(s, urgency=urgency, deadline=(d or 0) / 1_000) for s, urgency, d in arrivals if d]
    in_order = sorted(works, key=lambda work: (work.urgency, *work.due))
    assert list(simulator.queue) == in_order


@given(st.lists(st.tuples(durations, callers, st.sampled_from(Urgency), deadlines), max_size=30))
def test_all_that_waits_is_served_once_in_the_order_that_the_queue_shows(arrivals):
    simulator = Simulator()
    simulator.learn(0.125, 0.5, 1.0, 4.0)
    for seconds, caller, urgency, deadline in arrivals:
        simulator.add(seconds, caller=caller, urgency=urgency, deadline=deadline)
    shown = list(simulator.queue)
    assert len(shown) == len(arrivals)
    while len(simulator.queue) and simulator.now < AGING_SECONDS:
        simulator.run_one()
    assert simulator.served == shown[: len(simulator.served)]
    simulator.run_all()
    assert sorted(work.sequence for work in simulator.served) == list(range(len(arrivals)))


@given(
    st.integers(0, 40),
    st.lists(durations, min_size=200, max_size=200),
    durations,
    st.booleans(),
)
def test_200_waiting_delay_a_caller_with_one_by_at_most_one_of_them(before, crowd, own, is_measured):
    simulator = Simulator()
    if is_measured:
        simulator.learn(0.125, 0.5, 1.0, 4.0)
    for seconds in crowd:
        simulator.add(seconds, caller=Caller(name="crowd"))
    for _ in range(before):
        simulator.run_one()
    running = simulator.begin()
    single = simulator.add(own, caller=Caller(name="single"))
    simulator.end(running)
    begun = simulator.now
    while simulator.run_one() is not single:
        pass
    assert simulator.now - own - begun <= max(crowd)
    assert len(simulator.served) <= before + 3


@given(st.lists(st.tuples(st.floats(0.25, 8), durations), min_size=2, max_size=5), st.integers(5, 80))
def test_busy_callers_share_by_their_weights(flows, count):
    simulator = Simulator()
    named = [(Caller(name=str(index), weight=weight), s) for index, (weight, s) in enumerate(flows)]
    simulator.learn(*(seconds for _, seconds in named))
    for caller, seconds in named:
        for _ in range(count):
            simulator.add(seconds, caller=caller)
    for _ in range(count):  # so that none runs out of work
        simulator.run_one()
    assert not any(work.is_starving_turn for work in simulator.served), "there is one class"
    got = {
        caller.name: sum(float(w.operation) for w in simulator.served if w.caller is caller) / caller.weight
        for caller, _ in named
    }
    for (one, seconds), (other, others) in itertools.combinations(named, 2):
        difference = abs(got[one.name] - got[other.name])
        assert difference <= seconds / one.weight + others / other.weight + 1e-6


def test_a_caller_that_was_idle_has_saved_nothing_up():
    simulator = Simulator()
    simulator.learn(1.0)
    busy, late = Caller(name="busy"), Caller(name="late")
    for _ in range(100):
        simulator.add(caller=busy)
    for _ in range(50):
        simulator.run_one()
    for _ in range(20):
        simulator.add(caller=late)
    names = [simulator.run_one().caller.name for _ in range(20)]
    assert 9 <= names.count("late") <= 11


@given(st.lists(st.tuples(durations, callers), min_size=1, max_size=20))
def test_no_class_starves_and_no_caller(waiting):
    simulator = Simulator()
    simulator.learn(0.125, 0.5, 1.0, 4.0)
    works = [simulator.add(s, caller=caller, urgency=Urgency.BATCH) for s, caller in waiting]
    # An eighth of the time, and what one more turn of any length takes for each.
    limit = AGING_SECONDS + 8 * sum(seconds + 1 for seconds, _ in waiting) + 8
    while any(work.started_at is None for work in works):
        simulator.add(0.5, urgency=Urgency.INTERACTIVE)
        simulator.run_one()
        assert simulator.now <= limit
    urgent = [work for work in simulator.served if work.urgency is Urgency.INTERACTIVE]
    late = sum(float(work.operation) for work in works) - 4
    assert len(urgent) * 0.5 >= min(simulator.now - AGING_SECONDS, late), "most of the time is theirs"


def test_work_without_a_deadline_is_not_starved_by_its_callers_deadlines():
    simulator = Simulator()
    patient = simulator.add(1.0)
    while patient.started_at is None:
        simulator.add(1.0, deadline=simulator.now + 10)
        simulator.run_one()
        assert simulator.now <= PATIENCE_SECONDS + 2


def test_the_bound_in_calls_counts_what_waits_beyond_one_for_each_thread():
    simulator = Simulator(call_limit=2)
    for _ in range(3):
        simulator.add()
    with pytest.raises(QueueFull, match=r"2 requests wait"):
        simulator.add()
    simulator.run_one()
    simulator.add()


def test_the_bound_in_pixels_is_of_large_works_and_lets_a_single_one_pass():
    simulator = Simulator(pixel_limit=LARGE_PIXEL_COUNT + 9)
    alone = simulator.add(pixels=2 * LARGE_PIXEL_COUNT)
    with pytest.raises(QueueFull, match="pixels of large images wait"):
        simulator.add(pixels=LARGE_PIXEL_COUNT + 1)
    simulator.add(pixels=LARGE_PIXEL_COUNT)
    assert simulator.queue.large_pixel_count == 2 * LARGE_PIXEL_COUNT
    simulator.queue.remove(alone)
    assert simulator.queue.large_pixel_count == 0
    simulator.add(pixels=LARGE_PIXEL_COUNT + 9)


def test_refused_works_are_asked_to_come_back_one_by_one_as_places_become_free():
    simulator = Simulator(call_limit=1)
    simulator.learn(4.0, 8.0)
    running = simulator.add(4.0)
    assert simulator.begin() is running
    simulator.add(8.0)
    simulator.now = 1.0
    hints = []
    for _ in range(3):
        with pytest.raises(QueueFull) as refused:
            simulator.add(4.0)
        hints.append(refused.value.retry_after_seconds)
    # The running one ends in 3 s, and works take 6 s in the mean.
    assert hints == [3.0, 9.0, 15.0]
    simulator.end(running)
    simulator.run_all()
    # Promises end with the work.
    simulator.add(4.0)
    simulator.begin()
    simulator.add(4.0)
    with pytest.raises(QueueFull) as refused:
        simulator.add(4.0)
    assert refused.value.retry_after_seconds == 4.0


def test_refused_large_works_are_asked_to_come_back_when_large_ones_end():
    simulator = Simulator(pixel_limit=3 * LARGE_PIXEL_COUNT, thread_count=2)
    simulator.learn(2.0, pixels=LARGE_PIXEL_COUNT * 2)
    small = simulator.add(0.125)
    large = simulator.add(2.0, pixels=LARGE_PIXEL_COUNT * 2)
    assert [simulator.begin(), simulator.begin()] == [small, large]
    hints = []
    for _ in range(2):
        with pytest.raises(QueueFull, match="pixels") as refused:
            simulator.add(2.0, pixels=LARGE_PIXEL_COUNT * 2)
        hints.append(refused.value.retry_after_seconds)
    assert hints == [2.0, 4.0]


def test_large_works_run_one_at_a_time_and_small_ones_pass_them():
    simulator = Simulator(thread_count=3)
    large = [simulator.add(caller=Caller(name=name), pixels=64 << 20) for name in "ab"]
    small = [simulator.add(caller=Caller(name="b"), pixels=64 * 64) for _ in range(2)]
    assert [simulator.begin() for _ in range(4)] == [large[0], *small, None]
    simulator.end(large[0])
    assert simulator.begin() is large[1]


def test_a_deadline_that_cannot_be_met_is_refused_by_measured_times_only():
    simulator = Simulator()
    for _ in range(3):
        simulator.add(4.0)
    simulator.add(4.0, deadline=1.0)  # never measured
    simulator.learn(4.0)
    with pytest.raises(DeadlineUnreachable) as raised:
        simulator.add(4.0, deadline=7.5)
    assert raised.value.estimated_seconds == pytest.approx(8.0), "after the earlier deadline"
    assert len(simulator.queue) == 4
    simulator.add(4.0, deadline=8.5)


def test_the_shortest_of_the_last_times_decides():
    simulator = Simulator()
    simulator.learn(1.0)
    simulator.queue.times.observe("1.0", 0, 0.5)
    simulator.add(1.0)
    simulator.add(1.0, deadline=0.6)
    for _ in range(8):
        simulator.queue.times.observe("1.0", 0, 1.0)
    with pytest.raises(DeadlineUnreachable):
        simulator.add(1.0, deadline=0.6)


def test_an_idle_thread_tries_what_was_once_slow():
    simulator = Simulator()
    simulator.learn(4.0)
    assert simulator.add(4.0, deadline=1.0) is simulator.run_one()


def test_small_works_are_not_refused_for_large_ones_that_they_pass():
    simulator = Simulator(thread_count=2)
    simulator.learn(4.0, pixels=64 << 20)
    simulator.learn(1.0)
    for _ in range(5):
        simulator.add(4.0, pixels=64 << 20)
    simulator.begin()
    simulator.add(1.0, deadline=1.5)


@given(st.lists(st.tuples(durations, callers, st.sampled_from(Urgency)), max_size=20), st.data())
def test_removed_work_never_runs_and_leaves_nothing(arrivals, data):
    simulator = Simulator()
    works = [simulator.add(s, caller=caller, urgency=urgency) for s, caller, urgency in arrivals]
    removed = [work for work in works if data.draw(st.booleans())]
    for work in removed:
        simulator.queue.remove(work)
        simulator.queue.remove(work)
    assert set(simulator.run_all()) == set(works) - set(removed)
    assert simulator.queue.backlog_seconds == 0
    assert not simulator.queue.running
