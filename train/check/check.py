"""What is wrong with a data set: every sample read, every picture decoded whole, and all of them compared.

Problems are what training cannot use, counts wrongly, or should not have seen; notes are what it can use and a person
may want to know of. Curation counts: what it dropped is not checked, what it changed is checked as it is now.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visplice.train.check.leakage import LEAKS, Facts, find_leaks, published_test
from visplice.train.check.shard import LONGER, Finding, ShardChecker, ShardFacts, ShardTask, TokenCounter
from visplice.train.data.curation import Curation, load_curation
from visplice.train.data.near_pictures import MAX_DISTANCE, PictureHash, near_groups
from visplice.train.data.record import FAULTS
from visplice.train.data.shards import MANIFEST, read_manifest
from visplice.train.data.workers import Lock, run_tasks
from visplice.vision.image_facts import ODDITIES

PROBLEMS = {
    **FAULTS,
    "unfinished": "a data set whose manifest is not written yet",
    "bad-manifest": "a manifest that cannot be read, or contradicts itself",
    "missing-shard": "a shard of the manifest that is not there",
    "shard-size": "a shard of another size than the manifest says",
    "shard-hash": "a shard of other bytes than the manifest says",
    "shard-count": "a shard of more or fewer samples or pictures than the manifest says",
    "duplicate-sample": "the pictures and the text of a sample before",
    **LEAKS,
}
NOTES = {
    **ODDITIES,
    "duplicate-picture": "a picture of a sample before, byte for byte, with other text",
    "near-picture": "a picture that is nearly one before",
    LONGER: "a conversation of which training drops the last turns",
    "unlisted-shard": "a tar file that the manifest does not name",
    "partial-file": "a shard that was never finished, and can be deleted",
}
MAX_LISTED = 10_000  # findings of one name that a report lists; all are counted


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What training must not have seen: data folders or shards, and perhaps published VQA files."""

    paths: Sequence[Path] = ()
    questions: Path | None = None
    annotations: Path | None = None


