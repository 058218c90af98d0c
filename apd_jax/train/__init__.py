"""The train step and the host loop around it."""
