"""What people do with a model and images."""
