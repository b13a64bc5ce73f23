"""The Python in README.md and docs/ runs, and the files they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, settings: dict, names: dict) -> dict:
    """A model name in a snippet stands for the tiny model here."""
    code = re.sub(r'from_pretrained\("[^"]+"', f'from_pretrained("{settings["model"]}"', code)
    exec(compile(code, "snippet", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_readme_shows_the_loss_and_the_teacher(settings: dict) -> None:
    loss, teacher = snippets(PAGES[0])
    names = run(loss, settings, {})
    assert names["student_hidden"].grad.abs().sum() > 0
    assert (names["out"].per_token > 0).all()
    names = run(teacher, settings, {})
    assert names["scored"].cu_seqlens.tolist() == [0, 2, 5]
    assert len(names["scored"].hidden) == 5


def test_the_guide_for_trainers_from_top_to_bottom(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    model, needs, loop, accumulation, trainer, lora, autocast = snippets(
        ROOT / "docs" / "integrate.md"
    )
    names: dict = {}
    for code in (model, needs, loop):
        run(code, settings, names)
    losses = [float(x) for x in re.findall(r"([\d.]+) nats a token", capsys.readouterr().out)]
    assert losses[2] < losses[0]

    state = {k: v.clone() for k, v in names["student"].state_dict().items()}
    run(accumulation, settings, names)
    names["student"].load_state_dict(state)
    whole = names["linear_divergence"](
        names["hidden_states"](names["student"], names["prompts"]),
        names["student"].lm_head.weight,
        names["teacher_hidden"],
        names["teacher"].lm_head.weight,
        token_weights=names["mask"] / names["mask"].sum(),
    )
    whole.loss.backward()
    difference = names["student"].lm_head.weight.grad - names["accumulated"]
    assert difference.norm() < 1e-5 * names["accumulated"].norm()
    names["student"].zero_grad()

    run(trainer, settings, names)
    history = names["trainer"].state.log_history
    assert names["trained"].training_loss == pytest.approx(whole.loss.item(), rel=0.2), history
    run(lora, settings, names)
    gradients = [p.grad for p in names["adapted"].parameters() if p.requires_grad]
    assert sum(g.abs().sum() for g in gradients) > 0
    assert names["base"].lm_head.weight.grad is None
    run(autocast, settings, names)
    assert names["out"].loss > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
