"""Sets of small whole numbers: a bit for each, in words of 64. Compiled."""

import numpy as np

from lightning_eplb.compiled import inlined


@inlined
def count_bits(word):
    """How many bits of a word are set."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@inlined
def below_lowest(word):
    """The bits below the lowest one that is set; all of them where none is."""
    return (word & (~word + np.uint64(1))) - np.uint64(1)


@inlined
def find_bit(words, start):
    """The first number of a set from ``start`` on; 64 times the words if there is none."""
    word = start >> 6
    part = (words[word] >> np.uint64(start & 63)) << np.uint64(start & 63)
    while part == 0 and word + 1 < words.size:
        word += 1
        part = words[word]
    return 64 * word + count_bits(below_lowest(part))


@inlined
def find_common_bit(words, others, start, most):
    """The first number from ``start`` on that is in both sets, if it is among the next ``most`` of the first; or -1."""
    word = start >> 6
    part = (words[word] >> np.uint64(start & 63)) << np.uint64(start & 63)
    passed = np.int64(0)
    while True:
        below = below_lowest(part & others[word])
        passed += count_bits(part & below)
        if passed >= most or part & others[word] != 0:
            return 64 * word + count_bits(below) if passed < most else np.int64(-1)
        word += 1
        if word == words.size:
            return np.int64(-1)
        part = words[word]
