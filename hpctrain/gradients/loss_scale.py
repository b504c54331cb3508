"""The dynamic loss scale of fp16 autocast.

The arithmetic is that of torch's GradScaler (Micikevicius et al. 2018, section 3.2); what differs is that the
gradients are judged after the exchange, together, and unscaled by the exchange itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hpctrain.errors import UserError

GROWTH_INTERVAL = 2000
#: Gradients that still overflow with so small a scale are not a matter of the scale.
SMALLEST_SCALE = 2.0**-10


class LossScale:
    """A factor on the loss that keeps fp16 gradients from vanishing; moves alike on ranks that are told alike.

    ``value`` doubles after 2,000 good steps in a row and halves at each bad one, whose update must be skipped.
    """

    def __init__(self, value: float = 2.0**16) -> None:
        self.value = value
        self.good_steps = 0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to run backward from; ``GradientExchange.accumulate(scale=1 / value)`` undoes it."""
        return loss * self.value

    def update(self, finite: bool) -> None:
        """Take note of a step's verdict, which must be that of all ranks.

        Raises UserError when gradients overflow whatever the scale.
        """
        if finite:
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.good_steps = 0
                # An infinite scale would make every gradient infinite; the largest finite one serves as well.
                self.value = min(2 * self.value, 2.0**127)
            return
        self.good_steps = 0
        self.value /= 2
        if self.value < SMALLEST_SCALE:
            raise UserError(
                f"gradients are not finite in fp16 at any loss scale down to {SMALLEST_SCALE:g}; "
                "lower schedule.lr or set train.precision=bf16"
            )

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        self.value = float(state["value"])
        self.good_steps = int(state["good_steps"])
