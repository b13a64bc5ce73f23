"""Hidden states of many sequences, what they share computed once.

plan          START HERE: packed, padded or in full: the fastest way that is exact on a model
agreement     whether two ways of a pass agree: their difference beside the dtype's noise
hidden        the hidden states that predict scored tokens: one pass
packed        many sequences in one row, through any model's own layers
sequences     token ids as trainers hold them, to lists
packing       where sequences lie in a packed row, and as rectangles
attention     attention to a prefix and to the own sequence, merged
flash         fused kernels for it, with gradients, on CPU and CUDA
backends      which of them a layer takes: tried once on the device
prefix        keys and values of a prefix, computed once, handed out as views
prefix_cache  recorded prefixes within a budget
staleness     whether a model's weights are still those of its prefixes
"""
