"""A model made faster, or carried elsewhere."""
