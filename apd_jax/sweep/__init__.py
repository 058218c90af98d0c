"""Many settings of one decomposition at once, as instances of one program.

Seeds × coefficients × k × learning rate: `grid` which settings, `halving` their training in rungs,
`judge` how good each run is, `results` what is told of them.
"""
