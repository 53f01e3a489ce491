"""``evaluate``: its figures, its table, and how it fails."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_common import Batch
from conftest import CLASSES, VOID
from evaluation_common import QUICK, Pairs
from folders import write_folder, write_labels
from PIL import Image
from torch import Tensor, nn

from eroseg_ext import EvaluationSettings, evaluate, strong_attack, train
from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.evaluation.fingerprint import projected_logits
from eroseg_ext.evaluation.sanity import budget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pairs(batch: Batch) -> Pairs:
    return Pairs(batch[0].cpu(), batch[1].cpu())


def matrix_of(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Confusion matrix by brute force: rows are labels."""
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for label, predicted in zip(labels.flatten().tolist(), logits.argmax(1).flatten().tolist(), strict=True):
        if label != VOID:
            matrix[label, predicted] += 1
    return matrix


def test_figures_against_brute_force(net: nn.Module, pairs: Pairs) -> None:
    net.eval()
    device = next(net.parameters()).device
    result = evaluate(net, pairs, attacks=["eroseg", "pgd"], **QUICK)
    images, labels = pairs.images.to(device), pairs.labels.to(device)
    for name, found in [("clean", result.clean), *((row.attack, row.scores) for row in result.rows)]:
        if name != "clean":
            images = strong_attack(net, pairs.images.to(device), labels, method=name, eps=8 / 255, steps=4)
        with torch.no_grad():
            matrix = matrix_of(net(images), labels)
        hit, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        assert found.miou == pytest.approx(100 * (hit / union).mean())
        assert found.macc == pytest.approx(100 * (hit / matrix.sum(1)).mean())
        assert found.aacc == pytest.approx(100 * hit.sum() / matrix.sum())
        assert found.iou == pytest.approx(tuple(100 * hit / union))


def test_worst_case_is_no_better_than_any_row(net: nn.Module, pairs: Pairs) -> None:
    result = evaluate(net, pairs, **{**QUICK, "eps": [2 / 255, 8 / 255]})
    assert list(result.worst) == [2 / 255, 8 / 255]
    for eps, worst in result.worst.items():
        rows = [result.clean, *(row.scores for row in result.rows if row.eps == eps)]
        assert worst.miou_bound <= worst.miou + 1e-9
        for found in rows:
            assert worst.miou <= found.miou + 1e-9
            assert worst.macc <= found.macc + 1e-9
            assert worst.aacc <= found.aacc + 1e-9
        assert all(0 <= number < len(rows) for number in worst.chosen_miou + worst.chosen_aacc)


@pytest.mark.parametrize("method", METHODS)
def test_eps_0_is_clean(pixelwise: nn.Module, pairs: Pairs, method: str) -> None:
    result = evaluate(pixelwise, pairs, attacks=[method], **{**QUICK, "eps": 0})
    assert result.rows[0].scores == result.clean
    assert result.worst[0].miou == pytest.approx(result.clean.miou)


def test_batches_and_order_do_not_matter_to_a_pixelwise_model(pixelwise: nn.Module, pairs: Pairs) -> None:
    found = [evaluate(pixelwise, pairs, batch_size=size, **QUICK) for size in (1, 2, 8)]
    assert found[0].rows == found[1].rows == found[2].rows
    assert found[0].worst == found[1].worst


def test_images_of_several_sizes(pixelwise: nn.Module, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name, size in (("a", (20, 24)), ("b", (20, 24)), ("c", (17, 9)), ("d", (20, 24))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 4, size, np.uint8)).save(tmp_path / "labels" / f"{name}.png")
    together = evaluate(pixelwise, tmp_path, batch_size=4, **{**QUICK, "sanity": 4})
    alone = evaluate(pixelwise, tmp_path, batch_size=1, **QUICK)
    assert together.rows == alone.rows
    assert together.images == ("a.png", "b.png", "c.png", "d.png")


def test_classes_that_no_label_has(pixelwise: nn.Module, batch: Batch) -> None:
    images, labels = batch[0].cpu(), batch[1].cpu()
    labels = torch.where((labels == 1) | (labels == 3), 0, labels)
    result = evaluate(pixelwise, Pairs(images, labels), **QUICK)
    assert [value is None for value in result.clean.iou] == [False, True, False, True]
    for found in (result.clean, *(row.scores for row in result.rows), *result.worst.values()):
        assert math.isfinite(found.miou)
        assert math.isfinite(found.macc)
    json.dumps(result.as_json(), allow_nan=False)


