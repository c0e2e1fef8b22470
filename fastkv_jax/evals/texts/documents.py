"""Long documents of our own making, with a few facts hidden in them. The same seed gives the same text.

The facts are what examples, tests and benchmarks ask for.
"""

import random

FACTS = (
    "The spare lamp of the lighthouse is kept in the cellar of the old bakery.",
    "The secret number of the harbour safe is 4072915.",
    "The captain of the ferry Aurora is called Ingrid Solberg.",
)
WHO = (
    "the keeper",
    "the postmistress",
    "the ferry captain",
    "the baker's son",
    "a visiting painter",
    "the schoolteacher",
    "the harbour master",
    "an old sailor",
    "the doctor",
    "the net mender",
)
DID = ("repaired", "counted", "carried", "painted", "cleaned", "weighed", "borrowed", "sketched", "hid", "sold")
WHAT = (
    "the fishing nets",
    "a crate of oranges",
    "the copper lantern",
    "twelve wooden oars",
    "the parish records",
    "a barrel of tar",
    "the brass telescope",
    "three bundles of rope",
    "the tide tables",
    "a box of candles",
)
WHERE = (
    "beside the quay",
    "in the boat shed",
    "under the chapel roof",
    "near the stone bridge",
    "behind the bakery",
    "on the eastern cliff",
    "at the end of the pier",
    "in the schoolhouse",
    "along the shingle beach",
)
WHEN = (
    "before dawn",
    "while the fog lifted",
    "during the long storm",
    "after the evening bell",
    "at low tide",
    "on the first warm day",
    "as the gulls came back",
    "when the ferry was late",
)
WHY = (
    "because the winter had been hard",
    "although nobody had asked for it",
    "since the market opened early",
    "and told no one for a week",
    "so that the children could play",
    "as was the custom on the island",
    "which surprised the whole village",
    "and wrote a letter about it",
)
WEATHER = (
    "The wind turned north and the sea went grey.",
    "A pale sun stood over the island all day.",
    "Rain drummed on the slates until noon.",
    "The fog came in so thick that the bell was rung every hour.",
    "It was so still that voices carried across the bay.",
    "Snow lay on the boats, which is rare here.",
)


def document(words: int, seed: int = 0) -> str:
    """A village chronicle of about `words` words; each fact stands once, spread over the middle of the text."""
    rng = random.Random(seed)
    entries: list[str] = []
    count, day = 0, 1
    while count < words:
        entry = f"Day {day}. {rng.choice(WEATHER)} " + " ".join(_sentence(rng) for _ in range(rng.randint(3, 5)))
        entries.append(entry)
        count, day = count + len(entry.split()), day + rng.randint(1, 3)
    for i, fact in enumerate(FACTS):
        place = (i + 1) * len(entries) // (len(FACTS) + 1)
        entries[place] += " " + fact
    return "Chronicle of a small island\n\n" + "\n\n".join(entries) + "\n"


def _sentence(rng: random.Random) -> str:
    who, did, what, where, when, why = (rng.choice(part) for part in (WHO, DID, WHAT, WHERE, WHEN, WHY))
    text = rng.choice((f"{when}, {who} {did} {what} {where} {why}.", f"{who} {did} {what} {where} {when}, {why}."))
    return text[0].upper() + text[1:]
