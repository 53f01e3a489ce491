"""Adversarial images on disk: 8-bit PNGs inside the ball, with the settings of the attack beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eroseg_ext import __version__
from eroseg_ext.attacks.ball import quantized
from eroseg_ext.attacks.inputs import check_8_bits
from eroseg_ext.attacks.settings import AttackSettings
from eroseg_ext.data.reading import named, opened
from eroseg_ext.utils.atomic_files import plain, replacing, write_json

SETTINGS = "attack.json"


def save_adversarial(
    folder: str | Path, images: Tensor, clean: Tensor, *, names: Sequence[str | int] | None = None, **settings: Any
) -> list[Path]:
    """Writes adversarial images as 8-bit PNGs inside the ball, for ``evaluate(..., adversarial=folder)`` to read.

    >>> settings = {"method": "cospgd", "eps": 4 / 255, "steps": 20}
    >>> adversarial = eroseg_ext.attack(model, images, labels, quantize=True, **settings)
    >>> eroseg_ext.save_adversarial("adversarial", adversarial, images, **settings)

    With ``quantize=True`` they are written as they are. Images that are no 255ths are rounded towards the clean ones,
    which cannot leave the ball.

    Args:
        folder: made if missing; gets ``NAME.png`` for each image, and ``attack.json`` with all the settings.
        images: ``[B, K, H, W]``, K 1, 3 or 4, of any attack.
        clean: the images that were attacked, 255ths of the range of ``clip``.
        names: of the files, without ending: those of the data's files, or the images' numbers in the data; default 0 to
            B-1.
        **settings: the keywords of the attack, of which ``eps``, ``norm`` and ``clip`` are the ball.

    Returns:
        The files.

    Raises:
        ValueError, TypeError: an argument is not as described, or an image is outside the ball. Nothing was written.
        OSError: a file could not be written.
    """
    config = AttackSettings.create(**settings)
    names = range(len(images)) if names is None else names
    if images.shape != clean.shape or images.dim() != 4 or images.shape[1] not in (1, 3, 4):
        came = f"{list(images.shape)} and clean {list(clean.shape)}"
        raise ValueError(f"images has shape {came}, wanted [B, K, H, W] of both, K 1, 3 or 4")
    if len(names) != len(images) or len(set(names)) != len(names):
        raise ValueError(f"names has {len(names)} names, {len(set(names))} different, wanted {len(images)}")
    check_8_bits("clean", clean, config.clip)
    found = quantized(images.detach().double(), clean.detach().double(), config.clip)
    for number, (name, image, before) in enumerate(zip(names, found, clean.double(), strict=True)):
        if not is_in_ball(image, before, config.norm, config.eps):
            raise ValueError(
                f"images[{number}] ({name}) is further than eps={config.eps:.6g} ({config.norm}) from clean"
            )
    levels = ((found - config.clip[0]) * (255 / config.range)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    write_json(folder / SETTINGS, {"eroseg_ext": __version__, **about})
    paths = [file_of(folder, name) for name in names]
    for path, pixels in zip(paths, levels, strict=True):
        with replacing(path) as file:
            Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return paths


def file_of(folder: Path, name: str | int) -> Path:
    """Where the adversarial image of that name, or number, is."""
    return folder / f"{f'{name:06}' if isinstance(name, int) else name}.png"


def is_in_ball(images: Tensor, clean: Tensor, norm: str, eps: float) -> bool:
    """Whether they are at most ``eps`` apart, but for the rounding of float32."""
    moved = (images - clean).double()
    return bool((moved.abs().max() if norm == "linf" else moved.norm()) <= eps * (1 + 1e-5) + 1e-6)


class SavedImages:
    """What :func:`save_adversarial` wrote.

    Raises:
        ValueError, OSError: the folder holds no settings.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            self.eps, self.norm, self.method = float(about["eps"]), str(about["norm"]), str(about["method"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{folder / SETTINGS} is damaged, wanted settings that save_adversarial wrote") from error

    def digest(self, name: str | int) -> str:
        """A hash of an image's file."""
        return hashlib.sha256(self._path(name).read_bytes()).hexdigest()[:16]

    def image(self, name: str | int, clean: Tensor, clip: tuple[float, float]) -> Tensor:
        """The adversarial image of that name in the range of ``clip``; ValueError if it is not in the ball."""
        path = self._path(name)
        with named(path, "an image"):
            pixels = torch.from_numpy(np.atleast_3d(np.array(opened(path)))).permute(2, 0, 1)
        if pixels.shape != clean.shape:
            raise ValueError(
                f"{path} is an image {list(pixels.shape)}, wanted {list(clean.shape)}, as its clean image is: size "
                "must be that of the attack"
            )
        image = clip[0] + (clip[1] - clip[0]) * (pixels / 255)
        if not is_in_ball(image, clean, self.norm, self.eps):
            raise ValueError(
                f"{path} is further than its eps={self.eps:.6g} ({self.norm}) from its clean image in data"
            )
        return image

    def _path(self, name: str | int) -> Path:
        path = file_of(self._folder, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing, wanted an adversarial image for each image of data")
        return path
