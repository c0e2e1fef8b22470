"""Weights beside those that are read: nobody is left to guess which were."""

import json
import re
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastkv_jax.checkpoint import load_model
from fastkv_jax.checkpoint.hugging_face import inspect
from fastkv_jax.errors import CheckpointError, ModelWarning

PARTS = ("{}-00001-of-00002.safetensors", "{}-00002-of-00002.safetensors")


def told(folder) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ModelWarning)
        inspect(folder)
    return [str(warning.message).removeprefix(f"{folder}: ") for warning in caught]


def split(folder, prefix, index=None):
    """The same weights once more, in two files."""
    tensors = load_file(next(folder.glob("*.safetensors")))
    weight_map = {}
    for i, part in enumerate(PARTS):
        mine = {name: tensors[name] for name in sorted(tensors)[i::2]}
        save_file(mine, folder / part.format(prefix))
        weight_map |= dict.fromkeys(mine, part.format(prefix))
    if index:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def copy(folder, name):
    (folder / name).write_bytes((folder / "model.safetensors").read_bytes())


@pytest.fixture
def folder(tmp_path, tiny):
    return tiny.write_hugging_face(tmp_path / "m", tiny.model())


@pytest.mark.parametrize(
    ("add", "others"),
    [
        (lambda f: copy(f, "consolidated.safetensors"), "consolidated.safetensors"),
        (lambda f: copy(f, "model (1).safetensors"), "model (1).safetensors"),
        (lambda f: copy(f, "model1.safetensors"), "model1.safetensors"),
        (lambda f: split(f, "pytorch_model"), ", ".join(PARTS).format("pytorch_model", "pytorch_model")),
        (
            lambda f: split(f, "model.fp16", "model.safetensors.index.fp16.json"),
            ", ".join(PARTS).format("model.fp16", "model.fp16"),
        ),
    ],
)
def test_another_set_beside_the_standard_name(folder, add, others):
    add(folder)
    assert told(folder) == [f"model.safetensors is read; {others} beside it, another set of weights, is not"]


def test_another_set_beside_an_index(folder):
    split(folder, "model_0", "model.safetensors.index.json")
    (folder / "model.safetensors").rename(folder / "old.safetensors")
    assert told(folder) == [
        "model_0-00001-of-00002.safetensors, model_0-00002-of-00002.safetensors is read;"
        " old.safetensors beside it, another set of weights, is not"
    ]


def test_pickled_weights_beside_a_name_of_its_own(folder):
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    (folder / "optimizer.pt").write_bytes(b"PK")
    assert told(folder) == []
    (folder / "model.safetensors").rename(folder / "old.safetensors")
    assert told(folder) == ["old.safetensors is read; pytorch_model.bin beside it, another set of weights, is not"]


def test_other_layouts_and_files_that_are_no_weights_are_nothing_to_say(folder):
    names = {"tok_embeddings.weight": np.zeros(2, np.float32), "norm.weight": np.zeros(2, np.float32)}
    save_file(names, folder / "consolidated-00001-of-00001.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert told(folder) == []


def test_an_adapter_is_not_applied(folder, tiny):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    low_rank = {"base_model.model.model.norm.lora_A.weight": np.zeros(2, np.float32)}
    save_file(low_rank, folder / "adapter_model.safetensors")
    files = "adapter_config.json, adapter_model.safetensors"
    line = f"the adapter ({files}) is not applied; merge it into the model to use it"
    assert told(folder) == [line]
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert told(folder) == [line]
    with pytest.warns(ModelWarning, match="is not applied"):
        tiny.assert_same(load_model(folder, "float32"), tiny.model())
    (folder / "mine.safetensors").unlink()
    with pytest.raises(CheckpointError, match=re.escape("only an adapter (adapter_model.safetensors), no model")):
        inspect(folder)
