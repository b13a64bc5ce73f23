"""A run: START HERE, in loop.

loop          sample, score, step
anchor        a distilled model that stays right where its prompt is sent all the same
sources       which episodes a step has, and how each is scored
guided        completions that the prompted teacher wrote, or that came from a file
build         student, teacher and sampler from a configuration
run           from a configuration to its scorecard: steps
validation    what is measured of the student before and while it trains
resume        which runs may be begun or continued in a folder
alarms        signs that a run goes wrong, which its loss does not show
duration      how long a run will take, from parts that are timed once
announce      what a run tells people: its plan, a line a step
checkpoint    complete or absent, never half written
export        the chosen checkpoint as a model of its own
evaluate      a run's model, or another one, scored on test data
model_writer  models written as the base's own files, with other weights
"""
