"""Checkpoints that are whole or not there, that verify themselves, and that load into any layout of ranks.

A training uses it like this; the calls are collective, and what fails on one rank raises CheckpointError on all::

    manager = CheckpointManager(run_dir / "checkpoints", world, mesh.layout, config.checkpoint.keep)
    checkpoint = manager.resume(config.checkpoint.resume)
    if checkpoint is not None:
        check_compatible(checkpoint.trainer["identity"], identity, allow=())
        checkpoint.fill(engine.parts())
        engine.adopt()
    ...
    manager.save(step, state)

Evaluation and export read with ``open_at(run_dir, world)``, which changes nothing in the folder.

A checkpoint is a folder ``step_00000050``: ``__<rank>_<n>.distcp`` and ``.metadata`` (tensors, in the format of
torch.distributed.checkpoint), ``trainer.json``, ``random_<rank>.bin``, and ``manifest.json`` with all their hashes.
"""
