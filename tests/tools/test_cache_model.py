"""The model of caches on small cases that can be counted by hand; programs that are foretold against all that ran."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from cache_model import LINE, Caches, Device, Moved, Request  # noqa: E402


def device(lines, **more):
    return Device(l2_bytes=lines * LINE, l1_bytes=0, multiprocessors=1, **more)


def through(device, *launches):
    """Lines read from memory, written there, and both of L2, by launch and in the end; each launch is one program."""
    caches = Caches(device)
    for requests in launches:
        caches.launch(iter([[Request(*r) for r in requests]]), resident=1)
    return [[getattr(m, name) // LINE for name in Moved.__dataclass_fields__] for m in (*caches.moved, caches.end())]


READ, WRITE = (False, False), (True, False)


def test_what_is_read_again_soon_comes_from_the_cache():
    assert through(device(4), [(*READ, range(4)), (*READ, range(4))]) == [[4, 0, 8, 0], [0, 0, 0, 0]]
    assert through(device(4), [(*READ, range(5)), (*READ, range(5))])[0] == [10, 0, 10, 0]  # each leaves just before it is wanted
    assert through(device(4), [(*READ, range(5)), (*READ, [4, 3, 2, 1, 0])])[0] == [6, 0, 10, 0]  # the last first
    assert through(device(4), [(*READ, range(4))], [(*READ, [3])]) == [[4, 0, 4, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_what_is_written_is_written_once_when_it_leaves():
    assert through(device(4), [(*WRITE, range(3)), (*WRITE, range(3))]) == [[0, 0, 0, 6], [0, 3, 0, 0]]
    assert through(device(2), [(*WRITE, range(3)), (*READ, [2])]) == [[0, 1, 1, 3], [0, 2, 0, 0]]
    assert through(device(2), [(*WRITE, [0]), (*READ, [0, 1, 2])]) == [[2, 1, 3, 1], [0, 0, 0, 0]]


def test_what_has_the_hint_leaves_first():
    stream = [(False, False, [0, 1]), *((False, True, [k]) for k in range(10, 20)), (False, False, [0, 1])]
    assert through(device(3), stream)[0][0] == 2 + 10
    assert through(device(3), [(writes, False, lines) for writes, _, lines in stream])[0][0] == 2 + 10 + 2


def test_by_chance_some_of_it_is_still_there():
    found = through(device(100, at_random=True), [(*READ, range(200)), (*READ, range(200))])[0][0]
    assert 250 < found < 390  # of 400; by least use: none


def test_reads_of_a_multiprocessor_go_through_a_cache_of_its_own():
    one = Device(l1_bytes=8 * LINE, multiprocessors=1)
    assert through(one, [(*READ, range(4)), (*READ, range(4))])[0] == [4, 0, 4, 0]
    assert through(one, [(*WRITE, range(4)), (*READ, range(4))])[0] == [0, 0, 4, 4]
    two = Caches(Device(l1_bytes=8 * LINE, multiprocessors=2))
    two.launch(iter([[Request(*READ, range(4))] for _ in range(2)]), resident=1)
    assert two.moved[0].l2_read == 8 * LINE and two.moved[0].memory_read == 4 * LINE


def test_no_more_programs_run_at_a_time_than_there_is_room_for():
    """Each reads 10 lines of its own twice, which two programs at a time leave in L2, and more do not."""
    programs = [[Request(*READ, [10 * k + i]) for _ in range(2) for i in range(10)] for k in range(40)]
    few, many = (Caches(device(40)) for _ in range(2))
    few.launch(iter(programs), resident=2)
    many.launch(iter(programs), resident=8)
    assert few.moved[0].memory_read == 400 * LINE < many.moved[0].memory_read
    assert [Device().resident(128, 16384, 4), Device().resident(128, 0, 8), Device().resident(97, 100 * 1024, 4)] == [4, 2, 2]


FORETOLD = """
import json
import programs, torch
from cache_model import LINE, Caches, Device
from pipehc.kernels import forward, post_res_pre
from pipehc.kernels.manifolds import Birkhoff
from traffic import Traffic

T, n, C = 128, 4, 128
forward.PROGRAMS = 8  # two parts of the channels

def launches(meter):
    x, f, y = (torch.ones(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((T, n, C), (T, C), (C,)))
    maps = torch.ones(T, n), torch.ones(T, n, n)
    parameters = torch.ones(n * C, n * n + 2 * n), torch.ones(3), torch.ones(n * n + 2 * n)
    with meter() as met:
        x_next, y, *_ = post_res_pre(x, f, *maps, *parameters, manifold=Birkhoff(1), norm=y, eps=1e-6)
        torch.autograd.backward([x_next, y], [torch.ones_like(x_next), torch.ones_like(y)])
    return met.launches

class Every:
    def __contains__(self, name):
        return True

some = launches(programs.Recorder)
programs.DIFFERENT = Every()
every, counted = launches(programs.Recorder), launches(Traffic)
for a, b, c in zip(some, every, counted, strict=True):
    assert a.name == b.name == c.name and len(b.asked) == a.grid[0] * a.grid[1] * a.grid[2]
    assert list(a.programs()) == list(b.programs()), a.name
    caches = Caches(Device(l2_bytes=10**9))
    caches.launch(a.programs(), 2)
    written, exact = (caches.moved[0] + caches.end()).memory_written, sum(c.written.values())
    assert exact <= written <= 1.02 * exact + len(c.shapes) * LINE, (a.name, written, exact)
    own = sum(c.read[name] for name in c.written if name in c.read)  # what is written before it is read is not fetched
    read, exact = caches.moved[0].memory_read, sum(c.read.values())
    assert exact - own <= read <= 1.02 * exact + len(c.shapes) * LINE, (a.name, read, exact)
print(json.dumps([(a.name, len(a.asked), len(b.asked)) for a, b in zip(some, every)]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_programs_that_did_not_run_are_foretold():
    """Every program of every launch of a boundary; and all of them together ask for what Traffic counts, in whole lines."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PIPEHC_KERNELS": "triton", "PYTHONPATH": str(TOOLS)}
    done = subprocess.run([sys.executable, "-c", FORETOLD], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    ran = {name: counts for name, *counts in json.loads(done.stdout)}
    assert ran["map_kernel"] == [3, 64] and ran["stream_gradient_kernel"] == [5, 8] and ran["project_kernel"] == [6, 8]


def test_a_model_of_the_same_seed_gives_the_same():
    chance = random.Random(3)
    programs = [[Request(*READ, [chance.randrange(500) for _ in range(5)]) for _ in range(20)] for _ in range(30)]
    figures = []
    for _ in range(2):
        caches = Caches(Device(l2_bytes=200 * LINE, at_random=True, multiprocessors=4), seed=5)
        caches.launch(iter(programs), resident=2)
        figures.append(caches.moved[0])
    assert figures[0] == figures[1] and figures[0].memory_read < figures[0].l2_read
