"""What a run writes is its base with other weights, file by file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from opcd.cli import main
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.models import builtin
from opcd.models.by_name import load_config, load_model
from opcd.models.files import ModelFiles
from opcd.models.lm import stop_at
from opcd.runtime.files import write_folder
from opcd.tasks.prepare import prepare
from opcd.training.build import build_distiller
from opcd.training.checkpoint import save_checkpoint
from opcd.training.export import export_model
from opcd.training.model_writer import ModelWriter
from opcd.training.run import train
from tests.conftest import CHATML, in_groups, tiny_llama, tiny_tokenizer
from tests.opcd.published import CONFIGS, publish, write_json

IDS = torch.tensor([[0, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160, 170]])


def untrained_export(settings: dict, base: Path, lora_rank: int = 0) -> Path:
    """The model of step 0, through a checkpoint, as every other is exported."""
    run = Path(settings["output_dir"])
    setup = prepare(TrainConfig(**settings | {"model": str(base), "lora_rank": lora_rank}), True)
    distiller = build_distiller(setup)
    writer = ModelWriter(ModelFiles(str(base)), distiller.student)
    checkpoint = save_checkpoint(run / "checkpoints", distiller, writer, {})
    write_folder(run / "final", lambda aside: export_model(writer, checkpoint, aside))
    return run / "final"


def test_an_adapter_is_saved_without_asking_the_hub_for_its_base(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in model's name is that of no folder."""
    setup = prepare(TrainConfig(**settings | {"lora_rank": 4}), True)
    distiller = build_distiller(setup)
    writer = ModelWriter(ModelFiles(settings["model"]), distiller.student)
    distiller.student.peft_config["default"].base_model_name_or_path = "a-model-of-this-name"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", None)
    checkpoint = save_checkpoint(Path(settings["output_dir"]), distiller, writer, {})
    saved = load_file(next(checkpoint.rglob("adapter_model.safetensors")))
    assert saved.keys()
    assert all("lora_" in name for name in saved)


def run_of(settings: dict, **overrides: object) -> Path:
    config = Path(settings["output_dir"]).parent / "config.yaml"
    short = {"steps": 2, "test_data": None, "validation_data": None}
    config.write_text(in_groups(settings | short | overrides))
    assert main(["train", "--config", str(config)]) == 0
    return Path(settings["output_dir"]) / "final"


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


def small(folder: Path) -> dict[str, bytes]:
    return {n: b for n, b in files(folder).items() if not n.endswith((".safetensors", ".bin"))}


def tensors(folder: Path) -> dict[tuple[str, str], Tensor]:
    return {
        (f.name, k): t for f in folder.glob("model*.safetensors") for k, t in load_file(f).items()
    }


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(IDS).logits


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "llama-bin"])
def test_an_export_before_the_first_step_equals_its_input(
    settings: dict, tmp_path: Path, name: str, lora_rank: int
) -> None:
    base = publish(name, tmp_path / "base")
    final = untrained_export(settings, base, lora_rank)
    assert small(final) == small(base)
    assert files(final).keys() == files(base).keys()
    before, after = tensors(base), tensors(final)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    assert torch.equal(logits(final), logits(base))
    assert (final / "adapter").exists() == (lora_rank > 0)


def test_the_bases_are_of_the_kinds_that_they_are_named_for(tmp_path: Path) -> None:
    fp16 = tensors(publish("llama-fp16", tmp_path / "fp16"))
    assert {t.dtype for t in fp16.values()} == {torch.float16}
    tied, untied = (publish(f"llama-{n}", tmp_path / n) for n in ("tied", "default"))
    assert ("model.safetensors", "lm_head.weight") not in tensors(tied)
    assert ("model.safetensors", "lm_head.weight") in tensors(untied)
    assert len({file for file, _ in tensors(publish("llama-sharded", tmp_path / "s"))}) > 2
    moe = publish("qwen3-moe", tmp_path / "moe")
    expert = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert ("model.safetensors", expert) in tensors(moe)
    gemma = publish("gemma3-multimodal", tmp_path / "gemma")
    patches = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    assert ("model.safetensors", patches) in tensors(gemma)
    assert ("model.safetensors", "language_model.model.norm.weight") in tensors(gemma)


def test_bin_files_become_safetensors(settings: dict, tmp_path: Path) -> None:
    base = publish("llama-bin", tmp_path / "base")
    final = untrained_export(settings, base)
    assert small(final) == small(base)
    stored = torch.load(base / "pytorch_model.bin", weights_only=True)
    written = load_file(final / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[k], stored[k]) for k in stored)
    assert not (final / "pytorch_model.bin").exists()


