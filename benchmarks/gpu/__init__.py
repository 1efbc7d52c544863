"""Tests and figures on a GPU, in slices of a few minutes: `python -m benchmarks.gpu --minutes 9 --out DIR`."""
