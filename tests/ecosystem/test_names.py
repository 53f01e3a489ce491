"""Models by the names that other libraries have for them, and from the folders and files that these write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from eroseg_ext.cli.main import main
from eroseg_ext.data.scenes import generated_scenes
from eroseg_ext.models.loading import build, load_network, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def same(left: nn.Module, right: nn.Module) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.works("model", "torchvision, by name", "`--model fcn_resnet50`")
def test_a_name_of_torchvision() -> None:
    pytest.importorskip("torchvision")
    model = build("lraspp_mobilenet_v3_large", 5)
    assert model.classifier.low_classifier.out_channels == 5


@pytest.mark.works(
    "model", "segmentation_models_pytorch, by name", '`--model unet --model-args \'{"encoder_name": "resnet18"}\'`'
)
def test_a_name_of_smp() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    model = build("Unet", 5, {"encoder_name": "resnet18"})
    assert model.segmentation_head[0].out_channels == 5


@pytest.mark.works("model", "segmentation_models_pytorch, from a folder of `save_pretrained`", "`--model FOLDER`")
def test_a_folder_of_smp(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    made = smp.Unet("resnet18", encoder_weights=None, classes=5)
    made.save_pretrained(str(tmp_path))
    assert same(load_network(str(tmp_path), classes=5), made)


def segformer(**settings: int) -> nn.Module:
    tf = pytest.importorskip("transformers")
    config = tf.SegformerConfig(
        depths=[1] * 4,
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        **settings,
    )
    return tf.SegformerForSemanticSegmentation(config)


@pytest.mark.works("model", "transformers, from a folder of `save_pretrained`", "`--model FOLDER`")
@pytest.mark.parametrize("through", ["{}", "transformers:SegformerForSemanticSegmentation.from_pretrained"])
def test_a_folder_of_transformers(tmp_path: Path, through: str) -> None:
    made = segformer(num_labels=5)
    made.save_pretrained(tmp_path)
    arguments = {} if through == "{}" else {"pretrained_model_name_or_path": str(tmp_path)}
    assert same(load_network(through.format(tmp_path), classes=5, model_args=arguments), made)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json names no architecture"):
        load_network(str(tmp_path))


@pytest.mark.works(
    "model",
    "`eroseg evaluate` and `eroseg train` with a folder of transformers",
    "`--model FOLDER --mean ... --std ...`",
)
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segformer(num_labels=8).save_pretrained(tmp_path / "model")
    scenes = generated_scenes(2, (32, 48))
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
        pixels = (255 * image).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{number}.png")
        Image.fromarray(label.byte().numpy()).save(tmp_path / "data" / "labels" / f"{number}.png")
    shared = ["--data", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--mean", "0.5", "--std", "0.25"]
    cheap = ["--attacks", "eroseg", "--steps", "2", "--sanity", "0", "--eps", "4/255"]
    assert main(["evaluate", *shared, *cheap, "--out", str(tmp_path / "evaluation")]) == 0
    assert "worst case" in capsys.readouterr().out
    cheap = ["--epochs", "1", "--batch-size", "2", "--attack-steps", "1", "--val-attack-steps", "0", "--workers", "0"]
    assert main(["train", *shared, *cheap, "--out", str(tmp_path / "training")]) == 0
    trained = load_network(str(tmp_path / "model"), tmp_path / "training" / "weights.pt")
    assert not same(trained, load_network(str(tmp_path / "model")))


@pytest.mark.works("model", "weights in safetensors' format", "`--weights model.safetensors`")
def test_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    smp = pytest.importorskip("segmentation_models_pytorch")
    made, found = (smp.Unet("resnet18", encoder_weights=None, classes=5) for _ in range(2))
    made.save_pretrained(str(tmp_path))
    load_weights(found, tmp_path / "model.safetensors", "Unet")
    assert same(found, made)
    (tmp_path / "model.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"model\.safetensors is no file of weights"):
        load_weights(found, tmp_path / "model.safetensors", "Unet")


def test_weights_of_a_model_with_its_auxiliary_head(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models.segmentation")
    made, found = (
        models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5, aux_loss=aux)
        for aux in (True, False)
    )
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="are not the model's, and left out, which begin with 'aux_classifier'"):
        load_weights(found, tmp_path / "weights.pt", "DeepLabV3")
    torch.save(found.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="weights of the model are not there, which begin with 'aux_classifier'"):
        load_weights(made, tmp_path / "weights.pt", "DeepLabV3")
    assert same(found.backbone, made.backbone)


@pytest.mark.works("model", "torchvision's released weights", "`--model deeplabv3_resnet50 --weights FILE`")
def test_weights_of_torchvision(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models.segmentation")
    made = models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    assert same(load_network("lraspp_mobilenet_v3_large", tmp_path / "weights.pth", classes=5), made)
