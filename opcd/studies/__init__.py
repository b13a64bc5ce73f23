"""What measures many trainings of one task.

rivals       START HERE: on-policy context distillation against what else a prompt can become
catalogue    which rivals there are
checks       which of them are meant, and whether a task suits them, before any is trained
stored       the teacher's completions that some of them learn from, as many as are needed
published    the loss that the paper's code has: the student's likeliest tokens alone
compression  a prompt with its least telling tokens left out
ranker       what says which those are: LLMLingua, driven by the model at hand
soft_prompts  trained vectors in place of a prompt
table        the rows as people read them
"""
