"""What was gained.

scorecard   the models before and after, with and without the context, on the same requests
report      the scorecard for people: terminal, report.md, curve
"""
