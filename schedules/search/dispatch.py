"""The list scheduler: whenever a rank is free it takes the action with the least key, or waits for one with a lesser key.

This is the inner loop of the search: plain lists, no objects, and a run is given up as soon as some rank, or the chain of some
micro-batch, cannot end in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from pipehc.schedules.search.problem import FORWARD, INPUT, PAIR, WEIGHT, Op, Problem

NEVER = float("inf")


@dataclass(frozen=True)
class Rules:
    """What the list scheduler goes by. A key is like the time at which an action should start: the least comes first.

    keys[kind][chunk][micro-batch]. patience[kind][chunk]: an action is put off for another one with a lesser key, whose input is
    still on its way, if it would delay that one by more than this; 0: never cause a delay, inf: never idle, -inf: keep the order of
    the keys. limit[chunk]: forwards stop at so many live micro-batches; then weight gradients gain `pressure` on their keys. pairs:
    join a forward and a backward that are both ready.
    """

    keys: tuple[list[list[float]], ...]
    patience: tuple[list[float], ...]
    limit: list[int]
    pressure: float
    pairs: bool = False


def dispatch(problem: Problem, rules: Rules, cutoff: float = NEVER) -> tuple[float, list[list[Op]], int]:
    """Returns makespan, rows and the number of actions placed; the makespan is inf if it would exceed `cutoff`.

    It is also inf if keeping the order of the keys leads into a deadlock.
    """
    count, rank_of, chunks, slots = problem.count, problem.rank, problem.chunks, problem.slots
    time_f, time_i, time_w = problem.time
    tail_f, tail_i = problem.tail
    key_f, key_i, key_w = rules.keys
    patience_f, patience_i, patience_w = rules.patience
    limit, pressure, pairs = rules.limit, rules.pressure, rules.pairs
    forward_to, forward_link = problem.forward_to, problem.forward_link
    backward_to, backward_link = problem.backward_to, problem.backward_link
    forward_delay, backward_delay = problem.forward_delay, problem.backward_delay
    hold, latency = problem.costs.link, problem.costs.latency
    scale = problem.pair_scale
    least = min(1.0, scale)

    total = range(len(rank_of))
    entry = [0.0] * count
    inputs = [entry if backward_to[c] < 0 else [] for c in total]  # arrival times, in order
    gradients: list[list[float]] = [[] for _ in total]
    weights: list[list[int]] = [[] for _ in total]  # micro-batches whose W is due
    done_f, done_i, done_w = [0] * len(rank_of), [0] * len(rank_of), [0] * len(rank_of)
    live = [0] * problem.ranks
    left = list(problem.work)
    idle = [False] * problem.ranks
    wake = [0.0] * problem.ranks  # when the rank decides next
    link_free = [0.0] * problem.links
    rows: list[list[Op]] = [[] for _ in range(problem.ranks)]
    heap = [(0.0, r) for r in range(problem.ranks)]
    placed, makespan = 0, 0.0

    def deliver(arrivals: list[float], link: int, target: int, end: float) -> None:
        if link < 0:
            arrivals.append(end)
            return
        at = link_free[link]
        at = (end if end > at else at) + hold
        link_free[link] = at
        at += latency
        arrivals.append(at)
        rank = rank_of[target]
        if idle[rank] and at < wake[rank]:
            wake[rank] = at
            heappush(heap, (at, rank))

    while heap:
        now, r = heappop(heap)
        if now != wake[r]:
            continue  # woken earlier in the meantime
        soonest = NEVER
        full = live[r] >= slots
        ready, awaited = [], []
        for c in chunks[r]:
            k = done_i[c]
            if k < count:
                arrivals = gradients[c]
                if k < len(arrivals):
                    at = arrivals[k]
                    if at <= now:
                        ready.append((key_i[c][k], INPUT, c, time_i[c][k] - patience_i[c]))
                    else:
                        awaited.append((key_i[c][k], at - now))
                        if at < soonest:
                            soonest = at
                elif backward_delay[c] >= 0:
                    awaited.append((key_i[c][k], backward_delay[c]))
            k = done_f[c]
            blocked = full or k - done_w[c] >= limit[c]
            if k < count and not blocked:
                arrivals = inputs[c]
                if k < len(arrivals):
                    at = arrivals[k]
                    if at <= now:
                        ready.append((key_f[c][k], FORWARD, c, time_f[c][k] - patience_f[c]))
                    else:
                        awaited.append((key_f[c][k], at - now))
                        if at < soonest:
                            soonest = at
                elif forward_delay[c] >= 0:
                    awaited.append((key_f[c][k], forward_delay[c]))
            if weights[c]:
                k = weights[c][0]
                key = key_w[c][k] - pressure if blocked else key_w[c][k]
                ready.append((key, WEIGHT, c, time_w[c][k] - patience_w[c]))
        kind = chosen = -1
        if len(ready) > 1:
            ready.sort()
        for key, what, c, needs in ready:
            for other, gap in awaited:
                if other < key and needs > gap:
                    break
            else:
                kind, chosen = what, c
                break
        if chosen < 0:
            wake[r] = soonest
            idle[r] = True
            if soonest < NEVER:
                heappush(heap, (soonest, r))
            continue

        idle[r] = False
        placed += 1
        if pairs and kind != WEIGHT:
            partner = next((x for x in ready if x[1] == INPUT - kind), None)  # the other of FORWARD and INPUT
            if partner is not None:
                f, b = (chosen, partner[2]) if kind == FORWARD else (partner[2], chosen)
                kf, kb = done_f[f], done_i[b]
                rows[r].append(Op(PAIR, f, kf, now, (b, kb)))
                middle = now + time_f[f][kf] * scale
                released = middle + time_i[b][kb] * scale
                end = released + time_w[b][kb] * scale
                done_f[f] += 1
                done_i[b] += 1
                done_w[b] += 1
                if (target := forward_to[f]) < 0:
                    gradients[f].append(middle)
                else:
                    deliver(inputs[target], forward_link[f], target, middle)
                if (target := backward_to[b]) >= 0:
                    deliver(gradients[target], backward_link[b], target, released)
                left[r] -= least * (time_f[f][kf] + time_i[b][kb] + time_w[b][kb])
                placed += 2
                if end + left[r] > cutoff:
                    return NEVER, rows, placed
                wake[r] = end
                if end > makespan:
                    makespan = end
                heappush(heap, (end, r))
                continue
        if kind == FORWARD:
            k = done_f[chosen]
            length = time_f[chosen][k]
            end = now + length
            if end + tail_f[chosen][k] > cutoff:
                return NEVER, rows, placed
            done_f[chosen] = k + 1
            live[r] += 1
            target = forward_to[chosen]
            if target < 0:
                gradients[chosen].append(end)
            else:
                deliver(inputs[target], forward_link[chosen], target, end)
        elif kind == INPUT:
            k = done_i[chosen]
            length = time_i[chosen][k]
            end = now + length
            if end + tail_i[chosen][k] > cutoff:
                return NEVER, rows, placed
            done_i[chosen] = k + 1
            weights[chosen].append(k)
            target = backward_to[chosen]
            if target >= 0:
                deliver(gradients[target], backward_link[chosen], target, end)
        else:
            k = weights[chosen].pop(0)
            length = time_w[chosen][k]
            end = now + length
            done_w[chosen] += 1
            live[r] -= 1
        rows[r].append(Op(kind, chosen, k, now))
        remaining = left[r] - length * least
        left[r] = remaining
        if end + remaining > cutoff:
            return NEVER, rows, placed
        wake[r] = end
        if end > makespan:
            makespan = end
        heappush(heap, (end, r))
    return (makespan if sum(done_w) == count * len(rank_of) else NEVER), rows, placed
