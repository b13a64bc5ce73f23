"""The checker of this example."""

import re

LABELS = ("weather", "recipe", "taxi", "music")


def names_the_label(completion: str, answers: list[str]) -> bool:
    """At most three words, which name the right label (or its plural) and no other."""
    words = re.findall(r"\w+", completion.lower())
    named = {label for label in LABELS if label in words or f"{label}s" in words}
    return len(words) <= 3 and named == {answers[0]}
