"""The report page about a run: k-NN beside its teachers, losses, feature maps, the cache, and how to reproduce it.

`write_report` gathers a `Page`, `render` turns it into HTML. The page is one file without network access or scripts.
"""

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from cache_builder.build_command import build_commands, short_path
from evals.encoders import StudentEncoder
from evals.encoders.trained_on import count_trained_on, divided, split_of
from evals.errors import EvalError
from evals.knn.table import KnnConfig, KnnRow, KnnTable, run_knn
from evals.report.losses import Chart, Metrics, loss_charts, read_metrics
from evals.report.pictures import ImagePictures, feature_pictures, live_maps
from evals.report.sections import NotRun, Section, SectionsConfig, make_sections
from evals.shared.devices import Device
from evals.shared.image_set import CacheImages, ImageSet, image_set
from evals.shared.progress import Progress
from evals.shared.record import RECORDED_AS
from evals.shared.versions import hardware, software_versions
from radio_cache.errors import ConfigError, NotACacheError, RadioCacheError, TeacherError
from radio_cache.reader import Cache, is_cache
from radio_cache.statistics.knn_protocol import PAPER_K, PAPER_TEMPERATURE
from radio_cache.terminal.files import write_output
from radio_cache.terminal.output import human_bytes
from radio_cache.torch import pick_device
from radio_cache.view import png_bytes
from radio_cache.view.info import TeacherInfo, teacher_infos
from trainer import StudentConfig

_JPEG_QUALITY = 85
# Gives an accuracy to about two points, see `sampling_note`, and is quick enough for a CPU.
_SECTION_IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a report.

    Attributes:
        run: folder of the student's run.
        out: HTML file to write.
        cache: the bank; None takes the cache that the run was trained on.
        queries: images to classify and to draw; None classifies and draws those of the bank.
        num_images: images of each cache to draw as feature maps.
        k, temperature: of k-NN.
        sections: evaluations beside k-NN, keys of `evals.report.sections.SECTIONS`. If there are some, the page lists what
            cannot be evaluated; otherwise that is an error.
        masks, classes: for segmentation, see `SectionsConfig`.
        limit: images of bank and of queries at most, drawn by `seed`.
        device: where models run.
    """

    run: Path
    out: Path
    cache: str | Path | None = None
    queries: str | Path | None = None
    num_images: int = field(default=4, metadata={RECORDED_AS: "shown"})
    k: int = PAPER_K
    temperature: float = PAPER_TEMPERATURE
    sections: tuple[str, ...] = ()
    masks: tuple[Path, Path] | None = None
    classes: str | None = None
    limit: int | None = None
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.num_images < 0:
            raise ConfigError(f"--num-images is the number of images to draw, 0 or more, not {self.num_images}")


@dataclass(frozen=True)
class PictureGroup:
    """Images drawn together, in comparable colours.

    Attributes:
        title: the kind of images.
        note: the reason why something is missing, or "".
    """

    title: str
    note: str
    pictures: tuple[ImagePictures, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """The contents of the page.

    Attributes:
        table: None if k-NN could not be run; `not_run` then holds the reason.
        metrics: None if the run has no log.
        commands: reproduce everything on the page.
    """

    student: StudentConfig
    table: KnnTable | None
    metrics: Metrics | None
    groups: tuple[PictureGroup, ...]
    sections: tuple[Section, ...]
    not_run: tuple[NotRun, ...]
    cache: str
    cache_images: int
    teachers: tuple[TeacherInfo, ...]
    commands: tuple[str, ...]
    versions: dict[str, str]
    hardware: str


def write_report(config: ReportConfig, *, progress: Progress | None = None) -> Page:
    """Evaluate the run, write the page to `config.out`, and return its contents.

    Raises:
        RadioCacheError: if run, cache or queries cannot be opened; without `sections`, also if k-NN cannot be run.
    """
    device = torch.device(pick_device(config.device))
    student = StudentEncoder.of_run(config.run, name="student", trained=True, device=device)
    table, groups, not_run = None, list[PictureGroup](), list[NotRun]()
    # Opened before k-NN, so that a moved cache is reported with its cure.
    bank = _bank(config, student)
    try:
        table = _knn(config, progress)
    except RadioCacheError as exc:
        # The plain report is about k-NN: without it there is no page.
        if not config.sections:
            raise
        not_run.append(NotRun("knn", str(exc)))
    # Feature maps need cached teachers, so a folder of queries has no pictures.
    if config.num_images and config.queries is not None and is_cache(config.queries):
        title, cache = _queries_group(config.queries, student)
        groups.append(picture_group(title, cache, student, config.num_images, device))
    if config.num_images:
        # Without teachers, so that images without a class are drawn, too.
        images = image_set(CacheImages(bank))
        training_and_held_out = divided(images, split_of([student]))
        kinds = [("Images it was trained on", images)]
        if training_and_held_out is not None:
            kinds = [
                ("Images that were held out of training", training_and_held_out[1]),
                ("Images it was trained on", training_and_held_out[0]),
            ]
        for title, selection in kinds:
            groups.append(picture_group(title, bank, student, config.num_images, device, rows=selection.rows))
    sections_config = SectionsConfig(
        run=config.run,
        cache=bank.url,
        images=config.queries or bank.url,
        masks=config.masks,
        classes=config.classes,
        crop_px=student.geometry.input_hw[0],
        # k-NN uses all images by default; the other evaluations are slower and get a limit.
        limit=config.limit or _SECTION_IMAGES,
        seed=config.seed,
        device=config.device,
    )
    sections, sections_not_run = make_sections(sections_config, config.sections, progress=progress)
    page = Page(
        student=student.config,
        table=table,
        metrics=read_metrics(config.run),
        groups=tuple(groups),
        sections=tuple(sections),
        not_run=(*not_run, *sections_not_run),
        cache=bank.url,
        cache_images=bank.num_images,
        teachers=tuple(teacher_infos(bank)),
        commands=tuple(_commands(config, bank, student.config)),
        versions=software_versions(),
        hardware=hardware(),
    )
    # Rendered before the file is opened: an error leaves an earlier page untouched.
    write_output(config.out, render(page).encode())
    return page


def _bank(config: ReportConfig, student: StudentEncoder) -> Cache:
    """Return the cache that the page is about. Raises ConfigError if the run's own cache was moved."""
    if config.cache is not None:
        return Cache(config.cache)
    try:
        return Cache(student.config.cache)
    except NotACacheError as exc:
        raise ConfigError(
            f"the cache that {config.run} learned from is not at {student.config.cache} now: if it was moved, name its new path: "
            "--cache NEW"
        ) from exc


