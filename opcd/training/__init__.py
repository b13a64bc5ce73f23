"""A run: START HERE, in loop.

loop        sample, score, step
sources     which episodes a step has
build       student, teacher and sampler from a configuration
run         from a configuration to its scorecard: folder, steps, validation
checkpoint  complete or absent, never half written
export      the chosen checkpoint as a model of its own
"""
