"""What the host waits for while it issues an overlapped pair, counted on the emulated device: to know how many tokens go where,
after it has given the compute queue the experts' backward; and for nothing else."""

import preloaded  # noqa: F401
from processes import free_port, run_ranks
from test_emulated_device import DUALPIPE, LEAST
from tiny_model import tiny_config

OVERRIDES = (*LEAST, *DUALPIPE, "parallel.ep=2", "model.blocks=4", "train.global_batch=8")


def run(rank, port, world_size):
    """What each pair issues, in order, with the host's waits."""
    from emulation.trainer import EmulatedTrainer, emulated, launches

    import pipehc.model.stage as stage
    from pipehc.recompute import Pass

    emulated(rank, world_size, port)
    trainer = EmulatedTrainer(tiny_config(*OVERRIDES))
    device, pairs, log, original = launches(0, ahead=0.0, launches=10**6), [], [], stage.overlap

    class Waits(list):
        def append(self, why):
            log.append(("wait", why))

    device.device.waits = Waits()

    def logged(kind, call):
        def issue(run, index):
            log.append((kind, run._chain.pieces[index].name))
            call(run, index)

        return issue

    def overlap(*halves):
        marks = original(*halves)
        while True:
            log.clear()
            mark = next(marks, None)
            pairs.append(log[:])
            if mark is None:
                return
            yield mark

    stage.overlap = overlap
    Pass.forward, Pass.backward = logged("F", Pass.forward), logged("B", Pass.backward)
    trainer.gradients(device)
    return pairs


def test_the_host_waits_for_counts_alone_and_gives_the_compute_queue_work_before():
    counts = 0
    for pairs in run_ranks(run, 4, free_port(), 4, init=False, timeout=200):
        assert len(pairs) > 2
        for log in pairs:
            for i, (kind, name) in enumerate(log):
                if kind != "wait":
                    continue
                counts += 1
                before = [entry for entry in log[:i] if entry[0] != "wait"]
                assert name == "tolist on communication" and before[-1][1].endswith(".mlp.dispatch"), (name, before[-4:])
                route = max(k for k, (what, piece) in enumerate(before) if what == "F" and piece.endswith(".mlp.route"))
                assert any(what == "B" for what, _ in before[route:]), before[route:]
    assert counts
