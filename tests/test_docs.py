"""The Python in README.md and docs/ runs, and the files they name exist."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from opcd.cli import main
from opcd.starter import write_starter
from tests import settings_page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = ROOT / "docs" / "integrate.md"
README = PAGES[0].read_text(encoding="utf-8")


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, settings: dict, names: dict) -> dict:
    """A model name in a snippet stands for the tiny model here."""
    code = code.replace("smollm2-135m-instruct", settings["model"])
    code = re.sub(r'from_pretrained\("[^"]+"', f'from_pretrained("{settings["model"]}"', code)
    exec(compile(code, "snippet", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_readme_shows_the_loss_and_the_teacher(settings: dict) -> None:
    distilling, loss, teacher = snippets(PAGES[0])
    run(distilling, settings, {})
    assert (Path("my-model") / "config.json").is_file()
    names = run(loss, settings, {})
    assert names["student_hidden"].grad.abs().sum() > 0
    assert (names["out"].per_token > 0).all()
    names = run(teacher, settings, {})
    assert names["scored"].cu_seqlens.tolist() == [0, 2, 5]
    assert len(names["scored"].hidden) == 5


def test_the_page_about_python(settings: dict, capsys: pytest.CaptureFixture) -> None:
    distilling, asking, tracker = snippets(ROOT / "docs" / "python.md")
    names = run(distilling, settings, {})
    assert len(names["distilled"].metrics) == 1
    exec(compile(asking, "snippet", "exec"), names)
    assert capsys.readouterr().out.endswith("\n")
    Path("my_tracker.py").write_text(tracker)
    run(tracker, settings, {})["make"](Path()).log(1, {"loss": 0.5})


def test_the_notebook(settings: dict, capsys: pytest.CaptureFixture) -> None:
    """Top to bottom on the tiny model, with a context that fits it."""
    cells = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace('task / "context.json",', '"Sort the mail.",')
            run(code.replace("steps=30", "steps=2"), settings, names)
    assert len(names["losses"]) == 2
    assert names["distilled"].scorecard["contenders"]["distilled"]["n"] == 36
    assert (names["task"] / "model" / "config.json").is_file()


MISTAKES = re.findall(
    r"^\| `(.*?)` \| (.*) \|$", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.M
)


@pytest.mark.parametrize(("command", "says"), MISTAKES[-22:], ids=[c for c, _ in MISTAKES[-22:]])
def test_the_wrong_commands(command: str, says: str, capsys: pytest.CaptureFixture) -> None:
    """The page's table, line by line."""
    assert len(MISTAKES) >= 22
    write_starter(Path("my-task"))
    Path("twice.yaml").write_text("data:\n  context: a.md\n  context: b.md\n")
    Path("group.yaml").write_text("optimizer:\n  temperature: 1\n")
    Path("kind.yaml").write_text("optimizer:\n  steps: many\n")
    Path("tab.yaml").write_text("data:\n\tcontext: a.md\n")
    arguments = command.replace("…", "--config my-task/config.yaml").split()
    assert main(arguments) == 2
    found = capsys.readouterr().err.replace(f"{Path.cwd()}/", "/home/me/").splitlines()[-1]
    assert found.split(": ", 1)[1] == says


def test_the_guide_for_trainers_from_top_to_bottom(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    parts = snippets(GUIDE)
    model, needs, loop, accumulation, module, micro_batches, _, trainer, lora, *mixed = parts
    autocast, scaler, compiled = mixed
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

    run(module, settings, names)
    assert names["out"].loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    run(micro_batches, settings, names)
    difference = names["added_up"] - names["accumulated"]
    assert difference.norm() < 1e-5 * names["accumulated"].norm()

    run(trainer, settings, names)
    history = names["trainer"].state.log_history
    assert names["trained"].training_loss == pytest.approx(whole.loss.item(), rel=0.2), history
    run(lora, settings, names)
    gradients = [p.grad for p in names["adapted"].parameters() if p.requires_grad]
    assert sum(g.abs().sum() for g in gradients) > 0
    assert names["base"].lm_head.weight.grad is None
    run(autocast, settings, names)
    assert names["out"].loss > 0

    expected = gradients_of_the_guide(names)
    run(scaler, settings, names)
    found = names["unscaled"]
    assert (found - expected["lm_head.weight"]).norm() < 5e-3 * found.norm()
    assert names["scaler"].get_scale() == 2**16
    expected = gradients_of_the_guide(names)
    # Inductor would take a minute.
    run(compiled.replace("dynamic=True", 'dynamic=True, backend="aot_eager"'), settings, names)
    for name, p in names["student"].named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)
    assert names["student"].model._compiled_call_impl is not None


