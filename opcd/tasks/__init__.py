"""What is distilled, and how it is judged.

prepare     START HERE: everything that can be wrong before weights are loaded
task        all of a run's prompts, rendered, and the scorer
data        contexts, prompts, labelled examples; checks line by line
stored      completions of training prompts from a file
chat        messages to token ids, with and without the context
template    a tokenizer's chat template, judged by what it writes
scorers     when an answer counts
gold        the accepted answers held against the scorer
reasoning   a completion's thought and its answer
texts       when two texts say the same, in any script
numerals    the numbers in a text
choices     the letters that an answer claims
"""
