"""What was gained: contenders on the same requests.

evaluate    the models before and after, without and with the context, on the test data
scorecard   what contenders reached, and how sure that is
measured    what a scorecard was measured by
contenders  who answers; one model in memory at a time
intervals   how sure a mean over requests is
agreement   the divergence to the teacher on what a student says itself
spikes      steps whose divergence stands out
side_by_side  one message to the models before and after
report      the scorecard for people: terminal, report.md, curve
"""
