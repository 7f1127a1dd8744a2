"""A request in, the answers to fixed questions about the picture out: what a reader must have understood."""

from sana_sprint.shapes.scenes import COLOURS, GROUNDS, KINDS, SIZES, Request, Thing

_AXES = {None: 0, "left of": 1, "right of": 1, "above": 2, "below": 2}
_OPTIONS_PER_THING = (len(KINDS) + 1, len(COLOURS) + 1, len(SIZES) + 1, 4)

# Number of possible answers to each question: along which axis two things lie, the ground, and of the thing on the left
# or at the top, then of the other: kind, colour, size and count. The first answer is always "not said".
NUM_ANSWERS: tuple[int, ...] = (3, len(GROUNDS) + 1, *_OPTIONS_PER_THING, *_OPTIONS_PER_THING)


def _index(value: str | None, options: tuple[str, ...]) -> int:
    return 0 if value is None else 1 + options.index(value)


def _thing_answers(thing: Thing | None) -> tuple[int, ...]:
    if thing is None:
        return (0, 0, 0, 0)
    return (
        _index(thing.kind, KINDS),
        _index(thing.colour, COLOURS),
        _index(thing.size, tuple(SIZES)),
        thing.count,
    )


def answers(request: Request) -> tuple[int, ...]:
    """One answer per question of `NUM_ANSWERS`; things without a relation come in the order of the request."""
    things: tuple[Thing | None, ...] = (*request.things, None)[:2]
    if request.relation in ("right of", "below"):
        things = things[::-1]
    first, second = things
    return (
        _AXES[request.relation],
        _index(request.ground, GROUNDS),
        *_thing_answers(first),
        *_thing_answers(second),
    )
