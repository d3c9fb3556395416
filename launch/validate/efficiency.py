"""What two measurements say together. Pure arithmetic."""


def ratio(found: float | None, wanted: float | None) -> float | None:
    """`found` as a share of `wanted`; None where one of them was not measured."""
    return None if found is None or not wanted else found / wanted


def ideal_bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Share of a pipeline's time in which a stage waits, if all stages are equally fast and messages take no
    time: (p - 1) / (m + p - 1), with v chunks a stage (p - 1) / (v m + p - 1).
    """
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def measured_bubble(
    *, seconds: float, micro_batches: int, long_seconds: float, long_micro_batches: int, update_seconds: float
) -> float | None:
    """The same from two steps of different length: what is left of the shorter one when the time that its
    micro-batches cost is taken away, which is how much longer the other took for each of its further ones.
    The update, which both have once, counts in neither. None where times do not add up to anything.
    """
    further = (long_seconds - seconds) / (long_micro_batches - micro_batches)
    pipeline = seconds - update_seconds
    if further <= 0 or pipeline <= 0:
        return None
    return 1.0 - micro_batches * further / pipeline
