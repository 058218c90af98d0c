"""Compositions of components, gates, ablations and terms: one file per method.

A new method is a subclass of `base.Method` in a file here, and a line in `registry`.
"""
