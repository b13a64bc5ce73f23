"""The configuration of a run.

fields    every field, in groups, and what its values may be
settings  values from a file, a preset, the command line or Python, and which of them counts
presets   values for the usual cases
rate      the learning rate: its peak where none is set, and its course
"""

from opcd.config.fields import TrainConfig as TrainConfig
