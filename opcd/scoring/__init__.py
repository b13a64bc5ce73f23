"""When an answer counts as right.

scorers     START HERE: the scorer that a name stands for, and what it may return
reasoning   a completion's thought and its answer
texts       when two texts say the same, in any script
numerals    the numbers in a text
choices     the letters that an answer claims
calls       calls of tools, as model families write them
values      JSON values that can be compared
"""
