"""Protocols of prompting and counting masks: that of a public evaluation script, and one mask per prompt."""

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["efficientvit-sam", "single-mask"]

SMALL_PX, MEDIUM_PX = 32**2, 96**2
"""Areas up to which COCO calls an instance small, and medium."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to evaluate prompted masks.

    Attributes:
        best_of_three: SAM predicts three masks, and the one with the highest predicted IoU counts.
        crowds: crowd regions are prompted and counted as well.
        file_area: an instance's size class follows the file's `area`, and an instance on a limit counts in both classes;
            otherwise it follows the pixels of its mask.
        interactive_points: every further point is placed in the largest error of the last mask, inside or outside.
        description: the same in a few words, for the line above a table.
    """

    best_of_three: bool
    crowds: bool
    file_area: bool
    interactive_points: bool
    description: str

    def sizes(self, area_px: float) -> tuple[str, ...]:
        """Return the size classes in which an instance of this area counts."""
        # Disjoint classes by the mask's own pixels.
        if not self.file_area:
            return ("small",) if area_px < SMALL_PX else ("medium",) if area_px < MEDIUM_PX else ("large",)
        # Closed intervals, as in the public script: an area on a limit counts twice.
        limits = {"small": (0.0, SMALL_PX), "medium": (SMALL_PX, MEDIUM_PX), "large": (MEDIUM_PX, float("inf"))}
        return tuple(name for name, (low, high) in limits.items() if low <= area_px <= high)


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "efficientvit-sam": Protocol(
        best_of_three=True,
        crowds=True,
        file_area=True,
        interactive_points=True,
        description="best of three masks by predicted IoU, crowd regions included, sizes by the file's area",
    ),
    "single-mask": Protocol(
        best_of_three=False,
        crowds=False,
        file_area=False,
        interactive_points=False,
        description="one mask a prompt, crowd regions left out, sizes by the pixels of the mask",
    ),
}
"""efficientvit-sam: the public script of EfficientViT-SAM (arXiv 2402.05008), the harness that AM-RADIO's table names."""
