"""Work shared by processes: in order, and no further ahead than need be."""

import pytest

from paragraph_ocr.data.parallel import in_order


def double(number: int) -> int:
    if number < 0:
        raise ValueError(number)
    return 2 * number


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 41])
def test_results_come_in_order(num_workers, count):
    made = in_order(double, iter(range(count)), num_workers=num_workers, chunk=4)
    assert list(made) == [2 * number for number in range(count)]


def test_items_are_taken_no_sooner_than_they_are_needed():
    taken = []

    def items():
        for number in range(10_000):
            taken.append(number)
            yield number

    made = in_order(double, items(), num_workers=2, chunk=4)
    assert next(made) == 0
    assert len(taken) <= 4 * (4 * 2 + 2)
    made.close()


def test_an_error_in_a_worker_or_in_the_items_reaches_the_consumer():
    with pytest.raises(ValueError):
        list(in_order(double, [*range(20), -1], num_workers=2, chunk=4))

    def items():
        yield from range(20)
        raise KeyError

    with pytest.raises(KeyError):
        list(in_order(double, items(), num_workers=2, chunk=4))
