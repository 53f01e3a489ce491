"""Every wrong argument is told in one sentence, before any work: what it is called, what came, what was wanted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attack_common import Counted
from torch import Tensor, nn

import eroseg_ext
from eroseg_ext import AttackSettings, attack
from eroseg_ext.attacks import inputs
from eroseg_ext.ops import backend as backends

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[dict[str, Any]], dict[str, Any]]


def refused(net: nn.Module, arguments: dict[str, Any], kind: type[Exception], message: str, forwards: int = 0) -> None:
    """Asserts that ``attack`` refuses its arguments with ``message``, after so many calls of the model."""
    model = Counted(net)
    with pytest.raises(kind, match=message) as raised:
        attack(model, **arguments)
    assert "\n" not in str(raised.value)
    assert model.calls == forwards


@pytest.fixture
def arguments(batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What would be accepted."""
    return {"images": batch[0], "labels": batch[1], "steps": 1}


def test_these_arguments_are_accepted_unchanged(net: nn.Module, arguments: dict[str, Any]) -> None:
    model = Counted(net)
    assert attack(model, **arguments).shape == arguments["images"].shape
    assert model.calls == 1


TENSORS: dict[str, tuple[Change, type[Exception], str]] = {
    "images array": (
        lambda a: {"images": a["images"].cpu().numpy()},
        TypeError,
        r"^images is a ndarray, wanted a tensor \[B, K, H, W\]$",
    ),
    "images of one": (
        lambda a: {"images": a["images"][0]},
        ValueError,
        r"^images has shape \[3, 20, 24\], wanted \[B, K, H, W\]$",
    ),
    "images of integers": (
        lambda a: {"images": (a["images"] * 255).byte()},
        TypeError,
        r"^images is torch.uint8, wanted float32, float64, float16 or bfloat16 in the range clip=\(0.0, 1.0\)$",
    ),
    "images of 0 to 255": (
        lambda a: {"images": (a["images"] * 254).clamp(min=2)},
        ValueError,
        r"^images has values from 2 to \d+(\.\d+)?, wanted them within clip=\(0.0, 1.0\): .*mean= and std=",
    ),
    "normalised images": (
        lambda a: {"images": (a["images"] - 0.45) / 0.22},
        ValueError,
        r"^images has values from -2\.0\d+ to 2\.\d+, wanted them within clip=\(0.0, 1.0\): .*mean= and std=",
    ),
    "images with NaN": (
        lambda a: {"images": a["images"].masked_fill(a["images"] > 0.9, math.nan)},
        ValueError,
        r"^images has values from nan to nan, wanted them within clip=\(0.0, 1.0\)",
    ),
    "images beyond another clip": (
        lambda a: {"clip": (-1, 0.5)},
        ValueError,
        r"^images has values from .* to 0\.99\d+, wanted them within clip=\(-1, 0.5\)",
    ),
    "labels array": (
        lambda a: {"labels": a["labels"].cpu().numpy()},
        TypeError,
        r"^labels is a ndarray, wanted a tensor of shape \[3, 20, 24\]$",
    ),
    "labels with a channel": (
        lambda a: {"labels": a["labels"][:, None]},
        ValueError,
        r"^labels has shape \[3, 1, 20, 24\], wanted \[3, 20, 24\] to go with images \[3, 3, 20, 24\]$",
    ),
    "labels of another size": (
        lambda a: {"labels": a["labels"][..., :-1]},
        ValueError,
        r"^labels has shape \[3, 20, 23\], wanted \[3, 20, 24\] to go with images",
    ),
    "labels of fewer images": (
        lambda a: {"labels": a["labels"][:2]},
        ValueError,
        r"^labels has shape \[2, 20, 24\], wanted \[3, 20, 24\] to go with images",
    ),
    "labels of floats": (
        lambda a: {"labels": a["labels"].float()},
        TypeError,
        "^labels is torch.float32, wanted class indices as int64, int32 or uint8$",
    ),
    "labels of int16": (
        lambda a: {"labels": a["labels"].short()},
        TypeError,
        "^labels is torch.int16, wanted class indices as int64, int32 or uint8$",
    ),
    "labels elsewhere": (
        lambda a: {"labels": a["labels"].to("meta")},
        ValueError,
        "^labels is on meta, wanted (cpu|cuda:0) as images$",
    ),
    "no labels of a target": (
        lambda a: {"labels": None, "targeted": True},
        ValueError,
        r"^labels is None, wanted the target classes \[B, H, W\] since targeted=True$",
    ),
    "mask of floats": (
        lambda a: {"mask": torch.ones_like(a["images"][:, :1])},
        TypeError,
        "^mask is torch.float32, wanted bool$",
    ),
    "mask without a channel": (
        lambda a: {"mask": a["labels"] > 0},
        ValueError,
        r"^mask has shape \[3, 20, 24\], wanted \[3, 1, 20, 24\] to go with images",
    ),
    "mask per channel": (
        lambda a: {"mask": a["images"] > 0},
        ValueError,
        r"^mask has shape \[3, 3, 20, 24\], wanted \[3, 1, 20, 24\] to go with images",
    ),
    "mask list": (
        lambda a: {"mask": [True]},
        TypeError,
        r"^mask is a list, wanted a tensor of shape \[3, 1, 20, 24\]$",
    ),
    "mask elsewhere": (
        lambda a: {"mask": (a["images"][:, :1] > 0).to("meta")},
        ValueError,
        "^mask is on meta, wanted (cpu|cuda:0) as images$",
    ),
    "normalised images of a half type": (
        lambda a: {"images": a["images"].half(), "mean": [0.5], "std": [0.5], "images_are_normalized": True},
        TypeError,
        "^images is torch.float16, wanted float32 or float64 since images_are_normalized is True$",
    ),
    "images normalised by other numbers": (
        lambda a: {"images": a["images"] * 8 - 2, "mean": [0.5], "std": [0.25], "images_are_normalized": True},
        ValueError,
        r"^images \* std \+ mean has values from [\d.-]+ to [\d.]+, wanted them within clip=\(0.0, 1.0\): are images "
        r"normalised by this mean and std\?$",
    ),
    "mean of two channels": (
        lambda a: {"mean": [0.5, 0.5], "std": [0.5, 0.5]},
        ValueError,
        "^mean has 2 numbers, wanted 3, one per channel of images$",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), TENSORS.values(), ids=TENSORS)
