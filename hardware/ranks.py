"""The processes of one run: who is who, what they agree on, and how all of them end when one fails.

Without a launcher there is one rank, and nothing here costs anything. Every rank reads the same flags and the same
text. What only one of them can know (a signal, a clock, a broken file) is agreed on before anybody acts on it, and
work of a rank's own that may fail goes through `Ranks.together`, so that no rank waits for one that has failed.
"""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from utils import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")  # torchrun sets them all
LOST = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe|nccl|remote process", re.IGNORECASE)
VOTES = 8  # int32 of every vote: a failure, then flags; one shape for all, since a failure may meet any of them
PATIENCE = 40.0  # seconds that a rank has to come and agree on another's failure
COLLECTIVE_MINUTES = 10  # a training step's waiting for another rank; NCCL ends the process then
AGREEMENT_MINUTES = 60  # agreeing on something: the others wait so while the first writes a checkpoint
TROUBLE = 4  # exit status


class RankLost(RuntimeError):
    """Another rank is gone: nothing that needs all of them can be done any more."""


class RankFailed(RuntimeError):
    """Work of a rank's own failed, and all ranks know; its cause, on that rank, is what went wrong."""


class SharedMistake(UserError):
    """A user's mistake that showed on one rank, raised on all of them."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone unless a launcher says otherwise.

    group: for agreements alone (gloo), so that a rank that failed is not mistaken for one that takes part in the
    others' collectives. watch: ends a rank that never comes to agree.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    group: Any = None
    watch: "FailureWatch | None" = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def device(self, name: str) -> str:
        """The rank's own device: under a launcher any CUDA device means that of its local rank."""
        return f"cuda:{self.local_rank}" if self.world_size > 1 and name.startswith("cuda") else name

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on each of them; the argument stays as it is."""
        if self.alone:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def agree(self, *flags: bool, failure: Exception | None = None) -> list[bool]:
        """For each flag, whether it is true on any rank. Raises `RankLost`.

        A failure of any rank is raised on all: `SharedMistake` for a `UserError`, else `RankFailed`; alone it is
        raised as it is. It may come from any work between two agreements: it meets whatever the others agree on.
        """
        if self.alone:
            if failure is not None:
                raise failure
            return [bool(flag) for flag in flags]
        if failure is not None and self.watch is not None:
            self.watch.report(described(failure, self.rank))
        votes = torch.zeros(VOTES, dtype=torch.int32)
        votes[: 1 + len(flags)] = torch.tensor([failure is not None, *flags])
        with losses_of_ranks():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        failed, *agreed = [bool(vote) for vote in votes.tolist()]
        if failed:
            self._raise_on_all(failure)
        return agreed[: len(flags)]

    def _raise_on_all(self, failure: Exception | None) -> None:
        own = None if failure is None else (isinstance(failure, UserError), described(failure, self.rank))
        mistake, text = next(complaint for complaint in self._everyones(own) if complaint is not None)
        if self.watch is not None:
            self.watch.all_know()
        raise (SharedMistake if mistake else RankFailed)(text) from failure

    def _everyones(self, value: object) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        with losses_of_ranks():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def gather(self, value: object) -> list[Any]:
        """A small value of every rank, in their order, on every rank. Raises as `agree`."""
        if self.alone:
            return [value]
        self.agree()
        return self._everyones(value)

    def together(self, work: Callable[[], T]) -> T:
        """Do on every rank what may fail on any of them: a failure is raised on all, as by `agree`.

        Other agreements may be part of the work.
        """
        if self.alone:
            return work()
        try:
            result = work()
        except (RankLost, RankFailed, SharedMistake):  # nobody left to tell, or told already
            raise
        except Exception as error:
            self.agree(failure=error)
            raise AssertionError("a failure that was agreed on is raised") from error
        self.agree()
        return result

    def first(self, work: Callable[[], T]) -> T:
        """Do something on the first rank; its (small) result, or its failure, is every rank's."""
        result = self.together(lambda: work() if self.is_first else None)
        return self.gather(result)[0]

    def report(self, error: Exception) -> None:
        """Tell the others of a failure with which this rank leaves, so that none waits for it."""
        if self.watch is not None:
            self.watch.report(described(error, self.rank))

    def reported(self) -> str | None:
        """Another rank's failure that is not agreed on."""
        return None if self.watch is None else self.watch.reported()

    def in_step(self, items: Iterable[T]) -> Iterator[T]:
        """Each rank's own items, while every rank has one; a failure to get one is raised on all, as by `agree`."""
        iterator = iter(items)
        while True:
            item, over, failure = None, False, None
            try:
                item = next(iterator)
            except StopIteration:
                over = True
            except Exception as error:
                failure = error
            if self.agree(over, failure=failure)[0]:
                return
            yield item  # type: ignore[misc]