def test_classes_that_are_only_predicted_may_count(pixelwise: nn.Module, batch: Batch, tmp_path: Path) -> None:
    pairs = Pairs(batch[0].cpu(), torch.where((batch[1] == 1) | (batch[1] == 3), 0, batch[1]).cpu())
    labelled = evaluate(pixelwise, pairs, out=tmp_path, **QUICK)
    kept = (tmp_path / "results.jsonl").read_bytes()
    found = evaluate(pixelwise, pairs, out=tmp_path, miou_classes="labelled_or_predicted", **QUICK)
    # The counts are the same: nothing was computed anew.
    assert (tmp_path / "results.jsonl").read_bytes() == kept
    assert [value is None for value in labelled.clean.iou] == [False, True, False, True]
    assert found.clean.iou[1] == found.clean.iou[3] == 0
    assert found.clean.miou == pytest.approx(labelled.clean.miou / 2)
    assert found.rows[0].scores.miou == pytest.approx(labelled.rows[0].scores.miou / 2)
    assert found.worst[8 / 255].miou <= min(row.scores.miou for row in found.rows)
    assert (found.clean.macc, found.clean.aacc) == (labelled.clean.macc, labelled.clean.aacc)
    assert found.as_json()["settings"]["miou_classes"] == "labelled_or_predicted"


def test_binary_model_of_one_logit(batch: Batch) -> None:
    class OneLogit(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 4 * (images[:, :1] - images[:, 1:2])

    labels = torch.where(batch[1] == VOID, VOID, batch[1] % 2).cpu()
    result = evaluate(OneLogit(), Pairs(batch[0].cpu(), labels), **QUICK)
    assert len(result.clean.iou) == 2
    assert all(row.scores.aacc < result.clean.aacc for row in result.rows)


def test_rows_with_settings_of_their_own(net: nn.Module, pairs: Pairs) -> None:
    rows = {"narrow": {"method": "eroseg", "radius": 0}, "long": {"method": "js", "steps": 6, "radii": "shrinking"}}
    result = evaluate(net, pairs, attacks=rows, **QUICK)
    assert [row.attack for row in result.rows] == ["narrow", "long"]
    assert result.as_json()["settings"]["attacks"] == rows


def test_radii_of_a_row(net: nn.Module, pairs: Pairs) -> None:
    short = evaluate(net, pairs, attacks=["js", "js:shrinking"], **QUICK)
    long = evaluate(net, pairs, attacks={"a": {"method": "js"}, "b": {"method": "js", "radii": "shrinking"}}, **QUICK)
    assert [row.scores for row in short.rows] == [row.scores for row in long.rows]
    assert short.rows[0].scores != short.rows[1].scores


def test_some_of_the_images(net: nn.Module, pairs: Pairs) -> None:
    assert evaluate(net, pairs, images=2, **QUICK).images == ("image 0", "image 1")
    assert len(evaluate(net, pairs, images=9, **QUICK).images) == 3


def test_table(net: nn.Module, pairs: Pairs) -> None:
    result = evaluate(net, pairs, attacks=["eroseg", "js"], **{**QUICK, "eps": [2 / 255, 0.03]})
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.markdown().splitlines()]
    assert table[0][:3] == ["attack", "eps 2/255", "eps 0.03"]
    assert [row[0] for row in table[2:]] == [
        "none",
        "`eroseg`",
        "`js`",
        "**worst case**",
        "lower bound of its mIoU",
    ]
    found = result.rows[0].scores
    assert table[3][1] == f"{found.miou:.2f} / {found.macc:.2f} / {found.aacc:.2f}"
    assert all(len(row) == 4 for row in table)


def test_budget_in_words() -> None:
    assert [budget(eps) for eps in (0, 8 / 255, 0.5 / 255, 0.03)] == ["0/255", "8/255", "0.5/255", "0.03"]
    assert budget(0.5, "l2") == "0.5"