def check(
    path: Path,
    *,
    counter: TokenCounter | None = None,
    max_distance: int | None = MAX_DISTANCE,
    against: HeldOut | None = None,
    strict: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Checks a folder of shards, with or without manifest, or one shard.

    Args:
        counter: measures lengths.
        max_distance: bits in which the hashes of near-same pictures differ; None leaves the search out.
        against: test data, to look for in this.
        strict: whether notes make the data set a bad one, too.
        progress: called with shards done and to do, those of test data included.
    Returns:
        A report as JSON can hold it. "clean" says whether nothing is wrong.
    Raises:
        ValueError: there is nothing to check, or imagehash is not installed. OSError: a file cannot be read.
        ChildProcessError: a worker died.
    """
    findings, tasks, curation = _open(path)
    tests = [(folder, *_open(folder)[1:]) for folder in (against.paths if against else ())]
    total = len(tasks) + sum(len(test_tasks) for _, test_tasks, _ in tests)
    done = 0

    def run(checker: ShardChecker, shards: Sequence[ShardTask]) -> list[ShardFacts]:
        nonlocal done
        facts = []
        for found in _results(checker, shards, workers):
            facts.append(found)
            done += 1
            progress(done, total)
        return sorted(facts, key=lambda shard: shard.name)

    hashes = max_distance is not None
    shards = run(ShardChecker(counter=counter, curation=curation, hashes=hashes), tasks)
    samples = [facts for shard in shards for facts in shard.samples]
    for shard in shards:
        findings += shard.findings
    findings += _double_keys(shards)
    findings += _duplicates(shards, samples, max_distance)
    report: dict[str, Any] = {"data": str(path), **_totals(shards, curation)}
    if against is not None:
        known = published_test(against.questions, against.annotations) if against.questions else []
        for folder, test_tasks, test_curation in tests:
            test_checker = ShardChecker(counter=None, curation=test_curation, hashes=hashes, test=True)
            for shard in run(test_checker, test_tasks):
                known += [facts._replace(shard=f"{folder}/{shard.name}") for facts in shard.samples]
        if not known:
            raise ValueError("the test data to compare with holds no usable sample")
        report["test"] = {"pictures": len({name for facts in known for name in facts.pictures or facts.names})}
        findings += _leaks(samples, known, max_distance)
    if counter is not None:
        report["tokens"] = _lengths(counter, shards)
    problems, notes = _listed(findings, PROBLEMS), _listed(findings, NOTES)
    return {**report, "clean": not problems and not (strict and notes), "problems": problems, "notes": notes}


def _open(path: Path) -> tuple[list[Finding], list[ShardTask], Curation]:
    """The shards to check, and what is wrong with the list of them."""
    if path.is_file():
        return [], [ShardTask(file=path)], Curation()
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a folder of shards")
    files = sorted(path.glob("*.tar"))
    findings = [Finding("partial-file", file.name, "", "") for file in sorted(path.glob("*.tar.partial"))]
    if not (path / MANIFEST).exists():
        if any(next(path.glob(pattern), None) for pattern in (".convert-*", "part-*-of-*.json")):
            message = "no manifest.json yet; run the same `visplice data convert` again, or `visplice data merge`"
            findings.append(Finding("unfinished", MANIFEST, "", message))
        elif not files:
            raise ValueError(f"{path}: neither {MANIFEST} nor a tar file; give a folder of shards")
        return findings, [ShardTask(file=file) for file in files], Curation()
    try:
        manifest = read_manifest(path)
        curation = load_curation(path, manifest)
    except ValueError as error:
        findings.append(Finding("bad-manifest", MANIFEST, "", str(error)))
        return findings, [ShardTask(file=file) for file in files], Curation()
    source = manifest["source"] if isinstance(manifest["source"], dict) else {}
    tasks = {}
    for entry in manifest["shards"]:
        name = entry["name"]
        if name in tasks or Path(name).name != name or name in ("", "..", "."):
            message = f"names the shard {name!r} twice" if name in tasks else f"names {name!r}, which is no file here"
            findings.append(Finding("bad-manifest", MANIFEST, "", message))
        else:
            tasks[name] = ShardTask(file=path / name, stated=entry, source=source)
    for total in ("samples", "images", "bytes"):
        stated, counted = manifest[total], sum(entry[total] for entry in manifest["shards"])
        if stated != counted:
            message = f"says {stated} {total} in all, and {counted} over its shards"
            findings.append(Finding("bad-manifest", MANIFEST, "", message))
    findings += [Finding("unlisted-shard", file.name, "", "") for file in files if file.name not in tasks]
    return findings, list(tasks.values()), curation


def _results(checker: ShardChecker, tasks: Sequence[ShardTask], workers: int) -> Iterator[ShardFacts]:
    """Facts of shards as they come."""
    with open(os.devnull, "rb") as nothing:  # nothing is written, so nothing has to be locked
        lock = Lock(nothing.fileno())
        workers = max(1, min(workers, len(tasks)))
        try:
            with closing(run_tasks(checker, tasks, num_workers=workers, lock=lock, preload=__name__)) as results:
                yield from results
        except ChildProcessError as error:
            raise ChildProcessError(str(error).rpartition(";")[0]) from None


def _double_keys(shards: Sequence[ShardFacts]) -> Iterator[Finding]:
    """Keys that came in a shard before; twice in the same shard is a fault of its own."""
    first: dict[str, str] = {}
    for shard in shards:
        for key in shard.keys:
            other = first.setdefault(key, shard.name)
            if other != shard.name:
                yield Finding("duplicate-key", shard.name, key, f"stood in {other} before")


def _duplicates(shards: Sequence[ShardFacts], samples: Sequence[Facts], max_distance: int | None) -> Iterator[Finding]:
    contents = [content for shard in shards for content in shard.contents]
    first_content: dict[bytes, int] = {}
    first_picture: dict[bytes, int] = {}
    hashes: dict[bytes, tuple[int, PictureHash]] = {}
    for index, facts in enumerate(samples):
        before = first_content.setdefault(contents[index], index)
        if before != index:
            yield Finding("duplicate-sample", *samples[index].place, f"as {samples[before].name}")
        for number, picture in enumerate(facts.pictures):
            holder = first_picture.setdefault(picture, index)
            if holder != index and before == index:
                yield Finding("duplicate-picture", *samples[index].place, f"as in {samples[holder].name}")
            if facts.hashes:
                hashes.setdefault(picture, (index, facts.hashes[number]))
    if max_distance is None:
        return
    owners = [index for index, _ in hashes.values()]
    for group in near_groups([item for _, item in hashes.values()], max_distance=max_distance):
        leader = samples[owners[group[0]]]
        for member in group[1:]:
            if owners[member] != owners[group[0]]:
                yield Finding("near-picture", *samples[owners[member]].place, f"as in {leader.name}")


def _leaks(samples: Sequence[Facts], test: Sequence[Facts], max_distance: int | None) -> Iterator[Finding]:
    distance = MAX_DISTANCE if max_distance is None else max_distance  # without hashes there is nothing to search
    for leak in find_leaks(samples, test, max_distance=distance):
        yield Finding(leak.name, *samples[leak.sample].place, leak.message)


def _totals(shards: Sequence[ShardFacts], curation: Curation) -> dict[str, Any]:
    return {
        "shards": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "samples": sum(shard.slots for shard in shards),
        "usable": sum(len(shard.samples) - shard.unfit for shard in shards),
        "pictures": sum(shard.images for shard in shards),
        "text_alone": sum(shard.text_alone for shard in shards),
        "curation": {"filters": curation.describe(), "dropped": sum(shard.dropped for shard in shards)},
    }


def _lengths(counter: TokenCounter, shards: Sequence[ShardFacts]) -> dict[str, Any]:
    """Lengths and how many have each, of captions in tokens and of conversations in spliced positions."""
    captions, conversations = Counter[int](), Counter[int]()
    for shard in shards:
        captions += shard.caption_tokens
        conversations += shard.conversation_positions
    return {
        "tokenizer": str(counter.tokenizer),
        "visual_tokens": counter.visual_tokens,
        "max_length": counter.max_length,
        "captions": {str(length): captions[length] for length in sorted(captions)},
        "conversations": {str(length): conversations[length] for length in sorted(conversations)},
    }


def _listed(findings: Sequence[Finding], names: dict[str, str]) -> dict[str, Any]:
    """Findings under their names, the most frequent first."""
    by_name = defaultdict[str, list[Finding]](list)
    for finding in findings:
        if finding.name in names:
            by_name[finding.name].append(finding)
    return {
        name: {
            "count": len(found),
            "meaning": names[name],
            "found": [{"shard": at.shard, "key": at.key, "message": at.message} for at in found[:MAX_LISTED]],
        }
        for name, found in sorted(by_name.items(), key=lambda item: (-len(item[1]), item[0]))
    }
