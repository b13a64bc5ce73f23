"""What a distilled prompt saves on a server, against the prompt in its cache.

serve         a run's contenders, measured and written beside its report
wanted        what a user wants measured
trained       what a run's own files say of it
ways          three ways to measure: a vLLM that is started, a server that runs, transformers
contenders    the original model with the prompt, cache off and on; the distilled one; the adapter
measure       what a server takes for requests, alone and several under way
stream        one streamed request, with the times at which its tokens came
in_process    the same with transformers, where no server is
room          memory for keys and values, and how many requests there is room for
spread        a figure with what lies around it
break_even    after how many requests training has paid; the verdict
same_answers  whether the served model is the measured model
apart         how far its log-probabilities are from the exported one's, and may be
report        what was found, in words, as a table and as a file
vllm          an installed vLLM, and how it is started
process       the life of a server that is started here
"""
