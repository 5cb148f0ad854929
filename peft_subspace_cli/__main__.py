"""`python -m peft_subspace_cli` is `peft-subspace`."""

from . import main

main()
