"""Games: experience over several turns.

exercises     START HERE: games as what the loop learns from, in three parts
playing       episodes: many games advance together over open rows
source        what a training step plays, and its figures
comparing     what a model is shown to write items about
environment   what a game is
by_name       those that come with opcd, and a user's own
environments  games in processes of their own, with a time limit
worker        such a process
grid          what games on a board of letters have in common
frozen_lake   around the holes
sokoban       a box onto a target
"""
