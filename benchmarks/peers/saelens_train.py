"""SAELens' own TopK trainer on stored activations, to be run by the python of an environment that holds SAELens.

usage: saelens_train.py ROWS.safetensors OUT.safetensors --d-sae M --k K --batch B --tokens N --lr LR --dead-after N

ROWS holds ``train`` [n, d] and ``held_out`` [k, d]. Its class and SAETrainer with their defaults, and from our own
settings: learning rate, warm-up (5 %), decay to zero (20 %), tokens, batch size, and after how many tokens without firing a
feature counts as dead. Activations are normalised by its own ``expected_average_only_in``. OUT gets ``x_hat`` [k, d] and
``l0`` of the held-out rows in raw units, computed by SAELens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file


def shuffled(rows: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for part in order[: len(rows) // batch * batch].split(batch):
            yield rows[part].float()


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("rows")
    p.add_argument("out")
    for name, kind in (("d-sae", int), ("k", int), ("batch", int), ("tokens", int), ("lr", float), ("dead-after", int)):
        p.add_argument(f"--{name}", type=kind, required=True)
    a = p.parse_args()
    torch.manual_seed(0)
    given = load_file(a.rows)
    steps = a.tokens // a.batch
    cfg = TopKTrainingSAEConfig(
        d_in=given["train"].shape[1], d_sae=a.d_sae, k=a.k, normalize_activations="expected_average_only_in"
    )
    sae = TopKTrainingSAE(cfg)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * a.batch,
            train_batch_size_samples=a.batch,
            lr=a.lr,
            lr_end=0.0,
            lr_warm_up_steps=round(0.05 * steps),
            lr_decay_steps=round(0.2 * steps),
            dead_feature_window=max(1, a.dead_after // a.batch),
            n_batches_for_norm_estimate=min(50, steps),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=shuffled(given["train"], a.batch),
    )
    trained = trainer.fit().eval()
    with torch.no_grad():
        parts = [(trained.encode(x), x) for x in given["held_out"].float().split(2048)]
        x_hat = torch.cat([trained.decode(f) for f, _ in parts])
        l0 = torch.cat([(f > 0).sum(dim=1).float() for f, _ in parts])
    save_file({"x_hat": x_hat.contiguous(), "l0": l0}, a.out)


if __name__ == "__main__":
    main()
