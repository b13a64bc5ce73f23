"""Exports read by another release of transformers: `make test-export`.

    python -m tests.export_elsewhere write FOLDER   # bases and exports, where opcd is installed
    python tests/export_elsewhere.py read FOLDER    # logits of both, where the other release is

For every base: an export before the first step, which must give the base's logits exactly, and
one after two steps, which must give the logits that it gave where it was written, nearly. The
built-in model's conversion is one of the bases.
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. " * 12
)  # longer than the limits of longrope and dynamic
SAME = 1e-3  # between releases, in fp32 arithmetic on logits of several units


def logits(folder: Path) -> torch.Tensor:
    """(T, V) in fp32 arithmetic, of the text as the folder's own tokenizer cuts it."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


def write(folder: Path) -> None:
    """Bases in the layout of transformers 4, in today's, and their exports, full and LoRA."""
    from opcd.config import TrainConfig
    from opcd.models import builtin
    from opcd.models.files import ModelFiles
    from opcd.runtime.files import write_folder
    from opcd.tasks.prepare import prepare
    from opcd.training.build import build_distiller
    from opcd.training.checkpoint import save_checkpoint
    from opcd.training.export import export_model
    from opcd.training.model_writer import ModelWriter
    from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl
    from tests.opcd.published import CONFIGS, publish

    bases = {name: publish(name, folder / name / "base") for name in CONFIGS}
    converted = folder / "builtin-converted" / "base"
    tiny_llama(rope_theta=100000.0, dtype="bfloat16").bfloat16().save_pretrained(converted)
    tiny_tokenizer().save_pretrained(converted)
    builtin._say_in_both_ways(converted)
    bases["builtin-converted"] = converted
    (folder / "context.md").write_text("Answer with one letter.")
    rows = [{"prompt": word} for word in ["red", "blue", "pink", "teal", "gold", "grey"]]
    write_jsonl(folder / "prompts.jsonl", rows)
    for name, base in bases.items():
        for lora_rank in (0, 4):
            run = folder / name / ("lora" if lora_rank else "full")
            config = TrainConfig(
                output_dir=str(run),
                context=str(folder / "context.md"),
                prompts=str(folder / "prompts.jsonl"),
                model=str(base),
                dtype="float32",
                device="cpu",
                prompts_per_step=2,
                max_completion_tokens=4,
                learning_rate=1e-2,
                warmup_steps=0,
                lora_rank=lora_rank,
            )
            distiller = build_distiller(prepare(config, for_training=True))
            writer = ModelWriter(ModelFiles(str(base)), distiller.student)
            for steps in (0, 2):
                while distiller.steps_done < steps:
                    distiller.step()
                saved = save_checkpoint(run / "checkpoints", distiller, writer, {})
                target = run / f"steps-{steps}"
                write_folder(target, lambda aside, s=saved, w=writer: export_model(w, s, aside))
                torch.save(logits(target), target / "logits.pt")
            distiller.engine.close()


def read(folder: Path) -> int:
    """Print and judge what the release that runs this makes of the exports."""
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'base':20}{'export':6} |final-base| at step 0   |here-there| at step 2   moved by 2")
    failed = 0
    for base in sorted(folder.glob("*/base")):
        before = logits(base)
        for kind in ("full", "lora"):
            run = base.parent / kind
            zero = _apart(logits(run / "steps-0"), before)
            trained = logits(run / "steps-2")
            other = _apart(trained, torch.load(run / "steps-2" / "logits.pt"))
            moved = _apart(trained, before)
            good = zero == 0 and other < SAME and moved > 0.1
            line = f"{base.parent.name:20}{kind:6} {zero:<24.3g} {other:<24.3g} {moved:.3g}"
            failed += not good
            print(line + ("" if good else "   FAILED"))
    print(f"{failed} failed")
    return int(failed > 0)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    where = Path(sys.argv[2])
    if sys.argv[1] == "write":
        write(where)
    else:
        sys.exit(read(where))