def _queries_group(path_or_url: str | Path, student: StudentEncoder) -> tuple[str, Cache]:
    """Return the title of the queries' pictures, by whether the student was trained on them, and their cache."""
    cache = Cache(path_or_url)
    images = image_set(CacheImages(cache))
    count = count_trained_on(student.config, images)
    # Counts decide the title: unknown, none, all of them; anything else is a mixture.
    titles = {None: "Images to classify", 0: "Images it never saw", len(images): "Images it was trained on, as queries"}
    return titles.get(count, f"Images to classify, {count} of which it was trained on"), cache


def _knn(config: ReportConfig, progress: Progress | None) -> KnnTable:
    return run_knn(
        KnnConfig(
            bank=config.cache,
            queries=config.queries,
            runs=(config.run,),
            k=config.k,
            temperature=config.temperature,
            limit=config.limit,
            seed=config.seed,
            device=config.device,
        ),
        progress=progress,
    )


def page_record(page: Page) -> dict[str, Any]:
    """Return the figures of a page for `report.json`: one entry per evaluation, and those that were not run."""
    return {
        "student": page.student.to_json(),
        "knn": None if page.table is None else page.table.to_json(),
        # Sections of pictures alone have no record.
        **{section.name: dict(section.record) for section in page.sections if section.record is not None},
        "not_run": {evaluation.name: evaluation.reason for evaluation in page.not_run},
        "commands": page.commands,
    }


def picture_group(
    title: str,
    cache: Cache,
    student: StudentEncoder,
    count: int,
    device: torch.device,
    *,
    rows: NDArray[np.int64] | None = None,
) -> PictureGroup:
    """Draw `count` images of a cache; a teacher that cannot be run is left out, with the reason in the note.

    Args:
        title: of the group.
        cache: of the images.
        student: to compare with its teachers.
        count: number of images.
        device: where teachers run.
        rows: to choose from; None for all.
    """
    teacher_names = [teacher.name for teacher in student.config.teachers if teacher.name in cache.teachers]
    usable = image_set(CacheImages(cache), teachers=teacher_names)
    # Few pictures show more if every class comes once before any comes twice.
    chosen = varied_rows(usable if rows is None else usable.at(np.flatnonzero(np.isin(usable.rows, rows))), count)
    chosen_rows = chosen.rows.tolist()
    live: dict[str, NDArray[np.float32]] = {}
    notes: list[str] = []
    for name in teacher_names:
        try:
            # Run one teacher after the other, so that only one model is in memory.
            live[name] = live_maps(cache, name, chosen_rows, device=device)
        except TeacherError as exc:
            # The page is about the student: without the teacher's weights it draws less, and names the reason.
            notes.append(f"The live maps of {name} are missing: {exc}.")
    names = [chosen.name_of(int(label)) if label >= 0 else "" for label in chosen.labels]
    return PictureGroup(title, " ".join(notes), feature_pictures(cache, chosen_rows, names, student, live))


