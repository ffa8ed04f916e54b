"""What text a run reads: that of its stages, the held-out text, and the text that layers are chosen on."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from arguments import Arguments
from checkpoints.origins import Origins
from data import SourceSpec, TextLoader, build_loader, estimate_steps_per_epoch
from evaluation.recall_tasks import KEY_WORDS
from hardware.ranks import Ranks
from run.mixing import commits_of, mix_flag, mixed_sources, shares_of
from run.plan import planned_steps, sequence_length, sequences_a_step
from text.documents import DocumentEncoder
from text.mixture import MixedDataset, vocabulary_of
from text.recall_rows import RecallSequences, recall_sequences
from text.recall_text import RecallText
from text.text_sources import has_subset
from utils import UserError, auto_layers

log = logging.getLogger(__name__)


CALIBRATION_SEQUENCES = 4
CHOICE_SEED = 1_000_003  # added to the seed of generated text


@dataclass
class RunText:
    """The text of one run, as its flags say, in the tokens of the teacher's tokenizer."""

    args: Arguments
    tokenizer: Any
    ranks: Ranks = field(default_factory=Ranks)
    origins: Origins = field(default_factory=Origins)
    _held_out: TextLoader | None = None
    _beginning: dict[str, Any] = field(default_factory=dict)  # the held-out loader's state there

    def open(self, names: list[str], *, fresh: bool) -> dict[str, TextLoader]:
        """The loaders of the stages that are left; what a run reads besides is looked at, too.

        fresh: the run begins, so that layers may have to be chosen.
        """
        log.info("looking at the text of %s ...", ", ".join(names))
        loaders = {name: self.loader(name) for name in names}
        if self.args.eval_dataset:
            self.held_out_loader()
        if fresh and auto_layers(self.args.layers) is not None:
            self.check_choice()
        return loaders

    def loader(self, name: str) -> TextLoader:
        """This rank's loader of a stage; raises `UserError` if the source or its columns are not there or empty."""
        loader = self._loader(name, self.ranks)
        source = loader.dataset.source
        log.info("%s reads %s: %s files of %s bytes", name, source.name, f"{len(source.files):,}", f"{source.size:,}")
        self.origins.note("second_dataset_name" if name == "stage2" else "dataset_name", source.commit)
        if isinstance(loader.dataset, MixedDataset):
            others, shares = loader.dataset.datasets[1:], loader.dataset.shares[1:]
            self.origins.note(mix_flag(name), commits_of([each.source.commit for each in others]))
            for other, share in zip(loader.dataset.names, shares):
                log.info("%s reads %s beside it, for %.3g of its sequences", name, other, share)
        return loader

    def _loader(self, name: str, ranks: Ranks, alone: bool = False) -> TextLoader:
        """A stage's loader; `alone` without what is mixed into it."""
        args, source = self.args, self.source(name)
        return build_loader(
            source,
            self.tokenizer,
            mixed=() if alone else mixed_sources(args, name, source, self.origins.commits.get(mix_flag(name))),
            excluded=KEY_WORDS,
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
        shared: dict[str, Any] = dict(
            local_files_only=args.local_files_only,
            on_bad_data=args.on_bad_data,
            network_patience=args.network_patience,
            shuffle_buffer=args.shuffle_buffer,
            version=self.origins.text_version,
        )
        if name == "stage2":
            return SourceSpec(
                name=args.second_dataset_name,
                flag="--second_dataset_",
                subset=args.second_dataset_subset,
                split=args.second_dataset_split,
                revision=self._revision("second_dataset_name", args.second_dataset_revision),
                text_field=args.second_dataset_text_field,
                **shared,
            )
        return SourceSpec(
            name=args.dataset_name,
            subset=args.dataset_subset,
            split=args.dataset_split,
            revision=self._revision("dataset_name", args.dataset_revision),
            text_field=args.dataset_text_field,
            streaming=not args.no_dataset_streaming,
            **shared,
        )

    def _revision(self, flag: str, given: str | None = None) -> str | None:
        """The commit that the run was begun with, else what the flags say."""
        return self.origins.commits.get(flag, given)

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
        """This rank's loader of the held-out text, one unshuffled pass, put back to its beginning."""
        args = self.args
        if self._held_out is None:
            self._held_out = build_loader(
                self.held_out_source(),
                self.tokenizer,
                seq_length=args.seq_length,
                batch_size=args.batch_size,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                epochs=1,
                document_reset=args.document_reset and self.origins.text_version > 1,
            )
            self.origins.note("eval_dataset", self._held_out.dataset.source.commit)
            self._beginning = self._held_out.state_dict()
        self._held_out.load_state_dict(self._beginning)
        return self._held_out

    def held_out_source(self) -> SourceSpec:
        """The source of the held-out text, as its own flags say; runs begun before them go on with stage 1's."""
        args = self.args
        subset, split = args.eval_dataset_subset, args.eval_dataset_split
        if self.origins.text_version == 1:
            inherited = args.dataset_subset if has_subset(args.eval_dataset, args.dataset_subset) else ""
            subset, split = subset or inherited, split if split != "train" else args.dataset_split
        return SourceSpec(
            name=args.eval_dataset,
            flag="--eval_dataset_",
            subset=subset,
            split=split,
            revision=self._revision("eval_dataset"),
            text_field=args.eval_dataset_text_field,
            shuffle_buffer=0,
            on_bad_data=args.on_bad_data,
            local_files_only=args.local_files_only,
            network_patience=args.network_patience,
            version=self.origins.text_version,
        )

    def choice_loader(self) -> TextLoader:
        """What `--layers auto:K` measures on: `--choice_dataset`, else stage 1's own text; the same on every rank."""
        args = self.args
        if not args.choice_dataset:
            return self._loader("stage1", Ranks(), alone=True)
        return build_loader(
            self.choice_source(),
            self.tokenizer,
            seq_length=args.seq_length,
            batch_size=args.batch_size,
            seed=args.seed,
            epochs=1,
            document_reset=args.document_reset,
        )

    def choice_sequences(self, count: int) -> RecallSequences:
        """Generated sequences for `--layers auto:K`, of stage 1's words; other documents than those of training."""
        source = self._loader("stage1", Ranks(), alone=True).dataset.source
        text = RecallText(vocabulary_of(source, KEY_WORDS), self.args.seed + CHOICE_SEED, self.args.seq_length)
        encoder = DocumentEncoder(self.tokenizer, started=self.origins.text_version > 1)
        return recall_sequences(text, encoder, self.args.seq_length, count)

    def choice_source(self) -> SourceSpec:
        """The source of `--choice_dataset`."""
        source: dict[str, Any] = dict(
            name=self.args.choice_dataset, flag="--choice_dataset_", subset="", split="train"
        )
        source["revision"] = self._revision("choice_dataset")
        return replace(self.source("stage1"), streaming=True, **source)

    def check_choice(self) -> None:
        """Raise a `UserError` where `--layers auto:K` would choose on the text that figures are reported on."""
        args = self.args
        chosen = self.choice_loader().dataset
        chosen_on = chosen.places()
        if args.choice_dataset:
            self.origins.note("choice_dataset", chosen.source.commit)
        if args.choice_recall_share:
            self.choice_sequences(1)
        if not args.eval_dataset:
            return
        both = sorted(chosen_on & self.held_out_loader().dataset.source.places())
        if both:
            where = f"--choice_dataset {args.choice_dataset}" if args.choice_dataset else "the training text"
            raise UserError(
                f"--layers auto:K chooses on {where}, of which {both[0]} is in --eval_dataset {args.eval_dataset} "
                "too; name other text with --choice_dataset"
            )

    def total_steps(self, name: str) -> int:
        """Optimizer steps of a stage; for `--epochs` from the hint, or estimated by sampling."""
        args = self.args
        if name != "stage1" or args.epochs <= 0:
            return planned_steps(args, name, self.ranks.world_size)
        if args.epoch_step_hint:
            return args.epoch_step_hint * args.epochs
        own_share = 1 - sum(shares_of(args, name).values())
        per_epoch = estimate_steps_per_epoch(
            self.source(name),
            self.tokenizer,
            seq_length=args.seq_length,
            sequences_per_step=sequences_a_step(vars(args), self.ranks.world_size) * own_share,
        )
        log.info("an epoch of %s is about %d optimizer steps (estimated by sampling)", args.dataset_name, per_epoch)
        return max(1, per_epoch * args.epochs)