def test_the_model_and_the_generator_are_left_alone(net: nn.Module, pairs: Pairs) -> None:
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(net, pairs, **{**QUICK, "sanity": 1})
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attacks": ["erosg"]}, "attacks is 'erosg', wanted one of .*did you mean eroseg"),
        ({"attacks": ["js:"]}, "radii is '', wanted one of fixed, shrinking"),
        ({"attacks": "eroseg"}, "attacks is the string 'eroseg', wanted a list"),
        ({"attacks": []}, "attacks is .*, wanted at least one method"),
        ({"attacks": {"clean": {}}}, "wanted names of rows other than 'clean'"),
        ({"attacks": {"a": {"eps": 1}}}, r"attacks\['a'\] sets eps, which is not a row's to set"),
        ({"attacks": {"a": {"q": 0.5}}}, "q is 0.5"),
        ({"attacks": {"a": {"radii": "x"}}}, "radii is 'x', wanted one of fixed, shrinking"),
        (
            {"attacks": {"a": {"method": "pgd", "images_are_normalized": True}}},
            r"attacks\['a'\] sets images_are_normalized, which is not a row's to set",
        ),
        ({"attacks": {"a": {"keep": "last"}}}, r"attacks\['a'\] sets keep, which is not a row's to set"),
        ({"eps": -1}, "eps is -1"),
        ({"eps": []}, "eps is .*, wanted one or several numbers"),
        ({"eps": [0.1, 0.1]}, "eps is .*, wanted"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"images": 0}, "images is 0"),
        ({"sanity": -1}, "sanity is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"model_description": {"a": object()}}, "model_description is not what JSON can hold"),
        ({"model_description": {"a": math.nan}}, "model_description is not what JSON can hold"),
        ({"miou_classes": "all"}, "miou_classes is 'all', wanted one of labelled, labelled_or_predicted"),
        ({"norm": "l1"}, "norm is 'l1', wanted one of linf, l2"),
    ],
)
def test_settings_are_checked_before_any_work(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        EvaluationSettings(**settings)
    with pytest.raises((ValueError, TypeError), match=sentence):
        evaluate(None, tmp_path / "nowhere", out=tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_bad_labels_are_told_by_name(pixelwise: nn.Module, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 2)
    labels = np.zeros((40, 56), np.uint8)
    labels[3, 7] = 4
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(data / "labels" / "00.png")
    Image.fromarray(labels).save(data / "labels" / "01.png")
    with pytest.raises(ValueError, match=r"01\.png has the label 4 at row 3, column 7, wanted classes from 0 to 3"):
        evaluate(pixelwise, data, **QUICK)


def test_nothing_but_void(pixelwise: nn.Module, pairs: Pairs) -> None:
    pairs.labels[:] = VOID
    with pytest.raises(ValueError, match="data has no pixel with a label other than ignore_index=255"):
        evaluate(pixelwise, pairs, **QUICK)


def test_no_images(pixelwise: nn.Module) -> None:
    with pytest.raises(ValueError, match="data has no image"):
        evaluate(pixelwise, Pairs(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)), **QUICK)


class _Halves(nn.Module):
    """A model for even sizes."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        half = nn.functional.max_pool2d(self.convolution(images), 2)
        logits: Tensor = self.convolution(images) + half.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return logits


def test_a_model_that_refuses_an_images_size_is_told_with_it(tmp_path: Path) -> None:
    write_labels(tmp_path, [0, 1], [0, 1])
    assert evaluate(_Halves(), tmp_path, **QUICK).images == ("0.png", "1.png")
    for part in ("images", "labels"):
        Image.fromarray(np.arange(99, dtype=np.uint8).reshape(9, 11) % 2).save(tmp_path / part / "1.png")
    with pytest.raises(
        ValueError, match=r"the model fails on 1\.png of 9x11 pixels, .* \(--size\): The size of tensor"
    ):
        evaluate(_Halves(), tmp_path, **QUICK)
    with pytest.raises(
        ValueError, match=r"the model fails on an image of 9x11 pixels, where another crop may be wanted"
    ):
        train(_Halves(), data=tmp_path, out=tmp_path / "out", crop=(9, 11), batch_size=2)


def test_image_and_labels_of_different_sizes(pixelwise: nn.Module) -> None:
    pairs = Pairs(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"label map of data\[0\] is 5x4 pixels but its image data\[0\] is 4x4"):
        evaluate(pixelwise, pairs, **QUICK)


class RoundsSecond(nn.Module):
    """Rounds every image whose first pixel is marked: it has no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        marked = (images[:, :1, :1, :1] > 0.9) & (images[:, 1:2, :1, :1] < 0.1)
        return self.model(torch.where(marked, (images * 32).round() / 32, images))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_images_without_a_gradient_are_named(net: nn.Module, pairs: Pairs, tmp_path: Path, batch_size: int) -> None:
    pairs.images[:, :, 0, 0] = 0.5
    pairs.images[1, :, 0, 0] = torch.tensor([1.0, 0.0, 0.5])
    for _ in range(2):  # the second time from the disk
        result = evaluate(RoundsSecond(net), pairs, attacks=["pgd", "js"], batch_size=batch_size, out=tmp_path, **QUICK)
        assert [row.without_gradient for row in result.rows] == [("image 1",)] * 2
    table = result.markdown().splitlines()
    assert table[3].startswith("| `pgd` (no gradient on 1 of 3 images) |")
    assert "`js` finds a gradient of 0 everywhere on image 1" in table
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["without_gradient"] for row in rows] == [["image 1"]] * 2


