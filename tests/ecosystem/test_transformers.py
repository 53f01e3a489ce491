"""transformers' models for semantic segmentation, mask classification and text prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eroseg_ext
from ecosystem.common import batch, check_attacks, settled
from eroseg_ext.models import semantic
from eroseg_ext.models.adapter import Logits
from eroseg_ext.models.outputs import Reader

tf = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = {"embed_dim": 12, "depths": [1] * 4, "num_heads": [1, 2, 2, 2], "window_size": 4, "out_features": STAGES}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "out_features": STAGES}
VIT = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 64}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 32,
    "encoder_ffn_dim": 32,
    "num_queries": 7,
}
MASKS = {
    "mask_dim": 32,
    "conv_dim": 32,
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 32,
    "num_queries": 7,
}
TASK = {
    "task_seq_len": 8,
    "text_encoder_width": 16,
    "text_encoder_context_length": 8,
    "text_encoder_num_layers": 1,
    "text_encoder_vocab_size": 50,
    "text_encoder_n_ctx": 2,
    "query_dec_layers": 1,
}
SMALL = {"hidden_sizes": [8, 16, 24], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]}


def made(model: str, config: str | None = None, **settings: Any) -> nn.Module:
    """A model of transformers with a tiny configuration, random weights and 5 classes."""
    name = config or model.rpartition("For")[0]
    torch.manual_seed(0)
    return getattr(tf, model)(getattr(tf, f"{name}Config")(num_labels=5, **settings))


def swin() -> Any:
    return tf.SwinConfig(image_size=64, **SWIN)


def resnet() -> Any:
    return tf.ResNetConfig(**RESNET)


PER_PIXEL: dict[str, Callable[[], nn.Module]] = {
    "SegFormer": lambda: made(
        "SegformerForSemanticSegmentation",
        depths=[1] * 4,
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
    "UPerNet": lambda: made(
        "UperNetForSemanticSegmentation",
        "UperNet",
        backbone_config=swin(),
        hidden_size=16,
        auxiliary_in_channels=48,
        auxiliary_channels=8,
    ),
    "BEiT": lambda: made("BeitForSemanticSegmentation", **VIT, patch_size=16, out_indices=[1, 2, 3, 4]),
    "Data2Vec": lambda: made(
        "Data2VecVisionForSemanticSegmentation", "Data2VecVision", **VIT, patch_size=16, out_indices=[1, 2, 3, 4]
    ),
    "DPT": lambda: made(
        "DPTForSemanticSegmentation",
        "DPT",
        **VIT,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    ),
    "MobileNetV2": lambda: made("MobileNetV2ForSemanticSegmentation", "MobileNetV2", depth_multiplier=0.25),
    "MobileViT": lambda: made(
        "MobileViTForSemanticSegmentation", hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32]
    ),
    "MobileViTV2": lambda: made("MobileViTV2ForSemanticSegmentation", width_multiplier=0.25),
}


@pytest.mark.works("model", f"transformers {', '.join(PER_PIXEL)}", "as it is: `attack(model, images, labels)`")
@pytest.mark.parametrize("name", PER_PIXEL)
def test_models_of_pixels(name: str) -> None:
    check_attacks(settled(PER_PIXEL[name]()))


@pytest.mark.works(
    "model",
    "models of one image size, such as transformers BEiT, on larger images",
    "`attack(model, images, labels, window=64)`, as mmsegmentation's mode `slide`",
)
@pytest.mark.parametrize("name", ["BEiT", "SegFormer"])
def test_windows_of_larger_images(name: str) -> None:
    model = settled(PER_PIXEL[name]())
    images, labels = batch((64, 104))
    check_attacks(model, images, labels, window=64, stride=32)
    with torch.no_grad():
        found = Logits(model.eval(), window=64, stride=32)(images, (64, 104)).values
        for begin, first, last in ((0, 0, 32), (40, 96, 104)):  # the columns of one window alone
            of_window = F.interpolate(model(images[..., begin : begin + 64]).logits, (64, 64), mode="bilinear")
            torch.testing.assert_close(found[..., first:last], of_window[..., first - begin : last - begin])


def detr() -> nn.Module:
    return made("DetrForSegmentation", use_timm_backbone=False, backbone_config=resnet(), **DETR)


def maskformer() -> nn.Module:
    decoder = tf.DetrConfig(use_timm_backbone=False, backbone_config=resnet(), **DETR)
    return made(
        "MaskFormerForInstanceSegmentation",
        backbone_config=swin(),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
    )


MASK_MODELS: dict[str, Callable[[], nn.Module]] = {
    "MaskFormer": maskformer,
    "Mask2Former": lambda: made("Mask2FormerForUniversalSegmentation", backbone_config=swin(), **MASKS),
    "EoMT": lambda: made("EomtForUniversalSegmentation", "Eomt", **VIT, num_blocks=1, num_queries=7),
    "EoMT-DINOv3": lambda: made("EomtDinov3ForUniversalSegmentation", "EomtDinov3", **VIT, num_blocks=1, num_queries=7),
    "DETR with masks": detr,
}


@pytest.mark.works(
    "model",
    f"transformers {', '.join(MASK_MODELS)}",
    "as it is: `attack(model, images, labels)`; classes and masks become logits per pixel",
)
@pytest.mark.parametrize("name", MASK_MODELS)
def test_models_of_masks(name: str) -> None:
    check_attacks(settled(MASK_MODELS[name]()))


def test_masks_are_read_as_transformers_reads_them() -> None:
    model = maskformer().eval()
    images, _ = batch()
    with torch.no_grad():
        output = model(images)
    (_, _, *size) = output.masks_queries_logits.shape
    wanted = tf.MaskFormerImageProcessor().post_process_semantic_segmentation(output)
    found = Reader()(output, len(images), tuple(size)).values
    assert torch.equal(found.argmax(1), torch.stack(wanted))
    scores = semantic(model, log=False)(images)
    torch.testing.assert_close(found.exp(), scores)


def oneformer() -> nn.Module:
    return made("OneFormerForUniversalSegmentation", backbone_config=swin(), **MASKS, **TASK)


@pytest.mark.works(
    "model",
    "transformers OneFormer",
    '`attack(semantic(model, task_inputs=processor(image, ["semantic"], return_tensors="pt")["task_inputs"]), ...)`',
)
def test_oneformer_with_its_task() -> None:
    check_attacks(settled(semantic(oneformer(), task_inputs=torch.randint(50, (1, 8)))))


@pytest.mark.works(
    "model",
    "transformers CLIPSeg",
    '`attack(semantic(model, through_no_grad=True, **tokenizer(classes, padding=True, return_tensors="pt")), ...)`: '
    "a text for each class",
)
def test_clipseg_with_a_text_for_each_class() -> None:
    text = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.CLIPSegConfig(
        text_config={**sizes, **text},
        vision_config={**sizes, "image_size": 64, "patch_size": 16},
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    )
    torch.manual_seed(0)
    model = tf.CLIPSegForImageSegmentation(config)
    tokens = {"input_ids": torch.randint(48, (5, 8)), "attention_mask": torch.ones(5, 8, dtype=torch.long)}
    images, labels = batch()
    wrapped = semantic(model, through_no_grad=True, **tokens)
    check_attacks(wrapped)
    with torch.no_grad():
        found = wrapped.eval()(images)
        alone = model(pixel_values=images[1:], **{name: value[3:4] for name, value in tokens.items()}).logits
    torch.testing.assert_close(found[1, 3], alone.reshape(found.shape[-2:]))
    with pytest.raises(ValueError, match="do not depend on images"):
        eroseg_ext.attack(semantic(model, **tokens), images, labels)


@pytest.mark.works("model", "transformers image processors", "normalisation: `attack(model, ..., mean=processor)`")
def test_normalisation_of_an_image_processor() -> None:
    processor = tf.SegformerImageProcessor()
    settings = eroseg_ext.AttackSettings(mean=processor)
    assert (settings.mean, settings.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model, (images, _) = PER_PIXEL["SegFormer"]().eval(), batch()
    with torch.no_grad():
        found = Logits.under(model, settings)(images, images.shape[-2:]).values
        normalised = processor(list(images), do_resize=False, do_rescale=False, return_tensors="pt").pixel_values
        wanted = Logits(model)(normalised, images.shape[-2:]).values
    torch.testing.assert_close(found, wanted)
    check_attacks(model, mean=processor)
    of_bytes = eroseg_ext.AttackSettings(mean=tf.BeitImageProcessor(), clip=(0, 255), eps=8)
    assert (of_bytes.mean, of_bytes.std) == ((127.5,) * 3, (127.5,) * 3)
    assert eroseg_ext.AttackSettings(mean=tf.BeitImageProcessor(do_normalize=False)).mean is None
    with pytest.raises(ValueError, match="mean is 'MobileViTImageProcessor', wanted one that keeps RGB"):
        eroseg_ext.AttackSettings(mean=tf.MobileViTImageProcessor())
