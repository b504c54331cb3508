"""Exit statuses of `hpctrain train` that a batch script acts on; those of errors are in ``hpctrain.errors``."""

#: EX_TEMPFAIL of sysexits.h: the run was asked to end early, its checkpoint is written, the same command goes on
PREEMPTED = 75
