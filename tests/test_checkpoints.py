"""What is asked of the hub, and what is not: a model that cannot be used is refused before its weights are fetched."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import build
from hub import Hub, Repo, hub
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from refusal_core import checkpoints
from refusal_core.chat_model import ChatModel, ModelError

__all__ = ["hub"]  # a fixture

NAME = "somebody/tiny-chat"
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build("Llama, tied", tmp_path_factory.mktemp("tiny"))


def load(name=NAME, **options) -> ChatModel:
    return ChatModel.load(name, device="cpu", **options)


def is_weights(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | values).items() if v is not None}))


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": "x"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 1.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": []},
        {"hidden_size": -1},
        {"vocab_size": 0},
        {"vocab_size": {}},
        {"max_position_embeddings": -1},
        {"rope_parameters": "x"},
        {"eos_token_id": "x"},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_in_a_config_is_one_sentence_that_names_it(tiny: Path, tmp_path, values):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    edit_config(folder, **values)
    with pytest.raises(ModelError) as refused:
        load(folder)
    said = str(refused.value)
    assert "\n" not in said and said.endswith(".") and next(iter(values)) in said
    assert said.count("config.json") == 1 and "copy it again" in said


def test_a_model_is_fetched_once_at_one_commit_and_weights_come_last(hub: Hub, tiny: Path, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    hub.repos[NAME] = Repo({FIRST: folder})
    model = load()
    assert [file for file in hub.requested if is_weights(file)] == ["model.safetensors"]
    assert hub.requested[-1] == "model.safetensors" and "modeling_tiny.py" not in hub.requested
    assert model.revision == FIRST and model.name == NAME
    expected = load(tiny)
    assert model.fingerprint == expected.fingerprint
    assert torch.equal(model.logits(["Hi"]), expected.logits(["Hi"]))
    asked = len(hub.requested)
    load()
    assert len(hub.requested) == asked


def test_a_revision_stays_what_it_was_when_the_model_moves_on(hub: Hub, tiny: Path, tmp_path):
    hub.repos[NAME] = Repo({FIRST: tiny, SECOND: build("Llama, tied", tmp_path / "newer", seed=1)})
    old, new = load(revision=FIRST), load()
    assert (old.revision, new.revision) == (FIRST, SECOND)
    assert old.fingerprint != new.fingerprint
    assert not torch.equal(old.logits(["Hi"]), new.logits(["Hi"]))


def test_without_the_hub_what_was_fetched_is_used_and_the_rest_is_a_sentence(hub: Hub, tiny: Path, monkeypatch):
    hub.repos |= {NAME: Repo({FIRST: tiny}), "somebody/half": Repo({SECOND: tiny}, sizes={"model.safetensors": 10**17})}
    load()
    with pytest.raises(ModelError, match="on the disk"):
        load("somebody/half")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requested.clear()
    assert load().revision == FIRST
    for name in ("somebody/half", "somebody/never-seen"):
        with pytest.raises(ModelError, match=r"not wholly on this machine and the hub cannot be reached"):
            load(name)
    assert not hub.requested


def test_a_hub_that_is_gone_is_a_sentence(hub: Hub, tiny: Path):
    hub.repos[NAME] = Repo({FIRST: tiny})
    load()
    hub.close()
    assert load().revision == FIRST
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        load("somebody/never-seen")


def test_a_cache_that_cannot_be_written_to_is_no_missing_hub(hub: Hub, tiny: Path, tmp_path, monkeypatch):
    hub.repos[NAME] = Repo({FIRST: tiny})
    (tmp_path / "a file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(
        ModelError, match=r"cannot be kept in .*a file/cache \(.+\): make room there, or set HF_HUB_CACHE"
    ):
        load()


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def instead_of_weights(name: str):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def with_config(**values):
    return lambda folder: edit_config(folder, **values)


HUGE = {"num_hidden_layers": 10, "hidden_size": 65_536, "intermediate_size": 262_144, "num_attention_heads": 64}
REFUSED = {
    "pickled weights": (instead_of_weights("pytorch_model.bin"), "no .safetensors weights"),
    "GGUF": (instead_of_weights("tiny-q4.gguf"), "GGUF"),
    "an adapter": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
            and (folder / "adapter_config.json").write_text("{}")
        ),
        "is an adapter",
    ),
    "no chat template": (no_template, "no chat template"),
    "code of its own": (
        with_config(model_type="tiny_own", auto_map={"AutoModelForCausalLM": "modeling.Tiny"}),
        "code of its own",
    ),
    "a kind nobody knows": (with_config(model_type="tiny_own"), "config.json"),
    "a config of the wrong types": (with_config(hidden_size="wide"), "config.json"),
    "quantised": (with_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    "no decoder": (with_config(model_type="t5", architectures=["T5ForConditionalGeneration"]), "no decoder-only"),
    "no attention": (with_config(model_type="mamba", num_attention_heads=None), "no attention"),
    "an architecture that is not known": (with_config(model_type="minimax", architectures=None), "cannot hook MiniMax"),
    "a write that has no hook": (with_config(model_type="opt", architectures=None), "cannot be hooked.*another family"),
    "more weights than memory": (with_config(**HUGE), "of memory"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_used_is_refused_before_any_weights_are_asked_for(hub: Hub, tiny: Path, tmp_path, case):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    change, says = REFUSED[case]
    change(folder)
    hub.repos[NAME] = Repo({FIRST: folder})
    with pytest.raises(ModelError, match=says) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert not [file for file in hub.requested if is_weights(file) or file.endswith(".gguf")]


def test_a_disk_that_is_too_small_is_refused_before_any_weights_are_asked_for(hub: Hub, tiny: Path):
    hub.repos[NAME] = Repo({FIRST: tiny}, sizes={"model.safetensors": 10**17})
    with pytest.raises(ModelError, match=re.escape("needs 100,000,000.0 GB on the disk")):
        load()
    assert hub.requested and not [file for file in hub.requested if is_weights(file)]


@pytest.mark.parametrize(
    ("repo", "revision", "says"),
    [("gated", None, "licence accepted"), ("open", "9" * 40, "check the name"), ("none", None, "check the name")],
)
def test_what_the_hub_does_not_give_is_one_sentence(hub: Hub, tiny: Path, repo, revision, says):
    hub.repos |= {"somebody/open": Repo({FIRST: tiny}), "somebody/gated": Repo({FIRST: tiny}, gated=True)}
    with pytest.raises(ModelError, match=says) as caught:
        load(f"somebody/{repo}", revision=revision)
    assert "\n" not in str(caught.value) and not hub.requested


def test_a_config_without_architectures_loads(hub: Hub, tiny: Path, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    edit_config(folder, architectures=None)
    assert "architectures" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(load(folder).logits(["Hi"]), load(tiny).logits(["Hi"]))


def test_weights_in_shards_are_fetched_by_their_index(hub: Hub, tiny: Path, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="200KB")
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    hub.repos[NAME] = Repo({FIRST: folder})
    assert torch.equal(load().logits(["Hi"]), load(tiny).logits(["Hi"]))
    assert {file for file in hub.requested if is_weights(file)} == shards


@pytest.mark.parametrize(
    "file", ["weights.bin", "*", "../elsewhere/model.safetensors", "a/model.safetensors", 1, None, ""]
)
def test_an_index_that_names_no_safetensors_beside_it_is_refused_and_nothing_it_names_is_asked_for(
    hub: Hub, tiny: Path, tmp_path, file
):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    hub.repos[NAME] = Repo({FIRST: folder})
    for name in (folder, NAME):
        with pytest.raises(ModelError, match=r"does not name \.safetensors files beside it"):
            load(name)
    assert not any(map(is_weights, hub.requested))


def test_one_bias_changed_in_a_large_file_is_another_model(tiny: Path, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "large")
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": torch.zeros(256, 4096) for i in range(12)}
    names = {checkpoints.fingerprint(folder)}
    for i in range(8):
        biases = {f"model.layers.{j}.mlp.down_proj.bias": torch.full((256,), float(i == j)) for j in range(8)}
        save_file(tensors | biases, folder / "model.safetensors", {"format": "pt"})
        names.add(checkpoints.fingerprint(folder))
    assert len(names) == 9


def test_other_weights_in_the_folder_are_no_part_of_the_model(tiny: Path, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    fingerprint = load(folder).fingerprint
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "another.safetensors"}}')
    assert load(folder).fingerprint == fingerprint == load(tiny).fingerprint
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"incomplete: another\.safetensors is missing"):
        load(folder)


def test_a_download_is_followed_byte_by_byte_and_ends_where_it_is_not_wanted(hub: Hub, tiny: Path):
    hub.repos[NAME] = Repo({FIRST: tiny})
    size = (tiny / "model.safetensors").stat().st_size
    told: list[tuple[int, int]] = []

    def enough(done: int, total: int) -> None:
        raise ModelError("Not wanted any more.")

    with pytest.raises(ModelError, match="Not wanted"):
        load(follow=enough)
    load(follow=lambda done, total: told.append((done, total)))
    assert told[-1] == (size, size) and told == sorted(told)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "a" * 5000, "a/" * 3000])
def test_a_name_that_can_be_no_folder_is_one_sentence(name):
    with pytest.raises(ModelError, match="There is no model folder"):
        load(name)


@pytest.mark.parametrize(
    "template", ["{{ 1/0 }}", "{{ messages[7].x.y }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"]
)
def test_a_template_that_fails_in_any_way_is_one_sentence(tiny: Path, tmp_path, template):
    folder = shutil.copytree(tiny, tmp_path / "repo")
    for file in folder.glob("*.jinja"):
        file.write_text(template)
    with pytest.raises(ModelError, match="does not take a message") as refused:
        load(folder)
    assert "\n" not in str(refused.value)
