"""Networks by name and weights from files, and what is said when they do not go together."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
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


MADE = nn.Identity()


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
        (
            {"name": "small_net"},
            r"model is 'small_net', wanted small, tiny, package\.module:callable, file\.py:callable",
        ),
        (
            {"name": "no.such:thing"},
            "model is 'no.such:thing', which cannot be imported: ModuleNotFoundError: No module named 'no'",
        ),
        ({"name": "eroseg_ext.models.small_deeplab:Nothing"}, "which cannot be imported: .*Nothing"),
        ({"name": "eroseg_ext.models:SmallDeepLab"}, "cannot be made with {}: .*classes"),
        ({"name": "pathlib:Path"}, "gives a PosixPath, wanted an nn.Module"),
        ({"name": f"{__name__}:MADE"}, r"is an nn\.Module itself, wanted what makes one"),
        ({"name": "no_such.py:Net"}, "which cannot be imported: FileNotFoundError"),
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
            r"does not fit model SmallDeepLab: 82 of its 100 weights are missing, such as stem\.1\.weight; the file's "
            "begin with 'stem', 'classifier', the model's with 'context', 'coarse', 'fine', 'stem' and 3 more",
        ),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any, sentence: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=sentence):
        load_network(weights=tmp_path / "weights.pt")


class Runs:
    """What pickle makes of it is a call of the file's choice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return shutil.copyfile, (__file__, self.path)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("hello")
    with pytest.raises(ValueError, match="is no file of weights"):
        load_network(weights=tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError):
        load_network(weights=tmp_path / "missing.pt")


def test_loading_a_file_runs_nothing_of_its_maker(tmp_path: Path) -> None:
    torch.save({"model": forked(8).state_dict(), "path": Runs(tmp_path / "ran")}, tmp_path / "weights.pt")
    load_network(weights=tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": Runs(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"holds no weights, wanted a state dict, .* it is a dict with model"):
        load_network(weights=tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def named(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"params": state, "args": argparse.Namespace(lr=0.1, path=Path("a"))},
        lambda state: {"net": {"weights": state}, "best": np.float64(0.5), "history": np.ones(3)},
        lambda state: {"state_dict": named(state, "net.")},
        lambda state: named(state, "segmentor."),
        lambda state: named(state, "_orig_mod.module."),
        lambda state: {name.replace(".", "._orig_mod.", 1): value for name, value in state.items()},
        lambda state: named({name: value + 1 for name, value in state.items()}, "student.") | named(state, "teacher."),
        lambda state: named(state, "teacher.") | named({name: value + 1 for name, value in state.items()}, "student."),
    ],
    ids=["tutorial", "namespace", "numpy", "lightning", "segmentor", "compiled", "within", "last", "first"],
)
@pytest.mark.filterwarnings("ignore:.*are not the model's")
def test_weights_under_other_names(tmp_path: Path, wrap: Any) -> None:
    with torch.random.fork_rng():
        made = forked(8)
    torch.save(wrap(made.state_dict()), tmp_path / "weights.pt")
    assert same(load_network(weights=tmp_path / "weights.pt"), made)


def test_a_network_that_was_saved_as_a_whole(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        made = forked(8)
    torch.save({"model": made, "epoch": 3}, tmp_path / "weights.pt")
    assert same(load_network(weights=tmp_path / "weights.pt"), made)


def test_a_model_that_holds_the_network_of_the_file(tmp_path: Path) -> None:
    made, found = Holder(), Holder()
    torch.save(made.model.state_dict(), tmp_path / "weights.pt")
    load_weights(found, tmp_path / "weights.pt", "Holder")
    assert same(found, made)


class WithAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.aux_head = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)


def test_what_one_side_alone_has(tmp_path: Path) -> None:
    made, found = WithAuxiliary(), WithAuxiliary()
    state = {"criterion.weight": torch.ones(2), **named(made.head.state_dict(), "head.")}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="weights") as told:
        load_weights(found, tmp_path / "weights.pt", "WithAuxiliary")
    assert [str(entry.message).partition(": ")[2] for entry in told] == [
        "1 weights are not the model's, and left out, which begin with 'criterion'",
        "2 weights of the model are not there, which begin with 'aux_head'",
    ]
    assert same(found.head, made.head)
    torch.save(named(made.aux_head.state_dict(), "aux_head."), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"2 of its 4 weights are missing, such as head\.weight"):
        load_weights(found, tmp_path / "weights.pt", "WithAuxiliary")


def test_models_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_sibling.py").write_text("CHANNELS = 7\n")
    (tmp_path / "types.py").write_text(
        "import torch\nfrom its_sibling import CHANNELS\n"
        "class Nets:\n    @staticmethod\n    def one(classes):\n        return torch.nn.Conv2d(CHANNELS, classes, 1)\n"
    )
    (tmp_path / "nets_of_a_folder.py").write_text("from torch.nn import ReLU as one\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert isinstance(build("nets_of_a_folder:one", None), nn.ReLU)
    for name in ("types.py:Nets.one", str(tmp_path / "types.py") + ":Nets.one"):
        built = build(name, 4)
        assert isinstance(built, nn.Conv2d)
        assert (built.in_channels, built.out_channels) == (7, 4)
    assert isinstance(build("torch:nn.Identity", None), nn.Identity)
