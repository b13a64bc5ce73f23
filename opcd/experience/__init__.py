"""The experience loop: a model distils what it learned from its own attempts.

rounds        START HERE: round by round, then the final test
phases        one round: attempt, extract, accumulate, filter, distil, decide
final         base and distilled models on problems that nothing was chosen by
settings      the group `experience` of a configuration
folder        what a loop was given and has found: a file a phase, complete or absent
exercises     what a model is set: problems, or games
problems      tasks with answers, in three parts that their words decide
games         games of several turns, a room of their own
checking      checkers in processes of their own, with a time limit
check_worker  such a process
fitting       problems that leave room for an experience
attempts      made by the model, or left by a server in a log
items         extractor: lines that the model writes about its attempts
successes     extractor: right attempts as demonstrations
contexts      what experience becomes, within a number of tokens
measuring     what a model reaches, alone, behind an experience, and elsewhere
distilling    contexts into weights, as a training run
filtering     which context is worth distilling
gate          whether a round's weights are kept
report        what a loop has come to, for people
"""
