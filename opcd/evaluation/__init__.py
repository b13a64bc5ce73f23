"""What was gained: contenders on the same requests.

evaluate    the models before and after, without and with the context, on the test data
scorecard   what contenders reached, and how sure that is
measured    what a scorecard was measured by
contenders  who answers; one model in memory at a time
verdict     learned, in part, or not: a scorecard in a word
intervals   means over requests, and how sure they are
agreement   how far a student is from its teacher, on what either says
spikes      steps whose divergence stands out
elsewhere   the distilled model on requests that have nothing to do with the context
side_by_side  one message to the models before and after
report      the scorecard for people: terminal, report.md, curve
page        the scorecard for whoever decides: report.html
plots       drawings of a page, as SVG in its own colours
evidence    what figures and weights came from: evidence.json
verify      a run held against its evidence
"""
