"""Compositions of components, gates, ablations and terms; one file per method."""
