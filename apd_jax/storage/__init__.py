"""A decomposition as a folder, with its card."""
