"""How the sequences of a run become packs, micro-batches and steps under its layout."""

from dataclasses import replace
from typing import TYPE_CHECKING

from launch.blueprint import Blueprint

if TYPE_CHECKING:
    from engine.data.batches import BatchPlan
    from engine.data.loader import Loader
    from engine.data.packing import Packs
    from engine.data.prepare import PreparedData
    from engine.data.store import TokenStore
    from engine.data.stream import StreamLoader


def training_loader(blueprint: Blueprint, data: "PreparedData", *, dp_rank: int) -> "Loader | StreamLoader":
    """The rows to train on, for one data-parallel rank."""
    from engine.data.batches import BatchPlan

    if data.train is None:
        return _stream(blueprint, dp_rank)
    packs = _pack(blueprint, data.train)
    batch = blueprint.config.batch
    plan = BatchPlan(
        num_rows=len(data.train if packs is None else packs),
        global_batch_size=blueprint.shape.global_batch_size,
        micro_batch_size=blueprint.shape.micro_batch_size,
        data_parallel_size=blueprint.layout.dp,
        accumulation=blueprint.shape.accumulation,
        num_train_epochs=batch.num_train_epochs,
        max_steps=batch.max_steps,
        seed=blueprint.config.run.seed,
        work=None if packs is None else packs.work(data.train.lengths),
        unit="rows" if packs is None else "packs",
    )
    return _loader(blueprint, data.train, packs, plan, dp_rank)


def evaluation_loader(blueprint: Blueprint, data: "PreparedData", *, dp_rank: int) -> "Loader | None":
    """The rows to evaluate on, for one data-parallel rank; None where there are none."""
    from engine.data.batches import evaluation_plan

    if data.evaluation is None:
        return None
    layout, packs = blueprint.layout, _pack(blueprint, data.evaluation)
    plan = evaluation_plan(
        len(data.evaluation if packs is None else packs),
        micro_batch_size=blueprint.config.batch.per_device_eval_batch_size,
        data_parallel_size=layout.dp,
        micro_batches_multiple_of=layout.pp if layout.vpp > 1 else 1,
    )
    return _loader(blueprint, data.evaluation, packs, plan, dp_rank)


def _stream(blueprint: Blueprint, dp_rank: int) -> "StreamLoader":
    from engine.data.prepare import PAD_ID, load_tokenizer, reading
    from engine.data.stream import Encoding, StreamLoader, StreamPlan
    from engine.data.template import ChatTemplate

    options, layout, shape = blueprint.config.data, blueprint.layout, blueprint.shape
    max_steps = blueprint.config.batch.max_steps
    assert max_steps is not None, "checked when the run was drawn"
    return StreamLoader(
        datasets=options.dataset,
        how=reading(options),
        encoding=Encoding(
            template=ChatTemplate(load_tokenizer(blueprint.model_dir)),
            system=options.system,
            max_length=options.max_length,
            truncation_strategy=options.truncation_strategy,
            capacity=options.max_length if options.packing else None,
            vocab_size=blueprint.spec.vocab_size,
        ),
        plan=StreamPlan(
            global_batch_size=shape.global_batch_size,
            data_parallel_size=layout.dp,
            accumulation=shape.accumulation,
            total_steps=max_steps,
            seed=blueprint.config.run.seed,
            unit="packs" if options.packing else "rows",
        ),
        buffer_rows=options.shuffle_buffer_size,
        dp_rank=dp_rank,
        pad_id=PAD_ID,
        pad_to_multiple_of=blueprint.micro_batch_multiple,
        pad_rows_to_multiple_of=layout.document_multiple,
        num_workers=options.dataloader_num_workers,
    )


def describe(loader: "Loader | StreamLoader") -> str:
    """How rows become steps, and before it, where they are packed, how well."""
    from engine.data.batches import imbalance
    from engine.data.stream import StreamLoader

    if isinstance(loader, StreamLoader):
        return loader.describe()
    plan, packs, lengths = loader.plan, loader.packs, loader.store.lengths
    if packs is None:
        return plan.describe()
    work = packs.work(lengths)
    balanced, plain = imbalance(plan, work), imbalance(replace(plan, work=None), work)
    return (
        f"packing: {len(lengths)} sequences -> {len(packs)} packs of {packs.capacity:,} tokens, "
        f"{100 * packs.efficiency(lengths):.2f} % full; attention work of the heaviest micro-batch "
        f"{balanced:.2f} x the mean ({plain:.2f} x without balancing)\n{plan.describe()}"
    )


def _pack(blueprint: Blueprint, store: "TokenStore") -> "Packs | None":
    if not blueprint.config.data.packing:
        return None
    from engine.data.packing import pack

    return pack(store.lengths, blueprint.config.data.max_length)


def _loader(
    blueprint: Blueprint, store: "TokenStore", packs: "Packs | None", plan: "BatchPlan", dp_rank: int
) -> "Loader":
    from engine.data.loader import Loader
    from engine.data.prepare import PAD_ID

    return Loader(
        store=store,
        plan=plan,
        dp_rank=dp_rank,
        pad_id=PAD_ID,
        pad_to_multiple_of=blueprint.micro_batch_multiple,
        num_workers=blueprint.config.data.dataloader_num_workers,
        packs=packs,
        pad_rows_to_multiple_of=blueprint.layout.document_multiple,
    )
