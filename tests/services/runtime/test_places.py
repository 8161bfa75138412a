"""ConcurrencyLimit are refused beyond their limit and always given back."""

import pytest

from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.errors import QueueFull


def test_what_finds_no_place_is_refused_until_one_is_given_back():
    places = ConcurrencyLimit(2)
    with places.one():
        with places.one(), pytest.raises(QueueFull) as refused, places.one():
            pass
        assert refused.value.limit == 2
        with places.one():
            assert places.taken_count == 2
    assert places.taken_count == 0


def test_a_failure_gives_its_place_back():
    places = ConcurrencyLimit(1)
    with pytest.raises(ZeroDivisionError), places.one():
        raise ZeroDivisionError
    assert places.taken_count == 0
