"""Samples made by hand, and what a filter of curation makes of them."""

import pytest

from visplice.train.data.curate import make_filter
from visplice.train.data.filter_record import Located
from visplice.train.data.record import Sample, check_marks, check_record


@pytest.fixture
def sample():
    """Makes a sample of captions; turns are questions and answers, one after the other."""

    def make(key, *captions, turns=(), images=(b"",), **fields):
        record = dict(fields)
        if captions:
            record["captions"] = list(captions)
        if turns:
            record["conversations"] = [
                {"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)
            ]
        return Sample(key=key, images=tuple(("png", data) for data in images), record=record)

    return make


@pytest.fixture
def apply():
    """What a filter leaves of samples, by key, and its verdicts."""

    def run(name, samples, **options):
        rule = make_filter(name, options)
        measured = [Located("shard", item.key, rule.measure(item)) for item in samples]
        verdicts = {key: verdict for _, key, verdict in rule.verdicts(measured)}
        left = {}
        for item in samples:
            verdict = verdicts.get(item.key)
            if verdict is None or not verdict.drop:
                left[item.key] = {**item.record, **(verdict.edits if verdict else {})}
                check_record(left[item.key])  # what is left is a sample
                check_marks(left[item.key], len(item.images))
        return left, verdicts

    return run