def gradients_of_the_guide(names: dict) -> dict[str, torch.Tensor]:
    """Of the guide's StudentLoss on all of its sequences, in fp32."""
    targets = names["shared"].score(
        names["prompts"], names["completions"], completion_mask=names["mask"]
    )
    names["student"].zero_grad()
    names["loss"](names["ids"], targets, completion_mask=names["scored"]).loss.backward()
    found = {name: p.grad.clone() for name, p in names["student"].named_parameters()}
    names["student"].zero_grad()
    return found


def trained_weights(recipe: str, folder: str, rank: int, ranks: int, port: int = 0) -> None:
    """A recipe in one of several processes, on the same examples in all; its weights."""
    os.chdir(folder)
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "localhost", **{k: str(v) for k, v in place.items()}}
    model, needs, _, _, module, *_ = snippets(GUIDE)
    code = snippets(GUIDE)[6 if recipe == "accelerate" else 7]
    # Adam makes a step of what rounding left of a gradient.
    if recipe == "accelerate":
        code = code.replace("AdamW(loss.parameters(), lr=1e-3)", "SGD(loss.parameters(), lr=0.1)")
        assert "SGD" in code
    else:
        code = code.replace("train_batch_size=2", f"train_batch_size={2 // ranks}")
        code = code.replace("report_to=[]", 'report_to=[], optim="sgd", learning_rate=0.1')
        assert "sgd" in code
        assert f"train_batch_size={2 // ranks}," in code
    names: dict = {}
    for part in (model, needs, module, code):
        exec(compile(part, "snippet", "exec"), names)
    if recipe == "accelerate":
        assert names["accelerator"].num_processes == ranks
    torch.save(names["student"].state_dict(), f"{ranks}-{rank}.pt")
    if ranks > 1:
        torch.distributed.barrier()
        os._exit(0)  # gloo's threads now and then abort a process that takes leave of them


def in_one_process(_: int, recipe: str, folder: str) -> None:
    trained_weights(recipe, folder, 0, 1)  # accelerate keeps its state as long as a process lives


def in_two_processes(rank: int, recipe: str, folder: str, port: int) -> None:
    trained_weights(recipe, folder, rank, 2, port)


@pytest.mark.parametrize("recipe", ["trainer", "accelerate"])
def test_a_recipe_of_the_guide_in_two_processes(recipe: str, tmp_path: Path) -> None:
    """One that calls the model's body beside its wrapper would train two models."""
    port = 29_000 + os.getpid() % 2000  # which another run of these tests does not take
    torch.multiprocessing.spawn(in_one_process, (recipe, str(tmp_path)), nprocs=1)
    torch.multiprocessing.spawn(in_two_processes, (recipe, str(tmp_path), port), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)


GPU = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
# Where code asks for its device, uses CUDA, or is another under Triton's interpreter.
ONLY_CUDA = re.compile(r"""\.type [!=]= ["'](?:cuda|cpu)|torch\.cuda\.|INTERPRETED""")


def test_every_branch_that_only_cuda_takes_is_listed() -> None:
    files = [*(ROOT / "opcd").rglob("*.py"), *(ROOT / "opcd_kernels").glob("*.py")]
    found = {
        str(file.relative_to(ROOT))
        for file in files
        if ONLY_CUDA.search(file.read_text(encoding="utf-8"))
    }
    assert len(found) > 15
    table = GPU[GPU.index("## Branches") : GPU.index("## flash-attn")]
    listed = set(re.findall(r"`(opcd\w*/[\w/]+\.py)`", table))
    assert found <= listed, sorted(found - listed)
    assert all((ROOT / file).is_file() for file in listed)


def test_what_stands_in_for_a_gpu_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", GPU)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_page_of_settings_is_made_of_what_help_says() -> None:
    """Where this fails: python -m tests.settings_page."""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
