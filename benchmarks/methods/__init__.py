"""Ways to merge, compared at equal measured time."""
