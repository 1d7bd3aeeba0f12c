"""How families are found: one file, named nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import flashbias.biases as biases
from flashbias.biases import About, Bias, base

TOY = '''
"""A toy."""

from flashbias.biases.base import About, Bias


class ToyBias(Bias):
    about = About("A toy", "https://example.org", "0", "1", "exact", 0.0)

    @classmethod
    def examples(cls):
        return []
'''


@pytest.fixture
def restored_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def test_knows_the_exact_biases():
    assert set(biases.registry()) >= {
        "Alibi",
        "CosineDifference",
        "RelativeBuckets",
        "SquaredDistance",
        "Sum",
        "WindowBias",
    }


def test_names_are_class_names_in_order():
    found = biases.registry()
    assert list(found) == sorted(found)
    assert all(family.__name__ == name and issubclass(family, Bias) for name, family in found.items())


def test_is_a_copy():
    biases.registry().clear()
    assert biases.registry()


def test_a_new_file_is_found_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_registry: None):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(biases, "__path__", [*biases.__path__, str(tmp_path)])
    try:
        assert biases.registry()["ToyBias"].about.title == "A toy"
        assert biases.ToyBias is biases.registry()["ToyBias"]
    finally:
        sys.modules.pop("flashbias.biases.toy", None)
        vars(biases).pop("toy", None)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchBias"):
        _ = biases.NoSuchBias


def test_incomplete_family_is_refused(restored_registry: None):
    with pytest.raises(TypeError, match="about"):
        type("Nameless", (Bias,), {})
    with pytest.raises(TypeError, match="examples"):
        type("Untested", (Bias,), {"about": About("t", "https://u", "f", "r", "e", 0.0)})


def test_unregistered_class_stays_out(restored_registry: None):
    class Private(Bias, register=False):
        pass

    assert Private(2).num_heads == 2
    assert "Private" not in biases.registry()
    with pytest.raises(NotImplementedError, match="Private"):
        Private.examples()


def test_a_taken_name_is_refused(restored_registry: None):
    body = {
        "about": biases.Alibi.about,
        "examples": classmethod(lambda cls: []),
        "__module__": "somewhere.else_entirely",
    }
    with pytest.raises(ValueError, match="already registered"):
        type("Alibi", (Bias,), body)