def test_wrong_tensors(
    net: nn.Module, arguments: dict[str, Any], change: Change, kind: type[Exception], message: str
) -> None:
    refused(net, arguments | change(arguments), kind, message)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"eps": -0.1}, r"^eps is -0.1, wanted a number >= 0$"),
    ({"eps": math.nan}, r"^eps is nan, wanted a number >= 0$"),
    ({"eps": math.inf}, r"^eps is inf, wanted a number >= 0$"),
    ({"eps": "8/255"}, r"^eps is '8/255', wanted a number >= 0$"),
    ({"eps": True}, r"^eps is True, wanted a number >= 0$"),
    ({"step_size": -1}, r"^step_size is -1, wanted a number >= 0$"),
    ({"step_size": math.nan}, r"^step_size is nan, wanted a number >= 0$"),
    ({"steps": 0}, r"^steps is 0, wanted an integer >= 1$"),
    ({"steps": -3}, r"^steps is -3, wanted an integer >= 1$"),
    ({"steps": 10.0}, r"^steps is 10.0, wanted an integer >= 1$"),
    ({"steps": None}, r"^steps is None, wanted an integer >= 1$"),
    ({"restarts": 0}, r"^restarts is 0, wanted an integer >= 1$"),
    ({"micro_batch": 0}, r"^micro_batch is 0, wanted an integer >= 1$"),
    ({"micro_batch": 1.5}, r"^micro_batch is 1.5, wanted an integer >= 1$"),
    ({"ignore_index": None}, r"^ignore_index is None, wanted an integer from -9223372036854775808 to"),
    ({"ignore_index": 2**63}, r"^ignore_index is 9223372036854775808, wanted an integer from"),
    ({"radius": 9}, r"^radius is 9, wanted an integer from 0 to 8$"),
    ({"radius": -1}, r"^radius is -1, wanted an integer from 0 to 8$"),
    ({"slope": -0.5}, r"^slope is -0.5, wanted a number >= 0$"),
    ({"reach": -1}, r"^reach is -1, wanted a number"),
    ({"front_first": 1.5}, r"^front_first is 1.5, wanted a number from 0 to 1$"),
    ({"front_min": 0.5, "front_max": 0.2}, r"^front_min is 0.5, wanted at most front_max = 0.2$"),
    ({"rho_range": (0, 1)}, r"^rho_range is \(0, 1\), wanted two fractions in \(0, 1\]$"),
    ({"rho_range": 0.5}, r"^rho_range is 0.5, wanted a pair of numbers$"),
    ({"q": 0.5}, r"^q is 0.5, wanted a number >= 1$"),
    ({"clip": (1, 0)}, r"^clip is \(1, 0\), wanted a pair \(low, high\) with low < high$"),
    ({"clip": 1.0}, r"^clip is 1.0, wanted a pair of numbers$"),
    ({"mean": [0.5] * 3}, r"^std is None, wanted both mean and std$"),
    ({"std": [0.5] * 3}, r"^mean is None, wanted both mean and std$"),
    ({"mean": [0.5] * 3, "std": [0.5]}, r"^std is \[0.5\], wanted 3 numbers, as mean has$"),
    ({"mean": [0.5] * 3, "std": [0.2, 0.2, 0]}, r"^std is \[0.2, 0.2, 0\], wanted numbers > 0$"),
    ({"images_are_normalized": True}, r"^images_are_normalized is True, wanted it with mean and std$"),
    ({"mean": 0.5, "std": 0.5}, r"^mean is 0.5, wanted a list of numbers, one per image channel$"),
    ({"autocast": torch.float32}, r"^autocast is torch.float32, wanted None, torch.float16 or torch.bfloat16$"),
    ({"eps": 8}, r"^eps is 8, wanted a number below 1, the range of clip=\(0.0, 1.0\): lengths are in pixel values"),
    ({"eps": 1.0}, r"^eps is 1.0, wanted a number below 1, the range of clip"),
    ({"step_size": 2}, r"^step_size is 2, wanted a number below 1, the range of clip=\(0.0, 1.0\): lengths are in"),
    ({"eps": 255, "clip": (0, 255)}, r"^eps is 255, wanted a number below 255, the range of clip=\(0, 255\)"),
    ({"eps": 38, "norm": "l2"}, r"^eps is 38, wanted a number below 37.94\d*, the l_2 norm of the range of clip"),
    ({"step_size": 38, "norm": "l2"}, r"^step_size is 38, wanted a number below 37.94\d*, the l_2 norm of the range"),
    (
        {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
        r"^mean is \[123.675, .*\], wanted numbers within clip=\(0.0, 1.0\), in whose units mean and std are$",
    ),
    (
        {"mean": [0] * 3, "std": [58.395] * 3},
        r"^std is \[58.395, .*\], wanted numbers from 0.00391 to 1, in the units of",
    ),
    (
        {"mean": [0.485] * 3, "std": [0.229] * 3, "clip": (0, 255)},
        r"^std is \[0.229, .*\], wanted numbers from 0.996 to 255, in the units of clip=\(0, 255\)$",
    ),
    ({"targeted": 1}, r"^targeted is 1, wanted True or False$"),
    ({"early_stop": None}, r"^early_stop is None, wanted True or False$"),
    ({"norm": "linf "}, r"^norm is 'linf ', wanted one of linf, l2 \(did you mean linf\?\)$"),
    ({"norm": math.inf}, r"^norm is inf, wanted one of linf, l2"),
    ({"keep": "first"}, r"^keep is 'first', wanted one of last, best"),
    (
        {"model_mode": "evaluate"},
        r"^model_mode is 'evaluate', wanted one of eval, train, keep \(did you mean eval\?\)$",
    ),
    ({"confidence": "margin"}, r"^confidence is 'margin', wanted one of label, top"),
    ({"front": "sharp"}, r"^front is 'sharp', wanted one of soft, hard"),
    ({"direction": "kl"}, r"^direction is 'kl', wanted one of log_odds, ce"),
    ({"within": "image"}, r"^within is 'image', wanted one of any, class"),
    ({"threshold": "lag"}, r"^threshold is 'lag', wanted one of lagged, exact \(did you mean lagged\?\)$"),
    ({"schedule": "cosine"}, r"^schedule is 'cosine', wanted one of movement, geometric, linear"),
    ({"variant": "softmx"}, r"^variant is 'softmx', wanted one of softmax, sigmoid \(did you mean softmax\?\)$"),
    ({"preset": "literal"}, r"^preset is 'literal', wanted one of progressive"),
    ({"backend": "cuda"}, r"^backend is 'cuda', wanted one of auto, fused, reference"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=lambda value: str(value)[:40])
def test_wrong_settings(net: nn.Module, arguments: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    refused(net, arguments | settings, ValueError, message)


@pytest.mark.parametrize(
    ("method", "near"),
    [
        ("segpdg", r"\(did you mean segpgd"),
        ("CosPGD", r"\(did you mean cospgd"),
        ("erosg", r"\(did you mean eroseg"),
        ("mce-bal", r"\(did you mean mce_bal"),
        ("fgsm", "tsallis$"),
        (None, "tsallis$"),
    ],
)
def test_an_unknown_method_lists_the_methods_and_the_near_misses(
    net: nn.Module, arguments: dict[str, Any], method: Any, near: str
) -> None:
    everything = "eroseg, pgd, segpgd, cospgd, mce, mce_bal, js, tsallis"
    refused(net, arguments | {"method": method}, ValueError, f"^method is {method!r}, wanted one of {everything}.*")
    refused(net, arguments | {"method": method}, ValueError, near)


@pytest.mark.parametrize(
    ("keyword", "near"),
    [
        ("epsilon", r"\(did you mean eps"),
        ("stepsize", r"\(did you mean step_size"),
        ("num_steps", r"\(did you mean steps"),
        ("target", r"\(did you mean targeted"),
        ("ignore_idx", r"\(did you mean ignore_index"),
        ("returninfo", r"\(did you mean return_info"),
        ("masks", r"\(did you mean .*mask"),
        ("presets", r"\(did you mean preset"),
        ("alpha", r"\(did you mean step_size\?\)"),
        ("xyz", "^xyz is not a setting of attack\\(\\)$"),
    ],
)
def test_an_unknown_keyword_lists_the_near_misses(
    net: nn.Module, arguments: dict[str, Any], keyword: str, near: str
) -> None:
    refused(net, arguments | {keyword: 1}, TypeError, rf"^{keyword} is not a setting of attack\(\)")
    refused(net, arguments | {keyword: 1}, TypeError, near)


@pytest.mark.parametrize(
    ("value", "ignore_index", "message"),
    [
        (4, 255, "^labels has the value 4, wanted classes from 0 to 3 or ignore_index=255$"),
        (-1, 255, "^labels has the value -1, wanted classes from 0 or ignore_index=255$"),
        (255, -1, "^labels has the value 255, wanted classes from 0 to 3 or ignore_index=-1$"),
        (2**40, 255, f"^labels has the value {2**40}, wanted classes from 0 to 3"),
    ],
)
@pytest.mark.parametrize("image", [0, 2])
def test_labels_that_are_no_class(
    net: nn.Module, arguments: dict[str, Any], value: int, ignore_index: int, message: str, image: int
) -> None:
    labels = arguments["labels"].clone()
    labels[labels == 255] = ignore_index
    labels[image, 10, 12] = value
    # How many classes there are, only a forward pass tells; all labels are looked at, not the first part's alone.
    changed = {"labels": labels, "ignore_index": ignore_index, "micro_batch": 1}
    refused(net, arguments | changed, ValueError, message, forwards=0 if value < 0 else 1)


@pytest.mark.parametrize("find", [attack, eroseg_ext.strong_attack])
def test_negative_labels_are_refused_before_the_model_is_touched(
    net: nn.Module, arguments: dict[str, Any], find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "train", lambda mode: pytest.fail("the model's mode was set"))
    with pytest.raises(ValueError, match=r"^labels has the value -1, wanted classes from 0 or ignore_index=255$"):
        find(net, **arguments | {"labels": arguments["labels"].where(arguments["labels"] != 0, -1)})


@pytest.mark.parametrize("ignore_index", [255, -100, 3, 2**40])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("classes", [4, 256])
def test_labels_are_narrowed_to_uint8_where_they_fit(dtype: torch.dtype, ignore_index: int, classes: int) -> None:
    labels = torch.randint(classes, (2, 8, 9), generator=torch.Generator().manual_seed(0))
    labels[0, 0, 0], labels[1] = classes - 1, labels[1].clamp(max=3)
    if torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        labels[0, 1] = ignore_index
    labels = labels.to(dtype)
    narrow, narrow_void, largest = inputs.narrowed(labels, ignore_index)
    valid = labels.long() != ignore_index
    assert largest == labels.long()[valid].max()
    assert torch.equal(narrow.long() != narrow_void, valid)
    assert torch.equal(narrow.long()[valid], labels.long()[valid])
    # Class 255, where it is none that is void, leaves no number for void pixels.
    assert narrow.dtype == (torch.uint8 if largest < 255 else dtype)


def test_binary_labels_that_are_no_class(make_net: Callable[..., nn.Module], arguments: dict[str, Any]) -> None:
    message = "^labels has the value 3, wanted classes from 0 to 1 or ignore_index=255$"
    refused(make_net(1), arguments, ValueError, message, forwards=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_other_types_are_checked_too(net: nn.Module, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    labels = arguments["labels"].to(dtype)
    labels[1, 5, 5] = 7
    refused(net, arguments | {"labels": labels}, ValueError, "^labels has the value 7, wanted", forwards=1)


def test_a_model_whose_output_is_no_logits_is_refused_after_one_forward(
    net: nn.Module, arguments: dict[str, Any]
) -> None:
    message = r"^the model's logits have shape \[3, 1920\], wanted \[B, C, H, W\] with B = 3$"
    refused(nn.Sequential(net, nn.Flatten()), arguments, ValueError, message, forwards=1)


def test_fused_where_it_is_not_built_says_why(
    net: nn.Module, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "why_not_fused", lambda device: "nothing was compiled")
    refused(net, arguments | {"backend": "fused"}, RuntimeError, "^backend is 'fused', but nothing was compiled$")


def test_auto_is_the_reference_where_fused_is_not_built(
    net: nn.Module, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(backend: str) -> Tensor:
        return attack(net, **arguments, backend=backend, generator=torch.Generator().manual_seed(0))

    expected = result("reference")
    monkeypatch.setattr(backends, "why_not_fused", lambda device: "nothing was compiled")
    never = SimpleNamespace(import_module=lambda name: pytest.fail(f"{name} was imported"))
    monkeypatch.setattr(backends, "importlib", never)
    assert torch.equal(result("auto"), expected)


def test_a_device_without_kernels_says_so() -> None:
    assert backends.why_not_fused(torch.device("meta")) == "there are no fused kernels for meta tensors"


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"eps": -1}, ValueError, "^eps is -1, wanted a number >= 0$"),
        ({"epsilon": 1}, TypeError, r"^epsilon is not a setting of attack\(\) \(did you mean eps"),
        ({"method": "pgd"}, TypeError, "^method is not a setting of SegPGD, it is always 'segpgd'$"),
        ({"mask": None}, TypeError, "^mask is an argument of each call, not a setting"),
    ],
)
def test_objects_check_their_settings_when_made(
    net: nn.Module, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        eroseg_ext.SegPGD(net, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"eps": 0.6},
            r"^eps is 0.6, more than half of 1, the range of clip=\(0.0, 1.0\): is it in the units of images\?",
        ),
        ({"step_size": 0.6}, "^step_size is 0.6, more than half of 1"),
        ({"eps": 20, "norm": "l2"}, "^eps is 20, more than half of 37.94.*, the l_2 norm of the range of clip"),
        ({"clip": (0, 255), "eps": 8}, r"^images has values from .*, a 255th of the range of clip=\(0, 255\) at most"),
    ],
)
def test_lengths_that_are_hardly_meant_are_warned_of(
    net: nn.Module, arguments: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    for call in (attack, attacked_by_object, *([] if "step_size" in settings else [eroseg_ext.strong_attack])):
        with pytest.warns(UserWarning, match=message) as seen:
            call(net, **arguments, **settings)
        assert [warning.filename for warning in seen] == [__file__]


def attacked_by_object(model: nn.Module, images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return eroseg_ext.PGD(model, **settings)(images, labels)


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 0.5},
        {"eps": 18, "norm": "l2"},
        {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        {"mean": [0] * 3, "std": [1 / 255] * 3},
        {"mean": [-1] * 3, "std": [2] * 3, "clip": (-1, 1)},
    ],
    ids=str,
)
def test_lengths_in_the_images_units_are_not_warned_of(
    net: nn.Module, arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(net, **arguments, **settings)


@pytest.mark.parametrize(("name", "wanted"), [("eps", "eps"), ("alpha", "step_size"), ("settings", "settings")])
def test_an_object_refuses_what_it_would_ignore(net: nn.Module, name: str, wanted: str) -> None:
    attacker = eroseg_ext.PGD(net, eps=8 / 255)
    with pytest.raises(AttributeError, match=rf"^{name} cannot be set on PGD, .* atk.replace\({wanted}=0.01\)$"):
        setattr(attacker, name, 0.01)
    assert attacker.settings.eps == 8 / 255


def test_replace_keeps_the_other_settings(net: nn.Module) -> None:
    attacker = eroseg_ext.MaskedCE(net, balanced=True, steps=7)
    replaced = attacker.replace(eps=2 / 255)
    assert type(replaced) is eroseg_ext.MaskedCE
    assert replaced.model is net
    assert replaced.settings == AttackSettings(method="mce_bal", steps=7, eps=2 / 255)
    assert attacker.settings.eps == 8 / 255
    assert eroseg_ext.EroSeg(net, radius=0).replace(preset="progressive").settings.front == "hard"
    with pytest.raises(TypeError, match=r"^alpha is not a setting of attack\(\) \(did you mean step_size\?\)$"):
        attacker.replace(alpha=1 / 255)


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError, match="cannot assign to field 'eps'"):
        AttackSettings().eps = 1.0


def test_the_default_step_is_a_quarter_of_the_radius() -> None:
    assert AttackSettings(eps=0.4).alpha == pytest.approx(0.1)
    assert AttackSettings(eps=0.4, step_size=0.3).alpha == 0.3


@pytest.mark.parametrize("clip", [(0.0, 0.7), (-1 / 3, 2 / 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_images_at_the_ends_of_a_range_that_their_type_rounds_are_accepted(
    net: nn.Module, arguments: dict[str, Any], clip: tuple[float, float], dtype: torch.dtype
) -> None:
    images = arguments["images"].clamp(*clip).to(dtype)
    images[:, :, 0], images[:, :, 1] = clip
    adversarial = attack(net.to(dtype), images, arguments["labels"], steps=2, clip=clip)
    assert adversarial.min() >= images.min()
    assert adversarial.max() <= images.max()
