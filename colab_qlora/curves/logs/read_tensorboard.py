"""Reads a loss log from TensorBoard's event files, by means of the tensorboard package.

Every scalar is known by its tag (names.py: train/loss, eval/loss, train/learning_rate, ...). What
was logged at one step, one after the other, becomes one record.
"""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from colab_qlora.curves.logs.names import field_of
from colab_qlora.curves.logs.records import Record, Section, step_of
from colab_qlora.errors import UserError

__all__ = ["event_files", "is_event_file", "parse_events"]

_IN_NAME = "tfevents"


def is_event_file(path: Path) -> bool:
    """Whether a file is one of TensorBoard's, which go by their name."""
    return _IN_NAME in path.name


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder, by name, which is by age; not those in folders below it."""
    return sorted(each for each in folder.iterdir() if is_event_file(each) and each.is_file())


def parse_events(path: Path) -> Section:
    """Reads the scalars of one event file, or of all of a folder.

    Args:
        path: the file, or the folder that holds them.

    Returns:
        One section with the records in the order of their wall time, which is that of writing.

    Raises:
        UserError: tensorboard is not installed, or cannot read the files.
    """
    events = sorted(_scalars(path), key=itemgetter(0))
    section = Section(unit="record")
    record: Record = {}
    records: list[Record] = []
    for wall_time, step, field, value in events:
        if record.get("step") != step or field in record:
            # so that a step that is no count is refused as in any other log
            record = {"step": step_of({"step": step}, f"{path}: {field}")}
            record["seconds"] = round(wall_time - events[0][0], 3)
            records.append(record)
        record[field] = value
    section.add(records, range(1, len(records) + 1))
    return section


def _scalars(path: Path) -> list[tuple[float, int, str, float]]:
    """Gives wall time, step, field and value of every scalar."""
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError as error:
        raise UserError(
            "reading TensorBoard's event files needs the tensorboard package, which is not "
            "installed",
            got=path,
            do="Run pip install tensorboard, or export the curve as CSV",
        ) from error
    # 0 is all of them; the default keeps a random sample
    sizes = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
    events = event_accumulator.EventAccumulator(str(path), size_guidance=sizes)
    try:
        events.Reload()
        tags = _best_tags([*events.Tags()["scalars"], *events.Tags()["tensors"]])
        series = [_of_tag(events, tag, field) for field, tag in tags.items()]
    except Exception as error:  # whatever the parser of a damaged file raises
        raise UserError(
            "TensorBoard cannot read the event files",
            got=" ".join(f"{path} ({type(error).__name__}: {error})".split())[:200],
            do="Export the curve as CSV, or copy the files again",
        ) from error
    return list(chain.from_iterable(series))


def _best_tags(tags: list[str]) -> dict[str, str]:
    """Gives the tag of every field: the one whose name counts first."""
    known = [(found[1], found[0], tag) for tag in tags if (found := field_of(tag))]
    best: dict[str, str] = {}
    for _, field, tag in sorted(known):
        if field not in ("step", "seconds"):
            best.setdefault(field, tag)
    return best


def _of_tag(events: Any, tag: str, field: str) -> list[tuple[float, int, str, float]]:
    from tensorboard.util import tensor_util

    if tag in events.Tags()["scalars"]:
        return [(each.wall_time, each.step, field, each.value) for each in events.Scalars(tag)]
    # TensorFlow 2 writes a scalar as a tensor
    if events.SummaryMetadata(tag).plugin_data.plugin_name != "scalars":
        return []
    return [
        (each.wall_time, each.step, field, float(tensor_util.make_ndarray(each.tensor_proto)))
        for each in events.Tensors(tag)
    ]
