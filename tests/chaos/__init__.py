"""Chaos: real processes under a seeded schedule of faults, and an oracle that knows every cell beforehand."""
