from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.footprint import Shape, Weights, read_shape, read_weights


def test_weights_are_counted_over_all_files(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 4), np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(5, np.float16), "c": np.zeros((), np.int8)}, tmp_path / "model-00002-of-00002.safetensors")
    weights = read_weights(tmp_path)
    assert weights == Weights(12 + 5 + 1, 12 * 4 + 5 * 2 + 1)
    assert [weights.bytes_as(dtype) for dtype in ("auto", "float32", "bfloat16")] == [59, 72, 36]


def test_a_folder_without_whole_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"holds no \*\.safetensors"):
        read_weights(tmp_path)
    with pytest.raises(ModelLoadError, match="is no folder"):
        read_weights(tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ModelLoadError, match="not a whole safetensors file"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (
            {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
            | {"max_position_embeddings": 8192},
            Shape(30, 3, 64, 8192),
        ),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, Shape(12, 12, 64, 1024)),
        (
            {"text_config": {"num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 256, "hidden_size": 640}},
            Shape(1, 4, 256, None),
        ),
    ],
    ids=["llama", "gpt2", "nested"],
)
def test_shapes_are_read_under_the_names_of_each_family(tmp_path: Path, config: dict, shape: Shape) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_shape(tmp_path) == shape


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"layers": 3}', encoding="utf-8")
    with pytest.raises(ModelLoadError, match="does not tell layers"):
        read_shape(tmp_path)


def test_the_cache_holds_keys_and_values_of_every_layer() -> None:
    # 2 (keys, values) x 30 layers x 3 heads x 64 numbers x 4 bytes = 46080 bytes per token
    assert Shape(30, 3, 64, 8192).kv_bytes(1, 4) == 46_080
    assert Shape(30, 3, 64, 8192).kv_bytes(4096, 2) == 46_080 * 4096 // 2
