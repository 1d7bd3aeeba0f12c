from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import flashbias as fb
from flashbias.decompose.read import Layer, read_layers


def write(path: Path, tensor: Tensor, key: str = "x") -> Path:
    """Write one tensor in the format that the path's name says."""
    if path.suffix == ".npy":
        np.save(path, tensor.numpy())
    elif path.suffix == ".safetensors":
        save_file({key: tensor.contiguous()}, path)
    else:
        torch.save({key: tensor}, path)
    return path


def the_only(layers: tuple[Layer, ...]) -> Layer:
    (layer,) = layers
    return layer


class TestMatrices:
    @pytest.mark.parametrize("suffix", [".npy", ".pt", ".pth", ".bin", ".safetensors"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_every_format_is_mapped(self, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
        bias = torch.randn(3, 5, 7).to(dtype)
        layer = the_only(read_layers(write(tmp_path / f"x{suffix}", bias)))
        assert layer.shape == (3, 5, 7)
        assert layer.name == ""
        assert layer.mapped
        assert layer.dense().dtype == dtype
        assert torch.equal(layer.dense(), bias)

    @given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.sampled_from([".npy", ".pt", ".safetensors"]))
    def test_any_shape(self, tmp_path_factory: pytest.TempPathFactory, shape: list[int], suffix: str) -> None:
        bias = torch.randn(shape)
        layers = read_layers(write(tmp_path_factory.mktemp("read") / f"x{suffix}", bias))
        expected = bias.reshape(-1, *bias[(0,) * max(0, bias.dim() - 3)].reshape(-1, *shape[-2:]).shape)
        assert len(layers) == (shape[0] if len(shape) == 4 else 1)
        assert torch.equal(torch.stack([layer.dense() for layer in layers]), expected)

    def test_layers_have_names(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.npy", torch.zeros(2, 3, 4, 4))
        assert [layer.name for layer in read_layers(path)] == ["layer 0", "layer 1"]
        path = write(tmp_path / "one.npy", torch.zeros(1, 3, 4, 4))
        assert [layer.name for layer in read_layers(path)] == [""]

    def test_a_bfloat16_tensor(self, tmp_path: Path) -> None:
        bias = torch.randn(2, 4, 4).bfloat16()
        assert torch.equal(the_only(read_layers(write(tmp_path / "x.safetensors", bias))).dense(), bias)

    def test_nothing_is_read_before_it_is_needed(self, tmp_path: Path) -> None:
        """Entries that are overwritten after opening show their new value: the tensor lies in the file."""
        for suffix in (".npy", ".safetensors"):
            path = write(tmp_path / f"x{suffix}", torch.zeros(4, 1024, 1024))
            layer = the_only(read_layers(path))
            with path.open("r+b") as file:
                file.seek(-4, 2)
                file.write(np.float32(3.0).tobytes())
            assert layer.dense()[-1, -1, -1] == 3.0

    def test_arrays_of_another_order(self, tmp_path: Path) -> None:
        array = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
        np.save(tmp_path / "big.npy", array.astype(">f4"))
        np.save(tmp_path / "columns.npy", np.asfortranarray(array))
        for name, mapped in (("big", False), ("columns", True)):
            layer = the_only(read_layers(tmp_path / f"{name}.npy"))
            assert layer.mapped == mapped
            assert np.array_equal(layer.dense().numpy(), array)

    def test_the_older_format_of_torch(self, tmp_path: Path) -> None:
        bias = torch.randn(2, 4, 4)
        torch.save(bias, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        layer = the_only(read_layers(tmp_path / "x.pt"))
        assert not layer.mapped
        assert torch.equal(layer.dense(), bias)

    def test_what_is_not_mapped_needs_memory(self) -> None:
        stored = torch.empty(8, 100, 100, device="meta")
        mapped, read = Layer("", stored, mapped=True), Layer("", stored)
        assert read.bytes_needed == mapped.bytes_needed + 4 * 8 * 100 * 100
        assert mapped.bytes_needed >= 8 * 100 * 100
        table = Layer("", torch.empty(8, 199, device="meta"), seqlen=100, mapped=True)
        assert table.bytes_needed == read.bytes_needed


class TestTables:
    @pytest.mark.parametrize("window", [(3, 4), (2, 3, 2)])
    @pytest.mark.parametrize("class_token", [False, True])
    @pytest.mark.parametrize("is_turned", [False, True])
    def test_a_window_is_read_as_the_family_reads_it(
        self, tmp_path: Path, window: tuple[int, ...], class_token: bool, is_turned: bool
    ) -> None:
        family = fb.WindowBias(5, window, class_token)
        weight = family.weight.detach()
        before = torch.get_rng_state()
        path = write(tmp_path / "x.pt", weight.mT.contiguous() if is_turned else weight)
        layer = the_only(read_layers(path, window=window))
        assert layer.shape == (5, family.num_tokens, family.num_tokens)
        assert torch.equal(layer.dense(), family().dense())
        assert torch.equal(torch.get_rng_state(), before)

    def test_one_head(self, tmp_path: Path) -> None:
        family = fb.WindowBias(1, (3, 3))
        path = write(tmp_path / "x.npy", family.weight.detach()[:, 0])
        assert torch.equal(the_only(read_layers(path, window=[3, 3])).dense(), family().dense())

    @pytest.mark.parametrize("entries", [19, 7])
    @pytest.mark.parametrize("is_turned", [False, True])
    def test_a_line_is_read_by_key_minus_query(self, tmp_path: Path, entries: int, is_turned: bool) -> None:
        table = torch.randn(4, entries)
        path = write(tmp_path / "x.safetensors", table.mT.contiguous() if is_turned else table)
        layer = the_only(read_layers(path, seqlen=10))
        half = entries // 2
        for i, j in ((0, 0), (0, 9), (9, 0), (3, 5)):
            assert torch.equal(layer.dense()[:, i, j], table[:, half + max(-half, min(half, j - i))])

    @pytest.mark.parametrize(
        ("shape", "options", "said"),
        [
            (
                (24, 4),
                {"window": (3, 3)},
                r"a side must have the 25 entries \(or 28 with a class token\) of the window 3x3",
            ),
            ((25, 28), {"window": (3, 3)}, "either side could be"),
            ((2, 5, 5), {"window": (3, 3)}, "which is no table"),
            ((32, 12), {"seqlen": 16}, r"a side must have the 31 entries of 16 positions, .*RelativeBuckets"),
            ((33, 12), {"seqlen": 16}, "a side must have the 31 entries"),
            ((31, 31), {"seqlen": 16}, "either side could be"),
            ((), {"seqlen": 16}, "which is no table"),
        ],
    )
    def test_a_shape_that_does_not_fit(
        self, tmp_path: Path, shape: tuple[int, ...], options: dict[str, object], said: str
    ) -> None:
        path = write(tmp_path / "x.pt", torch.zeros(shape))
        with pytest.raises(ValueError, match=said):
            read_layers(path, **options)  # type: ignore[arg-type]

    def test_a_table_is_not_taken_for_a_matrix(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.pt", torch.zeros(169, 4), "layers.0.relative_position_bias_table")
        with pytest.raises(ValueError, match=r"looks like a relative table, .* window or seqlen must be given"):
            read_layers(path)
        assert the_only(read_layers(path, window=(7, 7))).shape == (4, 49, 49)


class TestKeys:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        inner = OrderedDict({"attn.bias": torch.zeros(2, 4, 4), "weight": torch.nn.Parameter(torch.ones(3, 3))})
        content = {"epoch": 3, "model": inner, "list": [torch.zeros(5, 5), "text"], 7: torch.zeros(1, 6, 6)}
        torch.save(content, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    @pytest.mark.parametrize(
        ("key", "shape"),
        [("model.attn.bias", (2, 4, 4)), ("model.weight", (1, 3, 3)), ("list.0", (1, 5, 5)), ("7", (1, 6, 6))],
    )
    def test_names_are_joined_by_dots(self, path: Path, key: str, shape: tuple[int, ...]) -> None:
        layer = the_only(read_layers(path, key))
        assert layer.shape == shape
        assert not layer.dense().requires_grad

    def test_a_key_must_be_given_where_there_are_several(self, path: Path) -> None:
        with pytest.raises(ValueError, match=r"holds 4 tensors; key must name one: model.attn.bias \[2, 4, 4\]"):
            read_layers(path)

    def test_a_missing_key_lists_what_comes_close(self, path: Path) -> None:
        with pytest.raises(ValueError, match=r"no tensor 'model.attn.bia'; there are model.attn.bias \[2, 4, 4\], .*"):
            read_layers(path, "model.attn.bia")
        with pytest.raises(ValueError, match="no tensor that matches key 'nope"):
            read_layers(path, "nope*")

    def test_a_long_list_is_cut(self, tmp_path: Path) -> None:
        tensors = {f"w{n}": torch.zeros(1) for n in range(40)} | {
            "block.relative_position_bias_table": torch.zeros(9, 2)
        }
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"key must name one: block.relative_.*, and 29 more$"):
            read_layers(tmp_path / "x.safetensors")

    def test_a_pattern_takes_layers_in_natural_order(self, tmp_path: Path) -> None:
        tensors = {f"layers.{n}.bias": torch.full((n, 2, 2), float(n)) for n in (10, 2, 1)}
        for path in (tmp_path / "x.safetensors", tmp_path / "x.pt"):
            save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
            layers = read_layers(path, "layers.*.bias")
            assert [layer.name for layer in layers] == ["layers.1.bias", "layers.2.bias", "layers.10.bias"]
            assert [layer.shape[0] for layer in layers] == [1, 2, 10]

    def test_two_tensors_of_one_name(self, tmp_path: Path) -> None:
        torch.save({"a": {"b": torch.zeros(2, 2)}, "a.b": torch.zeros(2, 2)}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"two tensors that would both be called 'a\.b'"):
            read_layers(tmp_path / "x.pt")

    def test_an_array_has_no_keys(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="there is no key 'x'"):
            read_layers(write(tmp_path / "x.npy", torch.zeros(2, 2)), "x")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


class TestRefused:
    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        evil = Evil(tmp_path / "proof")
        torch.save({"x": torch.zeros(2, 2), "y": evil}, tmp_path / "zip.pt")
        torch.save({"x": torch.zeros(2, 2), "y": evil}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        for name in ("plain.pt", "plain.npy", "plain.safetensors"):
            (tmp_path / name).write_bytes(pickle.dumps(evil))
        array = np.empty(1, dtype=object)
        array[0] = evil
        np.save(tmp_path / "array.npy", array, allow_pickle=True)
        said = {
            "zip.pt": r"pickled Python objects beside tensors \(.*pathlib.*\), which is refused",
            "old.pt": "more than tensors, or a damaged one, which is refused because unpickling can run code",
            "plain.pt": "more than tensors, or a damaged one, which is refused because unpickling can run code",
            "plain.npy": "looks like a pickle, which is refused",
            "plain.safetensors": "looks like a pickle, which is refused",
            "array.npy": "pickled Python objects, which are refused",
        }
        for name, what in said.items():
            with pytest.raises(ValueError, match=what):
                read_layers(tmp_path / name)
        assert not (tmp_path / "proof").exists()

    @pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.safetensors"])
    @pytest.mark.parametrize("written", [".npy", ".pt", ".safetensors"])
    def test_a_file_that_is_not_what_its_name_says(self, tmp_path: Path, name: str, written: str) -> None:
        path = write(tmp_path / f"y{written}", torch.zeros(2, 3)).rename(tmp_path / name)
        if path.suffix == written:
            assert read_layers(path)
        else:
            with pytest.raises(ValueError, match="is not what its name says: it looks like"):
                read_layers(path)

    @pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
    def test_text_nothing_and_halves(self, tmp_path: Path, suffix: str) -> None:
        path = write(tmp_path / f"x{suffix}", torch.zeros(40, 40))
        whole = path.read_bytes()
        for content in (b"", b"some text, not a tensor", whole[: len(whole) // 2], whole[:12]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"is empty|damaged|cut short|no safetensors file|looks like"):
                read_layers(path)

    def test_an_archive_of_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", a=np.zeros((2, 2)))
        with pytest.raises(ValueError, match=r"must end in \.npy, \.pt"):
            read_layers(tmp_path / "x.npz")
        (tmp_path / "x.npz").rename(tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"was not written by torch\.save"):
            read_layers(tmp_path / "x.pt")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is not there"):
            read_layers(tmp_path / "x.npy")
        with pytest.raises(FileNotFoundError, match="is a folder"):
            read_layers(tmp_path)

    @pytest.mark.parametrize(
        "tensor",
        [torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.complex64), torch.eye(3).to_sparse()],
        ids=["integers", "complex", "sparse"],
    )
    def test_what_is_no_dense_floating_point(self, tmp_path: Path, tensor: Tensor) -> None:
        torch.save(tensor, tmp_path / "x.pt")
        with pytest.raises(TypeError, match="must be a dense tensor of floating point"):
            read_layers(tmp_path / "x.pt")

    def test_arrays_of_other_kinds(self, tmp_path: Path) -> None:
        for dtype in (np.int32, np.longdouble, np.dtype("U3"), np.bool_):
            np.save(tmp_path / "x.npy", np.zeros((3, 3), dtype=dtype))
            with pytest.raises(TypeError, match="must hold float16, float32 or float64"):
                read_layers(tmp_path / "x.npy")

    @pytest.mark.parametrize("shape", [(3,), (1, 2, 3, 4, 5)])
    def test_shapes(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"must be \[N, M\], \[H, N, M\] or \[L, H, N, M\], or a relative table"):
            read_layers(write(tmp_path / "x.npy", torch.zeros(shape)))

    def test_an_empty_tensor_and_no_tensor(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is empty: shape"):
            read_layers(write(tmp_path / "x.npy", torch.zeros(0, 3)))
        torch.save({"epoch": 3}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="holds no tensor, but dict"):
            read_layers(tmp_path / "x.pt")
        save_file({}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"x\.safetensors holds no tensor"):
            read_layers(tmp_path / "x.safetensors")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"window": (3, 3), "seqlen": 4}, "exclude each other"),
            ({"window": (3,)}, "two or three positive sides"),
            ({"window": (3, 0)}, "two or three positive sides"),
            ({"seqlen": 0}, "at least 1"),
        ],
    )
    def test_options(self, tmp_path: Path, options: dict[str, object], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            read_layers(write(tmp_path / "x.npy", torch.zeros(3, 3)), **options)  # type: ignore[arg-type]

    def test_a_header_that_is_json_and_no_more(self, tmp_path: Path) -> None:
        text = json.dumps({"a": 1}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ValueError, match="its header cannot be read"):
            read_layers(tmp_path / "x.safetensors")
