"""The attacks as objects: ``atk = EroSeg(model, eps=8 / 255); adversarial = atk(images, labels)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eroseg_ext.attacks.graphs import Graphs
from eroseg_ext.attacks.pgd import Callback, run_attack
from eroseg_ext.attacks.settings import OTHER_NAMES, AttackSettings
from eroseg_ext.models.adapter import Model

if TYPE_CHECKING:
    from typing_extensions import Self


class Attack:
    """An attack with its model and settings bound; the settings are checked here and never change afterwards.

    With ``graph=True`` the model's CUDA graphs are kept for later calls, for images of the last two shapes, dtypes and
    devices. They hold the memory of the model's forward and backward pass. Weights that an optimizer changes in place
    are seen; the graphs are captured anew where parameters, buffers or submodules are others or the mode is another.
    What the model does in Python, and tensors that it holds otherwise, are as they were at the capture. Graphs of a
    callable that is no nn.Module are not kept. Calls with the same object must not overlap in CUDA
    streams, nor, where there is no nn.Module for the second to wait for, in threads.

    Args:
        model: as :func:`eroseg_ext.attack` takes it.
        **settings: as there, without ``method``.

    Raises:
        ValueError, TypeError: a setting is not allowed; one sentence names it.
        AttributeError: an attribute other than ``model`` is set afterwards; :meth:`replace` makes an attack with other
            settings.
    """

    method: str
    model: Model
    settings: AttackSettings
    _given: dict[str, Any]
    _graphs: Graphs

    def __init__(self, model: Model, **settings: Any) -> None:
        if "method" in settings:
            raise TypeError(f"method is not a setting of {type(self).__name__}, it is always {self.method!r}")
        vars(self).update(
            model=model,
            settings=AttackSettings.create(**settings, method=self.method),
            _given=settings,
            _graphs=Graphs(),
        )

    def __setattr__(self, name: str, value: object) -> None:
        if name == "model":
            return super().__setattr__(name, value)
        raise AttributeError(
            f"{name} cannot be set on {type(self).__name__}, whose settings never change: use atk = atk.replace("
            f"{OTHER_NAMES.get(name, name)}={value!r:.40})"
        )

    def replace(self, **settings: Any) -> Self:
        """The same attack on the same model with other values of these settings; raises as the constructor does."""
        return type(self)(self.model, **{**self._given, **settings})

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        return_info: bool = False,
    ) -> Any:
        """Adversarial images; the arguments are those of :func:`eroseg_ext.attack`."""
        return run_attack(
            self.settings, self._graphs, self.model, images, labels, mask, generator, callback, return_info
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


class EroSeg(Attack):
    """arXiv 2601.14950"""

    method = "eroseg"


class PGD(Attack):
    """Madry et al., ICLR 2018"""

    method = "pgd"


class SegPGD(Attack):
    """Gu et al., ECCV 2022"""

    method = "segpgd"


class CosPGD(Attack):
    """Agnihotri et al., ICML 2024; ``variant="sigmoid"`` for its other similarity"""

    method = "cospgd"


class MaskedCE(Attack):
    """Croce et al., ECCV 2024; ``balanced=True`` divides by the class's pixel count"""

    def __init__(self, model: Model, *, balanced: bool = False, **settings: Any) -> None:
        vars(self)["method"] = "mce_bal" if balanced else "mce"
        super().__init__(model, **settings)
        self._given["balanced"] = balanced


class JSD(Attack):
    """Jensen-Shannon divergence, Croce et al., ECCV 2024"""

    method = "js"


class Tsallis(Attack):
    """Tsallis cross-entropy with entropic index ``q``"""

    method = "tsallis"