def test_dtypes_are_kept_tensor_by_tensor(settings: dict, tmp_path: Path) -> None:
    """A norm in fp32 among bf16 weights, a buffer that the model does not hold."""
    base = publish("llama-default", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.linspace(0.9, 1.1, 32)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.5, 0.25, 0.1])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for lora_rank in (0, 4):
        settings["output_dir"] += "-again"
        after = load_file(untrained_export(settings, base, lora_rank) / "model.safetensors")
        assert after.keys() == weights.keys()
        assert after["model.norm.weight"].dtype == torch.float32
        assert after["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
        assert all(torch.equal(after[k], weights[k]) for k in weights)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_model_stops_where_training_did(settings: dict, tmp_path: Path, lora_rank: int) -> None:
    """The base names token 0 alone, its template closes turns with token 1; all else stays."""
    base = publish("llama-default", tmp_path / "base")
    write_json(base / "config.json", CONFIGS["llama-default"] | {"eos_token_id": 0})
    ids = {"bos_token_id": 0, "eos_token_id": 0, "top_k": 7, "do_sample": False}
    write_json(base / "generation_config.json", ids)
    final = run_of(settings, model=str(base), lora_rank=lora_rank)
    written = json.loads((final / "generation_config.json").read_text())
    assert written == ids | {"eos_token_id": [0, 1]}
    changed = {n for n, b in small(final).items() if small(base).get(n) != b}
    assert changed == {"generation_config.json", "selection.json"}

    model = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():  # a head that can only say token 1
        model.lm_head.weight.zero_()
    model.lm_head.register_forward_hook(lambda *a: torch.eye(258)[1].expand(*a[2].shape))
    assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape[1] == IDS.shape[1] + 1


def test_a_generation_config_is_made_where_the_base_has_none(
    settings: dict, tmp_path: Path
) -> None:
    base = publish("llama-default", tmp_path / "base")
    (base / "generation_config.json").unlink()
    assert small(untrained_export(settings, base)) == small(base), "config.json says it already"
    write_json(base / "config.json", CONFIGS["llama-default"] | {"eos_token_id": 0})
    settings["output_dir"] += "-2"
    written = json.loads((untrained_export(settings, base) / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 1]
    assert (written["bos_token_id"], written["pad_token_id"]) == (0, 1)


def test_what_training_writes_is_the_trained_model(settings: dict, tmp_path: Path) -> None:
    base = publish("qwen3-moe", tmp_path / "base")
    final = run_of(settings, model=str(base))
    before, after = tensors(base), tensors(final)
    assert before.keys() == after.keys()
    moved = {
        key
        for (_, key) in before
        if not torch.equal(*(x["model.safetensors", key] for x in (before, after)))
    }
    assert any("experts" in key for key in moved)
    assert "model.embed_tokens.weight" in moved
    (checkpoint,) = (final.parent / "checkpoints").iterdir()
    kept = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(kept[k].to(torch.bfloat16), t) for (_, k), t in after.items())


def test_the_adapter_lies_beside_the_merged_model(settings: dict, tmp_path: Path) -> None:
    base = publish("llama-sharded", tmp_path / "base")  # fp32: the merge rounds nothing away
    final = run_of(settings, model=str(base), lora_rank=4)
    adapter = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base)
    assert adapter["r"] == 4
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), final / "adapter"
    )
    with torch.no_grad():
        found = adapted.eval()(IDS).logits
    torch.testing.assert_close(found, logits(final), atol=1e-4, rtol=1e-4)
    assert (found - logits(base)).abs().max() > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sampling_settings_that_transformers_would_not_write(
    settings: dict, tmp_path: Path, lora_rank: int
) -> None:
    """A temperature without do_sample, as Llama 2 ships it: read, and refused when written."""
    base = publish("llama-default", tmp_path / "base")
    odd = {"eos_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    write_json(base / "generation_config.json", odd)
    model = load_model(str(base), "auto")
    stop_at(model, [1])
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "saved")
    final = run_of(settings, model=str(base), lora_rank=lora_rank)
    written = json.loads((final / "generation_config.json").read_text())
    assert written == odd | {"eos_token_id": [0, 1]}


def test_what_cannot_be_written_fails_before_the_first_step(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("opcd.training.model_writer.shutil.copyfile", full)
    monkeypatch.setattr("opcd.training.loop.Distiller.step", None)  # it must not be called
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings))
    assert main(["train", "--config", str(config)]) == 2


def test_a_weight_without_a_place_is_said(tmp_path: Path) -> None:
    base = publish("llama-default", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["other.name"] = weights.pop("model.norm.weight")
    model = load_model(str(base), torch.float32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 have none, such as model\.norm\.weight"):
        ModelWriter(ModelFiles(str(base)), model)


@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        save_file({"a": torch.ones(2)}, folder / "inner" / "a.safetensors")
        (folder / "b").touch(mode=0o600)

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "target", write)
    finally:
        os.umask(before)
    for file in ("inner/a.safetensors", "b"):
        assert (tmp_path / "target" / file).stat().st_mode & 0o777 == mode


def test_a_hub_models_files_come_from_its_snapshot(tmp_path: Path) -> None:
    """By links into the cache, as the hub's client lays it; nothing is asked for."""
    repo, commit = tmp_path / "models--someone--tiny", "0123456789abcdef0123456789abcdef01234567"
    publish("llama-default", repo / "blobs")
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for blob in (repo / "blobs").iterdir():
        (repo / "snapshots" / commit / blob.name).symlink_to(blob)
    code = (
        "from opcd.models.files import ModelFiles\n"
        "base = ModelFiles('someone/tiny')\n"
        "print(base.folder.name, *(f.name for f in base.small_files))\n"
    )
    cache = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | cache
    )
    assert done.stdout.split() == [
        commit,
        "LICENSE",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ], done.stderr


