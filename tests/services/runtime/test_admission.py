"""A full ConcurrencyLimit refuses requests, and every slot is given back."""

import pytest

from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.errors import QueueFull
from tests.services.fakes.simulated_device import metric


def test_a_request_without_a_free_slot_is_refused_until_one_is_given_back():
    limit = ConcurrencyLimit(2)
    with limit.slot():
        with limit.slot(), pytest.raises(QueueFull) as refused, limit.slot():
            pass
        assert refused.value.limit == 2
        with limit.slot():
            assert limit.in_use == 2
    assert limit.in_use == 0


def test_slots_in_use_and_their_limit_are_metrics():
    limit = ConcurrencyLimit(3, "toy")
    assert (metric("klein_slots_in_use", stage="toy"), metric("klein_slots_limit", stage="toy")) == (0, 3)
    with limit.slot(), limit.slot():
        assert metric("klein_slots_in_use", stage="toy") == 2
    assert metric("klein_slots_in_use", stage="toy") == 0


def test_a_failure_gives_its_slot_back():
    limit = ConcurrencyLimit(1)
    with pytest.raises(ZeroDivisionError), limit.slot():
        raise ZeroDivisionError
    assert limit.in_use == 0
