"""What the client does when workers die, stall or disagree: their cells go to other replicas of the stage."""

from collections.abc import Sequence

from trainer.coordinator_book import StepBook
from trainer.coordinator_ports import PeerLeft, Rerouted, StageEmpty
from trainer.coordinator_roster import Member, Status
from trainer.coordinator_round import Round
from trainer.coordinator_standstill import Pauses, Standstills
from trainer.coordinator_state import SwarmState
from trainer.messages import NotFinite, Repeat, Reroute
from trainer.monitors import Why
from trainer.payloads import MessageError, Reason
from trainer.schedule import substitute


class StageLost(Exception):
    """A stage has had no worker, or none that makes progress, for longer than the task waits."""

    def __init__(self, stage: int) -> None:
        super().__init__(f"stage {stage} has lost all its workers")
        self.stage = stage


class StageFull(Exception):
    """Nobody of a stage has the memory for a cell, and nobody else is about to come."""

    def __init__(self, step: int, stage: int) -> None:
        super().__init__(f"step {step}, stage {stage}: no worker has enough memory")
        self.step = step
        self.stage = stage


class StepFailed(Exception):
    """Something in a step is not finite wherever it is computed; the state before it is still good."""

    def __init__(self, step: int, stage: int, what: str) -> None:
        super().__init__(f"step {step}, stage {stage}: {what} is not finite")
        self.step = step
        self.stage = stage
        self.what = what


_SUM = -1
_SLOW = "slow"
_AWAY = 4
"""How many times what a newcomer may take a full stage waits for its absent members to come back."""


