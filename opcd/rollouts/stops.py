"""Texts that end a completion, whatever tokens spell them."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

MARGIN = 16  # tokens beyond a stop string's bytes that are decoded to look for it


class StopStrings:
    """A completion ends with the token with which one of these texts first stands in what it
    decodes to."""

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        assert strings, "a stop string at least"
        assert all(string.strip() for string in strings), "no blank ones"
        self.strings = tuple(strings)
        self._decode = decode
        self._window = max(len(string.encode()) for string in strings) + MARGIN

    def reached(self, token_ids: Sequence[int]) -> bool:
        """Whether a completion that has grown has come to its end; only its last tokens are read,
        each of which spells a byte at least."""
        quick = self._in(self._decode(token_ids[-self._window :]))
        return quick and self.end(token_ids) is not None

    def end(self, token_ids: Sequence[int]) -> int | None:
        """How many tokens a completion has, its end included; None where it has not come to it."""
        if not self._in(self._decode(token_ids)):
            return None
        counts = range(1, len(token_ids) + 1)
        return 1 + bisect_left(counts, True, key=lambda n: self._in(self._decode(token_ids[:n])))

    def cut(self, text: str) -> str:
        """A text up to where the first of them begins."""
        found = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(found)] if found else text

    def _in(self, text: str) -> bool:
        return any(string in text for string in self.strings)
