"""What text a run reads: that of its stages, the held-out text, and the text that layers are chosen on."""

import argparse
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from data import SourceSpec, TextLoader, build_loader, estimate_steps_per_epoch
from origins import Origins
from parallel import Ranks
from text_sources import TEXT_VERSION

log = logging.getLogger(__name__)

CALIBRATION_SEQUENCES = 4


def stage_names(args: argparse.Namespace) -> list[str]:
    """The stages that the flags ask for, in their order."""
    names = []
    if args.matrix_tokens:
        names.append("matrix")
    if args.hidden_tokens:
        names.append("hidden")
    names.append("stage1")
    if args.second_dataset_name and not args.skip_stage2:
        names.append("stage2")
    return names


def sequences_a_step(flags: Mapping[str, Any], ranks: int) -> int:
    """Sequences of an optimizer step, over all ranks."""
    return flags["batch_size"] * flags["grad_accumulation_steps"] * ranks


def sequence_length(args: argparse.Namespace, name: str) -> int:
    """Tokens of a stage's sequences."""
    return args.matrix_seq_length if name == "matrix" else args.seq_length


@dataclass
class RunText:
    """The text of one run, as its flags say, in the tokens of the teacher's tokenizer."""

    args: argparse.Namespace
    tokenizer: Any
    ranks: Ranks = field(default_factory=Ranks)
    origins: Origins = field(default_factory=Origins)

    def loader(self, name: str) -> TextLoader:
        """This rank's loader of a stage; raises `UserError` if the source or its columns are not there or empty."""
        return self._loader(name, self.ranks)

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
                split=args.second_dataset_split,
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


def planned_steps(args: argparse.Namespace, name: str, world_size: int) -> int:
    """Optimizer steps of a stage whose number the flags alone say (not stage 1 with `--epochs`)."""
    tokens = {
        "matrix": args.matrix_tokens,
        "hidden": args.hidden_tokens,
        "stage2": args.second_dataset_tokens * args.second_dataset_epochs,
    }
    if name not in tokens:
        return args.max_steps
    sequences = sequences_a_step(vars(args), world_size)
    return max(1, math.ceil(tokens[name] / (sequences * sequence_length(args, name))))


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
