"""The loader takes exactly what fits and names everything that does not."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from klein_core.checkpoint.component import Component
from klein_core.checkpoint.files import Checkpoint, open_checkpoint
from klein_core.checkpoint.key_mapping import TensorSlice
from klein_core.checkpoint.weights import load_weights
from klein_core.errors import CheckpointError

FUSED = {"fused.weight": (TensorSlice("q.weight"), TensorSlice("k.weight"), TensorSlice("v.weight"))}
TENSORS = {
    "q.weight": torch.full((2, 4), 1.0),
    "k.weight": torch.full((3, 4), 2.0),
    "v.weight": torch.full((1, 4), 3.0),
    "out.weight": torch.randn(4, 6),
    "out.bias": torch.randn(4),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(4, 6, bias=False)
        self.out = nn.Linear(6, 4)


def on_meta() -> Small:
    with torch.device("meta"):
        return Small()


def write(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder


def write_shards(folder, tensors):
    names = {tensor: f"model-{i + 1:05}-of-{len(tensors):05}.safetensors" for i, tensor in enumerate(tensors)}
    for tensor, name in names.items():
        save_file({tensor: tensors[tensor]}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def load(folder, is_unneeded=lambda name: False, **arguments) -> Small:
    module = on_meta()
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    component = Component(checkpoint, FUSED, is_unneeded=is_unneeded)
    load_weights(module, component, device="cpu", **arguments)
    return module


def refusal(folder, **arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("writer", [write, write_shards])
def test_groups_are_fused_in_order_and_the_rest_is_as_stored(tmp_path, writer):
    module = load(writer(tmp_path, TENSORS))
    assert torch.equal(module.fused.weight[:, 0], torch.tensor([1.0, 1, 2, 2, 2, 3]))
    assert torch.equal(module.out.weight, TENSORS["out.weight"])
    assert torch.equal(module.out.bias, TENSORS["out.bias"])


def test_an_already_fused_tensor_loads_too(tmp_path):
    fused = {
        "fused.weight": torch.randn(6, 4),
        "out.weight": TENSORS["out.weight"],
        "out.bias": torch.ones(4),
    }
    assert torch.equal(load(write(tmp_path, fused)).fused.weight, fused["fused.weight"])


def test_half_of_a_group_is_named(tmp_path):
    message = refusal(write(tmp_path, {k: v for k, v in TENSORS.items() if k != "k.weight"}))
    assert "half of a fused group" in message
    assert "fused.weight (has q.weight, v.weight of q.weight, k.weight, v.weight)" in message


def test_missing_extra_and_half_are_all_named_at_once(tmp_path):
    tensors = {k: v for k, v in TENSORS.items() if k not in ("k.weight", "out.bias")}
    message = refusal(write(tmp_path, {**tensors, "lora.weight": torch.ones(1)}))
    assert "missing: out.bias" in message
    assert "not part of this model: lora.weight" in message
    assert "half of a fused group: fused.weight" in message
    assert str(tmp_path) in message


def test_long_lists_are_cut(tmp_path):
    extra = {f"extra.{index:03}": torch.ones(1) for index in range(100)}
    message = refusal(write(tmp_path, TENSORS | extra))
    assert "extra.000" in message
    assert "and 92 more" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("out.weight", (4, 5)),
        ("out.bias", (4, 1)),
        ("out.bias", ()),
        ("k.weight", (2, 4)),
        ("k.weight", (3, 5)),
    ],
)
def test_wrong_shapes_are_named(tmp_path, name, shape):
    message = refusal(write(tmp_path, TENSORS | {name: torch.ones(shape)}))
    assert f"{name} {shape}" in message
    assert "another shape" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.bool])
def test_tensors_of_unsupported_types_are_named(tmp_path, dtype):
    assert "out.bias" in refusal(write(tmp_path, TENSORS | {"out.bias": torch.ones(4).to(dtype)}))


def test_precision_is_that_of_most_values_unless_asked(tmp_path):
    mixed = {name: tensor.bfloat16() for name, tensor in TENSORS.items()} | {"out.bias": TENSORS["out.bias"]}
    write(tmp_path, mixed)
    assert {value.dtype for value in load(tmp_path).parameters()} == {torch.bfloat16}
    module = load(tmp_path, dtype=torch.float32)
    assert torch.equal(module.out.bias, TENSORS["out.bias"])
    assert torch.equal(module.out.weight, mixed["out.weight"].float())


def test_ignorable_tensors_are_never_read(tmp_path):
    """The shard that holds only them does not even exist."""
    write_shards(tmp_path, TENSORS | {"lm_head.weight": torch.ones(8)})
    (tmp_path / "model-00006-of-00006.safetensors").unlink()
    load(tmp_path, is_unneeded=lambda name: name.startswith("lm_head"))
    assert "not part of this model: lm_head.weight" in refusal(tmp_path)


def test_an_ignorable_buffer_is_zero(tmp_path):
    with torch.device("meta"):
        module = nn.BatchNorm2d(3, affine=False)
    write(tmp_path, {"running_mean": torch.ones(3), "running_var": torch.full((3,), 2.0)})
    checkpoint = open_checkpoint(tmp_path)
    component = Component(checkpoint, is_unneeded=lambda name: name == "num_batches_tracked")
    load_weights(module, component, device="cpu")
    assert module.num_batches_tracked == 0
    assert module.running_var.tolist() == [2, 2, 2]


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    """A file that is replaced or cut under a running server must not change or kill it."""
    module = load(write(tmp_path, TENSORS))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert torch.equal(module.out.weight, TENSORS["out.weight"])


def test_a_file_that_was_replaced_since_its_header_was_read_is_refused(tmp_path):
    """Names, shapes and size are the same; only the file system tells."""
    checkpoint = open_checkpoint(write(tmp_path, TENSORS))
    write(tmp_path, {name: tensor + 1 for name, tensor in TENSORS.items()}, "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    assert "changed since its header was read" in refusal(checkpoint)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, TENSORS)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    assert "model-00002-of-00005.safetensors is missing" in refusal(tmp_path)


def test_an_index_that_lies_about_a_shard_is_named(tmp_path):
    write_shards(tmp_path, TENSORS)
    save_file(
        {"v.weight": torch.ones(1, 4), "hidden": torch.ones(1)}, tmp_path / "model-00003-of-00005.safetensors"
    )
    message = refusal(tmp_path)
    assert "model-00003-of-00005.safetensors" in message
    assert "hidden" in message


@pytest.mark.parametrize(
    "weight_map", [None, ["q.weight"], {"q.weight": 3}, {"q.weight": "../../secret.safetensors"}]
)
def test_malformed_indexes_are_refused(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_an_index_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_files_are_named(tmp_path, kept):
    path = write(tmp_path, TENSORS) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is truncated" in refusal(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was read",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "pickle" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "not a safetensors file" in refusal(tmp_path)


def test_an_empty_folder_and_two_sets_of_weights_are_refused(tmp_path):
    assert "no *.safetensors" in refusal(tmp_path)
    write(tmp_path, TENSORS, "one.safetensors")
    write(tmp_path, TENSORS, "two.safetensors")
    assert "one.safetensors, two.safetensors" in refusal(tmp_path)


def test_default_names_win_over_variants(tmp_path):
    write(tmp_path, {"wrong": torch.ones(1)}, "model.fp16.safetensors")
    assert load(write(tmp_path, TENSORS))


def test_names_are_known_before_anything_is_read(tmp_path):
    assert set(open_checkpoint(write(tmp_path, TENSORS)).files) == set(
        load_file(tmp_path / "model.safetensors")
    )


def test_a_real_module_with_buffers_left_on_meta_is_a_mistake_of_ours(tmp_path):
    module = on_meta()
    module.register_buffer("frequencies", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="frequencies"):
        load_weights(module, Component(open_checkpoint(write(tmp_path, TENSORS)), FUSED), device="cpu")
