"""Some steps of a training that began elsewhere, or goes on in another layout."""

from one_step import RandomSplit

from pipehc.checkpoint.store import Checkpoints
from pipehc.config.loading import load_config


def training_leg(path, folder, overrides, begin, end):
    """(trainer, results of steps begin + 1 to end), from the checkpoint of `begin` if that is not 0; saves that of `end`. Sequences
    are of 12 tokens."""
    from pipehc.data.batches import Sampler
    from pipehc.trainer import Trainer

    trainer, checkpoints = Trainer(load_config(path, overrides)), Checkpoints(folder, 4)
    if begin:
        restored = checkpoints.load(folder / f"step-{begin:08d}", trainer.state())
        trainer.after_load()
        trainer.check_replicas()
        trainer.samples_seen = restored.extra["samples"]
    split = RandomSplit(12)
    results = [trainer.step(step, split, Sampler(len(split), seed=3)) for step in range(begin + 1, end + 1)]
    trainer.check_replicas()
    checkpoints.save(end, trainer.state(), {"samples": trainer.samples_seen})
    return trainer, results
