"""Who holds most, beside a look at all of them; and how few looks it takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.largest_holder import LargestHolder

NAMES = ("a", "b", "c", "d")


class Held(dict[str, int]):
    """Counts the looks. Who is hidden is no candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[str] = set()
        self.looks = 0
        self.largest = LargestHolder(lambda: self, self.of)

    def of(self, name: str) -> int | None:
        self.looks += 1
        return None if name in self.hidden else self.get(name)

    def put(self, name: str, amount: int) -> None:
        before = self.get(name, -1)
        self[name] = amount
        if amount > before:
            self.largest.grown(name)


_steps = st.lists(
    st.tuples(st.sampled_from(NAMES), st.one_of(st.integers(0, 9), st.sampled_from(["gone", "hide", "show", "find"])))
)


@given(_steps, st.sampled_from([None, *NAMES]))
def test_whoever_grows_shrinks_goes_or_is_no_candidate_the_largest_is_found(
    steps: list[tuple[str, int | str]], but: str | None
) -> None:
    held = Held()
    for name, step in [*steps, ("a", "find")]:
        if isinstance(step, int):
            held.put(name, step)
        elif step == "gone":
            held.pop(name, None)
        elif step == "hide":
            held.hidden.add(name)
        elif step == "show":
            held.hidden.discard(name)
            held.largest.grown(name)
        else:
            candidates = sorted(each for each in held if each not in held.hidden and each != but)
            assert held.largest.find(but=but) == max(candidates, key=lambda each: held[each], default=None)


def test_it_is_found_without_a_look_at_all_and_what_is_kept_does_not_grow() -> None:
    held = Held()
    for number in range(1000):
        held.put(f"n{number}", 1)
    assert held.looks == 0, "nothing is kept before anybody is looked for"
    assert held.largest.find() == "n0"
    looks = held.looks
    for number in range(20_000):
        name = f"n{number % 1000}"
        held.put(name, 2)
        assert held.largest.find() == name
        held.put(name, 1)
    assert held.looks - looks < 5 * 20_000, "a few looks each"
    assert held.largest._heap is not None
    assert len(held.largest._heap) < 5 * 1000
