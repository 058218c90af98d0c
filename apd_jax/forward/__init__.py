"""The masked forward pass of any function."""
