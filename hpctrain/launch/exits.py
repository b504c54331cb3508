"""Exit statuses of `hpctrain train` that a batch script acts on; those of errors are in ``hpctrain.errors``."""

#: EX_TEMPFAIL of sysexits.h: the run was asked to end early, its checkpoint is written, and another start in the same
#: run directory goes on from there
PREEMPTED = 75
