"""Why a training ended before its time."""


class TrainingStopped(RuntimeError):
    """What was being trained went wrong: a loss or gradient that is no number, nothing to learn from, changed weights.

    The command line ends with status 1, not with the 2 of a mistake in its arguments.
    """
