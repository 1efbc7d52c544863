"""How fast, how good, at which r."""
