"""Figures and tables of a decomposition, drawn from the arrays of its evaluation."""
