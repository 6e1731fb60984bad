"""What leaves a run: weights as safetensors and a JSON beside them, and `load_student`, which reads both. No pickle."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from radio_cache.errors import ConfigError, NotACacheError, StoreError, unknown_name
from radio_cache.storage import write_atomically
from trainer.adaptors import AdaptorOutput, Adaptors, Head, TeacherWidths
from trainer.data import StudentFit
from trainer.students import Student, StudentOutput, ViT, create_student
from trainer.students.vit import TRAINING_SETTINGS

CONFIG_FILE, WEIGHTS_FILE = "student.json", "student.safetensors"
EXPORT_VERSION = 1
STARTING_SETTINGS = frozenset({"init_from", "init_file", "pretrained"})
"""Overrides of a student that say where its first weights come from."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What a saved student is. Lies beside its weights as `student.json`.

    image_hw: what it was trained at, pixels. fit: what it is shown of an image (`trainer.data.eval_box_xyxy`).
    seed: of its initial weights, so that the untrained student can be made again.
    """

    student: str
    overrides: dict[str, Any]
    image_hw: tuple[int, int]
    fit: StudentFit
    teachers: tuple[TeacherWidths, ...]
    adaptor_width: int | None
    seed: int
    steps: int
    images_seen: int
    cache: str
    run: str
    recipe: str

    def to_json(self) -> dict[str, Any]:
        return {"export_version": EXPORT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "StudentConfig":
        fields = {key: value for key, value in data.items() if key != "export_version"}
        if data.get("export_version") != EXPORT_VERSION:
            raise ConfigError(
                f"this student was saved in version {data.get('export_version')}, this radio-cache reads {EXPORT_VERSION}: "
                "install the radio-cache that saved it, or a newer one"
            )
        fields["teachers"] = tuple(TeacherWidths(**item) for item in fields["teachers"])
        fields["image_hw"] = tuple(fields["image_hw"])
        return cls(**fields)


@final
class DistilledStudent(nn.Module):
    """A student with the adaptor heads of its teachers; heads speak the teachers' own units."""

    def __init__(self, student: Student, adaptors: Adaptors, config: StudentConfig) -> None:
        super().__init__()
        self.student, self.adaptors, self.config = student, adaptors, config
        self.heads = tuple(teacher.name for teacher in config.teachers)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[StudentOutput, dict[str, AdaptorOutput]]:
        """The student's own features, and what each head makes of them, by teacher. Images in [0, 1]."""
        out = self.student(images)
        guesses = self.adaptors(out)
        return out, {name: guesses[name] for name in self.heads}


def build_distilled(config: StudentConfig) -> DistilledStudent:
    """The student and its heads as a run starts them: same seed, same weights."""
    torch.manual_seed(config.seed)
    student = create_student(config.student, **config.overrides)
    return DistilledStudent(student, Adaptors(student, config.teachers, config.adaptor_width), config)


@torch.no_grad()
def fold_statistics(head: Head, mean: Tensor, std: Tensor) -> None:
    """Make a head that speaks of standardised targets speak the teacher's units: y * std + mean, in its last Linear."""
    last = head[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(std[:, None].to(last.weight))
    last.bias.mul_(std.to(last.bias)).add_(mean.to(last.bias))


def deployable(model: DistilledStudent) -> DistilledStudent:
    """The model in evaluation, without what only training needs; a copy where there was any."""
    if not isinstance(model.student, ViT):
        return model.eval()
    overrides = {key: value for key, value in model.config.overrides.items() if key not in TRAINING_SETTINGS}
    if overrides == model.config.overrides:
        return model.eval()
    plain = DistilledStudent(model.student.materialised(), model.adaptors, replace(model.config, overrides=overrides))
    plain.heads = model.heads
    return plain.eval()


def save_student(model: DistilledStudent, folder: Path) -> None:
    """Write `student.safetensors` and `student.json`, each whole or not at all, weights first.

    Reparametrised weights are written as the plain weights they stand for.
    """
    model = deployable(model)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WEIGHTS_FILE}.partial"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    temporary.replace(folder / WEIGHTS_FILE)
    write_atomically(folder / CONFIG_FILE, json.dumps(model.config.to_json(), indent=1).encode())


def load_student(
    path: str | Path, *, adaptors: Sequence[str] | None = None, untrained: bool = False
) -> DistilledStudent:
    """A trained student from a run or an export folder, in eval mode, on the CPU.

    adaptors: the teachers whose heads to keep; all by default. untrained: with the weights the run started from.
    Raises NotACacheError if there is no student at `path`, ConfigError for a teacher the student never had.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).exists() or not (folder / WEIGHTS_FILE).exists():
        hint = "the run is not finished: the same radio-train command goes on" if (folder / "recipe.json").exists() else (
            "give the folder that radio-train --out or radio-export --out made")  # fmt: skip
        raise NotACacheError(f"{folder} holds no trained student ({WEIGHTS_FILE} and {CONFIG_FILE}): {hint}")
    config = StudentConfig.from_json(json.loads((folder / CONFIG_FILE).read_text()))
    rng = torch.get_rng_state()
    # Weights that will be replaced are not worth a download.
    kept = {key: value for key, value in config.overrides.items() if untrained or key not in STARTING_SETTINGS}
    model = build_distilled(replace(config, overrides=kept))
    model.config = config
    torch.set_rng_state(rng)
    if not untrained:
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except RuntimeError as exc:
            raise StoreError(
                f"{folder / WEIGHTS_FILE} does not fit student '{config.student}' as this radio-cache builds it: "
                f"use the version that trained it, or train again ({str(exc).strip().splitlines()[-1].strip()})"
            ) from exc
    known = [teacher.name for teacher in config.teachers]
    for name in adaptors or ():
        if name not in known:
            raise ConfigError(unknown_name("adaptor of this student", name, known))
    model.heads = tuple(known if adaptors is None else adaptors)
    return model.eval()
