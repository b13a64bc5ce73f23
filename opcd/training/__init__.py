"""A run: START HERE, in loop.

loop        sample, score, step
run         from a configuration to its scorecard
checkpoint  complete or absent, never half written
"""
