"""What is known before the money is spent.

check       a prompt looked at: what is known at once, what is measured, the verdict
sample      the requests that it is looked at by
rendering   what both models are really given
measure     what the models make of the sample
verdict     whether a run is worth it: a function of what was found
budget      what a run needs, what the machine has, and what to change
memory      a run's memory, part by part and phase by phase
generation  what sampling takes of it
weightless  models without numbers, and the bytes of what is made of them
disk        what a run writes
"""
