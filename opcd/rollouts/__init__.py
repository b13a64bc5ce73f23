"""Completions sampled from a model.

generate    what an engine is; the one that calls transformers.generate
static      the engine with a static cache; when that is exact
decode      one step of it on memory that never moves, for CUDA graphs
choice      which engine makes the rollouts
"""
