"""Two texts as one."""


def joined(first: list[int], second: list[int], room: int, sep_id: int) -> tuple[list[int], int]:
    """Token ids of two texts with a [SEP] between them, cut to `room` ids.

    And where the second text begins, counted from the [CLS] that will stand before them.
    """
    keep_first, keep_second = shares(len(first), len(second), room - 1)
    return [*first[:keep_first], sep_id, *second[:keep_second]], keep_first + 2


def shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of two texts fits: the longer one is cut first, and both are cut alike after that."""
    half = room // 2
    keep_first = min(first, max(half, room - second))
    return keep_first, min(second, room - keep_first)
