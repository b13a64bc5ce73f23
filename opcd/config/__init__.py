"""The configuration of a run.

fields    every field, in groups, and what its values may be
settings  values from a file, a preset, the command line or Python, and which of them counts
presets   values for the usual cases
"""

from opcd.config.fields import TrainConfig as TrainConfig
