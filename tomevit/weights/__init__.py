"""Weights: files in, files out."""
