"""The Python interface.

distill  the functions: distil a context into a model, score one
serve    what a run saves on a server
inputs   what a caller holds in memory, as the files that a run reads
results  what they return
caller   what of the caller's process they leave as it was
"""
