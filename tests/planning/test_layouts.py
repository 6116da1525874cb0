"""Which layouts a search looks at, and how stages are added up from small models."""

from copy import deepcopy
from itertools import product

import pytest
from tiny_model import tiny_config

from pipehc.config.loading import check_world_size, load_config, to_yaml
from pipehc.config.schema import Config
from pipehc.planning.search.footprint import Footprint, footprints
from pipehc.planning.search.layouts import layouts, recomputations
from pipehc.planning.search.units import places, unit_config, unit_of
from pipehc.planning.search.walk import activations_peak, outlines
from pipehc.schedules import build, compile

MORE = ("train.global_batch=32", "evaluation.interval=0")
BASE = tiny_config(*MORE).model_dump()


def layout(config):
    p = config.parallel
    return (
        config.schedule.name, config.schedule.chunks, p.pp, p.ep, p.dp, config.train.micro_batch, config.recompute.enabled,
        config.recompute.block,
    )  # fmt: skip


def accepted(name, chunks, pp, ep, dp, size, recompute):
    """Whether the checks of any configuration take this layout."""
    data = deepcopy(BASE) | {"schedule": {"name": name, "chunks": chunks}, "recompute": {"enabled": recompute}}
    data["parallel"] = {"pp": pp, "ep": ep, "dp": dp}
    data["train"]["micro_batch"] = size
    try:
        check_world_size(Config.model_validate(data), pp * dp)
    except ValueError:
        return False
    return True


NAMES = [(name, None) for name in ("gpipe", "1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev")]
NAMES += [("interleaved", chunks) for chunks in (2, 3, 4)]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_layout_that_passes_the_checks_is_there_once(gpus):
    found = [layout(config) for config in layouts(tiny_config(*MORE), gpus)]
    assert len(found) == len(set(found))
    wanted = set()
    for (name, chunks), pp, ep, size, recompute in product(NAMES, (1, 2, 4), (1, 2, 3, 4), (1, 2, 4), (False, True)):
        if gpus % pp == 0 and (pp > 1 or name == "1f1b") and accepted(name, chunks, pp, ep, gpus // pp, size, recompute):
            wanted.add((name, chunks, pp, ep, gpus // pp, size, recompute, None))
    assert set(found) == wanted and wanted


def test_tensor_parallelism_stays_that_of_the_configuration():
    config = tiny_config(*MORE, "parallel.tp=2", "train.sequence_length=12")
    found = list(layouts(config, 4))
    assert {(c.parallel.pp, c.parallel.tp, c.parallel.dp) for c in found} == {(1, 2, 2), (2, 2, 1)}
    assert {c.parallel.ep for c in found if c.parallel.dp == 1} == {1, 2}  # experts over the ranks that share layers
    assert not list(layouts(config, 3))


def test_every_layout_survives_being_written(tmp_path):
    file = tmp_path / "layout.yaml"
    for config in list(layouts(tiny_config(*MORE), 4))[::20]:
        file.write_text(to_yaml(config))
        assert load_config(file) == config


def test_no_layout_for_a_number_that_divides_nothing():
    assert not list(layouts(tiny_config(*MORE), 7))


def test_recomputation_has_the_files_own_block_and_none_of_the_plain_residual():
    assert [r["block"] for r in recomputations(tiny_config("recompute.block=3"))] == [None, None, 3]
    assert recomputations(tiny_config("residual.kind=none")) == [{"enabled": False, "block": None}]


@pytest.mark.parametrize("dense", [0, 1, 4])
def test_small_models_have_a_stage_of_each_kind(dense):
    config = tiny_config(f"model.dense_blocks={dense}")
    small = unit_config(config, unit_of(config))
    at = places(small)
    assert at == places(config) and small.stages == at.last + 1
    assert [len(b) for b in small.stage_blocks()] == [2 if s == at.two else 1 for s in range(small.stages)]
    kinds = {block < small.model.dense_blocks for stage in (at.one, at.two, at.last) for block in small.stage_blocks()[stage]}
    assert kinds == {dense == 4}


def test_the_walk_holds_what_a_schedule_keeps():
    program = compile(build("1f1b", 4, 8))
    memory = {(s, k): Footprint(n, o) for s in range(4) for k, n, o in (("F", 10, 1), ("B", -4, 2), ("W", -6, 0))}
    # as many micro-batches as ranks from here on, and what a backward needs in passing
    found = outlines(program, overlap=True)
    assert [activations_peak(outline, memory) for outline in found] == [42, 32, 22, 12]
    assert [outline.neighbours for outline in found] == [1, 2, 2, 1]
    assert found[0].buffers < found[1].buffers


def test_the_halves_of_a_pair_are_there_together():
    program = compile(build("dualpipe", 4, 16))
    memory = {(s, k): Footprint(n, o) for s in range(4) for k, n, o in (("F", 10, 20), ("B", -4, 20), ("W", -6, 1))}
    apart, together = (activations_peak(outlines(program, overlap)[1], memory) for overlap in (False, True))
    assert together > apart


def test_footprints_give_what_is_handed_on_to_the_receiver():
    from pipehc.planning.dry_run.tracker import Block, Where

    def block(nbytes, born, where, died, died_in):
        made = Block(nbytes, born, where, "x")
        made.died, made.died_in = died, died_in
        return made

    f0, f1, b0, b1 = (Where(kind, stage, 1) for kind in "FB" for stage in (0, 1))
    history = [
        block(100, 1, f0, 9, b0),  # kept for its backward
        block(7, 2, f0, 3, f0),  # transient
        block(20, 4, f0, 7, b1),  # the output, the next stage's input
        block(5, 6, b1, 9, b0),  # the gradient
        block(50, 5, f1, 8, Where("step")),  # dropped between actions
        block(1000, 5, Where("F", 0, 0), 8, b0),  # another micro-batch
    ]
    found = footprints(history, 1)
    assert found[0, "F"] == Footprint(100, 7)
    assert found[1, "F"] == Footprint(20, 50)
    assert found[1, "B"] == Footprint(-20, 0)
    assert found[0, "B"].net == -100
