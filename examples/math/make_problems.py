"""Writes problems.jsonl: word problems of one or two steps, with whole numbers for answers.

    python examples/math/make_problems.py

The same seed gives the same file. Twelve kinds in turn, six of each, and none of the problems
twice; templates and numbers are this file's own.
"""

import json
import random
from pathlib import Path

PROBLEMS, SEED = 900, 7
NAMES = (
    "Ada",
    "Ben",
    "Cora",
    "Dev",
    "Elif",
    "Finn",
    "Gita",
    "Hugo",
    "Iris",
    "Jonas",
    "Kai",
    "Lena",
)
THINGS = ("apples", "stamps", "marbles", "pencils", "shells", "stickers", "buttons", "walnuts")
GOODS = ("lamp", "coat", "kettle", "bicycle", "tent", "chair", "clock", "suitcase")
Problem = tuple[str, int]  # what is asked, and what is right


def price(r: random.Random) -> Problem:
    count, each = r.randint(2, 9), r.randint(2, 25)
    return (
        f"{r.choice(NAMES)} buys {count} tickets at {each} euros each. How many euros is that in "
        f"all?",
        count * each,
    )


def distance(r: random.Random) -> Problem:
    speed, hours = 5 * r.randint(6, 24), r.randint(2, 7)
    return (
        f"A bus drives {speed} km an hour for {hours} hours. How many km does it drive?",
        speed * hours,
    )


def shares(r: random.Random) -> Problem:
    friends, each, thing = r.randint(2, 9), r.randint(2, 12), r.choice(THINGS)
    return (
        f"{r.choice(NAMES)} shares {friends * each} {thing} equally among {friends} friends. How "
        f"many {thing} does each friend get?",
        each,
    )


def rows(r: random.Random) -> Problem:
    count, long = r.randint(3, 15), r.randint(4, 18)
    return (
        f"In a hall stand {count} rows of {long} chairs. How many chairs are there in the hall?",
        count * long,
    )


def ages(r: random.Random) -> Problem:
    one, other = r.sample(NAMES, 2)
    age, older = r.randint(5, 60), r.randint(3, 30)
    return (
        f"{one} is {age} years old, and {other} is {older} years older. How old is {other}?",
        age + older,
    )


def left(r: random.Random) -> Problem:
    gone, rest, thing = r.randint(6, 70), r.randint(6, 90), r.choice(THINGS)
    return (
        f"{r.choice(NAMES)} has {gone + rest} {thing} and loses {gone} of them. How many {thing} "
        f"are left?",
        rest,
    )


def change(r: random.Random) -> Problem:
    count, each = r.randint(2, 6), r.randint(2, 9)
    paid = (count * each // 20 + 1) * 20
    return (
        f"{r.choice(NAMES)} buys {count} books at {each} euros each and pays with {paid} euros. "
        f"How many euros come back?",
        paid - count * each,
    )


def detour(r: random.Random) -> Problem:
    speed, hours, more = 10 * r.randint(3, 10), r.randint(2, 5), r.randint(3, 30)
    return (
        f"A train travels {speed} km an hour for {hours} hours, and then {more} km more. How many "
        f"km does it travel in all?",
        speed * hours + more,
    )


def sale(r: random.Random) -> Problem:
    cost, percent = 20 * r.randint(2, 15), r.choice((10, 20, 25, 50))
    return (
        f"A {r.choice(GOODS)} costs {cost} euros. In the sale it is {percent} % cheaper. How many "
        f"euros does it cost in the sale?",
        cost - cost * percent // 100,
    )


def together(r: random.Random) -> Problem:
    one, other = r.sample(NAMES, 2)
    count, times, thing = r.randint(3, 15), r.randint(2, 5), r.choice(THINGS)
    return (
        f"{one} finds {count} {thing}, and {other} finds {times} times as many. How many {thing} "
        f"do both have together?",
        count + count * times,
    )


def pages(r: random.Random) -> Problem:
    a_day, days, rest = r.randint(8, 30), r.randint(3, 9), r.randint(10, 90)
    return (
        f"A book has {a_day * days + rest} pages. {r.choice(NAMES)} reads {a_day} pages a day. How "
        f"many pages are left after {days} days?",
        rest,
    )


def fence(r: random.Random) -> Problem:
    long, wide = r.randint(8, 40), r.randint(4, 25)
    return (
        f"A garden is {long} m long and {wide} m wide. How many metres long is the fence all "
        f"around it?",
        2 * (long + wide),
    )


KINDS = (
    *(price, change, distance, detour, shares, sale),
    *(rows, together, ages, pages, left, fence),
)


def problems(count: int = PROBLEMS, seed: int = SEED) -> list[Problem]:
    """The kinds in turn; what was there before is drawn again."""
    r = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < count:
        text, answer = KINDS[len(found) % len(KINDS)](r)
        found.setdefault(text, answer)
    return list(found.items())


def main() -> None:
    lines = [json.dumps({"prompt": text, "answer": str(answer)}) for text, answer in problems()]
    file = Path(__file__).with_name("problems.jsonl")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
