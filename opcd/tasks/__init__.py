"""What is distilled: contexts, prompts and labelled examples, as people have them and as token ids.

prepare         START HERE: everything that can be wrong before weights are loaded
task            all of a run's prompts, rendered, and the scorer
contexts        what only the teacher sees, from a file
held_out        prompts that are measured on where no other data is named
data            prompts and labelled examples; what must hold between the parts
formats         one row of data, in any form that people have
conversation    messages as a whole: what tools give stands behind the calls that it answers
messages        chat messages as people write them, to roles, texts and calls of tools
tools           tools as people write them: schemas and calls
records         files to JSON objects, each with its place
special_tokens  special tokens that data spell
order           which rows a step takes
completions     completions of training prompts from a file
chat            messages to token ids, with and without the context
turn            a completion given as text, as the template writes an answered turn
turns           training conversations turn by turn: each a prompt of its own
recorded        a recorded conversation as token ids, of which its assistant turns are scored
between         what stands between two turns of a conversation that goes on
template        a tokenizer's chat template, judged by what it writes
kept            whether a template keeps messages
limits          what must fit the model: lengths, tokens
elsewhere       requests that have nothing to do with the context
replay          prompts of other kinds, on which a student is held to the original model
gold            the accepted answers held against the scorer
"""
