"""Reads what components do in a network on sequences: on which text, with which others, how."""