def render(page: Page) -> str:
    """Render the page as HTML. The same `Page` gives the same text."""
    # Autoescape: names of classes and files come from data. StrictUndefined: a typing error is no blank.
    environment = Environment(
        loader=PackageLoader("evals"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "png": _png_uri, "jpeg": _jpeg_uri, "human_bytes": human_bytes}
    charts: Sequence[Chart] = loss_charts(page.metrics) if page.metrics else ()
    variables: dict[str, Any] = {
        "page": page,
        "headline": headline(page.student, page.table)
        if page.table
        else f"{page.student.student}, without labels to evaluate it on.",
        "charts": charts,
    }
    return environment.get_template("report.html").render(variables)


def headline(student: StudentConfig, table: KnnTable) -> str:
    """Return the result of the page in one or two sentences."""
    student_row = _first(table.rows, "student")
    untrained = _first(table.rows, "untrained")
    best = max((row for row in table.rows if row.kind == "teacher"), key=lambda row: row.top1, default=None)
    if student_row is None:
        raise EvalError("a report is about a student, and the table has none")
    total = table.queries["images"]
    # The headline must not praise an accuracy on training images as if they were new.
    memorised = table.trained_on.get(student_row.name, 0)
    if memorised == total:
        image_phrase = f"the {total:,} images it was trained on"
    elif memorised:
        image_phrase = f"{total:,} images, {memorised:,} of which it was trained on,"
    else:
        image_phrase = f"{total:,} {'images' if table.leave_one_out else 'test images'}"
    student_sentence = (
        f"By its nearest neighbours, {student.student} gets {student_row.top1:.1%} of {image_phrase} right, among "
        f"{table.classes:,} classes."
    )
    comparisons = [f"its best teacher, {best.name}, gets {best.top1:.1%}"] if best else []
    comparisons += [f"the same network untrained {untrained.top1:.1%}"] if untrained else []
    comparison = "; ".join(comparisons)
    return f"{student_sentence} {comparison[0].upper()}{comparison[1:]}." if comparison else student_sentence


def varied_rows(images: ImageSet, count: int) -> ImageSet:
    """Draw `count` images with seed 0: one of each class in random order, then a second one of each, and so on."""
    order = np.random.default_rng(0).permutation(len(images))
    num_drawn: dict[int, int] = {}
    # The round in which an image of a class comes up: 0 for the first one drawn, then 1, ...
    round_of = np.empty(len(images), dtype=np.int64)
    for position in order:
        label = int(images.labels[position])
        round_of[position] = num_drawn.get(label, 0)
        num_drawn[label] = int(round_of[position]) + 1
    # Sorted by round, then by the random order: the sort is stable.
    chosen = np.sort(order[np.argsort(round_of[order], kind="stable")][:count])
    return images.at(chosen)


def _first(rows: Sequence[KnnRow], kind: str) -> KnnRow | None:
    """Return the first row of a kind: an encoder's own features come before those of its heads."""
    return next((row for row in rows if row.kind == kind), None)


def _commands(config: ReportConfig, bank: Cache, student: StudentConfig) -> list[str]:
    """Return the commands that reproduce caches, run and page, from what caches and run recorded."""
    # Only a cache records the command that built it.
    queries_are_cache = config.queries is not None and is_cache(config.queries)
    caches = [bank, Cache(config.queries)] if config.queries is not None and queries_are_cache else [bank]
    commands = [command for cache in caches for command in build_commands(cache)]
    train = ["radio-train", "--cache", short_path(student.cache), "--recipe", short_path(config.run / "recipe.json")]
    # A recipe without --teacher takes all teachers of the cache.
    if {teacher.name for teacher in student.teachers} != set(bank.teachers.names()):
        train += [word for teacher in student.teachers for word in ("--teacher", teacher.name)]
    commands.append([*train, "--out", "another-run"])
    report = [
        "radio-eval",
        "all" if config.sections else "report",
        "--run",
        short_path(config.run),
        "--cache",
        short_path(bank.url),
    ]
    if config.queries is not None:
        report += ["--queries", short_path(config.queries)]
    defaults = ReportConfig(run=config.run, out=config.out)
    # Only options that differ from their default, so that the commands stay short.
    for name in ("k", "num_images", "limit", "seed", "device"):
        value = getattr(config, name)
        if value != getattr(defaults, name):
            report += [f"--{name.replace('_', '-')}", str(value)]
    if config.masks is not None:
        report += [
            "--masks",
            *map(short_path, config.masks),
            *(["--classes", config.classes] if config.classes else []),
        ]
    commands.append([*report, "--out", short_path(config.out)])
    return [shlex.join(command) for command in commands]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _png_uri(picture: NDArray[np.uint8]) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}"


def _jpeg_uri(picture: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    # JPEG for photos: PNG would make the page several times larger.
    Image.fromarray(picture).save(buffer, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
