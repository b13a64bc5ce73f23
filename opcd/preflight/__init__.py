"""What is known before the money is spent.

check       a prompt measured on a sample of the requests
verdict     whether a run is worth it: a function of what was measured
sample      the requests that a prompt is looked at by
rendering   what both models are really given
budget      what a run needs, what the machine has, and what to change
memory      a run's memory, part by part and phase by phase
generation  what sampling takes of it
weightless  models without numbers, and the bytes of what is made of them
disk        what a run writes
"""