def test_an_adapter_is_no_model(settings: dict, tmp_path: Path) -> None:
    base = publish("llama-default", tmp_path / "base")
    adapter = untrained_export(settings, base, lora_rank=4) / "adapter"
    with pytest.raises(InputError, match=r"must be whole, got an adapter .*merge_and_unload"):
        prepare(TrainConfig(**settings | {"model": str(adapter)}))


@pytest.mark.parametrize("name", ["runs/of/mine", "there/final", "./final", "there/", "a-file"])
def test_a_path_is_not_looked_for_on_a_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    if name == "there/final":
        (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="model must be a folder, got"):
        load_config(name)


def test_quantised_folders(settings: dict, tmp_path: Path) -> None:
    base = publish("llama-default", tmp_path / "base")
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    write_json(base / "config.json", CONFIGS["llama-default"] | quantised)
    config = TrainConfig(**settings | {"model": str(base)})
    with pytest.raises(InputError, match="quantised by gptq; name the unquantised model"):
        prepare(config, for_training=True)
    prepare(config)
    with pytest.raises(
        InputError, match=r"packages that .* needs must be installed, got .*optimum"
    ):
        load_model(str(base), "auto")


def test_a_converted_builtin_is_read_by_both_releases(tmp_path: Path) -> None:
    """Also one that was converted before; nothing is rewritten twice."""
    tiny_llama(rope_theta=100000.0, dtype="bfloat16").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    before = logits(tmp_path)
    for _ in range(2):
        builtin._say_in_both_ways(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
        assert config["dtype"] == config["torch_dtype"]
        tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert torch.equal(logits(tmp_path), before)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == [
        tiny_tokenizer().convert_tokens_to_ids(c) for c in "ab"
    ]


def test_shards_say_what_they_hold(settings: dict, tmp_path: Path) -> None:
    """The checkpoint's too, in fp32; the metadata that loaders look for is there."""
    base = publish("llama-sharded", tmp_path / "base")
    final = untrained_export(settings, base)
    for folder in (final, final.parent / "checkpoints" / "step-000000"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        held = {key: file for file, key in tensors(folder)}
        assert index["weight_map"] == held
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("begins", ["", "\n", "  {% if true %}  {% endif %}"])
def test_arguments_of_the_template_go_with_the_model(
    settings: dict, tmp_path: Path, begins: str
) -> None:
    """Who calls the template without them writes what was trained on."""
    template = tmp_path / "own.jinja"
    text = begins + CHATML.replace(
        "assistant\n' }}", "assistant\n' }}{% if not thinks %}{{ names['it'] ~ level }}{% endif %}"
    )
    template.write_text(text, encoding="utf-8")
    arguments = {"thinks": False, "level": None, "names": {"it": 'a "b"', "on": True}}
    final = run_of(settings, chat_template=str(template), chat_template_args=arguments)
    asked = [{"role": "user", "content": "cat"}]
    own = AutoTokenizer.from_pretrained(final)
    given = own.apply_chat_template(
        asked, chat_template=text, tokenize=False, add_generation_prompt=True, **arguments
    )
    found = own.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert found == given
    assert 'a "b"None' in found
    other = own.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, thinks=True)
    assert 'a "b"' not in other, "an argument that is given counts"


def test_what_no_run_may_hold_is_not_copied(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or said before the first step: nobody could open the run's folder again."""
    base = Path(shutil.copytree(settings["model"], tmp_path / "base"))
    for name in ("x.npy", "scores.pkl"):
        (base / name).write_bytes(b"of the user's own")
    final = run_of(settings, model=str(base))
    assert not [*final.glob("*.npy"), *final.glob("*.pkl")]
    (base / "log.json").write_text('{"a": 1}\n{"b": 2}\n')
    monkeypatch.setattr("opcd.training.loop.Distiller.step", None)
    more = {"model": str(base), "output_dir": str(tmp_path / "second")}
    with pytest.raises(InputError, match=r"copied from the base stands in its run: .*base/log"):
        train(TrainConfig(**settings | more))


def test_a_template_that_was_given_goes_with_the_model(settings: dict, tmp_path: Path) -> None:
    """And what it ends an answer with ends a completion there, of an adapter's run too."""
    template = tmp_path / "own.jinja"
    text = CHATML.replace("<|im_end|>", "<|im_start|>")
    template.write_text(text, encoding="utf-8")
    final = run_of(settings, chat_template=str(template), lora_rank=2)
    assert AutoTokenizer.from_pretrained(final).get_chat_template() == text
    ends = json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [1, 0]
