"""The two kinds of failure a run can end with, and the exit code of each.

A request that cannot be met is the user's to change (exit 2, one sentence with the remedy); a fault of the
machine or of the program is not (exit 1, with the place where it happened).
"""


class HpctrainError(Exception):
    """Base of every error that the command line reports without a traceback."""

    exit_code = 1


class UserError(HpctrainError, ValueError):
    """The request, the configuration or the data is wrong: one sentence naming the thing and the remedy."""

    exit_code = 2


class MachineError(HpctrainError, RuntimeError):
    """A disk, a network, a device or a peer failed: what failed, and where."""

    exit_code = 1
