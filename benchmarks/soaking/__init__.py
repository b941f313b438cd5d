"""The parts of the reliability run: what lives on ranks, worlds with checks, faults, a driver to kill. The command is `benchmarks.soak`."""
