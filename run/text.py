"""What text a run reads: that of its stages, the held-out text, and the text that layers are chosen on."""

import argparse
import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoints.origins import Origins
from data import SourceSpec, TextLoader, build_loader, estimate_steps_per_epoch
from hardware.parallel import Ranks
from run.plan import planned_steps, sequence_length, sequences_a_step
from text.text_sources import TEXT_VERSION

log = logging.getLogger(__name__)


CALIBRATION_SEQUENCES = 4


@dataclass
class RunText:
    """The text of one run, as its flags say, in the tokens of the teacher's tokenizer."""

    args: argparse.Namespace
    tokenizer: Any
    ranks: Ranks = field(default_factory=Ranks)
    origins: Origins = field(default_factory=Origins)

    def loader(self, name: str) -> TextLoader:
        """This rank's loader of a stage; raises `UserError` if the source or its columns are not there or empty."""
        loader = self._loader(name, self.ranks)
        source = loader.dataset.source
        log.info("%s reads %s: %s files of %s bytes", name, source.name, f"{len(source.files):,}", f"{source.size:,}")
        return loader

    def _loader(self, name: str, ranks: Ranks) -> TextLoader:
        args = self.args
        return build_loader(
            self.source(name),
            self.tokenizer,
            seq_length=sequence_length(args, name),
            batch_size=args.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=args.seed + (1 if name == "stage2" else 0),
            epochs=args.epochs if name == "stage1" and args.epochs > 0 else None,
            document_reset=args.document_reset,
            pin_memory=args.device.startswith("cuda"),
        )

    def source(self, name: str) -> SourceSpec:
        """The text source of a stage: OpenHermes-like for stage 2, FineWeb-Edu-like for every other."""
        args = self.args
        shared = dict(
            local_files_only=args.local_files_only,
            on_bad_data=args.on_bad_data,
            network_patience=args.network_patience,
            shuffle_buffer=args.shuffle_buffer,
            version=self.origins.text_version,
        )
        if name == "stage2":
            return SourceSpec(
                name=args.second_dataset_name,
                flag="--second_dataset",
                subset=args.second_dataset_subset,
                split=args.second_dataset_split,
                revision=args.second_dataset_revision,
                text_field=args.second_dataset_text_field,
                **shared,
            )
        return SourceSpec(
            name=args.dataset_name,
            subset=args.dataset_subset,
            split=args.dataset_split,
            revision=args.dataset_revision,
            text_field=args.dataset_text_field,
            streaming=not args.no_dataset_streaming,
            **shared,
        )

    def calibration_tokens(self, name: str) -> torch.Tensor:
        """A few sequences of a stage's own text, equal on every rank, int64 [CALIBRATION_SEQUENCES, seq_length]."""
        loader = self._loader(name, Ranks())
        rows: list[torch.Tensor] = []
        for batch in loader:
            rows.extend(batch.tokens[:, :-1])
            if len(rows) >= CALIBRATION_SEQUENCES:
                break
        loader.close()
        return torch.stack(rows[:CALIBRATION_SEQUENCES])

    def held_out_loader(self) -> TextLoader:
        """This rank's loader of the held-out text, at its beginning."""
        version = self.origins.text_version
        return held_out_batches(self.args, self.args.eval_dataset, self.tokenizer, self.ranks, version)

    def choice_loader(self) -> TextLoader:
        """What `--layers auto:K` measures on: the held-out text if there is one, else stage 1's own."""
        if self.args.eval_dataset:
            return held_out_batches(self.args, self.args.eval_dataset, self.tokenizer, Ranks())
        return self._loader("stage1", Ranks())

    def total_steps(self, name: str) -> int:
        """Optimizer steps of a stage; for `--epochs` from the hint, or estimated by sampling."""
        args = self.args
        if name != "stage1" or args.epochs <= 0:
            return planned_steps(args, name, self.ranks.world_size)
        if args.epoch_step_hint:
            return args.epoch_step_hint * args.epochs
        per_epoch = estimate_steps_per_epoch(
            self.source(name),
            self.tokenizer,
            seq_length=args.seq_length,
            sequences_per_step=sequences_a_step(vars(args), self.ranks.world_size),
        )
        log.info("an epoch of %s is about %d optimizer steps (estimated by sampling)", args.dataset_name, per_epoch)
        return max(1, per_epoch * args.epochs)


def held_out_batches(
    args: argparse.Namespace, name: str, tokenizer: Any, ranks: Ranks, version: int = TEXT_VERSION
) -> TextLoader:
    """One unshuffled pass over a held-out source; the same batches every time it is made."""
    spec = SourceSpec(
        name=name,
        subset=args.dataset_subset,
        split=args.dataset_split,
        text_field=args.dataset_text_field,
        shuffle_buffer=0,
        local_files_only=args.local_files_only,
        network_patience=args.network_patience,
        version=version,
    )
    return build_loader(
        spec,
        tokenizer,
        seq_length=args.seq_length,
        batch_size=args.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        epochs=1,
    )
