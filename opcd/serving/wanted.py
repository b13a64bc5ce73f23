"""What a user wants measured."""

import math
from dataclasses import dataclass
from typing import get_type_hints

from opcd.errors import InputError
from opcd.serving.break_even import Prices


@dataclass(frozen=True)
class Wanted:
    """What is measured on a server, and what it is held against.

    Args:
        base_url: a server that runs already, of OpenAI's chat completions; what it serves is asked
            with the prompt, and `served_distilled` without it. It may be anywhere.
        served_model: the original model's name there, where it has several.
        served_distilled: the distilled model's name there; without one the original is asked
            without the prompt, which takes as long.
        server_python: the interpreter with vLLM; without one, this one.
        requests: that are measured alone, a contender.
        max_minutes: for all requests; servers' starts are not counted.
        requests_a_day: for the days until training has paid.
        expected_requests: that come between two changes of the prompt.
        price_fresh: of a million prompt tokens.
        price_cached: of a million that were read before.
        price_hour: of the machine that the run was trained on.
    """

    base_url: str | None = None
    served_model: str | None = None
    served_distilled: str | None = None
    server_python: str | None = None
    requests: int = 16
    max_minutes: float = 10.0
    requests_a_day: float | None = None
    expected_requests: float | None = None
    price_fresh: float | None = None
    price_cached: float | None = None
    price_hour: float | None = None

    @property
    def prices(self) -> Prices | None:
        """Where there are some."""
        if self.price_fresh is None or self.price_cached is None:
            return None
        return Prices(self.price_fresh, self.price_cached, self.price_hour)

    def check(self) -> None:
        """Raise InputError for what cannot be."""
        for name in ("requests", "max_minutes", "requests_a_day", "expected_requests"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number, got {value}")
        for name in ("price_fresh", "price_cached", "price_hour"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} must be a price, got {value}")
        if (self.price_fresh is None) != (self.price_cached is None):
            raise InputError(
                "prices must be given of fresh and of cached tokens, got one of them; pass both"
            )
        if self.price_hour is not None and self.price_fresh is None:
            raise InputError("price_hour must come with price_fresh and price_cached; pass them")
        if self.base_url is None and (self.served_model or self.served_distilled):
            raise InputError(
                "served_model and served_distilled must come with a server, got none; name its "
                "base_url"
            )
        if self.base_url is not None and self.server_python is not None:
            raise InputError(
                "either a server runs already or one is started, got base_url and server_python; "
                "leave one out"
            )


KINDS = get_type_hints(Wanted)
