"""What is asked about a slip, as in DocVQA: the answer is printed on it and given as printed."""

import random
from dataclasses import dataclass

from visplice.train import slips
from visplice.train.slips import Slip

_WORDINGS: dict[str, tuple[str, ...]] = {
    "TOTAL": ("What is the total?", "How much is the total?"),
    "TAX": ("What is the tax?", "How much is the tax?"),
    "PAID": ("How much was paid?", "What amount was paid?"),
    "DATE": ("What is the date?", "Which date is printed?"),
    "TIME": ("What is the time?", "Which time is printed?"),
    "NO": ("What is the receipt number?", "Which receipt number is printed?"),
    "NAME": ("What is the product called?", "What is the name of the product?"),
    "BATCH": ("What is the batch number?", "Which batch number is printed?"),
    "LOT": ("What is the lot number?", "Which lot number is printed?"),
    "WEIGHT": ("What is the weight?", "How much does it weigh?"),
    "BEST": ("When is it best before?", "What is the best before date?"),
    "PRICE": ("What is the price?", "How much does it cost?"),
    "CODE": ("What is the code?", "Which code is printed?"),
    slips.SHOP: ("What is the shop called?", "What is the name of the shop?", "What is written at the top?"),
    slips.ITEM: ("How much is the {}?", "What does the {} cost?"),
}
# DocVQA's names of what has to be read: key and value, a row of a table, or a place on the page.
QUESTION_TYPES = {slips.SHOP: "layout", slips.ITEM: "table/list"} | dict.fromkeys(slips.KEYS, "form")


@dataclass(frozen=True)
class SlipQuestion:
    """A question with its only right answer, and which line holds it."""

    text: str
    answer: str
    question_type: str
    line: int


def ask(slip: Slip, rng: random.Random, count: int) -> list[SlipQuestion]:
    """At most `count` questions about a slip, in random order, one for a line."""
    chosen = rng.sample(range(len(slip.lines)), min(count, len(slip.lines)))
    return [
        SlipQuestion(rng.choice(_WORDINGS[line.role]).format(line.name), line.value, QUESTION_TYPES[line.role], number)
        for number in chosen
        for line in (slip.lines[number],)
    ]


def caption(slip: Slip) -> str:
    """One sentence on the slip as a whole."""
    name = next((line.value for line in slip.lines if line.role in (slips.SHOP, "NAME")), "")
    return f"a {slip.kind} of {name} with {len(slip.lines)} lines in {slip.size} print."
