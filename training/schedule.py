"""The learning rate as a fraction of its peak, over the course of a run."""


def one_cycle_factor(done: float, warmup: float) -> float:
    """Return the learning rate as a fraction of its peak.

    It rises linearly from 0 to 1 during the warm-up and falls linearly to 0 at the end (a simple
    form of the one-cycle policy, Smith and Topin 2017, arXiv:1708.07120).

    Args:
        done: the fraction of the training that is done, from 0 to 1, or a step beyond.
        warmup: the fraction before the peak; with 0 the rate only falls, with 1 it only rises.
    """
    if done < warmup or warmup == 1:
        return min(1.0, done / warmup)
    return (1 - done) / (1 - warmup)
