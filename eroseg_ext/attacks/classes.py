"""The attacks as objects: ``atk = EroSeg(model, eps=8 / 255); adversarial = atk(images, labels)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from eroseg_ext.attacks.graphs import Graphs
from eroseg_ext.attacks.methods import METHODS
from eroseg_ext.attacks.options import Call, ObjectOptions, with_settings
from eroseg_ext.attacks.pgd import Loop
from eroseg_ext.attacks.result import AttackInfo
from eroseg_ext.attacks.settings import OTHER_NAMES, AttackSettings
from eroseg_ext.models.adapter import Model

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


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

    def __init_subclass__(cls, method: str) -> None:
        cls.method = method
        cls.__doc__ = f"{METHODS[method].summary}: {METHODS[method].source}. {cls.__doc__ or ''}".rstrip()

    @with_settings(ObjectOptions)
    def __init__(self, model: Model, **settings: Unpack[ObjectOptions]) -> None:
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

    def replace(self, **settings: Unpack[ObjectOptions]) -> Self:
        """The same attack on the same model with other values of these settings; raises as the constructor does."""
        return type(self)(self.model, **{**self._given, **settings})

    @overload
    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        return_info: Literal[False] = False,
        **call: Unpack[Call],
    ) -> Tensor: ...
    @overload
    def __call__(
        self, images: Tensor, labels: Tensor | None = None, *, return_info: Literal[True], **call: Unpack[Call]
    ) -> tuple[Tensor, AttackInfo]: ...
    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        return_info: bool = False,
        **call: Unpack[Call],
    ) -> Tensor | tuple[Tensor, AttackInfo]:
        """Adversarial images; the arguments are those of :func:`eroseg_ext.attack`."""
        return Loop(self.settings, self.model, images, labels, graphs=self._graphs, **call).result(return_info)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


class EroSeg(Attack, method="eroseg"): ...


class PGD(Attack, method="pgd"): ...


class SegPGD(Attack, method="segpgd"): ...


class CosPGD(Attack, method="cospgd"):
    """``variant="sigmoid"`` for its other similarity."""


class MaskedCE(Attack, method="mce"):
    """``balanced=True`` divides by the class's pixel count."""

    @with_settings(ObjectOptions)
    def __init__(self, model: Model, *, balanced: bool = False, **settings: Unpack[ObjectOptions]) -> None:
        vars(self)["method"] = "mce_bal" if balanced else "mce"
        super().__init__(model, **settings)
        self._given["balanced"] = balanced


class JSD(Attack, method="js"): ...


class Tsallis(Attack, method="tsallis"):
    """With entropic index ``q``."""
