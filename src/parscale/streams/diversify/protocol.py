"""What a way to tell streams apart has to give, and the list of them. Nothing else names them one by one."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from parscale.config import StreamsConfig
from parscale.streams.diversify import embedding, lora, prefix, rank1
from parscale.streams.diversify.calibration import Calibration
from parscale.streams.state import StreamState


@runtime_checkable
class Diversifier(Protocol):
    """A file of this folder. Its parameters lie on the modules that use them; entry i of their first dimension is
    stream i's, so that p < P streams use the first p.
    """

    @staticmethod
    def check(model: Any, calibration: Calibration, config: StreamsConfig) -> None:
        """Refuse, before anything is changed, a model that cannot carry it, or a start that it cannot have there.

        Raises:
            InputError: says why.
        """

    @staticmethod
    def attach(model: Any, state: StreamState) -> None:
        """Add its parameters, uninitialised, to the causal LM `model`, as `state.config` asks."""

    @staticmethod
    def detach(model: Any) -> None:
        """Undo `attach`; nothing happens where nothing is attached."""

    @staticmethod
    def init(model: Any, calibration: Calibration) -> None:
        """Set the start of its parameters, from what the plain model did."""

    @staticmethod
    def reset(module: nn.Module, std: float) -> None:
        """Set the start of its parameters on this one module, if it has any, where nothing is known of the model but
        the `std` of its own random weights: finite always, and streams that differ."""


ALL: Mapping[str, Diversifier] = {"prefix": prefix, "embedding": embedding, "lora": lora, "rank1": rank1}


def chosen(config: StreamsConfig) -> list[Diversifier]:
    """Those that a model of this config has, in the order in which they are attached."""
    return [diversifier for name, diversifier in ALL.items() if name in config.diversifiers]
