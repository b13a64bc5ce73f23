"""What was gained: contenders on the same requests.

evaluate    the models before and after, without and with the context, on the test data
observed    what all models say and make of each other's words, before any figure
scorecard   what contenders reached, and how sure that is
measured    what a scorecard was measured by
decoding    how completions are drawn, in training and for a scorecard
constant    what one answer for every request would reach, and who gives one
harm        what a context does to a model that does without it
leak        how much of a context requests to reveal it bring out of a model
contenders  who answers; one model in memory at a time
named       contenders that people name: models, adapters, prompts, soft prompts, servers
server      an OpenAI-compatible server as a contender
soft_prompt  trained vectors in front of the request as a contender
verdict     learned, in part, or not: a scorecard in a word
intervals   means over requests, and how sure they are
agreement   how far a student is from its teacher, on what either says
spikes      steps whose divergence stands out
elsewhere   the distilled model on requests that have nothing to do with the context
elsewhere_tasks  the same on tasks of lm-eval
side_by_side  one message to the models before and after
report      the scorecard for people: terminal, report.md, curve
facts       sentences beside its tables
table       every answer in one table, answers.csv
compare     many runs side by side
savings     what a server was measured to save, for report and page
figure      a figure of matplotlib's that nobody else has
page        the scorecard for whoever decides: report.html
plots       drawings of a page, as SVG in its own colours
evidence    what figures and weights came from: evidence.json
verify      a run held against its evidence
"""
