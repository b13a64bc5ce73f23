"""Completions sampled from a model.

protocol    what an engine is; episodes from completions
stops       texts that end a completion
histories   what prompts of a call share beyond what all begin with
generate    the engine that calls transformers.generate
padding     whether pads in front of a prompt leave its next token alone
noise       what a completion draws, whatever the engine, the batch and the order
capture     a step recorded in a CUDA graph, and what is left in order where that fails
static      the engine with a static cache; when that is exact
decode      one step of it on memory that never moves
choice      which engine makes the rollouts
fitting     how many sequences at once, where memory runs out

conversations           what is the same of them for every engine
generate_conversations  in the cache of transformers.generate
static_conversations    in static caches
generate_histories      what several prompts begin with, once in a cache of transformers
generate_call           one call of transformers.generate, for engine and conversations
"""
