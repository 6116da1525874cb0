"""Random valid schedules: any placement, any order of work that some order of all ranks together allows; and what `auto` finds."""

from pipehc.schedules import Costs, Schedule, auto, build
from pipehc.schedules.actions import Action, Pair
from pipehc.schedules.families import FAMILIES
from pipehc.schedules.placement import Placement, bidirectional, linear, looped, vee
from pipehc.schedules.schedule import lane_microbatches


def random_placement(rng, ranks):
    """Named ones, or stages dealt out to the ranks as it comes, on one lane or two."""
    choice = rng.randrange(6)
    if choice < 4:
        return [linear(ranks), vee(ranks), bidirectional(ranks), looped(ranks, rng.randint(2, 3))][choice]
    stages = rng.randint(ranks, 2 * ranks + 1)
    lanes = []
    for _ in range(choice - 3):
        lane = [*range(ranks), *(rng.randrange(ranks) for _ in range(stages - ranks))]
        rng.shuffle(lane)
        lanes.append(tuple(lane))
    return Placement(tuple(lanes))


def random_schedule(rng, ranks):
    """One action after the other, of those that can run: W split off or not, recomputed or not, in pairs or not."""
    placement = random_placement(rng, ranks)
    microbatches = placement.lanes * rng.randint(1, 6 // placement.lanes + 1)
    last = placement.stages - 1
    lanes = placement.lanes
    ready = [Action("F", 0, m, lane) for lane in range(lanes) for m in lane_microbatches(microbatches, lanes, lane)]
    rows = [[] for _ in range(ranks)]
    split, pairs, again = rng.random(), rng.random(), rng.random() * rng.randrange(2)
    eager = rng.random()  # how much backwards come before forwards

    def done(action):
        kind, stage, m, lane = action
        if kind == "F":
            ready.append(Action("F", stage + 1, m, lane) if stage < last else Action("B", stage, m, lane))
        if kind in "BI" and stage:
            ready.append(Action("B", stage - 1, m, lane))
        if kind == "I":
            ready.append(Action("W", stage, m, lane))

    while ready:
        backward = [a for a in ready if a.kind in "BW"]
        action = rng.choice(backward if backward and rng.random() < eager else ready)
        ready.remove(action)
        row = rows[placement.rank(action.lane, action.stage)]
        if action.kind == "B" and rng.random() < again:
            row.append(action._replace(kind="R"))
        here = [a for a in ready if a.kind == "F" and placement.rank(a.lane, a.stage) == placement.rank(action.lane, action.stage)]
        if action.kind == "B" and here and rng.random() < pairs:
            forward = rng.choice(here)
            ready.remove(forward)
            row.append(Pair(forward, action))
            done(forward)
        else:
            if action.kind == "B" and rng.random() < split:
                action = action._replace(kind="I")
            row.append(action)
        done(action)
    return Schedule("random", placement, microbatches, tuple(map(tuple, rows)))


def random_family(rng, ranks):
    name = rng.choice(list(FAMILIES))
    microbatches = rng.randint(1, 8)
    if name == "dualpipe":
        microbatches = 2 * rng.randint(ranks, ranks + 2)
    if name == "dualpipev":
        microbatches = rng.randint(2 * ranks, 2 * ranks + 3)
    if name == "interleaved":
        return build(name, ranks, ranks * rng.randint(1, 2), chunks=rng.randint(1, 3))
    return build(name, ranks, microbatches)


def random_auto(rng, ranks):
    """What the search finds for random costs, links and memory, in a moment."""
    costs = Costs(
        f=rng.uniform(0.2, 3), b=rng.uniform(0.2, 3), w=rng.uniform(0.2, 3), link=rng.choice([0, rng.uniform(0, 3)]),
        latency=rng.choice([0, rng.uniform(0, 2)]), weights=tuple(rng.uniform(0.5, 2) for _ in range(rng.randint(1, 5))),
    )  # fmt: skip
    while True:
        placements = rng.sample(["linear", "v", "bidirectional", "looped"], rng.randint(1, 3))
        max_live = rng.choice([None, rng.uniform(1, 6)])
        try:
            return auto(ranks, rng.randint(2, 5) * 2, costs, max_live, placements, time_limit=0.06, seed=rng.randrange(1000))
        except ValueError:
            continue  # nothing respects that cap
