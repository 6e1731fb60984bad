"""The configuration of the adaptor heads. Free of torch, as a recipe holds it."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from radio_cache.errors import ConfigError, unknown_name

HeadKind = Literal["mlp", "residual-mlp"]
HEAD_KINDS: Final[tuple[str, ...]] = get_args(HeadKind)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The architecture of all heads of a student.

    Attributes:
        kind: "mlp" is AM-RADIO's (`MlpHead`), "residual-mlp" the later papers' (`ResidualHead`).
        width: between the layers. None uses the largest width of any teacher, as the paper does.
        blocks: residual blocks of a residual-mlp.
        upsample: tokens along each side of a spatial head's output per token of the student; 1 except for residual-mlp.
    """

    kind: HeadKind = "mlp"
    width: int | None = None
    blocks: int = 0
    upsample: int = 1

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise ConfigError(unknown_name("adaptor", self.kind, HEAD_KINDS))
        if self.blocks < 0 or self.upsample < 1:
            raise ConfigError(
                f"adaptor_blocks is at least 0 and adaptor_upsample at least 1, got {self.blocks} and {self.upsample}"
            )
        if self.kind == "mlp" and (self.blocks, self.upsample) != (0, 1):
            raise ConfigError(
                f"the adaptor 'mlp' has no residual blocks and does not upsample, got adaptor_blocks={self.blocks} and "
                f"adaptor_upsample={self.upsample}: choose adaptor=residual-mlp"
            )