class Repairs:
    """Deadlines and repairs of a swarm's running step."""

    def __init__(self, swarm: SwarmState) -> None:
        self._swarm = swarm
        self._patience = swarm.config.patience
        self._reduce_seconds: float | None = None
        self._empty_since: dict[int, float] = {}
        self._standstills = Standstills()
        self._pauses = Pauses[str](self._patience.tick, self._patience.floor)
        self._broken = Pauses[tuple[str, str]](self._patience.tick, self._patience.floor)
        """Links between two workers that broke, sender first, over which what was lost is sent again."""
        self._suspected: set[int] = set()
        self._unreached: set[tuple[str, str]] = set()
        """Pairs of workers of which one could not reach the other in this step."""

    @property
    def empty_since(self) -> float | None:
        """Since when the stage that has been without a worker, or without one that gets on, for longest has none."""
        empty = self._swarm.roster.empty_stages()
        since = [since for stage, since in self._empty_since.items() if stage in empty]
        return min((*since, *self._standstills.lost(self._swarm.now()).values()), default=None)

    @property
    def stuck_stages(self) -> frozenset[int]:
        """The stages whose workers are connected and none of which gets on."""
        return frozenset(self._standstills.lost(self._swarm.now()))

    def heard(self, member: Member, is_done: bool) -> None:
        """Note that a worker made progress, or has finished a cell."""
        self.is_getting_on(member.stage)
        if is_done:
            self._standstills.finished(member.stage)
        self._swarm.pace.heard(member.peer, self._swarm.now())

    def is_getting_on(self, stage: int) -> None:
        """Note that some worker of a stage answers, or is new."""
        self._standstills.progress(stage)

    def tick(self) -> None:
        """Act on every deadline that has passed; raise `StageLost`, `StageFull`."""
        now = self._swarm.now()
        for member in self._swarm.roster.of(Status.PREPARING):
            if now - member.asked_at > self._patience.join * 2 ** min(member.failures, 3):
                self.leave_out(member, "late")
        self._empty_since = {s: t for s, t in self._empty_since.items() if s in self._swarm.roster.empty_stages()}
        for stage in self._swarm.roster.empty_stages():
            if not self._swarm.roster.newcomers(stage):
                self._await_stage(stage, now)
        if self._swarm.book is not None:
            self._check_step(self._swarm.book, now)

    def _check_step(self, book: StepBook, now: float) -> None:
        for stage in range(book.stages):
            if self._lacks_memory(stage):
                self._find_memory(book, stage, now)
        for stage in self._standstills.older_than(self._patience.empty, now):
            raise StageFull(book.step, stage) if self._lacks_memory(stage) else StageLost(stage)
        for peer, why in self._pauses.over(now).items():
            if self._swarm.roster.has(peer):
                self._relieve(book, self._swarm.roster.get(peer), why)
        for sender, receiver in self._broken.over(now):
            self._send_again(book, sender, receiver)
        for member in self._swarm.roster.of(Status.READY):
            if self._swarm.pace.is_overdue(member.peer, self._swarm.roster.ready(member.stage), now):
                self.stall(book, member, _SLOW)
        for stage in range(book.stages):
            if (current := self._swarm.active(stage)) is not None:
                self._check_round(current, now)

    def _await_stage(self, stage: int, now: float) -> None:
        if stage not in self._empty_since:
            self._empty_since[stage] = now
            self._swarm.ports.report(StageEmpty(self._swarm.step + 1, stage))
        if now - self._empty_since[stage] > self._patience.vacant:
            raise StageLost(stage)
        self._call(stage, now)

    def _call(self, stage: int, now: float) -> None:
        """Ask the absent members of a stage for whose help it waits."""
        ready, absent = self._swarm.roster.ready(stage), self._swarm.roster.of(Status.ABSENT, stage)
        for member in absent:
            if now - member.asked_at > self._patience.floor:
                self._swarm.invite(member, (*ready, *(other.peer for other in absent if other is not member)))

    def _lacks_memory(self, stage: int) -> bool:
        """Whether a stage has workers, all of which have lacked memory since one of them finished a cell."""
        ready = self._swarm.roster.ready(stage)
        return bool(ready) and self._standstills.full(stage).issuperset(ready)

    def _find_memory(self, book: StepBook, stage: int, now: float) -> None:
        """Ask a full stage's absent members for help; raise `StageFull` when it, and they, have had their time.

        That the chain lists a member does not say that it lives: who has failed before is given some time to come back.
        """
        if self._swarm.roster.newcomers(stage):
            return
        self._call(stage, now)
        ready = self._swarm.roster.ready(stage)
        is_alone = not self._swarm.roster.others(stage)
        if self._standstills.is_full(stage, ready, now - (0.0 if is_alone else _AWAY * self._patience.join)):
            raise StageFull(book.step, stage)

    def _check_round(self, current: Round, now: float) -> None:
        usual = self._patience.first if self._reduce_seconds is None else self._reduce_seconds
        if current.is_complete:
            return
        # each further attempt gets twice the time, so that slowness alone cannot keep a step from ending
        limit = max(self._patience.floor, self._patience.factor * usual) * 2 ** min(current.request.attempt - 1, 6)
        if now - current.since <= limit:
            return
        suspects = current.suspects() if current.is_probed else ()
        ready = self._swarm.roster.ready(current.stage)
        if current.is_probed and current.silent.issuperset(ready):  # whoever only computes does answer a probe
            self._standstills.note(current.stage, ready, ready, limit, now)
        if not set(ready) - set(suspects):
            suspects = suspects[1:]  # the stage needs somebody
        if now - current.started > self._patience.empty:
            suspects = tuple(sorted(current.waiting))
        for peer in suspects:
            self.leave_out(self._swarm.roster.get(peer), _SLOW)
        if not suspects:
            for peer in current.probe(now):
                self._swarm.post(peer, current.request)

    def learn_reduction(self, seconds: float) -> None:
        """Take the time that the slowest round of a committed step took."""
        self._reduce_seconds = seconds

    def lose(self, peer: str, why: str) -> None:
        """Leave out a worker whose link is gone."""
        member = self._swarm.roster.get(peer)
        if member.status is not Status.ABSENT:
            self.leave_out(member, why)

    def leave_out(self, member: Member, why: str) -> None:
        """Have a member sit out for some steps, and what it held done again."""
        took_part = member.status is Status.READY
        running = self._swarm.step if self._swarm.book is None else self._swarm.book.step
        self._swarm.roster.leave_out(member, running)
        if took_part:
            self._swarm.ports.report(PeerLeft(self._swarm.step + 1, member.stage, member.peer, why))
            self.repair(member, why)

    def repair(self, member: Member, why: str) -> None:
        """Have everything that is lost with a worker done again."""
        book, current = self._swarm.book, self._swarm.active(member.stage)
        if book is None:
            return
        if current is not None and current.can_spare(member.peer):
            for each in (self._swarm.rounds.get(member.stage), self._swarm.applies.get(member.stage)):
                if each is not None:
                    each.spare(member.peer)
            return
        again = self._swarm.drop_round(member.stage)
        if held := book.held(member.stage, member.peer):
            self._swarm.ports.report(Rerouted(book.step, member.stage, member.peer, held, why))
        for stage in again:  # what somebody left who could be spared then is lost as well
            ready, owners = self._swarm.roster.ready(stage), book.owners(stage)
            self.reassign(book, stage, [cell for cell in book.cells if owners[cell] not in ready], ())
        self._swarm.watch(book)

    def stall(self, book: StepBook, member: Member, why: str) -> None:
        """Take the unfinished cells from a worker that makes no progress, or have it try again after a pause."""
        now, replicas = self._swarm.now(), self._swarm.roster.ready(member.stage)
        limit = self._swarm.pace.deadline(replicas)
        self._standstills.note(member.stage, (member.peer,), replicas, limit, now)
        if why == Reason.MEMORY_FULL:
            # a deadline for what is being computed, and then as long as a newcomer may take
            self._standstills.note_full(member.stage, member.peer, now + limit + self._patience.join)
        is_replaceable = bool(set(replicas) - {member.peer} - self._standstills.full(member.stage))
        if is_replaceable or why == _SLOW:
            self._relieve(book, member, why)
        else:
            self._pauses.begin(member.peer, why, now)

    def _relieve(self, book: StepBook, member: Member, why: str) -> None:
        """Give the unfinished cells of a worker to others, best to who has memory; an only one tries once more."""
        if not (cells := book.missing(member.stage, member.peer)):
            return
        others = set(self._swarm.roster.ready(member.stage)) - {member.peer}
        if not others:
            self._ask_again(book, member, cells)
            return
        full = self._standstills.full(member.stage)
        self._swarm.pace.penalise(member.peer, self._swarm.now())
        self._swarm.ports.report(Rerouted(book.step, member.stage, member.peer, cells, why))
        for cell in cells:
            if why != Reason.MEMORY_FULL and book.moves[member.stage, cell] > 1:
                self._change_neighbour(book, member.stage, cell)
        excluded = full | {member.peer} if others - full else {member.peer}
        self.reassign(book, member.stage, cells, tuple(excluded))
        self._swarm.watch(book)

    def _ask_again(self, book: StepBook, member: Member, cells: Sequence[int]) -> None:
        """Have a stage's only worker, and its neighbours, repeat what may have been missed."""
        self._swarm.pace.postpone(member.peer, self._swarm.now())
        for cell in cells:
            self._swarm.broadcast(Reroute(book.generation, book.step, cell, member.stage, member.peer))
            self._swarm.feed(book, member.stage, cell)
        self._swarm.watch(book)

    def _change_neighbour(self, book: StepBook, stage: int, cell: int) -> None:
        """Move a cell that fails at one replica after another at the stage it waits for, too."""
        other = stage + 1 if book.has_passed(stage, cell) else stage - 1
        if 0 <= other < book.stages:
            owner = book.routes[cell][other]
            if set(self._swarm.roster.ready(other)) - {owner}:
                self.reassign(book, other, [cell], (owner,))

    def start_step(self) -> None:
        """Forget what was not finite, and who stood still, in the step before."""
        self._suspected.clear()
        self._standstills.clear()
        self._pauses.clear()
        self._broken.clear()
        self._unreached.clear()

    def not_finite(self, book: StepBook, member: Member, message: NotFinite) -> None:
        """Have a cell done by others once; raise `StepFailed` if it is not finite there either.

        Of a worker that says so of its neighbour either may be wrong, so that both are replaced.
        """
        cell, at_fault = message.cell, message.stage
        if cell not in book.cells or at_fault >= book.stages or abs(at_fault - member.stage) > 1:
            raise MessageError(Reason.UNKNOWN_CELL, f"stage {at_fault}, cell {cell}")
        if book.routes[cell][member.stage] != member.peer:
            raise MessageError(Reason.WRONG_SENDER, f"{member.peer} does not own cell {cell}")
        moves = []
        # who is at fault goes first, or it would send its result once more to who comes next
        for stage in dict.fromkeys((at_fault, member.stage)):
            owner = book.routes[cell][stage]
            if set(self._swarm.roster.ready(stage)) - {owner}:
                moves.append((stage, owner))
        if cell in self._suspected or not moves:
            is_loss = at_fault == book.stages - 1 and message.what == "output"
            raise StepFailed(book.step, at_fault, f"the {'loss' if is_loss else message.what} of micro-batch {cell}")
        self._suspected.add(cell)
        for stage, owner in moves:
            self._swarm.ports.report(Rerouted(book.step, stage, owner, (cell,), Reason.NOT_FINITE))
            self._swarm.suspect(stage, owner, Why.NOT_FINITE)
            self.reassign(book, stage, [cell], (owner,))
        self._swarm.watch(book)

    def note_cell(self, book: StepBook) -> None:
        """Look at a step one more of whose cells was reported."""

    def note_complete(self, book: StepBook) -> None:
        """Look at a step all of whose cells are in."""

    def note_round(self, current: Round) -> None:
        """Look at a round with one more answer."""

    def bad_sum(self, book: StepBook, member: Member, _reporter: Member) -> None:
        """Go on once in a step without a worker whose sum is not finite, then raise `StepFailed`."""
        if member.status is not Status.READY:
            return
        others = set(self._swarm.roster.ready(member.stage)) - {member.peer}
        if _SUM in self._suspected or not others:
            raise StepFailed(book.step, member.stage, "the sum of the gradients")
        self._suspected.add(_SUM)
        self._swarm.suspect(member.stage, member.peer, Why.NOT_FINITE)
        self.leave_out(member, Reason.NOT_FINITE)

    def bypass(self, book: StepBook, member: Member, unreachable: Member) -> None:
        """Lead cells around a broken link between two workers, or try it again where there is no way around."""
        if unreachable.status is not Status.READY or member.status is not Status.READY:
            return
        if unreachable.stage == member.stage:
            self.leave_out(unreachable, Reason.PEER_UNREACHABLE)
            return
        self._unreached |= {(member.peer, unreachable.peer), (unreachable.peer, member.peer)}
        is_reducing = {member.stage, unreachable.stage} <= self._swarm.rounds.keys()
        for stuck, other in () if is_reducing else ((unreachable, member), (member, unreachable)):
            useless = [p for p in self._swarm.roster.ready(stuck.stage) if (p, other.peer) in self._unreached]
            if set(self._swarm.roster.ready(stuck.stage)) - set(useless):
                shared = set(book.held(other.stage, other.peer))
                cells = [cell for cell in book.held(stuck.stage, stuck.peer) if cell in shared]
                self._swarm.ports.report(
                    Rerouted(book.step, stuck.stage, stuck.peer, tuple(cells), Reason.PEER_UNREACHABLE)
                )
                self.reassign(book, stuck.stage, cells, tuple(useless))
                self._swarm.watch(book)
                return
        self._broken.begin((member.peer, unreachable.peer), Reason.PEER_UNREACHABLE, self._swarm.now())

    def _send_again(self, book: StepBook, sender: str, receiver: str) -> None:
        """Have a worker send again what another one of another stage lacks of it; that is no progress of either."""
        if not (self._swarm.takes_part(sender) and self._swarm.takes_part(receiver)):
            return
        stage, other = self._swarm.roster.get(sender).stage, self._swarm.roster.get(receiver).stage
        cells = set(book.missing(other, receiver)) & set(book.held(stage, sender))
        for cell in sorted(cells):
            self._swarm.post(sender, Reroute(book.generation, book.step, cell, other, receiver))
        if not cells and (current := self._swarm.rounds.get(stage)) is not None:
            self._swarm.post(sender, Repeat(book.generation, book.step, current.request.attempt, receiver))

    def reassign(self, book: StepBook, stage: int, cells: Sequence[int], excluded: tuple[str, ...]) -> None:
        """Give cells to the replicas that would finish them first; without any, they wait for one."""
        weights = self._swarm.pace.weights(self._swarm.roster.ready(stage))
        load = {peer: len(book.missing(stage, peer)) for peer in weights}
        for cell in cells:
            peer = substitute(load, weights, excluded)
            if peer is None:
                book.reopen(stage, cell)
                continue
            load[peer] += 1
            book.move(stage, cell, peer)
            self._swarm.broadcast(Reroute(book.generation, book.step, cell, stage, peer))
            self._swarm.feed(book, stage, cell)
            self._replace_spared(book, stage, cell)

    def _replace_spared(self, book: StepBook, stage: int, cell: int) -> None:
        """Have a neighbour's part done again if its owner left after its stage had reduced."""
        for other in (stage - 1, stage + 1):
            if 0 <= other < book.stages:
                ready = self._swarm.roster.ready(other)
                if ready and book.routes[cell][other] not in ready:
                    self.reassign(book, other, [cell], ())
