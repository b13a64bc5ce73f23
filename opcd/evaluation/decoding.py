"""How completions are drawn: in training, where models are looked at, and for a scorecard."""

from opcd.rollouts.protocol import SamplingParams
from opcd.rollouts.stops import StopStrings
from opcd.tasks.prepare import Setup
from opcd.tasks.replay import limit_of


def rollout_params(setup: Setup) -> SamplingParams:
    """Of training: the whole distribution that the loss is over, at its temperature."""
    config = setup.config
    return SamplingParams(config.max_completion_tokens, config.temperature, stop=stops(setup))


def replay_params(setup: Setup) -> SamplingParams:
    """Of replayed prompts: they end as the model ends an answer, not as the task's do."""
    return SamplingParams(limit_of(setup.config), setup.config.temperature)


def greedy_params(setup: Setup) -> SamplingParams:
    """Of the likeliest answers, by which prompts are looked at and checkpoints chosen."""
    return SamplingParams(setup.config.max_completion_tokens, 0.0, stop=stops(setup))


def answer_params(setup: Setup) -> SamplingParams:
    """Of a scorecard's answers, as the group `evaluation` of the configuration says."""
    config = setup.config
    return SamplingParams(
        config.max_completion_tokens,
        config.eval_temperature,
        config.top_k,
        config.top_p,
        stops(setup),
    )


def stops(setup: Setup) -> StopStrings | None:
    """What ends a completion beside EOS."""
    strings = setup.config.stop
    return StopStrings(strings, setup.chat.plain_text) if strings else None


def decoding_of(setup: Setup) -> dict[str, object]:
    """For a scorecard: how its answers were drawn."""
    config = setup.config
    return {
        "temperature": config.eval_temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "stop": list(config.stop),
        "max_completion_tokens": config.max_completion_tokens,
    }