def test_a_binary_sigmoid_counts_as_its_logit(pairs: Pairs) -> None:
    """The threshold of a probability is 0.5, not 0."""
    pairs.labels = pairs.labels.clamp(max=1).where(pairs.labels != VOID, VOID)
    settings = {**QUICK, "attacks": ["pgd"], "sanity": 1}
    bare = evaluate(lambda images: 4 * (images[:, :1] - images[:, 1:2]), pairs, **settings)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        wrong = evaluate(lambda images: (4 * (images[:, :1] - images[:, 1:2])).sigmoid(), pairs, **settings)
    assert any("output='sigmoid'" in str(warning.message) for warning in seen)
    assert "logits" in wrong.failed_checks
    model = Wrapper(lambda images: {"p": [(4 * (images[:, :1] - images[:, 1:2])).sigmoid(), None]})
    right = evaluate(model, pairs, **settings, output="sigmoid", logits=model.probabilities)
    assert right.clean == bare.clean != wrong.clean
    assert right.rows[0].scores.aacc == pytest.approx(bare.rows[0].scores.aacc, abs=0.5)
    assert right.as_json()["settings"]["logits"].endswith("Wrapper.probabilities")
    assert "logits" not in right.failed_checks
    assert model.copies == 0


class Wrapper:
    """A callable with a method that finds what it returned, and that counts the copies of itself."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.copies = 0

    def __call__(self, images: Tensor) -> Any:
        return self.model(images)

    def probabilities(self, output: Any) -> Tensor:
        return output["p"][0]

    def __deepcopy__(self, memo: Any) -> Any:
        self.copies += 1
        return self


def test_a_model_is_told_from_others_by_images_on_its_device() -> None:
    shown: list[str] = []

    def answer(pixels: Tensor) -> Tensor:
        shown.append(pixels.device.type)
        return torch.zeros(1, 4, 5, 6)

    projected_logits(answer, torch.empty(3, 5, 6, device="meta"), (0.0, 1.0), 0)
    assert shown == ["meta"] * 3


def test_a_table_whose_checks_failed_says_so(net: nn.Module, pairs: Pairs) -> None:
    net.eval()

    def result(model: Any, **settings: Any) -> tuple[list[str], dict[str, Any]]:
        found = evaluate(model, pairs, attacks=["pgd"], **{**QUICK, "sanity": 1, **settings})
        return [line.split(" | ")[0] for line in found.markdown().splitlines()], found.as_json()

    lines, found = result(lambda images: net(images).softmax(1))
    assert "logits" in found["failed_checks"]
    assert lines[2:6] == [
        "| none (checks failed)",
        "| `pgd` (checks failed)",
        "| **worst case** (checks failed)",
        "| lower bound of its mIoU (checks failed)",
    ]
    assert lines[7].startswith("checks failed: ")
    assert "logits" in lines[7]
    assert not any(part["checks_passed"] for part in (found["clean"], *found["rows"], *found["worst"]))

    # The clean figures do not depend on gradients.
    lines, found = result(lambda images: net((images * 32).round() / 32))
    assert {"gradients", "large eps"} <= set(found["failed_checks"])
    assert lines[2] == "| none"
    assert lines[4] == "| **worst case** (checks failed)"
    assert found["clean"]["checks_passed"]
    assert not found["worst"][0]["checks_passed"]

    lines, found = result(net, sanity=0)
    assert not any("failed" in line for line in lines)
    assert found["clean"]["checks_passed"] is None
    assert found["failed_checks"] == []
