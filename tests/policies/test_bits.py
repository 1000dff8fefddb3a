import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.compiled import compiled
from lightning_eplb.policies.bits import find_bit, find_common_bit


@compiled
def find(words, others, start, most):
    return find_bit(words, start), find_common_bit(words, others, start, most)


def as_words(numbers, size):
    words = [sum(1 << number % 64 for number in numbers if number // 64 == word) for word in range(size)]
    return np.array(words, dtype=np.uint64)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 3), st.integers(1, 20))
def test_the_next_number_of_a_set_and_of_two(data, size, most):
    sets = st.sets(st.integers(0, 64 * size - 1)) | st.just(set(range(64 * size)))
    one, two = data.draw(sets), data.draw(sets)
    start = data.draw(st.integers(0, 64 * size - 1))
    found, common = find(as_words(one, size), as_words(two, size), start, most)
    following = sorted(number for number in one if number >= start)
    assert found == (following[0] if following else 64 * size)
    assert common == next((number for number in following[:most] if number in two), -1)
