"""Networks by name and weights from files, and what is said when they do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eroseg_ext.models.loading import build, load_network, load_weights
from eroseg_ext.models.small_deeplab import SmallDeepLab


def forked(width: int) -> SmallDeepLab:
    torch.manual_seed(1)
    return SmallDeepLab(5, width=width)


def with_module(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"module." + name: value for name, value in state.items()}


def same(left: nn.Module, right: nn.Module) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "optimizer": {"state": {0: 1}}, "ema": None, "settings": {"model": "tiny"}},
        lambda state: {"model": {"a": torch.ones(1)}, "ema": {"n_averaged": torch.ones(()), **with_module(state)}},
        with_module,
        lambda state: {"model": {"_orig_mod." + name: value for name, value in state.items()}},
    ],
    ids=["state-dict", "checkpoint", "lightning", "training", "ema", "ddp", "compiled"],
)
def test_weights_of_the_built_in_network(tmp_path: Path, wrap: Any) -> None:
    with torch.random.fork_rng():
        made = forked(8)
    torch.save(wrap(made.state_dict()), tmp_path / "weights.pt")
    found = load_network(weights=tmp_path / "weights.pt")
    assert isinstance(found, SmallDeepLab)
    assert (found.classes, found.width) == (5, 8)
    assert same(found, made)
    assert not found.training


def test_a_callable_by_import_path(tmp_path: Path) -> None:
    made = load_network("eroseg_ext.models:SmallDeepLab", model_args={"classes": 3, "width": 8})
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    found = load_network(
        "eroseg_ext.models:SmallDeepLab", tmp_path / "weights.pt", model_args={"classes": 3, "width": 8}
    )
    assert same(found, made)


@pytest.mark.parametrize(("name", "width"), [("small", 32), ("tiny", 12)])
def test_without_weights(name: str, width: int) -> None:
    found = load_network(name, classes=4)
    assert isinstance(found, SmallDeepLab)
    assert (found.classes, found.width) == (4, width)


def variadic(**keywords: Any) -> nn.Module:
    return nn.Conv2d(3, keywords["num_classes"], 1)


def test_the_number_of_classes_goes_to_what_takes_it() -> None:
    built_in = build("tiny", 4, {"width": 8})
    assert isinstance(built_in, SmallDeepLab)
    assert (built_in.classes, built_in.width) == (4, 8)
    for name in ("training_common:AuxiliaryNet", "training_common:plain_net", f"{__name__}:variadic"):
        heads = [module for module in build(name, 5).modules() if isinstance(module, nn.Conv2d)]
        assert heads[-1].out_channels == 5
    assert isinstance(build("torch.nn:Identity", None), nn.Identity)
    found = load_network("eroseg_ext.models:SmallDeepLab", classes=3, model_args={"classes": 6})
    assert isinstance(found, SmallDeepLab)
    assert found.classes == 6


def test_a_name_holds_beside_weights(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        made = forked(12)
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    # The weights tell the classes, whatever the data has.
    assert same(load_network("tiny", tmp_path / "weights.pt", classes=9), made)
    with pytest.raises(ValueError, match=r"weights\.pt does not fit model small: .*size mismatch"):
        load_network("small", tmp_path / "weights.pt")


class Holder(nn.Module):
    """A network whose weights all have a wrapper's prefix by their own right."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Conv2d(3, 2, 1)


def test_a_prefix_that_is_the_networks_own_stays(tmp_path: Path) -> None:
    made, found = Holder(), Holder()
    for state in (made.state_dict(), with_module(made.state_dict())):
        torch.save(state, tmp_path / "weights.pt")
        nn.init.zeros_(found.model.weight)
        load_weights(found, tmp_path / "weights.pt", "Holder")
        assert same(found, made)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "model has no weights, wanted a file of them"),
        ({"name": "tiny"}, "model has no weights"),
        ({"name": "small_net"}, "model is 'small_net', wanted small, tiny or an import path"),
        (
            {"name": "no.such:thing"},
            "model is 'no.such:thing', which cannot be imported: ModuleNotFoundError: No module named 'no'",
        ),
        ({"name": "eroseg_ext.models.small_deeplab:Nothing"}, "which cannot be imported: .*Nothing"),
        ({"name": "eroseg_ext.models:SmallDeepLab"}, "cannot be made with {}: .*classes"),
        ({"name": "pathlib:Path"}, "gives a PosixPath, wanted an nn.Module"),
    ],
)
def test_what_cannot_be_made(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_network(**arguments)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"epoch": 3}, "holds no weights, wanted a state dict"),
        ([1, 2], "holds no weights"),
        ({}, "holds no weights"),
        ({"conv.weight": torch.zeros(1)}, "holds the weights of another network than the built-in one"),
        (
            {"stem.0.weight": torch.zeros(8, 3, 3, 3), "classifier.weight": torch.zeros(5, 16, 1, 1)},
            "does not fit model .* Missing key",
        ),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any, sentence: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=sentence):
        load_network(weights=tmp_path / "weights.pt")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("hello")
    with pytest.raises(ValueError, match="is no file of weights"):
        load_network(weights=tmp_path / "weights.pt")
    # Whoever made the file, loading it runs nothing of theirs.
    torch.save({"model": Path("code")}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="is no file of weights"):
        load_network(weights=tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError):
        load_network(weights=tmp_path / "missing.pt")
