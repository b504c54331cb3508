"""`python -m hpctrain` is the same as `hpctrain`."""

from hpctrain.cli import main

main()
