"""What measures many trainings of one task.

rivals       START HERE: on-policy context distillation against what else a prompt can become
published    the loss that the paper's code has: the student's likeliest tokens alone
soft_prompts  trained vectors in place of a prompt
"""
