"""What is known before the money is spent.

check      a prompt measured on a sample of the requests
verdict    whether a run is worth it: a function of what was measured
rendering  what both models are really given
"""
