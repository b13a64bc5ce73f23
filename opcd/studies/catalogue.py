"""What else a prompt can become."""

from typing import Any, NamedTuple

from opcd.objective import Divergence, head_divergence
from opcd.studies.published import TOP, top_divergence

REFERENCE = "opcd"


class Trained(NamedTuple):
    """A rival whose weights are trained."""

    what: str
    settings: dict[str, Any]
    stored: bool = False  # whether it learns from the teacher's completions alone
    divergence: Divergence = head_divergence


BARE: dict[str, Any] = {"replay_share": 0.0, "replay_data": None, "return_anchor": 0.0}
OWN: dict[str, Any] = {"guided_share": 0.0, "forward_share": 0.0, **BARE}
TRAINED = {
    REFERENCE: Trained("as configured", {}),
    "plain": Trained("own completions alone, the exact reverse KL", OWN),
    "published": Trained(
        f"own completions alone, the student's top {TOP}, not renormalised",
        OWN,
        divergence=top_divergence,
    ),
    "off_policy": Trained(
        "forward KL on the teacher's completions",
        {"guided_share": 1.0, "guided_objective": "forward_kl", **BARE},
        stored=True,
    ),
    "sequence_level": Trained(
        "cross-entropy on the teacher's completions",
        {"guided_share": 1.0, "guided_objective": "cross_entropy", **BARE},
        stored=True,
    ),
}
COMPRESSED = {"llmlingua_2": 2, "llmlingua_4": 4, "llmlingua_8": 8}  # by how much
SOFT = {"soft_20": 20, "soft_100": 100}
CONTROLS = {
    "teacher_without": "control: a teacher without the context",
    "other_context": "control: a teacher with another task's context",
}
NAMES = (*TRAINED, "demonstrations", *COMPRESSED, *SOFT, *CONTROLS)
