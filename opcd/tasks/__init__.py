"""What is distilled, and how it is judged.

task        all of a run's prompts, rendered, and the scorer
data        contexts, prompts, labelled examples; checks line by line
chat        messages to token ids; checks of the chat template
scorers     when an answer counts
"""
