"""From a run's parts to a checkpoint and back, and the choice of the one to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hpctrain.comm.agree import on_rank_zero, raise_together
from hpctrain.comm.base import Communicator
from hpctrain.errors import HpctrainError, UserError
from hpctrain.gradients.residuals import gather_residuals, restore_residuals
from hpctrain.metrics.layout import CHECKPOINTS, MANIFEST_FILE, list_checkpoints
from hpctrain.optim.state import load_optimizer_state, optimizer_state
from hpctrain.train.checkpoint import Checkpoint, TensorGroups, load_checkpoint
from hpctrain.train.parts import Parts
from hpctrain.train.state import Progress


def capture(parts: Parts, progress: Progress) -> Checkpoint:
    """All that decides how the run goes on; the tensors are the live ones, not copies. Collective.

    What differs from rank to rank is on rank 0, which writes.
    """
    tensors: TensorGroups = {
        "model": dict(parts.model.state_dict()),
        "optimizer": optimizer_state(parts.optimizer, parts.model),
    }
    if parts.ema is not None:
        tensors["ema"] = parts.ema.state_dict()
    if parts.exchange.residuals:
        tensors["residuals"] = gather_residuals(parts.comm, parts.exchange.residuals)
    numbers = {
        "progress": progress.to_numbers(),
        "loss_scale": parts.loss_scale.state_dict() if parts.loss_scale else None,
        "exchange": parts.exchange.state_dict(),
        "model": parts.config.model.model_dump(),
        "order": order_identity(parts),
        "world_size": parts.plan.world_size,
    }
    return Checkpoint(progress.step, tensors, numbers)


def restore(parts: Parts, checkpoint: Checkpoint) -> Progress:
    """Put a checkpoint's tensors into the run's parts and return its counters.

    Raises UserError when it belongs to another model, or when the samples not yet seen would not be the same.
    """
    check_order(checkpoint, order_identity(parts), parts.plan.world_size)
    check_model(checkpoint, dict(parts.model.state_dict()), parts.config.model.name)
    parts.model.load_state_dict(checkpoint.tensors["model"])
    load_optimizer_state(parts.optimizer, parts.model, checkpoint.tensors["optimizer"])
    if parts.ema is not None:
        if "ema" not in checkpoint.tensors:
            raise UserError(
                f"the checkpoint of step {checkpoint.step} holds no moving average; resume with train.ema_decay=none"
            )
        parts.ema.load_state_dict(checkpoint.tensors["ema"])
    if parts.loss_scale is not None and checkpoint.numbers["loss_scale"] is not None:
        parts.loss_scale.load_state_dict(checkpoint.numbers["loss_scale"])
    if parts.exchange.residuals and "residuals" in checkpoint.tensors:
        restore_residuals(parts.comm, parts.exchange.residuals, checkpoint.tensors["residuals"])
    parts.exchange.load_state_dict(checkpoint.numbers["exchange"])
    return Progress.from_numbers(checkpoint.numbers["progress"])


def order_identity(parts: Parts) -> dict[str, Any]:
    """What the order of samples and their grouping into steps are a function of."""
    config, plan = parts.config, parts.plan
    return {
        "seed": config.seed,
        "train_samples": plan.train_samples,
        "batch_global": plan.batch_global,
        "last_batch": config.train.last_batch,
        "shuffle_block": config.data.shuffle_block,
        "shuffle_window": config.data.shuffle_window,
    }


def check_order(checkpoint: Checkpoint, wanted: Mapping[str, Any], world_size: int) -> None:
    """Refuse to go on where samples would be repeated, skipped or grouped otherwise."""
    held = checkpoint.numbers["order"]
    changed = [key for key in wanted if held.get(key) != wanted[key]]
    if changed == ["batch_global"]:
        raise UserError(
            f"the checkpoint of step {checkpoint.step} was made with a global batch of {held['batch_global']} on "
            f"{checkpoint.numbers['world_size']} ranks, and {world_size} ranks would make it "
            f"{wanted['batch_global']}; set train.batch_per_worker and train.accumulation so that "
            f"{world_size} x batch_per_worker x accumulation = {held['batch_global']}"
        )
    if changed:
        differences = ", ".join(f"{key} {held.get(key)} -> {wanted[key]}" for key in changed)
        raise UserError(
            f"the checkpoint of step {checkpoint.step} has another order of samples ({differences}); "
            "restore these values or start a new run with --run-dir"
        )


def check_model(checkpoint: Checkpoint, wanted: Mapping[str, Tensor], name: str) -> None:
    """Refuse a checkpoint whose tensors are not those of the model."""
    held = checkpoint.tensors["model"]
    for key in sorted(held.keys() | wanted.keys()):
        left, right = (group[key].shape if key in group else None for group in (held, wanted))
        if left != right:
            raise UserError(
                f"the checkpoint of step {checkpoint.step} is of another model ({checkpoint.numbers['model']['name']} "
                f"there, {name} here; {key} is {_shape(left)} there and {_shape(right)} here); "
                "set the model it was made with or start a new run with --run-dir"
            )


def _shape(shape: Any) -> str:
    return "absent" if shape is None else str(list(shape))


def choose_checkpoint(
    comm: Communicator, checkpoints: Path, resume: str, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to go on from, read by every rank, or None to start afresh. Collective.

    ``resume`` is "auto" (the newest that all ranks can read; ``say`` tells which were passed over), "never"
    (the run directory must be new), or the path of a checkpoint or run directory (which must be this one, or this
    one new).
    """
    candidates = on_rank_zero(comm, lambda: _candidates(checkpoints, resume))
    if resume == "never" or not candidates:
        return None
    complaints = []
    if resume != "auto":
        return load_together(comm, Path(candidates[0]))
    for path in map(Path, candidates):
        try:
            return load_together(comm, path)
        except UserError as error:
            complaints.append(str(error))
            say(f"passed over: {error}")
    raise UserError(
        f"none of the {len(candidates)} checkpoints in {checkpoints} can be used ({complaints[0]}); "
        "remove them to start afresh, or give another --run-dir"
    )


def load_together(comm: Communicator, path: Path) -> Checkpoint:
    """The checkpoint at ``path`` on every rank, or on every rank the error of the first that cannot read it."""
    checkpoint, error = _try(path)
    raise_together(comm, error)
    assert checkpoint is not None
    return checkpoint


def _try(path: Path) -> tuple[Checkpoint | None, HpctrainError | None]:
    try:
        return load_checkpoint(path), None
    except HpctrainError as error:
        return None, error


def _candidates(checkpoints: Path, resume: str) -> list[str]:
    if resume == "auto":
        return [str(path) for path in list_checkpoints(checkpoints)]
    named = [] if resume == "never" else [find_checkpoint(Path(resume))]
    # Steps of two runs in one directory could not be told apart.
    if list_checkpoints(checkpoints) and checkpoints.resolve() not in [path.resolve().parent for path in named]:
        raise UserError(
            f"{checkpoints.parent} already holds a run; continue it with --resume auto or give another --run-dir"
        )
    return [str(path) for path in named]


def find_checkpoint(path: Path) -> Path:
    """``path`` itself when it is a checkpoint, or the newest one of the run directory that it is."""
    if (path / MANIFEST_FILE).exists():
        return path
    newest = list_checkpoints(path / CHECKPOINTS)
    if not newest:
        raise UserError(
            f"{path} is neither a checkpoint nor a run directory with one; name a checkpoints/step-… folder"
        )
    return newest[0]
