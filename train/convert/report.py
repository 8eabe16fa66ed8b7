"""What a converted folder says of itself, out of the facts of its shards: manifest, `report.json`, `skipped.jsonl`.

The same facts give the same bytes, on every machine and whether they come from one run or from the parts of several.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visplice.train.convert.journal import Facts, Journal, differences, part_name
from visplice.train.convert.sources import Source
from visplice.train.data.record import FAULTS, SCHEMA
from visplice.train.data.shards import MANIFEST, read_manifest, write_json, write_manifest
from visplice.vision.image_facts import ODDITIES

REPORT, SKIPPED = "report.json", "skipped.jsonl"
MAX_EXAMPLES = 3  # of one name, in the report; skipped.jsonl has all


def identity_of(source: Source, *, per_shard: int, strict: bool) -> dict[str, Any]:
    """What decides every byte of the shards, as it stands in the manifest."""
    options = {**source.options, "per_shard": per_shard, "strict": strict}
    return {"kind": source.kind, "unit": source.unit, "files": source.files, "options": options}


def finish(out: Path, identity: dict[str, Any], facts: Sequence[Facts], journal: Journal) -> dict[str, Any]:
    """Writes skipped list, report and, last of the three, the manifest; then the journal has done its work.

    Args:
        facts: of every shard, in order.
    Returns:
        The report.
    Raises:
        ValueError: there is no usable sample.
    """
    report = make_report(identity, facts)
    if not report["samples"]:
        journal.remove()  # there is nothing to go on from, but other files and options to be tried
        raise ValueError(nothing_usable(report))
    write_lines(out / SKIPPED, [line for shard in facts for line in shard["skipped"]])
    write_json(out / REPORT, report)
    sync(out)  # the names of the shards are on disk before the manifest that lists them
    write_manifest(out, source=identity, shards=[shard["entry"] for shard in facts if shard["entry"]])
    sync(out)
    return report


def finish_part(
    out: Path, identity: dict[str, Any], part: tuple[int, int], facts: Sequence[Facts], *, total: int
) -> dict[str, Any]:
    """Writes the manifest of one part, which `merge` reads.

    Args:
        total: shards of all parts.
    Returns:
        The report of this part, with "part".
    """
    sync(out)
    header = {"schema": SCHEMA, "source": identity, "part": part, "of_shards": total}
    write_json(out / part_name(part), {**header, "shards": list(facts)})
    sync(out)
    return make_report(identity, facts) | {"part": part}


def finished(out: Path, identity: dict[str, Any], part: tuple[int, int]) -> dict[str, Any] | None:
    """The report of a folder, or of this part of it, that is complete already.

    Raises:
        ValueError: it is of other data, or lacks a shard of its manifest.
    """
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if list(differences(manifest["source"], json.loads(json.dumps(identity)))):
            return None
        check_shards(out, manifest["shards"], MANIFEST)
        return json.loads((out / REPORT).read_text(encoding="utf-8"))
    name = part_name(part)
    if part[1] > 1 and (out / name).exists():
        facts = json.loads((out / name).read_text(encoding="utf-8"))["shards"]
        check_shards(out, [shard["entry"] for shard in facts if shard["entry"]], name)
        return make_report(identity, facts) | {"part": part}
    return None


def check_shards(folder: Path, shards: Sequence[dict[str, Any]], name: str) -> None:
    """Refuses a folder in which a finished shard is missing or of another size."""
    for shard in shards:
        file = folder / shard["name"]
        found = file.stat().st_size if file.exists() else None
        if found != shard["bytes"]:
            state = "missing" if found is None else f"{found} bytes long, not {shard['bytes']}"
            raise ValueError(f"{folder}: {name} lists {shard['name']}, which is {state}; remove the folder, run again")


def make_report(identity: dict[str, Any], facts: Sequence[Facts]) -> dict[str, Any]:
    """Counts and examples: what was read, what came of it, and what did not, by name."""
    skipped: dict[str, dict[str, Any]] = {}
    oddities: dict[str, dict[str, Any]] = {}
    for shard in facts:
        for line in shard["skipped"]:
            known = skipped.setdefault(line["fault"], {"count": 0, "items": 0, "examples": []})
            known["count"] += 1
            known["items"] += line["items"]
            known["examples"] += [line] if len(known["examples"]) < MAX_EXAMPLES else []
        for name, found in shard["oddities"].items():
            known = oddities.setdefault(name, {"count": 0, "examples": []})
            known["count"] += found["count"]
            known["examples"] += found["examples"][: MAX_EXAMPLES - len(known["examples"])]
    written = sum(shard["items"] for shard in facts)
    lost = sum(found["items"] for found in skipped.values())
    entries = [shard["entry"] for shard in facts if shard["entry"]]
    return {
        "schema": SCHEMA,
        "source": identity,
        identity["unit"]: {"read": written + lost, "written": written, "skipped": lost},
        "samples": sum(entry["samples"] for entry in entries),
        "images": sum(entry["images"] for entry in entries),
        "shards": len(entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "skipped": {name: {"meaning": meaning(name), **skipped[name]} for name in sorted(skipped)},
        "oddities": {name: {"meaning": meaning(name), **oddities[name]} for name in sorted(oddities)},
    }


def meaning(name: str) -> str:
    """What a fault or an oddity is."""
    return FAULTS.get(name) or ODDITIES[name]


def nothing_usable(report: dict[str, Any]) -> str:
    """Why there is no usable sample: the commonest faults, each with an example."""
    counts = Counter({name: found["count"] for name, found in report["skipped"].items()})
    reasons = []
    for name, count in counts.most_common(3):
        example = report["skipped"][name]["examples"][0]["message"]
        reasons.append(f"{count} {name} ({example})")
    return f"there is no usable sample: {', '.join(reasons)}; are these the right files and the right --images?"


def write_lines(file: Path, values: Sequence[Any]) -> None:
    """Writes JSON lines beside their place and renames them."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def sync(folder: Path) -> None:
    """Has the names in a folder written to disk, as fsync of a file does its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
