"""What is known before the money is spent.

budget      START HERE: what a run needs, what the machine has, and what to change
memory      a run's memory, part by part and phase by phase
generation  what sampling takes of it
weightless  models without numbers, and the bytes of what is made of them
disk        what a run writes
"""