def described(error: Exception, rank: int) -> str:
    """An error of a rank in one line; the first rank's mistakes of a user without its number."""
    if isinstance(error, UserError):
        return str(error) if rank == 0 else f"rank {rank}: {error}"
    return f"rank {rank}: {type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Of an error's message."""
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def losses_of_ranks() -> Iterator[None]:
    """A collective that fails, fails because of a rank that is gone: `RankLost`, in one line."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost("another rank is gone") from error


def is_loss_of_rank(error: BaseException) -> bool:
    """True for `RankLost`, and for what a collective within a backward pass raises when another rank is gone."""
    return isinstance(error, RankLost) or (isinstance(error, RuntimeError) and bool(LOST.search(str(error))))


class FailureWatch:
    """Ends this process when a rank has failed and this one does not come to agree on it within `patience` seconds.

    It waits then in a collective that the failed one never enters, where NCCL would let it wait for minutes. The
    launcher's key-value store carries the news, since that needs no other rank.
    """

    def __init__(self, store: dist.Store, patience: float = PATIENCE):
        self.store, self.patience = store, patience
        self.failures = 0  # that all ranks have agreed on
        self.over = threading.Event()
        threading.Thread(target=self._watch, name="failures", daemon=True).start()

    def report(self, text: str) -> None:
        """Tell the others' watches of this rank's failure."""
        with contextlib.suppress(RuntimeError):  # a store that is gone: so are the others
            self.store.set(f"failure/{self.failures}", text)

    def reported(self) -> str | None:
        """A failure that not all ranks have agreed on yet, if there is one."""
        key = f"failure/{self.failures}"
        try:
            return self.store.get(key).decode() if self.store.check([key]) else None
        except RuntimeError:
            return None

    def all_know(self) -> None:
        """All ranks are here: what follows, such as a last checkpoint, may take its time."""
        self.failures += 1

    def close(self) -> None:
        self.over.set()

    def _watch(self) -> None:
        while not self.over.wait(1.0):
            failures, reason = self.failures, self.reported()
            if reason is None or self.over.wait(self.patience) or self.failures != failures:
                continue
            log.error("stopped, without a checkpoint of this step: %s; this rank waited in vain for it", reason)
            logging.shutdown()
            os._exit(TROUBLE)


@contextlib.contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """The ranks of this run: joined as a launcher's environment says, or this process alone.

    Two backends in one group: NCCL for tensors on CUDA devices, gloo for those on the CPU. NCCL's and torchrun's
    variables are theirs: nothing is set here.
    """
    if not all(name in os.environ for name in LAUNCHED_BY):
        yield Ranks()
        return
    rank, local_rank, world_size, on_host = (int(os.environ[name]) for name in LAUNCHED_BY[:4])
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    if cuda and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    store, _, _ = next(rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=COLLECTIVE_MINUTES),
    )
    agreements = dist.new_group(backend="gloo", timeout=timedelta(minutes=AGREEMENT_MINUTES))
    watch = FailureWatch(dist.PrefixStore("watch", store))
    try:
        yield Ranks(rank, local_rank, world_size, on_host, agreements, watch)
    except Exception as error:
        if not isinstance(error, RankLost | RankFailed | SharedMistake):
            watch.report(described(error, rank))
        raise
    finally:
        watch.close()
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
